"""correlation.py: on the sample from end to end, resumed after a kill, and its estimators."""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time

from experiment import files
from experiment.files import ROOT, UserError

import numpy as np
import pytest
import torch
from scipy import stats

import correlation
from conftest import GOLDEN
from data import load_dataset, load_sample, shuffled_batch
from models import (
    BATCH,
    TRAINING,
    LeakyReLU,
    cross_entropy,
    evaluate,
    forward,
    init_weights,
    train_epoch_sgd,
)
from teleportation import RADII, estimate, sharpness

SMALL = ("--sample", "--dataset", "MNIST", "--runs", "4", "--epochs", "2", "--batches", "3")


@pytest.fixture(autouse=True)
def fewer(monkeypatch):
    """Less of what takes longest in a test: radii and rescalings."""
    monkeypatch.setattr(correlation, "SWEEP_BATCHES", 2)
    monkeypatch.setattr(correlation, "RESCALING_STEPS", 1)
    monkeypatch.setattr(correlation, "RESCALING_BATCH", 200)


def arrays(folder):
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
        assert TRAINING[name] == (widths, lr)
        radii = 10 * RADII[name] if name != "MNIST" else RADII[name]
        assert len(radii) == 20
        assert radii[0] == pytest.approx(0.001) and radii[-1] == pytest.approx(0.191)
    published = {"runs": 100, "epochs": 40, "batches": 200, "sphere": False}
    assert published == correlation.DEFAULTS
    assert BATCH == 20 and correlation.ESTIMATION_BATCH == 200


MNIST_FILE = ROOT / "data/MNIST/raw/train-images-idx3-ubyte"


@pytest.mark.skipif(not MNIST_FILE.exists(), reason="needs the full MNIST in data/")
@pytest.mark.parametrize("runs", [range(1), range(3)], ids=["alone", "stack"])
def test_first_epoch_on_mnist_is_the_published_one(tmp_path, runs):
    data, golden = load_dataset("MNIST"), GOLDEN["training"]
    state = correlation.train_stack(data, runs, 1, tmp_path / "runs.npz", {}, Bar())
    golden["epoch_loss"] = golden["train_loss"]
    for key in ("epoch_loss", "test_loss", "test_accuracy"):
        assert state[key].flatten()[0] == pytest.approx(golden[key], abs=1e-4)


def test_a_stack_is_trained_from_its_runs_seeds_and_tested_on_the_test_images(tmp_path):
    data, (widths, lr) = load_sample("MNIST"), TRAINING["MNIST"]
    state = correlation.train_stack(data, range(3, 5), 2, tmp_path / "runs.npz", {}, Bar())
    weights = init_weights(widths, [4 * 54321, 5 * 54321])
    for loss in state["epoch_loss"]:
        expected = train_epoch_sgd(weights, data.x_train, data.y_train, lr, LeakyReLU())
        np.testing.assert_array_equal(loss, expected)
    loss, accuracy = evaluate(weights, data.x_test, data.y_test, LeakyReLU())
    train_loss, _ = evaluate(weights, data.x_train, data.y_train, LeakyReLU())
    expected = {"test_loss": loss, "test_accuracy": accuracy, "train_loss": train_loss}
    for key, value in expected.items():
        np.testing.assert_array_equal(state[key], value)


def test_a_loss_that_is_not_finite_stops_with_the_epoch_named(tmp_path, monkeypatch):
    monkeypatch.setitem(TRAINING, "MNIST", TRAINING["MNIST"]._replace(lr=1e20))
    with pytest.raises(UserError, match=r"runs, epoch 0: the loss of run \[0\] of the stack"):
        correlation.train_stack(load_sample("MNIST"), range(2), 2, tmp_path / "runs.npz", {}, Bar())


