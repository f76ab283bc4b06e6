"""Tests of the commands `visualize units`, `filters` and `saliency`."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mixer_jax import visualize
from mixer_jax.checkpoints.weights import replace_head
from mixer_jax.cli import common
from mixer_jax.errors import RunError
from mixer_jax.inference import load_pretrained
from mixer_jax.models.bit_config import BitConfig
from mixer_jax.models.vit_config import VitConfig
from mixer_jax.visualization.figures import render_figure
from mixer_jax.visualization.saliency import plot_saliency
from mixer_jax.visualization.units import plot_filters, plot_units
from tests.helpers.cli import run_cli
from tests.helpers.messages import mentions, raises
from tests.helpers.random_weights import random_weights, save_npz, save_run

NAMES = tuple(f"class {letter}" for letter in "abc")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights of all families, weights without a head, and photographs."""
    workspace = tmp_path_factory.mktemp("visualize")
    save_run(random_weights(class_names=NAMES), workspace / "mixer")
    save_run(random_weights(VitConfig(1, 4, 16, 24, 2), class_names=NAMES), workspace / "vit")
    save_run(random_weights(BitConfig("1", 8, "3x3"), class_names=NAMES), workspace / "bit")
    save_npz(
        replace_head(random_weights(), 0), workspace / "features.npz", {"image_size": [16, 16]}
    )
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(workspace / name)
    (workspace / "bad.jpg").write_text("not an image")
    return workspace


