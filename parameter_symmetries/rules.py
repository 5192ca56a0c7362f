"""What operations do to the names of scales: a table from ATen operations to rules.

A rule gets the trace, the operation's output and its arguments. It returns the output's state, or a
tuple with the states of several, or None: then the operation fixes the names it touches, as one
without a rule does. `trace` explains the idea.
"""

import math
from functools import partial

import torch
from torch import Tensor

from .names import BLANK, Factor, View, compact, each, fold, is_new, mix, place, spread, thin
from .products import (
    addmm,
    channel_norm,
    convolution,
    grouped_mm,
    layer_norm,
    matmul,
    power,
    product,
    rms_norm,
    weight_norm,
)


def fits_all(number):
    """Return whether a number stays what it is under every scale."""
    return not isinstance(number, Tensor) and (number == 0 or abs(number) == math.inf)


def first_of(out):
    return out[0] if isinstance(out, list | tuple) else out


# Entries that are moved take their names along.


def move(trace, out, x, *args, **kwargs):
    function, state = trace.function, trace.state(x)
    if isinstance(out, list | tuple):
        return tuple(each(lambda t, k=k: function(t, *args)[k], state) for k in range(len(out)))
    return each(lambda t: function(t, *args, **kwargs), state)


def reshape(trace, out, x, shape, *_):
    if isinstance(shape, torch.dtype):
        return None  # the bits are taken for another type

    def reshaped(t):  # views where the values are views, so that both share their memory alike
        new = t.reshape(shape)
        return new if new.untyped_storage()._cdata == t.untyped_storage()._cdata else compact(new)

    return each(reshaped, trace.state(x))


def restride(trace, out, x, shape, stride, offset=None):
    """Dimensions of size 1 may get another stride, as behind a mean over channels_last images."""
    state = trace.state(x)
    history = state.history if isinstance(state, View) else state[0].history
    same = all(new == old for n, new, old in zip(shape, stride, trace.stride) if n > 1)
    return state if same and offset is None and list(shape) == list(history.shape) else None


def keep(trace, out, x, *_, **__):
    return each(lambda t: t.to(out.device), trace.state(x)) if out.is_floating_point() else None


def join(trace, out, tensors, dim=0):
    tensors = [t for t in tensors if t.shape != (0,)]
    states, zero = [trace.factors(t) for t in tensors], torch.zeros((), dtype=torch.int64)
    factors = []
    for k in range(max(map(len, states))):
        fixed = [spread([Factor(zero.to(t.device), zero.to(t.device))], t.shape) for t in tensors]
        column = [(state[k:] or f)[0] for state, f in zip(states, fixed)]
        factors.append(Factor(*(trace.function(list(ts), dim) for ts in zip(*column))))
    return factors


def pad(trace, out, x, widths, value=0):
    name = BLANK if fits_all(value) else 0
    names = [trace.function(f.names, widths, name) for f in trace.factors(x)]
    histories = [trace.function(f.history, widths, 0) for f in trace.factors(x)]
    return [Factor(*f) for f in zip(names, histories)]


def pick(trace, x, dims, function):
    """What data pick has one name for all that they might have picked."""
    state = trace.state(x)
    axes = []
    if is_new(state):
        axes = [a for a, n in enumerate(state.parameter.shape) if n > 1]
        axes = [a for a in axes if a not in state.axes(dims)]
    factors = trace.named(state, *([a] for a in axes[:2]))
    factors = [Factor(trace.equal(f.names, dims).expand(x.shape), f.history) for f in factors]
    return each(lambda t: compact(function(t)), factors)


def dims_of(indices):
    """Return the dimensions that x[indices] picks from; a mask may span several."""
    dims, d = [], 0
    for index in indices:
        is_mask = index is not None and index.dtype in (torch.bool, torch.uint8)
        span = index.dim() if is_mask else 1
        dims += range(d, d + span) if index is not None else []
        d += span
    return dims


def index(trace, out, x, indices):
    return pick(trace, x, dims_of(indices), lambda t: trace.function(t, indices))


def index_along(trace, out, x, dim, *args, **_):
    return pick(trace, x, [dim % x.dim()], lambda t: trace.function(t, dim, *args))


def embedding(trace, out, weight, rows, *_):
    return pick(trace, weight, [0], lambda t: t[rows])


