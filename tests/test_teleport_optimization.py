"""teleport_optimization.py: every arm on the sample, the controls, kill and resume."""

import json
import shutil
import sys
import time

from experiment import files
from experiment.files import UserError

import numpy as np
import pytest
import torch

import teleport_optimization as script
from data import load_sample, shuffled_batch
from models import MLP, TRAINING, LeakyReLU, cross_entropy, init_weights, train_epoch
from teleportation import gradient_norm_squared, inner_product

RUNS, EPOCHS = 3, 4
WIDTHS = TRAINING["MNIST"].widths
PUBLISHED = script.STUDIES["published"]
ARMS = list(PUBLISHED.arms)
STACKS = dict(zip(("kept", "renewed"), script.stacks_of(PUBLISHED)))

MOVE = script.move_arm


class Bar:
    """A progress bar that interrupts after some updates."""

    def __init__(self, updates=None):
        self.left = updates

    def update(self, n=1):
        if self.left is not None:
            self.left -= n
            if self.left == 0:
                raise KeyboardInterrupt


def train(name, stack, folder, bar=None, epochs=EPOCHS, arms=None):
    experiment = script.EXPERIMENTS[name]
    path, arms = folder / f"{name}-{stack}.npz", arms or STACKS[stack]
    return script.train_stack(
        load_sample("MNIST"), experiment, arms, RUNS, epochs, path, {}, bar or Bar()
    )


@pytest.mark.parametrize("stack", STACKS)
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
    kept, renewed = (train("AdaGrad", stack, tmp_path) for stack in STACKS)
    loss = np.concatenate([kept["test_loss"], renewed["test_loss"]], axis=1)
    arms = {arm: loss[:, i] for i, arm in enumerate(ARMS)}
    first = script.EXPERIMENTS["AdaGrad"].epoch
    for arm in ARMS[1:]:
        np.testing.assert_allclose(arms[arm][:first], arms["plain"][:first], rtol=1e-5)
        assert (np.abs(arms[arm][first:] - arms["plain"][first:]) > 1e-6).all(), arm
    moves = np.concatenate([kept["moves"], renewed["moves"]], axis=1)
    assert moves.shape == (script.TELEPORTS, len(ARMS), 5, RUNS)
    for arm, moved in zip(ARMS, moves.swapaxes(0, 1)):
        assert np.isnan(moved).all() == (arm == "plain")
        if arm == "reset":
            assert (moved[:, :2] == moved[:, 2:4]).all() and (moved[0, 4] == 0).all()
        if arm in ("teleport", "kept"):
            # |∇L|²; where an activation changes its sign on the way, it jumps, and may fall
            assert moved[:, 3].mean() > moved[:, 1].mean()
            assert (moved[0, 4] != 0).all() and np.isnan(moved[1:, 4]).all()


def test_for_plain_sgd_a_reset_changes_nothing(tmp_path):
    plain = train("SGD", "kept", tmp_path)["test_loss"][:, 0]
    reset = train("SGD", "renewed", tmp_path)["test_loss"][:, 1]
    np.testing.assert_allclose(plain, reset, rtol=1e-5)


def test_reset_is_a_new_optimizer_before_each_of_the_first_batches(tmp_path):
    data, experiment = load_sample("MNIST"), script.EXPERIMENTS["Adam"]
    reset = {"reset": PUBLISHED.arms["reset"]}
    state = train("Adam", "renewed", tmp_path, epochs=1, arms=reset)
    seeds = [54321 * (i + 1) for i in range(RUNS)]
    by_hand = MLP([w[None] for w in init_weights(WIDTHS, seeds)], LeakyReLU())
    for k in range(script.TELEPORTS + 1):
        rows = slice(20 * k, 20 * k + 20 if k < script.TELEPORTS else None)
        if k < script.TELEPORTS:
            optimizer = experiment.optimizer(by_hand.parameters(), experiment.lr)
        train_epoch(by_hand, data.x_train[rows], data.y_train[rows], optimizer)
    for m, expected in enumerate(by_hand.weights):
        torch.testing.assert_close(torch.tensor(state[f"W{m}"]), expected.detach())


def test_moves_are_measured_on_the_teleports_batch():
    data = load_sample("MNIST")
    weights = [w[None] for w in init_weights(WIDTHS, [1, 2])]
    before = [w.clone() for w in weights]
    arms = {"teleport": PUBLISHED.arms["teleport"]}
    measured, seconds = script.move(weights, arms, {"teleport": 3}, data, 5e-2)
    x, y = shuffled_batch(data, script.TELEPORT_BATCH, 3)
    assert x.shape == (784, 200) and seconds.shape == (1,)
    for column, w in ((1, before), (3, weights)):
        norm = gradient_norm_squared([v[0] for v in w], x, y, LeakyReLU())
        torch.testing.assert_close(measured[0, column], norm)


