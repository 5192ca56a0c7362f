"""LSTMs with a backward pass of their own, which is fast for one trajectory at a time.

A step is then a few products of a matrix and a vector, and autograd would spend most of its time
adding up the matrices' gradients, step by step (tests/benchmark.py compares the two). Here autograd
takes the parameters as constants and finds δ, the gradients at the gates and the outputs.
`backward` then forms each matrix's gradient once for a window of steps: δ^T v, where v is what the
matrix was multiplied with.
"""

import torch
from torch import nn


class LSTM(nn.Module):
    """Two LSTM cells with the input scale(x), x: [runs, inputs], and a linear layer per output.

    outputs: {name: size}; the layer of the first output is drawn alike, whatever others there are.
    In training, the tape holds for each layer and step what `backward` needs.
    """

    def __init__(self, inputs, hidden, outputs, scale=lambda x: x):
        super().__init__()
        self.names, self.scale = list(outputs), scale
        self.cells = nn.ModuleList([nn.LSTMCell(inputs, hidden), nn.LSTMCell(hidden, hidden)])
        self.readouts = nn.ModuleList(nn.Linear(hidden, size) for size in outputs.values())
        self.requires_grad_(False)
        self.transposed = {}  # parameter -> its transpose, which Adam updates
        for p in self.parameters():
            p.data = p.data.t().contiguous().t()  # by columns W is read faster from memory
            self.transposed[p] = p.data.t()
            self.transposed[p].grad = torch.empty_like(p.data.t())
        self.begin_window()

    def begin_window(self):
        """Empty the tape."""
        self.tape = {layer: [] for layer in (*self.cells, *self.readouts)}

    def zero_state(self, runs):
        """Return h and c of both cells, [runs, hidden] each, before the first step."""
        return [(torch.zeros(runs, cell.hidden_size),) * 2 for cell in self.cells]

    def forward(self, x, state):
        """Return {name: [runs, size]} and the new state; in training, of one run."""
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
        """Set the gradients of all parameters, once the outputs of a window have theirs."""
        first, second = self.cells
        grad_h = sum(self.backward_of(readout) @ readout.weight for readout in self.readouts)
        self.backward_of(first, self.backward_of(second, grad_h) @ second.weight_ih)

    def backward_of(self, layer, grad_outputs=None):
        """Set the gradients of a layer's parameters; return δ, [steps, size].

        grad_outputs: the gradients of a cell's outputs, [steps, hidden]; a readout's have theirs.
        """
        leaves, inputs, outputs = zip(*self.tape[layer])
        if grad_outputs is not None:
            torch.autograd.backward(outputs, grad_outputs.split(1))
        delta = torch.cat([torch.zeros_like(y) if y.grad is None else y.grad for y in leaves])
        inputs = (torch.cat(v).detach().t() for v in zip(*inputs))
        for p in layer.parameters():
            out = self.transposed[p].grad  # memory that is in use needs no clearing
            torch.mm(next(inputs), delta, out=out) if p.dim() == 2 else torch.sum(delta, 0, out=out)
        return delta
