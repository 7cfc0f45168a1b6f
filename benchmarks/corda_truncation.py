"""What a network loses with its smallest components, plain, seen through the inputs' moments, or through their root.

Usage::

    python benchmarks/corda_truncation.py --drop 0.05,0.1,0.2 --seeds 3 --device cuda --out runs/corda_truncation

Moments are of the task's training prompts; the loss as a language model is of its test prompts, so this shows orientation to
a domain, not what is kept of another. Every linear projection of every block is truncated. The output error of a
truncated weight is least through the root of the moment, so that column is the reference that CorDA's can only approach.
A seed draws the calibration rows; test rows stay. Every orientation and seed is a cell of the folder ``--out``.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cells import Cells
from placement_curves import interval, language_loss
from torch import Tensor
from tqdm import tqdm

import pyrolora as pl
from pyrolora.models.adapters.targets import find_projections
from pyrolora.models.factorisation import damped_inverse
from pyrolora.models.tasks import encode


def plain(moment: Tensor) -> tuple[Tensor, Tensor]:
    """No orientation."""
    eye = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
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


def measure(backbone: pl.Backbone, cell: dict[str, Any]) -> dict[str, Any]:
    """Losses after truncation under one orientation."""
    task = pl.task(cell["task"], data_dir=cell["data_dir"], seed=cell["seed"])
    layers = None if cell["layers"] is None else range(cell["layers"])
    modules = {
        path: module
        for members in find_projections(backbone, "all-linear", layers).values()
        for _, path, module in members
    }
    shown = task.train.subset(min(cell["rows"], len(task.train)), seed=cell["seed"])
    moments = pl.second_moments(backbone, encode(shown, task.format, backbone.tokenizer).batches(16), list(modules))
    test = task.test.subset(min(cell["rows"], len(task.test)), seed=0)
    held_out = encode(test, task.format, backbone.tokenizer)
    kept = {path: module.weight.detach().clone() for path, module in modules.items()}
    found: dict[str, Any] = {"tokens": moments.tokens, "untouched": language_loss(backbone, held_out.batches(16))}
    parts, orient = {}, ORIENTATIONS[cell["orientation"]]
    for path, module in tqdm(modules.items(), desc=cell["orientation"], leave=False):
        forth, back = orient(moments[path].double())
        u, s, vt = torch.linalg.svd(module.weight.detach().double() @ forth, full_matrices=False)
        parts[path] = (u.float(), s.float(), (vt @ back).float())
    try:
        for fraction in cell["drop"].split(","):
            for path, (u, s, vt) in parts.items():
                rank = len(s) - round(float(fraction) * len(s))
                modules[path].weight.data.copy_(u[:, :rank] * s[:rank] @ vt[:rank])
            found[fraction] = language_loss(backbone, held_out.batches(16))
    finally:
        for path, weight in kept.items():
            modules[path].weight.data.copy_(weight)
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", default="bbc_headlines")
    parser.add_argument("--data-dir")
    parser.add_argument("--drop", default="0.05,0.1,0.2")
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--layers", type=int, default=None, help="truncate this many blocks only")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/corda_truncation"))
    arguments = parser.parse_args()
    backbone = pl.load_backbone(arguments.model, device=arguments.device)
    shared = {key: value for key, value in vars(arguments).items() if key not in ("seeds", "out")}
    cells = [{**shared, "orientation": name, "seed": seed} for name in ORIENTATIONS for seed in range(arguments.seeds)]
    results = Cells(arguments.out).computed(cells, lambda cell: measure(backbone, cell))
    table: dict[str, list[dict[str, Any]]] = {}
    for cell, found in zip(cells, results, strict=True):
        table.setdefault(cell["orientation"], []).append(found)
    print(f"{results[0]['tokens']} tokens; untouched: {results[0]['untouched']:.3f} nats a token\n")
    print(f"| dropped | {' | '.join(table)} |\n|---|{'---|' * len(table)}")
    for fraction in arguments.drop.split(","):
        shown = [interval([found[fraction] for found in rows]) for rows in table.values()]
        print(f"| {float(fraction):.0%} | {' | '.join(shown)} |")


if __name__ == "__main__":
    main()
