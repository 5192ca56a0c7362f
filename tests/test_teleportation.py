"""teleportation.py: golden numbers, finite differences, plain versions, stacks against members."""

import pytest
import torch
from torch.nn import functional as F

import teleportation
from conftest import GOLDEN
from models import Identity, LeakyReLU, ReLU, Tanh, cross_entropy, forward, init_weights
from teleportation import (
    INVERSE_ACTIVATION,
    PSEUDOINVERSE,
    RESCALING,
    Action,
    act,
    ascend,
    ascend_to,
    ascent_direction,
    curvature,
    curvature_along,
    curve_derivatives,
    estimate,
    gradient_norm_squared,
    group_action,
    level_set_ascent,
    pseudoinverse,
    random_directions,
    random_generators,
    random_group_elements,
    sharpness,
    sharpness_and_gradient,
    teleport,
    teleport_curvature,
    teleport_sharpness,
    with_mixed_derivatives,
)

WIDTHS = (12, 6, 5, 10)


def norms(weights):
    return [w.norm(dim=(-2, -1)).tolist() for w in weights]


def stack_with(weights):
    """Return a stack of three runs with `weights` as the second."""
    others = [0.5 * w for w in weights], [1.5 * w for w in weights]
    return [torch.stack(layer) for layer in zip(others[0], weights, others[1])]


@pytest.fixture
def case(activation):
    """Three networks, a batch, five directions of different lengths and two generators."""
    generator = torch.Generator().manual_seed(5)
    weights = [w.double() for w in init_weights(WIDTHS, [1, 2, 3])]
    x = torch.rand(WIDTHS[0], 20, generator=generator, dtype=torch.float64)
    y = torch.randint(10, (20,), generator=generator)
    directions = random_directions(WIDTHS, [0.1, 0.5, 1, 2, 4], generator)
    generators = random_generators(WIDTHS, generator)
    return weights, x, y, [d.double() for d in directions], [M.double() for M in generators]


def plain_loss(weights, x, y):
    for w in weights[:-1]:
        x = F.leaky_relu(w @ x, 0.1)
    return F.cross_entropy((weights[-1] @ x).T, y)


def plain_curve_derivatives(weights, x, generators):
    """γ' and γ'' of one network, pair by pair, from Eqs. 57 and 60 as they stand."""
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    for m, M in enumerate(generators):
        h = x
        for w in weights[:m]:
            h = F.leaky_relu(w @ h, 0.1)
        z = weights[m] @ h
        slope = torch.ones_like(z)
        slope[z <= 0] = 0.1
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
    assert norms([w[run] for w in first]) == pytest.approx(golden["gamma_1_norms"], abs=1e-8)
    assert norms([w[run] for w in second]) == pytest.approx(golden["gamma_2_norms"], abs=1e-8)
    kappa = curvature(first, second)[run]
    assert kappa.item() == pytest.approx(golden["curvature"], abs=1e-8)


def test_sharpness_is_the_mean_perturbed_loss_of_each_network(case, activation):
    weights, x, y, directions, _ = case
    phi = sharpness(weights, x, y, directions, activation)
    for run in range(3):
        losses = [
            plain_loss([w[run] + d[k] for w, d in zip(weights, directions)], x, y) for k in range(5)
        ]
        torch.testing.assert_close(phi[run], torch.stack(losses).mean())


def test_directions_may_differ_between_runs(case, activation):
    weights, x, y, directions, _ = case
    own = [torch.stack([d, -d, 2 * d]) for d in directions]
    phi = sharpness(weights, x, y, own, activation)
    for run in range(3):
        alone = [w[run] for w in weights], x, y, [d[run] for d in own], activation
        torch.testing.assert_close(phi[run], sharpness(*alone))


def test_sharpness_does_not_depend_on_the_chunk(case, activation, monkeypatch):
    weights, x, y, directions, _ = case
    whole = sharpness(weights, x, y, directions, activation)
    monkeypatch.setattr(teleportation, "CHUNK", 2 * 3 * WIDTHS[1] * 20)  # two directions at once
    torch.testing.assert_close(sharpness(weights, x, y, directions, activation), whole)


def test_curvature_is_that_of_the_plain_formulas_for_each_network(case, activation):
    weights, x, _, _, generators = case
    first, second = curve_derivatives(weights, x, generators, activation)
    kappa = curvature(first, second)
    for run in range(3):
        plain = plain_curve_derivatives([w[run] for w in weights], x, generators)
        torch.testing.assert_close([w[run] for w in first], plain[0])
        torch.testing.assert_close([w[run] for w in second], plain[1])
        torch.testing.assert_close(kappa[run], plain_curvature(*plain))


