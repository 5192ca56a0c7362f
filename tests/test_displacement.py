"""displacement_integration.py against brute force, closed forms and the values of Figure 7."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import ellipeinc

import displacement_integration as displacement

CURVATURES = (0, 0.01, 0.3, 0.5, 1, 7, 40)
# mean distance / r of the parabola, by k r
KNOWN = {0: 0.63662, 0.5: 0.62106, 1: 0.61401, 2: 0.62979, 4: 0.66174, 16: 0.72763}


def brute_force(x, y, k):
    """Return the distance to the parabola by searching ever finer grids of its points."""
    t, width = 0.0, 2 * math.hypot(x, y) + 1e-6
    for points in (50_001, 1001, 1001, 1001):
        grid = t + width * np.linspace(-1, 1, points)
        distance = np.hypot(grid - x, k * grid**2 - y)
        t, width = grid[distance.argmin()], 4 * width / points
    return distance.min()


def cubic_distance(x, y, k):
    """Return the distance to the parabola from all real roots of the cubic."""
    roots = np.roots([2 * k**2, 0, 1 - 2 * k * y, -x])
    t = roots.real[np.abs(roots.imag) < 1e-4 * (1 + np.abs(roots))]
    return np.hypot(t - x, k * t**2 - y).min()


@pytest.mark.parametrize("k", CURVATURES)
def test_parabola_distance_is_the_least_also_around_the_centre_of_curvature(k):
    x, y = np.random.default_rng(0).uniform(-3, 3, (2, 40))
    if k:
        centre = 1 / (2 * k)
        offset = centre * np.array([0, 1e-12, 1e-6, 1e-3, -1e-12, -1e-6, -1e-3])
        x, y = np.append(x, np.repeat(offset, 7)), np.append(y, np.tile(centre + offset, 7))
        assert displacement.parabola_distance(0, centre, k) == pytest.approx(centre, rel=1e-15)
    expected = [brute_force(*point, k) for point in zip(x, y)]
    distance = displacement.parabola_distance(x, y, k)
    np.testing.assert_allclose(distance, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("r", displacement.PARABOLA_RADII)
def test_parabola_displacement_has_the_known_values_which_depend_on_kr_alone(r):
    mean = displacement.parabola_displacement(np.array(list(KNOWN)) / r, r)
    np.testing.assert_allclose(mean, list(KNOWN.values()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("k", (0.1, 0.49, 0.5, 0.501, 1, 16, 80))
def test_parabola_displacement_is_exact_to_1e_8(k):
    """Against adaptive quadrature of other distances; at k = 0.5 the centre is on the circle."""
    x = np.sqrt((np.sqrt(1 + 4 * k**2) - 1) / (2 * k**2))
    crossing = math.atan2(k * x**2, x)
    breaks = (-np.pi / 2, crossing, np.pi / 2, np.pi - crossing, 3 * np.pi / 2)
    total = sum(
        quad(lambda a: cubic_distance(np.cos(a), np.sin(a), k), *ends, epsabs=1e-10)[0]
        for ends in pairwise(breaks)
    )
    mean = displacement.parabola_displacement(k, 1)
    assert mean == pytest.approx(total / (2 * np.pi), rel=0, abs=1e-8)


def test_circle_displacement_is_an_elliptic_integral():
    k, r = np.array([0.03, 0.1, 0.101, 0.5, 10]), 0.1  # the first does not reach the circle
    crossing = np.arcsin(np.minimum(r / (2 * k), 1))
    m = 4 * k * r / (k + r) ** 2
    half = 2 * ellipeinc((crossing + np.pi / 2) / 2, m) - ellipeinc(np.pi / 2, m)
    expected = (2 * (k + r) * half - 2 * k * crossing) / (np.pi * r)
    np.testing.assert_allclose(displacement.circle_displacement(k, r), expected, atol=1e-8)


@pytest.mark.parametrize("r", (0.1, 0.05))
def test_the_published_polyline_is_a_v(r):
    """By the distances of 2,000 points of the circle to the segments of 30 vertices."""
    k, angle = np.array([[0.3], [1], [10], [40]]), np.pi * ((np.arange(2000) + 0.5) / 2000 - 0.5)
    x, y, nearest = r * np.cos(angle), r * np.sin(angle), np.inf
    for a, b in pairwise(0.1 * np.arange(-15, 15)):
        along = b - a, k * b**2 - k * a**2
        share = ((x - a) * along[0] + (y - k * a**2) * along[1]) / (along[0] ** 2 + along[1] ** 2)
        share = share.clip(0, 1)
        distance = np.hypot(x - a - share * along[0], y - k * a**2 - share * along[1])
        nearest = np.minimum(nearest, distance)
    mean = nearest.mean(1) / r
    np.testing.assert_allclose(displacement.polyline_displacement(k[:, 0]), mean, atol=1e-6)


def test_the_script_draws_figure_7_and_draws_it_again(call, tmp_path):
    first = call(displacement, "--output", tmp_path)
    assert first.returncode == 0, first.stderr
    folder = tmp_path / "figures/displacement"
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    lowest = summary["k r where it is lowest"]
    around = displacement.parabola_displacement(lowest + np.array([-0.01, 0, 0.01]), 1)
    assert around.argmin() == 1 and summary["parabola: lowest"] == pytest.approx(around[1])
    back = displacement.parabola_displacement(summary["k r where it is a straight line's again"], 1)
    assert back == pytest.approx(2 / np.pi, abs=2e-5)
    assert summary["largest error of the polyline, r = 0.1"] == pytest.approx(0.088, abs=1e-3)
    files = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert {"figure_7.png", "figure_7.pdf", "table.md"} <= {path.name for path in files}
    assert call(displacement, "--output", tmp_path, "--plot-only").stdout == first.stdout
    assert {path: path.read_bytes() for path in files} == files
