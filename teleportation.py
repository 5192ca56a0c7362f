"""The core: group actions on pairs of layers, teleporting, sharpness and curvature of minima.

Shapes are those of models.py: W[m]: [..., d_{m+1}, d_m], activations [..., d, n], one column per
sample; leading dimensions are runs.

    in the paper                                here
    sharpness φ, Eq. 4                          sharpness
    curvature κ                                 curvature
    its mean ψ, Eq. 5                           estimate, for one M and one batch
    γ' and γ'', Eqs. 57, 60                     curve_derivatives
    the two group actions                       group_action, inverse_group_action
    the second to first order, Figure 6         inverse_group_action_first_order
    teleports to a larger |∇L|²                 teleport
    to another sharpness or curvature           teleport_sharpness, teleport_curvature
"""

import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from models import (
    backpropagate,
    check_batch,
    cross_entropy,
    cross_entropy_of_logits,
    one_hot,
    propagate,
    warn_if_not_finite,
    widths_of,
)

INF = float("inf")
CHUNK = 400_000  # first-layer activations of perturbed networks in flight at once: fits the cache
RADII = {  # |t d| of the perturbations by which φ is estimated, one direction each (Table 1)
    "MNIST": np.arange(0.001, 0.2, 0.01),
    "FashionMNIST": np.arange(0.0001, 0.02, 0.001),
    "CIFAR10": np.arange(0.0001, 0.02, 0.001),
}


def pseudoinverse(h):
    """Return h^+ [..., n, d] of matrices h: [..., d, n], through a QR decomposition.

    That is some ten times as fast as torch.linalg.pinv's singular values, and as accurate for
    matrices of full rank. A member of less rank is named in a warning, and torch.linalg.pinv cuts
    its small singular values off. One that is not finite is named, too; its pseudoinverse is nan.
    """
    if h.dim() == 2:
        return pseudoinverse(h[None])[0]
    d, n = h.shape[-2:]
    if n < d:
        return pseudoinverse(h.mT).mT
    q, r = torch.linalg.qr(h.mT)  # h = r^T q^T
    inverse = torch.linalg.solve_triangular(r.mT, q, upper=False, left=False)
    diagonal = r.diagonal(dim1=-2, dim2=-1).abs()
    full = diagonal.amin(-1) > n * torch.finfo(h.dtype).eps * diagonal.amax(-1)  # False for nan
    if full.all():
        return inverse
    finite = h.isfinite().all(-1).all(-1)
    deficient = ~full & finite
    for runs, what in ((~finite, "finite"), (deficient, "of full rank")):
        if runs.any():
            named = f"the activations [{d}, {n}] of runs {runs.nonzero().tolist()}"
            kept = "the group action does not preserve their outputs exactly"
            warnings.warn(f"{named} are not {what}: {kept}", stacklevel=2)
    # not in place, for the sake of derivatives; where a rank is deficient they may be nan
    inverse = torch.where(finite[..., None, None], inverse, torch.nan)
    return inverse.index_put((deficient,), torch.linalg.pinv(h[deficient]))


def group_action(U, V, h, g, activation):
    """Act with g on a pair of layers: V' = gV, U' = U σ(Vh) σ(gVh)^+; return (U', V').

    V: [..., d, d_in] acts on h: [..., d_in, n], U: [..., d_out, d] comes above it, g: [..., d, d].
    The pair's outputs on h are kept where σ(gVh) has full column rank, which needs n <= d;
    elsewhere U' is the least-squares refit of them. Warns as `pseudoinverse` does.
    """
    V_new = g @ V
    return U @ (activation(V @ h) @ pseudoinverse(activation(V_new @ h))), V_new


def inverse_group_action(U, V, h, g, activation):
    """Act with g through the activation: V' = σ^{-1}(g σ(Vh)) h^+, U' = U g^{-1}; return (U', V').

    Shapes are those of `group_action`. The pair's outputs on h are kept where h has full column
    rank, which needs n <= d_in. Where n < d_in, even g = I projects V' onto the span of h, so that
    outputs on other inputs change. Warns as `pseudoinverse` does.
    """
    V_new = activation.inverse(g @ activation(V @ h)) @ pseudoinverse(h)
    # not torch.linalg.solve, whose nested forward derivatives are wrong in torch 2.13
    return U @ torch.linalg.inv(g), V_new


