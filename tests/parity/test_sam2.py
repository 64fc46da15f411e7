"""Every stage against the sam2 package, with an official configuration and weights that are not vacuous."""

import dataclasses
from typing import Any

import pytest
import torch
from sam2.build_sam import build_sam2
from torch import Tensor, nn

from trocar_engines.network.config import network_config
from trocar_engines.network.sam2s import HIDDEN_BIAS, SAM2S, MemoryView, PromptTensors

SIZE_PX = 512
# float32 sums in another order: 24 layers of attention and convolution leave a few 1e-5.
TOLERANCE = 1e-4


def build_reference(config: str, size_px: int) -> Any:
    reference: Any = build_sam2(config, device="cpu", hydra_overrides_extra=[f"++model.image_size={size_px}"])
    return reference


@pytest.fixture(scope="module")
def pair() -> tuple[Any, SAM2S]:
    """The reference and our network with the same lively weights."""
    torch.manual_seed(0)
    reference = build_reference("configs/sam2.1/sam2.1_hiera_t.yaml", SIZE_PX)
    with torch.no_grad():
        reference.maskmem_tpos_enc.normal_()
        reference.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(5.0)
        for layer in reference.memory_encoder.fuser.layers:
            layer.gamma.fill_(1.0)
    network = SAM2S(network_config("sam2.1-hiera-tiny-512"))
    network.load_state_dict(reference.state_dict())
    return reference.eval().requires_grad_(False), network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def maps(pair: tuple[Any, SAM2S]) -> list[Tensor]:
    """Feature maps of one picture by the reference: stride 4, 8, 16, projected for its decoder."""
    reference, _ = pair
    backbone = reference.forward_image(normalised(picture()))
    return list(backbone["backbone_fpn"])


def picture() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(1, 3, 16, 16, generator=generator) * 255
    smooth = nn.functional.interpolate(coarse, SIZE_PX, mode="bicubic").clamp(0, 255)
    return smooth.permute(0, 2, 3, 1).to(torch.uint8)


def normalised(pixels: Tensor) -> Tensor:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def assert_close(ours: Tensor, reference: Tensor) -> None:
    assert reference.std() > 0, "a constant reference proves nothing"
    torch.testing.assert_close(ours, reference, atol=TOLERANCE, rtol=TOLERANCE)


def test_encode_image_agrees(pair: tuple[Any, SAM2S], maps: list[Tensor]) -> None:
    features = pair[1].encode_image(picture())
    assert_close(features.stride_4, maps[0])
    assert_close(features.stride_8, maps[1])
    assert_close(features.embedding, maps[2])


def reference_attention(
    reference: Any,
    embedding: Tensor,
    spatial: Tensor,
    times: list[int],
    pointers: Tensor,
    ages: list[int],
) -> Tensor:
    """The reference's variable-length memory attention, written from its inputs' definition."""
    size = embedding.shape[-1]
    position = reference.memory_encoder.position_encoding(spatial[:, 0]).flatten(2).permute(2, 0, 1)
    memory = [spatial[:, slot].flatten(2).permute(2, 0, 1) for slot in range(len(times))]
    keys = [position + reference.maskmem_tpos_enc[time] for time in times]
    from sam2.modeling.sam2_utils import get_1d_sine_pe

    age = reference.obj_ptr_tpos_proj(get_1d_sine_pe(torch.tensor(ages) / 15, dim=256))
    tokens = pointers.transpose(0, 1).reshape(len(ages), 1, 4, 64).permute(0, 2, 1, 3).flatten(0, 1)
    memory.append(tokens)
    keys.append(age.unsqueeze(1).repeat_interleave(4, dim=0))
    backbone_position = reference.image_encoder.neck.position_encoding(embedding)
    conditioned = reference.memory_attention(
        curr=[embedding.flatten(2).permute(2, 0, 1)],
        curr_pos=[backbone_position.flatten(2).permute(2, 0, 1)],
        memory=torch.cat(memory),
        memory_pos=torch.cat(keys),
        num_obj_ptr_tokens=len(ages) * 4,
    )
    return conditioned.permute(1, 2, 0).view(1, 256, size, size)  # type: ignore[no-any-return]


def attention_inputs(size: int) -> tuple[Tensor, list[int], Tensor, list[int]]:
    generator = torch.Generator().manual_seed(2)
    spatial = torch.randn(1, 3, 64, size, size, generator=generator)
    pointers = torch.randn(1, 2, 256, generator=generator)
    return spatial, [6, 1, 0], pointers, [7, 1]


