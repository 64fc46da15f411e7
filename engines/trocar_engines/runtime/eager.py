"""PyTorch without compilation: the reference that every other runtime is compared with."""

from collections.abc import Callable

import torch
from torch import Tensor

from trocar_engines.network.sam2s import SAM2S, Decoded, ImageFeatures, MemoryView, PromptTensors, Recognition
from trocar_engines.runtime.clock import HostClock


class EagerRuntime:
    """The network's own methods; see `runtime.interface.Runtime`.

    Args:
        network: with its weights; put into evaluation mode.
    """

    name = "eager"
    is_asynchronous = False
    device = torch.device("cpu")

    def __init__(self, network: SAM2S) -> None:
        self.network = network.eval().requires_grad_(False)
        self.config = network.config

    def encode_image(self, pixels: Tensor) -> ImageFeatures:
        """See `Runtime.encode_image`."""
        return self.network.encode_image(pixels)

    def attend_memory(
        self, embedding: Tensor, memory: MemoryView, *, is_full: bool = False
    ) -> tuple[Tensor, Tensor]:
        """See `Runtime.attend_memory`."""
        return self.network.attend_memory(embedding, memory, is_full=is_full)

    def track_masks(self, conditioned: Tensor, features: ImageFeatures, prototypes: Tensor) -> Decoded:
        """See `Runtime.track_masks`."""
        _, stride_4, stride_8, keys = features
        return self.network.track_masks(conditioned, stride_4, stride_8, keys, prototypes)

    def decode_prompt(
        self,
        conditioned: Tensor,
        features: ImageFeatures,
        prompt: PromptTensors,
        is_multimask: Tensor,
    ) -> Decoded:
        """See `Runtime.decode_prompt`."""
        return self.network.decode_prompt(features._replace(embedding=conditioned), prompt, is_multimask)

    def read_affinity(self, keys: Tensor, prototypes: Tensor) -> Tensor:
        """See `Runtime.read_affinity`."""
        return self.network.read_affinity(keys, prototypes)[0]

    def encode_memory(
        self, features: ImageFeatures, mask_logits: Tensor, presence_logit: Tensor, is_prompted: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Runtime.encode_memory`."""
        return self.network.encode_memory(
            features.embedding, features.keys, mask_logits, presence_logit, is_prompted
        )

    def recognise(self, class_token: Tensor, pixels: Tensor, mask_logits: Tensor) -> Recognition:
        """See `Runtime.recognise`."""
        return self.network.recognise(class_token, pixels, mask_logits)

    def without_memory(self, embedding: Tensor) -> Tensor:
        """See `Runtime.without_memory`."""
        return self.network.without_memory(embedding)

    def downsample_mask(self, mask: Tensor) -> Tensor:
        """See `Runtime.downsample_mask`."""
        return self.network.mask_downsample(mask)  # type: ignore[no-any-return]

    def start_clock(self) -> HostClock:
        """See `Runtime.start_clock`."""
        return HostClock()

    def read_back(self, decoded: Decoded) -> Callable[[], Decoded]:
        """See `Runtime.read_back`; it lies there already."""
        return lambda: decoded
