"""displacement_integration.py against brute force, closed forms and the values of Figure 7."""

import json
import math
import subprocess
import sys
from itertools import pairwise

from experiment import files
from experiment.files import ROOT

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import ellipeinc

import displacement_integration as displacement

FIGURES = ("integral_kx_sqr", "integral_circle", "collapse")
CURVATURES = (0, 0.01, 0.3, 0.5, 1, 7, 40)


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


def segment_distance(point, start, end):
    along = end - start
    share = np.clip(np.dot(point - start, along) / np.dot(along, along), 0, 1)
    return np.linalg.norm(point - start - share * along)


@pytest.mark.parametrize("k", CURVATURES)
def test_parabola_distance_is_the_least(k):
    x, y = np.random.default_rng(0).uniform(-3, 3, (2, 40))
    expected = [brute_force(*point, k) for point in zip(x, y, strict=True)]
    np.testing.assert_allclose(displacement.parabola_distance(x, y, k), expected, atol=1e-8)


@pytest.mark.parametrize("k", CURVATURES[1:])
def test_parabola_distance_about_the_centre_of_curvature(k):
    centre = 1 / (2 * k)
    offset = centre * np.array([0, 1e-12, 1e-6, 1e-3, -1e-12, -1e-6, -1e-3])
    x, y = (grid.ravel() for grid in np.meshgrid(offset, centre + offset))
    distance = displacement.parabola_distance(x, y, k)
    expected = [brute_force(*point, k) for point in zip(x, y, strict=True)]
    np.testing.assert_allclose(distance, expected, rtol=1e-9)
    assert displacement.parabola_distance(0, centre, k) == pytest.approx(centre, rel=1e-15)


def test_parabola_distance_on_the_axis_within():
    """Of three roots, x = 0 is a root and the farthest: the two others are nearest."""
    k, y = 2.0, np.array([0.5, 1, 5])
    expected = np.sqrt(y / k - 1 / (4 * k**2))
    np.testing.assert_allclose(displacement.parabola_distance(0, y, k), expected, rtol=1e-14)


@pytest.mark.parametrize("k", CURVATURES)
def test_distance_is_zero_on_the_curve(k):
    t = np.linspace(-2, 2, 41)
    scale = np.hypot(t, k * t**2)
    assert (displacement.parabola_distance(t, k * t**2, k) <= 1e-14 * scale).all()
    angle = np.linspace(0, 7, 41)
    x, y = (1 + k) * np.cos(angle), (1 + k) * (1 + np.sin(angle))
    assert displacement.circle_distance(x, y, 1 + k).max() <= 1e-14 * (1 + k)


def test_line_is_the_parabola_with_k_0():
    x, y = np.random.default_rng(1).uniform(-3, 3, (2, 100))
    np.testing.assert_allclose(displacement.parabola_distance(x, y, 0), np.abs(y), atol=1e-15)


@pytest.mark.parametrize("spacing", (0.05, 0.1, 0.7))
@pytest.mark.parametrize("k", (0, 0.3, 5, 40))
def test_polyline_distance_by_segments(k, spacing):
    points = np.random.default_rng(2).uniform(-1.5, 1.5, (25, 2))
    x = spacing * np.arange(-150, 151)
    vertices = np.stack([x, k * x**2], axis=1)
    expected = [min(segment_distance(p, *ends) for ends in pairwise(vertices)) for p in points]
    distance = displacement.polyline_distance(*points.T, k, spacing)
    np.testing.assert_allclose(distance, expected, atol=1e-12)


KNOWN = {0: 0.63662, 0.5: 0.62106, 1: 0.61401, 2: 0.62979, 4: 0.66174, 16: 0.72763}


@pytest.mark.parametrize("r", displacement.PARABOLA_RADII)
def test_parabola_values(r):
    k = np.array(list(KNOWN)) / r
    mean = displacement.parabola_displacement(k, r)
    np.testing.assert_allclose(mean, list(KNOWN.values()), rtol=0, atol=1e-5)


def test_parabola_displacement_depends_on_kr_alone():
    kr = np.geomspace(1e-3, 80, 60)
    one, *others = (displacement.parabola_displacement(kr / r, r) for r in (1, 2, 0.1, 1e-6, 1e6))
    for other in others:
        np.testing.assert_allclose(other, one, rtol=1e-12)


@pytest.mark.parametrize("k", (0.1, 0.49, 0.5, 0.501, 1, 16, 80))
def test_parabola_quadrature_to_1e_8(k):
    """Against adaptive quadrature of other distances; at k = 0.5 the centre is on the circle."""
    x = np.sqrt((np.sqrt(1 + 4 * k**2) - 1) / (2 * k**2))
    crossing = math.atan2(k * x**2, x)
    breaks = (-np.pi / 2, crossing, np.pi / 2, np.pi - crossing, 3 * np.pi / 2)
    total = sum(
        quad(lambda a: cubic_distance(np.cos(a), np.sin(a), k), *ends, epsabs=1e-10)[0]
        for ends in pairwise(breaks)
    )
    assert displacement.parabola_displacement(k, 1) == pytest.approx(
        total / (2 * np.pi), rel=0, abs=1e-8
    )


def test_quadrature_has_converged(monkeypatch):
    """Also where it is hardest, with the centre of curvature on, or just off, the circle."""
    near = np.geomspace(1e-12, 0.4, 50)
    parabolas = np.concatenate([np.linspace(0, 80, 100), 0.5 + near, 0.5 - near])
    circles = np.concatenate([1 / near, 1 + near, 1 - near])
    coarse = [displacement.parabola_displacement(parabolas, 1)]
    coarse.append(displacement.circle_displacement(circles, 1))
    monkeypatch.setattr(displacement, "NODES", 300)
    fine = [displacement.parabola_displacement(parabolas, 1)]
    fine.append(displacement.circle_displacement(circles, 1))
    for one, other in zip(coarse, fine, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-10)


