"""Two-layer regression: its gradient, the steps that LSTMs take, and how they learn from them.

The loss is ½ |Y − W_1 σ(W_0 X)|². Everything but Adam is in NumPy and in closed form: the matrices
are small, and what counts is how fast an operation starts.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from lstm import backward, init_lstm, lstm_step, zero_state
from models import LeakyReLU
from teleportation import inverse_group_action_first_order, pseudoinverse

N = 20  # X, Y, W_0 and W_1 are N×N
SIZES = {"lr": 1, "update": 2 * N * N, "T": N * N}  # of what an LSTM can give
UNROLL = 10  # steps whose losses' sum is the meta-loss, before each step of Adam
FIRST_LR, LR_RANGE = 1e-4, (1e-7, 5e-3)  # an LSTM's step size on the first step, and after it
UPDATE_RANGE = 1e7  # the most that a step adds to a weight
T_NORM = 0.01  # |T|_F


class ArrayLeakyReLU:
    """models.LeakyReLU for NumPy's arrays."""

    slope = LeakyReLU().negative_slope

    def __call__(self, x):
        return np.maximum(x, self.slope * x)

    def inverse(self, x):
        return np.minimum(x, x / self.slope)

    def derivative(self, x):
        return np.maximum((x > 0).astype(x.dtype), self.slope)


ACTIVATION = ArrayLeakyReLU()
HELPER = ThreadPoolExecutor(1)  # a thread for the second of two LSTMs


def side_by_side(function, arguments):
    """Return function(*a) for each a of one or two arguments; a second core takes the second.

    Matrix products let go of Python's lock. What is computed doesn't depend on when.
    """
    first, *others = arguments
    futures = [HELPER.submit(function, *other) for other in others]
    return [function(*first), *(future.result() for future in futures)]


class Network(NamedTuple):
    """An LSTM: what it gives, names in SIZES, its hidden size, and Adam's learning rate for it."""

    gives: tuple
    hidden: int
    lr: float


class Problem(NamedTuple):
    """Regressions, whose leading dimensions are trajectories."""

    x: np.ndarray  # [..., N, N]
    x_pinv: np.ndarray
    y: np.ndarray
    w: np.ndarray  # [..., 2, N, N], where W_0 and W_1 start


def draw_problem(seeds):
    """Return the Problem of one seed, or a stack of them, drawn uniform in [0, 1)."""
    if isinstance(seeds, int):
        x, y, *w = torch.rand(4, N, N, generator=torch.Generator().manual_seed(seeds))
        return Problem(*(part.numpy() for part in (x, pseudoinverse(x), y, torch.stack(w))))
    return Problem(*(np.stack(part) for part in zip(*(draw_problem(seed) for seed in seeds))))


def residual_and_gradient(w, problem):
    """Return the residual W_1 σ(W_0 X) − Y: [..., N, N] and the loss's gradient [..., 2, N, N]."""
    W_0, W_1 = w[..., 0, :, :], w[..., 1, :, :]
    z = W_0 @ problem.x
    h = ACTIVATION(z)
    residual = W_1 @ h - problem.y
    gradient = np.empty_like(w)
    grad_z = ACTIVATION.derivative(z) * (W_1.mT @ residual)
    np.matmul(grad_z, problem.x.mT, out=gradient[..., 0, :, :])
    np.matmul(residual, h.mT, out=gradient[..., 1, :, :])
    return residual, gradient


def flat(a, dimensions):
    """Return an array with its last dimensions as one."""
    return a.reshape(*a.shape[:-dimensions], -1)


def loss(residual):
    """Return the loss [...] of residuals [..., N, N]."""
    return 0.5 * (residual * residual).sum((-2, -1))


def lr_range(t):
    """Return the bounds of the step size that an LSTM gives at step t of a trajectory."""
    return LR_RANGE if t else (FIRST_LR, FIRST_LR)


def step(w, gradient, given, problem, t):
    """Return the weights after step t, before T moves them on, and T: [..., N, N] or None.

    given: what LSTMs gave, {name of SIZES: [..., size]}.
    """
    if "update" in given:
        update = given["update"].clip(-UPDATE_RANGE, UPDATE_RANGE)
        w = w + update.reshape(w.shape)
    else:
        w = w - given["lr"].clip(*lr_range(t))[..., None, None] * gradient
    if "T" not in given:
        return w, None
    T = given["T"]
    T = T * (T_NORM / np.linalg.norm(T, axis=-1, keepdims=True))
    return w, T.reshape(problem.x.shape)


