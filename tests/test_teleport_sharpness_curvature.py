"""teleport_sharpness_curvature.py: its arms, its measurements, and the script on the sample."""

import contextlib
import json
import shutil
import sys

from experiment import files
from experiment.files import UserError

import numpy as np
import pytest
import torch

import teleport_sharpness_curvature as script
from data import load_sample, shuffled_batch
from models import LeakyReLU, cross_entropy, forward, init_weights, train_epoch_sgd
from teleportation import RESCALING, act, curvature_along

MNIST = script.EXPERIMENTS["MNIST"]
SETTINGS = {"runs": 2}
NONE = torch.zeros(len(script.ARMS), 2, dtype=bool)  # has diverged


@contextlib.contextmanager
def shorter_course():
    """15 epochs, two teleports in the 13th, few directions."""
    settings = {
        "EPOCHS": 15,
        "TELEPORT_EPOCH": 12,
        "EPOCHS_SHOWN": (13, 14, 15),
        "MOST_TELEPORTS": 2,
    }
    settings |= {"ESTIMATION_BATCHES": 2, "TELEPORT_BATCH": 300}
    settings |= {"MEASURED_DIRECTIONS": 2, "RESCALING_STEPS": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "MNIST", MNIST._replace(directions=2))
        for name, value in settings.items():
            patch.setattr(script, name, value)
        yield


