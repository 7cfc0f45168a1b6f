"""One method under one seed: fitted, kept, judged, and claimed by one process at a time."""

import dataclasses
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyrolora.guides import Point, build_guide
from pyrolora.inference.diagnostics.layers import layer_summary
from pyrolora.inference.evaluation.configuration import ExperimentConfig
from pyrolora.inference.evaluation.cost import Cost, measure_cost
from pyrolora.inference.evaluation.disagreement import human_disagreement
from pyrolora.inference.evaluation.harness import Prediction, evaluate
from pyrolora.inference.evaluation.methods import ENGINES
from pyrolora.inference.evaluation.ood import decompose
from pyrolora.inference.evaluation.report import Report
from pyrolora.inference.evaluation.temperature import TemperatureScaling
from pyrolora.inference.laplace import Laplace
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.storage import CONFIG as POSTERIOR
from pyrolora.models.adapters import Adapter
from pyrolora.models.atomic import replacing
from pyrolora.models.backbones import Backbone
from pyrolora.models.declarations import declared, declared_prior
from pyrolora.models.program import BayesianModel
from pyrolora.models.randomness import seeded
from pyrolora.models.tasks import Split, Task

logger = logging.getLogger(__name__)

REPORT, PREDICTIONS, LAYERS = "report.json", "predictions.safetensors", "layers.nc"
# what tells people's votes on the items of a task
VOTES = "agreement"


@dataclass(frozen=True)
class JudgedOn:
    """The data that every cell of an experiment is judged on.

    Attributes:
        test: test items.
        ood: name -> foreign items.
        shift: name -> labelled items from elsewhere.
    """

    test: Split
    ood: Mapping[str, Split]
    shift: Mapping[str, Split]


