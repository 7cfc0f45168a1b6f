"""Selection of projections by name, as PEFT users write it."""

import re
from collections.abc import Sequence

from torch import nn

from pyrolora.models.backbones import Backbone
from pyrolora.models.naming import nearest

LAYER_NUMBER = re.compile(r"\.(\d+)\.")


def find_projections(
    backbone: Backbone, targets: Sequence[str] | str, layers: Sequence[int] | None
) -> dict[str, list[tuple[int, str, nn.Linear]]]:
    """Linear projections inside the blocks, by kind: ``find_projections(backbone, ["q_proj"], None)["q_proj"]``.

    Projections of one kind whose shapes differ form a kind for each shape, named like ``q_proj_576x192`` (in x out).

    Args:
        backbone: the network to search.
        targets: last parts of module names, or one regular expression that must match the whole path, or
            ``"all-linear"``, as PEFT's ``target_modules``.
        layers: numbers of the blocks to adapt; negative ones count from the last; None for all.

    Returns:
        kind -> list of (block number, module path, module), by block.

    Raises:
        ValueError: a target or a block number that the network does not have, no target, or a bad regular expression.
    """
    if not targets:
        raise ValueError('No projection is selected: targets is empty. Name some, such as ["q_proj", "v_proj"].')
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise ValueError(
                f"The target {targets!r} is no regular expression: {error}. Give one that matches whole module paths, "
                'a list of names such as ["q_proj"], or "all-linear".'
            ) from error
    found: list[tuple[str, int, str, nn.Linear]] = []
    available: dict[str, str] = {}
    for path, module in backbone.network.named_modules():
        number = LAYER_NUMBER.search(path)
        if number is None:
            continue
        kind = path.rsplit(".", 1)[-1]
        available[kind] = type(module).__name__
        if isinstance(module, nn.Linear) and _selected(path, kind, targets):
            found.append((kind, int(number[1]), path, module))
    wanted = [targets] if isinstance(targets, str) else list(targets)
    if isinstance(targets, str) and not found and targets in available:
        raise ValueError(
            f"The target {targets!r} is one string, and so a regular expression that must match the whole module path, "
            f"as in PEFT; none of {backbone.name} matches. To name projections, give a list: [{targets!r}]."
        )
    linear = sorted(kind for kind, name in available.items() if name == "Linear")
    for target in wanted:
        if isinstance(targets, str) and found:
            break
        if target not in {kind for kind, *_ in found}:
            reason = (
                f"is a {available[target]}, and only nn.Linear can be adapted"
                if target in available
                else "does not exist in its blocks"
            )
            raise ValueError(
                f"The projection {target!r} of {backbone.name} {reason}. Did you mean {nearest(target, linear)!r}? "
                f"Projections: {', '.join(linear)}."
            )
    kept = _chosen_layers(backbone, layers)
    kinds: dict[str, list[tuple[int, str, nn.Linear]]] = {}
    shapes = {kind: {tuple(m.weight.shape) for k, _, _, m in found if k == kind} for kind, *_ in found}
    for kind, number_, path, module in sorted(found, key=lambda item: item[1]):
        if number_ in kept:
            out_features, in_features = module.weight.shape
            name = kind if len(shapes[kind]) == 1 else f"{kind}_{in_features}x{out_features}"
            kinds.setdefault(name, []).append((number_, path, module))
    return kinds


def _selected(path: str, kind: str, targets: Sequence[str] | str) -> bool:
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, path) is not None
    return kind in targets


def _chosen_layers(backbone: Backbone, layers: Sequence[int] | None) -> set[int]:
    count = len(backbone.blocks)
    if layers is None:
        return set(range(count))
    for layer in layers:
        if not -count <= layer < count:
            raise ValueError(
                f"{backbone.name} has no block {layer}; its blocks are 0 to {count - 1}, or -{count} to -1 from the end."
            )
    if not layers:
        raise ValueError(f"No block is selected: layers is empty. Leave it out to adapt all {count} blocks.")
    return {layer % count for layer in layers}
