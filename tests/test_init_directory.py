"""init_directory.py: results are whole or absent, and mistakes are sentences."""

import argparse
import contextlib
import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from scipy import stats

import init_directory as init_directory_module
from init_directory import (
    FOLDERS,
    ROOT,
    UserError,
    at_least,
    device,
    figures_folder,
    init_directory,
    load,
    made_with,
    mine,
    paired_difference,
    provenance,
    run,
    save,
    save_figure,
    whole_file,
)

SETTINGS = {"epochs": 3, "widths": (4, 2)}


def test_init_directory_makes_the_folders_and_may_run_twice(tmp_path):
    init_directory(tmp_path)
    init_directory(tmp_path)
    assert all((tmp_path / folder).is_dir() for folder in FOLDERS)


def test_a_saved_result_comes_back(tmp_path):
    path = tmp_path / "new" / "result.npz"
    save(path, SETTINGS, a=torch.arange(3.0), b=np.ones((2, 2)), seconds=1.5)
    arrays = load(path, SETTINGS)
    assert arrays.keys() == {"a", "b", "seconds"}
    assert arrays["a"].tolist() == [0, 1, 2] and float(arrays["seconds"]) == 1.5


def test_a_result_with_other_settings_is_refused(tmp_path):
    path = tmp_path / "result.npz"
    save(path, SETTINGS, a=np.ones(1))
    with pytest.raises(UserError, match=r"result.npz was made with other settings \(epochs\)"):
        load(path, SETTINGS | {"epochs": 4})


def test_a_result_of_other_code_is_named(tmp_path, capsys, monkeypatch):
    save(tmp_path / "result.npz", SETTINGS, a=np.ones(1))
    load(tmp_path / "result.npz", SETTINGS)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(init_directory_module, "made_with", lambda: {"code": "another"})
    for _ in range(2):
        load(tmp_path / "result.npz", SETTINGS)
    errors = capsys.readouterr().err
    assert errors.count("has results of other code, of commit ") == 1 and str(tmp_path) in errors


@pytest.mark.parametrize("damage", ["empty", "truncated", "altered", "foreign"])
def test_a_damaged_result_is_named_and_counts_as_absent(tmp_path, capsys, damage):
    path = tmp_path / "result.npz"
    save(path, SETTINGS, a=np.arange(1000.0))
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
    save(path, SETTINGS, a=np.arange(3.0))
    content = path.read_bytes()
    for place in range(len(content)):
        altered = bytearray(content)
        altered[place] ^= 0xFF
        path.write_bytes(altered)
        with contextlib.suppress(UserError):  # a byte of the settings
            load(path, SETTINGS)


def test_the_device_is_recorded_and_not_compared(tmp_path):
    path = tmp_path / "result.npz"
    save(path, SETTINGS | {"device": "cuda"}, a=np.ones(1))
    assert load(path, SETTINGS | {"device": "cpu"})["a"] == 1


def test_results_are_saved_where_there_is_no_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    made_with.cache_clear()
    save(tmp_path / "result.npz", SETTINGS, a=np.ones(1))
    found = provenance(tmp_path / "result.npz")
    made_with.cache_clear()
    assert found["commit"] is None and found["torch"] == torch.__version__


def test_text_is_utf8_in_any_locale(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import init_directory as i;"
        "i.run(lambda: (i.save_text(sys.argv[2], chr(966)), print(chr(966))))"
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
    path, left, others = (tmp_path / name for name in ("a.npz", "a.npz.1.part", "a.npz.2.part"))
    save(path, SETTINGS, a=np.ones(1))
    left.touch()
    os.utime(left, (0, 0))  # of a process that was killed long ago
    others.touch()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(SystemExit):
            run(lambda: save(path, SETTINGS, a=np.ones(10_000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{path}: File too large.\nWhatever was saved is whole" in capsys.readouterr().err
    assert load(path, SETTINGS)["a"] == 1
    assert set(tmp_path.iterdir()) == {path, others}


def test_a_rank_has_every_so_many_th_unit_and_its_own_gpu(monkeypatch):
    units = list(range(7))
    assert mine(units) == units
    monkeypatch.setenv("WORLD_SIZE", "3")
    shares = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(mine(units))
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]
    monkeypatch.setenv("LOCAL_RANK", "99")
    with pytest.raises(argparse.ArgumentTypeError, match="no device 'cuda:99' here"):
        device("cuda")


def test_a_figure_is_saved_as_pdf_and_png_and_is_the_same_bytes_again(tmp_path):
    figure = Figure()
    figure.subplots().plot([1, 2])
    for name in ("one", "two"):
        save_figure(figure, tmp_path / name)
    assert (tmp_path / "one.pdf").read_bytes().startswith(b"%PDF")
    for suffix in ("pdf", "png"):
        assert (tmp_path / f"one.{suffix}").read_bytes() == (
            tmp_path / f"two.{suffix}"
        ).read_bytes()


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (UserError("the file is gone: fetch it."), 2, "the file is gone: fetch it."),
        (OSError(errno.ENOSPC, "No space left on device", "logs/a"), 2, "logs/a: No space left"),
        (KeyboardInterrupt(), 130, "The same command goes on"),
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


@pytest.mark.parametrize("text", ["0", "-3", "2.5", "many", ""])
def test_a_count_below_the_least_is_refused(text):
    assert at_least(1)("7") == 7
    with pytest.raises(argparse.ArgumentTypeError, match="not a whole number of 1 or more"):
        at_least(1)(text)


@pytest.mark.parametrize("text", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(text):
    assert device("cpu") == torch.device("cpu")
    with pytest.raises(argparse.ArgumentTypeError, match=f"no device '{text}' here"):
        device(text)


def test_other_settings_than_the_published_have_a_folder_of_their_own():
    published = {"runs": 100, "sphere": False}

    def folder(**changes):
        args = published | {"output": Path("out"), "sample": False} | changes
        return figures_folder(argparse.Namespace(**args), "correlation", published)

    assert folder() == Path("out/figures/correlation")
    assert folder(runs=20) == Path("out/figures/correlation-20runs")
    assert folder(sphere=True) == Path("out/figures/correlation-sphere")
    assert folder(runs=20, sample=True) == Path("out/figures/sample/correlation")


def test_paired_difference_is_students():
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 12))
    found = paired_difference(a, b)
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert found["mean"] == pytest.approx((a - b).mean())
    assert [found["low"], found["high"]] == pytest.approx([expected.low, expected.high])
    assert paired_difference(a, a) == {"mean": 0, "low": 0, "high": 0}
    a[3] = np.nan
    kept = np.arange(12) != 3
    assert paired_difference(a, b) == paired_difference(a[kept], b[kept])
    assert paired_difference(a[2:4], b[2:4]) == {"mean": None, "low": None, "high": None}
