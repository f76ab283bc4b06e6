"""Preparation of TFDS datasets with random access, by TFDS or by conversion from another format.

Both write to a temporary folder and rename it at the end, so that an interrupted preparation is
never mistaken for a complete one. Its leftovers are removed by the next preparation, which holds
the dataset's lock.
"""

import collections
import contextlib
import importlib.util
import json
import logging
import os
import shutil
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from mixer_jax.data.decode import BadImageError, decode
from mixer_jax.errors import (
    RunError,
    UserError,
    disk_failure,
    missing_library_error,
    summarize_error,
)
from mixer_jax.files import file_lock

FORMAT = "array_record"
# File next to the prepared data that lists files skipped because they cannot be decoded.
UNDECODABLE = "undecodable.tsv"
INFO_FILE = "dataset_info.json"
# Has the prefix of TFDS's own temporary folders, which readers ignore.
_TEMP_DIR = f"incomplete.{FORMAT}"
# Suffix of the files in which TFDS stores the URLs of downloads.
_URL_METADATA_SUFFIX = ".INFO.json"

Item = TypeVar("Item")
Result = TypeVar("Result")


def is_prepared(builder: Any) -> bool:
    """Checks whether the dataset is on disk, in any format."""
    # TFDS knows the splits of some datasets from the web, so having splits means nothing.
    return bool((builder.data_path / INFO_FILE).exists())


def has_random_access(builder: Any) -> bool:
    """Checks whether the dataset is on disk in the format that can be read by index."""
    return is_prepared(builder) and builder.info.file_format.value == FORMAT


def use_array_record(builder: Any) -> None:
    """Selects array_record for writing, and for reading if the dataset has it.

    `tfds.builder(..., file_format=...)` fails for datasets that are prepared in another format or
    are known from the web to have one.
    """
    if not is_prepared(builder) or FORMAT in builder.info.as_proto.alternative_file_formats:
        builder.info.set_file_format(FORMAT, override=True, override_if_initialized=True)


@contextlib.contextmanager
def preparation_lock(folder: Path, full_name: str, *, wait: bool = False) -> Iterator[None]:
    """Holds a dataset's lock, and removes leftovers of killed preparations.

    Args:
        folder: Local folder of this version of the dataset.
        full_name: Name of the dataset with config and version, for messages.
        wait: Whether to wait for another process that prepares the dataset.

    Raises:
        UserError: Another process prepares the dataset, and `wait` is False.
        OSError: The folder cannot be written.
    """
    path = folder.with_name(f".{folder.name}.lock")
    with contextlib.ExitStack() as stack:
        try:
            locked = stack.enter_context(file_lock(path, wait=wait))
        except BlockingIOError:
            raise UserError(
                f"dataset {full_name} is being prepared in {folder.parent} by another process. "
                "Wait until it has finished."
            ) from None
        # On file systems without locks, leftovers may be the work of a running process.
        if locked:
            _remove_leftovers(folder)
        yield


def _remove_leftovers(folder: Path) -> None:
    """Removes temporary folders of one version of a dataset, which may be terabytes."""
    for leftover in (*folder.parent.glob(f"incomplete.*_{folder.name}"), folder / _TEMP_DIR):
        if leftover.is_dir():
            print(f"removing {leftover}, left by a killed preparation", file=sys.stderr)
            shutil.rmtree(leftover)


def format_manual_instructions(builder: Any) -> str:
    """Formats the instructions for manual downloads on one line.

    They are empty if the dataset is prepared in any format, or needs no manual downloads.
    """
    text = "" if is_prepared(builder) else builder.MANUAL_DOWNLOAD_INSTRUCTIONS
    return _one_line(text or "")


def check_manual_download(builder: Any, manual_dir: str) -> Path:
    """Resolves the directory of manual downloads, by default downloads/manual in the data_dir.

    Raises:
        UserError: The dataset needs manual downloads and the directory is missing or empty.
    """
    manual = Path(manual_dir or Path(builder.data_dir_root, "downloads", "manual")).expanduser()
    instructions = format_manual_instructions(builder)
    if instructions and not (manual.is_dir() and any(manual.iterdir())):
        raise UserError(
            f"dataset {builder.info.full_name} must be downloaded manually, but {manual} is "
            f"missing or empty (use --manual_dir for another folder): {instructions}."
        )
    return manual


