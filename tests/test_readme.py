"""README.md: its example runs and does what it says, and what it names is there."""

import re

from experiment.files import ROOT

README = (ROOT / "README.md").read_text("utf-8")


def test_the_example_on_your_own_network(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    (before, after) = (
        [float(number) for number in line.split()[-2:]]
        for line in capsys.readouterr().out.splitlines()
    )
    assert abs(after[0] - before[0]) < 1e-3 * before[0]  # the loss is kept
    assert after[1] > 1.5 * before[1]  # the gradient is larger


def test_files_and_figures_that_it_names_exist():
    names = re.findall(r"\]\(((?!http)[^)#]+)\)|`([\w/-]+\.(?:py|md|json))`", README)
    names = {link or code for link, code in names}
    assert len(names) > 20
    assert [name for name in names if not (ROOT / name).exists()] == []
