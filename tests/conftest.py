"""What the tests share: the published code's outputs and the inputs they belong to."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

# tests are small: a second thread only waits, and badly where the machine has other work
os.environ.setdefault("OMP_NUM_THREADS", "1")

from experiment.files import ROOT  # noqa: E402
from experiment.launch import run  # noqa: E402

import torch  # noqa: E402

from models import LeakyReLU, init_weights  # noqa: E402
from teleportation import random_directions, random_generators  # noqa: E402

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())


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
def run_script():
    """Run one of the repository's scripts; returns the finished process with its output."""

    def run_script(script, *arguments, **options):
        command = [sys.executable, str(ROOT / script), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)

    return run_script


@pytest.fixture
def call(monkeypatch, capsys):
    """Do what `run_script` does in this process, which has imported the script, and is faster."""

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
