"""Teleporting to another sharpness or curvature, and what it does to the test loss: Figure 4.

    python teleport_sharpness_curvature.py                     # CIFAR-10, as published
    python teleport_sharpness_curvature.py --dataset MNIST     # the same on MNIST
    python teleport_sharpness_curvature.py --sample            # on the shipped sample

Networks train by SGD. At the start of epoch index 20 they are teleported, once before each of the
first mini-batches, and go on with SGD. The arms, all runs of which train as one stack:

    plain                                       SGD alone
    sharpness decrease, sharpness increase      teleports on the mean perturbed loss
    curvature decrease, curvature increase      teleports on κ along exp(tM), M random
    the same four, rescaled                     exact rescalings to the φ or κ that these reach
    random, random in one pair                  moves as long as those of sharpness decrease and of
                                                curvature increase, in random directions
    random rescaling                            rescalings as long as those of sharpness increase,
                                                rescaled, in random directions
    random rescaling (curvature)                as long as those of curvature increase, rescaled
    refit                                       the pseudoinverse action with g = I alone

Runs differ in their initial weights, and share the teleports' batches and draws. A network that
runs away has diverged: it is left out, and counted. Training goes to logs/generalization/; an
interrupted run goes on from there and ends with the same numbers. The curves of each arm and run
are in figures/generalization/<dataset>.npz.
"""

import math
from functools import partial
from itertools import cycle
from typing import NamedTuple

from experiment import files, launch, plots, statistics

import numpy as np
import torch
from matplotlib.figure import Figure

import models
from data import TITLES, load_data, shuffled_batch
from teleportation import (
    PSEUDOINVERSE,
    RADII,
    RESCALING,
    act,
    ascend_to,
    curvature_along,
    estimate,
    random_directions,
    random_group_elements,
    sharpness,
    teleport_curvature,
    teleport_sharpness,
)

# Settings


class Teleports(NamedTuple):
    """How an arm teleports: how often, how far, and in which direction."""

    number: int  # mini-batches with a teleport before them
    lr: float  # on T (sharpness) or t (curvature); negative to decrease
    stop: float = math.inf  # sharpness: networks stay while the published objective is above


class Experiment(NamedTuple):
    """A dataset's networks and teleports."""

    training: models.Training
    teleports: dict
    max_tm_norm: float  # |tM|_F of a step in curvature, at the most
    directions: int = 100  # for each radius, of the perturbations that teleports are made with


def teleports(sharpness_down, sharpness_up, curvature_down, curvature_up, ups=5):
    """Return the arms' Teleports with these learning rates."""
    return {
        # published: 2.0 either way, where two in five networks on CIFAR-10 would not begin
        "sharpness decrease": Teleports(10, -sharpness_down, stop=4.0),
        "sharpness increase": Teleports(2, sharpness_up, stop=2.0),
        "curvature decrease": Teleports(5, -curvature_down),
        "curvature increase": Teleports(ups, curvature_up),
    }


def scaled(experiment, scale):
    """Return an Experiment with rates, lengths and the number of directions times `scale`."""
    slower = {arm: t._replace(lr=scale * t.lr) for arm, t in experiment.teleports.items()}
    norm, directions = scale * experiment.max_tm_norm, round(scale * experiment.directions)
    return Experiment(experiment.training, slower, norm, directions)


