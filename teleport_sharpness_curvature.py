"""Figure 4: what teleports to another sharpness or curvature do to the test loss.

    python teleport_sharpness_curvature.py                     # CIFAR-10, as published
    python teleport_sharpness_curvature.py --dataset MNIST     # the same on MNIST
    python teleport_sharpness_curvature.py --sample            # on the images that ship

Networks train by SGD. At the start of epoch index 20 they are teleported, once before each of the
first mini-batches, and go on with SGD. The paper has the first five arms; two are controls:

    plain                                     SGD alone
    sharpness decrease, sharpness increase    teleports on the mean loss of perturbed weights
    curvature decrease, curvature increase    teleports on κ, the curvature of one curve exp(tM)
    random                                    moves as long as those of sharpness decrease, in
                                              random directions
    refit                                     the pseudoinverse action with g = I alone

Sharpness φ and curvature ψ, which are measured after each epoch, are Table 1's. Training goes to
logs/generalization/; an interrupted run resumes from there.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

import models
from data import TITLES, load_data, shuffled_batch
from experiment import plots, results, run, statistics
from teleportation import (
    PSEUDOINVERSE,
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

DEFAULTS = {"runs": 20}  # published: 5
STACK = 10  # runs that share the products of perturbations and images; two cores take 20
ACTIVATION, ACTION = models.LeakyReLU(), PSEUDOINVERSE
CLAIMS = {  # of the paper, for each arm that teleports: how the test loss changes
    "sharpness decrease": "changes little",
    "sharpness increase": "rises",
    "curvature decrease": "rises",
    "curvature increase": "falls",
}
ARMS = ("plain", *CLAIMS, "random", "refit")
CONTROLS = {"sharpness decrease": "random"}
PANELS = {
    "sharpness": ("sharpness decrease", "sharpness increase", "refit", "random"),
    "curvature": ("curvature decrease", "curvature increase", "refit"),
}
CURVES = "train_loss", "test_loss", "test_accuracy", "sharpness", "curvature"
MEASURES = {"batch_loss": "loss", "perturbed_loss": "perturbed loss", "kappa": "κ"}
LITTLE = 0.01  # of plain's final test loss
EPOCHS_SHOWN = 21, 25, 40  # in the table
COLORS = plots.BLACK, plots.BLUE, plots.RED, plots.GREY, plots.GREEN


class Setting(NamedTuple):
    """How a dataset's networks are trained, teleported and measured."""

    widths: tuple
    lr: float
    teleport_lr: tuple  # of each arm of CLAIMS, on T or t; negative to decrease
    teleports: tuple = (10, 2, 5, 5)  # of each arm: so many mini-batches have one before
    # of the arms in sharpness: a network stops where the published objective is above this;
    # published: 2.0 twice, but then two in five networks on CIFAR-10 would not begin to decrease it
    stop: tuple = (4.0, 2.0)
    max_t_norm: float = 10.0  # |T|_F of a step in sharpness, so that none leaves float32
    max_tm_norm: float = 1.0  # |tM|_F of a step in curvature, likewise: dκ/dt may be 10 and more
    sharpness_steps: int = 10  # of ascent in a teleport; in curvature, one
    radii: tuple = tuple(i / 10 for i in range(1, 10))  # of the perturbations that teleports see
    directions: int = 100  # of them for each radius
    pair: int = 1  # of layers that curvature teleports act on: the second
    epochs: int = 40
    teleport_epoch: int = 20  # index of the epoch that begins with teleports
    teleport_batch: int = 2000
    measured_directions: int = 3  # for each radius, where the perturbed loss is measured
    estimation_batches: int = 20  # that φ and ψ are means over
    estimation_batch: int = 200


