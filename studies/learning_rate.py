"""Study: what is a teleport worth, as a factor of the learning rate?

    python studies/learning_rate.py                            # MNIST, all optimizers
    python studies/learning_rate.py --dataset FashionMNIST
    python studies/learning_rate.py --sample                   # on the 1,000 images that ship

Plain training at learning rates from 0.8 to 3 times the published one stands beside arms that
teleport at the published one, from the same initial weights. The *worth* of an arm after an epoch
is the factor at which plain training has the arm's mean loss, by linear interpolation in the
logarithm of the factor. It is undefined outside of these factors, and where plain's loss hardly
depends on them: where it is not to be found in one of twenty resamples of the runs.

Arms: kept, teleport and reset of teleport_optimization.py, and rescalings that together double
|∇L|² and keep the network's function. The primary comparison, named beforehand, is made after epoch
10, with momentum and with Adam on MNIST: the test loss of *kept* less that of plain at the worth
that *kept* had after epoch 5. Does one factor explain the whole curve? All else is exploratory.

Training goes to logs/learning_rate/; an interrupted run resumes from there with the same numbers.
The curves of each arm and run go to figures/learning_rate/<dataset>/<optimizer>.npz.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from matplotlib.figure import Figure

import teleport_optimization as script
import teleports
from data import TITLES
from experiment import plots, results, run

FACTORS = 0.8, 0.9, 1.0, 1.05, 1.1, 1.2, 1.5, 2.0, 3.0  # of the published learning rate
PLAIN = {f"plain × {factor:g}": factor for factor in FACTORS}
MOVING = {
    "kept": script.ARMS["kept"],
    "teleport": script.ARMS["teleport"],
    "reset": script.ARMS["reset"],
    "rescaling × 2": script.Arm(partial(teleports.rescale, factor=2), new_optimizer=False),
}
ARMS = dict.fromkeys(PLAIN, script.ARMS["plain"]) | MOVING
EPOCHS_SHOWN = 1, 5, 10, 40
REFERENCE = 5  # the epoch whose worth is tried on the others
RESAMPLES, SEED = 2000, 0  # of the bootstrap over runs
MOST_UNDEFINED = 0.05  # share of resamples without a worth, above which it is undefined
COLORS = dict(zip(MOVING, (plots.GREEN, plots.BLUE, plots.ORANGE, plots.PURPLE)))
LOSSES = "test_loss", "train_loss"


# Computation


def with_factors(optimizer, factors, parameters, lr):
    """Return an optimizer for stacks [arms, …], with the learning rate factor · lr in each arm.

    The updates of the elementwise optimizers of torch.optim are proportional to the learning rate,
    so they are scaled after each step. At factor 1 the weights are the same to the last bit.
    """
    weights = list(parameters)
    optimizer = optimizer(weights, lr)
    before = [torch.empty_like(w, requires_grad=False) for w in weights]
    scale = weights[0].new_tensor(factors)[:, None, None, None]

    def remember(*_):
        torch._foreach_copy_(before, weights)

    def stretch(*_):
        for old, w in zip(before, weights):
            torch.lerp(old, w, scale, out=w)

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(stretch)
    return optimizer


def training_log(optimizer, arms, args):
    """Return the Log of a stack: some of the ARMS, by name, with an optimizer."""
    path, settings, code = script.training_log(optimizer, script.OPTIMIZERS[optimizer], arms, args)
    settings |= {"factors": FACTORS, "rescaling": [teleports.LENGTH, teleports.RESCALING_STEPS]}
    path = path.parents[2] / "learning_rate" / path.parent.name / f"{optimizer}-{arms[-1]}.npz"
    return results.Log(path, settings, (*code, teleports.__file__, __file__))


def train(log, args, bar):
    """Train the stack of a Log."""
    setting = script.OPTIMIZERS[log.settings["optimizer"]]
    arms = {name: ARMS[name] for name in log.settings["arms"]}
    factors = [PLAIN.get(name, 1.0) for name in arms]
    if set(factors) != {1.0}:
        setting = setting._replace(optimizer=partial(with_factors, setting.optimizer, factors))
    script.train_arms(log, setting, arms, args, bar)


# Statistics


def factor_of(loss, plain, factors):
    """Return the factor nearest to 1 at which plain's loss is `loss`, [...]; nan where none is.

    plain: [..., factors], interpolated linearly in the logarithm of the factor.
    """
    x, d = np.log(factors), plain - loss[..., None]
    with np.errstate(divide="ignore", invalid="ignore"):
        crossing = x[:-1] + np.diff(x) * d[..., :-1] / (d[..., :-1] - d[..., 1:])
        crosses = (d[..., :-1] * d[..., 1:] <= 0) & np.isfinite(crossing)
    distance = np.where(crosses, abs(crossing), np.inf)
    nearest = distance.argmin(-1)[..., None]
    chosen = np.take_along_axis(crossing, nearest, -1)[..., 0]
    return np.exp(np.where(crosses.any(-1), chosen, np.nan))


def plain_at(factor, plain, factors):
    """Return plain's loss [n, epochs] at factors [n], interpolated as in `factor_of`.

    plain: [n, epochs, factors].
    """
    x, log_factor = np.log(factors), np.log(factor)
    k = np.clip(np.searchsorted(x, log_factor) - 1, 0, len(x) - 2)
    share = ((log_factor - x[k]) / (x[k + 1] - x[k]))[:, None]
    below, above = (np.take_along_axis(plain, i[:, None, None], -1)[..., 0] for i in (k, k + 1))
    return (1 - share) * below + share * above


def resampled_means(loss):
    """Return the means [1 + RESAMPLES, …] over all runs, and over resampled runs, of [runs, …]."""
    runs = len(loss)
    counts = np.random.default_rng(SEED).multinomial(runs, np.full(runs, 1 / runs), RESAMPLES)
    weights = np.vstack([np.ones(runs), counts]) / runs
    return np.tensordot(weights, loss, 1)


def interval(values):
    """Return the first of values [1 + RESAMPLES, epochs], and the 95 % interval of the others.

    All are nan after an epoch after which the first, or too many of the others, are.
    """
    value, others = values[0], values[1:]
    undefined = np.isnan(value) | (np.isnan(others).mean(0) > MOST_UNDEFINED)
    low, high = np.nanquantile(np.where(undefined, 0.0, others), (0.025, 0.975), axis=0)
    columns = {"mean": value, "low": low, "high": high}
    return {key: np.where(undefined, np.nan, column) for key, column in columns.items()}


def compare_with_rates(loss, plain, factors, reference):
    """Return the worth of an arm after each epoch, and what one factor leaves over.

    loss: [epochs, runs]; plain: [factors, epochs, runs], of the same initial weights. Each has its
    bootstrap interval over runs: {"worth" or "left_over": {"mean", "low" or "high": [epochs]}}.
    `left_over` is the loss less plain's at the arm's worth after the epoch with index `reference`,
    which each resample finds anew.
    """
    loss, plain = resampled_means(loss.T), resampled_means(plain.T)  # [n, epochs (, factors)]
    worths = factor_of(loss, plain, factors)
    left_over = loss - plain_at(worths[:, reference], plain, factors)
    return {"worth": interval(worths), "left_over": interval(left_over)}


def log_growth(moves):
    """Return the logarithm of the factor by which all moves of an arm together raise |∇L|².

    moves: [moves, 4, runs], as `script.move_arms` measures them, nan if the arm has none. The
    logarithm is a mean over runs.
    """
    growth = np.log(moves[:, 3] / moves[:, 1], dtype=float)
    return np.nan_to_num(growth).mean(-1).sum()


def summarise(arrays):
    """Return for each arm, by each of the LOSSES, its worth and what one factor leaves over.

    `predicted` is the worth that η|∇L|² predicts: the growth of |∇L|².
    """
    moves = script.by_arm(arrays, "moves")
    summary = {name: {"predicted": np.exp(log_growth(moves[name]))} for name in MOVING}
    for key in LOSSES:
        loss = {n: a.astype(float) for n, a in script.by_arm(arrays, key).items()}
        plain = np.stack([loss[name] for name in PLAIN])
        reference = min(REFERENCE, plain.shape[1]) - 1
        for name in MOVING:
            summary[name][key] = compare_with_rates(loss[name], plain, FACTORS, reference)
    return summary


def after(columns, epoch):
    """Return the entries of columns {key: [epochs]} after an epoch."""
    return {key: column[epoch - 1] for key, column in columns.items()}


def worth_text(worth):
    """Return a worth with its interval as text."""
    if np.isnan(worth["mean"]):
        return "undefined"
    return "{mean:.2f} [{low:.2f}, {high:.2f}]".format(**worth)


def table(dataset, summaries):
    """Return the worths, and what one factor leaves over, as Markdown."""
    entries = {f"{name}, {arm}": e for name, arms in summaries.items() for arm, e in arms.items()}
    epochs = max(len(entry["test_loss"]["worth"]["mean"]) for entry in entries.values())
    shown = sorted({min(epoch, epochs) for epoch in EPOCHS_SHOWN})
    reference = min(REFERENCE, epochs)
    others = [epoch for epoch in shown if epoch != reference]
    worths, rest = [], []
    for label, entry in entries.items():
        columns = [after(entry[key]["worth"], epoch) for key in LOSSES for epoch in shown]
        worths.append([label, *map(worth_text, columns), f"{entry['predicted']:.2f}"])
        columns = [after(entry[key]["left_over"], epoch) for key in LOSSES for epoch in others]
        rest.append([label, *map(plots.difference_text, columns)])
    titles = [f"{kind} loss, epoch {{}}" for kind in ("test", "training")]
    header = [f"{TITLES[dataset]}: worth", *(t.format(e) for t in titles for e in shown)]
    left_over = f"arm − plain × its worth after epoch {reference}"
    return f"""{plots.markdown([*header, "predicted"], worths)}
