"""learn-to-teleport: the group action, the LSTMs, their meta-gradients, kill and resume."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

from experiment.files import ROOT, UserError, load

import numpy as np
import pytest
import torch

import multi_layer_regression as script
import regression
from lstm import backward, init_lstm, lstm_step, zero_state
from models import LeakyReLU
from regression import Network, Problem
from teleportation import (
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
        U_new, V_new = inverse_group_action_first_order(U, V, h, h_pinv, size * T, activation)
        exact = inverse_group_action(U, V, h, torch.eye(5) + size * T, activation)
        torch.testing.assert_close(V_new, exact[1])
        errors.append((U_new @ activation(V_new @ h) - outputs).norm())
    np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 100, rtol=1e-6)


def test_array_activation_is_the_activation(activation):
    x = torch.tensor([-2.0, -0.5, 0.0, 1.0, 3.0])
    for name in ("__call__", "inverse", "derivative"):
        of_array = getattr(regression.ACTIVATION, name)(x.numpy())
        np.testing.assert_allclose(of_array, getattr(LeakyReLU(), name)(x).numpy(), rtol=1e-6)
        assert of_array.dtype == np.float32


def test_lstm_and_its_gradient_are_torchs():
    rng = np.random.default_rng(0)
    lstm = [W.astype(np.float64) for W in init_lstm(7, 5, 3, rng)]
    x, in_outputs = rng.normal(size=(4, 7)), rng.normal(size=(4, 3))
    state, ours, records = zero_state(lstm, x[0]), [], []
    for row in x:
        y, state, record = lstm_step(lstm, row, state)
        ours.append(y)
        records.append(record)

    W_1, W_2, W_out = (torch.tensor(W, requires_grad=True) for W in lstm)
    cells = []
    for W, inputs in ((W_1, 7), (W_2, 5)):
        o, i, f, g = W.T.chunk(4)
        W = torch.cat([i, f, g, o])  # torch's order
        cells.append([W[:, :inputs], W[:, inputs:-2], W[:, -2], W[:, -1]])
    states = [(torch.zeros(5, dtype=torch.float64),) * 2 for _ in cells]
    theirs = []
    for h in torch.tensor(x):
        for k, parameters in enumerate(cells):
            states[k] = torch.lstm_cell(h[None], [s.view(1, 5) for s in states[k]], *parameters)
            h = states[k][0][0]
        theirs.append(h @ W_out[:-1] + W_out[-1])
    theirs = torch.stack(theirs)
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-10)
    gradients = torch.autograd.grad(theirs, [W_1, W_2, W_out], torch.tensor(in_outputs))
    for (v, delta), gradient in zip(backward(lstm, records, in_outputs), gradients):
        np.testing.assert_allclose(v.T @ delta, gradient.numpy(), rtol=1e-8, atol=1e-12)


def test_lstms_begin_as_torchs_do_and_share_what_they_can():
    alone, both = (init_lstm(30, 20, outputs, np.random.default_rng(3)) for outputs in (1, 9))
    assert [W.shape for W in both] == [(52, 80), (42, 80), (21, 9)]
    for W in both:
        assert 0.9 / 20**0.5 < np.abs(W).max() <= 1 / 20**0.5
    np.testing.assert_array_equal(alone[0], both[0])
    np.testing.assert_array_equal(alone[2], both[2][:, :1])


def test_problems_are_the_published_ones():
    torch.manual_seed(12345)
    x, y, W_0, W_1 = (torch.rand(20, 20) for _ in range(4))
    problem = regression.draw_problem(12345)
    for ours, theirs in zip((problem.x, problem.y, *problem.w), (x, y, W_0, W_1)):
        np.testing.assert_array_equal(ours, theirs.numpy())
    for w in (W_0, W_1):
        w.requires_grad_()
    loss = (y - W_1 @ torch.nn.functional.leaky_relu(W_0 @ x, 0.1)).square().sum() / 2
    residual, gradient = regression.residual_and_gradient(problem.w, problem)
    np.testing.assert_allclose(regression.loss(residual), loss.item(), rtol=1e-5)
    for ours, theirs in zip(gradient, torch.autograd.grad(loss, [W_0, W_1])):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-3, atol=1e-2)


def test_training_and_test_seeds_are_apart():
    """The generator takes a seed modulo 2³²."""
    sets = [*script.TEST_SETS.values(), script.training_seeds(700)]
    seeds = [seed % 2**32 for seeds in sets for seed in seeds]
    assert len(set(seeds)) == len(seeds) == 805


def small_problem(seeds):
    """Problems in float64 whose weights are near the origin, so that steps are smooth."""
    problem = Problem(*(part.astype(np.float64) for part in regression.draw_problem(seeds)))
    return problem._replace(w=problem.w - 0.5)


def start(networks, scale=1e-3):
    """LSTMs in float64, with step sizes inside of LR_RANGE."""
    lstms, _ = regression.new_training(networks, 5)
    lstms = [[W.astype(np.float64) for W in lstm] for lstm in lstms]
    for network, lstm in zip(networks, lstms):
        lstm[0][:-2] *= scale
        if "lr" in network.gives:
            lstm[2][:, 0] *= 1e-3
            lstm[2][-1, 0] = 2e-3
    return lstms


@pytest.mark.parametrize("first", [0, 10])
@pytest.mark.parametrize("method", SMALL)
def test_meta_gradient_is_that_of_finite_differences(method, first):
    """Of three steps; the gradients that are fed and descended stay what they are."""
    networks, problem, steps = SMALL[method], small_problem(7), 3
    lstms = start(networks)
    _, gradient = regression.residual_and_gradient(problem.w, problem)
    zeros = [zero_state(lstm, gradient.ravel()) for lstm in lstms]
    fed = []

    def unroll(lstms, fed):
        """Return the losses' sum, as `learned` makes the steps; record what is fed, or replay."""
        states, w, total, replay = list(zeros), problem.w, 0, bool(fed)
        for t in range(steps):
            if not replay:
                fed.append(regression.residual_and_gradient(w, problem)[1])
            outputs = []
            for k, lstm in enumerate(lstms):
                y, states[k], _ = lstm_step(lstm, fed[t].ravel(), states[k])
                outputs.append(y)
            given = regression.name_outputs(networks, outputs)
            w, T = regression.step(w, fed[t], given, problem, first + t)
            w = w if T is None else regression.teleport(w, T, problem)
            total += regression.loss(regression.residual_and_gradient(w, problem)[0])
        return total

    unroll(lstms, fed)
    *_, factors = regression.window(
        networks, lstms, list(zeros), problem, problem.w, gradient, first, steps
    )
    rng = np.random.default_rng(1)
    for lstm, pairs in zip(lstms, factors):
        for W, (v, delta) in zip(lstm, pairs):
            direction, eps = rng.normal(size=W.shape), 1e-6
            W += eps * direction
            above = unroll(lstms, fed)
            W -= 2 * eps * direction
            below = unroll(lstms, fed)
            W += eps * direction
            expected = (v.T @ delta * direction).sum()
            assert expected != 0
            np.testing.assert_allclose((above - below) / (2 * eps), expected, rtol=1e-4)