SETTINGS = {
    "CIFAR10": Setting(
        (3072, 32, 10, 10), 2e-2, (-5e-2, 5e-2, -5e-2, 2e-1), (10, 2, 5, 10), max_tm_norm=5.0
    ),  # where no step is as long
    "MNIST": Setting(*models.TRAINING["MNIST"], (-5e-2, 5e-2, -5e-2, 2e-1)),
    "FashionMNIST": Setting(*models.TRAINING["FashionMNIST"], (-3e-1, 1e-1, -3e-3, 5e-3)),
}
PUBLISHED_SCALE = 0.9  # the published objective is the sum of the 900 losses over 1,000
SAMPLE_SCALE = 0.1  # of rates, lengths and directions: the sample's networks are far from a minimum


class Stack(NamedTuple):
    """Runs of a dataset, by the index of their seed; all arms of them are trained as one."""

    dataset: str
    runs: range
    setting: Setting


class Experiment(NamedTuple):
    """Arms, the first of which is plain SGD, how they move, and what is said of them."""

    name: str  # of its folders
    arms: tuple
    move: Callable  # (weights [arms, runs, …], x, y, k, stack): moves the arms in place
    claims: dict  # {arm: a value of CLAIMS}
    controls: dict  # {arm: the arm that it is compared with, beside plain}
    panels: dict  # {quantity: the arms in its panels}
    code: tuple  # the files that determine it, beside the core


# Moves. x: [d_0, n] and y: [n] are the batch of the moves before the k-th mini-batch, which all
# arms and runs share.


def perturbed_loss(weights, x, y, k, setting):
    """Return the mean loss of perturbed weights [...], which sharpness teleports change."""
    radii = np.repeat(setting.radii, setting.measured_directions)
    rng = torch.Generator().manual_seed(models.SEED + k)
    directions = random_directions(setting.widths, radii, rng)
    return sharpness(weights, x, y, [d.to(x) for d in directions], ACTIVATION)


def generator(k, setting):
    """Return M [d, d] of the curve exp(tM) along which the k-th curvature teleports move."""
    d = setting.widths[setting.pair + 1]
    return torch.rand(d, d, generator=torch.Generator().manual_seed(models.SEED + k))


def kappa(weights, x, k, setting):
    """Return κ [...] along the curve exp(tM), which curvature teleports change."""
    M = generator(k, setting).to(x)
    return curvature_along(weights, x, M, setting.pair, ACTIVATION, ACTION)[0]


def measure(weights, x, y, k, setting):
    """Return the MEASURES of networks, {name: [...]}."""
    loss = models.cross_entropy(weights, x, y, ACTIVATION)
    values = loss, perturbed_loss(weights, x, y, k, setting), kappa(weights, x, k, setting)
    return dict(zip(MEASURES, values))


def put(weights, arms, moved):
    """Replace the weights of arms, an index or a list of indices, in place."""
    for w, new in zip(weights, moved):
        w[arms] = new


def teleport_arms(weights, x, y, k, setting):
    """Teleport the arms of CLAIMS in place, as often as each has to; weights: [4, runs, …].

    Returns the group elements of sharpness decrease: [runs, d, d] for each pair, or None.
    """
    lr, stop = (torch.tensor(v)[:, None].to(x) for v in (setting.teleport_lr, setting.stop))
    going = [i for i, number in enumerate(setting.teleports) if k < number]
    elements = None
    if arms := [i for i in going if i < len(stop)]:  # in sharpness
        stack, rates = [w[arms] for w in weights], PUBLISHED_SCALE * lr[arms]
        draws = setting.sharpness_steps, setting.radii, setting.directions, k
        limits = stop[arms] / PUBLISHED_SCALE, setting.max_t_norm
        moved, path = teleport_sharpness(
            stack, x, y, rates, *draws, ACTIVATION, *limits, return_path=True, action=ACTION
        )
        put(weights, arms, moved)
        elements = [g[0] for g in path["group_elements"]] if 0 in arms else None
    if arms := [i for i in going if i >= len(stop)]:  # in curvature
        stack, M = [w[arms] for w in weights], generator(k, setting).to(x)
        how = ACTIVATION, setting.pair, setting.max_tm_norm, ACTION
        put(weights, arms, teleport_curvature(stack, x, lr[arms], [M], *how)[0])
    return elements


