"""teleportation.py: golden numbers, finite differences, plain formulas, stacks against members."""

import pytest
import torch
from torch.nn import functional as F

import teleportation
from conftest import GOLDEN
from models import Identity, LeakyReLU, ReLU, Tanh, cross_entropy, forward, init_weights
from parameter_symmetries.ascent import slopes
from teleportation import (
    FIRST_ORDER,
    INVERSE_ACTIVATION,
    LINEAR,
    PSEUDOINVERSE,
    RESCALING,
    Action,
    act,
    ascend_to,
    curvature,
    curvature_along,
    curve_derivatives,
    estimate,
    gradient_norm_squared,
    group_action,
    loss_and_gradient_norm_squared,
    orbit_of,
    pseudoinverse,
    random_directions,
    random_generators,
    random_group_elements,
    sharpness,
    sharpness_and_gradient,
    teleport,
    teleport_curvature,
    teleport_sharpness,
    two_derivatives,
    with_mixed_derivatives,
)
from teleports import level_set_ascent

WIDTHS = (12, 6, 5, 10)


class Softplus(torch.nn.Softplus):
    """A user's own activation."""

    def derivative(self, x):
        return x.sigmoid()


ROTATION = Action(  # a user's own action, on the hidden units of linear networks
    lambda U, V, h, g, activation: (U @ g.mT, g @ V),
    lambda activation: isinstance(activation, Identity),
    lambda T: (T - T.mT) / 2,
    torch.linalg.matrix_exp,
)
ACTIONS = {
    "pseudoinverse": PSEUDOINVERSE,
    "inverse activation": INVERSE_ACTIVATION,
    "first order": FIRST_ORDER,
    "rescaling": RESCALING,
    "linear": LINEAR,
    "rotation": ROTATION,
}
DEFINED = [
    pytest.param(action, activation, id=f"{name}, {activation}")
    for name, action in ACTIONS.items()
    for activation in (LeakyReLU(), ReLU(), Tanh(), Identity(), Softplus())
    if action.is_defined(activation)
]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def norms(weights):
    return [w.norm(dim=(-2, -1)).tolist() for w in weights]


def member(weights, run):
    return [w[run] for w in weights]


def stack_with(weights):
    """Return a stack of three runs with `weights` as the second."""
    others = [0.5 * w for w in weights], [1.5 * w for w in weights]
    return [torch.stack(layer) for layer in zip(others[0], weights, others[1])]


def small_elements(action, size=0.05):
    """Return an element for each of the three runs and two pairs."""
    T = [action.project(size * normal(3, d, d, seed=d)) for d in (6, 5)]
    return [action.element(t) for t in T]


@pytest.fixture
def case():
    """Three networks, a batch, five directions of different lengths and two generators.

    With ReLU, too, their hidden activations have full rank on the batch and on its first images.
    """
    weights = [w.double() for w in init_weights(WIDTHS, [0, 3, 12])]
    y = torch.randint(10, (20,), generator=torch.Generator().manual_seed(5))
    rng = torch.Generator().manual_seed(6)
    directions = [d.double() for d in random_directions(WIDTHS, [0.1, 0.5, 1, 2, 4], rng)]
    generators = [M.double() for M in random_generators(WIDTHS, rng)]
    return weights, normal(12, 20), y, directions, generators


# Group actions


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (6, 6), (3, 6, 20)])
def test_pseudoinverse_is_torchs(shape):
    torch.testing.assert_close(pseudoinverse(normal(*shape)), torch.linalg.pinv(normal(*shape)))


