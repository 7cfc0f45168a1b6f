"""Hit rate and NDCG against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.metrics import ndcg_score, top_k_accuracy_score

from pyrolora.inference.evaluation.ranking import hit_rate, ndcg, target_rank

PROBS = torch.randn(50, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)
LABELS = torch.arange(50) % 20


@pytest.mark.parametrize("k", [1, 5])
def test_against_scikit_learn(k):
    relevance = np.eye(20)[LABELS]
    ours = ndcg(PROBS, LABELS, k)
    rival = [ndcg_score(relevance[i : i + 1], PROBS[i : i + 1].numpy(), k=k) for i in range(50)]
    np.testing.assert_allclose(ours.numpy(), rival, atol=1e-12)
    rival = top_k_accuracy_score(LABELS.numpy(), PROBS.numpy(), k=k, labels=np.arange(20))
    assert float(hit_rate(PROBS, LABELS, k).mean()) == pytest.approx(rival)
    assert float(ndcg(PROBS, LABELS).mean()) == pytest.approx(ndcg_score(relevance, PROBS.numpy()))


def test_a_prediction_that_says_nothing_has_the_rank_of_chance():
    flat = torch.full((3, 20), 0.05)
    assert target_rank(flat, torch.tensor([0, 7, 19])).tolist() == [10.5] * 3
    assert hit_rate(flat, torch.tensor([0, 7, 19])).sum() == 0


def test_k_must_be_positive():
    with pytest.raises(ValueError, match="k counts the first candidates"):
        hit_rate(PROBS, LABELS, 0)
