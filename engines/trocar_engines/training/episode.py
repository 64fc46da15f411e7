"""One training episode: a prompt on the first frame, then tracking with the network's own memory.

Every row, an object of a clip, does the same at the same time, and what differs between rows is decided by
their place in the batch: nothing is read back from the device, so that a GPU can replay a whole step.
"""

import math
from dataclasses import dataclass, field

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
MOST_RECENT = 6
LONG_TERM_FRAMES = 2
"""DiveMem sampling (SAM2S): after the conditioning frame come two that stand for long-term memories."""
CLICKED_SHARE, BOXED_SHARE = 0.55, 0.2
"""Of clips, by their first prompt; the others get a mask."""
CLICK_SHARES = (1.0, 0.6, 0.4, 0.2, 0.1)
"""Of clicked clips that get a first click, a second, …."""
OWN_PRESENCE_SHARE = 0.5
"""Of rows that remember a tracked frame as absent where the presence head says so, not where it is so."""
MISREMEMBERED_SHARE = 0.2
"""Of tracked frames and rows that are remembered wrong."""
AGAIN_BOXED_SHARE = 0.35
"""Of the later frames that are prompted anew, without memory: their features are there, a lesson costs
little. The others are clicked. The boxed ones belong to the last clips, whose first prompts are masks."""


@dataclass(kw_only=True)
class _Memory:
    """What the objects of an episode remember; lists in order of time, the conditioning frame first."""

    spatial: list[Tensor] = field(default_factory=list)
    prototypes: list[Tensor] = field(default_factory=list)
    pointers: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class _Reads:
    """Which memories every row reads on one frame.

    Args:
        plain: indices of frames, for rows that read the most recent ones.
        diverse: as many, for rows with long-term memories.
        times: int64 [rows, K] temporal embedding of each slot.
    """

    plain: list[int]
    diverse: list[int]
    times: Tensor


