"""The paper's core: group actions, teleports, sharpness and curvature of minima.

Weights are a list, W[m]: [..., d_{m+1}, d_m]; activations are [..., d, n], a column for each
sample; leading dimensions are runs (see models.py). The m-th pair of layers is V = W_m and
U = W_{m+1}; h is the input of V.
"""

import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import models
from models import check_batch, warn_if_not_finite
from parameter_symmetries import ascent
from parameter_symmetries.ascent import INF, Orbit

CHUNK = 400_000  # first-layer activations of perturbed networks at a time: these fit the cache
RADII = {  # lengths of the perturbations in Table 1's φ, with one direction each
    "MNIST": np.arange(0.001, 0.2, 0.01),
    "FashionMNIST": np.arange(0.0001, 0.02, 0.001),
    "CIFAR10": np.arange(0.0001, 0.02, 0.001),
}


# Group actions on a pair of layers


def pseudoinverse(h):
    """Return h^+, [..., n, d], of matrices h: [..., d, n], by a QR decomposition.

    This is as accurate as torch.linalg.pinv, and ten times as fast. Matrices that do not have full
    rank go to torch.linalg.pinv; those that are not finite give nan. A warning names their runs.
    """
    d, n = h.shape[-2:]
    if n < d:
        return pseudoinverse(h.mT).mT
    q, r = torch.linalg.qr(h.mT)  # h = r^T q^T
    inverse = torch.linalg.solve_triangular(r.mT, q, upper=False, left=False)
    diagonal = r.detach().diagonal(dim1=-2, dim2=-1).abs()
    full = diagonal.amin(-1) > n * torch.finfo(h.dtype).eps * diagonal.amax(-1)  # False for nan
    if full.all():
        return inverse
    if h.dim() == 2:
        return pseudoinverse(h[None])[0]
    warnings.warn(
        f"the activations [{d}, {n}] of the runs {(~full).nonzero().tolist()} do not have full "
        "rank or are not finite: the group action does not keep their outputs exactly",
        stacklevel=2,
    )
    deficient = ~full & h.isfinite().all(-1).all(-1)
    return inverse.index_put((deficient,), torch.linalg.pinv(h[deficient]))


def group_action(U, V, h, g, activation):
    """Return U' = U σ(Vh) σ(gVh)^+ and V' = gV: the action by which the paper teleports.

    U: [..., d_out, d], V: [..., d, d_in], h: [..., d_in, n], g: [..., d, d]. The outputs on h are
    kept if σ(gVh) has full column rank, which needs n <= d. Otherwise U' is their least-squares
    refit. Warns as `pseudoinverse` does.
    """
    V_new = g @ V
    return U @ (activation(V @ h) @ pseudoinverse(activation(V_new @ h))), V_new


def inverse_group_action(U, V, h, g, activation):
    """Return U' = U g^{-1} and V' = σ^{-1}(g σ(Vh)) h^+: the action by which ψ is defined (Eq. 5).

    Shapes are those of `group_action`. The outputs on h are kept if h has full column rank, which
    needs n <= d_in. If n < d_in, V' is projected onto the span of h, even where g = I, which
    changes the outputs on other inputs. Warns as `pseudoinverse` does.
    """
    V_new = activation.inverse(g @ activation(V @ h)) @ pseudoinverse(h)
    # not torch.linalg.solve, whose nested forward derivatives are wrong in torch 2.13
    return U @ torch.linalg.inv(g), V_new


def rescaling(U, V, h, g, activation):
    """Return U' = U g^{-1} and V' = gV for a diagonal, positive g.

    This keeps the function of networks whose activation is positively homogeneous: σ(cz) = c σ(z)
    for c > 0. Shapes are those of `group_action`; h is not used.
    """
    scale = g.diagonal(dim1=-2, dim2=-1)
    return U / scale[..., None, :], scale[..., None] * V


def linear(U, V, h, g, activation):
    """Return U' = U g^{-1} and V' = gV for any g, which keeps the function of linear networks."""
    return U @ torch.linalg.inv(g), g @ V


class Action(NamedTuple):
    """How a group acts on a pair of layers, and how a matrix T: [..., d, d] stands for g."""

    name: str  # results that were computed with another one are refused
    act: Callable  # (U, V, h, g, activation) -> (U', V')
    is_defined: Callable = lambda activation: True
    project: Callable = lambda T: T  # returns the nearest T that the group allows
    element: Callable = lambda T: torch.eye(T.shape[-1]).to(T) + T  # returns g, which is I at T = 0
    multiplies_V: bool = False  # whether V' = gV


