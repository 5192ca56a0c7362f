"""Every script that takes --device runs on a GPU, with tiny settings."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from experiment.results import ROOT

MNIST = ["--dataset", "MNIST"]
OPTIONS = {
    "correlation.py": [*MNIST, "--runs", "4", "--epochs", "1", "--batches", "2"],
    "teleport_optimization.py": ["--runs", "2", "--epochs", "3"],
    "teleport_sharpness_curvature.py": [*MNIST, "--runs", "2"],
    "studies/sharpness.py": [*MNIST, "--runs", "4", "--epochs", "1", "--batches", "2"],
    "studies/learning_rate.py": ["--optimizer", "SGD", "Adam", "--runs", "2", "--epochs", "3"],
    "studies/teleports.py": ["--question", "action", "--runs", "2", "--epochs", "3"],
    "studies/rescaled_teleports.py": [*MNIST, "--runs", "2"],
    "studies/quantisation.py": ["--network", "mlp-mnist", "--runs", "2"],
}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("script", OPTIONS)
def test_a_script_runs_on_a_gpu_with_finite_numbers(script, tmp_path):
    command = [sys.executable, ROOT / script, "--sample", "--device", "cuda", "--output", tmp_path]
    done = subprocess.run([*command, *OPTIONS[script]], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    logs = list(tmp_path.rglob("logs/**/*.npz"))
    assert logs
    for path in logs:
        with np.load(path) as log:
            weights = [log[key] for key in log.files if key.startswith("W")]
        assert all(np.isfinite(w).all() for w in weights), path
