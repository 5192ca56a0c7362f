"""Learning to teleport: LSTMs that give the group element, the step size or the update. Figure 6.

    cd learn-to-teleport && python multi_layer_regression.py     # or from the folder above
    python multi_layer_regression.py --quick                     # on 1 to 7 trajectories

Two-layer regression is minimised by GD, by GD (tuned), whose step size is best on training
trajectories, and by METHODS: the published three, LSTM(lr) without T, LSTM(update) on as many
trajectories as LSTM(update,tele), and all of them with scaled gradients. Each initialisation of one
is a task. They run in processes side by side, or in torchrun's ranks, and go on from logs/.
"""

import os
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[1]))
from experiment import files, launch, plots
from experiment.statistics import compare_ratios, median_of_few

import numpy as np
import torch
from matplotlib.figure import Figure

import regression
from models import optimizer_from_arrays, optimizer_to_arrays, warn_if_not_finite
from regression import Learned, Network, draw_problem, new_training, rollout, train_trajectory


class Method(NamedTuple):
    """A method's LSTMs and what they are trained on.

    Methods that differ in the number of trajectories alone share one training.
    """

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
CLAIMS = [("LSTM(lr,tele)", "LSTM(lr)"), ("LSTM(update,tele)", "LSTM(update)")]
PAIRS = [*CLAIMS, ("LSTM(update,tele)", "LSTM(update), 700")]  # whose losses are compared
PAIRS += [(f"{a}, scaled", f"{b}, scaled") for a, b in PAIRS]
PAIRS += [(name, name.removesuffix(", scaled")) for name, m in METHODS.items() if m.scaled]
PAIRS += [(name, "GD (tuned)") for name in METHODS]
GD_LR, GD_LRS = 3e-4, np.logspace(-6, -2, 81)  # of which GD (tuned) takes the best
TRAINING_SEEDS = [n * n * 12345 - 1 for n in range(700)]
TEST_SEEDS = [n * n * 12345 for n in range(5)] + [(i + 1) * 54321 for i in range(100)]
TEST_SETS = {"published 5": slice(5), "fresh 100": slice(5, None)}
STEPS, CLAIMED_STEP = [*range(31), 100], 30  # of the test trajectories that are kept
STEPS_SHOWN = [10, 30, 100]
SEED, SEEDS = 54321, 10  # initialisation i of SEEDS has the seed (i + 1) * SEED
SAVE_EVERY = 50  # trajectories
QUICK = 100  # --quick trains on so many times fewer trajectories
COMMON = {  # of the settings that results record
    "unroll": regression.UNROLL,
    "ranges": [
        regression.FIRST_LR,
        *regression.LR_RANGE,
        regression.UPDATE_RANGE,
        regression.T_NORM,
    ],
    "tests": [TEST_SEEDS, STEPS],
}
COLOURS = [plots.BLACK, plots.GREY, plots.SKY, plots.GREEN, plots.ORANGE, plots.PURPLE, plots.RED]


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
    """Return "<name>: loss" [STEPS, TEST_SEEDS], and of the published "<name>: squared_gradient".

    optimizer(problem) is what `rollout` takes.
    """
    problem = draw_problem(TEST_SEEDS)
    loss, norm = rollout(optimizer(problem), problem, STEPS[-1])
    return {f"{name}: loss": loss[STEPS], f"{name}: squared_gradient": norm[STEPS, :5]}


def train(methods, initialisation, path, settings, bar):
    """Do one task: train and test LSTMs from an initialisation; resume from `path`.

    methods: {name: Method} with one training. In the end `path` has the LSTMs' parameters and what
    `test` returns for each method; until then it has Adam's state, too.
    """
    method, *_ = methods.values()
    lstms, adam = new_training(method.networks, method.scaled, (initialisation + 1) * SEED)
    if state := files.load(path, settings):
        lstms.load_state_dict({key: torch.tensor(state[key]) for key in lstms.state_dict()})
        optimizer_from_arrays(adam, state)

    def step(state):
        n, curves = int(state["steps"]), {key: state[key] for key in state if ": " in key}
        problem = draw_problem(TRAINING_SEEDS[n])
        loss = train_trajectory(lstms, adam, problem, method.steps, method.scaled)
        warn_if_not_finite(f"{path.stem}: the loss in training", loss)
        for name in [name for name, m in methods.items() if m.trajectories == n + 1]:
            curves |= test(name, lambda problem: Learned(lstms.eval(), problem, method.scaled))
        going = n + 1 < most(methods)
        return lstms.state_dict() | curves | (optimizer_to_arrays(adam) if going else {})

    files.resume(path, settings, dict, step, most(methods), bar, SAVE_EVERY)


def most(methods):
    """Return on how many trajectories methods with one training are trained."""
    return max(method.trajectories for method in methods.values())


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
            settings = {"methods": methods, "seed": (i + 1) * SEED, "device": "cpu"}
            listed.append((methods, i, logs / f"{log}-{i}.npz", settings | COMMON))
    return listed


def compute(args):
    """Do this rank's share of the tasks."""
    listed = launch.share_of_rank(tasks(args))
    total = sum(most(methods) for methods, *_ in listed)
    launch.do_tasks(train, listed, total, "trajectory", args.processes)


