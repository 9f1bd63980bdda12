"""Writes the table of attention variants into README.md, from the registry.

python tools/variants.py            rewrites the table
python tools/variants.py --check    status 1 if it is not current
"""

import ast
import importlib
import inspect
import pathlib
import sys

from flax import nnx

import layers.attention
from configs import attention as presets
from layers.rope import Rope

README = pathlib.Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- variants: made by tools/variants.py -->\n", "<!-- end of variants -->\n"
WIDTH, SHORT, LONG = 256, 1024, 32768


def table() -> str:
    """One line per preset: what it is, its parameters and what it remembers, at a common size."""
    lines = [
        f"| preset | what it is | parameters | cache at {SHORT:,} tokens | at {LONG:,} |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for name in presets.names():
        options = presets.get(name).to_dict()
        if "rope" in options:
            options["rope"] = Rope(**options["rope"])
        layer = layers.attention.build(options.pop("layer"), width=WIDTH, rngs=nnx.Rngs(0), **_first(options))
        cache = [f"{layer.cache_bytes(length, 2) / 1024:,.0f} KiB" for length in (SHORT, LONG)]
        lines.append(f"| `{name}` | {_summary(name)} | {layer.parameter_count():,} | {cache[0]} | {cache[1]} |")
    return "\n".join(lines) + "\n"


def current(text: str) -> str:
    """README's text with the table as it should be."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table()}{END}{after}"


def _first(options: dict) -> dict:
    """Options with one value per layer, as the first layer sees them."""
    return {name: value[0] if isinstance(value, tuple) else value for name, value in options.items()}


def _summary(name: str) -> str:
    source = inspect.getsource(importlib.import_module(f"configs.attention.{name}"))
    return (ast.get_docstring(ast.parse(source)) or "").splitlines()[0].rstrip(".")


def main() -> int:
    text = README.read_text()
    if BEGIN not in text or END not in text:
        print(f"error: {README.name} has lost the lines {BEGIN.strip()!r} and {END.strip()!r}", file=sys.stderr)
        return 2
    if "--check" in sys.argv[1:]:
        return int(current(text) != text)
    README.write_text(current(text))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
