"""Bayesian linear regression on features: the VBLL head whose posterior is exact."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyrolora.guides.vbll import LogitMoments
from pyrolora.inference.last_layer import HeadData, check_features
from pyrolora.inference.vbll.natural import GaussianRows, Whitened, optimum

# rounds of fit and noise update, and the relative change of the noise at which they stop
NOISE_ROUNDS, NOISE_TOLERANCE = 200, 1e-6


@dataclass(frozen=True)
class GaussianObjective:
    """``E[log N(y; z, noise^2)]`` for Gaussian z, summed over outputs: exact, no bound.

    Args:
        noise: standard deviation of each output, ``(outputs,)``.
    """

    noise: Tensor

    def __call__(self, moments: LogitMoments, targets: Tensor) -> Tensor:
        """Nats of each example, ``(examples,)`` from targets ``(examples, outputs)``."""
        misfit = ((targets - moments.mean).square() + moments.variance) / self.noise.square()
        return (-0.5 * misfit - self.noise.log() - 0.5 * math.log(2 * math.pi)).sum(-1)


@dataclass(frozen=True)
class RegressionPosterior:
    """Posterior of a linear map from features to outputs.

    Attributes:
        white: coordinates.
        rows: Normals of the outputs' weights in them.
        noise: standard deviation of each output.
        elbo: evidence lower bound in nats; the log evidence, since the posterior is exact.
    """

    white: Whitened
    rows: GaussianRows
    noise: Tensor
    elbo: float

    def predict(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of new outputs, noise included, ``(examples, outputs)`` each."""
        mean, variance = self.white.moments(self.rows, features)
        return mean, variance + self.noise.square()


@dataclass(frozen=True)
class Regression:
    """Linear regression with a Normal prior on the weights.

    Usage::

        posterior = Regression(prior_scale=0.5).fit(features, targets)
        mean, variance = posterior.predict(test_features)

    Source: Harrison, Willes and Snoek, "Variational Bayesian Last Layers", 2024, section 3.1.

    Args:
        prior_scale: standard deviation of a weight.
        noise: standard deviation of every output, or None to maximise the evidence over one for each.

    Raises:
        ValueError: a scale that is not positive.
    """

    prior_scale: float = field(default=1.0, metadata={"help": "standard deviation of a weight"})
    noise: float | None = field(default=None, metadata={"help": "noise of an output; None learns it"})

    def __post_init__(self) -> None:
        check_positive(self, "prior_scale")
        if self.noise is not None and not self.noise > 0:
            raise ValueError(f"noise must be positive, or None to learn it; got {self.noise}. Try 0.1.")

    def fit(self, features: Tensor, targets: Tensor) -> RegressionPosterior:
        """The posterior under a data set.

        Shape:
            features ``(examples, weights)``, targets ``(examples, outputs)``

        Raises:
            ValueError: shapes that do not fit, or values that are not finite.
        """
        check_regression(features, targets)
        data = HeadData(features.double(), torch.zeros_like(targets).double(), targets.double())
        shape = (targets.shape[1], features.shape[1])
        zero = data.inputs.new_zeros(shape)
        white = Whitened.of(data, zero, torch.full_like(zero, self.prior_scale))
        first = data.labels.std(0).clamp_min(1e-6) if self.noise is None else torch.full_like(zero[:, 0], self.noise)
        noise, rows, loss = first, None, 0.0
        for _ in range(NOISE_ROUNDS):
            rows, loss = optimum(data, white, _outputs, GaussianObjective(noise), start=rows)
            posterior = RegressionPosterior(white, rows, noise, -loss)
            if self.noise is not None:
                break
            mean, variance = posterior.predict(features)
            before = noise
            noise = ((data.labels - mean).square() + variance - noise.square()).mean(0).sqrt()
            if bool(((noise / before).log().abs() < NOISE_TOLERANCE).all()):
                break
        return posterior


def check_positive(settings: object, *names: str) -> None:
    """Refuse settings that are not positive numbers: ``check_positive(self, "prior_scale")``.

    Raises:
        ValueError: the first such setting.
    """
    for name in names:
        if not getattr(settings, name) > 0:
            raise ValueError(f"{name} must be positive; got {getattr(settings, name)}. Try 1.0.")


def check_regression(features: Tensor, targets: Tensor) -> None:
    """Refuse features and targets that no regression can be fitted to.

    Raises:
        ValueError: shapes that do not fit, or values that are not finite.
    """
    if targets.dim() != 2 or len(targets) != len(features):
        raise ValueError(
            f"Targets of shape {tuple(targets.shape)} do not fit {len(features)} rows of features; expected "
            f"({len(features)}, outputs). Write targets[:, None] for one output."
        )
    check_features(features, None, 0)
    check_features(targets, None, 0)


def _outputs(moments: LogitMoments, offset: Tensor) -> LogitMoments:
    return LogitMoments(moments.mean + offset, moments.spread)
