"""Targets that read files of workdirs: configs, metrics, results of suites, features."""

import functools
import json
import math
import os
import socket
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mixer_jax.checkpoints.model_card import make_model_card
from mixer_jax.checkpoints.resolve import find_checkpoint
from mixer_jax.comparison import results as comparison_results
from mixer_jax.config.config import get_default, parse
from mixer_jax.config.schema import BadImagesConfig, RunConfig
from mixer_jax.errors import RunError, UserError
from mixer_jax.evaluation import extraction
from mixer_jax.evaluation.feature_files import Part, Parts, write_part
from mixer_jax.files import is_locked, parse_json
from mixer_jax.suites import seeds, tasks
from mixer_jax.suites import workdir as suite_workdir
from mixer_jax.suites.table import as_csv, as_json, as_markdown, as_text, make_table
from mixer_jax.training.bad_images import BadImageLog, read_bad_images
from mixer_jax.training.workdir import check_workdir, read_starts
from mixer_jax.visualization.curves import plot_curves
from mixer_jax.visualization.run_page import read_runs, render_run_page
from tests.fuzz.mutation import mutate_json, mutate_json_lines, mutate_text, mutate_zip
from tests.fuzz.target import Target
from tests.helpers.html_pages import check_stands_alone
from tests.helpers.random_weights import random_weights
from tests.helpers.tiny_run import START
from tests.helpers.tiny_suite import SUITE, make_plan

_EVAL = "test"
_METRICS: list[dict[str, Any]] = [
    {"step": 10, "loss": 2.5, "learning_rate": 0.1, "images_per_second": 90.0},
    {"step": 10, "test/top1": 0.5, "test/loss": 2.0, "test/num_examples": 360},
    {"step": 20, "loss": 1.5, "learning_rate": 0.1, "images_per_second": 91.0},
    {"step": 20, "model_flops_utilization": 0.3, "test/top1": 0.6, "test/num_examples": 360},
]
_BAD = [
    {"step": 3, "name": "a.jpg", "reason": "incomplete"},
    {"step": 7, "name": "b.jpg", "reason": "incomplete"},
]


def _lines(rows: Sequence[Any]) -> bytes:
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


@functools.cache
def _config() -> RunConfig:
    config = get_default()
    config.unlock()
    config.dataset.name, config.num_steps = "digits", 20
    config.model.variant, config.image_size = "S/16", 32
    config.evals = {_EVAL: {"split": "test", "every_steps": 10}}
    config.checkpoint.best_metric = f"{_EVAL}/top1"
    config.optimizer.warmup_steps = 2
    from ml_collections import ConfigDict

    from mixer_jax.config.config import fill_defaults

    return parse(ConfigDict({**fill_defaults(config.to_dict()), "mixture": {}}))


@functools.cache
def _config_seeds() -> Sequence[bytes]:
    return [json.dumps(_config().to_dict()).encode()]


def _make_run(folder: Path, **files: bytes) -> Path:
    """Writes the files of a run, of which some are given."""
    workdir = folder / "run"
    if not workdir.exists():
        (workdir / "checkpoints/10").mkdir(parents=True)
        (workdir / "checkpoints/20").mkdir()
        for step in (10, 20):
            (workdir / f"checkpoints/{step}/_CHECKPOINT_METADATA").write_text("{}")
    contents = {
        "config.json": _config_seeds()[0],
        "metrics.jsonl": _lines(_METRICS),
        "starts.jsonl": _lines([START]),
        "bad_images_0.jsonl": _lines(_BAD),
    }
    for name, content in {**contents, **files}.items():
        (workdir / name).write_bytes(content)
    return workdir


