"""Settings of a conversion, and what is told to be wrong before anything is read."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from passreid_ray.config import Section, UserPath
from passreid_ray.engines.loading import BackboneOf
from passreid_ray.errors import UserError
from passreid_ray.models.config import ModelConfig
from passreid_ray.models.reid_model import Neck, NeckFusion
from passreid_ray.train.state_files import META_FILE, find_checkpoint

Format = Literal["released", "pretraining", "supervised", "usl", "own"]


class ConvertConfig(Section):
    """Settings of jobs/convert.py."""

    checkpoint: UserPath | None = None
    """What is converted: a run or checkpoint folder of this project, or any public file. Must be given."""
    format: Format | None = None
    """released: flat backbone, .safetensors if output ends so; pretraining: student, teacher, heads and centers, as
    checkpoint.pth of PASS; supervised: as transformer_120.pth; usl: as checkpoint.pth.tar; own: a checkpoint folder of
    this project. Must be given."""
    output: UserPath | None = None
    """File to write, for own a folder. Must be given."""
    overwrite: bool = False
    """Replace what is there."""
    weights: BackboneOf = "teacher"
    """Which network of a pre-training checkpoint becomes a released backbone or is tuned."""
    fusion: NeckFusion | None = None
    """How tokens are fused; needed where the source does not tell: no necks, or one per token and no classifier."""
    neck: Neck | None = None
    """Kind of the fresh necks of a source that has none."""
    model: ModelConfig | None = None
    """What a public file does not tell, such as model.num_heads for an unusual width."""
    image_size_px: tuple[int, int] | None = None
    """Height and width of the position table of a public file; none: told from the number of positions."""
    epoch: int | None = Field(default=None, ge=0)
    """Epochs or rounds that a pretraining or usl file says are finished; none: the source's, or 0."""


def required(config: ConvertConfig) -> tuple[Path, Format, Path]:
    """(checkpoint, format, output); ``UserError`` for the first that is not given."""
    if config.checkpoint is None or config.format is None or config.output is None:
        missing = next(key for key in ("checkpoint", "format", "output") if getattr(config, key) is None)
        raise UserError(
            f"{missing}: must be given: checkpoint=SOURCE format=released|pretraining|supervised|usl|own output=FILE"
        )
    return config.checkpoint, config.format, config.output


def check_output(path: Path, form: Format, output: Path, *, overwrite: bool) -> None:
    """Raise ``UserError`` when there is no checkpoint at ``path``, or the output may not take its place."""
    if not path.exists():
        raise UserError(f"checkpoint: {path} does not exist")
    own_folder = find_checkpoint(path) if path.is_dir() else path
    if output.resolve() in (path.resolve(), own_folder.resolve()):
        raise UserError(f"output: {output} is the checkpoint itself; give another place")
    if output.suffix == ".safetensors" and form != "released":
        raise UserError(f"output: {output}: only format=released is written as safetensors; give another ending")
    if form == "own":
        if output.is_file():
            raise UserError(f"output: {output} is a file; format=own writes a folder")
        if output.is_dir() and any(output.iterdir()) and not (output / META_FILE).is_file():
            raise UserError(f"output: {output} is not empty and no checkpoint; give another folder")
        exists = (output / META_FILE).is_file()
    else:
        if output.is_dir():
            raise UserError(f"output: {output} is a folder; format={form} writes a file")
        exists = output.exists()
    if exists and not overwrite:
        raise UserError(f"output: {output} is there; give another place, or overwrite=true to replace it")
