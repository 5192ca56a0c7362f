"""teleport_optimization.py: every arm on the sample, its controls, and the same numbers always."""

import json
import shutil
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import models
import teleport_optimization as script
import teleportation
from conftest import bar_until
from data import load_sample, shuffled_batch
from experiment import results
from models import MLP, TRAINING, LeakyReLU, init_weights
from teleportation import gradient_norm_squared

RUNS = 2
BAR = SimpleNamespace(update=lambda n=1: None)
WEIGHTS = init_weights(TRAINING["MNIST"].widths, [1, 2, 3])
CURVES = "train_loss", "test_loss", "test_accuracy"
# of the published seeds after an epoch of the sample, RMSprop: test loss, and |∇L|² on the
# teleports' batches before the first and before the last move
GOLDEN = {
    "plain": ([2.2498631, 2.2472222], None, None),
    "kept": ([2.1469622, 2.2162325], [0.0330986, 0.0304037], [0.0526292, 0.0515132]),
    "teleport": ([2.1271753, 2.1928449], [0.0330986, 0.0304037], [0.0466754, 0.0525767]),
    "reset": ([2.2251716, 2.2272923], None, None),
}


def options(folder, epochs=1):
    """Return options as `parse_arguments` does."""
    cpu = torch.device("cpu")
    return Namespace(
        output=folder, dataset="MNIST", sample=True, device=cpu, epochs=epochs, runs=RUNS
    )


def train(folder, optimizer, arms, epochs=1, bar=BAR, **setting):
    """Train arms, names or {name: Arm}, on the sample as one stack; return what is saved."""
    arms = arms if isinstance(arms, dict) else {name: script.ARMS[name] for name in arms}
    setting = script.OPTIMIZERS[optimizer]._replace(**setting)
    log = results.Log(folder / f"{optimizer}.npz", {"arms": list(arms)}, (script.__file__,))
    script.train_arms(log, setting, arms, options(folder, epochs), bar)
    return results.load(log, epochs).arrays


def test_the_sample_ends_with_table_and_figures(tmp_path, call):
    chosen = "--sample", "--runs", RUNS, "--epochs", 1, "--optimizer", "RMSprop"
    chosen += "--output", tmp_path
    done = call(script, *chosen, "--processes", 1)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / f"figures/sample/{RUNS}runs-1epochs"
    names = {path.name for path in folder.rglob("*.*")}
    figures = {"figure_5.png", "figure_5.pdf", "figure_13.png", "figure_13.pdf", "controls.png"}
    assert names == figures | {"RMSprop.npz", "summary.json", "table.md"}
    folder = folder / "optimization" / "MNIST"
    arrays = results.read(folder / "RMSprop.npz").arrays
    assert arrays["arms"].tolist() == list(script.ARMS)
    assert arrays["moves"].shape == (script.MOVES, len(script.ARMS), 4, RUNS)
    plain, kept = arrays["test_loss"][0, :2].astype(float)
    summary = json.loads((folder / "summary.json").read_text("utf-8"))["RMSprop"]
    difference = summary["differences"]["kept − plain"]["1"]["mean"]
    assert difference == pytest.approx(np.mean(kept - plain))
    table = (folder / "table.md").read_text("utf-8")
    assert table in done.stdout
    shutil.rmtree(tmp_path / "logs")
    assert call(script, *chosen, "--plot-only").stdout == done.stdout
    assert (folder / "table.md").read_text("utf-8") == table
    other = call(script, *chosen, "--plot-only", "--epochs", 2)
    assert other.returncode == 2 and "run without --plot-only" in other.stderr


@pytest.mark.parametrize("optimizer, epochs", [("AdaGrad", 4), ("momentum", 2), ("Adam", 2)])
def test_an_interrupted_run_ends_with_the_same_numbers(tmp_path, optimizer, epochs):
    for arms in script.split(script.ARMS):
        whole = train(tmp_path / "whole" / arms[0], optimizer, arms, epochs)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / arms[0], optimizer, arms, epochs, bar_until(epochs - 1))
        resumed = train(tmp_path / arms[0], optimizer, arms, epochs)
        assert whole.keys() == resumed.keys()
        for key in whole.keys() - {"seconds", "move_seconds"}:
            np.testing.assert_array_equal(resumed[key], whole[key], err_msg=key)


