"""From the names of scales, and what is demanded of them, to groups."""

import math
from typing import NamedTuple

import numpy as np
import torch

from .groups import LINEAR, RESCALING, Axis, Group
from .integers import mix


class Entries(NamedTuple):
    """Entries of parameters along named axes; arrays of the same length."""

    axis: np.ndarray  # which of a list of (parameter, axes)
    position: np.ndarray  # along these axes, taken as one
    name: np.ndarray
    component: np.ndarray  # the first of all names that are tied to this one
    power: np.ndarray  # of the component's scale
    block: np.ndarray  # the first of all components that may be mixed with this one

    def where(self, chosen):
        return Entries(*(column[chosen] for column in self))


def groups_of(names, parameters):
    """Return the groups that Names have found on the Parameters."""
    axes, axis, position, name = named_entries(names, parameters)
    a, b, r = map(np.concatenate, zip(*names.equations))
    component, power = ratios_of(a, b, r, len(names.owner))
    axis_of_name = np.full(len(names.owner), -1)
    axis_of_name[name] = axis
    role, block = blocks_of(component, power, axis_of_name, names.marks, a, b)
    block = block[component[name]]
    entries = merged(Entries(axis, position, name, component[name], power[name], block))
    # blocks of one size that have the same axes, with the same powers to 1e-3, are one group
    _, first = np.unique(entries.component, return_index=True)
    kind = np.bincount(entries.block[first], minlength=len(names.owner))
    powers = hashed(entries.axis, (entries.power * 1000).astype(int))
    _, first = np.unique(hashed(entries.block, powers), return_index=True)
    np.add.at(kind, entries.block[first], powers[first])
    kind = kind[entries.block]
    order = np.argsort(entries.block, kind="stable")
    kinds = dict.fromkeys(kind[order].tolist())
    return [group_of(entries.where(kind == k), role, axes) for k in kinds]


def named_entries(names, parameters):
    """Return a list of (parameter, axes), and three arrays: which of these, position, name."""
    axes, parts = {}, [np.zeros((3, 0), int)]
    met = np.zeros(len(names.owner), bool)
    met[np.concatenate([*names.met, np.zeros(1, int)])] = True
    for parameter in parameters:
        for named in parameter.named_axes or []:
            name = named.names.flatten().numpy()
            if not met[name].all():  # what did not run, such as later positions, is not known
                names.equations.append((name, np.zeros_like(name), np.ones(len(name))))
            # the axis of a diagonal matrix is there twice
            k = axes.setdefault((parameter, tuple(named.axes)), len(axes))
            parts.append(np.stack([np.full_like(name, k), np.arange(len(name)), name]))
    return [list(axes), *np.hstack(parts)]


def ratios_of(a, b, r, size):
    """Solve log c_a = r log c_b, arrays of names below `size`, of which 0 is fixed.

    Returns for each name the first name that it is tied to, and the ratio of its log scale to that
    one's, 0 where it is fixed; both are [size].
    """
    parent, ratio = np.arange(size), np.ones(size)
    while True:  # the root of a tree hangs on the lowest root that an equation ties it to
        of_a, of_b = parent[a], parent[b]
        if (of_a == of_b).all():
            break
        r_of_a = r * ratio[b] / ratio[a]  # log c_(root of a) = this times log c_(root of b)
        low, high = np.minimum(of_a, of_b), np.maximum(of_a, of_b)
        r_of_high = np.where(of_a == high, r_of_a, 1 / r_of_a)
        order = np.argsort(-low, kind="stable")
        order = order[(low != high)[order]]
        parent[high[order]], ratio[high[order]] = low[order], r_of_high[order]
        while (parent[parent] != parent).any():
            ratio, parent = ratio * ratio[parent], parent[parent]
    wrong = abs(ratio[a] - r * ratio[b]) > 1e-9 * abs(ratio[a])
    is_fixed = np.isin(parent, parent[[0, *a[wrong]]])
    return parent, np.where(is_fixed, 0, ratio)


