"""Predictions with noise for every token, as released BLoB code makes them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyrolora.guides.base import Guide, SeededBy
from pyrolora.guides.local import local_weight
from pyrolora.inference.noise import TOKEN_SCOPES
from pyrolora.inference.predictive import ROWS_AT_ONCE
from pyrolora.models.program import BayesianModel
from pyrolora.models.tasks import row_count


def token_methods(guide: Guide, model: BayesianModel) -> tuple[str, ...]:
    """The token scopes that every random site of the network allows."""
    random = {name: factor for name, factor in guide.items() if name in model.adapter_sites and _is_random(factor)}
    if not all(model.adapter_sites[name].linear for name in random):
        return ()

    def allows(method: str) -> bool:
        try:
            return bool([local_weight(factor.distribution(), method) for factor in random.values()])
        except ValueError:
            return False

    return tuple(method for method in TOKEN_SCOPES if allows(method))


class TokenNoise:
    """Class probabilities under noise for every token; not a posterior predictive, since no weights are drawn.

    Args:
        model: the model.
        guide: the posterior.
        method: ``"token"`` or ``"flipout"``.
        draws: passes for each row.
        generator: seeds the noise.
    """

    def __init__(
        self, model: BayesianModel, guide: Guide, method: str, draws: int, generator: torch.Generator | None
    ) -> None:
        self.model, self.draws = model, draws
        self.draw: dict[str, Any] = {
            name: local_weight(factor.distribution(), method)
            if name in model.adapter_sites and _is_random(factor)
            else factor.mean().detach()
            for name, factor in guide.items()
        }
        # Flipout shares one perturbation within a pass, so its passes are made one by one
        self.rows_at_once = ROWS_AT_ONCE if method == "token" else 1
        self.seeds = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Class probabilities, ``(draws, rows, classes)``."""
        rows = row_count(batch)
        at_once = max(1, self.rows_at_once // rows)
        device = self.model.backbone.device
        chunks = []
        with SeededBy(self.seeds, [device] if device.type == "cuda" else []):
            for first in range(0, self.draws, at_once):
                count = min(at_once, self.draws - first)
                logits = self.model.row_logits(self.model.repeated(batch, count), self.draw, local=True)
                chunks.append(logits.unflatten(0, (count, rows)).softmax(-1))
        return torch.cat(chunks)


def _is_random(factor: Any) -> bool:
    return "scale" in factor.roles.values()
