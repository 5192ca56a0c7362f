"""experiment/files.py: results are whole or missing, runs are resumed, settings are compared."""

import contextlib
import errno
import json
import os
import resource
import subprocess
import sys

from experiment import files
from experiment.files import ROOT, UserError, load, read, save, whole_file
from experiment.launch import run

import numpy as np
import pytest
import torch

SETTINGS = {"epochs": 3, "widths": (4, 2)}


class Bar:
    """A progress bar that counts, and interrupts after some updates."""

    def __init__(self, updates=None):
        self.n, self.updates = 0, updates

    def update(self, n=1):
        self.n += n
        if self.n == self.updates:
            raise KeyboardInterrupt


def test_a_saved_result_comes_back(tmp_path):
    path = tmp_path / "new" / "result.npz"
    made = {"a": torch.arange(3.0), "b": np.ones((2, 2)), "seconds": 1.5}
    save(path, SETTINGS, made)
    arrays = load(path, SETTINGS)
    assert arrays.keys() == {"a", "b", "seconds"}
    assert arrays["a"].tolist() == [0, 1, 2] and float(arrays["seconds"]) == 1.5


def test_a_result_with_other_settings_is_refused(tmp_path):
    path = tmp_path / "result.npz"
    save(path, SETTINGS, {"a": np.ones(1)})
    with pytest.raises(UserError, match=r"result.npz was made with different settings \(epochs\)"):
        load(path, SETTINGS | {"epochs": 4})


def test_a_result_of_other_code_is_named(tmp_path, capsys, monkeypatch):
    save(tmp_path / "result.npz", SETTINGS, {"a": np.ones(1)})
    load(tmp_path / "result.npz", SETTINGS)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(files, "code_version", lambda: ("another", None))
    for _ in range(2):
        load(tmp_path / "result.npz", SETTINGS)
    errors = capsys.readouterr().err
    assert (
        errors.count("contains results from another version of the code") == 1
        and str(tmp_path) in errors
    )


@pytest.mark.parametrize("damage", ["empty", "truncated", "altered", "foreign"])
def test_a_damaged_result_is_named_and_counts_as_absent(tmp_path, capsys, damage):
    path = tmp_path / "result.npz"
    save(path, SETTINGS, {"a": np.arange(1000.0)})
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    if damage == "altered":
        content[middle : middle + 4] = b"\xff\xff\xff\xff"
    parts = {"empty": b"", "truncated": content[:middle], "altered": content, "foreign": b"hello"}
    path.write_bytes(parts[damage])
    assert load(path, SETTINGS) is None
    assert "result.npz is damaged" in capsys.readouterr().err


def test_no_altered_byte_ends_in_a_traceback(tmp_path):
    path = tmp_path / "result.npz"
    save(path, SETTINGS, {"a": np.arange(3.0)})
    content = path.read_bytes()
    for place in range(len(content)):
        altered = bytearray(content)
        altered[place] ^= 0xFF
        path.write_bytes(altered)
        with contextlib.suppress(UserError):  # a byte of the settings
            load(path, SETTINGS)


def test_the_device_is_recorded_and_not_compared(tmp_path):
    path = tmp_path / "result.npz"
    save(path, SETTINGS | {"device": "cuda"}, {"a": np.ones(1)})
    assert load(path, SETTINGS | {"device": "cpu"})["a"] == 1


def test_results_are_saved_where_there_is_no_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    files.code_version.cache_clear()
    save(tmp_path / "result.npz", SETTINGS, {"a": np.ones(1)})
    found = read(tmp_path / "result.npz").made_with
    files.code_version.cache_clear()
    assert found["commit"] is None and found["torch"] == torch.__version__


def test_text_is_utf8_in_any_locale(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from experiment import files, launch;"
        "launch.run(lambda: (files.save_text(sys.argv[2], chr(966)), print(chr(966))))"
    )
    done = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", code, str(ROOT), str(tmp_path / "text")],
        env=os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"},
        capture_output=True,
    )
    assert (done.returncode, done.stdout) == (0, b"?\n"), done.stderr
    assert (tmp_path / "text").read_bytes() == "φ".encode()


