"""Learning to teleport: LSTMs that give the group element, the step size or the update. Figure 6.

    cd learn-to-teleport && python multi_layer_regression.py     # or from the folder above
    python multi_layer_regression.py --quick                     # on 1 to 7 trajectories

Two-layer regression, ½ |Y − W_1 σ(W_0 X)|², is minimised by the published methods

    GD                    a fixed step size
    LSTM(lr,tele)         one LSTM gives the step size and T, by which each step is teleported
    LSTM(update)          an LSTM gives the update of all weights
    LSTM(update,tele)     a second one gives T

and by some that they are to be compared with: LSTM(lr), without T; LSTM(update) trained on as many
trajectories as LSTM(update,tele); all of them fed with scaled gradients; and GD (tuned), with the
step size that is best on training trajectories. Each method learns from several initial LSTMs.
These are tasks of their own, which run in processes side by side, or under torchrun in its ranks,
and go on from logs/learn-to-teleport/. All losses are in learn-to-teleport/figures/results.npz.
"""

import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
import math
import multiprocessing
import re
import signal
import time
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

from experiment import PARENT, files, launch, plots

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats

import regression
from models import optimizer_from_arrays, optimizer_to_arrays
from regression import Learned, Network, draw_problem, new_training, rollout, train_trajectory


class Method(NamedTuple):
    """A method's LSTMs, what they are trained on, and how it is drawn.

    Methods that differ in the number of trajectories alone share one training.
    """

    networks: tuple
    trajectories: int
    steps: int  # of each trajectory
    colour: str
    scaled: bool = False  # gradients, by `sign_and_log`


LR, UPDATE = Network(("lr",), 20, 1e-4), Network(("update",), 300, 1e-3)
LR_AND_T, T = Network(("lr", "T"), 20, 1e-4), Network(("T",), 300, 1e-4)
METHODS = {
    "LSTM(lr)": Method((LR,), 30, 300, plots.SKY),
    "LSTM(lr,tele)": Method((LR_AND_T,), 30, 300, plots.GREEN),
    "LSTM(update)": Method((UPDATE,), 600, 100, plots.ORANGE),
    "LSTM(update,tele)": Method((UPDATE, T), 700, 100, plots.RED),
    "LSTM(update), 700": Method((UPDATE,), 700, 100, plots.PURPLE),
}
METHODS |= {f"{name}, scaled": m._replace(scaled=True) for name, m in METHODS.items()}
QUICK = 100  # --quick trains on so many times fewer trajectories
GD_LR, GD_LRS = 3e-4, np.logspace(-6, -2, 81)  # of which GD (tuned) takes the best
TEST_STEPS, STEPS_SHOWN, CLAIMED_STEP = 100, (10, 30, 100), 30
TEST_SETS = {
    "published 5": [n * n * 12345 for n in range(5)],
    "fresh 100": [(i + 1) * 54321 for i in range(100)],
}
SEED = 54321  # initialisation i has the seed (i + 1) * SEED
SEEDS = 10  # initialisations of each method
SAVE_SECONDS = 20  # between saves during training
REPEATS = 9  # of the run of CLAIMED_STEP steps whose seconds are measured
LITTLE = 0.01  # so close to 1 a ratio of losses is no difference
TUNED, PUBLISHED_5 = "GD (tuned)", "published 5"
RANGES = [regression.FIRST_LR, regression.LR_RANGE, regression.UPDATE_RANGE, regression.T_NORM]
COLOURS = {"GD": plots.BLACK, TUNED: plots.GREY} | {name: m.colour for name, m in METHODS.items()}


def training_seeds(trajectories):
    """Return the published seeds of training trajectories."""
    return [n * n * 12345 - 1 for n in range(trajectories)]


def draw_tests():
    """Return the trajectories of all TEST_SETS in turn, as one stack."""
    return draw_problem([seed for seeds in TEST_SETS.values() for seed in seeds])


def gradient_descent(lr):
    """Return GD for `rollout`; lr: a number, or a tensor that broadcasts over the weights."""
    return lambda t, w, gradient: w - lr * gradient


