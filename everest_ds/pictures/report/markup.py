"""Build HTML elements. Every text that is not `Markup` is escaped, so file names cannot inject HTML."""

import html

from everest_ds.errors import escaped

LONGEST_TEXT = 600
"""Characters shown of a text; texts in foreign files may be of any length."""
_VOID = frozenset({"img", "input", "link", "meta"})


class Markup(str):
    """Text that is already HTML and is not escaped again."""

    __slots__ = ()


def shown(text: str) -> str:
    """Return a text with unprintable characters escaped, cut to `LONGEST_TEXT`."""
    cut = text if len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 1]}…"
    return escaped(cut)


def element(tag: str, *children: str | None, **attributes: str | float | bool | None) -> Markup:
    """Return an HTML element.

    Args:
        tag: Name of the element.
        children: Its content: `Markup` is kept, other texts are escaped, None is left out.
        attributes: Attributes by name: a trailing underscore is dropped, other underscores become hyphens. True
            gives an attribute without a value; None and False are left out.
    """
    inner = "".join(
        child if isinstance(child, Markup) else html.escape(shown(child)) for child in children if child is not None
    )
    named = "".join(map(_attribute, attributes.items()))
    return Markup(f"<{tag}{named}>" if tag in _VOID else f"<{tag}{named}>{inner}</{tag}>")


def joined(parts: "list[Markup]") -> Markup:
    """Join elements, one a line."""
    return Markup("\n".join(parts))


def preformatted(text: str) -> Markup:
    """Return a `pre` element that keeps the lines of a text."""
    lines = "\n".join(html.escape(shown(line)) for line in text.split("\n"))
    return element("pre", Markup(lines))


def _attribute(item: tuple[str, str | float | bool | None]) -> str:
    name, value = item[0].rstrip("_").replace("_", "-"), item[1]
    if value is None or value is False:
        return ""
    return f" {name}" if value is True else f' {name}="{html.escape(escaped(str(value)))}"'