def test_generators_may_have_leading_dimensions_of_their_own(case, activation):
    weights, x, _, _, generators = case
    weights = [w[0] for w in weights]
    many = [torch.stack([M, -M, M @ M]) for M in generators]
    kappa = curvature(*curve_derivatives(weights, x, many, activation))
    for k in range(3):
        alone = curve_derivatives(weights, x, [M[k] for M in many], activation)
        torch.testing.assert_close(kappa[k], curvature(*alone))


@pytest.mark.parametrize("pair", [0, 1])
def test_curve_derivatives_are_those_of_the_acted_on_network(case, activation, pair):
    """Central differences of g = exp(t M) acting on one pair of layers."""
    weights, x, _, _, generators = case
    h = x
    for w in weights[:pair]:
        h = activation(w @ h)
    V, U, M = weights[pair], weights[pair + 1], generators[pair]

    def gamma(t):
        g = torch.linalg.matrix_exp(t * M)
        V_t = activation.inverse(g @ activation(V @ h)) @ torch.linalg.pinv(h)
        return V_t, U @ torch.linalg.inv(g)

    only = [M if m == pair else torch.zeros_like(N) for m, N in enumerate(generators)]
    first, second = curve_derivatives(weights, x, only, activation)
    t = 1e-4
    for layer, before, here, after in zip((pair, pair + 1), gamma(-t), gamma(0), gamma(t)):
        torch.testing.assert_close(first[layer], (after - before) / (2 * t), atol=1e-6, rtol=0)
        change = (after - 2 * here + before) / t**2
        torch.testing.assert_close(second[layer], change, atol=1e-5, rtol=0)


def test_curvature_does_not_depend_on_the_speed_along_the_curve(case, activation):
    weights, x, _, _, generators = case
    first, second = curve_derivatives(weights, x, generators, activation)
    # with t = 3 s + s², dγ/ds = 3 γ' and d²γ/ds² = 9 γ'' + 2 γ' at 0
    faster = [3 * a for a in first], [9 * b + 2 * a for a, b in zip(first, second)]
    torch.testing.assert_close(curvature(*faster), curvature(first, second))


@pytest.mark.parametrize("sphere", [False, True], ids=["orthant", "sphere"])
def test_directions_have_the_radii_as_norms(sphere):
    radii = [0.1, 1.0, 3.0]
    directions = random_directions(WIDTHS, radii, torch.Generator().manual_seed(0), sphere)
    assert [d.shape[1:] for d in directions] == [w.shape for w in init_weights(WIDTHS, 0)]
    flat = torch.cat([d.flatten(1) for d in directions], dim=1)
    torch.testing.assert_close(flat.norm(dim=1), torch.tensor(radii))
    assert bool((flat < 0).any()) == sphere


def test_generators_have_norm_one_and_come_from_their_seed():
    first, again = (random_generators(WIDTHS, torch.Generator().manual_seed(3)) for _ in range(2))
    assert [M.shape for M in first] == [(6, 6), (5, 5)]
    for M, same in zip(first, again):
        assert M.norm().item() == pytest.approx(1) and M.min() >= 0 and torch.equal(M, same)


def norm_gradient_in_T(weights, x, y, activation):
    """Return the gradient of |∇L|² in T_m at T = 0."""

    def objective(weights):
        return gradient_norm_squared(weights, x, y, activation)

    return ascent_direction(objective, weights, x, activation)[1]


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (6, 6), (3, 6, 20)])
def test_pseudoinverse_is_torchs(shape):
    h = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(pseudoinverse(h), torch.linalg.pinv(h))


