"""Gradient ascent along an orbit: the parameters that group elements reach from given ones.

A step begins at the identity, T = 0, and moves along the slope of the objective in T. Leading
dimensions of an objective's value are runs, each of which moves alone.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

INF = float("inf")


class Orbit(NamedTuple):
    """How group elements act on parameters: lists of tensors, whose leading dimensions are runs."""

    act: Callable  # (parameters, a g for each group) -> new parameters
    actions: list  # for each group: project(T) is the nearest T allowed, element(T) is its g
    zeros: list  # T = 0 of each group: [..., d, d]


class Path(NamedTuple):
    """What an ascent passed: the objective [steps + 1, ...], and for each group the product g."""

    objective: torch.Tensor
    group_elements: list


def ascend(orbit, objective, parameters, lr, steps, stop=INF, max_norm=INF, gradient=None):
    """Move by `steps` steps T = lr × slope; return the new parameters and the Path.

    objective(parameters) returns what is to grow, [...]. lr: a number or a tensor [...], negative
    to descend. A run whose objective is above `stop` stays where it is, and a step is cut where
    |T|_F of a group is above `max_norm`. gradient: as `slopes` takes it.
    """

    def choose(value, slopes):
        going = value <= torch.as_tensor(stop).to(value)
        rate = torch.as_tensor(lr).to(value)[..., None, None]
        T = [rate * slope for slope in slopes]
        if max_norm < INF:
            lengths = [t.norm(dim=(-2, -1), keepdim=True) for t in T]
            T = [t * (max_norm / length).clamp(max=1) for t, length in zip(T, lengths)]
        return T, going

    return follow(orbit, objective, parameters, choose, steps, gradient=gradient)


def ascend_to(target, orbit, objective, parameters, length, steps, gradient=None):
    """Move until the objective has reached a target; return the new parameters and the Path.

    target: a number or a tensor [...]. Runs that begin above it descend, and runs whose target is
    nan stay. A step has the length `length`, the norm of all T together, or less where the slope
    says that the target is nearer. A run ends after `steps` steps, where it has reached its target,
    or where a step would not bring it nearer; that step is not taken. The other arguments are those
    of `ascend`.
    """
    start = objective(parameters)
    target = torch.as_tensor(target).to(start)
    sign = torch.where(start > target, -1.0, 1.0)

    def choose(value, slopes):
        norm = sum((slope**2).sum((-2, -1)) for slope in slopes).sqrt()
        # a little beyond, so that the target is reached rather than approached
        step = sign * (1.05 * (target - value).abs() / norm).clamp(max=length) / norm
        return [step[..., None, None] * slope for slope in slopes], sign * (value - target) < 0

    def nearer(value, new):
        return sign * (new - value) > 0

    return follow(orbit, objective, parameters, choose, steps, nearer, gradient)


@torch.no_grad()
def follow(orbit, objective, parameters, choose, steps, accept=None, gradient=None):
    """Move by steps that `choose` chooses; return the new parameters and the Path.

    choose(value, slopes) returns T for each group, and which runs go on, [...]. accept(value, new)
    says in which of them the objective's new value is acceptable; the others stay.
    """
    path, total = [], [torch.eye(zero.shape[-1]).to(zero).expand_as(zero) for zero in orbit.zeros]
    for _ in range(steps):
        value, slope = slopes(orbit, objective, parameters, gradient)
        path.append(value)
        T, going = choose(value, slope)
        if not going.any():
            break
        # where a slope is infinite 0 times it is not 0, and its entry of T stays 0
        T = [torch.where(spread(going, t), t, 0.0).nan_to_num(0.0, 0.0, 0.0) for t in T]
        elements = [action.element(t) for action, t in zip(orbit.actions, T)]
        moved = orbit.act(parameters, elements)
        if accept:
            going = going & accept(value, objective(moved))
            if not going.any():
                break
        parameters = [torch.where(spread(going, p), new, p) for new, p in zip(moved, parameters)]
        total = [torch.where(spread(going, g), g @ old, old) for g, old in zip(elements, total)]
    else:
        path.append(objective(parameters))
    return parameters, Path(torch.stack(path), total)


def spread(mask, tensor):
    """Return a mask [...] with dimensions of size 1 appended, as many as `tensor` has more."""
    return mask.reshape(mask.shape + (1,) * (tensor.dim() - mask.dim()))


def slopes(orbit, objective, parameters, gradient=None):
    """Return the objective [...] and its gradient in the T of each group at T = 0, projected.

    The objective is evaluated where T = 0 leads, which is elsewhere if the action keeps the outputs
    of a batch alone. gradient(parameters) returns the objective and its gradient in the parameters;
    by default autograd finds it.
    """
    with torch.enable_grad():
        T = [zero.requires_grad_() for zero in map(torch.zeros_like, orbit.zeros)]
        elements = [action.element(t) for action, t in zip(orbit.actions, T)]
        moved = orbit.act(parameters, elements)
        value, grad = (gradient or by_autograd(objective))([m.detach() for m in moved])
    outputs, gradients = zip(*((m, g) for m, g in zip(moved, grad) if m.requires_grad))
    found = torch.autograd.grad(outputs, T, gradients, materialize_grads=True)
    return value, [action.project(t) for action, t in zip(orbit.actions, found)]


def by_autograd(objective):
    """Return a function of parameters that gives objective(parameters) and its gradient."""

    def value_and_gradient(parameters):
        leaves = [p.requires_grad_() for p in parameters]
        with torch.enable_grad():
            value = objective(leaves)
            gradient = torch.autograd.grad(value.sum(), leaves, materialize_grads=True)
        return value.detach(), gradient

    return value_and_gradient
