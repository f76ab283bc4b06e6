"""Fuzzing of the image decoder, in forked processes.

    python -m tests.data.fuzz_decode --mutations=300000 --seed=0

Damages small files of all formats, repairs checksums so that some damage reaches the decoders, and
decodes each file twice with other images in between and other contents of uninitialized memory.
Counts ends of the process, exceptions other than BadImageError, pixels that differ, and lines on
stderr. Exits with 1 if there are any. Mutation i depends only on the seed and i.
"""

import argparse
import collections
import contextlib
import ctypes
import dataclasses
import os
import signal
import sys
import tempfile
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from mixer_jax.data.decode import BadImageError, decode
from tests.helpers.image_formats import files_of_all_formats, join_png, png_chunks

DecodeFn = Callable[..., np.ndarray]

# glibc fills memory that is allocated with the complement of this byte, and freed memory with it.
_M_PERTURB = -6
_CPU_LIMIT_S = 30
_INTERESTING = (0x00, 0x01, 0x7F, 0x80, 0xFE, 0xFF)


@dataclasses.dataclass(frozen=True)
class Failure:
    """One mutation that a decoder must not answer in this way.

    Attributes:
        kind: "crash", "hang", "foreign exception", "different pixels" or "stderr".
        seed_file: Name of the file that was damaged.
        index: Number of the mutation.
        detail: Signal, exception or difference.
    """

    kind: str
    seed_file: str
    index: int
    detail: str


@dataclasses.dataclass
class Report:
    """Counts by format, and failures."""

    decoded: collections.Counter[str]
    rejected: collections.Counter[str]
    failures: list[Failure]


def mutate(files: dict[str, bytes], seed: int, index: int) -> tuple[str, bytes]:
    """Damages one file: returns its name and its new contents."""
    rng = np.random.default_rng([seed, index])
    name = list(files)[int(rng.integers(len(files)))]
    encoded = files[name]
    if name.startswith("PNG") and rng.random() < 0.75:
        return name, _mutate_png(encoded, rng)
    if name.startswith("JPEG ") and rng.random() < 0.5:
        # Files without an end are rejected before they are decoded.
        return name, _mutate_bytes(encoded, rng) + b"\xff\xd9"
    if rng.random() < 0.03:
        other = files[list(files)[int(rng.integers(len(files)))]]
        cut = int(rng.integers(min(len(encoded), len(other))))
        return name, encoded[:cut] + other[cut:]
    return name, _mutate_bytes(encoded, rng)


def _mutate_bytes(encoded: bytes, rng: np.random.Generator) -> bytes:
    """Applies one to three random edits."""
    data = bytearray(encoded)
    for _ in range(int(rng.integers(1, 4))):
        if not data:
            break
        # Headers are short, and damage there is varied: half of the edits.
        reach = len(data) if rng.random() < 0.5 else min(len(data), 64)
        position = int(rng.integers(reach))
        length = int(rng.integers(1, 17))
        match int(rng.integers(8)):
            case 0:
                data[position] ^= 1 << int(rng.integers(8))
            case 1:
                data[position] = int(rng.integers(256))
            case 2:
                data[position] = int(rng.choice(_INTERESTING))
            case 3:
                data[position : position + length] = bytes([int(rng.choice(_INTERESTING))]) * length
            case 4:
                del data[position : position + length]
            case 5:
                start = int(rng.integers(len(data)))
                data[position:position] = data[start : start + length]
            case 6:
                data[position : position + length] = rng.bytes(length)
            case 7:
                del data[int(rng.integers(len(data))) :]
    return bytes(data)


def _mutate_png(encoded: bytes, rng: np.random.Generator) -> bytes:
    """Damages, removes, repeats or moves chunks, or uncompressed data; checksums are correct."""
    chunks = png_chunks(encoded)
    position = int(rng.integers(len(chunks)))
    kind, data = chunks[position]
    match int(rng.integers(6)):
        case 0:
            del chunks[position]
        case 1:
            chunks.insert(int(rng.integers(len(chunks))), (kind, data))
        case 2:
            chunks.insert(int(rng.integers(len(chunks))), chunks.pop(position))
        case 3 if kind == b"IDAT":
            rows = _mutate_bytes(zlib.decompress(data), rng)
            chunks[position] = (kind, zlib.compress(rows))
        case 4:
            cut = int(rng.integers(len(data) + 1))
            chunks[position : position + 1] = [(kind, data[:cut]), (kind, data[cut:])]
        case _:
            chunks[position] = (kind, _mutate_bytes(data, rng))
    return join_png(chunks)


def fuzz(
    num_mutations: int, seed: int, decode_fn: DecodeFn = decode, folder: Path | None = None
) -> Report:
    """Decodes mutations 0 to `num_mutations` − 1; processes that end are replaced.

    Args:
        num_mutations: Number of damaged files.
        seed: Seed of the damage.
        decode_fn: Decoder to test.
        folder: Folder for the files that failed; None: they are not kept.
    """
    files = files_of_all_formats()
    report = Report(collections.Counter(), collections.Counter(), [])
    index = 0
    while index < num_mutations:
        for name, outcome, detail in _run_worker(files, seed, index, num_mutations, decode_fn):
            if outcome in ("decoded", "rejected"):
                getattr(report, outcome)[name.split()[0]] += 1
            else:
                report.failures.append(Failure(outcome, name, index, detail))
                if folder:
                    (folder / f"{index}_{name}").write_bytes(mutate(files, seed, index)[1])
            index += 1
    return report


