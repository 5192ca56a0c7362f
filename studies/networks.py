"""Networks that studies train, with their data: for images, and a GPT for bytes of text.

They are small, and so is the data: the first images of each dataset, and windows of the text of
Python's standard library, are kept together in one file of 36 MB.
"""

import copy
import functools
import hashlib
import io
import sysconfig
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

import models
from data import TITLES, load_data
from experiment import results

# what results with these networks depend on, beside the script
CODE = __file__, *sorted((results.ROOT / "parameter_symmetries").glob("*.py"))
IMAGES = {"train": 7000, "calibration": 1000, "test": 2000}
WINDOWS = {"train": 20_000, "calibration": 100, "test": 256}  # of Python's standard library
LENGTH = 128  # bytes of a window


class Network(NamedTuple):
    """A network, what it is trained on, and how."""

    title: str
    dataset: str  # of images, or "text"
    build: Callable  # of the shape of an input
    batch: int
    epochs: int
    lr: float  # the largest: AdamW's rate rises, then falls


# Models


def convolution(channels, out, size=3, stride=1, groups=1):
    """Return a convolution that keeps an image's size, or halves it, with its batch norm."""
    conv = nn.Conv2d(channels, out, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out))


def depthwise_cnn(shape):
    """Return a CNN like MobileNet (Howard et al., 2017) for images [channels, height, width].

    Convolutions are depthwise and pointwise in turn.
    """
    layers = [convolution(shape[0], 32, stride=2), nn.ReLU()]
    for i, o, stride in ((32, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1)):
        layers += [convolution(i, i, stride=stride, groups=i), nn.ReLU()]
        layers += [convolution(i, o, size=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


class BasicBlock(nn.Module):
    """The residual block of ResNet-18 (He et al., 2016)."""

    def __init__(self, channels, out, stride):
        super().__init__()
        self.first = convolution(channels, out, stride=stride)
        self.second = convolution(out, out)
        same = channels == out and stride == 1
        self.shortcut = nn.Identity() if same else convolution(channels, out, 1, stride)

    def forward(self, x):
        y = F.relu(self.first(x))
        return F.relu(self.second(y) + self.shortcut(x))


def resnet(shape):
    """Return a ResNet with three BasicBlocks for images [channels, height, width]."""
    layers = [convolution(shape[0], 16), nn.ReLU()]
    layers += [BasicBlock(i, o, stride) for i, o, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2))]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def mlp(shape):
    """Return the paper's MLP for images [channels, height, width]."""
    widths = models.TRAINING["CIFAR10" if shape[0] == 3 else "MNIST"].widths
    layers = [nn.Flatten()]
    for i, o in pairwise(widths):
        layers += [nn.Linear(i, o, bias=False), models.LeakyReLU()]
    return nn.Sequential(*layers[:-1])


