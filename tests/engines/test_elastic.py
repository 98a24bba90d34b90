"""Workers whose number follows the nodes, and runs that are told to end."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from passreid_ray.config import build
from passreid_ray.data import open_rows
from passreid_ray.engines import pretrain
from passreid_ray.engines.finetune_config import FinetuneConfig
from passreid_ray.engines.pretrain import check_model, memory_notes
from passreid_ray.engines.terminated import Terminated
from passreid_ray.engines.tuning_config import check_shares
from passreid_ray.errors import UserError
from tests.engines.killing import losses
from tests.engines.micro import IN_PROCESS, micro_config

RANGE = {"num_workers": [1, 3]}


def test_every_number_of_workers_shares_the_same_batches_in_pieces_that_do_not_grow(tmp_path: Path) -> None:
    config = micro_config(tmp_path, batch_size=12, workers=RANGE, micro_batches=2)
    order = config.epoch_order(open_rows(config.data))
    whole = order.batch(5)
    for world_size in config.workers.sizes:
        shares = [order.batch(5, rank, world_size) for rank in range(world_size)]
        assert all(
            np.array_equal(np.concatenate(parts), own)
            for parts, own in zip(zip(*shares, strict=True), whole, strict=True)
        )
        images = 12 // (world_size * config.micro_batches_of(world_size))
        assert images == 2  # as for three workers in the two micro-batches that were asked for


def test_a_batch_that_one_of_the_sizes_cannot_share_is_refused(tmp_path: Path) -> None:
    config = micro_config(tmp_path, workers=RANGE)
    with pytest.raises(UserError, match=r"batch_size: 8 images .* 3 workers \(workers.num_workers=\[1, 3\]\).*is 6"):
        config.epoch_order(open_rows(config.data))
    tuned = build(FinetuneConfig, {"batch_size": 16, "images_per_identity": 4, "workers": RANGE})
    with pytest.raises(UserError, match=r"batch_size: 16 images .* 3 workers .*: the nearest is 12"):
        check_shares(tuned)


def test_streams_that_one_of_the_sizes_cannot_share_are_refused(tmp_path: Path) -> None:
    config = micro_config(tmp_path, batch_size=12, workers=RANGE, order={"streams": 4})
    with pytest.raises(UserError, match="3 workers cannot share 4 streams"):
        config.epoch_order(open_rows(config.data))


def test_prototypes_that_one_of_the_sizes_cannot_share_are_refused(tmp_path: Path) -> None:
    sharing = {"strategy": "sharded_prototypes"}
    config = micro_config(tmp_path, batch_size=12, workers=RANGE, sharing=sharing)
    with pytest.raises(UserError, match="num_prototypes: 32 cannot be shared out equally over 3 workers"):
        check_model(config)


def test_a_loss_that_looks_at_the_whole_batch_is_not_cut_and_its_memory_is_told(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"batch_size": 12, "workers": RANGE, "koleo_weight": 0.1}
    config = micro_config(tmp_path, **changes)
    assert [config.micro_batches_of(size) for size in config.workers.sizes] == [1, 1, 1]
    assert memory_notes(config)[0].startswith(
        "koleo_weight looks at all images of a batch together: 1 worker(s) compute 12"
    )
    with pytest.raises(UserError, match="micro_batches: 2, and koleo_weight looks at all images of a micro-batch"):
        micro_config(tmp_path, **changes, micro_batches=2).epoch_order(open_rows(config.data))


def test_a_backbone_with_batch_norm_is_not_cut() -> None:
    patch, stem = (
        build(FinetuneConfig, {"batch_size": 12, "workers": RANGE, "model": {"stem": stem}})
        for stem in ("patch", "ics")
    )
    assert [patch.pieces_of(size) for size in (1, 2, 3)] == [3, 2, 1]
    assert [stem.pieces_of(size) for size in (1, 2, 3)] == [1, 1, 1]


def test_a_run_in_its_own_process_saves_when_it_gets_sigterm_and_goes_on_from_there(
    cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {
        "workers": IN_PROCESS,
        "evaluation": {},
        "run": {"output": str(tmp_path), "checkpoint_every_epochs": 999},
    }
    config = micro_config(tmp_path, epochs=50, **settings)

    def stop_at_a_step() -> None:
        while max(losses(config.run.folder), default=0) < 7:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_at_a_step, daemon=True).start()
    with pytest.raises(Terminated):
        pretrain.run(config)
    assert "SIGTERM: saving a checkpoint and stopping" in capsys.readouterr().out
    (saved,) = config.run.checkpoints.names()  # the settings asked for none before the end
    step = config.run.checkpoints.meta(saved)["step"]
    assert max(losses(config.run.folder)) == step >= 7
    shorter = micro_config(tmp_path, epochs=step // 6 + 1, **settings)
    pretrain.run(shorter)
    assert f"continuing after step {step} of" in capsys.readouterr().out