@pytest.mark.parametrize("tall", [False, True])
def test_matrices_of_less_rank_are_named_and_inverted_as_torch_does(tall):
    h = normal(2, 3, 4, 9)
    h[1, 2, 3] = 2 * h[1, 2, 0] - h[1, 2, 1]
    h = h.mT if tall else h
    with pytest.warns(UserWarning, match=r"of the runs \[\[1, 2\]\] do not have full rank"):
        inverse = pseudoinverse(h)
    torch.testing.assert_close(inverse, torch.linalg.pinv(h))
    with pytest.warns(UserWarning, match="do not have full rank"):
        torch.testing.assert_close(pseudoinverse(h[1, 2]), inverse[1, 2])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_matrix_that_is_not_finite_is_named_and_the_others_are_inverted(value):
    h = normal(2, 3, 4, 9)
    expected = torch.linalg.pinv(h)
    h[0, 1, 2, 2] = value
    with pytest.warns(UserWarning, match=r"\[4, 9\] of the runs \[\[0, 1\]\] .* not finite"):
        inverse = pseudoinverse(h)
    assert not inverse[0, 1].isfinite().all()
    inverse[0, 1] = expected[0, 1]
    torch.testing.assert_close(inverse, expected)


@pytest.mark.parametrize(("action", "activation"), DEFINED)
def test_an_action_keeps_what_it_promises_to_keep(case, action, activation):
    """The function, the outputs on a batch as small as the layers, or these to first order."""
    weights, x = case[0], case[1][:, :4] / 3
    if action in (RESCALING, LINEAR, ROTATION):
        x = 100 * normal(12, 50)
    outputs = forward(weights, x, activation)
    moved = act(weights, x, small_elements(action), activation, action)
    change = forward(moved, x, activation) - outputs
    assert all((new - w).abs().max() > 1e-3 for new, w in zip(moved, weights))
    if action is FIRST_ORDER:
        nearer = act(weights, x, small_elements(action, 0.05 / 8), activation, action)
        nearer_change = forward(nearer, x, activation) - outputs
        assert nearer_change.norm() < change.norm() / 50
    else:
        torch.testing.assert_close(change, torch.zeros_like(change), atol=1e-7, rtol=0)


@pytest.mark.parametrize("action", [PSEUDOINVERSE, INVERSE_ACTIVATION, RESCALING])
def test_the_identity_acts_as_nothing_and_elements_compose(case, activation, action):
    (V, U, _), x = case[0], case[1][:, :4]  # so few images that the outputs are kept

    def hidden_and_outputs(U, V):
        return V @ x, U @ activation(V @ x)

    g, h = small_elements(action)[0], small_elements(action, 0.1)[0]
    identity = action.element(torch.zeros(3, 6, 6, dtype=torch.float64))
    nothing = hidden_and_outputs(*action.act(U, V, x, identity, activation))
    torch.testing.assert_close(nothing, hidden_and_outputs(U, V))
    once = action.act(U, V, x, g @ h, activation)
    twice = action.act(*action.act(U, V, x, h, activation), x, g, activation)
    torch.testing.assert_close(hidden_and_outputs(*twice), hidden_and_outputs(*once))


def test_on_a_large_batch_the_refit_is_the_least_squares_one(case, activation):
    V, U = case[0][0][0], case[0][1][0]
    U_new, V_new = group_action(U, V, case[1], small_elements(PSEUDOINVERSE)[0][0], activation)
    hidden, outputs = activation(V_new @ case[1]), U @ activation(V @ case[1])
    torch.testing.assert_close(U_new, torch.linalg.lstsq(hidden.T, outputs.T).solution.T)


def test_random_elements_are_as_far_from_the_identity_and_in_the_group():
    rng = torch.Generator().manual_seed(0)
    elements = [torch.eye(d) + torch.randn(2, 3, d, d, generator=rng) for d in (6, 5)]
    for g, drawn in zip(elements, random_group_elements(elements, rng)):
        lengths = [(a - torch.eye(len(a[0, 0]))).norm(dim=(-2, -1)) for a in (g, drawn)]
        torch.testing.assert_close(*lengths)
        assert not torch.allclose(g, drawn)
    (g,) = random_group_elements([1.1 * torch.eye(4)[None]], rng, RESCALING)
    scale = g.diagonal(dim1=-2, dim2=-1)
    assert (scale > 0).all() and torch.equal(g, torch.diag_embed(scale))
    torch.testing.assert_close(scale.log().norm(), torch.tensor(0.2))


