"""Tests of the digits dataset: every scan once, identical after every preparation."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits

from mixer_jax.data.decode import decode
from mixer_jax.data.registry import open_dataset
from mixer_jax.data.source import Example

SIZES = {"train": 1437, "test": 360}


def read(name: str, split: str, data_dir: str) -> list[Example]:
    source = open_dataset(name, split, data_dir)
    return [source.examples[index] for index in range(len(source))]


def count_examples(name: str, split: str, data_dir: str) -> Counter[tuple[bytes, str]]:
    names = open_dataset(name, split, data_dir).class_names
    return Counter((e["image"], names[e["labels"][0]]) for e in read(name, split, data_dir))


@pytest.mark.parametrize("split", SIZES)
def test_low_and_high_are_a_partition_of_all(split: str, digits_dir: str) -> None:
    all_digits = count_examples("digits", split, digits_dir)
    low, high = (
        count_examples(f"digits/{classes}", split, digits_dir) for classes in ("low", "high")
    )
    assert all_digits.total() == SIZES[split]
    assert all_digits == low + high
    assert {name for _, name in low} == set("01234")
    assert {name for _, name in high} == set("56789")


def test_digits_contains_every_scan_once(digits_dir: str) -> None:
    scans = load_digits()
    expected = Counter(
        (scan.astype(np.uint8).tobytes(), int(digit))
        for scan, digit in zip(scans.images, scans.target, strict=True)
    )
    found: Counter[tuple[bytes, int]] = Counter()
    for example in read("digits", "train+test", digits_dir):
        image = decode(example["image"])
        levels = np.rint(image[..., 0] / 255 * 16)
        # The 17 gray levels are scaled to the range of a byte, with rounding.
        assert (image == np.rint(levels * 255 / 16)[..., None]).all()
        found[levels.astype(np.uint8).tobytes(), example["labels"][0]] += 1
    assert found == expected


@pytest.mark.parametrize(
    ("name", "class_names"),
    [("digits", "0123456789"), ("digits/low", "01234"), ("digits/high", "56789")],
)
def test_class_names_are_the_digits(name: str, class_names: str, digits_dir: str) -> None:
    assert open_dataset(name, "test", digits_dir).class_names == tuple(class_names)


def test_digits_is_prepared_as_array_record(digits_dir: str) -> None:
    builder = tfds.builder_from_directory(f"{digits_dir}/digits/all/1.0.0")
    assert builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD


PREPARE = """
import sys
import sklearn.datasets
import mixer_jax.data.builders.digits
from mixer_jax.data.registry import open_dataset
print("ready", flush=True)
input()
try:
    print(len(open_dataset("digits", "train", sys.argv[1])))
finally:
    print("tensorflow" in sys.modules)
"""


@pytest.fixture(scope="module")
def shared_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data_dir shared by two other processes."""
    return str(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="module")
def outputs(shared_dir: str, root: Path) -> list[str]:
    """Output of two processes that prepare digits in one folder at the same time."""
    command, pipe = [sys.executable, "-c", PREPARE, shared_dir], subprocess.PIPE
    processes = [
        subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=root) for _ in range(2)
    ]
    for process in processes:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    return [process.communicate()[0] for process in processes]


@pytest.mark.slow
def test_preparing_digits_does_not_import_tensorflow(outputs: list[str]) -> None:
    assert [output.splitlines()[-1] for output in outputs] == ["False"] * 2


@pytest.mark.slow
def test_two_processes_can_prepare_digits_at_the_same_time(outputs: list[str]) -> None:
    assert [output.splitlines()[0] for output in outputs] == ["1437"] * 2


@pytest.mark.slow
@pytest.mark.usefixtures("outputs")
@pytest.mark.parametrize("split", SIZES)
def test_concurrent_preparation_is_identical(split: str, shared_dir: str, digits_dir: str) -> None:
    assert read("digits", split, shared_dir) == read("digits", split, digits_dir)
