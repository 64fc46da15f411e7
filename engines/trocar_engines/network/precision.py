"""Half precision with float32 islands, written into the network itself.

Every layer casts its input to the type of its weights: layers with half weights compute in half, the others
are islands. One rule, the same on a GPU, on a CPU and in an exported graph, so that TensorRT reads the
precision of each operator from the graph (strongly typed networks).
"""

import copy

import torch
from sam2.modeling.backbones.hieradet import MultiScaleBlock
from sam2.modeling.sam2_utils import LayerNorm2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from trocar_engines.network.sam2s import SAM2S

ISLANDS = (
    "readout.",
    "readout_presence",
    "semantic_head.",
    "appearance_head.",
    "obj_ptr_tpos_proj",
    "sam_mask_decoder.output_hypernetworks_mlps.",
    "sam_mask_decoder.iou_prediction_head.",
    "sam_mask_decoder.pred_obj_score_head.",
)
"""Layers that stay float32: what is compared, exponentiated or thresholded. The affinity readout's keys go
through exp(20 · similarity), the hypernetworks make the filters of the mask logits."""
_WEIGHTED = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
_NORMS = (nn.LayerNorm, LayerNorm2d, nn.BatchNorm2d)


def halve(
    network: SAM2S,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    has_float32_norms: bool = True,
) -> SAM2S:
    """A copy of a network for inference in half precision.

    Rotary tables, sine positions, embeddings and `ISLANDS` stay float32. Batch norms are folded into their
    convolutions first, in float32. What no frame changes is settled, see `SAM2S.settle`.

    Args:
        network: with its weights; not changed.
        dtype: float16, bfloat16, or float32 for a copy that computes as the original does.
        device: of the copy.
        has_float32_norms: normalisations, and what passes from block to block between them, stay float32.
            False where the runtime's norms sum up in float32 whatever they are given, as torch's do: no cast
            is left between blocks (H200: casts and float32 norms were 0.55 of the 2.2 ms of encode_image).
    """
    halved = copy.deepcopy(network).eval().requires_grad_(False)
    for module in halved.modules():
        if isinstance(module, nn.Sequential):
            _fold_batch_norm(module)
    for name, module in halved.named_modules():
        if isinstance(module, _WEIGHTED):
            if not name.startswith(ISLANDS):
                module.to(dtype)
            module.register_forward_pre_hook(_cast_input)
        elif isinstance(module, _NORMS):
            if not has_float32_norms and not name.startswith(ISLANDS):
                module.to(dtype)
            module.register_forward_pre_hook(_cast_input)
        elif isinstance(module, MultiScaleBlock):
            # Cast before the windows are cut, not after: half as many bytes to move, and the same numbers.
            for norm in (module.norm1, module.norm2):
                norm.register_forward_hook(lambda _norm, _inputs, normed: normed.to(dtype))
    halved.to(device)
    halved.settle(torch.float32 if has_float32_norms else dtype)
    return halved


def _cast_input(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return inputs[0].to(weight.dtype), *inputs[1:]


def _fold_batch_norm(layers: nn.Sequential) -> None:
    for index in range(len(layers) - 1):
        convolution, norm = layers[index], layers[index + 1]
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            layers[index] = fuse_conv_bn_eval(convolution, norm)
            layers[index + 1] = nn.Identity()