def tune_gradient_descent():
    """Return the step size with the least median loss at CLAIMED_STEP on training trajectories.

    They are those of LSTM(lr,tele). A loss that is not finite counts as larger than all others.
    """
    problem = draw_problem(training_seeds(METHODS["LSTM(lr,tele)"].trajectories))
    problem = problem._replace(w=problem.w.expand(len(GD_LRS), *problem.w.shape))
    lrs = torch.tensor(GD_LRS, dtype=torch.float32).view(-1, 1, 1, 1, 1)
    losses, _ = rollout(gradient_descent(lrs), problem, CLAIMED_STEP)
    return float(GD_LRS[np.median(finite(losses[-1].numpy()), axis=1).argmin()])


def finite(losses):
    """Return losses with infinity for all that are not finite."""
    return np.where(np.isfinite(losses), losses, np.inf)


def train(methods, initialisation, path, settings, report):
    """Do one task: train and test LSTMs from an initialisation; resume from `path`.

    methods: {name: Method} with one training. report(n): called after n trajectories. In the end
    `path` has the LSTMs' parameters and, for each method and the trajectories of all TEST_SETS in
    turn, "<name>: loss" and "<name>: gradient_norm_squared" [TEST_STEPS + 1, trajectories]. They
    are nan where training has lost the LSTMs to a loss that is not finite, of which it warns. Until
    then it has Adam's state, too; always the seconds spent.
    """
    method, *_ = methods.values()
    lstms, optimizer = new_training(method.networks, method.scaled, (initialisation + 1) * SEED)
    state = {"trained": 0, "seconds": 0.0} | (files.load(path, settings) or {})
    first, start = int(state["trained"]), time.perf_counter() - state["seconds"]
    if first:
        lstms.load_state_dict({key: torch.tensor(state[key]) for key in lstms.state_dict()})
        optimizer_from_arrays(optimizer, state)
        report(first)
    curves = {key: value for key, value in state.items() if ": " in key}
    tests, saved = draw_tests(), time.monotonic()
    nothing = np.full((TEST_STEPS + 1, len(tests.x)), np.nan)

    def save(done, **more):
        seconds = time.perf_counter() - start
        about = {"trained": done, "seconds": seconds}
        files.save(path, settings, about | lstms.state_dict() | curves | more)

    for i, seed in enumerate(training_seeds(last := trajectories(methods))[first:], first):
        problem = draw_problem(seed)
        loss = train_trajectory(lstms, optimizer, problem, method.steps, method.scaled)
        if not loss.isfinite():
            print(f"{path.stem}: the loss is not finite in trajectory {i}.", file=sys.stderr)
            report(last - i)
            break
        for name in [name for name, m in methods.items() if m.trajectories == i + 1]:
            learned = Learned(lstms.eval(), tests, method.scaled)
            curves |= named(name, rollout(learned, tests, TEST_STEPS))
        if time.monotonic() - saved > SAVE_SECONDS and i >= files.steps_saved(path, "trained"):
            save(i + 1, **optimizer_to_arrays(optimizer))
            saved = time.monotonic()
        report(1)
    for name in methods:
        curves = named(name, (nothing, nothing)) | curves
    save(last)


def named(name, curves):
    """Return loss and |∇L|² of a method under their names."""
    return {f"{name}: loss": curves[0], f"{name}: gradient_norm_squared": curves[1]}


def trajectories(methods):
    """Return on how many trajectories methods with one training are trained."""
    return max(method.trajectories for method in methods.values())


def start_worker(count):
    """Prepare a worker process; count: of trajectories done, is shared."""
    global report_to_parent
    torch.set_num_threads(1)
    files.code_version()  # now: the code may change while it runs

    def report_to_parent(n):
        with count.get_lock():
            count.value += n


def do_task(*task):
    """Do a task in a worker process."""
    train(*task, report_to_parent)


