"""Learning to teleport: LSTMs that give the group element, the step size or the update. Figure 6.

    python learn-to-teleport/multi_layer_regression.py     # --quick for a look

Two-layer regression is minimised by GD, by GD (tuned), whose step size is best on training
trajectories, and by METHODS: the published three, LSTM(lr) without T, LSTM(update) on as many
trajectories as LSTM(update,tele), and all of them with scaled gradients. Each initialisation of one
is a task. They run in processes side by side, or in torchrun's ranks, and go on from logs/.
"""

import re
import sys
from functools import partial
from itertools import product
from pathlib import Path
from timeit import repeat
from typing import NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[1]))
from experiment import files, launch, plots
from experiment.statistics import compare_ratios, median_of_few

import numpy as np
import torch

import regression
from models import SEED, optimizer_from_arrays, optimizer_to_arrays, run_seeds, warn_if_not_finite
from regression import Learned, Network, draw_problem, new_training, rollout, train_trajectory


class Method(NamedTuple):
    """LSTMs and what they are trained on; where only trajectories differ, training is shared."""

    networks: tuple
    trajectories: int
    steps: int  # of each trajectory
    scaled: bool = False  # whether gradients are, by `sign_and_log`


LR, UPDATE = Network(("lr",), 20, 1e-4), Network(("update",), 300, 1e-3)
LR_AND_T, T = Network(("lr", "T"), 20, 1e-4), Network(("T",), 300, 1e-4)
METHODS = {
    "LSTM(lr)": Method((LR,), 30, 300),
    "LSTM(lr,tele)": Method((LR_AND_T,), 30, 300),
    "LSTM(update)": Method((UPDATE,), 600, 100),
    "LSTM(update), 700": Method((UPDATE,), 700, 100),
    "LSTM(update,tele)": Method((UPDATE, T), 700, 100),
}
METHODS |= {f"{name}, scaled": m._replace(scaled=True) for name, m in METHODS.items()}
PAIRS = [("LSTM(lr,tele)", "LSTM(lr)")]  # whose losses are compared
PAIRS += [("LSTM(update,tele)", name) for name in ("LSTM(update)", "LSTM(update), 700")]
PAIRS += [(f"{a}, scaled", f"{b}, scaled") for a, b in PAIRS]
PAIRS += [(name, name.removesuffix(", scaled")) for name, m in METHODS.items() if m.scaled]
PAIRS += [(name, "GD (tuned)") for name in METHODS]
GD_LR, GD_LRS = 3e-4, np.logspace(-6, -2, 81)  # of which GD (tuned) takes the best
TRAINING_SEEDS = [n * n * 12345 - 1 for n in range(700)]
TEST_SEEDS = [n * n * 12345 for n in range(5)] + run_seeds(range(100))
TEST_SETS = {"published 5": slice(5), "fresh 100": slice(5, None)}
KEYS, STEPS = ("loss", "squared_gradient"), [*range(31), 100]  # that are kept of the tests
CLAIMED_STEP, STEPS_SHOWN = 30, (10, 30, 100)
SEEDS = 10  # initialisations, with the published seeds of runs
SAVE_EVERY, QUICK = 50, 100  # trajectories; --quick trains on so many times fewer
COMMON = {"unroll": regression.UNROLL, "ranges": regression.RANGES, "tests": [TEST_SEEDS, STEPS]}


def gradient_descent(lr):
    """Return GD for `rollout`; lr: a number, or a tensor that broadcasts over the weights."""
    return lambda t, w, gradient: w - lr * gradient


def tune_gradient_descent():
    """Return the step size with the least median loss on the trajectories of LSTM(lr,tele)."""
    problem = draw_problem(TRAINING_SEEDS[: METHODS["LSTM(lr,tele)"].trajectories])
    problem = problem._replace(w=problem.w.expand(len(GD_LRS), *problem.w.shape))
    lrs = torch.tensor(GD_LRS, dtype=torch.float32).view(-1, 1, 1, 1, 1)
    loss = rollout(gradient_descent(lrs), problem, CLAIMED_STEP)[0][-1]
    return float(GD_LRS[loss.nan_to_num(np.inf).median(1).values.argmin()])


