"""What the paper measured with its Mixers (Tables 2 and 3), to stand beside our own results."""

import re
from typing import NamedTuple


class PaperRow(NamedTuple):
    """A row of the paper's Table 2 or 3; scores in percent.

    Attributes:
        table: its number.
        data: pre-training data: "i1k", "i21k", "jft".
        variant: of the model.
        image_size: of fine-tuning, pixels.
        imagenet: top-1 accuracy.
        real: by the labels of arXiv 2006.07159.
        avg5: mean over ImageNet, CIFAR-10, CIFAR-100, Pets and Flowers.
        vtab: mean over VTAB-1k's 19 tasks; None: not measured.
        images_per_second: on one core of a TPU v3.
        core_days: of pre-training, on cores of a TPU v3.
    """

    table: int
    data: str
    variant: str
    image_size: int
    imagenet: float
    real: float
    avg5: float
    vtab: float | None
    images_per_second: int
    core_days: int

    @property
    def title(self) -> str:
        """Which row it is, for people."""
        return f"Table {self.table}, Mixer-{self.variant} from {self.data} at {self.image_size} px"


# Table 2 comes first: where both have a row, its evaluation crop is the one used at that size.
PAPER = (
    PaperRow(2, "i21k", "L/16", 448, 84.15, 87.86, 93.91, 74.95, 105, 410),
    PaperRow(2, "jft", "H/14", 448, 87.94, 90.18, 95.71, 75.33, 40, 1010),
    PaperRow(3, "i1k", "B/16", 224, 76.44, 82.36, 88.33, None, 1384, 10),
    PaperRow(3, "i1k", "L/16", 224, 71.76, 77.08, 87.25, None, 419, 40),
    PaperRow(3, "i21k", "B/16", 224, 80.64, 85.80, 92.50, None, 1384, 150),
    PaperRow(3, "i21k", "L/16", 224, 82.89, 87.54, 93.63, None, 419, 410),
    PaperRow(3, "i21k", "L/16", 448, 83.91, 87.75, 93.86, None, 105, 410),
    PaperRow(3, "jft", "S/32", 224, 68.70, 75.83, 87.13, None, 11489, 10),
    PaperRow(3, "jft", "B/32", 224, 75.53, 81.94, 90.99, None, 4208, 50),
    PaperRow(3, "jft", "S/16", 224, 73.83, 80.60, 89.50, None, 3994, 30),
    PaperRow(3, "jft", "B/16", 224, 80.00, 85.56, 92.60, None, 1384, 80),
    PaperRow(3, "jft", "L/32", 224, 80.67, 85.62, 93.24, None, 1314, 120),
    PaperRow(3, "jft", "L/16", 224, 84.82, 88.48, 94.77, None, 419, 450),
    PaperRow(3, "jft", "H/14", 224, 86.32, 89.14, 95.49, None, 194, 1010),
)

# Pre-training data, by what their data sets are called.
_DATA = {"imagenet21k": "i21k", "imagenet2012": "i1k", "jft": "jft"}
# Of weights that come without a config, told by the number of their classes.
_CLASSES = {21_843: "i21k", 1_000: "i1k"}
DATA = tuple(_DATA.values())


def find_row(data: str, variant: str, image_size: int) -> PaperRow | None:
    """Returns the paper's row for a model, if it has one.

    Args:
        data: it was pre-trained on, one of `DATA`; empty: unknown.
        variant: of the model.
        image_size: the largest that it is fine-tuned at, pixels.
    """
    wanted = (data, variant, image_size)
    rows = (row for row in PAPER if (row.data, row.variant, row.image_size) == wanted)
    return next(rows, None)


def infer_pretrain_dataset(
    dataset: str, init_from: str, num_classes: int, mixture: bool = False
) -> str:
    """Returns what weights were pre-trained on, one of `DATA`; empty where it cannot be told.

    Args:
        dataset: of the run that trained them; empty: they are no run's, and the number of classes
            has to tell.
        init_from: of that run; weights that began with others were pre-trained on more than it.
        num_classes: of their head.
        mixture: whether that run trained on several data sets.
    """
    if init_from or mixture:
        return ""
    if not dataset:
        return _CLASSES.get(num_classes, "")
    # As in imagenet2012:5.1.0 and NAME/CONFIG@LABEL; imagenet2012_subset is another data set.
    return _DATA.get(re.split("[/:@]", dataset)[0], "")
