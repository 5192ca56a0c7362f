"""The core as other projects import it, beside modules of theirs that have the same names."""

import os
import subprocess
import sys

from experiment.files import ROOT

SCRIPT = """
import models, sys
before = list(sys.path)
from parameter_symmetries import module_symmetry
from parameter_symmetries.models import LeakyReLU, init_weights
from parameter_symmetries.teleportation import teleport
import torch, pickle

assert models.mine and sys.modules["models"] is models and sys.path == before
assert "teleportation" not in sys.modules
assert module_symmetry.RESCALING is sys.modules["parameter_symmetries.teleportation"].RESCALING
assert isinstance(pickle.loads(pickle.dumps(LeakyReLU())), LeakyReLU)
x, y = torch.rand(4, 3), torch.tensor([0, 1, 0])
teleport(init_weights((4, 5, 2), 0), x, y, 0.1, 2, LeakyReLU())
"""


def test_the_core_has_a_name_of_its_own(tmp_path):
    (tmp_path / "models.py").write_text("mine = True\n", encoding="utf-8")
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}  # as `pip install -e .` has it
    command = [sys.executable, tmp_path / "script.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
