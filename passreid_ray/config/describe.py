"""What ``--help`` says of the settings."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_origin

from passreid_ray.config.section import NONE, Section, kind_of, sections_in


@dataclass(frozen=True)
class SettingHelp:
    """What ``--help`` says of a setting."""

    key: str
    default: str
    """As a user would type it; empty when the setting must be given."""
    meaning: str


@dataclass(frozen=True)
class SectionHelp:
    """What ``--help`` says of a section, or of one kind of a section that has several."""

    name: str
    """Dotted key, followed by ``.kind=...`` for a kind; empty for the settings that are in no section."""
    meaning: str
    settings: list[SettingHelp] = field(default_factory=list)


def describe(cls: type[Section]) -> list[SectionHelp]:
    """Every setting below ``cls``, section by section, for ``--help`` and the README.

    A section that comes in several kinds is followed by one entry per kind; where the same kinds are possible in a
    second place, that place refers to the first.
    """
    top = SectionHelp("", "")
    return [top, *_describe(cls, cls(), "", top.settings, {})]


def _describe(
    cls: type[Section], defaults: Section | None, prefix: str, settings: list[SettingHelp], seen: dict[Any, str]
) -> Iterator[SectionHelp]:
    """Adds the settings of ``cls`` to ``settings`` and yields the sections below it."""
    for name, own in cls.model_fields.items():
        key, meaning = f"{prefix}{name}", _plain(own.description)
        default = getattr(defaults, name) if defaults is not None else own.get_default(call_default_factory=True)
        kinds = [] if get_origin(own.annotation) is list else sections_in(own.annotation)
        match kinds:
            case []:
                if meaning or name != "kind":
                    settings.append(SettingHelp(key, "" if own.is_required() else _typed(default), meaning))
            case [section]:
                one = SectionHelp(key, meaning or _plain(section.__doc__))
                yield from (one, *_describe(section, default, f"{key}.", one.settings, seen))
            case _:
                names = tuple(map(kind_of, kinds))
                where = seen.setdefault(names, key)
                kind = getattr(default, "kind", NONE)
                told = f"One of {', '.join(names)}{'' if where == key else f'; see {where}'}."
                yield SectionHelp(key, meaning, [SettingHelp(f"{key}.kind", kind, told)])
                for section in kinds if where == key else []:
                    one = SectionHelp(f"{key}.kind={kind_of(section)}", _plain(section.__doc__))
                    yield from (one, *_describe(section, None, f"{key}.", one.settings, seen))


def _plain(text: str | None) -> str:
    """The first paragraph of a docstring on one line."""
    return " ".join((text or "").strip().split("\n\n")[0].split()).replace("``", "")


def _typed(value: Any) -> str:
    """A value as a user would type it after ``key=``."""
    match value:
        case None:
            return NONE
        case str() | Path():
            return str(value)
        case _:
            return json.dumps(value, default=str)
