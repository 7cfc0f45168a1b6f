"""The command line: ``pyrolora compare``, ``experiment``, ``report``, ``fit``, ``evaluate``, ``predict``, ``windows``..."""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from pyrolora.inference.evaluation.configuration import ExperimentConfig, read_config
from pyrolora.inference.evaluation.experiment import UnfinishedCellsError, compare
from pyrolora.inference.evaluation.harness import evaluate
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.storage import read_config as read_config_of
from pyrolora.models.adapters import Adapter
from pyrolora.models.atomic import replacing_folder
from pyrolora.models.backbones import Backbone
from pyrolora.models.declarations import declared, declared_prior
from pyrolora.models.loading import load_backbone
from pyrolora.models.program import BayesianModel
from pyrolora.models.tasks import EpisodeSplit, Example, ImageClasses, ImageExample, Split
from pyrolora.models.tasks import task as load_task

app = typer.Typer(
    help="Bayesian low-rank adapters for transformers, written as Pyro programs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Config = Annotated[Path | None, typer.Option("--config", help="YAML file with settings; options on the line win.")]
Changes = Annotated[
    list[str] | None, typer.Option("--set", help="key=value, such as train_size=500 or blob.kl_weight=0.3; repeatable.")
]
Model = Annotated[
    str | None,
    typer.Option("--model", help="Hub id, folder, GGUF file, smollm2-135m, or for images dinov2-small, tiny-vit."),
]
TaskName = Annotated[
    str | None, typer.Option("--task", help="Name of the task; image tasks joined by + share one label space.")
]
DataDir = Annotated[str | None, typer.Option("--data-dir", help="Folder with the task's files.")]
Kind = Annotated[
    str | None,
    typer.Option(
        "--kind", help="Kind of prediction: mc, mean, linearised, token, ...; the posterior's own by default."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16, or auto.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, ...")]
AdapterName = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        help="lora, mixture_lora, polar, pissa, corda, s2ft, full_rank, or a declaration: 'PiSSA(rank=16)'.",
    ),
]
Schedule = Annotated[
    str | None,
    typer.Option(
        "--schedule", help="Train a few blocks at a time: block_schedule, or 'BlockSchedule(active=2, every=20)'."
    ),
]
TrainSize = Annotated[int | None, typer.Option("--train-size", help="Training examples; all by default.")]


@contextmanager
def _plain_errors() -> Iterator[None]:
    """One sentence for a user's mistake, and the shell's exit code for an interruption."""
    try:
        yield
    except (
        ValueError,
        TypeError,
        FileNotFoundError,
        FileExistsError,
        FloatingPointError,
        KeyError,
        UnfinishedCellsError,
    ) as error:
        message = error.args[0] if isinstance(error, KeyError) else error
        typer.secho(f"Error: {message}", fg=typer.colors.RED, err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        typer.secho("Interrupted. Run the same command again to go on from the last step.", err=True)
        raise typer.Exit(130) from error


def _command(function: Callable[..., None]) -> Callable[..., None]:
    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
        # libraries' own news is not this program's
        for noisy in ("httpx", "transformers", "datasets", "matplotlib", "filelock"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        with _plain_errors():
            function(*args, **kwargs)

    app.command(name=function.__name__.removesuffix("_command"))(run)
    return run


def _resolved(config: Path | None, changes: list[str] | None, **options: Any) -> ExperimentConfig:
    values = read_config(config, changes or ())
    values.update({key: value for key, value in options.items() if value is not None})
    return ExperimentConfig.from_dict(values)


@_command
def compare_command(
    out: Annotated[Path, typer.Option("--out", help="Folder for the report and the posteriors.")],
    config: Config = None,
    changes: Changes = None,
    model: Model = None,
    task: TaskName = None,
    data_dir: DataDir = None,
    ood: Annotated[str | None, typer.Option("--ood", help="Foreign tasks, separated by commas.")] = None,
    methods: Annotated[str | None, typer.Option("--methods", help="Methods, separated by commas.")] = None,
    adapter: AdapterName = None,
    schedule: Schedule = None,
    train_size: TrainSize = None,
    seeds: Annotated[int | None, typer.Option("--seeds", help="Number of seeds.")] = None,
    draws: Annotated[int | None, typer.Option("--draws", help="Weight draws of a prediction.")] = None,
    dtype: Dtype = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Fit several methods, judge them on the same test items, and write a report. A rerun goes on where it stopped."""
    settings = _resolved(
        config, changes, model=model, task=task, data_dir=data_dir, ood=ood, methods=methods, adapter=adapter,
        schedule=schedule, train_size=train_size, seeds=seeds, draws=draws, dtype=dtype, device=device,
    )  # fmt: skip
    report = compare(settings, out, progress=not quiet)
    typer.echo(report.to_markdown())
    typer.echo(f"\nWritten to {out}: report.md, report.json, reliability.png, config.yaml, one folder a method.")


@_command
def experiment_command(
    file: Annotated[Path, typer.Argument(help="YAML file with tasks, adapters, methods, seeds and settings.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the experiments, one below it a task and adapter.")],
    changes: Changes = None,
    quiet: Quiet = False,
) -> None:
    """Run a grid of experiments, cell by cell. Run it again after a stop, or several times at once on one folder."""
    from pyrolora.inference.evaluation.grid import Grid, run_grid
    from pyrolora.inference.evaluation.render import render_folder

    run_grid(Grid.from_dict(read_config(file, changes or ())), out, progress=not quiet)
    written = render_folder(out)
    typer.echo(f"Finished. The page is {written['html']}.")


@_command
def report_command(
    folder: Annotated[Path, typer.Argument(help="Folder that experiment or compare wrote.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the pages; the same by default.")] = None,
) -> None:
    """Write page.md, page.tex and page.html of what is finished in a folder. Nothing is computed again."""
    from pyrolora.inference.evaluation.render import render_folder

    for path in render_folder(folder, out).values():
        typer.echo(str(path))


@_command
def fit_command(
    out: Annotated[Path, typer.Option("--out", help="Folder for the posterior.")],
    method: Annotated[str, typer.Option("--method", help="Method to fit.")] = "blob",
    config: Config = None,
    changes: Changes = None,
    model: Model = None,
    task: TaskName = None,
    data_dir: DataDir = None,
    adapter: AdapterName = None,
    schedule: Schedule = None,
    train_size: TrainSize = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the training subset, start, order and draws.")] = 0,
    dtype: Dtype = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Fit one method and keep its posterior. A rerun after an interruption goes on from the last step."""
    from pyrolora.inference.evaluation.experiment import fit_one

    settings = _resolved(
        config, changes, model=model, task=task, data_dir=data_dir, methods=method, adapter=adapter, schedule=schedule,
        train_size=train_size, dtype=dtype, device=device,
    )  # fmt: skip
    fit_one(settings, method, seed, out, progress=not quiet)
    typer.echo(f"Posterior written to {out}.")


def _load(folder: Path, model: str | None, dtype: str | None, device: str | None, data_dir: str | None) -> Posterior:
    name = model or read_config_of(folder)["backbone"]["name"]
    backbone = _backbone(name, dtype or "auto", device or "cpu")
    return Posterior.from_pretrained(folder, backbone, data_dir=data_dir)


@cache
def _backbone(name: str, dtype: str, device: str) -> Backbone:
    # several posteriors of one model share it: each copy would be half a gigabyte
    return load_backbone(name, dtype=dtype, device=device)


@_command
def evaluate_command(
    folders: Annotated[list[Path], typer.Argument(help="Folders of posteriors.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the report.")] = None,
    ood: Annotated[str | None, typer.Option("--ood", help="Foreign tasks, separated by commas.")] = None,
    draws: Annotated[int, typer.Option("--draws", help="Weight draws of a prediction.")] = 10,
    kind: Kind = None,
    data_dir: DataDir = None,
    model: Model = None,
    dtype: Dtype = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Judge kept posteriors on their task's test items."""
    from pyrolora.inference.evaluation.experiment import foreign_items

    posteriors = {str(folder): _load(folder, model, dtype, device, data_dir) for folder in folders}
    first = next(iter(posteriors.values()))
    for name, posterior in posteriors.items():
        if posterior.model.task.name != first.model.task.name:
            raise ValueError(
                f"{name} is a posterior of the task {posterior.model.task.name!r}, and {folders[0]} of "
                f"{first.model.task.name!r}. Evaluate them apart."
            )
    own = first.model.task
    foreign = {name: foreign_items(name, own, data_dir) for name in (ood.split(",") if ood else ())}
    groups = getattr(own.format, "groups", ())
    report = evaluate(posteriors, own.test, ood=foreign, groups=groups, kind=kind, draws=draws, progress=not quiet)
    typer.echo(report.to_markdown())
    if out is not None:
        report.save(out)


@_command
def pool_command(
    folders: Annotated[list[Path], typer.Argument(help="Folders of members' posteriors.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the pool's posterior.")],
    data_dir: DataDir = None,
    model: Model = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Put members that were fitted one at a time together to a pool over one residual."""
    from pyrolora.inference.pool import pool_of

    pool_of([_load(folder, model, dtype, device, data_dir) for folder in folders]).save_pretrained(out)
    typer.echo(f"Pool of {len(folders)} members written to {out}.")


@_command
def merge_command(
    folder: Annotated[Path, typer.Argument(help="Folder of a posterior of an image task.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the classifier; one that exists is replaced.")],
    data_dir: DataDir = None,
    model: Model = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Write the posterior mean as a plain transformers image classifier, which needs nothing of this library."""
    from pyrolora.inference.merging import merge

    network = merge(_load(folder, model, dtype, device, data_dir))
    with replacing_folder(out) as partial:
        network.save_pretrained(partial)
    typer.echo(f"Classifier written to {out}.")


@_command
def episodes_command(
    folders: Annotated[list[Path], typer.Argument(help="Folders of posteriors of members or pools.")],
    task: Annotated[
        str | None,
        typer.Option("--task", help="Episodes to judge on, such as mnist:5w1s; the posterior's own by default."),
    ] = None,
    attack: Annotated[
        str | None, typer.Option("--attack", help="On the queries' pixels: 'PGD(0.03, steps=10, step_size=0.0075)'.")
    ] = None,
    merge: Annotated[
        str, typer.Option("--merge", help="How a pool is merged for each episode.")
    ] = "MergeRule(sharpness=8.0)",
    semantics: Annotated[str, typer.Option("--semantics", help="mean, mixture or dirichlet.")] = "mean",
    concentration: Annotated[
        float, typer.Option("--concentration", help="Of the Dirichlet, the sum over members.")
    ] = 10.0,
    score: Annotated[
        str | None,
        typer.Option("--score", help="Attack under which members are scored: 'PGD(0.03)'; clean images by default."),
    ] = None,
    copies: Annotated[int, typer.Option("--copies", help="Augmented copies of a labelled image that are scored.")] = 1,
    trim: Annotated[
        str | None, typer.Option("--trim", help="Truncation of merged weights: 'Trim(0.9)'; none by default.")
    ] = None,
    episodes: Annotated[int | None, typer.Option("--episodes", help="Number of episodes; all by default.")] = None,
    draws: Annotated[int, typer.Option("--draws", help="Draws of the posterior; 1 takes its mean.")] = 1,
    seed: Annotated[int, typer.Option("--seed", help="Seed of augmentation, draws and attacks.")] = 0,
    data_dir: DataDir = None,
    model: Model = None,
    dtype: Dtype = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Judge posteriors on few-shot episodes, clean and attacked, one JSON object a line; pools are merged for each."""
    from pyrolora.inference.evaluation.few_shot import evaluate_episodes
    from pyrolora.inference.perturbations import ATTACKS
    from pyrolora.inference.pool import TaskMerging
    from pyrolora.models.adapters import LoRAPool
    from pyrolora.models.merging import MergeRule
    from pyrolora.models.trimming import Trim

    made = None if attack is None else declared(attack, ATTACKS, "attack")
    scoring = None if score is None else declared(score, ATTACKS, "attack")
    truncation = None if trim is None else declared(trim, {"Trim": Trim}, "truncation")
    rule = declared(merge, {"MergeRule": MergeRule}, "merge rule")
    for folder in folders:
        posterior = _load(folder, model, dtype, device, data_dir)
        split = posterior.model.task.test if task is None else load_task(task, data_dir=data_dir).test
        if episodes is not None and isinstance(split, EpisodeSplit):
            split = split.subset(episodes * split.rows_each)
        pooled = any(isinstance(adapter, LoRAPool) for adapter in posterior.model.adapters)
        judged: Posterior | TaskMerging = posterior
        if pooled:
            judged = TaskMerging(
                posterior,
                rule,
                attack=scoring,
                copies=copies,
                trim=truncation,
                semantics=semantics,
                concentration=concentration,
            )
        scores = evaluate_episodes(judged, split, attack=made, draws=draws, seed=seed, progress=not quiet)
        typer.echo(
            json.dumps({"posterior": str(folder), "task": task or posterior.model.task.name, **scores.to_dict()})
        )


@_command
def predict_command(
    folder: Annotated[Path, typer.Argument(help="Folder of a posterior.")],
    texts: Annotated[
        list[str] | None, typer.Argument(help="Texts or picture files to classify; read from standard input if none.")
    ] = None,
    draws: Annotated[int, typer.Option("--draws", help="Weight draws.")] = 10,
    kind: Kind = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the draws.")] = 0,
    data_dir: DataDir = None,
    model: Model = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Print class probabilities and uncertainty of texts or pictures, one JSON object a line."""
    lines = texts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not lines:
        raise ValueError("There is no text to classify. Give one as an argument, or lines on standard input.")
    posterior = _load(folder, model, dtype, device, data_dir)
    task = posterior.model.task
    shown = task.format.fields
    if len(shown) != 1:
        raise ValueError(
            f"The prompt of {task.name!r} has the fields {', '.join(shown)}; predict takes tasks with one text field. "
            "Use Posterior.predict from Python."
        )
    examples = tuple(
        ImageExample.from_file(_picture(line), 0, line)
        if isinstance(task.format, ImageClasses)
        else Example(fields={shown[0]: line}, label=0, id=f"line/{i}")
        for i, line in enumerate(lines)
    )
    data = Split("given", task.name, examples, len(task.labels))
    generator = torch.Generator().manual_seed(seed)
    predictive = posterior.predict(data, draws=draws, kind=kind, generator=generator)
    entropy = -(predictive.mean_probs.clamp_min(1e-12).log() * predictive.mean_probs).sum(-1)
    each = -(predictive.probs.clamp_min(1e-12).log() * predictive.probs).sum(-1).mean(0)
    for line, probs, total, expected in zip(lines, predictive.mean_probs, entropy, each, strict=True):
        typer.echo(
            json.dumps(
                {
                    "file" if isinstance(task.format, ImageClasses) else "text": line,
                    "label": task.labels[int(probs.argmax())],
                    "probability": {label: round(float(p), 4) for label, p in zip(task.labels, probs, strict=True)},
                    "entropy_nats": round(float(total), 4),
                    "mutual_information_nats": round(max(0.0, float(total - expected)), 4),
                }
            )
        )


def _picture(name: str) -> Path:
    if not (path := Path(name)).is_file():
        raise FileNotFoundError(f"No picture at {name!r}. The task's examples are images: give paths of files.")
    return path


@_command
def windows_command(
    source: Annotated[str, typer.Argument(help="movielens-100k, or a CSV file with user, item, timestamp.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for windows, titles, embeddings and states.")],
    train_windows: Annotated[int | None, typer.Option("--train-windows", help="Training windows; 0 for all.")] = 20_000,
    history: Annotated[int, typer.Option("--history", help="Items of a window.")] = 10,
    shortest: Annotated[
        int | None, typer.Option("--shortest", help="Fewest items of a window; by default all are full.")
    ] = None,
    candidates: Annotated[int, typer.Option("--candidates", help="Items to choose from, the target among them.")] = 20,
    epochs: Annotated[int, typer.Option("--epochs", help="Epochs of the sequence encoder.")] = 30,
    seed: Annotated[int, typer.Option("--seed", help="Seed of users, candidates and encoder.")] = 0,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Make the data of next_item tasks from interactions: --task next_item --data-dir FOLDER takes them from there."""
    from pyrolora.models.recommendation import Preparation, read_interactions

    preparation = Preparation(
        history=history, shortest=shortest, candidates=candidates, train_windows=train_windows or None, epochs=epochs,
        seed=seed,
    )  # fmt: skip
    preparation.prepare(read_interactions(source), out, device=device or "cpu", progress=not quiet)
    typer.echo(
        f"Prepared in {out}. Fit with: pyrolora fit --task next_item --data-dir {out} --adapter 'MixtureLoRA()' "
        "--set max_length=600 --out FOLDER"
    )


@_command
def sites_command(
    model: Model = None,
    task: TaskName = None,
    data_dir: DataDir = None,
    adapter: Annotated[str, typer.Option("--adapter", help="Declaration, such as 'LoRA(rank=4)'.")] = "LoRA()",
    prior: Annotated[str, typer.Option("--prior", help="Declaration, such as 'Normal(0, 0.1)'.")] = "Normal(0, 0.2)",
) -> None:
    """Show the sites a model would have: shapes, dims, priors, number of weights. Nothing is fitted."""
    backbone = load_backbone(model or "smollm2-135m")
    data = load_task(task or "bbc_headlines", data_dir=data_dir)
    program = BayesianModel(
        backbone, data, adapter=declared(adapter, Adapter.registered, "adapter"), prior=declared_prior(prior)
    )
    typer.echo(program.site_table())


if __name__ == "__main__":
    app()
