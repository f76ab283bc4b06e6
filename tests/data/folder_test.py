"""Tests of image folders: common layouts, and common mistakes."""

import errno
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixer_jax.data.decode import BadImageError, decode
from mixer_jax.data.labeled_files import check_readable
from mixer_jax.data.registry import open_dataset
from mixer_jax.data.source import Source, mix_sources, relabel, subset
from mixer_jax.errors import UserError
from tests.helpers.images import encode, noise
from tests.helpers.messages import mentions, raises

PNG = encode(noise(4, 5), "PNG")


def write(root: Path, *paths: str) -> None:
    """Writes images that differ only in a byte after the end, which decoders ignore."""
    for number, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(PNG + bytes([number % 256]))


def numbered(*folders: str, count: int = 20) -> list[str]:
    return [f"{folder}/{number}.png" for folder in folders for number in range(count)]


def open_folder(root: Path, split: str = "train") -> Source:
    return open_dataset(f"folder:{root}", split)


def names(root: Path, split: str = "train") -> list[str]:
    source = open_folder(root, split)
    found = []
    for index in range(len(source)):
        try:
            found.append(source.examples[index]["name"])
        except BadImageError as error:
            found.append(error.name)
    return [Path(name).relative_to(root).as_posix() for name in found]


def error_of(path: Path | str, split: str = "train") -> str:
    with pytest.raises(UserError) as caught:
        open_dataset(f"folder:{path}", split)
    return str(caught.value)


def test_open_folder_reads_files_with_the_class_of_their_directory(tmp_path: Path) -> None:
    write(tmp_path, "train/dog/b.png", "train/cat/a.png", "train/dog/c.JPG", "test/dog/d.png")
    source = open_folder(tmp_path)
    assert source.class_names == ("cat", "dog")
    assert not source.multi_label
    examples = {source.examples[k]["name"]: source.examples[k] for k in range(len(source))}
    assert {name: example["labels"] for name, example in examples.items()} == {
        f"{tmp_path}/train/cat/a.png": (0,),
        f"{tmp_path}/train/dog/b.png": (1,),
        f"{tmp_path}/train/dog/c.JPG": (1,),
    }
    assert examples[f"{tmp_path}/train/dog/b.png"]["image"] == PNG + b"\0"
    assert decode(PNG + b"\0").shape == (4, 5, 3)
    assert names(tmp_path, "test") == ["test/dog/d.png"]
    assert open_folder(tmp_path, "test").class_names == ("cat", "dog")
    with pytest.raises(IndexError):
        source.examples[3]


@pytest.mark.parametrize("held_out", ["validation", "val", "test"])
def test_a_single_held_out_split_has_three_names(held_out: str, tmp_path: Path) -> None:
    write(tmp_path, *numbered("train/a"), f"{held_out}/a/x.png")
    for split in ("validation", "val", "test"):
        assert names(tmp_path, split) == [f"{held_out}/a/x.png"]
    # If the other split was requested, the user is told.
    other = "validation" if held_out == "test" else "test"
    (note,) = open_folder(tmp_path, other).notes
    assert mentions(note, other)
    assert not open_folder(tmp_path, held_out).notes


@pytest.mark.parametrize(
    "directories",
    [
        ("train", "valid", "test"),
        ("Train", "Val", "Test"),
        ("TRAINING", "validation", "TESTING"),
        ("training_set", "dev", "test_set"),
        ("Training Set", "Validation-Set", "test"),
    ],
)
def test_splits_may_be_spelled_in_other_ways(directories: tuple[str, ...], tmp_path: Path) -> None:
    train, validation, test = directories
    write(tmp_path, *numbered(f"{train}/a"), f"{validation}/a/x.png", f"{test}/a/y.png")
    assert len(open_folder(tmp_path)) == len(open_folder(tmp_path, "training")) == 20
    for split in ("validation", "val", "valid", "Valid", "valid[:1]"):
        assert names(tmp_path, split) == [f"{validation}/a/x.png"]
    for split in ("test", "testing", "Test"):
        assert names(tmp_path, split) == [f"{test}/a/y.png"]
    assert len(open_folder(tmp_path, "train+valid+test")) == len(open_folder(tmp_path, "all")) == 22


