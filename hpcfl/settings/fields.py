"""Kinds of settings: a dataclass field that knows what a job file may put there, what it means, and says so when it may not."""
import unicodedata
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from hpcfl.errors import JobError
from hpcfl.wording import did_you_mean, nearest

LONGEST_NAME = 200                                                 # bytes; file systems take 255, and something may be added
Names = Collection[str]                                            # the keys of a table, or words that no table carries out
Choices = Mapping[str, Mapping[str, Any]]                          # what a table is of ("optimizer") -> the table; "algorithm": name -> Config


class Hint(ValueError):
    """A refusal that has something to add to what is allowed."""


@dataclass(frozen=True)
class SettingType:
    """What a setting accepts: `parse` returns the value or raises ValueError, `allowed` is the sentence a user reads, `names` are those of its tables."""

    allowed: str
    parse: Callable[[Any], Any]
    names: tuple[str, ...] = ()

    def among(self, choices: Choices) -> "SettingType":
        """Itself: no table decides what it accepts."""
        return self

    def check(self, key: str, value: Any) -> Any:
        """The value as the setting keeps it.

        Raises: JobError with key, value and what is allowed.
        """
        try:
            return self.parse(value)
        except (ValueError, TypeError, OverflowError) as error:
            hint = f"; {error}" if isinstance(error, Hint) else ""
            raise JobError(f"{key} = {value!r} is not allowed; wanted {self.allowed}{hint}") from None


@dataclass(frozen=True)
class Tabled:
    """What a setting accepts that tables decide: each is given, or called by what it is of where it stands on a higher floor and the door hands it in.

    A table is asked when a job is read: what was added to it until then is known.
    """

    tables: tuple[str | Names, ...]
    kind: Callable[..., SettingType]                                      # the names of each table -> what is accepted

    def among(self, choices: Choices) -> SettingType:
        """What is accepted now. Raises: KeyError for a table that the door has not handed in."""
        return self.kind(*(tuple(choices[table] if isinstance(table, str) else table) for table in self.tables))


@dataclass(frozen=True)
class Setting:
    """A setting: what it accepts, what it is where nobody sets it (dataclasses.MISSING: it must be set), what it means and what it counts."""

    kind: SettingType
    default: Any
    meaning: str = ""
    unit: str = ""


def is_text(value: Any) -> TypeGuard[str]:
    """Whether a value is text that every file takes: no NUL, and no half of a character, which a command line in another encoding leaves."""
    return isinstance(value, str) and not any(character == "\0" or "\ud800" <= character <= "\udfff" for character in value)


