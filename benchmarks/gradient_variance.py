"""Variance of the ELBO's gradient under each noise scope, and what it does to the fit.

Usage::

    python benchmarks/gradient_variance.py --device cuda --seeds 3 --out runs/gradient_variance
    python benchmarks/gradient_variance.py --out runs/gradient_variance --tables

First table: a guide is trained for a few steps, then the gradient of one mini-batch is drawn many times under every scope, in
turn. The variance is over draws alone, summed over the parameters of a role and divided by the squared norm of the mean
gradient of coherent draws; "at equal cost" multiplies it by the time of a gradient, since k gradients divide a variance by k.
Second table: validation NLL and accuracy, predicted by coherent draws, after equally many steps under every scope. Token
noise and Flipout estimate the gradient of another objective than the ELBO: their variance is that of their own.
Cells are kept in the folder and may be computed by several processes.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from cells import Cells, over_seeds
from torch import Tensor

import pyrolora as pl
from pyrolora.inference.elbo import AnalyticELBO
from pyrolora.inference.noise import NoiseMessenger, TemperMessenger, TokenMessenger
from pyrolora.inference.training import TrainingRun
from pyrolora.models.tasks import Task

SCOPES = ("weight", "example", "token", "flipout")
ROLES = {"loc": "means of A", "scale": "widths of A", "point": "B"}
KL_WEIGHT = 0.01


@cache
def network(dtype: str, device: str) -> pl.Backbone:
    """The frozen model, loaded once a process."""
    return pl.load_backbone("smollm2-135m", dtype=dtype, device=device)


def load(arguments: argparse.Namespace, seed: int) -> Task:
    """The task under a seed."""
    folder = None if arguments.task == "bbc_headlines" else arguments.data_dir
    return pl.task(arguments.task, data_dir=folder, train_size=arguments.train_size, seed=seed)


def build(arguments: argparse.Namespace, task: Task) -> pl.BayesianModel:
    """The model that is compared on."""
    prior = {"*.lora_A": dist.Normal(0.0, arguments.prior), "*.lora_B": dist.Normal(0.0, 0.05)}
    return pl.BayesianModel(network(arguments.dtype, arguments.device), task, prior=prior)


def one_gradient(run: TrainingRun, batch: Mapping[str, Tensor], scope: str) -> dict[str, Tensor]:
    """A gradient of the loss of one mini-batch under a scope, by role, flattened."""
    scopes: list[Any] = [TemperMessenger(len(run.data), KL_WEIGHT)]
    if scope == "example":
        scopes.append(NoiseMessenger(run.noisy_sites, batch["input_ids"].shape[0]))
    elif scope != "weight":
        scopes.append(TokenMessenger(run.noisy_sites, scope))
    model: Callable[..., Any] = run.model.__call__
    guide: Callable[..., Any] = run.guide.__call__
    for messenger in scopes:
        model, guide = messenger(model), messenger(guide)
    run.guide.zero_grad()
    with pyro.validation_enabled(False):
        AnalyticELBO().loss_and_grads(model, guide, batch, len(run.data))
    grouped = run.guide.parameters_by_role()
    return {role: torch.cat([p.grad.flatten().double() for p in grouped[role] if p.grad is not None]) for role in ROLES}


def variances(arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Relative variance by scope and role, and seconds of a gradient."""
    task = load(arguments, seed)
    run = TrainingRun(pl.SVI(steps=arguments.steps, kl_weight=KL_WEIGHT, seed=seed), build(arguments, task), task.train)
    stream = run.data.stream(16, seed=seed)
    for _ in range(arguments.warm):
        run.take_step(next(stream))
    total: dict[str, dict[str, float]] = {scope: dict.fromkeys(ROLES, 0.0) for scope in SCOPES}
    seconds: dict[str, list[float]] = {scope: [] for scope in SCOPES}
    for number in range(arguments.batches):
        batch = next(stream)
        torch.manual_seed(seed * 1000 + number)
        sums = {scope: {role: [0.0, 0.0] for role in ROLES} for scope in SCOPES}
        for draw in range(arguments.gradients + 1):
            for scope in SCOPES:
                if arguments.device != "cpu":
                    torch.cuda.synchronize()
                began = time.perf_counter()
                found = one_gradient(run, batch, scope)
                if arguments.device != "cpu":
                    torch.cuda.synchronize()
                if draw == 0:  # the first meets cold caches
                    continue
                seconds[scope].append(time.perf_counter() - began)
                for role, gradient in found.items():
                    sums[scope][role][0] = sums[scope][role][0] + gradient
                    sums[scope][role][1] = sums[scope][role][1] + gradient.square().sum()
        count = arguments.gradients
        for role in ROLES:
            # both coherent scopes estimate one gradient, and a product of independent estimates has no bias by their variance
            means = {scope: torch.as_tensor(sums[scope][role][0]) / count for scope in SCOPES}
            size = float((means["weight"] * means["example"]).sum())
            for scope in SCOPES:
                spread = float(sums[scope][role][1]) - count * float(means[scope].square().sum())
                total[scope][role] += spread / (count - 1) / size / arguments.batches
    run.model.release()
    return {"variance": total, "seconds": {scope: statistics.median(times) for scope, times in seconds.items()}}


