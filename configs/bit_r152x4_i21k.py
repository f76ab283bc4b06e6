"""BiT-R152x4 on ImageNet-21k (BiT-M): 90 epochs at 224 px (arXiv 1912.11370, Section 3.3).

    python -m mixer_jax.main --config=configs/bit_r152x4_i21k.py --workdir=gs://BUCKET/bit_r152x4_i21k

Paper:    85.39 % ImageNet top-1 after fine-tuning at 480 px (the Mixer paper, Table 2).
Here:     Not reproduced.
Hardware: 0.94k TPU v3 core-days (the Mixer paper, Table 2).
Data:     Download ImageNet-21k to DATA_DIR/downloads/manual, then run once
          python -m mixer_jax.prepare imagenet21k --data_dir=DATA_DIR
          Without data, to try or time the config: --config.dataset.name=synthetic
"""

from ml_collections import ConfigDict

from mixer_jax import config as config_lib


def get_config() -> ConfigDict:
    """Builds the config."""
    config = config_lib.get_default()
    config.num_epochs = 90.0
    config.model.family = "bit"
    config.model.variant = "R152x4"

    config.dataset.name = "imagenet21k"
    config.dataset.train_split = "train[:99%]"
    config.dataset.num_classes = 21_843
    config.dataset.num_examples = 14_055_151

    # 0.03 per 256 images. The paper's weight decay of 1e-4 is part of the gradient; with momentum
    # 0.9 it shrinks weights like this one, which is multiplied by the learning rate.
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.48
    config.optimizer.weight_decay = 1e-3
    config.optimizer.warmup_steps = 5_000
    config.optimizer.decay_type = "staircase"
    config.optimizer.decay_points = "30/90,60/90,80/90"
    config.optimizer.clip_norm = 0.0

    config.checkpoint.every_steps = 5_000
    config.evals = config_lib.evals(minival={"split": "train[99%:]", "every_steps": 20_000})
    return config
