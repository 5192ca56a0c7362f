"""studies/rescaled_teleports.py: its rescalings keep the function, and go where teleports go."""

import numpy as np
import pytest
import torch

import rescaled_teleports as study
from data import load_sample, shuffled_batch
from experiment import results
from models import forward, init_weights, run_seeds, train_epoch_sgd
from teleportation import RESCALING, act

figure_4 = study.figure_4
SMALL = figure_4.SETTINGS["MNIST"]._replace(
    teleport_lr=(-2e-2, 5e-2, -1e-4, 1e-4),
    teleports=(2, 1, 2, 2),
    radii=(0.3, 0.6),
    directions=20,
    sharpness_steps=2,
    epochs=5,
    teleport_epoch=3,
    teleport_batch=300,
    measured_directions=2,
    estimation_batches=2,
)


@pytest.fixture(scope="module")
def networks():
    """Two networks for each arm after 12 epochs on the sample, and the first moves' batch."""
    data, weights = load_sample("MNIST"), init_weights(SMALL.widths, [2, 3])
    for _ in range(12):
        train_epoch_sgd(weights, data.x_train, data.y_train, SMALL.lr, figure_4.ACTIVATION)
    weights = [w.repeat(len(study.ARMS), 1, 1, 1) for w in weights]
    return weights, *shuffled_batch(data, SMALL.teleport_batch, 0)


def test_rescaled_arms_keep_their_function_and_go_where_the_teleports_go(networks):
    start, x, y = networks
    teleported, weights = [w[1:5].clone() for w in start], [w.clone() for w in start]
    figure_4.teleport_arms(teleported, x, y, 0, SMALL)
    stack = figure_4.Stack("MNIST", range(2), SMALL)
    study.move_arms(weights, x, y, 0, stack)
    outputs = (forward(w, x, figure_4.ACTIVATION) for w in (weights, start))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    before, target, after = (
        figure_4.measure(w, x, y, 0, SMALL)
        for w in ([w[1:5] for w in start], teleported, [w[1:5] for w in weights])
    )
    for key, arms in (("perturbed_loss", slice(0, 2)), ("kappa", slice(2, 4))):
        distance = (target[key] - before[key])[arms]
        ratio = (after[key] - before[key])[arms] / distance
        assert (ratio > 0.3).all() and (ratio < 1.3).all(), key
    assert all((w[0] == s[0]).all() for w, s in zip(weights, start))  # plain stays

    lengths = []
    for i in (study.ARMS.index("sharpness increase, rescaled"), -1):  # and its control
        elements = study.elements_of_rescaling([w[i] for w in start], [w[i] for w in weights])
        lengths.append([(g - torch.eye(g.shape[-1])).norm(dim=(-2, -1)) for g in elements])
    torch.testing.assert_close(*lengths, rtol=1e-3, atol=1e-6)
    assert all((length > 1e-3).all() for length in lengths[0])


def test_elements_of_a_rescaling_are_found_from_its_weights(networks):
    weights = [w[0] for w in networks[0]]
    T = [0.3 * torch.randn(2, d, generator=torch.Generator().manual_seed(d)) for d in (16, 10)]
    elements = [torch.diag_embed(t.exp()) for t in T]
    rescaled = act(weights, torch.zeros(784, 1), elements, figure_4.ACTIVATION, RESCALING)
    for g, t in zip(study.elements_of_rescaling(weights, rescaled), T):
        torch.testing.assert_close(g, torch.eye(t.shape[-1]) + torch.diag_embed(t))


def test_a_network_without_a_target_stays(networks):
    weights, target = [w[0] for w in networks[0]], torch.tensor([torch.inf, 50.0])
    new = study.rescale_to(target, lambda w: w[2].sum((-2, -1)), weights, torch.eye(784)[:, :9])
    for before, after in zip(weights, new):
        torch.testing.assert_close(before[0], after[0])
    assert (weights[2][1] - new[2][1]).abs().max() > 1e-3


def test_the_study_runs_and_draws_its_results_again(call, tmp_path, monkeypatch):
    monkeypatch.setitem(figure_4.SETTINGS, "MNIST", SMALL)
    options = "--sample", "--dataset", "MNIST", "--runs", "2", "--output", tmp_path
    done = call(study, *options, "--processes", "1")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "figures/sample/2runs/rescaled_teleports"
    names = {"MNIST.npz", "MNIST.png", "summary.json", "table.md"}
    assert {path.name for path in folder.iterdir()} == names
    assert (folder / "table.md").read_text("utf-8").split("\n\n")[0] in done.stdout
    assert call(study, *options, "--plot-only").stdout == done.stdout

    saved = results.read(folder / "MNIST.npz").arrays
    assert list(saved["arms"]) == list(study.ARMS)
    before, after = saved["batch_loss"].swapaxes(0, 1)
    np.testing.assert_allclose(before, after, rtol=1e-5)  # no move changes the loss
    data, weights = load_sample("MNIST"), init_weights(SMALL.widths, run_seeds(range(2)))
    for loss in saved["train_loss"][:, 0]:
        x, y = data.x_train, data.y_train
        expected = train_epoch_sgd(weights, x, y, SMALL.lr, figure_4.ACTIVATION)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
