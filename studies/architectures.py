"""Study: which symmetries have the architectures that people use?

    pip install -r requirements-dev.txt
    python studies/architectures.py                          # two minutes on two cores
    python studies/architectures.py --architecture llama vit

Architectures are those of the transformers library that can be built at a small size, with random
weights: causal and masked language models, and image classifiers; and CNNs after torchvision's.
`symmetry_of` finds their groups. Random elements then act on all that the groups name and, as a
control, on one side of each group alone: what makes its units. Outputs on other inputs, of another
length, are compared with those before. Results go to logs/architectures/, where an interrupted run
resumes, and to figures/architectures/.
"""

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

import networks
from experiment import plots, results, run
from networks import BasicBlock, convolution
from parameter_symmetries import (
    LINEAR,
    act_on,
    check_symmetry,
    outputs,
    random_elements,
    symmetry_of,
)
from parameter_symmetries.check import relative_change
from parameter_symmetries.groups import floating

KINDS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING",
    "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
}
LARGEST = 30_000_000  # parameters; what stays larger is not built
SIZES = {  # by the usual names in configurations
    32: "hidden_size d_model n_embd image_size",
    2: "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers "
    "num_key_value_heads num_experts_per_tok type_vocab_size eos_token_id",
    4: "num_attention_heads num_heads n_head n_heads encoder_attention_heads "
    "decoder_attention_heads num_experts num_local_experts n_routed_experts",
    64: "intermediate_size ffn_dim d_ff dim_ff encoder_ffn_dim decoder_ffn_dim "
    "max_position_embeddings n_positions",
    8: "head_dim d_kv v_head_dim kv_lora_rank q_lora_rank qk_rope_head_dim qk_nope_head_dim "
    "rotary_dim patch_size",
    1: "n_group topk_group n_shared_experts bos_token_id",
    16: "moe_intermediate_size embedding_size",
    96: "vocab_size",
    0: "pad_token_id",
}
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}
# what an architecture may derive from the others, or not allow to be set
LEFT_OUT = (), ("head_dim",), ("num_key_value_heads",), ("num_key_value_heads", "head_dim")
LEFT_OUT += (("embedding_size",), tuple(SMALL))


class Architecture(NamedTuple):
    kind: str
    name: str


# Models


class Join(nn.ModuleList):
    """Branches whose outputs are concatenated."""

    def forward(self, x):
        return torch.cat([branch(x) for branch in self], 1)


class Residual(nn.Sequential):
    def forward(self, x):
        return F.relu(x + super().forward(x))


def layer(*sizes, **options):
    return nn.Sequential(convolution(*sizes, **options), nn.ReLU(inplace=True))


def bottleneck(channels, inner, groups):
    middle = layer(inner, inner, groups=groups)
    return Residual(layer(channels, inner, 1), middle, convolution(inner, channels, 1))


def cnn(*layers):
    """Return a CNN for images [n, 3, 32, 32] of layers from 16 to 32 channels."""
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
    return nn.Sequential(layer(3, 16), nn.MaxPool2d(2), *layers, *head)


CNNS = {
    "VGG": lambda: cnn(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU()),
    "ResNet-18": lambda: cnn(BasicBlock(16, 16, 1), BasicBlock(16, 32, 2)),
    "ResNet-50": lambda: cnn(layer(16, 32), bottleneck(32, 8, 1), bottleneck(32, 8, 1)),
    "ResNeXt": lambda: cnn(layer(16, 32), bottleneck(32, 16, 4), bottleneck(32, 16, 4)),
    "DenseNet": lambda: cnn(*(Join([nn.Identity(), layer(c, 8)]) for c in (16, 24))),
    "Inception": lambda: cnn(Join([layer(16, 16, size) for size in (1, 3)]), layer(32, 32)),
    "MobileNet": lambda: cnn(layer(16, 16, groups=16), layer(16, 32, 1), layer(32, 32, groups=32)),
    "ShuffleNet": lambda: cnn(layer(16, 32, 1, groups=4), nn.ChannelShuffle(4), layer(32, 32)),
}


def names_of(kind):
    """Return the names of the architectures of a kind."""
    return list(CNNS) if kind == "CNN" else list(getattr(modeling_auto(), f"{KINDS[kind]}_NAMES"))


def modeling_auto():
    try:
        from transformers import logging
        from transformers.models.auto import modeling_auto
    except ImportError:
        raise results.UserError("run pip install -r requirements-dev.txt first.") from None
    logging.set_verbosity(logging.CRITICAL)
    return modeling_auto