The worth is a factor of the learning rate, with a 95 % interval by bootstrap over runs. Predicted
is the growth of |∇L|² by all moves.

{plots.markdown([left_over, *(t.format(e) for t in titles for e in others)], rest)}
Differences are in 10⁻³, with 95 % intervals by bootstrap over runs; there is none where the worth
is undefined. The comparisons named beforehand are those of the test loss of *kept* with momentum
and with Adam on MNIST, after epoch 10; the others are exploratory.
"""


# Figures


def draw_worth(path, dataset, summaries):
    """Draw the worth of each arm against the epoch, a panel for each optimizer."""
    figure = Figure(figsize=(1 + 2.6 * len(summaries), 3.4), layout="constrained")
    axes = figure.subplots(1, len(summaries), sharex=True, sharey=True, squeeze=False)[0]
    for ax, (optimizer, summary) in zip(axes, summaries.items()):
        ax.axhline(1, color=plots.BLACK, lw=0.8)
        for arm, entry in summary.items():
            worth = entry["test_loss"]["worth"]
            epochs = 1 + np.arange(len(worth["mean"]))
            plots.plot_with_band(ax, epochs, **worth, color=COLORS[arm], label=arm)
        ax.set(title=f"{TITLES[dataset]}, {optimizer}", xlabel="epoch")
    axes[0].set_ylabel("worth: factor of the learning rate")
    plots.legend_below(figure, axes[0])
    plots.save_figure(figure, path)


def draw_predictions(path, dataset, summaries):
    """Draw the worth after epoch REFERENCE against the growth of |∇L|², which predicts it."""
    figure = Figure(figsize=(5.6, 4), layout="constrained")
    ax = figure.add_subplot(xlabel="predicted: growth of |∇L|²", ylabel="worth")
    for marker, (optimizer, summary) in zip(plots.MARKERS, summaries.items()):
        for arm, entry in summary.items():
            worth = entry["test_loss"]["worth"]
            worth = after(worth, min(REFERENCE, len(worth["mean"])))
            x, style = entry["predicted"], {"color": COLORS[arm], "marker": marker, "ls": ""}
            ax.plot([x, x], [worth["low"], worth["high"]], color=COLORS[arm], lw=1)
            ax.plot(x, worth["mean"], label=f"{optimizer}, {arm}", **style)
    ax.axline((1, 1), (2, 2), color=plots.GREY, lw=0.8)
    ax.set_title(f"{TITLES[dataset]}, after epoch {REFERENCE}")
    figure.legend(loc="outside right center", fontsize="x-small")
    plots.save_figure(figure, path)


# The script


def parse_arguments():
    return script.parse_arguments(run.experiment_parser(__doc__))


def main():
    args = parse_arguments()
    folder = run.figures_folder(args, script.DEFAULTS) / "learning_rate" / args.dataset
    if not args.plot_only:
        stacks = script.split(ARMS)
        logs = {
            name: [training_log(name, arms, args) for arms in stacks] for name in args.optimizer
        }
        script.compute(train, logs, args, folder)

    saved = results.read_all(folder, script.OPTIMIZERS, required=args.optimizer)
    summaries = {name: summarise(result.arrays) for name, result in saved.items()}
    results.save_summaries(folder / "summary.json", saved, summaries)
    text = table(args.dataset, summaries)
    results.save_text(folder / "table.md", text)
    draw_worth(folder / "worth", args.dataset, summaries)
    draw_predictions(folder / "predicted", args.dataset, summaries)
    print(f"\n{text}\nFigures, table and the curves of each run: {folder}")


if __name__ == "__main__":
    run.run(main)