def test_circle_is_an_elliptic_integral():
    k, r = np.array([0.03, 0.1, 0.101, 0.5, 10]), 0.1  # the first does not reach the circle
    crossing = np.arcsin(np.minimum(r / (2 * k), 1))
    m = 4 * k * r / (k + r) ** 2
    half = 2 * ellipeinc((crossing + np.pi / 2) / 2, m) - ellipeinc(np.pi / 2, m)
    expected = (2 * (k + r) * half - 2 * k * crossing) / (np.pi * r)
    np.testing.assert_allclose(displacement.circle_displacement(k, r), expected, atol=1e-8)


def test_polyline_is_a_v_within_its_spacing():
    k = np.array([0, 1, 10, 40.0])
    slope = np.arctan(0.1 * k)
    expected = (slope + 2 - np.sin(slope)) / np.pi
    for r in (0.1, 0.05):
        mean = displacement.polyline_displacement(k, r, spacing=0.1)
        np.testing.assert_allclose(mean, expected, rtol=0, atol=1e-5)


def test_fine_polyline_is_the_parabola():
    k = np.array([0, 0.5, 5])
    mean = displacement.polyline_displacement(k, 1, spacing=0.002)
    np.testing.assert_allclose(mean, displacement.parabola_displacement(k, 1), atol=2e-5)


def results_of(folder):
    for name in FIGURES:
        stem = folder / f"curvature_displacement_{name}"
        assert stem.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
        assert stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    others = {"displacement.npz", "summary.json", "table.md"}
    assert {path.name for path in folder.iterdir() if path.suffix not in (".pdf", ".png")} == others
    results = files.read(folder / "displacement.npz")
    return results, json.loads((folder / "summary.json").read_text("utf-8"))["displacement"]


def test_script_draws_the_exact_figure_and_draws_it_again(tmp_path):
    command = [sys.executable, ROOT / "displacement_integration.py", "--output", tmp_path]
    subprocess.run(command, cwd=tmp_path, check=True)
    folder = tmp_path / "figures/displacement"
    results, summary = results_of(folder)
    assert results.settings["parabola_drawn"] == "exact"
    arrays, k = results.arrays, displacement.PARABOLA_K
    for i, r in enumerate(displacement.PARABOLA_RADII):
        expected = displacement.parabola_displacement(k, r)
        np.testing.assert_array_equal(arrays["parabola_exact"][i], expected)
        expected = displacement.polyline_displacement(k, r, 0.1)
        np.testing.assert_array_equal(arrays["parabola_polyline"][i], expected)
        error = np.abs(arrays["parabola_polyline"][i] - arrays["parabola_exact"][i]).max()
        assert summary["polyline_largest_error"][str(r)] == pytest.approx(error, abs=1e-5)
    for i, r in enumerate(displacement.CIRCLE_RADII):
        expected = displacement.circle_displacement(displacement.CIRCLE_K, r)
        np.testing.assert_array_equal(arrays["circle_exact"][i], expected)
    lowest, back = summary["parabola_lowest"], summary["parabola_back_at_straight_line"]
    around = displacement.parabola_displacement(lowest["kr"] + np.array([-0.01, 0, 0.01]), 1)
    assert lowest["mean"] == pytest.approx(around[1], abs=1e-6) and around.argmin() == 1
    assert displacement.parabola_displacement(back["kr"], 1) == pytest.approx(2 / np.pi, abs=2e-5)
    assert summary["circle_lowest"] == pytest.approx(arrays["circle_exact"].min(), abs=1e-6)

    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    subprocess.run([*command, "--plot-only"], cwd=tmp_path, check=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first


def test_script_draws_the_polyline(monkeypatch, call, tmp_path):
    drawn = {}
    draw_panel = displacement.draw_panel

    def spy(curvature, radii, curves, title):
        drawn[title] = curves
        return draw_panel(curvature, radii, curves, title)

    monkeypatch.setattr(displacement, "draw_panel", spy)
    done = call(displacement, "--polyline", "0.3", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    results, _ = results_of(tmp_path / "figures/displacement-polyline-0.3")
    assert results.settings == {"parabola_drawn": "polyline", "spacing": 0.3}
    curves = drawn["Parabola $y = k x^2$: polyline, 0.3 apart"]
    for r, curve in zip(displacement.PARABOLA_RADII, curves):
        expected = displacement.polyline_displacement(displacement.PARABOLA_K, r, 0.3)
        np.testing.assert_array_equal(curve, expected)


@pytest.mark.parametrize("value", ("-1", "0", "nan", "inf", "1e-9", "11", "one", ""))
def test_bad_spacing_is_one_sentence(call, tmp_path, value):
    done = call(displacement, "--polyline", value, "--output", tmp_path)
    assert done.returncode == 2
    sentence = f"argument --polyline: {value!r} is not a number from 0.001 to 10\n"
    assert done.stderr.endswith(sentence)
    assert not list(tmp_path.iterdir())


def test_output_that_is_a_file(call, tmp_path):
    (tmp_path / "file").write_text("kept")
    done = call(displacement, "--output", tmp_path / "file")
    assert done.returncode == 2 and str(tmp_path / "file") in done.stderr
    assert (tmp_path / "file").read_text() == "kept"
