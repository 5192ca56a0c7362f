"""Modules as people write them, each with the symmetries that theory gives."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations


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
    blocks: dict


class Functional(nn.Module):
    """A module of layers, with a function of itself and the input as its forward pass."""

    def __init__(self, function, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.function = function

    def forward(self, *inputs):
        return self.function(self, *inputs)


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


class GPT(nn.Module):
    """A block of nanoGPT with packed queries, keys and values, and a tied head."""

    def __init__(self, d=32, heads=4, vocabulary=50):
        super().__init__()
        self.heads = heads
        self.wte, self.ln1, self.ln2 = nn.Embedding(vocabulary, d), nn.LayerNorm(d), nn.LayerNorm(d)
        self.attn, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.fc, self.fc2 = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.head = nn.Linear(d, vocabulary, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, tokens):
        x = self.wte(tokens)
        parts = self.attn(self.ln1(x)).chunk(3, -1)
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return self.head(x + self.fc2(F.gelu(self.fc(self.ln2(x)))))


class MixtureOfExperts(nn.Module):
    """Three experts, of which the router takes two for each sample."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(8, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)) for _ in range(3)
        )

    def forward(self, x):
        weights, chosen = self.router(x).softmax(-1).topk(2)
        y = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            sample, rank = (chosen == k).nonzero(as_tuple=True)
            if len(sample):
                y = y.index_add(0, sample, weights[sample, rank, None] * expert(x[sample]))
        return y


class EinsumAttention(nn.Module):
    """Attention by einsum, with parameters of three axes."""

    def __init__(self, d=8, heads=2, size=4):
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(d, heads, size) / 3) for _ in range(3))
        self.o = nn.Parameter(torch.randn(heads, size, d) / 3)

    def forward(self, x):
        q, k, v = (torch.einsum("btd,dhe->bhte", x, w) for w in (self.q, self.k, self.v))
        p = torch.einsum("bhte,bhse->bhts", q, k).softmax(-1)
        return torch.einsum("bhte,hed->btd", p @ v, self.o)


def linear(*sizes):
    return {f"l{k}": nn.Linear(i, o) for k, (i, o) in enumerate(zip(sizes, sizes[1:]))}


def on_rows(name, function, layers, units, d=8, blocks=None):
    """Return the case of a Functional whose inputs are rows of d numbers."""
    inputs, others = (torch.randn(5, d),), (torch.randn(9, d),)
    return Case(name, Functional(function, **layers), inputs, others, units, blocks or {})


def on_images(name, module, units, count=2, more=3):
    """Return the case of a module whose inputs are so many images; others are larger."""
    inputs, others = (torch.rand(count, 3, 16, 16),), (torch.rand(more, 3, 20, 20),)
    return Case(name, module, inputs, others, units, {})


def on_sequences(name, module, units, d, blocks=None):
    """Return the case of a module whose inputs are sequences; others are longer."""
    inputs, others = (torch.randn(2, 6, d),), (torch.randn(3, 9, d),)
    return Case(name, module, inputs, others, units, blocks or {})


def on_tokens(name, module, units, blocks=None):
    inputs, others = (torch.randint(50, (2, 6)),), (torch.randint(50, (3, 11)),)
    return Case(name, module, inputs, others, units, blocks or {})


def all_cases():
    torch.manual_seed(0)
    return [*feed_forward(), *convolutional(), *transformers(), *low_rank(), *others()]


def feed_forward():
    def two(activation):
        return lambda m, x: m.l1(activation(m.l0(x)))

    def mlp(m, x):
        return m.l2(F.relu(m.l1(F.relu(m.l0(x)))))

    yield on_rows("MLP with F.relu", mlp, linear(20, 16, 12, 5), 16 + 12, d=20)
    yield on_rows("clamp(min=0)", two(lambda x: x.clamp(min=0)), linear(8, 12, 4), 12)
    yield on_rows("squared ReLU", two(lambda x: F.relu(x).square()), linear(8, 12, 4), 12)
    maxout = {"l0": nn.Linear(8, 24), "l1": nn.Linear(12, 4)}
    yield on_rows("maxout", two(lambda x: x.view(-1, 12, 2).amax(-1)), maxout, 12)
    glu = {"l0": nn.Linear(8, 24), "l1": nn.Linear(12, 4)}
    yield on_rows("GLU: the gate is fixed", two(F.glu), glu, 12)

    def bottleneck(m, x):
        return m.l2(F.gelu(m.l1(m.l0(x))))

    layers = linear(8, 3, 12, 4)
    yield on_rows("bottleneck without activation", bottleneck, layers, 3, blocks={3: 1})
    yield on_rows("sigmoid", two(torch.sigmoid), linear(8, 12, 4), 0)

    def scaled(m, x):
        return m.l1(F.relu(m.l0(x) * m.scale))

    layers = linear(8, 16, 4) | {"scale": nn.Parameter(torch.rand(16))}
    yield on_rows("LayerScale: before and behind it", scaled, layers, 16 + 16)
    layers = linear(20, 16, 5)
    parametrizations.weight_norm(layers["l0"])
    yield on_rows("weight_norm: by its g", two(F.relu), layers, 16, d=20)


