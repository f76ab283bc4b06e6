"""Tests of tables as lines of text and in Markdown."""

from mixer_jax.visualization.tables import align_columns, drop_empty_columns, markdown_lines

LINES = [["task", "top-1 %"], ["pets", "9.00"], ["flowers|102", "99.10"]]


def test_columns_are_aligned() -> None:
    assert align_columns(LINES) == [
        "task         top-1 %",
        "pets            9.00",
        "flowers|102    99.10",
    ]


def test_markdown_escapes_bars() -> None:
    assert markdown_lines(LINES) == [
        "| task | top-1 % |",
        "| --- | --- |",
        "| pets | 9.00 |",
        "| flowers\\|102 | 99.10 |",
    ]


def test_empty_columns_are_dropped() -> None:
    rows = [{"a": "1", "b": "", "c": ""}, {"a": "2", "b": "", "c": "3"}]
    assert drop_empty_columns(rows) == [["a", "c"], ["1", ""], ["2", "3"]]
