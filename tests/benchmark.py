"""How long each piece takes, and how far that is above the floor of its matrix products.

    python tests/benchmark.py            # run nothing else meanwhile
    python tests/benchmark.py SGD MNIST  # only the rows whose names contain these words
    python tests/benchmark.py growth     # a teleport's cost against width, depth and batch

The floor of a piece is the number of operations in its matrix products over the rate of a large
matrix product, measured in the same run. Everything has one thread, as in the scripts' workers.
Data are made up: the time does not depend on them.
"""

import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "learn-to-teleport")]

import correlation  # noqa: E402
import models  # noqa: E402
import multi_layer_regression  # noqa: E402
import regression  # noqa: E402
import teleport_optimization  # noqa: E402
import teleport_sharpness_curvature as generalization  # noqa: E402
import teleportation  # noqa: E402
from experiment import plots, results  # noqa: E402
from models import MLP, TRAINING, LeakyReLU, cross_entropy, init_weights  # noqa: E402
from parameter_symmetries.ascent import ascend, value_and_gradient  # noqa: E402
from test_learn_to_teleport import train_plainly  # noqa: E402

torch.set_num_threads(1)
SIGMA = LeakyReLU()


class Row(NamedTuple):
    """The seconds that a piece took, and the operations of its matrix products."""

    seconds: float
    operations: float = math.nan  # where they are not counted
    limit: float | None = None  # seconds that the piece should stay under


def best_seconds(function, repeats=3):
    """Return the shortest of some calls' times, after one call to warm up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def matmul_rate(n=3000):
    """Return the operations a second of a large float32 matrix product."""
    a, b = torch.rand(2, n, n)
    return 2 * n**3 / best_seconds(lambda: a @ b, repeats=5)


def connections(widths):
    """Return the number of weights: the multiplications of a forward pass of one image."""
    return sum(a * b for a, b in zip(widths, widths[1:]))


def training_products(widths):
    """Return an image's multiplications: forward, backward but for the inputs, and gradients."""
    return 3 * connections(widths) - widths[0] * widths[1]


def batch(widths, n):
    """Return made-up x: [d_0, n] and y: [n]."""
    return torch.rand(widths[0], n), torch.randint(10, (n,))


# Training


def by_blocks(weights, x, y, lr):
    """SGD as Table 1 has it."""
    models.train_epoch_sgd(weights, x, y, lr, SIGMA)


def by_autograd(weights, x, y, lr):
    """SGD without closed forms, batch by batch."""
    weights = [w.requires_grad_() for w in weights]
    optimizer = torch.optim.SGD(weights, lr)
    for images, labels in zip(x.split(models.BATCH), y.split(models.BATCH)):
        optimizer.zero_grad()
        cross_entropy(weights, images.T, labels, SIGMA).sum().backward()
        optimizer.step()


def sgd(name, train, images):
    """Training of Table 1's 100 networks for 40 epochs, from the time of `images` images."""
    (widths, lr), stack = TRAINING[name], correlation.STACK[name]
    weights, (x, y) = init_weights(widths, range(stack)), batch(widths, images)
    scale, x = 100 / stack * 40 * 50_000 / images, x.T.contiguous()
    seconds = best_seconds(lambda: train(weights, x, y, lr))
    return Row(scale * seconds, scale * 2 * images * stack * training_products(widths))


def epoch(optimizer, runs=40, images=2_000):
    """An epoch on MNIST of two arms of 20 runs, from the time of `images` images."""
    widths, setting = TRAINING["MNIST"].widths, teleport_optimization.OPTIMIZERS[optimizer]
    model, (x, y) = MLP(init_weights(widths, range(runs)), SIGMA), batch(widths, images)
    optimizer, x = setting.optimizer(model.parameters(), setting.lr), x.T.contiguous()
    seconds = best_seconds(lambda: models.train_epoch(model, x, y, optimizer))
    scale = 50_000 / images
    return Row(scale * seconds, scale * 2 * images * runs * training_products(widths))


# Teleports and estimates


def teleport(name, runs, limit=None, steps=10, n=200):
    """A teleport of some runs to a larger gradient."""
    widths = TRAINING[name].widths
    weights, (x, y) = init_weights(widths, range(runs) if runs > 1 else 1), batch(widths, n)
    seconds = best_seconds(lambda: teleportation.teleport(weights, x, y, 1e-4, steps, SIGMA), 10)
    # once: Q of n inputs, W_0 Q and g W_0; a step is about nine forward passes of n inputs
    once = 2 * n**2 * widths[0] + runs * widths[0] * widths[1] * (n + widths[1])
    step = 9 * runs * n * connections((n, *widths[1:]))
    return Row(seconds, 2 * (once + steps * step), limit)


