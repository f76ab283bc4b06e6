"""Tests of datasets in WebDataset format: layouts, splits, labels, order, and common mistakes."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from webdataset.tariterators import group_by_keys, tar_file_expander

from mixer_jax.data import tar_index
from mixer_jax.data.decode import BadImageError
from mixer_jax.data.readers import EvalReader
from mixer_jax.data.registry import list_splits, open_dataset
from mixer_jax.data.source import BAD_LABEL, Source, describe_changes
from mixer_jax.data.webdataset import expand_braces
from mixer_jax.errors import MissingFileError, RunError, UserError
from tests.helpers.batches import AUGMENTED, assert_identical, small_train_batches
from tests.helpers.messages import mentions, raises
from tests.helpers.shards import (
    Member,
    json_sample,
    make_image,
    sample,
    write_dataset,
    write_shard,
)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps indexes that cannot be stored next to the shards out of the home directory."""
    monkeypatch.setattr(tar_index, "_CACHE", tmp_path_factory.mktemp("cache"))


def open_shards(path: Path | str, split: str = "train") -> Source:
    return open_dataset(f"wds:{path}", split)


def error_of(path: Path | str, split: str = "train") -> str:
    with pytest.raises(UserError) as caught:
        open_shards(path, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names(path: Path | str, split: str = "train") -> list[str]:
    source = open_shards(path, split)
    return [Path(source.examples[index]["name"]).stem for index in range(len(source))]


def labels(source: Source) -> dict[str, tuple[int, ...]]:
    examples = [source.examples[index] for index in range(len(source))]
    return {Path(example["name"]).stem: example["labels"] for example in examples}


def write_json_shard(path: Path, samples: dict[str, dict[str, Any]]) -> None:
    write_shard(path, [m for key, fields in samples.items() for m in json_sample(key, **fields)])


def write_labels(path: Path, *values: Any) -> None:
    """Writes a shard with samples "0", "1", … that have these labels."""
    write_json_shard(path, {str(number): {"label": value} for number, value in enumerate(values)})


def test_images_and_labels_are_those_of_the_shards(tmp_path: Path) -> None:
    write_dataset(tmp_path, {"train": 25, "validation": 4}, num_classes=5)
    source = open_shards(tmp_path)
    assert source.class_names == ("0", "1", "2", "3", "4")
    assert not source.multi_label
    assert not source.notes
    found = {example["name"]: example for example in (source.examples[i] for i in range(25))}
    shard = tmp_path / "toy-train-0001.tar"
    example = found[f"{shard}/train00013.png"]
    assert (example["labels"], example["image"]) == ((3,), make_image("train00013"))
    assert len(found) == len(source) == 25
    assert len(open_shards(tmp_path, "validation")) == len(open_shards(tmp_path, "test")) == 4
    assert [source.read_labels(i) for i in range(25)] == [
        source.examples[i]["labels"] for i in range(25)
    ]
    with pytest.raises(IndexError):
        source.examples[25]


def test_shards_of_the_webdataset_library_are_read_identically(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    written = {}
    for shard in range(3):
        path = tmp_path / f"photos-train-{shard:06d}.tar"
        with wds.TarWriter(str(path)) as writer:
            for number in range(7):
                key = f"dir/{shard}_{number}"
                image = rng.integers(0, 256, (6, 5, 3), np.uint8)
                label = int(rng.integers(4))
                json_fields = {"label": label, "caption": "a cat"}
                writer.write({"__key__": key, "jpg": image, "cls": label, "json": json_fields})
                written[f"{key}.jpg"] = label
    # Its own reader sees the same samples.
    theirs = {}
    for path in sorted(tmp_path.glob("*.tar")):
        with path.open("rb") as stream:
            for item in group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}])):
                theirs[f"{path}/{item['__key__']}.jpg"] = (item["jpg"], (int(item["cls"]),))
    source = open_shards(tmp_path, "train+validation")
    examples = [source.examples[index] for index in range(len(source))]
    ours = {example["name"]: (example["image"], example["labels"]) for example in examples}
    assert ours == theirs
    assert len(ours) == 21
    read = {name.split(".tar/")[1]: label for name, (_, (label,)) in ours.items()}
    assert read == written


