"""Manual: what every setting of a job means, is by default and may be, as a commented job, as Markdown and as data."""
import dataclasses
import inspect
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hpcfl.errors import JobError
from hpcfl.settings import annotations, synonyms
from hpcfl.settings.fields import Choices, Setting, one_of
from hpcfl.settings.job import Job, toml_line
from hpcfl.settings.sections import SECTIONS
from hpcfl.wording import did_you_mean, nearest, printable_text

COLUMN, WIDTH = 30, 100                                            # of a commented job: where comments begin, and where lines end
PAPER = 120                                                        # where lines of Markdown end
METHOD = "The method, and what it lets be set: `hpcfl settings METHOD`."


@dataclass(frozen=True)
class Block:
    """Settings of one section, of [algorithm] those of one method; `meaning` says what they are about."""

    section: str
    meaning: str
    settings: Mapping[str, Setting]
    method: str = ""

    @property
    def defaults(self) -> dict[str, Any]:
        """What each setting is where nobody sets it."""
        return {key: setting.default for key, setting in self.settings.items()}

    def only(self, key: str) -> list["Block"]:
        """The block with one of its settings alone; nothing where it has no such setting."""
        return [dataclasses.replace(self, settings={key: self.settings[key]})] if key in self.settings else []


def blocks(choices: Choices) -> list[Block]:
    """All settings: the sections in the order of a job file, then what each method lets be set."""
    configs = choices["algorithm"]
    method = Block("algorithm", METHOD, {"name": Setting(one_of(tuple(configs)), dataclasses.MISSING, "the method")})
    sections = [_block(name, section, choices) if section else method for name, section in SECTIONS.items()]
    return sections + [_block("algorithm", config, choices, name) for name, config in configs.items()]


def find(what: str, choices: Choices) -> list[Block]:
    """The blocks of a section or a method, or of every setting that is called so: "training", "fedvtc", "training.lr", "fedvtc.dm", "lr".

    Raises: JobError for what is none of them, with the nearest that is.
    """
    every = blocks(choices)
    owner, dot, key = what.rpartition(".")
    found = [block for block in every if what == (block.method or block.section)]
    found = found or [one for block in every if not dot or owner in (block.section, block.method) for one in block.only(key)]
    if not found:
        known = {block.section: tuple(block.settings) for block in every if not block.method}
        words = [*known, *choices["algorithm"], *(f"{before}{name}" for block in every for name in block.settings for before in ("", f"{block.section}."))]
        meant = synonyms.suggest_setting(owner, key, None, known) or did_you_mean(nearest(what, words)) or ";"
        raise JobError(f"'{what}' is no section, method or setting{meant} there are the sections {', '.join(known)} and the methods "
                       f"{', '.join(choices['algorithm'])}")
    return found


def toml(found: Iterable[Block]) -> str:
    """Blocks as part of a job file in which everything is as by default, each setting with a comment that says what it means and may be."""
    return "\n\n".join(_section(block, {"name": block.method} | block.defaults if block.method else block.defaults) for block in found)


def commented(job: Job, choices: Choices) -> str:
    """The resolved job as a job file that reads back equal, each setting with its comment."""
    parts = {block.section: block for block in blocks(choices) if block.method in ("", job.algorithm_name)}            # the method's own comes last
    return "\n\n".join(_section(parts[section], table) for section, table in job.tables().items())


def markdown(found: Iterable[Block], choices: Choices) -> str:
    """Blocks as lists under headings; methods that let the same be set share one."""
    every, lines = list(found), []
    for block in (block for block in every if not block.method):
        lines += ["", f"### `[{block.section}]`", "", *textwrap.wrap(block.meaning, PAPER), "", *_items(block)]
    alike: dict[type, list[Block]] = {}
    for block in (block for block in every if block.method):
        alike.setdefault(choices["algorithm"][block.method], []).append(block)
    for same in (same for same in alike.values() if same[0].settings):
        lines += ["", f"### `[algorithm]` of {_methods(same)}", "", *textwrap.wrap(same[0].meaning, PAPER), *[""] * bool(same[0].meaning), *_items(same[0])]
    free = [block for block in every if block.method and not block.settings]
    lines += ["", f"{_methods(free)} let nothing be set."] if free else []
    return "\n".join(lines[1:])


def data(found: Iterable[Block]) -> list[dict[str, Any]]:
    """One dictionary for each setting, for JSON."""
    return [{"setting": f"{block.section}.{key}", "algorithm": block.method or None, "default": None if _unset(setting.default) else setting.default,
             "required": setting.default is dataclasses.MISSING, "meaning": setting.meaning, "unit": setting.unit, "allowed": setting.kind.allowed,
             "names": list(setting.kind.names)} for block in found for key, setting in block.settings.items()]


def _block(name: str, section: type, choices: Choices, method: str = "") -> Block:
    told = inspect.getdoc(section) or ""
    written = "" if told.startswith(f"{section.__name__}(") else told                    # a dataclass without a docstring is given its signature
    settings = annotations.settings(section, f"[{name}] of {method}" if method else f"[{name}]", choices)
    settings = {key: dataclasses.replace(setting, default=annotations.to_job_value(setting.default)) for key, setting in settings.items()}
    return Block(name, " ".join(written.split()), settings, method)


def _section(block: Block, values: Mapping[str, Any]) -> str:
    """A section of a job file with these values."""
    lines = _with_comment(f"[{block.section}]", block.meaning)
    for key, value in values.items():
        unset = f"# {key} {'must be' if value is dataclasses.MISSING else 'is not'} set"
        told = _told(block.settings[key], value) if key in block.settings else ()
        lines += _with_comment(unset if _unset(value) else toml_line(key, value), *told)
    return "\n".join(lines)


def _with_comment(text: str, *comments: str) -> list[str]:
    """A line of a job file and its comments, together where one line takes them: behind it, below where it is long."""
    room, whole = WIDTH - COLUMN - 2, " ".join(filter(None, comments))
    told = [whole] if len(whole) <= room else comments
    lines = [f"{'':{COLUMN}}# {line}" for comment in told for line in textwrap.wrap(printable_text(comment), room, break_on_hyphens=False)]
    if lines and len(text) < COLUMN:
        return [f"{text:{COLUMN}}{lines[0][COLUMN:]}", *lines[1:]]
    return [text, *lines]


def _told(setting: Setting, value: Any) -> tuple[str, str]:
    """What a setting means; and what it may be, with its default where the value is another."""
    allowed = setting.kind.allowed + (f", in {setting.unit}" if setting.unit else "")
    usual = "" if _unset(setting.default) else toml_line("", setting.default)
    default = f"by default {usual}; " if usual and not _unset(value) and toml_line("", value) != usual else ""
    return " ".join(setting.meaning.split()), f"({default}{allowed})"


def _items(block: Block) -> list[str]:
    """A list of settings in Markdown."""
    lines = []
    for key, setting in block.settings.items():
        head = f"`{key}`" if _unset(setting.default) else f"`{toml_line(key, setting.default)}`"
        told = " ".join(filter(None, _told(setting, setting.default)))
        lines += textwrap.wrap(f"{head}: {told}", PAPER, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)
    return lines


def _methods(same: Iterable[Block]) -> str:
    return ", ".join(f"`{block.method}`" for block in same)


def _unset(value: Any) -> bool:
    return value is None or value is dataclasses.MISSING
