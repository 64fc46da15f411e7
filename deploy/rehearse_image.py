"""Execute the steps of the Dockerfile's target `cpu` in a clean Debian root, and start what comes of it.

    sudo python deploy/rehearse_image.py --root /var/tmp/trocar-image

For machines without a Docker engine: needs root, debootstrap, chroot and unshare. Every instruction is read
from the Dockerfile, so that the rehearsal cannot drift from it. At the end the entry point runs as the
image's user on a read-only root until the health check passes, and SIGTERM ends it.

What differs from an image: the base is debootstrap's minimal Debian 12 with its own Python 3.11 instead of
the official python image; stages share one kernel and one network with the host and there are no layers, no
namespaces for users and processes and no capability bounds; volumes are plain folders.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
TARGET = "cpu"
PACKAGES = "python3,python3-venv,ca-certificates"
HEALTHY_WITHIN_S = 300
HEALTH_INTERVAL_S = 5
STOP_WITHIN_S = 30
WITHOUT_TLS = ["--address", "127.0.0.1:50951", "--drain-s", "1"]
"""Instead of CMD, which names certificates that only a deployment has."""


@dataclass(kw_only=True)
class Stage:
    """A root on its way to an image."""

    name: str
    root: Path
    environment: dict[str, str] = field(default_factory=dict)
    folder: str = "/"
    user: str = "0"
    health: list[str] = field(default_factory=list)
    entry_point: list[str] = field(default_factory=list)


def read_instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Instructions and their arguments, in order, continuation lines joined."""
    text = re.sub(r"\\\n", " ", dockerfile.read_text())
    lines = [line.strip() for line in text.splitlines()]
    return [
        (name.upper(), rest.strip())
        for name, _, rest in (line.partition(" ") for line in lines if line and not line.startswith("#"))
    ]


