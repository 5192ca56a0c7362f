"""Rules for products: sums over products, products entry by entry, and norms' affine parameters."""

import math

import torch
from torch import Tensor

from .integers import fold, mix, place, thin, varying
from .names import BLANK, Factor, NamedAxes, each, is_floating, is_new, nearest, spread


def contract(trace, x, y, sizes):
    """Return the factors [n, i, j] of the sums over p of x[n, i, p] y[n, j, p].

    x, y: factors. Those that vary along p cancel, the others stay. sizes: (n, i, j).
    """
    cancel, stay = [[], []], [[], []]
    for k, side in enumerate((x, y)):
        for f in side:
            dims = varying(f.names)
            is_only = f.names.shape[2] == 1 and 1 not in dims and not cancel[k]
            (cancel if 2 in dims or is_only else stay)[k].append(f)
    for f, g in zip(*cancel):
        a, b = (trace.equal(h.names, [1]) for h in (f, g))
        # what is multiplied by a constant zero was not met: it is fixed
        a, b = (torch.where(names == BLANK, 0, names) for names in (a, b))
        trace.tie(a, -b)
        seen = mix(trace.step, place(f.names, [0]), fold(f.history, [1]), fold(g.history, [1]))
        trace.mark(a, seen)
        trace.mark(b, seen)
    pairs = min(map(len, cancel))
    for k in (0, 1):
        for f in cancel[k][pairs:]:  # the other side is fixed
            was_known = bool((thin(f.names).abs() < trace.known).any())
            if 1 in varying(f.names) or (f.names.shape[2] == 1 and was_known):
                stay[k].append(f)
            else:
                trace.fix([f])
    of_x = [summed(trace, f, sizes[2]) for f in stay[0]]
    of_y = each(lambda t: t.mT, [summed(trace, f, sizes[1]) for f in stay[1]])
    return spread(of_x + of_y, sizes)


def summed(trace, f, size):
    """Return a factor [n, rows, 1 or size] of the sums over p of [n, rows, p] and `size` others."""
    others = torch.arange(size, device=f.names.device)
    history = mix(trace.step, fold(f.history, [2]), place(f.names, [0]), others)
    return Factor(trace.equal(f.names, [2]), history)


def as_matrix(trace, state):
    """Return the factors of [n, rows, p], of which p is to be summed over.

    A new parameter is named as the matrix that it is here. Axes along which neither rows nor p
    vary, such as that of experts of which one was picked, belong to both.
    """
    if not is_new(state):
        return trace.named(state)
    shape, sides, groups = state.parameter.shape, (state.axes([2]), state.axes([1])), []
    rest = [a for a in range(len(shape)) if a not in sides[0] + sides[1]]
    for axes in sides:
        every = sorted(axes + [a for a in rest if shape[a] > 1 or not axes])
        sizes = [shape[a] for a in every]
        if every:
            groups.append(NamedAxes(every, torch.arange(math.prod(sizes)).view(sizes), axes))
    return trace.named(state, *groups)


def matmul(trace, out, x, y, *_):
    """Matrices [n, i, p] and [n, p, j], or with fewer dimensions, down to vectors."""

    def rows(t):
        return t[(None,) * (3 - t.dim())]

    def columns(t):
        return rows(t if t.dim() == 1 else t.mT)

    sizes = *rows(x).shape[:2], columns(y).shape[1]
    x, y = (as_matrix(trace, each(f, trace.state(t))) for f, t in ((rows, x), (columns, y)))
    return each(lambda t: t.reshape(out.shape), contract(trace, x, y, sizes))


def addmm(trace, out, bias, x, y, **_):
    factors = trace.agree(spread(trace.state(bias), out.shape), matmul(trace, out, x, y))
    return trace.touched(factors)  # by alpha and beta


def grouped_mm(trace, out, x, y, ends=None, *_, **__):
    """Rows x [rows, p] of experts, one after the other, with y [experts, p, j]."""
    ends = [0, *(ends.tolist() if x.dim() == 2 and ends is not None and y.dim() == 3 else [])]
    if not all(a < b for a, b in zip(ends, ends[1:])) or len(ends) == 1:
        return None  # an expert that got no row
    rows = as_matrix(trace, each(lambda t: t[None], trace.state(x)))
    experts = as_matrix(trace, each(lambda t: t.mT, trace.state(y)))
    parts = []
    for k, rows_of_expert in enumerate(map(slice, ends, ends[1:])):
        a = each(lambda t, where=rows_of_expert: t[:, where], rows)
        b = each(lambda t, k=k: t[k : k + 1], experts)
        parts.append(contract(trace, a, b, (1, ends[k + 1] - ends[k], out.shape[1])))
    return [Factor(*(torch.cat(ts, 1)[0] for ts in zip(*fs))) for fs in zip(*parts)]


