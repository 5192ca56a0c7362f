"""Does teleporting help a small CNN? An experiment that the paper does not have.

    python teleport_cnn.py             # 10,000 images of CIFAR-10, 10 seeds
    python teleport_cnn.py --sample    # the same on the shipped sample

SGD and Adam train a convolutional network with biases and batch norm at their best learning rates
of a short grid, chosen on validation images in plain runs of other seeds. There are three arms:

    plain       no teleports
    teleport    before the first mini-batches of one epoch, rescalings to a larger gradient, with
                the optimizer's state moved along
    random      rescalings as large in each group, in a random direction

All rescalings keep the network's function. The primary comparison is the test loss of teleport less
plain's after the last epoch; the rest is exploratory. Every run's curves are in
figures/cnn/<optimizer>.npz.
"""

import time
import warnings

from experiment import files, launch, plots, statistics

import numpy as np
import torch
from torch import nn

import models
from data import load_data, shuffled_batch
from module_symmetry import act_on, gradient_norm, move, random_elements, symmetry_of, teleported

# Settings

OPTIMIZERS = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam}
GRID = {"SGD": (0.01, 0.03, 0.1, 0.3), "Adam": (3e-4, 1e-3, 3e-3, 1e-2)}
GRID_RUNS = range(100, 103)  # other seeds than those of the arms
IMAGES = 10_000  # for training, and as many for validation
BATCH = 50
EPOCH, TELEPORTS, TELEPORT_BATCH = 1, 8, 100  # index of the epoch; how many in it; images of each
LR, STEPS, MAX_NORM = 1.0, 10, 0.1  # of the ascent on T in each teleport
# a teleport ends where |∇L|², which has no bound along rescalings, has grown by this factor
GROWTH = 1.2
DEFAULTS = {"runs": 10, "epochs": 10}
ARMS = {"plain": plots.BLACK, "teleport": plots.GREEN, "random": plots.GREY}
PAIRS = [("teleport", "plain"), ("random", "plain"), ("teleport", "random")]
CURVES = ("loss", "growth", "seconds")
loss_of = nn.CrossEntropyLoss()


def network(seed):
    """Return the network with weights drawn from a seed."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Unflatten(1, (3, 32, 32)),
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 8 * 8, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


# Computation


def move_model(arm, model, optimizer, x, y, seed):
    """Move a model and its optimizer's state as an arm does; return how much |∇L|² grew."""
    symmetry, objective = symmetry_of(model), gradient_norm(model, loss_of, x, y)
    start = dict(model.named_parameters())
    before = objective(start).item()
    limits = {"stop": GROWTH * before, "max_norm": MAX_NORM}
    parameters, path = teleported(model, symmetry, objective, x, LR, STEPS, **limits)
    elements = path["group_elements"]
    if arm == "random":
        lengths = [g.diagonal(dim1=-2, dim2=-1).log().norm(dim=-1) for g in elements]
        rng = torch.Generator().manual_seed(seed)
        elements = [g.to(x) for g in random_elements(symmetry, lengths, rng)]
        parameters = act_on(start, symmetry, elements)
    move(model, symmetry, parameters, elements, optimizer)
    return objective(parameters).item() / before


@torch.no_grad()
def evaluate(model, x, y):
    """Return a model's mean loss in eval mode."""
    model.eval()
    logits = torch.cat([model(part) for part in x.split(1000)])
    model.train()
    return float(loss_of(logits, y))


def train(optimizer, lr, arm, run, epochs, data, held_out):
    """Train a run of an arm; return its loss on held-out images [epochs], growths and seconds.

    Where the loss is not finite the run ends with a warning, and what is missing is nan.
    """
    seed = models.run_seeds([run])[0]
    model = network(seed).to(data.x_train.device)
    optimizer = OPTIMIZERS[optimizer](model.parameters(), lr)
    rng = torch.Generator().manual_seed(seed)
    losses, growths, seconds = np.full(epochs, np.nan), np.ones(TELEPORTS), 0.0
    for epoch in range(epochs):
        for k, rows in enumerate(torch.randperm(len(data.x_train), generator=rng).split(BATCH)):
            if epoch == EPOCH and k < TELEPORTS and arm != "plain":
                x, y = shuffled_batch(data, TELEPORT_BATCH, k)
                start = time.perf_counter()
                growths[k] = move_model(arm, model, optimizer, x.T, y, seed + k)
                seconds += time.perf_counter() - start
            optimizer.zero_grad()
            loss = loss_of(model(data.x_train[rows]), data.y_train[rows])
            loss.backward()
            optimizer.step()
        if not loss.isfinite():
            warnings.warn(f"{arm}, lr {lr}, run {run}: not finite in epoch {epoch}", stacklevel=2)
            break
        losses[epoch] = evaluate(model, *held_out)
    return {"loss": losses, "growth": growths, "seconds": seconds}


def log(kind, optimizer, lr, args):
    """Return the path in logs/ of some runs, their settings, and the list of them.

    kind: `grid`, plain runs of other seeds, or `arms`, all arms of a run one after another.
    """
    plan = [("plain", run) for run in GRID_RUNS]
    if kind == "arms":
        plan = [(arm, run) for run in range(args.runs) for arm in ARMS]
    settings = dict(sample=args.sample, optimizer=optimizer, lr=lr, plan=plan, seed=models.SEED)
    settings |= dict(epochs=args.epochs, images=IMAGES, batch=BATCH, device=args.device.type)
    settings |= dict(network=str(network(0)))
    settings |= dict(teleport=[EPOCH, TELEPORTS, TELEPORT_BATCH, LR, STEPS, MAX_NORM, GROWTH])
    folder = args.output / "logs" / "cnn" / f"{args.epochs}epochs{'-sample' * args.sample}"
    return folder / f"{optimizer}-{lr:g}-{len(plan)}{kind}.npz", settings, plan


