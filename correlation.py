"""Correlation of sharpness φ and curvature ψ with the test loss: Table 1, Figures 9 and 10.

    python correlation.py                      # all of Table 1
    python correlation.py --sample             # the same on the shipped sample, in three minutes
    python correlation.py --dataset MNIST --runs 20

Trains networks that differ in their initial weights alone, as stacks, estimates φ (Eq. 4) and ψ
(Eq. 5) of each final network, and correlates both with the test loss across networks. Training and
estimates go to logs/correlation/; an interrupted run goes on from there and ends with the same
numbers. The results of each network are in figures/correlation/<dataset>.npz.
"""

import time

from experiment import files, launch, plots, statistics

import numpy as np
import torch
from matplotlib.figure import Figure

import models
from data import TITLES, load_data, shuffled_batch
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

# Settings

DEFAULTS = {"runs": 100, "epochs": 40, "batches": 200, "sphere": False}  # as published
SAMPLE_DEFAULTS = DEFAULTS | {"batches": 20}
RUNS_PER_STACK = {"MNIST": 50, "FashionMNIST": 50, "CIFAR10": 25}  # runs that fit a CPU's caches
ACTIVATION = models.LeakyReLU()
ESTIMATION_BATCH = 200  # training images in each batch that φ and ψ are estimated on
SAVE_EVERY = 20  # batches of the estimators
PUBLISHED_R = {  # Table 1: Pearson's r with the test loss
    "sharpness": {"MNIST": 0.704, "FashionMNIST": 0.790, "CIFAR10": 0.899},
    "curvature": {"MNIST": -0.050, "FashionMNIST": -0.232, "CIFAR10": -0.167},
}
ESTIMATES = "sharpness", "curvature", "batch_loss", "exact_curvature"  # what `estimate` returns
QUANTITIES = {
    "sharpness": "φ",
    "batch_loss": "L",
    "excess": "φ − L",
    "curvature": "ψ",
    "exact_curvature": "ψ by the exact γ″",
    "train_loss": "training loss",
}
# what the paper claims: the sign of the correlation with the test loss
CLAIMED = {"sharpness": 1, "excess": 1, "curvature": -1, "exact_curvature": -1}
KINDS = "orthant", "sphere"
SWEEP = np.logspace(-4, 2, 19)  # radii of φ_t − L, one direction a batch for all of them
SWEEP_BATCHES = 60
RESCALED = 10  # networks that are moved along rescalings, to less and more of φ, then of ψ
RESCALING_STEPS, RESCALING_LENGTH = 12, 0.35
RESCALING_BATCH = 1500  # images that they are moved on
RESCALED_BATCHES = 20  # earlier ones, that they are estimated on


# Computation


def train_stack(data, runs, epochs, path, settings, bar):
    """Train the runs with the indices `runs` as one stack and evaluate them; resume from `path`.

    Returns the arrays saved at `path`: W0, W1, …: [runs, d_{m+1}, d_m], epoch_loss [epochs, runs]
    (the mean training loss over each epoch), seconds [epochs]; and of the final networks
    train_loss, test_loss, test_accuracy [runs]. Raises UserError where a loss is not finite.
    """
    widths, lr = models.TRAINING[data.name]

    def start():
        return models.to_arrays(models.init_weights(widths, models.run_seeds(runs)))

    def step(state):
        weights, begin = models.from_arrays(state, data.x_train.device), time.perf_counter()
        try:
            loss = models.train_epoch_sgd(weights, data.x_train, data.y_train, lr, ACTIVATION)
        except FloatingPointError as error:
            raise files.UserError(f"{path.stem}, epoch {state['steps']}: {error}.") from None
        state = files.appended(state, epoch_loss=loss, seconds=time.perf_counter() - begin)
        if state["steps"] + 1 == epochs:
            test = models.evaluate(weights, data.x_test, data.y_test, ACTIVATION)
            train_loss, _ = models.evaluate(weights, data.x_train, data.y_train, ACTIVATION)
            state |= {"train_loss": train_loss, "test_loss": test[0], "test_accuracy": test[1]}
        return state | models.to_arrays(weights)

    return files.resume(path, settings, start, step, epochs, bar)


