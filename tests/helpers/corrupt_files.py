"""Files of weights that are damaged, or made to do harm, and how their refusal is checked."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixer_jax.checkpoints.load import PretrainedWeights, load_checkpoint
from mixer_jax.errors import UserError
from mixer_jax.models.mixer_config import MixerConfig

SMALLEST = MixerConfig(
    num_blocks=1, patch_size=1, hidden_dim=2, tokens_mlp_dim=2, channels_mlp_dim=2
)
# Loads files in a process of its own, which says of each how it ended and by how many MiB the
# memory that it had at most has grown.
_WATCHED = """
import json, resource, sys
from mixer_jax.checkpoints.load import load_checkpoint
from mixer_jax.checkpoints.formats import safetensors
def most(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
for path in sys.argv[1:]:
    before = most()
    try:
        load_checkpoint(path)
        end = "loaded"
    except Exception as error:
        end = f"{type(error).__name__}: {error}"
    print(json.dumps([end, most() - before]))
"""


def assert_rejected(source: str | Path, **wanted: Any) -> str:
    """Asserts that weights are refused in one line that names their file.

    Returns:
        The line without the file's folder, whose name may have numbers in it.
    """
    with pytest.raises(UserError) as caught:
        load_checkpoint(str(source), **wanted)
    message = str(caught.value)
    assert "\n" not in message
    assert Path(source).name in message
    return message.replace(f"{Path(source).parent}/", "")


def refusals_in_little_memory(files: dict[str, bytes], folder: Path, suffix: str) -> list[str]:
    """Returns how files are refused, and asserts that each is before memory grows."""
    paths = [folder / f"{name}{suffix}" for name in files]
    for path, content in zip(paths, files.values(), strict=True):
        path.write_bytes(content)
    command = [sys.executable, "-W", "error", "-c", _WATCHED, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    ends = []
    for path, line in zip(paths, done.stdout.splitlines(), strict=True):
        end, grown = json.loads(line)
        assert end.startswith("UserError: "), (path.name, end)
        assert "\n" not in end
        assert path.name in end
        # The largest of these files has a few MiB itself, and announces GiB.
        assert grown < 64, (path.name, grown)
        ends.append(end.replace(f"{folder}/", ""))
    return ends


def load_or_error(path: Path) -> PretrainedWeights | str:
    """Returns what a file holds, or the one line that refuses it; anything else is an error."""
    try:
        return load_checkpoint(str(path))
    except UserError as error:
        return str(error)


def fuzz(content: bytes, count: int, ends: int) -> Iterator[bytes]:
    """Yields a file damaged in many ways, mostly within `ends` bytes of where it begins or ends."""
    random = np.random.default_rng(0)
    for number in range(count):
        damaged = bytearray(content)
        for _ in range(random.integers(1, 4)):
            anywhere = int(random.integers(len(damaged)))
            near = int(random.integers(min(ends, len(damaged))))
            place = (anywhere, near, len(damaged) - 1 - near)[random.integers(3)]
            length = int(random.integers(1, 9))
            piece = random.integers(256, size=length).astype(np.uint8).tobytes()
            kind = (number + int(random.integers(2))) % 6
            if kind == 0:
                damaged[place] ^= 1 << int(random.integers(8))
            elif kind == 1:
                damaged[place : place + length] = piece
            elif kind == 2:
                damaged[place:place] = piece
            elif kind == 3:
                del damaged[place : place + length]
            elif kind == 4:
                damaged[place : place + length] = b"\xff" * length
            else:
                damaged[place:place] = damaged[near : near + 16 * length]
        yield bytes(damaged)
