"""Tests of the page of training runs: what it shows, and of which workdirs."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mixer_jax.checkpoints.resolve import CHECKPOINT_DIR
from mixer_jax.config.schema import RunConfig
from mixer_jax.errors import UserError
from mixer_jax.training.metrics import MetricsWriter
from mixer_jax.training.workdir import lock_workdir, record_start, save_config
from mixer_jax.visualization.run_page import (
    Examples,
    Run,
    load_examples,
    read_runs,
    render_run_page,
)
from tests.helpers.html_pages import Page, check_stands_alone, visible_text
from tests.helpers.messages import mentions, raises
from tests.helpers.tiny_run import START, small_config

LINES: list[tuple[int, dict[str, float]]] = [
    (10, {"loss": 2.0123456789, "learning_rate": 0.1, "images_per_second": 90.0}),
    (10, {"test/top1": 0.9166666666666666, "test/num_examples": 360.0}),
    (
        20,
        {
            "loss": 1e-7,
            "learning_rate": 0.2,
            "images_per_second": 1_100.125,
            "model_flops_utilization": 0.4321,
        },
    ),
    (20, {"test/top1": 0.875, "test/num_examples": 360.0}),
]
NASTY_NAMES = ["<script>alert(1)</script>", "\"'><img src=x onerror=y>", "שלום&amp;🐝"]


def make_run(
    workdir: Path,
    data_dir: str = "/nowhere",
    lines: list[tuple[int, dict[str, float]]] = LINES,
    saved_steps: tuple[int, ...] = (20,),
    **changes: Any,
) -> str:
    """Writes the files of a run, as training does."""
    workdir.mkdir(exist_ok=True)
    save_config(str(workdir), small_config(data_dir, **changes))
    record_start(str(workdir), START)
    writer = MetricsWriter(str(workdir), 0, is_primary=True, tensorboard=False)
    for step, values in lines:
        writer.write(step, values)
    writer.close()
    for step in saved_steps:
        (workdir / CHECKPOINT_DIR / str(step)).mkdir(parents=True)
    return str(workdir)


def render(*workdirs: str, examples: list[Examples] | None = None) -> Page:
    """Renders the page of some runs, parsed; its text has a space between elements."""
    page = render_run_page(read_runs(workdirs), examples or [])
    parsed = check_stands_alone(page)
    parsed.text = visible_text(page)
    return parsed


def numbers(page: Page) -> list[float]:
    """Exact numbers of the page, in order."""
    return [json.loads(value) for value in page.attributes("data", "value")]


@pytest.fixture
def workdir(tmp_path: Path) -> str:
    tmp_path = tmp_path / "first"
    tmp_path.mkdir()
    return make_run(tmp_path)


def test_numbers_are_those_of_the_metrics_log(workdir: str) -> None:
    page = render(workdir)
    last = {key: value for _, values in LINES for key, value in values.items()}
    shown = ["loss", "learning_rate", "test/top1", "test/num_examples"]
    expected = [last[key] for key in shown]
    # The best accuracy follows the last one.
    expected.insert(3, 0.9166666666666666)
    rate, utilization = [90.0, 1_100.125], 0.4321
    median = sum(rate) / 2
    assert numbers(page) == [*expected, median, *rate, rate[1], *[utilization] * 4]
    assert mentions(page.text, "1e-07", "87.50%", "91.67%", "360", "595", "43.21%", "step 10")


def test_page_shows_data_hardware_and_versions(workdir: str) -> None:
    record_start(workdir, {**START, "step": 10, "num_devices": 4, "device_kind": "cpu"})
    page = render(workdir)
    assert mentions(page.text, "Mixer-S/16", "1,234,567", "digits/all train", "1,437")
    assert mentions(page.text, "8 × NVIDIA H200", "4 × cpu", "data=4 fsdp=2", "bfloat16", "triton")
    assert mentions(page.text, "2026-01-02 03:04:05 UTC", "0.10.2", "finished", "20 of 20")
    assert "peak FLOP/s is unknown" in page.text


def test_runs_without_recorded_starts_are_shown(workdir: str) -> None:
    (Path(workdir) / "starts.jsonl").unlink()
    page = render(workdir)
    assert mentions(page.text, "finished", "20 of 20", "records no devices")


def test_differences_between_configs_are_listed(tmp_path: Path, workdir: str) -> None:
    folder = tmp_path / "second"
    folder.mkdir()
    second = make_run(folder, optimizer__learning_rate=0.25, seed=7)
    text = render(workdir, second).text
    table = text[text.index("Differences between") : text.index("Training images")]
    cells = [*table.split()[7:]]
    assert cells == ["optimizer.learning_rate", "0.003", "0.25", "seed", "0", "7"]
    save_config(second, small_config("/nowhere"))
    assert "All keys have the same values" in render(workdir, second).text


def test_runs_are_named_by_the_ends_of_their_paths(tmp_path: Path) -> None:
    workdirs = [tmp_path / "a" / "seed=0", tmp_path / "b" / "seed=0", tmp_path / "b" / "seed=1"]
    for workdir in workdirs:
        workdir.mkdir(parents=True)
        make_run(workdir)
    assert [run.name for run in read_runs([str(workdirs[0]), str(workdirs[2])])] == [
        "seed=0",
        "seed=1",
    ]
    names = [run.name for run in read_runs([*map(str, workdirs)])]
    assert names == ["a/seed=0", "b/seed=0", "b/seed=1"]


def test_many_runs_have_distinct_colors(tmp_path: Path) -> None:
    workdirs = []
    for index in range(12):
        (tmp_path / str(index)).mkdir()
        workdirs.append(make_run(tmp_path / str(index)))
    page = render(*workdirs)
    swatches = [values for _, values in page.elements if values.get("class") == "swatch"]
    assert len({values["style"] for values in swatches}) == 12


@pytest.mark.parametrize("name", NASTY_NAMES)
def test_names_are_shown_as_text(tmp_path: Path, name: str) -> None:
    # Slashes would make another folder.
    name = name.replace("/", "")
    workdirs = []
    for folder in (name, "other"):
        (tmp_path / folder).mkdir()
        workdirs.append(make_run(tmp_path / folder, dataset__name=f"folder:/x{name}"))
    bad = {"step": 3, "name": f"{name}.jpg", "reason": f"reason {name}"}
    (tmp_path / name / "bad_images_0.jsonl").write_text(json.dumps(bad) + "\n")
    image = {"uri": "data:image/png;base64,", "name": "", "lines": [f"label {name}"]}
    page = render(*workdirs, examples=[Examples([name], [f"caption {name}"], [image])])
    for text in (f"{name}.jpg", f"reason {name}", f"label {name}", f"caption {name}", f"/x{name}"):
        assert text in page.text


def test_examples_are_the_images_of_the_first_batch(tmp_path: Path, digits_dir: str) -> None:
    workdirs = []
    changed: dict[str, Any] = {"a": {}, "b": {}, "c": {"seed": 1}, "d": {"recipe__cutmix": 1.0}}
    for folder, changes in changed.items():
        (tmp_path / folder).mkdir()
        workdirs.append(make_run(tmp_path / folder, digits_dir, log_every_steps=5, **changes))
    runs = read_runs(workdirs)
    first, second, third = load_examples(runs)
    assert (first.names, second.names, third.names) == (["a", "b"], ["c"], ["d"])
    assert (first.problem, second.problem, third.problem) == ("", "", "")
    assert mentions(" ".join(third.caption), "CutMix")
    assert len(first.images) == len(second.images) == 8
    assert [image["uri"] for image in first.images] != [image["uri"] for image in second.images]
    page = check_stands_alone(render_run_page(runs, [first, second]))
    shown = [uri for uri in page.attributes("img", "src") if uri.startswith("data:image/png")]
    assert shown == [image["uri"] for image in [*first.images, *second.images]]


def test_data_that_cannot_be_opened_is_explained(workdir: str) -> None:
    config = small_config("/nowhere", dataset__name="folder:/nowhere/photos")
    save_config(workdir, config)
    runs = read_runs([workdir])
    (examples,) = load_examples(runs)
    assert mentions(examples.problem, "/nowhere/photos")
    assert examples.problem in render(workdir, examples=[examples]).text


def test_bad_images_are_counted_and_listed_up_to_a_limit(workdir: str) -> None:
    for host in range(2):
        entries = (
            {"step": step, "name": f"{host}-{step}.jpg", "reason": "damaged"} for step in range(80)
        )
        lines = "".join(f"{json.dumps(entry)}\n" for entry in entries)
        # A line that is being written.
        Path(workdir, f"bad_images_{host}.jsonl").write_text(lines + '{"step": 8')
    page = render(workdir)
    assert mentions(page.text, "160 damaged", "100 of 160", "0-49.jpg", "1-49.jpg")
    assert not mentions(page.text, "0-50.jpg")


def only_run(workdir: str) -> Run:
    (run,) = read_runs([workdir])
    return run


def test_a_half_written_last_line_is_left_out(workdir: str) -> None:
    with Path(workdir, "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "loss": 0.')
    assert only_run(workdir).step == 20


def test_state_of_runs(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    workdir = make_run(tmp_path, lines=LINES[:2], saved_steps=(10,))
    with lock_workdir(workdir):
        assert only_run(workdir).state == "training"
        assert "interrupted" not in render(workdir).text
    assert only_run(workdir).state == "interrupted"
    page = render(workdir)
    assert mentions(page.text, "interrupted after step 10 of 20", "newest checkpoint is step 10")
    # As after a kill: the process does not exist any more.
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    lock.write_text(f"process {ended.pid} on {socket.gethostname()}")
    assert only_run(workdir).state == "interrupted"
    lock.write_text(f"process {os.getpid()} on another-{socket.gethostname()}")
    os.utime(tmp_path / "metrics.jsonl", (0, 0))
    assert only_run(workdir).state == "unfinished"
    minutes = re.search(r"metrics were written ([\d,]+) min", render(workdir).text)
    assert minutes is not None
    # Since 1970.
    assert int(minutes[1].replace(",", "")) > 25_000_000


def test_best_checkpoint_and_early_stop_are_shown(tmp_path: Path) -> None:
    values = {4: 0.5, 8: 0.25, 12: 0.375}
    lines = [(step, {"test/log_likelihood": -value}) for step, value in values.items()]
    settings: dict[str, Any] = {
        "lines": [(2, {"loss": 1.0}), *lines],
        "saved_steps": (4, 12),
        "evals__test__every_steps": 4,
        "checkpoint__best_metric": "test/log_likelihood",
    }
    stopped = make_run(tmp_path / "stopped", early_stopping_patience=1, **settings)
    run = only_run(stopped)
    assert (run.state, run.progress, run.missing_evals) == (
        "finished",
        "12 of 20, stopped early",
        [],
    )
    # The best one of those that are kept.
    page = render(stopped)
    assert mentions(page.text, "best checkpoint", "step 12", "test/log_likelihood -0.3750")
    assert mentions(page.text, "test/log_likelihood, best", "-0.25", "step 8")
    patient = make_run(tmp_path / "patient", early_stopping_patience=2, **settings)
    assert only_run(patient).state == "interrupted"


def test_missing_evaluations_of_a_finished_run_are_named(tmp_path: Path) -> None:
    workdir = make_run(tmp_path, lines=LINES[:3])
    assert only_run(workdir).missing_evals == ["test"]
    assert mentions(render(workdir).text, "no result of test")


def test_reading_changes_nothing(workdir: str) -> None:
    def contents() -> dict[str, tuple[int, bytes]]:
        files = [path for path in Path(workdir).rglob("*") if path.is_file()]
        return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    before = contents()
    render(workdir, examples=load_examples(read_runs([workdir])))
    assert contents() == before


def test_workdirs_that_cannot_be_shown_are_usage_errors(tmp_path: Path, workdir: str) -> None:
    with raises(UserError, str(tmp_path / "none")):
        read_runs([str(tmp_path / "none")])
    with raises(UserError, str(tmp_path), "config.json"):
        read_runs([str(tmp_path)])
    with raises(UserError, workdir, "2"):
        read_runs([workdir, workdir])
    metrics = Path(workdir, "metrics.jsonl")
    for content, parts in {"": ["metrics"], '{"loss": 1}\n': ["step"], "[]\n": ["JSON"]}.items():
        metrics.write_text(content)
        with raises(UserError, workdir, *parts):
            read_runs([workdir])
    Path(workdir, "config.json").write_text("[]")
    metrics.write_text('{"step": 1}\n')
    with raises(UserError, "config.json"):
        read_runs([workdir])


def test_values_that_are_not_finite_are_shown(tmp_path: Path) -> None:
    workdir = make_run(tmp_path, lines=[*LINES, (20, {"test/top5": float("nan")})])
    assert mentions(render(workdir).text, "nan%")


def test_default_config_has_a_page(tmp_path: Path) -> None:
    save_config(str(tmp_path), RunConfig(num_steps=20_000))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    assert only_run(str(tmp_path)).progress == "1 of 20,000"
