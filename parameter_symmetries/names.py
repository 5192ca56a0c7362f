"""Names of scales beside the entries of tensors, and what is demanded of them.

`trace` explains the idea. A name is an integer: n > 0 is a scale c_n, -n is 1 / c_n, 0 is fixed.
BLANK is the name of a constant zero, which fits every scale. UNWRITTEN is that of memory to which
nothing was written; it counts as fixed where it is read.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .components import ratios_of
from .integers import mix, place, thin, varying

BLANK, UNWRITTEN = torch.iinfo(torch.int64).min, 1


class Factor(NamedTuple):
    """A scale that the entries of a tensor follow; both are int64, of the tensor's shape."""

    names: Tensor
    history: Tensor  # hashes of what became of the entries


class NamedAxes(NamedTuple):
    """Axes of a parameter, taken as one, with a name for each index."""

    axes: list
    names: Tensor  # of the axes' shape
    summed: list  # those of the axes along which a sum over the names runs


class Parameter:
    """A parameter, and its NamedAxes once it has been used; [] if it is fixed."""

    def __init__(self, name, number, shape):
        self.name, self.number, self.shape, self.named_axes = name, number, shape, None


@dataclass
class View:
    """The state of a tensor whose entries are a parameter's, at these coordinates."""

    parameter: Parameter
    coordinates: list  # for each axis of the parameter, of the tensor's shape
    history: Tensor

    def axes(self, dims):
        """Return the axes along which one moves in the parameter on moving along `dims` here."""
        return [a for a, c in enumerate(self.coordinates) if varying(c) & set(dims)]

    def axes_like(self, names):
        """Return the axes along which one moves where these names differ, or one of size 1."""
        dims = varying(names)
        single = [a for a, n in enumerate(self.parameter.shape) if n == 1 and not dims]
        return self.axes(dims) or single[:1]


def is_floating(x):
    """Return whether x is a tensor that can have names; sparse and complex ones are fixed."""
    return isinstance(x, Tensor) and x.is_floating_point() and x.layout == torch.strided


# States of tensors: a list of Factors, which multiply, or a View. [] is fixed.


def is_new(state):
    """Return whether a state is that of a parameter without names."""
    return isinstance(state, View) and state.parameter.named_axes is None


def each(function, state):
    """Apply a function to all tensors of a state."""
    if isinstance(state, View):
        coordinates = [function(c) for c in state.coordinates]
        return View(state.parameter, coordinates, function(state.history))
    return [Factor(function(f.names), function(f.history)) for f in state]


def spread(state, shape):
    return each(lambda t: t.expand(shape), state)


def fixed(like):
    """Return the Factor of a tensor that is fixed, where others beside it are not."""
    zero = torch.zeros((), dtype=torch.int64, device=like.device).expand(like.shape)
    return Factor(zero, zero)


def overwritable(names):
    """Return names with BLANK for what is not yet written, too, as for one who writes there."""
    return torch.where(names == UNWRITTEN, BLANK, names)


