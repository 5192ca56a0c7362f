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
that rebuilds it. Results go to logs/optimization/; an interrupted run goes on from there.
"""

import json
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

from data import load_data, shuffled_batch
from init_directory import (
    UserError,
    at_least,
    compute_and_report,
    experiment_parser,
    figures_folder,
    interval_text,
    load,
    load_finished,
    losses_after,
    markdown,
    measure_all,
    mine,
    plot_band,
    plot_difference,
    progress,
    provenance,
    run,
    save,
    save_figure,
    save_text,
)
from models import MLP, LeakyReLU, evaluate, init_weights, split_epoch, train_epoch
from teleportation import act, loss_and_gradient_norm_squared, random_group_elements, teleport

WIDTHS = {
    "MNIST": (784, 16, 10, 10),
    "FashionMNIST": (784, 16, 10, 10),
    "CIFAR10": (3072, 128, 32, 10),
}


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
STEPS = 10  # of ascent in each teleport
CAP = 100.0  # a teleport stops where |∇L|² is larger
TELEPORT_BATCH = 200  # training images, drawn anew for each teleport
BATCH = 20
DEFAULTS = {"runs": 20, "epochs": 40}  # published: 5 runs of the arms plain and teleport
SEED = 54321  # run i has the seed (i + 1) * SEED

# the arms of each stack: one keeps the optimizer's state, the other rebuilds it at every move
STACKS = {"kept": ("plain", "kept"), "rebuilt": ("teleport", "reset", "random")}
ARMS = [arm for arms in STACKS.values() for arm in arms]
CURVES = ("train_loss", "test_loss", "test_accuracy")
EPOCHS_SHOWN = (5, 10, 40)  # in the table
COLOURS = {"plain": "black", "teleport": "C0", "reset": "C1", "kept": "C2", "random": "C3"}


@torch.no_grad()
def move(weights, arms, data, k, lr):
    """Give each arm of a stack its k-th move along the orbit, in place.

    weights: [arms, runs, d_{m+1}, d_m]. Returns for each arm loss and |∇L|² before the move and
    after it, on the teleport's batch: [arms, 4, runs]; and the seconds of the moves: [arms].
    """
    x, y = shuffled_batch(data, TELEPORT_BATCH, k)
    activation, group_elements = LeakyReLU(), None
    measured, seconds = [], []
    for i, arm in enumerate(arms):
        new = own = [w[i].clone() for w in weights]
        start = time.perf_counter()
        if arm in ("teleport", "kept"):
            new, path = teleport(own, x, y, lr, STEPS, activation, CAP, return_path=True)
            group_elements = path["group_elements"]
        elif arm == "random":
            generator = torch.Generator().manual_seed(SEED + k)
            new = act(own, x, random_group_elements(group_elements, generator), activation)
        seconds.append(time.perf_counter() - start)
        for w, moved in zip(weights, new):
            w[i] = moved
        before, after = (loss_and_gradient_norm_squared(w, x, y, activation) for w in (own, new))
        measured.append(torch.stack([*before, *after]))
    return torch.stack(measured), torch.tensor(seconds)


def train_epoch_with_moves(model, arms, data, experiment, optimizer, rebuild):
    """Train as train_epoch does, with a move before each of the first mini-batches.

    Returns the mean training loss [arms, runs], the optimizer, what `move` measured:
    [TELEPORTS, arms, 4, runs], and the moves' seconds: [arms].
    """
    x, y = data.x_train, data.y_train
    loss, count, moves = 0, 0, []
    for k, (rows, batches) in enumerate(split_epoch(len(x), TELEPORTS, BATCH)):
        if k < TELEPORTS:
            moves.append(move(model.weights, arms, data, k, experiment.lr))
            if rebuild:
                optimizer = experiment.optimizer(model.parameters())
        loss = loss + batches * train_epoch(model, x[rows], y[rows], optimizer, BATCH)
        count += batches
    measured, seconds = (torch.stack(column) for column in zip(*moves))
    return loss / count, optimizer, measured, seconds.sum(0)


def state_arrays(optimizer):
    """Return an optimizer's state as {name: array}."""
    return {
        f"state {i} {key}": value.cpu()
        for i, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
        if torch.is_tensor(value)
    }


