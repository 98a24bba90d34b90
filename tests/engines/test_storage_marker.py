from pathlib import Path

import pytest

from passreid_ray.engines.run_folder import RunConfig
from passreid_ray.engines.storage_marker import StorageMarker, StorageNotSeen, leave_marker
from passreid_ray.engines.task_errors import users_mistake
from tests.data.s3 import Bucket, bucket, s3_host, s3_keys

__all__ = ["bucket", "s3_host", "s3_keys"]  # fixtures


def test_a_node_that_shares_the_storage_sees_the_marker(tmp_path: Path) -> None:
    leave_marker(RunConfig(output=tmp_path)).check("10.0.0.3")


def test_a_node_that_sees_another_folder_is_named_with_the_path_and_does_not_end_the_run(tmp_path: Path) -> None:
    seen, own = tmp_path / "seen", tmp_path / "own"
    name = leave_marker(RunConfig(output=seen)).name
    leave_marker(RunConfig(output=own))  # an old copy of the run is there
    with pytest.raises(StorageNotSeen) as caught:
        StorageMarker(str(own / "pretrain"), name).check("10.0.0.3", seconds=0.0)
    assert str(caught.value).startswith(f"node 10.0.0.3 does not see this run's storage {own}/pretrain (what the job ")
    assert users_mistake(caught.value) is None


def test_a_node_that_cannot_read_the_storage_says_why(tmp_path: Path) -> None:
    marker = leave_marker(RunConfig(output=tmp_path))
    (Path(marker.folder) / marker.name).unlink()
    Path(marker.folder).rmdir()
    Path(marker.folder).write_bytes(b"")  # root may read everything, but no file below a file
    with pytest.raises(StorageNotSeen, match=r"10\.0\.0\.3 does not see"):
        marker.check("10.0.0.3", seconds=0.0)


def test_markers_of_earlier_starts_do_not_pile_up_and_are_no_checkpoints(tmp_path: Path) -> None:
    run = RunConfig(output=tmp_path)
    markers = [leave_marker(run) for _ in range(3)]
    assert [path.name for path in Path(markers[-1].folder).iterdir()] == [markers[-1].name]
    assert run.checkpoints.names() == []


def test_a_bucket_is_marked_in_the_same_way(bucket: Bucket) -> None:
    run = RunConfig(storage=bucket.address("runs"))
    old, new = leave_marker(run), leave_marker(run)
    new.check("10.0.0.3")
    with pytest.raises(StorageNotSeen):
        old.check("10.0.0.3", seconds=0.0)