def test_a_validation_split_is_not_ignored_because_of_its_spelling(tmp_path: Path) -> None:
    write(tmp_path, *numbered("train/a"), "valid/a/x.png")
    assert len(open_folder(tmp_path)) == 20
    assert names(tmp_path, "validation") == ["valid/a/x.png"]


@pytest.mark.parametrize(
    ("directories", "named"),
    [
        (("train", "holdout"), ["holdout"]),
        (("train", "val", "annotations"), ["annotations"]),
        (("train", "val", "valid"), ["val", "valid"]),
        (("train", "Train", "val"), ["train", "Train"]),
    ],
)
def test_other_directories_next_to_train_are_rejected(
    directories: tuple[str, ...], named: list[str], tmp_path: Path
) -> None:
    write(tmp_path, *numbered(*(f"{name}/cat" for name in directories)))
    assert mentions(error_of(tmp_path), str(tmp_path), *named, "train")


@pytest.mark.parametrize("parent", ["", "train/"])
def test_a_tenth_of_every_class_is_held_out_without_a_split(parent: str, tmp_path: Path) -> None:
    sizes = {"a": 100, "b": 34, "c": 5, "d": 2, "e": 1}
    paths = [path for name, size in sizes.items() for path in numbered(parent + name, count=size)]
    write(tmp_path, *paths)
    train, validation = names(tmp_path), names(tmp_path, "validation")
    assert sorted(train + validation) == sorted(paths)
    counts = Counter(Path(path).parent.name for path in validation)
    assert counts == {"a": 10, "b": 3, "c": 1, "d": 1}
    assert names(tmp_path, "train+validation") == train + validation


def test_automatic_split_depends_only_on_the_paths(tmp_path: Path) -> None:
    for root, order in ((tmp_path / "one", 1), (tmp_path / "two", -1)):
        write(root, *numbered("a", "b")[::order])
    assert names(tmp_path / "one") == names(tmp_path / "two")
    assert names(tmp_path / "one", "test") == names(tmp_path / "two", "test")
    # They are not simply the first ones.
    assert names(tmp_path / "one", "test") != ["a/0.png", "a/1.png", "b/0.png", "b/1.png"]


def test_slices_contain_all_classes(tmp_path: Path) -> None:
    write(tmp_path, *numbered("train/a", "train/b", count=50), "val/a/x.png")
    first, rest = names(tmp_path, "train[:20%]"), names(tmp_path, "train[20%:]")
    assert first + rest == names(tmp_path)
    assert len(first) == 20
    assert 4 < sum("/a/" in name for name in first) < 16


def test_hidden_and_other_files_are_skipped(tmp_path: Path) -> None:
    write(tmp_path, "a/x.png", "b/y.png", "b/z.png")
    for path in ("a/notes.txt", "a/.hidden.png", "a/Thumbs.db", ".git/x.png", "README.md"):
        write(tmp_path, path)
    os.mkfifo(tmp_path / "a" / "pipe.png")
    assert sorted(names(tmp_path, "train+val")) == ["a/x.png", "b/y.png", "b/z.png"]
    source = open_folder(tmp_path)
    assert source.class_names == ("a", "b")
    # Only files that a user may have taken for images are counted.
    (note,) = source.notes
    assert mentions(note, str(tmp_path), "1", "1 .txt")


def test_skipped_files_are_counted_by_suffix(tmp_path: Path) -> None:
    write(tmp_path, *numbered("train/a", "train/b", count=3), "test/a/x.png")
    write(tmp_path, *(f"train/a/{n}.HEIF2" for n in range(4)), "train/a/deep/x.txt", "train/a/raw")
    (note,) = open_folder(tmp_path).notes
    assert mentions(note, f"{tmp_path}/train", "6", "4 .heif2", "1 .txt", "1 without suffix")
    assert open_folder(tmp_path, "test").notes == ()


def test_images_outside_of_class_directories_are_counted(tmp_path: Path) -> None:
    write(tmp_path, *numbered("train/a"), "train/loose.png", "train/two.jpg", "train/notes.txt")
    write(tmp_path, "test/x.png", "test/y.png", "test/z.png")
    (note,) = open_folder(tmp_path).notes
    assert mentions(note, f"{tmp_path}/train", "2")
    # A test split without labels is common, and does not prevent training.
    assert mentions(error_of(tmp_path, "test"), "test", f"{tmp_path}/test", "3")
    assert mentions(error_of(tmp_path / "test"), f"{tmp_path}/test", "3")


