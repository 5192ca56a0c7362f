"""Study: what do teleports do for modules, at learning rates that are tuned?

    python studies/modules.py                               # two hours on two cores
    python studies/modules.py --device cuda --processes 12  # processes share a GPU
    python studies/modules.py --sample --steps 40 --runs 2  # a try

A ResNet on images of CIFAR-10 and a GPT on bytes of Python's standard library are trained by SGD
with momentum and by AdamW, at the best learning rate of a grid, which plain runs of other seeds
choose. `symmetry_of` finds rescalings in both, and GL(d) in the GPT's attention heads. The arms
are below, in ARMS; a seed has the same initial weights and mini-batches in each. The comparison
named beforehand is *ascend* − plain of the loss on data held out, after the last step, for the GPT
with AdamW; all others are exploratory.

Results go to logs/modules/, where an interrupted run resumes, and to figures/modules/.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

import models
import networks
from experiment import plots, results, run, statistics
from networks import GPT, BasicBlock, convolution, loss_of
from parameter_symmetries import LINEAR, RESCALING, act_on_, symmetry_of, teleport_
from teleport_optimization import by_arm

DEFAULTS = {"runs": 10, "steps": 300}
EVERY, LENGTH = 10, 0.02  # training steps from one move to the next; the most |T| of a move
ONCE, GROWTH = 50, 10  # when *ascend once* moves, and how far it raises |∇L|²
EVALUATE = 20  # training steps from one evaluation to the next
GRID_RUNS = range(100, 102)  # their seeds are not those of the arms
STEPS_SHOWN = 100, 300  # in the table
PRIMARY = "ascend − plain"


class Network(NamedTuple):
    """A network, its data, and the learning rates to choose from for each optimizer."""

    dataset: str  # of networks.py
    build: Callable  # of the shape of an input
    batch: int
    held_out: int  # how many images or windows
    grid: dict


def resnet(shape):
    """Return a ResNet with four BasicBlocks, 0.15 million weights, for images [3, 32, 32]."""
    blocks = [BasicBlock(*b) for b in ((16, 16, 1), (16, 32, 2), (32, 64, 2), (64, 64, 1))]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    return nn.Sequential(convolution(shape[0], 16), nn.ReLU(), *blocks, *head)


GPT_GRID = {"SGD": (0.02, 0.05, 0.1, 0.2, 0.5, 1.0), "AdamW": (5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02)}
RESNET_GRID = {"SGD": (0.01, 0.02, 0.05, 0.1, 0.2, 0.5), "AdamW": GPT_GRID["AdamW"]}
NETWORKS = {
    "GPT": Network("text", GPT, 8, 64, GPT_GRID),
    "ResNet": Network("CIFAR10", resnet, 64, 500, RESNET_GRID),
}
OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, momentum=0.9, fused=True),
    "AdamW": partial(torch.optim.AdamW, fused=True),
}


# Moves, between backward() and step(). Each returns the factor by which it changes |∇L|². growth is
# the factor of the arm MIRRORED at this step, 1 if there was none.


def ascend(model, symmetry, optimizer, rng, growth, **options):
    """Teleport to a larger |∇L|², or with a negative length to a smaller one."""
    before, after = teleport_(model, symmetry, optimizer, **options)
    return float(after / before)


def at_random(model, symmetry, optimizer, rng, growth):
    """Act by random elements that are as long as the longest of an ascent."""
    elements = []
    for group in symmetry:
        T = torch.randn(group.count, group.size, group.size, generator=rng)
        T = T + T.mT
        T = LENGTH * T / torch.linalg.matrix_norm(T, keepdim=True)
        elements.append(torch.linalg.matrix_exp(T))
    before = gradient_norm_squared(model)
    act_on_(model, symmetry, elements, optimizer)
    return gradient_norm_squared(model) / before


def raise_rate(model, symmetry, optimizer, rng, growth):
    """Multiply the learning rate by the growth."""
    for group in optimizer.param_groups:
        group["lr"] *= growth
    return growth


def gradient_norm_squared(model):
    """Return |∇L|² of the gradients that are there."""
    return sum(p.grad.square().sum() for p in model.parameters()).item()


class Arm(NamedTuple):
    """How an arm moves, by which groups, and at which step: None is every ten steps."""

    move: Callable | None
    kinds: tuple = (RESCALING, LINEAR)
    moment: int | None = None


ARMS = {
    "plain": Arm(None),
    "ascend once": Arm(partial(ascend, until=GROWTH), moment=ONCE),
    "ascend": Arm(partial(ascend, length=LENGTH)),
    "random": Arm(at_random),
    "descend": Arm(partial(ascend, length=-LENGTH)),  # balances a network
    "larger rate": Arm(raise_rate),  # no moves; comes after *ascend*, with whose |∇L|² it grows
    "ascend, linear": Arm(partial(ascend, length=LENGTH), kinds=(LINEAR,)),
    "ascend, rescaling": Arm(partial(ascend, length=LENGTH), kinds=(RESCALING,)),
}
MIRRORED = "ascend"
COLORS = plots.BLUE, plots.RED, plots.GREY, plots.GREEN, plots.ORANGE, plots.PURPLE, plots.SKY


def arms_of(network):
    """Return the names of a network's arms: those by one kind of group need groups of both."""
    return [name for name, arm in ARMS.items() if network == "GPT" or len(arm.kinds) == 2]


