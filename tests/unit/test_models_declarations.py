"""Priors and adapters declared as text: what is read, what is refused, and that nothing is executed."""

import pyro.distributions as dist
import pytest
import torch

from pyrolora.guides.base import Family
from pyrolora.models.adapters import Adapter, LoRA
from pyrolora.models.declarations import PRIORS, declared, declared_prior
from pyrolora.models.prior_declarations import Flat, learned


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Flat", Flat()),
        ("Flat()", Flat()),
        ("learned(0.05, after=0.25)", learned(0.05, after=0.25)),
    ],
)
def test_a_text_declares_the_same_object(text, expected):
    assert declared_prior(text) == expected


def test_whole_numbers_become_floats():
    prior = declared_prior("Normal(0, scale=2)")
    assert (prior.loc.dtype, prior.scale.item()) == (torch.float32, 2.0)
    assert prior.log_prob(torch.tensor(1.0)) == dist.Normal(0.0, 2.0).log_prob(torch.tensor(1.0))


def test_a_mapping_declares_one_prior_a_pattern():
    priors = declared_prior({"*.lora_A": "Laplace(0, 0.1)", "*.lora_B": "Flat"})
    assert isinstance(priors["*.lora_A"], dist.Laplace)
    assert priors["*.lora_B"] == Flat()


def test_an_adapter_is_declared_with_lists_and_numbers():
    adapter = declared(" LoRA(rank=4, targets=['q_proj'], layers=(-1,)) ", Adapter.registered, "adapter")
    assert adapter == LoRA(rank=4, targets=("q_proj",), layers=(-1,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Normall(0, 1)", r"Unknown prior 'Normall'. Did you mean 'Normal'\? Choices: Cauchy"),
        ("Normal(0, 1", r"Cannot read the prior 'Normal\(0, 1'; expected a form such as"),
        ("dist.Normal(0, 1)", "Cannot read the prior"),
        ("Normal(0, print(1))", "Cannot read the prior"),
        ("", "Cannot read the prior ''"),
        ("Flat(1)", r"The prior 'Flat\(1\)' has arguments that do not fit"),
        ("Flat(width=1)", r"has arguments that do not fit: .*width"),
        ("Normal(0, scal=1)", r"do not fit: Normal has no 'scal'. Did you mean 'scale'\? Settings: loc, scale."),
        ("learned(-1)", "scale of a learned prior must be positive; got -1"),
        (0.2, r"The prior is 0\.2, a float; expected a text such as"),
    ],
)
def test_other_texts_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        declared(text, PRIORS, "prior")


@pytest.mark.parametrize(
    ("text", "makers", "message"),
    [
        ("MixtureLoRA(rank=4, expert=2)", Adapter.registered, "MixtureLoRA has no 'expert'. Did you mean 'experts'"),
        ("BLoB(init_scal=0.1)", Family.registered, "BLoB has no 'init_scal'. Did you mean 'init_scale'"),
    ],
)
def test_the_nearest_setting_is_offered(text, makers, message):
    with pytest.raises(ValueError, match=message):
        declared(text, makers, "object")


def test_nothing_in_the_text_is_executed(tmp_path):
    target = tmp_path / "made"
    with pytest.raises(ValueError, match="Cannot read"):
        declared_prior(f"Normal(0, open({str(target)!r}, 'w'))")
    assert not target.exists()


def test_an_impossible_parameter_is_refused():
    with pytest.raises(ValueError, match="scale"):
        declared_prior("Normal(0, -1)")
