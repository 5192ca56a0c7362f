"""Modules as people write them, each with the symmetries that theory gives."""

from collections import Counter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from parameter_symmetries import LINEAR
from symmetric_models import GPT, MODELS, Functional, case


class Case(NamedTuple):
    """A module, and what can be found in it.

    units: how many hidden units can be rescaled on their own. blocks: {d: how many GL(d)}, of units
    that may also be mixed. The outputs must stay on the inputs and on the others.
    """

    name: str
    module: nn.Module
    inputs: tuple
    others: tuple
    units: int
    blocks: dict = {}  # noqa: RUF012


def units_of(symmetry):
    return sum(group.count * group.size for group in symmetry)


def blocks_of(symmetry):
    blocks = Counter()
    for group in symmetry:
        blocks[group.size] += group.count * (group.kind == LINEAR)
    return +blocks


def linear(*sizes):
    return {f"l{k}": nn.Linear(i, o) for k, (i, o) in enumerate(zip(sizes, sizes[1:]))}


def two_layers(between, i=8, hidden=12, o=4):
    """Return a module of two linear layers with a function of the hidden units between them."""
    return Functional(lambda m, x: m.l1(between(m.l0(x))), **linear(i, hidden, o))


def on_rows(name, module, *found, d=8):
    """Return the case of a module whose inputs are rows of d numbers."""
    return Case(name, module, (torch.randn(5, d),), (torch.randn(9, d),), *found)


def on_images(name, module, *found):
    """Return the case of a module whose inputs are images; others are larger."""
    return Case(name, module, (torch.rand(4, 3, 16, 16),), (torch.rand(6, 3, 20, 20),), *found)


def on_sequences(name, module, d, *found):
    """Return the case of a module whose inputs are sequences; others are longer."""
    return Case(name, module, (torch.randn(2, 6, d),), (torch.randn(3, 9, d),), *found)


def on_tokens(name, module, *found):
    inputs, others = (torch.randint(50, (2, 6)),), (torch.randint(50, (3, 11)),)
    return Case(name, module, inputs, others, *found)


def all_cases():
    torch.manual_seed(0)
    makers = by_hand, feed_forward, convolutional, transformers, low_rank, others
    return [example for maker in makers for example in maker()]


def by_hand():
    for name in MODELS:
        model, symmetry, x, _ = case(name, torch.float32, training=False)
        yield Case(name, model, (x[:4],), (x[4:],), units_of(symmetry), blocks_of(symmetry))


def feed_forward():
    yield on_rows("clamp(min=0)", two_layers(lambda x: x.clamp(min=0)), 12)
    maxout = {"l0": nn.Linear(8, 24), "l1": nn.Linear(12, 4)}
    maxout = Functional(lambda m, x: m.l1(m.l0(x).view(-1, 12, 2).amax(-1)), **maxout)
    yield on_rows("maxout", maxout, 12)
    glu = {"l0": nn.Linear(8, 24), "l1": nn.Linear(12, 4)}
    yield on_rows("GLU", Functional(lambda m, x: m.l1(F.glu(m.l0(x))), **glu), 12)
    yield on_rows("sigmoid", two_layers(torch.sigmoid), 0)
    layers = linear(8, 16, 4) | {"scale": nn.Parameter(torch.rand(16))}
    layers["few"] = nn.Parameter(torch.rand(4))  # is fixed: it would leave 4 scales for 16 units

    def scaled(m, x):
        y = F.relu(m.l0(x) * m.scale).unflatten(-1, (4, 4)) * m.few
        return m.l1(y.flatten(-2))

    name = "LayerScale: before and behind it"
    yield on_rows(name, Functional(scaled, **layers), 16 + 16)
    beside = Functional(lambda m, x: (m.l0(x), m.l1(x)), l0=nn.Linear(8, 12), l1=nn.Linear(8, 12))

    def squares(m, x):
        a, b = m.units(x)
        return m.l2(b) + m.l2(F.relu(a).square())

    yield on_rows("units and squares", Functional(squares, units=beside, l2=nn.Linear(12, 4)), 12)
    normalised = two_layers(F.relu, 20, 16, 5)
    parametrizations.weight_norm(normalised.l0)
    yield on_rows("weight_norm: by its g", normalised, 16, d=20)


class BasicBlock(nn.Module):
    """A residual block of a ResNet."""

    def __init__(self, i, o, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        shortcut = [nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o)] if i != o else []
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def resnet():
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    layers = {"a": BasicBlock(8, 8), "b": BasicBlock(8, 16, 2), "fc": nn.Linear(16, 10)}
    return Functional(lambda m, x: m.fc(m.b(m.a(m.stem(x))).mean((2, 3))), stem=stem, **layers)


