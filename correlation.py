"""Correlation of sharpness φ and curvature ψ with the test loss: Table 1, Figures 9 and 10.

    python correlation.py                      # all of Table 1
    python correlation.py --sample             # the same on the shipped sample, in a minute
    python correlation.py --dataset MNIST --runs 20

Trains stacks of networks that differ in their initial weights alone, estimates φ (Eq. 4) and ψ
(Eq. 5) of each final network, and correlates both with the test loss across networks. Results go
to logs/correlation/; a run that was interrupted goes on from there and ends with the same numbers.
"""

import argparse
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
    load,
    load_finished,
    markdown,
    measure_all,
    mine,
    progress,
    provenance,
    run,
    save,
    save_figure,
    save_text,
    wait_for_all,
)
from models import LeakyReLU, evaluate, init_weights, train_epoch_sgd
from teleportation import RADII, estimate


class Experiment(NamedTuple):
    """What a dataset's networks are, and how they are trained."""

    widths: tuple  # d_0 … d_L
    lr: float  # SGD's learning rate
    stack: int  # runs that train as one: as many as a CPU's caches serve well


EXPERIMENTS = {
    "MNIST": Experiment((784, 16, 10, 10), 1e-2, stack=50),
    "FashionMNIST": Experiment((784, 16, 10, 10), 1e-2, stack=50),
    "CIFAR10": Experiment((3072, 128, 32, 10), 2e-2, stack=25),
}
PUBLISHED_R = {  # Table 1: Pearson's r with the test loss
    "sharpness": {"MNIST": 0.704, "FashionMNIST": 0.790, "CIFAR10": 0.899},
    "curvature": {"MNIST": -0.050, "FashionMNIST": -0.232, "CIFAR10": -0.167},
}
SYMBOLS = {"sharpness": "φ", "curvature": "ψ"}
PUBLISHED = {"runs": 100, "epochs": 40, "batches": 200, "sphere": False}  # the options' values
SEED = 54321  # run i has the seed (i + 1) * SEED
BATCH = 20  # images in a mini-batch of SGD
ESTIMATION_BATCH = 200  # training images in each batch that φ and ψ are estimated on
SAVE_EVERY = 20  # batches of the estimators


def weights_of(state):
    """Return the weights that `train_stack` saved, a list of arrays."""
    return [state[f"W{m}"] for m in range(sum(key.startswith("W") for key in state))]


def train_stack(data, experiment, runs, epochs, path, settings, bar):
    """Train the runs with the indices `runs` as one stack and evaluate them; resume from `path`.

    Returns the arrays saved at `path`: W0, W1, …: [runs, d_{m+1}, d_m], train_loss [epochs, runs]
    (the mean over each epoch), test_loss [runs], test_accuracy [runs], and seconds of training.
    Raises UserError where a loss is not finite.
    """
    activation = LeakyReLU()
    state = load(path, settings)
    if state is None:
        weights = init_weights(experiment.widths, [(i + 1) * SEED for i in runs])
        state = {"train_loss": np.empty((0, len(runs)), np.float32), "seconds": 0.0}
    else:
        weights = [torch.tensor(w) for w in weights_of(state)]
    weights = [w.to(data.x_train.device) for w in weights]
    bar.update(len(state["train_loss"]))
    while "test_loss" not in state:
        epoch, start = len(state["train_loss"]), time.perf_counter()
        x, y = data.x_train, data.y_train
        try:
            loss = train_epoch_sgd(weights, x, y, experiment.lr, activation, BATCH)
        except FloatingPointError as error:
            raise UserError(f"{path.stem}, epoch {epoch}: {error}.") from None
        state["train_loss"] = np.vstack([state["train_loss"], loss.cpu().numpy()])
        state["seconds"] = state["seconds"] + time.perf_counter() - start
        state |= {f"W{m}": w.cpu().numpy() for m, w in enumerate(weights)}
        if epoch + 1 == epochs:
            test = evaluate(weights, data.x_test, data.y_test, activation)
            state["test_loss"], state["test_accuracy"] = (value.cpu().numpy() for value in test)
        save(path, settings, **state)
        bar.update()
    return state


def estimate_all(stacks, test_loss, data, batches, sphere, path, settings):
    """Estimate φ and ψ of all networks on each batch; resume from `path`.

    stacks: a list of stacks of weights; test_loss: [runs], of these networks. Saves at `path`
    sharpness and curvature [batches, runs], test_loss, and the seconds that they took. Estimates
    saved for other networks, of another test_loss, are made anew; more batches than asked for are
    kept.
    """
    state = load(path, settings) or {}
    if not np.array_equal(state.get("test_loss"), test_loss):
        state = {"sharpness": [], "curvature": [], "seconds": 0.0}
    rows, first = list(zip(state["sharpness"], state["curvature"])), len(state["sharpness"])
    start = time.perf_counter() - state["seconds"]
    desc = f"{data.name}: φ and ψ"
    with progress(total=batches, initial=first, unit="batch", desc=desc) as bar:
        for k in range(first, batches):
            x, y = shuffled_batch(data, ESTIMATION_BATCH, k)
            estimates = estimate(stacks, x, y, RADII[data.name], k, LeakyReLU(), sphere)
            rows.append([quantity.cpu().numpy() for quantity in estimates])
            if len(rows) % SAVE_EVERY == 0 or len(rows) == batches:
                estimates = dict(zip(("sharpness", "curvature"), map(np.stack, zip(*rows))))
                seconds = time.perf_counter() - start
                save(path, settings, **estimates, test_loss=test_loss, seconds=seconds)
            bar.update()


