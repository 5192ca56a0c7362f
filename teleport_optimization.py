"""Figures 5 and 13: do teleports speed up AdaGrad, momentum, RMSprop and Adam?

    python teleport_optimization.py                          # MNIST, all optimizers
    python teleport_optimization.py --sample                 # on the 1,000 images that ship
    python teleport_optimization.py --optimizer Adam --dataset CIFAR10

Before each of the first mini-batches of one epoch the weights are teleported to a larger gradient.
The published code then also builds a new optimizer, which empties its state. Five arms tell apart
what the two do:

    plain       no teleports
    kept        teleports that keep the optimizer's state
    teleport    as published: teleports, each followed by a new optimizer
    reset       a new optimizer at the same moments, no teleports
    random      random moves along the orbit, of the same length as teleports; a new optimizer

An interrupted run resumes from logs/optimization/ with the same numbers. The curves of each arm and
run go to figures/optimization/<dataset>/<optimizer>.npz.
"""

import time
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from math import ceil
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.optim import SGD, Adagrad, Adam, RMSprop

import models
from data import TITLES, load_data, shuffled_batch
from experiment import plots, results, run, statistics
from teleportation import (
    PSEUDOINVERSE,
    act,
    loss_and_gradient_norm_squared,
    random_group_elements,
    teleport,
)

DEFAULTS = {"runs": 20, "epochs": 40}  # published: 5 runs of plain and teleport
ACTIVATION, ACTION = models.LeakyReLU(), PSEUDOINVERSE
MOVES = 8  # mini-batches that a move precedes: the first of the epoch
STEPS = 10  # of ascent in a teleport
CAP = 100.0  # a teleport goes no further where |∇L|² is larger
TELEPORT_BATCH = 200  # training images, drawn anew for each move
EPOCHS_SHOWN = 1, 5, 10, 40  # in the table
PRIMARY = "teleport − plain"  # after the last epoch: the comparison named beforehand
ARM_COLUMNS = {  # of the table: what `summarise` says of an arm, its heading and its format
    "diverged": ("diverged", "d"),
    "seconds_of_moves": ("moves, s", ".1f"),
    "share_of_moves_made": ("moves made", ".0%"),
    "median_factor": ("gradient norm², factor", ".3g"),
    "mean_change_of_loss": ("loss, change in a move", "+.1e"),
}
COLORS = plots.GREEN, plots.BLUE, plots.ORANGE, plots.GREY, plots.RED, plots.PURPLE, plots.SKY


class Setting(NamedTuple):
    """An optimizer, and when and how far the paper teleports with it."""

    optimizer: Callable  # of parameters and lr; elementwise, since all runs share a tensor
    lr: float
    epoch: int  # index of the epoch that begins with moves
    ascent_lr: float  # of the ascent on T


def adagrad(parameters, lr):
    """Return AdaGrad, fused where that is faster: CUDA has it since torch 2.13 only."""
    parameters = list(parameters)
    return Adagrad(parameters, lr, fused=parameters[0].device.type == "cpu")


OPTIMIZERS = {
    "SGD": Setting(SGD, 1e-2, 2, 1e-4),  # the published code can run it but does not plot it
    "AdaGrad": Setting(adagrad, 1e-2, 2, 1e-4),
    "momentum": Setting(partial(SGD, momentum=0.9), 1e-3, 0, 5e-2),
    "RMSprop": Setting(RMSprop, 1e-4, 0, 5e-2),
    "Adam": Setting(partial(Adam, fused=True), 1e-4, 0, 5e-2),
}
PANELS = [name for name in OPTIMIZERS if name != "SGD"]  # of Figures 5 and 13


# Arms


def to_larger_gradient(weights, x, y, lr, rng, steps=STEPS):
    """Return the weights after a teleport of so many steps on the batch x: [d_0, n], y: [n]."""
    return teleport(weights, x, y, lr, steps, ACTIVATION, CAP, action=ACTION)


def at_random(weights, x, y, lr, rng):
    """Return the weights acted on by random group elements as far from I as a teleport's."""
    limits = lr, STEPS, ACTIVATION, CAP
    _, path = teleport(weights, x, y, *limits, return_path=True, action=ACTION)
    elements = random_group_elements(path["group_elements"], rng, ACTION)
    return act(weights, x, elements, ACTIVATION, ACTION)


