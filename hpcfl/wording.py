"""Wording: ranks, reasons, bytes, seconds and what somebody may have meant, as people read them."""
import difflib
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence


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


def numbers_text(numbers: Sequence[int], noun: str = "rank") -> str:
    """Ranks, or what else is numbered, in words: "rank 3", "ranks 0-3, 6"."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][-1] + 1:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    return f"{noun}{'s' * (len(numbers) > 1)} {', '.join('-'.join(map(str, span)) for span in spans)}"


def count_text(count: int, word: str, plural: str = "s") -> str:
    """A number and its noun: "1 rank", "4 ranks"."""
    return f"{count} {word}{plural if count != 1 else ''}"


def nearest(word: str, known: Iterable[str], alike: float = 0.5) -> str:
    """The known word that is most like another, where they are so much alike (0 to 1); "" where none is."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=alike)), "")


def did_you_mean(*meant: str, before: str = "; ") -> str:
    """"; did you mean 'lr' or 'epochs'?"; nothing where nothing may have been meant."""
    told = [repr(word) for word in meant if word]
    return f"{before}did you mean {' or '.join(told)}?" if told else ""


def cause_text(error: BaseException) -> str:
    """The first line of what an error says, without the address of an object in memory, which nobody can look up; its type where it says nothing."""
    lines = re.sub(r"\s*<[^<>]* at 0x[0-9a-fA-F]+>", "", str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def printable_text(text: str) -> str:
    """Text in which control characters are escaped: names out of a file must not steer the terminal."""
    return "".join(character if character.isprintable() else character.encode("unicode_escape").decode() for character in text)


def byte_text(count: float) -> str:
    """Bytes in three digits: "64 B", "1.05 MB"."""
    power = min(4, int(math.log10(count) // 3)) if count >= 1 else 0
    return f"{_digits(count / 1000 ** power)} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def duration_text(seconds: float) -> str:
    """Seconds in three digits: "12.3 us", "4.1 ms", "2.5 s"."""
    unit, factor = next(((unit, factor) for unit, factor in (("s", 1), ("ms", 1e3)) if seconds * factor >= 1), ("us", 1e6))
    return f"{_digits(seconds * factor)} {unit}"


def align_rows(rows: Sequence[Sequence[str]], words: int, also: Collection[str] = ()) -> str:
    """Rows of equally many cells as lines: the first `words` columns, the last one, if it has no heading, and those headed `also` are text, on the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = [column < words or not heading or heading in also for column, heading in enumerate(rows[0])]
    return "\n".join("  ".join(cell.ljust(width) if left else cell.rjust(width) for cell, width, left in zip(row, widths, text, strict=True)).rstrip()
                     for row in rows)


def _digits(number: float) -> str:
    return f"{number:.3g}" if number < 999.5 else f"{number:.0f}"
