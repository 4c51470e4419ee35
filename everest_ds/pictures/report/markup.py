"""Elements of HTML, as text: what is not markup already is escaped, so that no name of a file can become markup."""

import html

from everest_ds.errors import escaped

LONGEST_TEXT = 600
"""Characters of a text that are shown; foreign files may hold any number."""
_VOID = frozenset({"img", "input", "link", "meta"})


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def shown(text: str) -> str:
    """Return a text as it can be printed, cut where it is very long."""
    cut = text if len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 1]}…"
    return escaped(cut)


def element(tag: str, *children: str | None, **attributes: str | float | bool | None) -> Markup:
    """Return an element.

    Args:
        tag: Its name.
        children: Markup as it is; other texts are escaped; None is left out.
        attributes: A trailing underscore is dropped, the others become hyphens. True stands alone; None and False
            are left out.
    """
    inner = "".join(
        child if isinstance(child, Markup) else html.escape(shown(child)) for child in children if child is not None
    )
    named = "".join(map(_attribute, attributes.items()))
    return Markup(f"<{tag}{named}>" if tag in _VOID else f"<{tag}{named}>{inner}</{tag}>")


def joined(parts: "list[Markup]") -> Markup:
    """Return elements one after the other, a line each."""
    return Markup("\n".join(parts))


def preformatted(text: str) -> Markup:
    """Return a text of several lines as it is."""
    lines = "\n".join(html.escape(shown(line)) for line in text.split("\n"))
    return element("pre", Markup(lines))


def _attribute(item: tuple[str, str | float | bool | None]) -> str:
    name, value = item[0].rstrip("_").replace("_", "-"), item[1]
    if value is None or value is False:
        return ""
    return f" {name}" if value is True else f' {name}="{html.escape(escaped(str(value)))}"'
