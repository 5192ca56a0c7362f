"""Numbers on the pages that CHECKS names, as the shipped summaries have them.

`wrong` names each sentence that is not on its page as the summaries say it should be, and each
claim that does not follow from them. Whoever changes a result changes the prose, and runs this.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATASETS = "MNIST", "FashionMNIST", "CIFAR10"


def summary(folder):
    return json.loads((ROOT / folder / "summary.json").read_text("utf-8"))


def number(value, form=".3f"):
    return format(value, form).replace("-", "−")


def listed(values, form=".3f"):
    """Return numbers as "a, b and c"."""
    *first, last = (number(value, form) for value in values)
    return f"{', '.join(first)} and {last}"


def correlation():
    page = "figures/correlation/README.md"
    entries = [summary("figures/correlation")[name] for name in DATASETS]

    def r(quantity, key="r"):
        return [entry[quantity][key]["pearson"] for entry in entries]

    yield page, listed(r("sharpness"))
    yield page, f"r = {', '.join(map(number, r('sharpness', 'r_train_loss')))}"
    yield page, f"({', '.join(map(number, r('train_loss')))})"
    yield page, f"partial r of {listed(r('excess', 'partial_r'))}"
    yield page, listed(r("curvature"))
    yield page, listed(r("sharpness", "r_gap"))
    ratios = [entry["exact_curvature"]["mean_ratio_to_curvature"] for entry in entries]
    yield page, f"factors of {listed(ratios, '.2f')}"
    fashion = entries[1]["exact_curvature"]["r"]["pearson"], entries[1]["curvature"]["r"]["pearson"]
    yield page, "is {} instead of {}".format(*map(number, fashion))
    for entry, name in zip(entries, DATASETS):
        for quantity in ("excess", "curvature", "exact_curvature"):
            low, high = entry[quantity]["partial_r"]["interval"]
            yield f"{name}: partial r of {quantity} has an interval with 0", low < 0 < high
        published = entry["sharpness"]["published"]["p"]
        yield f"{name}: sampling error explains φ's difference from the paper", published > 0.05
        low, high = entry["curvature"]["r"]["interval"]
        yield f"{name}: ψ is compatible", low <= entry["curvature"]["published"]["r"] <= high
    sphere = [summary("figures/sphere/correlation")[name] for name in DATASETS]
    pairs = zip(entries, sphere)
    most = max(
        abs(a["sharpness"]["r"]["pearson"] - b["sharpness"]["r"]["pearson"]) for a, b in pairs
    )
    yield page, f"by {most:.3f} at most"


def sharpness():
    page = "figures/sharpness/README.md"
    entries = [summary("figures/sharpness")[name] for name in DATASETS]
    partial = [r["pearson"] for e in entries for r in works(e, "orthant")]
    yield page, f"between {number(min(partial), '.2f')} and {number(max(partial), '.2f')}"
    for name, entry in zip(DATASETS, entries):
        crosses = all(r["interval"][0] < 0 < r["interval"][1] for r in works(entry, "orthant"))
        yield f"{name}: on the orthant every interval contains 0", crosses
    least = entries[2]["radii"]["least_p"]
    low, high = least["interval"]
    yield (
        page,
        f"partial r = {least['pearson']:.2f} [{low:.2f}, {high:.2f}] at t = {least['radius']:.0f}",
    )
    yield page, f"p = {least['holm']:.4f}"
    mnist = entries[0]["radii"]["least_p"]
    yield page, f"at most {mnist['pearson']:.2f}, Holm's p = {mnist['holm']:.3f}"
    for folder in ("figures/sharpness", "figures/sphere/sharpness"):
        inside = [mean(summary(folder)[name]["excess"]["inside"]) for name in DATASETS]
        yield page, "{:.0f} %, {:.0f} % and {:.0f} %".format(*(100 * v for v in inside))


def works(entry, kind):
    """Return the partial correlations at the radii at which the networks still work."""
    of_kind = entry["radii"][kind]
    return [r for r, ok in zip(of_kind["partial_r"], of_kind["works"]) if ok]


def mean(values):
    return sum(values) / len(values)


def optimization():
    page = "figures/optimization/README.md"
    entries = summary("figures/optimization/MNIST")

    def difference(optimizer, pair, epoch):
        return in_thousandths(entries[optimizer]["differences"][pair][str(epoch)])

    for arm in ("teleport", "reset", "kept"):
        yield page, difference("AdaGrad", f"{arm} − plain", 40)
    for optimizer in ("momentum", "Adam"):
        for epoch in (5, 40):
            yield page, difference(optimizer, "kept − plain", epoch)
    yield page, difference("RMSprop", "kept − plain", 1)
    for optimizer in ("momentum", "RMSprop", "Adam"):
        last = entries[optimizer]["differences"]["kept − plain"]["40"]
        yield f"{optimizer}: kept gains nothing in the end", last["low"] < 0 < last["high"]
        for arm in ("kept", "teleport"):
            percent = round(100 * (entries[optimizer]["arms"][arm]["median_factor"] - 1))
            yield f"{optimizer}, {arm}: moves raise |∇L|² by 4 to 6 %", 4 <= percent <= 6
    fashion = summary("figures/optimization/FashionMNIST")["momentum"]["differences"]
    for arm in ("kept", "teleport"):
        yield page, in_thousandths(fashion[f"{arm} − plain"]["40"])
    cifar = summary("figures/5runs-10epochs/optimization/CIFAR10")["AdaGrad"]["differences"]
    yield page, in_thousandths(cifar["reset − plain"]["10"])


def generalization():
    page = "figures/generalization/README.md"
    entries = summary("figures/generalization")
    cifar = entries["CIFAR10"]["differences"]
    for arm in ("sharpness decrease", "sharpness increase", "curvature decrease"):
        yield page, in_thousandths(cifar[f"{arm} − plain"]["21"])
    for arm in ("sharpness decrease", "curvature increase"):
        yield page, in_thousandths(cifar[f"{arm} − plain"]["40"])
    yield page, in_thousandths(entries["MNIST"]["differences"]["curvature increase − plain"]["40"])
    falls = [
        -entries[name]["moves"]["curvature increase"]["change"]["kappa"]
        for name in ("MNIST", "FashionMNIST")
    ]
    yield page, f"κ falls by {listed(falls, '.2f')}"
    for name, entry in entries.items():
        for pair, by_epoch in entry["differences"].items():
            if pair.endswith("− plain"):
                yield f"{name}: {pair} is no gain in the end", by_epoch["40"]["high"] > 0
    for pair, by_epoch in cifar.items():
        last = by_epoch["40"]
        yield f"CIFAR10: {pair} contains 0 in the end", last["low"] < 0 < last["high"]


def learning_rate():
    page = "figures/learning_rate/README.md"
    entries = summary("figures/learning_rate/MNIST")
    for optimizer, arm in (
        *((optimizer, "kept") for optimizer in ("momentum", "RMSprop", "Adam")),
        ("AdaGrad", "teleport"),
        ("AdaGrad", "reset"),
    ):
        worth = entries[optimizer][arm]["test_loss"]["worth"]
        five = {key: values[4] for key, values in worth.items()}
        yield page, with_interval(five, 1, ".2f")
    for optimizer in ("momentum", "Adam"):
        rest = entries[optimizer]["kept"]["test_loss"]["left_over"]
        yield page, in_thousandths({key: values[9] for key, values in rest.items()})
    fashion = summary("figures/learning_rate/FashionMNIST")
    adam = fashion["Adam"]["kept"]["test_loss"]
    for entry in (fashion["momentum"]["teleport"]["test_loss"], adam):
        five = {key: values[4] for key, values in entry["worth"].items()}
        yield page, with_interval(five, 1, ".2f")
    for epoch in (10, 40):
        rest = {key: values[epoch - 1] for key, values in adam["left_over"].items()}
        yield page, in_thousandths(rest)
    for dataset in (entries, fashion):
        for optimizer in ("momentum", "RMSprop", "Adam"):
            later = dataset[optimizer]["kept"]["test_loss"]["left_over"]["high"][5:]
            behind = all(high is None or high >= 0 for high in later)
            yield f"{optimizer}: kept is never ahead of plain at its worth", behind


def modules():
    page = "figures/modules/README.md"
    entries = summary("figures/modules")
    primary = entries["GPT-AdamW"]["differences"]["ascend − plain"]["15"]
    yield page, in_thousandths(primary)
    yield "GPT, AdamW: ascents gain nothing", primary["low"] < 0 < primary["high"]


def quantisation():
    page = "figures/quantisation/README.md"
    entries = summary("figures/quantisation")
    tensor, channel, four_bits = 0, 1, 3  # indices of the steps and of the bits 8, 6, 5, 4, 3, 2
    gpt = entries["GPT, Python's library"]["differences"]["teleported"]
    for per in (tensor, channel):
        difference = {key: values[per][four_bits] for key, values in gpt.items()}
        yield page, in_thousandths(difference)
    for name in (
        "CNN, Fashion-MNIST",
        "CNN, CIFAR-10",
        "ResNet, Fashion-MNIST",
        "ResNet, CIFAR-10",
    ):
        accuracy = entries[name]["accuracy"]
        cells = [accuracy[arm][tensor][four_bits] for arm in ("trained", "ranges", "teleported")]
        numbers = [entries[name]["float"]["accuracy"], *cells]
        yield page, f"| {name} | {' | '.join(map(number, numbers))} |"
    excluded = [
        entry["differences"]["teleported"]["high"][tensor][four_bits] < 0
        for name, entry in entries.items()
        if name != "agreement"
    ]
    yield "per tensor the interval excludes 0 for four networks", sum(excluded) == 4
    resnet = entries["ResNet, CIFAR-10"]["accuracy"]
    yield "README.md", f"keeps an accuracy of {resnet['trained'][tensor][four_bits]:.2f};"
    yield "README.md", f"keeps {resnet['teleported'][tensor][four_bits]:.2f}, of"


def readme():
    page = "README.md"
    for optimizer in ("momentum", "RMSprop", "Adam"):
        worth = summary("figures/learning_rate/MNIST")[optimizer]["kept"]["test_loss"]["worth"]
        yield page, f"{number(worth['mean'][4], '.2f')} ({optimizer})"
    worth = summary("figures/learning_rate/FashionMNIST")["Adam"]["kept"]["test_loss"]["worth"]
    yield page, f"On Fashion-MNIST the factor is {number(worth['mean'][4], '.2f')} with Adam"
    entries = summary("figures/correlation").values()
    r = [entry["sharpness"]["r_train_loss"]["pearson"] for entry in entries]
    yield page, f"r = {min(r):.2f} to {max(r):.3f}"
    everything = json.loads((ROOT / "figures/architectures/architectures.json").read_text("utf-8"))
    built = [entry for entry in everything.values() if "problem" not in entry]
    yield page, f"We tried it on {len(built)} architectures"
    yield "no architecture has a wrong group", not any(entry["wrong"] for entry in built)


def with_interval(entry, scale, form):
    """Return a value with its interval as "m [l, h]"."""
    mean, low, high = (number(scale * entry[key], form) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def in_thousandths(difference):
    return with_interval(difference, 1e3, "+.1f")


CHECKS = [
    readme,
    correlation,
    sharpness,
    optimization,
    generalization,
    learning_rate,
    modules,
    quantisation,
]


def wrong():
    """Yield what is not as the summaries say."""
    pages = {}
    for check in CHECKS:
        for where, claim in check():
            if isinstance(claim, str):
                if where not in pages:
                    text = (ROOT / where).read_text("utf-8")
                    pages[where] = re.sub(r"[\s*]+", " ", text)
                if claim not in pages[where]:
                    yield f"{where} lacks {claim!r}"
            elif not claim:
                yield f"{where}: not so"
