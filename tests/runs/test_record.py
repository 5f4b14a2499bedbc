"""The record: every rank's account in one row, and the same rows again after a file, whatever the number of ranks."""
import h5py
import numpy as np
import pytest

from hpcfl.errors import CheckpointError
from hpcfl.federation.ledger import SECONDS
from hpcfl.runs import record as record_module
from hpcfl.runs.record import RECORD_VERSION, Record
from hpcfl.wire.communicator import EXCHANGES

CLIENTS = 3


def account(rank: int, clients: list[int], opened_s: float = 0.0, **metrics: float) -> dict:
    """What a rank with these clients books in a round."""
    return {"wall_s": 1.0 + rank, "seconds": {kind: float(10 * rank + number) for number, kind in enumerate(SECONDS)},
            "up": {client: 100 + client for client in clients},
            "down": {client: 10 + client for client in clients},
            "metrics": {name: {client: value + client for client in clients} for name, value in metrics.items()},
            "opened_s": opened_s, "intervals": {"kind": np.array([rank, 3]), "start_s": np.array([-0.25, 1.0 + rank]), "duration_s": np.array([0.25, 0.5])},
            "sent_bytes": 1000 + rank, "carried": {kind: 10 * number + rank for number, kind in enumerate(EXCHANGES)}, "item_s": 0.5 + rank,
            "notes": {f"share of rank {rank}": 0.25 + rank}}


def empty(ranks: int = 2) -> Record:
    return Record({"algorithm": "none", "clients": CLIENTS}, {"clients/rank": np.array([0, 1, 0])}, CLIENTS, ranks)


def filled(rounds: int = 3) -> Record:
    record = empty()
    for round_ in range(rounds):
        if round_ == 1:
            record.evaluate("before_refine", {"generalization_correct": np.full((CLIENTS, 2), 7)})
        record.evaluate("end", {"generalization_correct": np.full((CLIENTS, 2), round_)})
        record.finish_round("rounds", round_, [account(0, [0, 2], loss=0.5), account(1, [1], loss=0.5, **({"kl": 2.0} if round_ else {}))])
    return record


def table(path, name: str) -> np.ndarray:
    with h5py.File(path) as file:
        return file[name][()]


def contents(path) -> dict[str, list]:
    found: dict[str, list] = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.update({name: np.nan_to_num(item[()], nan=-1.0).tolist() if item.dtype.kind == "f" else item[()].tolist()})
                        if isinstance(item, h5py.Dataset) else None)
    return found


def test_a_row_holds_what_all_ranks_booked(tmp_path):
    filled().write(tmp_path / "metrics.h5")
    assert table(tmp_path / "metrics.h5", "bytes/simulated_up").tolist() == [[100, 101, 102]] * 3
    assert table(tmp_path / "metrics.h5", "bytes/simulated_down").tolist() == [[10, 11, 12]] * 3
    assert table(tmp_path / "metrics.h5", "bytes/transported").tolist() == [[1000, 1001]] * 3
    assert table(tmp_path / "metrics.h5", "rounds/wall_s").tolist() == [2.0] * 3       # the slowest rank's
    assert table(tmp_path / "metrics.h5", "train/loss").tolist() == [[0.5, 1.5, 2.5]] * 3
    for number, kind in enumerate(SECONDS):
        assert table(tmp_path / "metrics.h5", f"seconds/{kind}").tolist() == [[number, 10 + number]] * 3
    for number, kind in enumerate(EXCHANGES):
        assert table(tmp_path / "metrics.h5", f"wire/{kind}").tolist() == [20 * number + 1] * 3
    assert table(tmp_path / "metrics.h5", "wire/item_s").tolist() == [1.5] * 3             # of the rank with the slowest
    with h5py.File(tmp_path / "metrics.h5") as file:
        assert file.attrs["schema"] == RECORD_VERSION and file.attrs["algorithm"] == b"none" and file["clients/rank"][()].tolist() == [0, 1, 0]


def test_what_a_client_did_not_measure_is_nan(tmp_path):
    filled().write(tmp_path / "metrics.h5")
    kl = table(tmp_path / "metrics.h5", "train/kl")
    assert np.isnan(kl[0]).all() and kl[1:, 1].tolist() == [3.0, 3.0] and np.isnan(kl[1:, [0, 2]]).all()


def test_clients_outside_the_cohort_paid_nothing(tmp_path):
    record = empty()
    record.finish_round("rounds", 0, [account(0, [2], loss=0.5), account(1, [])])
    record.write(tmp_path / "metrics.h5")
    assert table(tmp_path / "metrics.h5", "bytes/simulated_up").tolist() == [[0, 0, 102]]
    assert np.isnan(table(tmp_path / "metrics.h5", "train/loss")).tolist() == [[True, True, False]]