class Arm(NamedTuple):
    """How an arm's weights move, if they do, and whether a new optimizer follows."""

    move: Callable | None
    new_optimizer: bool


ARMS = {
    "plain": Arm(None, False),
    "kept": Arm(to_larger_gradient, False),
    "teleport": Arm(to_larger_gradient, True),
    "reset": Arm(None, True),
    "random": Arm(at_random, True),
}


# Computation


def split(arms):
    """Return the names of arms that can be one stack: those that keep or renew the optimizer."""
    kept = [name for name, arm in arms.items() if not arm.new_optimizer]
    renewed = [name for name, arm in arms.items() if arm.new_optimizer]
    return [names for names in (kept, renewed) if names]


def training_log(optimizer, setting, arms, args):
    """Return the Log of a stack: some arms, by name, with an optimizer and its Setting."""
    settings = {
        "dataset": args.dataset,
        "optimizer": optimizer,
        "arms": arms,
        "sample": args.sample,
        "seeds": models.run_seeds(range(args.runs)),
        "widths": models.TRAINING[args.dataset].widths,
        "activation": str(ACTIVATION),
        "action": ACTION.name,
        "batch": models.BATCH,
        "epochs": args.epochs,
        "device": args.device.type,
        "optimizer_defaults": setting.optimizer([torch.zeros(1)], setting.lr).defaults,
        "moves": [setting.epoch, setting.ascent_lr, MOVES, STEPS, CAP, TELEPORT_BATCH],
    }
    folder = f"{args.dataset}{'-sample' * args.sample}-{args.epochs}epochs-{args.runs}runs"
    path = args.output / "logs" / "optimization" / folder / f"{'-'.join([optimizer, *arms])}.npz"
    return results.Log(path, settings, (__file__,))


def train(log, args, bar):
    """Train the stack of a Log; its arms move before the first mini-batches of an epoch."""
    setting, arms = OPTIMIZERS[log.settings["optimizer"]], log.settings["arms"]
    train_arms(log, setting, {name: ARMS[name] for name in arms}, args, bar)


def train_arms(log, setting, arms, args, bar, moments=None):
    """Train arms, {name: Arm}, as one stack [arms, runs]; resumes from its Log.

    moments: {epoch: {mini-batch: {arm's name: k}}}, before which arms make their k-th moves; None:
    the published ones. Saves the weights, the optimizer's state, and

        train_loss (the mean over each epoch), test_loss, test_accuracy: [epochs, arms, runs]
        moves: [moments, arms, 4, runs], as `move_arms` measures them
        seconds: [epochs] of training, without the moves; move_seconds: [epochs, arms]
        diverged: [arms, runs], whether a weight was not below models.DIVERGED_WEIGHT

    The curves and moves of a run that diverged are nan from there on. Raises UserError where all
    runs diverge.
    """
    if moments is None:
        moving = [name for name, arm in arms.items() if arm.move]
        moments = {setting.epoch: {k: dict.fromkeys(moving, k) for k in range(MOVES)}}
    data = load_data(args.dataset, args)

    def start():
        seeds = models.run_seeds(range(args.runs))
        weights = models.init_weights(models.TRAINING[args.dataset].widths, seeds)
        moves = np.empty((0, len(arms), 4, args.runs), np.float32)
        state = {"moves": moves, "diverged": np.zeros((len(arms), args.runs), bool)}
        return state | models.to_arrays(w.expand(len(arms), *w.shape) for w in weights)

    def step(state):
        epoch = int(state["steps"])
        try:
            return train_epoch(state, data, setting, arms, moments.get(epoch, {}))
        except ValueError as error:
            raise results.UserError(f"{log.path.stem}, epoch {epoch}: {error}.") from None

    results.resume(log, start, step, args.epochs, bar)


