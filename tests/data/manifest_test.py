"""Tests of manifests: CSV and JSONL files of paths and labels."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixer_jax.data.decode import BadImageError
from mixer_jax.data.labeled_files import check_readable
from mixer_jax.data.readers import BadImage
from mixer_jax.data.registry import list_splits, open_dataset
from mixer_jax.data.source import Source, describe_changes
from mixer_jax.errors import MissingFileError, UserError
from tests.helpers.batches import AUGMENTED, assert_identical, small_train_batches
from tests.helpers.images import encode, noise
from tests.helpers.messages import mentions, raises

PNG = encode(noise(4, 5), "PNG")
NFC, NFD = "caf\xe9", "cafe\u0301"


def write_images(root: Path, paths: Iterable[str]) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(PNG)


def write_csv(root: Path, text: str, *, name: str = "m.csv", images: Sequence[str] = ()) -> str:
    """Writes a CSV file; lines are separated by spaces in `text`."""
    write_images(root, images)
    (root / name).write_text("\n".join(text.split()) + "\n", encoding="utf-8")
    return f"manifest:{root / name}"


def write_jsonl(root: Path, *rows: Any) -> str:
    (root / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"manifest:{root / 'm.jsonl'}"


def contents(source: Source) -> dict[str, tuple[str, ...]]:
    """Returns the names of the classes of each file."""
    examples = [source.examples[index] for index in range(len(source))]
    return {
        Path(example["name"]).name: tuple(source.class_names[label] for label in example["labels"])
        for example in examples
    }


@pytest.mark.parametrize("suffix", [".csv", ".CSV", ".jsonl", ".ndjson"])
def test_rows_become_examples_of_their_split(suffix: str, tmp_path: Path) -> None:
    rows = [
        ("x/1.png", "dog", "train"),
        ("x/2.png", "cat", "Training"),
        (f"{tmp_path}/other/3.png", "dog", "val"),
        ("./x//4.png", "cat", "valid"),
        ("x/../x/5.png", "dog", "test"),
    ]
    write_images(tmp_path, (path for path, _, _ in rows))
    file = tmp_path / "lists" / f"m{suffix}"
    file.parent.mkdir()
    # Paths are relative to the folder of the manifest.
    lines = [(path if path[0] == "/" else f"../{path}", *rest) for path, *rest in rows]
    if suffix.lower() == ".csv":
        text = "path,label,split\n" + "".join(",".join(line) + "\n\n" for line in lines)
    else:
        text = "".join(
            json.dumps(dict(zip(("path", "label", "split"), line, strict=True))) + "\n\n"
            for line in lines
        )
    # As Windows writes it.
    file.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    name = f"manifest:{file}"
    source = open_dataset(name, "train")
    assert source.class_names == ("cat", "dog")
    assert not source.multi_label
    assert not source.notes
    assert contents(source) == {"1.png": ("dog",), "2.png": ("cat",)}
    assert source.examples[0]["image"] == PNG
    assert source.read_labels(0) == source.examples[0]["labels"]
    assert contents(open_dataset(name, "validation")) == {"3.png": ("dog",), "4.png": ("cat",)}
    assert contents(open_dataset(name, "test")) == {"5.png": ("dog",)}
    assert len(open_dataset(name, "train+test[:1]")) == 3
    assert list_splits(name) == ("train", "validation", "test")
    with pytest.raises(IndexError):
        source.examples[2]


def test_pipes_and_devices_are_bad_images(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    name = write_csv(tmp_path, "path,label,split pipe.png,a,train /dev/zero,a,train x.png,a,test")
    source = open_dataset(name, "train")
    for index in range(2):
        with raises(BadImageError, "regular"):
            source.examples[index]


def test_control_characters_in_class_names_are_escaped(tmp_path: Path) -> None:
    write_images(tmp_path, ["1.png", "2.png"])
    rows = [("1.png", "cat\x1b]0;title\x07"), ("2.png", "dog\x9b2J")]
    lines = [json.dumps({"path": path, "label": label, "split": "train"}) for path, label in rows]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    source = open_dataset(f"manifest:{tmp_path}/m.jsonl", "train")
    assert source.class_names == ("cat\\x1b]0;title\\x07", "dog\\x9b2J")


def test_the_same_files_have_the_order_and_identity_of_a_folder(tmp_path: Path) -> None:
    paths = [f"{name}/{number}.png" for name in ("a", "b") for number in range(20)]
    write_images(tmp_path, paths)
    rows = " ".join(f"{path},{path[0]}" for path in reversed(paths))
    name = write_csv(tmp_path, f"path,label {rows}")
    for split in ("train", "validation", "train[:30%]"):
        folder, manifest = (open_dataset(n, split) for n in (f"folder:{tmp_path}", name))
        assert [folder.examples[k] for k in range(len(folder))] == [
            manifest.examples[k] for k in range(len(manifest))
        ]
        assert folder.fingerprint().items() <= manifest.fingerprint().items()
    assert list_splits(name) == ("train", "validation")
    assert len(open_dataset(name, "test")) == 4


def test_batches_are_those_of_a_folder_with_bad_images_too(tmp_path: Path) -> None:
    paths = [f"{name}/{number}.png" for name in ("a", "b") for number in range(8)]
    write_images(tmp_path, paths)
    for number, path in enumerate(paths):
        pixels = np.full((4, 5, 3), 10 * number + 1, np.uint8)
        (tmp_path / path).write_bytes(encode(pixels, "PNG"))
    (tmp_path / "a/1.png").write_bytes(b"broken")
    name = write_csv(tmp_path, f"path,label {' '.join(f'{path},{path[0]}' for path in paths)}")
    sources = [open_dataset(n, "train") for n in (f"folder:{tmp_path}", name)]
    (tmp_path / "b/2.png").unlink()
    reports: list[dict[int, list[BadImage]]] = [{}, {}]
    folder, manifest = (
        small_train_batches(
            0, 12, preprocess=AUGMENTED, examples=s.examples, on_bad_images=report.__setitem__
        )
        for s, report in zip(sources, reports, strict=True)
    )
    assert_identical(folder, manifest)
    assert reports[0] == reports[1]
    names = {image.name for images in reports[1].values() for image in images}
    assert names == {f"{tmp_path}/a/1.png", f"{tmp_path}/b/2.png"}


def test_classes_that_are_integers_are_sorted_by_value(tmp_path: Path) -> None:
    paths = [f"{number}.png" for number in range(11)]
    rows = " ".join(f"{path},{path[:-4]},train" for path in reversed(paths))
    name = write_csv(tmp_path, f"path,label,split {rows}", images=paths)
    source = open_dataset(name, "train")
    assert source.class_names == tuple(map(str, range(11)))
    examples = [source.examples[index] for index in range(11)]
    assert all(Path(e["name"]).stem == str(e["labels"][0]) for e in examples)
    rows_of_json = [{"path": path, "label": int(path[:-4]), "split": "test"} for path in paths]
    assert open_dataset(write_jsonl(tmp_path, *rows_of_json), "test").class_names == (
        source.class_names
    )


def test_names_of_classes_are_compared_in_one_unicode_form(tmp_path: Path) -> None:
    text = f"path,label,split a.png,{NFC},train b.png,{NFD},train c.png,{NFD},test d.png,x,train"
    name = write_csv(tmp_path, text, images=["a.png", "b.png", "c.png", "d.png"])
    assert open_dataset(name, "train").class_names == (NFC, "x")
    assert contents(open_dataset(name, "test")) == {"c.png": (NFC,)}


@pytest.mark.parametrize("file_format", ["csv", "jsonl"])
def test_a_column_of_labels_allows_any_number_per_image(file_format: str, tmp_path: Path) -> None:
    expected = {"a.png": ("sky", "tree"), "b.png": (), "c.png": ("10",), "d.png": ("sky",)}
    write_images(tmp_path, expected)
    if file_format == "csv":
        text = (
            "path,labels,split a.png,sky|tree,train b.png,,train c.png,10,train d.png,sky|sky,val"
        )
        name = write_csv(tmp_path, text)
    else:
        labels: list[list[Any]] = [["sky", "tree"], [], [10], ["sky", " sky"]]
        rows = zip(expected, labels, ("train", "train", "train", "val"), strict=True)
        name = write_jsonl(tmp_path, *({"path": p, "labels": n, "split": s} for p, n, s in rows))
    train, validation = (open_dataset(name, split) for split in ("train", "validation"))
    assert train.multi_label
    assert train.class_names == validation.class_names == ("10", "sky", "tree")
    assert contents(train) | contents(validation) == expected
    check_readable(train)
    (tmp_path / "c.png").write_bytes(b"broken")
    with raises(UserError, "'10'", f"{tmp_path}/c.png"):
        check_readable(train)


def test_a_tenth_of_multi_label_data_is_held_out(tmp_path: Path) -> None:
    paths = [f"{number}.png" for number in range(30)]
    rows = " ".join(f"{path},{'a|b' if k % 2 else 'a'}" for k, path in enumerate(paths))
    name = write_csv(tmp_path, f"path,labels {rows}", images=paths)
    train, validation = (contents(open_dataset(name, s)) for s in ("train", "validation"))
    assert (len(train), len(validation)) == (27, 3)
    assert sorted([*train, *validation]) == sorted(paths)


def test_an_at_sign_selects_the_column_of_the_label(tmp_path: Path) -> None:
    text = "path,species,Genus,split 1.png,lion,cats,train 2.png,wolf,dogs,train"
    name = write_csv(tmp_path, text, name="a@b.csv", images=["1.png", "2.png"])
    source = open_dataset(f"{name}@Genus", "train")
    assert source.class_names == ("cats", "dogs")
    # A column that is not used may be a typing error, such as Split.
    (note,) = source.notes
    assert mentions(note, f"{tmp_path}/a@b.csv", "'species'")
    with raises(UserError, "family", "path, species, Genus, split"):
        open_dataset(f"{name}@family", "train")
    with raises(UserError, "label", "path, species, Genus, split"):
        open_dataset(name, "train")


def test_only_evaluation_data_needs_no_training_split(tmp_path: Path) -> None:
    text = "path,label,split 1.png,a,val 2.png,b,val"
    name = write_csv(tmp_path, text, images=["1.png", "2.png"])
    source = open_dataset(name, "test")
    assert (len(source), source.class_names) == (2, ("a", "b"))
    (note,) = source.notes
    assert mentions(note, "validation", "'test'")
    with raises(UserError, "'train'", "validation"):
        open_dataset(name, "train")


def test_missing_files_are_counted_and_bad(tmp_path: Path) -> None:
    text = "path,label 1.png,a 2.png,b sub/3.png,b sub/4.png,b"
    name = write_csv(tmp_path, text, images=["1.png", "2.png"])
    source = open_dataset(name, "all")
    (note,) = source.notes
    assert mentions(note, f"{tmp_path}/m.csv", "2", "4", f"{tmp_path}/sub")
    missing = []
    for index in range(4):
        try:
            source.examples[index]
        except BadImageError as error:
            missing.append(Path(error.name).name)
    assert sorted(missing) == ["3.png", "4.png"]
    # The first file of those that exist.
    source.check_files()
    check_readable(source)
    for path in ("1.png", "2.png"):
        (tmp_path / path).unlink()
    with pytest.raises(MissingFileError):
        source.check_files()
    with raises(UserError, f"{tmp_path}/m.csv", f"{tmp_path}/"):
        open_dataset(name, "all")


def test_images_without_any_label_can_be_read(tmp_path: Path) -> None:
    name = write_csv(tmp_path, "path,labels 1.png, 2.png,", images=["1.png", "2.png"])
    source = open_dataset(name, "all")
    check_readable(source)
    assert (source.class_names, source.read_labels(1)) == ((), ())


def test_fingerprints_do_not_depend_on_the_location(tmp_path: Path) -> None:
    text = "path,label,split 1.png,a,train 2.png,b,train"
    for folder in ("one", "two"):
        write_csv(tmp_path / folder, text, images=["1.png", "2.png"])
    one, two = (
        open_dataset(f"manifest:{tmp_path / folder}/m.csv", "train") for folder in ("one", "two")
    )
    assert one.fingerprint() == two.fingerprint()
    absolute = text.replace("1.png", f"{tmp_path}/one/1.png")
    assert open_dataset(write_csv(tmp_path / "one", absolute), "train").fingerprint() == (
        two.fingerprint()
    )
    (tmp_path / "two/1.png").write_bytes(PNG + b"x")
    assert open_dataset(f"manifest:{tmp_path}/two/m.csv", "train").fingerprint() != (
        one.fingerprint()
    )
    relabeled = write_csv(tmp_path / "one", "path,label,split 1.png,b,train 2.png,a,train")
    changes = describe_changes(one.fingerprint(), open_dataset(relabeled, "train").fingerprint())
    assert [change.split()[0] for change in changes] == ["labels"]


CSV_ERRORS = {
    "": ("path", "label"),
    "path,label": (),
    "file,label a.png,x": ("path", "file, label"),
    "path;label a.png;x": ("path", "path;label"),
    "path,label,labels a.png,x,y": ("label", "labels"),
    "path,label,label a.png,x,y": ("path, label, label",),
    "path,label a.png,x b.png": ("2", "1", "line 3"),
    "path,label a.png,x ,y": ("''", "line 3"),
    "path,label a.png,x b.png,": ("''", "line 3"),
    "path,labels a.png,x b.png,x||y": ("''", "line 3"),
    "path,label a.png,x gs://b/c.png,y": ("'gs://b/c.png'", "line 3"),
    "path,label a.png,x https://b/c.png,y": ("'https://b/c.png'", "line 3"),
    "path,label,split a.png,x,train b.png,y,holdout": ("'holdout'", "line 3", "validation"),
    "path,label,split a.png,x,train b.png,y,": ("''", "line 3", "validation"),
    "path,label,split a.png,x,train b.png,y,test": ("'y'", "train"),
    'path,label a.png,x "b.png,y': ("line 3",),
    'path,label a.png,x "b.png"c,y': ("line 3",),
    "path,label,split a.png,x,train b.png,x,train ./a.png,x,test": ("1", "'a.png'"),
    f"path,label {NFC}.png,x {NFD}.png,y": ("1", f"'{NFD}.png'", "labels"),
}


@pytest.mark.parametrize("text", CSV_ERRORS, ids=repr)
def test_malformed_csv_is_a_one_line_error(text: str, tmp_path: Path) -> None:
    name = write_csv(tmp_path, text, images=["a.png", "b.png"])
    with raises(UserError, f"{tmp_path}/m.csv", *CSV_ERRORS[text]) as caught:
        open_dataset(name, "train")
    assert "\n" not in str(caught.value)


GOOD = '{"path": "a.png", "label": "x"}'
JSONL_ERRORS = {
    "": (),
    '{"path": "a.png"}': ("label", "path"),
    f"{GOOD}\n{{": ("line 2",),
    f"{GOOD}\n[1]": ("list", "line 2"),
    f"{GOOD}\n{{}}": ("path", "line 2"),
    f'{GOOD}\n{{"path": "b.png"}}': ("label", "path", "line 2"),
    f'{GOOD}\n{{"path": "b.png", "label": "x", "split": "test"}}': ("split", "line 2"),
    f'{{"path": "a.png", "label": "x", "split": "test"}}\n{GOOD}': ("split", "line 2"),
    f'{GOOD}\n{{"path": 3, "label": "x"}}': ("path", "3", "line 2"),
    f'{GOOD}\n{{"path": "b.png", "label": null}}': ("None", "line 2"),
    f'{GOOD}\n{{"path": "b.png", "label": 1}}\n{{"path": "c.png", "label": true}}': (
        "True",
        "line 3",
    ),
    f'{GOOD}\n{{"path": "b.png", "label": 1.5}}': ("1.5", "line 2"),
    f'{GOOD}\n{{"path": "b.png", "label": ["x"]}}': ("['x']", "line 2"),
    f'{GOOD}\n{{"path": "b.png", "label": "\\ud800"}}': ("line 2",),
    f'{GOOD}\n{{"path": "\\ud800.png", "label": "x"}}': ("line 2",),
    f'{GOOD}\n{{"path": "\\u0000.png", "label": "x"}}': ("line 2",),
    '{"path": "a.png", "label": "x", "split": null}': ("split", "None", "line 1"),
    '{"path": "a.png", "label": "x", "split": "tset"}': ("'tset'", "line 1", "test"),
    '{"path": "a.png", "label": ["x"]}\n{"path": "b.png", "label": "x"}': ("'x'", "line 2"),
    "[" * 100_000: ("line 1",),
}


@pytest.mark.parametrize("text", JSONL_ERRORS, ids=lambda text: repr(text[:80]))
def test_malformed_jsonl_is_a_one_line_error(text: str, tmp_path: Path) -> None:
    write_images(tmp_path, ["a.png", "b.png"])
    (tmp_path / "m.jsonl").write_text(text)
    with raises(UserError, f"{tmp_path}/m.jsonl", *JSONL_ERRORS[text]) as caught:
        open_dataset(f"manifest:{tmp_path}/m.jsonl", "train")
    assert "\n" not in str(caught.value)


def test_other_files_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "m.txt").write_text("path,label\n")
    (tmp_path / "m.csv").write_bytes(b"path,label\na.png,x\nb.png,H\xfcndin\n")
    cases = {
        "": ("local",),
        "gs://bucket/m.csv": ("local", "gs://bucket/m.csv"),
        f"{tmp_path}/absent.csv@label": ("local", f"{tmp_path}/absent.csv"),
        f"{tmp_path}": (f"{tmp_path}", "file"),
        f"{tmp_path}/m.txt": (".txt", ".csv", ".jsonl"),
        f"{tmp_path}/m.csv": ("UTF-8",),
    }
    for path, named in cases.items():
        with raises(UserError, *named):
            open_dataset(f"manifest:{path}", "train")
    (tmp_path / "secret.csv").touch()
    if os.getuid():
        (tmp_path / "secret.csv").chmod(0)
        with raises(UserError, f"{tmp_path}/secret.csv", "Permission denied"):
            open_dataset(f"manifest:{tmp_path}/secret.csv", "train")


def test_unknown_splits_are_rejected(tmp_path: Path) -> None:
    name = write_csv(tmp_path, "path,label,split a.png,x,train b.png,x,test", images=["a.png"])
    for split in ("holdout", "train[:200%]", ""):
        with raises(UserError, repr(split), f"{tmp_path}/m.csv", "train, test"):
            open_dataset(name, split)
    with raises(UserError, "'train[:0]'", f"{tmp_path}/m.csv"):
        open_dataset(name, "train[:0]")
