import dataclasses
import json
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from networks import TINY
from trocar_engines.errors import TrocarError
from trocar_engines.network import config as network_configs
from trocar_engines.training.appearance import fill_store, open_views, render_views
from trocar_engines.training.clicks import farthest_point, next_click, training_boxes, training_clicks
from trocar_engines.training.losses import LossWeights, dice_loss, focal_loss, soften
from trocar_engines.training.pool import (
    MOST_IDS,
    ClipPool,
    RenderedClips,
    cut_stretches,
    label_frames,
    render_clips,
)
from trocar_engines.training.returns import draw_return_cast
from trocar_engines.training.sampling import ClipSampler, Mix, Sample, _mark
from trocar_engines.training.scenes import Scene, SceneConfig, render_clip
from trocar_engines.training.store import NO_CLASS, StoredClip
from trocar_engines.training.train import (
    NaNLossError,
    Progress,
    Stage,
    TrainConfig,
    _drawn_ahead,
    _Run,
    train,
)


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


def test_training_clicks_fall_on_the_object_and_on_what_is_wrong() -> None:
    torch.manual_seed(0)
    thin = np.zeros((64, 64), dtype=bool)
    thin[10, 5:40] = True
    truth = torch.from_numpy(np.stack([disc(64, 40, 20, 10), thin, np.zeros((64, 64), dtype=bool)] * 20))
    points, labels = training_clicks(truth, None)
    x, y = points[:, 0].long().unbind(1)
    is_on = truth[torch.arange(60), y, x]
    assert is_on.tolist() == [True, True, False] * 20
    assert labels[:, 0].tolist() == [1, 1, 0] * 20, "an absent object gets a click off it"
    # A part is missed on the left, more is taken beyond on the right: there lies the greater mistake.
    predicted = torch.from_numpy(disc(64, 48, 20, 14)).expand(20, -1, -1)
    points, labels = training_clicks(truth[::3], predicted)
    assert labels[:, 0].tolist() == [0] * 20
    assert (points[:, 0, 0] > 49).all()
    _, labels = training_clicks(truth[::3], torch.zeros_like(predicted))
    assert labels[:, 0].tolist() == [1] * 20


def test_boxes_hold_their_object_roughly() -> None:
    torch.manual_seed(0)
    masks = torch.from_numpy(np.stack([disc(64, 30, 30, 15)] * 50))
    corners, labels = training_boxes(masks)
    assert labels.tolist() == [[2, 3]] * 50
    assert (corners - torch.tensor([[15.0, 15.0], [46.0, 46.0]])).abs().max() <= 3.2
    empty, _ = training_boxes(torch.zeros(1, 64, 64, dtype=torch.bool))
    assert ((empty > 30) & (empty < 34)).all()


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


def painted(frames: int, x: int, colour: int, class_index: int = 2) -> StoredClip:
    """A disc of one colour on grey."""
    pixels = np.full((frames, 64, 64, 4), 100, dtype=np.uint8)
    pixels[..., 3] = disc(64, x, 30, 14)
    pixels[..., :3][pixels[..., 3] > 0] = colour
    return StoredClip(pixels, (class_index,), is_dense=False)


def sampler(mix: Mix, *, clips: int = 16, frames: int = 4, objects: int = 1, seed: int = 0) -> ClipSampler:
    kept = [label_frames(clip.pixels, clip.classes) for clip in (painted(6, 24, 250), painted(6, 40, 5))]
    pool = ClipPool(kept, slots=2, frames=6, size_px=64, device="cpu")
    pool.add(label_frames(*_of(stored())))
    return ClipSampler(pool, clips=clips, frames=frames, objects=objects, size_px=64, mix=mix, seed=seed)


def _of(clip: StoredClip) -> tuple[np.ndarray, tuple[int, ...]]:
    return clip.pixels, clip.classes


def test_samples_are_the_same_for_the_same_step() -> None:
    first, again = sampler(Mix(), objects=2), sampler(Mix(), objects=2)
    for step in range(3):
        for tensor, same in zip(first.draw(step).tensors, again.draw(step).tensors, strict=True):
            assert tensor.equal(same)
    one, other = first.draw(0), first.draw(1)
    assert not one.pixels.equal(other.pixels)
    assert not sampler(Mix(), objects=2, seed=1).draw(0).pixels.equal(one.pixels)
    assert one.is_shown.all()
    assert one.masks[:, :, 0].flatten(2).any(dim=2).all(), "an object shows on its first frame"
    assert one.pixels.shape == (16, 4, 64, 64, 3)
    assert one.masks.shape == (16, 2, 4, 64, 64)


