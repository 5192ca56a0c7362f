"""Teleporting within SGD, AdaGrad, momentum, RMSprop and Adam: Figures 5 and 13, with controls.

    python teleport_optimization.py                          # MNIST, all optimizers
    python teleport_optimization.py --sample                 # the same on the shipped sample
    python teleport_optimization.py --optimizer AdaGrad --dataset CIFAR10

Before each of the first mini-batches of one epoch the weights are teleported to a larger gradient.
The published code also builds a new optimizer there, which empties its state. So there are arms:

    plain       no teleports
    teleport    as published: teleports, each followed by a new optimizer
    reset       a new optimizer at the same moments, no teleports
    kept        teleports that keep the optimizer's state
    random      moves as long as the teleports', in a random direction of the orbit; new optimizer

An optimizer's runs of all arms train side by side as two stacks, one that keeps its state and one
that rebuilds it. Training goes to logs/optimization/; an interrupted run goes on from there. The
curves of each arm and run are in figures/optimization/<dataset>_<optimizer>.npz.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

from experiment import files, launch, plots, statistics

import numpy as np
import torch
from matplotlib.figure import Figure

import models
from data import TITLES, load_data, shuffled_batch
from teleportation import act, loss_and_gradient_norm_squared, random_group_elements, teleport

# Settings


class Experiment(NamedTuple):
    """An optimizer, and when and how far it teleports."""

    optimizer: Callable  # of the parameters
    epoch: int  # index of the epoch that begins with teleports
    lr: float  # of the ascent on T


EXPERIMENTS = {
    "SGD": Experiment(lambda p: torch.optim.SGD(p, lr=1e-2), 2, 1e-4),
    "AdaGrad": Experiment(lambda p: torch.optim.Adagrad(p, lr=1e-2, fused=True), 2, 1e-4),
    "momentum": Experiment(lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9), 0, 5e-2),
    "RMSprop": Experiment(lambda p: torch.optim.RMSprop(p, lr=1e-4), 0, 5e-2),
    "Adam": Experiment(lambda p: torch.optim.Adam(p, lr=1e-4, fused=True), 0, 5e-2),
}
TELEPORTS = 8  # before so many mini-batches, the first of the epoch
ACTIVATION = models.LeakyReLU()
STEPS = 10  # of ascent in each teleport
CAP = 100.0  # a teleport stops where |∇L|² is larger
TELEPORT_BATCH = 200  # training images, drawn anew for each teleport
DEFAULTS = {"runs": 20, "epochs": 40}  # published: 5 runs of the arms plain and teleport

# the arms of each stack: one keeps the optimizer's state, the other rebuilds it at every move
STACKS = {"kept": ("plain", "kept"), "rebuilt": ("teleport", "reset", "random")}
ARMS = [arm for arms in STACKS.values() for arm in arms]
PAIRS = [(arm, "plain") for arm in ARMS[1:]] + [("teleport", "reset")]
CURVES = ("train_loss", "test_loss", "test_accuracy")
EPOCHS_SHOWN = (5, 10, 40)  # in the table
COLOURS = dict(zip(ARMS, (plots.BLACK, plots.GREEN, plots.BLUE, plots.ORANGE, plots.GREY)))


# Computation


@torch.no_grad()
def move(weights, arms, data, k, lr):
    """Give each arm of a stack its k-th move along the orbit, in place.

    weights: [arms, runs, d_{m+1}, d_m]. Returns for each arm loss and |∇L|² before the move and
    after it, on the teleport's batch: [arms, 4, runs]; and the seconds of the moves: [arms].
    """
    x, y = shuffled_batch(data, TELEPORT_BATCH, k)
    group_elements, measured, seconds = None, [], []
    for i, arm in enumerate(arms):
        new = own = [w[i].clone() for w in weights]
        start = time.perf_counter()
        if arm in ("teleport", "kept"):
            new, path = teleport(own, x, y, lr, STEPS, ACTIVATION, CAP, return_path=True)
            group_elements = path["group_elements"]
        elif arm == "random":
            rng = torch.Generator().manual_seed(models.SEED + k)
            new = act(own, x, random_group_elements(group_elements, rng), ACTIVATION)
        seconds.append(time.perf_counter() - start)
        for w, moved in zip(weights, new):
            w[i] = moved
        before, after = (loss_and_gradient_norm_squared(w, x, y, ACTIVATION) for w in (own, new))
        measured.append(torch.stack([*before, *after]))
    return torch.stack(measured), torch.tensor(seconds)


def train_stack(data, experiment, stack, runs, epochs, path, settings, bar):
    """Train the arms of a stack with an optimizer; resume from `path`.

    Returns the arrays saved there: the CURVES [epochs, arms, runs]; seconds [epochs] of training,
    without the moves; `moves` [TELEPORTS, arms, 4, runs] and move_seconds [arms], of all moves of
    an arm, as `move` measures them; the weights and the optimizer's state. Raises UserError where
    a loss is not finite or a teleport meets a matrix that it can't invert.
    """
    arms, device = STACKS[stack], data.x_train.device

    def start():
        weights = models.init_weights(
            models.TRAINING[data.name].widths, models.run_seeds(range(runs))
        )
        return models.to_arrays(w.expand(len(arms), *w.shape) for w in weights)

    def step(state):
        epoch, begin = int(state["steps"]), time.perf_counter()
        model = models.MLP(models.from_arrays(state, device), ACTIVATION)
        optimizer = experiment.optimizer(model.parameters())
        models.optimizer_from_arrays(optimizer, state)

        def train_rows(rows):
            return models.train_epoch(model, data.x_train[rows], data.y_train[rows], optimizer)

        def move_all(k):
            nonlocal optimizer
            moved = move(model.weights, arms, data, k, experiment.lr)
            if stack == "rebuilt":
                optimizer = experiment.optimizer(model.parameters())
            return moved

        moves = TELEPORTS if epoch == experiment.epoch else 0
        try:
            loss, moved = models.epoch_with_moves(len(data.x_train), moves, move_all, train_rows)
        except (FloatingPointError, ValueError) as error:
            raise files.UserError(f"{path.stem}, epoch {epoch}: {error}.") from None
        seconds = time.perf_counter() - begin
        if moves:
            state["moves"], move_seconds = (torch.stack(column) for column in zip(*moved))
            state["move_seconds"] = move_seconds.sum(0)
            seconds -= float(move_seconds.sum())
        test = models.evaluate(list(model.weights), data.x_test, data.y_test, ACTIVATION)
        state = files.appended(state, seconds=seconds, **dict(zip(CURVES, (loss, *test))))
        return state | models.to_arrays(model.weights) | models.optimizer_to_arrays(optimizer)

    return files.resume(path, settings, start, step, epochs, bar)


def log(optimizer, stack, args):
    """Return the path of a stack's training in logs/ and the settings that it is made with."""
    experiment = EXPERIMENTS[optimizer]
    like = experiment.optimizer([torch.zeros(1, requires_grad=True)])
    settings = dict(dataset=args.dataset, sample=args.sample, stack=stack, runs=args.runs)
    settings |= dict(epochs=args.epochs, device=args.device.type, seed=models.SEED)
    settings |= dict(activation=str(ACTIVATION))
    settings |= dict(
        widths=models.TRAINING[args.dataset].widths,
        batch=models.BATCH,
        optimizer=[optimizer, type(like).__name__, like.defaults],
        teleport=[experiment.epoch, experiment.lr, TELEPORTS, STEPS, CAP, TELEPORT_BATCH],
    )
    folder = args.output / "logs" / "optimization"
    folder /= f"{args.dataset}{'-sample' * args.sample}-{args.epochs}epochs-{args.runs}runs"
    return folder / f"{optimizer}-{stack}.npz", settings


