"""Typed, validated settings: one path for presets, the command line and sweeps.

A section is a frozen pydantic model that lives beside its owner. A job's settings are built from three layers, later
ones winning: the defaults in the code, a TOML preset, and ``section.key=value`` overrides.
"""

from passreid_ray.config.describe import SectionHelp, SettingHelp, describe
from passreid_ray.config.load import build, load_config, overridden, read_preset
from passreid_ray.config.section import Section, SectionT, UserPath
from passreid_ray.config.toml import assignments, to_toml

__all__ = [
    "Section",
    "SectionHelp",
    "SectionT",
    "SettingHelp",
    "UserPath",
    "assignments",
    "build",
    "describe",
    "load_config",
    "overridden",
    "read_preset",
    "to_toml",
]
