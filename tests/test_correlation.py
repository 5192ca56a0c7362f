"""correlation.py: the sample from end to end, interrupted and resumed, and its statistics."""

import contextlib
import json
import shutil
from argparse import Namespace
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats

import correlation
from conftest import GOLDEN, bar_until
from correlation import Stack
from data import TITLES, load_dataset, load_sample, shuffled_batch
from experiment import results
from experiment.results import ROOT, UserError
from models import TRAINING, LeakyReLU, evaluate, init_weights, train_epoch_sgd
from teleportation import RADII, estimate

SMALL = ("--sample", "--dataset", "MNIST", "--runs", 4, "--epochs", 2, "--batches", 3)
BAR = bar_until(np.inf)
STACK_LOG = "logs/correlation/MNIST-sample-2epochs/runs000-003.npz"
ESTIMATES_LOG = "logs/correlation/MNIST-sample-2epochs/runs000-003-orthant.npz"
FIGURES = "figures/sample/4runs-2epochs-3batches"


@pytest.fixture
def run_small(call, tmp_path):
    """Run the script on the small sample in one process; later options override earlier ones."""
    return partial(call, correlation, *SMALL, "--processes", 1, "--output", tmp_path)


def settings(tmp_path, epochs=2, batches=3):
    """Return options as `parse_arguments` does."""
    options = {"output": tmp_path, "sample": True, "device": torch.device("cpu"), "sphere": False}
    return Namespace(epochs=epochs, batches=batches, **options)


def logs(folder):
    """Return the arrays of every file in logs/, by path and name."""
    arrays = {}
    for path in sorted((folder / "logs").rglob("*.npz")):
        for key, array in results.read(path).arrays.items():
            arrays[str(path.relative_to(folder)), key] = array
    return arrays


def assert_same(a, b):
    assert a.keys() == b.keys() and a
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=str(key))


def test_an_interrupted_run_ends_with_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(correlation, "SAVE_EVERY", 1)
    args, stack = settings(tmp_path / "whole"), Stack("MNIST", range(2))
    correlation.measure(stack, args, BAR)
    args.output = tmp_path / "cut"
    for updates in (2, 4, 99):
        with contextlib.suppress(KeyboardInterrupt):
            correlation.measure(stack, args, bar_until(updates))
    assert_same(logs(tmp_path / "whole"), logs(tmp_path / "cut"))


MNIST_FILE = ROOT / "data/MNIST/raw/train-images-idx3-ubyte"


@pytest.mark.skipif(not MNIST_FILE.exists(), reason="needs the full MNIST in data/")
@pytest.mark.parametrize("runs", [range(1), range(3)], ids=["alone", "stack"])
def test_the_first_epoch_on_mnist_is_the_published_one(tmp_path, runs):
    data = load_dataset("MNIST")
    trained = correlation.train(Stack("MNIST", runs), data, settings(tmp_path, epochs=1), BAR)
    golden = GOLDEN["training"] | {"epoch_loss": GOLDEN["training"]["train_loss"]}
    for key in ("epoch_loss", "test_loss", "test_accuracy"):
        assert trained[key].flatten()[0] == pytest.approx(golden[key], abs=1e-4)


def test_a_stack_is_trained_from_its_seeds_and_estimated_on_each_batch(tmp_path):
    data, (widths, lr), args = load_sample("MNIST"), TRAINING["MNIST"], settings(tmp_path)
    stack = Stack("MNIST", range(3, 5))
    trained = correlation.train(stack, data, args, BAR)
    weights = init_weights(widths, [4 * 54321, 5 * 54321])
    for loss in trained["epoch_loss"]:
        expected = train_epoch_sgd(weights, data.x_train, data.y_train, lr, LeakyReLU())
        np.testing.assert_array_equal(loss, expected)
    test_loss, accuracy = evaluate(weights, data.x_test, data.y_test, LeakyReLU())
    np.testing.assert_array_equal(trained["test_loss"], test_loss)
    np.testing.assert_array_equal(trained["test_accuracy"], accuracy)
    estimates = correlation.estimate_batches(stack, data, trained, args, BAR)
    for k in range(args.batches):
        x, y = shuffled_batch(data, 200, k)
        values = estimate(weights, x, y, RADII["MNIST"], k, LeakyReLU())
        for key, value in zip(correlation.ESTIMATES, values):
            np.testing.assert_array_equal(estimates[key][k], value)


def test_a_loss_that_is_not_finite_stops_with_the_epoch_named(tmp_path, monkeypatch):
    monkeypatch.setitem(TRAINING, "MNIST", TRAINING["MNIST"]._replace(lr=1e20))
    with pytest.raises(UserError, match=r"MNIST, epoch 0: the loss of run \[0\] .* at step"):
        correlation.measure(Stack("MNIST", range(2)), settings(tmp_path), BAR)


