"""Figures as PDF and PNG, bands and differences in them, and tables in Markdown."""

import warnings

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from .files import whole_file
from .statistics import paired_difference

# told apart by the colour-blind (Okabe and Ito)
BLACK, ORANGE, SKY, GREEN = "black", "#E69F00", "#56B4E9", "#009E73"
BLUE, RED, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#808080"
MARKERS = "osD^vPX*"  # since colours alone are lost in grey


def save_figure(figure, path):
    """Write a matplotlib figure as `path`.pdf and `path`.png."""
    # no date in the file: the same figure is the same bytes
    for suffix, metadata in (("pdf", {"CreationDate": None}), ("png", None)):
        with whole_file(f"{path}.{suffix}") as file:
            figure.savefig(file, format=suffix, dpi=150, bbox_inches="tight", metadata=metadata)


def plain_log_axis(axes, which):
    """Make the axis `which`, x or y, logarithmic, with numbers like 0.2 at its ticks.

    On an axis of more than three decades, as what is drawn has it, ticks are powers of ten.
    """
    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    low, high = axis.get_view_interval()
    if high <= 1000 * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:g}")


def legend_beside(axes):
    """Put a legend to the right of axes, where it covers nothing."""
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def plot_with_band(axes, x, mean, low, high, **style):
    """Plot a line with a band around it; all are [len(x)]."""
    (line,) = axes.plot(x, mean, **style)
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, lw=0)


def plot_mean(axes, x, values, **style):
    """Plot the mean of values: [len(x), runs], over those not nan, with a standard deviation."""
    with warnings.catch_warnings():  # where one is left
        warnings.simplefilter("ignore", RuntimeWarning)
        mean, deviation = np.nanmean(values, 1), np.nanstd(values, 1, ddof=1)
    plot_with_band(axes, x, mean, mean - deviation, mean + deviation, **style)


def draw_losses(path, curves, **labels):
    """Draw the losses of methods against x, on logarithmic axes but for epochs.

    curves: {method: (x, loss)}, loss: [steps, runs]. Where x is [steps], the mean over the finite
    runs is drawn, with a band of a standard deviation that is cut at the lowest loss; where x is
    [steps, runs], the means of both.
    """
    axes = Figure(figsize=(5.2, 3.8)).add_subplot(**labels)
    colours = BLACK, GREY, SKY, GREEN, ORANGE, PURPLE, RED
    for k, (method, (x, loss)) in enumerate(curves.items()):
        kept = np.isfinite(loss).all(0)
        label = method if kept.all() else f"{method}, {(~kept).sum()} of {kept.size} not finite"
        style = {"color": colours[k % len(colours)], "ls": "-" if k % 2 else "--", "label": label}
        mean, deviation = loss[:, kept].mean(1, float), loss[:, kept].std(1, float)
        if x.ndim > 1:
            axes.plot(x[:, kept].mean(1, float), mean, marker=".", lw=1, **style)
        else:
            low = np.maximum(mean - deviation, loss[:, kept].min(1))
            plot_with_band(axes, x, mean, low, mean + deviation, **style)
    axes.set(yscale="log", xscale="linear" if labels["xlabel"] == "epoch" else "log")
    legend_beside(axes)
    save_figure(axes.figure, path)


