"""Multilayer perceptrons without biases, as stacks of runs, and how they are trained.

Weights are a list, W[m]: [..., d_{m+1}, d_m]. Activations are [..., d, n], one column per sample:
h_0 = X, h_m = σ(W_m h_{m-1}), and the logits are W_L h_{L-1}. Leading dimensions are runs: every
function treats each index of them alone, so that a hundred networks train as one. All runs of a
stack see the same mini-batches in the same order.
"""

import warnings
from itertools import pairwise
from numbers import Integral
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

# Moments of weights whose pixel is always black decay to denormal numbers, on which a CPU is many
# times slower. This must come before the first parallel loop: threads inherit it when they start.
torch.set_flush_denormal(True)

BATCH = 20  # images in a mini-batch
BLOCK = 10  # mini-batches whose products with the first layer are one matrix product
SEED = 54321
DIVERGED_WEIGHT = 1e6  # a network with a larger weight has diverged


class Training(NamedTuple):
    """The networks that the paper trains on a dataset, and SGD's learning rate."""

    widths: tuple  # d_0 … d_L
    lr: float


TRAINING = {
    "MNIST": Training((784, 16, 10, 10), 1e-2),
    "FashionMNIST": Training((784, 16, 10, 10), 1e-2),
    "CIFAR10": Training((3072, 128, 32, 10), 2e-2),
}


def run_seeds(runs):
    """Return the published seeds of the runs with these indices."""
    return [(i + 1) * SEED for i in runs]


# An activation is called elementwise and has a derivative. An action may need its inverse, or that
# it is positively homogeneous: σ(cz) = c σ(z) for c > 0.


class LeakyReLU(nn.LeakyReLU):
    """LeakyReLU with slope 0.1 as in the paper, with its inverse and its derivative."""

    homogeneous = True

    def __init__(self, negative_slope=0.1):
        super().__init__(negative_slope)

    def inverse(self, x):
        """Return σ^{-1}(x), elementwise."""
        return F.leaky_relu(x, 1 / self.negative_slope)

    def derivative(self, x):
        """Return σ'(x), elementwise; at 0 it is the slope, as in torch's backward pass."""
        return (x > 0).to(x.dtype).clamp(min=self.negative_slope)


class ReLU(nn.ReLU):
    """ReLU, which has no inverse."""

    homogeneous = True

    def derivative(self, x):
        """Return σ'(x), elementwise; 0 at 0."""
        return (x > 0).to(x.dtype)


class Tanh(nn.Tanh):
    """The hyperbolic tangent, with its inverse on (−1, 1) and its derivative."""

    def inverse(self, x):
        """Return σ^{-1}(x), elementwise; nan outside of [−1, 1]."""
        return x.atanh()

    def derivative(self, x):
        """Return σ'(x), elementwise."""
        return 1 - x.tanh() ** 2


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

    One int as `seeds` gives W[m]: [d_{m+1}, d_m]; a sequence gives [len(seeds), d_{m+1}, d_m].
    A run's weights depend on its own seed alone.
    """
    if not isinstance(seeds, Integral):
        return [torch.stack(layer) for layer in zip(*(init_weights(widths, s) for s in seeds))]
    rng = torch.Generator().manual_seed(int(seeds))
    weights = []
    for fan_in, fan_out in pairwise(widths):
        k = 1 / fan_in**0.5
        weights.append(2 * k * torch.rand(fan_out, fan_in, generator=rng) - k)
    return weights


def widths_of(weights):
    """Return the widths d_0 … d_L of networks."""
    return [weights[0].shape[-1], *(w.shape[-2] for w in weights)]


def to_arrays(weights):
    """Return weights as {"W0": array, "W1": …}, to be saved."""
    return {f"W{m}": w.detach().cpu() for m, w in enumerate(weights)}


def from_arrays(arrays, device="cpu"):
    """Return the weights that `to_arrays` was given, on `device`."""
    layers = sum(key[0] == "W" and key[1:].isdecimal() for key in arrays)
    return [torch.tensor(arrays[f"W{m}"], device=device) for m in range(layers)]


def optimizer_to_arrays(optimizer):
    """Return an optimizer's state, which must be tensors, as {name: tensor}, to be saved."""
    return {
        f"state {i} {key}": torch.as_tensor(value)
        for i, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
        if value is not None
    }


