"""Prepare or convert a data set: `python -m mixer_jax.prepare NAME --data_dir=DIR`."""

import shlex
from collections.abc import Sequence

from mixer_jax.cli import common


def main(arguments: Sequence[str]) -> int:
    """Prepares as the command line says; returns the exit code."""
    parser = common.ArgumentParser(
        prog="python -m mixer_jax.prepare",
        description="Write a data set in TFDS's array_record format, which has random access: "
        "download and make it, or convert what TFDS has already made in another format.",
        epilog="A killed preparation leaves nothing that is taken for finished; start it again.",
    )
    parser.add_argument(
        "name",
        help="of TFDS or our own: cifar10, imagenet2012:5.1.0, imagenet21k; a label after an @ "
        "is passed over",
    )
    parser.add_argument("--data_dir", default="", help="where TFDS keeps data; default: TFDS's own")
    parser.add_argument(
        "--manual_dir",
        default="",
        help="where you put what has to be downloaded by hand; default: DATA_DIR/downloads/manual",
    )
    known = parser.parse_args(arguments)

    # From here on the heavy libraries are needed.
    common.configure_jax(compilation_cache="")
    from mixer_jax.data.preparation import format_splits, raise_open_file_limit
    from mixer_jax.data.tfds import data_dir_of, prepare_tfds

    raise_open_file_limit()
    builder, was_there = prepare_tfds(known.name, known.data_dir, known.manual_dir)
    if was_there:
        print(f"{builder.info.full_name} is already prepared")
    print(format_splits(builder))
    root = shlex.quote(data_dir_of(builder))
    print(f"use with     --config.dataset.name={known.name} --config.dataset.data_dir={root}")
    return 0


if __name__ == "__main__":
    common.run_cli(main)
