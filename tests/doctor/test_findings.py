"""What a finding is made of: the ranks of a host, what a job needs of each, and who shares a trait."""
from hpcfl.doctor.findings import OK, Finding, group_by_trait
from tests.support.doctor_facts import GB, busy, cpu, examined, of_a_job


def test_ranks_are_grouped_by_what_they_have_in_common():
    assert group_by_trait([cpu(0), cpu(1, device="cuda:0"), cpu(5)], lambda facts: facts.device) == {"cpu": [0, 5], "cuda:0": [1]}
    assert group_by_trait([], lambda facts: facts.device) == {}


def test_a_host_has_its_ranks_and_a_rank_its_needs():
    found = examined(cpu(0), cpu(1), cpu(4), **of_a_job(busy(), busy(needed_bytes=3 * GB), busy()))
    assert [facts.rank for facts in found.on("n1")] == [0, 1] and found.on("n9") == []
    assert found.needs(found.facts[1]) == 3 * GB and examined(cpu(0)).needs(cpu(0)) == 0


def test_a_finding_that_is_ok_needs_no_fix():
    assert Finding("wire", OK, "fast").fix == ""