# Computation


class Task(NamedTuple):
    """Arms that are trained one after another with a seed at a learning rate."""

    network: str
    optimizer: str
    lr: float
    seed: int
    arms: tuple


def training_log(task, args):
    """Return the Log of a task."""
    network, is_cpu = NETWORKS[task.network], args.device.type == "cpu"
    settings = task._asdict() | {
        "training": [network.dataset, network.batch, network.held_out, args.steps, EVALUATE],
        "moves": [EVERY, LENGTH, ONCE, GROWTH, MIRRORED],
        "data": networks.data_version(networks.data_file(args)),
        "device": "cpu" if is_cpu else torch.cuda.get_device_name(args.device),
    }
    name = f"{task.network}-{task.optimizer}-lr{task.lr:g}-{task.seed}-{len(task.arms)}arms.npz"
    folder = f"{args.steps}steps{'-sample' * args.sample}"
    path = args.output / "logs" / "modules" / folder / name
    return results.Log(path, settings, (__file__, *networks.CODE))


def compute(task, args, bar):
    """Train the arms of a task; resumes from logs/. Saves for each what `train` returns."""
    network = NETWORKS[task.network]
    train_data, test_data = (networks.load(network.dataset, p, args) for p in ("train", "test"))
    test_data = tuple(part[: network.held_out] for part in test_data)
    x = train_data[0][:2].cpu()
    symmetry = symmetry_of(network.build(x.shape[1:]), x)

    def step(state):
        done = dict(zip(task.arms, state.get("growth", ())))
        arm, mirrored = ARMS[task.arms[len(done)]], done.get(MIRRORED)
        curves = train(task, arm, symmetry, train_data, test_data, args.steps, mirrored)
        return results.append(state, **curves)

    results.resume(training_log(task, args), dict, step, len(task.arms), bar)


def train(task, arm, symmetry, train_data, test_data, steps, mirrored):
    """Train an arm of a task; return its curves.

    mirrored: the growth of the arm MIRRORED, if it was trained before. The curves:

        test_loss: [evaluations], of the data held out; nan once a run has diverged
        seconds, move_seconds: [evaluations] since the last one, of training steps and of moves
        growth: [moves], what the moves return; 1 where there is none
    """
    (x, y), network = train_data, NETWORKS[task.network]
    torch.manual_seed(task.seed)
    model = network.build(x.shape[1:]).to(x.device)
    optimizer = OPTIMIZERS[task.optimizer](model.parameters(), task.lr)
    rng = torch.Generator().manual_seed(task.seed)
    batches = torch.randint(len(x), (steps, network.batch), generator=rng).to(x.device)
    symmetry = [group for group in symmetry if group.kind in arm.kinds]
    growth = np.ones(len(range(EVERY, steps, EVERY)))
    curves = {"test_loss": [], "seconds": [], "move_seconds": []}
    begin, move_seconds = clock(x.device), 0
    for k, rows in enumerate(batches):
        loss = loss_of(model, (x[rows], y[rows]))
        optimizer.zero_grad()
        loss.backward()
        if arm.move and k and (k % EVERY == 0 if arm.moment is None else k == arm.moment):
            before, j = clock(x.device), k // EVERY - 1
            factor = 1.0 if mirrored is None else float(mirrored[j])
            growth[j] = arm.move(model, symmetry, optimizer, rng, factor)
            move_seconds += clock(x.device) - before
        optimizer.step()
        if (k + 1) % EVALUATE == 0:
            curves["seconds"].append(clock(x.device) - begin - move_seconds)
            curves["move_seconds"].append(move_seconds)
            curves["test_loss"].append(networks.evaluate(model.eval(), *test_data)[0])
            model.train()
            begin, move_seconds = clock(x.device), 0
    return curves | {"growth": growth}


