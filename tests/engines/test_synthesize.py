from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from passreid_ray.data import SyntheticSource, open_rows
from passreid_ray.data.market1501 import Market1501Source
from passreid_ray.engines.synthesize import SynthesizeConfig, contact_sheet, run
from passreid_ray.errors import UserError


def _config(output: Path, **settings: int) -> SynthesizeConfig:
    data = SyntheticSource.model_validate({"num_people": 4, "num_cameras": 3, "images_per_person": 6, **settings})
    return SynthesizeConfig(data=data, output=output)


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_written_set_is_read_back_as_market1501_with_the_same_rows_and_pixels(tmp_path: Path) -> None:
    config = _config(tmp_path / "set")
    written = open_rows(Market1501Source(root=run(config)))
    drawn = open_rows(config.data)
    for column in ("image_id", "person_id", "camera_id", "split"):
        assert written.table[column] == drawn.table[column]
    for index in range(len(drawn)):
        difference = np.abs(written.image(index).astype(int) - drawn.image(index))
        assert difference.mean() < 5


def test_a_run_that_was_cut_off_goes_on_to_the_same_set(tmp_path: Path) -> None:
    whole = _files(run(_config(tmp_path / "whole")))
    part = run(_config(tmp_path / "part"))
    images = sorted(part.rglob("*_00.jpg"))
    kept = images[0].stat().st_mtime_ns
    for image in images[5:]:
        image.unlink()
    images[5].with_name(f".{images[5].name}.part").write_bytes(b"half an im")
    (part / "contact_sheet.png").unlink()
    run(_config(tmp_path / "part"))
    assert _files(part) == whole
    assert images[0].stat().st_mtime_ns == kept


def test_a_folder_with_other_content_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and not a synthetic set"):
        run(_config(tmp_path))
    assert _files(tmp_path) == {"thesis.txt": b"mine"}


def test_a_set_with_other_settings_is_left_alone(tmp_path: Path) -> None:
    run(_config(tmp_path))
    before = _files(tmp_path)
    with pytest.raises(UserError, match="other settings"):
        run(_config(tmp_path, seed=1))
    assert _files(tmp_path) == before


def test_a_file_is_no_output_folder(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(UserError, match="is a file"):
        run(_config(tmp_path / "out"))


def test_the_run_says_what_it_wrote_and_how_to_use_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(_config(tmp_path))
    said = capsys.readouterr().out
    assert "24 images of 4 people by 3 cameras (12 train, 6 query, 6 gallery)" in said
    assert f"data.kind=market1501 data.root={tmp_path}" in said


def test_the_contact_sheet_has_a_row_per_person_and_a_column_per_camera(tmp_path: Path) -> None:
    config = _config(tmp_path)
    rows = open_rows(config.data)
    sheet = contact_sheet(rows, num_people=2)
    assert sheet.shape == (2 * 128, 3 * 64, 3)
    second = np.flatnonzero((rows.person_ids == "0002") & (rows.camera_ids == "3"))
    crops = [rows.image(int(index)) for index in second]
    assert any(np.array_equal(sheet[128:, 128:], crop) for crop in crops)
    with Image.open(run(config) / "contact_sheet.png") as image:
        assert image.size == (3 * 64, 4 * 128)
