"""OpenVINO for pictures, ONNX Runtime for the rest: the default on a CPU that computes in bfloat16."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trocar_engines.errors import RuntimeUnavailableError
from trocar_engines.network.sam2s import SAM2S, ImageFeatures
from trocar_engines.runtime.onnx import OnnxRuntime

PICTURES = "encode_image"
COMPILED = "openvino"
"""Folder of what OpenVINO keeps of a graph, so that it is compiled once: sam2.1's tiny trunk takes 28 s."""


class OpenVinoRuntime(OnnxRuntime):
    """`encode_image` in bfloat16, one picture after the other; the other stages as `OnnxRuntime` runs them.

    On one thread of a Zen 4 core `sam2s-nano` encodes a picture in 2.6 ms (ONNX Runtime, which knows float32
    only: 4.8), and its features differ by 0.6% (root mean square). Eight-bit integers took 2.4 ms and 3.5%.
    The stages that attend and decode are small matrix products: there ONNX Runtime is as quick in float32.

    See `runtime.interface.Runtime`; not to be called from two threads at once.

    Args:
        network: see `OnnxRuntime`, as for the other arguments.

    Raises:
        RuntimeUnavailableError: this CPU has no bfloat16.
    """

    name = "openvino"

    def __init__(
        self, network: SAM2S, *, cache: Path, threads: int, on_stage: Callable[[str], None] = lambda _: None
    ) -> None:
        if not has_bfloat16():
            raise RuntimeUnavailableError(
                "runtime openvino: this CPU has no arithmetic in bfloat16 (AVX-512 BF16, AMX or Arm BF16), "
                "take --runtime onnx"
            )
        super().__init__(network, cache=cache, threads=threads, on_stage=on_stage, elsewhere=(PICTURES,))
        self._pictures = _compile(self._paths[PICTURES], network.config.input_size_px, threads)

    def encode_image(self, pixels: Tensor) -> ImageFeatures:
        """See `Runtime.encode_image`."""
        each = [self._encode_picture(picture) for picture in pixels.split(1)]
        return ImageFeatures(*(torch.cat(of_all) for of_all in zip(*each, strict=True)))

    def _encode_picture(self, pixels: Tensor) -> list[Tensor]:
        picture = np.ascontiguousarray(pixels.numpy())
        self._pictures.set_input_tensor(_library().Tensor(picture, shared_memory=True))
        self._pictures.infer()
        # Copies: the next picture is written over them.
        return [torch.from_numpy(maps.data.copy()) for maps in self._pictures.output_tensors]


def has_bfloat16() -> bool:
    """Whether this machine's CPU computes in bfloat16."""
    return "BF16" in _library().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _library() -> Any:
    """OpenVINO, which takes 0.3 s to import, without what it tells others.

    Its import alone sends an event to Google Analytics; without its package for that it sends nothing.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


def _compile(path: Path, size_px: int, threads: int) -> Any:
    """A request that encodes one picture at a time."""
    core = _library().Core()
    graph = core.read_model(path)
    # Fixed: what follows from open dimensions is worked out anew for each picture, 0.5 ms.
    graph.reshape([1, size_px, size_px, 3])
    settings = {
        "CACHE_DIR": str(path.parent / COMPILED),
        "INFERENCE_PRECISION_HINT": "bf16",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        # Threads that decode and encode video need the cores too.
        "ENABLE_CPU_PINNING": False,
    }
    return core.compile_model(graph, "CPU", settings).create_infer_request()
