"""TFDS builder `imagenet21k`: ImageNet with all its classes, from the user's own download.

What pre-training on it is, is told in Section 3 of the paper; the data set is that of Deng et al.
(2009). Images keep the bytes of their files. Those that cannot be decoded are left out and listed
in `undecodable.tsv` next to the prepared data.

What preparing it needs, beside the download:
    Disk: the size of the images once, and 0.1 % more. TFDS shuffles by a hash of the file name:
        what exceeds 1 GB goes into 1,000 temporary files in the data set's unfinished folder, each
        of which is sorted, removed and written out in turn. Nothing is unpacked elsewhere.
    Memory: about 2 GB: one for the first images, then one for a thousandth of 1.3 TB. Measured
        were 1.7 GB for 1.8 GB of images and the same for 3.6 GB.
    Time: one pass over the download a split; a compressed archive is read once more before,
        because the classes must be known to number them.
    Open files: 1,000 temporary ones, so that `ulimit -Hn` should be 1,200 or more.
    TensorFlow: above 1 GB TFDS writes its temporary files with it; nothing here imports it.
"""

import collections
import concurrent.futures
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

from mixer_jax.data.decode import BadImageError, decode
from mixer_jax.data.preparation import UNDECODABLE
from mixer_jax.errors import UserError

_SYNSET = re.compile(r"n\d{8}")
_LAYOUTS = (
    "one archive (.tar, .tar.gz) of nXXXXXXXX.tar files, or a folder of nXXXXXXXX.tar files, or a "
    "folder of nXXXXXXXX folders of images"
)
# ImageNet-1k's archives look the same and belong into the same folder for TFDS's `imagenet2012`.
_IMAGENET_1K = "ILSVRC2012"
# One image in so many is held out.
_HELD_OUT = 100


class _File(NamedTuple):
    synset: str
    name: str
    content: bytes


class Imagenet21k(tfds.core.GeneratorBasedBuilder):
    """Every image in "train" ("all"), or one of a hundred in "validation" ("held_out")."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [
        tfds.core.BuilderConfig(name="all", description="Every image in train."),
        tfds.core.BuilderConfig(
            name="held_out", description="1 % in validation, by a hash of the file's name."
        ),
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "get ImageNet-21k from https://image-net.org/download-images (fall11_whole.tar or "
        f"winter21_whole.tar.gz) and put there, or into a folder imagenet21k there, {_LAYOUTS}"
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(),
                    # The names are those of the download, and known when it is found.
                    "label": tfds.features.ClassLabel(),
                    "file_name": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://image-net.org",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        place = _find(Path(dl_manager.manual_dir))
        self.info.features["label"].names = _list_synsets(place)
        if self.builder_config.name == "all":
            return {"train": self._generate_examples(place, {True, False})}
        return {
            "train": self._generate_examples(place, {False}),
            "validation": self._generate_examples(place, {True}),
        }

    def _generate_examples(
        self, place: Path, held_out: set[bool]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        files = (file for file in _files(place) if _is_held_out(file.name) in held_out)
        # While it is being written, the folder is TFDS's unfinished one.
        with open(self.data_path / UNDECODABLE, "a", newline="", encoding="utf-8") as listed:
            table = csv.writer(listed, delimiter="\t", lineterminator="\n")
            for file, fault in _checked(files):
                if fault:
                    table.writerow([file.name, fault])
                else:
                    yield (
                        file.name,
                        {"image": file.content, "label": file.synset, "file_name": file.name},
                    )


def _is_held_out(name: str) -> bool:
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % _HELD_OUT == 0


def _checked(files: Iterator[_File]) -> Iterator[tuple[_File, str]]:
    """Yields each file with what makes it undecodable, or "".

    Files are checked in parallel and come out in their order; only a few are held at a time.
    """
    threads = os.cpu_count() or 1
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        pending: collections.deque[tuple[_File, concurrent.futures.Future[str]]]
        pending = collections.deque()
        for file in files:
            pending.append((file, pool.submit(_fault, file.content)))
            if len(pending) > 4 * threads:
                oldest, fault = pending.popleft()
                yield oldest, fault.result()
        for oldest, fault in pending:
            yield oldest, fault.result()


def _fault(content: bytes) -> str:
    try:
        decode(content)
    except BadImageError as error:
        return " ".join(str(error).split())
    return ""


def _find(manual_dir: Path) -> Path:
    """Returns the archive of archives, or the folder with one archive or folder a class."""
    for folder in (manual_dir / "imagenet21k", manual_dir):
        inside = sorted(folder.iterdir()) if folder.is_dir() else []
        found = [
            path
            for path in (folder, *inside)
            if not path.name.startswith(_IMAGENET_1K)
            and (_has_synsets(path) if path.is_dir() else _is_whole(path))
        ]
        if len(found) > 1:
            raise UserError(
                f"{folder} holds several that may be ImageNet-21k: {', '.join(map(str, found))}; "
                f"leave one, or put one into {manual_dir / 'imagenet21k'}"
            )
        if found:
            return found[0]
    raise UserError(f"{manual_dir} holds no ImageNet-21k; expected is, in it, {_LAYOUTS}")


def _has_synsets(folder: Path) -> bool:
    return any(_synset(path.name) or _SYNSET.fullmatch(path.name) for path in folder.iterdir())


def _is_whole(path: Path) -> bool:
    """Says whether a file is an archive of the classes' archives, by the first file in it."""
    if not path.name.endswith((".tar", ".tar.gz", ".tgz")) or _synset(path.name):
        return False
    try:
        with tarfile.open(path) as archive:
            first = next((member for member in archive if member.isfile()), None)
    except (tarfile.TarError, EOFError, zlib.error):
        return False
    return first is not None and bool(_synset(first.name))


