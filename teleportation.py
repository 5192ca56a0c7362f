"""The core: sharpness and curvature of minima, for stacks of networks.

Shapes are those of models.py: W[m]: [..., d_{m+1}, d_m], activations [..., d, n], a column a
sample; leading dimensions are runs. Equation numbers are the paper's.
"""

import torch

from models import cross_entropy_of_logits, propagate

CHUNK = 400_000  # first-layer activations of perturbed networks in flight at once: fits the cache


def random_directions(widths, radii, generator, sphere=False):
    """Draw one direction for each radius, uniform in [0, 1)^p as the published code does.

    That is the positive orthant; `sphere` draws uniformly from the sphere instead. Returns a list
    like the weights, [len(radii), d_{m+1}, d_m], whose k-th members have together the Euclidean
    norm radii[k] (Eq. 4).
    """
    shapes = [(fan_out, fan_in) for fan_in, fan_out in zip(widths, widths[1:])]
    sizes = [fan_out * fan_in for fan_out, fan_in in shapes]
    draw = torch.randn if sphere else torch.rand
    d = draw(len(radii), sum(sizes), generator=generator)
    d *= (torch.as_tensor(radii, dtype=d.dtype) / d.norm(dim=1)).unsqueeze(1)
    return [part.unflatten(1, shape) for part, shape in zip(d.split(sizes, dim=1), shapes)]


def random_generators(widths, generator):
    """Draw M_m: [d, d] for each hidden width d, uniform in [0, 1) and scaled to |M_m|_F = 1."""
    generators = [torch.rand(d, d, generator=generator) for d in widths[1:-1]]
    return [M / M.norm() for M in generators]


def sharpness(weights, x, y, directions, activation):
    """Return φ (Eq. 4): the mean over k of the loss at w + d_k, [...] for each run.

    x: [d_0, n], y: [n]; directions: a list like the weights with one more leading dimension, D[m]:
    [..., K, d_{m+1}, d_m], whose leading dimensions broadcast against the runs'. Directions
    without any are shared by all runs, and their products with x are then computed once.
    """
    z, dz = (weights[0] @ x).unsqueeze(-3), directions[0] @ x
    K = dz.shape[-3]
    chunk = max(1, CHUNK // z.numel())
    total = 0
    for first in range(0, K, chunk):
        ks = slice(first, first + chunk)
        perturbed = [
            w.unsqueeze(-3) + d[..., ks, :, :] for w, d in zip(weights[1:], directions[1:])
        ]
        logits = propagate(perturbed, z + dz[..., ks, :, :], activation)
        total = total + cross_entropy_of_logits(logits, y).sum(-1)
    return total / K


def curve_derivatives(weights, x, generators, activation):
    """Return γ'(0) and γ''(0) of the curve g_m = exp(t M_m), each a list like the weights.

    The network is acted on at every pair by the inverse-activation action; this is the paper's
    closed form (Eqs. 57, 60), with the hidden activations untransformed. x: [d_0, n];
    generators: M[m]: [..., d_{m+1}, d_{m+1}], one for each pair of layers. The pseudoinverse of x
    is computed once for all runs.
    """
    first = [torch.zeros_like(w) for w in weights]
    second = [torch.zeros_like(w) for w in weights]
    h = x
    for m, M in enumerate(generators):
        V, U = weights[m], weights[m + 1]
        z = V @ h
        h_next, slope = activation(z), activation.derivative(z)
        h_pinv = torch.linalg.pinv(h)
        M2 = M @ M
        first[m] += (M @ h_next / slope) @ h_pinv
        second[m] += (M2 @ h_next / slope) @ h_pinv
        first[m + 1] -= U @ M
        second[m + 1] += U @ M2
        h = h_next
    return first, second


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
