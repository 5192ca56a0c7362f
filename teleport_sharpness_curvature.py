"""Teleporting to another sharpness or curvature, and what it does to the test loss: Figure 4.

    python teleport_sharpness_curvature.py                     # CIFAR-10, as published
    python teleport_sharpness_curvature.py --dataset MNIST     # its twins
    python teleport_sharpness_curvature.py --sample            # on the shipped sample

Networks train by SGD. At the start of epoch index 20 they are teleported, once before each of the
first mini-batches, and go on with SGD. The arms, all runs of which train as one stack:

    plain                                       SGD alone
    sharpness decrease, sharpness increase      teleports on the mean perturbed loss
    curvature decrease, curvature increase      teleports on κ along exp(tM), M random
    random, random in one pair                  moves as long as those of sharpness decrease and of
                                                curvature increase, in random directions
    refit                                       the pseudoinverse action with g = I alone

Runs differ in their initial weights, and share the teleports' batches and draws. A network that
runs away has diverged: it is left out, and counted. Results go to
logs/generalization/; an interrupted run goes on from there and ends with the same numbers.
"""

import json
import math
import time
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

from data import TITLES, load_data, shuffled_batch
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
from models import LeakyReLU, cross_entropy, evaluate, init_weights, split_epoch, train_epoch_sgd
from teleportation import (
    RADII,
    act,
    curvature_along,
    estimate,
    random_directions,
    random_group_elements,
    sharpness,
    teleport_curvature,
    teleport_sharpness,
)


class Teleports(NamedTuple):
    """How an arm teleports: how often, in how many steps, how far, and in which direction."""

    number: int  # before so many mini-batches
    steps: int
    lr: float  # on T (sharpness) or t (curvature); negative to decrease
    stop: float = math.inf  # a network stays where it is while the published objective is above


class Experiment(NamedTuple):
    """A dataset's networks and teleports."""

    widths: tuple
    lr: float  # SGD's learning rate
    teleports: dict
    longest: float  # |tM|_F of a step in curvature, at the most
    directions: int = 100  # for each radius, of the perturbations that teleports are made with


def teleports(sharpness_down, sharpness_up, curvature_down, curvature_up, ups=5):
    """Return the arms' Teleports with these learning rates."""
    return {
        # published: 2.0 either way, where two in five networks on CIFAR-10 would not begin
        "sharpness decrease": Teleports(10, 10, -sharpness_down, stop=4.0),
        "sharpness increase": Teleports(2, 10, sharpness_up, stop=2.0),
        "curvature decrease": Teleports(5, 1, -curvature_down),
        "curvature increase": Teleports(ups, 1, curvature_up),
    }


# longest: CIFAR-10 has no such step; elsewhere dκ/dt is 10 and more, and exp(tM) leaves float32
EXPERIMENTS = {
    "CIFAR10": Experiment(
        (3072, 32, 10, 10), 2e-2, teleports(5e-2, 5e-2, 5e-2, 2e-1, ups=10), longest=5.0
    ),
    "MNIST": Experiment((784, 16, 10, 10), 1e-2, teleports(5e-2, 5e-2, 5e-2, 2e-1), longest=1.0),
    "FashionMNIST": Experiment(
        (784, 16, 10, 10), 1e-2, teleports(3e-1, 1e-1, 3e-3, 5e-3), longest=1.0
    ),
}
RUNS = 5
# on the sample, whose networks are far from a minimum: a tenth of rates, lengths and directions
SAMPLE_SCALE = 0.1
EPOCHS, TELEPORT_EPOCH = 40, 20  # the index of the epoch that begins with teleports
MOVES = 10  # mini-batches before which some arm is teleported
BATCH, TELEPORT_BATCH = 20, 2000
TELEPORT_RADII = np.arange(1, 10) / 10  # of the perturbations in the objective of teleports
PUBLISHED_SCALE = 0.9  # the published objective is the sum of the 900 losses over 1,000: 0.9 φ
LONGEST_T = 10.0  # |T|_F of a step in sharpness: where SGD runs away, steps outgrow float32
LARGEST = 1e6  # weight of a network that has not diverged
MEASURED_DIRECTIONS = 10  # for each radius, in what the log says of each teleport
PAIR = 1  # the pair of layers that curvature teleports act on: the second
SEED = 54321  # run i has the seed (i + 1) * SEED
ESTIMATION_BATCHES, ESTIMATION_BATCH = 20, 200  # of φ and ψ along training

