"""Table 1 and Figures 9, 10: do sharpness φ and curvature ψ predict the test loss?

    python correlation.py                      # Table 1, 43 minutes on two cores
    python correlation.py --sample             # the same on the 1,000 images that ship
    python correlation.py --dataset MNIST --runs 20

Trains networks that differ in their initial weights alone, estimates φ (Eq. 4) and ψ (Eq. 5) of
each, and correlates both with the test loss. Training and estimates go to logs/correlation/; an
interrupted run resumes from there and ends with the same numbers.
"""

from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

import models
from data import TITLES, load_data, shuffled_batch
from experiment import plots, results, run, statistics
from teleportation import RADII, Estimate, estimate

DEFAULTS = {"runs": 100, "epochs": 40, "batches": 200, "sphere": False}  # as published
SAMPLE_BATCHES = 20
STACK = {"MNIST": 50, "FashionMNIST": 50, "CIFAR10": 25}  # networks that fit a CPU's caches
ACTIVATION = models.LeakyReLU()
ESTIMATION_BATCH = 200  # training images in each batch on which φ and ψ are estimated
SAVE_EVERY = 20  # batches
ESTIMATES = Estimate._fields
PUBLISHED = {  # Table 1: Pearson's r with the test loss
    "MNIST": {"sharpness": 0.704, "curvature": -0.050},
    "FashionMNIST": {"sharpness": 0.790, "curvature": -0.232},
    "CIFAR10": {"sharpness": 0.899, "curvature": -0.167},
}
QUANTITIES = {  # that are correlated with the test loss
    "sharpness": "sharpness φ",
    "batch_loss": "loss L on φ's batches",
    "excess": "φ − L",
    "curvature": "curvature ψ",
    "exact_curvature": "ψ by the exact γ″",
    "train_loss": "training loss",
}
PARTIAL = "sharpness", "excess", "curvature", "exact_curvature"  # given the training loss, too
R = "{pearson:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"
TABLE_1 = (  # rows: a title, a quantity, what is shown of it, and how
    ("sharpness φ", "sharpness", "r", R),
    ("φ, published", "sharpness", "published", "{r:.3f}"),
    ("curvature ψ", "curvature", "r", R),
    ("ψ, published", "curvature", "published", "{r:.3f}"),
    ("training loss", "train_loss", "r", R),
    ("φ − L, partial r given the training loss", "excess", "partial_r", R),
    ("ψ, partial r given the training loss", "curvature", "partial_r", R),
)
DETAILS = (  # columns: a title, what is shown of each quantity, and how
    ("r with the test loss", "r", R),
    ("published r (p of the difference)", "published", "{r:.3f} ({p:.2g})"),
    ("r with the gap", "r_gap", R),
    ("r with the training loss", "r_train_loss", R),
    ("partial r given the training loss", "partial_r", R),
    ("its p (Holm's)", "partial_r", "{p:.2g} ({holm:.2g})"),
)
FIGURE_9 = ("sharpness", "test_loss"), ("curvature", "test_loss")  # rows: x and y
FIGURE_10 = (("sharpness", "curvature"),)


class Stack(NamedTuple):
    """Networks of one dataset, by the index of their seed, that are trained as one."""

    dataset: str
    runs: range


# Computation


def stacks_of(name, args):
    """Return the stacks of a dataset's runs; only a CPU splits them."""
    size = STACK.get(name, 50) if args.device.type == "cpu" else args.runs
    runs = range(args.runs)
    return [Stack(name, runs[first : first + size]) for first in runs[::size]]


def stacks(args):
    """Return the stacks of all datasets asked for."""
    return [stack for name in args.dataset for stack in stacks_of(name, args)]


def training_log(stack, args):
    """Return the Log of a stack's training."""
    widths, lr = models.TRAINING[stack.dataset]
    settings = {
        "dataset": stack.dataset,
        "sample": args.sample,
        "seeds": models.run_seeds(stack.runs),
        "widths": widths,
        "activation": str(ACTIVATION),
        "lr": lr,
        "batch": models.BATCH,
        "epochs": args.epochs,
        "device": args.device.type,
    }
    folder = f"{stack.dataset}{'-sample' * args.sample}-{args.epochs}epochs"
    name = f"runs{stack.runs[0]:03d}-{stack.runs[-1]:03d}.npz"
    return results.Log(args.output / "logs" / "correlation" / folder / name, settings, (__file__,))


def estimates_log(stack, trained, args):
    """Return the Log of the estimates of φ and ψ of a stack with the arrays `trained`."""
    path, settings, code = training_log(stack, args)
    settings = settings | {
        "sphere": args.sphere,
        "radii": list(RADII[stack.dataset]),
        "estimation_batch": ESTIMATION_BATCH,
        "networks": trained["test_loss"].tolist(),
    }
    kind = "sphere" if args.sphere else "orthant"
    return results.Log(path.with_name(f"{path.stem}-{kind}.npz"), settings, code)


