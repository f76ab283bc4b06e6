"""Tests of the names of datasets."""

import pytest

from mixer_jax.data.names import split_label


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a/b.csv", ("a/b.csv", "")),
        ("a/b.csv@genus", ("a/b.csv", "genus")),
        ("a@home/b.csv", ("a@home/b.csv", "")),
        ("a@home/b.csv@genus", ("a@home/b.csv", "genus")),
        ("org/name@", ("org/name", "")),
    ],
)
def test_a_label_follows_the_last_at_sign(path: str, expected: tuple[str, str]) -> None:
    assert split_label(path) == expected