def run_tasks(tasks, processes):
    """Do tasks, the arguments of `train` but for its last, in single-threaded processes.

    Raises the first error that one of them raised, or UserError where one was killed. All of them
    end with this function, whatever ends it.
    """
    context = multiprocessing.get_context("spawn")
    count = context.Value("q", 0)
    os.environ[PARENT] = str(os.getpid())
    total = sum(trajectories(methods) for methods, *_ in tasks)
    executor = ProcessPoolExecutor(processes, context, start_worker, (count,))
    # the workers inherit that they ignore Ctrl-C: this process stops them
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        futures = [executor.submit(do_task, *task) for task in tasks]
    finally:
        signal.signal(signal.SIGINT, handler)
        del os.environ[PARENT]
    try:
        with launch.progress_bar(total, "trajectory") as bar:
            pending = futures
            while pending:
                done, pending = wait(pending, timeout=0.2)
                bar.update(count.value - bar.n)
                for future in done:
                    future.result()
    except BrokenProcessPool:
        raise files.UserError("a worker process was killed, possibly out of memory.") from None
    finally:
        for worker in multiprocessing.active_children():
            worker.kill()  # what it has saved is whole
        executor.shutdown(cancel_futures=True)


def tasks(methods, initialisations, folder):
    """Return the tasks: (methods with one training, initialisation, path of its log, settings).

    Those with scaled gradients come last, the longest of each kind first.
    """
    trainings, listed = {}, []
    for name, m in methods.items():
        trainings.setdefault((m.scaled, m.networks, m.steps), {})[name] = m

    def order(training):
        scaled, networks, steps = training
        work = trajectories(trainings[training]) * steps * sum(n.hidden**2 for n in networks)
        return scaled, -work

    for scaled, networks, steps in sorted(trainings, key=order):
        group = trainings[scaled, networks, steps]
        name = re.sub("[^a-z]+", "-", next(iter(group)).lower()).strip("-")
        for i in range(initialisations):
            settings = {
                "trajectories": {name: m.trajectories for name, m in group.items()},
                "training": [networks, steps, scaled, regression.UNROLL],
                "ranges": RANGES,
                "test": [TEST_STEPS, TEST_SETS],
                "seed": (i + 1) * SEED,
                "device": "cpu",
            }
            listed.append((group, i, folder / f"{name}-{i}.npz", settings))
    return listed


def chosen(args):
    """Return what the options ask for: methods, folders for figures and for logs, and tasks."""
    methods, logs = METHODS, args.output / "logs" / "learn-to-teleport"
    folder = args.output / "learn-to-teleport" / "figures"
    if args.quick:
        methods = {
            name: method._replace(trajectories=math.ceil(method.trajectories / QUICK))
            for name, method in METHODS.items()
        }
        folder, logs = folder / "quick", logs.with_name(f"{logs.name}-quick")
    if args.seeds != SEEDS:
        folder /= f"{args.seeds}seeds"
    return methods, folder, logs, tasks(methods, args.seeds, logs)


def is_finished(task):
    """Return whether a task's log is what `train` saves in the end."""
    methods, _, path, settings = task
    return (files.load(path, settings) or {}).get("trained") == trajectories(methods)


def compute(args):
    """Do this rank's share of the tasks that logs/ lacks: all of them but under torchrun."""
    todo = [task for task in launch.share_of_rank(chosen(args)[-1]) if not is_finished(task)]
    if launch.rank_and_world()[1] == 1 and todo:
        run_tasks(todo, args.processes)
    else:  # the ranks are the processes side by side
        total = sum(trajectories(methods) for methods, *_ in todo)
        with launch.progress_bar(total, "trajectory") as bar:
            for task in todo:
                train(*task, bar.update)