def restore(optimizer, arrays):
    """Give an optimizer the state that `state_arrays` returned."""
    state = {}
    for name, value in arrays.items():
        if name.startswith("state "):
            _, i, key = name.split()
            state.setdefault(int(i), {})[key] = torch.tensor(value)
    if state:
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def train_stack(data, experiment, stack, runs, epochs, path, settings, bar):
    """Train the arms of a stack with an optimizer; resume from `path`.

    Returns the arrays saved there: train_loss, test_loss, test_accuracy [epochs, arms, runs];
    seconds [epochs] of training, without the moves; `moves` [TELEPORTS, arms, 4, runs] and
    move_seconds [arms] as train_epoch_with_moves gives them; and what a resumed run needs, the
    weights and the optimizer's state. Raises UserError where a loss is not finite or a teleport
    meets a matrix that it can't invert.
    """
    activation, device, arms = LeakyReLU(), data.x_train.device, STACKS[stack]
    widths = WIDTHS[data.name]
    state = load(path, settings)
    if state is None:
        weights = init_weights(widths, [(i + 1) * SEED for i in range(runs)])
        weights = [w.expand(len(arms), *w.shape).clone() for w in weights]
        none = np.empty((0, len(arms), runs), np.float32)
        state = {"seconds": np.empty(0), **dict.fromkeys(CURVES, none)}
    else:
        weights = [torch.tensor(state[f"W{m}"]) for m in range(len(widths) - 1)]
    model = MLP([w.to(device) for w in weights], activation)
    optimizer = experiment.optimizer(model.parameters())
    restore(optimizer, state)
    bar.update(len(state["seconds"]))
    for epoch in range(len(state["seconds"]), epochs):
        start = time.perf_counter()
        try:
            if epoch == experiment.epoch:
                loss, optimizer, moves, seconds = train_epoch_with_moves(
                    model, arms, data, experiment, optimizer, rebuild=stack == "rebuilt"
                )
                state |= {"moves": moves.cpu(), "move_seconds": seconds}
                start += float(seconds.sum())
            else:
                loss = train_epoch(model, data.x_train, data.y_train, optimizer, BATCH)
        except (FloatingPointError, ValueError) as error:
            raise UserError(f"{path.stem}, epoch {epoch}: {error}.") from None
        state["seconds"] = np.append(state["seconds"], time.perf_counter() - start)
        test = evaluate(list(model.weights), data.x_test, data.y_test, activation)
        for curve, value in zip(CURVES, (loss, *test)):
            state[curve] = np.concatenate([state[curve], value[None].detach().cpu()])
        state |= {f"W{m}": w.detach().cpu() for m, w in enumerate(model.weights)}
        state |= state_arrays(optimizer)
        save(path, settings, **state)
        bar.update()
    return state


def place(optimizer, stack, args):
    """Return the path of a stack's results in logs/ and the settings that they are made with."""
    experiment = EXPERIMENTS[optimizer]
    like = experiment.optimizer([torch.zeros(1, requires_grad=True)])
    folder = args.output / "logs" / "optimization"
    folder /= f"{args.dataset}{'-sample' * args.sample}-{args.epochs}epochs-{args.runs}runs"
    settings = {
        "dataset": args.dataset,
        "sample": args.sample,
        "widths": WIDTHS[args.dataset],
        "optimizer": [optimizer, type(like).__name__, like.defaults],
        "teleport": [experiment.epoch, experiment.lr, TELEPORTS, STEPS, CAP, TELEPORT_BATCH],
        "seed": SEED,
        "batch": BATCH,
        "epochs": args.epochs,
        "runs": args.runs,
        "device": args.device.type,
        "stack": stack,
    }
    return folder / f"{optimizer}-{stack}.npz", settings


def compute(args):
    """Do this rank's share of what logs/ lacks; the unit is a stack with an optimizer."""
    data = load_data(args.dataset, args)
    for optimizer, stack in mine([(name, stack) for name in args.optimizer for stack in STACKS]):
        experiment, (path, settings) = EXPERIMENTS[optimizer], place(optimizer, stack, args)
        desc = f"{args.dataset}: {optimizer}, {stack}"
        with progress(total=args.epochs, unit="epoch", desc=desc) as bar:
            train_stack(data, experiment, stack, args.runs, args.epochs, path, settings, bar)


