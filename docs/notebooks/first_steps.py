# %% [markdown]
# # First steps
#
# Load a model, classify images, compute features, and look at what is inside. The notebook takes
# one to two minutes on two CPU cores.
#
# Install mixer_jax first, see [Getting started](../getting_started.md). On Colab, upload the wheel
# that `pip wheel --no-deps .` builds in a checkout, and run `!pip install mixer_jax-*.whl` in a
# cell of its own.
#
# **GPU or TPU.** Install the extra `cuda` or `tpu`, and run the same cells: JAX uses the devices
# that it finds. In Colab, choose a GPU or TPU with *Runtime → Change runtime type*. The next cell
# shows the devices.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

import mixer_jax

jax.devices()

# %% [markdown]
# ## Models
#
# These are the models of the paper, by name:

# %%
mixer_jax.list_models()

# %% [markdown]
# Published weights are loaded by the name of a file or of a repository on the Hugging Face Hub:
#
# ```python
# model = mixer_jax.load_pretrained("hf:timm/mixer_b16_224.goog_in21k_ft_in1k")
# ```
#
# That downloads 240 MB. Here, you train a small model instead, which takes seconds. Its data are
# 1,797 scans of handwritten digits that come with scikit-learn. `load_config` loads a recipe by
# name, and any key can be changed before training. With patches of 4 pixels, an image of 32 × 32
# pixels is a sequence of 64 tokens.

# %%
config = mixer_jax.load_config("digits")
config.model.patch_size = 4
config.model.num_blocks = 2
config.num_steps = 300
config.batch_size = 64
config.optimizer.warmup_steps = 50
config.log_every_steps = 100

result = mixer_jax.train(config, workdir="runs/first_steps")

# %% [markdown]
# `result.scores` has the metrics of the evaluation named `test`, on images that are not in the
# training data:

# %%
print(
    f"{result.scores['test'].top1:.1%} of {result.scores['test'].num_examples} images are correct"
)

# %% [markdown]
# ## Load
#
# A workdir is loaded like published weights:

# %%
model = mixer_jax.load_pretrained("runs/first_steps")
num_params = sum(array.size for array in jax.tree.leaves(model.params))
print(f"{model.model_info.name}: {num_params:,} parameters")

# %% [markdown]
# ## Predict
#
# `predict` takes paths, bytes, Pillow images and arrays of any size, resizes them as in training,
# and returns the most probable classes. These are the first ten scans, most of which were
# training data.

# %%
scans = load_digits()
# Gray levels from 0 to 16, as levels from 0 to 255.
images = np.round(scans.images * (255 / 16)).astype(np.uint8)
predictions = model.predict(images[:10, :, :, None].repeat(3, axis=3), topk=2)

figure, axes = plt.subplots(2, 5, figsize=(9, 4.2), layout="constrained")
for ax, image, prediction in zip(axes.flat, images, predictions, strict=False):
    best = prediction.classes[0]
    ax.imshow(image, cmap="gray")
    ax.set_title(f"{best.name}  {best.probability:.0%}")
    ax.axis("off")

# %% [markdown]
# ## Features
#
# With `num_classes=0`, a model has no head and returns the vector that the head would see.
# `preprocess` converts images to the pixels in [-1, 1] that a model takes.

# %%
encoder = mixer_jax.load_pretrained("runs/first_steps", num_classes=0)
pixels = encoder.preprocess(list(images))
features = np.concatenate([encoder(pixels[start : start + 256]) for start in range(0, 1797, 256)])
features.shape

# %% [markdown]
# Images of the same digit have similar features. For each query in the left column, this is a
# search for its nearest neighbors by cosine similarity, among all other images:

# %%
queries = [0, 13, 25, 38]
unit = features / np.linalg.norm(features, axis=1, keepdims=True)
similarity = unit[queries] @ unit.T
similarity[np.arange(len(queries)), queries] = -1  # A query is not its own neighbor.
neighbors = np.argsort(-similarity, axis=1)[:, :6]

figure, axes = plt.subplots(len(queries), 7, figsize=(9, 5.4), layout="constrained")
for row, query, found in zip(axes, queries, neighbors, strict=True):
    for ax, index in zip(row, [query, *found], strict=True):
        ax.imshow(images[index], cmap="gray")
        ax.set_title(
            "query" if index == query else f"{similarity[queries.index(query), index]:.2f}"
        )
        ax.axis("off")

# %% [markdown]
# ## Look inside
#
# `features` returns activations of any layer by name, and `layers` lists the names. Those of blocks
# have the shape (images, tokens, channels). Models are Flax modules, so that Flax's
# `model.apply(…, capture_intermediates=True)` works, too.

# %%
names = [name for name in model.layers if name.endswith(".channel_mixing")]
activations = model.features(list(images[:4]), names)
{name: array.shape for name, array in activations.items()}

# %% [markdown]
# The norm of what channel mixing adds to each token, as a picture of 8 × 8 tokens, shows where in
# the image each block works:

# %%
norms = np.linalg.norm(np.stack([activations[name] for name in names]), axis=-1)
num_blocks, num_images, num_tokens = norms.shape
figure, axes = plt.subplots(num_images, 1 + num_blocks, figsize=(5.4, 7), layout="constrained")
for index, row in enumerate(axes):
    row[0].imshow(images[index], cmap="gray")
    for block, ax in enumerate(row[1:]):
        ax.imshow(norms[block, index].reshape(8, 8))
        ax.set_title(f"block {block}")
for ax in axes.flat:
    ax.axis("off")

# %% [markdown]
# ## Token-mixing weights
#
# The first layer of token mixing has 32 hidden units. Each has one weight per token, so the
# weights of a unit are a picture, as in Figure 5 of the paper. Red is positive and blue is
# negative. After this short run, they still show their random initialization.

# %%
jax.tree.map(jnp.shape, model.params["blocks"]["token_mixing"])

# %%
kernel = np.asarray(model.params["blocks"]["token_mixing"]["Dense_0"]["kernel"][0])
limit = np.abs(kernel).max()
figure, axes = plt.subplots(4, 8, figsize=(9, 4.6), layout="constrained")
for ax, weights in zip(axes.flat, kernel.T, strict=True):
    ax.imshow(weights.reshape(8, 8), cmap="RdBu_r", vmin=-limit, vmax=limit)
    ax.axis("off")

# %% [markdown]
# ## Next
#
# - [Train on your own data](train_your_data.py), the second notebook.
# - [Python API](../reference/api.md) describes all functions.
