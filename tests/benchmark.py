"""How long each piece takes, and how far that is above the floor of its matrix products.

    python tests/benchmark.py            # run nothing else meanwhile
    python tests/benchmark.py SGD MNIST  # only the rows whose names contain these words
    python tests/benchmark.py growth     # a teleport's cost against width, depth and batch

The floor of a piece is the number of operations in its matrix products over the rate of a large
matrix product, measured in the same run. Data are made up: the time does not depend on them.
"""

import argparse
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "learn-to-teleport")]

from experiment import files, plots  # noqa: E402

import correlation  # noqa: E402
import multi_layer_regression  # noqa: E402
import regression  # noqa: E402
import teleport_cnn  # noqa: E402
import teleport_optimization  # noqa: E402
import teleport_sharpness_curvature  # noqa: E402
from models import (  # noqa: E402
    MLP,
    TRAINING,
    LeakyReLU,
    cross_entropy,
    init_weights,
    train_epoch,
    train_epoch_sgd,
)
from module_symmetry import gradient_norm, symmetry_of, teleport_module  # noqa: E402
from regression import train_trajectory  # noqa: E402
from teleportation import (  # noqa: E402
    RADII,
    curvature_along,
    curve_derivatives,
    estimate,
    teleport,
    teleport_sharpness,
)
from test_learn_to_teleport import train_plainly  # noqa: E402


class Row(NamedTuple):
    """What was measured of a piece."""

    seconds: float
    operations: float  # floating-point operations of the matrix products; nan: it has none
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


def sgd(name, images, limit):
    """Training of Table 1's 100 networks for 40 epochs, from the time of `images` images."""
    (widths, lr), stack = TRAINING[name], correlation.RUNS_PER_STACK[name]
    x, y = torch.rand(images, widths[0]), torch.randint(10, (images,))
    weights = init_weights(widths, range(stack))
    scale = 100 / stack * 40 * 50_000 / images
    seconds = best_seconds(lambda: train_epoch_sgd(weights, x, y, lr, LeakyReLU()))
    operations = 2 * images * stack * training_products(widths)
    return Row(scale * seconds, scale * operations, limit)


def sgd_by_autograd(name, images):
    """The same training without closed forms: the loss's gradient by autograd, batch by batch."""
    (widths, lr), stack = TRAINING[name], correlation.RUNS_PER_STACK[name]
    x, y = torch.rand(images, widths[0]), torch.randint(10, (images,))
    weights = [w.requires_grad_() for w in init_weights(widths, range(stack))]
    optimizer = torch.optim.SGD(weights, lr=lr)

    def train():
        for rows in torch.arange(images).split(20):
            optimizer.zero_grad()
            cross_entropy(weights, x[rows].T, y[rows], LeakyReLU()).sum().backward()
            optimizer.step()

    scale = 100 / stack * 40 * 50_000 / images
    return Row(scale * best_seconds(train), scale * 2 * images * stack * training_products(widths))


def curve(name, exact, runs=20, n=200):
    """γ' and γ'' of a stack of networks on one batch: the paper's closed form, or the curve's."""
    widths = TRAINING[name].widths
    x, weights = torch.rand(widths[0], n), init_weights(widths, range(runs))
    generators = [torch.rand(d, d) / d for d in widths[1:-1]]
    arguments = weights, x, generators, LeakyReLU(), exact
    return Row(best_seconds(lambda: curve_derivatives(*arguments)), math.nan)