def test_evaluations_say_at_which_row_and_stage(tmp_path):
    filled().write(tmp_path / "metrics.h5")
    assert table(tmp_path / "metrics.h5", "evaluation/at").tolist() == [0, 1, 1, 2]
    assert table(tmp_path / "metrics.h5", "evaluation/stage").tolist() == [b"end", b"before_refine", b"end", b"end"]
    assert table(tmp_path / "metrics.h5", "evaluation/generalization_correct")[:, 0, 0].tolist() == [0, 7, 1, 2]


def test_a_record_read_back_writes_the_same_file(tmp_path):
    filled().write(tmp_path / "one.h5")
    record = empty()
    record.read(tmp_path / "one.h5", 3)
    record.write(tmp_path / "other.h5")
    assert contents(tmp_path / "one.h5") == contents(tmp_path / "other.h5")


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_rows_past_the_checkpoint_are_dropped(tmp_path, rows):
    filled().write(tmp_path / "whole.h5")
    filled(rows).write(tmp_path / "short.h5")
    record = empty()
    record.read(tmp_path / "whole.h5", rows)
    record.write(tmp_path / "cut.h5")
    assert contents(tmp_path / "cut.h5") == contents(tmp_path / "short.h5")


def test_a_record_older_than_its_checkpoint_gives_what_it_has(tmp_path):
    filled(2).write(tmp_path / "metrics.h5")
    record = empty()
    assert record.read(tmp_path / "metrics.h5", 3, [("rounds", row) for row in range(3)]) == [] and record.lost == [2]
    record.write(tmp_path / "metrics.h5")
    assert table(tmp_path / "metrics.h5", "rounds/round").tolist() == [0, 1, 2]
    assert table(tmp_path / "metrics.h5", "bytes/simulated_up").tolist() == [[100, 101, 102]] * 2 + [[0, 0, 0]]
    assert np.isnan(table(tmp_path / "metrics.h5", "train/loss")).tolist() == [[False] * 3] * 2 + [[True] * 3]
    again = empty()
    again.read(tmp_path / "metrics.h5", 3)
    assert again.lost == [2], "what was lost once is not found by reading again"


def test_a_record_of_another_schema_is_refused(tmp_path):
    filled(2).write(tmp_path / "metrics.h5")
    with h5py.File(tmp_path / "metrics.h5", "r+") as file:
        file.attrs["schema"] = 7
    with pytest.raises(CheckpointError, match="schema = 7, wanted 1; resume with the hpcfl version that wrote it"):
        empty().read(tmp_path / "metrics.h5", 2)


def test_evaluations_of_other_kinds_stand_side_by_side(tmp_path):
    def own(kinds: list[list[str]]) -> Record:
        record = empty()
        for round_, names in enumerate(kinds):
            record.evaluate("end", {f"{name}_correct": np.full((CLIENTS, 2), round_) for name in names})
            record.finish_round("rounds", round_, [account(0, [0, 2]), account(1, [1])])
        return record
    kinds = [["generalization", "personal"], ["generalization"], ["generalization", "validation"]]
    own(kinds).write(tmp_path / "metrics.h5")
    assert table(tmp_path / "metrics.h5", "evaluation/personal_correct")[:, 0, 0].tolist() == [0, -1, -1]
    assert table(tmp_path / "metrics.h5", "evaluation/validation_correct")[:, 0, 0].tolist() == [-1, -1, 2]
    for rows in (1, 2, 3):
        record = empty()
        record.read(tmp_path / "metrics.h5", rows)
        record.write(tmp_path / "read.h5")
        own(kinds[:rows]).write(tmp_path / "short.h5")
        assert contents(tmp_path / "read.h5") == contents(tmp_path / "short.h5")


def test_right_answers_out_of_other_images_are_left_out(tmp_path):
    def own(images: int) -> Record:
        record = empty()
        record.fixed |= {"evaluation/personal_count": np.full((CLIENTS, 2), images), "evaluation/generalization_count": np.array([9, 9])}
        return record
    record = own(5)
    record.evaluate("end", {"generalization_correct": np.ones((CLIENTS, 2), int), "personal_correct": np.full((CLIENTS, 2), 5)})
    record.finish_round("rounds", 0, [account(0, [0, 2]), account(1, [1])])
    record.write(tmp_path / "metrics.h5")
    for images, left_out in ((5, []), (4, ["personal"])):
        read = own(images)
        read.read(tmp_path / "metrics.h5", 1)
        assert read.left_out == left_out and ("personal_correct" in read.evaluations[0]) != bool(left_out)


