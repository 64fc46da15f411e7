"""OpenVINO for pictures, ONNX Runtime for the rest: the default for `sam2s-nano` on a CPU with bfloat16."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from trocar_engines.errors import RuntimeUnavailableError
from trocar_engines.network.sam2s import SAM2S, ImageFeatures
from trocar_engines.runtime.onnx import OnnxRuntime

PICTURES = "encode_image"


class OpenVinoRuntime(OnnxRuntime):
    """`encode_image` in bfloat16, one picture after the other; the other stages as `OnnxRuntime` runs them.

    On one thread of a Zen 4 core `sam2s-nano` encodes a picture in 2.8 ms (ONNX Runtime, which knows float32
    only: 4.8), and its features differ by 0.6% (root mean square). Eight-bit integers took 2.4 ms and 3.5%.
    The stages that attend and decode are small matrix products: there ONNX Runtime is as quick in float32.

    The graph is compiled at each start: 0.4 s for `sam2s-nano`, half a minute for a Hiera trunk. OpenVINO
    would keep what it compiled in a folder, but trusts whatever it finds there, damaged weights too.

    See `runtime.interface.Runtime`; not to be called from two threads at once.

    Args:
        network: see `OnnxRuntime`, as for the other arguments.

    Raises:
        RuntimeUnavailableError: OpenVINO cannot be loaded, or has no bfloat16 on this CPU.
    """

    name = "openvino"

    def __init__(
        self, network: SAM2S, *, cache: Path, threads: int, on_stage: Callable[[str], None] = lambda _: None
    ) -> None:
        self._library = load_library()
        if not _has_bfloat16(self._library):
            raise RuntimeUnavailableError(
                "OpenVINO has no bfloat16 on this CPU (it has on x86 with AVX-512 BF16 or AMX): "
                "take --runtime onnx"
            )
        super().__init__(network, cache=cache, threads=threads, on_stage=on_stage, elsewhere=(PICTURES,))
        core = self._library.Core()
        graph = core.read_model(self._paths[PICTURES])
        size_px = network.config.input_size_px
        # Fixed: what follows from open dimensions is worked out anew for each picture, 0.5 ms.
        graph.reshape([1, size_px, size_px, 3])
        settings = {
            "INFERENCE_PRECISION_HINT": "bf16",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            # Threads that decode and encode video need the cores too.
            "ENABLE_CPU_PINNING": False,
        }
        self._pictures = core.compile_model(graph, "CPU", settings).create_infer_request()

    def encode_image(self, pixels: Tensor) -> ImageFeatures:
        """See `Runtime.encode_image`."""
        each = [self._encode_picture(picture) for picture in pixels.split(1)]
        if len(each) == 1:
            return ImageFeatures(*each[0])
        return ImageFeatures(*(torch.cat(of_all) for of_all in zip(*each, strict=True)))

    def _encode_picture(self, pixels: Tensor) -> list[Tensor]:
        picture = np.ascontiguousarray(pixels.numpy())
        self._pictures.set_input_tensor(self._library.Tensor(picture, shared_memory=True))
        self._pictures.infer(share_outputs=True)
        # Copies: the next picture is written over them.
        return [torch.from_numpy(maps.data.copy()) for maps in self._pictures.output_tensors]


def load_library() -> Any:
    """OpenVINO, without what it tells others.

    Its import alone sends an event to Google Analytics; without its package for that it sends nothing.

    Raises:
        RuntimeUnavailableError: it cannot be loaded.
    """
    # None stands for a module that cannot be imported, which typeshed does not know.
    sys.modules.setdefault("openvino_telemetry", cast("Any", None))
    try:
        return importlib.import_module("openvino")
    except Exception as error:  # a wheel of another platform raises what it likes
        raise RuntimeUnavailableError(
            f"OpenVINO cannot be loaded ({type(error).__name__}: {error}): take --runtime onnx"
        ) from error


def has_bfloat16() -> bool:
    """Whether OpenVINO computes in bfloat16 here; not where it cannot be loaded either."""
    try:
        return _has_bfloat16(load_library())
    except RuntimeUnavailableError:
        return False


def _has_bfloat16(library: Any) -> bool:
    return "BF16" in library.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
