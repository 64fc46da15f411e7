"""From torch to ONNX: one graph a stage, cached by the hash of weights and code."""

import contextlib
import hashlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from onnxscript import opset20 as onnx_ops
from torch import Tensor, nn
from torch.export import Dim

import trocar_engines.network.appearance
import trocar_engines.network.attention
import trocar_engines.network.config
import trocar_engines.network.decoder
import trocar_engines.network.precision
import trocar_engines.network.readout
import trocar_engines.network.sam2s
import trocar_engines.network.semantic
import trocar_engines.network.trunk
import trocar_engines.network.window
from trocar_engines.network.readout import READOUT_SLOTS
from trocar_engines.network.sam2s import SAM2S, ImageFeatures, MemoryView, PromptTensors

OPSET = 20
"""17 does not export, 23 brings an Attention operator that ONNX Runtime runs slower (measured)."""
STAGES = ("encode_image", "attend_memory", "track_masks", "decode_prompt", "encode_memory")
"""Of every network; see `stages_of`."""
StageFunction = Callable[..., tuple[Tensor, ...]]


class _Stage(nn.Module):
    """A method of the network as a module of its own, which is what the exporter takes."""

    def __init__(self, network: SAM2S, run: StageFunction) -> None:
        super().__init__()
        self.network = network
        self.run = run

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.run(*tensors)


def export_stages(
    network: SAM2S, folder: Path, on_stage: Callable[[str], None], stages: Sequence[str] | None = None
) -> dict[str, Path]:
    """Write every stage that is not in `folder` yet; returns their paths.

    Args:
        network: with its weights, on the CPU.
        folder: of this network's engines, from `engine_folder`.
        on_stage: called with a stage's name before it is exported.
        stages: which of `stage_functions`; None for all that a tracker runs of it.
    """
    stages = stages_of(network) if stages is None else stages
    paths = {stage: folder / f"{stage}.onnx" for stage in stages}
    missing = [stage for stage in stages if not paths[stage].exists()]
    if not missing:
        return paths
    folder.mkdir(parents=True, exist_ok=True)
    network = network.eval().requires_grad_(False)
    functions, dynamic = stage_functions(network), _dynamic_shapes()
    # Odd sizes, so that the exporter cannot mistake one dimension for another.
    examples = example_inputs(network, rows=2, slots=5, pointers=4, points=3)
    for stage in missing:
        on_stage(stage)
        _export(network, functions[stage], examples[stage], dynamic[stage], paths[stage])
    return paths


def stages_of(network: SAM2S) -> tuple[str, ...]:
    """What a tracker runs of a network; `recognise` only where it knows classes."""
    return (*STAGES, "recognise") if network.config.classes else STAGES


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
    for module in (
        "appearance",
        "attention",
        "config",
        "decoder",
        "precision",
        "readout",
        "sam2s",
        "semantic",
        "trunk",
        "window",
    ):
        digest.update(Path(getattr(network_code, module).__file__).read_bytes())
    digest.update(Path(__file__).read_bytes())
    digest.update(f"{torch.__version__} {version('onnx')} {version('onnxscript')} {OPSET}".encode())
    return cache / digest.hexdigest()[:16]