CLAIMS = {  # of the paper: how the test loss changes
    "sharpness decrease": "changes little",
    "sharpness increase": "rises",
    "curvature decrease": "rises",
    "curvature increase": "falls",
}
LITTLE = 0.01  # of plain's final test loss
CONTROLS = {"sharpness decrease": "random", "curvature increase": "random in one pair"}
ARMS = ("plain", *CLAIMS, "random", "random in one pair", "refit")
COLOURS = dict(zip(ARMS, ("black", "C0", "C3", "C4", "C1", "C7", "C8", "C5")))
CURVES = ("train_loss", "test_loss", "test_accuracy", "sharpness", "curvature")
QUANTITIES = ("loss", "φ", "κ")
EPOCHS_SHOWN = (21, 25, 40)


def measured(weights, x, y, generator, k):
    """Return loss, φ and κ of each network, [3, ...], on a batch, for the log of the k-th move.

    Before a move and after it they are measured with the same draws.
    """
    activation = LeakyReLU()
    widths = [len(x), *(w.shape[-2] for w in weights)]
    draws = torch.Generator().manual_seed(SEED + k)
    directions = random_directions(widths, np.repeat(TELEPORT_RADII, MEASURED_DIRECTIONS), draws)
    phi = sharpness(weights, x, y, [d.to(x) for d in directions], activation)
    kappa, _ = curvature_along(weights, x, generator, PAIR, activation)
    return torch.stack([cross_entropy(weights, x, y, activation), phi, kappa])


def teleport_pair(weights, x, y, experiment, quantity, k, generator):
    """Move both arms of a quantity, as one stack where both move at the k-th mini-batch.

    Returns {arm: (weights, group elements of the pairs acted on)} for those that move.
    """
    activation = LeakyReLU()
    arms = [a for a in CLAIMS if a.startswith(quantity) and k < experiment.teleports[a].number]
    if not arms:
        return {}
    settings = [experiment.teleports[arm] for arm in arms]
    stack = [torch.stack([w[ARMS.index(arm)] for arm in arms]) for w in weights]
    lr = torch.tensor([s.lr for s in settings])[:, None].to(x)
    if quantity == "sharpness":
        stop = torch.tensor([s.stop for s in settings])[:, None].to(x) / PUBLISHED_SCALE
        lr = lr * PUBLISHED_SCALE
        draws = settings[0].steps, TELEPORT_RADII, experiment.directions, k
        new, path = teleport_sharpness(
            stack, x, y, lr, *draws, activation, stop, LONGEST_T, return_path=True
        )
        elements = path["group_elements"]
    else:
        new, g = teleport_curvature(stack, x, lr, [generator], activation, PAIR, experiment.longest)
        elements = [g]
    return {arm: ([w[i] for w in new], [g[i] for g in elements]) for i, arm in enumerate(arms)}


def set_aside(weights, diverged):
    """Mark networks with a weight above LARGEST in diverged: [arms, runs], in place.

    They get plain's weights, so that computations go on; what is measured of them is left out.
    Raises ValueError where plain's own diverge.
    """
    for w in weights:
        diverged |= ~(w.abs() < LARGEST).all(-1).all(-1)  # written so that nan counts, too
    if diverged[0].any():
        runs = diverged[0].nonzero().flatten().tolist()
        raise ValueError(f"plain SGD's networks {runs} diverge: it needs a lower lr")
    for w in weights:
        w.copy_(torch.where(diverged[..., None, None], w[:1], w))


