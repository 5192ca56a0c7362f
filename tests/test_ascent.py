"""parameter_symmetries/ascent.py on orbits of its own: stops, targets, ends and products."""

import pytest
import torch

from parameter_symmetries.ascent import Orbit, ascend, ascend_to, slopes, value_and_gradient
from teleportation import RESCALING

NAN = float("nan")


def scale(parameters, elements):
    """Act with one diagonal g on the first parameter, and with its inverse on the second."""
    u, v, *others = parameters
    g = elements[0].diagonal(dim1=-2, dim2=-1)
    return [g * u, v / g, *others]


def case(*runs):
    """Return an Orbit and parameters u, v: [*runs, 3], and one on which no group acts."""
    rng = torch.Generator().manual_seed(0)
    u, v, other = 1 + torch.rand(3, *runs, 3, generator=rng, dtype=torch.float64)
    return Orbit(scale, [RESCALING], [torch.zeros(*runs, 3, 3).double()]), [u, v, other]


def size(parameters):
    """An objective: Σ u² + v⁴, [*runs]."""
    return (parameters[0] ** 2 + parameters[1] ** 4).sum(-1)


def gradient(parameters):
    u, v, other = parameters
    return size(parameters), [2 * u, 4 * v**3, torch.zeros_like(other)]


def test_slopes_are_those_in_the_logarithm_of_the_scale():
    orbit, (u, v, other) = case(4)
    for own in (None, gradient):
        value, (slope,) = slopes(orbit, size, [u, v, other], own)
        torch.testing.assert_close(value, size([u, v]))
        torch.testing.assert_close(slope, torch.diag_embed(2 * u**2 - 4 * v**4))


@pytest.mark.parametrize("own", [None, gradient])
@pytest.mark.parametrize("lr", [1e-3, -1e-3])
def test_the_path_leads_from_the_start_to_the_end(lr, own):
    orbit, parameters = case(4)
    moved, path = ascend(orbit, size, parameters, lr, 5, gradient=own)
    assert path.objective.shape == (6, 4)
    assert (lr * path.objective.diff(dim=0) > 0).all()
    ends = torch.stack([size(parameters), size(moved)])
    torch.testing.assert_close(path.objective[[0, -1]], ends)
    torch.testing.assert_close(orbit.act(parameters, path.group_elements), moved)
    assert torch.equal(moved[2], parameters[2])


def test_a_run_above_the_stop_stays_and_the_ascent_ends_when_all_do():
    orbit, parameters = case(4)
    parameters[0][2, 0] = NAN  # has no slope
    start = size(parameters)
    stop = torch.where(torch.arange(4) < 2, 1.1 * start, 0.9 * start)
    moved, path = ascend(orbit, size, parameters, 1e-3, 1000, stop)
    assert len(path.objective) < 1000
    assert (path.objective[-1] > stop).tolist() == [True, True, False, True]
    assert torch.equal(moved[1][2:], parameters[1][2:])
    assert torch.equal(path.group_elements[0][2:], torch.eye(3).double().expand(2, 3, 3))
    torch.testing.assert_close(path.objective[-1, :2], size(moved)[:2])


def test_a_run_that_has_stopped_does_not_start_again():
    """An objective that changes from call to call, as one with new draws does."""
    orbit, parameters = case(2)
    noise = iter([0.0, 100.0, 0.0, 0.0, 0.0])

    def noisy(parameters):
        return size(parameters) + torch.tensor([0.0, 1.0]) * next(noise)

    moved, _ = ascend(orbit, noisy, parameters, 1e-3, 4, stop=50.0)
    assert torch.equal(moved[0][1], ascend(orbit, size, parameters, 1e-3, 1)[0][0][1])


def test_a_step_is_no_longer_than_the_longest():
    orbit, parameters = case(4)
    _, path = ascend(orbit, size, parameters, torch.tensor([1e-6, 1e9, -1e9, 1e9]), 1, max_norm=0.5)
    lengths = path.group_elements[0].diagonal(dim1=-2, dim2=-1).log().norm(dim=-1)
    assert lengths[0] < 0.01
    torch.testing.assert_close(lengths[1:], torch.full((3,), 0.5).double())


def test_runs_reach_their_targets_from_both_sides():
    orbit, parameters = case(4)
    start = size(parameters)
    target = start * torch.tensor([1.2, 0.97, NAN, 50.0]).double()
    moved, path = ascend_to(target, orbit, size, parameters, 0.01, 100)
    torch.testing.assert_close(path.objective[-1], size(moved))
    torch.testing.assert_close(path.objective[-1, :2], target[:2], rtol=1e-3, atol=0)
    assert path.objective[-1, 0] >= target[0] and path.objective[-1, 1] <= target[1]
    assert torch.equal(moved[0][2], parameters[0][2]) and path.objective[-1, 3] > start[3]
    torch.testing.assert_close(orbit.act(parameters, path.group_elements), moved)


@pytest.mark.parametrize("target,tried", [(0.0, 1), (1.0, 2)])
def test_a_run_that_is_there_or_gains_nothing_stays(target, tried):
    orbit, parameters = case(2)
    moved, path = ascend_to(target, orbit, lambda p: 0 * p[0].sum(-1), parameters, 0.01, 5)
    assert len(path.objective) == tried
    assert all(torch.equal(new, old) for new, old in zip(moved, parameters))


def test_one_value_may_have_elements_with_dimensions_of_their_own():
    """As for a module, whose groups have heads."""
    orbit, parameters = case(4)

    def total(parameters):
        return size(parameters).sum()

    moved, path = ascend(orbit, total, parameters, 1e-3, 3, stop=1e9)
    torch.testing.assert_close(moved, ascend(orbit, size, parameters, 1e-3, 3)[0])
    assert path.objective.shape == (4,)
    target = 1.1 * total(parameters)
    moved, path = ascend_to(target, orbit, total, parameters, 0.01, 100)
    torch.testing.assert_close(path.objective[-1], target, rtol=1e-3, atol=0)


def test_value_and_gradient_are_constants():
    parameters = [p.requires_grad_() for p in case(2)[1]]
    value, slope = value_and_gradient(size, parameters)
    assert not value.requires_grad and not any(g.requires_grad for g in slope)
    expected = [g.detach() for g in gradient(parameters)[1]]  # 0 for the third: it has no part
    torch.testing.assert_close(list(slope), expected)
