"""experiment/results.py: results are whole or missing, runs resume, settings are compared."""

import contextlib
import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from conftest import bar_until
from experiment import results
from experiment.results import ROOT, Log, Result, UserError
from experiment.run import run

SETTINGS = {"epochs": 3, "widths": (4, 2)}


@pytest.fixture
def log(tmp_path):
    return Log(tmp_path / "new" / "result.npz", SETTINGS, (__file__,))


def save(log, **arrays):
    results.save(log.path, Result(arrays, log.settings, results.provenance(log.code)))


def count(log, steps, bar=None, every=1):
    """Resume a run whose k-th step appends k², and a tensor that depends on the step before."""

    def step(state):
        w = torch.tensor(state["w"]) * 1.1
        return results.append(state | {"w": w}, square=torch.tensor(int(state["steps"]) ** 2))

    return results.resume(
        log, lambda: {"w": torch.ones(2)}, step, steps, bar or bar_until(99), every
    )


# Files


def test_a_saved_result_comes_back(log):
    contents = []
    for _ in range(2):
        save(log, a=torch.arange(3.0), b=np.ones((2, 2)), seconds=1.5)
        contents.append(log.path.read_bytes())
    assert contents[0] == contents[1]
    result = results.load(log)
    assert result.arrays.keys() == {"a", "b", "seconds"}
    assert result.arrays["a"].tolist() == [0, 1, 2] and float(result.arrays["seconds"]) == 1.5
    assert result.settings == {"epochs": 3, "widths": [4, 2]}
    assert result.made_with["torch"] == torch.__version__ and len(result.made_with["code"]) == 1


def test_a_result_with_other_settings_is_refused_and_the_settings_are_named(log):
    save(log, a=np.ones(1))
    other = log._replace(settings=SETTINGS | {"epochs": 4, "device": "cuda"})
    with pytest.raises(UserError, match=r"result.npz was made with different settings \(epochs\)"):
        results.load(other)


@pytest.mark.parametrize("damage", ["empty", "truncated", "altered", "array", "no about"])
def test_a_damaged_or_foreign_file_is_named_and_counts_as_missing(log, capsys, damage):
    save(log, a=np.arange(1000.0))
    content = bytearray(log.path.read_bytes())
    half = content[: len(content) // 2]
    content[len(content) // 2] ^= 0xFF
    parts = {"empty": b"", "truncated": half, "altered": content}
    if damage in parts:
        log.path.write_bytes(parts[damage])
    else:
        with open(log.path, "wb") as file:
            np.save(file, np.ones(1)) if damage == "array" else np.savez(file, a=np.ones(1))
    assert results.load(log) is None
    assert "result.npz is damaged" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"result.npz is missing: run without --plot-only"):
        results.read_all(log.path.parent, ["result"], required=["result"])


def test_no_altered_byte_ends_in_a_traceback(log):
    save(log, a=np.arange(3.0))
    content = log.path.read_bytes()
    for place in range(len(content)):
        altered = bytearray(content)
        altered[place] ^= 0xFF
        log.path.write_bytes(altered)
        with contextlib.suppress(UserError):  # a byte of the settings
            results.load(log)


def test_a_missing_result_is_none_or_is_asked_for(log, capsys):
    assert results.load(log) is None and capsys.readouterr().err == ""
    save(log, a=np.ones(1))
    saved = results.read_all(log.path.parent, ["result", "other"], required=["result"])
    assert list(saved) == ["result"]
    with pytest.raises(UserError, match=r"other.npz is missing: run without --plot-only"):
        results.read_all(log.path.parent, ["result", "other"], required=["other"])


def test_a_write_that_fails_leaves_the_earlier_file_and_no_other(log, capsys, monkeypatch):
    """As on a full disk."""

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    save(log, a=np.ones(1))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as end:
        run(lambda: save(log, a=np.ones(10_000)))
    assert end.value.code == 2
    assert f"{log.path}: No space left on device. Fix this" in capsys.readouterr().err
    assert results.load(log).arrays["a"] == 1
    assert list(log.path.parent.iterdir()) == [log.path]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as error:
        results.check_writable(tmp_path / "file" / "folder")
    assert error.value.filename == str(tmp_path / "file" / "folder")
    results.check_writable(tmp_path / "new" / "folder")
    assert not list((tmp_path / "new" / "folder").iterdir())


def test_json_has_null_for_what_is_not_finite(tmp_path):
    content = {1: np.float32(0.5), "a": [np.nan, np.inf, np.arange(2)], "b": (np.bool_(True), "φ")}
    results.save_json(tmp_path / "a.json", content)
    expected = {"1": 0.5, "a": [None, None, [0, 1]], "b": [True, "φ"]}
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == expected


def test_text_is_utf8_in_any_locale(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from experiment import results, run;"
        "run.run(lambda: (results.save_text(sys.argv[2], chr(966)), print(chr(966))))"
    )
    done = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", code, str(ROOT), str(tmp_path / "text")],
        env=os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"},
        capture_output=True,
    )
    assert (done.returncode, done.stdout) == (0, b"?\n"), done.stderr
    assert (tmp_path / "text").read_bytes() == "φ".encode()


# Runs


@pytest.mark.parametrize("every", [1, 3])
def test_an_interrupted_run_resumes_and_ends_with_the_same_arrays(log, tmp_path, every):
    whole = count(log, 8, every=every)
    assert whole["square"].tolist() == [k * k for k in range(8)] and whole["steps"] == 8
    cut = log._replace(path=tmp_path / "cut.npz")
    with pytest.raises(KeyboardInterrupt):
        count(cut, 8, bar_until(5), every)
    assert results.load(cut).arrays["steps"] == (5 if every == 1 else 3)
    bar = bar_until(99)
    resumed = count(cut, 8, bar, every)
    assert bar.n == 8
    for arrays in (resumed, results.load(cut).arrays):
        assert arrays.keys() == whole.keys()
        for key in whole:
            np.testing.assert_array_equal(arrays[key], whole[key])


def test_a_run_with_more_steps_than_asked_for_stays_as_it_is(log):
    count(log, 5)
    before, bar = log.path.read_bytes(), bar_until(99)
    assert count(log, 3, bar)["steps"] == 5 and bar.n == 3
    assert log.path.read_bytes() == before
    assert results.load(log, 5).arrays["steps"] == 5
    with pytest.raises(UserError, match="result.npz is missing or incomplete"):
        results.load(log, 6)


def test_results_of_other_code_are_named_and_keep_all_versions_that_worked_on_them(
    log, tmp_path, capsys
):
    script = tmp_path / "script.py"
    log = log._replace(code=(str(script),))
    versions = []
    for k, code in enumerate(("a = 1", "a = 2"), 1):
        script.write_text(code)
        results.version_of.cache_clear()
        versions.append(results.version_of(log.code))
        results.warn_of_other_code([log, log._replace(path=tmp_path / "missing.npz")])
        count(log, 2 * k)
    assert results.load(log).made_with["code"] == versions and len(set(versions)) == 2
    message = f"{log.path.parent} has results of another version of the code; using them. "
    message += "To compute anew, move it away, or choose another --output.\n"
    assert capsys.readouterr().err == message


def test_results_are_saved_where_there_is_no_git(log, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    results.environment.cache_clear()
    save(log, a=np.ones(1))
    results.environment.cache_clear()
    assert results.load(log).made_with["commit"] is None
