import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from networks import TINY
from trocar_engines.errors import TrocarError
from trocar_engines.network import config as network_configs
from trocar_engines.network.config import INSTRUMENT_CLASSES
from trocar_engines.network.semantic import TIP
from trocar_engines.training.appearance import render_views
from trocar_engines.training.clicks import farthest_point, next_click, training_boxes
from trocar_engines.training.losses import LossWeights, dice_loss, focal_loss, soften
from trocar_engines.training.sampling import ClipSamples, Mix, _add_look_alike, _mark, augment
from trocar_engines.training.store import StoredClip, open_store, render_store
from trocar_engines.training.train import NaNLossError, Stage, TrainConfig, _Run, train
from trocar_engines.training.windows import fill_store, open_windows, render_windows


def disc(size: int, x: int, y: int, radius: int) -> np.ndarray:
    rows, columns = np.mgrid[:size, :size]
    return np.asarray((columns - x) ** 2 + (rows - y) ** 2 <= radius**2)


def test_first_click_is_the_point_farthest_from_the_edge() -> None:
    assert next_click(disc(64, 40, 20, 10), None) == ((40, 20), 1)
    assert farthest_point(np.zeros((8, 8), dtype=bool)) is None


def test_next_click_corrects_the_largest_error() -> None:
    truth = disc(64, 20, 20, 10) | disc(64, 50, 50, 4)
    assert next_click(truth, disc(64, 20, 20, 10)) == ((50, 50), 1)
    extra = truth | disc(64, 20, 50, 8)
    assert next_click(truth, extra) == ((20, 50), 0)


def test_boxes_hold_their_object_roughly() -> None:
    masks = torch.from_numpy(np.stack([disc(64, 30, 30, 15)] * 50))
    corners, labels = training_boxes(np.random.default_rng(0), masks)
    assert labels.tolist() == [[2, 3]] * 50
    assert (corners - torch.tensor([[15.0, 15.0], [46.0, 46.0]])).abs().max() <= 3.2


def test_soft_labels_keep_the_area_and_blur_the_edge() -> None:
    mask = torch.from_numpy(disc(64, 32, 32, 15)).float().unsqueeze(0)
    soft = soften(mask)
    assert soft.sum() == pytest.approx(mask.sum().item(), rel=1e-3)
    assert 0.2 < soft[0, 32, 47] < 0.8
    assert soft[0, 32, 32] == pytest.approx(1)


def test_losses_are_least_for_the_truth_and_finite_for_certain_mistakes() -> None:
    truth = torch.from_numpy(disc(64, 32, 32, 15)).float()[None, None]
    right, wrong = (truth * 2 - 1) * 50, (1 - truth * 2) * 50
    for loss in (focal_loss, dice_loss):
        assert loss(right, truth).item() < 0.01 < loss(wrong, truth).item() < 1e4


def stored(frames: int = 6) -> StoredClip:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (frames, 64, 64, 4), dtype=np.uint8)
    pixels[..., 3] = disc(64, 30, 30, 20)
    return StoredClip(pixels, (2,), is_dense=True)


def test_samples_are_the_same_for_the_same_index() -> None:
    samples = ClipSamples([stored()], [stored()], frames=3, objects=2, size_px=64, mix=Mix(), count=8)
    again = ClipSamples([stored()], [stored()], frames=3, objects=2, size_px=64, mix=Mix(), count=8)
    for index in range(8):
        assert samples[index].pixels.equal(again[index].pixels)
        assert samples[index].masks.equal(again[index].masks)
    assert not samples[0].pixels.equal(samples[1].pixels)
    assert all(samples[index].masks[:, 0].any() for index in range(8)), "an object shows on its first frame"


def test_augmentation_moves_mask_and_picture_alike() -> None:
    pixels = np.zeros((2, 64, 64, 4), dtype=np.uint8)
    pixels[:, disc(64, 20, 40, 10)] = (255, 255, 255, 1)
    compared = 0
    for seed in range(20):
        changed = augment(np.random.default_rng(seed), pixels, 64)
        if changed[0, ..., 3].any() and not changed[0, ..., 3].all():
            inside = changed[0, ..., :3][changed[0, ..., 3] == 1].mean()
            outside = changed[0, ..., :3][changed[0, ..., 3] == 0].mean()
            assert inside > outside + 50
            compared += 1
    assert compared > 5