SYSTEM_DIRECTORIES = (
    "__MACOSX",
    "@eaDir",
    "lost+found",
    "$RECYCLE.BIN",
    "System Volume Information",
    ".ipynb_checkpoints",
)


@pytest.mark.parametrize("parent", ["", "train/", "test/", "train/a/", "train/a/deep/"])
def test_system_directories_are_ignored_at_any_depth(parent: str, tmp_path: Path) -> None:
    write(tmp_path, *numbered("train/a", "train/b", "test/a", count=3))
    expected = (sorted(names(tmp_path)), names(tmp_path, "test"))
    # Thumbnails of a NAS, and copies in a trash or an archive, which may be held-out images.
    write(tmp_path, *(f"{parent}{name}/a/thumbnail.png" for name in SYSTEM_DIRECTORIES))
    assert (sorted(names(tmp_path)), names(tmp_path, "test")) == expected
    assert open_folder(tmp_path).class_names == ("a", "b")
    assert open_folder(tmp_path).notes == ()


def test_system_directories_next_to_classes_are_ignored(tmp_path: Path) -> None:
    write(tmp_path, *numbered("a", "b"), *(f"{name}/x.png" for name in SYSTEM_DIRECTORIES))
    assert open_folder(tmp_path).class_names == ("a", "b")


@pytest.mark.parametrize("parent", ["", "train/"])
def test_classes_without_images_are_rejected_with_what_was_skipped(
    parent: str, tmp_path: Path
) -> None:
    write(tmp_path, *numbered(f"{parent}cat"), f"{parent}yellow/.gitkeep")
    write(tmp_path, *(f"{parent}red/{n}.RAW7" for n in range(3)), f"{parent}red/list.txt")
    message = error_of(tmp_path)
    assert mentions(message, "3", "yellow", "red")
    assert mentions(message, "4", "3 .raw7", "1 .txt")
    assert "cat" not in message.replace(str(tmp_path), "")
    # A class that only the held-out split lacks is evaluated as before.
    write(tmp_path, f"{parent}yellow/x.png", f"{parent}red/x.png")
    assert open_folder(tmp_path).class_names == ("cat", "red", "yellow")


@pytest.mark.parametrize("wrapper", ["photos", "photos/inner"])
def test_a_folder_above_the_dataset_is_rejected_or_noted(wrapper: str, tmp_path: Path) -> None:
    write(tmp_path / "a", *numbered(f"{wrapper}/cat", f"{wrapper}/dog"))
    (note,) = open_folder(tmp_path / "a").notes
    inner = wrapper.removeprefix("photos/")
    assert mentions(note, "photos", f"folder:{tmp_path}/a/photos")
    assert mentions(note, "inner") if inner == "inner" else mentions(note, "cat", "dog")
    write(tmp_path / "b", *numbered("photos/Train/cat", "photos/Train/dog", "photos/Val/cat"))
    assert mentions(error_of(tmp_path / "b"), "photos", f"folder:{tmp_path}/b/photos")


