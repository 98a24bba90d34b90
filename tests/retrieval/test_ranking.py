import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from passreid_ray.errors import UserError
from passreid_ray.retrieval import RankingResult, cosine_distance, distinct, evaluate_ranking, ranking
from tests.reference.literal_ranking import literal_ranking

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "evaluation_rerank.npz", allow_pickle=False))
LABELS = [GOLDEN[name] for name in ("q_pid", "g_pid", "q_cam", "g_cam")]


def evaluate(distance: Any, labels: list[Any], **settings: int) -> RankingResult:
    return evaluate_ranking(None, None, *labels, distance=distance, **settings)


def random_case(seed: int, num_levels: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Distances of ``num_levels`` values (many ties), and ids and cameras of query and gallery."""
    rng = np.random.default_rng(seed)
    num_queries, num_gallery = rng.integers(1, 8), rng.integers(1, 30)
    labels = [rng.integers(0, 4, size) for size in (num_queries, num_gallery) * 2]
    return rng.integers(0, num_levels, (num_queries, num_gallery)) / num_levels, labels


def assert_equal(found: RankingResult, expected: RankingResult) -> None:
    assert (found.mAP, found.mINP, found.num_valid_queries) == (expected.mAP, expected.mINP, expected.num_valid_queries)
    np.testing.assert_array_equal(found.cmc, expected.cmc)
    np.testing.assert_array_equal(found.average_precision_Q, expected.average_precision_Q)


def test_numbers_equal_all_reference_evaluators_without_ties() -> None:
    found = evaluate(GOLDEN["dist"], LABELS, max_rank=100)
    for evaluator in ("pass_cc", "pass_transreid", "fastreid_py"):
        assert abs(found.mAP - GOLDEN[f"{evaluator}/mAP"]) < 1e-12
    assert found.num_valid_queries == GOLDEN["n_valid_queries"]
    np.testing.assert_allclose(found.cmc, GOLDEN["pass_cc/cmc100"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.cmc[:50], GOLDEN["fastreid_py/cmc50"], rtol=0, atol=1e-7)
    average_precision = found.average_precision_Q[~np.isnan(found.average_precision_Q)]
    np.testing.assert_allclose(average_precision, GOLDEN["fastreid_py/AP"], rtol=0, atol=1e-12)
    assert abs(found.mINP - GOLDEN["fastreid_py/mINP"]) < 1e-12


def test_average_precision_of_ties_is_that_of_the_order_free_reference_evaluator() -> None:
    expected = GOLDEN["tied/pass_cc_mAP(sklearn, tie-grouped, order-free)"]
    assert abs(evaluate(GOLDEN["tied_dist"], LABELS).mAP - expected) < 1e-12


@settings(deadline=None)  # the machine may be busy
@given(seed=st.integers(0, 2**32), num_levels=st.integers(1, 40))
def test_numbers_equal_the_literal_protocol(seed: int, num_levels: int) -> None:
    distance, labels = random_case(seed, num_levels)
    query_ids, gallery_ids, query_cameras, gallery_cameras = labels
    valid = [
        bool(((gallery_ids == person) & (gallery_cameras != camera)).any())
        for person, camera in zip(query_ids, query_cameras, strict=True)
    ]
    assume(any(valid))
    found = evaluate(distance, labels, max_rank=12)
    expected = literal_ranking(distance, *labels, max_rank=12)
    assert abs(found.mAP - expected.mAP) < 1e-12
    assert abs(found.mINP - expected.mINP) < 1e-12
    np.testing.assert_allclose(found.cmc, expected.cmc, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.average_precision_Q, expected.average_precision, rtol=0, atol=1e-12)
    assert found.num_valid_queries == sum(valid)


@settings(deadline=None)  # the machine may be busy
@given(seed=st.integers(0, 2**32), num_levels=st.integers(1, 40))
def test_the_order_of_the_gallery_changes_nothing(seed: int, num_levels: int) -> None:
    distance, labels = random_case(seed, num_levels)
    query_ids, gallery_ids, query_cameras, gallery_cameras = labels
    assume(np.isin(query_ids, gallery_ids).any())
    order = np.random.default_rng(seed).permutation(len(gallery_ids))
    try:
        expected = evaluate(distance, labels)
    except UserError:
        assume(False)
        raise
    shuffled = [query_ids, gallery_ids[order], query_cameras, gallery_cameras[order]]
    assert_equal(evaluate(distance[:, order], shuffled), expected)


def test_the_order_of_a_gallery_with_repeated_features_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    query_QD = rng.standard_normal((7, 33)).astype(np.float32)
    gallery_GD = rng.standard_normal((20, 33)).astype(np.float32)[rng.integers(0, 20, 101)]
    query_ids, gallery_ids = rng.integers(0, 5, 7), rng.integers(0, 5, 101)
    expected = evaluate_ranking(query_QD, gallery_GD, query_ids, gallery_ids, None, None)
    for _ in range(5):
        order = rng.permutation(101)
        found = evaluate_ranking(query_QD, gallery_GD[order], query_ids, gallery_ids[order], None, None)
        assert_equal(found, expected)


def test_collapsed_features_find_nobody() -> None:
    collapsed = np.random.default_rng(0).standard_normal((1, 517)).astype(np.float32)
    gallery_ids = np.repeat(np.arange(10), 13)
    found = evaluate_ranking(
        collapsed.repeat(10, 0), collapsed.repeat(130, 0), np.arange(10), gallery_ids, None, None, max_rank=130
    )
    assert found.mAP == pytest.approx(13 / 130)
    assert found.mINP == pytest.approx(13 / 130)
    assert np.flatnonzero(found.cmc)[0] + 1 == 130 - 13 + 1  # after every other person


def test_features_are_compared_by_cosine_distance_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    query_QD, gallery_GD = rng.standard_normal((9, 8)), 5 * rng.standard_normal((40, 8))
    labels = [rng.integers(0, 6, size) for size in (9, 40, 9, 40)]
    expected = evaluate(cosine_distance(query_QD, gallery_GD), labels)
    for block_bytes in (1, 1000, 10**9):
        monkeypatch.setattr(ranking, "_BLOCK_BYTES", block_bytes)
        assert_equal(evaluate_ranking(query_QD, gallery_GD, *labels), expected)
        assert_equal(evaluate_ranking(torch.tensor(query_QD), torch.tensor(gallery_GD), *labels), expected)


def test_a_perfect_order_scores_one_everywhere() -> None:
    ids = np.arange(5)
    found = evaluate(1 - np.eye(5), [ids, ids, np.zeros(5, int), np.ones(5, int)], max_rank=7)
    assert (found.mAP, found.mINP, found.cmc.tolist(), found.num_valid_queries) == (1, 1, [1] * 7, 5)


def test_the_same_person_in_the_same_camera_is_left_out() -> None:
    # Query of person 1, camera 0. Gallery by distance: the query's own camera, another person, the match.
    labels = [np.array([1]), np.array([1, 2, 1]), np.array([0]), np.array([0, 0, 3])]
    found = evaluate([[0.1, 0.2, 0.3]], labels, max_rank=3)
    assert (found.mAP, found.mINP, found.cmc.tolist()) == (0.5, 0.5, [0, 1, 1])
    without_cameras = evaluate([[0.1, 0.2, 0.3]], [*labels[:2], None, None], max_rank=3)
    assert without_cameras.mAP == pytest.approx((1 + 2 / 3) / 2)
    assert without_cameras.cmc.tolist() == [1, 1, 1]


def test_queries_without_a_match_do_not_count() -> None:
    labels = [np.array([1, 9]), np.array([1, 2]), np.array([0, 0]), np.array([1, 1])]
    found = evaluate([[0.2, 0.1], [0.1, 0.2]], labels, max_rank=2)
    assert (found.num_valid_queries, found.mAP, found.cmc.tolist()) == (1, 0.5, [0, 1])
    assert found.average_precision_Q[0] == 0.5
    assert np.isnan(found.average_precision_Q[1])


@pytest.mark.parametrize("as_type", [list, np.array, lambda values: np.array(values, dtype=object)])
def test_ids_and_cameras_may_be_strings(as_type: Any) -> None:
    named = [as_type([f"person {label}" for label in labels]) for labels in LABELS]
    assert_equal(evaluate(GOLDEN["dist"], named), evaluate(GOLDEN["dist"], LABELS))


def test_the_given_distances_are_not_changed() -> None:
    distance = GOLDEN["dist"].copy()
    evaluate(distance, LABELS)
    assert np.array_equal(distance, GOLDEN["dist"])


@pytest.mark.parametrize(
    "values",
    [
        [-1.7e308, -1e-308, -0.0, 0.0, 5e-324, 1e-308, 3.0, 1.7e308],
        [1, 1 + 2.0**-52, 1 + 2.0**-51, 1 + 2.0**-50],
        [5e-324, 1e-323, 1.5e-323],
        [0.0, 1e-300, 1e300],
    ],
)
def test_float64_distances_of_any_size_are_ranked(values: list[float]) -> None:
    rng = np.random.default_rng(0)
    distance = np.array(values)[rng.integers(0, len(values), (20, 60))]
    labels = [rng.integers(0, 4, size) for size in (20, 60, 20, 60)]
    # Only the order counts, so whole numbers in the same order must score the same.
    whole = np.unique(distance, return_inverse=True)[1].reshape(distance.shape).astype(np.float64)
    found, expected = evaluate(distance, labels), literal_ranking(whole, *labels, max_rank=50)
    np.testing.assert_allclose(found.average_precision_Q, expected.average_precision, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.cmc, expected.cmc, rtol=0, atol=1e-12)
    assert abs(found.mINP - expected.mINP) < 1e-12


def test_many_matches_at_few_distances_are_ranked() -> None:
    rng = np.random.default_rng(0)
    distance = rng.integers(0, 3000, (3, 9000)).astype(np.float32)  # several matches in every bin
    labels = [rng.integers(0, 2, size) for size in (3, 9000, 3, 9000)]
    found, expected = evaluate(distance, labels), literal_ranking(distance, *labels, max_rank=50)
    np.testing.assert_allclose(found.average_precision_Q, expected.average_precision, rtol=0, atol=1e-12)
    assert abs(found.mINP - expected.mINP) < 1e-12


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", ">f8", "f2", "i4", "u1", "g"])
def test_distances_of_any_type_and_layout_are_taken(dtype: str) -> None:
    rng = np.random.default_rng(0)
    whole = rng.integers(0, 100, (9, 40))
    labels = [rng.integers(0, 4, size) for size in (9, 40, 9, 40)]
    expected = evaluate(whole.astype(np.float32), labels)
    distance = whole.astype(dtype)
    assert_equal(evaluate(np.asfortranarray(distance), labels), expected)
    assert_equal(evaluate(distance.repeat(2, axis=1)[:, ::2], labels), expected)
    distance.setflags(write=False)
    assert_equal(evaluate(distance, labels), expected)


def test_distances_in_a_file_are_read_block_by_block(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "distance.npy", rng.random((2000, 4000), np.float32))
    labels = [rng.integers(0, 50, size) for size in (2000, 4000, 2000, 4000)]
    distance = np.load(tmp_path / "distance.npy", mmap_mode="r")
    evaluate(distance[:9], [labels[0][:9], labels[1], labels[2][:9], labels[3]])  # compiles
    tracemalloc.start()
    try:
        found = evaluate(distance, labels)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < distance.nbytes / 3
    assert_equal(found, evaluate(np.array(distance), labels))


def test_features_take_memory_for_one_copy_and_a_block_of_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "_BLOCK_BYTES", 10**6)
    monkeypatch.setattr(distinct, "_BLOCK_BYTES", 10**6)
    rng = np.random.default_rng(0)
    query_QD, gallery_GD = rng.random((200, 400), np.float32), rng.random((20_000, 400), np.float32)
    labels = [rng.integers(0, 50, size) for size in (200, 20_000, 200, 20_000)]
    evaluate_ranking(query_QD[:9], gallery_GD, labels[0][:9], labels[1], labels[2][:9], labels[3])  # compiles
    tracemalloc.start()
    try:
        evaluate_ranking(query_QD, gallery_GD, *labels)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1.3 * gallery_GD.nbytes


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_row_of_a_distance_that_is_not_finite_is_named(
    value: float, dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    distance = np.ones((7, 3), dtype)
    distance[5, 2] = value
    for copy_bytes in (1, 50, 10**6):
        monkeypatch.setattr(ranking, "_COPY_BYTES", copy_bytes)
        with pytest.raises(UserError, match="distance: row 5 is not finite"):
            evaluate(distance, [np.ones(7, int), np.ones(3, int), None, None])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query_ids": [7, 8]}, "none of 2 queries has a match among 3 gallery images of another camera"),
        ({"query_ids": ["1", "2"]}, "ids: query has <U1, gallery has int64"),
        ({"query_ids": [[1], [2]]}, "query ids: expected one whole number or string per row"),
        ({"gallery_ids": []}, "gallery ids: expected one whole number or string per row"),
        ({"gallery_ids": [0.5, 1.0, 2.0]}, "gallery ids: expected one whole number or string per row, got float64"),
        ({"query_cameras": None}, "cameras: given for one of query and gallery only"),
        ({"query_cameras": [0]}, "cameras: expected 2 of query and 3 of gallery, as many as ids; got 1 and 3"),
        ({"max_rank": 0}, "max_rank: expected at least 1, got 0"),
        ({"distance": np.full((2, 3), np.nan)}, "distance: row 0 is not finite"),
        ({"distance": np.zeros((3, 2))}, r"distance: expected the shape \(2, 3\)"),
        ({"distance": [["near", "far", "far"]] * 2}, r"distance: expected .* of <U4"),
        ({"distance": None}, "give the features of query and gallery"),
        ({"query_QD": np.eye(2), "gallery_GD": np.ones((3, 2))}, "give the features of query and gallery"),
        (
            {"query_QD": np.eye(2), "gallery_GD": np.full((3, 2), np.nan), "distance": None},
            "gallery features: row 0 is not finite",
        ),
        ({"query_QD": np.eye(3), "gallery_GD": np.ones((3, 3)), "distance": None}, "features: 3 and 3 rows"),
        ({"query_QD": np.eye(2), "gallery_GD": np.ones((3, 5)), "distance": None}, "features are 2 and 5 wide"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(arguments: dict[str, Any], message: str) -> None:
    usable = {
        "query_QD": None,
        "gallery_GD": None,
        "query_ids": [1, 2],
        "gallery_ids": [1, 2, 2],
        "query_cameras": [0, 0],
        "gallery_cameras": [1, 1, 1],
        "distance": np.ones((2, 3)),
    }
    with pytest.raises(UserError, match=message):
        evaluate_ranking(**(usable | arguments))
