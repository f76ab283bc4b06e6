"""Tests of how processes share a device, with processes that are made up."""

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest

from mixer_jax.benchmarks import comparison, field
from mixer_jax.benchmarks.comparison import Comparison, compare
from mixer_jax.benchmarks.contestants import COMPILED, EAGER, OURS, REFERENCE, Contestant, Setting
from mixer_jax.benchmarks.workers import FailedError
from mixer_jax.errors import RunError
from tests.helpers.messages import mentions, raises

SETTING = Setting("train", "B/16", 224, 1000, "bfloat16", 256)
EVERYONE = [Contestant(kind, kind) for kind in (OURS, REFERENCE, EAGER, COMPILED)]
SECONDS = {OURS: 0.1, REFERENCE: 0.2, EAGER: 0.3, COMPILED: 0.25}
STARTS: dict[str, int] = {}


class Made(field.Worker):
    """A process that is none, on a device where a framework leaves this share to the other."""

    room = 1.0
    crashes: tuple[str, ...] = ()
    there: ClassVar[dict[str, "Made"]] = {}

    def __init__(
        self,
        framework: str,
        setting: Setting,
        platform: str = "",
        environment: Mapping[str, str] | None = None,
    ):
        self.framework = framework
        self.ready: set[str] = set()

    @property
    def running(self) -> bool:
        return self.there.get(self.framework) is self

    def ask(self, do: str, **arguments: Any) -> Any:
        if not self.running:
            STARTS[self.framework] = STARTS.get(self.framework, 0) + 1
        self.there[self.framework] = self
        name = arguments.get("name") or arguments["contestant"].name
        if do == "time":
            assert name in self.ready
            if self.framework == "torch" and "jax" in self.there and self.room < 1:
                raise FailedError("CUDA out of memory", True, "")
            return SECONDS.get(name, 0.001)
        if do == "latencies":
            return []
        if name in self.crashes:
            self.stop()
            raise FailedError("Segmentation fault", False, "")
        if do != "costs":
            self.ready.add(name)
        if do == "prepare_product":
            return 10**12
        return {"compile_seconds": 1.0, "first_step_seconds": 2.0, "memory_bytes": None}

    def stop(self) -> None:
        self.ready.clear()
        if self.running:
            del self.there[self.framework]


@pytest.fixture(autouse=True)
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes are made up, and none is there."""
    monkeypatch.setattr(field, "Worker", Made)
    monkeypatch.setattr(Made, "there", {})
    STARTS.clear()


def measured(contestants: list[Contestant] = EVERYONE) -> Comparison:
    return compare(SETTING, contestants, 3, "gpu")


def test_all_are_timed_side_by_side() -> None:
    result = measured()
    assert [row.ratio for row in result.rows] == pytest.approx([1, 2, 3, 2.5])
    assert result.rows[0].images_per_second == pytest.approx(2560)
    assert result.product_rates == pytest.approx({"jax": 1e15, "torch": 1e15})
    flops = comparison.model_flops(SETTING)
    assert result.rows[1].utilisation == pytest.approx(flops / 0.2 / 1e15)
    assert result.apart == []
    # Two of JAX's in processes of their own first.
    assert STARTS == {"jax": 3, "torch": 1}
    assert not Made.there


def test_frameworks_that_do_not_fit_together_take_turns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Made, "room", 0.5)
    result = measured()
    assert [row.ratio for row in result.rows] == pytest.approx([1, 2, 3, 2.5])
    assert result.apart == ["jax"]
    (line,) = capsys.readouterr().err.splitlines()
    assert mentions(line, "torch", "jax")


def test_what_crashes_takes_nobody_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Made, "crashes", (COMPILED,))
    *others, compiled = measured().rows
    assert compiled.failed == "Segmentation fault"
    assert compiled.images_per_second is None
    assert [row.ratio for row in others] == pytest.approx([1, 2, 3])


def test_ours_must_not_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Made, "crashes", (OURS,))
    with raises(RunError, "mixer_jax", "Segmentation fault"):
        measured()
    # But one of several settings may.
    other = Contestant(f"{OURS}, unroll 1", OURS, unroll=1)
    rows = measured([EVERYONE[0], other]).rows
    assert [bool(row.failed) for row in rows] == [True, False]
    assert rows[1].ratio == 1
