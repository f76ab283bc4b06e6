"""Writing a data set in the format with random access: made by TFDS, or converted from another.

Both ways write beside the final place and rename at the end, so that a killed one leaves nothing
that is taken for finished; what it leaves is removed by the next, which holds the data set's lock.
"""

import contextlib
import csv
import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mixer_jax.errors import RunError, UserError
from mixer_jax.files import file_lock

FORMAT = "array_record"
# In which a data set of ours lists the files that it leaves out.
UNDECODABLE = "undecodable.tsv"
_INFO = "dataset_info.json"
# Begins like TFDS's own unfinished folders, which readers pass over.
_DRAFT = f"incomplete.{FORMAT}"
_OPEN_FILES = 4096


def is_prepared(builder: Any) -> bool:
    """Says whether the data set is on disk, in whatever format."""
    # TFDS knows some data sets' splits from the web, so that having splits says nothing.
    return bool((builder.data_path / _INFO).exists())


def has_random_access(builder: Any) -> bool:
    """Says whether the data set is on disk in the format that can be read by index."""
    return is_prepared(builder) and builder.info.file_format.value == FORMAT


def choose_format(builder: Any) -> None:
    """Makes the builder write, or read if it can, the format with random access.

    `tfds.builder(..., file_format=...)` does neither for all data sets: it refuses a second format
    beside the first, and one that differs from what it knows from the web.
    """
    if not is_prepared(builder) or FORMAT in builder.info.as_proto.alternative_file_formats:
        builder.info.set_file_format(FORMAT, override=True, override_if_initialized=True)


@contextlib.contextmanager
def preparation_lock(builder: Any, *, wait: bool = False) -> Iterator[None]:
    """Keeps others from preparing the data set, and removes what a killed preparation left.

    Args:
        builder: of the data set, on this machine's file system.
        wait: whether to wait for another program that prepares it.

    Raises:
        UserError: another program prepares it, and `wait` is false.
        OSError: the folder cannot be written.
    """
    path = Path(builder.data_path.parent, f".{builder.data_path.name}.lock")
    with contextlib.ExitStack() as stack:
        try:
            held = stack.enter_context(file_lock(path, wait=wait))
        except BlockingIOError:
            raise UserError(
                f"another program is preparing data set {builder.info.full_name} in "
                f"{builder.data_path.parent}; wait until it has ended"
            ) from None
        # Without a lock, another's work cannot be told from leftovers, which stay.
        if held:
            _remove_leftovers(Path(builder.data_path))
        yield


def _remove_leftovers(folder: Path) -> None:
    """Removes the unfinished folders of one version of a data set; they may be terabytes."""
    for leftover in (*folder.parent.glob(f"incomplete.*_{folder.name}"), folder / _DRAFT):
        if leftover.is_dir():
            print(f"removing {leftover}, left by a killed preparation", file=sys.stderr)
            shutil.rmtree(leftover)


def raise_open_file_limit() -> None:
    """Raises this process's limit of open files, as far as the system lets it.

    TFDS sorts what exceeds 1 GB in 1,000 files at once, about as many as are often allowed.
    """
    import resource  # There is none on Windows.

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _OPEN_FILES:
        wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def needs_manual_download(builder: Any) -> str:
    """Returns what a data set says of what has to be downloaded by hand, in one line, if anything.

    Nothing of one that is prepared, in whatever format.
    """
    text = "" if is_prepared(builder) else builder.MANUAL_DOWNLOAD_INSTRUCTIONS
    return _one_line(text or "")


def check_manual_download(builder: Any, manual_dir: str) -> Path:
    """Returns the folder of the user's own downloads, by default downloads/manual in the data_dir.

    Raises:
        UserError: the data set needs them and there is nothing.
    """
    manual = Path(manual_dir or Path(builder.data_dir_root, "downloads", "manual")).expanduser()
    instructions = needs_manual_download(builder)
    if instructions and not (manual.is_dir() and any(manual.iterdir())):
        raise UserError(
            f"data set {builder.info.full_name} has to be downloaded by hand, and {manual} is "
            f"missing or empty (--manual_dir names another folder): {instructions}"
        )
    return manual


def download_and_prepare(builder: Any, manual: Path) -> None:
    """Downloads the data set, unless that is left to the user, and writes it.

    Args:
        builder: of a data set that is not prepared.
        manual: where the user's own downloads lie.

    Raises:
        UserError: something of the download is missing, the folder cannot be written, no network…
        RunFailedError: the data set's own code fails.
    """
    import tensorflow_datasets as tfds

    name = builder.info.full_name
    # Prepared data on the web are not in this format.
    config = tfds.download.DownloadConfig(manual_dir=str(manual), try_download_gcs=False)
    try:
        # TFDS prints what it is doing; standard output is for the result.
        with contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare(download_config=config)
    except UserError:
        raise
    except (OSError, AssertionError, ImportError) as error:
        # Builders assert what they need of the user, and bad downloads are OSErrors.
        looked_in = f"; manual downloads are looked for in {manual}"
        raise UserError(
            f"data set {name} cannot be prepared in {builder.data_path.parent}: {_one_line(error)}"
            f"{looked_in if builder.MANUAL_DOWNLOAD_INSTRUCTIONS else ''}"
        ) from error
    except Exception as error:
        # The writers do not tell a full disk by the kind of their exceptions.
        full = any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT))
        raise (UserError if full else RunError)(
            f"preparing data set {name} fails: {type(error).__name__}: {_one_line(error)}"
        ) from error


