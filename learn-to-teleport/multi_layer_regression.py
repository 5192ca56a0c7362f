"""Figure 6: do LSTMs that learn to teleport minimise two-layer regressions faster?

    python learn-to-teleport/multi_layer_regression.py            # 100 minutes on two cores
    python learn-to-teleport/multi_layer_regression.py --quick    # a few minutes

The paper's methods are gradient descent (GD), and LSTMs whose outputs are the step size (lr), the
update of all weights, or the group element (tele). Beside them: LSTM(lr) without teleports,
LSTM(update) trained on as many trajectories as LSTM(update,tele), LSTMs that read scaled gradients,
and GD with the best step size. Training goes to logs/learn-to-teleport/; an interrupted run resumes
from there.
"""

import sys
from functools import partial
from pathlib import Path
from timeit import repeat
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats

sys.path.append(str(Path(__file__).resolve().parents[1]))

import lstm
import models
import regression
from experiment import plots, results, run
from regression import LearnedOptimizer, Network, draw_problem, rollout

CODE = __file__, lstm.__file__, regression.__file__
SEEDS = 10  # initialisations, with the published seeds of runs
TRAINING_SEEDS = [n * n * 12345 - 1 for n in range(700)]
TEST_SEEDS = [n * n * 12345 for n in range(5)] + models.run_seeds(range(100))
PUBLISHED, FRESH = slice(5), slice(5, None)  # among them
STEPS = [*range(31), 100]  # of the tests, that are kept
STEPS_SHOWN, CLAIMED_STEP = (10, 30, 100), 30
SAVE_EVERY, QUICK = 50, 100  # trajectories; --quick trains on so many times fewer
GD_LR, GD_LRS = 3e-4, np.logspace(-6, -2, 81)  # GD (tuned) has the best of these


class Training(NamedTuple):
    """LSTMs, and the methods that they are after so many trajectories of training."""

    networks: tuple
    steps: int  # of each trajectory
    methods: dict  # {name: number of trajectories}
    scaled: bool = False  # whether gradients are, by `regression.sign_and_log`
    initialisation: int = 0

    @property
    def trajectories(self):
        return max(self.methods.values())


LR, UPDATE = Network(("lr",), 20, 1e-4), Network(("update",), 300, 1e-3)
LR_AND_T, T = Network(("lr", "T"), 20, 1e-4), Network(("T",), 300, 1e-4)
TRAININGS = [
    Training((LR,), 300, {"LSTM(lr)": 30}),
    Training((LR_AND_T,), 300, {"LSTM(lr,tele)": 30}),
    Training((UPDATE,), 100, {"LSTM(update)": 600, "LSTM(update), 700": 700}),
    Training((UPDATE, T), 100, {"LSTM(update,tele)": 700}),
]
SCALED = {method: f"{method}, scaled" for t in TRAININGS for method in t.methods}
TRAININGS += [
    t._replace(methods={SCALED[method]: n for method, n in t.methods.items()}, scaled=True)
    for t in TRAININGS
]

PAPER = "GD", "LSTM(lr,tele)", "LSTM(update)", "LSTM(update,tele)"
METHODS = "GD", "GD (tuned)", *SCALED, *SCALED.values()
COLORS = plots.BLACK, plots.GREY, plots.SKY, plots.GREEN, plots.ORANGE, plots.PURPLE, plots.RED
TELEPORTS = [  # pairs of methods, with and without teleporting
    ("LSTM(lr,tele)", "LSTM(lr)"),
    ("LSTM(update,tele)", "LSTM(update)"),
    ("LSTM(update,tele)", "LSTM(update), 700"),
]
PAIRS = TELEPORTS + [(SCALED[a], SCALED[b]) for a, b in TELEPORTS]  # whose losses are compared
PAIRS += [(scaled, method) for method, scaled in SCALED.items()]
PAIRS += [(method, "GD (tuned)") for method in METHODS[2:]]


# Computation