def test(name, optimizer):
    """Return a method's loss [STEPS, TEST_SEEDS], and |∇L|² on the published five problems.

    optimizer(problem) returns what `rollout` takes.
    """
    problem = draw_problem(TEST_SEEDS)
    loss, norm = rollout(optimizer(problem), problem, STEPS[-1])
    return {f"{name}: {key}": curves for key, curves in zip(KEYS, (loss[STEPS], norm[STEPS, :5]))}


def train(methods, initialisation, path, settings, bar):
    """Do one task: methods, {name: Method}, that have one training, which goes on from `path`.

    It has the LSTMs' parameters, Adam's state until the end, and what `test` returns for each.
    """
    *_, method = methods.values()
    lstms, adam = new_training(method.networks, method.scaled, run_seeds([initialisation])[0])
    if state := files.load(path, settings):
        lstms.load_state_dict({key: torch.tensor(state[key]) for key in lstms.state_dict()})
        optimizer_from_arrays(adam, state)

    def step(state):
        n, curves = int(state["steps"]), {key: state[key] for key in state if ": " in key}
        loss = train_trajectory(lstms, adam, draw_problem(TRAINING_SEEDS[n]), method.steps)
        warn_if_not_finite(f"{path.stem}: the loss in training", loss)
        for name, m in methods.items():
            if m.trajectories == n + 1:
                curves |= test(name, partial(Learned, lstms.eval()))
        end = n + 1 == method.trajectories
        return lstms.state_dict() | curves | ({} if end else optimizer_to_arrays(adam))

    files.resume(path, settings, dict, step, method.trajectories, bar, SAVE_EVERY)


