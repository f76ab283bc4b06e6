"""Built-in suites: the paper's average of five tasks, VTAB-1k, and digits without downloads.

Fine-tuning follows Section 3, Appendix A.2 and the protocol of arXiv 2010.11929, B.1.1, to which
they refer. A custom suite is a Python file that defines `SUITE` with the same classes.

Sources of the VTAB-1k constants, 19 tasks with 1,000 training images each (arXiv 1910.04867):

- Datasets, labels, numbers of classes and splits: the code of VTAB's authors, google-research/
  task_adaptation, task_adaptation/data/*.py. 800 images train the sweep, 200 validate it, and both
  train the final run; "validation" is a later part of the training data where TFDS has no such
  split (for smallnorb, the first half of its test data). The test data are complete.
- Numbers of examples: the catalog of TFDS (tensorflow.org/datasets/catalog). Slices that VTAB
  computes from them, such as the last tenth of the training data, are written out.
- Steps, warmup and learning rates: the Mixer paper, Section 3 and Appendix A.2.
- Crops and flips: BiT (arXiv 1912.11370), Section 3.3 and Appendix F, which the ViT paper follows
  for VTAB (arXiv 2010.11929, Appendix B.1.1) and whose protocol the Mixer paper uses: training
  images are resized, cropped at random and flipped, except where that changes the label; test
  images are only resized. BiT's list is short: house numbers are flipped too.
- Large images: BiT, Section 3.3: those with an area of at least 96 × 96 px.

ViT and BiT have their own protocols. ViT: arXiv 2010.11929, B.1.1, with its learning rates, the
Inception crop of its authors' code, evaluated like ViT in the Mixer paper (shorter side); VTAB-1k
with one learning rate at 384 px. BiT: BiT-HyperRule (arXiv 1912.11370, Section 3.3).
"""

from typing import Any

from mixer_jax.config.hyperrule import bit_hyperrule
from mixer_jax.suites.tasks import FineTuneTask, ProbeTask, Suite, Task

_SMALL_AREA, _LARGE_AREA = 32 * 32, 224 * 224
# Fields of tasks that config keys have under another name.
_TASK_FIELDS = {
    "num_steps": "num_steps",
    "batch_size": "batch_size",
    "image_size": "image_size",
    "preprocess.train_crop": "train_crop",
    "preprocess.resize_size": "resize_size",
    "preprocess.eval_crop": "eval_crop",
    "optimizer.warmup_steps": "warmup_steps",
}


def _bit_overrides(num_examples: int, is_large: bool, cropped: bool = True) -> dict[str, Any]:
    """Returns the `model_overrides` of BiT-HyperRule.

    Args:
        num_examples: Training images of the final run.
        is_large: Whether images have 96 × 96 px or more.
        cropped: Whether a random crop keeps the label.
    """

    def rule(large_image_size: int) -> dict[str, Any]:
        keys = bit_hyperrule(
            num_examples, _LARGE_AREA if is_large else _SMALL_AREA, large_image_size
        )
        fields: dict[str, Any] = {name: keys.pop(key) for key, name in _TASK_FIELDS.items()}
        fields["learning_rates"] = (keys.pop("optimizer.learning_rate"),)
        if not cropped:
            fields |= {"train_crop": "resize", "resize_size": 0}
        return fields | {"config_overrides": keys}

    return {"bit": rule(384), "BiT-R152x4": rule(480)}


def _vit_overrides(**fields: Any) -> dict[str, Any]:
    return {"vit": {"train_crop": "inception", "eval_crop": "shorter_side", **fields}}


IMAGENET = FineTuneTask(
    name="imagenet",
    dataset="imagenet2012",
    num_classes=1_000,
    sweep_train_split="train[:99%]",
    sweep_val_split="train[99%:]",
    train_split="train",
    test_split="validation",
    num_examples=(1_268_355, 12_812, 1_281_167, 50_000),
    num_steps=20_000,
    warmup_steps=500,
    learning_rates=(0.003, 0.01, 0.03, 0.06),
    is_large_image=True,
    extra_evals={"real": ("imagenet2012_real", "validation")},
    paper_column="imagenet",
    model_overrides=_vit_overrides(learning_rates=(0.003, 0.01, 0.03))
    | _bit_overrides(1_281_167, is_large=True),
)

