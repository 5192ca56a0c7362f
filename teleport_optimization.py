"""Teleporting within SGD, AdaGrad, momentum, RMSprop and Adam: Figures 5 and 13, with controls.

    python teleport_optimization.py                          # MNIST, all optimizers
    python teleport_optimization.py --sample                 # the same on the shipped sample
    python teleport_optimization.py --optimizer AdaGrad --dataset CIFAR10
    python teleport_optimization.py --study lr               # does it help at other learning rates?

Before each of the first mini-batches of one epoch the weights are teleported to a larger gradient.
The published code also builds a new optimizer there, which empties its state. So there are arms:

    plain       no teleports
    teleport    as published: teleports, each followed by a new optimizer
    reset       a new optimizer at the same moments, no teleports
    kept        teleports that keep the optimizer's state
    random      moves as long as the teleports', in a random direction of the orbit; new optimizer

STUDIES have others. Arms train side by side, as one stack where they share an optimizer. Training
goes to logs/optimization/; an interrupted run goes on from there. The curves of each arm and run
are in figures/optimization/<dataset>_<optimizer>.npz; a study's, in figures/optimization-<study>.
"""

import time
from collections.abc import Callable
from functools import partial
from itertools import cycle, pairwise, product
from math import ceil
from typing import NamedTuple

from experiment import files, launch, plots, statistics

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.optim import SGD, Adagrad, Adam, RMSprop

import models
from data import TITLES, load_data, shuffled_batch
from teleportation import (
    PSEUDOINVERSE,
    RESCALING,
    act,
    ascend_to,
    gradient_norm_squared,
    inner_product,
    level_set_ascent,
    loss_and_gradient_norm_squared,
    random_group_elements,
    teleport,
    value_and_gradient,
)

# Settings


class Experiment(NamedTuple):
    """An optimizer, and when and how far it teleports as published."""

    optimizer: Callable  # of the parameters and lr; elementwise, since all runs share a tensor
    lr: float
    rates: tuple  # factors of it in the study lr
    best: float  # that at which plain's final test loss was lowest there, on MNIST
    epoch: int  # index of the epoch that begins with teleports
    ascent_lr: float  # of the ascent on T


BELOW_AND_ABOVE, ABOVE = (0.3, 1.0, 3.0, 10.0), (1.0, 3.0, 10.0, 30.0)
EXPERIMENTS = {  # names without "_"
    "SGD": Experiment(SGD, 1e-2, BELOW_AND_ABOVE, 1.0, 2, 1e-4),
    "AdaGrad": Experiment(partial(Adagrad, fused=True), 1e-2, BELOW_AND_ABOVE, 3.0, 2, 1e-4),
    "momentum": Experiment(partial(SGD, momentum=0.9), 1e-3, BELOW_AND_ABOVE, 1.0, 0, 5e-2),
    "RMSprop": Experiment(RMSprop, 1e-4, ABOVE, 3.0, 0, 5e-2),
    "Adam": Experiment(partial(Adam, fused=True), 1e-4, ABOVE, 3.0, 0, 5e-2),
}
ACTIVATION, ACTION = models.LeakyReLU(), PSEUDOINVERSE
TELEPORTS = 8  # mini-batches with a teleport before them: the first of the epoch
STEPS = 10  # of ascent in each teleport
CAP = 100.0  # a teleport stops where |∇L|² is larger
TELEPORT_BATCH = 200  # training images, drawn anew for each teleport
LENGTH, RESCALING_STEPS = 0.02, 100  # |T| of a step of an ascent to a target, and the most of them
DEFAULTS = {"runs": 20, "epochs": 40}  # published: 5 runs of the arms plain and teleport


class Arm(NamedTuple):
    """What an arm does, and when."""

    move: tuple | None = None  # "teleport" with its steps, or a name in MOVES with its amount
    renewed: bool = False  # whether each move is followed by a new optimizer
    epochs: tuple | None = None  # indices of the epochs with moves; None: the published one
    moves: int = TELEPORTS  # in each of these epochs
    apart: int = 1  # mini-batches from one to the next


