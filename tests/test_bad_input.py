"""What a user hands over is checked where it comes in, by the core and by every script."""

import contextlib
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from experiment import files
from experiment.files import ROOT

import numpy as np
import pytest
import torch

import correlation
import data
import displacement_integration
import init_directory
import models
import multi_layer_regression
import teleport_cnn
import teleport_optimization
import teleport_sharpness_curvature
import teleportation
from models import MLP, LeakyReLU, init_weights
from teleportation import random_directions

WIDTHS, N = (6, 5, 4, 3), 40
NAN, ACTIVATION = float("nan"), LeakyReLU()


def calls(weights, x, y):
    """Return {public function: a call of it} on a network and a batch."""
    directions = random_directions(WIDTHS, [0.1, 0.2], torch.Generator())
    M, optimizer = torch.eye(4), torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    model = MLP(weights, ACTIVATION) if all(w.is_floating_point() for w in weights) else None
    t, draws = teleportation, ([0.1], 2, 0, ACTIVATION)
    return {
        "cross_entropy": lambda: models.cross_entropy(weights, x, y, ACTIVATION),
        "evaluate": lambda: models.evaluate(weights, x.T, y, ACTIVATION),
        "train_epoch_sgd": lambda: models.train_epoch_sgd(weights, x.T, y, 0.1, ACTIVATION),
        "train_epoch": lambda: models.train_epoch(model, x.T, y, optimizer),
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


def batch():
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(WIDTHS[0], N, generator=rng)
    return init_weights(WIDTHS, 1), x, torch.randint(3, (N,), generator=rng)


WITH_LABELS = list(calls(*batch()))[:9]
WITHOUT_LABELS = list(calls(*batch()))[9:]
BAD_BATCHES = {
    "one label": (lambda w, x, y: (w, x, y[:1]), r"y must be int64 \[40\] .*not torch.int64 \[1\]"),
    "7 labels": (lambda w, x, y: (w, x, y[:7]), r"y must be int64 \[40\] .*not torch.int64 \[7\]"),
    "int32 labels": (lambda w, x, y: (w, x, y.int()), r"y must be int64 .*not torch.int32 \[40\]"),
    "one-hot labels": (lambda w, x, y: (w, x, torch.zeros(N, 3)), r"not torch.float32 \[40, 3\]"),
    "a label too large": (lambda w, x, y: (w, x, y + 3), "labels must be 0 to 2, not 3 to 5"),
    "a negative label": (lambda w, x, y: (w, x, y - 1), "labels must be 0 to 2, not -1 to 1"),
    "an empty batch": (lambda w, x, y: (w, x[:, :0], y[:0]), r"x must be \[6, n\] with n > 0"),
    "samples as rows": (lambda w, x, y: (w, x.T, y), r"x must be \[6, n\] .*not \[40, 6\]"),
    "float64 images": (lambda w, x, y: (w, x.double(), y), "one type and device, not torch.float"),
    "layers that do not fit": (
        lambda w, x, y: ([w[0], w[2]], x, y),
        r"W_1 \[3, 4\] does not fit W_0 \[5, 6\]",
    ),
    "other runs in a layer": (
        lambda w, x, y: ([w[0].expand(2, 5, 6), *w[1:]], x, y),
        r"W_1 \[4, 5\] does not fit W_0 \[2, 5, 6\]",
    ),
    "integer weights": (
        lambda w, x, y: ([w[0].long(), *w[1:]], x, y),
        "W_0 must be floating-point",
    ),
    "images on another device": (lambda w, x, y: (w, x.to("meta"), y), "on meta"),
}


def applies(name, bad):
    """Return whether a function takes what is bad: a module has no integer parameters."""
    if bad == "integer weights":
        return name != "train_epoch"
    return "label" not in bad or name in WITH_LABELS


@pytest.mark.parametrize(
    ("name", "bad"),
    [(n, bad) for n in WITH_LABELS + WITHOUT_LABELS for bad in BAD_BATCHES if applies(n, bad)],
)
def test_the_core_names_what_does_not_fit(name, bad):
    spoil, words = BAD_BATCHES[bad]
    if bad == "samples as rows" and name in ("evaluate", "train_epoch", "train_epoch_sgd"):
        words = r"x must be \[6, n\]"  # which take rows, and are given columns
    with pytest.raises(ValueError, match=words):
        calls(*spoil(*batch()))[name]()


@pytest.mark.parametrize("name", WITH_LABELS + WITHOUT_LABELS)
def test_the_core_takes_what_fits(name):
    calls(*batch())[name]()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([torch.eye(4)], 1), "there must be 2 generators, one for each pair, not 1"),
        (([torch.eye(5), torch.eye(5)], 2), r"of pair 1 must be \[..., 4, 4\], not \[5, 5\]"),
    ],
)
def test_generators_fit_their_pairs(arguments, words):
    weights, x, _ = batch()
    with pytest.raises(ValueError, match=words):
        teleportation.curve_derivatives(weights, x, arguments[0], ACTIVATION)


