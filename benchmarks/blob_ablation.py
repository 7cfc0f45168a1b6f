"""BLoB's noise and widths: token noise against coherent draws, the release against the ELBO, learned scales, natural widths.

Usage::

    python benchmarks/blob_ablation.py --data-dir FOLDER --device cuda --seeds 3 --out runs/blob_ablation
    python benchmarks/blob_ablation.py --out runs/blob_ablation --tables      # print what is there, compute nothing

Every cell is one fit of one variant under one seed, judged under every kind of draw that the tables need, and kept as a JSON
file; cells that are there are not computed again, and several processes may work on one folder. Intervals are Student's t
across seeds. The second table of a task holds differences to the first row, paired by seed: where an interval holds zero, the
answer is "no difference that these seeds can see". ``release`` is the released algorithm at its own rates and batch size, on
queries and values alone, and ``release with its head`` on the label rows too, where there are any.
"""

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import torch
from cells import Cells, over_seeds

import pyrolora as pl
from pyrolora.guides.mean_field import IndependentNormalFactor
from pyrolora.inference.released import ReleasedBLoB
from pyrolora.inference.svi import SVI
from pyrolora.models.tasks import Split, Task

METRICS = ("accuracy", "nll", "ece")
# task -> (training examples, test examples, tasks whose test split is a shift of it)
TASKS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "bbc_headlines": (300, 600, ()),
    "uci_sentiment": (300, 300, ("uci_sentiment_yelp", "uci_sentiment_imdb")),
    "arc_easy": (1000, 1000, ()),
}
# whose options are scored by their likelihood, so that there are no label rows
SCORED = ("arc_easy",)
# priors of A and B with the weight of the KL that was chosen for them, see docs/choices.md
NARROW: dict[str, Any] = {"*": dist.Normal(0.0, 0.05)}
WIDE: dict[str, Any] = {"*.lora_A": dist.Normal(0.0, 0.2), "*.lora_B": pl.Flat()}
RELEVANCE: dict[str, Any] = {"*": pl.learned(0.05, per=("layer", "rank"))}


@dataclass(frozen=True)
class Variant:
    """One way to fit, and the kinds of draws it is judged under."""

    prior: Mapping[str, Any]
    kinds: tuple[str, ...] = ("mc",)
    settings: Mapping[str, Any] = field(default_factory=dict)
    released: bool = False
    head: bool = False

    def engine(self, seed: int, steps: int, release_steps: int) -> SVI:
        """The engine under one seed."""
        if self.released:
            return ReleasedBLoB(steps=release_steps, seed=seed)
        return SVI(guide=pl.BLoB(), steps=steps, seed=seed, **self.settings)


COLD, MILD = {"kl_weight": 0.01}, {"kl_weight": 0.1}
BOTH = ("mc", "token")
VARIANTS = {
    "coherent": Variant(NARROW, BOTH, COLD),
    "token": Variant(NARROW, BOTH, {**COLD, "noise": "token"}),
    "coherent, wide": Variant(WIDE, BOTH, MILD),
    "token, wide": Variant(WIDE, BOTH, {**MILD, "noise": "token"}),
    "natural widths": Variant(NARROW, settings={**COLD, "width": "natural"}),
    "learned scales": Variant(RELEVANCE, settings=COLD),
    "learned scales, natural widths": Variant(RELEVANCE, settings={**COLD, "width": "natural"}),
    "release": Variant(WIDE, ("flipout", "mc"), released=True),
    "release with its head": Variant(WIDE, ("flipout", "mc"), released=True, head=True),
}


@cache
def load(name: str, data_dir: str | None, train_size: int | None = None, seed: int = 0) -> Task:
    """A task; the headlines come from their package."""
    return pl.task(name, data_dir=None if name == "bbc_headlines" else data_dir, train_size=train_size, seed=seed)


def at_most(split: Split, size: int) -> Split:
    """The split, or the same part of it every time."""
    return split if len(split) <= size else split.subset(size, seed=0)


@cache
def network(dtype: str, device: str) -> pl.Backbone:
    """The frozen model, loaded once a process."""
    return pl.load_backbone("smollm2-135m", dtype=dtype, device=device)