def inverse_group_action_first_order(U, V, h, g, activation, h_pinv=None):
    """Act with g = I + T as `inverse_group_action` does, but with U' = U (I − T) for U g^{-1}.

    Where h has full column rank the outputs become U (I − T²) σ(Vh). h_pinv: [..., n, d_in], the
    pseudoinverse of h if it is known: many steps can share it.
    """
    h_pinv = pseudoinverse(h) if h_pinv is None else h_pinv
    identity = torch.eye(g.shape[-1]).to(g)
    return U @ (2 * identity - g), activation.inverse(g @ activation(V @ h)) @ h_pinv


def rescaling(U, V, h, g, activation):
    """Act with a diagonal, positive g: V' = gV, U' = U g^{-1}; return (U', V').

    The network's function is kept, on all inputs and up to rounding, for any positively homogeneous
    activation: σ(cz) = c σ(z) for c > 0. h is not used. Shapes are those of `group_action`.
    """
    scale = g.diagonal(dim1=-2, dim2=-1)
    return U / scale[..., None, :], scale[..., None] * V


def linear(U, V, h, g, activation):
    """Act with any g where nothing lies between V and U: V' = gV, U' = U g^{-1}; return (U', V').

    The product UV is kept. h and the activation are not used. Shapes are those of `group_action`.
    """
    return U @ torch.linalg.inv(g), g @ V


class Action(NamedTuple):
    """How a group acts on a pair of layers, and which T it allows.

    A new action is a new Action: what ascends, and what derives along exp(tM), follows from it.
    """

    act: Callable  # (U, V, h, g, activation) -> (U', V')
    takes: Callable = lambda activation: True  # whether the action is defined for an activation
    project: Callable = lambda T: T  # the allowed T that is nearest to T: [..., d, d]
    element: Callable = lambda T: torch.eye(T.shape[-1]).to(T) + T  # g, which is I at T = 0
    left: bool = False  # whether V' = gV, whatever h is


PSEUDOINVERSE = Action(group_action, left=True)
INVERSE_ACTIVATION = Action(inverse_group_action, lambda activation: hasattr(activation, "inverse"))
FIRST_ORDER = INVERSE_ACTIVATION._replace(act=inverse_group_action_first_order)
RESCALING = Action(
    rescaling,
    lambda activation: getattr(activation, "homogeneous", False),
    lambda T: torch.diag_embed(T.diagonal(dim1=-2, dim2=-1)),
    lambda T: torch.diag_embed(T.diagonal(dim1=-2, dim2=-1).exp()),
    left=True,
)
LINEAR = Action(
    linear,
    lambda activation: isinstance(activation, nn.Identity),
    element=torch.linalg.matrix_exp,
    left=True,
)


def check_action(action, activation):
    """Raise ValueError where an action is not defined for an activation."""
    if not hasattr(activation, "derivative"):
        raise ValueError(f"{activation} has no derivative: take one of models.py, or one like it")
    if not action.takes(activation):
        raise ValueError(f"{action.act.__name__} is not defined for {activation}")


def act(weights, x, group_elements, activation, action=PSEUDOINVERSE):
    """Act on a whole network, pair by pair from the input upwards; return the new weights.

    group_elements: g_m: [..., d_{m+1}, d_{m+1}] for each pair. The hidden input of a pair is that
    of the network as transformed so far. x: [d_0, n]. Raises ValueError where the inputs do not
    fit, or the action is not defined for the activation.
    """
    check_batch(weights, x)
    check_action(action, activation)
    if not 0 < len(group_elements) == len(weights) - 1:
        found = f"{len(weights)} layers and {len(group_elements)} group elements"
        raise ValueError(f"two layers or more need one group element for each pair, not {found}")
    weights, h = list(weights), x
    for m, g in enumerate(group_elements):
        V, U = weights[m : m + 2]
        weights[m + 1], weights[m] = action.act(U, V, h, g, activation)
        h = activation(weights[m] @ h)
    return weights


def loss_and_gradient(weights, x, y, activation):
    """Return the loss [...] and its gradient, a list like the weights; x: [d_0, n], y: [n].

    In closed form, so that an objective made of it needs one derivative less of autograd.
    """
    targets = one_hot(y, weights)
    loss, inputs, deltas = backpropagate(weights[1:], weights[0] @ x, targets, activation)
    return loss, [delta @ h.mT for delta, h in zip(deltas, [x, *inputs])]


