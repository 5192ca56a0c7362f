"""Other teleports than the paper's: by other actions, at other times, further, more often.

    python studies/teleports.py --question action
    python studies/teleports.py --question when --sample
    python studies/teleports.py --question lr --optimizer SGD AdaGrad momentum RMSprop Adam

Each question has arms of its own, which train as those of teleport_optimization.py do. Unless an
arm says otherwise, it moves before the published mini-batches and keeps the optimizer's state.

    action      rescalings, and moves off the orbit that are as long as a teleport
    when        teleports in other epochs
    how-far     teleports of more or fewer steps
    how-often   teleports before more or fewer mini-batches
    rescaling   rescalings, which keep the network's function, later and more often
    lr          teleports at other learning rates

All but the last are asked at the published learning rate and at the best one, at which plain has
the lowest final test loss on MNIST. Training goes to logs/teleports/<question>/; an interrupted run
resumes from there. The curves of each arm and run go to figures/teleports/<question>/<dataset>/.
"""

import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from math import ceil
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from matplotlib.figure import Figure

import models
import teleport_optimization as script
from data import TITLES, load_data
from experiment import plots, results, run
from parameter_symmetries.ascent import value_and_gradient
from teleport_optimization import ACTIVATION, MOVES, OPTIMIZERS
from teleportation import (
    RESCALING,
    ascend_to,
    gradient_norm_squared,
    inner_product,
    loss_and_gradient_norm_squared,
)

LENGTH, RESCALING_STEPS = 0.02, 100  # |T| of a step of a rescaling, and the most of them


# Moves

LAST = {}  # "length": [runs], how far `pseudoinverse` went; arms below it in a stack go as far


def pseudoinverse(weights, x, y, lr, rng):
    """Return the weights after the published teleport, and note in LAST how far that was."""
    moved = script.to_larger_gradient(weights, x, y, lr, rng)
    way = [new - old for new, old in zip(moved, weights)]
    LAST["length"] = inner_product(way, way).sqrt()
    return moved


@torch.no_grad()
def level_set_ascent(weights, x, y, length, steps, activation):
    """Move to a larger gradient within the batch's level set, by no symmetry.

    Each step moves by `length` along ∇|∇L|² = 2 H∇L, projected onto the tangent of the level set;
    two Newton steps along ∇L then bring the loss back (Mishkin, Bietti, Gower 2024). An orbit that
    keeps the batch's loss lies in its level set, so this is a fair comparison for a teleport of the
    same length. Shapes are those of `teleport`. Returns the new weights and a dict of `objective`,
    |∇L|² [steps + 1, ...].
    """

    def loss(weights):
        return models.cross_entropy(weights, x, y, activation)

    def norm(weights):
        return loss_and_gradient_norm_squared(weights, x, y, activation)[1]

    def plus(weights, scale, direction):
        scale = scale.nan_to_num(0.0, 0.0, 0.0)  # where the gradient is 0 no step is taken
        return [w + scale[..., None, None] * d for w, d in zip(weights, direction)]

    start, path = loss(weights), []
    for _ in range(steps):
        value, direction = value_and_gradient(norm, weights)
        path.append(value)
        slope = value_and_gradient(loss, weights)[1]
        direction = plus(direction, -inner_product(direction, slope) / value, slope)
        weights = plus(weights, length / inner_product(direction, direction).sqrt(), direction)
        for _ in range(2):
            now, slope = value_and_gradient(loss, weights)
            weights = plus(weights, (start - now) / inner_product(slope, slope), slope)
    path.append(models.warn_if_not_finite("|∇L|²", norm(weights)))
    return weights, {"objective": torch.stack(path)}


def level_set(weights, x, y, lr, rng):
    """Return the weights after steps within the batch's level set, in all as long as LAST."""
    length = LAST["length"] / script.STEPS
    return level_set_ascent(weights, x, y, length, script.STEPS, ACTIVATION)[0]


def gradient_step(weights, x, y, lr, rng):
    """Return the weights after a step down the batch's gradient, as long as LAST."""
    loss = partial(models.cross_entropy, x=x, y=y, activation=ACTIVATION)
    _, gradient = value_and_gradient(loss, weights)
    scale = (LAST["length"] / inner_product(gradient, gradient).sqrt())[..., None, None]
    return [w - scale * g for w, g in zip(weights, gradient)]


def rescale(weights, x, y, lr, rng, factor):
    """Return weights rescaled so far that MOVES such moves multiply |∇L|² by a factor."""
    objective = partial(gradient_norm_squared, x=x, y=y, activation=ACTIVATION)
    target = factor ** (1 / MOVES) * objective(weights)
    limits = LENGTH, RESCALING_STEPS, ACTIVATION, RESCALING
    return ascend_to(target, objective, weights, x, *limits)[0]


# Questions


class Arm(NamedTuple):
    """How an arm moves, and when."""

    move: Callable | None
    options: dict = {}  # of the move
    epochs: tuple | None = None  # indices of those with moves; None: the published one
    every_epoch: bool = False  # has moves
    moves: int = MOVES  # in each of these epochs
    spacing: int = 1  # mini-batches from one move to the next
    new_optimizer: bool = False  # after each move