def _read_run(name: str, data: bytes, folder: Path) -> None:
    """Reads a run as the page of runs, `--seeds` and a later start of it do."""
    workdir = str(_make_run(folder, **{name: data}))
    errors: list[Exception] = []
    steps: tuple[Callable[[], Any], ...] = (
        lambda: find_checkpoint(workdir, "best"),
        lambda: _read_seeds(workdir),
        lambda: check_workdir(workdir, _config()),
        lambda: read_starts(workdir),
        lambda: _open_bad_images(workdir),
        lambda: _render(workdir),
    )
    for step in steps:
        try:
            step()
        except (UserError, RunError) as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _open_bad_images(workdir: str) -> None:
    read_bad_images(workdir)
    BadImageLog(
        workdir,
        5,
        num_examples=100,
        batch_size=10,
        config=BadImagesConfig(),
        log=lambda text: None,
    )


def _read_seeds(workdir: str) -> None:
    result = seeds.read_result(workdir, _config())
    if result:
        seeds.format_table([result, result._replace(seed=1)])
        json.dumps(seeds.to_json([result]))


def _render(workdir: str) -> None:
    from unittest import mock

    # Drawing is another target.
    with mock.patch("mixer_jax.visualization.run_page._draw_panels", return_value=[]):
        page = render_run_page(read_runs([workdir]), [])
    page.encode()
    check_stands_alone(page)


def _plot_seeds() -> Sequence[bytes]:
    import matplotlib.font_manager  # noqa: F401  # Runs a program when its cache is empty.

    return [_lines(_METRICS)]


def _plot(data: bytes, folder: Path) -> None:
    from mixer_jax.visualization.figures import render_figure

    workdir = str(_make_run(folder, **{"metrics.jsonl": data}))
    render_figure(plot_curves(workdir), "png")
    check_stands_alone(render_run_page(read_runs([workdir]), []))


def _make_card(data: bytes, folder: Path) -> None:
    workdir = str(_make_run(folder, **{"metrics.jsonl": data}))
    weights = random_weights()._replace(train_config=_config().to_dict(), step=20, workdir=workdir)
    make_model_card(weights, "owner/name").encode()


def _read_lock(data: bytes, folder: Path) -> None:
    path = folder / ".lock"
    path.write_bytes(data)
    assert is_locked(path) in (None, True, False)


def _read_suite(name: str, data: bytes, folder: Path) -> None:
    workdir = folder / "suite"
    _write_suite(workdir)
    (workdir / name).write_bytes(data)
    try:
        plan = suite_workdir.read_plan(str(workdir))
        throughput = suite_workdir.read_throughput(str(workdir))
        assert plan is not None
        table = make_table(plan, str(workdir), throughput)
        for format_table in (as_text, as_csv, as_json, as_markdown):
            format_table(table).encode(errors="backslashreplace")
        suite_workdir.save_plan(str(workdir), make_plan())
    finally:
        (workdir / name).unlink()


@functools.cache
def _suite_files() -> dict[str, bytes]:
    """Makes the files of a suite, by path."""
    with tempfile.TemporaryDirectory() as folder:
        suite_workdir.save_plan(folder, make_plan())
        throughput = suite_workdir.Throughput(100.0, 8, "cpu", (16, 16))
        suite_workdir.save_throughput(folder, throughput)
        scores = {"top1": 0.5, "log_likelihood": -1.0, "num_examples": 100}
        for task in SUITE.tasks[:2]:
            assert isinstance(task, tasks.FineTuneTask)
            for rate in task.learning_rates:
                result = suite_workdir.RunResult({"validation": scores}, 1.0)
                name = f"{task.name}/choose/learning_rate={rate:g}"
                suite_workdir.save_result(f"{folder}/{name}", result)
            for seed in task.seeds:
                result = suite_workdir.RunResult({"test": scores}, 1.0)
                suite_workdir.save_result(f"{folder}/{task.name}/final/seed={seed}", result)
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in Path(folder).rglob("*")
            if path.is_file() and not path.name.endswith(".lock")
        }


def _write_suite(folder: Path) -> None:
    for name, content in _suite_files().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@functools.cache
