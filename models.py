"""Stacks of multilayer perceptrons without biases, and how they are trained.

Weights are a list, W[m]: [..., d_{m+1}, d_m]. Activations are [..., d, n], a column for each
sample: h_0 = X, h_m = σ(W_{m-1} h_{m-1}), and the last layer gives the logits. Leading dimensions
are runs, each of which is treated by itself, so that a hundred networks train as one. All runs of a
stack see the same mini-batches in the same order.
"""

import warnings
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

# An optimizer's moments for pixels that are always black decay to denormal numbers, with which a
# CPU is many times slower. Threads inherit this setting when they start, so it comes first.
torch.set_flush_denormal(True)

BATCH = 20  # images in a mini-batch
BLOCK = 10  # mini-batches whose products with the first layer are one matrix product
SEED = 54321
DIVERGED_WEIGHT = 1e6  # a network with a larger weight has diverged


class Training(NamedTuple):
    """The widths d_0 … d_L of the paper's networks for a dataset, and SGD's learning rate."""

    widths: tuple
    lr: float


TRAINING = {
    "MNIST": Training((784, 16, 10, 10), 1e-2),
    "FashionMNIST": Training((784, 16, 10, 10), 1e-2),
    "CIFAR10": Training((3072, 128, 32, 10), 2e-2),
}


def run_seeds(runs):
    """Return the published seeds of the runs with these indices."""
    return [(i + 1) * SEED for i in runs]


# Activations act elementwise and have a derivative. Some group actions need an inverse, and others
# that the activation is positively homogeneous: σ(cz) = c σ(z) for c > 0.


class LeakyReLU(nn.LeakyReLU):
    """LeakyReLU with slope 0.1, the paper's activation."""

    homogeneous = True

    def __init__(self, negative_slope=0.1):
        super().__init__(negative_slope)

    def inverse(self, x):
        """Return σ^{-1}(x)."""
        return F.leaky_relu(x, 1 / self.negative_slope)

    def derivative(self, x):
        """Return σ'(x); at 0 it is the slope, as in torch's backward pass."""
        return (x > 0).to(x.dtype).clamp(min=self.negative_slope)


class Identity(nn.Identity):
    """The identity, for linear networks."""

    homogeneous = True

    def inverse(self, x):
        """Return x."""
        return x

    def derivative(self, x):
        """Return ones."""
        return torch.ones_like(x)


def init_weights(widths, seeds):
    """Draw weights uniform in ±1/sqrt(fan_in), layer by layer, as the published code does.

    seeds: a sequence, one for each run, which gives [len(seeds), d_{m+1}, d_m], or an int, which
    gives [d_{m+1}, d_m]. A run depends on no other seed than its own.
    """
    if not isinstance(seeds, int):
        return [torch.stack(layer) for layer in zip(*(init_weights(widths, s) for s in seeds))]
    rng = torch.Generator().manual_seed(seeds)
    weights = []
    for fan_in, fan_out in pairwise(widths):
        k = 1 / fan_in**0.5
        weights.append(2 * k * torch.rand(fan_out, fan_in, generator=rng) - k)
    return weights


def widths_of(weights):
    """Return the widths d_0 … d_L of networks."""
    return [weights[0].shape[-1], *(w.shape[-2] for w in weights)]


def to_arrays(weights):
    """Return weights as {"W0": tensor, "W1": …} on the CPU, to be saved."""
    return {f"W{m}": w.detach().cpu() for m, w in enumerate(weights)}


def from_arrays(arrays, device="cpu"):
    """Return the weights that were saved with others' arrays by `to_arrays`."""
    layers = sum(key[0] == "W" and key[1:].isdecimal() for key in arrays)
    return [torch.tensor(arrays[f"W{m}"], device=device) for m in range(layers)]


def optimizer_to_arrays(optimizer):
    """Return an optimizer's state, which must consist of tensors, as {name: tensor}."""
    return {
        f"state {i} {key}": torch.as_tensor(value)
        for i, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
        if value is not None
    }