def default_cache() -> Path:
    """Where engines are cached unless told otherwise: the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "trocar" / "engines"


def stage_functions(network: SAM2S) -> dict[str, StageFunction]:
    """Every stage as a function of bare tensors, in the order of `example_inputs`.

    `attend_full` is `attend_memory` for rows that all read as much; it does not read the biases.
    """
    functions: dict[str, StageFunction] = {
        "encode_image": network.encode_image,
        "attend_memory": lambda embedding, *view: network.attend_memory(embedding, MemoryView(*view)),
        "attend_full": lambda embedding, *view: network.attend_memory(
            embedding, MemoryView(*view), is_full=True
        ),
        "track_masks": network.track_masks,
        "decode_prompt": lambda conditioned, stride_4, stride_8, keys, points, labels, mask, *flags: (
            network.decode_prompt(
                ImageFeatures(conditioned, stride_4, stride_8, keys),
                PromptTensors(points, labels, mask, flags[0]),
                flags[1],
            )
        ),
        "encode_memory": network.encode_memory,
    }
    if network.config.classes:
        functions["recognise"] = network.recognise
    return functions


def example_inputs(
    network: SAM2S, *, rows: int, slots: int, pointers: int, points: int
) -> dict[str, tuple[Tensor, ...]]:
    """Inputs of every stage on the network's device: random pictures, and what the network makes of one.

    Args:
        network: computes the inputs of later stages.
        rows: of every batch.
        slots: memory slots of each; none is empty, as none of its pointers.
        pointers: object pointers of each.
        points: of a prompt.
    """
    config = network.config
    device = network.image_mean.device
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    size = config.input_size_px
    pixels = torch.randint(0, 256, (rows, size, size, 3), dtype=torch.uint8, generator=generator).to(device)
    logits = 4 * normal(rows, config.mask_size, config.mask_size)
    flags = torch.zeros(rows, dtype=torch.bool, device=device)
    # One picture for all rows: encoding as many would take more memory than a batch of objects does.
    one = network.encode_image(pixels[:1])
    memory = network.encode_memory(one.embedding, one.keys, logits[:1], normal(1).abs(), flags[:1])
    features = ImageFeatures(*(maps.repeat(rows, 1, 1, 1) for maps in one))
    spatial, prototypes = (part.repeat(rows, *[1] * (part.ndim - 1)) for part in memory)
    view = MemoryView(
        spatial=spatial.unsqueeze(1).repeat(1, slots, 1, 1, 1),
        slot_time=torch.arange(slots, device=device).repeat(rows, 1) % config.num_maskmem,
        slot_bias=torch.zeros(rows, slots, device=device),
        pointers=normal(rows, pointers, config.d_model),
        pointer_age=torch.arange(pointers, device=device).repeat(rows, 1).float(),
        pointer_bias=torch.zeros(rows, pointers, device=device),
    )
    maps = (features.stride_4, features.stride_8, features.keys)
    remembered = prototypes.unsqueeze(1).repeat(1, READOUT_SLOTS, 1, 1)
    inputs: dict[str, tuple[Tensor, ...]] = {
        "encode_image": (pixels,),
        "attend_memory": (features.embedding, *view),
        "attend_full": (features.embedding, *view),
        "track_masks": (features.embedding, *maps, remembered),
        "decode_prompt": (
            features.embedding,
            *maps,
            size * torch.rand(rows, points, 2, generator=generator).to(device),
            torch.ones(rows, points, dtype=torch.int64, device=device),
            logits.unsqueeze(1),
            # Two tensors: the exporter takes the same one for one input.
            flags,
            flags.clone(),
        ),
        "encode_memory": (features.embedding, features.keys, logits, normal(rows).abs(), flags),
    }
    if config.classes:
        inputs["recognise"] = (normal(rows, config.d_model), pixels, logits)
    return inputs


def _dynamic_shapes() -> dict[str, tuple[Any, ...]]:
    """Per stage, which dimensions of its inputs vary."""
    rows = Dim("rows")
    only_rows = {0: rows}
    slots, pointers = {0: rows, 1: Dim("slots")}, {0: rows, 1: Dim("pointers")}
    points = {0: rows, 1: Dim("points")}
    attend = (only_rows, slots, slots, slots, pointers, pointers, pointers)
    return {
        "encode_image": (only_rows,),
        "attend_memory": attend,
        "attend_full": attend,
        "track_masks": (only_rows,) * 5,
        "decode_prompt": (*(only_rows,) * 4, points, points, *(only_rows,) * 3),
        "encode_memory": (only_rows,) * 5,
        "recognise": (only_rows,) * 3,
    }


def _export(
    network: SAM2S,
    run: StageFunction,
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
            program,
            (),
            partial,
            dynamo=True,
            opset_version=OPSET,
            external_data=False,
            verbose=False,
            custom_translation_table={torch.ops.aten.scaled_dot_product_attention.default: _write_attention},
        )
    partial.replace(path)


def _write_attention(query: Any, key: Any, value: Any, attn_mask: Any = None) -> Any:
    """Attention of four dimensions in ONNX: two products with a softmax between them.

    The exporter's own turns the keys in three dimensions, which hides from ONNX Runtime that transposing and
    scaling belong to the product: `attend_memory` takes 4%, `track_masks` 7% less time this way.
    """
    scale: Any = onnx_ops.Constant(value_float=query.shape[-1] ** -0.5)
    # Before the product, which in half precision might not hold its own scores.
    scaled = query * onnx_ops.CastLike(scale, query)
    scores = onnx_ops.MatMul(scaled, onnx_ops.Transpose(key, perm=[0, 1, 3, 2]))
    if attn_mask is not None:
        scores = scores + attn_mask
    return onnx_ops.MatMul(onnx_ops.Softmax(scores, axis=-1), value)
