"""Tests of npz archives: types and orders of numbers, and corrupt and hostile files."""

import io
import os
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mixer_jax.checkpoints import formats
from mixer_jax.checkpoints.load import load_checkpoint
from mixer_jax.errors import UserError
from tests.helpers import pretrained_files
from tests.helpers.corrupt_files import (
    SMALLEST,
    assert_rejected,
    assert_rejected_without_memory,
    fuzz,
    load_or_error,
)
from tests.helpers.messages import mentions, raises
from tests.helpers.pretrained_files import deflated_zeros, npy, npy_header, zip_archive
from tests.helpers.random_weights import assert_params_equal, random_weights

TERABYTES = (10**6, 10**6)
KERNEL = "stem/kernel.npy"


def archive(**changes: Any) -> bytes:
    """Returns a good archive with some tensors changed, or left out if they are None."""
    tensors = pretrained_files.google(random_weights().params) | changes
    file = io.BytesIO()
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    np.savez(file, allow_pickle=True, **present)
    return file.getvalue()


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64, ">f4"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_file_reads_any_float_type(dtype: Any, save: Callable, tmp_path: Path) -> None:
    tensors = pretrained_files.google(random_weights().params)
    saved = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    save(tmp_path / "Mixer.npz", **saved)
    loaded = pretrained_files.google(load_checkpoint(str(tmp_path / "Mixer.npz")).params)
    expected = {name: tensor.astype(np.float32) for name, tensor in saved.items()}
    assert_params_equal(loaded, expected)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_file_reads_fortran_order(save: Callable, tmp_path: Path) -> None:
    weights = random_weights()
    tensors = pretrained_files.google(weights.params)
    save(tmp_path / "Mixer.npz", **{name: np.asfortranarray(t) for name, t in tensors.items()})
    assert_params_equal(load_checkpoint(str(tmp_path / "Mixer.npz")).params, weights.params)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("start", [b"", bytes(100)], ids=["", "other data before the archive"])
def test_npz_file_reads_in_chunks(
    save: Callable, start: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "_CHUNK_SIZE", 1000)
    weights, file = random_weights(), io.BytesIO()
    save(file, **pretrained_files.google(weights.params))
    path = write(tmp_path / "Mixer.npz", start + file.getvalue())
    assert_params_equal(load_checkpoint(path).params, weights.params)


def test_npz_file_detects_truncation_after_opening(tmp_path: Path) -> None:
    name, content = "head/kernel", archive()
    path = write(tmp_path / "Mixer.npz", content)
    with formats.NpzFile(str(path)) as file:
        write(path, content[: content.index(f"{name}.npy".encode()) + 300])
        with raises(UserError, str(path), name):
            file.read(name, np.empty((16, 10), np.float32))


