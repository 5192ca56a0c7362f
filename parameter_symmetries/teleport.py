"""Teleport a module between backward() and step(), by the gradient that training has just computed.

Where g keeps a network's function, the gradient at g·w is g^{-T} ∇L(w): it is known along the whole
orbit, without another pass through the network. For V' = gV, U' = U g^{-1}, with A = ∇V ∇Vᵀ and
B = ∇Uᵀ ∇U summed over the parameters that make and that read the group's units, |∇L|² at exp(T)·w
is, for symmetric T,

    tr(e^{-T} A e^{-T}) + tr(e^T B e^T),    with the slope 2 (B - A) at T = 0.

Seen from the point that was left, an SGD step after a teleport is w - η (gᵀg)^{-1} ∇L(w) for V, and
likewise for U: a preconditioner, constant until the next teleport.
"""

import math
from collections import defaultdict
from typing import NamedTuple

import torch

from .groups import rows_of, unwrapped
from .moving import copies_of, full_precision, move, moving_tensors
from .stacks import acted, identity, matrices, plan_of, swapped


@torch.no_grad()
def teleport_(model, symmetry, optimizer=None, *, steps=None, length=0.1, until=None, also=()):
    """Move a model in place to where |∇L|² is larger; return |∇L|² before and after, two tensors.

    Call it between backward() and step(). What lives in the weights' coordinates moves along: the
    parameters that `symmetry` names (frozen ones, too), their .grad, the optimizer's state, and
    `also`, a list of what has a tensor for each of model.parameters(), in their order: an average
    of weights (also=[ema.parameters()]), a reference point, or the float32 weights that an
    optimizer trains in the place of the model's, with their .grad and state. The outputs stay.
    Weight decay does not: it pulls elsewhere at the new point. Clip gradients afterwards, since
    their norm changes.

    A step acts on each unit or head with exp(T), T = length (B - A) / |A + B|_F. So |T|_F, the log
    factor of a unit, is at most `length` (at most 1), whatever the scale of the loss (a GradScaler)
    and of the weights. A negative length descends, which balances a network. The path is that of an
    ascent by double backward with these T.

    steps: how many; by default 1. until: a factor by which |∇L|² is to change, up or down whatever
    the sign of `length`; the teleport ends where it is reached, or after `steps`, by default 100.
    |∇L|² counts the gradients that there are. Where it is not finite nothing moves. Processes with
    the same gradients (DistributedDataParallel) move alike.

    Raises ValueError, before anything has moved, for bad arguments, where there are no gradients or
    a group's are sparse, where the symmetry doesn't fit the model's parameters, for an optimizer of
    others, and for state that no rule moves. `check_symmetry` tells whether it keeps the outputs.
    """
    length, steps = checked(length, steps, until)
    model = unwrapped(model)
    copies = copies_of(model, also)
    gradients = gradients_of(copies)
    plan = plan_of(model, copies[0], symmetry, gradients)
    moving = moving_tensors(plan, copies, optimizer)
    with full_precision(plan):
        elements, before, after = follow(plan, gradients, length, steps, until)
        move(plan, elements, moving)
    return before, after


def checked(length, steps, until):
    """Return the signed length and the number of steps; raise ValueError for impossible ones."""
    if not 0 < abs(length) <= 1:
        raise ValueError(f"length is {length}, but steps have |T| of at most 1")
    if steps is not None and not steps >= 1:
        raise ValueError(f"steps is {steps}, but there must be 1 or more")
    if until is None:
        return length, steps or 1
    if not 0 < until < math.inf:
        raise ValueError(f"until is {until}, but a factor of |∇L|² is positive")
    return math.copysign(length, until - 1), steps or 100


def gradients_of(copies):
    """Return {name: gradient} of the parameters, or else of their copies."""
    gradients = {}
    for tensors in reversed(copies):
        gradients |= {name: t.grad for name, t in tensors.items() if t.grad is not None}
    if not gradients:
        raise ValueError("no parameter has a gradient: teleport between backward() and step()")
    return gradients


class Squares(NamedTuple):
    """What A and B need of a family's gradients if they are rescaled alone: their squares."""

    X: torch.Tensor  # [n, …], summed over the dimensions on which nothing acts

    def blocks(self, actions):
        return [summed(self.X, action.dims) for action in actions]

    def total(self):
        return self.X.sum()

    def acted(self, actions, elements):
        return Squares(acted(self.X, actions, elements, square=True))


class Gram(NamedTuple):
    """The same if matrices act on their rows and nothing else: the rows' products."""

    X: torch.Tensor  # [n, rows, size, size]

    def blocks(self, actions):
        return [self.X.flatten(0, 1)]

    def total(self):
        return self.X.diagonal(dim1=-2, dim2=-1).sum()

    def acted(self, actions, elements):
        g = matrices(actions[0], elements).to(self.X)
        return Gram(g @ self.X @ g.mT)


class Shared(NamedTuple):
    """The same if matrices act on their rows and something else, too: the gradients."""

    X: torch.Tensor

    def blocks(self, actions):
        blocks = []
        for size, dims, _, index, _ in actions:
            if size == 1:
                blocks.append(summed(self.X.square(), dims))
            else:
                rows = rows_of(self.X, dims, index, size)
                blocks.append((rows @ rows.mT).flatten(0, 1))
        return blocks

    def total(self):
        return self.X.square().sum()

    def acted(self, actions, elements):
        return Shared(acted(self.X, actions, elements))


