"""experiment/plots.py and experiment/statistics.py."""

from experiment import plots
from experiment.plots import save_figure
from experiment.statistics import (
    compare_arms,
    correlate,
    holm,
    p_of_difference,
    paired_difference,
    partial_correlation,
)

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats


def test_a_figure_is_saved_as_pdf_and_png_and_is_the_same_bytes_again(tmp_path):
    figure = Figure()
    figure.subplots().plot([1, 2])
    for name in ("one", "two"):
        save_figure(figure, tmp_path / name)
    assert (tmp_path / "one.pdf").read_bytes().startswith(b"%PDF")
    for suffix in ("pdf", "png"):
        assert (tmp_path / f"one.{suffix}").read_bytes() == (
            tmp_path / f"two.{suffix}"
        ).read_bytes()


def test_paired_difference_is_students():
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 12))
    found = paired_difference(a, b)
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert found["mean"] == pytest.approx((a - b).mean())
    assert [found["low"], found["high"]] == pytest.approx([expected.low, expected.high])
    assert paired_difference(a, a) == {"mean": 0, "low": 0, "high": 0}
    a[3] = np.nan
    kept = np.arange(12) != 3
    assert paired_difference(a, b) == paired_difference(a[kept], b[kept])
    too_few = paired_difference(a[2:4], b[2:4])
    assert too_few["mean"] == a[2] - b[2] and np.isnan([too_few["low"], too_few["high"]]).all()
    assert plots.interval_text(too_few) == "–"
    rows = paired_difference(np.stack([a, b]), np.stack([b, b]))  # leading dimensions are rows
    assert rows["low"].tolist() == pytest.approx([paired_difference(a, b)["low"], 0])


def test_correlations_are_scipys_with_their_interval():
    generator = np.random.default_rng(0)
    a = generator.normal(size=50)
    b = a + generator.normal(size=50)
    found = correlate(a, b)
    assert found["pearson"] == pytest.approx(np.corrcoef(a, b)[0, 1])
    # Fisher's z is normal with variance 1 / (n − 3)
    z, width = np.arctanh(found["pearson"]), 1.959964 / np.sqrt(47)
    assert found["interval"] == pytest.approx(np.tanh([z - width, z + width]), abs=1e-6)
    ranks = [np.argsort(np.argsort(v)) for v in (a, b)]
    assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_partial_correlation_is_that_of_the_residuals():
    generator = np.random.default_rng(1)
    given = generator.normal(size=40)
    a, b = generator.normal(size=(2, 40)) + given
    residuals = []
    for values in (a, b):
        line = stats.linregress(given, values)
        residuals.append(values - line.slope * given - line.intercept)
    expected = np.corrcoef(*residuals)[0, 1]
    found = partial_correlation(a, b, given)
    assert found["pearson"] == pytest.approx(expected)
    # p is that of b's coefficient in the regression of a on b and given, with 40 − 3 degrees
    design = np.stack([b, given, np.ones(40)], 1)
    coefficients, (square,), *_ = np.linalg.lstsq(design, a, rcond=None)
    error = np.sqrt(square / 37 * np.linalg.inv(design.T @ design)[0, 0])
    assert found["p"] == pytest.approx(2 * stats.t.sf(abs(coefficients[0] / error), 37))
    z, width = np.arctanh(expected), 1.959964 / np.sqrt(36)
    assert found["interval"] == pytest.approx(np.tanh([z - width, z + width]), abs=1e-6)
    few = partial_correlation(a[:4], b[:4], given[:4])
    assert few["interval"] == [-1, 1] and 0 < few["p"] < 1


def test_holms_p_values_are_those_of_the_textbook():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1, 1])
    assert len(holm([])) == 0


def test_correlations_of_two_studies_differ_by_fishers_z():
    z = (np.arctanh(0.9) - np.arctanh(0.8)) / np.sqrt(1 / 97 + 1 / 7)
    assert p_of_difference(0.8, 100, 0.9, 10) == pytest.approx(2 * stats.norm.sf(z))
    assert p_of_difference(0.5, 50, 0.5, 100) == 1


def test_arms_are_compared_by_pairs_of_runs_after_the_epochs_asked_for():
    loss = {"plain": np.array([[3.0, 5.0], [1.0, 4.0]])}  # [epochs, runs]
    loss["moved"] = loss["plain"] + [[1, 1], [0, 2]]
    found = compare_arms(loss, [("plain", "moved"), ("moved", "plain")], (1, 2))
    assert found["plain − moved"][1] == {"mean": -1, "low": -1, "high": -1}
    assert found["plain − moved"][2]["mean"] == -1 < 0 < found["plain − moved"][2]["high"]
    assert found["moved − plain"][2]["mean"] == 1
    found["moved − plain"][1]["verdict"] = "holds"
    text = plots.difference_table("MNIST", {1: 4.0, 2: 2.5}, found)
    assert "| MNIST: differences in 10⁻³ | after epoch 1 | after epoch 2 |" in text
    assert "| test loss of plain | 4.000 | 2.500 |" in text
    assert "| moved − plain | +1000.0 [+1000.0, +1000.0] holds | +1000.0 [−" in text


def test_panels_show_means_and_differences(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure))
    test, epochs = np.array([[4.0, 6.0], [2.0, 4.0]]), np.array([1, 2])
    arms = {
        "plain": ("black", None, test),
        "moved": ("C0", test / 2, test + 1),
        "control": ("C1", None, test - 1),
    }
    plots.draw_arms(tmp_path / "a", "title", epochs, arms, test, controls=("control",))
    losses, differences = drawn[0].axes
    curves = [line.get_ydata().tolist() for line in losses.lines]
    assert curves == [[5, 3], [6, 4], [2.5, 1.5]]  # plain, moved, and moved in training
    assert [line.get_ydata().tolist() for line in differences.lines] == [[0, 0], [1, 1], [-1, -1]]


def test_markdown():
    assert plots.markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n|---|---|\n| 1 | 2 |\n"
