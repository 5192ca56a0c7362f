"""correlation.py: on the sample from end to end, resumed after a kill, and its estimators."""

import argparse
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from scipy import stats

import correlation
from conftest import GOLDEN
from data import load_dataset, load_sample
from init_directory import ROOT, UserError
from models import LeakyReLU, evaluate, init_weights, train_epoch_sgd
from teleportation import RADII, estimate

SMALL = ("--sample", "--dataset", "MNIST", "--runs", "4", "--epochs", "2", "--batches", "3")


def results(folder):
    """Return the arrays of every result file below `folder`, by path and name, less the timings."""
    found = {}
    for path in sorted((folder / "logs").rglob("*.npz")):
        with np.load(path) as archive:
            for key in set(archive.files) - {"about", "seconds"}:
                found[f"{path.parent.name}/{path.name}", key] = archive[key]
    return found


def assert_same(a, b):
    assert a.keys() == b.keys() and a
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=str(key))


class Bar:
    """A progress bar that shows nothing."""

    def update(self, n=1):
        pass


def test_experiments_have_the_published_settings():
    for name, widths, lr in (
        ("MNIST", (784, 16, 10, 10), 1e-2),
        ("FashionMNIST", (784, 16, 10, 10), 1e-2),
        ("CIFAR10", (3072, 128, 32, 10), 2e-2),
    ):
        experiment = correlation.EXPERIMENTS[name]
        assert (experiment.widths, experiment.lr) == (widths, lr)
        radii = 10 * RADII[name] if name != "MNIST" else RADII[name]
        assert len(radii) == 20
        assert radii[0] == pytest.approx(0.001) and radii[-1] == pytest.approx(0.191)
    published = {"runs": 100, "epochs": 40, "batches": 200, "sphere": False}
    assert published == correlation.PUBLISHED
    assert correlation.BATCH == 20 and correlation.ESTIMATION_BATCH == 200


MNIST_FILE = ROOT / "data/MNIST/raw/train-images-idx3-ubyte"


@pytest.mark.skipif(not MNIST_FILE.exists(), reason="needs the full MNIST in data/")
@pytest.mark.parametrize("runs", [range(1), range(3)], ids=["alone", "stack"])
def test_first_epoch_on_mnist_is_the_published_one(tmp_path, runs):
    data, golden = load_dataset("MNIST"), GOLDEN["training"]
    experiment = correlation.EXPERIMENTS["MNIST"]
    state = correlation.train_stack(data, experiment, runs, 1, tmp_path / "runs.npz", {}, Bar())
    for key in ("train_loss", "test_loss", "test_accuracy"):
        assert state[key].flatten()[0] == pytest.approx(golden[key], abs=1e-4)


def test_a_stack_is_trained_from_its_runs_seeds_and_tested_on_the_test_images(tmp_path):
    data, experiment = load_sample("MNIST"), correlation.EXPERIMENTS["MNIST"]
    path = tmp_path / "runs.npz"
    state = correlation.train_stack(data, experiment, range(3, 5), 2, path, {}, Bar())
    weights = init_weights(experiment.widths, [4 * 54321, 5 * 54321])
    for loss in state["train_loss"]:
        expected = train_epoch_sgd(weights, data.x_train, data.y_train, experiment.lr, LeakyReLU())
        np.testing.assert_array_equal(loss, expected)
    for key, value in zip(
        ("test_loss", "test_accuracy"), evaluate(weights, data.x_test, data.y_test, LeakyReLU())
    ):
        np.testing.assert_array_equal(state[key], value)


def test_a_loss_that_is_not_finite_stops_with_the_epoch_named(tmp_path):
    experiment = correlation.EXPERIMENTS["MNIST"]._replace(lr=1e20)
    with pytest.raises(UserError, match=r"runs, epoch 0: the loss of run \[0\] of the stack"):
        correlation.train_stack(
            load_sample("MNIST"), experiment, range(2), 2, tmp_path / "runs.npz", {}, Bar()
        )