@torch.no_grad()
def train_epoch(state, data, setting, arms, moments):
    """Return the state of a stack, as `train_arms` saves it, after one epoch more.

    moments: those of this epoch. After each the stack gets a new optimizer, if its arms are to have
    one. Raises ValueError where all runs diverge.
    """
    device, batches = data.x_train.device, ceil(len(data.x_train) / models.BATCH)
    model = models.MLP(models.from_arrays(state, device), ACTIVATION)
    optimizer = setting.optimizer(model.parameters(), setting.lr)
    models.optimizer_from_arrays(optimizer, state)
    diverged = torch.tensor(state["diverged"], device=device)
    loss, seconds, move_seconds = 0, 0, np.zeros(len(arms))
    for first, end in pairwise(sorted({0, *moments, batches})):
        if first in moments:
            moves, spent = move_arms(model.weights, arms, moments[first], data, setting.ascent_lr)
            models.replace_diverged(model.weights, diverged)
            state = results.append(state, moves=moves.masked_fill(diverged[:, None], torch.nan))
            move_seconds += spent
            if any(arm.new_optimizer for arm in arms.values()):
                optimizer = setting.optimizer(model.parameters(), setting.lr)
        begin, rows = time.perf_counter(), slice(first * models.BATCH, end * models.BATCH)
        x, y = data.x_train[rows], data.y_train[rows]
        loss = loss + (end - first) * models.train_epoch(model, x, y, optimizer, check=False)
        models.replace_diverged(model.weights, diverged)  # by then a GPU has done its work
        seconds += time.perf_counter() - begin
    test = models.evaluate(list(model.weights), data.x_test, data.y_test, ACTIVATION)
    curves = {"train_loss": loss / batches, "test_loss": test[0], "test_accuracy": test[1]}
    curves = {key: curve.masked_fill(diverged, torch.nan) for key, curve in curves.items()}
    state = results.append(state, seconds=seconds, move_seconds=move_seconds, **curves)
    state |= models.to_arrays(model.weights) | models.optimizer_to_arrays(optimizer)
    return state | {"diverged": diverged}


@torch.no_grad()
def move_arms(weights, arms, moving, data, ascent_lr):
    """Let arms make their k-th moves, {name: k}, each on the k-th batch, in place.

    weights: [arms, runs, d_{m+1}, d_m]. Returns loss and |∇L|² before and after the move, on its
    batch: [arms, 4, runs], nan where an arm does not move; and the seconds of the moves: [arms].
    """
    shape = len(arms), 4, weights[0].shape[1]
    measured, seconds = weights[0].new_full(shape, torch.nan), np.zeros(len(arms))
    for i, name in enumerate(arms):
        if name in moving:
            x, y = shuffled_batch(data, TELEPORT_BATCH, moving[name])
            rng = torch.Generator().manual_seed(models.SEED + moving[name])
            before = [w[i].clone() for w in weights]
            begin = time.perf_counter()
            after = arms[name].move(before, x, y, ascent_lr, rng)
            seconds[i] = time.perf_counter() - begin
            for w, moved in zip(weights, after):
                w[i] = moved
            old, new = (
                loss_and_gradient_norm_squared(w, x, y, ACTIVATION) for w in (before, after)
            )
            measured[i] = torch.stack([*old, *new])
    return measured, seconds


def compute(train, logs, args, folder):
    """Train stacks and save the Results; logs: {name of a Result: the Logs of its stacks}."""
    results.check_writable(folder)
    load_data(args.dataset, args)  # fetches it, if it is missing, before the workers start
    tasks = [log for part in logs.values() for log in part]
    results.warn_of_other_code(tasks)
    run.run_tasks(train, tasks, args, args.epochs, "epoch")
    for name, part in logs.items():
        results.save(folder / f"{name}.npz", collect(part, args))


def collect(logs, args):
    """Return the Result of an optimizer: the arms of its stacks, whose Logs these are, together.

    Its curves and moves are those of `train_arms`; move_seconds: [arms], in all; seconds: [epochs,
    arms], when an arm's runs, trained as one stack, end each epoch; `arms` are the names.
    """
    parts = [results.load(log, args.epochs) for log in logs]
    states = [part.arrays for part in parts]
    keys = "train_loss", "test_loss", "test_accuracy", "moves", "move_seconds"
    arrays = {key: np.concatenate([state[key] for state in states], 1) for key in keys}
    arms = [arm for part in parts for arm in part.settings["arms"]]
    # arms train side by side: each has an equal share of that time, and the time of its moves
    training = sum(state["seconds"] for state in states)[:, None] / len(arms)
    arrays["seconds"] = (training + arrays["move_seconds"]).cumsum(0)
    arrays["move_seconds"] = arrays["move_seconds"].sum(0)
    code = dict.fromkeys(version for part in parts for version in part.made_with["code"])
    made_with = parts[0].made_with | {"code": list(code)}
    return results.Result(arrays | {"arms": arms}, parts[0].settings | {"arms": arms}, made_with)


