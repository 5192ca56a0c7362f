"""Where output goes, how it gets there whole, and what else the scripts share.

    python init_directory.py        # makes data/, logs/ and figures/; scripts make what they need

A result is an .npz file of arrays with the settings that made it, written to a temporary name and
then renamed: a file under its own name is complete. Nothing here is a pickle.

Under torchrun each rank does its share of the files, and rank 0 draws what all of them hold.
"""

import argparse
import contextlib
import datetime
import functools
import hashlib
import io
import json
import multiprocessing
import os
import subprocess
import sys
import time
import uuid
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
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
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
            for other in path.parent.glob(f"{path.name}.*.part"):
                if time.time() - other.stat().st_mtime > 3600:  # its process was killed
                    other.unlink()


def save(path, settings, **arrays):
    """Write arrays (or CPU tensors) and the settings that made them to the .npz file `path`."""
    torch = sys.modules.get("torch")
    now = {
        "threads": torch and torch.get_num_threads(),
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    about = {"settings": settings, "made_with": made_with() | now}
    with whole_file(path) as file:
        np.savez(file, about=json.dumps(about), **{k: np.asarray(v) for k, v in arrays.items()})


def load(path, settings):
    """Return the arrays that `save` wrote to `path` as a dict, or None where there are none.

    A damaged file is named on stderr and counts as absent, so that it is made again. Raises
    UserError if the file was made with other settings; `device` is recorded but not compared, so
    that what a GPU computed can be drawn anywhere.
    """
    path = Path(path)
    if not path.exists():
        return None
    content = path.read_bytes()  # an error of the disk is not a damaged file
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
        about = json.loads(str(arrays.pop("about")))
        found, made = dict(about["settings"]), about["made_with"]
    except Exception:  # zipfile and numpy raise many kinds
        print(f"{path} is damaged and counts as missing.", file=sys.stderr)
        return None
    wanted = json.loads(json.dumps(settings))
    differing = sorted(
        key
        for key in (found.keys() | wanted.keys()) - {"device"}
        if found.get(key) != wanted.get(key)
    )
    if differing:
        raise UserError(
            f"{path} was made with other settings ({', '.join(differing)}): "
            "move it away, or choose another --output."
        )
    if made.get("code") != made_with()["code"]:
        note(f"{path.parent} has results of other code, of commit {made.get('commit')}.")
    return arrays


@functools.cache  # once is enough
def note(sentence):
    """Print a sentence to stderr, in rank 0."""
    if rank_and_world()[0] == 0 and not multiprocessing.parent_process():
        print(sentence, file=sys.stderr)


def provenance(path):
    """Return what `save` wrote into the .npz file `path` of the code that made it."""
    with np.load(path, allow_pickle=False) as archive:
        return json.loads(str(archive["about"]))["made_with"]


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


@functools.cache
def made_with():
    """Return what a result depends on beside its settings: the code, its commit, and the libraries.

    The code is a hash of all scripts, which a change of other files leaves as it is.
    """
    scripts = [*ROOT.glob("*.py"), *ROOT.glob("learn-to-teleport/*.py")]
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(scripts)))
    command = ["git", "--no-optional-locks", "-C", ROOT, "describe", "--always", "--dirty"]
    try:
        git = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # there is no git
        git = ""
    torch = sys.modules.get("torch")
    return {
        "code": code.hexdigest()[:12],
        "commit": git or None,
        "python": sys.version.split()[0],
        "torch": torch and torch.__version__,
        "cpu": torch and torch.backends.cpu.get_cpu_capability(),
    }


def rank_and_world():
    """Return this process's rank and how many there are: 0 and 1, but under torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def mine(units):
    """Return this rank's share of a list, the same in all ranks, of what makes a file each."""
    rank, world = rank_and_world()
    return units[rank::world]


def wait_for_all():
    """Wait until all ranks are here. Raises UserError if another one has ended before."""
    if rank_and_world()[1] == 1:
        return
    from torch import distributed

    try:
        work = distributed.barrier(async_op=True)
        while not work.is_completed():  # work.wait() would not let Ctrl-C through
            time.sleep(0.05)
        work.wait()
    except RuntimeError:
        raise UserError("another rank has ended before its work was done.") from None


def progress(**options):
    """Return a progress bar, which only rank 0 shows."""
    from tqdm import tqdm

    return tqdm(disable=rank_and_world()[0] > 0, **options)


def at_least(least):
    """Return an argparse type: a whole number that is no less than `least`."""

    def whole_number(text):
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
        return int(text)

    return whole_number


def device(text):
    """An argparse type: a torch.device on which a tensor can be made here.

    cuda is the rank's own GPU of its machine.
    """
    import torch  # only where it is needed: a script without networks starts in half the time

    if text == "cuda":
        text = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        probe = torch.zeros(1, device=text)
        probe.cpu()
        return probe.device
    except (RuntimeError, AssertionError, NotImplementedError):
        raise argparse.ArgumentTypeError(f"there is no device {text!r} here; try cpu") from None


