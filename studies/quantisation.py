"""Do teleports help weights survive rounding? Networks in few bits, before and after.

    python studies/quantisation.py             # 40 minutes on two cores
    python studies/quantisation.py --sample    # the same on the 1,000 images that ship
    torchrun --nproc-per-node 10 studies/quantisation.py --device cuda:0    # processes share a GPU

The networks of studies/networks.py are trained, and their batch norms folded into convolutions.
The ARMS move them, which keeps their function. Then all weights but embeddings are rounded to 8 … 2
bits, with a step for each tensor, each output channel, or each 32 inputs of a channel. The
comparison named beforehand is the test loss of teleported − trained for 4 bits with a step for each
channel, paired over five seeds.

Results go to logs/quantisation/, where an interrupted run resumes, and to figures/quantisation/.
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
    "trained": {"label": "as trained", "color": plots.BLACK},
    "random": {"label": "moved at random", "color": plots.GREY},
    # without gradients, to ranges that are small for the size of the weights
    "ranges": {"label": "rescaled by ranges", "color": plots.SKY},
    # to the least predicted rise of the loss, by the diagonal matrices of the GPT's GL(d)
    "rescaled": {"label": "rescaled", "color": plots.GREEN},
    # to the same, by all symmetries
    "teleported": {"label": "teleported", "color": plots.RED},
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
    return results.Log(path, settings, (__file__, *networks.CODE))


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
    parameters, axes = dict(model.named_parameters()), []
    for axis in group.axes:
        shape = parameters[axis.name].shape
        length = math.prod(shape[dim] for dim in groups.dims_of(axis, shape))
        index = torch.arange(length) if axis.index is None else axis.index
        units = torch.arange(group.count * group.size).view(-1, group.size)
        member = units[groups.members_of(axis, group, length).cpu()].flatten()
        axes.append(axis._replace(index=index.view(-1, 1), member=member))
    return groups.Group(groups.RESCALING, group.count * group.size, 1, axes)


def collect(name, args):
    """Return the Result of a network.

    Arrays: loss, accuracy, predicted_rise: [arms, pers, bits, runs]; float_loss, float_accuracy:
    [runs]; arms, pers, bits: their names.
    """
    logs = [cells_log((name, seed), args) for seed in models.run_seeds(range(args.runs))]
    parts = [results.load(log, len(cells(name))) for log in logs]
    arms = list(dict.fromkeys(arm for arm, _ in cells(name)))
    keys = "loss", "accuracy", "predicted_rise", "float_loss", "float_accuracy"
    arrays = {key: np.stack([part.arrays[key] for part in parts], -1) for key in keys}
    for key in keys[:3]:
        arrays[key] = arrays[key].reshape(len(arms), len(PERS), len(BITS), -1)
    arrays |= {"arms": arms, "pers": list(PERS), "bits": BITS}
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
    moved = [arm for arm in loss if arm != "trained"]
    return {
        "float": {key: arrays[f"float_{key}"].mean() for key in ("loss", "accuracy")},
        "loss": {arm: values.mean(-1) for arm, values in loss.items()},
        "accuracy": {arm: values.mean(-1) for arm, values in accuracy.items()},
        "differences": {a: statistics.paired_difference(loss[a], loss["trained"]) for a in moved},
    }


def rises(arrays_of):
    """Return {arm: (predicted, true)}: the rises of the test loss in all cells of all networks."""
    found = {}
    for arrays in arrays_of.values():
        both = np.stack([arrays["predicted_rise"], arrays["loss"] - arrays["float_loss"]], 1)
        for arm, pair in zip(arrays["arms"].tolist(), both):
            found.setdefault(arm, []).append(pair.reshape(2, -1))
    return {arm: np.concatenate(pairs, 1) for arm, pairs in found.items()}


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


def columns(summary, key, arm):
    """Return the numbers of a network's row: in float, then those of the COLUMNS."""
    values = dict(zip(PERS, summary[key][arm]))
    cells = [values[per][BITS.index(b)] for per, bits in COLUMNS.items() for b in bits]
    return [f"{value:.3f}" for value in (summary["float"][key], *cells)]


def table(summaries, decades):
    """Return the comparison named beforehand, all results, and predictions as Markdown."""
    primary, everything, predictions = [], [], []
    for title, summary in summaries.items():
        cells = summary["differences"]["teleported"]
        cells = {key: values[:, BITS.index(PRIMARY_BITS)] for key, values in cells.items()}
        cells = [dict(zip(cells, numbers)) for numbers in zip(*cells.values())]
        primary.append([title, *map(plots.difference_text, cells)])
        key = "loss" if "GPT" in title else "accuracy"
        for arm in summary["loss"]:
            everything.append([title, ARMS[arm]["label"], *columns(summary, key, arm)])
    for d, row in decades.items():
        numbers = str(row["cells"]), f"{row['median']:.2f}", f"{row['within']:.0%}"
        predictions.append([f"{10.0**d:g} to {10.0 ** (d + 1):g}", *numbers])
    header = [f"{per}: {b} bits" for per, bits in COLUMNS.items() for b in bits]
    ratio = "true / predicted (median)", "within a factor of 2"
    return f"""Test loss, teleported − trained, for {PRIMARY_BITS} bits, in 10⁻³: paired means and \
95 % intervals. The comparison named beforehand is that for each channel.

{plots.markdown(["", *(f"a step for each {per}" for per in PERS)], primary)}
Test accuracy (GPT: test loss), mean over runs:

{plots.markdown(["", "arm", "in float", *header], everything)}
Rise of the test loss in all cells:

{plots.markdown(["predicted rise", "cells", *ratio], predictions)}"""


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
            style = ARMS[arm] | {"marker": plots.MARKERS[list(ARMS).index(arm)], "ms": 4}
            plots.plot_mean(axes, range(len(BITS)), values[list(PERS).index(per)], **style)
        axes.axhline(arrays[f"float_{key}"].mean(), color=plots.GREY, lw=0.8, ls=":")
        axes.set(title=title, xlabel="bits", ylabel=f"test {key}")
        axes.set_xticks(range(len(BITS)), BITS)
    plots.legend_below(figure, panels[0], columns=5)  # the GPT's, which has all arms
    figure.suptitle(f"Weights rounded with a step for each {per}")
    plots.save_figure(figure, path)


def draw_rises(path, rises_of):
    """Draw the true rise of the loss against the predicted one, a point for each cell."""
    figure = Figure(figsize=(5.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for arm, (predicted, true) in rises_of.items():
        axes.scatter(predicted, true, s=6, alpha=0.5, lw=0, **ARMS[arm])
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
        run.run_tasks(compute, tasks, args, [len(cells(name)) for name, _ in tasks], "cell")
        for name in args.network:
            results.save(folder / f"{name}.npz", collect(name, args))

    saved = results.read_all(folder, NETWORKS, required=args.network)
    saved = {NETWORKS[name].title: part for name, part in saved.items()}
    arrays = {title: part.arrays for title, part in saved.items()}
    summaries = {title: summarise(values) for title, values in arrays.items()}
    rises_of = rises(arrays)
    decades = agreement(rises_of)
    results.save_summaries(folder / "summary.json", saved, summaries | {"agreement": decades})
    results.save_text(folder / "table.md", table(summaries, decades))
    for per in PERS:
        draw_bits(folder / f"bits_{per.replace(' ', '_')}", arrays, per)
    draw_rises(folder / "rises", rises_of)
    print(f"\n{table(summaries, decades)}\nFigures, and each run: {folder}")


if __name__ == "__main__":
    run.run(main)
