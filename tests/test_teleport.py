"""Teleports between backward() and step(): the path of double backward, and what moves along."""

import copy

import pytest
import torch
from torch import nn

import teleportation
from models import LeakyReLU, init_weights
from parameter_symmetries.groups import act_on, outputs, random_elements
from parameter_symmetries.moving import act_on_
from parameter_symmetries.objectives import gradient_norm, mean_perturbed_loss, teleport_to
from parameter_symmetries.teleport import teleport_
from symmetric_models import MODELS, case, loss_of, mlp, units


def backward(model, x, y):
    """Compute the gradients of a batch, with the dropout masks and buffers of `outputs`."""
    model.zero_grad()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(0)
    loss_of(model(x), y).backward()
    model.load_state_dict(buffers, strict=False)


def with_gradients(*arguments, **options):
    """Return a `case` whose model has gradients."""
    model, symmetry, x, y = case(*arguments, **options)
    backward(model, x, y)
    return model, symmetry, x, y


def train(model, optimizer, x, y, steps=1):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def copies(model):
    return [p.detach().clone() for p in model.parameters()]


def same(parameters, others):
    return all(torch.equal(p, q) for p, q in zip(parameters, others))


def squares(tensors):
    return sum(t.double().square().sum() for t in tensors)


def gradient_norm_of(model, x, y):
    """Return the objective |∇L|² of a batch, over all parameters that are trained."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return gradient_norm(lambda p: loss_of(outputs(model, p, x), y), names)


def zeros(group):
    return torch.zeros(group.count, group.size, group.size, dtype=torch.float64, requires_grad=True)


def sums_of_squares(group, gradients, signs=(1, -1)):
    """Return A + B of a group, or one: the slope of |∇L|² / 2 if all rows grow with exp(T)."""
    axes = [axis for axis in group.axes if axis.name in gradients]
    axes = [a._replace(power=abs(a.power)) for a in axes if any(a.power * s > 0 for s in signs)]
    T = zeros(group)
    grown = act_on(gradients, [group._replace(axes=axes)], [torch.linalg.matrix_exp(T)])
    return torch.autograd.grad(squares(grown.values()) / 2, T)[0]


def by_double_backward(model, symmetry, x, y, length, steps):
    """Return the parameters and the objective after ascent with gradients by autograd."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    objective = gradient_norm_of(model, x, y)
    for _ in range(steps):
        T = [zeros(group) for group in symmetry]
        moved = act_on(parameters, symmetry, [torch.linalg.matrix_exp(t) for t in T])
        slopes = torch.autograd.grad(objective(moved), T)
        grad = torch.func.grad(lambda p: loss_of(outputs(model, p, x), y))(parameters)
        grad = {n: grad[n] for n, p in model.named_parameters() if p.requires_grad}
        elements = []
        for group, slope in zip(symmetry, slopes):
            norm = sums_of_squares(group, grad).norm(dim=(1, 2), keepdim=True)
            norm = norm.clamp(min=1e-300)  # of dead units
            elements.append(torch.linalg.matrix_exp(length * slope / 2 / norm))
        parameters = act_on(parameters, symmetry, elements)
    return parameters, objective(parameters)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_the_path_is_that_of_ascent_by_double_backward(name, training):
    for length, steps in ((0.2, 1), (0.1, 5), (-0.5, 3)):
        model, symmetry, x, y = with_gradients(name, training=training)
        before = outputs(model, dict(model.named_parameters()), x)
        expected, objective = by_double_backward(model, symmetry, x, y, length, steps)
        start = squares(gradients(model).values())
        found = teleport_(model, symmetry, steps=steps, length=length)
        torch.testing.assert_close(torch.stack(found), torch.stack([start, objective]))
        for key, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), expected[key], atol=1e-10, rtol=1e-10)
        moved = gradients(model)
        backward(model, x, y)
        torch.testing.assert_close(moved, gradients(model), atol=1e-10, rtol=1e-10)
        after = outputs(model, dict(model.named_parameters()), x)
        torch.testing.assert_close(after, before, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_single_precision_follows_the_same_path(name):
    reference, symmetry, x, y = with_gradients(name, training=False)
    model, _, _, _ = with_gradients(name, torch.float32, training=False)
    double, single = (teleport_(m, symmetry, steps=10) for m in (reference, model))
    assert double[1] > 1.5 * double[0]
    torch.testing.assert_close(torch.stack(single).double(), torch.stack(double), rtol=1e-4, atol=0)
    for p, q in zip(model.parameters(), reference.parameters()):
        torch.testing.assert_close(p.double(), q, atol=1e-4, rtol=1e-4)
        assert p.dtype == torch.float32


def test_an_element_moves_by_the_length_at_most_and_scales_do_not_matter():
    model, symmetry, x, y = with_gradients("gpt")
    weight = model.blocks[0].ln_1.weight
    weight.grad.mul_(1e6)  # units that others should follow entirely
    scaled, before = copy.deepcopy(model), weight.detach().clone()
    for p, q in zip(scaled.parameters(), model.parameters()):
        p.grad = 1e-8 * q.grad
    for net in (model, scaled):
        teleport_(net, symmetry, length=0.3)
    log_factors = (weight / before).log()
    torch.testing.assert_close(log_factors, torch.full((8,), -0.3, dtype=torch.float64))
    torch.testing.assert_close(list(model.parameters()), list(scaled.parameters()))


def test_until_names_a_factor_that_is_reached_and_hardly_passed():
    for name in ("mlp", "linear", "gpt"):
        for factor in (1.01, 1.5, 10.0, 0.95):
            model, symmetry, x, y = with_gradients(name)
            before, after = teleport_(model, symmetry, until=factor)
            assert abs((after / before).log() / torch.tensor(factor).log() - 1) < 0.1
            assert (after - factor * before) * (factor - 1) >= 0
    model, symmetry, x, y = with_gradients("mlp")
    before, after = teleport_(model, symmetry, until=1e9, steps=2)
    assert before < after < 2 * before


def test_descent_balances_a_network():
    """At the minimum along the orbit A = B: each unit makes as much gradient as it reads."""
    for name in ("mlp", "linear"):
        model, symmetry, x, y = with_gradients(name, training=False)
        teleport_(model, symmetry, length=-0.5, steps=100)
        for group in symmetry:
            A, B = (sums_of_squares(group, gradients(model), [sign]) for sign in (1, -1))
            assert ((A - B).norm(dim=(1, 2)) <= 1e-2 * (A + B).norm(dim=(1, 2))).all()


# -- what moves along


@pytest.mark.parametrize("name", ["mlp", "cnn", "linear", "gpt", "grouped_queries"])
def test_sgd_after_a_teleport_is_preconditioned_sgd(name):
    """Seen from where one came from, the gradient is multiplied by (gᵀg)^{-1}."""
    model, symmetry, x, y = case(name, training=False)
    elements = random_elements(symmetry, 0.3, torch.Generator().manual_seed(0))
    inverse = [torch.linalg.inv(g.mT @ g) for g in elements]
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    train(model, optimizer, x, y, 3)
    w = {n: p.detach().clone() for n, p in model.named_parameters()}
    momentum = {n: optimizer.state[p]["momentum_buffer"] for n, p in model.named_parameters()}
    momentum = copy.deepcopy(momentum)
    act_on_(model, symmetry, elements, optimizer)
    train(model, optimizer, x, y, 20)
    for _ in range(20):
        grad = torch.func.grad(lambda w: loss_of(torch.func.functional_call(model, w, x), y))(w)
        momentum = {n: 0.9 * m + grad[n] for n, m in momentum.items()}
        step = act_on(momentum, symmetry, inverse)
        w = {n: p - 0.01 * step[n] for n, p in w.items()}
    expected = act_on(w, symmetry, elements)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[n], atol=1e-10, rtol=1e-10)