@torch.no_grad()
def move(weights, data, experiment, k, diverged):
    """Give each arm its k-th move, in place; weights: [arms, runs, d_{m+1}, d_m].

    Returns loss, φ and κ before and after it on the teleport's batch and on a fresh one,
    [arms, 2 batches, 2, 3, runs], and the seconds of the moves in sharpness and in curvature.
    diverged: as `set_aside` takes it.
    """
    activation, d = LeakyReLU(), experiment.widths[PAIR + 1]
    x, y = shuffled_batch(data, TELEPORT_BATCH, k)
    batches = [(x, y), shuffled_batch(data, TELEPORT_BATCH, MOVES + k)]
    draws = torch.Generator().manual_seed(SEED + k)
    generator = torch.rand(d, d, generator=draws).to(x)
    before = [measured(weights, *batch, generator, k) for batch in batches]

    moved, seconds = {}, []
    for quantity in ("sharpness", "curvature"):
        start = time.perf_counter()
        moved |= teleport_pair(weights, x, y, experiment, quantity, k, generator)
        seconds.append(time.perf_counter() - start)
    runs = weights[0].shape[1]
    identities = [torch.eye(w.shape[-2]).to(x).repeat(runs, 1, 1) for w in weights[:-1]]
    elements = {"refit": identities}
    if "sharpness decrease" in moved:
        elements["random"] = random_group_elements(moved["sharpness decrease"][1], draws)
    if "curvature increase" in moved:
        (drawn,) = random_group_elements(moved["curvature increase"][1], draws)
        elements["random in one pair"] = [*identities[:PAIR], drawn, *identities[PAIR + 1 :]]
    for arm, g in elements.items():
        moved[arm] = act([w[ARMS.index(arm)] for w in weights], x, g, activation), g

    for arm, (new, _) in moved.items():
        for w, own in zip(weights, new):
            w[ARMS.index(arm)] = own
    set_aside(weights, diverged)
    after = [measured(weights, *batch, generator, k) for batch in batches]
    both = torch.stack([torch.stack(pair) for pair in zip(before, after)])  # [2, 2, 3, arms, runs]
    return both.permute(3, 0, 1, 2, 4), torch.tensor(seconds)


def train_epoch(weights, data, lr, diverged, rows=slice(None)):
    """Train by SGD on rows of the images, in place; return the mean training loss [arms, runs]."""
    x, y = data.x_train[rows], data.y_train[rows]
    loss = train_epoch_sgd(weights, x, y, lr, LeakyReLU(), BATCH, check=lambda losses: None)
    set_aside(weights, diverged)
    return loss


def train_epoch_with_moves(weights, data, experiment, diverged, bar):
    """Train as `train_epoch` does, with a move before each of the first mini-batches.

    Returns the mean training loss [arms, runs], and what `move` returns with MOVES in front.
    """
    loss, count, measurements = 0, 0, []
    for k, (rows, batches) in enumerate(split_epoch(len(data.x_train), MOVES, BATCH)):
        if k < MOVES:
            bar.set_postfix_str(f"teleport {k + 1} of {MOVES}")
            measurements.append(move(weights, data, experiment, k, diverged))
        part = train_epoch(weights, data, experiment.lr, diverged, rows)
        loss, count = loss + batches * part, count + batches
    bar.set_postfix_str("")
    moves, seconds = (torch.stack(column) for column in zip(*measurements))
    return loss / count, moves, seconds


def estimate_along(weights, data):
    """Return φ and ψ [arms, runs], Table 1's estimates as means over ESTIMATION_BATCHES batches."""
    stacks, rows = [[w.flatten(0, 1) for w in weights]], []
    for k in range(ESTIMATION_BATCHES):
        batch = shuffled_batch(data, ESTIMATION_BATCH, k)
        rows.append(estimate(stacks, *batch, RADII[data.name], k, LeakyReLU()))
    return [torch.stack(column).mean(0).view(weights[0].shape[:2]) for column in zip(*rows)]


