"""Kronecker Laplace of every q and v adapter: fit, evidence search and prediction against laplace-torch 0.3.

Usage::

    python benchmarks/laplace_cost.py --data-dir FOLDER_WITH_ARC_EASY --examples 16
    python benchmarks/laplace_cost.py --growth            # how our own cost grows, with fitted exponents

Both sides see the same multiple-choice prompts (five letters) through SmolLM2-135M in float32, with rank-8 adapters on all
q and v projections (460,800 weights). Timed passes alternate in one process; peak memory is of a process for each side.
laplace-torch predicts by its probit link and one row at a time, the setting in which it does not run out of memory; ours
by quasi-random logit draws, the default, in batches of 8. Without ``--data-dir`` the
prompts are the headlines of the demo.
"""

import argparse
import copy
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import torch
from prompts import multiple_choice
from torch import Tensor, nn

import pyrolora as pl
from pyrolora.guides import Point, build_guide
from pyrolora.inference.laplace.precision import declared_prior, evidence_precision
from pyrolora.inference.laplace.summation import flat_eigenvalues, new_structures, sum_curvature
from pyrolora.inference.logit_gradients import LogitGradients
from pyrolora.inference.posterior import Posterior

FIT_BATCH = PREDICT_BATCH = 8
SIDES = ("laplace-torch", "ours float32", "ours bfloat16")


def somewhere(model: pl.BayesianModel) -> Posterior:
    """A point with B away from zero, so that no gradient vanishes; what a MAP fit would cost is not measured here."""
    generator = torch.Generator().manual_seed(0)
    start = model.initial(generator)
    for name, value in start.items():
        if name.endswith("lora_B"):
            value.normal_(0.0, 1e-3, generator=generator)
    return Posterior(model, build_guide(Point(), model, start=start), {})


class Wrapped(nn.Module):
    """PEFT's network from a dictionary to the logits of the label tokens."""

    def __init__(self, peft: nn.Module, label_ids: Tensor) -> None:
        super().__init__()
        self.peft, self.label_ids = peft, label_ids

    def forward(self, data: dict[str, Tensor]) -> Tensor:
        """Logits of the labels at the last token, ``(rows, classes)``."""
        network = self.peft.base_model.model
        hidden = network.model(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).last_hidden_state
        last = data["attention_mask"].sum(1) - 1
        rows = torch.arange(len(last))
        return hidden[rows, last] @ network.lm_head.weight[self.label_ids].T


def laplace_torch(model: pl.BayesianModel, estimate: Posterior) -> tuple[Any, Callable[[dict[str, Tensor]], Any]]:
    """laplace-torch's object and a function that fits it to a batch."""
    from laplace import Laplace
    from laplace.curvature.curvlinops import CurvlinopsGGN
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from torch.utils.data import DataLoader

    network = copy.deepcopy(model.backbone.network)
    # its vmap over backwards knows no batching rule for the fused attention
    network.set_attn_implementation("eager")
    peft = get_peft_model(network, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])).eval()
    mean = estimate.mean()
    set_peft_model_state_dict(
        peft, {key: mean[name][i] for name, site in model.sites.items() for i, key in enumerate(site.keys)}
    )
    label_ids = torch.tensor(model.task.format.label_ids(model.backbone.tokenizer))
    made = Laplace(Wrapped(peft, label_ids), "classification", "all", "kron", backend=CurvlinopsGGN)

    def fit(batch: dict[str, Tensor]) -> None:
        keys = ("input_ids", "attention_mask", "labels")
        rows = [{key: batch[key][i] for key in keys} for i in range(len(batch["labels"]))]
        made.fit(DataLoader(rows, batch_size=FIT_BATCH))

    return made, fit


def setting(
    data_dir: str | None, dtype: str = "float32", classes: int = 5, **lora: Any
) -> tuple[pl.BayesianModel, Posterior]:
    """Model and estimate."""
    backbone = pl.load_backbone("smollm2-135m", dtype=dtype)
    task = multiple_choice(data_dir, classes)
    model = pl.BayesianModel(backbone, task, adapter=pl.LoRA(**lora), prior=dist.Normal(0.0, 1.0))
    return model, somewhere(model)


def some_rows(model: pl.BayesianModel, count: int, batch_size: int) -> list[dict[str, Tensor]]:
    """The first examples in batches, as both sides see them."""
    data = model.encode(model.task.train.subset(count, seed=0))
    return list(data.batches(batch_size))


def our_fit(model: pl.BayesianModel, estimate: Posterior, count: int, structure: str = "kron") -> dict[str, Any]:
    """Curvature of the first examples."""
    names = tuple(model.sites)
    structures = new_structures(model, names, structure, 10)
    data = model.encode(model.task.train.subset(count, seed=0))
    gradients = LogitGradients(model, estimate.mean(), names)
    sum_curvature(gradients, structures, data, batch_size=FIT_BATCH, checkpoint=None, progress=False)
    return structures


def our_posterior(model: pl.BayesianModel, estimate: Posterior, count: int) -> Posterior:
    """The whole engine."""
    return pl.Laplace(structure="kron", batch_size=FIT_BATCH).fit(
        model, model.task.train.subset(count, seed=0), progress=False, estimate=estimate
    )


