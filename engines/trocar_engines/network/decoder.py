"""sam2's mask decoder with a batch size that stays open in an exported graph."""

import torch
from sam2.modeling.sam.mask_decoder import MaskDecoder
from torch import Tensor


class BatchedMaskDecoder(MaskDecoder):  # type: ignore[misc]
    """The parameters of sam2's `MaskDecoder`; one picture embedding per object, all four masks returned.

    sam2's own `predict_masks` repeats the position encoding by the batch size, which the exporter freezes;
    here it is broadcast.
    """

    def decode(
        self, embedding: Tensor, position: Tensor, prompts: Tensor, stride_4: Tensor, stride_8: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Masks of B objects.

        Args:
            embedding: [B, C, h, w], dense prompt already added.
            position: [1, C, h, w].
            prompts: [B, N, C] sparse prompt embeddings.
            stride_4: [B, C/8, 4h, 4w].
            stride_8: [B, C/4, 2h, 2w].

        Returns:
            mask logits [B, 4, 4h, 4w] (the single mask first), predicted IoU [B, 4], mask tokens [B, 4, C],
            presence logits [B, 1].
        """
        batch, channels, height, width = embedding.shape
        learned = torch.cat([self.obj_score_token.weight, self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat([learned.unsqueeze(0).expand(batch, -1, -1), prompts], dim=1)
        tokens, pixels = self.transformer(embedding, position, tokens)
        mask_tokens = tokens[:, 2 : 2 + self.num_mask_tokens]
        pixels = pixels.transpose(1, 2).reshape(batch, channels, height, width)
        widen_8, norm, activate_8, widen_4, activate_4 = self.output_upscaling
        pixels = activate_8(norm(widen_8(pixels) + stride_8))
        pixels = activate_4(widen_4(pixels) + stride_4)
        filters = torch.stack(
            [mlp(mask_tokens[:, index]) for index, mlp in enumerate(self.output_hypernetworks_mlps)], dim=1
        )
        masks = torch.matmul(filters, pixels.flatten(2)).unflatten(2, (4 * height, 4 * width))
        return (
            masks,
            self.iou_prediction_head(tokens[:, 1]),
            mask_tokens,
            self.pred_obj_score_head(tokens[:, 0]),
        )
