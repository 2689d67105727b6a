"""Cuts KubeRay's custom resource down to what scripts/kuberay.yaml uses: `raycluster.json`. Run it when either has changed:

    python -m tests.support.kuberay.trim PATH/ray.io_rayclusters.yaml v1.7.0

The resource is ray-operator/config/crd/bases/ray.io_rayclusters.yaml of github.com/ray-project/kuberay (Apache-2.0). Of a field that
the manifest has all rules are kept; of its neighbours the names, so that a misspelt field is found.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
SCHEMA = HERE / "raycluster.json"
MANIFEST = HERE.parents[2] / "scripts" / "kuberay.yaml"


def trim(schema: dict[str, Any], value: Any) -> dict[str, Any]:
    """What a schema says of a value, without its prose."""
    kept = {key: rule for key, rule in schema.items() if key not in ("description", "properties", "items") and not key.startswith("x-")}
    if schema.get("x-kubernetes-int-or-string"):
        kept["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if "properties" in schema:
        there = value if isinstance(value, dict) else {}
        kept["properties"] = {name: trim(rules, there[name]) if name in there else {} for name, rules in schema["properties"].items()}
        kept["additionalProperties"] = False
    elif isinstance(schema.get("additionalProperties"), dict):
        kept["additionalProperties"] = trim(schema["additionalProperties"], None)
    if "items" in schema:
        rules = [trim(schema["items"], item) for item in value or [None]]
        kept["items"] = rules[0]
        for more in rules[1:]:
            merge(kept["items"], more)
    return kept


def merge(into: dict[str, Any], other: dict[str, Any]) -> None:
    """Items of a list are alike: keeps the rules of fields that any of them has."""
    for key, rules in other.items():
        if isinstance(rules, dict) and isinstance(into.get(key), dict):
            merge(into[key], rules)
        else:
            into[key] = rules


def main(resource: str, version: str) -> None:
    crd = yaml.safe_load(Path(resource).read_text())
    (found,) = [each for each in crd["spec"]["versions"] if each["name"] == "v1"]
    schema = trim(found["schema"]["openAPIV3Schema"], yaml.safe_load(MANIFEST.read_text()))
    source = f"{Path(resource).name} of github.com/ray-project/kuberay {version}, Apache-2.0, cut down by trim.py"
    SCHEMA.write_text(json.dumps({"$comment": source, **schema}, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
