"""Tests of datasets that the library `datasets` reads, which writes them here."""

import pickle
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mixer_jax.data.decode import BadImageError
from mixer_jax.data.readers import BadImage
from mixer_jax.data.registry import list_splits, open_dataset
from mixer_jax.data.source import Source, describe_changes
from mixer_jax.errors import UserError
from tests.helpers.bad_images import reason_of
from tests.helpers.batches import assert_identical, small_train_batches
from tests.helpers.images import encode, noise
from tests.helpers.messages import mentions, raises

PNG = encode(noise(4, 5), "PNG")
CLASSES = datasets.ClassLabel(names=["dog", "cat"])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps Arrow files out of the cache of the user, and the Hub out of the tests."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def image(number: int) -> bytes:
    """Returns an image that differs in a byte after its end, which decoders ignore."""
    return PNG + bytes([number])


def make(labels: list[Any], feature: Any = CLASSES, **columns: Any) -> datasets.Dataset:
    """Makes a dataset with one row per label."""
    features = {"image": datasets.Image(), "label": feature}
    rows: dict[str, Any] = {
        "image": [{"bytes": image(k), "path": f"{k}.png"} for k in range(len(labels))],
        "label": labels,
    }
    for name, (values, column_feature) in columns.items():
        rows[name], features[name] = values, column_feature
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def save(root: Path, **splits: datasets.Dataset) -> str:
    datasets.DatasetDict(splits).save_to_disk(root)
    return f"hf:{root}"


def classes(source: Source) -> list[tuple[str, ...]]:
    labels = [source.examples[index]["labels"] for index in range(len(source))]
    return [tuple(source.class_names[label] for label in row) for row in labels]


def write_hub_layout(root: Path, extension: str, **splits: datasets.Dataset) -> str:
    """Writes splits as on the Hub, in two shards each, with a card."""
    (root / "data").mkdir(parents=True)
    (root / "README.md").write_text("---\npretty_name: toy\n---\n# Toy\n")
    for split, dataset in splits.items():
        for shard in range(2):
            path = str(root / f"data/{split}-{shard:05d}-of-00002.{extension}")
            part = dataset.shard(2, shard, contiguous=True)
            if extension == "parquet":
                part.to_parquet(path)
            else:
                part.save_to_disk(root / "part")
                shutil.move(root / "part/data-00000-of-00001.arrow", path)
                shutil.rmtree(root / "part")
    return f"hf:{root}"


@pytest.mark.parametrize("layout", ["saved", "parquet", "arrow"])
def test_rows_become_examples_of_their_split(layout: str, tmp_path: Path) -> None:
    splits = {"train": make([0, 1, 1, 0, 1]), "test": make([1, 0])}
    if layout == "saved":
        name = save(tmp_path / "toy", **splits)
    else:
        name = write_hub_layout(tmp_path / "toy", layout, **splits)
    source = open_dataset(name, "train")
    assert source.class_names == ("dog", "cat")
    assert not source.multi_label
    assert not source.notes
    assert [source.examples[k]["image"] for k in range(5)] == [image(k) for k in range(5)]
    assert [source.examples[k]["labels"] for k in range(5)] == [(0,), (1,), (1,), (0,), (1,)]
    assert [source.read_labels(k) for k in range(5)] == [(0,), (1,), (1,), (0,), (1,)]
    assert source.examples[3]["name"] == f"{name} train, row 3: 3.png"
    assert classes(open_dataset(name, "test")) == [("cat",), ("dog",)]
    assert classes(open_dataset(name, "test[:1]+train[3:]")) == [("cat",), ("dog",), ("cat",)]
    assert list_splits(name) == ("train", "test")
    with pytest.raises(IndexError):
        source.examples[5]
    # As for folders, one held-out split has both names.
    (note,) = open_dataset(name, "validation").notes
    assert mentions(note, name, "test", "'validation'")
    copy = pickle.loads(pickle.dumps(source))
    assert copy.examples[4] == source.examples[4]


