"""What teleports cost, in units of forward + backward of the same batch on the same threads.

python tests/benchmark_teleport.py                # run nothing else meanwhile
python tests/benchmark_teleport.py --device cuda  # GPT-2's size in bfloat16, with AdamW's state
python tests/benchmark_teleport.py --growth       # against the width of an MLP
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
from symmetric_models import gpt, loss_of, units  # noqa: E402

TINY = 1e-4  # a step's length: the cost does not depend on it, and weights stay where they are


def cnn():
    """Return a CNN of 0.3 million weights with batch norm, for 32 × 32 pixels, and its symmetry."""
    channels = 3, 32, 64, 128, 128
    layers, symmetry, reader = [], [], 0
    for i, o in zip(channels, channels[1:]):
        if layers:
            layers.append(nn.MaxPool2d(2))
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4 * 4, 10))
    norms = [k for k, layer in enumerate(model) if isinstance(layer, nn.BatchNorm2d)]
    for norm, reader in zip(norms, [k - 1 for k in norms[1:]] + [len(model) - 1]):
        made = [(f"{norm}.weight", 0), (f"{norm}.bias", 0)]
        symmetry.append(units(model[norm].num_features, made, [(f"{reader}.weight", 1)]))
    return model, symmetry


def mlp(width, depth=3):
    """Return an MLP 784-width-…-10 and its symmetry, as in the growth of a teleport's cost."""
    widths = (784, *depth * (width,), 10)
    layers = [nn.Linear(i, o, bias=False) for i, o in zip(widths, widths[1:])]
    between = [part for layer in layers for part in (layer, nn.LeakyReLU(0.1))]
    names = [f"{2 * k}.weight" for k in range(len(layers))]
    symmetry = [units(width, [(n, 0)], [(m, 1)]) for n, m in zip(names, names[1:])]
    return nn.Sequential(*between[:-1]), symmetry


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


def rows(name, model, symmetry, x, y, limits, device="cpu", double_backward=True, repeats=3):
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
    if double_backward:
        names = [n for n, _ in model.named_parameters()]
        objective = gradient_norm(lambda p: loss_of(outputs(model, p, x), y), names)
        start = time.perf_counter()
        teleport_to(model, symmetry, objective, lr=0.0, steps=1)
        # the path has one value more than steps, at a cost near that of a step
        report(f"{name}: 10 steps by double backward", 5 * (time.perf_counter() - start), unit)


def growth(batch=200, few=20):
    """Measure ten steps against the width of an MLP, in training steps with SGD."""
    for width in (16, 64, 256, 1024, 4096):
        model, symmetry = mlp(width)
        x, y = torch.rand(batch, 784), torch.randint(10, (batch,))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

        def step(n):
            optimizer.zero_grad()  # noqa: B023
            loss_of(model(x[:n]), y[:n]).backward()  # noqa: B023
            optimizer.step()  # noqa: B023

        seconds = [seconds_of(lambda n=n: step(n), "cpu", 3) for n in (batch, few)]

        def teleport():
            teleport_(model, symmetry, steps=10, length=TINY)  # noqa: B023

        report(
            f"width {width}: 10 steps, in steps of SGD ({batch})",
            cost := seconds_of(teleport, "cpu", 3),
            seconds[0],
            1 if width == 4096 else None,
        )
        report(f"width {width}: 10 steps, in steps of SGD ({few})", cost, seconds[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--growth", action="store_true")
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, {args.device}")
    print(f"{'':52}{'':13}{'units':>9}{'limit':>8}")
    torch.manual_seed(0)
    if args.growth:
        growth()
    elif args.device == "cuda":
        model, symmetry = gpt(layers=12, width=768, heads=12, vocabulary=50257, length=1024)
        x, y = torch.randint(50257, (2, 8, 1024))
        rows("GPT-2's size", model, symmetry, x, y, (0.15, None), "cuda", False, repeats=10)
    else:
        x, y = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
        rows("CNN", *cnn(), x, y, (None, 0.05))
        x, y = torch.randint(256, (2, 8, 256))
        rows("GPT of 4 layers", *gpt(), x, y, (0.05, 0.15))


if __name__ == "__main__":
    main()
