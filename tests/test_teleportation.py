"""teleportation.py: published numbers, finite differences, stacks against their members."""

from functools import partial

import pytest
import torch

import teleportation
from conftest import GOLDEN
from models import Identity, LeakyReLU, cross_entropy, forward, init_weights
from parameter_symmetries.ascent import slopes
from teleportation import (
    INVERSE_ACTIVATION,
    LINEAR,
    PSEUDOINVERSE,
    RESCALING,
    Action,
    act,
    curvature,
    curvature_along,
    curve_derivatives,
    estimate,
    gradient_norm_squared,
    group_action,
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

WIDTHS = (12, 6, 5, 10)


class Softplus(torch.nn.Softplus):
    """A user's own activation, which has no inverse and is not homogeneous."""

    def derivative(self, x):
        return x.sigmoid()


DEFINED = [
    pytest.param(action, activation, id=f"{action.act.__name__}, {activation}")
    for action in (PSEUDOINVERSE, INVERSE_ACTIVATION, RESCALING, LINEAR)
    for activation in (LeakyReLU(), Identity(), Softplus())
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
    """Three networks, a batch, five directions of different lengths and two generators."""
    weights = [w.double() for w in init_weights(WIDTHS, [0, 3, 12])]
    y = torch.randint(10, (20,), generator=torch.Generator().manual_seed(5))
    rng = torch.Generator().manual_seed(6)
    directions = [d.double() for d in random_directions(WIDTHS, [0.1, 0.5, 1, 2, 4], rng)]
    generators = [M.double() for M in random_generators(WIDTHS, rng)]
    return weights, normal(12, 20), y, directions, generators


# Group actions


@pytest.mark.parametrize("tall", [False, True])
def test_matrices_of_less_rank_are_named_and_inverted_as_torch_does(tall):
    h = normal(2, 3, 4, 9)
    h[1, 2, 3] = 2 * h[1, 2, 0] - h[1, 2, 1]
    h = h.mT if tall else h
    with pytest.warns(UserWarning, match=r"of the runs \[\[1, 2\]\] do not have full rank"):
        inverse = pseudoinverse(h)
    torch.testing.assert_close(inverse, torch.linalg.pinv(h))
    torch.testing.assert_close(pseudoinverse(h[0, 0]), inverse[0, 0])
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
    """The function, or the outputs on a batch that is no larger than the layers."""
    weights, x = case[0], case[1][:, :4] / 3
    if action in (RESCALING, LINEAR):
        x = 100 * normal(12, 50)
    moved = act(weights, x, small_elements(action), activation, action)
    assert all((new - w).abs().max() > 1e-3 for new, w in zip(moved, weights))
    outputs = [forward(networks, x, activation) for networks in (weights, moved)]
    torch.testing.assert_close(*outputs, atol=1e-7, rtol=0)


@pytest.mark.parametrize("action", [PSEUDOINVERSE, INVERSE_ACTIVATION, RESCALING])
def test_elements_compose(case, activation, action):
    (V, U, _), x = case[0], case[1][:, :4]  # so few images that the outputs are kept
    g, h = small_elements(action)[0], small_elements(action, 0.1)[0]
    U_once, V_once = action.act(U, V, x, g @ h, activation)
    U_twice, V_twice = action.act(*action.act(U, V, x, h, activation), x, g, activation)
    torch.testing.assert_close(V_once @ x, V_twice @ x)
    torch.testing.assert_close(U_once @ activation(V_once @ x), U_twice @ activation(V_twice @ x))


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
    "no inverse": (lambda w, g: (w, g), INVERSE_ACTIVATION, Softplus()),
    "not homogeneous": (lambda w, g: (w, g), RESCALING, Softplus()),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_does_not_fit_an_action_is_named(case, bad):
    spoil, action, activation = BAD[bad]
    weights, elements = spoil(case[0], small_elements(PSEUDOINVERSE))
    with pytest.raises(ValueError, match="needs a square matrix|not defined"):
        act(weights, case[1], elements, activation, action)


# Ascent, and teleports to a larger gradient


def test_group_action_and_slopes_are_the_published_ones(golden, activation):
    weights, run, x, y = stack_with(golden["weights"]), 1, golden["x"], golden["y"]

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


def assert_slope_is_finite_difference(objective, weights, orbit):
    """Along its slope an objective changes by the slope's length."""
    _, slope = slopes(orbit, objective, weights)
    length = sum(t.square().sum((-2, -1)) for t in slope).sqrt()
    ends = []
    for step in (1e-6, -1e-6):
        T = [step * t / length[:, None, None] for t in slope]
        elements = [a.element(t) for a, t in zip(orbit.actions, T)]
        ends.append(objective(orbit.act(weights, elements)))
    torch.testing.assert_close((ends[0] - ends[1]) / 2e-6, length, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(("action", "activation"), DEFINED)
def test_slopes_of_sharpness_and_of_the_gradient_are_finite_differences(case, action, activation):
    weights, x, y, directions, _ = case
    orbit = orbit_of(weights, x, activation, action)
    batch = {"x": x, "y": y, "activation": activation}
    assert_slope_is_finite_difference(partial(gradient_norm_squared, **batch), weights, orbit)
    phi = partial(sharpness, directions=directions, **batch)
    assert_slope_is_finite_difference(phi, weights, orbit)


@pytest.mark.parametrize("action", [PSEUDOINVERSE, RESCALING])
def test_slopes_of_curvature_are_finite_differences(case, activation, action):
    def kappa(weights):
        return curvature_along(weights, case[1], 3 * case[4][1], 1, activation)[0]

    orbit = orbit_of(case[0], case[1], activation, action)
    assert_slope_is_finite_difference(kappa, case[0], orbit)


@pytest.mark.parametrize("n", [4, 20], ids=["few images", "many images"])
@pytest.mark.parametrize(("action", "activation"), DEFINED)
def test_a_teleport_ascends_and_a_stack_moves_as_its_members_do_alone(case, action, activation, n):
    weights, x, y, *_ = case
    x, y = x[:, :n], y[:n]
    moved, path = teleport(weights, x, y, 1e-4, 3, activation, return_path=True, action=action)
    norm = gradient_norm_squared(moved, x, y, activation)
    torch.testing.assert_close(path["objective"][-1], norm)
    assert (path["objective"].diff(dim=0) > 0).all()
    for run in range(3):
        alone = teleport(member(weights, run), x, y, 1e-4, 3, activation, action=action)
        torch.testing.assert_close(member(moved, run), alone)


def test_an_action_needs_no_shortcut_to_the_span_of_the_batch(case, activation):
    """The same as PSEUDOINVERSE, but that it does not say that V' = gV."""
    weights, x, y, *_ = case
    shortcut, path = teleport(weights, x, y, 1e-2, 3, activation, return_path=True)
    plain = teleport(weights, x, y, 1e-2, 3, activation, action=Action("plain", group_action))
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


# Sharpness


def test_sharpness_is_the_mean_loss_of_the_perturbed_networks(case, activation, monkeypatch):
    weights, x, y, directions, _ = case
    phi = sharpness(weights, x, y, directions, activation)
    networks = [w[:, None] + d for w, d in zip(weights, directions)]  # [runs, directions, ...]
    torch.testing.assert_close(phi, cross_entropy(networks, x, y, activation).mean(1))
    monkeypatch.setattr(teleportation, "CHUNK", 2 * 3 * WIDTHS[1] * 20)  # two directions at a time
    torch.testing.assert_close(sharpness(weights, x, y, directions, activation), phi)


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


def test_directions_on_the_sphere_have_the_radii_as_norms_and_both_signs():
    radii = [0.1, 1.0, 3.0]
    directions = random_directions(WIDTHS, radii, torch.Generator().manual_seed(0), sphere=True)
    flat = torch.cat([d.flatten(1) for d in directions], dim=1)
    torch.testing.assert_close(flat.norm(dim=1), torch.tensor(radii))
    assert ((flat < 0).double().mean(1) - 0.5).abs().max() < 0.1


def test_teleports_in_sharpness_move_each_run_as_it_would_move_alone(case, activation):
    weights, x, y, *_ = case
    lr, stop = torch.tensor([-1.0, 1e9, 1.0]).double(), torch.tensor([9, 9, 0.0])
    draws = {"steps": 2, "radii": [0.5, 1.0], "per_radius": 3, "seed": 4, "activation": activation}
    draws |= {"return_path": True, "max_norm": 0.05}
    moved, path = teleport_sharpness(weights, x, y, lr, stop=stop, **draws)
    before, after = (sharpness(w, x, y, case[3], activation) for w in (weights, moved))
    assert ((after - before).sign() == torch.tensor([-1, 1, 0])).all()
    torch.testing.assert_close(member(moved, 2), member(weights, 2))
    for g in path["group_elements"]:
        lengths = (g - torch.eye(len(g[0]))).norm(dim=(-2, -1))
        assert lengths[2] == 0 and lengths[0] < lengths[1] < 2 * 0.05 + 0.05**2
    for run in range(3):
        alone, _ = teleport_sharpness(member(weights, run), x, y, lr[run], stop=stop[run], **draws)
        torch.testing.assert_close(member(moved, run), alone)


# Curvature


def test_estimators_are_the_published_ones(golden, activation):
    weights, run = stack_with(golden["weights"]), 1
    phi = sharpness(weights, golden["x"], golden["y"], golden["directions"], activation)
    assert phi[run].item() == pytest.approx(golden["perturbed_loss"], abs=1e-8)
    first, second = curve_derivatives(weights, golden["x"], golden["generators"], activation)
    assert norms(member(first, run)) == pytest.approx(golden["gamma_1_norms"], abs=1e-8)
    assert norms(member(second, run)) == pytest.approx(golden["gamma_2_norms"], abs=1e-8)
    kappa = curvature(first, second)[run]
    assert kappa.item() == pytest.approx(golden["curvature"], abs=1e-8)


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


def test_curvature_along_exp_is_the_published_one(activation):
    (golden,) = GOLDEN["curvature_along_exp"]
    seed, widths, layer = golden["seed"], golden["widths"], golden["layer"]
    weights = stack_with([w.double() for w in init_weights(widths, seed)])
    x = torch.rand(widths[0], golden["n"], generator=torch.Generator().manual_seed(seed + 1))
    d = widths[layer + 1]
    M = torch.rand(d, d, generator=torch.Generator().manual_seed(seed + 4)).double()
    kappa, slope = curvature_along(weights, x.double(), M, layer, activation)
    assert kappa[1].item() == pytest.approx(golden["curvature"], abs=1e-8)
    assert slope[1].item() == pytest.approx(golden["curvature_derivative"], abs=1e-8)


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
    torch.testing.assert_close(estimates.batch_loss, cross_entropy(weights, x, y, activation))
    torch.testing.assert_close(estimates.exact_curvature, curvature(first, exact))
