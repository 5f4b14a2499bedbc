"""What was skipped in all suites together, and why: reads the notes that conftest.py takes. A test that ran on some number of ranks was not skipped."""
import json
import sys
from collections import Counter
from pathlib import Path


def list_reasons(notes: Path) -> list[tuple[str, int]]:
    """(reason, number of tests that no suite ran for it), the most frequent first."""
    lines = [json.loads(line) for line in notes.read_text(encoding="utf-8").splitlines()]
    ran = {test for test, reason in lines if reason is None}
    return Counter({test: reason for test, reason in lines if test not in ran}.values()).most_common()


if __name__ == "__main__":
    reasons = list_reasons(Path(sys.argv[1]))
    print(f"\ntests that no suite ran: {sum(count for _, count in reasons)}")
    for reason, count in reasons:
        print(f"  {count:>4}  {reason}")
