"""What a posterior does to each projection: singular values of the change, and the ranks that they amount to."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrolora.models.backbones import Delta
from pyrolora.models.program import BayesianModel
from pyrolora.models.sites import Site


@dataclass(frozen=True, eq=False)
class ChangeSpectrum:
    """Singular values of the change of one kind of projection, descending.

    ``change_spectra(model, posterior.mean())["q_proj"].values[0, :, 0]  # largest of each layer``

    Attributes:
        projection: last part of the projections' module names.
        layers: number of the block of each entry.
        values: singular values.

    Shape:
        values: ``(draws, layers, rank)``
    """

    projection: str
    layers: tuple[int, ...]
    values: Tensor

    @property
    def norm(self) -> Tensor:
        """Frobenius norm of the change, ``(draws, layers)``."""
        return self.values.square().sum(-1).sqrt()

    @property
    def stable_rank(self) -> Tensor:
        """See `stable_rank`, ``(draws, layers)``."""
        return stable_rank(self.values)

    @property
    def effective_rank(self) -> Tensor:
        """See `effective_rank`, ``(draws, layers)``."""
        return effective_rank(self.values)


def stable_rank(values: Tensor) -> Tensor:
    """Squared Frobenius norm over squared spectral norm: ``stable_rank(torch.linalg.svdvals(matrix))``.

    Between 1 and the rank, and 0 for a matrix of zeros. Directions much smaller than the largest count for nothing.

    Args:
        values: singular values.

    Shape:
        values: ``(..., rank)``. Returns ``(...)``.

    Rudelson and Vershynin 2007, "Sampling from large matrices", section 1.
    """
    largest = values.amax(-1).square()
    return torch.where(largest > 0, values.square().sum(-1) / largest.clamp_min(torch.finfo(values.dtype).tiny), 0.0)


def effective_rank(values: Tensor) -> Tensor:
    """Exponential of the entropy of the normalised singular values: ``effective_rank(torch.linalg.svdvals(matrix))``.

    Between 1 and the rank, the rank for equal singular values, and 0 for a matrix of zeros.

    Args:
        values: singular values.

    Shape:
        values: ``(..., rank)``. Returns ``(...)``.

    Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality", definition 1.
    """
    total = values.sum(-1, keepdim=True)
    share = values / total.clamp_min(torch.finfo(values.dtype).tiny)
    return torch.where(total[..., 0] > 0, (-torch.xlogy(share, share).sum(-1)).exp(), 0.0)


def change_spectra(model: BayesianModel, draw: Mapping[str, Tensor]) -> dict[str, ChangeSpectrum]:
    """Singular values of what a draw adds to every adapted projection, whatever the adapter is made of.

    ``change_spectra(model, posterior.sample(20))["v_proj"].effective_rank.mean(0)``

    The change is only known as a linear map. It is applied to as many random inputs as it can have rank, its transpose to an
    orthonormal basis of the outputs, which gives the singular values exactly and never forms the matrix.

    Args:
        model: whose adapters change the network.
        draw: site name -> ``(draws, *site.shape)``, or the site's shape for a single draw.

    Returns:
        Last part of the projections' names -> spectrum; empty if no adapter changes a projection. Adapters whose change
        depends on the row (`Adapter.context_keys`) are left out.

    Halko, Martinsson and Tropp 2011, "Finding structure with randomness", algorithm 4.1 with as many samples as rank.
    """
    draws = model._count_draws(draw)
    grouped = {
        name: value if value.dim() > len(model.sites[name].shape) else value[None] for name, value in draw.items()
    }
    blocks = {
        module: (layer, site)
        for site in model.adapter_sites.values()
        for module, layer in zip(site.modules, site.layers, strict=True)
    }
    found: dict[str, dict[int, Tensor]] = {}
    for adapter in model.adapters:
        if adapter.context_keys:
            # a change that is another one for every row has no spectrum
            continue
        sites = [site for site in adapter.sites(model.backbone, model.classes) if site.modules and site.linear]
        for module, delta in adapter.deltas(sites, {**model.constants, **grouped}).items():
            layer, _ = blocks[module]
            out_features, in_features = model.backbone.network.get_submodule(module).weight.shape
            own = [site for site in sites if module in site.modules]
            # a change B A - B0 A0 from factors that do not start at zero has twice as many directions
            away = any(name.startswith(f"{site.name}.") for site in own for name in model.constants)
            rank = min(in_features, out_features, (2 if away else 1) * _rank_bound(own, in_features))
            values = _singular_values(delta, draws, rank, in_features, grouped)
            found.setdefault(module.rsplit(".", 1)[-1], {})[layer] = values
    return {
        name: ChangeSpectrum(name, tuple(sorted(layers)), torch.stack([layers[i] for i in sorted(layers)], 1))
        for name, layers in found.items()
    }


def _rank_bound(sites: list[Site], in_features: int) -> int:
    """Largest rank of an adapter's factors; a bound that is too large costs time, not exactness."""
    ranks = [size for site in sites for dim, size in zip(site.dims, site.shape, strict=True) if dim == "rank"]
    return max(ranks, default=in_features)


def _singular_values(delta: Delta, draws: int, rank: int, width: int, draw: Mapping[str, Tensor]) -> Tensor:
    like = next(iter(draw.values()))
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(1, rank, width, generator=generator).to(like).expand(draws, -1, -1)
    with torch.enable_grad():
        inputs = probes.clone().requires_grad_()
        outputs = delta(inputs)
        basis = torch.linalg.qr(outputs.detach().mT)[0].mT
        (rows,) = torch.autograd.grad(outputs, inputs, basis)
    return torch.linalg.svdvals(rows)