def test_a_dataset_without_splits_is_the_training_split(tmp_path: Path) -> None:
    make([0] * 30 + [1] * 11 + [0]).save_to_disk(tmp_path / "toy")
    name = f"hf:{tmp_path / 'toy'}"
    train, validation = (open_dataset(name, split) for split in ("train", "validation"))
    assert list_splits(name) == ("train", "validation")
    assert Counter(classes(validation)) == {("dog",): 3, ("cat",): 1}
    images = [
        source.examples[k]["image"] for source in (train, validation) for k in range(len(source))
    ]
    assert sorted(images) == [image(k) for k in range(42)]
    # In the order of the dataset.
    assert images[:38] == sorted(images[:38])
    assert images[38:] == sorted(images[38:])
    # They are not simply the first ones.
    assert images[38:41] != images[:3]
    # A slice that was saved on its own keeps the name of its split.
    part = make([0, 1])
    part.info.splits = None
    datasets.Dataset(part.data, info=part.info, split="test[:50%]").save_to_disk(tmp_path / "part")
    assert list_splits(f"hf:{tmp_path / 'part'}") == ("test",)


@pytest.mark.parametrize(
    ("labels", "feature", "expected"),
    [
        (["b", "a", " b"], datasets.Value("string"), ("a", "b")),
        ([10, 9, 10], datasets.Value("int32"), ("9", "10")),
        (["cafe\u0301", "x", "caf\xe9"], datasets.Value("large_string"), ("caf\xe9", "x")),
    ],
)
def test_texts_and_integers_are_sorted_as_in_manifests(
    labels: list[Any], feature: Any, expected: tuple[str, ...], tmp_path: Path
) -> None:
    name = save(tmp_path / "toy", train=make(labels, feature), test=make(labels[:1], feature))
    source = open_dataset(name, "train")
    assert source.class_names == expected
    names = classes(source)
    assert names[0] == names[2] != names[1]
    assert classes(open_dataset(name, "test")) == names[:1]


@pytest.mark.parametrize(
    ("labels", "feature", "expected"),
    [
        ([[1, 0], [], [0]], CLASSES, [("cat", "dog"), (), ("dog",)]),
        ([["x", "10"], [], ["x"]], datasets.Value("string"), [("x", "10"), (), ("x",)]),
        ([[3, 20], [], [3]], datasets.Value("int64"), [("3", "20"), (), ("3",)]),
    ],
)
def test_lists_are_any_number_of_labels(
    labels: list[Any], feature: Any, expected: list[tuple[str, ...]], tmp_path: Path
) -> None:
    lists = datasets.List(feature)
    name = save(
        tmp_path / "toy", train=make([*labels, None], lists), test=make(labels[::-1], lists)
    )
    source = open_dataset(name, "train[:3]")
    assert source.multi_label
    assert classes(source) == expected
    both = open_dataset(name, "train[1:3]+test")
    assert classes(both) == expected[1:] + expected[::-1]
    # A list that is missing is not an empty list.
    with raises(BadImageError, "row 3"):
        open_dataset(name, "train").examples[3]


def test_bad_rows_are_bad_images(tmp_path: Path) -> None:
    (tmp_path / "here.png").write_bytes(image(9))
    stored = [
        {"bytes": image(0), "path": None},
        None,
        {"bytes": None, "path": f"{tmp_path}/absent.png"},
        {"bytes": None, "path": f"{tmp_path}/here.png"},
        {"bytes": None, "path": "https://host/x.png"},
        {"bytes": image(5), "path": "5.png"},
        {"bytes": image(6), "path": "6.png"},
    ]
    # Written without `datasets`, which would read the files of the paths.
    schema = make([0]).features.arrow_schema
    table = pa.table({"image": stored, "label": [0, 1, 1, 1, 1, -1, None]}, schema)
    (tmp_path / "toy").mkdir()
    pq.write_table(table, tmp_path / "toy/train.parquet")
    make([-1, -1]).to_parquet(str(tmp_path / "toy/test.parquet"))
    name = f"hf:{tmp_path / 'toy'}"
    source = open_dataset(name, "train")
    good, bad = {}, {}
    for index in range(len(source)):
        try:
            good[index] = source.examples[index]["image"]
        except BadImageError as error:
            bad[index] = error
    assert good == {0: image(0), 3: image(9)}
    assert set(bad) == {1, 2, 4, 5, 6}
    assert mentions(bad[1].name, name, "train", "row 1")
    assert mentions(bad[2].name, f"{tmp_path}/absent.png")
    assert bad[5].reason == bad[6].reason != bad[1].reason
    with pytest.raises(BadImageError):
        source.read_labels(5)
    with raises(UserError, "'test'", name):
        open_dataset(name, "test")


