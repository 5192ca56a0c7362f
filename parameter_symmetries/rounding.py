"""Weights that survive rounding: move a network to where few bits do little harm.

Rounding to the nearest of 2^b − 1 levels, Δ = max|W| / (2^{b−1} − 1) apart, adds an error of the
variance Δ²/12 to each weight. To second order the loss then rises by

    J = ½ Σ_i H_ii Δ_i² / 12,        H_ii ≈ B E[g_i²],

with gradients g of mini-batches of B samples (Fisher's matrix). A symmetry keeps the network's
function, but not J. Its elements h take weights W to hW and gradients G to h^{-T} G: gradients at
one point give J on the whole orbit, and `equalize_` descends on log J without another pass through
the network. In the logarithms of rescalings log J is convex. Below four bits J is a rough guide,
and moving can do harm. One bit less makes J about four times as large.

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
    axes = checked(model, bits, per, axes)
    symmetry = [group for group in symmetry if loss or group.kind == RESCALING]
    groups = groups_on(axes, unwrapped(model), symmetry)
    entrywise = {name for name in axes if not loss or not is_bilinear(name, axes[name], groups)}
    weights = weights_of(model, loss, batches, per, axes, batch_size, entrywise)
    before, elements = rise(weights, bits), descend(weights, groups, entrywise, steps)
    new = {name: moved(w, action(name, groups), elements) for name, w in weights.items()}
    after = rise(new, bits)
    if after < before:  # a norm is not the maximum: where nothing is to gain, J may end higher
        act_on_(model, symmetry, elements, optimizer)
    return Rise(before, min(before, after))


def predicted_rise(model, loss, batches, bits, per="channel", *, axes=None, batch_size=None):
    """Return J, the predicted rise of the loss when a model's weights are rounded to so many bits.

    The arguments and errors are those of `equalize_`.
    """
    axes = checked(model, bits, per, axes)
    return rise(weights_of(model, loss, batches, per, axes, batch_size), bits)


@torch.no_grad()
def round_weights(model, bits, per="channel", axes=None):
    """Return a copy of a model whose weights are rounded to 2^bits − 1 levels, symmetric about 0.

    per, axes: as `equalize_` takes them. Raises ValueError for fewer than two bits.
    """
    axes = checked(model, bits, per, axes)
    model, levels = copy.deepcopy(model), 2 ** (bits - 1) - 1
    parameters = dict(unwrapped(model).named_parameters())
    for name, axis in axes.items():
        weight = Weight(parameters[name], None, axis, per)
        scale = weight.largest().flatten().float() / levels
        scale = scale.clamp(min=torch.finfo(scale.dtype).tiny)  # of a row of zeros
        zero = torch.zeros_like(scale, dtype=torch.int32)
        rows = weight.blocks(weight.tensor).reshape(len(scale), -1)
        rows = torch.fake_quantize_per_channel_affine(rows, scale, zero, 0, -levels, levels)
        channels = weight.tensor.movedim(axis, 0)
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
    model, kinds = unwrapped(model), nn.Embedding | nn.EmbeddingBag
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, kinds)}
    axes = {}
    for name, p in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        transposed |= type(module).__name__ == "Conv1D"  # transformers' GPT-2 has [in, out]
        if p.dim() > 1 and p.is_floating_point() and id(p) not in embeddings:
            axes[name] = int(transposed)
    return axes


def checked(model, bits, per, axes):
    """Return axes, by default `rounded_weights`. Raises ValueError for bad bits or per."""
    if type(bits) is not int or bits < 2:
        raise ValueError(f"bits must be a whole number above 1, not {bits!r}")
    if per not in ("tensor", "channel") and (type(per) is not int or per < 1):
        raise ValueError(f"per must be 'tensor', 'channel' or a number of inputs, not {per!r}")
    return rounded_weights(model) if axes is None else axes


# J at a point


class Weight(NamedTuple):
    """A weight that will be rounded, and what its part of J depends on."""

    tensor: torch.Tensor
    gradient: torch.Tensor | None  # [*shape, n], whose squares' sum over n is H; None: no loss
    axis: int  # of the output channels
    per: str | int  # what shares a step Δ

    def blocks(self, entries):
        """Return entries as [output channels, blocks, size]; the last block may end with zeros."""
        rows = entries.movedim(self.axis, 0).flatten(1)
        size = self.per if isinstance(self.per, int) else rows.shape[1]
        return F.pad(rows, (0, -rows.shape[1] % size)).unflatten(1, (-1, size))

    def shared(self):
        """Return the dimensions of `blocks` along which entries share a step."""
        return (0, 1, 2) if self.per == "tensor" else (2,)

    def largest(self):
        """Return max|W| of the entries that share a step, [out, blocks, 1] or [1, 1, 1]."""
        return self.blocks(self.tensor).abs().amax(self.shared(), keepdim=True)

    def curvature(self):
        """Return the sum of H_ii over the entries that share a step, as `largest` does."""

        def total(entries):
            return self.blocks(entries).sum(self.shared(), keepdim=True)

        if self.gradient is not None:
            return total(self.gradient.square().sum(-1))
        square, count = total(self.tensor.square()), total(torch.ones_like(self.tensor))
        zero = square <= count**2 * torch.finfo(square.dtype).tiny  # or the quotient overflows
        return torch.where(zero, 0.0, count**2 / square.masked_fill(zero, 1.0))


def rise(weights, bits):
    """Return J of {name: Weight}."""
    total = sum(float((w.largest() ** 2 * w.curvature()).sum()) for w in weights.values())
    if not math.isfinite(total):
        raise ValueError("a weight is not finite")
    return total / (24 * (2 ** (bits - 1) - 1) ** 2)


@contextmanager
def kept(model, parameters):
    """Let parameters require gradients for a while, and keep a model's buffers."""
    frozen = [p for p in parameters if not p.requires_grad]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        for p in frozen:
            p.requires_grad_(True)
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])


