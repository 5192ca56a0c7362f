"""Symmetries of a network's parameters as data, and how their elements act.

A group acts on hidden units: V' = gV on the parameters that make them, U' = U g^{-1} on those that
read them. The outputs stay if what lies between V and U lets g through:

    RESCALING: g is a positive number for each unit; σ(cz) = c σ(z) for c > 0, as of a ReLU.
    LINEAR: g is any invertible matrix; nothing lies between but sums over units, as between the
        values and the output of an attention head, or between the factors of LoRA.

A symmetry is a list of groups. That of two layers with a ReLU between them, and that of LoRA, are

    [Group(RESCALING, 16, 1, [Axis("0.weight", 0), Axis("0.bias", 0), Axis("2.weight", 1, -1)])]
    [Group(LINEAR, 1, 8, [Axis("A", 0), Axis("B", 1, -1)])]

Parameters are dictionaries {name: tensor}, with the names of model.named_parameters(). Elements are
lists with a tensor [count, size, size] for each group.
"""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

RESCALING, LINEAR = "rescaling", "linear"


class Axis(NamedTuple):
    """An axis of a parameter, on which a group acts: `rows` rows, each of `size` entries.

    One of the group's elements moves a row as it moves a vector: by x' = gx if the axis makes the
    units (power 1), by x' = g^{-T} x if it reads them (power -1).
    """

    name: str  # the parameter
    dim: int | tuple  # its axis; several are taken as one, flattened in this order
    power: float = 1  # under RESCALING any: x' = g^power x, with -2 behind a squared ReLU
    # positions along the axis, int64 [rows, size]; None: all of them, in order
    index: torch.Tensor | None = None
    # the element that acts on each row, int64 [rows]; None: 0 to count - 1, each equally often in
    # succession, as on the pixels of channels after nn.Flatten, or on queries that share their keys
    member: torch.Tensor | None = None


class Group(NamedTuple):
    """`count` independent elements, each of which acts on `size` units."""

    kind: str  # RESCALING or LINEAR
    count: int
    size: int  # 1 under RESCALING, d for GL(d)
    axes: list[Axis]


def dims_of(axis, shape):
    """Return the axis as a tuple of dimensions of a parameter of this shape, none negative."""
    dims = axis.dim if isinstance(axis.dim, tuple) else (axis.dim,)
    return tuple(dim % len(shape) for dim in dims)


