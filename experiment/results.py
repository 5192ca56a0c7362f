"""Results on disk: .npz files of arrays, each with the settings and the code that made it.

A file is written under a temporary name and renamed when it is complete, so a file under its own
name is whole. Nothing is pickled.
"""

import contextlib
import functools
import hashlib
import io
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
CORE = "data.py", "models.py", "teleportation.py", "parameter_symmetries/ascent.py"


class UserError(Exception):
    """A problem that the user can fix; a script prints it as one sentence, without a traceback."""


class Result(NamedTuple):
    """Arrays, the settings that determine them, and what computed them."""

    arrays: dict
    settings: dict
    made_with: dict


class Log(NamedTuple):
    """A file in logs/, the settings that determine it, and the code that computes it."""

    path: Path
    settings: dict
    code: tuple  # of files: the script, and what it imports beside the CORE


@contextlib.contextmanager
def whole_file(path, mode="wb"):
    """Open `path` for writing. The file appears, whole, when the block ends without an error."""
    path = Path(path)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        error.filename = str(path)  # the name that the user knows
        raise
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def check_writable(folder):
    """Make a folder and try to write there. Raises OSError, naming the folder, if that fails."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        error.filename = str(folder)
        raise


def save_text(path, text):
    """Write a text file."""
    with whole_file(path, "w") as file:
        file.write(text)


def save_json(path, content):
    """Write nested dicts and lists of numbers, strings and arrays as JSON; NaN becomes null."""

    def plain(value):
        if isinstance(value, dict):
            return {str(key): plain(entry) for key, entry in value.items()}
        if isinstance(value, np.ndarray | np.generic):
            return plain(value.tolist())
        if isinstance(value, list | tuple):
            return [plain(entry) for entry in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    save_text(path, json.dumps(plain(content), indent=1, ensure_ascii=False) + "\n")


def save_summaries(path, saved, summaries):
    """Write summaries, {name: dict}, as JSON, each with what the Result of its name is made with.

    saved: {name: Result}; a summary of all of them has a name of its own.
    """
    about = {name: {"settings": r.settings, "made_with": r.made_with} for name, r in saved.items()}
    save_json(path, {name: about.get(name, {}) | entry for name, entry in summaries.items()})


def as_arrays(values):
    """Return a dict of numbers, arrays and tensors on any device as a dict of NumPy arrays."""
    return {
        key: value.detach().cpu().numpy() if torch.is_tensor(value) else np.asarray(value)
        for key, value in values.items()
    }


def save(path, result):
    """Write a Result to the .npz file `path`."""
    about = json.dumps({"settings": result.settings, "made_with": result.made_with})
    with whole_file(path) as file:
        np.savez(file, about=about, **as_arrays(result.arrays))


def read(path):
    """Return the Result in the .npz file `path`, or None if the file is missing or damaged."""
    path = Path(path)
    if not path.exists():
        return None
    content = path.read_bytes()  # an error of the disk is not a damaged file
    try:
        arrays = dict(np.load(io.BytesIO(content), allow_pickle=False))
        return Result(arrays, **json.loads(str(arrays.pop("about"))))
    except Exception:  # zipfile and NumPy raise many kinds
        print(f"{path} is damaged and is treated as missing.", file=sys.stderr)
        return None


def read_all(folder, names, required):
    """Return {name: Result} for the files <name>.npz in a folder.

    Raises UserError if one of the `required` names is missing or damaged.
    """
    saved = {name: read(folder / f"{name}.npz") for name in names}
    for name in required:
        if saved[name] is None:
            raise UserError(f"{folder / name}.npz is missing: run without --plot-only.")
    return {name: result for name, result in saved.items() if result}


def load(log, steps=0):
    """Return the Result of a Log, or None if its file is missing or damaged.

    Raises UserError if other settings made the file, or if it has fewer steps than asked for.
    """
    result = read(log.path)
    if result:
        saved, wanted = result.settings, json.loads(json.dumps(log.settings))
        keys = (saved | wanted).keys() - {"device"}  # what a GPU computed can be used anywhere
        if differing := sorted(key for key in keys if saved.get(key) != wanted.get(key)):
            raise UserError(
                f"{log.path} was made with different settings ({', '.join(differing)}): "
                "move it away, or choose another --output."
            )
    if steps and (result is None or result.arrays["steps"] < steps):
        raise UserError(f"{log.path} is missing or incomplete: run the same command again.")
    return result


def resume(log, start, step, steps, bar, every=1):
    """Compute a result step by step, from where its Log has it, and return the last state.

    A state is a dict of arrays. start() returns the first and step(state) the next one, which may
    depend on nothing else, so that an interrupted run ends with the same numbers. The state is
    saved every `every` steps and at the end; its entry `steps` counts them. Each updates `bar`.
    """
    result, made_with = load(log), provenance(log.code)
    if result is None:
        state = as_arrays(start()) | {"steps": np.array(0)}
    else:
        state = result.arrays
        versions = [*result.made_with["code"], *made_with["code"]]
        made_with["code"] = list(dict.fromkeys(versions))  # all that worked on it, in order
    first = int(state["steps"])
    bar.update(min(first, steps))
    for done in range(first + 1, steps + 1):
        state = as_arrays(step(state)) | {"steps": np.array(done)}
        if done % every == 0 or done == steps:
            save(log.path, Result(state, log.settings, made_with))
        bar.update()
    return state


def append(state, **rows):
    """Return a state whose arrays `rows` have grown by one row each."""
    rows = {key: row[None] for key, row in as_arrays(rows).items()}
    grown = {key: np.concatenate([state[key], row]) for key, row in rows.items() if key in state}
    return state | rows | grown


def warn_of_other_code(logs):
    """Say on stderr which folders hold results that another version of the code computed."""
    folders = set()
    for log in logs:
        # what is missing or damaged is computed anew
        with contextlib.suppress(Exception), np.load(log.path) as file:
            about = json.loads(str(file["about"]))  # and not the arrays, which may be large
            if about["made_with"]["code"] != [version_of(log.code)]:
                folders.add(log.path.parent)
    for folder in sorted(folders):
        print(
            f"{folder} has results of another version of the code; using them. "
            "To compute anew, move it away, or choose another --output.",
            file=sys.stderr,
        )


@functools.cache
def environment():
    """Return what results depend on besides their settings and the code."""
    command = ["git", "--no-optional-locks", "-C", ROOT, "describe", "--always", "--dirty"]
    commit = None
    with contextlib.suppress(OSError):  # there may be no git
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    return {
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


@functools.cache
def version_of(code):
    """Return a hash of some files and of the CORE, which determine a result."""
    paths = [*(ROOT / name for name in CORE), *map(Path, code)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:12]


def provenance(code):
    """Return what computes a result now: the `environment`, and a list with the `version_of` code.

    code: the files that compute it, beside the CORE.
    """
    return environment() | {"code": [version_of(code)]}
