"""Tests of the builder of ImageNet-21k: every layout gives the same data, bytes unchanged."""

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

# In no order, as in the real archive.
SYNSETS = ("n02000002", "n00000001", "n00500003")
EMPTY = "n00000000"
WHOLE = "fall11_whole.tar"
# Of the names below, those whose SHA-256 falls into the first hundredth.
HELD_OUT = {
    "n00500003/n00500003_59.JPEG",
}
Files = dict[str, dict[str, bytes]]


class Prepared(NamedTuple):
    """What a data set holds: class and bytes by file name, and the files left out."""

    examples: dict[str, tuple[str, bytes]]
    class_names: list[str]
    undecodable: dict[str, str]


def jpeg(seed: int, size: int = 8) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    return bytes(cv2.imencode(".jpg", noise)[1])


def bad_files() -> dict[str, bytes]:
    whole = jpeg(0, 64)
    half = whole[: len(whole) // 2]
    return {"text.JPEG": b"this is no image", "nothing.JPEG": b"", "half.JPEG": half}


@pytest.fixture(scope="module")
def files() -> Files:
    """A hundred images of each class, three bad files, and a class with none but bad ones."""
    good = {
        synset: {f"{synset}_{index}.JPEG": jpeg(1000 * number + index) for index in range(100)}
        for number, synset in enumerate(SYNSETS)
    }
    good[SYNSETS[0]] |= bad_files()
    return good | {EMPTY: {"bad.JPEG": b"no image"}}


def archive(*members: tuple[str, bytes], mode: Literal["w", "w:gz"] = "w") -> bytes:
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, BytesIO(content))
    return buffer.getvalue()


def write_whole(files: Files, folder: Path) -> None:
    inner = [(f"{synset}.tar", archive(*members.items())) for synset, members in files.items()]
    (folder / WHOLE).write_bytes(archive(*inner))


def write_whole_compressed(files: Files, folder: Path) -> None:
    """As others pack it: archives in a folder, and in each its images in another."""
    inner = [
        (
            f"winter21_whole/{synset}.tar",
            archive(*((f"./{synset}/{name}", content) for name, content in members.items())),
        )
        for synset, members in files.items()
    ]
    (folder / "winter21_whole.tar.gz").write_bytes(archive(*inner, mode="w:gz"))


