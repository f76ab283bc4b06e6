"""Tests of fuzzing: a short run, and that the fuzzer sees each type of failure."""

import ctypes
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixer_jax.data.decode import decode
from tests.data import fuzz_decode
from tests.helpers.image_formats import files_of_all_formats

# The forked processes only decode, whatever threads other tests have started.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork")


@pytest.mark.slow
def test_decode_survives_mutations(tmp_path: Path) -> None:
    report = fuzz_decode.fuzz(5_000, seed=1, folder=tmp_path)
    assert not report.failures, fuzz_decode.format_report(report)
    assert report.decoded.total() + report.rejected.total() == 5_000
    assert report.decoded.total() > 1_000
    assert set(report.decoded) == {name.split()[0] for name in files_of_all_formats()}


def test_at_least_40_files_are_damaged() -> None:
    assert len(files_of_all_formats()) > 40


def test_mutations_depend_on_seed_and_index_only() -> None:
    files = files_of_all_formats()
    for index in range(50):
        assert fuzz_decode.mutate(files, 3, index) == fuzz_decode.mutate(files, 3, index)
    different = [
        fuzz_decode.mutate(files, 3, index) != fuzz_decode.mutate(files, 4, index)
        for index in range(50)
    ]
    assert sum(different) > 40


def crash(encoded: bytes, **options: Any) -> np.ndarray:
    if len(encoded) % 5 == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return decode(encoded, **options)


def hang(encoded: bytes, **options: Any) -> np.ndarray:
    while len(encoded) % 5 == 0:
        time.perf_counter()
    return decode(encoded, **options)


def raise_foreign(encoded: bytes, **options: Any) -> np.ndarray:
    return decode(encoded, **options)[: 1 // (len(encoded) % 5)]


def read_uninitialized_memory(encoded: bytes, **options: Any) -> np.ndarray:
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    memory = libc.malloc(ctypes.c_size_t(100_000))
    pixels = np.frombuffer(ctypes.string_at(memory + 50_000, 100), np.uint8)
    libc.free(ctypes.c_void_p(memory))
    return pixels


def write_message(encoded: bytes, **options: Any) -> np.ndarray:
    os.write(2, b"message of a library\n")
    return decode(encoded, **options)


@pytest.mark.parametrize(
    ("kind", "decode_fn"),
    [
        ("crash", crash),
        ("hang", hang),
        ("foreign exception", raise_foreign),
        ("different pixels", read_uninitialized_memory),
        ("stderr", write_message),
    ],
)
def test_fuzzer_sees_failures(
    kind: str, decode_fn: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz_decode, "_CPU_LIMIT_S", 0.2)
    report = fuzz_decode.fuzz(20, seed=0, decode_fn=decode_fn, folder=tmp_path)
    assert {failure.kind for failure in report.failures} == {kind}
    assert len(list(tmp_path.iterdir())) == len(report.failures)
    assert report.decoded.total() + report.rejected.total() + len(report.failures) == 20
    assert f"{kind}: {len(report.failures)}" in fuzz_decode.format_report(report)
    failure = report.failures[0]
    name, encoded = fuzz_decode.mutate(files_of_all_formats(), 0, failure.index)
    assert name == failure.seed_file
    assert (tmp_path / f"{failure.index}_{name}").read_bytes() == encoded
