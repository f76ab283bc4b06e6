"""Log of training images that cannot be used: `bad_images_HOST.jsonl` in the workdir."""

import collections
import json
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from mixer_jax.config.schema import BadImagesConfig
from mixer_jax.data.readers import BadImage
from mixer_jax.distributed import multihost
from mixer_jax.errors import UserError
from mixer_jax.files import LineFile, is_integer, read_json_lines


class BadImageLog:
    """Log that names every bad image once, and detects when there are too many of them.

    Each host logs the images that it has seen. The number of bad images is the largest sum over all
    hosts in one epoch, in which every image is seen by one host; a step that spans two epochs
    counts for the first. A resumed run drops entries after its checkpoint and counts from zero, so
    images that were restored in the meantime no longer count.
    """

    def __init__(
        self,
        workdir: str,
        start_step: int,
        *,
        num_examples: int,
        batch_size: int,
        config: BadImagesConfig,
        log: Callable[[str], None],
    ):
        """Opens the log.

        Args:
            workdir: Absolute path or URL of the run.
            start_step: Steps taken when the run starts or resumes.
            num_examples: Number of training images.
            batch_size: Images per step, over all hosts.
            config: Number of training images that may be bad.
            log: Function that prints a line.

        Raises:
            UserError: The file exists and is not a log of bad images.
        """
        self._num_examples, self._batch_size = num_examples, batch_size
        self._config, self._log = config, log
        self._path = _log_path(workdir, jax.process_index())
        # The primary process truncates the logs of hosts that the run no longer has.
        current = {_log_path(workdir, host) for host in range(jax.process_count())}
        found = set(epath.Path(workdir).glob("bad_images_*.jsonl"))
        for path in found - current if multihost.is_primary_process() else ():
            LineFile(path, map(json.dumps, _read_entries(path, start_step))).close()
        entries = _read_entries(self._path, start_step)
        self._file = LineFile(self._path, map(json.dumps, entries))
        self._logged = {entry["name"] for entry in entries}
        # Reasons of all images seen here since the run started or resumed, by name.
        self._reasons: dict[str, str] = {}
        # Names seen here, by epoch.
        self._seen: dict[int, set[str]] = collections.defaultdict(set)
        self._num_bad = 0

    @property
    def too_many(self) -> bool:
        """True if too many images are bad; equal on all hosts."""
        # A small dataset may have as many as a large one, but never most of its images.
        max_count = min(self._config.max_count, self._num_examples // 2)
        return self._num_bad > max(max_count, self._config.max_fraction * self._num_examples)

    def record(self, step: int, bad_images: list[BadImage]) -> None:
        """Logs the bad images of one step that are not in the log yet."""
        new = {bad.name: bad.reason for bad in bad_images if bad.name not in self._reasons}
        if new and not self._reasons:
            self._log(
                f"step {step:,}: {bad_images[0].name} cannot be used ({bad_images[0].reason}) and "
                f"is replaced by another image; {self._path} lists all such images"
            )
        self._reasons |= new
        self._seen[self._epoch(step)].update(bad.name for bad in bad_images)
        unlogged = [name for name in new if name not in self._logged]
        self._logged.update(unlogged)
        if unlogged:
            entries = ({"step": step, "name": name, "reason": new[name]} for name in unlogged)
            self._file.append(*map(json.dumps, entries))

    def sync_hosts(self, step: int) -> None:
        """Counts the bad images of all hosts, which must call it at the same step."""
        epoch = self._epoch(step)
        # With the previous epoch, which may have ended since the last call.
        local_counts = len(self._seen[epoch - 1]), len(self._seen[epoch])
        self._num_bad = max(self._num_bad, *multihost.sum_across_hosts(*local_counts))

    def flush(self) -> None:
        """Waits until all entries are written, which a resumed run does not write again."""
        self._file.flush()

    def close(self) -> None:
        """Waits until all entries are written."""
        self._file.close()

    def print_summary(self) -> None:
        """Prints the number of bad images by reason, and the path of the log."""
        if self._reasons:
            counts = collections.Counter(self._reasons.values())
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common())
            images = "image" if len(self._reasons) == 1 else "images"
            self._log(
                f"{len(self._reasons):,} training {images} could not be used ({reasons}), listed "
                f"in {self._path}"
            )

    def stop_message(self, saved_step: int) -> str:
        """Formats the reason for stopping the run, and how to resume it.

        Args:
            saved_step: Step of the newest checkpoint.
        """
        return (
            f"{self._num_bad:,} of {self._num_examples:,} training images "
            f"{'is' if self._num_bad == 1 else 'are'} bad, more than "
            f"config.bad_images.max_fraction={self._config.max_fraction:g} and "
            f"config.bad_images.max_count={self._config.max_count:,} allow. They are listed in "
            f"{self._path.parent}/bad_images_*.jsonl. Restore files that have changed or raise "
            f"max_fraction, and run the same command to resume from step {saved_step:,}. To train "
            "with repaired files, start a new run in another --workdir."
        )

    def _epoch(self, step: int) -> int:
        return (step - 1) * self._batch_size // self._num_examples


def read_bad_images(workdir: str) -> list[dict[str, Any]]:
    """Reads step, name and reason of the bad images of a run, from the logs of all hosts.

    Raises:
        UserError: A file is not a log of bad images.
    """
    paths = sorted(epath.Path(workdir).glob("bad_images_*.jsonl"))
    entries = [entry for path in paths for entry in _read_log(path)]
    return sorted(entries, key=lambda entry: (entry["step"], entry["name"]))


def _log_path(workdir: str, host: int) -> epath.Path:
    return epath.Path(workdir) / f"bad_images_{host}.jsonl"


def _read_entries(path: epath.Path, last_step: int) -> list[dict[str, Any]]:
    """Reads the entries up to `last_step`, except one that a crash cut off."""
    return [entry for entry in _read_log(path) if entry["step"] <= last_step]


def _read_log(path: epath.Path) -> list[dict[str, Any]]:
    try:
        entries = read_json_lines(path)
        if all(map(_is_entry, entries)):
            return entries
    except ValueError:
        pass
    raise UserError(f"{str(path)!r} is not a log of bad images. Move the file away.")


def _is_entry(entry: dict[str, Any]) -> bool:
    texts = (entry.get("name"), entry.get("reason"))
    is_valid = is_integer(entry.get("step")) and all(isinstance(text, str) for text in texts)
    return is_valid and len(entry) == 3