def test_the_sample_ends_with_table_and_figures_and_is_drawn_again(run_small, tmp_path):
    done = run_small()
    assert done.returncode == 0, done.stderr
    figures = tmp_path / FIGURES
    estimates = results.read(tmp_path / ESTIMATES_LOG).arrays
    trained = results.read(tmp_path / STACK_LOG).arrays
    networks = results.read(figures / "correlation/MNIST.npz").arrays
    assert networks["seed"].tolist() == [54321 * (i + 1) for i in range(4)]
    np.testing.assert_array_equal(networks["test_loss"], trained["test_loss"])
    np.testing.assert_allclose(networks["sharpness"], estimates["sharpness"].mean(0), rtol=1e-6)
    summary = json.loads((figures / "correlation/summary.json").read_text("utf-8"))["MNIST"]
    r = stats.pearsonr(networks["sharpness"], networks["test_loss"]).statistic
    assert summary["sharpness"]["r"]["pearson"] == pytest.approx(r)
    assert f"| sharpness φ | {r:.3f} [" in (figures / "table_1.md").read_text("utf-8")
    assert (figures / "table_1.md").read_text("utf-8") in done.stdout

    def files():
        return {path: path.read_bytes() for path in figures.rglob("*") if path.is_file()}

    first = files()
    drawn = {f"figure_{n}.{kind}" for n in (9, 10) for kind in ("png", "pdf")}
    assert drawn < {path.name for path in first}
    shutil.rmtree(tmp_path / "logs")  # a fresh clone has none
    for path in first:
        if path.suffix != ".npz":
            path.unlink()
    run_small("--plot-only")
    assert files() == first


def test_more_batches_extend_a_run_and_fewer_are_its_first(run_small, tmp_path):
    once, twice = tmp_path / "once", tmp_path / "twice"
    run_small("--batches", 8, "--output", once)  # 5 batches are all of the sample
    for batches in (2, 8, 3):
        run_small("--batches", batches, "--output", twice)
    assert_same(logs(once), logs(twice))
    networks = results.read(twice / FIGURES / "correlation/MNIST.npz").arrays
    phi = results.read(twice / ESTIMATES_LOG).arrays["sharpness"]
    np.testing.assert_allclose(networks["sharpness"], phi[:3].mean(0), rtol=1e-6)


def test_estimates_of_other_networks_are_refused(run_small, tmp_path):
    run_small()
    trained = results.read(tmp_path / STACK_LOG)
    trained.arrays["test_loss"] += 1
    results.save(tmp_path / STACK_LOG, trained)
    done = run_small()
    assert done.returncode == 2 and "was made with different settings (networks)" in done.stderr


def test_a_dataset_joins_those_that_were_run_before(run_small, monkeypatch):
    run_small()
    for table, value in ((TRAINING, TRAINING["MNIST"]), (RADII, RADII["MNIST"]), (TITLES, "Mine")):
        monkeypatch.setitem(table, "Mine", value)
    monkeypatch.setattr(correlation, "load_data", lambda *_: load_sample("MNIST"))
    done = run_small("--dataset", "Mine")
    assert "| MNIST | Mine |" in done.stdout and "| φ, published | 0.704 | – |" in done.stdout


def made_up(runs=60):
    """Arrays in which φ is the training loss, φ − L the gap, and ψ knows nothing."""
    noise = np.random.default_rng(0).normal(size=(4, runs))
    train_loss, gap = 1 + 0.1 * noise[0], 0.5 + 0.05 * noise[1]
    return {
        "seed": np.arange(runs),
        "train_loss": train_loss,
        "test_loss": train_loss + gap,
        "test_accuracy": np.full(runs, 0.9),
        "batch_loss": train_loss,
        "sharpness": train_loss + 0.01 * (gap - 0.5) + 1e-5 * noise[2],
        "curvature": 2 + noise[3],
        "exact_curvature": 3 + noise[3],
    }


def test_statistics_and_tables_say_what_made_up_results_say():
    arrays = made_up()
    summaries = {name: correlation.summarise(name, arrays) for name in ("MNIST", "CIFAR10")}
    correlation.adjust(summaries)
    about = {"runs": 60, "epochs": 40, "batches": 2, "sphere": False, "sample": False}
    table = correlation.table_1(summaries, about)
    summary = summaries["MNIST"]
    assert summary["train_loss"]["r"]["pearson"] == pytest.approx(0.9, abs=0.05)
    assert summary["excess"]["r_gap"]["pearson"] > 0.99
    assert summary["excess"]["partial_r"]["pearson"] > 0.99
    assert summary["exact_curvature"]["r_curvature"]["pearson"] == pytest.approx(1)
    low, high = summary["curvature"]["partial_r"]["interval"]
    assert low < 0 < high and summary["curvature"]["partial_r"]["holm"] == 1
    excess = summary["excess"]["partial_r"]  # of 8 tests one or two have the least p
    assert 7 * excess["p"] <= excess["holm"] <= 8 * excess["p"]
    phi, other = summary["sharpness"]["r"]["pearson"], 0.704
    z = (np.arctanh(phi) - np.arctanh(other)) / np.sqrt(1 / 57 + 1 / 97)
    assert summary["sharpness"]["published"]["p"] == pytest.approx(2 * stats.norm.sf(abs(z)))
    assert f"| sharpness φ | {phi:.3f} [" in table
    assert "| ψ, published | −0.050 | −0.167 |" in table
    assert "60 networks per dataset, 40 epochs" in table
    assert correlation.details(summaries).count("| ψ by the exact γ″ |") == 2
