"""The committed stubs are what the contract generates, and the contract keeps its own rules."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor

from trocar.v1 import tracking_pb2 as pb

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def generator() -> ModuleType:
    pytest.importorskip("grpc_tools", reason="grpcio-tools is not installed")
    spec = importlib.util.spec_from_file_location("generate", REPOSITORY / "proto" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_committed_stubs_are_what_the_contract_generates(generator: ModuleType) -> None:
    assert generator.find_stale_stubs() == [], "run: python proto/generate.py"


def test_every_enum_starts_at_unspecified() -> None:
    for enum in enums():
        assert enum.values[0].number == 0
        assert enum.values[0].name.endswith("_UNSPECIFIED")


def test_every_duration_says_its_unit() -> None:
    for field in fields():
        words = field.name.split("_")
        if "latency" in words or "time" in words:
            assert words[-1] in ("ns", "base"), field.full_name


def test_every_field_and_value_has_a_comment() -> None:
    lines = (REPOSITORY / "proto" / "trocar" / "v1" / "tracking.proto").read_text().splitlines()
    for number, line in enumerate(lines):
        is_declaration = line.rstrip().endswith((";", "{", "{}")) and line.strip() not in ("", "}")
        if is_declaration and not line.startswith(("syntax", "package")):
            assert lines[number - 1].strip().startswith("//"), f"line {number + 1}: {line}"


def enums() -> Iterator[EnumDescriptor]:
    yield from pb.DESCRIPTOR.enum_types_by_name.values()


def fields() -> Iterator[FieldDescriptor]:
    for message in pb.DESCRIPTOR.message_types_by_name.values():
        yield from message.fields
