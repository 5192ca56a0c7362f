"""How long each piece takes, and how far that is above the floor of its matrix products.

    python tests/benchmark.py            # run nothing else meanwhile
    python tests/benchmark.py SGD MNIST  # only the rows whose names contain these words
    python tests/benchmark.py growth     # a teleport's cost against width, depth and batch

The floor of a piece is the number of operations in its matrix products over the rate of a large
matrix product, measured in the same run. Everything has one thread, as in the scripts' workers.
Data are made up: the time does not depend on them.
"""

import sys
import time
from functools import partial
from pathlib import Path

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


def cost(piece, scale=1, repeats=3):
    """Return the seconds of a piece, and the operations of its matrix products, times `scale`."""
    with FlopCounterMode(display=False) as counter:
        piece()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        piece()
        times.append(time.perf_counter() - start)
    return scale * min(times), scale * counter.get_total_flops()


def matmul_rate(n=3000):
    """Return the operations a second of a large float32 matrix product."""
    a, b = torch.rand(2, n, n)
    seconds, operations = cost(lambda: a @ b, repeats=15)
    return operations / seconds


def case(widths, n, runs):
    """Return weights of some runs, or of one without that dimension, and made-up x, y."""
    weights = init_weights(widths, range(runs) if runs > 1 else 1)
    return weights, torch.rand(widths[0], n), torch.randint(10, (n,))


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
    weights, x, y = case(widths, images, stack)
    x = x.T.contiguous()
    return cost(lambda: train(weights, x, y, lr), 100 / stack * 40 * 50_000 / images)


def epoch(name, images=2_000):
    """An epoch on MNIST of two arms of 20 runs, from the time of `images` images."""
    setting = teleport_optimization.OPTIMIZERS[name]
    weights, x, y = case(TRAINING["MNIST"].widths, images, 40)
    model, x = MLP(weights, SIGMA), x.T.contiguous()
    optimizer = setting.optimizer(model.parameters(), setting.lr)
    return cost(lambda: models.train_epoch(model, x, y, optimizer), 50_000 / images)


# Teleports and estimates


def teleport(name, runs):
    """A teleport to a larger gradient, of ten steps on a batch of 200."""
    weights, x, y = case(TRAINING[name].widths, 200, runs)
    return cost(lambda: teleportation.teleport(weights, x, y, 1e-4, 10, SIGMA), repeats=10)


def teleport_by_autograd(name, runs):
    """The same without closed forms, and without the reduction of x to its span."""
    weights, x, y = case(TRAINING[name].widths, 200, runs)

    def norm(weights):
        loss = cross_entropy(weights, x, y, SIGMA).sum()
        gradient = torch.autograd.grad(loss, weights, create_graph=True)
        return teleportation.inner_product(gradient, gradient)

    def value(weights):
        return value_and_gradient(norm, weights)[0]

    orbit, gradient = teleportation.orbit_of(weights, x, SIGMA), partial(value_and_gradient, norm)
    return cost(lambda: ascend(orbit, value, weights, 1e-4, 10, gradient=gradient), repeats=10)


def sharpness_step(name, runs):
    """A step in sharpness, 900 directions, on a batch of 2,000."""
    setting = generalization.SETTINGS[name]
    weights, x, y = case(setting.widths, setting.teleport_batch, runs)
    draws = setting.radii, setting.directions, 0, SIGMA
    # the path has one evaluation more than steps
    return cost(
        lambda: teleportation.teleport_sharpness(weights, x, y, 1e-2, 1, *draws), 0.5, repeats=2
    )


def curvature_step(runs=10):
    """κ and dκ/dt of a stack of MNIST's networks on a batch of 2,000."""
    setting = generalization.SETTINGS["MNIST"]
    weights, x, _ = case(setting.widths, setting.teleport_batch, runs)
    M = torch.rand(setting.widths[2], setting.widths[2])
    return cost(lambda: teleportation.curvature_along(weights, x, M, setting.pair, SIGMA))


def estimates(name):
    """φ and ψ of 100 networks on one batch of 200."""
    stack, radii = correlation.STACK[name], teleportation.RADII[name]
    weights, x, y = case(TRAINING[name].widths, correlation.ESTIMATION_BATCH, stack)
    return cost(lambda: teleportation.estimate(weights, x, y, radii, 0, SIGMA), 100 / stack)


