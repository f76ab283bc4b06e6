"""Checkpoint metadata: what is needed to use weights but cannot be inferred from their tensors."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mixer_jax.config.compat import upgrade_value
from mixer_jax.config.schema import ARCHITECTURE_FIELDS, FIELDS
from mixer_jax.data.permutation import PixelPermutation
from mixer_jax.data.source import normalize_names
from mixer_jax.errors import UserError
from mixer_jax.files import is_integer, parse_json
from mixer_jax.models.execution import AUTO, AUTO_UNROLL
from mixer_jax.models.family import Layer
from mixer_jax.models.registry import DEFAULT_FAMILY, FAMILIES, build_model, get_family

# Fields of `ModelInfo` that a file can set; the others are inferred from its tensors.
METADATA_FIELDS = (
    "image_size",
    "class_names",
    "gelu",
    "eval_crop",
    "eval_crop_fraction",
    "exif_orientation",
    "loss",
    "dtype",
    "resize_note",
    "permutation",
    "multi_label",
)
# Largest side of images, and number of classes, that metadata may claim.
_MAX_LENGTH = 2**24
# Present names of fields in metadata of older checkpoints.
_OLD_FIELDS = {"widths": "config", "resolution": "resize_note"}


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """Description of a pretrained model.

    Attributes:
        family: Name of the model family.
        variant: Name of a variant of the family, or "custom".
        config: Architecture config. It differs from the variant's if weights were tiled.
        image_size: Height and width of the input, in pixels.
        num_classes: Outputs of the head; 0 means no head.
        class_names: One name per class; empty if unknown.
        gelu: "tanh" or "exact".
        eval_crop: Crop of images that are classified; see `data.preprocess.eval_image`.
        exif_orientation: Whether such images are rotated by their EXIF orientation.
        loss: Loss that the head was trained with, "sigmoid" or "softmax".
        dtype: Dtype of the computation, as the config key `model.dtype`.
        resize_note: Adaptation of the weights to the image size; empty if they were trained
            at it.
        eval_crop_fraction: Side of the crop, as a fraction of the resized image's.
        permutation: Permutation of the pixels of all images; None: none.
        multi_label: Whether the head decides about every class on its own, trained on images with
            any number of labels.
    """

    family: str
    variant: str
    config: Any
    image_size: tuple[int, int]
    num_classes: int
    class_names: tuple[str, ...]
    gelu: str
    eval_crop: str
    exif_orientation: bool
    loss: str
    dtype: str = "auto"
    resize_note: str = ""
    eval_crop_fraction: float = FIELDS["preprocess.eval_crop_fraction"].default
    permutation: PixelPermutation | None = None
    multi_label: bool = False

    @property
    def name(self) -> str:
        """Name of the model and its image size: "Mixer-B/16 at 224 px"."""
        full_name = get_family(self.family).full_name(self.variant)
        return f"{full_name} at {format_image_size(self.image_size)}"

    def param_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each parameter by its slash-separated path."""
        family = get_family(self.family)
        return family.param_shapes(self.config, self.image_size, self.num_classes)

    def layers(self) -> dict[str, Layer]:
        """Returns the shape per image and the description of each activation, by its name."""
        return get_family(self.family).layers(self.config, self.image_size, self.num_classes)

    def build_model(self, dtype: str = "") -> Any:
        """Builds the Flax module, from images in [-1, 1] to logits.

        Args:
            dtype: Dtype of the computation; empty: that of the checkpoint.
        """
        import jax

        settings = {
            "gelu": self.gelu,
            "dropout": 0.0,
            "dtype": dtype or self.dtype,
            "backend": AUTO,
            "scan_unroll": AUTO_UNROLL,
            "remat": "none",
        }
        family = get_family(self.family)
        platform = jax.default_backend()
        return build_model(family, self.config, self.num_classes, settings, platform)

    def to_dict(self) -> dict[str, Any]:
        """Converts to JSON-serializable metadata."""
        return dataclasses.asdict(self) | {
            "image_size": list(self.image_size),
            "class_names": list(self.class_names),
        }

    @classmethod
    def from_dict(cls, data: Any, source: str) -> "ModelInfo":
        """Converts from the result of `to_dict`, also of older versions.

        Raises:
            UserError: A field is missing or has an invalid value.
        """
        with _metadata_errors(source):
            if not isinstance(data, dict):
                raise TypeError("it is not a JSON object")
            data = upgrade_metadata(data)
            # Older versions had Mixers only.
            family = data.get("family", DEFAULT_FAMILY)
            if family not in FAMILIES:
                known = ", ".join(FAMILIES)
                raise UserError(f"{source}: family must be one of {known}, got {family!r}.")
            variant, num_classes = data["variant"], data["num_classes"]
            if not isinstance(variant, str):
                raise UserError(f"{source}: variant must be text, got {variant!r}.")
            if not is_integer(num_classes) or not 0 <= num_classes <= _MAX_LENGTH:
                raise UserError(
                    f"{source}: num_classes must be from 0 to {_MAX_LENGTH:,}, got {num_classes!r}."
                )
            return cls(
                family,
                variant,
                _parse_architecture(FAMILIES[family].config_class, data["config"], source),
                num_classes=num_classes,
                **validate_metadata(data, source),
            )

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any], source: str) -> "ModelInfo":
        """Extracts the description of the model from the metadata of a run's checkpoint.

        Raises:
            UserError: A field is missing or has an invalid value.
        """
        if "model_info" in metadata or "about" in metadata or "widths" not in metadata:
            return cls.from_dict(metadata.get("model_info", metadata.get("about")), source)
        # Imported here: commands import this module before their arguments are checked.
        from mixer_jax.config.config import fill_defaults

        # The oldest checkpoints have no `ModelInfo`, but some of its fields and the run's config.
        with _metadata_errors(source):
            config = fill_defaults(metadata["config"])
            data = metadata | {
                "config": metadata["widths"],
                "num_classes": len(metadata["class_names"]),
                "eval_crop": metadata["preprocess"]["eval_crop"],
                "exif_orientation": config["preprocess"]["exif_orientation"],
                "dtype": config["model"]["dtype"],
            }
            del data["widths"]
        return cls.from_dict(data, source)


