"""What a network loses with its smallest components, plain, seen through the inputs' moments, or through their root.

Usage::

    python benchmarks/corda_truncation.py --drop 0.05,0.1,0.2

Moments are of the task's training prompts; the loss as a language model is of its test prompts, so this shows orientation to
a domain, not what is kept of another. Every linear projection of every block is truncated. The output error of a
truncated weight is least through the root of the moment, so that column is the reference that CorDA's can only approach.
"""

import argparse
from collections.abc import Callable

import torch
from placement_curves import language_loss
from torch import Tensor
from tqdm import tqdm

import pyrolora as pl
from pyrolora.models.adapters.targets import find_projections
from pyrolora.models.factorisation import damped_inverse
from pyrolora.models.tasks import encode


def plain(moment: Tensor) -> tuple[Tensor, Tensor]:
    """No orientation."""
    eye = torch.eye(len(moment), dtype=moment.dtype)
    return eye, eye


def context(moment: Tensor) -> tuple[Tensor, Tensor]:
    """CorDA's."""
    return damped_inverse(moment, 0.01)


def root(moment: Tensor) -> tuple[Tensor, Tensor]:
    """The root of the damped moment."""
    damped, _ = damped_inverse(moment, 0.01)
    values, vectors = torch.linalg.eigh(damped)
    return vectors * values.sqrt() @ vectors.mT, vectors * values.rsqrt() @ vectors.mT


ORIENTATIONS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {"plain": plain, "corda": context, "root": root}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", default="bbc_headlines")
    parser.add_argument("--drop", default="0.05,0.1,0.2")
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--layers", type=int, default=None, help="truncate this many blocks only")
    arguments = parser.parse_args()
    backbone = pl.load_backbone(arguments.model)
    task = pl.task(arguments.task)
    layers = None if arguments.layers is None else range(arguments.layers)
    modules = {
        path: module
        for members in find_projections(backbone, "all-linear", layers).values()
        for _, path, module in members
    }
    rows = encode(task.train.subset(min(arguments.rows, len(task.train)), seed=0), task.format, backbone.tokenizer)
    moments = pl.second_moments(backbone, rows.batches(16), list(modules))
    held_out = encode(task.test.subset(min(arguments.rows, len(task.test)), seed=0), task.format, backbone.tokenizer)
    kept = {path: module.weight.detach().clone() for path, module in modules.items()}
    fractions = [float(text) for text in arguments.drop.split(",")]
    print(f"{moments.tokens} tokens; untouched: {language_loss(backbone, held_out.batches(16)):.3f} nats a token\n")
    table: dict[str, list[float]] = {}
    for name, orient in ORIENTATIONS.items():
        parts = {}
        for path, module in tqdm(modules.items(), desc=name):
            forth, back = orient(moments[path].double())
            u, s, vt = torch.linalg.svd(module.weight.detach().double() @ forth, full_matrices=False)
            parts[path] = (u.float(), s.float(), (vt @ back).float())
        for fraction in fractions:
            for path, (u, s, vt) in parts.items():
                rank = len(s) - round(fraction * len(s))
                modules[path].weight.data.copy_(u[:, :rank] * s[:rank] @ vt[:rank])
            table.setdefault(name, []).append(language_loss(backbone, held_out.batches(16)))
        for path, weight in kept.items():
            modules[path].weight.data.copy_(weight)
    print(f"| dropped | {' | '.join(table)} |\n|---|{'---|' * len(table)}")
    for index, fraction in enumerate(fractions):
        print(f"| {fraction:.0%} | {' | '.join(f'{losses[index]:.3f}' for losses in table.values())} |")


if __name__ == "__main__":
    main()
