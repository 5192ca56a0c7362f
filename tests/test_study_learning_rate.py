"""studies/learning_rate.py: on the sample, and the worth on curves that are made up."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import learning_rate as study
import teleport_optimization as script
from data import load_sample
from experiment import results
from models import MLP, TRAINING, LeakyReLU, init_weights, train_epoch

RUNS, EPOCHS = 2, 3


def trained(module, logs, args):
    """Return {arm: its test loss [epochs, runs]} of the stacks with these Logs."""
    losses = {}
    for log in logs:
        module.train(log, args, SimpleNamespace(update=lambda n=1: None))
        arrays = results.load(log, EPOCHS).arrays
        losses |= dict(zip(log.settings["arms"], arrays["test_loss"].swapaxes(0, 1)))
    return losses


@pytest.mark.parametrize("optimizer", ["AdaGrad", "momentum", "Adam"])
def test_at_factor_1_arms_are_those_of_the_script_to_the_last_bit(tmp_path, optimizer):
    cpu, setting = torch.device("cpu"), script.OPTIMIZERS[optimizer]
    args = SimpleNamespace(sample=True, device=cpu, runs=RUNS, epochs=EPOCHS, output=tmp_path)
    args.dataset = "MNIST"
    stacks = script.split(study.ARMS)
    ours = trained(study, [study.training_log(optimizer, arms, args) for arms in stacks], args)
    stacks = ["plain", "kept"], ["teleport", "reset"]
    logs = [script.training_log(optimizer, setting, arms, args) for arms in stacks]
    theirs = trained(script, logs, args)
    np.testing.assert_array_equal(ours["plain × 1"], theirs["plain"])
    for arm in ("kept", "teleport", "reset"):
        np.testing.assert_array_equal(ours[arm], theirs[arm], err_msg=arm)
    for arm in study.PLAIN.keys() - {"plain × 1"}:
        assert (ours[arm] != theirs["plain"]).all(), arm


@pytest.mark.parametrize("optimizer", script.OPTIMIZERS)
def test_a_factor_is_that_of_the_learning_rate(optimizer):
    data, build = load_sample("MNIST"), script.OPTIMIZERS[optimizer].optimizer
    lr, factors = script.OPTIMIZERS[optimizer].lr, [0.8, 3.0]
    weights = init_weights(TRAINING["MNIST"].widths, [1, 2])

    def model(*shape):
        return MLP([w.double().expand(*shape, *w.shape).clone() for w in weights], LeakyReLU())

    def train(model, optimizer):
        train_epoch(model, data.x_train[:200].double(), data.y_train[:200], optimizer)
        return [w.detach() for w in model.weights]

    stack = model(2)
    together = train(stack, study.with_factors(build, factors, stack.parameters(), lr))
    for i, factor in enumerate(factors):
        alone = model()
        for w, expected in zip(together, train(alone, build(alone.parameters(), factor * lr))):
            torch.testing.assert_close(w[i], expected, rtol=1e-9, atol=1e-12)


def test_the_sample_ends_with_a_table_and_is_drawn_again(call, tmp_path):
    options = "--sample", "--runs", RUNS, "--epochs", EPOCHS, "--output", tmp_path
    options += ("--optimizer", "momentum", "SGD")
    done = call(study, *options, "--processes", 1)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "figures/sample/2runs-3epochs/learning_rate/MNIST"
    assert (folder / "table.md").read_text("utf-8") in done.stdout
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    drawn = {"worth.png", "predicted.png", "table.md", "summary.json"}
    assert first.keys() == drawn | {"momentum.npz", "SGD.npz"}
    again = call(study, *options, "--plot-only")
    assert again.returncode == 0, again.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first


# Statistics, of curves whose answer is known


def curves(factors, runs=20, slope=0.3, noise=0.01):
    """Return losses [factors, epochs, runs] that fall with the factor and the epoch.

    Runs differ, equally at all factors.
    """
    rng = np.random.default_rng(1)
    of_run = noise * rng.normal(size=(12, runs))
    epoch = np.arange(12)[:, None]
    return 1 / (1 + epoch) - slope * np.log(factors)[:, None, None] + of_run


@pytest.mark.parametrize("factor", [0.5, 0.85, 1.0, 1.1, 1.37, 2.9, 4.0])
def test_the_worth_is_the_factor_that_made_the_curve(factor):
    entry = study.compare_with_rates(curves([factor])[0], curves(study.FACTORS), study.FACTORS, 4)
    expected = factor if 0.8 < factor < 3 else np.nan  # outside of the factors it is undefined
    for key in ("mean", "low", "high"):  # paired: the runs' differences cancel
        np.testing.assert_allclose(entry["worth"][key], expected)
        np.testing.assert_allclose(entry["left_over"][key], 0 * expected, atol=1e-12)


def test_noise_of_the_arm_widens_the_interval_about_the_worth():
    noise = 0.02 * np.random.default_rng(2).normal(size=(12, 20))
    loss, plain = curves([1.2])[0] + noise, curves(study.FACTORS)
    worth = study.compare_with_rates(loss, plain, study.FACTORS, 4)["worth"]
    assert (worth["low"] < worth["mean"]).all() and (worth["mean"] < worth["high"]).all()
    covered = (worth["low"] < 1.2) & (worth["high"] > 1.2)
    assert covered.mean() > 0.7


def test_where_plain_hardly_depends_on_the_rate_the_worth_is_undefined():
    noise = 0.02 * np.random.default_rng(2).normal(size=(12, 20))
    flat = curves(study.FACTORS, slope=0.0)
    worth = study.compare_with_rates(flat[0] + noise, flat, study.FACTORS, 4)["worth"]
    assert np.isnan(worth["mean"]).all()
    assert study.worth_text(study.after(worth, 1)) == "undefined"


def test_of_several_factors_the_nearest_to_1_is_taken():
    plain = np.array([[1.0, 0.5, 0.9, 0.3]])
    factor = study.factor_of(np.array([0.7]), plain, [0.7, 1.0, 1.2, 1.5])
    np.testing.assert_allclose(np.log(factor), 0.5 * np.log(1.2))


def test_the_curve_that_one_factor_does_not_explain_is_left_over():
    plain, loss = curves(study.FACTORS), curves([1.2])[0]
    loss[:, :] += 0.01 * (np.arange(12) - 4)[:, None]
    left_over = study.compare_with_rates(loss, plain, study.FACTORS, reference=4)["left_over"]
    np.testing.assert_allclose(left_over["mean"], 0.01 * (np.arange(12) - 4), atol=1e-12)


def test_the_predicted_worth_is_the_growth_by_all_moves():
    moves = np.ones((3, 4, 5))
    moves[:, 3] = 1.1  # |∇L|² after each move
    assert np.exp(study.log_growth(moves)) == pytest.approx(1.1**3)
    assert study.log_growth(np.full((3, 4, 5), np.nan)) == 0
