"""The picture at the top of the README: what teleporting is, on a network of two weights.

    python figures/teleporting.py

The network is y = u v x, with the loss L = (u v − 1)² / 2. The group acts by (u, v) → (g u, v / g)
and keeps the loss, so its orbits are the loss's level sets. Along one the gradient grows.
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).resolve().parents[1]))

from experiment import plots, run

START, G, LR, STEPS = (0.55, 0.55), 4.0, 0.08, 30


def loss(w):
    """Return L of w: [..., 2]."""
    return (w[..., 0] * w[..., 1] - 1) ** 2 / 2


def gradient(w):
    """Return ∇L of w: [..., 2]."""
    return (w[..., 0] * w[..., 1] - 1)[..., None] * w[..., ::-1]


def descend(w):
    """Return the path of gradient descent from w: [STEPS + 1, 2]."""
    path = [np.array(w)]
    for _ in range(STEPS):
        path.append(path[-1] - LR * gradient(path[-1]))
    return np.stack(path)


def main():
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    plane, curves = figure.subplots(1, 2, width_ratios=(1.15, 1))
    u, v = np.meshgrid(np.linspace(0.02, 3, 300), np.linspace(0.02, 2, 200))
    levels = np.array([0.002, 0.02, 0.08, 0.24, 0.6, 1.5, 4, 10])
    plane.contour(u, v, loss(np.stack([u, v], -1)), levels, colors="lightgrey", linewidths=0.8)
    orbit = np.linspace(0.12, 3, 200)
    product = START[0] * START[1]
    plane.plot(orbit, product / orbit, color="black", lw=1.5, label="orbit: the same loss")
    plane.plot(u[0], 1 / u[0], color="black", lw=1, ls=":", label="minima, $uv = 1$")
    teleported = START[0] * G, START[1] / G
    points = {"plain": (START, plots.RED, "o"), "teleported": (teleported, plots.BLUE, "s")}
    for name, (w, colour, marker) in points.items():
        path, slope = descend(w), gradient(np.array(w))
        norm = np.linalg.norm(slope)
        style = {"color": colour, "marker": marker, "ms": 3, "lw": 1}
        plane.plot(*path.T, **style)
        plane.plot(*w, color=colour, marker=marker, ms=8, ls="")
        curves.plot(loss(path), **style, label=rf"{name}: $|\nabla L|$ = {norm:.2f} at the start")
        arrow = {"arrowstyle": "-|>", "color": colour, "lw": 2}
        plane.annotate("", np.array(w) - 0.55 * slope, w, arrowprops=arrow)
    sweep = {"arrowstyle": "-|>", "connectionstyle": "arc3,rad=0.25", "color": "grey", "ls": "--"}
    plane.annotate("", teleported, START, arrowprops=sweep | {"shrinkA": 8, "shrinkB": 8})
    plane.text(0.6, 0.1, "teleport", color="grey")
    plane.set(xlabel="$u$", ylabel="$v$", title="Loss of $y = u\\,v\\,x$", xlim=(0, 3), ylim=(0, 2))
    plane.legend(loc="upper right")
    curves.set(xlabel="step of gradient descent", ylabel="loss", title="Descent from both points")
    curves.legend()
    plots.save_figure(figure, Path(__file__).with_suffix(""))


if __name__ == "__main__":
    run.run(main)
