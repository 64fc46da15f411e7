"""SAM2S: SAM 2 with diverse memory, an affinity readout and a temporal semantic head.

One method per stage of a frame's way, each a pure function of its tensors with static shapes, so that every
runtime executes the same graph:

    encode_image ─ attend_memory ─ decode_masks ─ encode_memory ─ recognise

Built from the modules of the sam2 package (arXiv 2408.00714), with that package's parameter names, so that
official SAM 2.1 checkpoints load as they are. What the reference predictor keeps in dictionaries that grow,
this network takes as tensors: slots that are empty are hidden by a bias.
"""

from typing import Any, NamedTuple

import torch
from sam2.modeling.backbones.hieradet import Hiera
from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
from sam2.modeling.memory_encoder import CXBlock, Fuser, MaskDownSampler, MemoryEncoder
from sam2.modeling.position_encoding import PositionEmbeddingSine
from sam2.modeling.sam.prompt_encoder import PromptEncoder
from sam2.modeling.sam.transformer import TwoWayTransformer
from sam2.modeling.sam2_utils import MLP, LayerNorm2d
from torch import Tensor, nn

from trocar_engines.network.appearance import AppearanceHead
from trocar_engines.network.attention import (
    RealRoPEAttention,
    SlotMemoryAttention,
    local_attention_start,
    sine_position,
)
from trocar_engines.network.config import ConvTrunkConfig, HieraConfig, NetworkConfig
from trocar_engines.network.decoder import BatchedMaskDecoder, Candidates, draw
from trocar_engines.network.readout import AffinityReadout
from trocar_engines.network.semantic import SemanticHead
from trocar_engines.network.trunk import ConvTrunk

HIDDEN_BIAS = -1e4
"""Added to the attention scores of an empty slot; finite in half precision."""
ABSENT_LOGIT = -1024.0
"""Mask logits of an object that is not in the picture, as in SAM 2."""
POINTER_TIME_SCALE = 15.0
"""SAM 2 scales a pointer's age by min(frames, 16) - 1; on a stream that is 15."""
FEW_CHANNELS = 16
"""H200: of the 0.33 ms of encode_memory 0.14 went into norms, most of it over 4 channels of 65,536 points."""
STABILITY_DELTA = 0.05
STABILITY_THRESHOLD = 0.98
"""Below it a single mask yields to the best of three (SAM 2.1's predictor settings)."""
IMAGE_MEAN = (123.675, 116.28, 103.53)
IMAGE_STD = (58.395, 57.12, 57.375)
"""ImageNet statistics in grey levels, as SAM 2 normalises."""


class ImageFeatures(NamedTuple):
    """What `encode_image` knows of a picture.

    Args:
        embedding: [B, C, h, w] at stride 16.
        stride_4: [B, C/8, 4h, 4w], already projected for the mask decoder.
        stride_8: [B, C/4, 2h, 2w], likewise.
        keys: [B, dim, 2h, 2w] of the affinity readout, or [B, 0, 2h, 2w] where the network has none.
    """

    embedding: Tensor
    stride_4: Tensor
    stride_8: Tensor
    keys: Tensor


class MemoryView(NamedTuple):
    """The memory of B objects as the network reads it; K slots and P pointers, some of them empty.

    Args:
        spatial: [B, K, C_mem, h', w'] at the stride of the memory.
        slot_time: int64 [B, K] row of the temporal embedding: 6 conditioning, 5 oldest recent … 0 latest,
            7 long-term, 8 correction (`num_maskmem` and on).
        slot_bias: [B, K], 0 or `HIDDEN_BIAS`.
        pointers: [B, P, C].
        pointer_age: [B, P] in frames.
        pointer_bias: [B, P], 0 or `HIDDEN_BIAS`.
    """

    spatial: Tensor
    slot_time: Tensor
    slot_bias: Tensor
    pointers: Tensor
    pointer_age: Tensor
    pointer_bias: Tensor