def loss_and_gradient_norm_squared(weights, x, y, activation):
    """Return the loss [...] and |∇L|² [...], over all weights; x: [d_0, n], y: [n]."""
    loss, gradient = loss_and_gradient(weights, x, y, activation)
    return loss, inner_product(gradient, gradient)


def gradient_norm_squared(weights, x, y, activation):
    """Return |∇L|² [...] of each run, over all weights; x: [d_0, n], y: [n]."""
    check_batch(weights, x, y)
    norm = loss_and_gradient_norm_squared(weights, x, y, activation)[1]
    return warn_if_not_finite("|∇L|²", norm)


@torch.enable_grad()
def value_and_gradient(objective, weights):
    """Return objective(weights): [...], and its gradient, a list like them, both as constants.

    An objective that has an attribute `value_and_gradient` computes both itself.
    """
    if hasattr(objective, "value_and_gradient"):
        return objective.value_and_gradient(weights)
    leaves = [w.detach().requires_grad_() for w in weights]
    value = objective(leaves)
    return value.detach(), torch.autograd.grad(value.sum(), leaves, materialize_grads=True)


def ascent_direction(objective, weights, x, activation, action=PSEUDOINVERSE):
    """Return the objective [...] and its gradient in T_m at T = 0, projected onto the allowed T.

    The element of T_m acts on the m-th pair of layers, with the hidden activations of x: [d_0, n].
    The objective is evaluated where T = 0 leads: with few samples the pseudoinverse action refits U
    there, and the inverse-activation action projects V.
    """
    T = [torch.zeros(*w.shape[:-1], w.shape[-2]).to(w).requires_grad_() for w in weights[:-1]]
    with torch.enable_grad():
        moved = act(weights, x, [action.element(t) for t in T], activation, action)
    value, gradient = value_and_gradient(objective, [w.detach() for w in moved])
    return value, [action.project(t) for t in torch.autograd.grad(moved, T, gradient)]


@torch.no_grad()
def ascend(
    objective, weights, x, lr, steps, activation, stop=INF, max_norm=INF, action=PSEUDOINVERSE
):
    """Move weights along their orbit by gradient ascent on T_m, whose element acts on each pair.

    objective(weights) returns what is to grow, [...], a differentiable function such as one of
    `loss_and_gradient`. The group acts with the hidden activations of x: [d_0, n]. Each step starts
    from T = 0; a run whose objective is above `stop` stays where it is, and a step is cut where
    |T_m|_F is above `max_norm`. lr: a number or a tensor [...], negative to descend. Returns the
    new weights and the path: `objective` [steps + 1, ...], and `group_elements`, for each pair the
    product of the steps'.

    |∇L|² has no bound along rescalings: only the number of steps and `stop` end a teleport there.
    """
    path, total = [], [torch.eye(w.shape[-2]).to(w) for w in weights[:-1]]
    for _ in range(steps):
        value, slopes = ascent_direction(objective, weights, x, activation, action)
        path.append(value)
        going = (value <= torch.as_tensor(stop).to(value))[..., None, None]
        rate = torch.as_tensor(lr).to(value)[..., None, None]
        # where a slope is infinite 0 times it is not 0, and its entry of T stays 0
        T = [torch.where(going, rate * t, 0.0).nan_to_num(0.0, 0.0, 0.0) for t in slopes]
        lengths = [t.norm(dim=(-2, -1), keepdim=True) for t in T]
        T = [t * (max_norm / length).clamp(max=1) for t, length in zip(T, lengths)]
        elements = [action.element(t) for t in T]
        moved = act(weights, x, elements, activation, action)
        weights = [torch.where(going, m, w) for m, w in zip(moved, weights)]
        total = [g @ before for g, before in zip(elements, total)]
    path.append(objective(weights))
    warn_if_not_finite("a teleport's objective", path[-1])
    return weights, {"objective": torch.stack(path), "group_elements": total}


