"""Tests of npz archives that are damaged, or made to do harm."""

import io
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixer_jax.checkpoints.load import load_checkpoint
from tests.helpers import pretrained_files
from tests.helpers.corrupt_files import (
    SMALLEST,
    assert_rejected,
    fuzz,
    load_or_error,
    refusals_in_little_memory,
)
from tests.helpers.messages import mentions
from tests.helpers.pretrained_files import deflated_zeros, npy, npy_header, zip_of
from tests.helpers.random_weights import assert_params_equal, random_weights

TERABYTES = (10**6, 10**6)
KERNEL = "stem/kernel.npy"


def archive(**changes: Any) -> bytes:
    """A good archive with some tensors changed, or left out if they are None."""
    tensors = pretrained_files.google(random_weights().params) | changes
    file = io.BytesIO()
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    np.savez(file, allow_pickle=True, **kept)
    return file.getvalue()


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


class Malicious:
    """What makes a file when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def test_a_program_in_an_archive_is_refused_and_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    evil = np.array([Malicious(trace)], object)
    path = write(tmp_path / "evil.npz", archive(**{"stem/bias": evil}))
    assert mentions(assert_rejected(path), "stem/bias")
    assert not trace.exists()
    with np.load(path, allow_pickle=True) as loaded:
        loaded["stem/bias"]
    assert trace.exists()


def with_number(value: float) -> np.ndarray:
    kernel = pretrained_files.google(random_weights().params)["head/kernel"].copy()
    kernel[3, 4] = value
    return kernel


NORM = "MixerBlock_1/LayerNorm_1/scale"
BAD_TENSORS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "missing": ({NORM: None}, [NORM]),
    "missing head": ({"head/bias": None}, ["head/bias"]),
    "missing stem": ({"stem/kernel": None}, ["stem/bias"]),
    "missing block": (
        {name: None for name in pretrained_files.google(random_weights().params) if "k_0/" in name},
        ["MixerBlock_0/LayerNorm_0/scale"],
    ),
    "extra": ({"extra": np.zeros(3, np.float32)}, ["extra"]),
    "far block": (
        {f"MixerBlock_{10**12}/LayerNorm_0/scale": np.zeros(16, np.float32)},
        ["MixerBlock_1000000000000/LayerNorm_0/scale"],
    ),
    "far block, few digits": (
        {"MixerBlock_77/LayerNorm_0/scale": np.zeros(16, np.float32)},
        ["MixerBlock_2/LayerNorm_0/scale"],
    ),
    "shape": ({NORM: np.zeros(17, np.float32)}, [NORM, "17", "16"]),
    "axes": ({"stem/kernel": np.zeros((4, 4, 48), np.float32)}, ["stem/kernel", "4", "48"]),
    "empty": ({NORM: np.zeros(0, np.float32)}, [NORM, "0"]),
    "empty and huge": (
        {"stem/kernel": np.zeros((2**30, 0, 3, 2**20), np.float32)},
        ["stem/kernel", "1073741824", "0", "3", "1048576"],
    ),
    "nan": ({"head/kernel": with_number(np.nan)}, ["head/kernel"]),
    "inf": ({"head/kernel": with_number(-np.inf)}, ["head/kernel"]),
    "too large": (
        {"head/kernel": with_number(0).astype(np.float64) + 1e300},
        ["head/kernel"],
    ),
    "integers": ({NORM: np.ones(16, np.int32)}, [NORM, "int32"]),
    "complex": ({NORM: np.ones(16, np.complex64)}, [NORM, "complex64"]),
    "records": ({NORM: np.ones(16, [("a", "f4")])}, [NORM, "<f4"]),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_a_tensor_that_is_not_as_it_should_be_is_named(case: str, tmp_path: Path) -> None:
    changes, parts = BAD_TENSORS[case]
    assert mentions(assert_rejected(write(tmp_path / "Mixer.npz", archive(**changes))), *parts)


def test_large_numbers_are_no_damage(tmp_path: Path) -> None:
    kernel = np.full((16, 10), 3e38, np.float32)
    path = write(tmp_path / "Mixer.npz", archive(**{"head/kernel": kernel}))
    np.testing.assert_array_equal(load_checkpoint(str(path)).params["head"]["kernel"], kernel)


def test_what_announces_more_than_it_holds_costs_no_memory(tmp_path: Path) -> None:
    huge = npy_header(TERABYTES)
    announced = len(huge) + 4 * 10**12
    zeros = npy(np.zeros(16, np.float32))
    endless = b"\x93NUMPY\2\0\xff\xff\xff\xff"
    files = {
        "header": zip_of(KERNEL, huge),
        "header and directory": zip_of(KERNEL, huge, announced=announced),
        "deflated header and directory": zip_of(KERNEL, huge, True, announced),
        "bomb": zip_of(KERNEL, deflated_zeros(npy_header((2**30,)), 4), True, 2**32 + 128),
        "bomb that says it is small": zip_of(KERNEL, deflated_zeros(zeros, 4), True, len(zeros)),
        "header without an end": zip_of(KERNEL, deflated_zeros(endless, 4), True, 20_000),
        "empty and huge": zip_of(KERNEL, npy_header((2**62, 0, 3, 2**62))),
    }
    for end in refusals_in_little_memory(files, tmp_path, ".npz"):
        assert mentions(end, "stem/kernel")


def large_tensors() -> dict[str, Any]:
    """Good tensors, of which "head/kernel" is larger than what is looked at for its header."""
    return pretrained_files.google(random_weights(class_names=tuple(map(str, range(1000)))).params)


def with_packed(name: str, packed: bytes, announced: int, crc: int) -> bytes:
    """An archive of `large_tensors` in which one unpacks to anything."""
    file = io.BytesIO()
    np.savez(file, **{key: value for key, value in large_tensors().items() if key != name})
    with zipfile.ZipFile(file, "a") as changed:
        changed.writestr(f"{name}.npy", packed)
        info = changed.getinfo(f"{name}.npy")
        info.compress_type, info.file_size, info.CRC = zipfile.ZIP_DEFLATED, announced, crc
    content = file.getvalue()
    # The local header has to say the method too.
    place = content.index(f"{name}.npy".encode()) - 30
    return content[: place + 8] + b"\x08\0" + content[place + 10 :]


def test_a_bomb_among_good_tensors_costs_no_memory(tmp_path: Path) -> None:
    good = npy(large_tensors()["head/kernel"])
    content = with_packed("head/kernel", deflated_zeros(good[:128], 4), len(good), zlib.crc32(good))
    (end,) = refusals_in_little_memory({"bomb": content}, tmp_path, ".npz")
    assert mentions(end, "head/kernel")


def test_a_tensor_that_unpacks_to_less_is_refused(tmp_path: Path) -> None:
    good = npy(large_tensors()["head/kernel"])
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    less = good[:-4]
    packed = packer.compress(less) + packer.flush()
    content = with_packed("head/kernel", packed, len(good), zlib.crc32(less))
    assert mentions(assert_rejected(write(tmp_path / "Mixer.npz", content)), "head/kernel")


def test_an_archive_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    whole = archive()
    for tenth in range(10):
        assert_rejected(write(tmp_path / "Mixer.npz", whole[: len(whole) * tenth // 10]))
    assert_rejected(write(tmp_path / "Mixer.npz", whole[:-1]))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_flipped_bit_is_found(save: Any, tmp_path: Path) -> None:
    tensors = large_tensors()
    file = io.BytesIO()
    save(file, **tensors)
    content = bytearray(file.getvalue())
    # Amid numbers.
    name = "head/kernel"
    content[content.index(f"{name}.npy".encode()) + 20_000] ^= 1
    assert mentions(assert_rejected(write(tmp_path / "Mixer.npz", bytes(content))), name)


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"these are no weights\n", npy(np.zeros(3)), b"PK\5\6" + bytes(18)):
        assert_rejected(write(tmp_path / "Mixer.npz", content))
    message = assert_rejected(write(tmp_path / "Mixer.npz", zip_of("readme.txt", b"hi")))
    assert mentions(message, "readme.txt")


@pytest.mark.parametrize("said", [b"{", b"[1, 2]", b"\xff", b"[" * 100_000, b'"gelu"'])
def test_a_file_beside_an_archive_that_is_no_json_is_refused(said: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "Mixer.npz", archive())
    write(tmp_path / "Mixer.npz.json", said)
    assert "Mixer.npz.json" in assert_rejected(path)


def test_no_damage_ends_otherwise_than_in_one_line(tmp_path: Path) -> None:
    weights = random_weights(SMALLEST, (2, 2), ("one", "two"))
    file = io.BytesIO()
    np.savez_compressed(file, **pretrained_files.google(weights.params))
    path = tmp_path / "Mixer.npz"
    outcomes = {"loaded": 0, "refused": 0}
    for damaged in fuzz(file.getvalue(), 2000, ends=400):
        path.write_bytes(damaged)
        found = load_or_error(path)
        if isinstance(found, str):
            assert "\n" not in found
            assert path.name in found
            outcomes["refused"] += 1
        else:
            assert_params_equal(found.params, weights.params)
            outcomes["loaded"] += 1
    assert outcomes["refused"] > 1000
    assert outcomes["loaded"] > 10
