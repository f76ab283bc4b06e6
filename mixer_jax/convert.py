"""Convert weights: `python -m mixer_jax.convert SOURCE TARGET --to=google|timm|orbax|stablehlo`."""

import json
import math
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mixer_jax.checkpoints.export import (
    SIDECAR_SUFFIXES,
    SUFFIXES,
    check_target_available,
    choose_format,
    export_weights,
    written_size,
)
from mixer_jax.checkpoints.model_info import ModelInfo
from mixer_jax.checkpoints.model_zoo import MODEL_ZOO, NOTES
from mixer_jax.checkpoints.resolve import resolve_checkpoint
from mixer_jax.cli import common
from mixer_jax.errors import UserError
from mixer_jax.models.mixer_config import VARIANTS

if TYPE_CHECKING:
    from mixer_jax.checkpoints.load import PretrainedWeights

# timm's models by name are for this image size, and it has none of H/14.
_TIMM_SIDE = 224
_TIMM_LACKS = "H/14"


def main(arguments: Sequence[str]) -> int:
    """Converts as the command line says; returns the exit code."""
    parser = common.ArgumentParser(
        prog="python -m mixer_jax.convert",
        description="Write weights in another format, read them back and compare.",
    )
    parser.add_argument("source", nargs="?", metavar="SOURCE", help=common.CHECKPOINT_HELP)
    parser.add_argument("target", nargs="?", metavar="TARGET", help="file, or folder of a run")
    parser.add_argument("--to", choices=tuple(SUFFIXES), default="", help="default: as TARGET ends")
    common.add_checkpoint_override_args(parser)
    parser.add_argument("--labels", metavar="FILE", help="names of the classes, one a line")
    parser.add_argument("--force", action="store_true", help="replace a file that exists")
    parser.add_argument("--list", action="store_true", help="list published weights, and stop")
    known = parser.parse_args(arguments)
    if known.list:
        if list(arguments) != ["--list"]:
            raise UserError("--list lists published weights and stops; pass nothing else with it")
        print(format_model_zoo())
        return 0
    if not known.source or not known.target:
        raise UserError("SOURCE and TARGET are not both named; name them, or see --help")
    to = choose_format(known.to, known.target)
    check_target_available(to, known.target, known.force)
    resolve_checkpoint(known.source, known.step)
    labels = common.read_class_names(known.labels)

    # From here on the heavy libraries are needed; files of tensors do without JAX. Programs that
    # hold their weights would fill the cache of compiled programs.
    common.configure_jax(compilation_cache="")
    from mixer_jax.checkpoints.load import load_checkpoint

    weights = load_checkpoint(
        known.source,
        step=known.step,
        image_size=known.image_size,
        class_names=labels or (),
        gelu=known.gelu,
        eval_crop=known.eval_crop,
    )
    common.warn_if_resized(weights.model_info)
    checked = export_weights(weights, to, known.target)
    _print_results(weights, to, known.target, checked)
    return 0