def places(name, args):
    """Return where a dataset's results lie in logs/ and the settings that they are made with.

    These are {path: indices of its runs} for the stacks and their settings, and the path of the
    estimates and their settings.
    """
    experiment, kind = EXPERIMENTS[name], "sphere" if args.sphere else "orthant"
    folder = args.output / "logs" / "correlation"
    folder /= f"{name}{'-sample' * args.sample}-{args.epochs}epochs"
    settings = {
        "dataset": name,
        "sample": args.sample,
        "widths": experiment.widths,
        "lr": experiment.lr,
        "batch": BATCH,
        "seed": SEED,
        "epochs": args.epochs,
        "device": args.device.type,
    }
    stacks, whole = {}, folder / f"runs000-{args.runs - 1:03d}.npz"
    # a GPU trains all runs as one stack; what it has made is drawn anywhere
    one = args.device.type == "cuda" or whole.exists()
    size = args.runs if one else experiment.stack
    for first in range(0, args.runs, size):
        runs = range(args.runs)[first : first + size]
        stacks[folder / f"runs{runs[0]:03d}-{runs[-1]:03d}.npz"] = runs
    estimate_settings = settings | {
        "runs": args.runs,
        "estimation_batch": ESTIMATION_BATCH,
        "radii": list(RADII[name]),
        "directions": kind,
    }
    estimates = folder / f"estimates-{args.runs}runs-{kind}.npz"
    return stacks, settings, estimates, estimate_settings


def finished(path, settings):
    """Return what `train_stack` has saved at `path` in the end. Raises UserError before that."""
    return load_finished(path, settings, lambda state: "test_loss" in state)


def compute(args):
    """Do this rank's share of what logs/ lacks: the training of stacks, then datasets' φ and ψ."""
    share = mine([path for name in args.dataset for path in places(name, args)[0]])
    for name in args.dataset:
        stacks, settings, *_ = places(name, args)
        own = {path: runs for path, runs in stacks.items() if path in share}
        if own:
            data = load_data(name, args)
            total = len(own) * args.epochs
            with progress(total=total, unit="epoch", desc=f"{name}: training") as bar:
                for path, runs in own.items():
                    train_stack(data, EXPERIMENTS[name], runs, args.epochs, path, settings, bar)
    wait_for_all()
    for name in mine(args.dataset):
        stacks, settings, path, estimate_settings = places(name, args)
        states = [finished(stack, settings) for stack in stacks]
        weights = [[torch.tensor(w, device=args.device) for w in weights_of(s)] for s in states]
        test_loss = np.concatenate([state["test_loss"] for state in states])
        data = load_data(name, args)
        estimate_all(weights, test_loss, data, args.batches, args.sphere, path, estimate_settings)


def measure(name, args):
    """Return test_loss, test_accuracy, sharpness, curvature: [runs], and how they were made.

    They are read from logs/. Raises UserError where they are missing.
    """
    stacks, settings, path, estimate_settings = places(name, args)
    states = [finished(stack, settings) for stack in stacks]
    test_loss = np.concatenate([state["test_loss"] for state in states])
    estimates = load(path, estimate_settings) or {"sharpness": [], "test_loss": test_loss}
    if not np.array_equal(estimates.get("test_loss"), test_loss):
        raise UserError(f"{path} is of other networks: run without --plot-only first.")
    if len(estimates["sharpness"]) < args.batches:
        has = f"has {len(estimates['sharpness'])} of {args.batches} batches"
        raise UserError(f"{path} {has}: run without --plot-only first.")
    return {
        "test_loss": test_loss.astype(float),
        "test_accuracy": np.concatenate([state["test_accuracy"] for state in states]),
        "sharpness": estimates["sharpness"][: args.batches].mean(0, dtype=float),
        "curvature": estimates["curvature"][: args.batches].mean(0, dtype=float),
        "training_seconds": sum(float(state["seconds"]) for state in states),
        "made_with": provenance(path),
    }


def correlate(a, b):
    """Return Pearson's r of a, b: [runs] with its 95 % interval and p-value, and Spearman's."""
    from scipy import stats  # here: to import it takes a second, which a rank can do without

    pearson, spearman = stats.pearsonr(a, b), stats.spearmanr(a, b)
    interval = pearson.confidence_interval(0.95)
    return {
        "pearson": float(pearson.statistic),
        "interval": [float(interval.low), float(interval.high)],
        "p": float(pearson.pvalue),
        "spearman": float(spearman.statistic),
        "spearman_p": float(spearman.pvalue),
    }


