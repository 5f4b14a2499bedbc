"""Prediction: known answers for balanced and uneven clients, wires of latency or of bandwidth alone, fits of a line, and refusals with the way out."""
import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpcfl import cli
from hpcfl.accounts import EXCHANGES, SECONDS
from hpcfl.analysis import scaling
from hpcfl.analysis.scaling import ALGORITHMS, Line, Wire, measure_round
from hpcfl.doctor.probes import SIZES
from hpcfl.errors import JobError
from hpcfl.report.recording import read
from tests.support.tiny_runs import carry_out, tiny

FREE = Wire(dict.fromkeys(ALGORITHMS, Line(0.0, 0.0)), "a wire that costs nothing")
JOB = '[run]\nname = "toy"\n\n[federation]\nserver_rank = "{server}"\n'


def wire(latency_s: float = 0.0, byte_s: float = 0.0) -> Wire:
    return Wire(dict.fromkeys(ALGORITHMS, Line(latency_s, byte_s)), "a toy")


def record(folder: Path, train_s: list[float], flops: list[int] | None = None, rounds: int = 3, ranks: int = 1, server: str = "shared",
           wall_s: float | None = None, wire: dict[str, float] | None = None, change=lambda file: None, **seconds: float) -> Path:
    """A run in which each round is like the others: what clients train, beside that `seconds` by kind at every rank; costs are as measured if not given."""
    clients, booked = len(train_s), {"train": sum(train_s) / ranks} | seconds
    folder.mkdir(parents=True)
    with h5py.File(folder / "metrics.h5", "w") as file:
        file.attrs.update(schema=1, algorithm="toy", job=JOB.format(server=server), clients=clients, classes=1, ranks=ranks)
        file.create_dataset("rounds/phase", data=np.array(["rounds"] * rounds, object), dtype=h5py.string_dtype())
        busy_s = sum(spent for kind, spent in booked.items() if kind != "checkpoint")
        file["rounds/round"], file["rounds/wall_s"] = np.arange(rounds), np.full(rounds, wall_s or busy_s)
        file["train/seconds"] = np.tile(np.array(train_s), (rounds, 1))
        file["bytes/simulated_up"] = np.ones((rounds, clients), int)
        file["clients/forward_flops"] = flops or [int(1000 * each) for each in train_s]
        file["partition/train"] = np.ones((clients, 1), int)
        for kind in SECONDS:
            file[f"seconds/{kind}"] = np.full((rounds, ranks), booked.get(kind, 0.0))
        for kind in (*EXCHANGES, "item_s"):
            file[f"wire/{kind}"] = np.full(rounds, (wire or {}).get(kind, 0.0))
        change(file)
    return folder


def predicted(folder: Path, ranks: int, over: Wire = FREE, clients: int | None = None) -> dict:
    round_ = measure_round(read(folder), over)
    return scaling.predict(round_, over, ranks, clients or round_.clients)


def told(lines: dict[str, Line], ranks: int = 2, hosts: int = 1) -> dict:
    """What a doctor would say of a wire that is as the model has it."""
    rows = [{"collective": name, "rank_bytes": count, "median_s": line.seconds(ALGORITHMS[name](ranks), count), "repetitions": 3}
            for count in SIZES for name, line in lines.items()]
    return {"ranks": ranks, "wire": rows, "by_rank": [{"rank": rank, "host": f"n{rank % hosts + 1}"} for rank in range(ranks)]}


def said(folder: Path, what: object) -> Path:
    path = folder / "doctor.json"
    path.write_text(what if isinstance(what, str) else json.dumps(what))
    return path


@pytest.mark.parametrize(("ranks", "round_s"), [(1, 8.0), (2, 4.0), (4, 2.0), (8, 1.0)])
def test_balanced_clients_on_a_free_wire_take_their_share(tmp_path, ranks, round_s):
    found = predicted(record(tmp_path / "run", [1.0] * 8), ranks)
    assert found["round_s"] == pytest.approx(round_s) and found["speed_up"] == pytest.approx(ranks) and found["efficiency"] == pytest.approx(1)
    assert found["waiting_s"] == pytest.approx(0) and found["limit"] == "compute" and found["clients_per_rank"] == 1


