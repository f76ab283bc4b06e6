"""Classifier: images in, named classes out."""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, UInt8

from mixer_jax.checkpoints.best import Step
from mixer_jax.checkpoints.load import ImageSize, collect_overrides, load_checkpoint
from mixer_jax.checkpoints.model_info import ModelInfo
from mixer_jax.checkpoints.weights import (
    PretrainedWeights,
    check_trained_head,
    replace_head,
    set_class_names,
)
from mixer_jax.data.decode import BadImageError
from mixer_jax.data.image_files import NamedImage
from mixer_jax.data.memory_images import NamedPixels, name_images
from mixer_jax.data.preprocess import crop_eval_image, eval_image
from mixer_jax.data.wordnet import describe_class, label_class
from mixer_jax.distributed.sharding import (
    batch_sharding,
    make_mesh,
    replicated,
    shard_inference_params,
    shard_params,
)
from mixer_jax.distributed.xla_options import compiler_options
from mixer_jax.errors import UserError, abbreviate, suggest
from mixer_jax.models.family import PRE_LOGITS, Layer, check_layers
from mixer_jax.models.layers import normalize_images
from mixer_jax.models.registry import get_family
from mixer_jax.models.stack import compute_layers, use_partitionable_backend

if TYPE_CHECKING:
    from mixer_jax.evaluation.classification import ClassificationMetrics
    from mixer_jax.evaluation.multi_label import MultiLabelMetrics
    from mixer_jax.evaluation.saliency import Method, Saliency


class ClassProbability(NamedTuple):
    """Probability of one class.

    Attributes:
        class_index: Output of the head, from 0.
        name: Name of the class; its index as text if names are unknown.
        description: Words for a name that is a WordNet ID, as ImageNet's are: "tench, Tinca tinca"
            for "n01440764". Empty for other names.
    """

    class_index: int
    name: str
    probability: float
    description: str = ""


class Prediction(NamedTuple):
    """Prediction for one image.

    Attributes:
        image: Path of the image, or another name.
        classes: Most probable classes in descending order; empty if the image is unreadable.
        error: Reason why the image is unreadable; empty if it is readable.
    """

    image: str
    classes: list[ClassProbability]
    error: str = ""


def load_pretrained(
    source: str | os.PathLike,
    *,
    step: Step | None = None,
    image_size: ImageSize | None = None,
    pretrain_image_size: ImageSize | None = None,
    num_classes: int | None = None,
    class_names: Sequence[str] = (),
    gelu: str = "",
    eval_crop: str = "",
    eval_crop_fraction: float | None = None,
    dtype: str = "",
) -> "Classifier":
    """Loads weights of any format, at any image size, as a model that is ready to use.

    Args:
        source: A run's workdir or WORKDIR/checkpoints/STEP, also copied elsewhere; Google's .npz;
            timm's .safetensors, .pth or .ckpt; "hf:OWNER/NAME" for the Hugging Face Hub; or a URL
            such as gs://BUCKET/Mixer-B_16.npz.
        step: Step of a run's checkpoint, or "best" by its `checkpoint.best_metric`; None: the
            newest.
        image_size: Side, or height and width, of the images in pixels. Weights are tiled for
            integer multiples of their size (the paper's Appendix C) and interpolated for
            others. None: their own size.
        pretrain_image_size: Size of the images that the weights were trained on, if it is neither
            stored nor inferred from the number of tokens; None: as stored.
        num_classes: Outputs of a new zero-initialized head, unless the weights have the same
            number; 0: no head, the model returns features; None: the head of the weights.
        class_names: Overrides the names of classes; empty keeps them.
        gelu: Overrides the GELU, "tanh" or "exact"; empty keeps it.
        eval_crop: Overrides the crop of images that are classified; empty keeps it.
        eval_crop_fraction: Overrides the side of this crop, as a fraction of the resized image's;
            None keeps it.
        dtype: "float32" or "bfloat16"; empty: that of the checkpoint, or by device.

    Raises:
        UserError: An argument is invalid, or the weights do not exist, are damaged, or lack
            something needed to use them.
    """
    # Checked before the weights are downloaded, which can take long.
    names = collect_overrides(class_names=class_names, dtype=dtype).get("class_names", ())
    if not isinstance(num_classes, int | np.integer | None) or (num_classes or 0) < 0:
        raise UserError(f"num_classes must be an integer >= 0, got {num_classes!r}.")
    weights = load_checkpoint(
        source,
        step=step,
        image_size=image_size,
        pretrain_image_size=pretrain_image_size,
        # Those of a new head are set below.
        class_names=names if num_classes is None else (),
        gelu=gelu,
        eval_crop=eval_crop,
        eval_crop_fraction=eval_crop_fraction,
    )
    if num_classes is not None:
        if num_classes != weights.model_info.num_classes:
            weights = replace_head(weights, int(num_classes))
        if names:
            weights = set_class_names(weights, names, os.fspath(source))
    return Classifier(weights, dtype, os.fspath(source))