@torch.no_grad()
def ascend_to(target, objective, weights, x, length, steps, activation, action=PSEUDOINVERSE):
    """Move weights along their orbit until the objective has reached a target.

    target: a number or a tensor [...], such as 2 * objective(weights); runs that begin above it
    descend, and runs whose target is nan stay. A step has the length `length`, the norm of all T_m
    together, or less where the slope says that the target is nearer. A run ends after `steps`
    steps, where it has reached its target, or where a step would not bring it nearer; that step is
    not taken. objective and x: as `ascend` takes them. Returns the new weights and the objective on
    the way, [steps taken + 1, ...].
    """
    target = torch.as_tensor(target).to(x)
    value = objective(weights)
    sign = torch.where(value > target, -1.0, 1.0)
    path, going = [value], sign * (value - target) < 0
    for _ in range(steps):
        _, slopes = ascent_direction(objective, weights, x, activation, action)
        norm = inner_product(slopes, slopes).sqrt()
        # a little beyond, so that the target is reached rather than approached
        step = sign * (1.05 * (target - value).abs() / norm).clamp(max=length) / norm
        T = [(step[..., None, None] * t).nan_to_num(0.0, 0.0, 0.0) for t in slopes]
        moved = act(weights, x, [action.element(t) for t in T], activation, action)
        new = objective(moved)
        going = going & (sign * (new - value) > 0)
        weights = [torch.where(going[..., None, None], m, w) for m, w in zip(moved, weights)]
        value = torch.where(going, new, value)
        path.append(value)
        going = going & (sign * (value - target) < 0)
        if not going.any():
            break
    return weights, torch.stack(path)


@torch.no_grad()
def level_set_ascent(weights, x, y, length, steps, activation):
    """Move to a larger gradient within the batch's level set, by no symmetry.

    Each step moves by `length` along ∇|∇L|² = 2 H∇L, projected onto the tangent of the level set,
    and two Newton steps along ∇L bring the loss back (Mishkin, Bietti, Gower 2024). Since orbits
    that keep the batch's loss lie in its level set, this is what a teleport of that length is to
    be compared with. Shapes are those of `teleport`. Returns the new weights and the path:
    `objective`, |∇L|² [steps + 1, ...].
    """
    loss = partial(cross_entropy, x=x, y=y, activation=activation)

    def norm(weights):
        return loss_and_gradient_norm_squared(weights, x, y, activation)[1]

    def plus(weights, scale, direction):
        scale = scale.nan_to_num(0.0, 0.0, 0.0)  # where the gradient is 0 no step is taken
        return [w + scale[..., None, None] * d for w, d in zip(weights, direction)]

    start, path = loss(weights), []
    for _ in range(steps):
        value, direction = value_and_gradient(norm, weights)
        path.append(value)
        slope = value_and_gradient(loss, weights)[1]
        direction = plus(direction, -inner_product(direction, slope) / value, slope)
        weights = plus(weights, length / inner_product(direction, direction).sqrt(), direction)
        for _ in range(2):
            now, slope = value_and_gradient(loss, weights)
            weights = plus(weights, (start - now) / inner_product(slope, slope), slope)
    path.append(warn_if_not_finite("|∇L|²", norm(weights)))
    return weights, {"objective": torch.stack(path)}


@torch.no_grad()
def teleport(
    weights, x, y, lr, steps, activation, cap=100.0, return_path=False, action=PSEUDOINVERSE
):
    """Teleport to a larger gradient: `steps` steps of ascent on |∇L|² over the batch x, y.

    lr < 0 descends. A run stops early where |∇L|² > cap. x: [d_0, n], y: [n]; weights:
    [..., d_{m+1}, d_m], and every run of a stack moves alone. Returns the new weights and, with
    return_path, the path that `ascend` describes; its objective is |∇L|². Raises ValueError where
    the inputs do not fit.
    """
    check_batch(weights, x, y)
    first_layer = weights[0]
    if action.left:
        # x meets the first layer through its span alone, with X = QR: n inputs are left of d_0
        q, x = torch.linalg.qr(x)
        weights = [first_layer @ q, *weights[1:]]

    def objective(weights):
        return loss_and_gradient_norm_squared(weights, x, y, activation)[1]

    weights, path = ascend(objective, weights, x, lr, steps, activation, cap, action=action)
    if action.left:
        weights[0] = path["group_elements"][0] @ first_layer
    return (weights, path) if return_path else weights


def random_group_elements(group_elements, rng, action=PSEUDOINVERSE):
    """Draw elements of random T_m, which the action allows, of the norms |g_m − I|_F given.

    group_elements: g_m: [..., d, d] for each pair, and so is what is returned. Every member is
    drawn alone.
    """
    drawn = []
    for g in group_elements:
        T = action.project(torch.randn(g.shape, generator=rng).to(g))
        scale = (g - torch.eye(g.shape[-1]).to(g)).norm(dim=(-2, -1)) / T.norm(dim=(-2, -1))
        drawn.append(action.element(scale[..., None, None] * T))
    return drawn