class Rehearsal:
    """Builds the stages that one target needs.

    Args:
        folder: for the roots; tens of thousands of files.
        mirror: of Debian; empty for debootstrap's own.
        binds: folders of the host that pip needs, such as a local index.
    """

    def __init__(self, folder: Path, mirror: str, binds: list[Path]) -> None:
        self._folder = folder
        self._mirror = mirror
        self._binds = binds
        self._stages: dict[str, Stage] = {}
        self._arguments: dict[str, str] = {}

    def build(self, target: str) -> Stage:
        """Execute what the target needs, and nothing else."""
        groups: list[tuple[str, str, list[tuple[str, str]]]] = []
        for name, rest in read_instructions(REPOSITORY / "Dockerfile"):
            if name == "FROM":
                base, _, stage = rest.partition(" AS ")
                groups.append((base, stage, []))
            elif name == "ARG" and not groups:
                self._set_argument(rest)
            else:
                groups[-1][2].append((name, rest))
        needed = self._find_needed(target, groups)
        for base, stage, instructions in groups:
            if stage in needed:
                self._build_stage(base, stage, instructions)
        return self._stages[target]

    def _find_needed(self, target: str, groups: list[tuple[str, str, list[tuple[str, str]]]]) -> set[str]:
        needed: set[str] = set()
        waiting = [target]
        while waiting:
            stage = waiting.pop()
            needed.add(stage)
            base, _, instructions = next(group for group in groups if group[1] == stage)
            sources = [base] + [m[1] for _, rest in instructions if (m := re.match(r"--from=(\S+)", rest))]
            waiting += [one for one in sources if any(group[1] == one for group in groups)]
        return needed

    def _set_argument(self, rest: str) -> None:
        name, _, value = rest.partition("=")
        self._arguments[name] = os.environ.get(name, value)

    def _build_stage(self, base: str, name: str, instructions: list[tuple[str, str]]) -> None:
        print(f"== FROM {base} AS {name}", flush=True)
        stage = Stage(name=name, root=self._folder / name)
        if base in self._stages:
            parent = self._stages[base]
            subprocess.run(["cp", "-a", "--reflink=auto", str(parent.root), str(stage.root)], check=True)
            stage.environment, stage.folder = dict(parent.environment), parent.folder
            stage.user, stage.health, stage.entry_point = parent.user, parent.health, parent.entry_point
        else:
            self._make_base(stage.root)
            stage.environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        self._stages[name] = stage
        for instruction, rest in instructions:
            print(f"-- {instruction} {rest}", flush=True)
            self._execute(stage, instruction, rest)

    def _make_base(self, root: Path) -> None:
        base = self._folder / "debian"
        if not base.exists():
            command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(base)]
            subprocess.run(command + ([self._mirror] if self._mirror else []), check=True)
        subprocess.run(["cp", "-a", "--reflink=auto", str(base), str(root)], check=True)
        # Of the host: the network is shared.
        for file in ("/etc/resolv.conf", "/etc/pip.conf", "/etc/ssl/certs/ca-certificates.crt"):
            if Path(file).exists():
                (root / file[1:]).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, root / file[1:])

    def _execute(self, stage: Stage, instruction: str, rest: str) -> None:
        match instruction:
            case "RUN":
                self.run(stage, ["/bin/sh", "-c", rest], is_build=True)
            case "COPY":
                self._copy(stage, rest)
            case "WORKDIR":
                stage.folder = rest
                (stage.root / rest[1:]).mkdir(parents=True, exist_ok=True)
            case "ENV":
                for part in shlex.split(rest):
                    name, _, value = part.partition("=")
                    stage.environment[name] = self._expand(stage, value)
            case "ARG":
                self._set_argument(rest)
            case "USER":
                stage.user = rest
            case "HEALTHCHECK":
                stage.health = json.loads(rest.partition("CMD ")[2])
            case "ENTRYPOINT":
                stage.entry_point = json.loads(rest)
            case "EXPOSE" | "VOLUME" | "STOPSIGNAL" | "CMD":
                return
            case _:
                sys.exit(f"the Dockerfile has {instruction}, which this rehearsal does not know")

    def _expand(self, stage: Stage, value: str) -> str:
        return re.sub(r"\$\{?(\w+)\}?", lambda match: stage.environment.get(match[1], ""), value)

    def _copy(self, stage: Stage, rest: str) -> None:
        *sources, target = shlex.split(rest)
        origin = REPOSITORY
        if sources[0].startswith("--from="):
            origin = self._stages[sources.pop(0).partition("=")[2]].root
        goal = stage.root / target[1:] if target.startswith("/") else stage.root / stage.folder[1:] / target
        for source in sources:
            path = origin / source.lstrip("/")
            into = goal / path.name if target.endswith("/") else goal
            if path.is_dir():
                ignore = shutil.ignore_patterns("__pycache__")
                shutil.copytree(path, into, symlinks=True, dirs_exist_ok=True, ignore=ignore)
            else:
                into.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, into)

    def run(
        self, stage: Stage, command: list[str], *, is_build: bool = False, is_quiet: bool = False
    ) -> None:
        """Run a command in a stage's root, with what pip needs of the host while building."""
        script = ["mount -t proc proc $0/proc", "mount --rbind /dev $0/dev"]
        environment = dict(stage.environment)
        if is_build:
            for bind in self._binds:
                script += [f"mkdir -p $0{bind}", f"mount --bind {bind} $0{bind}"]
                # A step that writes there would write into the host.
                script.append(f"mount -o remount,ro,bind $0{bind}")
            environment |= {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
            environment |= {name: value for name, value in self._arguments.items() if value}
        quoted = shlex.join(command)
        script.append(f"exec chroot $0 /bin/sh -c {shlex.quote(f'cd {stage.folder} && exec {quoted}')}")
        outer = ["unshare", "--mount", "/bin/sh", "-ec", "\n".join(script), str(stage.root)]
        subprocess.run(outer, check=True, env=environment, stderr=subprocess.DEVNULL if is_quiet else None)


def try_out(rehearsal: Rehearsal, stage: Stage) -> None:
    """Start the image as its user on a read-only root, wait until it is healthy, end it.

    Raises:
        RuntimeError: it does not become healthy, its root can be written, or SIGTERM does not end it.
    """
    command = shlex.join([*stage.entry_point, *WITHOUT_TLS])
    script = [
        "mount --bind $0 $0",
        "mount --bind $0/var/lib/trocar $0/var/lib/trocar",
        "mount -t proc proc $0/proc",
        "mount --rbind /dev $0/dev",
        "mount -t tmpfs tmpfs $0/tmp",
        "mount -o remount,ro,bind $0",
        f"exec chroot --userspec={stage.user}:{stage.user} $0 /bin/sh -c {shlex.quote('exec ' + command)}",
    ]
    outer = ["unshare", "--mount", "/bin/sh", "-ec", "\n".join(script), str(stage.root)]
    process = subprocess.Popen(outer, env=stage.environment)
    try:
        wait_until_healthy(rehearsal, stage, process)
        check_confinement(process.pid, stage.user)
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(STOP_WITHIN_S)
    if code:
        raise RuntimeError(f"SIGTERM ended it with exit code {code}")
    print("SIGTERM ended it with exit code 0")


def wait_until_healthy(rehearsal: Rehearsal, stage: Stage, process: "subprocess.Popen[bytes]") -> None:
    """Run the image's own health check until it passes."""
    began_s = time.monotonic()
    while time.monotonic() - began_s < HEALTHY_WITHIN_S:
        time.sleep(HEALTH_INTERVAL_S)
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with exit code {process.returncode}")
        try:
            rehearsal.run(stage, stage.health, is_quiet=True)
        except subprocess.CalledProcessError:
            continue
        print(f"healthy after {time.monotonic() - began_s:.0f} s")
        return
    raise RuntimeError(f"not healthy within {HEALTHY_WITHIN_S} s")


def check_confinement(pid: int, user: str) -> None:
    """Look at the server through its own root: which user it is, and what it may write."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    users = next(line.split()[1:] for line in status if line.startswith("Uid:"))
    if set(users) != {user}:
        raise RuntimeError(f"it runs as {users}, expected {user}")
    try:
        Path("/proc", str(pid), "root", "probe").touch()
    except OSError as error:
        print(f"runs as user {user}; its root: {error.strerror}")
        return
    raise RuntimeError("its root can be written")


def main() -> int:
    """Rehearse."""
    parser = argparse.ArgumentParser(description="Execute the Dockerfile's CPU target in a clean root.")
    parser.add_argument("--root", type=Path, required=True, help="new folder, of some 4 GB")
    parser.add_argument("--mirror", default="", help="of Debian")
    parser.add_argument("--bind", type=Path, action="append", default=[], help="folder that pip needs")
    options = parser.parse_args()
    options.root.mkdir(parents=True, exist_ok=True)
    rehearsal = Rehearsal(options.root, options.mirror, options.bind)
    try:
        try_out(rehearsal, rehearsal.build(TARGET))
    except (subprocess.CalledProcessError, RuntimeError) as error:
        print(f"rehearsal failed: {error}", file=sys.stderr)
        return 1
    print(
        "differs from an image:",
        " ".join((__doc__ or "").rpartition("What differs from an image: ")[2].split()),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
