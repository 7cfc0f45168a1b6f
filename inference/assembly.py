"""What a fit is made of before its first step, found from engine and model alone."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyrolora.guides import build_guide
from pyrolora.guides.base import Guide
from pyrolora.guides.local import local_weight
from pyrolora.inference.logit_gradients import require_linear
from pyrolora.inference.natural_widths import NaturalWidths
from pyrolora.inference.noise import TOKEN_SCOPES
from pyrolora.inference.schedules import BlockPlan
from pyrolora.models.prior_declarations import Flat
from pyrolora.models.program import BayesianModel

if TYPE_CHECKING:
    from pyrolora.inference.svi import SVI

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Assembly:
    """The parts of one fit that need no data but their number.

    Attributes:
        guide: the guide at its start.
        plan: the engine's schedule for the model's blocks; None without one.
        widths: what sets the standard deviations; None where they have a learning rate.
        noisy_sites: sites whose draws the engine's noise is about.
    """

    guide: Guide
    plan: BlockPlan | None
    widths: NaturalWidths | None
    noisy_sites: frozenset[str]


def assemble(
    engine: "SVI", model: BayesianModel, num_data: int, *, seed: int, start: Mapping[str, Tensor] | None = None
) -> Assembly:
    """Make the parts, or refuse what does not fit together: ``assemble(SVI(), model, num_data=300, seed=0).guide``.

    Args:
        engine: the settings.
        model: the model, asked for sites and priors; its backbone does not run.
        num_data: training examples.
        seed: seeds the random part of the start, and the schedule.
        start: site name -> where its mean starts.

    Raises:
        ValueError: a guide, a schedule, a way to find widths or a noise that the model's sites cannot take.
    """
    source = torch.Generator().manual_seed(seed)
    guide = build_guide(engine.guide_for(model, num_data), model, start=start, generator=source)
    engine.check_guide(model, guide, num_data)
    plan = None if engine.schedule is None else engine.schedule.plan(model.sites, model.backbone, seed)
    widths = NaturalWidths(guide, model, num_data, engine.kl_weight) if engine.width == "natural" else None
    noisy = {
        name: factor
        for name, factor in guide.items()
        if name in model.adapter_sites and "scale" in factor.roles.values() and not engine.integrates_out(name)
    }
    for name in noisy:
        if isinstance(model.prior.declared.get(name), Flat):
            logger.warning(
                "The posterior of %s has a width and its prior is flat: only the data bound it, and it may grow without end. "
                "Declare a Normal prior there, or make the site a Point().",
                name,
            )
    if engine.noise in TOKEN_SCOPES:
        require_linear(model, noisy)
        for factor in noisy.values():
            # refuses a family without token noise
            local_weight(factor.distribution(), engine.noise)
    return Assembly(guide, plan, widths, frozenset(noisy))
