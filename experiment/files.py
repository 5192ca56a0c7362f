"""Results on disk: whole files, with their settings and the code that made them.

A result is an .npz file of arrays. Its entry "about" is JSON: the settings that made it, the code,
libraries and processor (`made_with`), and a checksum. It is written to a temporary name and then
renamed, so a file under its own name is complete. Nothing here is a pickle.
"""

import contextlib
import functools
import glob
import hashlib
import io
import json
import math
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import ROOT

HOST = re.sub(r"\W", "-", platform.node()) or "host"


class UserError(Exception):
    """An error that the user can fix. `launch.run` shows it as a sentence, without a traceback."""


class Result(NamedTuple):
    """What `save` wrote to a file."""

    arrays: dict
    settings: dict
    made_with: dict


def is_left_over(part):
    """Return whether a temporary file is of a process of this machine that has ended."""
    *_, host, process, _, _ = part.name.split(".")
    if host != HOST or os.name != "posix":
        return False
    try:
        os.kill(int(process), 0)  # sends nothing
    except ProcessLookupError:
        return True
    except (PermissionError, ValueError, OverflowError):  # another user's, or not one of ours
        pass
    return False


@contextlib.contextmanager
def whole_file(path, mode="wb"):
    """Open `path` for writing so that it appears whole or not at all; makes its folder."""
    path = Path(path)
    part = path.with_name(f"{path.name}.{HOST}.{os.getpid()}.{uuid.uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # what processes that were killed left of this file
        for other in filter(is_left_over, path.parent.glob(f"{glob.escape(path.name)}.*.part")):
            other.unlink(missing_ok=True)
        with open(part, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        error.filename = str(path)  # the user knows this name
        raise
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def check_writable(folder):
    """Make a folder and try to write there. Raises OSError, naming the folder, if that fails."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        error.filename = str(folder)
        raise


def save_text(path, text):
    """Write a text file whole."""
    with whole_file(path, "w") as file:
        file.write(text)


def save_json(path, content):
    """Write dicts, lists, arrays and numbers as JSON; numbers that are not finite become null."""

    def plain(value):
        if isinstance(value, dict):
            return {str(key): plain(entry) for key, entry in value.items()}
        if isinstance(value, np.ndarray | np.generic):
            return plain(value.tolist())
        if isinstance(value, list | tuple):
            return [plain(entry) for entry in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    save_text(path, json.dumps(plain(content), indent=1, ensure_ascii=False) + "\n")


def copy_into_page(table):
    """Copy the file `table` to figures/README.md, where <!-- its path --> and <!-- end --> are."""
    page, table = ROOT / "figures" / "README.md", Path(table).resolve()
    if page.exists() and table.is_relative_to(ROOT):
        begin, end = f"<!-- {table.relative_to(ROOT).as_posix()} -->\n", "<!-- end -->\n"
        before, marker, rest = page.read_text("utf-8").partition(begin)
        if marker:
            after = rest.partition(end)[2]
            save_text(page, before + begin + table.read_text("utf-8") + end + after)


def as_arrays(values):
    """Return a dict of numbers, arrays and tensors on any device as one of NumPy's arrays."""
    return {
        key: np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
        for key, value in values.items()
    }


def save(path, settings, arrays, provenance=None):
    """Write arrays (or tensors) and the settings that made them to the .npz file `path`.

    provenance: the `made_with` of what they were computed from, if that was other code.
    """
    arrays = as_arrays(arrays)
    about = {"settings": settings, "made_with": provenance or made_with()}
    about["checksum"] = checksum(arrays, about["settings"])
    with whole_file(path) as file:
        np.savez(file, about=json.dumps(about), **arrays)


def checksum(arrays, settings):
    """Return the SHA-256 of arrays, with their names, types and shapes, and of settings."""
    content = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for key, value in sorted(arrays.items()):
        content.update(f"{key} {value.dtype} {value.shape}".encode())
        content.update(np.ascontiguousarray(value))
    return content.hexdigest()


def read(path):
    """Return the Result in the .npz file `path`, or None where there is none.

    A damaged file is named on stderr and counts as missing, so that it is made again.
    """
    path = Path(path)
    if not path.exists():
        return None
    content = path.read_bytes()  # an error of the disk is not a damaged file
    try:
        arrays = dict(np.load(io.BytesIO(content), allow_pickle=False))
        about = json.loads(str(arrays.pop("about")))
        if about["checksum"] != checksum(arrays, about["settings"]):
            raise ValueError("altered")
        return Result(arrays, about["settings"], about["made_with"])
    except Exception:  # zipfile and numpy raise many kinds
        print(f"{path} is damaged and will be treated as missing.", file=sys.stderr)
        return None


def made_with_of(path):
    """Return the `made_with` of the .npz file `path`, without reading its arrays."""
    with np.load(path, allow_pickle=False) as archive:
        return json.loads(str(archive["about"]))["made_with"]


def load(path, settings):
    """Return the arrays in the .npz file `path` as a dict, or None as `read` does.

    Raises UserError if the file was made with different settings. `device` is recorded but not
    compared, so that what a GPU computed can be used anywhere. A file made by other code is used,
    with a warning.
    """
    if (result := read(path)) is None:
        return None
    found, wanted = result.settings, json.loads(json.dumps(settings))
    keys = (found.keys() | wanted.keys()) - {"device"}
    differing = sorted(key for key in keys if found.get(key) != wanted.get(key))
    if differing:
        other = f"{path} was made with different settings ({', '.join(differing)})"
        raise UserError(f"{other}: move it away, or choose another --output.")
    if result.made_with.get("code") != code_version()[0]:
        warn_once(
            f"{path.parent} contains results from another version of the code; using them. "
            "If what has changed bears on them, move the folder away or choose another --output."
        )
    return result.arrays


def load_steps(path, settings, steps):
    """Return what `resume` saved after `steps` steps or more. Raises UserError before that."""
    state = load(path, settings)
    if state is None or state["steps"] < steps:
        raise UserError(f"{path} is missing or incomplete: run the same command again.")
    return state


def steps_saved(path):
    """Return how many steps of a run the file `path` has: another launch may be ahead."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return int(archive["steps"])
    except Exception:  # there is none, or it is damaged
        return 0


def resume(path, settings, start, step, steps, bar, every=1):
    """Do a run of `steps` steps, from where the file `path` has it; return its final state.

    start() returns the state before the first step, and step(state) the state after one more: dicts
    of arrays, in which `steps` is how many were done. The state is all that a step may depend on,
    so an interrupted run ends with the same numbers. It is saved every `every` steps and at the
    end. bar: a progress bar, updated by each step.
    """
    state = load(path, settings)
    if state is None:
        Path(path).unlink(missing_ok=True)  # a damaged one
        state = as_arrays(start()) | {"steps": 0}
    first = int(state["steps"])
    bar.update(min(first, steps))
    for done in range(first + 1, steps + 1):
        state = as_arrays(step(state)) | {"steps": done}
        if (done % every == 0 or done == steps) and done > steps_saved(path):
            save(path, settings, state)
        bar.update()
    return state


def appended(state, **rows):
    """Return a state with one row more in each array named; where there is none it is the first."""
    rows = {key: row[None] for key, row in as_arrays(rows).items()}
    return state | {
        key: np.concatenate([state[key], row]) if key in state else row for key, row in rows.items()
    }


@functools.cache  # once is enough
def warn_once(sentence):
    """Print a sentence to stderr, in the main process of rank 0."""
    if int(os.environ.get("RANK", 0)) == 0 and not multiprocessing.parent_process():
        print(sentence, file=sys.stderr)


@functools.cache
def code_version():
    """Return a hash of all scripts, and of nothing else, and the commit: (code, commit or None)."""
    folders = ROOT, ROOT / "experiment", ROOT / "learn-to-teleport"
    scripts = sorted(path for folder in folders for path in folder.glob("*.py"))
    code = hashlib.sha256(b"".join(path.read_bytes() for path in scripts)).hexdigest()[:12]
    command = ["git", "--no-optional-locks", "-C", ROOT, "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError):  # there may be no git
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        return code, commit or None
    return code, None


def made_with():
    """Return what a result depends on beside its settings: code, libraries, processor, date."""
    torch, (code, commit) = sys.modules.get("torch"), code_version()
    return {
        "code": code,
        "commit": commit,
        "python": sys.version.split()[0],
        "torch": torch and torch.__version__,
        "cpu": torch and torch.backends.cpu.get_cpu_capability(),
        "threads": torch and torch.get_num_threads(),
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