def optimizer_from_arrays(optimizer, arrays):
    """Give an optimizer the state that `optimizer_to_arrays` returned."""
    state = {}
    for name, value in arrays.items():
        if name.startswith("state "):
            _, i, key = name.split()
            state.setdefault(int(i), {})[key] = torch.tensor(value)
    if state:
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def check_batch(weights, x, y=None):
    """Raise ValueError, in a sentence, where weights, x: [d_0, n] and y: [n] do not fit together.

    Values that are not finite are let through: results warn of them.
    """
    shapes = [list(w.shape) for w in weights]
    if not shapes:
        raise ValueError("the list of weights is empty")
    for m, (w, shape) in enumerate(zip(weights, shapes)):
        if len(shape) < 2 or not w.is_floating_point():
            raise ValueError(f"W_{m} must be floating-point [..., out, in], not {w.dtype} {shape}")
        if m and shape[:-2] + shape[-1:] != shapes[m - 1][:-1]:  # runs, and units in between
            raise ValueError(f"W_{m} {shape} does not fit W_{m - 1} {shapes[m - 1]}")
    d, classes = shapes[0][-1], shapes[-1][-2]
    if x.dim() != 2 or len(x) != d or not x.shape[1]:
        raise ValueError(f"x must be [{d}, n] with n > 0 for W_0 {shapes[0]}, not {list(x.shape)}")
    if any(w.dtype != x.dtype or w.device != x.device for w in weights):
        types = ", ".join(f"{t.dtype} on {t.device}" for t in (*weights, x))
        raise ValueError(f"weights and x must have one type and device, not {types}")
    if y is None:
        return
    if y.shape != x.shape[1:] or y.dtype != torch.int64 or y.device != x.device:
        expected = f"int64 [{x.shape[1]}] on {x.device} for x {list(x.shape)}"
        raise ValueError(f"y must be {expected}, not {y.dtype} {list(y.shape)} on {y.device}")
    if not y.is_meta and not 0 <= y.min() <= y.max() < classes:
        raise ValueError(f"labels must be 0 to {classes - 1}, not {y.min()} to {y.max()}")


def warn_if_not_finite(what, values):
    """Warn where a result [...] is not finite, and name the runs; return the result."""
    if not values.is_meta and not values.isfinite().all():
        runs = (~values.isfinite()).nonzero().tolist()
        warnings.warn(f"{what} is not finite for the runs {runs}", stacklevel=3)
    return values


def propagate(weights, z, activation):
    """Return the logits [..., classes, n] of `weights`, those above the first, from z = W_0 X."""
    for w in weights:
        z = w @ activation(z)
    return z


def forward(weights, x, activation):
    """Return the logits [..., classes, n] of x: [d_0, n]."""
    return propagate(weights[1:], weights[0] @ x, activation)


def cross_entropy_of_logits(logits, y):
    """Return the cross-entropy [...], a mean over n samples; logits [..., classes, n], y [n]."""
    index = y.expand(*logits.shape[:-2], 1, -1)
    return -logits.log_softmax(-2).gather(-2, index).mean((-2, -1))


def cross_entropy(weights, x, y, activation):
    """Return the mean cross-entropy [...] of each run on x: [d_0, n], y: [n] int64."""
    check_batch(weights, x, y)
    return cross_entropy_of_logits(forward(weights, x, activation), y)


class MLP(nn.Module):
    """A stack of networks as a module: `weights` become its parameters, a column of x a sample."""

    def __init__(self, weights, activation):
        super().__init__()
        self.weights = nn.ParameterList(weights)
        self.activation = activation

    def forward(self, x):
        return forward(list(self.weights), x, self.activation)


def backpropagate(weights, z, targets, activation):
    """Return the loss of each run and what its gradient is made of, in closed form.

    weights: those of the layers above the first; z = W_0 X: [..., d_1, n]; targets: [classes, n],
    one-hot. Returns the mean cross-entropy [...], the inputs h_1 … h_{L-1} of the layers above the
    first, and δ_0 … δ_{L-1}, the loss's gradients at the layers' pre-activations: the gradient
    with respect to W_m is δ_m h_m^T, with h_0 = X.
    """
    n = targets.shape[-1]
    pre_activations, inputs = [], []
    for w in weights:
        pre_activations.append(z)
        inputs.append(activation(z))
        z = w @ inputs[-1]
    log_p = z.log_softmax(-2)
    loss = (log_p * targets).sum((-2, -1)) / -n
    deltas = [(log_p.exp() - targets) / n]
    for w, z in zip(reversed(weights), reversed(pre_activations)):
        deltas.append((w.mT @ deltas[-1]) * activation.derivative(z))
    return loss, inputs, deltas[::-1]


