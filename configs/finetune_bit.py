"""Fine-tuning of a BiT-ResNet by BiT-HyperRule (arXiv 1912.11370, Section 3.3).

    python -m mixer_jax.main --config=configs/finetune_bit.py:cifar10
    python -m mixer_jax.main --config=finetune_bit:pets,480 --config.init_from=BiT-M-R152x4.npz

Paper:    R152x4 from ImageNet-21k (BiT-M): ImageNet 85.39 %, CIFAR-10 98.91 %, CIFAR-100 92.17 %,
          Pets 94.46 %, Flowers 99.30 %; median of three runs. The authors' code reports 80.68 % on
          ImageNet for R50x1 at 480 px. The Mixer paper's Table 2 has R152x4.
Here:     Not reproduced.
Task:     imagenet, cifar10, cifar100, pets or flowers. `,480` shows large images at 480 instead of
          384 px, as the paper does for R152x4. For another size, also set the size before the
          random crop, or 0 for 8/7: --config.image_size=224 --config.preprocess.resize_size=0
Weights:  init_from names a workdir, a file or hf:OWNER/NAME and sets the architecture.
Tuning:   None: the rule sets everything from the number of training images and their area.
"""

from ml_collections import ConfigDict

from mixer_jax import config as config_lib
from mixer_jax.config.hyperrule import bit_hyperrule
from mixer_jax.errors import UserError

# Dataset, training split, training images, classes, typical area of an image, evaluation split.
TASKS = {
    "imagenet": ("imagenet2012", "train", 1_281_167, 1_000, 400 * 350, "validation"),
    "cifar10": ("cifar10", "train", 50_000, 10, 32 * 32, "test"),
    "cifar100": ("cifar100", "train", 50_000, 100, 32 * 32, "test"),
    "pets": ("oxford_iiit_pet", "train", 3_680, 37, 400 * 350, "test"),
    "flowers": ("oxford_flowers102", "train+validation", 2_040, 102, 500 * 600, "test"),
}
SIZES = ("384", "480")


def get_config(argument: str = "imagenet") -> ConfigDict:
    """Builds the config.

    Args:
        argument: Task, and optionally the size of large images: "pets" or "pets,480".
    """
    task, _, size = argument.partition(",")
    if task not in TASKS or (size or "384") not in SIZES:
        raise UserError(
            f"argument must be one of {', '.join(TASKS)}, optionally with ,384 or ,480, "
            f"got {argument!r}."
        )
    dataset, train_split, num_examples, num_classes, image_area, eval_split = TASKS[task]
    config = config_lib.get_default()
    config.eval_batch_size = 512
    config.init_from = "gs://bit_models/BiT-M-R50x1.npz"
    config.init_head = "new"
    config.model.family = "bit"
    config.model.variant = "init_from"

    config.dataset.name = dataset
    config.dataset.train_split = train_split
    config.dataset.num_classes = num_classes
    config.dataset.num_examples = num_examples

    rule = bit_hyperrule(num_examples, image_area, int(size or "384"))
    config.update_from_flattened_dict(rule)

    config.evals = config_lib.evals(
        test={"split": eval_split, "every_steps": rule["num_steps"] // 4}
    )
    return config
