"""What we use of Ray's private API, so that a new Ray fails here and not at a user's (cluster.py says why each is needed)."""

from __future__ import annotations

import json

import ray
from ray.experimental import internal_kv

from flock_ray.runtime import cluster
from tests.support.waiting import eventually


def test_the_key_value_store_puts_once_gets_lists_and_deletes(flyground):
    put = internal_kv._internal_kv_put
    assert not put(b"t:1", b"a", overwrite=False, namespace=b"t")
    assert put(b"t:1", b"b", overwrite=False, namespace=b"t")  # said: it was there
    assert internal_kv._internal_kv_get(b"t:1", namespace=b"t") == b"a"
    put(b"t:1", b"c", overwrite=True, namespace=b"t")
    assert internal_kv._internal_kv_list(b"t:", namespace=b"t") == [b"t:1"]
    internal_kv._internal_kv_del(b"t:1", namespace=b"t")
    assert internal_kv._internal_kv_get(b"t:1", namespace=b"t") is None


def test_the_drivers_path_and_job_are_known(flyground):
    origin = cluster.origin()
    assert origin.job_id == ray.get_runtime_context().get_job_id()
    assert origin.runtime_env is None or json.loads(origin.runtime_env)
    assert origin.sys_path


def test_a_package_can_be_pinned(flyground):
    assert hasattr(ray._private.worker.global_worker.gcs_client, "pin_runtime_env_uri")
    cluster.pin([json.dumps({"env_vars": {"A": "b"}})])


def test_the_node_table_has_what_we_read(flyground):
    nodes = cluster.nodes()
    assert len(nodes) == 3
    assert all(node.cpus == 2 and node.raylet_port > 0 and node.ip for node in nodes.values())


def test_an_actors_death_is_known_without_a_call(flyground):
    class Plain:
        def ok(self):
            return True

    actor = ray.remote(num_cpus=0)(Plain).remote()
    assert ray.get(actor.ok.remote())
    is_dead = cluster.death_watch(actor)
    assert not is_dead()
    ray.kill(actor)
    eventually(is_dead, "Ray has told this process", deadline=10)
