"""What `equalize_` predicts along an orbit, and what rounding does to weights."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from parameter_symmetries.groups import LINEAR, RESCALING, Axis, Group, act_on, random_elements
from parameter_symmetries.rounding import (
    equalize_,
    predicted_rise,
    round_weights,
    rounded_weights,
)

PERS = "tensor", "channel", 4


def rescaling(count, *axes):
    return Group(RESCALING, count, 1, [Axis(*axis) for axis in axes])


def mlp():
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3))
    groups = [
        rescaling(10, ("0.weight", 0), ("0.bias", 0), ("2.weight", 1, -1)),
        rescaling(8, ("2.weight", 0), ("2.bias", 0), ("4.weight", -1, -1)),
    ]
    return model, groups, torch.randn(4, 20, 6)


def convolutions():
    """Layers that are dense, depthwise, and in two groups, each of which reads four channels."""
    conv, relu = nn.Conv2d, nn.ReLU
    layers = [conv(2, 8, 3), relu(), conv(8, 8, 3, groups=8), relu(), conv(8, 6, 3, groups=2)]
    model = nn.Sequential(*layers, relu(), nn.Flatten(), nn.Linear(24, 3))
    entries = torch.arange(24)[:, None]
    channels = torch.arange(8).reshape(2, 1, 4).expand(2, 3, 4).flatten()
    grouped = "4.weight", (0, 1), -1, entries, channels
    groups = [
        rescaling(8, ("0.weight", 0), ("0.bias", 0), ("2.weight", 0, -1)),
        rescaling(8, ("2.weight", 0), ("2.bias", 0), grouped),
        rescaling(6, ("4.weight", 0), ("4.bias", 0), ("7.weight", 1, -1)),
    ]
    return model, groups, torch.randn(4, 10, 2, 8, 8)


def transposed_convolutions():
    model = nn.Sequential(nn.ConvTranspose2d(2, 5, 3), nn.ReLU(), nn.ConvTranspose2d(5, 3, 3))
    groups = [rescaling(5, ("0.weight", 1), ("0.bias", 0), ("2.weight", 0, -1))]
    return nn.Sequential(*model, nn.Flatten(2)), groups, torch.randn(4, 10, 2, 3, 3)


class GroupedQueries(nn.Module):
    """Attention behind a norm, with four heads of queries and two of keys and values, of size 3."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.q, self.k, self.v = nn.Linear(8, 12), nn.Linear(8, 6), nn.Linear(8, 6)
        self.o = nn.Linear(12, 3)

    def forward(self, x):
        parts = (part(self.norm(x)) for part in (self.q, self.k, self.v))
        q, k, v = (part.unflatten(-1, (-1, 3)).transpose(1, 2) for part in parts)
        k, v = (part.repeat_interleave(2, 1) for part in (k, v))
        y = (q @ k.mT).softmax(-1) @ v
        return self.o(y.transpose(1, 2).flatten(2)).mean(1)


def attention():
    def linear(*axes):
        return Group(LINEAR, 2, 3, [Axis(*axis) for axis in axes])

    norm = ("norm.weight", 0), ("norm.bias", 0)
    groups = [
        rescaling(8, *norm, *((f"{part}.weight", 1, -1) for part in "qkv")),
        linear(("q.weight", 0), ("q.bias", 0), ("k.weight", 0, -1), ("k.bias", 0, -1)),
        linear(("v.weight", 0), ("v.bias", 0), ("o.weight", 1, -1)),
    ]
    return GroupedQueries(), groups, torch.randn(4, 10, 5, 8)


CASES = mlp, convolutions, transposed_convolutions, attention


def loss(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)


def prepared(case):
    """Return a model in float64, its symmetry and batches (x, y)."""
    model, groups, x = case()
    samples, _, *positions = model(x[0]).shape
    y = torch.randint(3, (len(x), samples, *positions))
    return model.double(), groups, list(zip(x.double(), y))


