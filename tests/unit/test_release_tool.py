"""`tools.release`: version and date get into all files or none, and a release that is not ready is found."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    "CHANGELOG.md": "# Log\n\n## Unreleased\n\n### Added\n\n- A verb.\n\n## 0.1.0 - 2026-01-01\n\n- All.\n",
    "CITATION.cff": "cff-version: 1.2.0\nversion: 0.1.0\ndate-released: 2026-01-01\nyear: 2025\n",
    "pyproject.toml": '[project]\nversion = "0.1.0"\ntarget-version = "py311"\n',
    "README.md": "# It\n\n`pip install it`. [Limits](https://it.example/limits), [below](#below).\n",
}


@pytest.fixture
def release(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from tools import release

    return release


@pytest.fixture
def root(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def texts(root):
    return {name: (root / name).read_text() for name in FILES}


def test_a_release_is_prepared_and_told(release, root, capsys):
    release.prepare(root, "0.2.0", "2026-02-03")
    assert texts(root) == {
        "CHANGELOG.md": FILES["CHANGELOG.md"].replace(
            "## Unreleased\n", "## Unreleased\n\n## 0.2.0 - 2026-02-03\n"
        ),
        "CITATION.cff": "cff-version: 1.2.0\nversion: 0.2.0\ndate-released: 2026-02-03\nyear: 2025\n",
        "pyproject.toml": FILES["pyproject.toml"].replace("0.1.0", "0.2.0"),
        "README.md": FILES["README.md"],
    }
    assert release.main(["notes"], root=root) == 0
    assert capsys.readouterr().out == "### Added\n\n- A verb.\n"


def test_a_later_day_renews_the_date_alone(release, root):
    release.prepare(root, "0.2.0", "2026-02-03")
    before = texts(root)
    release.prepare(root, "0.2.0", "2026-02-04")
    assert texts(root) == {name: text.replace("02-03", "02-04") for name, text in before.items()}


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        (
            "CITATION.cff",
            "2026-01-01",
            "2026-01-02",
            "CITATION.cff has date 2026-01-02, CHANGELOG.md 2026-01-01",
        ),
        ("pyproject.toml", "0.1.0", "0.1.1", "pyproject.toml has version 0.1.1, CHANGELOG.md 0.1.0"),
        ("CHANGELOG.md", "### Added", "- Another.", "changes under Unreleased"),
        ("CHANGELOG.md", "## 0.1.0 - 2026-01-01", "", "no section of a release"),
        ("CITATION.cff", "version: 0.1.0", "", "0 places for the version"),
        ("README.md", "https://it.example/limits", "docs/limits.md", "1 links that lead nowhere on PyPI"),
        ("README.md", "`pip install it`", "`pip install .` from a clone", "installs from a clone"),
    ],
)
def test_what_is_not_ready_is_no_release(release, root, capsys, name, old, new, said):
    (root / name).write_text(FILES[name].replace(old, new))
    assert release.main(["notes"], root=root) == 1
    assert said in capsys.readouterr().err


def test_a_first_release_does_not_say_that_there_was_none(release, root):
    (root / "CHANGELOG.md").write_text(
        f"All changes. Nothing has been released yet.\n\n{FILES['CHANGELOG.md']}"
    )
    release.prepare(root, "0.2.0", "2026-02-03")
    assert (root / "CHANGELOG.md").read_text().startswith("All changes.\n")


def test_the_address_makes_links_whole(release, root, capsys):
    (root / "README.md").write_text("![It](docs/it.svg) [Limits](docs/limits.md), [below](#below)\n")
    (root / "pyproject.toml").write_text(
        FILES["pyproject.toml"] + '[project.urls]\nPaper = "https://p.example"\n'
    )
    (root / "CITATION.cff").write_text(FILES["CITATION.cff"] + "license: Apache-2.0\n")
    where = "https://github.com/acme/it"
    assert release.main(["address", where], root=root) == 0
    found = texts(root)
    assert found["README.md"] == (
        f"![It]({where}/raw/main/docs/it.svg) [Limits]({where}/blob/main/docs/limits.md), [below](#below)\n"
    )
    urls = tomllib.loads(found["pyproject.toml"])["project"]["urls"]
    assert urls == {
        "Repository": where,
        "Changelog": f"{where}/blob/main/CHANGELOG.md",
        "Paper": "https://p.example",
    }
    assert f'repository-code: "{where}"\n' in found["CITATION.cff"]
    assert release.main(["address", where], root=root) == 1
    assert "already" in capsys.readouterr().err
    assert release.main(["address", "acme/it"], root=root) == 1


@pytest.mark.parametrize("version", ["v0.2.0", "0.2"])
def test_nothing_is_written_for_what_is_no_version(release, root, version):
    assert release.main(["prepare", version], root=root) == 1
    assert texts(root) == FILES


def test_the_lowest_releases_are_the_lower_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bounds = dict(requirement.split(">=") for requirement in project["dependencies"])
    lines = (ROOT / "requirements" / "lowest.txt").read_text(encoding="utf-8").splitlines()
    lowest = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert lowest.keys() == bounds.keys()
    for name, bound in bounds.items():
        assert re.fullmatch(re.escape(bound) + r"(\.0)*", lowest[name])


def test_the_maintainers_loop_asks_for_every_action_that_the_workflows_use():
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / ".github").rglob("*.yml"))
    used = {line for line in re.findall(r"uses: ([^\n]+)", text) if not line.startswith("./")}
    page = (ROOT / "docs" / "releasing.md").read_text(encoding="utf-8")
    asked = re.search(r"grep -rhoE 'uses: ([^']+)'", page)
    assert asked
    assert used
    assert all(re.fullmatch(asked[1], line) for line in used)
    assert f"pin {['no', 'one', 'two', 'three', 'four', 'five', 'six', 'seven'][len(used)]} actions" in page