def format_model_zoo() -> str:
    """Returns a table of published weights, for people."""
    rows: list[tuple[str, ...]] = [
        ("pass as --checkpoint", "model", "classes", "MiB", "top-1", "top-5", "ReaL", "trained on")
    ]
    for one in MODEL_ZOO:
        scores = [f"{score:.2f}" for score in one.scores or ()] or [""] * 3
        rows.append(
            (
                one.source,
                f"Mixer-{one.model}",
                f"{one.num_classes:,}" if one.num_classes else "?",
                f"{one.mebibytes:.2f}" if one.mebibytes else "",
                *scores,
                (one.trained_on or "?") + (f" [{one.note}]" if one.note else ""),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    # Numbers stand at the right.
    sides = "<<>>>>><"
    lines = [
        "  ".join(
            f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)
        ).rstrip()
        for row in rows
    ]
    notes = [f"[{number}] {note}" for number, note in enumerate(NOTES, 1)]
    told = "top-1, top-5 and ReaL: percent on ImageNet, as timm measured."
    return "\n".join([*lines, "", told, *notes])


def timm_snippet(about: ModelInfo, path: str) -> list[str]:
    """Returns the Python that loads weights in timm.

    Args:
        about: what the weights say of themselves.
        path: of their file.
    """
    widths, file = about.config, json.dumps(path, ensure_ascii=False)
    # timm's own GELU is the exact one.
    gelu = ["act_layer=timm.layers.GELUTanh"] if about.gelu == "tanh" else []
    by_name = (
        about.image_size == (_TIMM_SIDE, _TIMM_SIDE)
        and about.variant != _TIMM_LACKS
        and VARIANTS.get(about.variant) == widths
    )
    if by_name:
        name = f"mixer_{about.variant.replace('/', '').lower()}_{_TIMM_SIDE}"
        settings = [f'"{name}"', f"num_classes={about.num_classes}", f"checkpoint_path={file}"]
        return ["import timm", f"model = timm.create_model({', '.join(settings + gelu)})"]
    height, width = about.image_size
    ratios = [
        _ratio(n, widths.hidden_dim) for n in (widths.tokens_mlp_dim, widths.channels_mlp_dim)
    ]
    settings = [
        f"num_classes={about.num_classes}",
        f"img_size={height if height == width else (height, width)}",
        f"patch_size={widths.patch_size}",
        f"num_blocks={widths.num_blocks}",
        f"embed_dim={widths.hidden_dim}",
        f"mlp_ratio=({', '.join(ratios)})",
    ]
    return [
        "import timm",
        f"model = timm.models.mlp_mixer.MlpMixer({', '.join(settings + gelu)})",
        f"timm.models.load_checkpoint(model, {file})",
    ]


def _ratio(mlp_dim: int, hidden_dim: int) -> str:
    """Returns how timm is told an MLP's width: it multiplies again, and cuts fractions off."""
    ratio = mlp_dim / hidden_dim
    exact = math.floor(ratio * hidden_dim) == mlp_dim
    return f"{mlp_dim if exact else mlp_dim + 0.5} / {hidden_dim}"


def _usage(about: ModelInfo, to: str, target: str) -> list[str]:
    """Returns lines that use written weights."""
    if to == "timm":
        return timm_snippet(about, target)
    if to == "stablehlo":
        file, weights = (
            json.dumps(name, ensure_ascii=False) for name in (target, target + SIDECAR_SUFFIXES[to])
        )
        shape = ", ".join(map(str, (*about.image_size, 3)))
        return [
            "from pathlib import Path; from jax import export",
            "from safetensors.numpy import load_file",
            f"weights = load_file({weights})",
            f"logits = export.deserialize(Path({file}).read_bytes()).call(weights, images)",
            f"# images: float32 (n, {shape}) in [-1, 1], for any n",
        ]
    if not about.num_classes:
        return [f"python -m mixer_jax.main … --config.init_from={shlex.quote(target)}"]
    return [f"python -m mixer_jax.predict --checkpoint={shlex.quote(target)} photo.jpg"]


def _print_results(weights: "PretrainedWeights", to: str, target: str, checked: str) -> None:
    from mixer_jax.checkpoints import tree

    about = weights.model_info
    count = sum(array.size for _, array in tree.flatten(weights.params))
    classes = "none, there is no head"
    if about.num_classes:
        named = "named" if about.class_names else "not named"
        classes = f"{about.num_classes:,}, {named}"
    with_beside = f" and {target}{SIDECAR_SUFFIXES[to]}" if to in SIDECAR_SUFFIXES else ""
    print(f"model       {about.name}, GELU {about.gelu}")
    print(f"parameters  {count:,}")
    print(f"classes     {classes}")
    print(f"written     {target}{with_beside}, {written_size(to, target) / 1e6:,.1f} MB, for {to}")
    print(f"checked     {checked}")
    print("use")
    for line in _usage(about, to, target):
        print(f"  {line}")


if __name__ == "__main__":
    common.run_cli(main)
