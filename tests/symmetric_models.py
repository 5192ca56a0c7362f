"""Modules with their symmetries written by hand, of every kind of group, and what theory gives."""

import torch
import torch.nn.functional as F
from torch import nn

from parameter_symmetries.groups import LINEAR, RESCALING, Axis, Group


class Functional(nn.Module):
    """A module of layers, with a function of itself and the input as its forward pass."""

    def __init__(self, function, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.function = function

    def forward(self, *inputs, **options):
        return self.function(self, *inputs, **options)


def units(size, made, read):
    """Return the group that rescales units; made, read: [(name, axis)] or [(name, axis, power)]."""
    axes = [Axis(*axis) for axis in made]
    axes += [Axis(name, dim, *(power or [-1])) for name, dim, *power in read]
    return Group(RESCALING, size, 1, axes)


def mlp():
    model = nn.Sequential(nn.Linear(12, 9), nn.LeakyReLU(0.1), nn.Linear(9, 7), nn.ReLU())
    model.extend([nn.Dropout(0.2), nn.Linear(7, 5)])
    first = units(9, [("0.weight", 0), ("0.bias", 0)], [("2.weight", 1)])
    second = units(7, [("2.weight", 0), ("2.bias", 0)], [("5.weight", -1)])
    return model, [first, second]


def linear():
    """Two GL(d) that share a matrix, as its rows and its columns."""
    model = nn.Sequential(nn.Linear(12, 4), nn.Linear(4, 3), nn.Linear(3, 5, bias=False))
    first = [Axis("0.weight", 0), Axis("0.bias", 0), Axis("1.weight", 1, -1)]
    second = [Axis("1.weight", 0), Axis("1.bias", 0), Axis("2.weight", 1, -1)]
    return model, [Group(LINEAR, 1, 4, first), Group(LINEAR, 1, 3, second)]


def cnn():
    """With batch norm, a depthwise convolution, and pixels that follow one another per channel."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3), nn.LeakyReLU(), nn.Conv2d(6, 6, 2, groups=6), nn.ReLU(),
        nn.Flatten(), nn.Linear(24, 5),
    )  # fmt: skip
    symmetry = [
        units(4, [("1.weight", 0), ("1.bias", 0)], [("4.weight", 1)]),
        units(6, [("4.weight", 0), ("4.bias", 0)], [("6.weight", 0)]),
        units(6, [("6.weight", 0), ("6.bias", 0)], [("9.weight", 1)]),
    ]
    return model, symmetry


def squared():
    activation = Functional(lambda _, x: F.relu(x) ** 2)
    model = nn.Sequential(nn.Linear(12, 8), activation, nn.Linear(8, 5))
    return model, [units(8, [("0.weight", 0), ("0.bias", 0)], [("2.weight", 1, -2)])]


def lora():
    """A frozen linear layer with a low-rank update, and a head."""
    layers = {"frozen": nn.Linear(12, 8).requires_grad_(False), "head": nn.Linear(8, 5)}
    layers |= {"A": nn.Parameter(torch.randn(3, 12)), "B": nn.Parameter(torch.randn(8, 3) / 4)}

    def forward(m, x):
        return m.head((m.frozen(x) + x @ m.A.mT @ m.B.mT).tanh())

    symmetry = [Group(LINEAR, 1, 3, [Axis("A", 0), Axis("B", 1, -1)])]
    return Functional(forward, **layers), symmetry


def grouped_queries(width=8, heads=4, shared=2, d=3):
    """Four heads of queries on two of keys and values, with weights of three axes."""
    layers = {"norm": nn.LayerNorm(width), "q": nn.Parameter(torch.randn(width, heads, d) / 3)}
    layers["kv"] = nn.Linear(width, 2 * shared * d)
    layers["out"] = nn.Parameter(torch.randn(heads, d, width) / 3)
    layers["head"] = nn.Linear(width, 5)

    def forward(m, x):
        y = m.norm(x)
        q = torch.einsum("bnc,chd->bhnd", y, m.q)
        k, v = m.kv(y).unflatten(-1, (2, 2, -1)).permute(2, 0, 3, 1, 4).repeat_interleave(2, 2)
        y = F.scaled_dot_product_attention(q, k, v)
        return m.head((x + torch.einsum("bhnd,hdc->bnc", y, m.out)).mean(1))

    k, v = torch.arange(12).view(2, 2, 3)
    keys = [Axis("q", (1, 2)), Axis("kv.weight", 0, -1, k), Axis("kv.bias", 0, -1, k)]
    values = [Axis("kv.weight", 0, 1, v), Axis("kv.bias", 0, 1, v)]
    values.append(Axis("out", (0, 1), -1, None, torch.tensor([0, 0, 1, 1])))
    gains = units(8, [("norm.weight", 0), ("norm.bias", 0)], [("q", 0), ("kv.weight", 1)])
    heads = [Group(LINEAR, 2, 3, keys), Group(LINEAR, 2, 3, values)]
    return Functional(forward, **layers), [gains, *heads]


class Block(nn.Module):
    """A layer of a GPT, with packed queries, keys and values."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc, self.fc_2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        parts = self.attn(self.ln_1(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return x + self.fc_2(F.gelu(self.fc(self.ln_2(x))))


class GPT(nn.Module):
    """A GPT of nanoGPT's kind; the head is not the embedding."""

    def __init__(self, layers=4, width=256, heads=8, vocabulary=256, length=256):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.ln, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln(x))


def gpt(**sizes):
    """The gains of its norms with what reads them, and GL(d) of its heads, twice a layer."""
    model = GPT(**sizes)
    width, heads = len(model.ln.weight), model.blocks[0].heads
    q, k, v = torch.arange(3 * width).view(3, heads, -1)
    symmetry = [units(width, [("ln.weight", 0), ("ln.bias", 0)], [("head.weight", 1)])]
    for n in range(len(model.blocks)):
        block = f"blocks.{n}."
        for norm, reader in (("ln_1", "attn"), ("ln_2", "fc")):
            made = [(f"{block}{norm}.weight", 0), (f"{block}{norm}.bias", 0)]
            symmetry.append(units(width, made, [(f"{block}{reader}.weight", 1)]))
        packed = f"{block}attn.weight", f"{block}attn.bias"
        queries, values = ([Axis(name, 0, 1, rows) for name in packed] for rows in (q, v))
        keys = [Axis(name, 0, -1, k) for name in packed]
        output = Axis(f"{block}proj.weight", 1, -1)
        symmetry.append(Group(LINEAR, heads, width // heads, queries + keys))
        symmetry.append(Group(LINEAR, heads, width // heads, [*values, output]))
    return model, symmetry


MODELS = {
    "mlp": mlp,
    "linear": linear,
    "cnn": cnn,
    "squared": squared,
    "lora": lora,
    "grouped_queries": grouped_queries,
    "gpt": lambda: gpt(layers=2, width=8, heads=2, vocabulary=5, length=6),
}
SHAPES = {"cnn": (3, 10, 10), "grouped_queries": (6, 8), "gpt": (6,)}


def case(name, dtype=torch.float64, training=True, n=20):
    """Return a model with none of its weights 0 or 1, its symmetry, inputs and labels."""
    torch.manual_seed(0)
    model, symmetry = MODELS[name]()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    shape = n, *SHAPES.get(name, (12,))
    x = torch.randint(5, shape) if name == "gpt" else torch.randn(shape).to(dtype)
    y = torch.randint(5, shape if name == "gpt" else (n,))
    return model.to(dtype).train(training), symmetry, x, y


def loss_of(outputs, y):
    return F.cross_entropy(outputs.flatten(0, -2), y.flatten())
