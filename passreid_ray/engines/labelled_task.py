"""The labelled crops of a supervised run: who is on them, and what is odd about them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from passreid_ray.data import JUNK_PERSON_ID, Rows, Source, open_rows
from passreid_ray.errors import UserError


@dataclass(frozen=True)
class LabelledTask:
    """Rows with known people."""

    rows: Rows
    labels_N: NDArray[np.int64]
    """Person of each row, counted from 0 in the order of person_id."""

    @property
    def num_persons(self) -> int:
        """How many people there are."""
        return int(self.labels_N.max()) + 1

    def notes(self, batch_size: int, images_per_identity: int) -> list[str]:
        """What a user should know before training on batches of this size."""
        counts = np.bincount(self.labels_N)
        notes = []
        if single := int((counts == 1).sum()):
            notes.append(
                f"{single} of {self.num_persons} people have a single image, which stands {images_per_identity} times "
                "in their group, under different views"
            )
        if (people := batch_size // images_per_identity) > self.num_persons:
            notes.append(f"a batch has room for {people} people, the data has {self.num_persons}: they come again")
        return notes


def open_labelled_task(source: Source) -> LabelledTask:
    """The rows of ``source`` less junk; raises ``UserError`` when people are unknown or there is only one."""
    rows = open_rows(source)
    unknown = int(np.sum([person_id is None for person_id in rows.person_ids]))
    if unknown:
        raise UserError(
            f"data: {unknown} of {len(rows)} images have no person_id; supervised tuning needs them all. "
            "Without labels, tune with jobs/usl.py"
        )
    rows = rows.select(rows.person_ids != JUNK_PERSON_ID)
    if len(rows) == 0:
        raise UserError(f"data: all images are junk (person_id {JUNK_PERSON_ID}); there is nobody to learn from")
    labels_N = np.unique(rows.person_ids.astype(str), return_inverse=True)[1].astype(np.int64)
    if labels_N.max() == 0:
        raise UserError(
            f"data: all {len(rows)} images are of one person ({rows.person_ids[0]}); there is nobody to tell apart from"
        )
    return LabelledTask(rows, labels_N)
