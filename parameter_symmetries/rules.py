"""What operations do to the names of scales: a table from ATen operations to rules.

A rule gets the trace, the operation's output and its arguments. It returns the output's state, or a
tuple with the states of several, or None: then the operation fixes the names it touches, as one
without a rule does. `trace` explains the idea.
"""

import math
from functools import partial
from itertools import zip_longest

import torch
from torch import Tensor

from . import products
from .integers import compact, fold, mix, place, thin
from .names import BLANK, UNWRITTEN, Factor, each, fixed, is_floating, is_new, overwritable, spread


def fits_all(number):
    """Return whether a number stays what it is under every scale."""
    return not isinstance(number, Tensor) and (number == 0 or abs(number) == math.inf)


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
    old_shape, old_stride = trace.layout
    same = all(new == old for n, new, old in zip(shape, stride, old_stride) if n > 1)
    return trace.state(x) if same and offset is None and list(shape) == list(old_shape) else None


def keep(trace, out, x, *_, **__):
    return each(lambda t: t.to(out.device), trace.state(x)) if out.is_floating_point() else None


def join(trace, out, tensors, dim=0):
    tensors, factors = [t for t in tensors if t.shape != (0,)], []
    for column in zip_longest(*map(trace.factors, tensors)):
        column = [f or fixed(t) for f, t in zip(column, tensors)]
        factors.append(Factor(*(trace.function(list(ts), dim) for ts in zip(*column))))
    return factors


def pad(trace, out, x, widths, value=0):
    name, function = BLANK if fits_all(value) else 0, trace.function
    return [Factor(function(n, widths, name), function(h, widths, 0)) for n, h in trace.factors(x)]


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


def index_along(trace, out, x, dim, where, **_):
    picked = pick(trace, x, [dim % x.dim()], lambda t: trace.function(t, dim, where))
    return trace.touched(picked, where) if where.dim() == x.dim() > 1 else picked


def embedding(trace, out, weight, rows, *_):
    return pick(trace, weight, [0], lambda t: t[rows])


def embedding_bag(trace, out, weight, rows, offsets, _, mode=0, sparse=False, scales=None, *__):
    trace.fix(trace.state(scales))
    factors = pick(trace, weight, [0], lambda t: t[rows])
    if mode == 2:  # the maximum
        trace.mark_each_entry(factors)
    return spread(blend(trace, factors, [0], out[0]), out[0].shape)


def put(trace, x, dims, factors, also=()):
    """What is put where data say has one name for all places; factors: of size 1 along `dims`."""
    shape = [1 if d in dims else n for d, n in enumerate(x.shape)]
    old = [Factor(overwritable(f.names), f.history) for f in trace.factors(x)]
    factors = trace.agree(spread(blend(trace, old, dims), shape), spread(factors, shape))
    where = place(x, {*dims, *also})
    return spread([Factor(f.names, mix(thin(f.history), where)) for f in factors], x.shape)


def put_along(trace, out, x, dim, where, source, *, reduce=None, **_):
    dims = [dim % x.dim()]
    if reduce or not isinstance(source, Tensor):
        return None
    others = [where] * (where.dim() == x.dim() > 1)  # each entry goes where its own index says
    others += [source]
    if any(t.shape[d] != n for t in others for d, n in enumerate(x.shape) if d not in dims):
        return None
    varied = [d for d, stride in enumerate(where.stride()) if stride and len(others) > 1]
    return put(trace, x, dims, blend(trace, trace.factors(source), dims), varied)


def index_put(trace, out, x, indices, values, *_):
    dims = dims_of(indices)
    if dims != list(range(len(dims))):
        return None
    front, ones = list(range(values.dim() - x.dim() + len(dims))), [1] * len(dims)
    factors = blend(trace, trace.factors(values), front)
    return put(trace, x, dims, each(lambda t: t.reshape(*ones, *t.shape[len(front) :]), factors))