def test_an_epoch_of_each_arm_is_that_of_earlier_versions(tmp_path):
    for names in (("plain", "kept"), ("teleport", "reset")):
        state = train(tmp_path / names[0], "RMSprop", names)
        for i, name in enumerate(names):
            loss, *norms = GOLDEN[name]
            np.testing.assert_allclose(state["test_loss"][0, i], loss, rtol=2e-3)
            for k, norm in zip((0, -1), norms):
                if norm:
                    np.testing.assert_allclose(state["moves"][k, i, 1], norm, rtol=1e-2)


def test_an_arm_alone_is_the_arm_in_its_stack(tmp_path):
    names = "teleport", "reset", "random"
    stack = train(tmp_path / "stack", "Adam", names)
    for i, name in enumerate(names):
        alone = train(tmp_path / name, "Adam", [name])
        for curve in CURVES:
            np.testing.assert_allclose(alone[curve][:, 0], stack[curve][:, i], rtol=1e-4)


def test_up_to_the_first_move_all_arms_are_plain(tmp_path):
    state = train(tmp_path, "AdaGrad", ("plain", "kept"), 4)
    plain, kept = state["test_loss"].swapaxes(0, 1)
    np.testing.assert_allclose(kept[:2], plain[:2], rtol=1e-5)
    assert (np.abs(kept[2:] - plain[2:]) > 1e-7).all()


def test_reset_is_a_new_optimizer_before_each_of_the_first_batches(tmp_path):
    data, setting = load_sample("MNIST"), script.OPTIMIZERS["Adam"]
    state = train(tmp_path, "Adam", ["reset"])
    weights = init_weights(TRAINING["MNIST"].widths, models.run_seeds(range(RUNS)))
    by_hand = MLP([w[None] for w in weights], LeakyReLU())
    for k in range(8):
        rows = slice(20 * k, 20 * (k + 1) if k < 7 else None)
        optimizer = setting.optimizer(by_hand.parameters(), setting.lr)
        models.train_epoch(by_hand, data.x_train[rows], data.y_train[rows], optimizer)
    for m, expected in enumerate(by_hand.weights):
        torch.testing.assert_close(torch.tensor(state[f"W{m}"]), expected.detach())


def test_random_moves_are_as_long_as_teleports_in_another_direction():
    x, y = shuffled_batch(load_sample("MNIST"), script.TELEPORT_BATCH, 0)
    inverse = torch.linalg.pinv(WEIGHTS[0])
    moves = script.to_larger_gradient, script.at_random
    rng = torch.Generator().manual_seed(0)
    T, random = (move(WEIGHTS, x, y, 5e-2, rng)[0] @ inverse - torch.eye(16) for move in moves)
    torch.testing.assert_close(random.norm(dim=(1, 2)), T.norm(dim=(1, 2)), rtol=1e-3, atol=0)
    cosine = (random * T).sum((1, 2)) / T.norm(dim=(1, 2)) ** 2
    assert (cosine.abs() < 0.5).all()


def test_moves_are_measured_on_their_batch():
    weights, data = [torch.stack([w, w]) for w in WEIGHTS], load_sample("MNIST")
    arms = {name: script.ARMS[name] for name in ("plain", "kept")}
    moves, seconds = script.move_arms(weights, arms, {"kept": 3}, data, 5e-2)
    x, y = shuffled_batch(data, script.TELEPORT_BATCH, 3)
    assert torch.isnan(moves[0]).all() and seconds[0] == 0 < seconds[1]
    for column, i in ((1, 0), (3, 1)):  # the arm that moves begins where plain stays
        norm = gradient_norm_squared([w[i] for w in weights], x, y, LeakyReLU())
        torch.testing.assert_close(moves[1, column], norm)