def compute(args):
    """Do this rank's share of what logs/ lacks; the unit is a stack with an optimizer."""
    data = load_data(args.dataset, args)
    units = [(optimizer, stack) for optimizer in args.optimizer for stack in STACKS]
    for optimizer, stack in launch.share_of_rank(units):
        experiment, (path, settings) = EXPERIMENTS[optimizer], log(optimizer, stack, args)
        desc = f"{TITLES[args.dataset]}, {optimizer}, {stack}"
        with launch.progress_bar(args.epochs, "epoch", desc) as bar:
            train_stack(data, experiment, stack, args.runs, args.epochs, path, settings, bar)


def collect(part, args):
    """Return an optimizer's results over all ARMS, their settings and the log they are from.

    They are the CURVES [epochs, arms, runs], moves [TELEPORTS, arms, 4, runs], move_seconds [arms],
    and seconds [epochs, arms], at which an arm's runs, trained as one stack, end each epoch.
    """
    optimizer = part.split("_")[1]
    logs = [log(optimizer, stack, args) for stack in STACKS]
    states = [files.load_steps(*entry, args.epochs) for entry in logs]
    results = {
        key: np.concatenate([state[key] for state in states], axis=1) for key in (*CURVES, "moves")
    }
    results["move_seconds"] = np.concatenate([state["move_seconds"] for state in states])
    # all arms together take so long: each has an equal share, and its own moves' seconds
    training = sum(state["seconds"] for state in states).cumsum()[:, None] / len(ARMS)
    moved = np.arange(args.epochs)[:, None] >= EXPERIMENTS[optimizer].epoch
    results["seconds"] = training + moved * results["move_seconds"]
    path, settings = logs[0]
    return settings, {"arms": ARMS} | results, path


