"""Overrides of configuration keys on the command line: ``key=value``."""

from __future__ import annotations

import json
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from starseg.errors import UserError


def override(key: str, value: Any) -> str:
    """Format ``key=value`` as an override for a configuration, quoting text that YAML would read differently."""
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


def _accepted_types(key: str, schema: type[BaseModel]) -> set[Any]:
    """Return the types that the field of a dotted key accepts; empty for sections and the options of methods."""
    annotation: Any = schema
    for part in key.split("."):
        field = getattr(annotation, "model_fields", {}).get(part)
        annotation = field and field.annotation
    pending: list[Any] = [annotation]
    found: set[Any] = set()
    while pending:
        kind = pending.pop()
        if get_origin(kind) is Annotated:
            pending.append(get_args(kind)[0])
        elif get_origin(kind) in (Union, UnionType):
            pending.extend(get_args(kind))
        else:
            found |= set(map(type, get_args(kind))) if get_origin(kind) is Literal else {kind}
    return found


def _parse_value(key: str, value: str, schema: type[BaseModel]) -> Any:
    """Parse the value of an override.

    Only text in quotes, lists in [] and sections in {} are YAML. Anything else is one plain value, in which ``#`` and
    ``: `` have no meaning; if the key takes a path or another text, it is taken literally, except for ``null`` and
    whatever else the key takes, such as a number.

    Raises:
        ValueError, yaml.YAMLError: a quotation, list or section is not valid.
    """
    types, text = _accepted_types(key, schema), value.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        # JSON is what override() writes; as YAML, it would lose line separators.
        return json.loads(text, strict=False) if text[0] == '"' else yaml.safe_load(text)
    is_text = bool(types & {str, Path})
    if text[0] in "[{" and not is_text:
        return yaml.safe_load(text)
    loader = yaml.SafeLoader("")
    node = yaml.ScalarNode(loader.resolve(yaml.ScalarNode, text, (True, False)), text)
    plain = text if node.tag.endswith((":str", ":merge", ":value")) else loader.construct_object(node)
    if is_text and (type(plain) not in types - {str} or text == "~"):
        return value
    return plain


def set_override(tree: dict[str, Any], assignment: str, schema: type[BaseModel]) -> None:
    """Apply an override to a configuration.

    Args:
        tree: the configuration as nested dictionaries, changed in place.
        assignment: the override, "a.b=value".
        schema: model of the configuration, which tells the keys that take text.

    Raises:
        UserError: the override is malformed.
    """
    key, sep, value = assignment.partition("=")
    if not sep or not key:
        raise UserError(f"override {assignment!r}: expected key=value, e.g. train.base.epochs=5")
    if not value.strip():
        raise UserError(f"override {assignment!r}: the value is empty; give one, or {key}=null for the default")
    *parents, leaf = key.split(".")
    for part in parents:
        if not isinstance(tree.setdefault(part, {}), dict):
            raise UserError(f"override {assignment!r}: {part!r} is a value, not a section")
        tree = tree[part]
    try:
        tree[leaf] = _parse_value(key, value, schema)
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"override {assignment!r}: {value!r} is not valid YAML") from error
