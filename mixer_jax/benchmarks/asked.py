"""What `--mode=train`, `infer` and `compile` are asked on the command line."""

import argparse
import importlib.util

from mixer_jax.benchmarks.contestants import (
    COMPILED,
    EAGER,
    REFERENCE,
    Contestant,
    Setting,
    add_settings,
    ours,
    read_names,
    read_remats,
    read_unrolls,
)
from mixer_jax.benchmarks.model_keys import add_model_keys, read_model_keys
from mixer_jax.cli.common import check_positive
from mixer_jax.config.schema import FIELDS
from mixer_jax.errors import UserError
from mixer_jax.models.mixer_config import VARIANTS, check_image_size

_AUTO, _NONE = "auto", "none"


def add_work(parser: argparse.ArgumentParser) -> None:
    """Adds the work that is measured, and the settings of ours that may be compared."""
    parser.add_argument("--variant", default="B/16", choices=list(VARIANTS), help="default: B/16")
    parser.add_argument("--image_size", type=int, default=224, help="pixels; default: 224")
    parser.add_argument("--num_classes", type=int, default=1000, help="default: 1000")
    parser.add_argument("--dtype", default=_AUTO, choices=FIELDS["model.dtype"].choices)
    add_settings(parser)
    add_model_keys(parser)


def read_setting(known: argparse.Namespace, mode: str) -> Setting:
    """Returns the work that is asked for, with batch size 0 for "auto".

    Raises:
        UserError: a number is out of range.
    """
    check_image_size(known.image_size, known.image_size, VARIANTS[known.variant].patch_size)
    check_positive(known, "num_classes", "rounds")
    text = known.batch_size
    if text != _AUTO and not (text.isdecimal() and int(text)):
        raise UserError(f"--batch_size={text} is out of range; pass 1 or more, or auto")
    size = 0 if text == _AUTO else int(text)
    return Setting(mode, known.variant, known.image_size, known.num_classes, known.dtype, size)


def read_ours(known: argparse.Namespace, mode: str) -> list[Contestant]:
    """Returns a contestant for every combination of settings that is asked for.

    Raises:
        UserError: a setting is unknown or out of range.
    """
    unrolls = read_unrolls(known.unroll, VARIANTS[known.variant].num_blocks)
    remats = read_remats(known.remat)
    # Without a backward pass there is nothing to keep or to compute anew.
    return ours(unrolls, remats[:1] if mode == "infer" else remats, read_model_keys(known))


def missing_of_timm() -> str:
    """Returns the package that timm cannot be measured without and that is not installed, or ""."""
    return next((name for name in ("torch", "timm") if importlib.util.find_spec(name) is None), "")


def read_peers(known: argparse.Namespace) -> list[Contestant]:
    """Returns the peers asked for, or those that are installed.

    Raises:
        UserError: one is unknown, or not installed.
    """
    missing = missing_of_timm()
    if known.peers == _NONE:
        return []
    if known.peers is not None:
        names = read_names("peers", known.peers, [REFERENCE, EAGER])
        if EAGER in names and missing:
            raise UserError(
                f"--peers={known.peers} needs {missing}, which is not installed: "
                "pip install torch timm, or leave it out"
            )
    else:
        names = [REFERENCE] if missing else [REFERENCE, EAGER]
    if EAGER in names and not known.no_torch_compile:
        names.append(COMPILED)
    return [Contestant(name, name) for name in names]
