"""Figure 7: the displacement of a minimum that a shift of length r is expected to cause.

    python displacement_integration.py      # writes figures/displacement/, in two seconds

A minimum w0 lies on a curve γ of minima. After a shift it is any point of the circle of radius r
around w0, and its expected displacement is the mean, over that circle, of the distance to γ. The
figure shows this mean, divided by r, against γ's curvature κ at w0. Here w0 is the origin, and γ
is a parabola y = k x² (κ = 2k) or the circle of radius k around (0, k) (κ = 1/k).

The distances are exact. The published figure measures the parabola's to a polyline whose vertices
are 0.1 apart in x: `--polyline 0.1` draws that.
"""

import argparse
import math
from contextlib import suppress

from experiment import launch, plots

import numpy as np
from matplotlib.figure import Figure

# Settings: lengths are in the unit of the plane
PARABOLA_RADII = (2, 1, 0.5, 0.2, 0.1)
PARABOLA_K = 40 * np.linspace(0, 1, 201) ** 2  # densest at 0, where the curves turn
CIRCLE_RADII = (0.1, 0.05, 0.02, 0.01, 0.005)
CIRCLE_K = 1 / np.linspace(0.1, 10, 201)
SPACING = 0.1  # of the published polyline's vertices, in x
SPACINGS = (0.001, 10)  # that --polyline takes; the finest needs about 15 seconds
NODES = 48  # Gauss-Legendre nodes on either side of a crossing
ANGLES = 720  # midpoints on the half circle, for the polyline
# by radius; 0.1 is in both panels
COLOUR = {r: f"C{i}" for i, r in enumerate(PARABOLA_RADII + CIRCLE_RADII[1:])}


def parabola_distance(x, y, k):
    """Return the distance from the points (x, y) to the parabola (t, k t²).

    The nearest t is a root of 2k² t³ + (1 - 2ky) t - x. By symmetry let x >= 0: then the nearest
    root is the largest, and on t >= 0 the cubic is convex and starts at or below 0. So Newton's
    iteration from above falls to that root, wherever the point lies and whatever roots there are.
    x, y and k are arrays that broadcast together; k = 0 is a line.
    """
    x, b = np.abs(x), 1 - 2 * k * y
    t = step = start = x + np.hypot(x, y)  # above: the curve is no farther than the origin is
    # at the centre of curvature the root is triple, and each step takes only a third off t
    while np.any(step > 1e-12 * start):
        step = (2 * k**2 * t**3 + b * t - x) / (6 * k**2 * t**2 + b)
        t = t - step
    return np.hypot(t - x, k * t**2 - y)


def circle_distance(x, y, k):
    """Return the distance from the points (x, y) to the circle of radius k around (0, k)."""
    # |distance to the centre - k|, as the difference of their squares: a large k doesn't cancel
    return np.abs(x**2 + y**2 - 2 * k * y) / (np.hypot(x, y - k) + k)


def polyline_distance(x, y, k, spacing):
    """Return the distance from the points (x, y) to the polyline on the parabola (t, k t²).

    Its vertices are at all multiples t of the spacing. Few matter: one is the origin, so the
    nearest point of the polyline is within twice the point's own distance from there.
    """
    x = np.abs(x)
    squared = x**2 + y**2
    reach = 2 * math.sqrt(squared.max())
    for a in spacing * np.arange(math.ceil(reach / spacing)):
        slope = k * (2 * a + spacing)  # of the segment from (a, k a²) on
        dx, dy = x - a, y - k * a**2
        t = np.clip((dx + slope * dy) / (1 + slope**2), 0, spacing)
        squared = np.minimum(squared, (dx - t) ** 2 + (dy - slope * t) ** 2)
    return np.sqrt(squared)


