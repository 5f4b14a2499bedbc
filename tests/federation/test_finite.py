"""What is not finite ends the run in the round and at the place where it arose, and the error names the setting that was at work."""
import math
from dataclasses import replace

import pytest
import torch

from hpcfl import cli
from hpcfl.algorithms.fedavg import Config, FedAvg
from hpcfl.contract import Update
from hpcfl.errors import NonFiniteError
from hpcfl.federation.finite import refuse_broken
from hpcfl.wire import communicator
from hpcfl.wire.communicator import Alone, Communicator, Total
from hpcfl.wire.uplink import Uploads
from tests.support.in_memory import finite, job, run, world
from tests.support.tiny_runs import carry_out, outcome, tiny, undisturbed, write_job

HUGE = 1e30
AT_WORK = {                                                        # method, settings, what is told of the place, and the settings that are named
    "fedavg": ("fedavg", {}, "phase rounds, round 0: training of client", r"training.lr = 1e\+30\) or bound the gradient norm \(training.clip = 0: not at all"),
    "fedgh": ("fedgh", {"server_lr": HUGE}, "server, phase rounds, round 0, global header", r"algorithm.server_lr = 1e\+30"),
    "feddf": ("feddf", {"lr": HUGE, "steps": 2}, "server, phase rounds, round 0, distillation from step 0", r"algorithm.lr = 1e\+30"),
    "ccvr": ("ccvr", {"lr": HUGE, "per_class": 4, "epochs": 1}, "server, phase calibrate, round 0, calibration of", r"algorithm.lr = 1e\+30"),
    "fedgen": ("fedgen", {"server_lr": HUGE, "server_steps": 2}, "server, phase rounds, round 0", r"algorithm.server_lr = 1e\+30"),
    "fedtgp": ("fedtgp", {"server_lr": HUGE, "server_epochs": 1}, "server, phase rounds, round 0, global prototypes", r"algorithm.server_lr = 1e\+30"),
    "gefl": ("gefl", {"generator_lr": HUGE, "generator_rounds": 1, "latent": 4}, "phase generator, round 0", r"algorithm.generator_lr = 1e\+30"),
    "fedconv, W": ("fedconv", {"server_lr": HUGE, "server_epochs": 1}, "server, phase rounds, round 0, server training", r"algorithm.server_lr = 1e\+30"),
    "fedconv, filters": ("fedconv", {"filter_lr": HUGE, "server_epochs": 0, "first_epochs": 1}, "server, phase rounds, round 0, compression to",
                         r"algorithm.filter_lr = 1e\+30"),
    "fedconv, average": ("fedconv", {"aggregation_lr": HUGE, "server_epochs": 0, "first_epochs": 1, "aggregation_epochs": 1},
                         "server, phase rounds, round 0, aggregation", r"algorithm.aggregation_lr = 1e\+30"),
    "fedvtc, psi": ("fedvtc", {"vtc_lr": HUGE}, "phase rounds, round 1", r"algorithm.vtc_lr = 1e\+30\) or bound the gradient norm \(algorithm.vtc_clip = 10"),
    "fedvtc, fine-tuning": ("fedvtc", {"finetune_lr": HUGE, "finetune_epochs": 1, "per_class": 4}, "phase finetune, round 0",
                            r"algorithm.finetune_lr = 1e\+30\) or bound the gradient norm \(training.clip = 0: not at all")}


@pytest.mark.parametrize("name, settings, place, named", AT_WORK.values(), ids=AT_WORK)
def test_the_setting_that_was_at_work_is_named_with_its_value(name, settings, place, named):
    described = job(name, settings, training={"batch": 16, "lr": HUGE if not settings else 0.05}, federation={"clients": 3, "rounds": 2})
    with pytest.raises(NonFiniteError, match=rf"{place}.*lower the learning rate \({named}\)"):
        run(world(described))


def test_what_a_server_made_of_too_high_a_rate_is_blamed_on_it_by_the_client_that_received_it():
    """A head of 1e15 is finite, and so are its squares."""
    described = job("fedgh", {"server_lr": 1e15})
    with pytest.raises(NonFiniteError, match=r"phase rounds, round 1: training of client.*the loss of client \d was \S+e\+1\d before its first step: "
                                             r"what it received.*is at fault, not its training; lower algorithm.server_lr = 1e\+15 or training.lr = 0.05"):
        run(world(described))


