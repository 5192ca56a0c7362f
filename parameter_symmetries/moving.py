"""What moves along with a model's weights: all that lives in their coordinates."""

from collections import defaultdict
from contextlib import contextmanager

import torch

from .groups import broadcast, unwrapped
from .stacks import acted, matrices, plan_of, stacks_of, swapped

# Powers of the gradient, or where negative of the weights, that optimizers keep for each parameter
POWERS = {"momentum_buffer": 1, "exp_avg": 1, "grad_avg": 1, "ax": -1, "acc_delta": -2}
POWERS |= {"exp_avg_sq": 2, "max_exp_avg_sq": 2, "square_avg": 2, "sum": 2}
SMALL = 2**16  # entries of a tensor below which it is faster to move a copy of many in one stack


@torch.no_grad()
def act_on_(model, symmetry, elements, optimizer=None, *, also=()):
    """Act on a model in place by g [count, size, size] for each group.

    What moves along, and the errors, are those of `teleport_`.
    """
    model = unwrapped(model)
    copies = copies_of(model, also)
    plan = plan_of(model, copies[0], symmetry)
    moving = moving_tensors(plan, copies, optimizer)
    with full_precision(plan):
        move(plan, stacks_of(symmetry, elements, plan), moving)


def copies_of(model, also):
    """Return [{name: tensor}]: the parameters, and what has the same coordinates."""
    parameters = dict(model.named_parameters())
    copies = [parameters]
    for tensors in map(list, also):
        if [t.shape for t in tensors] != [p.shape for p in parameters.values()]:
            raise ValueError(
                "also= needs tensors with the shapes of all parameters, in their order"
            )
        copies.append(dict(zip(parameters, tensors)))
    return copies


def moving_tensors(plan, copies, optimizer):
    """Return {name: [(power, tensor)]} of all that moves, with the powers of POWERS.

    Where weights are moved by g, gradients are moved by g^{-T}, hence so are means of them. Means
    of their squares are moved by the squares of its entries: that is exact under RESCALING, and
    under LINEAR if gradients of different units are uncorrelated. The momentum of RMSprop, of
    gradients over their roots, has no scale: it stays. Raises ValueError for state of other kinds,
    and for sparse gradients.
    """
    if optimizer is not None:
        check_optimizer(optimizer, [tensors[name] for tensors in copies for name in plan.names])
    moving = {}
    for name in plan.names:
        pairs = []
        for tensors in copies:
            tensor = tensors[name]
            pairs.append((-1, tensor))
            if tensor.grad is not None:
                if tensor.grad.layout != torch.strided:
                    raise ValueError(f"the gradient of {name} is sparse: groups move dense ones")
                pairs.append((1, tensor.grad))
            state = {} if optimizer is None else optimizer.state.get(tensor, {})
            for key, value in state.items():
                if not isinstance(value, torch.Tensor) or value.dim() == 0:
                    continue  # a count of steps
                if key not in POWERS or value.shape != tensor.shape:
                    raise no_rule(key, optimizer)
                if key != "momentum_buffer" or "square_avg" not in state:
                    pairs.append((POWERS[key], value))
        # a tensor that is named several times moves once
        moving[name] = list({id(tensor): (power, tensor) for power, tensor in pairs}.values())
    return moving


def check_optimizer(optimizer, moving):
    """Raise ValueError where an optimizer's state belongs to other parameters, or to several."""
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = [tensor for tensor in moving if tensor.grad is not None]
    if optimizer.state and trained and not any(id(tensor) in known for tensor in trained):
        raise ValueError("the optimizer has none of the parameters that move: were they replaced?")
    for p, state in optimizer.state.items():
        for key, value in state.items():
            # LBFGS keeps all parameters' state, flat, with the first
            is_tensor = isinstance(value, torch.Tensor) and value.numel() > 1
            if is_tensor and value.shape != p.shape:
                raise no_rule(key, optimizer)


def no_rule(key, optimizer):
    """Return the error for state that cannot be moved."""
    kind = f"{key!r} of {type(optimizer).__name__}"
    return ValueError(f"no rule moves {kind}: without optimizer= the state stays")


def move(plan, elements, moving):
    """Move tensors, {name: [(power, tensor)]}, in place."""
    dual = swapped(elements)
    for family in plan.families:
        alike = defaultdict(list)
        for k, name in enumerate(family.names):
            for power, tensor in moving[name]:
                alike[power, tensor.dtype, tensor.device].append((k, tensor))
        for (power, *_), pairs in alike.items():
            actions = []
            for action in family.actions:
                slots = action.slots.unbind()
                slots = torch.stack([slots[k] for k, _ in pairs])
                actions.append(action._replace(slots=slots))
            tensors = [tensor for _, tensor in pairs]
            move_alike(tensors, actions, elements if power < 0 else dual, abs(power) == 2)


def move_alike(tensors, actions, elements, square):
    """Act in place on tensors of one shape, by elements or by the squares of their entries."""
    if any(action.size > 1 for action in actions) or tensors[0].numel() < SMALL:
        X = torch.stack(tensors) if len(tensors) > 1 else tensors[0][None]
        torch._foreach_copy_(tensors, list(acted(X, actions, elements, square)))
    else:
        for action in actions:
            g = matrices(action, elements, square).to(tensors[0].device)
            factors = broadcast(g, (len(tensors), *tensors[0].shape), action.dims)
            torch._foreach_mul_(tensors, list(factors))


@contextmanager
def full_precision(plan):
    """Let products of single-precision matrices be that: training may have chosen less."""
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(plan.like.device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(chosen)