@pytest.mark.parametrize("tall", [False, True])
def test_a_matrix_of_less_rank_is_named_and_its_pseudoinverse_is_torchs(tall):
    h = torch.randn(2, 3, 4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h[1, 2, 3] = 2 * h[1, 2, 0] - h[1, 2, 1]
    h = h.mT if tall else h
    with pytest.warns(UserWarning, match=r"of runs \[\[1, 2\]\] are not of full rank"):
        found = pseudoinverse(h)
    torch.testing.assert_close(found, torch.linalg.pinv(h))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_matrix_that_is_not_finite_is_named_and_the_others_are_inverted(value):
    h = torch.randn(2, 3, 4, 9, dtype=torch.float64)
    h[0, 1, 2, 2] = value
    with pytest.warns(UserWarning, match=r"\[4, 9\] of runs \[\[0, 1\]\] are not finite"):
        found = pseudoinverse(h)
    assert found[0, 1].isnan().all()
    h[0, 1], found[0, 1] = 0, 0
    torch.testing.assert_close(found, torch.linalg.pinv(h))


@pytest.mark.parametrize("stacked", [False, True], ids=["alone", "stack"])
def test_group_action_and_ascent_direction_are_the_published_ones(golden, activation, stacked):
    weights = stack_with(golden["weights"]) if stacked else golden["weights"]
    run, x, y = (1 if stacked else ...), golden["x"], golden["y"]
    norm = gradient_norm_squared(weights, x, y, activation)[run]
    assert norm.item() == pytest.approx(golden["gradient_norm_squared"], abs=1e-8)
    T = [t[run] for t in norm_gradient_in_T(weights, x, y, activation)]
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
    expected = golden["after_1_step_lr_0.05"]
    weights, path = teleport(
        golden["weights"], golden["x"], golden["y"], 0.05, 1, activation, return_path=True
    )
    loss = cross_entropy(weights, golden["x"], golden["y"], activation)
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-6)
    assert path["objective"][1].item() == pytest.approx(expected["gradient_norm_squared"], abs=1e-6)
    assert norms(weights) == pytest.approx(expected["weight_norms"], abs=1e-4)


@pytest.mark.parametrize(("n", "kept"), [(4, True), (5, True), (20, False)])
def test_outputs_are_kept_where_the_batch_is_no_larger_than_the_layers(case, activation, n, kept):
    weights, x, _, _, generators = case
    x = x[:, :n]
    elements = [torch.eye(len(M)) + 0.5 * M for M in generators]
    moved = act(weights, x, elements, activation)
    change = (forward(moved, x, activation) - forward(weights, x, activation)).abs().max()
    assert (moved[0] - weights[0]).abs().max() > 0.05
    assert bool(change < 1e-10) == kept


def test_the_refit_is_the_least_squares_one(case, activation):
    weights, x, *_, generators = case
    V, U = weights[0][0], weights[1][0]
    g = torch.eye(6) + 0.5 * generators[0]
    U_new, V_new = group_action(U, V, x, g, activation)
    fit = torch.linalg.lstsq(activation(V_new @ x).T, (U @ activation(V @ x)).T).solution.T
    torch.testing.assert_close(U_new, fit)


