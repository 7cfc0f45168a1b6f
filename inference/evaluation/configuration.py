"""What decides the outcome of a comparison, as a YAML file and options on the command line can say it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from pyrolora.inference.evaluation.methods import METHODS, Method
from pyrolora.models.naming import nearest

# a method of any name with this behind it is that method with its logits scaled on validation data
TEMPERATURE = "temperature"


class Loader(yaml.SafeLoader):
    """YAML 1.1 reads ``1e-3`` as text, for want of a dot; here it is a number."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


@dataclass(frozen=True)
class ExperimentConfig:
    """Everything that decides the outcome of a comparison.

    Usage::

        compare(ExperimentConfig(task="bbc_headlines", ood=("crowd_tweets",), train_size=300), "runs/demo")

    Attributes:
        model: backbone, as `load_backbone` takes it.
        task: task, as `task` takes it.
        data_dir: folder with the task's files; None for its package or the hub.
        ood: tasks whose test examples are asked with this task's prompt.
        shift: tasks of the same classes whose test examples are asked with this task's prompt and judged.
        methods: names from `METHODS` or of ``settings``; the pretrained model comes first in any case.
            ``"map+temperature"`` is ``map`` with its logits scaled on validation data, and so for any other.
        adapter: declaration of the adapter, such as ``"PiSSA(rank=8)"`` or ``"pissa"``.
        schedule: declaration of the blocks that MAP and SVI train when, such as ``"BlockSchedule(active=2)"``; None for all.
        dtype: type of the frozen weights; ``"auto"`` takes bfloat16 where the device multiplies it in hardware.
        device: where the network runs.
        max_length: longest prompt in tokens; longer ones lose their beginning.
        train_size: training examples; None for all.
        seeds: number of seeds, 0 to seeds - 1; each has its own training subset, start, order and draws.
        draws: weight draws of a prediction.
        ood_size: examples of each foreign task at most.
        test_size: test examples; None for all.
        miscoverage: share of conformal sets that may miss the true class; None for no sets. They are calibrated on
            validation data.
        settings: method -> changes of its engine's settings, prior or guide. A new name makes a new method, from
            ``engine`` or as a variant of the method that ``like`` names.
    """

    model: str = field(default="smollm2-135m", metadata={"help": "hub id, folder, GGUF file or short name"})
    task: str = field(default="bbc_headlines", metadata={"help": "name of the task"})
    data_dir: str | None = field(default=None, metadata={"help": "folder with the task's files"})
    ood: tuple[str, ...] = field(default=(), metadata={"help": "tasks to tell from the test items"})
    shift: tuple[str, ...] = field(default=(), metadata={"help": "tasks of the same classes to be judged on as well"})
    methods: tuple[str, ...] = field(default=("mle", "map", "blob", "laplace"), metadata={"help": "methods to compare"})
    adapter: str = field(default="LoRA()", metadata={"help": "declaration of the adapter, such as LoRA(rank=8)"})
    schedule: str | None = field(default=None, metadata={"help": "which blocks are trained when; None for all"})
    dtype: str = field(default="auto", metadata={"help": "type of the frozen weights"})
    device: str = field(default="cpu", metadata={"help": "where the network runs"})
    max_length: int = field(default=300, metadata={"help": "longest prompt in tokens"})
    train_size: int | None = field(default=None, metadata={"help": "training examples; all by default"})
    seeds: int = field(default=1, metadata={"help": "number of seeds"})
    draws: int = field(default=10, metadata={"help": "weight draws of a prediction"})
    ood_size: int = field(default=300, metadata={"help": "examples of each foreign task at most"})
    test_size: int | None = field(default=None, metadata={"help": "test examples; all by default"})
    miscoverage: float | None = field(default=None, metadata={"help": "share of sets that may miss the true class"})
    settings: Mapping[str, Mapping[str, Any]] = field(
        default_factory=dict, metadata={"help": "method -> changed settings"}
    )

    def __post_init__(self) -> None:
        for name in ("ood", "shift", "methods"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value.split(",")) if isinstance(value, str) else tuple(value))
        for name, changes in self.settings.items():
            if not isinstance(changes, Mapping):
                raise ValueError(f"The settings of {name} are {changes!r}; expected key: value, such as steps: 300.")
        for name in (*self.methods, *self.settings):
            self.method(name)
        if not self.methods:
            raise ValueError(f"No method to compare. Choose some of {', '.join(METHODS)}.")
        if len(set(self.methods)) < len(self.methods):
            raise ValueError(f"A method is named twice in {', '.join(self.methods)}. Name each once.")
        for name in ("seeds", "draws", "ood_size", "train_size", "test_size", "max_length"):
            value = getattr(self, name)
            if value is None and name in ("train_size", "test_size"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is a whole number of at least 1; got {value!r}.")
        if self.miscoverage is not None and not 0 < self.miscoverage < 1:
            raise ValueError(f"miscoverage is a share between 0 and 1, such as 0.1; got {self.miscoverage!r}.")

    def method(self, name: str) -> Method:
        """A method with this experiment's changes.

        Raises:
            ValueError: an unknown method, a change that it does not have, or variants that go round in a circle.
        """
        return self._method(name, ())

    def _method(self, name: str, above: tuple[str, ...]) -> Method:
        if name in above:
            raise ValueError(f"The methods go round in a circle: {' <- '.join([*above, name])}.")
        changes = dict(self.settings.get(name, {}))
        other, plus, suffix = name.rpartition("+")
        like = changes.pop("like", None)
        if name in METHODS:
            method = METHODS[name]
        elif plus and suffix == TEMPERATURE:
            scaled = self._method(other, (*above, name))
            method = replace(scaled, engine="TemperatureScaling", guide=None, settings={}, estimate=other)
        elif "engine" in changes:
            method = Method.of_engine(changes.pop("engine"))
        elif like is not None:
            method = self._method(like, (*above, name))
        else:
            known = [entry for entry in (*METHODS, *self.settings) if entry != name]
            raise ValueError(
                f"Unknown method {name!r}. Did you mean {nearest(name, known)!r}? Methods: {', '.join(known)}. A new one "
                "needs settings with engine, or with like and the name of another."
            )
        if self.schedule is not None and "schedule" in method.setting_names():
            method = method.changed({"schedule": self.schedule})
        return method.changed(changes)

    def needed(self) -> dict[str, Method]:
        """The methods of the table, the pretrained model first, and those whose estimates they start from.

        Raises:
            ValueError: a method or setting that does not fit, or estimates that go round in a circle.
        """
        found: dict[str, Method] = {}
        for name in dict.fromkeys(("zero-shot", *self.methods)):
            chain: list[str] = []
            following: str | None = name
            while following is not None:
                if following in chain:
                    raise ValueError(f"The estimates go round in a circle: {' <- '.join([*chain, following])}.")
                chain.append(following)
                found[following] = self.method(following)
                following = found[following].estimate
        for method in found.values():
            if method.engine != "none":
                method.make_engine()
        return found

    def to_dict(self) -> dict[str, Any]:
        """The resolved configuration: every default written out, every method with its engine's settings."""
        resolved = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        resolved |= {name: list(getattr(self, name)) for name in ("ood", "shift", "methods")}
        resolved["settings"] = {name: method.to_dict() for name, method in self.needed().items()}
        return resolved

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ExperimentConfig":
        """Read a configuration.

        Raises:
            ValueError: an unknown key; the nearest is offered.
        """
        valid = [entry.name for entry in fields(cls)]
        for key in values:
            if key not in valid:
                raise ValueError(
                    f"Unknown setting {key!r}. Did you mean {nearest(key, valid)!r}? Settings: {', '.join(valid)}."
                )
        return cls(**values)


def read_config(file: str | Path | None, changes: Sequence[str] = ()) -> dict[str, Any]:
    """Values of a YAML file with ``key=value`` changes: ``read_config("run.yaml", ["seeds=3", "blob.kl_weight=0.3"])``.

    A key with a dot changes a setting of a method.

    Args:
        file: YAML file, or None for nothing but the changes.
        changes: ``key=value``, the value in YAML.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, not a mapping, or a change without ``=``.
    """
    values: dict[str, Any] = {}
    if file is not None:
        path = Path(file)
        if not path.is_file():
            raise FileNotFoundError(f"No config file at {str(file)!r}.")
        try:
            values = yaml.load(path.read_text(), Loader=Loader) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds a {type(values).__name__}; expected settings as key: value lines.")
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise ValueError(f"Cannot read --set {change!r}; expected key=value, such as blob.kl_weight=0.3.")
        try:
            value = yaml.load(text, Loader=Loader)
        except yaml.YAMLError as error:
            raise ValueError(f"Cannot read --set {change!r}: {text!r} is not a value in YAML.") from error
        method, dot, setting = key.partition(".")
        if dot:
            settings = values["settings"] = dict(values.get("settings") or {})
            settings[method] = {**(settings.get(method) or {}), setting: value}
        else:
            values[key] = value
    return values