def write_timm(root: Path) -> None:
    """Writes a dataset in the layout of timm's imagenet-1k-wds."""
    info: dict[str, Any] = {"name": "imagenet1k", "splits": {}}
    for split, digits, shards in (("train", 4, 3), ("validation", 2, 2)):
        filenames = [f"imagenet1k-{split}-{n:0{digits}d}.tar" for n in range(shards)]
        for number, name in enumerate(filenames):
            members: list[Member] = []
            for k in range(10):
                key = f"n0144{k:04d}_{split[0]}{number}"
                members += [
                    (f"{key}.cls", str(k).encode()),
                    (f"{key}.jpg", make_image(key)),
                    (f"{key}.json", json.dumps({"filename": f"{key}.JPEG", "label": k}).encode()),
                ]
            write_shard(root / name, members)
        info["splits"][split] = {
            "name": split,
            "num_samples": 10 * shards,
            "filenames": filenames,
            "shard_lengths": [10] * shards,
        }
    (root / "_info.json").write_text(json.dumps(info))


def test_timms_layout(tmp_path: Path) -> None:
    write_timm(tmp_path)
    assert not open_shards(tmp_path).notes
    assert len(open_shards(tmp_path)) == 30
    assert len(open_shards(tmp_path, "validation")) == 20
    assert list_splits(f"wds:{tmp_path}") == ("train", "validation")
    # One more shard, and one that is missing.
    write_dataset(tmp_path, {"train": 3})
    assert mentions(error_of(tmp_path), "5", "6", "toy-train-0000.tar", "_info.json")
    (tmp_path / "toy-train-0000.tar").unlink()
    (tmp_path / "imagenet1k-train-0001.tar").unlink()
    assert mentions(error_of(tmp_path), "5", "4", "imagenet1k-train-0001.tar")
    pattern = tmp_path / "imagenet1k-{train-{0000,0002},validation-{00..01}}.tar"
    assert len(open_shards(pattern)) == len(open_shards(pattern, "validation")) == 20


@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b'{"splits": {"train": {}}}', b'{"splits": {"train": {"filenames": 3}}}'],
)
def test_a_damaged_info_file_is_rejected(content: bytes, tmp_path: Path) -> None:
    write_dataset(tmp_path, {"train": 3})
    (tmp_path / "_info.json").write_bytes(content)
    assert mentions(error_of(tmp_path), f"{tmp_path}/_info.json")


def test_folders_of_shards_are_splits(tmp_path: Path) -> None:
    # As in the datasets of CLIP benchmark.
    for split, count in (("train", 12), ("test", 5)):
        members = [m for n in range(count) for m in sample(f"s{n:07d}", n % 2)]
        write_shard(tmp_path / split / "0.tar", members)
    (tmp_path / "classnames.txt").write_text("tench\ngoldfish\n")
    source = open_shards(tmp_path)
    assert source.class_names == ("tench", "goldfish")
    assert len(source) == 12
    assert len(open_shards(tmp_path, "test")) == 5
    # A part of it is a dataset as well.
    assert len(open_shards(tmp_path / "test", "test")) == 5
    assert len(open_shards(f"{tmp_path}/{{train,test}}/0.tar", "test")) == 5


def test_class_names_must_suffice_and_differ(tmp_path: Path) -> None:
    write_dataset(tmp_path, {"train": 6, "test": 6}, num_classes=3)
    path = tmp_path / "classnames.txt"
    path.write_text("a\nb\n")
    assert mentions(error_of(tmp_path), str(path), "2")
    path.write_text("crane\nb\ncrane\n")
    assert mentions(error_of(tmp_path), str(path), "2")
    path.write_text("a\nb\nc\nd\n")
    source = open_shards(tmp_path)
    assert source.class_names == ("a", "b", "c", "d")
    (note,) = source.notes
    assert mentions(note, "1", "4", "d")


@pytest.mark.parametrize(
    ("shard", "split"),
    [
        ("imagenet-val-000000.tar", "validation"),
        ("imagenet_val-000000-val.tar", "validation"),
        ("Test-0.tar", "test"),
        ("test_photos.train.0001.tar", "train"),
        ("training_0.tar", "train"),
        ("dev/0.tar", "validation"),
        ("dev/train-0.tar", "train"),
    ],
)
def test_splits_follow_from_the_names_of_shards(shard: str, split: str, tmp_path: Path) -> None:
    other = "train-9.tar" if split != "train" else "test-9.tar"
    write_shard(tmp_path / shard, [*sample("a", 0), *sample("b", 1)])
    write_shard(tmp_path / other, [*sample("c", 0), *sample("d", 1)])
    assert sorted(names(tmp_path, split)) == ["a", "b"]


def test_shards_without_the_name_of_a_split_are_rejected_next_to_others(tmp_path: Path) -> None:
    write_dataset(tmp_path, {"train": 3})
    write_shard(tmp_path / "extra-0.tar", sample("a", 0))
    assert mentions(error_of(tmp_path), "extra-0.tar", "toy-train-0000.tar")


