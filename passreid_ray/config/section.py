"""What every settings section is, and what can be read off its type."""

from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, model_validator

from passreid_ray.config.credentials import refuse_credentials

NONE = "none"
"""How people write that an optional setting has no value; TOML itself has no word for it."""

UserPath = Annotated[Path, BeforeValidator(refuse_credentials), AfterValidator(Path.expanduser)]
"""A path in which ``~`` is the home folder: shells leave it alone in ``section.key=~/x``."""


class Section(BaseModel):
    """Base of every settings section: frozen, unknown keys refused, documented by the strings below its fields."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,  # it may be a secret; ``build`` shows what can be shown
    )

    @model_validator(mode="before")
    @classmethod
    def _read_none(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        optional = {name for name, own in cls.model_fields.items() if allows_none(own.annotation)}
        return {name: None if name in optional and value == NONE else value for name, value in values.items()}


SectionT = TypeVar("SectionT", bound=Section)


def sections_in(annotation: Any) -> list[type[Section]]:
    """The section, or the kinds of section, that a setting of this type holds; none for a value."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for argument in get_args(annotation) for section in sections_in(argument)]


def kind_of(section: type[Section]) -> str:
    """What tells ``section`` from the others that may stand in its place."""
    return section.model_fields["kind"].default if "kind" in section.model_fields else section.__name__


def allows_none(annotation: Any) -> bool:
    """Whether a setting of this type may be left without a value."""
    if get_origin(annotation) is Annotated:
        return allows_none(get_args(annotation)[0])
    return get_origin(annotation) in (Union, UnionType) and type(None) in get_args(annotation)
