"""teleport_sharpness_curvature.py: its teleports, what a run saves, and what is said of it."""

import functools
import json
import shutil
import sys

import numpy as np
import pytest
import torch

import teleport_sharpness_curvature as script
from data import load_sample, shuffled_batch
from experiment import results
from models import init_weights, run_seeds, train_epoch_sgd

PUBLISHED = dict(script.SETTINGS)
SMALL = PUBLISHED["MNIST"]._replace(
    teleport_lr=(-5.0, 5.0, -5e-2, 2e-1),
    teleports=(2, 1, 2, 2),
    stop=(4.0, 4.0),
    radii=(0.3, 0.6),
    directions=20,
    sharpness_steps=2,
    epochs=5,
    teleport_epoch=3,
    teleport_batch=300,
    measured_directions=1,
    estimation_batches=2,
)
OPTIONS = "--sample", "--dataset", "MNIST", "--runs", "4", "--processes", "1", "--output"
FOLDER = "figures/sample/4runs/generalization"


@pytest.fixture(scope="module", autouse=True)
def small():
    """Five epochs, two moves before the fourth, and two runs in a stack."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(script.SETTINGS, "MNIST", SMALL)
        patch.setattr(script, "STACK", 2)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory, small):
    """The --output of a run on the sample."""
    output = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script", *OPTIONS, str(output)])
        script.main()
    return output


@pytest.fixture
def train(call, tmp_path):
    """A function that does such a run in another folder and returns what it saves."""

    def train(name):
        done = call(script, *OPTIONS, tmp_path / name)
        assert done.returncode == 0, done.stderr
        return read(tmp_path / name)

    return train


def read(output):
    return results.read(output / FOLDER / "MNIST.npz").arrays


@functools.cache
def trained(arms):
    """Return two networks for each arm after 12 epochs on the sample, and the moves' batch."""
    data, weights = load_sample("MNIST"), init_weights(SMALL.widths, [2, 3])
    for _ in range(12):
        train_epoch_sgd(weights, data.x_train, data.y_train, SMALL.lr, script.ACTIVATION)
    weights = [w.repeat(arms, 1, 1, 1) for w in weights]
    return weights, *shuffled_batch(data, SMALL.teleport_batch, 0)


# Settings and moves


def test_the_settings_are_the_published_ones():
    lrs = {name: setting.teleport_lr for name, setting in PUBLISHED.items()}
    assert lrs["CIFAR10"] == lrs["MNIST"] == (-5e-2, 5e-2, -5e-2, 2e-1)
    assert lrs["FashionMNIST"] == (-3e-1, 1e-1, -3e-3, 5e-3)
    for name, setting in PUBLISHED.items():
        assert setting.teleports == (10, 2, 5, 10 if name == "CIFAR10" else 5)
        assert (setting.sharpness_steps, setting.directions) == (10, 100)
        assert (setting.epochs, setting.teleport_epoch, setting.teleport_batch) == (40, 20, 2000)
        np.testing.assert_allclose(setting.radii, np.arange(0.1, 0.95, 0.1))


def test_teleports_change_what_they_are_to_change():
    weights, x, y = trained(arms=4)
    weights, x = [w.double() for w in weights], x.double()
    # κ jumps where an activation changes its sign, so steps are small
    setting = SMALL._replace(teleport_lr=(-5e-2, 5e-2, -1e-6, 1e-6))
    before = script.measure(weights, x, y, 0, setting)
    script.teleport_arms(weights, x, y, 0, setting)
    after = script.measure(weights, x, y, 0, setting)
    for key, arms in (("perturbed_loss", slice(0, 2)), ("kappa", slice(2, 4))):
        decrease, increase = (after[key] - before[key])[arms]
        assert (decrease < 0).all() and (increase > 0).all(), key


@pytest.mark.parametrize(
    ("k", "stop", "moving"),
    [
        (0, (4.0, 4.0), [True, True, True, True]),
        (1, (4.0, 4.0), [True, False, True, True]),
        (2, (4.0, 4.0), [False, False, False, False]),
        (0, (4.0, 0.01), [True, False, True, True]),
        (0, (0.01, 4.0), [False, True, True, True]),
    ],
)
def test_a_teleport_ends_with_its_number_and_stops_above_its_bound(k, stop, moving):
    start, x, y = trained(arms=4)
    weights = [w.clone() for w in start]
    elements = script.teleport_arms(weights, x, y, k, SMALL._replace(stop=stop))
    assert (weights[1] != start[1]).flatten(1).any(1).tolist() == moving
    assert (elements is None) == (k == 2)


