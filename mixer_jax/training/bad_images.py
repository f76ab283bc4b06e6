"""The book of training images that could not be used; `bad_images_HOST.jsonl` in the workdir."""

import collections
import hashlib
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from mixer_jax.data.readers import BadImage
from mixer_jax.distributed import multihost
from mixer_jax.errors import UserError
from mixer_jax.files import atomic_write

# New images that a host tells the others of each time they ask each other.
_TOLD_AT_ONCE = 64
_FIELDS = {"step", "name", "reason"}


class BadImageLog:
    """Names every image once, at the step that met it first, and says when they are too many.

    Each host writes what it met itself. A resumed run forgets what came after its checkpoint, and
    counts anew: what was mended in between no longer counts.
    """

    def __init__(
        self,
        workdir: str,
        first_step: int,
        *,
        num_examples: int,
        max_fraction: float,
        say: Callable[[str], None],
    ):
        """Opens the book.

        Args:
            workdir: absolute path or URL of the run.
            first_step: steps done when the run begins or is resumed.
            num_examples: that the run trains on.
            max_fraction: of these that may be bad.
            say: prints a line for people.
        """
        self._num_examples, self._max_share, self._say = num_examples, max_fraction, say
        self._path = _log_path(workdir, jax.process_index())
        # Host 0 keeps the books of hosts that are no longer there.
        gone = [
            path
            for path in epath.Path(workdir).glob("bad_images_*.jsonl")
            if not any(path == _log_path(workdir, host) for host in range(jax.process_count()))
        ]
        for path in [self._path, *(gone if multihost.is_primary_process() else [])]:
            _forget(path, first_step)
        self._lines = _read(self._path)
        self._written = {line["name"] for line in self._lines}
        # Met since the run began or was resumed: here, with the reasons, and on all hosts, by a
        # number for each name.
        self._reasons: dict[str, str] = {}
        self._untold: list[tuple[int, int]] = []
        self._met: set[tuple[int, int]] = set()

    @property
    def too_many(self) -> bool:
        """Whether more than the allowed share of the examples is bad; the same on every host."""
        return len(self._met) > self._max_share * self._num_examples

    def record(self, step: int, met: list[BadImage]) -> None:
        """Writes down the images that a step met and that are not in the book."""
        new = {bad.name: bad.reason for bad in met if bad.name not in self._reasons}
        if new and not self._reasons:
            self._say(
                f"step {step:,}: {met[0].name} cannot be used ({met[0].reason}); another image "
                f"takes its place; all such images are named in {self._path}"
            )
        self._reasons |= new
        self._untold += map(_number, new)
        unwritten = [name for name in new if name not in self._written]
        self._lines += [{"step": step, "name": n, "reason": new[n]} for n in unwritten]
        self._written.update(unwritten)
        if unwritten:
            _write(self._path, self._lines)
        if jax.process_count() == 1:
            self.share()

    def share(self) -> None:
        """Tells the other hosts what is new here; all of them must call it at the same step."""
        if jax.process_count() == 1:
            self._met.update(self._untold)
            self._untold.clear()
            return
        told, self._untold = self._untold[:_TOLD_AT_ONCE], self._untold[_TOLD_AT_ONCE:]
        # No name has the number (0, 0).
        table = np.zeros((_TOLD_AT_ONCE, 2), np.uint32)
        for row, number in enumerate(told):
            table[row] = number
        rows = multihost.all_gather(table).reshape(-1, 2)
        self._met.update((int(high), int(low)) for high, low in rows if high or low)

    def close(self) -> None:
        """Says how many there were, by reason, and where they are named."""
        if self._reasons:
            self._say(f"{self._counts()}; named in {self._path}")

    def verdict(self, saved_step: int) -> str:
        """Returns why the run stops, and how it goes on.

        Args:
            saved_step: of the newest checkpoint.
        """
        return (
            f"{len(self._met):,} of {self._num_examples:,} training images cannot be used, more "
            f"than config.bad_images.max_fraction={self._max_share:g} allows; they are named in "
            f"{self._path.parent}/bad_images_*.jsonl: mend them or allow more, and start the same "
            f"command to go on from step {saved_step:,}"
        )

    def _counts(self) -> str:
        counts = collections.Counter(self._reasons.values())
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common())
        images = "image" if len(self._reasons) == 1 else "images"
        return f"{len(self._reasons):,} training {images} could not be used ({reasons})"


def _log_path(workdir: str, host: int) -> epath.Path:
    return epath.Path(workdir) / f"bad_images_{host}.jsonl"


def _number(name: str) -> tuple[int, int]:
    """Returns 64 bits that stand for a name, as two numbers that any device holds."""
    digest = hashlib.blake2b(name.encode("utf-8", "backslashreplace"), digest_size=8).digest()
    return int.from_bytes(digest[:4]) or 1, int.from_bytes(digest[4:])


def _read(path: epath.Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    except ValueError:
        lines = [None]
    if not all(isinstance(line, dict) and line.keys() == _FIELDS for line in lines):
        raise UserError(f"{str(path)!r} is no book of bad images; move it away")
    return lines


def _forget(path: epath.Path, first_step: int) -> None:
    lines = _read(path)
    kept = [line for line in lines if line["step"] <= first_step]
    if len(kept) < len(lines):
        _write(path, kept)


def _write(path: epath.Path, lines: list[dict[str, Any]]) -> None:
    atomic_write(path, "".join(json.dumps(line) + "\n" for line in lines))