BAD = {
    "a matrix for each pair is missing": (lambda w, g: (w, g[:1]), PSEUDOINVERSE, LeakyReLU()),
    "a matrix of another size": (lambda w, g: (w, [g[0], g[0]]), PSEUDOINVERSE, LeakyReLU()),
    "one layer": (lambda w, g: (w[:1], []), PSEUDOINVERSE, LeakyReLU()),
    "no layers": (lambda w, g: ([], []), PSEUDOINVERSE, LeakyReLU()),
    "no inverse": (lambda w, g: (w, g), INVERSE_ACTIVATION, ReLU()),
    "not homogeneous": (lambda w, g: (w, g), RESCALING, Tanh()),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_does_not_fit_an_action_is_named(case, bad):
    spoil, action, activation = BAD[bad]
    weights, elements = spoil(case[0], small_elements(PSEUDOINVERSE))
    with pytest.raises(ValueError, match="needs a square matrix|not defined|must be"):
        act(weights, case[1], elements, activation, action)


# Ascent, and teleports to a larger gradient


@pytest.mark.parametrize("stacked", [False, True], ids=["alone", "stack"])
def test_group_action_and_slopes_are_the_published_ones(golden, activation, stacked):
    weights = stack_with(golden["weights"]) if stacked else golden["weights"]
    run, x, y = (1 if stacked else ...), golden["x"], golden["y"]

    def objective(weights):
        return gradient_norm_squared(weights, x, y, activation)

    norm = objective(weights)[run].item()
    assert norm == pytest.approx(golden["gradient_norm_squared"], abs=1e-8)
    _, slope = slopes(orbit_of(weights, x, activation), objective, weights)
    T = member(slope, run)
    assert norms(T) == pytest.approx(golden["teleport_gradient_norms"], abs=1e-8)
    assert [t[0, 0].item() for t in T] == pytest.approx(golden["teleport_gradient_00"], abs=1e-8)
    assert [t[0, 1].item() for t in T] == pytest.approx(golden["teleport_gradient_01"], abs=1e-8)

    V, U, top = weights
    g = torch.eye(len(golden["generators"][0])) + 0.1 * golden["generators"][0]
    U, V = group_action(U, V, x, g, activation)
    assert norms([U[run], V[run]]) == pytest.approx(golden["action_UV_norms"], abs=1e-8)
    loss = cross_entropy([V, U, top], x, y, activation)[run]
    assert loss.item() == pytest.approx(golden["loss_after_action"], abs=1e-8)


def test_one_step_is_the_published_one_to_first_order(golden, activation):
    """The published hidden activations are right to first order: hence the tolerances."""
    expected, batch = golden["after_1_step_lr_0.05"], (golden["x"], golden["y"])
    weights, path = teleport(golden["weights"], *batch, 0.05, 1, activation, return_path=True)
    loss = cross_entropy(weights, *batch, activation)
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-6)
    assert path["objective"][1].item() == pytest.approx(expected["gradient_norm_squared"], abs=1e-6)
    assert norms(weights) == pytest.approx(expected["weight_norms"], abs=1e-4)


OBJECTIVES = {
    "|∇L|²": lambda case, σ: lambda w: gradient_norm_squared(w, case[1], case[2], σ),
    "φ": lambda case, σ: lambda w: sharpness(w, case[1], case[2], case[3], σ),
    "κ": lambda case, σ: lambda w: curvature_along(w, case[1], 3 * case[4][1], 1, σ)[0],
}


