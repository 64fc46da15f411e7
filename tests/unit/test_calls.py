import asyncio

import pytest

from trocar.calls import CALL_BURST, MOST_CONNECTIONS, CallTurns
from trocar.errors import LimitError

PEER, OTHER = "ipv4:10.0.0.1:40000", "ipv4:10.0.0.1:40001"


async def _spend_burst(turns: CallTurns, per_s: int) -> None:
    for _ in range(per_s + CALL_BURST):
        await turns.wait(PEER)


async def test_calls_beyond_the_rate_wait_and_another_connection_does_not() -> None:
    turns = CallTurns(1)
    await _spend_burst(turns, 1)
    late = asyncio.create_task(turns.wait(PEER))
    await asyncio.sleep(0.05)
    assert not late.done()
    async with asyncio.timeout(0.5):
        await turns.wait(OTHER)
    assert not late.done()
    await late


async def test_call_that_is_cancelled_stays_until_its_turn() -> None:
    turns = CallTurns(1)
    await _spend_burst(turns, 1)
    late = asyncio.create_task(turns.wait(PEER))
    await asyncio.sleep(0.01)
    late.cancel()
    await asyncio.sleep(0.05)
    assert not late.done()
    with pytest.raises(asyncio.CancelledError):
        await late


async def test_call_whose_turn_is_too_far_away_is_refused_and_costs_the_next_nothing() -> None:
    turns = CallTurns(0.01, longest_s=0.01)
    await _spend_burst(turns, 0)
    for _ in range(3):
        with pytest.raises(LimitError, match="max_calls_per_s"):
            await turns.wait(PEER)
    turns.give_back(PEER)
    await turns.wait(PEER)


async def test_closing_lets_everybody_go() -> None:
    turns = CallTurns(0.01)
    await _spend_burst(turns, 0)
    late = [asyncio.create_task(turns.wait(PEER)) for _ in range(2)]
    await asyncio.sleep(0.01)
    late[0].cancel()
    turns.close()
    async with asyncio.timeout(5):
        outcomes = await asyncio.gather(*late, return_exceptions=True)
    assert [type(one) for one in outcomes] == [asyncio.CancelledError, LimitError]


async def test_connections_of_long_ago_are_forgotten() -> None:
    turns = CallTurns(1)
    await _spend_burst(turns, 1)
    for port in range(MOST_CONNECTIONS):
        await turns.wait(f"ipv4:10.0.0.2:{port}")
    assert len(turns._rates) == MOST_CONNECTIONS
    async with asyncio.timeout(0.5):
        await turns.wait(PEER)