def test_a_missing_result_is_none(tmp_path, capsys):
    assert load(tmp_path / "result.npz", SETTINGS) is None
    assert capsys.readouterr().err == ""


def test_a_write_that_fails_leaves_the_earlier_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    path.write_text("earlier")
    with pytest.raises(OSError), whole_file(path) as file:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_ends_with_a_sentence_and_leaves_earlier_results_whole(tmp_path, capsys):
    path = tmp_path / "a.npz"
    save(path, SETTINGS, {"a": np.ones(1)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(SystemExit):
            run(lambda: save(path, SETTINGS, {"a": np.ones(10_000)}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (
        f"{path}: File too large.\nEverything saved so far is complete" in capsys.readouterr().err
    )
    assert load(path, SETTINGS)["a"] == 1
    assert list(tmp_path.iterdir()) == [path]


def count(path, steps, bar=None, every=1):
    """Resume a run whose k-th step appends k², and a tensor that depends on the step before."""

    def start():
        return {"w": torch.ones(2)}

    def step(state):
        w = torch.tensor(state["w"]) * 1.1
        return files.appended(state | {"w": w}, square=int(state["steps"]) ** 2)

    return files.resume(path, SETTINGS, start, step, steps, bar or Bar(), every)


@pytest.mark.parametrize("every", [1, 3])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_arrays(tmp_path, every):
    whole = count(tmp_path / "whole.npz", 8, every=every)
    assert whole["square"].tolist() == [k * k for k in range(8)] and whole["steps"] == 8
    with pytest.raises(KeyboardInterrupt):
        count(tmp_path / "cut.npz", 8, Bar(updates=5), every)
    saved = load(tmp_path / "cut.npz", SETTINGS)
    assert saved["steps"] == (5 if every == 1 else 3)
    bar = Bar()
    resumed = count(tmp_path / "cut.npz", 8, bar, every)
    assert bar.n == 8
    for found in (resumed, load(tmp_path / "cut.npz", SETTINGS)):
        assert found.keys() == whole.keys()
        for key in whole:
            np.testing.assert_array_equal(found[key], whole[key])


def test_a_run_that_has_more_steps_than_asked_for_stays_as_it_is(tmp_path):
    path = tmp_path / "run.npz"
    count(path, 5)
    before, bar = path.read_bytes(), Bar()
    assert count(path, 3, bar)["steps"] == 5 and bar.n == 3
    assert path.read_bytes() == before
    assert files.load_steps(path, SETTINGS, 5)["steps"] == 5
    with pytest.raises(UserError, match="run.npz is missing or incomplete"):
        files.load_steps(path, SETTINGS, 6)


def test_a_run_that_is_behind_another_launch_does_not_overwrite_it(tmp_path):
    path = tmp_path / "run.npz"

    class Overtaken(Bar):
        def update(self, n=1):
            super().update(n)
            if self.n == 2:
                count(path, 6)

    assert count(path, 4, Overtaken())["steps"] == 4
    assert load(path, SETTINGS)["steps"] == 6


def test_json_has_null_for_what_is_not_finite(tmp_path):
    content = {1: np.float32(0.5), "a": [np.nan, np.inf, np.arange(2)], "b": (np.bool_(True), "φ")}
    files.save_json(tmp_path / "a.json", content)
    expected = {"1": 0.5, "a": [None, None, [0, 1]], "b": [True, "φ"]}
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == expected


def test_a_table_is_copied_between_its_markers_and_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "ROOT", tmp_path)
    page, table = tmp_path / "figures/README.md", tmp_path / "figures/a/table.md"
    files.save_text(table, "| new |\n")
    files.copy_into_page(table)
    assert not page.exists()
    text = "a\n<!-- figures/{}/table.md -->\n| {} |\n<!-- end -->\nz\n"
    files.save_text(page, text.format("b", "old") + text.format("a", "old"))
    files.copy_into_page(table)
    assert page.read_text() == text.format("b", "old") + text.format("a", "new")