PSEUDOINVERSE = Action("pseudoinverse", group_action, multiplies_V=True)
INVERSE_ACTIVATION = Action(
    "inverse activation",
    inverse_group_action,
    lambda activation: hasattr(activation, "inverse"),
)
RESCALING = Action(
    "rescaling",
    rescaling,
    lambda activation: getattr(activation, "homogeneous", False),
    lambda T: torch.diag_embed(T.diagonal(dim1=-2, dim2=-1)),
    lambda T: torch.diag_embed(T.diagonal(dim1=-2, dim2=-1).exp()),
    multiplies_V=True,
)
LINEAR = Action(
    "linear",
    linear,
    lambda activation: isinstance(activation, nn.Identity),
    element=torch.linalg.matrix_exp,
    multiplies_V=True,
)


# Group actions on a network


def act(weights, x, group_elements, activation, action=PSEUDOINVERSE):
    """Act on each pair of layers, from the input upwards; return the new weights.

    The input h of a pair is that of the network as transformed so far. x: [d_0, n];
    group_elements: for each pair g_m, [..., d_{m+1}, d_{m+1}]. Raises ValueError if the arguments
    do not fit together, or if the action is not defined for the activation.
    """
    check_batch(weights, x)
    check_action(weights, group_elements, activation, action)
    weights, h = list(weights), x
    for m, g in enumerate(group_elements):
        V, U = weights[m : m + 2]
        h = activation(weights[m - 1] @ h) if m else x
        weights[m + 1], weights[m] = action.act(U, V, h, g, activation)
    return weights


def check_action(weights, matrices, activation, action):
    """Raise ValueError if an action is not defined for an activation, or has the wrong matrices.

    Each pair of layers with d hidden units needs a matrix [..., d, d].
    """
    needed = [[w.shape[-2]] * 2 for w in weights[:-1]]
    shapes = [list(matrix.shape[-2:]) for matrix in matrices]
    if not needed or shapes != needed:
        raise ValueError(f"each pair of layers needs a square matrix: {needed}, not {shapes}")
    if not action.is_defined(activation):
        raise ValueError(f"the action {action.name!r} is not defined for {activation}")


def random_group_elements(group_elements, rng, action=PSEUDOINVERSE):
    """Draw random T_m of the lengths |T_m|_F = |g_m − I|_F; return their elements.

    group_elements: for each pair g_m, [..., d, d]; the result has the same shapes.
    """
    drawn = []
    for g in group_elements:
        T = action.project(torch.randn(g.shape, generator=rng).to(g))
        scale = (g - torch.eye(g.shape[-1]).to(g)).norm(dim=(-2, -1)) / T.norm(dim=(-2, -1))
        drawn.append(action.element(scale[..., None, None] * T))
    return drawn


# Ascent along the orbit, and teleports to a larger gradient (Figures 5 and 13)


def orbit_of(weights, x, activation, action=PSEUDOINVERSE):
    """Return the Orbit along which parameter_symmetries.ascent moves networks; x: [d_0, n]."""
    zeros = [w.new_zeros(*w.shape[:-1], w.shape[-2]) for w in weights[:-1]]

    def act_with(weights, group_elements):
        return act(weights, x, group_elements, activation, action)

    return Orbit(act_with, [action] * len(zeros), zeros)


def ascend_to(target, objective, weights, x, length, steps, activation, action=PSEUDOINVERSE):
    """Teleport until an objective has reached a target: see parameter_symmetries.ascent.ascend_to.

    x: [d_0, n]. Returns the new weights and the objective on the way, at most [steps + 1, ...].
    """
    orbit = orbit_of(weights, x, activation, action)
    weights, path = ascent.ascend_to(target, orbit, objective, weights, length, steps)
    return weights, path.objective


def inner_product(a, b):
    """Return the inner product, [...], of two lists of weights, all weights flattened."""
    return sum((p * q).sum((-2, -1)) for p, q in zip(a, b))


def loss_and_gradient_norm_squared(weights, x, y, activation):
    """Return the loss, [...], and |∇L|², [...], over all weights; x: [d_0, n], y: [n]."""
    targets = models.one_hot(y, weights)
    loss, delta, above = models.backpropagate(weights[1:], weights[0] @ x, targets, activation)
    gradient = [delta @ x.mT, *above]
    return loss, inner_product(gradient, gradient)


def gradient_norm_squared(weights, x, y, activation):
    """Return |∇L|², [...], over all weights; x: [d_0, n], y: [n]. Warns if it is not finite."""
    check_batch(weights, x, y)
    norm = loss_and_gradient_norm_squared(weights, x, y, activation)[1]
    return warn_if_not_finite("|∇L|²", norm)


