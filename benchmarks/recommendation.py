r"""LoRA, iLoRA, random and Bayesian gates on MovieLens-100K: the next of 20 candidates, users never seen in training.

Without ``--model`` the frozen network is a tiny Llama over item tokens, trained here on half of the training users; with
``--model smollm2-135m --task next_item_hybrid`` it is a language model that reads titles and projected item embeddings.
Methods have the same rank; a gate adds ``experts * 64`` weights.

Usage::

    pip install --no-deps recbole==1.2.1                       # or --interactions visits.csv
    python benchmarks/recommendation.py --seeds 3 --out runs/recommendation
    python benchmarks/recommendation.py --model smollm2-135m --task next_item_hybrid --device cuda --out runs/llm \
        --generate 200
    python benchmarks/recommendation.py --seeds 1 --steps 10 --test-size 100 --epochs 1 --network-epochs 1 --out runs/quick

Everything that is finished stays in the folder; a rerun goes on from there. In the first table accuracy is HR@1, and shift
and OOD are users whose items are the rarest of all. Its intervals treat windows as independent, and those of the second table
resample users, whose windows are not.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from pyrolora.inference.evaluation.experiment import ExperimentConfig, compare
from pyrolora.inference.evaluation.ranking import hit_rate, ndcg
from pyrolora.inference.posterior import Posterior
from pyrolora.models.loading import load_backbone
from pyrolora.models.recommendation import Preparation, read_interactions
from pyrolora.models.recommendation.generation import count_answers, generate_answers
from pyrolora.models.recommendation.item_network import fit_item_network, save_item_network
from pyrolora.models.recommendation.preparation import SETTINGS, read_windows
from pyrolora.models.recommendation.task import next_item_specs
from pyrolora.models.tasks import Split, register, task

GATED = {"*.lora_*": "Normal(0, 1)", "gate.weight": "Normal(0, 1)"}


def methods(options: argparse.Namespace) -> dict[str, dict[str, object]]:
    """Every method with its adapter, its prior and its posterior, in the order of the table."""
    size = f"rank={options.rank}, alpha={2 * options.rank}, targets={options.targets!r}"
    lora, mixture = f"LoRA({size})", f"MixtureLoRA({size}, experts={options.experts})"
    more = {"adapters": ("ItemProjector()",)} if options.task == "next_item_hybrid" else {}
    steps = {"steps": options.steps, "batch_size": options.batch_size, "learning_rate": options.learning_rate, **more}
    point = {"engine": "MAP", "prior": GATED, **steps}
    estimate = {
        "engine": "Laplace",
        "prior": GATED,
        "structure": "full",
        "sites": "gate.weight",
        "batch_size": 4 * options.batch_size,
        **more,
    }
    bayesian = {"*.lora_*": "Point()", "gate.weight": "MeanField(init_scale=0.05)"}
    return {
        "lora": {**point, "prior": "Normal(0, 1)", "adapter": lora},
        "ilora": {**point, "adapter": mixture},
        "random gate": {**point, "adapter": mixture[:-1] + ", gate_input='random_sequence')"},
        "bayesian gate": {**point, "engine": "SVI", "guide": bayesian, "kl_weight": 1.0, "adapter": mixture},
        "laplace gate": {**estimate, "precision": "declared", "estimate": "ilora", "adapter": mixture},
        "dirichlet gate": {**point, "adapter": mixture[:-1] + ", gate='dirichlet')"},
        "categorical gate": {**point, "adapter": mixture[:-1] + ", gate='categorical')"},
        "blob": {
            **steps,
            "engine": "SVI",
            "prior": "Normal(0, 0.05)",
            "guide": "BLoB()",
            "kl_weight": 0.01,
            "adapter": lora,
        },
    }


def item_network(folder: Path, data: Path, epochs: int, device: str) -> Path:
    """Train and keep the tiny network on the windows of half of the training users, unless it is there."""
    if not folder.is_dir():
        windows = read_windows(data, "train")
        users = sorted({window.user for window in windows})
        half = set(users[: len(users) // 2])
        items = len(load_file(data / "vectors.safetensors")["items"])
        chosen = [window for window in windows if window.user in half]
        save_item_network(fit_item_network(chosen, items, epochs=epochs, device=device), folder)
    return folder


def ranking_table(out: Path, names: tuple[str, ...], seeds: int, users: list[str]) -> str:
    """HR@1, NDCG@5 and NDCG of the test windows, mean over seeds, with 95 % intervals over users."""
    lines = ["| method | HR@1 | NDCG@5 | NDCG |", "|---|---|---|---|"]
    for name in ("zero-shot", *names):
        kept = [load_file(out / name / f"seed-{seed}" / "predictions.safetensors") for seed in range(seeds)]
        cells = []
        for measure in (lambda p, y: hit_rate(p, y), lambda p, y: ndcg(p, y, 5), lambda p, y: ndcg(p, y)):
            values = torch.stack([measure(cell["mean_probs"], cell["labels"]) for cell in kept]).mean(0)
            low, high = user_interval(values, users)
            cells.append(f"{float(values.mean()):.4f} [{low:.4f}, {high:.4f}]")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def user_interval(values: torch.Tensor, users: list[str], resamples: int = 2000) -> tuple[float, float]:
    """Percentile bootstrap of a mean over windows by resampling whole users."""
    numbers = {user: number for number, user in enumerate(dict.fromkeys(users))}
    owner = torch.tensor([numbers[user] for user in users])
    sums = torch.zeros(len(numbers), dtype=torch.float64).index_add(0, owner, values.double())
    counts = torch.bincount(owner, minlength=len(numbers)).double()
    drawn = torch.randint(len(numbers), (resamples, len(numbers)), generator=torch.Generator().manual_seed(0))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def generation_table(config: ExperimentConfig, out: Path, split: Split) -> str:
    """Both hit rates and the valid ratio of answers written under the posterior mean of seed 0."""
    backbone = load_backbone(config.model, dtype=config.dtype, device=config.device)
    options, labels = [example.options for example in split], [example.label for example in split]
    lines = ["| method | correct / valid | correct / all | valid |", "|---|---|---|---|"]
    for name in config.methods:
        posterior = Posterior.from_pretrained(out / name / "seed-0", backbone, data_dir=config.data_dir)
        try:
            written = generate_answers(posterior.model, split, posterior.mean(), max_new_tokens=32, progress=True)
        except ValueError as error:
            lines.append(f"| {name} | none: {error} | | |")
            continue
        found = count_answers(written, options, labels)
        lines.append(f"| {name} | {found.hit_rate_of_valid:.4f} | {found.hit_rate:.4f} | {found.valid_ratio:.4f} |")
    return "\n".join(lines)


def main() -> None:
    """Prepare, fit every cell that is not finished, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--interactions", default="movielens-100k", help="or a CSV file with user, item, timestamp")
    parser.add_argument("--model", help="a language model; the tiny item network by default")
    parser.add_argument("--task", default="next_item_tokens", help="next_item_tokens, next_item or next_item_hybrid")
    parser.add_argument("--targets", default="all-linear")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--epochs", type=int, default=30, help="of the sequence encoder")
    parser.add_argument("--network-epochs", type=int, default=10, help="of the tiny item network")
    parser.add_argument("--train-size", type=int, default=10_000)
    parser.add_argument("--test-size", type=int, default=2000)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--generate", type=int, default=0, help="test windows whose answers are also written out")
    parser.add_argument("--methods", help="separated by commas; all by default")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if options.generate and not options.model:
        # "i1" stands in "i17" too: only titles tell which candidate an answer names
        parser.error("--generate needs a language model: give --model and --task next_item or next_item_hybrid")
    data = options.out / "windows"
    if not (data / SETTINGS).is_file():
        preparation = Preparation(epochs=options.epochs)
        preparation.prepare(read_interactions(options.interactions), data, device=options.device)
    model = options.model or str(item_network(options.out / "network", data, options.network_epochs, options.device))
    test = task(options.task, data_dir=data).test
    size = min(options.test_size, len(test))
    test = test.subset(size, seed=0)
    known = methods(options)
    names = tuple(options.methods.split(",")) if options.methods else tuple(known)
    # one data set may stand among the foreign ones and among the shifted ones only under two names
    unusual = next(spec for spec in next_item_specs() if spec.name == f"{options.task}_unusual")
    register(replace(unusual, name="unusual_users"))
    config = ExperimentConfig(
        model=model,
        task=options.task,
        data_dir=str(data),
        ood=(f"{options.task}_unusual",),
        shift=("unusual_users",),
        methods=names,
        dtype="auto" if options.model else "float32",
        device=options.device,
        # ten titles and twenty candidates, twice where they are also options
        max_length=600,
        train_size=options.train_size,
        seeds=options.seeds,
        draws=options.draws,
        ood_size=options.test_size,
        test_size=size,
        settings=known,
    )
    cells = options.out / "cells"
    tables = [compare(config, cells).to_markdown()]
    tables.append(ranking_table(cells, names, options.seeds, [example.id.rsplit("/", 1)[0] for example in test]))
    if options.generate:
        tables.append(generation_table(config, cells, test.subset(min(options.generate, len(test)), seed=0)))
    (options.out / "tables.md").write_text("\n\n".join(tables) + "\n")
    print("\n\n".join(tables))


if __name__ == "__main__":
    main()
