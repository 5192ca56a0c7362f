"""Find the symmetries of any module by watching it run.

`symmetry_of` runs a model once, and sees the few dozen ATen operations that it consists of,
whatever Python does above them. Beside every floating tensor stand its *factors*: integer tensors
of the same shape that say, entry by entry, the *name* of the scale that the entry follows. A
parameter gets names where it is first used: one for each index of the axis that is summed over
there, and one for each index of the other. A rule for each operation says what it does to names,
and which names must be equal. What is not known, or bends its input as a softmax or GELU does,
fixes the names that it touches; inputs, buffers and outputs are fixed. So an answer may lack a
symmetry, but it is right for whatever the run met.

What must be equal are equations between names. The connected components of their graph, without
those that meet a fixed name, are the rescalings: `components` finds them.

Beside its name an entry has a *history*: a hash of the sums that made it, and of the coordinates
that it had there, but for the index that tells names from each other. A sum over this index marks
the names with the histories that it meets, and an operation that treats entries one by one marks
each name apart. So components with the same marks went through the same sums in the same places,
and through nothing else: they may be mixed, which is GL(d).
"""

import sys
from collections import defaultdict
from contextlib import nullcontext
from itertools import zip_longest

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from .components import groups_of
from .groups import LINEAR, floating, unwrapped
from .integers import place, thin
from .names import BLANK, Factor, Names, Parameter, View, fixed, is_floating, overwritable
from .rules import RULES, constant, restride


def symmetry_of(model, *inputs, keep=None, **kwargs):
    """Return the Symmetry of a module: all groups that keep the outputs and that one run shows.

    The model runs once, model(*inputs, **kwargs), as it is: in training or in evaluation, which may
    differ, without gradients. One or two samples are enough, if they meet all parts of the model:
    a part that does not run, such as an expert that no sample takes, has no group here, and should
    not be one that other samples take. Parameters, buffers, inputs and the random state stay as
    they are. Operations without a rule, such as vector norms, and those that write to out=, fix
    what they read. What is not seen: what a compiled extension reads without an operation of
    PyTorch, what other threads do, what wrapper subclasses hold, and what the run itself makes an
    nn.Parameter.

    keep(output) returns those of the outputs that must stay; by default all floating ones. A cache
    of keys and values among the outputs fixes these: then take keep=lambda output: output.logits.
    Tensors that the model stores on itself, such as an auxiliary loss, are not outputs.
    Running statistics of a batch norm in evaluation fix what they normalise, as its ε does in
    training; fold them into the layer before (torch.nn.utils.fuse_conv_bn_eval) to free it.

    Raises ValueError for a model on the meta device, which cannot run, for ScriptModules, and where
    there are no floating outputs, or where they are hidden in objects that torch.utils._pytree does
    not know.
    """
    model = unwrapped(model)
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise ValueError("the model is a ScriptModule or has one: take the module it was made from")
    parameters = {name: p for name, p in model.named_parameters() if is_floating(p)}
    if any(p.is_meta for p in parameters.values()):
        raise ValueError("the model has meta tensors: its symmetries are found by running it")
    trace = Trace(parameters)
    trace.watch(model, keep or (lambda output: output), inputs, kwargs)
    return Symmetry(groups_of(trace, trace.parameters), trace.ended)


class Symmetry(list):
    """A list of Groups, which print shows as a table.

    ended: what ended symmetries, such as "gelu after h.0.mlp.c_fc": an operation, and the module
    whose parameters made the units that it fixed.
    """

    def __init__(self, groups=(), ended=()):
        super().__init__(groups)
        self.ended = list(ended)

    def __str__(self):
        rows = [("group", "count", "made by", "read by")]
        for group in self:
            kind = f"GL({group.size})" if group.kind == LINEAR else group.kind
            rows.append((kind, str(group.count), listed(group, 1), listed(group, -1)))
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        units = sum(group.count * group.size for group in self)
        return "\n".join([*lines, f"{units:,} units in {len(self)} groups"])


def listed(group, sign, most=3):
    """Return the axes of a group that make its units (sign 1), or read them (-1), as text."""
    axes = [axis for axis in group.axes if axis.power * sign > 0]
    powers = [f"^{axis.power:g}" if abs(axis.power) != 1 else "" for axis in axes[:most]]
    texts = [f"{axis.name}[{axis.dim}]{power}" for axis, power in zip(axes, powers)]
    return ", ".join(texts + [f"and {len(axes) - most} more"] * (len(axes) > most))


