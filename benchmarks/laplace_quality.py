"""Laplace's structures, precisions and predictives beside MAP and BLoB on several tasks and seeds.

Usage::

    python benchmarks/laplace_quality.py --data-dir FOLDER --out runs/laplace_quality

MAP is fitted once a seed and every Laplace starts from it. Precisions chosen by validation see the validation split only;
the table is on test examples. Finished cells are kept in the folder and not computed again. Intervals are Student's t across
seeds.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pyro.distributions as dist
import torch

import pyrolora as pl
from pyrolora.guides import Point, build_guide
from pyrolora.inference.evaluation import Report
from pyrolora.inference.posterior import Posterior
from pyrolora.models.tasks import Split, Task

# task -> (training examples, test examples, tasks whose test split is a shift of it)
TASKS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "bbc_headlines": (300, 300, ()),
    "uci_sentiment": (200, 300, ("uci_sentiment_imdb",)),
    "arc_easy": (300, 200, ()),
    "winogrande_s": (300, 300, ()),
}
VARIANTS = [
    (structure, precision) for structure in ("diag", "kron", "last_layer") for precision in ("evidence", "validation")
]


def fits(backbone: pl.Backbone, task: Task, seed: int) -> Iterator[tuple[str, Callable[[], Posterior], str | None]]:
    """Name, posterior and kind of prediction of every row."""
    wide = dist.Normal(0.0, 1.0)
    model = pl.BayesianModel(backbone, task, prior=wide)
    made: dict[str, Posterior] = {}

    def once(name: str, fit: Callable[[], Posterior]) -> Posterior:
        if name not in made:
            made[name] = fit()
        return made[name]

    def estimate() -> Posterior:
        return once("map", lambda: pl.MAP(seed=seed).fit(model, task.train, progress=False))

    def laplace(structure: str, precision: str) -> Posterior:
        start, used = estimate(), model
        if structure == "last_layer":
            prior = {"*.lora_*": wide, "head.weight": dist.Normal(0.0, 0.1)}
            used = pl.BayesianModel(backbone, task, adapter=[pl.LoRA(), pl.LastLayer()], prior=prior)
            mean = {**start.mean(), "head.weight": torch.zeros(used.sites["head.weight"].shape)}
            start = Posterior(used, build_guide(Point(), used, start=mean), start.record)
        engine = pl.Laplace(structure=structure, precision=precision)
        return engine.fit(used, task.train, progress=False, estimate=start, validation=task.validation)

    yield "map", estimate, None
    narrow = pl.BayesianModel(backbone, task, prior=dist.Normal(0.0, 0.05))
    engine = pl.SVI(guide=pl.BLoB(), steps=150, kl_weight=0.01, seed=seed)
    yield "blob", lambda: once("blob", lambda: engine.fit(narrow, task.train, progress=False)), None
    for structure, precision in VARIANTS:
        if structure == "last_layer" and model.classes is None:
            continue
        name = f"{structure}, {precision}"

        def fit(structure: str = structure, precision: str = precision, name: str = name) -> Posterior:
            return once(name, lambda: laplace(structure, precision))

        yield name, fit, None
        if precision == "validation" and structure != "last_layer":
            yield f"{name}, mc", fit, "mc"


def cell(
    folder: Path, name: str, fit: Callable[[], Posterior], kind: str | None, tests: Mapping[str, Split], seed: int
) -> dict[str, Report]:
    """The reports of one fit, computed or read."""
    path = folder / f"{name.replace(', ', '-')}.json"
    if path.is_file():
        return {key: Report.from_dict(saved) for key, saved in json.loads(path.read_text()).items()}
    posterior = fit()
    reports = {
        key: pl.evaluate({name: posterior}, data, kind=kind, seed=seed, batch_size=16, progress=False)
        for key, data in tests.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({key: report.to_dict() for key, report in reports.items()}))
    partial.replace(path)
    return reports


def main() -> None:
    """Compute what is missing, seed by seed, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir")
    parser.add_argument("--out", type=Path, default=Path("runs/laplace_quality"))
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    backbone = pl.load_backbone("smollm2-135m", dtype="auto")

    def load(name: str, **settings: int) -> Task:
        return pl.task(name, data_dir=None if name == "bbc_headlines" else arguments.data_dir, **settings)

    tables: dict[str, list[Report]] = {}
    for seed in range(arguments.seeds):
        for name in arguments.tasks.split(","):
            train_size, test_size, shifts = TASKS[name]
            task = load(name, train_size=train_size, seed=seed)
            tests = {key: load(key).test for key in shifts} | {name: task.test}
            tests = {key: test.subset(min(test_size, len(test)), seed=0) for key, test in tests.items()}
            for row, fit, kind in fits(backbone, task, seed):
                folder = arguments.out / name / f"seed-{seed}"
                for key, report in cell(folder, row, fit, kind, tests, seed).items():
                    tables.setdefault(key if key == name else f"{name} -> {key}", []).append(report)
    for key, reports in tables.items():
        print(f"## {key}\n\n{Report.merge(reports).to_markdown()}\n")


if __name__ == "__main__":
    main()