def download_and_prepare(builder: Any, manual_dir: Path) -> None:
    """Downloads the dataset, unless it is downloaded manually, and writes it.

    Args:
        builder: Builder of a dataset that is not prepared.
        manual_dir: Directory of manual downloads.

    Raises:
        UserError: A part of the download is missing, the folder cannot be written, or the network
            is unavailable.
        WriteFailureError: The disk is full or failing.
        RunError: The code of the dataset's builder fails.
    """
    import tensorflow_datasets as tfds

    name = builder.info.full_name
    urls = builder.url_infos or {}
    if not _has_downloads(builder, urls, manual_dir):
        check_network(name, urls)
    # Without a network, it would print a warning for each of ten attempts.
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    # Prepared data on the web is in another format.
    config = tfds.download.DownloadConfig(manual_dir=str(manual_dir), try_download_gcs=False)
    try:
        # TFDS prints its progress; standard output is reserved for the result.
        with contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare(download_config=config)
    except (UserError, RunError):
        raise
    except Exception as error:
        problem = f"dataset {name} cannot be prepared in {builder.data_path.parent}"
        # The writers raise exceptions of various types if the disk is full.
        if failure := disk_failure(problem, error):
            raise failure from error
        if isinstance(error, ImportError) and error.name == "tensorflow":
            raise missing_library_error(
                f"preparing dataset {name}", "TensorFlow", "tensorflow"
            ) from error
        # Builders check user input by assertions, and failed downloads are OSErrors.
        if isinstance(error, OSError | AssertionError | ImportError):
            hint = f" Manual downloads are expected in {manual_dir}."
            raise UserError(
                f"{problem}: {_one_line(error)}."
                f"{hint if builder.MANUAL_DOWNLOAD_INSTRUCTIONS else ''}"
            ) from error
        raise RunError(
            f"preparing dataset {name} failed: {type(error).__name__}: {_one_line(error)}."
        ) from error


def _has_downloads(builder: Any, urls: Mapping[str, Any], manual_dir: Path) -> bool:
    """Checks whether a file of the dataset has been downloaded, which then needs no network.

    Args:
        builder: Builder of a dataset.
        urls: Checksum and name of each file of the dataset, by URL.
        manual_dir: Directory of manual downloads, where TFDS looks for such files as well.
    """
    from tensorflow_datasets.core.download.resource import get_dl_fname

    downloads = Path(builder.data_dir_root, "downloads")
    # Older versions of TFDS had no folder for each dataset.
    files = [downloads / get_dl_fname(url, info.checksum) for url, info in urls.items()]
    files += [manual_dir / info.filename for info in urls.values() if info.filename]
    # Before a download is complete, TFDS has a temporary folder for it, and metadata of its URL.
    names = (downloads / builder.name).glob("*")
    files += [path for path in names if not path.name.endswith(_URL_METADATA_SUFFIX)]
    return any(file.is_file() for file in files)


def check_network(name: str, urls: Iterable[str]) -> None:
    """Checks that a host of the downloads is known; TFDS would try for more than three minutes.

    Behind a proxy, which resolves the names of hosts itself, nothing is checked.

    Args:
        name: Name of the dataset, for the message.
        urls: URLs of its files.

    Raises:
        UserError: No host is known.
    """
    hosts = {urllib.parse.urlsplit(url).hostname for url in urls if url.startswith("http")}
    hosts.discard(None)
    if not hosts or urllib.request.getproxies():
        return
    for host in hosts:
        with contextlib.suppress(socket.gaierror):
            socket.getaddrinfo(host, None)
            return
    raise UserError(
        f"dataset {name} must be downloaded from {' and '.join(sorted(map(str, hosts)))}, which "
        "cannot be reached. Check the network connection."
    )


def convert_to_array_record(builder: Any) -> None:
    """Adds array_record files to a dataset that is prepared in another format.

    All TFDS formats contain the same serialized examples, so they are copied one by one, shard by
    shard: memory use is constant, and nothing is encoded again.

    Raises:
        UserError: TensorFlow is missing, a shard is missing or damaged, or its number of examples
            differs from the dataset's metadata.
        WriteFailureError: The disk is full or failing.
        OSError: The folder cannot be written.
    """
    if importlib.util.find_spec("tensorflow") is None:
        old_format = builder.info.file_format.value
        feature = f"converting dataset {builder.info.full_name} from {old_format}"
        raise missing_library_error(feature, "TensorFlow", "tensorflow")
    shards = list(_list_shards(builder))
    temp_dir = Path(builder.data_path, _TEMP_DIR)
    total = sum(num_examples for _, _, num_examples in shards)
    try:
        temp_dir.mkdir()
        with tqdm(total=total, desc="converting", unit=" examples", mininterval=1) as bar:
            for source, target, num_examples in shards:
                temp_path = temp_dir / target.name
                _copy_shard(builder.info.file_format, source, temp_path, num_examples)
                bar.update(num_examples)
        # A process killed during these renames leaves files that the metadata does not mention;
        # the next conversion overwrites them.
        for _, target, _ in shards:
            (temp_dir / target.name).replace(target)
        _register_format(temp_dir, Path(builder.data_path, INFO_FILE))
    finally:
        shutil.rmtree(temp_dir, ignore_errors=True)


