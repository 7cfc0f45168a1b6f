"""Every engine with every guide, adapter, noise scope, float type and checkpointing: it works, or it says why not.

Engine x guide x adapter is walked in full, since their code meets, at the defaults of the rest (example noise, float32,
no checkpointing). Noise acts through effect handlers: every scope meets every engine, with both adapters in the model.
Float type and checkpointing act in the backbone: all six pairs meet every engine under example noise, and `BLoB` under
weight and token noise too. Left out are float type x noise for the other engines, and both with a single adapter: no code
there looks at two of them.
"""

import copy
import dataclasses
import math

import pyro.distributions as dist
import pytest
import torch

from pyrolora.guides import (
    BLoB,
    BlockCovariance,
    ClassContrasts,
    FullCovariance,
    KroneckerNormal,
    LowRank,
    MeanField,
    Point,
    StiefelNormal,
)
from pyrolora.inference.laplace import Laplace
from pyrolora.inference.map import MAP
from pyrolora.inference.nuts import NUTS
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.released import ReleasedBLoB
from pyrolora.inference.schedules import BlockSchedule
from pyrolora.inference.svi import SVI
from pyrolora.inference.vbll import VBLL
from pyrolora.models.adapters import (
    S2FT,
    CorDA,
    FullRank,
    LabelLoRA,
    LastLayer,
    LoRA,
    LoRAPool,
    MixtureLoRA,
    MoEfiedLoRA,
    PiSSA,
    PoLAR,
)
from pyrolora.models.prior_declarations import Flat, learned

STEPS = 2
ADAPTERS = {
    "LoRA": (LoRA(rank=2),),
    "LoRA+LastLayer": (LoRA(rank=2), LastLayer()),
    "LoRA+LabelLoRA": (LoRA(rank=2), LabelLoRA(rank=2)),
    "LastLayer": (LastLayer(),),
    "PoLAR+LastLayer": (PoLAR(rank=2), LastLayer()),
    "PiSSA": (PiSSA(rank=2, iterations=4),),
    "PiSSA fixed_B": (PiSSA(rank=2, form="fixed_B"),),
    "PiSSA subspace": (PiSSA(rank=2, form="subspace"),),
    "CorDA": (CorDA(rank=2),),
    "S2FT": (S2FT(heads=1, channels=4, targets=("o_proj", "down_proj", "v_proj"), select="activation"),),
    "LoRAPool": (LoRAPool(members=2, rank=2, concentration=1.0),),
    "MixtureLoRA": (MixtureLoRA(rank=2, experts=2, gate_input="prompt"),),
    **{
        f"MixtureLoRA {gate}": (MixtureLoRA(rank=2, experts=2, gate_input="prompt", gate=gate),)
        for gate in ("dirichlet", "concrete", "categorical")
    },
    "FullRank": (FullRank(targets=("q_proj",)),),
    "FullRank+embeddings": (FullRank(targets=("v_proj",), layers=(1, 2), embeddings=True),),
    "MoEfiedLoRA+LastLayer": (MoEfiedLoRA(rank=2, experts=4), LastLayer()),
}
ENGINES = {
    "MAP": lambda noise: MAP(steps=STEPS, noise=noise),
    "SVI Point": lambda noise: SVI(guide=Point(), steps=STEPS, noise=noise),
    "SVI MeanField": lambda noise: SVI(guide=MeanField(), steps=STEPS, noise=noise),
    "SVI BLoB": lambda noise: SVI(guide=BLoB(), steps=STEPS, noise=noise),
    "SVI LowRank": lambda noise: SVI(guide=LowRank(rank=2), steps=STEPS, noise=noise),
    "SVI FullCovariance": lambda noise: SVI(guide=FullCovariance(), steps=STEPS, noise=noise),
    "SVI KroneckerNormal": lambda noise: SVI(guide=KroneckerNormal(rank=2), steps=STEPS, noise=noise),
    "SVI StiefelNormal": lambda noise: SVI(
        guide={"*.polar_[XY]": StiefelNormal(), "*theta": MeanField(), "head.weight": MeanField()},
        steps=STEPS,
        noise=noise,
    ),
    "Laplace diag": lambda noise: Laplace(estimate=MAP(steps=STEPS, noise=noise)),
    "Laplace kron": lambda noise: Laplace(structure="kron", estimate=MAP(steps=STEPS, noise=noise)),
    "Laplace kron_lowrank": lambda noise: Laplace(
        structure="kron_lowrank", rank=3, estimate=MAP(steps=STEPS, noise=noise)
    ),
    "Laplace last_layer": lambda noise: Laplace(structure="last_layer", estimate=MAP(steps=STEPS, noise=noise)),
    "VBLL": lambda noise: VBLL(steps=STEPS, noise=noise),
    "VBLL joint": lambda noise: VBLL(guide=BlockCovariance(), mode="joint", refit="none", steps=STEPS, noise=noise),
    "VBLL contrasts": lambda noise: VBLL(
        guide=ClassContrasts(), objective="tilted", refit="mc", steps=STEPS, noise=noise
    ),
    "NUTS": lambda noise: NUTS(draws=20, warmup=10, chains=2),
}
# where an engine is at home: a posterior on a manifold needs sites that live there
HOME = {"SVI StiefelNormal": "PoLAR+LastLayer"}
NO_TOKEN_NOISE = r"There is no noise='\w+' for a \w+"
# (engine, adapter) or (engine, noise) -> a part of the sentence that says why not
REFUSED = {
    # signs leave the law of independent weights as it is, and of no others
    **{(f"SVI {name}", "flipout"): NO_TOKEN_NOISE for name in ("FullCovariance", "LowRank", "KroneckerNormal")},
    **{
        (engine, name): r"Add LastLayer\(\) to the model's adapters"
        for engine in ("Laplace last_layer", "VBLL", "VBLL joint", "VBLL contrasts", "NUTS")
        for name in ADAPTERS
        if "Last" not in name
    },
    **{
        (
            f"Laplace {structure}",
            "FullRank+embeddings",
        ): r"'embed_tokens.weight' is not a stack of weights of linear maps"
        for structure in ("diag", "kron", "kron_lowrank")
    },
    **{
        (
            f"Laplace {structure}",
            "MixtureLoRA categorical",
        ): "none beside gate='categorical', whose rows go through a network"
        for structure in ("diag", "kron", "kron_lowrank")
    },
    **{("SVI StiefelNormal", name): r"'\*\.polar_\[XY\]' matches no site" for name in ADAPTERS if "PoLAR" not in name},
    **{("SVI StiefelNormal", noise): r"polar_\w' \w+ no weight|linear" for noise in ("token", "flipout")},
    ("SVI BLoB", "PoLAR+LastLayer"): r"BLoB makes sites that match",
    **{
        ("SVI BLoB", name): r"name the sites, as in BLoB\(sites='head.weight'\)"
        for name in ("LastLayer", "S2FT", "FullRank", "FullRank+embeddings")
    },
}

