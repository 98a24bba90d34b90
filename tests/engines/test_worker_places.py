from passreid_ray.engines.worker_places import WorkerPlaces


def test_places_are_told_once_when_the_group_is_complete_and_has_started() -> None:
    places = WorkerPlaces()
    places.add(1, 2, "10.0.0.2")
    places.start(7)
    assert not places.are_news
    places.add(0, 2, "10.0.0.1")
    assert places.are_news
    assert places.take() == (7, ["10.0.0.1", "10.0.0.2"])
    assert not places.are_news


def test_a_restarted_group_is_not_mixed_with_the_one_before() -> None:
    places = WorkerPlaces()
    for rank in (0, 1):
        places.add(rank, 2, "10.0.0.1")
    places.start(0)
    places.take()
    places.add(0, 2, "10.0.0.9")
    places.start(4)
    assert not places.are_news
    places.add(1, 2, "10.0.0.8")
    assert places.take() == (4, ["10.0.0.9", "10.0.0.8"])


def test_a_group_of_another_size_is_gathered_anew() -> None:
    places = WorkerPlaces()
    for rank in (0, 1):
        places.add(rank, 2, "10.0.0.1")
    places.add(2, 3, "10.0.0.3")
    places.start(0)
    assert not places.are_news
    for rank in (0, 1):
        places.add(rank, 3, "10.0.0.2")
    places.start(0)
    assert places.take() == (0, ["10.0.0.2", "10.0.0.2", "10.0.0.3"])


def test_a_group_that_died_before_all_began_does_not_count() -> None:
    places = WorkerPlaces()
    places.add(0, 2, "10.0.0.1")
    places.new_group()
    places.add(1, 2, "10.0.0.8")
    places.start(0)
    assert not places.are_news
    places.add(0, 2, "10.0.0.9")
    assert places.take() == (0, ["10.0.0.9", "10.0.0.8"])


def test_of_a_local_cluster_there_is_nothing_to_tell() -> None:
    places = WorkerPlaces()
    places.add(0, 1, "127.0.0.2")
    places.start(0)
    assert not places.are_news