def measure(stack, args, bar):
    """Train a stack, then estimate φ and ψ of its networks."""
    data = load_data(stack.dataset, args)
    trained = train(stack, data, args, bar)
    estimate_batches(stack, data, trained, args, bar)


def train(stack, data, args, bar):
    """Train a stack, and evaluate it after the last epoch; resume from logs/.

    Returns arrays: W0, W1, …: [runs, d_{m+1}, d_m]; epoch_loss: [epochs, runs], the mean training
    loss during each epoch; train_loss, test_loss, test_accuracy: [runs]. Raises UserError where a
    loss is not finite.
    """
    widths, lr = models.TRAINING[stack.dataset]

    def start():
        return models.to_arrays(models.init_weights(widths, models.run_seeds(stack.runs)))

    def step(state):
        weights = models.from_arrays(state, args.device)
        try:
            loss = models.train_epoch_sgd(weights, data.x_train, data.y_train, lr, ACTIVATION)
        except FloatingPointError as error:
            where = f"{stack.dataset}, epoch {state['steps']}"
            raise results.UserError(f"{where}: {error}.") from None
        state = results.append(state, epoch_loss=loss)
        if state["steps"] + 1 == args.epochs:
            test = models.evaluate(weights, data.x_test, data.y_test, ACTIVATION)
            train_loss, _ = models.evaluate(weights, data.x_train, data.y_train, ACTIVATION)
            state |= {"train_loss": train_loss, "test_loss": test[0], "test_accuracy": test[1]}
        return state | models.to_arrays(weights)

    return results.resume(training_log(stack, args), start, step, args.epochs, bar)


def estimate_batches(stack, data, trained, args, bar):
    """Estimate φ, ψ and L of the networks in `trained` on each batch; resume from logs/.

    Returns arrays, the ESTIMATES: [batches, runs]. All stacks share the batches' draws.
    """
    weights = models.from_arrays(trained, args.device)

    def step(state):
        k = int(state["steps"])
        x, y = shuffled_batch(data, ESTIMATION_BATCH, k)
        radii = RADII[stack.dataset]
        estimates = estimate(weights, x, y, radii, k, ACTIVATION, args.sphere)
        return results.append(state, **estimates._asdict())

    log = estimates_log(stack, trained, args)
    return results.resume(log, dict, step, args.batches, bar, SAVE_EVERY)


def collect(name, args):
    """Return the Result of a dataset: seeds, losses and mean estimates of its networks, [runs]."""
    parts, commits = [], set()
    for stack in stacks_of(name, args):
        trained = results.load(training_log(stack, args), args.epochs)
        estimates = results.load(estimates_log(stack, trained.arrays, args), args.batches)
        mean = {key: estimates.arrays[key][: args.batches].mean(0, float) for key in ESTIMATES}
        parts.append(trained.arrays | mean | {"seed": models.run_seeds(stack.runs)})
        commits.add(str(trained.made_with["commit"]))
    keys = "seed", "train_loss", "test_loss", "test_accuracy", *ESTIMATES
    arrays = {key: np.concatenate([part[key] for part in parts]) for key in keys}
    settings = estimates.settings | {key: vars(args)[key] for key in DEFAULTS}
    for key in ("seeds", "networks"):  # of one stack; the arrays have those of all
        del settings[key]
    return results.Result(arrays, settings, estimates.made_with | {"trained_by": sorted(commits)})


# Statistics


def summarise(name, arrays):
    """Return how a dataset's QUANTITIES correlate with the test loss: {quantity: {statistic: …}}.

    `r_gap` is the correlation with the gap, test loss − training loss. `partial_r` controls for the
    training loss. What φ adds to the loss is φ − L, with L the loss on φ's own batches.
    """
    values = {key: array.astype(float) for key, array in arrays.items()}
    values["excess"] = values["sharpness"] - values["batch_loss"]
    loss, train_loss, runs = values["test_loss"], values["train_loss"], len(values["seed"])
    test_loss = {"mean": loss.mean(), "std": loss.std(ddof=1)}
    summary = {"networks": runs, "test_loss": test_loss}
    for key in QUANTITIES:
        r_gap = statistics.correlate(values[key], loss - train_loss)
        summary[key] = {"r": statistics.correlate(values[key], loss), "r_gap": r_gap}
    for key in PARTIAL:
        partial_r = statistics.partial_correlation(values[key], loss, train_loss)
        r_train_loss = statistics.correlate(values[key], train_loss)
        summary[key] |= {"partial_r": partial_r, "r_train_loss": r_train_loss}
    for key, r in PUBLISHED.get(name, {}).items():
        ours = summary[key]["r"]["pearson"]
        p = statistics.p_of_difference(ours, runs, r, DEFAULTS["runs"])
        summary[key]["published"] = {"r": r, "p": p}
    exact, curvature = values["exact_curvature"], values["curvature"]
    summary["exact_curvature"]["r_curvature"] = statistics.correlate(exact, curvature)
    summary["exact_curvature"]["mean_ratio_to_curvature"] = (exact / curvature).mean()
    return summary


