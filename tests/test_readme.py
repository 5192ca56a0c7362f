"""The Python of README.md runs as it stands."""

import re

import torch

from experiment.results import ROOT


def test_the_blocks_of_the_readme_run_in_order(capsys):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks
    torch.manual_seed(0)
    names = {}
    for block in blocks:
        exec(block, names)
    before, after = float(names["before"]), float(names["after"])
    assert after > before and f"{after:.3g}" in capsys.readouterr().out
