"""How a script runs: its options, its tasks in worker processes, and its errors as sentences."""

import argparse
import datetime
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import distributed
from tqdm import tqdm

from .results import ROOT, UserError, check_writable

RANK, WORLD = (int(os.environ.get(key, n)) for key, n in (("RANK", 0), ("WORLD_SIZE", 1)))

# Options


def whole_number(least):
    """Return an argparse type: a whole number from `least` to a million."""

    def parse(text):
        digits = text.isascii() and text.isdecimal() and len(text) < 8
        if not (digits and least <= int(text) <= 1_000_000):
            sentence = f"{text!r} is not a whole number from {least} to 1,000,000"
            raise argparse.ArgumentTypeError(sentence)
        return int(text)

    return parse


def device(text):
    """An argparse type: a torch.device on which a tensor can be made here."""
    text = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if text == "cuda" else text
    try:
        probe = torch.zeros(1, device=text)
        probe.cpu()  # a meta tensor has no values
        return probe.device
    except (RuntimeError, AssertionError, NotImplementedError):
        raise argparse.ArgumentTypeError(f"there is no device {text!r} here; try cpu") from None


def cores():
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class HelpFormatter(argparse.HelpFormatter):
    """Show the default of each option that has one; flags do not."""

    def _get_help_string(self, action):
        default = action.default
        if not default or default is argparse.SUPPRESS:
            return action.help
        default = " ".join(default) if isinstance(default, list | tuple) else default
        return f"{action.help} (default: {default})"


def experiment_parser(doc, on_images=True):
    """Return a parser with the options that experiments have in common.

    doc: the script's docstring. on_images: whether the experiment trains on a dataset's images; if
    not, it runs on the CPU, and a script whose tasks take long adds --processes itself.
    """
    summary = doc.split("\n\n")[0]
    parser = argparse.ArgumentParser(description=summary, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--plot-only", action="store_true", help="redraw figures and tables from saved results")
    add("--output", type=Path, default=ROOT, help="folder for logs/ and figures/")
    parser.set_defaults(sample=False, device=torch.device("cpu"))
    if on_images:
        add("--sample", action="store_true", help="use the 1,000 images that ship with the code")
        add("--device", type=device, default="cpu", help="where to compute: cpu, cuda, cuda:1, …")
        default = f"as many as there are cores, {cores()}; on a GPU one"
        add("--processes", type=whole_number(1), help=f"worker processes (default: {default})")
        add("--data", type=Path, default=ROOT / "data", help="datasets; missing ones are fetched")
    return parser


def figures_folder(args, defaults, root="figures"):
    """Return `root`, or a folder in it named after the options that differ from `defaults`.

    So a run with other options does not replace the results for the paper's settings. After a
    change of the settings in a script, --output does the same.
    """
    chosen = {option: vars(args)[option] for option in defaults}
    other = [
        option if value is True else f"{value}{option}"
        for option, value in chosen.items()
        if value != defaults[option]
    ]
    return args.output / root / ("sample" if args.sample else "") / "-".join(other)


# Tasks


def run_tasks(function, tasks, args, updates, unit):
    """Call function(task, args, bar) for each task. Tasks save what they compute in logs/.

    They run in `args.processes` worker processes with one thread each: by default as many as there
    are cores, on a GPU one. One alone is this process. Under torchrun each rank takes its share;
    rank 0 returns when all are done, and the other ranks end here, so a script calls this once.
    updates: how often a task calls bar.update(), each time for one `unit`: a number, or a list of
    one for each task.
    """
    check_writable(args.output / "logs")
    if WORLD > 1:  # gloo even for GPUs: ranks exchange files only, and wait for each other
        distributed.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    if args.device.type == "cpu":
        torch.set_num_threads(1)  # as in the workers: several threads round differently
    processes = args.processes or (cores() if args.device.type == "cpu" else 1)
    share = tasks[RANK::WORLD]
    updates = updates if isinstance(updates, list) else [updates] * len(tasks)
    with tqdm(total=sum(updates[RANK::WORLD]), unit=unit, disable=RANK > 0, mininterval=0.5) as bar:
        if processes == 1 or WORLD > 1:
            for task in share:
                function(task, args, bar)
        else:
            run_in_workers(function, share, args, bar, processes)
    if WORLD > 1:
        wait_for_ranks()
        if RANK > 0:
            sys.exit()


def wait_for_ranks():
    """Wait until all ranks are here. Raises UserError if one has ended before its work was done."""
    try:
        work = distributed.barrier(async_op=True)
        while not work.is_completed():  # work.wait() would not let Ctrl-C through
            time.sleep(0.1)
        work.wait()
    except RuntimeError:
        raise UserError("another rank has ended before its work was done.") from None


def run_in_workers(function, tasks, args, bar, processes):
    """Call function(task, args, bar) for each task in worker processes; raise their first error."""
    context = multiprocessing.get_context("spawn")
    count = context.Value("q", 0)  # of the updates of all workers
    pool = ProcessPoolExecutor(min(processes, len(tasks)), context, start_worker, (count,))
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: this process stops them
    try:
        pending = [pool.submit(call, function, task, args) for task in tasks]
    finally:
        signal.signal(signal.SIGINT, interrupt)
    try:
        while pending:
            done, pending = wait(pending, timeout=0.2)
            bar.update(count.value - bar.n)
            for future in done:
                future.result()
    except BrokenProcessPool:
        sentence = "a worker was killed, perhaps for lack of memory: choose fewer --processes."
        raise UserError(sentence) from None
    finally:
        for worker in multiprocessing.active_children():
            worker.kill()  # whatever it has saved is whole
        pool.shutdown(cancel_futures=True)


def start_worker(count):
    """Prepare a worker: it has one thread and ends with its parent."""
    global updates
    updates = count
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Windows processes do not inherit it
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    """Wait until the parent process has ended, killed or not, then end this one."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def call(function, task, args):
    """Call a task's function in a worker, with a bar that counts for the parent's."""

    def update(n=1):
        with updates.get_lock():
            updates.value += n

    function(task, args, SimpleNamespace(update=update))


# Errors


def run(main):
    """Call a script's `main`. A problem that the user can fix ends it with a sentence, status 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal may lack Greek letters
    try:
        main()
    except KeyboardInterrupt:
        print("\nInterrupted. Run the same command to resume.", file=sys.stderr)
        sys.exit(130)
    except UserError as error:
        problem = str(error)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        problem = f"{where}{error.strerror or error}. Fix this, then run the same command again."
    except (MemoryError, RuntimeError) as error:
        words = "out of memory", "can't allocate memory"  # of CUDA and of PyTorch on a CPU
        if not isinstance(error, MemoryError) and not any(w in str(error) for w in words):
            raise
        problem = "out of memory: choose fewer --runs or --processes."
    else:
        return
    print(f"{Path(sys.argv[0]).name}: {problem}", file=sys.stderr)
    sys.exit(2)