EXPERIMENTS = {
    "CIFAR10": Experiment(
        models.Training((3072, 32, 10, 10), 2e-2),
        teleports(5e-2, 5e-2, 5e-2, 2e-1, ups=10),
        max_tm_norm=5.0,  # no step is as long
    ),
    # elsewhere dκ/dt is 10 and more, and exp(tM) would leave float32
    "MNIST": Experiment(
        models.TRAINING["MNIST"], teleports(5e-2, 5e-2, 5e-2, 2e-1), max_tm_norm=1.0
    ),
    "FashionMNIST": Experiment(
        models.TRAINING["FashionMNIST"], teleports(3e-1, 1e-1, 3e-3, 5e-3), max_tm_norm=1.0
    ),
}
DEFAULTS = {"runs": 20}  # published: 5
ACTIVATION, ACTION = models.LeakyReLU(), PSEUDOINVERSE
# on the sample, whose networks are far from a minimum: a tenth of rates, lengths and directions
SAMPLE_SCALE = 0.1
EPOCHS, TELEPORT_EPOCH = 40, 20  # the index of the epoch that begins with teleports
# mini-batches with a move of some arm before them
MOST_TELEPORTS = max(t.number for e in EXPERIMENTS.values() for t in e.teleports.values())
TELEPORT_BATCH = 2000
SHARPNESS_STEPS = 10  # of ascent in a teleport in sharpness; in curvature, one
TELEPORT_RADII = np.arange(1, 10) / 10  # of the perturbations in the objective of teleports
PUBLISHED_SCALE = 0.9  # the published objective is the sum of the 900 losses over 1,000: 0.9 φ
MAX_T_NORM = 10.0  # |T|_F of a step in sharpness: where SGD runs away, steps outgrow float32
MEASURED_DIRECTIONS = 3  # for each radius, in what the log says of each teleport
RESCALING_STEPS, RESCALING_LENGTH = 20, 0.1  # of an ascent to a target, and |T| of a step
PAIR = 1  # the pair of layers that curvature teleports act on: the second
ESTIMATION_BATCHES, ESTIMATION_BATCH = 20, 200  # of φ and ψ along training

CLAIMS = {  # of the paper: how the test loss changes
    "sharpness decrease": "changes little",
    "sharpness increase": "rises",
    "curvature decrease": "rises",
    "curvature increase": "falls",
}
LITTLE = 0.01  # of plain's final test loss
RESCALED = {arm: f"{arm}, rescaled" for arm in CLAIMS}  # move to where that arm's φ or κ is
CLAIMS |= {rescaled: CLAIMS[arm] for arm, rescaled in RESCALED.items()}
CONTROLS = {
    "sharpness decrease": "random",
    "curvature increase": "random in one pair",
    "sharpness increase, rescaled": "random rescaling",
    "curvature increase, rescaled": "random rescaling (curvature)",
}
ARMS = ("plain", *CLAIMS, *CONTROLS.values(), "refit")
COLOURS = plots.BLACK, plots.BLUE, plots.RED, plots.SKY, plots.ORANGE, plots.GREY, plots.GREEN
CURVES = ("train_loss", "test_loss", "test_accuracy", "sharpness", "curvature")
SYMBOLS = {"sharpness": "φ", "curvature": "κ"}  # of what each quantity's arms change
MEASURED = ("loss", *SYMBOLS.values())
EPOCHS_SHOWN = (21, 25, 40)


# Computation


def measures(x, y, M, k):
    """Return {MEASURED: functions weights -> [...]} of networks on a batch, for the k-th move.

    They are the loss, φ and κ along exp(tM), before a move and after it with the same draws.
    """

    def phi(weights):
        widths = models.widths_of(weights)
        rng = torch.Generator().manual_seed(models.SEED + k)
        directions = random_directions(widths, np.repeat(TELEPORT_RADII, MEASURED_DIRECTIONS), rng)
        return sharpness(weights, x, y, [d.to(x) for d in directions], ACTIVATION)

    def kappa(weights):
        return curvature_along(weights, x, M, PAIR, ACTIVATION, ACTION)[0]

    loss = partial(models.cross_entropy, x=x, y=y, activation=ACTIVATION)
    return {"loss": loss, "φ": phi, "κ": kappa}


def rescale_to(weights, x, measure, targets):
    """Return networks rescaled until a measure of theirs has reached targets: [runs], if it can.

    Their functions are kept. A network whose target is not finite stays as it is.
    """
    targets = targets.masked_fill(~targets.isfinite(), math.nan)  # infinity is a target, too
    rescaled, _ = ascend_to(
        targets, measure, weights, x, RESCALING_LENGTH, RESCALING_STEPS, ACTIVATION, RESCALING
    )
    return rescaled