def test_a_run_that_a_high_server_rate_ended_goes_on_from_its_last_round_with_a_lower_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(communicator, "connect", lambda deterministic=False, **how: Communicator(Alone(), deterministic))
    settings = {"algorithm": {"server_lr": 0.01}, "checkpoint": {"every": 1}, "evaluation": {"every": 1}}
    described, out = tiny("fedgh", **settings), tmp_path / "run"
    carry_out(replace(described, federation=replace(described.federation, rounds=1)), out)
    arguments = ["run", str(write_job(tmp_path, described)), "--out", str(out), "--may-differ", "algorithm.server_lr", "--may-differ", "federation.rounds"]
    with undisturbed(), pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--set", "algorithm.server_lr=1e30"])
    said = capsys.readouterr().err
    assert ended.value.code == 6 and "server, phase rounds, round 1, global header" in said and "algorithm.server_lr = 1e+30" in said, said
    assert (out / "STATUS").read_text().startswith("failed") and outcome(out).manifest["rows"] == 1
    carry_out(described, out, may_differ=["algorithm.server_lr", "federation.rounds"])
    assert (out / "STATUS").read_text() == "done\n" and outcome(out).manifest["rows"] == 3


# The server's state and what it publishes

class Spoiling(FedAvg):
    """FedAvg whose server spoils something in round 1."""

    spoils = "state"

    def aggregate(self, server, totals, site):
        new = super().aggregate(server, totals, site)
        factor = math.inf if (site.round, self.spoils) == (1, "state") else 1.0
        return new | {"scale": torch.tensor(1e38 if (site.round, self.spoils) == (1, "message") else 1.0), "record": torch.tensor(math.inf),
                      "mlp2/head.bias": new["mlp2/head.bias"] * factor}

    def found(self, site):
        return super().found(site) | {"scale": torch.tensor(1.0), "record": torch.tensor(math.inf)}

    def publish(self, server):
        return super().publish(server) | {"steep": server["scale"] * 100 + torch.zeros(2)}

    def receive(self, message, architecture):
        return super().receive({path: leaf for path, leaf in message.items() if "/" in path}, architecture)


@pytest.mark.parametrize("spoils, told", [("state", "server, phase rounds, round 1, Spoiling.aggregate: 'mlp2/head.bias'"),
                                          ("message", "server, Spoiling.publish: 'steep'")])
def test_a_server_that_makes_something_broken_is_stopped_before_anybody_gets_it(spoils, told, monkeypatch):
    found = world(job("fedavg"))
    step = Spoiling(Config(), found.problem)
    monkeypatch.setattr(Spoiling, "spoils", spoils)
    found.plan = (replace(found.plan[0], steps=(step,)),)
    with pytest.raises(NonFiniteError, match=f"{told} holds NaN or infinity: nothing is sent or saved; lower training.lr = 0.05$"):
        run(found)
    monkeypatch.setattr(Spoiling, "spoils", "nothing")
    assert len(run(found).states) == 4, "an infinity that was there from the beginning is the method's own"


class Sending(FedAvg):
    """FedAvg whose client 2 sends infinity, which no training made."""

    def train(self, group, message, site):
        update = super().train(group, message, site)
        uploads = {client: {"n": torch.tensor(math.inf if client == 2 else 1.0)} for client in group.clients}
        return Update(group, replace(update.uplink, pieces={**update.uplink.pieces, "extra": Uploads(uploads)}), update.metrics)

    def aggregate(self, server, totals, site):
        return super().aggregate(server, {name: total for name, total in totals.items() if name != "extra"}, site) | {
            "n": sum(upload["n"] for upload in totals["extra"].trees.values())}

    def publish(self, server):
        return {path: leaf for path, leaf in server.items() if path != "n"}


def test_a_client_that_sent_something_broken_is_named():
    found = world(job("fedavg"))
    found.plan = (replace(found.plan[0], steps=(Sending(Config(), found.problem),)),)
    with pytest.raises(NonFiniteError, match="Sending.aggregate: 'n' holds NaN or infinity; so did what client 2 sent as 'extra' already"):
        run(found)


def test_large_numbers_and_whole_numbers_are_no_fault():
    large = {"large": torch.full((1000,), 3e38), "count": torch.tensor([2**62, 2**62]), "half": torch.full((1000,), 6e4, dtype=torch.float16)}
    assert not finite({"sum": large["large"].sum()}), "its sum is infinite"
    refuse_broken(large, {}, "here", "do this")
    with pytest.raises(NonFiniteError, match="here: 'z' holds NaN or infinity; so did the sum of what clients sent as 'z' already.*do this"):
        sent = {"z": Total({"z": torch.tensor(math.nan)}, {"z": torch.tensor(1.0)})}
        refuse_broken(large | {"z": torch.tensor([1j * math.nan])}, {}, "here", "do this", sent)
