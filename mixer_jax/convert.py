"""Convert weights between formats: `python -m mixer_jax.convert SOURCE TARGET`."""

import argparse
import contextlib
import json
import shlex
import sys
from collections.abc import Sequence

from mixer_jax.checkpoints.export import (
    HUB_FOLDER,
    SUFFIXES,
    check_target_available,
    choose_format,
    export_weights,
    target_files,
    written_size,
)
from mixer_jax.checkpoints.hub import (
    check_access,
    check_license,
    check_repo_name,
    push_to_hub,
    staged_repository,
)
from mixer_jax.checkpoints.load import load_checkpoint
from mixer_jax.checkpoints.model_card import CARD_FILE
from mixer_jax.checkpoints.model_info import ModelInfo
from mixer_jax.checkpoints.model_zoo import format_model_zoo
from mixer_jax.checkpoints.resolve import HUB, resolve_checkpoint
from mixer_jax.checkpoints.timm_config import find_timm_model, timm_expression, timm_folder_code
from mixer_jax.checkpoints.weights import PretrainedWeights, flatten_params
from mixer_jax.cli import common
from mixer_jax.errors import UserError
from mixer_jax.models.registry import FAMILIES, get_family


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    parser = common.ArgumentParser(
        prog="python -m mixer_jax.convert",
        description="Write weights in another format, read them back and compare; or upload them "
        "to the Hugging Face Hub.",
    )
    parser.add_argument("source", nargs="?", metavar="SOURCE", help=common.CHECKPOINT_HELP)
    parser.add_argument(
        "target",
        nargs="?",
        metavar="TARGET",
        help="output file; or output folder: a workdir for --to=orbax, model.safetensors and "
        "config.json for --to=timm",
    )
    parser.add_argument(
        "--to",
        choices=tuple(SUFFIXES),
        default="",
        help="output format; default: inferred from the suffix of TARGET",
    )
    common.add_checkpoint_override_args(parser)
    parser.add_argument("--labels", metavar="FILE", help="names of the classes, one per line")
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace an existing file, or with --push_to_hub an existing model card",
    )
    parser.add_argument(
        "--push_to_hub",
        metavar="OWNER/NAME",
        help="upload to the Hugging Face Hub instead of writing a TARGET",
    )
    parser.add_argument(
        "--license",
        metavar="ID",
        default="",
        help="with --push_to_hub: license in the model card, e.g. apache-2.0; default: none",
    )
    parser.add_argument(
        "--private", action="store_true", help="with --push_to_hub: a new repository is private"
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="with --push_to_hub: print what would be uploaded, without a network",
    )
    parser.add_argument(
        "--list",
        nargs="?",
        const="all",
        choices=("all", *FAMILIES),
        metavar="FAMILY",
        help=f"list published weights, of all families or one ({', '.join(FAMILIES)}), and exit",
    )
    args = parser.parse_args(argv)
    if args.list is not None:
        if list(argv) not in (["--list"], [f"--list={args.list}"], ["--list", args.list]):
            raise UserError("--list must be the only argument.")
        print(format_model_zoo(args.list))
        return 0
    if args.push_to_hub is not None:
        return _push(args)
    for name in ("license", "private", "dry_run"):
        if getattr(args, name):
            raise UserError(f"--{name} must come with --push_to_hub=OWNER/NAME.")
    if not args.source or not args.target:
        raise UserError("SOURCE and TARGET are required. See --help.")
    format = choose_format(args.to, args.target)
    check_target_available(format, args.target, args.force)
    weights = _load(args)
    if format == HUB_FOLDER:
        find_timm_model(weights.model_info)  # Raises UserError if timm has none.
    checks = export_weights(weights, format, args.target)
    _print_results(weights, format, args.target, checks)
    return 0


def _load(args: argparse.Namespace) -> PretrainedWeights:
    """Loads the source with the overrides of the arguments."""
    resolve_checkpoint(args.source, args.step)
    class_names = common.read_class_names(args.labels)
    # Formats of files need no JAX. Programs that are compiled here are not worth caching.
    common.configure_jax(compilation_cache="", cpu_only=True)
    if args.push_to_hub and not args.dry_run:
        # Weights can take long to download and convert.
        check_access(args.push_to_hub)
    weights = load_checkpoint(
        args.source,
        step=args.step,
        image_size=args.image_size,
        class_names=class_names,
        gelu=args.gelu,
        eval_crop=args.eval_crop,
        eval_crop_fraction=args.eval_crop_fraction,
    )
    common.warn_if_resized(weights.model_info)
    return weights


