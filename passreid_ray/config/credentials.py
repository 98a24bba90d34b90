"""Credentials inside an address, such as s3://key:secret@bucket: refused, since settings go to files and logs."""

import re
from typing import TypeVar

ValueT = TypeVar("ValueT")

# A secret may hold a slash, which ends the host for a parser, so a host with a colon counts up to the last @.
_CREDENTIALS = re.compile(r"(?<=://)[^/?@]*:.*@")


def refuse_credentials(value: ValueT) -> ValueT:
    """``value`` as it is; raises ``ValueError`` for the text of an address that holds credentials."""
    if isinstance(value, str) and _CREDENTIALS.search(value):
        raise ValueError(
            "holds credentials, which would be written to files and logs; give them through the environment "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws)"
        )
    return value


def without_credentials(text: str) -> str:
    """``text`` without the credentials of the address in it."""
    return _CREDENTIALS.sub("", text)