def optimizer_from_arrays(optimizer, arrays):
    """Restore the state of an optimizer that `optimizer_to_arrays` returned."""
    state = {}
    for name, value in arrays.items():
        if name.startswith("state "):
            _, i, key = name.split()
            state.setdefault(int(i), {})[key] = torch.tensor(value)
    if state:
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def check_batch(weights, x, y=None):
    """Raise ValueError if weights, x: [d_0, n] and labels y: [n] do not fit together.

    Values that are not finite are let through: results warn of them.
    """
    shapes = [list(w.shape) for w in weights]
    if not shapes or any(a[:-1] != b[:-2] + b[-1:] or len(b) < 2 for a, b in pairwise(shapes)):
        raise ValueError(f"weights must be [..., d_1, d_0], [..., d_2, d_1], …, not {shapes}")
    d, classes = shapes[0][-1], shapes[-1][-2]
    if x.dim() != 2 or len(x) != d or not x.shape[1]:
        raise ValueError(f"x must be [{d}, n] with n > 0, not {list(x.shape)}")
    kinds = {(t.dtype, t.device) for t in (*weights, x)}
    if len(kinds) > 1 or not x.is_floating_point():
        types = ", ".join(f"{t.dtype} on {t.device}" for t in (*weights, x))
        raise ValueError(f"weights and x must have one floating-point type and device, not {types}")
    if y is None:
        return
    if y.shape != x.shape[1:] or y.dtype != torch.int64 or y.device != x.device:
        needed = f"int64 [{x.shape[1]}] on {x.device}"
        raise ValueError(f"y must be {needed}, not {y.dtype} {list(y.shape)} on {y.device}")
    if not 0 <= y.min() <= y.max() < classes:
        raise ValueError(f"labels must be 0 to {classes - 1}, not {y.min()} to {y.max()}")


def warn_if_not_finite(what, values):
    """Return a result, [...], after a warning if it is not finite, which names the runs."""
    if not values.isfinite().all():
        runs = (~values.isfinite()).nonzero().tolist()
        warnings.warn(f"{what} is not finite for the runs {runs}", stacklevel=3)
    return values


def propagate(weights, z, activation):
    """Return the logits, [..., classes, n], from z = W_0 X and the weights above the first."""
    for w in weights:
        z = w @ activation(z)
    return z


def forward(weights, x, activation):
    """Return the logits, [..., classes, n], of x: [d_0, n]."""
    return propagate(weights[1:], weights[0] @ x, activation)


def cross_entropy_of_logits(logits, y):
    """Return the mean cross-entropy, [...], of logits: [..., classes, n] and y: [n]."""
    index = y.expand(*logits.shape[:-2], 1, -1)
    return -logits.log_softmax(-2).gather(-2, index).mean((-2, -1))


def cross_entropy(weights, x, y, activation):
    """Return the mean cross-entropy, [...], on x: [d_0, n], y: [n]."""
    check_batch(weights, x, y)
    return cross_entropy_of_logits(forward(weights, x, activation), y)


class MLP(nn.Module):
    """A stack of networks as a module, whose parameters are the weights; x: [d_0, n]."""

    def __init__(self, weights, activation):
        super().__init__()
        self.weights = nn.ParameterList(weights)
        self.activation = activation

    def forward(self, x):
        return forward(list(self.weights), x, self.activation)


def backpropagate(weights, z, targets, activation):
    """Return the loss, [...], and its gradients at z = W_0 x and in the weights above the first.

    weights: those above the first; z: [..., d_1, n]; targets: [classes, n], one-hot. The loss is
    the mean cross-entropy over the n samples.
    """
    n = targets.shape[-1]
    inputs, slopes = [], []
    for w in weights:
        inputs.append(activation(z))
        slopes.append(activation.derivative(z))
        z = w @ inputs[-1]
    log_p = z.log_softmax(-2)
    loss = (log_p * targets).sum((-2, -1)) / -n
    delta, gradients = (log_p.exp() - targets) / n, []
    for w, h, slope in zip(weights[::-1], inputs[::-1], slopes[::-1]):
        gradients.append(delta @ h.mT)
        delta = (w.mT @ delta) * slope
    return loss, delta, gradients[::-1]


def one_hot(y, weights):
    """Return labels y: [n] as columns, [classes, n], of the weights' type."""
    return F.one_hot(y, weights[-1].shape[-2]).T.to(weights[-1])