@pytest.mark.parametrize("per", PERS)
@pytest.mark.parametrize("case", CASES)
def test_the_prediction_along_the_orbit_is_that_of_the_moved_network(case, per):
    model, groups, batches = prepared(case)
    outputs, before = model(batches[0][0]), predicted_rise(model, loss, batches, 8, per)
    rise = equalize_(model, groups, loss, batches, per, steps=30)
    assert rise.before == pytest.approx(before, rel=1e-10)
    assert rise.after == pytest.approx(predicted_rise(model, loss, batches, 8, per), rel=1e-10)
    assert rise.after < rise.before
    torch.testing.assert_close(model(batches[0][0]), outputs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("per", PERS)
@pytest.mark.parametrize("case", [mlp, convolutions])
def test_rescalings_reach_the_same_minimum_from_anywhere(case, per):
    model, groups, batches = prepared(case)
    moved = copy.deepcopy(model)
    elements = random_elements(groups, 0.5, torch.Generator().manual_seed(0))
    moved.load_state_dict(act_on(model.state_dict(), groups, elements))
    ends = [equalize_(m, groups, loss, batches, per, steps=200).after for m in (model, moved)]
    assert ends[0] == pytest.approx(ends[1], rel=1e-2)


@pytest.mark.parametrize("per", PERS)
def test_a_rescaling_is_gl_of_one_unit(per):
    model, groups, batches = prepared(mlp)
    other, linear = copy.deepcopy(model), [group._replace(kind=LINEAR) for group in groups]
    rise = equalize_(model, groups, loss, batches, per, steps=30)
    assert equalize_(other, linear, loss, batches, per, steps=30) == pytest.approx(rise, rel=1e-9)


@pytest.mark.parametrize("per", PERS)
def test_without_a_loss_errors_relative_to_the_weights_fall_wherever_one_starts(per):
    model, groups, batches = prepared(convolutions)
    outputs = model(batches[0][0])
    rise = equalize_(model, groups, per=per, steps=200)
    assert rise.after < 0.99 * rise.before
    torch.testing.assert_close(model(batches[0][0]), outputs, rtol=1e-10, atol=1e-10)
    elements = random_elements(groups, 0.5, torch.Generator().manual_seed(0))
    model.load_state_dict(act_on(model.state_dict(), groups, elements))
    assert equalize_(model, groups, per=per, steps=200).after == pytest.approx(rise.after, rel=1e-2)


def test_without_a_loss_heads_stay_as_they_are():
    model, groups, _ = prepared(attention)
    values = model.v.bias.clone()
    equalize_(model, groups, steps=10)
    torch.testing.assert_close(model.v.bias, values, rtol=0, atol=0)


@pytest.fixture(scope="module")
def trained():
    """An MLP in float64, its symmetry, batches, and its loss as a function of the model."""
    torch.manual_seed(0)
    model, groups, _ = mlp()
    x = torch.randn(2000, 6)
    y = (x[:, :3] + 0.5 * torch.randn(2000, 3)).argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        loss(model, (x, y)).backward()
        optimizer.step()
    model, x = model.double(), x.double()
    return model, groups, list(zip(x.split(20), y.split(20))), lambda m: loss(m, (x, y)).item()


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_the_loss_rises_as_predicted_when_a_trained_network_is_rounded(per, trained):
    model, groups, batches, loss_of = trained
    start, rises = loss_of(model), []
    for seed in range(20):  # for one network, errors of rounding need not be like their mean
        elements = random_elements(groups, 0.3, torch.Generator().manual_seed(seed))
        moved = copy.deepcopy(model)
        moved.load_state_dict(act_on(model.state_dict(), groups, elements))
        predicted = predicted_rise(moved, loss, batches, 8, per)
        rises.append((loss_of(round_weights(moved, 8, per)) - start, predicted))
    true, predicted = torch.tensor(rises).sum(0)
    assert 0.5 < true / predicted < 2


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_an_equalized_network_loses_less_than_one_that_is_moved_at_random(per, trained):
    model, groups, batches, loss_of = trained
    elements = random_elements(groups, 1.0, torch.Generator().manual_seed(0))
    moved = copy.deepcopy(model)
    moved.load_state_dict(act_on(model.state_dict(), groups, elements))
    rise = [loss_of(round_weights(moved, 5, per)) - loss_of(model)]
    equalize_(moved, groups, loss, batches, per)
    rise += [loss_of(round_weights(moved, 5, per)) - loss_of(model)]
    assert rise[1] < rise[0] / 2


def test_the_prediction_is_proportional_to_the_squared_step_and_the_batch_size():
    model, _, batches = prepared(mlp)
    rise = predicted_rise(model, loss, batches, 8)
    assert predicted_rise(model, loss, batches, 4) == pytest.approx((127 / 7) ** 2 * rise)
    assert predicted_rise(model, loss, batches, 8, batch_size=40) == pytest.approx(2 * rise)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per,rows", [("tensor", 1), ("channel", 10), (4, 20)])
def test_rounding_leaves_few_levels_and_small_errors(per, rows, dtype):
    model = nn.Sequential(nn.Linear(6, 10)).to(dtype)
    with torch.no_grad():
        model[0].weight[3] = 0
    before = model[0].weight.clone()
    after = round_weights(model, 3, per)[0].weight
    assert torch.equal(model[0].weight, before)
    padded = [F.pad(w.detach().double(), (0, 2)) if per == 4 else w for w in (before, after)]
    for old, new in zip(*(w.reshape(rows, -1) for w in padded)):
        levels = new / old.abs().max().clamp(min=1e-9) * 3
        assert (levels - levels.round()).abs().max() < 0.02
        assert (new - old).abs().max() <= old.abs().max() / 6 * 1.02


def test_a_channel_of_a_transposed_convolution_is_an_output():
    model = nn.ConvTranspose2d(3, 5, 2)
    with torch.no_grad():
        model.weight[:, 2] *= 1000
    rounded = round_weights(model, 8).weight
    error = (rounded - model.weight).abs().amax((0, 2, 3))
    assert (error <= model.weight.abs().amax((0, 2, 3)) / 253).all()


def test_embeddings_and_vectors_are_not_rounded_and_tied_weights_once():
    model = nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 7))
    model[3].weight = model[0].weight
    assert rounded_weights(model) == {"2.weight": 0}


