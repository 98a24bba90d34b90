"""Settings written as a TOML preset."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from passreid_ray.config.section import NONE, Section


def to_toml(config: Section) -> str:
    """The resolved settings as a TOML preset: running it again gives the same settings."""
    return "\n".join(_toml_lines(config.model_dump(mode="json"), ())).lstrip("\n") + "\n"


def assignments(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Nested ``values`` as ``section.key=value``, as a command line has them."""
    found = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            found += assignments(value, f"{prefix}{key}.")
        else:
            found.append(f"{prefix}{key}={_toml_value(value)}")
    return found


def _toml_lines(values: dict[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    if path and len(tables) < len(values):
        yield ""
        yield f"[{'.'.join(map(_key, path))}]"
    for key, value in values.items():
        if key not in tables:
            yield f"{_key(key)} = {_toml_value(value)}"
    for key, value in tables.items():
        yield from _toml_lines(value, (*path, key))


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name, ensure_ascii=False)


def _toml_value(value: Any) -> str:
    match value:
        case None:
            return json.dumps(NONE)
        case dict():
            return "{ " + ", ".join(f"{_key(key)} = {_toml_value(item)}" for key, item in value.items()) + " }"
        case list():
            return "[" + ", ".join(_toml_value(item) for item in value) + "]"
        case _:
            return json.dumps(value, ensure_ascii=False)
