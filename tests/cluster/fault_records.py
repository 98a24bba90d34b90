"""What each fault cost in the last run of its test: ``results.json`` beside this file, and the README's table of it.

``python -m tests.cluster.fault_records`` prints the table.
"""

import json
from pathlib import Path

RESULTS = Path(__file__).with_name("results.json")


def write_record(
    fault: str, *, ends: str, steps_lost: int | None = None, seconds: float | None = None, path: Path = RESULTS
) -> None:
    """Put a fault's record in place of that of an earlier run; ``ends``: what became of the job."""
    records = read_records(path)
    records[fault] = {"steps_lost": steps_lost, "seconds": None if seconds is None else round(seconds, 1), "ends": ends}
    path.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


def read_records(path: Path = RESULTS) -> dict[str, dict[str, object]]:
    """Records by fault."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def table(records: dict[str, dict[str, object]]) -> str:
    """A Markdown table of ``records``."""
    lines = ["| fault | steps done again | seconds to the next new step | end |", "| --- | --- | --- | --- |"]
    for fault, record in records.items():
        lost, seconds = ("none" if record[key] is None else record[key] for key in ("steps_lost", "seconds"))
        lines.append(f"| {fault} | {lost} | {seconds} | {record['ends']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(read_records()))
