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
logs/generalization/; an interrupted run resumes from there, even between two teleports.
"""

import math
from collections.abc import Callable
from functools import partial
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
    """How a dataset's networks are trained, teleported and measured.

    teleport_lr and teleports have an entry for each arm of CLAIMS, in their order; stop has one for
    each of the first two, those in sharpness.
    """

    widths: tuple
    lr: float
    teleport_lr: tuple  # on T (sharpness) or t (curvature); negative to decrease
    teleports: tuple = (10, 2, 5, 5)  # mini-batches with one before them
    # a network stops where the published objective is above this; published: 2.0 twice, but then
    # two in five networks on CIFAR-10 would not begin to decrease it
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
    """Arms, the first of which is plain SGD, and how they move."""

    name: str  # of its folders
    arms: tuple
    move: Callable  # (weights [arms, runs, …], x, y, k, stack): moves the arms in place
    code: tuple  # the files that determine it, beside the core


# Moves. x: [d_0, n] and y: [n] are the batch of the moves before the k-th mini-batch, which all
# arms and runs share.


def generator(k, setting):
    """Return M [d, d] of the curve exp(tM) along which the k-th curvature teleports move."""
    d = setting.widths[setting.pair + 1]
    return torch.rand(d, d, generator=torch.Generator().manual_seed(models.SEED + k))


def perturbed_loss(weights, x, y, k, setting):
    """Return the mean loss of perturbed weights [...], which sharpness teleports change."""
    radii = np.repeat(setting.radii, setting.measured_directions)
    rng = torch.Generator().manual_seed(models.SEED + k)
    directions = random_directions(setting.widths, radii, rng)
    return sharpness(weights, x, y, [d.to(x) for d in directions], ACTIVATION)


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
    elements = None
    going = [i for i, number in enumerate(setting.teleports) if k < number]
    if arms := [i for i in going if i < len(stop)]:
        moved, path = teleport_sharpness(
            [w[arms] for w in weights],
            x,
            y,
            lr=PUBLISHED_SCALE * lr[arms],
            steps=setting.sharpness_steps,
            radii=setting.radii,
            per_radius=setting.directions,
            seed=k,
            activation=ACTIVATION,
            stop=stop[arms] / PUBLISHED_SCALE,
            max_norm=setting.max_t_norm,
            return_path=True,
            action=ACTION,
        )
        put(weights, arms, moved)
        elements = [g[0] for g in path["group_elements"]] if 0 in arms else None
    if arms := [i for i in going if i >= len(stop)]:
        M, how = generator(k, setting).to(x), (setting.pair, setting.max_tm_norm, ACTION)
        stack = [w[arms] for w in weights]
        put(weights, arms, teleport_curvature(stack, x, lr[arms], [M], ACTIVATION, *how)[0])
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


PAPER = Experiment("generalization", ARMS, move_arms, (__file__,))


# Training


def stacks(dataset, args):
    """Return the Stacks of a dataset; only a CPU splits its runs."""
    setting = SETTINGS[dataset]
    if args.sample:
        setting = setting._replace(
            teleport_lr=tuple(SAMPLE_SCALE * lr for lr in setting.teleport_lr),
            max_tm_norm=SAMPLE_SCALE * setting.max_tm_norm,
            directions=round(SAMPLE_SCALE * setting.directions),
        )
    size = STACK if args.device.type == "cpu" else args.runs
    firsts = range(0, args.runs, size)
    return [Stack(dataset, range(i, min(i + size, args.runs)), setting) for i in firsts]


def steps(setting):
    """Return the number of steps of `train`."""
    return setting.epochs + max(setting.teleports)


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
        "action": ACTION.act.__name__,
        "published_scale": PUBLISHED_SCALE,
        "estimation_radii": list(RADII[stack.dataset]),
    }
    folder = args.output / "logs" / experiment.name / f"{stack.dataset}{'-sample' * args.sample}"
    path = folder / f"runs{stack.runs[0]:03d}-{stack.runs[-1]:03d}.npz"
    return results.Log(path, settings, experiment.code)


def train(experiment, stack, args, bar):
    """Train the arms of a stack; resumes from logs/. A step is an epoch, or a move of each arm.

    Saves the CURVES after each epoch, [epochs, arms, runs]; the MEASURES before and after each
    move, [moves, 2, arms, runs]; and which networks have `diverged`, [arms, runs], whose numbers
    are nan from then on. Raises UserError where plain SGD diverges.
    """
    data, setting, arms = load_data(stack.dataset, args), stack.setting, len(experiment.arms)
    moves = max(setting.teleports)

    def start():
        weights = models.init_weights(setting.widths, models.run_seeds(stack.runs))
        never = np.zeros((1, len(stack.runs)), bool)
        return models.to_arrays([w[None] for w in weights]) | {"diverged": never}

    def step(state):
        k = int(state["steps"]) - setting.teleport_epoch
        weights = models.from_arrays(state, args.device)
        diverged = torch.tensor(state["diverged"], device=args.device)
        if k == 0:  # until now all arms were one
            weights = [w.repeat(arms, 1, 1, 1) for w in weights]
            diverged = diverged.repeat(arms, 1)
        try:
            if 0 <= k < moves:
                rows = move_and_train(weights, diverged, data, experiment, stack, k)
            else:
                losses = state["move_losses"] if k == moves else ()
                rows = train_epoch(weights, diverged, data, setting, losses)
        except ValueError as error:
            epoch = len(state.get("test_loss", ()))
            raise results.UserError(f"{stack.dataset}, epoch {epoch}: {error}.") from None
        for key, row in rows.items():
            rows[key] = row.masked_fill(diverged, math.nan).expand(*row.shape[:-2], arms, -1)
        return results.append(state, **rows) | models.to_arrays(weights) | {"diverged": diverged}

    results.resume(training_log(experiment, stack, args), start, step, steps(setting), bar)


@torch.no_grad()
def move_and_train(weights, diverged, data, experiment, stack, k):
    """Move each arm for the k-th time and train on the mini-batch that follows, in place.

    Returns the MEASURES before and after the move, [2, arms, runs], and the mini-batch's loss.
    """
    x, y = shuffled_batch(data, stack.setting.teleport_batch, k)
    before = measure(weights, x, y, k, stack.setting)
    experiment.move(weights, x, y, k, stack)
    models.replace_diverged(weights, diverged)
    after = measure(weights, x, y, k, stack.setting)
    rows = slice(k * models.BATCH, (k + 1) * models.BATCH)
    loss = train_rows(weights, diverged, data, stack.setting.lr, rows)
    return {key: torch.stack([before[key], after[key]]) for key in MEASURES} | {"move_losses": loss}


def train_epoch(weights, diverged, data, setting, move_losses):
    """Train for an epoch, or for what the moves have left of it, in place; return the CURVES.

    move_losses: of the mini-batches that followed the moves, [moves, arms, runs].
    """
    batches, first = math.ceil(len(data.x_train) / models.BATCH), len(move_losses)
    rest = train_rows(weights, diverged, data, setting.lr, slice(first * models.BATCH, None))
    loss = (torch.as_tensor(np.sum(move_losses, 0)).to(rest) + (batches - first) * rest) / batches
    test = models.evaluate(weights, data.x_test, data.y_test, ACTIVATION)
    estimates = []
    for k in range(setting.estimation_batches):
        x, y = shuffled_batch(data, setting.estimation_batch, k)
        estimates.append(estimate(weights, x, y, RADII[data.name], k, ACTIVATION)[:2])
    phi, psi = (torch.stack(values).mean(0) for values in zip(*estimates))
    return dict(zip(CURVES, (loss, *test, phi, psi)))


def train_rows(weights, diverged, data, lr, rows):
    """Train in place on a slice of the images; return the mean loss [arms, runs].

    Raises ValueError where plain SGD diverges.
    """
    x, y = data.x_train[rows], data.y_train[rows]
    loss = models.train_epoch_sgd(weights, x, y, lr, ACTIVATION, check=False)
    models.replace_diverged(weights, diverged)
    if diverged[0].any():
        raise ValueError("plain SGD diverges: it needs a lower lr")
    return loss


def compute(experiment, args, folder):
    """Train what logs/ lacks, and save the Result of each dataset asked for in `folder`."""
    results.check_writable(folder)
    for dataset in args.dataset:
        load_data(dataset, args)  # fetches it, if it is missing, before the workers start
    tasks = [stack for dataset in args.dataset for stack in stacks(dataset, args)]
    results.warn_of_other_code([training_log(experiment, stack, args) for stack in tasks])
    updates = steps(tasks[0].setting)
    run.run_tasks(partial(train, experiment), tasks, args, updates, "step")
    for dataset in args.dataset:
        logs = [training_log(experiment, s, args) for s in tasks if s.dataset == dataset]
        parts = [results.load(log, updates) for log in logs]
        keys = *CURVES, *MEASURES, "diverged"
        arrays = {key: np.concatenate([part.arrays[key] for part in parts], -1) for key in keys}
        settings = parts[0].settings | {"seeds": models.run_seeds(range(args.runs))}
        result = results.Result(arrays | {"arms": experiment.arms}, settings, parts[0].made_with)
        results.save(folder / f"{dataset}.npz", result)


# Statistics


def verdict(claim, difference, little):
    """Return what a paired difference with its 95 % interval says of one of the CLAIMS.

    little: the largest difference that counts as little; that claim holds if the whole interval
    lies within it.
    """
    low, high = difference["low"], difference["high"]
    if np.isnan(low):
        return "too few"
    if claim == "changes little":
        if max(-low, high) < little:
            return "holds"
        return "does not hold" if max(low, -high) > little else "open"
    seen = "rises" if low > 0 else "falls" if high < 0 else None
    return "holds" if seen == claim else "opposite" if seen else "not seen"


def summarise(arrays, claims, controls):
    """Return plain's mean test loss, paired differences of test losses, and what moves changed.

    claims: {arm: a value of CLAIMS}, whose arms get verdicts; controls: {arm: its control}. Losses
    are those after the epochs EPOCHS_SHOWN. `moves` has medians over the networks of an arm of the
    MEASURES before its first move and of their change by all its moves; networks that diverged in
    the course of the moves are left out.
    """
    arms, epochs = list(arrays["arms"]), len(arrays["test_loss"])
    loss = {arm: arrays["test_loss"][:, i] for i, arm in enumerate(arms)}
    shown = sorted({min(epoch, epochs) for epoch in EPOCHS_SHOWN})
    plain = {epoch: loss["plain"][epoch - 1].mean(dtype=float) for epoch in shown}
    pairs = [(arm, "plain") for arm in arms[1:]] + list(controls.items())
    differences = statistics.compare_arms(loss, pairs, shown)
    for (arm, other), by_epoch in zip(pairs, differences.values()):
        for difference in by_epoch.values() if other == "plain" and arm in claims else ():
            difference["verdict"] = verdict(claims[arm], difference, LITTLE * plain[shown[-1]])
    before = {key: arrays[key][0, 0] for key in MEASURES}
    change = {key: (arrays[key][:, 1] - arrays[key][:, 0]).sum(0) for key in MEASURES}
    moves = {
        arm: {
            "networks": np.any([np.abs(values[i]) > 0 for values in change.values()], 0).sum(),
            "before": {key: np.nanmedian(before[key][i]) for key in MEASURES},
            "change": {key: np.nanmedian(change[key][i]) for key in MEASURES},
        }
        for i, arm in enumerate(arms[1:], 1)
    }
    diverged = dict(zip(arms, arrays["diverged"].sum(1)))
    return {"plain": plain, "differences": differences, "diverged": diverged, "moves": moves}


def loss_table(dataset, summary, claims):
    """Return the test loss of plain, and differences of test losses, as Markdown."""
    diverged = {arm: f" ({n} diverged)" if n else "" for arm, n in summary["diverged"].items()}
    rows = [["test loss of plain", *(f"{loss:.3f}" for loss in summary["plain"].values())]]
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
    header = ["all moves of an arm, median", "networks moved"]
    header += [f"{name} before" for name in MEASURES.values()]
    header += [f"change of {name}" for name in MEASURES.values()]
    return plots.markdown(header, rows)


# Figures


def draw_losses(path, dataset, arrays, pdf=False):
    """Draw Figure 4: the losses of the paper's arms, a quantity in each panel."""
    figure = Figure(figsize=(8.4, 3.8), layout="constrained")
    epochs, names = 1 + np.arange(len(arrays["test_loss"])), list(arrays["arms"])
    for axes, quantity in zip(figure.subplots(1, 2, sharey=True), PANELS):
        for color, label in zip(COLORS, ("plain", "decrease", "increase")):
            i = names.index(label if label == "plain" else f"{quantity} {label}")
            for key, line in (("train", "--"), ("test", "-")):
                style = {"color": color, "ls": line, "label": f"{label}, {key}"}
                plots.plot_mean(axes, epochs, arrays[f"{key}_loss"][:, i], **style)
        axes.set(title=f"{TITLES[dataset]}, {quantity}", xlabel="epoch", ylabel="loss")
        plots.plain_log_axis(axes, "y")
    plots.legend_below(figure, axes, columns=3)
    plots.save_figure(figure, path, pdf)


