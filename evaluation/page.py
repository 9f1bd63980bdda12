"""The few pieces of HTML that a report is made of. Every text is escaped here, so callers pass plain text."""

import html
import pathlib
from collections.abc import Sequence

STYLE = pathlib.Path(__file__).with_name("report.css")


class Html(str):
    """Text that is HTML already."""


def text(value: object) -> Html:
    """`value` as HTML: escaped unless it is HTML already."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def element(tag: str, *children: object, **attributes: str) -> Html:
    """`<tag ...>children</tag>`; the attribute `kind` is written as `class`."""
    shown = "".join(
        f' {"class" if name == "kind" else name.replace("_", "-")}="{html.escape(value)}"'
        for name, value in attributes.items()
        if value
    )
    return Html(f"<{tag}{shown}>{''.join(text(child) for child in children)}</{tag}>")


def section(title: str, *children: object, note: str = "") -> Html:
    """A titled block of the page."""
    about = [element("p", note, kind="note")] if note else []
    return element("section", element("h2", title), *about, *children)


def figure(picture: str, caption: str = "", kind: str = "") -> Html:
    """A picture, given as HTML, with a caption."""
    return element("figure", Html(picture), *([element("figcaption", caption)] if caption else []), kind=kind)


def image(url: str, description: str) -> Html:
    """An inlined picture."""
    return Html(f'<img src="{url}" alt="{html.escape(description)}">')


def table(
    header: Sequence[object], rows: Sequence[Sequence[object]], *, left: int = 1, best: Sequence[tuple[int, int]] = ()
) -> Html:
    """A table whose first `left` columns hold text, the others numbers; cells (row, column) in `best` stand out."""
    head = element("tr", *(element("th", cell, kind="text" if i < left else "") for i, cell in enumerate(header)))
    body = [
        element(
            "tr",
            *(
                element("td", cell, kind=" ".join(["text"] * (i < left) + ["best"] * ((r, i) in best)))
                for i, cell in enumerate(row)
            ),
        )
        for r, row in enumerate(rows)
    ]
    return element("div", element("table", element("thead", head), element("tbody", *body)), kind="wide")


def facts(pairs: Sequence[tuple[str, object]]) -> Html:
    """Short facts side by side, each with its name."""
    return element(
        "dl", *(element("div", element("dt", name), element("dd", value)) for name, value in pairs), kind="facts"
    )


def dot(series: int) -> Html:
    """The colour mark of the run at `series`."""
    return Html(f'<span class="dot" style="background: var(--series-{series % 8 + 1})"></span>')


def page(title: str, *children: object) -> str:
    """A whole document with its style inside; it fetches nothing."""
    style = STYLE.read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + element("main", *children)
        + "\n</body>\n</html>\n"
    )
