"""The blocks of student and teacher, compiled: all that a step needs is compiled before the first one, or nothing is.

Block by block, because all blocks are one code: a graph is compiled once per kind of call (view size, gradient,
stochastic depth, last block), not once per block. The rest of a step is a few large matrix products, or waits for other
workers, and is left as it is. With masked patches the last block's call on global views is too: it returns as many
tokens as are hidden, and their number changes from step to step.
"""

# Shape letters: B images, N tokens, D width, L blocks.

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from passreid_ray import distributed
from passreid_ray.models.part_vit import PartViT
from passreid_ray.train.precision import Precision, autocast

Compile = Literal["off", "blocks", "cuda_graphs"]

BACKEND = "inductor"
NUM_KINDS_OF_CALL = 32
"""Graphs of one code that torch may keep. A step has eight, and torch's own limit of eight would leave no room."""
NUM_TRIALS = {"blocks": 1, "cuda_graphs": 3}
"""CUDA graphs are recorded in the second call and first replayed in the third."""


@dataclass(frozen=True)
class TrunkCall:
    """The shape of a call of the trunk's blocks: what one kind of views takes in a micro-batch."""

    images: int
    num_tokens: int
    num_out: int
    """Tokens that the last block returns."""

    @classmethod
    def of_views(cls, backbone: PartViT, images: int, size_px: tuple[int, int], num_prefix: int) -> "TrunkCall":
        """That of ``images`` views of ``size_px``, which have ``num_prefix`` tokens beside their patches."""
        rows, columns = (side // patch for side, patch in zip(size_px, backbone.patch_size, strict=True))
        return cls(images, num_prefix + rows * columns, num_prefix)


def compile_blocks(
    student: PartViT,
    teacher: PartViT,
    global_call: TrunkCall,
    local_call: TrunkCall,
    how: Literal["blocks", "cuda_graphs"],
    precision: Precision,
) -> str | None:
    """Compile the blocks of both backbones in place; or leave them as they are and return the reason in words.

    Every rank must call this, before DDP wraps the student, and all come to the same result. What a step calls is
    tried, forward and backward, and so compiled; afterwards this process compiles nothing more: calls of other shapes,
    as in an evaluation, run as if nothing were compiled. Names in ``state_dict()`` stay.
    """
    reasons = distributed.all_gather_objects(_try_all(student, teacher, global_call, local_call, how, precision))
    for rank, reason in enumerate(reasons):
        if reason is not None:
            for block in [*_blocks(student), *_blocks(teacher)]:
                _restore(block)
            return reason if len(reasons) == 1 else f"worker {rank}: {reason}"
    if how == "cuda_graphs":
        # torch must be told where a step begins: to its own guess each block of the teacher, which has no backward,
        # begins one, and may overwrite what it reads (pytorch issue 160281). The teacher comes first in a step.
        teacher.register_forward_pre_hook(_begin_step)
    # A batch of another size must not wait a minute for a graph of its own.
    torch.compiler.set_stance("eager_on_recompile")
    return None


def _try_all(
    student: PartViT,
    teacher: PartViT,
    global_call: TrunkCall,
    local_call: TrunkCall,
    how: Literal["blocks", "cuda_graphs"],
    precision: Precision,
) -> str | None:
    """Compile and try all; why that fails. No collectives in here: other ranks may have failed already."""
    device = next(student.parameters()).device
    if how == "cuda_graphs" and device.type != "cuda":
        return f"CUDA graphs need a GPU, and this worker computes on a {device.type.upper()}"
    # A run before this one, in the same process, may have changed the stance and used up the graphs.
    torch._dynamo.reset()
    torch.compiler.set_stance("default")
    try:
        mode = "reduce-overhead" if how == "cuda_graphs" else None
        for block in [*_blocks(student), *_blocks(teacher)]:
            # A graph that breaks is an error here: in pieces it would be slower than the block as it is.
            block.compile(backend=BACKEND, mode=mode, dynamic=False, fullgraph=True)
        with torch._dynamo.config.patch(recompile_limit=NUM_KINDS_OF_CALL):
            for _ in range(NUM_TRIALS[how]):
                if how == "cuda_graphs":
                    torch.compiler.cudagraph_mark_step_begin()
                _try_step(student, teacher, global_call, local_call, autocast(precision, device))
    except Exception as error:  # noqa: BLE001 whatever a compiler dies of, training can go on without it
        return _in_words(error)
    finally:
        student.zero_grad(set_to_none=True)  # of a trial that broke off
    return None


def _try_step(
    student: PartViT, teacher: PartViT, global_call: TrunkCall, local_call: TrunkCall, context: torch.autocast
) -> None:
    with torch.no_grad(), context:
        _run(teacher, global_call)
    with context:
        sums = [_run(student, call).sum() for call in (global_call, local_call)]
    torch.stack(sums).sum().backward()
    student.zero_grad(set_to_none=True)


def _run(backbone: PartViT, call: TrunkCall) -> Tensor:
    """The blocks on zeros, as a step calls them."""
    weight = next(backbone.parameters())
    shape_BND = (call.images, call.num_tokens, backbone.width)
    tokens_BND = torch.zeros(shape_BND, dtype=weight.dtype, device=weight.device, requires_grad=weight.requires_grad)
    noise_L2B = None
    if backbone.training and backbone.drop_path_rates[-1] > 0:
        noise_L2B = torch.ones(backbone.depth, 2, call.images, device=weight.device)
    return backbone.run_blocks(tokens_BND, noise_L2B, call.num_out)


def _begin_step(*_: object) -> None:
    torch.compiler.cudagraph_mark_step_begin()


def _restore(block: nn.Module) -> None:
    # torch has no public way back from ``Module.compile``; this is the one thing that it sets.
    block._compiled_call_impl = None


def _blocks(backbone: PartViT) -> Sequence[nn.Module]:
    return cast(Sequence[nn.Module], backbone.blocks)


def _in_words(error: BaseException) -> str:
    """The kind of error and the first line of what it says; of the compiler's own error, where torch wraps one."""
    while isinstance(inner := getattr(error, "inner_exception", None), BaseException):
        error = inner
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
