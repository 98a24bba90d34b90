"""The sources a job can be pointed at, told apart by ``kind``."""

from typing import Annotated, Literal

from pydantic import Field

from passreid_ray.config import Section
from passreid_ray.data.folder import FolderSource, read_folder
from passreid_ray.data.labels_csv import LabelsCsvSource, read_labels_csv
from passreid_ray.data.lmdb_source import LmdbSource, read_lmdb
from passreid_ray.data.market1501 import Market1501Source, read_market1501
from passreid_ray.data.msmt17 import MSMT17Source, read_msmt17
from passreid_ray.data.parquet import ParquetSource, read_parquet
from passreid_ray.data.rows import Rows, join_rows
from passreid_ray.data.synthetic import SyntheticSource, synthetic_rows
from passreid_ray.data.tar_source import TarSource, read_tar
from passreid_ray.data.zip_source import ZipSource, read_zip

_Single = (
    FolderSource
    | LabelsCsvSource
    | LmdbSource
    | Market1501Source
    | MSMT17Source
    | ParquetSource
    | SyntheticSource
    | TarSource
    | ZipSource
)
SingleSource = Annotated[_Single, Field(discriminator="kind")]


class JoinedSource(Section):
    """Several sources as one; ids get the prefix ``<position>:`` so that people of different sources stay different."""

    kind: Literal["joined"] = "joined"
    sources: list[SingleSource] = Field(min_length=1)
    """The sources to join."""


Source = Annotated[_Single | JoinedSource, Field(discriminator="kind")]


def open_rows(source: Source) -> Rows:
    """Rows of a source, found and checked on the driver; raises ``UserError`` when there is nothing usable."""
    match source:
        case FolderSource():
            return read_folder(source)
        case LabelsCsvSource():
            return read_labels_csv(source)
        case LmdbSource():
            return read_lmdb(source)
        case Market1501Source():
            return read_market1501(source)
        case MSMT17Source():
            return read_msmt17(source)
        case ParquetSource():
            return read_parquet(source)
        case SyntheticSource():
            return synthetic_rows(source)
        case TarSource():
            return read_tar(source)
        case ZipSource():
            return read_zip(source)
        case JoinedSource():
            return join_rows([open_rows(part) for part in source.sources])