def test_samples_move_mask_and_picture_alike() -> None:
    sample = sampler(Mix(synthetic=0.0, real=1.0, pasted=0.0), clips=40, frames=1).draw(0)
    compared = 0
    for pixels, masks in zip(sample.pixels[:, 0].float().mean(3), sample.masks[:, 0, 0], strict=True):
        if masks.any() and not masks.all() and masks.sum() > 100:
            apart = abs(pixels[masks].mean() - pixels[~masks].mean())
            compared += int(apart > 20)
    assert compared > 25, "what is masked has another colour than the rest"


def test_classes_go_with_their_objects() -> None:
    sample = sampler(Mix(synthetic=0.0, real=1.0, pasted=0.0)).draw(0)
    assert set(sample.classes[sample.is_shown].tolist()) == {2}
    pasted = sampler(Mix(synthetic=0.0, real=0.0, pasted=1.0), objects=2).draw(0)
    assert set(pasted.classes[pasted.is_shown].tolist()) == {2}


def test_some_clips_look_away_and_show_none_of_their_objects() -> None:
    samples = [sampler(Mix(synthetic=0.5, real=0.5, pasted=0.0)).draw(step) for step in range(8)]
    is_shown = torch.cat([sample.is_shown[:, 0] for sample in samples])
    assert is_shown.float().mean() > 0.8, "a crop seldom leaves the objects out"
    shown = torch.cat([sample.masks[:, 0].flatten(2).any(dim=2) for sample in samples])[is_shown]
    assert shown[:, 0].all(), "the prompted frame shows the object"
    assert 0.1 < (~shown).any(dim=1).float().mean() < 0.5
    assert (shown[:, -1] & ~shown[:, 2]).any(), "some objects come back"


def test_pasted_objects_come_and_go_over_a_still() -> None:
    mix = Mix(synthetic=0.0, real=0.0, pasted=1.0)
    samples = [sampler(mix, objects=2, seed=seed).draw(0) for seed in range(4)]
    shown = torch.cat([sample.masks.flatten(3).any(dim=3)[sample.is_shown] for sample in samples])
    assert len(shown) > 120, "a crop seldom leaves the objects out"
    assert shown[:, 0].all()
    assert 0.03 < (~shown).any(dim=1).float().mean() < 0.7


def test_an_approached_object_grows_or_shrinks_and_stays_in_the_picture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("AWAY_SHARE", "TURNED_SHARE", "LOOK_ALIKE_SHARE"):
        monkeypatch.setattr(f"trocar_engines.training.sampling.{name}", 0.0)
    growth = []
    for share in (0.0, 1.0):
        monkeypatch.setattr("trocar_engines.training.sampling.APPROACH_SHARE", share)
        monkeypatch.setattr("trocar_engines.training.sampling.LARGEST_APPROACHED", 0.9)
        sample = sampler(Mix(synthetic=0.0, real=1.0, pasted=0.0), clips=40).draw(0)
        assert sample.masks[sample.is_shown].flatten(2).any(dim=2).all(), "on every frame"
        areas = sample.masks[sample.is_shown].float().mean(dim=(2, 3))
        growth.append((areas[:, -1] / areas[:, 0]).log())
    still, approached = growth
    assert still.abs().max() < 0.1, "a disc that stands still"
    assert (approached > 0.3).any()
    assert (approached < -0.3).any()


def test_look_alikes_never_are_the_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trocar_engines.training.sampling.AWAY_SHARE", 0.0)
    mix = Mix(synthetic=0.0, real=1.0, pasted=0.0)
    samples = []
    for share in (0.0, 1.0):
        monkeypatch.setattr("trocar_engines.training.sampling.LOOK_ALIKE_SHARE", share)
        samples.append(sampler(mix, clips=40).draw(0))
    without, with_copies = samples
    assert not (with_copies.masks & ~without.masks).any(), "a copy is background"
    is_changed = (without.pixels != with_copies.pixels).any(dim=4)
    assert is_changed.flatten(1).any(dim=1).float().mean() > 0.5
    kept = (with_copies.masks[:, :, 0].sum((2, 3)) / without.masks[:, :, 0].sum((2, 3))).flatten()
    assert kept.median() > 0.9, "most of them leave the object on its first frame"


def test_marks_change_the_copy_alone() -> None:
    torch.manual_seed(1)
    alpha = torch.from_numpy(disc(64, 30, 30, 20)).float().expand(20, -1, -1)
    rgb = torch.full((20, 3, 64, 64), 100.0)
    kind = torch.arange(20) % 3
    marked = _mark(rgb, alpha, kind, torch.rand(20, 12))
    changed = (marked - rgb).abs() * alpha.unsqueeze(1)
    assert (changed[kind == 0] == 0).all()
    assert (changed[kind > 0].flatten(1).amax(1) > 5).all()
    is_band = (changed[kind == 1] > 0).any(dim=1).flatten(1).float().sum(1) / alpha[0].sum()
    assert (is_band < 0.6).all()


