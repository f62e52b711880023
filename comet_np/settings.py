"""Settings: frozen dataclasses whose fields are flags on the command line and lines of a record."""

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np

from .errors import UserError, unknown


def option(default: Any, text: str, flag: str | None = None) -> Any:
    """Return a dataclass field with a default, and the help text and name of its flag.

    The name is that of the field if not given.
    """
    return dataclasses.field(default=default, metadata={"help": text, "flag": flag})


def flags(kind: type) -> Iterator[tuple[str, "dataclasses.Field[Any]"]]:
    """Yield the flags of a configuration, without dashes, and their fields, nested ones too."""
    for field in dataclasses.fields(kind):
        if "help" in field.metadata:
            yield field.metadata["flag"] or field.name, field
        elif isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            yield from flags(field.type)


def build(kind: type, values: dict[str, Any]) -> Any:
    """Return the configuration of this `kind` with the `values` of some flags.

    Raises
    ------
    UserError
        If there is no such flag, or a value is of another type.
    """
    known = dict(flags(kind))
    for name in values:
        if name not in known:
            raise unknown("setting", name, known)
    return _changed(kind(), {name: fitting(name, known[name].type, value)
                             for name, value in values.items()})


NAMES = {int: "a whole number", float: "a number", bool: "True or False", str: "a string",
         types.NoneType: "None"}


def fitting(name: str, kind: Any, value: Any) -> Any:
    """Return the value of a setting as its type has it: a number of NumPy as one of Python.

    A type that is not of numbers, strings, booleans and tuples of them lets everything pass.

    Raises
    ------
    UserError
        If it is of another type.
    """
    kinds = typing.get_args(kind) if _is_union(kind) else (kind,)
    if not all(each in NAMES or typing.get_origin(each) is tuple for each in kinds):
        return value
    for each in kinds:
        if typing.get_origin(each) is tuple:
            if isinstance(value, tuple | list):
                inner = typing.get_args(each)[0]
                return tuple(fitting(f"each of {name}", inner, part) for part in value)
        elif isinstance(value, bool | np.bool_):
            if each is bool:
                return bool(value)
        elif isinstance(value, {int: Integral, float: Real}.get(each, each)):
            return each(value) if each in (int, float) else value
    wanted = [NAMES.get(each) or
              f"a tuple, each part {NAMES.get(typing.get_args(each)[0])}" for each in kinds]
    raise UserError(f"{name} must be {' or '.join(wanted)}, got {value!r}")


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (types.UnionType, typing.Union)


def _changed(config: Any, values: dict[str, Any]) -> Any:
    own: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        name = field.metadata.get("flag") or field.name
        value = getattr(config, field.name)
        if "help" in field.metadata and name in values:
            own[field.name] = values[name]
        elif dataclasses.is_dataclass(value):
            own[field.name] = _changed(value, values)
    return dataclasses.replace(config, **own)


def values(config: Any) -> dict[str, Any]:
    """Return the values of all flags of a configuration: what `build` makes it of."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if "help" in field.metadata:
            found[field.metadata["flag"] or field.name] = value
        elif dataclasses.is_dataclass(value):
            found |= values(value)
    return found


def record(config: Any) -> Any:
    """Return a configuration as JSON values; a dataclass says its class, as gates differ by it."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {"class": type(config).__name__} | {
            field.name: record(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, tuple | list):
        return [record(value) for value in config]
    return config.item() if isinstance(config, np.generic) else config


def restored(values: Any, classes: Mapping[str, type]) -> Any:
    """Return the configuration that `record` made these JSON values of.

    Parameters
    ----------
    values : JSON values
    classes : mapping of str to type
        The dataclasses that may occur, by name: nothing else is looked up or imported.

    Raises
    ------
    UserError
        If a class is not among them, or a field is missing, unknown, or refused by its class.
    """
    if isinstance(values, list):
        return tuple(restored(value, classes) for value in values)
    if not isinstance(values, dict):
        return values
    fields = dict(values)
    name = fields.pop("class", None)
    if not isinstance(name, str) or name not in classes:
        raise unknown("class of a setting", name, classes)
    try:
        kinds = {field.name: field.type for field in dataclasses.fields(classes[name])}
        return classes[name](**{key: fitting(key, kinds.get(key), restored(value, classes))
                                for key, value in fields.items()})
    except (TypeError, AttributeError) as error:
        raise UserError(f"these are no settings of a {name}: {error}") from error


def parse(name: str, field: "dataclasses.Field[Any]", text: str) -> Any:
    """Return the value of a field from the text of its flag `name`."""
    return _parse(field.type, text, "--" + name.replace("_", "-"))


def _parse(kind: Any, text: str, flag: str) -> Any:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if _is_union(kind):
        if text.lower() == "none" and types.NoneType in inner:
            return None
        listed = "," in text and any(typing.get_origin(kind) is tuple for kind in inner)
        return _parse(inner[listed], text, flag)
    if origin is tuple:
        return tuple(_parse(inner[0], part, flag) for part in text.split(",") if part)
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f'{flag} takes true or false, got "{text}"')
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        wanted = {int: "a whole number", float: "a number"}[kind]
        raise UserError(f'{flag} takes {wanted}, got "{text}"') from None
