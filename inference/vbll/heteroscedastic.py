"""Bayesian linear regression whose noise depends on the features: a second linear map gives its logarithm."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyrolora.guides.vbll import LogitMoments
from pyrolora.inference.last_layer import HeadData
from pyrolora.inference.links import hermite
from pyrolora.inference.vbll.natural import GaussianRows, Whitened, optimum
from pyrolora.inference.vbll.regression import NOISE_ROUNDS, NOISE_TOLERANCE, check_positive, check_regression

# natural-gradient steps between two updates of the noise's level
STEPS_A_ROUND = 3


@dataclass(frozen=True)
class HeteroscedasticObjective:
    """``E[log N(y; z, exp(h))]`` for Gaussian z and h, summed over outputs: exact, no bound.

    The first half of the rows are the z, the second half the h without their common level, in units of the z's prior.

    Args:
        level: logarithm of the noise variance where h is zero, ``(outputs,)``.
        ratio: prior standard deviation of h over that of z.
    """

    level: Tensor
    ratio: float

    def split(self, moments: LogitMoments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean and variance of z, and of the log noise variance, ``(examples, outputs)`` each."""
        mean, rise = moments.mean.chunk(2, dim=-1)
        variance, spread = moments.variance.chunk(2, dim=-1)
        return mean, variance, self.level + self.ratio * rise, self.ratio**2 * spread

    def misfit(self, moments: LogitMoments, targets: Tensor) -> Tensor:
        """``E[(y - z)^2 exp(-h)]``, ``(examples, outputs)``."""
        mean, variance, log_noise, spread = self.split(moments)
        return ((targets - mean).square() + variance) * (0.5 * spread - log_noise).exp()

    def __call__(self, moments: LogitMoments, targets: Tensor) -> Tensor:
        """Nats of each example, ``(examples,)`` from targets ``(examples, outputs)``."""
        log_noise = self.split(moments)[2]
        return -0.5 * (self.misfit(moments, targets) + log_noise + math.log(2 * math.pi)).sum(-1)


@dataclass(frozen=True)
class HeteroscedasticPosterior:
    """Independent Normals of the maps to mean and log noise variance.

    Attributes:
        white: coordinates.
        rows: Normals of both maps' weights in them, those of the means first.
        objective: the level of the noise and its prior's scale.
        elbo: lower bound on the log evidence, nats.
    """

    white: Whitened
    rows: GaussianRows
    objective: HeteroscedasticObjective
    elbo: float

    def predict(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of new outputs, noise included, ``(examples, outputs)`` each."""
        mean, variance, log_noise, spread = self._moments(features)
        return mean, variance + (log_noise + 0.5 * spread).exp()

    def log_prob(self, features: Tensor, targets: Tensor) -> Tensor:
        """Log density of new outputs, nats, ``(examples, outputs)``: Normal given the noise, which quadrature integrates."""
        mean, variance, log_noise, spread = self._moments(features)
        nodes, weights = hermite(mean)
        noise = (log_noise[..., None] + spread.sqrt()[..., None] * nodes).exp()
        normal = torch.distributions.Normal(mean[..., None], (variance[..., None] + noise).sqrt())
        return (normal.log_prob(targets.double()[..., None]) + weights.log().clamp_min(-1e3)).logsumexp(-1)

    def _moments(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.objective.split(LogitMoments(*self.white.moments(self.rows, features)))


@dataclass(frozen=True)
class HeteroscedasticRegression:
    """Linear regression with a linear log noise variance: the Het-VBLL head, its expectations exact.

    Usage::

        posterior = HeteroscedasticRegression(prior_scale=0.5, noise_scale=0.2).fit(features, targets)
        mean, variance = posterior.predict(test_features)

    ``y ~ N(w'x, exp(level + u'x))`` with Normal priors on w and u, a factorised Normal posterior found by natural gradients,
    and the level of each output at the maximum of the ELBO.

    Source: Harrison, Willes and Snoek, "Variational Bayesian Last Layers", 2024 (their heteroscedastic layers).

    Args:
        prior_scale: standard deviation of a weight of the mean.
        noise_scale: standard deviation of a weight of the log noise variance.

    Raises:
        ValueError: a scale that is not positive.
    """

    prior_scale: float = field(default=1.0, metadata={"help": "standard deviation of a weight of the mean"})
    noise_scale: float = field(
        default=1.0, metadata={"help": "standard deviation of a weight of the log noise variance"}
    )

    def __post_init__(self) -> None:
        check_positive(self, "prior_scale", "noise_scale")

    def fit(self, features: Tensor, targets: Tensor) -> HeteroscedasticPosterior:
        """The posterior under a data set.

        Shape:
            features ``(examples, weights)``, targets ``(examples, outputs)``

        Raises:
            ValueError: shapes that do not fit, or values that are not finite.
        """
        check_regression(features, targets)
        values = targets.double()
        data = HeadData(features.double(), torch.zeros_like(values).repeat(1, 2), values)
        zero = data.inputs.new_zeros(2 * values.shape[1], features.shape[1])
        white = Whitened.of(data, zero, torch.full_like(zero, self.prior_scale))
        level = values.square().mean(0).clamp_min(1e-12).log()
        rows = None
        for _ in range(NOISE_ROUNDS):
            objective = HeteroscedasticObjective(level, self.noise_scale / self.prior_scale)
            rows, _ = optimum(data, white, _as_they_are, objective, steps=STEPS_A_ROUND, polish_steps=0, start=rows)
            # the maximum over the level is where the mean misfit is one
            change = objective.misfit(LogitMoments(*white.moments(rows, features)), values).mean(0).log()
            level = level + change
            if bool((change.abs() < NOISE_TOLERANCE).all()):
                break
        rows, loss = optimum(data, white, _as_they_are, objective, polish_steps=0, start=rows)
        return HeteroscedasticPosterior(white, rows, objective, -loss)


def _as_they_are(moments: LogitMoments, offset: Tensor) -> LogitMoments:
    return moments
