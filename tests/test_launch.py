"""experiment/launch.py: options, ranks, the order of the work, and mistakes as sentences."""

import argparse
import errno
import json
import os
import signal
from pathlib import Path

from experiment import files
from experiment.files import UserError
from experiment.launch import (
    at_least,
    compute_and_report,
    device,
    do_tasks,
    figures_folder,
    run,
    share_of_rank,
)

import numpy as np
import pytest
import torch


def test_a_rank_has_every_so_many_th_unit_and_its_own_gpu(monkeypatch):
    units = list(range(7))
    assert share_of_rank(units) == units
    monkeypatch.setenv("WORLD_SIZE", "3")
    shares = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(share_of_rank(units))
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]
    monkeypatch.setenv("LOCAL_RANK", "99")
    with pytest.raises(argparse.ArgumentTypeError, match="no device 'cuda:99' here"):
        device("cuda")


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (UserError("the file is gone: fetch it."), 2, "the file is gone: fetch it."),
        (OSError(errno.ENOSPC, "No space left on device", "logs/a"), 2, "logs/a: No space left"),
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


@pytest.mark.parametrize("text", ["0", "-3", "2.5", "many", "", "1000001", "٣", "9" * 5000])
def test_a_count_that_is_none_is_refused(text):
    assert at_least(1)("7") == 7
    with pytest.raises(argparse.ArgumentTypeError, match="not a whole number from 1 to 1,000,000"):
        at_least(1)(text)


@pytest.mark.parametrize("text", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(text):
    assert device("cpu") == torch.device("cpu")
    with pytest.raises(argparse.ArgumentTypeError, match=f"no device '{text}' here"):
        device(text)


def test_other_settings_than_the_defaults_have_a_folder_of_their_own():
    defaults = {"runs": 100, "sphere": False}

    def folder(**changes):
        args = defaults | {"output": Path("out"), "sample": False} | changes
        return figures_folder(argparse.Namespace(**args), "correlation", defaults)

    assert folder() == Path("out/figures/correlation")
    assert folder(runs=20) == Path("out/figures/correlation-20runs")
    assert folder(sphere=True) == Path("out/figures/correlation-sphere")
    assert folder(runs=20, sample=True) == Path("out/figures/sample/correlation-20runs")


class Report:
    """An experiment with the parts a, b and c, whose result is a number."""

    def __init__(self, folder):
        self.folder, self.computed, self.drawn = folder, [], []

    def __call__(self, *asked, plot_only=False, value=1):
        def draw(part, arrays, summary, folder):
            assert summary["twice"] == 2 * arrays["value"] and folder == self.folder
            self.drawn.append(part)

        compute_and_report(
            argparse.Namespace(plot_only=plot_only),
            self.folder,
            "abc",
            asked,
            lambda args: self.computed.extend(asked),
            lambda part, args: ({"part": part}, {"value": value}, None),
            lambda part, arrays: {"twice": 2 * arrays["value"]},
            lambda summaries: "".join(
                f"{part}{entry['twice']} " for part, entry in summaries.items()
            ),
            draw,
        )
        return (self.folder / "table.md").read_text()


def test_a_part_replaces_its_own_results_and_the_table_is_of_all_parts(tmp_path, capsys):
    report = Report(tmp_path / "figures")
    assert report("b", "c") == "b2 c2 "
    before = (report.folder / "c.npz").read_bytes()
    assert report("a", "b", value=5) == "a10 b10 c2 "
    assert (report.folder / "c.npz").read_bytes() == before
    assert report.drawn == ["b", "c", "a", "b"] == report.computed
    assert "a10 b10 c2" in capsys.readouterr().out
    summary = json.loads((report.folder / "summary.json").read_text())
    assert summary["c"]["settings"] == {"part": "c"}
    assert summary["c"]["made_with"]["code"] == files.code_version()[0]


def test_plot_only_draws_from_saved_results_and_computes_nothing(tmp_path):
    report = Report(tmp_path)
    report("a", value=3)
    assert report("a", plot_only=True) == "a6 " and report.computed == ["a"]
    with pytest.raises(UserError, match=r"b.npz is missing: run without --plot-only"):
        report("b", plot_only=True)


def test_other_ranks_compute_and_leave_the_report_to_rank_0(tmp_path, monkeypatch):
    monkeypatch.setattr("experiment.launch.wait_for_ranks", lambda: None)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    report = Report(tmp_path)
    with pytest.raises(FileNotFoundError):
        report("a")
    assert report.computed == ["a"] and not list(tmp_path.iterdir())


def test_results_say_by_which_code_their_logs_were_made(tmp_path):
    log, made = tmp_path / "log.npz", {"code": "earlier", "commit": "abc"}
    files.save(log, {}, {"value": np.ones(1)}, made)
    compute_and_report(
        argparse.Namespace(plot_only=False),
        tmp_path,
        ["a"],
        ["a"],
        None,
        lambda part, args: ({}, files.load(log, {}), log),
        lambda part, arrays: {},
        lambda summaries: "",
        lambda *_: None,
    )
    assert json.loads((tmp_path / "summary.json").read_text())["a"]["made_with"] == made


def double(number, path, bar):
    """A task: writes 2 x a number; raises UserError for 13, and is killed for −1."""
    if number == 13:
        raise UserError("13 brings bad luck.")
    if number < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    bar.update()
    path.write_text(str(2 * number))


@pytest.mark.parametrize(
    ("extra", "words"), [(13, "13 brings bad luck"), (-1, "a worker process was killed")]
)
def test_tasks_are_done_side_by_side_and_their_errors_raised(tmp_path, extra, words):
    tasks = [(n, tmp_path / str(n)) for n in range(3)]
    do_tasks(double, tasks, 3, "number", 2)
    assert [(tmp_path / str(n)).read_text() for n in range(3)] == ["0", "2", "4"]
    with pytest.raises(UserError, match=words):
        do_tasks(double, [(extra, tmp_path)], 1, "number", 1)


def test_in_ranks_tasks_are_done_one_after_another(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    do_tasks(double, [(4, tmp_path / "4")], 1, "number", 1)
    assert (tmp_path / "4").read_text() == "8"