def teleport(w, T, problem):
    """Return the weights after the first-order action of I + T: [..., N, N]."""
    U, V = inverse_group_action_first_order(
        w[..., 1, :, :], w[..., 0, :, :], problem.x, problem.x_pinv, T, ACTIVATION
    )
    return np.stack([V, U], -3)


def name_outputs(networks, outputs):
    """Return what LSTMs gave as {name of SIZES: [..., size]}; outputs: an array for each LSTM."""
    given = {}
    for network, y in zip(networks, outputs):
        first = 0
        for name in network.gives:
            given[name] = y[..., first : first + SIZES[name]]
            first += SIZES[name]
    return given


def teleport_backward(gradients, w, T, problem):
    """Return the meta-loss's gradients in w: [steps, 2, N, N] and T: [steps, N, N] of a window.

    w: the weights before each step's teleport; gradients: the loss's at the weights after it. What
    a teleport does to later losses goes through the weights alone.
    """
    U, V = w[:, 1], w[:, 0]
    z = V @ problem.x
    h = ACTIVATION(z)
    slope, inverse_slope = ACTIVATION.derivative(z), 1 / ACTIVATION.derivative(h + T @ h)
    identity = np.eye(N, dtype=w.dtype)
    forth, back = (identity + T).mT, (identity - T).mT
    grad_w, grad_a, grad_U_new = np.empty_like(w), np.empty_like(h), np.empty_like(h)
    after = np.zeros_like(w[0])
    for k in reversed(range(len(T))):
        after = after + gradients[k]
        grad_a[k] = inverse_slope[k] * (after[0] @ problem.x_pinv.T)
        grad_U_new[k] = after[1]
        grad_w[k, 0] = (slope[k] * (forth[k] @ grad_a[k])) @ problem.x.T
        grad_w[k, 1] = after[1] @ back[k]
        after = grad_w[k]
    return grad_w, grad_a @ h.mT - U.mT @ grad_U_new


def window(networks, lstms, states, problem, w, gradient, first, steps):
    """Take steps of a trajectory; return where it went, and the factors of the LSTMs' gradients.

    states: of the LSTMs, replaced in place; w, gradient: where the window begins; first: the index
    of its first step. Returns the weights, the residual and the gradient there, and for each LSTM
    the factors that `backward` returns of the meta-loss's gradient: the sum of the losses after
    each step. The gradients that the LSTMs get count as constant.
    """
    outputs, records = [[] for _ in lstms], [[] for _ in lstms]
    gradients, before, Ts = [gradient], [], []
    for t in range(first, first + steps):
        x = gradient.ravel()
        steps_taken = side_by_side(lstm_step, [(W, x, state) for W, state in zip(lstms, states)])
        for k, (y, state, record) in enumerate(steps_taken):
            outputs[k].append(y)
            records[k].append(record)
            states[k] = state
        given = name_outputs(networks, [y[-1] for y in outputs])
        w, T = step(w, gradient, given, problem, t)
        before.append(w)
        if T is not None:
            Ts.append(T)
            w = teleport(w, T, problem)
        residual, gradient = residual_and_gradient(w, problem)
        gradients.append(gradient)
    gradients = np.stack(gradients)
    given = name_outputs(networks, [np.stack(y) for y in outputs])
    grad_outputs = {}
    if Ts:
        T = np.stack(Ts)
        grad_w, grad_T = teleport_backward(gradients[1:], np.stack(before), T, problem)
        unit, grad_T = flat(T, 2) / T_NORM, flat(grad_T, 2)
        grad_T = grad_T - unit * (unit * grad_T).sum(-1, keepdims=True)
        grad_outputs["T"] = grad_T * (T_NORM / np.linalg.norm(given["T"], axis=-1, keepdims=True))
    else:
        grad_w = gradients[:0:-1].cumsum(0)[::-1]
    if "update" in given:
        grad_outputs["update"] = flat(grad_w, 3) * (np.abs(given["update"]) <= UPDATE_RANGE)
    else:
        low, high = np.array([lr_range(t) for t in range(first, first + steps)], w.dtype).T
        inside = (given["lr"][:, 0] >= low) & (given["lr"][:, 0] <= high)
        grad_outputs["lr"] = (
            -flat(grad_w * gradients[:-1], 3).sum(-1, keepdims=True) * inside[:, None]
        )
    grad_outputs = [
        np.concatenate([grad_outputs[name] for name in network.gives], -1) for network in networks
    ]
    factors = side_by_side(backward, list(zip(lstms, records, grad_outputs)))
    return w, residual, gradient, factors


