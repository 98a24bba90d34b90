import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from passreid_ray.errors import UserError
from passreid_ray.retrieval import candidate_sets as module
from passreid_ray.retrieval.candidate_sets import ScoreOfIdentity, candidate_accuracy, candidate_sets


def random_case(seed: int, num_queries: int = 12) -> dict[str, Any]:
    """Noisy features of 7 persons in 3 cameras; the queries' persons are among them."""
    rng = np.random.default_rng(seed)
    centers_ID = rng.standard_normal((7, 6))
    gallery_ids, query_ids = rng.permutation(np.repeat(np.arange(7), 5)), rng.integers(0, 7, num_queries)
    return {
        "query_QD": centers_ID[query_ids] + 0.7 * rng.standard_normal((num_queries, 6)),
        "gallery_GD": centers_ID[gallery_ids] + 0.7 * rng.standard_normal((35, 6)),
        "gallery_ids": 10 * gallery_ids,
        "query_ids": 10 * query_ids,
        "query_cameras": rng.integers(0, 3, num_queries),
        "gallery_cameras": rng.integers(0, 3, 35),
    }


def literal_probabilities(case: dict[str, Any], score: str, temperature: float) -> list[dict[int, float]]:
    """Image by image: cosine, left out or not; then person by person."""
    result = []
    for query_D, person, camera in zip(case["query_QD"], case["query_ids"], case["query_cameras"], strict=True):
        cosines: dict[int, list[float]] = {int(other): [] for other in case["gallery_ids"]}
        rows = zip(case["gallery_GD"], case["gallery_ids"], case["gallery_cameras"], strict=True)
        for image_D, other, other_camera in rows:
            if (other, other_camera) != (person, camera):
                cosine = query_D @ image_D / math.sqrt((query_D @ query_D) * (image_D @ image_D))
                cosines[int(other)].append(cosine)
        scores = {
            other: max(all_) if score == "max" else sum(all_) / len(all_) for other, all_ in cosines.items() if all_
        }
        total = sum(math.exp(value / temperature) for value in scores.values())
        result.append({other: math.exp(value / temperature) / total for other, value in scores.items()})
    return result


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    score=st.sampled_from(["max", "mean"]),
    temperature=st.sampled_from([0.05, 0.3, 1.0]),
    k=st.integers(1, 5),
)
def test_sets_and_accuracies_equal_the_literal_ones(
    seed: int, score: ScoreOfIdentity, temperature: float, k: int
) -> None:
    case = random_case(seed)
    found = candidate_sets(**case, k=k, score=score, temperature=temperature)
    probabilities = literal_probabilities(case, score, temperature)
    for query, expected in enumerate(probabilities):
        for column, person in enumerate(found.identities_I):
            log_probability = found.log_probability_QI[query, column]
            assert math.exp(log_probability) == pytest.approx(expected.get(person, 0.0), abs=1e-5)
    # The Q * k most probable pairs of query and person, and nothing else.
    pairs = [(value, query, person) for query, row in enumerate(probabilities) for person, value in row.items()]
    chosen = sorted(pairs, reverse=True)[: 12 * k]
    for query in range(12):
        assert found.of_query(query).tolist() == [person for _, other, person in chosen if other == query]
    assert found.mean_size == pytest.approx(k)

    valid = [query for query in range(12) if case["query_ids"][query] in probabilities[query]]
    accuracy = candidate_accuracy(found, case["query_ids"])
    in_set = [(query, case["query_ids"][query]) in {(q, person) for _, q, person in chosen} for query in valid]
    in_top = []
    for query in valid:
        ranked = sorted((value, person) for person, value in probabilities[query].items())[::-1]
        in_top.append(case["query_ids"][query] in [person for _, person in ranked[:k]])
    assert accuracy.num_valid_queries == len(valid)
    assert accuracy.average_k == pytest.approx(np.mean(in_set))
    assert accuracy.top_k == pytest.approx(np.mean(in_top))
    assert accuracy.mean_size == pytest.approx(np.mean([len(found.of_query(query)) for query in valid]))