class Episodes:
    """Runs batches of one shape through a network.

    Args:
        network: in training mode.
        weights: of the loss terms.
        clips: of a batch.
        objects: of each clip.
        frames: of each clip.
        diverse_share: 0 to 1, of the clips that read long-term memories too (DiveMem sampling, SAM2S); the
            others read the most recent ones alone, as SAM 2 is trained.
    """

    def __init__(
        self,
        network: SAM2S,
        weights: LossWeights,
        *,
        clips: int,
        objects: int,
        frames: int,
        diverse_share: float,
    ) -> None:
        self.network, self.weights = network, weights
        self.clips, self.objects, self.frames = clips, objects, frames
        self.rows = clips * objects
        self.device = network.image_mean.device
        # Spread evenly over the batch, so that every kind of prompt has some.
        is_diverse = [int((clip + 1) * diverse_share) > int(clip * diverse_share) for clip in range(clips)]
        self._is_diverse = torch.tensor(is_diverse, device=self.device).repeat_interleave(objects)
        self._reads = [self._choose_reads(t) for t in range(1, frames)]
        clicked = round(CLICKED_SHARE * clips)
        self._clicked = clicked * objects
        self._boxed = self._clicked + round(BOXED_SHARE * clips) * objects
        # Fewer rows with every click.
        self._clicks = [round(share * clicked) * objects for share in CLICK_SHARES]
        # Every clip is prompted anew on two later frames, which ones differs from clip to clip.
        later = max(1, frames - 1)
        again = [(clip, 1 + (clip + turn * later // 2) % later) for clip in range(clips) for turn in range(2)]
        self._again = torch.tensor([clip * frames + t for clip, t in again], device=self.device)
        self._again_rows = torch.tensor(
            [(clip * objects + o) * frames + t for clip, t in again for o in range(objects)],
            device=self.device,
        )
        self._again_clicked = round((1 - AGAIN_BOXED_SHARE) * len(again)) * objects

    def _choose_reads(self, t: int) -> _Reads:
        recent = list(range(max(1, t - MOST_RECENT + 1), t))
        plain = [0, *recent]
        plain_times = [CONDITIONING_TIME, *range(len(recent) - 1, -1, -1)]
        diverse, diverse_times = plain, plain_times
        if t > LONG_TERM_FRAMES + 1 and len(recent) > LONG_TERM_FRAMES:
            long_term = list(range(1, LONG_TERM_FRAMES + 1))
            recent = [index for index in range(1, t) if index not in long_term]
            recent = recent[-(len(plain) - 1 - LONG_TERM_FRAMES) :]
            diverse = [0, *recent, *long_term]
            diverse_times = [
                CONDITIONING_TIME,
                *range(len(recent) - 1, -1, -1),
                *[LONG_TERM_TIME] * LONG_TERM_FRAMES,
            ]
            assert len(diverse) == len(plain)
        plain_row, diverse_row = (
            torch.tensor(times, device=self.device) for times in (plain_times, diverse_times)
        )
        times = torch.where(self._is_diverse.unsqueeze(1), diverse_row, plain_row)
        return _Reads(plain=plain, diverse=diverse, times=times)

    def run(self, sample: Sample) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one batch, and its parts for the log.

        Args:
            sample: of the shape given, on the network's device.
        """
        # One casting of each weight for the whole step, which a captured step repeats as weights change.
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            parts = self._run(sample)
        means = {name: torch.stack(losses).mean() for name, losses in parts.items() if losses}
        zero = means["prompt"] * 0
        total = (
            means["prompt"]
            + means.get("track", zero)
            + self.weights.tsl * means.get("class", zero)
            + self.weights.readout * means.get("readout", zero)
        )
        return total, {name: value.detach() for name, value in means.items()}

    def _run(self, sample: Sample) -> dict[str, list[Tensor]]:
        network, weights = self.network, self.weights
        every_feature = network.encode_image(sample.pixels.flatten(0, 1))
        by_frame = zip(
            *(maps.unflatten(0, (self.clips, -1)).unbind(1) for maps in every_feature), strict=True
        )
        features = [ImageFeatures(*(self._rows(maps) for maps in of_frame)) for of_frame in by_frame]
        masks = sample.masks.flatten(0, 1).float()
        counts = sample.is_shown.flatten().float()
        memory = _Memory()
        seen: list[Tensor] = []  # prototypes of the frames with their true masks
        parts: dict[str, list[Tensor]] = {"prompt": [], "track": [], "readout": [], "class": []}
        for t, now in enumerate(features):
            truth = masks[:, t]
            if t == 0:
                every, loss, mask_logits = self._prompt(now, truth, counts)
                parts["prompt"].append(loss)
                token = network.without_class_memory(self.rows)
            else:
                every, token = self._track(now, memory, t)
                mask_logits = select_mask(every, self._flags(self.rows, True))[0]
                parts["track"].append(mask_loss(every, truth, counts, weights, is_single_used=True))
            if network.config.readout_dim:
                self._read_truth(now, seen, truth, counts, parts["readout"])
            if network.config.classes:
                logits = network.classify(
                    token, self._rows(sample.pixels[:, t]), mask_logits.detach().float()
                )
                is_seen = truth.flatten(1).any(dim=1) & (counts > 0)
                shown = torch.where(is_seen, sample.classes.flatten(), NO_CLASS)
                parts["class"].append(class_loss(logits, shown))
            if t + 1 < self.frames:
                self._remember(now, memory, every, mask_logits, truth, is_prompted=t == 0)
        # Where a head learns alone, prompts teach nothing.
        if self.frames > 1 and network.no_mem_embed.requires_grad:
            parts["prompt"] += self._prompt_again(every_feature, masks, counts)
        return parts

    def _rows(self, maps: Tensor) -> Tensor:
        """A value of each clip for each of its objects, [clips, …] to [rows, …]."""
        return maps.unsqueeze(1).expand(-1, self.objects, *maps.shape[1:]).flatten(0, 1)

    def _flags(self, rows: int, value: bool) -> Tensor:
        return torch.full((rows,), value, device=self.device)

    def _decode(
        self,
        now: ImageFeatures,
        points: Tensor,
        labels: Tensor,
        mask_prompt: Tensor | None = None,
        *,
        is_raw: bool = False,
    ) -> AllMasks:
        network, rows, size = self.network, len(points), self.network.config.mask_size
        mask = now.embedding.new_zeros(rows, 1, size, size) if mask_prompt is None else mask_prompt
        prompt = PromptTensors(points, labels, mask, self._flags(rows, mask_prompt is not None))
        with torch.autocast(self.device.type, enabled=False):
            readout = network.read_points(now, prompt)
        conditioned = now.embedding if is_raw else network.without_memory(now.embedding)
        return network.decode_all(conditioned, now.stride_4, now.stride_8, readout, prompt)

    def _prompt(self, now: ImageFeatures, truth: Tensor, counts: Tensor) -> tuple[AllMasks, Tensor, Tensor]:
        """Decode the first frame: clicks on the first rows, boxes on the next, masks on the others.

        Returns:
            candidates, loss, and the mask to remember.
        """
        clicked, boxed = slice(0, self._clicked), slice(self._clicked, self._boxed)
        given = slice(self._boxed, self.rows)
        done: list[tuple[AllMasks, Tensor]] = []
        losses: list[Tensor] = []
        if self._clicked:
            done += self._click(_part(now, clicked), truth[clicked], counts[clicked], losses)
        if self._boxed > self._clicked:
            points, labels = training_boxes(truth[boxed] > 0.5)
            every = self._decode(_part(now, boxed), points, labels)
            losses.append(mask_loss(every, truth[boxed], counts[boxed], self.weights, is_single_used=True))
            done.append((every, self._shown(every, is_multimask=False)))
        if self.rows > self._boxed:
            # A mask prompt is the output; its pointer comes from the decoder, which reads the mask and the
            # picture as it is.
            downsample = self.network.mask_downsample
            prompt = torch.nn.functional.conv2d(
                truth[given].unsqueeze(1), downsample.weight, downsample.bias, stride=4
            )
            points = truth.new_zeros(len(prompt), 1, 2)
            labels = torch.full((len(prompt), 1), -1, device=self.device)
            every = self._decode(_part(now, given), points, labels, prompt, is_raw=True)
            losses.append(mask_loss(every, truth[given], counts[given], self.weights, is_single_used=True))
            done.append((every, truth_logits(self.network, truth[given])))
        every = AllMasks(*(torch.cat(values) for values in zip(*(one for one, _ in done), strict=True)))
        return every, torch.stack(losses).mean(), torch.cat([logits.float() for _, logits in done])

    def _click(
        self, now: ImageFeatures, truth: Tensor, counts: Tensor, losses: list[Tensor]
    ) -> list[tuple[AllMasks, Tensor]]:
        """Click again and again on fewer and fewer rows; what each got with its last click, in order."""
        points, labels = training_clicks(truth > 0.5, None)
        every = self._decode(now, points, labels)
        losses.append(mask_loss(every, truth, counts, self.weights, is_single_used=False))
        logits = self._shown(every, is_multimask=True)
        done: list[tuple[AllMasks, Tensor]] = []
        for rows in self._clicks[1:]:
            if rows == 0:
                break
            done.insert(0, (_part_of_masks(every, slice(rows, None)), logits[rows:]))
            truth, logits = truth[:rows], logits[:rows].detach()
            guess = torch.nn.functional.interpolate(
                logits.unsqueeze(1).float(), truth.shape[-1:] * 2, mode="bilinear"
            )
            point, label = training_clicks(truth > 0.5, guess.squeeze(1) > 0)
            points, labels = torch.cat([points[:rows], point], 1), torch.cat([labels[:rows], label], 1)
            every = self._decode(
                _part(now, slice(0, rows)), points, labels, logits.clamp(-32, 32).unsqueeze(1)
            )
            losses.append(mask_loss(every, truth, counts[:rows], self.weights, is_single_used=True))
            logits = self._shown(every, is_multimask=False)
        return [(every, logits), *done]

    def _prompt_again(self, features: ImageFeatures, masks: Tensor, counts: Tensor) -> list[Tensor]:
        """Losses of clicks and boxes without memory on later frames, on objects that show there.

        Args:
            features: of all frames, [clips·T, …].
            masks: [rows, T, S, S].
            counts: [rows].
        """
        now = ImageFeatures(*(self._rows(maps.index_select(0, self._again)) for maps in features))
        truth = masks.flatten(0, 1)[self._again_rows]
        counts = counts.repeat_interleave(self.frames)[self._again_rows] * truth.flatten(1).any(dim=1)
        clicked, boxed = slice(0, self._again_clicked), slice(self._again_clicked, len(truth))
        losses: list[Tensor] = []
        points, labels = training_clicks(truth[clicked] > 0.5, None)
        every = self._decode(_part(now, clicked), points, labels)
        losses.append(mask_loss(every, truth[clicked], counts[clicked], self.weights, is_single_used=False))
        points, labels = training_boxes(truth[boxed] > 0.5)
        every = self._decode(_part(now, boxed), points, labels)
        losses.append(mask_loss(every, truth[boxed], counts[boxed], self.weights, is_single_used=True))
        return losses

    def _shown(self, every: AllMasks, *, is_multimask: bool) -> Tensor:
        return select_mask(every, self._flags(len(every.predicted_iou), is_multimask))[0]

    def _track(self, now: ImageFeatures, memory: _Memory, t: int) -> tuple[AllMasks, Tensor]:
        """Decode a frame without prompt from the memory of those before it; also its class tokens."""
        network, rows, device, reads = self.network, self.rows, self.device, self._reads[t - 1]
        is_diverse = self._is_diverse.view(-1, 1, 1, 1)
        spatial = [
            memory.spatial[plain]
            if plain == diverse
            else torch.where(is_diverse, memory.spatial[diverse], memory.spatial[plain])
            for plain, diverse in zip(reads.plain, reads.diverse, strict=True)
        ]
        view = MemoryView(
            spatial=torch.stack(spatial, dim=1),
            slot_time=reads.times,
            slot_bias=torch.zeros(rows, len(spatial), device=device),
            pointers=torch.stack(memory.pointers, dim=1),
            pointer_age=torch.arange(t, 0, -1, device=device).float().expand(rows, -1),
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
        has_prompt = self._flags(rows, bool(network.config.readout_dim))
        prompt = PromptTensors(points, labels, mask_prompt, has_prompt)
        every = network.decode_all(conditioned, now.stride_4, now.stride_8, readout, prompt)
        return every._replace(presence_logit=every.presence_logit + presence), class_token

    def _read_truth(
        self, now: ImageFeatures, seen: list[Tensor], truth: Tensor, counts: Tensor, losses: list[Tensor]
    ) -> None:
        """Loss of the readout from the true masks of two frames before: what the keys can do."""
        readout = self.network.readout
        with torch.autocast(self.device.type, enabled=False):
            keys = now.keys.float()
            if seen:
                prototypes = torch.stack([seen[0], seen[-1]], dim=1)
                losses.append(readout_loss(readout(keys, prototypes)[0], truth, counts))
            seen.append(readout.prototypes(keys, truth_logits(self.network, truth)))

    def _remember(
        self,
        now: ImageFeatures,
        memory: _Memory,
        every: AllMasks,
        mask_logits: Tensor,
        truth: Tensor,
        *,
        is_prompted: bool,
    ) -> None:
        """Write the frame to memory as inference would: an absent object leaves an empty mask.

        Whether it is absent comes from the truth for some rows, as a presence head that is still wrong would
        teach the memory nonsense; others take the head's word, as inference does. Some tracked frames are
        remembered wrong, so that what follows learns to doubt its memory: on LongSim a memory of true masks
        was worth 15 points of J&F over one of own masks.
        """
        network = self.network
        is_present = truth.flatten(1).any(dim=1)
        logits = mask_logits.float()
        if not is_prompted:
            believes_itself = torch.rand(self.rows, device=self.device) < OWN_PRESENCE_SHARE
            is_present = torch.where(believes_itself, every.presence_logit > 0, is_present)
            logits, is_present = self._misremember(logits, is_present, truth)
        logits = torch.where(is_present.view(-1, 1, 1), logits, -1024.0)
        prompted = torch.full_like(is_present, is_prompted)
        with torch.autocast(self.device.type, enabled=False):
            presence = is_present.float() * 2 - 1
            spatial, prototypes = network.encode_memory(
                now.embedding.float(), now.keys.float(), logits, presence, prompted
            )
        token = select_mask(every, torch.full_like(is_present, not is_prompted))[2]
        pointer = torch.where(is_present.unsqueeze(1), network.obj_ptr_proj(token), network.no_obj_ptr)
        memory.spatial.append(spatial)
        # As `MemoryBank.reads` does: after a frame without the object the prompted picture counts alone.
        told = memory.prototypes[0] if memory.prototypes else prototypes
        memory.prototypes.append(torch.where(is_present.view(-1, 1, 1), prototypes, told))
        memory.pointers.append(pointer.float())

    def _misremember(self, logits: Tensor, is_present: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        """Some rows with a wrong mask, or none; logits [rows, 4h, 4w], is_present [rows].

        A part is cut off; another object of the clip or a shape from another clip is taken too, or instead;
        the object is overlooked.
        """
        size = logits.shape[-1]
        drawn = torch.rand(self.rows, 4, device=self.device)
        kind = (drawn[:, 0] * 4 / MISREMEMBERED_SHARE).long()  # from 4 on: none
        is_cut, is_widened, is_moved, is_missed = (kind == which for which in range(4))
        true_logits = truth_logits(self.network, truth)
        sibling = true_logits.unflatten(0, (self.clips, self.objects)).roll(1, dims=1).flatten(0, 1)
        stranger = true_logits.roll(self.objects, dims=0)
        other = torch.where((drawn[:, 1] < 0.6).view(-1, 1, 1), sibling, stranger)
        ticks = torch.linspace(-1, 1, size, device=self.device)
        angle, offset = math.tau * drawn[:, 2].view(-1, 1, 1), (drawn[:, 3] - 0.3).view(-1, 1, 1)
        along = ticks.view(1, 1, -1) * angle.cos() + ticks.view(1, -1, 1) * angle.sin()
        cut = torch.where(along > offset, -10.0, logits)
        wrong = torch.where(is_cut.view(-1, 1, 1), cut, logits)
        wrong = torch.where(is_widened.view(-1, 1, 1), torch.maximum(logits, other), wrong)
        wrong = torch.where(is_moved.view(-1, 1, 1), other, wrong)
        takes_another = (is_widened | is_moved) & (other > 0).flatten(1).any(dim=1)
        return wrong, (is_present & ~is_missed) | takes_another


def truth_logits(network: SAM2S, truth: Tensor) -> Tensor:
    """A true mask [B, S, S] as the logits ±10 that SAM 2 makes of a mask prompt, [B, 4h, 4w]."""
    pooled = torch.nn.functional.adaptive_avg_pool2d(truth.unsqueeze(1), network.config.mask_size).squeeze(1)
    return pooled * 20.0 - 10.0


def _part(features: ImageFeatures, rows: slice) -> ImageFeatures:
    return ImageFeatures(*(maps[rows] for maps in features))


def _part_of_masks(every: AllMasks, rows: slice) -> AllMasks:
    return AllMasks(*(values[rows] for values in every))