def mean_over_circle(distance, crossing, r):
    """Return the mean of distance(x, y) / r over the circle of radius r around the origin.

    `crossing`, `[...]`, is the angle in [0, π/2] at which that circle crosses the curve. The
    distance, `[..., n]`, is symmetric in x, so half the circle is enough. It has a kink at the
    crossing, and at π/2 where the centre of curvature is near: Gauss-Legendre rules on either
    side, the upper one in the cube root of the angle from π/2, converge through both.
    """
    node, weight = np.polynomial.legendre.leggauss(NODES)
    s, weight = (1 + node) / 2, weight / 2
    below = np.asarray(crossing)[..., None] + np.pi / 2
    above = np.pi - below
    angle = np.concatenate([below * s - np.pi / 2, np.pi / 2 - above * s**3], axis=-1)
    weight = np.concatenate([below * weight, above * 3 * s**2 * weight], axis=-1)
    return (weight * distance(r * np.cos(angle), r * np.sin(angle))).sum(-1) / (np.pi * r)


def parabola_displacement(k, r):
    """Return the expected displacement / r from y = k x², k: [...], to 1e-8 for k r up to 1000."""
    k = np.asarray(k, dtype=float)
    crossing = np.arctan(k * r * np.sqrt(2 / (1 + np.sqrt(1 + (2 * k * r) ** 2))))
    return mean_over_circle(lambda x, y: parabola_distance(x, y, k[..., None]), crossing, r)


def circle_displacement(k, r):
    """Return the expected displacement / r from the circle of radius k: [...], to 1e-8."""
    k = np.asarray(k, dtype=float)
    crossing = np.arcsin(np.minimum(r / (2 * k), 1))
    return mean_over_circle(lambda x, y: circle_distance(x, y, k[..., None]), crossing, r)


def polyline_displacement(k, r, spacing):
    """Return the expected displacement / r from the polyline on the parabola, k: [...], to 1e-5."""
    # a midpoint rule will do: it is only drawn, and has a kink wherever the nearest segment changes
    angle = np.pi * ((np.arange(ANGLES) + 0.5) / ANGLES - 0.5)
    k = np.asarray(k, dtype=float)[..., None]
    return polyline_distance(r * np.cos(angle), r * np.sin(angle), k, spacing).mean(-1) / r


# Statistics


def collect(_, args):
    """Return Figure 7's curves, mean distance / r: [radii, k], and their settings."""
    spacing, k = args.polyline or SPACING, PARABOLA_K
    curves = {
        "parabola_exact": [parabola_displacement(k, r) for r in PARABOLA_RADII],
        "parabola_polyline": [polyline_displacement(k, r, spacing) for r in PARABOLA_RADII],
        "circle_exact": [circle_displacement(CIRCLE_K, r) for r in CIRCLE_RADII],
    }
    settings = {"parabola_drawn": "polyline" if args.polyline else "exact", "spacing": spacing}
    return settings, curves | {"parabola_k": k, "circle_k": CIRCLE_K}, None


def summarise(_, results):
    """Return what the parabola's curve says, and how far the polyline's are from it."""
    kr = np.linspace(0, 4, 4001)
    mean = parabola_displacement(kr, 1)
    low = mean.argmin()
    # from here on, a curved minimum is displaced more than a straight one
    back = np.interp(2 / np.pi, mean[low:], kr[low:])
    error = np.abs(results["parabola_polyline"] - results["parabola_exact"]).max(1)
    return {
        "parabola_lowest": {"kr": kr[low].round(3), "mean": mean[low].round(6)},
        "parabola_back_at_straight_line": {"kr": back.round(3), "mean": round(2 / np.pi, 6)},
        "circle_lowest": results["circle_exact"].min().round(6),
        "polyline_largest_error": dict(zip(PARABOLA_RADII, error.round(6))),
    }


def table(summaries):
    """Return the summary as Markdown."""
    (found,) = summaries.values()
    at = "{mean:.3f} at k r = {kr:.2f}"
    values = {
        "parabola: lowest": at.format(**found["parabola_lowest"]),
        "parabola: back at a straight line's": at.format(**found["parabola_back_at_straight_line"]),
        "circle: lowest": f"{found['circle_lowest']:.3f}",
    }
    for r, error in found["polyline_largest_error"].items():
        values[f"largest error of the polyline, r = {r:g}"] = f"{error:.3f}"
    return plots.markdown(["Figure 7: mean distance / r", "value"], list(values.items()))


