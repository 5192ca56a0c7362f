"""Do exact rescalings to the same perturbed loss or κ do what Figure 4's teleports do?

    python studies/rescaled_teleports.py                     # CIFAR-10
    python studies/rescaled_teleports.py --dataset MNIST     # the same on MNIST
    python studies/rescaled_teleports.py --sample            # on the images that ship

Figure 4's teleports change the loss, since the pseudoinverse action does not keep the network's
function on all images. Rescalings of hidden units do. Networks train as in Figure 4, and move at
the same moments:

    plain                           SGD alone
    the four teleports, rescaled    rescalings to the perturbed loss or the κ that the teleport
                                    reaches from the same network on the same batch
    random rescaling                rescalings as long as those of sharpness increase, in random
                                    directions

Training goes to logs/rescaled_teleports/; an interrupted run resumes from there.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import math

import torch

import teleport_sharpness_curvature as figure_4
from experiment import run
from teleportation import RESCALING, act, ascend_to

CLAIMS = {f"{arm}, rescaled": claim for arm, claim in figure_4.CLAIMS.items()}
CONTROL = "random rescaling"
PANELS = {
    "sharpness": ("sharpness decrease, rescaled", "sharpness increase, rescaled", CONTROL),
    "curvature": ("curvature decrease, rescaled", "curvature increase, rescaled"),
}
STEPS, LENGTH = 20, 0.1  # of an ascent to a target, and the norm of the log g of a step


def rescale_to(target, objective, weights, x):
    """Return networks rescaled until an objective of theirs has reached a target, if it can.

    target: [...]; a network whose target is not finite stays as it is.
    """
    target = target.masked_fill(~target.isfinite(), math.nan)
    how = LENGTH, STEPS, figure_4.ACTIVATION, RESCALING
    return ascend_to(target, objective, weights, x, *how)[0]


def elements_of_rescaling(weights, rescaled):
    """Return I + log g_m of the rescaling between weights [runs, d_{m+1}, d_m], for each pair."""
    elements, below = [], 1.0
    for w, new in zip(weights[:-1], rescaled):
        g = new.norm(dim=-1) / (w / below).norm(dim=-1)
        elements.append(torch.eye(g.shape[-1]).to(g) + torch.diag_embed(g.log()))
        below = g[..., None, :]
    return elements


def move_arms(weights, x, y, k, stack):
    """Move the rescaled arms and their control in place; weights: [arms, runs, d_{m+1}, d_m]."""
    setting, start = stack.setting, [w[1:5].clone() for w in weights]
    teleported = [w.clone() for w in start]
    figure_4.teleport_arms(teleported, x, y, k, setting)
    objectives = {
        "sharpness": partial(figure_4.perturbed_loss, x=x, y=y, k=k, setting=setting),
        "curvature": partial(figure_4.kappa, x=x, k=k, setting=setting),
    }
    for quantity, objective in objectives.items():
        arms = enumerate(zip(figure_4.CLAIMS, setting.teleports))
        if going := [i for i, (arm, number) in arms if quantity in arm and k < number]:
            target = objective([w[going] for w in teleported])
            rescaled = rescale_to(target, objective, [w[going] for w in start], x)
            figure_4.put([w[1:5] for w in weights], going, rescaled)

    i = list(figure_4.CLAIMS).index("sharpness increase")
    if k < setting.teleports[i]:
        elements = elements_of_rescaling([w[i] for w in start], [w[1 + i] for w in weights])
        elements = figure_4.random_elements(elements, k, stack.runs, RESCALING)
        control = [w[-1] for w in weights]
        figure_4.put(weights, -1, act(control, x, elements, figure_4.ACTIVATION, RESCALING))


STUDY = figure_4.Experiment(
    "rescaled_teleports",
    ("plain", *CLAIMS, CONTROL),
    move_arms,
    CLAIMS,
    {"sharpness increase, rescaled": CONTROL},
    PANELS,
    (figure_4.__file__, str(Path(__file__).resolve())),
)


def main():
    args = figure_4.parse_arguments(__doc__)
    folder = run.figures_folder(args, figure_4.DEFAULTS) / STUDY.name
    for name, arrays in figure_4.run_experiment(STUDY, args, folder).items():
        figure_4.draw_differences(folder / name, name, arrays, STUDY)


if __name__ == "__main__":
    run.run(main)