def _synset(name: str) -> str:
    """Returns the class whose archive has this name, or ""."""
    stem, dot, suffix = os.path.basename(name).partition(".")
    return stem if _SYNSET.fullmatch(stem) and dot + suffix == ".tar" else ""


def _list_synsets(place: Path) -> list[str]:
    """Returns the WordNet ids of all classes in their order, those without images too."""
    if place.is_dir():
        return sorted(_members(place))
    with _whole(place), tarfile.open(place) as archive:
        members = tqdm(archive, desc="finding the classes", unit=" classes", leave=False)
        synsets = [synset for member in members if (synset := _synset(member.name))]
    twice = [synset for synset, times in collections.Counter(synsets).items() if times > 1]
    if twice:
        raise UserError(f"{place} holds {twice[0]}.tar more than once; download it again")
    return sorted(synsets)


def _members(folder: Path) -> dict[str, Path]:
    """Returns the archive or the folder of each class.

    Of a class with both, the archive counts: it is complete, the folder may be unpacked in part.
    """
    members = {path.name: path for path in folder.iterdir() if _SYNSET.fullmatch(path.name)}
    archives = {_synset(path.name): path for path in folder.iterdir() if _synset(path.name)}
    return members | archives


def _files(place: Path) -> Iterator[_File]:
    """Yields every file of every class, named "nXXXXXXXX/…" with no name twice."""
    if place.is_dir():
        for synset, path in sorted(_members(place).items()):
            if path.is_dir():
                yield from _distinct(synset, _of_folder(path))
            else:
                with _whole(path), open(path, "rb") as file:
                    yield from _distinct(synset, _of_archive(file))
    else:
        with _whole(place), tarfile.open(place, "r|*") as archive:
            for member in archive:
                content = archive.extractfile(member)
                # Some archives of classes without images are files of no bytes.
                if (synset := _synset(member.name)) and content and member.size:
                    yield from _distinct(synset, _of_archive(content))


def _distinct(synset: str, files: Iterator[tuple[str, bytes]]) -> Iterator[_File]:
    seen: set[str] = set()
    for path, content in files:
        # A name need not be Unicode on disk; in a data set it must.
        readable = os.fsencode(path).decode("utf-8", "replace")
        first = f"{synset}/{readable.removeprefix('./').removeprefix(f'{synset}/')}"
        others = (f"{first}#{number}" for number in itertools.count(2))
        name = next(name for name in itertools.chain([first], others) if name not in seen)
        seen.add(name)
        yield _File(synset, name, content)


def _of_folder(folder: Path) -> Iterator[tuple[str, bytes]]:
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(parent, name)
            if not path.is_file():  # Reading a pipe would never end.
                continue
            yield path.relative_to(folder).as_posix(), path.read_bytes()


def _of_archive(file: Any) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=file, mode="r|*") as archive:
        for member in archive:
            if member.isfile() and (content := archive.extractfile(member)):
                yield member.name, content.read()


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Tells the user that an archive is cut off or damaged, if reading it says so."""
    try:
        yield
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged or cut off ({error}); download it again") from error
