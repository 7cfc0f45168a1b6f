"""Bayesian linear regression with unknown noise: Normal weights given a Gamma precision, and Student predictions."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyrolora.inference.last_layer import HeadData
from pyrolora.inference.vbll.natural import GaussianRows, Whitened
from pyrolora.inference.vbll.regression import check_positive, check_regression


@dataclass(frozen=True)
class StudentPosterior:
    """Normal-Gamma posterior of a linear map and of the noise of each output.

    Attributes:
        white: coordinates.
        rows: weights' Normals in them; covariances are to be divided by the noise precision.
        shape: of the Gamma posterior of every noise precision.
        rate: of the Gamma posterior of each output's noise precision, ``(outputs,)``.
        log_evidence: log density of the targets, nats; exact.
    """

    white: Whitened
    rows: GaussianRows
    shape: float
    rate: Tensor
    log_evidence: float

    def predict(self, features: Tensor) -> torch.distributions.StudentT:
        """Student-t distributions of new outputs, ``(examples, outputs)``, with ``2 * shape`` degrees of freedom."""
        mean, variance = self.white.moments(self.rows, features)
        scale = ((1 + variance) * self.rate / self.shape).sqrt()
        return torch.distributions.StudentT(2 * self.shape, mean, scale)


@dataclass(frozen=True)
class StudentRegression:
    """Linear regression whose noise is unknown: the t-VBLL head, whose posterior is conjugate and therefore exact.

    Usage::

        posterior = StudentRegression(prior_scale=0.5).fit(features, targets)
        posterior.predict(test_features).log_prob(test_targets)

    ``w | precision ~ N(0, prior_scale^2 / precision)`` and ``precision ~ Gamma(shape, rate)`` for each output.

    Source: Harrison, Willes and Snoek, "Variational Bayesian Last Layers", 2024 (their t layers); Murphy, "Machine Learning:
    a Probabilistic Perspective", 2012, section 7.6.3, for the posterior.

    Args:
        prior_scale: standard deviation of a weight in units of the noise's.
        shape: of the Gamma prior of the noise precision.
        rate: of the same, in squared units of the targets; ``rate / shape`` is the prior noise variance.

    Raises:
        ValueError: a number that is not positive.
    """

    prior_scale: float = field(default=1.0, metadata={"help": "deviation of a weight in units of the noise's"})
    shape: float = field(default=1.0, metadata={"help": "shape of the Gamma prior of the noise precision"})
    rate: float = field(default=1.0, metadata={"help": "rate of the Gamma prior, in squared units of the targets"})

    def __post_init__(self) -> None:
        check_positive(self, "prior_scale", "shape", "rate")

    def fit(self, features: Tensor, targets: Tensor) -> StudentPosterior:
        """The posterior under a data set.

        Shape:
            features ``(examples, weights)``, targets ``(examples, outputs)``

        Raises:
            ValueError: shapes that do not fit, or values that are not finite.
        """
        check_regression(features, targets)
        values = targets.double()
        data = HeadData(features.double(), torch.zeros_like(values), values)
        zero = data.inputs.new_zeros(values.shape[1], features.shape[1])
        white = Whitened.of(data, zero, torch.full_like(zero, self.prior_scale))
        rows = GaussianRows(zero[:, :0], values.new_ones(values.shape))
        root = GaussianRows(rows.mean, rows.curvature[:, :1]).roots(white.inputs)[0]
        pull = white.inputs.mT @ values
        mean = torch.cholesky_solve(pull, root)
        shape = self.shape + 0.5 * len(values)
        rate = self.rate + 0.5 * (values.square().sum(0) - (pull * mean).sum(0))
        log_evidence = (
            self.shape * math.log(self.rate) - shape * rate.log() + math.lgamma(shape) - math.lgamma(self.shape)
            - 0.5 * len(values) * math.log(2 * math.pi) - root.diagonal().log().sum()
        )  # fmt: skip
        return StudentPosterior(white, GaussianRows(mean.mT, rows.curvature), shape, rate, float(log_evidence.sum()))
