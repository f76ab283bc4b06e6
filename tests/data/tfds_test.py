"""Tests of TFDS datasets: examples, and errors for missing datasets, splits and labels."""

import errno
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

from mixer_jax.data.decode import BadImageError, decode
from mixer_jax.data.readers import EvalReader, TrainReader
from mixer_jax.data.registry import open_dataset
from mixer_jax.data.source import Example, Source, mix_sources, relabel
from mixer_jax.data.tfds import prepare_tfds
from mixer_jax.errors import RunError, UserError
from tests.helpers.messages import mentions, raises

PNG = cv2.imencode(".png", np.zeros((2, 2, 3), np.uint8))[1].tobytes()
IMAGE = tfds.features.Image(encoding_format="png")
LABEL = tfds.features.ClassLabel(names=["a", "b", "c"])
TOY_FEATURES = {
    "good": {"image": IMAGE, "label": LABEL},
    "without_label": {"image": IMAGE},
    "label_without_classes": {"image": IMAGE, "label": tfds.features.Scalar(np.int64)},
    "hidden_labels": {"image": IMAGE, "label": LABEL},
    "one_hidden_label": {"image": IMAGE, "label": LABEL},
    # The features of imagenet2012_real.
    "real": {
        "image": IMAGE,
        "original_label": LABEL,
        "real_label": tfds.features.Sequence(LABEL),
        "file_name": tfds.features.Text(),
    },
}