def test_check_readable_rejects_classes_without_a_readable_image(tmp_path: Path) -> None:
    write(tmp_path, *numbered("train/cat", "train/dog", count=5), "train/red/9.png")
    source = open_folder(tmp_path)
    for number in range(4):
        (tmp_path / f"train/dog/{number}.png").write_bytes(b"")
    (tmp_path / "train/cat/0.png").write_bytes(PNG[:40])
    check_readable(source)
    # Its header can be read.
    (tmp_path / "train/dog/4.png").write_bytes(PNG[: len(PNG) // 2])
    (tmp_path / "train/red/9.png").unlink()
    with raises(UserError, "dog", "red", f"{tmp_path}/train/red/9.png", os.strerror(errno.ENOENT)):
        check_readable(source)


def test_subdirectories_and_links_are_followed(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", "one.png", "deep/two.png")
    write(tmp_path / "images", "train/a/deep/er/x.png", "val/a/y.png")
    (tmp_path / "images/train/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images/train/a/deep/circle").symlink_to(tmp_path / "images/train/a")
    (tmp_path / "images/train/a/self.png").symlink_to(tmp_path / "images/train/a/self.png")
    found = names(tmp_path / "images")
    assert sorted(found) == [
        "train/a/deep/er/x.png",
        "train/a/self.png",
        "train/b/deep/two.png",
        "train/b/one.png",
    ]
    # A broken link is listed, so that it is reported when it is read.
    source = open_folder(tmp_path / "images")
    with raises(BadImageError, "a/self.png", os.strerror(errno.ELOOP)) as caught:
        source.examples[found.index("train/a/self.png")]
    assert caught.value.name == f"{tmp_path}/images/train/a/self.png"


def test_a_folder_with_several_paths_is_always_visited_by_the_same_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "train/a/m/x.png", "val/a/y.png")
    for name in ("b", "z"):
        (tmp_path / "train/a" / name).symlink_to(tmp_path / "train/a/m")
    in_order = names(tmp_path)
    monkeypatch.setattr(os, "scandir", lambda path, scan=os.scandir: list(scan(path))[::-1])
    assert names(tmp_path) == in_order
    assert len(in_order) == 1


def test_unreadable_folders_are_a_one_line_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, *numbered("a"), "a/secret/x.png")

    def scan(path: Path, scan: Any = os.scandir) -> Any:
        if Path(path).name == "secret":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scan)
    message = error_of(tmp_path)
    assert mentions(message, f"{tmp_path}/a/secret", "Permission denied")
    assert "\n" not in message


def test_labels_are_read_without_files(tmp_path: Path) -> None:
    for name in ("cat/1.png", "dog/1.png", "dog/2.png"):
        path = tmp_path / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(tmp_path / "missing")
    (tmp_path / "test").symlink_to(tmp_path / "train")
    source = open_folder(tmp_path)
    labels = Counter(source.read_labels(index) for index in range(3))
    assert labels == {(0,): 1, (1,): 2}


def test_deleted_files_are_bad_images(tmp_path: Path) -> None:
    write(tmp_path, *numbered("a", count=3))
    source = open_folder(tmp_path)
    for path in tmp_path.glob("a/*"):
        path.unlink()
    with raises(BadImageError, f"{tmp_path}/a/", ".png", os.strerror(errno.ENOENT)):
        source.examples[0]


def test_files_above_the_size_limit_are_bad_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, *numbered("a", count=2))
    monkeypatch.setattr("mixer_jax.data.image_files.MAX_BYTES", len(PNG))
    with raises(BadImageError, f"{tmp_path}/a/", ".png", str(len(PNG) + 1)):
        open_folder(tmp_path).examples[0]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_are_bad_images_and_do_not_block(tmp_path: Path) -> None:
    write(tmp_path, *numbered("a", count=2))
    source = open_folder(tmp_path)
    for path in tmp_path.glob("a/*"):
        path.unlink()
        os.mkfifo(path)
    with raises(BadImageError, f"{tmp_path}/a/", ".png", "not a regular file"):
        source.examples[0]


@pytest.mark.parametrize("record", [Source.record_file_sizes, Source.fingerprint])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda source: source,
        lambda source: relabel(source, ("b", *source.class_names)),
        lambda source: subset(source, range(1)),
        lambda source: mix_sources([source, source], [1, 2]),
    ],
    ids=["plain", "relabeled", "subset", "mixture"],
)
def test_files_that_change_after_their_sizes_are_recorded_are_bad_images(
    wrap: Callable[[Source], Source], record: Callable[[Source], object], tmp_path: Path
) -> None:
    write(tmp_path, *numbered("a", count=2))
    source = wrap(open_folder(tmp_path))
    record(source)
    size = len(source.examples[0]["image"])
    for path in tmp_path.glob("a/*"):
        path.write_bytes(path.read_bytes() + b"more")
    with raises(BadImageError, f"{tmp_path}/a/", ".png", str(size), str(size + 4)):
        source.examples[0]


def test_class_names_may_be_unicode(tmp_path: Path) -> None:
    write(tmp_path, *numbered("Hündin", "犬"))
    assert open_folder(tmp_path).class_names == ("Hündin", "犬")
    assert {Path(name).parent.name for name in names(tmp_path)} == {"Hündin", "犬"}


