"""What lies in deploy/ says what the code does: schemas, locks, flags and steps."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from trocar.cli import main
from trocar.errors import ConfigError
from trocar.security import read_allow_list

REPOSITORY = Path(__file__).resolve().parents[2]
DEPLOY = REPOSITORY / "deploy"
MANIFESTS = [one for one in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()) if one]
KUBERNETES_VERSION = "1.31"


@pytest.mark.parametrize("manifest", MANIFESTS, ids=[manifest["kind"] for manifest in MANIFESTS])
def test_manifest_fits_its_schema(manifest: dict[str, object]) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    validator.validate(manifest, KUBERNETES_VERSION, strict=True)


def test_schemas_refuse_what_is_wrong() -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    wrong = dict(MANIFESTS[0], spec={"clusterIPs": "None"})
    with pytest.raises(validator.ValidationError):
        validator.validate(wrong, KUBERNETES_VERSION, strict=True)


def serve_flags() -> set[str]:
    listed = subprocess.run(
        [sys.executable, "-m", "trocar.cli", "serve", "--help"], capture_output=True, text=True, check=True
    ).stdout
    return set(re.findall(r"--[a-z-]+", listed))


def test_flags_of_images_and_manifests_exist() -> None:
    known = serve_flags()
    for name in ("deploy/kubernetes.yaml", "deploy/compose.yaml", "Dockerfile"):
        text = (REPOSITORY / name).read_text()
        used = set(re.findall(r"^\s*- (--[a-z-]+)=", text, re.MULTILINE))
        if name == "Dockerfile":
            used = {
                argument
                for line in re.findall(r"^(?:ENTRYPOINT|CMD) (.*)$", text, re.MULTILINE)
                for argument in json.loads(line)
                if argument.startswith("--")
            }
        assert used, name
        assert used <= known, name


def test_pods_outlive_their_drain() -> None:
    pod = next(one for one in MANIFESTS if one["kind"] == "StatefulSet")["spec"]["template"]["spec"]
    drain = next(one for one in pod["containers"][0]["args"] if one.startswith("--drain-s="))
    cut_off_s = 5
    assert pod["terminationGracePeriodSeconds"] > float(drain.partition("=")[2]) + cut_off_s


def test_shipped_clients_can_be_read(tmp_path: Path) -> None:
    shipped = next(one for one in MANIFESTS if one["kind"] == "ConfigMap")["data"]["clients.json"]
    (tmp_path / "clients.json").write_text(shipped)
    assert read_allow_list(tmp_path / "clients.json").by_name["or-3.example"].max_streams == 2


def test_image_confines_its_process() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["trocar"]
    assert (compose["read_only"], compose["cap_drop"]) == (True, ["ALL"])
    stages = (REPOSITORY / "Dockerfile").read_text().split("\nFROM ")
    for stage in stages:
        if stage.startswith(("run AS cpu", "run AS cuda")):
            assert "USER 10001" in stage


def test_locks_hold_what_the_project_asks_for() -> None:
    subprocess.run([sys.executable, str(DEPLOY / "lock.py"), "--check"], check=True)


def test_every_locked_package_has_a_hash() -> None:
    for name in ("requirements-cpu.txt", "requirements-source.txt"):
        lines = [one for one in (DEPLOY / name).read_text().splitlines() if not one.startswith("#")]
        assert lines
        for line in lines:
            assert re.fullmatch(r"[a-z0-9-]+==\S+ --hash=sha256:[0-9a-f]{64}", line), line


def test_image_has_no_package_that_reports_elsewhere() -> None:
    locked = (DEPLOY / "requirements-cpu.txt").read_text()
    assert "\nopenvino==" in locked
    assert "openvino-telemetry" not in locked


def test_bill_of_materials_names_every_locked_package() -> None:
    components = json.loads((DEPLOY / "sbom.cdx.json").read_text())["components"]
    named = {(one["name"].lower().replace("_", "-"), one["version"]) for one in components}
    for name in ("requirements-cpu.txt", "requirements-source.txt"):
        for line in (DEPLOY / name).read_text().splitlines():
            if not line.startswith("#"):
                package, _, version = line.split()[0].partition("==")
                assert (package, version) in named


def test_open_address_without_tls_names_the_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(("serve", "--address", "0.0.0.0:0")) == 2
    assert "--tls-certificate" in capsys.readouterr().err


@pytest.mark.parametrize("page", ["hazards.md", "threat-model.md"])
def test_tests_that_the_docs_name_exist(page: str) -> None:
    named = set(re.findall(r"`(test_\w+)`", (REPOSITORY / "docs" / page).read_text()))
    sources = "\n".join(path.read_text() for path in (REPOSITORY / "tests").rglob("test_*.py"))
    assert named
    assert named <= set(re.findall(r"def (test_\w+)", sources))


def test_python_in_the_docs_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snippets = re.findall(
        r"^```python\n(.*?)^```", (REPOSITORY / "docs" / "deployment.md").read_text(), re.M | re.S
    )
    assert snippets
    monkeypatch.chdir(tmp_path)
    for snippet in snippets:
        # Up to the first file that only the reader has.
        with pytest.raises(ConfigError, match=r"ca\.crt"):
            exec(snippet, {})


def test_flags_that_the_docs_name_exist() -> None:
    named = set(re.findall(r"`(--[a-z-]+)", (REPOSITORY / "docs" / "deployment.md").read_text()))
    assert named - {"--target"} <= serve_flags()
