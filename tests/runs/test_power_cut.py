"""Power cuts: a run killed at any moment, any number of times, goes on from its newest checkpoint and ends as if nothing had happened."""
import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import h5py
import pytest

from hpcfl.files import atomic, trees
from hpcfl.runs import checkpoint
from hpcfl.runs.checkpoint import find_latest
from tests.support.fork_server import Forked
from tests.support.tiny_runs import apart, carry_out, checkpoint_of, deterministic, left_half_written, outcome, started, tiny, write_job

KILLS = 50
SEED = int(os.environ.get("HPCFL_TEST_SEED", time.time_ns() % 10**9))
WRITING = ("client and server states", "record", "manifest and LATEST", "pruning")
SAYS_WHAT_IT_DOES = """
import os
from hpcfl.files import trees
from hpcfl.runs import checkpoint
from hpcfl.federation.exchange import Exchange
from hpcfl.runs.record import Record
from hpcfl.runs.simulation import Simulation
file, open_ones = os.open("doing", os.O_CREAT | os.O_WRONLY), ["start-up"]

def says(owner, name, what):
    function = getattr(owner, name)

    def said(*arguments, **named):
        open_ones.append(what)
        os.pwrite(file, what.ljust(40).encode(), 0)                # whoever reads it sees it at once, also behind a kill
        try:
            return function(*arguments, **named)
        finally:
            open_ones.pop()
            os.pwrite(file, open_ones[-1].ljust(40).encode(), 0)
    setattr(owner, name, said)
os.pwrite(file, b"start-up".ljust(40), 0)
says(Simulation, "run", "between")
says(Exchange, "work", "training")
says(Simulation, "_evaluate", "evaluation")
says(trees, "write_trees", "client and server states")
says(Record, "write", "record")
says(checkpoint, "_seal", "manifest and LATEST")
says(checkpoint, "_prune", "pruning")
"""
KEEPS_IMAGES = """
import shutil, sys
from pathlib import Path
from hpcfl.runs import checkpoint
save, inside = checkpoint.save, []
STEPS = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.scandir")

def save_watched(folder, world, state, *rest):
    inside.append(state.rows)
    save(folder, world, state, *rest)
    inside.clear()

def keep_image(event, arguments):
    if inside and event in STEPS and "{folder}/" in str(arguments[0]):
        rows = inside.pop()                                        # what follows are no steps of the run
        images = Path("images")
        shutil.copytree("{folder}", images / f"{{rows}}-{{len(list(images.glob('*'))):03d}}")
        inside.append(rows)
checkpoint.save = save_watched
Path("images").mkdir()
sys.addaudithook(keep_image)
"""


def newest_rows(folder: Path) -> int:
    """Rounds behind the newest checkpoint, after a look at all that a killed run left: whatever counts is whole."""
    sealed = sorted(path.parent for path in folder.glob("checkpoints/*/manifest.json"))
    for each in sealed:
        for name, entry in json.loads((each / "manifest.json").read_text())["files"].items():
            assert hashlib.sha256((each / name).read_bytes()).hexdigest() == entry["sha256"], f"{each / name} counts, and is not whole"
            assert trees.read_trees(each / name) or not entry["clients"]
    newest = find_latest(folder)
    assert newest in (None, *sealed), f"LATEST names {newest}, which does not count"
    rows = int(newest.name[-6:]) if newest else 0
    if (folder / "metrics.h5").exists():
        with h5py.File(folder / "metrics.h5") as record:
            assert len({len(column) for column in record["rounds"].values()}) == 1 and len(record["rounds/round"]) >= rows
    else:
        assert not rows
    assert not (folder / "STATUS").exists() or (folder / "STATUS").read_text() in ("running\n", "done\n")
    return rows


def same(folder: Path, whole: Path) -> None:
    """Whether a run ended as the undisturbed one, with nothing half-written or half-removed; killed before the last pruning, it has a checkpoint more."""
    assert not (found := apart(outcome(folder), outcome(whole))), "\n".join(found)
    assert (folder / "STATUS").read_text() == "done\n" and not left_half_written(folder)
    assert {path.name for path in (folder / "checkpoints").iterdir()} >= {path.name for path in (whole / "checkpoints").iterdir()}
    assert all((path / "manifest.json").is_file() for path in (folder / "checkpoints").iterdir())


