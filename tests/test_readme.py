"""README.md and figures/README.md: examples run, commands parse, links exist, numbers agree."""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

from experiment.files import ROOT

import matplotlib
import pytest
import torch

from teleport_optimization import EXPERIMENTS

PAGES = {"README.md": ROOT / "README.md", "figures/README.md": ROOT / "figures/README.md"}
README, RESULTS = (path.read_text("utf-8") for path in PAGES.values())
SCRIPTS = [path.stem for path in ROOT.glob("*.py")] + ["multi_layer_regression"]


def test_the_readme_is_short():
    assert len(README.split()) <= 2000 and len(README.encode()) <= 15_000


EXAMPLES = re.findall(r"```python\n(import torch\n.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=["CNN", "transformer", "MLP"])
def test_the_examples_on_your_own_network(example):
    torch.manual_seed(0)
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    path = names["path"]["objective"]
    assert len(path) == 11 and path[-1] > 1.0005 * path[0]


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_that_load_results(page, tmp_path, monkeypatch, capsys):
    text = PAGES[page].read_text("utf-8")
    (example,) = re.findall(
        r"```python\n((?:import json|import matplotlib).*?)```", text, re.DOTALL
    )
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "figures").symlink_to(ROOT / "figures")
    exec(compile(example, page, "exec"), {})
    assert "test_loss" in capsys.readouterr().out or page == "figures/README.md"