def one_hot(y, weights):
    """Return labels y: [n] as columns [classes, n] in the weights' type."""
    return F.one_hot(y, weights[-1].shape[-2]).T.to(weights[-1])


def mean_loss(losses, check):
    """Return the mean [...] of a list of losses [...], one for each step.

    check: whether to raise FloatingPointError, naming run and step, where one is not finite.
    """
    losses = torch.stack(losses)
    if check and len(bad := (~losses.isfinite()).nonzero()):
        step, *run = bad[0].tolist()
        raise FloatingPointError(f"the loss of run {run} of the stack is not finite at step {step}")
    return losses.mean(0)


@torch.no_grad()
def replace_diverged(weights, diverged):
    """Mark networks with a weight above DIVERGED_WEIGHT in diverged: [...], in place.

    They get the weights of one that has not diverged, so that the others can go on in the stack;
    what is measured of them is to be left out. Raises ValueError where all have diverged.
    """
    for w in weights:
        diverged |= ~(w.abs() < DIVERGED_WEIGHT).all(-1).all(-1)  # written so that nan counts, too
    if diverged.all():
        raise ValueError("all networks diverge")
    if diverged.any():
        healthy = tuple((~diverged).nonzero()[0])
        for w in weights:
            w.copy_(torch.where(diverged[..., None, None], w[healthy].clone(), w))


@torch.no_grad()
def train_epoch(model, x, y, optimizer, check=True):
    """Train an MLP for one pass over x: [N, d_0], y: [N], in the order in which they lie.

    `optimizer` is any elementwise one of torch.optim over the model's parameters, so that each run
    of the stack is trained alone. Returns the `mean_loss` [...] over the epoch, with `check`.
    """
    weights, activation = list(model.weights), model.activation
    check_batch(weights, x.T, y)
    targets = one_hot(y, weights)
    losses = []
    for images, columns in zip(x.split(BATCH), targets.split(BATCH, 1)):
        batch = images.T
        loss, inputs, deltas = backpropagate(weights[1:], weights[0] @ batch, columns, activation)
        for w, h, delta in zip(weights, [batch, *inputs], deltas):
            w.grad = delta @ h.mT
        optimizer.step()
        losses.append(loss)
    return mean_loss(losses, check)


@torch.no_grad()
def train_epoch_sgd(weights, x, y, lr, activation, check=True):
    """Train by plain SGD, in place, as `train_epoch` does with torch.optim.SGD(lr=lr).

    The first layer has nearly all of the weights. Its changes over a block of steps are kept as
    W_0 − lr Σ_j δ_j X_j^T and added at the block's end; until then W_0 X_k is corrected by
    −lr Σ_j δ_j (X_j^T X_k). The sums are the same, and the large products see many batches at once.
    The weights must be contiguous.
    """
    check_batch(weights, x.T, y)
    first_layer = weights[0].view(-1, weights[0].shape[-1])
    targets = one_hot(y, weights)
    losses = []
    # X: [n, d_0] and its targets T: [classes, n], with n = BLOCK * BATCH but at the end
    for X, T in zip(x.split(BLOCK * BATCH), targets.split(BLOCK * BATCH, 1)):
        Z = weights[0] @ X.T  # [..., d_1, n]
        gram = X @ X.T  # [n, n], shared by all runs
        delta_0 = torch.empty_like(Z)
        for first in range(0, len(X), BATCH):
            batch = slice(first, first + BATCH)
            z = Z[..., batch]
            if first:
                z = z - lr * (delta_0[..., :first] @ gram[:first, batch])
            loss, inputs, deltas = backpropagate(weights[1:], z, T[:, batch], activation)
            delta_0[..., batch] = deltas[0]
            for w, h, delta in zip(weights[1:], inputs, deltas[1:]):
                w.sub_(delta @ h.mT, alpha=lr)
            losses.append(loss)
        first_layer.addmm_(delta_0.view(-1, len(X)), X, alpha=-lr)
    return mean_loss(losses, check)


@torch.no_grad()
def evaluate(weights, x, y, activation, chunk=1000):
    """Return mean loss [...] and accuracy [...] on x: [N, d_0], y: [N], `chunk` samples at once."""
    check_batch(weights, x.T, y)
    loss = correct = 0
    for x_chunk, y_chunk in zip(x.split(chunk), y.split(chunk)):
        logits = forward(weights, x_chunk.T, activation)
        loss = loss + cross_entropy_of_logits(logits, y_chunk) * len(y_chunk)
        correct = correct + (logits.argmax(-2) == y_chunk).sum(-1)
    return loss / len(y), correct / len(y)
