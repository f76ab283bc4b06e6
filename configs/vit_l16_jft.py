"""ViT-L/16 on JFT-300M: 14 epochs at 224 px (arXiv 2010.11929, Table 3).

    python -m mixer_jax.main --config=configs/vit_l16_jft.py --config.dataset.name=YOUR_DATA

Paper:    85.63 % ImageNet top-1 after fine-tuning at 224 px, 87.76 % at 512 px (the Mixer
          paper, Table 3). The ViT paper also trains 7 epochs: --config.num_epochs=7
Here:     Not reproduced.
Hardware: 0.65k TPU v3 core-days (the Mixer paper).
Data:     JFT-300M is private to Google. Use this recipe for a large dataset of your own, prepared
          for TFDS as array_record; its numbers of classes and examples replace those below.
          Without data, to try or time the config: --config.dataset.name=synthetic
"""

from ml_collections import ConfigDict

from mixer_jax import config as config_lib


def get_config() -> ConfigDict:
    """Builds the config."""
    config = config_lib.get_default()
    config.num_epochs = 14.0
    config.model.family = "vit"
    config.model.variant = "L/16"
    config.model.pre_logits = True
    # As in the weights that the authors published, which are from ImageNet-21k.
    config.model.head_bias = -10.0

    config.dataset.name = "jft300m"
    config.dataset.num_classes = 18_291
    config.dataset.num_examples = 303_000_000
    # Halves the memory of activations without recomputing matmuls or sending gradients twice.
    config.recipe.grad_accum_steps = 2

    config.optimizer.learning_rate = 4e-4
    config.optimizer.weight_decay = 0.1
    # The paper clips gradients on ImageNet-1k only.
    config.optimizer.clip_norm = 0.0

    config.checkpoint.every_steps = 5_000
    return config
