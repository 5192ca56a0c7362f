"""Do teleports help weights survive rounding? Networks in few bits, before and after.

    python studies/quantisation.py             # 40 minutes on two cores
    python studies/quantisation.py --sample    # the same on the 1,000 images that ship
    torchrun --nproc-per-node 10 studies/quantisation.py --device cuda:0    # processes share a GPU

The networks of studies/networks.py are trained, and their batch norms folded into convolutions.
Then all weights but embeddings are rounded to 8 … 2 bits, with a step for each tensor, each output
channel, or each 32 inputs of a channel. The arms have the same function in float:

    trained      what training found
    random       moved by random group elements
    ranges       rescaled without gradients, to ranges that are small for the size of the weights
    rescaled     rescaled to the least predicted rise of the loss (GPT: of GL(d) only the diagonal)
    teleported   moved to it by all symmetries of the network (GPT: with GL(d) of attention heads)

The comparison named beforehand is the test loss of teleported − trained for 4 bits with a step for
each channel, paired over five seeds. Results go to logs/quantisation/, where an interrupted run
resumes, and to figures/quantisation/.
"""

import copy
import math
import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from matplotlib.figure import Figure

import models
import networks
from experiment import plots, results, run, statistics
from networks import NETWORKS, evaluate, loss_of
from parameter_symmetries import groups, rounding, trace

DEFAULTS = {"runs": 5}
BATCHES = 25  # of calibration data, of each of which a gradient is taken
STEPS = 150  # of the descent; more change little
RANDOM = 1.0  # size of the logarithms of random group elements
BITS = 8, 6, 5, 4, 3, 2
PERS = {"tensor": "tensor", "channel": "channel", "32 inputs": 32}  # what shares a step
ARMS = {
    "trained": ("as trained", plots.BLACK),
    "random": ("moved at random", plots.GREY),
    "ranges": ("rescaled by ranges", plots.SKY),
    "rescaled": ("rescaled", plots.GREEN),
    "teleported": ("teleported", plots.RED),
}
PRIMARY_BITS = 4
COLUMNS = {"tensor": (6, 4, 3), "channel": (4, 3, 2), "32 inputs": (4, 3, 2)}  # of the table

# Computation


def cells(name):
    """Return what is measured of a network: [(arm, per)]."""
    arms = [arm for arm in ARMS if arm != "rescaled" or name == "gpt"]
    return list(product(arms, PERS))


def cells_log(task, args):
    """Return the Log of a network's seed: its training, then a step for each cell."""
    name, seed = task
    network = NETWORKS[name]
    settings = {
        "network": name,
        "training": [network.dataset, network.batch, network.epochs, network.lr],
        "seed": seed,
        "data": networks.data_version(networks.data_file(args)),
        "cells": cells(name),
        "bits": BITS,
        "rounding": [BATCHES, STEPS, RANDOM],
        "device": args.device.type,
    }
    path = args.output / "logs" / "quantisation" / f"{name}-{seed}{'-sample' * args.sample}.npz"
    return results.Log(path, settings, (__file__, networks.__file__, rounding.__file__))


def compute(task, args, bar):
    """Train a network of one seed and measure its cells; resumes from logs/."""
    name, seed = task
    network, plan = NETWORKS[name], cells(name)
    data = {part: networks.load(network.dataset, part, args) for part in networks.IMAGES}
    torch.backends.cudnn.allow_tf32 = False  # a loss may rise by little

    def start():
        model = networks.train(network, *data["train"], seed)
        loss, accuracy = evaluate(model, *data["test"])
        weights = {f"weight {key}": value for key, value in model.state_dict().items()}
        return weights | {"float_loss": loss, "float_accuracy": accuracy}

    def step(state):
        arm, per = plan[int(state["steps"])]
        model = networks.folded(network.build(data["test"][0].shape[1:])).to(args.device)
        model.load_state_dict({k: torch.tensor(state[f"weight {k}"]) for k in model.state_dict()})
        state = results.append(state, **measure(model, arm, PERS[per], data, seed))
        if len(state["loss"]) == len(plan):  # the weights have served
            state = {key: array for key, array in state.items() if "weight " not in key}
        return state

    results.resume(cells_log(task, args), start, step, len(plan), bar)
    bar.update(len(ARMS) * len(PERS) - len(plan))


def measure(model, arm, per, data, seed):
    """Move a model as an arm does; return its loss, accuracy, predicted_rise: [bits]."""
    x, y = data["calibration"]
    batches = list(zip(x.chunk(BATCHES), y.chunk(BATCHES)))
    options = {"batch_size": batches[0][1].numel()}
    symmetry = trace.symmetry_of(copy.deepcopy(model).cpu(), x[:2].cpu())
    if arm in ("ranges", "rescaled"):
        symmetry = [diagonal(group, model) for group in symmetry]
    if arm == "random":
        elements = groups.random_elements(symmetry, RANDOM, torch.Generator().manual_seed(seed))
        elements = [g.to(x.device) for g in elements]
        model.load_state_dict(groups.act_on(model.state_dict(), symmetry, elements))
    elif arm == "ranges":
        rounding.equalize_(model, symmetry, per=per, steps=STEPS)
    elif arm != "trained":
        rounding.equalize_(model, symmetry, loss_of, batches, per, steps=STEPS, **options)
    levels = 2.0 ** (np.array(BITS) - 1) - 1
    rise = rounding.predicted_rise(model, loss_of, batches, BITS[0], per, **options)
    rounded = [evaluate(rounding.round_weights(model, b, per), *data["test"]) for b in BITS]
    loss, accuracy = np.array(rounded).T
    return {"loss": loss, "accuracy": accuracy, "predicted_rise": rise * (levels[0] / levels) ** 2}


