"""The categorical likelihood with the last layer integrated out: a Pyro observation whose density is a VBLL objective."""

from collections.abc import Mapping
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor

from pyrolora.guides.base import Guide
from pyrolora.guides.vbll import LogitMoments
from pyrolora.inference.last_layer import LastLayerHead
from pyrolora.inference.vbll.objectives import Objective
from pyrolora.models.likelihoods import observe


class ExpectedCategorical(dist.TorchDistribution):
    """Labels under Gaussian logits; ``log_prob`` is an objective for ``E[log softmax(z)_y]``, not a normalised density.

    Args:
        moments: of the logits.
        objective: what `log_prob` returns.

    Shape:
        batch shape ``(examples,)``
    """

    arg_constraints: ClassVar = {}
    support = dist.constraints.nonnegative_integer

    def __init__(self, moments: LogitMoments, objective: Objective) -> None:
        self.moments, self.objective = moments, objective
        super().__init__(moments.mean.shape[:1], validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """The objective of each label, nats, ``(examples,)``."""
        return self.objective(self.moments, value)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - immutable
        """Labels under one draw of the logits, ``(*sample_shape, examples)``."""
        root = torch.linalg.cholesky_ex(self.moments.covariance).L
        noise = torch.randn(*sample_shape, *self.moments.mean.shape).to(self.moments.mean)
        logits = self.moments.mean + (root @ noise[..., None])[..., 0]
        return dist.Categorical(logits=logits).sample()

    def expand(self, batch_shape: Any, _instance: Any = None) -> "ExpectedCategorical":
        """Only its own batch shape."""
        if torch.Size(batch_shape) != self.batch_shape:
            raise NotImplementedError("ExpectedCategorical has one entry an example and cannot be expanded.")
        return self


class CollapsedProgram:
    """The model's program with ``head.weight`` integrated out of the likelihood under a guide's own posterior of it.

    Usage::

        TraceMeanField_ELBO().loss(CollapsedProgram(head, guide, Objective("tilted")), guide, batch)

    The site stays in the program, so that its KL is counted as ever; its sampled value is not used.

    Args:
        head: the last layer.
        guide: whose posterior of ``head.weight`` is integrated over.
        objective: for the expected log-likelihood.
    """

    def __init__(self, head: LastLayerHead, guide: Guide, objective: Objective) -> None:
        self.head, self.guide, self.objective = head, guide, objective

    def __call__(self, batch: Mapping[str, Tensor], num_data: int | None = None) -> Tensor:
        """Run the program; ``batch`` may bring ``features``, and the network is then not run."""
        model = self.head.model
        draw = model.sample_sites()
        features = batch["features"] if "features" in batch else model.features(batch, draw)
        moments = self.head.moments(self.head.factor(self.guide).distribution(), features)
        labels, index = batch["labels"].to(features.device), batch.get("index")
        rows = model.num_data if num_data is None else num_data
        likelihood = ExpectedCategorical(moments, self.objective)
        return observe(likelihood, labels, None if index is None else index.to(features.device), rows)
