"""LSTMs whose meta-gradient costs little more than reading their matrices.

A step of one trajectory is little else, so no step touches a matrix's gradient. For autograd all
parameters are constants. It finds the gradients δ at a cell's gates and at the outputs, and
`backward` goes from layer to layer: a matrix that was fed v in the steps of a window has the
gradient δ^T v, and what fed it the gradient δ W. Each is one product a window.
"""

import torch
from torch import nn
from torch.nn import functional as F


class LSTM(nn.Module):
    """Two LSTM cells, and a linear layer for each output.

    The parameters of the first outputs are drawn alike, however many outputs come after them.
    """

    def __init__(self, inputs, hidden, outputs):
        """outputs: {name: size}."""
        super().__init__()
        self.cells = nn.ModuleList([nn.LSTMCell(inputs, hidden), nn.LSTMCell(hidden, hidden)])
        self.names = list(outputs)
        self.readouts = nn.ModuleList(nn.Linear(hidden, size) for size in outputs.values())
        self.requires_grad_(False)
        # A vector times a matrix is read from memory faster along the columns of W. Adam's view of
        # a parameter is W^T, which is contiguous.
        self.views = {}
        for p in self.parameters():
            p.data = p.data.t().contiguous().t()
            self.views[p] = p.data.t()
            self.views[p].grad = torch.empty_like(p.data.t())
        self.forget()

    def forget(self):
        """Begin a new window."""
        self.tape = {layer: [] for layer in (*self.cells, *self.readouts)}

    def zero_state(self, runs):
        """Return h and c of both cells, [runs, hidden] each, before the first step."""
        return [(torch.zeros(runs, cell.hidden_size),) * 2 for cell in self.cells]

    def forward(self, x, state):
        """Return {name: [runs, size]} and the new state; x: [runs, inputs].

        In training, of one run, each layer's leaves, inputs and outputs are recorded.
        """
        outputs, new_state = {}, []
        for cell, (h, c) in zip(self.cells, state):
            x = x.detach()  # `backward` goes on from here
            gates = cell.bias_ih[None].detach().requires_grad_(self.training)
            W = cell.weight_ih, cell.weight_hh
            new_state.append(torch.lstm_cell(x, (h, c), *W, gates, cell.bias_hh))
            if self.training:
                self.tape[cell].append((gates, (x, h), new_state[-1][0]))
            x = new_state[-1][0]
        x = x.detach()
        for name, readout in zip(self.names, self.readouts):
            y = F.linear(x, readout.weight, readout.bias).requires_grad_(self.training)
            outputs[name] = y
            if self.training:
                self.tape[readout].append((y, (x,), y))
        return outputs, new_state

    def backward(self):
        """Set all gradients, once a window's outputs have theirs, and forget the window.

        The state before it counts as constant.
        """
        grad_h = sum(self.learn(readout) @ readout.weight for readout in self.readouts)
        first, second = self.cells
        delta = self.learn(second, grad_h)
        self.learn(first, delta @ second.weight_ih)
        self.forget()

    def learn(self, layer, grad_outputs=None):
        """Set the gradients of a layer, given its outputs'; return δ: [steps, ...].

        The leaves of a readout are its outputs, and have their gradients.
        """
        leaves, inputs, outputs = zip(*self.tape[layer])
        if grad_outputs is not None:
            torch.autograd.backward(outputs, grad_outputs.split(1))
        delta = torch.cat([torch.zeros_like(y) if y.grad is None else y.grad for y in leaves])
        fed = (torch.cat(v).detach().T for v in zip(*inputs))
        for p in layer.parameters():
            gradient = self.views[p].grad  # memory that is not new needs no clearing
            if p.dim() == 2:
                torch.mm(next(fed), delta, out=gradient)
            else:
                torch.sum(delta, 0, out=gradient)
        return delta
