"""Fine-tuning of a ViT by the protocol of its authors (arXiv 2010.11929, B.1.1).

    python -m mixer_jax.main --config=configs/finetune_vit.py:cifar10
    python -m mixer_jax.main --config=finetune_vit:imagenet --config.init_from=ViT-L_16.npz

Paper:    From ImageNet-21k at 384 px (Table 5), ImageNet, CIFAR-10, CIFAR-100, Pets and Flowers:
          B/16 83.97, 98.95, 91.67, 94.43, 99.38 %; L/16 85.15, 99.16, 93.44, 94.73, 99.61 %.
          The Mixer paper's Table 2: L/16 85.30 % on ImageNet at 512 px with averaged parameters
          (--config.image_size=512 --config.recipe.ema_decay=0.9999), H/14 from JFT-300M 88.55 % at
          518 px.
Here:     Not reproduced.
Task:     imagenet, cifar10, cifar100, pets or flowers.
Size:     384 px; --config.image_size takes any multiple of the patch size.
Weights:  init_from names a workdir, a file or hf:OWNER/NAME and sets the architecture. A hidden
          layer before the pretrained head is replaced with it.
Crops:    As in the authors' code: Inception crops of 5 to 100 % of the area, and evaluation of
          whole images, resized to a square.
Tuning:   The paper chose the learning rate from 0.003, 0.01 and 0.03 for ImageNet, and from 0.001,
          0.003, 0.01 and 0.03 for the other tasks, on a part of the training images. AugReg weights
          were fine-tuned with 0.01 or 0.03 on ImageNet, and 0.001, 0.003 or 0.01 elsewhere.
          The authors' code has dropout of 0.1 for L/16 and H/14 (--config.model.dropout=0.1).
"""

from ml_collections import ConfigDict

from mixer_jax import config as config_lib
from mixer_jax.errors import UserError

# Dataset, training split, training images, classes, evaluation split, steps, warmup.
TASKS = {
    "imagenet": ("imagenet2012", "train", 1_281_167, 1_000, "validation", 20_000, 500),
    "cifar10": ("cifar10", "train", 50_000, 10, "test", 10_000, 500),
    "cifar100": ("cifar100", "train", 50_000, 100, "test", 10_000, 500),
    "pets": ("oxford_iiit_pet", "train", 3_680, 37, "test", 500, 100),
    "flowers": ("oxford_flowers102", "train+validation", 2_040, 102, "test", 500, 100),
}


def get_config(task: str = "imagenet") -> ConfigDict:
    """Builds the config.

    Args:
        task: "imagenet", "cifar10", "cifar100", "pets" or "flowers".
    """
    if task not in TASKS:
        raise UserError(f"argument must be one of {', '.join(TASKS)}, got {task!r}.")
    dataset, train_split, num_examples, num_classes, eval_split, steps, warmup = TASKS[task]
    config = config_lib.get_default()
    config.num_steps = steps
    config.batch_size = 512
    config.eval_batch_size = 512
    config.image_size = 384
    config.init_from = "gs://vit_models/imagenet21k/ViT-B_16.npz"
    config.init_head = "new"
    config.model.family = "vit"
    config.model.variant = "init_from"

    config.dataset.name = dataset
    config.dataset.train_split = train_split
    config.dataset.num_classes = num_classes
    config.dataset.num_examples = num_examples
    config.preprocess.train_crop = "inception"
    config.preprocess.eval_crop = "resize"

    config.recipe.loss = "softmax"
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.01
    config.optimizer.warmup_steps = warmup
    config.optimizer.decay_type = "cosine"

    config.evals = config_lib.evals(test={"split": eval_split, "every_steps": steps // 4})
    return config