@torch.enable_grad()
def weights_of(model, loss, batches, per, axes, batch_size, entrywise=()):
    """Return {name: Weight} of a model.

    The gradients are those of all batches for the weights `entrywise`. The others' entries only get
    factors, so that one gradient with the same sum of squares stands for all.
    """
    parameters = dict(unwrapped(model).named_parameters())
    rounded = [parameters[name] for name in axes]
    samples, count = {name: [] for name in axes}, 0
    with kept(unwrapped(model), rounded):
        for count, batch in enumerate(batches if loss else (), start=1):  # noqa: B007
            size = batch_size or len(next(filter(torch.is_tensor, tree_leaves(batch))))
            slopes = torch.autograd.grad(loss(model, batch), rounded, materialize_grads=True)
            for name, slope in zip(axes, slopes):
                if not slope.isfinite().all():
                    raise ValueError(f"the gradient of {name} is not finite")
                samples[name].append(size**0.5 * slope)
                if name not in entrywise:
                    samples[name] = [torch.stack(samples[name]).square().sum(0).sqrt()]
    if loss and not count:
        raise ValueError("there are no batches to take gradients of")
    gradients = {name: torch.stack(s, -1) / count**0.5 for name, s in samples.items() if s}
    return {
        name: Weight(parameters[name].detach(), gradients.get(name), axis, per)
        for name, axis in axes.items()
    }


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
def descend(weights, groups, entrywise, steps):
    """Return the elements, [count, size, size] for each group, at which log J is least."""
    device = next(iter(weights.values())).tensor.device
    T = [torch.zeros(g.count, g.size, g.size, dtype=torch.float64, device=device) for g in groups]
    T = [t.requires_grad_() for t in T]
    moving = {axis.name for group in groups for axis in group.axes}  # the others' J is constant
    parts = [
        (by_entries if name in entrywise else by_tables)(name, weight, groups)
        for name, weight in weights.items()
        if name in moving
    ]
    optimizer = torch.optim.Adam(T, lr=RATE)
    for _ in range(steps):
        elements = [exponential(group, t) for group, t in zip(groups, T)]
        J = sum(part(elements).to(T[0]) for part in parts)
        optimizer.zero_grad()
        (J + TINY).log().backward()
        optimizer.step()
    return [exponential(group, t.detach()) for group, t in zip(groups, T)]


def moved(weight, act, elements):
    """Return a Weight after elements have acted on it; act: its `action`."""
    new = weight._replace(tensor=act(weight.tensor, elements))
    if weight.gradient is None:
        return new
    return new._replace(gradient=act(weight.gradient, dual(elements)))


def action(name, groups, wanted=lambda axis: True):
    """Return a function (tensor, elements) that acts on the wanted axes of one weight."""

    def axes_of(group):
        return [axis for axis in group.axes if axis.name == name and wanted(axis)]

    chosen = {k: g._replace(axes=axes_of(g)) for k, g in enumerate(groups) if axes_of(g)}

    def act(tensor, elements):
        return act_on({name: tensor}, chosen.values(), [elements[k] for k in chosen])[name]

    return act


def by_entries(name, weight, groups):
    """Return a weight's part of J as a function of the elements, by acting on all its entries."""
    act = action(name, groups)

    def part(elements):
        new = moved(weight, act, [g.to(weight.tensor) for g in elements])
        largest = new.largest().detach()
        largest = largest.clamp(min=torch.finfo(largest.dtype).tiny)
        entries = new.blocks(new.tensor) / largest
        norm = torch.linalg.vector_norm(entries, NORM, new.shared(), keepdim=True)
        return ((largest * norm) ** 2 * new.curvature()).sum()

    return part


def by_tables(name, weight, groups):
    """Return a weight's part of J as a function of the elements, by tables that are made once.

    An entry becomes r W c with the factors r of its output and c of its input. So the sums of
    |rWc|^32 and of (G / rc)² are products of the tables |W|^32 and G² with powers of r and c. In
    double precision |W|^32 does not underflow.
    """
    output, shape = weight.axis, weight.tensor.shape
    act_on_outputs = action(name, groups, lambda axis: axis.dim == (output,))
    act_on_inputs = action(name, groups, lambda axis: axis.dim != (output,))

    def table(entries):  # [blocks, out, size], which is fast to multiply by [blocks, size]
        return weight.blocks(entries).transpose(0, 1).contiguous()

    powers = table(weight.tensor.double().abs() ** NORM)
    squares = table(weight.gradient.double().square().sum(-1))
    outputs = powers.new_ones([n if d == output else 1 for d, n in enumerate(shape)])
    inputs = powers.new_ones([1 if d == output else n for d, n in enumerate(shape)])

    def part(elements):
        r, c = act_on_outputs(outputs, elements).reshape(-1, 1), act_on_inputs(inputs, elements)
        norm = torch.einsum("bos,xbs->ob", powers, weight.blocks(c**NORM)) * r**NORM
        total = torch.einsum("bos,xbs->ob", squares, weight.blocks(c**-2)) / r**2
        if weight.per == "tensor":
            norm, total = norm.sum(), total.sum()
        return ((norm + TINY) ** (2 / NORM) * total).sum()

    return part
