"""Accuracy of each task of a shared label space, and how much of its peak training gives back."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from pyrolora.inference.posterior import Posterior
from pyrolora.models.tasks import ImageClasses, Split, Task

logger = logging.getLogger(__name__)


def task_accuracies(probs: Tensor, labels: Tensor, task: Task) -> dict[str, float]:
    """Accuracy of each task over the whole label space: ``task_accuracies(predictive.mean_probs, predictive.labels, task)``.

    A class of another task counts as an error, so nobody is told which task an example is of.

    Args:
        probs: class probabilities.
        labels: true classes.
        task: the joined task; one that is not joined is one task.

    Shape:
        probs ``(rows, classes)``, labels ``(rows,)``

    Returns:
        Task -> share of its examples that are classified correctly, in the order of the label space; tasks without an example
        are left out.

    Raises:
        ValueError: a task that is not of images.
    """
    if not isinstance(task.format, ImageClasses):
        raise ValueError(
            f"The task {task.name!r} has no groups of classes; use a task of images, such as 'digits+mnist'."
        )
    right = (probs.argmax(-1) == labels).double()
    group = task.format.group_of_class.to(labels.device)[labels]
    names = [name for name, _ in task.format.groups] or [task.name]
    return {name: float(right[group == place].mean()) for place, name in enumerate(names) if (group == place).any()}


@dataclass
class Retention:
    """Accuracies of the tasks as training goes on.

    Usage::

        run, retention = MAP(steps=1000).iterate(model, task.train), Retention(task, task.validation)
        for stats in run:
            if stats.step % 100 == 0:
                retention.look(run.posterior())
        retention.lost                                     # task -> peak minus final accuracy

    Args:
        task: the joined task.
        data: labelled examples of it; the test split only to report what was already decided.
        draws: weight draws of a prediction.
        curves: task -> accuracies, one a look.
    """

    task: Task
    data: Split
    draws: int = 10
    curves: dict[str, list[float]] = field(default_factory=dict)

    def look(self, posterior: Posterior) -> Mapping[str, float]:
        """Predict with a posterior as it stands, and keep and log the accuracies."""
        found = posterior.predict(self.data, draws=self.draws, batch_size=128)
        if found.labels is None:
            raise ValueError("The data to look at have no labels. Give a labelled split.")
        accuracies = task_accuracies(found.mean_probs, found.labels, self.task)
        for name, value in accuracies.items():
            self.curves.setdefault(name, []).append(value)
        listed = ", ".join(
            f"{name} {value:.3f} (peak {max(self.curves[name]):.3f})" for name, value in accuracies.items()
        )
        logger.info("%.0f %% of training: %s", 100 * posterior.progress, listed)
        return accuracies

    @property
    def lost(self) -> dict[str, float]:
        """Peak minus final accuracy of each task."""
        return {name: max(values) - values[-1] for name, values in self.curves.items()}