class Question(NamedTuple):
    """The comparison named beforehand, the learning rates to ask it at, and the arms."""

    primary: str
    rates: dict  # of each optimizer
    arms: dict


PUBLISHED_AND_BEST = {
    "SGD": [1e-2],
    "AdaGrad": [1e-2, 3e-2],
    "momentum": [1e-3],
    "RMSprop": [1e-4, 3e-4],
    "Adam": [1e-4, 3e-4],
}
GRID = {
    "SGD": [3e-3, 1e-2, 3e-2, 1e-1],
    "AdaGrad": [3e-3, 1e-2, 3e-2, 1e-1],
    "momentum": [3e-4, 1e-3, 3e-3, 1e-2],
    "RMSprop": [1e-4, 3e-4, 1e-3, 3e-3],
    "Adam": [1e-4, 3e-4, 1e-3, 3e-3],
}
PLAIN, TELEPORT, DOUBLE = Arm(None), Arm(script.to_larger_gradient), Arm(rescale, {"factor": 2})
ACTION = {
    "plain": PLAIN,
    "pseudoinverse": Arm(pseudoinverse),
    "random": Arm(script.at_random),
    "level set": Arm(level_set),
    "gradient step": Arm(gradient_step),
    "rescaling × 1.1": Arm(rescale, {"factor": 1.1}),
    "rescaling × 1.5": Arm(rescale, {"factor": 1.5}),
    "rescaling × 2": DOUBLE,
}
WHEN = {
    "plain": PLAIN,
    **{f"epoch {e}": TELEPORT._replace(epochs=(e,)) for e in (0, 1, 2, 5, 10, 20)},
    "every epoch": TELEPORT._replace(every_epoch=True),
}
HOW_FAR = {
    "plain": PLAIN,
    "1 step": TELEPORT._replace(options={"steps": 1}),
    "10 steps": TELEPORT,
    "100 steps": TELEPORT._replace(options={"steps": 100}),
    "1000 steps": TELEPORT._replace(options={"steps": 1000}),
}
HOW_OFTEN = {
    "plain": PLAIN,
    "1 mini-batch": TELEPORT._replace(moves=1),
    "8 mini-batches": TELEPORT,
    "64 mini-batches": TELEPORT._replace(moves=64),
    "every 10th of an epoch": TELEPORT._replace(every_epoch=True, moves=10, spacing=250),
}
RESCALINGS = {
    "plain": PLAIN,
    "epoch 0": DOUBLE,
    "epoch 5": DOUBLE._replace(epochs=(5,)),
    "every epoch": DOUBLE._replace(every_epoch=True),
    "64 mini-batches": DOUBLE._replace(moves=64),
}
RATES = {"plain": PLAIN, "kept": TELEPORT, "teleport": TELEPORT._replace(new_optimizer=True)}
QUESTIONS = {
    "action": Question("rescaling × 2 − plain", PUBLISHED_AND_BEST, ACTION),
    "when": Question("every epoch − plain", PUBLISHED_AND_BEST, WHEN),
    "how-far": Question("100 steps − plain", PUBLISHED_AND_BEST, HOW_FAR),
    "how-often": Question("every 10th of an epoch − plain", PUBLISHED_AND_BEST, HOW_OFTEN),
    "rescaling": Question("every epoch − plain", PUBLISHED_AND_BEST, RESCALINGS),
    "lr": Question("kept − plain at the best rate", GRID, RATES),
}


# Computation


class Stack(NamedTuple):
    """Arms of a question, with an optimizer on a dataset, whose runs are trained as one stack."""

    question: str
    dataset: str
    optimizer: str
    lr: float
    arms: tuple  # names


def stacks(args, optimizers):
    """Return the stacks with some optimizers, {name of the file of their results: [Stack]}."""
    question = QUESTIONS[args.question]
    return {
        f"{optimizer}-lr{lr:g}": [
            Stack(args.question, args.dataset, optimizer, lr, names)
            for names in script.split(question.arms)
        ]
        for optimizer in optimizers
        for lr in question.rates[optimizer]
    }


def training_log(stack, args):
    """Return the Log of a stack's training."""
    setting = OPTIMIZERS[stack.optimizer]._replace(lr=stack.lr)
    arms = QUESTIONS[stack.question].arms
    arms = {name: arm._replace(move=arm.move and arm.move.__name__) for name, arm in arms.items()}
    settings = script.training_settings(stack.dataset, setting, args) | stack._asdict()
    settings["definitions"] = {name: arm._asdict() for name, arm in arms.items()}
    settings["rescaling"] = [LENGTH, RESCALING_STEPS]
    folder = f"{stack.dataset}{'-sample' * args.sample}-{args.epochs}epochs-{args.runs}runs"
    name = f"{stack.optimizer}-lr{stack.lr:g}-{stack.arms[0]}.npz"
    path = args.output / "logs" / "teleports" / stack.question / folder / name
    return results.Log(path, settings, (script.__file__, __file__))


