"""Tests of the sources: what they hold, and what a user is told who asks for what is not there."""

import itertools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

from mixer_jax.data.decode import decode
from mixer_jax.data.registry import open_dataset
from mixer_jax.data.source import Example, Source
from mixer_jax.data.synthetic import synthetic_source
from mixer_jax.data.tfds import prepare_tfds
from mixer_jax.errors import UserError
from tests.helpers.messages import mentions, raises

PNG = cv2.imencode(".png", np.zeros((2, 2, 3), np.uint8))[1].tobytes()
IMAGE = tfds.features.Image(encoding_format="png")
LABEL = tfds.features.ClassLabel(names=["a", "b", "c"])
TOY_FEATURES = {
    "good": {"image": IMAGE, "label": LABEL},
    "without_label": {"image": IMAGE},
    "label_without_classes": {"image": IMAGE, "label": tfds.features.Scalar(np.int64)},
    "hidden_labels": {"image": IMAGE, "label": LABEL},
    # As imagenet2012_real.
    "real": {
        "image": IMAGE,
        "original_label": LABEL,
        "real_label": tfds.features.Sequence(LABEL),
        "file_name": tfds.features.Text(),
    },
}


class MixerToy(tfds.core.GeneratorBasedBuilder):
    """Three black images; defining the class is what makes TFDS know `mixer_toy`."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [tfds.core.BuilderConfig(name=name) for name in TOY_FEATURES]

    def _info(self) -> Any:
        features = tfds.features.FeaturesDict(TOY_FEATURES[self.builder_config.name])
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for index in range(3):
            label = -1 if self.builder_config.name == "hidden_labels" else index
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


def test_synthetic_examples_are_decided_by_the_split() -> None:
    train, again, test = (
        read(synthetic_source(split, num_classes=10, num_examples=100, image_size=32))
        for split in ("train", "train", "test")
    )
    assert train == again
    assert [e["labels"] for e in train] != [e["labels"] for e in test]
    assert {e["image"] for e in train}.isdisjoint(e["image"] for e in test)


def test_synthetic_labels_cover_all_classes() -> None:
    source = synthetic_source("train", num_classes=10, num_examples=1000, image_size=8)
    counts = np.bincount([example["labels"][0] for example in read(source)])
    # 100 of each are expected, with a standard deviation of 9.5.
    assert len(counts) == source.num_classes == 10
    assert counts.min() > 60


@pytest.mark.parametrize("image_size", [32, 224])
def test_synthetic_images_decode(image_size: int) -> None:
    source = synthetic_source("train", 10, 20, image_size)
    images = [decode(example["image"]) for example in read(source)]
    assert {image.shape for image in images} == {(image_size, image_size, 3)}
    assert len({image.tobytes() for image in images}) > 10
    assert min(image.std() for image in images) > 30


def test_synthetic_sizes() -> None:
    given = open_dataset("synthetic", "any", num_classes=7, num_examples=5)
    default = open_dataset("synthetic", "any")
    assert (len(given), given.num_classes) == (5, 7)
    assert (len(default), default.num_classes) == (1024, 1000)


def test_iteration_comes_to_an_end(digits_dir: str) -> None:
    for source in (synthetic_source("train", 2, 5, 8), open_dataset("digits", "test", digits_dir)):
        several_times = itertools.islice(source.examples, 3 * len(source))
        assert list(several_times) == read(source)


def bare(examples: list[Example]) -> list[tuple[bytes, tuple[int, ...]]]:
    """Returns the examples without their names, which tell the split they were asked for."""
    return [(example["image"], example["labels"]) for example in examples]


def test_slices_of_splits(digits_dir: str) -> None:
    train, test, first, rest, both = (
        read(open_dataset("digits", split, digits_dir))
        for split in ("train", "test", "train[:50%]", "train[50%:]", "train+test")
    )
    assert len(first) == 718
    assert bare(first) + bare(rest) == bare(train)
    assert bare(both) == bare(train) + bare(test)


def test_examples_are_encoded_bytes_and_plain_labels(digits_dir: str) -> None:
    source = open_dataset("digits", "test", digits_dir)
    example = source.examples[7]
    assert decode(example["image"]).shape == (8, 8, 3)
    assert [type(label) for label in example["labels"]] == [int]
    assert source.num_classes == 10


def test_data_sets_of_others_open(tmp_path: Path) -> None:
    prepare("mixer_toy/good", tmp_path, "array_record")
    source = open_dataset("mixer_toy/good", "train", str(tmp_path))
    assert sorted(example["labels"] for example in read(source)) == [(0,), (1,), (2,)]
    assert {example["image"] for example in read(source)} == {PNG}
    assert source.class_names == ("a", "b", "c")


def test_real_labels_are_several_or_none_and_files_have_names(tmp_path: Path) -> None:
    prepare("mixer_toy/real", tmp_path, "array_record")
    source = open_dataset("mixer_toy/real", "train", str(tmp_path))
    assert source.multi_label
    assert source.class_names == ("a", "b", "c")
    found = {example["name"]: example["labels"] for example in read(source)}
    place = "mixer_toy/real train: ILSVRC2012_val_"
    assert found == {f"{place}{count}.JPEG": tuple(range(count)) for count in range(3)}


def test_the_real_data_set_of_tfds_has_the_features_read_here(tmp_path: Path) -> None:
    features = tfds.builder("imagenet2012_real", data_dir=tmp_path).info.features
    kinds = {name: type(features[name]).__name__ for name in TOY_FEATURES["real"]}
    assert kinds == {
        "image": "Image",
        "original_label": "ClassLabel",
        "real_label": "Sequence",
        "file_name": "Text",
    }
    assert len(features["real_label"].feature.names) == 1000


def test_a_version_may_be_named(tmp_path: Path) -> None:
    assert len(open_dataset("digits:1.0.0", "test", str(tmp_path))) == 360


@pytest.mark.parametrize(
    "split", ["validation", "", "train[", "train[:200%]", "train[::2]", "validation[:10%]"]
)
def test_unknown_split(split: str, digits_dir: str) -> None:
    message = error_of("digits", split, digits_dir)
    assert mentions(message, repr(split), "digits", "train", "test")


def test_a_slice_of_nothing_is_called_empty(digits_dir: str) -> None:
    assert mentions(error_of("digits", "train[:0%]", digits_dir), "digits", "train[:0%]")


def test_unknown_data_set(tmp_path: Path) -> None:
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
def test_names_that_cannot_be(name: str, reason: str, tmp_path: Path) -> None:
    assert mentions(error_of(name, "train", tmp_path), reason)


def test_a_file_is_no_data_dir(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert mentions(error_of("digits", "train", tmp_path / "file"), "digits", f"{tmp_path}/file")


def advice(message: str) -> str:
    """Returns the command that an error message tells to run."""
    command = re.search(
        r"python -m mixer_jax\.prepare \S+ ('--data_dir=[^']+'|--data_dir=[^\s'`;,()]*\w)", message
    )
    assert command
    return command[0]


def advised_folder(message: str) -> str:
    """Returns the data_dir in that command, an option of a program or an argument in Python."""
    (word,) = (word for word in shlex.split(advice(message)) if "data_dir=" in word)
    folder = re.search(r"data_dir=(?:'(.*?)'|(.*))", word)
    assert folder
    return folder[1] or folder[2]


@pytest.mark.parametrize("folder", ["data", "my data"])
def test_a_data_set_not_prepared(folder: str, tmp_path: Path) -> None:
    message = error_of("mnist", "train", tmp_path / folder)
    assert mentions(message, f"{tmp_path / folder}/mnist", "--config.dataset.name=synthetic")
    assert mentions(advice(message), "mnist", "mixer_jax.prepare")
    assert advised_folder(message) == str(tmp_path / folder)


@pytest.mark.parametrize("name", ["mixer_toy/good", "digits"])
def test_a_data_set_without_random_access(name: str, tmp_path: Path) -> None:
    # Like TFDS's default, tfrecord, which would take seconds to bring TensorFlow in.
    prepare(name, tmp_path, "parquet")
    message = error_of(name, "train", tmp_path)
    assert mentions(message, name, "parquet", f"{tmp_path}/{name}")


@pytest.mark.parametrize("prepared_as", [None, "parquet"])
def test_following_the_advice_helps(prepared_as: str | None, tmp_path: Path) -> None:
    if prepared_as:
        prepare("mixer_toy/good", tmp_path, prepared_as)
    folder = advised_folder(error_of("mixer_toy/good", "train", tmp_path))
    prepare_tfds("mixer_toy/good", folder)
    assert len(open_dataset("mixer_toy/good", "train", folder)) == 3


def test_the_advised_program_starts(tmp_path: Path) -> None:
    program, *arguments = shlex.split(advice(error_of("mnist", "train", tmp_path)))
    path = Path(sys.executable).with_name(program)
    command: list[str | Path] = [path, *arguments, "--help"]
    started = subprocess.run(command, capture_output=True, text=True, check=False)
    assert started.returncode == 0, started.stderr


@pytest.mark.parametrize("config", ["without_label", "label_without_classes"])
def test_a_data_set_without_classes(config: str, tmp_path: Path) -> None:
    prepare(f"mixer_toy/{config}", tmp_path, "array_record")
    message = error_of(f"mixer_toy/{config}", "train", tmp_path)
    assert mentions(message, f"mixer_toy/{config}", *TOY_FEATURES[config])


def test_labels_that_are_hidden_are_refused(tmp_path: Path) -> None:
    prepare("mixer_toy/hidden_labels", tmp_path, "array_record")
    with raises(UserError, "mixer_toy/hidden_labels", "train"):
        read(open_dataset("mixer_toy/hidden_labels", "train", str(tmp_path)))
