"""HTML and SVG as text. All that is not `Markup` is escaped, so that text of a model or a file stays text."""

from __future__ import annotations

import html

VOID = {"meta", "link", "br", "hr", "img", "input"}
"""Elements of HTML without content or an end."""


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


Content = str | int | float | None
"""Content of an element: `Markup` as it is, anything else as escaped text, None as nothing."""


def escape(content: Content) -> Markup:
    """Returns content as markup."""
    if isinstance(content, Markup):
        return content
    return Markup("" if content is None else html.escape(number(content), quote=True))


def element(name: str, /, *content: Content, **attributes: Content | bool) -> Markup:
    """Returns an element of HTML or SVG.

    In names of attributes `_` stands for `-`, and one at the end falls away (`class_`). Those that are None or False
    are left out; True stands alone.
    """
    # 0 equals False, and is a value.
    kept = {key: value for key, value in attributes.items() if value is not None and value is not False}
    given = "".join(_attribute(key, value) for key, value in kept.items())
    if name in VOID:
        return Markup(f"<{name}{given}>")
    return Markup(f"<{name}{given}>{joined(*content)}</{name}>")


def joined(*content: Content) -> Markup:
    """Returns contents one after another."""
    return Markup("".join(map(escape, content)))


def number(value: Content) -> str:
    """Returns a number in at most two decimals, as coordinates of a drawing are; a text as it is."""
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return str(value)


def _attribute(key: str, value: Content | bool) -> str:
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{html.escape(number(value), quote=True)}"'
