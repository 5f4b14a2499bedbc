"""Text and paths of the world: every file is UTF-8 whatever the locale, and ~ is somebody's home."""
import ast
import os
import subprocess
import sys
from pathlib import Path

import h5py
import pytest

import hpcfl
from hpcfl import cli
from hpcfl.analysis import scaling
from hpcfl.data import store
from hpcfl.errors import JobError
from hpcfl.files import places
from tests.support.tiny_runs import carry_out, tiny, write_job

ASCII = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}             # Python reads, writes and speaks ASCII where nobody says otherwise
TEXT = ("read_text", "write_text", "FileHandler")
OWN = ("os", "Image", "atomic", "self", "self.ledger", "exchange.ledger", "ledger")   # whose methods of these names open no text, or take care of it


def spoken(call: ast.Call) -> bool:
    """Whether a call that opens text says in which encoding."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
    named = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in named or owner in OWN:
        return True
    if name in TEXT and owner:
        return False
    if name == "open":
        modes = [each.value for each in [*call.args[:2], named.get("mode")] if isinstance(each, ast.Constant) and isinstance(each.value, str)]
        return any("b" in mode for mode in modes)
    return not (name in ("run", "Popen", "check_output") and owner == "subprocess" and ("text" in named or "universal_newlines" in named))


def test_no_file_and_no_process_is_read_in_the_codec_of_the_locale():
    silent = [f"{file.name}:{node.lineno}: {ast.unparse(node)}" for file in sorted(Path(hpcfl.__file__).parent.rglob("*.py"))
              for node in ast.walk(ast.parse(file.read_bytes())) if isinstance(node, ast.Call) and not spoken(node)]
    assert silent == []


@pytest.mark.parametrize(("code", "says"), [("p.read_text()", False), ("p.read_text(encoding='utf-8')", True), ("open(p)", False),
                                            ("open(p, 'rb')", True), ("p.open('w')", False), ("p.open('wb')", True),
                                            ("subprocess.run(c, text=True)", False), ("subprocess.run(c)", True)])
def test_that_sweep_can_fail(code, says):
    assert spoken(ast.parse(code).body[0].value) == says


def test_a_job_with_other_letters_than_english_runs_in_a_posix_locale(tmp_path):
    job = write_job(tmp_path, tiny("standalone", run={"name": "größe"}, federation={"rounds": 1}))
    job.write_bytes(b"\xef\xbb\xbf# gr\xc3\xb6\xc3\x9fe \xe2\x80\x94\n" + job.read_bytes())
    ended = subprocess.run([sys.executable, "-m", "hpcfl", "run", job, "--out", tmp_path / "run"], env=os.environ | ASCII, capture_output=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert 'name = "größe"' in (tmp_path / "run" / "job.toml").read_text(encoding="utf-8")


def test_a_terminal_that_lacks_a_character_is_shown_its_number(tmp_path, monkeypatch):
    with h5py.File(tmp_path / "file.h5", "w") as file:
        file["größe"] = [1]
    printed = subprocess.run([sys.executable, "-m", "hpcfl", "inspect", str(tmp_path / "file.h5")], capture_output=True, timeout=60,
                             env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert printed.returncode == 0 and b"gr\\xf6\\xdfe" in printed.stdout


def test_home_is_meant_by_a_tilde_wherever_a_path_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert places.expand_home("~/data/x") == tmp_path / "data" / "x" and places.expand_home("a/~/b") == Path("a/~/b")
    monkeypatch.setenv("HPCFL_DATA", "~/cache")
    assert store.find_path("own") == tmp_path / "cache" / "own.h5"
    (tmp_path / "states").mkdir()
    job = tiny("standalone", residency={"location": "disk", "folder": "~/states"}, federation={"rounds": 1})
    folder = carry_out(job, tmp_path / "run")
    assert '"~/states"' in (folder / "job.toml").read_text(encoding="utf-8")            # as it was written: another machine has another home
    assert not (tmp_path / "~").exists()


def test_home_is_meant_behind_every_option_that_takes_a_path(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    carry_out(tiny("standalone"), tmp_path / "first")
    for arguments in (["report", "~/first", "--trace=~/trace.json"], ["inspect", "~/first/metrics.h5"],
                      ["run", "~/first/job.toml", "--out=~/second", "--resume=~/first"]):
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        assert end.value.code == 0, capsys.readouterr().err
    assert (tmp_path / "trace.json").is_file() and (tmp_path / "second" / "job.toml").is_file()
    assert not (tmp_path / "~").exists()


def test_a_home_that_nobody_has_is_told(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["inspect", "~nobody-of-this-name/file.h5"])
    assert end.value.code == JobError.exit_code
    assert "there is no home folder that '~nobody-of-this-name' stands for; write the folder out in full" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_that_another_shell_wrote_is_read(tmp_path, encoding):
    (tmp_path / "doctor.json").write_bytes('{"ranks": 2, "wire": [], "by_rank": [{"host": "größe"}]}'.encode(encoding))
    assert scaling.read_doctor(tmp_path / "doctor.json")["by_rank"] == [{"host": "größe"}]