def _run_worker(
    files: dict[str, bytes], seed: int, start: int, stop: int, decode_fn: DecodeFn
) -> Iterator[tuple[str, str, str]]:
    """Decodes mutations in a forked process; yields (file, outcome, detail) until it ends."""
    read_end, write_end = os.pipe()
    process = os.fork()
    if process == 0:
        status = 1
        with contextlib.suppress(BaseException):
            os.close(read_end)
            _decode_mutations(files, seed, start, stop, decode_fn, write_end)
            status = 0
        os._exit(status)
    os.close(write_end)
    index = start
    with os.fdopen(read_end, encoding="utf-8") as results:
        for line in results:
            if not line.endswith("\n"):
                break
            name, outcome, detail = line.rstrip("\n").split("\t")
            yield name, outcome, detail
            index += 1
    _, status = os.waitpid(process, 0)
    if index < stop:
        code = os.waitstatus_to_exitcode(status)
        kind = "hang" if code == -signal.SIGPROF else "crash"
        yield mutate(files, seed, index)[0], kind, f"exit status {code}"


def _decode_mutations(
    files: dict[str, bytes], seed: int, start: int, stop: int, decode_fn: DecodeFn, pipe: int
) -> None:
    """Writes a line for each mutation: file, outcome and detail, separated by tabs."""
    set_fill = _memory_filler()
    names = list(files)
    with tempfile.TemporaryFile() as messages:
        os.dup2(messages.fileno(), 2)
        for index in range(start, stop):
            signal.setitimer(signal.ITIMER_PROF, _CPU_LIMIT_S)
            rng = np.random.default_rng([seed, index, 1])
            name, encoded = mutate(files, seed, index)
            turn = index % 2 == 1
            set_fill(0x55)
            first = _outcome(decode_fn, encoded, turn)
            for position in rng.integers(len(names), size=2):
                _outcome(decode_fn, files[names[position]], turn)
            set_fill(0xAA)
            second = _outcome(decode_fn, encoded, turn)
            outcome, detail = _compare(first, second)
            size = os.fstat(2).st_size
            if size and outcome in ("decoded", "rejected"):
                text = os.pread(2, 200, 0).decode("utf-8", "replace")
                outcome, detail = "stderr", repr(text)
            os.ftruncate(2, 0)
            os.lseek(2, 0, os.SEEK_SET)
            os.write(pipe, f"{name}\t{outcome}\t{detail}\n".encode())


def _memory_filler() -> Callable[[int], object]:
    """Returns a function that sets the contents of uninitialized memory, where glibc does it."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return (lambda byte: mallopt(_M_PERTURB, byte)) if mallopt else (lambda byte: None)


def _outcome(decode_fn: DecodeFn, encoded: bytes, turn: bool) -> tuple[str, np.ndarray | str]:
    """Decodes a file: pixels, a reason, or a stack trace."""
    try:
        return "decoded", decode_fn(encoded, exif_orientation=turn)
    except BadImageError as error:
        return "rejected", str(error)
    except Exception:
        return "foreign exception", repr(traceback.format_exc(limit=-3))


def _compare(
    first: tuple[str, np.ndarray | str], second: tuple[str, np.ndarray | str]
) -> tuple[str, str]:
    for outcome, value in (first, second):
        if outcome == "foreign exception":
            return outcome, str(value)
    if first[0] != second[0] or not np.array_equal(first[1], second[1]):
        return "different pixels", f"{first[0]}, {second[0]}"
    return first[0], ""


def format_report(report: Report) -> str:
    """Formats counts by format, counts of failures, and the first failures."""
    lines = [f"{'format':8} {'decoded':>8} {'rejected':>8}"]
    for name in sorted({*report.decoded, *report.rejected}):
        lines.append(f"{name:8} {report.decoded[name]:8,} {report.rejected[name]:8,}")
    total = [counts.total() for counts in (report.decoded, report.rejected)]
    lines.append(f"{'total':8} {total[0]:8,} {total[1]:8,}")
    kinds = collections.Counter(failure.kind for failure in report.failures)
    lines += [
        f"{kind}: {kinds[kind]}"
        for kind in ("crash", "hang", "foreign exception", "different pixels", "stderr")
    ]
    lines += [
        f"{failure.kind} at mutation {failure.index} of {failure.seed_file}: {failure.detail}"
        for failure in report.failures[:20]
    ]
    return "\n".join(lines)


def main() -> int:
    """Fuzzes the decoder and prints a report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=300_000, help="number of damaged files")
    parser.add_argument("--seed", type=int, default=0, help="seed of the damage")
    parser.add_argument("--folder", type=Path, help="folder for files that fail")
    args = parser.parse_args()
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
    files = files_of_all_formats()
    print(f"{args.mutations:,} mutations of {len(files)} files", flush=True)
    report = fuzz(args.mutations, args.seed, folder=args.folder)
    print(format_report(report))
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
