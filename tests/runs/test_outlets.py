"""What is only told never ends what must be done: outputs that are closed, full or broken, for runs, logs and commands that only print."""
import io
import sys
from pathlib import Path

import pytest

from hpcfl.runs import outlets
from tests.support.fork_server import Forked
from tests.support.tiny_runs import outcome, tiny, write_job

FULL = "import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1)\n"
NOBODY_READS = "import os; reader, writer = os.pipe(); os.dup2(writer, 1); os.close(reader)\n"
CLOSED = "import os, sys; os.close(1); sys.stdout = sys.__stdout__ = None\n"
ALL_CLOSED = CLOSED + "for number in (0, 2): os.close(number)\nsys.stdin = sys.stderr = sys.__stderr__ = None\n"
BOTH_FULL = FULL + "os.dup2(1, 2)\n"
pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")


@pytest.mark.parametrize(("fault", "said"), [(FULL, "No space left on device"), (NOBODY_READS, "Broken pipe"), (BOTH_FULL, "No space left on device"),
                                             (CLOSED, ""), (ALL_CLOSED, "")], ids=["full", "nobody reads", "both full", "closed", "all closed"])
def test_a_run_whose_output_goes_away_goes_on_to_its_end(fault, said, tmp_path):
    run = Forked(tmp_path, "run", write_job(tmp_path, tiny("standalone")), "--out", tmp_path / "run", fault=fault)
    assert run.ends() == 0, run.text()
    assert (tmp_path / "run" / "STATUS").read_text() == "done\n" and outcome(tmp_path / "run").manifest["rows"] == 3
    log = (tmp_path / "run" / "log" / "rank-0000.log").read_text()
    assert log.count("standard output takes nothing any more") == bool(said) and said in log
    assert " 3/3  rounds" in log and "Traceback" not in run.text()


@pytest.mark.parametrize("command", [["data", "list"], ["--help"], ["run", "job.toml", "--dry-run"], ["slurm", "job.toml"]], ids=lambda command: command[0])
def test_commands_that_only_print_end_silently_where_nobody_reads_and_say_that_the_disk_is_full(command, tmp_path):
    write_job(tmp_path, tiny("standalone"))
    unread, full, closed = (Forked(tmp_path / name, *command, fault=f"import os; os.chdir({str(tmp_path)!r})\n{fault}")
                            for name, fault in (("unread", NOBODY_READS), ("full", FULL), ("closed", CLOSED)))
    assert (unread.ends(), unread.text()) == (0, "") and (closed.ends(), closed.text()) == (0, "")
    assert full.ends() == 3
    assert full.text() == "hpcfl: standard output takes nothing any more: No space left on device; what is missing there is lost\n"


def test_the_exit_code_is_that_of_the_command_also_where_nobody_reads(tmp_path):
    failed = Forked(tmp_path, "report", tmp_path / "none", fault=NOBODY_READS)
    assert failed.ends() not in (0, 120) and failed.text().startswith("hpcfl: ")


def test_an_outlet_says_once_why_it_drops_what_it_is_given():
    with open("/dev/full", "w") as full:
        outlet = outlets._open(full.fileno(), full)
        for _ in range(3):
            assert outlet.write("text\u2192\n") == 6
        assert outlets.find_failure(outlet).strerror == "No space left on device" and outlets.find_failure(outlet) is None


def test_a_character_that_the_locale_lacks_is_printed_all_the_same(tmp_path):
    with (tmp_path / "file").open("w", encoding="ascii") as file:
        outlet = outlets._open(file.fileno(), file)
        print("\u2192", file=outlet, flush=True)
    assert (tmp_path / "file").read_text() == "\\u2192\n"


def test_what_no_outlet_has_lost_is_unknown():
    assert outlets.find_failure(None) is outlets.find_failure(io.StringIO()) is outlets.find_failure(sys.__stdout__) is None