def diagonal(group, model):
    """Return a group with the diagonal matrices alone of its GL(d), as rescalings."""
    if group.kind == groups.RESCALING:
        return group
    parameters = dict(model.named_parameters())

    def of_units(axis):
        shape = parameters[axis.name].shape
        length = math.prod(shape[dim] for dim in groups.dims_of(axis, shape))
        index = torch.arange(length) if axis.index is None else axis.index.flatten()
        member = groups.members_of(axis, group, length)[:, None].cpu() * group.size
        member = (member + torch.arange(group.size)).flatten()
        return axis._replace(index=index[:, None], member=member)

    axes = [of_units(axis) for axis in group.axes]
    return groups.Group(groups.RESCALING, group.count * group.size, 1, axes)


def collect(name, args):
    """Return the Result of a network.

    Arrays: loss, accuracy, predicted_rise: [arms, pers, bits, runs]; float_loss, float_accuracy:
    [runs]; arms, pers, bits: their names.
    """
    logs = [cells_log((name, seed), args) for seed in models.run_seeds(range(args.runs))]
    parts = [results.load(log, len(cells(name))) for log in logs]
    arms = list(dict.fromkeys(arm for arm, _ in cells(name)))
    arrays = {"arms": arms, "pers": list(PERS), "bits": BITS}
    for key in ("loss", "accuracy", "predicted_rise"):
        of_runs = np.stack([part.arrays[key] for part in parts], -1)
        arrays[key] = of_runs.reshape(len(arms), len(PERS), len(BITS), -1)
        if key in ("loss", "accuracy"):
            arrays[f"float_{key}"] = np.array([part.arrays[f"float_{key}"] for part in parts])
    settings = parts[0].settings | {"runs": args.runs}
    del settings["seed"]
    return results.Result(arrays, settings, parts[0].made_with)


# Statistics


def by_arm(arrays, key):
    """Return {arm: array [pers, bits, runs]}."""
    return dict(zip(map(str, arrays["arms"]), arrays[key]))


def summarise(arrays):
    """Return mean losses and accuracies, and the paired differences of losses from trained's.

    All are arrays [pers, bits] for each arm.
    """
    loss, accuracy = by_arm(arrays, "loss"), by_arm(arrays, "accuracy")
    return {
        "float": {key: arrays[f"float_{key}"].mean() for key in ("loss", "accuracy")},
        "loss": {arm: values.mean(-1) for arm, values in loss.items()},
        "accuracy": {arm: values.mean(-1) for arm, values in accuracy.items()},
        "differences": {
            arm: statistics.paired_difference(values, loss["trained"])
            for arm, values in loss.items()
            if arm != "trained"
        },
    }


def rises(arrays_of):
    """Return {arm: (predicted, true)}: the rises of the test loss in all cells of all networks."""
    found = {arm: [] for arm in ARMS}
    for arrays in arrays_of.values():
        true = arrays["loss"] - arrays["float_loss"]
        for arm, *pair in zip(arrays["arms"], arrays["predicted_rise"], true):
            found[str(arm)].append(np.reshape(pair, (2, -1)))
    return {arm: np.concatenate(pairs, 1) for arm, pairs in found.items() if pairs}


def agreement(rises_of):
    """Return how true rises agree with predicted ones, for each decade of the latter."""
    predicted, true = np.concatenate(list(rises_of.values()), 1)
    rows = {}
    for decade in range(-4, 2):
        ratio = (true / predicted)[np.floor(np.log10(predicted)) == decade]
        if len(ratio):
            within = ((ratio > 0.5) & (ratio < 2)).mean()
            rows[decade] = {"cells": len(ratio), "median": np.median(ratio), "within": within}
    return rows


