import numpy as np
import pytest
import torch

from networks import TINY
from trocar_engines.memory.bank import BankConfig, FrameFacts, MemoryBank, MemoryPolicy
from trocar_engines.memory.pool import FOUND_POINTER, RECENT_POINTERS, TRIAL_POINTER, MemoryPool

CONDITIONING, LONG_TERM = 6, 7


def make_bank(**overrides: object) -> MemoryBank:
    settings = {"recent_slots": 3, "long_term_slots": 2, "candidate_iou": 0.8, "candidate_interval_s": 0.0}
    config = BankConfig(**{**settings, **overrides})  # type: ignore[arg-type]
    bank = MemoryBank(MemoryPool(TINY, rows=1, slots=config.slots), config, TINY)
    bank.condition(summary(0), area=100)
    return bank


def summary(angle_deg: float) -> np.ndarray:
    angle = np.radians(angle_deg)
    return np.array([np.cos(angle), np.sin(angle)], dtype=np.float32)


def facts(
    time_s: float = 0.0,
    *,
    iou: float = 0.9,
    present: bool = True,
    trusted: bool = True,
    area: int = 100,
    angle: float = 0.0,
) -> FrameFacts:
    return FrameFacts(
        time_s=time_s,
        predicted_iou=iou,
        is_present=present,
        is_trusted=trusted,
        area=area,
        summary=summary(angle),
    )


def track(bank: MemoryBank, frame: FrameFacts) -> int | None:
    """One frame as the tracker does it; the slot's tensor is marked with the frame's time."""
    bank.advance()
    if not bank.is_due(frame):
        return None
    slot = bank.choose_slot(frame)
    if slot is not None:
        bank.pool.spatial[bank.row, slot] = frame.time_s
        bank.pointer_slot(frame.time_s)
    bank.consider(frame, slot)
    return slot


def test_recent_slots_carry_sam2s_temporal_rows() -> None:
    bank = make_bank()
    slots = [track(bank, facts(t)) for t in range(1, 5)]
    reads = bank.reads()
    assert slots == [1, 2, 3, 1]
    assert reads.slots[:4] == [0, 2, 3, 1]
    assert reads.times[:4] == [CONDITIONING, 2, 1, 0]
    assert reads.prototypes == (0, 1)


@pytest.mark.parametrize(("rate_hz", "remembered"), [(25, 50), (30, 60), (50, 50), (60, 60)])
def test_recent_memories_are_taken_on_the_clock_at_high_frame_rates(rate_hz: int, remembered: int) -> None:
    bank = make_bank()
    slots = [track(bank, facts(frame / rate_hz)) for frame in range(2 * rate_hz)]
    assert sum(slot is not None for slot in slots) == remembered


@pytest.mark.parametrize("interval_s", [0.0, 0.005])
def test_every_third_frame_is_remembered_where_the_clock_hardly_moves(interval_s: float) -> None:
    bank = make_bank()
    slots = [track(bank, facts(frame * interval_s)) for frame in range(31)]
    assert [index for index, slot in enumerate(slots) if slot is not None] == list(range(0, 31, 3))


def test_vanilla_remembers_every_frame_at_any_rate() -> None:
    bank = make_bank(policy=MemoryPolicy.VANILLA)
    assert all(track(bank, facts(frame / 120)) is not None for frame in range(20))


def test_a_frame_that_comes_too_soon_breaks_no_run_of_candidates() -> None:
    bank = make_bank()
    for frame in range(10):
        track(bank, facts(frame / 60, angle=8.0 * frame))
    assert len(bank.long_term.filled()) == 1


def test_absence_and_return_are_remembered_at_once_at_any_rate() -> None:
    bank = make_bank()
    frames = [facts(0.0), facts(0.01, present=False), facts(0.02), facts(0.03)]
    assert [track(bank, frame) is not None for frame in frames] == [True, True, True, False]


def test_clock_that_begins_anew_is_remembered() -> None:
    bank = make_bank()
    track(bank, facts(100.0))
    assert track(bank, facts(0.0)) is not None