def test_a_tenth_of_every_class_is_held_out_without_a_split(tmp_path: Path) -> None:
    # As img2dataset names its shards.
    samples = [m for n in range(60) for m in sample(f"{n:09d}", n % 3)]
    write_shard(tmp_path / "00000.tar", samples)
    train, validation = open_shards(tmp_path), open_shards(tmp_path, "validation")
    assert Counter(labels(validation).values()) == {(0,): 2, (1,): 2, (2,): 2}
    assert len(labels(train) | labels(validation)) == 60
    assert list_splits(f"wds:{tmp_path}") == ("train", "validation")
    assert not train.notes
    assert len(open_shards(tmp_path, "all")) == 60


def test_order_does_not_depend_on_location_or_division_into_shards(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", {"train": 40}, per_shard=40)
    write_dataset(tmp_path / "b/c", {"train": 40}, per_shard=7)
    one, other = open_shards(tmp_path / "a"), open_shards(tmp_path / "b/c")
    assert names(tmp_path / "a") == names(tmp_path / "b/c")
    assert names(tmp_path / "a") != sorted(names(tmp_path / "a"))
    assert one.fingerprint() == other.fingerprint()
    assert_identical_batches(one, other)
    # Slices contain all classes, although neighbors are similar in many datasets.
    assert len(set(labels(open_shards(tmp_path / "a", "train[:50%]")).values())) > 7


def test_a_folder_of_the_same_images_has_the_same_batches(tmp_path: Path) -> None:
    members: list[Member] = []
    for name in ("cat", "dög"):
        for number in range(15):
            key = f"{name}/{number}"
            path = tmp_path / "folder" / f"{key}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(make_image(key))
            members += [(f"{key}.cls", name.encode()), (f"{key}.png", make_image(key))]
    write_shard(tmp_path / "shards" / "0.tar", members[:30])
    write_shard(tmp_path / "shards" / "1.tar", members[30:])
    for split in ("train", "validation"):
        folder = open_dataset(f"folder:{tmp_path}/folder", split)
        shards = open_shards(tmp_path / "shards", split)
        assert folder.class_names == shards.class_names == ("cat", "dög")
        assert len(folder) == len(shards) > 2
        assert_identical_batches(folder, shards)


def assert_identical_batches(left: Source, right: Source) -> None:
    batches = [
        small_train_batches(0, 12, examples=source.examples, preprocess=AUGMENTED)
        for source in (left, right)
    ]
    assert_identical(*batches)


def test_labels_may_be_names(tmp_path: Path) -> None:
    write_labels(tmp_path / "train-0.tar", "dog", "cat", "Hu\u0308ndin", "cat")
    write_labels(tmp_path / "test-0.tar", "dog")
    source = open_shards(tmp_path)
    assert source.class_names == ("H\u00fcndin", "cat", "dog")
    assert labels(source) == {"0": (2,), "1": (1,), "2": (0,), "3": (1,)}
    # Perhaps misspelled.
    write_labels(tmp_path / "test-0.tar", "dogg")
    (note,) = open_shards(tmp_path).notes
    assert mentions(note, "1", "4", "dogg")
    # Integers are names next to others, and with zeros in front.
    write_labels(tmp_path / "test-0.tar", 7)
    assert open_shards(tmp_path).class_names == ("7", "H\u00fcndin", "cat", "dog")
    for split in ("train", "test"):
        write_labels(tmp_path / f"{split}-0.tar", "007", "010")
    assert open_shards(tmp_path).class_names == ("007", "010")


def test_integers_without_training_images_are_noted(tmp_path: Path) -> None:
    write_labels(tmp_path / "train-0.tar", 0, 3)
    write_json_shard(tmp_path / "test-0.tar", {"t": {"label": 4}})
    source = open_shards(tmp_path)
    assert source.class_names == ("0", "1", "2", "3", "4")
    (note,) = source.notes
    assert mentions(note, "3", "5", "'1', '2', '4'")
    assert open_shards(tmp_path, "test").notes == ()


def test_labels_may_be_lists(tmp_path: Path) -> None:
    write_labels(tmp_path / "train-0.tar", [2, 0], [1], [], 2)
    write_labels(tmp_path / "test-0.tar", [0])
    source = open_shards(tmp_path)
    assert source.multi_label
    assert source.class_names == ("0", "1", "2")
    assert labels(source) == {"0": (0, 2), "1": (1,), "2": (), "3": (2,)}
    write_labels(tmp_path / "train-0.tar", ["b", "a"], ["a"])
    write_labels(tmp_path / "test-0.tar", ["b"])
    assert labels(open_shards(tmp_path)) == {"0": (0, 1), "1": (0,)}


def test_a_class_that_is_held_out_entirely_is_noted(tmp_path: Path) -> None:
    write_labels(tmp_path / "0.tar", *(["common"] for _ in range(20)))
    (rare,) = labels(open_shards(tmp_path, "validation[:1]"))
    values = [["common", "rare"] if str(number) == rare else ["common"] for number in range(20)]
    write_labels(tmp_path / "0.tar", *values)
    source = open_shards(tmp_path)
    assert source.class_names == ("common", "rare")
    (note,) = source.notes
    assert mentions(note, "1", "2", "rare")


@pytest.mark.parametrize(
    ("values", "named"),
    [(([1, 0, 0, 1],), ["list", "'0.json'"]), ((3, 5_000_000), ["1000000", "5000000", "@FIELD"])],
)
def test_labels_that_are_not_classes_are_rejected(
    values: tuple[Any, ...], named: list[str], tmp_path: Path
) -> None:
    write_labels(tmp_path / "train-0.tar", *values)
    assert mentions(error_of(tmp_path), *named)


def test_a_field_is_selected_by_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "me@home"
    write_json_shard(
        folder / "train-0.tar",
        {str(n): {"caption": "x", "animal": "ab"[n % 2], "label_12k": n - 1} for n in range(6)},
    )
    source = open_shards(f"{folder}@animal", "all")
    assert source.class_names == ("a", "b")
    assert source.name.startswith(f"wds:{folder}@animal")
    # timm marks samples that are not in a subset of the classes by -1.
    subset = open_shards(f"{folder}/train-{{0..0}}.tar@label_12k", "all")
    assert subset.class_names == ("0", "1", "2", "3", "4")
    assert any(mentions(note, "1", "bad") for note in subset.notes)
    message = error_of(folder)
    assert mentions(message, ".cls", ".json", ".png", "caption", "animal", "label_12k", "@FIELD")
    assert mentions(error_of(f"{folder}@animals"), "'animals'", "caption", "animal", "label_12k")
    # An index for each field, and one without.
    assert len(list(folder.glob("*.npz"))) == 4


def test_samples_without_a_label_are_bad_images(tmp_path: Path) -> None:
    write_labels(tmp_path / "train-0.tar", 0, None, "", 1, {"a": 1}, [[1]], 0.5)
    write_labels(tmp_path / "test-0.tar", None, None)
    source = open_shards(tmp_path)
    assert len(source) == 7
    assert mentions(source.notes[0], str(tmp_path), "5")
    bad = []
    for index in range(7):
        try:
            assert source.examples[index]["labels"] == source.read_labels(index)
        except BadImageError as error:
            bad.append((Path(error.name).parent.name, error.reason))
    assert len(bad) == 5
    assert set(bad) == {("train-0.tar", BAD_LABEL)}
    assert mentions(error_of(tmp_path, "test"), "'test'", "2")


def test_samples_without_an_image_are_counted(tmp_path: Path) -> None:
    members = [*sample("a", 0), *sample("b", 1), ("c.json", b"{}"), ("d.cls", b"1")]
    write_shard(tmp_path / "train-0.tar", [*members, ("README.md", b"")])
    write_shard(tmp_path / "train-1.tar", [])
    (note,) = open_shards(tmp_path, "all").notes
    assert mentions(note, str(tmp_path), "2")


def test_names_that_repeat_in_other_shards_are_examples_of_their_own(tmp_path: Path) -> None:
    for shard in range(3):
        images = [make_image(f"{key}{shard}") + bytes(shard) for key in "ab"]
        members = [
            m for key, image in zip("ab", images, strict=True) for m in sample(key, 0, image)
        ]
        write_shard(tmp_path / f"train-{shard}.tar", members)
    source = open_shards(tmp_path, "all")
    assert len({source.examples[index]["image"] for index in range(6)}) == 6
    assert not source.notes


def test_corrupt_images_are_bad_images(tmp_path: Path) -> None:
    members = [*sample("a", 0), *sample("b", 1), *sample("c", 1, make_image("c")[:50])]
    write_shard(tmp_path / "test-0.tar", members)
    batch = EvalReader(open_shards(tmp_path, "test"), (8, 8), "resize", False)(np.arange(3))
    (bad,) = batch.bad_images
    assert bad.name == f"{tmp_path}/test-0.tar/c.png"
    assert batch.arrays["mask"].sum() == 2


def test_members_that_are_not_images_are_listed(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [("a.npy", b"0"), ("a.cls", b"0"), ("b.v1.jpg", b"")])
    assert mentions(error_of(tmp_path), ".npy", ".cls", ".v1.jpg")


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("", ["''"]),
        ("missing", ["missing"]),
        ("https://host/train-{0..3}.tar", ["https://host/train-{0..3}.tar"]),
        ("pipe:cat x.tar", ["pipe:cat x.tar"]),
        ("toy-train-{0000..0004}.tar", ["3", "5", "toy-train-0002.tar"]),
        ("*.tgz", ["*.tgz"]),
        ("empty", ["folder:", "empty"]),
        ("packed", ["not compressed"]),
    ],
)
def test_paths_without_shards_are_rejected(
    path: str, named: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path, {"train": 20})
    (tmp_path / "empty").mkdir()
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed/a.tar.gz").touch()
    assert mentions(error_of(path), *named)


