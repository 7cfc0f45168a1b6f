"""Activations kept for backward and time of a training step: S2FT, LoRA, and full fine-tuning, interleaved.

Usage::

    python benchmarks/s2ft_step.py --steps 20 --tokens 128 --batch-size 2

S2FT and LoRA train the same number of weights. Full fine-tuning is the network's own weights with gradients on, in plain
torch; FullRank is this library's, on hooks. Bytes are exact and counted once for each storage, without weights; of times
read the ratios of medians.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
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


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--channels", type=int, default=77)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    backbone = pl.load_backbone(arguments.model, dtype=arguments.dtype)
    task = pl.task("bbc_headlines", train_size=30)
    adapters = {
        "LoRA, rank 8, all projections": pl.LoRA(rank=8, targets="all-linear"),
        "PiSSA, rank 8, all projections": pl.PiSSA(rank=8, targets="all-linear", iterations=2),
        f"S2FT, {arguments.channels} channels and 1 head": pl.S2FT(channels=arguments.channels, heads=1),
        "FullRank": pl.FullRank(),
    }
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 40_000, (arguments.batch_size, arguments.tokens), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labels = torch.arange(arguments.batch_size) % len(task.labels)
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
    for index in range(arguments.steps + 2):
        for name, (forward, _) in steps.items():
            began = time.perf_counter()
            optimisers[name].zero_grad(set_to_none=True)
            forward().backward()
            optimisers[name].step()
            backbone.release()
            full.release()
            if index >= 2:
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    lora = next(iter(medians.values()))
    print(
        f"{arguments.batch_size} x {arguments.tokens} tokens, {arguments.dtype}, {arguments.steps} interleaved steps\n"
    )
    print(
        "| contender | trained | kept for backward (MiB) | Adam (MiB) | median s | to LoRA |\n|---|---|---|---|---|---|"
    )
    for name, (_, parameters) in steps.items():
        count = sum(parameter.numel() for parameter in parameters)
        adam = sum(2 * p.numel() * p.element_size() for p in parameters) / 2**20
        ratio = medians[name] / lora
        print(f"| {name} | {count:,} | {kept[name] / 2**20:.0f} | {adam:.0f} | {medians[name]:.3f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
