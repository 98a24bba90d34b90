"""What the numbers of a data set mean for training: findings, each with what to do about it; pure functions of counts.

Thresholds are judgements, not measurements: they stand here as constants, each with its reason.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from passreid_ray.config import Section
from passreid_ray.engines.image_counts import NARROW_PX, DuplicateCounts, ImageCounts
from passreid_ray.engines.label_counts import GALLERY, NO_SPLIT, QUERY, LabelCounts, PeopleCounts
from passreid_ray.views.config import SizePx

Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note")

MAX_ENLARGEMENT = 2.0
"""Beyond twice its size an image has no more detail to give: most of the computation goes into blur."""
MAX_AREA_RATIO = 4.0
"""With more than four times a view's pixels, decoding costs more than making the views."""
MAX_FILE_BYTES = 1_000_000
"""A crop of this size is a photograph: reading it takes longer than decoding a crop."""
PERSON_ASPECT = (1.5, 3.5)
"""Median height over width of crops of standing people; 2 to 2.5 is usual."""
MAX_LYING_SHARE = 0.05
MAX_NARROW_SHARE = 0.05
MAX_DARK_SHARE = 0.05
SOME_GREY_SHARE = 0.01
MOSTLY_GREY_SHARE = 0.5
MAX_COPY_SHARE = 0.01
"""Below it, copies change no result."""
NEAR_SHARE_NOTED = 0.01
MAX_NEAR_SHARE = 0.2
"""When every fifth image has a near duplicate, the images are frames of videos, and an epoch shows few new ones."""
MIN_PRETRAINING_IMAGES = 5_000
"""Self-supervised pre-training on fewer learns their backgrounds; LUPerson has 4 million."""
MAX_TOO_FEW_SHARE = 0.25
"""Of the identities may have fewer than K images before the same views fill much of every batch."""
MAX_UNMATCHED_SHARE = 0.1


class TrainingPlan(Section):
    """How the data is meant to be trained on; findings refer to it."""

    batch_size: int = Field(default=64, ge=1)
    """Images of a batch, over all workers."""
    images_per_identity: int = Field(default=4, ge=1)
    """K of the batches of P identities with K images each."""
    image_size_px: SizePx = (256, 128)
    """Height and width that images are brought to."""
    max_bad_share: float = Field(default=0.05, ge=0, le=1)
    """An error when more than this share of the images cannot be used."""


@dataclass(frozen=True)
class Finding:
    """One line for people."""

    level: Level
    text: str


@dataclass(frozen=True)
class DataReport:
    """Everything that was counted."""

    images: ImageCounts
    duplicates: DuplicateCounts
    labels: LabelCounts
    known_set: tuple[str, ...]
    """What the figures say of the well-known public sets."""


def findings(report: DataReport, plan: TrainingPlan) -> list[Finding]:
    """What follows from the numbers: errors first, then warnings, then notes."""
    found = [*_bad(report.images, plan)]
    if report.images.usable:
        found += [
            *_leaks(report.duplicates),
            *_duplicates(report),
            *_sizes(report.images, plan),
            *_looks(report.images),
        ]
    found += [*_amount(report, plan), *_identities(report.labels, plan), *_evaluation(report.labels)]
    found += [Finding("note" if line.startswith("matches ") else "warning", line) for line in report.known_set]
    if report.images.looked_at < report.labels.images:
        found.append(
            Finding(
                "note",
                f"{report.images.looked_at:,} of {report.labels.images:,} images were looked at; duplicates are only "
                "found among those. sample=none looks at all",
            )
        )
    return sorted(found, key=lambda finding: LEVELS.index(finding.level))


def _bad(images: ImageCounts, plan: TrainingPlan) -> Iterator[Finding]:
    if not images.bad:
        return
    share = images.bad / images.looked_at
    reason = next(iter(images.bad_reasons), "unknown")
    text = (
        f"{images.bad:,} of {images.looked_at:,} images ({share:.2%}) cannot be used, most often: {reason}. "
        "quarantine.jsonl lists them"
    )
    if share > plan.max_bad_share or not images.usable:
        yield Finding("error", f"{text}. plan.max_bad_share={plan.max_bad_share:g}: repair or remove them first")
    else:
        yield Finding("warning", f"{text}. Training replaces them by others")


