"""Layerwise training: peak bytes of Adam's moments, blocks never trained, and loss, with moments dropped or kept.

Usage::

    python benchmarks/block_schedules.py --active 2 --every 5 --steps 225 --seeds 3
    python benchmarks/block_schedules.py --adapter "LoRA(rank=8)" --method blob --steps 225 --every 5

The default trains every weight of the blocks and the label rows, as published but for embeddings and norms. Steps divided by
the interval should be at least ``3 * blocks / active`` (45 intervals for 30 blocks, 2 active), or many blocks are
never visited; the table says how many were not. ``none`` is the same fit without a schedule.
"""

import argparse
import time

import torch
from placement_curves import interval

import pyrolora as pl
from pyrolora.models.declarations import declared


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", default="bbc_headlines")
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
    arguments = parser.parse_args()
    backbone = pl.load_backbone(arguments.model, dtype=arguments.dtype)
    print("| sampler | state | peak Adam (MiB) | never trained | train NLL, last tenth | validation NLL | s a step |")
    print("|---|---|---|---|---|---|---|")
    for state in arguments.states.split(","):
        for sampler in arguments.samplers.split(",") if state != "none" else ["-"]:
            rows: dict[str, list[float]] = {}
            for seed in range(arguments.seeds):
                task = pl.task(arguments.task, train_size=arguments.train_size, seed=seed)
                adapters = [declared(arguments.adapter, pl.Adapter.registered, "adapter"), pl.LastLayer()]
                prior = pl.Flat() if arguments.method == "mle" else pl.Relative(0.05)
                model = pl.BayesianModel(backbone, task, adapters, prior)
                schedule = None
                if state != "none":
                    schedule = pl.BlockSchedule(
                        active=arguments.active, every=arguments.every, sampler=sampler, state=state
                    )
                common = {"steps": arguments.steps, "learning_rate": arguments.rate, "seed": seed, "schedule": schedule}
                engine = pl.MAP(**common) if arguments.method == "mle" else pl.SVI(kl_weight=0.01, **common)
                run = engine.iterate(model, task.train)
                began = time.perf_counter()
                losses = torch.tensor([stats.nll for stats in run.steps(progress=True)])
                seconds = (time.perf_counter() - began) / arguments.steps
                posterior = run.posterior()
                visits = posterior.record.get("steps_of_blocks", {})
                generator = torch.Generator().manual_seed(seed)
                found = {
                    "bytes": run.optimiser.peak_state_bytes / 2**20,
                    "missed": sum(count == 0 for count in visits.values()),
                    "train": float(losses[-max(1, arguments.steps // 10) :].mean()),
                    "validation": float(
                        -posterior.predict(task.validation, generator=generator).mean_probs.log()
                        .gather(1, model.encode(task.validation).labels[:, None]).mean()
                    ),
                    "seconds": seconds,
                }  # fmt: skip
                for key, value in found.items():
                    rows.setdefault(key, []).append(value)
            print(f"| {sampler} | {state} | {' | '.join(interval(values) for values in rows.values())} |", flush=True)


if __name__ == "__main__":
    main()