def estimate_stack(data, weights, batches, sphere, path, settings, bar):
    """Estimate φ, ψ and L of a stack of networks on each batch; resume from `path`.

    Returns the arrays saved at `path`, the ESTIMATES: [batches, runs]. Stacks share the batches'
    draws. More batches than asked for are kept.
    """

    def step(state):
        k = int(state["steps"])
        x, y = shuffled_batch(data, ESTIMATION_BATCH, k)
        found = estimate(weights, x, y, RADII[data.name], k, ACTIVATION, sphere)
        return files.appended(state, **dict(zip(ESTIMATES, found)))

    return files.resume(path, settings, dict, step, batches, bar, SAVE_EVERY)


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


def excess_loss(weights, x, y, k):
    """Return φ_t − L [2, len(SWEEP), runs] on the k-th batch, on the orthant and on the sphere.

    All radii share a direction. The difference may be of the order of t²: double precision.
    """
    widths, rng = models.widths_of(weights), torch.Generator().manual_seed(k)
    q, x = torch.linalg.qr(x.double())  # as in `estimate`
    weights = [weights[0].double() @ q, *(w.double() for w in weights[1:])]
    loss, t = models.cross_entropy(weights, x, y, ACTIVATION), torch.as_tensor(SWEEP).to(x)
    rows = []
    for sphere in (False, True):
        d = [d.to(x) for d in mirrored(widths, [1.0], rng, sphere)]
        d[0] = d[0] @ q
        d = [(t[:, None, None, None] * part).flatten(0, 1) for part in d]
        losses = perturbed_losses(weights, x, y, d, ACTIVATION)
        rows.append(losses.unflatten(-1, (len(t), 2)).mean(-1).mT - loss)
    return torch.stack(rows)


def sweep_stack(data, weights, path, settings, bar):
    """Return "excess", the `excess_loss` of a stack on each of SWEEP_BATCHES batches; resume."""

    def step(state):
        k = int(state["steps"])
        batch = shuffled_batch(data, ESTIMATION_BATCH, k)
        return files.appended(state, excess=excess_loss(weights, *batch, k))

    return files.resume(path, settings, dict, step, SWEEP_BATCHES, bar, SAVE_EVERY)