def learn(optimizers, factors):
    """Take a step of Adam for an LSTM; factors: of its matrices' gradients, from `backward`."""
    for optimizer, (v, delta) in zip(optimizers, factors):
        (W,) = optimizer.param_groups[0]["params"]
        W.grad = torch.from_numpy(v.T @ delta)
        optimizer.step()  # a matrix at a time, so that its gradient doesn't leave the cache
        W.grad = None


@np.errstate(all="ignore")  # a loss that is not finite raises
def train_trajectory(networks, lstms, optimizers, problem, steps):
    """Train LSTMs on a trajectory, a step of Adam after each window.

    Raises FloatingPointError where the loss is not finite.
    """
    w = problem.w
    residual, gradient = residual_and_gradient(w, problem)
    states = [zero_state(lstm, gradient.ravel()) for lstm in lstms]
    for first in range(0, steps, UNROLL):
        w, residual, gradient, factors = window(
            networks, lstms, states, problem, w, gradient, first, UNROLL
        )
        if not np.isfinite(loss(residual)):
            raise FloatingPointError(f"the loss is not finite at step {first + UNROLL}")
        own = [optimizers[3 * k : 3 * k + 3] for k in range(len(lstms))]  # an Adam for each matrix
        side_by_side(learn, list(zip(own, factors)))


def new_training(networks, seed):
    """Return LSTMs as they are drawn, and an Adam for each of their matrices."""
    rng = np.random.default_rng(seed)
    lstms, optimizers = [], []
    for network in networks:
        outputs = sum(SIZES[name] for name in network.gives)
        lstms.append(init_lstm(2 * N * N, network.hidden, outputs, rng))
        for W in lstms[-1]:
            parameter = torch.from_numpy(W)  # the same memory
            optimizers.append(torch.optim.Adam([parameter], lr=network.lr, fused=True))
    return lstms, optimizers


def matrices(lstms, optimizers=()):
    """Return the LSTMs' matrices and Adam's state as {name: array}."""
    arrays = {f"W {k}": W for k, W in enumerate(W for lstm in lstms for W in lstm)}
    for k, optimizer in enumerate(optimizers):
        (state,) = optimizer.state.values()
        arrays |= {f"{key} {k}": value for key, value in state.items()}
    return arrays


def lstms_of(networks, arrays):
    """Return the LSTMs whose `matrices` are in arrays."""
    W = [arrays[f"W {k}"] for k in range(3 * len(networks))]
    return [W[k : k + 3] for k in range(0, len(W), 3)]


def restore(lstms, optimizers, arrays):
    """Give LSTMs, and Adam if its state is there, what `matrices` returned."""
    for k, W in enumerate(W for lstm in lstms for W in lstm):
        W[:] = arrays[f"W {k}"]
    for k, optimizer in enumerate(optimizers):
        (parameter,) = optimizer.param_groups[0]["params"]
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if f"{key} {k}" in arrays:
                optimizer.state[parameter][key] = torch.tensor(arrays[f"{key} {k}"])


def gradient_descent(lr):
    """Return GD for `rollout`; lr: a number, or an array that broadcasts over w."""
    return lambda t, w, gradient: w - lr * gradient


def learned(networks, lstms, problem):
    """Return what LSTMs do to the problem's weights for `rollout`."""
    states = [zero_state(lstm, flat(problem.w, 3)) for lstm in lstms]

    def optimizer(t, w, gradient):
        outputs = []
        for k, lstm in enumerate(lstms):
            y, states[k], _ = lstm_step(lstm, flat(gradient, 3), states[k])
            outputs.append(y)
        w, T = step(w, gradient, name_outputs(networks, outputs), problem, t)
        return w if T is None else teleport(w, T, problem)

    return optimizer


@np.errstate(all="ignore")  # what diverges is counted
def rollout(optimizer, problem, steps):
    """Return loss and |∇L|², [steps + 1, ...], of a stack of trajectories.

    optimizer(t, w, gradient) returns the weights after step t.
    """
    w, curves = problem.w, []
    for t in range(steps + 1):
        residual, gradient = residual_and_gradient(w, problem)
        curves.append((loss(residual), (gradient * gradient).sum((-3, -2, -1))))
        if t < steps:
            w = optimizer(t, w, gradient)
    return [np.stack(curve) for curve in zip(*curves)]
