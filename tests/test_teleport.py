"""Teleports between backward() and step(): the path of double backward, and what moves along."""

import copy

import pytest
import torch
from torch import nn

import teleportation
from models import LeakyReLU, init_weights
from parameter_symmetries.ascent import Orbit
from parameter_symmetries.ascent import slopes as slopes_by_autograd
from parameter_symmetries.groups import (
    act_on,
    outputs,
    random_elements,
)
from parameter_symmetries.moving import act_on_
from parameter_symmetries.objectives import (
    Exponential,
    gradient_norm,
    mean_perturbed_loss,
    teleport_to,
)
from parameter_symmetries.teleport import teleport_
from symmetric_models import MODELS, case, loss_of, mlp, units


def backward(model, x, y):
    """Compute the gradients of a batch, with the dropout masks and buffers of `outputs`."""
    model.zero_grad()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(0)
    loss_of(model(x), y).backward()
    model.load_state_dict(buffers, strict=False)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def squares(tensors):
    return sum(t.double().square().sum() for t in tensors)


def sums_of_squares(group, tensors):
    """Return A + B of a group, row by row: the products of the gradients' rows with themselves."""
    total = torch.zeros(group.count, group.size, group.size, dtype=torch.float64)
    for axis in group.axes:
        if axis.name not in tensors:
            continue
        dims = axis.dim if isinstance(axis.dim, tuple) else (axis.dim,)
        entries = (
            tensors[axis.name].movedim(dims, tuple(range(len(dims)))).flatten(0, len(dims) - 1)
        )
        index = (
            torch.arange(len(entries)).view(-1, group.size) if axis.index is None else axis.index
        )
        for row, positions in enumerate(index):
            member = row * group.count // len(index) if axis.member is None else axis.member[row]
            vectors = entries[positions].reshape(group.size, -1)
            total[member] += abs(axis.power) * vectors @ vectors.T
    return total