def _push(args: argparse.Namespace) -> int:
    """Uploads to the Hub, or prints what would be uploaded."""
    name = args.push_to_hub
    if not args.source:
        raise UserError("SOURCE is required. See --help.")
    if args.target or args.to:
        raise UserError("TARGET and --to must be omitted with --push_to_hub, which uploads.")
    check_repo_name(name)
    check_license(args.license)
    weights = _load(args)
    if not args.license:
        print("The model card will have no license. Set one by --license=ID.", file=sys.stderr)
    if args.dry_run:
        with staged_repository(weights, name, args.license) as folder:
            print(f"would be uploaded to {HUB}{name}")
            for path in sorted(folder.iterdir()):
                print(f"  {path.name:<20}{path.stat().st_size:>15,} bytes")
            print((folder / CARD_FILE).read_text(encoding="utf-8"), end="")
        return 0
    upload = push_to_hub(
        weights, name, card_license=args.license, private=args.private, replace_card=args.force
    )
    print(f"model       {weights.model_info.name}")
    print(f"uploaded    {upload.url}")
    if upload.kept_card:
        print(f"kept        {CARD_FILE} of the repository; --force replaces it")
    print("usage")
    print(f"  {_command(weights.model_info, HUB + name)}")
    with contextlib.suppress(UserError):  # timm has no such model.
        for line in timm_folder_code(weights.model_info, f"hf-hub:{name}"):
            print(f"  {line}")
    return 0


def timm_snippet(model_info: ModelInfo, path: str) -> list[str]:
    """Returns lines of Python that load exported weights in timm.

    Raises:
        UserError: timm has no such model.
    """
    file = json.dumps(path, ensure_ascii=False)
    return [
        "import timm",
        f"model = {timm_expression(model_info)}",
        f"timm.models.load_checkpoint(model, {file})",
    ]


def _usage(model_info: ModelInfo, format: str, target: str) -> list[str]:
    """Returns lines that use the written weights."""
    if format == "timm":
        with contextlib.suppress(UserError):  # timm has no such model.
            return timm_snippet(model_info, target)
    if format == HUB_FOLDER:
        return timm_folder_code(model_info, f"local-dir:{target}")
    if format == "stablehlo":
        paths = target_files(format, target)
        file, weights_file = (json.dumps(path, ensure_ascii=False) for path in paths)
        return [
            "from pathlib import Path; from jax import export",
            "from safetensors.numpy import load_file",
            f"weights = load_file({weights_file})",
            f"logits = export.deserialize(Path({file}).read_bytes()).call(weights, images)",
            f"# images: {_describe_images(model_info)}",
        ]
    if format == "onnx":
        return [
            "import onnxruntime",
            f"session = onnxruntime.InferenceSession({json.dumps(target, ensure_ascii=False)})",
            '(logits,) = session.run(None, {"images": images})',
            f"# images: {_describe_images(model_info)}",
        ]
    return [_command(model_info, target)]


def _command(model_info: ModelInfo, source: str) -> str:
    """Returns a command of this package that uses weights."""
    if not model_info.num_classes:
        return f"python -m mixer_jax.main … --config.init_from={shlex.quote(source)}"
    return f"python -m mixer_jax.predict --checkpoint={shlex.quote(source)} photo.jpg"


def _describe_images(model_info: ModelInfo) -> str:
    shape = ", ".join(map(str, (*model_info.image_size, 3)))
    return f"float32 (n, {shape}) in [-1, 1], for any n"


def _print_results(weights: PretrainedWeights, format: str, target: str, checks: str) -> None:
    model_info = weights.model_info
    num_params = sum(array.size for _, array in flatten_params(weights.params))
    classes = "none (no head)"
    if model_info.num_classes:
        names = "named" if model_info.class_names else "without names"
        classes = f"{model_info.num_classes:,}, {names}"
    files = " and ".join(target_files(format, target))
    size = f"{written_size(format, target) / 1e6:,.1f} MB"
    gelu = f", GELU {model_info.gelu}" if get_family(model_info.family).has_gelu else ""
    print(f"model       {model_info.name}{gelu}")
    print(f"parameters  {num_params:,}")
    print(f"classes     {classes}")
    print(f"written     {files}, {size}, format {'timm' if format == HUB_FOLDER else format}")
    print(f"checked     {checks}")
    print("usage")
    for line in _usage(model_info, format, target):
        print(f"  {line}")


if __name__ == "__main__":
    common.run_cli(main)
