"""Classifier: images in, named classes out."""

import collections
import concurrent.futures
import functools
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from mixer_jax.checkpoints.load import (
    ImageSize,
    PretrainedWeights,
    collect_overrides,
    load_checkpoint,
    replace_head,
    set_class_names,
)
from mixer_jax.checkpoints.to_device import model_from_info, shard_inference_params, shard_params
from mixer_jax.data.decode import BadImageError
from mixer_jax.data.image_files import NamedImage, display_path, read_image
from mixer_jax.data.preprocess import eval_image
from mixer_jax.distributed.sharding import batch_sharding, make_mesh, replicated
from mixer_jax.distributed.xla_options import compiler_options
from mixer_jax.errors import UserError
from mixer_jax.models.layers import normalize_images
from mixer_jax.models.mixer_config import check_image_size
from mixer_jax.models.stack import use_partitionable_backend


class ClassProbability(NamedTuple):
    """A class and how probable it is.

    Attributes:
        class_index: its number.
        name: its name, or its number as text where names are not known.
        probability: in [0, 1].
    """

    class_index: int
    name: str
    probability: float


class Prediction(NamedTuple):
    """What an image shows.

    Attributes:
        image: what a person finds it by.
        classes: the most probable ones, in falling order; none where the image cannot be used.
        error: why it cannot be used; empty if it can.
    """

    image: str
    classes: list[ClassProbability]
    error: str = ""


def load_pretrained(
    source: str | os.PathLike,
    *,
    step: int | None = None,
    image_size: ImageSize | None = None,
    pretrain_image_size: ImageSize | None = None,
    num_classes: int | None = None,
    class_names: Sequence[str] = (),
    gelu: str = "",
    eval_crop: str = "",
    dtype: str = "",
) -> "Classifier":
    """Loads weights of any kind, at any image size, as a model ready to use.

    Args:
        source: a run's folder or RUN/checkpoints/STEP; Google's .npz; timm's .safetensors or .pth;
            "hf:OWNER/NAME" of the Hugging Face Hub; or a URL such as gs://BUCKET/Mixer-B_16.npz.
        step: which checkpoint of a run; None: the newest.
        image_size: side, or height and width, of the images, pixels; None: what the weights are
            for. Whole multiples are grown as in the paper's Appendix C, others interpolated.
        pretrain_image_size: size of the images that the weights were trained on, where it is
            neither stored nor inferred from the number of tokens; None: as stored.
        num_classes: of a new head of zeros, unless the weights have just as many; 0: no head, the
            model returns features; None: the weights' own.
        class_names: in place of those that come with the weights; empty: those.
        gelu: "tanh" or "exact", in place of what the weights tell.
        eval_crop: of images that are classified, in place of what the weights tell.
        dtype: "float32" or "bfloat16"; empty: as the weights say, or by the device.

    Raises:
        UserError: an argument is wrong; there are no such weights, they are damaged, or do not tell
            what is needed.
    """
    # All is checked before the weights are fetched, which may take long.
    names = collect_overrides(class_names=class_names, dtype=dtype).get("class_names", ())
    if not isinstance(num_classes, int | np.integer | None) or (num_classes or 0) < 0:
        raise UserError(f"num_classes={num_classes!r} is no number of classes; pass 0 or more")
    weights = load_checkpoint(
        source,
        step=step,
        image_size=image_size,
        pretrain_image_size=pretrain_image_size,
        # Those of a new head are given to it below.
        class_names=names if num_classes is None else (),
        gelu=gelu,
        eval_crop=eval_crop,
    )
    if num_classes is not None:
        if num_classes != weights.model_info.num_classes:
            weights = replace_head(weights, int(num_classes))
        if names:
            weights = set_class_names(weights, names, os.fspath(source))
    return Classifier(weights, dtype)