@pytest.mark.parametrize("layer", [-1, 2])
def test_a_pair_that_is_not_there_is_named(layer):
    weights, x, _ = batch()
    with pytest.raises(ValueError, match=f"there is no pair {layer} of layers: there are 2"):
        teleportation.curvature_along(weights, x, torch.eye(4), layer, ACTIVATION)


def test_directions_are_like_the_weights():
    weights, x, y = batch()
    with pytest.raises(ValueError, match=r"directions must be \[..., K, out, in\]"):
        teleportation.sharpness(weights, x, y, weights, ACTIVATION)


@pytest.mark.parametrize("name", ["gradient_norm_squared", "sharpness", "teleport_sharpness"])
def test_results_that_are_not_finite_name_the_runs(name):
    weights, x, y = batch()
    weights = [torch.stack([w, w, w]) for w in weights]
    weights[-1][1, 0, 0] = NAN
    with pytest.warns(UserWarning, match=r"is not finite for the runs \[\[1\]\]"):
        calls(weights, x, y)[name]()


SCRIPTS = {
    "correlation": correlation,
    "displacement_integration": displacement_integration,
    "teleport_cnn": teleport_cnn,
    "teleport_optimization": teleport_optimization,
    "teleport_sharpness_curvature": teleport_sharpness_curvature,
    "multi_layer_regression": multi_layer_regression,
    "data": data,
}
BAD_OPTIONS = [
    *((name, ["--frobnicate"], "unrecognized arguments: --frobnicate") for name in SCRIPTS),
    *((name, ["--output"], "--output: expected one argument") for name in list(SCRIPTS)[:6]),
    *(
        (name, ["--plot-only"], "missing: run without --plot-only")
        for name in SCRIPTS
        if name != "data"
    ),
    ("correlation", ["--dataset", "SVHN"], "invalid choice: 'SVHN'"),
    ("correlation", ["--runs", "3"], "'3' is not a whole number from 4 to 1,000,000"),
    ("correlation", ["--runs", "1000001"], "'1000001' is not a whole number from 4"),
    ("correlation", ["--epochs", "-1"], "'-1' is not a whole number from 1"),
    ("correlation", ["--epochs", "1e3"], "'1e3' is not a whole number from 1"),
    ("correlation", ["--batches", "٣"], "'٣' is not a whole number from 1"),
    ("correlation", ["--batches", "9" * 5000], "is not a whole number from 1"),
    ("correlation", ["--device", "abacus"], "there is no device 'abacus' here; try cpu"),
    ("correlation", ["--device", "meta"], "there is no device 'meta' here; try cpu"),
    ("teleport_cnn", ["--optimizer", "AdaGrad"], "invalid choice: 'AdaGrad'"),
    ("teleport_cnn", ["--epochs", "2"], "'2' is not a whole number from 3"),
    ("teleport_optimization", ["--optimizer", "LBFGS"], "invalid choice: 'LBFGS'"),
    ("teleport_optimization", ["--dataset", "MNIST", "CIFAR10"], "unrecognized arguments"),
    ("teleport_optimization", ["--runs", "1"], "'1' is not a whole number from 2"),
    ("teleport_optimization", ["--epochs", "2"], "'2' is not a whole number from 3"),
    ("teleport_sharpness_curvature", ["--runs", "1"], "'1' is not a whole number from 2"),
    ("teleport_sharpness_curvature", ["--dataset"], "--dataset: expected at least one argument"),
    ("multi_layer_regression", ["--seeds", "0"], "'0' is not a whole number from 1"),
    ("multi_layer_regression", ["--processes", "two"], "'two' is not a whole number from 1"),
    ("displacement_integration", ["--polyline", "0"], "'0' is not a number from 0.001 to 10"),
    ("data", ["SVHN"], "there is no dataset 'SVHN': choose from MNIST, FashionMNIST, CIFAR10"),
]


@pytest.mark.parametrize(("name", "options", "words"), BAD_OPTIONS)
def test_scripts_answer_bad_options_with_a_sentence(tmp_path, call, name, options, words):
    first = [] if "--output" in options or name == "data" else ["--output", tmp_path]
    done = call(SCRIPTS[name], *first, *options)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


