"""Two LSTM cells and a linear readout, and the gradient of a window of steps in closed form.

An LSTM is a list of three arrays, [inputs + hidden + 2, 4 hidden], [2 hidden + 2, 4 hidden] and
[hidden + 1, outputs]. A row vector comes from the left, [x, h, 1, 1] to a cell and [h, 1] to the
readout, so that the last rows are the biases: a cell has two, as torch.nn.LSTMCell does. The
columns of a cell are its gates o, i, f and the candidate g. Leading dimensions of inputs and states
are trajectories.

A step of one trajectory does little but read the matrices. So nothing else may cost much: these are
NumPy's arrays, whose operations start several times as fast as torch's, and no step touches a
matrix's gradient. That is one product of what the steps of a window fed and got back.
"""

import numpy as np


def init_lstm(inputs, hidden, outputs, rng):
    """Draw an LSTM, uniform in ±1/sqrt(hidden) as torch.nn.LSTMCell and torch.nn.Linear do.

    The first outputs are drawn alike, however many come after them.
    """
    sizes = (4 * hidden, inputs + hidden + 2), (4 * hidden, 2 * hidden + 2), (outputs, hidden + 1)
    draws = [rng.uniform(-1, 1, size) / hidden**0.5 for size in sizes]
    return [np.ascontiguousarray(W.T, np.float32) for W in draws]


def zero_state(lstm, like):
    """Return the state h_1, c_1, h_2, c_2 before the first step on inputs `like`: [..., inputs]."""
    return (np.zeros((*like.shape[:-1], len(lstm[2]) - 1), like.dtype),) * 4


def split(gates):
    """Return o, i, f, g: [..., hidden] of gates: [..., 4 hidden]."""
    hidden = gates.shape[-1] // 4
    return [gates[..., k * hidden : (k + 1) * hidden] for k in range(4)]


def cell(W, x, h, c):
    """Return a cell's new h and c, [..., hidden], and what its gradient needs of this step."""
    v = np.concatenate([x, h, np.ones((*c.shape[:-1], 2), c.dtype)], -1)
    gates = v @ W
    sigmoids = gates[..., : 3 * c.shape[-1]]
    sigmoids *= 0.5  # the logistic function of z is (1 + tanh(z / 2)) / 2
    np.tanh(gates, out=gates)
    sigmoids *= 0.5
    sigmoids += 0.5
    o, i, f, g = split(gates)
    c_new = f * c
    c_new += i * g
    squashed = np.tanh(c_new)
    return o * squashed, c_new, (v, gates, c, squashed)


def lstm_step(lstm, x, state):
    """Return the outputs [..., outputs], the new state, and a record for `backward`.

    x: [..., inputs]; state: as `zero_state` returns it.
    """
    W_1, W_2, W_out = lstm
    h_1, c_1, h_2, c_2 = state
    h_1, c_1, record_1 = cell(W_1, x, h_1, c_1)
    h_2, c_2, record_2 = cell(W_2, h_1, h_2, c_2)
    v = np.concatenate([h_2, np.ones((*h_2.shape[:-1], 1), h_2.dtype)], -1)
    return v @ W_out, (h_1, c_1, h_2, c_2), (record_1, record_2, v)


def cell_backward(W, records, grad_h):
    """Return a cell's inputs v: [steps, inputs], and δ: [steps, 4 hidden], the gradients at v @ W.

    records: of the steps of one trajectory; grad_h: [steps, hidden], the gradients in each step's h
    that come from above. Those that come from the next step are added here, last step first.
    """
    v, gates, c, squashed = (np.stack(column) for column in zip(*records))
    steps, hidden = c.shape
    o, i, f, g = split(gates)
    # δ is these times the gradients in h, c, c, c
    slopes = [squashed * o * (1 - o), g * i * (1 - i), c * f * (1 - f), i * (1 - g * g)]
    delta = np.stack(slopes, 1)
    h_to_c = o * (1 - squashed * squashed)
    W_h = W[-2 - hidden : -2]
    grad_c = np.zeros_like(c[0])
    for k in reversed(range(steps)):
        dh = grad_h[k]
        if k + 1 < steps:
            dh = dh + W_h @ delta[k + 1].ravel()
            grad_c = grad_c * f[k + 1]
        grad_c = grad_c + dh * h_to_c[k]
        delta[k, 0] *= dh
        delta[k, 1:] *= grad_c
    return v, delta.reshape(steps, -1)


def backward(lstm, records, grad_outputs):
    """Return for each matrix W of an LSTM the pair v, δ with W's gradient v^T δ, for a window.

    records: of `lstm_step` for each step of one trajectory; grad_outputs: [steps, outputs], the
    gradients in its outputs. The state before the window counts as constant, and so do all inputs.
    """
    W_1, W_2, W_out = lstm
    hidden = len(W_out) - 1
    records_1, records_2, v = zip(*records)
    v_2, delta_2 = cell_backward(W_2, records_2, grad_outputs @ W_out[:hidden].T)
    v_1, delta_1 = cell_backward(W_1, records_1, delta_2 @ W_2[:hidden].T)
    return (v_1, delta_1), (v_2, delta_2), (np.stack(v), grad_outputs)
