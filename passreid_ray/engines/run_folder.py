"""The folder of a run: where its files go, and whether a command may continue what is there."""

import re
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.fs as pafs
from pydantic import AfterValidator, Field

from passreid_ray.config import Section, UserPath, to_toml
from passreid_ray.config.credentials import refuse_credentials
from passreid_ray.data.order import first_step
from passreid_ray.data.storage import below, explained, is_remote, reason, shown
from passreid_ray.errors import UserError
from passreid_ray.train.checkpoints import CheckpointStore
from passreid_ray.train.recovery import newest_whole, set_damaged_aside

CONFIG_FILE = "config.toml"
RAY_SNAPSHOT = "checkpoint_manager_snapshot.json"
SUBMITTED_FOLDER = "working_dir_files"
"""Below it Ray puts the files that came with a job, on every node."""


def folder_name(name: str) -> str:
    """``name`` as it is; raises ``ValueError`` when it cannot be the name of a folder everywhere."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError("expected letters, digits, '.', '_' and '-', the first a letter or a digit")
    return name


class RunConfig(Section):
    """Name and place of a run. The same name continues the run that is there."""

    name: Annotated[str, AfterValidator(folder_name)] = "pretrain"
    """Name of the run and of its folder."""
    output: UserPath = Path("outputs")
    """Folder that holds the folders of runs: logs, resolved settings, pictures."""
    storage: Annotated[str, AfterValidator(refuse_credentials)] | None = None
    """Where checkpoints go; none: to output. A folder that all nodes share, or an s3:// or gs:// address."""
    checkpoint_every_epochs: int = Field(default=1, ge=1)
    """Epochs (when tuning: rounds) between checkpoints; the last step is always saved."""
    checkpoint_every_steps: int | None = Field(default=None, ge=1)
    """Steps between more checkpoints, for long epochs; none: only at the end of epochs."""
    keep: int | None = Field(default=2, ge=1)
    """How many of the newest checkpoints stay; none: all. When the newest is damaged, the one before it is used."""

    @property
    def folder(self) -> Path:
        """The run's own folder."""
        return self.output / self.name

    @property
    def storage_path(self) -> str:
        """Where the folders of runs with their checkpoints are."""
        if self.storage is not None and is_remote(self.storage):
            return self.storage
        return str(Path(self.storage or self.output).expanduser().resolve())

    def is_checkpoint_due(self, step: int, steps_per_epoch: Fraction | int) -> bool:
        """Whether a checkpoint is saved after ``step`` steps."""
        epoch = step // steps_per_epoch
        at_epoch = first_step(epoch, steps_per_epoch) == step and epoch % self.checkpoint_every_epochs == 0
        return at_epoch or (self.checkpoint_every_steps is not None and step % self.checkpoint_every_steps == 0)

    @property
    def checkpoints(self) -> CheckpointStore:
        """The run's checkpoints."""
        return CheckpointStore(below(self.storage_path, self.name))


def prepare(run: RunConfig, config: Section, must_agree: tuple[str, ...], fingerprint: str) -> list[str]:
    """Create the run's folder and write ``config`` into it; what to tell of checkpoints that were cut short.

    Those are set aside. Raises ``UserError`` when the folder or the storage cannot be read and written, when a run of
    that name has a checkpoint made from other data or with other settings under one of the dotted keys ``must_agree``,
    or when all its checkpoints are damaged.
    """
    check_writable(run.folder, "run.output")
    _check_storage(run)
    # Here, not in CheckpointStore: to a worker, a bucket that fails is a reason to restart, which a UserError forbids.
    with explained(run.checkpoints.address):
        notes = _check_continues(run, config, must_agree, fingerprint)
        _set_snapshot_aside(run)
    (run.folder / CONFIG_FILE).write_text(to_toml(config), encoding="utf-8")
    return notes


def check_same_data(meta: dict[str, Any], fingerprint: str, where: str) -> None:
    """Raise ``UserError`` when the checkpoint described by ``meta`` was made from other rows."""
    if meta["fingerprint"] != fingerprint:
        raise UserError(
            f"{where}: this run was made from other data (fingerprint {meta['fingerprint']}, now {fingerprint}); "
            "give the same data to continue it, or another run.name to start afresh"
        )


def check_writable(folder: Path, key: str) -> None:
    """Create ``folder``; raises ``UserError`` naming the setting ``key`` when it cannot be created or written.

    Nor may it be in the temporary folder that a job given to ``ray job submit`` runs in: Ray deletes that.
    """
    if SUBMITTED_FOLDER in folder.resolve().parts:
        raise UserError(
            f"{key}: {folder} is below the temporary folder that a submitted job runs in, which Ray deletes; give an "
            "absolute path, on a cluster of several nodes in a folder that all of them share"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror or error}); set {key} to a folder that can"
        ) from None


def _check_continues(run: RunConfig, config: Section, must_agree: tuple[str, ...], fingerprint: str) -> list[str]:
    found = newest_whole(run.checkpoints, run.checkpoints.meta)  # the workers look at the tensors themselves
    if found is None:
        return []
    if not {"config", "fingerprint"} <= found.value.keys():
        raise UserError(f"{run.folder}: holds checkpoints of another job; give another run.name")
    check_same_data(found.value, fingerprint, str(run.folder))
    _check_agreement(run, found.value["config"], config, must_agree)
    return set_damaged_aside(run.checkpoints, found)


def _set_snapshot_aside(run: RunConfig) -> None:
    filesystem, root = run.checkpoints.location()
    # Ray's own list of checkpoints may be stale or cut short after a kill, and Ray refuses to start on it.
    if filesystem.get_file_info(f"{root}/{RAY_SNAPSHOT}").type == pafs.FileType.File:
        filesystem.delete_file(f"{root}/{RAY_SNAPSHOT}")


def _check_storage(run: RunConfig) -> None:
    if run.storage is None:
        return
    if not run.checkpoints.is_remote:
        check_writable(Path(run.checkpoints.address), "run.storage")
        return
    try:
        filesystem, path = run.checkpoints.location()
        filesystem.create_dir(path, recursive=True)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"run.storage: {shown(run.storage)} cannot be used: {reason(error)}") from None


def _check_agreement(run: RunConfig, old: dict[str, Any], config: Section, keys: tuple[str, ...]) -> None:
    # A run may be older than a setting: it was made as the setting's default says.
    default = type(config).model_construct().model_dump(mode="json")
    for key, (before, now) in differences(old, config.model_dump(mode="json"), default).items():
        if key.startswith(keys):
            raise UserError(
                f"{run.folder}: this run was made with {key} = {before!r}, now it is {now!r}; "
                "give the same settings to continue it, or another run.name to start afresh"
            )


def differences(
    old: dict[str, Any], new: dict[str, Any], default: dict[str, Any] | None = None
) -> dict[str, tuple[Any, Any]]:
    """Dotted keys of nested settings that are not the same, with (old, new) value; None where there is none.

    What only ``new`` has is compared with ``default``, where that has it.
    """
    old_flat, new_flat, default_flat = _flatten(old), _flatten(new), _flatten(default or {})
    old_flat |= {key: default_flat[key] for key in new_flat.keys() - old_flat.keys() if key in default_flat}
    return {
        key: (old_flat.get(key), new_flat.get(key))
        for key in sorted(old_flat.keys() | new_flat.keys())
        if old_flat.get(key) != new_flat.get(key)
    }


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