@pytest.fixture
def tiny_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    monkeypatch.setitem(network_configs.NETWORKS, "tiny", TINY)
    render_store(tmp_path / "clips", size_px=64, scenes=2, worlds=2, workers=1, on_clip=lambda: None)
    return TrainConfig(
        model="tiny",
        out=tmp_path / "run",
        clips=tmp_path / "clips",
        steps=4,
        stages=(Stage(size_px=64, clips=2, frames=3, share=1.0),),
        save_every=2,
    )


def test_rendered_clips_are_read_back(tiny_training: TrainConfig) -> None:
    clips = open_store(tiny_training.clips, 64)
    assert len(clips) == 4
    assert all(clip.pixels.shape[1:] == (64, 64, 4) for clip in clips)
    assert all(clip.pixels[..., 3].max() <= len(clip.classes) for clip in clips)


def test_stopped_training_resumes_to_the_same_weights(tiny_training: TrainConfig, tmp_path: Path) -> None:
    whole = dataclasses.replace(tiny_training, out=tmp_path / "whole")
    train(whole, lambda _: None)
    halved = dataclasses.replace(tiny_training, out=tmp_path / "halved")
    killed = _Run(halved)
    for batch in killed.batches():
        killed.advance(batch)
        if killed.step == halved.save_every:
            break
    killed.save()
    del killed  # the second half starts from the file alone
    train(halved, lambda _: None)
    results = [
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "halved")
    ]
    assert results[0]["step"] == results[1]["step"] == 4
    for name, value in results[0]["network"].items():
        torch.testing.assert_close(results[1]["network"][name], value, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="session")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of both heads."""
    folder = tmp_path_factory.mktemp("windows")
    for render in (render_windows, render_views):
        fill_store(render, folder, size_px=TINY.input_size_px, grounds=2, workers=1, on_ground=lambda: None)
    return folder


@pytest.mark.parametrize("render", [render_windows, render_views])
def test_windows_are_rendered_once_and_the_same(
    render: Callable[[Path, int, int], Path], windows: Path, tmp_path: Path
) -> None:
    size_px = TINY.input_size_px
    stored = sorted(windows.iterdir())
    times = [path.stat().st_mtime_ns for path in stored]
    done: list[None] = []
    fill_store(render, windows, size_px=size_px, grounds=2, workers=1, on_ground=lambda: done.append(None))
    assert len(done) == 2
    assert [path.stat().st_mtime_ns for path in sorted(windows.iterdir())] == times
    again = render(tmp_path, size_px, 1)
    for name, values in np.load(windows / again.name).items():
        np.testing.assert_array_equal(np.load(again)[name], values)


def test_windows_that_other_code_rendered_are_left_alone(windows: Path, tmp_path: Path) -> None:
    size_px = TINY.input_size_px
    stored = next(windows.glob("windows-*"))
    (tmp_path / stored.name).write_bytes(stored.read_bytes())
    assert open_windows(tmp_path, size_px) is not None
    (tmp_path / stored.name).rename(tmp_path / f"windows-00000000-{size_px}-000000.npz")
    assert open_windows(tmp_path, size_px) is None


def test_windows_show_every_kind_of_instrument_and_tissue(windows: Path) -> None:
    found = open_windows(windows, TINY.input_size_px)
    assert found is not None
    assert set(found.classes.tolist()) == set(range(len(INSTRUMENT_CLASSES)))
    assert found.seen.shape[1:] == (4, TIP.along, TIP.across)
    assert (found.seen[:, 0] > 0).any(dim=2).any(dim=1).all(), "a window is on an object"


@pytest.mark.parametrize(("only", "name"), [("classes", "semantic_head"), ("appearance", "appearance_head")])
def test_only_the_head_learns_from_windows(
    only: Literal["classes", "appearance"], name: str, tiny_training: TrainConfig, windows: Path
) -> None:
    run = _Run(dataclasses.replace(tiny_training, only=only, windows=windows))
    before = {name: value.clone() for name, value in run.network.state_dict().items()}
    for batch in run.batches():
        run.advance(batch)
    changed = {
        name for name, value in run.network.state_dict().items() if not torch.equal(value, before[name])
    }
    learnt = {one for one, _ in run.network.named_parameters() if one.startswith(name)}
    assert changed == {one for one in learnt if "_memory" not in one}


@pytest.mark.parametrize("only", ["classes", "appearance"])
def test_heads_learn_from_windows_and_resume(
    only: Literal["classes", "appearance"], tiny_training: TrainConfig, windows: Path
) -> None:
    whole = dataclasses.replace(tiny_training, only=only, windows=windows, steps=24, save_every=12)
    halved = dataclasses.replace(whole, out=tiny_training.out / "halved")
    run = _Run(whole)
    losses = [run.advance(batch)["loss"] for batch in run.batches()]
    assert np.mean(losses[-6:]) < np.mean(losses[:6]) - 0.1
    for _ in range(2):
        resumed = _Run(halved)
        for batch in resumed.batches():
            resumed.advance(batch)
            if resumed.step == 12:
                break
        resumed.save()
    assert resumed.step == run.step == 24
    for name, value in resumed.network.state_dict().items():
        torch.testing.assert_close(value, run.network.state_dict()[name], atol=0, rtol=0, msg=name)


@pytest.mark.parametrize("only", ["classes", "appearance"])
def test_heads_without_windows_or_network_are_refused(
    only: Literal["classes", "appearance"], tiny_training: TrainConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(tiny_training, only=only, windows=tmp_path)
    with pytest.raises(TrocarError, match="holds no rendered"):
        list(_Run(config).batches())
    with pytest.raises(TrocarError, match=f"no head for {only}"):
        _Run(dataclasses.replace(config, model="sam2.1-hiera-tiny-512"))


def test_nan_loss_stops_with_the_seed_and_writes_nothing(tiny_training: TrainConfig) -> None:
    broken = dataclasses.replace(tiny_training, weights=LossWeights(arl=float("nan")))
    with pytest.raises(NaNLossError, match="step 0, seed 0"):
        train(broken, lambda _: None)
    assert not (tiny_training.out / "checkpoint.pt").exists()


def test_log_holds_a_line_per_report(tiny_training: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trocar_engines.training.train.LOG_EVERY", 2)
    reports: list[object] = []
    weights = train(tiny_training, reports.append)
    lines = [json.loads(line) for line in (tiny_training.out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert len(reports) == 2
    assert weights.exists()


def test_some_clips_look_away_and_show_none_of_their_objects() -> None:
    samples = ClipSamples([stored()], [], frames=4, objects=1, size_px=64, mix=Mix(pasted=0.0), count=60)
    shown = torch.stack([samples[index].masks[0].flatten(1).any(dim=1) for index in range(60)])
    assert shown[:, 0].all(), "the prompted frame always shows the object"
    hidden = (~shown).any(dim=1).float().mean()
    assert 0.1 < hidden < 0.5
    assert (shown[:, -1] & ~shown[:, 2]).any(), "some objects come back"


def test_look_alikes_never_are_the_object_and_leave_most_of_it_on_the_first_frame() -> None:
    rng = np.random.default_rng(3)
    changed_frames = 0
    for seed in range(30):
        clip = stored().pixels
        clip[..., :3] = seed
        truth = clip[..., 3].copy()
        clip[3:, :, :, 3] = 0
        before = clip.copy()
        _add_look_alike(rng, clip)
        assert set(np.unique(clip[..., 3])) <= {0, 1}
        assert not (clip[..., 3] > before[..., 3]).any(), "a copy is background"
        assert np.count_nonzero(clip[0, :, :, 3]) >= 0.6 * np.count_nonzero(truth[0])
        changed_frames += int((clip[..., :3] != before[..., :3]).any(axis=(1, 2, 3)).sum())
    # An object that is away is copied with a mark only, so that its absence can be told.
    assert changed_frames > 60


def test_marks_change_the_copy_alone() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        cut_out = np.full((64, 64, 4), 100, dtype=np.uint8)
        cut_out[..., 3] = disc(64, 30, 30, 20) * 255
        marked = cut_out.copy()
        _mark(rng, marked)
        inside = marked[disc(64, 30, 30, 20)][:, :3].astype(int)
        assert np.abs(inside - 100).max() > 5
        assert (marked[..., 3] == cut_out[..., 3]).all()
