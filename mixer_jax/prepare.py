"""Prepare or convert a dataset: `python -m mixer_jax.prepare NAME --data_dir=DIR`."""

import shlex
from collections.abc import Sequence

from mixer_jax.cli import common


def main(argv: Sequence[str]) -> int:
    """Prepares a dataset; returns the exit code."""
    parser = common.ArgumentParser(
        prog="python -m mixer_jax.prepare",
        description="Prepare a dataset in TFDS's array_record format, which has random access: "
        "download and write it, or convert a dataset that TFDS has prepared in another format.",
        epilog="An interrupted preparation is never mistaken for a complete one. Run the same "
        "command again to restart it.",
    )
    parser.add_argument(
        "name",
        metavar="NAME",
        help="dataset of TFDS or mixer_jax, e.g. cifar10, imagenet2012:5.1.0, imagenet21k; a label "
        "after an @ is ignored",
    )
    parser.add_argument(
        "--data_dir", default="", help="directory of the TFDS datasets; default: TFDS's default"
    )
    parser.add_argument(
        "--manual_dir",
        default="",
        help="directory of manual downloads; default: DATA_DIR/downloads/manual",
    )
    args = parser.parse_args(argv)

    # Heavy libraries are imported only after the arguments are valid.
    common.configure_jax(compilation_cache="")
    from mixer_jax.data.preparation import format_splits
    from mixer_jax.data.tfds import prepare_tfds

    builder, already_prepared = prepare_tfds(args.name, args.data_dir, args.manual_dir)
    if already_prepared:
        print(f"{builder.info.full_name} is already prepared")
    print(format_splits(builder))
    root = shlex.quote(str(builder.data_dir_root))
    print(f"use with     --config.dataset.name={args.name} --config.dataset.data_dir={root}")
    return 0


if __name__ == "__main__":
    common.run_cli(main)