def test_ranks_without_a_client_wait_and_nothing_becomes_faster(tmp_path):
    found = predicted(record(tmp_path / "run", [1.0] * 8), 32)
    assert (found["round_s"], found["compute_s"], found["waiting_s"]) == pytest.approx((1, 0.25, 0.75))
    assert found["speed_up"] == pytest.approx(8) and found["efficiency"] == pytest.approx(0.25) and found["limit"] == "waiting"


def test_one_slow_client_is_what_the_others_wait_for(tmp_path):
    folder = record(tmp_path / "run", [5.0, 1.0, 1.0, 1.0])
    assert [predicted(folder, ranks)["round_s"] for ranks in (1, 2, 4)] == pytest.approx([8, 5, 5])
    found = predicted(folder, 4)
    assert (found["compute_s"], found["waiting_s"], found["limit"]) == (pytest.approx(2), pytest.approx(3), "waiting")


def test_clients_are_placed_by_expected_cost_as_a_run_places_them(tmp_path):
    found = predicted(record(tmp_path / "run", [5.0, 1.0, 3.0, 1.0], flops=[7, 7, 7, 7]), 2)
    assert found["round_s"] == pytest.approx(8)                    # clients 0 and 2 on one rank, though by seconds 0 and 3 would be better


def test_a_dedicated_server_hosts_nobody_where_there_is_another_rank(tmp_path):
    folder = record(tmp_path / "run", [1.0] * 4, server="dedicated")
    assert [predicted(folder, ranks)["round_s"] for ranks in (1, 2, 3)] == pytest.approx([4, 4, 2])


def test_rounds_are_replayed_with_those_who_took_part(tmp_path):
    def take_turns(file):
        file["train/seconds"][...] = [[2, np.nan], [np.nan, 2], [2, np.nan]]
    assert [predicted(record(tmp_path / "run", [1.0, 1.0], change=take_turns), ranks)["compute_s"] for ranks in (1,)] == pytest.approx([2])
    assert predicted(tmp_path / "run", 2)["waiting_s"] == pytest.approx(1) and predicted(tmp_path / "run", 2)["round_s"] == pytest.approx(2)


@pytest.mark.parametrize(("ranks", "levels"), [(2, 1), (4, 2), (64, 6), (65, 7), (512, 9)])
def test_a_wire_of_latency_alone_costs_the_levels_of_the_tree(tmp_path, ranks, levels):
    found = predicted(record(tmp_path / "run", [1.0], wire={"bcast": 100, "reduce": 100}), ranks, wire(latency_s=0.01))
    assert found["wire_s"] == pytest.approx((scaling.SMALL_CALLS + 2) * levels * 0.01)


@pytest.mark.parametrize(("ranks", "times"), [(2, 1), (4, 1.5), (64, 1.96875), (512, 1.99609375)])
def test_a_wire_of_bandwidth_alone_carries_large_messages_twice_at_most(tmp_path, ranks, times):
    found = predicted(record(tmp_path / "run", [1.0], wire={"bcast": 1e9, "reduce": 2e9}), ranks, wire(byte_s=1e-9))
    assert found["wire_s"] == pytest.approx(3 * times, rel=1e-4) and found["limit"] == "wire"


@pytest.mark.parametrize(("readers", "times"), [(1, 1), (3, 1.5), (0, 1.96875), (100, 1.96875)])
def test_a_message_reaches_as_many_ranks_as_it_has_clients(tmp_path, readers, times):
    """0: a run of an earlier hpcfl, which does not say so; then as all ranks."""
    found = predicted(record(tmp_path / "run", [1.0], wire={"bcast": 1e9, "bcast_by_client": readers * 1e9}), 64, wire(byte_s=1e-9))
    assert found["wire_s"] == pytest.approx(times, rel=1e-4)
    found = predicted(record(tmp_path / "twice", [1.0], wire={"reduce": 1e9, "reduce_by_client": readers * 1e9}), 64, wire(byte_s=1e-9), clients=100)
    assert found["wire_s"] == pytest.approx(1.96875, rel=1e-4), "with a hundred times the clients it reaches all"


