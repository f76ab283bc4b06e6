"""Tests of comparisons: rounds, ratios, failures and the search for a batch size.

Worker processes are replaced by a simulation of them.
"""

from typing import Any, ClassVar

import pytest

from mixer_jax.benchmarks import workers
from mixer_jax.benchmarks.candidates import (
    MIXER_JAX,
    REFERENCE,
    TIMM,
    TIMM_COMPILED,
    Candidate,
    Workload,
)
from mixer_jax.benchmarks.compare import Comparison, compare, median_ratio, mfu, rotate
from mixer_jax.benchmarks.runner import CompileCosts
from mixer_jax.benchmarks.workers import WorkerError
from mixer_jax.errors import RunError
from tests.helpers.messages import mentions, raises

WORKLOAD = Workload("train", "Mixer-B/16", 224, 1000, "bfloat16", 256)
CANDIDATES = [Candidate(name, name) for name in (MIXER_JAX, REFERENCE, TIMM, TIMM_COMPILED)]
SECONDS = {MIXER_JAX: 0.1, REFERENCE: 0.2, TIMM: 0.3, TIMM_COMPILED: 0.25}


class FakeWorker(workers.Worker):
    """Simulated process.

    Attributes:
        running: Processes that run, by framework.
        num_starts: Number of starts by framework.
        crashing: Candidates whose program crashes its process.
        shares_memory: Whether PyTorch fits into memory while JAX runs.
    """

    running: ClassVar[dict[str, "FakeWorker"]] = {}
    num_starts: ClassVar[dict[str, int]] = {}
    crashing: ClassVar[set[str]] = set()
    shares_memory: ClassVar[bool] = True

    def __init__(self, framework: str, workload: Workload, platform: str = "", cache_dir: str = ""):
        self.framework = framework

    @property
    def pid(self) -> int | None:
        return 1 if self.running.get(self.framework) is self else None

    def call(self, method: str, **kwargs: Any) -> Any:
        if not self.pid:
            self.running[self.framework] = self
            self.num_starts[self.framework] = self.num_starts.get(self.framework, 0) + 1
        if method == "measure_matmul":
            return 1e15
        if method == "measure_latencies":
            return []
        name = kwargs["candidate"].name
        if name in self.crashing:
            self.stop()
            raise WorkerError("Segmentation fault", False, "")
        if method == "measure_step":
            if self.framework == "torch" and "jax" in self.running and not self.shares_memory:
                raise WorkerError("CUDA out of memory", True, "")
            return SECONDS.get(name, 0.1)
        return CompileCosts(1.0, 2.0, None)

    def stop(self) -> None:
        if self.pid:
            del self.running[self.framework]


@pytest.fixture(autouse=True)
def fake_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces worker processes, none of which runs."""
    monkeypatch.setattr(workers, "Worker", FakeWorker)
    for name in ("running", "num_starts"):
        monkeypatch.setattr(FakeWorker, name, {})


def run_compare(candidates: list[Candidate] = CANDIDATES) -> Comparison:
    return compare(WORKLOAD, candidates, 3, "gpu")


def relative_times(comparison: Comparison) -> list[float | None]:
    return [result.relative_time for result in comparison.results]


def test_compare_measures_all_candidates() -> None:
    comparison = run_compare()
    assert relative_times(comparison) == pytest.approx([1, 2, 3, 2.5])
    assert comparison.results[0].images_per_second == pytest.approx(2560)
    assert comparison.matmul_flops_per_second == {"jax": 1e15, "torch": 1e15}
    assert comparison.results[1].mfu == pytest.approx(WORKLOAD.flops / 0.2 / 1e15)
    assert not comparison.isolated
    # Both candidates of JAX are compiled in processes of their own first.
    assert FakeWorker.num_starts == {"jax": 3, "torch": 1}
    assert not FakeWorker.running


def test_compare_isolates_frameworks_that_exceed_device_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(FakeWorker, "shares_memory", False)
    comparison = run_compare()
    assert relative_times(comparison) == pytest.approx([1, 2, 3, 2.5])
    assert comparison.isolated
    (line,) = capsys.readouterr().err.splitlines()
    assert mentions(line, "torch", "jax", "memory")


def test_compare_continues_after_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeWorker, "crashing", {TIMM_COMPILED})
    comparison = run_compare()
    *others, crashed = comparison.results
    assert crashed.failed == "Segmentation fault"
    assert crashed.images_per_second is None
    assert [other.relative_time for other in others] == pytest.approx([1, 2, 3])


def test_compare_needs_a_candidate_of_mixer_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeWorker, "crashing", {MIXER_JAX})
    with raises(RunError, MIXER_JAX, "Segmentation fault"):
        run_compare()
    # The next one becomes the base.
    other = Candidate(f"{MIXER_JAX}, scan_unroll=1", MIXER_JAX, {"scan_unroll": 1})
    results = run_compare([CANDIDATES[0], other]).results
    assert [bool(result.failed) for result in results] == [True, False]
    assert results[1].relative_time == 1


def test_rotate_puts_each_item_at_each_position() -> None:
    orders = [rotate("abc", index) for index in range(3)]
    assert orders[0] == ["a", "b", "c"]
    for position in range(3):
        assert {order[position] for order in orders} == set("abc")


def test_median_ratio_compares_within_rounds() -> None:
    # The machine becomes ten times slower; the ratio of medians would be 10.
    assert median_ratio([2.0, 20.0, 20.0], [1.0, 10.0, 10.0]) == 2
    assert median_ratio([2.0, 2.0, 20.0], [1.0, 1.0, 10.0]) == 2


def test_mfu_compares_within_rounds() -> None:
    # 30 FLOPs in 3 s at a peak of 20 FLOP/s; then all at half the speed.
    assert mfu(30, [3.0, 6.0], [20.0, 10.0]) == 0.5
