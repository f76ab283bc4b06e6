"""Tests of the command `visualize`: the plot, where it is written, and usage errors."""

import sys
from pathlib import Path
from typing import Any

import pytest

from mixer_jax import visualize
from mixer_jax.cli import common
from mixer_jax.errors import RunError, UserError
from mixer_jax.training.datasets import open_datasets
from mixer_jax.visualization import train_batch
from mixer_jax.visualization.figures import render_figure
from mixer_jax.visualization.train_batch import draw_train_batch, format_caption, load_train_batch
from tests.helpers.cli import run_cli
from tests.helpers.messages import mentions, raises
from tests.helpers.tiny_run import small_config, to_flags


def make_argv(data_dir: str, out: Path, **changes: Any) -> list[str]:
    flags = ["--config=configs/digits.py", f"--out={out}", "--num_images=4"]
    return ["data", *flags, *to_flags(data_dir, **changes)]


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

    monkeypatch.setattr(visualize.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(train_batch, "load_train_batch", None)
    with raises(UserError, str(tmp_path), "Permission denied"):
        visualize.main(make_argv(digits_dir, tmp_path / "batch.png"))


def test_visualize_data_keeps_the_old_file_if_the_disk_is_full(
    digits_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_disk(self: Path, content: bytes) -> None:
        with self.open("wb") as file:
            file.write(content[:100])
        raise OSError(28, "No space left on device")

    out = tmp_path / "batch.png"
    out.write_bytes(b"an older plot")
    monkeypatch.setattr(Path, "write_bytes", fill_disk)
    with raises(RunError, str(out), "No space left on device"):
        visualize.main(make_argv(digits_dir, out))
    assert out.read_bytes() == b"an older plot"
    assert [path.name for path in tmp_path.iterdir()] == ["batch.png"]
