"""What a run leaves behind for people: metrics.jsonl, TensorBoard events, quarantine.jsonl."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class RunLog:
    """Appends metrics by step to ``metrics.jsonl`` and TensorBoard; a restarted run overwrites what it repeats."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._metrics: IO[str] | None = None
        self._writer: SummaryWriter | None = None

    def restart_at(self, step: int) -> None:
        """Drop records after ``step``: a worker that resumes there will write them again."""
        from torch.utils.tensorboard import SummaryWriter  # costs seconds: the process of a board does without

        self.close()
        path = self.folder / "metrics.jsonl"
        kept = [record for record in read_jsonl(path) if step and record["step"] <= step]
        path.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        self._metrics = path.open("a", encoding="utf-8")
        self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one record; visible to readers at once."""
        if self._metrics is None or self._writer is None:
            self.restart_at(step - 1)
        assert self._metrics is not None
        assert self._writer is not None
        self._metrics.write(json.dumps({"step": step, **metrics}) + "\n")
        self._metrics.flush()
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def quarantine(self, records: list[dict[str, Any]]) -> None:
        """Append images that could not be used, with the reason, to ``quarantine.jsonl``."""
        with (self.folder / "quarantine.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)

    def close(self) -> None:
        """Flush and close the files."""
        if self._metrics is not None:
            self._metrics.close()
        if self._writer is not None:
            self._writer.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON-lines file; a last line that was cut short by a kill is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records
