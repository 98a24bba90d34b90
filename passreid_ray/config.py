"""Typed, validated settings: one path for presets, the command line and sweeps.

A section is a frozen pydantic model that lives beside its owner. A job's settings are built from three layers, later
ones winning: the defaults in the code, a TOML preset, and ``section.key=value`` overrides.
"""

import difflib
import json
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from passreid_ray.errors import UserError


class Section(BaseModel):
    """Base of every settings section: frozen, unknown keys refused, documented by the strings below its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


SectionT = TypeVar("SectionT", bound=Section)


def load_config(
    cls: type[SectionT], arguments: Sequence[str], *, presets: Path | None = None, default_preset: str | None = None
) -> SectionT:
    """Settings of type ``cls`` from ``[preset.toml] [section.key=value ...]``.

    A preset is a path, or a name found in ``presets``; without one it is ``default_preset``. Values are TOML (``3``, ``true``, ``[1, 2]``); anything that is
    not TOML is a string, so paths need no quotes. Raises ``UserError`` naming the key, what was found and what to do.
    """
    files = [argument for argument in arguments if "=" not in argument]
    overrides = [argument for argument in arguments if "=" in argument]
    if len(files) > 1:
        raise UserError(f"expected at most one preset before the key=value settings, got {files}")
    preset = files[0] if files else default_preset
    values = _merge(cls().model_dump(), read_preset(preset, presets) if preset else {})
    for keys, value in sorted(map(_parse_override, overrides), key=lambda item: item[0][-1] != "kind"):
        _set(values, keys, value)
    return build(cls, values)


def build(cls: type[SectionT], values: dict[str, Any]) -> SectionT:
    """Validate nested ``values`` into ``cls``; the error names every wrong key and, for a typo, the nearest one."""
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(_explain(cls, detail) for detail in error.errors())) from None


def read_preset(name: str, presets: Path | None = None) -> dict[str, Any]:
    """Nested values of a TOML preset given by path, or by name inside ``presets``."""
    candidates = [Path(name)] if presets is None else [Path(name), presets / name, presets / f"{name}.toml"]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        known = sorted(file.stem for file in presets.glob("*.toml")) if presets else []
        hint = f"; presets that come with this job: {', '.join(known)}" if known else ""
        raise UserError(f"{name}: no such preset file{hint}. Settings are given as section.key=value")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None


def to_toml(config: Section) -> str:
    """The resolved settings as a TOML preset: running it again gives the same settings."""
    return "\n".join(_toml_lines(config.model_dump(mode="json", exclude_none=True), ())) + "\n"


def describe(cls: type[Section], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(key, default, meaning) of every setting below ``cls``, for ``--help`` and the README."""
    for name, field in cls.model_fields.items():
        key = f"{prefix}{name}"
        section = _section_of(field.annotation)
        if section is not None:
            yield from describe(section, f"{key}.")
            continue
        default = field.get_default(call_default_factory=True)
        if isinstance(default, Section):
            default = default.model_dump(mode="json", exclude_none=True)
        yield key, json.dumps(default, default=str), " ".join((field.description or "").split())


def _parse_override(argument: str) -> tuple[list[str], Any]:
    key, _, text = argument.partition("=")
    keys = key.removeprefix("--").split(".")
    if not all(keys):
        raise UserError(f"{argument!r}: expected section.key=value")
    try:
        return keys, tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return keys, text


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes`` laid over it; a section of another kind replaces the base's section whole."""
    if changes.get("kind", base.get("kind")) != base.get("kind"):
        return changes
    merged = dict(base)
    for key, value in changes.items():
        old = base.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _set(values: dict[str, Any], keys: list[str], value: Any) -> None:
    node: Any = values
    for depth, key in enumerate(keys[:-1]):
        if isinstance(node, list):
            node = _list_item(node, key, keys[: depth + 1])
            continue
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
        if not isinstance(node, dict | list):
            raise UserError(f"{'.'.join(keys)}: {'.'.join(keys[: depth + 1])} is a value, not a section")
    if keys[-1] == "kind" and isinstance(node, dict) and node.get("kind") != value:
        node.clear()  # settings of another kind mean nothing to this one
    if isinstance(node, list):
        raise UserError(f"{'.'.join(keys)}: give the whole list, or the setting of one item such as 0.root")
    node[keys[-1]] = value


def _list_item(items: list[Any], key: str, path: list[str]) -> Any:
    if not key.isdigit() or int(key) >= len(items):
        raise UserError(f"{'.'.join(path)}: expected a position from 0 to {len(items) - 1}, got {key!r}")
    return items[int(key)]


def _explain(cls: type[Section], detail: Any) -> str:
    location = _without_tags(cls, [str(part) for part in detail["loc"]])
    key = ".".join(location)
    if detail["type"] == "extra_forbidden":
        siblings = _siblings(cls, location[:-1])
        nearest = difflib.get_close_matches(location[-1], siblings, n=1)
        if nearest:
            return f"{key}: no such setting; did you mean {'.'.join([*location[:-1], nearest[0]])}?"
        return f"{key}: no such setting; known here: {', '.join(siblings)}"
    message = detail["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if detail["type"] == "missing":
        return f"{key}: must be given"
    found = "" if isinstance(detail.get("input"), dict | Section) else f", got {detail.get('input')!r}"
    return f"{key}: {message}{found}" if key else message


def _without_tags(cls: type[Section], location: list[str]) -> list[str]:
    """The key as a user writes it: pydantic puts the kind of a union's member into the location."""
    path: list[str] = []
    for part in location:
        is_field = part.isdigit() or part in _siblings(cls, path)
        if is_field or part not in {
            s.model_fields["kind"].default for s in _sections(cls, path) if "kind" in s.model_fields
        }:
            path.append(part)
    return path


def _siblings(cls: type[Section], location: list[str]) -> list[str]:
    """Names of the settings that exist at ``location``."""
    return sorted({name for section in _sections(cls, location) for name in section.model_fields})


def _sections(cls: type[Section], location: list[str]) -> list[type[Section]]:
    sections: list[type[Section]] = [cls]
    for part in location:
        fields = [section.model_fields[part].annotation for section in sections if part in section.model_fields]
        sections = [found for annotation in fields for found in _sections_in(annotation)] or sections
    return sections


def _sections_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for argument in get_args(annotation) for section in _sections_in(argument)]


def _section_of(annotation: Any) -> type[Section] | None:
    """The section behind ``X``, ``X | None`` or ``Annotated[X, ...]``; None for values and for unions of sections."""
    if get_origin(annotation) is Annotated:
        return _section_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        options = [argument for argument in get_args(annotation) if argument is not type(None)]
        return _section_of(options[0]) if len(options) == 1 else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _toml_lines(values: dict[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    if path and len(tables) < len(values):
        yield ""
        yield f"[{'.'.join(path)}]"
    for key, value in values.items():
        if key not in tables:
            yield f"{key} = {_toml_value(value)}"
    for key, value in tables.items():
        yield from _toml_lines(value, (*path, key))


def _toml_value(value: Any) -> str:
    match value:
        case dict():
            return "{ " + ", ".join(f"{key} = {_toml_value(item)}" for key, item in value.items()) + " }"
        case list():
            return "[" + ", ".join(_toml_value(item) for item in value) + "]"
        case _:
            return json.dumps(value, ensure_ascii=False)
