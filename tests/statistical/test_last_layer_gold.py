"""VBLL against NUTS on frozen features: what each objective does to the width of logit differences.

NUTS keeps 1000 draws with an effective size above 250 for every logit (checked). A variance of a logit difference, averaged
over as many examples as were trained on and all pairs, is then known to about 5 %, as is the ratio. Data and sampler are
seeded; over seeds of the sampler fewer than 1 run in 100 would fail.
"""

import pyro.distributions as dist
import pytest
import torch

from pyrolora.guides import ClassContrasts, Empirical, FullCovariance, LowRankPrecision, build_guide
from pyrolora.inference.evaluation.gold import compare_to_gold
from pyrolora.inference.features import FeatureCache
from pyrolora.inference.map import MAP
from pyrolora.inference.nuts import NUTS
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.vbll import VBLL
from pyrolora.models.adapters import LastLayer
from pyrolora.models.backbones import Backbone
from pyrolora.models.program import BayesianModel
from pyrolora.models.tasks import Example, Split, Task, Verbaliser

NAMES = ("sport", "business", "politics", "tech", "news")


@pytest.fixture
def build(tiny_llama, tiny_tokenizer):
    """A last layer of weights Normal(0, 2) over fixed standard Normal features, and its task."""

    def make(examples, classes, width, **layer):
        source = torch.Generator().manual_seed(1)
        features = torch.randn(2 * examples, width, generator=source, dtype=torch.float64)
        truth = (5 / width) ** 0.5 * torch.randn(classes, width, generator=source, dtype=torch.float64)
        labels = torch.multinomial((features @ truth.mT).softmax(-1), 1, generator=source)[:, 0]
        rows = [Example({"text": "the dog"}, int(label), id=str(i)) for i, label in enumerate(labels)]
        train = Split("train", "frozen", tuple(rows[:examples]), classes)
        test = Split("test", "frozen", tuple(rows[examples:]), classes)
        shape = Verbaliser("text : {text} topic :", labels=NAMES[:classes])
        task = Task("frozen", NAMES[:classes], shape, train, test, test, "", "")
        network = tiny_llama(torch.float64, hidden_size=width, num_attention_heads=1, num_key_value_heads=1, head_dim=4)
        backbone = Backbone(network, tiny_tokenizer, "tiny")
        model = BayesianModel(backbone, task, LastLayer(centre="zero", **layer), dist.Normal(0.0, 2.0))
        # a batch says which rows it holds, not of which split: their labels tell the two apart
        known = {tuple(split.labels.tolist()): part for split, part in (
            (model.encode(train), features[:examples]), (model.encode(test), features[examples:]))}  # fmt: skip
        encode = model.encode

        def remember(data):
            encoded = encode(data)
            model.features = lambda batch, draw: known[tuple(encoded.labels.tolist())][batch["index"]]
            return encoded

        model.encode = remember
        return model

    return make


# on the second problem the best factorised posterior, which "mc" finds, is 1.36 times too wide, and that of the class
# contrasts is not: see docs/polar_vbll.md
RIGHT = ("tilted", "mc", "mc joint", "mc contrasts")


@pytest.mark.parametrize(
    ("examples", "classes", "width", "right"),
    [(60, 3, 5, RIGHT), (60, 3, 6, ("tilted", "mc joint", "mc contrasts")), (100, 5, 10, RIGHT)],
    ids=["60-3-5", "60-3-6", "100-5-10"],
)
def test_tilted_and_sampled_objectives_have_the_right_width_and_jensen_has_not(build, examples, classes, width, right):
    model = build(examples, classes, width)
    estimate = MAP(steps=1).iterate(model, model.task.train).posterior()
    gold = NUTS(draws=500, warmup=150, chains=2, seed=3).fit(model, model.task.train, progress=False)
    assert gold.record["rhat"] < 1.02
    assert gold.record["ess"] > 250
    assert gold.record["divergences"] == 0
    engines = {
        "jensen": VBLL(refit="jensen"),
        "tilted": VBLL(refit="tilted", guide=LowRankPrecision(examples)),
        "mc": VBLL(refit="mc", objective_draws=64, guide=LowRankPrecision(examples)),
        "mc joint": VBLL(refit="mc", objective_draws=64, guide=FullCovariance()),
        "mc contrasts": VBLL(objective="tilted", refit="mc", objective_draws=256, guide=ClassContrasts()),
    }
    fitted = {
        name: engine.fit(model, model.task.train, estimate=estimate, progress=False)
        for name, engine in engines.items()
        if name == "jensen" or name in right
    }
    table = compare_to_gold(gold, fitted, model.task.test)
    for name in right:
        assert 0.7 < table[name].variance_ratio < 1.3
        assert table[name].kl < 0.005
    # nearer than the best posterior whose classes are independent, and within the tolerance asked of every posterior
    assert 0.8 < table["mc contrasts"].variance_ratio < 1.25
    assert table["mc contrasts"].kl < 0.0015
    assert table["jensen"].variance_ratio < 0.5
    assert all(table["jensen"].kl > table[name].kl for name in right)
    assert "| tilted |" in table.to_markdown()
    assert table.noise < 0.001
    own = compare_to_gold(gold, {"itself": gold}, model.task.test)["itself"]
    assert own.variance_ratio == pytest.approx(1.0, abs=1e-6)
    assert own.kl == pytest.approx(0.0, abs=1e-9)