def random_elements(elements, k, runs, action=ACTION):
    """Draw group elements of the norms |g_m − I|_F given, each run's from a seed of its own.

    elements: g_m: [runs, d, d] for each pair, and so is what is returned.
    """
    draws = []
    for i, seed in enumerate(models.run_seeds(runs)):
        rng = torch.Generator().manual_seed(seed + 1 + k)
        draws.append(random_group_elements([g[i] for g in elements], rng, action))
    return [torch.stack(pair) for pair in zip(*draws)]


def move_arms(weights, x, y, k, stack):
    """Move the paper's arms and the controls in place."""
    elements = teleport_arms([w[1:5] for w in weights], x, y, k, stack.setting)
    controls = {"refit": [torch.eye(w.shape[-2]).to(w) for w in weights[:-1]]}
    if elements:
        controls["random"] = random_elements(elements, k, stack.runs)
    for arm, g in controls.items():
        i = ARMS.index(arm)
        put(weights, i, act([w[i] for w in weights], x, g, ACTIVATION, ACTION))


PAPER = Experiment("generalization", ARMS, move_arms, CLAIMS, CONTROLS, PANELS, (__file__,))


# Training


def stacks(args):
    """Return the stacks of the datasets and runs asked for; only a CPU splits a dataset's runs."""
    runs, size = range(args.runs), STACK if args.device.type == "cpu" else args.runs
    stacks = []
    for dataset in args.dataset:
        setting = SETTINGS[dataset]
        if args.sample:
            setting = setting._replace(
                teleport_lr=tuple(SAMPLE_SCALE * lr for lr in setting.teleport_lr),
                max_tm_norm=SAMPLE_SCALE * setting.max_tm_norm,
                directions=round(SAMPLE_SCALE * setting.directions),
            )
        stacks += [Stack(dataset, runs[i : i + size], setting) for i in runs[::size]]
    return stacks


def training_log(experiment, stack, args):
    """Return the Log of a stack's training."""
    settings = stack.setting._asdict() | {
        "dataset": stack.dataset,
        "sample": args.sample,
        "device": args.device.type,
        "seeds": models.run_seeds(stack.runs),
        "arms": experiment.arms,
        "batch": models.BATCH,
        "activation": str(ACTIVATION),
        "action": ACTION.name,
        "published_scale": PUBLISHED_SCALE,
        "estimation_radii": list(RADII[stack.dataset]),
    }
    folder = args.output / "logs" / experiment.name / f"{stack.dataset}{'-sample' * args.sample}"
    path = folder / f"runs{stack.runs[0]:03d}-{stack.runs[-1]:03d}.npz"
    return results.Log(path, settings, experiment.code)


def train(experiment, stack, args, bar):
    """Train the arms of a stack; resumes from logs/.

    Saves the CURVES after each epoch, [epochs, arms, runs]; the MEASURES before and after each
    move, [moves, 2, arms, runs]; and which networks have `diverged`, [arms, runs], whose numbers
    are nan from then on. Raises UserError where all networks diverge.
    """
    data = load_data(stack.dataset, args)

    def start():
        weights = models.init_weights(stack.setting.widths, models.run_seeds(stack.runs))
        never = np.zeros((1, len(stack.runs)), bool)
        return models.to_arrays([w[None] for w in weights]) | {"diverged": never}

    def step(state):
        try:
            return train_epoch(state, data, experiment, stack)
        except ValueError as error:
            where = f"{stack.dataset}, epoch {state['steps']}"
            raise results.UserError(f"{where}: {error}.") from None

    results.resume(training_log(experiment, stack, args), start, step, stack.setting.epochs, bar)