def one_of(options: tuple[str, ...]) -> SettingType:
    """One of a few words."""
    def parse(value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError
        if value in options:
            return value
        if meant := nearest(value, options):
            raise Hint(did_you_mean(meant, before=""))
        raise ValueError
    return SettingType(f"one of {_quoted(options)}", parse, options)


def setting(default: Any, kind: SettingType | Tabled, meaning: str, unit: str) -> Any:
    """A dataclass field of a kind; `annotations.settings` reads it."""
    return field(default=default, metadata={"kind": kind, "meaning": meaning, "unit": unit})


def integer(default: int, low: int, high: int | None = None, *, meaning: str = "", unit: str = "") -> Any:
    """A whole number in [low, high]."""
    def parse(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
            raise ValueError
        return value
    return setting(default, SettingType(f"a whole number of at least {low}" + (f" and at most {high}" if high is not None else ""), parse), meaning, unit)


def real(default: float, low: float, high: float = float("inf"), above: bool = False, *, meaning: str = "", unit: str = "") -> Any:
    """A number in [low, high]; with `above` in (low, high]."""
    def parse(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError
        if not (low < value <= high if above else low <= value <= high) or value in (float("inf"), float("-inf")):
            raise ValueError
        return float(value)
    span = f"{'above' if above else 'of at least'} {low:g}" + (f" and at most {high:g}" if high != float("inf") else "")
    return setting(default, SettingType(f"a number {span}", parse), meaning, unit)


def choice(default: str, *others: str, meaning: str = "") -> Any:
    """One of a few words that no table carries out; the first is the default."""
    return setting(default, one_of((default, *others)), meaning, "")


def choice_of(table: str | Names, default: str, *others: str, meaning: str = "") -> Any:
    """One of the names of a table, or of `others`, which need no entry there."""
    return setting(default, Tabled((table,), lambda names: one_of(tuple(dict.fromkeys((default, *others, *names))))), meaning, "")


def flag(default: bool, *, meaning: str = "") -> Any:
    """true or false."""
    def parse(value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError
        return value
    return setting(default, SettingType("true or false", parse), meaning, "")


def text(default: str, *, meaning: str = "") -> Any:
    """A word or a sentence."""
    return setting(default, SettingType("a string", _text), meaning, "")


def name_of(table: str | Names, default: str, *, besides: str, meaning: str = "") -> Any:
    """A name of a table, or `besides` one that is known only where it is looked up."""
    return setting(default, Tabled((table,), lambda names: SettingType(f"a name: {_quoted(names)}, or {besides}", _text, names)), meaning, "")


def names_of(table: str | Names, *default: str, besides: str, meaning: str = "") -> Any:
    """A list of at least one name of a table, or `besides` of some that are known only where they are looked up."""
    kind = Tabled((table,), lambda names: SettingType(f"a list of at least one name: {_quoted(names)}, or {besides}", _words, names))
    return setting(default, kind, meaning, "")


def folder_name(default: str, *, meaning: str = "") -> Any:
    """What a folder below another is called; with '/' it lies deeper, but never outside."""
    def parse(value: Any) -> str:
        if not is_text(value) or len(value.encode()) > LONGEST_NAME or any(unicodedata.category(character) == "Cc" for character in value):
            raise ValueError
        if any(part in ("", ".", "..") for part in value.split("/")):
            raise ValueError
        return value
    allowed = f"the name of a folder: no control characters, at most {LONGEST_NAME} bytes, no part that is empty, '.' or '..'"
    return setting(default, SettingType(allowed, parse), meaning, "")


def words(*default: str, meaning: str = "") -> Any:
    """A list of at least one name."""
    return setting(default, SettingType("a list of at least one name", _words), meaning, "")


def selection(table: str | Names, last: str | Names = (), *, meaning: str = "") -> Any:
    """A list of some names of a table, each once, with at most one of those in `last`, at the end; empty by default."""
    def kind(first: tuple[str, ...], final: tuple[str, ...]) -> SettingType:
        known = (*first, *final)

        def parse(value: Any) -> tuple[str, ...]:
            if not isinstance(value, (list, tuple)) or not all(isinstance(word, str) for word in value):
                raise ValueError
            for word in value:
                if word not in known:
                    raise Hint(f"'{word}' is none of them{did_you_mean(nearest(word, known), before=', ')}")
            if len(set(value)) < len(value) or any(word in final for word in value[:-1]):
                raise ValueError
            return tuple(value)
        at_the_end = f", and of {_quoted(final)} at most one, at the end" if final else ""
        return SettingType(f"a list of some of {_quoted(known)}, each once{at_the_end}", parse, known)
    return setting((), Tabled((table, last), kind), meaning, "")


def integers(*default: int, low: int = 0, meaning: str = "") -> Any:
    """A list of at least one whole number, each of at least `low`."""
    def parse(value: Any) -> tuple[int, ...]:
        if not isinstance(value, (list, tuple)) or not value or not all(isinstance(n, int) and not isinstance(n, bool) and n >= low for n in value):
            raise ValueError
        return tuple(value)
    return setting(default, SettingType(f"a list of at least one whole number, each of at least {low}", parse), meaning, "")


def reals(*default: float, meaning: str = "", unit: str = "") -> Any:
    """A list of positive numbers; it may be empty."""
    def parse(value: Any) -> tuple[float, ...]:
        if not isinstance(value, (list, tuple)) or not all(isinstance(n, (int, float)) and not isinstance(n, bool) and 0 < n < float("inf") for n in value):
            raise ValueError
        return tuple(map(float, value))
    return setting(default, SettingType("a list of positive numbers", parse), meaning, unit)


def _text(value: Any) -> str:
    if not is_text(value):
        raise ValueError
    return value


def _words(value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not value or not all(map(is_text, value)):
        raise ValueError
    return tuple(value)


def _quoted(names: Names) -> str:
    return ", ".join(map(repr, names))