PAIRS = [(engine, adapter, "example", torch.float32, False) for engine in ENGINES for adapter in ADAPTERS]
SCOPES = [
    (engine, HOME.get(engine, "LoRA+LastLayer"), noise, torch.float32, False)
    for engine in ENGINES
    for noise in ("weight", "token", "flipout")
]
DTYPES = [
    (engine, HOME.get(engine, "LoRA+LastLayer"), noise, dtype, checkpointing)
    for engine, noise in (
        ("SVI BLoB", "example"),
        ("SVI BLoB", "weight"),
        ("SVI BLoB", "token"),
        ("SVI BLoB", "flipout"),
        *((name, "example") for name in ENGINES),
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float64)
    for checkpointing in (False, True)
]
# once each, in the order of the lists above
SELECTION = list(dict.fromkeys(PAIRS + SCOPES + DTYPES))


@pytest.fixture
def make(three_topics_model, three_shapes_model):
    def build(adapter, dtype, checkpointing, prior=None):
        # its experts are channels of a feed-forward layer as vision transformers have it
        built = three_shapes_model if "MoEfied" in adapter else three_topics_model
        model = built(dtype, adapter=list(ADAPTERS[adapter]), prior=prior)
        if checkpointing:
            model.backbone.checkpoint_gradients()
        return model

    return build


def draws_of(posterior):
    return posterior.sample(3, generator=torch.Generator().manual_seed(0))


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name])


def check_contract(model, posterior, folder):
    """What every posterior promises, whichever engine fitted it."""
    draws = draws_of(posterior)
    for name, site in model.sites.items():
        assert draws[name].shape == (3, *site.shape)
        assert draws[name].dtype == model.backbone.site_dtype
        assert draws[name].isfinite().all()
        assert posterior.mean()[name].shape == site.shape
    assert posterior.log_prob(draws).shape == (3,)

    for kind in posterior.kinds:
        predictive = posterior.predict(
            model.task.test, draws=4, kind=kind, generator=torch.Generator().manual_seed(0), batch_size=4
        )
        assert predictive.probs.shape[1:] == (len(model.task.test), 3)
        assert predictive.probs.shape[0] == 1 or kind != "mean"
        torch.testing.assert_close(predictive.probs.sum(-1), torch.ones(predictive.probs.shape[:2]))
        assert predictive.log_likelihood.isfinite().all()

    assert_same(draws_of(Posterior.from_pretrained(posterior.save_pretrained(folder), model=model)), draws)

    twin = copy.deepcopy(posterior.guide)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    assert_same(draws_of(posterior), draws)

    tree = posterior.to_arviz(draws=2, data=model.task.test)
    assert set(tree["posterior"].data_vars) == set(model.sites)
    assert tree["posterior_predictive"]["probability"].shape == (1, 2, len(model.task.test), 3)


