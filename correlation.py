"""Correlation of sharpness φ and curvature ψ with the test loss: Table 1, Figures 9 and 10.

    python correlation.py                      # all of Table 1
    python correlation.py --sample             # the same on the shipped sample, in a minute
    python correlation.py --dataset MNIST --runs 20

Trains networks that differ in their initial weights alone, as stacks, estimates φ (Eq. 4) and ψ
(Eq. 5) of each final network, and correlates both with the test loss across networks. Training and
estimates go to logs/correlation/; an interrupted run goes on from there and ends with the same
numbers. The results of each network are in figures/correlation/<dataset>.npz.
"""

import time

from experiment import files, launch, plots, statistics

import numpy as np
from matplotlib.figure import Figure

import models
from data import TITLES, load_data, shuffled_batch
from teleportation import RADII, estimate

# Settings

DEFAULTS = {"runs": 100, "epochs": 40, "batches": 200, "sphere": False}  # as published
SAMPLE_DEFAULTS = DEFAULTS | {"batches": 20}
RUNS_PER_STACK = {
    "MNIST": 50,
    "FashionMNIST": 50,
    "CIFAR10": 25,
}  # runs that fit a CPU's caches as one
ACTIVATION = models.LeakyReLU()
ESTIMATION_BATCH = 200  # training images in each batch that φ and ψ are estimated on
SAVE_EVERY = 20  # batches of the estimators
PUBLISHED_R = {  # Table 1: Pearson's r with the test loss
    "sharpness": {"MNIST": 0.704, "FashionMNIST": 0.790, "CIFAR10": 0.899},
    "curvature": {"MNIST": -0.050, "FashionMNIST": -0.232, "CIFAR10": -0.167},
}
SYMBOLS = {"sharpness": "φ", "curvature": "ψ"}


# Computation


def train_stack(data, runs, epochs, path, settings, bar):
    """Train the runs with the indices `runs` as one stack and evaluate them; resume from `path`.

    Returns the arrays saved at `path`: W0, W1, …: [runs, d_{m+1}, d_m], epoch_loss [epochs, runs]
    (the mean training loss over each epoch), seconds [epochs]; and of the final networks
    train_loss, test_loss, test_accuracy [runs]. Raises UserError where a loss is not finite.
    """
    widths, lr = models.TRAINING[data.name]

    def start():
        return models.to_arrays(models.init_weights(widths, models.run_seeds(runs)))

    def step(state):
        weights, begin = models.from_arrays(state, data.x_train.device), time.perf_counter()
        try:
            loss = models.train_epoch_sgd(weights, data.x_train, data.y_train, lr, ACTIVATION)
        except FloatingPointError as error:
            raise files.UserError(f"{path.stem}, epoch {state['steps']}: {error}.") from None
        state = files.appended(state, epoch_loss=loss, seconds=time.perf_counter() - begin)
        if state["steps"] + 1 == epochs:
            test = models.evaluate(weights, data.x_test, data.y_test, ACTIVATION)
            train_loss, _ = models.evaluate(weights, data.x_train, data.y_train, ACTIVATION)
            state |= {"train_loss": train_loss, "test_loss": test[0], "test_accuracy": test[1]}
        return state | models.to_arrays(weights)

    return files.resume(path, settings, start, step, epochs, bar)


def estimate_stack(data, weights, batches, sphere, path, settings, bar):
    """Estimate φ and ψ of a stack of networks on each batch; resume from `path`.

    Returns the arrays saved at `path`, sharpness and curvature: [batches, runs]. Stacks share the
    batches' draws. More batches than asked for are kept.
    """

    def step(state):
        k = int(state["steps"])
        x, y = shuffled_batch(data, ESTIMATION_BATCH, k)
        phi, psi = estimate(weights, x, y, RADII[data.name], k, ACTIVATION, sphere)
        return files.appended(state, sharpness=phi, curvature=psi)

    return files.resume(path, settings, dict, step, batches, bar, SAVE_EVERY)


