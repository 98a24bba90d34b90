from dataclasses import replace

import pytest

from passreid_ray.engines.hangs import find_hang, hang_line, stacks_text
from passreid_ray.train.beats import Beat, Heard, WorkerProcess
from passreid_ray.train.pulse import CHECKPOINT, DATA, EVALUATION, LABELS, LABELS_OF_RANK_0, MINING, STEP, Phase

LIMIT_SECONDS = 100.0


def worker(
    rank: int,
    phase: Phase,
    *,
    still: float = 120,
    silent: float = 1,
    waits: bool = False,
    steps: int = 12,
    first_step: int = 0,
) -> Heard:
    """A worker that has not got on for ``still`` seconds when it beat, ``silent`` seconds ago."""
    process = WorkerProcess(rank, f"node{rank}", f"10.0.0.{rank}", 100 + rank, 5.0)
    place = "passreid_ray/data/read_ahead.py:30 (made_ahead)"
    return Heard(Beat(process, phase, first_step, steps, still, place, waits, f"stacks of {rank}\n"), silent)


def culprits(*heard: Heard) -> list[int] | None:
    hang = find_hang(heard, LIMIT_SECONDS)
    return None if hang is None else [culprit.beat.process.rank for culprit in hang.culprits]


def test_nobody_hangs_as_long_as_one_worker_gets_on() -> None:
    assert culprits() is None
    assert culprits(worker(0, STEP, waits=True), worker(1, DATA, still=98.9)) is None
    assert culprits(worker(0, STEP, waits=True), worker(1, DATA, still=99)) == [1]


def test_a_worker_that_does_not_answer_is_to_blame_wherever_it_was() -> None:
    others = [worker(0, DATA), worker(2, STEP, waits=True)]
    assert culprits(others[0], worker(1, STEP, still=1, silent=110, waits=True), others[1]) == [1]


def test_all_workers_that_do_not_answer_are_to_blame() -> None:
    silent = [worker(rank, STEP, still=2, silent=110) for rank in (1, 3)]
    assert culprits(worker(0, STEP, waits=True), silent[0], worker(2, STEP, waits=True), silent[1]) == [1, 3]


def test_a_data_source_that_blocks_in_one_rank_is_found_behind_those_that_wait_in_their_backward_pass() -> None:
    waiting = [worker(rank, STEP, waits=True, still=130) for rank in (0, 2)]
    assert culprits(waiting[0], worker(1, DATA, still=125), waiting[1]) == [1]


def test_with_gpus_one_that_waits_for_data_is_found_behind_those_that_wait_in_a_step_unseen_by_python() -> None:
    assert culprits(worker(0, STEP), worker(1, DATA), worker(2, STEP)) == [1]


@pytest.mark.parametrize("phase", [CHECKPOINT, EVALUATION, LABELS])
def test_what_rank_0_does_alone_is_found_behind_those_that_wait_for_it(phase: Phase) -> None:
    assert culprits(worker(0, phase), worker(1, STEP, waits=True), worker(2, LABELS_OF_RANK_0)) == [0]


def test_where_all_wait_for_each_other_the_one_with_the_fewest_steps_is_to_blame() -> None:
    waiting = {rank: worker(rank, STEP, waits=True, still=120 + rank) for rank in range(3)}
    assert culprits(*waiting.values()) == [2]  # still for the longest
    waiting[1] = worker(1, STEP, waits=True, steps=11)
    assert culprits(*waiting.values()) == [1]


def test_waiting_for_an_actor_may_last_unless_the_worker_itself_does_not_answer() -> None:
    assert culprits(worker(0, MINING, still=5000), worker(1, DATA, still=5000, waits=True)) is None
    assert culprits(worker(0, MINING, silent=80), worker(1, DATA, waits=True)) == [0]


def test_the_step_counts_from_where_the_run_went_on() -> None:
    hang = find_hang([worker(0, STEP, first_step=30, steps=4, waits=True), worker(1, DATA, steps=3)], LIMIT_SECONDS)
    assert hang is not None
    assert hang.step == 34


def test_the_line_says_who_where_since_when_and_what_becomes_of_it() -> None:
    hang = find_hang([worker(0, STEP, waits=True), worker(1, DATA)], LIMIT_SECONDS)
    assert hang is not None
    assert hang_line(hang, hang.culprits[0], "", "run/stacks-12.txt", "It was killed") == (
        "rank 1 on 10.0.0.1 (pid 101) hangs after step 12: no progress for 121 s. It is waiting for data, at "
        "passreid_ray/data/read_ahead.py:30 (made_ahead). All stacks are in run/stacks-12.txt. It was killed"
    )


def test_the_line_of_a_worker_that_does_not_answer_says_what_its_machine_sees() -> None:
    hang = find_hang([worker(0, STEP, still=1, silent=110)], LIMIT_SECONDS)
    assert hang is not None
    line = hang_line(hang, hang.culprits[0], "stopped by a signal", "run/stacks-12.txt", "It was killed")
    assert "it has not answered for 110 s (stopped by a signal). When last heard of it was in a step, at passr" in line


def test_the_file_has_the_stacks_of_all_and_what_was_seen_of_those_that_do_not_answer() -> None:
    silent = worker(1, STEP, still=1, silent=110)
    silent = replace(silent, beat=replace(silent.beat, stacks=""))
    hang = find_hang([worker(0, STEP, waits=True), silent], LIMIT_SECONDS)
    assert hang is not None
    text = stacks_text(hang, {1: "seen by py-spy\n"})
    assert text.startswith("After step 12 no worker gets on, held up by rank 1 on 10.0.0.1 (pid 101).\n")
    own, other = text.split("== rank 1")
    assert "stacks of 0\n" in own
    assert "as it said 1 s ago: in a step, where it waits for the others, no progress for 120 s\n" in own
    assert "has not answered for 110 s; as read from outside:\n\nseen by py-spy\n" in other
    assert "as it said" not in other
