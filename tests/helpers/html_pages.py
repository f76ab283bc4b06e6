"""Checks of HTML pages that must stand alone."""

import html
import re
from html.parser import HTMLParser

_URL_ATTRIBUTES = {
    "action",
    "background",
    "cite",
    "data",
    "formaction",
    "href",
    "ping",
    "poster",
    "src",
    "srcset",
    "xlink:href",
}
_VOID = {"img", "link", "meta"}


class Page(HTMLParser):
    """HTML page, parsed; raises AssertionError if its elements are not nested properly.

    Attributes:
        elements: Name and attributes of every element, in order.
        text: Text that is shown, title included.
    """

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.text += data

    def attributes(self, tag: str, name: str) -> list[str]:
        """Lists the values of an attribute of all elements with a tag that have it."""
        elements = [attributes for found, attributes in self.elements if found == tag]
        return [attributes[name] for attributes in elements if name in attributes]


def visible_text(page: str) -> str:
    """Extracts the text of a page, with a space between elements."""
    return html.unescape(re.sub(r"<style>.*</style>|<[^>]+>", " ", page, flags=re.DOTALL))


def check_stands_alone(html: str) -> Page:
    """Checks that a page has no script and that opening it sends no request; returns it."""
    page = Page(html)
    assert html.startswith("<!DOCTYPE html>")
    for tag, attributes in page.elements:
        assert tag not in {"script", "iframe", "object", "embed", "base", "form"}
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            # An anchor leads to another part of the page.
            is_anchor = tag == "a" and value.startswith("#")
            assert name not in _URL_ATTRIBUTES or is_anchor or value.startswith("data:"), value
            assert "url(" not in value or name != "style", value
            assert name != "http-equiv" or value == "Content-Security-Policy"
    for style in re.findall(r"<style>.*?</style>", html, re.DOTALL):
        assert "url(" not in style
        assert "@import" not in style
    policies = [attributes for tag, attributes in page.elements if "http-equiv" in attributes]
    assert [policy["content"] for policy in policies] == [
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    ]
    return page
