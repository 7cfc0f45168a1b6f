"""Gradients of the logits as pairs of activations and output gradients, never as weights of every example."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrolora.models.adapters.base import LinearTape
from pyrolora.models.program import BayesianModel
from pyrolora.models.sites import Site
from pyrolora.models.tasks import row_count

# elements of Jacobians alive at once (float32: 256 MB)
JACOBIAN_ELEMENTS = 2**26

Cotangents = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Product:
    """One linear map of a batch: what went in, and the gradient of what came out.

    The gradient of the map's weights for row n is ``sum_t gradients[n, t] inputs[n, t]'``.

    Attributes:
        inputs: ``(rows, tokens, in)``, zero at padding.
        gradients: ``(rows, tokens, out)``.
        tokens: number of tokens that are not padding, in all rows.
    """

    inputs: Tensor
    gradients: Tensor
    tokens: int

    def weights(self) -> Tensor:
        """Gradients of the weights, row by row, ``(rows, out, in)``."""
        return self.gradients.mT @ self.inputs


Products = dict[str, list[Product]]


def site_gradient(products: list[Product], site: Site) -> Tensor:
    """Gradients of a site's weights, row by row, from the products of its entries, ``(rows, *site.shape)``."""
    if not site.modules:
        return products[0].weights()
    return torch.stack([product.weights() for product in products], dim=1)


def each_logit(logits: Tensor) -> Tensor:
    """Unit cotangents: one column a class, so that the gradients are the Jacobian, ``(classes, rows, classes)``."""
    identity = torch.eye(logits.shape[-1], dtype=logits.dtype, device=logits.device)
    return identity[:, None].expand(-1, logits.shape[0], -1)


def each_contrast(logits: Tensor) -> Tensor:
    """Differences to the first class, all that a softmax sees, ``(classes - 1, rows, classes)``."""
    columns = each_logit(logits)[1:].clone()
    columns[..., 0] = -1
    return columns


def hessian_root(logits: Tensor) -> Tensor:
    """Columns of a square root of the categorical likelihood's Hessian, ``(classes - 1, rows, classes)``.

    The Hessian in the logits is ``diag(p) - p p' = D (I - s s') D`` with ``s = sqrt(p)`` and ``D = diag(s)``: the unit vector
    s is no direction of it, and the reflection that takes s to a coordinate axis has a basis of all others as its columns. It
    is also the exact Fisher information, so no labels are sampled.
    """
    root = logits.softmax(-1).sqrt()
    axis = torch.zeros_like(root)
    axis[:, 0] = 1
    # the sum of two vectors without negative entries cannot cancel
    normal = root + axis
    identity = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device)
    reflection = identity - 2 * normal[:, :, None] * normal[:, None] / normal.square().sum(-1)[:, None, None]
    return (root[:, :, None] * reflection[..., 1:]).permute(2, 0, 1)


class LogitGradients:
    """One forward and one backward a column for a whole batch, at a fixed estimate.

    Args:
        model: the model.
        estimate: site name -> value at which to linearise.
        names: sites to differentiate with respect to.

    Raises:
        ValueError: a site whose entries are not the weights of linear maps.
    """

    def __init__(self, model: BayesianModel, estimate: Mapping[str, Tensor], names: Sequence[str]) -> None:
        require_linear(model, names)
        self.model, self.names = model, tuple(names)
        # gradients of the outputs are wanted, not of the weights; but without any leaf there would be no graph
        self.estimate = {
            name: value.detach().clone().requires_grad_(name in self.names) for name, value in estimate.items()
        }

    def columns(self, batch: Mapping[str, Tensor], cotangents: Cotangents) -> tuple[Tensor, Iterator[Products]]:
        """Logits of a batch, and for every column a `Product` for every entry of every site.

        The activations are kept until the last column has been taken.

        Args:
            batch: a batch; rows of padding tokens contribute nothing.
            cotangents: from the logits to the columns, such as `each_logit` or `hessian_root`.

        Shape:
            logits ``(rows, classes)``
        """
        with torch.enable_grad(), LinearTape() as tape:
            logits = self.model.row_logits(batch, self.estimate)
        columns = cotangents(logits.detach())
        # minus infinity marks options that a row lacks: they take no part
        columns = torch.where(logits.isfinite(), columns, 0)
        mask = self.model.backbone.token_mask(batch).to(logits.device)
        return logits.detach(), self._backwards(logits, columns, tape, mask)

    def _backwards(self, logits: Tensor, columns: Tensor, tape: LinearTape, mask: Tensor) -> Iterator[Products]:
        places = [(name, entry) for name in self.names for entry in sorted(tape.products[name])]
        taped = [tape.products[name][entry] for name, entry in places]
        tokens, inputs = int(mask.sum()), _masked([rows for rows, _ in taped], mask, logits.dtype)
        for index, column in enumerate(columns):
            last = index == len(columns) - 1
            gradients = torch.autograd.grad(logits, [output for _, output in taped], column, retain_graph=not last)
            found: Products = {name: [] for name in self.names}
            for (name, _), rows, gradient in zip(places, inputs, gradients, strict=True):
                # a product in half precision has such a gradient; a head sees one position a row
                found[name].append(
                    Product(rows, gradient.to(rows.dtype), tokens if rows.shape[1] > 1 else rows.shape[0])
                )
            yield found
        self.model.release()

    def jacobians(self, batch: Mapping[str, Tensor], cotangents: Cotangents) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits of a batch, and gradients of every site's weights, row by row.

        Shape:
            logits ``(rows, classes)``; site name -> ``(columns, rows, *site.shape)``
        """
        logits, columns = self.columns(batch, cotangents)
        found: dict[str, list[Tensor]] = {name: [] for name in self.names}
        for products in columns:
            for name in self.names:
                found[name].append(site_gradient(products[name], self.model.adapter_sites[name]))
        return logits, {name: torch.stack(parts) for name, parts in found.items()}

    def rows_at_once(self, batch: Mapping[str, Tensor]) -> int:
        """Rows of a batch whose Jacobians fit the memory set aside for them."""
        classes = self.model.classes or batch["option_mask"].shape[1]
        weights = sum(self.model.adapter_sites[name].numel for name in self.names)
        return max(1, JACOBIAN_ELEMENTS // (classes * weights))


def _masked(inputs: list[Tensor], mask: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Inputs with zeros at padding; one tensor that went into several maps stays one."""
    made: dict[int, Tensor] = {}
    for rows in inputs:
        if id(rows) not in made:
            made[id(rows)] = (rows * mask[..., None] if rows.shape[1] > 1 else rows).to(dtype)
    return [made[id(rows)] for rows in inputs]


def require_linear(model: BayesianModel, names: Iterable[str]) -> None:
    """Refuse sites whose entries are not the weights of linear maps.

    Raises:
        ValueError: the first such site.
    """
    for name in names:
        if not model.adapter_sites[name].linear:
            raise ValueError(
                f"The site {name!r} is not a stack of weights of linear maps between a row and its logits, which curvature, "
                "linearised predictions and noise for each token need. Leave it out with Laplace(sites=...) or give it "
                "Point(), and it stays a point; in episodes no site is, since a query's logits depend on its whole episode, "
                "and none beside gate='categorical', whose rows go through a network for every expert."
            )


def split_batch(batch: Mapping[str, Tensor], rows: int) -> list[dict[str, Tensor]]:
    """A batch in parts of at most ``rows`` rows; what is one for all rows, such as how far training is, goes with each."""
    total = row_count(batch)
    return [
        {key: value[i : i + rows] if value.dim() else value for key, value in batch.items()}
        for i in range(0, total, rows)
    ]
