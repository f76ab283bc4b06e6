"""Tests of preparation: written files, errors, and recovery after a kill."""

import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tensorflow_datasets as tfds

from mixer_jax.data import preparation
from mixer_jax.data.preparation import check_network, format_splits, preparation_lock
from mixer_jax.data.registry import open_dataset
from mixer_jax.data.tfds import prepare_tfds
from mixer_jax.errors import (
    DatasetNotPreparedError,
    DiskFullError,
    RunError,
    UserError,
    WriteFailureError,
)
from tests.helpers.messages import mentions, raises

SHARDS = 10
FAILURES = {
    "assertion": AssertionError("the file\nis missing"),
    "network": ConnectionError("no route to host"),
    "library": ImportError("no module named apache_beam"),
    "tensorflow": ModuleNotFoundError("pip install tensorflow", name="tensorflow"),
    "full_disk": RuntimeError("write() failed: No space left on device"),
    "failing_disk": OSError(errno.EIO, os.strerror(errno.EIO), "/disk/file"),
    "bug": KeyError("unknown"),
}


class MixerFailing(tfds.core.GeneratorBasedBuilder):
    """Dataset whose builder fails after the first example."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [tfds.core.BuilderConfig(name=name) for name in FAILURES]
    MANUAL_DOWNLOAD_INSTRUCTIONS = "get it\n  there"

    def _info(self) -> Any:
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        yield 0, {"text": ""}
        raise FAILURES[self.builder_config.name]


def dataset_dir(data_dir: Path, name: str = "digits/all/1.0.0") -> Path:
    return data_dir / name


def read(data_dir: Path | str, name: str = "digits") -> dict[str, list[tuple[Any, Any]]]:
    splits = {}
    for split in ("train", "test"):
        source = open_dataset(name, split, str(data_dir))
        examples = (source.examples[index] for index in range(len(source)))
        splits[split] = [(example["image"], example["labels"]) for example in examples]
    return splits


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Reads modification time and bytes of every file."""
    return {
        path.name: (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def tfrecord_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data_dir with digits in TFDS's default format and several shards."""
    folder = tmp_path_factory.mktemp("tfrecord")
    builder = tfds.builder("digits", data_dir=folder, file_format="tfrecord")
    config = tfds.download.DownloadConfig(num_shards=SHARDS)
    builder.download_and_prepare(download_config=config)
    return folder


@pytest.fixture
def unconverted(tfrecord_dir: Path, tmp_path: Path) -> Path:
    """A copy of it, with a space in its path."""
    return Path(shutil.copytree(tfrecord_dir, tmp_path / "my data"))


def test_conversion_keeps_examples_and_existing_files(unconverted: Path, digits_dir: str) -> None:
    before = snapshot(dataset_dir(unconverted))
    _, already_prepared = prepare_tfds("digits", str(unconverted))
    assert not already_prepared
    assert read(unconverted) == read(digits_dir)
    after = snapshot(dataset_dir(unconverted))
    before.pop("dataset_info.json")
    # Existing files stay untouched for processes that read them.
    assert before.items() <= after.items()
    added = after.keys() - before.keys() - {"dataset_info.json"}
    assert len(added) == 2 * SHARDS
    assert all(".array_record-" in name for name in added)
    assert tfds.builder("digits", data_dir=unconverted).info.file_format.value == "tfrecord"


def test_conversion_accepts_a_version(unconverted: Path, digits_dir: str) -> None:
    prepare_tfds("digits:1.0.0", str(unconverted))
    assert read(unconverted, "digits:1.0.0") == read(digits_dir)


def test_prepared_datasets_are_not_modified(unconverted: Path) -> None:
    prepare_tfds("digits", str(unconverted))
    before = snapshot(unconverted)
    _, already_prepared = prepare_tfds("digits", str(unconverted))
    assert already_prepared
    assert snapshot(unconverted) == before


def set_wrong_length(folder: Path) -> tuple[str, ...]:
    path = folder / "dataset_info.json"
    info = json.loads(path.read_text())
    info["splits"][1]["shardLengths"][7] = "37"
    path.write_text(json.dumps(info))
    return "digits-test.tfrecord-00007-of-00010", "36", "37", "dataset_info.json"


def remove_shard(folder: Path) -> tuple[str, ...]:
    path = folder / "digits-test.tfrecord-00007-of-00010"
    path.unlink()
    return (str(path),)


def damage_shard(folder: Path) -> tuple[str, ...]:
    path = folder / "digits-test.tfrecord-00007-of-00010"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return (path.name,)


@pytest.mark.parametrize("damage", [set_wrong_length, remove_shard, damage_shard])
def test_conversion_rejects_damaged_shards(damage: Any, unconverted: Path) -> None:
    expected = damage(dataset_dir(unconverted))
    before = snapshot(unconverted)
    with raises(UserError, *expected) as caught:
        prepare_tfds("digits", str(unconverted))
    assert "\n" not in str(caught.value)
    assert snapshot(unconverted) == before


@pytest.mark.slow
def test_killed_conversion_starts_over(unconverted: Path, digits_dir: str) -> None:
    temp_dir = dataset_dir(unconverted) / "incomplete.array_record"
    command = [sys.executable, "-m", "mixer_jax.prepare", "digits", f"--data_dir={unconverted}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(temp_dir.glob("*"))) < 3:
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 3 <= len(list(temp_dir.glob("*"))) < 2 * SHARDS
    with raises(DatasetNotPreparedError, "digits", "tfrecord"):
        read(unconverted)

    prepare_tfds("digits", str(unconverted))
    assert read(unconverted) == read(digits_dir)
    assert not temp_dir.exists()
    assert not list(unconverted.rglob("*.lock"))


def test_conversion_killed_between_renames_does_not_look_finished(
    unconverted: Path, digits_dir: str
) -> None:
    name = "digits-train.array_record-00000-of-00010"
    (dataset_dir(unconverted) / name).write_bytes(b"from another version of the data")
    with raises(DatasetNotPreparedError, "digits", "tfrecord"):
        read(unconverted)
    prepare_tfds("digits", str(unconverted))
    assert read(unconverted) == read(digits_dir)


def test_leftovers_of_killed_preparations_are_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = tmp_path / "digits" / "low"
    leftover = parent / "incomplete.AB12CD_1.0.0"
    other_version = parent / "incomplete.AB12CD_2.0.0"
    for folder in (leftover, other_version):
        folder.mkdir(parents=True)
        (folder / "bucket.tmp").write_bytes(bytes(1000))
    prepare_tfds("digits/low", str(tmp_path))
    assert sorted(path.name for path in parent.iterdir()) == ["1.0.0", other_version.name]
    errors = capsys.readouterr().err
    assert mentions(errors, str(leftover))
    assert not mentions(errors, str(other_version))


def test_concurrent_preparation_is_an_error(tmp_path: Path) -> None:
    with preparation_lock(tmp_path / "digits" / "all" / "1.0.0", "digits/all/1.0.0"):
        leftover = tmp_path / "digits" / "all" / "incomplete.AB12CD_1.0.0"
        leftover.mkdir()
        with raises(UserError, "digits/all/1.0.0", str(tmp_path / "digits" / "all")):
            prepare_tfds("digits", str(tmp_path))
        assert leftover.exists()
        # Other configs have their own lock.
        prepare_tfds("digits/low", str(tmp_path))
    prepare_tfds("digits", str(tmp_path))
    assert not leftover.exists()


@pytest.mark.parametrize("manual", [None, "elsewhere"])
def test_missing_manual_downloads_are_an_error_with_instructions(
    manual: str | None, tmp_path: Path
) -> None:
    folder = tmp_path / (manual or "data/downloads/manual")
    # The instructions of the dataset are on one line.
    with raises(UserError, "mixer_failing", str(folder), "--manual_dir", "get it there"):
        prepare_tfds(
            "mixer_failing", str(tmp_path / "data"), str(tmp_path / manual) if manual else ""
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failure", FAILURES)
def test_builder_failures_are_one_line_errors_without_leftovers(
    failure: str, tmp_path: Path
) -> None:
    (tmp_path / "manual").mkdir()
    (tmp_path / "manual" / "file").touch()
    disk_errors = {"full_disk": DiskFullError, "failing_disk": WriteFailureError}
    expected = {"bug": RunError, **disk_errors}.get(failure, UserError)
    with pytest.raises(expected) as caught:
        prepare_tfds(f"mixer_failing/{failure}", str(tmp_path), str(tmp_path / "manual"))
    message = str(caught.value)
    assert mentions(message, f"mixer_failing/{failure}")
    assert " ".join(str(FAILURES[failure]).split()) in message
    assert "\n" not in message
    is_hinted = failure not in ("bug", "tensorflow", *disk_errors)
    assert mentions(message, f"{tmp_path}/manual") == is_hinted
    assert not list(tmp_path.rglob("incomplete*"))
    assert not list(tmp_path.rglob("*.lock"))


@pytest.mark.parametrize("name", ["synthetic", "folder:/somewhere"])
def test_synthetic_data_and_folders_need_no_preparation(name: str, tmp_path: Path) -> None:
    with raises(UserError, name):
        prepare_tfds(name, str(tmp_path))


@pytest.mark.parametrize(
    ("name", "hint"),
    [("cifar01", "cifar10"), ("imagenet-21k", "imagenet21k")],
)
def test_misspelled_names_get_a_suggestion(name: str, hint: str, tmp_path: Path) -> None:
    with raises(UserError, name, hint) as caught:
        prepare_tfds(name, str(tmp_path))
    assert "\n" not in str(caught.value)
    # A preparation has no configuration.
    assert "--config" not in str(caught.value)


def test_remote_data_dirs_are_rejected() -> None:
    with raises(UserError, "--data_dir", "gs://bucket/data"):
        prepare_tfds("digits", "gs://bucket/data")


def test_unwritable_data_dirs_are_an_error(tmp_path: Path) -> None:
    # A file in place of a folder also stops the root user of a container.
    (tmp_path / "digits").touch()
    with raises(UserError, "digits", f"{tmp_path}/digits", os.strerror(errno.ENOTDIR)):
        prepare_tfds("digits", str(tmp_path))


def test_format_splits_describes_the_files_on_disk(unconverted: Path) -> None:
    builder, _ = prepare_tfds("digits", str(unconverted))
    lines = format_splits(builder).splitlines()
    (train,) = (line for line in lines if line.startswith("train "))
    (test,) = (line for line in lines if line.startswith("test "))
    size = sum(p.stat().st_size for p in Path(builder.data_path).glob("*-train.array_record-*"))
    assert mentions(train, "1437", "10", str(size))
    assert mentions(test, "360", "10")
    others = "\n".join(line for line in lines if line not in (train, test))
    assert re.search(r"\bclasses\b\W*10\b", others)
    assert mentions(others, str(builder.data_path))


def test_missing_network_is_an_error_before_the_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(host: str, port: None) -> list[str]:
        if host == "known.invalid":
            return [host]
        raise socket.gaierror(socket.EAI_NONAME, "unknown host")

    monkeypatch.setattr(preparation.socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(preparation.urllib.request, "getproxies", dict)
    with raises(UserError, "digits", "first.invalid", "second.invalid"):
        check_network("digits", ["https://first.invalid/x", "http://second.invalid/y"])
    check_network("digits", ["https://first.invalid/x", "https://known.invalid/y"])
    check_network("digits", [])
    monkeypatch.setattr(preparation.urllib.request, "getproxies", lambda: {"https": "proxy"})
    check_network("digits", ["https://first.invalid/x"])


def test_downloads_of_other_datasets_do_not_replace_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def getaddrinfo(host: str, port: None) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "unknown host")

    def download_and_prepare(self: Any, **arguments: Any) -> None:
        raise OSError("TFDS was called")

    monkeypatch.setattr(preparation.socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(preparation.urllib.request, "getproxies", dict)
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", download_and_prepare)
    builder = tfds.builder("cifar10", data_dir=tmp_path)
    ((url, info),) = builder.url_infos.items()
    downloads = tmp_path / "downloads"
    (downloads / "mnist").mkdir(parents=True)
    (downloads / "manual").mkdir()
    (downloads / "mnist" / "train.gz").touch()
    (downloads / "some_other_file.zip").touch()
    old_layout = tfds.core.download.resource.get_dl_fname(url, info.checksum)
    with raises(UserError, "cifar10", "www.cs.toronto.edu"):
        prepare_tfds("cifar10", str(tmp_path))
    # Neither do the traces of a download that was interrupted.
    unfinished = downloads / "cifar10" / f"{old_layout}.tmp.0123"
    unfinished.mkdir(parents=True)
    (unfinished / info.filename).write_bytes(b"half of the file")
    (downloads / "cifar10" / f"{old_layout}.INFO.json").write_text("{}")
    with raises(UserError, "cifar10", "www.cs.toronto.edu"):
        prepare_tfds("cifar10", str(tmp_path))
    for path in (f"cifar10/{old_layout}", old_layout, f"manual/{info.filename}"):
        (downloads / path).parent.mkdir(exist_ok=True)
        (downloads / path).touch()
        with raises(UserError, "TFDS was called"):
            prepare_tfds("cifar10", str(tmp_path))
        (downloads / path).unlink()
