"""What decides the width and the quality of BLoB's posterior: temperature, prior scale, stochastic layers, steps.

Usage::

    python benchmarks/posterior_width.py --seeds 1 > width.md

Every row is a fit on 300 BBC headlines. Choices are to be made on the validation columns; the test columns are there to show
that the choice holds. Intervals are 95 % bootstrap intervals over examples (one seed) and say nothing about other seeds.
"""

import argparse
from typing import Any

import pyro.distributions as dist
import torch

import pyrolora as pl

TOP_THIRD = tuple(range(20, 30))


def normal(scale: float) -> dict[str, Any]:
    """A Normal prior on A, a flat one on B."""
    return {"*.lora_A": dist.Normal(0.0, scale), "*.lora_B": pl.Flat()}


def learned(scale: float, strength: float) -> dict[str, Any]:
    """A learned scale on A."""
    return {"*.lora_A": pl.learned(scale, strength=strength), "*.lora_B": pl.Flat()}


ROWS: list[tuple[str, dict[str, Any], dict[str, Any], tuple[int, ...] | None]] = [
    ("prior 0.05 on A and B, KL 0.01 (default)", {"*": dist.Normal(0.0, 0.05)}, {"kl_weight": 0.01}, None),
    ("prior 0.2, KL 1", normal(0.2), {"kl_weight": 1.0}, None),
    ("prior 0.2, KL 0.3", normal(0.2), {"kl_weight": 0.3}, None),
    ("prior 0.2, KL 0.1", normal(0.2), {"kl_weight": 0.1}, None),
    ("prior 0.2, KL 0.03", normal(0.2), {"kl_weight": 0.03}, None),
    ("prior 0.1, KL 0.1", normal(0.1), {"kl_weight": 0.1}, None),
    ("prior 0.4, KL 0.1", normal(0.4), {"kl_weight": 0.1}, None),
    ("learned from 0.2, strength 1, KL 0.1", learned(0.2, 1.0), {"kl_weight": 0.1}, None),
    ("learned from 0.2, strength 0, KL 0.1", learned(0.2, 0.0), {"kl_weight": 0.1}, None),
    ("prior 0.2, KL 0.1, top 10 layers", normal(0.2), {"kl_weight": 0.1}, TOP_THIRD),
    ("prior 0.2, KL 0.1, one draw a batch", normal(0.2), {"kl_weight": 0.1, "noise": "weight"}, None),
    ("prior 0.2, KL 0.1, half the steps", normal(0.2), {"kl_weight": 0.1, "steps": 75}, None),
    ("prior 0.2, KL 0.1, twice the steps", normal(0.2), {"kl_weight": 0.1, "steps": 300}, None),
    ("prior 0.2, KL 0.1, four times the steps", normal(0.2), {"kl_weight": 0.1, "steps": 600}, None),
]


def main() -> None:
    """Print the table, a row as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    arguments = parser.parse_args()
    backbone = pl.load_backbone("smollm2-135m", dtype=arguments.dtype)
    print(
        "| fit | seed | val acc | val NLL | val ECE | test acc | test NLL | test ECE | train NLL | sd of A | |M| of A |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for seed in range(arguments.seeds):
        task = pl.task("bbc_headlines", train_size=300, seed=seed)
        for name, prior, settings, layers in ROWS:
            if arguments.only not in name:
                continue
            model = pl.BayesianModel(backbone, task, adapter=pl.LoRA(layers=layers), prior=prior)
            engine = pl.SVI(**{"guide": pl.BLoB(), "steps": 150, "seed": seed, **settings})
            posterior = engine.fit(model, task.train, progress=False)
            cells = [name, str(seed)]
            for data in (task.validation, task.test):
                row = pl.evaluate({"blob": posterior}, data, draws=arguments.draws, seed=seed, progress=False).rows[0]
                cells += [f"{row.metrics[key].value:.3f}" for key in ("accuracy", "nll", "ece")]
            history = posterior.record["history"][-20:]
            cells.append(f"{sum(entry['nll'] for entry in history) / len(history):.3f}")
            factors: dict[str, Any] = dict(posterior.guide.items())
            bayesian = [factor for site, factor in factors.items() if site.endswith("lora_A")]
            cells.append(f"{float(torch.stack([factor.scale.mean() for factor in bayesian]).mean()):.3f}")
            cells.append(f"{float(torch.stack([factor.loc.abs().mean() for factor in bayesian]).mean()):.4f}")
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