# Figures


def axes(xlabel, title):
    """Return new axes for mean distance / r, in a figure of their own."""
    labels = {"xlabel": xlabel, "ylabel": "mean distance / $r$", "title": title}
    ax = Figure(figsize=(5.2, 3.8)).add_subplot(**labels)
    ax.grid(alpha=0.3)
    return ax


def draw_panel(curvature, radii, curves, title):
    """Return the figure of a published panel: mean distance / r [radii, k] against curvature."""
    ax = axes(r"curvature $\kappa$ at $w_0$", title)
    for r, mean in zip(radii, curves):
        ax.plot(curvature, mean, color=COLOUR[r], label=f"$r = {r}$")
    return ax.figure


def draw_collapse(exact, polyline, spacing):
    """Return the figure of the parabola's curves against k r, exact and from the polyline."""
    ax = axes(r"$k\,r$", "Parabola $y = k x^2$: one curve for every radius")
    for i, (r, marker) in enumerate(zip(PARABOLA_RADII, "os^Dv", strict=True)):
        style = {"marker": marker, "markevery": (0.02 * i, 0.1), "ms": 5, "label": f"$r = {r}$"}
        ax.plot(PARABOLA_K * r, exact[i], color=COLOUR[r], **style)
        ax.plot(PARABOLA_K * r, polyline[i], color=COLOUR[r], lw=1, ls="--")
    ax.plot([], [], color="grey", lw=1, ls="--", label=f"polyline, {spacing:g} apart")
    ax.axhline(2 / np.pi, color="black", lw=0.8, ls=":", label=r"straight line, $2/\pi$")
    ax.set(xscale="log", xlim=(0.05, 80))
    ax.xaxis.set_major_formatter("{x:g}")
    return ax.figure


def draw(_, results, summary, folder):
    """Draw Figure 7's two panels, and the parabola's curves as one."""
    drawn, spacing = summary["settings"]["parabola_drawn"], summary["settings"]["spacing"]
    title = "Parabola $y = k x^2$"
    if drawn == "polyline":
        title += f": polyline, {spacing:g} apart"
    parabola, circle = results[f"parabola_{drawn}"], results["circle_exact"]
    figures = {
        "integral_kx_sqr": draw_panel(2 * PARABOLA_K, PARABOLA_RADII, parabola, title),
        "integral_circle": draw_panel(1 / CIRCLE_K, CIRCLE_RADII, circle, "Circle of radius $k$"),
        "collapse": draw_collapse(results["parabola_exact"], results["parabola_polyline"], spacing),
    }
    for name, figure in figures.items():
        plots.legend_beside(figure.axes[0])
        plots.save_figure(figure, folder / f"curvature_displacement_{name}")


# Options


def vertex_spacing(text):
    """An argparse type: a float within SPACINGS."""
    low, high = SPACINGS
    with suppress(ValueError):
        if low <= float(text) <= high:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low} to {high}")


def parse_arguments():
    parser = launch.experiment_parser(__doc__, on_datasets=False)
    text = "draw the parabola's panel as published, from distances to a polyline; its vertices are "
    text += "SPACING apart in x, 0.001 to 10 units of the plane; published: 0.1"
    parser.add_argument("--polyline", metavar="SPACING", type=vertex_spacing, help=text)
    return parser.parse_args()


def main():
    args = parse_arguments()
    name = f"displacement-polyline-{args.polyline}" if args.polyline else "displacement"
    parts = ["displacement"], ["displacement"]
    folder = args.output / "figures" / name
    launch.compute_and_report(args, folder, *parts, None, collect, summarise, table, draw)


if __name__ == "__main__":
    launch.run(main)
