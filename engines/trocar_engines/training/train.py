"""The training loop: stages of growing resolution, resumable, the same by seed."""

import contextlib
import ctypes
import dataclasses
import json
import math
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

from trocar_engines.errors import TrocarError
from trocar_engines.network.config import NetworkConfig, network_config
from trocar_engines.network.sam2s import SAM2S
from trocar_engines.network.weights import load_weights, save_weights
from trocar_engines.training.appearance import (
    Views,
    ViewSamples,
    appearance_loss,
    collate_views,
    open_views,
)
from trocar_engines.training.episode import Episodes
from trocar_engines.training.losses import LossWeights
from trocar_engines.training.pool import (
    ClipPool,
    LabelledFrames,
    RenderedClips,
    cut_stretches,
    render_clips,
)
from trocar_engines.training.sampling import ClipSampler, Mix, Sample
from trocar_engines.training.store import StoredClip, load_davis

EMA_DECAY = 0.998
GRADIENT_LIMIT = 1.0
GROUNDS_A_STEP = 12
LOG_EVERY = 20
PLAIN_STEPS = 3
"""Steps before a GPU's are captured: libraries choose kernels, the optimiser takes its memory."""
APPEARANCE_CLIPS, APPEARANCE_FRAMES = 600, 8
"""Rendered clips of which the appearance head sees views."""
CLIPS_A_SEED = 10_000_000
"""Rendered clips of one training's seed never are another's."""
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Options of glibc's mallopt(3)."""

Losses = dict[str, torch.Tensor]
"""Parts of a step's loss by name, scalars."""
Judged = tuple[torch.Tensor, Losses]
"""The loss itself, and its parts."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the training at one resolution.

    Args:
        size_px: side of the pictures; the network's own size should be the last.
        clips: clips a step.
        frames: frames of each.
        share: part of all steps.
    """

    size_px: int
    clips: int
    frames: int
    share: float


STAGES = (
    Stage(size_px=192, clips=6, frames=5, share=0.55),
    Stage(size_px=256, clips=4, frames=6, share=0.45),
)
GPU_STAGES = (Stage(size_px=256, clips=64, frames=10, share=1.0),)
"""Takes some 50 GB with three objects a clip."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run.

    Args:
        model: name of the network.
        out: folder for checkpoints, log and weights.
        real: folders in DAVIS layout that join the mix.
        clip_frames: length of rendered clips and of the stretches of real ones.
        worlds: share of rendered clips that show worlds beyond surgery.
        pool_clips: rendered clips at hand at a time.
        first_clips: rendered before the first step.
        fresh_clips: rendered for each step, in the place of the oldest.
        workers: processes that render; 0 renders between steps.
        steps: optimiser steps in all.
        minutes: time for all of them, 0 for as long as it takes. When it is over the training ends, its rate
            as low as after the last step: for a machine that is lent. Not the same by seed.
        learning_rate: peak, after warm-up; then half a cosine.
        weight_decay: of matrices and filters; biases and norms have none.
        objects: objects a clip.
        stages: in order.
        mix: shares of the sources.
        weights: of the loss terms.
        diverse_share: 0 to 1, of a step's clips that read long-term memories too, see `Episodes`.
        seed: of weights, samples, prompts.
        device: "cpu" or "cuda".
        save_every: steps between checkpoints.
        start_from: weights to begin with instead of random ones.
        only: "classes" or "appearance": only that head learns, and the rest of the network stays as it is,
            normalisation included. Classes are learnt from what the network tracks in clips, looks from
            `views`.
        views: folder of what the appearance head sees, rendered by `appearance.fill_store`.
    """

    model: str = "sam2s-nano"
    out: Path = Path("runs/nano")
    real: tuple[Path, ...] = ()
    clip_frames: int = 16
    worlds: float = 0.4
    pool_clips: int = 600
    first_clips: int = 200
    fresh_clips: int = 2
    workers: int = 1
    steps: int = 6000
    minutes: float = 0.0
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    objects: int = 2
    stages: tuple[Stage, ...] = STAGES
    mix: Mix = field(default_factory=Mix)
    weights: LossWeights = field(default_factory=LossWeights)
    diverse_share: float = 0.5
    seed: int = 0
    save_every: int = 200
    device: str = "cpu"
    start_from: Path | None = None
    only: Literal["", "classes", "appearance"] = ""
    views: Path = Path("runs/views")

    def __post_init__(self) -> None:
        longest = max(stage.frames for stage in self.stages)
        if longest > self.clip_frames:
            raise TrocarError(
                f"clips of {self.clip_frames} frames: a stage takes {longest}, render longer ones"
            )
        if not 0 <= self.diverse_share <= 1:
            raise TrocarError(f"{self.diverse_share} of the clips sampled as DiveMem: a share is 0 to 1")
        if self.weights.tsl < 0:
            raise TrocarError(f"a weight of {self.weights.tsl} for classes: at least 0 is needed")
        if self.first_clips < 1 or self.pool_clips < 1:
            raise TrocarError(
                f"{self.first_clips} of {self.pool_clips} clips at the start: at least one is needed"
            )


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a caller may show after a step; `steps` and `seconds_left` to the end, whichever comes first."""

    step: int
    steps: int
    losses: dict[str, float]
    seconds_left: float


class NaNLossError(TrocarError):
    """The loss is not a number; names the batch's seed."""


