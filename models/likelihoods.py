"""The observation site: class labels given logits, in one data plate that carries the size of the whole data set."""

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

# name of the observation, and of the factor that counts against attacked rows
LABEL, ADVERSARIAL = "label", "adversarial"


def observe_labels(
    logits: Tensor, labels: Tensor | None, index: Tensor | None, num_data: int, penalty: Tensor | None = None
) -> Tensor:
    """Sample or observe ``label ~ Categorical(logits)`` for a mini-batch of a data set of ``num_data`` rows.

    The plate scales the mini-batch's log-likelihood by ``num_data / rows``, so the program's ELBO is that of the whole
    data set (in nats) whatever the batch size.

    Args:
        logits: class logits; minus infinity for classes that a row does not have.
        labels: observed classes, or None to sample them.
        index: positions of the rows in the data set.
        num_data: rows in the data set.
        penalty: what each row counts against the draw beside its label, nats; the posterior is then a Gibbs posterior.

    Shape:
        logits ``(rows, classes)``; labels, index and penalty ``(rows,)``; returns ``(rows,)``.
    """
    # -inf logits are legal here and fail torch's argument check, which would also cost a pass a step
    return observe(dist.Categorical(logits=logits, validate_args=False), labels, index, num_data, penalty)


def observe(
    likelihood: TorchDistribution,
    labels: Tensor | None,
    index: Tensor | None,
    num_data: int,
    penalty: Tensor | None = None,
) -> Tensor:
    """Sample or observe ``label`` under any likelihood with one batch entry an example; see `observe_labels`."""
    rows = likelihood.batch_shape[0]
    with pyro.plate("data", size=max(num_data, rows), subsample_size=rows, subsample=index, dim=-1):
        if penalty is not None:
            pyro.factor(ADVERSARIAL, -penalty)
        return pyro.sample(LABEL, likelihood, obs=labels)


def mixed_logits(logits: Tensor, mixing: Tensor) -> Tensor:
    """Log class probabilities of rows whose discrete latent is summed out: ``log sum_k exp(mixing_k) softmax(logits_k)``.

    What Pyro's ``TraceEnum_ELBO`` computes for a latent with ``infer={"enumerate": "parallel"}``, so that every engine and
    every prediction has it.

    Args:
        logits: class logits of each row under each value; minus infinity for classes that a row does not have.
        mixing: log probability of each value.

    Shape:
        logits ``(rows * values, classes)``, the values of a row in a run; mixing ``(rows, values)``; returns ``(rows,
        classes)``, normalised.
    """
    log_probs = logits.log_softmax(-1).unflatten(0, tuple(mixing.shape))
    missing = log_probs.isneginf()
    # the gradient of a sum of zeros' logarithms is no number
    whole = (log_probs.masked_fill(missing, 0.0) + mixing[..., None]).logsumexp(1)
    return whole.masked_fill(missing.all(1), -torch.inf)
