"""Classes as Gaussians in feature space: the generative VBLL head, which also says how likely the features are."""

import logging
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyrolora.inference.last_layer import check_features

logger = logging.getLogger(__name__)

LBFGS_STEPS = 300


@dataclass(frozen=True)
class GenerativePosterior:
    """Normal posteriors of class means under a shared diagonal noise.

    Attributes:
        mean: posterior mean of each class mean, ``(classes, features)``.
        variance: its posterior variance.
        noise: variance of features around their class mean, ``(features,)``.
        log_prior: log probability of each class, ``(classes,)``.
        bound: lower bound on the log-likelihood of labels minus the KL, nats.
    """

    mean: Tensor
    variance: Tensor
    noise: Tensor
    log_prior: Tensor
    bound: float

    def log_density(self, features: Tensor) -> Tensor:
        """``log p(features | class)`` with the class means integrated out, nats, ``(examples, classes)``."""
        return _log_normal(features.double(), self.mean, self.noise + self.variance)

    def predict(self, features: Tensor) -> Tensor:
        """Class probabilities in closed form, ``(examples, classes)``."""
        return (self.log_density(features) + self.log_prior).softmax(-1)

    def log_marginal(self, features: Tensor) -> Tensor:
        """``log p(features)``, nats: low for features unlike any class, ``(examples,)``."""
        return (self.log_density(features) + self.log_prior).logsumexp(-1)


@dataclass(frozen=True)
class Generative:
    """Fits class means and noise by the generative VBLL bound.

    Usage::

        posterior = Generative().fit(features, labels)
        posterior.predict(test_features), posterior.log_marginal(test_features)

    The bound is ``log N(x; m_y, noise) - tr(noise^-1 S_y) / 2 + log p(y)`` minus
    ``logsumexp_k(log N(x; m_k, noise + S_k) + log p(k))``, summed over examples, minus the KL of the class means.

    Source: Harrison, Willes and Snoek, "Variational Bayesian Last Layers", 2024, section 3.3; here with any class prior.

    Args:
        prior_scale: standard deviation of a class mean around the mean of all features, in units of each feature's own.

    Raises:
        ValueError: a scale that is not positive.
    """

    prior_scale: float = field(default=1.0, metadata={"help": "prior deviation of class means, in features' own units"})

    def __post_init__(self) -> None:
        if not self.prior_scale > 0:
            raise ValueError(f"prior_scale must be positive; got {self.prior_scale}. Try 1.0.")

    def fit(self, features: Tensor, labels: Tensor) -> GenerativePosterior:
        """The posterior under a data set.

        Shape:
            features ``(examples, features)``, labels ``(examples,)``

        Raises:
            ValueError: features that are not finite, negative labels, or a class without examples.
        """
        classes = int(labels.max()) + 1
        check_features(features, labels, classes)
        counts = torch.bincount(labels, minlength=classes)
        if bool((counts == 0).any()):
            raise ValueError(
                f"No training example has the class {int((counts == 0).nonzero()[0])}; its mean would be the prior's. "
                "Number the classes without gaps, or raise train_size."
            )
        double = features.double()
        centre, spread = double.mean(0), double.std(0).clamp_min(1e-6)
        scaled = (double - centre) / spread
        log_prior = (counts / len(labels)).double().log().to(double)
        start = torch.stack([scaled[labels == k].mean(0) for k in range(classes)])
        noise = (scaled - start[labels]).square().mean(0).clamp_min(1e-3)
        # start from the exact posterior of the class means given this noise
        precision = counts[:, None] / noise + self.prior_scale**-2
        parameters = [start.clone(), (1 / precision).log(), noise.log()]
        for parameter in parameters:
            parameter.requires_grad_()
        optimiser = torch.optim.LBFGS(parameters, max_iter=LBFGS_STEPS, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimiser.zero_grad()
            loss = -self._bound(scaled, labels, log_prior, *parameters)
            loss.backward()
            return loss

        optimiser.step(closure)
        mean, log_variance, log_noise = (parameter.detach() for parameter in parameters)
        bound = float(self._bound(scaled, labels, log_prior, mean, log_variance, log_noise))
        return GenerativePosterior(
            centre + spread * mean,
            spread.square() * log_variance.exp(),
            spread.square() * log_noise.exp(),
            log_prior,
            bound,
        )

    def _bound(
        self, features: Tensor, labels: Tensor, log_prior: Tensor, mean: Tensor, log_variance: Tensor, log_noise: Tensor
    ) -> Tensor:
        variance, noise = log_variance.exp(), log_noise.exp()
        known = _log_normal(features, mean, noise.expand_as(mean)) - 0.5 * (variance / noise).sum(-1)
        marginal = _log_normal(features, mean, noise + variance)
        likelihood = (known + log_prior).gather(-1, labels[:, None])[:, 0] - (marginal + log_prior).logsumexp(-1)
        ratio = (variance + mean.square()) / self.prior_scale**2
        divergence = 0.5 * (ratio - 1 - (variance / self.prior_scale**2).log()).sum()
        return likelihood.sum() - divergence


def _log_normal(features: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Log density of every row under every class's diagonal Normal, without a tensor of all three sizes."""
    misfit = (
        features.square() @ (1 / variance).mT - 2 * features @ (mean / variance).mT + (mean.square() / variance).sum(-1)
    )
    return -0.5 * (misfit + (2 * torch.pi * variance).log().sum(-1))
