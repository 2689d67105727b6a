"""The files for Ray's cluster launcher and for KubeRay have the form that these want. cluster-local.yaml is also run: tests/launcher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml

from tests.support.kuberay.trim import MANIFEST, SCHEMA

SCRIPTS = MANIFEST.parent
RAY_SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


@pytest.fixture(params=["local", "aws", "gcp"])
def cluster(request: pytest.FixtureRequest) -> dict[str, Any]:
    return read(SCRIPTS / f"cluster-{request.param}.yaml")


def test_a_cluster_file_has_the_form_of_rays_schema(cluster: dict[str, Any]) -> None:
    jsonschema.validate(cluster, RAY_SCHEMA)
    with pytest.raises(jsonschema.ValidationError, match="setup_comands"):
        jsonschema.validate({**cluster, "setup_comands": []}, RAY_SCHEMA)


def test_what_a_cluster_file_mounts_is_there(cluster: dict[str, Any]) -> None:
    assert [source for source in cluster["file_mounts"].values() if not (SCRIPTS.parent / source).exists()] == []


def test_the_manifest_has_the_form_of_kuberays_custom_resource() -> None:
    schema = json.loads(SCHEMA.read_text())
    manifest = read(MANIFEST)
    jsonschema.validate(manifest, schema)
    for where, wrong in [(manifest["spec"], "gcsFaultTolerance"), (manifest["spec"]["headGroupSpec"]["template"]["spec"], "container")]:
        where[wrong] = {}
        with pytest.raises(jsonschema.ValidationError, match=f"'{wrong}' was unexpected"):
            jsonschema.validate(manifest, schema)
        del where[wrong]


def test_all_that_lets_ray_survive_a_split_is_set_everywhere(cluster: dict[str, Any]) -> None:
    spec = read(MANIFEST)["spec"]
    (head,) = spec["headGroupSpec"]["template"]["spec"]["containers"]
    (worker,) = spec["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    everywhere, on_the_head = "RAY_gcs_rpc_server_reconnect_timeout_s", "RAY_health_check_failure_threshold"
    assert {on_the_head: "1000", everywhere: "3600"} == {entry["name"]: entry["value"] for entry in head["env"]}
    assert {everywhere: "3600"} == {entry["name"]: entry["value"] for entry in worker["env"]}
    assert f"{on_the_head}=1000 {everywhere}=3600 ray start --head" in cluster["head_start_ray_commands"][-1]
    assert f"{everywhere}=3600 ray start --address" in cluster["worker_start_ray_commands"][-1]