def test_fifth_candidate_elects_the_least_similar_frame() -> None:
    bank = make_bank()
    for t, angle in enumerate([5, 40, 10, 20, 30], start=1):
        track(bank, facts(float(t), angle=angle))
    assert bank.long_term.filled() == [4]
    assert bank.pool.spatial[bank.row, 4].unique().item() == 2.0
    assert LONG_TERM in bank.reads().times


def test_next_election_compares_with_the_latest_long_term_memory() -> None:
    bank = make_bank()
    for t, angle in enumerate([0, 80, 0, 0, 0, 80, 75, 10, 80, 80], start=1):
        track(bank, facts(float(t), angle=angle))
    assert [bank.pool.spatial[bank.row, slot].unique().item() for slot in bank.long_term.filled()] == [
        2.0,
        8.0,
    ]


def test_a_poor_frame_breaks_the_run() -> None:
    bank = make_bank()
    for t, iou in enumerate([0.9, 0.9, 0.9, 0.9, 0.7, 0.9, 0.9, 0.9, 0.9], start=1):
        track(bank, facts(float(t), iou=iou))
    assert bank.long_term.filled() == []


def test_long_term_memories_leave_in_order_of_age() -> None:
    bank = make_bank()
    for t in range(1, 16):
        track(bank, facts(float(t)))
    assert [bank.pool.spatial[bank.row, slot].unique().item() for slot in bank.long_term.filled()] == [
        6.0,
        11.0,
    ]


def test_candidates_are_taken_on_the_clock_at_high_frame_rates() -> None:
    bank = make_bank(candidate_interval_s=0.5)
    for frame in range(1, 121):
        track(bank, facts(frame / 60))
    assert bank.long_term.filled() == []
    for frame in range(121, 181):
        track(bank, facts(frame / 60))
    assert bank.long_term.filled() == [4]


def test_absence_that_lasts_is_remembered_anew_in_its_slot() -> None:
    bank = make_bank(absence_interval_s=0.25)
    track(bank, facts(1.0))
    slots = [track(bank, facts(1 + frame / 10, present=False)) for frame in range(1, 8)]
    assert slots == [2, None, None, 2, None, None, 2]
    assert bank.recent.filled() == [1, 2]
    assert bank.pool.spatial[bank.row, 2].unique().item() == pytest.approx(1.7)
    assert bank.reads().prototypes == (0, 0), "what is in view meanwhile holds nothing against its return"
    track(bank, facts(2.0))
    assert bank.reads().prototypes == (0, 3)


def test_six_absences_hold_one_slot() -> None:
    bank = make_bank(absence_interval_s=10.0)
    track(bank, facts(1.0))
    slots = [track(bank, facts(float(t), present=False)) for t in range(2, 8)]
    assert slots == [2, None, None, None, None, None]


def test_vanilla_writes_every_trusted_frame() -> None:
    bank = make_bank(policy=MemoryPolicy.VANILLA)
    assert [track(bank, facts(float(t), present=False)) for t in range(1, 5)] == [1, 2, 3, 1]
    assert bank.long_term.filled() == []


@pytest.mark.parametrize("policy", list(MemoryPolicy))
def test_untrusted_frames_are_never_written(policy: MemoryPolicy) -> None:
    bank = make_bank(policy=policy)
    assert track(bank, facts(1.0, trusted=False)) is None


@pytest.mark.parametrize("area", [1_000, 5])
def test_a_mask_that_jumps_in_size_with_a_low_iou_is_not_remembered(area: int) -> None:
    bank = make_bank()
    assert track(bank, facts(1.0, area=area, iou=0.3)) is None
    assert track(bank, facts(2.0, area=area, iou=0.9)) is not None


def test_pointer_ages_stay_in_the_range_seen_in_training() -> None:
    bank = make_bank()
    for t in range(1, 200):
        track(bank, facts(float(t)))
    reads = bank.reads()
    assert len(reads.pointers) == len(set(reads.pointers)) == RECENT_POINTERS + 1
    assert max(reads.pointer_ages) == RECENT_POINTERS
    assert min(reads.pointer_ages) == 0


