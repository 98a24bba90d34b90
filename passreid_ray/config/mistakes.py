"""Pydantic's complaints in the words of somebody who types settings."""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from passreid_ray.config.credentials import without_credentials
from passreid_ray.config.section import Section, allows_none, kind_of, sections_in

LONGEST_SHOWN = 80


def explain(cls: type[Section], details: Sequence[Any]) -> list[str]:
    """One line per wrong key, from the details of a ``ValidationError``."""
    lines: dict[str, str] = {}
    found: dict[str, str] = {}
    for detail in details:
        key, expected = _expected(cls, _place(cls, detail["loc"]), detail)
        # A value of several possible types fails as each of them.
        lines[key] = f"{lines[key]} or {expected.removeprefix('expected ')}" if key in lines else expected
        found[key] = _found(detail)
    return [(f"{key}: " if key else "") + line + found[key] for key, line in lines.items()]


@dataclass
class _Place:
    """Where pydantic found a mistake, in the words of the settings."""

    path: list[str] = field(default_factory=list)
    owner: type[Section] | None = None
    """Section that the last key belongs, or should belong, to."""
    kinds: list[type[Section]] = field(default_factory=list)
    """All kinds that ``owner`` could have been."""
    below: list[type[Section]] = field(default_factory=list)
    """The section, or its possible kinds, that the last key holds."""
    is_optional: bool = False

    @property
    def key(self) -> str:
        return ".".join(self.path)


def _place(cls: type[Section], location: Sequence[str | int]) -> _Place:
    """Pydantic's location without what it adds: the kinds of sections and the types of a value that may be several."""
    place = _Place()
    options = [cls]
    for part in location:
        if isinstance(part, int):
            place.path.append(str(part))
            continue
        place.kinds = options if len(options) > 1 else place.kinds
        if len(options) > 1 and part in map(kind_of, options):
            options = [section for section in options if kind_of(section) == part]
            continue
        if not options:
            continue  # below a value: the name of one of its possible types
        place.owner = options[0]
        place.path.append(part)
        known = place.owner.model_fields.get(part)
        place.is_optional = known is not None and allows_none(known.annotation)
        options = [] if known is None else sections_in(known.annotation)
    place.below = options
    return place


def _expected(cls: type[Section], place: _Place, detail: Any) -> tuple[str, str]:
    """(key, what is expected of it) for one mistake."""
    context = detail.get("ctx", {})
    or_none = " or none" if place.is_optional else ""
    match detail["type"]:
        case "extra_forbidden":
            return place.key, _unknown(cls, place)
        case "missing" if isinstance(detail["loc"][-1], int):
            return ".".join(place.path[:-1]), "too few values"
        case "missing":
            return place.key, "must be given"
        case "int_parsing" | "int_type" | "int_from_float":
            return place.key, f"expected a whole number{or_none}"
        case "float_parsing" | "float_type":
            return place.key, f"expected a number{or_none}"
        case "bool_parsing" | "bool_type":
            return place.key, "expected true or false"
        case "string_type" | "path_type":
            quotes = " in quotes" if isinstance(detail["input"], int | float) else ""
            return place.key, f"expected text{quotes}{or_none}"
        case "tuple_type" | "list_type":
            return place.key, f"expected a list such as [1, 2]{or_none}"
        case "too_long" | "too_short":
            bound = context.get("max_length", context.get("min_length"))
            return place.key, f"expected {bound} values"
        case "literal_error":
            return place.key, f"expected {context['expected']}{or_none}"
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            return place.key, _bound(context)
        case "union_tag_invalid":
            return f"{place.key}.kind", f"{context['tag']!r} is none of {context['expected_tags']}"
        case "union_tag_not_found":
            return f"{place.key}.kind", f"must be given: one of {', '.join(map(kind_of, place.below))}"
        case "model_type" | "model_attributes_type" | "dict_type":
            return place.key, f"expected a section, with settings such as {place.key}.{_example(place.below)}"
        case _:
            message = detail["msg"].removeprefix("Value error, ")
            name, separator, rest = message.partition(": ")
            if separator and name.isidentifier() and isinstance(detail["input"], dict):
                return ".".join([*place.path, name]), rest  # a check of a whole section names the setting itself
            return place.key, message[:1].lower() + message[1:]


def _bound(context: dict[str, Any]) -> str:
    match context:
        case {"ge": low}:
            return f"expected at least {low:g}"
        case {"gt": low}:
            return f"expected more than {low:g}"
        case {"le": high}:
            return f"expected at most {high:g}"
        case _:
            return f"expected less than {context['lt']:g}"


def _unknown(cls: type[Section], place: _Place) -> str:
    """What to say of a setting that does not exist."""
    assert place.owner is not None
    *parents, name = place.path
    others = [
        kind_of(section) for section in place.kinds if section is not place.owner and name in section.model_fields
    ]
    if others and "kind" in place.owner.model_fields:
        kind_key = ".".join([*parents, "kind"])
        return f"no such setting where {kind_key}={kind_of(place.owner)}; it goes with {kind_key}={' or '.join(others)}"
    if nearest := difflib.get_close_matches(name, place.owner.model_fields, n=1):
        return f"no such setting; did you mean {'.'.join([*parents, nearest[0]])}?"
    if elsewhere := [key for key in _keys(cls) if key.rpartition(".")[2] == name]:
        return f"no such setting; did you mean {' or '.join(elsewhere)}?"
    return f"no such setting; known here: {', '.join(sorted(place.owner.model_fields))}"


def _keys(cls: type[Section], prefix: str = "") -> Iterator[str]:
    """Dotted keys of all settings, those of sections that come in several kinds left out."""
    for name, own in cls.model_fields.items():
        sections = sections_in(own.annotation)
        if not sections:
            yield f"{prefix}{name}"
        elif len(sections) == 1:
            yield from _keys(sections[0], f"{prefix}{name}.")


def _example(sections: Sequence[type[Section]]) -> str:
    return next(iter(sections[0].model_fields)) if sections else "name"


def _found(detail: Any) -> str:
    """What was there instead, where that says anything."""
    value = detail["input"]
    if detail["type"] == "extra_forbidden" or isinstance(value, dict | Section):
        return ""
    # Before it is shortened, which may cut off the @ that credentials are told by.
    text = without_credentials(repr(list(value) if isinstance(value, tuple) else value))
    return ", got " + (text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 3]}...")