@pytest.mark.parametrize("method", SMALL)
def test_a_stack_is_its_members(method):
    networks, seeds = SMALL[method], [3, 4, 5]
    lstms = start(networks)

    def run(seeds):
        problem = small_problem(seeds)
        return regression.rollout(regression.learned(networks, lstms, problem), problem, 4)

    for stacked, members in zip(run(seeds), zip(*map(run, seeds))):
        np.testing.assert_allclose(stacked, np.stack(members, 1), rtol=1e-8)


def test_a_window_goes_where_a_rollout_goes():
    networks, problem = SMALL["LSTM(lr,tele)"], small_problem(7)
    lstms = start(networks)
    _, gradient = regression.residual_and_gradient(problem.w, problem)
    states = [zero_state(lstm, gradient.ravel()) for lstm in lstms]
    _, residual, _, _ = regression.window(
        networks, lstms, states, problem, problem.w, gradient, 0, 5
    )
    losses, _ = regression.rollout(regression.learned(networks, lstms, problem), problem, 5)
    np.testing.assert_allclose(regression.loss(residual), losses[-1], rtol=1e-10)


def interrupt_after(updates):
    """Return a `report` that interrupts after so many calls."""
    calls = iter(range(1, updates))

    def report(n):
        if next(calls, None) is None:
            raise KeyboardInterrupt

    return report


