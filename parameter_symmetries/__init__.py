"""Symmetries of a module's parameters, and teleports along them.

symmetry = symmetry_of(model, *inputs)  # or a list of Groups written by hand
check_symmetry(model, symmetry, *inputs)

loss.backward()
teleport_(model, symmetry, optimizer)
optimizer.step()
"""

from .check import check_symmetry
from .groups import (
    LINEAR,
    RESCALING,
    Axis,
    Group,
    act_on,
    check_groups,
    dual,
    outputs,
    random_elements,
)
from .moving import act_on_
from .objectives import gradient_norm, mean_perturbed_loss, teleport_to
from .rounding import equalize_, predicted_rise, round_weights, rounded_weights
from .teleport import teleport_
from .trace import symmetry_of

__all__ = [
    "LINEAR",
    "RESCALING",
    "Axis",
    "Group",
    "act_on",
    "act_on_",
    "check_groups",
    "check_symmetry",
    "dual",
    "equalize_",
    "gradient_norm",
    "mean_perturbed_loss",
    "outputs",
    "predicted_rise",
    "random_elements",
    "round_weights",
    "rounded_weights",
    "symmetry_of",
    "teleport_",
    "teleport_to",
]
