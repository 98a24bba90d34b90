import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from passreid_ray.config import Section, build
from passreid_ray.engines.run_folder import RAY_SNAPSHOT, RunConfig, check_writable, prepare
from passreid_ray.errors import UserError
from passreid_ray.train.checkpoints import CheckpointStore
from passreid_ray.train.state_files import save_state
from tests.data.s3 import SECRET, Bucket, bucket, s3_host, s3_keys

__all__ = ["bucket", "s3_host", "s3_keys"]  # fixtures


class Model(Section):
    width: int = 24


class Job(Section):
    run: RunConfig = RunConfig()
    epochs: int = 3
    model: Model = Model()


def job(output: Path, **changes: Any) -> Job:
    run = {"output": output, **changes.pop("run", {})}
    return build(Job, {"run": run, **changes})


def prepared(config: Job, fingerprint: str = "data") -> Job:
    prepare(config.run, config, ("model.",), fingerprint)
    return config


def started(config: Job, *steps: int) -> Job:
    """A run that has saved checkpoints."""
    prepared(config)
    meta = {"config": config.model_dump(mode="json"), "fingerprint": "data"}
    for step in steps:
        config.run.checkpoints.write(
            step, lambda folder, step=step: save_state(folder, {"a": torch.ones(9)}, {"step": step, **meta})
        )
    return config


def test_a_new_run_gets_its_folder_with_the_settings(tmp_path: Path) -> None:
    prepared(job(tmp_path, run={"name": "a"}))
    assert tomllib.loads((tmp_path / "a" / "config.toml").read_text())["model"] == {"width": 24}
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["config.toml"]


def test_a_run_goes_on_with_other_settings_that_may_change(tmp_path: Path) -> None:
    started(job(tmp_path), 6)
    prepared(job(tmp_path, epochs=9))
    assert "epochs = 9" in (tmp_path / "pretrain" / "config.toml").read_text()


def test_a_run_does_not_go_on_with_another_model(tmp_path: Path) -> None:
    started(job(tmp_path), 6)
    with pytest.raises(UserError, match=r"model\.width = 24, now it is 48; .* or another run\.name"):
        prepared(job(tmp_path, model={"width": 48}))
    assert "width = 24" in (tmp_path / "pretrain" / "config.toml").read_text()


def test_a_run_older_than_a_setting_was_made_with_its_default(tmp_path: Path) -> None:
    class OldModel(Section):
        pass

    class OldJob(Job):
        model: OldModel = OldModel()  # pyright: ignore[reportIncompatibleVariableOverride] a settings file of the past

    started(build(OldJob, {"run": {"output": tmp_path}}), 6)
    prepared(job(tmp_path, model={"width": 24}))
    with pytest.raises(UserError, match=r"model\.width = 24, now it is 48"):
        prepared(job(tmp_path, model={"width": 48}))


def test_a_run_does_not_go_on_with_other_data(tmp_path: Path) -> None:
    config = started(job(tmp_path), 6)
    with pytest.raises(UserError, match=r"made from other data .*another run\.name"):
        prepared(config, "other")


def test_checkpoints_of_another_job_are_not_taken_over(tmp_path: Path) -> None:
    config = prepared(job(tmp_path))
    save_state(tmp_path / "pretrain" / "step_00000006", {"a": torch.ones(1)}, {})
    with pytest.raises(UserError, match="holds checkpoints of another job; give another run"):
        prepared(config)


def cut_short(folder: Path) -> None:
    tensors = folder / "state.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])


def test_a_checkpoint_cut_short_is_set_aside_and_the_one_before_it_is_used(tmp_path: Path) -> None:
    config, folder = started(job(tmp_path), 6, 12), tmp_path / "pretrain"
    cut_short(folder / "step_00000012")
    (told,) = prepare(config.run, config, ("model.",), "data")
    assert "state.safetensors: cut short: expected" in told
    assert told.endswith("aside as damaged-step_00000012, going on from step 6: 6 steps are done again")
    assert config.run.checkpoints.names() == ["step_00000006"]
    assert (folder / "damaged-step_00000012" / "state.safetensors").is_file()
    assert prepare(config.run, config, ("model.",), "data") == []


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_afresh(tmp_path: Path) -> None:
    config, folder = started(job(tmp_path), 6, 12), tmp_path / "pretrain"
    cut_short(folder / "step_00000012")
    (folder / "step_00000006" / "state.json").write_text("{")
    for _ in range(2):  # nor when it is given again
        with pytest.raises(UserError, match=r"none of the 2 checkpoint\(s\) is whole: .*cut short.*not valid JSON"):
            prepared(config)
    assert config.run.checkpoints.names() == ["step_00000006", "step_00000012"]