def train(data, experiment, runs, path, settings):
    """Train all arms; resume from `path`.

    Returns the arrays saved there: the CURVES [EPOCHS, arms, runs] after each epoch, `moves`
    [MOVES, arms, 2 batches, 2, 3, runs] and move_seconds [MOVES, 2] as `move` returns them,
    seconds [EPOCHS] of training, moves and their measurements, the weights, and which networks
    diverged [arms, runs]: their curves are nan from then on, and their moves if that was in the
    epoch of the moves. Up to the teleports all arms are one. Raises UserError where plain SGD
    diverges or a teleport meets a matrix that it can't invert.
    """
    device = data.x_train.device
    state = load(path, settings)
    if state is None:
        weights = init_weights(experiment.widths, [(i + 1) * SEED for i in range(runs)])
        weights = [w[None] for w in weights]
        none = np.empty((0, len(ARMS), runs), np.float32)
        state = {"seconds": np.empty(0), **dict.fromkeys(CURVES, none)}
        state["diverged"] = np.zeros((1, runs), bool)
    else:
        weights = [torch.tensor(state[f"W{m}"]) for m in range(len(experiment.widths) - 1)]
    weights = [w.to(device) for w in weights]
    diverged = torch.tensor(state["diverged"], device=device)
    first = len(state["seconds"])
    bar = progress(
        iterable=range(first, EPOCHS), initial=first, total=EPOCHS, unit="epoch", desc=data.name
    )
    for epoch in bar:
        start = time.perf_counter()
        try:
            if epoch == TELEPORT_EPOCH:
                weights = [w.repeat(len(ARMS), 1, 1, 1) for w in weights]
                diverged = diverged.repeat(len(ARMS), 1)
                loss, moves, seconds = train_epoch_with_moves(
                    weights, data, experiment, diverged, bar
                )
                moves.masked_fill_(diverged[:, None, None, None], math.nan)
                state |= {"moves": moves.cpu(), "move_seconds": seconds}
            else:
                loss = train_epoch(weights, data, experiment.lr, diverged)
        except ValueError as error:
            raise UserError(f"{data.name}, epoch {epoch}: {error}.") from None
        state["seconds"] = np.append(state["seconds"], time.perf_counter() - start)
        test = evaluate(weights, data.x_test, data.y_test, LeakyReLU())
        values = (loss, *test, *estimate_along(weights, data))
        for curve, value in zip(CURVES, values):
            value = value.masked_fill(diverged, math.nan).expand(len(ARMS), runs).cpu()
            state[curve] = np.concatenate([state[curve], value[None]])
        state |= {f"W{m}": w.cpu() for m, w in enumerate(weights)} | {"diverged": diverged.cpu()}
        save(path, settings, **state)
    return state


def place(name, args):
    """Return a dataset's Experiment, the path of its results in logs/ and their settings."""
    experiment = EXPERIMENTS[name]
    if args.sample:
        slower = {
            arm: t._replace(lr=SAMPLE_SCALE * t.lr) for arm, t in experiment.teleports.items()
        }
        experiment = experiment._replace(
            teleports=slower,
            longest=SAMPLE_SCALE * experiment.longest,
            directions=round(SAMPLE_SCALE * experiment.directions),
        )
    path = args.output / "logs" / "generalization"
    path /= f"{name}{'-sample' * args.sample}-{args.runs}runs.npz"
    settings = {
        "dataset": name,
        "sample": args.sample,
        "widths": experiment.widths,
        "lr": experiment.lr,
        "teleports": experiment.teleports,
        "seed": SEED,
        "batches": [BATCH, TELEPORT_BATCH],
        "longest": experiment.longest,
        "course": [EPOCHS, TELEPORT_EPOCH, MOVES, PAIR, ARMS, PUBLISHED_SCALE, LONGEST_T, LARGEST],
        "estimates": [list(RADII[name]), ESTIMATION_BATCHES, ESTIMATION_BATCH],
        "measured_directions": MEASURED_DIRECTIONS,
        "radii": list(TELEPORT_RADII),
        "directions": experiment.directions,
        "runs": args.runs,
        "device": args.device.type,
    }
    return experiment, path, settings


