import argparse
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from passreid_ray.errors import UserError
from passreid_ray.models import read_state


class _Attack:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.witness}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path: Path, zipped: bool) -> None:
    path, witness = tmp_path / "evil.pth", tmp_path / "executed"
    torch.save({"teacher": _Attack(witness)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=rf"evil.pth: refused, the file was not executed: it asks for {os.name}.system"):
        read_state(path)
    assert not witness.exists()


def test_a_whole_pickled_model_is_refused_by_name(tmp_path: Path) -> None:
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "model.pth")
    with pytest.raises(UserError, match=r"it asks for torch.nn.modules.linear.Linear"):
        read_state(tmp_path / "model.pth")


@pytest.mark.parametrize("name", ["checkpoint.pth", "model_best.pth.tar", "weights.pt"])
def test_what_the_reference_writes_beside_tensors_is_read(tmp_path: Path, name: str) -> None:
    content = {
        "teacher": {"norm.weight": torch.arange(3.0)},
        "args": argparse.Namespace(arch="vit_small", lr=5e-4, filter_path=None),
        "best_mAP": np.float64(0.5),
        "recall": np.float32(0.25),
        "epoch": 7,
    }
    torch.save(content, tmp_path / name)
    read = read_state(tmp_path / name)
    assert torch.equal(read["teacher"]["norm.weight"], torch.arange(3.0))
    assert vars(read["args"]) == {"arch": "vit_small", "lr": 5e-4, "filter_path": None}
    assert (read["best_mAP"], read["recall"], read["epoch"]) == (0.5, 0.25, 7)


def test_a_numpy_scalar_pickled_by_numpy_1_is_read(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save({"best_mAP": np.float64(0.5)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert read_state(path) == {"best_mAP": 0.5}


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello world", b"\x80\x02}q\x00."])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: not a readable"):
        read_state(tmp_path / name)


def test_a_missing_file_and_a_bare_tensor_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.pth: no such checkpoint file"):
        read_state(tmp_path / "none.pth")
    torch.save(torch.zeros(2), tmp_path / "tensor.pth")
    with pytest.raises(UserError, match="a checkpoint is a dict of tensors; found a Tensor"):
        read_state(tmp_path / "tensor.pth")


def test_the_allow_list_is_gone_after_reading(tmp_path: Path) -> None:
    torch.save({"args": argparse.Namespace()}, tmp_path / "a.pth")
    read_state(tmp_path / "a.pth")
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