def test_half_certain_and_half_uniform_over_three_are_all_found_by_two_on_average() -> None:
    # Persons 0 and 4..: own direction, certain. Queries between 1, 2 and 3: as similar to each.
    gallery_GD = np.eye(5)
    between_D = np.array([0.0, 1.0, 1.0, 1.0, 0.0])
    query_QD = np.stack([*[np.eye(5)[0]] * 6, *[between_D] * 6])
    query_ids = [0] * 6 + [1, 2, 3] * 2
    found = candidate_sets(query_QD, gallery_GD, np.arange(5), 2, temperature=0.02)
    assert found.is_candidate_QI.sum(axis=1).tolist() == [1] * 6 + [3] * 6
    assert found.of_query(0).tolist() == [0]
    assert found.of_query(11).tolist() == [1, 2, 3]
    accuracy = candidate_accuracy(found, query_ids)
    assert accuracy.average_k == 1.0
    assert accuracy.top_k == pytest.approx(0.8333, abs=5e-5)
    assert accuracy.mean_size == found.mean_size == 2.0


def test_collapsed_features_get_no_candidates_and_the_top_of_chance() -> None:
    query_QD, gallery_GD = np.ones((4, 3)), np.ones((10, 3))
    found = candidate_sets(query_QD, gallery_GD, np.arange(10), 2)
    assert found.mean_size == 0
    assert found.of_query(0).tolist() == []
    accuracy = candidate_accuracy(found, [0, 1, 2, 3])
    assert (accuracy.average_k, accuracy.top_k) == (0.0, pytest.approx(2 / 10))


def test_as_many_candidates_as_identities_find_everybody() -> None:
    case = random_case(3)
    accuracy = candidate_accuracy(candidate_sets(**case, k=7), case["query_ids"])
    assert (accuracy.average_k, accuracy.top_k) == (1.0, 1.0)


def test_images_of_the_querys_camera_are_left_out_for_its_person_only() -> None:
    # The query's only good match is of its own camera; person 2 in that camera stays.
    features: dict[str, Any] = {
        "query_QD": [[1.0, 0.0]],
        "gallery_GD": [[1.0, 0.0], [0.0, 1.0], [1.0, 0.2]],
        "gallery_ids": [1, 1, 2],
    }
    cameras: dict[str, Any] = {"query_ids": [1], "query_cameras": [5], "gallery_cameras": [5, 6, 5]}
    assert candidate_sets(**features, k=1).of_query(0).tolist() == [1]
    assert candidate_sets(**features, k=1, **cameras).of_query(0).tolist() == [2]


def test_a_query_whose_person_is_only_in_its_own_camera_does_not_count() -> None:
    found = candidate_sets(
        np.eye(2), np.eye(2), [1, 2], 1, query_ids=[1, 2], query_cameras=[0, 0], gallery_cameras=[0, 1]
    )
    accuracy = candidate_accuracy(found, [1, 2])
    assert (accuracy.num_valid_queries, accuracy.average_k) == (1, 1.0)
    assert 1 not in found.of_query(0)
    assert candidate_accuracy(found, [9, 2]).num_valid_queries == 1  # 9 is nobody in the gallery


@pytest.mark.parametrize("score", ["max", "mean"])
def test_a_gallery_of_one_left_out_identity_gives_empty_sets(score: ScoreOfIdentity) -> None:
    found = candidate_sets([[1.0]], [[1.0]], [1], 1, score=score, query_ids=[1], query_cameras=[0], gallery_cameras=[0])
    assert found.log_probability_QI.tolist() == [[-np.inf]]
    assert found.mean_size == 0


def test_many_images_of_a_person_do_not_raise_a_mean_score() -> None:
    gallery_GD = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    query_QD = np.array([[1.0, 0.1]])
    assert candidate_sets(query_QD, gallery_GD, [1, 1, 2], 1, score="max").of_query(0).tolist() == [1]
    assert candidate_sets(query_QD, gallery_GD, [1, 1, 2], 1, score="mean").of_query(0).tolist() == [2]


