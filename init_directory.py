"""Where output goes, and how it gets there whole.

    python init_directory.py        # makes data/, logs/ and figures/; every script also does so

A result is an .npz file of arrays with the settings that made it, written to a temporary name and
then renamed: a file under its own name is complete. Nothing here is a pickle.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
import uuid
import zipfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent
FOLDERS = ("data", "logs", "figures", "learn-to-teleport/figures")


class UserError(Exception):
    """Something the user can mend. `run` shows it as one sentence, without a traceback."""


def init_directory(root=ROOT):
    """Make the folders that data, results and figures go to."""
    for folder in FOLDERS:
        (Path(root) / folder).mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def whole_file(path, mode="wb"):
    """Open `path` for writing so that it appears whole or not at all; makes its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        with open(part, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save(path, settings, **arrays):
    """Write arrays (or CPU tensors) and the settings that made them to the .npz file `path`."""
    about = {"settings": settings, "made_with": made_with()}
    with whole_file(path) as file:
        np.savez(file, about=json.dumps(about), **{k: np.asarray(v) for k, v in arrays.items()})


def load(path, settings):
    """Return the arrays that `save` wrote to `path` as a dict, or None where there are none.

    A damaged file is named on stderr and counts as absent, so that it is made again.
    Raises UserError if the file was made with other settings.
    """
    path = Path(path)
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
        found = json.loads(str(arrays.pop("about")))["settings"]
    except (zipfile.BadZipFile, EOFError, ValueError, KeyError, TypeError):
        print(f"{path} is damaged; its work is done again.", file=sys.stderr)
        return None
    wanted = json.loads(json.dumps(settings))
    if found != wanted:
        differing = sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))
        raise UserError(
            f"{path} was made with other settings ({', '.join(differing)}): "
            "move it away, or choose another --output."
        )
    return arrays


def save_text(path, text):
    """Write a text file whole."""
    with whole_file(path, "w") as file:
        file.write(text)


def save_figure(figure, path):
    """Write a matplotlib figure as `path`.pdf and `path`.png."""
    for suffix in ("pdf", "png"):
        with whole_file(f"{path}.{suffix}") as file:
            # no date in the file: the same figure is the same bytes
            metadata = {"CreationDate": None} if suffix == "pdf" else None
            figure.savefig(file, format=suffix, dpi=150, bbox_inches="tight", metadata=metadata)


def made_with():
    """Return what a result depends on beside its settings: code, libraries and time."""
    git = subprocess.run(
        ["git", "-C", ROOT, "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
    )
    torch = sys.modules.get("torch")
    return {
        "commit": git.stdout.strip() or None,
        "python": sys.version.split()[0],
        "torch": torch and torch.__version__,
        "threads": torch and torch.get_num_threads(),
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def at_least(least):
    """Return an argparse type: a whole number that is no less than `least`."""

    def whole_number(text):
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
        return int(text)

    return whole_number


def device(text):
    """An argparse type: a torch.device on which a tensor can be made here."""
    import torch  # only where it is needed: a script without networks starts in half the time

    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError):
        raise argparse.ArgumentTypeError(f"there is no device {text!r} here; try cpu") from None


def run(main):
    """Call a script's `main`; a problem that the user can mend ends it with a sentence, status 2.

    An interrupt (Ctrl-C) ends it with status 130.
    """
    try:
        main()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"{Path(sys.argv[0]).name}: {where}{error.strerror or error}.", file=sys.stderr)
        print(
            "What was finished is kept: mend this, and the same command goes on.", file=sys.stderr
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from here.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run(init_directory)
