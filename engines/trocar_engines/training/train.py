"""The training loop: stages of growing resolution, resumable, the same by seed."""

import ctypes
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import cv2
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
from trocar_engines.training.episode import run_episode
from trocar_engines.training.losses import LossWeights
from trocar_engines.training.sampling import ClipSamples, Mix, Sample, collate
from trocar_engines.training.store import StoredClip, load_davis, open_store
from trocar_engines.training.windows import Windows, WindowSamples, collate_windows, open_windows

EMA_DECAY = 0.998
GRADIENT_LIMIT = 1.0
WINDOWS_A_STEP = 128
GROUNDS_A_STEP = 12
LABEL_SMOOTHING = 0.02
"""Of classes: some windows show nothing that tells them."""
LOG_EVERY = 20
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Options of glibc's mallopt(3)."""


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


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run.

    Args:
        model: name of the network.
        out: folder for checkpoints, log and weights.
        clips: folder of rendered clips, see `store.render_store`.
        real: folders in DAVIS layout that join the mix.
        steps: optimiser steps in all.
        learning_rate: peak, after warm-up; then half a cosine.
        weight_decay: of matrices and filters; biases and norms have none.
        objects: objects a clip.
        stages: in order.
        mix: shares of the sources.
        weights: of the loss terms.
        seed: of weights, samples, prompts.
        device: "cpu" or "cuda".
        save_every: steps between checkpoints.
        start_from: weights to begin with instead of random ones.
        only: "classes" or "appearance": only that head learns, from `windows` instead of clips; the rest of
            the network stays as it is, normalisation included.
        windows: folder of what that head sees, rendered by `windows.fill_store`.
    """

    model: str = "sam2s-nano"
    out: Path = Path("runs/nano")
    clips: Path = Path("runs/clips")
    real: tuple[Path, ...] = ()
    steps: int = 6000
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    objects: int = 2
    stages: tuple[Stage, ...] = (
        Stage(size_px=192, clips=6, frames=4, share=0.55),
        Stage(size_px=256, clips=4, frames=5, share=0.45),
    )
    mix: Mix = field(default_factory=Mix)
    weights: LossWeights = field(default_factory=LossWeights)
    seed: int = 0
    save_every: int = 200
    device: str = "cpu"
    start_from: Path | None = None
    only: Literal["", "classes", "appearance"] = ""
    windows: Path = Path("runs/windows")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a caller may show after a step."""

    step: int
    steps: int
    losses: dict[str, float]
    seconds_per_step: float


class NaNLossError(TrocarError):
    """The loss is not a number; names the batch's seed."""


def train(config: TrainConfig, on_step: Callable[[Progress], None]) -> Path:
    """Train or resume; returns the path of the averaged weights.

    Raises:
        TrocarError: no clips; no parameter to learn; NaN loss.
    """
    _keep_freed_memory()
    run = _Run(config)
    started = time.perf_counter()
    begun_at = run.step
    for batch in run.batches():
        losses = run.advance(batch)
        if run.step % LOG_EVERY == 0:
            seconds = (time.perf_counter() - started) / (run.step - begun_at)
            run.log(losses, seconds)
            on_step(Progress(step=run.step, steps=config.steps, losses=losses, seconds_per_step=seconds))
        if run.step % config.save_every == 0 or run.step == config.steps:
            run.save()
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