def test_conditioning_anew_forgets_everything() -> None:
    bank = make_bank()
    for t in range(1, 10):
        track(bank, facts(float(t)))
    bank.condition(summary(0), area=50)
    reads = bank.reads()
    assert (reads.slots, reads.times, reads.pointers) == ([0], [CONDITIONING], [0])


def test_corrections_have_their_own_slots() -> None:
    bank = make_bank()
    track(bank, facts(1.0))
    assert [bank.correct(100, time_s) for time_s in (2.0, 3.0, 4.0)] == [6, 7, 6]
    assert bank.reads().slots == [0, 1, 7, 6]


def filled_bank() -> MemoryBank:
    """With every ring full."""
    bank = make_bank()
    elect(bank, 1.0, 60)
    elect(bank, 6.0, 90)
    for frame in range(RECENT_POINTERS):
        track(bank, facts(11.0 + frame, iou=0.5))
    for time_s in (40.0, 41.0):
        bank.correct(100, time_s)
    return bank


def test_a_trial_that_is_dropped_leaves_all_as_it_was() -> None:
    bank = filled_bank()
    track(bank, facts(50.0, present=False))
    before, absent = told(bank), bank.absent_slot
    place = bank.begin_trial(7, 51.0)
    assert told(bank) != before
    assert place.slot not in (*bank.recent.times, *bank.long_term.times, *bank.corrections.times, 0)
    bank.drop_trial()
    assert (told(bank), bank.absent_slot) == (before, absent)


def told(bank: MemoryBank) -> tuple[list[int], list[int], list[int], list[int], tuple[int, int]]:
    reads = bank.reads()
    return reads.slots, reads.times, reads.pointers, reads.pointer_ages, reads.prototypes


def test_what_is_on_trial_and_what_was_found_is_read_as_a_correction_with_its_pointer() -> None:
    bank = filled_bank()
    most = len(bank.reads().pointers)
    bank.pool.spatial[bank.row, bank.begin_trial(7, 51.0).slot] = 5.0
    bank.pool.pointers[bank.row, TRIAL_POINTER] = 6.0
    bank.advance()
    reads = bank.reads()
    assert (reads.slots[-1], reads.times[-1]) == (bank.config.trial_slot, bank.correction_time)
    assert (reads.pointers[1], reads.pointer_ages[1]) == (TRIAL_POINTER, 1)
    assert len(reads.pointers) == most, "the oldest is left out"
    assert len(reads.slots) == bank.config.most_read
    assert reads.prototypes == (bank.config.trial_slot,) * 2
    bank.keep_trial()
    reads = bank.reads()
    found = bank.config.found_slot
    assert (reads.slots[-1], reads.pointers[1], reads.prototypes) == (found, FOUND_POINTER, (found, found))
    assert bank.pool.spatial[bank.row, found].unique().item() == 5.0
    assert bank.pool.pointers[bank.row, FOUND_POINTER].unique().item() == 6.0
    assert bank.lasting_slots == [found, *bank.long_term.filled(), *bank.corrections.filled(), 0]


def test_an_earlier_find_outlives_a_trial_that_fails_but_not_what_a_person_says() -> None:
    bank = filled_bank()
    bank.begin_trial(7, 51.0)
    bank.keep_trial()
    bank.begin_trial(7, 52.0)
    bank.drop_trial()
    assert bank.told_slot == bank.config.found_slot
    bank.begin_trial(7, 53.0)
    corrected = bank.correct(100, 54.0)
    assert (bank.found, bank.trial, bank.told_slot) == (None, None, corrected)


def test_rolling_back_forgets_what_was_found_since_but_nothing_on_trial() -> None:
    bank = filled_bank()
    bank.begin_trial(7, 51.0)
    bank.keep_trial()
    bank.begin_trial(7, 52.0)
    bank.roll_back(50.0, bank.frame)
    assert bank.found is None
    assert bank.trial is not None


def test_lasting_pictures_begin_with_what_was_told_last() -> None:
    bank = make_bank()
    assert bank.lasting_slots == [0]
    elect(bank, 1.0, 60)
    (long_term,) = bank.long_term.filled()
    assert bank.lasting_slots == [0, long_term]
    assert bank.correct(100, 9.0) == 6
    assert bank.lasting_slots == [6, long_term, 0]


