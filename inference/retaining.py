"""Quality retaining: predictions of a task are held near what they were while it was learnt best."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyrolora.models.naming import nearest
from pyrolora.models.settings import check_numbers

DIRECTIONS = ("teacher", "student")
PREFIX = "retaining."
# name of the factor beside the observed labels
QUALITY = "quality"


@dataclass(frozen=True)
class QualityRetaining:
    """Holds predictions near a bank of earlier ones, the more the smaller a task's loss is: EMTAL's second half.

    Usage::

        MAP(steps=1000, retaining=QualityRetaining()).fit(model, task("digits+mnist").train)

    For every class the bank keeps the logits Z that its examples had, an exponential mean over steps; an example s of class
    y and task t adds the factor ``-weight / L_t * T^2 KL(softmax(Z_y / T) || softmax(z_s / T))`` to its log-likelihood, where
    L_t is an exponential mean of the task's cross-entropy. Bank and losses are constants of a step: they get no gradient, and
    are brought up to date once a step, from the mean over particles. In the logits the factor is a soft label of weight
    ``T^2 / L_t``: pseudo-observations. What is fitted with it is no posterior of the labels alone.

    Tasks are those of the label space (see `pyrolora.models.tasks.joined`); a model of one task has one.

    Source: Zhong et al., "Transforming Vision Transformer", 2024, equations 10 and 11, with the teacher first, as its code
    has it. The code doubles the factor where it keeps a mean: that is ``weight=2``.

    Args:
        weight: multiplies the factor; 0 changes nothing.
        temperature: T.
        momentum: share of the bank that a step keeps.
        loss_momentum: share of a task's mean loss that a step keeps.
        initial_loss: L_t before the first step, nats: large, so that the empty bank weighs little.
        least_loss: smallest L_t that is divided by, nats: memorised tasks would otherwise weigh without bound.
        direction: ``"teacher"`` for KL(bank || prediction), ``"student"`` for KL(prediction || bank), as the paper prints it.

    Raises:
        ValueError: a setting out of range.
    """

    weight: float = field(default=1.0, metadata={"help": "multiplies the factor"})
    temperature: float = field(default=2.0, metadata={"help": "divides the logits of both sides"})
    momentum: float = field(default=0.5, metadata={"help": "share of the bank that a step keeps"})
    loss_momentum: float = field(default=0.95, metadata={"help": "share of a task's mean loss that a step keeps"})
    initial_loss: float = field(default=10.0, metadata={"help": "mean loss of a task before the first step, nats"})
    least_loss: float = field(default=0.05, metadata={"help": "smallest mean loss that is divided by, nats"})
    direction: str = field(default="teacher", metadata={"help": "'teacher' or 'student' first in the KL"})

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.weight < 0:
            raise ValueError(f"weight must not be negative; got {self.weight}. 1 is the paper's, 0 none.")
        for name in ("temperature", "initial_loss", "least_loss"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}.")
        for name in ("momentum", "loss_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is a share in [0, 1); got {getattr(self, name)}.")
        if self.direction not in DIRECTIONS:
            raise ValueError(
                f"Unknown direction {self.direction!r}. Did you mean {nearest(str(self.direction), DIRECTIONS)!r}? "
                f"Directions: {', '.join(DIRECTIONS)}."
            )

    def to_dict(self) -> dict[str, Any]:
        """Settings, ready for JSON."""
        return asdict(self)


class LogitBank:
    """The state of `QualityRetaining` in one fit: logits of every class, and the mean loss of every task.

    Args:
        settings: how both are kept.
        group_of_class: number of the task that each class belongs to.
        device: where the logits are.
        dtype: type of the logits.

    Attributes:
        logits: Z, ``(classes, classes)``, one row a class.
        losses: L, ``(tasks,)``, nats.
    """

    def __init__(
        self, settings: QualityRetaining, group_of_class: Tensor, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.settings = settings
        self.group_of_class = group_of_class.to(device)
        classes, groups = len(group_of_class), int(group_of_class.max()) + 1
        self.logits = torch.zeros(classes, classes, device=device, dtype=dtype)
        self.losses = torch.full((groups,), settings.initial_loss, device=device, dtype=dtype)
        self._seen: list[tuple[Tensor, Tensor]] = []

    def log_factor(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What every example adds to its log-likelihood, nats, ``(rows,)`` from logits ``(rows, classes)``."""
        temperature = self.settings.temperature
        teacher = (self.logits[labels] / temperature).log_softmax(-1)
        student = (logits / temperature).log_softmax(-1)
        first, second = (teacher, student) if self.settings.direction == "teacher" else (student, teacher)
        divergence = temperature**2 * (first.exp() * (first - second)).sum(-1)
        loss = self.losses[self.group_of_class[labels]].clamp_min(self.settings.least_loss)
        return -self.settings.weight * divergence / loss

    @torch.no_grad()
    def record(self, logits: Tensor, labels: Tensor) -> None:
        """Keep one particle's logits until `update`."""
        self._seen.append((logits.detach(), labels))

    @torch.no_grad()
    def update(self) -> None:
        """Take the particles' mean logits into the bank and their loss into the tasks', and forget them.

        Classes and tasks without an example in the step stay as they are; several examples of one class count by their mean.
        """
        if not self._seen:
            return
        logits = torch.stack([logits for logits, _ in self._seen]).mean(0).to(self.logits.dtype)
        labels = self._seen[0][1]
        self._seen = []
        means, present = _group_means(logits, labels, len(self.logits))
        kept = self.settings.momentum
        self.logits = torch.where(present[:, None], kept * self.logits + (1 - kept) * means, self.logits)
        losses = -logits.log_softmax(-1).gather(-1, labels[:, None])
        means, present = _group_means(losses, self.group_of_class[labels], len(self.losses))
        kept = self.settings.loss_momentum
        self.losses = torch.where(present, kept * self.losses + (1 - kept) * means[:, 0], self.losses)

    def state_tensors(self) -> dict[str, Tensor]:
        """Bank and losses by the names that checkpoints keep them under."""
        return {f"{PREFIX}logits": self.logits, f"{PREFIX}losses": self.losses}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put bank and losses back where `state_tensors` had them."""
        self.logits = tensors[f"{PREFIX}logits"].to(self.logits)
        self.losses = tensors[f"{PREFIX}losses"].to(self.losses)


def _group_means(values: Tensor, groups: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean of the rows of each group, and which groups have any."""
    members = torch.nn.functional.one_hot(groups, count).to(values.dtype)
    sizes = members.sum(0)
    return (members.mT @ values) / sizes.clamp_min(1)[:, None], sizes > 0


class RetainingMessenger(Messenger):
    """Adds the bank's factor beside the observed labels, inside their plate; put it around the model alone.

    Usage::

        RetainingMessenger(bank)(model)(batch)

    Args:
        bank: what is retained; the logits of every pass are recorded in it.
    """

    def __init__(self, bank: LogitBank) -> None:
        super().__init__()
        self.bank = bank

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] == "label" and msg["is_observed"]:
            # up to a constant, which no softmax sees
            logits, labels = msg["fn"].logits, msg["value"]
            self.bank.record(logits, labels)
            pyro.factor(QUALITY, self.bank.log_factor(logits, labels))
