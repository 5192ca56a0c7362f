"""How a script runs: its options, its ranks, the order of its work, its errors.

Under torchrun each rank computes its share of the files in logs/, and rank 0 reports on all.
"""

import argparse
import datetime
import multiprocessing
import os
import re
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

from . import PARENT, end_quietly, files
from .files import ROOT, UserError


def rank_and_world():
    """Return this process's rank and how many there are: 0 and 1, but under torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def share_of_rank(units):
    """Return this rank's share, every world-th, of a list that is the same in all ranks."""
    rank, world = rank_and_world()
    return units[rank::world]


def wait_for_ranks():
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


def progress_bar(total, unit, desc=None):
    """Return a tqdm progress bar over `total` units, which only rank 0 shows."""
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, desc=desc, disable=rank_and_world()[0] > 0, mininterval=0.5)


def cores():
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def start_worker(count):
    """Prepare a worker process, which is single-threaded; count: what `add_to_count` adds to."""
    import torch

    global count_of_worker
    count_of_worker = count
    torch.set_num_threads(1)
    files.code_version()  # now: the code may change while it runs


def add_to_count(n=1):
    """Update the progress bar of a worker process, which its parent shows."""
    with count_of_worker.get_lock():
        count_of_worker.value += n


def do_tasks(function, tasks, total, unit, processes):
    """Call function(*task, bar) for each of a list of tasks, which save what they find.

    That is in worker processes, each with one thread; under torchrun the ranks are the processes,
    and `tasks` this rank's. total: of the units that the bar's updates count. Raises the first
    error that a task raised, or UserError where a worker was killed; all workers end with this.
    """
    if rank_and_world()[1] > 1:
        with progress_bar(total, unit) as bar:
            for task in tasks:
                function(*task, bar)
        return
    context = multiprocessing.get_context("spawn")
    count, bar_of_worker = context.Value("q", 0), SimpleNamespace(update=add_to_count)
    os.environ[PARENT] = str(os.getpid())
    executor = ProcessPoolExecutor(processes, context, start_worker, (count,))
    # the workers inherit that they ignore Ctrl-C: this process stops them
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        pending = [executor.submit(function, *task, bar_of_worker) for task in tasks]
    finally:
        signal.signal(signal.SIGINT, handler)
        del os.environ[PARENT]
    try:
        with progress_bar(total, unit) as bar:
            while pending:
                done, pending = wait(pending, timeout=0.2)
                bar.update(count.value - bar.n)
                for future in done:
                    future.result()
    except BrokenProcessPool:
        raise UserError("a worker process was killed, possibly out of memory.") from None
    finally:
        for worker in multiprocessing.active_children():
            worker.kill()  # what it has saved is whole
        executor.shutdown(cancel_futures=True)


def at_least(least):
    """Return an argparse type: a whole number from `least` to a million, in ASCII digits."""

    def whole_number(text):
        if not re.fullmatch("[0-9]{1,7}", text) or not least <= int(text) <= 1_000_000:
            message = f"{text!r} is not a whole number from {least} to 1,000,000"
            raise argparse.ArgumentTypeError(message)
        return int(text)

    return whole_number


def device(text):
    """An argparse type: a torch.device on which a tensor can be made here."""
    import torch  # only where it is needed: a script without networks starts in half the time

    if text == "cuda":  # the rank's own GPU of its machine
        text = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        probe = torch.zeros(1, device=text)
        probe.cpu()
        return probe.device
    except (RuntimeError, AssertionError, NotImplementedError):
        raise argparse.ArgumentTypeError(f"there is no device {text!r} here; try cpu") from None


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show an option's default where it says something: not of flags, and not None."""

    def _get_help_string(self, action):
        says_nothing = action.default is None or action.default is False
        return action.help if says_nothing else super()._get_help_string(action)


