"""Attacks on a server whose tracker computes nothing: the short form of `python -m trocar_bench.hostile`."""

import json
from typing import Any

import pytest

from trocar_bench.hostile import HostileBench, Onslaught, main

SHORT = ("--light", "--resolution", "160x90", "--alone", "1", "--seconds", "2")


@pytest.mark.slow
def test_thousand_malformed_messages_and_files_are_refused_and_the_server_lives(
    capsys: pytest.CaptureFixture[str],
) -> None:
    attacks = ("--attack", "volume", "--attack", "files")
    assert main((*SHORT, *attacks, "--messages", "1000", "--rate", "100000")) == 0, capsys.readouterr().out
    attacks_told = json.loads(capsys.readouterr().out.splitlines()[-1])["attacks"]
    counts = attacks_told["volume"]["counts"]
    assert counts["done"] >= 1_000
    assert {"packets.OK", "prompts.OK", "junk.INVALID_ARGUMENT", "http2"} <= counts.keys()
    assert attacks_told["files"]["counts"]["refused"] == 50


@pytest.mark.slow
def test_server_that_dies_in_an_attack_is_a_finding_beside_the_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def kill_and_follow(bench: HostileBench, attack: Onslaught, attacker: Any, server: Any, live: Any) -> Any:
        server.kill()
        return follow(bench, attack, attacker, server, live)

    follow = HostileBench._follow
    monkeypatch.setattr(HostileBench, "_follow", kill_and_follow)
    assert main((*SHORT, "--attack", "loris", "--attack", "connections")) == 1
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(told["attacks"]) == ["loris", "connections"]
    for attack in told["attacks"].values():
        assert attack["alone"]["frames"] > 0
        assert "exit code -9" in attack["first_findings"][0]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--tls",)], ids=["plain", "tls"])
def test_floods_and_peers_that_say_nothing_end_neither_server_nor_honest_stream(
    flags: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trocar_bench.hostile.SETTLE_S", 0.3)
    kinds = ("malformed", "flood", "loris", "connections", "resets", "paths")
    attacks = [word for kind in kinds for word in ("--attack", kind)]
    assert main((*SHORT, *flags, *attacks, "--connections", "50")) == 0, capsys.readouterr().out
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    for kind, what in (
        ("flood", "done"),
        ("loris", "opened"),
        ("connections", "opened"),
        ("malformed", "done"),
        ("resets", "opened"),
        ("paths", "opened"),
    ):
        assert told["attacks"][kind]["beside_control"]["frames"] > 0, kind
        assert told["attacks"][kind]["counts"][what] > 0, kind
