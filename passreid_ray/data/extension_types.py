"""Columns that are not taken from a file: repeated ones, and those whose values only their own code can make."""

import pyarrow as pa

from passreid_ray.errors import UserError


def only_field(schema: pa.Schema, name: str, path: str) -> pa.Field:
    """Column ``name`` of the file at ``path``, which has it; raises ``UserError`` when it has several of that name."""
    found = schema.get_all_field_indices(name)
    if len(found) > 1:
        raise UserError(f"{path}: {len(found)} columns are called {name!r}; give each a name of its own")
    return schema.field(found[0])


def refuse_extension_types(schema: pa.Schema, columns: list[str], path: str) -> None:
    """Raise ``UserError`` when one of the ``columns`` of the file at ``path`` has, or nests, an extension type.

    Also when there are several columns of one name, so that afterwards each of them can be asked for by its name.

    Ray Data registers types of its own with Arrow, and one of them unpickles a value when it is looked at: whoever
    wrote the file would run code here.
    """
    for name in columns:
        if (found := _extension_name(only_field(schema, name, path).type)) is not None:
            raise UserError(
                f"{path}: column {name!r} is of the extension type {found!r}, which may hold pickled objects; refused, "
                "nothing of it was read. Write the column as plain text, numbers or bytes"
            )


def _extension_name(type_: pa.DataType) -> str | None:
    """Name of the first extension type in ``type_``."""
    if isinstance(type_, pa.BaseExtensionType):
        return type_.extension_name
    if pa.types.is_dictionary(type_):
        return _extension_name(type_.value_type)
    names = (_extension_name(type_.field(number).type) for number in range(type_.num_fields))
    return next((name for name in names if name is not None), None)
