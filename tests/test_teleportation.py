"""teleportation.py: golden numbers, finite differences, plain versions, stacks against members."""

import pytest
import torch
from torch.nn import functional as F

import teleportation
from models import init_weights
from teleportation import (
    curvature,
    curve_derivatives,
    random_directions,
    random_generators,
    sharpness,
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