def rescale_to_extremes(weights, x, y, radii, sphere):
    """Move networks [runs] as far as RESCALING_STEPS go, to less and to more of φ, then of ψ.

    Returns them [4, runs]. φ is that of the batch x: [d_0, n], y: [n], ψ of its first images.
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

    ends = torch.tensor([[-torch.inf], [torch.inf]])

    def rescaled(objective):
        limits = RESCALING_LENGTH, RESCALING_STEPS
        return ascend_to(ends, objective, twice, x, *limits, ACTIVATION, RESCALING)[0]

    moved = [torch.cat(layers) for layers in zip(rescaled(phi), rescaled(psi))]
    scale = moved[0].norm(dim=-1) / torch.cat([twice[0], twice[0]]).norm(dim=-1)
    return [scale.unsqueeze(-1) * weights[0], *moved[1:]]


def rescaled_stack(data, weights, sphere, path, settings, bar):
    """Return ESTIMATES [5, RESCALED] of a stack's first networks: as they are, and rescaled.

    They are means over the first RESCALED_BATCHES batches; the rescaling sees later images.
    """

    def step(state):
        few, radii = [w[:RESCALED] for w in weights], RADII[data.name]
        batches = [shuffled_batch(data, ESTIMATION_BATCH, k) for k in range(RESCALED_BATCHES)]
        later = shuffled_batch(data, RESCALING_BATCH, 3)
        moved = rescale_to_extremes(few, *later, radii[2::8], sphere)
        few = [torch.cat([w[None], new]) for w, new in zip(few, moved)]
        rows = [estimate(few, *b, radii, k, ACTIVATION, sphere) for k, b in enumerate(batches)]
        return {key: torch.stack(row).mean(0) for key, row in zip(ESTIMATES, zip(*rows))}

    return files.resume(path, settings, dict, step, 1, bar)


def stacks(name, args):
    """Return {path in logs/: indices of its runs} for the stacks of a dataset, and settings."""
    widths, lr = models.TRAINING[name]
    settings = dict(dataset=name, sample=args.sample, widths=widths, lr=lr, batch=models.BATCH)
    settings |= dict(seed=models.SEED, epochs=args.epochs, device=args.device.type)
    settings |= dict(activation=str(ACTIVATION))
    folder = args.output / "logs" / "correlation"
    folder /= f"{name}{'-sample' * args.sample}-{args.epochs}epochs"
    # a GPU trains all runs as one stack; what it has made is used anywhere
    one = args.device.type == "cuda" or (folder / f"runs000-{args.runs - 1:03d}.npz").exists()
    size = args.runs if one else RUNS_PER_STACK.get(name, 50)
    parts = [range(args.runs)[first : first + size] for first in range(0, args.runs, size)]
    return {folder / f"runs{runs[0]:03d}-{runs[-1]:03d}.npz": runs for runs in parts}, settings


def logs_of(path, settings, state, args):
    """Return where what is estimated of the stack trained to `state` lies, with its settings."""
    kind, radii = "sphere" if args.sphere else "orthant", list(RADII[settings["dataset"]])
    settings = settings | dict(estimation_batch=ESTIMATION_BATCH)
    settings |= dict(networks=state["test_loss"].tolist())
    own = settings | dict(directions=kind, radii=radii, estimates=ESTIMATES)
    steps = dict(steps=RESCALING_STEPS, length=RESCALING_LENGTH, images=RESCALING_BATCH)
    return {
        "estimates": (path.with_name(f"{path.stem}-{kind}.npz"), own),
        "sweep": (path.with_name(f"{path.stem}-sweep.npz"), settings | dict(radii=list(SWEEP))),
        "rescaled": (path.with_name(f"{path.stem}-{kind}-rescaled.npz"), own | steps),
    }


def compute(args):
    """Do this rank's share of what logs/ lacks; the unit is a stack."""
    units = [(name, path) for name in args.dataset for path in stacks(name, args)[0]]
    share = launch.share_of_rank(units)
    for name in args.dataset:
        paths, settings = stacks(name, args)
        own = {path: runs for path, runs in paths.items() if (name, path) in share}
        data = load_data(name, args) if own else None
        for path, runs in own.items():
            title = f"{TITLES[name]}, runs {runs[0]} to {runs[-1]}"
            with launch.progress_bar(args.epochs, "epoch", f"{title}: training") as bar:
                state = train_stack(data, runs, args.epochs, path, settings, bar)
            logs = logs_of(path, settings, state, args)
            weights = models.from_arrays(state, args.device)
            with launch.progress_bar(args.batches, "batch", f"{title}: φ and ψ") as bar:
                estimate_stack(data, weights, args.batches, args.sphere, *logs["estimates"], bar)
            with launch.progress_bar(SWEEP_BATCHES, "batch", f"{title}: radii") as bar:
                sweep_stack(data, weights, *logs["sweep"], bar)
            if runs[0] == 0:
                with launch.progress_bar(1, "move", f"{title}: rescalings") as bar:
                    rescaled_stack(data, weights, args.sphere, *logs["rescaled"], bar)


