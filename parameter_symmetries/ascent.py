"""Gradient ascent along an orbit: the points that group elements reach from given parameters.

Every step starts at the identity, T = 0, and follows the slope of the objective in T there. The
leading dimensions of the objective's value are runs, and each run moves by itself.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

INF = float("inf")


class Orbit(NamedTuple):
    """How groups act on parameters, a list of tensors."""

    act: Callable  # (parameters, an element g for each group) -> new parameters
    actions: list  # for each group: project(T) is the nearest T allowed, element(T) its g
    zeros: list  # for each group T = 0, [..., d, d]


class Path(NamedTuple):
    """What an ascent went through."""

    objective: torch.Tensor  # its value before the first step and after each step, [steps + 1, ...]
    group_elements: list  # for each group the product of the steps' elements, [..., d, d]


@torch.no_grad()
def ascend(orbit, objective, parameters, lr, steps, stop=INF, max_norm=INF, gradient=None):
    """Take gradient steps T = lr × slope; return the new parameters and the Path.

    objective(parameters) returns the value that is to grow, [...]; where lr is negative it falls.
    It is called with autograd and without: use torch.func for derivatives in it.
    lr and stop are numbers or tensors [...]. A run stops once its value is above `stop`; when all
    have stopped, the path ends. A step with |T|_F > max_norm in a group is scaled down to that
    norm. gradient: as in `slopes`.
    """
    path, product, going = [], identities(orbit), True
    for _ in range(steps):
        value, slope = slopes(orbit, objective, parameters, gradient)
        path.append(value)
        going = going & (value <= as_tensor(stop, value))  # False for nan
        if not going.any():
            break
        T = scaled(slope, torch.where(going, as_tensor(lr, value), 0.0))
        if max_norm < INF:
            norms = [t.norm(dim=(-2, -1), keepdim=True) for t in T]
            T = [t * (max_norm / norm).clamp(max=1) for t, norm in zip(T, norms)]
        elements = [action.element(t) for action, t in zip(orbit.actions, T)]
        parameters = choose(going, orbit.act(parameters, elements), parameters)
        product = [g @ before for g, before in zip(elements, product)]
    else:
        path.append(objective(parameters))
    return parameters, Path(torch.stack(path), product)


@torch.no_grad()
def ascend_to(target, orbit, objective, parameters, length, steps):
    """Move until the objective has reached a target; return the new parameters and the Path.

    target: a number or a tensor [...]. A run that starts above its target descends; one whose
    target is nan stays. A step has the length |T| = `length` over all groups, or less if the slope
    says that the target is nearer. A run stops when it has reached its target, or when a step
    would not bring it nearer; that step is not taken. When no run is left, the path ends.
    """
    value = objective(parameters)
    target = as_tensor(target, value)
    sign = torch.where(value > target, -1.0, 1.0)
    going = sign * (value - target) < 0
    path, product = [value], identities(orbit)
    for _ in range(steps):
        if not going.any():
            break
        _, slope = slopes(orbit, objective, parameters)
        norm = sum((t * t).sum(tuple(range(value.dim(), t.dim()))) for t in slope).sqrt()
        # a little beyond the target, so that it is reached rather than approached
        step = (1.05 * (target - value).abs() / norm).clamp(max=length)
        T = scaled(slope, sign * step / norm)
        elements = [action.element(t) for action, t in zip(orbit.actions, T)]
        moved = orbit.act(parameters, elements)
        new = objective(moved)
        going = going & (sign * (new - value) > 0)
        parameters = choose(going, moved, parameters)
        product = choose(going, [g @ before for g, before in zip(elements, product)], product)
        value = torch.where(going, new, value)
        path.append(value)
        going = going & (sign * (value - target) < 0)
    return parameters, Path(torch.stack(path), product)


def slopes(orbit, objective, parameters, gradient=None):
    """Return the objective [...] and, for each group, its slope in T at T = 0, projected.

    gradient(parameters) returns the objective and its gradient, by default by autograd. Both are
    taken at the parameters that T = 0 leads to, which differ from the given ones if an action keeps
    the outputs on a batch only approximately.
    """
    T = [torch.zeros_like(zero, requires_grad=True) for zero in orbit.zeros]
    with torch.enable_grad():
        moved = orbit.act(parameters, [a.element(t) for a, t in zip(orbit.actions, T)])
    here = [p.detach() for p in moved]
    value, gradients = gradient(here) if gradient else value_and_gradient(objective, here)
    # parameters that no group acts on have no part in the slope
    moved, gradients = zip(*((p, g) for p, g in zip(moved, gradients) if p.requires_grad))
    slope = torch.autograd.grad(moved, T, gradients)
    return value, [action.project(t) for action, t in zip(orbit.actions, slope)]


@torch.enable_grad()
def value_and_gradient(objective, parameters):
    """Return objective(parameters), [...], and its gradient, a list like the parameters."""
    leaves = [p.detach().requires_grad_() for p in parameters]
    value = objective(leaves)
    return value.detach(), torch.autograd.grad(value.sum(), leaves, materialize_grads=True)


def as_tensor(number, like):
    """Return a number or a tensor as a tensor of the type and on the device of another one."""
    return torch.as_tensor(number, dtype=like.dtype, device=like.device)


def identities(orbit):
    """Return the identity of each group, [..., d, d]."""
    return [torch.eye(zero.shape[-1]).to(zero).expand_as(zero) for zero in orbit.zeros]


def scaled(slope, factor):
    """Return T = factor × slope for each group; entries that are not finite become 0."""
    return [(spread(factor, t) * t).nan_to_num(0.0, 0.0, 0.0) for t in slope]


def choose(mask, new, old):
    """Return the tensors `new` for the runs in a mask [...], and `old` for the others."""
    return [torch.where(spread(mask, b), a, b) for a, b in zip(new, old)]


def spread(values, tensor):
    """Return values [...] with as many dimensions as a tensor [..., *], to be broadcast to it."""
    return values[(...,) + (None,) * (tensor.dim() - values.dim())]