# The name that Hugging Face's libraries use, next to `Classifier.save_pretrained`.
from_pretrained = load_pretrained


class Classifier:
    """A model with its parameters on this host's devices.

    Attributes:
        model_info: Description of the model.
        model: Flax module, from images in [-1, 1] to logits.
    """

    def __init__(self, weights: PretrainedWeights, dtype: str = "", source: str = ""):
        """Transfers weights to the devices.

        Args:
            weights: Weights on the host.
            dtype: Dtype of the computation; see `load_pretrained`.
            source: Name of the weights for error messages.
        """
        self.model_info = weights.model_info
        self._mesh = make_mesh(0, 1, jax.local_devices())
        model = weights.model_info.build_model(dtype)
        self.model = use_partitionable_backend(model, self._mesh.size)
        self._weights = weights
        self._name = f"model {source}".rstrip()
        self._params = shard_inference_params(weights.params, self.model, self._mesh)
        platform = self._mesh.devices.flat[0].platform
        options = compiler_options(platform, self.model.execution.backend)
        jit = functools.partial(jax.jit, compiler_options=options)
        self._logits = jit(lambda params, x: self.model.apply({"params": params}, x))
        self._top_k = jit(self._top_classes, static_argnums=2)
        self._layers = jit(self._compute_layers, static_argnums=2)

    @property
    def params(self) -> Any:
        """Parameters as `model` takes them, float32 for any dtype of the computation."""
        return shard_params(self._weights.params, self._mesh, get_family(self.model_info.family))

    def __call__(self, images: Any) -> Float[Array, "n outputs"]:
        """Computes float32 logits, or features if the model has no head.

        Args:
            images: Floating-point array (n, height, width, 3) of pixels in [-1, 1], with the height
                and width of `model_info.image_size`. It is divided among the devices if n is a
                multiple of their number, and replicated otherwise. n can be 0.

        Raises:
            UserError: The images have another shape or dtype.
        """
        if images.ndim != 4 or images.shape[3] != 3:
            raise UserError(
                f"images must have shape (n, height, width, 3), got {tuple(images.shape)}. For a "
                "single image, pass images[None]."
            )
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise UserError(
                f"images must be floating-point numbers in [-1, 1], got {images.dtype}. Pass "
                "images / 127.5 - 1."
            )
        size = tuple(images.shape[1:3])
        if size != self.model_info.image_size:
            family = get_family(self.model_info.family)
            family.check_image_size(self.model_info.config, *size)
            raise UserError(
                f"images must have the size of {self.model_info.name}, got {size[0]} × {size[1]} "
                f"px. Load the weights with image_size={size}."
            )
        if not len(images):
            one = jax.ShapeDtypeStruct((1, *images.shape[1:]), images.dtype)
            outputs = jax.eval_shape(self._logits, self._params, one)
            return jnp.zeros((0, *outputs.shape[1:]), outputs.dtype)
        return self._logits(self._params, self._put_images(images))

    def _put_images(self, images: Any) -> Array:
        """Transfers images to the devices, divided among them if possible."""
        is_divisible = len(images) % self._mesh.size == 0
        sharding = batch_sharding(self._mesh) if is_divisible else replicated(self._mesh)
        return jax.device_put(images, sharding)

    def predict(
        self,
        images: Any,
        topk: int = 5,
        batch_size: int = 32,
        *,
        exif_orientation: bool = True,
    ) -> list[Prediction]:
        """Classifies images with the checkpoint's preprocessing, as `python -m mixer_jax.predict`.

        Args:
            images: One image or any number of them in a sequence. Each is the path of a file,
                its bytes, a Pillow image, or an array of uint8 levels: RGB (height, width, 3), gray
                (height, width) or (height, width, 1), or RGBA, whose alpha is dropped. An array (n,
                height, width, 3) is n images. Images have any size. For pixels in [-1, 1] that are
                cropped already, call the classifier instead.
            topk: Classes per image.
            batch_size: Images per batch.
            exif_orientation: Whether files and Pillow images are rotated by their EXIF orientation,
                as photographs need to be upright.

        Returns:
            One prediction per image, in order, also for a single image; [] for no images, such as
            an array of shape (0, height, width, 3).

        Raises:
            BadImageError: An input image is unreadable.
            UserError: The model has no trained head, or images have another type, dtype or shape.
        """
        check_trained_head(self._weights, self._name)
        named_images = name_images(images, exif_orientation)
        if not named_images:
            return []
        batch_size = min(batch_size, len(named_images))
        predictions = list(
            self.iter_predictions(
                named_images, topk=topk, batch_size=batch_size, exif_orientation=exif_orientation
            )
        )
        for prediction in predictions:
            if prediction.error:
                raise BadImageError(prediction.error, name=prediction.image)
        return predictions

    def preprocess(
        self, images: Any, *, exif_orientation: bool = True
    ) -> Float[np.ndarray, "n h w 3"]:
        """Crops and resizes images as the checkpoint requires, to pixels in [-1, 1].

        The result is what the classifier itself takes, for example for features.

        Args:
            images: One image or several; see `predict`.
            exif_orientation: Whether files and Pillow images are rotated by their EXIF orientation.

        Raises:
            BadImageError: An input image is unreadable.
            UserError: Images have another type, dtype or shape.
        """
        pixels = self._load_all(name_images(images, exif_orientation), exif_orientation)
        return np.asarray(normalize_images(jnp.asarray(pixels)))

    def _load_all(
        self, images: Sequence[NamedImage | NamedPixels], exif_orientation: bool
    ) -> UInt8[np.ndarray, "n h w 3"]:
        """Crops and resizes images; raises BadImageError if one is unreadable."""
        if not images:
            return np.zeros((0, *self.model_info.image_size, 3), np.uint8)
        (batch,) = self._load_batches(images, len(images), exif_orientation)
        for image in batch:
            if image.pixels is None:
                raise BadImageError(image.error, name=image.name)
        return np.stack([image.pixels for image in batch if image.pixels is not None])

    def saliency(
        self,
        images: Any,
        target: SupportsIndex | str | None = None,
        method: "Method" = "occlusion",
        *,
        square_size: int | None = None,
        stride: int | None = None,
        batch_size: int = 32,
        exif_orientation: bool = True,
    ) -> list["Saliency"]:
        """Computes what a prediction depends on, as `python -m mixer_jax.visualize saliency`.

        Values explain the log-odds of a class, log p − log(1 − p), in float32 (height, width):

        - "occlusion" (arXiv 1311.2901): how much the log-odds drop when a square with the mean
          color of the image hides the pixel, as a mean over all positions of the square that cover
          it. Negative values: the class becomes more probable.
        - "gradient" (arXiv 1312.6034): absolute value of the gradient of the log-odds with respect
          to the pixel's red, green and blue in [-1, 1], the largest of the three.

        `mixer_jax.plot_saliency` draws the result.

        Args:
            images: One image or several; see `predict`.
            target: Name or index of the class; None: the prediction for each image.
            method: "occlusion" or "gradient".
            square_size: Side of the square, in pixels; None: a seventh of the image's shorter side.
            stride: Step between two positions of the square, in pixels; None: half of its side.
            batch_size: Images per batch.
            exif_orientation: Whether files and Pillow images are rotated by their EXIF orientation.

        Returns:
            Saliency of each image, in order, also for a single image.

        Raises:
            BadImageError: An input image is unreadable.
            UserError: The model has no trained head, there is no such class or method, or another
                argument is out of range.
        """
        named_images = name_images(images, exif_orientation)
        return list(
            self.iter_saliency(
                named_images,
                target,
                method,
                square_size=square_size,
                stride=stride,
                batch_size=batch_size,
                exif_orientation=exif_orientation,
            )
        )

    def iter_saliency(
        self,
        images: Sequence[NamedImage | NamedPixels],
        target: SupportsIndex | str | None,
        method: "Method",
        *,
        square_size: int | None,
        stride: int | None,
        batch_size: int,
        exif_orientation: bool,
    ) -> Iterator["Saliency"]:
        """Computes the saliency of images and yields it in order.

        Args:
            images: Names, and functions that read the bytes or return decoded pixels.
            target: See `saliency`, also for the other arguments.
            method: "occlusion" or "gradient".
            square_size: Side of the square, in pixels.
            stride: Step between two positions of the square, in pixels.
            batch_size: Images per batch.
            exif_orientation: Whether images are rotated by their EXIF orientation.

        Raises:
            BadImageError: An input image is unreadable.
            UserError: See `saliency`.
        """
        from mixer_jax.evaluation.saliency import METHODS, Saliency, resolve_square

        check_trained_head(self._weights, self._name)
        if method not in METHODS:
            raise UserError(f"method must be {' or '.join(METHODS)}, got {method!r}.")
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}.")
        square = resolve_square(square_size, stride, self.model_info.image_size)
        class_index = None if target is None else find_class(self.model_info, target)
        pixels = self._load_all(images, exif_orientation)
        # One image at a time, so that the batch size bounds the memory for any number of images.
        for (name, _), image in zip(images, pixels, strict=True):
            inputs = np.asarray(normalize_images(jnp.asarray(image)))
            logits = self(inputs[None])
            index = int(logits[0].argmax()) if class_index is None else class_index
            if method == "gradient":
                values = self._gradient_saliency(inputs, index)
            else:
                values = self._occlusion_saliency(inputs, index, *square, batch_size)
            probability = float(self._activation(logits)[0, index])
            class_name = self._class_name(index)
            yield Saliency(name, image, index, class_name, probability, method, values)

    def _occlusion_saliency(
        self, image: np.ndarray, class_index: int, size: int, stride: int, batch_size: int
    ) -> Float[np.ndarray, "h w"]:
        from mixer_jax.evaluation.saliency import log_odds, occlusion_saliency

        batch_size = self._round_batch_size(batch_size)
        classes = np.full(batch_size, class_index)

        def compute_log_odds(images: np.ndarray) -> np.ndarray:
            return np.asarray(log_odds(self(images), classes, self.model_info.loss))

        return occlusion_saliency(
            compute_log_odds, image, square_size=size, stride=stride, batch_size=batch_size
        )

    def _gradient_saliency(self, image: np.ndarray, class_index: int) -> Float[np.ndarray, "h w"]:
        gradient = self._log_odds_gradient(self._params, self._put_images(image[None]), class_index)
        return np.abs(np.asarray(gradient[0])).max(-1)

    @functools.cached_property
    def _log_odds_gradient(self) -> Any:
        """Compiled gradient of the log-odds of a class with respect to images."""
        from mixer_jax.evaluation.saliency import log_odds

        # Derivatives with respect to images are tested for modules only, not for custom kernels.
        execution = dataclasses.replace(self.model.execution, backend="xla")
        model = self.model.clone(execution=execution)

        def compute(images: Array, params: Any, class_index: Array) -> Array:
            logits = model.apply({"params": params}, images)
            classes = jnp.full(len(images), class_index)
            return log_odds(logits, classes, self.model_info.loss).sum()

        gradient = jax.grad(compute)
        return jax.jit(lambda params, images, index: gradient(images, params, index))

    @property
    def layers(self) -> dict[str, Layer]:
        """Activations that `features` returns: shape per image, and description, by name."""
        return self.model_info.layers()

    def features(
        self,
        images: Any,
        layers: str | Sequence[str] = PRE_LOGITS,
        batch_size: int = 32,
        *,
        exif_orientation: bool = True,
    ) -> dict[str, Float32[np.ndarray, "n ..."]]:
        """Computes features of photographs, or any other activations, in float32.

        Args:
            images: One image or any number of them in a sequence; see `predict`.
            layers: Name of an activation, or several, as the property `layers` lists them; by
                default the input of the head, one vector per image.
            batch_size: Images per batch.
            exif_orientation: Whether files and Pillow images are rotated by their EXIF orientation.

        Returns:
            Arrays by the names in `layers`, with one row per image.

        Raises:
            BadImageError: An input image is unreadable.
            UserError: The model has no such layer, or images have another type, dtype or shape.
        """
        known = self.layers
        names = (layers,) if isinstance(layers, str) else tuple(dict.fromkeys(layers))
        check_layers(names, known)
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}.")
        named_images = name_images(images, exif_orientation)
        rows: dict[str, list[np.ndarray]] = {name: [] for name in names}
        if named_images:
            batch_size = self._round_batch_size(min(batch_size, len(named_images)))
            batches = self._load_batches(named_images, batch_size, exif_orientation)
            run = functools.partial(self._layers, self._params)
            for batch, found in self._map_batches(batches, batch_size, lambda x: run(x, names)):
                for image in batch:
                    if image.pixels is None:
                        raise BadImageError(image.error, name=image.name)
                for name in names:
                    rows[name].append(np.asarray(found[name])[: len(batch)])
        empty = {name: np.zeros((0, *known[name].shape), np.float32) for name in names}
        return {name: np.concatenate([empty[name], *rows[name]]) for name in names}

    def evaluate(
        self,
        dataset: str,
        split: str = "test",
        *,
        data_dir: str = "",
        batch_size: int = 256,
        skip_bad_images: bool = False,
    ) -> "ClassificationMetrics | MultiLabelMetrics":
        """Evaluates the model on every example of a split, each counted once.

        Classes are matched by name, as by the command `evaluate`. A multi-label model has other
        metrics than one that was trained with a single label per image.

        Args:
            dataset: TFDS name, folder:PATH, manifest:FILE, hf:NAME or wds:PATH.
            split: Split in TFDS syntax.
            data_dir: TFDS data directory; empty: that of the training run, or TFDS's own.
            batch_size: Images per batch.
            skip_bad_images: Whether unusable images are skipped and counted instead of failing.

        Raises:
            UserError: The model has no trained head, data is missing, the data has classes that the
                model lacks, images are unusable, or the process has joined other hosts.
        """
        # Prediction does not need datasets, which take longer to import than everything else.
        from mixer_jax.evaluation.checkpoint import make_input_config, open_eval_source
        from mixer_jax.evaluation.classification import make_evaluator

        check_trained_head(self._weights, self._name)
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}.")
        if jax.process_count() > 1:
            raise UserError(
                "Classifier.evaluate must run on one host, got a process that has joined "
                f"{jax.process_count():,}. Run python -m mixer_jax.evaluate on one of them."
            )
        source = open_eval_source(self._weights, dataset, split, data_dir)
        input_config = make_input_config(self._weights, batch_size, skip_bad_images)
        multi_label = self.model_info.multi_label
        evaluate = make_evaluator(self.model, self._mesh, input_config, multi_label)
        return evaluate(source, self._params)

    def export(self, target: str | os.PathLike) -> str:
        """Writes the model in another format, reads it back and compares, like `convert`.

        Args:
            target: Path of a file, which is replaced if it exists. Its suffix selects the format:
                .npz for Google's code, .safetensors for timm, .stablehlo for a program that needs
                only JAX and safetensors, .onnx for onnxruntime and other runtimes. Without a
                suffix, a new folder in the format of runs.

        Returns:
            A description of the checks that passed.

        Raises:
            UserError: The suffix is unknown, or the target cannot be written.
            RunError: The target differs from the model, or the disk is full.
        """
        from mixer_jax.checkpoints.export import (
            check_target_available,
            choose_format,
            export_weights,
        )

        target = os.fspath(target)
        format = choose_format("", target)
        check_target_available(format, target, force=True)
        return export_weights(self._weights, format, target)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes a folder for the Hugging Face Hub, timm's "local-dir:" and `load_pretrained`.

        It contains model.safetensors and config.json. Models that timm cannot create by name are
        written as well; `python -m mixer_jax.convert --to=timm` refuses them.

        Args:
            folder: New or empty folder.

        Raises:
            UserError: The folder has files or cannot be written, or timm's layout has no place for
                a parameter.
            DiskFullError: The disk is full.
        """
        from mixer_jax.checkpoints.export import HUB_FOLDER, check_target_available, export_weights

        target = os.fspath(folder)
        check_target_available(HUB_FOLDER, target, force=False)
        export_weights(self._weights, HUB_FOLDER, target)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        license: str = "",
        private: bool = False,
        replace_card: bool = False,
    ) -> str:
        """Uploads the model to the Hugging Face Hub, with a generated model card.

        The token is the one of `hf auth login` or HF_TOKEN.

        Args:
            repo_id: Name of the repository, OWNER/NAME. It is created if it does not exist.
            license: Identifier of the license in the model card, e.g. "apache-2.0"; empty: none.
            private: Whether a new repository is private.
            replace_card: Whether to replace a model card that the repository has.

        Returns:
            The address of the repository.

        Raises:
            UserError: The name or the token is invalid, the token lacks write permission, or timm's
                layout has no place for a parameter.
            DiskFullError: There is no space for temporary files.
            RunError: The Hub cannot be reached, or fails.
        """
        from mixer_jax.checkpoints import hub

        upload = hub.push_to_hub(
            self._weights,
            repo_id,
            card_license=license,
            private=private,
            replace_card=replace_card,
        )
        return upload.url

    def iter_predictions(
        self,
        images: Iterable[NamedImage | NamedPixels],
        *,
        topk: int,
        batch_size: int,
        exif_orientation: bool | None = None,
    ) -> Iterator[Prediction]:
        """Classifies images and yields their predictions in order, those of bad images included.

        Args:
            images: Names, and functions that read the bytes or return decoded pixels.
            topk: Number of classes per image.
            batch_size: Images per batch on all devices. It is rounded up to a power of two, so that
                few programs are compiled, and to a multiple of the number of devices.
            exif_orientation: Whether images are rotated by their EXIF orientation; None: as in
                training.

        Raises:
            UserError: The model has no trained head, or an argument is out of range.
        """
        check_trained_head(self._weights, self._name)
        if topk < 1 or batch_size < 1:
            raise UserError(
                f"topk and batch_size must be positive, got topk={topk} and "
                f"batch_size={batch_size}."
            )
        topk = min(topk, self.model_info.num_classes)
        batch_size = self._round_batch_size(batch_size)
        if exif_orientation is None:
            exif_orientation = self.model_info.exif_orientation
        batches = self._load_batches(images, batch_size, exif_orientation)
        return self._classify_batches(batches, batch_size, topk)

    def _round_batch_size(self, batch_size: int) -> int:
        """Rounds up to a power of two and to a multiple of the number of devices."""
        power_of_two = 2 ** (batch_size - 1).bit_length()
        return -(-power_of_two // self._mesh.size) * self._mesh.size

    def _classify_batches(
        self, batches: Iterable[list["_LoadedImage"]], batch_size: int, topk: int
    ) -> Iterator[Prediction]:
        run = functools.partial(self._top_k, self._params)
        for batch, top_k in self._map_batches(batches, batch_size, lambda x: run(x, topk)):
            yield from self._name_classes(batch, top_k)

    def _map_batches(
        self, batches: Iterable[list["_LoadedImage"]], batch_size: int, run: Callable[[Array], Any]
    ) -> Iterator[tuple[list["_LoadedImage"], Any]]:
        """Yields each batch and the output for its pixels, padded to `batch_size` rows."""
        pending: tuple[list[_LoadedImage], Any] | None = None
        for batch in batches:
            pixels = np.zeros((batch_size, *self.model_info.image_size, 3), np.uint8)
            for row, image in enumerate(batch):
                if image.pixels is not None:
                    pixels[row] = image.pixels
            on_device = jax.device_put(pixels, batch_sharding(self._mesh))
            # Dispatched before the last result is read, so that devices do not wait for the host.
            dispatched = (batch, run(on_device))
            if pending is not None:
                yield pending
            pending = dispatched
        if pending is not None:
            yield pending

    def _load_batches(
        self, images: Iterable[NamedImage | NamedPixels], batch_size: int, exif_orientation: bool
    ) -> Iterator[list["_LoadedImage"]]:
        """Yields batches of images, loaded by threads one batch ahead."""
        futures: collections.deque[concurrent.futures.Future[_LoadedImage]] = collections.deque()
        remaining = iter(images)
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            while True:
                for name, read in itertools.islice(remaining, 2 * batch_size - len(futures)):
                    futures.append(pool.submit(self._load_image, name, read, exif_orientation))
                if not futures:
                    return
                yield [futures.popleft().result() for _ in range(min(batch_size, len(futures)))]

    def _load_image(self, name: str, read: Any, exif_orientation: bool) -> "_LoadedImage":
        crop: dict[str, Any] = {
            "image_size": self.model_info.image_size,
            "eval_crop": self.model_info.eval_crop,
            "eval_crop_fraction": self.model_info.eval_crop_fraction,
            "permutation": self.model_info.permutation,
        }
        try:
            image = read()
            if isinstance(image, np.ndarray):
                pixels = crop_eval_image(image, **crop)
            else:
                pixels = eval_image(image, exif_orientation=exif_orientation, **crop)
        except BadImageError as error:
            return _LoadedImage(name, None, error.description)
        return _LoadedImage(name, pixels)

    def _top_classes(
        self, params: Any, images: UInt8[Array, "n h w 3"], topk: int
    ) -> tuple[Float[Array, "n k"], Int[Array, "n k"]]:
        logits = self.model.apply({"params": params}, normalize_images(images))
        probabilities, classes = jax.lax.top_k(self._activation(logits), topk)
        return probabilities, classes

    def _activation(self, logits: Float[Array, "n classes"]) -> Float[Array, "n classes"]:
        """Converts logits to probabilities."""
        return (jax.nn.sigmoid if self.model_info.loss == "sigmoid" else jax.nn.softmax)(logits)

    def _class_name(self, class_index: int) -> str:
        names = self.model_info.class_names
        return names[class_index] if names else str(class_index)

    def _compute_layers(
        self, params: Any, images: UInt8[Array, "n h w 3"], layers: tuple[str, ...]
    ) -> dict[str, Float32[Array, "n ..."]]:
        return compute_layers(self.model, params, normalize_images(images), layers)

    def _name_classes(self, batch: list["_LoadedImage"], top_k: Any) -> Iterator[Prediction]:
        probabilities, classes = (np.asarray(array) for array in top_k)
        for row, image in enumerate(batch):
            if image.pixels is None:
                yield Prediction(image.name, [], image.error)
                continue
            named = []
            for k, p in zip(classes[row].tolist(), probabilities[row].tolist(), strict=True):
                name = self._class_name(k)
                named.append(ClassProbability(k, name, p, describe_class(name)))
            yield Prediction(image.name, named)


def find_class(info: ModelInfo, target: SupportsIndex | str) -> int:
    """Returns the index of a class, from its name, its words or its index, also as text.

    Raises:
        UserError: There is no such class, or several.
    """
    text, names = str(target), info.class_names
    # A WordNet ID has several words, and several IDs can have the same.
    spellings = [(name, *filter(None, describe_class(name).split(", "))) for name in names]
    if isinstance(target, str):
        if text in names:
            return names.index(text)
        matches = [index for index, spelling in enumerate(spellings) if text in spelling]
        if len(matches) > 1:
            options = " or ".join(names[index] for index in matches)
            raise UserError(f"class must be one of the model's, got {text!r}: name {options}.")
        if matches:
            return matches[0]
    if text.isdecimal() and int(text) < info.num_classes:
        return int(text)
    rule = f"an index between 0 and {info.num_classes - 1}"
    if not names:
        raise UserError(f"class must be {rule} for a model without class names, got {text!r}.")
    hint = suggest(text, itertools.chain.from_iterable(spellings))
    hint = hint or f" Names are {abbreviate(map(label_class, names))}."
    raise UserError(f"class must be a name of the model's classes or {rule}, got {text!r}.{hint}")


class _LoadedImage(NamedTuple):
    name: str
    pixels: np.ndarray | None
    error: str = ""
