"""Tests of the results of a fault campaign."""

import json
from pathlib import Path
from typing import Any

from tests.campaign.__main__ import NOT_INJECTED, Results


def result(kind: str, index: int, outcome: str) -> dict[str, Any]:
    return {"kind": kind, "index": index, "seed": 1, "outcome": outcome, "reason": "its end"}


def test_a_repeated_fault_replaces_its_result(tmp_path: Path) -> None:
    results = Results(tmp_path, seed=1)
    for index, outcome in enumerate(["recovered", "lost", NOT_INJECTED, "refused"]):
        results.add(result("kill", index, outcome))
    assert results.count("lost") == 1
    assert results.not_injected() == {"its end": 1}
    # A later campaign in the same folder.
    results = Results(tmp_path, seed=1)
    assert (results.next_index("kill"), results.next_index("nan")) == (4, 0)
    results.add(result("kill", 1, "recovered"))
    table = results.write_table({"kill": "SIGKILL", "nan": "NaN"})
    assert table.splitlines()[2:] == ["| SIGKILL | 3 | 2 | 1 | 0 |", "| **all** | 3 | 2 | 1 | 0 |"]
    assert json.loads((tmp_path / "results.json").read_text()) == {
        "seeds": [1],
        "kinds": {"kill": {"injected": 3, "recovered": 2, "refused": 1, "lost": 0}},
    }
    assert Results(tmp_path, seed=2).next_index("kill") == 0
