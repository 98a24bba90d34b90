"""Small PASS states and views for the tests of this room."""

import torch

from passreid_ray.models.config import HeadConfig, ModelConfig, build_pass_model
from passreid_ray.models.part_vit import Stem
from passreid_ray.train.pass_rates import PassRates
from passreid_ray.train.pass_state import PassState, new_state
from passreid_ray.train.pass_step import Views
from passreid_ray.train.sharing import Strategy

NUM_PROTOTYPES = 32
RATES = PassRates(lr=1e-3, weight_decay=0.05, teacher_momentum=0.99, teacher_temp=0.05, is_last_layer_frozen=False)


def tiny_state(
    *,
    stem: Stem = "patch",
    drop_path: float = 0.2,
    dtype: torch.dtype = torch.float64,
    head_batch_norm: bool = False,
    patch_prototypes: int | None = None,
    strategy: Strategy = "copies",
    depth: int = 2,
) -> PassState:
    """Student and teacher of ``depth`` blocks and width 24, the same on every call and rank."""
    torch.manual_seed(0)
    model = ModelConfig(
        trunk="vit_tiny_patch16_224", embed_dim=24, depth=depth, num_heads=2, stem=stem, drop_path=drop_path
    )
    head = HeadConfig(num_prototypes=NUM_PROTOTYPES, hidden_dim=32, bottleneck_dim=16, batch_norm=head_batch_norm)
    student, teacher = (
        build_pass_model(model, head, (64, 32), 3, patch_prototypes=patch_prototypes, is_teacher=own)
        for own in (False, True)
    )
    return new_state(
        student.to(dtype), teacher.to(dtype), NUM_PROTOTYPES, torch.device("cpu"), fp16=False, strategy=strategy
    )


def random_views(batch: int, seed: int, dtype: torch.dtype = torch.float64) -> Views:
    """Noise in the shape of a batch: two global views, two local views of each of three parts."""
    generator = torch.Generator().manual_seed(seed)
    global_BGCHW = torch.randn(batch, 2, 3, 64, 32, generator=generator, dtype=torch.float64)
    local_BPLCHW = torch.randn(batch, 3, 2, 3, 32, 16, generator=generator, dtype=torch.float64)
    return Views(global_BGCHW.to(dtype), local_BPLCHW.to(dtype))


def rank_slice(views: Views, rank: int, world_size: int) -> Views:
    """The part of a global batch that one worker sees."""
    return views.split(world_size)[rank]
