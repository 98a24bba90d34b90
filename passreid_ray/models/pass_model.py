"""Backbone and prototype heads over all the views of a batch: what the student and the teacher are."""

# Shape letters: B batch, G global views, P parts, L local views per part, V views of one token, T tokens, D width,
# K prototypes, C,H,W image, M = G + P * L views of an image, N chosen patches, E bottleneck width.

import torch
from torch import Tensor, nn

from passreid_ray.models.part_vit import PartViT
from passreid_ray.models.patch_head import PatchHead
from passreid_ray.models.prototype_head import PrototypeHead


class PassModel(nn.Module):
    """Part-token ViT with one prototype head per token, and one for patches where the masked-patch loss is used."""

    def __init__(self, backbone: PartViT, head: PrototypeHead, patches: PatchHead | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.patches = patches

    def last_layer_parameters(self) -> list[nn.Parameter]:
        """The parameters of all prototypes, which the first epochs of pre-training keep frozen."""
        of_patches = [] if self.patches is None else self.patches.head.last_layer_parameters()
        return self.head.last_layer_parameters() + of_patches

    def forward(
        self, global_GBCHW: Tensor, local_PLBCHW: Tensor | None = None, *, drop_path_noise_L2MB: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """As ``bottlenecks``, with logits ``(V_t, B, K)`` in their place."""
        bottlenecks, tokens_GBTD, _ = self.bottlenecks(
            global_GBCHW, local_PLBCHW, drop_path_noise_L2MB=drop_path_noise_L2MB
        )
        rows = zip(self.head.prototypes(), bottlenecks, strict=True)
        return [prototypes(own_VBD) for prototypes, own_VBD in rows], tokens_GBTD

    def bottlenecks(
        self,
        global_GBCHW: Tensor,
        local_PLBCHW: Tensor | None = None,
        *,
        drop_path_noise_L2MB: Tensor | None = None,
        patches_N: Tensor | None = None,
        hides_patches: bool = False,
    ) -> tuple[list[Tensor], Tensor, Tensor | None]:
        """Each token's bottleneck over the views that show it, the features of the global views, and chosen patches.

        Returns ``(bottlenecks, features_GBTD, patches_NE)``: token 0 (CLS) sees the G global views, then all local
        views part by part; part j sees the global views, then its own L local views. ``bottlenecks[t]`` is
        ``(V_t, B, D)``, what the prototypes of the token are compared with. ``drop_path_noise_L2MB`` has stochastic
        depth's uniform noise per block, branch, view and image.

        ``patches_N`` has the numbers of patches among those of all global views, the first view of each image, then the
        second; their bottlenecks are ``patches_NE``, else none. With ``hides_patches`` the mask token stands in their
        place. Source: PASS (arXiv:2203.03931), section 3.2.
        """
        num_global, batch = global_GBCHW.shape[:2]
        noise = _split_noise(drop_path_noise_L2MB, num_global)
        if patches_N is None:
            tokens_GBTD, patches_NE = self.backbone(global_GBCHW.flatten(0, 1), drop_path_noise=noise[0]), None
        else:
            tokens_GBTD, patches_NE = self._with_patches(global_GBCHW.flatten(0, 1), noise[0], patches_N, hides_patches)
        tokens_GBTD = tokens_GBTD.unflatten(0, (num_global, batch))
        views = [[tokens_GBTD[:, :, token].flatten(0, 1)] for token in range(tokens_GBTD.shape[2])]
        if local_PLBCHW is not None and local_PLBCHW.shape[1] > 0:
            num_parts, per_part = local_PLBCHW.shape[:2]
            part_N = torch.arange(num_parts, device=local_PLBCHW.device).repeat_interleave(per_part * batch)
            local_N2D = self.backbone(local_PLBCHW.flatten(0, 2), part_N, drop_path_noise=noise[1])
            views[0].append(local_N2D[:, 0])
            for part, own in enumerate(local_N2D[:, 1].chunk(num_parts)):
                views[1 + part].append(own)
        bottlenecks = self.head.bottlenecks([torch.cat(own) for own in views])
        return [own_ND.unflatten(0, (-1, batch)) for own_ND in bottlenecks], tokens_GBTD, patches_NE

    def _with_patches(
        self, images_BCHW: Tensor, noise_L2B: Tensor | None, patches_N: Tensor, hides: bool
    ) -> tuple[Tensor, Tensor]:
        """The prefix tokens ``(B, T, D)`` of images and the bottlenecks of chosen patches."""
        if self.patches is None:
            raise ValueError("patches_N: this model has no patch head")
        mask_token = self.patches.mask_token if hides else None
        rows_MD = self.backbone(images_BCHW, drop_path_noise=noise_L2B, patches_M=patches_N, mask_token_1D=mask_token)
        prefix_MD, patches_ND = rows_MD.split([len(rows_MD) - len(patches_N), len(patches_N)])
        return prefix_MD.unflatten(0, (len(images_BCHW), -1)), self.patches.bottlenecks(patches_ND)


def _split_noise(noise_L2MB: Tensor | None, num_global: int) -> tuple[Tensor | None, Tensor | None]:
    if noise_L2MB is None:
        return None, None
    return noise_L2MB[:, :, :num_global].flatten(2), noise_L2MB[:, :, num_global:].flatten(2)
