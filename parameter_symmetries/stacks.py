"""How a symmetry acts on a whole model in few operations.

Elements of one size are one stack, whatever their groups: elements are {size: E}, where E[0] are
all g and E[1] all g^{-T}, [2, count + 1, size, size], or [2, count + 1] for RESCALING (size 1). The
last one is 1: it is for the entries of an axis on which nothing acts. Parameters of one shape on
which elements act alike are a family, stacked as [n, …]: the same weight in all layers of a GPT.
"""

import math
from collections import Counter, defaultdict
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch

from .groups import broadcast, check_groups, dims_of, entries_of, members_of, mixed


class Action(NamedTuple):
    """How elements act along one of the axes of a family's tensors."""

    size: int
    dims: tuple  # of the stack [n, …]
    power: float  # of the element: 1, or more under RESCALING
    index: torch.Tensor | None  # the entries of the rows, [rows * size]; None: all, in order
    slots: torch.Tensor  # which of E.flatten(0, 1) acts on each row, [n, rows]


class Family(NamedTuple):
    """Parameters of one shape, and what acts on them: the same but for the slots."""

    names: list
    actions: list
    trained: bool  # whether they have gradients


class Plan(NamedTuple):
    """What can be prepared of a model and its symmetry."""

    families: list
    names: list  # of all their parameters
    counts: dict  # {size: number of elements}
    like: torch.Tensor  # of the elements' type and device


PLANS = WeakKeyDictionary()  # {model: (facts, groups and axes, Plan)}: teleports are repeated
LARGEST = 2**25  # entries of a family; its stack is a copy


def plan_of(model, parameters, symmetry, trained=()):
    """Return the Plan of a model and its parameters; those named in `trained` have gradients.

    Raises ValueError where the symmetry doesn't fit.
    """
    facts = {n: (p.shape, p.dtype, p.device, n in trained) for n, p in parameters.items()}
    parts = [part for group in symmetry for part in (group, *group.axes)]  # lists may change
    if model in PLANS:
        known, known_parts, plan = PLANS[model]
        if facts == known and list(map(id, parts)) == list(map(id, known_parts)):
            return plan
    check_groups(parameters, symmetry)
    counts = Counter()
    for group in symmetry:
        counts[group.size] += group.count
    actions, alike = actions_of(parameters, symmetry, counts), defaultdict(list)
    for name, several in actions.items():
        alike[(*facts[name], *(action[:4] for action in several))].append(name)
    double = any(parameters[name].dtype == torch.float64 for name in actions)
    first = parameters[next(iter(actions))]
    like = first.new_empty(0, dtype=torch.float64 if double else torch.float32)
    families = []
    for names in alike.values():
        p = parameters[names[0]]
        number = max(1, LARGEST // max(1, p.numel()))
        for part in (names[k : k + number] for k in range(0, len(names), number)):
            together = [
                stacked(same, p.device, like.device) for same in zip(*(actions[n] for n in part))
            ]
            families.append(Family(part, together, part[0] in trained))
    plan = Plan(families, list(actions), dict(counts), like)
    PLANS[model] = facts, parts, plan
    return plan


def actions_of(parameters, symmetry, counts):
    """Return {name: [Action]} of single parameters, with index a tuple, and slots [rows]."""
    actions, packed, first = defaultdict(list), defaultdict(list), Counter()
    for group in symmetry:
        last = counts[group.size]  # the element that is 1
        for axis in group.axes:
            shape = parameters[axis.name].shape
            dims = dims_of(axis, shape)
            length = math.prod(shape[dim] for dim in dims)
            dims = tuple(1 + dim for dim in dims)
            members = (members_of if group.size > 1 else entries_of)(axis, group, length).cpu()
            slots = members + first[group.size] + (axis.power < 0) * (last + 1)
            if group.size > 1:
                index = torch.arange(length) if axis.index is None else axis.index.cpu()
                rows = index.reshape(len(slots), group.size), slots
                packed[axis.name, group.size, dims, length].append(rows)
            else:
                slots = torch.where(members < 0, last, slots)
                actions[axis.name].append(Action(1, dims, abs(axis.power), None, slots))
        first[group.size] += group.count
    for (name, size, dims, length), several in packed.items():
        # queries, keys and values in one matrix are three axes, but one action
        index, slots = map(torch.cat, zip(*several))
        order = index[:, 0].argsort()
        index = tuple(index[order].flatten().tolist())
        index = None if index == tuple(range(length)) else index
        actions[name].append(Action(size, dims, 1, index, slots[order]))
    return actions


def stacked(actions, device, elements_device):
    """Return the Action of a family from those of its parameters, which are on `device`."""
    slots = torch.stack([action.slots for action in actions]).to(elements_device)
    index = actions[0].index
    index = None if index is None else torch.tensor(index, device=device)
    return actions[0]._replace(index=index, slots=slots)


def identity(plan):
    """Return the elements that are 1."""
    ones = {}
    for size, count in plan.counts.items():
        one = torch.eye(size, dtype=plan.like.dtype, device=plan.like.device)
        ones[size] = one.expand(2, count + 1, size, size) if size > 1 else one.expand(2, count + 1)
    return ones


def stacks_of(symmetry, elements, plan):
    """Return elements, a list with a tensor [count, size, size] for each group, as stacks."""
    parts = defaultdict(list)
    for group, g in zip(symmetry, elements):
        parts[group.size].append(g.flatten() if group.size == 1 else g)
    stacks = {}
    for size, one in identity(plan).items():
        g = torch.cat([*(part.to(one) for part in parts[size]), one[0, -1:]])
        stacks[size] = torch.stack([g, 1 / g if size == 1 else torch.linalg.inv(g).mT])
    return stacks


def swapped(elements):
    """Return the elements that move gradients, where these move weights."""
    return {size: E.flip(0) for size, E in elements.items()}


def matrices(action, elements, square=False):
    """Return what the rows of a family are multiplied by, [n, rows], or [n, rows, size, size]."""
    g = elements[action.size].flatten(0, 1).index_select(0, action.slots.flatten())
    g = g.unflatten(0, action.slots.shape)
    g = g if action.power == 1 else g**action.power
    return g.square() if square else g


def acted(X, actions, elements, square=False):
    """Return a stack X acted on by elements, or by the squares of their entries; X may change."""
    for action in actions:
        g = matrices(action, elements, square).to(X.device)
        if action.size == 1:
            X = X.mul_(broadcast(g, X.shape, action.dims))
        else:
            X = mixed(X, action.dims, action.index, g)
    return X
