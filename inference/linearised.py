"""Gaussian logits of the linearised network around a posterior's mean."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from pyrolora.guides.base import Guide
from pyrolora.guides.projection import is_normal, projected_covariance
from pyrolora.inference.logit_gradients import LogitGradients, each_contrast, each_logit, split_batch
from pyrolora.models.program import BayesianModel

Covariance = Callable[[dict[str, Tensor]], Tensor]


def linearised_logits(
    gradients: LogitGradients, batch: Mapping[str, Tensor], covariance: Covariance, *, contrasts: bool = False
) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the logits under ``f(w) = f(w*) + J (w - w*)``: one forward, a backward for each class.

    Source: Immer et al., "Improving predictions of Bayesian neural nets via local linearization", 2021.

    Args:
        gradients: where to linearise.
        batch: a batch.
        covariance: from the Jacobians of the sites to the covariance of the columns, rows first.
        contrasts: take the differences to the first class instead of all logits, which saves a backward. What is common to
            all logits gets no variance; a softmax does not see it.

    Shape:
        ``(rows, classes)`` and ``(rows, ..., classes, classes)``
    """
    means, covariances = [], []
    for part in split_batch(batch, gradients.rows_at_once(batch)):
        logits, jacobians = gradients.jacobians(part, each_contrast if contrasts else each_logit)
        means.append(logits)
        # the first class differs from itself by nothing
        covariances.append(functional.pad(covariance(jacobians), (1, 0, 1, 0)) if contrasts else covariance(jacobians))
    return torch.cat(means), torch.cat(covariances)


def normal_sites(guide: Guide, model: BayesianModel) -> tuple[str, ...]:
    """Sites at which the guide is a Normal over weights of linear maps, or none if it is random otherwise somewhere.

    What adapters draw for single rows is random otherwise.
    """
    if model.draws_locally:
        return ()
    factors = {
        name: factor
        for name, factor in guide.items()
        if name in model.adapter_sites and "scale" in factor.roles.values()
    }
    for name, factor in factors.items():
        if not (model.adapter_sites[name].linear and is_normal(factor.distribution())):
            return ()
    return tuple(factors)


class Linearised:
    """The linearised predictive of a guide that is Normal or a point at every site.

    Usage::

        mean, covariance = Linearised(model, guide)(batch)

    Args:
        model: the model.
        guide: the posterior.
    """

    def __init__(self, model: BayesianModel, guide: Guide) -> None:
        self.model = model
        names = normal_sites(guide, model)
        self.distributions = {name: factor.distribution() for name, factor in guide.items() if name in names}
        self.gradients = LogitGradients(model, guide.mean(), names)

    def __call__(self, batch: Mapping[str, Tensor], *, contrasts: bool = False) -> tuple[Tensor, Tensor]:
        """Mean and covariance of a batch's logits, ``(rows, classes)`` and ``(rows, classes, classes)``.

        Args:
            batch: a batch.
            contrasts: see `linearised_logits`.
        """
        return linearised_logits(self.gradients, batch, self._covariance, contrasts=contrasts)

    def _covariance(self, jacobians: dict[str, Tensor]) -> Tensor:
        parts = [
            projected_covariance(distribution, jacobians[name]) for name, distribution in self.distributions.items()
        ]
        return torch.stack(parts).sum(0)
