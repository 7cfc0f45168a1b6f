"""Training step against a hand-written torch loop and against PEFT, interleaved in one run.

Usage::

    python benchmarks/step_time.py --dtype float32 --steps 30

Every contender sees the same batches of 16 BBC headlines, adapts the same q and v projections of SmolLM2-135M at rank 8,
and uses Adam. Steps are taken in turn, so a change of the machine's speed meets all of them; medians of ratios are the
result, the times are not.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Mapping

import pyro.distributions as dist
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional

import pyrolora as pl
from pyrolora.inference.training import TrainingRun
from pyrolora.models.tasks import Split


def hand_written(model: pl.BayesianModel, num_data: int, kl_weight: float) -> Callable[[Mapping[str, Tensor]], None]:
    """BLoB in plain torch: independent draws for every example, closed-form KL, one fused Adam."""
    start = model.initial(torch.Generator().manual_seed(0))
    locs = {name: value.clone().requires_grad_() for name, value in start.items()}
    roots = {
        name: torch.full_like(value, 0.2).sqrt().requires_grad_()
        for name, value in start.items()
        if name.endswith("lora_A")
    }
    optimiser = torch.optim.Adam(
        [{"params": list(locs.values()), "lr": 1e-3}, {"params": list(roots.values()), "lr": 2e-2}], foreach=True
    )

    def step(batch: Mapping[str, Tensor]) -> None:
        optimiser.zero_grad(set_to_none=True)
        rows = batch["input_ids"].shape[0]
        draw, divergence = dict(locs), torch.zeros((), device=batch["labels"].device)
        for name, root in roots.items():
            scale = root.square()
            draw[name] = locs[name] + scale * torch.randn(rows, *scale.shape, device=scale.device)
            ratio = (scale / 0.2).square()
            divergence = divergence + 0.5 * (ratio + (locs[name] / 0.2).square() - 1 - ratio.log()).sum()
        logits = model.row_logits(batch, draw)
        loss = functional.cross_entropy(logits, batch["labels"]) + kl_weight * divergence / num_data
        loss.backward()
        loss.item()
        model.release()
        optimiser.step()

    return step


def peft(backbone: pl.Backbone, label_ids: Tensor, attention: str) -> Callable[[Mapping[str, Tensor]], None]:
    """PEFT's LoRA with logits at the last position only."""
    network = copy.deepcopy(backbone.network)
    network.set_attn_implementation(attention)
    adapted = get_peft_model(network, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    adapted.train()
    optimiser = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=1e-3, foreach=True)

    def step(batch: Mapping[str, Tensor]) -> None:
        optimiser.zero_grad(set_to_none=True)
        output = adapted(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], logits_to_keep=1, use_cache=False
        )
        loss = functional.cross_entropy(output.logits[:, -1, label_ids].float(), batch["labels"])
        loss.backward()
        loss.item()
        optimiser.step()

    return step


def ours(engine: pl.SVI, model: pl.BayesianModel, data: Split) -> Callable[[Mapping[str, Tensor]], None]:
    """One step of this library's engine on a given batch."""
    run = TrainingRun(engine, model, data)

    def step(batch: Mapping[str, Tensor]) -> None:
        run.take_step(batch)
        model.release()

    return step


def ratio(above: list[float], below: list[float]) -> str:
    """Median of the ratios of steps on the same batch, with their quartiles."""
    quartiles = statistics.quantiles([a / b for a, b in zip(above, below, strict=True)], n=4)
    return f"{quartiles[1]:.2f} ({quartiles[0]:.2f} to {quartiles[2]:.2f})"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=16)
    arguments = parser.parse_args()
    backbone = pl.load_backbone("smollm2-135m", dtype=arguments.dtype, device=arguments.device)
    task = pl.task("bbc_headlines", train_size=300)
    blob_prior = {"*.lora_A": dist.Normal(0.0, 0.2), "*.lora_B": pl.Flat()}
    blob = pl.BayesianModel(backbone, task, prior=blob_prior)
    mle = pl.BayesianModel(backbone, task, prior=pl.Flat())
    label_ids = torch.tensor(task.format.label_ids(backbone.tokenizer), device=backbone.device)
    own_attention = backbone.network.config._attn_implementation
    steps = 10 * arguments.steps
    contenders = {
        "SVI(BLoB), draw per example": ours(pl.SVI(steps=steps, kl_weight=0.1), blob, task.train),
        "hand-written BLoB, draw per example": hand_written(blob, len(task.train), 0.1),
        "SVI(BLoB), one draw": ours(pl.SVI(steps=steps, kl_weight=0.1, noise="weight"), blob, task.train),
        "MAP under Flat()": ours(pl.MAP(steps=steps), mle, task.train),
        "PEFT LoRA, sdpa": peft(backbone, label_ids, "sdpa"),
    }
    if own_attention != "sdpa":
        contenders[f"PEFT LoRA, {own_attention}"] = peft(backbone, label_ids, own_attention)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    stream = blob.encode(task.train).stream(arguments.batch_size, seed=0, device=backbone.device)
    for index in range(arguments.steps + 3):
        batch = next(stream)
        for name, step in contenders.items():
            began = time.perf_counter()
            step(batch)
            if index >= 3:
                seconds[name].append(time.perf_counter() - began)
    references = [name for name in contenders if name.startswith(("hand", "PEFT"))]
    print(
        f"{arguments.device}, dtype {arguments.dtype}, batch {arguments.batch_size}, {arguments.steps} interleaved steps\n"
    )
    print("| contender | median ms | " + " | ".join(f"ratio to {name}" for name in references) + " |")
    print("|---|---|" + "---|" * len(references))
    for name, values in seconds.items():
        ratios = " | ".join(ratio(values, seconds[reference]) for reference in references)
        print(f"| {name} | {1000 * statistics.median(values):.1f} | {ratios} |")


if __name__ == "__main__":
    main()
