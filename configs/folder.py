"""Training on your own folder of images, with one directory per class.

    python -m mixer_jax.main --config=configs/folder.py --config.dataset.name=folder:PATH
    python -m mixer_jax.main --config=configs/folder.py:photos --config.dataset.name=folder:PATH

Data:   PATH has train/ and validation/ (or valid/, val/, test/), each with one directory per class.
        If PATH has the class directories themselves, a tenth of every class is held out.
small:  For small pictures such as letters and symbols: 32 px, a small Mixer, minutes on a laptop.
        Measured on the digits of configs/digits.py as PNG files: 99.4 % top-1 (358 of 360).
photos: For photographs: 224 px, Mixer-S/16, on an accelerator, with the paper's recipe for
        ImageNet-1k. Not measured. With fewer than 100,000 photographs, start from pretrained
        weights with --config.init_from. With fewer than about 1,700, 300 epochs are shorter than
        the warmup: lower --config.optimizer.warmup_steps as well.
"""

from ml_collections import ConfigDict

from mixer_jax import config as config_lib
from mixer_jax.errors import UserError

PRESETS = ("small", "photos")


def get_config(preset: str = "small") -> ConfigDict:
    """Builds the config.

    Args:
        preset: "small" or "photos".
    """
    if preset not in PRESETS:
        raise UserError(f"argument must be {' or '.join(PRESETS)}, got {preset!r}.")
    config = config_lib.get_default()
    config.dataset.name = "folder:images"
    config.optimizer.weight_decay = 0.1
    if preset == "small":
        config.num_steps = 1_200
        config.batch_size = 128
        config.eval_batch_size = 512
        config.image_size = 32
        config.model.variant = "custom"
        config.model.num_blocks = 4
        config.model.patch_size = 8
        config.model.hidden_dim = 64
        config.model.tokens_mlp_dim = 32
        config.model.channels_mlp_dim = 256
        config.preprocess.train_crop = "random_shift"
        config.preprocess.max_shift = 4
        config.preprocess.flip = False
        config.preprocess.eval_crop = "resize"
        config.recipe.loss = "softmax"
        config.recipe.mixup = 0.2
        config.optimizer.learning_rate = 3e-3
        config.optimizer.warmup_steps = 100
        config.optimizer.decay_type = "cosine"
        config.checkpoint.every_steps = 300
        config.evals = config_lib.evals(validation={"split": "validation", "every_steps": 300})
    else:
        config.num_epochs = 300.0
        config.batch_size = 1024
        config.model.variant = "S/16"
        config.model.stochastic_depth = 0.1
        config.model.head_bias = -6.9
        config.preprocess.randaugment_layers = 2
        config.preprocess.randaugment_magnitude = 15.0
        config.preprocess.exif_orientation = True
        config.recipe.mixup = 0.5
        config.optimizer.warmup_steps = 500
        config.evals = config_lib.evals(validation={"split": "validation", "every_steps": 1_000})
    return config