class PromptTensors(NamedTuple):
    """Prompts of B objects as the mask decoder reads them.

    Args:
        points: [B, N, 2] (x, y) in input pixels.
        labels: int64 [B, N]: 1 on the object, 0 off it, 2 and 3 box corners, -1 padding (attended to, as in
            SAM 2: one padding point stands for "no points", and sam2 appends another).
        mask: [B, 1, 4h, 4w] logits.
        has_mask: bool [B]; where False the mask is ignored.
    """

    points: Tensor
    labels: Tensor
    mask: Tensor
    has_mask: Tensor


class Decoded(NamedTuple):
    """What the mask decoder says of B objects.

    Args:
        mask_logits: [B, 4h, 4w]; all `ABSENT_LOGIT` where the object is absent.
        predicted_iou: [B], 0 to 1.
        presence_logit: [B]; above 0 the object is in the picture.
        pointer: [B, C] object pointer.
    """

    mask_logits: Tensor
    predicted_iou: Tensor
    presence_logit: Tensor
    pointer: Tensor


class Recognition(NamedTuple):
    """What B objects look like.

    Args:
        class_logits: [B, K].
        descriptor: [B, `DESCRIPTOR_DIM`] unit vectors, see `appearance.AppearanceHead`.
    """

    class_logits: Tensor
    descriptor: Tensor


class AllMasks(NamedTuple):
    """Every candidate of the mask decoder, for training: single mask first, then the three of a multimask.

    Args:
        mask_logits: [B, 4, 4h, 4w].
        predicted_iou: [B, 4].
        tokens: [B, 4, C].
        presence_logit: [B].
    """

    mask_logits: Tensor
    predicted_iou: Tensor
    tokens: Tensor
    presence_logit: Tensor