@pytest.fixture
def short():
    with shorter_course():
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run of the shorter course returns."""
    with shorter_course():
        return train(tmp_path_factory.mktemp("whole") / "whole.npz")


@pytest.fixture(scope="module")
def trained():
    """Two networks after 12 epochs on the sample, as [arms, runs, d_{m+1}, d_m]."""
    data, weights = load_sample("MNIST"), init_weights(MNIST.training.widths, [1, 2])
    for _ in range(12):
        train_epoch_sgd(weights, data.x_train, data.y_train, MNIST.training.lr, LeakyReLU())
    return [w.repeat(len(script.ARMS), 1, 1, 1) for w in weights]


def train(path):
    return script.train(load_sample("MNIST"), MNIST, 2, path, SETTINGS)


def test_published_teleports():
    for name, rates in (
        ("CIFAR10", (-5e-2, 5e-2, -5e-2, 2e-1)),
        ("MNIST", (-5e-2, 5e-2, -5e-2, 2e-1)),
        ("FashionMNIST", (-3e-1, 1e-1, -3e-3, 5e-3)),
    ):
        teleports = list(script.EXPERIMENTS[name].teleports.values())
        assert [t.lr for t in teleports] == list(rates)
        assert [t.number for t in teleports] == [10, 2, 5, 10 if name == "CIFAR10" else 5]
        assert [t.stop for t in teleports] == [4.0, 2.0, np.inf, np.inf]
    assert script.SHARPNESS_STEPS == 10
    np.testing.assert_allclose(script.TELEPORT_RADII, np.arange(0.1, 0.95, 0.1))
    assert MNIST.directions == 100 and (script.EPOCHS, script.TELEPORT_EPOCH) == (40, 20)


def test_arms_are_one_until_the_teleports_and_plain_is_plain_sgd(whole):
    loss = {arm: whole["test_loss"][:, i] for i, arm in enumerate(script.ARMS)}
    for arm in script.ARMS:
        np.testing.assert_array_equal(loss[arm][:12], loss["plain"][:12])
        if arm not in ("plain", "refit"):
            assert (np.abs(loss[arm][12:] - loss["plain"][12:]) > 1e-7).all(), arm
    # with more images than hidden units the refit is the identity but for rounding
    np.testing.assert_allclose(loss["refit"], loss["plain"], rtol=1e-3)

    data, weights = load_sample("MNIST"), init_weights(MNIST.training.widths, [54321, 2 * 54321])
    for epoch in range(15):
        expected = train_epoch_sgd(
            weights, data.x_train, data.y_train, MNIST.training.lr, LeakyReLU()
        )
        np.testing.assert_allclose(whole["train_loss"][epoch, 0], expected, rtol=1e-4)


def test_an_interrupted_run_ends_with_the_same_numbers(short, whole, tmp_path, monkeypatch):
    original = files.save
    for stop in (11, 2, 3):  # before the teleports, between them, after them
        saves = []

        def save(*arguments, stop=stop, saves=saves):
            original(*arguments)
            saves.append(1)
            if len(saves) == stop:
                raise KeyboardInterrupt

        monkeypatch.setattr(files, "save", save)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "cut.npz")
    monkeypatch.setattr(files, "save", original)
    resumed = train(tmp_path / "cut.npz")
    assert resumed.keys() == whole.keys()
    for key in whole:
        np.testing.assert_array_equal(whole[key], resumed[key], err_msg=key)


def test_a_move_is_what_the_log_says(short, trained):
    data = load_sample("MNIST")
    start, weights = [w[0] for w in trained], [w.clone() for w in trained]
    moves = script.move(weights, data, MNIST, 0, NONE)
    assert moves.shape == (len(script.ARMS), 2, 2, 3, 2)
    d = MNIST.training.widths[2]
    M = torch.rand(d, d, generator=torch.Generator().manual_seed(54321))
    for b, k in enumerate((0, script.MOST_TELEPORTS)):
        x, y = shuffled_batch(data, script.TELEPORT_BATCH, k)
        for i, arm in enumerate(script.ARMS):
            own = [w[i] for w in weights]
            for end, now in enumerate((start, own)):
                measured = moves[i, b, end]
                torch.testing.assert_close(measured[0], cross_entropy(now, x, y, LeakyReLU()))
                kappa, _ = curvature_along(now, x, M, script.PAIR, LeakyReLU())
                torch.testing.assert_close(measured[2], kappa, rtol=1e-2, atol=1e-4)
            moved = any((a - b).abs().max() > 1e-3 for a, b in zip(own, start))
            assert moved == (arm not in ("plain", "refit")), arm
    phi = moves[:, 0, :, 1].mean(-1)  # on the teleport's batch: [arms, before and after]
    change = dict(zip(script.ARMS, (phi[:, 1] - phi[:, 0]).tolist()))
    assert change["sharpness decrease"] < 0 < change["sharpness increase"]


def test_rescaled_arms_go_where_their_partners_are(short, trained, monkeypatch):
    monkeypatch.setattr(script, "RESCALING_STEPS", 20)
    data, weights = load_sample("MNIST"), [w.clone() for w in trained]
    moves = dict(zip(script.ARMS, script.move(weights, data, MNIST, 0, NONE)))
    for arm, rescaled in script.RESCALED.items():
        own = [w[script.ARMS.index(rescaled)] for w in weights]
        expected = forward([w[0] for w in trained], data.x_test.T, LeakyReLU())
        torch.testing.assert_close(
            forward(own, data.x_test.T, LeakyReLU()), expected, rtol=1e-4, atol=1e-4
        )
        measure = script.MEASURED.index(script.SYMBOLS[arm.split()[0]])
        start, partner = moves[arm][0, :, measure]
        reached = moves[rescaled][0, 1, measure]
        assert ((reached - start) * (partner - start) > 0).all(), rescaled  # the same direction
        if arm != "sharpness decrease":  # φ can't fall as far without the loss
            assert ((reached - partner).abs() < 0.1 * (partner - start).abs()).all(), arm


def test_a_network_without_a_target_stays(trained):
    weights = [w[0] for w in trained]
    targets = torch.tensor([torch.nan, 50.0])
    new = script.rescale_to(weights, torch.eye(784)[:, :9], lambda w: w[2].sum((-2, -1)), targets)
    for before, after in zip(weights, new):
        torch.testing.assert_close(before[0], after[0])
    assert (weights[2][1] - new[2][1]).abs().max() > 1e-3


def test_controls_are_as_long_as_what_they_control(short, trained, monkeypatch):
    def log_of(g):
        return g.diagonal(dim1=-2, dim2=-1).log().norm(dim=-1)

    def distance(g):
        return (g - torch.eye(g.shape[-1])).norm(dim=(-2, -1))

    acted, given, draw = [], [], script.random_group_elements
    monkeypatch.setattr(script, "act", lambda w, x, g, *how: acted.append(g) or act(w, x, g, *how))
    monkeypatch.setattr(
        script, "random_group_elements", lambda g, *how: given.append(g) or draw(g, *how)
    )
    script.move([w.clone() for w in trained], load_sample("MNIST"), MNIST, 0, NONE)
    refit, *controls = acted
    assert all((distance(g) == 0).all() for g in refit)
    for length, elements, controlled in zip([distance] * 2 + [log_of] * 2, controls, given):
        for g, other in zip(elements, controlled):
            torch.testing.assert_close(length(g), distance(other))
    assert (distance(controls[1][0]) == 0).all() and (distance(controls[1][1]) > 0).all()


def test_elements_of_a_rescaling_are_its_own(trained):
    weights = [w[0] for w in trained]
    T = [0.3 * torch.randn(2, d, generator=torch.Generator().manual_seed(d)) for d in (16, 10)]
    elements = [torch.diag_embed(t.exp()) for t in T]
    rescaled = act(weights, torch.zeros(784, 1), elements, LeakyReLU(), RESCALING)
    for found, t in zip(script.elements_of_rescaling(weights, rescaled), T):
        torch.testing.assert_close(found, torch.eye(t.shape[-1]) + torch.diag_embed(t))


def test_a_network_that_diverges_is_left_out_and_the_others_go_on(
    short, whole, tmp_path, monkeypatch
):
    teleport = script.teleport_curvature

    def run_away(weights, *arguments, **limits):
        new, g = teleport(weights, *arguments, **limits)
        new[1][0, 1] = 1e30  # of curvature decrease, the second network
        return new, g

    monkeypatch.setattr(script, "teleport_curvature", run_away)
    state = train(tmp_path / "diverged.npz")
    arm = script.ARMS.index("curvature decrease")
    expected = NONE.numpy().copy()
    expected[arm, 1] = True
    np.testing.assert_array_equal(state["diverged"], expected)
    others = ~expected
    others[script.ARMS.index("curvature decrease, rescaled"), 1] = False  # had another target
    for curve in script.CURVES:
        np.testing.assert_array_equal(np.isnan(state[curve][12:]), np.tile(expected, (3, 1, 1)))
        assert not np.isnan(state[curve][:12]).any()
        np.testing.assert_allclose(state[curve][12:, others], whole[curve][12:, others], 1e-4)
    summary = script.summarise("MNIST", state | {"arms": script.ARMS})
    assert summary["diverged"]["curvature decrease"] == 1
    assert np.isnan(summary["differences"]["curvature decrease − plain"][13]["low"])
    alone = state["test_loss"][12, [arm, 0], 0]
    mean = summary["differences"]["curvature decrease − plain"][13]["mean"]
    assert mean == pytest.approx(alone[0] - alone[1])
    text = script.table({"MNIST": summary})
    row = "| curvature decrease (1 diverged) − plain (claim: rises) | – too few |"
    assert row in text


def test_plain_sgd_that_diverges_ends_with_a_sentence(short, tmp_path, monkeypatch):
    fast = MNIST._replace(training=MNIST.training._replace(lr=1e3))
    monkeypatch.setattr(sys.modules[__name__], "MNIST", fast)
    with pytest.raises(UserError, match="MNIST, epoch 0: all networks diverge"):
        train(tmp_path / "plain.npz")


@pytest.mark.parametrize(
    ("claim", "low", "high", "expected"),
    [
        ("rises", 0.1, 0.2, "holds"),
        ("rises", -0.1, 0.2, "not seen"),
        ("rises", -0.2, -0.1, "opposite"),
        ("falls", -0.2, -0.1, "holds"),
        ("falls", 0.1, 0.2, "opposite"),
        ("changes little", -0.01, 0.01, "holds"),
        ("changes little", 0.01, 0.02, "holds"),  # not 0, and little
        ("changes little", -0.1, 0.01, "open"),
        ("changes little", 0.1, 0.2, "does not hold"),
        ("changes little", -0.2, -0.1, "does not hold"),
    ],
)
def test_verdicts(claim, low, high, expected):
    assert script.verdict(claim, {"low": low, "high": high}, little=0.03) == expected


def test_the_sample_ends_with_table_and_figures(short, tmp_path, call, monkeypatch):
    options = ["--sample", "--dataset", "MNIST", "--runs", "2", "--output", tmp_path]
    done = call(script, *options)
    assert done.returncode == 0, done.stderr
    figures = tmp_path / "figures/sample/generalization-2runs"
    names = ["sharpness", "curvature", "sharpness_and_curvature_along_training"]
    expected = {f"MNIST_{name}.{suffix}" for name in names for suffix in ("pdf", "png")}
    assert {path.name for path in figures.iterdir()} == expected | {
        "MNIST.npz",
        "summary.json",
        "table.md",
    }
    summary = json.loads((figures / "summary.json").read_text("utf-8"))["MNIST"]
    loss = files.read(figures / "MNIST.npz").arrays["test_loss"][13].mean(1)
    decrease, random = (loss[script.ARMS.index(arm)] for arm in ("sharpness decrease", "random"))
    found = summary["differences"]["sharpness decrease − random"]["14"]["mean"]
    assert found == pytest.approx(decrease - random, abs=1e-6)
    assert (figures / "table.md").read_text("utf-8") in done.stdout
    monkeypatch.setattr(script.plots, "save_figure", lambda *_: None)
    shutil.rmtree(tmp_path / "logs")
    assert call(script, *options, "--plot-only").stdout == done.stdout
    other = call(script, *options, "--plot-only", "--runs", "3")
    assert other.returncode == 2 and "run without --plot-only" in other.stderr


def test_the_samples_teleports_are_a_tenth(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script", "--sample"])
    experiment, _, settings = script.log("CIFAR10", script.parse_arguments())
    published = script.EXPERIMENTS["CIFAR10"]
    assert experiment.directions == 10 and experiment.max_tm_norm == pytest.approx(0.5)
    assert settings["experiment"] == experiment
    for arm, teleports in experiment.teleports.items():
        assert teleports.lr == pytest.approx(0.1 * published.teleports[arm].lr)
        assert teleports._replace(lr=0) == published.teleports[arm]._replace(lr=0)


def test_the_summary_says_what_made_up_results_say():
    """Arm i is i above plain; each move raises loss, φ and κ by 1, 2, 3, on fresh batches half."""
    arms, runs = len(script.ARMS), 3
    loss = 10 + np.arange(arms)[:, None] + 0.1 * np.arange(runs)
    moves = np.zeros((script.MOST_TELEPORTS, arms, 2, 2, 3, runs))
    moves[:, :, :, 0] = np.array([5, 6, 7])[:, None]
    for batch, share in enumerate((1, 0.5)):
        moves[:, :, batch, 1] = moves[:, :, batch, 0] + share * np.array([1, 2, 3])[:, None]
    results = {
        "arms": script.ARMS,
        "test_loss": np.broadcast_to(loss, (40, arms, runs)),
        "moves": moves,
        "diverged": np.zeros((arms, runs), bool),
    }
    summary = script.summarise("MNIST", results)
    assert summary["plain"] == dict.fromkeys((21, 25, 40), pytest.approx(10.1))
    for i, arm in enumerate(script.ARMS[1:], 1):
        assert summary["differences"][f"{arm} − plain"][25]["mean"] == pytest.approx(i)
        assert summary["moves"][arm] == {
            "before": {"loss": 5, "φ": 6, "κ": 7},
            "change_on_their_batches": pytest.approx({"loss": 10, "φ": 20, "κ": 30}),
            "on_fresh_batches": pytest.approx({"loss": 5, "φ": 10, "κ": 15}),
            "networks": runs,
        }
    verdicts = {
        pair: after[40]["verdict"]
        for pair, after in summary["differences"].items()
        if "verdict" in after[40]
    }
    assert verdicts == {
        "sharpness decrease − plain": "does not hold",
        "sharpness increase − plain": "holds",
        "curvature decrease − plain": "holds",
        "curvature increase − plain": "opposite",
        "sharpness decrease, rescaled − plain": "does not hold",
        "sharpness increase, rescaled − plain": "holds",
        "curvature decrease, rescaled − plain": "holds",
        "curvature increase, rescaled − plain": "opposite",
        "sharpness decrease − random": "does not hold",
        "curvature increase − random in one pair": "holds",
        "sharpness increase, rescaled − random rescaling": "opposite",
        "curvature increase, rescaled − random rescaling (curvature)": "holds",
    }
    # sharpness decrease is 1 above plain and 8 below its control, random
    assert summary["differences"]["sharpness decrease − random"][40]["mean"] == pytest.approx(-8)
    text = script.table({"MNIST": summary})
    row = "| sharpness decrease − plain (claim: changes little) | +1000.0 [+1000.0, +1000.0]"
    assert row in text and "| refit − plain | +13000.0 [" in text
    assert "| MNIST, refit | 3 | 5 | 6 | 7 | 10 | 20 | 30 | 5 | 10 | 15 |" in text
    rows = [line for line in text.splitlines() if line.startswith("| MNIST, ")]
    assert len(rows) == arms - 1  # plain does not move


def test_results_of_fewer_arms_are_reported():
    """Shipped results may be of fewer arms than the code has: their controls may be missing."""
    arms = script.ARMS[:5]
    results = {
        "arms": arms,
        "test_loss": np.ones((40, 5, 3)),
        "moves": np.zeros((script.MOST_TELEPORTS, 5, 2, 2, 3, 3)),
        "diverged": np.zeros((5, 3), bool),
    }
    summary = script.summarise("MNIST", results)
    assert list(summary["differences"]) == [f"{arm} − plain" for arm in arms[1:]]
    assert list(script.arms_of("sharpness", results)) == list(arms[:3])
