"""models.py: stacks against single networks, closed forms against autograd, golden numbers."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import models
from models import (
    MLP,
    Identity,
    LeakyReLU,
    cross_entropy,
    evaluate,
    init_weights,
    train_epoch,
    train_epoch_sgd,
)

WIDTHS = (12, 6, 5, 10)
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdaGrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
}


def made_up_data(n=330, d=WIDTHS[0]):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, d, generator=generator, dtype=torch.float64)
    return x, torch.randint(10, (n,), generator=generator)


def double_weights(seeds):
    return [w.double() for w in init_weights(WIDTHS, seeds)]


def plain_training(weights, x, y, make_optimizer, epochs=2, batch_size=20):
    """Train one network by autograd; returns the weights and each epoch's mean loss."""
    weights = [w.clone().requires_grad_() for w in weights]
    optimizer = make_optimizer(weights)
    means = []
    for _ in range(epochs):
        losses = []
        for xb, yb in zip(x.split(batch_size), y.split(batch_size)):
            h = xb.T
            for w in weights[:-1]:
                h = F.leaky_relu(w @ h, 0.1)
            loss = F.cross_entropy((weights[-1] @ h).T, yb)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        means.append(torch.stack(losses).mean())
    return [w.detach() for w in weights], torch.stack(means)


@pytest.mark.parametrize("activation", [LeakyReLU(), Identity()], ids=repr)
def test_an_activation_has_its_derivative_and_inverse(activation):
    x = torch.linspace(-2, 2, 41, dtype=torch.float64, requires_grad=True)
    y = activation(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(activation.derivative(x), slope)
    torch.testing.assert_close(activation.inverse(y), x)


def test_initial_weights_are_the_published_ones(golden):
    assert [w.sum().item() for w in golden["weights"]] == pytest.approx(golden["weight_sums"])


def test_initial_weights_of_a_run_do_not_depend_on_the_others():
    stacked = init_weights(WIDTHS, [54321, 3])
    for w, first, second in zip(stacked, init_weights(WIDTHS, 54321), init_weights(WIDTHS, 3)):
        assert torch.equal(w, torch.stack([first, second]))


def test_loss_is_the_published_one(golden, activation):
    loss = cross_entropy(golden["weights"], golden["x"], golden["y"], activation)
    assert loss.item() == pytest.approx(golden["loss"], abs=1e-12)


def test_any_leading_dimensions_give_each_member_its_own_logits(activation):
    x, y = made_up_data()
    stack = [w.unflatten(0, (2, 3)) for w in double_weights(range(6))]
    logits = MLP(stack, activation)(x.T)
    assert logits.shape == (2, 3, 10, 330)
    loss, accuracy = evaluate(stack, x, y, activation, chunk=100)
    for i in range(2):
        for j in range(3):
            alone = models.forward([w[i, j] for w in stack], x.T, activation)
            torch.testing.assert_close(logits[i, j], alone)
            torch.testing.assert_close(loss[i, j], F.cross_entropy(alone.T, y))
            torch.testing.assert_close(accuracy[i, j], (alone.argmax(0) == y).float().mean())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_stack_trains_as_its_members_do_alone_by_autograd(name, activation):
    x, y = made_up_data()
    seeds = [1, 2, 3]
    model = MLP(double_weights(seeds), activation)
    optimizer = OPTIMIZERS[name](model.parameters())
    losses = torch.stack([train_epoch(model, x, y, optimizer) for _ in range(2)])
    for i, seed in enumerate(seeds):
        weights, means = plain_training(double_weights(seed), x, y, OPTIMIZERS[name])
        torch.testing.assert_close(losses[:, i], means)
        for w, expected in zip(model.weights, weights):
            torch.testing.assert_close(w[i].detach(), expected)


@pytest.mark.parametrize("seeds", [7, [7, 8]], ids=["alone", "stack"])
def test_blocked_sgd_is_sgd(seeds, activation):
    x, y = made_up_data()  # 330 samples: a short last batch and a short last block
    weights, model = double_weights(seeds), MLP(double_weights(seeds), activation)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        loss = train_epoch_sgd(weights, x, y, 0.1, activation)
        torch.testing.assert_close(loss, train_epoch(model, x, y, optimizer))
    for w, expected in zip(weights, model.weights):
        torch.testing.assert_close(w, expected.detach())


def test_a_loss_that_is_not_finite_is_named(activation):
    x, y = made_up_data()
    weights = double_weights([1, 2])
    weights[1][1] = float("inf")
    with pytest.raises(FloatingPointError, match=r"run \[1\] of the stack is not finite at step 0"):
        train_epoch_sgd(weights, x, y, 0.1, activation)
    model = MLP(double_weights([1, 2]), activation)
    with pytest.raises(FloatingPointError, match="not finite at step"):
        train_epoch(model, x, y, torch.optim.SGD(model.parameters(), lr=1e200))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_from_saved_weights_and_state(name, activation):
    x, y = made_up_data(60)
    model = MLP(double_weights([1, 2]), activation)
    optimizer = OPTIMIZERS[name](model.parameters())
    train_epoch(model, x, y, optimizer)
    saved = models.to_arrays(model.weights) | models.optimizer_to_arrays(optimizer)
    saved = {key: value.clone().numpy() for key, value in saved.items()}
    train_epoch(model, x, y, optimizer)

    again = MLP(models.from_arrays(saved | {"other": np.zeros(3)}), activation)
    optimizer = OPTIMIZERS[name](again.parameters())
    models.optimizer_from_arrays(optimizer, saved)
    train_epoch(again, x, y, optimizer)
    for w, expected in zip(again.weights, model.weights):
        assert torch.equal(w, expected)


def test_diverged_networks_are_marked_and_replaced():
    weights = double_weights([1, 2, 3])
    weights[1][0, 0, 0], weights[2][2, 0, 0] = float("nan"), 1e7
    diverged = torch.zeros(3, dtype=bool)
    models.replace_diverged(weights, diverged)
    assert diverged.tolist() == [True, False, True]
    for w in weights:
        assert torch.equal(w[0], w[1]) and torch.equal(w[2], w[1])
    weights[0][:] = float("inf")
    with pytest.raises(ValueError, match="all networks diverge"):
        models.replace_diverged(weights, diverged)