@dataclass(frozen=True)
class Cell:
    """One method under one seed, with the folder that its results live in.

    The folder holds the posterior, ``predictions.safetensors`` (see `predictions`), ``layers.nc`` (see `layer_summary`), and
    last ``report.json``: where that is, the cell is finished.

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

    @property
    def finished(self) -> bool:
        """Whether its report is there."""
        return (self.folder / REPORT).is_file()

    @contextmanager
    def claim(self) -> Iterator[bool]:
        """Claim the cell, and the estimates that it would have to fit, for this process; false if another has one of them.

        A process that dies loses its claims, and what it left half-written is swept by the next one to claim the cell.
        """
        with ExitStack() as claims:
            for cell in (self, *self._missing_estimates()):
                lock = cell.folder.with_name(f".{cell.folder.name}.lock")
                lock.parent.mkdir(parents=True, exist_ok=True)
                try:
                    claims.enter_context(FileLock(lock, blocking=False))
                except Timeout:
                    yield False
                    return
                cell._sweep()
            yield True
            # whoever still waits for the removed file finds the cell finished
            if self.finished:
                self.folder.with_name(f".{self.folder.name}.lock").unlink(missing_ok=True)

    def report(self) -> Report | None:
        """The finished report, if there is one."""
        return Report.load(self.folder) if self.finished else None

    def predictions(self) -> dict[str, Tensor]:
        """What was kept of every test item: ``mean_probs``, ``labels``, and ``aleatoric`` and ``epistemic`` entropy, nats."""
        return load_file(self.folder / PREDICTIONS)

    def compute(
        self, backbone: Backbone, data: Task, judged_on: JudgedOn, fitted: dict[str, Posterior], progress: bool
    ) -> Report:
        """Fit unless a kept posterior is there, judge, and keep the results.

        Args:
            backbone: the frozen network.
            data: the task under the cell's seed.
            judged_on: what it is judged on.
            fitted: posteriors of this seed so far; this one is added.
            progress: show bars.
        """
        posterior = self.posterior(backbone, data, fitted, progress)
        fitted[self.name] = posterior
        recorder = _Recorder(posterior)
        sets = self.config.miscoverage is not None
        report = evaluate(
            {self.name: recorder},
            judged_on.test,
            ood=judged_on.ood,
            shift=judged_on.shift,
            calibration=data.validation if sets else None,
            miscoverage=self.config.miscoverage or 0.1,
            disagreement=human_disagreement(judged_on.test) if _has_votes(judged_on.test) else None,
            kind=self.config.method(self.name).kind,
            groups=getattr(data.format, "groups", ()),
            draws=self.config.draws,
            seed=self.seed,
            costs={self.name: Cost.from_dict(posterior.record["cost"])} if "cost" in posterior.record else {},
            progress=progress,
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._keep_predictions(recorder.first)
        summary = layer_summary(posterior)
        with replacing(self.folder / LAYERS) as partial:
            summary.to_netcdf(partial, engine="h5netcdf")
        report.save(self.folder)
        return report

    def model(self, backbone: Backbone, data: Task) -> BayesianModel:
        """The method's model: the experiment's adapter and its own, under its prior."""
        method = self.config.method(self.name)
        adapters = [
            declared(text, Adapter.registered, "adapter")
            for text in (method.adapter or self.config.adapter, *method.adapters)
        ]
        prior = declared_prior(method.prior)
        return BayesianModel(backbone, data, adapter=adapters, prior=prior, max_length=self.config.max_length)

    def check(self, backbone: Backbone, data: Task) -> None:
        """Refuse what the cell's fit would refuse of its model: sites, priors, guide, and entries that gates read.

        Nothing is trained; two rows go through the network as it starts, or one episode.

        Raises:
            ValueError: what does not fit, with the method's name.
        """
        method = self.config.method(self.name)
        try:
            model = self.model(backbone, data)
            if method.engine != "none":
                engine = method.make_engine()
                engine.check(model, len(data.train), estimated=method.estimate is not None)
            some = data.train.subset(min(len(data.train), getattr(data.train, "rows_each", 2)))
            batch = next(model.encode(some).batches(len(some)))
            with torch.no_grad(), seeded(self.seed, backbone.device):
                model.row_logits(batch, model.initial(), local=True)
            model.release()
        except (ValueError, TypeError) as error:
            names = ", ".join(method.adapters)
            added = f" The method adds {names}: {self.name}.adapters=[] takes it away." if names else ""
            raise ValueError(
                f"The method {self.name!r} does not go with its adapter, prior and task. {error}{added}"
            ) from error

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
                fitted[method.estimate] = self._other(method.estimate).posterior(backbone, data, fitted, progress)
            arguments["estimate"] = fitted[method.estimate]
            if "cost" in fitted[method.estimate].record:
                before = Cost.from_dict(fitted[method.estimate].record["cost"])
        training = self.folder.with_name(self.folder.name + ".training")
        taken = {entry.name for entry in dataclasses.fields(ENGINES[method.engine])}
        offered = {"seed": self.seed, "checkpoint": training}
        engine = method.make_engine(**{key: value for key, value in offered.items() if key in taken})
        if isinstance(engine, TemperatureScaling) or (isinstance(engine, Laplace) and engine.precision == "validation"):
            arguments["validation"] = data.validation
        if "seed" not in taken and (isinstance(engine, TemperatureScaling) or "estimate" not in arguments):
            arguments["generator"] = torch.Generator().manual_seed(self.seed)
        logger.info("fitting %s, seed %d", self.name, self.seed)
        with measure_cost(self.config.device) as cost:
            posterior = engine.fit(model, data.train, progress=progress, **arguments)
        # what an estimate cost is part of what the method costs
        total = Cost(cost.seconds + before.seconds, max(cost.peak_memory_bytes, before.peak_memory_bytes))
        posterior.record["cost"] = total.to_dict()
        posterior.record["cell"] = {"method": self.name, "seed": self.seed}
        posterior.save_pretrained(self.folder)
        shutil.rmtree(training, ignore_errors=True)
        return posterior

    def _other(self, name: str) -> "Cell":
        """The cell of a method that this one starts from."""
        root = self.folder.parent.parent if self.estimates is None else self.estimates
        return dataclasses.replace(self, name=name, folder=root / name / f"seed-{self.seed}")

    def _missing_estimates(self) -> list["Cell"]:
        """Cells whose posteriors this one would have to fit first."""
        if (self.folder / POSTERIOR).is_file():
            return []
        estimate = self.config.method(self.name).estimate
        if estimate is None:
            return []
        other = self._other(estimate)
        return [] if (other.folder / POSTERIOR).is_file() else [other, *other._missing_estimates()]

    def _keep_predictions(self, prediction: Prediction) -> None:
        split = decompose(prediction.probs)
        kept = {
            "mean_probs": prediction.probs.double().mean(0).float(),
            "labels": torch.as_tensor(prediction.labels),
            "aleatoric": split.aleatoric.float(),
            "epistemic": split.epistemic.float(),
        }
        with replacing(self.folder / PREDICTIONS) as partial:
            save_file({name: value.contiguous() for name, value in kept.items()}, partial)

    def _sweep(self) -> None:
        """Remove what a process that died while writing this cell left behind; only the holder of its claim may."""
        left = [path for path in self.folder.parent.glob(f".{self.folder.name}-*") if not path.name.endswith("-old")]
        left += self.folder.glob(".*")
        for path in left:
            logger.info("removing %s, left by a process that was stopped", path)
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


class _Recorder:
    """A posterior that remembers its first prediction, which is of the test items."""

    def __init__(self, posterior: Posterior) -> None:
        self.posterior = posterior

    def predict(self, data: Any, **arguments: Any) -> Prediction:
        predictive = self.posterior.predict(data, **arguments)
        if not hasattr(self, "first"):
            self.first: Prediction = predictive
        return predictive


def _has_votes(split: Split) -> bool:
    return any(VOTES in example.attributes for example in split)
