"""What tar and zip archives share: which names a member may have, and what its image is called."""

from pathlib import PurePosixPath

from passreid_ray.data.disk import IMAGE_SUFFIXES, is_hidden
from passreid_ray.errors import UserError


def member_name(name: str, archive: str) -> str:
    """``name`` without its parts ``.``; raises ``UserError`` for one that would leave the folder it is unpacked in."""
    parts = name.replace("\\", "/").split("/")
    if name.startswith("/") or ".." in parts:
        raise UserError(
            f"{archive}: member {name!r} points outside of the archive; pack it again with names relative to one folder"
        )
    return "/".join(part for part in name.split("/") if part != ".")


def is_image_name(name: str) -> bool:
    """Whether a member counts as an image: by its suffix, in any case, and not hidden."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not is_hidden(name)


def id_prefix(archive: str, num_archives: int) -> str:
    """What precedes a member's name in its image_id: with several archives the archive's own name, without suffix."""
    return "" if num_archives == 1 else f"{PurePosixPath(archive).with_suffix('')}/"