def collect(name, args):
    """Return the results of each network, [runs], with their settings and a log they are from."""
    paths, settings = stacks(name, args)
    found, sweep, rescaled = [], [], {}
    for path, runs in paths.items():
        state = files.load_steps(path, settings, args.epochs)
        logs = logs_of(path, settings, state, args)
        estimates = files.load_steps(*logs["estimates"], args.batches)
        means = {key: estimates[key][: args.batches].mean(0, dtype=float) for key in ESTIMATES}
        found.append(state | means)
        sweep.append(files.load_steps(*logs["sweep"], SWEEP_BATCHES)["excess"])
        if runs[0] == 0:
            rescaled = files.load_steps(*logs["rescaled"], 1)
    keys = "train_loss", "test_loss", "test_accuracy", *ESTIMATES
    results = {key: np.concatenate([stack[key] for stack in found]) for key in keys}
    results["excess"] = results["sharpness"] - results["batch_loss"]
    halves = np.concatenate(sweep, -1).reshape(2, -1, 2, len(SWEEP), args.runs).mean(1)
    results |= {"sweep": halves.astype(np.float32), "sweep_radii": SWEEP}
    results |= {f"rescaled_{key}": rescaled[key] for key in ESTIMATES}
    results["training_seconds"] = sum(stack["seconds"].sum() for stack in found)
    made = {key: vars(args)[key] for key in DEFAULTS} | {"radii": list(RADII[name])}
    made["trained_by"] = sorted({str(files.made_with_of(path)["commit"]) for path in paths})
    seeds = {"seed": models.run_seeds(range(args.runs))}
    return settings | made, seeds | results, logs["estimates"][0]


# Statistics


def beyond_chance(r, p, claimed):
    """Return in words what a correlation r shows.

    p: adjusted by Holm's method; claimed: the sign of r that the paper claims, 1 or −1.
    """
    low, high = r["interval"]
    if low <= 0 <= high:
        return "no evidence"
    if p >= 0.05:
        return "not significant (Holm)"
    return "association" if claimed * r["pearson"] > 0 else "association of the opposite sign"


def across_radii(results):
    """Return what φ_t − L says at each radius, {kind: …}, and the partial r of the `least_p`.

    r and partial r are [3, radii] with their intervals' ends. Radii are tested while a network
    `works`: the mean loss is below that of a guess, or as at 0. Reliability is Spearman and
    Brown's, of halves of the batches: the share of the variance that is not noise.
    """
    loss, given = results["test_loss"], results["train_loss"].astype(float)
    t, kinds, tests = results["sweep_radii"], {}, []
    for kind, halves in zip(KINDS, results["sweep"].astype(float).swapaxes(0, 1)):
        excess = halves.mean(0)  # [radii, runs]
        r = [statistics.correlate(row, loss) for row in excess]
        partial = [statistics.partial_correlation(row, loss, given) for row in excess]
        between = np.array([statistics.correlate(*pair)["pearson"] for pair in zip(*halves)])
        works = (excess + given).mean(1) < max(np.log(10), 1.01 * given.mean())
        tests += [{"kind": kind, "radius": t[k]} | partial[k] for k in works.nonzero()[0]]
        kinds[kind] = dict(radius=t, works=works)
        kinds[kind]["reliability"] = (2 * between / (1 + between)).clip(min=0)
        for key, rows in (("r", r), ("partial", partial)):
            kinds[kind][key] = np.array([[e["pearson"], *e["interval"]] for e in rows]).T
    least = min(tests, key=lambda test: test["p"])
    return kinds | {"least_p": least | {"holm": min(1, least["p"] * len(tests))}}


