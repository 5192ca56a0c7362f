"""How long each piece takes, and how far that is above the floor of its matrix products.

    python tests/benchmark.py            # run nothing else meanwhile
    python tests/benchmark.py SGD MNIST  # only the rows whose names contain these words

The floor of a piece is the number of operations in its matrix products over the rate of a large
matrix product, measured in the same run. Data are made up: the time does not depend on them.
"""

import resource
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import correlation  # noqa: E402
from data import Dataset  # noqa: E402
from models import LeakyReLU, init_weights, train_epoch_sgd  # noqa: E402
from teleportation import estimate  # noqa: E402


class Row(NamedTuple):
    """What was measured of a piece."""

    seconds: float
    operations: float  # floating-point operations of the matrix products
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


def made_up(name, count):
    d = correlation.EXPERIMENTS[name].widths[0]
    x, y = torch.rand(count, d), torch.randint(10, (count,))
    return Dataset(name, x, y, x[:0], y[:0])


def connections(widths):
    return sum(a * b for a, b in zip(widths, widths[1:]))


def sgd(name, images, limit):
    """Training of Table 1's 100 networks for 40 epochs, from the time of `images` images."""
    widths, lr, _, stack, _ = correlation.EXPERIMENTS[name]
    data = made_up(name, images)
    weights = init_weights(widths, range(stack))
    scale = 100 / stack * 40 * 50_000 / images
    seconds = best_seconds(
        lambda: train_epoch_sgd(weights, data.x_train, data.y_train, lr, LeakyReLU())
    )
    # forward, the weights' gradients, and backward but for the first layer
    products = 3 * connections(widths) - widths[0] * widths[1]
    return Row(scale * seconds, scale * 2 * images * stack * products, limit)


def estimators(name, limit=None):
    """φ and ψ of 100 networks on one batch of 200."""
    experiment = correlation.EXPERIMENTS[name]
    widths, n, k = experiment.widths, correlation.ESTIMATION_BATCH, len(experiment.radii)
    x, y = torch.rand(widths[0], n), torch.randint(10, (n,))
    stacks = [init_weights(widths, range(experiment.stack)) for _ in range(100 // experiment.stack)]
    seconds = best_seconds(lambda: estimate(stacks, x, y, experiment.radii, 0, LeakyReLU()))
    first = widths[0] * widths[1]
    forward = connections(widths)
    products = 100 * forward + k * first + 100 * k * (forward - first)
    return Row(seconds, 2 * n * products, limit)


ROWS = {
    "SGD, MNIST: 100 runs, 40 epochs": lambda: sgd("MNIST", 50_000, limit=240),
    "SGD, CIFAR-10: 100 runs, 40 epochs": lambda: sgd("CIFAR10", 5_000, limit=3900),
    "φ and ψ, MNIST: 100 networks, one batch": lambda: estimators("MNIST", limit=0.25),
    "φ and ψ, CIFAR-10: 100 networks, one batch": lambda: estimators("CIFAR10"),
}


def main():
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
