"""Permutation test, temperature scaling and human disagreement; oracles: enumeration, scipy, a known temperature."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from scipy import stats

from pyrolora.inference.evaluation import (
    accuracy,
    fit_temperature,
    human_disagreement,
    negative_log_likelihood,
    paired_permutation_test,
    rank_correlation,
)
from pyrolora.inference.evaluation.metrics import classification_metrics
from pyrolora.models.tasks import Example, Split

# a p-value of 9999 swaps has a standard error of at most 0.005; five of them, over six comparisons, fail once in 2e5 runs
FALSE_ALARM_RATE = 1e-5
SWAP_ERROR = 0.025


def two_methods(examples=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(examples, 3, generator=generator).mul(2).softmax(-1) for _ in range(2))
    return first, second, torch.randint(3, (examples,), generator=generator)


@pytest.mark.parametrize("name", ["nll", "accuracy", "ece", "ece_mass", "mce", "aurc"])
def test_p_value_equals_the_enumeration_of_all_swaps(name):
    first, second, labels = two_methods()
    function = classification_metrics(5)[name].function
    observed = abs(float(function(first, labels) - function(second, labels)))
    reached = 0
    for swaps in itertools.product([False, True], repeat=8):
        swap = torch.tensor(swaps)[:, None]
        one, other = torch.where(swap, second, first), torch.where(swap, first, second)
        reached += abs(float(function(one, labels) - function(other, labels))) >= observed - 1e-9
    result = paired_permutation_test(first, second, labels, name, n_bins=5)
    assert result.difference == pytest.approx(float(function(first, labels) - function(second, labels)), abs=1e-6)
    assert result.p_value == pytest.approx(reached / 2**8, abs=SWAP_ERROR)


def test_p_value_equals_scipy_for_a_mean():
    first, second, labels = two_methods(60)
    losses = [-one.gather(1, labels[:, None])[:, 0].double().log().numpy() for one in (first, second)]
    oracle = stats.permutation_test(
        losses, lambda a, b: a.mean() - b.mean(), permutation_type="samples", n_resamples=9999, rng=1
    )
    result = paired_permutation_test(first, second, labels, "nll")
    assert result.difference == pytest.approx(float(oracle.statistic), abs=1e-6)
    assert result.p_value == pytest.approx(float(oracle.pvalue), abs=SWAP_ERROR)


def test_equal_methods_never_differ_and_a_clear_difference_is_found():
    first, second, labels = two_methods(100)
    assert paired_permutation_test(first, first, labels).p_value == 1
    truth = torch.nn.functional.one_hot(labels, 3).float() * 0.9 + 0.1 / 3
    assert paired_permutation_test(truth, second, labels, "brier").p_value == 1 / 10_000


def test_seeds_are_averaged_before_the_swap():
    first, second, labels = two_methods(50)
    one = paired_permutation_test(first, second, labels, "nll")
    assert paired_permutation_test([first, first], [second, second], labels, "nll") == one
    mixed = paired_permutation_test([first, second], [second, first], labels, "nll")
    assert mixed.difference == pytest.approx(0, abs=1e-12)
    assert mixed.p_value == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "nnl"}, "Did you mean 'nll'"),
        ({"second": [torch.full((8, 3), 1 / 3)] * 2}, "got 2 seeds, expected 1"),
        ({"second": torch.full((8, 2), 0.5), "labels": torch.zeros(8, dtype=torch.int64)}, "same examples and classes"),
        ({"second": torch.full((7, 3), 1 / 3)}, "one label for each row"),
        ({"permutations": 0}, "permutations: got 0"),
    ],
)
def test_permutation_refuses(change, message):
    first, second, labels = two_methods()
    with pytest.raises(ValueError, match=message):
        paired_permutation_test(**({"first": first, "second": second, "labels": labels} | change))


def sampled(temperature, examples=20_000):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(examples, 4, generator=generator, dtype=torch.float64) * 2
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    return (temperature * logits).softmax(-1), labels


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_made_the_labels_is_found(temperature):
    # 20,000 labels know a temperature to about 0.8 %: six standard errors
    probs, labels = sampled(temperature)
    assert fit_temperature(probs[None], labels) == pytest.approx(temperature, rel=0.05)


def test_the_temperature_is_the_minimum_over_a_grid_for_several_draws():
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(80, 3, generator=generator)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    probs = (3 * logits + torch.randn(5, 80, 3, generator=generator)).softmax(-1)
    found = fit_temperature(probs, labels)

    def loss(temperature):
        return float(negative_log_likelihood((probs.double().log() / temperature).softmax(-1).mean(0), labels))

    best = min(torch.linspace(0.5, 20, 2000).tolist(), key=loss)
    assert found == pytest.approx(best, abs=0.02)
    assert loss(found) <= loss(best) + 1e-9


def test_temperature_leaves_the_top_label_and_probabilities_of_zero():
    probs, labels = sampled(3.0, 500)
    probs[0] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    labels[0] = 1
    temperature = fit_temperature(probs[None], labels)
    assert math.isfinite(temperature)
    assert float(accuracy((probs.log() / temperature).softmax(-1), labels)) == float(accuracy(probs, labels))


def test_data_that_name_no_temperature(caplog):
    probs = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    with pytest.raises(ValueError, match="every label is the most probable one"):
        fit_temperature(probs[None], torch.tensor([0, 1]))
    assert fit_temperature(probs[None], torch.tensor([1, 0])) == pytest.approx(math.exp(3))
    assert "knows nothing about them" in caplog.text
    with pytest.raises(ValueError, match=r"probs\[None\]"):
        fit_temperature(probs, torch.tensor([0, 1]))


def tweets(shares, **more):
    examples = tuple(
        Example({"text": "a"}, 0, attributes={"agreement": share}, id=str(i)) for i, share in enumerate(shares)
    )
    return Split("test", "tweets", examples, 2, **more)


def test_disagreement_is_read_and_correlated():
    disagreement = human_disagreement(tweets([1.0, 0.6, 0.8, 0.8]))
    assert disagreement.tolist() == pytest.approx([0.0, 0.4, 0.2, 0.2])
    generator = torch.Generator().manual_seed(0)
    people = torch.randint(4, (150,), generator=generator).double() / 4
    model = people + torch.randn(150, generator=generator)
    interval = rank_correlation(model, people)
    oracle = stats.spearmanr(model.numpy(), people.numpy())
    assert interval.value == pytest.approx(float(oracle.statistic), abs=1e-12)
    assert interval.low < interval.value < interval.high
    # Fisher's approximation, whose width the bootstrap should be near
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * (1 - interval.value**2) / math.sqrt(150), rel=0.25)
    ordered = torch.arange(20).double()
    assert rank_correlation(ordered, ordered).to_dict() == {"value": 1.0, "low": 1.0, "high": 1.0, "note": None}


def test_correlation_says_when_there_is_none():
    constant, varied = torch.ones(9), torch.arange(9).double()
    assert rank_correlation(constant, varied).note == "undefined because the uncertainty is the same for all examples"
    assert rank_correlation(varied, constant).note == "undefined because the disagreement is the same for all examples"
    assert rank_correlation(torch.ones(1), torch.ones(1)).note is not None
    with pytest.raises(ValueError, match="in the same order"):
        rank_correlation(varied, varied[:4])
    with pytest.raises(ValueError, match="row 2 is nan"):
        rank_correlation(torch.where(varied == 2, math.nan, varied), varied)
    with pytest.raises(ValueError, match=r"no example has the attribute 'agreemnt'; they have agreement. Did you mean"):
        human_disagreement(tweets([1.0]), "agreemnt")


def test_examples_without_votes_are_left_out():
    split = tweets([1.0, 0.5, 0.75, 0.6])
    silent = replace(split.examples[1], attributes={})
    split = replace(split, examples=(split.examples[0], silent, *split.examples[2:]))
    disagreement = human_disagreement(split)
    assert disagreement.isnan().tolist() == [False, True, False, False]
    model = torch.tensor([0.1, 9.0, 0.2, 0.3])
    assert rank_correlation(model, disagreement).value == 1
    with pytest.raises(ValueError, match=r"they have none\. Use a task that keeps its votes"):
        human_disagreement(replace(split, examples=(silent,)))
