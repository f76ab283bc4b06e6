"""TFDS builder `imagenet21k`: ImageNet with all classes, from a manual download.

The dataset is that of Deng et al. (2009); Section 3 of the paper describes pre-training. Image
files are stored byte for byte. Files that cannot be decoded are skipped and listed in
`undecodable.tsv` next to the prepared data.

Resources needed for preparation, in addition to the download:
    Disk: The size of the images, plus 0.1 %. TFDS shuffles by a hash of the file name: data above
        1 GB is written to 1,000 temporary files, each of which is then sorted and rewritten.
        Archives are not unpacked to disk.
    Memory: About 2 GB: 1 GB for the first images, then a thousandth of 1.3 TB. Measured: 1.7 GB
        for 1.8 GB of images and for 3.6 GB.
    Time: One pass over the download per split; a compressed archive is read once more before that,
        to list the classes.
    Open files: 1,000 temporary files, so `ulimit -Hn` should be at least 1,200.
    TensorFlow: Used by TFDS to write temporary files if there is more than 1 GB of data.
"""

import collections
import contextlib
import csv
import hashlib
import itertools
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import tensorflow_datasets as tfds
from tqdm import tqdm

from mixer_jax.data.preparation import UNDECODABLE, find_decoding_error, map_in_order
from mixer_jax.errors import UserError, summarize_error

# What reading a damaged archive raises. Headers can claim sizes that do not fit in memory.
_DAMAGE = (tarfile.TarError, EOFError, zlib.error, ValueError, OverflowError, MemoryError)
_SYNSET = re.compile(r"n\d{8}")
_LAYOUTS = (
    "one archive (.tar, .tar.gz) of nXXXXXXXX.tar files, or a folder of nXXXXXXXX.tar files, or a "
    "folder of nXXXXXXXX folders of images"
)
# ImageNet-1k's archives have the same structure, and TFDS expects them in the same folder.
_IMAGENET_1K = "ILSVRC2012"
# One in this many images is held out.
_HELD_OUT_EVERY = 100


class _ImageFile(NamedTuple):
    synset: str
    name: str
    content: bytes


