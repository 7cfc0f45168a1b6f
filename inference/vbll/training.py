"""Training of a network below a variational last layer: alternating or joint, one pass of the network a step."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyrolora.inference.last_layer import HeadData, LastLayerHead
from pyrolora.inference.training import TrainingRun
from pyrolora.inference.vbll.likelihood import CollapsedProgram
from pyrolora.inference.vbll.natural_step import natural_step
from pyrolora.inference.vbll.objectives import Objective
from pyrolora.inference.vbll.refit import fit_head
from pyrolora.models.adapters.last_layer import HEAD
from pyrolora.models.program import BayesianModel
from pyrolora.models.tasks import EncodedSplit, Split

if TYPE_CHECKING:
    from pyrolora.inference.vbll.engine import VBLL

# examples of the pass that warms the head up
WARM_ROWS = 2000


class LastLayerRun(TrainingRun):
    """A `TrainingRun` whose likelihood has the last layer integrated out.

    In alternating mode a step first moves the head a few times on the batch's features, detached, then the rest once with the
    head held still; in joint mode both move by one backward. The head's own steps are Adam's or natural gradients'.

    Args:
        engine: the settings.
        model: a model with a `LastLayer`.
        data: training data.
        generator: source of the seed, instead of the engine's.
        start: site name -> where its mean starts.
    """

    engine: "VBLL"

    def __init__(
        self,
        engine: "VBLL",
        model: BayesianModel,
        data: Split | EncodedSplit,
        *,
        generator: torch.Generator | None = None,
        start: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.head = LastLayerHead(model)
        self.head.normal_prior()
        super().__init__(engine, model, data, generator=generator, start=start)
        self.objective = Objective(engine.objective, engine.objective_draws)
        self.program = CollapsedProgram(self.head, self.guide, self.objective)
        self.head_parameters: list[nn.Parameter] = list(self.head.factor(self.guide).parameters())
        if self.step == 0 and engine.warm_start:
            self._warm_up()

    def _rates(self) -> dict[str, float]:
        # weights of the head are as large as its prior allows, which depends on the length of the features
        rate = self.engine.head_learning_rate * float(self.head.normal_prior()[1].mean())
        return {**super()._rates(), f"{HEAD}/loc": rate}

    @torch.no_grad()
    def _warm_up(self) -> None:
        """Put the head at its optimum for the network as it starts."""
        start, rows = self.guide.mean(), min(len(self.data), WARM_ROWS)
        chosen = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(self.seed))[:rows].tolist()
        parts = []
        for first in range(0, rows, self.engine.batch_size):
            batch = self.data.batch(chosen[first : first + self.engine.batch_size])
            parts.append((self.model.features(batch, start), batch["labels"]))
        self.model.release()
        features, labels = (torch.cat(values) for values in zip(*parts, strict=True))
        data = HeadData.of(self.head, features, labels, len(self.data) / rows / self.engine.kl_weight)
        fit_head(self.head, self.head.factor(self.guide), data, self.objective)
        # a learned scale moves in training, from where it was declared
        self.model.prior.reset_scales()

    def _backward(self, batch: Mapping[str, Tensor]) -> float:
        drawn = self._scoped(self.guide.__call__, batch)(batch)
        features = self.model.features(batch, drawn)
        alternating = self.engine.mode == "alternating"
        if alternating:
            for _ in range(self.engine.head_steps):
                if self.engine.head_step == "natural":
                    self._natural_step(batch, features.detach())
                    continue
                self._elbo(batch, features.detach())
                # the rest's gradients here are the KL's alone, and their turn comes below
                for parameter in self.parameters:
                    if not self._in_head(parameter):
                        parameter.grad = None
                self._clip(self.head_parameters)
                # entries of a schedule forget the gradients of the step before
                self.optimiser.gradients()
                self.optimiser.step(self._rate_factor(self.step))
                self.optimiser.zero_grad()
        loss = self._elbo(batch, features)
        if alternating:
            for parameter in self.head_parameters:
                parameter.grad = None
        return loss

    def _natural_step(self, batch: Mapping[str, Tensor], features: Tensor) -> None:
        double, labels = features.double(), batch["labels"].to(features.device)
        weight = len(self.data) / len(labels) / self.engine.kl_weight
        data = HeadData(self.head.inputs(double), self.head.offset(double), labels, weight)
        natural_step(self.head, self.head.factor(self.guide), data, self.objective, self.engine.natural_rate)

    def _in_head(self, parameter: Tensor) -> bool:
        return any(parameter is other for other in self.head_parameters)

    def _clip(self, parameters: list[nn.Parameter]) -> None:
        if self.engine.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self.engine.max_grad_norm)

    def _elbo(self, batch: Mapping[str, Tensor], features: Tensor) -> float:
        given: dict[str, Any] = {**batch, "features": features}
        run_model, run_guide = self._scoped(self.program, batch), self._scoped(self.guide.__call__, batch)
        return self.elbo.loss_and_grads(run_model, run_guide, given, len(self.data))
