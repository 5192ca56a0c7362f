"""Teleports of any torch module: outputs stay, |∇L|² grows, state moves along, errors are named."""

import pytest
import torch
from torch import nn

import models
import teleportation
from module_symmetry import (
    Axis,
    Group,
    act_on,
    gradient_norm,
    mean_perturbed_loss,
    move,
    random_elements,
    symmetry_of,
    teleport_module,
    teleported,
)
from teleportation import LINEAR, RESCALING

loss_of = nn.CrossEntropyLoss()


class LowRank(nn.Module):
    """A frozen linear layer with a low-rank update (LoRA), and a head."""

    def __init__(self):
        super().__init__()
        self.frozen, self.head = nn.Linear(12, 8).requires_grad_(False), nn.Linear(8, 5)
        self.A, self.B = nn.Parameter(torch.randn(3, 12)), nn.Parameter(torch.randn(8, 3) / 4)

    def forward(self, x):
        return self.head((self.frozen(x) + x @ self.A.mT @ self.B.mT).tanh())


def mlp():
    return nn.Sequential(
        nn.Linear(12, 9), nn.LeakyReLU(0.1), nn.Linear(9, 7), nn.ReLU(),
        nn.Dropout(0.2), nn.Linear(7, 5),
    )  # fmt: skip


def cnn():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Sequential(nn.Conv2d(4, 6, 3), nn.LeakyReLU(), nn.AvgPool2d(2)), nn.Flatten(),
        nn.Linear(24, 10), nn.Identity(), nn.Linear(10, 5),
    )  # fmt: skip


def transformer(**options):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **options)
    return nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(24, 5))


LORA = [Group(LINEAR, 3, V=[Axis("A", 0)], U=[Axis("B", 1)])]
SHAPES = {"mlp": (12,), "cnn": (3, 12, 12), "transformer": (3, 8), "lora": (12,)}
MODELS = {"mlp": mlp, "cnn": cnn, "transformer": transformer, "lora": LowRank}


def case(name, dtype, training=True):
    """Return a model, its symmetry, and a batch."""
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype).train(training)
    x, y = torch.randn(20, *SHAPES[name], dtype=dtype), torch.randint(5, (20,))
    return model, LORA if name == "lora" else symmetry_of(model), x, y


def outputs_of(model, x):
    """Return a model's outputs with the dropout masks of one seed, and its buffers as they were."""
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    torch.manual_seed(7)
    out = model(x).detach()
    model.load_state_dict(buffers, strict=False)
    return out


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", MODELS)
def test_a_teleport_raises_the_gradient_and_keeps_the_outputs(name, dtype, bound, training):
    model, symmetry, x, y = case(name, dtype, training)
    before, state = outputs_of(model, x), {k: b.clone() for k, b in model.named_buffers()}
    random_state = torch.get_rng_state()
    path = teleport_module(model, symmetry, gradient_norm(model, loss_of, x, y), x, 0.05, 10)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(b, state[k]) for k, b in model.named_buffers())
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert path["objective"][-1] > 1.0001 * path["objective"][0]
    assert (outputs_of(model, x) - before).abs().max() < bound


@pytest.mark.parametrize("name", MODELS)
def test_the_objective_of_a_module_is_autograds(name):
    model, symmetry, x, y = case(name, torch.float64, training=False)
    path = teleported(model, symmetry, gradient_norm(model, loss_of, x, y), x, 0.0, 1)[1]
    trained = [p for p in model.parameters() if p.requires_grad]
    gradient = torch.autograd.grad(loss_of(model(x), y), trained)
    assert path["objective"][0].isclose(sum((g**2).sum() for g in gradient))


def test_on_an_mlp_this_and_the_core_agree():
    torch.manual_seed(0)
    widths = (12, 9, 7, 5)
    weights = [w.double() for w in models.init_weights(widths, 3)]
    x, y = torch.randn(12, 20, dtype=torch.float64), torch.randint(5, (20,))
    σ = models.LeakyReLU()
    moved, core = teleportation.teleport(
        weights, x, y, 0.1, 5, σ, action=RESCALING, return_path=True
    )
    model = nn.Sequential(
        nn.Linear(12, 9, False), σ, nn.Linear(9, 7, False), σ, nn.Linear(7, 5, False)
    ).double()
    for p, w in zip(model.parameters(), weights):
        p.data = w.clone()
    objective = gradient_norm(model, loss_of, x.T, y)
    path = teleport_module(model, symmetry_of(model), objective, x.T, 0.1, 5)
    torch.testing.assert_close(path["objective"], core["objective"])
    for p, w in zip(model.parameters(), moved):
        torch.testing.assert_close(p.detach(), w)


