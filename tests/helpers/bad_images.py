"""Reasons of the decoder for rejecting images."""

import pytest

from mixer_jax.data.decode import BadImageError, decode


def reason_of(encoded: bytes) -> str:
    """Returns the reason for which the decoder rejects an encoded image."""
    with pytest.raises(BadImageError) as caught:
        decode(encoded)
    return caught.value.reason