def at_constant_function(results):
    """Return how far rescalings move φ − L and ψ: {quantity: {low, start, high: [RESCALED], …}}.

    `change_of_loss` is the largest relative change of L, by rounding. `spread` is the least and the
    greatest of all networks, and `inside` the share of them that lies inside each one's range.
    Changes (of ψ: factors) are measured on RESCALED_BATCHES batches.
    """
    moved = {key: results[f"rescaled_{key}"].astype(float) for key in ESTIMATES}
    moved["excess"] = moved["sharpness"] - moved["batch_loss"]
    found = {"change_of_loss": abs(moved["batch_loss"] / moved["batch_loss"][0] - 1).max()}
    for key in ("excess", "curvature"):
        values, at = results[key], moved[key]
        start, spread = values[: at.shape[1]], (values.min(), values.max())
        reached = start * at / at[0] if key == "curvature" else start + at - at[0]
        low, high = reached.min(0), reached.max(0)
        inside = ((low <= values[:, None]) & (values[:, None] <= high)).mean(0)
        found[key] = dict(low=low, start=start, high=high, spread=spread, inside=inside)
    return found


def summarise(name, results):
    """Return what summary.json says of a dataset: its correlations and their context."""
    correlate, runs = statistics.correlate, len(results["test_loss"])
    loss, train_loss = (results[key].astype(float) for key in ("test_loss", "train_loss"))
    summary = {
        "runs": runs,
        "test_loss_mean": loss.mean(),
        "test_loss_std": loss.std(ddof=1),
        "test_accuracy_mean": results["test_accuracy"].mean(dtype=float),
        "training_seconds": results["training_seconds"].round(1),
        "sharpness_and_curvature": correlate(results["sharpness"], results["curvature"]),
        "sharpness_and_train_loss": correlate(results["sharpness"], train_loss),
        "exact_and_closed": correlate(results["exact_curvature"], results["curvature"])
        | {"ratio": (results["exact_curvature"] / results["curvature"]).mean()},
        "radii": across_radii(results),
        "rescaled": at_constant_function(results),
    }
    for quantity in QUANTITIES:
        gap = correlate(results[quantity], loss - train_loss)
        summary[quantity] = correlate(results[quantity], loss) | {"gap": gap}
    for quantity in CLAIMED:
        given = statistics.partial_correlation(results[quantity], loss, train_loss)
        summary[quantity]["given_train_loss"] = given
    for quantity, published in PUBLISHED_R.items():
        r = published.get(name, np.nan)
        p = statistics.p_of_difference(summary[quantity]["pearson"], runs, r, DEFAULTS["runs"])
        summary[quantity] |= {"published": r, "published_p": p}
    return summary


def verdicts(entry, adjusted):
    """Return {claim: verdict} for a dataset; adjusted: Holm's p of the partial r of CLAIMED."""
    low, high = entry["curvature"]["interval"]
    same = entry["sharpness"]["published_p"] >= 0.05
    phi = "reproduced (the number)" if same else "not reproduced"
    psi = "compatible" if low <= entry["curvature"]["published"] <= high else "not compatible"
    if np.isnan(entry["sharpness"]["published"]):
        phi = psi = "none"
    given = {q: entry[q]["given_train_loss"] for q in CLAIMED}
    beyond = {q: beyond_chance(given[q], adjusted[q], sign) for q, sign in CLAIMED.items()}
    least = entry["radii"]["least_p"]
    where = "{pearson:.2f} at t = {radius:.2g}, {kind}; Holm's p = {holm:.2g}".format(**least)
    shares = [entry["rescaled"][key]["inside"] for key in ("excess", "curvature")]
    inside = "; ".join(f"{100 * s.mean():.0f} % (least: {100 * s.min():.0f} %)" for s in shares)
    return {
        "φ: the published r": phi,
        "sharper minima generalise worse, given the loss": beyond["excess"],
        "the same at any radius": f"{beyond_chance(least, least['holm'], 1)} ({where})",
        "ψ: the published r": f"{psi}; {beyond_chance(entry['curvature'], 0, -1)}",
        "more curved minima generalise better, given the loss": beyond["curvature"],
        "the same by the exact γ″": beyond["exact_curvature"],
        "networks inside the range of one that is rescaled: φ − L; ψ": inside,
    }