@pytest.mark.parametrize("score", ["max", "mean"])
def test_neither_the_order_of_the_gallery_nor_the_blocks_change_the_sets(
    score: ScoreOfIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = random_case(5)
    expected = candidate_sets(**case, k=2, score=score)
    order = np.random.default_rng(0).permutation(35)
    shuffled = {name: case[name][order] for name in ("gallery_GD", "gallery_ids", "gallery_cameras")}
    monkeypatch.setattr(module, "_BLOCK_BYTES", 1000)
    found = candidate_sets(**(case | shuffled), k=2, score=score)
    np.testing.assert_array_equal(found.is_candidate_QI, expected.is_candidate_QI)
    np.testing.assert_allclose(found.log_probability_QI, expected.log_probability_QI, rtol=1e-5, atol=1e-5)


def test_a_low_temperature_keeps_the_order_of_improbable_persons() -> None:
    # As probabilities the second and the third are both 0, even in float64; their logarithms differ.
    found = candidate_sets([[1.0, 0.1, 0.3]], np.eye(3), [1, 2, 3], 2, temperature=0.0005)
    assert np.exp(found.log_probability_QI.astype(np.float64)).tolist() == [[1.0, 0.0, 0.0]]
    assert found.of_query(0).tolist() == [1, 3]


def test_ids_may_be_strings() -> None:
    found = candidate_sets(np.eye(2), np.eye(2), ["anna", "ben"], 1)
    assert found.of_query(1).tolist() == ["ben"]
    assert candidate_accuracy(found, ["anna", "ben"]).average_k == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k: 0 candidates of 7 identities in the gallery"),
        ({"k": 8}, "k: 8 candidates of 7 identities in the gallery"),
        ({"temperature": 0.0}, "temperature: expected a positive number, got 0.0"),
        ({"query_ids": None}, "query_ids: None with cameras"),
        ({"gallery_cameras": None}, "cameras: given for one of query and gallery only"),
        ({"query_cameras": [1]}, "cameras: expected 12 of query and 35 of gallery, as many as ids; got 1 and 35"),
        ({"gallery_GD": np.ones((3, 6))}, "features: 12 and 3 rows do not fit 12 queries and 35 gallery ids"),
        ({"query_QD": np.full((12, 6), np.nan)}, "query features: row 0 is not finite"),
        ({"query_QD": np.ones((0, 6))}, "features: 0 and 35 rows do not fit 12 queries"),
        (
            {"query_QD": np.ones((0, 6)), "query_ids": None, "query_cameras": None, "gallery_cameras": None},
            "features: 0 and 35 rows do not fit no queries and 35 gallery ids",
        ),
        ({"query_QD": np.ones((12, 5))}, "query is 5 wide, gallery 6; they must be of one model"),
        ({"gallery_ids": []}, "gallery ids: expected one whole number or string per row"),
    ],
)
def test_sets_that_cannot_be_made_are_refused(arguments: dict[str, Any], message: str) -> None:
    usable: dict[str, Any] = random_case(0) | {"k": 2}
    with pytest.raises(UserError, match=message):
        candidate_sets(**(usable | arguments))


@pytest.mark.parametrize(
    ("query_ids", "message"),
    [
        ([8, 9], "none of 2 queries has a match among 2 gallery identities"),
        ([1], "query ids: expected 2, one per query, got 1"),
        (["1", "2"], "ids: query has <U1, gallery has int64"),
    ],
)
def test_ids_that_do_not_fit_the_sets_are_refused(query_ids: Any, message: str) -> None:
    eye: NDArray[np.float64] = np.eye(2)
    with pytest.raises(UserError, match=message):
        candidate_accuracy(candidate_sets(eye, eye, [1, 2], 1), query_ids)