@pytest.mark.parametrize(("action", "activation"), DEFINED)
def test_slopes_are_finite_differences(case, action, activation):
    """Along its slope every objective changes by the slope's length."""
    weights, orbit = case[0], orbit_of(case[0], case[1], activation, action)
    for name, make in OBJECTIVES.items():
        if name == "κ" and not isinstance(activation, LeakyReLU):
            continue  # one activation suffices
        objective = make(case, activation)
        _, slope = slopes(orbit, objective, weights)
        length = sum(t.square().sum((-2, -1)) for t in slope).sqrt()
        if action is ROTATION and name == "|∇L|²":
            torch.testing.assert_close(length, torch.zeros_like(length))  # rotations keep it
            continue
        ends = []
        for step in (1e-6, -1e-6):
            T = [step * t / length[:, None, None] for t in slope]
            ends.append(objective(orbit.act(weights, [action.element(t) for t in T])))
        torch.testing.assert_close((ends[0] - ends[1]) / 2e-6, length, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("n", [4, 20], ids=["few images", "many images"])
@pytest.mark.parametrize(("action", "activation"), DEFINED)
def test_a_teleport_ascends_and_a_stack_moves_as_its_members_do_alone(case, action, activation, n):
    weights, x, y, *_ = case
    x, y = x[:, :n], y[:n]
    moved, path = teleport(weights, x, y, 1e-4, 3, activation, return_path=True, action=action)
    norm = gradient_norm_squared(moved, x, y, activation)
    torch.testing.assert_close(path["objective"][-1], norm)
    if action is not ROTATION:
        assert (path["objective"].diff(dim=0) > 0).all()
    for run in range(3):
        alone = teleport(member(weights, run), x, y, 1e-4, 3, activation, action=action)
        torch.testing.assert_close(member(moved, run), alone)


def test_an_action_needs_no_shortcut_to_the_span_of_the_batch(case, activation):
    """The same as PSEUDOINVERSE, but that it does not say that V' = gV."""
    weights, x, y, *_ = case
    shortcut, path = teleport(weights, x, y, 1e-2, 3, activation, return_path=True)
    plain = teleport(weights, x, y, 1e-2, 3, activation, action=Action(group_action))
    torch.testing.assert_close(shortcut, plain, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(shortcut[0], path["group_elements"][0] @ weights[0])


def test_a_run_above_the_cap_stays_and_the_others_go_on(case, activation):
    weights, x, y, *_ = case
    start = gradient_norm_squared(weights, x, y, activation)
    cap = start.sort().values[:2].mean()  # between the least and the next
    moved = teleport(weights, x, y, 1e-3, 2, activation, cap=cap)
    for w, new in zip(weights, moved):
        stayed = torch.isclose(w, new, rtol=0, atol=1e-12).flatten(1).all(1)
        assert stayed.tolist() == (start > cap).tolist()


def test_a_run_whose_activations_lost_their_rank_does_not_stop_the_others(case, activation):
    weights, x, y, *_ = case
    expected = teleport(weights, x, y, 1e-3, 2, activation)
    weights[0][1, 3] = weights[0][1, 2]  # two equal units in one run
    with pytest.warns(UserWarning, match=r"\[\[1\]\] do not have full rank"):
        moved = teleport(weights, x, y, 1e-3, 2, activation)
    for w, other in zip(moved, expected):
        assert w.isfinite().all()
        torch.testing.assert_close(w[[0, 2]], other[[0, 2]])


@pytest.mark.parametrize("factor", [1.1, 0.99])
def test_runs_move_until_the_gradient_has_changed_by_a_factor(case, activation, factor):
    weights, x, y, *_ = case

    def objective(weights):
        return gradient_norm_squared(weights, x, y, activation)

    start = objective(weights)
    target = factor * start
    target[0] = start[0] * (1 + 100 * (factor - 1))  # out of reach of so few steps
    how = (x, 1e-2, 30, activation, RESCALING)
    moved, path = ascend_to(target, objective, weights, *how)
    torch.testing.assert_close(objective(moved), path[-1])
    assert ((factor - 1) * (path[-1] - target) >= 0).tolist() == [False, True, True]
    torch.testing.assert_close(path[-1, 1:], target[1:], rtol=1e-3, atol=0)
    for run in range(3):
        alone, _ = ascend_to(target[run], objective, member(weights, run), *how)
        torch.testing.assert_close(member(moved, run), alone)


def test_ascent_within_the_level_set_keeps_the_loss_and_beats_rescaling(case, activation):
    weights, x, y, *_ = case

    def loss_and_norm(weights):
        return loss_and_gradient_norm_squared(weights, x, y, activation)

    loss, norm = loss_and_norm(weights)
    moved, path = level_set_ascent(weights, x, y, 2e-4, 10, activation)
    new_loss, new_norm = loss_and_norm(moved)
    torch.testing.assert_close(new_loss, loss, rtol=1e-7, atol=0)
    torch.testing.assert_close(path["objective"][-1], new_norm)
    assert (path["objective"].diff(dim=0) > 0).all()

    orbit = orbit_of(weights, x, activation, RESCALING)
    _, slope = slopes(orbit, lambda w: loss_and_norm(w)[1], weights)
    rescaled = orbit.act(weights, [RESCALING.element(1e-4 * t / t.norm()) for t in slope])
    length = sum((a - b).square().sum((-2, -1)) for a, b in zip(rescaled, weights)).sqrt()
    for run in range(3):
        far = level_set_ascent(member(weights, run), x, y, length[run], 1, activation)[0]
        assert loss_and_norm(far)[1] > loss_and_norm(rescaled)[1][run]


# Sharpness


def plain_loss(weights, x, y):
    for w in weights[:-1]:
        x = F.leaky_relu(w @ x, 0.1)
    return F.cross_entropy((weights[-1] @ x).T, y)


def test_sharpness_is_the_mean_loss_of_the_perturbed_networks(case, activation, monkeypatch):
    weights, x, y, directions, _ = case
    phi = sharpness(weights, x, y, directions, activation)
    for run in range(3):
        networks = [[w[run] + d[k] for w, d in zip(weights, directions)] for k in range(5)]
        losses = torch.stack([plain_loss(network, x, y) for network in networks])
        torch.testing.assert_close(phi[run], losses.mean())
    monkeypatch.setattr(teleportation, "CHUNK", 2 * 3 * WIDTHS[1] * 20)  # two directions at a time
    torch.testing.assert_close(sharpness(weights, x, y, directions, activation), phi)


def test_directions_may_differ_between_runs(case, activation):
    weights, x, y, directions, _ = case
    of_runs = [torch.stack([d, -d, 2 * d]) for d in directions]
    phi = sharpness(weights, x, y, of_runs, activation)
    for run in range(3):
        alone = sharpness(member(weights, run), x, y, member(of_runs, run), activation)
        torch.testing.assert_close(phi[run], alone)


@pytest.mark.parametrize("chunk", [teleportation.CHUNK, 1])
def test_the_gradient_of_sharpness_is_autograds(case, activation, chunk, monkeypatch):
    monkeypatch.setattr(teleportation, "CHUNK", chunk)
    weights, x, y, directions, _ = case
    leaves = [w.clone().requires_grad_() for w in weights]
    phi = sharpness(leaves, x, y, directions, activation)
    expected = torch.autograd.grad(phi.sum(), leaves)
    blocks = [[d[:2] for d in directions], [d[2:] for d in directions]]
    value, gradient = sharpness_and_gradient(weights, x, y, blocks, activation)
    torch.testing.assert_close(value, phi.detach())
    torch.testing.assert_close(gradient, list(expected))


@pytest.mark.parametrize("sphere", [False, True], ids=["orthant", "sphere"])
def test_directions_have_the_radii_as_norms(sphere):
    radii = [0.1, 1.0, 3.0]
    directions = random_directions(WIDTHS, radii, torch.Generator().manual_seed(0), sphere)
    assert [d.shape[1:] for d in directions] == [w.shape for w in init_weights(WIDTHS, 0)]
    flat = torch.cat([d.flatten(1) for d in directions], dim=1)
    torch.testing.assert_close(flat.norm(dim=1), torch.tensor(radii))
    assert bool((flat < 0).any()) == sphere


DRAWS = {"steps": 2, "radii": [0.5, 1.0], "per_radius": 3, "seed": 4, "return_path": True}


def test_teleports_in_sharpness_move_each_run_as_it_would_move_alone(case, activation):
    weights, x, y, *_ = case
    lr, stop = torch.tensor([-1.0, 1.0, 1.0]).double(), torch.tensor([9, 9, 0.0])
    moved, _ = teleport_sharpness(weights, x, y, lr, activation=activation, stop=stop, **DRAWS)
    before, after = (sharpness(w, x, y, case[3], activation) for w in (weights, moved))
    assert ((after - before).sign() == torch.tensor([-1, 1, 0])).all()
    torch.testing.assert_close(member(moved, 2), member(weights, 2))
    for run in range(3):
        limits = {"activation": activation, "stop": stop[run]}
        alone = teleport_sharpness(member(weights, run), x, y, lr[run], **limits, **DRAWS)[0]
        torch.testing.assert_close(member(moved, run), alone)


def test_a_step_in_sharpness_is_no_longer_than_the_longest(case, activation):
    lr = torch.tensor([1e-3, 1e9, -1e9]).double()
    arguments, draws = (*case[:3], lr), DRAWS | {"steps": 1, "activation": activation}
    _, free = teleport_sharpness(*arguments, **draws)
    _, cut = teleport_sharpness(*arguments, max_norm=0.5, **draws)
    for g, expected in zip(cut["group_elements"], free["group_elements"]):
        T, far = g - torch.eye(len(g[0])), expected - torch.eye(len(g[0]))
        torch.testing.assert_close(T[0], far[0])
        torch.testing.assert_close(T[1:], 0.5 * far[1:] / far[1:].norm(dim=(-2, -1), keepdim=True))


# Curvature


def plain_curve_derivatives(weights, x, generators):
    """γ' and γ'' of one network, pair by pair, from Eqs. 57 and 60 as they stand."""
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    for m, M in enumerate(generators):
        h = x
        for w in weights[:m]:
            h = F.leaky_relu(w @ h, 0.1)
        z = weights[m] @ h
        slope = torch.where(z > 0, 1.0, 0.1).double()
        for k, total in ((1, first), (2, second)):
            power = torch.linalg.matrix_power(M, k)
            total[m] += power @ F.leaky_relu(z, 0.1) / slope @ torch.linalg.pinv(h)
            total[m + 1] += (-1) ** k * weights[m + 1] @ power
    return first, second


def plain_curvature(first, second):
    """κ as the part of γ'' across γ', over |γ'|²."""
    first, second = (torch.cat([w.flatten() for w in ws]) for ws in (first, second))
    tangent = first / first.norm()
    return (second - second.dot(tangent) * tangent).norm() / first.norm() ** 2


@pytest.mark.parametrize("stacked", [False, True], ids=["alone", "stack"])
def test_estimators_are_the_published_ones(golden, activation, stacked):
    weights = stack_with(golden["weights"]) if stacked else golden["weights"]
    run = 1 if stacked else ...
    phi = sharpness(weights, golden["x"], golden["y"], golden["directions"], activation)
    assert phi[run].item() == pytest.approx(golden["perturbed_loss"], abs=1e-8)
    first, second = curve_derivatives(weights, golden["x"], golden["generators"], activation)
    assert norms(member(first, run)) == pytest.approx(golden["gamma_1_norms"], abs=1e-8)
    assert norms(member(second, run)) == pytest.approx(golden["gamma_2_norms"], abs=1e-8)
    kappa = curvature(first, second)[run]
    assert kappa.item() == pytest.approx(golden["curvature"], abs=1e-8)


def test_curvature_is_that_of_the_plain_formulas_at_any_speed(case, activation):
    weights, x, _, _, generators = case
    first, second = curve_derivatives(weights, x, generators, activation)
    kappa = curvature(first, second)
    for run in range(3):
        plain = plain_curve_derivatives(member(weights, run), x, generators)
        torch.testing.assert_close((member(first, run), member(second, run)), plain)
        torch.testing.assert_close(kappa[run], plain_curvature(*plain))
    # with t = 3 s + s², dγ/ds = 3 γ' and d²γ/ds² = 9 γ'' + 2 γ' at 0
    faster = [3 * a for a in first], [9 * b + 2 * a for a, b in zip(first, second)]
    torch.testing.assert_close(curvature(*faster), kappa)


def test_generators_may_have_leading_dimensions(case, activation):
    weights, x, generators = member(case[0], 0), case[1], case[4]
    many = [torch.stack([M, -M, M @ M]) for M in generators]
    kappa = curvature(*curve_derivatives(weights, x, many, activation))
    for k in range(3):
        alone = curve_derivatives(weights, x, member(many, k), activation)
        torch.testing.assert_close(kappa[k], curvature(*alone))


@pytest.mark.parametrize("layers", [2, 3])
def test_with_the_mixed_derivatives_the_closed_form_is_that_of_the_curve(case, activation, layers):
    weights, x, generators = case[0][:layers], case[1][:, :8], case[4][: layers - 1]

    def curve(t):
        elements = [torch.linalg.matrix_exp(t * M) for M in generators]
        return act(weights, x, elements, activation, INVERSE_ACTIVATION)

    first, second = curve_derivatives(weights, x, generators, activation)
    exact = two_derivatives(curve, torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(first, exact[0])
    torch.testing.assert_close(with_mixed_derivatives(weights, first, second, generators), exact[1])
    middle = (second[1] - exact[1][1]).abs().max()  # V of one pair, and U of the other
    assert (middle > 1e-2) == (layers == 3)


def test_generators_have_norm_one_and_come_from_their_seed():
    first, again = (random_generators(WIDTHS, torch.Generator().manual_seed(3)) for _ in range(2))
    assert [M.shape for M in first] == [(6, 6), (5, 5)]
    for M, same in zip(first, again):
        assert M.norm().item() == pytest.approx(1) and M.min() >= 0 and torch.equal(M, same)


@pytest.mark.parametrize("stacked", [False, True], ids=["alone", "stack"])
def test_curvature_along_exp_is_the_published_one(activation, stacked):
    (golden,) = GOLDEN["curvature_along_exp"]
    seed, widths, layer = golden["seed"], golden["widths"], golden["layer"]
    weights = [w.double() for w in init_weights(widths, seed)]
    weights = stack_with(weights) if stacked else weights
    x = torch.rand(widths[0], golden["n"], generator=torch.Generator().manual_seed(seed + 1))
    d = widths[layer + 1]
    M = torch.rand(d, d, generator=torch.Generator().manual_seed(seed + 4)).double()
    kappa, slope = curvature_along(weights, x.double(), M, layer, activation)
    run = 1 if stacked else ...
    assert kappa[run].item() == pytest.approx(golden["curvature"], abs=1e-8)
    assert slope[run].item() == pytest.approx(golden["curvature_derivative"], abs=1e-8)


def test_curvature_along_is_that_of_finite_differences(case, activation):
    """κ from differences of the curve, dκ/dt from differences of κ along the same curve."""
    weights, x, M = member(case[0], 0), case[1], 3 * case[4][1]
    h = activation(weights[0] @ x)

    def gamma(t):
        g = torch.linalg.matrix_exp(t * M)
        return group_action(weights[2], weights[1], h, g, activation)

    def kappa_at(t, step=1e-4):
        before, here, after = gamma(t - step), gamma(t), gamma(t + step)
        first = [(b - a) / (2 * step) for a, b in zip(before, after)]
        second = [(a - 2 * m + b) / step**2 for a, m, b in zip(before, here, after)]
        return curvature(first, second)

    kappa, derivative = curvature_along(weights, x, M, 1, activation)
    torch.testing.assert_close(kappa_at(0), kappa, rtol=1e-5, atol=0)
    slope = (kappa_at(1e-3) - kappa_at(-1e-3)) / 2e-3
    torch.testing.assert_close(slope, derivative, rtol=1e-3, atol=0)


def test_curvature_along_takes_of_a_generator_what_the_action_allows(case, activation):
    weights, x, M = case[0], case[1], case[4][1]
    kappa = curvature_along(weights, x, M, 1, activation, RESCALING)
    diagonal = torch.diag(M.diagonal())
    expected = curvature_along(weights, x, diagonal, 1, activation, RESCALING)
    torch.testing.assert_close(kappa, expected)


@pytest.mark.parametrize(
    ("n", "layer", "message"), [(4, 1, "too small"), (20, 2, "square"), (20, -1, "square")]
)
def test_curvature_along_names_what_does_not_fit(case, activation, n, layer, message):
    with pytest.raises(ValueError, match=message):
        curvature_along(case[0], case[1][:, :n], case[4][1], layer, activation)


def test_a_curvature_teleport_moves_each_run_as_it_would_move_alone(case, activation):
    weights, x, M = case[0], case[1][:, :5], 3 * case[4][1]  # few images: the outputs are kept
    lr = torch.tensor([1e-4, -1e-4, 1e-4]).double()
    moved, g = teleport_curvature(weights, x, lr, [M, M], activation)
    before, after = (curvature_along(w, x, M, 1, activation)[0] for w in (weights, moved))
    assert ((after - before).sign() == lr.sign()).all()
    torch.testing.assert_close(moved[:2], [weights[0], g @ weights[1]])
    for run in range(3):
        alone, _ = teleport_curvature(member(weights, run), x, lr[run], [M, M], activation)
        torch.testing.assert_close(member(moved, run), alone)


def test_a_step_in_curvature_is_no_longer_than_the_longest(case, activation):
    weights, x, M = case[0], case[1][:, :5], case[4][1]
    _, g = teleport_curvature(weights, x, 1e9, [M], activation, max_norm=0.5)
    ends = [torch.linalg.matrix_exp(t * M) for t in (-0.5, 0.5)]  # |M| = 1
    for element in g:
        assert any(torch.allclose(element, end) for end in ends)


def test_estimates_are_those_of_each_network_on_the_whole_inputs(activation):
    """The reduction to the span of the batch changes no number."""
    widths, radii = (300, 8, 6, 10), [0.5, 2.0, 8.0]
    x, y = normal(300, 40), torch.arange(40) % 10
    weights = [w.double() for w in init_weights(widths, [1, 2, 3])]
    estimates = estimate(weights, x, y, radii, 4, activation)
    M = random_generators(widths, torch.Generator().manual_seed(4 * 12345))
    d = random_directions(widths, radii, torch.Generator().manual_seed(4 * 12345 + 1))
    M, d = [m.double() for m in M], [direction.double() for direction in d]
    first, second = curve_derivatives(weights, x, M, activation)
    exact = with_mixed_derivatives(weights, first, second, M)
    phi = sharpness(weights, x, y, d, activation)
    torch.testing.assert_close(estimates.sharpness, phi)
    torch.testing.assert_close(estimates.curvature, curvature(first, second))
    torch.testing.assert_close(estimates.loss, cross_entropy(weights, x, y, activation))
    torch.testing.assert_close(estimates.exact_curvature, curvature(first, exact))


@pytest.mark.parametrize("function", [gradient_norm_squared, sharpness])
def test_results_that_are_not_finite_name_the_runs(case, activation, function):
    weights, x, y, directions, _ = case
    weights[-1][1, 0, 0] = float("nan")
    arguments = (directions, activation) if function is sharpness else (activation,)
    with pytest.warns(UserWarning, match=r"is not finite for the runs \[\[1\]\]"):
        function(weights, x, y, *arguments)