def test_bad_rows_are_replaced_in_batches(tmp_path: Path) -> None:
    dataset = make([k % 2 for k in range(10)])
    rows = dataset.data.table.column("image").to_pylist()
    rows[3], rows[6] = {"bytes": b"broken", "path": None}, None
    table = pa.table({"image": rows, "label": dataset["label"][:]}, dataset.features.arrow_schema)
    (tmp_path / "toy").mkdir()
    pq.write_table(table, tmp_path / "toy/train.parquet")
    make([0]).to_parquet(str(tmp_path / "toy/test.parquet"))
    source = open_dataset(f"hf:{tmp_path / 'toy'}", "train")
    reports: list[dict[int, list[BadImage]]] = [{}, {}]
    batches = [
        small_train_batches(
            start, 10, examples=source.examples, on_bad_images=report.__setitem__, num_threads=start
        )
        for start, report in zip((1, 3), reports, strict=True)
    ]
    next(batches[0])
    next(batches[0])
    assert_identical(*batches)
    bad = {image for images in reports[1].values() for image in images}
    name = f"hf:{tmp_path / 'toy'} train"
    assert {image.name for image in bad} == {f"{name}, row 3", f"{name}, row 6"}
    assert BadImage(f"{name}, row 3", reason_of(b"broken")) in bad
    assert {step: reports[0][step] for step in reports[1]} == reports[1]


def test_an_at_sign_selects_the_column_of_the_label(tmp_path: Path) -> None:
    coarse = datasets.ClassLabel(names=["x", "y", "z"])
    fine = make(
        [0, 1, 0, 1], fine=([0, 1, 2, 0], coarse), number=([0.5] * 4, datasets.Value("float32"))
    )
    name = save(tmp_path / "a@b", train=fine, test=fine)
    assert open_dataset(name, "train").class_names == ("dog", "cat")
    assert open_dataset(f"{name}@fine", "train").class_names == ("x", "y", "z")
    for label in ("absent", "number", "image"):
        with raises(UserError, repr(label), "image", "label", "fine", f"{name}@fine"):
            open_dataset(f"{name}@{label}", "train")
    other = save(tmp_path / "other", train=fine.rename_column("label", "coarse"))
    with raises(UserError, f"{other}@coarse", f"{other}@fine"):
        open_dataset(other, "train")
    single = save(
        tmp_path / "single", train=fine.rename_column("label", "kind").remove_columns("fine")
    )
    assert open_dataset(single, "train").class_names == ("dog", "cat")


def test_the_column_of_images_is_found_by_type_or_name(tmp_path: Path) -> None:
    dataset = make([0, 1], mask=([{"bytes": PNG, "path": None}] * 2, datasets.Image()))
    assert open_dataset(save(tmp_path / "1", train=dataset), "all").examples[0]["image"] == image(0)
    dataset = make([0, 1]).rename_column("image", "photograph")
    assert open_dataset(save(tmp_path / "2", train=dataset), "all").examples[0]["image"] == image(0)
    masks = ([{"bytes": PNG, "path": None}] * 2, datasets.Image())
    two = make([0, 1], mask=masks).rename_column("image", "photograph")
    with raises(UserError, "photograph", "mask", "label", "image"):
        open_dataset(save(tmp_path / "3", train=two), "all")


@pytest.mark.parametrize("kind", ["binary", "struct"])
def test_parquet_of_other_programs_needs_no_features(kind: str, tmp_path: Path) -> None:
    encoded = [image(0), image(1), image(2)]
    column: Any = pa.array(encoded)
    if kind == "struct":
        column = pa.array([{"bytes": value, "path": "x.png"} for value in encoded])
    table = pa.table({"image": column, "label": ["b", "a", "b"]})
    (tmp_path / "toy").mkdir()
    pq.write_table(table, tmp_path / "toy/train.parquet")
    source = open_dataset(f"hf:{tmp_path / 'toy'}", "all")
    assert sorted(source.examples[k]["image"] for k in range(3)) == encoded
    assert source.class_names == ("a", "b")
    assert len(source.fingerprint()) == 2