class Study(NamedTuple):
    """Arms, the first of them named plain, and what is asked of them.

    The learning rates are `published`, `best`, or `all` rates of an Experiment. The `primary`
    comparison, after the last epoch, is named beforehand; all others are exploratory.
    """

    arms: dict
    rates: tuple = ("published",)
    primary: str = "teleport"


TELEPORT, DOUBLING = ("teleport", STEPS), ("rescale", 2)
BOTH = "published", "best"
EVERY = tuple(range(1000))  # indices of more epochs than are trained
PUBLISHED = {  # Figures 5 and 13: plain and teleport are the paper's, the others are controls
    "plain": Arm(),
    "kept": Arm(TELEPORT),
    "teleport": Arm(TELEPORT, renewed=True),
    "reset": Arm(("stay", 0), renewed=True),
    "random": Arm(("random", 0), renewed=True),
}
ACTIONS = {
    "plain": Arm(),
    "pseudoinverse": Arm(TELEPORT),
    "random": Arm(("random", 0)),
    "level set": Arm(("level set", STEPS)),
    "gradient step": Arm(("gradient step", 0)),
    **{f"rescaling × {factor}": Arm(("rescale", factor)) for factor in (1.1, 1.5, 2)},
}
WHEN = {
    "plain": Arm(),
    **{f"epoch {epoch}": Arm(TELEPORT, epochs=(epoch,)) for epoch in (0, 1, 2, 5, 10, 20)},
    "every epoch": Arm(TELEPORT, epochs=EVERY),
}
HOW_FAR = {"plain": Arm(), **{f"{n} steps": Arm(("teleport", n)) for n in (1, 10, 100, 1000)}}
HOW_OFTEN = {
    "plain": Arm(),
    **{f"{n} mini-batches": Arm(TELEPORT, moves=n) for n in (1, 8, 64)},
    "every 10th of an epoch": Arm(TELEPORT, epochs=EVERY, moves=10, apart=250),
}
RESCALINGS = {  # later and more often, in exact moves that can't overshoot
    "plain": Arm(),
    "epoch 0": Arm(DOUBLING),
    "epoch 5": Arm(DOUBLING, epochs=(5,)),
    "every epoch": Arm(DOUBLING, epochs=EVERY),
    "64 mini-batches": Arm(DOUBLING, moves=64),
}
STUDIES = {
    "published": Study(PUBLISHED),
    "lr": Study({arm: PUBLISHED[arm] for arm in ("plain", "kept", "teleport")}, ("all",), "kept"),
    "action": Study(ACTIONS, BOTH, "rescaling × 2"),
    "when": Study(WHEN, BOTH, "every epoch"),
    "how-far": Study(HOW_FAR, BOTH, "100 steps"),
    "how-often": Study(HOW_OFTEN, BOTH, "every 10th of an epoch"),
    "rescaling": Study(RESCALINGS, BOTH, "every epoch"),
}
CURVES = ("train_loss", "test_loss", "test_accuracy")
EPOCHS_SHOWN = (1, 5, 10, 40)  # in the table
PALETTE = (plots.BLACK, plots.GREEN, plots.BLUE, plots.ORANGE, plots.GREY)
PALETTE += (plots.RED, plots.PURPLE, plots.SKY)


# Computation


class Reference(NamedTuple):
    """How far a teleport went: its group elements, and |w' − w| [runs]."""

    group_elements: list
    length: torch.Tensor


class Moment(NamedTuple):
    """What a move is given beside the weights."""

    x: torch.Tensor  # [d_0, n], the move's batch, and y: [n]
    y: torch.Tensor
    lr: float  # of the ascent on T
    rng: torch.Generator
    reference: Reference | None  # of the last arm above that teleports before this mini-batch


def random_move(weights, _, at):
    """Return the weights acted on by random group elements as far from I as the teleport's."""
    elements = random_group_elements(at.reference.group_elements, at.rng, ACTION)
    return act(weights, at.x, elements, ACTIVATION, ACTION)


def climb(weights, steps, at):
    """Return the weights after steps within the batch's level set, in all as long as a teleport."""
    length = at.reference.length / steps
    return level_set_ascent(weights, at.x, at.y, length, steps, ACTIVATION)[0]