def test_the_ascent_keeps_the_cores_rules():
    model, symmetry, x, y = case("mlp", torch.float64)
    objective = gradient_norm(model, loss_of, x, y)
    _, path = teleported(model, symmetry, objective, x, 1e6, 3, max_norm=0.01)
    for g in path["group_elements"]:
        norm = g.diagonal(dim1=-2, dim2=-1).log().norm()
        assert 0.005 < norm <= 0.0301
    start = path["objective"][0]
    _, path = teleported(model, symmetry, objective, x, 0.05, 50, stop=1.05 * start)
    assert len(path["objective"]) < 51 and path["objective"][-2] <= 1.05 * start
    assert path["objective"][-1] > 1.05 * start
    _, path = teleported(model, symmetry, objective, x, -0.05, 5)
    assert (path["objective"].diff() < 0).all()


def test_sharpness_and_any_function_of_the_parameters_are_objectives():
    model, symmetry, x, y = case("cnn", torch.float64)
    sharpness = mean_perturbed_loss(model, loss_of, x, y, radii=[0.5, 1.0])
    still = mean_perturbed_loss(model, loss_of, x, y, radii=[0.0])
    parameters = dict(model.named_parameters())
    assert still(parameters).isclose(loss_of(model(x), y))
    for objective in (sharpness, lambda p: (p["0.weight"] ** 2).sum() + (p["4.0.bias"] ** 2).sum()):
        _, path = teleported(model, symmetry, objective, x, -0.01, 3)
        assert path["objective"][-1] < path["objective"][0]


def test_groups_of_layers():
    found = {name: symmetry_of(MODELS[name]()) for name in ("mlp", "cnn")}
    assert [(g.action is LINEAR, g.size) for g in found["mlp"]] == [(False, 9), (False, 7)]
    assert [(g.action is LINEAR, g.size) for g in found["cnn"]] == [
        (False, 4), (False, 6), (True, 10),
    ]  # fmt: skip
    assert [axis.name for axis in found["cnn"][0].V] == ["1.weight", "1.bias"]
    assert not symmetry_of(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    depthwise = nn.Conv2d(4, 4, 3, groups=4)
    assert not symmetry_of(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), depthwise))
    tokens = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6, 2))
    assert not symmetry_of(tokens)  # flattened, a unit's entries do not follow one another
    residual = nn.Module()
    residual.inner = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 3)))
    names = [axis.name for g in symmetry_of(nn.Sequential(residual)) for axis in g.V + g.U]
    assert names == ["0.inner.0.weight", "0.inner.0.bias", "0.inner.1.1.weight"]
    relu, gelu = symmetry_of(transformer()), symmetry_of(transformer(activation="gelu"))
    assert (len(relu), len(gelu)) == (6, 4)


@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 4}, {"add_bias_kv": True}])
def test_attention_keeps_its_outputs_under_large_elements(options):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, **options).double()
    for p in attention.parameters():
        p.data.normal_()
    inputs = tuple(torch.randn(5, 3, d, dtype=torch.float64) for d in (8, *tuple(
        options.get(key, 8) for key in ("kdim", "vdim")
    )))  # fmt: skip
    symmetry, parameters = symmetry_of(attention), dict(attention.named_parameters())
    before = attention(*inputs)[0].detach()
    elements = random_elements(symmetry, [2.0] * 2, torch.Generator().manual_seed(0))
    elements = [g.double() for g in elements]
    moved = act_on(parameters, symmetry, elements)
    assert len([n for n, p in parameters.items() if not torch.equal(p, moved[n])]) >= 3
    move(attention, symmetry, moved, elements)
    torch.testing.assert_close(attention(*inputs)[0], before)


