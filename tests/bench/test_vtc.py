"""The benchmark of FedVTC's steps: the generator and a classifier are timed one client after the other and together."""
from argparse import Namespace

from hpcfl.bench import vtc
from hpcfl.bench.benches import render
from hpcfl.wire.communicator import Communicator
from hpcfl.wire.ranks import Alone


def test_the_steps_of_generator_and_classifier_are_timed_in_every_way(monkeypatch):
    monkeypatch.setattr(vtc, "WORKS", {"classifier": vtc.run_classifier})
    figures = vtc.vtc(Communicator(Alone()), Namespace(device="cpu", threads=1, steps=0, compile=False))
    assert [(row["work"], row["engine"], row["compile"]) for row in figures["rows"]] == [("classifier", "sequential", "off"), ("classifier", "vmap", "off")]
    assert all(row["step_s"] > 0 and row["resident_memory_bytes"] > 0 for row in figures["rows"])
    assert render(figures).splitlines()[-3].split() == ["work", "engine", "compile", "first_s", "step_s", "steps_per_s", "resident_memory_bytes"]
