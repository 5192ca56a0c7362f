"""What every script shares: files, launch, statistics, plots. It knows nothing of networks.

Scripts import it before all else, since to import NumPy and PyTorch takes seconds: from here on
Ctrl-C ends a script with a sentence, until `launch.run` takes over, and a worker process ends with
its parent.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARENT = "EXPERIMENT_PARENT"  # in the environment of workers: the process that they end with


def end_quietly(*_):
    """End the process as Ctrl-C does, with a sentence and status 130, whatever is being done."""
    if os.environ.get("RANK", "0") == "0":
        print("\nInterrupted before anything was computed.", file=sys.stderr)
    os._exit(130)


def end_with_parent():
    """End this worker within a second of its parent, killed or not (on Linux and macOS)."""
    while os.getppid() == int(os.environ[PARENT]):
        time.sleep(0.5)
    os._exit(1)


runs_ours = Path(sys.argv[0]).resolve().parent in (ROOT, ROOT / "learn-to-teleport")
if PARENT in os.environ:
    threading.Thread(target=end_with_parent, daemon=True).start()
elif runs_ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end_quietly)