def test_named_weights_alone_are_rounded():
    model, _, _ = mlp()
    rounded = round_weights(model, 2, axes={"2.weight": 0}).state_dict()
    changed = [name for name, p in model.state_dict().items() if not torch.equal(p, rounded[name])]
    assert changed == ["2.weight"]


def test_frozen_parameters_move_and_stay_frozen():
    model, groups, batches = prepared(mlp)
    free = copy.deepcopy(model)
    model.requires_grad_(False)
    equalize_(model, groups, loss, batches, steps=5)
    equalize_(free, groups, loss, batches, steps=5)
    assert not any(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model.state_dict(), free.state_dict(), rtol=1e-12, atol=0)


def test_a_unit_without_weights_or_gradients_does_no_harm():
    model, groups, batches = prepared(mlp)
    with torch.no_grad():
        model[0].weight[0], model[0].bias[0], model[2].weight[:, 1] = 0, -1, 0
    for per in PERS:
        equalize_(model, groups, loss, batches, per, steps=20)
        assert all(p.isfinite().all() for p in model.parameters())


def test_a_network_that_cannot_be_moved_is_told_so():
    model, groups, batches = prepared(mlp)
    with pytest.raises(ValueError, match="no groups"):
        equalize_(model, [], loss, batches)
    with pytest.raises(ValueError, match="no group that moves"):
        equalize_(model, groups[:1], loss, batches, axes={"4.weight": 0})


@pytest.mark.parametrize("read", [(), [("none", 1, -1)]])
def test_groups_that_do_not_fit_are_refused(read):
    model, _, batches = prepared(mlp)
    with pytest.raises(ValueError, match="group 0"):
        equalize_(model, [rescaling(10, ("0.weight", 0), *read)], loss, batches)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_wrapped_models_are_moved_as_their_modules(wrap):
    model, groups, batches = prepared(mlp)
    other, seen = copy.deepcopy(model), []

    def loss_of_wrapped(m, batch):
        seen.append(m)
        return loss(m, batch)

    wrapped = wrap(other)
    rise = equalize_(wrapped, groups, loss_of_wrapped, batches, steps=5)
    assert rise == pytest.approx(equalize_(model, groups, loss, batches, steps=5))
    assert all(m is wrapped for m in seen)
    assert predicted_rise(wrapped, loss, batches, 8) == pytest.approx(rise.after)
    rounded = round_weights(wrapped, 4).state_dict().values()
    torch.testing.assert_close(list(rounded), list(round_weights(model, 4).state_dict().values()))


@pytest.mark.parametrize("small", [0, 1e-22])
@pytest.mark.parametrize("per", PERS)
def test_a_channel_of_zeros_does_no_harm_without_a_loss(per, small):
    model, groups, _ = mlp()
    with torch.no_grad():
        model[2].weight[1] = small
    rise = equalize_(model, groups, per=per, steps=20)
    assert rise.after < rise.before
    assert all(p.isfinite().all() for p in model.parameters())


def test_running_statistics_stay_and_gradients_need_not_be_enabled():
    model = nn.Sequential(nn.BatchNorm1d(6), *mlp()[0]).double()
    _, groups, batches = prepared(mlp)
    renamed = {"0": "1", "2": "3", "4": "5"}
    groups = [
        g._replace(axes=[a._replace(name=renamed[a.name[0]] + a.name[1:]) for a in g.axes])
        for g in groups
    ]
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.no_grad():
        rise = equalize_(model, groups, loss, batches, steps=20)
    assert rise.after < rise.before
    torch.testing.assert_close(dict(model.named_buffers()), before, rtol=0, atol=0)


def test_gradients_and_an_optimizers_state_move_along():
    model, groups, batches = prepared(mlp)
    optimizer = torch.optim.SGD(model.parameters(), 1e-9, momentum=0.9)
    loss(model, batches[0]).backward()
    optimizer.step()
    equalize_(model, groups, loss, batches, steps=20, optimizer=optimizer)
    state = [optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()]
    moved = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss(model, batches[0]).backward()
    expected = [p.grad for p in model.parameters()]
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(state, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("gradients", [True, False])
def test_an_error_names_the_parameter_that_is_not_finite_and_nothing_moves(gradients):
    model, groups, batches = prepared(mlp)
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"weight is not finite"):
        equalize_(model, groups, *((loss, batches) if gradients else ()))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)


def test_bad_arguments_are_refused():
    model, groups, batches = prepared(mlp)
    with pytest.raises(ValueError, match="no batches"):
        equalize_(model, groups, loss, [])
    for per in ("row", 0, True):
        with pytest.raises(ValueError, match="per must be"):
            equalize_(model, groups, loss, batches, per)
        with pytest.raises(ValueError, match="per must be"):
            round_weights(model, 8, per)
    for bits in (1, True, 2.5):
        with pytest.raises(ValueError, match="bits"):
            round_weights(model, bits)
        with pytest.raises(ValueError, match="bits"):
            equalize_(model, groups, loss, batches, bits=bits)
        with pytest.raises(ValueError, match="bits"):
            predicted_rise(model, loss, batches, bits)