def test_unknown_splits_are_rejected_with_the_known_ones(tmp_path: Path) -> None:
    write_dataset(tmp_path, {"train": 3, "test": 3})
    assert mentions(error_of(tmp_path, "tset"), "'tset'", "train", "test")
    assert mentions(error_of(tmp_path, "train[:0]"), "train[:0]")


def test_patterns_select_the_same_shards_as_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "data", {"train": 40, "test": 5})
    (tmp_path / "data/.cache").mkdir()
    write_dataset(tmp_path / "data/.cache", {"train": 5})
    expected = open_shards("data")
    for pattern in ("data/*.tar", "data/toy-{train-{0000..0003},test-0000}.tar", "./data/"):
        source = open_shards(pattern)
        assert source.fingerprint() == expected.fingerprint()
        assert len(source) == 40
    assert len(open_shards("data/toy-train-*.tar", "all")) == 40
    assert len(open_shards("data/toy-train-0003.tar", "all")) == 10
    assert [file.name for file in (tmp_path / "data").glob("*.npz")] == ["mixer_jax_index.npz"]


@pytest.mark.parametrize(
    "pattern",
    ["a", "a{0..3}b", "{08..11}", "{3..1}", "{9..11}", "{a,b}{1..2}", "x{a,b{1..2}}", "{,a}"],
)
def test_expand_braces_agrees_with_the_webdataset_library(pattern: str) -> None:
    assert expand_braces(pattern) == sorted(wds.shardlists.expand_urls(pattern))