def train(
    config: TrainConfig,
    on_step: Callable[[Progress], None],
    on_clip: Callable[[int, int], None] = lambda _done, _of: None,
) -> Path:
    """Train or resume; returns the path of the averaged weights.

    Args:
        config: what to train.
        on_step: called after some steps.
        on_clip: called with the clips rendered so far, and how many come before the next step.

    Raises:
        TrocarError: no views; no parameter to learn; NaN loss; a checkpoint of an earlier version.
    """
    _keep_freed_memory()
    torch.set_float32_matmul_precision("high")
    run = _Run(config, on_clip)
    started = time.perf_counter()
    begun_at = run.step
    batches = run.batches()
    for batch in batches:
        run.advance(batch)
        is_last = run.progress >= 1
        if run.step % LOG_EVERY == 0 or is_last:
            losses = run.check_losses()
            seconds = (time.perf_counter() - started) / (run.step - begun_at)
            run.log(losses, seconds)
            left = (config.steps - run.step) * seconds
            if config.minutes:
                left = min(left, max(0.0, 60 * config.minutes - run.spent_s))
            on_step(Progress(step=run.step, steps=config.steps, losses=losses, seconds_left=left))
        if run.step % config.save_every == 0 or is_last:
            run.save()
        if is_last:
            break
    batches.close()
    return run.weights_path