class Block(nn.Module):
    """A block of GPT-2: attention and an MLP with GELU, each behind a layer norm."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        packed = self.attention(self.norm_1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = packed.movedim(-2, -4).unbind(-2)  # each [n, heads, length, size]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(y.transpose(-3, -2).flatten(-2))
        return x + self.contract(F.gelu(self.expand(self.norm_2(x))))


class GPT(nn.Module):
    """A small GPT: bytes [n, length] to logits [n, length, 256]; its head is tied."""

    def __init__(self, shape, width=128, heads=4, layers=4):
        super().__init__()
        self.token = nn.Embedding(256, width)
        self.position = nn.Embedding(*shape, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        self.head.weight = self.token.weight
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, tokens):
        positions = torch.arange(tokens.shape[-1], device=tokens.device)
        x = self.token(tokens) + self.position(positions)
        return self.head(self.norm(self.blocks(x)))


NETWORKS = {  # those that take longest come first
    "gpt": Network("GPT, Python's library", "text", GPT, 16, 1, 2e-3),
    "resnet-cifar10": Network("ResNet, CIFAR-10", "CIFAR10", resnet, 64, 8, 3e-3),
    "resnet-fashion": Network("ResNet, Fashion-MNIST", "FashionMNIST", resnet, 64, 8, 3e-3),
    "cnn-cifar10": Network("CNN, CIFAR-10", "CIFAR10", depthwise_cnn, 64, 8, 3e-3),
    "cnn-fashion": Network("CNN, Fashion-MNIST", "FashionMNIST", depthwise_cnn, 64, 8, 3e-3),
    "mlp-cifar10": Network("MLP, CIFAR-10", "CIFAR10", mlp, 64, 8, 3e-3),
    "mlp-fashion": Network("MLP, Fashion-MNIST", "FashionMNIST", mlp, 64, 8, 3e-3),
    "mlp-mnist": Network("MLP, MNIST", "MNIST", mlp, 64, 8, 3e-3),
}


# Data


def data_file(args):
    """Return the file with all data; where it is, the datasets are not needed."""
    return args.output / "logs" / "networks" / f"data{'-sample' * args.sample}.npz"


@functools.cache
def data_version(path):
    """Return a hash of the file with all data."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def make_data(args):
    """Write the images of each dataset, and windows of text, as bytes, unless they are there."""
    if data_file(args).exists():
        return
    arrays = {}
    for name in TITLES:
        data = load_data(name, args)
        n = min(IMAGES["train"], 4 * len(data.x_train) // 5)
        held_out = slice(n, n + IMAGES["calibration"])
        arrays |= images(f"{name}_train", data.x_train[:n], data.y_train[:n])
        arrays |= images(f"{name}_calibration", data.x_train[held_out], data.y_train[held_out])
        arrays |= images(f"{name}_test", *(part[: IMAGES["test"]] for part in data[3:]))
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    train = [file for i, file in enumerate(files) if i % 10 > 1]
    for part, chosen in ("train", train), ("calibration", files[1::10]), ("test", files[::10]):
        text = np.frombuffer(b"".join(file.read_bytes() for file in chosen), np.uint8)
        count = WINDOWS[part] // (10 if args.sample and part == "train" else 1)
        windows = text[: count * (LENGTH + 1)].reshape(-1, LENGTH + 1)
        arrays |= {f"text_{part}_x": windows[:, :-1], f"text_{part}_y": windows[:, 1:]}
    with results.whole_file(data_file(args)) as file:
        np.savez_compressed(file, **arrays)


def images(name, x, y):
    """Return images x: [N, d] in [0, 1] and labels y: [N] as arrays of bytes."""
    side = 32 if x.shape[1] == 3072 else 28
    pixels = (255 * x).round().byte().reshape(len(x), -1, side, side)
    return results.as_arrays({f"{name}_x": pixels, f"{name}_y": y.byte()})


def load(dataset, part, args):
    """Return inputs x, images [N, channels, side, side] or bytes [N, LENGTH], and targets y.

    Raises UserError if the file with all data is damaged.
    """
    path = data_file(args)
    content = io.BytesIO(path.read_bytes())  # an error of the disk is not a damaged file
    try:
        with np.load(content) as arrays:
            x, y = (arrays[f"{dataset}_{part}_{key}"] for key in "xy")
    except Exception:  # zipfile and NumPy raise many kinds
        sentence = f"{path} is damaged: delete it, then run the same command again."
        raise results.UserError(sentence) from None
    x, y = (torch.tensor(values, device=args.device) for values in (x, y))
    return (x.long() if dataset == "text" else x.float() / 255), y.long()


# Training


def loss_of(model, batch):
    """Return the mean cross-entropy of a batch (x, y)."""
    x, y = batch
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


def folded(model):
    """Return a copy for evaluation, with batch norms folded into the convolutions before them."""
    model = copy.deepcopy(model).eval()
    for module in list(model.modules()):
        if isinstance(module, nn.Sequential) and isinstance(module[-1], nn.BatchNorm2d):
            module[0], module[1] = fuse_conv_bn_eval(*module), nn.Identity()
    return model


def train(network, x, y, seed):
    """Return the network after training on x, y from weights that a seed draws."""
    torch.manual_seed(seed)
    model = network.build(x.shape[1:]).to(x.device)
    steps = network.epochs * (len(x) // network.batch)
    optimizer = torch.optim.AdamW(model.parameters(), network.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, network.lr, steps)
    for _ in range(network.epochs):
        order = torch.randperm(len(x)).to(x.device)
        for rows in order[: len(x) // network.batch * network.batch].split(network.batch):
            loss = loss_of(model, (x[rows], y[rows]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if not loss.isfinite():
            step = schedule.last_epoch
            raise results.UserError(f"{network.title}, seed {seed}: not finite at step {step}.")
    return folded(model)


@torch.no_grad()
def evaluate(model, x, y):
    """Return a model's mean loss and its accuracy."""
    logits = torch.cat([model(part) for part in x.split(250)])
    loss = F.cross_entropy(logits.flatten(0, -2), y.flatten())
    return float(loss), float((logits.argmax(-1) == y).float().mean())