def seconds_a_step(optimizer, problem, repeats=9):
    """Return the seconds of a step of an optimizer on one problem: a median over some runs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        rollout(optimizer, problem, CLAIMED_STEP)
        times.append((time.perf_counter() - start) / CLAIMED_STEP)
    return np.median(times)


def collect(_, args):
    """Return the settings of all methods, their results, and a log that they are from.

    Those are what `test` returns, [initialisations, ...], of which GD has one, and the seconds a
    step of one trajectory.
    """
    listed, lr, one = tasks(args), tune_gradient_descent(), draw_problem(SEED)
    optimizers = {"GD": gradient_descent(GD_LR), "GD (tuned)": gradient_descent(lr)}
    found = {name: [test(name, lambda _, gd=gd: gd)] for name, gd in optimizers.items()}
    for methods, _, path, settings in listed:
        state = files.load_steps(path, settings, most(methods))
        for name, m in methods.items():
            found.setdefault(name, []).append(state)
            lstms, _ = new_training(m.networks, m.scaled, SEED)
            optimizers[name] = Learned(lstms.eval(), one, m.scaled)
    results = {"gd_tuned_lr": lr}
    for name, states in found.items():
        for key in (f"{name}: loss", f"{name}: squared_gradient"):
            results[key] = np.stack([state[key] for state in states])
        results[f"{name}: seconds_a_step"] = seconds_a_step(optimizers[name], one)
    settings = {"seeds": args.seeds, "quick": args.quick, "methods": METHODS}
    return settings | COMMON, results, listed[0][2]


def losses(results):
    """Return {method: its losses}, with infinity for all that are not finite."""
    found = {key.removesuffix(": loss"): results[key] for key in results if key.endswith(": loss")}
    return {name: np.where(np.isfinite(a), a.astype(float), np.inf) for name, a in found.items()}


def summarise(_, results):
    """Return what summary.json says of the results that `collect` returns."""
    methods, claimed = {}, {}
    for name, loss in losses(results).items():
        methods[name] = {"seconds_a_step": float(results[f"{name}: seconds_a_step"])}
        for test_set, chosen in TEST_SETS.items():
            own = loss[..., chosen]
            of_each = {step: np.median(own[:, STEPS.index(step)], -1) for step in STEPS_SHOWN}
            methods[name][test_set] = {
                "loss_at_step": {step: median_of_few(values) for step, values in of_each.items()},
                "diverged": int((own[:, -1] >= own[:, 0]).sum()),  # ends no better than it began
                "of": own[:, 0].size,
            }
        claimed[name] = own[:, STEPS.index(CLAIMED_STEP)]
    gd = np.median(claimed["GD"])
    ratios = {f"{a} / {b}": compare_ratios(claimed[a], claimed[b], gd) for a, b in PAIRS}
    seen = [ratios[f"{a} / {b}"]["lower"] for a, b in CLAIMS].count("the first")
    return {
        "gd_tuned_lr": results["gd_tuned_lr"],
        "methods": methods,
        "ratios_of_losses": {"step": CLAIMED_STEP, "test_set": test_set, "of": ratios},
        "claim_that_teleporting_lowers_the_loss": f"seen in {seen} of {len(CLAIMS)} pairs",
    }


def table(summaries):
    """Return the losses and their ratios as Markdown."""
    (summary,) = summaries.values()
    rows = [
        [name, test_set, *map(plots.median_text, entry[test_set]["loss_at_step"].values())]
        + ["{diverged} of {of}".format(**entry[test_set]), f"{1e3 * entry['seconds_a_step']:.2g}"]
        for test_set in TEST_SETS
        for name, entry in summary["methods"].items()
    ]
    ratios = [
        [pair, plots.median_text(entry), f"{entry['p']:.2g}", entry["lower"]]
        + [", ".join(map(plots.number_text, entry["of_each"]))]
        + ["{} and {}".format(*entry["fail"]), f"{entry['fail_p']:.2g}"]
        for pair, entry in summary["ratios_of_losses"]["of"].items()
    ]
    header = ["method", "trajectories", *(f"loss, step {step}" for step in STEPS_SHOWN)]
    compared = [f"ratio of losses, step {CLAIMED_STEP}, fresh trajectories", "median", "p", "lower"]
    return (
        f"{plots.markdown([*header, 'diverged', 'ms a step'], rows)}\n"
        f"{plots.markdown([*compared, 'of each initialisation', 'fail', 'p of fail'], ratios)}\n"
        "The claim that teleporting lowers the loss: "
        f"{summary['claim_that_teleporting_lowers_the_loss']}.\n"
    )


def draw(_, results, summary, folder):
    """Draw Figure 6, and once more with scaled gradients: means over the published trajectories and
    all initialisations, without those that are not finite. The band is a standard deviation.
    """
    for scaled in (False, True):
        names = ["GD", "GD (tuned)", *(name for name, m in METHODS.items() if m.scaled == scaled)]
        for against, label in (("epoch", "epoch"), ("time", "time (ms)"), ("gradient", "loss")):
            axes = Figure(figsize=(5.2, 3.8)).add_subplot(xlabel=label, ylabel="loss", yscale="log")
            for name, colour in zip(names, COLOURS):
                loss, norm = (
                    np.concatenate(results[f"{name}: {key}"], -1)[: CLAIMED_STEP + 1].astype(float)
                    for key in ("loss", "squared_gradient")
                )
                lost = ~np.isfinite(loss).all(0)


def parse_arguments():
    parser = launch.experiment_parser(__doc__, on_datasets=False)
    add, at_least = parser.add_argument, launch.at_least
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add("--seeds", type=at_least(1), default=SEEDS, help="initialisations of each method")
    add("--quick", action="store_true", help="train each LSTM on 1 to 7 trajectories")
    add("--processes", type=at_least(1), default=cores, help="number of worker processes")
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
