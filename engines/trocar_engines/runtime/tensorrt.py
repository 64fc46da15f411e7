"""The TensorRT library behind a seam of two calls: a graph becomes a plan, a plan becomes a session.

Imports no torch: sessions take device addresses and a stream. Not run on a GPU yet; calls follow the
TensorRT 10 Python API reference (docs.nvidia.com/deeplearning/tensorrt), and hold for 11, where networks are
always strongly typed.
"""

import importlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trocar_engines.errors import (
    DeviceFaultError,
    EngineMismatchError,
    PlanBuildError,
    RuntimeUnavailableError,
)

log = logging.getLogger(__name__)


class TensorRtLibrary:
    """TensorRT as installed; see `plans.PlanLibrary`.

    Raises:
        RuntimeUnavailableError: it is not.
    """

    def __init__(self) -> None:
        try:
            # A wheel that could not fetch NVIDIA's libraries raises what it likes.
            self._trt: Any = importlib.import_module("tensorrt")
            self._logger = self._trt.Logger(self._trt.Logger.WARNING)
        except Exception as error:
            raise RuntimeUnavailableError(
                f"TensorRT cannot be loaded ({type(error).__name__}: {error}): install the gpu extra, "
                "pip install -e '.[gpu]', or take --runtime cuda or onnx"
            ) from error
        self.version = str(self._trt.__version__)

    def build(self, graph: bytes, timing_cache: Path, on_progress: Callable[[str], None]) -> bytes:
        """Turn an ONNX graph of static shapes into a plan for this machine's GPU.

        Args:
            graph: serialised; its types are the plan's precision.
            timing_cache: file of kernel timings, read and extended, so that the next build is quicker.
            on_progress: called with a line of text.

        Raises:
            PlanBuildError: TensorRT cannot build it; the message is its own.
        """
        trt = self._trt
        builder = trt.Builder(self._logger)
        strongly_typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = builder.create_network(strongly_typed)
        parser = trt.OnnxParser(network, self._logger)
        if not parser.parse(graph):
            errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
            raise PlanBuildError(f"TensorRT cannot read the graph: {'; '.join(errors)}")
        config = builder.create_builder_config()
        timings = config.create_timing_cache(timing_cache.read_bytes() if timing_cache.exists() else b"")
        if not config.set_timing_cache(timings, ignore_mismatch=False):
            log.warning("%s belongs to another device or version: kernels are timed anew", timing_cache)
        # Must outlive the build.
        monitor = _make_monitor(trt, on_progress)
        config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise PlanBuildError("TensorRT built nothing; its own messages are on stderr")
        partial = timing_cache.with_suffix(".part")
        partial.write_bytes(bytes(config.get_timing_cache().serialize()))
        partial.replace(timing_cache)
        return bytes(plan)

    def open(self, plan: bytes, inputs: Sequence[str], outputs: Sequence[str]) -> "TensorRtSession":
        """Load a plan.

        Args:
            plan: from `build`, on a device and a version like these.
            inputs: names of the stage's tensors in order, and `outputs` likewise.

        Raises:
            EngineMismatchError: TensorRT refuses it.
        """
        engine = self._trt.Runtime(self._logger).deserialize_cuda_engine(plan)
        if engine is None:
            raise EngineMismatchError("TensorRT refuses the plan; its own messages are on stderr")
        return TensorRtSession(engine, inputs, outputs)


class TensorRtSession:
    """See `cuda.Session`.

    Args:
        engine: a deserialised ICudaEngine of static shapes.
        inputs: names in order.
        outputs: names in order.
    """

    def __init__(self, engine: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        self._engine = engine
        self._context = engine.create_execution_context()
        if self._context is None:
            raise RuntimeUnavailableError(
                "the device has no memory left for a plan: free it, or start with a smaller --max-streams"
            )
        self._inputs, self._outputs = tuple(inputs), tuple(outputs)
        # What a graph does not read, TensorRT may leave out.
        self._known = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}

    def bind(self, inputs: Sequence[int], outputs: Sequence[int]) -> None:
        """See `Session.bind`."""
        names, addresses = (*self._inputs, *self._outputs), (*inputs, *outputs)
        for name, address in zip(names, addresses, strict=True):
            # An output without elements has no address, and nobody reads it.
            if name in self._known and address:
                self._context.set_tensor_address(name, address)

    def enqueue(self, stream: int) -> None:
        """See `Session.enqueue`.

        Raises:
            DeviceFaultError: TensorRT could not start it.
        """
        if not self._context.execute_async_v3(stream):
            raise DeviceFaultError("TensorRT could not start a plan; its own messages are on stderr")


def _make_monitor(trt: Any, on_progress: Callable[[str], None]) -> Any:
    """Progress of a build by outermost phase; called from TensorRT's own threads."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                on_progress(f"{phase_name}, {num_steps} steps")

        def step_complete(self, phase_name: str, step: int) -> bool:  # noqa: ARG002
            return True

        def phase_finish(self, phase_name: str) -> None:
            pass

    return Monitor()