@pytest.mark.parametrize("ranks, transported", [(1, [2001]), (2, [1000, 1001]), (4, [1000, 1001, 0, 0])])
def test_another_number_of_ranks_keeps_the_totals(tmp_path, ranks, transported):
    filled().write(tmp_path / "metrics.h5")
    record = empty(ranks)
    record.read(tmp_path / "metrics.h5", 3)
    record.write(tmp_path / "other.h5")
    assert table(tmp_path / "other.h5", "bytes/transported").tolist() == [transported] * 3
    assert table(tmp_path / "other.h5", "seconds/train").sum(1).tolist() == table(tmp_path / "metrics.h5", "seconds/train").sum(1).tolist()


def test_models_of_the_federation_are_kept_by_name_and_survive_a_resume(tmp_path):
    def own(rounds: int) -> Record:
        record, clients = empty(), {"generalization_correct": np.zeros((CLIENTS, 2), int)}
        for round_, models in enumerate(({}, {"b": np.array([3, 4])}, {"b": np.array([5, 6]), "a@0.5": np.array([1, 2])})[:rounds]):
            record.evaluate("end", clients, models)
            record.finish_round("rounds", round_, [account(0, [0, 2]), account(1, [1])])
        return record
    own(3).write(tmp_path / "metrics.h5")
    assert table(tmp_path / "metrics.h5", "evaluation/global_names").tolist() == [b"a@0.5", b"b"]
    assert table(tmp_path / "metrics.h5", "evaluation/global_correct").tolist() == [[[-1, -1], [-1, -1]], [[-1, -1], [3, 4]], [[1, 2], [5, 6]]]
    for rows in (1, 2, 3):
        record = empty()
        record.read(tmp_path / "metrics.h5", rows)
        record.write(tmp_path / "read.h5")
        own(rows).write(tmp_path / "short.h5")
        assert contents(tmp_path / "read.h5") == contents(tmp_path / "short.h5")


def test_a_record_of_no_round_is_a_file_too(tmp_path):
    empty().write(tmp_path / "metrics.h5")
    record = empty()
    record.read(tmp_path / "metrics.h5", 0)
    assert record.rows == [] and record.evaluations == []


def test_writing_replaces_the_file_as_a_whole(tmp_path):
    filled(1).write(tmp_path / "metrics.h5")
    filled(3).write(tmp_path / "metrics.h5")
    assert len(table(tmp_path / "metrics.h5", "rounds/round")) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.h5"]


def test_intervals_count_from_the_first_round_of_rank_0(tmp_path):
    record = empty()
    for round_ in range(2):                                        # the other ranks' clocks may say what they like
        record.finish_round("rounds", round_, [account(0, [0, 2], opened_s=10.0 * round_), account(1, [1], opened_s=77.0)])
    record.write(tmp_path / "metrics.h5")
    assert table(tmp_path / "metrics.h5", "trace/row").tolist() == [0] * 4 + [1] * 4
    assert table(tmp_path / "metrics.h5", "trace/rank").tolist() == [0, 0, 1, 1] * 2
    assert table(tmp_path / "metrics.h5", "trace/start_s").tolist() == [-0.25, 1.0, -0.25, 2.0, 9.75, 11.0, 9.75, 12.0]
    kinds, names = (table(tmp_path / "metrics.h5", f"trace/{name}") for name in ("kind", "kinds"))
    assert [names[kind].decode() for kind in kinds[:4]] == [SECONDS[0], SECONDS[3], SECONDS[1], SECONDS[3]]


def test_the_clock_of_a_resumed_run_goes_on_where_what_is_kept_ended(tmp_path):
    filled(2).write(tmp_path / "metrics.h5")
    record = empty()
    record.read(tmp_path / "metrics.h5", 1)
    record.finish_round("rounds", 1, [account(0, [0, 2], opened_s=0.0), account(1, [1], opened_s=5.0)])
    record.write(tmp_path / "resumed.h5")
    assert table(tmp_path / "resumed.h5", "trace/row").tolist() == [0] * 4 + [1] * 4
    assert table(tmp_path / "resumed.h5", "trace/start_s")[4:].tolist() == [2.25, 3.5, 2.25, 4.5]          # round 1 ended at 2.5


def test_the_oldest_rounds_lose_their_intervals_where_there_are_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr(record_module, "INTERVALS", 9)
    filled(4).write(tmp_path / "metrics.h5")
    assert table(tmp_path / "metrics.h5", "trace/row").tolist() == [2] * 4 + [3] * 4
    assert len(table(tmp_path / "metrics.h5", "rounds/round")) == 4


def test_samples_are_kept_beside_the_rounds(tmp_path):
    record = filled(1)
    record.samples = {"client": np.array([0]), "synthetic": np.zeros((1, 2, 3, 1, 4, 4), np.uint8)}
    record.write(tmp_path / "metrics.h5")
    assert table(tmp_path / "metrics.h5", "samples/synthetic").shape == (1, 2, 3, 1, 4, 4)