def test_classes_without_examples_are_noted(tmp_path: Path) -> None:
    feature = datasets.ClassLabel(names=["a", "b", "unused"])
    name = save(tmp_path / "toy", train=make([0] * 5 + [1] * 5, feature), test=make([0], feature))
    (absent,) = open_dataset(name, "train").notes
    assert mentions(absent, name, "1", "3", "'unused'")
    (few,) = open_dataset(name, "train[:30%]").notes
    assert mentions(few, "train[:30%]", "2", "3", "'b'", "'unused'")
    assert open_dataset(name, "test").notes == ()


def test_classes_of_other_splits_must_be_known(tmp_path: Path) -> None:
    text = datasets.Value("string")
    splits = {"train": make(["a", "b"], text), "test": make(["a", "c"], text)}
    name = save(tmp_path / "toy", **splits)
    assert open_dataset(name, "train").class_names == ("a", "b")
    test = open_dataset(name, "test")
    assert test.read_labels(0) == (0,)
    with raises(BadImageError, name, "row 1"):
        test.read_labels(1)
    (note,) = test.notes
    assert mentions(note, name, "test", "1", "train")
    splits["test"] = splits["test"].remove_columns("label")
    unlabeled = save(tmp_path / "unlabeled", **splits)
    assert len(open_dataset(unlabeled, "train")) == 2
    with raises(UserError, "'test'", unlabeled):
        open_dataset(unlabeled, "test")
    only = save(tmp_path / "only", test=make(["a", "c"], text))
    assert open_dataset(only, "test").class_names == ("a", "c")
    with raises(UserError, "'train'", "test"):
        open_dataset(only, "train")


def test_fingerprints_depend_on_labels_and_images_alone(tmp_path: Path) -> None:
    dataset = make([0, 1, 1])
    first = open_dataset(save(tmp_path / "1", train=dataset, test=dataset), "train").fingerprint()
    parquet = write_hub_layout(tmp_path / "2", "parquet", train=dataset, test=dataset)
    assert open_dataset(parquet, "train").fingerprint() == first

    def changes(other: datasets.Dataset) -> list[str]:
        name = save(tmp_path / "other", train=other, test=dataset)
        source = open_dataset(name, "train")
        shutil.rmtree(tmp_path / "other")
        return describe_changes(first, source.fingerprint())

    assert changes(dataset) == []
    assert [text.split()[0] for text in changes(make([0, 1, 0]))] == ["labels"]
    larger = dataset.map(lambda row: {"image": {"bytes": PNG * 2, "path": None}})
    assert changes(larger) == ["sizes of images"]


