"""Tests of the index of tar shards: every kind of member, damaged archives, and the stored file."""

import contextlib
import errno
import io
import json
import os
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixer_jax.data import tar_index
from mixer_jax.data.decode import BadImageError
from mixer_jax.data.tar_index import (
    ShardIndex,
    canonical_label,
    format_member,
    index_shards,
    join_shards,
    read_member,
)
from mixer_jax.errors import MissingFileError, RunError, UserError
from tests.helpers.messages import mentions, raises
from tests.helpers.shards import Member, json_sample, make_image, sample, write_shard


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of indexes that cannot be stored next to the shards."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(tar_index, "_CACHE", folder)
    return folder


def index(path: Path, field: str = "") -> ShardIndex:
    return index_shards(path.parent, {path.name: path}, field)[0][path.name]


def names_of(shard: ShardIndex) -> list[str]:
    samples = shard.samples
    ends = np.cumsum(samples.name_lengths).tolist()
    text = samples.names.tobytes()
    return [os.fsdecode(text[i:j]) for i, j in zip([0, *ends], ends, strict=False)]


def labels_of(shard: ShardIndex) -> dict[str, str | None]:
    """Returns the label of each image in JSON."""
    labels = [*shard.labels, None]
    return {
        name: labels[label_id]
        for name, label_id in zip(names_of(shard), shard.samples.label_ids, strict=True)
    }


def images_of(path: Path, shard: ShardIndex) -> dict[str, bytes]:
    samples = shard.samples
    numbers = zip(samples.offsets, samples.sizes, samples.header_crcs, strict=True)
    return {
        name: read_member(path, int(offset), int(size), int(crc), name)
        for name, (offset, size, crc) in zip(names_of(shard), numbers, strict=True)
    }


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
    shard = index(path)
    expected = {f"{name.removeprefix('./')}.png": make_image(name) for name in names}
    assert images_of(path, shard) == expected
    assert list(labels_of(shard).values()) == [str(number) for number in range(len(names))]
    assert (shard.num_not_regular, shard.num_without_image) == (0, 0)
    with tarfile.open(path) as archive:
        offsets = [info.offset_data for info in archive if info.name.endswith(".png")]
    assert shard.samples.offsets.tolist() == offsets


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
    shard = index(path)
    keys = ("old", "time", "owner", "contiguous")
    assert images_of(path, shard) == {f"{key}.png": make_image(key) for key in keys}
    assert shard.labels == ("3",)


def test_links_devices_and_sparse_files_are_skipped(tmp_path: Path) -> None:
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
    shard = index(path)
    assert names_of(shard) == ["a.png"]
    # Directories are normal.
    assert shard.num_not_regular == 4


def test_a_sparse_file_is_not_read_as_an_image(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    header = tarfile.TarInfo("sparse.png")
    header.size, header.type = 512, tarfile.GNUTYPE_SPARSE
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    # One segment of 512 bytes at the start of a file of 1024 bytes.
    block[386:410] = b"00000000000\x0000000001000\x00"
    block[483:495] = b"00000002000\x00"
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    with tarfile.open(path, "w") as archive:
        archive.fileobj.write(bytes(block) + bytes(512))
        archive.offset += 1024
        for name, content in sample("a", 0):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    shard = index(path)
    assert (names_of(shard), shard.num_not_regular) == (["a.png"], 1)


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
        ("__meta__/c.png", image),
        ("only.txt", b"text"),
    ]
    write_shard(path, members)
    shard = index(path)
    assert labels_of(shard) == {"d.1/a.png": "1", "b.JPG": "2"}
    assert shard.num_without_image == 1
    assert shard.extensions == {"png": 1, "cls": 2, "seg.png": 1, "jpg": 1, "txt": 1}


