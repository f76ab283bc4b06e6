"""Tests of image folders: common layouts, and common mistakes."""

import errno
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mixer_jax.data.decode import BadImageError, decode
from mixer_jax.data.registry import open_dataset
from mixer_jax.data.source import Source
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


def test_two_held_out_splits_have_their_own_names(tmp_path: Path) -> None:
    write(tmp_path, *numbered("train/a"), "val/a/x.png", "test/a/y.png")
    assert names(tmp_path, "val") == ["val/a/x.png"]
    assert names(tmp_path, "test") == ["test/a/y.png"]
    assert mentions(error_of(tmp_path, "validation"), "validation", "train", "val", "test")


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
    assert open_folder(tmp_path).class_names == ("a", "b")


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
    monkeypatch.setattr("mixer_jax.data.image_files._MAX_BYTES", len(PNG))
    with raises(BadImageError, f"{tmp_path}/a/", ".png", str(len(PNG) + 1)):
        open_folder(tmp_path).examples[0]


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


def test_combined_splits_contain_no_duplicates(tmp_path: Path) -> None:
    write(tmp_path, *numbered("train/a", count=10), *numbered("test/a", count=5))
    assert len(open_folder(tmp_path, "all")) == 15
    assert len(open_folder(tmp_path, "train+val")) == 15
    assert len(open_folder(tmp_path, "validation[:3]")) == 3
    assert len(open_folder(tmp_path, "train[:1shard]")) == 10


@pytest.mark.parametrize(
    "directories",
    [("training", "validation"), ("Train", "Val"), ("val", "test"), ("testing",)],
)
def test_unknown_split_names_are_rejected(directories: tuple[str, ...], tmp_path: Path) -> None:
    write(tmp_path, *numbered(*(f"{name}/cat" for name in directories)))
    assert mentions(error_of(tmp_path), *directories, "train", "validation", "val", "test")


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
    assert mentions(error_of(tmp_path / "empty"), f"{tmp_path}/empty")
    assert mentions(error_of(tmp_path / "typo"), f"{tmp_path}/typo", "val", "cta", "train")
    assert mentions(error_of(tmp_path / "no_images"), f"{tmp_path}/no_images", "train")
    for split in ("valid", "", "train[", "train[:200%]", "train[:99]"):
        message = error_of(tmp_path / "good", split)
        assert mentions(message, repr(split), f"{tmp_path}/good", "train", "validation")
    assert mentions(error_of(tmp_path / "good", "train[:0]"), "train[:0]", f"{tmp_path}/good")
    # The message has the requested name, although the split is called "validation".
    assert mentions(error_of(tmp_path / "good", "test[:0]"), "test[:0]", f"{tmp_path}/good")