def table(summaries):
    """Return Table 1 as Markdown, beside the published numbers, and what it is evidence of."""
    r = "{pearson:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"
    entries, family = list(summaries.values()), [(n, q) for n in summaries for q in CLAIMED]
    p = statistics.holm([summaries[n][q]["given_train_loss"]["p"] for n, q in family])
    holm = dict(zip(family, p))
    rows = []
    for q, symbol in QUANTITIES.items():
        rows.append([f"{symbol}: r with the test loss", *(r.format(**e[q]) for e in entries)])
        if q in PUBLISHED_R:
            cells = (f"{e[q]['published']:.3f} ({e[q]['published_p']:.2g})" for e in entries)
            rows.append([f"{symbol}: published r (p of the difference)", *cells])
    with_p = f"{r}, p = {{p:.2g}} ({{holm:.2g}})"
    for q in CLAIMED:
        given = {name: entry[q]["given_train_loss"] for name, entry in summaries.items()}
        cells = (with_p.format(**e, holm=holm[name, q]) for name, e in given.items())
        rows.append([f"{QUANTITIES[q]}: partial r given the training loss, p (Holm's)", *cells])
    for q, symbol in QUANTITIES.items():
        rows.append([f"{symbol}: r with the gap", *(r.format(**e[q]["gap"]) for e in entries)])
    pairs = [("φ with the training loss: r", "sharpness_and_train_loss")]
    pairs += [("ψ by the exact γ″ with ψ: r", "exact_and_closed")]
    rows += [[label, *(r.format(**e[key]) for e in entries)] for label, key in pairs]
    found = [verdicts(e, {q: holm[name, q] for q in CLAIMED}) for name, e in summaries.items()]
    rows += [[f"**{claim}**", *(each[claim] for each in found)] for claim in found[0]]
    header = ["r is Pearson's [95 % interval]", *(TITLES[name] for name in summaries)]
    return f"{plots.markdown(header, rows)}\n{caption(entries[0]['settings'], len(family))}.\n"


def caption(made, tests):
    """Return what stands below the table; tests: how many are in Holm's family."""
    text = "{runs} networks, {epochs} epochs, {batches} batches".format(**made)
    text += f", directions on the {'sphere' if made['sphere'] else 'positive orthant'}"
    text += "; on the sample of 1,000 images, not on the paper's data" * made["sample"]
    text += ". L: the loss on φ's batches; gap: test loss − training loss. Holm's correction: over "
    return f"{text}the {tests} partial correlations, and over the radii of a dataset"


# Figures


def scatter(a, b, r, labels, title, path):
    """Draw a scatter plot of two arrays [runs], which correlate with r, and their line."""
    axes = Figure(figsize=(4, 3.2)).add_subplot(xlabel=labels[0], ylabel=labels[1], title=title)
    axes.scatter(a, b, s=12, alpha=0.7, linewidths=0)
    ends = np.array([a.min(), a.max()])
    axes.plot(ends, np.polyval(np.polyfit(a, b, 1), ends), color="black", label=f"r = {r:.3f}")
    axes.legend()
    plots.save_figure(axes.figure, path)


def draw_radii(name, radii, path):
    """Draw r and partial r of φ_t − L with the test loss against t; radii: of `across_radii`."""
    figure = Figure(figsize=(8.4, 3.4))
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), KINDS):
        found, published = radii[kind], RADII[name]
        t = found["radius"]
        axes.axvspan(published[0], published[-1], color=plots.GREY, alpha=0.15, lw=0)
        axes.axhline(0, color="black", lw=0.6)
        style = {"color": plots.BLUE, "label": "r", "marker": "."}
        plots.plot_with_band(axes, t, *found["r"], **style)
        style |= {"color": plots.RED, "label": "partial r given the training loss"}
        plots.plot_with_band(axes, t, *found["partial"], **style)
        axes.plot(t, found["reliability"], ":", color=plots.GREY, label=r"reliability of $φ_t - L$")
        for broken in t[~found["works"]][:1]:
            axes.axvline(broken, color="black", ls="--", label="the mean loss is that of a guess")
        axes.set(xscale="log", ylim=(-1, 1), xlabel="radius t", title=f"{TITLES[name]}, {kind}")
    figure.axes[0].set_ylabel("correlation of $φ_t - L$\nwith the test loss")
    plots.legend_beside(figure.axes[1])
    figure.tight_layout()
    plots.save_figure(figure, path)