def gradient_step(weights, _, at):
    """Return the weights after a step down the batch's gradient, as long as the teleport."""
    loss = partial(models.cross_entropy, x=at.x, y=at.y, activation=ACTIVATION)
    gradient = value_and_gradient(loss, weights)[1]
    scale = (at.reference.length / inner_product(gradient, gradient).sqrt())[..., None, None]
    return [w - scale * g for w, g in zip(weights, gradient)]


def rescale(weights, factor, at):
    """Return weights rescaled so far that TELEPORTS such moves multiply |∇L|² by a factor."""
    objective = partial(gradient_norm_squared, x=at.x, y=at.y, activation=ACTIVATION)
    target = factor ** (1 / TELEPORTS) * objective(weights)
    rescaled, _ = ascend_to(
        target, objective, weights, at.x, LENGTH, RESCALING_STEPS, ACTIVATION, RESCALING
    )
    return rescaled


MOVES = {  # (weights, amount, Moment) -> new weights; "the teleport" is the Moment's reference
    "stay": lambda weights, *_: weights,
    "random": random_move,
    "level set": climb,
    "gradient step": gradient_step,
    "rescale": rescale,
}


@torch.no_grad()
def move_arm(arm, weights, at):
    """Return the weights after an arm's move at a Moment, and the Reference for the arms below."""
    name, amount = arm.move
    if name != "teleport":
        return MOVES[name](weights, amount, at), at.reference
    new, path = teleport(
        weights, at.x, at.y, at.lr, amount, ACTIVATION, CAP, return_path=True, action=ACTION
    )
    way = [a - b for a, b in zip(new, weights)]
    return new, Reference(path["group_elements"], inner_product(way, way).sqrt())


def schedule(stack, experiment, epochs, images):
    """Return {epoch: {mini-batch: {arm's name: k}}}, where arms make their k-th moves."""
    due, batches = {}, ceil(images / models.BATCH)
    for name, arm in stack.items():
        chosen = [experiment.epoch] if arm.epochs is None else arm.epochs
        at = range(0, min(arm.apart * arm.moves, batches) if arm.move else 0, arm.apart)
        moments = product([epoch for epoch in chosen if epoch < epochs], at)
        for k, (epoch, batch) in enumerate(moments):
            due.setdefault(epoch, {}).setdefault(batch, {})[name] = k
    return due


@torch.no_grad()
def move(weights, stack, due, data, ascent_lr):
    """Give each arm of a stack that is due its move, in place.

    weights: [arms, runs, d_{m+1}, d_m]; due: {arm's name: k} where it makes its k-th move. Returns
    for each arm loss and |∇L|² before and after, on the move's batch, and the change of the test
    loss at the first move, else nan: [arms, 5, runs]; and the seconds of the moves: [arms].
    """
    measured = torch.full((len(stack), 5, weights[0].shape[1]), torch.nan, device=weights[0].device)
    seconds, reference = torch.zeros(len(stack)), None
    test = data.x_test, data.y_test, ACTIVATION
    for name, k in due.items():
        i = list(stack).index(name)
        own, (x, y) = [w[i].clone() for w in weights], shuffled_batch(data, TELEPORT_BATCH, k)
        start = time.perf_counter()
        rng = torch.Generator().manual_seed(models.SEED + k)
        new, reference = move_arm(stack[name], own, Moment(x, y, ascent_lr, rng, reference))
        seconds[i] = time.perf_counter() - start
        for w, moved in zip(weights, new):
            w[i] = moved
        before, after = (loss_and_gradient_norm_squared(w, x, y, ACTIVATION) for w in (own, new))
        measured[i, :4] = torch.stack([*before, *after])
        if k == 0:
            measured[i, 4] = models.evaluate(new, *test)[0] - models.evaluate(own, *test)[0]
    return measured, seconds


def stacks_of(study):
    """Return the arms of a study in stacks, dicts like its arms: those that share an optimizer.

    Where moves are followed by a new optimizer, the arms of a stack move at the same moments.
    """
    stacks = {}
    for name, arm in study.arms.items():
        stacks.setdefault(arm.renewed and arm[1:], {})[name] = arm
    return list(stacks.values())


