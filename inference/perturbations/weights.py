"""Perturbed weights in the likelihood, with every prior evaluated where the weights are."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyrolora.models.naming import nearest
from pyrolora.models.settings import check_numbers

MODES = ("none", "awp", "paper", "gauss")


class PerturbedSites(Messenger):
    """Adds a stored perturbation to the values of some sites as the program sees them; their log densities see none of it.

    Usage::

        logits = PerturbedSites({"q_proj.lora_A": delta})(model)(batch)

    It goes around the model, inside whatever traces it: a trace keeps the value that was sampled, and the program goes on
    with the perturbed one. The gradient of the likelihood is then the one at the perturbed weights, and no parameter was
    touched that would have to be put back.

    Args:
        deltas: site name -> perturbation of the site's value, constant for differentiation.
    """

    def __init__(self, deltas: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.deltas = deltas

    def _pyro_post_sample(self, msg: Any) -> None:
        # handlers further out have kept the message by now: only the program reads this value
        if (delta := self.deltas.get(msg["name"])) is not None:
            msg["value"] = msg["value"] + delta.detach()


@dataclass(frozen=True)
class WeightPerturbation:
    """How weights are perturbed before the gradient of a step is taken.

    Usage::

        WeightPerturbation("awp", 1e-3).deltas(factors, gradients)

    - ``"none"``: not at all.
    - ``"awp"``: one ascent step on the whole objective, of length ``size |P|`` for each factor ``P`` of each projection, all
      at once. The worst case of a linearised objective over a ball.
    - ``"paper"``: ``size`` times the plain gradient, A and B each while the other is where it is.
    - ``"gauss"``: Normal noise of the length that ``"awp"`` has, which makes the objective an expectation: ordinary
      mean-field noise. By Moellenhoff and Khan, "SAM as an Optimal Relaxation of Bayes", 2023, the worst case is its convex
      relaxation. On a posterior that is sampled already, either smooths a second time.

    Source: Wu et al., "Adversarial Weight Perturbation Helps Robust Generalization", 2020, equation 8, and the released code
    of AMT, 2024 (``"awp"``); AMT, equations 3 and 4 (``"paper"``).

    Args:
        mode: one of the above.
        size: length relative to the factor's, or for ``"paper"`` the step.

    Raises:
        ValueError: an unknown mode, or a negative size.
    """

    mode: str = field(default="awp", metadata={"help": ", ".join(MODES)})
    size: float = field(default=1e-3, metadata={"help": "relative length, or for 'paper' the step"})

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.mode not in MODES:
            raise ValueError(
                f"Unknown mode {self.mode!r} of a weight perturbation. Did you mean {nearest(self.mode, MODES)!r}? "
                f"Modes: {', '.join(MODES)}."
            )
        if not self.size >= 0:
            raise ValueError(
                f"The size of a perturbation must not be negative; got {self.size}. Try 1e-3, or 0 for none."
            )

    @property
    def active(self) -> bool:
        """Whether anything is perturbed."""
        return self.mode != "none" and self.size > 0

    @property
    def needs_gradient(self) -> bool:
        """Whether the perturbation follows the gradient of the objective."""
        return self.active and self.mode != "gauss"

    @torch.no_grad()
    def deltas(
        self, factors: Mapping[str, Tensor], gradients: Mapping[str, Tensor], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """The perturbation of every site that has a gradient; for ``"gauss"`` of every site.

        Args:
            factors: site name -> the factor itself, not its change from where it started.
            gradients: site name -> gradient of the objective.
            generator: source of the noise, on the CPU.

        Shape:
            stacks of matrices ``(entries, ., .)``, each matrix a tensor of its own
        """
        if not self.active:
            return {}
        if self.mode == "paper":
            return {name: self.size * gradient for name, gradient in gradients.items()}
        if self.mode == "gauss":
            gradients = {
                name: torch.randn(factor.shape, generator=generator).to(factor) for name, factor in factors.items()
            }
        found = {}
        for name, gradient in gradients.items():
            length = self.size * torch.linalg.matrix_norm(factors[name], keepdim=True)
            norm = torch.linalg.matrix_norm(gradient, keepdim=True)
            # a Normal vector has its length only on average; a vanishing gradient has no direction
            scale = factors[name][0].numel() ** 0.5 if self.mode == "gauss" else norm
            found[name] = torch.where(norm > 0, gradient * (length / scale), 0.0)
        return found
