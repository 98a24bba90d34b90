"""A checkpoint from one format into another, checked by reading again what was written, and what is said of it."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from torch import nn

from passreid_ray.engines.convert_check import NUM_IMAGES, Checked, check_model, check_tensors
from passreid_ray.engines.convert_config import ConvertConfig, Format, check_output, required
from passreid_ray.engines.convert_output import discard, draft_of, model_to_write, move, write
from passreid_ray.engines.convert_source import Source, read_source
from passreid_ray.engines.embedding import FusedViT, TunedFeatures
from passreid_ray.models import ReidModel


def run(config: ConvertConfig, console: Console | None = None) -> Path:
    """Convert ``config.checkpoint``; the path written. Nothing is left behind when anything is wrong.

    Raises:
        UserError: a setting is missing or does not fit, the source is refused or lacks what the format needs, or the
            output is there, cannot be written, or is not the same when it is read again.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    path, form, output = required(config)
    check_output(path, form, output, overwrite=config.overwrite)
    source = read_source(config, path, form)
    model = model_to_write(config, source)
    draft = draft_of(output)
    try:
        tensors = write(form, draft, source, model, config)
        check_tensors(draft, tensors, output)
        checked = check_model(draft, source, model, output)
        move(draft, output)
    finally:
        discard(draft)
    classes = "" if source.classifier_CD is None else f"; classifier of {len(source.classifier_CD)} classes"
    console.print(f"read:     {source.kind}; {source.loaded.notes}{classes}", markup=False)
    console.print(f"written:  {output}: {form}, {len(tensors)} tensors", markup=False)
    console.print(f"left out: {', '.join(_counted(source.left_out)) or 'nothing'}", markup=False)
    for note in _notes(form, source, model, checked, config.epoch):
        console.print(f"note:     {note}", markup=False)
    console.print(
        f"checked:  {len(tensors)} tensors read again, equal to the bit; features of {NUM_IMAGES} random images, "
        f"largest difference {checked.largest_difference:g}",
        markup=False,
    )
    return output


def _notes(form: Format, source: Source, model: ReidModel | None, checked: Checked, epoch: int | None) -> Iterator[str]:
    """What the reader of the written checkpoint must know and cannot read off it."""
    loaded, again = source.loaded, checked.loaded
    is_tuned = loaded.reid_model is not None
    if source.other_dtypes:
        yield f"the source has tensors of {' and '.join(source.other_dtypes)}, they are written as float32"
    if model is not None and not is_tuned:
        yield f"the source has no necks, fresh ones are written: neck {model.neck}, fusion {model.fusion}"
    if form == "own":
        return
    if not checked.is_told:
        yield f"the file does not tell its kind of model: who reads it needs {_model_settings(source)}"
    elif source.backbone.width != 64 * source.num_heads:
        heads = source.num_heads
        yield f"the file does not tell its {heads} heads: who reads it needs model.num_heads={heads}"
    if form == "usl" and model is not None and model.neck == "multi" and model.backbone.num_parts:
        yield f"the file does not tell its fusion: who reads it needs fusion={model.fusion}"
    if loaded.image_input.patch_px is not None:
        yield "the source's images keep their shape, which the file does not tell"
    if loaded.image_input.pixels != again.image_input.pixels:
        mean, std = list(loaded.image_input.pixels.mean), list(loaded.image_input.pixels.std)
        yield f"the file does not tell its pixel statistics: who reads it needs pixels.mean={mean} pixels.std={std}"
    before, after = _compared_features(loaded.model), _compared_features(again.model)
    if model is not None and is_tuned and before != after:
        yield f"features of the source are compared {before}, those of a {form} file {after}"
    if form == "pretraining" and epoch is None and "step" in source.meta:
        yield f"this project counts steps ({source.meta['step']}), so the epoch is written as 0; epoch=N sets it"


def _model_settings(source: Source) -> str:
    """The settings that build the source's model, as they are typed."""
    needed = source.loaded.model_config.model_dump(exclude_defaults=True, exclude={"drop_path", "weight_init"})
    typed = {key: value if isinstance(value, str) else json.dumps(value) for key, value in needed.items()}
    return " ".join(f"model.{key}={value}" for key, value in typed.items())


def _compared_features(model: nn.Module) -> str:
    match model:
        case FusedViT():
            return "as its tokens are fused"
        case TunedFeatures(side="before"):
            return "before the neck"
        case ReidModel(neck="multi"):
            return "behind the necks, each token normalised"
        case _:
            return "behind the neck"


def _counted(names: Sequence[str]) -> list[str]:
    """Names grouped by their first word: ``optimizer (12)``."""
    counts = Counter(name.partition(".")[0] for name in names)
    return [f"{name} ({count})" if count > 1 else name for name, count in counts.items()]