def elect(bank: MemoryBank, start_s: float, angle: float, iou: float = 0.9) -> None:
    """Five candidates in a row, all alike: the first is elected."""
    for frame in range(5):
        track(bank, facts(start_s + frame, angle=angle, iou=iou))


def test_spread_keeps_what_is_unlike_the_rest_and_fifo_what_is_new() -> None:
    kept = {}
    for policy in (MemoryPolicy.FIFO, MemoryPolicy.SPREAD):
        bank = make_bank(policy=policy)
        for start, angle in ((1, 60), (6, 90), (11, 91), (16, 92)):
            elect(bank, start, angle)
        kept[policy] = [bank.pool.spatial[bank.row, slot].unique().item() for slot in bank.long_term.filled()]
    assert kept[MemoryPolicy.FIFO] == [11.0, 16.0]
    assert 1.0 in kept[MemoryPolicy.SPREAD], "the only memory of that view must not leave"


def test_spread_drops_the_worse_of_a_similar_pair() -> None:
    bank = make_bank(policy=MemoryPolicy.SPREAD)
    elect(bank, 1, 45)
    elect(bank, 6, 90, iou=0.95)
    elect(bank, 11, 91, iou=0.85)
    assert sorted(bank.long_term.times.values()) == [1.0, 6.0], "the newcomer is the worse one"
    elect(bank, 16, 91, iou=0.99)
    assert sorted(bank.long_term.times.values()) == [1.0, 16.0], "the newcomer is the better one"


def test_the_conditioning_frame_is_a_neighbour_that_never_leaves() -> None:
    bank = make_bank(policy=MemoryPolicy.SPREAD)
    elect(bank, 1, 2, iou=0.99)
    elect(bank, 6, 60)
    elect(bank, 11, 90)
    assert sorted(bank.long_term.times.values()) == [6.0, 11.0], "the one like the conditioning frame goes"


def test_roll_back_forgets_the_wrong_frame_and_all_after_it() -> None:
    bank = make_bank(recent_slots=6)
    for t in range(1, 11):
        track(bank, facts(float(t), angle=8.0 * t))
    assert len(bank.long_term.filled()) == 2
    bank.roll_back(6.0, frame=6)
    assert bank.recent.filled() == [5], "of six recent frames only that of time 5 is older"
    assert [bank.long_term.times[slot] for slot in bank.long_term.filled()] == [5.0]
    ages = bank.reads().pointer_ages
    assert ages == [6, 5, 4, 3, 2, 1], "conditioning frame, then frames 1 to 5 seen from frame 6"
    slots = [track(bank, facts(float(t), angle=0)) for t in range(7, 13)]
    assert None not in slots
    assert len(set(bank.recent.filled())) == 6


def test_vanilla_lets_the_age_of_the_conditioning_pointer_grow() -> None:
    bank = make_bank(policy=MemoryPolicy.VANILLA)
    for t in range(1, 41):
        track(bank, facts(float(t)))
    ages = dict(zip(bank.reads().pointers, bank.reads().pointer_ages, strict=True))
    assert ages[0] == 40
    assert sorted(ages.values()) == [*range(RECENT_POINTERS), 40]


@pytest.mark.parametrize("policy", list(MemoryPolicy))
def test_only_vanilla_rounds_spatial_memory_to_bfloat16(policy: MemoryPolicy) -> None:
    bank = make_bank(policy=policy)
    fine = 1.0 + 2.0**-12  # between two bfloat16 numbers
    of_all = bank.pool.spatial, bank.pool.prototypes, bank.pool.pointers
    bank.pool.store([bank.place(1, 0.0)], *(torch.full_like(values[:1, 0], fine) for values in of_all))
    assert bank.pool.spatial[bank.row, 1].unique().item() == (1.0 if policy is MemoryPolicy.VANILLA else fine)
    assert bank.pool.prototypes[bank.row, 1].unique().item() == fine
