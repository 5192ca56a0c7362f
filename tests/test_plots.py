"""experiment/plots.py and experiment/statistics.py."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats

from experiment import plots, statistics


def test_a_figure_is_saved_as_png_and_pdf_and_is_the_same_bytes_again(tmp_path):
    figure = Figure()
    figure.subplots().plot([1, 2])
    for name in ("one", "two"):
        plots.save_figure(figure, tmp_path / name, pdf=True)
    plots.save_figure(figure, tmp_path / "three")
    assert not (tmp_path / "three.pdf").exists()
    for suffix, start in (("pdf", b"%PDF"), ("png", b"\x89PNG")):
        content = (tmp_path / f"one.{suffix}").read_bytes()
        assert content.startswith(start) and content == (tmp_path / f"two.{suffix}").read_bytes()


def test_panels_show_means_and_differences():
    losses, differences = Figure().subplots(1, 2)
    test, epochs = np.array([[4.0, 6.0], [2.0, np.nan]]), np.array([1, 2])
    plots.plot_mean(losses, epochs, test)
    assert losses.lines[0].get_ydata().tolist() == [5, 2]  # without the run that diverged
    arms = {"higher": test + 1, "lower": test - 1}
    plots.plot_differences(differences, epochs, arms, test, ["C0", "C1"])
    curves = [line.get_ydata().tolist() for line in differences.lines[:2]]
    assert curves == [[1, 1], [-1, -1]]


def test_tables_are_markdown():
    assert plots.markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n|---|---|\n| 1 | 2 |\n"
    difference = {"mean": -0.0012, "low": -0.002, "high": 0.00004}
    assert plots.difference_text(difference) == "−1.2 [−2.0, +0.0]"
    assert plots.difference_text(difference | {"low": np.nan}) == "–"


def test_paired_difference_is_students():
    a, b = np.random.default_rng(0).normal(size=(2, 12))
    difference = statistics.paired_difference(a, b)
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert difference["mean"] == pytest.approx((a - b).mean())
    assert [difference["low"], difference["high"]] == pytest.approx([expected.low, expected.high])
    assert statistics.paired_difference(a, a) == {"mean": 0, "low": 0, "high": 0}
    rows = statistics.paired_difference(np.stack([a, b]), np.stack([b, b]))  # leading dimensions
    assert rows["low"].tolist() == pytest.approx([difference["low"], 0])
    a[3] = np.nan
    rest = np.arange(12) != 3
    assert statistics.paired_difference(a, b) == statistics.paired_difference(a[rest], b[rest])
    too_few = statistics.paired_difference(a[2:4], b[2:4])
    assert too_few["mean"] == a[2] - b[2] and np.isnan([too_few["low"], too_few["high"]]).all()


def test_arms_are_compared_by_pairs_of_runs_after_the_epochs_asked_for():
    loss = {"plain": np.array([[3.0, 5.0], [1.0, 4.0]])}  # [epochs, runs]
    loss["moved"] = loss["plain"] + [[1, 1], [0, 2]]
    pairs = statistics.compare_arms(loss, [("plain", "moved"), ("moved", "plain")], (1, 2))
    assert pairs["plain − moved"][1] == {"mean": -1, "low": -1, "high": -1}
    assert pairs["plain − moved"][2]["mean"] == -1 < 0 < pairs["plain − moved"][2]["high"]
    assert pairs["moved − plain"][2]["mean"] == 1


def test_correlations_are_scipys_with_their_interval():
    generator = np.random.default_rng(0)
    a = generator.normal(size=50)
    b = a + generator.normal(size=50)
    r = statistics.correlate(a, b)
    assert r["pearson"] == pytest.approx(np.corrcoef(a, b)[0, 1])
    # Fisher's z is normal with variance 1 / (n − 3)
    z, width = np.arctanh(r["pearson"]), 1.959964 / np.sqrt(47)
    assert r["interval"] == pytest.approx(np.tanh([z - width, z + width]), abs=1e-6)
    ranks = [np.argsort(np.argsort(v)) for v in (a, b)]
    assert r["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_partial_correlation_is_that_of_the_residuals():
    generator = np.random.default_rng(1)
    control = generator.normal(size=40)
    a, b = generator.normal(size=(2, 40)) + control
    lines = [stats.linregress(control, values) for values in (a, b)]
    residuals = [v - line.slope * control for v, line in zip((a, b), lines)]
    expected = np.corrcoef(*residuals)[0, 1]
    r = statistics.partial_correlation(a, b, control)
    assert r["pearson"] == pytest.approx(expected)
    # p is that of b's coefficient in the regression of a on b and control, with 40 − 3 degrees
    design = np.stack([b, control, np.ones(40)], 1)
    coefficients, (square,), *_ = np.linalg.lstsq(design, a, rcond=None)
    error = np.sqrt(square / 37 * np.linalg.inv(design.T @ design)[0, 0])
    assert r["p"] == pytest.approx(2 * stats.t.sf(abs(coefficients[0] / error), 37))
    z, width = np.arctanh(expected), 1.959964 / np.sqrt(36)
    assert r["interval"] == pytest.approx(np.tanh([z - width, z + width]), abs=1e-6)
    few = statistics.partial_correlation(a[:4], b[:4], control[:4])
    assert few["interval"] == [-1, 1] and 0 < few["p"] < 1


def test_holms_p_values_are_those_of_the_textbook():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.5, 0.9]) == pytest.approx([1, 1])
    assert len(statistics.holm([])) == 0


def test_correlations_of_two_studies_differ_by_fishers_z():
    z = (np.arctanh(0.9) - np.arctanh(0.8)) / np.sqrt(1 / 97 + 1 / 7)
    assert statistics.p_of_difference(0.8, 100, 0.9, 10) == pytest.approx(2 * stats.norm.sf(z))