def test_datasets_that_cannot_be_read_are_a_one_line_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "script").mkdir()
    marker = tmp_path / "executed"
    (tmp_path / "script/script.py").write_text(f"open({str(marker)!r}, 'w')")
    (tmp_path / "file").touch()
    corrupt = write_hub_layout(tmp_path / "corrupt", "parquet", train=make([0, 1]))
    (shard,) = (tmp_path / "corrupt/data").glob("train-00000*")
    shard.write_bytes(shard.read_bytes()[:-100])
    truncated = save(tmp_path / "truncated", train=make([0, 1]))
    (arrow,) = (tmp_path / "truncated/train").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[: arrow.stat().st_size // 2])
    missing = save(tmp_path / "missing", train=make([0, 1]))
    (arrow,) = (tmp_path / "missing/train").glob("*.arrow")
    arrow.unlink()
    capfd.readouterr()
    for name, named in {
        "hf:": ("local folder",),
        "hf:gs://bucket/x": ("local folder", "gs://bucket/x"),
        f"hf:{tmp_path}/absent": (f"{tmp_path}/absent", "folder"),
        f"hf:{tmp_path}/file": (f"{tmp_path}/file", "folder"),
        f"hf:{tmp_path}/empty": (f"{tmp_path}/empty",),
        f"hf:{tmp_path}/script": (f"{tmp_path}/script", "script.py"),
        corrupt: (corrupt,),
        truncated: (truncated,),
        missing: (missing, arrow.name),
        "hf:organization/name": ("organization/name", "network"),
    }.items():
        with raises(UserError, *named) as caught:
            open_dataset(name, "train")
        assert "\n" not in str(caught.value)
    assert not marker.exists()
    # Nothing but the error is printed.
    assert capfd.readouterr() == ("", "")


def test_scripts_of_datasets_are_not_executed(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "photos.py").write_text(f"open({str(tmp_path / 'created')!r}, 'w')")
    with raises(UserError, str(folder), "photos.py"):
        open_dataset(f"hf:{folder}", "train")
    assert not (tmp_path / "created").exists()


def test_configs_are_chosen_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for config, labels in (("low", [0] * 10), ("high", [1] * 10)):
        (tmp_path / "toy").mkdir(exist_ok=True)
        make(labels).to_parquet(str(tmp_path / f"toy/{config}.parquet"))
    configs = "".join(
        f"- config_name: {name}\n  data_files: {name}.parquet\n" for name in ("low", "high")
    )
    (tmp_path / "toy/README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert set(classes(open_dataset(f"hf:{tmp_path}/toy/high", "train"))) == {("cat",)}
    with raises(UserError, f"{tmp_path}/toy", "'low'", "'high'"):
        open_dataset(f"hf:{tmp_path}/toy", "train")
    with raises(UserError, "absent", "'low'", "'high'"):
        open_dataset(f"hf:{tmp_path}/toy/absent", "train")
    # On the Hub, a third part is the config.
    requested = []

    def load(*arguments: str) -> datasets.DatasetDict:
        requested.append(arguments)
        return datasets.DatasetDict(train=make([0, 1]), test=make([0]))

    monkeypatch.setattr(datasets, "load_dataset", load)
    for name in ("cifar10", "org/name", "org/name/config@label"):
        assert len(open_dataset(f"hf:{name}", "train")) == 2
    assert requested == [("cifar10",), ("org/name",), ("org/name", "config")]


def test_names_on_the_hub_are_read_from_the_cache_without_a_network(tmp_path: Path) -> None:
    local = write_hub_layout(tmp_path / "toy", "parquet", train=make([0, 1, 1]), test=make([0, 1]))
    expected = open_dataset(local, "train").fingerprint()
    shutil.rmtree(tmp_path / "toy")
    # As if it had been downloaded.
    (tmp_path / "cache/toy").rename(tmp_path / "cache/organization___toy")
    source = open_dataset("hf:organization/toy", "train")
    assert source.fingerprint() == expected
    assert source.examples[2]["name"] == "hf:organization/toy train, row 2: 2.png"


def test_unknown_splits_are_rejected(tmp_path: Path) -> None:
    name = save(tmp_path / "toy", train=make([0, 1]), test=make([0]), extra=make([1]))
    assert len(open_dataset(name, "extra")) == 1
    for split in ("holdout", "train[:200%]", ""):
        with raises(UserError, repr(split), name, "train, test, extra"):
            open_dataset(name, split)
    with raises(UserError, "'train[:0]'", name):
        open_dataset(name, "train[:0]")


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (None, object()):
        monkeypatch.setitem(sys.modules, "datasets", module)
        with raises(UserError, "hf:toy", "mixer-jax[datasets]"):
            open_dataset("hf:toy", "train")


def test_reading_imports_neither_tensorflow_nor_torch(tmp_path: Path) -> None:
    name = save(tmp_path / "toy", train=make([0, 1]), test=make([0]))
    code = (
        "import sys\n"
        "from mixer_jax.data.registry import open_dataset\n"
        f"open_dataset({name!r}, 'train').examples[1]\n"
        "print(*(set(sys.modules) & {'tensorflow', 'torch', 'jax'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("\n", "")


def test_images_are_not_copied_into_memory(tmp_path: Path) -> None:
    name = save(tmp_path / "toy", train=make([0, 1] * 50), test=make([0]))
    before = pa.total_allocated_bytes()
    source = open_dataset(name, "train")
    assert source.examples[99]["image"] == image(99)
    size = sum(len(image(k)) for k in range(100))
    assert pa.total_allocated_bytes() - before < size / 4
    assert len(pickle.dumps(source)) < 10_000
    assert np.all([source.examples[k]["labels"] == (k % 2,) for k in range(100)])


def test_lists_of_a_fixed_length_are_read(tmp_path: Path) -> None:
    dataset = make([["b", "a"], ["a", "c"]], datasets.List(datasets.Value("string"), length=2))
    name = save(tmp_path / "toy", train=dataset, test=dataset)
    assert classes(open_dataset(name, "train")) == [("b", "a"), ("a", "c")]
