"""Damage to the files of a checkpoint."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

from mixer_jax.checkpoints.resolve import list_steps
from tests.campaign.runs import LostError
from tests.campaign.trial import Trial


def list_files(checkpoint: Path) -> list[str]:
    """Lists the files of a checkpoint, relative to it, in alphabetical order."""
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    return sorted(path.relative_to(checkpoint).as_posix() for path in files)


def _truncate(path: Path, other: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))] if data else b"")


def _empty(path: Path, other: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def _flip_bit(path: Path, other: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def _delete(path: Path, other: Path, rng: random.Random) -> None:
    path.unlink()


def _swap(path: Path, other: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(data)


def _copy(path: Path, other: Path, rng: random.Random) -> None:
    shutil.copyfile(other, path)


def _extend(path: Path, other: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randint(1, 100)))


def _replace_by_folder(path: Path, other: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


SWAPPED = "swapped with another step's"
# Functions of the file to damage, the same file of another checkpoint, and a source of randomness.
# Only a swap damages the other file, too.
DAMAGES: dict[str, Callable[[Path, Path, random.Random], None]] = {
    "truncated": _truncate,
    "zero-length": _empty,
    "one bit flipped": _flip_bit,
    "deleted": _delete,
    SWAPPED: _swap,
    "replaced by another step's": _copy,
    "extended": _extend,
    "replaced by a folder": _replace_by_folder,
}


def damage_checkpoint(trial: Trial) -> str:
    """Damages a file of the newest of two checkpoints; the run resumes from an intact one.

    The indices of trials go through all pairs of a file and a damage. Returns "recovered", or
    "refused" if both checkpoints are damaged.
    """
    trial.copy_interrupted_run()
    checkpoints = trial.workdir / "checkpoints"
    older, newer = (checkpoints / str(step) for step in list_steps(str(trial.workdir)))
    files, other_files = list_files(newer), list_files(older)
    index = trial.index % (len(files) * len(DAMAGES))
    file, damage = files[index // len(DAMAGES)], [*DAMAGES][index % len(DAMAGES)]
    # The same file, or the one at the same position if its name is random.
    position = min(files.index(file), len(other_files) - 1)
    other = file if file in other_files else other_files[position]
    trial.record(file=file, damage=damage)
    DAMAGES[damage](newer / file, older / other, trial.rng)
    if damage != SWAPPED:
        return trial.recover()
    # Both checkpoints are damaged, unless the files are equal.
    run = trial.start()
    if trial.check_end(run, [2]) == 0:
        trial.check_result(run)
        return "recovered"
    for checkpoint in (older, newer):
        if str(checkpoint) not in run.error_line:
            raise LostError("the message does not name both checkpoints")
    DAMAGES[damage](newer / file, older / other, trial.rng)
    trial.recover()
    return "refused"