def compute(args):
    """Train what logs/ lacks; ranks share the optimizers."""
    data = load_data("CIFAR10", args)
    n = min(IMAGES, len(data.x_train) // 2)
    validation = data.x_train[n : 2 * n], data.y_train[n : 2 * n]
    test = data.x_test, data.y_test
    data = data._replace(x_train=data.x_train[:n], y_train=data.y_train[:n])

    def train_all(kind, optimizer, lr, held_out):
        path, settings, plan = log(kind, optimizer, lr, args)

        def step(state):
            arm, run = plan[int(state["steps"])]
            curves = train(optimizer, lr, arm, run, args.epochs, data, held_out)
            return files.appended(state, **curves)

        with launch.progress_bar(len(plan), "run", f"{optimizer}, lr {lr:g}, {kind}") as bar:
            files.resume(path, settings, dict, step, len(plan), bar)

    for optimizer in launch.share_of_rank(args.optimizer):
        for lr in GRID[optimizer]:
            train_all("grid", optimizer, lr, validation)
        train_all("arms", optimizer, best_lr(grid(optimizer, args), optimizer), test)


def grid(optimizer, args):
    """Return the last validation loss of an optimizer's runs over the GRID, [lrs, runs]."""
    logs = [log("grid", optimizer, lr, args) for lr in GRID[optimizer]]
    return np.stack([files.load_steps(*entry[:2], len(entry[2]))["loss"][:, -1] for entry in logs])


def best_lr(losses, optimizer):
    """Return the learning rate of the lowest mean in `grid`; one at which a run diverged is out."""
    return GRID[optimizer][np.nan_to_num(losses.mean(1), nan=np.inf).argmin()]


def collect(optimizer, args):
    """Return an optimizer's settings, arrays and log.

    The arrays are `loss` on test images [epochs, arms, runs], `growth` of |∇L|² in each teleport
    [TELEPORTS, arms, runs], `seconds` of all teleports of a run [arms, runs], and the `grid`.
    """
    losses = grid(optimizer, args)
    path, settings, plan = log("arms", optimizer, best_lr(losses, optimizer), args)
    state = files.load_steps(path, settings, len(plan))
    arrays = {key: state[key].reshape(-1, len(ARMS), *state[key].shape[1:]) for key in CURVES}
    return settings, {key: array.T for key, array in arrays.items()} | {"grid": losses}, path


# Statistics


def summarise(optimizer, results):
    """Return what summary.json says of an optimizer."""
    loss = {arm: results["loss"][:, i] for i, arm in enumerate(ARMS)}
    epochs = sorted({EPOCH + 1, len(results["loss"]) // 2, len(results["loss"])})
    return {
        "grid": dict(zip(map(str, GRID[optimizer]), results["grid"].mean(1))),
        "plain": {epoch: loss["plain"][epoch - 1].mean() for epoch in epochs},
        "differences": statistics.compare_arms(loss, PAIRS, epochs),
        "growth_of_gradient_norm_squared": dict(zip(ARMS, results["growth"].mean((0, 2)))),
        "seconds_of_moves": dict(zip(ARMS, results["seconds"].mean(1))),
    }


def table(summaries):
    """Return losses, differences and what moves do as Markdown."""
    tables, rows = [], []
    for optimizer, summary in summaries.items():
        title = f"CNN, {optimizer}, lr {summary['settings']['lr']:g}"
        tables.append(plots.difference_table(title, summary["plain"], summary["differences"]))
        for arm in list(ARMS)[1:]:
            growth = summary["growth_of_gradient_norm_squared"][arm]
            rows.append([title, arm, f"{growth:.2f}", f"{summary['seconds_of_moves'][arm]:.1f}"])
    header = ["", "arm", "factor of the gradient norm² in a move", "all moves of a run, s"]
    return "\n".join([*tables, plots.markdown(header, rows)])


# Figures


def draw(optimizer, results, summary, folder):
    """Draw the test loss of the arms and its difference from plain's."""
    arms = {arm: (c, None, results["loss"][:, i]) for i, (arm, c) in enumerate(ARMS.items())}
    title = f"CNN on CIFAR-10, {optimizer}, lr {summary['settings']['lr']:g}"
    epochs = 1 + np.arange(len(results["loss"]))
    plots.draw_arms(folder / f"{optimizer}_arms", title, epochs, arms, results["loss"][:, 0])


# Options


def parse_arguments():
    parser = launch.experiment_parser(__doc__)
    add, names, at_least = parser.add_argument, list(OPTIMIZERS), launch.at_least
    add("--optimizer", nargs="+", choices=names, default=names, help="which optimizers")
    add("--runs", type=at_least(2), default=DEFAULTS["runs"], help="runs of each arm")
    add("--epochs", type=at_least(3), default=DEFAULTS["epochs"], help="passes over the images")
    return parser.parse_args()


def main():
    args = parse_arguments()
    folder = launch.figures_folder(args, "cnn", DEFAULTS)
    parts = OPTIMIZERS, args.optimizer
    launch.compute_and_report(args, folder, *parts, compute, collect, summarise, table, draw)


if __name__ == "__main__":
    launch.run(main)
