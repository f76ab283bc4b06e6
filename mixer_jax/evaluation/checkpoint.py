"""Evaluation of a checkpoint on a dataset: labels as the model has them, and the input pipeline."""

from mixer_jax.checkpoints.weights import PretrainedWeights
from mixer_jax.config.schema import FIELDS
from mixer_jax.data.registry import open_dataset
from mixer_jax.data.source import Source, relabel
from mixer_jax.errors import UserError
from mixer_jax.evaluation.loop import EvalInputConfig


def open_eval_source(
    weights: PretrainedWeights,
    dataset: str,
    split: str,
    data_dir: str,
    *,
    argument: str = "dataset",
    model: str = "the model",
    fix: str = "Pass class_names to load_pretrained.",
) -> Source:
    """Opens a dataset with the model's class indices as labels, matching classes by name.

    Args:
        weights: Weights with a head.
        dataset: Name of the dataset; see `open_dataset`.
        split: Split in TFDS syntax.
        data_dir: Directory of the TFDS datasets; empty: that of the training run, if any.
        argument: Name of the dataset's argument for messages.
        model: Name of the model for messages.
        fix: Last sentence of the message about weights without class names.

    Raises:
        UserError: The dataset or split does not exist, is not prepared, or has other classes.
    """
    info = weights.model_info
    data_dir = data_dir or (weights.train_config or {}).get("dataset", {}).get("data_dir", "")
    source = open_dataset(dataset, split, data_dir, num_classes=info.num_classes)
    if not info.class_names:
        if source.num_classes != info.num_classes:
            raise UserError(
                f"{argument} must have the {info.num_classes:,} classes of {model}, got {dataset} "
                f"with {source.num_classes:,}. {fix}"
            )
        return source
    try:
        return relabel(source, info.class_names)
    except UserError as error:
        raise UserError(
            f"{argument}={dataset}: {error} Choose a dataset with classes of {model}."
        ) from error


def make_input_config(
    weights: PretrainedWeights, batch_size: int, skip_bad: bool
) -> EvalInputConfig:
    """Creates the input pipeline of a checkpoint, with the threads of its training run, if any."""
    info = weights.model_info
    loader = (weights.train_config or {}).get("loader", {})
    return EvalInputConfig(
        batch_size=batch_size,
        image_size=info.image_size,
        eval_crop=info.eval_crop,
        eval_crop_fraction=info.eval_crop_fraction,
        exif_orientation=info.exif_orientation,
        skip_bad=skip_bad,
        num_threads=loader.get("num_threads", FIELDS["loader.num_threads"].default),
        prefetch_batches=loader.get("prefetch_batches", FIELDS["loader.prefetch_batches"].default),
        permutation=info.permutation,
    )