class SAM2S(nn.Module):
    """The network; see the module's docstring for its stages.

    Args:
        config: its shape.
    """

    picture_position: Tensor
    memory_position: Tensor
    image_mean: Tensor
    image_std: Tensor
    dense_position: Tensor | None
    no_points: Tensor | None
    no_mask: Tensor | None
    scaled_position: Tensor | None

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        d_model, d_memory, size = config.d_model, config.d_memory, config.embedding_size
        self.image_encoder = _image_encoder(config)
        self.memory_attention = SlotMemoryAttention(
            d_model=d_model,
            d_memory=d_memory,
            mlp=config.memory_mlp,
            layers=config.memory_layers,
            size=size,
            memory_stride=config.embedding_size // config.memory_size,
        )
        self.memory_encoder = _memory_encoder(config)
        self.mask_downsample = nn.Conv2d(1, 1, kernel_size=4, stride=4)
        self.maskmem_tpos_enc = nn.Parameter(torch.randn(config.num_maskmem, 1, 1, d_memory) * 0.02)
        if config.has_long_term_embedding:
            self.long_term_tpos_enc = nn.Parameter(torch.randn(2, 1, 1, d_memory) * 0.02)
        self.no_mem_embed = nn.Parameter(torch.randn(1, 1, d_model) * 0.02)
        # Read by nothing under `directly_add_no_mem_embed`; kept so that official files load strictly.
        self.no_mem_pos_enc = nn.Parameter(torch.zeros(1, 1, d_model), requires_grad=False)
        self.no_obj_ptr = nn.Parameter(torch.randn(1, d_model) * 0.02)
        self.no_obj_embed_spatial = nn.Parameter(torch.randn(1, d_memory) * 0.02)
        self.sam_prompt_encoder = PromptEncoder(
            embed_dim=d_model,
            image_embedding_size=(size, size),
            input_image_size=(config.input_size_px, config.input_size_px),
            mask_in_chans=16,
        )
        self.sam_mask_decoder = BatchedMaskDecoder(
            has_readout=bool(config.readout_dim),
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(
                depth=2, embedding_dim=d_model, mlp_dim=config.decoder_mlp, num_heads=config.decoder_heads
            ),
            transformer_dim=d_model,
            iou_head_depth=3,
            iou_head_hidden_dim=256,
            use_high_res_features=True,
            iou_prediction_use_sigmoid=True,
            pred_obj_scores=True,
            pred_obj_scores_mlp=True,
            use_multimask_token_for_obj_ptr=True,
        )
        self.obj_ptr_proj = MLP(d_model, d_model, d_model, 3)
        self.obj_ptr_tpos_proj = nn.Linear(d_model, d_memory)
        if config.readout_dim:
            self.readout = AffinityReadout(features=d_model, dim=config.readout_dim, size=2 * size)
            self.readout_to_stride_8 = nn.Conv2d(1, d_model // 4, 1)
            self.readout_gain = nn.Parameter(torch.tensor(0.5))
            # Whether anything in the picture resembles the object; a token learns that slowly.
            self.readout_presence = nn.Linear(2, 1, bias=False)
            nn.init.zeros_(self.readout_presence.weight)
        if config.classes:
            self.semantic_head = SemanticHead(d_model=d_model, d_memory=d_memory, classes=config.classes)
            self.appearance_head = AppearanceHead()
        picture_position = PositionEmbeddingSine(num_pos_feats=d_model, normalize=True)
        memory_position = PositionEmbeddingSine(num_pos_feats=d_memory, normalize=True)
        grid = torch.zeros(1, 1, size, size)
        self.register_buffer("picture_position", picture_position(grid), persistent=False)
        pooled = nn.functional.avg_pool2d(memory_position(grid), size // config.memory_size)
        self.register_buffer("memory_position", pooled, persistent=False)
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
        self.register_buffer("image_mean", mean, persistent=False)
        self.register_buffer("image_std", std, persistent=False)
        self.register_buffer("dense_position", None, persistent=False)
        self.register_buffer("no_points", None, persistent=False)
        self.register_buffer("no_mask", None, persistent=False)
        self.register_buffer("scaled_position", None, persistent=False)
        if isinstance(config.trunk, ConvTrunkConfig):
            self._start_small()
        _fuse_channel_norms(self)

    def _start_small(self) -> None:
        """Initial values with which a small network trains from scratch; official weights replace them."""
        for layer in self.memory_attention.layers:
            local_attention_start(layer.self_attn)
            local_attention_start(layer.cross_attn_image)
        # The decoder adds prompt and picture embeddings; with features many times larger than the
        # prompts' (std 4 against 0.1) a click drowns.
        for embedding in self.sam_prompt_encoder.point_embeddings:
            nn.init.normal_(embedding.weight, std=1.0)

    @torch.no_grad()
    def settle(self, dtype: torch.dtype = torch.float32) -> None:
        """Compute once what would be computed anew on every frame though no frame changes it.

        A compiler finds that out by itself; a captured graph repeats it. The network must neither train nor
        load weights nor move to another device afterwards.

        Args:
            dtype: of what is added to pictures, and so of all that passes from block to block.
        """
        self.dense_position = self._embed_places().to(dtype)
        self.no_points = self._embed_no_points()
        self.no_mask = self._no_mask.to(dtype)
        self.scaled_position = self._scaled_position.to(dtype)
        self.image_encoder.neck.position_encoding = NoPosition()
        self.memory_encoder.position_encoding = NoPosition()
        for module in list(self.modules()):
            if isinstance(module, PlacedHiera):
                module.settle(dtype)
            elif isinstance(module, SlotMemoryAttention | RealRoPEAttention | BatchedMaskDecoder):
                module.settle()

    def encode_image(self, pixels: Tensor) -> ImageFeatures:
        """Features of each picture.

        Args:
            pixels: uint8 or float [B, S, S, 3] RGB, 0 to 255.
        """
        stride_4, stride_8, embedding = self.image_encoder(self._normalised(pixels))["backbone_fpn"]
        keys = self.readout.keys(stride_8) if self.config.readout_dim else stride_8[:, :0]
        return ImageFeatures(
            embedding, self.sam_mask_decoder.conv_s0(stride_4), self.sam_mask_decoder.conv_s1(stride_8), keys
        )

    def _normalised(self, pixels: Tensor) -> Tensor:
        """Pixels [B, S, S, 3] as the network reads them, [B, 3, S, S]."""
        return (pixels.float().permute(0, 3, 1, 2) - self.image_mean) / self.image_std

    def without_memory(self, embedding: Tensor) -> Tensor:
        """What takes the place of `attend_memory` on an object's first frame; [B, C, h, w] to the same."""
        return embedding + self.no_mem_embed.view(1, -1, 1, 1)

    def attend_memory(
        self, embedding: Tensor, memory: MemoryView, *, is_full: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Condition picture embeddings on each object's memory.

        SAM 2 (arXiv 2408.00714), section 4, "Memory attention".

        Args:
            embedding: [B, C, h, w].
            memory: of the same B objects.
            is_full: no slot or pointer is empty; the biases are not read.

        Returns:
            [B, C, h, w] conditioned embedding and [B, C] class token (C = 0 without a semantic head).
        """
        batch, channels, height, width = embedding.shape
        tokens, keys = self._memory_tokens(memory)
        bias = None if is_full else self._memory_bias(memory)
        pointers = memory.pointers.shape[1] * self.config.tokens_per_pointer
        picture = (embedding + self._scaled_position).flatten(2).transpose(1, 2)
        conditioned = self.memory_attention(picture, tokens, keys, bias, pointers)
        class_token = self.semantic_head.remember(tokens, bias) if self.config.classes else tokens[:, 0, :0]
        return conditioned.transpose(1, 2).reshape(batch, channels, height, width), class_token

    def _memory_tokens(self, memory: MemoryView) -> tuple[Tensor, Tensor]:
        """Values [B, M, C_mem], and keys (with positions) of the same shape."""
        batch, count = memory.pointers.shape[:2]
        split = self.config.tokens_per_pointer
        table: Tensor = self.maskmem_tpos_enc
        if self.config.has_long_term_embedding:
            table = torch.cat([table, self.long_term_tpos_enc])
        spatial = memory.spatial.flatten(3).transpose(2, 3)  # [B, K, h'·w', C_mem]
        time = table.flatten(1)[memory.slot_time].unsqueeze(2)
        spatial_keys = spatial + self.memory_position.flatten(2).transpose(1, 2) + time
        pointers = memory.pointers.reshape(batch, count * split, -1)
        age = self.obj_ptr_tpos_proj(
            sine_position(memory.pointer_age / POINTER_TIME_SCALE, self.config.d_model)
        )
        # Not repeat_interleave: from a GPU's captured graph nothing may be read on the host.
        pointer_keys = pointers + age.unsqueeze(2).expand(-1, -1, split, -1).flatten(1, 2)
        values = torch.cat([spatial.flatten(1, 2), pointers], dim=1)
        keys = torch.cat([spatial_keys.flatten(1, 2), pointer_keys], dim=1)
        return values, keys

    def _memory_bias(self, memory: MemoryView) -> Tensor:
        """What hides the tokens of empty slots and pointers, [B, 1, M]."""
        size = self.config.memory_size**2
        spatial = memory.slot_bias.unsqueeze(2).expand(-1, -1, size).flatten(1)
        split = self.config.tokens_per_pointer
        pointers = memory.pointer_bias.unsqueeze(2).expand(-1, -1, split).flatten(1)
        return torch.cat([spatial, pointers], dim=1).unsqueeze(1)

    def decode_masks(
        self,
        conditioned: Tensor,
        stride_4: Tensor,
        stride_8: Tensor,
        readout: Tensor,
        prompt: PromptTensors,
        is_multimask: Tensor,
    ) -> Decoded:
        """Masks, quality, presence and pointer of each object.

        Args:
            conditioned: [B, C, h, w] from `attend_memory` or `without_memory`.
            stride_4: [B, C/8, 4h, 4w].
            stride_8: [B, C/4, 2h, 2w].
            readout: [B, 1, 2h, 2w] logits of the affinity readout, zeros without one.
            prompt: of the same B objects.
            is_multimask: bool [B]; choose the best of three masks instead of the single one.
        """
        every = self.decode_all(conditioned, stride_4, stride_8, readout, prompt)
        logits, iou, token = select_mask(every, is_multimask)
        return self._describe(logits, iou, token, every.presence_logit)

    def _describe(self, logits: Tensor, iou: Tensor, token: Tensor, presence_logit: Tensor) -> Decoded:
        """What follows from the mask that was chosen of each object, and from its token."""
        is_present = (presence_logit > 0).unsqueeze(-1)
        logits = torch.where(is_present.unsqueeze(-1), logits, ABSENT_LOGIT)
        pointer = torch.where(is_present, self.obj_ptr_proj(token), self.no_obj_ptr)
        return Decoded(logits, iou, presence_logit, pointer)

    def without_class_memory(self, batch: int) -> Tensor:
        """Class tokens of objects that begin, [B, C]."""
        if not self.config.classes:
            return self.no_obj_ptr[:, :0].expand(batch, -1)
        return self.semantic_head.without_memory(batch)

    def recognise(self, class_token: Tensor, pixels: Tensor, mask_logits: Tensor) -> Recognition:
        """What lies under the masks, by kind and by appearance; only of a network that knows classes.

        A stage of its own, for neither changes sixty times a second.

        Args:
            class_token: [B, C] from `attend_memory`, or `without_class_memory`.
            pixels: uint8 or float [B, S, S, 3] RGB, 0 to 255.
            mask_logits: [B, 4h, 4w] of the objects in it.
        """
        return Recognition(
            self.classify(class_token, pixels, mask_logits),
            self.appearance_head(self._normalised(pixels), mask_logits),
        )

    def classify(self, class_token: Tensor, pixels: Tensor, mask_logits: Tensor) -> Tensor:
        """Class logits [B, K] of what lies under the masks; the arguments are those of `recognise`."""
        return self.semantic_head(class_token, self._normalised(pixels), mask_logits)  # type: ignore[no-any-return]

    def decode_all(
        self,
        conditioned: Tensor,
        stride_4: Tensor,
        stride_8: Tensor,
        readout: Tensor,
        prompt: PromptTensors,
    ) -> AllMasks:
        """Every candidate mask; the arguments are those of `decode_masks`."""
        encoder = self.sam_prompt_encoder
        sparse, _ = encoder(points=(prompt.points, prompt.labels), boxes=None, masks=None)
        dense = torch.where(
            prompt.has_mask.view(-1, 1, 1, 1), encoder.mask_downscaling(prompt.mask), self._no_mask
        )
        candidates, fine = self._decode(conditioned + dense, stride_4, stride_8, readout, sparse)
        masks = self._draw(candidates.filters, candidates.pixels, fine)
        return AllMasks(masks, candidates.predicted_iou, candidates.tokens, candidates.presence_logit)

    @property
    def _scaled_position(self) -> Tensor:
        """What memory attention adds to a picture's embedding for its places, [1, C, h, w]."""
        if self.scaled_position is not None:
            return self.scaled_position
        return 0.1 * self.picture_position

    @property
    def _no_mask(self) -> Tensor:
        """What is added to the embedding of a picture without a mask prompt, [1, C, 1, 1]."""
        if self.no_mask is not None:
            return self.no_mask
        return self.sam_prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1)  # type: ignore[no-any-return]

    def _decode(
        self, prompted: Tensor, stride_4: Tensor, stride_8: Tensor, readout: Tensor, sparse: Tensor
    ) -> tuple[Candidates, Tensor | None]:
        """Candidates, and the readout at their stride, [B, 1, 4h, 4w], of a network that has one.

        Args:
            prompted: [B, C, h, w] conditioned embedding with the dense prompt.
            stride_4, stride_8, readout: as in `decode_masks`.
            sparse: [B, N, C] sparse prompt, or [1, N, C] where all objects have the same.
        """
        fine = None
        if self.config.readout_dim:
            stride_8 = stride_8 + self.readout_to_stride_8(readout)
            fine = upsample(readout, 2)
        candidates = self.sam_mask_decoder.decode(
            prompted, self._embed_places(), sparse, stride_4, stride_8, fine
        )
        return candidates, fine

    def _draw(self, filters: Tensor, pixels: Tensor, fine: Tensor | None) -> Tensor:
        """Masks [B, M, 4h, 4w] of [B, M, C/8] filters; `fine` from `_decode`."""
        masks = draw(filters, pixels)
        return masks if fine is None else masks + self.readout_gain * fine

    def read_points(self, features: ImageFeatures, prompt: PromptTensors) -> Tensor:
        """The readout of a prompted frame, [B, 1, 2h, 2w]: likeness to the clicks, else zeros."""
        if not self.config.readout_dim:
            return torch.zeros_like(features.stride_8[:, :1])
        return self.readout.from_points(features.keys.float(), prompt.points, prompt.labels)

    def decode_prompt(self, features: ImageFeatures, prompt: PromptTensors, is_multimask: Tensor) -> Decoded:
        """`decode_masks` on a prompted frame, whose readout is the likeness to the clicks.

        Args:
            features: with the conditioned embedding in place of the picture's own.
            prompt: of the same B objects.
            is_multimask: as in `decode_masks`.
        """
        readout = self.read_points(features, prompt)
        conditioned, stride_4, stride_8, _ = features
        return self.decode_masks(conditioned, stride_4, stride_8, readout, prompt, is_multimask)

    def read_affinity(self, keys: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
        """The affinity readout as logits [B, 1, 2h, 2w], and what it adds to the presence logit, [B].

        Args:
            keys: [B, dim, 2h, 2w] of the current picture.
            prototypes: [B, M, dim + 4, N] of remembered ones, see `AffinityReadout.forward`.
        """
        readout, support = self.readout(keys, prototypes)
        return readout, self.readout_presence(support).squeeze(1)

    def track_masks(
        self,
        conditioned: Tensor,
        stride_4: Tensor,
        stride_8: Tensor,
        keys: Tensor,
        prototypes: Tensor,
    ) -> Decoded:
        """`decode_masks` on a frame without prompt: no points, best of three, readout as mask prompt.

        Args:
            conditioned: [B, C, h, w] from `attend_memory`.
            stride_4: [B, C/8, 4h, 4w].
            stride_8: [B, C/4, 2h, 2w].
            keys: [B, dim, 2h, 2w]; read only by a network with a readout, like `prototypes`.
            prototypes: [B, M, dim + 4, N].
        """
        encoder = self.sam_prompt_encoder
        readout, presence, dense = stride_8[:, :1], None, self._no_mask
        if self.config.readout_dim:
            readout, presence = self.read_affinity(keys, prototypes)
            dense = encoder.mask_downscaling(upsample(readout, 2))
        # The same point for all: an exported graph holds what becomes of it until it meets a picture as a
        # constant.
        candidates, fine = self._decode(
            conditioned + dense, stride_4, stride_8, readout, self._embed_no_points()
        )
        iou, best = candidates.predicted_iou[:, 1:].max(dim=1)
        # Chosen before it is drawn: three masks of four are never looked at.
        filters, token = (_pick(of_all, 1 + best) for of_all in (candidates.filters, candidates.tokens))
        logits = self._draw(filters.unsqueeze(1), candidates.pixels, fine).squeeze(1)
        presence_logit = candidates.presence_logit
        if presence is not None:
            presence_logit = presence_logit + presence
        return self._describe(logits, iou, token, presence_logit)

    def _embed_no_points(self) -> Tensor:
        """Sparse prompt of a frame without points, [1, 2, C]."""
        if self.no_points is not None:
            return self.no_points
        device = self.no_mem_embed.device
        padding = torch.zeros(1, 1, 2, device=device), -torch.ones(1, 1, device=device)
        sparse: Tensor = self.sam_prompt_encoder(points=padding, boxes=None, masks=None)[0]
        return sparse

    def _embed_places(self) -> Tensor:
        """What the decoder adds to a picture's embedding for its places, [1, C, h, w]."""
        if self.dense_position is not None:
            return self.dense_position
        return self.sam_prompt_encoder.get_dense_pe()  # type: ignore[no-any-return]

    def encode_memory(
        self,
        embedding: Tensor,
        keys: Tensor,
        mask_logits: Tensor,
        presence_logit: Tensor,
        is_prompted: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Turn a picture and a mask into what a memory slot keeps.

        Args:
            embedding: [B, C, h, w] unconditioned, from `encode_image`.
            keys: [B, dim, 2h, 2w].
            mask_logits: [B, 4h, 4w].
            presence_logit: [B].
            is_prompted: bool [B]; prompted masks are binarised, tracked ones enter as probabilities.

        Returns:
            spatial memory [B, C_mem, h', w'] and prototypes [B, dim + 4, N] ([B, 4, 0] where the network
            has no readout).
        """
        masks = mask_logits.unsqueeze(1)
        if self.config.memory_mask_stride == 16:
            masks = upsample(masks, 4)
        masks = torch.where(is_prompted.view(-1, 1, 1, 1), (masks > 0).to(masks.dtype), masks.sigmoid())
        encoded = self.memory_encoder(embedding, masks * 20.0 - 10.0, skip_mask_sigmoid=True)
        absent = (presence_logit <= 0).to(masks.dtype).view(-1, 1, 1, 1)
        pool = self.config.embedding_size // self.config.memory_size
        memory = nn.functional.avg_pool2d(encoded["vision_features"], pool)
        memory = memory + absent * self.no_obj_embed_spatial.view(1, -1, 1, 1)
        if not self.config.readout_dim:
            return memory, embedding[:, :4, 0, :0]
        return memory, self.readout.prototypes(keys, mask_logits)


class NoPosition(nn.Module):
    """Takes the place of a position encoding that nobody reads."""

    def forward(self, maps: Tensor) -> Tensor:
        """[B, C, H, W] to [B, 0, H, W]."""
        return maps[:, :0]


class PairPool(nn.Module):
    """Maximum of every 2x2 points of [B, C, H, W], in whatever order its channels lie.

    torch's own copies what does not lie in one piece, and takes 14 µs for each of the trunk's six (H200).
    """

    def forward(self, maps: Tensor) -> Tensor:
        """[B, C, H, W] of even sides to [B, C, H / 2, W / 2]."""
        rows = torch.maximum(maps[:, :, ::2], maps[:, :, 1::2])
        return torch.maximum(rows[..., ::2], rows[..., 1::2])


class PlacedHiera(Hiera):  # type: ignore[misc]
    """sam2's `Hiera`, whose position embedding can be settled.

    Args:
        size: side of the map of patches.
        arguments: of sam2's class.
    """

    settled_position: Tensor | None

    def __init__(self, *, size: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.size = size
        self.register_buffer("settled_position", None, persistent=False)

    def settle(self, dtype: torch.dtype) -> None:
        """See `SAM2S.settle`."""
        self.settled_position = self._get_pos_embed((self.size, self.size)).contiguous().to(dtype)
        if self.settled_position.is_cuda:
            self.pool_by_pairs()

    def pool_by_pairs(self) -> None:
        """Pool queries and shortcuts with `PairPool` from now on."""
        for block in self.blocks:
            if block.q_stride == (2, 2):
                block.pool = block.attn.q_pool = PairPool()

    def _get_pos_embed(self, hw: tuple[int, int]) -> Tensor:
        if self.settled_position is not None:
            return self.settled_position
        return super()._get_pos_embed(hw)  # type: ignore[no-any-return]


class ChannelNorm(LayerNorm2d):  # type: ignore[misc]
    """sam2's `LayerNorm2d` as the one operator that runtimes have for it, instead of seven."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same."""
        if x.is_cuda and self.weight.shape[0] <= FEW_CHANNELS:
            return self.norm_few(x)
        channels_last = x.permute(0, 2, 3, 1)
        normed = nn.functional.layer_norm(channels_last, self.weight.shape, self.weight, self.bias, self.eps)
        return normed.permute(0, 3, 1, 2)

    def norm_few(self, x: Tensor) -> Tensor:
        """The same, point by point; for a GPU, whose one operator gives each point threads of its own."""
        wide = x.float()
        variance, mean = torch.var_mean(wide, dim=1, correction=0, keepdim=True)
        weight, bias = (values.float().view(1, -1, 1, 1) for values in (self.weight, self.bias))
        normed = torch.addcmul(bias, (wide - mean) * torch.rsqrt(variance + self.eps), weight)
        return normed.to(x.dtype)


def _fuse_channel_norms(network: nn.Module) -> None:
    """Put a `ChannelNorm` in the place of every `LayerNorm2d`; the parameters keep their names."""
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, LayerNorm2d):
                setattr(parent, name, ChannelNorm(child.weight.shape[0], eps=child.eps))


def upsample(maps: Tensor, factor: int) -> Tensor:
    """Bilinear, half-pixel centres; [B, C, H, W] to [B, C, factor·H, factor·W]."""
    return nn.functional.interpolate(maps, scale_factor=factor, mode="bilinear", align_corners=False)


def _pick(values: Tensor, index: Tensor) -> Tensor:
    """values[b, index[b]] of [B, N, D] as [B, D]."""
    return values.gather(1, index.view(-1, 1, 1).expand(-1, -1, values.shape[2])).squeeze(1)


def select_mask(every: AllMasks, is_multimask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mask to show of each object: [B, 4h, 4w] logits, [B] predicted IoU, [B, C] token.

    Best of three by predicted IoU where `is_multimask`; else the single mask unless it is unstable
    (SAM 2's `dynamic_multimask_via_stability`).
    """
    single = every.mask_logits[:, 0]
    inner = (single > STABILITY_DELTA).flatten(1).sum(-1)
    outer = (single > -STABILITY_DELTA).flatten(1).sum(-1)
    is_stable = inner.float() >= STABILITY_THRESHOLD * outer.float()
    use_best = is_multimask | ~is_stable
    best = torch.where(use_best, 1 + every.predicted_iou[:, 1:].argmax(-1), 0)
    height, width = every.mask_logits.shape[2:]
    picked = best.view(-1, 1, 1, 1).expand(-1, -1, height, width)
    logits = every.mask_logits.gather(1, picked).squeeze(1)
    iou = every.predicted_iou.gather(1, best.unsqueeze(1)).squeeze(1)
    # The pointer comes from the best mask's token only under multimask; a stability fallback keeps the
    # single mask's, as in SAM 2.
    chosen = torch.where(is_multimask, best, 0)
    return logits, iou, _pick(every.tokens, chosen)


def _image_encoder(config: NetworkConfig) -> ImageEncoder:
    trunk: nn.Module
    if isinstance(config.trunk, HieraConfig):
        trunk = PlacedHiera(
            size=config.input_size_px // 4,
            embed_dim=config.trunk.embed_dim,
            num_heads=config.trunk.num_heads,
            stages=config.trunk.stages,
            global_att_blocks=config.trunk.global_att_blocks,
            window_pos_embed_bkg_spatial_size=config.trunk.window_pos_embed_bkg_spatial_size,
            window_spec=config.trunk.window_spec,
        )
    else:
        trunk = ConvTrunk(config.trunk)
    neck = FpnNeck(
        position_encoding=PositionEmbeddingSine(num_pos_feats=config.d_model, normalize=True),
        d_model=config.d_model,
        backbone_channel_list=list(config.trunk.channels),
        fpn_top_down_levels=list(config.fpn_top_down_levels),
        fpn_interp_model="nearest",
    )
    return ImageEncoder(trunk=trunk, neck=neck, scalp=1)


def _memory_encoder(config: NetworkConfig) -> MemoryEncoder:
    block = CXBlock(dim=config.d_model, kernel_size=7, padding=3, layer_scale_init_value=1e-6)
    if isinstance(config.trunk, ConvTrunkConfig):
        nn.init.ones_(block.gamma)  # 1e-6 is meant for deep pretrained stacks; from scratch it stays asleep
    return MemoryEncoder(
        in_dim=config.d_model,
        out_dim=config.d_memory,
        mask_downsampler=MaskDownSampler(
            embed_dim=config.d_model,
            kernel_size=3,
            stride=2,
            padding=1,
            total_stride=config.memory_mask_stride,
        ),
        fuser=Fuser(block, num_layers=config.memory_fuser_layers),
        position_encoding=PositionEmbeddingSine(num_pos_feats=config.d_memory, normalize=True),
    )
