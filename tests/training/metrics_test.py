"""Tests of the metrics of a run."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mixer_jax.errors import NonFiniteError, UserError
from mixer_jax.training.metrics import MetricsLogger, MetricsWriter, Progress, read_metrics
from tests.helpers.messages import mentions, raises
from tests.helpers.object_store import BUCKET, object_store

OpenLogger = Callable[..., MetricsLogger]


@pytest.fixture
def open_logger(tmp_path: Path) -> OpenLogger:
    """Opens the metrics of a run of ten steps, written every four."""

    def open_logger(
        start_step: int = 0,
        loss_window: tuple[float, ...] = (),
        num_steps: int = 10,
        log_every_steps: int = 4,
    ) -> MetricsLogger:
        return MetricsLogger(
            str(tmp_path),
            start_step,
            num_steps=num_steps,
            batch_size=8,
            log_every_steps=log_every_steps,
            throughput_metrics=lambda rate: {"images_per_second": rate},
            loss_window=list(loss_window),
            is_primary=True,
            tensorboard=False,
        )

    return open_logger


def record_losses(logger: MetricsLogger, start_step: int, losses: list[float]) -> None:
    for step, loss in enumerate(losses, start_step + 1):
        logger.record(step, {"loss": jnp.float32(loss)})


def logged_losses(workdir: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(str(workdir))]


def test_read_metrics_skips_a_line_that_was_cut_off(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2}\n{"ste')
    assert [line["step"] for line in read_metrics(str(tmp_path))] == [1, 2]


def test_read_metrics_rejects_another_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("hello\n")
    with raises(UserError, f"{tmp_path}/metrics.jsonl"):
        read_metrics(str(tmp_path))


def test_resumed_writer_drops_lines_after_the_checkpoint(tmp_path: Path) -> None:
    text = '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "loss": 1.0}\n{"ste'
    (tmp_path / "metrics.jsonl").write_text(text)
    MetricsWriter(str(tmp_path), start_step=2, is_primary=True).close()
    assert logged_losses(tmp_path) == [(1, 3.0), (2, 2.0)]


def test_writer_of_another_process_writes_nothing(tmp_path: Path) -> None:
    writer = MetricsWriter(str(tmp_path), start_step=0, is_primary=False)
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_writer_on_an_object_store_is_complete_after_flush(tmp_path: Path) -> None:
    with object_store(tmp_path) as store:
        writer = MetricsWriter(BUCKET, start_step=0, is_primary=True, tensorboard=False)
        for step in range(1, 200):
            writer.write(step, {"loss": 1.0})
        writer.flush()
        assert logged_losses(tmp_path) == [(step, 1.0) for step in range(1, 200)]
        assert store.num_uploads <= 2
        writer.write(200, {"loss": 1.0})
        writer.close()
        assert logged_losses(tmp_path)[-1] == (200, 1.0)
        MetricsWriter(BUCKET, start_step=3, is_primary=True, tensorboard=False).close()
    assert logged_losses(tmp_path) == [(1, 1.0), (2, 1.0), (3, 1.0)]


def read_events(folder: Path) -> list[tuple[str, int, float]]:
    """Reads events as TensorBoard does, without steps that a resumed run repeated."""
    accumulator = EventAccumulator(str(folder), {"scalars": 0})
    accumulator.Reload()
    return [
        (tag, event.step, event.value)
        for tag in sorted(accumulator.Tags()["scalars"])
        for event in accumulator.Scalars(tag)
    ]


def test_tensorboard_reads_the_events(tmp_path: Path) -> None:
    writer = MetricsWriter(str(tmp_path), start_step=0, is_primary=True)
    before = time.time()
    for step in (1, 2, 3):
        writer.write(step, {"loss": 1 / step, "val/top1": 0.5})
    writer.close()
    expected = [("loss", step, float(np.float32(1 / step))) for step in (1, 2, 3)]
    expected += [("val/top1", step, 0.5) for step in (1, 2, 3)]
    assert read_events(tmp_path / "events") == expected
    accumulator = EventAccumulator(str(tmp_path / "events")).Reload()
    assert before - 1 < accumulator.Scalars("loss")[0].wall_time < time.time() + 1


def test_events_are_on_disk_before_the_run_ends(tmp_path: Path) -> None:
    writer = MetricsWriter(str(tmp_path), start_step=0, is_primary=True)
    writer.write(1, {"loss": 1.0})
    deadline = time.monotonic() + 20
    while not list(tmp_path.glob("events/*")) or read_events(tmp_path / "events") == []:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    writer.close()


def test_events_of_a_resumed_run_replace_those_after_the_checkpoint(tmp_path: Path) -> None:
    attempts = [
        (0, 1.0, [1.0, 1.0, 1.0, 1.0]),
        (2, 2.0, [1.0, 1.0, 2.0, 2.0]),
        (0, 3.0, [3.0, 3.0, 3.0, 3.0]),
    ]
    for attempt, (start_step, loss, expected) in enumerate(attempts):
        writer = MetricsWriter(str(tmp_path), start_step, is_primary=True)
        for step in range(start_step + 1, 5):
            writer.write(step, {"loss": loss})
        writer.close()
        # Names of event files have the time in seconds.
        (file,) = tmp_path.glob("events/events.out.tfevents.[0-9][0-9]*")
        file.rename(file.with_name(f"events.out.tfevents.{attempt}"))
        values = [(step, value) for _, step, value in read_events(tmp_path / "events")]
        assert values == list(enumerate(expected, start=1))


def test_events_on_an_object_store_are_complete_after_close(tmp_path: Path) -> None:
    with object_store(tmp_path) as store:
        writer = MetricsWriter(BUCKET, start_step=0, is_primary=True)
        for step in range(1, 200):
            writer.write(step, {"loss": 1.0})
        writer.close()
        assert store.num_uploads <= 4
    assert read_events(tmp_path / "events") == [("loss", step, 1.0) for step in range(1, 200)]


def test_events_do_not_import_pytorch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("is_imported = True\n")
    code = """
