"""Kinds of settings: a dataclass field that knows what a job file may put there, and says so when it may not."""
import difflib
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from hpcfl.errors import JobError

LONGEST_NAME = 200                                                 # bytes; file systems take 255, and something may be added


class Hint(ValueError):
    """A refusal that has something to add to what is allowed."""


@dataclass(frozen=True)
class SettingType:
    """What a setting accepts: `parse` returns the value or raises ValueError, `allowed` is the sentence a user reads."""

    allowed: str
    parse: Callable[[Any], Any]

    def check(self, key: str, value: Any) -> Any:
        """The value as the setting keeps it.

        Raises: JobError with key, value and what is allowed.
        """
        try:
            return self.parse(value)
        except (ValueError, TypeError, OverflowError) as error:
            hint = f"; {error}" if isinstance(error, Hint) else ""
            raise JobError(f"{key} = {value!r} is not allowed; wanted {self.allowed}{hint}") from None


def is_text(value: Any) -> TypeGuard[str]:
    """Whether a value is text that every file takes: no NUL, and no half of a character, which a command line in another encoding leaves."""
    return isinstance(value, str) and not any(character == "\0" or "\ud800" <= character <= "\udfff" for character in value)


def _setting(default: Any, allowed: str, parse: Callable[[Any], Any]) -> Any:
    return field(default=default, metadata={"kind": SettingType(allowed, parse)})


def integer(default: int, low: int, high: int | None = None) -> Any:
    """A whole number in [low, high]."""
    def parse(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
            raise ValueError
        return value
    return _setting(default, f"a whole number of at least {low}" + (f" and at most {high}" if high is not None else ""), parse)


def real(default: float, low: float, high: float = float("inf"), above: bool = False) -> Any:
    """A number in [low, high]; with `above` in (low, high]."""
    def parse(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError
        if not (low < value <= high if above else low <= value <= high) or value in (float("inf"), float("-inf")):
            raise ValueError
        return float(value)
    span = f"{'above' if above else 'of at least'} {low:g}" + (f" and at most {high:g}" if high != float("inf") else "")
    return _setting(default, f"a number {span}", parse)


def choice(default: str, *others: str) -> Any:
    """One of a few words; the first is the default."""
    options = (default, *others)

    def parse(value: Any) -> Any:
        if value not in options:
            raise ValueError
        return value
    return _setting(default, "one of " + ", ".join(repr(option) for option in options), parse)


def flag(default: bool) -> Any:
    """true or false."""
    def parse(value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError
        return value
    return _setting(default, "true or false", parse)


def text(default: str) -> Any:
    """A word or a sentence."""
    def parse(value: Any) -> str:
        if not is_text(value):
            raise ValueError
        return value
    return _setting(default, "a string", parse)


def folder_name(default: str) -> Any:
    """What a folder below another is called; with '/' it lies deeper, but never outside."""
    def parse(value: Any) -> str:
        if not is_text(value) or len(value.encode()) > LONGEST_NAME or any(unicodedata.category(character) == "Cc" for character in value):
            raise ValueError
        if any(part in ("", ".", "..") for part in value.split("/")):
            raise ValueError
        return value
    return _setting(default, f"the name of a folder: no control characters, at most {LONGEST_NAME} bytes, no part that is empty, '.' or '..'", parse)


def words(*default: str) -> Any:
    """A list of at least one name."""
    def parse(value: Any) -> tuple[str, ...]:
        if not isinstance(value, (list, tuple)) or not value or not all(map(is_text, value)):
            raise ValueError
        return tuple(value)
    return _setting(tuple(default), "a list of at least one name", parse)


def selection(*options: str, last: tuple[str, ...] = ()) -> Any:
    """A list of some of a few words, each once, with at most one of those in `last`, at the end; empty by default."""
    known = (*options, *last)

    def parse(value: Any) -> tuple[str, ...]:
        if not isinstance(value, (list, tuple)) or not all(isinstance(word, str) for word in value):
            raise ValueError
        for word in value:
            if word not in known:
                close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
                raise Hint(f"'{word}' is none of them" + (f", did you mean '{close[0]}'?" if close else ""))
        if len(set(value)) < len(value) or any(word in last for word in value[:-1]):
            raise ValueError
        return tuple(value)
    quoted, final = (", ".join(repr(word) for word in words) for words in (known, last))
    return _setting((), f"a list of some of {quoted}, each once" + (f", and of {final} at most one, at the end" if last else ""), parse)


def integers(*default: int, low: int = 0) -> Any:
    """A list of at least one whole number, each of at least `low`."""
    def parse(value: Any) -> tuple[int, ...]:
        if not isinstance(value, (list, tuple)) or not value or not all(isinstance(n, int) and not isinstance(n, bool) and n >= low for n in value):
            raise ValueError
        return tuple(value)
    return _setting(tuple(default), f"a list of at least one whole number, each of at least {low}", parse)


def reals(*default: float) -> Any:
    """A list of positive numbers; it may be empty."""
    def parse(value: Any) -> tuple[float, ...]:
        if not isinstance(value, (list, tuple)) or not all(isinstance(n, (int, float)) and not isinstance(n, bool) and 0 < n < float("inf") for n in value):
            raise ValueError
        return tuple(map(float, value))
    return _setting(tuple(default), "a list of positive numbers", parse)
