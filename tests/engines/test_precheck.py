from pathlib import Path

import pytest

from passreid_ray.data.folder import FolderSource, read_folder
from passreid_ray.engines.precheck import NUM_PROBED, check_patches, check_readable
from passreid_ray.errors import UserError
from tests.data.pictures import write_images


def check(root: Path, *, good: int, bad: int, max_bad_share: float) -> None:
    write_images(root, [f"good{number:03d}.png" for number in range(good)])
    for number in range(bad):
        (root / f"bad{number:03d}.png").write_bytes(b"")
    check_readable(read_folder(FolderSource(root=root)), max_bad_share)


@pytest.mark.parametrize(("good", "bad", "share"), [(3, 0, 0.0), (50, 1, 0.0), (9, 1, 0.05), (8, 4, 0.4)])
def test_data_with_few_bad_images_passes(tmp_path: Path, good: int, bad: int, share: float) -> None:
    check(tmp_path, good=good, bad=bad, max_bad_share=share)


@pytest.mark.parametrize(("good", "bad", "share"), [(0, 1, 0.5), (0, 5, 0.9), (6, 4, 0.3), (2, 2, 0.0)])
def test_data_with_too_many_bad_images_is_told_with_one_of_them(
    tmp_path: Path, good: int, bad: int, share: float
) -> None:
    with pytest.raises(UserError, match=rf"{bad} of {good + bad} images .* the first: bad000\.png: empty"):
        check(tmp_path, good=good, bad=bad, max_bad_share=share)


def test_of_a_large_set_only_a_few_spread_images_are_looked_at(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{NUM_PROBED // 2} of {NUM_PROBED} images looked at"):
        check(tmp_path, good=100, bad=100, max_bad_share=0.1)


def test_a_sample_of_a_large_set_may_hold_a_few_bad_images_more_than_the_share_by_chance(tmp_path: Path) -> None:
    check(tmp_path, good=186, bad=14, max_bad_share=0.05)


def test_sizes_of_whole_patches_pass() -> None:
    check_patches((16, 8), {"views.global_size_px": (64, 32), "views.local_size_px": (16, 8)})


def test_a_size_that_is_not_whole_patches_is_told_with_its_setting_and_the_nearest() -> None:
    with pytest.raises(UserError, match=r"views\.local_size_px: 30 x 4 pixels .* 16 x 16; .*: \[32, 16\]"):
        check_patches((16, 16), {"views.global_size_px": (64, 32), "views.local_size_px": (30, 4)})