def view_of(spatial: Tensor, times: list[int], pointers: Tensor, ages: list[int]) -> MemoryView:
    """The same memory, permuted, among slots full of garbage that a bias hides."""
    garbage = torch.full_like(spatial[:, :1], 1e3)
    order = [2, 0, 1]
    hidden, shown = torch.full((1, 1), HIDDEN_BIAS), torch.zeros(1, 1)
    return MemoryView(
        spatial=torch.cat([spatial[:, order[:2]], garbage, spatial[:, order[2:]]], dim=1),
        slot_time=torch.tensor([[times[order[0]], times[order[1]], 3, times[order[2]]]]),
        slot_bias=torch.cat([shown, shown, hidden, shown], dim=1),
        pointers=torch.cat([pointers, torch.full_like(pointers[:, :1], 1e3)], dim=1),
        pointer_age=torch.tensor([[*map(float, ages), 4.0]]),
        pointer_bias=torch.cat([shown, shown, hidden], dim=1),
    )


def test_attend_memory_agrees_with_permuted_and_hidden_slots(
    pair: tuple[Any, SAM2S], maps: list[Tensor]
) -> None:
    reference, network = pair
    inputs = attention_inputs(maps[2].shape[-1])
    expected = reference_attention(reference, maps[2], *inputs)
    conditioned, classes = network.attend_memory(maps[2], view_of(*inputs))
    assert_close(conditioned, expected)
    assert classes.shape == (1, 0)


def test_a_temporal_index_off_by_one_is_noticed(pair: tuple[Any, SAM2S], maps: list[Tensor]) -> None:
    reference, network = pair
    spatial, times, pointers, ages = attention_inputs(maps[2].shape[-1])
    expected = reference_attention(reference, maps[2], spatial, times, pointers, ages)
    conditioned, _ = network.attend_memory(maps[2], view_of(spatial, [6, 2, 1], pointers, ages))
    assert (conditioned - expected).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("points", [1, 3])
@pytest.mark.parametrize("has_mask", [False, True])
def test_decode_masks_agrees(
    pair: tuple[Any, SAM2S], maps: list[Tensor], points: int, has_mask: bool
) -> None:
    reference, network = pair
    generator = torch.Generator().manual_seed(3)
    coordinates = torch.rand(1, points, 2, generator=generator) * SIZE_PX
    labels = torch.tensor([[1, 0, 1][:points]])
    mask = torch.randn(1, 1, SIZE_PX // 4, SIZE_PX // 4, generator=generator)
    embedding = network.without_memory(maps[2])
    expected = reference._forward_sam_heads(
        backbone_features=embedding,
        point_inputs={"point_coords": coordinates, "point_labels": labels},
        mask_inputs=mask if has_mask else None,
        high_res_features=maps[:2],
        multimask_output=points == 1,
    )
    decoded = network.decode_masks(
        embedding,
        maps[0],
        maps[1],
        torch.zeros_like(maps[1][:, :1]),
        PromptTensors(coordinates, labels, mask, torch.tensor([has_mask])),
        torch.tensor([points == 1]),
    )
    assert_close(decoded.mask_logits, expected[3][:, 0])
    assert_close(decoded.pointer, expected[5])
    torch.testing.assert_close(decoded.presence_logit, expected[6][:, 0], atol=TOLERANCE, rtol=TOLERANCE)
    chosen = expected[2].max(dim=1).values if points == 1 else decoded.predicted_iou
    torch.testing.assert_close(decoded.predicted_iou, chosen, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("is_prompted", [False, True])
def test_encode_memory_agrees(pair: tuple[Any, SAM2S], maps: list[Tensor], is_prompted: bool) -> None:
    reference, network = pair
    logits = torch.randn(1, 1, SIZE_PX // 4, SIZE_PX // 4, generator=torch.Generator().manual_seed(4)) * 5
    full = nn.functional.interpolate(logits, SIZE_PX, mode="bilinear", align_corners=False)
    presence = torch.tensor([[-1.0]])
    reference.binarize_mask_from_pts_for_mem_enc = True
    expected, _ = reference._encode_new_memory(
        current_vision_feats=[maps[2].flatten(2).permute(2, 0, 1)],
        feat_sizes=[maps[2].shape[-2:]],
        pred_masks_high_res=full,
        object_score_logits=presence,
        is_mask_from_pts=is_prompted,
    )
    memory, prototypes = network.encode_memory(
        maps[2], maps[2][:, :0], logits[:, 0], presence[:, 0], torch.tensor([is_prompted])
    )
    assert_close(memory, expected)
    assert prototypes.numel() == 0


def test_network_of_the_other_resolution_takes_the_same_weights() -> None:
    small, large = network_config("sam2.1-hiera-tiny-512"), network_config("sam2.1-hiera-tiny")
    assert dataclasses.replace(small, input_size_px=1024) == large
