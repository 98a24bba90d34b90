"""From a preset and the command line to validated settings."""

import copy
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from passreid_ray.config.credentials import without_credentials
from passreid_ray.config.mistakes import explain
from passreid_ray.config.section import NONE, SectionT
from passreid_ray.errors import UserError


def load_config(
    cls: type[SectionT], arguments: Sequence[str], *, presets: Path | None = None, default_preset: str | None = None
) -> SectionT:
    """Settings of type ``cls`` from ``[preset.toml] [section.key=value ...]``.

    A preset is a path, or a name found in ``presets``; without one it is ``default_preset``. Values are TOML (``3``,
    ``true``, ``[1, 2]``) or ``none``; anything else is a string, so paths need no quotes. Raises ``UserError`` naming
    the key, what was found and what to do.
    """
    files = [argument for argument in arguments if "=" not in argument]
    overrides = [argument for argument in arguments if "=" in argument]
    if flags := [name for name in files if name.startswith("-")]:
        raise UserError(
            f"{flags[0]}: settings are given as section.key=value, such as {flags[0].lstrip('-') or 'epochs'}=3; "
            "--help lists them"
        )
    if len(files) > 1:
        raise UserError(f"expected at most one preset before the key=value settings, got {' '.join(files)}")
    preset = files[0] if files else default_preset
    return overridden(cls, read_preset(preset, presets) if preset else {}, overrides)


def overridden(cls: type[SectionT], values: dict[str, Any], overrides: Sequence[str]) -> SectionT:
    """Settings of type ``cls`` from nested ``values``, over its defaults, and ``section.key=value`` ``overrides``."""
    values = _merge(cls().model_dump(), copy.deepcopy(values))
    # A kind comes before the settings of that kind, in whatever order they were typed.
    for keys, value in sorted(map(_parse_override, overrides), key=lambda item: item[0][-1] != "kind"):
        _set(values, keys, value)
    return build(cls, values)


def build(cls: type[SectionT], values: dict[str, Any]) -> SectionT:
    """Validate nested ``values`` into ``cls``; the error has a line per wrong key and, for a typo, the nearest one."""
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(explain(cls, error.errors()))) from None


def read_preset(name: str, presets: Path | None = None) -> dict[str, Any]:
    """Nested values of a TOML preset given by path, or by name inside ``presets``."""
    path = Path(name).expanduser()
    candidates = [path] if presets is None else [path, presets / name, presets / f"{name}.toml"]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        known = sorted(file.stem for file in presets.glob("*.toml")) if presets else []
        kin = [stem for stem in known if stem.partition("_")[0] == name.partition("_")[0]]  # of the same job
        hint = f"; there are {', '.join(kin or known)}" if known else ""
        raise UserError(
            f"{without_credentials(name)}: no such preset file{hint}. Settings are given as section.key=value"
        )
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


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
        if node.get(key) in (None, NONE):
            node[key] = {}
        node = node[key]
        if not isinstance(node, dict | list):
            raise UserError(f"{'.'.join(keys)}: {'.'.join(keys[: depth + 1])} is a value, not a section")
    if keys[-1] == "kind" and isinstance(node, dict) and node.get("kind") != value:
        node.clear()  # settings of another kind mean nothing to this one
    if isinstance(node, list) and node and not isinstance(node[0], dict | list):
        _list_item(node, keys[-1], keys[:-1])
        node[int(keys[-1])] = value
        return
    if isinstance(node, list):
        raise UserError(f"{'.'.join(keys)}: give the whole list, or the setting of one item such as 0.root")
    node[keys[-1]] = value


def _list_item(items: list[Any], key: str, path: list[str]) -> Any:
    if not items:
        raise UserError(f"{'.'.join(path)}: the list is empty; give the whole list")
    if not key.isdigit() or int(key) >= len(items):
        raise UserError(f"{'.'.join(path)}: expected a position from 0 to {len(items) - 1}, got {key!r}")
    return items[int(key)]
