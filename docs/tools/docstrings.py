"""An extension of Griffe: the package's docstrings, in the form that mkdocstrings renders.

Here a parameter or field is a line ``name: what it is``, with further lines indented. Such lines
become Google's section ``Args:``; names of errors and of the interface become links.
"""

import ast
import re
from pathlib import Path

import griffe

PACKAGE = Path(__file__).parents[2] / "moe_rewrite"
FIELD = re.compile(r"^(\w+(?:, \w+)*): (.*)$")


def linked() -> dict[str, str]:
    """Name -> path of what the reference pages describe."""
    pages = (PACKAGE.parent / "docs" / "reference").glob("*.md")
    paths = [p for page in pages for p in re.findall(r"^::: (\S+)$", page.read_text(), re.M)]
    errors = ast.parse((PACKAGE / "errors.py").read_text()).body
    paths += [f"moe_rewrite.errors.{c.name}" for c in errors if isinstance(c, ast.ClassDef)]
    return {path.rpartition(".")[2]: path for path in paths}


def with_sections(text: str, names: set[str]) -> str:
    """A docstring whose lines ``name: ...`` are sections. names: those that may begin a line."""
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        field = FIELD.match(line)
        if field and names.issuperset(field[1].split(", ")):
            if not inside:
                lines += ["", "Args:"]
            lines += [f"    {name}: {field[2]}" for name in field[1].split(", ")]
            inside = True
        elif inside and line.startswith("    "):
            lines.append("    " + line)
        else:
            if inside and line:
                lines.append("")
            inside = inside and not line
            lines.append(line)
    return "\n".join(lines)


class Fields(griffe.Extension):
    """Rewrites the docstrings of functions and classes."""

    def __init__(self) -> None:
        paths = linked()
        known = "|".join(sorted(paths, key=len, reverse=True))
        self._paths, self._quoted = paths, re.compile(rf"(?<!`)`({known})`(?!`)")
        errors = "|".join(n for n, path in paths.items() if ".errors." in path)
        self._errors = re.compile(rf"(?<![\w`\[.])({errors})\b(?![`\]])")

    def _with_links(self, text: str, own: str) -> str:
        def link(found: re.Match) -> str:
            path = self._paths[found[1]]
            return f"`{found[1]}`" if path == own else f"[`{found[1]}`][{path}]"

        return self._errors.sub(link, self._quoted.sub(link, text))

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring is None or not (obj.is_function or obj.is_class or obj.is_attribute):
            return
        names = set() if obj.is_function else set(obj.members)
        called = obj.members.get("__init__") if obj.is_class else obj
        names.update(p.name for p in getattr(called, "parameters", ()))
        text = self._with_links(obj.docstring.value, obj.path)
        obj.docstring.value = with_sections(text, names)