def train(model, optimizer, batches):
    for x, y in batches:
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["mlp", "transformer"])
def test_momentum_moves_as_the_gradients_do(name):
    """Its mean of past gradients is that of gradients taken at the moved iterates."""
    model, symmetry, x, _ = case(name, torch.float64, training=False)
    batches = [(x, torch.randint(5, (20,))) for _ in range(4)]
    elements = random_elements(symmetry, [0.5] * len(symmetry), torch.Generator().manual_seed(0))
    elements = [g.double() for g in elements]
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    expected = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for x, y in batches:
        moved = act_on(dict(model.named_parameters()), symmetry, elements)
        moved = {n: p.detach().requires_grad_() for n, p in moved.items()}
        loss = loss_of(torch.func.functional_call(model, moved, x), y)
        gradient = dict(zip(moved, torch.autograd.grad(loss, moved.values())))
        expected = {n: 0.9 * m + gradient[n] for n, m in expected.items()}
        train(model, optimizer, [(x, y)])
    parameters = act_on({n: p.detach() for n, p in model.named_parameters()}, symmetry, elements)
    move(model, symmetry, parameters, elements, optimizer)
    for n, p in model.named_parameters():
        torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], expected[n])
        assert torch.equal(p, parameters[n])


@pytest.mark.parametrize("optimizer", ["Adam", "RMSprop", "Adagrad", "AdamW"])
def test_squares_of_gradients_move_along_with_rescalings(optimizer):
    """At the moved parameters the same step is taken by an optimizer that was there all along."""
    model, symmetry, x, y = case("mlp", torch.float64, training=False)
    options = {"Adagrad": {}, "RMSprop": {"momentum": 0.9}}.get(optimizer, {"amsgrad": True})
    optimizer = getattr(torch.optim, optimizer)(model.parameters(), 1e-3, **options)
    train(model, optimizer, [(x, y)] * 2)
    elements = random_elements(symmetry, [0.5] * 2, torch.Generator().manual_seed(0))
    elements = [g.double() for g in elements]
    scale = elements[0].diagonal(dim1=-2, dim2=-1)[0]
    keys = [k for k, v in optimizer.state[model[0].weight].items() if v.dim() == 2]
    old = {k: optimizer.state[model[0].weight][k].clone() for k in keys}
    old_above = {k: optimizer.state[model[2].weight][k].clone() for k in keys}
    other = elements[1].diagonal(dim1=-2, dim2=-1)[0]
    move(model, symmetry, dict(model.named_parameters()), elements, optimizer)
    for k in keys:
        power = {"exp_avg": 1, "momentum_buffer": 0}.get(k, 2)
        new, above = (optimizer.state[model[i].weight][k] for i in (0, 2))
        torch.testing.assert_close(new, old[k] / scale[:, None] ** power)
        torch.testing.assert_close(above, old_above[k] * (scale / other[:, None]) ** power)
    assert len(keys) == {"RMSprop": 2, "Adagrad": 1}.get(type(optimizer).__name__, 3)