def constant(trace, out, *args, **_):
    """Zeros and infinities have every scale, other numbers none; empty memory is UNWRITTEN."""
    if any(isinstance(value, Tensor) for value in args[1:]):
        return None
    is_empty = "empty" in trace.operation
    if not is_floating(out) or not (is_empty or (out == 0).all() or out.isinf().all()):
        return []
    names = torch.full_like(out, UNWRITTEN if is_empty else BLANK, dtype=torch.int64)
    return [Factor(names, torch.zeros_like(names))]


# Functions of entries: f(cx) = c f(x) for c > 0, and others


def positive(trace, out, x, *_, **__):
    return trace.mark_each_entry(trace.factors(x))


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


# Sums


def add(trace, out, x, y=0, *_, **__):
    """x + y, x - y, or x + alpha y. Which it is matters to GL(d), so each has its own history."""
    if isinstance(y, Tensor):
        return trace.touched(trace.agree(*(spread(trace.state(t), out.shape) for t in (x, y))))
    return trace.touched(trace.state(x)) if y == 0 else None  # Python's sum begins with 0


def larger(trace, out, x, y=0):
    both = add(trace, out, x, y)
    return None if both is None else trace.mark_each_entry(trace.named(both))


def compare(*arguments):
    """Which of two entries is larger stays, and so does the sign of one."""
    return None if larger(*arguments) is None else []


def where(trace, out, condition, x, y):
    return trace.touched(add(trace, out, x, y), condition)


def copy(trace, out, x, source, *_):
    return spread(trace.factors(source), x.shape) if is_floating(x) else None


def mask(trace, out, x, *_):
    """Any entries may become 0."""
    return trace.touched(trace.state(x), torch.empty(x.shape, device="meta"))


def masked_fill(trace, out, x, by, value):
    return trace.touched(spread(trace.state(x), out.shape), by) if fits_all(value) else None


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
    first = out[0] if isinstance(out, list | tuple) else out
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


def pool(trace, out, x, *_, **__):
    """Poolings, paddings, interpolations: over as many dimensions as the operation's name says."""
    dims = range(-next(n for n in (1, 2, 3) if f"{n}d" in trace.operation), 0)
    return reduce(trace, out, x, dims=dims, linear="max" not in trace.operation)


# The table


RULES = {  # operation: rule, where # is a number of dimensions
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
        constant: "zeros zeros_like new_zeros zero ones_like new_ones full full_like new_full fill "
        "scalar_tensor rand_like randn_like empty empty_like new_empty empty_strided "
        "new_empty_strided empty_permuted",
        positive: "relu leaky_relu abs",
        clamp: "clamp clamp_min clamp_max",
        prelu: "_prelu_kernel",
        glu: "glu",
        products.power: "pow square sqrt rsqrt reciprocal",
        compare: "gt lt ge le eq ne sign sgn signbit isnan isinf isfinite",
        add: "add sub rsub",
        larger: "maximum minimum fmax fmin",
        where: "where",
        copy: "copy",
        mask: "tril triu native_dropout",
        masked_fill: "masked_fill",
        products.product: "mul neg",
        partial(products.product, inverse=True): "div",
        products.matmul: "mm bmm mv dot",
        products.addmm: "addmm addmv baddbmm",
        products.grouped_mm: "_grouped_mm",
        products.convolution: "convolution",
        products.norm: "native_layer_norm _fused_rms_norm native_group_norm native_batch_norm "
        "_native_batch_norm_legit _native_batch_norm_legit_no_training _batch_norm_with_update "
        "cudnn_batch_norm miopen_batch_norm",
        products.weight_norm: "_weight_norm_interface",
        reduce: "sum mean cumsum",
        partial(reduce, linear=False): "amax amin max min argmax argmin cummax cummin",
        partial(reduce, position=1, dims=-1, linear=False): "topk kthvalue",
        partial(reduce, dims=-1, linear=False): "sort argsort",
        pool: "avg_pool#d _adaptive_avg_pool#d max_pool#d_with_indices adaptive_max_pool#d "
        "reflection_pad#d replication_pad#d upsample_nearest#d _upsample_nearest_exact#d "
        "upsample_linear#d upsample_bilinear#d upsample_bicubic#d upsample_trilinear#d",
    }.items()
    for dimensions in "123"
    for operation in operations.replace("#", dimensions).split()
}
