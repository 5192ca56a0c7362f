"""Modules of operations composed at random, for tests of what holds for every module."""

import random

import torch
import torch.nn.functional as F
from torch import nn

SIZES = 2, 3, 4, 6, 8
LARGEST = 16


def halves(x):
    return x.unflatten(-1, (2, -1)) if x.shape[-1] % 2 == 0 else x[..., None, :]


def written(x, y):
    z = torch.zeros_like(x)
    z[..., :1] = x[..., :1]
    z[..., 1:] += y[..., 1:]
    return z


def in_place(x, y):
    z = x.clone()
    z[..., 1:] *= 2
    z[:, 0] += y[:, 0]
    return z


def through_a_view(x, y):
    z = x.clone()
    z.flatten(1)[:, ::2].relu_()
    return z


def by_heads(x, y):
    q, k = (halves(t).movedim(-2, 1) for t in (x, y))
    return (q @ k.mT).movedim(1, -2).flatten(2)


# of x: [n, t, d] and y of the same shape
LINEAR_IN_X = {
    "sum": lambda x, y: x + y,
    "difference": lambda x, y: 2 * x - y,
    "concatenation": lambda x, y: torch.cat([x, y], -1),
    "one after the other": lambda x, y: torch.cat([x, y], 1),
    "transpose": lambda x, y: x.mT,
    "reshape": lambda x, y: x.reshape(len(x), -1, x.shape[1]),
    "halves": lambda x, y: halves(x).flatten(1, 2),
    "roll": lambda x, y: x.roll(1, -1),
    "roll of all": lambda x, y: x.flatten(1).roll(3, -1).view_as(x),
    "flip": lambda x, y: x.flip(-1),
    "slice": lambda x, y: x[..., :-1] if x.shape[-1] > 2 else x,
    "product": lambda x, y: x @ y.mT,
    "product of columns": lambda x, y: x.mT @ y,
    "heads": by_heads,
    "sum beside difference": lambda x, y: torch.cat([(x + y)[..., :1], (x - y)[..., 1:]], -1),
    "mean": lambda x, y: x.mean(1, keepdim=True) + y,
    "cumulative sum": lambda x, y: x.cumsum(1),
    "sum of halves": lambda x, y: halves(x).sum(-2),
    "repeat": lambda x, y: x.repeat(1, 1, 2),
    "repeat each": lambda x, y: x.repeat_interleave(2, -1),
    "padding": lambda x, y: F.pad(x, (1, 1)),
    "index": lambda x, y: x[..., torch.arange(x.shape[-1]) // 2],
    "index_add": lambda x, y: y.index_add(1, torch.arange(x.shape[1]) // 2, x),
    "written into zeros": written,
    "in place": in_place,
}
NOT_LINEAR = {
    "relu": lambda x, y: F.relu(x),
    "leaky_relu": lambda x, y: F.leaky_relu(x.clone(), 0.1, inplace=True),
    "squared relu": lambda x, y: F.relu(x) ** 2,
    "abs": lambda x, y: x.abs(),
    "tanh": lambda x, y: x.tanh(),
    "entrywise product": lambda x, y: x * y,
    "quotient": lambda x, y: x / (y.abs() + 1),
    "reciprocal": lambda x, y: 1 / (F.relu(x) + 0.5),
    "gate": lambda x, y: x * y.sigmoid(),
    "softmax": lambda x, y: x.softmax(-1),
    "maximum": lambda x, y: torch.maximum(x, y),
    "maximum of halves": lambda x, y: halves(x).amax(-2),
    "norm": lambda x, y: F.layer_norm(x, x.shape[-1:]),
    "where": lambda x, y: torch.where(x > 0, x, y),
    "mask": lambda x, y: x.masked_fill(y > 0, 0.0),
    "through a view": through_a_view,
    "data": lambda x, y: x.data * 2,
}
WITH_PARAMETERS = {  # of x, and of parameters of these shapes, with x: [n, t, d] and any o
    "linear": (F.linear, lambda t, d, o: [(o, d), (o,)]),
    "bias": (torch.add, lambda t, d, o: [(d,)]),
    "bias of all": (torch.add, lambda t, d, o: [(t, d)]),
    "scale": (torch.mul, lambda t, d, o: [(d,)]),
    "einsum": (
        lambda x, w: torch.einsum("ntd,dho->ntho", x, w).flatten(2),
        lambda t, d, o: [(d, 2, o // 2)],
    ),
    "low rank": (
        lambda x, w, B, A: F.linear(x, w + B @ A),
        lambda t, d, o: [(o, d), (o, 2), (2, d)],
    ),
    "convolution": (
        lambda x, w: F.conv1d(x.mT, w, groups=x.shape[-1] // w.shape[1]).mT,
        lambda t, d, o: [(2 * d, d // 2 if d % 2 == 0 else d, 1)],
    ),
}


class RandomModule(nn.Module):
    """The function of [n, 4, 6] that a seed draws, with sums alone, or all operations.

    Its outputs are some of the tensors on the way, by linear heads.
    """

    def __init__(self, seed, linear):
        super().__init__()
        self.rng, self.weights = random.Random(seed), nn.ParameterList()
        self.generator = torch.Generator().manual_seed(seed)
        operations = list(LINEAR_IN_X) + ([] if linear else [*NOT_LINEAR, "relu", "relu"])
        self.operations, self.steps, shapes = LINEAR_IN_X | NOT_LINEAR, [], [torch.Size([1, 4, 6])]
        for _ in range(self.rng.randrange(3, 14)):
            kind = self.rng.choice(operations if self.rng.random() < 0.6 else [*WITH_PARAMETERS])
            i = self.rng.randrange(max(0, len(shapes) - 4), len(shapes))
            j = self.rng.choice([k for k, shape in enumerate(shapes) if shape == shapes[i]])
            _, wanted = WITH_PARAMETERS.get(kind, (None, lambda t, d, o: []))
            wanted = wanted(*shapes[i][1:], self.rng.choice(SIZES))
            step = kind, i, j, [self.parameter(*shape) for shape in wanted]
            shape = self.result(step, [torch.zeros(shape) for shape in shapes]).shape
            if max(shape) <= LARGEST:
                self.steps.append(step)
                shapes.append(shape)
        ends = self.rng.sample(range(len(shapes)), min(3, len(shapes) - 1)) + [len(shapes) - 1]
        self.ends = [(k, self.parameter(3, shapes[k][2])) for k in ends]

    def parameter(self, *shape):
        """Return the number of a new parameter, sometimes of one that is used elsewhere."""
        same = [k for k, weight in enumerate(self.weights) if weight.shape == shape]
        if same and self.rng.random() < 0.2:
            return self.rng.choice(same)
        weight = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        self.weights.append(nn.Parameter(weight / shape[-1] ** 0.5))
        return len(self.weights) - 1

    def result(self, step, xs):
        kind, i, j, parameters = step
        if kind in WITH_PARAMETERS:
            return WITH_PARAMETERS[kind][0](xs[i], *(self.weights[k].to(xs[i]) for k in parameters))
        return self.operations[kind](xs[i], xs[j])

    def forward(self, x):
        xs = [x]
        for step in self.steps:
            xs.append(self.result(step, xs))
        return [F.linear(xs[k], self.weights[w]) for k, w in self.ends]