@pytest.mark.costly
def test_a_run_killed_fifty_times_at_random_moments_always_goes_on_to_the_same_end(tmp_path, capsys):
    """Moments are uniform over the length of an undisturbed run, less where less of it is left; one that ends before is compared, and another begins."""
    draw = random.Random(SEED)
    path = write_job(tmp_path, tiny("fedvtc", federation={"clients": 3, "rounds": 4}, checkpoint={"every": 1, "keep": 1}))
    for name in ("first", "whole"):                                # the first also starts the server from which all are forked
        since = time.monotonic()
        assert Forked(tmp_path, "run", path, "--out", tmp_path / name, fault=SAYS_WHAT_IT_DOES).ends() == 0
    whole_s = time.monotonic() - since
    killed, chain, rows = Counter[str](), 0, 0
    while True:
        folder = tmp_path / f"run {chain}"
        run = Forked(tmp_path, "run", path, "--out", folder, fault=SAYS_WHAT_IT_DOES)
        code = run.ends(within_s=draw.uniform(0, whole_s * (1 - rows / 10)) if killed.total() < KILLS else 60)
        if code is None:
            run.process.kill()
            code = run.ends()
        if rows and "rounds ->" in run.text():                     # else it was killed before it said so, or was done when it was killed the last time
            assert f"resumed after round {rows} of 5" in run.text() or (code != 0 and "resumed" not in run.text()), run.text()
        if code == 0:
            same(folder, tmp_path / "whole")
            chain, rows = chain + 1, 0
            if killed.total() >= KILLS:
                break
            continue
        assert code == -signal.SIGKILL, f"seed {SEED}, {killed}: ended with {code}\n{run.text()}"
        killed[(tmp_path / "doing").read_text().strip()] += 1
        before, rows = rows, newest_rows(folder)
        assert rows >= before
    with capsys.disabled():
        met = ", ".join(f"{what} {count}" for what, count in killed.most_common())
        print(f"\nHPCFL_TEST_SEED={SEED}: {killed.total()} kills in {chain} runs, which all ended as the undisturbed one; they met {met}")
    assert sum(killed[what] for what in WRITING) > 0, "no kill met a checkpoint"


def test_every_step_of_a_checkpoint_leaves_a_run_that_goes_on_to_the_same_end(tmp_path):
    """The run folder as a kill would leave it before each operation on files: of the first checkpoint, and of one that prunes an older one."""
    job = tiny("standalone", federation={"clients": 2, "participation": 1.0}, evaluation={"every": 1}, checkpoint={"every": 1, "keep": 1})
    folder = tmp_path / "run"
    run = Forked(tmp_path, "run", write_job(tmp_path, job), "--out", folder, fault=KEEPS_IMAGES.format(folder=folder))
    assert run.ends() == 0, run.text()
    different: dict[tuple, Path] = {}
    for image in sorted((tmp_path / "images").iterdir()):
        held = tuple((str(each.relative_to(image)), each.is_file() and each.read_bytes()) for each in sorted(image.rglob("*")) if "log" not in each.parts)
        different.setdefault(held, image)
    found = Counter[tuple[str, int]]()
    for image in different.values():
        begun, rows = image.name.split("-")[0], newest_rows(image)
        found[begun, rows] += 1
        carry_out(job, image)
        same(image, folder)
    assert found.keys() == {("1", 0), ("1", 1), ("2", 1), ("2", 2), ("3", 2), ("3", 3)} and min(found.values()) >= 1, found
    assert found.total() > 30, "operations on files have become few; are they still seen?"


