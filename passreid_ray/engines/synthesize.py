"""Synthetic people written to disk in the folders and file names of Market-1501."""

import os
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import track

from passreid_ray.config import Section, to_toml
from passreid_ray.data import Rows, SyntheticSource, open_rows
from passreid_ray.errors import UserError

MARKER = "synthetic.toml"
"""File with the settings of the set, by which a folder is recognised as this job's own."""


class SynthesizeConfig(Section):
    """Settings of jobs/synthesize.py."""

    data: SyntheticSource = SyntheticSource()
    """The people to draw."""
    output: Path = Path("outputs/synthetic")
    """Folder to write; must be empty, new, or hold the beginning of the same set."""


def run(config: SynthesizeConfig) -> Path:
    """Write the set and a contact sheet; returns the folder. Images that an earlier run wrote are kept."""
    output = config.output.expanduser()
    _claim(output, to_toml(config.data))
    rows = open_rows(config.data)
    for split_folder in {Path(image_id).parent for image_id in rows.image_ids}:
        (output / split_folder).mkdir(exist_ok=True)
    for index, image_id in enumerate(track(rows.image_ids, "Drawing people", total=len(rows))):
        path = output / image_id
        if not path.exists():
            _write(path, rows.image_bytes(index))
    Image.fromarray(contact_sheet(rows)).save(output / "contact_sheet.png")
    counts = ", ".join(f"{int((rows.splits == split).sum())} {split}" for split in ("train", "query", "gallery"))
    print(
        f"{len(rows)} images of {config.data.num_people} people by {config.data.num_cameras} cameras ({counts})\n"
        f"Folder:        {output}\n"
        f"Contact sheet: {output / 'contact_sheet.png'}\n"
        f"Use it:        data.kind=market1501 data.root={output}"
    )
    return output


def contact_sheet(rows: Rows, *, num_people: int = 12) -> np.ndarray:
    """One picture, ``(H, W, 3)`` uint8: a row per person, a column per camera; grey where a camera never saw them.

    Shows the first ``num_people`` people and the first image of each camera. All images must have one size.
    """
    people = sorted(set(rows.person_ids))[:num_people]
    cameras = sorted(set(rows.camera_ids), key=int)
    blank = np.full_like(rows.image(0), 128)
    first = {}
    for index in np.flatnonzero(np.isin(rows.person_ids, people)):
        first.setdefault((rows.person_ids[index], rows.camera_ids[index]), index)
    grid = [
        [rows.image(first[person, camera]) if (person, camera) in first else blank for camera in cameras]
        for person in people
    ]
    return np.concatenate([np.concatenate(line, axis=1) for line in grid], axis=0)


def _claim(output: Path, settings: str) -> None:
    """Mark ``output`` as holding the set with these settings; ``UserError`` when it holds something else."""
    marker = output / MARKER
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; choose another output=FOLDER")
    if marker.is_file():
        if marker.read_bytes() != settings.encode():
            raise UserError(f"{output}: holds a synthetic set with other settings; choose another output=FOLDER")
    elif output.is_dir() and any(output.iterdir()):
        raise UserError(f"{output}: is not empty and not a synthetic set; choose another output=FOLDER")
    else:
        output.mkdir(parents=True, exist_ok=True)
        _write(marker, settings.encode())


def _write(path: Path, data: bytes) -> None:
    # A killed run leaves whole files only, so that the next one may trust whatever it finds.
    unfinished = path.with_name(f".{path.name}.part")
    unfinished.write_bytes(data)
    os.replace(unfinished, path)
