"""Simulated conditions: who answers is a function of seed and round, what is lost is lost and nothing else, and no method minds a round without answers."""
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hpcfl.contract import Phase
from hpcfl.errors import JobError
from hpcfl.federation.answers import Answers, simulate_answers
from hpcfl.federation.state import schedule
from hpcfl.federation.world import World
from hpcfl.report import page, summary
from hpcfl.settings.sections import Federation
from hpcfl.streams import Stream
from hpcfl.wire.communicator import Alone, Communicator
from tests.support.in_memory import bits, finite, job, run, world
from tests.support.tiny_runs import CASES, apart, carry_out, checkpoint_of, outcome, tiny, undisturbed

UNRELIABLE = {"clients": 5, "rounds": 6, "dropout": 0.3, "delay": "lognormal", "delay_mean": 2.0, "deadline": 4.0}


def answers(row: int, cohort=range(1000), seed: int = 0, **settings) -> Answers:
    return simulate_answers(replace(Federation(), clients=1000, **settings), lambda purpose: Stream(seed, purpose, round=row), tuple(cohort))


def lost_at(*rows: int):
    """World.answers of a job in which nobody answers in some rounds."""
    asked = World.ask

    def patched(self, phase, row):
        found = asked(self, phase, row)
        return Answers(found.cohort, (), simulated=True) if row in rows and phase.asks else found
    return patched


def test_a_client_does_the_same_whoever_else_is_asked():
    whole = answers(3, dropout=0.3, delay="exponential", deadline=1.5)
    for cohort in ((7,), (0, 7, 999), range(5, 50)):
        some = answers(3, cohort, dropout=0.3, delay="exponential", deadline=1.5)
        assert some.answered == tuple(client for client in cohort if client in whole.answered)
        assert some.delays_s == {client: whole.delays_s[client] for client in cohort if client in whole.delays_s}
    assert whole != answers(4, dropout=0.3, delay="exponential", deadline=1.5) != answers(3, seed=1, dropout=0.3, delay="exponential", deadline=1.5)


def test_clients_drop_out_as_often_as_the_job_says():
    shares = [len(answers(row, dropout=0.2).lost) / 1000 for row in range(20)]
    assert np.mean(shares) == pytest.approx(0.2, abs=4 * (0.2 * 0.8 / 20_000) ** 0.5)
    assert answers(0, dropout=1.0).answered == () and answers(0, dropout=0.0).lost == ()


@pytest.mark.parametrize("delay, spread", [("exponential", 2.0), ("lognormal", 2.0 * (np.exp(0.25) - 1) ** 0.5)])
def test_delays_have_the_mean_of_the_job_and_the_spread_of_their_distribution(delay, spread):
    drawn = np.array([list(answers(row, delay=delay, delay_mean=2.0, delay_spread=0.5).delays_s.values()) for row in range(50)])
    assert drawn.mean() == pytest.approx(2.0, rel=0.02) and drawn.std() == pytest.approx(spread, rel=0.05) and (drawn > 0).all()


def test_who_is_later_than_the_deadline_does_not_count():
    found = answers(0, delay="exponential", deadline=1.0)
    assert set(found.answered) == {client for client, delay in found.delays_s.items() if delay <= 1.0} and 0 < len(found.answered) < 1000
    assert len(found.delays_s) == 1000 and set(found.lost) == set(range(1000)) - set(found.answered)


def test_the_server_waits_for_the_last_answer_or_until_the_deadline():
    patient = answers(0, delay="exponential", dropout=0.5)
    assert patient.duration_s == max(patient.delays_s.values())
    assert answers(0, delay="exponential", deadline=1.0).duration_s == 1.0
    assert answers(0, delay="exponential", deadline=1e6).duration_s == answers(0, delay="exponential").duration_s
    assert answers(0, dropout=1.0).duration_s == 0.0 and answers(0, dropout=1.0, deadline=3.0).duration_s == 3.0


