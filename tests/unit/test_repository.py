"""The repository keeps its own promises: public names, imports, module sizes, pages that point at what exists."""

import ast
import os
import re
import tomllib
from pathlib import Path

import pytest

import atoll

ROOT = Path(__file__).parents[2]
NOT_SOURCE = {".git", ".venv", ".atoll", "__pycache__", "build", "dist", "node_modules"}
NOT_SOURCE |= {".pytest_cache", ".ruff_cache", ".import_linter_cache", ".hypothesis"}
HEADINGS = ["## Context", "## Decision", "## Measured reason", "## Consequences", "## What would reopen it"]


def sources() -> list[Path]:
    """Return the files that a clone would hold."""
    found: list[Path] = []
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in NOT_SOURCE and not name.endswith(".egg-info")]
        found += [Path(folder) / name for name in files if not name.endswith(".pyc")]
    return sorted(found)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


SOURCES = sources()
MODULES = [path for path in SOURCES if path.is_relative_to(ROOT / "src") and path.suffix == ".py"]
PAGES = [path for path in SOURCES if path.suffix == ".md"]
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("*.md"))


def test_the_public_names_are_exactly_those_declared() -> None:
    assert sorted(atoll.__all__) == atoll.__all__
    assert set(atoll.__all__) == set(atoll._HOME)
    assert len(atoll.__all__) <= 15


@pytest.mark.parametrize("name", atoll.__all__)
def test_each_public_name_resolves_to_something_that_bears_it(name: str) -> None:
    assert getattr(atoll, name).__name__ == name


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'atoll' has no attribute 'Taks'"):
        atoll.__getattr__("Taks")


# --- who may import what: import-linter sees packages, these see the rest


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path) -> set[str]:
    """Return every dotted name that a module imports wherever in it: `from a import b` counts as `a.b`."""
    names: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize(
    ("part", "owners"), [("ssl", ["atoll.boundary"]), ("safetensors.torch", ["atoll.inner", "atoll.tasks"])]
)
def test_a_part_of_a_package_is_imported_where_it_belongs(part: str, owners: list[str]) -> None:
    assert "torch.distributed" in imported(ROOT / "src/atoll/inner/mesh.py")
    word = part.rpartition(".")[2]
    likely = [path for path in MODULES if word in path.read_text(encoding="utf-8")]
    importers = [module(path) for path in likely if any(within(name, part) for name in imported(path))]
    assert [name for name in importers if not within(name, *owners)] == []


def test_no_module_is_loaded_by_a_name_made_at_run_time() -> None:
    """The one exception is `atoll` itself, for its own public names: contracts cannot see through the others."""
    calls = re.compile(r"\bimport_module\(|\b__import__\(|\brunpy\b")
    found = [module(path) for path in MODULES if calls.search(path.read_text(encoding="utf-8"))]
    assert found == ["atoll"]


# --- modules


def test_no_module_is_longer_than_400_lines() -> None:
    lengths = {
        relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES if path.suffix == ".py"
    }
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_every_module_opens_with_a_sentence_of_purpose() -> None:
    opening = re.compile(r'"""[^"\n]*[.:!?]')
    assert [relative(path) for path in MODULES if not opening.match(path.read_text(encoding="utf-8"))] == []


# --- pages


def test_no_file_names_a_path_of_the_machine_it_was_written_on() -> None:
    machine = re.compile(r"(?<![\w.~-])/(root|opt|work)/")
    named = [
        f"{relative(path)}:{number}: {line.strip()[:80]}"
        for path in SOURCES
        if path != Path(__file__)
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1)
        if machine.search(line)
    ]
    assert named == []


def test_decisions_are_numbered_without_a_gap() -> None:
    assert [path.name[:4] for path in DECISIONS] == [f"{number:03}-" for number in range(1, len(DECISIONS) + 1)]
    assert DECISIONS


@pytest.mark.parametrize("path", DECISIONS, ids=relative)
def test_every_decision_has_its_headings_its_date_and_half_a_page(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert lines[0].startswith(f"# {path.name[:3]} ")
    assert [line for line in lines if line.startswith("## ")] == HEADINGS
    assert re.search(r"^Accepted, [A-Z][a-z]+ 20\d\d\.$", text, re.MULTILINE)
    assert len(text.split()) <= 600


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_every_link_within_the_repository_leads_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (path.parent / target).exists()]
    assert missing == []


def test_the_version_is_told_once_and_the_changelog_knows_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == atoll.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[({re.escape(atoll.__version__)}|Unreleased)\]", changelog, re.MULTILINE)


def test_every_dependency_is_held_below_a_version_that_nobody_has_tried() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    assert {"ray", "data", "privacy", "postgres", "examples", "dev"} <= set(project["optional-dependencies"])
    assert [line for line in wanted if "<" not in line and "==" not in line] == []


def test_make_installs_the_torch_that_the_package_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (wanted,) = [line for line in project["dependencies"] if line.startswith("torch")]
    assert f"'{wanted}'" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_every_package_is_named_in_the_readmes_tree() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    packages = [path.name for path in (ROOT / "src" / "atoll").iterdir() if (path / "__init__.py").exists()]
    assert len(packages) >= 13
    assert [name for name in packages if f"{name}/" not in readme] == []