class Trace(Names, TorchDispatchMode):
    """Watches operations, and keeps the state of every floating tensor beside it."""

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # it would import the compiler, which takes seconds

    def __init__(self, parameters):
        Names.__init__(self)
        TorchDispatchMode.__init__(self)
        self.states = WeakTensorKeyDictionary()
        self.memory = defaultdict(list)  # for each storage the tensors seen on it
        self.originals = WeakTensorKeyDictionary()  # values of parameters that were written
        self.escaped = []  # tensors that stand for what Python and NumPy keep
        self.retyped = []  # views of another type, which show what is written behind them
        self.parameters = []
        for name, value in parameters.items():
            parameter = Parameter(name, len(self.parameters), value.shape)
            self.parameters.append(parameter)
            for other in self.sharing(value):
                if overlap(value, other):  # tied by .data: who moves one moves the other
                    parameter.named_axes = self.states[other].parameter.named_axes = []
            coordinates = [place(value, [d]).expand(value.shape) for d in range(value.dim())]
            self.remember(value, View(parameter, coordinates, fixed(value).history))

    def watch(self, model, keep, inputs, kwargs):
        """Run a model under this mode, and fix keep(its output)."""
        registered = [(d, d.copy()) for m in model.modules() for d in (m._parameters, m._buffers)]
        leaves = tree_leaves((list(model.buffers()), inputs, kwargs))
        tensors = [t for t in leaves if isinstance(t, Tensor) and t.layout == torch.strided]
        copies = [(t, t.clone()) for t in tensors]
        devices = {p.device for p in model.parameters() if p.is_cuda}
        compiled = "torch._dynamo" in sys.modules
        eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
        fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # one operation for a whole layer
        try:
            exact = sdpa_kernel(SDPBackend.MATH)  # attention by products that can be seen
            with torch.no_grad(), torch.random.fork_rng(devices), eager, exact, self, Escapes(self):
                outputs = floating(keep(model(*inputs, **kwargs)))
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            for now, before in registered:
                now.clear()
                now.update(before)
            with torch.no_grad():
                for t, copy in [*copies, *self.originals.items()]:
                    if not torch.equal(t, copy):
                        t.copy_(copy)
        if not outputs:
            raise ValueError("the model has no floating outputs: name them by keep=")
        self.operation, self.known = "output", len(self.owner)
        for value in outputs:
            self.fix(self.state(value))

    # Tensors and their states: of those on one memory either all are known, or all are fixed

    def sharing(self, value):
        """Return the other tensors seen so far that share their memory with `value`."""
        refs = self.memory[value.untyped_storage()._cdata]
        refs[:] = [ref for ref in refs if ref() is not None]
        return [t for ref in refs if (t := ref()) is not value]

    def state(self, value):
        """Return what is known of a tensor; numbers, integers and None are fixed, []."""
        if not is_floating(value):
            return []
        if value not in self.states:  # an input, a buffer, or .data, which no operation shows
            self.remember(value, [])
        return self.states[value]

    def factors(self, value):
        return self.named(self.state(value))

    def remember(self, value, state):
        """Keep the state of a tensor that is new."""
        others = self.sharing(value)
        self.memory[value.untyped_storage()._cdata].append(TensorWeakRef(value))
        self.states[value] = state if others else owned(value, state)
        if others and not state:
            self.unknown(value)

    def overwrite(self, value, new):
        """Change a tensor's state in place; those that share its memory follow, or are fixed."""
        old = self.state(value)
        if isinstance(old, View):
            self.fix(old)
        if not self.sharing(value):
            self.states[value] = owned(value, new)
            return
        for f, g in zip_longest(self.named(old), self.named(new), fillvalue=fixed(value)):
            self.mark_each_entry([f])
            before = overwritable(thin(f.names))
            names = self.tie(before, g.names)
            if (before == BLANK).any():
                f.history.copy_(torch.where(before == BLANK, g.history, f.history))
                f.names.copy_(names)

    def unknown(self, value):
        """Fix a tensor and those that share its memory: what is there may be anything."""
        for t in [value, *self.sharing(value)]:
            self.fix(self.state(t))
            self.states[t] = []

    def escape(self, value):
        """Fix a tensor for good: others read or write its memory unseen."""
        with _disable_current_modes():  # or else they watch what becomes of names, too
            self.unknown(value)
            self.escaped.append(value.detach())
            self.remember(self.escaped[-1], [])

    def preserve(self, written):
        """Copy the parameters that lie where an operation is going to write."""
        for value in filter(is_floating, written):
            for t in [value, *self.sharing(value)]:
                if isinstance(t, torch.nn.Parameter) and t not in self.originals:
                    self.originals[t] = t.clone()

    def rule_for(self, function, out, written):
        """Note the operation that has just run, and return its rule, or None."""
        library, operation = function._schema.name.split("::")
        self.operation = operation.rstrip("_")
        self.function, self.step, self.known = function, self.step + 1, len(self.owner)
        rule, is_in_place = RULES.get(self.operation), operation.endswith("_")
        if library != "aten" or (torch.Tag.inplace_view in function.tags and rule is not restride):
            return None  # it may be anything, or it changes shapes
        if (written and not is_in_place) or any(map(is_foreign, tree_leaves(out))):
            return None
        retyped = {view.untyped_storage()._cdata for view in self.retyped}
        if retyped and any(t.untyped_storage()._cdata in retyped for t in written):
            return None
        return rule

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # then operations made of others come as one
            with self:
                out = function.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        written = written_by(function._schema, args, kwargs)
        self.preserve(written)
        self.layout = (args[0].shape, args[0].stride()) if args and is_floating(args[0]) else None
        out = function(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if is_floating(t)]
        states, new = [self.state(t) for t in tensors], []
        rule = self.rule_for(function, out, written)
        if any(states) or rule is constant:
            new = rule(self, out, *args, **kwargs) if rule else None
            if new is None:
                for state in states:
                    self.fix(state)
        new = new if isinstance(new, tuple) else (new or [],)
        for value in filter(is_floating, written):
            if rule:
                self.overwrite(value, new[0])
            else:
                self.unknown(value)
        for value, state in zip_longest(tree_leaves(out), new, fillvalue=[]):
            if is_floating(value) and not any(value is t for t in tensors):
                self.remember(value, state)
        if function.is_view and isinstance(out, Tensor) and out.dtype != args[0].dtype:
            self.retyped.append(out)
        return out


