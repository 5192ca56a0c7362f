"""What a user hands over is checked where it comes in, by the core and by every script."""

import importlib

import pytest
import torch

import models
import teleportation
from experiment.results import ROOT
from models import MLP, LeakyReLU, check_batch, init_weights
from teleportation import random_directions

WIDTHS, N, ACTIVATION = (6, 5, 4, 3), 40, LeakyReLU()


# The core


def good_batch():
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(WIDTHS[0], N, generator=rng)
    return init_weights(WIDTHS, 1), x, torch.randint(3, (N,), generator=rng)


BAD_BATCHES = {
    "too few labels": (lambda w, x, y: (w, x, y[:7]), r"y must be int64 \[40\] .* \[7\]"),
    "labels of another type": (lambda w, x, y: (w, x, y.int()), r"y must be int64 .*int32 \[40\]"),
    "a label too large": (lambda w, x, y: (w, x, y + 3), "labels must be 0 to 2, not 3 to 5"),
    "an empty batch": (lambda w, x, y: (w, x[:, :0], y[:0]), r"x must be \[6, n\] with n > 0"),
    "samples as rows": (lambda w, x, y: (w, x.T, y), r"x must be \[6, n\] .*not \[40, 6\]"),
    "images of another type": (lambda w, x, y: (w, x.double(), y), "must have one .*type"),
    "another device": (lambda w, x, y: (w, x.to("meta"), y), "on meta"),
    "no weights": (lambda w, x, y: ([], x, y), "weights must be"),
    "layers that do not fit": (lambda w, x, y: (w[::2], x, y), r"not \[\[5, 6\], \[3, 4\]\]"),
    "other runs in a layer": (lambda w, x, y: ([w[0][None], *w[1:]], x, y), "weights must be"),
    "whole numbers": (lambda w, x, y: ([v.long() for v in w], x.long(), y), "floating-point type"),
}


@pytest.mark.parametrize("bad", BAD_BATCHES)
def test_a_batch_that_does_not_fit_is_named(bad):
    spoil, words = BAD_BATCHES[bad]
    check_batch(*good_batch())
    with pytest.raises(ValueError, match=words):
        check_batch(*spoil(*good_batch()))


def calls(weights, x, y):
    """Return {public function: a call of it} on a network and a batch."""
    directions = random_directions(WIDTHS, [0.1, 0.2], torch.Generator())
    M, optimizer = torch.eye(4), torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    t, draws = teleportation, ([0.1], 2, 0, ACTIVATION)
    return {
        "cross_entropy": lambda: models.cross_entropy(weights, x, y, ACTIVATION),
        "evaluate": lambda: models.evaluate(weights, x.T, y, ACTIVATION),
        "train_epoch_sgd": lambda: models.train_epoch_sgd(weights, x.T, y, 0.1, ACTIVATION),
        "train_epoch": lambda: models.train_epoch(MLP(weights, ACTIVATION), x.T, y, optimizer),
        "gradient_norm_squared": lambda: t.gradient_norm_squared(weights, x, y, ACTIVATION),
        "sharpness": lambda: t.sharpness(weights, x, y, directions, ACTIVATION),
        "estimate": lambda: t.estimate(weights, x, y, [0.1], 0, ACTIVATION),
        "teleport": lambda: t.teleport(weights, x, y, 0.1, 1, ACTIVATION),
        "teleport_sharpness": lambda: t.teleport_sharpness(weights, x, y, 0.1, 1, *draws),
        "teleport_curvature": lambda: t.teleport_curvature(weights, x, 0.1, [M], ACTIVATION),
        "curvature_along": lambda: t.curvature_along(weights, x, M, 1, ACTIVATION),
        "curve_derivatives": lambda: t.curve_derivatives(weights, x, [torch.eye(5), M], ACTIVATION),
        "act": lambda: t.act(weights, x, [torch.eye(5), M], ACTIVATION),
    }


@pytest.mark.parametrize("name", calls(*good_batch()))
def test_every_function_takes_what_fits_and_refuses_what_does_not(name):
    calls(*good_batch())[name]()
    with pytest.raises(ValueError, match="must"):
        calls(*BAD_BATCHES["samples as rows"][0](*good_batch()))[name]()


@pytest.mark.parametrize("matrices", [[torch.eye(4)], [torch.eye(5), torch.eye(5)]])
def test_matrices_fit_their_pairs(matrices):
    weights, x, _ = good_batch()
    for function in (teleportation.curve_derivatives, teleportation.act):
        with pytest.raises(ValueError, match=r"square matrix: \[\[5, 5\], \[4, 4\]\], not"):
            function(weights, x, matrices, ACTIVATION)


@pytest.mark.parametrize("name", ["gradient_norm_squared", "sharpness", "teleport_sharpness"])
def test_results_that_are_not_finite_name_the_runs(name):
    weights, x, y = good_batch()
    weights = [torch.stack([w, w, w]) for w in weights]
    weights[-1][1, 0, 0] = torch.nan
    with pytest.warns(UserWarning, match=r"is not finite for the runs \[\[1\]\]"):
        calls(weights, x, y)[name]()


# The scripts

PATHS = [*ROOT.glob("*.py"), *ROOT.glob("studies/*.py"), *ROOT.glob("learn-to-teleport/*.py")]
SCRIPTS = [path.stem for path in PATHS if "run.run(main)" in path.read_text("utf-8")]
REQUIRED = {"teleports": ["--question", "when"]}
BAD_OPTIONS = [
    *((name, ["--frobnicate"], "unrecognized arguments: --frobnicate") for name in SCRIPTS),
    *((name, ["--plot-only"], "missing: run without --plot-only") for name in SCRIPTS),
    ("correlation", ["--dataset", "SVHN"], "invalid choice: 'SVHN'"),
    ("correlation", ["--runs", "3"], "'3' is not a whole number from 4 to 1,000,000"),
    ("correlation", ["--device", "abacus"], "there is no device 'abacus' here; try cpu"),
    ("teleport_optimization", ["--epochs", "2"], "choose at least 3 --epochs"),
    ("multi_layer_regression", ["--seeds", "0"], "'0' is not a whole number from 1"),
]


@pytest.mark.parametrize(("name", "options", "words"), BAD_OPTIONS)
def test_scripts_answer_bad_options_with_a_sentence(tmp_path, call, name, options, words):
    required = REQUIRED.get(name, [])
    done = call(importlib.import_module(name), "--output", tmp_path, *required, *options)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_try_the_output_before_they_compute(tmp_path, call, name):
    (tmp_path / "file").touch()
    script, options = importlib.import_module(name), ["--output", tmp_path / "file"]
    done = call(script, *options, *REQUIRED.get(name, []))
    assert done.returncode == 2 and f"{tmp_path}/file" in done.stderr
    assert "fetching" not in done.stderr and "%" not in done.stderr  # no download, no epoch
