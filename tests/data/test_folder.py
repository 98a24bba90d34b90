import shutil
from pathlib import Path

import pytest

from passreid_ray.data.decode import BadImage
from passreid_ray.data.folder import FolderSource, read_folder
from passreid_ray.errors import UserError
from tests.data.pictures import write_images


def test_images_at_any_depth_and_of_any_suffix_are_found(tmp_path: Path) -> None:
    paths = ["a.jpg", "b/c/D.JPEG", "b/e.PNG", "b/f.bmp", "g.webp", "h.tif", "i.TIFF"]
    write_images(tmp_path, paths)
    rows = read_folder(FolderSource(root=tmp_path))
    assert rows.image_ids.tolist() == sorted(paths)
    assert set(rows.person_ids) == set(rows.camera_ids) == set(rows.splits) == {None}


def test_hidden_files_and_other_files_are_skipped(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.png", ".b.png", ".cache/c.png", "notes.txt", "._d.jpg"])
    assert read_folder(FolderSource(root=tmp_path)).image_ids.tolist() == ["a.png"]


def test_a_folder_named_like_an_image_is_searched(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.jpg/b.png"])
    assert read_folder(FolderSource(root=tmp_path)).image_ids.tolist() == ["a.jpg/b.png"]


def test_a_relative_root_is_found_from_any_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "set", ["a.png"])
    monkeypatch.chdir(tmp_path)
    rows = read_folder(FolderSource(root=Path("set")))
    monkeypatch.chdir("/")
    assert rows.image(0).shape == (16, 12, 3)


def test_the_fingerprint_tells_images_of_another_size_under_the_same_names(tmp_path: Path) -> None:
    write_images(tmp_path / "here", ["b.png", "x/a.png"])
    shutil.copytree(tmp_path / "here", tmp_path / "copy", copy_function=shutil.copyfile)
    here, copy = (read_folder(FolderSource(root=tmp_path / name)) for name in ("here", "copy"))
    assert here.table["size_bytes"].to_pylist() == [len(here.image_bytes(index)) for index in range(2)]
    assert here.fingerprint() == copy.fingerprint()
    with open(tmp_path / "copy/x/a.png", "ab") as image:
        image.write(b"x")
    assert read_folder(FolderSource(root=tmp_path / "copy")).fingerprint() != here.fingerprint()


def test_a_link_counts_with_the_size_of_its_image_and_a_dead_one_is_no_image(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.png"])
    (tmp_path / "b.png").symlink_to("a.png")
    (tmp_path / "c.png").symlink_to("gone.png")
    rows = read_folder(FolderSource(root=tmp_path))
    assert rows.image_ids.tolist() == ["a.png", "b.png"]
    assert rows.table["size_bytes"].to_pylist() == [(tmp_path / "a.png").stat().st_size] * 2


def test_an_empty_folder_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=rf"{tmp_path}: no image at any depth; looked for \.jpg"):
        read_folder(FolderSource(root=tmp_path))


def test_a_missing_root_and_a_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: expected a folder with images, found nothing there"):
        read_folder(FolderSource(root=tmp_path / "nowhere"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="found a file there"):
        read_folder(FolderSource(root=tmp_path / "file"))


def test_read_many_answers_in_the_order_asked_for_and_a_missing_file_is_an_entry(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.png", "b.png"])
    store = read_folder(FolderSource(root=tmp_path)).stores[0]
    first, gone, last = store.read_many(["b.png", "gone.png", "a.png"])
    assert (first, last) == ((tmp_path / "b.png").read_bytes(), (tmp_path / "a.png").read_bytes())
    assert isinstance(gone, BadImage)
