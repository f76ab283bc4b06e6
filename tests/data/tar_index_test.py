"""Tests of the index of tar shards: every kind of member, damaged archives, and the stored file."""

import contextlib
import errno
import io
import json
import os
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixer_jax.data import tar_index
from mixer_jax.data.decode import BadImageError
from mixer_jax.data.tar_index import Label, Shard, TarIndex, index_shards, parse_label
from mixer_jax.errors import MissingFileError, RunError, UserError
from tests.helpers.messages import mentions, raises
from tests.helpers.shards import Member, json_sample, make_image, sample, write_shard


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of indexes that cannot be stored next to the shards."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(tar_index, "_CACHE", folder)
    return folder


def index(path: Path, field: str = "") -> TarIndex:
    return index_shards(path.parent, [path.name], field)[0]


def names_of(shard: Shard) -> list[str]:
    prefix = f"{shard.path}/"
    return [shard.name(row).removeprefix(prefix) for row in range(len(shard.samples))]


def labels_of(index: TarIndex, name: str = "0.tar") -> dict[str, Label]:
    shard = index.shards[name]
    labels = [index.labels[label] for label in shard.samples["label"]]
    return dict(zip(names_of(shard), labels, strict=True))


def images_of(index: TarIndex) -> dict[str, bytes]:
    shard = index.shards["0.tar"]
    return {name: shard.read(row) for row, name in enumerate(names_of(shard))}


@pytest.mark.parametrize("mtime", [0, 1.5])
@pytest.mark.parametrize(
    "archive_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_all_dialects_have_the_members_that_tarfile_finds(
    archive_format: int, mtime: float, tmp_path: Path
) -> None:
    names = ["a", "b/c", "./d", f"{'long/' * 18}name", "x" * 94]
    if archive_format != tarfile.USTAR_FORMAT:
        names += ["k" * 150, f"{'deep/' * 60}z", "Hündin", "犬"]
    path = tmp_path / "0.tar"
    members = [member for number, name in enumerate(names) for member in sample(name, number)]
    write_shard(path, members, mtime=mtime, format=archive_format)
    found = index(path)
    expected = {f"{name.removeprefix('./')}.png": make_image(name) for name in names}
    assert images_of(found) == expected
    assert list(labels_of(found).values()) == [str(number) for number in range(len(names))]
    assert found.shards["0.tar"].num_skipped == 0
    with tarfile.open(path) as archive:
        offsets = [info.offset_data for info in archive if info.name.endswith(".png")]
    assert found.shards["0.tar"].samples["offset"].tolist() == offsets


