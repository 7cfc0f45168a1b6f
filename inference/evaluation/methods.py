"""The methods that `compare` knows by name: a prior, a guide and an engine each."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from pyrolora.guides.base import Family
from pyrolora.inference.evaluation.temperature import TemperatureScaling
from pyrolora.inference.laplace import Laplace
from pyrolora.inference.map import MAP
from pyrolora.inference.meta_tuning import MetaTuning
from pyrolora.inference.nuts import NUTS
from pyrolora.inference.perturbations import ATTACKS, PERTURBATIONS
from pyrolora.inference.posterior import KINDS
from pyrolora.inference.released import ReleasedBLoB
from pyrolora.inference.retaining import QualityRetaining
from pyrolora.inference.schedules import SCHEDULES
from pyrolora.inference.svi import SVI
from pyrolora.inference.vbll import VBLL
from pyrolora.models.declarations import declared
from pyrolora.models.naming import nearest

ENGINES = {
    "MAP": MAP,
    "SVI": SVI,
    "ReleasedBLoB": ReleasedBLoB,
    "Laplace": Laplace,
    "VBLL": VBLL,
    "NUTS": NUTS,
    "MetaTuning": MetaTuning,
    "TemperatureScaling": TemperatureScaling,
}

# settings that a file declares as text, and what makes them
DECLARED: dict[str, Mapping[str, Any]] = {
    "schedule": SCHEDULES,
    "retaining": {"QualityRetaining": QualityRetaining},
    "attack": ATTACKS,
    "perturbation": PERTURBATIONS,
}

# for posteriors with a width: the prior's scale is the noise that silent weights keep, and this much the network bears
NARROW = "Normal(0, 0.05)"
# a hundredth of the KL's true weight; chosen with NARROW on validation data, see docs/choices.md
COLD = {"steps": 150, "kl_weight": 0.01}
# for points: under the narrow one 300 examples cannot hold A up, and accuracy falls with it
WIDE = "Normal(0, 1)"
# sites inside the network, whatever the adapter: all but head.weight
INSIDE = "*[!d].*"
LAST_LAYER = {INSIDE: WIDE, "head.weight": "logit_scale(2)"}
PAPER = {"objective": "jensen", "mode": "joint", "refit": "none"}
# orthonormal factors have small entries: a rate ten times LoRA's, as PoLAR's release uses
FAST = {"learning_rate": 1e-2}

# a member of a pool, on episodes of images; the divergence counts as much as the clean likelihood, which small networks bear
MEMBER = "PiSSA(rank=8, targets='all-linear')"
EPISODES = {"steps": 300, "learning_rate": 3e-3, "adversarial_weight": 1.0}
CLEAN = {"perturbation": "WeightPerturbation('none', 0.0)"}


@dataclass(frozen=True)
class Method:
    """One row of a comparison, as text and numbers that a YAML file can hold.

    Attributes:
        engine: ``"MAP"``, ``"SVI"``, ``"ReleasedBLoB"``, ``"Laplace"``, ``"VBLL"``, ``"NUTS"``, ``"MetaTuning"``,
            ``"TemperatureScaling"``, or ``"none"`` for the pretrained model.
        prior: declaration of the prior, or ``{glob pattern: declaration}``.
        guide: declaration of the guide, or ``{glob pattern: declaration}``; for SVI and VBLL.
        settings: settings of the engine.
        adapters: declarations of adapters added to the experiment's own.
        adapter: declaration of an adapter in place of the experiment's own.
        estimate: another method whose posterior this one starts from (Laplace, VBLL, NUTS, TemperatureScaling).
        kind: kind of prediction, such as ``"mc"`` or ``"linearised"``; the posterior's usual one by default.
    """

    engine: str
    prior: str | Mapping[str, str] = WIDE
    guide: str | Mapping[str, str] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    adapters: tuple[str, ...] = ()
    adapter: str | None = None
    estimate: str | None = None
    kind: str | None = None

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS:
            raise ValueError(
                f"Unknown kind of prediction {self.kind!r}. Did you mean {nearest(str(self.kind), KINDS)!r}? "
                f"Kinds: {', '.join(KINDS)}."
            )

    @classmethod
    def of_engine(cls, engine: str) -> "Method":
        """A method of an engine with the defaults that were chosen for it.

        Raises:
            ValueError: an unknown engine; the nearest is offered.
        """
        if engine not in ENGINES:
            raise ValueError(
                f"Unknown engine {engine!r}. Did you mean {nearest(str(engine), ENGINES)!r}? Engines: {', '.join(ENGINES)}."
            )
        return METHODS[USUAL[engine]] if engine in USUAL else cls(engine)

    def changed(self, overrides: Mapping[str, Any]) -> "Method":
        """The method with some of its own fields or of its engine's settings replaced.

        Raises:
            ValueError: a name that is neither; the nearest is offered.
        """
        own = {entry.name for entry in fields(self)} - {"settings"}
        allowed = own | self.setting_names()
        changes = {key: value for key, value in overrides.items() if key in own}
        settings = {**self.settings, **{key: value for key, value in overrides.items() if key not in own}}
        for key in overrides:
            if key not in allowed:
                raise ValueError(
                    f"The engine {self.engine} has no setting {key!r}. Did you mean {nearest(key, allowed)!r}? "
                    f"Settings: {', '.join(sorted(allowed))}."
                )
        return Method(**{**vars(self), **changes, "settings": settings})

    def setting_names(self) -> set[str]:
        """Names of the engine's settings that a config may set."""
        if self.engine not in ENGINES:
            return set()
        return {entry.name for entry in fields(ENGINES[self.engine])} - {"guide", "estimate", "checkpoint", "seed"}

    def to_dict(self) -> dict[str, Any]:
        """Everything that `changed` takes, with every default of the engine written out."""
        own = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "settings"}
        own["adapters"] = list(self.adapters)
        engine = ENGINES[self.engine]() if self.engine in ENGINES else None
        settings = {key: self.settings.get(key, getattr(engine, key)) for key in sorted(self.setting_names())}
        # an object's representation is the text that declares it
        return own | {key: repr(value) if is_dataclass(value) else value for key, value in settings.items()}

    def make_engine(self, **more: Any) -> Any:
        """The engine with its settings and whatever the experiment adds (seed, checkpoint folder).

        Raises:
            ValueError: an unknown engine or guide, or a setting out of range.
        """
        if self.engine not in ENGINES:
            raise ValueError(
                f"Unknown engine {self.engine!r}. Did you mean {nearest(self.engine, ENGINES)!r}? "
                f"Engines: {', '.join(ENGINES)}."
            )
        settings = {**self.settings, **more}
        defaults = ENGINES[self.engine]()
        for key, value in self.settings.items():
            default = getattr(defaults, key, None)
            number = isinstance(default, int | float) and not isinstance(default, bool)
            if number and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ValueError(f"The setting {key!r} of {self.engine} is a number; got {value!r}.")
        for key, makers in DECLARED.items():
            if isinstance(text := settings.get(key), str):
                settings[key] = declared(text, makers, key)
        if self.guide is not None:
            guide = self.guide
            if not issubclass(ENGINES[self.engine], SVI):
                raise ValueError(f"The engine {self.engine} takes no guide; got {guide!r}. Use SVI, or leave it out.")
            settings["guide"] = (
                declared(guide, Family.registered, "guide")
                if isinstance(guide, str)
                else {pattern: declared(text, Family.registered, "guide") for pattern, text in guide.items()}
            )
        return ENGINES[self.engine](**settings)