def convolution(trace, out, x, w, bias, stride, padding, dilation, transposed, extra, groups):
    """A sum over the channels of each group, the same at all positions."""
    spatial, ones = list(range(2, x.dim())), [1] * (x.dim() - 2)
    weight = trace.state(w)
    if is_new(weight) and w.shape == weight.parameter.shape:
        weight = trace.named(weight, *channels(w.shape, groups, transposed))

    def matrices(state, dims, shape, *sizes):  # [groups, rows, p]
        factors = [Factor(trace.equal(f.names, dims), fold(f.history, dims)) for f in state]
        return each(lambda t: t.expand(*shape, *ones).reshape(groups, *sizes), factors)

    kernels = matrices(trace.named(weight), spatial, w.shape[:2], -1, w.shape[1])
    kernels = each(lambda t: t.mT, kernels) if transposed else kernels
    images = matrices(trace.factors(x), [0, *spatial], (1, x.shape[1]), 1, -1)
    factors = contract(trace, images, kernels, (groups, 1, out.shape[1] // groups))
    factors = each(lambda t: t.reshape(1, -1, *ones), factors)
    where = place(out, [0, *spatial])
    factors = spread([Factor(f.names, mix(f.history, where)) for f in factors], out.shape)
    if bias is None:
        return factors
    return trace.agree(
        factors, each(lambda t: t.view(-1, *ones).expand(out.shape), trace.state(bias))
    )


def channels(shape, groups, transposed):
    """Return the channels that a new convolution's weight sums over, and those that it makes.

    Each group has channels of its own along axis 1; those of axis 0 tell which group it is.
    """
    first = NamedAxes([0], torch.arange(shape[0]), [0])
    group = torch.arange(shape[0]) // (shape[0] // groups)
    if groups == 1:
        second = NamedAxes([1], torch.arange(shape[1]), [1])
    elif groups == shape[0]:
        second = NamedAxes([0], group, [])
    else:
        second = NamedAxes([0, 1], group[:, None] * shape[1] + torch.arange(shape[1]), [1])
    return (first, second) if transposed else (second, first)


def product(trace, out, x, y=-1, inverse=False, rounding_mode=None):
    """x y, or x / y, entry by entry."""
    if rounding_mode:
        return None
    if not isinstance(y, Tensor):
        return trace.touched(trace.state(x))
    if x is y:
        return None if inverse else powers(trace, trace.factors(x), 2)
    if is_new(trace.state(x)) and not inverse:
        x, y = y, x
    a, b = (spread(trace.state(t), out.shape) for t in (x, y))
    if not a and not inverse:
        return trace.touched(b, x)
    if not b:
        return trace.touched(a, y)
    if is_new(b) and isinstance(a, list):
        absorb(trace, a, b)
    a, b = trace.named(a), trace.named(b)
    if inverse:
        trace.mark_each_entry(b)
        b = [Factor(-f.names, f.history) for f in b]
    if a and len(b) > 1:  # a diagonal matrix: it reads units and makes others
        f = nearest(b[0], a)
        trace.tie(f.names, -b[0].names)
        trace.mark_each_entry([f, *b])
        a, b = [g for g in a if g is not f], b[1:]
    elif a:  # both might be scaled, but then two scales would be one factor
        trace.fix(b)
        b = []
    return trace.touched(a, y) + trace.touched(b, x)


def absorb(trace, factors, view):
    """Name a new parameter that multiplies tensors with these factors as a diagonal matrix.

    Where it has fewer entries than the factors have names, it is fixed, unless those are fixed.
    """
    dims = set().union(*(varying(c) for c in view.coordinates))
    for f in factors:
        axes = view.axes_like(f.names)
        if axes and (varying(f.names) <= dims or trace.is_fixed(thin(f.names))):
            trace.name(view.parameter, axes, axes)
            return
    trace.fix(view)


def power(trace, out, x, exponent=None):
    """f(cx) = c^r f(x)."""
    r = {"square": 2, "sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1}.get(trace.operation, exponent)
    if isinstance(r, Tensor) or not isinstance(x, Tensor):
        return None
    return powers(trace, trace.factors(x), r) if r else []


def powers(trace, factors, r):
    """Return the factors of x^r: new names, for the powers of the old scales."""
    trace.mark_each_entry(factors)
    new = []
    for f in factors:
        old, where = thin(f.names).unique(return_inverse=True)
        names = torch.arange(len(old), device=old.device) + len(trace.owner)
        names = torch.where((old == 0) | (old == BLANK), old if r > 0 else 0, names)
        trace.owner += [trace.owner[abs(n) if n != BLANK else 0] for n in old.tolist()]
        trace.tie(names, old, r)
        new.append(Factor(names[where].expand(f.names.shape), f.history))
    return new


def norm(trace, out, x, *args):
    """A norm fixes its input, and its affine parameters make units anew."""
    behind = 0 if isinstance(args[0], list | tuple) else x.dim() - 2  # dimensions behind theirs
    tensors = [t for t in args if t is None or isinstance(t, Tensor)]
    weight, bias, *statistics = [*tensors, None, None]
    trace.fix(trace.state(x))
    # statistics are read, or written though the schema does not say so
    for statistic in filter(is_floating, statistics):
        trace.unknown(statistic)
    parts = []
    for parameter in (weight, bias):
        axes = list(range(parameter.dim())) if isinstance(parameter, Tensor) else []
        factors = trace.named(trace.state(parameter), axes)
        parts.append(each(lambda t: t[(..., *[None] * behind)].expand(x.shape), factors))
    trace.mark_each_entry(parts[0])
    return trace.agree(*parts) if isinstance(bias, Tensor) else parts[0]


def weight_norm(trace, out, v, g, dim=0):
    trace.fix(trace.state(v))
    return spread(trace.named(trace.state(g), [dim]), out[0].shape)