def form_of(family, gradients):
    """Return Squares, Gram or Shared of a family, in single precision at least."""
    actions = family.actions
    X = torch.stack([gradients[name] for name in family.names])
    X = X.to(torch.promote_types(X.dtype, torch.float32))
    if all(action.size == 1 for action in actions):
        other = set(range(1, X.dim())).difference(*(action.dims for action in actions))
        X = X.square_()
        return Squares(X.sum(tuple(other), keepdim=True) if other else X)
    if len(actions) > 1 or actions[0].index is not None:
        return Shared(X)
    return Gram(Shared(X).blocks(actions)[0].unflatten(0, actions[0].slots.shape))


def summed(X, dims):
    """Return the sums of a stack [n, …] over its other dimensions, flat."""
    other = [dim for dim in range(1, X.dim()) if dim not in dims]
    X = X.sum(other) if other else X
    return X.permute(0, *(1 + sorted(dims).index(dim) for dim in dims)).flatten()


def sums_of(plan, families, forms):
    """Return A and B of all elements, as stacks: {size: [2, count + 1, size, size]}."""
    blocks, slots = defaultdict(list), defaultdict(list)
    for family, form in zip(families, forms):
        for action, block in zip(family.actions, form.blocks(family.actions)):
            block = block.to(plan.like)
            blocks[action.size].append(block if action.power == 1 else action.power * block)
            slots[action.size].append(action.slots.flatten())
    sums = {}
    for size, parts in blocks.items():
        together = torch.cat(parts)
        total = together.new_zeros(2 * (plan.counts[size] + 1), *together.shape[1:])
        # on a GPU this adds in the same order each time, so that all ranks of DDP move alike
        total.index_put_((torch.cat(slots[size]),), together, accumulate=True)
        sums[size] = total.unflatten(0, (2, -1))
    return sums


def follow(plan, gradients, length, steps, until):
    """Return the product of the steps' elements, and |∇L|² before and after."""
    families = [family for family in plan.families if family.trained]
    forms = [form_of(family, gradients) for family in families]
    inside = {name for family in families for name in family.names}
    rest = sum_of_squares([g for name, g in gradients.items() if name not in inside], plan)

    def objective():
        totals = (form.total() for form in forms)
        return sum((total.to(rest) for total in totals), rest)

    before, product = objective(), identity(plan)
    one = product
    for _ in range(steps):
        sums = sums_of(plan, families, forms)
        T = {size: direction(A, B, length) for size, (A, B) in sums.items()}
        if until is not None:
            missing = until * before - objective()
            if not missing * length > 0:
                break
            # |∇L|² is convex in T: it grows by at least as much as the slope says
            gain = sum(2 * (T[size] * (B - A)).sum() for size, (A, B) in sums.items())
            T = {size: (1.01 * missing / gain).clamp(max=1) * t for size, t in T.items()}
        T = {size: torch.where(before.isfinite(), t, 0.0) for size, t in T.items()}
        elements = one | {size: exponentials(t, abs(length)) for size, t in T.items()}
        dual = swapped(elements)
        forms = [form.acted(family.actions, dual) for family, form in zip(families, forms)]
        product = {size: times(E, product[size]) for size, E in elements.items()}
    return product, before, objective()


def sum_of_squares(gradients, plan):
    """Return |∇L|² of gradients that no group changes."""
    dense = [g.coalesce().values() if g.is_sparse else g for g in gradients]
    dtype = torch.float64 if any(g.dtype == torch.float64 for g in dense) else torch.float32
    norms = torch._foreach_norm(dense, 2, dtype) if dense else [torch.zeros(())]
    return torch.stack([norm.to(plan.like) for norm in norms]).square().sum()


def direction(A, B, length):
    """Return T = length (B - A) / |A + B|_F of all elements, 0 for the last, which is 1."""
    norm = (A + B).abs() if A.dim() == 1 else torch.linalg.matrix_norm(A + B, keepdim=True)
    T = length * (B - A) / norm.clamp(min=torch.finfo(norm.dtype).tiny)
    T[-1] = 0.0
    return T


def times(E, F):
    """Return the product of stacks of elements."""
    return E * F if E.dim() == 2 else E @ F


def exponentials(T, bound):
    """Return exp(T) and exp(-T), cosh T ± sinh T by their series, for |T|_F ≤ bound ≤ 1."""
    if T.dim() == 1:
        return torch.stack([T, -T]).exp()
    terms = 1
    while bound ** (2 * terms) / math.factorial(2 * terms) > torch.finfo(T.dtype).eps / 4:
        terms += 1
    square = T @ T
    cosh = sinh = one = torch.eye(len(T[0]), dtype=T.dtype, device=T.device).expand_as(T)
    for n in range(terms, 0, -1):  # cosh T = 1 + T²/(1·2) (1 + T²/(3·4) (…)), sinh T likewise
        cosh = torch.baddbmm(one, square, cosh, alpha=1 / ((2 * n - 1) * 2 * n))
        sinh = torch.baddbmm(one, square, sinh, alpha=1 / (2 * n * (2 * n + 1)))
    sinh = T @ sinh
    return torch.stack([cosh + sinh, cosh - sinh])
