"""Activations kept for backward and time of a training step: S2FT, LoRA, and full fine-tuning, interleaved.

Usage::

    python benchmarks/s2ft_step.py --steps 20 --tokens 128 --batch-size 2 --device cuda --out runs/s2ft_step

S2FT and LoRA train the same number of weights. Full fine-tuning is the network's own weights with gradients on, in plain
torch; FullRank is this library's, on hooks. Bytes are exact and counted once for each storage, without weights; of times
read the ratios of medians.
"""

import argparse
import copy
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from cells import Cells
from device_clock import seconds_of
from torch import Tensor
from torch.nn import functional

import pyrolora as pl

Step = Callable[[], Tensor]


@contextmanager
def counted(weights: set[int]) -> Iterator[dict[int, int]]:
    """Bytes of the storages that backward keeps."""
    sizes: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
            # while it lives its address is not given to another
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


def measure(cell: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Trained weights, bytes and seconds of each contender."""
    backbone = pl.load_backbone(cell["model"], dtype=cell["dtype"], device=cell["device"])
    task = pl.task("bbc_headlines", train_size=30)
    adapters = {
        "LoRA, rank 8, all projections": pl.LoRA(rank=8, targets="all-linear"),
        "PiSSA, rank 8, all projections": pl.PiSSA(rank=8, targets="all-linear", iterations=2),
        f"S2FT, {cell['channels']} channels and 1 head": pl.S2FT(channels=cell["channels"], heads=1),
        "FullRank": pl.FullRank(),
    }
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 40_000, (cell["batch_size"], cell["tokens"]), generator=generator)
    ids = ids.to(backbone.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labels = torch.arange(cell["batch_size"], device=backbone.device) % len(task.labels)
    steps: dict[str, tuple[Step, list[Tensor]]] = {}
    for name, adapter in adapters.items():
        model = pl.BayesianModel(backbone, task, adapter)
        draw = {site: value.requires_grad_() for site, value in model.initial(generator).items()}
        steps[name] = (
            lambda model=model, draw=draw: functional.cross_entropy(model.row_logits(batch, draw), labels),
            list(draw.values()),
        )
    full = pl.Backbone(copy.deepcopy(backbone.network), backbone.tokenizer, "full")
    plain = pl.BayesianModel(full, task, pl.LastLayer())
    none = plain.initial()
    trained = [p.requires_grad_() for name, p in full.network.named_parameters() if ".layers." in name and p.dim() == 2]
    steps["full fine-tuning in plain torch"] = (
        lambda: functional.cross_entropy(plain.row_logits(batch, none), labels),
        trained,
    )
    optimisers = {name: torch.optim.Adam(parameters, lr=1e-4, foreach=True) for name, (_, parameters) in steps.items()}
    weights = {p.untyped_storage().data_ptr() for net in (backbone, full) for p in net.network.parameters()}
    kept = {}
    for name, (forward, parameters) in steps.items():
        own = weights | {parameter.untyped_storage().data_ptr() for parameter in parameters}
        with counted(own) as sizes:
            loss = forward()
        kept[name] = sum(sizes.values())
        del loss
        backbone.release()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(cell["steps"] + 2):
        for name, (forward, _) in steps.items():

            def step(name: str = name, forward: Step = forward) -> None:
                optimisers[name].zero_grad(set_to_none=True)
                forward().backward()
                optimisers[name].step()
                backbone.release()
                full.release()

            took = seconds_of(step, cell["device"])
            if index >= 2:
                seconds[name].append(took)
    return {
        name: {
            "trained": sum(parameter.numel() for parameter in parameters),
            "kept": kept[name] / 2**20,
            "adam": sum(2 * p.numel() * p.element_size() for p in parameters) / 2**20,
            "seconds": statistics.median(seconds[name]),
        }
        for name, (_, parameters) in steps.items()
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--channels", type=int, default=77)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/s2ft_step"))
    arguments = parser.parse_args()
    cell = {key: value for key, value in vars(arguments).items() if key != "out"}
    found = Cells(arguments.out).computed([cell], measure)[0]
    lora = next(iter(found.values()))["seconds"]
    what = f"{arguments.batch_size} x {arguments.tokens} tokens, {arguments.dtype}, {arguments.device}"
    print(f"{what}, {arguments.steps} interleaved steps\n")
    print("| contender | trained | kept for backward (MiB) | Adam (MiB) | median ms | to LoRA |")
    print("|---|---|---|---|---|---|")
    for name, row in found.items():
        print(
            f"| {name} | {row['trained']:,} | {row['kept']:.0f} | {row['adam']:.0f} | {1e3 * row['seconds']:.1f} | "
            f"{row['seconds'] / lora:.2f} |"
        )


if __name__ == "__main__":
    main()
