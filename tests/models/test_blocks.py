from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from passreid_ray.models.blocks import BranchDraws, PartBlock

RATE = 0.4
SOME = [[True, False, True, True, False], [False, True, True, True, True]]


class Scaled(nn.Module):
    """In the place of timm's DropPath: each image's branch times a given number."""

    def __init__(self, scale_B: Tensor) -> None:
        super().__init__()
        self.scale_B = scale_B

    def forward(self, branch_BND: Tensor) -> Tensor:
        return branch_BND * self.scale_B[:, None, None]


def random_block(*, fused: bool = True, **settings: Any) -> Block:
    torch.manual_seed(0)
    block = Block(12, num_heads=3, qkv_bias=True, init_values=0.5, **settings).double()
    for own in block.parameters():
        nn.init.normal_(own, std=0.3)
    setattr(block.attn, "fused_attn", fused)  # noqa: B010 timm calls it final
    return block


def random_tokens(batch: int = 5, length: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, length, 12, dtype=torch.float64, generator=generator).requires_grad_()


def outcome(block: Block, tokens_BND: Tensor, out_BND: Tensor) -> list[Tensor]:
    """The output and the gradients of a nonlinear function of it."""
    leaves = [tokens_BND, *block.parameters()]
    return [out_BND, *torch.autograd.grad(out_BND.cos().sum(), leaves)]


@pytest.mark.parametrize(
    "is_kept",
    [SOME, [[True] * 5, SOME[1]], [SOME[0], [False] * 5], [[False] * 5] * 2],
    ids=["some", "all", "no", "none"],
)
def test_draws_do_what_drop_path_does(is_kept: list[list[bool]]) -> None:
    block, tokens_BND, is_kept_2B = random_block(), random_tokens(), torch.tensor(is_kept)
    got = outcome(block, tokens_BND, PartBlock.of(block)(tokens_BND, BranchDraws(is_kept_2B, RATE)))
    for name, own_B in zip(("drop_path1", "drop_path2"), is_kept_2B, strict=True):
        setattr(block, name, Scaled(own_B.double() / (1 - RATE)))
    for own, expected in zip(got, outcome(block, tokens_BND, Block.forward(block, tokens_BND)), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-12)


def test_dropped_branches_of_images_are_not_computed_on_a_cpu() -> None:
    block, tokens_BND, num_images = random_block(), random_tokens(), []
    for branch in (block.attn.get_submodule("proj"), block.mlp):
        branch.register_forward_hook(lambda _module, inputs, _output: num_images.append(len(inputs[0])))
    PartBlock.of(block)(tokens_BND, BranchDraws(torch.tensor(SOME), RATE))
    assert num_images == [3, 4]


def test_a_branch_that_all_images_drop_gives_zero_gradients_not_none() -> None:
    block, tokens_BND = random_block(), random_tokens()
    draws = BranchDraws(torch.zeros(2, 5, dtype=torch.bool), RATE)
    PartBlock.of(block)(tokens_BND, draws).sum().backward()
    assert all(own.grad is not None and not own.grad.any() for own in block.parameters())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("settings", [{}, {"qk_norm": True, "scale_attn_norm": True}], ids=["plain", "norms"])
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("is_dropped", [False, True])
def test_the_first_tokens_are_those_of_the_whole_block(
    fused: bool, settings: dict[str, bool], is_padded: bool, is_dropped: bool
) -> None:
    block, tokens_BND = random_block(fused=fused, **settings), random_tokens()
    visible_B11N = torch.ones(5, 1, 1, 9, dtype=torch.bool)
    visible_B11N[1:3, ..., 6:] = False
    visible = visible_B11N if is_padded else None
    draws = BranchDraws(torch.tensor(SOME), RATE) if is_dropped else None
    got = PartBlock.of(block)(tokens_BND, draws, num_out=3, visible_B11N=visible)
    whole = PartBlock.of(block)(tokens_BND, draws, visible_B11N=visible)[:, :3]
    assert got.shape == (5, 3, 12)
    for own, expected in zip(outcome(block, tokens_BND, got), outcome(block, tokens_BND, whole), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-12)


CHOSEN = [0, 1, 9, 17, 18, 27, 30, 36, 44]
"""Numbers of tokens of five images of nine tokens each; not as many of each image."""


@pytest.mark.parametrize("is_kept", [None, SOME, [SOME[0], [False] * 5]], ids=["kept", "some", "no MLP"])
def test_chosen_tokens_of_any_images_are_those_of_the_whole_block(is_kept: list[list[bool]] | None) -> None:
    block, tokens_BND = random_block(), random_tokens()
    draws = None if is_kept is None else BranchDraws(torch.tensor(is_kept), RATE)
    got = PartBlock.of(block)(tokens_BND, draws, out_M=torch.tensor(CHOSEN))
    whole = PartBlock.of(block)(tokens_BND, draws).flatten(0, 1)[CHOSEN]
    assert got.shape == (len(CHOSEN), 12)
    for own, expected in zip(outcome(block, tokens_BND, got), outcome(block, tokens_BND, whole), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-12)


def test_the_mlp_is_that_of_the_chosen_tokens_only() -> None:
    block, tokens_BND, rows = random_block(), random_tokens(), []
    block.mlp.register_forward_hook(lambda _m, inputs, _o: rows.append(inputs[0].numel() // 12))
    PartBlock.of(block)(tokens_BND, out_M=torch.tensor(CHOSEN))
    assert rows == [len(CHOSEN)]


def test_only_the_first_tokens_ask() -> None:
    block, tokens_BND, lengths = random_block(), random_tokens(), []
    block.attn.get_submodule("proj").register_forward_hook(lambda _m, inputs, _o: lengths.append(inputs[0].shape[1]))
    PartBlock.of(block)(tokens_BND, num_out=3)
    assert lengths == [3]


def test_a_gate_is_that_of_the_asking_token() -> None:
    block, tokens_BND = random_block(), random_tokens()
    setattr(block.attn, "gate", nn.Linear(12, 12).double())  # noqa: B010 an optional layer of timm's
    got, whole = PartBlock.of(block)(tokens_BND, num_out=3), PartBlock.of(block)(tokens_BND)[:, :3]
    torch.testing.assert_close(got, whole)