@pytest.fixture(autouse=True)
def run_in_workspace(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands in this process run in the folder and do not change the test suite's JAX config."""
    monkeypatch.setattr(common, "configure_jax", lambda *_args, **_kwargs: None)
    monkeypatch.chdir(workspace)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("block", [0, 1, None])
def test_visualize_units_writes_the_figure_of_plot_units(
    block: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "units.png"
    flags = [] if block == 0 else [f"--block={'all' if block is None else block}"]
    assert visualize.main(["units", "--checkpoint=mixer", f"--out={out}", *flags]) == 0
    figure = plot_units(load_pretrained("mixer"), block)
    assert out.read_bytes() == render_figure(figure, "png")
    first, *lines = capsys.readouterr().out.splitlines()
    assert mentions(first, str(out), "Mixer-custom at 16 px")
    assert len(lines) == (2 if block is None else 1)
    assert mentions(lines[-1], f"block {1 if block is None else block}", "8 units", "noise")
    assert files(tmp_path) == ["units.png"]


@pytest.mark.parametrize("family", ["mixer", "vit", "bit"])
@pytest.mark.parametrize("flags", [[], ["--gray"]], ids=["color", "gray"])
def test_visualize_filters_draws_every_family(
    family: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "filters.png"
    assert visualize.main(["filters", f"--checkpoint={family}", f"--out={out}", *flags]) == 0
    figure = plot_filters(load_pretrained(family), gray=bool(flags))
    assert out.read_bytes() == render_figure(figure, "png")
    assert mentions(capsys.readouterr().out, str(out), "8" if family == "bit" else "16")


@pytest.mark.parametrize("family", ["mixer", "vit", "bit"])
@pytest.mark.parametrize("method", ["occlusion", "gradient"])
def test_visualize_saliency_draws_every_family(
    family: str, method: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "saliency.png"
    argv = ["saliency", f"--checkpoint={family}", f"--out={out}", f"--method={method}"]
    assert visualize.main([*argv, "--class=class b", "--square_size=5", "a.png", "b.png"]) == 0
    classifier = load_pretrained(family)
    saliencies = classifier.saliency(["a.png", "b.png"], "class b", method, square_size=5, stride=2)
    assert out.read_bytes() == render_figure(plot_saliency(saliencies), "png")
    title, *lines = capsys.readouterr().out.splitlines()
    assert mentions(title, str(out), method)
    for line, saliency in zip(lines, saliencies, strict=True):
        row, column = np.unravel_index(saliency.values.argmax(), (16, 16))
        assert mentions(line, saliency.image, "class b", f"row {row}", f"column {column}")


def test_visualize_saliency_explains_the_prediction_by_default(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "saliency.png"
    assert visualize.main(["saliency", "--checkpoint=mixer", f"--out={out}", "*.png"]) == 0
    predictions = load_pretrained("mixer").predict(["a.png", "b.png"])
    _, *lines = capsys.readouterr().out.splitlines()
    for line, prediction in zip(lines, predictions, strict=True):
        assert mentions(line, prediction.image, prediction.classes[0].name)


def test_visualize_saliency_takes_class_names_from_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "names.txt").write_text("tench\ngoldfish\nshark\n")
    argv = ["saliency", "--checkpoint=mixer", f"--out={tmp_path}/out.jpg", "a.png"]
    argv += [f"--labels={tmp_path}/names.txt", "--class=shark", "--method=gradient"]
    assert visualize.main(argv) == 0
    assert mentions(capsys.readouterr().out, "a.png", "shark")


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["units", "--checkpoint=mixer", "--block=2"], ["--block", "0", "1", "2"]),
        (["units", "--checkpoint=mixer", "--block=first"], ["--block", "all", "'first'"]),
        (["units", "--checkpoint=mixer", "--block=-1"], ["--block", "'-1'"]),
        (["units", "--checkpoint=vit"], ["ViT-custom at 16 px", "visualize filters"]),
        (["units", "--checkpoint=bit", "--block=all"], ["BiT-custom at 16 px"]),
        (["units", "--checkpoint=nowhere"], ["nowhere"]),
        (["units", "--checkpoint=mixer", "--config.seed=1"], ["--config.seed=1", "--help"]),
        (["units", "--checkpoint=mixer", "--step=7"], ["7"]),
        (["units"], ["--checkpoint", "--help"]),
        (["filters", "--checkpoint=mixer", "--block=1"], ["--block=1", "--help"]),
        (["filters", "--checkpoint=a.png"], ["a.png"]),
        (["saliency", "--checkpoint=mixer"], ["IMAGE", "--help"]),
        (["saliency", "--checkpoint=mixer", "c.png"], ["c.png"]),
        (["saliency", "--checkpoint=mixer", "a.png", "c.png"], ["c.png"]),
        (["saliency", "--checkpoint=mixer", "a.png", "bad.jpg"], ["bad.jpg"]),
        (["saliency", "--checkpoint=mixer", *["a.png"] * 25], ["24", "25"]),
        (["saliency", "--checkpoint=mixer", "a.png", "--class=class d"], ["'class d'", "class c"]),
        (["saliency", "--checkpoint=mixer", "a.png", "--class=3"], ["'3'", "0", "2"]),
        (["saliency", "--checkpoint=mixer", "a.png", "--method=lime"], ["--method", "'lime'"]),
        (["saliency", "--checkpoint=mixer", "a.png", "--square_size=17"], ["17", "16"]),
        (["saliency", "--checkpoint=mixer", "a.png", "--stride=3"], ["stride", "3", "2"]),
        (["saliency", "--checkpoint=mixer", "a.png", "--batch_size=0"], ["--batch_size", "0"]),
        (["saliency", "--checkpoint=features.npz", "a.png"], ["features.npz", "head"]),
        (["filters", "--checkpoint=mixer", "--out=missing/a.png"], ["--out", "missing/a.png"]),
        (["saliency", "--checkpoint=mixer", "a.png", "--out=a.gif"], ["--out", "a.gif"]),
    ],
)
def test_usage_errors_are_one_line_and_write_nothing(
    argv: list[str],
    parts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command, *rest = argv
    monkeypatch.setattr(sys, "argv", ["visualize", command, f"--out={tmp_path}/out.png", *rest])
    with pytest.raises(SystemExit) as stop:
        common.run_cli(visualize.main)
    error = capsys.readouterr().err
    assert stop.value.code == 2, error
    assert error.count("\n") == 1
    assert mentions(error, *parts)
    assert files(tmp_path) == []


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_disk(self: Path, content: bytes) -> None:
        with self.open("wb") as file:
            file.write(content[:100])
        raise OSError(28, "No space left on device")

    out = tmp_path / "units.png"
    out.write_bytes(b"an older plot")
    monkeypatch.setattr(Path, "write_bytes", fill_disk)
    with raises(RunError, str(out), "No space left on device"):
        visualize.main(["units", "--checkpoint=mixer", f"--out={out}"])
    assert out.read_bytes() == b"an older plot"
    assert files(tmp_path) == ["units.png"]


@pytest.mark.slow
def test_commands_run_as_processes(
    tmp_path: Path, workspace: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    flags = f"--checkpoint={workspace}/mixer", f"--out={tmp_path}/a.pdf"
    for command, *images in (["units"], ["filters"], ["saliency", f"{workspace}/a.png"]):
        done = run_cli("visualize", command, *flags, *images)
        assert done.stderr == ""
        assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
