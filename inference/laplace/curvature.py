"""Per-example gradients of the logits, and the generalised Gauss-Newton matrix made of them."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from pyrolora.models.program import BayesianModel


class LogitGradients:
    """Gradients of a batch's logits with respect to the sites, one example at a time but all examples at once.

    Every example gets its own copy of the estimate through the adapter's draw dimension, so one backward pass returns the
    gradients of all examples separately: one forward and ``classes`` backwards for a batch.

    Args:
        model: the model.
        estimate: site name -> value at which to linearise.
        names: sites to differentiate with respect to.
    """

    def __init__(self, model: BayesianModel, estimate: Mapping[str, Tensor], names: Sequence[str]) -> None:
        self.model, self.names = model, tuple(names)
        self.estimate = {name: value.detach() for name, value in estimate.items()}

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Logits ``(rows, classes)`` and the copies ``(rows, *site.shape)`` that they depend on."""
        rows = batch["input_ids"].shape[0]
        copies = [
            self.estimate[name].expand(rows, *self.estimate[name].shape).clone().requires_grad_() for name in self.names
        ]
        draw = {**self.estimate, **dict(zip(self.names, copies, strict=True))}
        with torch.enable_grad():
            logits = self.model.row_logits(batch, draw)
        return logits, copies

    def weighted(self, batch: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """For each column s of the square root of the likelihood's Hessian, the gradients of ``logits . s``.

        The Hessian of the categorical negative log-likelihood in the logits is ``diag(p) - p p'``, and its square root has
        the columns ``sqrt(p_c) (e_c - p)``; the squares of what is yielded sum to the generalised Gauss-Newton diagonal.

        Shape:
            site name -> ``(rows, *site.shape)``, once for each class
        """
        logits, copies = self.forward(batch)
        probs = logits.detach().softmax(-1)
        classes = probs.shape[-1]
        identity = torch.eye(classes, dtype=probs.dtype, device=probs.device)
        for index in range(classes):
            column = probs[:, index, None].sqrt() * (identity[index] - probs)
            yield self._backward(logits, column, copies, last=index == classes - 1)
        self.model.release()

    def jacobian(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits and their Jacobian.

        Shape:
            ``(rows, classes)`` and site name -> ``(classes, rows, *site.shape)``
        """
        logits, copies = self.forward(batch)
        classes = logits.shape[-1]
        identity = torch.eye(classes, dtype=logits.dtype, device=logits.device)
        gradients = [
            self._backward(logits, identity[index].expand_as(logits), copies, last=index == classes - 1)
            for index in range(classes)
        ]
        self.model.release()
        stacked = {name: torch.stack([gradient[name] for gradient in gradients]) for name in self.names}
        return logits.detach(), stacked

    def _backward(self, logits: Tensor, cotangent: Tensor, copies: list[Tensor], last: bool) -> dict[str, Tensor]:
        # minus infinity marks options that a row lacks: they take no part
        cotangent = torch.where(logits.isfinite(), cotangent, 0)
        found = torch.autograd.grad(logits, copies, cotangent, retain_graph=not last)
        return dict(zip(self.names, found, strict=True))


def diagonal_curvature(gradients: LogitGradients, batches: Iterator[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Diagonal of the generalised Gauss-Newton matrix, summed over the data, of each site's shape."""
    total: dict[str, Tensor] = {}
    for batch in batches:
        for columns in gradients.weighted(batch):
            for name, value in columns.items():
                squares = value.square().sum(0)
                total[name] = squares if name not in total else total[name] + squares
    return total


def full_curvature(gradients: LogitGradients, batches: Iterator[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Generalised Gauss-Newton matrix of each site by itself, summed over the data, ``(weights, weights)``."""
    total: dict[str, Tensor] = {}
    for batch in batches:
        for columns in gradients.weighted(batch):
            for name, value in columns.items():
                flat = value.flatten(1)
                product = flat.mT @ flat
                total[name] = product if name not in total else total[name] + product
    return total
