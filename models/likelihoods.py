"""The observation site: class labels given logits, in one data plate that carries the size of the whole data set."""

import pyro
import pyro.distributions as dist
from pyro.distributions import TorchDistribution
from torch import Tensor

# name of the observation, and of the factor that counts against attacked rows
LABEL, ADVERSARIAL = "label", "adversarial"
OBSERVED = (LABEL, ADVERSARIAL)


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
