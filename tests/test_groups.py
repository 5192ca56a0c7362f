"""Groups as data: how elements act, what is refused, and whether outputs stay."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from parameter_symmetries.check import check_symmetry
from parameter_symmetries.groups import (
    LINEAR,
    RESCALING,
    Axis,
    Group,
    act_on,
    check_groups,
    dual,
    outputs,
    random_elements,
)
from symmetric_models import MODELS, Functional, case, units


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_large_elements_keep_outputs_and_the_elements_of_one_side_do_not(name, training):
    model, symmetry, x, _ = case(name, training=training)
    parameters = dict(model.named_parameters())
    elements = random_elements(symmetry, 2.0, seeded())
    before = outputs(model, parameters, x)
    moved = act_on(parameters, symmetry, elements)
    torch.testing.assert_close(outputs(model, moved, x), before, atol=1e-10, rtol=1e-10)
    for group, g in zip(symmetry, elements):
        for sign in (1, -1):
            side = [axis for axis in group.axes if axis.power * sign > 0]
            moved = act_on(parameters, [group._replace(axes=side)], [g])
            assert (outputs(model, moved, x) - before).abs().max() > 1e-4


def test_how_an_element_acts():
    g = torch.tensor([[[2.0, 1.0], [0.0, 1.0]]])
    parameters = {
        "V": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        "U": torch.eye(2),
        "w": torch.ones(2),
    }
    axes = [Axis("V", 0), Axis("U", 1, -1)]
    moved = act_on(parameters, [Group(LINEAR, 1, 2, axes)], [g])
    assert torch.equal(moved["V"], g[0] @ parameters["V"])
    assert torch.equal(moved["U"], torch.linalg.inv(g[0]))
    assert moved["w"] is parameters["w"]
    c = torch.tensor([2.0, 4.0]).view(2, 1, 1)
    twice = [
        Axis("V", 0),
        Axis("V", 1, -1),
        Axis("w", 0, 0.5),
        Axis("U", 1, -1, torch.tensor([[1], [0]])),
    ]
    moved = act_on(parameters, [Group(RESCALING, 2, 1, twice)], [c])
    assert moved["V"].tolist() == [[1.0, 1.0], [6.0, 4.0]]
    assert moved["w"].tolist() == pytest.approx([2**0.5, 2.0])
    assert moved["U"].tolist() == [[0.25, 0.0], [0.0, 0.5]]


def test_rows_that_share_an_element_and_entries_on_which_none_acts():
    c = torch.tensor([2.0, 3.0]).view(2, 1, 1)
    w = {"w": torch.ones(1, 6)}

    def factors(*axis):
        return act_on(w, [Group(RESCALING, 2, 1, [Axis("w", 1, 1, *axis)])], [c])["w"][0].tolist()

    assert factors() == [2, 2, 2, 3, 3, 3]
    assert factors(None, torch.tensor([0, 1] * 3)) == [2, 3] * 3
    assert factors(torch.tensor([[4], [1]])) == [1, 3, 1, 1, 2, 1]
    assert factors(torch.tensor([[4], [1], [2]]), torch.tensor([1, 1, 0])) == [1, 3, 2, 1, 3, 1]


@pytest.mark.parametrize("order", [(0, 2), (2, 0), (1, 2), (2, 1)])
def test_several_axes_are_one_in_their_order(order):
    w = torch.randn(2, 3, 4, dtype=torch.float64)
    shape = [w.shape[dim] for dim in order]
    length = shape[0] * shape[1]
    for kind, count, size in ((RESCALING, length, 1), (LINEAR, 2, length // 2)):
        group = Group(kind, count, size, [Axis("w", order)])
        [g] = random_elements([group], 1.0, seeded())
        flat = w.movedim(order, (0, 1)).reshape(length, -1)
        expected = torch.block_diag(*g) @ flat
        moved = act_on({"w": w}, [group], [g])["w"].movedim(order, (0, 1)).reshape(length, -1)
        torch.testing.assert_close(moved, expected)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_acted_on_by_the_dual(name):
    model, symmetry, x, y = case(name, training=False)
    elements = random_elements(symmetry, 0.5, seeded())
    old = {n: p.detach().requires_grad_() for n, p in model.named_parameters()}
    new = {n: p.detach().requires_grad_() for n, p in act_on(old, symmetry, elements).items()}
    gradients = []
    for parameters in (old, new):
        out = outputs(model, parameters, x)
        loss = F.cross_entropy(out.flatten(0, -2), y.flatten())
        gradients.append(torch.autograd.grad(loss, parameters.values(), materialize_grads=True))
    expected = act_on(dict(zip(old, gradients[0])), symmetry, dual(elements))
    for gradient, name in zip(gradients[1], new):
        torch.testing.assert_close(gradient, expected[name], atol=1e-10, rtol=1e-10)


def test_the_action_is_differentiable_and_keeps_the_type_of_parameters():
    model, symmetry, _, _ = case("gpt", torch.float32)
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    elements = [g.requires_grad_() for g in random_elements(symmetry, 0.1, seeded())]
    moved = act_on(parameters, symmetry, elements)
    assert {p.dtype for p in moved.values()} == {torch.float32}
    slopes = torch.autograd.grad(sum(p.square().sum() for p in moved.values()), elements)
    assert all(slope.abs().max() > 0 for slope in slopes)


V, U = [Axis("0.weight", 0), Axis("0.bias", 0)], [Axis("2.weight", 1, -1)]
NINE = torch.arange(9)


def nine(*axes):
    return Group(RESCALING, 9, 1, [*axes, *U])


WRONG = {  # a symmetry of the MLP 12-9-7-5, and what its error says
    "has no groups": [],
    "is 'orthogonal' of size 1": [Group("orthogonal", 9, 1, V + U)],
    "is 'rescaling' of size 9": [Group(RESCALING, 1, 9, V + U)],
    "named twice, by groups 0 and 0": [nine(*V, Axis("0.weight", -2))],
    "named twice, by groups 0 and 1": [Group(LINEAR, 1, 9, V + U), nine(*V)],
    "of 0.weight .* is named twice": [
        nine(*V),
        Group(LINEAR, 12, 9, [Axis("0.weight", (0, 1)), *U]),
    ],
    "which is no parameter, or shared": [nine(Axis("3.weight", 0))],
    "there is no such axis": [nine(Axis("0.weight", 2))],
    "9 entries for 7 × 1 units": [Group(RESCALING, 7, 1, V + U)],
    "9 entries for 1 × 2 units": [Group(LINEAR, 1, 2, V + U)],
    "needs axes that make its units and": [Group(RESCALING, 9, 1, V)],
    "its power is -2": [Group(LINEAR, 1, 9, [*V, Axis("2.weight", 1, -2)])],
    "entries that repeat": [nine(Axis("0.weight", 0, 1, 0 * NINE[:, None]))],
    "or that the axis lacks": [nine(Axis("0.weight", 0, 1, 1 + NINE[:, None]))],
    r"the index is \[9\]": [nine(Axis("0.weight", 0, 1, NINE))],
    "member must name one of 9": [nine(Axis("0.weight", 0, 1, None, 1 + NINE))],
    "for each of 9 rows": [nine(Axis("0.weight", 0, 1, None, NINE[1:]))],
}


@pytest.mark.parametrize("message", WRONG)
def test_a_symmetry_that_does_not_fit_is_refused(message):
    model, _, x, _ = case("mlp")
    with pytest.raises(ValueError, match=message):
        check_symmetry(model, WRONG[message], x)


def test_a_group_may_mix_rows_whose_other_axis_another_rescales():
    """A grouped convolution reads channels of its own in each group, and makes channels."""
    model = nn.Sequential(
        nn.Conv1d(3, 4, 1), nn.Conv1d(4, 6, 1, groups=2), nn.ReLU(), nn.Conv1d(6, 2, 1)
    )
    pairs = Axis("1.weight", (0, 1), -1, None, torch.arange(6) // 3)
    symmetry = [
        Group(LINEAR, 2, 2, [Axis("0.weight", 0), Axis("0.bias", 0), pairs]),
        units(6, [("1.weight", 0), ("1.bias", 0)], [("3.weight", 1)]),
    ]
    assert check_symmetry(model, symmetry, torch.randn(5, 3, 7)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_true_symmetries_pass_in_every_precision_and_the_model_stays(name, dtype):
    model, symmetry, x, _ = case(name, dtype)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random_state = torch.get_rng_state()
    assert check_symmetry(model, symmetry, x) < 1e-12
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def two_layers(forward, activation=F.relu, **more):
    """Return a module of layers a and b, with forward(m, hidden, …), and its units."""
    layers = {"a": nn.Linear(12, 9), "b": nn.Linear(9, 5), **more}
    model = Functional(lambda m, x, **kw: forward(m, activation(m.a(x)), **kw), **layers)
    return model, [units(9, [("a.weight", 0), ("a.bias", 0)], [("b.weight", 1)])]


X = torch.randn(20, 12, generator=seeded())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_no_symmetry_is_named_with_its_change(dtype):
    for activation in (torch.sigmoid, F.gelu):
        model, symmetry = two_layers(lambda m, h: m.b(h), activation)
        message = r"group 0 \(a.weight, a.bias, b.weight\) is no .* \de"
        with pytest.raises(ValueError, match=message):
            check_symmetry(model.to(dtype), symmetry, X.to(dtype))
    model, (first, second), x, _ = case("mlp", dtype)
    wrong = second._replace(axes=[axis for axis in second.axes if axis.name != "2.bias"])
    with pytest.raises(ValueError, match=r"group 1 \(2.weight, 5.weight\) is no symmetry"):
        check_symmetry(model, [first, wrong], x)
    with pytest.raises(ValueError, match="group 0 .* is no symmetry"):
        check_symmetry(model, [Group(LINEAR, 1, 9, first.axes)], x)


def in_single_precision(m, h):
    return m.b(h).float()


def without_double(m, h):
    if h.dtype == torch.float64:
        raise NotImplementedError('"experts" not implemented for "Double"')
    return m.b(h)


@pytest.mark.parametrize("forward", [in_single_precision, without_double])
def test_a_model_that_leaves_double_precision_gets_the_bound_of_its_own(forward):
    model, symmetry = two_layers(forward)
    assert check_symmetry(model, symmetry, X) < 1e-5
    model, symmetry = two_layers(forward, torch.sigmoid)
    with pytest.raises(ValueError, match="where rounding may by 7e-05"):
        check_symmetry(model, symmetry, X)


def test_outputs_may_be_nested_and_keep_names_those_that_should_stay():
    def forward(m, h, shift):  # takes a keyword; returns hidden units, too, and what is infinite
        return {"logits": (m.b(h) + shift).masked_fill(X[:, :1] > 0, -torch.inf), "hidden": [h]}

    model, symmetry = two_layers(forward)
    batch = {"x": X}
    model.function = lambda m, batch, shift, f=model.function: f(m, batch["x"], shift=shift)
    with pytest.raises(ValueError, match="is no symmetry"):
        check_symmetry(model, symmetry, batch, shift=torch.ones(5))
    options = {"shift": torch.ones(5), "keep": lambda out: out["logits"]}
    assert check_symmetry(model, symmetry, batch, **options) < 1e-12
    with pytest.raises(ValueError, match="no floating outputs"):
        check_symmetry(model, symmetry, batch, shift=torch.ones(5), keep=lambda out: None)


def test_what_a_model_writes_to_in_place_stays():
    def forward(m, x):
        with torch.no_grad():
            m.b.bias.add_(1)
            m.shift.add_(1)
        return m.b(F.relu(m.a(x.mul_(2)))) + m.shift

    model, symmetry = two_layers(None)
    model.function = forward
    model.register_buffer("shift", torch.zeros(5))
    x = X.clone()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert check_symmetry(model, symmetry, x) < 1e-12
    torch.testing.assert_close((dict(model.state_dict()), x), (before, X), rtol=0, atol=0)


def test_tensors_in_objects_are_not_overlooked():
    model, symmetry = two_layers(lambda m, h: (m.b(h), SimpleNamespace(logits=m.b(h), hidden=h)))
    with pytest.raises(ValueError, match="cannot see into SimpleNamespace: .* keep="):
        check_symmetry(model, symmetry, X)
    assert check_symmetry(model, symmetry, X, keep=lambda out: out[1].logits) < 1e-12

    def with_a_cache(m, h):  # whose layers are objects in turn
        cache = SimpleNamespace(layers=[SimpleNamespace(keys=h)])
        return {"y": m.b(h), "cache": cache, "n": 3, "s": "s", "no": None}

    model, symmetry = two_layers(with_a_cache)
    assert check_symmetry(model, symmetry, X) < 1e-12


def test_outputs_that_have_nan_are_not_blamed_on_a_group():
    model, symmetry = two_layers(lambda m, h: m.b(h) / 0 * 0)
    with pytest.raises(ValueError, match="the outputs have nan"):
        check_symmetry(model, symmetry, X)


def test_groups_that_are_symmetries_alone_but_not_together_are_told_apart():
    ones = {name: nn.Parameter(torch.ones(1)) for name in "abc"}
    model = Functional(lambda m, x: x * (1 + (m.a - 1) * (m.b - 1)) + 0 * m.c, **ones)
    symmetry = [units(1, [(name, 0)], [("c", 0)]) for name in "ab"]
    with pytest.raises(ValueError, match="but together they change"):
        check_symmetry(model, symmetry, X)


def test_wrapped_models_are_their_modules_and_a_layer_of_zeros_is_no_obstacle():
    model, symmetry, x, _ = case("mlp")
    check_symmetry(nn.DataParallel(model), symmetry, x)
    check_symmetry(torch.compile(model), symmetry, x)
    nn.init.zeros_(model[-1].weight), nn.init.zeros_(model[-1].bias)
    assert check_symmetry(model, symmetry, x) == 0


def test_groups_of_a_thousand_units_are_checked_at_once():
    parameters = {"w": torch.randn(30_000, 3), "u": torch.randn(3, 30_000)}
    check_groups(parameters, [units(30_000, [("w", 0)], [("u", 1)])])