def write_archives(files: Files, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for synset, members in files.items():
        (folder / f"{synset}.tar").write_bytes(archive(*members.items()))


def write_folders(files: Files, folder: Path) -> None:
    for synset, members in files.items():
        (folder / synset).mkdir(parents=True)
        for name, content in members.items():
            (folder / synset / name).write_bytes(content)


def write_nested(files: Files, folder: Path) -> None:
    write_folders(files, folder / "imagenet21k" / "images")


def write_mixture(files: Files, folder: Path) -> None:
    """One class unpacked in part beside its archive, one unpacked, two not."""
    rest = dict(files)
    unpacked = {SYNSETS[1]: rest.pop(SYNSETS[1])}
    in_part = {SYNSETS[2]: dict(list(rest[SYNSETS[2]].items())[:7])}
    write_archives(rest, folder / "imagenet21k")
    write_folders(unpacked | in_part, folder / "imagenet21k")


def read(name: str, data_dir: Path, split: str = "train") -> Prepared:
    source = open_dataset(name, split, str(data_dir))
    examples = {}
    for index in range(len(source)):
        example = source.examples[index]
        (label,) = example["labels"]
        file_name = example["name"].rpartition(": ")[2]
        examples[file_name] = (source.class_names[label], bytes(example["image"]))
    assert len(examples) == len(source)
    (listed,) = Path(data_dir, "imagenet21k").rglob(UNDECODABLE)
    undecodable = dict(row.split("\t") for row in listed.read_text().splitlines())
    return Prepared(examples, list(source.class_names), undecodable)


def prepare(name: str, files: Files, folder: Path, write: Callable[[Files, Path], None]) -> Path:
    """Prepares `files` laid out in the default place for manual downloads; returns the data_dir."""
    manual = folder / "downloads" / "manual"
    manual.mkdir(parents=True)
    write(files, manual)
    prepare_tfds(name, str(folder))
    return folder


def check(prepared: Prepared, files: Files) -> None:
    """Asserts that all of `files` are there, unchanged, and the bad ones are listed."""
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
def whole(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data_dir prepared from one archive of archives."""
    return prepare("imagenet21k", files, tmp_path_factory.mktemp("whole"), write_whole)


@pytest.mark.parametrize(
    "write",
    [
        write_whole,
        write_whole_compressed,
        write_archives,
        write_folders,
        write_nested,
        write_mixture,
    ],
)
def test_every_layout_gives_the_same(
    write: Callable[[Files, Path], None], files: Files, tmp_path: Path, whole: Path
) -> None:
    prepared = read("imagenet21k", prepare("imagenet21k", files, tmp_path, write))
    check(prepared, files)
    # In the same order too, which is that of hashes.
    assert list(prepared.examples) == list(read("imagenet21k", whole).examples)


def test_slices_hold_all_classes(whole: Path) -> None:
    last = read("imagenet21k", whole, "train[90%:]")
    first = read("imagenet21k", whole, "train[:90%]")
    assert {synset for synset, _ in last.examples.values()} == set(SYNSETS)
    assert (len(first.examples), len(last.examples)) == (270, 30)


def test_one_percent_is_held_out_always_the_same(files: Files, whole: Path, tmp_path: Path) -> None:
    prepare("imagenet21k/held_out", files, tmp_path, write_archives)
    train = read("imagenet21k/held_out", tmp_path, "train")
    validation = read("imagenet21k/held_out", tmp_path, "validation")
    assert train.examples.keys().isdisjoint(validation.examples)
    assert train.examples | validation.examples == read("imagenet21k", whole).examples
    assert train.undecodable == read("imagenet21k", whole).undecodable
    # Decided by the file's name alone, so that no other version of the data mixes them.
    assert set(validation.examples) == HELD_OUT


def test_files_of_one_name_are_all_kept(tmp_path: Path) -> None:
    first, second, third = (jpeg(seed) for seed in range(3))
    manual = tmp_path / "manual"
    manual.mkdir()
    members = [("a", first), ("a#2", second), ("./a", third)]
    (manual / f"{SYNSETS[0]}.tar").write_bytes(archive(*members))
    prepare_tfds("imagenet21k", str(tmp_path), str(manual))
    names = {"a": first, "a#2": second, "a#3": third}
    expected = {f"{SYNSETS[0]}/{name}": (SYNSETS[0], image) for name, image in names.items()}
    assert read("imagenet21k", tmp_path).examples == expected


def test_names_need_not_be_unicode(tmp_path: Path) -> None:
    folder = tmp_path / "manual" / SYNSETS[0]
    folder.mkdir(parents=True)
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.JPEG")).write_bytes(jpeg(0))
    prepare_tfds("imagenet21k", str(tmp_path), str(tmp_path / "manual"))
    assert list(read("imagenet21k", tmp_path).examples) == [f"{SYNSETS[0]}/\ufffd.JPEG"]


def test_the_archive_of_imagenet_1k_may_lie_there_too(files: Files, tmp_path: Path) -> None:
    def write(files: Files, folder: Path) -> None:
        write_whole(files, folder)
        (folder / WHOLE).rename(folder / "ILSVRC2012_img_train.tar")
        write_whole({SYNSETS[0]: {"a": jpeg(0)}}, folder)

    prepared = read("imagenet21k", prepare("imagenet21k", files, tmp_path, write))
    assert list(prepared.examples) == [f"{SYNSETS[0]}/a"]


def test_an_empty_archive_is_a_class(tmp_path: Path) -> None:
    def write(files: Files, folder: Path) -> None:
        inner = [("n00000001.tar", b""), ("n00000002.tar", archive(("a", jpeg(0))))]
        (folder / WHOLE).write_bytes(archive(*inner, ("n00000003.tar", archive())))

    prepared = read("imagenet21k", prepare("imagenet21k", {}, tmp_path, write))
    assert prepared.class_names == ["n00000001", "n00000002", "n00000003"]
    assert list(prepared.examples) == ["n00000002/a"]


def error_of(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        prepare_tfds("imagenet21k", str(folder / "data"), str(folder / "manual"))
    assert "\n" not in str(caught.value)
    assert not list(folder.rglob("incomplete*"))
    return str(caught.value)


def test_a_folder_with_nothing_usable(tmp_path: Path) -> None:
    (tmp_path / "manual" / "cats").mkdir(parents=True)
    (tmp_path / "manual" / "other.tar").write_bytes(archive(("cat.jpg", jpeg(0))))
    message = error_of(tmp_path)
    assert mentions(message, f"{tmp_path}/manual", "ImageNet-21k")
    # The three layouts that would do.
    assert mentions(message, ".tar", ".tar.gz", "nXXXXXXXX.tar", "nXXXXXXXX")


def test_two_downloads_are_not_guessed_between(files: Files, tmp_path: Path) -> None:
    manual = tmp_path / "manual"
    manual.mkdir()
    write_whole(files, manual)
    write_whole_compressed(files, manual)
    message = error_of(tmp_path)
    assert mentions(message, WHOLE, "winter21_whole.tar.gz", f"{manual}/imagenet21k")


@pytest.mark.parametrize("write", [write_whole, write_whole_compressed, write_archives])
def test_an_archive_that_is_cut_off(
    write: Callable[[Files, Path], None], files: Files, tmp_path: Path
) -> None:
    manual = tmp_path / "manual"
    manual.mkdir()
    write(files, manual)
    largest = max(manual.iterdir(), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    assert mentions(error_of(tmp_path), str(largest))


def test_an_archive_that_names_a_class_twice(tmp_path: Path) -> None:
    (tmp_path / "manual").mkdir()
    inner = [(f"{SYNSETS[0]}.tar", archive(("a", jpeg(0))))] * 2
    (tmp_path / "manual" / WHOLE).write_bytes(archive(*inner))
    assert mentions(error_of(tmp_path), WHOLE, f"{SYNSETS[0]}.tar")


def test_nothing_but_undecodable_files(tmp_path: Path) -> None:
    write_folders({EMPTY: {"bad.JPEG": b"no image"}}, tmp_path / "manual")
    # The reason is given by TFDS.
    reason = "No examples were yielded"
    assert mentions(error_of(tmp_path), "imagenet21k", "train", reason, f"{tmp_path}/manual")


CODE = """
import sys
from mixer_jax.data.tfds import prepare_tfds
prepare_tfds("imagenet21k", sys.argv[1])
print("tensorflow" in sys.modules)
"""


def test_preparing_does_not_import_tensorflow(files: Files, tmp_path: Path) -> None:
    write_archives(files, tmp_path / "downloads" / "manual")
    command = [sys.executable, "-c", CODE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
