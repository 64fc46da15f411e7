"""Official checkpoints, of exactly the layout that the sam2 package's models have, and their import."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from sam2.build_sam import build_sam2
from torch import Tensor
from torch.overrides import TorchFunctionMode

from networks import lively_network
from trocar.cli import main
from trocar_engines import models
from trocar_engines.errors import CheckpointError
from trocar_engines.models import SHIPPED_WEIGHTS, import_weights, load_network, model_entry
from trocar_engines.network.config import NANO, network_config
from trocar_engines.network.sam2s import SAM2S
from trocar_engines.network.weights import load_state, load_weights, save_weights, weights_hash

TINY = "sam2.1-hiera-tiny"
OFFICIAL = {
    TINY: "configs/sam2.1/sam2.1_hiera_t.yaml",
    "sam2.1-hiera-small": "configs/sam2.1/sam2.1_hiera_s.yaml",
    "sam2.1-hiera-base-plus": "configs/sam2.1/sam2.1_hiera_b+.yaml",
    "sam2.1-hiera-large": "configs/sam2.1/sam2.1_hiera_l.yaml",
}
UNUSED = "no_mem_pos_enc"
"""Official files hold it; under `directly_add_no_mem_embed` neither sam2 nor we read it."""


class OnMeta(TorchFunctionMode):
    """Weights without storage; `torch.device("meta")` would catch the numbers that Hiera reads back too."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_factory = function in (torch.empty, torch.zeros, torch.ones, torch.randn)
        return function(*args, **{**(kwargs or {}), **({"device": "meta"} if is_factory else {})})


def build_official(name: str) -> Any:
    with OnMeta():
        return build_sam2(OFFICIAL[name], device="meta")


def build_ours(name: str) -> SAM2S:
    with OnMeta():
        return SAM2S(network_config(name)).eval()


def official_state(name: str) -> dict[str, Tensor]:
    """Every tensor of the official file with its name and shape; one number each, so that large is small."""
    shapes = {key: value.shape for key, value in build_official(name).state_dict().items()}
    return {
        key: torch.tensor(index / 1000).expand(shape) for index, (key, shape) in enumerate(shapes.items())
    }


def settings(network: Any) -> dict[str, object]:
    """Plain values of every module: the windows, heads and flags that names and shapes do not tell."""
    plain = (bool, int, float, str)
    found: dict[str, object] = {}
    for path, module in network.named_modules():
        for name, value in vars(module).items():
            values = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
            if all(isinstance(item, plain) for item in values):
                found[f"{path}.{name}"] = values
    return found


def is_read_in_training_only(name: str) -> bool:
    return "dropout" in name


@pytest.mark.parametrize("name", OFFICIAL)
def test_network_has_the_official_layout_and_settings(name: str) -> None:
    official, ours = build_official(name), build_ours(name)
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in official.state_dict().items()
    }
    expected, found = settings(official), settings(ours)
    shared = {key for key in expected.keys() & found.keys() if not is_read_in_training_only(key)}
    # Ours falls back in `select_mask`, where it can be exported.
    shared.remove("sam_mask_decoder.dynamic_multimask_via_stability")
    assert {key for key in expected if key.startswith("image_encoder.trunk.")} <= shared
    assert {key: found[key] for key in shared} == {key: expected[key] for key in shared}


@pytest.mark.parametrize("name", OFFICIAL)
def test_flags_of_the_predictor_are_those_of_tiny(name: str) -> None:
    """What parity on tiny shows then holds for every size."""
    flags, of_tiny = (settings(build_official(each)) for each in (name, TINY))
    for key in flags.keys() | of_tiny.keys():
        assert key.startswith("image_encoder.") or flags[key] == of_tiny[key], key


@pytest.mark.filterwarnings("ignore:.*to a meta parameter in the current model")
@pytest.mark.parametrize("name", OFFICIAL)
def test_official_file_fits_strictly(name: str, tmp_path: Path) -> None:
    state = official_state(name)
    assert UNUSED in state
    torch.save({"model": state}, tmp_path / "official.pt")
    load_weights(build_ours(name), tmp_path / "official.pt")
    del state[UNUSED]
    torch.save({"model": state}, tmp_path / "lacking.pt")
    with pytest.raises(CheckpointError, match=f"missing: {UNUSED}"):
        load_weights(build_ours(name), tmp_path / "lacking.pt")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty data folder; holds hundreds of megabytes and does not outlive the test."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    yield tmp_path / "home" / "trocar" / "weights"
    shutil.rmtree(tmp_path / "home", ignore_errors=True)