def train_epoch(state, data, experiment, stack, due):
    """Return the state of a stack, as `train_stack` saves it, after one epoch more.

    due: {mini-batch: {arm's name: k}}, where arms make their k-th moves in this epoch. Raises
    ValueError where all runs diverge.
    """
    begin, renewed = time.perf_counter(), next(iter(stack.values())).renewed
    model = models.MLP(models.from_arrays(state, data.x_train.device), ACTIVATION)
    optimizer = experiment.optimizer(model.parameters(), experiment.lr)
    models.optimizer_from_arrays(optimizer, state)
    seconds = torch.zeros(len(stack))
    diverged = torch.zeros(model.weights[0].shape[:2], dtype=bool, device=data.x_train.device)
    if state["steps"]:
        diverged |= torch.tensor(np.isnan(state["test_loss"][-1])).to(diverged)

    batches, loss, moved = ceil(len(data.x_train) / models.BATCH), 0, []
    for first, end in pairwise([*sorted({0, *due}), batches]):
        if first in due:
            found, spent = move(model.weights, stack, due[first], data, experiment.ascent_lr)
            seconds = seconds + spent
            models.replace_diverged(model.weights, diverged)
            if renewed:
                optimizer = experiment.optimizer(model.parameters(), experiment.lr)
            moved.append(found.masked_fill(diverged[:, None], torch.nan))
        rows = slice(first * models.BATCH, end * models.BATCH)
        x, y = data.x_train[rows], data.y_train[rows]
        loss = loss + (end - first) * models.train_epoch(model, x, y, optimizer, check=False)
        models.replace_diverged(model.weights, diverged)
    loss = loss / batches
    if moved:
        state["moves"] = np.concatenate([state["moves"], torch.stack(moved).cpu().numpy()])
    training = time.perf_counter() - begin - float(seconds.sum())
    test = models.evaluate(list(model.weights), data.x_test, data.y_test, ACTIVATION)
    curves = {key: v.masked_fill(diverged, torch.nan) for key, v in zip(CURVES, (loss, *test))}
    state = files.appended(state, seconds=training, move_seconds=seconds, **curves)
    return state | models.to_arrays(model.weights) | models.optimizer_to_arrays(optimizer)


def train_stack(data, experiment, stack, runs, epochs, path, settings, bar):
    """Train the arms of a stack with an optimizer; resume from `path`.

    Returns the arrays saved there: the CURVES [epochs, arms, runs]; seconds [epochs] of training,
    without the moves; move_seconds [epochs, arms]; `moves` [moments, arms, 5, runs], as `move`
    measures them; the weights and the optimizer's state. The curves of a run that diverged are nan
    from that epoch on. Raises UserError where all runs diverge.
    """
    due = schedule(stack, experiment, epochs, len(data.x_train))

    def start():
        seeds = models.run_seeds(range(runs))
        weights = models.init_weights(models.TRAINING[data.name].widths, seeds)
        moves = np.empty((0, len(stack), 5, runs), np.float32)
        return models.to_arrays(w.expand(len(stack), *w.shape) for w in weights) | {"moves": moves}

    def step(state):
        epoch = int(state["steps"])
        try:
            return train_epoch(state, data, experiment, stack, due.get(epoch, {}))
        except ValueError as error:
            raise files.UserError(f"{path.stem}, epoch {epoch}: {error}.") from None

    return files.resume(path, settings, start, step, epochs, bar)


def parts_of(study, dataset, optimizers):
    """Return the parts of a study: a dataset, an optimizer, and a rate if not the published."""
    parts = []
    for name in optimizers:
        experiment = EXPERIMENTS[name]
        known = {"published": [1.0], "best": [experiment.best], "all": experiment.rates}
        rates = sorted({rate for key in study.rates for rate in known[key]})
        parts += [f"{dataset}_{name}" + (f"_{rate:g}" if rate != 1 else "") for rate in rates]
    return parts