class MixerToy(tfds.core.GeneratorBasedBuilder):
    """Three black images; defining the class registers `mixer_toy` with TFDS."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [tfds.core.BuilderConfig(name=name) for name in TOY_FEATURES]

    def _info(self) -> Any:
        features = tfds.features.FeaturesDict(TOY_FEATURES[self.builder_config.name])
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for index in range(3):
            config = self.builder_config.name
            is_hidden = config == "hidden_labels" or (config == "one_hidden_label" and index == 2)
            label = -1 if is_hidden else index
            example = {
                "image": PNG,
                "label": label,
                "original_label": label,
                "real_label": list(range(index)),
                "file_name": f"ILSVRC2012_val_{index}.JPEG",
            }
            yield index, {key: example[key] for key in self.info.features}


def prepare(name: str, data_dir: Path, file_format: str) -> None:
    tfds.builder(name, data_dir=data_dir, file_format=file_format).download_and_prepare()


def read(source: Source) -> list[Example]:
    return [source.examples[index] for index in range(len(source))]


def error_of(name: str, split: str, data_dir: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        open_dataset(name, split, str(data_dir))
    return str(caught.value)


def test_iterating_over_examples_ends(digits_dir: str) -> None:
    source = open_dataset("digits", "test", digits_dir)
    assert list(source.examples) == read(source)


def without_names(examples: list[Example]) -> list[tuple[bytes, tuple[int, ...]]]:
    """Drops the names of examples, which contain the split."""
    return [(example["image"], example["labels"]) for example in examples]


def test_split_slices_are_a_partition(digits_dir: str) -> None:
    train, test, first, rest, both = (
        read(open_dataset("digits", split, digits_dir))
        for split in ("train", "test", "train[:50%]", "train[50%:]", "train+test")
    )
    assert len(first) == 718
    assert without_names(first) + without_names(rest) == without_names(train)
    assert without_names(both) == without_names(train) + without_names(test)


def test_examples_have_encoded_images_and_int_labels(digits_dir: str) -> None:
    source = open_dataset("digits", "test", digits_dir)
    example = source.examples[7]
    assert decode(example["image"]).shape == (8, 8, 3)
    assert [type(label) for label in example["labels"]] == [int]
    assert source.num_classes == 10


def test_open_dataset_reads_user_builders(tmp_path: Path) -> None:
    prepare("mixer_toy/good", tmp_path, "array_record")
    source = open_dataset("mixer_toy/good", "train", str(tmp_path))
    assert sorted(example["labels"] for example in read(source)) == [(0,), (1,), (2,)]
    assert {example["image"] for example in read(source)} == {PNG}
    assert source.class_names == ("a", "b", "c")


def test_real_labels_are_multi_label_and_examples_have_file_names(tmp_path: Path) -> None:
    prepare("mixer_toy/real", tmp_path, "array_record")
    source = open_dataset("mixer_toy/real", "train", str(tmp_path))
    assert source.multi_label
    assert source.class_names == ("a", "b", "c")
    found = {example["name"]: example["labels"] for example in read(source)}
    prefix = "mixer_toy/real train: ILSVRC2012_val_"
    assert found == {f"{prefix}{count}.JPEG": tuple(range(count)) for count in range(3)}


def test_imagenet2012_real_has_the_expected_features(tmp_path: Path) -> None:
    features = tfds.builder("imagenet2012_real", data_dir=tmp_path).info.features
    types = {name: type(features[name]).__name__ for name in TOY_FEATURES["real"]}
    assert types == {
        "image": "Image",
        "original_label": "ClassLabel",
        "real_label": "Sequence",
        "file_name": "Text",
    }
    assert len(features["real_label"].feature.names) == 1000


def test_open_dataset_accepts_a_version(tmp_path: Path) -> None:
    assert len(open_dataset("digits:1.0.0", "test", str(tmp_path))) == 360


@pytest.mark.parametrize(
    "split", ["validation", "", "train[", "train[:200%]", "train[::2]", "validation[:10%]"]
)
def test_unknown_splits_are_an_error(split: str, digits_dir: str) -> None:
    message = error_of("digits", split, digits_dir)
    assert mentions(message, repr(split), "digits", "train", "test")


def test_empty_slices_are_an_error(digits_dir: str) -> None:
    assert mentions(error_of("digits", "train[:0%]", digits_dir), "digits", "train[:0%]")


def test_unknown_datasets_are_an_error(tmp_path: Path) -> None:
    message = error_of("imagenet_of_mine", "train", tmp_path)
    assert mentions(
        message,
        "imagenet_of_mine",
        f"{tmp_path}/imagenet_of_mine",
        "--config.dataset.data_dir",
        "--config.dataset.name=synthetic",
    )
    default = str(tfds.core.constants.DATA_DIR)
    assert mentions(error_of("imagenet_of_mine", "train", ""), "imagenet_of_mine", default)


def test_folders_without_their_prefix_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_photos" / "cat").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in ("my_photos", "./my_photos", "my_photos/", str(tmp_path / "my_photos")):
        assert mentions(error_of(name, "train", tmp_path / "data"), f"folder:{name}")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("imagenet-2012", "imagenet-2012"),
        ("", "''"),
        ("digits/lo", "low"),
        ("digits:9.9.9", "1.0.0"),
        ("mnist:0.0.1", "3.0.1"),
    ],
)
def test_invalid_names_are_an_error_with_alternatives(
    name: str, reason: str, tmp_path: Path
) -> None:
    assert mentions(error_of(name, "train", tmp_path), reason)


def test_a_file_as_data_dir_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert mentions(error_of("digits", "train", tmp_path / "file"), "digits", f"{tmp_path}/file")


def suggested_command(message: str) -> str:
    """Finds the command that an error message suggests."""
    command = re.search(
        r"python -m mixer_jax\.prepare \S+ ('--data_dir=[^']+'|--data_dir=[^\s'`;,()]*\w)", message
    )
    assert command
    return command[0]


def suggested_data_dir(message: str) -> str:
    """Finds the data_dir in the suggested command."""
    (word,) = (word for word in shlex.split(suggested_command(message)) if "data_dir=" in word)
    folder = re.search(r"data_dir=(?:'(.*?)'|(.*))", word)
    assert folder
    return folder[1] or folder[2]


@pytest.mark.parametrize("folder", ["data", "my data"])
def test_unprepared_datasets_are_an_error_with_a_command(folder: str, tmp_path: Path) -> None:
    message = error_of("mnist", "train", tmp_path / folder)
    assert mentions(message, f"{tmp_path / folder}/mnist", "--config.dataset.name=synthetic")
    assert mentions(suggested_command(message), "mnist", "mixer_jax.prepare")
    assert suggested_data_dir(message) == str(tmp_path / folder)


@pytest.mark.parametrize("name", ["mixer_toy/good", "digits"])
def test_other_formats_are_an_error(name: str, tmp_path: Path) -> None:
    # TFDS's default format, tfrecord, would import TensorFlow, which takes seconds.
    prepare(name, tmp_path, "parquet")
    message = error_of(name, "train", tmp_path)
    assert mentions(message, name, "parquet", f"{tmp_path}/{name}")


@pytest.mark.parametrize("initial_format", [None, "parquet"])
def test_preparing_in_the_suggested_data_dir_helps(
    initial_format: str | None, tmp_path: Path
) -> None:
    if initial_format:
        prepare("mixer_toy/good", tmp_path, initial_format)
    folder = suggested_data_dir(error_of("mixer_toy/good", "train", tmp_path))
    prepare_tfds("mixer_toy/good", folder)
    assert len(open_dataset("mixer_toy/good", "train", folder)) == 3


def test_the_suggested_command_exists(tmp_path: Path) -> None:
    program, *arguments = shlex.split(suggested_command(error_of("mnist", "train", tmp_path)))
    path = Path(sys.executable).with_name(program)
    command: list[str | Path] = [path, *arguments, "--help"]
    started = subprocess.run(command, capture_output=True, text=True, check=False)
    assert started.returncode == 0, started.stderr


@pytest.mark.parametrize("config", ["without_label", "label_without_classes"])
def test_datasets_without_classes_are_an_error(config: str, tmp_path: Path) -> None:
    prepare(f"mixer_toy/{config}", tmp_path, "array_record")
    message = error_of(f"mixer_toy/{config}", "train", tmp_path)
    assert mentions(message, f"mixer_toy/{config}", *TOY_FEATURES[config])


def test_one_hidden_label_is_a_bad_image_wherever_it_is_read(tmp_path: Path) -> None:
    prepare("mixer_toy/one_hidden_label", tmp_path, "array_record")
    source = open_dataset("mixer_toy/one_hidden_label", "train", str(tmp_path))
    relabeled = relabel(source, ("d", "c", "b", "a"))
    mixed = mix_sources([source, relabeled], (1.0, 1.0))
    hidden, labels = [], []
    for index in range(6):
        try:
            example = mixed.examples[index]
        except BadImageError as error:
            hidden.append(str(error))
            with pytest.raises(BadImageError, match=re.escape(hidden[-1])):
                mixed.read_labels(index)
        else:
            labels += example["labels"]
            assert mixed.read_labels(index) == example["labels"]
    # Once more, as a class of the mixture.
    assert sorted(labels) == [0, 0, 1, 1]
    assert len(hidden) == 2
    assert all(mentions(text, "mixer_toy/one_hidden_label", "train", "-1") for text in hidden)

    preprocess = {"train_crop": "resize", "min_area": 1.0, "max_shift": 0, "flip": False}
    preprocess |= {"randaugment_layers": 0, "randaugment_magnitude": 0.0}
    reader = TrainReader(source, 0, 8, preprocess)
    batch = reader(np.arange(30))
    (bad,) = set(batch.bad_images)
    assert hidden[0].startswith(bad.name)
    assert set(batch.arrays["label"].tolist()) == {0, 1}
    evaluated = EvalReader(source, (8, 8), "resize", False)(np.arange(3))
    assert evaluated.bad_images == [bad]
    assert evaluated.arrays["mask"].sum() == 2


def test_damaged_records_are_bad_images(digits_dir: str, tmp_path: Path) -> None:
    shutil.copytree(f"{digits_dir}/digits", tmp_path / "digits")
    (path,) = (tmp_path / "digits" / "all").rglob("digits-train.array_record*")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    source = open_dataset("digits", "train", str(tmp_path))
    bad = []
    for index in range(len(source)):
        try:
            source.examples[index]
        except BadImageError as error:
            bad.append((index, error.name))
    ((index, name),) = bad
    assert mentions(name, "digits", "train", str(index))
    with pytest.raises(BadImageError):
        source.read_labels(index)


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("dataset_info.json", b'{"name": "photos"', ()),
        ("dataset_info.json", b"\xff", ()),
        (
            "dataset_info.json",
            b'{"name": "photos", "version": "1.0.0", "fileFormat": "array_record"}',
            ("splits", "none"),
        ),
        ("features.json", b"{", ()),
        ("features.json", b'{"pythonClassName": 1}', ("pythonClassName",)),
    ],
)
def test_damaged_metadata_is_an_error(
    name: str, content: bytes, parts: tuple[str, ...], digits_dir: str, tmp_path: Path
) -> None:
    # Under another name, because the code of `digits` knows the features.
    shutil.copytree(f"{digits_dir}/digits/all", tmp_path / "photos")
    (folder,) = (tmp_path / "photos").iterdir()
    info = (folder / "dataset_info.json").read_text().replace('"digits"', '"photos"')
    (folder / "dataset_info.json").write_text(info)
    (folder / name).write_bytes(content)
    error = error_of("photos", "train", tmp_path)
    assert mentions(error, "photos", str(tmp_path), "--data_dir", *parts)
    assert "Did you mean" not in error


@pytest.fixture
def sharded_dir(tmp_path: Path) -> Path:
    """Data folder with `digits` in five files per split."""
    builder = tfds.builder("digits", data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=5))
    return tmp_path


def remove_file(path: Path) -> None:
    path.unlink()


def truncate_file(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty_file(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize("damage", [remove_file, truncate_file, empty_file])
@pytest.mark.parametrize("split", ["train", "test+train[:100%]"])
def test_files_that_cannot_be_read_are_an_error_and_no_bad_images(
    damage: Callable[[Path], None], split: str, sharded_dir: Path
) -> None:
    expected = read(open_dataset("digits", split, str(sharded_dir)))
    shard_lengths = tfds.builder("digits", data_dir=sharded_dir).info.splits["train"].shard_lengths
    (path,) = sharded_dir.rglob("digits-train.array_record-00003-of-00005")
    # Opened again, since readers keep files open.
    source = open_dataset("digits", split, str(sharded_dir))
    damage(path)
    start = (0 if split == "train" else 360) + sum(shard_lengths[:3])
    lost = range(start, start + shard_lengths[3])
    for index, example in enumerate(expected):
        if index in lost:
            with raises(RunError, "digits", split, str(index), str(path)):
                source.examples[index]
        else:
            assert source.examples[index] == example
    with raises(RunError, str(path)):
        source.read_labels(lost[0])
    for file in sharded_dir.rglob("*-00000-of-00005"):
        damage(file)
    with raises(RunError, "-00000-of-00005"):
        open_dataset("digits", split, str(sharded_dir))


def test_too_many_open_files_are_an_error_and_no_bad_images(sharded_dir: Path) -> None:
    source = open_dataset("digits", "train", str(sharded_dir))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The smallest number that no file has.
    limit = os.dup(0)
    os.close(limit)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        with pytest.raises(RunError) as caught:
            source.examples[len(source) - 1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert mentions(str(caught.value), "00004-of-00005", os.strerror(errno.EMFILE), "ulimit -n")


def test_labels_are_read_without_images(
    digits_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare("mixer_toy/real", tmp_path, "array_record")
    real = open_dataset("mixer_toy/real", "train", str(tmp_path))
    assert [real.read_labels(index) for index in range(3)] == [e["labels"] for e in read(real)]
    expected = [example["labels"] for example in read(open_dataset("digits", "test", digits_dir))]

    def refuse(image: bytes) -> bytes:
        pytest.fail("an image was read")

    monkeypatch.setattr("mixer_jax.data.tfds.image_fixup", lambda name: refuse)
    source = open_dataset("digits", "test", digits_dir)
    with pytest.raises(pytest.fail.Exception):
        read(source)
    assert [source.read_labels(index) for index in range(len(source))] == expected


def test_hidden_labels_are_an_error(tmp_path: Path) -> None:
    prepare("mixer_toy/hidden_labels", tmp_path, "array_record")
    with raises(UserError, "mixer_toy/hidden_labels", "train"):
        read(open_dataset("mixer_toy/hidden_labels", "train", str(tmp_path)))