def clock(device):
    """Return the time in seconds at which a device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def tasks_of(network, optimizer, rates, runs, arms):
    """Return a Task for each learning rate and run."""
    pairs = product(rates, models.run_seeds(runs))
    return [Task(network, optimizer, lr, seed, tuple(arms)) for lr, seed in pairs]


def grid_losses(tasks, args):
    """Return {learning rate: mean final loss held out} of tasks; nan where a run diverged."""
    losses = {}
    for task in tasks:
        loss = results.load(training_log(task, args), 1).arrays["test_loss"][0, -1]
        losses.setdefault(task.lr, []).append(float(loss))
    return {lr: float(np.mean(several)) for lr, several in losses.items()}


def best(losses):
    """Return the learning rate of the least of {learning rate: loss}; it has no nan."""
    return min(losses, key=lambda lr: np.nan_to_num(losses[lr], nan=np.inf))


def collect(tasks, losses, args):
    """Return the Result of a network and an optimizer, whose tasks these are.

    Arrays: those of `train`, [evaluations or moves, arms, runs]; arms: their names; grid, losses:
    the learning rates and their `grid_losses`.
    """
    parts = [results.load(training_log(task, args), len(task.arms)) for task in tasks]
    keys = "test_loss", "seconds", "move_seconds", "growth"
    arrays = {key: np.stack([part.arrays[key] for part in parts]).T for key in keys}
    arrays |= {"arms": list(tasks[0].arms), "grid": list(losses), "losses": list(losses.values())}
    settings = parts[0].settings | {"seed": [task.seed for task in tasks]}
    return results.Result(arrays, settings, parts[0].made_with)


# Statistics


def cost(arrays):
    """Return the seconds of a training step, and {arm: those of its moves}, as medians: [n]."""
    step = np.median(arrays["seconds"]) / EVALUATE
    return step, {arm: np.median(s, -1) for arm, s in by_arm(arrays, "move_seconds").items()}


def summarise(arrays):
    """Return plain's losses, paired differences from them, and what moves do and cost."""
    loss, (step, moves) = by_arm(arrays, "test_loss"), cost(arrays)
    n = len(loss["plain"])
    rows = sorted({min(shown // EVALUATE, n) for shown in STEPS_SHOWN})
    pairs = [(arm, "plain") for arm in loss if arm != "plain"] + [(MIRRORED, "larger rate")]
    growth = {arm: np.exp(np.log(g).sum(0).mean()) for arm, g in by_arm(arrays, "growth").items()}
    grid = dict(zip(arrays["grid"].tolist(), arrays["losses"].tolist()))
    return {
        "grid": grid,
        "best": best(grid),
        "plain": {row * EVALUATE: loss["plain"][row - 1].mean() for row in rows},
        "differences": statistics.compare_arms(loss, pairs, rows),
        "growth": growth,
        "diverged": {arm: int(np.isnan(values[-1]).sum()) for arm, values in loss.items()},
        "milliseconds_of_a_step": 1e3 * step,
        "time_of_moves": {arm: s.sum() / (step * n * EVALUATE) for arm, s in moves.items()},
    }


def at_equal_time(arrays):
    """Return plain's seconds [evaluations], and {arm: loss held out} there, [evaluations, runs].

    An arm's loss at a time is interpolated. Steps and moves are taken to last their `cost`, since
    processes that share a machine disturb each other.
    """
    (step, moves), losses = cost(arrays), by_arm(arrays, "test_loss")
    seconds = EVALUATE * step * (1 + np.arange(len(losses["plain"])))
    for arm, loss in losses.items():
        times = seconds + moves[arm].cumsum()
        curves = [np.interp(seconds, times, curve, left=np.nan) for curve in loss.T]
        losses[arm] = np.stack(curves, 1)
    return seconds, losses


def table(summaries):
    """Return the differences, what moves do and cost, and the learning rates as Markdown."""
    rows, rates = [], []
    for title, summary in summaries.items():
        losses = [f"{loss:.3f}" for loss in summary["plain"].values()]
        rows.append([title, "plain", *losses, "", "", str(summary["diverged"]["plain"])])
        for pair, differences in summary["differences"].items():
            arm, other = pair.split(" − ")
            effects = ["", "", ""]
            if other == "plain":
                growth, time_of_moves = summary["growth"][arm], summary["time_of_moves"][arm]
                effects = [f"{growth:.3g}", f"{time_of_moves:.1%}", str(summary["diverged"][arm])]
            texts = map(plots.difference_text, differences.values())
            rows.append([title, pair, *texts, *effects])
        grid = [f"{lr:g}: {loss:.3f}" for lr, loss in summary["grid"].items()]
        rates.append([title, f"{summary['best']:g}", *grid])
    header = ["", "arm", *(f"loss held out, step {step}" for step in summary["plain"])]
    header += ["growth of gradient norm²", "time of moves", "diverged"]
    empty = [""] * (max(map(len, rates)) - 3)
    return f"""{plots.markdown(header, rows)}
Differences are in 10⁻³: paired means and 95 % intervals over runs that have not diverged. The
comparison named beforehand is {PRIMARY}, after the last step, for the GPT with AdamW. The growth is
by all moves together (of the rate, where that is larger); the time is relative to the training
steps'.

{plots.markdown(["", "learning rate", "grid: loss held out", *empty], rates)}"""


# Figures


def draw(path, arrays_of, against):
    """Draw arms' loss held out − plain's, a panel for each network and optimizer.

    against: "step" or "seconds"; after equal seconds, moves have cost an arm some of its steps.
    """
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    panels = figure.subplots(2, 2).ravel()
    for ax, (title, arrays) in zip(panels, arrays_of.items()):
        loss = by_arm(arrays, "test_loss")
        x = EVALUATE * (1 + np.arange(len(loss["plain"])))
        if against == "seconds":
            x, loss = at_equal_time(arrays)
        plots.plot_differences(ax, x, loss, loss.pop("plain"), COLORS)
        ax.set(title=title, xlabel=against)
    for ax in panels[len(arrays_of) :]:
        ax.remove()
    plots.legend_below(figure, panels[0])  # the GPT's, which has most arms
    figure.supylabel("loss held out − plain's, 95 % interval", size="medium")
    plots.save_figure(figure, path)


# The script


def parse_arguments():
    parser = run.experiment_parser(__doc__)
    add, number, names = parser.add_argument, run.whole_number, list(NETWORKS)
    add("--network", nargs="+", choices=names, default=names, help="which networks")
    add("--runs", type=number(2), default=DEFAULTS["runs"], help="seeds of each arm")
    add("--steps", type=number(EVALUATE), default=DEFAULTS["steps"], help="of training")
    args = parser.parse_args()
    args.network = list(dict.fromkeys(args.network))
    if run.WORLD > 1:
        parser.error("learning rates are chosen on the way: use --processes in place of torchrun")
    return args


def train_all(tasks, args):
    """Train the arms of tasks, {name: [Task]}, in worker processes."""
    tasks = sum(tasks.values(), [])
    results.warn_of_other_code([training_log(task, args) for task in tasks])
    run.run_tasks(compute, tasks, args, [len(task.arms) for task in tasks], "run")


def main():
    args = parse_arguments()
    folder = run.figures_folder(args, DEFAULTS) / "modules"
    pairs = {"-".join(pair): pair for pair in product(args.network, OPTIMIZERS)}
    if not args.plot_only:
        results.check_writable(folder)
        networks.make_data(args)
        grids, tasks, losses = {}, {}, {}
        for name, (network, optimizer) in pairs.items():
            rates = NETWORKS[network].grid[optimizer]
            grids[name] = tasks_of(network, optimizer, rates, GRID_RUNS, ["plain"])
        train_all(grids, args)
        for name, (network, optimizer) in pairs.items():
            losses[name] = grid_losses(grids[name], args)
            chosen, arms = [best(losses[name])], arms_of(network)
            tasks[name] = tasks_of(network, optimizer, chosen, range(args.runs), arms)
        train_all(tasks, args)
        for name in pairs:
            results.save(folder / f"{name}.npz", collect(tasks[name], losses[name], args))

    saved = results.read_all(folder, map("-".join, product(NETWORKS, OPTIMIZERS)), required=pairs)
    arrays = {name: part.arrays for name, part in saved.items()}
    summaries = {name: summarise(values) for name, values in arrays.items()}
    results.save_summaries(folder / "summary.json", saved, summaries)
    results.save_text(folder / "table.md", table(summaries))
    draw(folder / "steps", arrays, "step")
    draw(folder / "seconds", arrays, "seconds")
    print(f"\n{table(summaries)}\nFigures, and each run: {folder}")


if __name__ == "__main__":
    run.run(main)