def test_a_run_that_diverges_is_left_out_and_the_others_go_on(tmp_path, monkeypatch):
    def run_away(arm, weights, at):
        new, reference = MOVE(arm, weights, at)
        new[1][1, 0, 0] = torch.nan  # the second run
        return new, reference

    arms = {name: PUBLISHED.arms[name] for name in ("plain", "kept")}
    whole = train("Adam", "whole", tmp_path, epochs=3, arms=arms)
    monkeypatch.setattr(script, "move_arm", run_away)
    cut = train("Adam", "diverged", tmp_path, epochs=1, arms=arms)
    state = train("Adam", "diverged", tmp_path, epochs=3, arms=arms)
    np.testing.assert_array_equal(cut["test_loss"][0], state["test_loss"][0])
    for curve in script.CURVES:
        lost = np.isnan(state[curve])
        assert lost[:, 1, 1].all() and lost.sum() == 3  # from the epoch of the moves on
        np.testing.assert_allclose(state[curve][~lost], whole[curve][~lost], rtol=1e-4)
    assert np.isnan(state["moves"][:, 1, 2:, 1]).all()
    assert not np.isnan(state["moves"][:, 1, :4, 0]).any()
    results = {key: state[key] for key in (*script.CURVES, "moves")}
    results |= {"arms": list(arms), "seconds": np.ones((3, 2)), "move_seconds": np.ones(2)}
    results["primary"] = "kept − plain"
    summary = script.summarise("MNIST_Adam", results)
    assert [arm["diverged"] for arm in summary["arms"].values()] == [0, 1]
    assert summary["arms"]["kept"]["moves"] == script.TELEPORTS
    text = script.table({"MNIST_Adam": summary})
    assert "| kept (1 diverged) − plain |" in text


def test_a_stack_that_diverges_stops_with_the_epoch_named(tmp_path):
    experiment = script.EXPERIMENTS["SGD"]._replace(lr=1e30)
    with pytest.raises(UserError, match="SGD-kept, epoch 0: all networks diverge"):
        script.train_stack(
            load_sample("MNIST"), experiment, STACKS["kept"], 2, 3, tmp_path / "SGD-kept", {}, Bar()
        )


def test_reach_is_the_first_epoch_at_the_target():
    loss = np.array([[3.0, 3.0, 3.0], [1.0, 2.0, 3.0], [2.0, 1.0, 3.0]])
    found = script.reach(loss, np.array([10.0, 20.0, 30.0]), np.array([1.5, 1.5, 1.5]))
    assert found == {"runs": 2, "epochs": 2.5, "seconds": 25.0}
    assert script.reach(loss, np.arange(3.0), np.zeros(3))["runs"] == 0


def made_up(runs=4, epochs=6):
    """Results whose statistics are known; arm i is i below plain after each epoch."""
    arms, epoch = len(ARMS), np.arange(epochs)[:, None, None]
    shape = (epochs, arms, runs)
    test_loss = 10.0 - epoch - np.arange(arms)[:, None] + 0.1 * np.arange(runs)
    moves = np.ones((script.TELEPORTS, arms, 5, runs))
    moves[:, :, 2] = 1.25  # loss: + 0.25
    moves[:, :, 3] = 3.0  # |∇L|²: three times
    moves[:, 0] = np.nan  # plain
    moves[:, :, 4] = 0.5  # of the test loss
    return {
        "arms": ARMS,
        "train_loss": np.broadcast_to(test_loss / 2, shape),
        "test_loss": np.broadcast_to(test_loss, shape),
        "moves": moves,
        "move_seconds": np.arange(arms) * 1.5,
        "seconds": np.broadcast_to(10.0 * (1 + epoch[..., 0]), (epochs, arms)),
        "primary": np.array("kept − plain"),
    }


def test_the_table_says_what_made_up_results_say():
    summary = script.summarise("MNIST_Adam", made_up())
    expected = {1: 10.15, 5: 6.15, 6: 5.15}
    assert summary["plain"] == {epoch: pytest.approx(loss) for epoch, loss in expected.items()}
    assert len(summary["differences"]) == len(ARMS)
    for a, b in (name.split(" − ") for name in summary["differences"]):
        gap = ARMS.index(b) - ARMS.index(a)
        for difference in summary["differences"][f"{a} − {b}"].values():
            found = {key: value for key, value in difference.items() if key != "verdict"}
            assert found == pytest.approx({"mean": gap, "low": gap, "high": gap})
    for i, arm in enumerate(ARMS):
        # plain ends at 5; arm i is there i epochs earlier
        entry = summary["arms"][arm]
        assert entry["reaches"] == {"runs": 4, "epochs": 6 - i, "seconds": 10.0 * (6 - i)}
        assert entry["seconds_of_moves"] == 1.5 * i
        assert entry["mean_change_of_loss"] == pytest.approx(0.25 if i else 0)
        assert entry["share_of_moves_made"] == (i > 0)
        factor = entry["median_factor_of_gradient_norm_squared"]
        assert factor is None if i == 0 else factor == pytest.approx(3)
    text = script.table({"MNIST_Adam": summary})
    assert "| MNIST, Adam, lr 0.0001: differences in 10⁻³ | after epoch 1 | after epoch 5 |" in text
    assert text.count("(primary)") == text.count("−1000.0] (primary) |") == 1
    assert "| kept − plain | −1000.0 [−1000.0, −1000.0] |" in text
    assert "| teleport − reset | +1000.0 [" in text
    assert "| kept | 4 | 5 | 50 | 0 | −500.0 [−500.0, −500.0] | 1.50 | +250.00 | +500.00 |" in text