def test_what_counts_is_on_the_disk_before_it_counts(tmp_path, monkeypatch):
    """After a power cut there is what was flushed: files by fsync, names by fsync of their folder."""
    flushed, lasting, told = set[int](), {tmp_path}, []
    sync, replace, prune = atomic.sync, os.replace, checkpoint._prune

    def noted(path):
        sync(path)
        flushed.add(path.stat().st_ino)
        lasting.update(path.iterdir() if path.is_dir() else ())

    def lost(path):
        names = [each for each in (path, *path.parents) if each.is_relative_to(tmp_path)]
        return not lasting.issuperset(names) or path.stat().st_ino not in flushed

    def watched(source, target):
        assert source.stat().st_ino in flushed, f"{target} takes the place of another before it is on the disk"
        needed = {"manifest.json": lambda: [*target.parent.glob("*.h5"), target.parent.parent.parent / "metrics.h5"],
                  "LATEST": lambda: [target.parent / "checkpoints" / source.read_text().strip() / "manifest.json"]}.get(target.name, list)
        assert not [path for path in needed() if lost(path)], f"{target.name} counts on what a power cut would take"
        told.append(target.name)
        lasting.discard(target)
        replace(source, target)

    def prune_behind_latest(newest, keep):
        assert not lost(newest.parent.parent / "LATEST")
        told.append("prune")
        prune(newest, keep)
    monkeypatch.setattr(atomic, "sync", noted)
    monkeypatch.setattr(atomic.os, "replace", watched)
    monkeypatch.setattr(checkpoint, "_prune", prune_behind_latest)
    carry_out(tiny("standalone", checkpoint={"every": 1, "keep": 1}), tmp_path / "below" / "run")
    assert told.count("manifest.json") == told.count("LATEST") == told.count("prune") == 3


def test_a_run_without_latest_goes_on_from_the_checkpoint_that_counts(tmp_path):
    job = tiny("standalone", checkpoint={"every": 1, "keep": 3})
    whole = carry_out(job, tmp_path / "whole")
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(checkpoint_of(tmp_path / "run", 3))
    (tmp_path / "run" / "LATEST").unlink()
    (tmp_path / "run" / "STATUS").write_text("running\n")
    carry_out(job, tmp_path / "run")
    assert "resumed after round 2 of 3" in (tmp_path / "run" / "log" / "rank-0000.log").read_text()
    same(tmp_path / "run", whole)


def test_what_is_left_of_a_checkpoint_takes_the_place_of_none(tmp_path):
    job = tiny("standalone", federation={"rounds": 4}, checkpoint={"every": 1, "keep": 2})
    whole = carry_out(job, tmp_path / "whole")
    shutil.copytree(whole, tmp_path / "run")
    for rows in (1, 2):                                            # half pruned
        checkpoint_of(tmp_path / "run", rows).mkdir(exist_ok=True)
        (checkpoint_of(tmp_path / "run", rows) / "manifest.json").unlink(missing_ok=True)
    checkpoint_of(tmp_path / "run", 4).rename(tmp_path / "later")
    (tmp_path / "run" / "LATEST").write_text("round-000003\n")
    (tmp_path / "run" / "STATUS").write_text("running\n")
    carry_out(job, tmp_path / "run")
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"round-000003", "round-000004"}


@pytest.mark.costly
def test_a_job_of_two_ranks_killed_whole_three_times_goes_on_to_the_same_end(tmp_path):
    draw = random.Random(SEED)
    job = deterministic(tiny("fedvtc", federation={"rounds": 15}, checkpoint={"every": 1, "keep": 1}, evaluation={"every": 5}))
    path, folder, rows = write_job(tmp_path, job), tmp_path / "run", 0
    whole = carry_out(job, tmp_path / "whole")
    for number in range(3):
        with started(tmp_path / str(number), "run", path, "--out", folder, ranks=2) as running:
            until = time.monotonic() + 60
            while not (newest := find_latest(folder)) or int(newest.name[-6:]) == rows:
                assert running.process.poll() is None and time.monotonic() < until, running.text()
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 0.3))
            running.end_all()
            assert not rows or f"resumed after round {rows} of 16" in running.text(), running.text()
        before, rows = rows, newest_rows(folder)
        assert before < rows < 16, f"seed {SEED}"
    carry_out(job, folder)
    same(folder, whole)
