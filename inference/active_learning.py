"""Active learning: fit, ask for the labels that would teach most, fit again."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from tqdm.auto import tqdm

from pyrolora.inference.engine import Engine
from pyrolora.inference.evaluation.curves import COLOURS
from pyrolora.inference.evaluation.metrics import accuracy, negative_log_likelihood
from pyrolora.inference.evaluation.ood import mutual_information, predictive_entropy
from pyrolora.inference.picture import Picture
from pyrolora.inference.posterior import Posterior
from pyrolora.models.atomic import replacing
from pyrolora.models.naming import nearest
from pyrolora.models.program import BayesianModel
from pyrolora.models.tasks import Split

logger = logging.getLogger(__name__)

FORMAT = 1
# how much a label would teach, larger for more: ``probabilities (draws, examples, classes) -> (examples,)``
ACQUISITIONS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "bald": mutual_information,
    "entropy": predictive_entropy,
    "random": None,
}


@dataclass(frozen=True)
class Round:
    """What one round came to.

    Attributes:
        labelled: number of labels that the fit saw.
        asked: ids of the examples that were labelled after it; empty in the last round.
        accuracy: on the test items.
        nll: on the test items, nats an example.
    """

    labelled: int
    asked: tuple[str, ...]
    accuracy: float
    nll: float


@dataclass(frozen=True)
class LearningCurve:
    """The rounds of one run of active learning.

    ``curve.rounds[-1].accuracy``

    Attributes:
        acquisition: name of what chose the examples.
        seed: of the start, the fits, the draws and the ties.
        rounds: in order.
    """

    acquisition: str
    seed: int
    rounds: tuple[Round, ...]

    @property
    def area(self) -> float:
        """Mean accuracy over the curve, by trapezoids: one number by which acquisitions on equal rounds compare."""
        labelled = torch.tensor([float(one.labelled) for one in self.rounds], dtype=torch.float64)
        values = torch.tensor([one.accuracy for one in self.rounds], dtype=torch.float64)
        if len(self.rounds) == 1:
            return float(values[0])
        return float(torch.trapezoid(values, labelled) / (labelled[-1] - labelled[0]))

    def save(self, path: str | Path) -> Path:
        """Write JSON, whole or not at all."""
        path = Path(path)
        with replacing(path) as partial:
            partial.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1))
        return path

    @classmethod
    def load(cls, path: str | Path) -> "LearningCurve":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that is no learning curve.
        """
        try:
            saved = json.loads(Path(path).read_text())
            if saved.pop("format") != FORMAT:
                raise KeyError("format")
            rounds = tuple(Round(**{**one, "asked": tuple(one["asked"])}) for one in saved.pop("rounds"))
            return cls(**saved, rounds=rounds)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is no learning curve of this version ({error}). Run active_learning again."
            ) from error


