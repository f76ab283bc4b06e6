"""Look at what a run sees: `python -m mixer_jax.visualize data --config=FILE --out=batch.png`."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from mixer_jax.cli import common
from mixer_jax.config.config import resolve_num_steps, validate
from mixer_jax.config.loading import load_config_with_overrides
from mixer_jax.errors import RunError, UserError

_FORMATS = (".png", ".pdf", ".jpg")
# Beyond this many, a picture no longer fits a screen, nor perhaps the memory.
_MOST_IMAGES = 512


def main(arguments: Sequence[str]) -> int:
    """Draws as the command line says; returns the exit code."""
    parser = common.ArgumentParser(
        prog="python -m mixer_jax.visualize",
        description="Draw what a run sees.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    data = commands.add_parser(
        "data",
        help="the images and labels of a training step",
        description="Draw the first images of a training step's batch, cropped, augmented, mixed "
        "and labelled as the model will see them. Needs no accelerator, and prepares no others.",
    )
    data.add_argument("--config", required=True, metavar="FILE[:ARG]", help="as for training")
    data.add_argument("--out", required=True, type=Path, help=f"a file: {' '.join(_FORMATS)}")
    data.add_argument("--step", type=int, default=0, help="steps done before; default: 0")
    data.add_argument("--num_images", type=int, default=32, help="of the batch; default: 32")
    data.add_argument(
        "--config.KEY", metavar="VALUE", dest="unused", help="change a key, as for training"
    )
    known, overrides = parser.parse_known_args(arguments)
    _check_out(known.out)
    config = load_config_with_overrides(known.config, overrides)
    validate(config)
    most = min(config.batch_size, _MOST_IMAGES)
    if not 1 <= known.num_images <= most:
        raise UserError(
            f"--num_images={known.num_images} is out of range; pass 1 to {most}, of the batch of "
            f"{config.batch_size}"
        )

    # From here on the heavy libraries are needed.
    common.configure_jax(config.compilation_cache)
    import jax

    # A few images are no work for an accelerator, which may be busy with a run.
    jax.config.update("jax_platforms", "cpu")
    from mixer_jax.training.datasets import open_train_dataset
    from mixer_jax.visualization.train_batch import (
        format_caption,
        load_train_batch,
        plot_train_batch,
    )

    source = open_train_dataset(config)
    num_steps = resolve_num_steps(config, len(source))
    if not 0 <= known.step < num_steps:
        raise UserError(
            f"--step={known.step} is out of range; the run has {num_steps} steps, pass 0 to "
            f"{num_steps - 1}"
        )
    shown = load_train_batch(config, source, known.step, known.num_images)
    title = format_caption(known.config, config, source, known.step, shown)
    file_format = known.out.suffix.lower().removeprefix(".")
    picture = plot_train_batch(shown, source.class_names, title, file_format)
    _write_whole(known.out, picture)
    print(f"{known.out}: {title[0]}")
    return 0


def _check_out(out: Path) -> None:
    """Raises UserError if no picture can be written there; asked before the work is done."""
    if out.suffix.lower() not in _FORMATS:
        raise UserError(f"--out={out} is no kind of picture known here; use {' '.join(_FORMATS)}")
    if out.is_dir():
        raise UserError(f"--out={out} is a folder; name a file in it")
    if not out.parent.is_dir():
        raise UserError(f"--out={out}: there is no folder {out.parent}; make it first")
    try:
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as error:
        raise UserError(
            f"--out={out}: folder {out.parent} cannot be written ({error.strerror}); name another"
        ) from error


def _write_whole(path: Path, content: bytes) -> None:
    """Writes a file so that at any moment there is all of it, or what was there before."""
    draft = path.with_name(f".{path.name}.draft")
    try:
        draft.write_bytes(content)
        draft.replace(path)
    except OSError as error:
        raise RunError(f"--out={path} cannot be written ({error.strerror})") from error
    finally:
        draft.unlink(missing_ok=True)


if __name__ == "__main__":
    common.run_cli(main)
