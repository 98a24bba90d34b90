"""Looks at a data set before a long training: every image is decoded, labels are counted, both are judged.

Reads from top to bottom in the order it runs: settings, ``run``, what is looked at, what is written and printed.
"""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from rich.console import Console
from rich.table import Table

from passreid_ray.config import Section, UserPath, to_toml
from passreid_ray.data import JoinedSource, Rows, Source, SyntheticSource, open_rows
from passreid_ray.data.known_sets import check_known_set
from passreid_ray.data.packed import check_shards, read_manifest
from passreid_ray.data.parquet import ParquetSource
from passreid_ray.data.rows import join_rows
from passreid_ray.data.storage import locate
from passreid_ray.engines.data_pictures import write_contact_sheet, write_duplicates
from passreid_ray.engines.data_report import DataReport, Finding, TrainingPlan, findings
from passreid_ray.engines.image_counts import Alike, DuplicateCounts, Group, Spread, count_duplicates, count_images
from passreid_ray.engines.image_facts import look_at_rows
from passreid_ray.engines.label_counts import count_labels
from passreid_ray.engines.progress import PhaseLines
from passreid_ray.engines.ray_cluster import WorkersConfig, connect, num_cores
from passreid_ray.engines.row_blocks import RowBlocks
from passreid_ray.engines.run_folder import CONFIG_FILE, check_writable
from passreid_ray.errors import UserError

REPORT_FILE = "report.json"
QUARANTINE_FILE = "quarantine.jsonl"
DUPLICATES_FILE = "duplicates.jsonl"
CONTACT_SHEET = "contact_sheet.png"
DUPLICATES_SHEET = "duplicates.png"
WRITTEN = (REPORT_FILE, QUARANTINE_FILE, DUPLICATES_FILE, CONTACT_SHEET, DUPLICATES_SHEET)

IN_PROCESS_IMAGES = 512
"""Up to here the images are decoded before Ray would have started."""
BLOCK_IMAGES = (64, 2048)
BLOCKS_PER_CORE = 8
NUM_BAD_SHOWN = 5
NUM_MEMBERS_SHOWN = 20
NUM_CAMERAS_SHOWN = 20
STYLES = {"error": "bold red", "warning": "yellow", "note": None}


class InspectConfig(Section):
    """What is looked at."""

    data: Source = SyntheticSource()
    """The data set."""
    output: UserPath = Path("outputs/inspect")
    """Folder for report.json, lists of unusable and repeated images, and pictures."""
    sample: int | None = Field(default=None, ge=1)
    """Look at so many images, spread over the data; none: at all. Labels are always counted in all rows."""
    verify: bool = False
    """Compare the shards of packed data with the SHA-256 of their manifest, which reads all of them once more."""
    num_pictures: int = Field(default=60, ge=1)
    """Crops on the contact sheet, about."""
    plan: TrainingPlan = TrainingPlan()


