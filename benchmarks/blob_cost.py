"""BLoB's training step, prediction and memory against plain PEFT and against a transcription of the released algorithm.

Usage::

    python benchmarks/blob_cost.py --data-dir FOLDER_WITH_ARC_EASY --batch-size 4 --steps 10
    python benchmarks/blob_cost.py --growth --device cuda      # cost against draws, rank, stochastic layers, batch, length

The transcription keeps what decides the released code's cost: a perturbation with fresh signs for every token (Flipout) in
q, v and the vocabulary head, logits over the vocabulary at every position, a KL in float64, two optimisers. It is float32, as
the released code is without a GPU. Prompts are the released code's, and all sides get the same batches, drawn at random and
padded as its loader does: what batches of similar length save is printed, and not counted. Steps and predictions are taken in
turn in one process; medians of ratios and their range over rounds are the result. Peak memory is of a process for each side,
without what loading took: what it had resident on a CPU, what its tensors took on a GPU.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import torch
from device_clock import seconds_of, synchronise
from peft import LoraConfig, get_peft_model
from prompts import released_prompts
from torch import Tensor, nn
from torch.nn import functional

import pyrolora as pl
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.training import TrainingRun
from pyrolora.models.tasks import EncodedSplit, Task

Batch = Mapping[str, Tensor]
RANK, SCALE, PRIOR, DRAWS = 8, 2.0, 0.2, 10
MAX_LENGTH = 300
TOP_THIRD = tuple(range(20, 30))


def label_ids(backbone: pl.Backbone, task: Task) -> Tensor:
    """Tokens of the labels, where the network is."""
    return torch.tensor(task.format.label_ids(backbone.tokenizer), device=backbone.device)


class ReleasedLayer(nn.Module):
    """One linear map with the released algorithm's noise."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        bound = base.in_features**-0.5
        device = base.weight.device
        self.mean = nn.Parameter(torch.empty(RANK, base.in_features, device=device).uniform_(-bound, bound))
        self.root = nn.Parameter(torch.empty(RANK, base.in_features, device=device).uniform_(0.05 / 2**0.5, 0.05))
        self.up = nn.Parameter(torch.zeros(base.out_features, RANK, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Mean path and noise path, each token with signs of its own."""
        sigma = self.root**2
        noise = sigma * torch.randn_like(sigma)
        r = torch.ones_like(x).uniform_(-1, 1).sign()
        s = torch.ones(*x.shape[:-1], RANK, device=x.device).uniform_(-1, 1).sign()
        change = functional.linear(functional.linear(x, self.mean), self.up)
        change = change + functional.linear(functional.linear(x * r, noise) * s, self.up)
        return self.base(x) + SCALE * change

    def kl(self) -> Tensor:
        """KL to the prior in float64."""
        sigma, mean = self.root.double() ** 2, self.mean.double()
        return (math.log(PRIOR) - sigma.log() + (sigma**2 + mean**2) / (2 * PRIOR**2) - 0.5).sum()


class Released:
    """The released algorithm."""

    def __init__(self, backbone: pl.Backbone, task: Task) -> None:
        self.network, self.label_ids = backbone.network, label_ids(backbone, task)
        self.layers = []
        for block in self.network.model.layers:
            for name in ("q_proj", "v_proj"):
                layer = ReleasedLayer(getattr(block.self_attn, name))
                setattr(block.self_attn, name, layer)
                self.layers.append(layer)
        self.network.lm_head = ReleasedLayer(self.network.lm_head)
        self.layers.append(self.network.lm_head)
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(name.rsplit(".", 1)[-1] in ("mean", "root", "up"))
        every = [p for layer in self.layers for p in (layer.mean, layer.up)]
        self.adam = torch.optim.AdamW(every, lr=1e-4, eps=1e-6, weight_decay=0.0)
        self.sgd = torch.optim.SGD([*every, *(layer.root for layer in self.layers)], lr=0.01)

    def logits(self, batch: Batch) -> Tensor:
        """Logits of the labels, cut out of those over the vocabulary at every position."""
        output = self.network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        return output.logits[:, -1, self.label_ids]

    def step(self, batch: Batch) -> None:
        """NLL by Adam on means and B, then KL and the kept gradients by SGD."""
        functional.cross_entropy(self.logits(batch), batch["labels"]).backward()
        self.adam.step()
        self.adam.zero_grad()
        (1e-3 * torch.stack([layer.kl() for layer in self.layers]).sum()).backward()
        self.sgd.step()
        self.sgd.zero_grad()

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        """Mean of the softmax over as many passes as draws."""
        return torch.stack([self.logits(batch).softmax(-1) for _ in range(DRAWS)]).mean(0)


class PEFT:
    """PEFT's LoRA."""

    def __init__(self, backbone: pl.Backbone, task: Task, keep: int) -> None:
        config = LoraConfig(r=RANK, lora_alpha=16, target_modules=["q_proj", "v_proj"])
        self.network = get_peft_model(backbone.network, config)
        self.label_ids, self.keep = label_ids(backbone, task), keep
        self.optimiser = torch.optim.AdamW([p for p in self.network.parameters() if p.requires_grad], lr=1e-4)

    def logits(self, batch: Batch) -> Tensor:
        """Logits of the labels."""
        output = self.network(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            use_cache=False,
            logits_to_keep=self.keep,
        )
        return output.logits[:, -1, self.label_ids].float()

    def step(self, batch: Batch) -> None:
        """One step of maximum likelihood."""
        self.optimiser.zero_grad(set_to_none=True)
        functional.cross_entropy(self.logits(batch), batch["labels"]).backward()
        self.optimiser.step()

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        """A single pass."""
        return self.logits(batch).softmax(-1)


class Ours:
    """This library."""

    def __init__(
        self,
        backbone: pl.Backbone,
        task: Task,
        layers: tuple[int, ...] | None = None,
        draws: int = DRAWS,
        rank: int = RANK,
    ) -> None:
        prior = {"*.lora_A": dist.Normal(0.0, PRIOR), "*.lora_B": pl.Flat()}
        self.model = pl.BayesianModel(backbone, task, adapter=pl.LoRA(rank=rank, layers=layers), prior=prior)
        self.run = TrainingRun(pl.SVI(steps=10_000, kl_weight=0.1), self.model, task.train)
        self.draws = draws

    def logits(self, batch: Batch) -> Tensor:
        """Logits of the labels at the posterior mean."""
        found = self.model.row_logits(batch, self.run.guide.mean())
        self.model.release()
        return found

    def step(self, batch: Batch) -> None:
        """One step of the ELBO with a draw for every example."""
        self.run.take_step(self.run.trunks.attach(batch))
        self.model.release()

    def predict(self, batch: Batch) -> Tensor:
        """Coherent draws, all on the batch axis."""
        return Posterior(self.model, self.run.guide, {}).predict(batch, kind="mc", draws=self.draws).mean_probs


# name -> float type of the backbone, and from the backbone and the task to the side
SIDES: dict[str, tuple[str, Callable[[pl.Backbone, Task], Any]]] = {
    "released BLoB, float32": ("float32", lambda backbone, task: Released(backbone, task)),
    "PEFT, full logits, float32": ("float32", lambda backbone, task: PEFT(backbone, task, 0)),
    "PEFT, float32": ("float32", lambda backbone, task: PEFT(backbone, task, 1)),
    "ours, float32": ("float32", lambda backbone, task: Ours(backbone, task)),
    "ours, top third, float32": ("float32", lambda backbone, task: Ours(backbone, task, TOP_THIRD)),
    "PEFT, bfloat16": ("bfloat16", lambda backbone, task: PEFT(backbone, task, 1)),
    "ours, bfloat16": ("bfloat16", lambda backbone, task: Ours(backbone, task)),
    "ours, top third, bfloat16": ("bfloat16", lambda backbone, task: Ours(backbone, task, TOP_THIRD)),
}


def make(name: str, task: Task, device: str) -> tuple[Any, pl.Backbone]:
    """A side, and the backbone over whose network it was built, which goes on encoding."""
    dtype, build = SIDES[name]
    backbone = pl.load_backbone("smollm2-135m", dtype=dtype, device=device)
    return build(backbone, task), backbone


def random_batches(data: EncodedSplit, arguments: argparse.Namespace) -> list[dict[str, Tensor]]:
    """Batches of the first step and of those that are timed, the same for every side, padded on the left."""
    source = torch.Generator().manual_seed(0)
    count = arguments.batch_size * (arguments.steps + 1)
    epochs = -(-count // len(data))
    order = torch.cat([torch.randperm(len(data), generator=source) for _ in range(epochs)])[:count]
    return [data.batch(rows.tolist(), device=arguments.device) for rows in order.split(arguments.batch_size)]


@torch.no_grad()
def require_one_answer(sides: Mapping[str, Any], batch: Batch) -> None:
    """Stop unless all sides compute the same thing: with B at zero every adapter leaves the network as it was."""
    found = {name: side.logits(batch).float() for name, side in sides.items()}
    wanted = found["PEFT, full logits, float32"]
    for name, logits in found.items():
        # bfloat16 moves logits near 20 by half a unit, a wrong position by several
        atol = 1.0 if name.endswith("bfloat16") else 1e-2
        torch.testing.assert_close(logits, wanted, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def compare(arguments: argparse.Namespace) -> None:
    """Print the table of steps, predictions and memory."""
    task = released_prompts(arguments.data_dir)
    sides = {name: make(name, task, arguments.device)[0] for name in SIDES}
    data = sides["ours, float32"].model.encode(task.train)
    batches = random_batches(data, arguments)
    require_one_answer(sides, batches[0])
    steps: dict[str, list[float]] = {name: [] for name in sides}
    predictions: dict[str, list[float]] = {name: [] for name in sides}
    for index, batch in enumerate(batches):
        for name, side in sides.items():
            seconds = seconds_of(partial(side.step, batch), arguments.device)
            if index > 0:
                steps[name].append(seconds)
        if index < arguments.predictions:
            for name, side in sides.items():
                predictions[name].append(seconds_of(partial(side.predict, batch), arguments.device))
    stream = data.stream(arguments.batch_size, seed=0)
    similar = statistics.mean(
        next(stream)["input_ids"].shape[1] for _ in range(data.steps_per_epoch(arguments.batch_size))
    )
    length = statistics.mean(batch["input_ids"].shape[1] for batch in batches)
    print(
        f"batch {arguments.batch_size}, {length:.0f} tokens with padding ({similar:.0f} in batches of similar length),"
    )
    print(f"{arguments.steps} alternating steps,", end=" ")
    print(f"{arguments.predictions} predictions of {DRAWS} draws (PEFT: one pass)\n")
    print("| | step, s | to PEFT, same float type | released / it | predict, s | released / it | peak memory, GB |")
    print("|---|---|---|---|---|---|---|")

    def ratio(above: list[float], below: list[float]) -> str:
        values = sorted(a / b for a, b in zip(above, below, strict=True))
        return f"{statistics.median(values):.2f} ({values[0]:.2f} to {values[-1]:.2f})"

    for name in sides:
        command = [sys.executable, __file__, "--memory", name, "--batch-size", str(arguments.batch_size)]
        command += ["--device", arguments.device]
        command += ["--data-dir", arguments.data_dir] if arguments.data_dir else []
        peak = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        cells = [
            f"{statistics.median(steps[name]):.2f}",
            ratio(steps[name], steps["PEFT, bfloat16" if name.endswith("bfloat16") else "PEFT, float32"]),
            ratio(steps["released BLoB, float32"], steps[name]),
            f"{statistics.median(predictions[name]):.2f}",
            ratio(predictions["released BLoB, float32"], predictions[name]),
            f"{peak:.2f}",
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def memory(arguments: argparse.Namespace) -> None:
    """Print the peak memory of a process that takes four steps of one side, gigabytes."""
    task = released_prompts(arguments.data_dir)
    side, backbone = make(arguments.memory, task, arguments.device)
    batches = random_batches(backbone.encode(task.train, task.format, MAX_LENGTH), arguments)
    if arguments.device == "cpu":
        # from here on the high-water mark is that of training, without what loading took
        Path("/proc/self/clear_refs").write_text("5")
    else:
        torch.cuda.reset_peak_memory_stats()
    for batch in batches[:4]:
        side.step(batch)
    if arguments.device == "cpu":
        peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1000
    else:
        synchronise(arguments.device)
        peak = torch.cuda.max_memory_allocated()
    print(json.dumps(peak / 1e9))


def growth(arguments: argparse.Namespace) -> None:
    """Print how step and prediction grow, with slopes in double logarithms."""
    task = released_prompts(arguments.data_dir)
    backbone = pl.load_backbone("smollm2-135m", dtype="bfloat16", device=arguments.device)
    print("| grows | values | what | seconds | exponent |\n|---|---|---|---|---|")

    def row(name: str, values: list[int], what: str, measure: Callable[[int], float]) -> None:
        seconds = [measure(value) for value in values]
        x, y = ([math.log(value) for value in column] for column in (values, seconds))
        slope = statistics.linear_regression(x, y).slope
        cells = (name, ", ".join(map(str, values)), what, ", ".join(f"{s:.2f}" for s in seconds), f"{slope:.2f}")
        print(f"| {' | '.join(cells)} |", flush=True)

    def best(action: Callable[[], Any]) -> float:
        action()
        return min(seconds_of(action, arguments.device) for _ in range(arguments.rounds))

    row_of = pl.BayesianModel(backbone, task).encode(task.train).batch([0])["input_ids"][0]

    def batch_of(rows: int = 4, tokens: int = 64) -> Batch:
        """Rows of one length, so that nothing else grows with what grows."""
        ids = row_of.repeat(-(-tokens // len(row_of)))[-tokens:].expand(rows, -1).contiguous()
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "index": torch.arange(rows)}
        return {**batch, "labels": batch["index"] % len(task.labels)}

    def step(side: Ours, batch: Batch) -> float:
        return best(lambda: side.step(batch))

    def predict(draws: int) -> float:
        side, batch = Ours(backbone, task, draws=draws), batch_of()
        return best(lambda: side.predict(batch))

    row("draws", [1, 4, 16, 64], "predict", predict)
    row("rank", [4, 8, 16, 32, 64], "step", lambda rank: step(Ours(backbone, task, rank=rank), batch_of()))
    blocks = len(backbone.blocks)
    row(
        "stochastic layers", [5, 10, 20, 30], "step",
        lambda count: step(Ours(backbone, task, tuple(range(blocks - count, blocks))), batch_of()),
    )  # fmt: skip
    row("batch", [2, 4, 8, 16], "step", lambda rows: step(Ours(backbone, task), batch_of(rows)))
    row("tokens", [32, 64, 128, 256], "step", lambda tokens: step(Ours(backbone, task), batch_of(tokens=tokens)))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--predictions", type=int, default=3)
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--rounds", type=int, default=3, help="times that growth measures each point; the least counts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        memory(arguments)
    elif arguments.growth:
        growth(arguments)
    else:
        compare(arguments)


if __name__ == "__main__":
    main()