def _list_shards(builder: Any) -> Iterator[tuple[Path, Path, int]]:
    """Yields the present path, the array_record path and the number of examples of each shard."""
    for split in builder.info.splits.values():
        template = split.filename_template.replace(filetype_suffix=FORMAT)
        targets = template.sharded_filepaths(num_shards=len(split.shard_lengths))
        for source, target, num_examples in zip(
            map(Path, split.filepaths), map(Path, targets), split.shard_lengths, strict=True
        ):
            if not source.exists() or source == target:
                raise UserError(
                    f"{source} must exist and be named after its format. Prepare the dataset again "
                    "in another --data_dir."
                )
            yield source, target, num_examples


def _copy_shard(file_format: Any, source: Path, target: Path, num_examples: int) -> None:
    """Copies the records of one shard to an array_record file."""
    from tensorflow_datasets.core.file_adapters import ADAPTER_FOR_FORMAT, ArrayRecordFileAdapter

    try:
        records = ADAPTER_FOR_FORMAT[file_format].make_tf_data(str(source)).as_numpy_iterator()
        # The writer takes pairs of a key, which it ignores, and a record.
        ArrayRecordFileAdapter.write_examples(target, enumerate(records))
        written = ArrayRecordFileAdapter.num_examples(target)
    except Exception as error:
        # Exceptions of TensorFlow, array_record and Arrow have no common base class.
        problem = f"{source} cannot be converted"
        failure = disk_failure(problem, error)
        raise failure or UserError(f"{problem}: {_one_line(error)}.") from error
    if written != num_examples:
        raise UserError(
            f"{source} must contain {num_examples:,} examples according to {INFO_FILE}, got "
            f"{written:,}. Prepare the dataset again in another --data_dir."
        )


def _register_format(temp_dir: Path, info_path: Path) -> None:
    """Adds the format to the dataset's metadata, which completes the conversion."""
    info = json.loads(info_path.read_text())
    info.setdefault("alternativeFileFormats", []).append(FORMAT)
    temp_path = temp_dir / INFO_FILE
    temp_path.write_text(json.dumps(info, indent=2))
    shutil.copymode(info_path, temp_path)
    temp_path.replace(info_path)


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], num_threads: int = 0
) -> Iterator[Result]:
    """Applies a function in threads, and yields the results in order; only a few are in memory.

    Args:
        function: Function of an item.
        items: Items, which are iterated over in the thread of the caller.
        num_threads: Number of threads; 0: one per core.
    """
    num_threads = num_threads or os.cpu_count() or 1
    pending: collections.deque[Future[Result]] = collections.deque()
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > 4 * num_threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def find_decoding_error(encoded: bytes) -> str:
    """Decodes an image; returns the error in one line, or ""."""
    try:
        decode(encoded)
    except BadImageError as error:
        return " ".join(str(error).split())
    return ""


def _one_line(text: object) -> str:
    return " ".join(str(text).split()).rstrip(".")


def format_splits(builder: Any) -> str:
    """Formats a prepared dataset's splits, number of classes, skipped files and folder.

    Raises:
        UserError: A file of a split does not exist, or the template of its name is not valid.
    """
    import tensorflow_datasets as tfds

    lines = [f"{'split':<12} {'examples':>12} {'shards':>7} {'bytes':>18}"]
    for name, split in builder.info.splits.items():
        try:
            size = sum(os.path.getsize(path) for path in split.filepaths)
        except (OSError, ValueError) as error:
            raise UserError(
                f"split {name!r} of dataset {builder.info.full_name} must have the files that "
                f"{builder.data_path / INFO_FILE} lists ({summarize_error(error)}). Prepare the "
                "dataset again in another --data_dir."
            ) from error
        lines.append(f"{name:<12} {split.num_examples:>12,} {split.num_shards:>7,} {size:>18,}")
    features = [getattr(f, "feature", f) for f in builder.info.features.values()]
    classes = [f.num_classes for f in features if isinstance(f, tfds.features.ClassLabel)]
    lines += ["", f"classes      {classes[0]:,}" if classes else "classes      none"]
    undecodable = Path(builder.data_path, UNDECODABLE)
    if undecodable.exists():
        with undecodable.open("rb") as file:
            count = sum(1 for _ in file)
        lines.append(f"skipped      {count:,} undecodable files, listed in {undecodable}")
    lines.append(f"folder       {builder.data_path}")
    return "\n".join(lines)