def test_the_fingerprint_changes_with_names_sizes_and_labels(tmp_path: Path) -> None:
    def fingerprint(*members: Member) -> dict[str, str]:
        write_shard(tmp_path / "train-0.tar", members)
        return open_shards(tmp_path, "all").fingerprint()

    base = [*sample("a", 0), *sample("b", 1)]
    first = fingerprint(*base)
    assert fingerprint(*reversed(base)) == first
    assert describe_changes(first, fingerprint(*base, *sample("c", 0))) != []
    (change,) = describe_changes(first, fingerprint(*sample("a", 0), *sample("b", 1, b"x")))
    assert change.startswith("sizes")
    (change,) = describe_changes(first, fingerprint(*sample("a", 1), *sample("b", 0)))
    assert change.startswith("labels")


def test_check_files_finds_shards_that_are_missing_or_incomplete(tmp_path: Path) -> None:
    write_dataset(tmp_path, {"train": 40, "test": 3}, per_shard=6)
    source = open_shards(tmp_path)
    source.check_files()
    path = tmp_path / "toy-train-0004.tar"
    content = path.read_bytes()
    path.write_bytes(content[:100])
    with raises(RunError, str(path)):
        source.check_files()
    path.unlink()
    with raises(MissingFileError, str(path)):
        source.check_files()
    # Shards of other splits need not be there.
    (tmp_path / "toy-test-0000.tar").unlink()
    path.write_bytes(content)
    source.check_files()


def test_copies_of_another_host_are_read_and_replaced_shards_noticed(tmp_path: Path) -> None:
    write_dataset(tmp_path, {"train": 12, "test": 3}, per_shard=6)
    source = open_shards(tmp_path)
    images = [example["image"] for example in source.examples]
    first, second = (tmp_path / f"toy-train-000{shard}.tar" for shard in range(2))
    for path in (first, second):
        # A copy has the time at which it was made.
        os.utime(path, ns=(1, 1))
    source.check_files()
    assert [example["image"] for example in source.examples] == images
    assert first.stat().st_size == second.stat().st_size
    first.write_bytes(second.read_bytes())
    with raises(RunError, str(first)):
        list(source.examples)


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    assert mentions(error_of(tmp_path / "absent"), f"'{tmp_path}/absent'", "does not exist")
    # A pattern may only be incomplete.
    assert mentions(error_of(f"{tmp_path}/train-{{0..2}}.tar"), "3 of 3")
