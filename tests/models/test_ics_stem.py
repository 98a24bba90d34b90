import torch

from passreid_ray.models import PartViT, PrototypeHead
from passreid_ray.models.batch_norm import BatchNorm2d
from tests.models.golden_models import TOKENS, Golden, largest_difference, tiny_vit


def _reference_model(golden: Golden) -> tuple[PartViT, PrototypeHead]:
    model = tiny_vit(24, stem="ics", official_pos_resize=True)
    model.load_state_dict(golden.state("student_sd_before/backbone."))
    head = PrototypeHead(24, 64, hidden_dim=48, bottleneck_dim=16)
    head.load_state_dict(golden.state("student_sd_before/head."))
    return model, head


def _largest_logit_difference(golden: Golden, model: PartViT, head: PrototypeHead, mode: str) -> float:
    """One forward pass per view group, in the reference's order: each updates the running statistics."""
    logits = head(model(golden.global_views()).unbind(1))
    differences = [
        largest_difference(logits_BK, golden[f"student_out_{mode}/g_{token}"])
        for token, logits_BK in zip(TOKENS, logits, strict=True)
    ]
    for part, views_BCHW in enumerate(golden.local_views()):
        local_B2D = model(views_BCHW, torch.full((len(views_BCHW),), part))
        inputs = [local_B2D.new_empty(0, 24) for _ in TOKENS]
        inputs[0], inputs[1 + part] = local_B2D.unbind(1)
        logits = head(inputs)
        differences.append(largest_difference(logits[0], golden[f"student_out_{mode}/p{part + 1}_cls"]))
        differences.append(largest_difference(logits[1 + part], golden[f"student_out_{mode}/p{part + 1}_pt"]))
    return max(differences)


def test_eval_forward_equals_the_reference() -> None:
    golden = Golden("pass_oursvit_ibn_stem")
    model, head = _reference_model(golden)
    assert _largest_logit_difference(golden, model.eval(), head, "eval") < 2e-5


def test_train_forward_and_running_statistics_equal_the_reference() -> None:
    golden = Golden("pass_oursvit_ibn_stem")
    model, head = _reference_model(golden)
    assert _largest_logit_difference(golden, model.train(), head, "train") < 2e-5
    expected = golden.state("bn_buffers_after_train_fwd/backbone.")
    assert len(expected) == 9
    buffers = dict(model.named_buffers())
    for name, value in expected.items():
        torch.testing.assert_close(buffers[name], value, rtol=1e-5, atol=1e-5)


def test_every_batch_norm_of_the_stem_is_the_one_over_all_ranks() -> None:
    norms = [module for module in tiny_vit(24, stem="ics").modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert len(norms) == 3
    assert all(type(norm) is BatchNorm2d for norm in norms)


def test_half_precision_conversion_reaches_the_stem() -> None:
    model = tiny_vit(24, stem="ics").bfloat16().eval()
    assert model(torch.randn(1, 3, 64, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