# Statistics


def by_arm(arrays, key):
    """Return one of the arrays of `collect`, [epochs, arms, …], as {arm: [epochs, …]}."""
    return dict(zip(arrays["arms"].tolist(), arrays[key].swapaxes(0, 1)))


def summarise(arrays):
    """Return plain's mean test loss at EPOCHS_SHOWN, paired differences of arms, and their moves.

    The differences, {"a − b": {epoch: `paired_difference`}}, are of the test and training losses.
    """
    loss, moves = by_arm(arrays, "test_loss"), by_arm(arrays, "moves")
    epochs = sorted({min(epoch, len(loss["plain"])) for epoch in EPOCHS_SHOWN})
    pairs = [(arm, "plain") for arm in loss if arm != "plain"]
    if "reset" in loss:
        pairs.append(("teleport", "reset"))
    arms = {
        arm: {"diverged": np.isnan(loss[arm][-1]).sum(), "seconds_of_moves": seconds}
        | summarise_moves(moves[arm])
        for arm, seconds in zip(loss, arrays["move_seconds"])
    }
    return {
        "plain": {epoch: np.nanmean(loss["plain"][epoch - 1], dtype=float) for epoch in epochs},
        "differences": statistics.compare_arms(loss, pairs, epochs),
        "training": statistics.compare_arms(by_arm(arrays, "train_loss"), pairs, epochs),
        "arms": arms,
    }


def summarise_moves(moves):
    """Return what the moves of an arm did: [moves, 4, runs], as measured; nan if it has none.

    A teleport is not made where |∇L|² is above the CAP. `median_factor` is that of |∇L|² over the
    teleports that are made.
    """
    loss, norm, new_loss, new_norm = moves.swapaxes(1, 2)[np.isfinite(moves).all(1)].T
    changed = new_norm != norm
    with warnings.catch_warnings():  # the mean of no moves is nan
        warnings.simplefilter("ignore", RuntimeWarning)
        return {
            "share_of_moves_made": changed.mean(),
            "median_factor": np.median((new_norm / norm)[changed]),
            "mean_change_of_loss": (new_loss - loss).mean(dtype=float),
        }


def table(title, summaries, primary):
    """Return the test losses, their differences and the moves as Markdown, a row for each arm."""

    def cells(entry):
        values = [(entry.get(key, np.nan), form) for key, (_, form) in ARM_COLUMNS.items()]
        return ["–" if np.isnan(v) else format(v, form).replace("-", "−") for v, form in values]

    rows = []
    for label, summary in summaries.items():
        losses, arms = summary["plain"], summary["arms"]
        last = max(losses)
        texts = (f"{loss:.3f}" for loss in losses.values())
        rows.append([label, "plain", *texts, "", *cells(arms["plain"])])
        entries = {f"{arm} − plain": entry for arm, entry in arms.items()}
        for pair, after in summary["differences"].items():
            differences = [*after.values(), summary["training"][pair][last]]
            texts = map(plots.difference_text, differences)
            rows.append([label, pair, *texts, *cells(entries.get(pair, {}))])
    header = [title, "arm", *(f"test loss, epoch {epoch}" for epoch in losses)]
    header += [f"training loss, epoch {last}", *(name for name, _ in ARM_COLUMNS.values())]
    return f"""{plots.markdown(header, rows)}
Differences are in 10⁻³: paired means over the runs that have not diverged, and 95 % intervals.
The comparison named beforehand is {primary} after the last epoch; the others are exploratory.
A teleport is not made where |∇L|² is above the cap. The factor is a median, the change a mean.
"""


# Figures


