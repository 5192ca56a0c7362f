"""Two-layer regression ½ |Y − W_1 σ(W_0 X)|², and LSTMs that learn to minimise it.

Leading dimensions of a Problem, and of its weights w: [..., 2, N, N], are trajectories.
"""

import math
from typing import NamedTuple

import torch
from torch import nn

from lstm import LSTM
from models import LeakyReLU
from teleportation import pseudoinverse

N = 20  # X, Y, W_0 and W_1 are N×N
SIZES = {"lr": 1, "update": 2 * N * N, "T": N * N}  # of the outputs that an LSTM can have
UNROLL = 10  # steps from one step of Adam to the next
FIRST_LR, LR_RANGE = 1e-4, (1e-7, 5e-3)  # an LSTM's step size at the first step, and after it
UPDATE_RANGE = 1e7  # the most that a step adds to a weight
T_NORM = 0.01  # |T|_F
RANGES = [FIRST_LR, *LR_RANGE, UPDATE_RANGE, T_NORM]
P = 10  # e^−P is the smallest gradient whose logarithm is taken
ACTIVATION = LeakyReLU()  # one with an inverse


class Network(NamedTuple):
    """An LSTM: its outputs, names in SIZES, its hidden size, and Adam's learning rate for it."""

    outputs: tuple
    hidden: int
    lr: float


class Problem(NamedTuple):
    """Regressions: X, X^+ and Y, [..., N, N], and the first weights, [..., 2, N, N]."""

    x: torch.Tensor
    x_pinv: torch.Tensor
    y: torch.Tensor
    w: torch.Tensor


def draw_problem(seeds):
    """Return the published Problem of one seed, or a stack of them, drawn uniform in [0, 1)."""
    if not isinstance(seeds, int):
        return Problem(*map(torch.stack, zip(*map(draw_problem, seeds))))
    *_, x, y = draw = torch.rand(4, N, N, generator=torch.Generator().manual_seed(seeds))
    return Problem(x, pseudoinverse(x), y, draw[:2])


@torch.enable_grad()
def loss_and_gradient(w, problem):
    """Return the loss [...] and its gradient [..., 2, N, N], both constants for autograd."""
    w = w.detach().requires_grad_()
    W_0, W_1 = w.unbind(-3)
    residual = W_1 @ ACTIVATION(W_0 @ problem.x) - problem.y
    constant = residual.detach()  # and the loss's gradient in the residual
    return constant.square().sum((-2, -1)) / 2, torch.autograd.grad(residual, w, constant)[0]


def sign_and_log(gradient):
    """Return gradients: [..., n] scaled as in Andrychowicz et al. (2016, appendix A): [..., 2 n].

    That is log|g| / P and sign g, or −1 and e^P g where |g| < e^−P.
    """
    log = gradient.abs().clamp(min=math.exp(-P)).log() / P
    return torch.cat([log, (gradient * math.exp(P)).clamp(-1, 1)], -1)


def new_training(networks, scaled, seed):
    """Return an LSTM for each Network, and their Adam; scaled: whether gradients are."""
    torch.manual_seed(seed)
    inputs = SIZES["update"] * (2 if scaled else 1)
    scale = [sign_and_log] * scaled
    lstms = [LSTM(inputs, n.hidden, {k: SIZES[k] for k in n.outputs}, *scale) for n in networks]
    groups = [{"params": a.transposed.values(), "lr": n.lr} for a, n in zip(lstms, networks)]
    return nn.ModuleList(lstms), torch.optim.Adam(groups, fused=True)


class LearnedOptimizer:
    """LSTMs as an optimizer for `rollout`, with their states along a Problem's trajectories."""

    def __init__(self, lstms, problem):
        self.lstms, self.problem = lstms, problem
        self.states = [lstm.zero_state(problem.w[..., 0, 0, 0].numel()) for lstm in lstms]
        self.outputs = {}  # the latest: {name in SIZES: [runs, size]}

    def feed(self, gradient, updating):
        """Feed the gradient to the LSTM whose output is an update, or to the others."""
        x = gradient.reshape(-1, SIZES["update"])
        for k, lstm in enumerate(self.lstms):
            if ("update" in lstm.names) == updating:
                outputs, self.states[k] = lstm(x, self.states[k])
                self.outputs |= outputs

    def step(self, t, w, gradient):
        """Return the weights after step t, by an update or by gradient descent.

        The step size of gradient descent is the LSTM's output of the step before.
        """
        self.feed(gradient, updating=True)
        if "update" in self.outputs:
            return w + self.outputs["update"].clamp(-UPDATE_RANGE, UPDATE_RANGE).view_as(w)
        lr = self.outputs["lr"].clamp(*LR_RANGE).view(*w.shape[:-3], 1, 1, 1) if t else FIRST_LR
        return w - lr * gradient

    def teleport(self, w, gradient):
        """Return the weights after the action of g = I + T, if T is among the LSTMs' outputs.

        This is teleportation.inverse_group_action, but that U' = U (I − T), as published.
        """
        self.feed(gradient, updating=False)
        if "T" not in self.outputs:
            return w
        T, (x, x_pinv, *_) = self.outputs["T"], self.problem
        identity = torch.eye(N).to(x)
        g = identity + (T * (T_NORM / T.norm(dim=-1, keepdim=True))).view_as(x)
        V, U = w.unbind(-3)
        V = ACTIVATION.inverse(g @ ACTIVATION(V @ x)) @ x_pinv
        return torch.stack([V, U @ (2 * identity - g)], -3)

    def begin_window(self):
        """Make the states constants, so that what comes teaches the LSTMs nothing about before."""
        self.states = [[(h.detach(), c.detach()) for h, c in state] for state in self.states]
        for lstm in self.lstms:
            lstm.begin_window()

    def __call__(self, t, w, gradient):
        return self.teleport(self.step(t, w, gradient), gradient)


def train_trajectory(lstms, adam, problem, steps):
    """Train LSTMs on a trajectory of one Problem; return the last loss that they learn from.

    The meta-loss is the sum of the losses since Adam's last step; as published, the gradients that
    the LSTMs read are constants. Of the `steps`, those after Adam's last one are left out.
    """
    optimizer, w, visited = LearnedOptimizer(lstms.train(), problem), problem.w, []
    optimizer.begin_window()
    for t in range((steps - 1) // UNROLL * UNROLL + 1):
        loss, gradient = loss_and_gradient(w, problem)
        visited += [(w, gradient)] * w.requires_grad
        learning = t > 0 and t % UNROLL == 0
        if learning:
            torch.autograd.backward(*zip(*visited))
            for lstm in lstms:
                lstm.backward()
        w = optimizer.step(t, w, gradient)  # by the LSTMs as they were
        if learning:
            adam.step()
            optimizer.begin_window()
            w, visited = w.detach(), []
        w = optimizer.teleport(w, gradient)
    return loss


def rollout(optimizer, problem, steps):
    """Return loss and |∇L|², [steps + 1, ...]; optimizer(t, w, gradient) makes the step t."""
    w, curves = problem.w, []
    for t in range(steps + 1):
        loss, gradient = loss_and_gradient(w, problem)
        curves.append((loss, gradient.square().sum((-3, -2, -1))))
        w = optimizer(t, w, gradient)
    return [torch.stack(curve) for curve in zip(*curves)]