def test_a_run_that_does_not_say_whom_its_messages_are_for_is_predicted(tmp_path):
    def forget(file):
        del file["wire/bcast_by_client"], file["wire/reduce_by_client"]
    assert predicted(record(tmp_path / "run", [1.0] * 8, change=forget), 8)["round_s"] == pytest.approx(1.0)


def test_what_is_gathered_arrives_at_the_server_one_after_the_other_and_grows_with_the_clients(tmp_path):
    folder = record(tmp_path / "run", [1.0] * 4, wire={"gatherv": 4e9}, aggregate=0.5)
    found = predicted(folder, 4, wire(byte_s=1e-9))
    assert (found["wire_s"], found["server_s"]) == pytest.approx((3, 0.5), rel=1e-4)
    more = predicted(folder, 4, wire(byte_s=1e-9), clients=8)
    assert (more["wire_s"], more["server_s"], more["compute_s"]) == pytest.approx((6, 1, 2), rel=1e-4)
    assert more["clients_per_rank"] is None                        # 1 s of each client on the wire, where it trains for 1 s: more of them make it no better


def test_sums_do_not_grow_with_the_clients(tmp_path):
    folder = record(tmp_path / "run", [1.0] * 4, wire={"bcast": 1e9, "reduce": 1e9}, aggregate=0.5)
    few, many = (predicted(folder, 4, wire(byte_s=1e-9), clients) for clients in (4, 40))
    assert (many["wire_s"], many["server_s"]) == (few["wire_s"], few["server_s"]) and many["compute_s"] == pytest.approx(10 * few["compute_s"])


@pytest.mark.parametrize("ranks", [2, 4, 64])
def test_so_many_clients_per_rank_are_enough_and_one_less_is_not(tmp_path, ranks):
    folder, over = record(tmp_path / "run", [0.125] * 4, wire={"bcast": 1e6, "reduce": 1e6}, aggregate=0.03, checkpoint=0.02), wire(0.002, 1e-9)
    enough = predicted(folder, ranks, over)["clients_per_rank"]
    assert enough > 1 and predicted(folder, ranks, over, enough * ranks)["efficiency"] >= scaling.GOOD
    assert predicted(folder, ranks, over, (enough - 1) * ranks)["efficiency"] < scaling.GOOD


def test_uneven_clients_need_more_of_them_per_rank(tmp_path):
    folder = record(tmp_path / "run", [5.0, 1.0, 1.0, 1.0])
    assert predicted(folder, 4)["efficiency"] == pytest.approx(0.4) and predicted(folder, 4, clients=8)["efficiency"] == pytest.approx(0.8)
    assert predicted(folder, 4)["clients_per_rank"] == 2
    misjudged = record(tmp_path / "misjudged", [5.0, 1.0, 1.0, 1.0], flops=[7, 7, 7, 7])
    assert predicted(misjudged, 4)["clients_per_rank"] is None     # taken to be alike, one rank gets all the slow ones, however many there are


def test_a_wire_that_more_clients_than_anybody_has_would_not_pay_for_is_said_so(tmp_path):
    assert predicted(record(tmp_path / "run", [1e-6]), 512, wire(latency_s=0.02))["clients_per_rank"] is None


def test_spread_work_is_as_short_as_one_item_at_best(tmp_path):
    folder = record(tmp_path / "run", [1.0], aggregate=0.25, spread=4.0, wire={"item_s": 0.5})
    assert [predicted(folder, ranks)["server_s"] for ranks in (1, 2, 64)] == pytest.approx([4.25, 2.25, 0.75])


def test_sums_are_added_where_the_clients_are_and_uploads_at_the_server(tmp_path):
    adding = predicted(record(tmp_path / "sums", [1.0] * 2, combine=0.5), 2)
    assert (adding["compute_s"], adding["server_s"]) == pytest.approx((1.25, 0))
    gathering = predicted(record(tmp_path / "uploads", [1.0] * 2, combine=0.5, wire={"gatherv": 8}), 2)
    assert (gathering["compute_s"], gathering["server_s"]) == pytest.approx((1, 0.5))


