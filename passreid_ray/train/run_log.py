"""What a run leaves behind for people: metrics.jsonl, TensorBoard events, quarantine.jsonl."""

import contextlib
import json
import os
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class RunLog:
    """Appends metrics by step to ``metrics.jsonl`` and TensorBoard; a restarted run overwrites what it repeats.

    What the disk refuses is kept in memory, in order, until ``catch_up`` can write it.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._waiting: deque[Callable[[], None]] = deque()
        self._is_open = False
        self._writer: SummaryWriter | None = None

    @property
    def num_waiting(self) -> int:
        """What could not be written yet."""
        return len(self._waiting)

    def catch_up(self) -> OSError | None:
        """Write what waits; why that cannot be done, where it cannot."""
        while self._waiting:
            try:
                self._waiting[0]()
            except OSError as error:
                return error
            self._waiting.popleft()
        return None

    def restart_at(self, step: int) -> None:
        """Drop records after ``step``: a worker that resumes there will write them again."""
        self._is_open = True
        self._add(partial(self._restart, step))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one record; visible to readers at once."""
        if not self._is_open:
            self.restart_at(step - 1)
        self._add(
            partial(_append, self.folder / "metrics.jsonl", [{"step": step, **metrics}]),
            partial(self._add_scalars, step, dict(metrics)),
        )

    def note(self, step: int, **facts: Any) -> None:
        """Add a record that is no metric: for readers of ``metrics.jsonl`` only."""
        if not self._is_open:
            self.restart_at(step)
        self._add(partial(_append, self.folder / "metrics.jsonl", [{"step": step, **facts}]))

    def quarantine(self, records: list[dict[str, Any]]) -> None:
        """Append images that could not be used, with the reason, to ``quarantine.jsonl``."""
        self._add(partial(_append, self.folder / "quarantine.jsonl", records))

    def close(self) -> None:
        """Flush and close the files."""
        self._close_writer()

    def _add(self, *work: Callable[[], None]) -> None:
        has_trouble = bool(self._waiting)
        self._waiting.extend(work)
        if not has_trouble:  # else whoever calls catch_up decides when to try again
            self.catch_up()

    def _restart(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # costs seconds: the process of a board does without

        self._close_writer()
        path = self.folder / "metrics.jsonl"
        kept = [record for record in read_jsonl(path) if step and record.get("step", step + 1) <= step]
        draft = path.with_name(f"{path.name}.part")  # a full disk must not cost the records that are there
        try:
            draft.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
            os.replace(draft, path)
        except OSError:
            draft.unlink(missing_ok=True)
            raise
        self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)

    def _add_scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        try:
            self._writer = self._writer or SummaryWriter(str(self.folder / "tensorboard"))
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()
        except OSError:
            self._close_writer()  # it never recovers: the next one begins another file
            raise

    def _close_writer(self) -> None:
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
        self._writer = None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON-lines file; what is none, such as a last line that was cut short by a kill, is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def _append(path: Path, records: list[dict[str, Any]]) -> None:
    """Append ``records``, all or none of them."""
    rest = "".join(json.dumps(record) + "\n" for record in records).encode()
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(end)
            raise
