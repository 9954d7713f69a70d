"""Write the tables of configuration keys in docs/ from the pydantic models (`make docs-tables`).

A table stands between ``<!-- begin generated: NAME -->`` and ``<!-- end generated -->``. NAME is ``config.SECTION``
(``config.run`` for the keys outside sections, ``config.train.base`` for a section within one) or ``options.METHOD``.
"""

import re
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import BaseMetadata, Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from starseg.config import RunConfig
from starseg.methods import METHODS

DOCS = Path(__file__).parents[1] / "docs"
_BLOCK = re.compile(r"(<!-- begin generated: (\S+) -->\n).*?(<!-- end generated -->)", re.S)
_NAMES = {int: "integer", float: "number", str: "text", bool: "`true` or `false`", Path: "path"}
_BOUNDS = {Gt: ("gt", ">"), Ge: ("ge", "≥"), Lt: ("lt", "<"), Le: ("le", "≤")}


def fill(text: str) -> str:
    """A page with every table between markers replaced by the current one."""
    return _BLOCK.sub(lambda block: block[1] + table(block[2]) + block[3], text)


def table(name: str) -> str:
    """The Markdown table called ``name`` in a marker.

    Raises:
        KeyError: no such section or method.
    """
    kind, _, place = name.partition(".")
    if kind == "options":
        model = next(method for method in METHODS.values() if method.section == place).Options
    else:
        model, place = (RunConfig, "") if place == "run" else (_section(place), place)
    rows = [_row(f"{place}.{key}" if place else key, field) for key, field in _leaves(model)]
    return "\n".join(["| key | values | default | meaning |", "|---|---|---|---|", *rows, ""])


def _section(place: str) -> Any:
    model: Any = RunConfig
    for part in place.split("."):
        model = model.model_fields[part].annotation
    return model


def _leaves(model: Any) -> list[tuple[str, FieldInfo]]:
    """Fields by the name a configuration uses, without nested sections."""
    fields = [(field.alias or name, field) for name, field in model.model_fields.items()]
    return [(name, field) for name, field in fields if not _is_section(field.annotation)]


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _row(key: str, field: FieldInfo) -> str:
    cells = (f"`{key}`", _values(field), _default(field.default), _meaning(field.description or ""))
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |".replace("|  |", "| |")


def _values(field: FieldInfo) -> str:
    bounds = [f"{sign} {getattr(m, key):g}" for m in field.metadata for key, sign in _bound(m)]
    return " ".join([_kind(field.annotation), ", ".join(bounds)]).strip()


def _bound(constraint: BaseMetadata) -> list[tuple[str, str]]:
    return [_BOUNDS[type(constraint)]] if type(constraint) in _BOUNDS else []


def _kind(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_kind(part) for part in inner if part is not type(None)))
    if origin is list:
        return f"list of {_kind(inner[0])}" if get_origin(inner[0]) is not list else "list of lists of names or ids"
    return _NAMES.get(annotation) or (_kind(inner[0]) if inner else str(annotation))


def _default(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"{value:g}" if isinstance(value, (int, float)) else f"`{value}`"


def _meaning(docstring: str) -> str:
    """A field's docstring on one line, with links to the pages that it names."""
    text = re.sub(r"\s+", " ", docstring).strip().rstrip(".")
    text = re.sub(r"\bdocs/([\w-]+)\.md\b", r"[\1](\1.md)", text)
    parts = text.split("`")
    parts[::2] = [part.replace("<", "&lt;") for part in parts[::2]]
    return "`".join(parts)


def main() -> None:
    """Rewrite the pages whose tables changed."""
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if (filled := fill(text)) != text:
            page.write_text(filled, encoding="utf-8")
            print(f"wrote {page.relative_to(DOCS.parent)}")


if __name__ == "__main__":
    main()