def adjust(summaries):
    """Add to each partial r, of all datasets and quantities, its p-value by Holm's method."""
    family = [summary[key]["partial_r"] for summary in summaries.values() for key in PARTIAL]
    for partial, p in zip(family, statistics.holm([partial["p"] for partial in family])):
        partial["holm"] = p


# Tables


def cell(entry, key, form):
    """Return a statistic of a quantity as text; – where it has none."""
    return form.format(**entry[key]).replace("-", "−") if key in entry else "–"


def table_1(summaries, settings):
    """Return Table 1 as Markdown, with the published r, and below it what the losses explain."""
    rows = [
        [title, *(cell(summary[quantity], key, form) for summary in summaries.values())]
        for title, quantity, key, form in TABLE_1
    ]
    header = ["Pearson's r with the test loss [95 %]", *(TITLES[name] for name in summaries)]
    text = "{runs} networks per dataset, {epochs} epochs, {batches} batches".format(**settings)
    text += f", directions on the {'sphere' if settings['sphere'] else 'positive orthant'}"
    text += "; on the sample of 1,000 images, not on the paper's data" * settings["sample"]
    return f"{plots.markdown(header, rows)}\n{text}. L: the loss without perturbation.\n"


def details(summaries):
    """Return all correlations as Markdown: a table per dataset with a row for each quantity."""
    text = ""
    for name, summary in summaries.items():
        rows = [
            [label, *(cell(summary[quantity], key, form) for _, key, form in DETAILS)]
            for quantity, label in QUANTITIES.items()
        ]
        text += f"{plots.markdown([TITLES[name], *(title for title, *_ in DETAILS)], rows)}\n"
    return f"{text}Gap: test loss − training loss. Holm's method is over all partial r shown.\n"


# Figures


def draw(path, saved, rows):
    """Draw scatter plots with their r: a row for each x and y in `rows`, a column per dataset.

    saved: {dataset: Result}.
    """
    labels = QUANTITIES | {"test_loss": "test loss"}
    figure = Figure(figsize=(3.4 * len(saved), 3 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(saved), squeeze=False)
    for panels, (x, y) in zip(axes, rows):
        for panel, (name, (arrays, *_)) in zip(panels, saved.items()):
            r = statistics.correlate(arrays[x], arrays[y])["pearson"]
            text = f"{r:.3f}".replace("-", "−")
            plots.scatter_with_line(panel, arrays[x], arrays[y])
            panel.set(xlabel=labels[x], title=f"{TITLES[name]}, r = {text}")
        panels[0].set_ylabel(labels[y])
    plots.save_figure(figure, path, pdf=True)


# The script


def parse_arguments(doc=__doc__):
    parser = run.experiment_parser(doc)
    add, number = parser.add_argument, run.whole_number
    add("--dataset", nargs="+", choices=RADII, default=list(PUBLISHED), help="which datasets")
    add("--runs", type=number(4), default=DEFAULTS["runs"], help="networks per dataset")
    add("--epochs", type=number(1), default=DEFAULTS["epochs"], help="passes over the images")
    few = f"default: {DEFAULTS['batches']}; {SAMPLE_BATCHES} with --sample"
    add("--batches", type=number(1), help=f"batches that φ and ψ are means over ({few})")
    add("--sphere", action="store_true", help="draw φ's directions from the whole sphere")
    args = parser.parse_args()
    args.dataset = list(dict.fromkeys(args.dataset))
    defaults = DEFAULTS | {"batches": SAMPLE_BATCHES} if args.sample else DEFAULTS
    args.batches = args.batches or defaults["batches"]
    args.figures = run.figures_folder(args, defaults)
    return args


def main():
    args = parse_arguments()
    folder = args.figures / "correlation"
    if not args.plot_only:
        results.check_writable(folder)
        for name in args.dataset:
            load_data(name, args)  # fetches it, if it is missing, before the workers start
        results.warn_of_other_code([training_log(stack, args) for stack in stacks(args)])
        run.run_tasks(measure, stacks(args), args, args.epochs + args.batches, "step")
        for name in args.dataset:
            results.save(folder / f"{name}.npz", collect(name, args))

    saved = results.read_all(folder, RADII, required=args.dataset)
    summaries = {name: summarise(name, result.arrays) for name, result in saved.items()}
    adjust(summaries)
    table = table_1(summaries, next(iter(saved.values())).settings)
    results.save_summaries(folder / "summary.json", saved, summaries)
    results.save_text(args.figures / "table_1.md", table)
    results.save_text(folder / "table.md", details(summaries))
    draw(args.figures / "figure_9", saved, FIGURE_9)
    draw(args.figures / "figure_10", saved, FIGURE_10)
    print(f"\n{table}\nTable 1, Figures 9 and 10: {args.figures}")
    print(f"More correlations, and each network's values: {folder}")


if __name__ == "__main__":
    run.run(main)