def estimators(name, limit=None):
    """φ and ψ of 100 networks on one batch of 200."""
    widths, stack = TRAINING[name].widths, correlation.RUNS_PER_STACK[name]
    n, k = correlation.ESTIMATION_BATCH, len(RADII[name])
    x, y = torch.rand(widths[0], n), torch.randint(10, (n,))
    stacks = [init_weights(widths, range(stack)) for _ in range(100 // stack)]
    seconds = best_seconds(
        lambda: [estimate(weights, x, y, RADII[name], 0, LeakyReLU()) for weights in stacks]
    )
    first, above = widths[0] * widths[1], connections(widths[1:])
    phi = 100 * first + k * first + 100 * k * above
    # γ' and γ'': for each pair M h and M² h, and their products with h^+ (n inputs, or d)
    psi = 100 * sum(2 * d * d + 2 * d * fan_in for fan_in, d in zip((n, *widths[1:]), widths[1:-1]))
    return Row(seconds, 2 * n * (phi + psi), limit)


def epoch(optimizer, runs=5, images=10_000):
    """An epoch on MNIST of a stack of runs with an optimizer, from the time of `images` images."""
    widths = TRAINING["MNIST"].widths
    x, y = torch.rand(images, widths[0]), torch.randint(10, (images,))
    model = MLP(init_weights(widths, range(runs)), LeakyReLU())
    optimizer = teleport_optimization.EXPERIMENTS[optimizer].optimizer(model.parameters())
    seconds = best_seconds(lambda: train_epoch(model, x, y, optimizer))
    scale = 50_000 / images
    return Row(scale * seconds, scale * 2 * images * runs * training_products(widths))


def gradient_teleport(name, limit, runs=5, steps=10, n=200):
    """A teleport of a stack of runs to a larger gradient."""
    widths = TRAINING[name].widths
    x, y = torch.rand(widths[0], n), torch.randint(10, (n,))
    weights = init_weights(widths, range(runs))
    seconds = best_seconds(lambda: teleport(weights, x, y, 1e-4, steps, LeakyReLU()))
    # once: Q of n inputs, W_0 Q and g W_0; a step is about nine forward passes of n inputs
    once = 2 * n**2 * widths[0] + runs * widths[0] * widths[1] * (n + widths[1])
    step = 9 * runs * n * connections((n, *widths[1:]))
    return Row(seconds, 2 * (once + steps * step), limit)


def sharpness_step(name, runs, limit):
    """A step of a stack of runs in sharpness, 900 directions, on a batch of 2,000."""
    script = teleport_sharpness_curvature
    experiment, n = script.EXPERIMENTS[name], script.TELEPORT_BATCH
    widths = experiment.training.widths
    x, y = torch.rand(widths[0], n), torch.randint(10, (n,))
    weights = init_weights(widths, range(runs))
    draws = script.TELEPORT_RADII, experiment.directions, 0, LeakyReLU()
    # the path has one evaluation more than steps
    seconds = best_seconds(lambda: teleport_sharpness(weights, x, y, 1e-2, 1, *draws), 2) / 2
    products = widths[0] * widths[1] + runs * 3 * connections(widths[1:])
    return Row(
        seconds, 2 * n * len(script.TELEPORT_RADII) * experiment.directions * products, limit
    )


def curvature_step(limit, runs=5):
    """κ and dκ/dt of a stack of MNIST's networks on a batch of 2,000."""
    script = teleport_sharpness_curvature
    widths, n = script.EXPERIMENTS["MNIST"].training.widths, script.TELEPORT_BATCH
    x, M = torch.rand(widths[0], n), torch.rand(widths[2], widths[2])
    weights = init_weights(widths, range(runs))
    seconds = best_seconds(lambda: curvature_along(weights, x, M, script.PAIR, LeakyReLU()))
    # V h, three times M z, the pseudoinverse, and ten products among a and its derivatives
    products = connections(widths[:3]) + 14 * widths[2] ** 2
    return Row(seconds, 2 * n * runs * products, limit)


def transformer():
    """Return a transformer of two layers that reads an image as 48 pieces of 64 values."""
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Unflatten(1, (48, 64)), encoder, nn.Flatten(), nn.Linear(48 * 64, 10))


def module(model, teleports, n=100):
    """A training step of a module on n images of CIFAR-10, or ten steps of a teleport on them."""
    x, y, loss = torch.rand(n, 3072), torch.randint(10, (n,)), nn.CrossEntropyLoss()
    optimizer, symmetry = torch.optim.SGD(model.parameters(), lr=1e-3), symmetry_of(model)
    objective = gradient_norm(model, loss, x, y)

    def step():
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()

    def move():
        teleport_module(model, symmetry, objective, x, 1e-3, 10, optimizer)

    with FlopCounterMode(display=False) as counter:
        step()
    seconds = best_seconds(move if teleports else step, 5)
    return Row(seconds, counter.get_total_flops() * (10 if teleports else 1))


def figure_7(limit):
    """displacement_integration.py from a cold start, into a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "displacement_integration.py", "--output", folder]
        seconds = best_seconds(lambda: subprocess.run(command, check=True))
    return Row(seconds, math.nan, limit)


def cold_start(limit):
    """correlation.py on MNIST from a cold start to its first training step, with data/ there."""
    with tempfile.TemporaryDirectory() as folder:
        code = (
            f"import sys; sys.argv[1:] = '--dataset', 'MNIST', '--output', {folder!r}\n"
            "import correlation\n"
            "correlation.models.train_epoch_sgd = lambda *_: sys.exit()\n"
            "correlation.main()"
        )
        command = [sys.executable, "-c", code]
        seconds = best_seconds(lambda: subprocess.run(command, cwd=ROOT, check=True))
    return Row(seconds, math.nan, limit)


def figure_6_trajectory(train, limit=None):
    """Training of LSTM(update) on one trajectory; train(lstms, adam, networks, problem).

    Its matrices are read from memory anew for each step: there is no floor of operations.
    """
    method = multi_layer_regression.METHODS["LSTM(update)"]
    lstms, adam = regression.new_training(method.networks, method.scaled, 1)
    problem = regression.draw_problem(12344)
    return Row(best_seconds(lambda: train(lstms, adam, method.networks, problem)), math.nan, limit)


def figure_6(processes, limit, part=10, least=700):
    """The training and the tests of Figure 6's published methods and LSTM(lr), one initialisation.

    From the time of a part of the trajectories, with and without that of nearly none.
    """
    script, seconds = multi_layer_regression, []
    names = "LSTM(lr)", "LSTM(lr,tele)", "LSTM(update)", "LSTM(update,tele)"
    script.METHODS = {name: script.METHODS[name] for name in reversed(names)}  # the longest first
    for script.QUICK in (least, part):
        with tempfile.TemporaryDirectory() as folder:
            options = {"output": Path(folder), "quick": True, "seeds": 1, "processes": processes}
            start = time.perf_counter()
            script.compute(argparse.Namespace(**options))
            seconds.append(time.perf_counter() - start)
    once, some = seconds
    return Row(once + (some - once) / (1 / part - 1 / least), math.nan, limit)


ROWS = {
    "SGD, MNIST: 100 runs, 40 epochs": lambda: sgd("MNIST", 50_000, limit=240),
    "SGD, CIFAR-10: 100 runs, 40 epochs": lambda: sgd("CIFAR10", 5_000, limit=3900),
    "SGD by autograd, MNIST: the same": lambda: sgd_by_autograd("MNIST", 5_000),
    "SGD by autograd, CIFAR-10: the same": lambda: sgd_by_autograd("CIFAR10", 2_000),
    "φ and ψ, MNIST: 100 networks, one batch": lambda: estimators("MNIST", limit=0.25),
    "φ and ψ, CIFAR-10: 100 networks, one batch": lambda: estimators("CIFAR10"),
    "cold start of correlation.py, MNIST": lambda: cold_start(limit=6),
    "Figure 7": lambda: figure_7(limit=3),
    "Figure 6: LSTM(update), one trajectory": lambda: figure_6_trajectory(
        lambda lstms, adam, networks, problem: train_trajectory(lstms, adam, problem, 100),
        limit=0.13,
    ),
    "Figure 6 by plain autograd: the same": lambda: figure_6_trajectory(
        lambda lstms, adam, networks, problem: train_plainly(lstms, networks, problem, 100, False)
    ),
    "Figure 6: one initialisation, 2 processes": lambda: figure_6(2, limit=308),
    **{
        f"{name}, MNIST: 5 runs, an epoch": lambda name=name: epoch(name)
        for name in teleport_optimization.EXPERIMENTS
    },
    "teleport, MNIST: 5 runs, 10 steps": lambda: gradient_teleport("MNIST", limit=0.04),
    "teleport, CIFAR-10: 5 runs, 10 steps": lambda: gradient_teleport("CIFAR10", limit=0.25),
    "sharpness, MNIST: 1 run, a step": lambda: sharpness_step("MNIST", 1, limit=0.5),
    "sharpness, MNIST: 5 runs, a step": lambda: sharpness_step("MNIST", 5, limit=1),
    "sharpness, CIFAR-10: 1 run, a step": lambda: sharpness_step("CIFAR10", 1, limit=3),
    "sharpness, CIFAR-10: 5 runs, a step": lambda: sharpness_step("CIFAR10", 5, limit=5),
    "γ' and γ'', MNIST: 20 runs, closed form": lambda: curve("MNIST", exact=False),
    "γ' and γ'', MNIST: 20 runs, exact": lambda: curve("MNIST", exact=True),
    "curvature, MNIST: 5 runs, κ and dκ/dt": lambda: curvature_step(limit=0.1),
    "CNN: a training step, 100 images": lambda: module(teleport_cnn.network(1), False),
    "CNN: a teleport of 10 steps": lambda: module(teleport_cnn.network(1), True),
    "transformer: a training step, 100 images": lambda: module(transformer(), False),
    "transformer: a teleport of 10 steps": lambda: module(transformer(), True),
}


GROWTH = {"width": (16, 64, 256, 1024, 4096), "depth": (2, 4, 8, 16), "batch": (32, 128, 512, 2048)}
BASE = {"width": 64, "depth": 3, "batch": 200}  # hidden units, hidden layers, images


def cost(width, depth, batch, sgd_batch=20):
    """Return what a teleport and a step of SGD cost: seconds, and operations of matrix products.

    The network has 784 inputs, `depth` hidden layers of `width` units, and 10 classes. A teleport
    has ten steps; at the largest width its cost is ten times that of one step.
    """
    steps = 10 if width < 4096 else 1
    widths = (784, *depth * (width,), 10)
    weights = init_weights(widths, 1)
    x, y = torch.rand(784, batch), torch.randint(10, (batch,))
    images, labels = torch.rand(10 * sgd_batch, 784), torch.randint(10, (10 * sgd_batch,))
    model = MLP([w.clone() for w in weights], LeakyReLU())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    pieces = {
        "teleport": (lambda: teleport(weights, x, y, 1e-6, steps, LeakyReLU()), steps / 10),
        "SGD step": (lambda: train_epoch(model, images, labels, optimizer, sgd_batch), 10),
    }
    found = {}
    for name, (piece, times) in pieces.items():
        start = time.perf_counter()
        with FlopCounterMode(display=False) as counter:
            piece()
        seconds = time.perf_counter() - start
        if seconds < 5:  # else it is the operations that take the time, not what counts them
            seconds = best_seconds(piece, 2)
        found[name] = seconds / times, counter.get_total_flops() / times
    return found


def growth():
    """Write the table and the figure of how a teleport's cost grows, to figures/growth/."""
    figure, rows = Figure(figsize=(9, 3.2)), []
    for axes, (varied, values) in zip(figure.subplots(1, 3), GROWTH.items()):
        found = [cost(**BASE | {varied: value}) for value in values]
        seconds, operations = (
            [entry["teleport"][k] / entry["SGD step"][k] for entry in found] for k in (0, 1)
        )
        axes.plot(values, seconds, "o-", color=plots.BLUE, label="measured")
        axes.plot(values, operations, "s--", color=plots.RED, label="by operations")
        for which in "xy":
            plots.plain_log_axis(axes, which)
        axes.set_xticks(values, map(str, values))
        others = ", ".join(f"{key} {value}" for key, value in BASE.items() if key != varied)
        axes.set(xlabel=varied, title=others)
        for value, entry, ratio, count in zip(values, found, seconds, operations):
            cells = f"{entry['teleport'][0]:.3g}", f"{ratio:.3g}", f"{count:.3g}"
            rows.append([f"{varied} {value} ({others})", *cells])
            print(" | ".join(rows[-1]), flush=True)
    figure.axes[0].set_ylabel("a teleport, in steps of SGD")
    figure.axes[0].legend(fontsize="small")
    figure.tight_layout()
    folder = ROOT / "figures" / "growth"
    plots.save_figure(figure, folder / "teleport_cost")
    header = ["network", "teleport, s", "in SGD steps, measured", "in SGD steps, by operations"]
    files.save_text(folder / "table.md", plots.markdown(header, rows))
    files.copy_into_page(folder / "table.md")


def main():
    if sys.argv[1:] == ["growth"]:
        return growth()
    rate = max(matmul_rate() for _ in range(3))
    print(
        f"{torch.get_num_threads()} threads, {rate / 1e9:.0f} GFLOP/s in a matrix product of 3000"
    )
    print(f"{'':44}{'seconds':>10}{'floor':>10}{'ratio':>7}{'limit':>8}")
    for name, measure in ROWS.items():
        if not all(word in name for word in sys.argv[1:]):
            continue
        seconds, operations, limit = measure()
        floor = operations / rate
        limit = f"{limit:8.4g}" if limit else ""
        print(f"{name:44}{seconds:10.4g}{floor:10.3g}{seconds / floor:7.1f}{limit}", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory {peak:.1f} GB")


if __name__ == "__main__":
    main()