def teleport_pair(weights, x, y, experiment, quantity, k, M):
    """Move both arms of a quantity, as one stack where both move at the k-th mini-batch.

    Returns {arm: weights} and {arm: group elements, of each pair} for those that move.
    """
    arms = [a for a in RESCALED if a.startswith(quantity) and k < experiment.teleports[a].number]
    if not arms:
        return {}, {}
    settings = [experiment.teleports[arm] for arm in arms]
    stack = [torch.stack([w[ARMS.index(arm)] for arm in arms]) for w in weights]
    lr = torch.tensor([s.lr for s in settings])[:, None].to(x)
    if quantity == "sharpness":
        stop = torch.tensor([s.stop for s in settings])[:, None].to(x)
        new, path = teleport_sharpness(
            stack,
            x,
            y,
            lr=lr * PUBLISHED_SCALE,
            steps=SHARPNESS_STEPS,
            radii=TELEPORT_RADII,
            per_radius=experiment.directions,
            seed=k,
            activation=ACTIVATION,
            stop=stop / PUBLISHED_SCALE,
            max_norm=MAX_T_NORM,
            return_path=True,
            action=ACTION,
        )
        elements = path["group_elements"]
    else:
        new, g = teleport_curvature(
            stack, x, lr, [M], ACTIVATION, PAIR, experiment.max_tm_norm, ACTION
        )
        elements = [torch.eye(w.shape[-2]).to(w).expand(*w.shape[:2], -1, -1) for w in stack[:-1]]
        elements[PAIR] = g
    return [{arm: [t[i] for t in ts] for i, arm in enumerate(arms)} for ts in (new, elements)]


def elements_of_rescaling(weights, rescaled):
    """Return I + log g_m of the rescaling between weights [runs, d_{m+1}, d_m], for each pair."""
    elements, below = [], 1.0
    for w, new in zip(weights[:-1], rescaled):
        g = new.norm(dim=-1) / (w / below).norm(dim=-1)
        elements.append(torch.eye(g.shape[-1]).to(g) + torch.diag_embed(g.log()))
        below = g[..., None, :]
    return elements


def move_controls(weights, x, elements, rng):
    """Return {arm: weights} of the controls of the arms in `elements`, and of refit, after a move.

    elements: {arm: g_m of each pair, [runs, d, d]}; of a rescaling I + log g_m. A control's T_m
    (of a rescaling: log g_m) have the same norms, in random directions.
    """
    new = {"refit": ([torch.eye(w.shape[-2]).to(w) for w in weights[:-1]], ACTION)}
    for arm, control in CONTROLS.items():
        if arm in elements:
            action = RESCALING if arm in RESCALED.values() else ACTION
            new[control] = random_group_elements(elements[arm], rng, action), action
    own = {arm: [w[ARMS.index(arm)] for w in weights] for arm in new}
    return {arm: act(own[arm], x, g, ACTIVATION, action) for arm, (g, action) in new.items()}


@torch.no_grad()
def move(weights, data, experiment, k, diverged):
    """Give each arm its k-th move, in place; weights: [arms, runs, d_{m+1}, d_m].

    Returns loss, φ and κ before and after it on the teleport's batch and on a fresh one,
    [arms, 2 batches, 2, 3, runs]. diverged: as `models.replace_diverged` takes it.
    """
    d = experiment.training.widths[PAIR + 1]
    x, y = shuffled_batch(data, TELEPORT_BATCH, k)
    batches = [(x, y), shuffled_batch(data, TELEPORT_BATCH, MOST_TELEPORTS + k)]
    rng = torch.Generator().manual_seed(models.SEED + k)
    M = torch.rand(d, d, generator=rng).to(x)
    measured = [measures(*batch, M, k) for batch in batches]

    def measure():
        rows = [torch.stack([f(weights) for f in of_batch.values()]) for of_batch in measured]
        return torch.stack(rows)

    def own(arm):
        return [w[ARMS.index(arm)] for w in weights]

    before = measure()
    moved, elements = {}, {}
    for quantity in SYMBOLS:
        new, g = teleport_pair(weights, x, y, experiment, quantity, k, M)
        moved, elements = moved | new, elements | g
    for arm in list(moved):
        f, rescaled = measured[0][SYMBOLS[arm.split()[0]]], RESCALED[arm]
        targets = f(moved[arm]).masked_fill(diverged[ARMS.index(arm)], math.nan)
        moved[rescaled] = rescale_to(own(rescaled), x, f, targets)
        elements[rescaled] = elements_of_rescaling(own(rescaled), moved[rescaled])
    moved |= move_controls(weights, x, elements, rng)
    for arm, new in moved.items():
        for w, n in zip(own(arm), new):
            w.copy_(n)
    models.replace_diverged(weights, diverged)
    return torch.stack([before, measure()], 1).permute(3, 0, 1, 2, 4)


