"""Tests of the command `prepare`, run as a process."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

import mixer_jax.data.builders.digits  # noqa: F401  Registers digits with TFDS.
from mixer_jax import prepare
from mixer_jax.data.registry import open_dataset
from mixer_jax.errors import UserError
from tests.helpers.cli import run_cli
from tests.helpers.messages import mentions, raises
from tests.helpers.no_tensorflow import HIDE_TENSORFLOW


@pytest.mark.slow
def test_prepare_prints_a_table_and_the_flags_to_use(tmp_path: Path) -> None:
    folder = tmp_path / "my data"
    done = run_cli("prepare", "digits/low", f"--data_dir={folder}")
    again = run_cli("prepare", "digits/low", f"--data_dir={folder}")
    # Standard output contains only the table, which is the same for a prepared dataset.
    note, _, table = again.stdout.partition("\n")
    assert mentions(note, "digits/low/1.0.0")
    assert table == done.stdout
    assert mentions(done.stdout.splitlines()[0], "split")
    words = shlex.split(done.stdout.splitlines()[-1])
    options = dict(word.split("=") for word in words if word.startswith("--"))
    assert options.keys() == {"--config.dataset.name", "--config.dataset.data_dir"}
    assert len(open_dataset(*("digits/low", "train"), options["--config.dataset.data_dir"])) > 600


def test_prepare_prints_absolute_data_dirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(root))
    done = run_cli("prepare", "digits/low", "--data_dir=data")
    assert f"--config.dataset.data_dir={tmp_path}/data\n" in done.stdout


def test_prepare_prints_usage_errors_on_one_line(tmp_path: Path) -> None:
    done = run_cli("prepare", "imagenet2012", f"--data_dir={tmp_path}", code=2)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert mentions(line, f"{tmp_path}/downloads/manual", "ILSVRC2012_img_train.tar")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command_suggested_by_open_dataset_converts_the_dataset(
    tmp_path: Path, digits_dir: str
) -> None:
    folder = tmp_path / "my data"
    # Unlike tfrecord, parquet is written without TensorFlow. TFDS 4.9.10 loses examples of parquet
    # shards with more than a hundred.
    builder = tfds.builder("digits/low", data_dir=folder, file_format="parquet")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=10))
    with pytest.raises(UserError) as caught:
        open_dataset("digits/low", "train", str(folder))
    command = r"python -m mixer_jax\.prepare digits/low(?: (?:'--[^']*'|--\S+))+"
    match = re.search(command, str(caught.value))
    assert match
    python, *argv = shlex.split(match[0])
    assert python == "python"
    done = subprocess.run([sys.executable, *argv], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    # It is converted example by example, and not generated again.
    total = sum(split.num_examples for split in builder.info.splits.values())
    assert mentions(done.stderr.decode(), f"{total}/{total}")
    converted, expected = (
        open_dataset("digits/low", "train", str(path)) for path in (folder, digits_dir)
    )
    assert list(converted.examples) == list(expected.examples)


@pytest.mark.slow
def test_prepare_names_the_library_of_a_dataset_that_needs_tensorflow(tmp_path: Path) -> None:
    builder = tfds.builder("digits/low", data_dir=tmp_path, file_format="parquet")
    builder.download_and_prepare()
    arguments = ("digits/low", f"--data_dir={tmp_path}")
    done = run_cli("prepare", *arguments, code=2, preamble=HIDE_TENSORFLOW)
    (line,) = done.stderr.splitlines()
    assert mentions(line, "digits/low/1.0.0", "parquet", "TensorFlow", "pip install tensorflow")
    assert not list(tmp_path.rglob("*array_record*"))


@pytest.mark.slow
def test_prepare_converts_a_folder_to_a_dataset_of_the_printed_keys(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    for index, image in enumerate(noise):
        folder = tmp_path / "my photos" / ("cat", "dog")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index}.png").write_bytes(cv2.imencode(".png", image)[1].tobytes())
    (tmp_path / "my photos" / "cat" / "note.txt").touch()
    arguments = (f"folder:{tmp_path}/my photos", "--name=pets", f"--data_dir={tmp_path}/my data")
    done = run_cli("prepare", *arguments)
    assert mentions(done.stderr, "1 .txt")
    header, cat, dog, skipped = (line.split() for line in done.stdout.splitlines()[:4])
    assert header == ["class", "train", "validation"]
    assert (cat, dog) == (["cat", "2", "1"], ["dog", "2", "1"])
    assert skipped == ["skipped", "0", "0"]
    words = shlex.split(done.stdout.splitlines()[-1])
    options = dict(word.split("=") for word in words if word.startswith("--"))
    source = open_dataset(
        options["--config.dataset.name"], "train", options["--config.dataset.data_dir"]
    )
    assert len(source) == 4
    prepared = run_cli("prepare", "pets", f"--data_dir={tmp_path}/my data")
    assert prepared.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]
    again = run_cli("prepare", *arguments, code=2)
    assert again.stdout == ""
    (line,) = again.stderr.splitlines()
    assert mentions(line, "--name", "pets", f"{tmp_path}/my data")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["folder:photos"], ["--name", "folder:photos"]),
        (["cifar10", "--name=mine"], ["--name", "mine", "cifar10"]),
        (["folder:missing", "--name=mine"], ["folder:missing"]),
        (["folder:photos", "--name=mine", "--data_dir=gs://bucket"], ["gs://bucket"]),
    ],
)
def test_usage_errors(arguments: list[str], parts: list[str]) -> None:
    with raises(UserError, *parts):
        prepare.main(arguments)


def write_blocking_download(data_dir: Path, members: dict[str, bytes]) -> Path:
    """Writes an ImageNet-21k download whose preparation blocks at the second of three classes.

    Returns:
        The pipe from which the preparation reads.
    """
    manual = data_dir / "downloads" / "manual"
    for synset in ("n00000003", "n00000001"):
        (manual / synset).mkdir(parents=True)
        for name, content in members.items():
            (manual / synset / name).write_bytes(content)
    os.mkfifo(manual / "n00000002.tar")
    return manual / "n00000002.tar"


@contextlib.contextmanager
def blocked_at(pipe: Path, process: subprocess.Popen[Any]) -> Iterator[None]:
    """Waits until the process reads the pipe, and keeps it blocked."""
    while True:
        assert process.poll() is None
        # Opening a pipe for writing fails until it has a reader.
        with contextlib.suppress(OSError):
            writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
            break
        time.sleep(0.01)
    yield
    os.close(writer)


@pytest.mark.slow
def test_killed_preparation_starts_over(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), np.uint8)
    images = {
        f"{i}.JPEG": cv2.imencode(".jpg", image)[1].tobytes() for i, image in enumerate(noise)
    }
    pipe = write_blocking_download(tmp_path, images | {"bad.JPEG": b"not an image"})
    command = [sys.executable, "-m", "mixer_jax.prepare", "imagenet21k", f"--data_dir={tmp_path}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with blocked_at(pipe, process):
        (unfinished,) = tmp_path.glob("imagenet21k/all/incomplete.*")
        second = run_cli("prepare", "imagenet21k", f"--data_dir={tmp_path}", code=2)
        (line,) = second.stderr.splitlines()
        assert mentions(line, "imagenet21k")
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert unfinished.exists()
    with raises(UserError, "imagenet21k", str(tmp_path), "python -m mixer_jax.prepare imagenet21k"):
        open_dataset("imagenet21k", "train", str(tmp_path))
    pipe.unlink()
    with tarfile.open(pipe, "w") as archive:
        for path in sorted((pipe.parent / "n00000001").iterdir()):
            archive.add(path, path.name)

    again = run_cli("prepare", "imagenet21k", f"--data_dir={tmp_path}")
    assert mentions(again.stderr, str(unfinished))
    # Undecodable files are counted.
    assert any(mentions(line, "3", "files") for line in again.stdout.splitlines())
    assert [path.name for path in unfinished.parent.iterdir()] == ["1.0.0"]
    source = open_dataset("imagenet21k", "train", str(tmp_path))
    assert source.class_names == ("n00000001", "n00000002", "n00000003")
    examples = [source.examples[index] for index in range(len(source))]
    expected = [((label,), image) for label in range(3) for image in images.values()]
    assert sorted((e["labels"], e["image"]) for e in examples) == sorted(expected)


@pytest.mark.slow
def test_ctrl_c_removes_temporary_files(tmp_path: Path) -> None:
    pipe = write_blocking_download(tmp_path, {})
    command = [sys.executable, "-m", "mixer_jax.prepare", "imagenet21k", f"--data_dir={tmp_path}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    with blocked_at(pipe, process):
        assert list(tmp_path.rglob("incomplete.*"))
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupt" in errors.splitlines()[-1].lower()
    assert "Traceback" not in errors
    assert not list(tmp_path.rglob("incomplete.*"))
    assert not list(tmp_path.rglob("*.lock"))
