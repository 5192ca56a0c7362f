"""studies/modules.py: on the sample with small networks, and what its arms do."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import modules as study
import networks
from conftest import bar_until
from experiment import results
from networks import GPT, BasicBlock, convolution, loss_of
from parameter_symmetries import symmetry_of

STEPS = 12


def small_gpt(shape):
    return GPT(shape, width=8, heads=2, layers=1)


def small_resnet(shape):
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
    return nn.Sequential(convolution(3, 2, stride=4), nn.ReLU(), BasicBlock(2, 4, 2), *head)


@pytest.fixture(autouse=True)
def smaller(monkeypatch):
    """Networks, and a schedule, that take no time."""
    grid = {"SGD": (0.01, 0.1, 1e9), "AdamW": (1e-3, 0.01)}
    small = {
        "GPT": study.Network("text", small_gpt, 2, 4, grid),
        "ResNet": study.Network("CIFAR10", small_resnet, 4, 20, grid),
    }
    monkeypatch.setattr(study, "NETWORKS", small)
    monkeypatch.setattr(study, "EVERY", 2)
    monkeypatch.setattr(study, "EVALUATE", 4)
    once = study.Arm(partial(study.ascend, until=2), moment=4)
    monkeypatch.setitem(study.ARMS, "ascend once", once)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The file with the data, which all tests share."""
    folder = tmp_path_factory.mktemp("data")
    args = SimpleNamespace(sample=True, output=folder, device=torch.device("cpu"), data=None)
    networks.make_data(args)
    return networks.data_file(args)


@pytest.fixture
def args(data, tmp_path):
    args = SimpleNamespace(sample=True, output=tmp_path, device=torch.device("cpu"), steps=STEPS)
    link = networks.data_file(args)
    link.parent.mkdir(parents=True)
    link.symlink_to(data)
    return args


def task(name="GPT", optimizer="SGD", lr=0.1):
    return study.Task(name, optimizer, lr, 7, tuple(study.arms_of(name)))


def trained(task, args, updates=100):
    """Compute a task, interrupted after some updates; return its arrays."""
    study.compute(task, args, bar_until(updates))
    return results.load(study.training_log(task, args), len(task.arms)).arrays


def in_double(name):
    """Return a small network in float64 with gradients, its symmetry, an optimizer and a batch."""
    torch.manual_seed(0)
    is_text = name == "GPT"
    x = torch.randint(256, (3, 16)) if is_text else torch.rand(5, 3, 32, 32)
    batch = x if is_text else x.double(), torch.randint(10, x.shape if is_text else (5,))
    model = study.NETWORKS[name].build(x.shape[1:])
    symmetry = symmetry_of(model, x[:2])
    optimizer = torch.optim.SGD(model.double().parameters(), 0.1, momentum=0.9)
    loss_of(model, batch).backward()
    optimizer.step()
    optimizer.zero_grad()
    loss_of(model, batch).backward()
    return model, symmetry, optimizer, batch


@pytest.mark.parametrize("arm", ["ascend once", "ascend", "random", "descend"])
@pytest.mark.parametrize("name", ["GPT", "ResNet"])
def test_moves_keep_the_loss_and_return_the_growth_of_the_gradient(name, arm):
    model, symmetry, optimizer, batch = in_double(name)
    loss, old = loss_of(model, batch).item(), study.gradient_norm_squared(model)
    rng = torch.Generator().manual_seed(0)
    growth = study.ARMS[arm].move(model, symmetry, optimizer, rng, 1.0)
    model.zero_grad()
    new_loss = loss_of(model, batch)
    new_loss.backward()
    rounding = 1e-10 if name == "GPT" else 1e-4  # batch norm's ε is no symmetry's
    assert new_loss.item() == pytest.approx(loss, rel=rounding)
    assert growth == pytest.approx(study.gradient_norm_squared(model) / old, rel=rounding)
    if arm != "random":
        assert (growth < 1) == (arm == "descend")
    if arm == "ascend once":
        assert growth == pytest.approx(2, rel=0.05)


def test_arms_are_one_until_they_move_and_then_differ(args):
    arrays = trained(task(), args)
    loss = dict(zip(study.ARMS, arrays["test_loss"]))
    assert arrays["growth"].shape == (8, 5)
    for arm in list(study.ARMS)[1:]:
        assert (loss[arm] != loss["plain"]).any(), arm
    # the moves before step 4, the first evaluation, are at step 2
    np.testing.assert_array_equal(loss["ascend once"][0], loss["plain"][0])
    assert (arrays["growth"][0] == 1).all()


def test_a_task_that_is_killed_ends_with_the_same_numbers(args):
    resnet = task("ResNet", "AdamW", 0.01)
    whole = trained(resnet, args)
    study.training_log(resnet, args).path.unlink()
    with pytest.raises(KeyboardInterrupt):
        trained(resnet, args, updates=4)
    resumed = trained(resnet, args)
    for key in ("test_loss", "growth"):
        np.testing.assert_array_equal(whole[key], resumed[key])


def test_a_larger_rate_without_growth_is_plain(args):
    data = [networks.load("text", part, args) for part in ("train", "test")]
    runs = ("plain", None), ("larger rate", np.ones(5)), ("larger rate", np.full(5, 2.0))
    plain, same, twice = (
        study.train(task(), study.ARMS[arm], [], *data, STEPS, growth)["test_loss"]
        for arm, growth in runs
    )
    assert same == plain and twice != plain


def test_the_study_ends_with_a_table_and_is_drawn_again(call, args, tmp_path):
    options = "--sample", "--steps", STEPS, "--runs", 2, "--output", tmp_path
    done = call(study, *options, "--processes", 1)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "figures/sample/2runs-12steps/modules"
    text = (folder / "table.md").read_text("utf-8")
    assert text in done.stdout
    assert "| GPT-AdamW | ascend, linear − plain |" in text
    assert "| ResNet-SGD | ascend, linear − plain |" not in text
    assert results.read(folder / "GPT-SGD.npz").settings["lr"] != 1e9  # where runs diverge
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"steps.png", "seconds.png", "summary.json", "ResNet-AdamW.npz"} < first.keys()
    again = call(study, *options, "--plot-only")
    assert again.returncode == 0, again.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first


def test_at_equal_times_arms_have_made_fewer_steps_the_more_their_moves_last():
    evaluations = np.arange(1.0, 7)
    loss = np.broadcast_to(10 - evaluations[:, None, None], (6, 2, 3))  # falls by 1 each time
    moves = np.stack([np.zeros((6, 3)), np.full((6, 3), 0.5)], 1)
    arrays = {"arms": np.array(["plain", "ascend"]), "test_loss": loss}
    arrays |= {"seconds": np.ones((6, 2, 3)), "move_seconds": moves}
    times, at = study.at_equal_time(arrays)
    np.testing.assert_allclose(times, evaluations)
    np.testing.assert_allclose(at["plain"], loss[:, 0])
    np.testing.assert_allclose(at["ascend"][1:], 10 - evaluations[1:, None].repeat(3, 1) / 1.5)
    assert np.isnan(at["ascend"][0]).all()  # it has not been evaluated by then
