"""Other teleports than the paper's: by other actions, at other times, further, more often.

    python studies/teleports.py --question action
    python studies/teleports.py --question when --sample

Each question has arms of its own, which train as those of teleport_optimization.py do. They keep
the optimizer's state, and move before the published mini-batches unless they say otherwise.

    action      rescalings, and moves off the orbit that are as long as a teleport
    when        teleports in other epochs
    how-far     teleports of more or fewer steps
    how-often   teleports before more or fewer mini-batches
    rescaling   rescalings, which keep the network's function, later and more often

All are asked at the published learning rate and at the best one, at which plain has the lowest
final test loss on MNIST. Training goes to logs/teleports/<question>/; an interrupted run resumes
from there. The curves of each arm and run go to figures/teleports/<question>/<dataset>/.
"""

import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from math import ceil
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import models
import teleport_optimization as script
from data import load_data
from experiment import results, run
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
def level_set(weights, x, y, lr, rng):
    """Return the weights after steps within the batch's level set, in all as long as LAST.

    Each step moves along ∇|∇L|² = 2 H∇L, projected onto the tangent of the level set; two Newton
    steps along ∇L then bring the loss back (Mishkin, Bietti, Gower 2024). An orbit that keeps the
    batch's loss lies in its level set, so this is a fair comparison for a teleport of the same
    length, though it moves by no symmetry.
    """
    length = LAST["length"] / script.STEPS

    def loss(weights):
        return models.cross_entropy(weights, x, y, ACTIVATION)

    def norm(weights):
        return loss_and_gradient_norm_squared(weights, x, y, ACTIVATION)[1]

    def plus(weights, scale, direction):
        scale = scale.nan_to_num(0.0, 0.0, 0.0)  # where the gradient is 0 no step is taken
        return [w + scale[..., None, None] * d for w, d in zip(weights, direction)]

    start = loss(weights)
    for _ in range(script.STEPS):
        value, direction = value_and_gradient(norm, weights)
        slope = value_and_gradient(loss, weights)[1]
        direction = plus(direction, -inner_product(direction, slope) / value, slope)
        weights = plus(weights, length / inner_product(direction, direction).sqrt(), direction)
        for _ in range(2):
            now, slope = value_and_gradient(loss, weights)
            weights = plus(weights, (start - now) / inner_product(slope, slope), slope)
    return weights


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


RATES = {  # of each optimizer: the published one, and the best one if that is another
    "SGD": [1e-2],
    "AdaGrad": [1e-2, 3e-2],
    "momentum": [1e-3],
    "RMSprop": [1e-4, 3e-4],
    "Adam": [1e-4, 3e-4],
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
QUESTIONS = {  # the comparison named beforehand, and the arms
    "action": ("rescaling × 2 − plain", ACTION),
    "when": ("every epoch − plain", WHEN),
    "how-far": ("100 steps − plain", HOW_FAR),
    "how-often": ("every 10th of an epoch − plain", HOW_OFTEN),
    "rescaling": ("every epoch − plain", RESCALINGS),
}


# Computation


def training_logs(optimizers, args):
    """Return {name of a Result: [the Log of its arms]}, for each optimizer at each of its RATES."""
    _, table = QUESTIONS[args.question]
    definitions = {
        name: arm._asdict() | {"move": arm.move and arm.move.__name__}
        for name, arm in table.items()
    }
    more = {"question": args.question, "definitions": definitions}
    more["rescaling"] = [LENGTH, RESCALING_STEPS]
    logs = {}
    for optimizer in optimizers:
        for lr in RATES[optimizer]:
            setting, name = OPTIMIZERS[optimizer]._replace(lr=lr), f"{optimizer}-lr{lr:g}"
            path, settings, code = script.training_log(optimizer, setting, list(table), args)
            folder = path.parents[2] / "teleports" / args.question / path.parent.name
            settings |= more | {"lr": lr}
            logs[name] = [results.Log(folder / f"{name}.npz", settings, (*code, __file__))]
    return logs


def train(log, args, bar):
    """Train the arms of a Log, each of which moves at its own moments."""
    setting = OPTIMIZERS[log.settings["optimizer"]]._replace(lr=log.settings["lr"])
    _, table = QUESTIONS[args.question]
    arms = {
        name: script.Arm(arm.move and partial(arm.move, **arm.options), new_optimizer=False)
        for name, arm in table.items()
    }
    batches = ceil(len(load_data(args.dataset, args).x_train) / models.BATCH)
    moments = moments_of(table, setting.epoch, args.epochs, batches)
    script.train_arms(log, setting, arms, args, bar, moments)


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


# The script


def parse_arguments():
    parser = run.experiment_parser(__doc__)
    parser.add_argument("--question", choices=QUESTIONS, required=True, help="which arms")
    return script.parse_arguments(parser, optimizers=("momentum", "Adam"))


def main():
    args = parse_arguments()
    folder = run.figures_folder(args, script.DEFAULTS) / "teleports" / args.question / args.dataset
    asked = training_logs(args.optimizer, args)
    if not args.plot_only:
        script.compute(train, asked, args, folder)

    parts = results.read_all(folder, training_logs(OPTIMIZERS, args), required=asked).values()
    parts = {f"{p.settings['optimizer']}, lr {p.settings['lr']:g}": p for p in parts}
    primary, _ = QUESTIONS[args.question]
    text = script.write_up(folder, args.dataset, parts, primary, "differences")
    print(f"\n{text}\nFigure, and each run: {folder}")


if __name__ == "__main__":
    run.run(main)