def estimate_along(weights, data):
    """Return φ and ψ [arms, runs], Table 1's estimates as means over ESTIMATION_BATCHES batches."""
    batches = [shuffled_batch(data, ESTIMATION_BATCH, k) for k in range(ESTIMATION_BATCHES)]
    radii = RADII[data.name]
    rows = [estimate(weights, *batch, radii, k, ACTIVATION)[:2] for k, batch in enumerate(batches)]
    return [torch.stack(column).mean(0) for column in zip(*rows)]


def train_rows(weights, diverged, data, experiment, rows):
    """Train in place on a slice of the images; return the mean loss [arms, runs].

    Raises ValueError where plain SGD diverges.
    """
    x, y, lr = data.x_train[rows], data.y_train[rows], experiment.training.lr
    loss = models.train_epoch_sgd(weights, x, y, lr, ACTIVATION, check=False)
    models.replace_diverged(weights, diverged)
    if diverged[0].any():
        runs = diverged[0].nonzero().flatten().tolist()
        raise ValueError(f"plain SGD's networks {runs} diverge: it needs a lower lr")
    return loss


def from_state(state, device):
    """Return the weights of a saved state, [arms, runs, …], and which have diverged."""
    return models.from_arrays(state, device), torch.tensor(state["diverged"], device=device)


def to_state(weights, diverged):
    """Return what `from_state` takes, as arrays to be saved."""
    return models.to_arrays(weights) | {"diverged": diverged}


def begin_teleports(state):
    """Return the state before the first move: all arms go on from plain SGD's networks."""
    weights, diverged = from_state(state, "cpu")
    weights = [w.repeat(len(ARMS), 1, 1, 1) for w in weights]
    return to_state(weights, diverged.repeat(len(ARMS), 1))


def teleport_once(state, data, experiment):
    """Return the state after one move of each arm that is due and the mini-batch that follows."""
    k, (weights, diverged) = int(state["steps"]), from_state(state, data.x_train.device)
    moved = move(weights, data, experiment, k, diverged)
    rows = slice(k * models.BATCH, (k + 1) * models.BATCH)
    loss = train_rows(weights, diverged, data, experiment, rows)
    return files.appended(state, moves=moved, losses=loss) | to_state(weights, diverged)


def train_epoch(state, data, experiment, teleported):
    """Return the state of all arms, as `train` saves it, after one epoch more.

    Up to the teleports all arms are one. teleported(state) returns the state after them.
    """
    batches, first, losses = math.ceil(len(data.x_train) / models.BATCH), 0, 0
    if state["steps"] == TELEPORT_EPOCH:
        after = teleported(state)
        first, losses = MOST_TELEPORTS, after.pop("losses").sum(0)
        kept = ~after["diverged"][:, None, None, None]
        state = state | after | {"moves": np.where(kept, after["moves"], math.nan)}
    weights, diverged = from_state(state, data.x_train.device)
    rest = train_rows(weights, diverged, data, experiment, slice(first * models.BATCH, None))
    loss = (torch.as_tensor(losses).to(rest) + (batches - first) * rest) / batches
    test = models.evaluate(weights, data.x_test, data.y_test, ACTIVATION)
    values = loss, *test, *estimate_along(weights, data)
    values = (v.masked_fill(diverged, math.nan).expand(len(ARMS), -1) for v in values)
    return files.appended(state, **dict(zip(CURVES, values))) | to_state(weights, diverged)


def train(data, experiment, runs, path, settings):
    """Train all arms; resume from `path`, or in the midst of the teleports from a file beside it.

    Returns the arrays saved there: the CURVES [EPOCHS, arms, runs] after each epoch; `moves`, as
    `move` returns them, [MOST_TELEPORTS, arms, 2 batches, 2, 3, runs]; the weights; and which
    networks `diverged` [arms, runs]: their curves are nan from then on, and their moves if that was
    in the course of the moves. Raises UserError where plain SGD diverges.
    """
    given = {"data": data, "experiment": experiment}

    def start():
        seeds = models.run_seeds(range(runs))
        weights = [w[None] for w in models.init_weights(experiment.training.widths, seeds)]
        return to_state(weights, np.zeros((1, runs), bool))

    def teleported(state):
        course = partial(begin_teleports, state), partial(teleport_once, **given), MOST_TELEPORTS
        with launch.progress_bar(MOST_TELEPORTS, "teleport", TITLES[data.name]) as bar:
            return files.resume(path.with_stem(f"{path.stem}-teleports"), settings, *course, bar)

    def step(state):
        try:
            return train_epoch(state, teleported=teleported, **given)
        except ValueError as error:
            raise files.UserError(f"{data.name}, epoch {state['steps']}: {error}.") from None

    with launch.progress_bar(EPOCHS, "epoch", TITLES[data.name]) as bar:
        return files.resume(path, settings, start, step, EPOCHS, bar)


