"""Teleports to where any objective is larger, by the general ascent through the action."""

from functools import partial
from types import SimpleNamespace

import torch

from .ascent import Orbit, ascend
from .groups import act_on, exponential, unwrapped
from .moving import act_on_
from .stacks import plan_of


def teleport_to(model, symmetry, objective, lr, steps, optimizer=None, *, also=(), **limits):
    """Move a model in place to where an objective is larger; return its path [steps + 1].

    objective(parameters) returns a number from {name: tensor}, which is differentiated; lr < 0
    descends. limits: `stop` and `max_norm` of `ascend`, which bounds |T|_F of each element. What
    moves along is what `teleport_` moves. Raises its errors, and ValueError where the objective is
    not finite: then nothing has moved.
    """
    model = unwrapped(model)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    plan = plan_of(model, parameters, symmetry)

    def act(tensors, elements):
        moved = act_on(dict(zip(plan.names, tensors)), symmetry, elements)
        return [moved[name] for name in plan.names]

    def value(tensors):
        return objective({**parameters, **dict(zip(plan.names, tensors))})

    start = [parameters[name] for name in plan.names]
    zeros = [plan.like.new_zeros(group.count, group.size, group.size) for group in symmetry]
    orbit = Orbit(act, [exponentials(group) for group in symmetry], zeros)
    _, path = ascend(orbit, value, start, lr, steps, **limits)
    if not path.objective.isfinite().all():
        raise ValueError(f"the objective becomes {path.objective[-1]}: take a smaller lr")
    act_on_(model, symmetry, path.group_elements, optimizer, also=also)
    return path.objective


def exponentials(group):
    """Return what an `Orbit` needs of a group: any T is allowed, and g = exp(T)."""
    return SimpleNamespace(project=lambda T: T, element=partial(exponential, group))


def gradient_norm(loss, names):
    """Return an objective, |∇L|² over the parameters of these names.

    loss: L, a function of {name: tensor}, as objectives are.
    For a symmetry, which keeps the loss on all data, `teleport_` climbs it at a small part of the
    cost.
    """

    def objective(parameters):
        some = {name: parameters[name] for name in names}
        gradient = torch.func.grad(lambda part: loss({**parameters, **part}))(some)
        return sum((g**2).sum() for g in gradient.values())

    return objective


def mean_perturbed_loss(loss, radii, seed=0):
    """Return an objective, φ (Eq. 4), with one direction for each radius, uniform on the sphere.

    loss: as in `gradient_norm`. Every evaluation takes the directions of `seed`.
    """

    def objective(parameters):
        generator, total = torch.Generator().manual_seed(seed), 0
        for radius in radii:
            d = {n: torch.randn(p.shape, generator=generator).to(p) for n, p in parameters.items()}
            length = sum((part**2).sum() for part in d.values()).sqrt()
            total = total + loss({n: p + radius / length * d[n] for n, p in parameters.items()})
        return total / len(radii)

    return objective