AVG5 = (
    IMAGENET,
    *(
        FineTuneTask(
            name=name,
            dataset=name,
            num_classes=num_classes,
            sweep_train_split="train[:98%]",
            sweep_val_split="train[98%:]",
            train_split="train",
            test_split="test",
            num_examples=(49_000, 1_000, 50_000, 10_000),
            num_steps=10_000,
            warmup_steps=500,
            is_large_image=False,
            model_overrides=_vit_overrides() | _bit_overrides(50_000, is_large=False),
        )
        for name, num_classes in (("cifar10", 10), ("cifar100", 100))
    ),
    FineTuneTask(
        name="pets",
        dataset="oxford_iiit_pet",
        num_classes=37,
        sweep_train_split="train[:90%]",
        sweep_val_split="train[90%:]",
        train_split="train",
        test_split="test",
        num_examples=(3_312, 368, 3_680, 3_669),
        num_steps=500,
        warmup_steps=100,
        is_large_image=True,
        model_overrides=_vit_overrides() | _bit_overrides(3_680, is_large=True),
    ),
    FineTuneTask(
        name="flowers",
        dataset="oxford_flowers102",
        num_classes=102,
        # A tenth of each of the two splits that train the final runs.
        sweep_train_split="train[:90%]+validation[:90%]",
        sweep_val_split="train[90%:]+validation[90%:]",
        train_split="train+validation",
        test_split="test",
        num_examples=(1_836, 204, 2_040, 6_149),
        num_steps=500,
        warmup_steps=100,
        is_large_image=True,
        model_overrides=_vit_overrides() | _bit_overrides(2_040, is_large=True),
    ),
)

# Digits 5-9, for a model trained on 0-4: the paper's protocol in miniature.
DIGITS: tuple[Task, ...] = (
    FineTuneTask(
        name="digits_5_to_9",
        dataset="digits/high",
        num_classes=5,
        sweep_train_split="train[:90%]",
        sweep_val_split="train[90%:]",
        train_split="train",
        test_split="test",
        num_examples=(656, 73, 729, 167),
        num_steps=300,
        warmup_steps=30,
        learning_rates=(0.03, 0.1, 0.3),
        batch_size=64,
        is_large_image=False,
        flip=False,
    ),
    *(
        ProbeTask(
            name=f"{method}_5_to_9",
            dataset="digits/high",
            method=method,
            train_split="train",
            test_split="test",
            num_classes=5,
            num_examples=(729, 167),
            is_large_image=False,
            eval_crop="resize",
            compare_random_init=True,
        )
        for method in ("few_shot", "linear", "knn")
    ),
)

_VTAB_SWEEP_TRAIN = "train[:800]"
# BiT, Appendix F: labels that flipping, or cropping, would change.
_NEVER_FLIPPED = {"dsprites_orientation", "dsprites_position", "smallnorb_azimuth"}
_NEVER_CROPPED = {"clevr_count", "clevr_distance", "dmlab", "dsprites_position", "kitti_distance"}
# Datasets with images of 32 or 64 px.
_SMALL_IMAGES = {"cifar100", "svhn", "eurosat", "dsprites_orientation", "dsprites_position"}

