"""Tests of conversion: the same examples and batches, byte-identical files, nothing unfinished."""

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from mixer_jax.data import conversion
from mixer_jax.data.conversion import convert_dataset, format_counts
from mixer_jax.data.preparation import UNDECODABLE, preparation_lock
from mixer_jax.data.registry import open_dataset
from mixer_jax.data.source import Source
from mixer_jax.errors import DiskFullError, UserError
from tests.helpers.batches import AUGMENTED, assert_identical, small_train_batches
from tests.helpers.file_size_limit import file_size_limit
from tests.helpers.images import encode
from tests.helpers.messages import mentions, raises
from tests.helpers.no_tensorflow import HIDE_TENSORFLOW

CLASSES = ("bird house", "cat", "dög")
SPLITS = {"train": 6, "validation": 2}


def write_folder(root: Path) -> Path:
    """Writes an image folder with three classes, in several formats."""
    rng = np.random.default_rng(0)
    for split, count in SPLITS.items():
        for name in CLASSES:
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                file_format = ("JPEG", "PNG")[number % 2]
                image = rng.integers(0, 256, (12, 16, 3), np.uint8)
                path = folder / f"{number}.{file_format.lower()}"
                path.write_bytes(encode(image, file_format))
    return root


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "photos")


def convert(photos: Path, data_dir: Path, name: str = "my_photos") -> conversion.Conversion:
    return convert_dataset(f"folder:{photos}", name, str(data_dir))


