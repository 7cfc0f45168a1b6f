"""Gradients of the logits as pairs of activations and output gradients, never as weights of every example."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrolora.models.adapters.base import LinearTape
from pyrolora.models.program import BayesianModel
from pyrolora.models.sites import Site

# elements of output gradients alive at once (float32: 256 MB)
GRADIENT_ELEMENTS = 2**26

Cotangents = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Product:
    """One linear map of a batch: what went in, and the gradients of what came out.

    The gradient of the map's weights for row n and column c is ``sum_t gradients[c, n, t] inputs[n, t]'``.

    Attributes:
        inputs: ``(rows, tokens, in)``, zero at padding.
        gradients: ``(columns, rows, tokens, out)``.
        tokens: number of tokens that are not padding, in all rows.
    """

    inputs: Tensor
    gradients: Tensor
    tokens: int

    def weights(self) -> Tensor:
        """Gradients of the weights, row by row, ``(columns, rows, out, in)``."""
        columns = self.gradients.shape[0]
        inputs = self.inputs.expand(columns, *self.inputs.shape)
        return self.gradients.mT @ inputs


def site_jacobian(products: list[Product], site: Site) -> Tensor:
    """Gradients of a site's weights, row by row, from the products of its entries.

    Shape:
        ``(columns, rows, *site.shape)``
    """
    if not site.modules:
        return products[0].weights()
    return torch.stack([product.weights() for product in products], dim=2)


def each_logit(logits: Tensor) -> Tensor:
    """Unit cotangents: one column a class, so that the gradients are the Jacobian, ``(classes, rows, classes)``."""
    identity = torch.eye(logits.shape[-1], dtype=logits.dtype, device=logits.device)
    return identity[:, None].expand(-1, logits.shape[0], -1)


def hessian_root(logits: Tensor) -> Tensor:
    """Columns of the square root of the categorical likelihood's Hessian, ``(classes, rows, classes)``.

    The Hessian in the logits is ``diag(p) - p p'``; its root has the columns ``sqrt(p_c) (e_c - p)``. It is also the exact
    Fisher information, so no labels are sampled.
    """
    probs = logits.softmax(-1)
    identity = torch.eye(probs.shape[-1], dtype=probs.dtype, device=probs.device)
    return (probs.sqrt()[..., None] * (identity - probs[:, None])).transpose(0, 1)


class LogitGradients:
    """One forward and one backward a column for a whole batch, at a fixed estimate.

    Args:
        model: the model.
        estimate: site name -> value at which to linearise.
        names: sites to differentiate with respect to; every entry must be the weight of a linear map.
    """

    def __init__(self, model: BayesianModel, estimate: Mapping[str, Tensor], names: Sequence[str]) -> None:
        self.model, self.names = model, tuple(names)
        # gradients of the outputs are wanted, not of the weights; but without any leaf there would be no graph
        self.estimate = {
            name: value.detach().clone().requires_grad_(name in self.names) for name, value in estimate.items()
        }

    def products(self, batch: Mapping[str, Tensor], cotangents: Cotangents) -> tuple[Tensor, dict[str, list[Product]]]:
        """Logits of a batch, and a `Product` for every entry of every site.

        Args:
            batch: a batch; rows of padding tokens contribute nothing.
            cotangents: from the logits to the columns, such as `each_logit` or `hessian_root`.

        Shape:
            logits ``(rows, classes)``

        Raises:
            ValueError: a site whose values are not weights of linear maps.
        """
        with torch.enable_grad(), LinearTape() as tape:
            logits = self.model.row_logits(batch, self.estimate)
        taped = {name: [tape.products[name][i] for i in sorted(tape.products[name])] for name in self._taped(tape)}
        outputs = [output for entries in taped.values() for _, output in entries]
        columns = cotangents(logits.detach())
        # minus infinity marks options that a row lacks: they take no part
        columns = torch.where(logits.isfinite(), columns, 0)
        found: list[list[Tensor]] = [[] for _ in outputs]
        for index, column in enumerate(columns):
            last = index == len(columns) - 1
            for kept, gradient in zip(
                found, torch.autograd.grad(logits, outputs, column, retain_graph=not last), strict=True
            ):
                kept.append(gradient)
        self.model.release()
        mask = batch["attention_mask"].to(logits.device)
        gradients = iter(found)
        return logits.detach(), {
            name: [_product(rows, torch.stack(next(gradients)), mask) for rows, _ in entries]
            for name, entries in taped.items()
        }

    def _taped(self, tape: LinearTape) -> tuple[str, ...]:
        for name in self.names:
            if name not in tape.products:
                raise ValueError(
                    f"The site {name!r} is not a stack of weights of linear maps, which Laplace's curvature needs. Leave it "
                    "out with sites=, and it stays at the estimate."
                )
        return self.names

    def rows_at_once(self, batch: Mapping[str, Tensor]) -> int:
        """Rows of a batch whose output gradients, and Jacobian of one site, fit the memory set aside for them."""
        tokens = batch["input_ids"].shape[1]
        classes = self.model.classes or batch["option_mask"].shape[1]
        sites = [self.model.adapter_sites[name] for name in self.names]
        width = sum(len(site.modules) * tokens * site.shape[-2] if site.modules else site.shape[-2] for site in sites)
        width = max(width, *(site.numel for site in sites))
        return max(1, GRADIENT_ELEMENTS // (classes * width))


def _product(rows: Tensor, gradients: Tensor, mask: Tensor) -> Product:
    if rows.shape[1] == 1:
        # a head sees one position a row
        return Product(rows, gradients, rows.shape[0])
    return Product(rows * mask[..., None], gradients, int(mask.sum()))


def split_batch(batch: Mapping[str, Tensor], rows: int) -> list[dict[str, Tensor]]:
    """A batch in parts of at most ``rows`` rows."""
    total = batch["input_ids"].shape[0]
    return [{key: value[i : i + rows] for key, value in batch.items()} for i in range(0, total, rows)]