@pytest.mark.parametrize("method", ["LSTM(lr,tele)", "LSTM(update,tele)"])
def test_an_interrupted_task_ends_with_the_same_numbers(tmp_path, monkeypatch, method):
    monkeypatch.setattr(script, "SAVE_SECONDS", 0)
    monkeypatch.setattr(script, "TEST_SETS", {"few": [1, 2]})
    task = script.Method(SMALL[method], 5, 20, "C0"), 0
    for name, updates in (("whole", 99), ("cut", 3), ("cut", 99)):
        with contextlib.suppress(KeyboardInterrupt):
            script.train(*task, tmp_path / name, {}, interrupt_after(updates))
    whole, resumed = (load(tmp_path / name, {}) for name in ("whole", "cut"))
    assert script.is_finished(whole) and script.is_finished(resumed)
    assert whole.keys() == resumed.keys() and whole["loss"].shape == (101, 2)
    for key in whole.keys() - {"seconds"}:
        np.testing.assert_array_equal(whole[key], resumed[key], err_msg=key)


def test_training_that_diverges_ends_with_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(regression, "LR_RANGE", (1.0, 1.0))
    task = script.Method(SMALL["LSTM(lr)"], 1, 100, "C0"), 0, tmp_path / "lr-0.npz", {}
    with pytest.raises(UserError, match="lr-0, training trajectory 0: the loss is not finite at"):
        script.train(*task, lambda n: None)


def test_what_diverges_is_counted_and_larger_than_all_else(monkeypatch):
    monkeypatch.setattr(script, "TEST_SETS", {"published 5": [1] * 5, "fresh 100": [1] * 3})
    loss = np.ones((2, 101, 8), np.float32)
    loss[:, 0], loss[0, 50:, 6], loss[1, 100, 7] = 2, np.nan, 3
    results = {"gd_tuned_lr": 1e-4}
    for name in script.COLOURS:
        results[f"{name}: loss"] = loss / 2 if name == "LSTM(lr,tele)" else loss
        results[f"{name}: seconds_a_step"] = 1e-3
    summary = script.summarise("results", results)
    method = summary["methods"]["LSTM(lr)"]
    assert [method[test_set]["diverged"] for test_set in script.TEST_SETS] == [0, 2]
    assert method["fresh 100"]["loss_at_step"][100] == {"median": 1.0, "low": 1.0, "high": None}
    ratios = summary["ratios_of_losses"]["of"]
    assert ratios["LSTM(lr,tele) / LSTM(lr)"]["lower"] == "the first"
    assert ratios["LSTM(update,tele) / LSTM(update)"]["lower"] == "unclear"
    assert summary["claim_that_teleporting_lowers_the_loss"] == "holds for 1 of 2"
    assert "1 [1, ∞] | 2 of 6" in script.table({"results": summary})
    assert "| 0.5 [0.5, 0.5] | 0.5, 0.5 | the first |" in script.table({"results": summary})


def test_quick_ends_with_table_and_figures(tmp_path, run_script, call, monkeypatch):
    options = ["--quick", "--seeds", "1", "--output", tmp_path]
    done = run_script("learn-to-teleport/multi_layer_regression.py", *options)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "learn-to-teleport/figures/quick/1seeds"
    names = [f"multi_layer_loss{suffix}" for suffix in ("", "_vs_time", "_vs_gradient")]
    expected = {f"{name}.{suffix}" for name in names for suffix in ("pdf", "png")}
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
