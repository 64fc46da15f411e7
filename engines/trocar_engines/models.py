"""Models by name: network, weights, and the card that travels with them."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trocar_engines.errors import CheckpointError, UnknownModelError
from trocar_engines.memory.bank import BankConfig, MemoryPolicy
from trocar_engines.network.config import NETWORKS, ConvTrunkConfig, NetworkConfig, network_config
from trocar_engines.network.sam2s import SAM2S
from trocar_engines.network.weights import load_weights, weights_hash

DEFAULT_MODEL = "sam2s-nano"
SHIPPED_WEIGHTS = Path(__file__).parent / "weights"
PUBLISHED_CANDIDATE_IOU = 0.95
"""SAM2S' threshold on predicted IoU; a model whose IoU head reads differently carries its own in the card."""


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What a caller may know of a loaded model.

    Args:
        name: of the network.
        input_size_px: side of its input.
        weights_hash: SHA-256 of the weights file in hex.
        runtime: what executes it.
        classes: what its semantic head tells apart.
        policies: memory policies it can be used with.
    """

    name: str
    input_size_px: int
    weights_hash: str
    runtime: str
    classes: tuple[str, ...]
    policies: tuple[str, ...] = tuple(policy.value for policy in MemoryPolicy)


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """A model that may be loaded.

    Args:
        name: of the network.
        config: its shape.
        weights: its file, None where the user has yet to provide one.
        card: data of the card file beside the weights, empty without one.
    """

    name: str
    config: NetworkConfig
    weights: Path | None
    card: dict[str, Any]


def weights_folders() -> tuple[Path, ...]:
    """Where weights are looked for: the user's data folder, then what the package ships."""
    home = Path(os.environ.get("XDG_DATA_HOME", Path.home() / ".local" / "share"))
    return home / "trocar" / "weights", SHIPPED_WEIGHTS


def model_entries() -> tuple[ModelEntry, ...]:
    """Every model, with or without weights."""
    return tuple(model_entry(name) for name in NETWORKS)


def model_entry(name: str) -> ModelEntry:
    """One model by name.

    Raises:
        UnknownModelError: there is none of that name.
    """
    config = network_config(name)
    found = [folder / f"{name}{suffix}" for folder in weights_folders() for suffix in (".safetensors", ".pt")]
    weights = next((path for path in found if path.exists()), None)
    card_path = weights.with_suffix(".json") if weights else None
    card = json.loads(card_path.read_text()) if card_path and card_path.exists() else {}
    return ModelEntry(name=name, config=config, weights=weights, card=card)


def model_card(name: str, weights: Path | None, runtime: str) -> ModelCard:
    """The card of a model, without loading it.

    Args:
        name: of the network.
        weights: a file other than the installed one.
        runtime: what executes it.

    Raises:
        UnknownModelError: no such network.
        CheckpointError: no weights.
    """
    entry = model_entry(name)
    return ModelCard(
        name=name,
        input_size_px=entry.config.input_size_px,
        weights_hash=weights_hash(_weights_path(entry, weights)),
        runtime=runtime,
        classes=entry.config.classes,
    )


def load_network(name: str, weights: Path | None = None) -> SAM2S:
    """A network with its weights, in evaluation mode.

    Args:
        name: of the network.
        weights: a file other than the installed one.

    Raises:
        UnknownModelError: no such network.
        CheckpointError: no weights, or they do not fit.
    """
    entry = model_entry(name)
    network = SAM2S(entry.config)
    load_weights(network, _weights_path(entry, weights))
    return network.eval().requires_grad_(False)


def _weights_path(entry: ModelEntry, weights: Path | None) -> Path:
    path = weights or entry.weights
    if path is None:
        name, folder = entry.name, weights_folders()[0]
        raise CheckpointError(
            f"model {name}: no weights are installed; put {name}.pt or {name}.safetensors into {folder}"
        )
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    return path


def bank_config(entry: ModelEntry, policy: str) -> BankConfig:
    """The memory settings of a model under a policy.

    Raises:
        UnknownModelError: no policy of that name.
    """
    try:
        chosen = MemoryPolicy(policy)
    except ValueError:
        known = ", ".join(item.value for item in MemoryPolicy)
        raise UnknownModelError(f"memory policy {policy!r}: expected one of {known}") from None
    small = isinstance(entry.config.trunk, ConvTrunkConfig)
    vanilla = chosen is MemoryPolicy.VANILLA
    return BankConfig(
        policy=chosen,
        # Beside its readout the small network gains little from more memories; each costs 0.2 ms a frame.
        recent_slots=2 if small and not vanilla else 6,
        long_term_slots=0 if vanilla else 3 if small else 4,
        candidate_iou=float(entry.card.get("candidate_iou", PUBLISHED_CANDIDATE_IOU)),
    )


def cpu_threads() -> int:
    """Threads for inference: every core this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def set_torch_threads(threads: int) -> None:
    """Eager stages use as many threads as the sessions."""
    torch.set_num_threads(threads)