def seconds_a_step(optimizer, problem):
    """Return the seconds of a step of an optimizer on one problem: a median over REPEATS runs."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        rollout(optimizer, problem, CLAIMED_STEP)
        times.append((time.perf_counter() - start) / CLAIMED_STEP)
    return np.median(times)


def collect(_, args):
    """Return the results of all methods, settings and a log that they are from.

    For each method, "<method>: loss" [initialisations, TEST_STEPS + 1, trajectories of all
    TEST_SETS], "<method>: gradient_norm_squared", which has the published trajectories alone, and
    "<method>: seconds_a_step" of one trajectory. GD has one initialisation.
    """
    methods, _, _, listed = chosen(args)
    found = {name: [] for name in COLOURS}
    for task in listed:
        if not is_finished(task):
            raise files.UserError(
                f"{task[2]} is missing or incomplete: run the same command again."
            )
        for name in task[0]:
            found[name].append(files.load(*task[2:]))
    tests, one, gd_lr = (
        draw_tests(),
        draw_problem(TEST_SETS["fresh 100"][0]),
        tune_gradient_descent(),
    )
    optimizers = {"GD": gradient_descent(GD_LR), TUNED: gradient_descent(gd_lr)}
    for name, optimizer in optimizers.items():
        found[name].append(named(name, rollout(optimizer, tests, TEST_STEPS)))
    for name, m in methods.items():
        lstms, _ = new_training(m.networks, m.scaled, SEED)
        optimizers[name] = Learned(lstms.eval(), one, m.scaled)
    results = {"gd_tuned_lr": gd_lr}
    for name, states in found.items():
        loss, norm = named(name, [0, 0])
        results[loss] = np.stack([state[loss] for state in states])
        results[norm] = by_test_set(np.stack([state[norm] for state in states]))[PUBLISHED_5]
        results[f"{name}: seconds_a_step"] = seconds_a_step(optimizers[name], one)
    settings = {"seeds": args.seeds, "quick": args.quick, "methods": methods, "ranges": RANGES}
    return settings | {"test": [TEST_STEPS, TEST_SETS]}, results, listed[0][2]


def by_test_set(curves):
    """Return curves: [..., trajectories] as {name of TEST_SETS: [..., trajectories of it]}."""
    ends = np.cumsum([len(seeds) for seeds in TEST_SETS.values()])
    return dict(zip(TEST_SETS, np.split(curves, ends[:-1], axis=-1)))


def compare(a, b):
    """Return the ratio of losses a / b at CLAIMED_STEP on fresh trajectories, and which is lower.

    a, b: [initialisations, steps + 1, trajectories of all TEST_SETS]; b may have one
    initialisation for all of a's. Pairs of which neither is finite count as equal. `of_each` has
    the initialisations' own medians.
    """
    a, b = (by_test_set(curves[:, CLAIMED_STEP])["fresh 100"].astype(float) for curves in (a, b))
    with np.errstate(invalid="ignore"):
        ratio = np.where(np.isinf(a) & np.isinf(b), 1, a / b)
    result = interval(ratio)
    low, high = (np.inf if result[key] is None else result[key] for key in ("low", "high"))
    lower = "the first" if high < 1 else "the second" if low > 1 else "unclear"
    if lower != "unclear" and abs(np.median(ratio) - 1) < LITTLE:
        lower = f"neither by {LITTLE:.0%}"
    of_each = [float(f"{r:.4g}") if np.isfinite(r) else None for r in np.median(ratio, axis=1)]
    return result | {"lower": lower, "of_each": of_each}


def summarise(_, results):
    """Return what summary.json says of the results that `collect` returns."""
    losses = {name: finite(results[f"{name}: loss"]) for name in COLOURS}
    methods = {}
    for name, curves in losses.items():
        seconds = float(results[f"{name}: seconds_a_step"])
        methods[name] = {"seconds_a_step": float(f"{seconds:.3g}")}
        for test_set, loss in by_test_set(curves).items():
            at = {step: interval(loss[:, step].astype(float)) for step in STEPS_SHOWN}
            diverged = int((~(loss[:, -1] < loss[:, 0])).sum())  # ends no better than it began
            of = loss[:, 0].size
            methods[name][test_set] = {"loss_at_step": at, "diverged": diverged, "of": of}
    claims = [(name, method.without) for name, method in METHODS.items() if method.without]
    pairs = [*claims, *((name, TUNED) for name in METHODS)]
    ratios = {f"{a} / {b}": compare(losses[a], losses[b]) for a, b in pairs}
    claimed = [ratio["lower"] for ratio in list(ratios.values())[: len(claims)]]
    if all(lower == "the first" for lower in claimed):
        verdict = "holds"
    elif "the first" in claimed:
        verdict = f"holds for {claimed.count('the first')} of {len(claimed)}"
    else:
        verdict = "opposite" if "the second" in claimed else "not seen"
    return {
        "gd_tuned_lr": results["gd_tuned_lr"],
        "methods": methods,
        "ratios_of_losses": {"step": CLAIMED_STEP, "test_set": "fresh 100", "of": ratios},
        "claim_that_teleporting_lowers_the_loss": verdict,
    }


def table(summaries):
    """Return the losses and their ratios as Markdown."""
    (summary,) = summaries.values()

    def number(value, digits=3):
        return "∞" if value is None else f"{value:.{digits}g}"

    def cell(entry, digits=3):
        return "{} [{}, {}]".format(*(number(entry[k], digits) for k in ("median", "low", "high")))

    header = ["method", "trajectories", *(f"loss, step {step}" for step in STEPS_SHOWN)]
    header, rows = [*header, "diverged", "ms a step"], []
    for test_set in TEST_SETS:
        for name, entry in summary["methods"].items():
            found = entry[test_set]
            cells = [name, test_set, *map(cell, found["loss_at_step"].values())]
            milliseconds = f"{1e3 * entry['seconds_a_step']:.3g}"
            rows.append([*cells, f"{found['diverged']} of {found['of']}", milliseconds])
    compared = [f"ratio of losses, step {CLAIMED_STEP}, fresh trajectories", "median"]
    ratios = [
        [pair, cell(entry, 4), ", ".join(number(r, 4) for r in entry["of_each"]), entry["lower"]]
        for pair, entry in summary["ratios_of_losses"]["of"].items()
    ]
    verdict = summary["claim_that_teleporting_lowers_the_loss"]
    return (
        f"{plots.markdown(header, rows)}\n"
        f"{plots.markdown([*compared, 'of each initialisation', 'lower'], ratios)}\n"
        f"The claim that teleporting lowers the loss: {verdict}.\n"
    )


def draw_panel(results, against, path):
    """Draw a panel of Figure 6 over the published trajectories and all initialisations.

    results: as `collect` returns them. Against epoch or time: mean and standard deviation of the
    loss, the band cut at the lowest loss; against the loss: the mean |∇L|² at each epoch. Runs that
    are not finite by CLAIMED_STEP are left out and counted.
    """
    axes = Figure(figsize=(5.2, 3.8)).add_subplot(ylabel="loss")
    plots.plain_log_axis(axes, "y")
    partners = {method.without for method in METHODS.values()}
    for name, colour in COLOURS.items():
        style = {"color": colour}
        if name in partners:  # it may lie on that with T
            style |= {"ls": "--", "zorder": 3}
        loss = by_test_set(finite(results[f"{name}: loss"]))[PUBLISHED_5]
        norm = results[f"{name}: gradient_norm_squared"]
        loss, norm = (np.concatenate(c, -1)[: CLAIMED_STEP + 1] for c in (loss, norm))
        kept = np.isfinite(loss).all(0)
        label = name if kept.all() else f"{name}, {(~kept).sum()} of {len(kept)} not finite"
        if not kept.any():
            axes.plot([], [], label=label, **style)
            continue
        mean, deviation = loss[:, kept].mean(1), loss[:, kept].std(1)
        if against == "gradient":
            axes.plot(mean, norm[:, kept].mean(1), marker=".", label=label, lw=1, **style)
            continue
        x = np.arange(len(mean)) * (
            1e3 * results[f"{name}: seconds_a_step"] if against == "time" else 1
        )
        low = np.maximum(mean - deviation, loss[:, kept].min(1))
        shown = slice(against == "time", None)  # on a logarithmic axis there is no 0
        axes.plot(x[shown], mean[shown], label=label, **style)
        band = (curve[shown] for curve in (x, low, mean + deviation))
        axes.fill_between(*band, color=colour, alpha=0.15, lw=0)
    if against == "gradient":
        axes.set(xscale="log", xlabel="loss", ylabel=r"$|\nabla L|^2$")
    else:
        axes.set_xlabel("epoch" if against == "epoch" else "time (ms)")
        axes.set_xscale("linear" if against == "epoch" else "log")
    plots.legend_beside(axes)
    plots.save_figure(axes.figure, path)


def draw(_, results, summary, folder):
    """Draw Figure 6: the loss against epoch and against time, and |∇L|² against the loss."""
    for against in ("epoch", "time", "gradient"):
        suffix = "" if against == "epoch" else f"_vs_{against}"
        draw_panel(results, against, folder / f"multi_layer_loss{suffix}")


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
    parts, folder = (["results"], ["results"]), chosen(args)[1]
    launch.compute_and_report(args, folder, *parts, compute, collect, summarise, table, draw)


if __name__ == "__main__":
    launch.run(main)