def convolutional():
    conv, relu = nn.Conv2d, F.relu
    # the stem and the first block share 8 (residual) and it has 8 inside; the second block has 16
    # outside (of two norms) and 16 inside
    yield on_images("ResNet, evaluation", resnet().eval(), 48)
    yield on_images("ResNet, training", resnet(), 48)

    def three(b, i, o):
        layers = {"a": conv(3, i, 3), "b": b, "c": conv(o, 4, 1)}
        return Functional(lambda m, x: m.c(relu(m.b(relu(m.a(x))))), **layers)

    yield on_images("grouped convolution", three(conv(8, 12, 3, groups=2), 8, 12), 8 + 12)
    transposed = nn.ConvTranspose2d(8, 8, 3, groups=8)
    yield on_images("depthwise transposed convolution", three(transposed, 8, 8), 16)

    def unet(m, x):
        a = relu(m.a(x))
        return m.c(torch.cat([a, relu(m.up(relu(m.b(F.max_pool2d(a, 2)))))], 1))

    layers = {"a": conv(3, 8, 3, padding=1), "b": conv(8, 16, 3, padding=1)}
    layers |= {"up": nn.ConvTranspose2d(16, 8, 2, 2), "c": conv(16, 4, 3, padding=1)}
    yield on_images("U-Net", Functional(unet, **layers), 8 + 16 + 8)

    def dense(m, x):
        y = torch.cat([x, relu(m.a(x))], 1)
        return m.c(torch.cat([y, relu(m.b(y))], 1))

    layers = {"a": conv(3, 4, 3, padding=1), "b": conv(7, 4, 3, padding=1), "c": conv(11, 5, 1)}
    yield on_images("DenseNet: concatenation twice", Functional(dense, **layers), 4 + 4)


def tied_gpt():
    model = GPT(layers=1, width=32, heads=4, vocabulary=50, length=16)
    model.head.weight = model.tokens.weight
    return model


def transformers():
    # the norm before attention 32, queries with keys 32, values with the output 32, the norm before
    # the MLP 32; GELU has none, nor has the last norm
    yield on_tokens("GPT, tied head", tied_gpt(), 128, {8: 8})

    def swiglu(m, x):
        y = m.norm(x)
        return x + m.down(F.silu(m.gate(y)) * m.up(y))

    layers = {"norm": nn.LayerNorm(16), "gate": nn.Linear(16, 24), "up": nn.Linear(16, 24)}
    module = Functional(swiglu, **layers, down=nn.Linear(24, 16))
    yield on_sequences("SwiGLU: up against down, and the norm", module, 16, 16 + 24)
    layer = nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    yield on_sequences("nn.TransformerEncoder", encoder, 16, 192, {4: 16})
    decoder = nn.Transformer(16, 4, 1, 1, 32, 0.0, batch_first=True)
    inputs, others = ((torch.randn(2, n, 16), torch.randn(2, n - 1, 16)) for n in (5, 7))
    # three attentions with four heads, each twice, and the units of two ReLUs
    yield Case("nn.Transformer", decoder, inputs, others, 6 * 16 + 2 * 32, {4: 24})


def low_rank():
    def merged(m, x):
        return m.out(F.gelu(F.linear(x, m.w.weight + m.B @ m.A, m.w.bias)))

    layers = {"w": nn.Linear(16, 16), "out": nn.Linear(16, 3)}
    layers |= {"A": nn.Parameter(torch.randn(4, 16)), "B": nn.Parameter(torch.randn(16, 4))}
    yield on_rows("LoRA, merged in forward", Functional(merged, **layers), 4, {4: 1}, d=16)


def mixture_of_experts(m, x):
    """Three experts, of which the router takes two for each sample."""
    weights, chosen = m.router(x).softmax(-1).topk(2)
    y = torch.zeros_like(x)
    for k, expert in enumerate(m.experts):
        sample, rank = (chosen == k).nonzero(as_tuple=True)
        y = y.index_add(0, sample, weights[sample, rank, None] * expert(x[sample]))
    return y


def others():
    experts = [nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)) for _ in range(3)]
    layers = {"router": nn.Linear(8, 3), "experts": nn.ModuleList(experts)}
    module = Functional(mixture_of_experts, **layers)
    yield Case("experts", module, (torch.randn(9, 8),), (torch.randn(20, 8),), 3 * 12)
    graph = Functional(lambda m, x, A: A @ m.l1(F.relu(A @ m.l0(x))), **linear(8, 16, 4))
    inputs, others = ((torch.randn(n, 8), torch.rand(n, n)) for n in (6, 9))
    yield Case("graph convolution", graph, inputs, others, 16)
    layers = {"bag": nn.EmbeddingBag(50, 8, mode="mean"), "out": nn.Linear(8, 3)}
    bag = Functional(lambda m, rows: m.out(F.relu(m.bag(rows))), **layers)
    yield on_tokens("EmbeddingBag", bag, 8)
    for kind in (nn.LSTM, nn.GRU):  # tanh and sigmoid fix everything
        layers = {"cell": kind(8, 16, batch_first=True), "out": nn.Linear(16, 5)}
        module = Functional(lambda m, x: m.out(m.cell(x)[0][:, -1]), **layers)
        yield on_sequences(kind.__name__, module, 8, 0)