def log(name, args):
    """Return a dataset's Experiment, the path of its training in logs/ and the settings."""
    experiment = EXPERIMENTS[name]
    if args.sample:
        experiment = scaled(experiment, SAMPLE_SCALE)
    settings = dict(dataset=name, sample=args.sample, runs=args.runs, device=args.device.type)
    batches = [models.BATCH, TELEPORT_BATCH]
    settings |= dict(experiment=experiment, seed=models.SEED, batches=batches)
    course = EPOCHS, TELEPORT_EPOCH, MOST_TELEPORTS, ARMS, models.DIVERGED_WEIGHT
    teleport = PAIR, SHARPNESS_STEPS, PUBLISHED_SCALE, MAX_T_NORM
    estimates = list(RADII[name]), ESTIMATION_BATCHES, ESTIMATION_BATCH
    measured = list(TELEPORT_RADII), MEASURED_DIRECTIONS, RESCALING_STEPS, RESCALING_LENGTH
    settings |= dict(course=course, teleport=teleport, estimates=estimates, measured=measured)
    settings |= dict(activation=str(ACTIVATION), action=ACTION.act.__name__)
    folder = args.output / "logs" / "generalization"
    return experiment, folder / f"{name}{'-sample' * args.sample}-{args.runs}runs.npz", settings


def compute(args):
    """Do this rank's share of what logs/ lacks; the unit is a dataset."""
    for name in launch.share_of_rank(args.dataset):
        experiment, path, settings = log(name, args)
        train(load_data(name, args), experiment, args.runs, path, settings)


def collect(name, args):
    """Return what `train` returns, but for the weights, its settings and the log it is from."""
    _, path, settings = log(name, args)
    state = files.load_steps(path, settings, EPOCHS)
    keys = (*CURVES, "moves", "diverged")
    return settings, {"arms": ARMS} | {key: state[key] for key in keys}, path


# Statistics


