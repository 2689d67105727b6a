"""The architecture: what may import what. Arrows point from runtime to core to specs and errors."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "flock_ray"
IMPURE = {"ray", "time", "random", "asyncio", "threading", "os", "socket", "kinship", "psutil", "subprocess"}


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


@pytest.mark.parametrize("path", [ROOT / "specs.py", ROOT / "errors.py", ROOT / "config.py"], ids=lambda p: p.name)
def test_the_vocabulary_imports_nothing_of_ours(path):
    assert not any(name.startswith("flock_ray") for name in imports(path))


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_only_one_file_knows_the_failure_detector_and_one_rays_private_api(path):
    if path.name != "members.py":
        assert "kinship" not in imports(path)
    if path.name != "cluster.py":
        private = {name for name in imports(path) if name.startswith(("ray._", "ray.experimental"))}
        assert not private and "ray._private" not in path.read_text().replace("`ray._private", "")