class Imagenet21k(tfds.core.GeneratorBasedBuilder):
    """ImageNet-21k with all images in "train" ("all"), or 1 % in "validation" ("held_out")."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [
        tfds.core.BuilderConfig(name="all", description="Every image in train."),
        tfds.core.BuilderConfig(
            name="held_out", description="1 % in validation, by a hash of the file name."
        ),
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "download ImageNet-21k from https://image-net.org/download-images (fall11_whole.tar or "
        f"winter21_whole.tar.gz) and put there, or into a subfolder imagenet21k, {_LAYOUTS}"
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(),
                    # The class names are read from the download.
                    "label": tfds.features.ClassLabel(),
                    "file_name": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://image-net.org",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        download = _find_download(Path(dl_manager.manual_dir))
        self.info.features["label"].names = _list_synsets(download)
        if self.builder_config.name == "all":
            return {"train": self._generate_examples(download, {True, False})}
        return {
            "train": self._generate_examples(download, {False}),
            "validation": self._generate_examples(download, {True}),
        }

    def _generate_examples(
        self, download: Path, held_out: set[bool]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        files = (file for file in _iter_files(download) if _is_held_out(file.name) in held_out)
        # During preparation, data_path is TFDS's temporary folder.
        with open(self.data_path / UNDECODABLE, "a", newline="", encoding="utf-8") as undecodable:
            writer = csv.writer(undecodable, delimiter="\t", lineterminator="\n")
            for file, error in _try_decode_all(files):
                if error:
                    writer.writerow([file.name, error])
                else:
                    yield (
                        file.name,
                        {"image": file.content, "label": file.synset, "file_name": file.name},
                    )


def _is_held_out(name: str) -> bool:
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % _HELD_OUT_EVERY == 0


def _try_decode_all(files: Iterator[_ImageFile]) -> Iterator[tuple[_ImageFile, str]]:
    """Yields each file with the error from decoding it, or ""."""
    return map_in_order(lambda file: (file, find_decoding_error(file.content)), files)


def _find_download(manual_dir: Path) -> Path:
    """Finds the archive of class archives, or the folder with one archive or folder per class."""
    for folder in (manual_dir / "imagenet21k", manual_dir):
        children = sorted(folder.iterdir()) if folder.is_dir() else []
        candidates = [
            path
            for path in (folder, *children)
            if not path.name.startswith(_IMAGENET_1K)
            and (_contains_synsets(path) if path.is_dir() else _is_archive_of_archives(path))
        ]
        if len(candidates) > 1:
            raise UserError(
                f"{folder} must contain one download of ImageNet-21k, got "
                f"{', '.join(map(str, candidates))}. Keep one, or move one to "
                f"{manual_dir / 'imagenet21k'}."
            )
        if candidates:
            return candidates[0]
    raise UserError(f"{manual_dir} must contain ImageNet-21k: {_LAYOUTS}.")


def _contains_synsets(folder: Path) -> bool:
    return any(
        _archive_synset(path.name) or _SYNSET.fullmatch(path.name) for path in folder.iterdir()
    )


def _is_archive_of_archives(path: Path) -> bool:
    """Checks whether the first file in an archive is a class archive."""
    if not path.name.endswith((".tar", ".tar.gz", ".tgz")) or _archive_synset(path.name):
        return False
    try:
        with tarfile.open(path) as archive:
            first = next((member for member in archive if member.isfile()), None)
    except _DAMAGE:
        return False
    return first is not None and bool(_archive_synset(first.name))


def _archive_synset(name: str) -> str:
    """Parses the synset from the name of a class archive; "" for other names."""
    stem, dot, suffix = os.path.basename(name).partition(".")
    return stem if _SYNSET.fullmatch(stem) and dot + suffix == ".tar" else ""


def _list_synsets(download: Path) -> list[str]:
    """Lists the WordNet IDs of all classes in sorted order, including those without images."""
    if download.is_dir():
        return sorted(_class_paths(download))
    with _reporting_damage(download), tarfile.open(download) as archive:
        members = tqdm(archive, desc="listing classes", unit=" classes", leave=False)
        synsets = [synset for member in members if (synset := _archive_synset(member.name))]
    duplicates = [synset for synset, count in collections.Counter(synsets).items() if count > 1]
    if duplicates:
        raise UserError(
            f"{download} contains {duplicates[0]}.tar more than once. Download it again."
        )
    return sorted(synsets)


def _class_paths(folder: Path) -> dict[str, Path]:
    """Finds the archive or folder of each class.

    An archive takes precedence: it is complete, while the folder may be partially unpacked.
    """
    folders = {path.name: path for path in folder.iterdir() if _SYNSET.fullmatch(path.name)}
    archives = {synset: path for path in folder.iterdir() if (synset := _archive_synset(path.name))}
    return folders | archives


def _iter_files(download: Path) -> Iterator[_ImageFile]:
    """Yields every file of every class, with unique names "nXXXXXXXX/…"."""
    if download.is_dir():
        for synset, path in sorted(_class_paths(download).items()):
            if path.is_dir():
                yield from _with_unique_names(synset, _iter_folder(path))
            else:
                with _reporting_damage(path), open(path, "rb") as file:
                    yield from _with_unique_names(synset, _iter_archive(file))
    else:
        with _reporting_damage(download), tarfile.open(download, "r|*") as archive:
            for member in archive:
                content = archive.extractfile(member)
                # Some archives of classes without images are empty files.
                if (synset := _archive_synset(member.name)) and content and member.size:
                    yield from _with_unique_names(synset, _iter_archive(content))


def _with_unique_names(synset: str, files: Iterator[tuple[str, bytes]]) -> Iterator[_ImageFile]:
    used: set[str] = set()
    for path, content in files:
        # File names on disk may be invalid Unicode, which TFDS would reject.
        text = os.fsencode(path).decode("utf-8", "replace")
        first = f"{synset}/{text.removeprefix('./').removeprefix(f'{synset}/')}"
        others = (f"{first}#{number}" for number in itertools.count(2))
        name = next(name for name in itertools.chain([first], others) if name not in used)
        used.add(name)
        yield _ImageFile(synset, name, content)


def _iter_folder(folder: Path) -> Iterator[tuple[str, bytes]]:
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(parent, name)
            if not path.is_file():  # Reading a pipe would block forever.
                continue
            yield path.relative_to(folder).as_posix(), path.read_bytes()


def _iter_archive(file: Any) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=file, mode="r|*") as archive:
        for member in archive:
            if member.isfile() and (content := archive.extractfile(member)):
                yield member.name, content.read()


@contextlib.contextmanager
def _reporting_damage(path: Path) -> Iterator[None]:
    """Raises UserError if reading an archive shows that it is truncated or damaged."""
    try:
        yield
    except _DAMAGE as error:
        raise UserError(
            f"{path} is damaged or truncated ({summarize_error(error)}). Download it again."
        ) from error
