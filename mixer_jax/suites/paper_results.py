"""Results of Mixer, ViT and BiT in the paper (Tables 2 and 3), for comparison."""

import re
from typing import NamedTuple


class PaperRow(NamedTuple):
    """Row of the paper's Table 2 or 3; accuracies in percent.

    Attributes:
        table: Number of the table.
        data: Pre-training data: "i1k", "i21k" or "jft".
        model: Full name, as in `list_models`.
        image_size: Image size of fine-tuning, in pixels. The paper does not state those of ViT and
            BiT in Table 2, which are from their papers.
        real: Accuracy with ReaL labels (arXiv 2006.07159); None if not measured.
        avg5: Mean over ImageNet, CIFAR-10, CIFAR-100, Pets and Flowers; None if not measured.
        vtab: Mean over VTAB-1k's 19 tasks; None if not measured.
        images_per_second: Throughput of one TPU v3 core.
        core_days: Pre-training cost, in days of one TPU v3 core.
    """

    table: int
    data: str
    model: str
    image_size: int
    imagenet: float
    real: float | None
    avg5: float | None
    vtab: float | None
    images_per_second: int
    core_days: int

    @property
    def title(self) -> str:
        """Description of the row."""
        return f"Table {self.table}, {self.model} from {self.data} at {self.image_size} px"


# Table 2 comes first: where both have a row, its evaluation crop is the one used at that size.
PAPER = (
    PaperRow(2, "i21k", "Mixer-L/16", 448, 84.15, 87.86, 93.91, 74.95, 105, 410),
    PaperRow(2, "i21k", "ViT-L/16", 512, 85.30, 88.62, 94.39, 72.72, 32, 180),
    PaperRow(2, "i21k", "BiT-R152x4", 480, 85.39, None, 94.04, 70.64, 26, 940),
    PaperRow(2, "jft", "Mixer-H/14", 448, 87.94, 90.18, 95.71, 75.33, 40, 1010),
    PaperRow(2, "jft", "BiT-R152x4", 480, 87.54, 90.54, 95.33, 76.29, 26, 9900),
    PaperRow(2, "jft", "ViT-H/14", 518, 88.55, 90.72, 95.97, 77.63, 15, 2300),
    PaperRow(3, "i1k", "Mixer-B/16", 224, 76.44, 82.36, 88.33, None, 1384, 10),
    PaperRow(3, "i1k", "Mixer-L/16", 224, 71.76, 77.08, 87.25, None, 419, 40),
    PaperRow(3, "i1k", "ViT-B/16", 224, 79.67, 84.97, 90.79, None, 861, 20),
    PaperRow(3, "i1k", "ViT-L/16", 224, 76.11, 80.93, 89.66, None, 280, 50),
    PaperRow(3, "i21k", "Mixer-B/16", 224, 80.64, 85.80, 92.50, None, 1384, 150),
    PaperRow(3, "i21k", "Mixer-L/16", 224, 82.89, 87.54, 93.63, None, 419, 410),
    PaperRow(3, "i21k", "Mixer-L/16", 448, 83.91, 87.75, 93.86, None, 105, 410),
    PaperRow(3, "i21k", "ViT-B/16", 224, 84.59, 88.93, 94.16, None, 861, 180),
    PaperRow(3, "i21k", "ViT-L/16", 224, 84.46, 88.35, 94.49, None, 280, 550),
    PaperRow(3, "jft", "Mixer-S/32", 224, 68.70, 75.83, 87.13, None, 11489, 10),
    PaperRow(3, "jft", "Mixer-B/32", 224, 75.53, 81.94, 90.99, None, 4208, 50),
    PaperRow(3, "jft", "Mixer-S/16", 224, 73.83, 80.60, 89.50, None, 3994, 30),
    PaperRow(3, "jft", "Mixer-B/16", 224, 80.00, 85.56, 92.60, None, 1384, 80),
    PaperRow(3, "jft", "Mixer-L/32", 224, 80.67, 85.62, 93.24, None, 1314, 120),
    PaperRow(3, "jft", "Mixer-L/16", 224, 84.82, 88.48, 94.77, None, 419, 450),
    PaperRow(3, "jft", "Mixer-L/16", 448, 86.78, 89.72, 95.13, None, 105, 450),
    PaperRow(3, "jft", "Mixer-H/14", 224, 86.32, 89.14, 95.49, None, 194, 1010),
    PaperRow(3, "jft", "BiT-R50x1", 224, 73.69, 81.92, None, None, 2159, 80),
    PaperRow(3, "jft", "BiT-R152x1", 224, 79.12, 86.12, None, None, 932, 140),
    PaperRow(3, "jft", "BiT-R50x2", 224, 78.92, 86.06, None, None, 890, 140),
    PaperRow(3, "jft", "BiT-R152x2", 224, 83.34, 88.90, None, None, 356, 580),
    PaperRow(3, "jft", "ViT-L/16", 224, 85.63, 89.16, 95.21, None, 280, 650),
    PaperRow(3, "jft", "BiT-R200x3", 224, 84.73, 89.58, None, None, 141, 1780),
    PaperRow(3, "jft", "ViT-H/14", 224, 86.65, 89.56, 95.57, None, 87, 2300),
    PaperRow(3, "jft", "ViT-L/16", 512, 87.76, 90.54, 95.63, None, 32, 650),
)

# The paper's names of pre-training data, by names of datasets.
_PRETRAIN_DATASETS = {"imagenet21k": "i21k", "imagenet2012": "i1k", "jft": "jft"}
# The same by the number of classes, for weights without a config.
_BY_NUM_CLASSES = {21_843: "i21k", 1_000: "i1k"}
PRETRAIN_DATASETS = tuple(_PRETRAIN_DATASETS.values())


def find_row(pretrain_dataset: str, model: str, image_size: int) -> PaperRow | None:
    """Returns the paper's row for a model, such as "Mixer-B/16"; None if there is none."""
    key = (pretrain_dataset, model, image_size)
    rows = (row for row in PAPER if (row.data, row.model, row.image_size) == key)
    return next(rows, None)


def infer_pretrain_dataset(
    dataset: str, init_from: str, num_classes: int, mixture: bool = False
) -> str:
    """Returns the pre-training data, one of `PRETRAIN_DATASETS`; empty if unknown.

    Args:
        dataset: Training data of the run that wrote the checkpoint. Empty if no run did; the number
            of classes then decides.
        init_from: Checkpoint that this run started from, which was trained on other data.
        num_classes: Number of classes of the head.
        mixture: Whether the run trained on several datasets.
    """
    if init_from or mixture:
        return ""
    if not dataset:
        return _BY_NUM_CLASSES.get(num_classes, "")
    # As in imagenet2012:5.1.0 and NAME/CONFIG@LABEL; imagenet2012_subset is another dataset.
    return _PRETRAIN_DATASETS.get(re.split("[/:@]", dataset)[0], "")
