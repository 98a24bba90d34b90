from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from passreid_ray.errors import UserError
from passreid_ray.retrieval.few_shot import (
    Episode,
    EpisodePool,
    draw_episode,
    episode_pool,
    few_shot_accuracies,
    few_shot_summary,
    prototype_logits,
)

EPISODES = range(1000)
NUM_EACH = 200
PERSONS = np.repeat(np.arange(20), NUM_EACH)


def noisy_centers(noise: float, signal: float = 1.0) -> NDArray[np.float32]:
    """200 images of each of 20 identities: a unit center in 64 dimensions, plus noise in every dimension."""
    rng = np.random.default_rng(0)
    centers_ID = rng.standard_normal((20, 64))
    centers_ID /= np.linalg.norm(centers_ID, axis=1, keepdims=True)
    return (signal * centers_ID[PERSONS] + noise * rng.standard_normal((len(PERSONS), 64))).astype(np.float32)


def accuracies(features_ND: NDArray, episodes: range = EPISODES, **settings: Any) -> NDArray[np.float64]:
    usual: dict[str, Any] = {"num_queries": 15, "cross_camera": False}
    return few_shot_accuracies(features_ND, PERSONS, None, episodes, **(usual | settings))


def random_labels(seed: int, num_rows: int = 120) -> tuple[NDArray, NDArray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 12, num_rows), rng.integers(0, 4, num_rows)


def test_features_without_signal_score_one_of_way() -> None:
    found = few_shot_summary(accuracies(noisy_centers(1.0, signal=0.0)))
    assert found.half_width == pytest.approx(0.0027, abs=2e-4)
    assert abs(found.mean - 1 / 5) < found.half_width
    assert abs(found.mean - 0.2006) < found.half_width + 0.0027


def test_one_and_five_shots_of_noisy_features_score_the_known_figures() -> None:
    one, five = (few_shot_summary(accuracies(noisy_centers(0.2), shot=shot)) for shot in (1, 5))
    assert one.half_width == pytest.approx(0.0050, abs=5e-4)
    assert abs(one.mean - 0.8035) < one.half_width + 0.0050
    assert abs(five.mean - 0.9867) < 3 * five.half_width


def test_features_without_noise_are_all_classified_right() -> None:
    assert accuracies(noisy_centers(1e-6), range(200)).tolist() == [1.0] * 200


def test_collapsed_features_score_one_of_way() -> None:
    found = accuracies(np.full((len(PERSONS), 64), 0.1, np.float32), range(20))
    np.testing.assert_allclose(found, 1 / 5, rtol=1e-12)


def test_the_temperature_does_not_change_the_accuracy() -> None:
    features_ND = noisy_centers(0.2)
    expected = accuracies(features_ND, range(100))
    for temperature in (0.01, 128.0):
        np.testing.assert_array_equal(accuracies(features_ND, range(100), temperature=temperature), expected)


def test_four_times_the_episodes_halve_the_interval() -> None:
    features_ND = noisy_centers(0.2)
    few, many = (few_shot_summary(accuracies(features_ND, range(number))) for number in (500, 2000))
    assert many.half_width == pytest.approx(few.half_width / 2, rel=0.05)


def test_episodes_in_four_pieces_are_those_in_one_to_the_bit() -> None:
    features_ND = noisy_centers(0.2)
    whole = accuracies(features_ND, range(200), seed=3)
    pieces = [accuracies(features_ND, range(first, first + 50), seed=3) for first in range(0, 200, 50)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
    striped = [accuracies(features_ND, range(worker, 200, 4), seed=3) for worker in range(4)]
    np.testing.assert_array_equal(np.stack(striped, axis=1).ravel(), whole)


def test_another_seed_draws_other_episodes() -> None:
    pool = episode_pool(PERSONS, None, shot=1, cross_camera=False)
    first, second = (draw_episode(pool, 0, seed=seed) for seed in (0, 1))
    assert first.shots_WS.tolist() != second.shots_WS.tolist()


def test_accuracies_are_those_of_the_nearest_mean_image_by_image() -> None:
    features_ND, (persons, cameras) = noisy_centers(0.3)[:120, :8], random_labels(0)
    found = few_shot_accuracies(features_ND, persons, cameras, range(30, 40), shot=2, num_queries=3, seed=5)
    pool = episode_pool(persons, cameras, shot=2)
    for position, number in enumerate(range(30, 40)):
        episode = draw_episode(pool, number, num_queries=3, seed=5)
        right = 0
        for row, identity in zip(episode.queries_M, episode.identity_M, strict=True):
            distances = [
                np.linalg.norm(features_ND[row].astype(float) - (features_ND[a].astype(float) + features_ND[b]) / 2)
                for a, b in episode.shots_WS
            ]
            right += int(np.argmin(distances) == identity)
        assert found[position] == right / len(episode.queries_M)


def test_logits_are_minus_the_squared_distance_over_the_temperature() -> None:
    logits_MW = prototype_logits(np.array([[3.0, 4.0]]), np.array([[0.0, 0.0], [3.0, 4.0]]), 5.0)
    assert logits_MW.tolist() == [[-5.0, 0.0]]


def check(episode: Episode, pool: EpisodePool, persons: NDArray, *, way: int, shot: int, num_queries: int) -> None:
    """What every episode is, whatever it draws."""
    assert episode.shots_WS.shape == (way, shot)
    drawn = persons[episode.shots_WS]
    assert (drawn == drawn[:, :1]).all()
    assert len(set(drawn[:, 0])) == way
    np.testing.assert_array_equal(persons[episode.queries_M], drawn[episode.identity_M, 0])
    rows = [*episode.shots_WS.ravel(), *episode.queries_M]
    assert len(set(rows)) == len(rows)
    for identity, shots in enumerate(episode.shots_WS):
        queries = episode.queries_M[episode.identity_M == identity]
        usable = (persons == drawn[identity, 0]) & ~np.isin(pool.camera_N, pool.camera_N[shots])
        assert len(queries) == min(num_queries, usable.sum())
        assert len(queries) >= 1
        assert usable[queries].all()


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    shot=st.integers(1, 5),
    num_queries=st.integers(1, 20),
    cross_camera=st.booleans(),
    way=st.integers(2, 5),
)
def test_queries_are_of_the_shots_identities_and_of_none_of_their_cameras(
    seed: int, shot: int, num_queries: int, cross_camera: bool, way: int
) -> None:
    persons, cameras = random_labels(seed)
    pool = episode_pool(persons, cameras, shot=shot, cross_camera=cross_camera)
    np.testing.assert_array_equal(pool.camera_N, cameras if cross_camera else np.arange(120))
    for number in range(5):
        episode = draw_episode(pool, number, way=way, num_queries=num_queries, seed=1)
        check(episode, pool, persons, way=way, shot=shot, num_queries=num_queries)