def test_random_moves_are_as_long_as_teleports_and_each_runs_own():
    elements = [torch.eye(d) + torch.randn(4, d, d) for d in (16, 10)]
    drawn = script.random_elements(elements, 1, range(4))
    second_half = script.random_elements([g[2:] for g in elements], 1, range(2, 4))
    for g, drawn_g, part in zip(elements, drawn, second_half):
        lengths = [(h - torch.eye(g.shape[-1])).norm(dim=(-2, -1)) for h in (g, drawn_g)]
        torch.testing.assert_close(*lengths)
        assert not torch.equal(g, drawn_g) and torch.equal(drawn_g[2:], part)


# A run


def test_a_run_saves_what_it_did(whole):
    saved = read(whole)
    arms, loss = list(script.ARMS), saved["test_loss"]
    assert list(saved["arms"]) == arms and loss.shape == (5, len(arms), 4)
    assert (loss[:3] == loss[:3, :1]).all()  # until the moves all are one
    assert (np.abs(loss[3:] - loss[3:, :1]) > 1e-7).any(-1)[:, 1:-1].all()
    # with more images than hidden units the refit is the identity but for rounding
    np.testing.assert_allclose(loss[:, arms.index("refit")], loss[:, 0], rtol=1e-4)

    data, weights = load_sample("MNIST"), init_weights(SMALL.widths, run_seeds(range(4)))
    for expected in saved["train_loss"][:, 0]:
        train_loss = train_epoch_sgd(
            weights, data.x_train, data.y_train, SMALL.lr, script.ACTIVATION
        )
        np.testing.assert_allclose(train_loss, expected, rtol=1e-5)

    before, after = saved["perturbed_loss"].swapaxes(0, 1)  # [moves, arms, runs]
    np.testing.assert_array_equal(before[:, 0], after[:, 0])  # plain does not move
    assert (before[:, 1] != after[:, 1]).all()
    assert (before[:, 2] != after[:, 2]).all(-1).tolist() == [True, False]


def test_golden_numbers_of_the_first_run(whole):
    saved = read(whole)
    loss = [2.241400, 2.241720, 2.240734, 2.241616, 2.240746]  # of plain and the paper's arms
    np.testing.assert_allclose(saved["test_loss"][-1, :5, 0], loss, rtol=2e-5)
    for key, arms, change in (
        ("perturbed_loss", slice(1, 3), [-0.002180, 0.002290]),
        ("kappa", slice(3, 5), [-0.6468, -0.1454]),
    ):
        before, after = saved[key].swapaxes(0, 1)[:, :, arms, 0].sum(1, dtype=float)
        np.testing.assert_allclose(after - before, change, rtol=1e-2)  # for rounding


def test_a_run_that_is_interrupted_ends_with_the_same_numbers(whole, train, monkeypatch):
    save, saves = results.save, []

    def stopping(*arguments):
        save(*arguments)
        saves.append(arguments)
        if len(saves) in (2, 4, 6):  # before the moves, after them, and in the second stack
            raise KeyboardInterrupt

    monkeypatch.setattr(results, "save", stopping)
    for _ in range(3):
        with pytest.raises(AssertionError, match="Interrupted"):
            train("cut")
    expected, resumed = read(whole), train("cut")
    assert expected.keys() == resumed.keys()
    for key in expected:
        np.testing.assert_array_equal(resumed[key], expected[key], err_msg=key)


def test_a_network_that_diverges_is_counted_and_leaves_the_others_alone(whole, train, monkeypatch):
    teleport = script.teleport_curvature
    monkeypatch.setattr(script, "STACK", 4)  # larger products may round otherwise

    def run_away(*arguments):
        weights, g = teleport(*arguments)
        weights[1][0, 1] = 1e30  # of curvature decrease, the second run
        return weights, g

    monkeypatch.setattr(script, "teleport_curvature", run_away)
    healthy, saved = read(whole), train("diverged")
    arm = script.ARMS.index("curvature decrease")
    expected = np.zeros((len(script.ARMS), 4), bool)
    expected[arm, 1] = True
    np.testing.assert_array_equal(saved["diverged"], expected)
    for key in script.CURVES:
        curve = saved[key]
        assert np.isnan(curve[3:, expected]).all() and not np.isnan(curve[:3]).any()
        np.testing.assert_allclose(curve[:, ~expected], healthy[key][:, ~expected], rtol=1e-3)
    for key in script.MEASURES:
        assert np.isnan(saved[key][:, :, expected]).all()
    summary = script.summarise(saved, script.PAPER)
    assert summary["diverged"]["curvature decrease"] == 1
    assert summary["moves"]["curvature decrease"]["networks"] == 3
    mean = (saved["test_loss"][4, arm] - saved["test_loss"][4, 0])[[0, 2, 3]].mean()
    assert summary["differences"]["curvature decrease − plain"][5]["mean"] == pytest.approx(mean)
    text = script.loss_table("MNIST", summary, script.CLAIMS)
    assert "| curvature decrease (1 diverged) − plain (claim: rises) |" in text


