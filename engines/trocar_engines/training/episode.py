"""One training episode: a prompt on the first frame, then tracking with the network's own memory."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from trocar_engines.network.sam2s import (
    SAM2S,
    AllMasks,
    ImageFeatures,
    MemoryView,
    PromptTensors,
    select_mask,
    upsample,
)
from trocar_engines.training.clicks import training_boxes, training_clicks
from trocar_engines.training.losses import LossWeights, class_loss, mask_loss, readout_loss
from trocar_engines.training.sampling import Sample
from trocar_engines.training.store import NO_CLASS

CONDITIONING_TIME = 6
LONG_TERM_TIME = 7
MOST_RECENT_SLOTS = 3
LONG_TERM_FRAMES = 2
"""DiveMem sampling (SAM2S): after the conditioning frame come two that stand for long-term memories."""
MOST_CLICKS = 5


@dataclass(kw_only=True)
class _Memory:
    """What the objects of an episode remember; lists in order of time, the conditioning frame first."""

    spatial: list[Tensor] = field(default_factory=list)
    prototypes: list[Tensor] = field(default_factory=list)
    pointers: list[Tensor] = field(default_factory=list)


def run_episode(
    network: SAM2S, sample: Sample, rng: np.random.Generator, weights: LossWeights
) -> tuple[Tensor, dict[str, float]]:
    """Loss of one batch of clips, and its parts for the log.

    Args:
        network: in training mode.
        sample: a batch from `collate`, on the network's device.
        rng: draws prompts and the sampling of memories.
        weights: of the loss terms.
    """
    clips, objects, frames = sample.masks.shape[:3]
    rows = clips * objects
    with _half_precision(sample.pixels):
        features = network.encode_image(sample.pixels.flatten(0, 1))
    owner = torch.arange(clips, device=sample.pixels.device).repeat_interleave(objects)
    masks = sample.masks.flatten(0, 1).float()
    is_diverse = rng.random() < 0.5 and frames > LONG_TERM_FRAMES + 1
    memory = _Memory()
    parts: dict[str, list[Tensor]] = {"prompt": [], "track": [], "readout": [], "class": []}
    for t in range(frames):
        now = ImageFeatures(*(maps.unflatten(0, (clips, frames))[owner, t] for maps in features))
        truth = masks[:, t]
        with _half_precision(sample.pixels):
            if t == 0:
                every, loss, mask_logits = _prompt(network, now, truth, rng, weights)
                parts["prompt"].append(loss)
                token = network.without_class_memory(rows)
            else:
                every, token = _track(network, now, memory, is_diverse=is_diverse, t=t)
                mask_logits = select_mask(every, torch.ones(rows, dtype=torch.bool, device=truth.device))[0]
                parts["track"].append(mask_loss(every, truth, weights, is_single_used=True))
                if network.config.readout_dim:
                    parts["readout"].append(_read_truth(network, features, masks, owner, clips, t))
                _click_again(network, now, truth, rng, weights, parts["prompt"])
            if network.config.classes:
                logits = network.classify(token, sample.pixels[owner, t], mask_logits.detach().float())
                shown = torch.where(truth.flatten(1).any(dim=1), sample.classes.flatten(), NO_CLASS)
                parts["class"].append(class_loss(logits, shown))
            _remember(network, now, memory, every, mask_logits, truth, is_prompted=t == 0)
    means = {name: torch.stack(losses).mean() for name, losses in parts.items() if losses}
    total = means["prompt"] * 1.0
    if frames > 1:
        total = total + means["track"]
        total = (
            total
            + weights.tsl * means.get("class", total * 0)
            + weights.readout * means.get("readout", total * 0)
        )
    return total, {name: float(value.detach()) for name, value in means.items()}


def _half_precision(pixels: Tensor) -> torch.autocast:
    """bfloat16 on a GPU. On a CPU casting costs more than the products gain: 3.0 against 2.7 s a step."""
    return torch.autocast(pixels.device.type, dtype=torch.bfloat16, enabled=pixels.is_cuda)


def _decode(
    network: SAM2S,
    features: ImageFeatures,
    points: Tensor,
    labels: Tensor,
    mask_prompt: Tensor | None = None,
    *,
    is_raw: bool = False,
) -> AllMasks:
    rows, size = features.embedding.shape[0], network.config.mask_size
    mask = features.embedding.new_zeros(rows, 1, size, size) if mask_prompt is None else mask_prompt
    has_mask = torch.full((rows,), mask_prompt is not None, device=mask.device)
    prompt = PromptTensors(points, labels, mask, has_mask)
    with torch.autocast(mask.device.type, enabled=False):
        readout = network.read_points(features, prompt)
    conditioned = features.embedding if is_raw else network.without_memory(features.embedding)
    return network.decode_all(conditioned, features.stride_4, features.stride_8, readout, prompt)


def _prompt(
    network: SAM2S, now: ImageFeatures, truth: Tensor, rng: np.random.Generator, weights: LossWeights
) -> tuple[AllMasks, Tensor, Tensor]:
    """Decode the first frame from a drawn kind of prompt: candidates, loss, and the mask to remember."""
    rows = truth.shape[0]
    kind = rng.choice(["clicks", "box", "mask"], p=[0.6, 0.2, 0.2])
    if kind == "mask":
        # A mask prompt is the output; its pointer comes from the decoder, which reads the mask and the
        # picture as it is.
        logits = truth_logits(network, truth)
        prompt = torch.nn.functional.conv2d(
            truth.unsqueeze(1), network.mask_downsample.weight, network.mask_downsample.bias, stride=4
        )
        points = truth.new_zeros(rows, 1, 2)
        labels = torch.full((rows, 1), -1, device=truth.device)
        every = _decode(network, now, points, labels, prompt, is_raw=True)
        return every, mask_loss(every, truth, weights, is_single_used=True), logits
    if kind == "box":
        points, labels = training_boxes(rng, truth > 0.5)
        every = _decode(network, now, points, labels)
        return every, mask_loss(every, truth, weights, is_single_used=True), _shown(every, is_multimask=False)
    points, labels = training_clicks(rng, truth > 0.5, None)
    every = _decode(network, now, points, labels)
    losses = [mask_loss(every, truth, weights, is_single_used=False)]
    logits = _shown(every, is_multimask=True)
    for _ in range(int(rng.choice(MOST_CLICKS, p=[0.4, 0.2, 0.2, 0.1, 0.1]))):
        guess = torch.nn.functional.interpolate(
            logits.detach().unsqueeze(1).float(), truth.shape[-1:] * 2, mode="bilinear"
        )
        point, label = training_clicks(rng, truth > 0.5, guess.squeeze(1) > 0)
        points, labels = torch.cat([points, point], dim=1), torch.cat([labels, label], dim=1)
        every = _decode(network, now, points, labels, logits.detach().clamp(-32, 32).unsqueeze(1))
        losses.append(mask_loss(every, truth, weights, is_single_used=True))
        logits = _shown(every, is_multimask=False)
    return every, torch.stack(losses).mean(), logits


def _click_again(
    network: SAM2S,
    now: ImageFeatures,
    truth: Tensor,
    rng: np.random.Generator,
    weights: LossWeights,
    losses: list[Tensor],
) -> None:
    """One click or box without memory on a later frame too: its features are there, a lesson costs little."""
    shown = truth.flatten(1).any(dim=1)
    if not shown.any():
        return
    now, truth = ImageFeatures(*(maps[shown] for maps in now)), truth[shown]
    is_click = rng.random() < 0.7
    points, labels = training_clicks(rng, truth > 0.5, None) if is_click else training_boxes(rng, truth > 0.5)
    every = _decode(network, now, points, labels)
    losses.append(mask_loss(every, truth, weights, is_single_used=not is_click))


def _shown(every: AllMasks, *, is_multimask: bool) -> Tensor:
    flag = torch.full(every.predicted_iou.shape[:1], is_multimask, device=every.predicted_iou.device)
    return select_mask(every, flag)[0]


def truth_logits(network: SAM2S, truth: Tensor) -> Tensor:
    """A true mask [B, S, S] as the logits ±10 that SAM 2 makes of a mask prompt, [B, 4h, 4w]."""
    pooled = torch.nn.functional.adaptive_avg_pool2d(truth.unsqueeze(1), network.config.mask_size).squeeze(1)
    return pooled * 20.0 - 10.0


def _track(
    network: SAM2S, now: ImageFeatures, memory: _Memory, *, is_diverse: bool, t: int
) -> tuple[AllMasks, Tensor]:
    """Decode a frame without prompt from the memory of those before it; also its class tokens."""
    rows, device = now.embedding.shape[0], now.embedding.device
    long_term = list(range(1, LONG_TERM_FRAMES + 1)) if is_diverse and t > LONG_TERM_FRAMES else []
    recent = [index for index in range(1, t) if index not in long_term][-MOST_RECENT_SLOTS:]
    slots = [0, *recent, *long_term]
    times = [CONDITIONING_TIME, *range(len(recent) - 1, -1, -1), *[LONG_TERM_TIME] * len(long_term)]
    ages = torch.arange(t, 0, -1, device=device).float()
    view = MemoryView(
        spatial=torch.stack([memory.spatial[index] for index in slots], dim=1),
        slot_time=torch.tensor([times], device=device).expand(rows, -1),
        slot_bias=torch.zeros(rows, len(slots), device=device),
        pointers=torch.stack(memory.pointers, dim=1),
        pointer_age=ages.expand(rows, -1),
        pointer_bias=torch.zeros(rows, t, device=device),
    )
    conditioned, class_token = network.attend_memory(now.embedding, view)
    points, labels = torch.zeros(rows, 1, 2, device=device), torch.full((rows, 1), -1, device=device)
    size = network.config.mask_size
    mask_prompt = now.embedding.new_zeros(rows, 1, size, size)
    readout, presence = mask_prompt[:, :, : size // 2, : size // 2], torch.zeros(rows, device=device)
    if network.config.readout_dim:
        with torch.autocast(device.type, enabled=False):
            prototypes = torch.stack([memory.prototypes[0], memory.prototypes[-1]], dim=1).float()
            readout, presence = network.read_affinity(now.keys.float(), prototypes)
            mask_prompt = upsample(readout, 2)
    has_prompt = torch.full((rows,), bool(network.config.readout_dim), device=device)
    prompt = PromptTensors(points, labels, mask_prompt, has_prompt)
    every = network.decode_all(conditioned, now.stride_4, now.stride_8, readout, prompt)
    return every._replace(presence_logit=every.presence_logit + presence), class_token


def _read_truth(
    network: SAM2S, features: ImageFeatures, masks: Tensor, owner: Tensor, clips: int, t: int
) -> Tensor:
    """Loss of the readout from the true masks of two frames before: what the keys can do."""
    keys = features.keys.float().unflatten(0, (clips, -1))[owner]
    with torch.autocast(keys.device.type, enabled=False):
        prototypes = torch.stack(
            [
                network.readout.prototypes(keys[:, index], truth_logits(network, masks[:, index]))
                for index in (0, t - 1)
            ],
            dim=1,
        )
        return readout_loss(network.readout(keys[:, t], prototypes)[0], masks[:, t])


def _remember(
    network: SAM2S,
    now: ImageFeatures,
    memory: _Memory,
    every: AllMasks,
    mask_logits: Tensor,
    truth: Tensor,
    *,
    is_prompted: bool,
) -> None:
    """Write the frame to memory as inference would: an absent object leaves an empty mask.

    Whether it is absent comes from the truth, as a presence head that is still wrong would teach the memory
    nonsense; inference takes the head's word.
    """
    is_present = truth.flatten(1).any(dim=1)
    logits = torch.where(is_present.view(-1, 1, 1), mask_logits.float(), -1024.0)
    prompted = torch.full_like(is_present, is_prompted)
    with torch.autocast(truth.device.type, enabled=False):
        presence = is_present.float() * 2 - 1
        spatial, prototypes = network.encode_memory(
            now.embedding.float(), now.keys.float(), logits, presence, prompted
        )
    token = select_mask(every, torch.full_like(is_present, not is_prompted))[2]
    pointer = torch.where(is_present.unsqueeze(1), network.obj_ptr_proj(token), network.no_obj_ptr)
    memory.spatial.append(spatial)
    memory.prototypes.append(prototypes)
    memory.pointers.append(pointer.float())