def test_without_such_settings_everybody_answers_and_nothing_is_simulated():
    observed = world(job("fedavg", federation={"clients": 5, "participation": 0.6}))
    phase = observed.plan[0]
    assert all(observed.answers(phase, row) == Answers(observed.cohort(phase, row), observed.cohort(phase, row)) for row in range(3))


def test_all_ranks_know_who_answers():
    described = job("fedavg", federation=UNRELIABLE)
    seen = [World(described, SimpleNamespace(rank=rank, size=3, is_server=rank == 0, spread=None), torch.device("cpu")) for rank in range(3)]
    assert all(seen[0].answers(seen[0].plan[0], row) == other.answers(other.plan[0], row) for row in range(20) for other in seen[1:])


def test_a_round_in_which_nobody_is_awaited_loses_nobody():
    observed = world(job("fedvtc", {"latent": "common"}, federation=UNRELIABLE | {"dropout": 1.0}))
    found = {phase.name: observed.answers(phase, row) for row, phase in enumerate(observed.plan)}
    assert found["finetune"].answered == found["finetune"].cohort == tuple(range(5)) and not found["finetune"].simulated
    assert found["statistics"].cohort == tuple(range(5)) and found["statistics"].answered == found["rounds"].answered == ()


def test_what_a_lost_client_had_it_keeps_and_it_pays_for_the_download():
    found = run(world(job("fedavg", federation=UNRELIABLE)))
    lost_behind = False
    for position, place in enumerate(found.places):
        happened = found.world.ask(place.phase, place.row)
        account = found.accounts[position]
        for client in range(5):
            before, after = (bits(found.state(client, position + step)) for step in (0, 1))
            if client in happened.lost:
                has_it = found.states[position].received[client].get("mlp2" if client % 2 == 0 else "cnn1", -1) == found.states[position].version
                lost_behind |= not has_it
                assert before == after and (account["down"][client] > 0) != has_it and account["up"].get(client, 0) == 0
                assert found.states[position].received[client] == found.states[position + 1].received[client]
                assert client not in account["metrics"]["loss"]
            else:
                assert before != after and account["up"][client] > 0 and client in account["metrics"]["loss"]
    assert lost_behind, "no client was lost that had something to download"


def test_a_lost_client_downloads_the_message_it_was_asked_with_and_no_later_one():
    """Two steps in a round, the first trains and the second trains on what came of it."""
    described = tiny("fedvtc, sums", federation={"clients": 3, "rounds": 2, "participation": 1.0})
    some = world(described)
    (lost, *others) = range(3)
    some.ask = lambda phase, row: Answers((0, 1, 2), tuple(others), simulated=True) if phase.asks else World.ask(some, phase, row)
    some = run(some)
    first = some.places[1].phase.asks
    wanted = sum(leaf.nbytes for leaf in first.receive(first.publish(some.states[1].server), "mlp2").values())
    assert some.accounts[1]["down"][lost] == wanted > 0, "it has none of it yet"
    assert wanted < sum(account["down"][others[0]] for account in some.accounts[:2])


def test_the_server_learns_from_those_who_answer_as_if_nobody_else_had_been_asked():
    described = job("fedavg", federation=UNRELIABLE)
    found = run(world(described))
    reliable = world(job("fedavg", federation={"clients": 5, "rounds": 6}))
    reliable.cohort = lambda phase, row: found.world.ask(phase, row).answered
    asked = run(reliable)
    for one, other in zip(found.states, asked.states, strict=True):
        assert bits(one.server) == bits(other.server)
        assert [bits(group.state) for group in one.groups] == [bits(group.state) for group in other.groups]


