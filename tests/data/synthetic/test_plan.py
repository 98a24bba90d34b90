from collections import Counter

import numpy as np
import pytest

from passreid_ray.data.synthetic import SyntheticSource, synthetic_rows
from passreid_ray.data.synthetic.plan import shots


@pytest.mark.parametrize("images", ["uniform", "zipf"])
@pytest.mark.parametrize("num_cameras", [2, 3, 6])
@pytest.mark.parametrize("images_per_person", [4, 5, 6, 7, 12, 30])
def test_every_query_has_a_match_by_another_camera(images: str, num_cameras: int, images_per_person: int) -> None:
    source = SyntheticSource.model_validate(
        {"num_people": 20, "num_cameras": num_cameras, "images_per_person": images_per_person, "images": images}
    )
    plan = list(shots(source))
    gallery = {(shot.person, shot.camera) for shot in plan if shot.split == "gallery"}
    queries = [shot for shot in plan if shot.split == "query"]
    assert {shot.person for shot in queries} == set(range(2, 21, 2))
    for query in queries:
        assert any(person == query.person and camera != query.camera for person, camera in gallery)


def test_half_of_the_people_train_and_nobody_is_on_both_sides() -> None:
    rows = synthetic_rows(SyntheticSource(num_people=30))
    train = set(rows.person_ids[rows.splits == "train"])
    test = set(rows.person_ids[rows.splits != "train"])
    assert len(train) == len(test) == 15
    assert not train & test


def test_a_person_has_one_query_per_camera() -> None:
    rows = synthetic_rows(SyntheticSource(num_people=10, num_cameras=4, images_per_person=16))
    query = rows.with_split("query")
    counts = Counter(zip(query.person_ids, query.camera_ids, strict=True))
    assert len(counts) == 5 * 4
    assert set(counts.values()) == {1}


def test_a_larger_set_contains_the_smaller_one() -> None:
    small = synthetic_rows(SyntheticSource(num_people=6, images_per_person=8))
    large = synthetic_rows(SyntheticSource(num_people=9, images_per_person=12))
    assert set(small.image_ids) < set(large.image_ids)


def test_zipf_sizes_have_the_mean_asked_for_and_a_long_tail() -> None:
    sizes = np.array(list(Counter(s.person for s in shots(SyntheticSource(num_people=2000, images="zipf"))).values()))
    assert sizes.mean() == pytest.approx(12, rel=0.05)
    assert np.median(sizes) < 9
    assert sizes.max() > 60
    assert sizes.min() >= 4
