"""The same numbers, to the last bit, on any number of worker processes, ranks and threads."""

import os
import subprocess
import sys

import numpy as np
import pytest

from experiment.results import ROOT

# teleports: they turn what QR rounds otherwise on more threads into differences that last
OPTIONS = ["--sample", "--optimizer", "Adam", "--runs", "2", "--epochs", "1"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def arrays_of(tmp_path_factory):
    """Run teleport_optimization.py; return {(file in logs/, key): array} without the times."""

    def arrays_of(launcher=(), options=(), **more):
        folder = tmp_path_factory.mktemp("output")
        script = [ROOT / "teleport_optimization.py", *OPTIONS, *options, "--output", folder]
        environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | more
        done = subprocess.run(
            [sys.executable, *launcher, *script], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        arrays = {}
        for path in folder.rglob("logs/**/*.npz"):
            with np.load(path) as file:
                keys = [key for key in file.files if key != "about" and "seconds" not in key]
                arrays |= {(path.name, key): file[key] for key in keys}
        return arrays

    return arrays_of


@pytest.fixture(scope="module")
def expected(arrays_of):
    arrays = arrays_of(options=["--processes", "1"])
    assert len({name for name, _ in arrays}) == 2  # stacks
    return arrays


@pytest.mark.parametrize(
    ("launcher", "options", "threads"),
    [
        ([], ["--processes", "2"], None),
        ([], ["--processes", "1"], "2"),
        pytest.param(
            TORCHRUN, [], "2", marks=pytest.mark.skipif(sys.platform != "linux", reason="gloo")
        ),
    ],
    ids=["two workers", "two threads", "two ranks"],
)
def test_numbers_do_not_depend_on_processes_ranks_or_threads(
    arrays_of, expected, launcher, options, threads
):
    more = {"OMP_NUM_THREADS": threads} if threads else {}
    arrays = arrays_of(launcher, options, **more)
    assert arrays.keys() == expected.keys()
    for key, array in arrays.items():
        np.testing.assert_array_equal(array, expected[key], err_msg=str(key))