def convolutional():
    conv, relu = nn.Conv2d, F.relu

    def resnet():
        stem = nn.Sequential(conv(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        layers = {"a": BasicBlock(8, 8), "b": BasicBlock(8, 16, 2), "fc": nn.Linear(16, 10)}
        return Functional(lambda m, x: m.fc(m.b(m.a(m.stem(x))).mean((2, 3))), stem=stem, **layers)

    # the stem and the first block share 8 (residual) and it has 8 inside; the second block has 16
    # outside (of two norms) and 16 inside
    yield on_images("ResNet, evaluation", resnet().eval(), 48)
    yield on_images("ResNet, training", resnet(), 48, 4, 6)

    def three(b, i, o):
        layers = {"a": conv(3, i, 3), "b": b, "c": conv(o, 4, 1)}
        return Functional(lambda m, x: m.c(relu(m.b(relu(m.a(x))))), **layers)

    yield on_images("depthwise convolution", three(conv(8, 8, 3, groups=8), 8, 8), 16)
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

    def heads(m, x):
        y = relu(m.a(x))
        return m.box(y).mean((2, 3)), m.label(y).mean((2, 3))

    layers = {"a": conv(3, 8, 3), "box": conv(8, 4, 1), "label": conv(8, 6, 1)}
    yield on_images("one layer read by two heads", Functional(heads, **layers), 8)


def transformers():
    # the norm before attention 32, queries with keys 32, values with the output 32, the norm before
    # the MLP 32; GELU has none
    yield on_tokens("GPT, tied head", GPT(), 128, {8: 8})

    def swiglu(m, x):
        y = m.norm(x)
        return x + m.down(F.silu(m.gate(y)) * m.up(y))

    layers = {"norm": nn.LayerNorm(16), "gate": nn.Linear(16, 24), "up": nn.Linear(16, 24)}
    module = Functional(swiglu, **layers, down=nn.Linear(24, 16))
    yield on_sequences("SwiGLU: up against down, and the norm", module, 16 + 24, 16)
    layer = nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    yield on_sequences("nn.TransformerEncoder", encoder, 192, 16, {4: 16})
    name = "einsum attention, parameters of three axes"
    yield on_sequences(name, EinsumAttention(), 16, 8, {4: 4})


def low_rank():
    def beside(m, x):
        return m.out(F.gelu(m.w(x) + x @ m.A.T @ m.B.T / 2))

    def merged(m, x):
        return m.out(F.gelu(F.linear(x, m.w.weight + m.B @ m.A, m.w.bias)))

    for name, function in (("LoRA", beside), ("LoRA, merged in forward", merged)):
        layers = {"w": nn.Linear(16, 16), "out": nn.Linear(16, 3)}
        layers |= {"A": nn.Parameter(torch.randn(4, 16)), "B": nn.Parameter(torch.randn(16, 4))}
        yield on_rows(name, function, layers, 4, d=16, blocks={4: 1})


def others():
    inputs, more = (torch.randn(9, 8),), (torch.randn(20, 8),)
    yield Case("mixture of experts", MixtureOfExperts(), inputs, more, 3 * 12, {})

    def graph(m, x, A):
        return A @ m.l1(F.relu(A @ m.l0(x)))

    inputs, more = ((torch.randn(n, 8), torch.rand(n, n)) for n in (6, 9))
    yield Case("graph convolution", Functional(graph, **linear(8, 16, 4)), inputs, more, 16, {})

    def bag(m, rows):
        return m.out(F.relu(m.bag(rows)))

    layers = {"bag": nn.EmbeddingBag(50, 8, mode="mean"), "out": nn.Linear(8, 3)}
    yield on_tokens("EmbeddingBag", Functional(bag, **layers), 8)
    for kind in (nn.LSTM, nn.GRU):  # tanh and sigmoid fix everything
        layers = {"cell": kind(8, 16, batch_first=True), "out": nn.Linear(16, 5)}
        module = Functional(lambda m, x: m.out(m.cell(x)[0][:, -1]), **layers)
        yield on_sequences(kind.__name__, module, 0, 8)
