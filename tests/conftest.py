"""What the tests share: the published code's outputs and the inputs they belong to."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from experiment.run import run
from models import LeakyReLU, init_weights
from teleportation import random_directions, random_generators

torch.set_num_threads(1)  # as in the scripts

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())


def bar_until(updates):
    """Return a progress bar, with its count `n`, that interrupts at an update, as Ctrl-C does."""

    def update(n=1):
        bar.n += n
        if bar.n >= updates:
            raise KeyboardInterrupt

    bar = SimpleNamespace(n=0, update=update)
    return bar


@pytest.fixture(autouse=True)
def seeded():
    """Whatever ran before, a test that names no generator draws the same."""
    torch.manual_seed(0)


@pytest.fixture
def activation():
    return LeakyReLU()


@pytest.fixture(params=GOLDEN["networks"], ids=lambda network: f"seed{network['seed']}")
def golden(request):
    """A network of golden.json, with its weights, x, y, generators and directions in float64."""
    network = request.param
    seed, widths = network["seed"], network["widths"]
    data = torch.Generator().manual_seed(seed + 1)
    x = torch.rand(widths[0], network["n"], generator=data)
    y = torch.randint(10, (network["n"],), generator=data)
    generators = random_generators(widths, torch.Generator().manual_seed(seed + 2))
    directions = random_directions(widths, [0.5], torch.Generator().manual_seed(seed + 3))
    return network | {
        "weights": [w.double() for w in init_weights(widths, seed)],
        "x": x.double(),
        "y": y,
        "generators": [M.double() for M in generators],
        "directions": [d.double() for d in directions],
    }


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a script in this process, which has imported it; return its status and its output."""

    def call(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
        status = 0
        capsys.readouterr()
        try:
            run(script.main)
        except SystemExit as end:
            status = end.code
        output, errors = capsys.readouterr()
        return SimpleNamespace(returncode=status, stdout=output, stderr=errors)

    return call
