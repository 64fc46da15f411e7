"""From torch to ONNX: one graph a stage, cached by the hash of weights and code."""

import contextlib
import hashlib
import io
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.export import Dim

import trocar_engines.network.attention
import trocar_engines.network.config
import trocar_engines.network.decoder
import trocar_engines.network.readout
import trocar_engines.network.sam2s
import trocar_engines.network.semantic
import trocar_engines.network.trunk
from trocar_engines.memory.pool import READOUT_SLOTS
from trocar_engines.network.sam2s import SAM2S, ImageFeatures, MemoryView, PromptTensors

OPSET = 20
"""17 does not export, 23 brings an Attention operator that ONNX Runtime runs slower (measured)."""
STAGES = ("encode_image", "attend_memory", "track_masks", "decode_prompt", "encode_memory")


class _Stage(nn.Module):
    """A method of the network as a module of its own, which is what the exporter takes."""

    def __init__(self, network: SAM2S, run: Callable[..., tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.network = network
        self.run = run

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.run(*tensors)


def export_stages(network: SAM2S, folder: Path, on_stage: Callable[[str], None]) -> dict[str, Path]:
    """Write every stage that is not in `folder` yet; returns their paths.

    Args:
        network: with its weights.
        folder: of this network's engines, from `engine_folder`.
        on_stage: called with a stage's name before it is exported.
    """
    paths = {stage: folder / f"{stage}.onnx" for stage in STAGES}
    missing = [stage for stage in STAGES if not paths[stage].exists()]
    if not missing:
        return paths
    folder.mkdir(parents=True, exist_ok=True)
    network = network.eval().requires_grad_(False)
    graphs = _graphs(network)
    for stage in missing:
        on_stage(stage)
        _export(network, *graphs[stage], paths[stage])
    return paths


def engine_folder(cache: Path, network: SAM2S) -> Path:
    """Folder of a network's engines: its hash covers weights, shape, code and exporter.

    Args:
        cache: root of all engines.
    """
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    digest.update(repr(network.config).encode())
    network_code = trocar_engines.network
    for module in ("attention", "config", "decoder", "readout", "sam2s", "semantic", "trunk"):
        digest.update(Path(getattr(network_code, module).__file__).read_bytes())
    digest.update(Path(__file__).read_bytes())
    digest.update(f"{torch.__version__} {onnx.__version__} {OPSET}".encode())
    return cache / digest.hexdigest()[:16]


def default_cache() -> Path:
    """Where engines are cached unless told otherwise: the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "trocar" / "engines"


def _graphs(network: SAM2S) -> dict[str, tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...], Any]]:
    """Per stage: the function, example inputs and which of their dimensions vary."""
    config = network.config
    # Odd sizes, so that the exporter cannot mistake one dimension for another.
    batch, slots, pointers, points = 2, 5, 4, 3
    pixels = torch.zeros(batch, config.input_size_px, config.input_size_px, 3, dtype=torch.uint8)
    features = network.encode_image(pixels)
    logits = torch.zeros(batch, config.mask_size, config.mask_size)
    flags = torch.zeros(batch, dtype=torch.bool)
    spatial, prototypes = network.encode_memory(
        features.embedding, features.keys, logits, logits[:, 0, 0], flags
    )
    rows, slot_axis, pointer_axis, point_axis = Dim("rows"), Dim("slots"), Dim("pointers"), Dim("points")
    view = MemoryView(
        spatial=spatial.unsqueeze(1).repeat(1, slots, 1, 1, 1),
        slot_time=torch.zeros(batch, slots, dtype=torch.int64),
        slot_bias=torch.zeros(batch, slots),
        pointers=torch.zeros(batch, pointers, config.d_model),
        pointer_age=torch.zeros(batch, pointers),
        pointer_bias=torch.zeros(batch, pointers),
    )
    slot_dims, pointer_dims = {0: rows, 1: slot_axis}, {0: rows, 1: pointer_axis}
    only_rows = {0: rows}
    maps = (features.stride_4, features.stride_8)
    return {
        "encode_image": (network.encode_image, (pixels,), (only_rows,)),
        "attend_memory": (
            lambda embedding, *memory: network.attend_memory(embedding, MemoryView(*memory)),
            (features.embedding, *view),
            (only_rows, slot_dims, slot_dims, slot_dims, pointer_dims, pointer_dims, pointer_dims),
        ),
        "track_masks": (
            network.track_masks,
            (
                features.embedding,
                *maps,
                features.keys,
                prototypes.unsqueeze(1).repeat(1, READOUT_SLOTS, 1, 1, 1, 1),
                torch.zeros(batch, READOUT_SLOTS),
            ),
            (only_rows,) * 6,
        ),
        "decode_prompt": (
            lambda conditioned, stride_4, stride_8, keys, points, labels, mask, has_mask, is_multimask: (
                network.decode_prompt(
                    ImageFeatures(conditioned, stride_4, stride_8, keys),
                    PromptTensors(points, labels, mask, has_mask),
                    is_multimask,
                )
            ),
            (
                features.embedding,
                *maps,
                features.keys,
                torch.zeros(batch, points, 2),
                torch.zeros(batch, points, dtype=torch.int64),
                logits.unsqueeze(1),
                # Two tensors: the exporter takes the same one for one input.
                flags,
                flags.clone(),
            ),
            (*(only_rows,) * 4, *({0: rows, 1: point_axis},) * 2, *(only_rows,) * 3),
        ),
        "encode_memory": (
            network.encode_memory,
            (features.embedding, features.keys, logits, logits[:, 0, 0], flags),
            (only_rows,) * 5,
        ),
    }


def _export(
    network: SAM2S,
    run: Callable[..., tuple[Tensor, ...]],
    inputs: tuple[Tensor, ...],
    dynamic: Any,
    path: Path,
) -> None:
    """Export one stage; the file appears only when it is whole."""
    partial = path.with_suffix(".part")
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        # Traced first: given a module, the ONNX exporter quietly freezes a dimension it cannot keep open.
        program = torch.export.export(_Stage(network, run), inputs, dynamic_shapes=(dynamic,), strict=False)
        torch.onnx.export(
            program, (), partial, dynamo=True, opset_version=OPSET, external_data=False, verbose=False
        )
    partial.replace(path)