@pytest.mark.parametrize("n", [4, 20], ids=["exact", "refit"])
def test_ascent_direction_is_that_of_finite_differences(case, activation, n):
    weights, x, y, *_ = case
    weights, x, y = [w[0] for w in weights], x[:, :n], y[:n]
    identities = [torch.eye(d, dtype=torch.float64) for d in (6, 5)]
    start = act(weights, x, identities, activation)
    T = norm_gradient_in_T(start, x, y, activation)

    def norm(m, direction, t):
        elements = list(identities)
        elements[m] = elements[m] + t * direction
        return gradient_norm_squared(act(weights, x, elements, activation), x, y, activation)

    for m in (0, 1):
        direction = torch.randn_like(T[m], generator=torch.Generator().manual_seed(m))
        slope = (norm(m, direction, 1e-6) - norm(m, direction, -1e-6)) / 2e-6
        torch.testing.assert_close((T[m] * direction).sum(), slope, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("n", [4, 20], ids=["exact", "refit"])
def test_a_small_step_raises_the_gradient_norm(case, activation, n):
    weights, x, y, *_ = case
    _, path = teleport(weights, x[:, :n], y[:n], 1e-3, 3, activation, return_path=True)
    assert (path["objective"].diff(dim=0) > 0).all()


def test_a_stack_teleports_as_its_members_do_alone(case, activation):
    weights, x, y, *_ = case
    stacked, path = teleport(weights, x, y, 0.05, 4, activation, return_path=True)
    for run in range(3):
        alone, path_alone = teleport(
            [w[run] for w in weights], x, y, 0.05, 4, activation, return_path=True
        )
        torch.testing.assert_close([w[run] for w in stacked], alone)
        torch.testing.assert_close(path["objective"][:, run], path_alone["objective"])


def test_the_path_says_what_happened(case, activation):
    weights, x, y, *_ = case
    moved, path = teleport(weights, x, y, 0.05, 4, activation, return_path=True)
    for end, w in ((0, weights), (-1, moved)):
        torch.testing.assert_close(
            path["objective"][end], gradient_norm_squared(w, x, y, activation)
        )
    torch.testing.assert_close(moved[0], path["group_elements"][0] @ weights[0])


def test_a_run_above_the_cap_stays_and_the_others_go_on(case, activation):
    weights, x, y, *_ = case
    start = gradient_norm_squared(weights, x, y, activation)
    cap = start.sort().values[:2].mean()  # between the least and the next
    moved = teleport(weights, x, y, 1e-3, 2, activation, cap=cap)
    for w, new in zip(weights, moved):
        stayed = torch.isclose(w, new, rtol=0, atol=1e-12).flatten(1).all(1)
        assert stayed.tolist() == (start > cap).tolist()


def test_estimates_are_those_of_each_network_on_the_whole_inputs(activation):
    """The reduction to the batch's span changes no number."""
    widths, radii = (300, 8, 6, 10), [0.5, 2.0, 8.0]
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(300, 40, generator=generator, dtype=torch.float64)
    y = torch.randint(10, (40,), generator=generator)
    weights = [w.double() for w in init_weights(widths, [1, 2, 3])]
    phi, psi, loss, exact = estimate(weights, x, y, radii, 4, activation)
    M = random_generators(widths, torch.Generator().manual_seed(4 * 12345))
    d = random_directions(widths, radii, torch.Generator().manual_seed(4 * 12345 + 1))
    M, d = [m.double() for m in M], [direction.double() for direction in d]
    torch.testing.assert_close(phi, sharpness(weights, x, y, d, activation))
    torch.testing.assert_close(psi, curvature(*curve_derivatives(weights, x, M, activation)))
    torch.testing.assert_close(loss, cross_entropy(weights, x, y, activation))
    curve = curve_derivatives(weights, x, M, activation, exact=True)
    torch.testing.assert_close(exact, curvature(*curve))


def test_random_group_elements_are_as_far_from_the_identity_as_the_given_ones():
    generator = torch.Generator().manual_seed(0)
    given = [torch.eye(d) + torch.randn(2, 3, d, d, generator=generator) for d in (6, 5)]
    for g, drawn in zip(given, random_group_elements(given, generator)):
        lengths = [(a - torch.eye(len(a[0, 0]))).norm(dim=(-2, -1)) for a in (g, drawn)]
        torch.testing.assert_close(*lengths)
        assert not torch.allclose(g, drawn)


@pytest.mark.parametrize("stacked", [False, True], ids=["alone", "stack"])
def test_curvature_along_exp_is_the_published_one(activation, stacked):
    (golden,) = GOLDEN["curvature_along_exp"]
    seed, widths, layer = golden["seed"], golden["widths"], golden["layer"]
    weights = [w.double() for w in init_weights(widths, seed)]
    if stacked:
        weights = stack_with(weights)
    x = torch.rand(widths[0], golden["n"], generator=torch.Generator().manual_seed(seed + 1))
    d = widths[layer + 1]
    M = torch.rand(d, d, generator=torch.Generator().manual_seed(seed + 4)).double()
    found = curvature_along(weights, x.double(), M, layer, activation)
    for value, key in zip(found, ("curvature", "curvature_derivative")):
        value = value[1] if stacked else value
        assert value.item() == pytest.approx(golden[key], abs=1e-8)


def test_curvature_along_is_that_of_finite_differences(case, activation):
    """κ from differences of the curve, dκ/dt from differences of κ along the same curve."""
    weights, x, _, _, generators = case
    weights, M = [w[0] for w in weights], 3 * generators[1]
    h = activation(weights[0] @ x)

    def gamma(t):
        g = torch.linalg.matrix_exp(torch.tensor(t, dtype=torch.float64) * M)
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


def test_curvature_along_needs_a_batch_as_large_as_the_layer(case, activation):
    weights, x, _, _, generators = case
    with pytest.raises(
        ValueError, match="a batch of 4 is too small: the least-squares refit needs 5 or more"
    ):
        curvature_along(weights, x[:, :4], generators[1], 1, activation)


def test_sharpness_gradient_is_autograds(case, activation):
    weights, x, y, directions, _ = case
    leaves = [w.clone().requires_grad_() for w in weights]
    phi = sharpness(leaves, x, y, directions, activation)
    expected = torch.autograd.grad(phi.sum(), leaves)
    blocks = [[d[:2] for d in directions], [d[2:] for d in directions]]
    found = sharpness_and_gradient(weights, x, y, blocks, activation)
    torch.testing.assert_close(found, (phi.detach(), list(expected)))


def test_sharpness_gradient_does_not_depend_on_the_chunk(case, activation, monkeypatch):
    weights, x, y, directions, _ = case
    whole = sharpness_and_gradient(weights, x, y, [directions], activation)
    monkeypatch.setattr(teleportation, "CHUNK", 1)
    torch.testing.assert_close(
        sharpness_and_gradient(weights, x, y, [directions], activation), whole
    )


@pytest.mark.parametrize("sign", [-1, 1], ids=["decrease", "increase"])
def test_a_sharpness_teleport_moves_sharpness(case, activation, sign):
    weights, x, y, directions, _ = case

    def objective(weights):
        return sharpness(weights, x, y, directions, activation)

    _, path = ascend(objective, weights, x, sign * 1e-3, 3, activation)
    assert (sign * path["objective"].diff(dim=0) > 0).all()


@pytest.mark.parametrize("n", [4, 20], ids=["few images", "many images"])
def test_a_stack_teleports_in_sharpness_as_its_members_do_alone(case, activation, n):
    weights, x, y, *_ = case
    x, y = x[:, :n], y[:n]
    lr, stop = torch.tensor([-0.1, 0.1, 0.1]).double(), torch.tensor([9, 9, 0.0])
    options = {
        "steps": 2,
        "radii": [0.5, 1.0],
        "per_radius": 3,
        "seed": 4,
        "activation": activation,
    }
    moved = teleport_sharpness(weights, x, y, lr, stop=stop, **options)
    for run in range(3):
        alone = [w[run] for w in weights]
        expected = teleport_sharpness(alone, x, y, float(lr[run]), stop=stop[run], **options)
        torch.testing.assert_close([w[run] for w in moved], expected)
    # above its stop; with few images what is left of it is its refit
    torch.testing.assert_close(forward(moved, x, activation)[2], forward(weights, x, activation)[2])


def test_a_curvature_teleport_moves_curvature_with_the_sign_of_each_run(case, activation):
    weights, x, _, _, generators = case
    x, M = x[:, :5], 3 * generators[1]  # as many as the layer: the outputs are kept
    lr = torch.tensor([1e-4, -1e-4, 1e-4]).double()
    before, _ = curvature_along(weights, x, M, 1, activation)
    moved, g = teleport_curvature(weights, x, lr, [M, M], activation)
    after, _ = curvature_along(moved, x, M, 1, activation)
    assert ((after - before).sign() == lr.sign()).all()
    torch.testing.assert_close(moved[0], weights[0])
    torch.testing.assert_close(moved[1], g @ weights[1])
    for run in range(3):
        alone, _ = teleport_curvature([w[run] for w in weights], x, lr[run], [M, M], activation)
        torch.testing.assert_close([w[run] for w in moved], alone)


def test_a_step_in_curvature_is_no_longer_than_the_longest(case, activation):
    weights, x, _, _, generators = case
    M = generators[1]
    _, g = teleport_curvature(weights, x[:, :5], 1e9, [M], activation, max_norm=0.5)
    for member in g:
        ends = [torch.linalg.matrix_exp(t * M) for t in (-0.5, 0.5)]  # |M| = 1
        assert any(torch.allclose(member, end) for end in ends)


def test_a_step_in_sharpness_is_no_longer_than_the_longest(case, activation):
    weights, x, y, *_ = case
    draws = {"radii": [0.5], "per_radius": 2, "seed": 4, "activation": activation}
    lr = torch.tensor([1e-3, 1e9, -1e9]).double()
    _, free = teleport_sharpness(weights, x, y, lr, 1, **draws, return_path=True)
    _, cut = teleport_sharpness(weights, x, y, lr, 1, **draws, max_norm=0.5, return_path=True)
    for g, expected in zip(cut["group_elements"], free["group_elements"]):
        T, far = g - torch.eye(len(g[0])), expected - torch.eye(len(g[0]))
        torch.testing.assert_close(T[0], far[0])
        torch.testing.assert_close(T[1:], 0.5 * far[1:] / far[1:].norm(dim=(-2, -1), keepdim=True))


def test_rescaling_keeps_the_function_on_all_inputs(case, activation):
    weights, x, y, *_ = case
    moved, path = teleport(weights, x, y, 1e-2, 5, activation, return_path=True, action=RESCALING)
    assert (path["objective"].diff(dim=0) > 0).all()
    for g in path["group_elements"]:
        assert (g == torch.diag_embed(g.diagonal(dim1=-2, dim2=-1))).all()
        assert (g.diagonal(dim1=-2, dim2=-1) > 0).all()
    others = 100 * torch.randn(12, 50, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(
        forward(moved, others, activation), forward(weights, others, activation)
    )


@pytest.mark.parametrize("action", [PSEUDOINVERSE, INVERSE_ACTIVATION, RESCALING])
def test_the_identity_acts_as_nothing_and_elements_compose(case, activation, action):
    weights, x, *_ = case
    x = x[:, :5]  # all three actions keep the outputs on so small a batch
    U, V = weights[1], weights[0]
    rng = torch.Generator().manual_seed(0)
    T = [action.project(0.1 * torch.randn(6, 6, generator=rng).double()) for _ in range(2)]
    g, h = (action.element(t) for t in T)
    assert torch.equal(action.element(0 * T[0]), torch.eye(6).double())
    for new, expected in (
        (action.act(U, V, x, torch.eye(6).double(), activation), (U, V)),
        (
            action.act(*action.act(U, V, x, h, activation), x, g, activation),
            action.act(U, V, x, g @ h, activation),
        ),
        (action.act(U, V, x, g, activation), (U, V)),
    ):
        outputs = [U @ activation(V @ x) for U, V in (new, expected)]
        torch.testing.assert_close(*outputs, rtol=1e-8, atol=1e-8)


OBJECTIVES = {
    "|∇L|²": lambda x, y, d, M, a: lambda w: gradient_norm_squared(w, x, y, a),
    "less |∇L|²": lambda x, y, d, M, a: lambda w: -gradient_norm_squared(w, x, y, a),
    "φ": lambda x, y, d, M, a: lambda w: sharpness(w, x, y, d, a),
    "κ": lambda x, y, d, M, a: lambda w: curvature_along(w, x, M, 1, a)[0],
}
ROTATION = Action(  # of hidden units before a linear layer
    lambda U, V, h, g, activation: (U @ g.mT, g @ V),
    lambda activation: isinstance(activation, Identity),
    lambda T: (T - T.mT) / 2,
    torch.linalg.matrix_exp,
)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("action", [PSEUDOINVERSE, RESCALING, ROTATION])
def test_every_action_ascends_every_objective(case, action, objective):
    """ROTATION is an action of a user's own."""
    weights, x, y, directions, generators = case
    activation = Identity() if action is ROTATION else LeakyReLU()
    function = OBJECTIVES[objective](x, y, directions, 3 * generators[1], activation)
    value, slopes = ascent_direction(function, weights, x, activation, action)
    size = torch.stack([t.square().sum((-2, -1)) for t in slopes]).sum(0).sqrt()
    if action is ROTATION and objective == "|∇L|²":
        torch.testing.assert_close(size, 0 * size)  # rotations keep it
        return
    for sign in (-1, 1):
        T = [sign * 1e-6 * t / size[:, None, None] for t in slopes]
        moved = act(weights, x, [action.element(t) for t in T], activation, action)
        change = (
            function(moved)
            - function(act(weights, x, [action.element(0 * t) for t in T], activation, action))
        ) / 1e-6
        torch.testing.assert_close(change, sign * size, rtol=1e-3, atol=1e-8)


def test_an_action_that_is_not_defined_for_an_activation_says_so(case):
    weights, x, *_ = case
    elements = [torch.eye(6).double(), torch.eye(5).double()]
    for action, activation in ((RESCALING, Tanh()), (INVERSE_ACTIVATION, ReLU())):
        with pytest.raises(ValueError, match="is not defined for"):
            act(weights, x, elements, activation, action)


@pytest.mark.parametrize("activation", [LeakyReLU(), ReLU(), Tanh(), Identity()], ids=repr)
def test_activations_have_their_derivative_and_inverse(activation):
    x = torch.linspace(-2, 2, 40, dtype=torch.float64, requires_grad=True)
    y = activation(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(activation.derivative(x), slope)
    if hasattr(activation, "inverse"):
        torch.testing.assert_close(activation.inverse(y), x)
    if getattr(activation, "homogeneous", False):
        torch.testing.assert_close(activation(3 * x), 3 * y)


def test_exact_curve_derivatives_are_finite_differences_of_the_curve(activation):
    """On a network with positive activations, none of which changes its sign."""
    rng = torch.Generator().manual_seed(0)
    weights = [torch.rand(b, a, generator=rng).double() for a, b in ((12, 6), (6, 5), (5, 3))]
    x = torch.rand(12, 8, generator=rng).double()
    generators = [torch.rand(d, d, generator=rng).double() / d for d in (6, 5)]

    def curve(t):
        elements = [torch.linalg.matrix_exp(t * M) for M in generators]
        return act(weights, x, elements, activation, INVERSE_ACTIVATION)

    step = 1e-4
    before, here, after = curve(-step), curve(0), curve(step)
    first, second = curve_derivatives(weights, x, generators, activation, exact=True)
    closed_first, closed_second = curve_derivatives(weights, x, generators, activation)
    for m in range(3):
        slope = (after[m] - before[m]) / (2 * step)
        torch.testing.assert_close(first[m], slope, rtol=1e-5, atol=1e-6)
        bend = (after[m] - 2 * here[m] + before[m]) / step**2
        torch.testing.assert_close(second[m], bend, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(closed_first[m], first[m])
    assert (closed_second[1] - second[1]).abs().max() > 1e-2  # V of one pair, U of another
    completed = with_mixed_derivatives(weights, closed_first, closed_second, generators)
    torch.testing.assert_close(completed, second)


def test_the_mixed_derivatives_make_the_closed_form_exact_where_signs_differ(case, activation):
    """Each network of a stack, and one pair alone, which has none."""
    networks, x, _, _, generators = case
    x = x[:, :8]
    for weights in (networks, networks[:2]):
        pairs = generators[: len(weights) - 1]
        first, second = curve_derivatives(weights, x, pairs, activation)
        completed = with_mixed_derivatives(weights, first, second, pairs)
        exact = curve_derivatives(weights, x, pairs, activation, exact=True)
        torch.testing.assert_close([first, completed], list(exact))


@pytest.mark.parametrize("factor", [1.1, 0.99])
def test_a_run_moves_until_its_gradient_has_changed_by_a_factor(case, activation, factor):
    weights, x, y, *_ = case

    def objective(weights):
        return gradient_norm_squared(weights, x, y, activation)

    start = objective(weights)
    target = factor * start
    target[0] = start[0] * (1 + 100 * (factor - 1))  # out of reach of so few steps
    ends = (x, 1e-2, 30, activation, RESCALING)
    moved, path = ascend_to(target, objective, weights, *ends)
    torch.testing.assert_close(objective(moved), path[-1])
    reached = (factor - 1) * (path[-1] - target) >= 0
    assert reached.tolist() == [False, True, True]
    torch.testing.assert_close(path[-1, 1:], target[1:], rtol=1e-3, atol=0)
    for run in range(3):  # each alone, as in the stack
        alone, _ = ascend_to(target[run], objective, [w[run] for w in weights], *ends)
        torch.testing.assert_close([w[run] for w in moved], alone)


def test_a_run_that_is_there_or_gains_nothing_stays(case, activation):
    weights, x, *_ = case
    for target in (0.0, 1.0):
        moved, path = ascend_to(
            target, lambda w: 0 * w[0].sum((-2, -1)), weights, x, 1e-2, 5, activation
        )
        assert len(path) == 2  # one step is tried
        for w, before in zip(moved, weights):
            assert torch.equal(w, before)


def test_ascent_within_the_level_set_keeps_the_loss_and_beats_rescaling(case, activation):
    weights, x, y, *_ = case
    moved, path = level_set_ascent(weights, x, y, 2e-4, 10, activation)
    before, after = (cross_entropy(w, x, y, activation) for w in (weights, moved))
    torch.testing.assert_close(after, before, rtol=1e-7, atol=0)
    assert (path["objective"].diff(dim=0) > 0).all()
    torch.testing.assert_close(
        path["objective"][-1], gradient_norm_squared(moved, x, y, activation)
    )
    # a rescaling that moves the weights as far raises the gradient less
    _, slopes = ascent_direction(
        lambda w: gradient_norm_squared(w, x, y, activation), weights, x, activation, RESCALING
    )
    elements = [RESCALING.element(1e-4 * t / t.norm()) for t in slopes]
    rescaled = act(weights, x, elements, activation, RESCALING)
    length = torch.stack([(a - b).square().sum((-2, -1)) for a, b in zip(rescaled, weights)])
    length = length.sum(0).sqrt()
    gain = gradient_norm_squared(rescaled, x, y, activation) - path["objective"][0]
    for run in range(3):
        one = [w[run] for w in weights]
        _, found = level_set_ascent(one, x, y, length[run], 1, activation)
        assert found["objective"][1] - found["objective"][0] > gain[run]


class Softplus(torch.nn.Softplus):
    """An activation of a user's own."""

    def derivative(self, x):
        return x.sigmoid()


def test_a_users_own_activation_teleports(case):
    weights, x, y, *_ = case
    moved, path = teleport(weights, x, y, 1e-2, 3, Softplus(), return_path=True)
    assert (path["objective"].diff(dim=0) > 0).all()
    before, after = (cross_entropy(w, x[:, :4], y[:4], Softplus()) for w in (weights, moved))
    torch.testing.assert_close(after, before, rtol=0.05, atol=0)


def test_a_run_whose_activations_lost_their_rank_does_not_stop_the_others(case, activation):
    weights, x, y, *_ = case
    whole = [w.clone() for w in weights]
    weights[0][1, 3] = weights[0][1, 2]  # two equal units in one run
    with pytest.warns(UserWarning, match=r"\[\[1\]\] are not of full rank"):
        moved = teleport(weights, x, y, 1e-3, 2, activation)
    expected = teleport(whole, x, y, 1e-3, 2, activation)
    for w, other in zip(moved, expected):
        assert w.isfinite().all()
        torch.testing.assert_close(w[[0, 2]], other[[0, 2]])


def test_a_run_above_the_cap_keeps_its_very_weights_on_a_small_batch(case, activation):
    weights, x, y, *_ = case
    moved = teleport(weights, x[:, :4], y[:4], 1e-3, 2, activation, cap=0.0)
    for w, new in zip(weights, moved):
        torch.testing.assert_close(w, new)


def test_an_action_of_ones_own_needs_no_shortcut(case, activation):
    """The same as PSEUDOINVERSE, but that it does not say that V' = gV."""
    weights, x, y, *_ = case
    expected = teleport(weights, x, y, 1e-2, 3, activation)
    found = teleport(weights, x, y, 1e-2, 3, activation, action=Action(group_action))
    for w, other in zip(found, expected):
        torch.testing.assert_close(w, other, rtol=1e-6, atol=1e-8)


def test_curvature_along_takes_what_the_action_allows(case, activation):
    weights, x, _, _, generators = case
    M = generators[1]
    found = curvature_along(weights, x, M, 1, activation, RESCALING)
    expected = curvature_along(weights, x, torch.diag(M.diagonal()), 1, activation, RESCALING)
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="rescaling is not defined for Tanh"):
        curvature_along(weights, x, M, 1, Tanh(), RESCALING)


def test_a_network_without_pairs_is_named(case, activation):
    weights, x, *_ = case
    y = torch.zeros(x.shape[1], dtype=torch.int64)
    with pytest.raises(ValueError, match="one group element for each pair, not 1 layers and 0"):
        teleport(weights[:1], x, y, 1e-2, 1, activation)
    with pytest.raises(ValueError, match="the list of weights is empty"):
        teleport([], x, y, 1e-2, 1, activation)


def test_one_deficient_matrix_alone_is_as_in_a_stack():
    h = torch.ones(3, 5, dtype=torch.float64)
    h[0, 0] = 2  # of rank 2
    for matrix in (h, h.mT):
        with pytest.warns(UserWarning, match="not of full rank"):
            torch.testing.assert_close(pseudoinverse(matrix), torch.linalg.pinv(matrix))
    with pytest.warns(UserWarning, match="not finite"):
        assert pseudoinverse(torch.full((3, 5), torch.nan)).isnan().all()


def test_an_activation_without_a_derivative_is_named(case):
    weights, x, y, *_ = case
    with pytest.raises(ValueError, match="has no derivative: take one of models.py"):
        teleport(weights, x, y, 1e-2, 1, torch.nn.LeakyReLU(0.1))
    with pytest.raises(ValueError, match="inverse_group_action is not defined for ReLU"):
        curve_derivatives(weights, x, [torch.eye(w.shape[-2]) for w in weights[:-1]], ReLU())


def test_random_elements_are_of_the_actions_group():
    rng = torch.Generator().manual_seed(0)
    (g,) = random_group_elements([1.1 * torch.eye(4)[None]], rng, RESCALING)
    assert (g.diagonal(dim1=-2, dim2=-1) > 0).all() and torch.equal(g, g * torch.eye(4))
    length = g.diagonal(dim1=-2, dim2=-1).log().norm()
    torch.testing.assert_close(length, (0.1 * torch.eye(4)).norm())