def test_an_arms_time_is_its_share_of_training_and_its_own_moves(tmp_path, monkeypatch):
    options = ["--sample", "--runs", "2", "--epochs", "4", "--optimizer", "AdaGrad"]
    monkeypatch.setattr(sys, "argv", ["script", *options, "--output", str(tmp_path)])
    args = script.parse_arguments()
    moves = {"kept": [0.0, 3.0], "renewed": [4.0, 0.0, 5.0]}
    for stack, arms in STACKS.items():
        path, settings = script.log("MNIST_AdaGrad", arms, args)
        state = {curve: np.zeros((4, len(arms), 2)) for curve in script.CURVES}
        state["moves"] = np.zeros((8, len(arms), 5, 2))
        state["move_seconds"] = np.zeros((4, len(arms)))
        state["move_seconds"][2] = moves[stack]
        seconds = np.array([5.0, 5.0, 5.0, 10.0]) * (1 if stack == "kept" else 2)
        files.save(path, settings, state | {"seconds": seconds, "steps": 4})
    _, results, _ = script.collect("MNIST_AdaGrad", args)
    assert results["arms"] == ["plain", "kept", "teleport", "reset", "random"]
    # 15, 15, 15 and 30 s for five arms; AdaGrad's teleports are in the third epoch
    training = np.array([3.0, 6.0, 9.0, 15.0])[:, None]
    own = np.array([0.0, 3.0, 4.0, 0.0, 5.0])
    expected = training + np.array([0, 0, 1, 1])[:, None] * own
    np.testing.assert_allclose(results["seconds"], expected)


