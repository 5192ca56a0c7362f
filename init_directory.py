"""Make the folders that data, results and figures go to.

    python init_directory.py

The other scripts make what they need themselves.
"""

from pathlib import Path

from experiment.results import ROOT
from experiment.run import run

FOLDERS = ("data", "logs", "figures", "learn-to-teleport/figures")


def init_directory(root=ROOT):
    """Make data/, logs/ and the folders for figures under `root`; those that exist stay."""
    for folder in FOLDERS:
        (Path(root) / folder).mkdir(parents=True, exist_ok=True)


if __name__ == "__main__":
    run(init_directory)
