"""Corrupt and hostile files of weights, and checks that they are rejected."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixer_jax.checkpoints.load import load_checkpoint
from mixer_jax.checkpoints.weights import PretrainedWeights
from mixer_jax.errors import UserError
from mixer_jax.models.mixer_config import MixerConfig

SMALLEST = MixerConfig(
    num_blocks=1, patch_size=1, hidden_dim=2, tokens_mlp_dim=2, channels_mlp_dim=2
)
# Loads each file and prints the result, and by how many MiB the peak memory of the process grew.
_MEASURE = """
import json, resource, sys
from mixer_jax.checkpoints.load import load_checkpoint
from mixer_jax.checkpoints import formats
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
for path in sys.argv[1:]:
    before = peak()
    try:
        load_checkpoint(path)
        result = "loaded"
    except Exception as error:
        result = f"{type(error).__name__}: {error}"
    print(json.dumps([result, peak() - before]))
"""


def assert_rejected(source: str | Path, **kwargs: Any) -> str:
    """Asserts that loading fails with one line that names the file, and returns the line.

    The folder is removed from it, as its name may contain numbers.
    """
    with pytest.raises(UserError) as caught:
        load_checkpoint(str(source), **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    assert Path(source).name in message
    return message.replace(f"{Path(source).parent}/", "")


def assert_rejected_without_memory(files: dict[str, bytes], folder: Path, suffix: str) -> list[str]:
    """Asserts that files are rejected before memory grows, and returns the messages."""
    paths = [folder / f"{name}{suffix}" for name in files]
    for path, content in zip(paths, files.values(), strict=True):
        path.write_bytes(content)
    command = [sys.executable, "-W", "error", "-c", _MEASURE, *map(str, paths)]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    messages = []
    for path, line in zip(paths, process.stdout.splitlines(), strict=True):
        message, growth = json.loads(line)
        assert message.startswith("UserError: "), (path.name, message)
        assert "\n" not in message
        assert path.name in message
        # The largest of these files has a few MiB, and claims GiB.
        assert growth < 64, (path.name, growth)
        messages.append(message)
    return messages


def load_or_error(path: Path) -> PretrainedWeights | str:
    """Loads a file, or returns the message of the UserError; other errors are not caught."""
    try:
        return load_checkpoint(str(path))
    except UserError as error:
        return str(error)


def fuzz(content: bytes, count: int, margin: int) -> Iterator[bytes]:
    """Yields a file with random damage, mostly within `margin` bytes of its start or end."""
    rng = np.random.default_rng(0)
    for index in range(count):
        damaged = bytearray(content)
        for _ in range(rng.integers(1, 4)):
            anywhere = int(rng.integers(len(damaged)))
            near = int(rng.integers(min(margin, len(damaged))))
            position = (anywhere, near, len(damaged) - 1 - near)[rng.integers(3)]
            length = int(rng.integers(1, 9))
            noise = rng.integers(256, size=length).astype(np.uint8).tobytes()
            operation = (index + int(rng.integers(2))) % 6
            if operation == 0:
                damaged[position] ^= 1 << int(rng.integers(8))
            elif operation == 1:
                damaged[position : position + length] = noise
            elif operation == 2:
                damaged[position:position] = noise
            elif operation == 3:
                del damaged[position : position + length]
            elif operation == 4:
                damaged[position : position + length] = b"\xff" * length
            else:
                damaged[position:position] = damaged[near : near + 16 * length]
        yield bytes(damaged)