def write_nano(path: Path, seed: int) -> Path:
    save_weights(path, lively_network(NANO, seed).state_dict(), "sam2s-nano")
    return path


def test_imported_official_checkpoint_tracks_and_is_shared_with_the_other_input_size(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    official = build_sam2(OFFICIAL[TINY], device="cpu")
    with torch.no_grad():
        official.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(5.0)
    source = home.parents[1] / "sam2.1_hiera_tiny.pt"
    source.parent.mkdir()
    torch.save({"model": official.state_dict()}, source)
    assert main(["models", "import", TINY, str(source)]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert sorted(path.name for path in home.iterdir()) == [f"{TINY}.json", f"{TINY}.safetensors"]
    assert told["weights_hash"] == told["card"]["weights_hash"] == weights_hash(home / f"{TINY}.safetensors")
    assert told["card"]["imported_file_hash"] == weights_hash(source)
    assert told["card"]["parameters"] == sum(value.numel() for value in official.parameters())
    installed = load_state(home / f"{TINY}.safetensors")
    assert all(installed[key].equal(value) for key, value in official.state_dict().items())
    assert model_entry(f"{TINY}-512").weights == model_entry(TINY).weights == home / f"{TINY}.safetensors"

    frames, out = tmp_path / "frames", tmp_path / "out"
    frames.mkdir()
    for index in range(2):
        noise = np.random.default_rng(index).integers(0, 255, (90, 160, 3), dtype=np.uint8)
        cv2.imwrite(str(frames / f"{index:05}.jpg"), noise)
    model = ["--model", f"{TINY}-512", "--runtime", "eager", "--memory", "vanilla"]
    assert main(["track", str(frames), "--point", "80,45", "--out", str(out), *model]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["frames"] == 2
    states = [
        frame["objects"][0]["state"] for frame in json.loads((out / "result.json").read_text())["frames"]
    ]
    assert states == ["visible"] * 2


def test_shipped_card_describes_the_shipped_weights() -> None:
    card = model_entry("sam2s-nano").card
    assert card["parameters"] == sum(value.numel() for value in SAM2S(NANO).parameters())
    assert card["weights_hash"] == weights_hash(SHIPPED_WEIGHTS / "sam2s-nano.safetensors")


def test_card_travels_along_and_importing_again_changes_nothing(home: Path, tmp_path: Path) -> None:
    source = write_nano(tmp_path / "mine.safetensors", seed=1)
    (tmp_path / "mine.json").write_text('{"name": "mine", "candidate_iou": 0.6}')
    assert import_weights("sam2s-nano", source, is_replacing=True)
    card = model_entry("sam2s-nano").card
    assert (card["name"], card["candidate_iou"], card["imported_from"]) == (
        "sam2s-nano",
        0.6,
        "mine.safetensors",
    )
    before = [(path, path.stat().st_mtime_ns) for path in sorted(home.iterdir())]
    assert not import_weights("sam2s-nano", source)
    assert [(path, path.stat().st_mtime_ns) for path in sorted(home.iterdir())] == before


def test_other_weights_are_replaced_only_on_request(home: Path, tmp_path: Path) -> None:
    shipped = weights_hash(SHIPPED_WEIGHTS / "sam2s-nano.safetensors")
    first, second = (write_nano(tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2))
    with pytest.raises(CheckpointError, match=r"other weights are installed in .*--replace"):
        import_weights("sam2s-nano", first)
    assert not home.exists()
    import_weights("sam2s-nano", first, is_replacing=True)
    with pytest.raises(CheckpointError, match=r"other weights are installed in .*--replace"):
        import_weights("sam2s-nano", second)
    assert model_entry("sam2s-nano").card["imported_from"] == "1.safetensors"
    import_weights("sam2s-nano", second, is_replacing=True)
    entry = model_entry("sam2s-nano")
    assert entry.card["imported_from"] == "2.safetensors"
    assert entry.card["weights_hash"] == weights_hash(home / "sam2s-nano.safetensors")
    assert weights_hash(SHIPPED_WEIGHTS / "sam2s-nano.safetensors") == shipped


def test_interrupted_import_leaves_what_was_there(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_weights("sam2s-nano", write_nano(tmp_path / "old.safetensors", seed=1), is_replacing=True)
    before = {path.name: path.read_bytes() for path in home.iterdir()}

    def write_half(path: Path, state: dict[str, Tensor], model: str) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "save_weights", write_half)
    source = write_nano(tmp_path / "new.safetensors", seed=2)
    assert main(["models", "import", "sam2s-nano", str(source), "--replace"]) == 130
    assert {path.name: path.read_bytes() for path in home.iterdir()} == before


def test_a_folder_that_cannot_be_written_is_an_expected_failure(home: Path, tmp_path: Path) -> None:
    home.parent.mkdir(parents=True)
    home.write_text("a file where the folder should be")
    source = write_nano(tmp_path / "mine.safetensors", seed=1)
    with pytest.raises(CheckpointError, match="cannot be written"):
        import_weights("sam2s-nano", source, is_replacing=True)


def test_damaged_card_is_named(home: Path) -> None:
    home.mkdir(parents=True)
    shutil.copy(SHIPPED_WEIGHTS / "sam2s-nano.safetensors", home)
    for content in ("{", "[1]"):
        (home / "sam2s-nano.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"sam2s-nano\.json: not a model card"):
            model_entry("sam2s-nano")


class Hostile:
    """Pickled, it runs a command when it is read carelessly."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def without(state: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key not in names}


def test_import_says_what_is_wrong_and_installs_nothing(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = official_state(TINY)
    nan = {**state, "no_obj_ptr": torch.full((1, 256), float("nan"))}
    marker = tmp_path / "executed"
    contents: dict[str, tuple[object, list[str]]] = {
        "missing": (without(state, "no_mem_embed"), ["missing: no_mem_embed"]),
        "unexpected": ({**state, "head.weight": torch.zeros(1)}, ["unexpected: head.weight"]),
        "SAM 2.0": (
            without(state, "no_obj_embed_spatial", "obj_ptr_tpos_proj.weight", "obj_ptr_tpos_proj.bias"),
            ["missing: no_obj_embed_spatial, obj_ptr_tpos_proj.bias", "SAM 2.0 file; SAM 2.1 is needed"],
        ),
        "other size": (
            official_state("sam2.1-hiera-base-plus"),
            ["wrong shape: ", "(112,) instead of (96,)", "a file of sam2.1-hiera-base-plus"],
        ),
        "NaN": (nan, ["NaN or infinite: no_obj_ptr"]),
        "more than tensors": ({"model": Hostile(f"touch {marker}")}, ["refused", "more than tensors"]),
        "no weights": ({"model": [1, 2]}, ["expected a dictionary of tensors"]),
    }
    for label, (content, texts) in contents.items():
        path = tmp_path / f"{label}.pt"
        torch.save({"model": content} if "no_mem_pos_enc" in content else content, path)  # type: ignore[operator]
        assert main(["models", "import", TINY, str(path)]) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert all(text in said for text in [str(path), *texts]), f"{label}: {said}"
    assert not marker.exists()
    assert not home.exists()


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff\xe0 a picture", b"PK\x03\x04 cut short"])
def test_file_that_is_no_checkpoint_is_named(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    path = tmp_path / "clip.jpg"
    path.write_bytes(content)
    assert main(["models", "import", "sam2s-nano", str(path)]) == 2
    assert f"{path}: not a checkpoint" in capsys.readouterr().err


def test_unknown_model_and_missing_file_are_named(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", "import", "sam9", str(tmp_path)]) == 2
    assert "model 'sam9': expected one of sam2s-nano" in capsys.readouterr().err
    assert main(["models", "import", TINY, str(tmp_path / "nothing.pt")]) == 2
    assert "nothing.pt: no such file" in capsys.readouterr().err
    assert (
        main(["track", str(tmp_path), "--point", "1,1", "--out", str(tmp_path / "o"), "--model", TINY]) == 2
    )


def test_model_without_weights_says_how_to_get_them(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckpointError, match=f"trocar models import {TINY} FILE"):
        load_network(TINY)
    assert main(["models", "show", TINY]) == 0
    assert json.loads(capsys.readouterr().out)["install_with"] == f"trocar models import {TINY} FILE"
