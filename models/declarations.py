"""Objects declared as text, as a YAML file or a command line can hold them: ``Normal(0, 0.2)``, ``LoRA(rank=4)``."""

import ast
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import pyro.distributions as dist

from pyrolora.models.covariance import Covariance
from pyrolora.models.naming import nearest
from pyrolora.models.prior_declarations import Declaration, Flat, Relative, learned, logit_scale


def _in_floats(family: Any) -> Callable[..., Declaration]:
    """The family with its arguments as floats, so that ``Normal(0, 1)`` in a file is not a Normal over integers."""

    def make(*args: float, **kwargs: float) -> Declaration:
        return family(*map(float, args), **{key: float(value) for key, value in kwargs.items()})

    # the names that it takes, for the message about one that it does not
    make.__signature__ = inspect.signature(family)  # type: ignore[attr-defined]
    return make


PRIORS: dict[str, Callable[..., Declaration]] = {
    "Flat": Flat,
    "learned": learned,
    "logit_scale": logit_scale,
    "Relative": Relative,
    "Covariance": Covariance,
    **{family.__name__: _in_floats(family) for family in (dist.Normal, dist.Laplace, dist.StudentT, dist.Cauchy)},
}


def declared(text: str, makers: Mapping[str, Callable[..., Any]], what: str) -> Any:
    """Make the object that a text declares: ``declared("LoRA(rank=4)", Adapter.registered, "adapter")``.

    Only a name and literal arguments are read; nothing in the text is executed.

    Args:
        text: a name, or a name with arguments in brackets.
        makers: name -> what makes the object.
        what: the kind of object, for the error message.

    Raises:
        ValueError: not of that form, an unknown name or setting (the nearest is offered), or arguments that do not fit.
    """
    if not isinstance(text, str):
        raise ValueError(
            f"The {what} is {text!r}, a {type(text).__name__}; expected a text such as {next(iter(makers))}(...)."
        )
    try:
        node = ast.parse(text.strip(), mode="eval").body
        call = node if isinstance(node, ast.Call) else ast.Call(func=node, args=[], keywords=[])
        if not isinstance(call.func, ast.Name):
            raise ValueError("no plain name")
        name = call.func.id
        args = [ast.literal_eval(argument) for argument in call.args]
        kwargs = {keyword.arg or "": ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError) as error:
        example = next(iter(makers))
        raise ValueError(f"Cannot read the {what} {text!r}; expected a form such as {example}(...).") from error
    # on a command line nobody wants to remember the capitals of PiSSA
    plain = {key.lower(): key for key in makers}
    name = name if name in makers else plain.get(name.replace("_", "").lower(), name)
    if name not in makers:
        raise ValueError(
            f"Unknown {what} {name!r}. Did you mean {nearest(name, makers)!r}? Choices: {', '.join(sorted(makers))}."
        )
    try:
        return makers[name](*args, **kwargs)
    except TypeError as error:
        valid = [setting for setting in inspect.signature(makers[name]).parameters if setting != "validate_args"]
        unknown = next((setting for setting in kwargs if setting not in valid), None)
        reason = (
            f"{error}."
            if unknown is None or not valid
            else f"{name} has no {unknown!r}. Did you mean {nearest(unknown, valid)!r}? Settings: {', '.join(valid)}."
        )
        raise ValueError(f"The {what} {text!r} has arguments that do not fit: {reason}") from error


def declared_prior(specification: str | Mapping[str, str]) -> Declaration | dict[str, Declaration]:
    """A prior from text, or from ``{glob pattern: text}``: ``declared_prior({"*.lora_A": "Normal(0, 0.2)", ...})``.

    Raises:
        ValueError: see `declared`.
    """
    if isinstance(specification, str):
        return declared(specification, PRIORS, "prior")
    return {pattern: declared(text, PRIORS, "prior") for pattern, text in specification.items()}
