"""LSTMs with a backward pass of their own, which is fast for one trajectory at a time.

A step is then a few products of a matrix and a vector, and autograd would spend most of its time
adding up the matrices' gradients, step by step (tests/benchmark.py compares the two). Here autograd
takes the parameters as constants and finds δ, the gradients at the gates and the outputs.
`backward` then forms the gradient of each matrix once for a window: δ^T v, where v is what the
matrix was fed.
"""

import torch
from torch import nn


class LSTM(nn.Module):
    """Two LSTM cells, fed with scale(x): [runs, inputs], and a linear layer for each output.

    outputs: {name: size}; those of the first are drawn alike, however many come after them. In
    training a layer's leaves, inputs and outputs go on tape.
    """

    def __init__(self, inputs, hidden, outputs, scale=lambda x: x):
        super().__init__()
        self.names, self.scale = list(outputs), scale
        self.cells = nn.ModuleList([nn.LSTMCell(inputs, hidden), nn.LSTMCell(hidden, hidden)])
        self.readouts = nn.ModuleList(nn.Linear(hidden, size) for size in outputs.values())
        self.requires_grad_(False)
        self.transposed = {}  # what Adam sees of each parameter
        for p in self.parameters():
            p.data = p.data.t().contiguous().t()  # by columns W is read faster from memory
            self.transposed[p] = p.data.t()
            self.transposed[p].grad = torch.empty_like(p.data.t())
        self.forget()

    def forget(self):
        """Begin a new window."""
        self.tape = {layer: [] for layer in (*self.cells, *self.readouts)}

    def zero_state(self, runs):
        """Return h and c of both cells, [runs, hidden] each, before the first step."""
        return [(torch.zeros(runs, cell.hidden_size),) * 2 for cell in self.cells]

    def forward(self, x, state):
        """Return {name: [runs, size]} and the new state; in training, one run's, for `backward`."""
        x, outputs, new_state = self.scale(x), {}, []
        for cell, (h, c) in zip(self.cells, state):
            x = x.detach()  # `backward` goes on from here
            bias = cell.bias_ih[None].detach().requires_grad_(self.training)  # at the gates
            W = cell.weight_ih, cell.weight_hh
            new_state.append(torch.lstm_cell(x, (h, c), *W, bias, cell.bias_hh))
            self.tape[cell] += [(bias, (x, h), new_state[-1][0])] * self.training
            x = new_state[-1][0]
        for name, readout in zip(self.names, self.readouts):
            y = readout(x.detach()).requires_grad_(self.training)
            self.tape[readout] += [(y, (x,), y)] * self.training
            outputs[name] = y
        return outputs, new_state

    def backward(self):
        """Set all gradients, once the outputs of a window have theirs."""
        first, second = self.cells
        grad_h = sum(self.learn(readout) @ readout.weight for readout in self.readouts)
        self.learn(first, self.learn(second, grad_h) @ second.weight_ih)

    def learn(self, layer, grad_outputs=None):
        """Set a layer's gradients, given its outputs' or once they have them; return δ."""
        leaves, inputs, outputs = zip(*self.tape[layer])
        if grad_outputs is not None:
            torch.autograd.backward(outputs, grad_outputs.split(1))
        delta = torch.cat([torch.zeros_like(y) if y.grad is None else y.grad for y in leaves])
        fed = (torch.cat(v).detach().t() for v in zip(*inputs))
        for p in layer.parameters():
            out = self.transposed[p].grad  # memory that is in use needs no clearing
            torch.mm(next(fed), delta, out=out) if p.dim() == 2 else torch.sum(delta, 0, out=out)
        return delta
