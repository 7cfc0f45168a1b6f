"""Gaussian logits through the softmax: quasi-random points and closed forms against brute-force Monte Carlo."""

import pytest
import torch

from pyrolora.inference.links import LINKS, LOGIT_DRAWS, laplace_bridge, mean_field_softmax, probit, softmax_draws


def test_softmax_draws_have_the_moments_of_monte_carlo():
    mean = torch.tensor([[0.5, -1.0, 0.2], [2.0, 0.0, -2.0]], dtype=torch.float64)
    root = torch.tensor(
        [[[1.0, 0, 0], [0.6, 0.8, 0], [-0.5, 0.3, 0.4]], [[0.1, 0, 0], [0, 2.0, 0], [0, 0, 1.0]]]
    ).double()
    found = softmax_draws(mean, root @ root.mT, torch.Generator().manual_seed(0))
    brute = (mean + (root @ torch.randn(200_000, 2, 3, 1, dtype=torch.float64))[..., 0]).softmax(-1)
    # 256 independent draws would have a standard error of sd / 16; six of them at 12 numbers fail once in 4e7 runs,
    # and quasi-random points are several times better
    error = brute.std(0) / 16
    assert ((found.mean(0) - brute.mean(0)).abs() < 6 * error).all()
    assert ((found.mean(0) - brute.mean(0)).abs() < error).all(), (
        "worse than a third of what plain Monte Carlo would do"
    )
    torch.testing.assert_close(found.std(0), brute.std(0), rtol=0.15, atol=0)


def test_zero_covariance_gives_the_softmax_and_missing_options_none():
    mean = torch.tensor([[0.5, -1.0, -torch.inf], [0.0, 1.0, 2.0]], dtype=torch.float64)
    found = softmax_draws(mean, torch.zeros(2, 3, 3, dtype=torch.float64), torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, mean.softmax(-1).expand(LOGIT_DRAWS, -1, -1), rtol=0, atol=1e-15)
    spread = torch.diag_embed(torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]], dtype=torch.float64))
    assert (softmax_draws(mean, spread, torch.Generator().manual_seed(0))[:, 0, 2] == 0).all()


def random_gaussians(rows=6, classes=4, scale=1.0):
    generator = torch.Generator().manual_seed(2)
    mean = 1.5 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    root = scale * torch.randn(rows, classes, classes, generator=generator, dtype=torch.float64) / classes**0.5
    return mean, root @ root.mT


def brute_force(mean, covariance, draws=200_000):
    root = torch.linalg.cholesky(covariance + 1e-12 * torch.eye(mean.shape[-1], dtype=torch.float64))
    noise = torch.randn(draws, *mean.shape, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return (mean + (root @ noise)[..., 0]).softmax(-1).mean(0)


@pytest.mark.parametrize("link", LINKS.values(), ids=LINKS)
def test_closed_forms_are_probabilities(link):
    found = link(*random_gaussians())
    torch.testing.assert_close(found.sum(-1), torch.ones(6, dtype=torch.float64))
    assert (found > 0).all()


@pytest.mark.parametrize("link", [mean_field_softmax, probit])
def test_closed_forms_without_variance_are_the_softmax(link):
    mean, covariance = random_gaussians()
    torch.testing.assert_close(link(mean, torch.zeros_like(covariance)), mean.softmax(-1), rtol=0, atol=1e-14)


def test_mean_field_is_near_monte_carlo():
    # Monte Carlo is right to 1e-3; the rest is the approximation itself, some 0.04 at logit sds of about 1
    mean, covariance = random_gaussians()
    wanted = brute_force(mean, covariance)
    assert (mean_field_softmax(mean, covariance) - wanted).abs().max() < 0.05
    assert (mean.softmax(-1) - wanted).abs().max() > 0.09, "ignoring the covariance must be worse to prove anything"


def test_mean_field_of_two_classes_is_the_logistic_probit():
    mean, covariance = random_gaussians(classes=2, scale=2.0)
    gap = mean[:, 0] - mean[:, 1]
    spread = covariance[:, 0, 0] + covariance[:, 1, 1] - 2 * covariance[:, 0, 1]
    wanted = torch.sigmoid(gap / (1 + torch.pi / 8 * spread).sqrt())
    torch.testing.assert_close(mean_field_softmax(mean, covariance)[:, 0], wanted, rtol=0, atol=1e-14)
    # MacKay's approximation of the logistic-normal integral is right to 0.02
    assert (wanted - brute_force(mean, covariance)[:, 0]).abs().max() < 0.02


def test_a_common_shift_of_all_logits_leaves_mean_field_alone_and_changes_probit():
    mean, covariance = random_gaussians()
    shifted = covariance + 3.0  # one Normal of variance 3 added to all logits of a row
    found = mean_field_softmax(mean + 2, shifted)
    torch.testing.assert_close(found, mean_field_softmax(mean, covariance), rtol=0, atol=1e-12)
    assert (probit(mean, shifted) - probit(mean, covariance)).abs().max() > 0.01


def test_mean_field_and_probit_leave_missing_options_out():
    mean, covariance = random_gaussians()
    mean[2, 3] = -torch.inf
    covariance[2, 3], covariance[2, :, 3] = 0, 0
    for link in (mean_field_softmax, probit):
        found = link(mean, covariance)
        assert found[2, 3] == 0
        torch.testing.assert_close(found[2, :3], link(mean[2:3, :3], covariance[2:3, :3, :3])[0], rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match="linearised_mf1"):
        laplace_bridge(mean, covariance)


def test_bridge_of_logits_without_variance_at_zero_sum_is_the_softmax():
    generator = torch.Generator().manual_seed(3)
    mean = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    for covariance in (torch.zeros(4, 3, 3), torch.ones(4, 3, 3)):
        # an equal shift of all logits is the only thing that is uncertain in the second
        torch.testing.assert_close(laplace_bridge(mean, covariance.double()), mean.softmax(-1), rtol=1e-12, atol=0)
    one = torch.randn(4, 3, 1, generator=generator, dtype=torch.float64)
    rank_one = laplace_bridge(mean, one @ one.mT)
    assert rank_one.isfinite().all()
    torch.testing.assert_close(rank_one.sum(-1), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float64, 10.0**power) for power in (-300, -160, -38, 100, 300)]
    + [(torch.float32, 10.0**power) for power in (-44, -40, -38, -30, 30)],
    ids=str,
)
def test_bridge_does_not_depend_on_the_unit_of_the_covariance(dtype, scale):
    mean = torch.tensor([[1.0, 0.0, -1.0], [0.3, -2.0, 0.5]], dtype=dtype)
    correlation = torch.tensor([[1.0, 0.3, 0.0], [0.3, 0.5, 0.0], [0.0, 0.0, 0.7]], dtype=torch.float64)
    tiny = (scale * correlation).to(dtype)
    # what is left of the smallest numbers has few digits: the same ones in a type that has room for them
    wanted = laplace_bridge(mean.double(), (tiny.double() / scale).expand(2, 3, 3))
    found = laplace_bridge(mean, tiny.expand(2, 3, 3))
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=0)