def embedding_bag(trace, out, weight, rows, offsets, _, mode=0, sparse=False, scales=None, *__):
    trace.fix(trace.state(scales))
    factors = pick(trace, weight, [0], lambda t: t[rows])
    if mode == 2:  # the maximum
        trace.mark_each_entry(factors)
    return spread(blend(trace, factors, [0], out[0]), out[0].shape)


def put(trace, x, dims, factors):
    """What is put where data say has one name for all places; factors: of size 1 along `dims`."""
    shape = [1 if d in dims else n for d, n in enumerate(x.shape)]
    old = spread(blend(trace, trace.factors(x), dims), shape)
    factors, where = trace.agree(old, spread(factors, shape)), place(x, dims)
    return spread([Factor(f.names, mix(thin(f.history), where)) for f in factors], x.shape)


def put_along(trace, out, x, dim, where, source, *, reduce=None, **_):
    dims = [dim % x.dim()]
    if reduce or not isinstance(source, Tensor):
        return None
    if any(source.shape[d] != n for d, n in enumerate(x.shape) if d not in dims):
        return None
    return put(trace, x, dims, blend(trace, trace.factors(source), dims))


def index_put(trace, out, x, indices, values, *_):
    dims = dims_of(indices)
    if dims != list(range(len(dims))):
        return None
    front, ones = list(range(values.dim() - x.dim() + len(dims))), [1] * len(dims)
    factors = blend(trace, trace.factors(values), front)
    return put(trace, x, dims, each(lambda t: t.reshape(*ones, *t.shape[len(front) :]), factors))


# Constants. Zeros have every scale, and so has memory that is not yet written.


def blank(trace, out, *args, **kwargs):
    number = {"scalar_tensor": 0, "full": 1, "full_like": 1, "fill": 1, "new_full": 2}
    value = args[number[trace.operation]] if trace.operation in number else 0
    if isinstance(value, Tensor):
        return None
    if not fits_all(value) or not out.is_floating_point():
        return []
    names = torch.full_like(out, BLANK, dtype=torch.int64)
    return [Factor(names, torch.zeros_like(names))]


def constant(trace, out, *args, **kwargs):
    return []


# Functions of entries: f(cx) = c f(x) for c > 0, and others


def positive(trace, out, x, *numbers, **_):
    if any(isinstance(number, Tensor) for number in numbers):
        return None
    factors = trace.factors(x)
    trace.mark_each_entry(factors)
    return factors


def clamp(trace, out, x, min=None, max=None):
    limits = [limit for limit in (min, max) if limit is not None]
    return positive(trace, out, x) if all(map(fits_all, limits)) else None


def prelu(trace, out, x, weight):
    trace.fix(trace.state(weight))
    return positive(trace, out, x)


def glu(trace, out, x, dim=-1):
    value, gate = (each(lambda t, k=k: t.chunk(2, dim)[k], trace.factors(x)) for k in (0, 1))
    trace.fix(gate)
    return trace.touched(value, out)


def compare(trace, out, x, y=0):
    """The sign of an entry stays, and which one of two is larger."""
    if isinstance(y, Tensor):
        shape = torch.broadcast_shapes(x.shape, y.shape)
        both = trace.agree(*(spread(trace.state(t), shape) for t in (x, y)))
        trace.mark_each_entry(trace.named(both))
        return []
    if y != 0:
        return None
    trace.mark_each_entry(trace.factors(x))
    return []


# Sums


def add(trace, out, x, y, **_):
    if isinstance(y, Tensor):
        return trace.agree(*(spread(trace.state(t), out.shape) for t in (x, y)))
    return trace.state(x) if type(y) is int and y == 0 else None  # Python's sum begins with 0


def larger(trace, out, x, y):
    factors = trace.named(add(trace, out, x, y))
    trace.mark_each_entry(factors)
    return factors


def where(trace, out, condition, x, y):
    return trace.touched(add(trace, out, x, y), condition)


def copy(trace, out, x, source, *_):
    return spread(trace.factors(source), x.shape)


def mask(trace, out, x, *_):
    """Any entries may become 0."""
    return trace.touched(trace.state(x), torch.empty(x.shape, device="meta"))


def masked_fill(trace, out, x, by, value):
    return trace.touched(spread(trace.state(x), out.shape), by) if fits_all(value) else None


def scale(trace, out, x):
    return trace.touched(trace.state(x))