def draw(path, dataset, arrays, against):
    """Draw Figure 5 (against "epoch") or 13 (against "time (s)"): an optimizer in each panel."""
    figure = Figure(figsize=(1 + 2.6 * len(arrays), 3.4), layout="constrained")
    axes = figure.subplots(1, len(arrays), sharex=True, sharey=True, squeeze=False)[0]
    for ax, (optimizer, a) in zip(axes, arrays.items()):
        for color, arm in ((plots.BLACK, "plain"), (plots.BLUE, "teleport")):
            seconds = by_arm(a, "seconds")[arm]
            x = seconds if against == "time (s)" else 1 + np.arange(len(seconds))
            for kind, style in (("train", "--"), ("test", "-")):
                loss = by_arm(a, f"{kind}_loss")[arm]
                plots.plot_mean(ax, x, loss, color=color, ls=style, label=f"{arm}, {kind}")
        ax.set(title=f"{TITLES[dataset]}, {optimizer}", xlabel=against)
    axes[0].set(ylabel="loss")
    plots.plain_log_axis(axes[0], "y")
    plots.legend_below(figure, axes[0], columns=min(4, 2 * len(arrays)))
    plots.save_figure(figure, path, pdf=dataset == "MNIST")


def draw_differences(path, arrays):
    """Draw the test loss of all arms minus plain's; arrays: {a panel's title: its arrays}."""
    figure = Figure(figsize=(1 + 2.8 * len(arrays), 3.4), layout="constrained")
    axes = figure.subplots(1, len(arrays), squeeze=False)[0]
    for ax, (title, a) in zip(axes, arrays.items()):
        loss = by_arm(a, "test_loss")
        plain = loss.pop("plain")
        plots.plot_differences(ax, 1 + np.arange(len(plain)), loss, plain, COLORS)
        ax.set(title=title)
    figure.supylabel("test loss − plain's, 95 % interval", size="medium")
    plots.legend_below(figure, axes[0], columns=min(4, 2 * len(arrays)))
    plots.save_figure(figure, path)


# The script


def parse_arguments(parser=None, optimizers=tuple(OPTIMIZERS)):
    """Return the options; parser: another script's; optimizers: which are the default."""
    parser = parser or run.experiment_parser(__doc__)
    add, number = parser.add_argument, run.whole_number
    add("--dataset", choices=models.TRAINING, default="MNIST", help="which dataset")
    names = {"nargs": "+", "choices": OPTIMIZERS, "default": optimizers}
    add("--optimizer", **names, help="which optimizers")
    add("--runs", type=number(2), default=DEFAULTS["runs"], help="runs of each arm; published: 5")
    add("--epochs", type=number(1), default=DEFAULTS["epochs"], help="passes over the images")
    args = parser.parse_args()
    least = max(1 + OPTIMIZERS[name].epoch for name in args.optimizer)
    if args.epochs < least:
        parser.error(f"the teleports are in epoch {least}: choose at least {least} --epochs")
    return args


def write_up(folder, dataset, parts, primary, figure):
    """Write the tables of Results {title: Result} and a figure of all arms; return the table."""
    summaries = {title: summarise(part.arrays) for title, part in parts.items()}
    results.save_summaries(folder / "summary.json", parts, summaries)
    text = table(TITLES[dataset], summaries, primary)
    results.save_text(folder / "table.md", text)
    draw_differences(folder / figure, {title: part.arrays for title, part in parts.items()})
    return text


def main():
    args = parse_arguments()
    figures = run.figures_folder(args, DEFAULTS)
    folder = figures / "optimization" / args.dataset
    if not args.plot_only:
        logs = {
            name: [training_log(name, OPTIMIZERS[name], arms, args) for arms in split(ARMS)]
            for name in args.optimizer
        }
        compute(train, logs, args, folder)

    parts = results.read_all(folder, OPTIMIZERS, required=args.optimizer)
    text = write_up(folder, args.dataset, parts, PRIMARY, "controls")
    top = figures if args.dataset == "MNIST" else folder  # the paper's figures are of MNIST
    if panels := {name: parts[name].arrays for name in PANELS if name in parts}:
        draw(top / "figure_5", args.dataset, panels, "epoch")
        draw(top / "figure_13", args.dataset, panels, "time (s)")
    print(f"\n{text}\nFigures 5 and 13: {top}\nAll arms, and each run: {folder}")


if __name__ == "__main__":
    run.run(main)
