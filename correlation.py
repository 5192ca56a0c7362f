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
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

from data import load_dataset, load_sample
from init_directory import (
    ROOT,
    UserError,
    at_least,
    device,
    load,
    run,
    save,
    save_figure,
    save_text,
)
from models import LeakyReLU, evaluate, init_weights, train_epoch_sgd
from teleportation import (
    curvature,
    curve_derivatives,
    random_directions,
    random_generators,
    sharpness,
)


class Experiment(NamedTuple):
    """What a dataset's networks are, and how they are trained and perturbed."""

    widths: tuple  # d_0 … d_L
    lr: float  # SGD's learning rate
    radii: np.ndarray  # |t d| of the perturbations, one direction each
    stack: int  # runs that train as one: as many as the caches serve well
    title: str


EXPERIMENTS = {
    "MNIST": Experiment(
        (784, 16, 10, 10), 1e-2, np.arange(0.001, 0.2, 0.01), stack=50, title="MNIST"
    ),
    "FashionMNIST": Experiment(
        (784, 16, 10, 10), 1e-2, np.arange(0.0001, 0.02, 0.001), stack=50, title="Fashion-MNIST"
    ),
    "CIFAR10": Experiment(
        (3072, 128, 32, 10), 2e-2, np.arange(0.0001, 0.02, 0.001), stack=25, title="CIFAR-10"
    ),
}
PUBLISHED_R = {  # Table 1: Pearson's r with the test loss
    "sharpness": {"MNIST": 0.704, "FashionMNIST": 0.790, "CIFAR10": 0.899},
    "curvature": {"MNIST": -0.050, "FashionMNIST": -0.232, "CIFAR10": -0.167},
}
SYMBOLS = {"sharpness": "φ", "curvature": "ψ"}
SEED = 54321  # run i has the seed (i + 1) * SEED
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
    activation, device = LeakyReLU(), data.x_train.device
    state = load(path, settings)
    if state is None:
        weights = init_weights(experiment.widths, [(i + 1) * SEED for i in runs])
        state = {"train_loss": np.empty((0, len(runs)), np.float32), "seconds": 0.0}
    else:
        weights = [torch.tensor(w) for w in weights_of(state)]
    weights = [w.to(device) for w in weights]
    bar.update(len(state["train_loss"]))
    while "test_loss" not in state:
        epoch, start = len(state["train_loss"]), time.perf_counter()
        try:
            loss = train_epoch_sgd(weights, data.x_train, data.y_train, experiment.lr, activation)
        except FloatingPointError as error:
            raise UserError(f"{path.stem}, epoch {epoch}: {error}.") from None
        state["train_loss"] = np.vstack([state["train_loss"], loss.cpu()])
        state["seconds"] = state["seconds"] + time.perf_counter() - start
        state |= {f"W{m}": w.cpu().numpy() for m, w in enumerate(weights)}
        if epoch + 1 == epochs:
            test_loss, test_accuracy = evaluate(weights, data.x_test, data.y_test, activation)
            state |= {"test_loss": test_loss.cpu(), "test_accuracy": test_accuracy.cpu()}
        save(path, settings, **state)
        bar.update()
    return state