def teleport_by_autograd(name, runs, steps=10, n=200):
    """The same without closed forms, and without the reduction of x to its span."""
    widths = TRAINING[name].widths
    weights, (x, y) = init_weights(widths, range(runs)), batch(widths, n)

    def norm(weights):
        loss = cross_entropy(weights, x, y, SIGMA).sum()
        gradient = torch.autograd.grad(loss, weights, create_graph=True)
        return teleportation.inner_product(gradient, gradient)

    def gradient(weights):
        return value_and_gradient(norm, weights)

    def value(weights):
        return gradient(weights)[0]

    orbit = teleportation.orbit_of(weights, x, SIGMA)
    return Row(
        best_seconds(lambda: ascend(orbit, value, weights, 1e-4, steps, gradient=gradient), 10)
    )


def sharpness_step(name, runs):
    """A step of some runs in sharpness, 900 directions, on a batch of 2,000."""
    setting = generalization.SETTINGS[name]
    widths, n, K = setting.widths, setting.teleport_batch, len(setting.radii) * setting.directions
    weights, (x, y) = init_weights(widths, range(runs)), batch(widths, n)
    draws = setting.radii, setting.directions, 0, SIGMA
    # the path has one evaluation more than steps
    step = best_seconds(lambda: teleportation.teleport_sharpness(weights, x, y, 1e-2, 1, *draws), 2)
    products = widths[0] * widths[1] + runs * 3 * connections(widths[1:])
    return Row(step / 2, 2 * n * K * products)


def curvature_step(runs=10):
    """κ and dκ/dt of a stack of MNIST's networks on a batch of 2,000."""
    setting = generalization.SETTINGS["MNIST"]
    widths, n, pair = setting.widths, setting.teleport_batch, setting.pair
    weights, x = init_weights(widths, range(runs)), batch(widths, n)[0]
    M = torch.rand(widths[2], widths[2])
    seconds = best_seconds(lambda: teleportation.curvature_along(weights, x, M, pair, SIGMA))
    # V h, three times M z, the pseudoinverse, and ten products among a and its derivatives
    return Row(seconds, 2 * n * runs * (connections(widths[:3]) + 14 * widths[2] ** 2))