def run(config: InspectConfig, console: Console | None = None) -> DataReport:
    """Look at the data and write what was found into ``config.output``.

    Raises:
        UserError: the data cannot be opened, or, after all is written, the first finding that is an error.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    rows, known_set = opened(config.data)
    check_packed(config.data, verify=config.verify)
    check_writable(config.output, "output")
    (config.output / CONFIG_FILE).write_text(to_toml(config), encoding="utf-8")
    numbers_N = numbers_to_look_at(len(rows), config.sample)
    if len(numbers_N) > IN_PROCESS_IMAGES:
        connect(WorkersConfig())
    console.print(f"{len(rows):,} images, looking at {len(numbers_N):,}")
    start = time.perf_counter()
    with PhaseLines(console) as progress:
        facts_N, bad = look_at_images(
            rows, numbers_N, RowBlocks(len(numbers_N), block_images(len(numbers_N)), progress)
        )
    seconds = time.perf_counter() - start
    report = DataReport(
        images=count_images(facts_N, [reason for _, reason in bad]),
        duplicates=count_duplicates(facts_N, rows.person_ids[numbers_N], rows.splits[numbers_N]),
        labels=count_labels(rows, config.plan.images_per_identity),
        known_set=tuple(known_set),
    )
    found = findings(report, config.plan)
    _write_lines(config.output / QUARANTINE_FILE, quarantine_records(rows, bad))
    _write_lines(config.output / DUPLICATES_FILE, duplicate_records(rows, numbers_N, report.duplicates))
    write_report(config.output / REPORT_FILE, report, found, rows, numbers_N, len(numbers_N) / seconds)
    write_pictures(config, rows, numbers_N, facts_N["format"] > 0, report)
    print_report(report, len(numbers_N) / seconds, console)
    for number, reason in bad[:NUM_BAD_SHOWN]:
        console.print(f"cannot be used: {rows.image_ids[number]}: {reason}", markup=False)
    for finding in found:
        console.print(f"{finding.level}: {finding.text}", style=STYLES[finding.level], markup=False)
    console.print(f"{', '.join(name for name in WRITTEN if (config.output / name).exists())} are in {config.output}")
    if found and found[0].level == "error":
        raise UserError(f"data: {found[0].text}")
    return report


def opened(source: Source) -> tuple[Rows, list[str]]:
    """The rows, and what their figures say of well-known public sets; joined sources are asked one by one."""
    if not isinstance(source, JoinedSource):
        rows = open_rows(source)
        return rows, check_known_set(rows, source.kind)
    parts = [open_rows(part) for part in source.sources]
    lines = [check_known_set(rows, part.kind) for rows, part in zip(parts, source.sources, strict=True)]
    return join_rows(parts), [f"{line} (data.sources.{n})" for n, own in enumerate(lines) for line in own]


def check_packed(source: Source, *, verify: bool) -> None:
    """Raise ``UserError`` when the shards of packed data are not as their manifest says."""
    for part in _parts(source):
        if isinstance(part, ParquetSource):
            filesystem, path = locate(part.path)
            manifest = read_manifest(filesystem, path)
            if manifest is not None:
                check_shards(manifest, filesystem, path, verify=verify)
            elif verify:
                raise UserError(
                    f"verify: {path} has no manifest.json to compare its files with; pack the data with jobs/pack.py, "
                    "or set verify=false"
                )
        elif verify:
            raise UserError(
                f"verify: only packed data has sums to compare with, not kind {part.kind}; set verify=false"
            )


def numbers_to_look_at(num_rows: int, sample: int | None) -> NDArray[np.int64]:
    """All row numbers, or ``sample`` of them spread evenly."""
    if sample is None or sample >= num_rows:
        return np.arange(num_rows)
    return np.linspace(0, num_rows - 1, sample).astype(np.int64)


def block_images(num_images: int) -> int | None:
    """Images of one task; None: all in this process."""
    if num_images <= IN_PROCESS_IMAGES:
        return None
    low, high = BLOCK_IMAGES
    return min(max(low, num_images // (BLOCKS_PER_CORE * num_cores())), high)


def look_at_images(
    rows: Rows, numbers_N: NDArray[np.int64], blocks: RowBlocks
) -> tuple[NDArray[np.void], list[tuple[int, str]]]:
    """``(N,)`` ``FACTS`` of the rows ``numbers_N``, and (row number, reason) of those that cannot be used."""
    found = blocks.collect("images", look_at_rows, rows, numbers_N)
    return np.concatenate([facts for facts, _ in found]), [each for _, bad in found for each in bad]


def quarantine_records(rows: Rows, bad: Sequence[tuple[int, str]]) -> Iterator[dict[str, Any]]:
    """Images that cannot be used, each with the reason."""
    for number, reason in bad:
        yield {"image_id": str(rows.image_ids[number]), "reason": reason}


def duplicate_records(
    rows: Rows, numbers_N: NDArray[np.int64], duplicates: DuplicateCounts
) -> Iterator[dict[str, Any]]:
    """Groups of images: ``same`` bytes, or ``near``."""
    for kind, groups in (("same", duplicates.same), ("near", duplicates.near)):
        for group in groups:
            yield {"kind": kind, "image_ids": _image_ids(rows, numbers_N, group)}


def write_pictures(
    config: InspectConfig, rows: Rows, numbers_N: NDArray[np.int64], is_good_N: NDArray[np.bool_], report: DataReport
) -> None:
    """The two sheets; none of an earlier look stays."""
    sheet, duplicates = config.output / CONTACT_SHEET, config.output / DUPLICATES_SHEET
    if not write_contact_sheet(rows, numbers_N[is_good_N], config.num_pictures, sheet):
        sheet.unlink(missing_ok=True)
    if not write_duplicates(rows, numbers_N, report.duplicates.examples, duplicates):
        duplicates.unlink(missing_ok=True)


def write_report(
    path: Path,
    report: DataReport,
    found: Sequence[Finding],
    rows: Rows,
    numbers_N: NDArray[np.int64],
    images_per_second: float,
) -> None:
    """All numbers and findings, for programs; there whole or not at all."""
    content: dict[str, Any] = asdict(replace(report, duplicates=replace(report.duplicates, same=(), near=())))
    content["duplicates"]["examples"] = [_example(rows, numbers_N, alike) for alike in report.duplicates.examples]
    del content["duplicates"]["same"], content["duplicates"]["near"]  # they have a file of their own
    content["findings"] = [asdict(finding) for finding in found]
    content["images_per_second"] = images_per_second
    content["fingerprint"] = rows.fingerprint()
    draft = path.with_name(f"{path.name}.part")
    draft.write_text(json.dumps(content, indent=1), encoding="utf-8")
    draft.replace(path)


def print_report(report: DataReport, images_per_second: float, console: Console) -> None:
    """The tables."""
    images, labels = report.images, report.labels
    formats = ", ".join(f"{count:,} {name}" for name, count in images.formats.items())
    console.print(
        f"{images.usable:,} usable, {images.bad:,} bad; {formats or 'no format'}; {images.total_bytes / 1e6:,.1f} MB; "
        f"{images_per_second:,.0f} images/s"
    )
    sizes = Table("", "smallest", *images.width_px.percentiles, "largest")
    for name, spread, form in (
        ("width px", images.width_px, ",.0f"),
        ("height px", images.height_px, ",.0f"),
        ("height / width", images.aspect, ".2f"),
        ("bytes", images.file_bytes, ",.0f"),
    ):
        sizes.add_row(name, *(format(value, form) for value in _values(spread)))
    console.print(sizes)
    if not labels.people.people:
        return
    people = Table("people", "images each", "one image", "one camera", "junk", "no label")
    each = f"{labels.people.images_min:,} to {labels.people.images_max:,}, median {labels.people.images_median:g}"
    one_camera = "?" if labels.people.single_camera is None else f"{labels.people.single_camera:,}"
    counts = (labels.people.single_image, labels.junk_images, labels.unlabelled_images)
    single, junk, unlabelled = (f"{count:,}" for count in counts)
    people.add_row(f"{labels.people.people:,}", each, single, one_camera, junk, unlabelled)
    console.print(people)
    console.print("splits: " + ", ".join(f"{count:,} {name}" for name, count in labels.splits.items()), markup=False)
    cameras = Table("camera", "images", "people")
    for name, own in list(labels.cameras.items())[:NUM_CAMERAS_SHOWN]:
        cameras.add_row(name, f"{own.images:,}", f"{own.people:,}")
    if len(labels.cameras) > NUM_CAMERAS_SHOWN:
        cameras.add_row(f"and {len(labels.cameras) - NUM_CAMERAS_SHOWN:,} more", "", "")
    if labels.cameras:
        console.print(cameras)


def _parts(source: Source) -> list[Any]:
    return list(source.sources) if isinstance(source, JoinedSource) else [source]


def _values(spread: Spread) -> list[float]:
    return [spread.smallest, *spread.percentiles.values(), spread.largest]


def _example(rows: Rows, numbers_N: NDArray[np.int64], alike: Alike) -> dict[str, Any]:
    return {"image_ids": _image_ids(rows, numbers_N, alike.positions[:NUM_MEMBERS_SHOWN]), "bits": alike.bits}


def _image_ids(rows: Rows, numbers_N: NDArray[np.int64], group: Group) -> list[str]:
    return rows.image_ids[numbers_N[list(group)]].tolist()


def _write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """A line for each record, there whole or not at all; no file without records, and none of an earlier look stays."""
    draft, has_lines = path.with_name(f"{path.name}.part"), False
    with draft.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")
            has_lines = True
    if has_lines:
        draft.replace(path)
    else:
        draft.unlink()
        path.unlink(missing_ok=True)