def _keep_freed_memory() -> None:
    """Tell glibc to keep what is freed.

    A step frees and takes gigabytes in blocks of 50 MB; touching fresh pages took a fifth of its time (2.7
    against 2.2 s).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return
    for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 256 << 20)):
        mallopt(option, value)


def _drawn_ahead(samples: Generator[Sample]) -> Generator[Sample]:
    """Samples drawn one ahead of their steps, on a thread of their own."""
    ready: queue.Queue[Sample | BaseException | None] = queue.Queue(maxsize=1)
    is_over = threading.Event()

    def draw() -> None:
        try:
            for sample in samples:
                ready.put(sample)
                if is_over.is_set():
                    return
            ready.put(None)
        except BaseException as error:  # what went wrong here stops the training there
            ready.put(error)
        finally:
            samples.close()  # and its processes

    thread = threading.Thread(target=draw, name="samples", daemon=True)
    thread.start()
    try:
        while (drawn := ready.get()) is not None:
            if isinstance(drawn, BaseException):
                raise drawn
            for tensor in drawn.tensors:
                if tensor.is_cuda:
                    tensor.record_stream(torch.cuda.current_stream())
            yield drawn
    finally:
        is_over.set()
        while thread.is_alive():  # it may wait with a sample that nobody will take
            while not ready.empty():
                ready.get()
            thread.join(0.1)


def _on_own_stream(samples: Generator[Sample]) -> Generator[Sample]:
    """Samples made on a CUDA stream of the thread that asks for them, whole when they are handed over."""
    stream = torch.cuda.Stream()
    with contextlib.closing(samples), torch.cuda.stream(stream):
        for sample in samples:
            stream.synchronize()
            yield sample


class _TrackStep:
    """One step on clips of one shape; on a GPU plain at first, then the replay of a captured one.

    Args:
        episodes: of that shape.
        learn: changes the weights by a loss; returns it and its parts.
    """

    def __init__(self, episodes: Episodes, learn: Callable[[Judged], Losses]) -> None:
        self._episodes, self._learn = episodes, learn
        self._plain_steps = 0
        self._static: Sample | None = None
        self._replay: Callable[[], Losses] | None = None
        self._side = torch.cuda.Stream() if episodes.device.type == "cuda" else None

    def __call__(self, batch: Sample) -> Losses:
        """Learn from a batch."""
        if self._side is None:
            return self._learn(self._episodes.run(batch))
        if self._replay is not None and self._static is not None:
            for static, new in zip(self._static.tensors, batch.tensors, strict=True):
                static.copy_(new)
            return self._replay()
        self._side.wait_stream(torch.cuda.current_stream())
        if self._plain_steps == PLAIN_STEPS:
            self._replay = self._capture(batch, self._side)
            torch.cuda.current_stream().wait_stream(self._side)
            return self._replay()
        self._plain_steps += 1
        with torch.cuda.stream(self._side):
            parts = self._learn(self._episodes.run(batch))
        torch.cuda.current_stream().wait_stream(self._side)
        return parts

    def _capture(self, batch: Sample, side: torch.cuda.Stream) -> Callable[[], Losses]:
        """A step on the batch's copy, so that the host launches one graph instead of every kernel."""
        self._static = static = batch.cloned()
        side.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        # Samples are drawn on another thread meanwhile.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            parts = self._learn(self._episodes.run(static))

        def replay() -> Losses:
            graph.replay()
            return parts

        return replay