def _leaks(duplicates: DuplicateCounts) -> Iterator[Finding]:
    if leaks := _leaking(duplicates.same_across_splits):
        yield Finding(
            "error",
            f"the same image is in more than one split, {_listed(leaks)}: results on this data would be too good. "
            "Remove one of each; duplicates.jsonl lists them",
        )
    if near := _leaking(duplicates.near_pairs_across_splits):
        yield Finding(
            "warning",
            f"nearly the same image is in more than one split, pairs in {_listed(near)}: look at duplicates.png. "
            "Split by person and by time, not by image",
        )
    if others := {name: n for name, n in duplicates.same_across_splits.items() if name not in leaks}:
        yield Finding("warning", f"the same image is in more than one split, {_listed(others)}: remove one of each")
    if duplicates.same_across_people:
        yield Finding(
            "warning",
            f"{_many(duplicates.same_across_people, 'image is', 'images are')} there under more than one person_id: at "
            "most one of them is right. duplicates.jsonl lists them; correct the labels or remove the images",
        )
    if duplicates.near_pairs_across_people:
        yield Finding(
            "note",
            f"{_many(duplicates.near_pairs_across_people, 'pair', 'pairs')} of nearly the same image with different "
            "person_ids: look at duplicates.png for wrong labels",
        )


def _duplicates(report: DataReport) -> Iterator[Finding]:
    duplicates, usable = report.duplicates, report.images.usable
    if duplicates.same_copies:
        share = duplicates.same_copies / usable
        yield Finding(
            "warning" if share > MAX_COPY_SHARE else "note",
            f"{_many(duplicates.same_copies, 'image', 'images')} ({share:.1%}) with the same bytes as another one: "
            "remove what duplicates.jsonl lists, or pack with drop_duplicates=true",
        )
    near_share = duplicates.near_images / usable
    if near_share > MAX_NEAR_SHARE:
        yield Finding(
            "warning",
            f"{duplicates.near_images:,} images ({near_share:.0%}) are nearly the same as another one, as frames of a "
            f"video are: thin them out by duplicates.jsonl. One of each group leaves "
            f"{usable - duplicates.num_surplus:,} images",
        )
    elif near_share > NEAR_SHARE_NOTED:
        yield Finding(
            "note", f"{duplicates.near_images:,} images ({near_share:.1%}) are nearly the same as another one"
        )
    if duplicates.skipped_comparisons:
        yield Finding(
            "note",
            f"very many images look alike: {duplicates.skipped_comparisons:,} comparisons were left out, so there may "
            "be more near duplicates than were found",
        )


def _sizes(images: ImageCounts, plan: TrainingPlan) -> Iterator[Finding]:
    height_px, width_px = plan.image_size_px
    size = f"{images.height_px.median:.0f} x {images.width_px.median:.0f}"
    enlargement = min(height_px / images.height_px.median, width_px / images.width_px.median)
    if enlargement > MAX_ENLARGEMENT:
        yield Finding(
            "warning",
            f"half of the images are smaller than {size} pixels (height x width), and {height_px} x {width_px} "
            f"enlarges them {enlargement:.1f} times: a smaller image size costs less and loses little",
        )
    area_ratio = images.area_px.median / (height_px * width_px)
    if area_ratio > MAX_AREA_RATIO:
        yield Finding(
            "warning",
            f"half of the images have more than {area_ratio:.0f} times the pixels of {height_px} x {width_px}, so most "
            f"time goes into decoding: pack them with longest_side_px={2 * max(height_px, width_px)}",
        )
    elif images.file_bytes.percentiles["p99"] > MAX_FILE_BYTES:
        yield Finding(
            "note",
            f"one image in a hundred is larger than {images.file_bytes.percentiles['p99'] / 1e6:.1f} MB: pack them "
            f"with longest_side_px={2 * max(height_px, width_px)}",
        )
    low, high = PERSON_ASPECT
    if not low <= images.aspect.median <= high:
        yield Finding(
            "warning",
            f"height is {images.aspect.median:.2f} times the width in the median, of crops of standing people about 2: "
            "are these person crops? Look at contact_sheet.png",
        )
    elif images.lying > MAX_LYING_SHARE * images.usable:
        yield Finding(
            "warning",
            f"{_many(images.lying, 'image is', 'images are')} wider than high ({images.lying / images.usable:.0%}): "
            "person crops, and upright? Look at contact_sheet.png",
        )
    if images.narrow > MAX_NARROW_SHARE * images.usable:
        yield Finding(
            "warning",
            f"{_many(images.narrow, 'image is', 'images are')} less than {NARROW_PX} pixels wide "
            f"({images.narrow / images.usable:.0%}): leave such images out, little can be learnt from them",
        )


def _looks(images: ImageCounts) -> Iterator[Finding]:
    grey_share = images.grey / images.usable
    if grey_share > MOSTLY_GREY_SHARE:
        yield Finding(
            "warning",
            f"{grey_share:.0%} of the images are grey: colour augmentation does nothing for them, and weights learnt "
            "from colour fit less well",
        )
    elif grey_share > SOME_GREY_SHARE:
        yield Finding(
            "note",
            f"{_many(images.grey, 'image is', 'images are')} grey ({grey_share:.1%}), as infrared images are: the "
            "network may tell them from the others by colour alone, so turn some colour images grey too",
        )
    if images.blank:
        yield Finding(
            "warning", f"{_many(images.blank, 'image shows', 'images show')} nothing but one colour: remove such images"
        )
    if images.dark > MAX_DARK_SHARE * images.usable:
        yield Finding(
            "note", f"{_many(images.dark, 'image is', 'images are')} very dark ({images.dark / images.usable:.0%})"
        )