class Names:
    """The names of a run, the equations that they must obey, and what was done to them."""

    def __init__(self):
        self.step, self.operation = 0, ""  # what is running
        self.owner = [None, None]  # for each name its Parameter; 0 and UNWRITTEN have none
        self.known = 2  # how many names there were before the operation
        # arrays a, b, r: log c_a = r log c_b, of names without signs
        self.equations = [(np.array([UNWRITTEN]), np.array([0]), np.ones(1))]
        self.marks = []  # (names, hashes of what was done to them)
        self.met = []  # names of entries that took part in the run
        self.ended = {}  # "operation after module" for what fixed names, in the order of the run

    def name(self, parameter, *groups):
        """Give a parameter names along groups of axes: each a list of axes, or NamedAxes."""
        parameter.named_axes = []
        for group in groups:
            if not isinstance(group, NamedAxes):
                sizes = [parameter.shape[a] for a in group]
                group = NamedAxes(group, torch.arange(math.prod(sizes)).view(sizes), group)
            parameter.named_axes.append(group._replace(names=group.names + len(self.owner)))
            self.owner += [parameter] * (1 + max(group.names.flatten().tolist(), default=-1))

    def named(self, state, *groups):
        """Return the factors of a state; a new parameter gets names, along two axes by default."""
        if not isinstance(state, View):
            return state
        parameter, factors = state.parameter, []
        if is_new(state):
            axes = [a for a, n in enumerate(parameter.shape) if n > 1]
            self.name(parameter, *(groups or [[a] for a in axes[:2]]))
        for axes, names, summed in parameter.named_axes:
            names = names.to(state.history.device)[tuple(thin(state.coordinates[a]) for a in axes)]
            rows = [thin(c) for a, c in enumerate(state.coordinates) if a not in summed]
            factors.append(Factor(names, mix(parameter.number, *rows, thin(state.history))))
            self.met.append(names.flatten().cpu().numpy())
        return spread(factors, state.history.shape)

    def tie(self, a, b, ratio=1):
        """Demand log c_a = ratio log c_b; return a, or b where a is blank."""
        a, b = torch.broadcast_tensors(thin(a), thin(b))
        real = (a != BLANK) & (b != BLANK) & ((a != b) | (ratio != 1))
        sign = torch.where((a < 0) == (b < 0), 1, -1)  # whole: floats would have the default type
        a_real, b_real, sign = (t[real].cpu().numpy() for t in (a.abs(), b.abs(), sign))
        self.equations.append((a_real, b_real, float(ratio) * sign))
        return torch.where(a == BLANK, b, a)

    def equal(self, names, dims):
        """Demand that names be equal along `dims`; return them, of size 1 there."""
        names = thin(names)
        if all(names.shape[d] == 1 for d in dims):
            return names
        if names.numel() == 0:  # a sum of nothing is 0
            shape = [1 if d in dims else n for d, n in enumerate(names.shape)]
            return names.new_full(shape, BLANK)
        one = names.amax(dims, keepdim=True)  # BLANK is the least of all
        self.tie(names, one)
        return one

    def fix(self, state):
        """Demand that the scales of a state be 1, because of the operation that is running."""
        owners = []
        if is_new(state):
            state.parameter.named_axes = []
            owners.append(state.parameter)
        for f in self.named(state):
            names = thin(f.names).unique()
            self.tie(names, torch.zeros_like(names))
            earlier = (names.abs() > UNWRITTEN) & (names.abs() < self.known)
            owners += [self.owner[abs(name)] for name in names[earlier].tolist()]
        for owner in filter(None, dict.fromkeys(owners)):
            module, _, name = owner.name.rpartition(".")
            operation = self.operation.removeprefix("_").removeprefix("native_")
            self.ended[f"{operation} after {module or name}"] = True

    def is_fixed(self, names):
        """Return whether all that was demanded so far fixes these names."""
        _, ratio = ratios_of(*map(np.concatenate, zip(*self.equations)), len(self.owner))
        return not ratio[names[names != BLANK].abs().cpu().numpy()].any()

    def agree(self, x, y):
        """Return the factors of x + y, and of all else for which x and y must scale alike."""
        for one, other in ((x, y), (y, x)):
            if isinstance(other, View):
                continue
            if other and bool((thin(other[0].names) == BLANK).all()):
                return one
            if is_new(one):
                self.name(one.parameter, *filter(None, (one.axes_like(f.names) for f in other)))
        x, y, both = self.named(x), self.named(y), []
        for f in x:
            if y:
                g = nearest(f, y)
                y = [h for h in y if h is not g]
                names, history = self.tie(f.names, g.names), mix(thin(f.history), thin(g.history))
                both += spread([Factor(names, history)], f.names.shape)
            else:
                self.fix([f])
        self.fix(y)
        return both

    # What was done to names, for GL(d)

    def mark(self, names, marks):
        """Note what was done to names; whether to them or to their inverses makes a difference."""
        names, marks = torch.broadcast_tensors(names, mix(marks, names.sign()))
        real = (names != 0) & (names != BLANK)
        self.marks.append((names[real].abs().cpu().numpy(), marks[real].cpu().numpy()))

    def mark_each_entry(self, factors):
        """Note that entries were treated one by one; return the factors."""
        for f in factors:
            self.mark(thin(f.names), thin(f.names))
        return factors

    def touched(self, state, *others):
        """Return the state of a tensor times fixed ones, which may vary from entry to entry."""
        if not state:
            return state
        like = state.history if isinstance(state, View) else state[0].history
        strides = [other.expand(like.shape).stride() for other in others]
        where = place(like, [d for d in range(like.dim()) if any(s[d] for s in strides)])

        def change(history):
            return mix(thin(history), self.step, where).expand(like.shape)

        if isinstance(state, View):
            return replace(state, history=change(state.history))
        return [Factor(f.names, change(f.history)) for f in state]


def nearest(f, others):
    """Return that of the other factors which varies along most of the dimensions that f does."""
    if len(others) == 1:
        return others[0]
    return max(others, key=lambda g: len(varying(f.names) & varying(g.names)))