OPTIMIZERS = {
    "Adam": {"amsgrad": True}, "AdamW": {}, "RMSprop": {"momentum": 0.9, "centered": True},
    "Adagrad": {}, "Adadelta": {}, "NAdam": {}, "RAdam": {}, "ASGD": {},
}  # fmt: skip
STATE_POWERS = {"exp_avg": 1, "grad_avg": 1, "momentum_buffer": 0, "ax": -1, "acc_delta": -2}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_moves_along_with_rescalings(optimizer):
    model, symmetry, x, y = case("mlp", training=False)
    optimizer = getattr(torch.optim, optimizer)(model.parameters(), 1e-3, **OPTIMIZERS[optimizer])
    train(model, optimizer, x, y, 2)
    elements = random_elements(symmetry, 0.5, torch.Generator().manual_seed(0))
    below, above = (g.flatten() for g in elements)
    factors = {0: below[:, None], 2: above[:, None] / below, 5: 1 / above}
    old = {layer: copy.deepcopy(optimizer.state[model[layer].weight]) for layer in factors}
    act_on_(model, symmetry, elements, optimizer)
    count = 0
    for layer, state in old.items():
        for key, value in state.items():
            new = optimizer.state[model[layer].weight][key]
            power = STATE_POWERS.get(key, 2) if value.dim() else 0
            torch.testing.assert_close(new, value / factors[layer] ** power if power else value)
            count += value.dim() > 0
    assert count >= 3


