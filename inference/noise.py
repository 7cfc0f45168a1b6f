"""Noise scopes as effect handlers: one draw for a mini-batch, one for every example, or one for every token."""

from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import kl_divergence, register_kl

from pyrolora.guides.local import local_weight

# of a draw: the batch, an example, a token by local reparameterisation, a token by Flipout
SCOPES = ("weight", "example", "token", "flipout")
TOKEN_SCOPES = ("token", "flipout")


class Copies(TorchDistribution):
    """``count`` independent copies of a distribution as one more event dimension, with the log density averaged.

    The average makes one site with ``count`` draws weigh as one draw does, so an ELBO whose likelihood rows use one draw
    each has the same expectation as with a single shared draw.

    Args:
        base: the distribution to copy.
        count: number of copies.

    Shape:
        event shape ``(count, *base.event_shape)``
    """

    arg_constraints: ClassVar = {}

    def __init__(self, base: TorchDistribution, count: int) -> None:
        self.base, self.count = base, count
        super().__init__(base.batch_shape, torch.Size((count, *base.event_shape)), validate_args=False)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether the base distribution is reparameterised."""
        return self.base.has_rsample

    @property
    def support(self) -> dist.constraints.Constraint:
        """Support of the copies."""
        return dist.constraints.independent(self.base.support, 1)

    def rsample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = torch.Size()) -> Tensor:  # noqa: B008 - immutable
        """Independent copies, ``(*sample_shape, *batch_shape, count, *base.event_shape)``."""
        return self._copies_last(self.base.rsample(torch.Size((*sample_shape, self.count))), len(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Mean over the copies of the base's log density."""
        dim = value.dim() - len(self.event_shape)
        return self.base.log_prob(value.movedim(dim, 0)).mean(0)

    def expand(
        self, batch_shape: torch.Size | list[int] | tuple[int, ...], _instance: "Copies | None" = None
    ) -> "Copies":
        """The same copies of an expanded base."""
        return Copies(self.base.expand(batch_shape), self.count)

    def _copies_last(self, value: Tensor, samples: int) -> Tensor:
        return value.movedim(samples, samples + len(self.base.batch_shape))


@register_kl(Copies, Copies)
def _kl_of_copies(q: Copies, p: Copies) -> Tensor:
    return kl_divergence(q.base, p.base)


class NoiseMessenger(Messenger):
    """Gives the named sites an independent draw for every example; put it around model *and* guide.

    Usage::

        scope = NoiseMessenger(guide.normal_sites, copies=16)
        TraceMeanField_ELBO().loss_and_grads(scope(model), scope(guide), batch)

    With ``copies`` equal to the rows of the batch every example sees its own coherent draw: unbiased like a shared draw, with
    the lower variance of independent ones.

    Args:
        sites: names of the sites to copy; the others keep one draw.
        copies: draws, which must divide the batch's rows.
    """

    def __init__(self, sites: frozenset[str], copies: int) -> None:
        super().__init__()
        self.sites, self.copies = sites, copies

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.sites and not isinstance(msg["fn"], Copies):
            msg["fn"] = Copies(msg["fn"], self.copies)


class Tokenwise(TorchDistribution):
    """A distribution of weights whose "draw" is noise for every token, with the KL of the weights' distribution.

    Args:
        base: the distribution.
        method: ``"token"`` or ``"flipout"``.
    """

    arg_constraints: ClassVar = {}
    has_rsample = True

    def __init__(self, base: TorchDistribution, method: str) -> None:
        self.base, self.method = base, method
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What stands for a draw, a `LocalWeight`."""
        return local_weight(self.base, self.method)

    def log_prob(self, value: Any) -> Tensor:
        """There is no density, since no weights are drawn.

        Raises:
            ValueError: always; the KL between posterior and prior must have a closed form.
        """
        raise ValueError(
            "Noise for each token draws no weights, so a prior without a closed-form KL cannot be scored. Use a Normal "
            "prior, or noise='example'."
        )


@register_kl(Tokenwise, Tokenwise)
def _kl_of_tokenwise(q: Tokenwise, p: Tokenwise) -> Tensor:
    return kl_divergence(q.base, p.base)


class TokenMessenger(Messenger):
    """Gives the named sites noise of its own for every token; put it around model *and* guide.

    This is no draw from the posterior over weights: every token of a sequence meets other weights. What is maximised is
    ``E[log p(y | noisy activations)] - KL``, and a prediction made so is not the posterior predictive.

    Usage::

        scope = TokenMessenger(frozenset({"q_proj.lora_A"}), "token")
        AnalyticELBO().loss_and_grads(scope(model), scope(guide), batch)

    Args:
        sites: names of the sites; the others keep one draw.
        method: ``"token"``, local reparameterisation, or ``"flipout"``.
    """

    def __init__(self, sites: frozenset[str], method: str) -> None:
        super().__init__()
        self.sites, self.method = sites, method

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.sites and not isinstance(msg["fn"], Tokenwise):
            msg["fn"] = Tokenwise(msg["fn"], self.method)


class TemperMessenger(Messenger):
    """Divides every log density by the number of data and weighs the KL; put it around model *and* guide.

    Turns the ELBO into ``E_q[log p(y|w)] / N - kl_weight * KL / N``, nats per example. Both sides are scaled, since under
    ``TraceMeanField_ELBO`` a scale on the model alone leaves the KL as it was.

    Args:
        num_data: rows of the whole data set.
        kl_weight: weight of the KL; 1 is the true ELBO, less is a cold posterior.
    """

    def __init__(self, num_data: int, kl_weight: float) -> None:
        super().__init__()
        self.num_data, self.kl_weight = num_data, kl_weight

    def _pyro_sample(self, msg: Any) -> None:
        weight = 1.0 if msg["is_observed"] else self.kl_weight
        msg["scale"] = msg["scale"] * (weight / self.num_data)
