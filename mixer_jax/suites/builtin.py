"""The suites that judge a checkpoint: the paper's, and one that needs no download.

Fine-tuning follows Section 3, Appendix A.2 and the protocol of arXiv 2010.11929, B.1.1, to which
they refer. A suite of your own is a Python file with a `SUITE` made of the same parts.
"""

from mixer_jax.suites.tasks import FineTuneTask, ProbeTask, Suite, Task
from mixer_jax.suites.vtab import VTAB_1K

IMAGENET = FineTuneTask(
    name="imagenet",
    dataset="imagenet2012",
    num_classes=1_000,
    choose_split="train[:99%]",
    validation_split="train[99%:]",
    train_split="train",
    test_split="validation",
    num_examples=(1_268_355, 12_812, 1_281_167, 50_000),
    num_steps=20_000,
    warmup_steps=500,
    large=True,
    also={"real": ("imagenet2012_real", "validation")},
    paper="imagenet",
)

AVG5 = (
    IMAGENET,
    FineTuneTask(
        name="cifar10",
        dataset="cifar10",
        num_classes=10,
        choose_split="train[:98%]",
        validation_split="train[98%:]",
        train_split="train",
        test_split="test",
        num_examples=(49_000, 1_000, 50_000, 10_000),
        num_steps=10_000,
        warmup_steps=500,
        large=False,
    ),
    FineTuneTask(
        name="cifar100",
        dataset="cifar100",
        num_classes=100,
        choose_split="train[:98%]",
        validation_split="train[98%:]",
        train_split="train",
        test_split="test",
        num_examples=(49_000, 1_000, 50_000, 10_000),
        num_steps=10_000,
        warmup_steps=500,
        large=False,
    ),
    FineTuneTask(
        name="pets",
        dataset="oxford_iiit_pet",
        num_classes=37,
        choose_split="train[:90%]",
        validation_split="train[90%:]",
        train_split="train",
        test_split="test",
        num_examples=(3_312, 368, 3_680, 3_669),
        num_steps=500,
        warmup_steps=100,
        large=True,
    ),
    FineTuneTask(
        name="flowers",
        dataset="oxford_flowers102",
        num_classes=102,
        # A tenth of the 2,040 images of both splits that are trained on in the end.
        choose_split="train[:90%]+validation[:90%]",
        validation_split="train[90%:]+validation[90%:]",
        train_split="train+validation",
        test_split="test",
        num_examples=(1_836, 204, 2_040, 6_149),
        num_steps=500,
        warmup_steps=100,
        large=True,
    ),
)

# The digits 5-9 for a model that was trained on 0-4. The protocol is the paper's, in miniature.
DIGITS: tuple[Task, ...] = (
    FineTuneTask(
        name="digits_5_to_9",
        dataset="digits/high",
        num_classes=5,
        choose_split="train[:90%]",
        validation_split="train[90%:]",
        train_split="train",
        test_split="test",
        num_examples=(656, 73, 729, 167),
        num_steps=300,
        warmup_steps=30,
        learning_rates=(0.03, 0.1, 0.3),
        batch_size=64,
        large=False,
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
            large=False,
            eval_crop="resize",
            beside_fresh=True,
        )
        for method in ("few_shot", "linear", "knn")
    ),
)

SUITES = {
    suite.name: suite
    for suite in (
        Suite("avg5", "the paper's mean over five tasks", AVG5, paper="avg5"),
        Suite("imagenet", "ImageNet, and ReaL's labels for it", (IMAGENET,)),
        Suite("vtab1k", "VTAB-1k's nineteen tasks of 1,000 images", VTAB_1K, paper="vtab"),
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
    """Returns a suite of probes on any data set (the paper plots 5 shots of ImageNet).

    Args:
        dataset: as `config.dataset.name`.
        train_split: in TFDS syntax; the probes learn from it.
        test_split: likewise.
        shots: images a class.
        methods: as `ProbeTask` has them.
    """
    probes = [
        ProbeTask(method, dataset, method, train_split, test_split, shots=shots)
        for method in methods
    ]
    return Suite("few_shot", f"probes on {dataset}", tuple(probes))