def test_means_of_squares_of_mixed_units_move_as_if_units_were_independent():
    model, symmetry, x, y = case("lora")
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, x, y, 2)
    [g] = elements = random_elements(symmetry, 0.5, torch.Generator().manual_seed(0))
    A, B, head = (optimizer.state[p]["exp_avg_sq"] for p in (model.A, model.B, model.head.weight))
    before = [squares.clone() for squares in (A, B, head)]
    act_on_(model, symmetry, elements, optimizer)
    torch.testing.assert_close(A, torch.linalg.inv(g[0]).mT ** 2 @ before[0])
    torch.testing.assert_close(B, before[1] @ (g[0] ** 2).mT)
    assert torch.equal(head, before[2]) and (A >= 0).all() and (B >= 0).all()


# LBFGS keeps the state of all parameters with the first, which the second group does not move
STRANGE = [("Rprop", 0), ("Adamax", 0), ("LBFGS", 0), ("LBFGS", 1), ("Adafactor", 0)]


@pytest.mark.parametrize("kind,first", STRANGE)
def test_state_that_no_rule_moves_is_named_before_anything_moves(kind, first):
    model, symmetry, x, y = case("mlp")
    optimizer = getattr(torch.optim, kind)(model.parameters())

    def closure():
        backward(model, x, y)
        return loss_of(model(x), y)

    optimizer.step(closure)
    before = copies(model)
    with pytest.raises(ValueError, match=f"no rule moves .* of {kind}"):
        teleport_(model, symmetry[first:], optimizer)
    assert same(model.parameters(), before)
    teleport_(model, symmetry)


def test_an_optimizer_of_other_parameters_is_refused():
    model, symmetry, x, y = with_gradients("mlp")
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, x, y)
    other, symmetry, *_ = with_gradients("mlp")
    with pytest.raises(ValueError, match="none of the parameters that move"):
        teleport_(other, symmetry, optimizer)


def test_a_group_whose_list_of_axes_changes_is_noticed():
    model, symmetry, x, y = with_gradients("mlp", training=False)
    bias = next(axis for axis in symmetry[1].axes if axis.name == "2.bias")
    symmetry[1].axes.remove(bias)
    teleport_(model, symmetry)
    symmetry[1].axes.insert(0, bias)
    before = model(x).detach()
    teleport_(model, symmetry)
    torch.testing.assert_close(model(x).detach(), before)


def test_an_average_of_weights_moves_along():
    model, symmetry, x, y = case("gpt")
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    train(model, optimizer, x, y)
    average.update_parameters(model)
    reference, old_reference = copies(model), copies(model)
    before = average(x).detach()
    backward(model, x, y)
    teleport_(model, symmetry, optimizer, steps=5, also=[average.parameters(), reference])
    torch.testing.assert_close(average(x).detach(), before)
    assert not torch.equal(reference[2], old_reference[2])
    with pytest.raises(ValueError, match="tensors with the shapes of all parameters"):
        teleport_(model, symmetry, also=[reference[1:]])


