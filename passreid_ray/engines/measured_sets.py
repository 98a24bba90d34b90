"""The data sets that an evaluation measures on, checked before a cluster is started."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from passreid_ray.data import JUNK_PERSON_ID, Rows, Source, open_rows
from passreid_ray.data.known_sets import DISTRACTOR_PERSON_ID, check_known_set
from passreid_ray.engines.evaluate_config import EvaluateConfig
from passreid_ray.engines.scoring import labelled_rows, protocol_notes
from passreid_ray.errors import UserError
from passreid_ray.retrieval.few_shot import episode_pool


@dataclass(frozen=True)
class MeasuredSet:
    """Labelled rows to measure on."""

    name: str
    rows: Rows
    """Query and gallery."""
    notes: list[str]
    """What of them counts; which well-known data set this is, or how it differs from it."""
    distractors: tuple[str, ...]
    """person_ids that are of many people."""


def open_sets(config: EvaluateConfig) -> list[MeasuredSet]:
    """The data sets of ``config``; raises ``UserError`` when a split or the identities of one are missing."""
    sources = config.cross.data or [config.data]
    sets: list[MeasuredSet] = []
    for index, source in enumerate(sources):
        every, where = open_rows(source), f"cross.data.{index}" if config.cross.data else "data"
        rows = labelled_rows(every, config.retrieval, where)
        notes = [*protocol_notes(every, config.retrieval), *check_known_set(every, source.kind)]
        distractors = (JUNK_PERSON_ID, *([DISTRACTOR_PERSON_ID] if source.kind == "market1501" else []))
        name = _name(source)
        same = sum(known.name.partition(" #")[0] == name for known in sets)
        sets.append(MeasuredSet(f"{name} #{same + 1}" if same else name, rows, notes, distractors))
        check_people(config, sets[-1], where)
    return sets


def check_people(config: EvaluateConfig, test_set: MeasuredSet, where: str) -> None:
    """Raise ``UserError`` when there are too few people for the shortlists or the episodes that are asked for."""
    rows = test_set.rows
    is_person = ~np.isin(rows.person_ids.astype(str), test_set.distractors)
    people = len(np.unique(rows.person_ids[is_person & (rows.splits == config.retrieval.gallery)].astype(str)))
    if config.candidates.k > people:
        raise UserError(
            f"candidates.k: {config.candidates.k} candidates, but the gallery of {where} has {people} people"
        )
    few_shot = config.few_shot
    if not few_shot.episodes:
        return
    has_cameras = all(camera_id is not None for camera_id in rows.camera_ids)
    if few_shot.cross_camera and not has_cameras:
        raise UserError(
            f"few_shot.cross_camera: some images of {where} have no camera_id; set it to false, or give cameras"
        )
    persons = rows.person_ids[is_person].astype(str)
    cameras = rows.camera_ids[is_person].astype(str) if has_cameras else None
    for shot in few_shot.shots:
        pool = episode_pool(persons, cameras, shot=shot, cross_camera=few_shot.cross_camera)
        if pool.num_eligible < few_shot.way:
            raise UserError(
                f"few_shot.way: {few_shot.way} people in an episode, but {pool.num_eligible} of {where} have enough "
                f"images for {shot} shots and a query; lower few_shot.way or few_shot.shots"
            )


def _name(source: Source) -> str:
    """What a data set is called in tables: its folder's name, or its kind."""
    place = getattr(source, "root", None) or getattr(source, "path", None)
    return source.kind if place is None else Path(str(place)).resolve().name