def mean_loss(losses, check):
    """Return the mean, [...], of a list of losses, [...] for each step.

    With `check`, raises FloatingPointError, which names run and step, if one is not finite.
    """
    losses = torch.stack(losses)
    if check and len(bad := (~losses.isfinite()).nonzero()):
        step, *run = bad[0].tolist()
        raise FloatingPointError(f"the loss of run {run} of the stack is not finite at step {step}")
    return losses.mean(0)


@torch.no_grad()
def replace_diverged(weights, diverged):
    """Mark the networks with a weight above DIVERGED_WEIGHT in diverged: [...], in place.

    They get the weights of one that has not diverged, so that the stack can go on; callers leave
    out what is measured of them. Raises ValueError if all have diverged.
    """
    for w in weights:
        diverged |= ~(w.abs() < DIVERGED_WEIGHT).all(-1).all(-1)  # True for nan
    if diverged.all():
        raise ValueError("all networks diverge")
    if diverged.any():
        healthy = tuple((~diverged).nonzero()[0])
        for w in weights:
            w.copy_(torch.where(diverged[..., None, None], w[healthy].clone(), w))


@torch.no_grad()
def train_epoch(model, x, y, optimizer, check=True):
    """Train an MLP for one pass over x: [N, d_0], y: [N], in their order.

    The optimizer, over the model's parameters, must be elementwise, so that runs do not mix.
    Returns the `mean_loss`, [...], which describes `check`.
    """
    weights, activation = list(model.weights), model.activation
    check_batch(weights, x.T, y)
    targets = one_hot(y, weights)
    losses = []
    for images, columns in zip(x.split(BATCH), targets.split(BATCH, 1)):
        batch = images.T
        loss, delta, gradients = backpropagate(weights[1:], weights[0] @ batch, columns, activation)
        for w, gradient in zip(weights, [delta @ batch.mT, *gradients]):
            w.grad = gradient
        optimizer.step()
        losses.append(loss)
    return mean_loss(losses, check)


@torch.no_grad()
def train_epoch_sgd(weights, x, y, lr, activation, check=True):
    """Do in place what `train_epoch` does with torch.optim.SGD(lr=lr), up to 4 times as fast.

    Nearly all weights are in the first layer. It is updated once for a block of steps, by
    −lr Σ_j δ_j X_j^T; until then W_0 X_k is corrected by −lr Σ_j δ_j (X_j^T X_k). So the large
    products are those of many mini-batches at once. The weights must be contiguous.
    """
    check_batch(weights, x.T, y)
    first_layer = weights[0].view(-1, weights[0].shape[-1])
    targets = one_hot(y, weights)
    losses = []
    # X: [n, d_0] and T: [classes, n], with n = BLOCK * BATCH, or less at the end
    for X, T in zip(x.split(BLOCK * BATCH), targets.split(BLOCK * BATCH, 1)):
        Z = weights[0] @ X.T  # [..., d_1, n]
        gram = X @ X.T  # [n, n], shared by all runs
        delta_0 = torch.empty_like(Z)
        for first in range(0, len(X), BATCH):
            batch = slice(first, first + BATCH)
            z = Z[..., batch]
            if first:
                z = z - lr * (delta_0[..., :first] @ gram[:first, batch])
            loss, delta_0[..., batch], gradients = backpropagate(
                weights[1:], z, T[:, batch], activation
            )
            for w, gradient in zip(weights[1:], gradients):
                w.sub_(gradient, alpha=lr)
            losses.append(loss)
        first_layer.addmm_(delta_0.view(-1, len(X)), X, alpha=-lr)
    return mean_loss(losses, check)


@torch.no_grad()
def evaluate(weights, x, y, activation, chunk=1000):
    """Return mean loss and accuracy, [...], on x: [N, d_0], y: [N], `chunk` samples at a time."""
    check_batch(weights, x.T, y)
    loss = correct = 0
    for x_chunk, y_chunk in zip(x.split(chunk), y.split(chunk)):
        logits = forward(weights, x_chunk.T, activation)
        loss = loss + cross_entropy_of_logits(logits, y_chunk) * len(y_chunk)
        correct = correct + (logits.argmax(-2) == y_chunk).sum(-1)
    return loss / len(y), correct / len(y)
