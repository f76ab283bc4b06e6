"""Targets that parse text of the command line and of small text files."""

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mixer_jax.cli.common import (
    parse_image_size,
    parse_seeds,
    parse_step,
    read_class_names,
    read_path_list,
)
from mixer_jax.comparison.plan import parse_variation
from mixer_jax.config.config import get_default, parse
from mixer_jax.config.loading import parse_overrides, set_override
from mixer_jax.config.schema import FIELDS
from mixer_jax.data.splits import parse_split
from mixer_jax.data.webdataset import expand_braces
from mixer_jax.errors import UserError
from mixer_jax.planning.topology import parse_topology
from tests.fuzz.mutation import mutate_text, pick
from tests.fuzz.target import Target

_VALUES = (
    *(b"0", b"-1", b"1e400", b"nan", b"inf", b"9" * 5000, b"true", b"", b"1e-999999999", b"1:2"),
    *(b"1/0", b"0.3,0.6", b"1e999999999", b"stem,blocks.0", b"[" * 2000, b"(a+)+$", b"\xc2\xb2"),
)


@functools.cache
def _override_seeds() -> Sequence[bytes]:
    return [
        f"--config.{path}={field.default}".encode()
        for path, field in FIELDS.items()
        if str(field.default)
    ]


def _mutate_override(data: bytes, rng: np.random.Generator) -> bytes:
    if rng.random() < 0.5:
        return data.partition(b"=")[0] + b"=" + pick(rng, _VALUES)
    return mutate_text(data, rng)


def _parse_overrides(data: bytes, folder: Path) -> None:
    config = get_default()
    config.num_steps = 100_000
    for path, text in parse_overrides(_decode(data).split("\0")):
        set_override(config, path, text)
    parse(config)


def _decode(data: bytes) -> str:
    """Decodes arguments as Python does."""
    return data.decode("utf-8", "surrogateescape")


def _text_target(name: str, parse_text: Callable[[str], Any], *seeds: str) -> Target:
    def run(data: bytes, folder: Path) -> None:
        try:
            parse_text(_decode(data))
        except argparse.ArgumentTypeError as error:  # Becomes a UserError with the argument's name.
            raise UserError(str(error)) from error

    return Target(name, lambda: [seed.encode() for seed in seeds], run, mutate_text)


def _parse_split(text: str) -> None:
    sizes = {"train": 100, "validation": 10}
    for part in parse_split(text, sizes, "dataset 'x'"):
        assert 0 <= part.start <= part.stop <= sizes[part.split]


def _expand_braces(text: str) -> None:
    assert len(expand_braces(text)) <= 1_000_000


def _read_names(data: bytes, folder: Path) -> None:
    path = folder / "names.txt"
    path.write_bytes(data)
    assert all(read_class_names(str(path)))


def _read_paths(data: bytes, folder: Path) -> None:
    path = folder / "paths.txt"
    path.write_bytes(data)
    assert all(read_path_list(str(path), "--files"))


TARGETS = [
    Target("overrides", _override_seeds, _parse_overrides, _mutate_override, 4),
    _text_target("splits", _parse_split, "train", "train[:99%]", "train[5:]+validation[-3:]"),
    _text_target("topologies", parse_topology, "v5e:8x8", "v4:2x2x4", "h100:16"),
    _text_target("braces", _expand_braces, "/a/{000..011}.tar", "/a/{b,c}/{0..3}-{d,{e,f}}.tar"),
    _text_target("seeds", parse_seeds, "0,1,2"),
    _text_target("image sizes", parse_image_size, "448", "384x512"),
    _text_target("steps", parse_step, "100", "best"),
    _text_target("variations", parse_variation, "model.hidden_dim=8,16", "seed=1"),
    Target("labels", lambda: [b"dog\ncat\n", "\ufeffå\n".encode()], _read_names, mutate_text),
    Target("lists of files", lambda: [b"a.png\nb.png\n"], _read_paths, mutate_text),
]
