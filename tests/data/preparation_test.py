"""Tests of preparing and converting: what is written, what is refused, and what a kill leaves."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tensorflow_datasets as tfds

from mixer_jax.data.preparation import format_splits, preparation_lock
from mixer_jax.data.registry import open_dataset
from mixer_jax.data.tfds import find_builder, prepare_tfds
from mixer_jax.errors import DatasetNotPreparedError, RunError, UserError
from tests.helpers.messages import mentions, raises

SHARDS = 10
FAILURES = {
    "assertion": AssertionError("the file\nis missing"),
    "network": ConnectionError("no route to host"),
    "library": ImportError("no module named apache_beam"),
    "disk": RuntimeError("write() failed: No space left on device"),
    "bug": KeyError("unknown"),
}


class MixerFailing(tfds.core.GeneratorBasedBuilder):
    """A data set whose code fails after its first example."""

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


def folder_of(data_dir: Path, name: str = "digits/all/1.0.0") -> Path:
    return data_dir / name


def read(data_dir: Path | str, name: str = "digits") -> dict[str, list[tuple[Any, Any]]]:
    splits = {}
    for split in ("train", "test"):
        source = open_dataset(name, split, str(data_dir))
        examples = (source.examples[index] for index in range(len(source)))
        splits[split] = [(example["image"], example["labels"]) for example in examples]
    return splits


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Returns time of change and bytes of every file."""
    return {
        path.name: (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def as_tfrecord(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data_dir with digits as TFDS writes it by default, but in many shards."""
    folder = tmp_path_factory.mktemp("tfrecord")
    builder = tfds.builder("digits", data_dir=folder, file_format="tfrecord")
    config = tfds.download.DownloadConfig(num_shards=SHARDS)
    builder.download_and_prepare(download_config=config)
    return folder


@pytest.fixture
def unconverted(as_tfrecord: Path, tmp_path: Path) -> Path:
    """A copy of it, in a folder whose name has a space."""
    return Path(shutil.copytree(as_tfrecord, tmp_path / "my data"))


def test_a_conversion_changes_nothing_but_the_format(unconverted: Path, digits_dir: str) -> None:
    before = contents(folder_of(unconverted))
    _, was_there = prepare_tfds("digits", str(unconverted))
    assert not was_there
    assert read(unconverted) == read(digits_dir)
    after = contents(folder_of(unconverted))
    before.pop("dataset_info.json")
    # What was there stays for those who read it, untouched.
    assert before.items() <= after.items()
    added = after.keys() - before.keys() - {"dataset_info.json"}
    assert len(added) == 2 * SHARDS
    assert all(".array_record-" in name for name in added)
    assert tfds.builder("digits", data_dir=unconverted).info.file_format.value == "tfrecord"


def test_a_converted_version_may_be_named(unconverted: Path, digits_dir: str) -> None:
    prepare_tfds("digits:1.0.0", str(unconverted))
    assert read(unconverted, "digits:1.0.0") == read(digits_dir)


def test_what_is_prepared_is_not_touched(unconverted: Path) -> None:
    prepare_tfds("digits", str(unconverted))
    before = contents(unconverted)
    _, was_there = prepare_tfds("digits", str(unconverted))
    assert was_there
    assert contents(unconverted) == before


def fake_length(folder: Path) -> tuple[str, ...]:
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


@pytest.mark.parametrize("damage", [fake_length, remove_shard, damage_shard])
def test_what_is_wrong_with_a_shard_is_said(damage: Any, unconverted: Path) -> None:
    expected = damage(folder_of(unconverted))
    before = contents(unconverted)
    with raises(UserError, *expected) as caught:
        prepare_tfds("digits", str(unconverted))
    assert "\n" not in str(caught.value)
    assert contents(unconverted) == before


def test_a_killed_conversion_begins_again(unconverted: Path, digits_dir: str) -> None:
    draft = folder_of(unconverted) / "incomplete.array_record"
    command = [sys.executable, "-m", "mixer_jax.prepare", "digits", f"--data_dir={unconverted}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(draft.glob("*"))) < 3:
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 3 <= len(list(draft.glob("*"))) < 2 * SHARDS
    with raises(DatasetNotPreparedError, "digits", "tfrecord"):
        read(unconverted)

    prepare_tfds("digits", str(unconverted))
    assert read(unconverted) == read(digits_dir)
    assert not draft.exists()
    assert not list(unconverted.rglob("*.lock"))


def test_a_conversion_killed_while_it_renames_is_not_taken_for_finished(
    unconverted: Path, digits_dir: str
) -> None:
    name = "digits-train.array_record-00000-of-00010"
    (folder_of(unconverted) / name).write_bytes(b"from another version of the data")
    with raises(DatasetNotPreparedError, "digits", "tfrecord"):
        read(unconverted)
    prepare_tfds("digits", str(unconverted))
    assert read(unconverted) == read(digits_dir)


def test_what_killed_preparations_left_is_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = tmp_path / "digits" / "low"
    left, other_version = parent / "incomplete.AB12CD_1.0.0", parent / "incomplete.AB12CD_2.0.0"
    for folder in (left, other_version):
        folder.mkdir(parents=True)
        (folder / "bucket.tmp").write_bytes(bytes(1000))
    prepare_tfds("digits/low", str(tmp_path))
    assert sorted(path.name for path in parent.iterdir()) == ["1.0.0", other_version.name]
    told = capsys.readouterr().err
    assert mentions(told, str(left))
    assert not mentions(told, str(other_version))


def test_only_one_prepares_at_a_time(tmp_path: Path) -> None:
    with preparation_lock(find_builder("digits", str(tmp_path))):
        left = tmp_path / "digits" / "all" / "incomplete.AB12CD_1.0.0"
        left.mkdir()
        with raises(UserError, "digits/all/1.0.0", str(tmp_path / "digits" / "all")):
            prepare_tfds("digits", str(tmp_path))
        assert left.exists()
        # Of another configuration it is none of their business.
        prepare_tfds("digits/low", str(tmp_path))
    prepare_tfds("digits", str(tmp_path))
    assert not left.exists()


@pytest.mark.parametrize("manual", [None, "elsewhere"])
def test_a_missing_manual_download_is_asked_for(manual: str | None, tmp_path: Path) -> None:
    folder = tmp_path / (manual or "data/downloads/manual")
    # With the instructions of the data set, on one line.
    with raises(UserError, "mixer_failing", str(folder), "--manual_dir", "get it there"):
        prepare_tfds(
            "mixer_failing", str(tmp_path / "data"), str(tmp_path / manual) if manual else ""
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failure", FAILURES)
def test_failures_are_one_line_and_leave_nothing(failure: str, tmp_path: Path) -> None:
    (tmp_path / "manual").mkdir()
    (tmp_path / "manual" / "file").touch()
    expected = RunError if failure == "bug" else UserError
    with pytest.raises(expected) as caught:
        prepare_tfds(f"mixer_failing/{failure}", str(tmp_path), str(tmp_path / "manual"))
    message = str(caught.value)
    assert mentions(message, f"mixer_failing/{failure}")
    assert " ".join(str(FAILURES[failure]).split()) in message
    assert "\n" not in message
    assert mentions(message, f"{tmp_path}/manual") == (failure not in ("bug", "disk"))
    assert not list(tmp_path.rglob("incomplete*"))
    assert not list(tmp_path.rglob("*.lock"))


@pytest.mark.parametrize("name", ["synthetic", "folder:/somewhere"])
def test_some_data_need_no_preparation(name: str, tmp_path: Path) -> None:
    with raises(UserError, name):
        prepare_tfds(name, str(tmp_path))


@pytest.mark.parametrize(
    ("name", "hint"),
    [("cifar01", "cifar10"), ("imagenet-21k", "imagenet21k")],
)
def test_names_are_suggested(name: str, hint: str, tmp_path: Path) -> None:
    with raises(UserError, name, hint) as caught:
        prepare_tfds(name, str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_remote_folder_is_refused() -> None:
    with raises(UserError, "--data_dir", "gs://bucket/data"):
        prepare_tfds("digits", "gs://bucket/data")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    # A file in its way, which stops even the superuser who runs the tests in a container.
    (tmp_path / "digits").touch()
    with raises(UserError, "digits", f"{tmp_path}/digits", os.strerror(errno.ENOTDIR)):
        prepare_tfds("digits", str(tmp_path))


def test_the_table_tells_what_is_on_disk(unconverted: Path) -> None:
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
