"""Comparisons from a resolved configuration: every method and seed fitted, kept, judged, and never repeated."""

import dataclasses
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml

from pyrolora.guides import Point, build_guide
from pyrolora.inference.evaluation.cost import Cost, measure_cost
from pyrolora.inference.evaluation.harness import evaluate
from pyrolora.inference.evaluation.methods import ENGINES, METHODS, Method
from pyrolora.inference.evaluation.report import Report
from pyrolora.inference.laplace import Laplace
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.storage import CONFIG as POSTERIOR
from pyrolora.inference.storage import check_place
from pyrolora.inference.storage import read_config as read_posterior_config
from pyrolora.models.adapters import Adapter
from pyrolora.models.backbones import Backbone, load_backbone
from pyrolora.models.declarations import declared, declared_prior
from pyrolora.models.naming import nearest
from pyrolora.models.program import BayesianModel
from pyrolora.models.tasks import Split, Task, task

logger = logging.getLogger(__name__)

CONFIG = "config.yaml"

# what a folder may grow by: more methods and seeds are more cells of the same table
GROWING = ("methods", "seeds", "settings")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads ``1e-3`` as text, for want of a dot; here it is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


@dataclass(frozen=True)
class ExperimentConfig:
    """Everything that decides the outcome of a comparison.

    Usage::

        compare(ExperimentConfig(task="bbc_headlines", ood=("crowd_tweets",), train_size=300), "runs/demo")

    Attributes:
        model: backbone, as `load_backbone` takes it.
        task: task, as `task` takes it.
        data_dir: folder with the task's files; None for its package or the hub.
        ood: tasks whose test examples are asked with this task's prompt.
        methods: names from `METHODS`; the pretrained model comes first in any case.
        adapter: declaration of the adapter.
        dtype: type of the frozen weights; ``"auto"`` takes bfloat16 where the device multiplies it in hardware.
        device: where the network runs.
        train_size: training examples; None for all.
        seeds: number of seeds, 0 to seeds - 1; each has its own training subset, start, order and draws.
        draws: weight draws of a prediction.
        ood_size: examples of each foreign task at most.
        test_size: test examples; None for all.
        settings: method -> changes of its engine's settings, prior or guide.
    """

    model: str = field(default="smollm2-135m", metadata={"help": "hub id, folder, GGUF file or short name"})
    task: str = field(default="bbc_headlines", metadata={"help": "name of the task"})
    data_dir: str | None = field(default=None, metadata={"help": "folder with the task's files"})
    ood: tuple[str, ...] = field(default=(), metadata={"help": "tasks to tell from the test items"})
    methods: tuple[str, ...] = field(default=("mle", "map", "blob", "laplace"), metadata={"help": "methods to compare"})
    adapter: str = field(default="LoRA()", metadata={"help": "declaration of the adapter, such as LoRA(rank=8)"})
    dtype: str = field(default="auto", metadata={"help": "type of the frozen weights"})
    device: str = field(default="cpu", metadata={"help": "where the network runs"})
    train_size: int | None = field(default=None, metadata={"help": "training examples; all by default"})
    seeds: int = field(default=1, metadata={"help": "number of seeds"})
    draws: int = field(default=10, metadata={"help": "weight draws of a prediction"})
    ood_size: int = field(default=300, metadata={"help": "examples of each foreign task at most"})
    test_size: int | None = field(default=None, metadata={"help": "test examples; all by default"})
    settings: Mapping[str, Mapping[str, Any]] = field(
        default_factory=dict, metadata={"help": "method -> changed settings"}
    )

    def __post_init__(self) -> None:
        for name in ("ood", "methods"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value.split(",")) if isinstance(value, str) else tuple(value))
        for name in (*self.methods, *self.settings):
            if name not in METHODS:
                raise ValueError(
                    f"Unknown method {name!r}. Did you mean {nearest(name, METHODS)!r}? Methods: {', '.join(METHODS)}."
                )
        if not self.methods:
            raise ValueError(f"No method to compare. Choose some of {', '.join(METHODS)}.")
        if len(set(self.methods)) < len(self.methods):
            raise ValueError(f"A method is named twice in {', '.join(self.methods)}. Name each once.")
        for name in ("seeds", "draws", "ood_size", "train_size", "test_size"):
            value = getattr(self, name)
            if value is None and name in ("train_size", "test_size"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is a whole number of at least 1; got {value!r}.")
        for name, changes in self.settings.items():
            if not isinstance(changes, Mapping):
                raise ValueError(f"The settings of {name} are {changes!r}; expected key: value, such as steps: 300.")

    def method(self, name: str) -> Method:
        """A method with this experiment's changes.

        Raises:
            ValueError: an unknown method, or a change that it does not have.
        """
        if name not in METHODS:
            raise ValueError(
                f"Unknown method {name!r}. Did you mean {nearest(name, METHODS)!r}? Methods: {', '.join(METHODS)}."
            )
        return METHODS[name].changed(self.settings.get(name, {}))

    def needed(self) -> dict[str, Method]:
        """The methods of the table, the pretrained model first, and those whose estimates they start from.

        Raises:
            ValueError: a method or setting that does not fit, or estimates that go round in a circle.
        """
        found: dict[str, Method] = {}
        for name in dict.fromkeys(("zero-shot", *self.methods)):
            chain: list[str] = []
            following: str | None = name
            while following is not None:
                if following in chain:
                    raise ValueError(f"The estimates go round in a circle: {' <- '.join([*chain, following])}.")
                chain.append(following)
                found[following] = self.method(following)
                following = found[following].estimate
        for method in found.values():
            if method.engine != "none":
                method.make_engine()
        return found

    def to_dict(self) -> dict[str, Any]:
        """The resolved configuration: every default written out, every method with its engine's settings."""
        resolved = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        resolved["ood"], resolved["methods"] = list(self.ood), list(self.methods)
        resolved["settings"] = {name: method.to_dict() for name, method in self.needed().items()}
        return resolved

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ExperimentConfig":
        """Read a configuration.

        Raises:
            ValueError: an unknown key; the nearest is offered.
        """
        valid = [entry.name for entry in fields(cls)]
        for key in values:
            if key not in valid:
                raise ValueError(
                    f"Unknown setting {key!r}. Did you mean {nearest(key, valid)!r}? Settings: {', '.join(valid)}."
                )
        return cls(**values)


def read_config(file: str | Path | None, changes: Sequence[str] = ()) -> dict[str, Any]:
    """Values of a YAML file with ``key=value`` changes: ``read_config("run.yaml", ["seeds=3", "blob.kl_weight=0.3"])``.

    A key with a dot changes a setting of a method.

    Args:
        file: YAML file, or None for nothing but the changes.
        changes: ``key=value``, the value in YAML.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, not a mapping, or a change without ``=``.
    """
    values: dict[str, Any] = {}
    if file is not None:
        path = Path(file)
        if not path.is_file():
            raise FileNotFoundError(f"No config file at {str(file)!r}.")
        try:
            values = yaml.load(path.read_text(), Loader=_Loader) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds a {type(values).__name__}; expected settings as key: value lines.")
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise ValueError(f"Cannot read --set {change!r}; expected key=value, such as blob.kl_weight=0.3.")
        try:
            value = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError as error:
            raise ValueError(f"Cannot read --set {change!r}: {text!r} is not a value in YAML.") from error
        method, dot, setting = key.partition(".")
        if dot:
            settings = values["settings"] = dict(values.get("settings") or {})
            settings[method] = {**(settings.get(method) or {}), setting: value}
        else:
            values[key] = value
    return values


def compare(config: ExperimentConfig, out: str | Path, *, progress: bool = True) -> Report:
    """Fit and judge every method under every seed; a rerun goes on where the last one stopped.

    Args:
        config: what to compare.
        out: folder for the report, the resolved configuration, and one folder a method and seed.
        progress: show bars.

    Returns:
        The report, also written to ``out``.

    Raises:
        ValueError: the folder holds results of another configuration, or the configuration does not fit; nothing has been
            written then.
    """
    out = Path(out)
    needed = config.needed()
    _check_claim(out, config)
    foreign = {name: _at_most(task(name).test, config.ood_size) for name in config.ood}
    data = task(config.task, data_dir=config.data_dir, train_size=config.train_size)
    test = data.test if config.test_size is None else data.test.subset(config.test_size, seed=0)
    backbone = load_backbone(config.model, dtype=config.dtype, device=config.device)
    for name in needed:
        Cell(config, name, 0, out).model(backbone, data)  # refuses sites, ranks and priors that do not fit
    _claim(out, config)
    reports = []
    for seed in range(config.seeds):
        data = task(config.task, data_dir=config.data_dir, train_size=config.train_size, seed=seed)
        fitted: dict[str, Posterior] = {}
        for name in ("zero-shot", *(entry for entry in config.methods if entry != "zero-shot")):
            cell = Cell(config, name, seed, out / name / f"seed-{seed}")
            report = cell.report()
            if report is None:
                logger.info("%s, seed %d", name, seed)
                posterior = cell.posterior(backbone, data, fitted, progress)
                fitted[name] = posterior
                costs = {name: Cost.from_dict(posterior.record["cost"])} if "cost" in posterior.record else {}
                report = evaluate(
                    {name: posterior}, test, ood=foreign, draws=config.draws, seed=seed, costs=costs, progress=progress
                )
                report.save(cell.folder)
            reports.append(report)
    merged = Report.merge(reports)
    merged.save(out)
    return merged


def fit_one(config: ExperimentConfig, name: str, seed: int, folder: str | Path, *, progress: bool = True) -> Posterior:
    """Fit one method under one seed and keep it in a folder, with the resolved configuration beside it.

    Args:
        config: the experiment; its methods and seeds are not used.
        name: the method.
        seed: the seed.
        folder: where the posterior goes.
        progress: show bars.

    Raises:
        ValueError: the folder holds a posterior of another method, seed or configuration.
    """
    folder = Path(folder).resolve()
    check_place(folder)
    config = dataclasses.replace(config, methods=(name,))
    config.needed()
    if (folder / POSTERIOR).is_file():
        made = read_posterior_config(folder)["record"].get("cell")
        if made != {"method": name, "seed": seed}:
            raise ValueError(
                f"{folder} holds a posterior of {made}, and now method {name!r} under seed {seed} is asked for. Use another "
                "--out, or delete the folder."
            )
        _check_claim(folder, config)
    data = task(config.task, data_dir=config.data_dir, train_size=config.train_size, seed=seed)
    backbone = load_backbone(config.model, dtype=config.dtype, device=config.device)
    # beside the posterior, because saving replaces the folder; claimed, so that only the same fit takes it up again
    estimates = folder.with_name(folder.name + ".estimate")
    if config.method(name).estimate is not None:
        _claim(estimates, config)
    posterior = Cell(config, name, seed, folder, estimates).posterior(backbone, data, {}, progress)
    shutil.rmtree(estimates, ignore_errors=True)
    if not (folder / POSTERIOR).is_file():  # the pretrained model is kept nowhere else
        posterior.record["cell"] = {"method": name, "seed": seed}
        posterior.save_pretrained(folder)
    _write_config(folder, config.to_dict())
    return posterior


@dataclass(frozen=True)
class Cell:
    """One method under one seed, with the folder that its results live in.

    Attributes:
        config: the experiment.
        name: the method.
        seed: the seed.
        folder: where its posterior and report are kept.
        estimates: folder with a folder a method, where a posterior that this one starts from is kept; by default the
            experiment's own.
    """

    config: ExperimentConfig
    name: str
    seed: int
    folder: Path
    estimates: Path | None = None

    def report(self) -> Report | None:
        """The finished report, if there is one."""
        return Report.load(self.folder) if (self.folder / "report.json").is_file() else None

    def model(self, backbone: Backbone, data: Task) -> BayesianModel:
        """The method's model: the experiment's adapter and its own, under its prior."""
        method = self.config.method(self.name)
        adapters = [
            declared(text, Adapter.registered, "adapter")
            for text in (method.adapter or self.config.adapter, *method.adapters)
        ]
        return BayesianModel(backbone, data, adapter=adapters, prior=declared_prior(method.prior))

    def posterior(self, backbone: Backbone, data: Task, fitted: dict[str, Posterior], progress: bool) -> Posterior:
        """The fitted posterior, read from the folder if it was kept, else fitted and kept.

        Args:
            backbone: the frozen network.
            data: the task.
            fitted: posteriors of this seed so far, from which an estimate may be taken; one that is made is added.
            progress: show bars.
        """
        method = self.config.method(self.name)
        model = self.model(backbone, data)
        if (self.folder / POSTERIOR).is_file():
            return Posterior.from_pretrained(self.folder, model=model)
        if method.engine == "none":
            return Posterior(model, build_guide(Point(), model), {"engine": "none", "num_data": len(data.train)})
        arguments: dict[str, Any] = {}
        before = Cost(0.0, 0)
        if method.estimate is not None:
            if method.estimate not in fitted:
                root = self.folder.parent.parent if self.estimates is None else self.estimates
                other = dataclasses.replace(
                    self, name=method.estimate, folder=root / method.estimate / f"seed-{self.seed}"
                )
                fitted[method.estimate] = other.posterior(backbone, data, fitted, progress)
            arguments["estimate"] = fitted[method.estimate]
            if "cost" in fitted[method.estimate].record:
                before = Cost.from_dict(fitted[method.estimate].record["cost"])
        training = self.folder.with_name(self.folder.name + ".training")
        taken = {entry.name for entry in fields(ENGINES[method.engine])}
        seeded = {key: value for key, value in (("checkpoint", training), ("seed", self.seed)) if key in taken}
        engine = method.make_engine(**seeded)
        if isinstance(engine, Laplace):
            if engine.precision == "validation":
                arguments["validation"] = data.validation
            if "estimate" not in arguments:
                arguments["generator"] = torch.Generator().manual_seed(self.seed)
        with measure_cost(self.config.device) as cost:
            posterior = engine.fit(model, data.train, progress=progress, **arguments)
        # what an estimate cost is part of what the method costs
        total = Cost(cost.seconds + before.seconds, max(cost.peak_memory_bytes, before.peak_memory_bytes))
        posterior.record["cost"] = total.to_dict()
        posterior.record["cell"] = {"method": self.name, "seed": self.seed}
        posterior.save_pretrained(self.folder)
        shutil.rmtree(training, ignore_errors=True)
        return posterior


def _at_most(split: Split, size: int) -> Split:
    return split if len(split) <= size else split.subset(size, seed=0)


def _check_claim(out: Path, config: ExperimentConfig) -> dict[str, Any]:
    """What the folder's configuration says, if what the folder holds was made with the same settings.

    Methods and seeds are cells of the same table, so more of them may be added later.
    """
    path = out / CONFIG
    if not path.is_file():
        return {}
    stored = yaml.load(path.read_text(), Loader=_Loader)
    resolved = json.loads(json.dumps(config.to_dict()))
    pairs = [(key, stored.get(key), value) for key, value in resolved.items() if key not in GROWING]
    for name, settings in stored["settings"].items():
        asked = resolved["settings"].get(name, settings)
        pairs += [(f"{name}.{key}", settings.get(key), asked.get(key)) for key in {**settings, **asked}]
    for key, before, now in pairs:
        if before != now:
            raise ValueError(
                f"{out} holds results with {key}={before!r}, and now {key}={now!r} is asked for. "
                "Use another --out, or delete the folder."
            )
    return stored


def _claim(out: Path, config: ExperimentConfig) -> None:
    """Write the resolved configuration of everything that the folder holds or will hold."""
    stored, resolved = _check_claim(out, config), config.to_dict()
    resolved["methods"] = list(dict.fromkeys([*stored.get("methods", ()), *config.methods]))
    resolved["seeds"] = max(stored.get("seeds", 1), config.seeds)
    resolved["settings"] = {**stored.get("settings", {}), **resolved["settings"]}
    _write_config(out, resolved)


def _write_config(out: Path, resolved: Mapping[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    partial = out / f".{CONFIG}.{os.getpid()}"
    partial.write_text(yaml.safe_dump(json.loads(json.dumps(resolved)), sort_keys=False))
    partial.replace(out / CONFIG)
