"""Where an adapter starts: loss against step at equal rates and at each one's best, and what is forgotten meanwhile.

Usage::

    python benchmarks/placement_curves.py --rates 1e-4,3e-4,1e-3,3e-3 --seeds 3 --device cuda --out runs/placement_curves
    python benchmarks/placement_curves.py --adapters "lora|CorDA(mode='knowledge', calibration='crowd_tweets')" --seeds 3

Every cell is a maximum-likelihood fit on 300 headlines. Printed for each adapter and learning rate: training loss after
some steps, loss on validation headlines, and by how much the network's loss as a language model rose on unrelated text.
Means over seeds with 95 % t-intervals. Read the rates' rows at equal rate first, then each adapter's best row (chosen by the
validation loss); forgetting is to be compared at equal validation loss, not at equal rate. Every finished cell is a file of
the folder ``--out`` and is not computed again; several processes may fill one folder.
"""

import argparse
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from cells import Cells
from scipy.stats import t as student
from torch import Tensor
from torch.nn import functional

import pyrolora as pl
from pyrolora.models.declarations import declared
from pyrolora.models.tasks import encode

ADAPTERS = "|".join(
    ("LoRA(rank=8, alpha=8, targets='all-linear')", "PiSSA(rank=8, targets='all-linear')",
     "CorDA(rank=8, targets='all-linear')")
)  # fmt: skip


def text_batches(backbone: pl.Backbone, name: str, rows: int) -> Iterator[Mapping[str, Tensor]]:
    """Prompts of a task as plain text."""
    other = pl.task(name)
    split = other.test if len(other.test) <= rows else other.test.subset(rows, seed=0)
    return encode(split, other.format, backbone.tokenizer).batches(16)


@torch.no_grad()
def language_loss(backbone: pl.Backbone, batches: Iterator[Mapping[str, Tensor]]) -> float:
    """Mean negative log-likelihood of the next token, nats, under whatever draw is bound."""
    total, tokens = 0.0, 0
    for batch in batches:
        hidden = backbone.hidden_states(batch)
        mask = batch["attention_mask"].to(hidden.device).bool()
        pairs = mask[:, :-1] & mask[:, 1:]
        logits = backbone.network.get_output_embeddings()(hidden[:, :-1][pairs]).float()
        targets = batch["input_ids"].to(hidden.device)[:, 1:][pairs]
        total += float(functional.cross_entropy(logits, targets, reduction="sum"))
        tokens += int(pairs.sum())
    return total / tokens


def measure(backbone: pl.Backbone, cell: dict[str, Any]) -> dict[str, float]:
    """One fit and what it did."""
    task = pl.task(cell["task"], data_dir=cell["data_dir"], train_size=cell["train_size"], seed=cell["seed"])
    made = declared(cell["adapter"], pl.Adapter.registered, "adapter")
    model = pl.BayesianModel(backbone, task, made, prior=pl.Flat())
    # a large first step is part of a start's character, so the rate rises over a few steps only
    engine = pl.MAP(steps=cell["steps"], learning_rate=float(cell["rate"]), seed=cell["seed"], warmup=0.02)
    before = language_loss(backbone, text_batches(backbone, cell["unrelated"], cell["rows"]))
    try:
        posterior = engine.fit(model, task.train, progress=False)
    except FloatingPointError:
        return {"validation": math.inf, "forgotten": math.inf}
    losses = torch.tensor([entry["nll"] for entry in posterior.record["history"]])
    marks = [step for step in (10, 20, 40, 80, 150, 300) if step <= cell["steps"]]
    found = {f"step {step}": float(losses[max(0, step - 10) : step].mean()) for step in marks}
    found["validation"] = float(-posterior.predict(task.validation).log_likelihood.mean())
    backbone.bind(model.deltas(posterior.mean()))
    after = language_loss(backbone, text_batches(backbone, cell["unrelated"], cell["rows"]))
    backbone.release()
    found["forgotten"] = after - before
    found["weights"] = sum(site.numel for site in model.sites.values())
    return found


def interval(values: list[float]) -> str:
    """Mean and half-width of the 95 % t-interval."""
    numbers = torch.tensor(values, dtype=torch.float64)
    if len(values) < 2:
        return f"{float(numbers[0]):.3f}"
    half = float(student.ppf(0.975, len(values) - 1)) * float(numbers.std()) / len(values) ** 0.5
    return f"{float(numbers.mean()):.3f} ± {half:.3f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", default="bbc_headlines")
    parser.add_argument("--unrelated", default="crowd_tweets")
    parser.add_argument("--adapters", default=ADAPTERS, help="declarations, separated by |")
    parser.add_argument("--rates", default="1e-4,3e-4,1e-3,3e-3")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train-size", type=int, default=300)
    parser.add_argument("--rows", type=int, default=200, help="rows of unrelated text")
    parser.add_argument("--data-dir")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/placement_curves"))
    arguments = parser.parse_args()
    backbone = pl.load_backbone(arguments.model, dtype=arguments.dtype, device=arguments.device)
    shared = {key: value for key, value in vars(arguments).items() if key not in ("adapters", "rates", "seeds", "out")}
    cells = [
        {**shared, "adapter": adapter, "rate": rate, "seed": seed}
        for adapter in arguments.adapters.split("|")
        for rate in arguments.rates.split(",")
        for seed in range(arguments.seeds)
    ]
    rows: dict[tuple[str, str], list[dict[str, float]]] = {}
    results = Cells(arguments.out).computed(cells, lambda cell: measure(backbone, cell))
    for cell, found in zip(cells, results, strict=True):
        rows.setdefault((cell["adapter"], cell["rate"]), []).append(found)
    columns = list(max((entries[0] for entries in rows.values()), key=len))
    print(f"\n| adapter | rate | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}")
    best: dict[str, tuple[float, str]] = {}
    for (adapter, rate), entries in rows.items():
        shown = [interval([entry.get(column, math.inf) for entry in entries]) for column in columns]
        mean = sum(entry["validation"] for entry in entries) / len(entries)
        best[adapter] = min(best.get(adapter, (math.inf, "")), (mean, rate))
        print(f"| {adapter} | {rate} | {' | '.join(shown)} |")
    print("\nBest rate by validation loss:")
    for adapter, (loss, rate) in best.items():
        print(f"- {adapter}: {loss:.3f} at {rate}")


if __name__ == "__main__":
    main()
