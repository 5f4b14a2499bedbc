"""Lock: who holds a run folder is said, and whether a run that says it is running still is."""
import fcntl
import json
import os
import platform
import time
from datetime import datetime

import psutil
import pytest

from hpcfl.files import lock


@pytest.mark.parametrize(("text", "words"), [
    ('{"host": "n1", "pid": 7, "started": "2026-01-02T03:04:05+00:00"}\n', "process 7 on n1, since 2026-01-02T03:04:05+00:00"),
    ("process 7 on n1\n", "process 7 on n1"), ('{"host": "n1"}', '{"host": "n1"}'), ("7", "7"), ("", "")])
def test_who_holds_a_folder_is_said_whoever_wrote_it(text, words):
    assert lock.holder_text(text) == words


@pytest.mark.parametrize("held", [True, False])
def test_on_its_host_a_run_is_alive_as_long_as_its_lock_is_held(held, tmp_path):
    with (tmp_path / lock.NAME).open("w") as handle:
        handle.write(json.dumps(lock.describe_holder()))
        handle.flush()
        if held:
            fcntl.flock(handle, fcntl.LOCK_EX)
        status = lock.read_status(tmp_path, "running")
    assert status == "running" if held else status.startswith(f"died: process {os.getpid()} on {platform.node()} ended without a word"), status


def test_of_a_run_that_ended_or_is_on_another_host_the_lock_says_nothing(tmp_path):
    assert lock.read_status(tmp_path, "done") == "done"
    assert lock.read_status(tmp_path, "running").startswith("running?: nobody says where, which cannot be checked from here; last sign of it ")
    (tmp_path / lock.NAME).write_text('{"host": "far-away", "pid": 7, "started": "2026-01-01T00:00:00+00:00"}\n')
    (tmp_path / "LATEST").write_text("round-000001\n")
    os.utime(tmp_path / "LATEST", (0, time.time() - 3 * 86400))
    assert lock.read_status(tmp_path, "running") == "running?: on far-away, which cannot be checked from here; last sign of it 3 d ago"


def test_a_holder_says_host_process_and_when_it_began():
    held = lock.describe_holder()
    assert (held["host"], held["pid"]) == (platform.node(), os.getpid())
    assert datetime.fromisoformat(held["started"]).timestamp() == pytest.approx(psutil.Process().create_time(), abs=1)
    assert lock.holder_text(json.dumps(held)) == f"process {os.getpid()} on {platform.node()}, since {held['started']}"
