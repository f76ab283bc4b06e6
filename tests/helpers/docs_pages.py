"""Code blocks of documentation pages, and the markers that say how a test checks them.

A marker is an HTML comment in the line above a block, which readers do not see:

    <!-- test: run -->            commands or Python that the fast tests run
    <!-- test: slow -->           the same, by the slow tests; training is shortened
    <!-- test: parse -->          only checked for flags, config keys, files and imports
    <!-- test: file=mine.py -->   written to a file, which the page's commands can use
    <!-- test: output -->         what the block before it prints; a line "…" matches any lines

Without a marker, shell blocks are parsed and Python blocks run. `run` and `slow` take two options:
`code=1` is the expected exit code (also of `parse`, for commands that are refused), and
`with="--num_images=4"` adds arguments. All Python blocks of a page share their names.
"""

import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path

# Languages of shell blocks; a block without a language is one, too.
SHELL = ("", "bash", "console", "sh", "shell")
MODES = ("run", "slow", "parse", "file", "output")
_MARKER = re.compile(r"\s*<!-- test: (.*?) -->\s*")
_FENCE = re.compile(r"(\s*)(`{3,}|~{3,})\s*\{?\s*\.?([\w+-]*).*")


@dataclass(frozen=True)
class Block:
    """A code block.

    Attributes:
        place: File and line number, for messages.
        language: First word after the fence.
        text: Contents, without the indentation of the fence.
        mode: One of `MODES`, or "" if tests ignore the block.
        file: Name of the file to write, for the mode "file".
        code: Expected exit code.
        extra: Additional arguments.
    """

    place: str
    language: str
    text: str
    mode: str
    file: str = ""
    code: int = 0
    extra: tuple[str, ...] = ()

    @property
    def is_shell(self) -> bool:
        """True if the block has commands."""
        return self.language in SHELL and self.mode not in ("file", "output")

    @property
    def is_python(self) -> bool:
        """True if the block is Python to check."""
        return self.language == "python" and self.mode != "output"

    def commands(self) -> list[str]:
        """Returns the commands of a shell block, one per element, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "console":
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def read_blocks(path: Path) -> list[Block]:
    """Reads the code blocks of a page.

    Raises:
        ValueError: A marker is unknown or is not above a block, or a block does not end.
    """
    blocks: list[Block] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    marker, index = "", 0
    while index < len(lines):
        place, line = f"{path}:{index + 1}", lines[index]
        index += 1
        if match := _MARKER.fullmatch(line):
            if marker:
                raise ValueError(f"{place}: the marker above this one is not above a code block.")
            marker = match.group(1)
        elif match := _FENCE.fullmatch(line):
            indent, fence, language = match.groups()
            start = index
            while index < len(lines) and lines[index].strip() != fence:
                index += 1
            if index == len(lines):
                raise ValueError(f"{place}: this block does not end.")
            text = "".join(f"{part.removeprefix(indent)}\n" for part in lines[start:index])
            blocks.append(_make_block(place, language, text, marker))
            marker, index = "", index + 1
        elif marker and line.strip():
            raise ValueError(f"{place}: the marker {marker!r} must be above a code block.")
    if marker:
        raise ValueError(f"{path}: the marker {marker!r} must be above a code block.")
    return blocks


def _make_block(place: str, language: str, text: str, marker: str) -> Block:
    default = "parse" if language in SHELL else "run" if language == "python" else ""
    mode, file, code, extra = default, "", 0, []
    for word in shlex.split(marker):
        name, _, value = word.partition("=")
        if name == "with":
            extra += shlex.split(value)
        elif name == "code":
            code = int(value)
        elif name in MODES and bool(value) == (name == "file"):
            mode, file = name, value
        else:
            raise ValueError(f"{place}: the marker must be one of {', '.join(MODES)}, got {word}.")
    if mode in ("run", "slow", "parse") and not default:
        raise ValueError(f"{place}: a block in {language!r} can be neither run nor parsed.")
    return Block(place, language, textwrap.dedent(text), mode, file, code, tuple(extra))