def trainings(args):
    """Return all trainings, each from one initialisation: the tasks."""
    share = QUICK if args.quick else 1
    return [
        t._replace(methods={m: -(-n // share) for m, n in t.methods.items()}, initialisation=i)
        for t in TRAININGS
        for i in range(args.seeds)
    ]


def log_of(training, args):
    """Return the Log of a training."""
    settings = training._asdict() | {
        "seed": models.run_seeds([training.initialisation])[0],
        "unroll": regression.UNROLL,
        "ranges": regression.RANGES,
        "tests": [TEST_SEEDS, STEPS],
        "device": "cpu",
    }
    outputs = [name for network in training.networks for name in network.outputs]
    name = "-".join([*outputs, *["scaled"] * training.scaled, str(training.initialisation)])
    folder = args.output / "logs" / f"learn-to-teleport{'-quick' * args.quick}"
    return results.Log(folder / f"{name}.npz", settings, CODE)


def gradient_descent(lr):
    """Return GD for `rollout`; lr: a number, or a tensor that broadcasts over the weights."""
    return lambda t, w, gradient: w - lr * gradient


def tuned_step_size():
    """Return GD's step size with the least median loss on the first 30 training trajectories."""
    problem = draw_problem(TRAINING_SEEDS[:30])
    problem = problem._replace(w=problem.w.expand(len(GD_LRS), *problem.w.shape))
    lrs = torch.tensor(GD_LRS, dtype=torch.float32).view(-1, 1, 1, 1, 1)
    loss = rollout(gradient_descent(lrs), problem, CLAIMED_STEP)[0][-1]
    return float(GD_LRS[loss.nan_to_num(np.inf).median(1).values.argmin()])


def test(method, optimizer, problem):
    """Return a method's loss [STEPS, TEST_SEEDS], and |∇L|² on the published five problems."""
    loss, norm = rollout(optimizer, problem, STEPS[-1])
    return {f"{method}: loss": loss[STEPS], f"{method}: squared_gradient": norm[STEPS, :5]}


def train(training, args, bar):
    """Train LSTMs from one initialisation; resumes from logs/.

    Saves their parameters, Adam's state until the end, and what `test` returns for each method.
    """
    log = log_of(training, args)
    lstms, adam = regression.new_training(training.networks, training.scaled, log.settings["seed"])
    if saved := results.load(log):
        lstms.load_state_dict({key: torch.tensor(saved.arrays[key]) for key in lstms.state_dict()})
        models.optimizer_from_arrays(adam, saved.arrays)

    def step(state):
        n, tested = int(state["steps"]), {key: state[key] for key in state if ": " in key}
        problem = draw_problem(TRAINING_SEEDS[n])
        loss = regression.train_trajectory(lstms, adam, problem, training.steps)
        models.warn_if_not_finite(f"{log.path.stem}: the loss in training", loss)
        for method, trajectories in training.methods.items():
            if trajectories == n + 1:
                problem = draw_problem(TEST_SEEDS)
                tested |= test(method, LearnedOptimizer(lstms.eval(), problem), problem)
        end = n + 1 == training.trajectories
        return lstms.state_dict() | tested | ({} if end else models.optimizer_to_arrays(adam))

    results.resume(log, dict, step, training.trajectories, bar, SAVE_EVERY)


def collect(args):
    """Return the Result of all methods: arrays of each, and the step size of GD (tuned).

    The arrays are those that `test` returns, [initialisations, ...], and the seconds of a step.
    """
    lr, problem = tuned_step_size(), draw_problem(models.SEED)
    optimizers = {"GD": gradient_descent(GD_LR), "GD (tuned)": gradient_descent(lr)}
    tested = {m: [test(m, gd, draw_problem(TEST_SEEDS))] for m, gd in optimizers.items()}
    for training in trainings(args):
        result = results.load(log_of(training, args), training.trajectories)
        lstms, _ = regression.new_training(training.networks, training.scaled, models.SEED)
        for method in training.methods:
            tested.setdefault(method, []).append(result.arrays)
            optimizers[method] = LearnedOptimizer(lstms.eval(), problem)
    arrays = {"gd_tuned_lr": lr}
    for method, states in tested.items():
        for key in (f"{method}: loss", f"{method}: squared_gradient"):
            arrays[key] = np.stack([state[key] for state in states])
        times = repeat(partial(rollout, optimizers[method], problem, 30), number=1, repeat=5)
        arrays[f"{method}: seconds_a_step"] = min(times) / 30
    settings = {"trainings": TRAININGS, "initialisations": args.seeds, "quick": args.quick}
    return results.Result(arrays, settings, result.made_with)


# Statistics


def median_of_few(values):
    """Return the median of values: [runs], with its exact interval, that of the sign test.

    Infinite values count as larger than all others; of fewer than six runs the interval is nan.
    """
    low, high = stats.quantile_test(values, p=0.5).confidence_interval(0.95)
    return {"median": np.median(values), "low": low, "high": high}


def compare(a, b):
    """Return the ratio of the losses of two methods, a and b: [initialisations, trajectories].

    The ratio `of_each` initialisation is the median over trajectories, which a and b share; the
    result has its median, too, and the sign test's p of a median of 1. Two infinite losses are
    equal. b may have one initialisation for all of a's.
    """
    with np.errstate(invalid="ignore"):
        ratio = np.median(np.where(np.isinf(a) & np.isinf(b), 1, a / b), axis=1)
    p = stats.quantile_test(ratio, q=1, p=0.5).pvalue
    return median_of_few(ratio) | {"p": p, "of_each": ratio}


def summarise(arrays):
    """Return each method's losses on the fresh trajectories, and the ratios of losses of PAIRS."""
    methods, claimed = {}, {}
    for method in METHODS:  # GD comes first
        loss = arrays[f"{method}: loss"][:, :, FRESH].astype(float)
        loss = np.nan_to_num(loss, nan=np.inf, posinf=np.inf)
        claimed[method] = loss[:, STEPS.index(CLAIMED_STEP)]
        medians = {step: np.median(loss[:, STEPS.index(step)], 1) for step in STEPS_SHOWN}
        worse_than_gd = np.median(claimed[method], 1) > np.median(claimed["GD"])
        methods[method] = {
            "loss_at_step": {step: median_of_few(values) for step, values in medians.items()},
            "trajectories": loss[:, 0].size,
            "trajectories_that_diverge": int((loss[:, -1] >= loss[:, 0]).sum()),
            "initialisations_worse_than_gd": int(worse_than_gd.sum()),
            "seconds_a_step": float(arrays[f"{method}: seconds_a_step"]),
        }
    ratios = {f"{a} / {b}": compare(claimed[a], claimed[b]) for a, b in PAIRS}
    return {"gd_tuned_lr": arrays["gd_tuned_lr"], "methods": methods, "ratios": ratios}


def number_text(value, digits=3):
    """Return a number as text, with so many significant digits."""
    return f"{value:.{digits}g}".replace("inf", "∞")


def median_text(values):
    """Return a `median_of_few` as text; without its interval where there are too few runs."""
    median, low, high = (number_text(values[key]) for key in ("median", "low", "high"))
    return median if low == "nan" else f"{median} [{low}, {high}]"


def loss_table(methods):
    """Return the losses of methods, {name: summary}, as Markdown."""
    rows = [
        [method, *map(median_text, entry["loss_at_step"].values())]
        + ["{trajectories_that_diverge} of {trajectories}".format(**entry)]
        + [str(entry["initialisations_worse_than_gd"]), f"{1e3 * entry['seconds_a_step']:.2g}"]
        for method, entry in methods.items()
    ]
    header = ["fresh trajectories", *(f"loss, step {step}" for step in STEPS_SHOWN)]
    header += ["diverge", "initialisations worse than GD", "ms a step"]
    return plots.markdown(header, rows)


def ratio_table(ratios):
    """Return ratios, {pair: what `compare` returns}, as Markdown."""
    rows = [
        [pair, median_text(r), number_text(r["p"], 2)]
        + [", ".join(number_text(ratio, 4) for ratio in r["of_each"])]
        for pair, r in ratios.items()
    ]
    header = [f"loss, step {CLAIMED_STEP}", "ratio", "p", "by initialisation"]
    caption = "Medians over initialisations of the median over fresh trajectories, with exact 95 % "
    caption += "intervals; p: sign test. A trajectory diverges if it ends no lower than it began.\n"
    return f"{plots.markdown(header, rows)}\n{caption}"


# Figures


def draw(path, arrays, colors, pdf=False):
    """Draw loss against epoch and time, and |∇L|² against loss, on the published trajectories.

    colors: {method: color}. Lines are means over the runs that stay finite. Bands are a standard
    deviation wide, and cut at the lowest loss.
    """
    figure = Figure(figsize=(12, 4), layout="constrained")
    by_epoch, by_time, gradient = figure.subplots(1, 3)
    epochs = np.arange(31)
    for k, (method, color) in enumerate(colors.items()):
        loss = np.concatenate(arrays[f"{method}: loss"][:, :31, PUBLISHED], -1)
        norm = np.concatenate(arrays[f"{method}: squared_gradient"][:, :31], -1)
        finite = np.isfinite(loss).all(0)
        failures = f", {(~finite).sum()} of {finite.size} not finite" if not finite.all() else ""
        mean, deviation = loss[:, finite].mean(1, float), loss[:, finite].std(1, float)
        band = np.maximum(mean - deviation, loss[:, finite].min(1)), mean + deviation
        style = {"color": color, "ls": "-" if k % 2 else "--", "label": f"{method}{failures}"}
        ms = 1e3 * arrays[f"{method}: seconds_a_step"] * epochs
        plots.plot_with_band(by_epoch, epochs, mean, *band, **style)
        plots.plot_with_band(by_time, ms, mean, *band, **style)
        gradient.plot(mean, norm[:, finite].mean(1, float), marker=".", lw=1, **style)
    by_epoch.set(xlabel="epoch", ylabel="loss", yscale="log")
    by_time.set(xlabel="time (ms)", ylabel="loss", yscale="log")
    gradient.set(xlabel="loss", ylabel="|∇L|²", yscale="log", xscale="log")
    plots.legend_below(figure, by_epoch)
    plots.save_figure(figure, path, pdf)


# The script


def parse_arguments():
    parser = run.experiment_parser(__doc__, on_images=False)
    add, number = parser.add_argument, run.whole_number
    add("--seeds", type=number(1), default=SEEDS, help="initialisations of each method")
    add("--quick", action="store_true", help="train each LSTM on 1 to 7 trajectories")
    add("--processes", type=number(1), default=run.cores(), help="worker processes")
    return parser.parse_args()


def main():
    args = parse_arguments()
    defaults = {"quick": False, "seeds": SEEDS}
    folder = run.figures_folder(args, defaults, "learn-to-teleport/figures")
    if not args.plot_only:
        results.check_writable(folder)
        tasks = trainings(args)
        results.warn_of_other_code([log_of(task, args) for task in tasks])
        run.run_tasks(train, tasks, args, [task.trajectories for task in tasks], "trajectory")
        results.save(folder / "results.npz", collect(args))

    result = results.read_all(folder, ["results"], ["results"])["results"]
    summary = summarise(result.arrays)
    methods, ratios = summary["methods"], summary["ratios"]
    about = {"settings": result.settings, "made_with": result.made_with}
    results.save_json(folder / "summary.json", about | summary)
    results.save_text(folder / "table.md", f"{loss_table(methods)}\n{ratio_table(ratios)}")
    colors = dict(zip(METHODS, COLORS))
    scaled = {SCALED.get(method, method): color for method, color in colors.items()}
    draw(folder / "figure_6", result.arrays, {m: colors[m] for m in PAPER}, pdf=True)
    draw(folder / "all_methods", result.arrays, colors)
    draw(folder / "scaled_gradients", result.arrays, scaled)
    losses = loss_table({method: methods[method] for method in PAPER})
    teleports = ratio_table({f"{a} / {b}": ratios[f"{a} / {b}"] for a, b in TELEPORTS})
    print(f"\n{losses}\n{teleports}\nFigure 6, and the numbers of all methods: {folder}")


if __name__ == "__main__":
    run.run(main)
