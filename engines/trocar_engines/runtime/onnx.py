"""ONNX Runtime on the CPU: the default where there is no GPU."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from trocar_engines.export import engine_folder, export_stages
from trocar_engines.network.sam2s import SAM2S, Decoded, ImageFeatures, MemoryView, PromptTensors


class OnnxRuntime:
    """One session a stage; see `runtime.interface.Runtime`.

    Args:
        network: with its weights.
        cache: folder for exported engines.
        threads: of each session; they run one after the other.
        on_stage: called with a stage's name before it is exported, for progress.
    """

    name = "onnx"

    def __init__(
        self, network: SAM2S, *, cache: Path, threads: int, on_stage: Callable[[str], None] = lambda _: None
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.config = network.config
        paths = export_stages(network, engine_folder(cache, network), on_stage)
        self._sessions = {stage: _open(path, threads) for stage, path in paths.items()}
        self._inputs = {
            stage: [node.name for node in session.get_inputs()] for stage, session in self._sessions.items()
        }

    def _run(self, stage: str, *tensors: Tensor) -> list[Tensor]:
        """Run a stage; inputs are lent without a copy, outputs are wrapped without one."""
        arrays = [np.ascontiguousarray(tensor.numpy()) for tensor in tensors]
        feed = dict(zip(self._inputs[stage], arrays, strict=True))
        return [torch.from_numpy(array) for array in self._sessions[stage].run(None, feed)]

    def encode_image(self, pixels: Tensor) -> ImageFeatures:
        """See `Runtime.encode_image`."""
        return ImageFeatures(*self._run("encode_image", pixels))

    def attend_memory(self, embedding: Tensor, memory: MemoryView) -> tuple[Tensor, Tensor]:
        """See `Runtime.attend_memory`."""
        conditioned, classes = self._run("attend_memory", embedding, *memory)
        return conditioned, classes

    def track_masks(
        self, conditioned: Tensor, features: ImageFeatures, prototypes: Tensor, prototype_bias: Tensor
    ) -> Decoded:
        """See `Runtime.track_masks`."""
        _, stride_4, stride_8, keys = features
        return Decoded(
            *self._run("track_masks", conditioned, stride_4, stride_8, keys, prototypes, prototype_bias)
        )

    def decode_prompt(
        self,
        conditioned: Tensor,
        features: ImageFeatures,
        prompt: PromptTensors,
        is_multimask: Tensor,
    ) -> Decoded:
        """See `Runtime.decode_prompt`."""
        _, stride_4, stride_8, keys = features
        maps = (stride_4, stride_8, keys)
        return Decoded(*self._run("decode_prompt", conditioned, *maps, *prompt, is_multimask))

    def encode_memory(
        self, features: ImageFeatures, mask_logits: Tensor, presence_logit: Tensor, is_prompted: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Runtime.encode_memory`."""
        spatial, prototypes = self._run(
            "encode_memory", features.embedding, features.keys, mask_logits, presence_logit, is_prompted
        )
        return spatial, prototypes

    def without_memory(self, embedding: Tensor) -> Tensor:
        """See `Runtime.without_memory`."""
        return self.network.without_memory(embedding)

    def downsample_mask(self, mask: Tensor) -> Tensor:
        """See `Runtime.downsample_mask`."""
        return self.network.mask_downsample(mask)  # type: ignore[no-any-return]


def _open(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Pools that spin while they wait fight each other: five sessions in one process run 2.5 to 4 times
    # slower with it (measured on two cores).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
