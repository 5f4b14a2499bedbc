"""Arguments: how the words of a command line are read: numbers, places, and whose usage a mistake is told."""
import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hpcfl.files.places import expand_home


def parse_numbers(text: str) -> tuple[int, ...]:
    """Whole numbers from 1 on, set apart by commas. Raises ValueError for anything else."""
    numbers = tuple(map(int, text.split(",")))
    if min(numbers) < 1:
        raise ValueError
    return numbers


def parse_residencies(text: str) -> tuple[str, ...]:
    """Names of residencies, set apart by commas. Raises ValueError for any other name."""
    from hpcfl.federation.residency import RESIDENCIES
    if not RESIDENCIES.keys() >= set(text.split(",")):
        raise ValueError
    return tuple(text.split(","))


class Parser(argparse.ArgumentParser):
    """Says of an argument that a subcommand does not know how that subcommand is used, where argparse tells of the whole program.

    What comes behind "--" goes into `behind`, where a parser's defaults have that.
    """

    def parse_known_args(  # type: ignore[override]  # argparse has it overloaded by the type of the namespace
            self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's, which hands a subcommand's arguments to its parser in this way."""
        words, behind = list(sys.argv[1:] if args is None else args), []
        if self.get_default("behind") is not None and "--" in words:
            cut = words.index("--")
            words, behind = words[:cut], words[cut + 1:]
        known, unknown = super().parse_known_args(words, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        if behind:
            known.behind = behind
        return known, unknown


def expand_homes(arguments: argparse.Namespace) -> argparse.Namespace:
    """The arguments with every path that begins with ~ in the home folder that it stands for: no shell does that behind an equals sign."""
    for name, value in vars(arguments).items():
        if isinstance(value, Path):
            setattr(arguments, name, expand_home(value))
        elif isinstance(value, list):
            setattr(arguments, name, [expand_home(each) if isinstance(each, Path) else each for each in value])
    return arguments
