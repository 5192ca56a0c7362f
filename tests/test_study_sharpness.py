"""studies/sharpness.py: on the sample, and what it computes of a network."""

import numpy as np
import pytest
import torch

import sharpness as study
from data import load_sample
from experiment import results
from models import LeakyReLU, cross_entropy, forward, init_weights
from teleportation import estimate, sharpness

OPTIONS = ("--sample", "--dataset", "MNIST", "--runs", 4, "--epochs", 2, "--batches", 2)


@pytest.fixture(autouse=True)
def fewer(monkeypatch):
    """Less of what takes longest."""
    for name, value in {"BATCHES": 4, "STEPS": 1, "RESCALING_BATCH": 200}.items():
        monkeypatch.setattr(study, name, value)


def network(runs=3):
    """A small stack, and a batch of more images than units."""
    rng = torch.Generator().manual_seed(0)
    x, y = torch.rand(300, 240, generator=rng), torch.randint(10, (240,), generator=rng)
    return init_weights((300, 8, 6, 10), range(runs)), x, y


def test_the_sample_ends_with_a_table_and_is_drawn_again(call, tmp_path):
    done = call(study, *OPTIONS, "--processes", 1, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "figures/sample/4runs-2epochs-2batches/sharpness"
    arrays = results.read(folder / "MNIST.npz").arrays
    assert arrays["sweep"].shape == (2, 2, 19, 4)
    log = tmp_path / "logs/correlation/MNIST-sample-2epochs/runs000-003.npz"
    weights = [torch.tensor(results.read(log).arrays[f"W{m}"]) for m in range(3)]
    expected = study.rescaled_estimates(weights, load_sample("MNIST"), False)
    np.testing.assert_array_equal(arrays["rescaled_curvature"], expected["curvature"])
    assert (folder / "table.md").read_text("utf-8") in done.stdout
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert first.keys() == {"MNIST.npz", "summary.json", "table.md", "radii.png", "rescalings.png"}
    again = call(study, *OPTIONS, "--plot-only", "--output", tmp_path)
    assert again.returncode == 0, again.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first


def test_the_loss_around_a_network_at_each_radius_is_that_of_its_perturbations():
    weights, x, y = network()
    weights, x = [w.double() for w in weights], x.double()
    rng = torch.Generator().manual_seed(5)
    for rows, sphere in zip(study.excess_loss(weights, x, y, 5), (False, True)):
        directions = study.mirrored((300, 8, 6, 10), [1.0], rng, sphere)
        for t, excess in zip(study.SWEEP, rows):
            phi = sharpness(weights, x, y, [t * d.double() for d in directions], LeakyReLU())
            loss = cross_entropy(weights, x, y, LeakyReLU())
            torch.testing.assert_close(excess, phi - loss, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("sphere", [False, True])
def test_mirrored_directions_have_the_same_length_and_no_other_mean(sphere):
    d = study.mirrored((30, 8, 4), [0.5, 2.0], torch.Generator().manual_seed(1), sphere)
    flat = torch.cat([part.flatten(1) for part in d], 1)
    torch.testing.assert_close(flat.norm(dim=1), torch.tensor([0.5, 2.0, 0.5, 2.0]))
    mean = (flat[:2] + flat[2:]) / 2
    expected = 0 if sphere else flat[:2].mean(1, keepdim=True)
    torch.testing.assert_close(mean, mean * 0 + expected, atol=1e-6, rtol=0)


def test_rescalings_change_sharpness_and_curvature_and_keep_the_function():
    weights, x, y = network()
    rescaled = study.rescale_to_extremes(weights, x, y, [0.5, 1.0], True)
    logits = forward(weights, x, LeakyReLU())
    torch.testing.assert_close(forward(rescaled, x, LeakyReLU()), logits.expand(4, -1, -1, -1))
    start, *ends = (
        torch.stack(estimate(w, x[:, :200], y[:200], [0.5, 1.0], 9, LeakyReLU(), True)[:2])
        for w in (weights, *zip(*rescaled))
    )
    for quantity, (less, more) in enumerate([ends[:2], ends[2:]]):
        assert (less[quantity] < start[quantity]).all()
        assert (more[quantity] > start[quantity]).all()


def test_radii_at_which_networks_guess_are_not_tested():
    noise = np.random.default_rng(0).normal(size=(2, 60))
    train_loss, gap = 1 + 0.1 * noise[0], 0.5 + 0.05 * noise[1]
    sweep = np.broadcast_to(0.01 * gap, (2, 2, 19, 60)) + 3 * (study.SWEEP > 1)[:, None]
    arrays = {"train_loss": train_loss, "test_loss": train_loss + gap, "sweep": sweep}
    summary = study.across_radii(arrays | {"sweep_radii": study.SWEEP})
    assert summary["orthant"]["works"].tolist() == (study.SWEEP <= 1).tolist()
    np.testing.assert_allclose(summary["sphere"]["reliability"], 1)
    assert summary["sphere"]["partial_r"][0]["pearson"] > 0.99
    least = summary["least_p"]
    assert least["radius"] <= 1
    assert least["holm"] == pytest.approx(least["p"] * 2 * (study.SWEEP <= 1).sum())
