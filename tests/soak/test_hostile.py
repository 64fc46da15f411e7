"""Attacks on a server whose tracker computes nothing: the short form of `python -m trocar_bench.hostile`."""

import json

import pytest

from trocar_bench.hostile import main

SHORT = ("--light", "--resolution", "160x90", "--alone", "1", "--seconds", "2")


@pytest.mark.slow
def test_thousand_malformed_messages_and_files_are_refused_and_the_server_lives(
    capsys: pytest.CaptureFixture[str],
) -> None:
    attacks = ("--attack", "malformed", "--attack", "files")
    assert main((*SHORT, *attacks, "--messages", "1000", "--rate", "100000")) == 0, capsys.readouterr().out
    attacks_told = json.loads(capsys.readouterr().out.splitlines()[-1])["attacks"]
    counts = attacks_told["malformed"]["counts"]
    assert counts["done"] >= 1_000
    assert {"packets.OK", "prompts.OK", "junk.INVALID_ARGUMENT", "http2"} <= counts.keys()
    assert attacks_told["files"]["counts"]["refused"] == 50


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--tls",)], ids=["plain", "tls"])
def test_floods_and_peers_that_say_nothing_end_neither_server_nor_honest_stream(
    flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    attacks = [word for kind in ("flood", "loris", "connections") for word in ("--attack", kind)]
    assert main((*SHORT, *flags, *attacks, "--connections", "50")) == 0, capsys.readouterr().out
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["server_died"], told["stream_ended"]) == (False, False)
    for kind, what in (("flood", "done"), ("loris", "opened"), ("connections", "opened")):
        assert told["attacks"][kind]["counts"][what] > 0, kind
