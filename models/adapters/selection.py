"""Which attention heads and feed-forward channels of each block a structured sparse adapter trains."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyrolora.models.adapters.targets import LAYER_NUMBER
from pyrolora.models.backbones import Backbone
from pyrolora.models.calibration import calibration_batches
from pyrolora.models.moments import second_moments
from pyrolora.models.tasks import row_count

if TYPE_CHECKING:
    from pyrolora.models.calibration import Calibration

STRATEGIES = ("random", "weight", "activation", "product", "gradient")

# kind of projection -> (unit that is selected, side of the weight on which the units lie)
ROLES = {
    **dict.fromkeys(("o_proj", "out_proj"), ("head", "in")),
    "q_proj": ("head", "out"),
    **dict.fromkeys(("k_proj", "v_proj"), ("group", "out")),
    **dict.fromkeys(("down_proj", "fc2"), ("channel", "in")),
    **dict.fromkeys(("up_proj", "gate_proj", "fc1"), ("channel", "out")),
}


def role_of(path: str) -> tuple[str, str]:
    """The unit (``"head"``, ``"group"`` of key and value heads, ``"channel"``) and the side of a projection.

    Raises:
        ValueError: a projection whose heads or channels are not known.
    """
    kind = path.rsplit(".", 1)[-1]
    if kind not in ROLES:
        raise ValueError(
            f"The projection {path!r} has no known heads or channels. S2FT knows {', '.join(sorted(ROLES))}; "
            "use LoRA for others."
        )
    return ROLES[kind]


@dataclass(frozen=True)
class HeadShape:
    """Sizes of a network's attention, in heads and features."""

    heads: int
    groups: int
    width: int

    @classmethod
    def of(cls, backbone: Backbone) -> "HeadShape":
        """Read them from a backbone's configuration."""
        config = backbone.network.config
        heads = config.num_attention_heads
        groups = getattr(config, "num_key_value_heads", None) or heads
        return cls(heads, groups, getattr(config, "head_dim", None) or config.hidden_size // heads)

    def features(self, units: Tensor) -> Tensor:
        """Positions of the features of some heads, ``(heads,)`` to ``(heads * width,)``."""
        return (units[:, None] * self.width + torch.arange(self.width, device=units.device)).flatten()


@dataclass(frozen=True)
class Selection:
    """A declared choice of units: strategy, direction, seed.

    Attributes:
        strategy: one of `STRATEGIES`.
        largest: take units with the largest scores, else the smallest; random scores have no direction.
        seed: seeds random scores and the choice of calibration rows.
        samples: rows of calibration text.
        calibration: text file or task; None for the model's own training prompts.
    """

    strategy: str
    largest: bool
    seed: int
    samples: int
    calibration: str | None

    def units(
        self,
        backbone: Backbone,
        layers: Sequence[int],
        wanted: Mapping[str, int],
        calibration: "Calibration | None",
    ) -> dict[tuple[str, int], Tensor]:
        """The chosen units of each kind and block, equally many in every block, in ascending order.

        Where groups are wanted beside heads, heads are taken from chosen groups only, so that a coupled structure is whole.

        Args:
            backbone: the frozen network.
            layers: numbers of the blocks.
            wanted: ``"head"``, ``"group"`` or ``"channel"`` -> how many in each block.
            calibration: examples of the model's own task.

        Returns:
            (unit, block) -> positions, int64.
        """
        shape = HeadShape.of(backbone)
        chosen = {}
        closing = _closing_projections(backbone, layers, wanted)
        scores = self._scores(backbone, closing, shape, calibration)
        for layer in layers:
            heads = scores.get(("head", layer))
            if "group" in wanted and heads is not None:
                groups = heads.unflatten(0, (shape.groups, -1))
                best = self._best(groups.sum(1), wanted["group"])
                chosen["group", layer] = best
                outside = torch.ones(shape.groups, dtype=torch.bool)
                outside[best] = False
                barred = torch.inf * (-1 if self.largest else 1)
                heads = torch.where(outside[:, None], barred, groups).flatten()
            if "head" in wanted and heads is not None:
                chosen["head", layer] = self._best(heads, wanted["head"])
            if "channel" in wanted:
                chosen["channel", layer] = self._best(scores["channel", layer], wanted["channel"])
        return chosen

    def _best(self, scores: Tensor, count: int) -> Tensor:
        return scores.topk(count, largest=self.largest).indices.sort().values

    def _scores(
        self,
        backbone: Backbone,
        closing: Mapping[tuple[str, int], str],
        shape: HeadShape,
        calibration: "Calibration | None",
    ) -> dict[tuple[str, int], Tensor]:
        """One score a unit: the root of the summed squares over its features, on the CPU in float64."""
        paths = list(closing.values())
        if self.strategy == "random":
            squares = {
                path: _random(self.seed, key, _linear(backbone, path).in_features) for key, path in closing.items()
            }
        elif self.strategy == "gradient":
            squares = self._gradients(backbone, paths, calibration)
        else:
            weights = {path: _linear(backbone, path).weight.detach().double().square().sum(0) for path in paths}
            squares = weights if self.strategy == "weight" else self._activations(backbone, paths, calibration)
            if self.strategy == "product":
                squares = {path: weights[path] * squares[path].double() for path in paths}
        found = {}
        for (unit, layer), path in closing.items():
            features = squares[path].double().cpu()
            found[unit, layer] = (
                features.unflatten(0, (-1, shape.width)).sum(1) if unit == "head" else features
            ).sqrt()
        return found

    def _activations(
        self, backbone: Backbone, paths: Sequence[str], calibration: "Calibration | None"
    ) -> dict[str, Tensor]:
        batches = calibration_batches(backbone, self.calibration, calibration, self.samples, self.seed)
        return dict(second_moments(backbone, batches, paths, diagonal=True).matrices)

    def _gradients(
        self, backbone: Backbone, paths: Sequence[str], calibration: "Calibration | None"
    ) -> dict[str, Tensor]:
        if calibration is None or self.calibration is not None:
            raise ValueError(
                "Selection by gradient needs the labels of the model's own task. Leave calibration out, or select by "
                "activation."
            )
        weights = {path: _linear(backbone, path).weight for path in paths}
        totals = {path: torch.zeros_like(weight, dtype=backbone.site_dtype) for path, weight in weights.items()}
        try:
            for weight in weights.values():
                weight.requires_grad_(True)
            for batch in calibration.batches(self.samples, self.seed):
                with torch.enable_grad():
                    loss = calibration.loss(batch) * row_count(batch)
                    found = torch.autograd.grad(loss, list(weights.values()))
                for path, gradient in zip(weights, found, strict=True):
                    totals[path] += gradient
        finally:
            for weight in weights.values():
                weight.requires_grad_(False)
        return {path: total.square().sum(0) for path, total in totals.items()}


def _closing_projections(
    backbone: Backbone, layers: Sequence[int], wanted: Mapping[str, int]
) -> dict[tuple[str, int], str]:
    """The projection whose input features are the units, by (unit, block): what a structure feeds onwards."""
    units = {"head" if unit == "group" else unit for unit in wanted}
    found = {}
    for path, module in backbone.network.named_modules():
        number = LAYER_NUMBER.search(path)
        if number is None or int(number[1]) not in layers or not isinstance(module, nn.Linear):
            continue
        role = ROLES.get(path.rsplit(".", 1)[-1])
        if role is not None and role[1] == "in" and role[0] in units:
            found[role[0], int(number[1])] = path
    return found


def _linear(backbone: Backbone, path: str) -> Any:
    return backbone.network.get_submodule(path)


def _random(seed: int, key: tuple[str, int], width: int) -> Tensor:
    # a generator for each unit and block: the choice in one block does not depend on which others are adapted
    digest = hashlib.sha256(f"{seed}:{key[0]}:{key[1]}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(width, generator=generator, dtype=torch.float64)
