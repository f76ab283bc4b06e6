"""What a step needs at the least, by formula: FLOPs, and bytes to and from memory, part by part.

How many bytes depends on how much the chip does between one write and the next, so there are two
floors:

- `apart`: every matrix product reads its operands and writes its result once, and all else is done
  on the way: LayerNorm and GELU while operands are read, what is added or multiplied while results
  are written. Hidden units are written before GELU, and read once more for its derivative. Programs
  may do better, where the result of one product is still on the chip when the next reads it.
- `fused`: hidden units never leave the chip. The backward pass goes once over the input of an MLP,
  makes its hidden units again, and all four gradients of them: seven products instead of six.
"""

import math
from typing import NamedTuple

from mixer_jax.models.mixer_config import MixerConfig, num_tokens, param_shapes
from mixer_jax.planning.hlo.attribution import (
    CHANNEL_MIXING,
    HEAD,
    OPTIMIZER,
    REGIONS,
    STEM,
    TOKEN_MIXING,
)

_FLOAT32 = 4
# Adam reads parameters, two moments and, for clipping by their norm, gradients twice; it writes all
# but the gradients.
_ADAM = 8
# Parts by what is in the paths of their parameters.
_NAMES = {
    STEM: "stem/",
    TOKEN_MIXING: "/token_mixing/",
    CHANNEL_MIXING: "/channel_mixing/",
    HEAD: "head/",
}


class Traffic(NamedTuple):
    """What one part of a step needs for an image.

    Attributes:
        flops: of matrix products, a multiplication and its addition being two.
        apart: bytes, where every product is for itself.
        fused: bytes, where hidden units stay on the chip.
        flops_fused: FLOPs then, with what is made again.
    """

    flops: float
    apart: float
    fused: float
    flops_fused: float


class StepSpec(NamedTuple):
    """A step on one device.

    Attributes:
        widths: of the model.
        image_size: pixels.
        num_classes: of the head.
        batch_size: images, which share what parameters and optimizer take.
        itemsize: bytes of a number of the computation. Kernels are read in that type, once for each
            product, those of the head in float32; their gradients are written in float32.
        training: whether it trains, with Adam and clipping, or only infers.
    """

    widths: MixerConfig
    image_size: int
    num_classes: int
    batch_size: int
    itemsize: int = 2
    training: bool = True

    @property
    def tokens(self) -> int:
        """Number of tokens of an image."""
        return num_tokens(self.widths, self.image_size)

    @property
    def x(self) -> int:
        """Bytes of an image's tokens."""
        return self.tokens * self.widths.hidden_dim * self.itemsize

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters, by path."""
        return param_shapes(self.widths, self.tokens, self.num_classes)

    def kernels(self, part: str) -> int:
        """Returns the number of elements of a part's kernels, of all blocks together."""
        name = _NAMES[part]
        return sum(
            math.prod(shape)
            for path, shape in self.shapes.items()
            if path.endswith("kernel") and name in path
        )

    def kernel_bytes(self, part: str, reads: int) -> float:
        """Returns the bytes an image of reading a part's kernels, and of writing their gradients.

        Args:
            part: that has them.
            reads: products that read each.
        """
        itemsize = _FLOAT32 if part == HEAD else self.itemsize
        each = reads * itemsize + (_FLOAT32 if self.training else 0)
        return self.kernels(part) * each / self.batch_size


def estimate_traffic(work: StepSpec) -> dict[str, Traffic]:
    """Returns what an image needs, by part as `planning.parts` names them; every part is there."""
    needs = dict.fromkeys(REGIONS, _alike(0.0, 0.0))
    # Nobody asks for the gradient of pixels, which are bytes.
    products = 2 if work.training else 1
    stem = products * (3 * work.image_size**2 + work.x) + work.kernel_bytes(STEM, 1)
    needs[STEM] = _alike(2 * products * work.kernels(STEM) * work.tokens, stem)
    needs[TOKEN_MIXING] = _mlps(work, TOKEN_MIXING)
    needs[CHANNEL_MIXING] = _mlps(work, CHANNEL_MIXING)
    # The last LayerNorm and the mean read all tokens; backward they read them again, and write.
    products = 3 if work.training else 1
    head = products * work.x + work.kernel_bytes(HEAD, 2 if work.training else 1)
    needs[HEAD] = _alike(2 * products * work.kernels(HEAD), head)
    if work.training:
        parameters = sum(map(math.prod, work.shapes.values()))
        needs[OPTIMIZER] = _alike(0.0, _ADAM * _FLOAT32 * parameters / work.batch_size)
    return needs


def _mlps(work: StepSpec, part: str) -> Traffic:
    """Returns what the MLPs of one kind need in all blocks."""
    widths, is_token = work.widths, part == TOKEN_MIXING
    # A token-mixing MLP maps each channel, one of channel mixing each token.
    vectors = widths.hidden_dim if is_token else work.tokens
    hidden = vectors * (widths.tokens_mlp_dim if is_token else widths.channels_mlp_dim)
    x, hidden = widths.num_blocks * work.x, widths.num_blocks * hidden * work.itemsize
    forward = 2.0 * work.kernels(part) * vectors
    if not work.training:
        # In, the residual, out; hidden units out and in.
        apart = 3 * x + 2 * hidden + work.kernel_bytes(part, 1)
        return Traffic(forward, apart, 2 * x + work.kernel_bytes(part, 1), forward)
    # Backward, the gradient of what came out is read by two products and the residual, what went in
    # by one product and LayerNorm, and its gradient is written: six arrays. Hidden units are read
    # by one product and for the derivative of GELU; their gradient is written, and read by two.
    apart = (3 + 6) * x + (2 + 5) * hidden + work.kernel_bytes(part, 2)
    # Backward, two arrays come in and one goes out.
    fused = (2 + 3) * x + work.kernel_bytes(part, 2)
    return Traffic(3 * forward, apart, fused, 3 * forward * 7 / 6)


def _alike(flops: float, num_bytes: float) -> Traffic:
    """Returns the need of a part that has no hidden units."""
    return Traffic(flops, num_bytes, num_bytes, flops)
