"""Tests of the command `visualize`: plots and pages, where they are written, and usage errors."""

import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from mixer_jax import visualize
from mixer_jax.cli import common
from mixer_jax.errors import RunError, UserError
from mixer_jax.training.datasets import open_datasets
from mixer_jax.training.workdir import save_config
from mixer_jax.visualization import train_batch
from mixer_jax.visualization.figures import render_figure
from mixer_jax.visualization.train_batch import draw_train_batch, format_caption, load_train_batch
from tests.helpers.cli import run_cli
from tests.helpers.html_pages import check_stands_alone
from tests.helpers.messages import mentions, raises
from tests.helpers.tiny_run import small_config, to_flags


def make_argv(data_dir: str, out: Path, **changes: Any) -> list[str]:
    flags = ["--config=configs/digits.py", f"--out={out}", "--num_images=4"]
    return ["data", *flags, *to_flags(data_dir, **changes)]


def fill_disk(self: Path, content: bytes) -> None:
    """Replaces `Path.write_bytes`: writes a part, and fails."""
    with self.open("wb") as file:
        file.write(content[:100])
    raise OSError(28, "No space left on device")


def exit_code_of(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command as from the command line."""
    monkeypatch.setattr(sys, "argv", ["visualize", *argv])
    with pytest.raises(SystemExit) as stop:
        common.run_cli(visualize.main)
    return stop.value.code


@pytest.mark.slow
def test_visualize_data_plots_the_requested_step(digits_dir: str, tmp_path: Path) -> None:
    out = tmp_path / "batch.png"
    done = run_cli("visualize", *make_argv(digits_dir, out), "--step=3")
    (line,) = done.stdout.splitlines()
    assert mentions(line.replace(str(out), "OUT"), "OUT", "configs/digits.py", "3", "4", "16")
    config = small_config(digits_dir)
    source = open_datasets(config).train
    batch = load_train_batch(config, source, 3, 4)
    caption = format_caption("configs/digits.py", config, source, 3, batch)
    figure = draw_train_batch(batch, source.class_names, caption)
    assert out.read_bytes() == render_figure(figure, "png")
    assert [path.name for path in tmp_path.iterdir()] == ["batch.png"]


@pytest.mark.parametrize(
    ("suffix", "magic"), [(".png", b"\x89PNG"), (".PDF", b"%PDF"), (".jpg", b"\xff\xd8\xff")]
)
def test_visualize_data_replaces_a_file_in_the_format_of_its_suffix(
    digits_dir: str, tmp_path: Path, suffix: str, magic: bytes
) -> None:
    out = tmp_path / f"batch{suffix}"
    out.write_bytes(b"an older plot")
    assert visualize.main(make_argv(digits_dir, out)) == 0
    assert out.read_bytes().startswith(magic)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--out=batch.gif"], ["--out", "batch.gif", ".png", ".pdf"]),
        (["--out=batch"], ["--out", "batch", ".png", ".pdf"]),
        (["--out=missing/a.png"], ["--out", "missing/a.png"]),
        (["--out=tests.png/a.png"], ["--out", "tests.png/a.png"]),
        (["--step=20"], ["--step", "20", "0", "19"]),
        (["--step=-1"], ["--step", "-1", "0", "19"]),
        (["--step=one"], ["--step", "'one'"]),
        (["--num_images=0"], ["--num_images", "0", "1", "16"]),
        (["--num_images=17"], ["--num_images", "17", "1", "16"]),
        (["--num_images=513", "--config.batch_size=4096"], ["513", "1", "512", "4096"]),
        (["--config=configs/digit.py"], ["configs/digit.py", "configs/digits.py"]),
        (["--config.recipe.mixup=-1.0"], ["recipe.mixup", "-1.0"]),
        (["--steps=1"], ["--steps", "--help"]),
    ],
)
def test_visualize_data_reports_usage_errors_in_one_line(
    digits_dir: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    parts: list[str],
) -> None:
    out = tmp_path / "batch.png"
    assert exit_code_of([*make_argv(digits_dir, out), *argv], monkeypatch) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert mentions(error, *parts)
    assert not out.exists()


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ([], ["COMMAND", "--help"]),
        (["date"], ["'date'", "data"]),
        (["data"], ["--config", "--out", "--help"]),
    ],
)
def test_visualize_rejects_unknown_commands(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    parts: list[str],
) -> None:
    assert exit_code_of(argv, monkeypatch) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert mentions(error, *parts)


def test_visualize_data_plots_runs_shorter_than_their_warmup(
    digits_dir: str, tmp_path: Path
) -> None:
    changes = {"num_steps": 0, "num_epochs": 0.1, "optimizer__warmup_steps": 10_000}
    assert visualize.main(make_argv(digits_dir, tmp_path / "batch.png", **changes)) == 0


def test_visualize_data_plots_no_more_images_than_a_batch_by_default(
    digits_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = make_argv(digits_dir, tmp_path / "batch.png")
    argv.remove("--num_images=4")
    assert visualize.main(argv) == 0
    assert mentions(capsys.readouterr().out, "16 of 16 images")


def test_visualize_data_does_not_open_evaluation_data(digits_dir: str, tmp_path: Path) -> None:
    out = tmp_path / "batch.png"
    missing = "--config.evals.test.dataset=folder:/nowhere"
    assert visualize.main([*make_argv(digits_dir, out), missing]) == 0
    assert out.exists()


def test_visualize_data_rejects_a_folder(digits_dir: str, tmp_path: Path) -> None:
    (tmp_path / "batch.png").mkdir()
    with raises(UserError, str(tmp_path / "batch.png")):
        visualize.main(make_argv(digits_dir, tmp_path / "batch.png"))


def test_visualize_data_checks_the_folder_before_it_loads_images(
    digits_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(train_batch, "load_train_batch", None)
    with raises(UserError, str(tmp_path), "Permission denied"):
        visualize.main(make_argv(digits_dir, tmp_path / "batch.png"))


def test_visualize_data_keeps_the_old_file_if_the_disk_is_full(
    digits_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "batch.png"
    out.write_bytes(b"an older plot")
    monkeypatch.setattr(Path, "write_bytes", fill_disk)
    with raises(RunError, str(out), "No space left on device"):
        visualize.main(make_argv(digits_dir, out))
    assert out.read_bytes() == b"an older plot"
    assert [path.name for path in tmp_path.iterdir()] == ["batch.png"]


def make_workdir(folder: Path, data_dir: str = "/nowhere") -> Path:
    """Writes the files of a run that has logged one step."""
    workdir = folder / "run"
    workdir.mkdir()
    save_config(str(workdir), small_config(data_dir))
    (workdir / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    return workdir


@pytest.mark.slow
def test_visualize_run_writes_a_page_of_a_run(digits_dir: str, tmp_path: Path) -> None:
    workdir = make_workdir(tmp_path, digits_dir)
    (workdir / "metrics.jsonl").chmod(0o444)
    workdir.chmod(0o555)
    before = sorted(workdir.iterdir())
    out = tmp_path / "run.html"
    done = run_cli("visualize", "run", f"--workdir={workdir}", f"--out={out}")
    assert mentions(done.stdout, str(out), "run", "1")
    page = check_stands_alone(out.read_text())
    assert page.attributes("data", "value") == ["2.5"]
    # Two figures of curves, and the first images of the batch.
    assert len(page.attributes("img", "src")) == 9
    assert sorted(workdir.iterdir()) == before


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--out=OUT.html"], ["--workdir"]),
        (["--workdir=RUN"], ["--out"]),
        (["--workdir=RUN", "--out=OUT.png"], ["--out", ".html"]),
        (["--workdir=RUN", "--out=missing/a.html"], ["--out", "missing/a.html"]),
        (["--workdir=", "--out=OUT.html"], ["workdir"]),
        (["--workdir=RUN/none", "--out=OUT.html"], ["--workdir", "none", "exist"]),
        (["--workdir=RUN/checkpoints", "--out=OUT.html"], ["--workdir", "config.json"]),
        (["--workdir=RUN/new", "--out=OUT.html"], ["--workdir", "metrics"]),
        (["--workdir=RUN", "--workdir=RUN/.", "--out=OUT.html"], ["--workdir", "2"]),
        (["--workdir=RUN", "--out=OUT.html", "--config.seed=1"], ["--config.seed"]),
    ],
)
def test_visualize_run_reports_usage_errors_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    parts: list[str],
) -> None:
    workdir = make_workdir(tmp_path)
    (workdir / "checkpoints").mkdir()
    (workdir / "new").mkdir()
    save_config(str(workdir / "new"), small_config("/nowhere"))
    paths = {"RUN": str(workdir), "OUT": f"{tmp_path}/page"}
    for name, path in paths.items():
        argv = [argument.replace(name, path) for argument in argv]
    assert exit_code_of(["run", *argv], monkeypatch) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert mentions(error, *parts)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_visualize_run_keeps_the_old_page_if_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = make_workdir(tmp_path)
    out = tmp_path / "page.html"
    out.write_text("an older page")
    monkeypatch.setattr(Path, "write_bytes", fill_disk)
    with raises(RunError, str(out), "No space left on device"):
        visualize.main(["run", f"--workdir={workdir}", f"--out={out}"])
    assert out.read_text() == "an older page"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "run"]
