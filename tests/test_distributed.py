"""correlation.py in ranks: the same numbers, and nothing lost when ranks or launches end early."""

import os
import signal
import socket
import subprocess
import sys
import time

from experiment.files import ROOT

import numpy as np
import pytest

from test_correlation import arrays, assert_same

# small stacks, no figures; FAULT ends rank 1 when it has two stacks, or keeps it from the barrier
SCRIPT = """
import os, signal, time
import correlation
from experiment import files, launch

def draw(*_):
    pass

def save(path, settings, arrays, *made_with):
    original(path, settings, arrays, *made_with)
    if "test_loss" in arrays and os.environ.get("RANK") == "1":
        done.append(path)
        if len(done) == 2 and FAULT == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if len(done) == 1 and FAULT == "wait":
            time.sleep(60)

FAULT, original, done = os.environ.get("FAULT"), files.save, []
correlation.draw, files.save = draw, save
correlation.RUNS_PER_STACK = dict.fromkeys(correlation.RUNS_PER_STACK, 2)
correlation.SWEEP_BATCHES, correlation.RESCALING_STEPS = 2, 1
launch.run(correlation.main)
"""
ARGUMENTS = ["--sample", "--dataset", "MNIST", "FashionMNIST", "--runs", "5", "--epochs", "3"]
ARGUMENTS += ["--batches", "2", "--output"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="torchrun as on a cluster")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def start(folder):
    """Start the script with an output folder; ranks: under torchrun, or by RANK, WORLD_SIZE."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    base = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = []

    def start(output, ranks=None, **environment):
        launcher = [*TORCHRUN, str(ranks)] if ranks else []
        command = [sys.executable, *launcher, script, *ARGUMENTS, folder / output]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, env=base | environment, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def expected(folder, start):
    """The numbers of two launches at once, neither in ranks, on the same logs/."""
    for process in [start("one"), start("one")]:
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
    assert not list(folder.rglob("*.part"))
    found = arrays(folder / "one")
    # of each dataset: three stacks, their estimates and radii, and rescalings of the first
    assert len({name for name, _ in found}) == 2 * (3 * 3 + 1)
    return found


def finished(folder):
    """Return {path: time of its last change} of the stacks in logs/ that are finished."""
    found = {}
    for path in folder.rglob("logs/**/runs*.npz"):
        with np.load(path) as archive:
            if "test_loss" in archive.files:
                found[path] = path.stat().st_mtime_ns
    return found


def test_four_ranks_give_the_same_numbers(folder, start, expected):
    four = start("four", ranks=4)
    output, _ = four.communicate(timeout=60)
    assert four.returncode == 0, output
    assert output.count("summary.json and table.md are in") == 1
    assert_same(expected, arrays(folder / "four"))


def test_a_killed_rank_and_ctrl_c_lose_nothing(folder, start, expected):
    two = folder / "two"
    killed = start("two", ranks=2, FAULT="kill")
    output, _ = killed.communicate(timeout=60)
    assert killed.returncode == 1
    assert "rank      : 1" in output and "Signal 9 (SIGKILL)" in output
    before = finished(two)
    assert 2 <= len(before) < 6

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = [start("two", RANK=str(rank), FAULT="wait", **group) for rank in range(2)]
    while len(finished(two)) < 6:
        assert all(process.poll() is None for process in ranks)
        time.sleep(0.05)
    time.sleep(0.2)  # rank 0 waits for rank 1
    interrupted = time.monotonic()
    for process in ranks:
        process.send_signal(signal.SIGINT)
    outputs = [process.communicate(timeout=10)[0] for process in ranks]
    assert time.monotonic() - interrupted < 10
    assert [process.returncode for process in ranks] == [130, 130]
    assert ["Run the same command to resume" in output for output in outputs] == [True, False]
    assert "Traceback" not in "".join(outputs)

    last = start("two")
    output, _ = last.communicate(timeout=60)
    assert last.returncode == 0, output
    assert before.items() <= finished(two).items()  # what was there is not done again
    assert_same(expected, arrays(two))
