from pathlib import Path

from tests.cluster.fault_records import read_records, table, write_record


def test_the_table_has_the_newest_record_of_each_fault(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_record("a fault", ends="failed", steps_lost=9, seconds=1, path=path)
    write_record("another", ends="done", path=path)
    write_record("a fault", ends="done", steps_lost=3, seconds=12.34, path=path)
    assert table(read_records(path)).splitlines()[2:] == [
        "| a fault | 3 | 12.3 | done |",
        "| another | none | none | done |",
    ]
