"""teleport_optimization.py: every arm on the sample, the controls, kill and resume."""

import json

import numpy as np
import pytest
import torch

import teleport_optimization as script
from data import load_sample, shuffled_batch
from init_directory import UserError
from models import MLP, LeakyReLU, init_weights, train_epoch
from teleportation import gradient_norm_squared

RUNS, EPOCHS = 3, 4
WIDTHS = script.WIDTHS["MNIST"]


class Bar:
    """A progress bar that interrupts after some updates."""

    def __init__(self, updates=None):
        self.left = updates

    def update(self, n=1):
        if self.left is not None:
            self.left -= n
            if self.left == 0:
                raise KeyboardInterrupt


def train(name, stack, folder, bar=None, epochs=EPOCHS):
    experiment = script.EXPERIMENTS[name]
    path = folder / f"{name}-{stack}.npz"
    return script.train_stack(
        load_sample("MNIST"), experiment, stack, RUNS, epochs, path, {}, bar or Bar()
    )


@pytest.mark.parametrize("stack", script.STACKS)
@pytest.mark.parametrize("name", ["AdaGrad", "momentum", "Adam"])
def test_an_interrupted_stack_ends_with_the_same_numbers(tmp_path, name, stack):
    whole = train(name, stack, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(name, stack, tmp_path / "cut", Bar(updates=3))
    resumed = train(name, stack, tmp_path / "cut")
    assert whole.keys() == resumed.keys()
    for key in whole.keys() - {"seconds", "move_seconds"}:
        np.testing.assert_array_equal(whole[key], resumed[key], err_msg=key)


def test_arms_differ_as_they_say(tmp_path):
    """Up to the first move all arms are one; reset moves nothing; random moves as far."""
    kept, rebuilt = (train("AdaGrad", stack, tmp_path) for stack in script.STACKS)
    loss = np.concatenate([kept["test_loss"], rebuilt["test_loss"]], axis=1)
    arms = {arm: loss[:, i] for i, arm in enumerate(script.ARMS)}
    first = script.EXPERIMENTS["AdaGrad"].epoch
    for arm in script.ARMS[1:]:
        np.testing.assert_allclose(arms[arm][:first], arms["plain"][:first], rtol=1e-5)
        assert (np.abs(arms[arm][first:] - arms["plain"][first:]) > 1e-6).all(), arm
    moves = np.concatenate([kept["moves"], rebuilt["moves"]], axis=1)
    assert moves.shape == (script.TELEPORTS, len(script.ARMS), 4, RUNS)
    for arm, moved in zip(script.ARMS, moves.swapaxes(0, 1)):
        stays = (moved[:, :2] == moved[:, 2:]).all()
        assert stays == (arm in ("plain", "reset"))
        if arm in ("teleport", "kept"):
            # |∇L|²; where an activation changes its sign on the way, it jumps, and may fall
            assert moved[:, 3].mean() > moved[:, 1].mean()


def test_for_plain_sgd_a_reset_changes_nothing(tmp_path):
    plain = train("SGD", "kept", tmp_path)["test_loss"][:, 0]
    reset = train("SGD", "rebuilt", tmp_path)["test_loss"][:, 1]
    np.testing.assert_allclose(plain, reset, rtol=1e-5)


def test_reset_is_a_new_optimizer_before_each_of_the_first_batches():
    data, experiment = load_sample("MNIST"), script.EXPERIMENTS["Adam"]
    weights = [w[None] for w in init_weights(WIDTHS, [1, 2])]
    model = MLP([w.clone() for w in weights], LeakyReLU())
    script.train_epoch_with_moves(model, ["reset"], data, experiment, None, rebuild=True)
    by_hand = MLP(weights, LeakyReLU())
    for k in range(script.TELEPORTS + 1):
        rows = slice(20 * k, 20 * k + 20 if k < script.TELEPORTS else None)
        if k < script.TELEPORTS:
            optimizer = experiment.optimizer(by_hand.parameters())
        train_epoch(by_hand, data.x_train[rows], data.y_train[rows], optimizer)
    for w, expected in zip(model.weights, by_hand.weights):
        torch.testing.assert_close(w, expected)


def test_moves_are_measured_on_the_teleports_batch():
    data = load_sample("MNIST")
    weights = [w[None] for w in init_weights(WIDTHS, [1, 2])]
    before = [w.clone() for w in weights]
    measured, seconds = script.move(weights, ["teleport"], data, 3, 5e-2)
    x, y = shuffled_batch(data, script.TELEPORT_BATCH, 3)
    assert x.shape == (784, 200) and seconds.shape == (1,)
    for column, w in ((1, before), (3, weights)):
        norm = gradient_norm_squared([v[0] for v in w], x, y, LeakyReLU())
        torch.testing.assert_close(measured[0, column], norm)


def test_a_loss_that_is_not_finite_stops_with_the_epoch_named(tmp_path):
    experiment = script.Experiment(lambda p: torch.optim.SGD(p, lr=1e30), 0, 1e-4)
    with pytest.raises(UserError, match="SGD-kept, epoch 0: .* not finite"):
        script.train_stack(
            load_sample("MNIST"), experiment, "kept", 2, 3, tmp_path / "SGD-kept", {}, Bar()
        )


def test_reach_is_the_first_epoch_at_the_target():
    loss = np.array([[3.0, 3.0, 3.0], [1.0, 2.0, 3.0], [2.0, 1.0, 3.0]])
    found = script.reach(loss, np.array([10.0, 20.0, 30.0]), np.array([1.5, 1.5, 1.5]))
    assert found == {"runs": 2, "epochs": 2.5, "seconds": 25.0}
    assert script.reach(loss, np.arange(3.0), np.zeros(3))["runs"] == 0


def test_the_sample_ends_with_table_and_figures(tmp_path, call, monkeypatch):
    options = ["--sample", "--runs", "2", "--epochs", "3", "--optimizer", "RMSprop"]
    done = call(script, *options, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    figures = tmp_path / "figures/sample/optimization"
    names = ["loss_vs_epoch", "loss_vs_time", "arms", "teleports"]
    expected = {f"MNIST_RMSprop_{name}.{suffix}" for name in names for suffix in ("pdf", "png")}
    expected |= {"MNIST_summary.json", "MNIST_table.md"}
    assert {path.name for path in figures.iterdir()} == expected
    summary = json.loads((figures / "MNIST_summary.json").read_text())
    assert summary["optimizers"].keys() == {"RMSprop"}
    plain = summary["optimizers"]["RMSprop"]["plain"]
    assert plain["after_epoch"]["3"]["minus_plain"] == {"mean": 0, "low": 0, "high": 0}
    assert (figures / "MNIST_table.md").read_text() in done.stdout
    monkeypatch.setattr(script, "save_figure", lambda *_: None)
    again = call(script, *options, "--plot-only", "--output", tmp_path)
    assert again.stdout == done.stdout
    other = call(script, *options, "--plot-only", "--epochs", "9")
    assert other.returncode == 2 and "run without --plot-only first" in other.stderr