def test_float32_weights_of_a_bfloat16_model_move_with_their_gradients_and_state():
    reference, symmetry, x, y = case("mlp", torch.float32, training=False)
    model, masters = copy.deepcopy(reference).bfloat16(), copies(reference)
    optimizers = [torch.optim.Adam(reference.parameters()), torch.optim.Adam(masters)]
    for _ in range(2):
        backward(reference, x, y)
        for p, q in zip(masters, reference.parameters()):
            p.grad = q.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, master in zip(model.parameters(), masters):
        p.data.copy_(master)
    teleport_(reference, symmetry, optimizers[0], steps=3)
    before, after = teleport_(model, symmetry, optimizers[1], steps=3, also=[masters])
    assert before.dtype == torch.float32 and after > before
    for p, master, q in zip(model.parameters(), masters, reference.parameters()):
        assert torch.equal(master, q) and torch.equal(master.grad, q.grad)
        states = (optimizers[0].state[q], optimizers[1].state[master])
        torch.testing.assert_close(*states, rtol=0, atol=0)
        torch.testing.assert_close(p.float(), master, rtol=2e-2, atol=0)
        assert p.dtype == torch.bfloat16


def test_what_is_named_twice_moves_once():
    model, symmetry, x, y = with_gradients("mlp")
    twin, *_ = with_gradients("mlp")
    teleport_(model, symmetry)
    teleport_(twin, symmetry, also=[twin.parameters()])
    assert same(model.parameters(), twin.parameters())


# -- gradients that are not there, sparse, or not finite


def test_groups_without_gradients_stay_and_frozen_parameters_of_others_move():
    model, symmetry, x, y = case("mlp", training=False)
    model[0].requires_grad_(False), model[2].weight.requires_grad_(False)
    before, start = model(x).detach(), copies(model)
    backward(model, x, y)
    assert len(gradients(model)) == 3
    old, new = teleport_(model, symmetry, steps=3)
    assert new > old
    torch.testing.assert_close(model(x).detach(), before)
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), start)]
    assert moved == [False, False, True, True, True, False]
    loss_of(model(x), y).backward()  # without zero_grad: twice the gradient at the new point
    torch.testing.assert_close(squares(gradients(model).values()), 4 * new)
    model.zero_grad()
    with pytest.raises(ValueError, match="between backward"):
        teleport_(model, symmetry)


@pytest.mark.parametrize("name,value", [("mlp", torch.inf), ("gpt", torch.nan)])
def test_gradients_that_are_not_finite_move_nothing(name, value):
    model, symmetry, x, y = case(name, torch.float32)
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, x, y)
    before, state = copies(model), copy.deepcopy(optimizer.state_dict()["state"])
    next(model.parameters()).grad.view(-1)[0] = value
    teleport_(model, symmetry, optimizer, steps=2)
    assert same(model.parameters(), before)
    torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)


def test_sparse_gradients_of_other_parameters_count_and_those_of_a_group_are_refused():
    net, symmetry = mlp()
    model = nn.Sequential(nn.EmbeddingBag(10, 12, sparse=True), *net)
    axes = [
        [a._replace(name=f"{int(a.name[0]) + 1}{a.name[1:]}") for a in g.axes] for g in symmetry
    ]
    symmetry = [group._replace(axes=some) for group, some in zip(symmetry, axes)]
    loss_of(model(torch.randint(10, (20, 4))), torch.randint(5, (20,))).backward()
    dense = [p.grad.clone().to_dense() for p in model.parameters()]
    before, after = teleport_(model, symmetry)
    torch.testing.assert_close(before.double(), squares(dense))
    assert after > before
    with pytest.raises(ValueError, match="gradient of 0.weight is sparse"):
        teleport_(model, [units(12, [("0.weight", 1)], [("1.weight", 1)])])


def test_matrix_products_are_not_cut_to_fewer_digits():
    model, symmetry, x, y = with_gradients("gpt", torch.float32)
    twin, *_ = with_gradients("gpt", torch.float32)
    teleport_(model, symmetry, steps=2)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            teleport_(twin, symmetry, steps=2)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert same(model.parameters(), twin.parameters())


def test_what_does_not_fit_is_refused_and_plans_follow_the_model():
    model, symmetry, x, y = with_gradients("mlp")
    teleport_(model, symmetry)
    with pytest.raises(ValueError, match="which is no parameter"):
        teleport_(model, [units(9, [("7.weight", 0)], [("2.weight", 1)])])
    with pytest.raises(ValueError, match="no groups"):
        teleport_(model, [])
    nan, inf = float("nan"), float("inf")
    bad = {"length": (0.0, 1.5, nan), "steps": (0, -1), "until": (0.0, -2.0, nan, inf)}
    for option, values in bad.items():
        for value in values:
            with pytest.raises(ValueError, match=f"{option} is"):
                teleport_(model, symmetry, **{option: value})
    model.float()  # the parameters' types, and which have gradients, are new
    backward(model, x.float(), y)
    before, after = teleport_(nn.DataParallel(model), symmetry)
    assert after > before and after.dtype == torch.float32