def random_directions(widths, radii, rng, sphere=False):
    """Draw one direction for each radius, uniform in [0, 1)^p as the published code does.

    That is the positive orthant; `sphere` draws uniformly from the sphere instead. Returns a list
    like the weights, [len(radii), d_{m+1}, d_m], whose k-th members have together the Euclidean
    norm radii[k] (Eq. 4).
    """
    shapes = [(fan_out, fan_in) for fan_in, fan_out in pairwise(widths)]
    sizes = [fan_out * fan_in for fan_out, fan_in in shapes]
    draw = torch.randn if sphere else torch.rand
    d = draw(len(radii), sum(sizes), generator=rng)
    d *= (torch.as_tensor(radii, dtype=d.dtype) / d.norm(dim=1)).unsqueeze(1)
    return [part.unflatten(1, shape) for part, shape in zip(d.split(sizes, dim=1), shapes)]


def random_generators(widths, rng):
    """Draw M_m: [d, d] for each hidden width d, uniform in [0, 1) and scaled to |M_m|_F = 1."""
    generators = [torch.rand(d, d, generator=rng) for d in widths[1:-1]]
    return [M / M.norm() for M in generators]


def perturbed(weights, z, x, directions):
    """Yield the networks at w + d_k, as many at a time as fit the cache.

    They are given by the layers above the first and the pre-activations W_0 X. z: W_0 X at w, which
    many calls can share. Shapes are those of `sharpness`.
    """
    z, dz = z.unsqueeze(-3), directions[0] @ x
    chunk = max(1, CHUNK // z.numel())
    for first in range(0, dz.shape[-3], chunk):
        ks = slice(first, first + chunk)
        upper = [w.unsqueeze(-3) + d[..., ks, :, :] for w, d in zip(weights[1:], directions[1:])]
        yield upper, z + dz[..., ks, :, :]


def perturbed_losses(weights, x, y, directions, activation):
    """Return the losses [..., K] at w + d_k.

    x: [d_0, n], y: [n]; directions: a list like the weights with one more leading dimension, D[m]:
    [..., K, d_{m+1}, d_m], whose leading dimensions broadcast against the runs'. Directions
    without any are shared by all runs, and their products with x are then computed once. Raises
    ValueError where the inputs do not fit.
    """
    check_batch(weights, x, y)
    expected, found = ([list(t.shape) for t in tensors] for tensors in (weights, directions))
    if [shape[-2:] for shape in expected] != [shape[-2:] for shape in found if len(shape) > 2]:
        needed = f"[..., K, out, in] for the weights {expected}"
        raise ValueError(f"directions must be {needed}, not {found}")
    networks = perturbed(weights, weights[0] @ x, x, directions)
    losses = [cross_entropy_of_logits(propagate(*network, activation), y) for network in networks]
    return torch.cat(losses, -1)


def sharpness(weights, x, y, directions, activation):
    """Return φ (Eq. 4): the mean over k of the `perturbed_losses`, [...] for each run."""
    losses = perturbed_losses(weights, x, y, directions, activation)
    return warn_if_not_finite("φ", losses.mean(-1))


def exponential(tM):
    """Return exp(tM) to third order, which is all that three derivatives at t = 0 see."""
    return torch.eye(tM.shape[-1]).to(tM) + tM + tM @ tM / 2 + tM @ tM @ tM / 6


def two_derivatives(curve, t):
    """Return the first and the second derivative of a function of a number t, in forward mode."""
    one = torch.ones_like(t)
    return torch.func.jvp(lambda t: torch.func.jvp(curve, (t,), (one,))[1], (t,), (one,))


def curve_derivatives(weights, x, generators, activation, exact=False):
    """Return γ'(0) and γ''(0) of the curve g_m = exp(t M_m), each a list like the weights.

    The network is acted on at every pair by the inverse-activation action. This is the paper's
    closed form (Eqs. 57, 60), with the hidden activations untransformed. Its γ'' leaves out the
    mixed derivative of a weight that is V of one pair and U of the pair below; `exact` gives the
    derivatives of the curve itself. x: [d_0, n]; generators: M[m]: [..., d_{m+1}, d_{m+1}], one for
    each pair. The pseudoinverse of x is computed once for all runs. Raises ValueError where the
    inputs do not fit.
    """
    check_batch(weights, x)
    check_action(INVERSE_ACTIVATION, activation)
    generators, pairs = list(generators), len(weights) - 1
    if len(generators) != pairs:
        found = len(generators)
        raise ValueError(f"there must be {pairs} generators, one for each pair, not {found}")
    for m, M in enumerate(generators):
        check_square(weights, m, M)
    if exact:

        def curve(t):
            elements = [exponential(t * M) for M in generators]
            return act(weights, x, elements, activation, INVERSE_ACTIVATION)

        return two_derivatives(curve, torch.zeros(()).to(x))
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    h = x
    for m, M in enumerate(generators):
        V, U = weights[m : m + 2]
        z = V @ h
        h_next, slope = activation(z), activation.derivative(z)
        h_pinv = torch.linalg.pinv(h)  # dead units make h rank-deficient: no reason for a warning
        M2 = M @ M
        first[m] = first[m] + (M @ h_next / slope) @ h_pinv
        second[m] = second[m] + (M2 @ h_next / slope) @ h_pinv
        first[m + 1] = first[m + 1] - U @ M
        second[m + 1] = second[m + 1] + U @ M2
        h = h_next
    return first, second


def with_mixed_derivatives(weights, first, second, generators):
    """Return the closed form's γ''(0) with the mixed derivatives that it leaves out.

    Shapes are those of `curve_derivatives`. A weight W that is V of one pair and U of the pair
    below follows A(t) exp(−tM), M that pair's: γ'' has −2 A' M too, and A' = γ' + W M. That makes
    it the curve's own γ'' for two pairs where x has full column and h_1 full row rank.
    """
    shared = zip(weights[1:], first[1:], second[1:], generators[:-1])
    mixed = [bend - 2 * (slope + w @ M) @ M for w, slope, bend, M in shared]
    return [second[0], *mixed, second[-1]]


def check_square(weights, m, M):
    """Raise ValueError where a generator M is not [..., d, d] for the d units of the pair m."""
    if not 0 <= m < len(weights) - 1:
        raise ValueError(f"there is no pair {m} of layers: there are {len(weights) - 1}")
    d, found = weights[m].shape[-2], list(M.shape)
    if found[-2:] != [d, d]:
        raise ValueError(f"the generator of pair {m} must be [..., {d}, {d}], not {found}")


def inner_product(a, b):
    """Return the inner product [...] of two lists of weights, all weights flattened."""
    return sum((p * q).sum((-2, -1)) for p, q in zip(a, b))


def curvature(first, second):
    """Return κ = sqrt(|γ'|²|γ''|² − (γ'·γ'')²) / |γ'|³, [...] for each run.

    first, second: γ' and γ'' as lists like the weights. κ does not depend on the curve's speed.
    ψ (Eq. 5) is its mean over random generators.
    """
    speed2, cross = inner_product(first, first), inner_product(first, second)
    area2 = speed2 * inner_product(second, second) - cross**2
    return area2.clamp(min=0).sqrt() / speed2**1.5


def hidden_input(weights, x, layer, activation):
    """Return the hidden activations [..., d, n] that the weights W_layer act on."""
    for w in weights[:layer]:
        x = activation(w @ x)
    return x


def curvature_along(weights, x, generator, layer, activation, action=PSEUDOINVERSE):
    """Return κ [...] and dκ/dt [...] at t = 0 along the curve g = exp(tM) at one pair of layers.

    The action of g moves V = W_layer and U = W_{layer+1} alone. generator: M [..., d, d], of which
    what the action allows is used; x: [d_0, n]. κ is nan where the curve stands still, dκ/dt where
    it is straight, too. Raises ValueError where inputs do not fit, and for the pseudoinverse action
    where n < d: it needs hidden activations σ(Vh) of full row rank.
    """
    check_batch(weights, x)
    check_square(weights, layer, generator)
    check_action(action, activation)
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


@torch.enable_grad()
def sharpness_and_gradient(weights, x, y, directions, activation):
    """Return φ [...], as `sharpness` does, and its gradient in the weights.

    directions: an iterable of lists as `sharpness` takes them, shared by all runs, so that many
    directions need not be in memory at once.
    """
    # W_0 X is a leaf: it is computed, and its gradient taken to W_0, once for all directions
    leaves = [w.detach().requires_grad_() for w in (weights[0] @ x, *weights[1:])]
    phi, gradient, count = 0, [0 for _ in leaves], 0
    for block in directions:
        for upper, z in perturbed(leaves, leaves[0], x, block):
            loss = cross_entropy_of_logits(propagate(upper, z, activation), y)
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
    """Teleport to another sharpness: ascent, or descent where lr < 0, on the mean perturbed loss.

    Each step draws new directions from `seed`, `per_radius` of each length. All runs
    share them and the batch x: [d_0, n], y: [n], so that their products are computed once. lr and
    stop: numbers or tensors that broadcast over the runs; a run stops where φ > stop, and a step is
    cut where |T_m|_F > max_norm. Returns the new weights and, with return_path, the path that
    `ascend` describes; its objective is φ.
    """
    check_batch(weights, x, y)
    widths = widths_of(weights)
    rng = torch.Generator().manual_seed(seed)

    def draw():
        for radius in radii:  # a radius at a time: all directions would not fit the memory
            yield [d.to(x) for d in random_directions(widths, [radius] * per_radius, rng)]

    def objective(weights):
        return sum(sharpness(weights, x, y, block, activation) for block in draw()) / len(radii)

    objective.value_and_gradient = lambda w: sharpness_and_gradient(w, x, y, draw(), activation)
    weights, path = ascend(objective, weights, x, lr, steps, activation, stop, max_norm, action)
    return (weights, path) if return_path else weights


@torch.no_grad()
def teleport_curvature(
    weights, x, lr, generators, activation, layer=1, max_norm=INF, action=PSEUDOINVERSE
):
    """Teleport to another curvature: a step t = lr dκ/dt along exp(tM) for each M of `generators`.

    The action is on the pair `layer` alone. generators: M: [d, d], one for each step, shared by
    all runs; lr: a number or a tensor that broadcasts over the runs, negative to decrease κ. A step
    is cut where |tM|_F is above `max_norm`: exp(tM) soon exceeds a pseudoinverse's precision.
    Returns the new weights and the product of the steps' group elements: [..., d, d].
    """
    check_batch(weights, x)
    generators = [action.project(M) for M in generators]
    for M in generators:
        check_square(weights, layer, M)
    weights, total = list(weights), torch.eye(weights[layer].shape[-2]).to(x)
    h = hidden_input(weights, x, layer, activation)
    for M in generators:
        _, slope = curvature_along(weights, x, M, layer, activation, action)
        most = max_norm / M.norm()
        # a run whose activations lost their rank has no derivative: it stays
        t = (torch.as_tensor(lr).to(x) * slope).nan_to_num(0.0, 0.0, 0.0).clamp(-most, most)
        g = torch.linalg.matrix_exp(t[..., None, None] * M)
        V, U = weights[layer : layer + 2]
        weights[layer + 1], weights[layer] = action.act(U, V, h, g, activation)
        total = g @ total
    return weights, total


@torch.no_grad()
def estimate(weights, x, y, radii, k, activation, sphere=False):
    """Return φ, ψ, the loss, and ψ by the exact γ'' [...] of each network on the k-th batch.

    φ and ψ are as Table 1 estimates them. All networks share the batch's draws: a direction for
    each radius, and M for each pair of layers. x: [d_0, n], y: [n].
    """
    check_batch(weights, x, y)
    widths, rng = widths_of(weights), torch.Generator()
    generators = [M.to(x) for M in random_generators(widths, rng.manual_seed(12345 * k))]
    rng.manual_seed(12345 * k + 1)
    directions = [d.to(x) for d in random_directions(widths, radii, rng, sphere)]
    # The batch meets the first layer through its span alone: with X = QR, W_0 X = (W_0 Q) R, and
    # since Q's columns are orthonormal, so are γ's lengths kept. That leaves n inputs of d_0.
    q, x = torch.linalg.qr(x)
    directions[0] = directions[0] @ q
    weights = [weights[0] @ q, *weights[1:]]
    first, second = curve_derivatives(weights, x, generators, activation)
    exact = with_mixed_derivatives(weights, first, second, generators)
    phi = sharpness(weights, x, y, directions, activation)
    loss = cross_entropy(weights, x, y, activation)
    return phi, curvature(first, second), loss, curvature(first, exact)