@torch.no_grad()
def train_epoch(state, data, experiment, stack):
    """Return the state of a stack, as `train` saves it, after one epoch more.

    Raises ValueError where all networks diverge.
    """
    setting, arms = stack.setting, len(experiment.arms)
    moves, loss = range(0), 0
    weights = models.from_arrays(state, data.x_train.device)
    diverged = torch.tensor(state["diverged"], device=data.x_train.device)
    if state["steps"] == setting.teleport_epoch:  # until now all arms were one
        weights = [w.repeat(arms, 1, 1, 1) for w in weights]
        diverged, moves = diverged.repeat(arms, 1), range(max(setting.teleports))

    def append(state, rows):
        for key, row in rows.items():
            rows[key] = row.masked_fill(diverged, math.nan).expand(*row.shape[:-2], arms, -1)
        return results.append(state, **rows)

    batches = math.ceil(len(data.x_train) / models.BATCH)
    for k, end in pairwise([*moves, len(moves), batches]):
        measured = {}
        if k in moves:
            measured = move_and_measure(weights, diverged, data, experiment, stack, k)
        rows = slice(k * models.BATCH, end * models.BATCH)
        x, y = data.x_train[rows], data.y_train[rows]
        part = models.train_epoch_sgd(weights, x, y, setting.lr, ACTIVATION, check=False)
        models.replace_diverged(weights, diverged)
        state, loss = append(state, measured), loss + (end - k) * part
    test = models.evaluate(weights, data.x_test, data.y_test, ACTIVATION)
    curves = loss / batches, *test, *sharpness_and_curvature(weights, data, setting)
    state = append(state, dict(zip(CURVES, curves)))
    return state | models.to_arrays(weights) | {"diverged": diverged}


def move_and_measure(weights, diverged, data, experiment, stack, k):
    """Move the arms for the k-th time, in place; return the MEASURES before and after, [2, …]."""
    x, y = shuffled_batch(data, stack.setting.teleport_batch, k)
    before = measure(weights, x, y, k, stack.setting)
    experiment.move(weights, x, y, k, stack)
    models.replace_diverged(weights, diverged)
    after = measure(weights, x, y, k, stack.setting)
    return {key: torch.stack([before[key], after[key]]) for key in MEASURES}


def sharpness_and_curvature(weights, data, setting):
    """Return Table 1's φ and ψ of networks, each [arms, runs]."""
    estimates = []
    for k in range(setting.estimation_batches):
        x, y = shuffled_batch(data, setting.estimation_batch, k)
        estimates.append(estimate(weights, x, y, RADII[data.name], k, ACTIVATION)[:2])
    return [torch.stack(values).mean(0) for values in zip(*estimates)]


def collect(logs, experiment, args):
    """Return the Result of a dataset, whose stacks have these Logs; `arms` are their names."""
    parts = [results.load(log, log.settings["epochs"]) for log in logs]
    keys = *CURVES, *MEASURES, "diverged"
    arrays = {key: np.concatenate([part.arrays[key] for part in parts], -1) for key in keys}
    settings = parts[0].settings | {"seeds": models.run_seeds(range(args.runs))}
    return results.Result(arrays | {"arms": experiment.arms}, settings, parts[0].made_with)


# Statistics


def verdict(claim, difference, little):
    """Return what a paired difference with its 95 % interval says of one of the CLAIMS.

    little: the largest difference that counts as little; that claim holds if the whole interval
    lies within it.
    """
    low, high = difference["low"], difference["high"]
    if np.isnan(low):  # too few runs are left
        return ""
    if claim == "changes little":
        within, beyond = max(-low, high) < little, max(low, -high) > little
        return "holds" if within else "does not hold" if beyond else "open"
    seen = "rises" if low > 0 else "falls" if high < 0 else None
    return "holds" if seen == claim else "opposite" if seen else "not seen"


