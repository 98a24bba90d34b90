"""All kept results as tables: ``benchmarks/results/*.json`` to ``benchmarks/RESULTS.md``.

Run from the repository: ``python -m benchmarks.render``
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.compare import RESULTS

PAGE = RESULTS.parent / "RESULTS.md"
INTRODUCTION = """# Results of the benchmarks

Written by `python -m benchmarks.render` from `benchmarks/results/*.json`; run a benchmark again to change its numbers.
Ratios are taken within one run on one machine and carry over to others; seconds do not.
"""


def page_of(results: Sequence[Mapping[str, Any]]) -> str:
    """The page, as Markdown; the results in the given order."""
    return "\n".join([INTRODUCTION, *(section_of(result) for result in results)])


def section_of(result: Mapping[str, Any]) -> str:
    """One result: how to read it, its settings and machine, its table."""
    settings = ", ".join(f"{name} {shown(value)}" for name, value in result["settings"].items())
    machine = f"{result['date']}, {machine_line(result['machine'])}"
    parts = [f"## {result['name']}", result["reading"], f"Settings: {settings}.\n{machine}.", table_of(result["rows"])]
    return "\n\n".join(parts) + "\n"


def machine_line(machine: Mapping[str, Any]) -> str:
    """A machine in one line."""
    rates = ", ".join(f"{name} {shown(rate)}" for name, rate in machine["matmul_gflops"].items())
    gpu = f"{machine['gpu']}, " if machine["gpu"] else ""
    return (
        f"{gpu}{machine['cpu']}, {machine['cores']} cores, {shown(machine['memory_gb'])} GB, Python "
        f"{machine['python']}, torch {machine['torch']}, {machine['threads']} threads; matrix products: {rates} GFLOP/s"
    )


def table_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table with a column for every key of any row, in order of appearance; no value: an empty cell."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns), *([shown(row.get(column)) for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def shown(value: object) -> str:
    """A number to three digits, never fewer than those before its point; other values as they are; None as nothing."""
    match value:
        case None:
            return ""
        case float() if abs(value) >= 100:
            return f"{value:,.0f}"
        case float():
            return f"{value:.3g}"
        case bool() | str():
            return str(value)
        case int():
            return f"{value:,}"
        case _:
            return str(value)


def main(results: Path = RESULTS, page: Path = PAGE) -> None:
    """Write the page."""
    page.write_text(page_of([json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]))
    print(f"wrote {page}")


if __name__ == "__main__":
    main()
