"""teleport_optimization.py: every arm on the sample, its controls, and the same numbers always."""

import json
import os
import shutil
import subprocess
import sys
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
SMALL = ("--sample", "--runs", RUNS)
FOLDER = f"figures/sample/{RUNS}runs-1epochs"
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


def options(folder, epochs=1, runs=RUNS):
    """Return options as `parse_arguments` does."""
    device = torch.device("cpu")
    return Namespace(output=folder, sample=True, device=device, epochs=epochs, runs=runs)


def train(folder, optimizer, arms, epochs=1, **setting):
    """Train {name: Arm} on the sample as one stack; return what is saved."""
    setting = script.OPTIMIZERS[optimizer]._replace(**setting)
    moving = [name for name, arm in arms.items() if arm.move]
    moments = {setting.epoch: {k: dict.fromkeys(moving, k) for k in range(script.MOVES)}}
    log = results.Log(folder / f"{optimizer}.npz", {"arms": list(arms)}, (script.__file__,))
    script.train_arms(log, "MNIST", setting, arms, moments, options(folder, epochs), BAR)
    return results.load(log, epochs).arrays


def some_arms(*names):
    return {name: script.ARMS[name] for name in names}


def logs(folder):
    """Return the arrays, but for seconds, of every file in logs/, by path and name."""
    return {
        (str(path.relative_to(folder)), key): array
        for path in sorted((folder / "logs").rglob("*.npz"))
        for key, array in results.read(path).arrays.items()
        if "seconds" not in key
    }


def assert_same(a, b):
    assert a.keys() == b.keys() and a
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=str(key))


def test_the_sample_ends_with_table_and_figures(tmp_path, call):
    chosen = [*SMALL, "--epochs", 1, "--optimizer", "RMSprop", "--output", tmp_path]
    done = call(script, *chosen, "--processes", 1)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / FOLDER
    names = {path.name for path in folder.rglob("*.*")}
    figures = {"figure_5.png", "figure_5.pdf", "figure_13.png", "figure_13.pdf", "controls.png"}
    assert names == figures | {"RMSprop.npz", "summary.json", "table.md"}
    folder = folder / "optimization" / "MNIST"
    arrays = results.read(folder / "RMSprop.npz").arrays
    assert arrays["arms"].tolist() == list(script.ARMS)
    assert arrays["moves"].shape == (script.MOVES, len(script.ARMS), 4, RUNS)
    plain, kept = arrays["test_loss"][0, :2].astype(float)
    summary = json.loads((folder / "summary.json").read_text("utf-8"))["RMSprop"]
    assert summary["differences"]["kept − plain"]["1"]["mean"] == pytest.approx(
        np.mean(kept - plain)
    )
    table = (folder / "table.md").read_text("utf-8")
    assert table in done.stdout
    shutil.rmtree(tmp_path / "logs")
    assert call(script, *chosen, "--plot-only").stdout == done.stdout
    assert (folder / "table.md").read_text("utf-8") == table
    other = call(script, *chosen, "--plot-only", "--epochs", 2)
    assert other.returncode == 2 and "run without --plot-only" in other.stderr


def test_any_number_of_processes_and_threads_gives_the_same_numbers(tmp_path, call):
    chosen = [*SMALL, "--epochs", 1, "--optimizer", "Adam"]
    for n in (1, 2):
        done = call(script, *chosen, "--processes", n, "--output", tmp_path / str(n))
        assert done.returncode == 0, done.stderr
    chosen += ["--processes", 1, "--output", tmp_path / "threads"]
    command = [sys.executable, script.__file__, *map(str, chosen)]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "2"}, check=True)
    assert_same(logs(tmp_path / "1"), logs(tmp_path / "2"))
    assert_same(logs(tmp_path / "1"), logs(tmp_path / "threads"))


@pytest.mark.parametrize("optimizer, epochs", [("AdaGrad", 4), ("momentum", 2), ("Adam", 2)])
def test_an_interrupted_run_ends_with_the_same_numbers(tmp_path, optimizer, epochs):
    for names in script.split(script.ARMS):
        stack = script.Stack("MNIST", optimizer, names)
        script.train(stack, options(tmp_path / "whole", epochs), BAR)
        with pytest.raises(KeyboardInterrupt):
            script.train(stack, options(tmp_path / "cut", epochs), bar_until(epochs - 1))
        script.train(stack, options(tmp_path / "cut", epochs), BAR)
    assert_same(logs(tmp_path / "whole"), logs(tmp_path / "cut"))


def test_an_epoch_of_each_arm_is_that_of_earlier_versions(tmp_path):
    for names in (("plain", "kept"), ("teleport", "reset")):
        state = train(tmp_path / names[0], "RMSprop", some_arms(*names))
        for i, name in enumerate(names):
            loss, *norms = GOLDEN[name]
            np.testing.assert_allclose(state["test_loss"][0, i], loss, rtol=2e-3)
            for k, norm in zip((0, -1), norms):
                if norm:
                    np.testing.assert_allclose(state["moves"][k, i, 1], norm, rtol=1e-2)


def test_an_arm_alone_is_the_arm_in_its_stack(tmp_path):
    stack = train(tmp_path / "stack", "Adam", some_arms("teleport", "reset", "random"))
    for i, name in enumerate(("teleport", "reset", "random")):
        alone = train(tmp_path / name, "Adam", some_arms(name))
        for curve in CURVES:
            np.testing.assert_allclose(alone[curve][:, 0], stack[curve][:, i], rtol=1e-4)