def _amount(report: DataReport, plan: TrainingPlan) -> Iterator[Finding]:
    labels, batch_size = report.labels, plan.batch_size
    if not labels.training_images:
        return
    images = labels.training_images
    if images < batch_size:
        yield Finding(
            "warning",
            f"{images:,} training images do not fill one batch of {batch_size} (plan.batch_size): lower batch_size",
        )
    else:
        yield Finding(
            "note",
            f"an epoch of pre-training is {_many(images // batch_size, 'step', 'steps')} of {batch_size} images "
            "(plan.batch_size)",
        )
    if images < MIN_PRETRAINING_IMAGES:
        yield Finding(
            "note" if labels.people.people else "warning",
            f"{images:,} training images are few for pre-training, which wants {MIN_PRETRAINING_IMAGES:,} and more: "
            "start from a pre-trained checkpoint and tune it",
        )


def _identities(labels: LabelCounts, plan: TrainingPlan) -> Iterator[Finding]:
    if not labels.people.people:
        yield Finding("note", "no identities: pre-train and cluster with this data; tuning and evaluation need labels")
        return
    if labels.unlabelled_images:
        yield Finding(
            "warning",
            f"{labels.unlabelled_images:,} of {labels.images:,} images have no person_id: supervised tuning and "
            "evaluation refuse splits with such images",
        )
    if labels.training.people:
        yield from _training_people(labels.training, plan)
    if labels.people_in_training_and_test:
        yield Finding(
            "warning",
            f"{_many(labels.people_in_training_and_test, 'person is', 'people are')} in training and in query or "
            "gallery: results will be better than on people never seen. Give every person to one side",
        )


def _training_people(people: PeopleCounts, plan: TrainingPlan) -> Iterator[Finding]:
    per_identity = plan.images_per_identity
    per_batch = max(1, plan.batch_size // per_identity)
    if people.people < per_batch:
        yield Finding(
            "warning",
            f"a batch of {per_batch} people with {per_identity} images each is more than the {people.people:,} "
            "training people there are: lower batch_size, or the same people come again in it",
        )
    else:
        yield Finding(
            "note",
            f"tuning shows a training person once in {_many(people.people // per_batch, 'step', 'steps')} of "
            f"{per_batch} people with {per_identity} images each (plan)",
        )
    if people.too_few_images:
        share = people.too_few_images / people.people
        yield Finding(
            "warning" if share > MAX_TOO_FEW_SHARE else "note",
            f"{people.too_few_images:,} of {people.people:,} training people ({share:.0%}) have fewer than "
            f"{per_identity} images, so theirs come again in a batch: lower images_per_identity or leave them out",
        )
    if people.single_camera is None:
        yield Finding("note", "some training images have no camera_id: batches cannot mix cameras on purpose")
    elif people.single_camera:
        is_all = people.single_camera == people.people
        yield Finding(
            "warning" if is_all else "note",
            f"{'all' if is_all else f'{people.single_camera:,} of'} {people.people:,} training people are seen by one "
            "camera only: nothing about changes between cameras is learnt from them",
        )


def _evaluation(labels: LabelCounts) -> Iterator[Finding]:
    has_query, has_gallery = QUERY in labels.splits, GALLERY in labels.splits
    if has_query != has_gallery:
        there, missing = (QUERY, GALLERY) if has_query else (GALLERY, QUERY)
        yield Finding("warning", f"there is a {there} split and no {missing} split: evaluation needs both")
    if NO_SPLIT in labels.splits and len(labels.splits) > 1:
        yield Finding(
            "warning",
            f"{_many(labels.splits[NO_SPLIT], 'image has', 'images have')} no split while others do: name theirs too",
        )
    if not labels.queries_without_match:
        return
    unmatched, share = labels.queries_without_match, labels.queries_without_match / labels.queries
    text = (
        f"{unmatched:,} of {labels.queries:,} queries without an image of their person by another camera in the "
        "gallery: they do not count"
    )
    if unmatched == labels.queries:
        yield Finding("error", f"{text}, so nothing can be evaluated. Check person_id and camera_id of both splits")
    else:
        yield Finding("warning" if share > MAX_UNMATCHED_SHARE else "note", text)


def _leaking(across_splits: Mapping[str, int]) -> dict[str, int]:
    """Those that join query with gallery, or one of them with training."""
    return {name: n for name, n in across_splits.items() if set(name.split(" + ")) & {QUERY, GALLERY}}


def _listed(across_splits: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in sorted(across_splits.items()))


def _many(number: int, one: str, several: str) -> str:
    return f"{number:,} {one if number == 1 else several}"