class _Run:
    """State of a training: network, average, optimiser, step."""

    def __init__(self, config: TrainConfig) -> None:
        config.out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(config.seed)
        self.config = config
        self.step = 0
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
        return torch.optim.AdamW(groups, lr=self.config.learning_rate, betas=(0.9, 0.98))

    def _resume(self) -> None:
        saved: dict[str, Any] = torch.load(
            self.checkpoint_path, weights_only=True, map_location=self.config.device
        )
        self.step = saved["step"]
        self.network = self._build(saved["size_px"])
        self.network.load_state_dict(saved["network"])
        self.average = saved["average"]
        self.optimiser = self._optimiser()
        self.optimiser.load_state_dict(saved["optimiser"])

    def save(self) -> None:
        saved = {
            "step": self.step,
            "size_px": self.size_px,
            "network": self.network.state_dict(),
            "average": self.average,
            "optimiser": self.optimiser.state_dict(),
        }
        partial = self.checkpoint_path.with_suffix(".part")
        torch.save(saved, partial)
        partial.replace(self.checkpoint_path)
        save_weights(self.weights_path, self.average, self.config.model)

    def batches(self) -> Iterator[Sample | Windows | Views]:
        """What is left of every stage; moves the network to the stage's resolution."""
        if self.config.only:
            yield from self._window_loader() if self.config.only == "classes" else self._view_loader()
            return
        ends = np.cumsum([stage.share for stage in self.config.stages])
        ends = np.round(ends / ends[-1] * self.config.steps).astype(int)
        begin = 0
        for stage, end in zip(self.config.stages, ends, strict=True):
            if self.step < end:
                self._enter(stage.size_px)
                yield from self._loader(stage, self.step - begin, int(end) - begin)
            begin = int(end)

    def _enter(self, size_px: int) -> None:
        if size_px == self.size_px:
            return
        state, optimiser = self.network.state_dict(), self.optimiser.state_dict()
        self.network = self._build(size_px)
        self.network.load_state_dict(state)
        self.optimiser = self._optimiser()
        self.optimiser.load_state_dict(optimiser)

    def _loader(self, stage: Stage, done: int, steps: int) -> DataLoader[Sample]:
        synthetic = open_store(self.config.clips, network_config(self.config.model).input_size_px)
        if not synthetic:
            raise TrocarError(
                f"{self.config.clips}: holds no rendered clip; run `trocar train --render` first"
            )
        samples = ClipSamples(
            synthetic,
            self._real_clips(),
            frames=stage.frames,
            objects=self.config.objects,
            size_px=stage.size_px,
            mix=self.config.mix,
            count=steps * stage.clips,
            seed=self.config.seed + stage.size_px,
        )
        left = Subset(samples, range(done * stage.clips, steps * stage.clips))
        return DataLoader(
            left,
            batch_size=stage.clips,
            num_workers=1,
            prefetch_factor=4,
            collate_fn=collate,
            # One thread: two of OpenCV's own beside the training's would fight over the cores.
            worker_init_fn=lambda _: cv2.setNumThreads(0),
        )

    def _window_loader(self) -> DataLoader[Windows]:
        config = self.config
        windows = open_windows(config.windows, network_config(config.model).input_size_px)
        if windows is None:
            raise TrocarError(f"{config.windows}: holds no rendered window")
        samples = WindowSamples(windows=windows, count=config.steps * WINDOWS_A_STEP, seed=config.seed)
        left = Subset(samples, range(self.step * WINDOWS_A_STEP, len(samples)))
        return DataLoader(left, batch_size=WINDOWS_A_STEP, collate_fn=collate_windows)

    def _view_loader(self) -> DataLoader[Views]:
        config, size_px = self.config, network_config(self.config.model).input_size_px
        grounds = open_views(config.windows, size_px)
        if not grounds:
            raise TrocarError(f"{config.windows}: holds no rendered view")
        samples = ViewSamples(
            grounds=grounds,
            clips=open_store(config.clips, size_px) + self._real_clips(),
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
        progress = self.step / self.config.steps
        warm = min(1.0, progress / 0.02 + 1e-3)
        return self.config.learning_rate * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))

    def advance(self, batch: Sample | Windows | Views) -> dict[str, float]:
        """One optimiser step; the parts of its loss."""
        match batch:
            case Windows():
                loss, parts = self._judge(batch)
            case Views():
                loss, parts = self._compare(batch)
            case Sample():
                loss, parts = self._track(batch)
        if not torch.isfinite(loss):
            raise NaNLossError(
                f"step {self.step}, seed {self.config.seed}: loss is {float(loss.detach())}; not saved"
            )
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), GRADIENT_LIMIT)
        for group in self.optimiser.param_groups:
            group["lr"] = self._rate()
        self.optimiser.step()
        self.step += 1
        self._update_average()
        return {"loss": float(loss.detach()), **parts}

    def _track(self, batch: Sample) -> tuple[torch.Tensor, dict[str, float]]:
        device = self.config.device
        batch = Sample(
            pixels=batch.pixels.to(device), masks=batch.masks.to(device), classes=batch.classes.to(device)
        )
        rng = np.random.default_rng([self.config.seed, 1, self.step])
        return run_episode(self.network, batch, rng, self.config.weights)

    def _judge(self, batch: Windows) -> tuple[torch.Tensor, dict[str, float]]:
        seen, shape, classes = (values.to(self.config.device) for values in batch)
        torch.manual_seed(self.config.seed + self.step)  # of what is dropped: the same after a resumption
        token = self.network.without_class_memory(len(classes))
        logits = self.network.semantic_head.judge(token, seen, shape)
        loss = torch.nn.functional.cross_entropy(logits, classes, label_smoothing=LABEL_SMOOTHING)
        is_right = logits.detach().argmax(1) == classes
        return loss, {"right": float(is_right.float().mean())}

    def _compare(self, batch: Views) -> tuple[torch.Tensor, dict[str, float]]:
        views = Views(*(values.to(self.config.device) for values in batch))
        torch.manual_seed(self.config.seed + self.step)
        return appearance_loss(self.network.appearance_head.describe(views.seen), views), {}

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        for name, value in self.network.state_dict().items():
            if value.is_floating_point():
                self.average[name].lerp_(value, 1 - decay)
            else:
                self.average[name].copy_(value)

    def log(self, losses: dict[str, float], seconds_per_step: float) -> None:
        line = {"step": self.step, "size_px": self.size_px, "s_per_step": round(seconds_per_step, 3)}
        with (self.config.out / "log.jsonl").open("a") as file:
            file.write(
                json.dumps({**line, **{name: round(value, 4) for name, value in losses.items()}}) + "\n"
            )
