"""How far PoLAR's factors leave the manifold over a whole fit, and the loss it ends at, under every way of moving them.

Usage::

    python benchmarks/orthogonality.py --seeds 3 --device cuda --out runs/orthogonality

``release`` is the recipe of PoLAR's release: Adam on the landing field with its penalty for Llama, 0.005. Every fit is a cell
of the folder ``--out`` and is not computed again; several processes may fill one folder.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from cells import Cells
from placement_curves import interval

import pyrolora as pl

STEPS: dict[str, dict[str, Any]] = {
    "retraction, polar (default)": {},
    "retraction, cholesky_qr": {"retraction": "cholesky_qr"},
    "retraction, newton_schulz": {"retraction": "newton_schulz"},
    "landing_scalar": {"manifold_step": "landing_scalar"},
    "landing, penalty 1": {"manifold_step": "landing", "landing_penalty": 1.0},
    "release": {"manifold_step": "landing", "landing_penalty": 5e-3},
}


def measure(backbone: pl.Backbone, cell: dict[str, Any]) -> dict[str, float]:
    """One maximum-likelihood fit."""
    task = pl.task(cell["task"], data_dir=cell["data_dir"], train_size=cell["train_size"], seed=cell["seed"])
    model = pl.BayesianModel(backbone, task, pl.PoLAR(rank=cell["rank"]), pl.Flat())
    engine = pl.MAP(steps=cell["steps"], learning_rate=cell["rate"], seed=cell["seed"], **STEPS[cell["step"]])
    posterior = engine.fit(model, task.train)
    history = posterior.record["history"]
    errors = [entry["orthogonality_error"] for entry in history]
    return {
        "largest": max(errors),
        "last": errors[-1],
        "stable_rank": history[-1]["stable_rank"],
        "train": statistics.mean(entry["nll"] for entry in history[-max(1, cell["steps"] // 10) :]),
        "validation": float(-posterior.predict(task.validation).log_likelihood.mean()),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", default="bbc_headlines")
    parser.add_argument("--data-dir")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--train-size", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/orthogonality"))
    options = parser.parse_args()
    backbone = pl.load_backbone(options.model, dtype="auto", device=options.device)
    shared = {key: value for key, value in vars(options).items() if key not in ("seeds", "out")}
    cells = [{**shared, "step": step, "seed": seed} for step in STEPS for seed in range(options.seeds)]
    table: dict[str, list[dict[str, float]]] = {}
    results = Cells(options.out).computed(cells, lambda cell: measure(backbone, cell))
    for cell, found in zip(cells, results, strict=True):
        table.setdefault(cell["step"], []).append(found)
    print("| step | largest error over the fit | at its end | stable rank | train NLL, last tenth | validation NLL |")
    print("|---|---|---|---|---|---|")
    for step, rows in table.items():
        errors = [f"{max(row[key] for row in rows):.1e}" for key in ("largest", "last")]
        shown = [interval([row[key] for row in rows]) for key in ("stable_rank", "train", "validation")]
        print(f"| {step} | {' | '.join([*errors, *shown])} |")


if __name__ == "__main__":
    main()
