"""What a runtime does: execute the network's stages on tensors it is lent."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from trocar_engines.network.config import NetworkConfig
from trocar_engines.network.sam2s import Decoded, ImageFeatures, MemoryView, PromptTensors, Recognition
from trocar_engines.runtime.clock import StageClock

MOST_LOOKS = 2
"""Objects of one stream that are looked at on one tick; the others wait their turn."""


class Runtime(Protocol):
    """The stages of a frame's way; shapes and meaning as in `network.sam2s.SAM2S`.

    Inputs are borrowed for the call and may lie on the host; outputs belong to the caller and lie on
    `device`.
    """

    name: str
    config: NetworkConfig
    device: torch.device
    is_asynchronous: bool
    """Calls return when the work is asked for, and the device does it in that order."""

    def encode_image(self, pixels: Tensor) -> ImageFeatures:
        """Features of uint8 pictures [B, S, S, 3]."""

    def attend_memory(
        self, embedding: Tensor, memory: MemoryView, *, is_full: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Conditioned embedding and class token; `is_full` says that no slot or pointer is hidden."""

    def track_masks(
        self,
        conditioned: Tensor,
        features: ImageFeatures,
        prototypes: Tensor,
    ) -> Decoded:
        """Masks on a frame without prompt."""

    def decode_prompt(
        self,
        conditioned: Tensor,
        features: ImageFeatures,
        prompt: PromptTensors,
        is_multimask: Tensor,
    ) -> Decoded:
        """Masks on a prompted frame."""

    def read_affinity(self, keys: Tensor, prototypes: Tensor) -> Tensor:
        """How much each point is like remembered pictures, float32 [B, 1, 2h, 2w] logits on the host.

        Only of a network with a readout; rare. Waits for the device.
        """

    def encode_memory(
        self, features: ImageFeatures, mask_logits: Tensor, presence_logit: Tensor, is_prompted: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Spatial memory and prototypes of a frame."""

    def recognise(self, class_token: Tensor, pixels: Tensor, mask_logits: Tensor) -> Recognition:
        """What objects in uint8 pictures look like, in float32 on the host; waits for the device."""

    def without_memory(self, embedding: Tensor) -> Tensor:
        """Embedding of a frame on which an object begins."""

    def downsample_mask(self, mask: Tensor) -> Tensor:
        """A mask prompt [B, 1, S, S], 0 or 1, as the decoder reads it: [B, 1, S/4, S/4]."""

    def start_clock(self) -> StageClock:
        """A clock of the device's stages, which begins now."""

    def read_back(self, decoded: Decoded) -> Callable[[], Decoded]:
        """Begin to copy the same in float32 to the host; what is returned waits for it, and for no more.

        A frame's one wait for the device.
        """
