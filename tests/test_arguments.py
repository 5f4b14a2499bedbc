"""The words of a command line: numbers, homes, what comes behind --, and whose usage a mistake is told."""
from argparse import Namespace
from pathlib import Path

import pytest

from hpcfl.arguments import Parser, expand_homes, parse_numbers, parse_residencies


def test_numbers_and_residencies_are_read_as_they_stand():
    assert parse_numbers("1,2,64") == (1, 2, 64) and parse_residencies("disk,device") == ("disk", "device")


@pytest.mark.parametrize(("parse", "text"), [(parse_numbers, "0"), (parse_numbers, "1,x"), (parse_numbers, ""), (parse_residencies, "disk,moon")])
def test_other_words_are_refused(parse, text):
    with pytest.raises(ValueError):
        parse(text)


@pytest.fixture
def parser():
    """A program with one command that takes options for somebody else behind --, and one that does not."""
    parser = Parser(prog="program")
    commands = parser.add_subparsers(required=True)
    passing = commands.add_parser("passing")
    passing.add_argument("--own", type=int)
    passing.set_defaults(behind=())
    commands.add_parser("plain")
    return parser


def test_what_comes_behind_the_dashes_is_kept_word_by_word(parser):
    found = parser.parse_args(["passing", "--own", "3", "--", "--exclusive", "--own", "x"])
    assert found.own == 3 and list(found.behind) == ["--exclusive", "--own", "x"]


def test_a_mistake_is_told_with_the_usage_of_its_command(parser, capsys):
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["plain", "--own", "3"])
    assert "usage: program plain" in capsys.readouterr().err


def test_a_tilde_behind_an_equals_sign_is_a_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    found = expand_homes(Namespace(out=Path("~/runs"), runs=[Path("~"), Path("here")], name="~"))
    assert found.out == Path("/home/somebody/runs") and found.runs == [Path("/home/somebody"), Path("here")] and found.name == "~"