def test_bridge_of_logits_whose_sum_is_almost_fixed_is_finite():
    """Conditioning on a sum of zero moves such logits by hundreds, beyond what single precision has an exponential of."""
    mean = torch.tensor([[-0.40861678, 0.25737107, -0.99528807], [-1.9564945, 0.042667165, 0.51470935]])
    covariance = torch.tensor(
        [
            [
                [6.899744e-05, -7.240887e-05, 3.5307253e-06],
                [-7.240887e-05, 7.598898e-05, -3.7052948e-06],
                [3.5307253e-06, -3.7052948e-06, 1.8067368e-07],
            ],
            [
                [0.00022820465, -0.0001824934, -4.96198e-05],
                [-0.0001824934, 0.0001459385, 3.968055e-05],
                [-4.96198e-05, 3.968055e-05, 1.0789107e-05],
            ],
        ]
    )
    found = laplace_bridge(mean, covariance)
    torch.testing.assert_close(found.sum(-1), torch.ones(2))
    torch.testing.assert_close(found.double(), laplace_bridge(mean.double(), covariance.double()), rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bridge_does_not_condition_on_a_sum_whose_variance_is_round_off(dtype):
    mean = torch.tensor([[0.3, -0.2, 0.5], [1.0, 0.2, -0.7]], dtype=dtype)
    change = torch.tensor([[0.1, 0.2, -0.3], [0.7, -0.4, -0.3]], dtype=dtype)
    spread = torch.tensor([[2.0, -1.0, -1.0], [-1.0, 2.0, -1.0], [-1.0, -1.0, 2.0]], dtype=dtype) / 30
    covariance = change[..., None] * change[:, None] + spread
    first, second = (x.double() for x in (mean, covariance.diagonal(dim1=-2, dim2=-1)))
    alpha = (1 - 2 / 3 + first.exp() * (-first).exp().sum(-1, keepdim=True) / 9) / second
    wanted = (alpha / alpha.sum(-1, keepdim=True)).to(dtype)
    torch.testing.assert_close(laplace_bridge(mean, covariance), wanted, rtol=1e-5, atol=0)


def test_bridge_is_the_dirichlet_of_its_source():
    """Equation by equation in plain loops, with the conditioning on a zero sum as a dense projection."""
    mean, covariance = random_gaussians(scale=0.5)
    for row in range(len(mean)):
        ones = torch.ones(4, dtype=torch.float64)
        gain = covariance[row] @ ones / (ones @ covariance[row] @ ones)
        project = torch.eye(4, dtype=torch.float64) - gain[:, None] * ones
        m, v = project @ mean[row], (project @ covariance[row] @ project.T).diagonal()
        alpha = [(1 - 2 / 4 + float(m[k].exp()) / 16 * float((-m).exp().sum())) / float(v[k]) for k in range(4)]
        wanted = torch.tensor(alpha, dtype=torch.float64) / sum(alpha)
        torch.testing.assert_close(laplace_bridge(mean, covariance)[row], wanted, rtol=1e-9, atol=0)