METHODS: dict[str, Method] = {
    "zero-shot": Method("none", prior="Flat()"),
    "mle": Method("MAP", prior="Flat()"),
    "map": Method("MAP"),
    "blob": Method("SVI", prior=NARROW, guide="BLoB()", settings=COLD),
    "blob_release": Method(
        "ReleasedBLoB",
        prior={"*.lora_A": "Normal(0, 0.2)", "*.lora_B": "Flat()"},
        adapters=("LabelLoRA()",),
        kind="flipout",
    ),
    "mean_field": Method("SVI", prior=NARROW, guide="MeanField()", settings=COLD),
    "low_rank": Method(
        "SVI", prior=NARROW, guide={"*.lora_A": "LowRank(rank=4)", "*.lora_B": "Point()"}, settings=COLD
    ),
    "laplace": Method("Laplace", settings={"structure": "diag", "precision": "validation"}, estimate="map"),
    "laplace_kron": Method("Laplace", settings={"structure": "kron", "precision": "validation"}, estimate="map"),
    "laplace_last_layer": Method(
        "Laplace",
        prior={INSIDE: WIDE, "head.weight": "Normal(0, 0.1)"},
        settings={"structure": "last_layer", "precision": "validation"},
        adapters=("LastLayer()",),
    ),
    "vbll": Method("VBLL", prior=LAST_LAYER, adapters=("LastLayer()",)),
    "vbll_paper": Method(
        "VBLL", prior=LAST_LAYER, guide="BlockCovariance()", settings=PAPER, adapters=("LastLayer()",)
    ),
    "vbll_on_map": Method("VBLL", prior=LAST_LAYER, adapters=("LastLayer()",), estimate="map"),
    "meta_tuning": Method("MetaTuning", prior="Relative(0.1)", settings=EPISODES | CLEAN, adapter=MEMBER),
    "amt": Method("MetaTuning", prior="Relative(0.1)", settings=EPISODES | {"attack": "PGD(0.03)"}, adapter=MEMBER),
    "nuts_last_layer": Method("NUTS", prior=LAST_LAYER, adapters=("LastLayer()",), estimate="map"),
    "polar_mle": Method("MAP", prior="Flat()", settings=FAST, adapter="PoLAR()"),
    "polar_map": Method("MAP", settings=FAST, adapter="PoLAR()"),
    "polar_vbll": Method("VBLL", prior=LAST_LAYER, settings=FAST, adapters=("LastLayer()",), adapter="PoLAR()"),
    "polar_vbll_paper": Method(
        "VBLL",
        prior=LAST_LAYER,
        guide="BlockCovariance()",
        settings=FAST | PAPER,
        adapters=("LastLayer()",),
        adapter="PoLAR()",
    ),
}

# whose prior and settings a new method of an engine starts from
USUAL = {"MAP": "map", "SVI": "blob", "Laplace": "laplace", "VBLL": "vbll", "NUTS": "nuts_last_layer"}