def test_networks_that_all_diverge_end_the_run_with_a_sentence(call, tmp_path, monkeypatch):
    monkeypatch.setitem(script.SETTINGS, "MNIST", SMALL._replace(lr=1e3))
    done = call(script, *OPTIONS, tmp_path)
    assert done.returncode == 2 and "MNIST, epoch 0: all networks diverge" in done.stderr


def test_tables_and_figures_are_drawn_from_what_is_saved(whole, call, tmp_path):
    folder = tmp_path / FOLDER
    folder.mkdir(parents=True)
    shutil.copy(whole / FOLDER / "MNIST.npz", folder)
    done = call(script, *OPTIONS, tmp_path, "--plot-only")
    assert done.returncode == 0, done.stderr
    names = "MNIST.npz", "MNIST_losses.png", "MNIST_differences.png", "summary.json", "table.md"
    assert {path.name for path in folder.iterdir()} == {*names}
    for name in names:
        assert (folder / name).read_bytes() == (whole / FOLDER / name).read_bytes()
    assert (folder / "table.md").read_text("utf-8") in done.stdout
    summary = json.loads((folder / "summary.json").read_text("utf-8"))["MNIST"]
    difference = summary["differences"]["sharpness decrease − random"]["5"]["mean"]
    loss = dict(zip(script.ARMS, read(whole)["test_loss"][-1].mean(-1)))
    assert difference == pytest.approx(loss["sharpness decrease"] - loss["random"], abs=1e-6)
    other = call(script, *OPTIONS, tmp_path, "--plot-only", "--runs", "3")
    assert other.returncode == 2 and "run without --plot-only" in other.stderr


# What is said of results


@pytest.mark.parametrize(
    ("claim", "low", "high", "expected"),
    [
        ("rises", np.nan, np.nan, ""),  # too few runs
        ("rises", 0.1, 0.2, "holds"),
        ("rises", -0.1, 0.2, "not seen"),
        ("falls", -0.2, -0.1, "holds"),
        ("falls", 0.1, 0.2, "opposite"),
        ("changes little", 0.01, 0.02, "holds"),  # not 0, and little
        ("changes little", -0.1, 0.01, "open"),
        ("changes little", 0.1, 0.2, "does not hold"),
        ("changes little", -0.2, -0.1, "does not hold"),
    ],
)
def test_verdicts(claim, low, high, expected):
    assert script.verdict(claim, {"low": low, "high": high}, little=0.03) == expected


def test_the_summary_says_what_made_up_results_say():
    """Arm i is i above plain; each of two moves raises loss, perturbed loss and κ by 1, 2, 3."""
    arms, runs = len(script.ARMS), 3
    loss = 10 + np.arange(arms)[:, None] + 0.1 * np.arange(runs)
    made_up = {"test_loss": np.stack([loss] * 40), "diverged": np.zeros((arms, runs), bool)}
    for i, key in enumerate(script.MEASURES):
        made_up[key] = np.zeros((2, 2, arms, runs)) + np.array([5, 6 + i])[:, None, None]
    summary = script.summarise(made_up, script.PAPER)
    assert summary["plain"] == dict.fromkeys((21, 25, 40), pytest.approx(10.1))
    differences = summary["differences"]
    assert list(differences)[-1] == "sharpness decrease − random"
    means = [difference[25]["mean"] for difference in differences.values()]
    assert means == pytest.approx([1, 2, 3, 4, 5, 6, -4])
    verdicts = [difference[40].get("verdict") for difference in differences.values()]
    assert verdicts == ["does not hold", "holds", "holds", "opposite", None, None, None]
    text = script.loss_table("MNIST", summary, script.CLAIMS)
    row = "| sharpness decrease − plain (claim: changes little) | +1000.0 [+1000.0, +1000.0]"
    assert row in text and "| refit − plain | +6000.0 [" in text
    assert "| MNIST, refit | 3 | 5 | 5 | 5 | 2 | 4 | 6 |" in script.move_table({"MNIST": summary})
