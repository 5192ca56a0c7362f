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


@pytest.fixture
def args(tmp_path):
    cpu = torch.device("cpu")
    return SimpleNamespace(sample=True, device=cpu, runs=RUNS, epochs=EPOCHS, output=tmp_path)


def trained(module, stack, args, updates=None):
    """Train a stack of a script or study, interrupted after some updates; return its arrays."""
    count = iter(range(100))

    def update(n=1):
        if next(count) + 1 == updates:
            raise KeyboardInterrupt

    module.train(stack, args, SimpleNamespace(update=update))
    return results.load(module.training_log(stack, args), args.epochs).arrays


def all_arms(module, stacks, args):
    """Return {arm: its test loss [epochs, runs]} of several stacks."""
    losses = {}
    for stack in stacks:
        arrays = trained(module, stack, args)
        losses |= dict(zip(stack.arms, arrays["test_loss"].swapaxes(0, 1)))
    return losses


@pytest.mark.parametrize("optimizer", script.OPTIMIZERS)
def test_at_factor_1_arms_are_those_of_the_script_to_the_last_bit(args, optimizer):
    args.dataset, args.optimizer = "MNIST", [optimizer]
    ours = all_arms(study, study.stacks_of([optimizer], "MNIST"), args)
    theirs = all_arms(script, script.stacks(args), args)
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


def test_a_stack_that_is_killed_ends_with_the_same_numbers(args, tmp_path):
    stack = study.stacks_of(["Adam"], "MNIST")[0]
    whole = trained(study, stack, args)
    args.output = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        trained(study, stack, args, updates=2)
    resumed = trained(study, stack, args)
    for key in whole.keys() - {"seconds", "move_seconds"}:
        np.testing.assert_array_equal(whole[key], resumed[key], err_msg=key)


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


@pytest.mark.parametrize("factor", [0.85, 1.0, 1.1, 1.37, 2.9])
def test_the_worth_is_the_factor_that_made_the_curve(factor):
    entry = study.compare_with_rates(
        curves([factor])[0], curves(study.FACTORS), study.FACTORS, reference=4
    )
    for key in ("mean", "low", "high"):  # paired: the runs' differences cancel
        np.testing.assert_allclose(entry["worth"][key], factor)
        np.testing.assert_allclose(entry["left_over"][key], 0, atol=1e-12)


def test_noise_of_the_arm_widens_the_interval_about_the_worth():
    noise = 0.02 * np.random.default_rng(2).normal(size=(12, 20))
    loss, plain = curves([1.2])[0] + noise, curves(study.FACTORS)
    worth = study.compare_with_rates(loss, plain, study.FACTORS, 4)["worth"]
    assert (worth["low"] < worth["mean"]).all() and (worth["mean"] < worth["high"]).all()
    covered = (worth["low"] < 1.2) & (worth["high"] > 1.2)
    assert covered.mean() > 0.7


@pytest.mark.parametrize("factor", [0.5, 4.0])
def test_outside_of_the_factors_the_worth_is_undefined(factor):
    entry = study.compare_with_rates(curves([factor])[0], curves(study.FACTORS), study.FACTORS, 4)
    assert np.isnan([*entry["worth"].values(), *entry["left_over"].values()]).all()


def test_where_plain_hardly_depends_on_the_rate_the_worth_is_undefined():
    noise = 0.02 * np.random.default_rng(2).normal(size=(12, 20))
    flat = curves(study.FACTORS, slope=0.0)
    worth = study.compare_with_rates(flat[0] + noise, flat, study.FACTORS, 4)["worth"]
    assert np.isnan(worth["mean"]).all()
    assert study.worth_text(study.after(worth, 1)) == "undefined"


def test_of_several_factors_the_nearest_to_1_is_taken():
    factors = np.array([0.7, 1.0, 1.2, 1.5])
    plain = np.array([[1.0, 0.5, 0.9, 0.3]])
    np.testing.assert_allclose(
        np.log(study.factor_of(np.array([0.7]), plain, factors)), 0.5 * np.log(1.2)
    )


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
