import os
import shutil
from types import SimpleNamespace

import pytest

from passreid_ray.engines.spill_disk import KEPT_FREE_BYTES, LIMIT, use_disk_almost_whole


@pytest.mark.parametrize(
    ("total_bytes", "left_bytes"), [(4 * 10**12, KEPT_FREE_BYTES), (10**11, KEPT_FREE_BYTES), (10**10, 0.05 * 10**10)]
)
def test_ray_may_fill_its_disk_but_for_two_gigabytes_or_a_twentieth_of_a_small_one(
    monkeypatch: pytest.MonkeyPatch, total_bytes: int, left_bytes: float
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/a/disk")
    disks = {"/a/disk": SimpleNamespace(total=total_bytes)}
    monkeypatch.setattr(shutil, "disk_usage", disks.__getitem__)
    monkeypatch.setenv(LIMIT, "")  # so that it is put back
    monkeypatch.delenv(LIMIT)
    use_disk_almost_whole()
    assert (1 - float(os.environ[LIMIT])) * total_bytes == pytest.approx(left_bytes, rel=0.01)


def test_a_limit_that_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT, "0.5")
    use_disk_almost_whole()
    assert os.environ[LIMIT] == "0.5"
