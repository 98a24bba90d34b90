"""The table that a training run ends with."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from passreid_ray.train.run_log import read_jsonl


def print_summary(folder: Path, console: Console) -> None:
    """The table a run ends with: loss and accuracy, first and last."""
    records = read_jsonl(folder / "metrics.jsonl")
    table = Table("", "first", "last")
    for title, key, form in (
        ("loss", "loss", "{:.4f}"),
        ("mAP", "evaluation/mAP", "{:.2%}"),
        ("rank-1", "evaluation/rank1", "{:.2%}"),
    ):
        values = [record[key] for record in records if key in record]
        if values:
            table.add_row(title, form.format(values[0]), form.format(values[-1]))
    console.print(table)
