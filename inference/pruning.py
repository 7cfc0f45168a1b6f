"""Ranks of low-rank posteriors that the data say nothing about: found by signal-to-noise, reported, and taken out."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyrolora.inference.posterior import Posterior
from pyrolora.models.naming import nearest

# width of a pruned weight: not zero, so that densities stay finite
PRUNED_SCALE = 1e-8


@dataclass(frozen=True)
class RankReport:
    """Signal-to-noise of every rank-one part ``b_k a_k'`` of one kind of projection.

    Attributes:
        projection: name of the sites without ``.lora_A`` and ``.lora_B``.
        layers: number of the block of each entry; that of the label rows is one above the last block's.
        signal_to_noise: ``|E b_k a_k'| / sqrt(E |b_k a_k'|^2 - |E b_k a_k'|^2)`` in the Frobenius norm; infinite for a point.
        kept: which parts stay.
        prior_scales: ``"lora_A"`` and ``"lora_B"``, where the prior has `learned` scales -> the scale (standard deviation of
            one weight under the prior) of the row or column that makes up each part.

    Shape:
        signal_to_noise, kept and prior scales ``(layers, rank)``
    """

    projection: str
    layers: tuple[int, ...]
    signal_to_noise: Tensor
    kept: Tensor
    prior_scales: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def effective_ranks(self) -> list[int]:
        """Parts kept in each layer."""
        return [int(count) for count in self.kept.sum(1)]

    def to_markdown(self) -> str:
        """One line a layer: parts kept, the smallest, median and largest signal-to-noise, and the range of learned scales."""
        heads = [f"{self.projection}, layer", "kept", "smallest", "median", "largest"]
        heads += [f"prior scale of {factor}" for factor in self.prior_scales]
        lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for entry, (layer, kept) in enumerate(zip(self.layers, self.effective_ranks, strict=True)):
            values = self.signal_to_noise[entry]
            cells = [str(layer), f"{kept} of {len(values)}"]
            cells += [f"{float(value):.3g}" for value in (values.min(), values.median(), values.max())]
            scales = [scale[entry] for scale in self.prior_scales.values()]
            cells += [f"{float(scale.min()):.3g} to {float(scale.max()):.3g}" for scale in scales]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)


@torch.no_grad()
def rank_reports(posterior: Posterior, threshold: float) -> dict[str, RankReport]:
    """Signal-to-noise of every rank-one part of a low-rank posterior, and which reach a threshold.

    ``rank_reports(posterior, 0.1)["q_proj"].effective_ranks``

    A and B are independent under every guide of this library, so the moments of ``b_k a_k'`` are products of theirs.

    Args:
        posterior: over LoRA sites.
        threshold: smallest signal-to-noise that stays.

    Raises:
        ValueError: no pair of LoRA sites, sites of another parametrisation, or a threshold that is not positive.
    """
    if not threshold > 0:
        raise ValueError(f"The threshold must be positive; got {threshold}. At 1 signal and noise are equal.")
    factors = dict(posterior.guide.items())
    pairs = [name.removesuffix(".lora_A") for name in factors if name.endswith(".lora_A")]
    pairs = [name for name in pairs if f"{name}.lora_B" in factors]
    if not pairs:
        raise ValueError(
            f"Ranks are pruned in pairs of sites lora_A and lora_B; this posterior has {', '.join(factors)}. "
            f"Nearest: {nearest('q_proj.lora_A', factors)!r}."
        )
    for name in posterior.model.constants:
        if name.startswith(tuple(f"{pair}." for pair in pairs)):
            raise ValueError(
                f"The factors of these sites do not start at zero ({name!r}), so b_k a_k' is not what they change. Prune "
                "plain LoRA."
            )
    found = {}
    for pair in pairs:
        a, b = factors[f"{pair}.lora_A"], factors[f"{pair}.lora_B"]
        # norms of row k of A and column k of B, of their means and in expectation
        signal = a.mean().square().sum(-1) * b.mean().square().sum(-2)
        whole = a.second_moment().sum(-1) * b.second_moment().sum(-2)
        noise = (whole - signal).clamp_min(0)
        ratio = torch.where(noise > 0, (signal / noise).sqrt(), torch.where(signal > 0, torch.inf, 0.0))
        # the label rows are no stack over layers, and come after the last
        layers = posterior.model.sites[f"{pair}.lora_A"].layers or (len(posterior.model.backbone.blocks),)
        ratio = ratio.reshape(len(layers), -1)
        found[pair] = RankReport(pair, layers, ratio, ratio >= threshold, _prior_scales(posterior, pair, ratio.shape))
    return found


def _prior_scales(posterior: Posterior, pair: str, shape: torch.Size) -> dict[str, Tensor]:
    """Learned prior scales of the row of A and the column of B of every part, or the quadratic mean of several."""
    found = {}
    for factor, within in (("lora_A", -1), ("lora_B", -2)):
        name = f"{pair}.{factor}"
        if (scale := posterior.model.prior.scales.get(name)) is not None:
            variance = scale.square().expand(posterior.model.sites[name].shape).mean(within)
            found[factor] = variance.sqrt().reshape(shape)
    return found


@torch.no_grad()
def prune_ranks(posterior: Posterior, threshold: float) -> tuple[Posterior, dict[str, RankReport]]:
    """A copy of a posterior without the rank-one parts below a signal-to-noise, and what was taken out.

    ``pruned, reports = prune_ranks(posterior, 0.1)``

    Pruned rows of A and columns of B get mean zero and no width to speak of; shapes stay, so the copy is saved, sampled and
    judged like any posterior. Choose the threshold on validation data.

    Args:
        posterior: over LoRA sites, independent Normals or points.
        threshold: see `rank_reports`.

    Raises:
        ValueError: see `rank_reports`, or a posterior whose weights are correlated.
    """
    reports = rank_reports(posterior, threshold)
    guide = copy.deepcopy(posterior.guide)
    factors = dict(guide.items())
    for pair, report in reports.items():
        gone = ~report.kept
        for suffix, mask in (("lora_A", gone[..., None]), ("lora_B", gone[..., None, :])):
            factor = factors[f"{pair}.{suffix}"]
            mask = mask.reshape(mask.shape[-len(factor.mean().shape) :])
            for name, parameter in factor.named_parameters():
                value = {"loc": 0.0, "value": 0.0}.get(name)
                if name == "log_scale":
                    value = float(torch.tensor(PRUNED_SCALE).log())
                elif name == "root_scale":
                    value = PRUNED_SCALE**0.5
                if value is None or parameter.shape != posterior.model.sites[f"{pair}.{suffix}"].shape:
                    raise ValueError(
                        f"Ranks are pruned from independent Normals and points; {pair}.{suffix} has a "
                        f"{type(factor).__name__}. Fit MeanField or BLoB, or read `rank_reports` alone."
                    )
                parameter.copy_(torch.where(mask, torch.full_like(parameter, value), parameter))
    record = {
        **posterior.record,
        "pruned": {pair: {"threshold": threshold, "kept": report.kept.tolist()} for pair, report in reports.items()},
    }
    return type(posterior)(posterior.model, guide, record), reports