@torch.no_grad()
def teleport(
    weights, x, y, lr, steps, activation, cap=100.0, return_path=False, action=PSEUDOINVERSE
):
    """Teleport to a larger gradient: gradient ascent on |∇L|², over all weights, on one batch.

    x: [d_0, n], y: [n]. A run stops once its |∇L|² is above `cap`; along rescalings |∇L|² has no
    other bound. A negative lr descends. Returns the new weights and, with return_path, the Path of
    parameter_symmetries.ascent as a dict; its objective is |∇L|². Raises ValueError as `act` does.
    """
    check_batch(weights, x, y)
    first_layer = weights[0]
    if action.multiplies_V:
        # the first layer sees only the span of x: with x = QR it has n inputs instead of d_0
        q, x = torch.linalg.qr(x)
        weights = [first_layer @ q, *weights[1:]]

    def objective(weights):
        return loss_and_gradient_norm_squared(weights, x, y, activation)[1]

    orbit = orbit_of(weights, x, activation, action)
    weights, path = ascent.ascend(orbit, objective, weights, lr, steps, cap)
    warn_if_not_finite("a teleport's |∇L|²", path.objective[-1])
    if action.multiplies_V:
        weights[0] = path.group_elements[0] @ first_layer
    return (weights, path._asdict()) if return_path else weights


# Sharpness (Eq. 4), and teleports that change it (Figure 4)


def random_directions(widths, radii, rng, sphere=False):
    """Draw a direction d_k over all weights for each radius, of the length |d_k| = radii[k].

    As in the published code it is uniform in [0, 1)^p and then scaled; with `sphere` it is uniform
    on the sphere. Returns a list like the weights, [len(radii), d_{m+1}, d_m].
    """
    shapes = [(fan_out, fan_in) for fan_in, fan_out in pairwise(widths)]
    sizes = [fan_out * fan_in for fan_out, fan_in in shapes]
    draw = torch.randn if sphere else torch.rand
    d = draw(len(radii), sum(sizes), generator=rng)
    d *= (torch.as_tensor(radii, dtype=d.dtype) / d.norm(dim=1)).unsqueeze(1)
    return [part.unflatten(1, shape) for part, shape in zip(d.split(sizes, dim=1), shapes)]