def test_the_sample_ends_with_table_and_figures_and_is_drawn_again(tmp_path, call):
    done = call(correlation, *SMALL, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    figures = tmp_path / "figures/sample/correlation"
    names = ["test_loss_vs_curvature", "test_loss_vs_sharpness", "curvature_vs_sharpness"]
    expected = {f"MNIST_{name}.{suffix}" for name in names for suffix in ("pdf", "png")}
    assert {path.name for path in figures.iterdir()} == expected | {"summary.json", "table1.md"}
    entry = json.loads((figures / "summary.json").read_text())["datasets"]["MNIST"]
    arrays = results(tmp_path)
    phi = arrays["MNIST-sample-2epochs/estimates-4runs-orthant.npz", "sharpness"]
    assert phi.shape == (3, 4) and entry["runs"] == 4
    test_loss = arrays["MNIST-sample-2epochs/runs000-003.npz", "test_loss"]
    r = stats.pearsonr(phi.mean(0), test_loss).statistic
    assert entry["sharpness"]["pearson"] == pytest.approx(r, abs=1e-5)
    assert (figures / "table1.md").read_text("utf-8") in done.stdout

    first = {path.name: path.read_bytes() for path in figures.iterdir()}
    for path in figures.iterdir():
        path.unlink()
    again = call(correlation, *SMALL, "--plot-only", "--output", tmp_path)
    assert again.returncode == 0, again.stderr
    assert {path.name: path.read_bytes() for path in figures.iterdir()} == first

    fewer = call(correlation, *SMALL, "--plot-only", "--batches", 2, "--output", tmp_path)
    assert fewer.returncode == 0, fewer.stderr
    entry = json.loads((figures / "summary.json").read_text())["datasets"]["MNIST"]
    r = stats.pearsonr(phi[:2].mean(0), test_loss).statistic
    assert entry["sharpness"]["pearson"] == pytest.approx(r, abs=1e-5)

    more = call(correlation, *SMALL, "--plot-only", "--batches", 4, "--output", tmp_path)
    assert more.returncode == 2 and "orthant.npz has 3 of 4 batches" in more.stderr

    log = tmp_path / "logs/correlation/MNIST-sample-2epochs/estimates-4runs-orthant.npz"
    log.rename(log.with_name("estimates-4runs-sphere.npz"))
    other = call(correlation, *SMALL, "--sphere", "--output", tmp_path)
    assert other.returncode == 2 and "was made with other settings (directions)" in other.stderr


def test_a_dataset_keeps_the_others_in_the_table(tmp_path, call):
    for name in ("MNIST", "FashionMNIST"):
        done = call(correlation, *SMALL, "--dataset", name, "--output", tmp_path)
    assert "| MNIST | Fashion-MNIST |" in done.stdout
    other = call(correlation, *SMALL, "--runs", 5, "--output", tmp_path)
    assert "| MNIST |\n" in other.stdout  # the other dataset has no such runs


def test_directions_on_the_sphere_give_another_sharpness_and_the_same_curvature():
    x, y = torch.rand(12, 20), torch.randint(10, (20,))
    stacks = [init_weights((12, 6, 5, 10), [1, 2])]
    orthant, sphere = (estimate(stacks, x, y, [1.0], 3, LeakyReLU(), kind) for kind in (0, 1))
    assert ((orthant[0] - sphere[0]).abs() > 1e-4).all()
    assert torch.equal(orthant[1], sphere[1])


def test_a_killed_run_goes_on_and_ends_with_the_same_numbers(tmp_path, call):
    arguments = [*SMALL, "--epochs", "20", "--runs", "54"]  # two stacks
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert call(correlation, *arguments, "--output", whole).returncode == 0
    command = [sys.executable, ROOT / "correlation.py", *arguments, "--output", killed]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first_result = killed / "logs/correlation/MNIST-sample-20epochs/runs000-049.npz"
    while not first_result.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(np.load(first_result)["train_loss"]) < 20
    assert call(correlation, *arguments, "--output", killed).returncode == 0
    assert_same(results(whole), results(killed))


def test_more_batches_go_on_from_those_that_are_there(tmp_path, call):
    once, twice = tmp_path / "once", tmp_path / "twice"
    call(correlation, *SMALL, "--batches", "8", "--output", once)
    for batches in (2, 8):  # the sample's 1,000 images are shuffled anew after 5 batches
        call(correlation, *SMALL, "--batches", batches, "--output", twice)
    assert_same(results(once), results(twice))


def test_estimates_of_other_networks_are_made_anew(tmp_path):
    data, widths = load_sample("MNIST"), correlation.EXPERIMENTS["MNIST"].widths
    found = []
    for seeds in ([1, 2], [1, 2], [3, 4]):
        stacks, test_loss = [init_weights(widths, seeds)], np.array(seeds)
        correlation.estimate_all(stacks, test_loss, data, 2, False, tmp_path / "e.npz", {})
        found.append(correlation.load(tmp_path / "e.npz", {}))
    first, again, other = found
    assert first["seconds"] == again["seconds"] and again["seconds"] != other["seconds"]
    assert (first["sharpness"] != other["sharpness"]).all()
    np.testing.assert_array_equal(other["test_loss"], [3, 4])


def test_what_a_gpu_trained_as_one_stack_is_drawn_anywhere(tmp_path):
    args = dict(output=tmp_path, sample=False, epochs=40, runs=100, sphere=False)

    def stacks(device):
        paths, *_ = correlation.places(
            "MNIST", argparse.Namespace(**args, device=torch.device(device))
        )
        return [path.name for path in paths]

    assert stacks("cpu") == ["runs000-049.npz", "runs050-099.npz"]
    assert stacks("cuda") == ["runs000-099.npz"]
    log = tmp_path / "logs/correlation/MNIST-40epochs/runs000-099.npz"
    log.parent.mkdir(parents=True)
    log.touch()
    assert stacks("cpu") == ["runs000-099.npz"]


def test_correlations_are_scipys_with_their_interval():
    generator = np.random.default_rng(0)
    a = generator.normal(size=50)
    b = a + generator.normal(size=50)
    found = correlation.correlate(a, b)
    assert found["pearson"] == pytest.approx(np.corrcoef(a, b)[0, 1])
    # Fisher's z is normal with variance 1 / (n − 3)
    z, width = np.arctanh(found["pearson"]), 1.959964 / np.sqrt(47)
    assert found["interval"] == pytest.approx(np.tanh([z - width, z + width]), abs=1e-6)
    ranks = [np.argsort(np.argsort(v)) for v in (a, b)]
    assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_partial_correlation_is_that_of_the_residuals():
    generator = np.random.default_rng(1)
    given = generator.normal(size=40)
    a, b = generator.normal(size=(2, 40)) + given
    residuals = []
    for values in (a, b):
        line = stats.linregress(given, values)
        residuals.append(values - line.slope * given - line.intercept)
    expected = np.corrcoef(*residuals)[0, 1]
    assert correlation.partial_correlation(a, b, given) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dataset", "SVHN"], "invalid choice: 'SVHN'"),
        (["--runs", "3"], "'3' is not a whole number of 4 or more"),
        (["--epochs", "-1"], "'-1' is not a whole number of 1 or more"),
        (["--device", "abacus"], "there is no device 'abacus' here"),
        (["--device", "meta"], "there is no device 'meta' here"),
        ([*SMALL, "--plot-only"], "is missing or not finished: run without --plot-only first"),
    ],
)
def test_bad_input_gets_a_sentence(tmp_path, call, arguments, words):
    done = call(correlation, *arguments, "--output", tmp_path)
    assert done.returncode == 2
    assert words in done.stderr and "Traceback" not in done.stderr


def test_help_explains_every_option_with_its_default(run_script):
    done = run_script("correlation.py", "--help")
    assert done.returncode == 0
    options = done.stdout.partition("options:")[2].split("\n  --")[1:]
    assert len(options) == 10
    for option in options:
        assert "default: " in " ".join(option.split()), option
