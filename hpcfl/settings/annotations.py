"""Annotations: the settings of a section, by its fields of hpcfl.settings.fields, or by the type that a plain field is annotated with."""
import dataclasses
import math
import types
from collections.abc import Sequence
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hpcfl.errors import JobError
from hpcfl.settings.fields import Choices, Setting, SettingType, is_text

WANTED = "int, float, bool, str, a Literal or an Enum, a tuple or list of those, each perhaps with '| None', or a field of hpcfl.settings.fields"


def settings(section: type, where: str, choices: Choices) -> dict[str, Setting]:
    """The settings that a job may make in a section, by their keys, in order.

    Of a plain field the `metadata` may say meaning and unit. Raises: JobError naming the class and the field where the annotation says too little, or the
    class is no dataclass.
    """
    name = f"{where}: {section.__module__}.{section.__qualname__}"
    if not dataclasses.is_dataclass(section):
        raise JobError(f"{name} is not a dataclass; wanted @dataclass(frozen=True), a field for each setting")
    found = {}
    for entry in (entry for entry in dataclasses.fields(section) if entry.init):
        kind = entry.metadata.get("kind") or _find_type(_annotation(section, entry, name))
        if kind is None:
            raise JobError(f"{name}: field '{entry.name}' is annotated {_annotation_text(_annotation(section, entry, name))}; wanted {WANTED}")
        default = entry.default_factory() if entry.default_factory is not dataclasses.MISSING else entry.default
        found[entry.name] = Setting(kind.among(choices), default, entry.metadata.get("meaning", ""), entry.metadata.get("unit", ""))
    return found


def to_job_value(value: Any) -> Any:
    """A setting as a job file holds it: an Enum by its word."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(to_job_value, value))
    return _word(value) if isinstance(value, Enum) else value


def _annotation(section: type, entry: dataclasses.Field[Any], name: str) -> Any:
    try:
        return get_type_hints(section)[entry.name]
    except (NameError, TypeError, AttributeError, SyntaxError) as error:
        raise JobError(f"{name}: its annotations cannot be read ({error}); wanted {WANTED}") from None


def _find_type(annotation: Any) -> SettingType | None:
    """The kind of what is annotated so, None where there is none."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is None and isinstance(annotation, type):
        return _enum(annotation) if issubclass(annotation, Enum) else PLAIN.get(annotation)
    if origin is Literal:
        return SettingType("one of " + ", ".join(map(repr, inner)), lambda value: _one_of(inner, value))
    wanted = [each for each in inner if each not in (Ellipsis, types.NoneType)]
    of = [kind for kind in map(_find_type, wanted) if kind is not None]
    if origin not in (tuple, list, Union, types.UnionType) or not of or len(of) < len(wanted):
        return None
    if origin in (Union, types.UnionType):
        return _either(of, types.NoneType in inner)
    return _sequence(origin, of, repeated=origin is list or Ellipsis in inner)


def _enum(options: type[Enum]) -> SettingType:
    words = {_word(member): member for member in options}
    return SettingType("one of " + ", ".join(map(repr, words)), lambda value: value if isinstance(value, options) else words[_one_of(tuple(words), value)])


def _either(kinds: Sequence[SettingType], empty: bool) -> SettingType:
    def parse(value: Any) -> Any:
        if value is None and empty:
            return None                                            # only as a default: TOML has no word for it
        for kind in kinds:
            try:
                return kind.parse(value)
            except (ValueError, TypeError):
                continue
        raise ValueError
    return SettingType(" or ".join(kind.allowed for kind in kinds) + (", or to be left out" if empty else ""), parse)


def _sequence(origin: type, kinds: Sequence[SettingType], repeated: bool) -> SettingType:
    def parse(value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            raise ValueError
        each = [*kinds] * len(value) if repeated else kinds
        return origin(kind.parse(item) for kind, item in zip(each, value, strict=True))
    return SettingType(f"a list, each of it {kinds[0].allowed}" if repeated else f"a list of {', '.join(kind.allowed for kind in kinds)}", parse)


def _one_of(options: tuple[Any, ...], value: Any) -> Any:
    for option in options:
        if type(option) is type(value) and option == value:        # true is not 1
            return option
    raise ValueError


def _plain(kind: type, value: Any) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError
    return float(value)


def _text(value: Any) -> str:
    if not is_text(value):
        raise ValueError
    return value


def _word(member: Enum) -> Any:
    return member.value if isinstance(member.value, (str, int)) else member.name


def _annotation_text(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) and get_origin(annotation) is None else str(annotation)


PLAIN = {bool: SettingType("true or false", lambda value: _plain(bool, value)), int: SettingType("a whole number", lambda value: _plain(int, value)),
         float: SettingType("a number", _number), str: SettingType("a string", _text)}
