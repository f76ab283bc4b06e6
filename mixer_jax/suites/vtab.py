"""VTAB-1k as data: 19 tasks of 1,000 training images each (arXiv 1910.04867).

Where the constants come from:

- Data sets, labels, numbers of classes and splits: the code of VTAB's authors, google-research/
  task_adaptation, task_adaptation/data/*.py: 800 images to choose by, 200 to validate, and both to
  train the final run; "validation" is a later part of the training data where TFDS has no such
  split (of smallnorb: the first half of its test data), and the test data are whole.
- Numbers of examples: the catalog of TFDS (tensorflow.org/datasets/catalog). Slices that VTAB
  computes from them, such as the last tenth of the training data, are written out.
- Steps, warmup and learning rates: the Mixer paper, Section 3 and Appendix A.2.
- Crops and mirroring: BiT (arXiv 1912.11370), Section 3.3 and Appendix F, which the ViT paper
  follows for VTAB (arXiv 2010.11929, Appendix B.1.1), whose protocol is the Mixer paper's: training
  images are resized, cropped at random and mirrored, but where that changes the answer; test images
  are resized and nothing else. BiT's list is short: house numbers are mirrored too.
- Large images: BiT, Section 3.3: those whose area is not smaller than 96 × 96 px.
"""

from mixer_jax.suites.tasks import FineTuneTask

_CHOOSE = "train[:800]"
# Appendix F of BiT: not invariant to being mirrored, or to losing what stands at the edge.
_NEVER_MIRRORED = {"dsprites_orientation", "dsprites_position", "smallnorb_azimuth"}
_NEVER_CROPPED = {
    "clevr_count",
    "clevr_distance",
    "dmlab",
    "dsprites_position",
    "kitti_distance",
}
# Of 32 or 64 px.
_SMALL = {"cifar100", "svhn", "eurosat", "dsprites_orientation", "dsprites_position"}

# Name, data set, classes, validation and test split, number of test images.
_TABLE = {
    "natural": (
        ("caltech101", "caltech101", 102, "train[2754:2954]", "test", 6084),
        ("cifar100", "cifar100", 100, "train[45000:45200]", "test", 10000),
        ("dtd", "dtd", 47, "validation[:200]", "test", 1880),
        ("flowers102", "oxford_flowers102", 102, "validation[:200]", "test", 6149),
        ("pets", "oxford_iiit_pet", 37, "train[2944:3144]", "test", 3669),
        ("sun397", "sun397/tfds", 397, "validation[:200]", "test", 21750),
        ("svhn", "svhn_cropped", 10, "train[65931:66131]", "test", 26032),
    ),
    "specialised": (
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
    ),
    "structured": (
        ("clevr_count", "clevr@count_all", 8, "train[63000:63200]", "validation", 15000),
        (
            "clevr_distance",
            "clevr@closest_object_distance",
            6,
            "train[63000:63200]",
            "validation",
            15000,
        ),
        ("dmlab", "dmlab", 6, "validation[:200]", "test", 22735),
        (
            "dsprites_position",
            "dsprites@x_position",
            16,
            "train[589824:590024]",
            "train[663552:]",
            73728,
        ),
        (
            "dsprites_orientation",
            "dsprites@orientation",
            16,
            "train[589824:590024]",
            "train[663552:]",
            73728,
        ),
        ("smallnorb_azimuth", "smallnorb@label_azimuth", 18, "test[:200]", "test[12150:]", 12150),
        (
            "smallnorb_elevation",
            "smallnorb@label_elevation",
            9,
            "test[:200]",
            "test[12150:]",
            12150,
        ),
        ("kitti_distance", "kitti@closest_vehicle_distance", 4, "validation[:200]", "test", 711),
    ),
}


def _task(
    group: str, name: str, dataset: str, num_classes: int, validation: str, test: str, num_test: int
) -> FineTuneTask:
    return FineTuneTask(
        name=name,
        dataset=dataset,
        num_classes=num_classes,
        choose_split=_CHOOSE,
        validation_split=validation,
        train_split=f"{_CHOOSE}+{validation}",
        test_split=test,
        num_examples=(800, 200, 1000, num_test),
        num_steps=2500,
        warmup_steps=500,
        learning_rates=(0.003, 0.01, 0.03),
        large=name not in _SMALL,
        train_crop="resize" if name in _NEVER_CROPPED else "random_crop",
        flip=name not in _NEVER_MIRRORED,
        eval_crop="resize",
        group=group,
    )


VTAB_1K: tuple[FineTuneTask, ...] = tuple(
    _task(group, *row) for group, rows in _TABLE.items() for row in rows
)