def partial_correlation(a, b, given):
    """Return Pearson's r of a and b: [runs] once their linear dependence on `given` is removed."""
    (_, r_ab, r_ag), (_, _, r_bg), _ = np.corrcoef([a, b, given])
    return float((r_ab - r_ag * r_bg) / np.sqrt((1 - r_ag**2) * (1 - r_bg**2)))


def summarise(name, result):
    """Return what summary.json says of a dataset: its correlations and their context."""
    loss, others = result["test_loss"], {"sharpness": "curvature", "curvature": "sharpness"}
    summary = {
        "runs": len(loss),
        "test_loss_mean": float(loss.mean()),
        "test_loss_std": float(loss.std(ddof=1)),
        "test_accuracy_mean": float(result["test_accuracy"].mean()),
        "training_seconds": round(result["training_seconds"], 1),
        "made_with": result["made_with"],
        "sharpness_and_curvature": correlate(result["sharpness"], result["curvature"]),
    }
    for quantity, other in others.items():
        summary[quantity] = correlate(result[quantity], loss) | {
            "given_the_other": partial_correlation(result[quantity], loss, result[other]),
            "published": PUBLISHED_R[quantity].get(name, math.nan),
        }
    return summary


def table(summary, caption):
    """Return Table 1 as Markdown, beside the published numbers."""
    formats = {
        "Pearson's r [95 % interval]": "{pearson:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]",
        "p-value": "{p:.2g}",
        "Pearson's r, published": "{published:.3f}",
        "Spearman's ρ": "{spearman:.3f}",
        "partial r, given the other": "{given_the_other:.3f}",
    }
    header = ["correlation with the test loss", *(TITLES[name] for name in summary)]
    rows = [
        [f"{quantity} {symbol}: {label}", *(f.format(**e[quantity]) for e in summary.values())]
        for quantity, symbol in SYMBOLS.items()
        for label, f in formats.items()
    ]
    return f"{markdown(header, rows)}\n{caption}\n"


def scatter(a, b, r, labels, title, path):
    """Draw a scatter plot of two arrays [runs], which correlate with r, and their line."""
    axes = Figure(figsize=(4, 3.2)).add_subplot(xlabel=labels[0], ylabel=labels[1], title=title)
    axes.scatter(a, b, s=12, alpha=0.7, linewidths=0)
    ends = np.array([a.min(), a.max()])
    axes.plot(ends, np.polyval(np.polyfit(a, b, 1), ends), color="black", label=f"r = {r:.3f}")
    axes.legend()
    save_figure(axes.figure, path)


def draw(name, result, summary, folder):
    """Draw a dataset's three scatter plots: Figure 9 (test loss) and Figure 10 (ψ against φ)."""
    labels = {"test_loss": "validation loss"} | {q: f"{q} {s}" for q, s in SYMBOLS.items()}
    for a, b, key in (
        ("curvature", "test_loss", "curvature"),
        ("sharpness", "test_loss", "sharpness"),
        ("sharpness", "curvature", "sharpness_and_curvature"),
    ):
        r, path = summary[key]["pearson"], folder / f"{name}_{b}_vs_{a}"
        scatter(result[a], result[b], r, (labels[a], labels[b]), TITLES[name], path)


def report(args):
    """Draw and print what logs/ has of the datasets asked for, and print that of the others."""
    folder = figures_folder(args, "correlation", PUBLISHED)
    results = measure_all(EXPERIMENTS, args.dataset, lambda name: measure(name, args))
    summary = {name: summarise(name, result) for name, result in results.items()}
    for name in args.dataset:
        draw(name, results[name], summary[name], folder)
    caption = (
        f"{args.runs} networks, {args.epochs} epochs, {args.batches} batches, directions on the "
        f"{'sphere' if args.sphere else 'positive orthant'}"
        f"{'; the sample of 1,000 images, not the data of the published numbers' * args.sample}."
    )
    settings = {key: vars(args)[key] for key in (*PUBLISHED, "sample")}
    text = json.dumps({"settings": settings, "datasets": summary}, indent=1)
    save_text(folder / "summary.json", text + "\n")
    save_text(folder / "table1.md", table(summary, caption))
    print(f"\n{table(summary, caption)}\nFigures, summary.json and table1.md are in {folder}")


def parse_arguments():
    parser = experiment_parser(__doc__)
    add, published = parser.add_argument, PUBLISHED
    add("--dataset", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), help="which data")
    add(
        "--runs",
        type=at_least(4),
        default=published["runs"],
        help="networks of each; 4 or more",
    )
    add("--epochs", type=at_least(1), default=published["epochs"], help="passes over the images")
    add(
        "--batches",
        type=at_least(1),
        help=f"batches of {ESTIMATION_BATCH} images that φ and ψ are estimated on "
        f"(default: {published['batches']}; 20 with --sample)",
        default=argparse.SUPPRESS,
    )
    add("--sphere", action="store_true", help="draw φ's directions on the sphere, not the orthant")
    args = parser.parse_args()
    if "batches" not in args:
        args.batches = 20 if args.sample else published["batches"]
    return args


def main():
    compute_and_report(parse_arguments(), compute, report)


if __name__ == "__main__":
    run(main)
