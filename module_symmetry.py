"""Teleport any torch module along symmetries that keep its outputs.

A symmetry is data: a list of groups, each with the axes of the parameters that it acts on. V are
the parameters that make the hidden units, V' = gV; U are those that read them, U' = U g^{-1}:

    Group(RESCALING, 16, V=[Axis("0.weight", 0), Axis("0.bias", 0)], U=[Axis("2.weight", 1)])

`symmetry_of` derives the groups of nn.Sequential, nn.MultiheadAttention and transformer layers;
others are written by hand. `teleport_module` moves a model and its optimizer's state. Parameters
are dictionaries {name: tensor}, with the names of model.named_parameters().
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from teleportation import INF, LINEAR, RESCALING, Action


class Axis(NamedTuple):
    """Where a group acts on a parameter: on the entries `start` to `stop` of the axis `dim`.

    Under RESCALING a unit may have several entries, which follow one another, such as a channel's
    pixels after nn.Flatten.
    """

    name: str
    dim: int
    start: int = 0
    stop: int | None = None


class Group(NamedTuple):
    """A group that acts on heads × size hidden units; every head has a g of its own.

    RESCALING, by positive numbers, is a symmetry where what lies between V and U is positively
    homogeneous unit by unit: σ(cz) = c σ(z) for c > 0. LINEAR, GL(size), is one where nothing does.
    """

    action: Action
    size: int
    V: list[Axis]
    U: list[Axis]
    heads: int = 1


MADE = ("weight", 0), ("bias", 0)  # the axes of a layer's hidden units
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
HOMOGENEOUS = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Dropout, nn.Dropout2d, nn.Flatten)
HOMOGENEOUS += (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool2d)
HOMOGENEOUS += (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool2d)


def axes(module, prefix, *entries):
    """Return the axes of those of a module's parameters (name, dim, …) that it has."""
    names = {name for name, _ in module.named_parameters()}
    return [Axis(prefix + name, *rest) for name, *rest in entries if name in names]


def groups_of_sequence(layers):
    """Return the groups between the layers [(prefix, module)] of a feed-forward network."""
    groups, V, size, action, spatial = [], [], 0, None, True
    for prefix, layer in layers:
        if isinstance(layer, (nn.Linear, *CONVOLUTIONS)) and getattr(layer, "groups", 1) == 1:
            fan_in = layer.weight.shape[1]
            if V and (fan_in == size or spatial and fan_in % size == 0):
                groups.append(Group(action, size, V, axes(layer, prefix, ("weight", 1))))
            V, size = axes(layer, prefix, *MADE), len(layer.weight)
            spatial = not isinstance(layer, nn.Linear)  # after nn.Flatten a unit has its pixels
            action = RESCALING if spatial else LINEAR
        elif isinstance(layer, BATCH_NORMS):  # normalises away what is before it
            V, size, action = axes(layer, prefix, *MADE), layer.num_features, RESCALING
        elif isinstance(layer, HOMOGENEOUS):
            action = RESCALING
        elif not isinstance(layer, nn.Identity):
            V = []
    return groups


