"""studies/quantisation.py and the networks it trains: symmetries, arms, resuming."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import networks
import quantisation as script
from experiment import results
from networks import NETWORKS
from parameter_symmetries.check import check_symmetry
from parameter_symmetries.groups import LINEAR
from parameter_symmetries.trace import symmetry_of

SHAPES = {"text": (16,), "CIFAR10": (3, 32, 32), "FashionMNIST": (1, 28, 28), "MNIST": (1, 28, 28)}


def inputs(name, n=3):
    shape = n, *SHAPES[NETWORKS[name].dataset]
    return torch.randint(256, shape) if name == "gpt" else torch.rand(shape)


def untrained(name):
    """Return a network for evaluation, with running statistics and norms that are not trivial."""
    model = NETWORKS[name].build(SHAPES[NETWORKS[name].dataset])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.rand_like(p))
        if name != "gpt":
            model(inputs(name, n=20))
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_has_symmetries_once_its_norms_are_folded(name):
    model = untrained(name)
    x = inputs(name)
    folded = networks.folded(model)
    torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-4, atol=1e-4)
    symmetry = symmetry_of(folded, x)
    check_symmetry(folded, symmetry, inputs(name, n=4))
    assert (name == "gpt") == any(group.kind == LINEAR for group in symmetry)


def test_the_diagonal_matrices_of_gl_are_a_symmetry_of_as_many_units():
    model, x = untrained("gpt"), inputs("gpt")
    symmetry = symmetry_of(model, x)
    rescalings = [script.diagonal(group, model) for group in symmetry]
    check_symmetry(model, rescalings, x)
    assert sum(g.count for g in rescalings) == sum(g.count * g.size for g in symmetry)
    for group in rescalings:
        members = [axis.member for axis in group.axes if axis.member is not None]
        assert all(len(member.unique()) == group.count for member in members)


@pytest.mark.parametrize("arm", script.ARMS)
@pytest.mark.parametrize("name", ["gpt", "mlp-mnist"])
def test_arms_keep_the_function_and_say_what_rounding_does(name, arm, monkeypatch):
    monkeypatch.setattr(script, "BATCHES", 2)
    monkeypatch.setattr(script, "STEPS", 5)
    model, x = networks.folded(untrained(name)), inputs(name, n=8)
    y = torch.randint(10, x.shape if name == "gpt" else x.shape[:1])
    before, start = model(x), copy.deepcopy(model.state_dict())
    cell = script.measure(model, arm, "channel", {"calibration": (x, y), "test": (x, y)}, seed=1)
    torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-3)
    unmoved = all(torch.equal(p, start[key]) for key, p in model.state_dict().items())
    assert unmoved == (arm == "trained")
    assert all(values.shape == (len(script.BITS),) for values in cell.values())
    assert (np.diff(cell["predicted_rise"]) > 0).all()
    loss, _ = networks.evaluate(model, x, y)
    assert abs(cell["loss"][0] - loss) < abs(cell["loss"][-1] - loss)


def test_predictions_that_come_true_are_counted_in_their_decade():
    predicted = np.array([2e-3, 3e-3, 0.2, 0.3])
    rises = {"trained": np.stack([predicted, predicted * [1.1, 1.3, 1, 5]])}
    decades = script.agreement(rises)
    assert list(decades) == [-3, -1]
    assert decades[-3] == {"cells": 2, "median": pytest.approx(1.2), "within": 1}
    assert decades[-1]["within"] == 0.5


def test_an_interrupted_study_ends_with_the_same_numbers(tmp_path, call, monkeypatch):
    monkeypatch.setattr(script, "STEPS", 5)
    monkeypatch.setattr(script, "BITS", (8, 4))
    monkeypatch.setattr(script, "PERS", {"tensor": "tensor", "32 inputs": 32})
    monkeypatch.setattr(script, "COLUMNS", {"tensor": (8, 4), "32 inputs": (4,)})
    command = "--sample", "--network", "mlp-mnist", "--runs", "2", "--processes", "1"
    done = call(script, *command, "--output", tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    assert "named beforehand" in done.stdout
    again = call(script, *command, "--output", tmp_path / "whole", "--plot-only")
    assert again.stdout == done.stdout
    original, calls = script.measure, []

    def interrupted(*arguments):
        calls.append(arguments[1:3])
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(script, "measure", interrupted)
    cut = [call(script, *command, "--output", tmp_path / "cut").returncode for _ in range(2)]
    assert cut == [130, 0]
    assert len(calls) == 1 + 2 * len(script.cells("mlp-mnist")) and calls[4] == calls[5]
    files = [next((tmp_path / f).rglob("figures/**/mlp-mnist.npz")) for f in ("whole", "cut")]
    whole, cut = (results.read(file).arrays for file in files)
    np.testing.assert_equal(cut, whole)
    assert whole["loss"].shape == (4, 2, 2, 2) and whole["float_loss"].shape == (2,)


def test_a_damaged_file_of_all_data_is_told(tmp_path):
    args = SimpleNamespace(output=tmp_path, sample=True, device=torch.device("cpu"))
    networks.data_file(args).parent.mkdir(parents=True)
    networks.data_file(args).write_bytes(b"no archive")
    with pytest.raises(results.UserError, match="data-sample.npz is damaged: delete it"):
        networks.load("MNIST", "test", args)


def test_a_training_that_diverges_is_told():
    network = NETWORKS["mlp-mnist"]._replace(lr=1e30, epochs=3)
    with pytest.raises(results.UserError, match="not finite at step"):
        networks.train(network, torch.rand(128, 1, 28, 28), torch.randint(10, (128,)), 0)
