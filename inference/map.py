"""Maximum a posteriori estimates, and maximum likelihood as their case under a flat prior."""

from dataclasses import dataclass, field

from pyrolora.guides.base import GuideSpecification, by_pattern
from pyrolora.guides.point import Point
from pyrolora.inference.svi import SVI


@dataclass(frozen=True)
class MAP(SVI):
    """Maximises log posterior density of the sites: `SVI` with `Point` everywhere.

    Usage::

        map_estimate = MAP(steps=150).fit(model, task.train)
        mle = MAP().fit(BayesianModel(backbone, task, prior=Flat()), task.train)

    Under `Flat` priors it is maximum likelihood. The loss is ``NLL per example - log prior / N``.

    Args:
        guide: `Point`; present because every setting of `SVI` applies.
        steps: optimisation steps.

    Raises:
        ValueError: a setting out of range, or a guide that is no point.
    """

    guide: GuideSpecification = field(default_factory=Point, metadata={"help": "points at every site"})
    steps: int = field(default=150, metadata={"help": "optimisation steps"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for family in by_pattern(self.guide).values():
            if not isinstance(family, Point):
                raise ValueError(f"MAP fits points; got the guide {family}. Use SVI(guide=...) for a distribution.")
