"""Widths of independent Normals put at their optimum in closed form, from the curvature that training sees anyway."""

from collections.abc import Mapping

import pyro.distributions as dist
import torch
from torch import Tensor

from pyrolora.guides.base import Guide
from pyrolora.guides.mean_field import IndependentNormalFactor
from pyrolora.models.prior_declarations import Learned, Relative
from pyrolora.models.program import BayesianModel

WIDTHS = ("gradient", "natural")
# most that a variance may be, in variances of the prior: a curvature estimated below zero would ask for any width
WIDEST = 2.0


class NaturalWidths:
    """Puts every standard deviation where the ELBO is highest given the expected curvature of the likelihood.

    For a loss of ``E_q[NLL] + kl_weight KL / N`` and a Normal prior of scale s the best width of a weight solves::

        1 / sigma^2 = 1 / s^2 + (N / kl_weight) h,        h = E_q[d^2 NLL / dw^2]

    which is a natural-gradient step of length one on the precision. By Price's theorem ``d E_q[NLL] / d log sigma`` is
    ``sigma^2 h``, so h costs no pass of its own: it is the slope of the likelihood's gradients on the noise, estimated from
    all steps so far as the ratio of the running means of ``d NLL / d log sigma`` and of ``sigma^2``. A step counts in
    proportion to its number and to its variance, so neither where widths start nor a learning rate decides where they end.

    Usage::

        widths = NaturalWidths(guide, model, num_data=300, kl_weight=0.01)
        ...                                                          # backward of a loss
        widths.step(number)

    Source: Khan et al., "Fast and scalable Bayesian deep learning by weight-perturbation in Adam", 2018 (variational online
    Newton, here with a step of one and an average over steps); Opper and Archambeau, "The variational Gaussian approximation
    revisited", 2009, for the fixed point.

    Attributes:
        left_out: ``"<site>/scale"`` of every site whose widths are set here and by no optimiser.

    Args:
        guide: the guide; its widths are set in place.
        model: the model, asked for its priors.
        num_data: examples that the loss is divided by.
        kl_weight: weight of the KL in the loss.

    Raises:
        ValueError: no site with a width, a posterior that is no independent Normal, or a prior that is no Normal of its own.
    """

    def __init__(self, guide: Guide, model: BayesianModel, num_data: int, kl_weight: float) -> None:
        self.model = model
        self.per_kl = kl_weight / num_data
        self.factors: dict[str, IndependentNormalFactor] = {}
        for name, factor in guide.items():
            if "scale" not in factor.roles.values():
                continue
            if not isinstance(factor, IndependentNormalFactor):
                raise ValueError(
                    f"width='natural' is the optimum of independent Normals; {name!r} has a {type(factor).__name__}. Use "
                    "BLoB or MeanField there, or width='gradient'."
                )
            self._check_prior(name)
            self.factors[name] = factor
        if not self.factors:
            raise ValueError(
                f"width='natural' sets widths, and every site is a point ({', '.join(guide.site_names)}). Use a guide such "
                "as BLoB(), or leave width out."
            )
        self.left_out = frozenset(f"{name}/scale" for name in self.factors)
        self.slopes = {name: torch.zeros_like(factor.loc) for name, factor in self.factors.items()}
        self.spreads = {name: torch.zeros_like(factor.loc) for name, factor in self.factors.items()}

    def _check_prior(self, name: str) -> None:
        declared = self.model.prior.declared.get(name)
        base = declared.base_dist if isinstance(declared, dist.Independent) else declared
        if not isinstance(base, dist.Normal | Learned | Relative):
            described = self.model.prior.to_dict().get(name, {"prior": "sampled by a prior"})["prior"]
            raise ValueError(
                f"width='natural' needs a Normal prior with a scale of its own at {name!r}; it is {described}. Declare "
                "dist.Normal(0., 0.05) or learned(0.05) there, or use width='gradient'."
            )

    def _prior_precision(self, name: str) -> Tensor:
        prior: dist.Independent = self.model.prior(self.model.sites[name])
        return prior.base_dist.scale.square().reciprocal()

    @torch.no_grad()
    def step(self, number: int) -> None:
        """Take in the gradients of a step and put the widths at their optimum.

        Args:
            number: number of the step, from 1.
        """
        # weights that grow with the number of the step: the mean is over about the last half of them
        rate = 2 / (number + 1)
        for name, factor in self.factors.items():
            gradient = factor.log_scale_gradient()
            if gradient is None:
                continue
            variance, precision = factor.scale.square(), self._prior_precision(name)
            likelihood = gradient - self.per_kl * (variance * precision - 1)
            self.slopes[name].lerp_(likelihood, rate)
            self.spreads[name].lerp_(variance, rate)
            curvature = self.slopes[name] / self.spreads[name]
            # a learned prior follows the widths, so widths beyond it would raise it, and it them, without end
            widest = 1.0 if name in self.model.prior.learned_sites else WIDEST
            best = (precision + curvature / self.per_kl).maximum(precision / widest)
            factor.set_scale(best.rsqrt())

    def state_tensors(self) -> dict[str, Tensor]:
        """The running means under names that `load_state` reads back."""
        return {f"width.{name}.slope": value for name, value in self.slopes.items()} | {
            f"width.{name}.spread": value for name, value in self.spreads.items()
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state_tensors` gave."""
        for name in self.factors:
            self.slopes[name].copy_(tensors[f"width.{name}.slope"])
            self.spreads[name].copy_(tensors[f"width.{name}.spread"])