def test_families_that_are_too_large_for_one_stack_are_several(monkeypatch):
    results = []
    for largest in (2**25, 1):
        monkeypatch.setattr("parameter_symmetries.stacks.LARGEST", largest)
        model, symmetry, x, y = with_gradients("gpt")
        results.append([*teleport_(model, symmetry, steps=2), *model.parameters()])
    torch.testing.assert_close(*results)


# -- any objective


@pytest.mark.parametrize("name", ["cnn", "gpt"])
def test_any_function_of_the_parameters_is_an_objective(name):
    model, symmetry, x, y = case(name, training=False)
    before = outputs(model, dict(model.named_parameters()), x)

    def loss(parameters):
        return loss_of(outputs(model, parameters, x), y)

    for objective in (
        lambda p: sum((v**2).sum() for v in p.values()),
        mean_perturbed_loss(loss, [0.5, 1.0]),
        gradient_norm_of(model, x, y),
    ):
        path = teleport_to(model, symmetry, objective, -0.01, 3)
        assert len(path) == 4 and (path.diff() < 0).all()
        assert objective({n: p.detach() for n, p in model.named_parameters()}).isclose(path[-1])
    after = outputs(model, dict(model.named_parameters()), x)
    torch.testing.assert_close(after, before, atol=1e-10, rtol=1e-10)
    assert mean_perturbed_loss(loss, [0.0])(dict(model.named_parameters())).isclose(loss({}))
    perturbed = mean_perturbed_loss(lambda p: sum((v**2).sum() for v in p.values()), [3.0, 4.0])
    assert perturbed({n: 0 * p for n, p in model.named_parameters()}).item() == pytest.approx(12.5)


def test_the_general_ascent_moves_what_the_other_moves():
    model, symmetry, x, y = case("gpt", training=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    train(model, optimizer, x, y)
    backward(model, x, y)
    objective, old = gradient_norm_of(model, x, y), copies(model)
    path = teleport_to(model, symmetry, objective, 0.1, 3, optimizer, max_norm=0.05)
    moved = gradients(model)
    torch.testing.assert_close(squares(moved.values()), path[-1])
    backward(model, x, y)
    torch.testing.assert_close(moved, gradients(model))
    for before, p, gradient in zip(old, model.parameters(), moved.values()):
        state = optimizer.state[p]["momentum_buffer"]
        assert torch.equal(before, p) or not torch.equal(state, gradient)
    path = teleport_to(model, symmetry, objective, 0.1, 50, max_norm=0.05, stop=1.5 * path[-1])
    assert len(path) < 51


def test_an_objective_that_is_not_finite_leaves_the_model():
    model, symmetry, x, y = case("mlp")
    before = copies(model)
    with pytest.raises(ValueError, match="take a smaller lr"):
        teleport_to(model, symmetry, gradient_norm_of(model, x, y), 1e9, 3)
    assert same(model.parameters(), before)


def test_on_an_mlp_this_and_the_core_agree():
    weights = [w.double() for w in init_weights((12, 9, 7, 5), 3)]
    x, y = torch.randn(12, 20, dtype=torch.float64), torch.randint(5, (20,))
    options = {"action": teleportation.RESCALING, "return_path": True}
    moved, core = teleportation.teleport(weights, x, y, 0.1, 5, LeakyReLU(), **options)
    layers = [nn.Linear(*w.shape[::-1], bias=False) for w in weights]
    model = nn.Sequential(layers[0], LeakyReLU(), layers[1], LeakyReLU(), layers[2]).double()
    for p, w in zip(model.parameters(), weights):
        p.data = w.clone()
    first = units(9, [("0.weight", 0)], [("2.weight", 1)])
    second = units(7, [("2.weight", 0)], [("4.weight", 1)])
    path = teleport_to(model, [first, second], gradient_norm_of(model, x.T, y), 0.1, 5)
    torch.testing.assert_close(path, core["objective"])
    torch.testing.assert_close(copies(model), moved)