def draw_differences(path, dataset, arrays, panels):
    """Draw the test loss minus plain's, and φ or ψ, of arms; panels: {quantity: its arms}."""
    figure = Figure(figsize=(8.4, 6.8), layout="constrained")
    first, names = SETTINGS[dataset].teleport_epoch - 1, list(arrays["arms"])
    epochs = 1 + np.arange(first, len(arrays["test_loss"]))
    for (upper, lower), (quantity, arms) in zip(figure.subplots(2, 2).T, panels.items()):
        plain, *loss = (arrays["test_loss"][first:, names.index(arm)] for arm in ("plain", *arms))
        plots.plot_differences(upper, epochs, dict(zip(arms, loss)), plain, COLORS[1:])
        for color, arm in zip(COLORS, ("plain", *arms)):
            values = arrays[quantity][first:, names.index(arm)]
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
    args = parser.parse_args()
    args.dataset = list(dict.fromkeys(args.dataset))
    return args


def main():
    args = parse_arguments(__doc__)
    figures = run.figures_folder(args, DEFAULTS)
    folder = figures / PAPER.name
    if not args.plot_only:
        compute(PAPER, args, folder)

    saved = results.read_all(folder, SETTINGS, required=args.dataset)
    arrays = {name: result.arrays for name, result in saved.items()}
    summaries = {name: summarise(values, CLAIMS, CONTROLS) for name, values in arrays.items()}
    results.save_summaries(folder / "summary.json", saved, summaries)
    tables = {name: loss_table(name, summary, CLAIMS) for name, summary in summaries.items()}
    results.save_text(folder / "table.md", "\n".join([*tables.values(), move_table(summaries)]))
    for name, values in arrays.items():
        is_figure_4 = name == "CIFAR10"
        path = figures / "figure_4" if is_figure_4 else folder / f"{name}_losses"
        draw_losses(path, name, values, pdf=is_figure_4)
        draw_differences(folder / f"{name}_differences", name, values, PANELS)
    print("", *(tables[name] for name in args.dataset), sep="\n")
    print(f"Figure 4 (CIFAR-10): {figures}. What moves changed, controls, each run: {folder}")


if __name__ == "__main__":
    run.run(main)
