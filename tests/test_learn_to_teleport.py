"""learn-to-teleport: the problems, the LSTMs, what they learn, kill and resume, the statistics."""

import contextlib
import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

import multi_layer_regression as script
import regression
from conftest import GOLDEN, bar_until
from experiment import results
from regression import LearnedOptimizer, Network, draw_problem, new_training, rollout

SMALL = {
    "LSTM(lr)": (Network(("lr",), 5, 1e-4),),
    "LSTM(lr,tele)": (Network(("lr", "T"), 5, 1e-4),),
    "LSTM(update)": (Network(("update",), 5, 1e-3),),
    "LSTM(update,tele)": (Network(("update",), 5, 1e-3), Network(("T",), 4, 1e-4)),
}


@pytest.fixture
def double():
    """Make float64 the type of all that is drawn."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def small(monkeypatch):
    """LSTMs of five units, few steps, and seven problems as tests."""
    trainings = [
        t._replace(networks=tuple(n._replace(hidden=5) for n in t.networks), steps=11)
        for t in script.TRAININGS
    ]
    monkeypatch.setattr(script, "TRAININGS", trainings)
    monkeypatch.setattr(script, "TEST_SEEDS", script.TEST_SEEDS[:7])


# Problems


def test_problems_and_gradient_descent_are_the_published_ones():
    golden = GOLDEN["regression"]
    for seed in (12345, -1):
        problem = draw_problem(seed)
        parts = dict(zip(("W_0", "W_1", "X", "Y"), (*problem.w, problem.x, problem.y)))
        for name, total in golden[f"sums_seed_{seed}"].items():
            assert parts[name].sum().item() == pytest.approx(total, rel=1e-6)
    published = draw_problem(script.TEST_SEEDS[script.PUBLISHED])
    loss, norm = rollout(script.gradient_descent(script.GD_LR), published, 100)
    np.testing.assert_allclose(loss[golden["steps"]].T, golden["gd_loss"], rtol=1e-5)
    np.testing.assert_allclose(norm[0], golden["gd_gradient_norm_squared_step_0"], rtol=1e-5)
    assert script.TRAINING_SEEDS[:3] == [-1, 12344, 49379]


def test_no_test_seed_is_a_training_seed():
    """The generator takes a seed modulo 2³²."""
    seeds = [seed % 2**32 for seed in script.TRAINING_SEEDS + script.TEST_SEEDS]
    assert len(set(seeds)) == len(seeds) == 805


def test_scaled_gradients_are_those_of_andrychowicz():
    gradient = torch.tensor([1e5, -1.0, 1e-3, -1e-6, 0.0])
    log, sign = regression.sign_and_log(gradient).chunk(2)
    torch.testing.assert_close(log[:3], gradient[:3].abs().log() / 10)
    assert log[3:].tolist() == [-1, -1] and sign[[0, 1, 2, 4]].tolist() == [1, -1, 1, 0]
    torch.testing.assert_close(sign[3].item(), -1e-6 * np.exp(10).item())


# LSTMs


def test_lstms_begin_as_torchs_do_and_share_what_they_can():
    (alone, _), (both, _) = (
        new_training(SMALL[name], False, 3) for name in ("LSTM(lr)", "LSTM(lr,tele)")
    )
    for key, value in alone.state_dict().items():
        torch.testing.assert_close(value, both.state_dict()[key], rtol=0, atol=0)
        assert 0.7 / 5**0.5 < value.abs().max() <= 1 / 5**0.5 or value.numel() < 9
    torch.manual_seed(3)
    torch.testing.assert_close(nn.LSTMCell(800, 5).weight_ih.detach(), alone[0].cells[0].weight_ih)


def begin(networks, scaled):
    """LSTMs with step sizes inside of LR_RANGE, their Adam, and a problem with smooth steps."""
    lstms, adam = new_training(networks, scaled, 5)
    for lstm in lstms:
        lstm.cells[0].weight_ih.mul_(1 if scaled else 1e-3)
        if "lr" in lstm.names:
            lstm.readouts[0].weight.mul_(1e-3)
            lstm.readouts[0].bias.fill_(2e-3)
    problem = draw_problem(7)
    return lstms, adam, problem._replace(w=problem.w - 0.5)


def train_plainly(lstms, networks, problem, steps, scaled):
    """Return the parameters after training by plain autograd, step by step as published."""
    parameters = {k: p.clone().requires_grad_() for k, p in lstms.state_dict().items()}
    adam = torch.optim.Adam(
        {"params": [p for key, p in parameters.items() if key[0] == str(k)], "lr": network.lr}
        for k, network in enumerate(networks)
    )

    def call(name, module, *inputs):
        values = {key: parameters[f"{name}.{key}"] for key, _ in module.named_parameters()}
        return functional_call(module, values, inputs)

    def feed(k, x):
        for i, cell in enumerate(lstms[k].cells):
            states[k][i] = call(f"{k}.cells.{i}", cell, x, states[k][i])
            x = states[k][i][0]
        for i, name in enumerate(lstms[k].names):
            outputs[name] = call(f"{k}.readouts.{i}", lstms[k].readouts[i], x)

    w, outputs, meta_loss, sigma = problem.w, {}, 0, nn.functional.leaky_relu
    states = [lstm.zero_state(1) for lstm in lstms]
    for t in range(steps):
        loss = (problem.y - w[1] @ sigma(w[0] @ problem.x, 0.1)).square().sum() / 2
        gradient, meta_loss = regression.loss_and_gradient(w, problem)[1], meta_loss + loss
        x = gradient.flatten()[None]
        x = regression.sign_and_log(x) if scaled else x
        if "update" in lstms[0].names:
            feed(0, x)
            w = w + outputs["update"].view_as(w)
        else:
            lr = outputs["lr"].clamp(1e-7, 5e-3)[0] if t else 1e-4
            w = w - lr * gradient
        if t > 0 and t % 10 == 0:
            adam.zero_grad()
            meta_loss.backward()
            adam.step()
            w, meta_loss = w.detach(), 0
            states = [[tuple(v.detach() for v in cell) for cell in state] for state in states]
        if lstms[-1].names != ["update"]:
            feed(len(lstms) - 1, x)
        if "T" in outputs:
            T, identity = outputs["T"].view_as(problem.x), torch.eye(len(problem.x))
            T = 0.01 * T / T.norm()
            a = sigma((identity + T) @ sigma(w[0] @ problem.x, 0.1), 10.0)
            w = torch.stack([a @ torch.linalg.pinv(problem.x), w[1] @ (identity - T)])
    return parameters


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("method", SMALL)
def test_training_is_that_of_plain_autograd(method, scaled, double):
    """Three steps of Adam; the last nine steps of a trajectory train nothing."""
    lstms, adam, problem = begin(SMALL[method], scaled)
    before = {key: value.clone() for key, value in lstms.state_dict().items()}
    expected = train_plainly(lstms, SMALL[method], problem, 40, scaled)
    regression.train_trajectory(lstms, adam, problem, 40)
    for key, value in lstms.state_dict().items():
        assert not torch.equal(value, before[key]), key
        torch.testing.assert_close(value, expected[key].detach(), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("method", SMALL)
def test_a_stack_is_its_members(method, double):
    lstms, _, _ = begin(SMALL[method], False)

    def losses(seeds):
        problem = draw_problem(seeds)
        problem = problem._replace(w=problem.w - 0.5)
        return rollout(LearnedOptimizer(lstms.eval(), problem), problem, 4)

    for stacked, members in zip(losses([3, 4, 5]), zip(*map(losses, [3, 4, 5]))):
        torch.testing.assert_close(stacked, torch.stack(members, 1), rtol=1e-8, atol=1e-8)


# The script


@pytest.fixture
def train(monkeypatch, tmp_path):
    """Train LSTMs of SMALL under a name, interrupted after some updates; return the arrays."""
    monkeypatch.setattr(script, "SAVE_EVERY", 1)
    monkeypatch.setattr(script, "TEST_SEEDS", [1, 2])

    def train(name, networks, methods, steps, updates=99):
        log = results.Log(tmp_path / f"{name}.npz", {"seed": 1}, ())
        monkeypatch.setattr(script, "log_of", lambda *_: log)
        with contextlib.suppress(KeyboardInterrupt):
            script.train(script.Training(networks, steps, methods), None, bar_until(updates))
        return results.load(log).arrays

    return train


@pytest.mark.parametrize("method", ["LSTM(lr,tele)", "LSTM(update,tele)"])
def test_an_interrupted_training_ends_with_the_same_numbers(train, method):
    """And what is trained longer was, on the way, what is trained less."""
    networks, methods = SMALL[method], {"a": 3, "b": 5}
    whole, less = train("whole", networks, methods, 20), train("less", networks, {"a": 3}, 20)
    for updates in (2, 4, 99):
        resumed = train("cut", networks, methods, 20, updates)
    assert whole.keys() == resumed.keys() and whole["steps"] == 5
    assert whole["a: loss"].shape == (32, 2) and (whole["a: loss"] != whole["b: loss"]).any()
    for key in whole:
        np.testing.assert_array_equal(whole[key], resumed[key], err_msg=key)
    np.testing.assert_array_equal(whole["a: loss"], less["a: loss"])


def test_training_that_diverges_is_named_and_tested(train, monkeypatch):
    monkeypatch.setattr(regression, "LR_RANGE", (1.0, 1.0))
    with pytest.warns(UserWarning, match="lr-0: the loss in training is not finite"):
        arrays = train("lr-0", SMALL["LSTM(lr)"], {"a": 1}, 100)
    assert np.isnan(arrays["a: loss"][-1]).all()


def test_medians_and_ratios_have_exact_intervals():
    values = np.array([3, 1, 2, 5, 4, 7, 6, 9, 8, np.inf])
    assert script.median_of_few(values) == {"median": 5.5, "low": 2, "high": 9}
    assert np.isnan(script.median_of_few(values[:5])["low"])
    one, worse = np.ones((10, 3)), np.full((10, 3), np.inf)
    ratio = script.compare(one / 2, one[:1])
    assert ratio["median"] == 0.5 and ratio["p"] == pytest.approx(2 / 2**10)
    assert script.compare(worse, worse)["median"] == 1
    mixed = np.where(np.arange(10)[:, None] < 4, 0.5, 2.0) * one
    assert script.compare(mixed, one)["p"] == pytest.approx(0.754, abs=1e-3)


def test_what_diverges_or_fails_is_counted():
    """Losses of 1, but 0.5 for LSTM(lr,tele); three trajectories of LSTM(lr) diverge."""
    arrays = {"gd_tuned_lr": 1e-4}
    for method in script.METHODS:
        loss = np.ones((1 if method.startswith("GD") else 10, 32, 105), np.float32)
        loss[:, 0] = 2
        arrays[f"{method}: loss"] = loss / 2 if method == "LSTM(lr,tele)" else loss
        arrays[f"{method}: seconds_a_step"] = 1e-3
    arrays["LSTM(lr): loss"][0, 15:, 5:7] = np.nan
    arrays["LSTM(lr): loss"][1, 15:] = 3
    arrays["LSTM(lr): loss"][1, -1, 6:] = 1
    summary = script.summarise(arrays)
    row = "| LSTM(lr) | 1 [1, 1] | 1 [1, 1] | 1 [1, 1] | 3 of 1000 | 1 | 1 |"
    assert row in script.loss_table(summary["methods"])
    row = "| LSTM(lr,tele) / LSTM(lr) | 0.5 [0.5, 0.5] | 0.002 | 0.5, 0.1667, 0.5,"
    assert row in script.ratio_table(summary["ratios"])


def test_quick_ends_with_table_and_figures_and_draws_them_again(tmp_path, call, small):
    options = ["--quick", "--seeds", "1", "--processes", "1", "--output", tmp_path]
    done = call(script, *options)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "learn-to-teleport/figures/quick-1seeds"
    files = {path: path.read_bytes() for path in folder.iterdir()}
    names = "figure_6.png figure_6.pdf all_methods.png scaled_gradients.png"
    names += " results.npz summary.json table.md"
    assert {path.name for path in files} == set(names.split())
    summary = json.loads(files[folder / "summary.json"])
    assert summary["settings"]["initialisations"] == 1 and len(summary["methods"]) == 12
    assert call(script, *options, "--plot-only").stdout == done.stdout
    assert {path: path.read_bytes() for path in folder.iterdir()} == files
