"""Few-shot episodes judged: accuracy with and without an attack, and calibration of the predictions."""

from dataclasses import dataclass

import torch
from scipy.stats import t as student
from torch import Tensor
from tqdm.auto import tqdm

from pyrolora.inference.evaluation.calibration import ece_equal_width
from pyrolora.inference.evaluation.metrics import negative_log_likelihood
from pyrolora.inference.perturbations import PGD, cross_entropy_objective
from pyrolora.inference.perturbations.target import AttackTarget
from pyrolora.inference.pool import TaskMerging
from pyrolora.inference.posterior import Posterior
from pyrolora.models.prototype_head import PrototypeHead
from pyrolora.models.tasks import EncodedEpisodes, Split

# images of queries, of all draws, that go through the network at once
IMAGES_AT_ONCE = 4096


@dataclass(frozen=True)
class EpisodeScores:
    """Predictions for the queries of some episodes.

    Attributes:
        probs: class probabilities, ``(episodes, queries, ways)``, float32 on the CPU.
        labels: classes, ``(episodes, queries)``.
        attacked: probabilities under the attack, or None.
        weights: merge weights of every episode, ``(episodes, members)``, or None without a pool.
    """

    probs: Tensor
    labels: Tensor
    attacked: Tensor | None = None
    weights: Tensor | None = None

    @property
    def accuracy(self) -> Tensor:
        """Share of right answers of every episode, ``(episodes,)``."""
        return _accuracies(self.probs, self.labels)

    @property
    def robust_accuracy(self) -> Tensor:
        """The same under the attack.

        Raises:
            ValueError: nothing was attacked.
        """
        if self.attacked is None:
            raise ValueError("These episodes were not attacked. Give evaluate_episodes an attack, such as PGD(0.03).")
        return _accuracies(self.attacked, self.labels)

    def to_dict(self) -> dict[str, float]:
        """Means over episodes with half-widths of 95 % t-intervals; NLL in nats and ECE over all queries."""
        probs, labels = self.probs.flatten(0, 1), self.labels.flatten()
        found = {
            **_mean("accuracy", self.accuracy),
            "nll": float(negative_log_likelihood(probs, labels)),
            "ece": float(ece_equal_width(probs, labels)),
        }
        if self.attacked is not None:
            attacked = self.attacked.flatten(0, 1)
            found |= _mean("robust_accuracy", self.robust_accuracy)
            found["robust_nll"] = float(negative_log_likelihood(attacked, labels))
            found["robust_ece"] = float(ece_equal_width(attacked, labels))
        if self.weights is not None:
            found |= {f"weight_{member}": float(mean) for member, mean in enumerate(self.weights.mean(0))}
        return found


def _kept(values: Tensor) -> Tensor:
    return (values.float() if values.is_floating_point() else values).cpu()


def _accuracies(probs: Tensor, labels: Tensor) -> Tensor:
    return (probs.argmax(-1) == labels).float().mean(-1)


def _mean(name: str, values: Tensor) -> dict[str, float]:
    found = {name: float(values.mean())}
    if len(values) > 1:
        half = float(student.ppf(0.975, len(values) - 1)) * float(values.double().std()) / len(values) ** 0.5
        found[f"{name}_half_width"] = half
    return found


@torch.no_grad()
def evaluate_episodes(
    posterior: Posterior | TaskMerging,
    data: Split | EncodedEpisodes,
    *,
    attack: PGD | None = None,
    draws: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> EpisodeScores:
    """Predict the queries of every episode, clean and under an attack on the cross-entropy of the true labels.

    Usage::

        scores = evaluate_episodes(member, target.test, attack=PGD(0.03, steps=10, step_size=0.003))
        scores = evaluate_episodes(TaskMerging(pool, MergeRule(sharpness=8.0)), target.test)

    As many episodes as memory is meant to bear go through the network at once, a merged network for each. The attack sees
    what it attacks: the merge, and the mean over draws. Episodes are the same for every posterior, so results pair. Labelled
    images are as many as the data say: a posterior that was tuned on five shots is judged on one where the data have one.

    Args:
        posterior: over the sites of a model of episodes, or a pool with the way it is merged.
        data: episodes, of the model's task or of another domain with as many ways and queries; shots are the data's own.
        attack: on the pixels of the queries; None for none.
        draws: draws of the posterior; 1 takes its mean.
        seed: of augmentation, draws and the attack's start.
        progress: show a bar.

    Raises:
        ValueError: a model without episodes, data that do not fit it, or no draws.
        TypeError: an attack that is none.
    """
    if draws < 1:
        raise ValueError(f"A prediction takes at least 1 draw; got draws={draws}. 1 takes the posterior's mean.")
    if attack is not None and not isinstance(attack, PGD):
        raise TypeError(f"attack is a {type(attack).__name__}; expected PGD, such as PGD(0.03), or None.")
    merging = posterior if isinstance(posterior, TaskMerging) else None
    fitted = posterior.posterior if isinstance(posterior, TaskMerging) else posterior
    model = fitted.model
    if not isinstance(model.head, PrototypeHead):
        raise ValueError(f"The task {model.task.name!r} has no episodes. Use Posterior.predict, or episodic(task).")
    encoded = model.encode(data)
    assert isinstance(encoded, EncodedEpisodes)
    factors = fitted.mean() if draws == 1 else fitted.sample(draws, generator=torch.Generator().manual_seed(seed))
    points = draws * (1 if merging is None else merging.points)
    together = max(1, IMAGES_AT_ONCE // (points * (encoded.form.rows + encoded.form.ways * encoded.form.shots)))
    parts: list[dict[str, Tensor]] = []
    batches = encoded.batches(together * encoded.form.rows, device=model.backbone.device)
    total = encoded.steps_per_epoch(together * encoded.form.rows)
    # one stream for each purpose, so that an episode meets the same numbers however many go together
    scored, drawn, started = (torch.Generator().manual_seed(3 * seed + purpose) for purpose in range(3))
    for batch in tqdm(batches, total=total, desc="episodes", disable=not progress, leave=False):
        weights = None if merging is None else merging.weights(batch, scored)
        if merging is None or weights is None:
            target = AttackTarget(model, batch, factors, draws)
        else:
            target = merging.target(batch, weights, draws=draws, generator=drawn)
        part = {"probs": target(batch["pixel_values"]).softmax(-1), "labels": batch["labels"]}
        if attack is not None:
            objective = cross_entropy_objective(target, batch["labels"])
            part["attacked"] = target(attack(batch["pixel_values"], objective, started)).softmax(-1)
        rows = {name: value.unflatten(0, (-1, encoded.form.rows)) for name, value in part.items()}
        if weights is not None:
            rows["weights"] = weights
        parts.append(rows)
    model.release()
    return EpisodeScores(**{name: torch.cat([_kept(part[name]) for part in parts]) for name in parts[0]})
