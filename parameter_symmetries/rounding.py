"""Weights that survive rounding: move a network to where few bits do little harm.

Rounding to the nearest of 2^b − 1 levels, Δ = max|W| / (2^{b−1} − 1) apart, adds an error of the
variance Δ²/12 to each weight. To second order the loss then rises by

    J = ½ Σ_i H_ii Δ_i² / 12,        H_ii ≈ B E[g_i²],

with gradients g of mini-batches of B samples (Fisher's matrix). A network's symmetries keep its
function, but not J: a group element h takes weights W to hW and gradients G to h^{-T} G. So
gradients at one point give J on the whole orbit, and `equalize_` descends on log J without another
pass through the network. In the logarithms of rescalings log J is convex: no local minimum is
higher than another. J is of second order: below four bits it is a rough guide, and moving can do
harm. One bit less makes it about four times as large.

Without a loss, H_ii is 1 / the mean square of the weights that share i's step: then J is half the
sum of squared errors relative to the weights' size.

Running statistics end most symmetries: take a model in evaluation with its batch norms folded into
the layers before them, as torch.fx.experimental.optimization.fuse(model.eval()) returns it.
"""

import copy
import math
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from .groups import RESCALING, act_on, check_groups, dims_of, dual, exponential, unwrapped
from .moving import act_on_

NORM = 32  # the norm that takes the place of the maximum in the descent, since it is smooth
TINY = 1e-300  # so that roots and logarithms of 0 have a derivative
RATE = 0.05  # of Adam, for the logarithms of group elements


class Rise(NamedTuple):
    """The predicted rise of the loss when weights are rounded, before and after `equalize_`."""

    before: float
    after: float


class Point(NamedTuple):
    """What J depends on: weights, and what H is made of."""

    weights: dict  # {name: tensor} of those that will be rounded
    gradients: dict | None  # {name: [*shape, n]}, whose squares' sum over n is H; None: no loss
    axes: dict  # {name: axis of the output channels}
    per: str | int  # what shares a step Δ


def equalize_(
    model,
    symmetry,
    loss=None,
    batches=(),
    per="channel",
    *,
    bits=8,
    axes=None,
    batch_size=None,
    steps=300,
    optimizer=None,
):
    """Move a model along its symmetry, in place, to where rounding its weights does least harm.

    Outputs stay. Returns the predicted Rise of the loss when weights are rounded to so many bits.
    symmetry: a list of groups, from `symmetry_of` or by hand. loss(model, batch) returns a mean
    loss, a tensor []; batches is an iterable, of 16 to 64 say; without a loss only rescalings act.
    per: what shares a step: a whole "tensor", an output "channel", or so many successive inputs of
    a channel. axes: {name: axis of its output channels} of the weights that will be rounded, by
    default `rounded_weights(model)`. batch_size: how many predictions the loss is a mean of, by
    default the length of a batch's first tensor; J is proportional to it. steps: of Adam.
    optimizer: one that trains on; its state and .grad move along, as in `teleport_`.

    Raises ValueError where the symmetry doesn't fit or moves no weight that will be rounded, where
    there are no batches, where a weight or its gradient is not finite, and as `teleport_` does.
    """
    check_rounding(bits, per)
    axes = rounded_weights(model) if axes is None else axes
    symmetry = [group for group in symmetry if loss or group.kind == RESCALING]
    groups = groups_on(axes, unwrapped(model), symmetry)
    entrywise = {name for name in axes if not loss or not is_bilinear(name, axes[name], groups)}
    point = point_of(model, loss, batches, per, axes, batch_size, entrywise)
    before, elements = rise(point, bits), descend(point, groups, entrywise, steps)
    after = rise(moved(point, groups, elements), bits)
    if after < before:  # a norm is not the maximum: where nothing is to gain, J may end higher
        act_on_(model, symmetry, elements, optimizer)
    return Rise(before, min(before, after))


def predicted_rise(model, loss, batches, bits, per="channel", *, axes=None, batch_size=None):
    """Return J, the predicted rise of the loss when a model's weights are rounded to so many bits.

    The arguments and errors are those of `equalize_`.
    """
    check_rounding(bits, per)
    axes = rounded_weights(model) if axes is None else axes
    return rise(point_of(model, loss, batches, per, axes, batch_size), bits)


@torch.no_grad()
def round_weights(model, bits, per="channel", axes=None):
    """Return a copy of a model whose weights are rounded to 2^bits − 1 levels, symmetric about 0.

    per, axes: as `equalize_` takes them. Raises ValueError for fewer than two bits.
    """
    check_rounding(bits, per)
    model, levels = copy.deepcopy(model), 2 ** (bits - 1) - 1
    parameters = dict(unwrapped(model).named_parameters())
    for name, axis in (rounded_weights(model) if axes is None else axes).items():
        channels = parameters[name].movedim(axis, 0)
        rows = blocks(channels, 0, per)
        rows = rows.reshape(1, -1) if per == "tensor" else rows.flatten(0, 1)
        scale = rows.abs().amax(1).float() / levels
        scale = scale.clamp(min=torch.finfo(scale.dtype).tiny)  # of a row of zeros
        zero = torch.zeros_like(scale, dtype=torch.int32)
        rows = torch.fake_quantize_per_channel_affine(rows, scale, zero, 0, -levels, levels)
        new = rows.reshape(len(channels), -1)[:, : channels[0].numel()]
        channels.copy_(new.reshape(channels.shape))
    return model


