"""Tests of the ImageNet-21k builder: every layout results in the same data, byte for byte."""

import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np
import pytest

from mixer_jax.data.preparation import UNDECODABLE
from mixer_jax.data.registry import open_dataset
from mixer_jax.data.tfds import prepare_tfds
from mixer_jax.errors import UserError
from tests.helpers.messages import mentions

# Unsorted, as in the real archive.
SYNSETS = ("n02000002", "n00000001", "n00500003")
EMPTY = "n00000000"
ARCHIVE = "fall11_whole.tar"
# Names of test files whose SHA-256 is in the first hundredth.
HELD_OUT = {
    "n00500003/n00500003_59.JPEG",
}
Files = dict[str, dict[str, bytes]]


class Prepared(NamedTuple):
    """Contents of a dataset: class and bytes by file name, and the undecodable files."""

    examples: dict[str, tuple[str, bytes]]
    class_names: list[str]
    undecodable: dict[str, str]


def jpeg(seed: int, size: int = 8) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    return bytes(cv2.imencode(".jpg", noise)[1])


def bad_files() -> dict[str, bytes]:
    encoded = jpeg(0, 64)
    half = encoded[: len(encoded) // 2]
    return {"text.JPEG": b"not an image", "empty.JPEG": b"", "half.JPEG": half}


@pytest.fixture(scope="module")
def files() -> Files:
    """A hundred images per class, three bad files, and a class with only a bad file."""
    good = {
        synset: {f"{synset}_{index}.JPEG": jpeg(1000 * number + index) for index in range(100)}
        for number, synset in enumerate(SYNSETS)
    }
    good[SYNSETS[0]] |= bad_files()
    return good | {EMPTY: {"bad.JPEG": b"not an image"}}


def make_archive(*members: tuple[str, bytes], mode: Literal["w", "w:gz"] = "w") -> bytes:
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, BytesIO(content))
    return buffer.getvalue()


def write_archive_of_archives(files: Files, folder: Path) -> None:
    inner = [(f"{synset}.tar", make_archive(*members.items())) for synset, members in files.items()]
    (folder / ARCHIVE).write_bytes(make_archive(*inner))


def write_compressed_archive(files: Files, folder: Path) -> None:
    """Writes a variant with a folder in the archive, and another one in each class archive."""
    inner = [
        (
            f"winter21_whole/{synset}.tar",
            make_archive(*((f"./{synset}/{name}", content) for name, content in members.items())),
        )
        for synset, members in files.items()
    ]
    (folder / "winter21_whole.tar.gz").write_bytes(make_archive(*inner, mode="w:gz"))


