"""The disk that Ray moves objects to when its object store is full."""

import os
import shutil

from ray._common.utils import get_default_system_temp_dir

LIMIT = "RAY_local_fs_capacity_threshold"
"""Share of the disk from which on Ray moves nothing there."""
RAYS_LIMIT = 0.95
KEPT_FREE_BYTES = 2 * 2**30


def use_disk_almost_whole() -> None:
    """Let the cluster that this process starts use its disk until 2 GiB are left, where Ray would leave a 20th.

    A 20th of a disk of 4 TB is 200 GB, and a run would end for want of room with all of these free. A limit that the
    user has set stays.
    """
    total_bytes = shutil.disk_usage(get_default_system_temp_dir()).total
    os.environ.setdefault(LIMIT, f"{max(RAYS_LIMIT, 1 - KEPT_FREE_BYTES / total_bytes):.6f}")