class Classifier:
    """A model with its parameters on this host's devices.

    Attributes:
        model_info: what the weights say of themselves.
        model: the Flax module, from images in [-1, 1] to logits.
    """

    def __init__(self, weights: PretrainedWeights, dtype: str = ""):
        """Puts weights on the devices; `dtype` as `load_pretrained` takes it."""
        self.model_info = weights.model_info
        self._mesh = make_mesh(0, 1, jax.local_devices())
        self.model = use_partitionable_backend(
            model_from_info(weights.model_info, dtype), self._mesh.size
        )
        self._whole = weights.params
        self._params = shard_inference_params(weights.params, self.model, self._mesh)
        platform = self._mesh.devices.flat[0].platform
        options = compiler_options(platform, self.model.execution.backend)
        compiled = functools.partial(jax.jit, compiler_options=options)
        self._logits = compiled(lambda params, x: self.model.apply({"params": params}, x))
        self._top = compiled(self._top_classes, static_argnums=2)

    @property
    def params(self) -> Any:
        """The parameters as `model` has them, float32, whatever it computes in."""
        return shard_params(self._whole, self._mesh)

    def __call__(self, images: Any) -> Float[Array, "n outputs"]:
        """Returns logits, float32; features where the model has no head.

        Args:
            images: floating-point array (n, height, width, 3) of pixels in [-1, 1], of the size
                that `model_info.image_size` says. They are divided over the devices if n allows.

        Raises:
            UserError: they are of another size or kind.
        """
        if images.ndim != 4 or images.shape[3] != 3:
            raise UserError(
                f"images of shape {tuple(images.shape)} are not (n, height, width, 3); give even a "
                "single one an axis in front: images[None]"
            )
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise UserError(
                f"images are of type {images.dtype}, not floating-point numbers in [-1, 1]; pass "
                "images / 127.5 - 1"
            )
        size = tuple(images.shape[1:3])
        if size != self.model_info.image_size:
            check_image_size(size[0], size[1], self.model_info.config.patch_size)
            raise UserError(
                f"images of {size[0]} × {size[1]} px do not fit {self.model_info.name}; load the "
                f"weights with image_size={size}"
            )
        divides = len(images) % self._mesh.size == 0
        sharding = batch_sharding(self._mesh) if divides else replicated(self._mesh)
        return self._logits(self._params, jax.device_put(images, sharding))

    def predict(
        self, images: Sequence[str | os.PathLike | bytes], topk: int = 5, batch_size: int = 32
    ) -> list[Prediction]:
        """Classifies images.

        Args:
            images: paths of files, or their bytes.
            topk: classes returned of each.
            batch_size: images at a time.

        Raises:
            BadImageError: an image cannot be used.
            UserError: the model has no head, or `images` is one image, not several.
        """
        if isinstance(images, str | bytes | os.PathLike):
            raise UserError("predict takes a list of images; pass [image] for a single one")

        def named(number: int, image: str | os.PathLike | bytes) -> NamedImage:
            if isinstance(image, bytes):
                return f"image {number}", lambda: image
            return display_path(Path(image)), lambda: read_image(Path(image))

        found = [named(number, image) for number, image in enumerate(images)]
        predictions = list(
            self.iter_predictions(found, topk=topk, batch_size=min(batch_size, len(found)))
        )
        for prediction in predictions:
            if prediction.error:
                raise BadImageError(prediction.error, name=prediction.image)
        return predictions

    def iter_predictions(
        self,
        images: Iterable[NamedImage],
        *,
        topk: int,
        batch_size: int,
        exif_orientation: bool | None = None,
    ) -> Iterator[Prediction]:
        """Returns what images show, one by one, in their order; if one cannot be used, it says why.

        Args:
            images: names, and how to read the bytes.
            topk: classes yielded of each.
            batch_size: images at a time over all devices; rounded up to a multiple of their number,
                and to a power of two, so that few programs are compiled.
            exif_orientation: whether images are turned as their cameras say; None: as the weights
                were trained.

        Raises:
            UserError: the model has no head.
        """
        if not self.model_info.num_classes:
            raise UserError("these weights have no head and give features; name some with classes")
        if topk < 1 or batch_size < 0:
            raise UserError(f"topk={topk} and batch_size={batch_size}; pass 1 or more of each")
        topk = min(topk, self.model_info.num_classes)
        rows = max(1, batch_size - 1).bit_length() if batch_size > 1 else 0
        rows = -(-(2**rows) // self._mesh.size) * self._mesh.size
        if exif_orientation is None:
            exif_orientation = self.model_info.exif_orientation
        return self._classify(self._prepare(images, rows, exif_orientation), rows, topk)

    def _classify(
        self, batches: Iterable[list["_Prepared"]], rows: int, topk: int
    ) -> Iterator[Prediction]:
        running: tuple[list[_Prepared], Any] | None = None
        for batch in batches:
            pixels = np.zeros((rows, *self.model_info.image_size, 3), np.uint8)
            for row, prepared in enumerate(batch):
                if prepared.pixels is not None:
                    pixels[row] = prepared.pixels
            placed = jax.device_put(pixels, batch_sharding(self._mesh))
            # Sent off before the last one is read, so that the device need not wait for the host.
            started = (batch, self._top(self._params, placed, topk))
            if running is not None:
                yield from self._name(*running)
            running = started
        if running is not None:
            yield from self._name(*running)

    def _prepare(
        self, images: Iterable[NamedImage], rows: int, exif_orientation: bool
    ) -> Iterator[list["_Prepared"]]:
        """Yields images in batches, prepared by threads one batch ahead."""
        waiting: collections.deque[concurrent.futures.Future[_Prepared]] = collections.deque()
        rest = iter(images)
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            while True:
                for image in itertools.islice(rest, 2 * rows - len(waiting)):
                    waiting.append(pool.submit(self._prepare_one, *image, exif_orientation))
                if not waiting:
                    return
                yield [waiting.popleft().result() for _ in range(min(rows, len(waiting)))]

    def _prepare_one(self, name: str, read: Any, exif_orientation: bool) -> "_Prepared":
        about = self.model_info
        try:
            pixels = eval_image(
                read(),
                image_size=about.image_size,
                eval_crop=about.eval_crop,
                exif_orientation=exif_orientation,
            )
        except BadImageError as error:
            return _Prepared(name, None, error.reason)
        return _Prepared(name, pixels)

    def _top_classes(
        self, params: Any, images: UInt8[Array, "n h w 3"], topk: int
    ) -> tuple[Float[Array, "n k"], Int[Array, "n k"]]:
        logits = self.model.apply({"params": params}, normalize_images(images))
        activation = jax.nn.sigmoid if self.model_info.loss == "sigmoid" else jax.nn.softmax
        probabilities, labels = jax.lax.top_k(activation(logits), topk)
        return probabilities, labels

    def _name(self, batch: list["_Prepared"], top: Any) -> Iterator[Prediction]:
        probabilities, labels = (np.asarray(array) for array in top)
        names = self.model_info.class_names
        for row, prepared in enumerate(batch):
            if prepared.pixels is None:
                yield Prediction(prepared.name, [], prepared.error)
                continue
            pairs = zip(labels[row].tolist(), probabilities[row].tolist(), strict=True)
            classes = [ClassProbability(k, names[k] if names else str(k), p) for k, p in pairs]
            yield Prediction(prepared.name, classes)


class _Prepared(NamedTuple):
    name: str
    pixels: np.ndarray | None
    error: str = ""