@pytest.mark.parametrize("case", CASES)
def test_no_method_minds_a_round_without_answers(case):
    described, alone = tiny(case), Communicator(Alone())
    places = schedule(World(described, alone, torch.device("cpu")))
    first = [place.row for place in places if place.round == 0 and place.phase.asks]
    for rows in {(*first,), (max(row for row in range(len(places)) if places[row].phase.asks),)}:
        with pytest.MonkeyPatch.context() as patch, undisturbed():
            patch.setattr(World, "answers", lost_at(*rows))
            found = run(World(described, alone, torch.device("cpu")))
        assert len(found.states) == len(places) + 1
        for row in rows:
            before, after = found.states[row], found.states[row + 1]
            if not any(step.overrides("prepare") for step in places[row].phase.steps):
                assert bits(before.server) == bits(after.server) and before.version == after.version
            assert sum(found.accounts[row]["up"].values()) == 0 and "loss" not in found.accounts[row]["metrics"]
        for state in found.states[1:]:
            assert finite(state.server) and not any(leaf.isnan().any() for group in state.groups for leaf in group.state.values())


@pytest.mark.parametrize("case", CASES)
def test_a_run_in_which_nobody_ever_answers_comes_to_its_end(case, tmp_path):
    folder = carry_out(tiny(case, federation={"dropout": 1.0}), tmp_path / "run")
    assert (folder / "STATUS").read_text() == "done\n" and np.isfinite(summary.summarise(folder)["accuracy"]["generalization"]["mean"])


@pytest.fixture(scope="module")
def unreliable(tmp_path_factory):
    described = tiny("fedavg", federation=UNRELIABLE, checkpoint={"every": 2, "keep": 9})
    return described, carry_out(described, tmp_path_factory.mktemp("unreliable") / "run")


def test_the_record_says_who_answered_and_when(unreliable):
    described, folder = unreliable
    observed, metrics = World(described, Communicator(Alone()), torch.device("cpu")), outcome(folder).metrics
    for row in range(6):
        happened = observed.answers(observed.plan[0], row)
        expected = [1 if client in happened.answered else 0 if client in happened.cohort else -1 for client in range(5)]
        assert metrics["conditions/answered"][row].tolist() == expected and metrics["conditions/duration_s"][row] == happened.duration_s
        delays = metrics["conditions/delay_s"][row]
        assert {client: delays[client] for client in np.flatnonzero(np.isfinite(delays))} == happened.delays_s
        assert np.isfinite(metrics["train/loss"][row]).tolist() == [each == 1 for each in expected]


def test_a_resumed_run_loses_the_same_clients(unreliable, tmp_path):
    described, folder = unreliable
    resumed = carry_out(described, tmp_path / "resumed", resume=checkpoint_of(folder, 4))
    assert not apart(outcome(resumed), outcome(folder))


def test_the_report_counts_answers(unreliable, tmp_path, capsys):
    described, folder = unreliable
    answered, found = outcome(folder).metrics["conditions/answered"], summary.summarise(folder)["conditions"]
    assert found["asked"] == (answered >= 0).sum() == 18 and found["answered"] == (answered == 1).sum() < 18
    assert found["dropped"] + found["late"] == found["asked"] - found["answered"]
    assert found["simulated_s"] == outcome(folder).metrics["conditions/duration_s"].sum()
    text = page.write([folder], tmp_path).read_text()
    assert f"{found['dropped']} dropped out, {found['late']} late" in text and ">Answers</th>" in text
    carry_out(described, tmp_path / "again")
    assert f"answers {(answered[0] == 1).sum()}/3" in capsys.readouterr().out
    assert summary.summarise(carry_out(tiny("standalone"), tmp_path / "usual"))["conditions"] is None


@pytest.mark.parametrize("setting", [{"dropout": 1.1}, {"dropout": -0.1}, {"delay": "uniform"}, {"delay_mean": 0}, {"deadline": -1}])
def test_conditions_that_cannot_be_are_refused(setting):
    with pytest.raises(JobError, match=f"federation.{next(iter(setting))} = .* is not allowed"):
        job("fedavg", federation=setting)


def test_a_phase_asks_by_its_first_step_that_trains():
    plan = world(job("fedvtc", {"latent": "common", "finetune": "every_round"})).plan
    assert all(phase.asks is phase.steps[0] for phase in plan) and Phase("none", 1, ()).asks is None