def stacks(name, args):
    """Return {path in logs/: indices of its runs} for the stacks of a dataset, and settings."""
    widths, lr = models.TRAINING[name]
    settings = dict(dataset=name, sample=args.sample, widths=widths, lr=lr, batch=models.BATCH)
    settings |= dict(seed=models.SEED, epochs=args.epochs, device=args.device.type)
    settings |= dict(activation=str(ACTIVATION))
    folder = args.output / "logs" / "correlation"
    folder /= f"{name}{'-sample' * args.sample}-{args.epochs}epochs"
    # a GPU trains all runs as one stack; what it has made is used anywhere
    one = args.device.type == "cuda" or (folder / f"runs000-{args.runs - 1:03d}.npz").exists()
    size = args.runs if one else RUNS_PER_STACK[name]
    parts = [range(args.runs)[first : first + size] for first in range(0, args.runs, size)]
    return {folder / f"runs{runs[0]:03d}-{runs[-1]:03d}.npz": runs for runs in parts}, settings


def log_of_estimates(path, settings, state, args):
    """Return where the estimates of the stack that was trained to `state` lie, and settings."""
    kind = "sphere" if args.sphere else "orthant"
    settings = settings | dict(directions=kind, radii=list(RADII[settings["dataset"]]))
    settings |= dict(estimation_batch=ESTIMATION_BATCH, networks=state["test_loss"].tolist())
    return path.with_name(f"{path.stem}-{kind}.npz"), settings


def compute(args):
    """Do this rank's share of what logs/ lacks; the unit is a stack."""
    units = [(name, path) for name in args.dataset for path in stacks(name, args)[0]]
    share = launch.share_of_rank(units)
    for name in args.dataset:
        paths, settings = stacks(name, args)
        own = {path: runs for path, runs in paths.items() if (name, path) in share}
        data = load_data(name, args) if own else None
        for path, runs in own.items():
            title = f"{TITLES[name]}, runs {runs[0]} to {runs[-1]}"
            with launch.progress_bar(args.epochs, "epoch", f"{title}: training") as bar:
                state = train_stack(data, runs, args.epochs, path, settings, bar)
            log = log_of_estimates(path, settings, state, args)
            weights = models.from_arrays(state, args.device)
            with launch.progress_bar(args.batches, "batch", f"{title}: φ and ψ") as bar:
                estimate_stack(data, weights, args.batches, args.sphere, *log, bar)


def collect(name, args):
    """Return the results of each network, [runs], with their settings and a log they are from."""
    paths, settings = stacks(name, args)
    found = []
    for path in paths:
        state = files.load_steps(path, settings, args.epochs)
        estimates = files.load_steps(*log_of_estimates(path, settings, state, args), args.batches)
        means = {key: estimates[key][: args.batches].mean(0, dtype=float) for key in SYMBOLS}
        found.append(state | means)
    keys = "train_loss", "test_loss", "test_accuracy", *SYMBOLS
    results = {key: np.concatenate([stack[key] for stack in found]) for key in keys}
    results["training_seconds"] = sum(stack["seconds"].sum() for stack in found)
    made = {key: vars(args)[key] for key in DEFAULTS} | {"radii": list(RADII[name])}
    return settings | made, {"seed": models.run_seeds(range(args.runs))} | results, path


# Statistics


def summarise(name, results):
    """Return what summary.json says of a dataset: its correlations and their context."""
    correlate, partial = statistics.correlate, statistics.partial_correlation
    loss, others = results["test_loss"].astype(float), dict(zip(SYMBOLS, reversed(SYMBOLS)))
    summary = {
        "runs": len(loss),
        "test_loss_mean": loss.mean(),
        "test_loss_std": loss.std(ddof=1),
        "test_accuracy_mean": results["test_accuracy"].mean(dtype=float),
        "training_seconds": results["training_seconds"].round(1),
        "sharpness_and_curvature": correlate(results["sharpness"], results["curvature"]),
        "sharpness_and_train_loss": correlate(results["sharpness"], results["train_loss"]),
        "train_loss": correlate(results["train_loss"], loss),
    }
    for quantity, other in others.items():
        summary[quantity] = correlate(results[quantity], loss) | {
            "given_the_other": partial(results[quantity], loss, results[other]),
            "published": PUBLISHED_R[quantity].get(name, np.nan),
        }
    return summary


