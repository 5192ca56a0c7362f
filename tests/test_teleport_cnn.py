"""teleport_cnn.py: its arms on the sample, resuming, and the choice of the learning rate."""

from types import SimpleNamespace

from experiment import files

import numpy as np
import pytest
import torch

import teleport_cnn as script
from data import load_sample
from module_symmetry import outputs
from teleport_cnn import ARMS, BATCH, EPOCH, TELEPORTS

EPOCHS = EPOCH + 2


@pytest.fixture(scope="module")
def data():
    sample = load_sample("CIFAR10")
    return sample._replace(x_train=sample.x_train[: 4 * BATCH], y_train=sample.y_train[: 4 * BATCH])


def train(data, optimizer, arm):
    return script.train(optimizer, 0.01, arm, 3, EPOCHS, data, (data.x_test, data.y_test))


@pytest.mark.parametrize("optimizer", script.OPTIMIZERS)
def test_arms_part_at_the_first_teleport(data, optimizer):
    runs = {arm: train(data, optimizer, arm) for arm in ARMS}
    for arm in ("teleport", "random"):
        np.testing.assert_array_equal(runs[arm]["loss"][:EPOCH], runs["plain"]["loss"][:EPOCH])
        assert (runs[arm]["loss"][EPOCH:] != runs["plain"]["loss"][EPOCH:]).all()
    assert (runs["plain"]["growth"] == 1).all() and runs["plain"]["seconds"] == 0
    moved = min(TELEPORTS, len(data.x_train) // BATCH)
    assert (runs["teleport"]["growth"][:moved] > 1.05).all()
    assert (runs["random"]["growth"] < runs["teleport"]["growth"])[:moved].all()


@pytest.mark.parametrize("arm", ["teleport", "random"])
def test_a_move_keeps_the_outputs_and_random_goes_as_far(data, arm):
    model, x, y = script.network(1), data.x_train[:50], data.y_train[:50]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = outputs(model, before, x)
    script.move_model(arm, model, torch.optim.SGD(model.parameters(), 0.1), x, y, seed=0)
    after = dict(model.named_parameters())
    torch.testing.assert_close(outputs(model, after, x), expected, rtol=1e-4, atol=1e-4)
    # the first group's elements, read off batch norm's affine weights
    length = (after["2.weight"] / before["2.weight"]).log().norm()
    assert 0.02 < length < script.STEPS * script.MAX_NORM


def test_a_learning_rate_at_which_a_run_diverged_is_not_chosen():
    losses = np.array([[3.0, 3.0], [1.0, np.nan], [2.0, 2.1], [2.2, 2.2]])
    assert script.best_lr(losses, "SGD") == script.GRID["SGD"][2]


def test_a_run_that_diverges_is_named(data):
    with pytest.warns(UserWarning, match="plain, lr 1e.30, run 3: not finite in epoch 0"):
        found = script.train("SGD", 1e30, "plain", 3, EPOCHS, data, (data.x_test, data.y_test))
    assert np.isnan(found["loss"]).all()


def test_the_script_resumes_and_reports(tmp_path, call, monkeypatch):
    monkeypatch.setattr(script, "GRID", {"SGD": (0.1, 0.03)})
    monkeypatch.setattr(script, "GRID_RUNS", range(100, 101))
    monkeypatch.setattr(script, "TELEPORTS", 2)
    command = ("--sample", "--optimizer", "SGD", "--runs", "2", "--epochs", "3")
    assert call(script, *command, "--output", tmp_path / "whole").returncode == 0
    original, calls = script.train, []

    def interrupted(*arguments):
        calls.append(arguments[2:4])
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(script, "train", interrupted)
    assert call(script, *command, "--output", tmp_path / "cut").returncode == 130
    done = call(script, *command, "--output", tmp_path / "cut")
    assert done.returncode == 0 and calls[4] == calls[5]
    assert len(calls) == 2 + 2 * len(ARMS) + 1
    whole, resumed = (
        files.read(next((tmp_path / folder).rglob("SGD.npz"))) for folder in ("whole", "cut")
    )
    for key in whole.arrays.keys() - {"seconds"}:
        np.testing.assert_array_equal(whole.arrays[key], resumed.arrays[key])
    assert whole.arrays["loss"].shape == (3, len(ARMS), 2)
    assert whole.arrays["growth"].shape == (2, len(ARMS), 2)
    assert "teleport − plain" in done.stdout
    args = SimpleNamespace(sample=True, epochs=3, runs=2, output=tmp_path / "cut")
    args.device = torch.device("cpu")
    assert len(script.grid("SGD", args)) == 2