def curve(closed):
    """γ' and γ'' of a stack on one batch: by Eqs. 57 and 60, or in forward mode."""
    widths = TRAINING["MNIST"].widths
    weights, x, _ = case(widths, 200, 20)
    generators = [torch.rand(d, d) / d for d in widths[1:-1]]

    def acted_on(t):
        elements = [teleportation.exponential(t * M) for M in generators]
        return teleportation.act(weights, x, elements, SIGMA, teleportation.INVERSE_ACTIVATION)

    if closed:
        return cost(lambda: teleportation.curve_derivatives(weights, x, generators, SIGMA))
    return cost(lambda: teleportation.two_derivatives(acted_on, torch.zeros(())))


def figure_6(plainly):
    """Training of LSTM(update) on one trajectory, or the same by plain autograd."""
    training = multi_layer_regression.TRAININGS[2]
    lstms, adam = regression.new_training(training.networks, training.scaled, 1)
    problem, steps = regression.draw_problem(12344), training.steps
    if plainly:
        return cost(lambda: train_plainly(lstms, training.networks, problem, steps, False))
    return cost(lambda: regression.train_trajectory(lstms, adam, problem, steps))


ROWS = {
    "SGD, MNIST: 100 runs, 40 epochs": lambda: sgd("MNIST", by_blocks, 10_000),
    "SGD by autograd, MNIST: the same": lambda: sgd("MNIST", by_autograd, 5_000),
    "SGD, CIFAR-10: 100 runs, 40 epochs": lambda: sgd("CIFAR10", by_blocks, 2_000),
    "SGD by autograd, CIFAR-10: the same": lambda: sgd("CIFAR10", by_autograd, 1_000),
    **{
        f"{name}, MNIST: 40 runs, an epoch": partial(epoch, name)
        for name in teleport_optimization.OPTIMIZERS
    },
    "teleport, MNIST: 1 run, 10 steps": lambda: teleport("MNIST", 1),
    "teleport, MNIST: 20 runs, 10 steps": lambda: teleport("MNIST", 20),
    "teleport by autograd, MNIST: the same": lambda: teleport_by_autograd("MNIST", 20),
    "teleport, CIFAR-10: 20 runs, 10 steps": lambda: teleport("CIFAR10", 20),
    "teleport by autograd, CIFAR-10: the same": lambda: teleport_by_autograd("CIFAR10", 20),
    "sharpness, MNIST: 10 runs, a step": lambda: sharpness_step("MNIST", 10),
    "sharpness, CIFAR-10: 1 run, a step": lambda: sharpness_step("CIFAR10", 1),
    "sharpness, CIFAR-10: 10 runs, a step": lambda: sharpness_step("CIFAR10", 10),
    "curvature, MNIST: 10 runs, κ and dκ/dt": curvature_step,
    "φ and ψ, MNIST: 100 networks, one batch": lambda: estimates("MNIST"),
    "φ and ψ, CIFAR-10: 100 networks, one batch": lambda: estimates("CIFAR10"),
    "γ' and γ'', MNIST: 20 runs": lambda: curve(closed=True),
    "γ' and γ'' in forward mode: the same": lambda: curve(closed=False),
    "Figure 6: LSTM(update), one trajectory": lambda: figure_6(plainly=False),
    "Figure 6 by plain autograd: the same": lambda: figure_6(plainly=True),
}


# Growth

GROWTH = {"width": (16, 64, 256, 1024, 4096), "depth": (2, 4, 8, 16), "batch": (32, 128, 512, 2048)}
BASE = {"width": 64, "depth": 3, "batch": 200}  # hidden units, hidden layers, images


def costs(width, depth, batch):
    """Return the `cost` of a teleport of ten steps, and of a step of SGD.

    The network has 784 inputs, `depth` hidden layers of `width` units, and 10 classes.
    """
    steps = 10 if width < 4096 else 1  # of which each costs the same
    weights, x, y = case((784, *depth * (width,), 10), batch, 1)
    images, labels = torch.rand(10 * models.BATCH, 784), torch.randint(10, (10 * models.BATCH,))
    model = MLP([w.clone() for w in weights], SIGMA)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    return (
        cost(lambda: teleportation.teleport(weights, x, y, 1e-6, steps, SIGMA), 10 / steps, 2),
        cost(lambda: models.train_epoch(model, images, labels, optimizer), 0.1, 2),
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
    rate = matmul_rate()
    print(f"{rate / 1e9:.0f} GFLOP/s in a matrix product of 3000, with one thread")
    print(f"{'':44}{'seconds':>10}{'floor':>10}{'ratio':>7}")
    for name, measure in ROWS.items():
        if all(word in name for word in sys.argv[1:]):
            seconds, operations = measure()
            floor = operations / rate
            print(f"{name:44}{seconds:10.4g}{floor:10.3g}{seconds / floor:7.1f}", flush=True)


if __name__ == "__main__":
    main()
