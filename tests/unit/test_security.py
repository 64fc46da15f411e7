from trocar.security import Rate


def test_rate_refills_with_time_up_to_its_burst() -> None:
    now_s = 0.0
    rate = Rate(2, 3, clock=lambda: now_s)
    assert [rate.take() for _ in range(6)] == [True] * 5 + [False]
    now_s = 0.5
    assert [rate.take() for _ in range(2)] == [True, False]
    now_s = 1_000
    assert sum(rate.take() for _ in range(20)) == 5


def test_what_is_borrowed_is_waited_for() -> None:
    now_s = 0.0
    rate = Rate(4, 0, clock=lambda: now_s)
    assert [rate.borrow_s() for _ in range(6)] == [0, 0, 0, 0, 0.25, 0.5]
    now_s = 0.5
    assert rate.borrow_s() == 0.25