def test_curves_are_drawn_against_epochs_and_seconds(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(script.plots, "save_figure", lambda figure, path: drawn.append(figure))
    results = made_up()
    for against, unit in (("epoch", 1), ("time", 10)):
        script.draw_losses(results, against, "title", tmp_path)
        lines = drawn[-1].axes[0].lines
        assert [line.get_linestyle() for line in lines] == ["--", "-", "--", "-"]
        for line, i, scale in zip(lines, (0, 0, 2, 2), (0.5, 1, 0.5, 1)):
            np.testing.assert_allclose(line.get_xdata(), unit * np.arange(1, 7))
            np.testing.assert_allclose(line.get_ydata(), scale * (10.15 - np.arange(6) - i))


def test_the_sample_ends_with_table_and_figures(tmp_path, call, monkeypatch):
    options = ["--sample", "--runs", "2", "--epochs", "3", "--optimizer", "RMSprop"]
    done = call(script, *options, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    figures = tmp_path / "figures/sample/optimization-2runs-3epochs"
    names = ["loss_vs_epoch", "loss_vs_time", "arms", "teleports"]
    expected = {f"MNIST_RMSprop_{name}.{suffix}" for name in names for suffix in ("pdf", "png")}
    expected |= {"MNIST_RMSprop.npz", "summary.json", "table.md"}
    assert {path.name for path in figures.iterdir()} == expected
    summary = json.loads((figures / "summary.json").read_text("utf-8"))
    assert summary.keys() == {"MNIST_RMSprop"}
    results = files.read(figures / "MNIST_RMSprop.npz").arrays
    difference = np.diff(results["test_loss"][2, :2].mean(1)).item()
    found = summary["MNIST_RMSprop"]["differences"]["kept − plain"]["3"]["mean"]
    assert found == pytest.approx(difference, abs=1e-6)
    assert (figures / "table.md").read_text("utf-8") in done.stdout
    monkeypatch.setattr(script.plots, "save_figure", lambda *_: None)
    shutil.rmtree(tmp_path / "logs")
    again = call(script, *options, "--plot-only", "--output", tmp_path)
    assert again.stdout == done.stdout
    other = call(script, *options, "--plot-only", "--epochs", "9", "--output", tmp_path)
    assert other.returncode == 2 and "run without --plot-only" in other.stderr


def test_the_seconds_of_moves_are_those_they_took():
    data = load_sample("MNIST")
    weights = [w.repeat(2, 1, 1, 1) for w in init_weights(WIDTHS, [1, 2])]
    start = time.perf_counter()
    _, seconds = script.move(weights, STACKS["kept"], {"kept": 0}, data, 5e-2)
    assert 0 == seconds[0] < seconds[1] < time.perf_counter() - start


def test_arms_move_at_their_own_moments(tmp_path):
    arms = {
        "plain": script.Arm(),
        "first": script.Arm(script.TELEPORT, epochs=(0,), moves=2),
        "apart": script.Arm(script.TELEPORT, epochs=(0, 2), moves=2, apart=30),
    }
    alone = train("Adam", "alone", tmp_path, epochs=3, arms={"apart": arms["apart"]})
    state = train("Adam", "together", tmp_path, epochs=3, arms=arms)
    np.testing.assert_allclose(state["test_loss"][:, 2], alone["test_loss"][:, 0], rtol=1e-4)
    moved = ~np.isnan(state["moves"][:, :, 0, 0])
    # mini-batches 0, 1 and 30 of the first epoch, 0 and 30 of the third
    assert moved.T.tolist() == [[False] * 5, [True, True] + 3 * [False], [True, False] + 3 * [True]]
    assert ((state["move_seconds"] > 0) == [[0, 1, 1], [0, 0, 0], [0, 0, 1]]).all()


def test_studies_can_be_trained_and_reported():
    for study in script.STUDIES.values():
        script.check_study(study)
    plain, good = script.STUDIES["published"], script.STUDIES["lr"]
    misspelt = good.arms | {"kept": script.Arm(("teleprt", 1))}
    alone = {"plain": script.Arm(), "random": script.Arm(("random", 0))}
    later = plain.arms | {"later": script.Arm(("random", 0), epochs=(5,))}
    for study, sentence in (
        (plain._replace(primary="teleprt"), "its primary, 'teleprt', among kept, teleport"),
        (good._replace(arms=misspelt), "'kept' needs .* a move of stay, random"),
        (good._replace(arms={"none": script.Arm()}), "needs plain first"),
        (good._replace(arms=good.arms | {"a − b": script.Arm()}), "'a − b' needs a name without"),
        (good._replace(arms=alone, primary="random"), "'random' needs one above it"),
        (plain._replace(arms=later), "'later' needs one above it that teleports at the same"),
    ):
        with pytest.raises(files.UserError, match=sentence):
            script.check_study(study)


def test_other_moves_go_as_far_as_the_teleport():
    data = load_sample("MNIST")
    weights = init_weights(WIDTHS, [1, 2, 3])
    x, y = shuffled_batch(data, script.TELEPORT_BATCH, 0)

    def moved(*move, reference=None):
        at = script.Moment(x, y, 5e-2, torch.Generator().manual_seed(0), reference)
        return script.move_arm(script.Arm(move), weights, at)

    def length(new):
        way = [a - b for a, b in zip(new, weights)]
        return inner_product(way, way).sqrt()

    def norm(new):
        return gradient_norm_squared(new, x, y, LeakyReLU())

    def loss(new):
        return cross_entropy(new, x, y, LeakyReLU())

    teleported, reference = moved(*script.TELEPORT)
    torch.testing.assert_close(length(teleported), reference.length)
    step, _ = moved("gradient step", 0, reference=reference)
    torch.testing.assert_close(length(step), reference.length)
    assert (loss(step) < loss(weights)).all()
    level, _ = moved("level set", 5, reference=reference)
    assert (length(level) < 1.2 * reference.length).all()
    assert (loss(level) - loss(weights)).abs().max() < 1e-3
    assert norm(level).mean() > norm(weights).mean()  # a step may cross a kink
    rescaled, _ = moved("rescale", 2)
    torch.testing.assert_close(loss(rescaled), loss(weights))
    growth = norm(rescaled) / norm(weights)
    assert (growth >= 2 ** (1 / 8)).all() and (growth < 1.2).all()


def test_the_best_learning_rate_is_plains(tmp_path, call):
    options = ["--sample", "--runs", "2", "--epochs", "3", "--optimizer", "SGD", "--study", "lr"]
    done = call(script, *options, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "figures/sample/optimization-lr-2runs-3epochs"
    assert (folder / "MNIST_SGD_rates.png").exists()
    summaries = json.loads((folder / "summary.json").read_text("utf-8"))
    assert [s["lr"] for s in summaries.values()] == [0.003, 0.01, 0.03, 0.1]
    best = min(summaries, key=lambda part: summaries[part]["plain"]["3"])
    assert done.stdout.count("(best)") == 1
    assert f"| MNIST, SGD, lr {summaries[best]['lr']:g} (best) |" in done.stdout
