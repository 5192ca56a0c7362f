"""The package as others install it, in a project that has a module of our scripts' names."""

import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest

from experiment.results import ROOT

SCRIPT = """
import sys
sys.path.insert(1, {target!r})
import pathlib
import pickle
import models
import parameter_symmetries
import torch
from torch import nn
from parameter_symmetries import RESCALING, Axis, Group, check_symmetry, symmetry_of, teleport_

assert models.mine
assert str(pathlib.Path(parameter_symmetries.__file__).parent.parent) == {target!r}
model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
x, y = torch.rand(5, 3), torch.tensor([0, 1, 0, 1, 1])
axes = [Axis("0.weight", 0), Axis("0.bias", 0), Axis("2.weight", 1, -1)]
by_hand = [Group(RESCALING, 4, 1, axes)]
for symmetry in (by_hand, symmetry_of(model, x), pickle.loads(pickle.dumps(by_hand))):
    assert check_symmetry(model, symmetry, x) < 1e-10
    nn.functional.cross_entropy(model(x), y).backward()
    before, after = teleport_(model, symmetry)
    assert after > before
"""


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A folder into which the package is installed, from a copy of what it is built from."""
    if not (find_spec("pip") and find_spec("setuptools")):
        pytest.skip("building the package needs pip and setuptools")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "parameter_symmetries", source / "parameter_symmetries", ignore=ignored)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", target]
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *options]
    done = subprocess.run([*command, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def test_it_is_installed_alone_and_does_not_meet_modules_of_other_projects(target, tmp_path):
    (tmp_path / "models.py").write_text("mine = True\n", encoding="utf-8")
    script = SCRIPT.format(target=str(target))
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    command = [sys.executable, "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    installed = {path.name for path in target.iterdir() if not path.name.endswith(".dist-info")}
    assert installed == {"parameter_symmetries"}
