"""The architecture: what may import what. Arrows point from runtime to core to specs and errors."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import flock_ray

ROOT = Path(__file__).parents[2] / "flock_ray"
IMPURE = {"ray", "time", "random", "asyncio", "threading", "os", "socket", "kinship", "psutil", "subprocess"}

UNUSED_BY_HOSTS = {"nest", "registry", "events", "messages", "client", "lanes", "pending", "asks"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def files(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found
    return found


@pytest.mark.parametrize("path", files("core"), ids=lambda p: p.name)
def test_the_core_is_pure(path):
    assert not {name.split(".")[0] for name in imports(path)} & IMPURE
    assert not any(name.startswith("flock_ray.runtime") for name in imports(path))


@pytest.mark.parametrize("path", [ROOT / "specs.py", ROOT / "errors.py", ROOT / "config.py", ROOT / "notices.py"], ids=lambda p: p.name)
def test_the_vocabulary_imports_nothing_of_ours(path):
    assert not any(name.startswith("flock_ray") and not name.startswith("flock_ray.specs") for name in imports(path))


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_only_one_file_knows_the_failure_detector_and_one_rays_private_api(path):
    if path.name != "members.py":
        assert "kinship" not in imports(path)
    if path.name != "cluster.py":
        private = {name for name in imports(path) if name.startswith(("ray._", "ray.experimental"))}
        assert not private and "ray._private" not in path.read_text().replace("`ray._private", "")


def test_the_packages_lazy_names_are_those_that_type_checkers_see():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    seen = {alias.name: node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    for name in flock_ray.__all__:
        assert getattr(flock_ray, name) is getattr(importlib.import_module(seen[name]), name)
    assert set(flock_ray.__all__) == set(seen) - {"import_module", "TYPE_CHECKING"}


def test_a_host_loads_nothing_that_only_callers_or_nests_need():
    """A host is a new process: what it imports is paid by every start (benchmarks/starts.py)."""
    code = "import sys, flock_ray.runtime.host; print(*(name for name in sys.modules if name.startswith('flock_ray')))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not [name for name in loaded if name.startswith("flock_ray.api") or name.split(".")[-1] in UNUSED_BY_HOSTS]