def transformer(architecture, left_out):
    """Return a model of the transformers library, as small as its configuration allows."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_type = CONFIG_MAPPING[architecture.name]
    model_type = getattr(modeling_auto(), KINDS[architecture.kind])[config_type]
    model_type = model_type[0] if isinstance(model_type, tuple) else model_type
    usual = {name: getattr(config_type(), name, []) for name in SMALL}  # lists are by stages
    known = {name for name, value in usual.items() if not isinstance(value, list | tuple | dict)}
    config = config_type(**{name: SMALL[name] for name in known - set(left_out)})
    config.use_cache, config._experts_implementation = False, "eager"
    with torch.device("meta"):
        size = sum(p.numel() for p in model_type(config).parameters())
    if size > LARGEST:
        raise ValueError(f"it has {size:,} parameters at the least")
    return model_type(config)


def build(architecture):
    """Return a model that runs, all of whose weights are random; raises whatever prevents it."""
    problem = None
    for left_out in LEFT_OUT:
        torch.manual_seed(0)
        try:
            is_cnn = architecture.kind == "CNN"
            model = CNNS[architecture.name]() if is_cnn else transformer(architecture, left_out)
            for parameter in model.parameters():  # some begin as 0 or 1
                parameter.data += 0.1 * torch.randn_like(parameter)
            inputs = inputs_of(model, architecture.kind)
            outputs(model.eval(), dict(model.named_parameters()), **inputs)
            return model
        except Exception as error:  # libraries raise all kinds
            problem = problem or error
    raise problem


def inputs_of(model, kind, count=2, length=16):
    """Return arguments of a model: images, or texts of a length."""
    if kind in ("CNN", "image"):
        size = getattr(getattr(model, "config", None), "image_size", 32)
        images = torch.rand(count, 3, size, size)
        return {"input" if kind == "CNN" else "pixel_values": images}
    return {"input_ids": torch.randint(3, 90, (count, length))}


def kept(output):
    """Return an output without the cache, hidden states and such that language models return."""
    return getattr(output, "logits", output)


# Computation


def log_of(architecture, args):
    settings = architecture._asdict() | {"small": SMALL}
    path = args.output / "logs" / "architectures" / architecture.kind / f"{architecture.name}.npz"
    return results.Log(path, settings, (__file__, *networks.CODE))


def compute(architecture, args, bar):
    """Build an architecture and measure it; save the numbers, or the problem with it."""

    def step(state):
        try:
            model = build(architecture)
        except Exception as problem:
            return state | {"problem": " ".join(f"{problem!r}".replace("\\n", " ").split())[:200]}
        return state | measure(model, architecture.kind)

    results.resume(log_of(architecture, args), dict, step, 1, bar)


@torch.no_grad()
def measure(model, kind):
    """Return an array or number for each column of the results."""
    inputs, others = inputs_of(model, kind), inputs_of(model, kind, 3, 23)
    begin = time.perf_counter()
    symmetry = symmetry_of(model, keep=kept, **inputs)
    seconds = time.perf_counter() - begin
    wrong = ""
    try:
        changed = check_symmetry(model, symmetry, keep=kept, **others) if symmetry else 0.0
    except ValueError as error:
        changed, wrong = 1.0, str(error)
    before = dict(model.named_parameters())
    made = [g._replace(axes=[axis for axis in g.axes if axis.power > 0]) for g in symmetry]
    elements = random_elements(symmetry, 0.5, torch.Generator().manual_seed(0))
    points = before, act_on(before, made, elements)
    logits = [floating(kept(outputs(model, p, **others))) for p in points]
    moved = act_on(before, symmetry, elements)
    return {
        "parameters": sum(p.numel() for p in before.values()),
        "units": sum(group.count * group.size for group in symmetry),
        "blocks": [g.size for g in symmetry if g.kind == LINEAR for _ in range(g.count)],
        "moved": sum(int((moved[name] != p).sum()) for name, p in before.items()),
        "ended": [text.split(" ")[0] for text in symmetry.ended],
        "seconds": seconds,
        "changed": changed,
        "one_side": relative_change(*logits[::-1]),
        "wrong": wrong,
    }


def collect(architectures, args):
    """Return {"kind/name": {column: value}}; those that were not built have a `problem` alone."""
    found = {}
    for architecture in architectures:
        arrays = results.load(log_of(architecture, args), 1).arrays
        values = {key: value.tolist() for key, value in arrays.items() if key != "steps"}
        found["/".join(architecture)] = values
    return found


# Table and figure


def number(x):
    return f"{x:.0e}" if 0 < x < 0.01 else f"{x:.2g}"


def table(built, problems):
    """Return a row for each architecture as Markdown, and why others were not built."""
    header = ["architecture", "kind", "units", "of which in", "weights moved", "seconds"]
    header += ["outputs change by", "by one side alone", "what ended most others"]
    rows = []
    for name, a in sorted(built.items()):
        kind, name = name.split("/")
        blocks = [f"{n} × GL({d})" for d, n in sorted(Counter(a["blocks"]).items())]
        ended = [operation for operation, _ in Counter(a["ended"]).most_common(3)]
        numbers = f"{a['moved'] / a['parameters']:.0%}", f"{a['seconds']:.2f}"
        numbers += number(a["changed"]), number(a["one_side"])
        blocks, ended = ", ".join(blocks) or "–", ", ".join(ended)
        rows.append([name, kind, str(a["units"]), blocks, *numbers, ended])
    lines = [f"- {name}: {problem}\n" for name, problem in sorted(problems.items())]
    return f"{plots.markdown(header, rows)}\n{len(lines)} were not built:\n\n{''.join(lines)}"


def draw(path, built):
    """Draw how far outputs change, the share of the weights that move, and what ended the rest."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    moving = [a for a in built.values() if a["units"]]
    changed, one_side = np.clip([(a["changed"], a["one_side"]) for a in moving], 1e-17, 99).T
    bins = np.logspace(-17, 2, 39)
    left.hist(changed, bins, color=plots.BLUE, label="all that a group names")
    left.hist(one_side, bins, color=plots.ORANGE, label="what makes its units alone")
    left.set(xscale="log", xlabel="relative change of the outputs", ylabel="architectures")
    left.set_title("random group elements act on")
    figure.legend(loc="outside lower left", ncols=2)
    shares = [a["moved"] / a["parameters"] for a in built.values()]
    middle.hist(shares, bins=20, range=(0, 1), color=plots.BLUE)
    middle.set(xlabel="share of the weights that groups move", ylabel="architectures")
    ended = Counter(operation for a in built.values() for operation in set(a["ended"]))
    most = dict(reversed(ended.most_common(12)))
    right.barh(list(most), list(most.values()), color=plots.BLUE)
    right.set(xlabel="architectures", title="what ends symmetries")
    plots.save_figure(figure, path)