def summarise(arrays, experiment):
    """Return plain's mean test loss, paired differences of test losses, and what moves changed.

    Losses are those after the epochs EPOCHS_SHOWN. `moves` has medians over the networks of an arm
    of the MEASURES before its first move and of their change by all its moves; networks that
    diverged in the course of the moves are left out.
    """
    arms, epochs = experiment.arms, len(arrays["test_loss"])
    loss = dict(zip(arms, arrays["test_loss"].swapaxes(0, 1)))
    shown = sorted({min(epoch, epochs) for epoch in EPOCHS_SHOWN})
    plain = {epoch: np.nanmean(loss["plain"][epoch - 1], dtype=float) for epoch in shown}
    pairs = [(arm, "plain") for arm in arms[1:]] + list(experiment.controls.items())
    differences = statistics.compare_arms(loss, pairs, shown)
    for arm, claim in experiment.claims.items():
        for difference in differences[f"{arm} − plain"].values():
            difference["verdict"] = verdict(claim, difference, LITTLE * plain[shown[-1]])
    before = {key: arrays[key][0, 0] for key in MEASURES}
    change = {key: (arrays[key][:, 1] - arrays[key][:, 0]).sum(0) for key in MEASURES}
    moved = np.any([np.abs(values) > 0 for values in change.values()], 0).sum(1)
    moves = {
        arm: {
            "networks": moved[i],
            "before": {key: np.nanmedian(values[i]) for key, values in before.items()},
            "change": {key: np.nanmedian(values[i]) for key, values in change.items()},
        }
        for i, arm in enumerate(arms[1:], 1)
    }
    diverged = dict(zip(arms, arrays["diverged"].sum(1)))
    return {"plain": plain, "differences": differences, "diverged": diverged, "moves": moves}


def loss_table(dataset, summary, claims):
    """Return the test loss of plain, and differences of test losses, as Markdown."""
    diverged = {arm: f" ({n} diverged)" if n else "" for arm, n in summary["diverged"].items()}
    losses = (f"{loss:.3f}" for loss in summary["plain"].values())
    rows = [[f"test loss of plain{diverged['plain']}", *losses]]
    for pair, by_epoch in summary["differences"].items():
        arm, other = pair.split(" − ")
        claim = f" (claim: {claims[arm]})" if other == "plain" and arm in claims else ""
        texts = (f"{plots.difference_text(d)} {d.get('verdict', '')}" for d in by_epoch.values())
        rows.append([f"{arm}{diverged[arm]} − {other}{claim}", *map(str.strip, texts)])
    epochs = [f"after epoch {epoch}" for epoch in summary["plain"]]
    return plots.markdown([f"{TITLES[dataset]}: differences in 10⁻³", *epochs], rows)


def move_table(summaries):
    """Return what the moves of each dataset's arms changed as Markdown."""
    rows = []
    for dataset, summary in summaries.items():
        for arm, moves in summary["moves"].items():
            values = *moves["before"].values(), *moves["change"].values()
            cells = [f"{value:.3g}".replace("-", "−") for value in values]
            rows.append([f"{TITLES[dataset]}, {arm}", str(moves["networks"]), *cells])
    names = MEASURES.values()
    header = [f"{name} before" for name in names] + [f"change of {name}" for name in names]
    return plots.markdown(["all moves of an arm, median", "networks moved", *header], rows)


# Figures


def draw_losses(path, dataset, arrays, pdf=False):
    """Draw Figure 4: the losses of the paper's arms, a quantity in each panel."""
    figure = Figure(figsize=(8.4, 3.8), layout="constrained")
    epochs = 1 + np.arange(len(arrays["test_loss"]))
    for axes, quantity in zip(figure.subplots(1, 2, sharey=True), PANELS):
        for color, label in zip(COLORS, ("plain", "decrease", "increase")):
            i = ARMS.index(label if label == "plain" else f"{quantity} {label}")
            for key, line in (("train", "--"), ("test", "-")):
                style = {"color": color, "ls": line, "label": f"{label}, {key}"}
                plots.plot_mean(axes, epochs, arrays[f"{key}_loss"][:, i], **style)
        axes.set(title=f"{TITLES[dataset]}, {quantity}", xlabel="epoch", ylabel="loss")
        plots.plain_log_axis(axes, "y")
    plots.legend_below(figure, axes, columns=3)
    plots.save_figure(figure, path, pdf)


