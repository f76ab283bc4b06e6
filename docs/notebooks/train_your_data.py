# %% [markdown]
# # Train on your own data
#
# From a folder of images to a model that you can deploy: configure, look at a batch, train,
# continue, fine-tune at a higher resolution, evaluate, predict and save. The notebook takes one
# to two minutes on two CPU cores.
#
# Install mixer_jax first, see [Getting started](../getting_started.md). On Colab, upload the wheel
# that `pip wheel --no-deps .` builds in a checkout, and run `!pip install mixer_jax-*.whl` in a
# cell of its own.
#
# **GPU or TPU.** Install the extra `cuda` or `tpu`, and run the same cells. A batch is sharded
# over all devices that JAX finds, such as the eight cores of Colab's TPU v2 runtime or the one of
# v5e, so `config.batch_size` must be a multiple of their number. Accelerators are made for larger
# models: start from `mixer_jax.load_config("folder:photos")`, which trains Mixer-S/16 at 224
# pixels.

# %%
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from safetensors.numpy import load_file
from sklearn.datasets import load_digits

import mixer_jax

jax.devices()

# %% [markdown]
# ## A folder of images
#
# mixer_jax reads a folder with one directory per class. Here, the images are the handwritten
# digits that come with scikit-learn, as PNG files. To use your own, skip this cell and set
# `folder` to their path.

# %%
folder = Path("images")
scans = load_digits()
for index, (scan, label) in enumerate(zip(scans.images, scans.target, strict=True)):
    path = folder / str(label) / f"{index:04}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.round(scan * (255 / 16)).astype(np.uint8)).save(path)

sorted(f"{path.name}: {len(list(path.iterdir()))} images" for path in folder.iterdir())

# %% [markdown]
# ## Configure
#
# The config `folder` trains a small Mixer on small pictures. A tenth of each class is held out as
# the split `validation`, unless the folder has directories `train` and `validation` of its own.
# Every [key](../reference/config.md) can be changed; the run is short, so that it takes seconds.

# %%
config = mixer_jax.load_config("folder")
config.dataset.name = f"folder:{folder}"
config.num_steps = 200
config.batch_size = 64
config.optimizer.warmup_steps = 50
config.log_every_steps = 50
config.checkpoint.every_steps = 100
config.evals.validation.every_steps = 100

# %% [markdown]
# ## Look at a batch
#
# Before you train, look at what the model will see: images are shifted at random, and mixup
# blends pairs of them. The weight of each class is next to its name.

# %%
mixer_jax.plot_batch(config, num_images=8)

# %% [markdown]
# ## Train
#
# Everything that a run writes is in its workdir. To stop it early, interrupt the cell: it saves a
# checkpoint first. Run the cell again to resume from there; the result is bit-identical to that
# of an uninterrupted run.

# %%
result = mixer_jax.train(config, workdir="runs/mine")
print(result.scores["validation"].format_summary())

# %%
mixer_jax.plot_curves("runs/mine")

# %% [markdown]
# ## Continue
#
# A finished run is evaluated again if you start it once more. To train for longer, start a new
# run from its weights. `init_from` names a checkpoint: a workdir, a file or `hf:OWNER/NAME`, so
# the same lines fine-tune published weights.

# %%
longer = config.copy_and_resolve_references()
longer.init_from = "runs/mine"
longer.num_steps = 100
longer.optimizer.learning_rate = 1e-3
longer.optimizer.warmup_steps = 10

result = mixer_jax.train(longer, workdir="runs/longer")

# %% [markdown]
# ## Fine-tune at a higher resolution
#
# At twice the image size there are four times as many patches. The token-mixing weights are tiled
# for them, as in Appendix C of the paper: at first, the model sees each quarter of an image on
# its own, and fine-tuning adapts it to whole images. Photographs gain accuracy from a higher
# resolution. These scans of 8 × 8 pixels have no more detail to show.

# %%
larger = longer.copy_and_resolve_references()
larger.init_from = "runs/longer"
larger.image_size = 64
larger.num_steps = 80
larger.optimizer.learning_rate = 3e-3
larger.preprocess.max_shift = 8

result = mixer_jax.train(larger, workdir="runs/larger")

# %% [markdown]
# ## Evaluate
#
# `evaluate` counts every image of a split exactly once.

# %%
for workdir in ("runs/mine", "runs/longer", "runs/larger"):
    metrics = mixer_jax.load_pretrained(workdir).evaluate(f"folder:{folder}", split="validation")
    print(f"{workdir:12} {metrics.format_summary()}")

# %% [markdown]
# ## Predict
#
# The names of classes are those of the directories; they are stored in the checkpoint with the
# preprocessing.

# %%
model = mixer_jax.load_pretrained("runs/larger")
paths = [next(path.iterdir()) for path in sorted(folder.iterdir())]

figure, axes = plt.subplots(2, 5, figsize=(9, 4.2), layout="constrained")
for ax, path, prediction in zip(axes.flat, paths, model.predict(paths), strict=True):
    best = prediction.classes[0]
    ax.imshow(Image.open(path), cmap="gray")
    ax.set_title(f"{best.name}  {best.probability:.0%}")
    ax.axis("off")

# %% [markdown]
# ## Save for deployment
#
# `export` writes the model in another format, reads it back and compares. The suffix selects the
# format: `.safetensors` is for timm and the Hugging Face Hub, `.npz` for Google's code, and
# `.stablehlo` is a program for CPUs, GPUs and TPUs.

# %%
model.export("mine.stablehlo")

# %% [markdown]
# The program needs JAX and safetensors, but not mixer_jax, and takes any number of images:

# %%
program = jax.export.deserialize(bytearray(Path("mine.stablehlo").read_bytes()))
weights = load_file("mine.stablehlo.safetensors")
logits = program.call(weights, model.preprocess(paths))
print(np.argmax(logits, axis=1))

# %% [markdown]
# ## Next
#
# - [First steps](first_steps.py), the first notebook, looks inside a model.
# - [Config keys](../reference/config.md) lists everything that can be configured.