@pytest.mark.parametrize(("length", "is_dense"), [(40, True), (40, False), (3, True), (1, True)])
def test_stretches_of_real_clips_are_of_one_length(length: int, is_dense: bool) -> None:
    pixels = np.zeros((length, 64, 64, 4), dtype=np.uint8)
    pixels[..., 0] = np.arange(length)[:, None, None]
    stretches = list(cut_stretches(StoredClip(pixels, (NO_CLASS,), is_dense=is_dense), 6))
    assert stretches
    order = [stretch.pixels[:, 0, 0, 0].tolist() for stretch in stretches]
    assert all(len(frames) == 6 for frames in order)
    assert {frame for frames in order for frame in frames} >= {0}
    if length == 40:
        assert order[0] == [0, 1, 2, 3, 4, 5]
        assert ([0, 2, 4, 6, 8, 10] in order) == is_dense
    if length == 3:
        assert order[0] == [0, 1, 2, 1, 0, 1]


def test_pool_keeps_real_clips_and_replaces_the_oldest_rendered_one() -> None:
    clips = [label_frames(*_of(painted(2, 30, colour))) for colour in (1, 2, 3, 4)]
    pool = ClipPool(clips[:1], slots=2, frames=2, size_px=64, device="cpu")
    assert pool.fresh == 0
    for clip in clips[1:]:
        pool.add(clip)
    assert pool.fresh == 2
    assert pool.pixels[:, 0, 30, 30, 0].tolist() == [1, 4, 3]
    assert pool.shown[:, :, 1].all()
    assert not pool.shown[:, :, [0, *range(2, MOST_IDS)]].any()


def test_more_objects_than_a_sample_holds_become_background() -> None:
    pixels = np.zeros((1, 64, 64, 4), dtype=np.uint8)
    pixels[0, :, :32, 3], pixels[0, :, 32:, 3] = 1, 200
    clip = label_frames(pixels, (NO_CLASS,) * 200)
    assert set(clip.pixels[..., 3].unique().tolist()) == {0, 1}


def test_rendered_clips_are_the_same_for_the_same_seed() -> None:
    drawn = [
        list(render_clips(RenderedClips(size_px=64, frames=2, worlds=0.5, begin=3, count=4), workers))
        for workers in (0, 1)
    ]
    for one, other in zip(*drawn, strict=True):
        assert one.pixels.equal(other.pixels)
        assert (one.shown == other.shown).all()
        assert one.pixels[..., 3].max() <= one.objects


def test_returning_instruments_keep_their_number_and_have_a_look_alike() -> None:
    returned = seen_meanwhile = 0
    for seed in range(12):
        config = SceneConfig(height_px=64, width_px=64, frames=12, frame_rate=4.0, seed=seed)
        clip = render_clip(Scene(config, draw_cast=draw_return_cast))
        assert clip.classes[0] == clip.classes[1]
        is_there = [(clip.labels == number).flatten(1).any(dim=1) for number in (1, 2)]
        gone = ~is_there[0]
        returned += int(bool(gone.any()) and bool(is_there[0][int(gone.int().argmax()) :].any()))
        seen_meanwhile += int(bool((gone & is_there[1]).any()))
    assert returned >= 5
    assert seen_meanwhile >= 5