def written_by(schema, args, kwargs):
    """Return the tensors that an operation writes, alone or in a list."""
    arguments = dict(zip([about.name for about in schema.arguments], args)) | kwargs
    written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    return [t for t in tree_leaves([arguments.get(a) for a in written]) if isinstance(t, Tensor)]


WAYS_OUT = Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__, Tensor.__float__
WAYS_OUT += Tensor.data_ptr, Tensor.untyped_storage, Tensor.__deepcopy__, Tensor.data.__set__
WAYS_OUT += Tensor.apply_, Tensor.map_, Tensor.map2_
FROM_LISTS = torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor, Tensor.new
FROM_LISTS += (torch.sparse_coo_tensor,)


class Escapes(TorchFunctionMode):
    """Sees the ways out of torch: what Python or NumPy get, and may write, is fixed for good."""

    def __init__(self, trace):
        super().__init__()
        self.trace = trace

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = args if function in WAYS_OUT else ()
        if function in FROM_LISTS:  # which reads the tensors in lists as numbers
            out = [x for x in (*args, *(kwargs or {}).values()) if not isinstance(x, Tensor)]
        for value in filter(is_floating, tree_leaves(out)):
            self.trace.operation = function.__name__
            self.trace.escape(value)
        return function(*args, **(kwargs or {}))


def is_foreign(x):
    """Return whether x is a tensor beside which names cannot stand, though it may follow scales."""
    return isinstance(x, Tensor) and (x.is_complex() or x.layout != torch.strided)


def overlap(a, b):
    """Return whether two tensors that lie densely in memory have some of it in common."""
    start, other = a.data_ptr(), b.data_ptr()
    return start < other + b.nbytes and other < start + a.nbytes


def owned(value, state):
    """Return a state with blank names in a memory of their own that lie there as the values do.

    So what is written into the values through a view can be written into the names, too.
    """
    if isinstance(state, View) or not any(
        (overwritable(thin(f.names)) == BLANK).any() for f in state
    ):
        return state
    return [
        Factor(*(torch.empty_like(value, dtype=torch.int64).copy_(t) for t in f)) for f in state
    ]
