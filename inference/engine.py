"""What every inference engine promises, and how its settings are read."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from pyrolora.inference.posterior import Posterior
from pyrolora.models.program import BayesianModel
from pyrolora.models.tasks import EncodedSplit, Split


@runtime_checkable
class Engine(Protocol):
    """Fits a posterior: ``engine.fit(model, task.train) -> Posterior``.

    An engine never asks which adapter it is fitting.
    """

    def fit(
        self,
        model: BayesianModel,
        data: Split | EncodedSplit,
        *,
        progress: bool = True,
        generator: torch.Generator | None = None,
    ) -> Posterior:
        """Fit the model to the data."""
        ...


@dataclass(frozen=True)
class StepStats:
    """Figures of one optimisation step, all per example.

    Attributes:
        step: number of the step, from 1.
        loss: negative ELBO divided by the number of data, nats per example.
        nll: negative log-likelihood of the mini-batch under the draw, nats per example.
        kl: KL from posterior to prior divided by the number of data, nats per example; for a point estimate minus the
            log prior density.
        grad_norm: Euclidean norm of all gradients.
        orthogonality_error: of `PoLAR`, the largest ``|X'X - I|_F`` after the step; None without such factors.
        stable_rank: of `PoLAR`, the mean stable rank of the cores after the step; None without them.
        adversarial: of `MetaTuning`, the weighted divergence of attacked rows, nats per example; None without an attack.
        retained: what `QualityRetaining` adds to the loss, nats per example; None without it.
        gate_entropy: of `MixtureLoRA`, mean entropy of the experts' weights over the mini-batch, nats; None without a gate.
    """

    step: int
    loss: float
    nll: float
    kl: float
    grad_norm: float
    orthogonality_error: float | None = None
    stable_rank: float | None = None
    adversarial: float | None = None
    retained: float | None = None
    gate_entropy: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON; what does not apply is left out."""
        return {key: value for key, value in vars(self).items() if value is not None}


History = list[StepStats]
