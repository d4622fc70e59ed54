"""The container and the composition of containers, read: no builder is needed, and none is promised."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


def test_the_container_runs_without_rights_and_says_how_it_is():
    lines = (ROOT / "Dockerfile").read_text()
    assert re.search(r"^ARG TORCH_INDEX=$", lines, re.MULTILINE)
    assert re.search(
        r'^RUN pip install \$\{TORCH_INDEX:\+--index-url "\$TORCH_INDEX"\} "torch', lines, re.MULTILINE
    )
    user, entry = lines.index("\nUSER 10001"), lines.index("\nENTRYPOINT")
    assert user < entry
    assert "\nUSER root" not in lines
    assert "/readyz" in lines[lines.index("\nHEALTHCHECK") :]
    copied = re.findall(r"^COPY (.+) \./", lines, re.MULTILINE)
    for name in " ".join(copied).split():
        assert (ROOT / name).exists(), name
        assert f"!{name}" in (ROOT / ".dockerignore").read_text().splitlines()


def test_the_composition_holds_no_password_and_opens_one_port_to_this_machine():
    found = yaml.safe_load((ROOT / "compose.yaml").read_text())
    services = found["services"]
    assert set(services) == {"deltaguard", "postgres", "store", "bucket"}
    assert [each["ports"] for each in services.values() if "ports" in each] == [["127.0.0.1:8000:8000"]]
    for service in services.values():
        for name, value in service.get("environment", {}).items():
            if "PASSWORD" in name or "SECRET" in name:
                assert value.startswith("${"), name
        assert set(service.get("depends_on", {})) <= set(services)
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            assert source.startswith("./") or source in found["volumes"]
