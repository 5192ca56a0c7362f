"""What sharpness says at other radii, and how far rescalings change it and the curvature.

    python studies/sharpness.py                # a few minutes, after correlation.py
    python studies/sharpness.py --sample

The sharpness of Table 1 is the training loss but for a small rest, φ − L. Does the rest say more
about the test loss at another radius t? And how far do φ − L and ψ of one network change along
rescalings of its units, which keep its function and hence its test loss? The networks are those of
correlation.py, which are trained here if logs/ lacks them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from matplotlib.figure import Figure

import correlation
import models
from correlation import ACTIVATION, ESTIMATES, ESTIMATION_BATCH, R, cell
from data import TITLES, load_data, shuffled_batch
from experiment import plots, results, run, statistics
from teleportation import (
    RADII,
    RESCALING,
    ascend_to,
    curvature,
    curve_derivatives,
    estimate,
    perturbed_losses,
    random_directions,
    random_generators,
    sharpness,
)

SWEEP = np.logspace(-4, 2, 19)  # radii t of φ_t − L, which share a batch's direction
BATCHES = 60  # on which φ_t − L is estimated
KINDS = "orthant", "sphere"  # of directions
RESCALED = 10  # networks that ascend and descend φ, then ψ, along rescalings
STEPS, LENGTH = 12, 0.35  # of each ascent
RESCALING_BATCH = 1500  # images on which they ascend
RESCALED_BATCHES = 20  # earlier ones, on which they are then estimated
SYMBOLS = {"excess": "φ − L", "curvature": "ψ"}  # of what rescalings change


# Computation


def study_log(stack, trained, args):
    """Return the Log of what this study measures of a stack with the arrays `trained`."""
    path, settings, _ = correlation.estimates_log(stack, trained, args)
    settings = settings | {"sweep": list(SWEEP), "steps": STEPS, "length": LENGTH}
    code = correlation.__file__, __file__
    return results.Log(path.with_name(f"{path.stem}-study.npz"), settings, code)


def measure(stack, args, bar):
    """Do with a stack what correlation.py does, then what this study adds."""
    data = load_data(stack.dataset, args)
    trained = correlation.train(stack, data, args, bar)
    correlation.estimate_batches(stack, data, trained, args, bar)
    sweep_and_rescale(stack, data, trained, args, bar)


def sweep_and_rescale(stack, data, trained, args, bar):
    """Estimate φ_t − L of a stack, and φ and ψ of a dataset's first networks, rescaled; resume.

    Returns arrays: excess: [batches, kinds, radii, runs], and ESTIMATES: [5, RESCALED].
    """
    weights = models.from_arrays(trained, args.device)

    def step(state):
        k = int(state["steps"])
        x, y = shuffled_batch(data, ESTIMATION_BATCH, k)
        state = results.append(state, excess=excess_loss(weights, x, y, k))
        if k + 1 == BATCHES and stack.runs[0] == 0:
            state |= rescaled_estimates([w[:RESCALED] for w in weights], data, args.sphere)
        return state

    log = study_log(stack, trained, args)
    return results.resume(log, dict, step, BATCHES, bar, correlation.SAVE_EVERY)


def excess_loss(weights, x, y, k):
    """Return φ_t − L [kinds, radii, runs] of networks on the k-th batch x: [d_0, n], y: [n].

    The difference may be of the order of t²: double precision.
    """
    widths, rng = models.widths_of(weights), torch.Generator().manual_seed(k)
    q, x = torch.linalg.qr(x.double())  # as in `estimate`
    weights = [weights[0].double() @ q, *(w.double() for w in weights[1:])]
    loss, t = models.cross_entropy(weights, x, y, ACTIVATION), torch.as_tensor(SWEEP).to(x)
    rows = []
    for kind in KINDS:
        d = [d.to(x) for d in mirrored(widths, [1.0], rng, kind == "sphere")]
        d[0] = d[0] @ q
        d = [(t[:, None, None, None] * part).flatten(0, 1) for part in d]
        losses = perturbed_losses(weights, x, y, d, ACTIVATION)
        rows.append(losses.unflatten(-1, (len(t), 2)).mean(-1).mT - loss)
    return torch.stack(rows)


def mirrored(widths, radii, rng, sphere):
    """Return `random_directions` [K, ...] and mirror images of the same distribution: [2K, ...].

    On the sphere those are −d, on the orthant (nearly) d mirrored about (1, …, 1). The mean of the
    two losses has no linear term but that along (1, …, 1), which chance would drown.
    """
    directions, mean = random_directions(widths, radii, rng, sphere), 0
    if not sphere:
        size = sum(d[0].numel() for d in directions)
        mean = sum(d.sum((-2, -1), keepdim=True) for d in directions) / size
    return [torch.cat([d, 2 * mean - d]) for d in directions]


def rescaled_estimates(weights, data, sphere):
    """Return the mean ESTIMATES [5, runs] of networks as they are, then `rescale_to_extremes`."""
    x, y = shuffled_batch(data, RESCALING_BATCH, 3)
    radii, rows = RADII[data.name], []
    rescaled = rescale_to_extremes(weights, x, y, radii[2::8], sphere)
    networks = [torch.cat([w[None], new]) for w, new in zip(weights, rescaled)]
    for k in range(RESCALED_BATCHES):
        x, y = shuffled_batch(data, ESTIMATION_BATCH, k)
        rows.append(estimate(networks, x, y, radii, k, ACTIVATION, sphere))
    return {key: torch.stack(values).mean(0) for key, values in zip(ESTIMATES, zip(*rows))}


def rescale_to_extremes(weights, x, y, radii, sphere):
    """Rescale networks [runs] as far as STEPS go, to less and more φ, then to less and more ψ.

    Returns weights [4, runs, ...]. φ is that of the batch x: [d_0, n], y: [n], ψ that of its first
    images.
    """
    n = ESTIMATION_BATCH
    widths, rng = models.widths_of(weights), torch.Generator().manual_seed(0)
    directions = [d.to(x) for d in mirrored(widths, radii, rng, sphere)]
    generators = zip(*(random_generators(widths, rng) for _ in radii))
    generators = [torch.stack(Ms).to(x) for Ms in generators]
    q, x = torch.linalg.qr(x)  # as in `estimate`
    directions[0] = directions[0] @ q
    twice = [torch.stack([w, w]) for w in (weights[0] @ q, *weights[1:])]  # to descend, to ascend

    def phi(weights):
        return sharpness(weights, x, y, directions, ACTIVATION)

    def psi(weights):
        # x is triangular: its first n columns meet n weights of each unit
        lists = [w.unsqueeze(-3) for w in (weights[0][..., :n], *weights[1:])]
        return curvature(*curve_derivatives(lists, x[:n, :n], generators, ACTIVATION)).mean(-1)

    ends, rescaled = torch.tensor([[-torch.inf], [torch.inf]]), []
    for objective in (phi, psi):
        new, _ = ascend_to(ends, objective, twice, x, LENGTH, STEPS, ACTIVATION, RESCALING)
        rescaled.append(new)
    first, *others = (torch.cat(layers) for layers in zip(*rescaled))
    scale = first.norm(dim=-1) / torch.cat([twice[0], twice[0]]).norm(dim=-1)
    return [scale.unsqueeze(-1) * weights[0], *others]


def collect(name, args):
    """Return the Result of a dataset: that of correlation.py, and what this study adds.

    `sweep`, φ_t − L, is [halves of the batches, kinds, radii, runs].
    """
    result, parts = correlation.collect(name, args), []
    for stack in correlation.stacks_of(name, args):
        trained = results.load(correlation.training_log(stack, args), args.epochs).arrays
        parts.append(results.load(study_log(stack, trained, args), BATCHES))
    excess = np.concatenate([part.arrays["excess"] for part in parts], -1)
    halves = excess.reshape(2, -1, *excess.shape[1:]).mean(1)
    arrays = {"sweep": halves.astype(np.float32), "sweep_radii": SWEEP}
    arrays |= {f"rescaled_{key}": parts[0].arrays[key] for key in ESTIMATES}
    made_with = result.made_with | parts[0].made_with
    return results.Result(result.arrays | arrays, result.settings, made_with)


# Statistics


def across_radii(arrays):
    """Return what φ_t − L says of the test loss at each radius, by kind of directions.

    `r`, and `partial_r` given the training loss, have an entry for each radius. Those are tested at
    which a network `works`: its mean loss is below that of a guess, or as at t = 0. `reliability`
    is Spearman and Brown's, of halves of the batches: the share of the variance that is not noise.
    """
    loss, train_loss = (arrays[key].astype(float) for key in ("test_loss", "train_loss"))
    summary, tests = {}, []
    for kind, halves in zip(KINDS, arrays["sweep"].astype(float).swapaxes(0, 1)):
        excess = halves.mean(0)  # [radii, runs]
        works = (excess + train_loss).mean(1) < max(np.log(10), 1.01 * train_loss.mean())
        r = [statistics.correlate(row, loss) for row in excess]
        partial = [statistics.partial_correlation(row, loss, train_loss) for row in excess]
        between = np.array([statistics.correlate(a, b)["pearson"] for a, b in zip(*halves)])
        reliability = (2 * between / (1 + between)).clip(min=0)
        summary[kind] = {"works": works, "reliability": reliability, "r": r, "partial_r": partial}
        for k in works.nonzero()[0]:
            tests.append({"kind": kind, "radius": arrays["sweep_radii"][k]} | partial[k])
    least = min(tests, key=lambda test: test["p"])
    return summary | {"least_p": least | {"holm": min(1, least["p"] * len(tests))}}


def values_and_reach(arrays):
    """Return φ − L and ψ of all networks, [runs], and what rescalings reach, [5, RESCALED].

    What a rescaling changes (of ψ: a factor) is measured on RESCALED_BATCHES batches and applied to
    a network's value. Of the five rows the first is the value itself.
    """
    rescaled = {key: arrays[f"rescaled_{key}"].astype(float) for key in ESTIMATES}
    change = rescaled["sharpness"] - rescaled["batch_loss"]
    factor = rescaled["curvature"] / rescaled["curvature"][0]
    excess, curvature = arrays["sharpness"] - arrays["batch_loss"], arrays["curvature"]
    runs = change.shape[1]
    return {
        "excess": (excess, excess[:runs] + change - change[0]),
        "curvature": (curvature, curvature[:runs] * factor),
    }


def summarise(arrays):
    """Return what φ_t − L says at each radius, and how many networks the rescalings of one reach.

    `inside` is the share of all networks that lie in the range of each one that is rescaled;
    `change_of_loss` the largest relative change of L, by rounding.
    """
    loss = arrays["rescaled_batch_loss"].astype(float)
    change_of_loss = abs(loss / loss[0] - 1).max()
    summary = {"radii": across_radii(arrays), "change_of_loss": change_of_loss}
    for key, (values, reach) in values_and_reach(arrays).items():
        low, high = reach.min(0), reach.max(0)
        inside = ((low <= values[:, None]) & (values[:, None] <= high)).mean(0)
        summary[key] = {"low": low, "high": high, "inside": inside}
    return summary


def table(summaries):
    """Return the results of all datasets as Markdown."""
    labels = [
        "partial r of φ_t − L given the training loss, where its p is least [95 %]",
        "radius t and directions there",
        "p (Holm's, over all radii)",
        "networks in the range that rescalings of one reach: φ − L, mean (least)",
        "the same: ψ",
        "largest relative change of L by rescaling",
    ]
    columns = [labels]
    for summary in summaries.values():
        forms = R, "{radius:.2g}, {kind}", "{p:.2g} ({holm:.2g})"
        cells = [cell(summary["radii"], "least_p", form) for form in forms]
        shares = [summary[key]["inside"] for key in SYMBOLS]
        cells += [f"{share.mean():.0%} ({share.min():.0%})" for share in shares]
        columns.append([*cells, f"{summary['change_of_loss']:.0e}"])
    return plots.markdown(["", *(TITLES[name] for name in summaries)], zip(*columns))


# Figures


def draw_radii(path, summaries):
    """Draw r and partial r of φ_t − L against t: a row for each kind, a column per dataset."""
    figure = Figure(figsize=(3.4 * len(summaries), 6.4), layout="constrained")
    axes = figure.subplots(2, len(summaries), sharex=True, sharey=True, squeeze=False)
    for row, kind in zip(axes, KINDS):
        for panel, (name, summary) in zip(row, summaries.items()):
            of_kind, published = summary["radii"][kind], RADII[name]
            span = {"color": plots.GREY, "alpha": 0.15, "lw": 0, "label": "published radii"}
            panel.axvspan(published[0], published[-1], **span)
            panel.axhline(0, color="black", lw=0.6)
            for key, color, label in (
                ("r", plots.BLUE, "r"),
                ("partial_r", plots.RED, "partial r given the training loss"),
            ):
                band = np.array([[r["pearson"], *r["interval"]] for r in of_kind[key]]).T
                plots.plot_with_band(panel, SWEEP, *band, color=color, marker=".", label=label)
            label = "reliability of $φ_t$ − L"
            panel.plot(SWEEP, of_kind["reliability"], ":", color=plots.GREY, label=label)
            broken = np.append(SWEEP[~of_kind["works"]], np.nan)[0]
            panel.axvline(broken, color="black", ls="--", label="from here on: a guess's loss")
            panel.set(xscale="log", ylim=(-1, 1.05), title=f"{TITLES[name]}, {kind}")
        row[0].set_ylabel("correlation of $φ_t$ − L\nwith the test loss")
    for panel in axes[-1]:
        panel.set_xlabel("radius t")
    plots.legend_below(figure, axes[0, 0], columns=5)
    plots.save_figure(figure, path)


def draw_rescalings(path, saved):
    """Draw what rescalings reach beside all networks' values, a column per dataset."""
    figure = Figure(figsize=(3.4 * len(saved), 5), layout="constrained")
    axes = figure.subplots(2, len(saved), squeeze=False).T
    for column, (name, result) in zip(axes, saved.items()):
        for panel, (key, (values, reach)) in zip(column, values_and_reach(result.arrays).items()):
            x = 1 + np.arange(reach.shape[1])
            panel.axhspan(values.min(), values.max(), color=plots.GREY, alpha=0.3, lw=0)
            panel.scatter(np.zeros_like(values), values, s=6, color="black", alpha=0.3)
            panel.vlines(x, reach.min(0), reach.max(0), color=plots.BLUE)
            panel.scatter(x, reach[0], s=12, color=plots.BLUE)
            if key == "curvature":
                panel.set_yscale("log")
            else:  # of both signs
                spread = 10 ** np.floor(np.log10(np.ptp(values)))
                panel.set_yscale("symlog", linthresh=spread, linscale=2)
            panel.set_xticks([0, *x], ["all", *x])
            panel.set(title=f"{TITLES[name]}: {SYMBOLS[key]}", xlabel="network")
    plots.save_figure(figure, path)


# The script


def main():
    args = correlation.parse_arguments(__doc__)
    folder, stacks = args.figures / "sharpness", correlation.stacks(args)
    if not args.plot_only:
        results.check_writable(folder)
        for name in args.dataset:
            load_data(name, args)  # fetches it, if it is missing, before the workers start
        untrained = {"test_loss": np.empty(0)}  # the path of a log does not depend on it
        logs = [correlation.training_log(stack, args) for stack in stacks]
        results.warn_of_other_code(logs + [study_log(stack, untrained, args) for stack in stacks])
        updates = args.epochs + args.batches + BATCHES
        run.run_tasks(measure, stacks, args, updates, "step")
        for name in args.dataset:
            results.save(folder / f"{name}.npz", collect(name, args))

    saved = results.read_all(folder, RADII, required=args.dataset)
    summaries = {name: summarise(result.arrays) for name, result in saved.items()}
    results.save_summaries(folder / "summary.json", saved, summaries)
    results.save_text(folder / "table.md", table(summaries))
    draw_radii(folder / "radii", summaries)
    draw_rescalings(folder / "rescalings", saved)
    print(f"\n{table(summaries)}\nFigures, and each network's values: {folder}")


if __name__ == "__main__":
    run.run(main)