def verdict(claim, difference, little):
    """Return what a paired difference with its 95 % interval says of one of the CLAIMS.

    little: so large a difference still is; within it a whole interval has to be to say so.
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


def summarise(_, results):
    """Return what summary.json says of a dataset.

    That is plain's mean test loss at the epochs EPOCHS_SHOWN, the paired differences of arms to
    plain and to their control with the verdicts on the CLAIMS, how many networks of each arm
    diverged, how many others moved, and how all moves changed loss, φ and κ (medians).
    """
    arms = list(results["arms"])
    loss = {arm: results["test_loss"][:, i] for i, arm in enumerate(arms)}
    plain = {epoch: loss["plain"][epoch - 1].mean(dtype=float) for epoch in EPOCHS_SHOWN}
    pairs = [(arm, "plain") for arm in arms[1:]]
    pairs += [pair for pair in CONTROLS.items() if {*pair} <= {*arms}]
    differences = statistics.compare_arms(loss, pairs, EPOCHS_SHOWN)
    for (arm, _), after in zip(pairs, differences.values()):
        for difference in after.values() if arm in CLAIMS else ():
            little = LITTLE * plain[EPOCHS_SHOWN[-1]]
            difference["verdict"] = verdict(CLAIMS[arm], difference, little)
    moves = {}
    for i, arm in enumerate(arms):
        before, after = results["moves"][:, i].swapaxes(0, 2)  # [2 batches, moves, 3, runs] each
        change = after - before
        own, fresh = np.nanmedian(change.sum(1), -1)  # [3] each: a few networks run away
        first = np.nanmedian(before[0, 0], -1)
        changes = {"before": first, "change_on_their_batches": own, "on_fresh_batches": fresh}
        moves[arm] = {key: dict(zip(MEASURED, values)) for key, values in changes.items()}
        moves[arm]["networks"] = (np.abs(change[0]) > 0).any((0, 1)).sum()
    diverged = dict(zip(arms, results["diverged"].sum(1)))
    return {"plain": plain, "differences": differences, "diverged": diverged, "moves": moves}


def table(summaries):
    """Return the test losses, verdicts on the claims, and what the moves changed, as Markdown."""
    tables, rows = [], []
    for name, summary in summaries.items():
        found = summary["plain"], summary["differences"], summary["diverged"]
        tables.append(plots.difference_table(TITLES[name], *found, CLAIMS))
        for arm, moves in list(summary["moves"].items())[1:]:
            *changes, networks = moves.values()
            cells = [f"{v:.3g}".replace("-", "−") for entry in changes for v in entry.values()]
            rows.append([f"{TITLES[name]}, {arm}", str(networks), *cells])
    header = ["all moves of an arm, median", "networks moved", *(f"{q} before" for q in MEASURED)]
    header += [f"change of {q}, {where}" for where in ("own batch", "fresh") for q in MEASURED]
    return "\n".join([*tables, plots.markdown(header, rows)])


# Figures


def arms_of(quantity, results):
    """Return {arm: (index, colour)} in results: plain, the arms on a quantity, their controls."""
    names, chosen = list(results["arms"]), [arm for arm in CLAIMS if arm.startswith(quantity)]
    chosen = ["plain", *chosen, *(CONTROLS[arm] for arm in chosen if arm in CONTROLS)]
    coloured = zip(chosen, cycle(COLOURS))
    return {arm: (names.index(arm), colour) for arm, colour in coloured if arm in names}


def draw_quantities(name, results, path):
    """Draw φ and ψ along training, each for its arms, means over runs."""
    figure = Figure(figsize=(8.4, 3.4))
    for axes, ylabel in zip(figure.subplots(1, 2), ("sharpness φ", "curvature ψ")):
        quantity = ylabel.split()[0]
        for arm, (i, colour) in arms_of(quantity, results).items():
            values = np.nanmean(results[quantity][TELEPORT_EPOCH - 5 :, i], 1)
            epochs = TELEPORT_EPOCH - 4 + np.arange(len(values))
            axes.plot(epochs, values, color=colour, label=arm)
        axes.axvline(TELEPORT_EPOCH, color="grey", lw=0.8, ls=":")
        axes.set(title=TITLES[name], xlabel="epoch", ylabel=ylabel)
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.22), "ncols": 2}
        axes.legend(fontsize="x-small", frameon=False, **below)
    figure.tight_layout()
    plots.save_figure(figure, path)


def draw(name, results, _, folder):
    """Draw Figure 4: a quantity's arms; and in the panel of differences rescalings and controls."""
    for quantity in SYMBOLS:
        curves, loss = {}, results["test_loss"]
        for arm, (i, colour) in arms_of(quantity, results).items():
            key = plots.arm_text(arm, results["diverged"][i].sum())
            curves[key] = colour, results["train_loss"][:, i], loss[:, i]
        course = TITLES[name], 1 + np.arange(EPOCHS), curves, loss[:, 0]
        shown = TELEPORT_EPOCH - 1, EPOCHS
        # plain and the published arms come first
        plots.draw_arms(folder / f"{name}_{quantity}", *course, list(curves)[3:], shown)
    draw_quantities(name, results, folder / f"{name}_sharpness_and_curvature_along_training")


# Options


def parse_arguments():
    parser = launch.experiment_parser(__doc__)
    add, runs = parser.add_argument, DEFAULTS["runs"]
    add("--dataset", nargs="+", choices=EXPERIMENTS, default=["CIFAR10"], help="which datasets")
    add("--runs", type=launch.at_least(2), default=runs, help="networks in each arm")
    return parser.parse_args()


def main():
    args = parse_arguments()
    folder = launch.figures_folder(args, "generalization", DEFAULTS)
    parts = EXPERIMENTS, args.dataset
    launch.compute_and_report(args, folder, *parts, compute, collect, summarise, table, draw)


if __name__ == "__main__":
    launch.run(main)
