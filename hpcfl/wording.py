"""Words and numbers as people read them: bytes, seconds, counts, lists, tables, reasons, slips; what is not known is a dash."""
import difflib
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TypeGuard

NOTHING = "–"                                                      # stands for what was not measured
SHOWN = 12                                                         # items of a list that are named
BYTE_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
DURATION_UNITS = (                                                 # the first one that a duration reaches: from what on, name, seconds
    (2 * 86400, "d", 86400), (2 * 3600, "h", 3600), (2 * 60, "min", 60), (1, "s", 1), (1e-3, "ms", 1e-3), (0, "us", 1e-6))


def byte_text(count: float | None, nothing: str = NOTHING) -> str:
    """Bytes in three digits, by powers of 1000: "64 B", "1.05 MB"."""
    if not _is_known(count):
        return nothing
    rounded = _round(count)
    unit, size = choose_byte_unit(rounded)
    return f"{_digits(rounded / size)} {unit}"


def choose_byte_unit(largest: float) -> tuple[str, float]:
    """The unit in which a largest number of bytes reads well, and its size in bytes."""
    power = next((power for power in range(len(BYTE_UNITS) - 1, 0, -1) if largest >= 1000 ** power), 0)
    return BYTE_UNITS[power], float(1000 ** power)


def megabytes_text(count: float) -> str:
    """Bytes in MB (1e6 bytes), eight characters wide, for columns."""
    return f"{count / 1e6:8.3f} MB"


def duration_text(seconds: float | None, nothing: str = NOTHING) -> str:
    """Seconds in three digits: "12.3 us", "4.1 ms", "2.5 s"; two minutes and more in min, two hours and more in h, two days and more in d."""
    if not _is_known(seconds):
        return nothing
    rounded = _round(seconds)
    unit, size = next(((unit, size) for least, unit, size in DURATION_UNITS if rounded >= least), ("s", 1)) if rounded else ("s", 1)
    return f"{_digits(_round(rounded / size))} {unit}"


def number_text(value: float | None, digits: int = 1, nothing: str = NOTHING) -> str:
    """A number with so many digits behind the point: "92.8"."""
    return f"{value:.{digits}f}" if _is_known(value) else nothing


def percent_text(value: float | None, nothing: str = NOTHING) -> str:
    """A number of percent: "92.8 %"."""
    return f"{number_text(value)} %" if _is_known(value) else nothing


def mean_sd_text(mean: float | None, sd: float | None, nothing: str = NOTHING) -> str:
    """"92.8 ± 0.2"; the mean alone where one value has no deviation."""
    return number_text(mean, nothing=nothing) + (f" ± {number_text(sd)}" if _is_known(mean) and _is_known(sd) else "")


def count_text(count: int, noun: str, plural: str = "s") -> str:
    """A number and its noun: "1 rank", "4 ranks", "2 batches"."""
    return f"{count} {noun}{plural if count != 1 else ''}"


def range_text(values: Sequence[int]) -> str:
    """From the lowest to the highest: "48 to 52", "50" where all are alike."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def list_text(values: Sequence[object]) -> str:
    """Values in words: "1, 2, 3"; of many the first ones, the last one and how many there are."""
    words = list(map(str, values))
    return ", ".join(words) if len(words) <= SHOWN else f"{', '.join(words[:SHOWN - 2])} ... {words[-1]} ({len(words)} in all)"


def numbers_text(numbers: Collection[int], noun: str = "rank", joint: str = "-") -> str:
    """What is numbered, in words, neighbours together: "rank 3", "ranks 0-3, 6", with another joint "rounds 1 to 4"; "no rank" where there is none."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][-1] + 1:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    return f"{noun}{'s' * (len(numbers) > 1)} {', '.join(joint.join(map(str, span)) for span in spans)}" if spans else f"no {noun}"


def leaf_text(shape: Sequence[int], dtype: object) -> str:
    """A tensor of a Tree: "(3, 4) float32"."""
    return f"{tuple(shape)} {str(dtype).removeprefix('torch.')}"


def shared_text(found: Mapping[str, Sequence[int]]) -> str:
    """What is alike of which ranks, in words; without the ranks where it is alike of all."""
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{numbers_text(ranks)}: {trait}" for trait, ranks in found.items())


def reasons_text(faults: Mapping[int, str]) -> str:
    """Ranks and what each says, those together that say the same."""
    found: dict[str, list[int]] = {}
    for rank, said in faults.items():
        found.setdefault(said, []).append(rank)
    return "; ".join(f"{numbers_text(ranks)}: {said}" for said, ranks in found.items())


def nearest(word: str, known: Iterable[str], alike: float = 0.5) -> str:
    """The known word that is most like another, where they are so much alike (0 to 1); "" where none is."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=alike)), "")


def did_you_mean(*meant: str, before: str = "; ") -> str:
    """"; did you mean 'lr' or 'epochs'?"; nothing where nothing may have been meant."""
    told = [repr(word) for word in meant if word]
    return f"{before}did you mean {' or '.join(told)}?" if told else ""


def cause_text(error: BaseException) -> str:
    """The first line of what an error says; its type where it says nothing. The address of an object in memory is left out: nobody can look it up."""
    lines = re.sub(r"\s*<[^<>]* at 0x[0-9a-fA-F]+>", "", str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def printable_text(text: str) -> str:
    """Text in which control characters are escaped: names out of a file must not steer the terminal."""
    return "".join(character if character.isprintable() else character.encode("unicode_escape").decode() for character in text)


def align_rows(rows: Sequence[Sequence[str]], words: int, also: Collection[str] = ()) -> str:
    """Rows of equally many cells as lines of columns, the first row the headings.

    Text starts on the left, numbers end on the right. Text are the first `words` columns, those headed `also`, and those without a heading.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = [column < words or not heading or heading in also for column, heading in enumerate(rows[0])]
    return "\n".join("  ".join(cell.ljust(width) if left else cell.rjust(width) for cell, width, left in zip(row, widths, text, strict=True)).rstrip()
                     for row in rows)


def _is_known(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _round(number: float) -> float:
    """To three digits, before a unit is chosen: 999.6 kB are 1 MB."""
    return float(f"{number:.3g}")


def _digits(number: float) -> str:
    return f"{number:.3g}" if abs(number) < 999.5 else f"{number:.0f}"