def test_samples_may_be_interleaved(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    members = [member for key in "abc" for member in sample(key, ord(key))]
    write_shard(path, sorted(members, key=lambda member: member[0][-3:]))
    assert labels_of(index(path)) == {"a.png": "97", "b.png": "98", "c.png": "99"}


@pytest.mark.parametrize("extensions", [("png", "jpg"), ("jpg", "png"), ("gif", "jpg", "webp")])
def test_of_several_images_of_a_sample_jpeg_comes_first(
    extensions: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "0.tar"
    write_shard(path, [("a.cls", b"0"), *((f"a.{name}", make_image(name)) for name in extensions)])
    assert images_of(path, index(path)) == {"a.jpg": make_image("jpg")}


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
        ("7", "7"),
        (" 007\n", "7"),
        (7.0, "7"),
        (-1, "-1"),
        ("cat", '"cat"'),
        ("Hu\u0308ndin", '"H\\u00fcndin"'),
        ("7 cats", '"7 cats"'),
        ("a\n\tcat", '"a cat"'),
        ("\ud800", '"\\\\ud800"'),
        ([3, "1"], "[3, 1]"),
        (["cat", "dog"], '["cat", "dog"]'),
        ([], "[]"),
        ("", None),
        (None, None),
        (True, None),
        (0.5, None),
        (float("nan"), None),
        (float("inf"), None),
        ({"a": 1}, None),
        ([1, None], None),
        ([[1]], None),
        ("9" * 30, f'"{"9" * 30}"'),
        (10**30, None),
    ],
)
def test_canonical_label(value: Any, expected: str | None) -> None:
    assert canonical_label(value) == expected


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
    assert other == {"a.png": '"x"', "b.png": '["x", "y"]'}
    assert index(path).fields == ("label", "other")
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
        with raises(UserError, str(path), str(max(end, 1))):
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
            with raises(UserError, str(path), str(end) if end else "empty"):
                index(path)
    # The end marker is two blocks of zeros, of which one suffices; the others are padding.
    with path.open("ab") as file:
        file.truncate(last)
        file.write(bytes(1024))
    assert labels_of(index(path)) == expected


def test_the_command_that_completes_an_archive_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a b.tar"
    content = write_two(path)
    last = end_of_members(path)
    path.write_bytes(content[:last])
    with raises(UserError, str(last)) as caught:
        index(path)
    subprocess.run(str(caught.value).split("run: ")[1], shell=True, check=True)
    assert names_of(index(path)) == ["a.png", "b.png"]


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
        (b"", "empty"),
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


def test_joined_archives_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(write_two(path) * 2)
    with raises(UserError, str(path), "--concatenate"):
        index(path)
    # Padding is normal.
    path.write_bytes(write_two(path) + bytes(2**20))
    assert len(index(path).samples.sizes) == 2


def test_an_archive_without_members_has_no_samples(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [])
    shard = index(tmp_path / "0.tar")
    assert (names_of(shard), shard.labels) == ([], ())


