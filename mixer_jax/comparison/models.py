"""Models of a comparison as a user names them. Does not import JAX."""

import re
from pathlib import Path
from typing import Literal, NamedTuple

from mixer_jax.checkpoints.resolve import CHECKPOINT_DIR, FORMATS, HUB_FILES
from mixer_jax.config.loading import default_run_name, find_config_file, installed_configs
from mixer_jax.errors import UserError, nearest
from mixer_jax.models.registry import FAMILIES, list_model_names

Kind = Literal["config", "checkpoint", "architecture"]


class ModelSource(NamedTuple):
    """A model to compare.

    Attributes:
        label: Name in tables and pictures, unique in a comparison.
        kind: "config": trained by the comparison; "checkpoint": evaluated; "architecture": neither.
        source: Config file with argument, checkpoint, or full name of a model.
    """

    label: str
    kind: Kind
    source: str

    @property
    def folder(self) -> str:
        """Name of the model's folder in the workdir."""
        return folder_name(self.label)


def folder_name(text: str) -> str:
    """Replaces everything in a text that not every file system accepts in names.

    Dots at the beginning are replaced as well: ".." is not in the workdir.
    """
    return re.sub(r"^\.+|[^\w.+=-]+", "_", text)


def check_folder_names(texts: list[str], what: str) -> None:
    """Raises UserError if two texts are equal, or would have the same folder."""
    seen: dict[str, str] = {}
    for text in texts:
        name = folder_name(text)
        if name in seen:
            first = seen[name]
            names = f"{text!r} twice" if first == text else f"{first!r} and {text!r}"
            raise UserError(f"{what}, got {names}.")
        seen[name] = text


def parse_models(arguments: list[str]) -> tuple[ModelSource, ...]:
    """Parses MODEL arguments, each optionally with a label: LABEL=MODEL.

    Raises:
        UserError: An argument names no config, checkpoint or model, two have the same label, or a
            label is the name of a file of results.
    """
    models = tuple(map(_parse_model, arguments))
    for model in models:
        if model.folder.startswith("results."):
            raise UserError(
                f"name of a model must not start with 'results.', as the files of results do, got "
                f"{model.label!r}. Name it with LABEL=MODEL."
            )
    check_folder_names(
        [model.label for model in models],
        "models must have different names; name them with LABEL=MODEL",
    )
    return models


def _parse_model(argument: str) -> ModelSource:
    label, separator, source = argument.partition("=")
    if not separator or "/" in label or Path(argument).exists():
        label, source = "", argument
    elif not label or not source:
        raise UserError(f"model must be MODEL or LABEL=MODEL, got {argument!r}.")
    kind = _find_kind(source)
    return ModelSource(label or _default_label(kind, source), kind, source)


def _find_kind(source: str) -> Kind:
    path = source.partition(":")[0]
    if source in list_model_names():
        return "architecture"
    if path.endswith(".py"):
        find_config_file(path)
        return "config"
    families = tuple(f"{family.display_name}-" for family in FAMILIES.values())
    is_file = source.endswith(tuple(FORMATS)) or Path(source).exists()
    if source.startswith(families) and not is_file:
        raise _unknown_model(source)
    is_name = "/" not in source and not source.endswith(tuple(FORMATS))
    if is_name or path.startswith("configs/"):
        try:
            find_config_file(path)
            return "config"
        except UserError:
            if not source.startswith(("hf", "configs/")) and not Path(source).exists():
                raise _unknown_model(source) from None
    return "checkpoint"


def _unknown_model(source: str) -> UserError:
    configs = sorted(path.stem for path in installed_configs().glob("*.py"))
    match = nearest(source.partition(":")[0], [*list_model_names(), *configs], cutoff=0.7)
    hint = f" Did you mean {match}?" if match else ""
    return UserError(
        "model must be a config, a checkpoint or the full name of a model, such as Mixer-B/16, "
        f"got {source!r}.{hint}"
    )


def _default_label(kind: Kind, source: str) -> str:
    if kind == "architecture":
        return source
    if kind == "config":
        return default_run_name(source)
    path = Path(source.removeprefix("hf:"))
    name = path.parent.name if path.name in HUB_FILES else path.name
    if path.parent.name == CHECKPOINT_DIR:
        name = f"{path.parents[1].name}_{name}"
    for suffix in FORMATS:
        name = name.removesuffix(suffix)
    return name or source
