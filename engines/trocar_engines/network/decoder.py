"""sam2's mask decoder with a batch size that stays open in an exported graph."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from sam2.modeling.sam.mask_decoder import MaskDecoder
from torch import Tensor, nn

READOUT_CLAMP = 8.0
"""Beyond it a readout is sure; its size should not drown the pixels."""


class Candidates(NamedTuple):
    """Four masks of each of B objects before they are drawn, the single mask first.

    Args:
        filters: [B, 4, C/8]; a mask is the product of its filter with the pixels.
        pixels: [B, C/8, 4h, 4w].
        predicted_iou: [B, 4].
        tokens: [B, 4, C].
        presence_logit: [B].
    """

    filters: Tensor
    pixels: Tensor
    predicted_iou: Tensor
    tokens: Tensor
    presence_logit: Tensor


class OutlineRefiner(nn.Module):
    """Two 3x3 convolutions on the decoder's pixels at stride 4, which see the affinity readout beside them.

    sam2's decoder has no neighbourhood at that stride: an outline handed over at stride 8 stays scalloped.
    Starts as the identity.
    """

    def __init__(self, channels: int, hidden: int = 16) -> None:
        super().__init__()
        self.look = nn.Conv2d(channels + 1, hidden, 3, padding=1)
        self.adjust = nn.Conv2d(hidden, channels, 3, padding=1)
        nn.init.zeros_(self.adjust.weight)
        assert self.adjust.bias is not None
        nn.init.zeros_(self.adjust.bias)

    def forward(self, pixels: Tensor, readout: Tensor) -> Tensor:
        """[B, C, H, W] and [B, 1, H, W] logits to [B, C, H, W]."""
        seen = torch.cat([pixels, readout.clamp(-READOUT_CLAMP, READOUT_CLAMP)], dim=1)
        return pixels + self.adjust(torch.relu(self.look(seen)))  # type: ignore[no-any-return]


class BatchedMaskDecoder(MaskDecoder):  # type: ignore[misc]
    """The parameters of sam2's `MaskDecoder`; one picture embedding per object, all four masks returned.

    sam2's own `predict_masks` repeats the position encoding by the batch size, which the exporter freezes;
    here it is broadcast.

    Args:
        has_readout: refine outlines with the affinity readout.
        arguments: of sam2's class.
    """

    def __init__(self, *, has_readout: bool, **arguments: Any) -> None:
        super().__init__(**arguments)
        if has_readout:
            self.refiner = OutlineRefiner(arguments["transformer_dim"] // 8)
        self.filter_makers: list[tuple[Tensor, Tensor]] | None = None

    def settle(self) -> None:
        """See `SAM2S.settle`."""
        self.filter_makers = list(self._stack_filter_makers())

    def _stack_filter_makers(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Weights [4, out, in] and biases [4, 1, out] of every depth of the hypernetworks."""
        for layers in zip(*(network.layers for network in self.output_hypernetworks_mlps), strict=True):
            yield (
                torch.stack([layer.weight for layer in layers]),
                torch.stack([layer.bias for layer in layers]).unsqueeze(1),
            )

    def decode(
        self,
        embedding: Tensor,
        position: Tensor,
        prompts: Tensor,
        stride_4: Tensor,
        stride_8: Tensor,
        readout: Tensor | None,
    ) -> Candidates:
        """Masks of B objects.

        Args:
            embedding: [B, C, h, w], dense prompt already added.
            position: [1, C, h, w].
            prompts: [B, N, C] sparse prompt embeddings; [1, N, C] where all objects have the same, which an
                exported graph then knows beforehand.
            stride_4: [B, C/8, 4h, 4w].
            stride_8: [B, C/4, 2h, 2w].
            readout: [B, 1, 4h, 4w] logits, for a network that has one.
        """
        batch, channels, height, width = embedding.shape
        learned = torch.cat([self.obj_score_token.weight, self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat([learned.unsqueeze(0).expand(prompts.shape[0], -1, -1), prompts], dim=1)
        tokens, pixels = self.transformer(embedding, position, tokens)
        mask_tokens = tokens[:, 2 : 2 + self.num_mask_tokens]
        pixels = pixels.transpose(1, 2).reshape(batch, channels, height, width)
        widen_8, norm, activate_8, widen_4, activate_4 = self.output_upscaling
        pixels = activate_8(norm(widen_8(pixels) + stride_8))
        pixels = activate_4(widen_4(pixels) + stride_4)
        if readout is not None:
            pixels = self.refiner(pixels, readout)
        return Candidates(
            filters=self._make_filters(mask_tokens),
            pixels=pixels,
            predicted_iou=self.iou_prediction_head(tokens[:, 1]),
            tokens=mask_tokens,
            presence_logit=self.pred_obj_score_head(tokens[:, 0]).squeeze(-1),
        )

    def _make_filters(self, tokens: Tensor) -> Tensor:
        """[B, 4, C] mask tokens through a hypernetwork each, all four at once, to [B, 4, C/8]."""
        hidden: Tensor = tokens.unsqueeze(2)
        for depth, (weight, bias) in enumerate(self.filter_makers or self._stack_filter_makers()):
            hidden = torch.relu(hidden) if depth else hidden.to(weight.dtype)
            hidden = torch.matmul(hidden, weight.transpose(1, 2)) + bias
        return hidden.squeeze(2)


def draw(filters: Tensor, pixels: Tensor) -> Tensor:
    """Mask logits [B, M, 4h, 4w] of [B, M, C/8] filters on [B, C/8, 4h, 4w] pixels."""
    # The filters' type is that of the logits; under half precision they stay float32.
    masks = torch.matmul(filters, pixels.flatten(2).to(filters.dtype))
    return masks.unflatten(2, pixels.shape[2:])  # type: ignore[no-any-return]