def active_learning(
    engine: Engine,
    model: BayesianModel,
    pool: Split,
    test: Split,
    *,
    acquisition: str | Callable[[Tensor], Tensor] = "bald",
    start: int = 20,
    ask: int = 10,
    rounds: int = 5,
    draws: int = 10,
    kind: str | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> tuple[Posterior, LearningCurve]:
    """Fit to a few labels, then repeatedly label the examples that the posterior would learn most from, and fit again.

    ``posterior, curve = active_learning(SVI(guide=BLoB()), model, task.train, task.test, acquisition="bald")``

    Every round fits from the same start, so a curve shows what the labels are worth and not how long they were trained on.
    All acquisitions under one seed share their first labels.

    Args:
        engine: any engine.
        model: the model; its likelihood is scaled to the labels at hand.
        pool: examples that may be labelled, such as ``task.train``.
        test: what each round is judged on.
        acquisition: ``"bald"`` (mutual information of label and weights), ``"entropy"`` (of the prediction), ``"random"``, or
            a function ``probabilities (draws, examples, classes) -> (examples,)``, larger for more.
        start: labels of the first fit, stratified.
        ask: labels added a round.
        rounds: fits.
        draws: weight draws of the predictions.
        kind: kind of prediction; the posterior's own by default.
        seed: of the start, the fits, the draws and the ties.
        checkpoint: JSON file that keeps the curve after every round, from which a stopped run goes on.
        progress: show bars.

    Returns:
        The last posterior, and the curve.

    Raises:
        ValueError: an unknown acquisition (the nearest is offered), numbers that do not fit into the pool, examples without
            ids, a point estimate asked for mutual information, or a checkpoint of another run.

    Houlsby et al. 2011, "Bayesian active learning for classification and preference learning", equation 2 (BALD); Gal, Islam
    and Ghahramani 2017, "Deep Bayesian active learning with image data", section 4.
    """
    name, score = _acquisition(acquisition)
    _check_sizes(pool, start, ask, rounds)
    by_id = {example.id: example for example in pool.examples}
    if len(by_id) < len(pool):
        raise ValueError("pool: some examples share an id, expected one for each. Give examples their own.")
    labelled = [example.id for example in pool.subset(start, seed=seed).examples]
    done = _resumed(checkpoint, name, seed, start, ask, rounds)
    for one in done:
        labelled += one.asked
    posterior: Posterior | None = None
    for index in tqdm(range(len(done), rounds), desc=name, disable=not progress, leave=False):
        chosen = set(labelled)
        known = replace(pool, examples=tuple(example for example in pool.examples if example.id in chosen))
        posterior = engine.fit(model, known, progress=progress, generator=_generator(seed, index, 0))
        judged = posterior.predict(test, draws=draws, kind=kind, generator=_generator(seed, index, 1))
        asked: tuple[str, ...] = ()
        if index + 1 < rounds:
            rest = replace(pool, examples=tuple(example for example in pool.examples if example.id not in chosen))
            asked = _ask(posterior, rest, score, ask, draws, kind, _generator(seed, index, 2))
            labelled += asked
        if judged.labels is None:
            raise ValueError("test: got examples without labels, expected labelled ones. Pass task.test.")
        probs = judged.mean_probs
        done.append(
            Round(
                len(known),
                asked,
                float(accuracy(probs, judged.labels)),
                float(negative_log_likelihood(probs, judged.labels)),
            )
        )
        logger.info("%s, %d labels: accuracy %.3f", name, len(known), done[-1].accuracy)
        if checkpoint is not None:
            LearningCurve(name, seed, tuple(done)).save(checkpoint)
    if posterior is None:  # the checkpoint holds every round: only the last fit is needed again
        known = replace(pool, examples=tuple(example for example in pool.examples if example.id in set(labelled)))
        posterior = engine.fit(model, known, progress=progress, generator=_generator(seed, rounds - 1, 0))
    return posterior, LearningCurve(name, seed, tuple(done))


def learning_curves(curves: Mapping[str, Sequence[LearningCurve]] | Sequence[LearningCurve]) -> tuple[Figure, Axes]:
    """Accuracy against labels, a line an acquisition with the range of its seeds: ``learning_curves([bald, random])``.

    Args:
        curves: curves, grouped by name or by their acquisitions.

    Returns:
        The figure and its axes.

    Raises:
        ValueError: no curve, or curves of one name with other rounds.
    """
    groups: dict[str, list[LearningCurve]] = {}
    if isinstance(curves, Mapping):
        groups = {name: list(found) for name, found in curves.items()}
    else:
        for curve in curves:
            groups.setdefault(curve.acquisition, []).append(curve)
    if not groups or not all(groups.values()):
        raise ValueError("curves: got none, expected at least one. Run active_learning first.")
    figure = Picture(figsize=(6.2, 3.7), layout="constrained")
    axes = figure.add_subplot()
    for index, (name, found) in enumerate(groups.items()):
        labelled = [one.labelled for one in found[0].rounds]
        if any([one.labelled for one in curve.rounds] != labelled for curve in found):
            raise ValueError(
                f"curves: those of {name!r} have other numbers of labels. Run all seeds with the same settings."
            )
        values = torch.tensor([[one.accuracy for one in curve.rounds] for curve in found])
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(labelled, values.mean(0), marker="o", markersize=4, linewidth=1.6, color=colour, label=name)
        if len(found) > 1:
            axes.fill_between(labelled, values.amin(0), values.amax(0), color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("labels", fontsize=9)
    axes.set_ylabel("accuracy on test items", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="0.92", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    return figure, axes


def _acquisition(acquisition: str | Callable[[Tensor], Tensor]) -> tuple[str, Callable[[Tensor], Tensor] | None]:
    if callable(acquisition):
        return getattr(acquisition, "__name__", type(acquisition).__name__), acquisition
    if acquisition not in ACQUISITIONS:
        raise ValueError(
            f"Unknown acquisition {acquisition!r}. Did you mean {nearest(str(acquisition), ACQUISITIONS)!r}? "
            f"Acquisitions: {', '.join(ACQUISITIONS)}, or a function of the probabilities."
        )
    return acquisition, ACQUISITIONS[acquisition]


def _check_sizes(pool: Split, start: int, ask: int, rounds: int) -> None:
    for name, value in (("start", start), ("ask", ask), ("rounds", rounds)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is a whole number of at least 1; got {value!r}.")
    needed = start + ask * (rounds - 1)
    if needed > len(pool):
        raise ValueError(
            f"pool: {rounds} rounds need {needed} examples ({start} and {ask} more each), and it has {len(pool)}. "
            "Ask for fewer."
        )


def _ask(
    posterior: Posterior,
    rest: Split,
    score: Callable[[Tensor], Tensor] | None,
    ask: int,
    draws: int,
    kind: str | None,
    generator: torch.Generator,
) -> tuple[str, ...]:
    """Ids of the examples whose labels would teach most; equals in random order."""
    order = torch.randperm(len(rest), generator=generator)
    if score is not None:
        probs = posterior.predict(rest, draws=draws, kind=kind, generator=generator).probs
        if score is mutual_information and len(probs) == 1:
            raise ValueError(
                "acquisition: mutual information of a single draw is zero everywhere. Use a posterior with a width, "
                "or 'entropy'."
            )
        scores = score(probs)
        if scores.shape != (len(rest),) or not scores.isfinite().all():
            raise ValueError(
                f"acquisition: got scores of shape {tuple(scores.shape)} for {len(rest)} examples, expected one finite "
                "number each."
            )
        order = order[scores[order].argsort(descending=True, stable=True)]
    return tuple(rest.examples[int(place)].id for place in order[:ask])


def _resumed(checkpoint: str | Path | None, name: str, seed: int, start: int, ask: int, rounds: int) -> list[Round]:
    if checkpoint is None or not Path(checkpoint).is_file():
        return []
    saved = LearningCurve.load(checkpoint)
    sizes = [start + ask * index for index in range(len(saved.rounds))]
    fits = [one.labelled for one in saved.rounds] == sizes and len(saved.rounds) <= rounds
    # a shorter run ended without asking
    whole = all(one.asked for one in saved.rounds[: rounds - 1])
    if (saved.acquisition, saved.seed) != (name, seed) or not fits or not whole:
        raise ValueError(
            f"{checkpoint} holds {len(saved.rounds)} rounds of {saved.acquisition!r} under seed {saved.seed}, and now "
            f"{name!r} under seed {seed} with other numbers is asked for. Use another file, or delete it."
        )
    logger.info("Resuming after %d rounds of %s", len(saved.rounds), name)
    return list(saved.rounds)


def _generator(seed: int, index: int, purpose: int) -> torch.Generator:
    """A stream of its own for each purpose, so that a resumed run draws what an uninterrupted one would."""
    return torch.Generator().manual_seed(1_000_003 * seed + 10 * index + purpose)