# Statistics


def reach(test_loss, seconds, target):
    """Return when runs first have a test loss of `target` [runs] or less.

    test_loss: [epochs, runs], seconds: [epochs]. Counts the runs that do, and gives the median over
    them of the epochs and the seconds until then.
    """
    reached = test_loss <= target
    epochs = 1 + reached.argmax(0)[reached.any(0)]
    if not len(epochs):
        return {"runs": 0, "epochs": None, "seconds": None}
    return {
        "runs": len(epochs),
        "epochs": np.median(epochs),
        "seconds": np.median(seconds[epochs - 1]).round(1),
    }


def summarise(_, results):
    """Return what summary.json says of an optimizer.

    That is plain's mean test loss at the epochs EPOCHS_SHOWN, the paired differences of the arms in
    PAIRS, and for each arm when it reaches plain's final test loss, and what its moves do and cost.
    """
    loss = {arm: results["test_loss"][:, i] for i, arm in enumerate(ARMS)}
    epochs = sorted({min(epoch, len(loss["plain"])) for epoch in EPOCHS_SHOWN})
    arms = {}
    for i, arm in enumerate(ARMS):
        before_loss, before_norm, after_loss, after_norm = results["moves"][:, i].swapaxes(0, 1)
        arms[arm] = {
            "reaches": reach(loss[arm], results["seconds"][:, i], loss["plain"][-1]),
            "seconds_of_moves": results["move_seconds"][i],
            "mean_change_of_loss": (after_loss - before_loss).mean(),
            "mean_growth_of_gradient_norm_squared": (after_norm / before_norm).mean(),
        }
    plain = {epoch: loss["plain"][epoch - 1].mean(dtype=float) for epoch in epochs}
    differences = statistics.compare_arms(loss, PAIRS, epochs)
    return {"plain": plain, "differences": differences, "arms": arms}


def title(part):
    """Return the dataset and the optimizer of a part as text."""
    dataset, optimizer = part.split("_")
    return f"{TITLES[dataset]}, {optimizer}"


def table(summaries):
    """Return the test losses and their differences, and what the moves cost, as Markdown."""
    tables, rows = [], []
    for part, summary in summaries.items():
        tables.append(plots.difference_table(title(part), summary["plain"], summary["differences"]))
        for arm, entry in summary["arms"].items():
            reached = [str(value) for value in entry["reaches"].values()]
            growth = f"{100 * (entry['mean_growth_of_gradient_norm_squared'] - 1):+.1f} %"
            change = f"{1e3 * entry['mean_change_of_loss']:+.2f}"
            moves = [f"{entry['seconds_of_moves']:.2f}", change, growth]
            rows.append([title(part), arm, *reached, *(cell.replace("-", "−") for cell in moves)])
    header = ["reaching plain's final test loss", "arm", "runs", "epochs", "s"]
    header += ["all moves, s", "change of loss in a move, 10⁻³", "growth of the gradient norm²"]
    return "\n".join([*tables, plots.markdown(header, rows)])


