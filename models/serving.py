"""Adapters merged into weights and taken out again, and several adapters on one network in one batch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyrolora.models.backbones import Backbone, Delta
from pyrolora.models.naming import nearest

if TYPE_CHECKING:
    from pyrolora.models.program import BayesianModel


@torch.no_grad()
def weight_change(delta: Delta, weight: Tensor) -> Tensor:
    """The matrix by which a linear delta changes a weight: the delta of the identity.

    Args:
        delta: function of the projection's input.
        weight: the frozen weight, for its shape and device.

    Shape:
        weight and result ``(out, in)``
    """
    return weight_changes(delta, weight, 1)[0]


def weight_changes(delta: Delta, weight: Tensor, runs: int) -> Tensor:
    """`weight_change` of a delta that differs between equal runs of rows, such as draws or gates, for each of them.

    Args:
        delta: function of the projection's input.
        weight: the frozen weight, for its shape and device.
        runs: number of runs.

    Shape:
        weight ``(out, in)``; returns ``(runs, out, in)``
    """
    eye = torch.eye(weight.shape[1], dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
    return delta(eye.expand(runs, -1, -1)).mT


@contextmanager
def merged(
    model: "BayesianModel",
    draw: Mapping[str, Tensor],
    batch: Mapping[str, Tensor] | None = None,
    *,
    finish: Callable[[str, Tensor], Tensor] | None = None,
) -> Iterator[Any]:
    """The network with one draw merged into its weights; afterwards every weight is bit by bit what it was.

    Usage::

        with merged(posterior.model, posterior.mean()) as network:
            network.save_pretrained("runs/merged")

    Merged, a draw costs nothing at run time; the weights of adapted projections are kept aside meanwhile. A change of the
    label rows (`LastLayer`, `LabelLoRA`) is no weight of the network and is not merged.

    Args:
        model: the model.
        draw: site name -> value of the site's shape.
        batch: one row of what gates read, for an adapter with a gate for each row; the merged network is for that row.
        finish: function of a module's path and its merged weight that returns the weight to use, such as
            `pyrolora.models.trimming.Trim.of`; None for the weight itself.

    Raises:
        ValueError: an adapter that changes more than projections, gates for no row or for several, or a gate of an output.
    """
    network = model.backbone.network
    kept: dict[str, Tensor] = {}
    model.release()
    _refuse_gates(model, draw, batch)
    try:
        for path, delta in model.deltas(draw, batch).items():
            module: Any = network.get_submodule(path)
            if not isinstance(module, torch.nn.Linear):
                raise ValueError(f"{path} is a {type(module).__name__}, and only nn.Linear can be merged into.")
            change = weight_change(delta, module.weight)
            kept[path] = module.weight.detach().clone()
            with torch.no_grad():
                # added in the sites' type, so that the weight is rounded once
                weight = module.weight.to(change.dtype) + change
                module.weight.copy_(weight if finish is None else finish(path, weight))
        yield network
    finally:
        with torch.no_grad():
            for path, weight in kept.items():
                module = network.get_submodule(path)
                module.weight.copy_(weight)


class Served:
    """Several fitted models of one backbone, switched without copying it and served in one batch.

    Usage::

        served = Served({"news": news.model, "tweets": tweets.model}, {"news": news.mean(), "tweets": tweets.mean()})
        with served.rows(["news", "news", "tweets"]):
            hidden = backbone.hidden_states(batch)              # three rows, two adapters

    Rows of one adapter must stand together. A batch costs, for each adapter in it, that adapter's own products; the
    backbone runs once.

    Args:
        models: name -> model; all on one backbone.
        draws: name -> draw of that model's sites.

    Raises:
        ValueError: no model, other names in draws than in models, or models on different backbones.
    """

    def __init__(self, models: Mapping[str, "BayesianModel"], draws: Mapping[str, Mapping[str, Tensor]]) -> None:
        if not models or models.keys() != draws.keys():
            raise ValueError(
                f"Models ({', '.join(models) or 'none'}) and draws ({', '.join(draws) or 'none'}) must pair."
            )
        backbones = {id(model.backbone): model.backbone for model in models.values()}
        if len(backbones) > 1:
            raise ValueError(
                "The models are on different backbones; build them on one, so that it is in memory once: "
                f"{', '.join(backbone.name for backbone in backbones.values())}."
            )
        (self.backbone,) = backbones.values()
        self.by_position = all(adapter.by_position for model in models.values() for adapter in model.adapters)
        for name, model in models.items():
            _refuse_gates(model, draws[name])
        self.deltas = {name: model.deltas(draws[name]) for name, model in models.items()}

    @contextmanager
    def rows(self, names: Sequence[str]) -> Iterator[Backbone]:
        """Bind each row of the batches that follow to the adapter of its name; None binds a row to no adapter.

        Raises:
            ValueError: an unknown name, or rows of one adapter that do not stand together.
        """
        runs = _runs(names)
        for name in runs:
            if name is not None and name not in self.deltas:
                raise ValueError(f"No adapter {name!r}. Did you mean {nearest(name, self.deltas)!r}?")
        paths = dict.fromkeys(path for name in runs if name is not None for path in self.deltas[name])
        self.backbone.bind({path: self._routed(path, runs) for path in paths}, by_position=self.by_position)
        try:
            yield self.backbone
        finally:
            self.backbone.release()

    def _routed(self, path: str, runs: Mapping[str | None, int]) -> Delta:
        width = self.backbone.network.get_submodule(path).weight.shape[0]

        def delta(rows: Tensor) -> Tensor:
            parts = []
            for name, part in zip(runs, rows.split(list(runs.values())), strict=True):
                own = None if name is None else self.deltas[name].get(path)
                parts.append(part.new_zeros(*part.shape[:-1], width) if own is None else own(part))
            return torch.cat(parts)

        return delta


def _refuse_gates(
    model: "BayesianModel", draw: Mapping[str, Tensor], batch: Mapping[str, Tensor] | None = None
) -> None:
    if gated := sorted(model.gates(draw, batch)):
        raise ValueError(
            f"The output of {gated[0]} goes through a gate that reads each token, which no weight can hold. Merge or serve "
            "it once the gate has faded, or leave the adapter as it is."
        )


def _runs(names: Sequence[str | None]) -> dict[str | None, int]:
    """Length of each run of equal names."""
    runs: dict[str | None, int] = {}
    last: Any = object()
    for name in names:
        if name != last and name in runs:
            raise ValueError(f"Rows of {name!r} do not stand together; sort the batch by adapter.")
        runs[name] = runs.get(name, 0) + 1
        last = name
    return runs
