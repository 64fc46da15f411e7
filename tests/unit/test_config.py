from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from trocar.config import ServerConfig, is_loopback, split_address
from trocar.errors import ConfigError


@pytest.mark.parametrize("address", ["127.0.0.1:0", "localhost:50051", "[::1]:50051", "127.8.8.8:1"])
def test_loopback_needs_no_permission(address: str) -> None:
    assert ServerConfig(address=address).address == address


@pytest.mark.parametrize("address", ["0.0.0.0:50051", "[::]:50051", "192.168.0.7:50051", "example.org:1"])
def test_address_that_others_reach_needs_insecure(address: str) -> None:
    with pytest.raises(ConfigError, match="--insecure"):
        ServerConfig(address=address)
    assert ServerConfig(address=address, insecure=True).insecure


@pytest.mark.parametrize(
    "address", ["", "50051", "localhost", "localhost:", "localhost:x", "::1:80", "a:70000"]
)
def test_malformed_address_is_refused_with_an_example(address: str) -> None:
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:50051"):
        ServerConfig(address=address)


@pytest.mark.parametrize(
    "setting",
    [
        {"max_streams": 0},
        {"max_objects": 70_000},
        {"max_message_bytes": 1},
        {"max_picture_pixels": 0},
        {"max_waiting_packets": 1},
        {"keepalive_time_s": 0},
        {"keepalive_timeout_s": float("nan")},
        {"shutdown_grace_s": -1},
    ],
)
def test_setting_out_of_range_names_itself_and_the_range(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(setting))} is .*: expected .* to "):
        ServerConfig(**setting)


def test_unknown_setting_is_an_error() -> None:
    with pytest.raises(TypeError):
        ServerConfig(max_steams=3)  # type: ignore[call-arg]


def test_config_cannot_be_changed() -> None:
    config = ServerConfig()
    with pytest.raises(FrozenInstanceError):
        config.max_streams = 9  # type: ignore[misc]


def test_ipv6_host_loses_its_brackets() -> None:
    assert split_address("[::1]:7") == ("::1", 7)
    assert is_loopback("::1")
    assert not is_loopback("::")
