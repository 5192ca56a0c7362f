"""experiment/run.py: options, tasks in workers and ranks, and what ends them."""

import argparse
import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from experiment.results import ROOT, UserError
from experiment.run import device, figures_folder, run, whole_number

# four tasks of ten steps; FAULT is "what it is, task, step": the process kills itself, or waits
SCRIPT = """'''Count.'''
import os, signal, time
from experiment import results, run

WHAT, *WHERE = os.environ.get("FAULT", "").split() or [""]

def log_of(task, args):
    return results.Log(args.output / "logs" / f"{task}.npz", {"task": task}, (__file__,))

def count(task, args, bar):
    def step(state):
        k = int(state["steps"])
        if [str(task), str(k)] == WHERE:
            if WHAT == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if WHAT == "raise":
                raise results.UserError("13 brings bad luck.")
            time.sleep(1000)
        time.sleep(0.02)
        return results.append(state, square=k * k)
    results.resume(log_of(task, args), dict, step, 10, bar)

def main():
    args = run.experiment_parser(__doc__).parse_args()
    run.run_tasks(count, list(range(4)), args, 10, "step")
    squares = [results.load(log_of(task, args), 10).arrays["square"] for task in range(4)]
    print(sum(sum(s) for s in squares))

if __name__ == "__main__":
    run.run(main)
"""
TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
RESULT = "1140\n"  # 4 × (0² + … + 9²)


# Options


@pytest.mark.parametrize("text", ["0", "-3", "2.5", "many", "", "1000001", "٣", "9" * 5000])
def test_what_is_not_a_whole_number_is_refused(text):
    assert whole_number(1)("7") == 7
    with pytest.raises(argparse.ArgumentTypeError, match="not a whole number from 1 to 1,000,000"):
        whole_number(1)(text)


@pytest.mark.parametrize("text", ["gpu", "cuda:99", "meta", "abacus"])
def test_a_device_that_is_not_there_is_refused(text):
    assert device("cpu") == torch.device("cpu")
    with pytest.raises(argparse.ArgumentTypeError, match=f"no device '{text}' here"):
        device(text)


def test_other_options_than_the_defaults_have_a_folder_of_their_own_around_everything():
    defaults = {"runs": 100, "sphere": False}

    def folder(*root, **changes):
        args = defaults | {"output": Path("out"), "sample": False} | changes
        return figures_folder(argparse.Namespace(**args), defaults, *root)

    assert folder() == Path("out/figures")
    assert folder(runs=20) == Path("out/figures/20runs")
    assert folder(runs=20, sphere=True, sample=True) == Path("out/figures/sample/20runs-sphere")
    assert folder("other/figures", sphere=True) == Path("out/other/figures/sphere")


# Errors


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (UserError("the file is gone: fetch it."), 2, "the file is gone: fetch it."),
        (OSError(errno.ENOSPC, "No space left on device", "logs/a"), 2, "logs/a: No space left"),
        (MemoryError(), 2, "out of memory: choose fewer"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), 2, "out of memory: choose fewer"),
        (KeyboardInterrupt(), 130, "Run the same command to resume"),
    ],
)
def test_run_ends_with_a_sentence_and_a_status(capsys, error, status, words):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        run(main)
    assert end.value.code == status
    assert words in capsys.readouterr().err


def test_run_hides_no_mistake_of_the_code():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)


# Tasks


def take_ctrl_c():
    """Do not ignore Ctrl-C, as background processes do."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def start(tmp_path):
    """Start SCRIPT with options, in a process group of its own; more is its environment."""
    script, started = tmp_path / "script.py", []
    script.write_text(SCRIPT)

    def start(*options, launcher=(), **more):
        command = [sys.executable, *launcher, script, "--output", tmp_path, *options]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | more
        group = {"start_new_session": True, "preexec_fn": take_ctrl_c}
        started.append(subprocess.Popen(command, env=environment, **group, **pipes))
        return started[-1]

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def finish(process):
    """Wait for a process; return its status, output and errors, in which is no traceback."""
    output, errors = process.communicate(timeout=300)
    assert "Traceback" not in errors
    return process.returncode, output, errors


def wait_for_steps(folder, task, steps):
    """Wait until a task has saved so many steps."""
    path, end = folder / "logs" / f"{task}.npz", time.monotonic() + 200
    while not (path.exists() and np.load(path)["steps"] >= steps):
        assert time.monotonic() < end
        time.sleep(0.05)


def group(pgid):
    """Return the living processes of a process group."""
    processes = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{name}/stat").read_text().rpartition(") ")[2].split()
            if int(status[2]) == pgid and status[0] != "Z":
                processes.append(int(name))
    return processes


def test_two_launches_at_once_do_not_disturb_each_other(start, tmp_path):
    ends = [finish(process) for process in [start("--processes", "1"), start("--processes", "2")]]
    assert (0, RESULT) in [end[:2] for end in ends]
    for status, _, errors in ends:  # the slower one may have overwritten what the other reads
        assert status == 0 or "run the same command again" in errors
    assert not list(tmp_path.rglob("*.part"))


def test_a_worker_that_is_killed_ends_the_launch_with_a_sentence_and_the_next_one_resumes(
    start, tmp_path
):
    status, _, errors = finish(start("--processes", "2", FAULT="kill 1 5"))
    assert status == 2 and "script.py: a worker was killed" in errors
    assert np.load(tmp_path / "logs" / "1.npz")["steps"] == 5
    assert finish(start("--processes", "1"))[:2] == (0, RESULT)


def test_an_error_in_a_worker_ends_the_launch_with_its_sentence(start):
    status, _, errors = finish(start("--processes", "2", FAULT="raise 1 5"))
    assert status == 2 and "script.py: 13 brings bad luck." in errors


@pytest.mark.parametrize("processes", ["1", "2"])
def test_ctrl_c_ends_all_processes_with_a_sentence(start, tmp_path, processes):
    process = start("--processes", processes, FAULT="wait 1 5")
    wait_for_steps(tmp_path, 1, 5)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    status, _, errors = finish(process)
    assert status == 130 and errors.endswith("Interrupted. Run the same command to resume.\n")


@pytest.mark.skipif(not os.path.exists("/proc"), reason="reads /proc")
def test_workers_end_with_a_parent_that_is_killed(start, tmp_path):
    process = start("--processes", "2", FAULT="wait 1 5")
    wait_for_steps(tmp_path, 1, 5)
    process.kill()
    process.wait()
    end = time.monotonic() + 60
    while group(process.pid):
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="torchrun as on a cluster")
def test_a_rank_that_is_killed_ends_the_launch(start, tmp_path):
    killed = start(launcher=TORCHRUN, FAULT="kill 1 5")
    _, errors = killed.communicate(timeout=300)
    assert killed.returncode == 1 and "Signal 9 (SIGKILL) received" in errors
    assert np.load(tmp_path / "logs" / "1.npz")["steps"] == 5


def test_ctrl_c_ends_a_rank_that_waits_for_others(start, tmp_path):
    network = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29613", "WORLD_SIZE": "2"}
    ranks = [start(RANK=str(rank), FAULT="wait 1 5", **network) for rank in range(2)]
    wait_for_steps(tmp_path, 2, 10)
    wait_for_steps(tmp_path, 1, 5)
    for rank in ranks:
        time.sleep(0.5)
        rank.send_signal(signal.SIGINT)
        assert finish(rank)[0] == 130