def experiment_of(part):
    """Return the dataset, the name of the optimizer and the Experiment, at its rate, of a part."""
    dataset, optimizer, *rate = part.split("_")
    experiment = EXPERIMENTS[optimizer]
    return dataset, optimizer, experiment._replace(lr=experiment.lr * float(*rate or [1]))


def log(part, stack, args):
    """Return the path of a stack's training in logs/ and the settings that it is made with."""
    dataset, optimizer, experiment = experiment_of(part)
    like = experiment.optimizer([torch.zeros(1, requires_grad=True)], experiment.lr)
    settings = dict(dataset=dataset, sample=args.sample, arms=stack, runs=args.runs)
    settings |= dict(epochs=args.epochs, device=args.device.type, seed=models.SEED)
    settings |= dict(activation=str(ACTIVATION), action=ACTION.act.__name__)
    settings |= dict(widths=models.TRAINING[dataset].widths, batch=models.BATCH)
    settings |= dict(optimizer=[optimizer, type(like).__name__, like.defaults])
    teleports = [experiment.epoch, experiment.ascent_lr, TELEPORTS, CAP, TELEPORT_BATCH]
    settings |= dict(teleport=teleports, rescaling=[LENGTH, RESCALING_STEPS])
    folder = args.output / "logs" / "optimization" / args.study
    folder /= f"{dataset}{'-sample' * args.sample}-{args.epochs}epochs-{args.runs}runs"
    return folder / f"{part.partition('_')[2]}-{next(iter(stack))}.npz", settings


def compute(args):
    """Do this rank's share of what logs/ lacks; the unit is a stack with an optimizer."""
    data, study = load_data(args.dataset, args), STUDIES[args.study]
    parts = parts_of(study, args.dataset, args.optimizer)
    units = [(part, stack) for part in parts for stack in stacks_of(study)]
    for part, stack in launch.share_of_rank(units):
        experiment, (path, settings) = experiment_of(part)[2], log(part, stack, args)
        with launch.progress_bar(args.epochs, "epoch", f"{title(part)}: {', '.join(stack)}") as bar:
            train_stack(data, experiment, stack, args.runs, args.epochs, path, settings, bar)


def collect(part, args):
    """Return the results of a part over all arms of its study, their settings and their log.

    They are the CURVES [epochs, arms, runs]; moves [most moves of an arm, arms, 5, runs], nan where
    an arm has fewer; move_seconds [arms]; and seconds [epochs, arms], at which an arm's runs,
    trained as one stack, end each epoch.
    """
    study = STUDIES[args.study]
    arms, stacks = list(study.arms), stacks_of(study)
    logs = [log(part, stack, args) for stack in stacks]
    states = [files.load_steps(*entry, args.epochs) for entry in logs]
    order = [[name for stack in stacks for name in stack].index(arm) for arm in arms]
    results = {key: np.concatenate([s[key] for s in states], 1)[:, order] for key in CURVES}
    # an arm's own moves first: arms of a stack need not move at the same moments
    moves = [m[~np.isnan(m[:, 0]).all(-1)] for s in states for m in s["moves"].swapaxes(0, 1)]
    most = max(map(len, moves))
    moves = [np.pad(m, ((0, most - len(m)), *2 * [(0, 0)]), constant_values=np.nan) for m in moves]
    results["moves"] = np.stack(moves, 1)[:, order]
    moved = np.concatenate([s["move_seconds"] for s in states], 1)[:, order].cumsum(0)
    results["move_seconds"] = moved[-1]
    # all arms together take so long: each has an equal share, and its own moves' seconds
    training = sum(state["seconds"] for state in states).cumsum()[:, None] / len(arms)
    results["seconds"] = training + moved
    results |= {"arms": arms, "primary": f"{study.primary} − plain"}
    (path, settings), lr = logs[0], experiment_of(part)[2].lr
    return settings | {"arms": study.arms, "lr": lr}, results, path


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
    seconds = np.median(seconds[epochs - 1]).round(1)
    return {"runs": len(epochs), "epochs": np.median(epochs), "seconds": seconds}