def draw_arms(path, title, epochs, arms, reference, controls=(), xlim=None):
    """Draw losses of arms, training dashed, beside their paired test loss minus the reference's.

    arms: {label: (colour, training loss or None, test loss)}, with losses [epochs, runs];
    reference: the test loss that is subtracted; controls: labels that are only in the right panel.
    """
    figure = Figure(figsize=(8.4, 3.4))
    losses, differences = figure.subplots(1, 2)
    for i, (label, (color, train_loss, test_loss)) in enumerate(arms.items()):
        style = {"color": color, "marker": MARKERS[i % 8], "ms": 4, "markevery": (i, 6)}
        difference = paired_difference(test_loss, reference)
        plot_with_band(differences, epochs, **difference, label=label, **style)
        if label not in controls:
            plot_mean(losses, epochs, test_loss, **style)
            if train_loss is not None:
                plot_mean(losses, epochs, train_loss, color=color, ls="--")
    trained = any(train_loss is not None for _, train_loss, _ in arms.values())
    ylabel = "loss (dashed: training)" if trained else "test loss"
    losses.set(title=title, xlabel="epoch", ylabel=ylabel)
    lowest = min(np.nanmin(loss) for _, *both in arms.values() for loss in both if loss is not None)
    if losses.get_ylim()[0] < lowest / 3:  # a band that reaches 0
        losses.set_ylim(bottom=lowest / 1.5)
    plain_log_axis(losses, "y")
    if max(map(abs, differences.get_ylim())) > 1:  # where arms fail the others are seen, too
        differences.set_yscale("symlog", linthresh=0.01)
        differences.set_ylabel("logarithmic beyond ±0.01")
    differences.set(title="test loss − plain's, 95 % interval", xlabel="epoch", xlim=xlim)
    legend_beside(differences)
    figure.tight_layout()
    save_figure(figure, path)


def markdown(header, rows):
    """Return a table in Markdown; header: a list of cells, text; rows: lists of such."""
    lines = [f"| {' | '.join(cells)} |\n" for cells in (header, *rows)]
    return "".join([lines[0], "|---" * len(header), "|\n", *lines[1:]])


def interval_text(difference):
    """Return one `paired_difference` in units of 10⁻³ as text; – where there are too few runs."""
    if np.isnan(difference["low"]):
        return "–"
    mean, low, high = (round(1e3 * difference[key], 1) + 0 for key in ("mean", "low", "high"))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]".replace("-", "−")


def arm_text(arm, diverged):
    """Return an arm's name, with how many of its networks diverged."""
    return f"{arm} ({diverged} diverged)" if diverged else arm


def difference_table(title, reference, differences, diverged=(), claims=()):
    """Return a table in Markdown of the test loss of a reference and of differences between arms.

    reference: {epoch: mean test loss}; differences: {"a − b": {epoch: `paired_difference`, with a
    `verdict` or without}}; diverged: {arm: number of runs}; claims: {arm: what is claimed of it}.
    """
    rows = [["test loss of plain", *(f"{loss:.3f}" for loss in reference.values())]]
    for pair, after in differences.items():
        arm, other = pair.split(" − ")
        name = arm_text(arm, dict(diverged).get(arm, 0))
        claim = f" (claim: {claims[arm]})" if arm in claims else ""
        cells = [f"{interval_text(d)} {d.get('verdict', '')}".strip() for d in after.values()]
        rows.append([f"{name} − {other}{claim}", *cells])
    header = [f"{title}: differences in 10⁻³", *(f"after epoch {epoch}" for epoch in reference)]
    return markdown(header, rows)


def number_text(value, digits=3):
    """Return a number as text, with so many significant digits."""
    return f"{value:.{digits}g}".replace("inf", "∞")


def median_text(found):
    """Return a `median_of_few` as text; without its interval where there are too few runs."""
    median, low, high = (number_text(found[key]) for key in ("median", "low", "high"))
    return median if low == "nan" else f"{median} [{low}, {high}]"


def ratio_table(title, ratios):
    """Return a table in Markdown of ratios: {pair: what `compare_ratios` returns}."""
    rows = [
        [pair, median_text(found), number_text(found["p"], 2), found["lower"]]
        + [", ".join(number_text(ratio, 4) for ratio in found["of_each"])]
        + ["{} and {}".format(*found["fail"]), number_text(found["fail_p"], 2)]
        for pair, found in ratios.items()
    ]
    header = [title, "median", "p", "lower", "of each initialisation", "fail", "p of fail"]
    return markdown(header, rows)