def experiment_parser(doc, on_datasets=True):
    """Return a parser with the options that all experiments have; doc: the script's docstring."""
    summary = doc.split("\n\n")[0]
    parser = argparse.ArgumentParser(description=summary, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--plot-only", action="store_true", help="redraw figures and tables from saved results")
    add("--output", type=Path, default=ROOT, help="folder for logs/ and figures/")
    if on_datasets:
        add("--sample", action="store_true", help="use the 1,000 images that ship with the code")
        add("--device", type=device, default="cpu", help="where to compute: cpu, cuda, cuda:1, …")
        add("--data", type=Path, default=ROOT / "data", help="datasets; missing ones are fetched")
    return parser


def figures_folder(args, name, defaults):
    """Return figures/`name`, named further after the options that are not at their defaults.

    defaults: {option: value}. So a run with other settings doesn't replace what ships here, and
    all parts that are in a folder were made with the same. The sample's are in figures/sample/.
    """
    for option, default in defaults.items():
        if (chosen := vars(args)[option]) != default:
            name += f"-{option}" if chosen is True else f"-{chosen}{option}"
    return args.output / "figures" / ("sample" if args.sample else "") / name


def compute_and_report(args, folder, parts, asked, compute, collect, summarise, table, draw):
    """Do a script's work on the parts `asked` for: datasets, or optimizers on them.

    compute(args), in each rank, makes what logs/ lacks; None where that takes seconds. Then rank 0
    saves results, `folder`/<part>.npz: collect(part, args) returns their settings, their arrays and
    the log that they come from, or None. All else is made of these files, as --plot-only does:
    summarise(part, arrays) returns a dict for summary.json; table(summaries), in Markdown, of all
    `parts` that have results, goes to table.md and is printed; draw(part, arrays, summary, folder)
    draws those asked for. Raises UserError where one of these is missing.
    """
    if not args.plot_only:
        files.check_writable(folder)  # now rather than after the first epoch
        if compute:
            compute(args)
            wait_for_ranks()
    if rank_and_world()[0] > 0:
        return
    for part in [] if args.plot_only else asked:
        settings, arrays, log = collect(part, args)
        files.save(folder / f"{part}.npz", settings, arrays, log and files.made_with_of(log))
    results, summaries = {}, {}
    for part in parts:
        if found := files.read(folder / f"{part}.npz"):
            results[part], settings, made = found
            summaries[part] = {"settings": settings, "made_with": made}
            summaries[part] |= summarise(part, results[part])
        elif part in asked:
            raise UserError(f"{folder / part}.npz is missing: run without --plot-only.")
    files.save_json(folder / "summary.json", summaries)
    files.save_text(folder / "table.md", table(summaries))
    files.copy_into_page(folder / "table.md")
    for part in asked:
        draw(part, results[part], summaries[part], folder)
    print(f"\n{table(summaries)}\nResults, figures, summary.json and table.md are in {folder}")


def advice(error):
    """Return what a user is told of an error that they can mend, or None of another one."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        again = "fix this, then run the same command to resume."
        return f"{where}{error.strerror or error}.\nEverything saved so far is complete: {again}"
    if isinstance(error, MemoryError) or "memory" in str(error):
        return "out of memory: choose fewer --runs."
    return None


def run(main):
    """Call a script's `main`; a problem that the user can fix ends it with a sentence, status 2.

    An interrupt (Ctrl-C) ends it with status 130. Under torchrun the ranks are connected first.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without Greek letters is no reason
    files.code_version()  # now: the code may change while it runs
    if signal.getsignal(signal.SIGINT) is end_quietly:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    name = Path(sys.argv[0]).name
    rank, world = rank_and_world()
    try:
        if world > 1:
            from torch import distributed

            name += f": rank {rank}"
            # gloo for GPUs, too: what ranks compute goes through files, and they only wait here
            distributed.init_process_group("gloo", timeout=datetime.timedelta(days=7))
        main()
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        if not (told := advice(error)):
            raise
        print(f"{name}: {told}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if rank == 0:
            print("\nInterrupted. Run the same command to resume.", file=sys.stderr)
        sys.exit(130)
