"""How the modules lie: which may import which, and that tensors follow their arguments' device."""

import ast
from types import SimpleNamespace

from experiment.files import ROOT

import pytest
import torch
from torch.overrides import TorchFunctionMode

import teleportation
from models import MLP, LeakyReLU, evaluate, init_weights, train_epoch, train_epoch_sgd
from teleportation import (
    INVERSE_ACTIVATION,
    RESCALING,
    act,
    curvature,
    curvature_along,
    curve_derivatives,
    estimate,
    gradient_norm_squared,
    level_set_ascent,
    random_directions,
    random_group_elements,
    sharpness,
    teleport,
    teleport_curvature,
    teleport_sharpness,
)

SCRIPTS = {"correlation", "displacement_integration", "multi_layer_regression", "init_directory"}
SCRIPTS |= {"teleport_cnn", "teleport_optimization", "teleport_sharpness_curvature"}
MAY_IMPORT = {  # of our own modules; a script may import all but scripts
    "experiment": {"experiment"},
    "models": set(),
    "data": {"experiment"},
    "teleportation": {"models"},
    "module_symmetry": {"teleportation"},
    "lstm": set(),
    "regression": {"lstm", "models", "teleportation"},
}


def modules():
    """Return {path: name of its module or package} of the code outside tests."""
    folders = ("*.py", "experiment/*.py", "learn-to-teleport/*.py")
    paths = [path for folder in folders for path in ROOT.glob(folder)]
    return {p: "experiment" if p.parent.name == "experiment" else p.stem for p in paths}


def imported(path):
    """Return the names of the modules and packages that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            relative = "experiment" if node.level else ""
            found.add(relative or node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_point_one_way(path):
    names = modules()
    allowed = MAY_IMPORT.get(names[path], set(names.values()) - SCRIPTS)
    assert imported(path) & set(names.values()) <= allowed


def test_every_module_has_its_place():
    placed = SCRIPTS | MAY_IMPORT.keys()
    assert set(modules().values()) == placed, "put a script into SCRIPTS, a module into MAY_IMPORT"


WIDTHS = (12, 6, 5, 4)


class OneDevice(TorchFunctionMode):
    """Raises where a function gets tensors on two devices; numbers (no dimensions) may be on any.

    The meta device itself, which has shapes and no values, lets a matrix product pass.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        tensors = [a for arg in args for a in (arg if isinstance(arg, list | tuple) else [arg])]
        tensors = [a for a in tensors if isinstance(a, torch.Tensor) and a.dim()]
        if len({a.device for a in tensors}) > 1 and function is not torch.Tensor.to:
            raise RuntimeError(f"{function} got tensors on two devices")
        return function(*args, **kwargs or {})


@pytest.fixture
def small(monkeypatch):
    """Two networks and a batch on the meta device, in OneDevice.

    Tensors there have no values, so what looks at values is replaced.
    """
    monkeypatch.setattr(teleportation, "pseudoinverse", lambda h: h.mT + 0)
    weights = [w.to("meta") for w in init_weights(WIDTHS, [1, 2])]
    x, y = torch.rand(WIDTHS[0], 40, device="meta"), torch.randint(4, (40,), device="meta")
    with OneDevice():
        yield SimpleNamespace(weights=weights, x=x, y=y, activation=LeakyReLU())


def test_a_tensor_of_another_device_raises(small):
    with pytest.raises(RuntimeError):
        small.weights[0] @ torch.rand(WIDTHS[0], 40)
    with pytest.raises(RuntimeError):
        small.weights[0] + torch.rand(6, 12)


def test_training_and_evaluation_stay_on_their_device(small):
    images, labels = small.x.T, small.y
    loss = train_epoch_sgd(small.weights, images, labels, 0.1, small.activation, check=False)
    model = MLP(small.weights, small.activation)
    optimizer = torch.optim.Adam(model.parameters())
    results = loss, train_epoch(model, images, labels, optimizer, check=False)
    results += evaluate(small.weights, images, labels, small.activation)
    assert [(r.device.type, r.shape) for r in results] == [("meta", (2,))] * 4


def test_estimators_stay_on_their_device(small):
    M = torch.rand(5, 5, device="meta")
    generators = [torch.rand(6, 6, device="meta"), M]
    directions = random_directions(WIDTHS, [0.1, 0.2], torch.Generator())
    results = [
        *estimate(small.weights, small.x, small.y, [0.1, 0.2], 0, small.activation),
        gradient_norm_squared(small.weights, small.x, small.y, small.activation),
        sharpness(
            small.weights, small.x, small.y, [d.to("meta") for d in directions], small.activation
        ),
        *curvature_along(small.weights, small.x, M, 1, small.activation),
        curvature(*curve_derivatives(small.weights, small.x, generators, small.activation, True)),
    ]
    assert [(r.device.type, r.shape) for r in results] == [("meta", (2,))] * 9


def test_teleports_stay_on_their_device(small):
    batch = small.weights, small.x, small.y
    M = torch.rand(5, 5, device="meta")
    weights, path = teleport(*batch, 1e-2, 2, small.activation, return_path=True)
    elements = random_group_elements(path["group_elements"], torch.Generator())
    for new in (
        weights,
        act(small.weights, small.x, elements, small.activation),
        teleport_sharpness(*batch, 1e-2, 2, [0.1, 0.2], 3, 0, small.activation),
        teleport_curvature(small.weights, small.x, 1e-2, [M], small.activation)[0],
        teleport(*batch, 1e-2, 2, small.activation, action=RESCALING),
        teleport(*batch, 1e-2, 2, small.activation, action=INVERSE_ACTIVATION),
        level_set_ascent(*batch, 1e-2, 2, small.activation)[0],
    ):
        for w, before in zip(new, small.weights):
            assert w.device.type == "meta" and w.shape == before.shape