def measure(name, args):
    """Return the arrays of `train` for a dataset from logs/. Raises UserError if they miss some."""
    _, path, settings = place(name, args)
    return load_finished(path, settings, lambda state: len(state["seconds"]) == EPOCHS)


def verdict(claim, difference, little):
    """Return what a paired difference with its 95 % interval says of one of the CLAIMS.

    little: so large a difference still is; within it a whole interval has to be to say so.
    """
    low, high = difference["low"], difference["high"]
    if low is None:
        return "too few"
    if claim == "changes little":
        if max(-low, high) < little:
            return "holds"
        return "does not hold" if max(low, -high) > little else "open"
    seen = "rises" if low > 0 else "falls" if high < 0 else None
    return "holds" if seen == claim else "opposite" if seen else "not seen"


def summarise(result):
    """Return what summary.json says of a dataset, for each arm: its test loss, moves, verdicts."""
    loss = {arm: result["test_loss"][:, i] for i, arm in enumerate(ARMS)}
    summary = {}
    for i, arm in enumerate(ARMS):
        change = result["moves"][:, i, :, 1] - result["moves"][:, i, :, 0]  # [MOVES, 2, 3, runs]
        own, fresh = np.nanmean(change, -1).sum(0)  # [3] each
        first = np.nanmean(result["moves"][0, i, 0, 0], -1)
        others = {"plain": loss["plain"]}
        if arm in CONTROLS:
            others["control"] = loss[CONTROLS[arm]]
        after = losses_after(EPOCHS_SHOWN, loss[arm], others)
        summary[arm] = {
            "diverged": int(result["diverged"][i].sum()),
            "after_epoch": after,
            "moves": {
                quantity: {
                    "before_the_first": float(first[q]),
                    "total_change_on_their_batches": float(own[q]),
                    "total_change_on_fresh_batches": float(fresh[q]),
                }
                for q, quantity in enumerate(QUANTITIES)
            },
        }
        if arm in CLAIMS:
            little = LITTLE * float(loss["plain"][-1].mean())
            for at in after.values():
                at["verdicts"] = [verdict(CLAIMS[arm], at[f"minus_{k}"], little) for k in others]
            summary[arm] |= {"claim": CLAIMS[arm], "control": CONTROLS.get(arm)}
    return summary


def label(arm, diverged):
    """Return an arm's name, with how many of its networks diverged."""
    return f"{arm} ({diverged} diverged)" if diverged else arm


def table(name, summary):
    """Return a dataset's test losses and verdicts as Markdown: of the claims, then of the rest."""
    header = [TITLES[name], "after epoch", "test loss", "− plain"]
    claims, others = [], []
    for arm, entry in summary.items():
        for epoch, at in entry["after_epoch"].items():
            cells = [label(arm, entry["diverged"]), str(epoch), f"{at['test_loss']:.4f}"]
            cells.append(interval_text(at["minus_plain"]))
            if arm in CLAIMS:
                cells[0] += f": the loss {entry['claim']}"
                cells.append(at["verdicts"][0])
                control = ["–"] * 3
                if arm in CONTROLS:
                    control = [entry["control"], interval_text(at["minus_control"])]
                    control.append(at["verdicts"][1])
                claims.append(cells + control)
            else:
                others.append(cells)
    claims = markdown([*header, "verdict", "control", "− control", "verdict"], claims)
    return f"{claims}\n{markdown(header, others)}"