def members_of(axis, group, length):
    """Return the element that acts on each row of an axis of `length` entries, int64 [rows]."""
    if axis.member is not None:
        return axis.member
    rows = length // group.size if axis.index is None else len(axis.index)
    return torch.arange(group.count).repeat_interleave(rows // group.count)


def entries_of(axis, group, length):
    """Return the element that acts on each of `length` entries of an axis, or -1 for none."""
    members = members_of(axis, group, length).repeat_interleave(group.size)
    if axis.index is None:
        return members
    index = axis.index.flatten()
    return torch.full((length,), -1, device=index.device).index_copy(0, index, members.to(index))


def broadcast(factors, shape, dims):
    """Return factors [n, length] of an axis `dims`, to be multiplied with tensors [n, …]."""
    by_dim = factors.reshape(-1, *(shape[dim] for dim in dims))
    by_dim = by_dim.permute(0, *(1 + dims.index(dim) for dim in sorted(dims)))
    return by_dim.reshape([n if dim in (0, *dims) else 1 for dim, n in enumerate(shape)])


def rows_of(tensors, dims, index, size):
    """Return the rows of an axis of tensors [n, …], [n, rows, size, rest]; index: flat, or None."""
    front = tensors.movedim(dims, tuple(range(1, 1 + len(dims))))
    entries = front.reshape(len(tensors), math.prod(front.shape[1 : 1 + len(dims)]), -1)
    return (entries if index is None else entries.index_select(1, index)).unflatten(1, (-1, size))


def mixed(tensors, dims, index, matrices):
    """Return tensors [n, …] with the rows of an axis multiplied by matrices [n, rows, d, d]."""
    precise = torch.promote_types(matrices.dtype, tensors.dtype)
    rows = rows_of(tensors, dims, index, matrices.shape[-1])
    new = (matrices.to(precise) @ rows.to(precise)).to(tensors.dtype).flatten(1, 2)
    first = tuple(range(1, 1 + len(dims)))
    front = tensors.movedim(dims, first)
    if index is not None:
        new = front.reshape(len(tensors), -1, new.shape[-1]).index_copy(1, index, new)
    return new.reshape(front.shape).movedim(first, dims)


def act_on(parameters, symmetry, elements):
    """Return {name: tensor}, acted on by g [count, size, size] for each group; differentiable.

    Tensors that no group names are the same as before. What transforms as gradients do is acted on
    by the `dual` elements.
    """
    parameters = dict(parameters)
    for group, g in zip(symmetry, elements):
        for axis in group.axes:
            tensor = parameters[axis.name][None]
            parameters[axis.name] = acted_along(tensor, axis, group, g)[0]
    return parameters


def acted_along(tensors, axis, group, g):
    """Return tensors [1, …] acted on by g along an axis of one of its group."""
    dims = tuple(1 + dim for dim in dims_of(axis, tensors.shape[1:]))
    length = math.prod(tensors.shape[dim] for dim in dims)
    if group.kind == RESCALING:
        one = g.new_ones(1)  # for the entries that no element acts on, -1
        factors = torch.cat([g.flatten() ** axis.power, one])[entries_of(axis, group, length)]
        return (tensors * broadcast(factors[None].to(tensors.device), tensors.shape, dims)).to(
            tensors
        )
    matrices = g if axis.power > 0 else torch.linalg.inv(g).mT
    matrices = matrices[members_of(axis, group, length)].to(tensors.device)
    index = None if axis.index is None else axis.index.flatten().to(tensors.device)
    return mixed(tensors, dims, index, matrices[None])


def dual(elements):
    """Return the elements g^{-T}: where weights are moved by g, their gradients are by these."""
    return [torch.linalg.inv(g).mT for g in elements]


def exponential(group, T):
    """Return g = exp(T), [count, size, size]."""
    return T.exp() if group.kind == RESCALING else torch.linalg.matrix_exp(T)


def random_elements(symmetry, scale, generator=None):
    """Draw g = exp(T) for each group, with normal T of about the norm `scale`, in float64."""
    shapes = [(group.count, group.size, group.size) for group in symmetry]
    draws = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [exponential(group, scale / group.size * T) for group, T in zip(symmetry, draws)]


def check_groups(parameters, symmetry):
    """Raise ValueError where a symmetry doesn't fit parameters, or where two actions clash.

    Several elements may act on an entry where their order doesn't matter: on rows and columns, or
    by RESCALING, as where a depthwise convolution reads channels and makes others along one axis.
    """
    if not symmetry:
        raise ValueError("the symmetry has no groups")
    earlier = {}
    for k, group in enumerate(symmetry):
        if group.kind not in (RESCALING, LINEAR) or (group.kind == RESCALING and group.size != 1):
            raise ValueError(f"group {k} is {group.kind!r} of size {group.size}")
        if {axis.power > 0 for axis in group.axes} != {True, False}:
            raise ValueError(f"group {k} needs axes that make its units and axes that read them")
        for axis in group.axes:
            if axis.name not in parameters:
                raise ValueError(f"group {k} names {axis.name!r}, which is no parameter, or shared")
            shape = parameters[axis.name].shape
            where = f"axis {axis.dim} of {axis.name} {list(shape)}"
            if misfit := misfit_of(axis, group, shape):
                raise ValueError(f"group {k} doesn't fit {where}: {misfit}")
            others = earlier.setdefault(axis.name, [])
            for other in others:
                if clash((k, axis, group), other, shape):
                    raise ValueError(f"{where} is named twice, by groups {other[0]} and {k}")
            others.append((k, axis, group))


def misfit_of(axis, group, shape):
    """Return in words how an axis of a group doesn't fit a parameter of this shape, or None."""
    dims = axis.dim if isinstance(axis.dim, tuple) else (axis.dim,)
    if not all(-len(shape) <= dim < len(shape) for dim in dims):
        return "there is no such axis"
    if group.kind == LINEAR and axis.power not in (1, -1):
        return f"its power is {axis.power}, not 1 or -1"
    length = math.prod(shape[dim] for dim in dims)
    index = torch.arange(length) if axis.index is None else axis.index.flatten()
    if axis.index is not None and axis.index.shape[1:] != (group.size,):
        return f"the index is {list(axis.index.shape)}, not [rows, {group.size}]"
    if len(set(index.tolist()) & set(range(length))) < len(index):
        return "the index has entries that repeat, or that the axis lacks"
    rows, rest = divmod(len(index), group.size)
    if rest or not rows or (axis.member is None and rows % group.count):
        return f"it has {len(index)} entries for {group.count} × {group.size} units"
    members = members_of(axis, group, length)
    if len(members) != rows or not set(members.tolist()) <= set(range(group.count)):
        return f"member must name one of {group.count} elements for each of {rows} rows"
    return None


def clash(one, other, shape):
    """Return whether two (number of the group, axis, group) of a parameter don't commute."""
    (k, axis, group), (other_k, other_axis, other_group) = one, other
    dims, other_dims = dims_of(axis, shape), dims_of(other_axis, shape)
    if not set(dims) & set(other_dims):
        return False
    rescaled = group.kind == other_group.kind == RESCALING
    if dims == other_dims:
        length = math.prod(shape[dim] for dim in dims)
        entries = entries_of(axis, group, length)
        other_entries = entries_of(other_axis, other_group, length).to(entries)
        both = (entries >= 0) & (other_entries >= 0)
        if rescaled:  # by one element twice is a mistake
            return k == other_k and bool((both & (entries == other_entries)).any())
        return bool(both.any())
    if rescaled:
        return False
    seeded = torch.Generator().manual_seed(0)
    x = torch.randn(1, *shape, dtype=torch.float64, generator=seeded)
    g, h = random_elements([group, other_group], 1.0, seeded)
    g_first = acted_along(acted_along(x, axis, group, g), other_axis, other_group, h)
    h_first = acted_along(acted_along(x, other_axis, other_group, h), axis, group, g)
    return not torch.allclose(g_first, h_first)


def unwrapped(model):
    """Return the module inside of DataParallel, DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def outputs(model, parameters, *inputs, **kwargs):
    """Return model(*inputs, **kwargs) at other parameters, {name: tensor}; differentiable twice.

    Buffers, which may be among `parameters`, and the random state stay as they are: dropout takes
    the masks of seed 0.
    """
    buffers = {name: parameters.get(name, b).clone() for name, b in model.named_buffers()}
    devices = {p.device for p in parameters.values() if p.is_cuda}
    with torch.random.fork_rng(devices), sdpa_kernel(SDPBackend.MATH):
        torch.manual_seed(0)
        return functional_call(model, {**parameters, **buffers}, inputs, kwargs)


def floating(tree):
    """Return the floating tensors in nested lists, tuples, dictionaries and outputs of models.

    Raises ValueError for tensors that are attributes of other objects. Caches of keys and values,
    whose layers are objects in turn, are no outputs.
    """
    leaves = tree_leaves(tree)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    for leaf in leaves:
        attributes = {} if isinstance(leaf, torch.Tensor) else getattr(leaf, "__dict__", {})
        if any(isinstance(inner, torch.Tensor) for inner in tree_leaves(dict(attributes))):
            raise ValueError(f"cannot see into {type(leaf).__name__}: return its tensors by keep=")
    return [leaf for leaf in tensors if leaf.is_floating_point() and leaf.numel()]
