"""The arithmetic of comparisons and the page that shows them."""

import json
from pathlib import Path

from benchmarks.compare import Spread, Timing, alternate, rows_of, times_as_fast, times_less_cpu, write_result
from benchmarks.machine import Machine
from benchmarks.render import main, shown, table_of

MACHINE = Machine("Some CPU", 4, 15.5, None, "3.11.7", "2.15.0", 2, {"fp32": 180.2, "bf16": 390.0})


def timings(wall: list[float], cpu: list[float]) -> list[Timing]:
    return [Timing(*pair) for pair in zip(wall, cpu, strict=True)]


def test_sides_take_turns_and_every_other_repeat_is_reversed() -> None:
    calls: list[str] = []
    sides = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    found = alternate(sides, 3, warm_ups=2)
    assert "".join(calls) == "abab" + "abbaab"
    assert {name: len(own) for name, own in found.items()} == {"a": 3, "b": 3}


def test_waiting_belongs_to_the_call_that_it_follows() -> None:
    calls: list[str] = []
    alternate({"a": lambda: calls.append("a")}, 1, warm_ups=0, wait=lambda: calls.append("wait"))
    assert calls == ["wait", "a", "wait"]


def test_ratios_are_of_the_same_repeat() -> None:
    baseline, other = timings([2, 9, 4], [8, 8, 8]), timings([1, 3, 4], [4, 2, 1])
    assert times_as_fast(baseline, other) == Spread(2, 1, 3)
    assert times_less_cpu(baseline, other) == Spread(4, 2, 8)


def test_a_row_has_medians_and_the_first_side_is_the_baseline() -> None:
    first, second = rows_of({"a": timings([4, 8, 2], [1, 2, 3]), "b": timings([2, 2, 2], [1, 1, 1])}, images=8)
    assert (first["wall s"], first["CPU s"], first["images/s"], first["times as fast"]) == (4, 2, 2, 1)
    assert (second["wall s"], second["images/s"]) == (2, 4)
    assert (second["times as fast"], second["lowest"], second["highest"]) == (2, 1, 4)
    assert second["times less CPU"] == 2


def test_numbers_are_shown_to_three_digits() -> None:
    values = [0.012345, 1.2345, 12.345, 123.45, 65432.1, 65536, "text", None, True]
    assert [shown(value) for value in values] == [
        "0.0123", "1.23", "12.3", "123", "65,432", "65,536", "text", "", "True",
    ]  # fmt: skip


def test_a_table_has_every_column_of_any_row() -> None:
    table = table_of([{"side": "a", "wall s": 1.5}, {"side": "b", "peak GB": 2.25}])
    assert table.splitlines() == [
        "| side | wall s | peak GB |", "| --- | --- | --- |", "| a | 1.5 |  |", "| b |  | 2.25 |",
    ]  # fmt: skip


def test_kept_results_become_one_page(tmp_path: Path) -> None:
    for name, seconds in (("second", 2.5), ("first", 1.5)):
        rows = [{"side": "ours", "wall s": seconds}]
        path = write_result(name, MACHINE, {"batch": 8}, rows, reading=f"How {name} is read.", folder=tmp_path)
        assert json.loads(path.read_text())["rows"] == rows
    page = tmp_path / "RESULTS.md"
    main(tmp_path, page)
    text = page.read_text()
    assert text.index("## first") < text.index("## second")
    for part in ("How first is read.", "batch 8", "Some CPU, 4 cores, 15.5 GB", "fp32 180, bf16 390", "| ours | 1.5 |"):
        assert part in text