class _Run:
    """State of a training: network, average, optimiser, step."""

    def __init__(
        self, config: TrainConfig, on_clip: Callable[[int, int], None] = lambda _done, _of: None
    ) -> None:
        config.out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(config.seed)
        self.config, self._on_clip = config, on_clip
        self.step = 0
        self._earlier_s, self._began_s = 0.0, time.perf_counter()
        self._parts: list[Losses] = []
        self._track_step: tuple[torch.Size, _TrackStep] | None = None
        self.size_px = 0
        self.network = self._build(config.stages[0].size_px)
        self.average: dict[str, torch.Tensor] = {
            name: value.clone() for name, value in self.network.state_dict().items()
        }
        if config.start_from is not None:
            load_weights(self.network, config.start_from)
            self.average = {name: value.clone() for name, value in self.network.state_dict().items()}
        self.optimiser = self._optimiser()
        if self.checkpoint_path.exists():
            self._resume()

    @property
    def checkpoint_path(self) -> Path:
        return self.config.out / "checkpoint.pt"

    @property
    def weights_path(self) -> Path:
        return self.config.out / "weights.safetensors"

    def _build(self, size_px: int) -> SAM2S:
        shape: NetworkConfig = dataclasses.replace(network_config(self.config.model), input_size_px=size_px)
        self.size_px = size_px
        network = SAM2S(shape).to(self.config.device).train()
        network.image_encoder.to(memory_format=torch.channels_last)
        if self.config.only:
            if not shape.classes:
                raise TrocarError(f"{self.config.model} has no head for {self.config.only}")
            network.eval().requires_grad_(False)
            is_classes = self.config.only == "classes"
            head = network.semantic_head if is_classes else network.appearance_head
            head.train().requires_grad_(True)
        return network

    def _optimiser(self) -> torch.optim.Optimizer:
        matrices = [value for value in self.network.parameters() if value.ndim > 1]
        vectors = [value for value in self.network.parameters() if value.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": self.config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self._track_step = None  # it knows another network, or another optimiser
        # A captured step reads its rate from the device.
        return torch.optim.AdamW(
            groups,
            lr=torch.tensor(self.config.learning_rate, device=self.config.device),
            betas=(0.9, 0.98),
            fused=True,
            capturable=torch.device(self.config.device).type == "cuda",
        )

    def _resume(self) -> None:
        saved: dict[str, Any] = torch.load(
            self.checkpoint_path, weights_only=True, map_location=self.config.device
        )
        if "spent_s" not in saved:
            raise TrocarError(f"{self.checkpoint_path}: of an earlier version; train into another --out")
        self.step, self._earlier_s = saved["step"], saved["spent_s"]
        self.network = self._build(saved["size_px"])
        self.network.load_state_dict(saved["network"])
        self.average = saved["average"]
        self.optimiser = self._optimiser()
        self.optimiser.load_state_dict(saved["optimiser"])

    @property
    def spent_s(self) -> float:
        """Time of the training, that before a resumption included."""
        return self._earlier_s + time.perf_counter() - self._began_s

    @property
    def progress(self) -> float:
        """Share of the training that is done, by steps or by time, whichever is more."""
        by_steps = self.step / self.config.steps
        if not self.config.minutes:
            return by_steps
        return max(by_steps, self.spent_s / 60 / self.config.minutes)

    def save(self) -> None:
        """Write checkpoint and averaged weights.

        Raises:
            NaNLossError: of a step since the last check; nothing is written.
        """
        self.check_losses()
        saved = {
            "step": self.step,
            "spent_s": self.spent_s,
            "size_px": self.size_px,
            "network": self.network.state_dict(),
            "average": self.average,
            "optimiser": self.optimiser.state_dict(),
        }
        partial = self.checkpoint_path.with_suffix(".part")
        torch.save(saved, partial)
        partial.replace(self.checkpoint_path)
        save_weights(self.weights_path, self.average, self.config.model)

    def batches(self) -> Generator[Sample | Views]:
        """What is left of every stage; moves the network to the stage's resolution."""
        if self.config.only == "appearance":
            yield from self._view_loader()
            return
        ends = np.cumsum([stage.share for stage in self.config.stages])
        ends = np.round(ends / ends[-1] * self.config.steps).astype(int)
        for stage, end in zip(self.config.stages, ends, strict=True):
            if self.step < end:
                self._enter(stage.size_px)
                samples = self._samples(stage, self.step, int(end))
                is_cuda = torch.device(self.config.device).type == "cuda"
                yield from _drawn_ahead(_on_own_stream(samples)) if is_cuda else samples

    def _enter(self, size_px: int) -> None:
        if size_px == self.size_px:
            return
        state, optimiser = self.network.state_dict(), self.optimiser.state_dict()
        self.network = self._build(size_px)
        self.network.load_state_dict(state)
        self.optimiser = self._optimiser()
        self.optimiser.load_state_dict(optimiser)

    def _samples(self, stage: Stage, begin: int, end: int) -> Generator[Sample]:
        """The samples of a stage's steps from `begin` to before `end`; clips are rendered meanwhile."""
        config, size_px = self.config, network_config(self.config.model).input_size_px
        pool = ClipPool(
            [stretch for clip in self._real_clips() for stretch in cut_stretches(clip, config.clip_frames)],
            slots=config.pool_clips,
            frames=config.clip_frames,
            size_px=size_px,
            device=config.device,
        )
        added = config.first_clips + begin * config.fresh_clips
        # After a resumption those that the pool held, where it held them.
        pool.added = max(0, added - config.pool_clips)
        count = added - pool.added + (end - begin) * config.fresh_clips
        rendered = self._render(config.clip_frames, pool.added, count)
        first = added - pool.added
        for done in range(1, first + 1):
            pool.add(next(rendered))
            self._on_clip(done, first)
        sampler = ClipSampler(
            pool,
            clips=stage.clips,
            frames=stage.frames,
            objects=config.objects,
            size_px=stage.size_px,
            mix=config.mix,
            seed=config.seed,
        )
        for step in range(begin, end):
            for _ in range(config.fresh_clips):
                pool.add(next(rendered))
            yield sampler.draw(step)

    def _render(self, frames: int, begin: int, count: int) -> Iterator[LabelledFrames]:
        config = self.config
        clips = RenderedClips(
            size_px=network_config(config.model).input_size_px,
            frames=frames,
            # Worlds know no classes.
            worlds=0.0 if config.only == "classes" else config.worlds,
            begin=config.seed * CLIPS_A_SEED + begin,
            count=count,
        )
        return render_clips(clips, config.workers)

    def _view_loader(self) -> DataLoader[Views]:
        config, size_px = self.config, network_config(self.config.model).input_size_px
        grounds = open_views(config.views, size_px)
        if not grounds:
            raise TrocarError(f"{config.views}: holds no rendered view")
        samples = ViewSamples(
            grounds=grounds,
            clips=self._real_clips()
            + [
                StoredClip(
                    clip.pixels.numpy(), tuple(clip.classes[1 : clip.objects + 1].tolist()), is_dense=False
                )
                for clip in self._render(APPEARANCE_FRAMES, 0, APPEARANCE_CLIPS)
            ],
            count=config.steps * GROUNDS_A_STEP,
            seed=config.seed,
        )
        left = Subset(samples, range(self.step * GROUNDS_A_STEP, len(samples)))
        return DataLoader(left, batch_size=GROUNDS_A_STEP, collate_fn=collate_views)

    def _real_clips(self) -> list[StoredClip]:
        size_px = network_config(self.config.model).input_size_px
        return [clip for folder in self.config.real for clip in load_davis(folder, size_px)]

    def _rate(self) -> float:
        """Warm-up over 2% of the steps, then half a cosine to 1%."""
        progress = min(1.0, self.progress)
        warm = min(1.0, progress / 0.02 + 1e-3)
        return self.config.learning_rate * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))

    def advance(self, batch: Sample | Views) -> None:
        """One optimiser step; what its loss was, `check_losses` tells."""
        torch.manual_seed(self.config.seed * CLIPS_A_SEED + self.step)  # the same after a resumption
        for group in self.optimiser.param_groups:
            group["lr"].fill_(self._rate())
        match batch:
            case Views():
                parts = self._learn(self._compare(batch))
            case Sample():
                parts = self._track(batch)
        self._parts.append({name: value.clone() for name, value in parts.items()})
        self.step += 1
        self._update_average()

    def _learn(self, judged: Judged) -> Losses:
        """Change the weights by a loss; it and its parts."""
        loss, parts = judged
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), GRADIENT_LIMIT)
        self.optimiser.step()
        return {"loss": loss.detach(), **parts}

    def check_losses(self) -> dict[str, float]:
        """Mean losses of the steps since the last check.

        Raises:
            NaNLossError: one is not a number.
        """
        if not self._parts:
            return {}
        names = list(self._parts[0])
        table = torch.stack(
            [torch.stack([parts[name].float() for name in names]) for parts in self._parts]
        ).cpu()
        is_bad = ~table[:, names.index("loss")].isfinite()
        if is_bad.any():
            bad = int(is_bad.int().argmax())
            step = self.step - len(table) + bad
            loss = float(table[bad, names.index("loss")])
            raise NaNLossError(f"step {step}, seed {self.config.seed}: loss is {loss}; not saved")
        self._parts = []
        return dict(zip(names, table.mean(dim=0).tolist(), strict=True))

    def _track(self, batch: Sample) -> Losses:
        """One step on clips."""
        shape = batch.masks.shape
        if self._track_step is None or self._track_step[0] != shape:
            clips, objects, frames = shape[:3]
            episodes = Episodes(
                self.network,
                self.config.weights,
                clips=clips,
                objects=objects,
                frames=frames,
                diverse_share=self.config.diverse_share,
            )
            self._track_step = shape, _TrackStep(episodes, self._learn)
        return self._track_step[1](batch)

    def _compare(self, batch: Views) -> Judged:
        views = Views(*(values.to(self.config.device) for values in batch))
        return appearance_loss(self.network.appearance_head.describe(views.seen), views), {}

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        state = self.network.state_dict()
        floats = [name for name, value in state.items() if value.is_floating_point()]
        torch._foreach_lerp_(
            [self.average[name] for name in floats], [state[name] for name in floats], 1 - decay
        )
        for name in state.keys() - set(floats):
            self.average[name].copy_(state[name])

    def log(self, losses: dict[str, float], seconds_per_step: float) -> None:
        line = {"step": self.step, "size_px": self.size_px, "s_per_step": round(seconds_per_step, 3)}
        with (self.config.out / "log.jsonl").open("a") as file:
            file.write(
                json.dumps({**line, **{name: round(value, 4) for name, value in losses.items()}}) + "\n"
            )
