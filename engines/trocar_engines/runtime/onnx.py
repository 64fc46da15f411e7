"""ONNX Runtime on the CPU, in float32: the default on a CPU wherever OpenVINO is not."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import Tensor

from trocar_engines.export import engine_folder, export_stages
from trocar_engines.network.sam2s import SAM2S, Decoded, ImageFeatures, MemoryView, PromptTensors, Recognition
from trocar_engines.runtime.clock import HostClock

Array = npt.NDArray[Any]

SPIN_US = 50
"""How long a session's idle threads spin before they sleep: longer than between two nodes of a graph."""


class OnnxRuntime:
    """One session a stage; with several threads a second one, with its own weights, for rows that run apart.

    See `runtime.interface.Runtime`.

    Args:
        network: with its weights.
        cache: folder for exported engines.
        threads: of each session; they run one after the other.
        on_stage: called with a stage's name before it is exported, for progress.
        elsewhere: stages that are exported and that a subclass runs.
    """

    name = "onnx"
    is_asynchronous = False
    device = torch.device("cpu")

    def __init__(
        self,
        network: SAM2S,
        *,
        cache: Path,
        threads: int,
        on_stage: Callable[[str], None] = lambda _: None,
        elsewhere: Sequence[str] = (),
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.config = network.config
        self._threads = threads
        self._paths = export_stages(network, engine_folder(cache, network), on_stage)
        paths = {stage: path for stage, path in self._paths.items() if stage not in elsewhere}
        # Opening is optimising a graph, on one thread each: together they take as long as the largest.
        with ThreadPoolExecutor() as openers:
            opening = {stage: openers.submit(_open, path, threads) for stage, path in paths.items()}
            # What `_run_apart` needs is the same again, but for the threads.
            apart = {} if threads == 1 else paths
            opening_apart = {stage: openers.submit(_open, path, 1) for stage, path in apart.items()}
            self._sessions = {stage: opened.result() for stage, opened in opening.items()}
            self._sessions_apart = {stage: opened.result() for stage, opened in opening_apart.items()}
        self._workers = ThreadPoolExecutor(threads, thread_name_prefix="trocar-onnx")
        self._inputs = {
            stage: [node.name for node in session.get_inputs()] for stage, session in self._sessions.items()
        }

    def _run(self, stage: str, *tensors: Tensor) -> list[Tensor]:
        """Run a stage; inputs are lent without a copy, outputs are wrapped without one."""
        arrays = [np.ascontiguousarray(tensor.numpy()) for tensor in tensors]
        feed = dict(zip(self._inputs[stage], arrays, strict=True))
        each = len(arrays[0]) // self._threads
        outputs = (
            self._sessions[stage].run(None, feed)
            if self._threads == 1 or each == 0
            else self._run_apart(stage, feed, each)
        )
        return [torch.from_numpy(array) for array in outputs]

    def _run_apart(self, stage: str, feed: dict[str, Array], each: int) -> list[Array]:
        """Run a stage with `each` rows on every thread, and the rest on all of them together.

        Threads that share a row wait for each other at each of its two hundred nodes: four objects took 12.0
        ms in `attend_memory`, `track_masks` and `encode_memory` together, apart 10.1 (two threads).
        """

        def rows(first: int, last: int | None) -> dict[str, Array]:
            return {name: array[first:last] for name, array in feed.items()}

        session, rest = self._sessions_apart[stage], each * self._threads
        parts = [rows(first, first + each) for first in range(0, rest, each)]
        running = [self._workers.submit(session.run, None, part) for part in parts]
        outputs = [run.result() for run in running]
        if rows_left := len(next(iter(feed.values()))) - rest:
            outputs.append(self._sessions[stage].run(None, rows(-rows_left, None)))
        return [np.concatenate(of_all) for of_all in zip(*outputs, strict=True)]

    def encode_image(self, pixels: Tensor) -> ImageFeatures:
        """See `Runtime.encode_image`."""
        return ImageFeatures(*self._run("encode_image", pixels))

    def attend_memory(
        self,
        embedding: Tensor,
        memory: MemoryView,
        *,
        is_full: bool = False,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor]:
        """See `Runtime.attend_memory`; a CPU gains nothing from a graph without bias."""
        conditioned, class_token = self._run("attend_memory", embedding, *memory)
        return conditioned, class_token

    def track_masks(self, conditioned: Tensor, features: ImageFeatures, prototypes: Tensor) -> Decoded:
        """See `Runtime.track_masks`."""
        _, stride_4, stride_8, keys = features
        return Decoded(*self._run("track_masks", conditioned, stride_4, stride_8, keys, prototypes))

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

    def read_affinity(self, keys: Tensor, prototypes: Tensor) -> Tensor:
        """See `Runtime.read_affinity`."""
        return self.network.read_affinity(keys, prototypes)[0]

    def encode_memory(
        self, features: ImageFeatures, mask_logits: Tensor, presence_logit: Tensor, is_prompted: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Runtime.encode_memory`."""
        spatial, prototypes = self._run(
            "encode_memory", features.embedding, features.keys, mask_logits, presence_logit, is_prompted
        )
        return spatial, prototypes

    def recognise(self, class_token: Tensor, pixels: Tensor, mask_logits: Tensor) -> Recognition:
        """See `Runtime.recognise`."""
        return Recognition(*self._run("recognise", class_token, pixels, mask_logits))

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


def _open(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Each session has threads of its own. Left to spin without end they fight each other, never spinning they
    # sleep between any two nodes: a step's four stages took 26.7 and 10.3 ms, with this 7.6 (two cores).
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_US))
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        str(path),
        options,
        providers=["CPUExecutionProvider"],
        # The fused kernel is slower than its parts: attend_memory 1.19 against 1.05 ms on one thread.
        disabled_optimizers=["SkipLayerNormFusion"],
    )