def test_what_not_every_round_does_counts_as_often_as_it_is_done(tmp_path):
    def every_third(file):
        file["seconds/checkpoint"][...] = [[0.0], [0.0], [0.6]]
    found = predicted(record(tmp_path / "run", [1.0], change=every_third), 64)
    assert found["checkpoint_s"] == pytest.approx(0.2) and found["round_s"] == pytest.approx(1.2)


def test_the_first_round_of_a_phase_with_its_compilation_does_not_count(tmp_path):
    def compile_first(file):
        for name in ("train/seconds", "seconds/train", "rounds/wall_s"):
            file[name][0] = 60.0
    assert predicted(record(tmp_path / "run", [1.0], change=compile_first), 1)["round_s"] == pytest.approx(1)


def test_one_rank_is_predicted_as_it_was_measured(tmp_path):
    folder = record(tmp_path / "run", [1.0, 2.0, 3.0], wall_s=8.5, aggregate=0.25, publish=0.125, combine=0.25, evaluate=1.5, spread=0.25, checkpoint=0.5,
                    wire={"bcast": 1e6, "reduce": 1e6, "item_s": 0.1})
    found = predicted(folder, 1, wire(1e-3, 1e-6))
    assert found["round_s"] == pytest.approx(9) == measure_round(read(folder), wire(1e-3, 1e-6)).round_s and found["wire_s"] == 0
    assert (found["compute_s"], found["evaluation_s"], found["checkpoint_s"]) == pytest.approx((6.25, 1.5, 0.5))


def test_a_run_that_was_carried_out_is_predicted_as_it_was_measured(tmp_path):
    folder = carry_out(tiny("fedavg", federation={"rounds": 25, "participation": 1.0}, evaluation={"every": 1}), tmp_path / "run")
    round_ = measure_round(read(folder), FREE)
    assert scaling.predict(round_, FREE, 1, 5)["round_s"] == pytest.approx(round_.round_s, rel=0.2)
    assert all(round_.carried[kind] > 0 for kind in ("bcast", "reduce")) and round_.carried["gatherv"] == round_.carried["send"] == 0


def test_of_a_run_on_several_ranks_the_wire_is_taken_off_before_it_is_put_on_again(tmp_path):
    folder = record(tmp_path / "run", [1.0] * 4, ranks=2, wire={"bcast": 1e9, "reduce": 1e9}, publish=1.0, combine=1.25)
    found = predicted(folder, 2, wire(byte_s=1e-9))
    assert found["round_s"] == pytest.approx(2 + 1 + 1.25, rel=1e-4) and predicted(folder, 1, wire(byte_s=1e-9))["round_s"] == pytest.approx(4.5)


def test_evaluation_is_shared_by_the_cost_of_the_models(tmp_path):
    found = predicted(record(tmp_path / "run", [1.0, 1.0], flops=[300, 100], evaluate=2.0), 2)
    assert found["evaluation_s"] == pytest.approx(1) and found["waiting_s"] == pytest.approx(0.5) and found["round_s"] == pytest.approx(2.5)


def test_a_phase_can_be_chosen_and_else_is_the_longest(tmp_path):
    def two_phases(file):
        file["rounds/phase"][...] = ["first", "first", "then"]
        file["train/seconds"][2] = 9.0
        file["rounds/wall_s"][2] = 9.0
    recording = read(record(tmp_path / "run", [1.0], change=two_phases))
    assert (measure_round(recording, FREE).phase, measure_round(recording, FREE, "first").round_s) == ("then", 1.0)
    with pytest.raises(JobError, match="has no phase 'second', wanted one of first, then"):
        measure_round(recording, FREE, "second")


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("line", [Line(2e-6, 8e-11), Line(5e-5, 1e-9), Line(1e-2, 1e-10)], ids=str)
def test_latency_and_bandwidth_are_recovered_from_what_they_make(tmp_path, line, ranks):
    found = scaling.read_wire(said(tmp_path, told(dict.fromkeys(ALGORITHMS, line), ranks)), None, None)
    for name in ALGORITHMS:
        assert (found.lines[name].latency_s, found.lines[name].byte_s) == pytest.approx((line.latency_s, line.byte_s), rel=0.01), name