def draw_differences(path, dataset, arrays, experiment):
    """Draw the test loss minus plain's, and φ or ψ, of the arms in an experiment's panels."""
    figure = Figure(figsize=(8.4, 6.8), layout="constrained")
    first = SETTINGS[dataset].teleport_epoch - 1
    epochs = 1 + np.arange(first, len(arrays["test_loss"]))
    for (upper, lower), quantity in zip(figure.subplots(2, 2).T, experiment.panels):
        arms = "plain", *experiment.panels[quantity]
        index = [experiment.arms.index(arm) for arm in arms]
        plain, *loss = arrays["test_loss"][first:, index].swapaxes(0, 1)
        plots.plot_differences(upper, epochs, dict(zip(arms[1:], loss)), plain, COLORS[1:])
        for color, arm, i in zip(COLORS, arms, index):
            values = arrays[quantity][first:, i]
            lower.plot(epochs, np.nanmean(values, 1), color=color, label=arm)
        lower.set(title=f"{TITLES[dataset]}, Table 1's {quantity}", xlabel="epoch")
        lower.legend(fontsize="small")
    plots.save_figure(figure, path)


# The script


def parse_arguments(doc=__doc__):
    """Return the options of a script with the docstring `doc`."""
    parser = run.experiment_parser(doc)
    add, number = parser.add_argument, run.whole_number
    add("--dataset", nargs="+", choices=SETTINGS, default=["CIFAR10"], help="which datasets")
    add("--runs", type=number(2), default=DEFAULTS["runs"], help="runs of each arm; published: 5")
    return parser.parse_args()


def run_experiment(experiment, args, folder):
    """Train what logs/ lacks, unless --plot-only; write the tables; return {dataset: arrays}."""
    if not args.plot_only:
        results.check_writable(folder)
        for dataset in args.dataset:
            load_data(dataset, args)  # fetches it, if it is missing, before the workers start
        logs = {stack: training_log(experiment, stack, args) for stack in stacks(args)}
        results.warn_of_other_code(logs.values())
        updates = [stack.setting.epochs for stack in logs]
        run.run_tasks(partial(train, experiment), list(logs), args, updates, "epoch")
        for dataset in args.dataset:
            parts = [log for stack, log in logs.items() if stack.dataset == dataset]
            results.save(folder / f"{dataset}.npz", collect(parts, experiment, args))

    saved = results.read_all(folder, SETTINGS, required=args.dataset)
    summaries = {name: summarise(result.arrays, experiment) for name, result in saved.items()}
    results.save_summaries(folder / "summary.json", saved, summaries)
    tables = [loss_table(name, s, experiment.claims) for name, s in summaries.items()]
    text = "\n".join([*tables, move_table(summaries)])
    results.save_text(folder / "table.md", text)
    print(f"\n{text}\nTables, figures, and each run's curves: {folder}")
    return {name: result.arrays for name, result in saved.items()}


def main():
    args = parse_arguments()
    figures = run.figures_folder(args, DEFAULTS)
    folder = figures / PAPER.name
    for name, arrays in run_experiment(PAPER, args, folder).items():
        if name == "CIFAR10":
            draw_losses(figures / "figure_4", name, arrays, pdf=True)
            print(f"Figure 4: {figures}")
        else:
            draw_losses(folder / f"{name}_losses", name, arrays)
        draw_differences(folder / f"{name}_differences", name, arrays, PAPER)


if __name__ == "__main__":
    run.run(main)
