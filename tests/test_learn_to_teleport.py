"""learn-to-teleport: the problems, the LSTMs, what they learn, kill and resume, the verdicts."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

from experiment import plots
from experiment.files import ROOT, load
from experiment.statistics import compare_ratios, median_of_few

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

import multi_layer_regression as script
import regression
from conftest import GOLDEN
from lstm import LSTM
from models import cross_entropy, init_weights
from regression import Learned, Network, draw_problem, new_training, rollout, train_trajectory
from teleportation import (
    FIRST_ORDER,
    act,
    inverse_group_action,
    inverse_group_action_first_order,
    pseudoinverse,
)

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


def pair_of_layers(n):
    """U, V, h and T in float64; h: [6, n]."""
    generator = torch.Generator().manual_seed(1)
    shapes = (3, 4, 5), (3, 5, 6), (6, n), (3, 5, 5)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


@pytest.mark.parametrize("n", [6, 4])
def test_inverse_group_action_keeps_the_outputs(n, activation):
    U, V, h, T = pair_of_layers(n)
    g = torch.linalg.matrix_exp(T)
    U_new, V_new = inverse_group_action(U, V, h, g, activation)
    before, after = U @ activation(V @ h), U_new @ activation(V_new @ h)
    torch.testing.assert_close(after, before, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(activation(V_new @ h), g @ activation(V @ h), rtol=1e-8, atol=1e-8)


def test_first_order_form_errs_by_the_square_of_T(activation):
    U, V, h, T = pair_of_layers(6)
    h_pinv, outputs = pseudoinverse(h), U @ activation(V @ h)
    errors = []
    for size in (1e-2, 1e-3, 1e-4):
        g = torch.eye(5) + size * T
        U_new, V_new = inverse_group_action_first_order(U, V, h, g, activation, h_pinv)
        torch.testing.assert_close(V_new, inverse_group_action(U, V, h, g, activation)[1])
        torch.testing.assert_close(U_new, U - U @ (size * T))
        errors.append((U_new @ activation(V_new @ h) - outputs).norm())
    np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 100, rtol=1e-6)


def test_first_order_form_is_an_action_on_networks(activation, double):
    weights, x, y = init_weights((12, 6, 5, 4), 1), torch.rand(12, 4), torch.tensor([0, 1, 2, 3])
    elements = [FIRST_ORDER.element(1e-5 * torch.rand(d, d)) for d in (6, 5)]
    moved = act([w.double() for w in weights], x, elements, activation, FIRST_ORDER)
    losses = [cross_entropy(w, x, y, activation) for w in ([w.double() for w in weights], moved)]
    torch.testing.assert_close(*losses, rtol=1e-7, atol=0)
    assert (moved[1] - weights[1]).norm() > 1e-6


def test_problems_and_gradient_descent_are_the_published_ones():
    golden = GOLDEN["regression"]
    for seed in (12345, -1):
        problem = draw_problem(seed)
        parts = dict(zip(("W_0", "W_1", "X", "Y"), (*problem.w, problem.x, problem.y)))
        for name, total in golden[f"sums_seed_{seed}"].items():
            assert parts[name].sum().item() == pytest.approx(total, rel=1e-6)
    published = draw_problem(script.TEST_SEEDS[script.TEST_SETS["published 5"]])
    loss, norm = rollout(script.gradient_descent(script.GD_LR), published, 100)
    np.testing.assert_allclose(loss[golden["steps"]].T, golden["gd_loss"], rtol=1e-5)
    np.testing.assert_allclose(norm[0], golden["gd_gradient_norm_squared_step_0"], rtol=1e-5)
    assert script.TRAINING_SEEDS[:3] == [-1, 12344, 49379]


def test_training_and_test_seeds_are_apart():
    """The generator takes a seed modulo 2³²."""
    seeds = [seed % 2**32 for seed in script.TRAINING_SEEDS + script.TEST_SEEDS]
    assert len(set(seeds)) == len(seeds) == 805


def test_scaled_gradients_are_those_of_andrychowicz():
    gradient = torch.tensor([1e5, -1.0, 1e-3, -1e-6, 0.0])
    log, sign = regression.sign_and_log(gradient).chunk(2)
    torch.testing.assert_close(log[:3], gradient[:3].abs().log() / 10)
    assert log[3:].tolist() == [-1, -1] and sign[[0, 1, 2, 4]].tolist() == [1, -1, 1, 0]
    torch.testing.assert_close(sign[3].item(), -1e-6 * np.exp(10).item())


def test_an_lstm_is_cells_and_a_linear_layer():
    torch.manual_seed(0)
    lstm, x = LSTM(7, 5, {"a": 3, "b": 2}, lambda x: 2 * x).eval(), torch.rand(4, 6, 7)
    state, (first, second) = lstm.zero_state(6), lstm.cells
    one, two = (torch.zeros(6, 5),) * 2, (torch.zeros(6, 5),) * 2
    for step in x:
        outputs, state = lstm(step, state)
        one = first(2 * step, one)
        two = second(one[0], two)
        for name, readout in zip("ab", lstm.readouts):
            torch.testing.assert_close(outputs[name], readout(two[0]))


def test_lstms_begin_as_torchs_do_and_share_what_they_can():
    (alone, _), (both, _) = (
        new_training(SMALL[name], False, 3) for name in ("LSTM(lr)", "LSTM(lr,tele)")
    )
    for key, value in alone.state_dict().items():
        torch.testing.assert_close(value, both.state_dict()[key], rtol=0, atol=0)
        assert 0.7 / 5**0.5 < value.abs().max() <= 1 / 5**0.5 or value.numel() < 9
    torch.manual_seed(3)
    torch.testing.assert_close(nn.LSTMCell(800, 5).weight_ih.detach(), alone[0].cells[0].weight_ih)


def start(networks, scaled):
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
        own = {key: parameters[f"{name}.{key}"] for key, _ in module.named_parameters()}
        return functional_call(module, own, inputs)

    def ask(k, x):
        for i, cell in enumerate(lstms[k].cells):
            states[k][i] = call(f"{k}.cells.{i}", cell, x, states[k][i])
            x = states[k][i][0]
        for i, name in enumerate(lstms[k].names):
            given[name] = call(f"{k}.readouts.{i}", lstms[k].readouts[i], x)

    w, given, meta_loss, sigma = problem.w, {}, 0, nn.functional.leaky_relu
    states = [lstm.zero_state(1) for lstm in lstms]
    for t in range(steps):
        loss = (problem.y - w[1] @ sigma(w[0] @ problem.x, 0.1)).square().sum() / 2
        gradient, meta_loss = regression.loss_and_gradient(w, problem)[1], meta_loss + loss
        x = gradient.flatten()[None]
        x = regression.sign_and_log(x) if scaled else x
        if "update" in lstms[0].names:
            ask(0, x)
            w = w + given["update"].view_as(w)
        else:
            lr = given["lr"].clamp(1e-7, 5e-3)[0] if t else 1e-4
            w = w - lr * gradient
        if t > 0 and t % 10 == 0:
            adam.zero_grad()
            meta_loss.backward()
            adam.step()
            w, meta_loss = w.detach(), 0
            states = [[tuple(v.detach() for v in cell) for cell in state] for state in states]
        if lstms[-1].names != ["update"]:
            ask(len(lstms) - 1, x)
        if "T" in given:
            T, identity = given["T"].view_as(problem.x), torch.eye(len(problem.x))
            T = 0.01 * T / T.norm()
            a = sigma((identity + T) @ sigma(w[0] @ problem.x, 0.1), 10.0)
            w = torch.stack([a @ torch.linalg.pinv(problem.x), w[1] @ (identity - T)])
    return parameters


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("method", SMALL)
def test_training_is_that_of_plain_autograd(method, scaled, double):
    """Three steps of Adam; the last nine steps of a trajectory train nothing."""
    lstms, adam, problem = start(SMALL[method], scaled)
    before = {key: value.clone() for key, value in lstms.state_dict().items()}
    expected = train_plainly(lstms, SMALL[method], problem, 40, scaled)
    train_trajectory(lstms, adam, problem, 40)
    for key, value in lstms.state_dict().items():
        assert not torch.equal(value, before[key]), key
        torch.testing.assert_close(value, expected[key].detach(), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("method", SMALL)
def test_a_stack_is_its_members(method, double):
    lstms, _, _ = start(SMALL[method], False)

    def run(seeds):
        problem = draw_problem(seeds)
        problem = problem._replace(w=problem.w - 0.5)
        return rollout(Learned(lstms.eval(), problem), problem, 4)

    for stacked, members in zip(run([3, 4, 5]), zip(*map(run, [3, 4, 5]))):
        torch.testing.assert_close(stacked, torch.stack(members, 1), rtol=1e-8, atol=1e-8)


class Bar:
    """A progress bar that interrupts at an update."""

    def __init__(self, updates):
        self.left = updates

    def update(self, n=1):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["LSTM(lr,tele)", "LSTM(update,tele)"])
def test_an_interrupted_task_ends_with_the_same_numbers(tmp_path, monkeypatch, method):
    """And what is trained further was, on the way, what is trained less."""
    monkeypatch.setattr(script, "SAVE_EVERY", 1)
    monkeypatch.setattr(script, "TEST_SEEDS", [1, 2])
    methods = {name: script.Method(SMALL[method], n, 20) for name, n in (("a", 3), ("b", 5))}
    for name, updates in (("whole", 99), ("cut", 3), ("cut", 2), ("cut", 99)):
        with contextlib.suppress(KeyboardInterrupt):
            script.train(methods, 0, tmp_path / name, {}, Bar(updates))
    script.train({"a": methods["a"]}, 0, tmp_path / "less", {}, Bar(99))
    whole, resumed, less = (load(tmp_path / name, {}) for name in ("whole", "cut", "less"))
    assert whole.keys() == resumed.keys() and whole["steps"] == 5
    assert whole["a: loss"].shape == (32, 2) and (whole["a: loss"] != whole["b: loss"]).any()
    for key in whole:
        np.testing.assert_array_equal(whole[key], resumed[key], err_msg=key)
    np.testing.assert_array_equal(whole["a: loss"], less["a: loss"])


def test_training_that_diverges_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(regression, "LR_RANGE", (1.0, 1.0))
    monkeypatch.setattr(script, "TEST_SEEDS", [1, 2])
    methods = {"a": script.Method(SMALL["LSTM(lr)"], 1, 100)}
    with pytest.warns(UserWarning, match="lr-0: the loss in training is not finite"):
        script.train(methods, 0, tmp_path / "lr-0.npz", {}, Bar(9))
    assert np.isnan(load(tmp_path / "lr-0.npz", {})["a: loss"][-1]).all()


def test_medians_and_ratios_have_exact_intervals():
    values = np.array([3, 1, 2, 5, 4, 7, 6, 9, 8, np.inf])
    assert median_of_few(values, 0.5) == {
        "median": 5.5,
        "low": 2,
        "high": 9,
        "p": pytest.approx(2 / 2**10),
    }
    assert np.isnan(median_of_few(values[:5])["low"])
    lower, same, worse = np.full((10, 3), 0.5), np.full((10, 3), 0.999), np.full((10, 3), np.inf)
    one = np.ones((10, 3))
    assert compare_ratios(lower, one, 1)["lower"] == "the first"
    assert compare_ratios(one, lower[:1], 1)["lower"] == "the second"
    assert compare_ratios(same, one, 1)["lower"] == "neither by 1%"
    found = compare_ratios(worse, worse, 1)
    assert found["lower"] == "unclear" and found["median"] == 1 and found["fail"] == [10, 10]
    mixed = np.where(np.arange(10)[:, None] < 4, 0.5, 2.0) * one
    found = compare_ratios(mixed, one, 1)
    assert found["lower"] == "unclear" and found["p"] == pytest.approx(0.754, abs=1e-3)
    # six of ten fail and none of ten: 2 C(10, 6) of C(20, 6) ways
    assert found["fail"] == [6, 0] and found["fail_p"] == pytest.approx(420 / 38760)


def made_up_results():
    """Results with losses of 1, but 0.5 for LSTM(lr,tele), two runs of LSTM(lr) that diverge."""
    results = {"gd_tuned_lr": 1e-4}
    for name in ("GD", "GD (tuned)", *script.METHODS):
        loss = np.ones((1 if name.startswith("GD") else 10, 32, 105), np.float32)
        loss[:, 0] = 2
        results[f"{name}: loss"] = loss / 2 if name == "LSTM(lr,tele)" else loss
        results[f"{name}: squared_gradient"] = loss[..., :5]
        results[f"{name}: seconds_a_step"] = 1e-3
    results["LSTM(lr): loss"][0, 15:, 4] = np.nan
    results["LSTM(lr): loss"][1, -1, 7] = 3
    return results


def test_what_diverges_is_counted_and_the_verdicts_follow(tmp_path, monkeypatch):
    results = made_up_results()
    summary = script.summarise("results", results)
    found = summary["methods"]["LSTM(lr)"]
    assert [found[test_set]["diverged"] for test_set in script.TEST_SETS] == [1, 1]
    assert found["fresh 100"]["loss_at_step"][100] == {"median": 1, "low": 1, "high": 1}
    assert summary["ratios"]["LSTM(lr,tele) / LSTM(lr)"]["lower"] == "the first"
    assert summary["ratios"]["LSTM(update,tele) / LSTM(update)"]["lower"] == "unclear"
    table = script.table({"results": summary})
    assert "| LSTM(lr) | published 5 | 1 [1, 1] | 1 [1, 1] | 1 [1, 1] | 1 of 50 | 1 |" in table
    assert "| LSTM(lr,tele) / LSTM(lr) | 0.5 [0.5, 0.5] | 0.002 | the first | 0.5, 0.5," in table

    drawn = {}
    monkeypatch.setattr(
        plots, "save_figure", lambda figure, path: drawn.update({path.name: figure})
    )
    script.draw("results", results, summary, tmp_path)
    labels = [text.get_text() for text in drawn["multi_layer_loss"].axes[0].get_legend().texts]
    assert labels[2:4] == ["LSTM(lr), 1 of 50 not finite", "LSTM(lr,tele)"]
    lines = {line.get_label(): line.get_ydata() for line in drawn["multi_layer_loss"].axes[0].lines}
    np.testing.assert_array_equal(lines["LSTM(lr,tele)"], [1] + 30 * [0.5])
    assert len(drawn) == 6


def test_quick_ends_with_table_and_figures(tmp_path, call, monkeypatch):
    """With LSTMs of five units."""
    small = {
        name: m._replace(networks=tuple(n._replace(hidden=5) for n in m.networks))
        for name, m in script.METHODS.items()
    }
    monkeypatch.setattr(script, "METHODS", small)
    options = ["--quick", "--seeds", "1", "--output", tmp_path]
    done = call(script, *options)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "learn-to-teleport/figures/quick/1seeds"
    kinds = [
        f"{kind}{scaled}" for kind in ("", "_vs_time", "_vs_gradient") for scaled in ("", "_scaled")
    ]
    expected = {f"multi_layer_loss{kind}.{suffix}" for kind in kinds for suffix in ("pdf", "png")}
    expected |= {"results.npz", "summary.json", "table.md"}
    assert {p.name for p in folder.iterdir()} == expected
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    assert summary["results"]["settings"]["seeds"] == 1
    assert (folder / "table.md").read_text("utf-8") in done.stdout

    monkeypatch.setattr(script, "draw", lambda *_: None)
    shutil.rmtree(tmp_path / "logs")
    assert call(script, *options, "--plot-only").stdout == done.stdout
    other = call(script, *options, "--plot-only", "--seeds", "2")
    assert other.returncode == 2
    assert "2seeds/results.npz is missing: run without --plot-only" in other.stderr


def test_ctrl_c_ends_all_processes_quietly(tmp_path):
    command = [sys.executable, "multi_layer_regression.py", "--seeds", "1", "--output", tmp_path]
    folder = ROOT / "learn-to-teleport"
    with subprocess.Popen(
        command, cwd=folder, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stderr.read(1)  # the bar is there, and the workers start
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Interrupted" in errors and "Traceback" not in errors