# Figures


def draw_losses(results, against, title, path):
    """Draw Figure 5 (against epochs) or 13 (against seconds): training dashed, test solid."""
    axes = Figure(figsize=(4.2, 3.2)).add_subplot(title=title, ylabel="loss")
    plots.plain_log_axis(axes, "y")
    for arm in ("plain", "teleport"):
        i, colour = ARMS.index(arm), COLOURS[arm]
        x = (
            results["seconds"][:, i]
            if against == "time"
            else 1 + np.arange(len(results["seconds"]))
        )
        label = "with teleport" if arm == "teleport" else "without teleport"
        plots.plot_mean(
            axes, x, results["train_loss"][:, i], color=colour, ls="--", label=f"{label}, train"
        )
        plots.plot_mean(axes, x, results["test_loss"][:, i], color=colour, label=f"{label}, test")
    axes.set_xlabel("epoch" if against == "epoch" else "time (s)")
    plots.legend_beside(axes)
    plots.save_figure(axes.figure, path)


def draw_moves(results, title, path):
    """Draw |∇L|² and the loss on each teleport's batch before and after it, means over runs."""
    figure = Figure(figsize=(8.4, 3.2))
    for axes, quantity, label in zip(figure.subplots(1, 2), (1, 0), (r"$|\nabla L|^2$", "loss")):
        for arm in ("teleport", "kept", "random"):
            values = results["moves"][:, ARMS.index(arm)].mean(-1)  # [teleports, 4]
            # each teleport is a line from before to after; the batch and SGD's step lie between
            for k, (before, after) in enumerate(values[:, [quantity, quantity + 2]]):
                label_once = {"label": arm} if k == 0 else {}
                axes.plot([k + 1, k + 1.6], [before, after], ".-", color=COLOURS[arm], **label_once)
        axes.set(xlabel="teleport, before and after", ylabel=label, title=title)
        axes.set_xticks(range(1, TELEPORTS + 1))
        if quantity == 1:
            plots.plain_log_axis(axes, "y")
    plots.legend_beside(axes)
    figure.tight_layout()
    plots.save_figure(figure, path)


def draw(part, results, _, folder):
    """Draw an optimizer's figures."""
    for against in ("epoch", "time"):
        draw_losses(results, against, title(part), folder / f"{part}_loss_vs_{against}")
    loss = {arm: results["test_loss"][:, i] for i, arm in enumerate(ARMS)}
    arms = {arm: (COLOURS[arm], None, loss[arm]) for arm in ARMS}
    epochs = 1 + np.arange(len(results["seconds"]))
    plots.draw_arms(folder / f"{part}_arms", title(part), epochs, arms, loss["plain"])
    draw_moves(results, title(part), folder / f"{part}_teleports")


# Options


def parse_arguments():
    parser = launch.experiment_parser(__doc__)
    add, names, at_least = parser.add_argument, list(EXPERIMENTS), launch.at_least
    add("--dataset", choices=models.TRAINING, default="MNIST", help="which dataset")
    add("--optimizer", nargs="+", choices=names, default=names, help="which optimizers")
    add("--runs", type=at_least(2), default=DEFAULTS["runs"], help="runs of each arm; published: 5")
    add("--epochs", type=at_least(3), default=DEFAULTS["epochs"], help="passes over the images")
    return parser.parse_args()


def main():
    args = parse_arguments()
    folder = launch.figures_folder(args, "optimization", DEFAULTS)
    parts = [f"{dataset}_{optimizer}" for dataset in models.TRAINING for optimizer in EXPERIMENTS]
    asked = [f"{args.dataset}_{optimizer}" for optimizer in args.optimizer]
    launch.compute_and_report(args, folder, parts, asked, compute, collect, summarise, table, draw)


if __name__ == "__main__":
    launch.run(main)