def tasks(args):
    """Return the tasks, each the arguments of `train` but for the bar."""
    logs = args.output / "logs" / f"learn-to-teleport{'-quick' if args.quick else ''}"
    trainings, listed = {}, []
    for name, m in METHODS.items():
        m = m._replace(trajectories=-(-m.trajectories // (QUICK if args.quick else 1)))
        trainings.setdefault((m.networks, m.steps, m.scaled), {})[name] = m
    for methods in trainings.values():
        log = re.sub("[^a-z]+", "-", next(iter(methods)).lower()).strip("-")
        for i in range(args.seeds):
            settings = COMMON | {"methods": methods, "seed": run_seeds([i])[0], "device": "cpu"}
            listed.append((methods, i, logs / f"{log}-{i}.npz", settings))
    return listed


def compute(args):
    """Do this rank's share of the tasks."""
    share = launch.share_of_rank(tasks(args))
    total = sum([*methods.values()][-1].trajectories for methods, *_ in share)
    launch.do_tasks(train, share, total, "trajectory", args.processes)


def collect(_, args):
    """Return settings, results, and a log.

    The results are what `test` returns, with initialisations as the first dimension, the seconds of
    a step of each method, and the step size of GD (tuned).
    """
    listed, lr, one = tasks(args), tune_gradient_descent(), draw_problem(SEED)
    optimizers = {"GD": gradient_descent(GD_LR), "GD (tuned)": gradient_descent(lr)}
    found = {name: [test(name, lambda _, gd=gd: gd)] for name, gd in optimizers.items()}
    for methods, _, path, settings in listed:
        state = files.load_steps(path, settings, [*methods.values()][-1].trajectories)
        for name, m in methods.items():
            found.setdefault(name, []).append(state)
            optimizers[name] = Learned(new_training(m.networks, m.scaled, SEED)[0].eval(), one)
    results = {"gd_tuned_lr": lr}
    for name, states in found.items():
        for key in (f"{name}: {key}" for key in KEYS):
            results[key] = np.stack([state[key] for state in states])
        times = repeat(partial(rollout, optimizers[name], one, 30), number=1, repeat=5)
        results[f"{name}: seconds_a_step"] = min(times) / 30
    settings = {"seeds": args.seeds, "quick": args.quick, "methods": METHODS}
    return settings | COMMON, results, listed[0][2]


def summarise(_, results):
    """Return what summary.json says of the results that `collect` returns."""
    methods, claimed = {}, {}
    for name in ("GD", "GD (tuned)", *METHODS):
        loss = np.nan_to_num(results[f"{name}: loss"].astype(float), nan=np.inf, posinf=np.inf)
        methods[name] = {"seconds_a_step": float(results[f"{name}: seconds_a_step"])}
        claimed[name] = loss[:, STEPS.index(CLAIMED_STEP), TEST_SETS["fresh 100"]]
        for test_set, chosen in TEST_SETS.items():
            own = loss[..., chosen]
            of_each = {step: np.median(own[:, STEPS.index(step)], -1) for step in STEPS_SHOWN}
            methods[name][test_set] = {
                "loss_at_step": {step: median_of_few(values) for step, values in of_each.items()},
                "diverged": int((own[:, -1] >= own[:, 0]).sum()),  # ends no better than it began
                "of": own[:, 0].size,
            }
    gd = np.median(claimed["GD"])
    ratios = {f"{a} / {b}": compare_ratios(claimed[a], claimed[b], gd) for a, b in PAIRS}
    return {"gd_tuned_lr": results["gd_tuned_lr"], "methods": methods, "ratios": ratios}


def table(summaries):
    """Return the losses, and their ratios at CLAIMED_STEP on fresh trajectories, as Markdown."""
    (summary,) = summaries.values()
    rows = [
        [name, test_set, *map(plots.median_text, entry[test_set]["loss_at_step"].values())]
        + ["{diverged} of {of}".format(**entry[test_set]), f"{1e3 * entry['seconds_a_step']:.2g}"]
        for test_set in TEST_SETS
        for name, entry in summary["methods"].items()
    ]
    header = ["method", "trajectories", *(f"loss, step {step}" for step in STEPS_SHOWN)]
    losses = plots.markdown([*header, "diverged", "ms a step"], rows)
    title = f"ratio of losses, step {CLAIMED_STEP}, fresh trajectories"
    return f"{losses}\n{plots.ratio_table(title, summary['ratios'])}"


def draw(_, results, summary, folder):
    """Draw Figure 6, and once more with scaled gradients, from the published trajectories."""
    panels = ("", "epoch", "loss"), ("_vs_time", "ms", "loss"), ("_vs_gradient", "loss", "|∇L|²")
    for (suffix, xlabel, ylabel), scaled in product(panels, (False, True)):
        curves = {}
        for name in ("GD", "GD (tuned)", *(n for n in METHODS if METHODS[n].scaled == scaled)):
            loss, norm = (np.concatenate(results[f"{name}: {key}"][:, :31, :5], -1) for key in KEYS)
            step = 1e3 * results[f"{name}: seconds_a_step"] if xlabel == "ms" else 1
            curves[name] = (loss, norm) if xlabel == "loss" else (step * np.arange(31), loss)
        path = folder / f"multi_layer_loss{suffix}{'_scaled' if scaled else ''}"
        plots.draw_losses(path, curves, xlabel=xlabel, ylabel=ylabel)


def parse_arguments():
    parser = launch.experiment_parser(__doc__, on_datasets=False)
    add, at_least = parser.add_argument, launch.at_least
    add("--seeds", type=at_least(1), default=SEEDS, help="initialisations of each method")
    add("--quick", action="store_true", help="train each LSTM on 1 to 7 trajectories")
    add("--processes", type=at_least(1), default=launch.cores(), help="number of worker processes")
    return parser.parse_args()


def main():
    torch.set_num_threads(1)
    args = parse_arguments()
    folder = args.output / "learn-to-teleport" / "figures" / ("quick" if args.quick else "")
    folder /= f"{args.seeds}seeds" if args.seeds != SEEDS else ""
    parts = ["results"], ["results"]
    launch.compute_and_report(args, folder, *parts, compute, collect, summarise, table, draw)


if __name__ == "__main__":
    launch.run(main)