def table(summaries, decades):
    """Return the comparison named beforehand, all results, and predictions as Markdown."""

    def difference(summary, i):
        difference = summary["differences"]["teleported"]
        j = BITS.index(PRIMARY_BITS)
        return plots.difference_text({key: values[i, j] for key, values in difference.items()})

    def row(title, summary, arm):
        key = "loss" if "GPT" in title else "accuracy"
        values = dict(zip(PERS, summary[key][arm]))
        cells = [values[per][BITS.index(b)] for per, bits in COLUMNS.items() for b in bits]
        return [title, ARMS[arm][0], *(f"{v:.3f}" for v in (summary["float"][key], *cells))]

    primary = plots.markdown(
        ["", *(f"a step for each {per}" for per in PERS)],
        [[title, *(difference(s, i) for i in range(len(PERS)))] for title, s in summaries.items()],
    )
    everything = plots.markdown(
        [
            "",
            "arm",
            "in float",
            *(f"{per}: {b} bits" for per, bits in COLUMNS.items() for b in bits),
        ],
        [row(title, s, arm) for title, s in summaries.items() for arm in s["loss"]],
    )
    predictions = plots.markdown(
        ["predicted rise", "cells", "true / predicted (median)", "within a factor of 2"],
        [
            [f"{10.0**d:g} to {10.0 ** (d + 1):g}", str(n), f"{median:.2f}", f"{within:.0%}"]
            for d, (n, median, within) in ((d, r.values()) for d, r in decades.items())
        ],
    )
    return (
        f"Test loss, teleported − trained, for {PRIMARY_BITS} bits, in 10⁻³: paired means and 95 % "
        f"intervals. The comparison named beforehand is that for each channel.\n\n{primary}"
        f"\nTest accuracy (GPT: test loss), mean over runs:\n\n{everything}"
        f"\nRise of the test loss in all cells:\n\n{predictions}"
    )


# Figures


def draw_bits(path, arrays_of, per):
    """Draw accuracy, or a GPT's loss, against the bits, a panel for each network."""
    columns = min(4, len(arrays_of))
    rows = math.ceil(len(arrays_of) / columns)
    figure = Figure(figsize=(3.2 * columns, 2.7 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (title, arrays) in zip(panels, arrays_of.items()):
        key = "loss" if "GPT" in title else "accuracy"
        for arm, values in by_arm(arrays, key).items():
            marker = plots.MARKERS[list(ARMS).index(arm)]
            style = dict(zip(("label", "color"), ARMS[arm]), marker=marker, ms=4)
            plots.plot_mean(axes, range(len(BITS)), values[list(PERS).index(per)], **style)
        axes.axhline(arrays[f"float_{key}"].mean(), color=plots.GREY, lw=0.8, ls=":")
        axes.set(title=title, xlabel="bits", ylabel=f"test {key}")
        axes.set_xticks(range(len(BITS)), BITS)
    most = max(panels, key=lambda axes: len(axes.get_legend_handles_labels()[1]))
    plots.legend_below(figure, most, columns=5)
    figure.suptitle(f"Weights rounded with a step for each {per}")
    plots.save_figure(figure, path)


def draw_rises(path, rises_of):
    """Draw the true rise of the loss against the predicted one, a point for each cell."""
    figure = Figure(figsize=(5.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for arm, (predicted, true) in rises_of.items():
        style = dict(zip(("label", "color"), ARMS[arm]))
        axes.scatter(predicted, true, s=6, alpha=0.5, lw=0, **style)
    axes.plot((1e-4, 10), (1e-4, 10), color=plots.BLACK, lw=0.8)
    axes.set(xscale="log", yscale="log", xlim=(1e-4, 1e3), ylim=(1e-4, 100))
    axes.set(xlabel="predicted rise of the test loss", ylabel="true rise")
    axes.legend(markerscale=3)
    plots.save_figure(figure, path)


# The script


def parse_arguments():
    parser = run.experiment_parser(__doc__)
    add, names = parser.add_argument, list(NETWORKS)
    add("--network", nargs="+", choices=names, default=names, help="which networks")
    add("--runs", type=run.whole_number(2), default=DEFAULTS["runs"], help="seeds of each network")
    args = parser.parse_args()
    args.network = [name for name in NETWORKS if name in args.network]
    return args


def main():
    args = parse_arguments()
    folder = run.figures_folder(args, DEFAULTS) / "quantisation"
    if not args.plot_only:
        results.check_writable(folder)
        networks.make_data(args)
        tasks = list(product(args.network, models.run_seeds(range(args.runs))))
        results.warn_of_other_code([cells_log(task, args) for task in tasks])
        run.run_tasks(compute, tasks, args, len(ARMS) * len(PERS), "cell")
        for name in args.network:
            results.save(folder / f"{name}.npz", collect(name, args))

    parts = results.read_all(folder, NETWORKS, required=args.network)
    arrays = {NETWORKS[name].title: part.arrays for name, part in parts.items()}
    summaries = {title: summarise(values) for title, values in arrays.items()}
    rises_of = rises(arrays)
    decades = agreement(rises_of)
    about = {
        NETWORKS[n].title: {"settings": p.settings, "made_with": p.made_with}
        for n, p in parts.items()
    }
    summary = {title: about[title] | summaries[title] for title in arrays}
    results.save_json(folder / "summary.json", summary | {"agreement": decades})
    results.save_text(folder / "table.md", table(summaries, decades))
    for per in PERS:
        draw_bits(folder / f"bits_{per.replace(' ', '_')}", arrays, per)
    draw_rises(folder / "rises", rises_of)
    print(f"\n{table(summaries, decades)}\nFigures, and each run: {folder}")


if __name__ == "__main__":
    run.run(main)