def experiment_parser(doc, on_datasets=True):
    """Return a parser with the options that all experiments have; doc: the script's docstring."""
    parser = argparse.ArgumentParser(
        description=doc.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--plot-only", action="store_true", help="draw and print again what logs/ has")
    add("--output", type=Path, default=ROOT, help="the folder for logs/ and the figures")
    if on_datasets:
        add("--sample", action="store_true", help="use the 1,000 images that ship with the code")
        add("--device", type=device, default="cpu", help="where to compute: cpu, cuda, cuda:1, …")
        add(
            "--data",
            type=Path,
            default=ROOT / "data",
            help="the datasets' folder; fetched if missing",
        )
    return parser


def compute_and_report(args, compute, report):
    """Let each rank compute(args) what logs/ lacks, then rank 0 report(args) what logs/ has."""
    if not args.plot_only:
        compute(args)
        wait_for_all()
    if rank_and_world()[0] == 0:
        report(args)


def load_finished(path, settings, finished):
    """Return what `load` does. Raises UserError where it is missing or not yet finished(arrays)."""
    arrays = load(path, settings)
    if arrays is None or not finished(arrays):
        raise UserError(f"{path} is missing or not finished: run without --plot-only first.")
    return arrays


def measure_all(names, asked, measure):
    """Return {name: measure(name)} of the names that logs/ has results of.

    Raises the UserError that `measure` raises for one of those `asked` for.
    """
    results = {}
    for name in names:
        try:
            results[name] = measure(name)
        except UserError:
            if name in asked:
                raise
    return results


def figures_folder(args, name, published):
    """Return figures/`name`, or with other settings than the `published` a folder named after them.

    published: {option: value}. So a run with other settings doesn't replace what is published here.
    """
    if args.sample:
        return args.output / "figures" / "sample" / name
    for option, value in published.items():
        chosen = vars(args)[option]
        if chosen != value:
            name += f"-{option}" if chosen is True else f"-{chosen}{option}"
    return args.output / "figures" / name


def markdown(header, rows):
    """Return a table in Markdown; header: a list of cells, text; rows: lists of such."""
    lines = [f"| {' | '.join(cells)} |\n" for cells in (header, *rows)]
    return "".join([lines[0], "|---" * len(header), "|\n", *lines[1:]])


def paired_difference(a, b):
    """Return the mean of a − b over runs, arrays [runs], with its 95 % interval (Student's t).

    Runs of which one is nan, since it diverged, are left out; of fewer than two all is None.
    """
    from scipy import stats

    difference = np.asarray(a, float) - np.asarray(b, float)
    difference = difference[~np.isnan(difference)]
    if len(difference) < 2:
        return dict.fromkeys(("mean", "low", "high"))
    mean = difference.mean()
    half = stats.t.ppf(0.975, len(difference) - 1) * stats.sem(difference)
    return {"mean": float(mean), "low": float(mean - half), "high": float(mean + half)}


def losses_after(epochs, loss, others):
    """Return {epoch: {test_loss: its mean over runs, minus_…: paired differences to others}}.

    loss: [epochs, runs], after each epoch; others: {name: such losses}.
    """
    after = {}
    for epoch in epochs:
        now = loss[epoch - 1]
        after[epoch] = {"test_loss": float(np.nanmean(now, dtype=float))} | {
            f"minus_{name}": paired_difference(now, other[epoch - 1])
            for name, other in others.items()
        }
    return after


def interval_text(difference):
    """Return what `paired_difference` returned as text."""
    if difference["low"] is None:
        return "–"
    return "{mean:+.4f} [{low:+.4f}, {high:+.4f}]".format(**difference)


def plot_interval(axes, x, mean, low, high, **style):
    """Plot a line with a band around it; all are [len(x)]."""
    (line,) = axes.plot(x, mean, **style)
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, lw=0)


def plot_band(axes, x, values, **style):
    """Plot the mean over runs of values: [len(x), runs], with a band of a standard deviation.

    Those that are nan are left out.
    """
    mean, deviation = np.nanmean(values, 1), np.nanstd(values, 1, ddof=1)
    plot_interval(axes, x, mean, mean - deviation, mean + deviation, **style)


def plot_difference(axes, x, values, reference, **style):
    """Plot the `paired_difference` of values and reference: [len(x), runs], with its interval."""
    rows = [paired_difference(*pair) for pair in zip(values, reference)]
    columns = (np.array([row[key] for row in rows], float) for key in ("mean", "low", "high"))
    plot_interval(axes, x, *columns, **style)


def run(main):
    """Call a script's `main`; a problem that the user can mend ends it with a sentence, status 2.

    An interrupt (Ctrl-C) ends it with status 130. Under torchrun the ranks are connected first.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without Greek letters is no reason
    made_with()  # now: the code may change while it runs
    name = Path(sys.argv[0]).name
    rank, world = rank_and_world()
    try:
        if world > 1:
            from torch import distributed

            name += f": rank {rank}"
            # gloo for GPUs, too: what ranks compute goes through files, and they only wait here
            distributed.init_process_group("gloo", timeout=datetime.timedelta(days=7))
        main()
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"{name}: {where}{error.strerror or error}.", file=sys.stderr)
        print("Whatever was saved is whole: mend this, and start again.", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if rank == 0:
            print("\nInterrupted. The same command goes on from what was saved.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run(init_directory)