def rounded_weights(model):
    """Return {name: axis of its output channels} of the weights that are rounded by default.

    They are the parameters of two or more axes, without embeddings. Axis 0 is taken for the output,
    as in nn.Linear and convolutions, or axis 1 in transposed convolutions and in the Conv1D of
    transformers. Where a parameter of your own has another layout, [heads, in, out] say, correct
    the result, and pass it as axes=.
    """
    model = unwrapped(model)
    names = {id(p): name for name, p in model.named_parameters()}
    embeddings, axes = set(), {}
    for module in model.modules():
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        transposed |= type(module).__name__ == "Conv1D"  # transformers' GPT-2 has [in, out]
        for p in module.parameters(recurse=False):
            if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                embeddings.add(names[id(p)])
            elif p.dim() > 1 and p.is_floating_point():
                axes[names[id(p)]] = int(transposed)
    return {name: axis for name, axis in axes.items() if name not in embeddings}


def check_rounding(bits, per):
    """Raise ValueError for bits and per for which there is no rounding."""

    def is_whole(number):
        return isinstance(number, int) and not isinstance(number, bool)

    if not (is_whole(bits) and bits > 1):
        raise ValueError(f"bits must be a whole number above 1, not {bits!r}")
    if per not in ("tensor", "channel") and not (is_whole(per) and per > 0):
        raise ValueError(f"per must be 'tensor', 'channel' or a number of inputs, not {per!r}")


# J at a point


def blocks(weight, axis, per):
    """Return a weight as [output channels, blocks, size]; the last block may end with zeros.

    A block's entries share a step. With "tensor" a block is a channel, and all blocks share one.
    """
    rows = weight.movedim(axis, 0).flatten(1)
    size = per if isinstance(per, int) else rows.shape[1]
    return F.pad(rows, (0, -rows.shape[1] % size)).unflatten(1, (-1, size))


def sharing(per):
    """Return the dimensions of `blocks` along which entries share a step."""
    return (0, 1, 2) if per == "tensor" else (2,)


def curvature(weight, gradient, axis, per):
    """Return the sum of H_ii over the entries that share a step, [out, blocks, 1] or [1, 1, 1]."""

    def total(entries):
        return blocks(entries, axis, per).sum(sharing(per), keepdim=True)

    if gradient is not None:
        return total(gradient.square().sum(-1))
    square, count = total(weight.square()), total(torch.ones_like(weight))
    zero = square <= count**2 * torch.finfo(square.dtype).tiny  # or the quotient overflows
    return torch.where(zero, 0.0, count**2 / square.masked_fill(zero, 1.0))


def rise(point, bits):
    """Return J of a Point."""
    total = 0.0
    for name, axis in point.axes.items():
        weight, gradient = point.weights[name], point.gradients and point.gradients[name]
        largest = blocks(weight, axis, point.per).abs().amax(sharing(point.per), keepdim=True)
        total += float((largest**2 * curvature(weight, gradient, axis, point.per)).sum())
    if not math.isfinite(total):
        raise ValueError("a weight is not finite")
    return total / (24 * (2 ** (bits - 1) - 1) ** 2)


@contextmanager
def kept(model, parameters):
    """Let parameters require gradients for a while, and keep a model's buffers."""
    required = [p.requires_grad for p in parameters]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        for p in parameters:
            p.requires_grad_(True)
        yield
    finally:
        for p, flag in zip(parameters, required):
            p.requires_grad_(flag)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])


@torch.enable_grad()
def point_of(model, loss, batches, per, axes, batch_size, entrywise=()):
    """Return the Point at which a model is.

    Its gradients are those of all batches for the weights `entrywise`. The others' entries only get
    factors, so that one gradient with the same sum of squares stands for all.
    """
    parameters = dict(unwrapped(model).named_parameters())
    weights = {name: parameters[name].detach() for name in axes}
    if loss is None:
        return Point(weights, None, axes, per)
    rounded = [parameters[name] for name in axes]
    samples, count = {name: [] for name in axes}, 0
    with kept(unwrapped(model), rounded):
        for count, batch in enumerate(batches, start=1):  # noqa: B007
            size = batch_size or len(next(filter(torch.is_tensor, tree_leaves(batch))))
            slopes = torch.autograd.grad(loss(model, batch), rounded, materialize_grads=True)
            for name, slope in zip(axes, slopes):
                if not slope.isfinite().all():
                    raise ValueError(f"the gradient of {name} is not finite")
                samples[name].append(size**0.5 * slope)
                if name not in entrywise:
                    samples[name] = [torch.stack(samples[name]).square().sum(0).sqrt()]
    if not count:
        raise ValueError("there are no batches to take gradients of")
    gradients = {name: torch.stack(s, -1) / count**0.5 for name, s in samples.items()}
    return Point(weights, gradients, axes, per)