import sys
from mixer_jax.training.metrics import MetricsWriter
writer = MetricsWriter(sys.argv[1], start_step=0, is_primary=True)
writer.write(1, {"loss": 1.0})
writer.close()
assert "tensorboardX" in sys.modules
assert "torch" not in sys.modules
import torch
assert torch.is_imported
"""
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        check=True,
    )
    assert read_events(tmp_path / "events") == [("loss", 1, 1.0)]


def test_failed_events_do_not_end_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "events").touch()
    writer = MetricsWriter(str(tmp_path), start_step=0, is_primary=True)
    writer.write(1, {"loss": 1.0})
    writer.write(2, {"loss": 2.0})
    writer.close()
    assert logged_losses(tmp_path) == [(1, 1.0), (2, 2.0)]
    (line,) = capsys.readouterr().err.splitlines()
    assert mentions(line, "TensorBoard", f"{tmp_path}/events")


def test_logger_writes_mean_losses_and_the_last_step(
    open_logger: OpenLogger, tmp_path: Path
) -> None:
    logger = open_logger()
    record_losses(logger, 0, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    # The metrics of a step are read after the next one was dispatched.
    assert logged_losses(tmp_path) == [(4, 2.5), (8, 6.5)]
    logger.flush_pending()
    assert logged_losses(tmp_path) == [(4, 2.5), (8, 6.5), (10, 9.5)]
    logger.close()


class RecordedScalar:
    """Scalar array of a step that appends the step to lists when it is copied and read."""

    def __init__(self, step: int, copies: list[int], reads: list[int]):
        self._step, self._copies, self._reads = step, copies, reads

    def copy_to_host_async(self) -> None:
        self._copies.append(self._step)

    def item(self) -> float:
        self._reads.append(self._step)
        return 1.0


# 10 ms are 1,000, 2.5 and half a step; lines are written every 20 steps.
@pytest.mark.parametrize(
    ("steps_per_second", "num_hosts", "ahead"), [(1e5, 1, 4), (250, 1, 2), (50, 1, 1), (1e5, 2, 1)]
)
def test_a_single_host_is_ahead_of_its_devices_by_several_short_steps(
    steps_per_second: float,
    num_hosts: int,
    ahead: int,
    open_logger: OpenLogger,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: num_hosts)
    monkeypatch.setattr(Progress, "lap", lambda self, step: steps_per_second)
    logger, reads = open_logger(num_steps=60, log_every_steps=20), list[int]()
    for step in range(1, 61):
        logger.record(step, {"loss": RecordedScalar(step, [], reads)})
        # The duration of a step is known when the first line is written.
        last_read = step - 1 if step <= 21 else max(20, step - ahead)
        assert reads == list(range(1, last_read + 1))
    logger.flush_pending()
    logger.close()
    assert reads == list(range(1, 61))
    assert logged_losses(tmp_path) == [(20, 1), (40, 1), (60, 1)]


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_metrics_are_copied_from_accelerators_before_they_are_read(
    backend: str, open_logger: OpenLogger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    logger, copies, reads = open_logger(), list[int](), list[int]()
    for step in (1, 2):
        logger.record(step, {"loss": RecordedScalar(step, copies, reads)})
    assert (copies, reads) == ([1, 2] if backend == "gpu" else [], [1])
    logger.close()


def test_resumed_logger_includes_the_saved_losses(open_logger: OpenLogger, tmp_path: Path) -> None:
    logger = open_logger()
    record_losses(logger, 0, [1, 2, 3, 4, 5, 6])
    logger.flush_pending()
    assert logger.loss_window == [5, 6]
    logger.close()
    resumed = open_logger(6, (5.0, 6.0))
    record_losses(resumed, 6, [7, 8])
    resumed.flush_pending()
    assert logged_losses(tmp_path) == [(4, 2.5), (8, 6.5)]
    resumed.close()


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_logger_raises_for_metrics_that_are_not_finite(
    open_logger: OpenLogger, value: float
) -> None:
    logger = open_logger()
    logger.record(1, {"loss": jnp.float32(1), "gradient_norm": jnp.float32(value)})
    with raises(NonFiniteError, "gradient_norm", str(value), "1"):
        logger.flush_pending()
    logger.close()


def test_logger_measures_throughput_after_the_first_step(
    open_logger: OpenLogger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = open_logger()
    record_losses(logger, 0, [1] * 10)
    logger.flush_pending()
    logger.close()
    lines: list[dict[str, Any]] = read_metrics(str(tmp_path))
    assert all(line["images_per_second"] > 0 for line in lines)
    printed = capsys.readouterr().out.splitlines()
    assert [mentions(line, "10", f"{step}") for line, step in zip(printed, (4, 8, 10), strict=True)]


def test_log_eval_writes_values_and_prints_text(
    open_logger: OpenLogger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = open_logger()
    logger.log_eval(3, "val", {"top1": 0.5}, "top-1 50 %")
    logger.close()
    assert read_metrics(str(tmp_path)) == [{"step": 3, "val/top1": 0.5}]
    assert mentions(capsys.readouterr().out, "3", "val", "top-1 50 %")
