"""Layerwise training: peak bytes of Adam's moments, blocks never trained, and loss, with moments dropped or kept.

Usage::

    python benchmarks/block_schedules.py --active 2 --every 5 --steps 225 --seeds 3 --device cuda --out runs/schedules
    python benchmarks/block_schedules.py --adapter "LoRA(rank=8)" --method blob --steps 225 --every 5

The default trains every weight of the blocks and the label rows, as published but for embeddings and norms. Steps divided by
the interval should be at least ``3 * blocks / active`` (45 intervals for 30 blocks, 2 active), or many blocks are
never visited; the table says how many were not. ``none`` is the same fit without a schedule. Every fit is a cell of the
folder ``--out`` and is not computed again; several processes may fill one folder, but then disturb each other's times.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from cells import Cells
from device_clock import seconds_of
from placement_curves import interval

import pyrolora as pl
from pyrolora.models.declarations import declared


def measure(backbone: pl.Backbone, cell: dict[str, Any]) -> dict[str, float]:
    """One fit and what it took."""
    seed, steps = cell["seed"], cell["steps"]
    task = pl.task(cell["task"], data_dir=cell["data_dir"], train_size=cell["train_size"], seed=seed)
    adapters = [declared(cell["adapter"], pl.Adapter.registered, "adapter"), pl.LastLayer()]
    prior = pl.Flat() if cell["method"] == "mle" else pl.Relative(0.05)
    model = pl.BayesianModel(backbone, task, adapters, prior)
    schedule = None
    if cell["state"] != "none":
        schedule = pl.BlockSchedule(
            active=cell["active"], every=cell["every"], sampler=cell["sampler"], state=cell["state"]
        )
    common = {"steps": steps, "learning_rate": cell["rate"], "seed": seed, "schedule": schedule}
    engine = pl.MAP(**common) if cell["method"] == "mle" else pl.SVI(kl_weight=0.01, **common)
    run = engine.iterate(model, task.train)
    stream, losses = run.steps(progress=True), []
    seconds = [seconds_of(lambda: losses.append(next(stream).nll), cell["device"]) for _ in range(steps)]
    stream.close()
    posterior = run.posterior()
    visits = posterior.record.get("steps_of_blocks", {})
    generator = torch.Generator().manual_seed(seed)
    probs = posterior.predict(task.validation, generator=generator).mean_probs
    labels = model.encode(task.validation).labels
    return {
        "bytes": run.optimiser.peak_state_bytes / 2**20,
        "missed": sum(count == 0 for count in visits.values()),
        "train": statistics.mean(losses[-max(1, steps // 10) :]),
        "validation": float(-probs.log().gather(1, labels[:, None]).mean()),
        "seconds": statistics.median(seconds),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", default="bbc_headlines")
    parser.add_argument("--data-dir")
    parser.add_argument("--adapter", default="full_rank")
    parser.add_argument("--method", default="mle", choices=["mle", "blob"])
    parser.add_argument("--samplers", default="uniform,cycle")
    parser.add_argument("--states", default="none,drop,keep")
    parser.add_argument("--active", type=int, default=2)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--steps", type=int, default=225)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train-size", type=int, default=300)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/block_schedules"))
    arguments = parser.parse_args()
    backbone = pl.load_backbone(arguments.model, dtype=arguments.dtype, device=arguments.device)
    varied = ("samplers", "states", "seeds", "out")
    shared = {key: value for key, value in vars(arguments).items() if key not in varied}
    cells = [
        {**shared, "state": state, "sampler": sampler, "seed": seed}
        for state in arguments.states.split(",")
        for sampler in (arguments.samplers.split(",") if state != "none" else ["-"])
        for seed in range(arguments.seeds)
    ]
    table: dict[tuple[str, str], list[dict[str, float]]] = {}
    results = Cells(arguments.out).computed(cells, lambda cell: measure(backbone, cell))
    for cell, found in zip(cells, results, strict=True):
        table.setdefault((cell["sampler"], cell["state"]), []).append(found)
    print("| sampler | state | peak Adam (MiB) | never trained | train NLL, last tenth | validation NLL | s a step |")
    print("|---|---|---|---|---|---|---|")
    for (sampler, state), rows in table.items():
        print(f"| {sampler} | {state} | {' | '.join(interval([row[key] for row in rows]) for key in rows[0])} |")


if __name__ == "__main__":
    main()
