"""Do gated experts help where groups of users want opposite things of one adapter? A controlled conflict.

A tiny network learns four rounds of items ("groups": each item is followed by the one that a group's permutation says). It
is then adapted to eight other rounds at once, which contradict each other, by adapters of equal size. A gate reads a noisy
vector of the group. Unseen groups, with vectors of their own, ask whether a method knows what it does not know.

Usage::

    python benchmarks/gate_conflict.py --seeds 3 --out runs/gate_conflict
    python benchmarks/gate_conflict.py --seeds 1 --steps 20 --test-size 200 --out runs/quick

Everything that is finished stays in the folder; a rerun goes on from there. Columns of the table: accuracy is HR@1 among 20
candidates; shift is the groups that no adapter has seen.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from pyrolora.inference.evaluation.experiment import ExperimentConfig, compare
from pyrolora.models.recommendation.interactions import Interactions
from pyrolora.models.recommendation.item_network import fit_item_network, save_item_network
from pyrolora.models.recommendation.preparation import SETTINGS, write_windows
from pyrolora.models.recommendation.task import next_item_specs
from pyrolora.models.recommendation.windows import Window
from pyrolora.models.tasks import register

ITEMS, HISTORY, CANDIDATES, FEATURES = 56, 5, 20, 16
BASE_GROUPS, GROUPS, UNSEEN = range(0, 4), range(4, 12), range(12, 20)
TARGETS = "targets='all-linear'"


def windows_of_groups(groups: range, count: int, seed: int) -> tuple[list[Window], torch.Tensor]:
    """Windows of random users of some groups, and the noisy vector of each user's group, of length two."""
    random = np.random.default_rng([seed, groups.start, count])
    rounds = {group: np.random.default_rng([1, group]).permutation(ITEMS) for group in groups}
    centres = {group: np.random.default_rng([2, group]).standard_normal(FEATURES) for group in groups}
    made, vectors = [], []
    for place in range(count):
        group = int(random.choice(list(groups)))
        following, item = rounds[group], int(random.integers(ITEMS))
        taken = [item]
        while len(taken) <= HISTORY:
            taken.append(int(following[taken[-1]]))
        # a short cycle brings items back; such a start is no history
        if len(set(taken)) < len(taken):
            continue
        others = random.permutation([i for i in range(ITEMS) if i not in taken])[: CANDIDATES - 1].tolist()
        candidates = random.permutation([taken[-1], *others]).tolist()
        made.append(Window(f"g{group}-{place}", 0, tuple(taken[:-1]), taken[-1], tuple(candidates)))
        vector = centres[group] + 0.3 * random.standard_normal(FEATURES)
        vectors.append(2 * vector / np.linalg.norm(vector))
    return made, torch.tensor(np.array(vectors), dtype=torch.float32)


def prepare(folder: Path, network: Path, test_size: int, pretraining: int, device: str) -> None:
    """Write windows and the pretrained network, unless they are there."""
    named = tuple(f"n{number}" for number in range(ITEMS))
    if not (folder / SETTINGS).is_file():
        sizes = {"train": (GROUPS, 24_000), "validation": (GROUPS, 1000), "test": (GROUPS, test_size * 6 // 5)}
        sizes["unusual"] = (UNSEEN, test_size * 6 // 5)
        parts = {
            part: windows_of_groups(groups, count, seed) for seed, (part, (groups, count)) in enumerate(sizes.items())
        }
        windows = {part: made for part, (made, _) in parts.items()}
        states = {part: vectors for part, (_, vectors) in parts.items()}
        write_windows(
            folder, Interactions(named, named, {}), windows, states, torch.zeros(ITEMS, FEATURES), {"seed": 0}
        )
    if not network.is_dir():
        base, _ = windows_of_groups(BASE_GROUPS, pretraining, 9)
        save_item_network(fit_item_network(base, ITEMS, hidden=64, layers=2, epochs=4, device=device), network)


def methods(steps: int, learning_rate: float) -> dict[str, dict[str, object]]:
    """Every method with its adapter, its prior and its posterior, in the order of the table."""
    flat = {"engine": "MAP", "prior": "Flat()", "steps": steps, "batch_size": 64, "learning_rate": learning_rate}
    gated = "rank={}, alpha=16, experts={}, gate_features=16, " + TARGETS
    weak = {"*.lora_*": "Flat()", "gate.weight": "Normal(0, 1)"}
    bayesian = {**flat, "engine": "SVI", "prior": weak, "kl_weight": 1.0}
    bayesian["guide"] = {"*.lora_*": "Point()", "gate.weight": "MeanField(init_scale=0.05)"}
    made: dict[str, dict[str, object]] = {}
    for rank in (4, 8):
        made[f"lora r{rank}"] = {**flat, "adapter": f"LoRA(rank={rank}, alpha=16, {TARGETS})"}
        for experts in (4, 8) if rank == 8 else (4,):
            mixture = gated.format(rank, experts)
            made[f"ilora r{rank} k{experts}"] = {**flat, "adapter": f"MixtureLoRA({mixture})"}
            made[f"random gate r{rank} k{experts}"] = {
                **flat,
                "adapter": f"MixtureLoRA({mixture}, gate_input='random_sequence')",
            }
    best = gated.format(8, 8)
    made["bayesian gate r8 k8"] = {**bayesian, "adapter": f"MixtureLoRA({best})"}
    made["dirichlet gate r8 k8"] = {**flat, "adapter": f"MixtureLoRA({best}, gate='dirichlet', concentration=50.0)"}
    made["laplace gate r8 k8"] = {
        "engine": "Laplace",
        "prior": weak,
        "structure": "full",
        "precision": "declared",
        "batch_size": 256,
        "sites": "gate.weight",
        "estimate": "ilora r8 k8",
        "adapter": f"MixtureLoRA({best})",
    }
    return made


def main() -> None:
    """Prepare, fit every cell that is not finished, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=350)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--draws", type=int, default=30)
    parser.add_argument("--test-size", type=int, default=2000)
    parser.add_argument("--pretraining", type=int, default=60_000, help="windows that the network is pretrained on")
    parser.add_argument("--methods", help="separated by commas; all by default")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    data, network = options.out / "windows", options.out / "network"
    prepare(data, network, options.test_size, options.pretraining, options.device)
    known = methods(options.steps, options.learning_rate)
    # one data set may stand among the foreign ones and among the shifted ones only under two names
    unseen = next(spec for spec in next_item_specs() if spec.name == "next_item_tokens_unusual")
    register(replace(unseen, name="unseen_groups"))
    config = ExperimentConfig(
        model=str(network),
        task="next_item_tokens",
        data_dir=str(data),
        ood=("next_item_tokens_unusual",),
        shift=("unseen_groups",),
        methods=tuple(options.methods.split(",")) if options.methods else tuple(known),
        dtype="float32",
        device=options.device,
        seeds=options.seeds,
        draws=options.draws,
        ood_size=options.test_size,
        test_size=options.test_size,
        settings=known,
    )
    print(compare(config, options.out / "cells").to_markdown())


if __name__ == "__main__":
    main()