SMALL = ("--sample", "--dataset", "MNIST", "--runs", "4", "--epochs", "2", "--batches", "2")
LOGS = "logs/correlation/MNIST-sample-2epochs"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a small run of correlation.py."""
    folder = tmp_path_factory.mktemp("finished")
    command = [sys.executable, ROOT / "correlation.py", *SMALL, "--output", folder]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def shorten(arrays):
    arrays["train_loss"] = arrays["train_loss"][:-1]


def spoil(arrays):
    arrays["test_loss"][0] = NAN


def drop(arrays):
    del arrays["seconds"]


def other_type(arrays):
    arrays["W0"] = arrays["W0"].astype(str)


def other_shape(arrays):
    arrays["W1"] = arrays["W1"].swapaxes(-1, -2)


@pytest.mark.parametrize("alter", [shorten, spoil, drop, other_type, other_shape])
def test_an_altered_result_is_named_and_made_again(tmp_path, call, finished, alter):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    log = tmp_path / LOGS / "runs000-003.npz"
    with np.load(log) as archive:
        arrays = {key: archive[key] for key in archive.files}
    alter(arrays)
    np.savez(log, **arrays)
    done = call(correlation, *SMALL, "--output", tmp_path)
    assert (
        done.returncode == 0 and f"{log} is damaged and will be treated as missing" in done.stderr
    )
    again, expected = (files.read(f / LOGS / "runs000-003.npz") for f in (tmp_path, finished))
    for key in expected.arrays.keys() - {"seconds"}:
        np.testing.assert_array_equal(again.arrays[key], expected.arrays[key])


def test_an_altered_result_is_not_drawn(tmp_path, call, finished):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (path,) = (tmp_path / "figures").rglob("MNIST.npz")
    path.write_bytes(path.read_bytes().replace(b"sharpness", b"sharpnest"))
    done = call(correlation, *SMALL, "--plot-only", "--output", tmp_path)
    assert done.returncode == 2
    assert "is damaged" in done.stderr and "run without --plot-only" in done.stderr


def test_output_is_tried_before_the_first_epoch(tmp_path, call, monkeypatch):
    monkeypatch.setattr(correlation, "compute", lambda args: pytest.fail("it computes"))
    (tmp_path / "figures").write_text("a file")
    done = call(correlation, *SMALL, "--output", tmp_path)
    assert done.returncode == 2 and str(tmp_path / "figures/sample") in done.stderr


def test_a_disk_that_fills_during_training_ends_with_a_sentence(tmp_path):
    """A limit on a file's size stands in for a full disk: the first stack of results is larger."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # noqa: E731
    command = [sys.executable, ROOT / "correlation.py", *SMALL, "--output", tmp_path]
    # a measurement of the tests' coverage would write a file that is too large, too
    environment = {key: value for key, value in os.environ.items() if "COV" not in key}
    options = {"capture_output": True, "text": True, "env": environment}
    done = subprocess.run(command, preexec_fn=limit, **options)
    assert done.returncode == 2 and "File too large" in done.stderr
    assert "Everything saved so far is complete" in done.stderr and "Traceback" not in done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "script", ["correlation.py", "learn-to-teleport/multi_layer_regression.py"]
)
@pytest.mark.parametrize("delay", [0.2, 0.7])
def test_ctrl_c_during_imports_ends_with_a_sentence(tmp_path, script, delay):
    command = [sys.executable, ROOT / script, "--output", tmp_path]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(delay)
        start = time.monotonic()
        process.send_signal(2)
        _, errors = process.communicate(timeout=10)
    assert time.monotonic() - start < 1
    assert process.returncode == 130 and errors.strip().startswith("Interrupted")


@pytest.mark.skipif(not os.path.exists("/proc"), reason="reads /proc")
def test_workers_end_with_their_parent(tmp_path):
    def group(pgid):
        found = []
        for name in filter(str.isdecimal, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{name}/stat").read_text().rpartition(") ")[2].split()
                if int(status[2]) == pgid and status[0] != "Z":
                    found.append(int(name))
        return found

    options = ["--quick", "--seeds", "1", "--processes", "4", "--output", tmp_path]
    command = [sys.executable, ROOT / "learn-to-teleport/multi_layer_regression.py", *options]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    while len(group(process.pid)) < 4:  # it, the resource tracker, and workers
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    end = time.monotonic() + 2
    while group(process.pid):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_what_a_killed_process_left_is_removed_and_a_living_ones_is_kept(tmp_path):
    path, mine = tmp_path / "a.npz", f"a.npz.{files.HOST}."
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = tmp_path / f"{mine}{dead.pid}.0.part"
    kept = [tmp_path / f"{mine}{os.getpid()}.0.part", tmp_path / "a.npz.elsewhere.1.0.part"]
    kept += [tmp_path / f"{mine}draft.0.part", tmp_path / f"{mine}{10**30}.0.part"]  # not ours
    for part in (left, *kept):
        part.touch()
    files.save(path, {}, {"a": np.ones(1)})
    assert set(tmp_path.iterdir()) == {path, *kept}


def test_init_directory_answers_a_folder_that_cannot_be_made(tmp_path, capsys, monkeypatch):
    (tmp_path / "data").write_text("a file")
    monkeypatch.setattr(init_directory, "ROOT", tmp_path)
    with pytest.raises(SystemExit) as end:
        init_directory.run(lambda: init_directory.init_directory(tmp_path))
    assert end.value.code == 2 and str(tmp_path / "data") in capsys.readouterr().err
