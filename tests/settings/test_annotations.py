"""Settings of a method that are only annotated: the type says what a job file may put there."""
import dataclasses
import tomllib
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, Optional

import pytest

from hpcfl.errors import JobError
from hpcfl.runs.choices import CHOICES
from hpcfl.settings import annotations, fields, job, manual


class Shape(Enum):
    ROUND = "round"
    SQUARE = "square"


class Depth(Enum):
    SHALLOW = (1, 2)
    DEEP = (3, 4)


@dataclass(frozen=True)
class Config:
    steps: int = 3
    rate: float = 1                                                # noted as a whole number: a job file may hold 0.5
    warm: bool = False
    note: str = ""
    widths: tuple[int, ...] = (4, 8)
    pair: tuple[str, float] = ("a", 0.5)
    names: list[str] = field(default_factory=list)
    way: Literal["up", "down", 3] = "up"
    shape: Shape = Shape.ROUND
    depths: tuple[Depth, ...] = (Depth.DEEP,)
    limit: int | None = None
    older: Optional[float] = None                                  # noqa: UP045  # the form that older configs have
    either: int | str = 5
    quoted: "float" = 0.25
    own: float = fields.real(0.5, 0.0, 1.0)


def resolved(config=Config, **settings):
    return job.resolve({"algorithm": {"name": "mine", **settings}}, {**CHOICES, "algorithm": {"mine": config}}, "some.toml")


def refusal(config=Config, **settings):
    with pytest.raises(JobError) as refused:
        resolved(config, **settings)
    return str(refused.value)


GIVEN = {"steps": 7, "rate": 0.5, "warm": True, "note": "größe", "widths": [1], "pair": ["b", 2], "names": ["x", "y"], "way": 3, "shape": "square",
         "depths": ["SHALLOW", "DEEP"], "limit": 4, "older": 2, "either": "word", "quoted": 1, "own": 0.75}


def test_a_job_file_sets_what_a_field_is_annotated_with():
    assert resolved(**GIVEN).algorithm == Config(
        7, 0.5, True, "größe", (1,), ("b", 2.0), ["x", "y"], 3, Shape.SQUARE, (Depth.SHALLOW, Depth.DEEP), 4, 2.0, "word", 1.0, 0.75)


@pytest.mark.parametrize("settings", [{}, GIVEN])
def test_a_job_with_annotated_settings_reads_back_equal(settings):
    read = resolved(**settings)
    again = job.resolve(tomllib.loads(read.to_toml()), {**CHOICES, "algorithm": {"mine": Config}})
    assert again == read and again.digest() == read.digest() and job.find_differences(again.tables(), read.tables()) == []


@pytest.mark.parametrize(("key", "value", "wanted"), [
    ("steps", 1.5, "a whole number"), ("steps", True, "a whole number"), ("rate", "fast", "a number"), ("rate", float("nan"), "a number"),
    ("warm", 1, "true or false"), ("note", 3, "a string"), ("widths", 4, "a list, each of it a whole number"),
    ("widths", [4, "b"], "a list, each of it a whole number"), ("pair", ["a"], "a list of a string, a number"), ("way", "left", "one of 'up', 'down', 3"),
    ("way", 3.0, "one of"), ("shape", "oval", "one of 'round', 'square'"),
    ("depths", ["MIDDLE"], "each of it one of 'SHALLOW', 'DEEP'"), ("limit", 1.5, "a whole number, or to be left out"),
    ("either", 1.5, "a whole number or a string")])
def test_another_value_is_refused_with_what_is_wanted(key, value, wanted):
    message = refusal(**{key: value})
    assert message.startswith(f"some.toml: algorithm.{key} = {value!r} is not allowed; wanted ") and wanted in message


@pytest.mark.parametrize(("annotation", "spoken"), [(dict, "dict"), (dict[str, int], "dict[str, int]"), (tuple, "tuple"), (complex, "complex"),
                                                    (object, "object"), (list[dict], "list[dict]"), (int | bytes, "int | bytes"), (None, "None")])
def test_a_field_that_says_too_little_is_named_with_its_method_and_what_is_wanted(annotation, spoken):
    config = dataclasses.make_dataclass("Config", [("weights", annotation, None)], frozen=True)
    message = refusal(config)
    assert message.startswith("some.toml: [algorithm] of mine: ") and "Config: field 'weights' is annotated " in message and spoken in message
    assert "wanted int, float, bool, str, a Literal or an Enum" in message


def test_annotations_that_do_not_exist_are_told():
    config = dataclasses.make_dataclass("Config", [("weights", "Nowhere", 1)], frozen=True)
    assert "annotations cannot be read (name 'Nowhere' is not defined)" in refusal(config)


def test_a_setting_without_a_default_is_asked_for():
    config = dataclasses.make_dataclass("Config", [("rate", float)], frozen=True)
    assert "algorithm.rate is not set and has no default; wanted a number" in refusal(config)
    assert resolved(config, rate=2).algorithm.rate == 2.0


def test_a_default_that_its_own_kind_refuses_is_told():
    message = refusal(dataclasses.make_dataclass("Config", [("rate", float, "fast")], frozen=True))
    assert "algorithm.rate = 'fast' is not allowed; wanted a number, also for the default that [algorithm] of mine has for it" in message


def test_a_config_that_is_no_dataclass_is_named():
    assert "test_annotations.Plain is not a dataclass; wanted @dataclass(frozen=True)" in refusal(type("Plain", (), {"__module__": "test_annotations"}))


def test_what_a_config_refuses_itself_is_an_error_of_the_job():
    @dataclass(frozen=True)
    class Bounded:
        low: int = 0
        high: int = 1

        def __post_init__(self):
            if self.low > self.high:
                raise ValueError(f"low {self.low} is above high {self.high}")
    assert "[algorithm] of mine is not allowed: low 3 is above high 1" in refusal(Bounded, low=3)


def test_a_field_with_a_name_that_toml_wants_in_quotes_survives_the_round_trip():
    config = dataclasses.make_dataclass("Config", [("größe", int, 1)], frozen=True)
    again = job.resolve(tomllib.loads(resolved(config, größe=5).to_toml()), {**CHOICES, "algorithm": {"mine": config}})
    assert again.algorithm.größe == 5


def test_a_field_that_the_class_sets_itself_is_no_setting():
    config = dataclasses.make_dataclass("Config", [("rate", float, 1.0), ("cache", dict, field(init=False, default_factory=dict))], frozen=True)
    assert resolved(config).tables()["algorithm"] == {"name": "mine", "rate": 1.0}


def test_a_plain_field_says_what_it_means_in_its_metadata_or_not_at_all():
    rate = field(metadata={"meaning": "share of\n  heads", "unit": "percent"})
    config = dataclasses.make_dataclass("Config", [("rate", float, rate), ("limit", int | None, None), ("shape", Shape, Shape.ROUND)], frozen=True)
    settings = annotations.settings(config, "", CHOICES)
    assert (settings["rate"].meaning, settings["rate"].unit, settings["limit"].meaning) == ("share of\n  heads", "percent", "")
    text = manual.toml(manual.find("mine", {**CHOICES, "algorithm": {"mine": config}}))
    assert [" ".join(line.split()) for line in text.splitlines()] == [
        "[algorithm]", 'name = "mine"', "# rate must be set # share of heads (a number, in percent)",
        "# limit is not set # (a whole number, or to be left out)",
        "shape = \"round\" # (one of 'round', 'square')"]