def test_class_names_with_invalid_unicode_are_escaped(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/H\xfcndin"
    os.mkdir(folder)
    for number in range(2):
        Path(os.fsdecode(folder + b"/%d.png" % number)).write_bytes(PNG)
    source = open_folder(tmp_path)
    assert source.class_names == ("H\\xfcndin",)
    assert source.examples[0]["image"] == PNG
    assert source.examples[0]["name"].startswith(f"{tmp_path}/H\\xfcndin/")


NFC, NFD = "caf\xe9", "cafe\u0301"


def test_class_names_of_splits_are_compared_in_one_unicode_form(tmp_path: Path) -> None:
    write(tmp_path, *numbered(f"train/{NFD}", "train/eau"), f"val/{NFC}/x.png", "val/eau/y.png")
    assert open_folder(tmp_path).class_names == (NFC, "eau")
    validation = open_folder(tmp_path, "validation")
    labels = {
        Path(e["name"]).parent.name: e["labels"]
        for e in map(validation.examples.__getitem__, range(2))
    }
    assert labels == {NFC: (0,), "eau": (1,)}


def test_order_does_not_depend_on_the_unicode_form(tmp_path: Path) -> None:
    for form, name in (("nfc", NFC), ("nfd", NFD)):
        write(tmp_path / form, *numbered(name, "eau"))
    for split in ("train", "validation"):
        numbers = [[Path(n).name for n in names(tmp_path / form, split)] for form in ("nfc", "nfd")]
        assert numbers[0] == numbers[1]


def test_two_spellings_of_one_class_are_rejected_and_look_different(tmp_path: Path) -> None:
    write(tmp_path, *numbered(NFC, NFD, "eau"))
    message = error_of(tmp_path)
    assert mentions(message, ascii(NFC), ascii(NFD), "NFC", "NFD", str(tmp_path))


def test_combined_splits_contain_no_duplicates(tmp_path: Path) -> None:
    write(tmp_path, *numbered("train/a", count=10), *numbered("test/a", count=5))
    assert len(open_folder(tmp_path, "all")) == 15
    assert len(open_folder(tmp_path, "train+val")) == 15
    assert len(open_folder(tmp_path, "validation[:3]")) == 3
    assert len(open_folder(tmp_path, "train[:1shard]")) == 10


@pytest.mark.parametrize(
    "directories",
    [("val", "test"), ("Testing",)],
)
def test_folders_without_a_training_split_are_rejected(
    directories: tuple[str, ...], tmp_path: Path
) -> None:
    write(tmp_path, *numbered(*(f"{name}/cat" for name in directories)))
    assert mentions(error_of(tmp_path), *directories, "train", "validation", "test")


def test_a_class_may_be_named_train(tmp_path: Path) -> None:
    write(tmp_path, *numbered("train", "car", "bus"))
    assert open_folder(tmp_path).class_names == ("bus", "car", "train")
    assert len(open_folder(tmp_path, "train+validation")) == 60


def test_usage_errors_name_the_folder_and_split(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    write(tmp_path / "typo", "train/cat/x.png", "val/cta/y.png")
    write(tmp_path / "no_images", "train/cat/x.txt", "val/cat/y.png")
    write(tmp_path / "good", *numbered("a"))
    for path in ("", tmp_path / "absent", tmp_path / "file", "gs://bucket/images"):
        assert mentions(error_of(path), f"folder:{path}", "train", "validation")
    for path, reason in [(tmp_path / "absent", "exist"), (tmp_path / "file", "directory")]:
        assert mentions(error_of(path), repr(str(path)), reason)
    assert mentions(error_of("gs://bucket/images"), "local path")
    assert mentions(error_of(tmp_path / "empty"), f"{tmp_path}/empty")
    assert mentions(error_of(tmp_path / "typo"), f"{tmp_path}/typo", "val", "cta", "train")
    assert mentions(error_of(tmp_path / "no_images"), f"{tmp_path}/no_images", "train")
    for split in ("holdout", "", "train[", "train[:200%]", "train[:99]"):
        message = error_of(tmp_path / "good", split)
        assert mentions(message, repr(split), f"{tmp_path}/good", "train", "validation")
    assert mentions(error_of(tmp_path / "good", "train[:0]"), "train[:0]", f"{tmp_path}/good")
    # The message has the requested name, although the split is called "validation".
    assert mentions(error_of(tmp_path / "good", "test[:0]"), "test[:0]", f"{tmp_path}/good")
