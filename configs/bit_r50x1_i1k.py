"""BiT-R50x1 on ImageNet-1k (BiT-S): 90 epochs at 224 px (arXiv 1912.11370, Section 3.3).

    python -m mixer_jax.main --config=configs/bit_r50x1_i1k.py --workdir=gs://BUCKET/bit_r50x1_i1k

Paper:    Not stated in the paper for this model.
Here:     Not reproduced.
Hardware: 512 TPU v3 cores, 8 images each (paper).
Data:     imagenet2012 of TFDS.
          Without data, to try or time the config: --config.dataset.name=synthetic
"""

from ml_collections import ConfigDict

from mixer_jax import config as config_lib


def get_config() -> ConfigDict:
    """Builds the config."""
    config = config_lib.get_default()
    config.num_epochs = 90.0
    config.model.family = "bit"
    config.model.variant = "R50x1"

    config.dataset.name = "imagenet2012"
    config.dataset.num_classes = 1_000
    config.dataset.num_examples = 1_281_167

    # 0.03 per 256 images. The paper's weight decay of 1e-4 is part of the gradient; with momentum
    # 0.9 it shrinks weights like this one, which is multiplied by the learning rate.
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.48
    config.optimizer.weight_decay = 1e-3
    config.optimizer.warmup_steps = 5_000
    config.optimizer.decay_type = "staircase"
    config.optimizer.decay_points = "30/90,60/90,80/90"
    config.optimizer.clip_norm = 0.0

    config.evals = config_lib.evals(val={"split": "validation", "every_steps": 5_000})
    return config
