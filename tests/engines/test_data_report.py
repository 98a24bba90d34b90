"""Findings appear exactly when their condition holds."""

from dataclasses import replace
from typing import Any

import pytest

from passreid_ray.engines.data_report import (
    LEVELS,
    MIN_PRETRAINING_IMAGES,
    DataReport,
    Finding,
    TrainingPlan,
    findings,
)
from passreid_ray.engines.image_counts import DuplicateCounts, ImageCounts, Spread
from passreid_ray.engines.label_counts import LabelCounts, PeopleCounts

PLAN = TrainingPlan()
NUM = 10_000


def spread(value: float) -> Spread:
    return Spread(value, dict.fromkeys(("p1", "p5", "p50", "p95", "p99"), value), value)


IMAGES = ImageCounts(
    looked_at=NUM,
    bad=0,
    bad_reasons={},
    total_bytes=NUM * 5000,
    formats={"JPEG": NUM},
    grey=0,
    dark=0,
    blank=0,
    narrow=0,
    lying=0,
    width_px=spread(128),
    height_px=spread(256),
    aspect=spread(2),
    area_px=spread(128 * 256),
    file_bytes=spread(5000),
)
DUPLICATES = DuplicateCounts(0, 0, {}, 0, 0, 0, {}, 0, 0, [], [], [])
PEOPLE = PeopleCounts(500, 8, 12.0, 30, 0, 0, 0, 4.0)
LABELS = LabelCounts(
    images=NUM,
    junk_images=0,
    unlabelled_images=0,
    images_without_camera=0,
    splits={"train": 6000, "query": 1000, "gallery": 3000},
    people=PEOPLE,
    training=PEOPLE,
    training_images=6000,
    cameras={},
    people_in_training_and_test=0,
    queries=1000,
    queries_without_match=0,
)
NO_PEOPLE = PeopleCounts(0, 0, 0.0, 0, 0, 0, None, None)
UNLABELLED = replace(LABELS, splits={"none": NUM}, people=NO_PEOPLE, training=NO_PEOPLE, training_images=NUM)
GOOD = DataReport(IMAGES, DUPLICATES, LABELS, ())


def changed(part: str, **values: Any) -> DataReport:
    """``GOOD`` with some numbers of one part replaced."""
    return replace(GOOD, **{part: replace(getattr(GOOD, part), **values)})


def added(report: DataReport, plan: TrainingPlan = PLAN) -> list[Finding]:
    """What is found of ``report`` and not of good data."""
    usual = findings(GOOD, PLAN)
    return [finding for finding in findings(report, plan) if finding not in usual]


def test_good_data_gets_only_the_steps_of_an_epoch_as_notes() -> None:
    assert [finding.level for finding in findings(GOOD, PLAN)] == ["note", "note"]
    first, second = (finding.text for finding in findings(GOOD, PLAN))
    assert "93 steps of 64 images" in first
    assert "31 steps of 16 people with 4 images each" in second


@pytest.mark.parametrize(
    ("part", "below", "above", "level", "words"),
    [
        ("images", {}, {"bad": 1, "bad_reasons": {"empty": 1}}, "warning", "1 of 10,000 images (0.01%) cannot be used"),
        ("duplicates", {}, {"same_across_splits": {"query + train": 3}}, "error", "query + train: 3"),
        ("duplicates", {}, {"same_across_splits": {"gallery + query": 1}}, "error", "gallery + query: 1"),
        ("duplicates", {}, {"same_across_splits": {"train + val": 1}}, "warning", "train + val: 1"),
        ("duplicates", {}, {"same_across_people": 2}, "warning", "2 images are there under more than one person_id"),
        ("duplicates", {}, {"near_pairs_across_splits": {"gallery + train": 5}}, "warning", "gallery + train: 5"),
        ("duplicates", {"near_pairs_across_splits": {"a + b": 5}}, {"near_pairs_across_people": 1}, "note", "1 pair"),
        ("duplicates", {}, {"same_copies": 1}, "note", "1 image (0.0%) with the same bytes"),
        ("duplicates", {"near_images": 100}, {"near_images": 101}, "note", "nearly the same"),
        ("duplicates", {}, {"near_images": 2001, "near_groups": 500}, "warning", "leaves 8,499 images"),
        ("duplicates", {}, {"skipped_comparisons": 1}, "note", "comparisons were left out"),
        ("images", {"narrow": 500}, {"narrow": 501}, "warning", "less than 32 pixels wide"),
        ("images", {"lying": 500}, {"lying": 501}, "warning", "wider than high"),
        ("images", {"aspect": spread(1.5)}, {"aspect": spread(1.49)}, "warning", "are these person crops"),
        ("images", {"aspect": spread(3.5)}, {"aspect": spread(3.6)}, "warning", "are these person crops"),
        ("images", {"height_px": spread(128)}, {"height_px": spread(99), "width_px": spread(50)}, "warning", "enlarge"),
        ("images", {"area_px": spread(131_072)}, {"area_px": spread(131_080)}, "warning", "longest_side_px=512"),
        ("images", {"file_bytes": spread(1e6)}, {"file_bytes": spread(1.5e6)}, "note", "larger than 1.5 MB"),
        ("images", {"grey": 100}, {"grey": 101}, "note", "the others by colour alone"),
        ("images", {}, {"grey": 5001}, "warning", "50% of the images are grey"),
        ("images", {}, {"blank": 1}, "warning", "1 image shows nothing but one colour"),
        ("images", {"dark": 500}, {"dark": 501}, "note", "very dark"),
        ("labels", {}, {"unlabelled_images": 1}, "warning", "1 of 10,000 images have no person_id"),
        ("labels", {}, {"people_in_training_and_test": 1}, "warning", "1 person is in training and in query"),
        ("labels", {}, {"training": replace(PEOPLE, too_few_images=125)}, "note", "(25%) have fewer than 4 images"),
        ("labels", {}, {"training": replace(PEOPLE, too_few_images=126)}, "warning", "have fewer than 4 images"),
        ("labels", {}, {"training": replace(PEOPLE, single_camera=1)}, "note", "1 of 500 training people"),
        ("labels", {}, {"training": replace(PEOPLE, single_camera=500)}, "warning", "all 500 training people"),
        ("labels", {}, {"training": replace(PEOPLE, single_camera=None)}, "note", "have no camera_id"),
        ("labels", {}, {"splits": {"train": 9000, "query": 1000}}, "warning", "no gallery split"),
        ("labels", {}, {"splits": {"train": 9000, "gallery": 1000}}, "warning", "no query split"),
        ("labels", {}, {"splits": {"train": 9999, "none": 1}}, "warning", "1 image has no split"),
        ("labels", {}, {"queries_without_match": 100}, "note", "100 of 1,000 queries"),
        ("labels", {"queries_without_match": None}, {"queries_without_match": 101}, "warning", "101 of 1,000 queries"),
        ("labels", {}, {"queries_without_match": 1000}, "error", "nothing can be evaluated"),
    ],
)  # fmt: skip
def test_a_finding_appears_when_its_condition_holds_and_not_before(
    part: str, below: dict[str, Any], above: dict[str, Any], level: str, words: str
) -> None:
    assert added(changed(part, **below)) == []
    (finding,) = added(changed(part, **above))
    assert finding.level == level
    assert words in finding.text