def test_state_is_kept_or_reset():
    model, symmetry, x, y = case("mlp", torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    train(model, optimizer, [(x, y)])
    old = optimizer.state[model[0].weight]["momentum_buffer"].clone()
    objective = gradient_norm(model, loss_of, x, y)
    teleport_module(model, symmetry, objective, x, 0.1, 2, optimizer, "kept")
    assert torch.equal(optimizer.state[model[0].weight]["momentum_buffer"], old)
    teleport_module(model, symmetry, objective, x, 0.1, 2, optimizer, "reset")
    assert not optimizer.state
    train(model, optimizer, [(x, y)])  # and goes on


class Tied(nn.Module):
    """Reads the hidden units twice, which a symmetry of its nn.Sequential does not know."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 5))

    def forward(self, x):
        return self.net(x) + self.net[1](self.net[0](x))[:, :5]


V, U = [Axis("0.weight", 0), Axis("0.bias", 0)], [Axis("2.weight", 1)]
WRONG = {  # a symmetry of the MLP 12-9-7-5, and what its error says
    "named twice": [Group(RESCALING, 9, [*V, Axis("0.weight", -2)], U)],
    "is not a parameter": [Group(RESCALING, 9, [Axis("3.weight", 0)], U)],
    "has no axis 2": [Group(RESCALING, 9, [Axis("0.weight", 2)], U)],
    "has 9 entries for the 7 units": [Group(RESCALING, 7, V, U)],
    "has 12 entries for the 3 units": [Group(LINEAR, 3, [Axis("0.weight", 1)], U)],
    "needs axes in V and in U": [Group(RESCALING, 9, V, [])],
    r"group 1 \(2.weight, 5.weight\) is not a symmetry": [
        Group(RESCALING, 9, V, U),
        Group(RESCALING, 7, [Axis("2.weight", 0)], [Axis("5.weight", 1)]),
    ],
    r"group 0 .* is not a symmetry .*: it changes the outputs by \d": [Group(LINEAR, 9, V, U)],
}


def refused(model, symmetry, x, y, message, **options):
    """Assert that a teleport raises ValueError with a message and leaves all as it was."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    before = [p.clone() for p in model.parameters()]
    options = {"lr": 0.1, "optimizer": optimizer} | options
    with pytest.raises(ValueError, match=message):
        teleport_module(model, symmetry, gradient_norm(model, loss_of, x, y), x, steps=3, **options)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before))


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_symmetry_is_named_before_anything_moves(message):
    model, _, x, y = case("mlp", torch.float64)
    refused(model, WRONG[message], x, y, message)


def test_an_activation_that_is_not_homogeneous_is_found():
    model = nn.Sequential(nn.Linear(12, 9), nn.GELU(), nn.Linear(9, 5))
    group = Group(RESCALING, 9, [Axis("0.weight", 0), Axis("0.bias", 0)], [Axis("2.weight", 1)])
    _, _, x, y = case("mlp", torch.float32)
    refused(model, [group], x, y, "is not a symmetry")


def test_hidden_units_that_are_read_elsewhere_are_found():
    model = Tied().double()
    _, _, x, y = case("mlp", torch.float64)
    refused(model, symmetry_of(model), x, y, "is not a symmetry")


def test_what_goes_wrong_later_leaves_the_model_too():
    model, symmetry, x, y = case("mlp", torch.float64)
    refused(model, symmetry, x, y, "objective is nan after 1 steps", lr=1e9)
    refused(model, symmetry, x, y, "'moved', 'kept' or 'reset'", state="copied")
    optimizer = torch.optim.Adadelta(model.parameters())
    train(model, optimizer, [(x, y)])
    refused(model, symmetry, x, y, "no rule moves an optimizer's", optimizer=optimizer)
    model, symmetry, x, y = case("lora", torch.float32)
    refused(model, symmetry, x, y, "rounding changed", lr=1e4, max_norm=8.0)


def test_a_module_with_two_outputs_and_one_that_begins_at_zero():
    """nn.MultiheadAttention returns a tuple; a last layer may be 0, so that nothing is relative."""
    torch.manual_seed(0)
    attention, x = nn.MultiheadAttention(8, 2).double(), torch.randn(5, 3, 8, dtype=torch.float64)
    model, symmetry, inputs, y = case("mlp", torch.float64)
    nn.init.zeros_(model[-1].weight), nn.init.zeros_(model[-1].bias)
    for module, groups, batch, target in (
        (attention, symmetry_of(attention), (x, x, x), x),
        (model, symmetry, inputs, torch.zeros(20, 5, dtype=torch.float64)),
    ):
        objective = gradient_norm(module, nn.MSELoss(), batch, target)
        path = teleport_module(module, groups, objective, batch, 0.1, 2)
        assert (path["objective"].diff() >= 0).all()


def test_models_without_groups_or_gradients_are_named():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU(), torch.nn.Linear(4, 2))
    x, y = torch.rand(5, 4), torch.zeros(5, dtype=torch.int64)
    objective = gradient_norm(model, torch.nn.CrossEntropyLoss(), x, y)
    with pytest.raises(ValueError, match="the symmetry has no groups"):
        teleport_module(model, symmetry_of(model), objective, x, 1e-2, 1)
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        gradient_norm(model.requires_grad_(False), torch.nn.CrossEntropyLoss(), x, y)
