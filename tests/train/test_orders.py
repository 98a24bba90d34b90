"""What is decided on rank 0 is done by all ranks after the same step."""

import time
from typing import Any

import pytest
import ray
import ray.train
import torch

from passreid_ray import distributed
from passreid_ray.engines.board import Board
from passreid_ray.train import orders as orders_module
from passreid_ray.train.checkpoints import CheckpointStore
from passreid_ray.train.orders import NOTHING, Left, Order, Orders
from passreid_ray.train.pulse import pulse
from passreid_ray.train.worker import WorkerContext
from tests.ranks import run_on_ranks


@pytest.fixture
def board(cluster: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: None)
    monkeypatch.setattr(orders_module, "CHECK_SECONDS", 0.0)  # ask after every step
    return Board.remote()


def orders_of(board: Any) -> Orders:
    return Orders(WorkerContext(0, 1, torch.device("cpu"), board, CheckpointStore("unused")))


def test_nothing_is_done_while_nothing_is_asked(board: Any) -> None:
    orders = orders_of(board)
    assert [orders.after_step(step) for step in range(1, 4)] == [NOTHING] * 3
    orders.carry_out(NOTHING)


def test_workers_that_are_asked_to_leave_save_first_and_go_on_being_asked(board: Any) -> None:
    orders = orders_of(board)
    ray.get(board.ask.remote("leave"))
    order = orders.after_step(1)
    assert order == Order(save=True, leave=True)
    assert order.ends_group
    with pytest.raises(Left):
        orders.carry_out(order)
    assert ray.get(board.asked.remote()) == "leave"


def test_workers_that_are_to_be_resized_save_answer_and_wait(board: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders_module, "WAIT_SECONDS", 0.3)
    orders = orders_of(board)
    ray.get(board.ask.remote("wait"))
    order = orders.after_step(1)
    assert order == Order(save=True, wait=True)
    start = time.monotonic()
    orders.carry_out(order)
    assert time.monotonic() - start >= 0.3
    assert pulse.last_seconds > start  # it is not taken for one that hangs
    assert ray.get(board.asked.remote()) is None


def test_a_resize_does_not_take_back_that_workers_are_to_leave(board: Any) -> None:
    for what in ("leave", "wait"):
        ray.get(board.ask.remote(what))
    ray.get(board.answer.remote())
    assert ray.get(board.asked.remote()) == "leave"


def test_workers_have_answered_until_others_begin(board: Any) -> None:
    ray.get(board.ask.remote("wait"))
    assert not ray.get(board.has_answered.remote())
    ray.get(board.answer.remote())
    ray.get(board.ask.remote("leave"))  # SIGTERM, while they wait for their end: they have saved
    assert ray.get(board.has_answered.remote())
    ray.get(board.begin_group.remote())
    assert not ray.get(board.has_answered.remote())
    assert ray.get(board.asked.remote()) == "leave"


def test_what_one_group_was_asked_to_wait_for_is_not_for_the_next(board: Any) -> None:
    ray.get(board.ask.remote("wait"))
    ray.get(board.begin_group.remote())
    assert ray.get(board.asked.remote()) is None


def test_a_notice_makes_a_checkpoint_at_once_and_others_while_it_stands(
    board: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(orders_module.time, "monotonic", lambda: now[0])
    orders = orders_of(board)
    assert orders.after_step(1) == NOTHING
    monkeypatch.setattr(ray.train, "get_preemption_info", object)
    saved = []
    for step in range(2, 40):
        now[0] += 1.0
        if orders.after_step(step).save:
            saved.append(step)
    assert saved == [2, 17, 32]  # every 15 s
    told = [post["text"] for post in ray.get(board.take.remote()) if post["kind"] == "say"]
    assert told == ["step 2: a node of this run is about to be taken away; saving a checkpoint"]


def test_short_steps_are_not_all_followed_by_questions(board: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders_module, "CHECK_SECONDS", 1.0)
    now, asked = [0.0], []
    monkeypatch.setattr(orders_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: asked.append(now[0]))
    orders = orders_of(board)
    for step in range(1, 101):
        now[0] += 0.125
        orders.after_step(step)
    assert asked == [0.125, *[1.125 + second for second in range(12)]]


def _ask_on_two_ranks() -> list[bool]:
    """Which of 12 steps were saved after, when only rank 0 knows of a notice that comes after step 5."""
    rank = distributed.rank()
    steps_asked: list[int] = []
    step = 0

    def notice() -> object | None:
        steps_asked.append(step)
        return object() if rank == 0 and step > 5 else None

    class NoBoard:
        def __getattr__(self, name: str) -> Any:
            return self

        def remote(self, *_: Any) -> None:
            return None

    ray.train.get_preemption_info = notice  # pyright: ignore[reportAttributeAccessIssue] this process ends with it
    setattr(ray, "get", lambda _: None)  # noqa: B010
    orders_module.CHECK_SECONDS = 0.02
    orders = Orders(WorkerContext(rank, 2, torch.device("cpu"), NoBoard(), CheckpointStore("unused")))
    saved = []
    for step in range(1, 13):
        time.sleep(0.005 * (1 + rank))  # clocks of ranks do not agree on anything
        saved.append(orders.after_step(step).save)
    return [*saved, *(own in steps_asked for own in range(1, 13))]


def test_all_ranks_save_after_the_same_step_and_ask_equally_often() -> None:
    first, second = run_on_ranks(_ask_on_two_ranks)
    assert first == second
    assert sum(first[:12]) == 1  # once, as long as the notice is fresh
    assert not any(first[:5])