def draw_rescalings(name, results, rescaled, path):
    """Draw how far φ − L and ψ move at constant function, beside all networks' values."""
    figure = Figure(figsize=(7, 2.8))
    for axes, key in zip(figure.subplots(1, 2), ("excess", "curvature")):
        found = rescaled[key]
        x = np.arange(len(found["start"])) + 1
        axes.axhspan(*found["spread"], color=plots.GREY, alpha=0.3, lw=0)
        axes.scatter(np.zeros_like(results[key]), results[key], s=6, color="black", alpha=0.3)
        axes.vlines(x, found["low"], found["high"], color=plots.BLUE)
        axes.scatter(x, found["start"], s=12, color=plots.BLUE)
        if key == "curvature":
            axes.set_yscale("log")
        else:  # of both signs
            axes.set_yscale("symlog", linthresh=np.ptp(found["spread"]), linscale=2)
        axes.set_xticks([0, *x], ["all", *x])
        axes.set(title=f"{TITLES[name]}: {QUANTITIES[key]}", xlabel="network")
    figure.tight_layout()
    plots.save_figure(figure, path)


def draw(name, results, summary, folder):
    """Draw a dataset's Figure 9 (test loss), Figure 10 (ψ against φ), radii, and rescalings."""
    labels = {"test_loss": "test loss", "sharpness": "sharpness φ", "curvature": "curvature ψ"}
    for a, b, key in (
        ("curvature", "test_loss", "curvature"),
        ("sharpness", "test_loss", "sharpness"),
        ("sharpness", "curvature", "sharpness_and_curvature"),
    ):
        r, path = summary[key]["pearson"], folder / f"{name}_{b}_vs_{a}"
        scatter(results[a], results[b], r, (labels[a], labels[b]), TITLES[name], path)
    draw_radii(name, summary["radii"], folder / f"{name}_radii")
    draw_rescalings(name, results, summary["rescaled"], folder / f"{name}_rescalings")


# Options


def parse_arguments():
    parser = launch.experiment_parser(__doc__)
    add, count = parser.add_argument, launch.at_least
    names = list(PUBLISHED_R["sharpness"])
    add("--dataset", nargs="+", choices=models.TRAINING, default=names, help="which datasets")
    add("--runs", type=count(4), default=DEFAULTS["runs"], help="networks per dataset, at least 4")
    add("--epochs", type=count(1), default=DEFAULTS["epochs"], help="passes over the images")
    batches = f"batches of {ESTIMATION_BATCH} images that φ and ψ are estimated on (default: "
    batches += f"{DEFAULTS['batches']}; {SAMPLE_DEFAULTS['batches']} with --sample)"
    add("--batches", type=count(1), help=batches)
    add("--sphere", action="store_true", help="draw φ's directions on the sphere, not the orthant")
    args = parser.parse_args()
    args.defaults = SAMPLE_DEFAULTS if args.sample else DEFAULTS
    args.batches = args.batches or args.defaults["batches"]
    return args


def main():
    args = parse_arguments()
    if unknown := set(args.dataset) - RADII.keys():
        raise files.UserError(f"teleportation.py has no RADII for {', '.join(unknown)}.")
    folder = launch.figures_folder(args, "correlation", args.defaults)
    parts = models.TRAINING, args.dataset
    launch.compute_and_report(args, folder, *parts, compute, collect, summarise, table, draw)


if __name__ == "__main__":
    launch.run(main)