@contextlib.contextmanager
def scanned(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Records which shards are read."""
    names: list[str] = []
    scan = tar_index._scan_shard

    def record(path: Path, field: str) -> ShardIndex:
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

    def read(*names: str) -> list[dict[str, Any]]:
        indexes, notes = index_shards(tmp_path, {name: shards[name] for name in names})
        assert not notes
        assert list(indexes) == list(names)
        return [labels_of(indexes[name]) for name in names]

    with scanned(monkeypatch) as names:
        first = read("0.tar", "1.tar")
    assert names == ["0.tar", "1.tar"]
    assert first == [{f"{n}a.png": n, f"{n}b.png": '"cat"'} for n in "01"]
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
    assert list(tar_index._load(file)) == ["0.tar", "1.tar", "2.tar"]


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


def test_a_read_only_index_is_completed_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    shards = {f"{n}.tar": tmp_path / f"{n}.tar" for n in range(3)}
    for path in shards.values():
        write_two(path)
    index_shards(tmp_path, shards)
    deny(monkeypatch, tmp_path)
    write_shard(shards["1.tar"], sample("c", 2))
    for expected in (["1.tar"], []):
        with scanned(monkeypatch) as names:
            indexes, notes = index_shards(tmp_path, shards)
        assert (names, notes) == (expected, [])
        assert labels_of(indexes["1.tar"]) == {"c.png": "2"}


def test_without_any_writable_folder_the_index_is_built_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    path = tmp_path / "0.tar"
    write_two(path)
    deny(monkeypatch, tmp_path, cache)
    for _ in range(2):
        indexes, (note,) = index_shards(tmp_path, {"0.tar": path})
        assert names_of(indexes["0.tar"]) == ["a.png", "b.png"]
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
    assert len({str({k: labels_of(v) for k, v in result.items()}) for result in results}) == 1
    assert len(results) == 4
    # No lock and no temporary file is left behind.
    assert len(list(tmp_path.iterdir())) == 6


def test_a_shard_that_changes_while_it_is_indexed_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "0.tar"
    write_two(path)
    add = tar_index._Scan.add

    def grow(self: Any, *args: Any) -> None:
        add(self, *args)
        with path.open("ab") as file:
            file.write(bytes(512))

    monkeypatch.setattr(tar_index._Scan, "add", grow)
    with raises(UserError, str(path)):
        index(path)


def test_join_shards_renumbers_labels(tmp_path: Path) -> None:
    shards = {}
    for name, labels in {"0.tar": (5, "x"), "1.tar": ("x", 5, "y", None)}.items():
        members = [
            member
            for number, label in enumerate(labels)
            for member in json_sample(f"{name[0]}{number}", label=label)
        ]
        write_shard(tmp_path / name, members)
        shards[name] = tmp_path / name
    fresh = index_shards(tmp_path, shards)[0]
    stored = index_shards(tmp_path, shards)[0]
    for indexes in (fresh, stored):
        samples, distinct, shard_ids = join_shards(indexes.values())
        assert shard_ids.tolist() == [0, 0, 1, 1, 1, 1]
        texts = [[*distinct, None][label_id] for label_id in samples.label_ids]
        assert texts == ["5", '"x"', '"x"', "5", '"y"', None]
        taken = samples.take(np.array([4, 0]))
        assert taken.names.tobytes() == b"12.png00.png"
        assert taken.offsets.tolist() == [samples.offsets[4], samples.offsets[0]]


def read_first(path: Path, shard: ShardIndex) -> bytes:
    samples = shard.samples
    numbers = (samples.offsets[0], samples.sizes[0], samples.header_crcs[0])
    offset, size, crc = map(int, numbers)
    return read_member(path, offset, size, crc, "first")


def test_a_shard_that_vanishes_or_changes_after_indexing_ends_the_run(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    content = write_two(path)
    shard = index(path)
    assert read_first(path, shard) == make_image("a")
    # Other samples at the same places, a truncated file, and none.
    write_shard(path, [*sample("c", 0), *sample("d", 1)])
    with raises(RunError, str(path)):
        read_first(path, shard)
    path.write_bytes(content[: int(shard.samples.offsets[0]) + 3])
    with raises(RunError, str(path)):
        read_first(path, shard)
    path.unlink()
    with raises(MissingFileError, str(path)):
        read_first(path, shard)
    path.mkdir()
    with raises(BadImageError, "first", os.strerror(errno.EISDIR)):
        read_first(path, shard)


def test_images_above_the_size_limit_are_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "0.tar"
    write_two(path)
    shard = index(path)
    monkeypatch.setattr(tar_index, "MAX_BYTES", len(make_image("a")) - 1)
    with raises(BadImageError, "first", str(len(make_image("a")))):
        read_first(path, shard)


def test_names_in_archives_are_never_paths(tmp_path: Path) -> None:
    path = tmp_path / "inner" / "0.tar"
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    members = [("../secret.png", make_image("x")), (f"{tmp_path}/secret.png", make_image("y"))]
    write_shard(path, members)
    assert set(images_of(path, index(path)).values()) == {make_image("x"), make_image("y")}
    assert secret.read_bytes() == b"secret"


def test_format_member_escapes_what_terminals_interpret() -> None:
    assert format_member("a/Hündin.png") == "a/Hündin.png"
    assert format_member("a\x1b[31m\n.png") == r"a\x1b[31m\n.png"
    assert format_member(os.fsdecode(b"H\xfcndin")) == r"H\xfcndin"
