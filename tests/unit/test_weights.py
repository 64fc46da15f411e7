from pathlib import Path

import pytest
import torch

from networks import TINY, lively_network
from trocar_engines.errors import CheckpointError
from trocar_engines.network.sam2s import SAM2S
from trocar_engines.network.weights import load_weights, save_weights, weights_hash


def test_weights_survive_the_file(tmp_path: Path) -> None:
    network, other = lively_network(), SAM2S(TINY)
    save_weights(tmp_path / "a.safetensors", network.state_dict(), "tiny")
    load_weights(other, tmp_path / "a.safetensors")
    assert all(value.equal(other.state_dict()[name]) for name, value in network.state_dict().items())
    assert len(weights_hash(tmp_path / "a.safetensors")) == 64


def test_official_form_under_a_model_key_is_read(tmp_path: Path) -> None:
    torch.save({"model": lively_network().state_dict()}, tmp_path / "official.pt")
    load_weights(SAM2S(TINY), tmp_path / "official.pt")


def test_mismatch_lists_missing_unexpected_and_reshaped(tmp_path: Path) -> None:
    state = dict(lively_network().state_dict())
    del state["no_mem_embed"]
    state["extra"] = torch.zeros(1)
    state["no_obj_ptr"] = torch.zeros(1, 3)
    torch.save(state, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError) as error:
        load_weights(SAM2S(TINY), tmp_path / "odd.pt")
    for text in ("missing: no_mem_embed", "unexpected: extra", "no_obj_ptr (1, 3) instead of (1, 32)"):
        assert text in str(error.value)


def test_sam_2_0_file_is_named_as_such(tmp_path: Path) -> None:
    state = dict(lively_network().state_dict())
    del state["no_obj_embed_spatial"]
    torch.save(state, tmp_path / "sam2.pt")
    with pytest.raises(CheckpointError, match=r"SAM 2\.0 file; SAM 2\.1 is needed"):
        load_weights(SAM2S(TINY), tmp_path / "sam2.pt")


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04broken"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damaged_file_is_a_checkpoint_error(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=path.name):
        load_weights(SAM2S(TINY), path)


def test_file_with_more_than_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"model": {"a": print}}, tmp_path / "hostile.pt")
    with pytest.raises(CheckpointError):
        load_weights(SAM2S(TINY), tmp_path / "hostile.pt")