def write_archives(files: Files, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for synset, members in files.items():
        (folder / f"{synset}.tar").write_bytes(make_archive(*members.items()))


def write_folders(files: Files, folder: Path) -> None:
    for synset, members in files.items():
        (folder / synset).mkdir(parents=True)
        for name, content in members.items():
            (folder / synset / name).write_bytes(content)


def write_nested(files: Files, folder: Path) -> None:
    write_folders(files, folder / "imagenet21k" / "images")


def write_mixture(files: Files, folder: Path) -> None:
    """Writes one class partially unpacked next to its archive, one unpacked, two as archives."""
    rest = dict(files)
    unpacked = {SYNSETS[1]: rest.pop(SYNSETS[1])}
    partial = {SYNSETS[2]: dict(list(rest[SYNSETS[2]].items())[:7])}
    write_archives(rest, folder / "imagenet21k")
    write_folders(unpacked | partial, folder / "imagenet21k")


def read(name: str, data_dir: Path, split: str = "train") -> Prepared:
    source = open_dataset(name, split, str(data_dir))
    examples = {}
    for index in range(len(source)):
        example = source.examples[index]
        (label,) = example["labels"]
        file_name = example["name"].rpartition(": ")[2]
        examples[file_name] = (source.class_names[label], bytes(example["image"]))
    assert len(examples) == len(source)
    (table,) = Path(data_dir, "imagenet21k").rglob(UNDECODABLE)
    undecodable = dict(row.split("\t") for row in table.read_text().splitlines())
    return Prepared(examples, list(source.class_names), undecodable)


def prepare(name: str, files: Files, folder: Path, write: Callable[[Files, Path], None]) -> Path:
    """Prepares `files` from the default folder of manual downloads; returns the data_dir."""
    manual = folder / "downloads" / "manual"
    manual.mkdir(parents=True)
    write(files, manual)
    prepare_tfds(name, str(folder))
    return folder


def assert_contains(prepared: Prepared, files: Files) -> None:
    """Asserts that all good files are unchanged, and the bad ones are listed."""
    expected = {
        f"{synset}/{name}": (synset, content)
        for synset, members in files.items()
        for name, content in members.items()
    }
    bad = {f"{EMPTY}/bad.JPEG", *(f"{SYNSETS[0]}/{name}" for name in bad_files())}
    assert prepared.undecodable.keys() == bad
    assert all(prepared.undecodable.values())
    assert prepared.examples == {k: v for k, v in expected.items() if k not in bad}
    assert prepared.class_names == sorted(files)


@pytest.fixture(scope="module")
def prepared_dir(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data_dir prepared from one archive of archives."""
    return prepare(
        "imagenet21k", files, tmp_path_factory.mktemp("prepared"), write_archive_of_archives
    )


@pytest.mark.parametrize(
    "write",
    [
        write_archive_of_archives,
        write_compressed_archive,
        write_archives,
        write_folders,
        write_nested,
        write_mixture,
    ],
)
def test_every_layout_results_in_the_same_dataset(
    write: Callable[[Files, Path], None], files: Files, tmp_path: Path, prepared_dir: Path
) -> None:
    prepared = read("imagenet21k", prepare("imagenet21k", files, tmp_path, write))
    assert_contains(prepared, files)
    # The order, by hashes, is the same too.
    assert list(prepared.examples) == list(read("imagenet21k", prepared_dir).examples)


def test_slices_contain_all_classes(prepared_dir: Path) -> None:
    last = read("imagenet21k", prepared_dir, "train[90%:]")
    first = read("imagenet21k", prepared_dir, "train[:90%]")
    assert {synset for synset, _ in last.examples.values()} == set(SYNSETS)
    assert (len(first.examples), len(last.examples)) == (270, 30)


def test_held_out_selects_one_percent_by_file_name(
    files: Files, prepared_dir: Path, tmp_path: Path
) -> None:
    prepare("imagenet21k/held_out", files, tmp_path, write_archives)
    train = read("imagenet21k/held_out", tmp_path, "train")
    validation = read("imagenet21k/held_out", tmp_path, "validation")
    assert train.examples.keys().isdisjoint(validation.examples)
    assert train.examples | validation.examples == read("imagenet21k", prepared_dir).examples
    assert train.undecodable == read("imagenet21k", prepared_dir).undecodable
    # Only the file name matters, so that other versions of the data have the same split.
    assert set(validation.examples) == HELD_OUT


def test_files_with_the_same_name_are_renamed(tmp_path: Path) -> None:
    first, second, third = (jpeg(seed) for seed in range(3))
    manual = tmp_path / "manual"
    manual.mkdir()
    members = [("a", first), ("a#2", second), ("./a", third)]
    (manual / f"{SYNSETS[0]}.tar").write_bytes(make_archive(*members))
    prepare_tfds("imagenet21k", str(tmp_path), str(manual))
    names = {"a": first, "a#2": second, "a#3": third}
    expected = {f"{SYNSETS[0]}/{name}": (SYNSETS[0], image) for name, image in names.items()}
    assert read("imagenet21k", tmp_path).examples == expected


def test_file_names_may_be_invalid_unicode(tmp_path: Path) -> None:
    folder = tmp_path / "manual" / SYNSETS[0]
    folder.mkdir(parents=True)
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.JPEG")).write_bytes(jpeg(0))
    prepare_tfds("imagenet21k", str(tmp_path), str(tmp_path / "manual"))
    assert list(read("imagenet21k", tmp_path).examples) == [f"{SYNSETS[0]}/\ufffd.JPEG"]


def test_imagenet_1k_archives_are_ignored(files: Files, tmp_path: Path) -> None:
    def write(files: Files, folder: Path) -> None:
        write_archive_of_archives(files, folder)
        (folder / ARCHIVE).rename(folder / "ILSVRC2012_img_train.tar")
        write_archive_of_archives({SYNSETS[0]: {"a": jpeg(0)}}, folder)

    prepared = read("imagenet21k", prepare("imagenet21k", files, tmp_path, write))
    assert list(prepared.examples) == [f"{SYNSETS[0]}/a"]


def test_empty_class_archives_are_classes(tmp_path: Path) -> None:
    def write(files: Files, folder: Path) -> None:
        inner = [("n00000001.tar", b""), ("n00000002.tar", make_archive(("a", jpeg(0))))]
        (folder / ARCHIVE).write_bytes(make_archive(*inner, ("n00000003.tar", make_archive())))

    prepared = read("imagenet21k", prepare("imagenet21k", {}, tmp_path, write))
    assert prepared.class_names == ["n00000001", "n00000002", "n00000003"]
    assert list(prepared.examples) == ["n00000002/a"]


def error_of(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        prepare_tfds("imagenet21k", str(folder / "data"), str(folder / "manual"))
    assert "\n" not in str(caught.value)
    assert not list(folder.rglob("incomplete*"))
    return str(caught.value)


def test_a_folder_without_imagenet21k_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "manual" / "cats").mkdir(parents=True)
    (tmp_path / "manual" / "other.tar").write_bytes(make_archive(("cat.jpg", jpeg(0))))
    message = error_of(tmp_path)
    assert mentions(message, f"{tmp_path}/manual", "ImageNet-21k")
    # The supported layouts.
    assert mentions(message, ".tar", ".tar.gz", "nXXXXXXXX.tar", "nXXXXXXXX")


def test_two_downloads_are_ambiguous(files: Files, tmp_path: Path) -> None:
    manual = tmp_path / "manual"
    manual.mkdir()
    write_archive_of_archives(files, manual)
    write_compressed_archive(files, manual)
    message = error_of(tmp_path)
    assert mentions(message, ARCHIVE, "winter21_whole.tar.gz", f"{manual}/imagenet21k")


@pytest.mark.parametrize(
    "write", [write_archive_of_archives, write_compressed_archive, write_archives]
)
def test_truncated_archives_are_an_error(
    write: Callable[[Files, Path], None], files: Files, tmp_path: Path
) -> None:
    manual = tmp_path / "manual"
    manual.mkdir()
    write(files, manual)
    largest = max(manual.iterdir(), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    assert mentions(error_of(tmp_path), str(largest))


def test_duplicate_class_archives_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "manual").mkdir()
    inner = [(f"{SYNSETS[0]}.tar", make_archive(("a", jpeg(0))))] * 2
    (tmp_path / "manual" / ARCHIVE).write_bytes(make_archive(*inner))
    assert mentions(error_of(tmp_path), ARCHIVE, f"{SYNSETS[0]}.tar")


def test_only_undecodable_files_are_an_error(tmp_path: Path) -> None:
    write_folders({EMPTY: {"bad.JPEG": b"not an image"}}, tmp_path / "manual")
    # This part of the message is from TFDS.
    reason = "No examples were yielded"
    assert mentions(error_of(tmp_path), "imagenet21k", "train", reason, f"{tmp_path}/manual")


CODE = """
import sys
from mixer_jax.data.tfds import prepare_tfds
prepare_tfds("imagenet21k", sys.argv[1])
print("tensorflow" in sys.modules)
"""


@pytest.mark.slow
def test_preparing_imagenet21k_does_not_import_tensorflow(files: Files, tmp_path: Path) -> None:
    write_archives(files, tmp_path / "downloads" / "manual")
    command = [sys.executable, "-c", CODE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
