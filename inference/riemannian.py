"""Steps that keep parameters on the Stiefel manifold, around any torch optimiser."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyrolora.models.naming import nearest
from pyrolora.models.stiefel import (
    RETRACTIONS,
    canonical_gradient,
    landing_field,
    safe_step,
    tangent_projection,
)

STEPS = ("retraction", "landing", "landing_scalar")
# decay of the scalar second moment of a landing step, Adam's own
DECAY, EPSILON = 0.999, 1e-8


@dataclass(frozen=True)
class RiemannianStep:
    """One optimiser step that knows which parameters live on the Stiefel manifold.

    Usage::

        step = RiemannianStep(manifold_parameters)
        loss.backward()
        step(optimiser)                       # instead of optimiser.step()

    ``"retraction"``: the optimiser sees the Riemannian gradient of the canonical metric; what it moved a point is projected
    onto the tangent space there and retracted. Its moments are not transported. Source: Li et al., "StelLA: Subspace
    Learning in Low-rank Adaptation using Stiefel Manifold", 2025.

    ``"landing"``: the optimiser takes the landing field for the gradient, as PoLAR's release does; an elementwise optimiser
    such as Adam then leaves the manifold, the further the smaller the penalty.

    ``"landing_scalar"``: a plain step along the field of the gradient over one running root mean square for each matrix,
    bounded by the safe step, so that the field's guarantees hold.

    Args:
        parameters: stacks of points, ``(..., rows, rank)``; all must be in the optimiser's groups.
        method: ``"retraction"``, ``"landing"`` or ``"landing_scalar"``.
        retraction: one of `RETRACTIONS`.
        penalty: weight of the landing field's attraction.

    Raises:
        ValueError: an unknown method or retraction (the nearest is offered), or a penalty that is not positive.
        TypeError: points in half precision.
    """

    parameters: Sequence[Tensor]
    method: str = "retraction"
    retraction: str = "polar"
    penalty: float = 1.0

    def __post_init__(self) -> None:
        check_settings(self.method, self.retraction, self.penalty)
        for parameter in self.parameters:
            if parameter.dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    f"Factors on the Stiefel manifold are {parameter.dtype}; rounding alone would put them 1e-3 off it. "
                    "Keep them in float32; the frozen network may be in bfloat16."
                )

    @torch.no_grad()
    def __call__(self, optimiser: Optimizer) -> None:
        """Take one step of the optimiser, with gradients already in place."""
        moving = [parameter for parameter in self.parameters if parameter.grad is not None]
        if self.method == "landing_scalar":
            gradients = [_gradient(parameter) for parameter in moving]
            for parameter in moving:
                parameter.grad = None
            optimiser.step()
            for parameter, gradient in zip(moving, gradients, strict=True):
                self._land(parameter, gradient, optimiser)
            return
        starts = [parameter.clone() for parameter in moving] if self.method == "retraction" else []
        for parameter in moving:
            gradient = _gradient(parameter)
            riemannian = self.method == "retraction"
            parameter.grad = canonical_gradient(parameter, gradient) if riemannian else self._field(parameter)
        optimiser.step()
        retract = RETRACTIONS[self.retraction]
        for parameter, start in zip(moving, starts, strict=False):
            parameter.copy_(retract(start, tangent_projection(start, parameter - start)))

    def _field(self, parameter: Tensor) -> Tensor:
        return landing_field(parameter, _gradient(parameter), self.penalty)

    def _land(self, parameter: Tensor, gradient: Tensor, optimiser: Optimizer) -> None:
        # kept in the optimiser's state, so that whatever saves the optimiser saves it too
        state = optimiser.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["second_moment"] = gradient.new_zeros(gradient.shape[:-2])
        state["step"] += 1
        second = state["second_moment"].lerp_(gradient.square().mean((-2, -1)), 1 - DECAY)
        size = (second / (1 - DECAY ** float(state["step"]))).sqrt() + EPSILON
        field = landing_field(parameter, gradient / size[..., None, None], self.penalty)
        rate = next(group["lr"] for group in optimiser.param_groups if any(p is parameter for p in group["params"]))
        length = safe_step(parameter, field, self.penalty).clamp_max(rate)
        parameter.sub_(length[..., None, None] * field)


def check_settings(method: str, retraction: str, penalty: float) -> None:
    """Refuse names and numbers that no Riemannian step has.

    Raises:
        ValueError: see `RiemannianStep`.
    """
    for what, value, valid in (("manifold step", method, STEPS), ("retraction", retraction, tuple(RETRACTIONS))):
        if value not in valid:
            raise ValueError(
                f"Unknown {what} {value!r}. Did you mean {nearest(str(value), valid)!r}? Choices: {', '.join(valid)}."
            )
    if not penalty > 0:
        raise ValueError(f"landing_penalty must be positive; got {penalty}. 1.0 is the default.")


def _gradient(parameter: Tensor) -> Tensor:
    gradient = parameter.grad
    if gradient is None:
        raise ValueError("A parameter on the manifold has no gradient.")
    return gradient
