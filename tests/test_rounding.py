"""What `equalize_` predicts along an orbit, and what rounding does to weights."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import symmetric_models
from parameter_symmetries.groups import LINEAR, RESCALING, Axis, Group, act_on, random_elements
from parameter_symmetries.rounding import (
    equalize_,
    predicted_rise,
    round_weights,
    rounded_weights,
)
from symmetric_models import units

PERS = "tensor", "channel", 4


def convolutions():
    """Layers that are dense, depthwise, and in two groups, each of which reads four channels."""
    conv, relu = nn.Conv2d, nn.ReLU
    layers = [conv(2, 8, 3), relu(), conv(8, 8, 3, groups=8), relu(), conv(8, 6, 3, groups=2)]
    model = nn.Sequential(*layers, relu(), nn.Flatten(), nn.Linear(24, 3))
    channels = torch.arange(8).reshape(2, 1, 4).expand(2, 3, 4).flatten()
    grouped = Axis("4.weight", (0, 1), -1, torch.arange(24)[:, None], channels)
    made = [Axis("2.weight", 0), Axis("2.bias", 0)]
    groups = [
        units(8, [("0.weight", 0), ("0.bias", 0)], [("2.weight", 0)]),
        Group(RESCALING, 8, 1, [*made, grouped]),
        units(6, [("4.weight", 0), ("4.bias", 0)], [("7.weight", 1)]),
    ]
    return model, groups, (2, 8, 8)


def transposed_convolutions():
    model = nn.Sequential(nn.ConvTranspose2d(2, 5, 3), nn.ReLU(), nn.ConvTranspose2d(5, 3, 3))
    groups = [units(5, [("0.weight", 1), ("0.bias", 0)], [("2.weight", 0)])]
    return nn.Sequential(*model, nn.Flatten(2)), groups, (2, 3, 3)


def mlp():
    return *symmetric_models.mlp(), (12,)


def attention():
    return *symmetric_models.grouped_queries(), (6, 8)


CASES = mlp, convolutions, transposed_convolutions, attention


def loss(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)


def prepared(case):
    """Return a model in float64, its symmetry and four batches (x, y)."""
    model, groups, shape = case()
    x = torch.randn(4, 20, *shape).double()
    samples, _, *positions = model.double().eval()(x[0]).shape
    return model, groups, list(zip(x, torch.randint(3, (4, samples, *positions))))


def moved_at_random(model, groups, scale=0.5, seed=0):
    """Return a copy of a model, moved along its orbit."""
    elements = random_elements(groups, scale, torch.Generator().manual_seed(seed))
    other = copy.deepcopy(model)
    other.load_state_dict(act_on(model.state_dict(), groups, elements))
    return other


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


@pytest.mark.parametrize("has_loss", [True, False])
@pytest.mark.parametrize("per", PERS)
@pytest.mark.parametrize("case", [mlp, convolutions])
def test_rescalings_reach_the_same_minimum_from_anywhere(case, per, has_loss):
    model, groups, batches = prepared(case)
    moved, outputs = moved_at_random(model, groups), model(batches[0][0])
    how = (loss, batches, per) if has_loss else (None, (), per)
    rise, other = (equalize_(m, groups, *how, steps=200) for m in (model, moved))
    assert rise.after == pytest.approx(other.after, rel=1e-2) and rise.after < rise.before
    torch.testing.assert_close(model(batches[0][0]), outputs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("per", PERS)
def test_a_rescaling_is_gl_of_one_unit(per):
    model, groups, batches = prepared(mlp)
    other, linear = copy.deepcopy(model), [group._replace(kind=LINEAR) for group in groups]
    rise = equalize_(model, groups, loss, batches, per, steps=30)
    assert equalize_(other, linear, loss, batches, per, steps=30) == pytest.approx(rise, rel=1e-9)


def test_without_a_loss_heads_stay_as_they_are():
    model, groups, _ = prepared(attention)
    values = model.kv.bias[6:].clone()
    equalize_(model, groups, steps=10)
    torch.testing.assert_close(model.kv.bias[6:], values, rtol=0, atol=0)


@pytest.fixture(scope="module")
def trained():
    """An MLP in float64, its symmetry, batches, and its loss as a function of the model."""
    torch.manual_seed(0)
    model, groups, _ = mlp()
    x = torch.randn(2000, 12)
    y = (x[:, :5] + 0.5 * torch.randn(2000, 5)).argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        loss(model, (x, y)).backward()
        optimizer.step()
    model, x = model.double().eval(), x.double()
    return model, groups, list(zip(x.split(20), y.split(20))), lambda m: loss(m, (x, y)).item()


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_the_loss_rises_as_predicted_when_a_trained_network_is_rounded(per, trained):
    model, groups, batches, loss_of = trained
    start, rises = loss_of(model), []
    for seed in range(20):  # for one network, errors of rounding need not be like their mean
        moved = moved_at_random(model, groups, 0.3, seed)
        predicted = predicted_rise(moved, loss, batches, 8, per)
        rises.append((loss_of(round_weights(moved, 8, per)) - start, predicted))
    true, predicted = torch.tensor(rises).sum(0)
    assert 0.5 < true / predicted < 2


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_an_equalized_network_loses_less_than_one_that_is_moved_at_random(per, trained):
    model, groups, batches, loss_of = trained
    moved = moved_at_random(model, groups, 1.0)
    before = loss_of(round_weights(moved, 5, per))
    equalize_(moved, groups, loss, batches, per)
    after = loss_of(round_weights(moved, 5, per))
    assert after - loss_of(model) < (before - loss_of(model)) / 2


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


def test_embeddings_and_vectors_are_not_rounded_nor_what_is_not_named():
    model = nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 7))
    model[3].weight = model[0].weight
    assert rounded_weights(model) == {"2.weight": 0}
    model, _, _ = mlp()
    rounded = round_weights(model, 2, axes={"2.weight": 0}).state_dict()
    changed = [name for name, p in model.state_dict().items() if not torch.equal(p, rounded[name])]
    assert changed == ["2.weight"]


def test_frozen_parameters_move_and_stay_frozen():
    model, groups, batches = prepared(mlp)
    free = copy.deepcopy(model)
    model.requires_grad_(False)
    for m in (model, free):
        equalize_(m, groups, loss, batches, steps=5)
    assert not any(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model.state_dict(), free.state_dict(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("small", [0, 1e-22])
@pytest.mark.parametrize("per", PERS)
def test_units_and_channels_without_weights_or_gradients_do_no_harm(per, small):
    model, groups, batches = prepared(mlp)
    with torch.no_grad():
        model[0].weight[0], model[0].bias[0], model[2].weight[:, 1] = 0, -1, 0
    equalize_(model, groups, loss, batches, per, steps=20)
    single, _, _ = mlp()
    with torch.no_grad():
        single[2].weight[1] = small
    rise = equalize_(single, groups, per=per, steps=20)
    assert rise.after < rise.before
    assert all(p.isfinite().all() for m in (model, single) for p in m.parameters())


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_wrapped_models_are_moved_as_their_modules(wrap):
    model, groups, batches = prepared(mlp)
    wrapped, seen = wrap(copy.deepcopy(model)), []

    def loss_of_wrapped(m, batch):
        seen.append(m)
        return loss(m, batch)

    rise = equalize_(wrapped, groups, loss_of_wrapped, batches, steps=5)
    assert rise == pytest.approx(equalize_(model, groups, loss, batches, steps=5))
    assert all(m is wrapped for m in seen)
    assert predicted_rise(wrapped, loss, batches, 8) == pytest.approx(rise.after)
    rounded = round_weights(wrapped, 4).state_dict().values()
    torch.testing.assert_close(list(rounded), list(round_weights(model, 4).state_dict().values()))


def test_running_statistics_stay_and_gradients_need_not_be_enabled():
    model, groups = symmetric_models.cnn()
    batches = [(torch.randn(20, 3, 10, 10), torch.randint(5, (20,)))]
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
    moved = [p.grad for p in model.parameters()]
    state = [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
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


def test_what_does_not_fit_is_refused():
    model, groups, batches = prepared(mlp)
    alone = [group._replace(axes=group.axes[:1]) for group in groups]
    elsewhere = [units(9, [("0.weight", 0)], [("none", 1)])]
    for symmetry, problem in (([], "no groups"), (alone, "group 0"), (elsewhere, "group 0")):
        with pytest.raises(ValueError, match=problem):
            equalize_(model, symmetry, loss, batches)
    with pytest.raises(ValueError, match="no group that moves"):
        equalize_(model, groups[:1], loss, batches, axes={"5.weight": 0})
    with pytest.raises(ValueError, match="no batches"):
        equalize_(model, groups, loss, [])
    wrong = [{"per": per} for per in ("row", 0, True)] + [{"bits": b} for b in (1, True, 2.5)]
    for options in wrong:
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
            equalize_(model, groups, loss, batches, **options)
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
            predicted_rise(model, loss, batches, **{"bits": 8} | options)
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
            round_weights(model, **{"bits": 8} | options)