def groups_of_attention(attention, prefix):
    """Return the groups of nn.MultiheadAttention: queries with keys, values with the output."""
    E, H = attention.embed_dim, attention.num_heads
    made = []
    for part, name in enumerate("qkv"):
        rows = 0, part * E, (part + 1) * E
        entries = ("in_proj_weight", *rows), (f"{name}_proj_weight", 0)
        entries += ("in_proj_bias", *rows), (f"bias_{name}", 2)
        made.append(axes(attention, prefix, *entries))
    queries, keys, values = made
    output = axes(attention, prefix, ("out_proj.weight", 1))
    return [Group(LINEAR, E // H, queries, keys, H), Group(LINEAR, E // H, values, output, H)]


def flattened(model, prefix=""):
    """Return [(prefix, module)] of the layers of an nn.Sequential, those of inner ones included."""
    layers = []
    for name, layer in model._modules.items():  # named_children leaves out those that occur again
        inner = f"{prefix}{name}."
        is_sequence = isinstance(layer, nn.Sequential)
        layers += flattened(layer, inner) if is_sequence else [(inner, layer)]
    return layers


def symmetry_of(model):
    """Return the groups of a model's nn.Sequential, nn.MultiheadAttention and transformer layers.

    Other parts have none here. A part that shares its parameters, or whose hidden units are read
    from elsewhere, has fewer symmetries than its type says: teleporting then raises.
    """
    symmetry, inside = [], set()
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, nn.Sequential):
            if module not in inside:
                symmetry += groups_of_sequence(flattened(module, prefix))
            inside.update(module.children())
        elif isinstance(module, nn.MultiheadAttention):
            symmetry += groups_of_attention(module, prefix)
        elif isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            relu = module.activation is nn.functional.relu
            between = nn.ReLU() if relu else module.activation
            named = [("linear1.", module.linear1), ("", between), ("linear2.", module.linear2)]
            symmetry += groups_of_sequence([(prefix + inner, layer) for inner, layer in named])
    return symmetry


def matrix_of(parameters, axis, group):
    """Return what a group sees of a parameter, [heads, size, rest]."""
    entries = parameters[axis.name].movedim(axis.dim, 0)[axis.start : axis.stop]
    return entries.unflatten(0, (group.heads, group.size, -1)).flatten(2)


def with_matrix(parameter, axis, matrix):
    """Return a parameter with the entries of `matrix` where `matrix_of` found its own."""
    moved = parameter.movedim(axis.dim, 0)
    entries = matrix.reshape(moved[axis.start : axis.stop].shape)
    return torch.slice_scatter(moved, entries, 0, axis.start, axis.stop).movedim(0, axis.dim)


def act_on(parameters, symmetry, elements):
    """Return the parameters acted on by g: [heads, size, size] for each group."""
    parameters = dict(parameters)
    for group, g in zip(symmetry, elements):
        V, U = ([matrix_of(parameters, axis, group) for axis in a] for a in (group.V, group.U))
        new_U, new_V = group.action.act(torch.cat(U, -1).mT, torch.cat(V, -1), None, g, None)
        for axes_moved, old, new in ((group.V, V, new_V), (group.U, U, new_U.mT)):
            for axis, matrix in zip(axes_moved, new.split([m.shape[-1] for m in old], -1)):
                parameters[axis.name] = with_matrix(parameters[axis.name], axis, matrix)
    return parameters


def check_axes(parameters, symmetry):
    """Raise ValueError where a symmetry does not fit the parameters, or names an axis twice."""
    taken = []
    for k, group in enumerate(symmetry):
        units = group.heads * group.size
        if not (group.V and group.U):
            raise ValueError(f"group {k} needs axes in V and in U")
        for name, dim, start, stop in [*group.V, *group.U]:
            if name not in parameters:
                raise ValueError(f"group {k} names {name!r}, which is not a parameter, or shared")
            shape = list(parameters[name].shape)
            if not -len(shape) <= dim < len(shape):
                raise ValueError(f"{name} {shape} has no axis {dim}")
            dim %= len(shape)
            entries = range(shape[dim])[start:stop]
            each, rest = divmod(len(entries), units)
            if rest or each < 1 or (each > 1 and group.action is LINEAR):
                found = f"axis {dim} of {name} {shape} has {len(entries)} entries"
                raise ValueError(f"{found} for the {units} units of group {k}")
            if any((name, dim) == where and set(entries) & set(e) for where, e in taken):
                raise ValueError(f"axis {dim} of {name} is named twice")
            taken.append(((name, dim), entries))


def outputs(model, parameters, inputs):
    """Return model(*inputs) at other parameters; inputs: a tensor or a tuple.

    Of a tuple of outputs the first counts. Buffers and the random state stay as they are: dropout
    takes the masks of seed 0. Attention takes the kernel that has second derivatives.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.random.fork_rng(range(torch.cuda.device_count())), sdpa_kernel(SDPBackend.MATH):
        torch.manual_seed(0)
        found = functional_call(model, {**parameters, **buffers}, inputs)
    return found[0] if isinstance(found, tuple) else found


def change(model, parameters, inputs, reference):
    """Return by how much outputs differ from `reference`, relative to its largest, and a bound.

    The bound is what rounding may do: eps^0.6 is 4e-10 in double, 7e-5 in single precision.
    """
    difference = (outputs(model, parameters, inputs) - reference).abs().max()
    info = torch.finfo(reference.dtype)
    return float(difference / reference.abs().max().clamp(min=info.tiny)), info.eps**0.6


def random_elements(symmetry, lengths, generator):
    """Draw g = exp(T) for each group, [heads, size, size], with random T_m of the norms |T_m|_F.

    lengths: a number or a tensor [heads] for each group.
    """
    elements = []
    for group, length in zip(symmetry, lengths):
        T = torch.randn(group.heads, group.size, group.size, generator=generator)
        T = group.action.project(T)
        scale = torch.as_tensor(length) / T.norm(dim=(-2, -1))
        elements.append(group.action.element(scale[..., None, None] * T))
    return elements


def check_symmetry(model, symmetry, inputs):
    """Return model(*inputs); raise ValueError where random elements of a group change it."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    if not symmetry:
        raise ValueError(
            "the symmetry has no groups: symmetry_of knows attention, transformer layers, and "
            "sequences of linear, convolution, batch-norm and positively homogeneous layers"
        )
    check_axes(parameters, symmetry)
    reference = outputs(model, parameters, inputs)
    elements = random_elements(symmetry, [0.5] * len(symmetry), torch.Generator().manual_seed(0))
    elements = [g.to(reference) for g in elements]
    changed, bound = change(model, act_on(parameters, symmetry, elements), inputs, reference)
    if not changed <= bound:
        alone = [act_on(parameters, [group], [g]) for group, g in zip(symmetry, elements)]
        alone = [change(model, moved, inputs, reference)[0] for moved in alone]
        k = alone.index(max(alone))
        names = ", ".join(axis.name for axis in [*symmetry[k].V, *symmetry[k].U])
        raise ValueError(
            f"group {k} ({names}) is not a symmetry of the model: it changes the outputs by "
            f"{alone[k]:.1e} of the largest. The model is as it was."
        )
    return reference


def gradient_norm(model, loss, inputs, targets):
    """Return |∇L|² as an objective, a function of the parameters, over those that are trained.

    loss(outputs, targets) returns a number, as nn.CrossEntropyLoss does.
    """
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise ValueError("no parameter of the model requires a gradient")

    def objective(parameters):
        def loss_of(part):
            return loss(outputs(model, {**parameters, **part}, inputs), targets)

        gradient = torch.func.grad(loss_of)({name: parameters[name] for name in trained})
        return sum((g**2).sum() for g in gradient.values())

    return objective


def mean_perturbed_loss(model, loss, inputs, targets, radii, seed=0):
    """Return the objective φ (Eq. 4) of the parameters, one direction on the sphere per radius.

    Every evaluation takes the same directions, those of `seed`, over all parameters.
    """

    def objective(parameters):
        generator, total = torch.Generator().manual_seed(seed), 0
        # one at a time: not every module can be stacked, and each is a whole forward pass
        for radius in radii:
            d = {n: torch.randn(p.shape, generator=generator).to(p) for n, p in parameters.items()}
            length = sum((part**2).sum() for part in d.values()).sqrt()
            moved = {name: p + radius / length * d[name] for name, p in parameters.items()}
            total = total + loss(outputs(model, moved, inputs), targets)
        return total / len(radii)

    return objective


def value_and_slopes(objective, parameters, symmetry):
    """Return the objective and its gradient in T = 0 of each group, [heads, size, size]."""
    like = next(iter(parameters.values()))
    T = [like.new_zeros(g.heads, g.size, g.size, requires_grad=True) for g in symmetry]
    with torch.enable_grad():
        elements = [group.action.element(t) for group, t in zip(symmetry, T)]
        value = objective(act_on(parameters, symmetry, elements))
        slopes = torch.autograd.grad(value, T, materialize_grads=True)
    return value.detach(), [group.action.project(t) for group, t in zip(symmetry, slopes)]


@torch.no_grad()
def teleported(model, symmetry, objective, inputs, lr, steps, stop=INF, max_norm=INF):
    """Return the parameters after gradient ascent on T, and the path; the model stays as it is.

    objective(parameters) returns the number that is to grow; lr < 0 descends. Each step starts from
    T = 0, acts with exp(T), and is cut where |T|_F of a head is above `max_norm`; the ascent ends
    after `steps` steps, or where the objective is above `stop`. The path has `objective` [steps
    taken + 1], and `group_elements`, for each group the product of the steps' [heads, size, size].

    inputs: a batch, as the model takes it, on which the outputs are compared. Raises ValueError
    where the symmetry does not fit the model, where it changes the outputs by more than rounding
    does, and where the objective is not finite.
    """
    reference = check_symmetry(model, symmetry, inputs)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    total = [torch.eye(group.size).expand(group.heads, -1, -1).to(reference) for group in symmetry]
    path = []
    for step in range(steps + 1):
        value, slopes = value_and_slopes(objective, parameters, symmetry)
        if not value.isfinite():
            raise ValueError(f"the objective is {value} after {step} steps: take a smaller lr")
        path.append(value)
        if step == steps or value > stop:
            break
        T = [lr * t for t in slopes]
        T = [t * (max_norm / t.norm(dim=(-2, -1), keepdim=True)).clamp(max=1) for t in T]
        elements = [group.action.element(t) for group, t in zip(symmetry, T)]
        parameters = act_on(parameters, symmetry, elements)
        total = [g @ before for g, before in zip(elements, total)]
    changed, bound = change(model, parameters, inputs, reference)
    if not changed <= bound:
        raise ValueError(
            f"rounding changed the outputs by {changed:.1e} of the largest: take fewer or smaller "
            "steps. The model is as it was."
        )
    return parameters, {"objective": torch.stack(path), "group_elements": total}


# powers of the gradient in what optimizers keep for each parameter
POWERS = {"momentum_buffer": 1, "exp_avg": 1, "grad_avg": 1}
POWERS |= {"exp_avg_sq": 2, "max_exp_avg_sq": 2, "square_avg": 2, "sum": 2}


def moved_state(optimizer, model, symmetry, elements):
    """Return [(tensor, its new value)] of an optimizer's state that moves along with a teleport.

    A gradient is acted on by g^{-T} where weights are by g, hence so is a mean of past gradients.
    A mean of squares is acted on by the squares under RESCALING; under LINEAR, which mixes units,
    squares have no image and stay. RMSprop's momentum, of gradients over their roots, stays too.
    Raises ValueError for state of another kind.
    """
    names = dict(model.named_parameters())
    states = {name: optimizer.state.get(p, {}) for name, p in names.items()}
    found = {key for n, s in states.items() for key, v in s.items() if is_like(v, names[n])}
    if unknown := sorted(found - POWERS.keys()):
        raise ValueError(f"no rule moves an optimizer's {unknown}: pass state='kept' or 'reset'")
    if isinstance(optimizer, torch.optim.RMSprop):
        found -= {"momentum_buffer"}
    moved = []
    for key in found:
        old = {n: states[n].get(key, torch.zeros_like(p)) for n, p in names.items()}
        power = POWERS[key]
        pairs = [(s, g) for s, g in zip(symmetry, elements) if power == 1 or s.action is RESCALING]
        dual = [torch.linalg.inv(g).mT ** power for _, g in pairs]
        new = act_on(old, [group for group, _ in pairs], dual)
        moved += [(s[key], new[name]) for name, s in states.items() if key in s]
    return moved


def is_like(value, parameter):
    """Return whether a value of an optimizer's state has an entry for each of a parameter's."""
    return isinstance(value, torch.Tensor) and value.shape == parameter.shape and value.dim() > 0


@torch.no_grad()
def move(model, symmetry, parameters, elements, optimizer=None, state="moved"):
    """Set a model's parameters, those of `act_on` with `elements`, and its optimizer's state.

    state: `moved` moves it along, so that momentum goes on in the direction in which the loss fell;
    `kept` leaves it as it is, as if nothing had happened; `reset` empties it, as a new optimizer's.
    Raises ValueError, before anything is changed, for another name or a state that cannot move.
    """
    if state not in ("moved", "kept", "reset"):
        raise ValueError(f"state must be 'moved', 'kept' or 'reset', not {state!r}")
    changes = [(p, parameters[name]) for name, p in model.named_parameters()]
    if optimizer is not None and state == "moved":
        changes += moved_state(optimizer, model, symmetry, elements)
    for old, new in changes:
        old.copy_(new)
    if optimizer is not None and state == "reset":
        optimizer.state.clear()


def teleport_module(
    model, symmetry, objective, inputs, lr, steps, optimizer=None, state="moved", **limits
):
    """Teleport a model in place, its optimizer's state with it; return the path.

    The arguments and errors are those of `teleported` (`stop`, `max_norm`) and `move`. Where one is
    raised, the model and the optimizer are as they were.
    """
    parameters, path = teleported(model, symmetry, objective, inputs, lr, steps, **limits)
    move(model, symmetry, parameters, path["group_elements"], optimizer, state)
    return path