def readable(level):
    return (
        {False: "plain", True: "checkpointed"}[level] if isinstance(level, bool) else str(level).removeprefix("torch.")
    )


@pytest.mark.parametrize(("engine", "adapter", "noise", "dtype", "checkpointing"), SELECTION, ids=readable)
def test_it_works_or_says_why_not(make, tmp_path, engine, adapter, noise, dtype, checkpointing):
    model = make(adapter, dtype, checkpointing)

    def fit():
        return ENGINES[engine](noise).fit(model, model.task.train, progress=False)

    if reason := REFUSED.get((engine, adapter)) or REFUSED.get((engine, noise)):
        with pytest.raises(ValueError, match=reason):
            fit()
        return
    check_contract(model, fit(), tmp_path / "posterior")


# engines that optimise step by step take a schedule; posteriors that tie layers together refuse it
SCHEDULED = [name for name in ENGINES if name.startswith(("MAP", "SVI", "VBLL"))]


@pytest.mark.parametrize("engine", SCHEDULED)
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("state", ["drop", "offload"])
def test_every_schedule_works_or_says_why_not(make, tmp_path, engine, adapter, state):
    model = make(adapter, torch.float32, False)
    schedule = BlockSchedule(active=1, every=1, state=state)

    def fit():
        made = dataclasses.replace(ENGINES[engine]("example"), schedule=schedule)
        return made.fit(model, model.task.train, progress=False)

    if reason := REFUSED.get((engine, adapter)):
        with pytest.raises(ValueError, match=reason):
            fit()
    elif adapter == "LastLayer":
        with pytest.raises(ValueError, match="1 blocks are to be active, and the model has 0"):
            fit()
    elif engine == "SVI FullCovariance":
        with pytest.raises(ValueError, match="posteriors that are independent from layer to layer"):
            fit()
    else:
        check_contract(model, fit(), tmp_path / "posterior")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("prior", [Flat(), learned(0.1), dist.Laplace(0.0, 0.2)], ids=["flat", "learned", "laplace"])
def test_every_prior_works_or_says_why_not(make, tmp_path, engine, prior):
    model = make(HOME.get(engine, "LoRA+LastLayer"), torch.float32, False, prior)

    def fit():
        return ENGINES[engine]("example").fit(model, model.task.train, progress=False)

    if engine.startswith(("Laplace", "VBLL", "NUTS")) and not isinstance(prior, type(learned(0.1))):
        with pytest.raises(ValueError, match="needs a Normal prior"):
            fit()
        return
    check_contract(model, fit(), tmp_path / "posterior")


RELEASED = {"*.lora_A": dist.Normal(0.0, 0.2), "*.lora_B": Flat()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=readable)
@pytest.mark.parametrize("checkpointing", [False, True], ids=readable)
@pytest.mark.parametrize("engine", ["released", "natural widths"])
def test_engines_that_know_few_priors_keep_the_contract_under_those(make, tmp_path, engine, dtype, checkpointing):
    model = make("LoRA+LabelLoRA", dtype, checkpointing, RELEASED)
    made = ReleasedBLoB(steps=STEPS) if engine == "released" else SVI(guide=BLoB(), steps=STEPS, width="natural")
    check_contract(model, made.fit(model, model.task.train, progress=False), tmp_path / "posterior")


@pytest.mark.parametrize("engine", [name for name in ENGINES if name.startswith("SVI")])
def test_svi_histories_are_finite_and_one_entry_a_step(make, engine):
    model = make(HOME.get(engine, "LoRA+LastLayer"), torch.float32, False)
    history = ENGINES[engine]("example").fit(model, model.task.train, progress=False).record["history"]
    assert [entry["step"] for entry in history] == list(range(1, STEPS + 1))
    assert all(math.isfinite(value) for entry in history for value in entry.values())


def test_the_selection_walks_each_factor():
    assert {entry[:2] for entry in SELECTION} == {(engine, adapter) for engine in ENGINES for adapter in ADAPTERS}
    for place, levels in ((2, 4), (3, 3), (4, 2)):
        assert len({entry[place] for entry in SELECTION}) == levels