def test_up_to_the_first_move_all_arms_are_plain(tmp_path):
    state = train(tmp_path, "AdaGrad", some_arms("plain", "kept"), 4)
    plain, kept = state["test_loss"].swapaxes(0, 1)
    first = script.OPTIMIZERS["AdaGrad"].epoch
    np.testing.assert_allclose(kept[:first], plain[:first], rtol=1e-5)
    assert (np.abs(kept[first:] - plain[first:]) > 1e-7).all()


def test_reset_is_a_new_optimizer_before_each_of_the_first_batches(tmp_path):
    data, setting = load_sample("MNIST"), script.OPTIMIZERS["Adam"]
    state = train(tmp_path, "Adam", some_arms("reset"))
    weights = init_weights(TRAINING["MNIST"].widths, models.run_seeds(range(RUNS)))
    by_hand = MLP([w[None] for w in weights], LeakyReLU())
    for k in range(script.MOVES):
        rows = slice(20 * k, 20 * (k + 1) if k < script.MOVES - 1 else None)
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
    weights, arms = [torch.stack([w, w]) for w in WEIGHTS], some_arms("plain", "kept")
    moves, seconds = script.move_arms(weights, arms, {"kept": 3}, load_sample("MNIST"), 5e-2)
    x, y = shuffled_batch(load_sample("MNIST"), script.TELEPORT_BATCH, 3)
    assert torch.isnan(moves[0]).all() and seconds[0] == 0 < seconds[1]
    for column, i in ((1, 0), (3, 1)):  # the arm that moves begins where plain stays
        norm = gradient_norm_squared([w[i] for w in weights], x, y, LeakyReLU())
        torch.testing.assert_close(moves[1, column], norm)


def test_a_run_that_diverges_is_left_out_and_the_others_go_on_as_before(tmp_path):
    def run_away(weights, x, y, lr, rng):
        moved = script.to_larger_gradient(weights, x, y, lr, rng)
        moved[1][1, 0, 0] = torch.nan  # the second run
        return moved

    arms = some_arms("plain", "kept")
    whole = train(tmp_path / "whole", "Adam", arms, 2)
    state = train(tmp_path / "cut", "Adam", arms | {"kept": script.Arm(run_away, False)}, 2)
    for key in (*CURVES, "moves"):
        assert np.isnan(state[key][:, 1, ..., 1]).all()
        for i, run in ((0, 0), (0, 1), (1, 0)):
            np.testing.assert_array_equal(state[key][:, i, ..., run], whole[key][:, i, ..., run])
    state |= {"arms": np.array(list(arms)), "move_seconds": np.zeros(2)}
    summary = script.summarise(state)
    assert [arm["diverged"] for arm in summary["arms"].values()] == [0, 1]


def test_a_stack_that_diverges_stops_with_the_epoch_named(tmp_path):
    with pytest.raises(results.UserError, match="SGD, epoch 0: all networks diverge"):
        train(tmp_path, "SGD", some_arms("plain"), lr=1e30)


PAIRS = [(teleportation.PSEUDOINVERSE, activation()) for activation in (models.ReLU, models.Tanh)]
PAIRS += [(teleportation.INVERSE_ACTIVATION, LeakyReLU()), (teleportation.FIRST_ORDER, LeakyReLU())]
PAIRS += [(teleportation.RESCALING, LeakyReLU()), (teleportation.LINEAR, models.Identity())]


@pytest.mark.filterwarnings("ignore:the activations")  # of ReLU's dead units
@pytest.mark.parametrize("action, activation", PAIRS, ids=range(len(PAIRS)))
def test_every_action_and_activation_can_be_chosen(tmp_path, monkeypatch, action, activation):
    monkeypatch.setattr(script, "ACTION", action)
    monkeypatch.setattr(script, "ACTIVATION", activation)
    state = train(tmp_path, "momentum", some_arms("teleport", "random"), ascent_lr=1e-4)
    assert np.isfinite(state["test_loss"]).all() and np.isfinite(state["moves"]).all()
    _, before, _, after = state["moves"].swapaxes(0, 2).swapaxes(1, 2)
    assert (before != after).any()


def test_an_arms_time_is_its_share_of_training_and_its_own_moves(tmp_path):
    args = options(tmp_path, epochs=2)
    args.dataset, args.optimizer = "MNIST", ["Adam"]
    stacks, moved = script.stacks(args), [[0.0, 3.0], [4.0, 0.0, 5.0]]
    for stack, seconds in zip(stacks, moved):
        arms = len(stack.arms)
        state = {key: np.zeros((2, arms, RUNS)) for key in CURVES}
        state |= {"moves": np.zeros((script.MOVES, arms, 4, RUNS))}
        state |= {"move_seconds": np.array([seconds, [0.0] * len(seconds)]), "steps": 2}
        state |= {"seconds": np.array([5.0, 10.0])}
        log = script.training_log(stack, args)
        results.save(log.path, results.Result(state, log.settings, {"code": []}))
    arrays = script.collect([script.training_log(stack, args) for stack in stacks], args).arrays
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
                assert difference == pytest.approx(
                    dict.fromkeys(("mean", "low", "high"), scale * gap)
                )
    expected = {"share_of_moves_made": 7 / 8, "median_factor": 3, "mean_change_of_loss": 0.25}
    expected |= {"diverged": 0, "seconds_of_moves": 1}
    assert summary["arms"]["kept"] == pytest.approx(expected)
    text = script.table("MNIST", {"Adam": summary}, "kept − plain")
    assert "| Adam | plain | 10.150 | 10.150 | 10.150 |  | 0 | 0.0 | – | – | – |" in text
    assert "| −500.0 [−500.0, −500.0] | 0 | 1.0 | 88% | 3 | +2.5e−01 |" in text