def perturbed(weights, z, x, directions):
    """Yield the networks at w + d_k, a chunk of k at a time: the upper layers, and z = W_0 x.

    z: W_0 x at w. Shapes are those of `perturbed_losses`.
    """
    chunk = max(1, CHUNK // z.numel())
    z, upper = z.unsqueeze(-3), [w.unsqueeze(-3) for w in weights[1:]]
    parts_of_all = (d.split(chunk) for d in (directions[0] @ x, *directions[1:]))
    for dz, *parts in zip(*parts_of_all):
        yield [w + d for w, d in zip(upper, parts)], z + dz


def perturbed_losses(weights, x, y, directions, activation):
    """Return the losses at w + d_k, [..., K].

    x: [d_0, n], y: [n]; directions: a list like the weights, [K, d_{m+1}, d_m], which all runs
    share. Raises ValueError if weights, x and y do not fit together.
    """
    check_batch(weights, x, y)
    networks = perturbed(weights, weights[0] @ x, x, directions)
    losses = [
        models.cross_entropy_of_logits(models.propagate(*network, activation), y)
        for network in networks
    ]
    return torch.cat(losses, -1)


def sharpness(weights, x, y, directions, activation):
    """Return φ (Eq. 4), [...]: the mean over k of the `perturbed_losses`."""
    losses = perturbed_losses(weights, x, y, directions, activation)
    return warn_if_not_finite("φ", losses.mean(-1))


@torch.enable_grad()
def sharpness_and_gradient(weights, x, y, directions, activation):
    """Return φ, [...], and its gradient in the weights.

    directions: an iterable of lists as `sharpness` takes them, which need not be in memory at the
    same time.
    """
    # W_0 x is a leaf: it is computed, and its gradient passed on to W_0, once for all directions
    leaves = [w.detach().requires_grad_() for w in (weights[0] @ x, *weights[1:])]
    phi, gradient, count = 0, [0 for _ in leaves], 0
    for block in directions:
        for upper, z in perturbed(leaves, leaves[0], x, block):
            loss = models.cross_entropy_of_logits(models.propagate(upper, z, activation), y)
            parts = torch.autograd.grad(loss.sum(), leaves)
            gradient = [total + part for total, part in zip(gradient, parts)]
            phi, count = phi + loss.detach().sum(-1), count + loss.shape[-1]
    gradient[0] = gradient[0] @ x.mT
    return phi / count, [g / count for g in gradient]


@torch.no_grad()
def teleport_sharpness(
    weights,
    x,
    y,
    lr,
    steps,
    radii,
    per_radius,
    seed,
    activation,
    stop=INF,
    max_norm=INF,
    return_path=False,
    action=PSEUDOINVERSE,
):
    """Teleport to another sharpness: gradient ascent on φ or, where lr is negative, descent.

    All runs share the batch x: [d_0, n], y: [n], and the directions, `per_radius` of each radius,
    which each step draws anew from the stream of `seed`. lr, stop, max_norm: as in
    parameter_symmetries.ascent.ascend. Returns what `teleport` returns.
    """
    check_batch(weights, x, y)
    widths, rng = models.widths_of(weights), torch.Generator().manual_seed(seed)

    def draw():
        for radius in radii:  # one at a time: all directions would not fit into memory
            yield [d.to(x) for d in random_directions(widths, [radius] * per_radius, rng)]

    def objective(weights):
        return sum(sharpness(weights, x, y, block, activation) for block in draw()) / len(radii)

    def gradient(weights):
        return sharpness_and_gradient(weights, x, y, draw(), activation)

    orbit = orbit_of(weights, x, activation, action)
    weights, path = ascent.ascend(orbit, objective, weights, lr, steps, stop, max_norm, gradient)
    warn_if_not_finite("a teleport's φ", path.objective[-1])
    return (weights, path._asdict()) if return_path else weights


# Curvature (Eq. 5), and teleports that change it (Figure 4)


def random_generators(widths, rng):
    """Draw M_m, [d, d], for each hidden width d: uniform in [0, 1), scaled to |M_m|_F = 1."""
    generators = [torch.rand(d, d, generator=rng) for d in widths[1:-1]]
    return [M / M.norm() for M in generators]


def curve_derivatives(weights, x, generators, activation):
    """Return γ'(0) and γ''(0) by Eqs. 57 and 60, each a list like the weights.

    γ(t) is the network acted on by g_m = exp(t M_m) in every pair, by the inverse-activation
    action; the equations keep h as it is at t = 0. x: [d_0, n]; generators: for each pair M_m,
    [..., d_{m+1}, d_{m+1}]. Raises ValueError as `act` does.
    """
    check_batch(weights, x)
    check_action(weights, generators, activation, INVERSE_ACTIVATION)
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    h = x
    for m, M in enumerate(generators):
        V, U = weights[m : m + 2]
        z = V @ h
        h_next, slope = activation(z), activation.derivative(z)
        h_pinv = torch.linalg.pinv(h)  # if units are dead, h is deficient: not worth a warning
        M2 = M @ M
        first[m] = first[m] + (M @ h_next / slope) @ h_pinv
        second[m] = second[m] + (M2 @ h_next / slope) @ h_pinv
        first[m + 1] = first[m + 1] - U @ M
        second[m + 1] = second[m + 1] + U @ M2
        h = h_next
    return first, second


def with_mixed_derivatives(weights, first, second, generators):
    """Return γ''(0) with a term that Eq. 60 leaves out.

    Shapes are those of `curve_derivatives`. A weight W that is V of one pair and U of the pair
    below, whose generator is M, moves as A(t) exp(−tM). So γ'' also has the term −2 A'M, with
    A' = γ' + WM. For two pairs γ'' is then exact if x has full column rank and h_1 full row rank.
    """
    shared = zip(weights[1:], first[1:], second[1:], generators[:-1])
    mixed = [bend - 2 * (slope + w @ M) @ M for w, slope, bend, M in shared]
    return [second[0], *mixed, second[-1]]


def curvature(first, second):
    """Return κ = sqrt(|γ'|²|γ''|² − (γ'·γ'')²) / |γ'|³, [...], from γ' and γ'', lists of weights.

    ψ (Eq. 5) is the mean of κ over random generators. κ does not depend on the curve's speed.
    """
    speed2, cross = inner_product(first, first), inner_product(first, second)
    area2 = speed2 * inner_product(second, second) - cross**2
    return area2.clamp(min=0).sqrt() / speed2**1.5


def exponential(tM):
    """Return exp(tM) to third order, which is exact for the first three derivatives at t = 0."""
    return torch.eye(tM.shape[-1]).to(tM) + tM + tM @ tM / 2 + tM @ tM @ tM / 6


def two_derivatives(curve, t):
    """Return the first and the second derivative of a function of a number t, in forward mode."""
    one = torch.ones_like(t)
    return torch.func.jvp(lambda t: torch.func.jvp(curve, (t,), (one,))[1], (t,), (one,))


def hidden_input(weights, x, layer, activation):
    """Return the activations, [..., d, n], that W_layer acts on."""
    for w in weights[:layer]:
        x = activation(w @ x)
    return x


def curvature_along(weights, x, generator, layer, activation, action=PSEUDOINVERSE):
    """Return κ and dκ/dt, [...], at t = 0 of the curve g = exp(tM) in one pair of layers.

    The curve is that of V = W_layer and U = W_{layer+1} alone. x: [d_0, n]; generator: M,
    [..., d, d], of which the action takes the part that it allows. κ is nan if the curve stands
    still, dκ/dt also if it is straight. Raises ValueError as `act` does, and if the pseudoinverse
    action has n < d: it needs σ(Vh) of full row rank.
    """
    check_batch(weights, x)
    check_action(weights[layer : layer + 2], [generator], activation, action)
    generator, h = action.project(generator), hidden_input(weights, x, layer, activation)
    V, U = weights[layer : layer + 2]
    d, n = V.shape[-2], h.shape[-1]
    if action.act is group_action and n < d:
        raise ValueError(f"a batch of {n} is too small: the least-squares refit needs {d} or more")

    def curve(t):
        return action.act(U, V, h, exponential(t * generator), activation)

    def kappa(t):
        return curvature(*two_derivatives(curve, t))

    zero = torch.zeros(()).to(h)
    return torch.func.jvp(kappa, (zero,), (torch.ones_like(zero),))


@torch.no_grad()
def teleport_curvature(
    weights, x, lr, generators, activation, layer=1, max_norm=INF, action=PSEUDOINVERSE
):
    """Teleport to another curvature: for each generator a step t = lr dκ/dt along exp(tM).

    The pair `layer` alone is acted on. x: [d_0, n]; generators: M, [d, d], shared by all runs; lr:
    a number or a tensor that broadcasts over the runs, negative to decrease κ. A step is cut to
    |tM|_F = max_norm, since exp(tM) soon exceeds the precision of a pseudoinverse. Returns the new
    weights and the product of the steps' elements, [..., d, d].
    """
    check_batch(weights, x)
    weights, product = list(weights), torch.eye(weights[layer].shape[-2]).to(x)
    h = hidden_input(weights, x, layer, activation)
    for M in map(action.project, generators):
        _, slope = curvature_along(weights, x, M, layer, activation, action)
        longest = max_norm / M.norm()
        # a run whose activations have lost their rank has no derivative, and stays
        t = (torch.as_tensor(lr).to(x) * slope).nan_to_num(0.0, 0.0, 0.0).clamp(-longest, longest)
        g = torch.linalg.matrix_exp(t[..., None, None] * M)
        V, U = weights[layer : layer + 2]
        weights[layer + 1], weights[layer] = action.act(U, V, h, g, activation)
        product = g @ product
    return weights, product


# Table 1


class Estimate(NamedTuple):
    """What Table 1 needs to know of networks on a batch, each [...]."""

    sharpness: torch.Tensor  # φ (Eq. 4)
    curvature: torch.Tensor  # κ by Eqs. 57 and 60, whose mean is ψ (Eq. 5)
    batch_loss: torch.Tensor
    exact_curvature: torch.Tensor  # κ with the mixed derivatives


@torch.no_grad()
def estimate(weights, x, y, radii, seed, activation, sphere=False):
    """Return the Estimate of each network on one batch x: [d_0, n], y: [n].

    All networks share the draws: a direction for each radius, and a generator for each pair. The
    generators are the published ones if `seed` is the index of the batch.
    """
    check_batch(weights, x, y)
    widths, rng = models.widths_of(weights), torch.Generator()
    generators = [M.to(x) for M in random_generators(widths, rng.manual_seed(12345 * seed))]
    rng.manual_seed(12345 * seed + 1)
    directions = [d.to(x) for d in random_directions(widths, radii, rng, sphere)]
    # The first layer sees only the span of x. With x = QR, W_0 x = (W_0 Q) R, and γ' and γ'' keep
    # their lengths, since the columns of Q are orthonormal.
    q, x = torch.linalg.qr(x)
    directions[0] = directions[0] @ q
    weights = [weights[0] @ q, *weights[1:]]
    first, second = curve_derivatives(weights, x, generators, activation)
    exact = with_mixed_derivatives(weights, first, second, generators)
    return Estimate(
        sharpness(weights, x, y, directions, activation),
        curvature(first, second),
        models.cross_entropy(weights, x, y, activation),
        curvature(first, exact),
    )