def test_the_source_of_the_wire_is_said_and_a_data_sheet_overrides_it(tmp_path):
    lines = dict.fromkeys(ALGORITHMS, Line(1e-5, 1e-9))
    one_host = scaling.read_wire(said(tmp_path, told(lines)), None, None).source
    assert "shared memory of one host (n1), no network; timed on 2 ranks, fitted to within 0%" in one_host
    assert "between 2 hosts" in scaling.read_wire(said(tmp_path, told(lines, 4, 2)), None, None).source
    half = scaling.read_wire(said(tmp_path, told(lines)), 2e-6, None)
    assert half.source.endswith("; but latency 2 us as given")
    assert [line.latency_s for line in half.lines.values()] == [2e-6] * 3 and half.lines["Reduce"].byte_s == pytest.approx(1e-9, rel=0.01)
    sheet = scaling.read_wire(None, 2e-6, 12.5e9)
    assert sheet.source == "latency 2 us and 12.5 GB/s as given" and set(sheet.lines.values()) == {Line(2e-6, 8e-11)}


@pytest.mark.parametrize(("text", "why"), [("no json", "cannot be read as JSON"), ("[1, 2]", "not what `hpcfl doctor --json` prints"),
                                           ('{"accuracy": 3, "ranks": 2}', "not what `hpcfl doctor --json` prints")])
def test_a_file_of_another_kind_is_refused(tmp_path, text, why):
    with pytest.raises(JobError, match=why):
        scaling.read_wire(said(tmp_path, text), None, None)


def test_a_doctor_on_one_rank_knows_no_wire(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--json", "--out", str(tmp_path / "folder")])
    with pytest.raises(JobError, match="the doctor ran on 1 rank, where nothing travels; .*mpirun -n 2 hpcfl doctor --json"):
        scaling.read_wire(said(tmp_path, capsys.readouterr().out), None, None)


@pytest.mark.parametrize("given", [(None, None), (2e-6, None), (None, 1e9)])
def test_without_a_doctor_latency_and_bandwidth_are_wanted(given):
    with pytest.raises(JobError, match="nothing says how fast the wire is; wanted --doctor FILE"):
        scaling.read_wire(None, *given)


@pytest.mark.parametrize("given", [(-1e-6, 1e9), (2e-6, 0.0), (float("nan"), 1e9), (2e-6, float("inf"))])
def test_wires_that_cannot_be_are_refused(given):
    with pytest.raises(JobError, match="wanted seconds from 0 and bytes per second above 0"):
        scaling.read_wire(None, *given)


def test_a_run_without_rounds_is_refused(tmp_path):
    with pytest.raises(JobError, match="has no finished round to predict from"):
        measure_round(read(record(tmp_path / "run", [1.0], rounds=0)), FREE)


def test_a_record_that_knows_no_exchanges_is_refused(tmp_path):
    def forget(file):
        del file["wire"]
    with pytest.raises(JobError, match="written by an earlier hpcfl, so run some rounds of the job anew"):
        measure_round(read(record(tmp_path / "run", [1.0], change=forget)), FREE)


def test_the_command_line_prints_a_table_with_its_assumptions_or_json(tmp_path, capsys):
    folder = record(tmp_path / "run", [1.0] * 4, wire={"bcast": 1e6, "reduce": 1e6})
    for arguments, code in ((["--ranks", "1,4"], 0), (["--ranks", "1,4", "--clients", "8", "--json"], 0), (["--ranks", "0"], 2), (["--clients", "0"], 2)):
        with pytest.raises(SystemExit) as end:
            cli.main(["predict", str(folder), "--latency", "2e-6", "--bandwidth", "12.5e9", *arguments])
        assert end.value.code == code
        out = capsys.readouterr().out
        if arguments[-1] == "1,4":
            rows = [line.split() for line in out.splitlines() if line.startswith("    ")]
            assert [row[0] for row in rows[-2:]] == ["1", "4"] and "Assumed:" in out and "wire: latency 2 us and 12.5 GB/s as given" in out
        if arguments[-1] == "--json":
            found = json.loads(out)
            assert found["clients"] == 8 and [row["ranks"] for row in found["predicted"]] == [1, 4] and found["measured"]["round_s"] == 4.0
            assert found["predicted"][0]["round_s"] == pytest.approx(8) and found["predicted"][1]["compute_s"] == pytest.approx(2)