def _comparison_seeds() -> Sequence[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        result = comparison_results.Result("digits test", {"top1": 0.5, "num_examples": 9}, 1.0)
        comparison_results.save_result(folder, result)
        return [Path(folder, "result.json").read_bytes()]


def _read_comparison(data: bytes, folder: Path) -> None:
    workdir = folder / "comparison"
    workdir.mkdir(exist_ok=True)
    for name in ("result.json", "model.json", "throughput.json"):
        (workdir / name).write_bytes(data)
    result = comparison_results.read_result(str(workdir), "digits test")
    assert result is not None
    assert math.isfinite(result.metrics["top1"])
    json.dumps(comparison_results.dataclasses.asdict(result))
    comparison_results.check_same_model(str(workdir), parse_json(data))


def _check_same_run(data: bytes, folder: Path) -> None:
    workdir = _make_run(folder, **{"config.json": data})
    comparison_results.check_same_run(str(workdir), _config())


@functools.cache
def _part_seeds() -> Sequence[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "0.npz")
        layers = {"stem": np.zeros((2, 3), np.float32)}
        write_part(path, Part(["a", "b"], np.array([0, 1]), layers, [("c", "damaged")]))
        return [path.read_bytes()]


def _read_parts(data: bytes, folder: Path) -> None:
    path = folder / "0.npz"
    path.write_bytes(data)
    parts = Parts([path])
    for arrays in (parts.names(), parts.labels(), parts.layer("stem")):
        assert all(array.nbytes < 2**24 for array in arrays)
    parts.bad_images()


_REQUEST = {
    "model": {"family": "mixer", "image_size": 32},
    "layers": ["stem", "blocks.0"],
    "files": {"images": "blake2b:00-11"},
    "batch_size": 8,
}


def _read_request(data: bytes, folder: Path) -> None:
    """Compares the request of an unfinished extraction with that of the command."""
    parts = folder / "features.npz.parts"
    parts.mkdir(exist_ok=True)
    (parts / "000000.npz").touch()
    (parts / "request.json").write_bytes(data)
    extraction._begin(parts, folder / "features.npz", _REQUEST, force=False)


def _run_target(name: str, seeds_of: Callable[[], Sequence[bytes]], mutate_file: Any) -> Target:
    return Target(
        f"run: {name}", seeds_of, functools.partial(_read_run, name), mutate_file, cost=60
    )


TARGETS = [
    _run_target("config.json", _config_seeds, mutate_json),
    _run_target("metrics.jsonl", lambda: [_lines(_METRICS)], mutate_json_lines),
    _run_target("starts.jsonl", lambda: [_lines([START, START])], mutate_json_lines),
    _run_target("bad_images_0.jsonl", lambda: [_lines(_BAD)], mutate_json_lines),
    Target("run: plots", _plot_seeds, _plot, mutate_json_lines, 1000),
    Target("run: model card", lambda: [_lines(_METRICS)], _make_card, mutate_json_lines, 10),
    Target(
        "run: lock",
        lambda: [f"process {os.getpid()} on {socket.gethostname()}".encode()],
        _read_lock,
        mutate_text,
    ),
    *(
        Target(
            f"suite: {title}",
            functools.partial(lambda name: [_suite_files()[name]], name),
            functools.partial(_read_suite, name),
            mutator,
            cost=10,
        )
        for title, name, mutator in (
            ("plan", "suite.json", mutate_json),
            ("result", "high/final/seed=0/result.json", mutate_json),
            ("throughput", "throughput.json", mutate_json),
        )
    ),
    Target(
        "suite: failure",
        lambda: [b"reason\n\ntrace\n"],
        functools.partial(_read_suite, "high/failed.txt"),
        mutate_text,
        10,
    ),
    Target("comparison: result", _comparison_seeds, _read_comparison, mutate_json),
    Target("comparison: config", _config_seeds, _check_same_run, mutate_json, 10),
    Target(
        "features: request", lambda: [json.dumps(_REQUEST).encode()], _read_request, mutate_json
    ),
    Target("features: part", _part_seeds, _read_parts, mutate_zip, 2),
]