def blocks_of(component, power, axis, marks, a, b):
    """Return the role of each name, what was done to it and to those tied to it, and blocks.

    Components whose names have the same roles are a block. Names of one component with the same
    role could not be matched with those of another, and powers cannot be mixed: then it is alone.
    """
    total = np.zeros(len(component), np.int64)
    for names, values in marks:
        np.add.at(total, names, values)
    role = hashed(total, axis, np.sign(power).astype(int))
    for _ in range(3):  # a bias is told from another by what it is added to
        beside = np.zeros_like(role)
        np.add.at(beside, a, role[b])
        np.add.at(beside, b, role[a])
        role = hashed(role, beside)
    free = np.flatnonzero(power)
    free = free[np.lexsort((role[free], component[free]))]
    alike = (np.diff(component[free]) == 0) & (np.diff(role[free]) == 0)
    alone = np.zeros(len(component), bool)
    alone[component[free[1:][alike]]] = True
    alone[component[free[abs(power[free]) != 1]]] = True
    mark = np.zeros(len(component), np.int64)
    np.add.at(mark, component[free], role[free])
    _, first, which = np.unique(mark, return_index=True, return_inverse=True)
    return role, np.where(alone | (mark == 0), np.arange(len(mark)), first[which])


def hashed(*parts):
    return mix(*(torch.as_tensor(part) for part in parts)).numpy()


def merged(entries):
    """Return the entries of components that make something and read it.

    Powers of one scale on one entry are multiplied: a diagonal matrix may both read and make.
    """
    key = hashed(entries.axis, entries.position, entries.component)
    _, first, which = np.unique(key, return_index=True, return_inverse=True)
    entries = entries.where(first)._replace(power=np.bincount(which, entries.power, len(first)))
    made, read = (entries.component[entries.power * sign > 0] for sign in (1, -1))
    both = np.isin(entries.component, made) & np.isin(entries.component, read)
    return entries.where(both & (entries.power != 0))


def group_of(entries, role, axes):
    """Return the Group of entries whose blocks have the same axes."""
    blocks, member = np.unique(entries.block, return_inverse=True)
    size = len(np.unique(entries.component)) // len(blocks)
    # an entry that several units scale by the same power is in several axes
    power = (entries.power * 1000).astype(int)
    layer = rank(hashed(entries.axis, entries.position, power), entries.component)
    made_first = np.lexsort((entries.name, entries.power < 0))
    keys = zip(*(column[made_first].tolist() for column in (entries.axis, entries.power, layer)))
    moved = []
    for k, power, n in dict.fromkeys(keys):
        here = (entries.axis == k) & (entries.power == power) & (layer == n)
        index, members = rows_of(entries.where(here), member[here], role, size)
        parameter, dims = axes[k]
        every = np.arange(math.prod(parameter.shape[d] for d in dims))
        in_turn = np.arange(len(blocks)).repeat(len(members) // len(blocks))
        moved.append(
            Axis(
                parameter.name,
                dims[0] if len(dims) == 1 else dims,
                int(power) if power == int(power) else power,
                None if np.array_equal(index.flatten(), every) else torch.as_tensor(index),
                None if np.array_equal(members, in_turn) else torch.as_tensor(members),
            )
        )
    return Group(LINEAR if size > 1 else RESCALING, len(blocks), size, moved)


def rank(key, value):
    """Return for each entry how many of those with the same key have a lower value."""
    order = np.lexsort((value, key))
    lower = np.empty(len(key), int)
    lower[order] = np.arange(len(key)) - np.searchsorted(key[order], key[order])
    return lower


def rows_of(entries, member, role, size):
    """Return the positions of the rows that a group moves along an axis, and each one's member."""
    repeat = rank(entries.name, entries.position)  # one name has several rows in grouped kernels
    order = np.lexsort((entries.component, repeat, role[entries.name], member))
    index, members = entries.position[order].reshape(-1, size), member[order][::size]
    order = np.lexsort((index[:, 0], members))
    return index[order], members[order]