def over_runs(function, values, otherwise):
    """Return np.mean or np.median of the values that are not nan; `otherwise` if there are none."""
    values = values[~np.isnan(values)]
    return function(values) if values.size else otherwise


def summarise_arm(i, results):
    """Return what summary.json says of the i-th arm: how it ends, what its moves do and cost."""
    own, plain = results["test_loss"][:, i], results["test_loss"][:, 0]
    training = results["train_loss"][-1]
    moves = results["moves"][:, i]
    moves = moves[~np.isnan(moves[:, 0]).all(-1)]
    before_loss, before_norm, after_loss, after_norm, at_once = moves.swapaxes(0, 1)
    factor = after_norm / before_norm
    made = np.where(np.isnan(factor), np.nan, factor != 1)  # above the CAP runs stay
    return {
        "reaches": reach(own, results["seconds"][:, i], plain[-1]),
        "seconds_of_moves": results["move_seconds"][i],
        "moves": len(moves),
        "diverged": np.isnan(own[-1]).sum(),
        "runs_that_end_above_plain": (own[-1] > plain[-1]).sum(),
        "final_training_loss_minus_plain": statistics.paired_difference(training[i], training[0]),
        "mean_change_of_loss": over_runs(np.mean, after_loss - before_loss, 0.0),
        "share_of_moves_made": over_runs(np.mean, made, 0.0),
        "median_factor_of_gradient_norm_squared": over_runs(np.median, factor[made == 1], None),
        "change_of_test_loss_at_first": over_runs(np.mean, at_once, None),
    }


def summarise(part, results):
    """Return what summary.json says of a part.

    That is plain's mean test loss at the epochs EPOCHS_SHOWN, the paired differences of the arms
    from plain, and `summarise_arm` of each arm.
    """
    names = list(results["arms"])
    loss = {arm: results["test_loss"][:, i] for i, arm in enumerate(names)}
    epochs = sorted({min(epoch, len(loss["plain"])) for epoch in EPOCHS_SHOWN})
    pairs = [(arm, "plain") for arm in names[1:]]
    pairs += [("teleport", "reset")] * ({"teleport", "reset"} <= set(names))
    plain = {epoch: loss["plain"][epoch - 1].mean(dtype=float) for epoch in epochs}
    differences = statistics.compare_arms(loss, pairs, epochs)
    differences[str(results["primary"])][epochs[-1]]["verdict"] = "(primary)"
    arms = {arm: summarise_arm(i, results) for i, arm in enumerate(names)}
    lr = experiment_of(part)[2].lr
    return {"lr": lr, "plain": plain, "differences": differences, "arms": arms}


def title(part):
    """Return the dataset, the optimizer and the learning rate of a part as text."""
    dataset, optimizer, experiment = experiment_of(part)
    return f"{TITLES[dataset]}, {optimizer}, lr {experiment.lr:g}"


def cell(value, form):
    """Return a number as a table's cell; – where there is none."""
    return "–" if value is None or np.isnan(value) else format(value, form).replace("-", "−")


def table(summaries):
    """Return the test losses and their differences, and what the moves cost, as Markdown."""
    tables, rows = [], []
    for part, summary in summaries.items():
        diverged = {arm: entry["diverged"] for arm, entry in summary["arms"].items()}
        found = summary["plain"], summary["differences"], diverged
        tables.append(plots.difference_table(title(part), *found))
        for arm, entry in summary["arms"].items():
            at_once = entry["change_of_test_loss_at_first"]
            row = [title(part), arm, *(cell(value, "g") for value in entry["reaches"].values())]
            row.append(str(entry["runs_that_end_above_plain"]))
            row.append(plots.interval_text(entry["final_training_loss_minus_plain"]))
            row.append(cell(entry["seconds_of_moves"], ".2f"))
            row.append(cell(1e3 * entry["mean_change_of_loss"], "+.2f"))
            row.append(cell(at_once and 1e3 * at_once, "+.2f"))
            row.append(cell(100 * entry["share_of_moves_made"], ".0f"))
            row.append(cell(entry["median_factor_of_gradient_norm_squared"], ".3g"))
            rows.append(row)
    header = ["reaching plain's final test loss", "arm", "runs", "epochs", "s"]
    header += ["runs that end above plain", "final training loss − plain's, 10⁻³", "all moves, s"]
    header += ["change of the batch's loss in a move, 10⁻³", "of the test loss in the first"]
    header += ["moves made, %", "median factor of the gradient norm² in these"]
    return "\n".join([*tables, plots.markdown(header, rows)])