class Malicious:
    """Object that creates a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_npz_file_does_not_unpickle(tmp_path: Path) -> None:
    folder = tmp_path / "created"
    evil = np.array([Malicious(folder)], object)
    path = write(tmp_path / "evil.npz", archive(**{"stem/bias": evil}))
    assert mentions(assert_rejected(path), "stem/bias")
    assert not folder.exists()
    # The file does what it is meant to do in a reader that unpickles.
    with np.load(path, allow_pickle=True) as loaded:
        loaded["stem/bias"]
    assert folder.exists()


def head_kernel(value: float) -> np.ndarray:
    """Returns the kernel of the head with one number changed."""
    kernel = pretrained_files.google(random_weights().params)["head/kernel"].copy()
    kernel[3, 4] = value
    return kernel


NORM = "MixerBlock_1/LayerNorm_1/scale"
BAD_TENSORS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "missing": ({NORM: None}, [NORM]),
    "missing head": ({"head/bias": None}, ["head/bias"]),
    "missing stem": ({"stem/kernel": None}, ["stem/kernel"]),
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
    "nan": ({"head/kernel": head_kernel(np.nan)}, ["head/kernel"]),
    "inf": ({"head/kernel": head_kernel(-np.inf)}, ["head/kernel"]),
    "too large for float32": (
        {"head/kernel": head_kernel(0).astype(np.float64) + 1e300},
        ["head/kernel"],
    ),
    "integers": ({NORM: np.ones(16, np.int32)}, [NORM, "int32"]),
    "complex": ({NORM: np.ones(16, np.complex64)}, [NORM, "complex64"]),
    "records": ({NORM: np.ones(16, [("a", "f4")])}, [NORM, "<f4"]),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_npz_file_names_the_bad_tensor(case: str, tmp_path: Path) -> None:
    changes, parts = BAD_TENSORS[case]
    assert mentions(assert_rejected(write(tmp_path / "Mixer.npz", archive(**changes))), *parts)


def test_npz_file_accepts_numbers_whose_sum_overflows(tmp_path: Path) -> None:
    kernel = np.full((16, 10), 3e38, np.float32)
    path = write(tmp_path / "Mixer.npz", archive(**{"head/kernel": kernel}))
    np.testing.assert_array_equal(load_checkpoint(str(path)).params["head"]["kernel"], kernel)


def test_npz_file_rejects_false_sizes_without_memory(tmp_path: Path) -> None:
    huge = npy_header(TERABYTES)
    claimed = len(huge) + 4 * 10**12
    zeros = npy(np.zeros(16, np.float32))
    endless = b"\x93NUMPY\2\0\xff\xff\xff\xff"
    files = {
        "header": zip_archive(KERNEL, huge),
        "header and directory": zip_archive(KERNEL, huge, claimed_size=claimed),
        "deflated header and directory": zip_archive(KERNEL, huge, True, claimed),
        "bomb": zip_archive(KERNEL, deflated_zeros(npy_header((2**30,)), 4), True, 2**32 + 128),
        "bomb that claims to be small": zip_archive(
            KERNEL, deflated_zeros(zeros, 4), True, len(zeros)
        ),
        "header without an end": zip_archive(KERNEL, deflated_zeros(endless, 4), True, 20_000),
        "empty and huge": zip_archive(KERNEL, npy_header((2**62, 0, 3, 2**62))),
    }
    for message in assert_rejected_without_memory(files, tmp_path, ".npz"):
        assert mentions(message, "stem/kernel")


def large_tensors() -> dict[str, Any]:
    """Returns good tensors, of which "head/kernel" is larger than what is read for its header."""
    return pretrained_files.google(random_weights(class_names=tuple(map(str, range(1000)))).params)


def replace_packed(name: str, packed: bytes, claimed_size: int, crc: int) -> bytes:
    """Returns an archive of `large_tensors` with one tensor replaced by any deflated bytes."""
    file = io.BytesIO()
    np.savez(file, **{key: value for key, value in large_tensors().items() if key != name})
    with zipfile.ZipFile(file, "a") as changed:
        changed.writestr(f"{name}.npy", packed)
        info = changed.getinfo(f"{name}.npy")
        info.compress_type, info.file_size, info.CRC = zipfile.ZIP_DEFLATED, claimed_size, crc
    content = file.getvalue()
    # The local header also has the method.
    header = content.index(f"{name}.npy".encode()) - 30
    return content[: header + 8] + b"\x08\0" + content[header + 10 :]


def test_npz_file_rejects_a_bomb_among_good_tensors_without_memory(tmp_path: Path) -> None:
    good = npy(large_tensors()["head/kernel"])
    bomb = deflated_zeros(good[:128], 4)
    content = replace_packed("head/kernel", bomb, len(good), zlib.crc32(good))
    (message,) = assert_rejected_without_memory({"bomb": content}, tmp_path, ".npz")
    assert mentions(message, "head/kernel")


def test_npz_file_rejects_a_tensor_that_unpacks_to_less(tmp_path: Path) -> None:
    good = npy(large_tensors()["head/kernel"])
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    less = good[:-4]
    packed = packer.compress(less) + packer.flush()
    content = replace_packed("head/kernel", packed, len(good), zlib.crc32(less))
    assert mentions(assert_rejected(write(tmp_path / "Mixer.npz", content)), "head/kernel")


def test_npz_file_rejects_truncated_archives(tmp_path: Path) -> None:
    content = archive()
    for tenth in range(10):
        assert_rejected(write(tmp_path / "Mixer.npz", content[: len(content) * tenth // 10]))
    assert_rejected(write(tmp_path / "Mixer.npz", content[:-1]))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_file_detects_a_flipped_bit(save: Callable, tmp_path: Path) -> None:
    file = io.BytesIO()
    save(file, **large_tensors())
    content = bytearray(file.getvalue())
    name = "head/kernel"
    content[content.index(f"{name}.npy".encode()) + 20_000] ^= 1  # In the middle of the data.
    assert mentions(assert_rejected(write(tmp_path / "Mixer.npz", bytes(content))), name)


def test_npz_file_rejects_other_files(tmp_path: Path) -> None:
    for content in (b"", b"these are not weights\n", npy(np.zeros(3)), b"PK\5\6" + bytes(18)):
        assert_rejected(write(tmp_path / "Mixer.npz", content))
    message = assert_rejected(write(tmp_path / "Mixer.npz", zip_archive("readme.txt", b"hi")))
    assert mentions(message, "readme.txt")


@pytest.mark.parametrize("metadata", [b"{", b"[1, 2]", b"\xff", b"[" * 100_000, b'"gelu"'])
def test_npz_file_rejects_metadata_that_is_not_a_json_object(
    metadata: bytes, tmp_path: Path
) -> None:
    path = write(tmp_path / "Mixer.npz", archive())
    write(tmp_path / "Mixer.npz.json", metadata)
    assert "Mixer.npz.json" in assert_rejected(path)


@pytest.mark.slow
def test_npz_file_loads_exactly_or_fails_with_one_line(tmp_path: Path) -> None:
    weights = random_weights(SMALLEST, (2, 2), ("one", "two"))
    file = io.BytesIO()
    np.savez_compressed(file, **pretrained_files.google(weights.params))
    path = tmp_path / "Mixer.npz"
    counts = {"loaded": 0, "rejected": 0}
    for damaged in fuzz(file.getvalue(), 2000, margin=400):
        path.write_bytes(damaged)
        result = load_or_error(path)
        if isinstance(result, str):
            assert "\n" not in result
            assert path.name in result
            counts["rejected"] += 1
        else:
            assert_params_equal(result.params, weights.params)
            counts["loaded"] += 1
    assert counts["rejected"] > 1000
    assert counts["loaded"] > 10