def by_double_backward(model, symmetry, x, y, length, steps):
    """Return the parameters and the objective after ascent with gradients by autograd."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    objective = gradient_norm(lambda p: loss_of(outputs(model, p, x), y), names)
    zeros = [torch.zeros(g.count, g.size, g.size, dtype=torch.float64) for g in symmetry]
    orbit = Orbit(
        lambda tensors, elements: list(
            act_on(dict(zip(parameters, tensors)), symmetry, elements).values()
        ),
        [Exponential(group) for group in symmetry],
        zeros,
    )

    def value(tensors):
        return objective(dict(zip(parameters, tensors)))

    for _ in range(steps):
        _, slopes = slopes_by_autograd(orbit, value, list(parameters.values()))
        point = {n: p.clone().requires_grad_(n in names) for n, p in parameters.items()}
        loss = loss_of(outputs(model, point, x), y)
        trained = [point[name] for name in names]
        grad = dict(zip(names, torch.autograd.grad(loss, trained, materialize_grads=True)))
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
        model, symmetry, x, y = case(name, training=training)
        before = outputs(model, dict(model.named_parameters()), x)
        expected, objective = by_double_backward(model, symmetry, x, y, length, steps)
        backward(model, x, y)
        start = squares(gradients(model).values())
        found = teleport_(model, symmetry, steps=steps, length=length)
        torch.testing.assert_close(torch.stack(found), torch.stack([start, objective]))
        for p, key in zip(model.parameters(), expected):
            torch.testing.assert_close(p.detach(), expected[key], atol=1e-10, rtol=1e-10)
        moved = gradients(model)
        backward(model, x, y)
        for key, g in gradients(model).items():
            torch.testing.assert_close(moved[key], g, atol=1e-10, rtol=1e-10)
        after = outputs(model, dict(model.named_parameters()), x)
        torch.testing.assert_close(after, before, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_single_precision_follows_the_same_path(name):
    reference, symmetry, x, y = case(name, training=False)
    model, _, x_single, _ = case(name, torch.float32, training=False)
    backward(reference, x, y), backward(model, x_single, y)
    double = teleport_(reference, symmetry, steps=10)
    single = teleport_(model, symmetry, steps=10)
    assert double[1] > 1.5 * double[0]
    torch.testing.assert_close(torch.stack(single).double(), torch.stack(double), rtol=1e-4, atol=0)
    for p, q in zip(model.parameters(), reference.parameters()):
        torch.testing.assert_close(p.double(), q, atol=1e-4, rtol=1e-4)
        assert p.dtype == torch.float32


def test_an_element_moves_by_the_length_at_most_and_scales_do_not_matter():
    model, symmetry, x, y = case("gpt")
    backward(model, x, y)
    for name, p in model.named_parameters():
        if name == "blocks.0.ln_1.weight":
            p.grad.mul_(1e6)  # units that others should follow entirely
    scaled = copy.deepcopy(model)
    for p, q in zip(scaled.parameters(), model.parameters()):
        p.grad = 1e-8 * q.grad
    before = model.blocks[0].ln_1.weight.detach().clone()
    for net in (model, scaled):
        teleport_(net, symmetry, length=0.3)
    log_factors = (model.blocks[0].ln_1.weight / before).log()
    torch.testing.assert_close(log_factors, torch.full((8,), -0.3, dtype=torch.float64))
    for p, q in zip(model.parameters(), scaled.parameters()):
        torch.testing.assert_close(p, q)


def test_until_names_a_factor_that_is_reached_and_hardly_passed():
    for name in ("mlp", "linear", "gpt"):
        for factor in (1.01, 1.5, 10.0, 0.95):
            model, symmetry, x, y = case(name)
            backward(model, x, y)
            before, after = teleport_(model, symmetry, until=factor)
            assert abs((after / before).log() / torch.tensor(factor).log() - 1) < 0.1
            assert (after - factor * before) * (factor - 1) >= 0
    model, symmetry, x, y = case("mlp")
    backward(model, x, y)
    before, after = teleport_(model, symmetry, until=1e9, steps=2)
    assert before < after < 2 * before


def test_descent_balances_a_network():
    """At the minimum along the orbit A = B: each unit makes as much gradient as it reads."""
    for name in ("mlp", "linear"):
        model, symmetry, x, y = case(name, training=False)
        backward(model, x, y)
        teleport_(model, symmetry, length=-0.5, steps=100)
        for group in symmetry:
            A, B = (
                sums_of_squares(
                    group._replace(axes=[a for a in group.axes if a.power * sign > 0]),
                    gradients(model),
                )
                for sign in (1, -1)
            )
            assert ((A - B).norm(dim=(1, 2)) <= 1e-2 * (A + B).norm(dim=(1, 2))).all()


# -- what moves along


def train(model, optimizer, batches):
    for x, y in batches:
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()


def batches_of(name, x, number):
    n = len(x)
    shape = x.shape if name == "gpt" else (n,)
    return [(x, torch.randint(5, shape)) for _ in range(number)]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", ["mlp", "cnn", "linear", "gpt", "grouped_queries"])
def test_sgd_after_a_teleport_is_preconditioned_sgd(name, momentum):
    """Seen from where one came from, the gradient is multiplied by (gᵀg)^{-1}."""
    model, symmetry, x, _ = case(name, training=False)
    batches = batches_of(name, x, 20)
    elements = random_elements(symmetry, 0.3, torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=momentum)
    train(model, optimizer, batches[:3])
    w = {n: p.detach().clone() for n, p in model.named_parameters()}
    buffers = {n: torch.zeros_like(p) for n, p in w.items()}
    if momentum:
        buffers = {
            n: optimizer.state[p]["momentum_buffer"].clone() for n, p in model.named_parameters()
        }
    act_on_(model, symmetry, elements, optimizer)
    for batch_x, y in batches:
        train(model, optimizer, [(batch_x, y)])
        w = {n: p.requires_grad_() for n, p in w.items()}
        loss = loss_of(torch.func.functional_call(model, w, batch_x), y)
        grad = dict(zip(w, torch.autograd.grad(loss, w.values())))
        buffers = {n: momentum * m + grad[n] for n, m in buffers.items()}
        step = act_on(buffers, symmetry, [torch.linalg.inv(g.mT @ g) for g in elements])
        w = {n: p.detach() - 0.01 * step[n] for n, p in w.items()}
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
    train(model, optimizer, [(x, y)] * 2)
    elements = random_elements(symmetry, 0.5, torch.Generator().manual_seed(0))
    below, above = (g.flatten() for g in elements)
    old = {
        layer: {k: v.clone() for k, v in optimizer.state[model[layer].weight].items()}
        for layer in (0, 2, 5)
    }
    factors = {0: below[:, None], 2: above[:, None] / below, 5: 1 / above}
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
    train(model, optimizer, [(x, y)] * 2)
    [g] = elements = random_elements(symmetry, 0.5, torch.Generator().manual_seed(0))
    squares = {
        n: optimizer.state[p]["exp_avg_sq"].clone()
        for n, p in model.named_parameters()
        if p in optimizer.state
    }
    act_on_(model, symmetry, elements, optimizer)
    new = {n: optimizer.state[p]["exp_avg_sq"] for n, p in model.named_parameters() if n in squares}
    inverse = torch.linalg.inv(g[0]).mT
    torch.testing.assert_close(new["A"], inverse**2 @ squares["A"])
    torch.testing.assert_close(new["B"], squares["B"] @ (g[0] ** 2).mT)
    torch.testing.assert_close(new["head.weight"], squares["head.weight"])
    assert all((v >= 0).all() for v in new.values())


@pytest.mark.parametrize("kind", ["Rprop", "Adamax", "LBFGS", "Adafactor"])
def test_state_that_no_rule_moves_is_named_before_anything_moves(kind):
    model, symmetry, x, y = case("mlp")
    optimizer = getattr(torch.optim, kind)(model.parameters())

    def closure():
        backward(model, x, y)
        return loss_of(model(x), y)

    optimizer.step(closure)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=f"no rule moves .* of {kind}"):
        teleport_(model, symmetry, optimizer)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before))
    teleport_(model, symmetry)


def test_state_of_all_parameters_is_noticed_where_its_first_one_stays():
    model, symmetry, x, y = case("mlp")
    optimizer = torch.optim.LBFGS(model.parameters())

    def closure():
        backward(model, x, y)
        return loss_of(model(x), y)

    optimizer.step(closure)
    with pytest.raises(ValueError, match="no rule moves .* of LBFGS"):
        teleport_(model, symmetry[1:], optimizer)


def test_an_optimizer_of_other_parameters_is_refused():
    model, symmetry, x, y = case("mlp")
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, [(x, y)])
    other = copy.deepcopy(model)
    backward(other, x, y)
    with pytest.raises(ValueError, match="none of the parameters that move"):
        teleport_(other, symmetry, optimizer)


def test_sparse_gradients_of_a_group_are_refused():
    model = nn.Sequential(nn.EmbeddingBag(10, 4, sparse=True), nn.ReLU(), nn.Linear(4, 3))
    symmetry = [units(4, [("0.weight", 1)], [("2.weight", 1)])]
    model(torch.randint(10, (5, 2))).square().sum().backward()
    with pytest.raises(ValueError, match="gradient of 0.weight is sparse"):
        teleport_(model, symmetry)


def test_a_group_whose_list_of_axes_changes_is_noticed():
    model, symmetry, x, y = case("mlp", training=False)
    bias = next(axis for axis in symmetry[1].axes if axis.name == "2.bias")
    symmetry[1].axes.remove(bias)
    backward(model, x, y)
    teleport_(model, symmetry)
    symmetry[1].axes.insert(0, bias)
    before = model(x).detach()
    teleport_(model, symmetry)
    torch.testing.assert_close(model(x).detach(), before)


def test_a_teleport_before_each_step_trains_on():
    model, symmetry, x, y = case("cnn", torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = loss_of(model(x), y)
        loss.backward()
        teleport_(model, symmetry, optimizer, until=1.2)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_an_average_of_weights_moves_along():
    model, symmetry, x, y = case("gpt")
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    train(model, optimizer, [(x, y)])
    average.update_parameters(model)
    reference = [p.detach().clone() for p in model.parameters()]
    old_reference = [p.clone() for p in reference]
    before = average(x).detach()
    backward(model, x, y)
    teleport_(model, symmetry, optimizer, steps=5, also=[average.parameters(), reference])
    torch.testing.assert_close(average(x).detach(), before)
    assert not torch.equal(reference[2], old_reference[2])
    with pytest.raises(ValueError, match="tensors with the shapes of all parameters"):
        teleport_(model, symmetry, also=[reference[1:]])


def test_float32_weights_of_a_bfloat16_model_move_with_their_gradients_and_state():
    reference, symmetry, x, y = case("mlp", torch.float32, training=False)
    model = copy.deepcopy(reference).bfloat16()
    masters = [p.detach().clone() for p in reference.parameters()]
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
        for key, value in optimizers[0].state[q].items():
            assert torch.equal(value, optimizers[1].state[master][key])
        torch.testing.assert_close(p.float(), master, rtol=2e-2, atol=0)
        assert p.dtype == torch.bfloat16


def test_what_is_named_twice_moves_once():
    model, symmetry, x, y = case("mlp")
    backward(model, x, y)
    twin = copy.deepcopy(model)
    for p, q in zip(twin.parameters(), model.parameters()):
        p.grad = q.grad.clone()
    teleport_(model, symmetry)
    teleport_(twin, symmetry, also=[twin.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters()))


# -- gradients that are not there, or not finite


def test_groups_without_gradients_stay_and_frozen_parameters_of_others_move():
    model, symmetry, x, y = case("mlp", training=False)
    model[0].requires_grad_(False), model[2].weight.requires_grad_(False)
    before, start = model(x).detach(), [p.clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = None
    loss_of(model(x), y).backward()
    count = len(list(p for p in model.parameters() if p.grad is not None))
    old, new = teleport_(model, symmetry, steps=3)
    assert new > old and count == 3
    torch.testing.assert_close(model(x).detach(), before)
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), start)]
    assert moved == [False, False, True, True, True, False]
    loss_of(model(x), y).backward()  # without zero_grad: twice the gradient at the new point
    torch.testing.assert_close(squares(g for g in gradients(model).values()), 4 * new)
    model.zero_grad()
    with pytest.raises(ValueError, match="between backward"):
        teleport_(model, symmetry)


def test_a_scaler_of_gradients_changes_nothing_and_overflow_moves_nothing():
    model, symmetry, x, y = case("mlp", torch.float32)
    scaled = copy.deepcopy(model)
    backward(model, x, y), backward(scaled, x, y)
    for p in scaled.parameters():
        p.grad *= 2.0**16
    teleport_(model, symmetry), teleport_(scaled, symmetry)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), scaled.parameters()))
    for name, value in (("mlp", torch.inf), ("gpt", torch.nan)):
        model, symmetry, x, y = case(name, torch.float32)
        optimizer = torch.optim.AdamW(model.parameters())
        train(model, optimizer, [(x, y)])
        before = [p.clone() for p in model.parameters()]
        state = copy.deepcopy(optimizer.state_dict()["state"])
        next(model.parameters()).grad.view(-1)[0] = value
        teleport_(model, symmetry, optimizer, steps=2)
        assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before))
        for k, values in optimizer.state_dict()["state"].items():
            assert all(torch.equal(v, state[k][key]) for key, v in values.items())


def test_sparse_gradients_of_other_parameters_count():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.net = nn.EmbeddingBag(10, 12, sparse=True), mlp()[0]

        def forward(self, x):
            return self.net(self.embedding(x))

    model, (_, symmetry) = Bag(), mlp()
    symmetry = [
        g._replace(axes=[a._replace(name="net." + a.name) for a in g.axes]) for g in symmetry
    ]
    loss_of(model(torch.randint(10, (20, 4))), torch.randint(5, (20,))).backward()
    dense = [p.grad.clone().to_dense() for p in model.parameters()]
    before, after = teleport_(model, symmetry)
    torch.testing.assert_close(before.double(), squares(dense))
    assert after > before


def test_matrix_products_are_not_cut_to_fewer_digits():
    model, symmetry, x, y = case("gpt", torch.float32)
    twin = copy.deepcopy(model)
    backward(model, x, y), backward(twin, x, y)
    teleport_(model, symmetry, steps=2)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            teleport_(twin, symmetry, steps=2)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters()))


def test_what_does_not_fit_is_refused_and_plans_follow_the_model():
    model, symmetry, x, y = case("mlp")
    backward(model, x, y)
    teleport_(model, symmetry)
    with pytest.raises(ValueError, match="which is no parameter"):
        teleport_(model, [units(9, [("7.weight", 0)], [("2.weight", 1)])])
    with pytest.raises(ValueError, match="no groups"):
        teleport_(model, [])
    for length in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="length is"):
            teleport_(model, symmetry, length=length)
    for steps in (0, -1):
        with pytest.raises(ValueError, match="steps is"):
            teleport_(model, symmetry, steps=steps)
    for until in (0.0, -2.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="until is"):
            teleport_(model, symmetry, until=until)
    model.float()  # the parameters' types, and which have gradients, are new
    backward(model, x.float(), y)
    before, after = teleport_(nn.DataParallel(model), symmetry)
    assert after > before and after.dtype == torch.float32


def test_families_that_are_too_large_for_one_stack_are_several(monkeypatch):
    results = []
    for largest in (2**25, 1):
        monkeypatch.setattr("parameter_symmetries.stacks.LARGEST", largest)
        model, symmetry, x, y = case("gpt")
        backward(model, x, y)
        results.append([*teleport_(model, symmetry, steps=2), *model.parameters()])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other)


# -- any objective


def test_any_function_of_the_parameters_is_an_objective():
    for name in ("cnn", "gpt"):
        model, symmetry, x, y = case(name, training=False)
        before = outputs(model, dict(model.named_parameters()), x)

        def loss(parameters):
            return loss_of(outputs(model, parameters, x), y)  # noqa: B023

        names = [n for n, p in model.named_parameters() if p.requires_grad]
        for objective in (
            lambda p: sum((v**2).sum() for v in p.values()),
            mean_perturbed_loss(loss, [0.5, 1.0]),
            gradient_norm(loss, names),
        ):
            path = teleport_to(model, symmetry, objective, -0.01, 3)
            assert len(path) == 4 and (path.diff() < 0).all()
            now = {n: p.detach() for n, p in model.named_parameters()}
            assert objective(now).isclose(path[-1])
        after = outputs(model, dict(model.named_parameters()), x)
        torch.testing.assert_close(after, before, atol=1e-10, rtol=1e-10)
        assert mean_perturbed_loss(loss, [0.0])(dict(model.named_parameters())).isclose(loss({}))


def test_the_general_ascent_moves_what_the_other_moves():
    model, symmetry, x, y = case("gpt", training=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    train(model, optimizer, [(x, y)])
    backward(model, x, y)
    names = [n for n, _ in model.named_parameters()]
    objective = gradient_norm(lambda p: loss_of(outputs(model, p, x), y), names)
    old = {n: p.detach().clone() for n, p in model.named_parameters()}
    path = teleport_to(model, symmetry, objective, 0.1, 3, optimizer, max_norm=0.05)
    moved = gradients(model)
    torch.testing.assert_close(squares(moved.values()), path[-1])
    backward(model, x, y)
    for n, p in model.named_parameters():
        torch.testing.assert_close(moved[n], p.grad)
        state = optimizer.state[p]["momentum_buffer"]
        assert torch.equal(old[n], p) or not torch.equal(state, moved[n])
    path = teleport_to(model, symmetry, objective, 0.1, 50, max_norm=0.05, stop=1.5 * path[-1])
    assert len(path) < 51


def test_an_objective_that_is_not_finite_leaves_the_model():
    model, symmetry, x, y = case("mlp")
    before = [p.clone() for p in model.parameters()]
    names = [n for n, _ in model.named_parameters()]
    objective = gradient_norm(lambda p: loss_of(outputs(model, p, x), y), names)
    with pytest.raises(ValueError, match="take a smaller lr"):
        teleport_to(model, symmetry, objective, 1e9, 3)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before))


def test_on_an_mlp_this_and_the_core_agree():
    widths = (12, 9, 7, 5)
    weights = [w.double() for w in init_weights(widths, 3)]
    x, y = torch.randn(12, 20, dtype=torch.float64), torch.randint(5, (20,))
    options = {"action": teleportation.RESCALING, "return_path": True}
    moved, core = teleportation.teleport(weights, x, y, 0.1, 5, LeakyReLU(), **options)
    layers = [nn.Linear(i, o, bias=False) for i, o in zip(widths, widths[1:])]
    model = nn.Sequential(layers[0], LeakyReLU(), layers[1], LeakyReLU(), layers[2]).double()
    for p, w in zip(model.parameters(), weights):
        p.data = w.clone()
    first, second = (
        units(9, [("0.weight", 0)], [("2.weight", 1)]),
        units(7, [("2.weight", 0)], [("4.weight", 1)]),
    )
    names = [n for n, _ in model.named_parameters()]
    objective = gradient_norm(lambda p: loss_of(outputs(model, p, x.T), y), names)
    path = teleport_to(model, [first, second], objective, 0.1, 5)
    torch.testing.assert_close(path, core["objective"])
    for p, w in zip(model.parameters(), moved):
        torch.testing.assert_close(p.detach(), w)