def timed(action: Callable[[], Any]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def side_by_side(arguments: argparse.Namespace) -> None:
    """Print seconds for 100 examples, and ratios of medians with their spread."""
    model, estimate = setting(arguments.data_dir)
    half, half_estimate = setting(arguments.data_dir, "bfloat16")
    made, fit = laplace_torch(model, estimate)
    count = arguments.examples
    batches = some_rows(model, count, FIT_BATCH)
    whole = model.encode(model.task.train.subset(count, seed=0)).batch(list(range(count)))
    rows = [{key: value[i : i + 1] for key, value in whole.items()} for i in range(min(2, count))]
    fits: dict[str, list[float]] = {side: [] for side in SIDES}
    predictions: dict[str, list[float]] = {name: [] for name in fits}
    posteriors = our_posterior(model, estimate, FIT_BATCH), our_posterior(half, half_estimate, FIT_BATCH)
    for _ in range(arguments.rounds):
        fits["laplace-torch"].append(timed(lambda: fit(whole)) / count)
        fits["ours float32"].append(timed(lambda: our_fit(model, estimate, count)) / count)
        fits["ours bfloat16"].append(timed(lambda: our_fit(half, half_estimate, count)) / count)
        predictions["laplace-torch"].append(
            timed(lambda: [made(row, link_approx="probit") for row in rows]) / len(rows)
        )
        for name, posterior in zip(("ours float32", "ours bfloat16"), posteriors, strict=True):
            seconds = timed(lambda p=posterior: [p.predict(batch) for batch in batches])
            predictions[name].append(seconds / count)
    print(f"{sum(site.numel for site in model.sites.values()):,} weights, {model.classes} classes, {count} examples of")
    print(f"{whole['attention_mask'].sum() / count:.0f} tokens on average, {arguments.rounds} alternating rounds\n")
    print("| | fit, s per 100 | ratio (range) | predict, s per 100 | ratio (range) |\n|---|---|---|---|---|")
    for name in fits:
        cells = []
        for table in (fits, predictions):
            ratios = sorted(a / b for a, b in zip(table["laplace-torch"], table[name], strict=True))
            cells += [
                f"{100 * statistics.median(table[name]):.1f}",
                f"{statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})",
            ]
        print(f"| {name} | {' | '.join(cells)} |")
    structures = our_fit(model, estimate, count)
    eigenvalues, priors = flat_eigenvalues(structures), declared_prior(model, tuple(model.sites))
    for group in ("model", "site", "layer"):
        seconds = timed(lambda g=group: evidence_precision(estimate.mean(), priors, eigenvalues, g))
        print(f"\nevidence search, one precision per {group}: {seconds:.2f} s", end="")
    print(f"\nlaplace-torch's 100 Adam steps: {timed(lambda: made.optimize_prior_precision(n_steps=100)):.2f} s")
    print("\n| peak memory, GB | model loaded | fit | fit and predict |\n|---|---|---|---|")
    for side in SIDES:
        command = [sys.executable, __file__, "--memory", side, "--examples", str(count)]
        command += ["--data-dir", arguments.data_dir] if arguments.data_dir else []
        peaks = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        print(f"| {side} | {' | '.join(f'{peak:.2f}' for peak in peaks)} |")


def memory(arguments: argparse.Namespace) -> None:
    """Print the peak resident memory of one side after fitting and after predicting, gigabytes."""

    def peak() -> float:
        # not getrusage, whose peak is inherited from the process that started this one
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1e6

    model, estimate = setting(arguments.data_dir, "bfloat16" if "bfloat16" in arguments.memory else "float32")
    loaded = peak()
    if arguments.memory.startswith("ours"):
        posterior = our_posterior(model, estimate, arguments.examples)
        fitted = peak()
        for batch in some_rows(model, arguments.examples, PREDICT_BATCH):
            posterior.predict(batch)
    else:
        data = model.encode(model.task.train.subset(arguments.examples, seed=0))
        whole = data.batch(list(range(arguments.examples)))
        made, fit = laplace_torch(model, estimate)
        fit(whole)
        fitted = peak()
        made({key: value[:1] for key, value in whole.items()}, link_approx="probit")
    print(json.dumps([loaded, fitted, peak()]))


def growth(arguments: argparse.Namespace) -> None:
    """Print how our cost grows with examples, rank, classes and layers, and the slope in double logarithms."""
    print("| grows | values | fit, s | exponent |\n|---|---|---|---|")

    def row(name: str, values: list[int], measure: Callable[[int], float]) -> None:
        seconds = [measure(value) for value in values]
        x, y = ([math.log(value) for value in column] for column in (values, seconds))
        slope = statistics.linear_regression(x, y).slope
        print(f"| {name} | {', '.join(map(str, values))} | {', '.join(f'{s:.1f}' for s in seconds)} | {slope:.2f} |")

    def best(model: pl.BayesianModel, estimate: Posterior, count: int) -> float:
        return min(timed(lambda: our_fit(model, estimate, count)) for _ in range(arguments.rounds))

    model, estimate = setting(arguments.data_dir, "bfloat16")
    row("examples", [8, 16, 32, 64], lambda count: best(model, estimate, count))
    row("rank", [4, 8, 16, 32], lambda rank: best(*setting(arguments.data_dir, "bfloat16", rank=rank), 16))
    if arguments.data_dir:
        row("classes", [4, 8, 16], lambda classes: best(*setting(arguments.data_dir, "bfloat16", classes), 16))
    row(
        "layers from the top",
        [5, 10, 20, 30],
        lambda count: best(*setting(arguments.data_dir, "bfloat16", layers=tuple(range(30 - count, 30))), 16),
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir")
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--memory", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        memory(arguments)
    elif arguments.growth:
        growth(arguments)
    else:
        side_by_side(arguments)


if __name__ == "__main__":
    main()
