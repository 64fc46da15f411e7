"""Regenerate the Python stubs of the contract: `python proto/generate.py [--check]`.

The stubs are committed under service/trocar/v1. `--check` writes nothing and exits with 1 when they differ
from what the contract generates.
"""

import argparse
import sys
import tempfile
from importlib import resources
from pathlib import Path

from grpc_tools import protoc  # type: ignore[import-untyped]

REPOSITORY = Path(__file__).resolve().parent.parent
CONTRACT = "trocar/v1/tracking.proto"
STUBS_FOLDER = "trocar/v1"


class GenerationError(Exception):
    """The compiler refused the contract."""


def generate(root: Path) -> dict[str, bytes]:
    """Write the stubs under `root`/trocar/v1.

    Returns:
        The generated files by name.
    """
    well_known_types = resources.files("grpc_tools") / "_proto"
    # protoc finds the mypy plugins on PATH only when the virtualenv is active; name them instead.
    binaries = Path(sys.executable).parent
    arguments = [
        "protoc",
        f"-I{REPOSITORY / 'proto'}",
        f"-I{well_known_types}",
        f"--plugin=protoc-gen-mypy={binaries / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={binaries / 'protoc-gen-mypy_grpc'}",
        f"--python_out={root}",
        f"--grpc_python_out={root}",
        f"--mypy_out=quiet:{root}",
        f"--mypy_grpc_out=quiet:{root}",
        CONTRACT,
    ]
    if protoc.main(arguments) != 0:
        raise GenerationError(f"protoc refused {CONTRACT}; its message stands above")
    return read_stubs(root)


def read_stubs(root: Path) -> dict[str, bytes]:
    """Read the stubs under `root`/trocar/v1, by file name."""
    return {path.name: path.read_bytes() for path in sorted((root / STUBS_FOLDER).glob("tracking_pb2*"))}


def find_stale_stubs() -> list[str]:
    """Name the committed stubs that differ from what the contract generates."""
    committed = read_stubs(REPOSITORY / "service")
    with tempfile.TemporaryDirectory() as folder:
        fresh = generate(Path(folder))
    return sorted(name for name in committed.keys() | fresh.keys() if committed.get(name) != fresh.get(name))


def main() -> int:
    """Regenerate, or check, and say what was done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 on a difference")
    if not parser.parse_args().check:
        print("wrote", *generate(REPOSITORY / "service"))
        return 0
    stale = find_stale_stubs()
    if stale:
        print("differ from the contract:", *stale, "- run python proto/generate.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