def test_too_many_bad_images_are_an_error_by_the_plan() -> None:
    report = changed("images", bad=100, bad_reasons={"empty": 90, "truncated": 10})
    (warning,) = added(report, TrainingPlan(max_bad_share=0.01))
    (error,) = added(report, TrainingPlan(max_bad_share=0.0099))
    assert (warning.level, error.level) == ("warning", "error")
    assert "(1.00%) cannot be used, most often: empty" in error.text


def test_without_a_usable_image_only_that_and_the_labels_are_judged() -> None:
    report = changed("images", bad=NUM, bad_reasons={"empty": NUM}, height_px=spread(0), width_px=spread(0))
    (error,) = added(report, TrainingPlan(max_bad_share=1))
    assert error.level == "error"


@pytest.mark.parametrize(("copies", "level"), [(100, "note"), (101, "warning")])
def test_many_copies_are_worth_a_warning(copies: int, level: str) -> None:
    (finding,) = added(changed("duplicates", same_copies=copies))
    assert finding.level == level


def test_few_images_are_a_warning_only_where_there_is_nothing_else_to_train_with() -> None:
    few = MIN_PRETRAINING_IMAGES - 1
    assert [f.level for f in added(changed("labels", training_images=few)) if "are few" in f.text] == ["note"]
    unlabelled = replace(GOOD, labels=replace(UNLABELLED, training_images=few))
    assert [f.level for f in added(unlabelled) if "are few" in f.text] == ["warning"]
    enough = replace(GOOD, labels=replace(UNLABELLED, training_images=few + 1))
    assert not [f for f in added(enough) if "are few" in f.text]


def test_data_without_identities_gets_no_findings_about_people() -> None:
    texts = " ".join(finding.text for finding in findings(replace(GOOD, labels=UNLABELLED), PLAN))
    assert "no identities" in texts
    assert "person_id" not in texts
    assert "training people" not in texts


def test_batches_that_the_data_does_not_fill_are_told() -> None:
    (images,) = added(GOOD, TrainingPlan(batch_size=6001, images_per_identity=50))[:1]
    assert images.level == "warning"
    assert "do not fill one batch of 6001" in images.text
    people = [f for f in added(GOOD, TrainingPlan(batch_size=2004)) if "a batch of 501 people" in f.text]
    assert [f.level for f in people] == ["warning"]
    assert not [f for f in added(GOOD, TrainingPlan(batch_size=2000)) if f.level != "note"]


def test_small_images_are_told_by_the_size_they_are_brought_to() -> None:
    report = changed("images", height_px=spread(128), width_px=spread(64), area_px=spread(8192))
    assert added(report) == []
    (finding,) = added(report, TrainingPlan(image_size_px=(384, 192)))
    assert "128 x 64 pixels (height x width), and 384 x 192 enlarges them 3.0 times" in finding.text


def test_known_sets_are_noted_and_their_differences_warned_of() -> None:
    lines = ("matches Market-1501", "gallery has 15,912 images, Market-1501 has 15,913")
    assert [finding.level for finding in added(replace(GOOD, known_set=lines))] == ["warning", "note"]


def test_a_sample_is_told() -> None:
    (finding,) = added(changed("images", looked_at=NUM - 1))
    assert "9,999 of 10,000 images were looked at" in finding.text


def test_errors_come_first_and_notes_last() -> None:
    report = replace(
        changed("images", grey=101, blank=1),
        duplicates=replace(DUPLICATES, same_across_splits={"query + train": 1}),
    )
    levels = [LEVELS.index(finding.level) for finding in findings(report, PLAN)]
    assert levels == sorted(levels)
    assert set(levels) == {0, 1, 2}