def test_the_noise_of_a_finite_number_of_draws_is_that_of_a_mean(build):
    """Independent draws: to second order half the variance of each mean probability over the probability, added up."""
    model, count = build(40, 3, 6), 2000
    guide = build_guide(Empirical(count), model)
    factor = dict(guide.items())["head.weight"]
    factor.set_draws(0.7 * torch.randn(count, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    table = compare_to_gold(Posterior(model, guide, {}), {}, model.task.test)
    features = FeatureCache(None).features(model, guide.mean(), model.task.test).values
    probs = torch.einsum("nd,scd->snc", features, factor.values).softmax(-1)
    expected = float((0.5 * probs.var(0) / count / probs.mean(0)).sum(-1).mean())
    # an average over 40 rows of 18 weights' noise, a chi-squared of 12 degrees of freedom: a factor of 3 is 1 run in 1000
    assert expected / 3 < table.noise < 3 * expected


def test_an_identified_head_has_the_same_predictions(build):
    """Two classes: one vector of weights whose prior variance is that of a difference of two."""
    both, one = build(60, 2, 6), build(60, 2, 6, identified=True)
    one.prior = type(one.prior)(dist.Normal(0.0, 2.0 * 2**0.5), one.adapter_sites, dtype=torch.float64)
    probs = []
    for model in (both, one):
        gold = NUTS(draws=600, warmup=150, chains=2).fit(model, model.task.train, progress=False)
        assert gold.record["rhat"] < 1.02
        probs.append(gold.predict(model.task.test, kind="mc", draws=1200).mean_probs)
    assert (probs[0] - probs[1]).abs().max() < 0.03


def test_a_gold_standard_is_a_posterior_like_the_others(build, tmp_path):
    model = build(40, 3, 6)
    gold = NUTS(draws=30, warmup=20, chains=2).fit(model, model.task.train, progress=False)
    assert gold.kinds == ("mc", "mean")
    assert not gold.is_point
    draws = gold.sample(5, generator=torch.Generator().manual_seed(0))
    assert draws["head.weight"].shape == (5, 3, 6)
    assert gold.log_prob(draws).isfinite().all()
    assert gold.log_prob({"head.weight": draws["head.weight"] + 1}).isneginf().all()
    loaded = Posterior.from_pretrained(gold.save_pretrained(tmp_path / "gold"), model=model)
    again = loaded.sample(5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draws["head.weight"], again["head.weight"])
    tree = gold.to_arviz(draws=3)
    assert tree["posterior"]["head.weight"].shape == (1, 3, 3, 6)


def test_what_it_refuses(build):
    for draws in (0, 3):
        with pytest.raises(ValueError, match=f"draws must be at least 4, .* effective sample size .*; got {draws}"):
            NUTS(draws=draws)
    with pytest.raises(ValueError, match="target_accept is a probability"):
        NUTS(target_accept=1.0)
    model, other = build(40, 3, 6), build(40, 3, 6)
    other.prior = type(other.prior)(dist.StudentT(3.0), other.adapter_sites, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"needs a Normal prior on head\.weight; it is a StudentT"):
        NUTS(draws=4).fit(other, other.task.train, progress=False)
    assert NUTS(draws=4, warmup=2, chains=1).fit(model, model.task.train, progress=False).record["draws"] == 4
    gold = NUTS(draws=4, warmup=2, chains=2).fit(model, model.task.train, progress=False)
    foreign = build(40, 3, 8)
    estimate = MAP(steps=1).iterate(foreign, foreign.task.train).posterior()
    with pytest.raises(ValueError, match="belongs to another network"):
        compare_to_gold(gold, {"other": estimate}, model.task.test)