def files_of(folder: Path) -> dict[str, bytes]:
    """Reads every file in a folder, by its relative path."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def examples_of(source: Source) -> list[Any]:
    return [source.examples[index] for index in range(len(source))]


def test_conversion_keeps_images_labels_names_and_order(photos: Path, tmp_path: Path) -> None:
    convert(photos, tmp_path / "data")
    for split in SPLITS:
        original = open_dataset(f"folder:{photos}", split)
        converted = open_dataset("my_photos", split, str(tmp_path / "data"))
        assert converted.class_names == CLASSES == original.class_names
        assert not converted.multi_label
        assert len(converted) == 3 * SPLITS[split]
        for before, after in zip(examples_of(original), examples_of(converted), strict=True):
            assert (before["image"], before["labels"]) == (after["image"], after["labels"])
            # The path relative to the folder.
            assert after["name"] == f"my_photos {split}: " + os.path.relpath(before["name"], photos)


def test_batches_are_those_of_the_original(photos: Path, tmp_path: Path) -> None:
    convert(photos, tmp_path / "data")
    original, converted = (
        small_train_batches(3, 9, preprocess=AUGMENTED, examples=source.examples)
        for source in (
            open_dataset(f"folder:{photos}", "train"),
            open_dataset("my_photos", "train", str(tmp_path / "data")),
        )
    )
    assert_identical(original, converted)


def test_tfds_reads_the_result_without_this_package(photos: Path, tmp_path: Path) -> None:
    convert(photos, tmp_path)
    builder = tfds.builder_from_directory(tmp_path / "my_photos" / "1.0.0")
    (example, *_) = builder.as_data_source(split="validation[:1]")
    assert example["image"].shape == (12, 16, 3)
    assert builder.info.features["label"].names == [*CLASSES]
    assert builder.info.supervised_keys == ("image", "label")


def test_several_labels_per_image_become_a_sequence(photos: Path, tmp_path: Path) -> None:
    rows = [("train/cat/0.jpeg", "cat|dög"), ("train/cat/1.png", ""), ("train/dög/0.jpeg", "dög")]
    lines = ["path,labels,split", *(f"{path},{labels},train" for path, labels in rows)]
    lines.append("validation/cat/0.jpeg,cat,validation")
    (photos / "labels.csv").write_text("\n".join(lines))
    result = convert_dataset(f"manifest:{photos}/labels.csv", "my_photos", str(tmp_path / "data"))
    assert result.splits["train"].examples_per_class.tolist() == [1, 2]
    original = open_dataset(f"manifest:{photos}/labels.csv", "train")
    converted = open_dataset("my_photos", "train", str(tmp_path / "data"))
    assert converted.multi_label
    assert converted.class_names == ("cat", "dög")
    assert sorted(example["labels"] for example in examples_of(converted)) == [(), (0, 1), (1,)]
    for before, after in zip(examples_of(original), examples_of(converted), strict=True):
        assert (before["image"], before["labels"]) == (after["image"], after["labels"])
        assert after["name"] == f"my_photos train: {os.path.relpath(before['name'], photos)}"


def test_held_out_images_become_a_split(tmp_path: Path) -> None:
    photos = write_folder(tmp_path / "photos") / "train"
    convert(photos, tmp_path / "data")
    for split, count in (("train", 15), ("validation", 3)):
        original = open_dataset(f"folder:{photos}", split)
        converted = open_dataset("my_photos", split, str(tmp_path / "data"))
        assert len(converted) == count
        assert [e["image"] for e in examples_of(original)] == [
            e["image"] for e in examples_of(converted)
        ]


@pytest.mark.parametrize("shard_bytes", [2**30, 1_500])
def test_the_same_images_become_the_same_files(
    shard_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "_SHARD_BYTES", shard_bytes)
    written = []
    for place, num_threads in (("here", 1), ("there", 8)):
        monkeypatch.setattr(os, "cpu_count", lambda count=num_threads: count)
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        write_folder(Path("photos"))
        convert_dataset("folder:photos", "my_photos", "data")
        written.append(files_of(Path("data")))
    assert written[0] == written[1]
    shards = [path for path in written[0] if "my_photos-train" in path]
    assert (len(shards) > 3) == (shard_bytes < 2**30)
    assert all(path.endswith(f"-of-{len(shards):05d}") for path in shards)
    converted = open_dataset("my_photos", "train", "data")
    original = open_dataset("folder:photos", "train")
    assert [e["image"] for e in examples_of(original)] == [
        e["image"] for e in examples_of(converted)
    ]


def test_undecodable_images_are_left_out_and_counted(photos: Path, tmp_path: Path) -> None:
    (photos / "train/cat/7.jpg").write_bytes(b"not an image")
    (photos / "train/cat/8.jpg").symlink_to("missing")
    (photos / "validation/cat/2.png").write_bytes(b"")
    (photos / "validation/cat/notes.txt").write_text("")
    result = convert(photos, tmp_path / "data")
    counts = {name: split.examples_per_class.tolist() for name, split in result.splits.items()}
    assert counts == {"train": [6, 6, 6], "validation": [2, 2, 2]}
    assert [split.num_skipped for split in result.splits.values()] == [2, 1]
    assert any(mentions(note, "1 .txt") for note in result.notes)
    assert len(open_dataset("my_photos", "train", str(tmp_path / "data"))) == 18
    with open(result.builder.data_path / UNDECODABLE, newline="") as file:
        rows = dict(csv.reader(file, delimiter="\t"))
    assert rows.keys() == {"train/cat/7.jpg", "train/cat/8.jpg", "validation/cat/2.png"}
    assert all(rows.values())
    header, *lines = format_counts(result).splitlines()
    assert header.split() == ["class", "train", "validation"]
    assert [line.rsplit(maxsplit=2) for line in lines] == [
        *([name, "6", "2"] for name in CLASSES),
        ["skipped", "2", "1"],
    ]


def test_counts_of_many_classes_are_abbreviated(photos: Path, tmp_path: Path) -> None:
    result = convert(photos, tmp_path)
    counts = np.arange(5, 1005)
    splits = {"train": conversion.ConvertedSplit(counts, 1234)}
    many = result._replace(splits=splits, class_names=tuple(map(str, counts)))
    _, *lines = format_counts(many).splitlines()
    assert [line.split()[-1] for line in lines] == ["5", "1,004", "1,234"]


def test_a_split_without_readable_images_is_an_error(photos: Path, tmp_path: Path) -> None:
    for path in (photos / "validation").rglob("*.*"):
        path.write_bytes(b"not an image")
    with raises(UserError, "validation", "6"):
        convert(photos, tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("My photos", "my_photos"),
        ("my/photos", "my_photos"),
        ("2024", ""),
        ("größe", ""),
        ("../x", "x"),
        ("cifar10", "my_cifar10"),
        ("digits", "my_digits"),
        ("synthetic", "my_synthetic"),
    ],
)
def test_invalid_names_are_an_error(name: str, hint: str, photos: Path, tmp_path: Path) -> None:
    with raises(UserError, "--name", name, *([hint] if hint else [])):
        convert(photos, tmp_path / "data", name)
    assert not (tmp_path / "data").exists()


def test_an_existing_dataset_is_not_replaced(photos: Path, tmp_path: Path) -> None:
    convert(photos, tmp_path)
    before = files_of(tmp_path)
    with raises(UserError, "--name", "my_photos", str(tmp_path)):
        convert(photos, tmp_path)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("name", ["cat ", " cat"])
def test_class_names_that_tfds_cannot_store_are_an_error(
    name: str, photos: Path, tmp_path: Path
) -> None:
    for split in SPLITS:
        (photos / split / "cat").rename(photos / split / name)
    with raises(UserError, repr(name)):
        convert(photos, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_an_interruption_leaves_nothing_behind(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(encoded: bytes) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "find_decoding_error", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(photos, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_leftovers_of_a_killed_conversion_are_removed(photos: Path, tmp_path: Path) -> None:
    leftover = tmp_path / "my_photos" / "incomplete.0123abcd_1.0.0"
    leftover.mkdir(parents=True)
    (leftover / "dataset_info.json").write_text("{}")
    with raises(UserError, "my_photos"):
        open_dataset("my_photos", "train", str(tmp_path))
    convert(photos, tmp_path)
    assert [path.name for path in (tmp_path / "my_photos").iterdir()] == ["1.0.0"]


def test_two_conversions_to_one_name_are_an_error(photos: Path, tmp_path: Path) -> None:
    with (
        preparation_lock(tmp_path / "my_photos" / "1.0.0", "my_photos/1.0.0"),
        raises(UserError, "my_photos/1.0.0", str(tmp_path / "my_photos")),
    ):
        convert(photos, tmp_path)
    convert(photos, tmp_path)


def test_a_full_disk_is_an_error_that_leaves_nothing_behind(photos: Path, tmp_path: Path) -> None:
    with file_size_limit(5_000), raises(DiskFullError, "my_photos", "File too large"):
        convert(photos, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_an_unwritable_folder_is_an_error(photos: Path, tmp_path: Path) -> None:
    # A file in place of a folder also stops the root user of a container.
    (tmp_path / "data").touch()
    with raises(UserError, "my_photos", f"{tmp_path}/data"):
        convert(photos, tmp_path / "data")


@pytest.mark.slow
def test_conversion_needs_no_tensorflow(photos: Path, tmp_path: Path) -> None:
    code = f"""{HIDE_TENSORFLOW}
from mixer_jax.data.conversion import convert_dataset
from mixer_jax.data.registry import open_dataset
convert_dataset("folder:{photos}", "my_photos", "{tmp_path}/data")
assert len(open_dataset("my_photos", "train", "{tmp_path}/data").examples[0]["image"]) > 100
"""
    subprocess.run([sys.executable, "-c", code], check=True)
