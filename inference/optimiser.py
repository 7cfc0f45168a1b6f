"""Adam over a guide's parameters, whole or only the entries of the blocks that are being trained."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pyrolora.guides.base import ROLES, Guide
from pyrolora.inference.riemannian import RiemannianStep
from pyrolora.inference.schedules import BlockPlan, Entries

# (position of the parameter, entry of its stack, or None for the whole of it)
Part = tuple[int, int | None]


class GuideAdam:
    """One `torch.optim.Adam` whose tensors are the guide's parameters or views of their active entries.

    A view shares memory with its parameter, so a step on it moves the guide; entries that rest are no tensors of the
    optimiser, and nothing can move them: no momentum, no weight decay. What lives on a manifold moves by a `RiemannianStep`,
    whole or entry by entry.

    Usage::

        optimiser = GuideAdam(guide, {"loc": 1e-3, "scale": 2e-2, "point": 1e-3}, plan)
        entries = optimiser.activate(step)
            ...                                             # backward
        optimiser.gradients()
        optimiser.step(rate_factor)

    Attributes:
        parameters: all parameters of the guide, grouped by learning rate.
        entries: site name -> active entries; None without a schedule.
        peak_state_bytes: the most bytes that Adam's moments have taken on the guide's device.

    Args:
        guide: the guide.
        rates: learning rate of each role, or of one site's role under ``"<site>/<role>"``.
        plan: the blocks of each interval, or None to train everything.
        manifold_step: how parameters in the role ``"manifold"`` move; which ones they are is filled in here.
        left_out: ``"<site>/<role>"`` of parameters that others move; they are among `parameters` and not of the optimiser.
        make: makes another torch optimiser with a fused step in Adam's place, from groups of parameters.

    Raises:
        ValueError: a site of the schedule whose posterior is not a stack of independent blocks.
        TypeError: parameters on a manifold in half precision.
    """

    def __init__(
        self,
        guide: Guide,
        rates: Mapping[str, float],
        plan: BlockPlan | None = None,
        manifold_step: RiemannianStep | None = None,
        left_out: Collection[str] = (),
        make: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    ) -> None:
        self.plan = plan
        groups, others = _groups(guide, rates, left_out)
        own = [parameter for _, _, members in groups for parameter in members]
        # those that are left out come last: positions of the others count only them
        self.parameters: list[nn.Parameter] = [*own, *others]
        self.adam = make([{"params": members, "lr": rate} for _, rate, members in groups], fused=True)
        self.peak_rates = [rate for _, rate, _ in groups]
        self._group_of = [number for number, (_, _, members) in enumerate(groups) for _ in members]
        self._roles = [role for role, _, members in groups for _ in members]
        self._sites = self._sites_of(guide, own)
        self._tensors: dict[Part, Tensor] = {(i, None): parameter for i, parameter in enumerate(own)}
        self._take_step = replace(manifold_step or RiemannianStep(()), parameters=self._points())
        self._resting: dict[Part, dict[str, Tensor]] = {}
        self._interval: int | None = None
        self._factors = {} if plan is None else plan.gradient_factors()
        self.entries: Entries | None = None
        self.peak_state_bytes = 0

    def _points(self) -> list[Tensor]:
        """What is being trained on a manifold."""
        return [tensor for (position, _), tensor in self._tensors.items() if self._roles[position] == "manifold"]

    def _sites_of(self, guide: Guide, parameters: Sequence[nn.Parameter]) -> list[str | None]:
        """The site of each parameter whose entries may rest, None for the others."""
        if self.plan is None:
            return [None] * len(parameters)
        owners = {id(parameter): name for name, factor in guide.items() for parameter in factor.parameters()}
        counts: dict[str, int] = {}
        for entries in self.plan.blocks.values():
            for name, which in entries.items():
                counts[name] = counts.get(name, 0) + len(which)
        sites: list[str | None] = []
        for parameter in parameters:
            name = owners[id(parameter)]
            if name in counts and parameter.shape[:1] != (counts[name],):
                raise ValueError(
                    f"A block schedule needs posteriors that are independent from layer to layer; that of {name!r} has a "
                    f"parameter of shape {tuple(parameter.shape)} for {counts[name]} layers. Use MeanField, BLoB, LowRank or "
                    f"Point there, or put the site into always=."
                )
            sites.append(name if name in counts else None)
        return sites

    def activate(self, step: int) -> Entries | None:
        """Train the blocks of a step, counted from 0, from now on.

        Returns:
            Site name -> active entries, for `ActiveEntries`; None without a schedule.
        """
        if self.plan is None or self.plan.interval(step) == self._interval:
            return self.entries
        self._interval = self.plan.interval(step)
        self.entries = self.plan.entries(self._interval)
        before = {part: self.adam.state.pop(tensor, {}) for part, tensor in self._tensors.items()}
        wanted: list[Part] = []
        for position, site in enumerate(self._sites):
            wanted += [(position, None)] if site is None else [(position, e) for e in sorted(self.entries[site])]
        policy = self.plan.schedule.state
        if policy != "drop":
            resting = {part: state for part, state in before.items() if part not in wanted and state}
            self._resting.update(_moved(resting, "cpu") if policy == "offload" else resting)
        self._tensors = {part: self._view(part) for part in wanted}
        for part, tensor in self._tensors.items():
            state = before.get(part) or self._resting.pop(part, None)
            if state:
                self.adam.state[tensor] = _moved({part: state}, tensor.device)[part]
        for number, group in enumerate(self.adam.param_groups):
            group["params"] = [t for (position, _), t in self._tensors.items() if self._group_of[position] == number]
        self._take_step = replace(self._take_step, parameters=self._points())
        return self.entries

    def _view(self, part: Part) -> Tensor:
        position, entry = part
        parameter = self.parameters[position]
        # detached, so that it is a leaf; a view, so that the parameter moves with it
        return parameter if entry is None else parameter.detach()[entry]

    def zero_grad(self) -> None:
        """Forget all gradients; none is left as zeros, which would move parameters by momentum."""
        for parameter in self.parameters:
            parameter.grad = None

    @property
    def trained(self) -> list[Tensor]:
        """What is being trained: parameters, and views of their active entries."""
        return list(self._tensors.values())

    def gradients(self) -> list[Tensor]:
        """Gradients of what is being trained, after backward; the tensors of `trained` hold them from now on."""
        for (position, entry), tensor in self._tensors.items():
            if entry is not None:
                gradient = self.parameters[position].grad
                tensor.grad = None if gradient is None else gradient[entry] * self._factor(position, entry)
        return [tensor.grad for tensor in self._tensors.values() if tensor.grad is not None]

    def _factor(self, position: int, entry: int) -> float:
        return self._factors.get(self._sites[position] or "", {}).get(entry, 1.0)

    def step(self, factor: float) -> None:
        """One step of Adam along `gradients`, on manifolds a Riemannian one, with the peak rates times a factor."""
        for group, rate in zip(self.adam.param_groups, self.peak_rates, strict=True):
            group["lr"] = rate * factor
        self._take_step(self.adam)
        self.peak_state_bytes = max(self.peak_state_bytes, self.state_bytes())

    def state_bytes(self) -> int:
        """Bytes of Adam's two moments on the guide's device; what was offloaded is not there."""
        states = [self.adam.state.get(tensor, {}) for tensor in self._tensors.values()]
        if self.plan is not None and self.plan.schedule.state == "keep":
            states += list(self._resting.values())
        return sum(v.numel() * v.element_size() for state in states for key, v in state.items() if key != "step")

    def state_tensors(self) -> dict[str, Tensor]:
        """Adam's state under names that `load_state` reads back."""
        states = {part: self.adam.state.get(tensor, {}) for part, tensor in self._tensors.items()}
        return {
            f"optimiser.{position}.{'' if entry is None else f'{entry}.'}{key}": value
            for (position, entry), state in {**self._resting, **states}.items()
            for key, value in state.items()
        }

    def load_state(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Take over what `state_tensors` gave after ``step`` steps."""
        if step > 0:
            self.activate(step - 1)
        for name, value in tensors.items():
            if not name.startswith("optimiser."):
                continue
            position, *entry, key = name.split(".")[1:]
            part = (int(position), int(entry[0]) if entry else None)
            device = self.parameters[part[0]].device
            if part in self._tensors:
                self.adam.state[self._tensors[part]][key] = value.to(device)
            else:
                keep_here = self.plan is not None and self.plan.schedule.state == "keep"
                self._resting.setdefault(part, {})[key] = value.to(device) if keep_here else value


def _moved(states: Mapping[Part, dict[str, Tensor]], device: Any) -> dict[Part, dict[str, Tensor]]:
    # a fused step wants all of its state where its parameters are, the count of steps included
    return {part: {key: value.to(device) for key, value in state.items()} for part, state in states.items()}


def _groups(
    guide: Guide, rates: Mapping[str, float], left_out: Collection[str]
) -> tuple[list[tuple[str, float, list[nn.Parameter]]], list[nn.Parameter]]:
    """Role, learning rate and parameters of every group that has some, and the parameters that are left out."""
    others = []
    groups: dict[str, tuple[str, float, list[nn.Parameter]]] = {
        key: (key, rates[key], []) for key in ROLES if key in rates
    }
    for site, factor in guide.items():
        for name, parameter in factor.named_parameters():
            role = factor.roles[name]
            own = f"{site}/{role}"
            if own in left_out:
                others.append(parameter)
                continue
            key = own if own in rates else role
            groups.setdefault(key, (role, rates[key], []))[2].append(parameter)
    return [group for group in groups.values() if group[2]], others
