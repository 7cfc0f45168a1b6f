"""Numbers among settings: whole where they count, finite everywhere, whatever holds them."""

import re
from dataclasses import dataclass, fields

import pytest

from pyrolora.guides import BLoB, LowRank
from pyrolora.guides.base import Family
from pyrolora.inference.evaluation.methods import ENGINES
from pyrolora.inference.map import MAP
from pyrolora.inference.svi import SVI
from pyrolora.models.adapters import Adapter, LoRA
from pyrolora.models.prior_declarations import Relative, learned, logit_scale
from pyrolora.models.settings import check_numbers

NAN, INFINITY = float("nan"), float("inf")


@dataclass
class Settings:
    count: "int" = 3
    rate: float = 0.5
    most: int | None = None
    bound: "float | None" = None
    name: str = "of any kind"
    mixed: int | str = 1.5

    def __post_init__(self):
        check_numbers(self)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 4.5}, "'count' of Settings is a whole number; got 4.5. Give 4."),
        ({"count": 4.0}, "whole number; got 4.0. Give 4."),
        ({"count": 0.2}, "whole number; got 0.2. Give 1."),
        ({"count": NAN}, "whole number; got nan."),
        ({"count": True}, "whole number; got True."),
        ({"count": None}, "whole number; got None."),
        ({"most": 2.5}, "whole number or None; got 2.5. Give 2."),
        ({"rate": NAN}, "'rate' of Settings is a finite number; got nan, which is not finite. The default is 0.5."),
        ({"rate": -INFINITY}, "got -inf, which is not finite"),
        ({"rate": "fast"}, "got 'fast', which is a str"),
        ({"rate": None}, "got None, which is a NoneType"),
        ({"bound": INFINITY}, "finite number or None; got inf, which is not finite. The default is None."),
    ],
)
def test_what_is_no_such_number_is_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Settings(**changes)


def test_what_the_annotation_allows_passes():
    Settings(count=-1, rate=2, most=7, bound=-0.5)
    Settings(most=None, bound=None)


def numbered(kinds):
    """Every class with every one of its settings that is annotated as a number."""
    return [
        pytest.param(kind, entry.name, entry.type, id=f"{kind.__name__}.{entry.name}")
        for kind in kinds
        for entry in fields(kind)
        if entry.type in (int, float, int | None, float | None)
    ]


CLASSES = [*ENGINES.values(), *Family.registered.values(), *Adapter.registered.values()]


@pytest.mark.parametrize(("kind", "name", "annotation"), numbered(CLASSES))
def test_every_engine_guide_and_adapter_checks_its_numbers(kind, name, annotation):
    bad = 4.5 if annotation in (int, int | None) else NAN
    required = {entry.name: 4 for entry in fields(kind) if entry.type is int and entry.name != name}
    with pytest.raises(ValueError, match=rf"The setting '{name}' of {kind.__name__} is a .*; got {bad}"):
        kind(**({**required, name: bad} if kind.__name__ == "Empirical" else {name: bad}))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: learned(NAN), "'scale' of Learned is a finite number; got nan"),
        (lambda: learned(INFINITY), "'scale' of Learned is a finite number; got inf"),
        (lambda: learned(0.1, every=2.5), "'every' of Learned is a whole number; got 2.5"),
        (lambda: learned(0.1, strength=NAN), "'strength' of Learned is a finite number; got nan"),
        (lambda: logit_scale(NAN), "'scale' of Learned is a finite number; got nan"),
        (lambda: Relative(NAN), "'ratio' of Relative is a finite number; got nan"),
        (lambda: LoRA(alpha=NAN), "'alpha' of LoRA is a finite number; got nan.*The default is 16.0"),
        (lambda: LoRA(rank=2.5), "'rank' of LoRA is a whole number; got 2.5. Give 2"),
        (lambda: LowRank(init_scale=NAN), "'init_scale' of LowRank is a finite number or None; got nan"),
        (lambda: BLoB(init_scale=INFINITY), "'init_scale' of BLoB is a finite number or None; got inf"),
        (lambda: SVI(learning_rate=INFINITY), "'learning_rate' of SVI is a finite number; got inf"),
        (lambda: MAP(max_grad_norm=INFINITY), "'max_grad_norm' of MAP is a finite number or None; got inf"),
    ],
)
def test_nan_infinity_and_parts_of_counts_are_refused_where_they_are_given(make, message):
    with pytest.raises(ValueError, match=message):
        make()
