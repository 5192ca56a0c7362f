"""Whether a symmetry keeps the outputs of a model."""

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from .groups import act_on, check_groups, floating, outputs, random_elements, unwrapped


@torch.no_grad()
def check_symmetry(model, symmetry, *inputs, keep=None, **kwargs):
    """Return how far random elements of a symmetry change model(*inputs, **kwargs), relatively.

    Raises ValueError if that is more than rounding does, and says which group changes it by how
    much, and where the outputs have nan. The outputs are computed in double precision, whatever the
    model's type; where the model has no kernels for it, or casts to another type inside, the bound
    is that type's. keep(output) returns those of the outputs that should stay; by default all
    floating ones.
    """
    model = unwrapped(model)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    check_groups(dict(model.named_parameters()), symmetry)
    elements = random_elements(symmetry, 0.5, torch.Generator().manual_seed(0))

    def run(precision, *chosen):
        state, args, options = tree_map(lambda x: copied(x, precision), (tensors, inputs, kwargs))
        state = act_on(state, [symmetry[k] for k in chosen], [elements[k] for k in chosen])
        out = outputs(model, state, *args, **options)
        return floating(keep(out) if keep else out)

    precision = torch.float64
    with Rounding() as rounding:
        try:
            reference = run(precision)
        except RuntimeError:  # there is no kernel for double precision
            precision = torch.float32
            reference = run(precision)
    if not reference:
        raise ValueError("the model has no floating outputs: name them by keep=")
    if any(out.isnan().any() for out in reference):
        raise ValueError("the outputs have nan before anything moves")
    bound = max(rounding.eps, torch.finfo(precision).eps) ** 0.6
    everyone = range(len(symmetry))
    changed = relative_change(run(precision, *everyone), reference)
    if not changed <= bound:
        alone = [relative_change(run(precision, k), reference) for k in everyone]
        raise ValueError(what_changes(symmetry, alone, changed, bound))
    return changed


def copied(leaf, precision):
    """Return a copy of a tensor, which a model may write to, in a precision if it is floating."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return leaf.detach().to(precision if leaf.is_floating_point() else leaf.dtype, copy=True)


def what_changes(symmetry, alone, together, bound):
    """Return in words which group changes the outputs most, or that all do so together."""
    k = alone.index(max(alone))
    names = list(dict.fromkeys(axis.name for axis in symmetry[k].axes))
    names = ", ".join(names[:4] + ["…"] * (len(names) > 4))
    subject, change = f"group {k} ({names}) is no symmetry of the model: it changes", alone[k]
    if alone[k] <= bound:
        subject, change = "each group is a symmetry, but together they change", together
    change = f"{change:.1e} of the largest"
    return f"{subject} the outputs by {change}, where rounding may by {bound:.0e}"


class Rounding(TorchDispatchMode):
    """Records in `eps` the coarsest floating type to which double precision is cast."""

    eps = torch.finfo(torch.float64).eps

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if any(leaf.dtype == torch.float64 for leaf in floating(args)):
            self.eps = max([self.eps] + [torch.finfo(leaf.dtype).eps for leaf in floating(out)])
        return out


def relative_change(new, reference):
    """Return how far tensors are from others, relative to the largest entry of each; nan is inf."""
    changes = []
    for after, before in zip(new, reference):
        difference = torch.where(after == before, 0.0, after - before).abs().nan_to_num(math.inf)
        largest = before.abs().nan_to_num(0.0, 0.0).max().clamp(min=torch.finfo(before.dtype).tiny)
        changes.append(float(difference.max() / largest))
    return max(changes)
