"""Errors: an exit code for each, and notes that say in one line whose work failed."""
import pytest

from hpcfl import errors
from hpcfl.errors import HpcflError, NonFiniteError, error_text, note_whom

CODES = {"HpcflError": 1, "JobError": 2, "EnvironmentFault": 3, "DataError": 4, "CheckpointError": 5, "TrainingError": 6, "NonFiniteError": 6, "RankMissing": 7,
         "LayoutError": 1, "Stopped": 75, "Interrupted": 130}


def test_every_error_has_the_exit_code_that_is_promised():
    assert {name: kind.exit_code for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, HpcflError)} == CODES


def failed(error: BaseException, *whom: str) -> BaseException:
    """The error after it went through blocks that note somebody, the innermost last."""
    def fall(rest: tuple[str, ...]) -> None:
        if not rest:
            raise error
        with note_whom(lambda: rest[0]):
            fall(rest[1:])
    with pytest.raises(type(error)) as raised:
        fall(whom)
    return raised.value


def test_the_innermost_block_says_whose_work_failed():
    error = failed(ValueError("too small"), "clients 0-3", "client 2")
    assert error.__notes__ == ["at client 2"]
    assert error_text(error, 1) == "ValueError on rank 1, client 2: too small"


def test_what_is_not_noted_or_says_nothing_is_left_out():
    assert error_text(ValueError(), 0) == "ValueError on rank 0"
    error = failed(KeyError("y"))
    error.add_note("raised in FedAvg.train, client 3")
    assert error_text(error, 2) == "KeyError on rank 2: 'y'", "a note for the traceback is no part of the line"


def test_errors_on_purpose_speak_for_themselves():
    error = failed(NonFiniteError("client 3: NaN; lower the rate"), "client 2")
    assert not hasattr(error, "__notes__") and error_text(error, 5) == "client 3: NaN; lower the rate"


def test_somebody_is_asked_for_a_name_only_where_something_fails():
    def ask() -> str:
        pytest.fail("nothing went wrong")
    with note_whom(ask):
        pass