def rate_table(summaries):
    """Return the differences at all learning rates as Markdown.

    The rate at which plain's final test loss is lowest is marked; the primary comparison is there.
    """
    rows, epochs = [], list(next(iter(summaries.values()))["plain"])[-2:]
    for part, summary in summaries.items():
        best = best_rate(summaries, part) == part
        row = [title(part) + " (best)" * best]
        for epoch in epochs:
            row.append(cell(summary["plain"][epoch], ".3f"))
            for difference in (after[epoch] for after in summary["differences"].values()):
                mark = f" {difference['verdict']}" if best and "verdict" in difference else ""
                row.append(plots.interval_text(difference) + mark)
        rows.append(row)
    header = ["test loss; differences in 10⁻³"]
    for epoch in epochs:
        header += [f"plain, epoch {epoch}", *(f"{n}, {epoch}" for n in summary["differences"])]
    return plots.markdown(header, rows)


def best_rate(summaries, part):
    """Return the part with plain's lowest final test loss among those of a part's optimizer."""
    same = [other for other in summaries if experiment_of(other)[:2] == experiment_of(part)[:2]]
    final = {other: list(summaries[other]["plain"].values())[-1] for other in same}
    return min(same, key=lambda other: np.nan_to_num(final[other], nan=np.inf))


# Figures


def draw_losses(results, against, title, path):
    """Draw Figure 5 (against epochs) or 13 (against seconds): training dashed, test solid."""
    axes = Figure(figsize=(4.2, 3.2)).add_subplot(title=title, ylabel="loss")
    epochs, seconds = 1 + np.arange(len(results["seconds"])), results["seconds"]
    for arm, label in (("plain", "without teleport"), ("teleport", "with teleport")):
        i = list(results["arms"]).index(arm)
        x = seconds[:, i] if against == "time" else epochs
        for kind, ls in (("train", "--"), ("test", "-")):
            style = {"color": PALETTE[i], "ls": ls, "label": f"{label}, {kind}"}
            plots.plot_mean(axes, x, results[f"{kind}_loss"][:, i], **style)
    axes.set_xlabel("time (s)" if against == "time" else "epoch")
    plots.plain_log_axis(axes, "y")
    plots.legend_beside(axes)
    plots.save_figure(axes.figure, path)


def draw_moves(results, title, path):
    """Draw |∇L|² and the loss on each teleport's batch before and after it, means over runs."""
    figure = Figure(figsize=(8.4, 3.2))
    for axes, quantity, label in zip(figure.subplots(1, 2), (1, 0), (r"$|\nabla L|^2$", "loss")):
        for arm in ("teleport", "kept", "random"):
            i = list(results["arms"]).index(arm)
            values = np.nanmean(results["moves"][:, i, :4], -1)  # [teleports, 4]
            # each teleport is a line from before to after; the batch and SGD's step lie between
            for k, (before, after) in enumerate(values[:, [quantity, quantity + 2]]):
                label_once = {"label": arm} if k == 0 else {}
                axes.plot([k + 1, k + 1.6], [before, after], ".-", color=PALETTE[i], **label_once)
        axes.set(xlabel="teleport, before and after", ylabel=label, title=title)
        axes.set_xticks(range(1, TELEPORTS + 1))
        if quantity == 1:
            plots.plain_log_axis(axes, "y")
    plots.legend_beside(axes)
    figure.tight_layout()
    plots.save_figure(figure, path)