def test_the_sample_ends_with_table_and_figures_and_is_drawn_again(tmp_path, call):
    done = call(correlation, *SMALL, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    figures = tmp_path / "figures/sample/correlation-4runs-2epochs-3batches"
    names = ["test_loss_vs_curvature", "test_loss_vs_sharpness", "curvature_vs_sharpness"]
    names += ["radii", "rescalings"]
    expected = {f"MNIST_{name}.{suffix}" for name in names for suffix in ("pdf", "png")}
    expected |= {"MNIST.npz", "summary.json", "table.md"}
    assert {path.name for path in figures.iterdir()} == expected
    entry = json.loads((figures / "summary.json").read_text("utf-8"))["MNIST"]
    logs, found = arrays(tmp_path), files.read(figures / "MNIST.npz").arrays
    phi = logs["MNIST-sample-2epochs/runs000-003-orthant.npz", "sharpness"]
    assert phi.shape == (3, 4) and entry["runs"] == 4
    np.testing.assert_allclose(found["sharpness"], phi.mean(0), rtol=1e-6)
    loss = logs["MNIST-sample-2epochs/runs000-003-orthant.npz", "batch_loss"]
    np.testing.assert_allclose(found["excess"], (phi - loss).mean(0), atol=1e-7)
    sweep = logs["MNIST-sample-2epochs/runs000-003-sweep.npz", "excess"]
    assert sweep.shape == (correlation.SWEEP_BATCHES, 2, 19, 4)
    np.testing.assert_allclose(found["sweep"].mean(0), sweep.mean(0), rtol=1e-5, atol=1e-9)
    assert found["rescaled_curvature"].shape == (5, 4)
    assert found["seed"].tolist() == [54321 * (i + 1) for i in range(4)]
    for key in ("train_loss", "test_loss", "test_accuracy"):
        expected = logs["MNIST-sample-2epochs/runs000-003.npz", key]
        np.testing.assert_array_equal(found[key], expected)
    r = stats.pearsonr(phi.mean(0), found["test_loss"]).statistic
    assert entry["sharpness"]["pearson"] == pytest.approx(r, abs=1e-5)
    assert (figures / "table.md").read_text("utf-8") in done.stdout

    # a fresh clone has no logs/
    shutil.rmtree(tmp_path / "logs")
    first = {path.name: path.read_bytes() for path in figures.iterdir()}
    for path in figures.iterdir():
        if path.suffix != ".npz":
            path.unlink()
    again = call(correlation, *SMALL, "--plot-only", "--output", tmp_path)
    assert again.returncode == 0, again.stderr
    assert {path.name: path.read_bytes() for path in figures.iterdir()} == first


def test_fewer_batches_are_those_that_come_first_and_other_directions_are_refused(tmp_path, call):
    call(correlation, *SMALL, "--output", tmp_path)
    log = tmp_path / "logs/correlation/MNIST-sample-2epochs/runs000-003-orthant.npz"
    before = log.read_bytes()
    assert call(correlation, *SMALL, "--batches", 2, "--output", tmp_path).returncode == 0
    assert log.read_bytes() == before
    figures = tmp_path / "figures/sample/correlation-4runs-2epochs-2batches"
    phi = np.load(log)["sharpness"]
    np.testing.assert_allclose(np.load(figures / "MNIST.npz")["sharpness"], phi[:2].mean(0))
    log.rename(log.with_name("runs000-003-sphere.npz"))
    other = call(correlation, *SMALL, "--sphere", "--output", tmp_path)
    assert other.returncode == 2 and "was made with different settings (directions)" in other.stderr


def test_a_dataset_keeps_the_others_in_the_table(tmp_path, call):
    for name in ("MNIST", "FashionMNIST"):
        done = call(correlation, *SMALL, "--dataset", name, "--output", tmp_path)
    assert "| MNIST | Fashion-MNIST |" in done.stdout
    other = call(correlation, *SMALL, "--runs", 5, "--output", tmp_path)
    assert "| MNIST |\n" in other.stdout  # the other dataset has no such runs


def made_up(runs=60):
    """Results in which φ is the training loss, φ − L the gap, and ψ knows nothing."""
    noise = np.random.default_rng(0).normal(size=(5, runs))
    train_loss, gap = 1 + 0.1 * noise[0], 0.5 + 0.05 * noise[1]
    excess = 0.01 * (gap - 0.5) + 1e-5 * noise[2]
    sweep = np.broadcast_to(excess, (2, 2, 19, runs)) * correlation.SWEEP[:, None] ** 2
    results = {
        "train_loss": train_loss,
        "test_loss": train_loss + gap,
        "test_accuracy": np.linspace(0.8, 0.9, runs),
        "batch_loss": train_loss,
        "sharpness": train_loss + excess,
        "excess": excess,
        "curvature": 2 + noise[3],
        "exact_curvature": 3 + noise[3],
        "training_seconds": np.float64(12.34),
        "sweep": sweep + np.zeros((2, 2, 19, 1)),
        "sweep_radii": correlation.SWEEP,
    }
    few = [results[key][:10] for key in correlation.ESTIMATES]
    for key, values in zip(correlation.ESTIMATES, few):
        change = {"sharpness": [0, -1, 1, 0, 0], "curvature": [0, 0, 0, -9, 0.1]}.get(key, [0] * 5)
        results[f"rescaled_{key}"] = values + np.array(change)[:, None]
    return results


def test_the_table_says_what_made_up_results_say():
    results = made_up()
    summary = correlation.summarise("MNIST", results)
    assert summary["train_loss"]["pearson"] == pytest.approx(0.9, abs=0.05)
    assert summary["excess"]["gap"]["pearson"] > 0.99
    assert summary["excess"]["given_train_loss"]["pearson"] > 0.99
    assert summary["exact_and_closed"]["pearson"] == pytest.approx(1)
    assert summary["test_loss_std"] == pytest.approx(results["test_loss"].std(ddof=1))
    assert summary["test_accuracy_mean"] == pytest.approx(0.85)
    settings = {"runs": 60, "epochs": 1, "batches": 2, "sphere": False, "sample": False}
    text = correlation.table({"MNIST": summary | {"settings": settings}})
    phi = summary["sharpness"]["pearson"]
    for row in (
        f"| φ: r with the test loss | {phi:.3f} [",
        "| ψ: published r (p of the difference) | -0.050 (",
        "| **φ: the published r** | not reproduced |",
        "| **sharper minima generalise worse, given the loss** | association |",
        "| **more curved minima generalise better, given the loss** | no evidence |",
        "| **the same at any radius** | association (1.00 at t = ",
        "φ − L; ψ** | 100 % (least: 100 %); ",
    ):
        assert row in text, row
    assert summary["rescaled"]["curvature"]["inside"].max() < 1
    assert summary["rescaled"]["change_of_loss"] == 0
    assert "Holm's correction: over the 4 partial correlations" in text
    assert "directions on the positive orthant." in text


def test_radii_at_which_networks_guess_are_not_tested():
    results = made_up()
    results["sweep"] = results["sweep"] + 3 * (correlation.SWEEP > 1)[:, None]
    found = correlation.across_radii(results)
    assert found["orthant"]["works"].tolist() == (correlation.SWEEP <= 1).tolist()
    np.testing.assert_allclose(found["sphere"]["reliability"], 1)
    r, low, high = found["sphere"]["partial"]
    assert ((low < r) & (r < high)).all() and r[0] > 0.99
    least = found["least_p"]
    assert least["radius"] <= 1
    assert least["holm"] == pytest.approx(least["p"] * 2 * (correlation.SWEEP <= 1).sum())


@pytest.mark.parametrize(
    "interval, p, words",
    [
        ([-0.1, 0.3], 0.01, "no evidence"),
        ([0.1, 0.3], 0.2, "not significant (Holm)"),
        ([0.1, 0.3], 0.01, "association"),
        ([-0.3, -0.1], 0.01, "association of the opposite sign"),
    ],
)
def test_what_an_interval_is_evidence_of(interval, p, words):
    r = {"pearson": sum(interval) / 2, "interval": interval}
    assert correlation.beyond_chance(r, p, 1) == words


def network(runs=3):
    """A small stack, and a batch of more images than units."""
    rng = torch.Generator().manual_seed(0)
    x, y = torch.rand(300, 240, generator=rng), torch.randint(10, (240,), generator=rng)
    return init_weights((300, 8, 6, 10), range(runs)), x, y


def test_the_loss_around_a_network_at_each_radius_is_that_of_its_perturbations():
    weights, x, y = network()
    found = correlation.excess_loss(weights, x, y, 5)
    rng, widths = torch.Generator().manual_seed(5), (300, 8, 6, 10)
    plain = [w.double() for w in weights], x.double(), y
    for row, sphere in zip(found, (False, True)):
        directions = correlation.mirrored(widths, [1.0], rng, sphere)
        for t, excess in zip(correlation.SWEEP, row):
            moved = [t * d.double() for d in directions]
            phi = sharpness(*plain, moved, LeakyReLU())
            loss = cross_entropy(*plain, LeakyReLU())
            torch.testing.assert_close(excess, phi - loss, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("sphere", [False, True])
def test_mirrored_directions_have_the_same_length_and_no_other_mean(sphere):
    d = correlation.mirrored((30, 8, 4), [0.5, 2.0], torch.Generator().manual_seed(1), sphere)
    flat = torch.cat([part.flatten(1) for part in d], 1)
    torch.testing.assert_close(flat.norm(dim=1), torch.tensor([0.5, 2.0, 0.5, 2.0]))
    mean = (flat[:2] + flat[2:]) / 2
    expected = 0 if sphere else flat[:2].mean(1, keepdim=True)
    torch.testing.assert_close(mean, mean * 0 + expected, atol=1e-6, rtol=0)


def test_rescalings_move_sharpness_and_curvature_and_keep_the_function():
    weights, x, y = network()
    radii = [0.5, 1.0]
    moved = correlation.rescale_to_extremes(weights, x, y, radii, True)
    assert [w.shape[:2] for w in moved] == [(4, 3)] * 3
    logits = forward(weights, x, LeakyReLU())
    torch.testing.assert_close(forward(moved, x, LeakyReLU()), logits.expand(4, -1, -1, -1))
    start, *ends = (
        torch.stack(estimate(w, x[:, :200], y[:200], radii, 9, LeakyReLU(), True)[:2])
        for w in (weights, *zip(*moved))
    )
    for quantity, (less, more) in enumerate([ends[:2], ends[2:]]):
        assert (less[quantity] < start[quantity]).all()
        assert (more[quantity] > start[quantity]).all()


def test_directions_on_the_sphere_give_another_sharpness_and_the_same_curvature():
    x, y = torch.rand(12, 20), torch.randint(10, (20,))
    weights = init_weights((12, 6, 5, 10), [1, 2])
    orthant, sphere = (estimate(weights, x, y, [1.0], 3, LeakyReLU(), kind) for kind in (0, 1))
    assert ((orthant[0] - sphere[0]).abs() > 1e-4).all()
    assert all(torch.equal(*pair) for pair in zip(orthant[1:], sphere[1:]))


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
    assert len(np.load(first_result)["epoch_loss"]) < 20
    assert call(correlation, *arguments, "--output", killed).returncode == 0
    assert_same(arrays(whole), arrays(killed))


def test_more_batches_go_on_from_those_that_are_there(tmp_path, call):
    once, twice = tmp_path / "once", tmp_path / "twice"
    call(correlation, *SMALL, "--batches", "8", "--output", once)
    for batches in (2, 8):  # the sample's 1,000 images are shuffled anew after 5 batches
        call(correlation, *SMALL, "--batches", batches, "--output", twice)
    assert_same(arrays(once), arrays(twice))


def test_a_stacks_estimates_are_those_of_its_networks_on_each_batch(tmp_path):
    data, weights = load_sample("MNIST"), init_weights(TRAINING["MNIST"].widths, [1, 2])
    found = correlation.estimate_stack(data, weights, 3, False, tmp_path / "e.npz", {}, Bar())
    for k in range(3):
        batch = shuffled_batch(data, correlation.ESTIMATION_BATCH, k)
        expected = estimate(weights, *batch, RADII["MNIST"], k, LeakyReLU())
        for key, values in zip(correlation.ESTIMATES, expected):
            np.testing.assert_array_equal(found[key][k], values)


def test_estimates_of_other_networks_are_refused(tmp_path, call):
    assert call(correlation, *SMALL, "--output", tmp_path).returncode == 0
    stack = tmp_path / "logs/correlation/MNIST-sample-2epochs/runs000-003.npz"
    result = files.read(stack)
    result.arrays["test_loss"] = result.arrays["test_loss"] + 1
    files.save(stack, result.settings, result.arrays)
    done = call(correlation, *SMALL, "--output", tmp_path)
    assert done.returncode == 2 and "was made with different settings (networks)" in done.stderr


def test_what_a_gpu_trained_as_one_stack_is_drawn_anywhere(tmp_path):
    args = dict(output=tmp_path, sample=False, epochs=40, runs=100, sphere=False)

    def stacks(device):
        paths, _ = correlation.stacks(
            "MNIST", argparse.Namespace(**args, device=torch.device(device))
        )
        return [path.name for path in paths]

    assert stacks("cpu") == ["runs000-049.npz", "runs050-099.npz"]
    assert stacks("cuda") == ["runs000-099.npz"]
    log = tmp_path / "logs/correlation/MNIST-40epochs/runs000-099.npz"
    log.parent.mkdir(parents=True)
    log.touch()
    assert stacks("cpu") == ["runs000-099.npz"]


def test_help_explains_every_option_with_its_default(run_script):
    done = run_script("correlation.py", "--help")
    assert done.returncode == 0
    options = done.stdout.partition("options:")[2].split("\n  --")[1:]
    assert len(options) == 10
    flags = ("plot-only", "sample", "sphere")
    for option in options:
        explained = "default: " in " ".join(option.split())
        assert explained != option.startswith(flags), option


def test_a_dataset_without_radii_is_refused_before_it_trains(call, monkeypatch, tmp_path):
    monkeypatch.setitem(correlation.models.TRAINING, "Own", correlation.models.TRAINING["MNIST"])
    done = call(correlation, "--dataset", "Own", "--output", tmp_path)
    assert done.returncode == 2 and "teleportation.py has no RADII for Own" in done.stderr
