"""What tests/run says at its end of tests that no suite ran."""
import json

from tests.support.skipped import list_reasons


def test_a_test_is_skipped_where_no_suite_ran_it_and_reasons_are_counted(tmp_path):
    notes = [("a", "need --with-mpi option to run"), ("b", "no SLURM"), ("c", None), ("d", "no SLURM"), ("e", "no GPU"),
             ("a", "Test requires 3 MPI processes"), ("a", None), ("b", "no SLURM")]
    (tmp_path / "notes").write_text("".join(f"{json.dumps(note)}\n" for note in notes))
    assert list_reasons(tmp_path / "notes") == [("no SLURM", 2), ("no GPU", 1)]
    (tmp_path / "notes").write_text("")
    assert list_reasons(tmp_path / "notes") == []
