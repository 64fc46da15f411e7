from collections.abc import AsyncIterator, Iterator

import pytest
from grpc import aio

from trocar.config import ServerConfig
from trocar.server import TrackingServer
from wire.calls import Call
from wire.fakes import FakeScheduler, resize_linear


@pytest.fixture
def scheduler() -> Iterator[FakeScheduler]:
    fake = FakeScheduler()
    yield fake
    fake.close()


@pytest.fixture
def config() -> ServerConfig:
    return ServerConfig(address="127.0.0.1:0", shutdown_grace_s=0.2)


@pytest.fixture
async def server(scheduler: FakeScheduler, config: ServerConfig) -> AsyncIterator[TrackingServer]:
    server = TrackingServer(config, scheduler, resize_linear)
    await server.start()
    await server.warm_up()
    yield server
    await server.stop()


@pytest.fixture
async def channel(server: TrackingServer) -> AsyncIterator[aio.Channel]:
    async with aio.insecure_channel(server.address) as channel:
        yield channel


@pytest.fixture
def call(channel: aio.Channel) -> Call:
    return Call(channel)