def blend(trace, factors, dims, out=None):
    """Return the factors of linear combinations along `dims`, of size 1 there or as `out`."""
    blended = []
    for f in factors:
        history = mix(trace.step, fold(f.history, dims))
        if out is not None:
            history = mix(history, place(out, dims))
        blended.append(Factor(trace.equal(f.names, dims), history))
    return blended


def reduce(trace, out, x, *args, position=0, dims=None, linear=True, **kwargs):
    """Sums, means, maxima, poolings: the names along what is reduced are equal."""
    first = first_of(out)
    dims = kwargs.get("dim", args[position] if position < len(args) else dims)
    if dims is None or dims == []:
        dims = range(x.dim())
    dims = sorted({d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)})
    factors = blend(trace, trace.factors(x), dims, first if first.dim() == x.dim() else None)
    if not linear:
        trace.mark_each_entry(factors)
    if first.dim() < x.dim():
        factors = each(lambda t: t.squeeze(dims), factors)
    return spread(factors, first.shape)


def length(trace, out, x, order=2, *args, **kwargs):
    return reduce(trace, out, x, *args, linear=False, **kwargs) if order != 0 else None


def pool(trace, out, x, *_, dims, linear=True, **__):
    return reduce(trace, out, x, dims=range(-dims, 0), linear=linear)


# The table


RULES = {
    operation: rule
    for rule, operations in {
        reshape: "view _unsafe_view _reshape_alias",
        move: "permute transpose t unsqueeze squeeze expand slice select split split_with_sizes "
        "unsafe_split unbind diagonal unfold alias detach flip roll repeat pixel_shuffle "
        "pixel_unshuffle channel_shuffle native_channel_shuffle",
        restride: "as_strided",
        keep: "clone contiguous _to_copy lift_fresh",
        join: "cat stack",
        pad: "constant_pad_nd",
        index: "index _unsafe_index",
        index_along: "index_select gather",
        embedding: "embedding",
        embedding_bag: "_embedding_bag _embedding_bag_forward_only",
        put_along: "index_add index_copy scatter scatter_add",
        index_put: "index_put _index_put_impl",
        blank: "zeros zeros_like new_zeros zero empty empty_like new_empty empty_strided "
        "new_empty_strided empty_permuted full full_like new_full fill scalar_tensor",
        constant: "ones_like new_ones rand_like randn_like",
        positive: "relu leaky_relu abs",
        clamp: "clamp clamp_min clamp_max",
        prelu: "_prelu_kernel",
        glu: "glu",
        power: "pow square sqrt rsqrt reciprocal",
        compare: "gt lt ge le eq ne sign sgn signbit isnan isinf isfinite",
        add: "add sub rsub",
        larger: "maximum minimum fmax fmin",
        where: "where",
        copy: "copy",
        mask: "tril triu native_dropout",
        masked_fill: "masked_fill",
        scale: "neg",
        product: "mul",
        partial(product, inverse=True): "div",
        matmul: "mm bmm mv dot",
        addmm: "addmm addmv baddbmm",
        grouped_mm: "_grouped_mm",
        convolution: "convolution",
        layer_norm: "native_layer_norm",
        rms_norm: "_fused_rms_norm",
        channel_norm: "native_group_norm native_batch_norm _native_batch_norm_legit "
        "_native_batch_norm_legit_no_training _batch_norm_with_update cudnn_batch_norm "
        "miopen_batch_norm",
        weight_norm: "_weight_norm_interface",
        reduce: "sum mean cumsum",
        partial(reduce, linear=False): "amax amin max min argmax argmin cummax cummin",
        partial(reduce, position=1, dims=-1, linear=False): "topk kthvalue",
        partial(reduce, dims=-1, linear=False): "sort argsort",
        length: "linalg_vector_norm norm",
        **{
            partial(pool, dims=n): f"avg_pool{n}d _adaptive_avg_pool{n}d reflection_pad{n}d "
            f"replication_pad{n}d upsample_nearest{n}d _upsample_nearest_exact{n}d "
            f"upsample_linear{n}d upsample_bilinear{n}d upsample_bicubic{n}d upsample_trilinear{n}d"
            for n in (1, 2, 3)
        },
        **{
            partial(pool, dims=n, linear=False): f"max_pool{n}d_with_indices adaptive_max_pool{n}d"
            for n in (1, 2, 3)
        },
    }.items()
    for operation in operations.split()
}
# those of them whose in-place versions change shapes, or do not exist
MOVES = reshape, move, join, pad, index, index_along, embedding