def convert_to_array_record(builder: Any) -> None:
    """Writes a prepared data set in the format with random access, next to the files it has.

    All of TFDS's formats hold the same serialized examples, which are copied one by one, shard by
    shard; memory does not grow with the data set, and nothing is encoded anew.

    Raises:
        UserError: a shard is missing or damaged, or holds another number of examples than the data
            set's information says.
        OSError: the folder cannot be written.
    """
    shards = list(_shards(builder))
    draft = Path(builder.data_path, _DRAFT)
    total = sum(length for _, _, length in shards)
    try:
        draft.mkdir()
        with tqdm(total=total, desc="converting", unit=" examples", mininterval=1) as bar:
            for source, target, length in shards:
                _copy(builder.info.file_format, source, draft / target.name, length)
                bar.update(length)
        # Killed among these, it leaves files that the information does not name; the next
        # conversion overwrites them.
        for _, target, _ in shards:
            (draft / target.name).replace(target)
        _add_format(draft, Path(builder.data_path, _INFO))
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _shards(builder: Any) -> Iterator[tuple[Path, Path, int]]:
    """Yields what each shard is called now and converted, and how many examples it holds."""
    for split in builder.info.splits.values():
        template = split.filename_template.replace(filetype_suffix=FORMAT)
        targets = template.sharded_filepaths(num_shards=len(split.shard_lengths))
        for source, target, length in zip(
            map(Path, split.filepaths), map(Path, targets), split.shard_lengths, strict=True
        ):
            if not source.exists() or source == target:
                raise UserError(
                    f"{source} is missing or not named after its format; prepare the data set anew "
                    "in another --data_dir"
                )
            yield source, target, length


def _copy(file_format: Any, source: Path, target: Path, length: int) -> None:
    """Copies the `length` records of one shard into a new file."""
    from tensorflow_datasets.core.file_adapters import ADAPTER_FOR_FORMAT, ArrayRecordFileAdapter

    try:
        records = ADAPTER_FOR_FORMAT[file_format].make_tf_data(str(source)).as_numpy_iterator()
        # Numbered because the writer takes pairs of a key, which it drops, and a record.
        ArrayRecordFileAdapter.write_examples(target, enumerate(records))
        found = ArrayRecordFileAdapter.num_examples(target)
    except Exception as error:
        # TensorFlow, array_record and Arrow have no kind of exception in common.
        raise UserError(f"{source} cannot be converted: {_one_line(error)}") from error
    if found != length:
        raise UserError(
            f"{source} holds {found:,} examples and not {length:,} as {_INFO} says; prepare the "
            "data set anew in another --data_dir"
        )


def _add_format(draft: Path, path: Path) -> None:
    """Adds the format to the data set's information, which makes the conversion valid."""
    info = json.loads(path.read_text())
    info.setdefault("alternativeFileFormats", []).append(FORMAT)
    changed = draft / _INFO
    changed.write_text(json.dumps(info, indent=2))
    shutil.copymode(path, changed)
    changed.replace(path)


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def format_splits(builder: Any) -> str:
    """Returns a table of a prepared data set's splits, and what else is worth knowing of it."""
    import tensorflow_datasets as tfds

    lines = [f"{'split':<12} {'examples':>12} {'shards':>7} {'bytes':>18}"]
    for name, split in builder.info.splits.items():
        size = sum(os.path.getsize(path) for path in split.filepaths)
        lines.append(f"{name:<12} {split.num_examples:>12,} {split.num_shards:>7,} {size:>18,}")
    kinds = [getattr(kind, "feature", kind) for kind in builder.info.features.values()]
    classes = [kind.num_classes for kind in kinds if isinstance(kind, tfds.features.ClassLabel)]
    lines += ["", f"classes      {classes[0]:,}" if classes else "classes      none"]
    undecodable = Path(builder.data_path, UNDECODABLE)
    if undecodable.exists():
        with undecodable.open(newline="", encoding="utf-8") as listed:
            count = sum(1 for _ in csv.reader(listed, delimiter="\t"))
        lines.append(f"left out     {count:,} undecodable files, listed in {undecodable}")
    lines.append(f"folder       {builder.data_path}")
    return "\n".join(lines)