def table(summaries):
    """Return Table 1 as Markdown, beside the published numbers."""
    r = "{pearson:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"
    formats = {
        "Pearson's r [95 % interval]": r,
        "p-value": "{p:.2g}",
        "Pearson's r, published": "{published:.3f}",
        "Spearman's ρ": "{spearman:.3f}",
        "partial r, given the other": "{given_the_other:.3f}",
    }
    lines = [
        (f"{quantity} {symbol}: {label}", quantity, f)
        for quantity, symbol in SYMBOLS.items()
        for label, f in formats.items()
    ]
    lines += [("training loss: Pearson's r [95 % interval]", "train_loss", r)]
    lines += [("training loss with φ: Pearson's r [95 % interval]", "sharpness_and_train_loss", r)]
    rows = [[label, *(f.format(**e[key]) for e in summaries.values())] for label, key, f in lines]
    header = ["correlation with the test loss", *(TITLES[name] for name in summaries)]
    made = next(iter(summaries.values()))["settings"]
    caption = "{runs} networks, {epochs} epochs, {batches} batches".format(**made)
    caption += f", directions on the {'sphere' if made['sphere'] else 'positive orthant'}"
    caption += "; on the sample of 1,000 images, not on the paper's data" * made["sample"]
    return f"{plots.markdown(header, rows)}\n{caption}.\n"


# Figures


def scatter(a, b, r, labels, title, path):
    """Draw a scatter plot of two arrays [runs], which correlate with r, and their line."""
    axes = Figure(figsize=(4, 3.2)).add_subplot(xlabel=labels[0], ylabel=labels[1], title=title)
    axes.scatter(a, b, s=12, alpha=0.7, linewidths=0)
    ends = np.array([a.min(), a.max()])
    axes.plot(ends, np.polyval(np.polyfit(a, b, 1), ends), color="black", label=f"r = {r:.3f}")
    axes.legend()
    plots.save_figure(axes.figure, path)


def draw(name, results, summary, folder):
    """Draw a dataset's three scatter plots: Figure 9 (test loss) and Figure 10 (ψ against φ)."""
    labels = {"test_loss": "test loss"} | {q: f"{q} {s}" for q, s in SYMBOLS.items()}
    for a, b, key in (
        ("curvature", "test_loss", "curvature"),
        ("sharpness", "test_loss", "sharpness"),
        ("sharpness", "curvature", "sharpness_and_curvature"),
    ):
        r, path = summary[key]["pearson"], folder / f"{name}_{b}_vs_{a}"
        scatter(results[a], results[b], r, (labels[a], labels[b]), TITLES[name], path)


# Options


def parse_arguments():
    parser = launch.experiment_parser(__doc__)
    add, count = parser.add_argument, launch.at_least
    add(
        "--dataset",
        nargs="+",
        choices=models.TRAINING,
        default=list(models.TRAINING),
        help="which datasets",
    )
    add("--runs", type=count(4), default=DEFAULTS["runs"], help="networks per dataset, at least 4")
    add("--epochs", type=count(1), default=DEFAULTS["epochs"], help="passes over the images")
    batches = f"batches of {ESTIMATION_BATCH} images that φ and ψ are estimated on (default: "
    batches += f"{DEFAULTS['batches']}; {SAMPLE_DEFAULTS['batches']} with --sample)"
    add("--batches", type=count(1), help=batches)
    add("--sphere", action="store_true", help="draw φ's directions on the sphere, not the orthant")
    args = parser.parse_args()
    args.defaults = SAMPLE_DEFAULTS if args.sample else DEFAULTS
    if args.batches is None:
        args.batches = args.defaults["batches"]
    return args


def main():
    args = parse_arguments()
    folder = launch.figures_folder(args, "correlation", args.defaults)
    parts = models.TRAINING, args.dataset
    launch.compute_and_report(args, folder, *parts, compute, collect, summarise, table, draw)


if __name__ == "__main__":
    launch.run(main)
