"""Where an adapter starts: loss against step at equal rates and at each one's best, and what is forgotten meanwhile.

Usage::

    python benchmarks/placement_curves.py --rates 1e-4,3e-4,1e-3,3e-3 --seeds 3 --steps 150
    python benchmarks/placement_curves.py --adapters "lora|CorDA(mode='knowledge', calibration='crowd_tweets')" --seeds 3

Every cell is a maximum-likelihood fit on 300 headlines. Printed for each adapter and learning rate: training loss after
some steps, loss on validation headlines, and by how much the network's loss as a language model rose on unrelated text.
Means over seeds with 95 % t-intervals. Read the rates' rows at equal rate first, then each adapter's best row (chosen by the
validation loss); forgetting is to be compared at equal validation loss, not at equal rate. Every finished cell is a line of
the file ``--out``, and a second call takes it from there.
"""

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from scipy.stats import t as student
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

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


def cell(
    arguments: argparse.Namespace, backbone: pl.Backbone, adapter: str, rate: float, seed: int
) -> dict[str, float]:
    """One fit and what it did."""
    task = pl.task(arguments.task, train_size=arguments.train_size, seed=seed)
    made = declared(adapter, pl.Adapter.registered, "adapter")
    model = pl.BayesianModel(backbone, task, made, prior=pl.Flat())
    # a large first step is part of a start's character, so the rate rises over a few steps only
    engine = pl.MAP(steps=arguments.steps, learning_rate=rate, seed=seed, warmup=0.02)
    before = language_loss(backbone, text_batches(backbone, arguments.unrelated, arguments.rows))
    try:
        posterior = engine.fit(model, task.train, progress=False)
    except FloatingPointError:
        return {"validation": math.inf, "forgotten": math.inf}
    losses = torch.tensor([entry["nll"] for entry in posterior.record["history"]])
    marks = [step for step in (10, 20, 40, 80, 150, 300) if step <= arguments.steps]
    found = {f"step {step}": float(losses[max(0, step - 10) : step].mean()) for step in marks}
    found["validation"] = float(-posterior.predict(task.validation).log_likelihood.mean())
    backbone.bind(model.deltas(posterior.mean()))
    after = language_loss(backbone, text_batches(backbone, arguments.unrelated, arguments.rows))
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
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/placement_curves.jsonl"))
    arguments = parser.parse_args()
    backbone = pl.load_backbone(arguments.model, dtype=arguments.dtype)
    shared = {
        key: getattr(arguments, key) for key in ("model", "task", "unrelated", "steps", "train_size", "rows", "dtype")
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    lines = arguments.out.read_text().splitlines() if arguments.out.exists() else []
    done = {json.dumps(entry["cell"]): entry["found"] for entry in map(json.loads, lines)}
    rows: dict[tuple[str, str], list[dict[str, float]]] = {}
    cells = [
        (a, r, s)
        for a in arguments.adapters.split("|")
        for r in arguments.rates.split(",")
        for s in range(arguments.seeds)
    ]
    for adapter, rate, seed in tqdm(cells):
        name = {**shared, "adapter": adapter, "rate": rate, "seed": seed}
        if json.dumps(name) not in done:
            done[json.dumps(name)] = cell(arguments, backbone, adapter, float(rate), seed)
            with arguments.out.open("a") as file:
                file.write(json.dumps({"cell": name, "found": done[json.dumps(name)]}) + "\n")
        rows.setdefault((adapter, rate), []).append(done[json.dumps(name)])
    columns = list(next(iter(rows.values()))[0])
    print(f"\n| adapter | rate | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}")
    best: dict[str, tuple[float, str]] = {}
    for (adapter, rate), found in rows.items():
        cells_ = [interval([entry.get(column, math.inf) for entry in found]) for column in columns]
        mean = sum(entry["validation"] for entry in found) / len(found)
        best[adapter] = min(best.get(adapter, (math.inf, "")), (mean, rate))
        print(f"| {adapter} | {rate} | {' | '.join(cells_)} |")
    print("\nBest rate by validation loss:")
    for adapter, (loss, rate) in best.items():
        print(f"- {adapter}: {loss:.3f} at {rate}")


if __name__ == "__main__":
    main()