# Descent along the orbit


def groups_on(names, model, symmetry):
    """Return a symmetry's groups with their axes of some weights alone, and those as tuples."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    check_groups(parameters, symmetry)

    def axes_of(group):
        axes = [axis for axis in group.axes if axis.name in names]
        return [axis._replace(dim=dims_of(axis, parameters[axis.name].shape)) for axis in axes]

    groups = [group._replace(axes=axes_of(group)) for group in symmetry]
    if not any(group.axes for group in groups):
        raise ValueError("the symmetry has no group that moves a weight which will be rounded")
    return groups


def is_bilinear(name, output, groups):
    """Return whether groups multiply a weight's outputs by numbers, and its inputs by others."""
    return all(
        group.kind == RESCALING and (axis.dim == (output,) or output not in axis.dim)
        for group in groups
        for axis in group.axes
        if axis.name == name
    )


@torch.enable_grad()
def descend(point, groups, entrywise, steps):
    """Return the elements, [count, size, size] for each group, at which log J is least."""
    device = next(iter(point.weights.values())).device
    T = [torch.zeros(g.count, g.size, g.size, dtype=torch.float64, device=device) for g in groups]
    T = [t.requires_grad_() for t in T]
    moving = {axis.name for group in groups for axis in group.axes}  # the others' J is constant
    names = [name for name in point.axes if name in moving]
    parts = [(by_entries if n in entrywise else by_tables)(n, point, groups) for n in names]
    optimizer = torch.optim.Adam(T, lr=RATE)
    for _ in range(steps):
        elements = [exponential(group, t) for group, t in zip(groups, T)]
        J = sum(part(elements).to(T[0]) for part in parts)
        optimizer.zero_grad()
        (J + TINY).log().backward()
        optimizer.step()
    return [exponential(group, t.detach()) for group, t in zip(groups, T)]


def moved(point, groups, elements):
    """Return the Point to which elements move another."""
    gradients = point.gradients and act_on(point.gradients, groups, dual(elements))
    return point._replace(weights=act_on(point.weights, groups, elements), gradients=gradients)


def action(name, groups, wanted=lambda axis: True):
    """Return a function (tensor, elements) that acts on the wanted axes of one weight."""

    def axes_of(group):
        return [axis for axis in group.axes if axis.name == name and wanted(axis)]

    chosen = {k: g._replace(axes=axes_of(g)) for k, g in enumerate(groups) if axes_of(g)}

    def act(tensor, elements):
        return act_on({name: tensor}, chosen.values(), [elements[k] for k in chosen])[name]

    return act


def by_entries(name, point, groups):
    """Return a weight's part of J as a function of the elements, by acting on all its entries."""
    weight, gradient = point.weights[name], point.gradients and point.gradients[name]
    axis, shared, act = point.axes[name], sharing(point.per), action(name, groups)

    def part(elements):
        elements = [g.to(weight) for g in elements]
        moved = act(weight, elements)
        slope = gradient if gradient is None else act(gradient, dual(elements))
        entries = blocks(moved, axis, point.per)
        largest = entries.detach().abs().amax(shared, keepdim=True)
        largest = largest.clamp(min=torch.finfo(largest.dtype).tiny)
        norm = torch.linalg.vector_norm(entries / largest, NORM, shared, keepdim=True)
        return ((largest * norm) ** 2 * curvature(moved, slope, axis, point.per)).sum()

    return part


def by_tables(name, point, groups):
    """Return a weight's part of J as a function of the elements, by tables that are made once.

    An entry becomes r W c with the factors r of its output and c of its input. So the sums of
    |rWc|^32 and of (G / rc)² are products of the tables |W|^32 and G² with powers of r and c. In
    double precision |W|^32 does not underflow.
    """
    weight, output, per = point.weights[name], point.axes[name], point.per
    act_on_outputs = action(name, groups, lambda axis: axis.dim == (output,))
    act_on_inputs = action(name, groups, lambda axis: axis.dim != (output,))

    def table(entries):  # [blocks, out, size], which is fast to multiply by [blocks, size]
        return blocks(entries, output, per).transpose(0, 1).contiguous()

    powers = table(weight.double().abs() ** NORM)
    squares = table(point.gradients[name].double().square().sum(-1))
    outputs = powers.new_ones([n if d == output else 1 for d, n in enumerate(weight.shape)])
    inputs = powers.new_ones([1 if d == output else n for d, n in enumerate(weight.shape)])

    def part(elements):
        r, c = act_on_outputs(outputs, elements).reshape(-1, 1), act_on_inputs(inputs, elements)
        norm = torch.einsum("bos,xbs->ob", powers, blocks(c**NORM, output, per)) * r**NORM
        total = torch.einsum("bos,xbs->ob", squares, blocks(c**-2, output, per)) / r**2
        if per == "tensor":
            norm, total = norm.sum(), total.sum()
        return ((norm + TINY) ** (2 / NORM) * total).sum()

    return part
