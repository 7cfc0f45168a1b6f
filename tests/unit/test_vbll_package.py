"""Loss parity with the vbll package where it is right, and a test for each place where it is not."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence

from pyrolora.guides import logit_moments
from pyrolora.guides.block_covariance import BlockNormal
from pyrolora.guides.low_rank import LowRankNormal
from pyrolora.guides.vbll import LogitMoments
from pyrolora.inference.last_layer import HeadData
from pyrolora.inference.vbll.natural import GaussianRows, Whitened, standard_divergence
from pyrolora.inference.vbll.objectives import Objective
from pyrolora.inference.vbll.regression import GaussianObjective

vbll = pytest.importorskip("vbll")

EXAMPLES, WEIGHTS, CLASSES, DOF, WISHART, PRIOR = 20, 6, 3, 2.0, 0.1, 1.5


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def ours(layer, parameterization):
    """The layer's posterior as one of ours; its ``W_logdiag`` is log std, or log variance for low rank."""
    mean, log_diag = layer.W_mean.detach(), layer.W_logdiag.detach()
    if parameterization == "diagonal":
        return dist.Normal(mean, log_diag.exp()).to_event(2)
    offdiag = layer.W_offdiag.detach()
    if parameterization == "dense":
        return BlockNormal(mean, offdiag.tril(-1) + torch.diag_embed(log_diag.exp()))
    return LowRankNormal(mean, offdiag, log_diag.exp())


@pytest.mark.parametrize("parameterization", ["diagonal", "dense", "lowrank"])
def test_the_jensen_loss_is_theirs_up_to_the_constant_that_they_drop(parameterization):
    """With logit noise and the inverse-Wishart term, which are theirs alone, added to ours by hand."""
    layer = vbll.DiscClassification(
        WEIGHTS, CLASSES, 1 / EXAMPLES, parameterization=parameterization, prior_scale=PRIOR, wishart_scale=WISHART, dof=DOF,
        cov_rank=2,
    )  # fmt: skip
    features, labels = torch.randn(EXAMPLES, WEIGHTS), torch.arange(EXAMPLES) % CLASSES
    theirs = float(layer(features).train_loss_fn(labels))
    q = ours(layer, parameterization)
    noise = (2 * layer.noise_logdiag.detach()).exp()
    mean, spread = logit_moments(q, features)
    likelihood = Objective("jensen")(LogitMoments(mean, spread + noise), labels).mean()
    prior = dist.Normal(0.0, math.sqrt(PRIOR * 2 / WEIGHTS)).expand((CLASSES, WEIGHTS)).to_event(2)
    wishart = (-0.5 * (DOF + CLASSES + 1) * noise.log() - 0.5 * WISHART / noise).sum()
    loss = -likelihood + (kl_divergence(q, prior) - wishart) / EXAMPLES
    # their KL lacks minus half the number of weights
    assert float(loss) == pytest.approx(theirs - CLASSES * WEIGHTS / (2 * EXAMPLES), abs=1e-12)


def test_regression_with_several_outputs_is_wrong_there_and_right_here():
    """They average over outputs and multiply the variance by the summed precision; one output agrees."""
    for outputs, agree in ((1, True), (3, False)):
        layer = vbll.Regression(WEIGHTS, outputs, 1 / EXAMPLES, parameterization="dense")
        layer.noise_logdiag.data.normal_(std=0.3)
        features, targets = torch.randn(EXAMPLES, WEIGHTS), torch.randn(EXAMPLES, outputs)
        q = BlockNormal(
            layer.W_mean.detach(),
            layer.W_offdiag.detach().tril(-1) + torch.diag_embed(layer.W_logdiag.detach().exp()),
        )
        noise = layer.noise_logdiag.detach().exp()
        objective = GaussianObjective(noise)(logit_moments(q, features), targets).mean()
        # the rest of their loss does not depend on the data, so a second data set isolates the likelihood
        other = torch.randn(EXAMPLES, outputs)
        ours_difference = objective - GaussianObjective(noise)(logit_moments(q, features), other).mean()
        theirs_difference = layer(features).train_loss_fn(other) - layer(features).train_loss_fn(targets)
        by_hand = (
            (torch.distributions.Normal(features @ q.mean.mT, noise).log_prob(targets)).sum(-1)
            - 0.5 * (logit_moments(q, features).variance / noise.square()).sum(-1)
        ).mean()
        assert float(objective) == pytest.approx(float(by_hand), abs=1e-12)
        assert (abs(float(ours_difference - theirs_difference)) < 1e-10) == agree


def test_their_low_rank_log_determinant_overflows_and_ours_does_not():
    theirs = vbll.utils.distributions.LowRankNormal(
        torch.zeros(4096, dtype=torch.float32),
        torch.randn(4096, 50, dtype=torch.float32),
        torch.full((4096,), 1e-4).float(),
    )
    assert not bool(torch.isfinite(theirs.logdet_covariance))
    factor = torch.randn(1, 4096, 50, dtype=torch.float32)
    mine = LowRankNormal(torch.zeros(1, 4096, dtype=torch.float32), factor, torch.full((1, 4096), 1e-4).float())
    assert mine.entropy().isfinite()


def test_their_predictions_differ_from_call_to_call_and_ours_are_seeded():
    layer = vbll.DiscClassification(WEIGHTS, CLASSES, 1 / EXAMPLES)
    features = 10 * torch.randn(EXAMPLES, WEIGHTS)
    first, second = (layer(features).predictive.probs for _ in range(2))
    assert (first - second).abs().max() > 1e-3


def test_the_constant_is_in_our_kl():
    """The KL of the prior to itself is zero here and half the number of weights there."""
    data = HeadData(torch.randn(4, 3), torch.zeros(4, 2), torch.tensor([0, 1, 0, 1]))
    white = Whitened.of(data, torch.zeros(2, 3), torch.full((2, 3), 0.7))
    rows = GaussianRows(torch.zeros(2, white.inputs.shape[1]), torch.zeros(4, 2))
    assert float(standard_divergence(rows.mean, rows.roots(white.inputs))) == pytest.approx(0.0, abs=1e-12)
