"""What teleports cost, in units of forward + backward of the same batch on the same threads.

python tests/benchmark_teleport.py                # run nothing else meanwhile
python tests/benchmark_teleport.py --device cuda  # GPT-2's size in bfloat16, with AdamW's state
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parameter_symmetries.groups import outputs  # noqa: E402
from parameter_symmetries.objectives import gradient_norm, teleport_to  # noqa: E402
from parameter_symmetries.teleport import teleport_  # noqa: E402
from parameter_symmetries.trace import symmetry_of  # noqa: E402
from symmetric_models import gpt, loss_of  # noqa: E402

TINY = 1e-4  # a step's length: the cost does not depend on it, and weights stay where they are


def cnn(x):
    """Return a CNN of 0.3 million weights with batch norm, for 32 × 32 pixels, and its symmetry."""
    layers, channels = [], (3, 32, 64, 128, 128)
    for i, o in zip(channels, channels[1:]):
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)]
    layers.pop()
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4 * 4, 10))
    return model, symmetry_of(model, x[:2])


def seconds_of(function, device, repeats):
    """Return the shortest time of some calls, after one call to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def report(name, seconds, unit, limit=None):
    limit = f"{limit:8.3g}" if limit else ""
    print(f"{name:52}{1e3 * seconds:10.1f} ms{seconds / unit:9.3g}{limit}", flush=True)


def rows(name, model, symmetry, x, y, limits, device="cpu", repeats=3):
    """Measure teleports of a model; limits: what one step and ten may cost."""
    model, x, y = model.to(device), x.to(device), y.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def forward_backward():
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
            loss = loss_of(model(x), y)
        loss.backward()

    forward_backward()
    optimizer.step()
    unit = seconds_of(forward_backward, device, repeats)
    report(f"{name}: forward + backward", unit, unit)
    for steps, limit in zip((1, 10), limits):
        for state, what in ((None, ""), (optimizer, ", with AdamW's state")):

            def teleport():
                teleport_(model, symmetry, state, steps=steps, length=TINY)  # noqa: B023

            seconds = seconds_of(teleport, device, 3 * repeats)
            report(f"{name}: {steps} step{'s'[: steps > 1]}{what}", seconds, unit, limit)
    if device == "cpu":
        names = [n for n, _ in model.named_parameters()]
        objective = gradient_norm(lambda p: loss_of(outputs(model, p, x), y), names)
        start = time.perf_counter()
        teleport_to(model, symmetry, objective, lr=0.0, steps=1)
        # the path has one value more than steps, at a cost near that of a step
        report(f"{name}: 10 steps by double backward", 5 * (time.perf_counter() - start), unit)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    print(f"{torch.get_num_threads()} threads, {device}")
    print(f"{'':52}{'':13}{'units':>9}{'limit':>8}")
    torch.manual_seed(0)
    if device == "cuda":
        model, symmetry = gpt(layers=12, width=768, heads=12, vocabulary=50257, length=1024)
        x, y = torch.randint(50257, (2, 8, 1024))
        rows("GPT-2's size", model, symmetry, x, y, (0.15, None), device, repeats=10)
    else:
        x, y = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
        rows("CNN", *cnn(x), x, y, (None, 0.05))
        x, y = torch.randint(256, (2, 8, 256))
        rows("GPT of 4 layers", *gpt(), x, y, (0.05, 0.15))


if __name__ == "__main__":
    main()
