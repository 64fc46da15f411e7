"""Write the locks of the CPU image: every package with its version and its hash.

`requirements-cpu.txt` has what comes as wheels, `requirements-source.txt` what is built in the image, and
`sbom.cdx.json` is the bill of materials of both (CycloneDX).

    python deploy/lock.py            # from the packages of this environment, which must be complete
    python deploy/lock.py --check    # whether the files hold what pyproject.toml asks for

The hashes are those of the artifacts that pip takes for Python 3.11 on this platform.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[1]
WHEELS = Path(__file__).with_name("requirements-cpu.txt")
SOURCES = Path(__file__).with_name("requirements-source.txt")
BILL = Path(__file__).with_name("sbom.cdx.json")
EXTRAS = ("tracing",)
BUILD_TOOLS = ("hatchling", "setuptools", "wheel")
"""Installed like the rest, so that nothing is fetched unseen while something is built."""
LEFT_OUT = ("openvino-telemetry",)
"""Packages that others ask for and work without: this one would report to Google Analytics."""
HEADER = """\
# Written by deploy/lock.py for Python 3.11 on Linux, x86-64: do not edit.
# torch is the CPU build, which PyTorch publishes on an index of its own.
"""


def list_requirements() -> list[Requirement]:
    """What pyproject.toml asks for, for the image."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *BUILD_TOOLS]
    for extra in EXTRAS:
        texts += project["optional-dependencies"][extra]
    return [Requirement(text) for text in texts]


def find_versions(requirements: list[Requirement]) -> dict[str, str]:
    """Name and version of all that the requirements come to, as installed here."""
    versions: dict[str, str] = {}
    waiting = list(requirements)
    while waiting:
        requirement = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if requirement.name in LEFT_OUT:
            continue
        installed = distribution(requirement.name)
        if not requirement.specifier.contains(installed.version, prereleases=True):
            sys.exit(f"{requirement.name} {installed.version} is installed: expected {requirement}")
        name = canonicalize_name(requirement.name)
        if name not in versions:
            versions[name] = installed.version
            waiting += map(Requirement, installed.requires or ())
    return dict(sorted(versions.items()))


def find_artifacts(versions: dict[str, str]) -> dict[str, tuple[str, bool]]:
    """SHA-256 of the artifact that pip takes for each, and whether that is a wheel."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "-q", "--dry-run", "--ignore-installed"]
        # sam2 is built from source, and asks for the torch that is here.
        command += ["--no-deps", "--no-build-isolation", "--report", str(report)]
        subprocess.run([*command, *(f"{name}=={version}" for name, version in versions.items())], check=True)
        found = json.loads(report.read_text())["install"]
    artifacts: dict[str, tuple[str, bool]] = {}
    for one in found:
        download = one["download_info"]
        is_wheel = download["url"].partition("#")[0].endswith(".whl")
        name = canonicalize_name(one["metadata"]["name"])
        artifacts[name] = (download["archive_info"]["hashes"]["sha256"], is_wheel)
    return artifacts


def write_locks() -> None:
    """Write both files anew."""
    versions = find_versions(list_requirements())
    artifacts = find_artifacts(versions)
    for path, wants_wheels in ((WHEELS, True), (SOURCES, False)):
        lines = [
            f"{name}=={version} --hash=sha256:{artifacts[name][0]}\n"
            for name, version in versions.items()
            if artifacts[name][1] == wants_wheels
        ]
        path.write_text(HEADER + "".join(lines))


def write_bill() -> None:
    """Write the bill of materials of the locks."""
    tool = [sys.executable, "-m", "cyclonedx_py", "requirements"]
    command = [*tool, "--of", "JSON", "--output-reproducible", "-"]
    locks = WHEELS.read_text() + SOURCES.read_text()
    written = subprocess.run(command, input=locks, text=True, check=True, capture_output=True).stdout
    bill = json.loads(written)
    for component in [*bill["components"], *bill["metadata"]["tools"]["components"]]:
        # The tool names the index that it would have asked, not the one that the packages came from.
        component.pop("externalReferences", None)
    BILL.write_text(json.dumps(bill, indent=1) + "\n")


def find_unlocked() -> list[str]:
    """Requirements of pyproject.toml that the files do not meet."""
    locked = {}
    for line in (WHEELS.read_text() + SOURCES.read_text()).splitlines():
        if not line.startswith("#"):
            name, _, version = line.split()[0].partition("==")
            locked[canonicalize_name(name)] = version
    return [
        str(requirement)
        for requirement in list_requirements()
        if not requirement.specifier.contains(locked.get(canonicalize_name(requirement.name), "0"))
    ]


def main() -> int:
    """Write or check the files."""
    parser = argparse.ArgumentParser(description="Pin the packages of the CPU image with their hashes.")
    parser.add_argument("--check", action="store_true", help="write nothing")
    if not parser.parse_args().check:
        write_locks()
        write_bill()
        return 0
    unlocked = find_unlocked()
    for text in unlocked:
        print(f"the locks do not hold {text}: run deploy/lock.py", file=sys.stderr)
    return 1 if unlocked else 0


if __name__ == "__main__":
    sys.exit(main())