def estimates(name):
    """φ and ψ of 100 networks on one batch of 200."""
    widths, stack = TRAINING[name].widths, correlation.STACK[name]
    n, radii = correlation.ESTIMATION_BATCH, teleportation.RADII[name]
    x, y = batch(widths, n)
    stacks = [init_weights(widths, range(stack)) for _ in range(100 // stack)]
    seconds = best_seconds(
        lambda: [teleportation.estimate(weights, x, y, radii, 0, SIGMA) for weights in stacks]
    )
    first, above, k = widths[0] * widths[1], connections(widths[1:]), len(radii)
    phi = 100 * first + k * first + 100 * k * above
    # γ' and γ'': for each pair M h and M² h, and their products with h^+ (n inputs, or d)
    psi = 100 * sum(2 * d * d + 2 * d * fan_in for fan_in, d in zip((n, *widths[1:]), widths[1:-1]))
    return Row(seconds, 2 * n * (phi + psi))


def curve(name, closed, runs=20, n=200):
    """γ' and γ'' of a stack on one batch: by Eqs. 57 and 60, or in forward mode."""
    widths = TRAINING[name].widths
    weights, x = init_weights(widths, range(runs)), batch(widths, n)[0]
    generators = [torch.rand(d, d) / d for d in widths[1:-1]]

    def acted_on(t):
        elements = [teleportation.exponential(t * M) for M in generators]
        return teleportation.act(weights, x, elements, SIGMA, teleportation.INVERSE_ACTIVATION)

    def derivatives():
        if closed:
            return teleportation.curve_derivatives(weights, x, generators, SIGMA)
        return teleportation.two_derivatives(acted_on, torch.zeros(()))

    return Row(best_seconds(derivatives))


def figure_6(plainly):
    """Training of LSTM(update) on one trajectory, or the same by plain autograd."""
    training = multi_layer_regression.TRAININGS[2]
    lstms, adam = regression.new_training(training.networks, training.scaled, 1)
    problem = regression.draw_problem(12344)
    if plainly:
        arguments = training.networks, problem, training.steps, training.scaled
        return Row(best_seconds(lambda: train_plainly(lstms, *arguments)))
    arguments = lstms, adam, problem, training.steps
    return Row(best_seconds(lambda: regression.train_trajectory(*arguments)))


ROWS = {
    "SGD, MNIST: 100 runs, 40 epochs": lambda: sgd("MNIST", by_blocks, 10_000),
    "SGD by autograd, MNIST: the same": lambda: sgd("MNIST", by_autograd, 5_000),
    "SGD, CIFAR-10: 100 runs, 40 epochs": lambda: sgd("CIFAR10", by_blocks, 2_000),
    "SGD by autograd, CIFAR-10: the same": lambda: sgd("CIFAR10", by_autograd, 1_000),
    **{
        f"{name}, MNIST: 40 runs, an epoch": lambda name=name: epoch(name)
        for name in teleport_optimization.OPTIMIZERS
    },
    "teleport, MNIST: 1 run, 10 steps": lambda: teleport("MNIST", 1, limit=0.03),
    "teleport, MNIST: 20 runs, 10 steps": lambda: teleport("MNIST", 20, limit=0.12),
    "teleport by autograd, MNIST: the same": lambda: teleport_by_autograd("MNIST", 20),
    "teleport, CIFAR-10: 20 runs, 10 steps": lambda: teleport("CIFAR10", 20),
    "teleport by autograd, CIFAR-10: the same": lambda: teleport_by_autograd("CIFAR10", 20),
    "sharpness, MNIST: 10 runs, a step": lambda: sharpness_step("MNIST", 10),
    "sharpness, CIFAR-10: 1 run, a step": lambda: sharpness_step("CIFAR10", 1),
    "sharpness, CIFAR-10: 10 runs, a step": lambda: sharpness_step("CIFAR10", 10),
    "curvature, MNIST: 10 runs, κ and dκ/dt": curvature_step,
    "φ and ψ, MNIST: 100 networks, one batch": lambda: estimates("MNIST"),
    "φ and ψ, CIFAR-10: 100 networks, one batch": lambda: estimates("CIFAR10"),
    "γ' and γ'', MNIST: 20 runs": lambda: curve("MNIST", closed=True),
    "γ' and γ'' in forward mode: the same": lambda: curve("MNIST", closed=False),
    "Figure 6: LSTM(update), one trajectory": lambda: figure_6(plainly=False),
    "Figure 6 by plain autograd: the same": lambda: figure_6(plainly=True),
}


# Growth

GROWTH = {"width": (16, 64, 256, 1024, 4096), "depth": (2, 4, 8, 16), "batch": (32, 128, 512, 2048)}
BASE = {"width": 64, "depth": 3, "batch": 200}  # hidden units, hidden layers, images


def cost(piece, times):
    """Return the seconds and operations of a piece that does the same so many times."""
    start = time.perf_counter()
    with FlopCounterMode(display=False) as counter:
        piece()
    seconds = time.perf_counter() - start
    if seconds < 5:  # else it is the operations that take the time, not what counts them
        seconds = best_seconds(piece, 2)
    return seconds / times, counter.get_total_flops() / times


def costs(width, depth, batch):
    """Return the `cost` of a teleport of ten steps, and of a step of SGD.

    The network has 784 inputs, `depth` hidden layers of `width` units, and 10 classes.
    """
    steps = 10 if width < 4096 else 1  # of which each costs the same
    weights = init_weights((784, *depth * (width,), 10), 1)
    x, y = torch.rand(784, batch), torch.randint(10, (batch,))
    images, labels = torch.rand(10 * models.BATCH, 784), torch.randint(10, (10 * models.BATCH,))
    model = MLP([w.clone() for w in weights], SIGMA)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    return (
        cost(lambda: teleportation.teleport(weights, x, y, 1e-6, steps, SIGMA), steps / 10),
        cost(lambda: models.train_epoch(model, images, labels, optimizer), 10),
    )


def growth():
    """Write the table and the figure of how a teleport's cost grows, to figures/growth/."""
    figure, rows = Figure(figsize=(9, 3.2), layout="constrained"), []
    for axes, (varied, values) in zip(figure.subplots(1, 3), GROWTH.items()):
        others = ", ".join(f"{key} {value}" for key, value in BASE.items() if key != varied)
        ratios = []
        for value in values:
            (seconds, operations), (sgd_seconds, sgd_operations) = costs(**BASE | {varied: value})
            ratios.append((seconds / sgd_seconds, operations / sgd_operations))
            numbers = (f"{number:.3g}" for number in (seconds, *ratios[-1]))
            rows.append([f"{varied} {value} ({others})", *numbers])
            print(" | ".join(rows[-1]), flush=True)
        measured, counted = zip(*ratios)
        axes.plot(values, measured, "o-", color=plots.BLUE, label="measured")
        axes.plot(values, counted, "s--", color=plots.RED, label="by operations")
        for which in "xy":
            plots.plain_log_axis(axes, which)
        axes.set_xticks(values, map(str, values))
        axes.set(xlabel=varied, title=others)
    figure.axes[0].set_ylabel("a teleport, in steps of SGD")
    figure.axes[0].legend(fontsize="small")
    folder = ROOT / "figures" / "growth"
    plots.save_figure(figure, folder / "teleport_cost")
    header = ["network", "teleport, s", "in SGD steps, measured", "in SGD steps, by operations"]
    results.save_text(folder / "table.md", plots.markdown(header, rows))


def main():
    if sys.argv[1:] == ["growth"]:
        return growth()
    rate = max(matmul_rate() for _ in range(3))
    print(f"{rate / 1e9:.0f} GFLOP/s in a matrix product of 3000, with one thread")
    print(f"{'':44}{'seconds':>10}{'floor':>10}{'ratio':>7}{'limit':>8}")
    for name, measure in ROWS.items():
        if all(word in name for word in sys.argv[1:]):
            seconds, operations, limit = measure()
            floor, limit = operations / rate, f"{limit:8.4g}" if limit else ""
            print(f"{name:44}{seconds:10.4g}{floor:10.3g}{seconds / floor:7.1f}{limit}", flush=True)


if __name__ == "__main__":
    main()