def test_a_run_that_diverges_is_left_out_and_the_others_go_on_as_before(tmp_path):
    def run_away(weights, x, y, lr, rng):
        moved = script.to_larger_gradient(weights, x, y, lr, rng)
        moved[1][1, 0, 0] = torch.nan  # the second run
        return moved

    whole = train(tmp_path / "whole", "Adam", ("plain", "kept"), 2)
    arms = {"plain": script.ARMS["plain"], "kept": script.Arm(run_away, False)}
    state = train(tmp_path / "cut", "Adam", arms, 2)
    for key in (*CURVES, "moves"):
        assert np.isnan(state[key][:, 1, ..., 1]).all()
        for i, run in ((0, 0), (0, 1), (1, 0)):
            np.testing.assert_array_equal(state[key][:, i, ..., run], whole[key][:, i, ..., run])
    summary = script.summarise(state | {"arms": np.array(list(arms)), "move_seconds": np.zeros(2)})
    assert [arm["diverged"] for arm in summary["arms"].values()] == [0, 1]


def test_a_stack_that_diverges_stops_with_the_epoch_named(tmp_path):
    with pytest.raises(results.UserError, match="SGD, epoch 0: all networks diverge"):
        train(tmp_path, "SGD", ["plain"], lr=1e30)


def test_another_action_and_activation_can_be_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "ACTION", teleportation.LINEAR)
    monkeypatch.setattr(script, "ACTIVATION", models.Identity())
    state = train(tmp_path, "momentum", ("teleport", "random"), ascent_lr=1e-4)
    before, _, after, _ = state["moves"].swapaxes(0, 2).swapaxes(1, 2)
    np.testing.assert_allclose(before, after, rtol=1e-4)  # which the pseudoinverse does not keep
    assert (state["moves"][:, :, 1] != state["moves"][:, :, 3]).any(-1).all()


def test_an_arms_time_is_its_share_of_training_and_its_own_moves(tmp_path):
    args, logs = options(tmp_path, epochs=2), []
    for arms, seconds in zip(script.split(script.ARMS), [[0.0, 3.0], [4.0, 0.0, 5.0]]):
        log = script.training_log("Adam", script.OPTIMIZERS["Adam"], arms, args)
        state = {key: np.zeros((2, len(arms), RUNS)) for key in CURVES}
        state |= {"moves": np.zeros((8, len(arms), 4, RUNS)), "seconds": np.array([5.0, 10.0])}
        state |= {"move_seconds": np.array([seconds, [0.0] * len(arms)]), "steps": 2}
        results.save(log.path, results.Result(state, log.settings, {"code": []}))
        logs.append(log)
    arrays = script.collect(logs, args).arrays
    assert list(arrays["arms"]) == list(script.ARMS)
    np.testing.assert_allclose(arrays["move_seconds"], [0, 3, 4, 0, 5])
    np.testing.assert_allclose(arrays["seconds"], [[2, 5, 6, 2, 7], [6, 9, 10, 6, 11]])


def test_the_table_says_what_made_up_results_say():
    """Arm i is i below plain; its moves add 0.25 to the loss and, but for one, treble |∇L|²."""
    arms, runs = len(script.ARMS), 4
    loss = 10.0 - np.arange(arms)[:, None] + 0.1 * np.arange(runs)
    moves = np.ones((script.MOVES, arms, 4, runs))
    moves[:, :, 2] = 1.25
    moves[1:, :, 3] = 3.0
    moves[:, 0] = np.nan
    arrays = {"arms": np.array(list(script.ARMS)), "moves": moves, "move_seconds": np.arange(arms)}
    arrays |= {"test_loss": np.stack([loss] * 6), "train_loss": np.stack([loss] * 6) / 2}
    summary = script.summarise(arrays)
    assert summary["plain"] == {epoch: pytest.approx(10.15) for epoch in (1, 5, 6)}
    for a, b, gap in (("kept", "plain", -1), ("random", "plain", -4), ("teleport", "reset", 1)):
        for key, scale in (("differences", 1), ("training", 0.5)):
            for difference in summary[key][f"{a} − {b}"].values():
                assert list(difference.values()) == pytest.approx([scale * gap] * 3)
    expected = {"share_of_moves_made": 7 / 8, "median_factor": 3, "mean_change_of_loss": 0.25}
    expected |= {"diverged": 0, "seconds_of_moves": 1}
    assert summary["arms"]["kept"] == pytest.approx(expected)
    text = script.table("MNIST", {"Adam": summary}, "kept − plain")
    assert "| Adam | plain | 10.150 | 10.150 | 10.150 |  | 0 | 0.0 | – | – | – |" in text
    assert "| −500.0 [−500.0, −500.0] | 0 | 1.0 | 88% | 3 | +2.5e−01 |" in text