# Name, dataset, classes, sweep validation split, test split, number of test images.
_VTAB_NATURAL = (
    ("caltech101", "caltech101", 102, "train[2754:2954]", "test", 6084),
    ("cifar100", "cifar100", 100, "train[45000:45200]", "test", 10000),
    ("dtd", "dtd", 47, "validation[:200]", "test", 1880),
    ("flowers102", "oxford_flowers102", 102, "validation[:200]", "test", 6149),
    ("pets", "oxford_iiit_pet", 37, "train[2944:3144]", "test", 3669),
    ("sun397", "sun397/tfds", 397, "validation[:200]", "test", 21750),
    ("svhn", "svhn_cropped", 10, "train[65931:66131]", "test", 26032),
)
_VTAB_SPECIALIZED = (
    ("patch_camelyon", "patch_camelyon", 2, "validation[:200]", "test", 32768),
    ("eurosat", "eurosat/rgb", 10, "train[16200:16400]", "train[21600:]", 5400),
    ("resisc45", "resisc45", 45, "train[18900:19100]", "train[25200:]", 6300),
    (
        "diabetic_retinopathy",
        "diabetic_retinopathy_detection/btgraham-300",
        5,
        "validation[:200]",
        "test",
        42670,
    ),
)
# Splits that the tasks of a dataset share.
_CLEVR = ("train[63000:63200]", "validation", 15000)
_DSPRITES = ("train[589824:590024]", "train[663552:]", 73728)
_SMALLNORB = ("test[:200]", "test[12150:]", 12150)
_VTAB_STRUCTURED = (
    ("clevr_count", "clevr@count_all", 8, *_CLEVR),
    ("clevr_distance", "clevr@closest_object_distance", 6, *_CLEVR),
    ("dmlab", "dmlab", 6, "validation[:200]", "test", 22735),
    ("dsprites_position", "dsprites@x_position", 16, *_DSPRITES),
    ("dsprites_orientation", "dsprites@orientation", 16, *_DSPRITES),
    ("smallnorb_azimuth", "smallnorb@label_azimuth", 18, *_SMALLNORB),
    ("smallnorb_elevation", "smallnorb@label_elevation", 9, *_SMALLNORB),
    ("kitti_distance", "kitti@closest_vehicle_distance", 4, "validation[:200]", "test", 711),
)

VTAB_1K = tuple(
    FineTuneTask(
        name=name,
        dataset=dataset,
        num_classes=num_classes,
        sweep_train_split=_VTAB_SWEEP_TRAIN,
        sweep_val_split=val_split,
        train_split=f"{_VTAB_SWEEP_TRAIN}+{val_split}",
        test_split=test_split,
        num_examples=(800, 200, 1000, num_test),
        num_steps=2500,
        warmup_steps=500,
        learning_rates=(0.003, 0.01, 0.03),
        is_large_image=name not in _SMALL_IMAGES,
        train_crop="resize" if name in _NEVER_CROPPED else "random_crop",
        flip=name not in _NEVER_FLIPPED,
        eval_crop="resize",
        group=group,
        model_overrides={"vit": {"learning_rates": (0.01,), "image_size": 384}}
        | _bit_overrides(1_000, name not in _SMALL_IMAGES, cropped=name not in _NEVER_CROPPED),
    )
    for group, rows in (
        ("natural", _VTAB_NATURAL),
        ("specialized", _VTAB_SPECIALIZED),
        ("structured", _VTAB_STRUCTURED),
    )
    for name, dataset, num_classes, val_split, test_split, num_test in rows
)

SUITES = {
    suite.name: suite
    for suite in (
        Suite("avg5", "the paper's average of five tasks", AVG5, paper_column="avg5"),
        Suite("imagenet", "ImageNet, also with ReaL labels", (IMAGENET,)),
        Suite("vtab1k", "VTAB-1k, nineteen tasks of 1,000 images", VTAB_1K, paper_column="vtab"),
        Suite("digits", "digits 5-9, for a model trained on 0-4", DIGITS),
    )
}


def few_shot_suite(
    dataset: str,
    train_split: str,
    test_split: str,
    shots: tuple[int, ...],
    methods: tuple[str, ...],
) -> Suite:
    """Creates a suite of probes on any dataset (the paper plots 5 shots of ImageNet)."""
    probes = [
        ProbeTask(method, dataset, method, train_split, test_split, shots=shots)
        for method in methods
    ]
    return Suite("few_shot", f"probes on {dataset}", probes)
