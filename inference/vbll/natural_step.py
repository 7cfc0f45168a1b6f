"""One natural-gradient step of a dense last layer on a batch: what trains the head beside a network that Adam trains."""

import torch

from pyrolora.guides.block_covariance import BlockCovarianceFactor
from pyrolora.guides.class_contrasts import ClassContrastsFactor
from pyrolora.guides.vbll import LogitMoments
from pyrolora.inference.last_layer import HeadData, LastLayerHead
from pyrolora.inference.vbll.contrasts import ContrastRows
from pyrolora.inference.vbll.natural import BlockRows, Likelihood, isotropic_scale


@torch.no_grad()
def natural_step(
    head: LastLayerHead, factor: BlockCovarianceFactor, data: HeadData, objective: Likelihood, length: float
) -> None:
    """Move a posterior of ``head.weight`` towards the optimum for a batch that stands for all data.

    The precision of class k goes a fraction ``length`` of the way to ``prior precision + weight * sum_n w_nk x x'``, the mean
    along the gradient in the metric of the new precision. With all data and length 1 a Gaussian likelihood is at its optimum
    after one step; a sampled objective is averaged over batches by a small length.

    Source: Khan and Rue, "The Bayesian Learning Rule", 2023, equation 12.

    Args:
        head: the last layer.
        factor: its posterior; changed in place.
        data: the batch; its ``weight`` is the number of training examples over that of the batch, over the KL's weight.
        objective: what to maximise, from the moments of logits and labels.
        length: between 0 and 1.

    Raises:
        ValueError: a prior with several standard deviations.
    """
    loc, scales = (value.to(data.inputs) for value in head.normal_prior())
    scale = isotropic_scale(scales)
    tril = factor.scale_tril.to(data.inputs)
    mean = (data.inputs @ factor.loc.to(data.inputs).mT).requires_grad_()
    variance = (data.inputs @ tril).square().sum(-1).mT.contiguous().requires_grad_()
    with torch.enable_grad():
        moments = head.complete(LogitMoments(mean, variance), data.offset)
        likelihood = data.weight * objective(moments, data.labels).sum()
    slope, towards = torch.autograd.grad(likelihood, (mean, variance))
    kind = ContrastRows if isinstance(factor, ClassContrastsFactor) else BlockRows
    rows = kind((factor.loc.to(data.inputs) - loc) / scale, torch.cholesky_inverse(tril / scale))
    moved = rows.moved(scale * data.inputs, slope, (-2 * towards).clamp_min(0), length)
    factor.loc.copy_(loc + scale * moved.mean)
    covariance = torch.cholesky_inverse(torch.linalg.cholesky(moved.precision))
    factor.set_scale_tril(scale * torch.linalg.cholesky(covariance))
    if isinstance(factor, ClassContrastsFactor):
        factor.set_shift_scale(scale / len(loc) ** 0.5)
