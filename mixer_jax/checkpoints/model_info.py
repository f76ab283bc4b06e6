"""What weights say of themselves: all that is needed to use them, and cannot be seen in them."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mixer_jax.config.compat import upgrade_value
from mixer_jax.config.schema import FIELDS
from mixer_jax.errors import UserError
from mixer_jax.models.family import CUSTOM
from mixer_jax.models.mixer_config import VARIANTS, MixerConfig

# The fields that a file may say for itself; the others are seen in its tensors.
METADATA_FIELDS = (
    "image_size",
    "class_names",
    "gelu",
    "eval_crop",
    "exif_orientation",
    "loss",
    "dtype",
    "resize_note",
)


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """What weights say of themselves.

    Attributes:
        family: of the model, "mixer".
        variant: a name of `VARIANTS`, or "custom".
        config: of the model; wider than the variant's own if the weights were grown.
        image_size: height and width that the weights are for, pixels.
        num_classes: outputs of the head; 0: there is none.
        class_names: a name for each class; empty: not known.
        gelu: "tanh" or "exact".
        eval_crop: of an image that is classified, as `data.preprocess.eval_image` takes it.
        exif_orientation: likewise.
        loss: the head was trained by, "sigmoid" or "softmax".
        dtype: of the computation, as `model.dtype` in keys.py.
        resize_note: how the weights came to their image size, if not by training; empty otherwise.
    """

    family: str
    variant: str
    config: MixerConfig
    image_size: tuple[int, int]
    num_classes: int
    class_names: tuple[str, ...]
    gelu: str
    eval_crop: str
    exif_orientation: bool
    loss: str
    dtype: str = "auto"
    resize_note: str = ""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.image_size
        return height // self.config.patch_size, width // self.config.patch_size

    @property
    def name(self) -> str:
        """The model and its image size, for people: "Mixer-B/16 at 224 px"."""
        return f"Mixer-{self.variant} at {format_image_size(self.image_size)}"

    def to_dict(self) -> dict[str, Any]:
        """Returns it as plain data."""
        return dataclasses.asdict(self) | {
            "image_size": list(self.image_size),
            "class_names": list(self.class_names),
        }

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any], where: str) -> "ModelInfo":
        """Returns what a checkpoint's metadata say of its weights.

        Args:
            metadata: all that the checkpoint says of itself.
            where: it is, for messages.

        Raises:
            UserError: something lacks, or is impossible.
        """
        if "model_info" in metadata or "about" in metadata or "widths" not in metadata:
            return cls.from_dict(metadata.get("model_info", metadata.get("about")), where)
        # Here, for the doors import this file, and not all of them need ml_collections.
        from mixer_jax.config.config import fill_defaults

        # Of a run from before `ModelInfo` was saved; the rest stood in its config, or was the
        # default.
        with _telling_what_lacks(where):
            config = fill_defaults(metadata["config"])
            data = metadata | {
                "config": metadata["widths"],
                "num_classes": len(metadata["class_names"]),
                "eval_crop": metadata["preprocess"]["eval_crop"],
                "exif_orientation": config["preprocess"]["exif_orientation"],
                "dtype": config["model"]["dtype"],
            }
        return cls.from_dict(data, where)

    @classmethod
    def from_dict(cls, data: Any, where: str) -> "ModelInfo":
        """Returns what `to_dict` gave.

        Args:
            data: from a checkpoint.
            where: it comes from, for messages.

        Raises:
            UserError: it lacks something, or says something impossible.
        """
        with _telling_what_lacks(where):
            data = upgrade_metadata(data)
            return cls(
                data["family"],
                data["variant"],
                MixerConfig(**data["config"]),
                num_classes=data["num_classes"],
                **validate_metadata(data, where),
            )


def upgrade_metadata(data: dict[str, Any]) -> dict[str, Any]:
    """Returns metadata of a model with the names that fields have now."""
    old_names = {"widths": "config", "resolution": "resize_note"}
    old = {old_names[name]: value for name, value in data.items() if name in old_names}
    new = {name: value for name, value in data.items() if name not in old_names}
    return {"family": "mixer", **old, **new}


def format_image_size(image_size: tuple[int, int]) -> str:
    """Returns height and width for people: "224 px", "224 × 320 px"."""
    height, width = image_size
    return f"{height} px" if height == width else f"{height} × {width} px"


def get_metadata(metadata: dict[str, Any], name: str, where: str) -> Any:
    """Returns what a checkpoint's metadata say under a name.

    Args:
        metadata: all that the checkpoint says of itself.
        name: of what is wanted.
        where: it is, for messages.

    Raises:
        UserError: they do not say it.
    """
    with _telling_what_lacks(where):
        return metadata[name]


@contextmanager
def _telling_what_lacks(where: str) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{where} does not say what its weights are ({type(error).__name__}: {error}); it was "
            "saved by another version, or is damaged"
        ) from error


def validate_metadata(data: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns what `data` says of the fields of `METADATA_FIELDS`, with the types of `ModelInfo`.

    Args:
        data: plain data, from a file that people may have written.
        where: it comes from, for messages.

    Raises:
        UserError: a field has a value that it cannot have.
    """
    choices = {
        "gelu": FIELDS["model.gelu"].choices,
        "eval_crop": FIELDS["preprocess.eval_crop"].choices,
        "exif_orientation": (False, True),
        "loss": FIELDS["recipe.loss"].choices,
        "dtype": FIELDS["model.dtype"].choices,
    }
    said: dict[str, Any] = {name: data[name] for name in METADATA_FIELDS if name in data}
    if "eval_crop" in said:
        said["eval_crop"] = upgrade_value("preprocess.eval_crop", said["eval_crop"])
    for name, value in said.items():
        known = choices.get(name)
        if known and value not in known:
            allowed = " or ".join(map(str, known))
            raise UserError(f"{where} says {name}={value!r}; it can be {allowed}")
    if "image_size" in said:
        size = said["image_size"]
        sides = size if isinstance(size, list | tuple) else [size, size]
        if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
            raise UserError(f"{where} says image_size={size!r}; it is two whole numbers of pixels")
        said["image_size"] = tuple(sides)
    if "class_names" in said:
        names = said["class_names"]
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{where} says class_names that are no list of texts")
        said["class_names"] = tuple(names)
    if not isinstance(said.get("resize_note", ""), str):
        raise UserError(f"{where} says resize_note={said['resize_note']!r}; it is a text")
    return said


def read_metadata_json(path: Path) -> dict[str, Any]:
    """Returns what a JSON file beside weights says of them; nothing if there is none.

    Raises:
        UserError: it holds no JSON object.
    """
    if not path.exists():
        return {}
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON; mend it, or move it away") from error
    if not isinstance(said, dict):
        raise UserError(f"{path} holds no JSON object; mend it, or move it away")
    return said


def infer_variant(config: MixerConfig) -> str:
    """Returns the variant of these widths, grown (Appendix C) or not, or "custom"."""
    for name, known in VARIANTS.items():
        factor, rest = divmod(config.tokens_mlp_dim, known.tokens_mlp_dim)
        same = dataclasses.replace(config, tokens_mlp_dim=known.tokens_mlp_dim) == known
        if same and not rest and round(factor**0.5) ** 2 == factor:
            return name
    return CUSTOM
