"""correlation.py: on the sample from end to end, resumed after a kill, and its estimators."""

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
from data import load_sample
from init_directory import ROOT
from models import LeakyReLU, init_weights
from teleportation import (
    curvature,
    curve_derivatives,
    random_directions,
    random_generators,
    sharpness,
)

SMALL = ("--sample", "--dataset", "MNIST", "--runs", "4", "--epochs", "2", "--batches", "3")


def results(folder):
    """Return the arrays of every result file below `folder`, by path and name, less the timings."""
    found = {}
    for path in sorted((folder / "logs").rglob("*.npz")):
        with np.load(path) as archive:
            for key in set(archive.files) - {"about", "seconds"}:
                found[path.name, key] = archive[key]
    return found


def assert_same(a, b):
    assert a.keys() == b.keys() and a
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=str(key))


def test_the_sample_ends_with_table_and_figures_and_is_drawn_again(tmp_path, run_script):
    done = run_script("correlation.py", *SMALL, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    figures = tmp_path / "figures/sample/correlation"
    names = ["test_loss_vs_curvature", "test_loss_vs_sharpness", "curvature_vs_sharpness"]
    expected = {f"MNIST_{name}.{suffix}" for name in names for suffix in ("pdf", "png")}
    assert {path.name for path in figures.iterdir()} == expected | {"summary.json", "table1.md"}
    entry = json.loads((figures / "summary.json").read_text())["MNIST"]
    arrays = results(tmp_path)
    phi = arrays["estimates-4runs-orthant.npz", "sharpness"]
    assert phi.shape == (3, 4) and entry["runs"] == 4
    r = stats.pearsonr(phi.mean(0), arrays["runs000-003.npz", "test_loss"]).statistic
    assert entry["sharpness"]["pearson"] == pytest.approx(r, abs=1e-5)
    assert (figures / "table1.md").read_text() in done.stdout

    first = {path.name: path.read_bytes() for path in figures.iterdir()}
    for path in figures.iterdir():
        path.unlink()
    again = run_script("correlation.py", *SMALL, "--plot-only", "--output", tmp_path)
    assert again.returncode == 0, again.stderr
    assert {path.name: path.read_bytes() for path in figures.iterdir()} == first


def test_a_killed_run_goes_on_and_ends_with_the_same_numbers(tmp_path, run_script):
    arguments = [*SMALL, "--epochs", "60", "--runs", "60"]  # two stacks
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_script("correlation.py", *arguments, "--output", whole).returncode == 0
    command = [sys.executable, ROOT / "correlation.py", *arguments, "--output", killed]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first_result = killed / "logs/correlation/MNIST-sample-60epochs/runs000-049.npz"
    while not first_result.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(np.load(first_result)["train_loss"]) < 60
    assert run_script("correlation.py", *arguments, "--output", killed).returncode == 0
    assert_same(results(whole), results(killed))


def test_more_batches_go_on_from_those_that_are_there(tmp_path, run_script):
    once, twice = tmp_path / "once", tmp_path / "twice"
    run_script("correlation.py", *SMALL, "--batches", "8", "--output", once)
    for batches in (2, 8):  # the sample's 1,000 images are shuffled anew after 5 batches
        run_script("correlation.py", *SMALL, "--batches", batches, "--output", twice)
    assert_same(results(once), results(twice))


def test_estimates_are_those_of_each_network_on_the_whole_inputs():
    """The reduction to the batch's span and the sharing of draws change no number."""
    data, experiment = load_sample("CIFAR10"), correlation.EXPERIMENTS["CIFAR10"]
    experiment = experiment._replace(widths=(3072, 8, 6, 10), radii=[0.5, 2.0, 8.0])
    data = data._replace(x_train=data.x_train.double())
    weights = [w.double() for w in init_weights(experiment.widths, [1, 2, 3])]
    stacks = [[w[:2] for w in weights], [w[2:] for w in weights]]
    torch.set_default_dtype(torch.float64)  # the draws, too
    try:
        phi, psi = correlation.estimate(stacks, data, experiment, 4, sphere=False)
        x, y = correlation.estimation_batch(data, 4)
        M = random_generators(experiment.widths, torch.Generator().manual_seed(4 * 12345))
        d = random_directions(
            experiment.widths, experiment.radii, torch.Generator().manual_seed(4 * 12345 + 1)
        )
    finally:
        torch.set_default_dtype(torch.float32)
    for run in range(3):
        alone = [w[run] for w in weights]
        assert phi[run] == pytest.approx(sharpness(alone, x, y, d, LeakyReLU()).item(), abs=1e-10)
        kappa = curvature(*curve_derivatives(alone, x, M, LeakyReLU()))
        assert psi[run] == pytest.approx(kappa.item(), rel=1e-8)


def test_batches_are_drawn_without_replacement_until_the_images_run_out():
    data = load_sample("MNIST")
    data = data._replace(x_train=torch.arange(1000.0).unsqueeze(1))
    batches = [correlation.estimation_batch(data, k)[0][0] for k in range(10)]
    assert all(batch.shape == (200,) for batch in batches)
    for shuffle in (batches[:5], batches[5:]):
        assert torch.cat(shuffle).sort().values.tolist() == list(range(1000))
    assert not torch.equal(batches[0], batches[5])


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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dataset", "SVHN"], "invalid choice: 'SVHN'"),
        (["--runs", "3"], "'3' is not a whole number of 4 or more"),
        (["--epochs", "-1"], "'-1' is not a whole number of 1 or more"),
        (["--device", "abacus"], "there is no device 'abacus' here"),
        ([*SMALL, "--plot-only"], "has no finished results: run without --plot-only first"),
    ],
)
def test_bad_input_gets_a_sentence(tmp_path, run_script, arguments, words):
    done = run_script("correlation.py", *arguments, "--output", tmp_path)
    assert done.returncode == 2
    assert words in done.stderr and "Traceback" not in done.stderr


def test_help_explains_every_option_with_its_default(run_script):
    done = run_script("correlation.py", "--help")
    assert done.returncode == 0
    for option in ("--dataset", "--runs", "--epochs", "--batches", "--sphere", "--sample"):
        assert option in done.stdout
    assert done.stdout.count("default") >= 9
