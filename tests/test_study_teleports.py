"""studies/teleports.py: when arms move, how far their moves go, and a question on the sample."""

from functools import partial

import pytest
import torch

import teleports as study
from data import load_sample, shuffled_batch
from experiment import results
from models import TRAINING, LeakyReLU, cross_entropy, init_weights
from parameter_symmetries.ascent import slopes
from teleportation import RESCALING, gradient_norm_squared, inner_product, orbit_of

WEIGHTS = init_weights(TRAINING["MNIST"].widths, [1, 2, 3])
X, Y = shuffled_batch(load_sample("MNIST"), 200, 0)


def move(function, **options):
    return function(WEIGHTS, X, Y, 5e-2, torch.Generator().manual_seed(0), **options)


def change(function, weights):
    """Return how a function of weights changes from WEIGHTS to others, as a factor."""
    return function(weights, X, Y, LeakyReLU()) / function(WEIGHTS, X, Y, LeakyReLU())


def length(weights):
    way = [new - old for new, old in zip(weights, WEIGHTS)]
    return inner_product(way, way).sqrt()


def test_the_sample_ends_with_a_table_and_a_figure(tmp_path, call):
    chosen = ["--question", "action", "--optimizer", "momentum", "--sample", "--runs", 2]
    chosen += ["--epochs", 1, "--output", tmp_path]
    done = call(study, *chosen, "--processes", 1)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "figures/sample/2runs-1epochs/teleports/action/MNIST"
    expected = {"momentum-lr0.001.npz", "differences.png", "summary.json", "table.md"}
    assert {path.name for path in folder.iterdir()} == expected
    assert (folder / "table.md").read_text("utf-8") in done.stdout
    result = results.read(folder / "momentum-lr0.001.npz")
    assert result.arrays["arms"].tolist() == list(study.ACTION)
    assert result.settings["lr"] == 1e-3 == result.settings["optimizer_defaults"]["lr"]
    assert call(study, *chosen, "--plot-only").stdout == done.stdout
    other = call(study, *chosen, "--plot-only", "--optimizer", "Adam")
    assert other.returncode == 2 and "run without --plot-only" in other.stderr


def test_arms_move_at_their_own_moments():
    arms = {
        "plain": study.PLAIN,
        "published": study.Arm(study.pseudoinverse, moves=2),
        "apart": study.Arm(study.pseudoinverse, epochs=(0, 2, 9), moves=2, spacing=30),
        "often": study.Arm(study.pseudoinverse, every_epoch=True, moves=100, spacing=30),
    }
    assert study.moments_of(arms, published=1, epochs=3, batches=50) == {
        0: {0: {"apart": 0, "often": 0}, 30: {"apart": 1, "often": 1}},
        1: {0: {"published": 0, "often": 2}, 1: {"published": 1}, 30: {"often": 3}},
        2: {0: {"apart": 2, "often": 4}, 30: {"apart": 3, "often": 5}},
    }


@pytest.mark.parametrize("name", study.QUESTIONS)
def test_a_question_compares_arms_that_it_has(name):
    primary, arms = study.QUESTIONS[name]
    assert next(iter(arms)) == "plain" and primary.removesuffix(" − plain") in arms


def test_moves_off_the_orbit_are_as_long_as_the_teleport():
    teleported = move(study.pseudoinverse)
    gradient_step, level_set = move(study.gradient_step), move(study.level_set)
    torch.testing.assert_close(length(gradient_step), length(teleported))
    assert (change(cross_entropy, gradient_step) < 1).all()
    assert (length(level_set) < 1.2 * length(teleported)).all()
    assert (change(cross_entropy, level_set) - 1).abs().max() < 1e-3
    assert change(gradient_norm_squared, level_set).mean() > 1  # a step may cross a kink


def test_ascent_within_the_level_set_keeps_the_loss_and_beats_rescaling(monkeypatch):
    weights, x, activation = [w.double() for w in WEIGHTS], X.double(), LeakyReLU()

    def norm(weights):
        return gradient_norm_squared(weights, x, Y, activation)

    orbit = orbit_of(weights, x, activation, RESCALING)
    _, slope = slopes(orbit, norm, weights)
    rescaled = orbit.act(weights, [RESCALING.element(1e-4 * t / t.norm()) for t in slope])
    way = [new - old for new, old in zip(rescaled, weights)]
    monkeypatch.setitem(study.LAST, "length", inner_product(way, way).sqrt())
    monkeypatch.setattr(study.script, "STEPS", 1)
    moved = study.level_set(weights, x, Y, None, None)
    loss, new_loss = (cross_entropy(w, x, Y, activation) for w in (weights, moved))
    torch.testing.assert_close(new_loss, loss, rtol=1e-7, atol=0)
    assert (norm(moved) > norm(rescaled)).all() and (norm(rescaled) > norm(weights)).all()


@pytest.mark.parametrize("factor", [1.1, 2])
def test_a_rescaling_keeps_the_loss_and_grows_the_gradient_by_its_share(factor):
    rescaled = move(partial(study.rescale, factor=factor))
    torch.testing.assert_close(change(cross_entropy, rescaled), torch.ones(3))
    growth = change(gradient_norm_squared, rescaled)
    share = factor ** (1 / study.MOVES)
    assert (growth >= share - 1e-5).all() and (growth < 1.1 * share).all()