@pytest.fixture
def tiny_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    monkeypatch.setitem(network_configs.NETWORKS, "tiny", TINY)
    monkeypatch.setattr("trocar_engines.training.train.APPEARANCE_CLIPS", 3)
    return TrainConfig(
        model="tiny",
        out=tmp_path / "run",
        clip_frames=4,
        pool_clips=3,
        first_clips=2,
        fresh_clips=1,
        workers=0,
        steps=4,
        stages=(Stage(size_px=64, clips=2, frames=3, share=1.0),),
        save_every=2,
    )


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
def views(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("views")
    fill_store(folder, size_px=TINY.input_size_px, grounds=2, workers=1, on_ground=lambda: None)
    return folder


def test_views_are_rendered_once_and_the_same(views: Path, tmp_path: Path) -> None:
    size_px = TINY.input_size_px
    stored = sorted(views.iterdir())
    times = [path.stat().st_mtime_ns for path in stored]
    done: list[None] = []
    fill_store(views, size_px=size_px, grounds=2, workers=1, on_ground=lambda: done.append(None))
    assert len(done) == 2
    assert [path.stat().st_mtime_ns for path in sorted(views.iterdir())] == times
    again = render_views(tmp_path, size_px, 1)
    for name, values in np.load(views / again.name).items():
        np.testing.assert_array_equal(np.load(again)[name], values)


def test_views_that_other_code_rendered_are_left_alone(views: Path, tmp_path: Path) -> None:
    size_px = TINY.input_size_px
    stored = next(views.glob("views-*"))
    (tmp_path / stored.name).write_bytes(stored.read_bytes())
    assert open_views(tmp_path, size_px)
    (tmp_path / stored.name).rename(tmp_path / f"views-00000000-{size_px}-000000.npz")
    assert not open_views(tmp_path, size_px)


@pytest.mark.parametrize(("only", "name"), [("classes", "semantic_head"), ("appearance", "appearance_head")])
def test_only_the_head_learns(
    only: Literal["classes", "appearance"], name: str, tiny_training: TrainConfig, views: Path
) -> None:
    run = _Run(dataclasses.replace(tiny_training, only=only, views=views))
    before = {name: value.clone() for name, value in run.network.state_dict().items()}
    for batch in run.batches():
        run.advance(batch)
    changed = {
        name for name, value in run.network.state_dict().items() if not torch.equal(value, before[name])
    }
    learnt = {one for one, _ in run.network.named_parameters() if one.startswith(name)}
    assert changed == learnt


def test_appearance_is_learnt_from_views(tiny_training: TrainConfig, views: Path) -> None:
    run = _Run(dataclasses.replace(tiny_training, only="appearance", views=views, steps=24))
    losses = []
    for batch in run.batches():
        run.advance(batch)
        losses.append(run.check_losses()["loss"])
    assert np.mean(losses[-6:]) < np.mean(losses[:6]) - 0.1


def test_classes_are_learnt_from_tracked_masks(tiny_training: TrainConfig) -> None:
    config = dataclasses.replace(tiny_training, only="classes", steps=24)
    run = _Run(config)
    batches = run.batches()
    # One batch again and again: of two tiny clips few objects have a class, and which varies.
    batch = next(batches)
    losses = []
    for _ in range(config.steps):
        run.advance(batch)
        losses.append(run.check_losses()["class"])
    batches.close()
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("only", ["classes", "appearance"])
def test_heads_resume(
    only: Literal["classes", "appearance"], tiny_training: TrainConfig, views: Path
) -> None:
    whole = dataclasses.replace(tiny_training, only=only, views=views, steps=24, save_every=12)
    halved = dataclasses.replace(whole, out=tiny_training.out / "halved")
    run = _Run(whole)
    for batch in run.batches():
        run.advance(batch)
    for _ in range(2):
        resumed = _Run(halved)
        batches = resumed.batches()
        for batch in batches:
            resumed.advance(batch)
            if resumed.step == 12:
                break
        batches.close()
        resumed.save()
    assert resumed.step == run.step == 24
    for name, value in resumed.network.state_dict().items():
        torch.testing.assert_close(value, run.network.state_dict()[name], atol=0, rtol=0, msg=name)


def test_appearance_without_views_is_refused(tiny_training: TrainConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(tiny_training, only="appearance", views=tmp_path)
    with pytest.raises(TrocarError, match="holds no rendered"):
        list(_Run(config).batches())


@pytest.mark.parametrize("only", ["classes", "appearance"])
def test_networks_without_a_head_are_refused(
    only: Literal["classes", "appearance"], tiny_training: TrainConfig
) -> None:
    with pytest.raises(TrocarError, match=f"no head for {only}"):
        _Run(dataclasses.replace(tiny_training, only=only, model="sam2.1-hiera-tiny-512"))


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


def test_clips_shorter_than_an_episode_are_refused() -> None:
    with pytest.raises(TrocarError, match="a stage takes 6"):
        TrainConfig(clip_frames=5)


def test_training_ends_when_its_time_is_over(tiny_training: TrainConfig) -> None:
    config = dataclasses.replace(tiny_training, steps=100_000, minutes=1e-3)
    reports: list[Progress] = []
    weights = train(config, reports.append)
    assert weights.exists()
    assert 0 < reports[-1].step < 1000
    assert reports[-1].seconds_left == 0


def test_first_clips_are_counted_and_time_left_falls(
    tiny_training: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trocar_engines.training.train.LOG_EVERY", 1)
    reports: list[Progress] = []
    clips: list[tuple[int, int]] = []
    train(tiny_training, reports.append, lambda done, of: clips.append((done, of)))
    assert clips == [(1, 2), (2, 2)]
    assert [report.step for report in reports] == [1, 2, 3, 4]
    assert reports[-1].seconds_left == 0 < reports[0].seconds_left


def test_a_stage_of_other_clips_at_the_same_size_is_another_step(tiny_training: TrainConfig) -> None:
    stages = tuple(
        Stage(size_px=64, clips=clips, frames=frames, share=0.5) for clips, frames in ((2, 3), (3, 2))
    )
    run = _Run(dataclasses.replace(tiny_training, stages=stages))
    shapes = []
    for batch in run.batches():
        assert isinstance(batch, Sample)
        run.advance(batch)
        shapes.append(batch.masks.shape[:3])
    assert shapes == [(2, 2, 3)] * 2 + [(3, 2, 2)] * 2
    assert np.isfinite(run.check_losses()["loss"])


@pytest.mark.parametrize(("share", "does_learn"), [(0.0, False), (0.5, True)])
def test_only_divemem_sampling_reads_long_term_memories(
    share: float, does_learn: bool, tiny_training: TrainConfig
) -> None:
    stage = Stage(size_px=64, clips=2, frames=6, share=1.0)
    run = _Run(dataclasses.replace(tiny_training, clip_frames=6, stages=(stage,), diverse_share=share))
    run.advance(next(run.batches()))
    gradient = run.network.long_term_tpos_enc.grad
    assert gradient is not None
    assert bool(gradient.any()) == does_learn
    assert run.network.maskmem_tpos_enc.grad is not None
    assert run.network.maskmem_tpos_enc.grad.any()


def test_a_share_beyond_one_and_a_weight_below_zero_are_refused(tiny_training: TrainConfig) -> None:
    with pytest.raises(TrocarError, match="0 to 1"):
        dataclasses.replace(tiny_training, diverse_share=2.0)
    with pytest.raises(TrocarError, match="at least 0"):
        dataclasses.replace(tiny_training, weights=LossWeights(tsl=-1.0))


def test_a_checkpoint_of_an_earlier_version_is_refused(tiny_training: TrainConfig) -> None:
    run = _Run(tiny_training)
    run.save()
    saved = torch.load(run.checkpoint_path, weights_only=True)
    del saved["spent_s"]
    torch.save(saved, run.checkpoint_path)
    with pytest.raises(TrocarError, match="of an earlier version"):
        _Run(tiny_training)


def _some_samples(count: int, closed: list[bool], error: Exception | None = None) -> Generator[Sample]:
    flag = torch.ones(1, 1, dtype=torch.bool)
    try:
        for index in range(count):
            pixels = torch.full((1,), index, dtype=torch.uint8)
            yield Sample(pixels=pixels, masks=flag, classes=flag.long(), is_shown=flag)
        if error is not None:
            raise error
    finally:
        closed.append(True)


def test_samples_drawn_ahead_come_in_order_and_all_of_them() -> None:
    closed: list[bool] = []
    drawn = [int(sample.pixels) for sample in _drawn_ahead(_some_samples(7, closed))]
    assert drawn == list(range(7))
    assert closed


def test_what_goes_wrong_while_samples_are_drawn_ahead_stops_the_training() -> None:
    samples = _drawn_ahead(_some_samples(2, [], TrocarError("no clip")))
    assert [int(next(samples).pixels) for _ in range(2)] == [0, 1]
    with pytest.raises(TrocarError, match="no clip"):
        next(samples)


def test_drawing_ahead_ends_with_the_training() -> None:
    closed: list[bool] = []
    samples = _drawn_ahead(_some_samples(1000, closed))
    next(samples)
    samples.close()  # the thread waits with a sample that nobody takes
    assert closed
    assert not [thread for thread in threading.enumerate() if thread.name == "samples"]


def test_every_row_learns_from_each_kind_of_prompt(tiny_training: TrainConfig) -> None:
    stages = (Stage(size_px=64, clips=8, frames=5, share=1.0),)
    run = _Run(dataclasses.replace(tiny_training, worlds=0.0, clip_frames=5, stages=stages))
    for _, batch in zip(range(2), run.batches(), strict=False):  # after the first no layer is zero any more
        assert isinstance(batch, Sample)
        run.advance(batch)
    losses = run.check_losses()
    assert {"loss", "prompt", "track", "readout", "class"} <= losses.keys()
    assert all(np.isfinite(loss) for loss in losses.values())
    untouched = {
        name
        for name, value in run.network.named_parameters()
        if value.requires_grad and (value.grad is None or not value.grad.any())
    }
    assert {name for name in untouched if not name.startswith("appearance_head")} == set()
