"""studies/rescaled_teleports.py: its rescalings keep the function, and go where teleports go."""

import numpy as np
import torch

import rescaled_teleports as study
from experiment import results
from models import forward
from teleportation import RESCALING, act
from test_teleport_sharpness_curvature import SMALL, trained

figure_4, ARMS = study.figure_4, study.STUDY.arms
SETTING = SMALL._replace(teleport_lr=(-2e-2, 5e-2, -1e-4, 1e-4), measured_directions=2)


def test_rescaled_arms_keep_their_function_and_go_where_the_teleports_go():
    start, x, y = trained(arms=len(ARMS))
    teleported, weights = [w[1:5].clone() for w in start], [w.clone() for w in start]
    figure_4.teleport_arms(teleported, x, y, 0, SETTING)
    study.move_arms(weights, x, y, 0, figure_4.Stack("MNIST", range(2), SETTING))
    outputs = (forward(w, x, figure_4.ACTIVATION) for w in (weights, start))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    before, target, after = (
        figure_4.measure(w, x, y, 0, SETTING)
        for w in ([w[1:5] for w in start], teleported, [w[1:5] for w in weights])
    )
    for key, arms in (("perturbed_loss", slice(0, 2)), ("kappa", slice(2, 4))):
        distance = (target[key] - before[key])[arms]
        ratio = (after[key] - before[key])[arms] / distance
        assert (ratio > 0.3).all() and (ratio < 1.3).all(), key
    assert all((w[0] == s[0]).all() for w, s in zip(weights, start))  # plain stays

    lengths = []
    for arm in ("sharpness increase, rescaled", "random rescaling"):
        i = ARMS.index(arm)
        elements = study.elements_of_rescaling([w[i] for w in start], [w[i] for w in weights])
        lengths.append([(g - torch.eye(g.shape[-1])).norm(dim=(-2, -1)) for g in elements])
    torch.testing.assert_close(*lengths, rtol=1e-3, atol=1e-6)
    assert all((length > 1e-3).all() for length in lengths[0])


def test_elements_of_a_rescaling_are_found_from_its_weights():
    weights = [w[0] for w in trained(arms=4)[0]]
    T = [0.3 * torch.randn(2, d, generator=torch.Generator().manual_seed(d)) for d in (16, 10)]
    elements = [torch.diag_embed(t.exp()) for t in T]
    rescaled = act(weights, torch.zeros(784, 1), elements, figure_4.ACTIVATION, RESCALING)
    for g, t in zip(study.elements_of_rescaling(weights, rescaled), T):
        torch.testing.assert_close(g, torch.eye(t.shape[-1]) + torch.diag_embed(t))


def test_a_network_without_a_target_stays():
    weights, target = [w[0] for w in trained(arms=4)[0]], torch.tensor([torch.inf, 50.0])
    new = study.rescale_to(target, lambda w: w[2].sum((-2, -1)), weights, torch.eye(784)[:, :9])
    for before, after in zip(weights, new):
        torch.testing.assert_close(before[0], after[0])
    assert (weights[2][1] - new[2][1]).abs().max() > 1e-3


def test_the_study_runs_and_draws_its_results_again(call, tmp_path, monkeypatch):
    monkeypatch.setitem(figure_4.SETTINGS, "MNIST", SETTING)
    options = "--sample", "--dataset", "MNIST", "--runs", "2", "--output", tmp_path
    done = call(study, *options, "--processes", "1")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "figures/sample/2runs/rescaled_teleports"
    names = {"MNIST.npz", "MNIST.png", "summary.json", "table.md"}
    assert {path.name for path in folder.iterdir()} == names
    assert (folder / "table.md").read_text("utf-8") in done.stdout
    assert call(study, *options, "--plot-only").stdout == done.stdout
    saved = results.read(folder / "MNIST.npz").arrays
    assert list(saved["arms"]) == list(ARMS)
    before, after = saved["batch_loss"].swapaxes(0, 1)
    np.testing.assert_allclose(before, after, rtol=1e-5)  # no move changes the loss