def test_only_identities_with_shots_and_a_query_of_another_camera_are_drawn() -> None:
    images = {
        1: [0, 0, 0, 0],  # one camera
        2: [0, 0, 1],  # two shots of camera 0, a query of camera 1
        3: [0, 1],  # one shot only
        4: [0, 1, 2],  # two shots, a query
        5: [2],
    }
    persons = np.concatenate([[person] * len(cameras) for person, cameras in images.items()])
    cameras = np.concatenate(list(images.values()))
    pool = episode_pool(persons, cameras, shot=2)
    assert [int(persons[rows[0]]) for rows in pool.rows_by_identity] == [2, 4]
    assert (pool.num_eligible, pool.num_identities) == (2, 5)
    assert episode_pool(persons, cameras, shot=2, cross_camera=False).num_eligible == 3
    assert episode_pool(persons, cameras, shot=1).num_eligible == 3
    for number in range(20):  # the shots of person 2 are always those of camera 0
        episode = draw_episode(pool, number, way=2)
        shots = next(shots for shots in episode.shots_WS if persons[shots[0]] == 2)
        assert cameras[shots].tolist() == [0, 0]


def test_every_eligible_identity_and_image_gets_its_turn() -> None:
    persons, cameras = np.repeat(np.arange(8), 6), np.tile([0, 0, 1, 1, 2, 2], 8)
    pool = episode_pool(persons, cameras, shot=1)
    shots = [draw_episode(pool, number, num_queries=2).shots_WS.ravel() for number in range(2000)]
    times = np.bincount(np.concatenate(shots), minlength=48)
    expected = 2000 * 5 / 48
    assert abs(times - expected).max() < 5 * np.sqrt(expected)


def test_labels_may_be_strings() -> None:
    persons, cameras = random_labels(1)
    features_ND = noisy_centers(0.2)[:120]
    names, places = ([f"label {value:02}" for value in values] for values in (persons, cameras))
    found = few_shot_accuracies(features_ND, names, places, range(5))
    np.testing.assert_array_equal(found, few_shot_accuracies(features_ND, persons, cameras, range(5)))


def test_the_summary_is_the_mean_and_its_interval() -> None:
    found = few_shot_summary(np.array([0.0, 1.0, 0.0, 1.0]))
    assert (found.mean, found.half_width, found.num_episodes) == (0.5, 1.96 * 0.5 / 2, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cameras": None}, "cameras: None with cross_camera; give one per row, or cross_camera=False"),
        ({"cameras": [0] * 120}, "way: 5 identities per episode, but 0 of 12 are eligible"),
        ({"way": 13}, "way: 13 identities per episode, but 12 of 12 are eligible"),
        ({"shot": 0}, "shot: expected at least 1"),
        ({"way": 1}, "expected a way of at least 2 and num_queries of at least 1, got 1 and 5"),
        ({"num_queries": 0}, "expected a way of at least 2 and num_queries of at least 1, got 5 and 0"),
        ({"seed": -1}, "seed and episodes: expected numbers from 0 on, got -1 and 0"),
        ({"temperature": -1.0}, "temperature: expected a positive number, got -1.0"),
        ({"cameras": [0, 1]}, "cameras: expected 120, one per person id, got 2"),
        ({"features_ND": np.ones((3, 2))}, "person_ids: expected 3, one per feature, got 120"),
        ({"features_ND": np.full((120, 2), np.inf)}, "features: 120 of 120 rows are not finite"),
        ({"person_ids": np.zeros(120)}, "person_ids: expected one whole number or string per row, got float64"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments: dict[str, Any], message: str) -> None:
    persons, cameras = random_labels(0)
    usable = {"features_ND": np.ones((120, 2)), "person_ids": persons, "cameras": cameras, "episodes": range(1)}
    with pytest.raises(UserError, match=message):
        few_shot_accuracies(**(usable | arguments))


def test_a_summary_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="no episodes to average"):
        few_shot_summary(np.array([]))
