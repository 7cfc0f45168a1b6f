"""Every placement under every method, at nearly equal trained weights: accuracy, NLL, ECE in one table.

Usage::

    python benchmarks/placement_table.py --seeds 3 --device cuda --out runs/placement

Each adapter is one comparison in a folder of its own below ``--out``, every method and seed a cell that one process claims
and none repeats; the tables are merged here. On SmolLM2-135M all train about 460,800 weights.
"""

import argparse
import dataclasses
from pathlib import Path

import pyrolora as pl
from pyrolora.inference.evaluation.experiment import ExperimentConfig, compare

METHODS = ("map", "blob", "low_rank", "laplace_kron")
COLUMNS = {
    "blob": {"guide": "BLoB(sites='*.columns')"},
    "low_rank": {"guide": "LowRank(rank=4)"},
}
PLACEMENTS: dict[str, tuple[str, dict[str, dict[str, str]]]] = {
    "LoRA": ("LoRA(rank=8, alpha=16)", {}),
    "PiSSA": ("PiSSA(rank=8)", {}),
    "PiSSA, subspace": ("PiSSA(rank=8, form='subspace')", {}),
    "CorDA, instruction": ("CorDA(rank=8)", {}),
    "CorDA, knowledge": ("CorDA(rank=8, mode='knowledge', calibration='crowd_tweets')", {}),
    "S2FT": ("S2FT(targets=('down_proj',), channels=27)", COLUMNS),
}


def main() -> None:
    """Fit what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", default="bbc_headlines")
    parser.add_argument("--data-dir")
    parser.add_argument("--train-size", type=int, default=300)
    parser.add_argument("--test-size", type=int, default=None)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--placements", default="|".join(PLACEMENTS), help="names, separated by |")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/placement"))
    arguments = parser.parse_args()
    methods = tuple(arguments.methods.split(","))
    reports: dict[str, pl.Report] = {}
    for name in arguments.placements.split("|"):
        adapter, changes = PLACEMENTS[name]
        settings: dict[str, dict[str, object]] = {key: dict(value) for key, value in changes.items() if key in methods}
        if arguments.steps is not None:
            for method in {*methods, "map"} - {"laplace_kron"}:
                settings.setdefault(method, {})["steps"] = arguments.steps
        config = ExperimentConfig(
            model=arguments.model, task=arguments.task, data_dir=arguments.data_dir, train_size=arguments.train_size,
            test_size=arguments.test_size, seeds=arguments.seeds, methods=methods, adapter=adapter, settings=settings,
            device=arguments.device,
        )  # fmt: skip
        folder = arguments.out / name.lower().replace(", ", "_")
        reports[name] = compare(config, folder)
    named = []
    for name, report in reports.items():
        # the pretrained model is the same under every adapter
        rows = [row for row in report.rows if row.method != "zero-shot" or name == next(iter(reports))]
        rows = [dataclasses.replace(row, method=f"{name}: {row.method}") for row in rows]
        named.append(dataclasses.replace(report, rows=tuple(rows)))
    print(pl.Report.merge(named).to_markdown())


if __name__ == "__main__":
    main()