def _parse_architecture(config_class: type, data: dict[str, Any], source: str) -> Any:
    """Converts untrusted metadata to the config of a family.

    Raises:
        UserError: A field has an invalid value.
        TypeError: A field is missing or unknown.
    """
    for name, value in data.items():
        if field := ARCHITECTURE_FIELDS.get(name):
            field.check(f"{source}: config.{name}", value)
            # 0 and "" are only valid in configs of runs, where they keep the variant's value.
            if not value and field.type is not bool:
                raise UserError(f"{source}: config.{name} must not be {value!r}.")
    return config_class(**data)


def upgrade_metadata(data: dict[str, Any]) -> dict[str, Any]:
    """Translates metadata of a model that an older version saved to the present spellings."""
    upgraded = {_OLD_FIELDS.get(name, name): value for name, value in data.items()}
    if "eval_crop" in upgraded:
        crop = upgraded["eval_crop"]
        upgraded["eval_crop"] = upgrade_value("preprocess.eval_crop", crop)
    return upgraded


def format_image_size(image_size: tuple[int, int]) -> str:
    """Formats height and width: "224 px", "224 × 320 px"."""
    height, width = image_size
    return f"{height} px" if height == width else f"{height} × {width} px"


def get_metadata(metadata: dict[str, Any], name: str, source: str) -> Any:
    """Returns an entry of the metadata of a run's checkpoint; raises UserError if it is missing."""
    with _metadata_errors(source):
        return metadata[name]


@contextmanager
def _metadata_errors(source: str) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{source} has incomplete metadata ({type(error).__name__}: {error}). It is damaged "
            "or was saved by another version."
        ) from error


def validate_metadata(data: dict[str, Any], source: str = "") -> dict[str, Any]:
    """Extracts the fields of `METADATA_FIELDS` and converts them to the types of `ModelInfo`.

    Args:
        data: Untrusted metadata, of which any field may be missing.
        source: Name of the checkpoint for messages; empty for arguments of a function.
    """
    choices = {
        "gelu": FIELDS["model.gelu"].choices,
        "eval_crop": FIELDS["preprocess.eval_crop"].choices,
        "exif_orientation": (False, True),
        "loss": FIELDS["recipe.loss"].choices,
        "dtype": FIELDS["model.dtype"].choices,
        "multi_label": (False, True),
    }

    def error(name: str, rule: str) -> UserError:
        prefix = f"{source}: " if source else ""
        return UserError(f"{prefix}{name} must be {rule}, got {data[name]!r}.")

    fields: dict[str, Any] = {name: data[name] for name in METADATA_FIELDS if name in data}
    for name, value in fields.items():
        if name in choices and value not in choices[name]:
            raise error(name, " or ".join(map(str, choices[name])))
    if "image_size" in fields:
        size = fields["image_size"]
        pair = size if isinstance(size, list | tuple) else [size, size]
        if len(pair) != 2 or not all(
            is_integer(length) and 0 < length <= _MAX_LENGTH for length in pair
        ):
            raise error("image_size", "height and width in pixels")
        fields["image_size"] = tuple(pair)
    if "class_names" in fields:
        names = fields["class_names"]
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise error("class_names", "a list of strings")
        fields["class_names"] = normalize_names(names)
    if not is_crop_fraction(fields.get("eval_crop_fraction", 1.0)):
        raise error("eval_crop_fraction", "a number from 0.01 to 1")
    if not isinstance(fields.get("resize_note", ""), str):
        raise error("resize_note", "a string")
    if fields.get("permutation") is not None:
        fields["permutation"] = _parse_permutation(fields["permutation"])
        if fields["permutation"] is None:
            raise error("permutation", "kind, patch_size and seed of a permutation of pixels")
    return fields


def is_crop_fraction(value: Any) -> bool:
    """Returns whether an untrusted value is a valid `eval_crop_fraction`."""
    field = FIELDS["preprocess.eval_crop_fraction"]
    return type(value) in (int, float) and field.min <= value <= field.max


def _parse_permutation(data: Any) -> PixelPermutation | None:
    """Converts untrusted metadata; returns None if it is invalid."""
    names = [field.name for field in dataclasses.fields(PixelPermutation)]
    if not isinstance(data, dict) or sorted(data) != sorted(names):
        return None
    for name, value in zip(names, ("permute", "permute_patch_size", "permute_seed"), strict=True):
        try:
            FIELDS[f"preprocess.{value}"].check(name, data[name])
        except UserError:
            return None
    return PixelPermutation(**data) if data["kind"] != "none" else None


def read_metadata_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file of metadata; returns {} if there is none.

    Raises:
        UserError: It is not a JSON object.
    """
    if not path.exists():
        return {}
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Fix or remove it.") from error
    return parse_metadata_json(content, str(path))


def parse_metadata_json(content: str | bytes, source: str) -> dict[str, Any]:
    """Parses metadata; raises UserError, which starts with `source`, unless it is a JSON object."""
    try:
        data = parse_json(content)
    except ValueError as error:
        raise UserError(f"{source} is not JSON. Fix or remove it.") from error
    if not isinstance(data, dict):
        name = type(data).__name__
        raise UserError(f"{source} must be a JSON object, got {name}. Fix or remove it.")
    return data