def draw(part, results, _, folder):
    """Draw the figures of a part; Figures 5 and 13 where it has their arms."""
    names = list(results["arms"])
    if {"plain", "teleport", "kept", "random"} <= set(names):
        for against in ("epoch", "time"):
            draw_losses(results, against, title(part), folder / f"{part}_loss_vs_{against}")
        draw_moves(results, title(part), folder / f"{part}_teleports")
    loss = results["test_loss"].swapaxes(0, 1)
    arms = {arm: (c, None, loss[i]) for i, (arm, c) in enumerate(zip(names, cycle(PALETTE)))}
    epochs = 1 + np.arange(len(results["seconds"]))
    plots.draw_arms(folder / f"{part}_arms", title(part), epochs, arms, loss[0])


def draw_rates(part, results, summary, folder):
    """Draw an optimizer's test loss against the learning rate, with its last part."""
    dataset, optimizer, _ = experiment_of(part)
    parts = parts_of(STUDIES["lr"], dataset, [optimizer])
    found = {p: files.read(folder / f"{p}.npz") for p in parts}
    if part != parts[-1] or None in found.values():
        return
    figure = Figure(figsize=(8.4, 3.2))
    rates = [experiment_of(p)[2].lr for p in parts]
    epochs = list(summary["plain"])[-2:]
    for axes, epoch in zip(figure.subplots(1, len(epochs), squeeze=False)[0], epochs):
        for i, arm in enumerate(results["arms"]):
            values = np.stack([r.arrays["test_loss"][epoch - 1, i] for r in found.values()])
            style = {"color": PALETTE[i % 8], "marker": plots.MARKERS[i % 8], "ms": 4}
            plots.plot_mean(axes, rates, values, label=arm, **style)
        axes.set(xlabel="learning rate", ylabel="test loss", xscale="log")
        axes.set_title(f"{TITLES[dataset]}, {optimizer}, epoch {epoch}")
        plots.plain_log_axis(axes, "y")
    plots.legend_beside(axes)
    figure.tight_layout()
    plots.save_figure(figure, folder / f"{dataset}_{optimizer}_rates")


# Options


def parse_arguments():
    parser = launch.experiment_parser(__doc__)
    add, names, at_least = parser.add_argument, list(EXPERIMENTS), launch.at_least
    add("--study", choices=STUDIES, default="published", help="which arms and learning rates")
    add("--dataset", choices=models.TRAINING, default="MNIST", help="which dataset")
    add("--optimizer", nargs="+", choices=names, default=names, help="which optimizers")
    add("--runs", type=at_least(2), default=DEFAULTS["runs"], help="runs of each arm; published: 5")
    least = at_least(1 + max(experiment.epoch for experiment in EXPERIMENTS.values()))
    add("--epochs", type=least, default=DEFAULTS["epochs"], help="passes over the images")
    return parser.parse_args()


def check_study(study):
    """Raise UserError where a Study can't be trained or reported, before it is trained."""
    first, *others = study.arms
    if first != "plain" or study.primary not in others:
        sentence = f"plain first, and its primary, {study.primary!r}, among {', '.join(others)}"
        raise files.UserError(f"a study needs {sentence}.")
    known, teleported = [*MOVES, "teleport"], []
    for name, arm in study.arms.items():
        move, *amount = arm.move or ("stay", 0)
        if " − " in name or move not in known or len(amount) != 1:
            sentence = f'a name without " − ", and (move, amount) with a move of {", ".join(known)}'
            raise files.UserError(f"the arm {name!r} needs {sentence}.")
        teleported += [arm[1:]] * (move == "teleport")
        if move in ("random", "level set", "gradient step") and arm[1:] not in teleported:
            sentence = "one above it that teleports at the same moments, both renewed or neither"
            raise files.UserError(f"the arm {name!r} needs {sentence}.")


def main():
    args = parse_arguments()
    check_study(STUDIES[args.study])
    study, name = STUDIES[args.study], f"-{args.study}" * (args.study != "published")
    folder = launch.figures_folder(args, f"optimization{name}", DEFAULTS)
    parts = [part for data in models.TRAINING for part in parts_of(study, data, EXPERIMENTS)]
    asked = parts_of(study, args.dataset, args.optimizer)
    made = (rate_table, draw_rates) if args.study == "lr" else (table, draw)
    launch.compute_and_report(args, folder, parts, asked, compute, collect, summarise, *made)


if __name__ == "__main__":
    launch.run(main)