def test_a_damaged_checkpoint_of_another_run_is_left_where_it_is(tmp_path: Path) -> None:
    config = started(job(tmp_path), 6, 12)
    cut_short(tmp_path / "pretrain" / "step_00000012")
    with pytest.raises(UserError, match="made from other data"):
        prepared(config, "other")
    assert config.run.checkpoints.names() == ["step_00000006", "step_00000012"]


def test_a_checkpoint_that_was_never_finished_does_not_stop_the_run(tmp_path: Path) -> None:
    config = started(job(tmp_path), 6, 12)
    (tmp_path / "pretrain" / "step_00000012" / "state.json").unlink()
    prepared(config)


def test_a_broken_list_of_rays_own_is_set_aside(tmp_path: Path) -> None:
    config = started(job(tmp_path), 6)
    (tmp_path / "pretrain" / RAY_SNAPSHOT).write_text('{"cut')
    prepared(config)
    assert not (tmp_path / "pretrain" / RAY_SNAPSHOT).exists()
    assert config.run.checkpoints.names() == ["step_00000006"]


@pytest.mark.parametrize("key", ["output", "storage"])
def test_a_place_that_cannot_be_written_is_told_with_its_setting(tmp_path: Path, key: str) -> None:
    (tmp_path / "file").touch()
    config = job(tmp_path, run={key: str(tmp_path / "file" / "below")})
    with pytest.raises(UserError, match=rf"cannot be written \(Not a directory\); set run\.{key} to a folder"):
        prepared(config)


def test_a_submitted_job_may_not_write_into_the_folder_that_it_runs_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=r"run\.output: outputs/mine is below the temporary folder .* absolute path"):
        check_writable(Path("outputs/mine"), "run.output")
    check_writable(tmp_path / "outputs", "run.output")
    assert not (folder / "outputs").exists()


def test_an_address_of_no_known_kind_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run\.storage: nope://bucket cannot be used: "):
        prepared(job(tmp_path, run={"storage": "nope://bucket"}))


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_checkpoints_go_to_the_storage_and_all_else_to_the_output(tmp_path: Path, prefix: str) -> None:
    config = started(job(tmp_path / "out", run={"storage": f"{prefix}{tmp_path}/store"}), 6)
    assert config.run.folder == tmp_path / "out" / "pretrain"
    assert (tmp_path / "store" / "pretrain" / "step_00000006" / "state.json").is_file()
    prepared(config)


def test_runs_in_a_bucket_with_options_have_a_folder_each(tmp_path: Path, bucket: Bucket) -> None:
    jobs = [job(tmp_path, run={"name": name, "storage": bucket.address("runs")}) for name in ("a", "b")]
    for number, config in enumerate(jobs):
        started(config, 6 + number)
    for number, config in enumerate(jobs):
        assert prepared(config).run.checkpoints.names() == [f"step_{6 + number:08d}"]
        assert config.run.storage_path == bucket.address("runs")
        assert config.run.checkpoints.location()[1] == f"{bucket.name}/runs/{config.run.name}"


def test_a_bucket_that_may_not_be_used_is_told_in_one_line(tmp_path: Path, bucket: Bucket) -> None:
    config = started(job(tmp_path, run={"storage": bucket.address("runs")}), 6)
    message = rf"^run\.storage: s3://{bucket.name}/runs cannot be used: .*AWS Error"
    with bucket.closed_to_strangers(), pytest.raises(UserError, match=message) as caught:
        prepared(config)
    assert "\n" not in str(caught.value)


def test_checkpoints_that_cannot_be_listed_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: CheckpointStore) -> list[str]:
        raise OSError("AWS Error ACCESS_DENIED\nmore")

    monkeypatch.setattr(CheckpointStore, "names", refuse)
    with pytest.raises(UserError, match=rf"^{tmp_path}/pretrain: cannot be read: AWS Error ACCESS_DENIED$"):
        prepared(job(tmp_path))


@pytest.mark.parametrize("key", ["output", "storage"])
def test_an_address_with_credentials_is_refused_and_does_not_show_them(tmp_path: Path, key: str) -> None:
    with pytest.raises(UserError, match=rf"^run\.{key}: holds credentials, .* through the environment") as caught:
        job(tmp_path, run={key: f"s3://key:{SECRET}@bucket/runs"})
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("name", ["a/b", "", ".hidden", "..", "a b"])
def test_a_name_that_is_no_plain_folder_name_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"run\.name: expected letters, digits"):
        build(Job, {"run": {"name": name}})


def test_checkpoints_are_due_at_the_end_of_epochs_and_between_them() -> None:
    run = RunConfig(checkpoint_every_epochs=2, checkpoint_every_steps=5)
    assert [step for step in range(1, 17) if run.is_checkpoint_due(step, steps_per_epoch=4)] == [5, 8, 10, 15, 16]