def fit(arguments: argparse.Namespace, scope: str, seed: int) -> dict[str, float]:
    """Validation metrics after training under a scope."""
    task = load(arguments, seed)
    engine = pl.SVI(guide=pl.BLoB(), steps=arguments.steps, kl_weight=KL_WEIGHT, noise=scope, seed=seed)
    posterior = engine.fit(build(arguments, task), task.train, progress=False)
    held_out = task.validation if arguments.limit is None else task.validation.subset(arguments.limit, seed=0)
    report = pl.evaluate({"it": posterior}, held_out, seed=seed, resamples=40, progress=False)
    history = posterior.record["history"][-20:]
    found = {name: report.rows[0].metrics[name].value for name in ("nll", "accuracy", "ece")}
    return {**found, "train_nll": sum(entry["nll"] for entry in history) / len(history)}


def main() -> None:
    """Compute what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gradient_variance"))
    parser.add_argument("--task", default="bbc_headlines")
    parser.add_argument("--data-dir")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--prior", type=float, default=0.05, help="prior standard deviation of A")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train-size", type=int, default=300)
    parser.add_argument("--warm", type=int, default=50, help="steps before gradients are drawn")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--gradients", type=int, default=50, help="draws of a gradient for each batch and scope")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--limit", type=int, help="validation examples at most, to try the command out")
    parser.add_argument("--tables", action="store_true", help="print what is there and compute nothing")
    arguments = parser.parse_args()
    deciding = {key: value for key, value in vars(arguments).items() if key not in ("out", "device", "seeds", "tables")}
    # no scope: the variances of all scopes
    keys = [(scope, seed) for seed in range(arguments.seeds) for scope in (None, *SCOPES)]
    identities = [{"scope": scope, "seed": seed, **deciding} for scope, seed in keys]
    cells = Cells(arguments.out)

    def compute(cell: Mapping[str, Any]) -> dict[str, Any]:
        if cell["scope"] is None:
            return variances(arguments, cell["seed"])
        return fit(arguments, cell["scope"], cell["seed"])

    results = (
        [cells.result(identity) for identity in identities] if arguments.tables else cells.computed(identities, compute)
    )
    found = {key: result for key, result in zip(keys, results, strict=True) if result is not None}
    of_seeds = [result for (scope, _), result in found.items() if scope is None]
    heads = " | ".join(f"{name}, equal cost" for name in ROLES.values())
    print("| noise | " + " | ".join(ROLES.values()) + f" | time of a gradient | {heads} |\n" + "|---" * 8 + "|")
    for scope in SCOPES if of_seeds else ():
        times = [one["seconds"][scope] / one["seconds"]["weight"] for one in of_seeds]
        plain = {role: [one["variance"][scope][role] for one in of_seeds] for role in ROLES}
        base = {role: [one["variance"]["weight"][role] for one in of_seeds] for role in ROLES}
        cells_of = [over_seeds(values, 2) for values in plain.values()] + [over_seeds(times, 2)]
        # relative to one draw for the batch
        cells_of += [
            over_seeds((v * t / b for v, t, b in zip(plain[role], times, base[role], strict=True)), 2) for role in ROLES
        ]
        print(f"| {scope} | {' | '.join(cells_of)} |")
    print("\n| noise | validation NLL | accuracy | ECE | training NLL |\n" + "|---" * 5 + "|")
    for scope in SCOPES:
        rows = [result for (name, _), result in found.items() if name == scope]
        if rows:
            keys = ("nll", "accuracy", "ece", "train_nll")
            print(f"| {scope} | {' | '.join(over_seeds(row[key] for row in rows) for key in keys)} |")


if __name__ == "__main__":
    main()
