"""Weights on disk: ours in safetensors, official SAM 2.1 checkpoints as torch files, both loaded strictly."""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trocar_engines.errors import CheckpointError
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
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_state(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a safetensors or official torch file, on the CPU.

    Raises:
        CheckpointError: the file is missing or holds no weights.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: cannot be read as weights ({error})") from error
    except Exception as error:  # pickle raises what it likes on a damaged or hostile file
        raise CheckpointError(f"{path}: refused, it holds more than tensors ({error})") from error
    state = saved.get("model", saved) if isinstance(saved, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: expected a dictionary of tensors, bare or under 'model'")
    return state


def load_weights(network: SAM2S, path: Path) -> None:
    """Load a file into a network, every key and shape accounted for.

    Raises:
        CheckpointError: unreadable, or keys or shapes differ; the message lists them.
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
    if not (missing or unexpected or reshaped):
        network.load_state_dict(state)
        return
    lines = [
        f"{label}: {_listed(names)}"
        for label, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", reshaped))
        if names
    ]
    if "no_obj_embed_spatial" in missing and "maskmem_tpos_enc" in state:
        lines.append("this looks like a SAM 2.0 file; SAM 2.1 is needed")
    raise CheckpointError(f"{path}: not weights of this network; " + "; ".join(lines))


def _listed(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