def judge(arguments: argparse.Namespace, name: str, variant: Variant, seed: int) -> dict[str, Any]:
    """Fit a variant, and its metrics on every test split under every kind of draws."""
    train_size, test_size, shifts = TASKS[name]
    train_size, test_size = (min(arguments.limit or size, size) for size in (train_size, test_size))
    task = load(name, arguments.data_dir, train_size, seed)
    tests = {other: load(other, arguments.data_dir).test for other in shifts} | {name: task.test}
    adapters = [pl.LoRA(), *([pl.LabelLoRA()] if variant.head else [])]
    model = pl.BayesianModel(network(arguments.dtype, arguments.device), task, adapters, prior=dict(variant.prior))
    began = time.perf_counter()
    engine = variant.engine(seed, arguments.steps, arguments.release_steps)
    posterior = engine.fit(model, task.train, progress=False)
    seconds = time.perf_counter() - began
    metrics: dict[str, dict[str, dict[str, float]]] = {}
    for kind in variant.kinds:
        metrics[kind] = {}
        for key, split in tests.items():
            report = pl.evaluate(
                {"it": posterior}, at_most(split, test_size), kind=kind, draws=arguments.draws, seed=seed,
                batch_size=arguments.batch_size, resamples=40, progress=False,
            )  # fmt: skip
            metrics[kind][key] = {metric: report.rows[0].metrics[metric].value for metric in METRICS}
    widths = [f.scale.mean() for _, f in posterior.guide.items() if isinstance(f, IndependentNormalFactor)]
    return {
        "metrics": metrics,
        "fit_seconds": seconds,
        "width": float(torch.stack(widths).mean()),
        "train_nll": sum(entry["nll"] for entry in posterior.record["history"][-20:]) / 20,
    }


def tables(found: Mapping[tuple[str, str, int], Mapping[str, Any]], name: str) -> str:
    """The table of a task and of its shifts, then the differences to its first row."""
    rows: dict[str, dict[int, Mapping[str, Any]]] = {}
    for (task, variant, seed), result in found.items():
        if task == name:
            for kind, tests in result["metrics"].items():
                rows.setdefault(f"{variant} / {kind}", {})[seed] = {**result, "tests": tests}
    if not rows:
        return ""
    reference = next(iter(rows.values()))
    tests = list(next(iter(reference.values()))["tests"])[::-1]
    lines = []
    for test in tests:
        heads = " | ".join(("accuracy", "NLL, nats", "ECE"))
        lines += [f"## {name if test == name else f'{name} -> {test}'}", ""]
        lines += [f"| trained / tested | {heads} | width of A | fit, s | seeds |", "|---" * 7 + "|"]
        for row, seeds in rows.items():
            cells = [over_seeds(result["tests"][test][metric] for result in seeds.values()) for metric in METRICS]
            cells += [over_seeds((result["width"] for result in seeds.values()), 4)]
            cells += [f"{sum(result['fit_seconds'] for result in seeds.values()) / len(seeds):.0f}", str(len(seeds))]
            lines.append(f"| {row} | {' | '.join(cells)} |")
        lines += ["", f"| minus {next(iter(rows))} | {heads} |", "|---" * 4 + "|"]
        for row, seeds in list(rows.items())[1:]:
            paired = [seed for seed in seeds if seed in reference]
            cells = [
                over_seeds(
                    seeds[seed]["tests"][test][metric] - reference[seed]["tests"][test][metric] for seed in paired
                )
                if paired
                else "-"
                for metric in METRICS
            ]
            lines.append(f"| {row} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Compute what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder with uci_sentiment and arc_easy")
    parser.add_argument("--out", type=Path, default=Path("runs/blob_ablation"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--variants", default=";".join(VARIANTS), help="names separated by semicolons")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--release-steps", type=int, default=5000)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32, help="test rows at once")
    parser.add_argument("--limit", type=int, help="at most so many examples of each split, to try the command out")
    parser.add_argument("--tables", action="store_true", help="print what is there and compute nothing")
    arguments = parser.parse_args()
    names, variants = arguments.tasks.split(","), arguments.variants.split(";")
    keys = [
        (name, variant, seed)
        for seed in range(arguments.seeds)
        for name in names
        for variant in variants
        if not (VARIANTS[variant].head and name in SCORED)
    ]
    deciding = {key: getattr(arguments, key) for key in ("steps", "release_steps", "draws", "dtype", "limit")}
    identities = [{"task": name, "variant": variant, "seed": seed, **deciding} for name, variant, seed in keys]
    cells = Cells(arguments.out)
    if arguments.tables:
        results = [cells.result(identity) for identity in identities]
    else:
        results = cells.computed(
            identities, lambda cell: judge(arguments, cell["task"], VARIANTS[cell["variant"]], cell["seed"])
        )
    found = {key: result for key, result in zip(keys, results, strict=True) if result is not None}
    for name in names:
        print(tables(found, name))


if __name__ == "__main__":
    main()