# The script


def parse_arguments():
    parser = run.experiment_parser(__doc__, on_images=False)
    add = parser.add_argument
    add("--architecture", nargs="+", metavar="NAME", help="which ones (default: all)")
    add("--processes", type=run.whole_number(1), default=run.cores(), help="worker processes")
    args = parser.parse_args()
    args.device = torch.device("cpu")
    return args


def main():
    args = parse_arguments()
    folder = args.output / "figures" / "architectures" / "-".join(args.architecture or [])
    if not args.plot_only:
        results.check_writable(folder)
        tasks = [Architecture(kind, name) for kind in (*KINDS, "CNN") for name in names_of(kind)]
        if args.architecture:
            if missing := sorted(set(args.architecture) - {task.name for task in tasks}):
                raise results.UserError(f"there is no architecture {', '.join(missing)}.")
            tasks = [task for task in tasks if task.name in args.architecture]
        results.warn_of_other_code([log_of(task, args) for task in tasks])
        run.run_tasks(compute, tasks, args, 1, "architecture")
        results.save_json(folder / "architectures.json", collect(tasks, args))

    path = folder / "architectures.json"
    if not path.exists():
        raise results.UserError(f"{path} is missing: run without --plot-only.")
    try:
        everything = json.loads(path.read_text("utf-8"))
    except ValueError:
        raise results.UserError(f"{path} is damaged: run without --plot-only.") from None
    problems = {name: a["problem"] for name, a in everything.items() if "problem" in a}
    built = {name: a for name, a in everything.items() if name not in problems}
    results.save_text(folder / "table.md", table(built, problems))
    draw(folder / "architectures", built)
    wrong = [f"{name}: {a['wrong']}\n" for name, a in built.items() if a["wrong"]]
    print(f"{len(built)} architectures, {len(wrong)} wrong. Table and figure: {folder}")
    print("".join(wrong), end="")


if __name__ == "__main__":
    run.run(main)