def train(stack, args, bar):
    """Train the arms of a stack, each of which moves at its own moments."""
    setting = OPTIMIZERS[stack.optimizer]._replace(lr=stack.lr)
    table = {name: QUESTIONS[stack.question].arms[name] for name in stack.arms}
    arms = {
        name: script.Arm(arm.move and partial(arm.move, **arm.options), arm.new_optimizer)
        for name, arm in table.items()
    }
    batches = ceil(len(load_data(stack.dataset, args).x_train) / models.BATCH)
    moments = moments_of(table, setting.epoch, args.epochs, batches)
    script.train_arms(training_log(stack, args), stack.dataset, setting, arms, moments, args, bar)


def moments_of(arms, published, epochs, batches):
    """Return {epoch: {mini-batch: {arm's name: k}}}, before which arms make their k-th moves.

    published: the index of the epoch with moves, unless an arm names others; epochs: how many are
    trained; batches: how many mini-batches each has.
    """
    moments = {}
    for name, arm in arms.items():
        if arm.move:
            some = [epoch for epoch in arm.epochs or [published] if epoch < epochs]
            chosen = range(epochs) if arm.every_epoch else some
            first = range(0, min(arm.moves * arm.spacing, batches), arm.spacing)
            for k, (epoch, batch) in enumerate(product(chosen, first)):
                moments.setdefault(epoch, {}).setdefault(batch, {})[name] = k
    return moments


# Figures


def draw_rates(path, parts):
    """Draw the final test loss against the learning rate, a panel for each optimizer.

    parts: a Result for each learning rate of each optimizer.
    """
    optimizers = list(dict.fromkeys(part.settings["optimizer"] for part in parts))
    figure = Figure(figsize=(1 + 2.8 * len(optimizers), 3.4), layout="constrained")
    axes = figure.subplots(1, len(optimizers), squeeze=False)[0]
    for ax, optimizer in zip(axes, optimizers):
        chosen = [part for part in parts if part.settings["optimizer"] == optimizer]
        rates = [part.settings["lr"] for part in chosen]
        final = np.stack([part.arrays["test_loss"][-1] for part in chosen])  # [rates, arms, runs]
        for i, (arm, color) in enumerate(zip(RATES, (plots.BLACK, *script.COLORS))):
            style = {"color": color, "marker": plots.MARKERS[i]}
            plots.plot_mean(ax, rates, final[:, i], label=arm, **style)
        ax.set(title=optimizer, xlabel="learning rate", xscale="log")
        plots.plain_log_axis(ax, "y")
    axes[0].set(ylabel="final test loss")
    plots.legend_below(figure, axes[0])
    plots.save_figure(figure, path)


# The script


def parse_arguments():
    parser = run.experiment_parser(__doc__)
    add, number, names = parser.add_argument, run.whole_number, list(OPTIMIZERS)
    add("--question", choices=QUESTIONS, required=True, help="which arms")
    add("--dataset", choices=models.TRAINING, default="MNIST", help="which dataset")
    chosen = ["momentum", "Adam"]
    add("--optimizer", nargs="+", choices=names, default=chosen, help="which optimizers")
    add("--runs", type=number(2), default=script.DEFAULTS["runs"], help="runs of each arm")
    epochs = script.DEFAULTS["epochs"]
    add("--epochs", type=number(1), default=epochs, help="passes over the images")
    return parser.parse_args()


def main():
    args = parse_arguments()
    folder = run.figures_folder(args, script.DEFAULTS) / "teleports" / args.question / args.dataset
    asked = stacks(args, args.optimizer)
    if not args.plot_only:
        results.check_writable(folder)
        load_data(args.dataset, args)  # fetches it, if it is missing, before the workers start
        tasks = [stack for part in asked.values() for stack in part]
        results.warn_of_other_code([training_log(stack, args) for stack in tasks])
        run.run_tasks(train, tasks, args, args.epochs, "epoch")
        for name, part in asked.items():
            logs = [training_log(stack, args) for stack in part]
            results.save(folder / f"{name}.npz", script.collect(logs, args))

    parts = results.read_all(folder, stacks(args, OPTIMIZERS), required=asked).values()
    parts = {f"{p.settings['optimizer']}, lr {p.settings['lr']:g}": p for p in parts}
    arrays = {title: part.arrays for title, part in parts.items()}
    summaries = {title: script.summarise(values) for title, values in arrays.items()}
    results.save_summaries(folder / "summary.json", parts, summaries)
    text = script.table(TITLES[args.dataset], summaries, QUESTIONS[args.question].primary)
    results.save_text(folder / "table.md", text)
    if args.question == "lr":
        draw_rates(folder / "rates", list(parts.values()))
    else:
        script.draw_differences(folder / "differences", arrays)
    print(f"\n{text}\nFigure, and each run: {folder}")


if __name__ == "__main__":
    run.run(main)
