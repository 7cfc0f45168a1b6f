"""Coupled permutations of heads and channels, under which a network computes what it computed before."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyrolora.models.adapters.selection import ROLES, HeadShape
from pyrolora.models.adapters.targets import LAYER_NUMBER
from pyrolora.models.backbones import Backbone


@torch.no_grad()
def permute(backbone: Backbone, heads: Mapping[int, Tensor], channels: Mapping[int, Tensor]) -> None:
    """Reorder attention heads and feed-forward channels of some blocks in place, with everything that is coupled to them.

    Columns of o and down, rows of q, k, v, up and gate and their biases move together, so the network's function stays and
    chosen units can stand side by side (contiguous slices, or weights as other tools expect them). `S2FT` needs none of
    this. Give a copy of a backbone that others share.

    Usage::

        permute(own_copy, heads={}, channels={3: torch.cat([chosen, the_others])})

    Source: Yang et al., "S2FT", 2024, section 3.1; grouped key and value heads are moved whole.

    Args:
        backbone: its weights are changed.
        heads: block -> order of the query heads, first the one that comes first.
        channels: block -> order of the feed-forward channels.

    Raises:
        ValueError: an order that is no permutation, or one that tears query heads of one key and value head apart.
    """
    shape = HeadShape.of(backbone)
    orders: dict[tuple[str, int], Tensor] = {}
    for layer, order in heads.items():
        _check(order, shape.heads, f"heads of block {layer}")
        groups = order.unflatten(0, (shape.groups, -1)) // (shape.heads // shape.groups)
        if (groups != groups[:, :1]).any():
            raise ValueError(
                f"The order of heads of block {layer}, {order.tolist()}, tears heads apart that share a key and value head. "
                f"Keep runs of {shape.heads // shape.groups} together."
            )
        orders["head", layer] = shape.features(order)
        orders["group", layer] = shape.features(groups[:, 0])
    for path, module in backbone.network.named_modules():
        number = LAYER_NUMBER.search(path)
        role = ROLES.get(path.rsplit(".", 1)[-1])
        if number is None or role is None or not isinstance(module, torch.nn.Linear):
            continue
        unit, side = role
        layer = int(number[1])
        if unit == "channel" and layer in channels:
            size = module.in_features if side == "in" else module.out_features
            _check(channels[layer], size, f"channels of block {layer}")
            orders.setdefault((unit, layer), channels[layer])
        if (unit, layer) in orders:
            _reorder(module, orders[unit, layer].to(module.weight.device), side)


def _reorder(module: Any, order: Tensor, side: str) -> None:
    module.weight.copy_(module.weight.index_select(1 if side == "in" else 0, order))
    # a bias belongs to outputs; columns have none
    if side == "out" and module.bias is not None:
        module.bias.copy_(module.bias[order])


def _check(order: Tensor, size: int, what: str) -> None:
    if sorted(order.tolist()) != list(range(size)):
        raise ValueError(f"The order of the {what} is no permutation of 0 to {size - 1}: {order.tolist()[:10]}.")
