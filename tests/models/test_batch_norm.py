import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from passreid_ray.models.batch_norm import BatchNorm1d, BatchNorm2d
from tests.ranks import run_on_ranks

_SHARDS = (3, 5)
"""Images of each rank; unequal on purpose."""


def _images(num_axes: int) -> Tensor:
    return torch.randn(8, 4, 3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)[
        (...,) if num_axes == 4 else (..., 0, 0)
    ]


def _weighted(output: Tensor, rows: slice) -> Tensor:
    weights = torch.randn(8, *output.shape[1:], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return (output * weights[rows]).sum()


def _norm(kind: type[nn.BatchNorm1d | nn.BatchNorm2d], momentum: float | None) -> nn.BatchNorm1d | nn.BatchNorm2d:
    norm = kind(4, momentum=momentum).double()
    nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(3))
    nn.init.normal_(norm.bias, generator=torch.Generator().manual_seed(4))
    return norm


def _check_rank() -> None:
    rank = dist.get_rank()
    rows = slice(sum(_SHARDS[:rank]), sum(_SHARDS[: rank + 1]))
    for ours, torchs, num_axes in ((BatchNorm1d, nn.BatchNorm1d, 2), (BatchNorm2d, nn.BatchNorm2d, 4)):
        for momentum in (0.1, None):
            whole = _images(num_axes).requires_grad_()
            expected_norm = _norm(torchs, momentum)
            shard = _images(num_axes)[rows].requires_grad_()
            norm = _norm(ours, momentum)
            expected_norm(whole)
            norm(shard)
            expected = expected_norm(whole)
            output = norm(shard)
            torch.testing.assert_close(output, expected[rows])

            _weighted(expected, slice(None)).backward()
            _weighted(output, rows).backward()
            assert shard.grad is not None
            assert whole.grad is not None
            torch.testing.assert_close(shard.grad, whole.grad[rows])
            for parameter, expected_parameter in zip(norm.parameters(), expected_norm.parameters(), strict=True):
                assert parameter.grad is not None
                dist.all_reduce(parameter.grad)
                torch.testing.assert_close(parameter.grad, expected_parameter.grad)

            for buffer, expected_buffer in zip(norm.buffers(), expected_norm.buffers(), strict=True):
                torch.testing.assert_close(buffer, expected_buffer)
                copies = [torch.empty_like(buffer) for _ in _SHARDS]
                dist.all_gather(copies, buffer)
                assert torch.equal(copies[0], copies[1])

            torch.testing.assert_close(norm.eval()(shard), expected_norm.eval()(whole)[rows])
            half = norm.train()(shard.detach().bfloat16())
            assert half.dtype == torch.bfloat16
            torch.testing.assert_close(half.double(), output, rtol=0.02, atol=0.05)


def test_two_ranks_equal_one_rank_with_all_images() -> None:
    run_on_ranks(_check_rank, world_size=len(_SHARDS))


@pytest.mark.parametrize(
    ("ours", "torchs", "num_axes"), [(BatchNorm1d, nn.BatchNorm1d, 2), (BatchNorm2d, nn.BatchNorm2d, 4)]
)
def test_one_rank_is_torch_batch_norm(ours: type[BatchNorm1d], torchs: type[nn.BatchNorm1d], num_axes: int) -> None:
    norm, expected_norm = _norm(ours, 0.1), _norm(torchs, 0.1)
    images = _images(num_axes)
    assert torch.equal(norm(images), expected_norm(images))
    assert torch.equal(norm.eval()(images), expected_norm.eval()(images))
    for buffer, expected in zip(norm.buffers(), expected_norm.buffers(), strict=True):
        assert torch.equal(buffer, expected)