def estimation_batch(data, k):
    """Return the k-th batch (x: [d_0, n], y: [n]) of training images.

    Batches are drawn without replacement from a shuffled order, which is shuffled again when it
    runs out.
    """
    n = min(ESTIMATION_BATCH, len(data.x_train))
    shuffle, batch = divmod(k, len(data.x_train) // n)
    generator = torch.Generator().manual_seed(shuffle)
    index = torch.randperm(len(data.x_train), generator=generator)[batch * n : (batch + 1) * n]
    index = index.to(data.x_train.device)
    return data.x_train[index].T, data.y_train[index]


def estimate(stacks, data, experiment, k, sphere):
    """Return φ and ψ, arrays [runs], of the networks of all stacks on the k-th batch.

    All networks share the batch's directions, one for each radius, and its generators.
    """
    activation, device = LeakyReLU(), data.x_train.device
    x, y = estimation_batch(data, k)
    generators = random_generators(experiment.widths, torch.Generator().manual_seed(12345 * k))
    generators = [M.to(device) for M in generators]
    directions = random_directions(
        experiment.widths, experiment.radii, torch.Generator().manual_seed(12345 * k + 1), sphere
    )
    directions = [d.to(device) for d in directions]
    # The batch meets the first layer through its span alone: with X = QR, W_0 X = (W_0 Q) R, and
    # since Q's columns are orthonormal, so are γ's lengths kept. That leaves n inputs of d_0.
    q, x = torch.linalg.qr(x)
    directions[0] = directions[0] @ q
    phi, psi = [], []
    for weights in stacks:
        weights = [weights[0] @ q, *weights[1:]]
        phi.append(sharpness(weights, x, y, directions, activation))
        psi.append(curvature(*curve_derivatives(weights, x, generators, activation)))
    return torch.cat(phi).cpu().numpy(), torch.cat(psi).cpu().numpy()


def estimate_all(stacks, data, experiment, batches, sphere, path, settings):
    """Return sharpness and curvature: [batches, runs] on each batch; resume from `path`.

    stacks: a list of stacks of weights. They are estimated one at a time for the caches' sake, but
    share each batch and its draws.
    """
    state = load(path, settings)
    rows = [] if state is None else list(zip(state["sharpness"], state["curvature"]))
    with tqdm(total=batches, unit="batch", desc=f"{data.name}: φ and ψ") as bar:
        bar.update(min(len(rows), batches))
        while len(rows) < batches:
            rows.append(estimate(stacks, data, experiment, len(rows), sphere))
            if len(rows) % SAVE_EVERY == 0 or len(rows) == batches:
                phi, psi = zip(*rows)
                save(path, settings, sharpness=np.stack(phi), curvature=np.stack(psi))
            bar.update()
    phi, psi = zip(*rows[:batches])
    return {"sharpness": np.stack(phi), "curvature": np.stack(psi)}


def measure(name, args):
    """Return test_loss, test_accuracy, sharpness, curvature: [runs], and the training's seconds.

    What logs/ has already is read from there; the rest is computed, unless args.plot_only.
    Raises UserError where that leaves results missing.
    """
    experiment = EXPERIMENTS[name]
    kind = "sphere" if args.sphere else "orthant"
    folder = Path(args.output) / "logs" / "correlation"
    folder /= f"{name}{'-sample' * args.sample}-{args.epochs}epochs"
    settings = {
        "dataset": name,
        "sample": args.sample,
        "widths": experiment.widths,
        "lr": experiment.lr,
        "epochs": args.epochs,
        "device": args.device.type,
    }
    estimate_settings = settings | {
        "runs": args.runs,
        "batch": ESTIMATION_BATCH,
        "radii": list(experiment.radii),
        "directions": kind,
    }
    stacks = {}  # where each stack is kept: the indices of its runs
    for first in range(0, args.runs, experiment.stack):
        runs = range(args.runs)[first : first + experiment.stack]
        stacks[folder / f"runs{runs[0]:03d}-{runs[-1]:03d}.npz"] = runs
    estimates_path = folder / f"estimates-{args.runs}runs-{kind}.npz"
    if args.plot_only:
        states = [load(path, settings) for path in stacks]
        estimates = load(estimates_path, estimate_settings)
        unfinished = any(state is None or "test_loss" not in state for state in states)
        if unfinished or estimates is None or len(estimates["sharpness"]) < args.batches:
            raise UserError(f"{folder} has no finished results: run without --plot-only first.")
    else:
        data = load_sample(name) if args.sample else load_dataset(name, args.data)
        data = data.to(args.device)
        with tqdm(total=len(stacks) * args.epochs, unit="epoch", desc=f"{name}: training") as bar:
            states = [
                train_stack(data, experiment, runs, args.epochs, path, settings, bar)
                for path, runs in stacks.items()
            ]
        weights = [[torch.tensor(w, device=args.device) for w in weights_of(s)] for s in states]
        estimates = estimate_all(
            weights, data, experiment, args.batches, args.sphere, estimates_path, estimate_settings
        )
    return {
        "test_loss": np.concatenate([state["test_loss"] for state in states]).astype(float),
        "test_accuracy": np.concatenate([state["test_accuracy"] for state in states]),
        "sharpness": estimates["sharpness"][: args.batches].mean(0, dtype=float),
        "curvature": estimates["curvature"][: args.batches].mean(0, dtype=float),
        "training_seconds": sum(float(state["seconds"]) for state in states),
    }


def correlate(a, b):
    """Return Pearson's r of a, b: [runs] with its 95 % interval and p-value, and Spearman's."""
    pearson, spearman = stats.pearsonr(a, b), stats.spearmanr(a, b)
    interval = pearson.confidence_interval(0.95)
    return {
        "pearson": float(pearson.statistic),
        "interval": [float(interval.low), float(interval.high)],
        "p": float(pearson.pvalue),
        "spearman": float(spearman.statistic),
        "spearman_p": float(spearman.pvalue),
    }


def summarise(name, result):
    """Return what summary.json says of a dataset: its correlations and their context."""
    return {
        "runs": len(result["test_loss"]),
        "test_loss_mean": float(result["test_loss"].mean()),
        "test_loss_std": float(result["test_loss"].std(ddof=1)),
        "test_accuracy_mean": float(result["test_accuracy"].mean()),
        "training_seconds": round(result["training_seconds"], 1),
        "sharpness_and_curvature": correlate(result["sharpness"], result["curvature"]),
    } | {
        quantity: correlate(result[quantity], result["test_loss"]) | {"published": published[name]}
        for quantity, published in PUBLISHED_R.items()
    }


def table(summary):
    """Return Table 1 as Markdown, beside the published numbers."""
    titles = [EXPERIMENTS[name].title for name in summary]
    lines = [
        "| correlation with the test loss | " + " | ".join(titles) + " |",
        "|---" * (len(titles) + 1) + "|",
    ]
    formats = {
        "Pearson's r [95 % interval]": "{pearson:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]",
        "p-value": "{p:.2g}",
        "Pearson's r, published": "{published:.3f}",
        "Spearman's ρ": "{spearman:.3f}",
    }
    for quantity, symbol in SYMBOLS.items():
        for label, form in formats.items():
            cells = [form.format(**entry[quantity]) for entry in summary.values()]
            lines.append(f"| {quantity} {symbol}: {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def scatter(x, y, r, xlabel, ylabel, title, path):
    """Draw a scatter plot of two arrays [runs] with its line of least squares."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 3.2))
    axes = figure.subplots()
    axes.scatter(x, y, s=12, alpha=0.7, linewidths=0)
    ends = np.array([x.min(), x.max()])
    line = stats.linregress(x, y)
    axes.plot(ends, line.slope * ends + line.intercept, color="black", label=f"r = {r:.3f}")
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.legend()
    save_figure(figure, path)


def draw(name, result, summary, folder):
    """Draw a dataset's three scatter plots: Figure 9 (test loss) and Figure 10 (ψ against φ)."""
    labels = {
        "sharpness": "sharpness φ",
        "curvature": "curvature ψ",
        "test_loss": "validation loss",
    }
    for x, y, correlation in (
        ("curvature", "test_loss", summary["curvature"]),
        ("sharpness", "test_loss", summary["sharpness"]),
        ("sharpness", "curvature", summary["sharpness_and_curvature"]),
    ):
        scatter(
            result[x],
            result[y],
            correlation["pearson"],
            labels[x],
            labels[y],
            EXPERIMENTS[name].title,
            folder / f"{name}_{y}_vs_{x}",
        )


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--dataset", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), help="which data")
    add("--runs", type=at_least(4), default=100, help="networks for each dataset, at least 4")
    add("--epochs", type=at_least(1), default=40, help="passes over the training images")
    add(
        "--batches",
        type=at_least(1),
        help=f"batches of {ESTIMATION_BATCH} images for φ and ψ (default: 200; 20 with --sample)",
        default=argparse.SUPPRESS,
    )
    add(
        "--sphere",
        action="store_true",
        help="draw φ's directions on the sphere, not on its positive orthant as published",
    )
    add("--sample", action="store_true", help="use the 1,000 images that ship with the code")
    add("--plot-only", action="store_true", help="draw and print again what logs/ has")
    add("--device", type=device, default="cpu", help="where to compute, such as cpu or cuda:0")
    add("--data", default=ROOT / "data", help="the folder with the datasets; fetched if missing")
    add("--output", default=ROOT, help="the folder for logs/ and figures/")
    args = parser.parse_args()
    return argparse.Namespace(**({"batches": 20 if args.sample else 200} | vars(args)))


def main():
    args = parse_arguments()
    folder = Path(args.output) / "figures" / ("sample/" * args.sample + "correlation")
    summary = {}
    for name in args.dataset:
        result = measure(name, args)
        summary[name] = summarise(name, result)
        draw(name, result, summary[name], folder)
    save_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    save_text(folder / "table1.md", table(summary))
    print(f"\n{table(summary)}\nFigures, summary.json and table1.md are in {folder}")


if __name__ == "__main__":
    run(main)