def draw_losses(name, result, quantity, path):
    """Draw Figure 4 for a quantity: training dashed, test solid; and the paired test loss."""
    figure = Figure(figsize=(8.4, 3.4))
    losses, differences = figure.subplots(1, 2)
    epochs, plain = 1 + np.arange(EPOCHS), result["test_loss"][:, ARMS.index("plain")]
    arms = ["plain", *(arm for arm in CLAIMS if arm.startswith(quantity))]
    for arm in arms:
        i, colour = ARMS.index(arm), COLOURS[arm]
        plot_band(losses, epochs, result["train_loss"][:, i], color=colour, ls="--")
        name_and_count = label(arm, result["diverged"][i].sum())
        plot_band(losses, epochs, result["test_loss"][:, i], color=colour, label=name_and_count)
    for arm in (*arms, *(CONTROLS[arm] for arm in arms if arm in CONTROLS)):
        i = ARMS.index(arm)
        style = {"color": COLOURS[arm], "label": label(arm, result["diverged"][i].sum())}
        plot_difference(differences, epochs, result["test_loss"][:, i], plain, **style)
    losses.set(title=TITLES[name], xlabel="epoch", ylabel="loss (dashed: training)")
    differences.set(
        title="test loss − plain's, 95 % interval",
        xlabel="epoch",
        xlim=(TELEPORT_EPOCH - 1, EPOCHS),
    )
    for axes in (losses, differences):
        axes.legend(fontsize="small")
    figure.tight_layout()
    save_figure(figure, path)


def draw_quantities(name, result, path):
    """Draw φ and ψ along training for all arms, means over runs."""
    figure = Figure(figsize=(8.4, 3.4))
    for axes, curve, symbol in zip(figure.subplots(1, 2), ("sharpness", "curvature"), "φψ"):
        for i, arm in enumerate(ARMS):
            values = np.nanmean(result[curve][TELEPORT_EPOCH - 5 :, i], 1)
            epochs = TELEPORT_EPOCH - 4 + np.arange(len(values))
            axes.plot(epochs, values, color=COLOURS[arm], label=arm)
        axes.axvline(TELEPORT_EPOCH, color="grey", lw=0.8, ls=":")
        axes.set(title=TITLES[name], xlabel="epoch", ylabel=f"{curve} {symbol}")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    save_figure(figure, path)


def compute(args):
    """Do this rank's share of what logs/ lacks; the unit is a dataset."""
    for name in mine(args.dataset):
        experiment, path, settings = place(name, args)
        train(load_data(name, args), experiment, args.runs, path, settings)


def report(args):
    """Draw and print what logs/ has of the datasets asked for."""
    folder = figures_folder(args, "generalization", {"runs": RUNS})
    for name in args.dataset:
        result = measure(name, args)
        summary = summarise(result)
        for quantity in ("sharpness", "curvature"):
            draw_losses(name, result, quantity, folder / f"{name}_{quantity}")
        draw_quantities(name, result, folder / f"{name}_sharpness_and_curvature_along_training")
        about = {"dataset": name, "runs": args.runs, "made_with": provenance(place(name, args)[1])}
        text = json.dumps(about | {"arms": summary}, indent=1)
        save_text(folder / f"{name}_summary.json", text + "\n")
        save_text(folder / f"{name}_table.md", table(name, summary))
        print(f"\n{table(name, summary)}")
    print(f"Figures, summaries and tables are in {folder}")


def parse_arguments():
    parser = experiment_parser(__doc__)
    add = parser.add_argument
    add("--dataset", nargs="+", choices=EXPERIMENTS, default=["CIFAR10"], help="which data")
    add("--runs", type=at_least(2), default=RUNS, help="networks in each arm")
    return parser.parse_args()


def main():
    compute_and_report(parse_arguments(), compute, report)


if __name__ == "__main__":
    run(main)