def test_headers_of_other_programs_are_read(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as archive:
        variants: dict[str, dict[str, Any]] = {
            "old": {"type": tarfile.AREGTYPE},
            "time": {"mtime": 1.5},
            "owner": {"uid": 2**40},
            "contiguous": {"type": tarfile.CONTTYPE},
        }
        for key, changes in variants.items():
            for name, content in sample(key, 3):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                for field, value in changes.items():
                    setattr(info, field, value)
                archive.addfile(info, io.BytesIO(content))
    found = index(path)
    keys = ("old", "time", "owner", "contiguous")
    assert images_of(found) == {f"{key}.png": make_image(key) for key in keys}
    assert found.labels == ["3"]


def test_links_and_devices_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    members = sample("a", 0)
    write_shard(path, members, format=tarfile.GNU_FORMAT)
    with tarfile.open(path, "a", format=tarfile.GNU_FORMAT) as archive:
        for number, kind in enumerate(
            (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
        ):
            info = tarfile.TarInfo(f"link{number}.png")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    assert names_of(index(path).shards["0.tar"]) == ["a.png"]


def test_members_are_grouped_up_to_the_first_dot(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    image = make_image("x")
    members = [
        ("d.1/a.png", image),
        ("d.1/a.cls", b"1\n"),
        ("b.seg.png", image),
        ("b.JPG", image),
        ("b.cls", b" 2 "),
        ("._b.jpg", image),
        (".hidden", b""),
        ("noextension", b""),
        ("only.cls", b"3"),
    ]
    write_shard(path, members)
    found = index(path)
    assert labels_of(found) == {"d.1/a.png": "1", "b.JPG": "2"}
    assert found.shards["0.tar"].num_skipped == 1


def test_samples_may_be_interleaved(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    members = [member for key in "abc" for member in sample(key, ord(key))]
    write_shard(path, sorted(members, key=lambda member: member[0][-3:]))
    assert labels_of(index(path)) == {"a.png": "97", "b.png": "98", "c.png": "99"}


@pytest.mark.parametrize("extensions", [("png", "jpg"), ("jpg", "png"), ("webp", "jpg", "png")])
def test_of_several_images_of_a_sample_the_first_by_name_is_used(
    extensions: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "0.tar"
    write_shard(path, [("a.cls", b"0"), *((f"a.{name}", make_image(name)) for name in extensions)])
    assert images_of(index(path)) == {"a.jpg": make_image("jpg")}


@pytest.mark.parametrize("name", ["a.png", "a.cls", "a.json"])
def test_two_files_of_one_name_are_rejected(name: str, tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    members: list[Member] = [("a.png", make_image("a")), ("b.png", make_image("b")), (name, b"0")]
    write_shard(path, [*members, (name, b"1")])
    with raises(UserError, str(path), name):
        index(path)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (7, "7"),
        (" 7\n", "7"),
        (7.0, "7"),
        ("Hu\u0308ndin", "H\u00fcndin"),
        ("a\n\tcat", "a cat"),
        ([3, "1"], ("3", "1")),
        ([], ()),
        ("", None),
        (None, None),
        (True, None),
        (0.5, None),
        (float("nan"), None),
        ({"a": 1}, None),
        ("\ud800", None),
        ("\x1b[31m", None),
        ([1, None], None),
        ([[1]], None),
        ([0, 1, 0], None),
    ],
)
def test_parse_label(value: Any, expected: Label) -> None:
    assert parse_label(value) == expected


def test_labels_are_read_from_json(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    members = [
        *json_sample("a", label=3, other="x"),
        *json_sample("b", cls=4, other=["x", "y"]),
        *json_sample("c", caption="a cat"),
        ("d.json", b"{not json"),
        ("d.png", make_image("d")),
        ("e.json", b"[1]"),
        ("e.png", make_image("e")),
        *json_sample("f", label=5),
        ("f.cls", b"6"),
        ("g.json", json.dumps({"label": 1, "text": "x" * 2**20}).encode()),
        ("g.png", make_image("g")),
    ]
    write_shard(path, members)
    expected = {"a": "3", "b": "4", "c": None, "d": None, "e": None, "f": "6", "g": None}
    assert labels_of(index(path)) == {f"{key}.png": label for key, label in expected.items()}
    other = {name: label for name, label in labels_of(index(path, "other")).items() if label}
    assert other == {"a.png": "x", "b.png": ("x", "y")}
    # Stored and loaded.
    assert {
        name: label for name, label in labels_of(index(path, "other")).items() if label
    } == other
    assert len(list(tmp_path.glob("*.npz"))) == 2


def write_two(path: Path, mtime: float = 0) -> bytes:
    write_shard(path, [*sample("a", 0), *sample("b", 1)], mtime=mtime)
    return path.read_bytes()


def header_offsets(path: Path) -> dict[str, int]:
    with tarfile.open(path) as archive:
        return {info.name: info.offset for info in archive}


def end_of_members(path: Path) -> int:
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]
    return last.offset_data + 512 * -(-last.size // 512)


@pytest.mark.parametrize("missing", [0, 1, 100, 511, 512, 513])
def test_truncated_shards_are_rejected(missing: int, tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    content = write_two(path)
    with tarfile.open(path) as archive:
        info = archive.getmember("b.png")
    for end in (info.offset_data + 5 - missing, info.offset_data + info.size - 1 - missing):
        path.write_bytes(content[: max(end, 1)])
        with raises(UserError, str(path), f"{max(end, 1):,}"):
            index(path)


@pytest.mark.parametrize("mtime", [0, 1.5])
def test_every_truncation_is_rejected(mtime: float, tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    content = write_two(path, mtime)
    expected = labels_of(index(path))
    last = end_of_members(path)
    for end in {*range(0, len(content), 64), last - 1, last}:
        path.write_bytes(content[:end])
        if end <= last:
            with raises(UserError, str(path), f"{end:,}"):
                index(path)
    # The end marker is two blocks of zeros, of which one suffices; the others are padding.
    with path.open("ab") as file:
        file.truncate(last)
        file.write(bytes(1024))
    assert labels_of(index(path)) == expected


@pytest.mark.parametrize("mtime", [0, 1.5])
@pytest.mark.parametrize("position", [0, 100, 124, 148, 156, 257])
def test_damaged_headers_are_rejected_with_their_position(
    position: int, mtime: float, tmp_path: Path
) -> None:
    path = tmp_path / "0.tar"
    content = bytearray(write_two(path, mtime))
    offset = header_offsets(path)["b.cls"]
    content[offset + position] ^= 0x55
    path.write_bytes(content)
    with raises(UserError, str(path), f"{offset:,}"):
        index(path)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "byte 0 of 0"),
        (b"\x1f\x8b\x08" + bytes(2000), "gunzip"),
        (b"BZh91AY" + bytes(2000), "compressed"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n" + b"x" * 1000,
            "git lfs pull",
        ),
        (b"<html>" + b"x" * 2000, "tar archive"),
    ],
)
def test_files_that_are_not_archives_are_rejected(
    content: bytes, named: str, tmp_path: Path
) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(content)
    with raises(UserError, str(path), named) as caught:
        index(path)
    assert "\n" not in str(caught.value)


def test_an_archive_without_members_has_no_samples(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [])
    assert labels_of(index(tmp_path / "0.tar")) == {}


@contextlib.contextmanager
def scanned(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Records which shards are read."""
    names: list[str] = []
    scan = tar_index._scan_shard

    def record(path: Path, field: str) -> Any:
        names.append(path.name)
        return scan(path, field)

    with monkeypatch.context() as context:
        context.setattr(tar_index, "_scan_shard", record)
        yield names
    names.sort()


def test_only_new_and_changed_shards_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = {f"{n}.tar": tmp_path / f"{n}.tar" for n in range(4)}
    for name, path in shards.items():
        write_shard(path, [*sample(f"{name[0]}a", name[0]), *sample(f"{name[0]}b", "cat")])

    def read(*names: str) -> list[dict[str, Label]]:
        found, notes = index_shards(tmp_path, names)
        assert not notes
        return [labels_of(found, name) for name in names]

    with scanned(monkeypatch) as names:
        first = read("0.tar", "1.tar")
    assert names == ["0.tar", "1.tar"]
    assert first == [{f"{n}a.png": n, f"{n}b.png": "cat"} for n in "01"]
    with scanned(monkeypatch) as names:
        # Another pattern adds its shards, and finds those of the first one.
        assert read("1.tar", "2.tar", "3.tar")[0] == first[1]
        assert read("0.tar", "1.tar") == first
    assert names == ["2.tar", "3.tar"]
    write_shard(shards["1.tar"], sample("changed", 7))
    os.utime(shards["2.tar"])
    shards["3.tar"].unlink()
    with scanned(monkeypatch) as names:
        assert read("0.tar", "1.tar", "2.tar")[:2] == [first[0], {"changed.png": "7"}]
    assert names == ["1.tar", "2.tar"]
    (file,) = tmp_path.glob("*.npz")
    assert sorted(tar_index._load(file, tmp_path).shards) == ["0.tar", "1.tar", "2.tar"]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"\x93NUMPY"])
def test_a_damaged_index_is_built_again(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    write_two(path)
    expected = labels_of(index(path))
    (file,) = tmp_path.glob("*.npz")
    stored = file.read_bytes()
    for damaged in (content, stored[: len(stored) // 2]):
        file.write_bytes(damaged)
        assert labels_of(index(path)) == expected
        assert file.read_bytes() == stored


@pytest.mark.parametrize(
    ("field", "value"),
    [("label", 2), ("label", -1), ("offset", 0), ("size", -1), ("name_end", 99), ("name_end", -1)],
)
def test_an_index_with_impossible_values_is_built_again(
    field: str, value: int, tmp_path: Path
) -> None:
    path = tmp_path / "0.tar"
    write_two(path)
    expected = labels_of(index(path))
    (file,) = tmp_path.glob("*.npz")
    with np.load(file) as stored:
        arrays = dict(stored)
    arrays["samples"][field][0] = value
    np.savez(file, **arrays)
    assert labels_of(index(path)) == expected


def test_an_index_of_another_version_is_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "0.tar"
    write_two(path)
    with monkeypatch.context() as context:
        context.setattr(tar_index, "_VERSION", 0)
        index(path)
    with scanned(monkeypatch) as names:
        index(path)
    assert names == ["0.tar"]


def test_the_other_shards_are_indexed_although_one_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = {f"{n}.tar": tmp_path / f"{n}.tar" for n in range(4)}
    for path in shards.values():
        write_two(path)
    for name in ("1.tar", "2.tar"):
        shards[name].write_bytes(b"")
    with raises(UserError, f"{tmp_path}/1.tar", "1"):
        index_shards(tmp_path, shards)
    for name in ("1.tar", "2.tar"):
        write_two(shards[name])
    with scanned(monkeypatch) as names:
        index_shards(tmp_path, shards)
    assert names == ["1.tar", "2.tar"]


def deny(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    """Makes folders read-only, also for the administrator."""
    lock = tar_index.file_lock

    def deny_lock(path: Path, **options: Any) -> Any:
        if any(path.is_relative_to(folder) for folder in folders):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return lock(path, **options)

    monkeypatch.setattr(tar_index, "file_lock", deny_lock)


def test_the_index_of_a_read_only_folder_is_stored_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    path = tmp_path / "0.tar"
    write_two(path)
    deny(monkeypatch, tmp_path)
    expected = labels_of(index(path))
    assert [file.name for file in tmp_path.iterdir()] == ["0.tar"]
    assert len(list(cache.glob("*/*.npz"))) == 1
    with scanned(monkeypatch) as names:
        assert labels_of(index(path)) == expected
    assert names == []


def test_without_any_writable_folder_the_index_is_built_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    path = tmp_path / "0.tar"
    write_two(path)
    deny(monkeypatch, tmp_path, cache)
    for _ in range(2):
        found, (note,) = index_shards(tmp_path, ["0.tar"])
        assert list(labels_of(found)) == ["a.png", "b.png"]
        assert mentions(note, str(tmp_path), str(cache))
    assert list(cache.iterdir()) == []


def test_several_programs_build_the_index_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = {f"{n}.tar": tmp_path / f"{n}.tar" for n in range(5)}
    for path in shards.values():
        write_two(path)
    results = []
    with scanned(monkeypatch) as names:
        threads = [
            threading.Thread(target=lambda: results.append(index_shards(tmp_path, shards)[0]))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert names == sorted(shards)
    assert len({str([labels_of(result, name) for name in shards]) for result in results}) == 1
    assert len(results) == 4
    # No lock and no temporary file is left behind.
    assert len(list(tmp_path.iterdir())) == 6


def test_a_shard_that_vanishes_or_changes_after_indexing_ends_the_run(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    content = write_two(path)
    shard = index(path).shards["0.tar"]
    assert shard.read(0) == make_image("a")
    # Other samples in a file of the same size, a truncated file, and none.
    write_shard(path, [*sample("c", 0), *sample("d", 1)])
    os.utime(path, ns=(0, 0))
    assert path.stat().st_size == len(content)
    with raises(RunError, str(path)):
        shard.read(0)
    path.write_bytes(content[: int(shard.samples["offset"][0]) + 3])
    with raises(RunError, str(path)):
        shard.read(0)
    path.unlink()
    with raises(MissingFileError, str(path)):
        shard.read(0)
    path.mkdir()
    with raises(BadImageError, "a.png", os.strerror(errno.EISDIR)):
        shard.read(0)


def test_images_above_the_size_limit_are_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "0.tar"
    write_two(path)
    shard = index(path).shards["0.tar"]
    monkeypatch.setattr(tar_index, "MAX_BYTES", len(make_image("a")) - 1)
    with raises(BadImageError, "a.png", str(len(make_image("a")))):
        shard.read(0)


def test_names_in_archives_are_never_paths(tmp_path: Path) -> None:
    path = tmp_path / "inner" / "0.tar"
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    members = [("../secret.png", make_image("x")), (f"{tmp_path}/secret.png", make_image("y"))]
    write_shard(path, members)
    assert set(images_of(index(path)).values()) == {make_image("x"), make_image("y")}
    assert secret.read_bytes() == b"secret"