def anchor(heading):
    """Return what a heading is linked by."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_images_and_files_are_there(page):
    path = PAGES[page]
    text = path.read_text("utf-8")
    links = re.findall(r"\]\((?!http)([^)]+)\)", text)
    assert len(links) > 2
    for link in links:
        file, _, fragment = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        if fragment:
            headings = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.MULTILINE)
            assert fragment in map(anchor, headings), link
    names = {n for n in re.findall(r"`([\w/-]+\.(?:py|md|json))`", text) if "/" in n or ".py" in n}
    assert [name for name in names if not (ROOT / name).exists()] == []
    assert not re.findall(r"!\[\]\(", text)  # every image has a text for those who don't see it


@pytest.mark.parametrize("page", PAGES)
def test_every_command_shown_is_understood_by_its_script(page, monkeypatch):
    text = PAGES[page].read_text("utf-8")
    commands = re.findall(r"((?:python|torchrun)[^`\n#]*?(?:[\w/-]+)\.py\b[^`\n#]*)", text)
    assert len(commands) > 5
    for command in commands:
        words = shlex.split(command)
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        if words[script] == "tests/benchmark.py":
            assert words[script + 1 :] in ([], ["growth"])
            continue
        module = importlib.import_module(Path(words[script]).stem)
        arguments = ["cpu" if word == "cuda" else word for word in words[script + 1 :]]
        monkeypatch.setattr(sys, "argv", [words[script], *arguments])
        if hasattr(module, "parse_arguments"):
            module.parse_arguments()
        else:
            assert arguments == [], command


def test_tables_are_those_that_the_scripts_wrote():
    blocks = re.findall(r"<!-- (\S+) -->\n(.*?)<!-- end -->", RESULTS, re.DOTALL)
    assert len(blocks) >= 5
    for path, block in blocks:
        assert block == (ROOT / path).read_text("utf-8"), path


def summary(folder):
    return json.loads((ROOT / "figures" / folder / "summary.json").read_text("utf-8"))


def test_numbers_in_the_readme_are_those_of_the_summaries():
    datasets = [summary("correlation")[name] for name in ("MNIST", "FashionMNIST", "CIFAR10")]
    for quantity in ("sharpness", "curvature", "sharpness_and_train_loss", "train_loss"):
        values = ", ".join(f"{entry[quantity]['pearson']:.3f}" for entry in datasets)
        assert values.replace("-", "−") in README, quantity
    given = (f"{entry['excess']['given_train_loss']['pearson']:.3f}" for entry in datasets)
    assert ", ".join(given).replace("-", "−") in README
    least = [entry["radii"]["least_p"] for entry in datasets]
    assert [test["holm"] < 0.05 for test in least] == [False, False, True]
    assert f"association on CIFAR-10 ({least[2]['pearson']:.2f})" in README
    adam = summary("optimization")["MNIST_Adam"]
    lower = -adam["differences"]["teleport − plain"]["5"]["mean"]
    assert f"{lower:.3f} lower ({adam['plain']['5']:.3f} without teleporting)" in README
    for name in ("Adam", "SGD"):
        last = summary("cnn")[name]["differences"]["teleport − plain"]["10"]
        mean, low, high = (f"{last[key]:+.3f}".replace("-", "−") for key in ("mean", "low", "high"))
        assert f"{mean} [{low}, {high}] with {name}" in README
        assert last["low"] < 0 < last["high"]
    learned = json.loads((ROOT / "learn-to-teleport/figures/summary.json").read_text("utf-8"))
    for kind, gives in (("lr", "step sizes"), ("update", "updates")):
        r = learned["results"]["ratios"][f"LSTM({kind},tele) / LSTM({kind})"]
        median, low = (f"{r[key]:.2f}" for key in ("median", "low"))
        high = f"{r['high']:.2f}" if r["high"] < 10 else f"{r['high']:.0f}"
        assert f"{median} [{low}, {high}] ({gives})" in README
        assert r["low"] < 1 < r["high"] and r["lower"] == "unclear"
    back = summary("displacement")["displacement"]["parabola_back_at_straight_line"]
    assert f"k r = {back['kr']:.2f}" in RESULTS


def test_claims_of_the_readme_follow_from_the_summaries():
    for entry in summary("correlation").values():
        for quantity in ("excess", "curvature", "exact_curvature"):
            low, high = entry[quantity]["given_train_loss"]["interval"]
            assert low < 0 < high, quantity  # no evidence beyond the training loss
    for name, entry in summary("optimization").items():
        last = entry["differences"]["kept − plain"]["40"]
        assert last["high"] > 0, name
        loses = name in ("FashionMNIST_momentum", "FashionMNIST_RMSprop")
        assert (last["low"] > 0) == loses, name
        gains = entry["differences"]["teleport − plain"]["40"]["high"] < 0
        assert gains == ("AdaGrad" in name)
    for name in ("MNIST_AdaGrad", "FashionMNIST_AdaGrad"):
        adagrad = summary("optimization")[name]["differences"]
        assert (
            adagrad["teleport − reset"]["10"]["mean"] > 0 > adagrad["reset − plain"]["10"]["high"]
        )
    for part, entry in summary("optimization-lr").items():
        primary = entry["differences"]["kept − plain"]["40"]
        dataset, optimizer, *rate = part.split("_")
        if float(*rate or [1]) == EXPERIMENTS[optimizer].best:  # no gain at the best learning rate
            assert primary["high"] > 0 and (primary["low"] > 0) == (optimizer == "RMSprop"), part
    for study, arm in (
        ("how-far", "100 steps"),
        ("how-often", "64 mini-batches"),
        ("when", "epoch 1"),
    ):
        found = summary(f"optimization-{study}")
        for part in ("MNIST_Adam", "MNIST_Adam_3"):  # more teleporting does harm
            assert found[part]["differences"][f"{arm} − plain"]["40"]["low"] > 0, part
        for entry in found.values():
            counts = entry["arms"][arm]
            assert counts["runs_that_end_above_plain"] + counts["diverged"] == 20
    for entry in summary("optimization-rescaling").values():
        counts = entry["arms"]["every epoch"]  # exact moves do harm, too
        assert counts["runs_that_end_above_plain"] + counts["diverged"] == 20
    cifar = summary("optimization-5runs-10epochs")
    for optimizer in ("SGD", "AdaGrad", "Adam"):
        assert cifar[f"CIFAR10_{optimizer}"]["differences"]["kept − plain"]["10"]["low"] > 0
    assert cifar["CIFAR10_momentum"]["arms"]["kept"]["diverged"] == 4
    assert cifar["CIFAR10_AdaGrad"]["differences"]["reset − plain"]["10"]["low"] > 0
    for entry in cifar.values():  # no arm gains; where too few runs are left there is no interval
        ends = [d["10"]["high"] for pair, d in entry["differences"].items() if "− plain" in pair]
        assert all(high is None or high >= 0 for high in ends)
    for entry in summary("optimization-action").values():  # no action gains in the end
        assert all(d["40"]["low"] < 0 < d["40"]["high"] for d in entry["differences"].values())
    factors = [
        summary("optimization")[f"MNIST_{name}"]["arms"][arm][
            "median_factor_of_gradient_norm_squared"
        ]
        for name in ("momentum", "RMSprop", "Adam")
        for arm in ("teleport", "kept")
    ]
    assert [f"{100 * (f - 1):.0f}" for f in (min(factors), max(factors))] == ["4", "6"]
    for entry in summary("optimization-when").values():
        arms = entry["arms"]
        for epoch in (1, 2, 5, 10, 20):  # the cap ends later teleports
            assert arms[f"epoch {epoch}"]["share_of_moves_made"] < 0.3
            assert arms[f"epoch {epoch}"]["median_factor_of_gradient_norm_squared"] > 20
    lasting = {}
    for name, entry in summary("generalization").items():
        last = {pair: after["40"] for pair, after in entry["differences"].items()}
        last = {pair.removesuffix(" − plain"): d for pair, d in last.items() if "− plain" in pair}
        assert all(d["high"] > 0 for d in last.values())  # none lowers the test loss
        lasting[name] = {arm for arm, d in last.items() if d["low"] > 0}
    assert all("curvature decrease, rescaled" in arms for arms in lasting.values())
    sharper, flatter = (f"sharpness {way}, rescaled" for way in ("increase", "decrease"))
    assert lasting["CIFAR10"] == {"curvature decrease, rescaled"}
    assert sharper in lasting["MNIST"] & lasting["FashionMNIST"]
    assert flatter in lasting["FashionMNIST"] - lasting["MNIST"]
    for entry in summary("generalization").values():  # in the end no arm differs from its control
        differences = entry["differences"].items()
        controlled = [after for pair, after in differences if not pair.endswith("− plain")]
        assert len(controlled) == 4
        assert all(after["40"]["low"] < 0 < after["40"]["high"] for after in controlled)
    for name in ("MNIST", "FashionMNIST"):  # more sharpness does harm for five epochs
        differences = summary("generalization")[name]["differences"]
        assert differences["sharpness increase, rescaled − random rescaling"]["25"]["low"] > 0
        random = "random rescaling (curvature)"
        assert differences[f"{random} − plain"]["40"]["low"] > 0
        for epoch in ("21", "25", "40"):
            d = differences[f"curvature increase, rescaled − {random}"][epoch]
            assert d["low"] < 0 < d["high"]
    once = summary("generalization")["CIFAR10"]["differences"]
    for arm in ("sharpness decrease", "sharpness increase", "curvature decrease", "random"):
        assert once[f"{arm} − plain"]["21"]["low"] > 0
        assert once[f"{arm} − plain"]["25"]["low"] < 0


def test_the_best_learning_rates_are_those_of_the_study():
    found = summary("optimization-lr")
    for name, experiment in EXPERIMENTS.items():
        final = {
            rate: found[f"MNIST_{name}" + f"_{rate:g}" * (rate != 1)]["plain"]["40"]
            for rate in experiment.rates
        }
        assert experiment.best == min(final, key=final.get), name
