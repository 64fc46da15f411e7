"""Weights on disk: ours in safetensors, official SAM 2.1 checkpoints as torch files, both loaded strictly."""

import hashlib
import pickle
import zipfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from trocar_engines.errors import CheckpointError
from trocar_engines.network.config import NETWORKS, HieraConfig
from trocar_engines.network.sam2s import SAM2S

MODEL_KEY = "model"
"""Metadata entry of a safetensors file that names its network."""


def save_weights(path: Path, state: dict[str, Tensor], model: str) -> None:
    """Write weights as safetensors; the file appears only when it is whole."""
    partial = path.with_suffix(".part")
    save_file({name: value.contiguous() for name, value in state.items()}, partial, {MODEL_KEY: model})
    partial.replace(path)


def weights_hash(path: Path) -> str:
    """The file's SHA-256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_state(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a safetensors or official torch file, on the CPU; nothing in it is executed.

    Raises:
        CheckpointError: the file is missing or holds no weights.
    """
    is_safetensors = path.suffix == ".safetensors"
    if path.is_file() and not is_safetensors and not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path}: not a checkpoint, or cut short: expected .safetensors, or what torch.save writes"
        )
    try:
        if is_safetensors:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except pickle.UnpicklingError as error:
        # torch's own text recommends to execute the file.
        raise CheckpointError(
            f"{path}: refused, it holds more than tensors; save the weights alone, as "
            "torch.save({'model': model.state_dict()}, FILE)"
        ) from error
    except Exception as error:  # torch and pickle raise what they like on a damaged or hostile file
        raise CheckpointError(f"{path}: cannot be read as weights ({error})") from error
    state = saved.get("model", saved) if isinstance(saved, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: expected a dictionary of tensors, bare or under 'model'")
    return state


def load_weights(network: SAM2S, path: Path) -> None:
    """Load a file into a network, every key and shape accounted for.

    Raises:
        CheckpointError: unreadable, or keys or shapes differ, or values are not finite; the message lists
            them.
    """
    state = load_state(path)
    expected = network.state_dict()
    missing = sorted(expected.keys() - state.keys())
    unexpected = sorted(state.keys() - expected.keys())
    reshaped = sorted(
        f"{name} {tuple(state[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected.keys() & state.keys()
        if state[name].shape != expected[name].shape
    )
    broken = sorted(name for name, value in state.items() if not value.isfinite().all())
    if not (missing or unexpected or reshaped or broken):
        network.load_state_dict(state)
        return
    lines = [
        f"{label}: {_listed(names)}"
        for label, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("wrong shape", reshaped),
            ("NaN or infinite", broken),
        )
        if names
    ]
    if "no_obj_embed_spatial" in missing and "maskmem_tpos_enc" in state:
        lines.append("this looks like a SAM 2.0 file; SAM 2.1 is needed")
    trunk = _trunk_of(state)
    if trunk and trunk != network.config.trunk:
        name = next(name for name, config in NETWORKS.items() if config.trunk == trunk)
        lines.append(f"this looks like a file of {name}")
    raise CheckpointError(f"{path}: not weights of this network; " + "; ".join(lines))


def _trunk_of(state: dict[str, Tensor]) -> HieraConfig | None:
    """The Hiera trunk that weights are of, as far as their names and shapes tell."""
    prefix = "image_encoder.trunk."
    blocks = {key.split(".")[3] for key in state if key.startswith(f"{prefix}blocks.")}
    position = state.get(f"{prefix}pos_embed")
    for config in NETWORKS.values():
        trunk = config.trunk
        if isinstance(trunk, HieraConfig) and position is not None and len(blocks) == sum(trunk.stages):
            shape = (1, trunk.embed_dim, *trunk.window_pos_embed_bkg_spatial_size)
            if position.shape == shape:
                return trunk
    return None


def _listed(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