def measure(optimizer, args):
    """Return an optimizer's results over all ARMS, from logs/.

    Those are train_loss, test_loss, test_accuracy [epochs, arms, runs], seconds [epochs, arms],
    after which an arm's runs, trained as one stack, end each epoch, and moves
    [TELEPORTS, arms, 4, runs]. Raises UserError where results are missing.
    """
    states = [
        load_finished(*place(optimizer, stack, args), lambda s: len(s["seconds"]) >= args.epochs)
        for stack in STACKS
    ]
    result = {
        key: np.concatenate([state[key] for state in states], axis=1) for key in (*CURVES, "moves")
    }
    # all arms together take so long: each has an equal share, and its own moves' seconds
    training = sum(state["seconds"] for state in states).cumsum()[:, None] / len(ARMS)
    result["move_seconds"] = np.concatenate([state["move_seconds"] for state in states])
    moved = np.arange(args.epochs)[:, None] >= EXPERIMENTS[optimizer].epoch
    return result | {"seconds": training + moved * result["move_seconds"]}


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
        "epochs": float(np.median(epochs)),
        "seconds": round(float(np.median(seconds[epochs - 1])), 2),
    }


def summarise(result):
    """Return what summary.json says of an optimizer, for each arm.

    That is its mean test loss at the epochs EPOCHS_SHOWN with the paired differences to plain and
    to reset over runs, when it reaches plain's final test loss, and the cost of its moves.
    """
    loss = {arm: result["test_loss"][:, i] for i, arm in enumerate(ARMS)}
    epochs = sorted({min(epoch, len(loss["plain"])) for epoch in EPOCHS_SHOWN})
    references = {arm: loss[arm] for arm in ("plain", "reset")}
    summary = {}
    for i, arm in enumerate(ARMS):
        before_loss, before_norm, after_loss, after_norm = result["moves"][:, i].swapaxes(0, 1)
        summary[arm] = {
            "after_epoch": losses_after(epochs, loss[arm], references),
            "reaches_plains_final_loss": reach(
                loss[arm], result["seconds"][:, i], loss["plain"][-1]
            ),
            "seconds_of_moves": round(float(result["move_seconds"][i]), 3),
            "moves_mean_change_of_loss": float((after_loss - before_loss).mean()),
            "moves_mean_growth_of_gradient_norm_squared": float((after_norm / before_norm).mean()),
        }
    return summary


def draw_losses(result, against, title, path):
    """Draw Figure 5 (against epochs) or 13 (against seconds): training dashed, test solid."""
    axes = Figure(figsize=(4.2, 3.2)).add_subplot(title=title, ylabel="loss", yscale="log")
    for arm in ("plain", "teleport"):
        i, colour = ARMS.index(arm), COLOURS[arm]
        x = result["seconds"][:, i] if against == "time" else 1 + np.arange(len(result["seconds"]))
        label = "with teleport" if arm == "teleport" else "without teleport"
        plot_band(
            axes, x, result["train_loss"][:, i], color=colour, ls="--", label=f"{label}, train"
        )
        plot_band(axes, x, result["test_loss"][:, i], color=colour, label=f"{label}, test")
    axes.set_xlabel("epoch" if against == "epoch" else "time (s)")
    axes.legend(fontsize="small")
    save_figure(axes.figure, path)


def draw_arms(result, title, path):
    """Draw the test loss of all arms, and how far it is from plain's, paired over runs."""
    figure = Figure(figsize=(8.4, 3.2))
    losses, differences = figure.subplots(1, 2)
    epochs = 1 + np.arange(len(result["test_loss"]))
    plain = result["test_loss"][:, ARMS.index("plain")]
    for i, arm in enumerate(ARMS):
        loss = result["test_loss"][:, i]
        losses.plot(epochs, loss.mean(1), color=COLOURS[arm], label=arm)
        plot_difference(differences, epochs, loss, plain, color=COLOURS[arm])
    losses.set(title=title, xlabel="epoch", ylabel="test loss", yscale="log")
    differences.set(title="difference to plain, 95 % interval", xlabel="epoch")
    losses.legend(fontsize="small")
    figure.tight_layout()
    save_figure(figure, path)


