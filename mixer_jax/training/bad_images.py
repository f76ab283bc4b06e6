"""The book of training images that could not be used; `bad_images_HOST.jsonl` in the workdir."""

import collections
import json
from collections.abc import Callable

import jax
from etils import epath

from mixer_jax.data.reading import BadImage
from mixer_jax.errors import UserError
from mixer_jax.training.workdir import write_whole


class BadImageLog:
    """Names every image once, at the step that met it first, and says when they are too many.

    Each host writes what it met itself. A resumed run forgets what came after its checkpoint.
    """

    def __init__(
        self,
        workdir: str,
        first_step: int,
        *,
        num_examples: int,
        max_share: float,
        say: Callable[[str], None],
    ):
        """Opens the book.

        Args:
            workdir: absolute path or URL of the run.
            first_step: steps done when the run begins or is resumed.
            num_examples: that the run trains on.
            max_share: of these that may be bad.
            say: prints a line for people.
        """
        self._path = epath.Path(workdir) / f"bad_images_{jax.process_index()}.jsonl"
        self._num_examples, self._max_share = num_examples, max_share
        self._say = say
        self._reasons: dict[str, str] = {}
        self._lines: list[str] = []
        for line in self._read_lines():
            entry = json.loads(line)
            if entry["step"] <= first_step:
                self._reasons[entry["name"]] = entry["reason"]
                self._lines.append(line)
        if self._path.exists():
            self._write()

    @property
    def too_many(self) -> bool:
        """Whether more than the allowed share of the examples is bad."""
        return len(self._reasons) > self._max_share * self._num_examples

    def record(self, step: int, met: list[BadImage]) -> None:
        """Writes down the images that a step met and that are not in the book."""
        new = {bad.name: bad.reason for bad in met if bad.name not in self._reasons}
        if not new:
            return
        if not self._reasons:
            self._say(
                f"step {step:,}: {met[0].name} cannot be used ({met[0].reason}); another image "
                f"takes its place; all such images are named in {self._path}"
            )
        self._reasons |= new
        self._lines += [
            json.dumps({"step": step, "name": name, "reason": reason})
            for name, reason in new.items()
        ]
        self._write()

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
            f"{self._counts()} of {self._num_examples:,}, more than "
            f"config.bad_images.max_share={self._max_share:g} allows; they are named in "
            f"{self._path}: mend or remove them, or allow more, and start the same command to go "
            f"on from step {saved_step:,}"
        )

    def _counts(self) -> str:
        counts = collections.Counter(self._reasons.values())
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common())
        return f"{len(self._reasons):,} training images could not be used ({reasons})"

    def _read_lines(self) -> list[str]:
        if not self._path.exists():
            return []
        lines = self._path.read_text().split("\n")[:-1]
        try:
            for line in lines:
                json.loads(line)
        except ValueError as error:
            raise UserError(
                f"{str(self._path)!r} has lines that are no JSON; move it away"
            ) from error
        return lines

    def _write(self) -> None:
        write_whole(self._path, "".join(line + "\n" for line in self._lines))
