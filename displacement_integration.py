"""Figure 7: how far a shift of length r is expected to displace a minimum.

    python displacement_integration.py                         # two seconds

A minimum w0 lies on a curve γ of minima. After a shift it is any point of the circle of radius r
around w0. Its expected displacement is the mean, over that circle, of the distance to γ. The figure
shows this mean, divided by r, against the curvature κ of γ at w0. Here w0 is the origin, and γ is a
parabola y = k x² (κ = 2k), or the circle of radius k around (0, k) (κ = 1/k).

The distances are exact. The published code measures those to the parabola from a polyline, which
for r ≤ 0.1 is a V; the table has the error that this makes.
"""

import numpy as np
from matplotlib.figure import Figure

from experiment import plots, results, run

# lengths are in the unit of the plane
PARABOLA_RADII = (2, 1, 0.5, 0.2, 0.1)
PARABOLA_K = 40 * np.linspace(0, 1, 201) ** 2  # densest at 0, where the curves turn
CIRCLE_RADII = (0.1, 0.05, 0.02, 0.01, 0.005)
CIRCLE_K = 1 / np.linspace(0.1, 10, 201)
SPACING = 0.1  # of the published polyline's vertices, in x
NODES = 48  # Gauss-Legendre nodes on either side of a crossing


def parabola_distance(x, y, k):
    """Return the distance from the points (x, y) to the parabola (t, k t²).

    The nearest t is a root of 2k² t³ + (1 − 2ky) t − x. By symmetry let x ≥ 0: then the nearest
    root is the largest, and on t ≥ 0 the cubic is convex and starts at or below 0. So Newton's
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
    # |distance to the centre − k|, as the difference of their squares: a large k does not cancel
    return np.abs(x**2 + y**2 - 2 * k * y) / (np.hypot(x, y - k) + k)


def mean_over_circle(distance, crossing, r):
    """Return the mean of distance(x, y) / r over the circle of radius r around the origin.

    `crossing`, [...], is the angle in [0, π/2] at which that circle crosses the curve. The
    distance, [..., n], is symmetric in x, so half the circle is enough. It has a kink at the
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


def polyline_displacement(k):
    """Return the expected displacement / r from the published polyline, for any r ≤ SPACING.

    All points of the circle are nearest to the segments that meet at the origin, a V.
    """
    angle = np.arctan(SPACING * k)
    return (angle + 2 - np.sin(angle)) / np.pi


def compute():
    """Return the curves of Figure 7, mean distance / r: [radii, k]."""
    return {
        "parabola": np.stack([parabola_displacement(PARABOLA_K, r) for r in PARABOLA_RADII]),
        "circle": np.stack([circle_displacement(CIRCLE_K, r) for r in CIRCLE_RADII]),
    }


def summarise(curves):
    """Return what the curves say, as {what: number}. The parabola's depends on k r alone."""
    kr = np.linspace(0, 4, 4001)
    mean = parabola_displacement(kr, 1)
    lowest = mean.argmin()
    straight_line = 2 / np.pi
    polyline_error = polyline_displacement(PARABOLA_K) - curves["parabola"][-1]
    return {
        "parabola: lowest": mean[lowest],
        "k r where it is lowest": kr[lowest],
        "k r where it is a straight line's again": np.interp(
            straight_line, mean[lowest:], kr[lowest:]
        ),
        "circle: lowest": curves["circle"].min(),
        "largest error of the polyline, r = 0.1": np.abs(polyline_error).max(),
    }


def draw(path, curves):
    """Draw mean distance / r against curvature, for the parabola and for the circle."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    parabola, circle = figure.subplots(1, 2)
    for r, mean in zip(PARABOLA_RADII, curves["parabola"]):
        parabola.plot(2 * PARABOLA_K, mean, label=f"$r = {r}$")
    for r, mean in zip(CIRCLE_RADII, curves["circle"]):
        circle.plot(1 / CIRCLE_K, mean, label=f"$r = {r}$")
    for axes, title in ((parabola, "Parabola $y = k x^2$"), (circle, "Circle of radius $k$")):
        axes.set(title=title, xlabel="curvature κ at $w_0$", ylabel="mean distance / $r$")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    plots.save_figure(figure, path, pdf=True)


def main():
    args = run.experiment_parser(__doc__, on_images=False).parse_args()
    figures = args.output / "figures"
    folder = figures / "displacement"
    if not args.plot_only:
        result = results.Result(compute(), {}, results.provenance((__file__,)))
        results.save(folder / "displacement.npz", result)

    curves = results.read_all(folder, ["displacement"], ["displacement"])["displacement"].arrays
    summary = summarise(curves)
    rows = [[what, f"{value:.3f}"] for what, value in summary.items()]
    table = plots.markdown(["Figure 7: mean distance / r", "value"], rows)
    results.save_json(folder / "summary.json", summary)
    results.save_text(folder / "table.md", table)
    draw(figures / "figure_7", curves)
    print(f"\n{table}\nFigure 7: {figures}\nIts curves: {folder}")


if __name__ == "__main__":
    run.run(main)