def draw_moves(result, title, path):
    """Draw |∇L|² and the loss on each teleport's batch before and after it, means over runs."""
    figure = Figure(figsize=(8.4, 3.2))
    for axes, quantity, label in zip(figure.subplots(1, 2), (1, 0), (r"$|\nabla L|^2$", "loss")):
        for arm in ("teleport", "kept", "random"):
            values = result["moves"][:, ARMS.index(arm)].mean(-1)  # [teleports, 4]
            # each teleport is a line from before to after; the batch and SGD's step lie between
            for k, (before, after) in enumerate(values[:, [quantity, quantity + 2]]):
                label_once = {"label": arm} if k == 0 else {}
                axes.plot([k + 1, k + 1.6], [before, after], ".-", color=COLOURS[arm], **label_once)
        axes.set(xlabel="teleport, before and after", ylabel=label, title=title)
        axes.set_xticks(range(1, TELEPORTS + 1))
        axes.set_yscale("log" if quantity == 1 else "linear")
    axes.legend(fontsize="small")
    figure.tight_layout()
    save_figure(figure, path)


def table(summary):
    """Return the test losses and their paired differences as Markdown."""
    epochs = list(next(iter(summary.values()))["plain"]["after_epoch"])
    header, rows = ["optimizer", "arm"], []
    for epoch in epochs:
        header += [f"test loss, epoch {epoch}", "− plain", "− reset"]
    header += ["reaches plain's final loss: runs, epochs, s", "moves, s"]
    for optimizer, arms in summary.items():
        for arm in ARMS:
            entry = arms[arm]
            cells = [optimizer, arm]
            for at in entry["after_epoch"].values():
                cells += [f"{at['test_loss']:.4f}"]
                cells += [interval_text(at[key]) for key in ("minus_plain", "minus_reset")]
            reached = entry["reaches_plains_final_loss"]
            cells += [f"{reached['runs']}, {reached['epochs']}, {reached['seconds']}"]
            cells += [f"{entry['seconds_of_moves']:.2f}"]
            rows.append(cells)
    return markdown(header, rows)


def report(args):
    """Draw and print what logs/ has of the optimizers asked for, and print that of the others."""
    folder = figures_folder(args, "optimization", DEFAULTS)
    results = measure_all(EXPERIMENTS, args.optimizer, lambda name: measure(name, args))
    summary = {}
    for optimizer, result in results.items():
        made = {"made_with": provenance(place(optimizer, "kept", args)[0])}
        summary[optimizer] = summarise(result) | made
    for optimizer in args.optimizer:
        result = results[optimizer]
        title, path = f"{args.dataset}, {optimizer}", folder / f"{args.dataset}_{optimizer}"
        for against in ("epoch", "time"):
            draw_losses(result, against, title, f"{path}_loss_vs_{against}")
        draw_arms(result, title, f"{path}_arms")
        draw_moves(result, title, f"{path}_teleports")
    about = {"dataset": args.dataset, "runs": args.runs, "epochs": args.epochs}
    text = json.dumps(about | {"optimizers": summary}, indent=1)
    save_text(folder / f"{args.dataset}_summary.json", text + "\n")
    save_text(folder / f"{args.dataset}_table.md", table(summary))
    print(f"\n{table(summary)}\nFigures, summary and table are in {folder}")


def parse_arguments():
    parser = experiment_parser(__doc__)
    add, names = parser.add_argument, list(EXPERIMENTS)
    add("--dataset", choices=WIDTHS, default="MNIST", help="which data")
    add("--optimizer", nargs="+", choices=names, default=names, help="which optimizers")
    add("--runs", type=at_least(2), default=DEFAULTS["runs"], help="runs of each arm; published: 5")
    add("--epochs", type=at_least(3), default=DEFAULTS["epochs"], help="passes over the images")
    return parser.parse_args()


def main():
    compute_and_report(parse_arguments(), compute, report)


if __name__ == "__main__":
    run(main)
