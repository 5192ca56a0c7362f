"""Figures as PNG and PDF, and tables in Markdown."""

import warnings

import numpy as np
from matplotlib.ticker import LogLocator, NullLocator

from .results import whole_file
from .statistics import paired_difference

# told apart by the colour-blind (Okabe and Ito)
BLACK, ORANGE, SKY, GREEN = "black", "#E69F00", "#56B4E9", "#009E73"
BLUE, RED, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#808080"
MARKERS = "osD^vPX*"  # since colours alone are lost in grey


def save_figure(figure, path, pdf=False):
    """Write a matplotlib figure as `path`.png, and as `path`.pdf too if it is an item of the paper.

    The same figure gives the same bytes.
    """
    for suffix, metadata in (("png", None), ("pdf", {"CreationDate": None}))[: 1 + pdf]:
        with whole_file(f"{path}.{suffix}") as file:
            figure.savefig(file, format=suffix, dpi=150, metadata=metadata)


def plain_log_axis(axes, which):
    """Make the axis `which`, x or y, logarithmic, with numbers like 0.2 at its ticks.

    An axis of more than three decades has powers of ten at its ticks.
    """
    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    low, high = axis.get_view_interval()
    if high <= 1000 * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:g}")


def legend_below(figure, axes, columns=4):
    """Put one legend for all panels, with the entries of `axes`, below them.

    The figure needs layout="constrained".
    """
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns)


def plot_with_band(axes, x, mean, low, high, **style):
    """Plot a line with a band around it; all are [len(x)]."""
    (line,) = axes.plot(x, mean, **style)
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, lw=0)


def plot_mean(axes, x, values, **style):
    """Plot the mean of values: [len(x), runs], over those not nan, with a standard deviation."""
    with warnings.catch_warnings():  # where one or none is left
        warnings.simplefilter("ignore", RuntimeWarning)
        mean, deviation = np.nanmean(values, 1), np.nanstd(values, 1, ddof=1)
    plot_with_band(axes, x, mean, mean - deviation, mean + deviation, **style)


def plot_differences(axes, epochs, arms, reference, colors):
    """Plot the test loss of arms minus the reference's, with 95 % intervals, against the epoch.

    arms: {label: test loss [epochs, runs]}; reference: a test loss [epochs, runs]; colors: one for
    each arm.
    """
    for i, (label, loss) in enumerate(arms.items()):
        style = {"color": colors[i], "marker": MARKERS[i % 8], "ms": 4, "markevery": (i, 6)}
        difference = paired_difference(loss, reference)
        plot_with_band(axes, epochs, **difference, label=label, **style)
    axes.axhline(0, color=BLACK, lw=0.8)
    if max(map(abs, axes.get_ylim())) > 1:  # where some arms fail the others are to be seen, too
        axes.set_yscale("symlog", linthresh=0.01)
        axes.set_ylabel("logarithmic beyond ±0.01")
    axes.set(title="test loss − plain's, 95 % interval", xlabel="epoch")


def scatter_with_line(axes, x, y):
    """Draw a scatter plot of two arrays and their least-squares line."""
    axes.scatter(x, y, s=12, alpha=0.7, linewidths=0)
    ends = np.array([x.min(), x.max()])
    axes.plot(ends, np.polyval(np.polyfit(x, y, 1), ends), color="black")


def markdown(header, rows):
    """Return a table in Markdown; header: a list of cells, text; rows: lists of cells."""
    lines = [f"| {' | '.join(cells)} |\n" for cells in (header, *rows)]
    return "".join([lines[0], "|---" * len(header), "|\n", *lines[1:]])


def difference_text(difference):
    """Return a `paired_difference` in units of 10⁻³ as text; – where there are too few runs."""
    if np.isnan(difference["low"]):
        return "–"
    mean, low, high = (round(1e3 * difference[key], 1) + 0 for key in ("mean", "low", "high"))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]".replace("-", "−")
