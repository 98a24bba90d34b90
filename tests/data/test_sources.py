import tarfile
import zipfile
from pathlib import Path

import lmdb
import pytest

from passreid_ray.config import Section, load_config, to_toml
from passreid_ray.data import Source, SyntheticSource, open_rows
from passreid_ray.errors import UserError
from tests.data.pictures import write_images


class _Job(Section):
    data: Source = SyntheticSource()


def _open(*arguments: str) -> list[str]:
    return open_rows(load_config(_Job, arguments).data).image_ids.tolist()


def test_each_kind_is_opened_from_settings(tmp_path: Path) -> None:
    market = ["bounding_box_train/0002_c1s1_000451_03.jpg"]
    write_images(tmp_path, market)
    (tmp_path / "labels.csv").write_text(f"image\n{market[0]}\n")
    assert _open("data.kind=folder", f"data.root={tmp_path}") == market
    assert _open("data.kind=labels_csv", f"data.root={tmp_path}") == market
    assert _open("data.kind=market1501", f"data.root={tmp_path}", 'data.splits=["train"]') == market
    with tarfile.open(tmp_path / "a.tar", "w") as tar, zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        tar.add(tmp_path / market[0], market[0])
        archive.write(tmp_path / market[0], market[0])
    with lmdb.open(str(tmp_path / "lmdb")) as environment, environment.begin(write=True) as transaction:
        transaction.put(market[0].encode(), (tmp_path / market[0]).read_bytes())
    assert _open("data.kind=tar", f"data.path={tmp_path}/a.tar") == market
    assert _open("data.kind=zip", f"data.path={tmp_path}/a.zip") == market
    assert _open("data.kind=lmdb", f"data.path={tmp_path}/lmdb") == market
    assert len(_open("data.num_people=4", "data.images_per_person=5")) == 20


def test_sources_are_joined_in_their_order(tmp_path: Path) -> None:
    write_images(tmp_path / "x", ["a.png"])
    write_images(tmp_path / "y", ["a.png", "b.png"])
    sources = ", ".join(f'{{kind = "folder", root = "{tmp_path / name}"}}' for name in ("x", "y"))
    assert _open("data.kind=joined", f"data.sources=[{sources}]") == ["0:a.png", "1:a.png", "1:b.png"]


def test_settings_of_a_source_survive_being_written_out(tmp_path: Path) -> None:
    sources = f'[{{kind = "folder", root = "{tmp_path}"}}, {{kind = "synthetic", seed = 3}}]'
    job = load_config(_Job, ["data.kind=joined", f"data.sources={sources}"])
    (tmp_path / "job.toml").write_text(to_toml(job))
    assert load_config(_Job, [str(tmp_path / "job.toml")]) == job


@pytest.mark.parametrize("kind", ["folder", "labels_csv", "lmdb", "parquet", "tar", "zip"])
def test_an_address_and_a_home_folder_survive_being_written_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    key = "root" if kind in ("folder", "labels_csv") else "path"
    address = "s3://bucket/x?region=us-east-1"
    for typed, meant in ((address, address), ("~/x", "/home/someone/x")):
        job = load_config(_Job, [f"data.kind={kind}", f"data.{key}={typed}"])
        assert str(getattr(job.data, key)) == meant
        (tmp_path / "job.toml").write_text(to_toml(job))
        assert load_config(_Job, [str(tmp_path / "job.toml")]) == job


def test_an_unknown_kind_names_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'hdf5'.*'folder', 'labels_csv', 'lmdb', 'market1501'"):
        _open("data.kind=hdf5", "data.root=x")


def test_nothing_to_join_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.sources"):
        _open("data.kind=joined", "data.sources=[]")
