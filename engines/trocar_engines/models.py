"""Models by name: network, weights, and the card that travels with them."""

import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from trocar_engines.errors import CheckpointError, UnknownModelError
from trocar_engines.memory.bank import BankConfig, MemoryPolicy
from trocar_engines.network.config import NETWORKS, ConvTrunkConfig, NetworkConfig, network_config
from trocar_engines.network.sam2s import SAM2S
from trocar_engines.network.weights import load_state, load_weights, save_weights, weights_hash

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

    Networks that differ only in input size take the same weights: one that has none of its own borrows the
    other's.

    Raises:
        UnknownModelError: there is none of that name.
        CheckpointError: its card is damaged.
    """
    config = network_config(name)
    twins = (
        other
        for other, twin in NETWORKS.items()
        if dataclasses.replace(twin, input_size_px=config.input_size_px) == config
    )
    weights = next(filter(None, map(_find_weights, dict.fromkeys((name, *twins)))), None)
    return ModelEntry(name=name, config=config, weights=weights, card=_read_card(weights))


def _find_weights(name: str) -> Path | None:
    """The weights file of exactly that name."""
    found = (folder / f"{name}{suffix}" for folder in weights_folders() for suffix in (".safetensors", ".pt"))
    return next((path for path in found if path.exists()), None)


def _read_card(weights: Path | None) -> dict[str, Any]:
    path = weights.with_suffix(".json") if weights else None
    if path is None or not path.exists():
        return {}
    try:
        card = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: not a model card ({error}); delete it") from error
    if not isinstance(card, dict):
        raise CheckpointError(f"{path}: not a model card (expected a JSON object); delete it")
    return card


def import_weights(
    name: str,
    source: Path,
    *,
    is_replacing: bool = False,
    on_stage: Callable[[str], None] = lambda _: None,
) -> bool:
    """Install a checkpoint, official or own, under a model's name, with a card.

    Nothing in the file is executed, every key and shape is accounted for, and what was installed before is
    kept until the new file is whole.

    Args:
        name: of the network that it belongs to.
        source: safetensors, or a torch file whose tensors lie bare or under "model".
        is_replacing: whether it may take the place of other weights.
        on_stage: called with a line of text before each long step.

    Returns:
        False if the same weights were installed already.

    Raises:
        UnknownModelError: no such network.
        CheckpointError: not weights of this network, other weights are installed, or the folder cannot be
            written.
    """
    config = network_config(name)
    if not source.is_file():
        raise CheckpointError(f"{source}: no such file")
    on_stage(f"reading {source} ({source.stat().st_size / 1e6:.0f} MB)")
    network = SAM2S(config)
    load_weights(network, source)
    state = network.state_dict()
    installed = _find_weights(name)
    is_new = installed is None or not _holds(installed, state)
    if installed and is_new and not is_replacing:
        raise CheckpointError(
            f"model {name}: other weights are installed in {installed}; import with --replace to prefer "
            f"those of {source}"
        )
    if installed and not is_new and installed.with_suffix(".json").exists():
        return False
    target = weights_folders()[0] / f"{name}.safetensors"
    on_stage(f"writing {target}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Renamed only once both files are whole; a folder beside the target, since a rename stays on a disk.
        with tempfile.TemporaryDirectory(prefix=".import-", dir=target.parent) as staging:
            whole, card = Path(staging, target.name), Path(staging, target.stem + ".json")
            save_weights(whole, state, name)
            card.write_text(json.dumps(_card_of(network, name, source, weights_hash(whole)), indent=2) + "\n")
            target.with_suffix(".json").unlink(missing_ok=True)
            whole.replace(target)
            card.replace(target.with_suffix(".json"))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{target}: cannot be written ({error})") from error
    return is_new


def _holds(path: Path, state: dict[str, Tensor]) -> bool:
    """Whether a file holds exactly those weights."""
    try:
        other = load_state(path)
    except CheckpointError:
        return False
    return other.keys() == state.keys() and all(state[key].equal(value) for key, value in other.items())


def _card_of(network: SAM2S, name: str, source: Path, installed_hash: str) -> dict[str, Any]:
    """The card of imported weights: what a card beside the source says, and what is known of the file."""
    return {
        "licence": "that of the imported file; the official SAM 2.1 checkpoints are Apache-2.0",
        "data": ["see whoever trained the imported file"],
        "figures": {},
        "limits": ["Not measured here: bench-accuracy does.", "Not validated for clinical use."],
        **_read_card(source),
        "name": name,
        "input_size_px": network.config.input_size_px,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "weights_hash": installed_hash,
        "imported_from": source.name,
        "imported_file_hash": weights_hash(source),
        "imported_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


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
        weights_hash=installed_hash(_weights_path(entry, weights)),
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
        raise CheckpointError(
            f"model {entry.name}: no weights are installed; run trocar models import {entry.name} FILE"
        )
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    return path


def installed_hash(path: Path) -> str:
    """SHA-256 in hex of a weights file, read once for as long as the file does not change."""
    status = path.stat()
    return _hash_once(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=64)
def _hash_once(path: Path, mtime_ns: int, size_bytes: int) -> str:  # noqa: ARG001 - they are the key
    return weights_hash(path)


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
