"""What the decoder says of an image that it refuses."""

import pytest

from mixer_jax.data.decode import BadImageError, decode


def reason_of(encoded: bytes) -> str:
    """Returns why these bytes are refused."""
    with pytest.raises(BadImageError) as caught:
        decode(encoded)
    return caught.value.reason
