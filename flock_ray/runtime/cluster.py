"""What Ray is asked: its nodes, its key-value store, named actors. The only file that uses Ray's private API.

Everything here may block while the head node cannot be reached (RAY_FACTS). So nothing on the path of a call, and no nest's event loop,
calls it directly: nests have a thread of their own for it, and clients keep what they were told.

Private API, each behind one function here and pinned by `tests/cluster/test_private_api.py`:
`ray.experimental.internal_kv` (a flock's record), `worker.gcs_client.pin_runtime_env_uri` (V3), `core_worker.get_job_config` (the
driver's `sys.path`), `ActorHandle._get_local_state` (whether an actor is known to be dead, without a call),
`services.canonicalize_bootstrap_address_or_die` (which cluster `ray.init("auto")` would join).
"""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.experimental import internal_kv
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from flock_ray.config import Config
from flock_ray.errors import FlockNotRunning
from flock_ray.runtime.actors import AsyncHostActor, HostActor, LightHostActor, NestActor
from flock_ray.specs import NodeRecord, Options, interleaved

NAMESPACE = "flock_ray"
HEAD_ANSWERS = 5.0  # seconds the head has to accept a connection
PIN_SECONDS = 3600  # how long a runtime_env's package is kept after its last renewal
CALLS_BY_RAY = 10_000  # that a host of light birds has under way at a time
BOOT_SECONDS = 90.0  # a nest is a new process on a machine that may be busy
AWAY = (ray.exceptions.GetTimeoutError, ray.exceptions.RpcError)  # what Ray raises, after a minute, where its head does not answer
_KV = b"flock_ray"
_HEAD = "node:__internal_head__"  # a resource that the head node alone has
_ACTOR_DEAD = 4  # Ray's ActorTableData.DEAD


# A flock's record in Ray's key-value store


@dataclass(frozen=True)
class FlockLife:
    """One life of a flock: from `init` to `destroy`. `secret` never leaves the cluster's own processes."""

    flock: str
    life: str
    config: Config
    secret: bytes
    ending: bool = False


def _key(flock: str) -> bytes:
    return b"flock:" + flock.encode()


def flock_life(flock: str) -> FlockLife | None:
    """The current life of a flock, if there is one."""
    packed = internal_kv._internal_kv_get(_key(flock), namespace=_KV)
    record: FlockLife | None = None if packed is None else pickle.loads(packed)
    return record


def put_address(life: str, node: str, address: str) -> None:
    """Says where a nest's member of the failure detector listens."""
    internal_kv._internal_kv_put(f"address:{life}:{node}".encode(), address.encode(), overwrite=True, namespace=_KV)


def addresses(life: str) -> list[str]:
    """Where the nests' members listen, or have listened."""
    keys = internal_kv._internal_kv_list(f"address:{life}:".encode(), namespace=_KV)
    found = [internal_kv._internal_kv_get(key, namespace=_KV) for key in keys]
    return [address.decode() for address in found if address]


def drop_address(life: str, node: str) -> None:
    internal_kv._internal_kv_del(f"address:{life}:{node}".encode(), namespace=_KV)


def put_rest(life: str, node: str, number: int) -> None:
    """Says that a node's nest, its life of this number, has left and is not to be started again as long as nobody needs it."""
    internal_kv._internal_kv_put(f"rest:{life}:{node}".encode(), str(number).encode(), overwrite=True, namespace=_KV)


def rests(life: str) -> dict[str, int]:
    """The nodes whose nests rest, with the numbers of the lives that have left."""
    prefix = f"rest:{life}:"
    keys = internal_kv._internal_kv_list(prefix.encode(), namespace=_KV)
    found = {key.decode().removeprefix(prefix): internal_kv._internal_kv_get(key, namespace=_KV) for key in keys}
    return {node: int(number) for node, number in found.items() if number}


def drop_rest(life: str, node: str) -> None:
    internal_kv._internal_kv_del(f"rest:{life}:{node}".encode(), namespace=_KV)


# Nodes


@dataclass(frozen=True)
class Node:
    """An alive node, as Ray's node table has it (M1)."""

    id: str
    ip: str
    raylet_port: int
    resources: tuple[tuple[str, float], ...]
    labels: tuple[tuple[str, str], ...]
    is_head: bool = False

    @property
    def cpus(self) -> float:
        return dict(self.resources).get("CPU", 0.0)


def nodes() -> dict[str, Node]:
    """The nodes that Ray lists alive, by id."""
    table: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]  # Ray has no types here
    return {
        row["NodeID"]: Node(
            row["NodeID"],
            row["NodeManagerAddress"],
            row["NodeManagerPort"],
            tuple(sorted((k, float(v)) for k, v in row["Resources"].items() if not k.startswith("node:"))),
            tuple(sorted(row.get("Labels", {}).items())),
            _HEAD in row["Resources"],
        )
        for row in table
        if row["Alive"]
    }


def initialized() -> bool:
    """Is Ray initialised in this process? Asked first: most of Ray's functions would start a cluster of their own."""
    return bool(ray.is_initialized())


def running_cluster(address: str) -> str:
    """The address of a cluster that runs, for `ray.init`: which neither starts one then, nor waits for the head of one that has ended.

    Args:
        address: as `ray.init` takes it: `ip:port`, `ray://ip:port`, or `auto`.

    Raises:
        ConnectionError: there is none; says where was looked.
    """
    if address.startswith("ray://"):
        found = address.removeprefix("ray://")
    else:
        from ray._private import services  # private: see the head of this file

        try:
            address = found = services.canonicalize_bootstrap_address_or_die(address)
        except (ConnectionError, ValueError) as error:
            raise ConnectionError("no Ray cluster runs on this machine, or more than one" if address == "auto" else str(error)) from error
    ip, _, port = found.rpartition(":")
    try:
        socket.create_connection((ip.strip("[]"), int(port)), HEAD_ANSWERS).close()
    except (OSError, ValueError) as error:
        raise ConnectionError(f"nobody answers at {found}") from error
    return address


def require_ray() -> None:
    if not initialized():
        raise FlockNotRunning("Ray is not initialised in this process; call ray.init() first, then flock_ray.init() or start()")


def node_id() -> str:
    return str(ray.get_runtime_context().get_node_id())


def _record_file(flock: str, node: str) -> Path:
    name = blake2b(flock.encode(), digest_size=12).hexdigest()
    return _folder("", node).parent / f"{node[:16]}-{name}.record"


def _is_ours(state: os.stat_result) -> bool:
    """Can nobody else change it?"""
    return state.st_uid == os.getuid() and not state.st_mode & 0o022


def leave_record(record: FlockLife) -> None:
    """Leaves the record for callers of this node: they find the nest without the head (C6). Only the owner may read it."""
    path = _record_file(record.flock, node_id())
    fresh = path.with_suffix(f".{os.getpid()}")
    fresh.unlink(missing_ok=True)
    if not _is_ours(path.parent.stat()):
        raise PermissionError(f"{path.parent} is not this user's own: the flock's record is not left there")
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as file:
        file.write(pickle.dumps(record))
    fresh.rename(path)


def remove_record(record: FlockLife) -> None:
    """The flock's life is over."""
    left = record_left(record.flock)
    if left is not None and left.life == record.life:
        _record_file(record.flock, node_id()).unlink(missing_ok=True)


def record_left(flock: str) -> FlockLife | None:
    """What the nest of this node has left; `None` if there is nothing that can be trusted."""
    try:
        with _record_file(flock, node_id()).open("rb") as file:
            state = os.fstat(file.fileno())
            if not _is_ours(state) or state.st_mode & 0o044:
                return None
            record: FlockLife = pickle.load(file)
            return record
    except (OSError, EOFError, pickle.UnpicklingError, AttributeError):
        return None


def session_directory(life: str) -> Path:
    """Where the processes of a flock on this node leave what its next nest has to find; only the owner may enter."""
    path = _folder(life, node_id())
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def _folder(life: str, node: str) -> Path:
    context = ray.get_runtime_context()
    return Path(context.get_temp_dir(), context.get_session_name(), "flock_ray", life, node[:16])


# Nests


def nest_name(life: str, node: str) -> str:
    return f"nest:{life}:{node}"


def start_nest(record: FlockLife, node: str) -> ActorHandle[Any]:
    """Starts the nest of a node, or finds it. Only from a process with a bare runtime_env: an actor inherits it (V3)."""
    options: dict[str, Any] = {
        "name": nest_name(record.life, node),
        "namespace": NAMESPACE,
        "get_if_exists": True,
        "lifetime": "detached",
        "max_restarts": -1,
        "max_task_retries": 0,
        "num_cpus": 0,
        "max_concurrency": 100_000,  # long polls wait in it
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
    }
    actor: Any = ray.remote(NestActor)
    handle: ActorHandle[Any] = actor.options(**options).remote(pickle.dumps(record), node)
    return handle


def nest_handle(life: str, node: str) -> ActorHandle[Any]:
    """Raises ValueError if there is no such nest."""
    return ray.get_actor(nest_name(life, node), namespace=NAMESPACE)


def _boot(flock: str, node: str) -> None:
    """Starts a nest from a driver process of its own, whose runtime_env is bare: nothing else makes an actor's so (RAY_FACTS)."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") or k.startswith(("RAY_AUTH", "RAY_USE_TLS", "RAY_TLS"))}
    package = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, environment.get("PYTHONPATH", "")]))
    environment["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    command = [sys.executable, "-m", "flock_ray.runtime.boot", ray.get_runtime_context().gcs_address, flock, node]
    try:
        done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=BOOT_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        text = f"the first nest of flock {flock!r} did not start in {BOOT_SECONDS:g} s; is the cluster's head reachable?"
        raise FlockNotRunning(text) from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason was given"])[-1]
        raise FlockNotRunning(f"the first nest of flock {flock!r} could not be started ({last}); is flock_ray installed on the nodes?")


def is_bare() -> bool:
    return not dict(ray.get_runtime_context().runtime_env)


_nests: dict[str, tuple[str, ActorHandle[Any]]] = {}
_records: dict[str, FlockLife] = {}
_lock = threading.Lock()


def ensure_flock(flock: str, settings: Mapping[str, Any]) -> Config:
    """Creates a flock's life and the nest of this node, if they are not there, and waits until the nest is ready.

    Raises:
        FlockNotRunning: Ray is not initialised, or the flock is just being destroyed.
        ValueError: a setting is impossible, or the flock runs with another.
        TypeError: a setting is unknown.
    """
    require_ray()
    config = Config().with_settings(**settings)
    record = flock_life(flock)
    if record is not None and record.ending and not _ended(record):
        raise FlockNotRunning(f"flock {flock!r} is being destroyed; try again when that is done")
    if record is None or record.ending:
        record = _begin_life(flock, record, config)
    for name, value in settings.items():
        running = getattr(record.config, name)
        if running != value:
            raise ValueError(f"flock {flock!r} runs with {name}={running!r}, not {value!r}; a flock's settings are fixed until destroy()")
    me = node_id()
    if is_bare():
        nest = start_nest(record, me)
    else:
        _boot(flock, me)
        nest = nest_handle(record.life, me)
    _wait_ready(flock, nest)
    with _lock:
        _records[flock], _nests[flock] = record, (record.life, nest)
    return record.config


def _begin_life(flock: str, ended: FlockLife | None, config: Config) -> FlockLife:
    """The life that follows on another. Of several processes that begin one at once, all get the same."""
    successor = b"after:" + (ended.life if ended is not None else flock).encode()
    fresh = FlockLife(flock, uuid.uuid4().hex[:12], config, os.urandom(32))
    internal_kv._internal_kv_put(successor, pickle.dumps(fresh), overwrite=False, namespace=_KV)
    begun: FlockLife = pickle.loads(internal_kv._internal_kv_get(successor, namespace=_KV))
    internal_kv._internal_kv_put(_key(flock), pickle.dumps(begun), overwrite=ended is not None, namespace=_KV)
    return begun


def _wait_ready(flock: str, nest: ActorHandle[Any]) -> None:
    deadline = time.monotonic() + BOOT_SECONDS
    while True:
        try:
            ray.get(nest.ready.remote(), timeout=max(deadline - time.monotonic(), 1.0))
            return
        except ray.exceptions.ActorUnavailableError:
            if time.monotonic() > deadline:
                raise FlockNotRunning(f"the nest of this node did not become ready in {BOOT_SECONDS:g} s; see its log") from None
            time.sleep(0.2)
        except (ray.exceptions.RayError, TimeoutError) as error:
            raise FlockNotRunning(f"the nest of this node for flock {flock!r} does not run: {error}; see its log") from error


def local_nest(flock: str, timeout: float) -> ActorHandle[Any]:
    """The nest of this node, or while it is not there yet another node's.

    Raises:
        FlockNotRunning: Ray is not initialised, or has lost what its head knew, or the flock was never started, or is being destroyed.
    """
    require_ray()
    known = _nests.get(flock)
    if known is not None:
        return known[1]
    try:
        return _look_for_nest(flock, timeout)
    except ray.exceptions.RayError as error:  # above all `AuthenticationError`, what a head that has forgotten its cluster answers
        text = f"Ray does not say where the nests of flock {flock!r} are; did its head restart without Redis? ({error})"
        raise FlockNotRunning(text) from error


def _look_for_nest(flock: str, timeout: float) -> ActorHandle[Any]:
    record = flock_life(flock)
    if record is None or record.ending:
        state = "is not running" if record is None or _ended(record) else "is being destroyed"
        raise FlockNotRunning(f"flock {flock!r} {state}; call flock_ray.init() or start a bird first")
    nest = _find_nest(record, timeout)
    with _lock:
        _records[flock], _nests[flock] = record, (record.life, nest)
    return nest


def _find_nest(record: FlockLife, timeout: float) -> ActorHandle[Any]:
    deadline = time.monotonic() + min(timeout, 5.0)
    while True:
        try:
            return nest_handle(record.life, node_id())
        except ValueError:
            if time.monotonic() < deadline:
                time.sleep(0.1)
                continue
        for node in nodes():
            try:
                return nest_handle(record.life, node)
            except ValueError:
                continue
        raise FlockNotRunning(f"no nest of flock {record.flock!r} can be found; call flock_ray.init()")


def folder_of(record: FlockLife, node: str) -> Path:
    """Where nest and hosts of a node have their Unix sockets, if the node is on this machine."""
    return _folder(record.life, node)


def remember(record: FlockLife) -> None:
    """Its nest was found."""
    with _lock:
        _records[record.flock] = record


def record_of(flock: str) -> FlockLife | None:
    """The record of a flock whose nest was found."""
    return _records.get(flock)


def is_ray_client() -> bool:
    """Is this process's Ray a Ray Client (`ray://`), which is not on the cluster's network?"""
    return bool(ray.util.client.ray.is_connected())  # type: ignore[no-untyped-call]  # Ray has no types here


def config_of(flock: str) -> Config:
    """The settings of a flock whose nest was found."""
    return _records[flock].config


def forget(flock: str) -> None:
    """Drops what this process keeps of a flock."""
    with _lock:
        _nests.pop(flock, None)
        _records.pop(flock, None)


# Hosts


@cache
def _host_class(is_async: bool, light: bool) -> Any:
    """The actor class of a host. Made once: Ray exports each one it is given, and every new process would fetch it anew."""
    make: Any = ray.remote
    return make(concurrency_groups={"ctl": 2})(LightHostActor if light else AsyncHostActor if is_async else HostActor)


def start_host(
    name: str,
    boot: bytes,
    nest: ActorHandle[Any],
    node: str,
    options: Options,
    is_async: bool,
    light: bool,
    env: str | None,
    *,
    again: bool = False,
) -> ActorHandle[Any]:
    """Starts the process for one bird, or for light birds, on a node, under the runtime_env of who started the bird (V3).

    With `again` an earlier try may have come through.
    """
    ray_options: dict[str, Any] = {
        "name": name,
        "namespace": NAMESPACE,
        "get_if_exists": again,
        "lifetime": "detached",
        "max_restarts": 0,
        "max_task_retries": 0,
        "num_cpus": options.num_cpus,
        "num_gpus": options.num_gpus,
        "resources": dict(options.resources),
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
    }
    if options.memory:
        ray_options["memory"] = int(options.memory)
    if options.accelerator_type:
        ray_options["accelerator_type"] = options.accelerator_type
    if env:
        ray_options["runtime_env"] = json.loads(env)
    # An async actor's `max_concurrency` bounds what interleaves; a plain one's threads run methods side by side.
    ray_options["max_concurrency"] = CALLS_BY_RAY if light else interleaved(options) if is_async else options.max_concurrency
    cls = _host_class(is_async, light)
    handle: ActorHandle[Any] = cls.options(**ray_options).remote(boot, nest)
    return handle


_hosts: dict[str, ActorHandle[Any]] = {}


def host_handle(name: str) -> ActorHandle[Any]:
    """A host by name, kept for the next time.

    Raises:
        ValueError: it is gone.
    """
    handle = _hosts.get(name)
    if handle is None:
        require_ray()
        handle = _hosts[name] = ray.get_actor(name, namespace=NAMESPACE)
    return handle


def forget_host(name: str) -> None:
    _hosts.pop(name, None)


def death_watch(handle: ActorHandle[Any]) -> Callable[[], bool] | None:
    """Asks what Ray has told this process of an actor's death: 0.3 us, and no message. `None` under Ray Client, whose handles differ."""
    state = getattr(handle, "_get_local_state", None) if isinstance(handle, ActorHandle) else None
    return None if state is None else lambda: state() == _ACTOR_DEAD


# What a starter brings along


@dataclass(frozen=True)
class Origin:
    """The surroundings of whoever starts a bird: they are its class's surroundings on every node (V3)."""

    runtime_env: str | None  # JSON, with packages uploaded
    job_id: str
    sys_path: tuple[str, ...]


def origin() -> Origin:
    context = ray.get_runtime_context()
    env = dict(context.runtime_env)
    worker: Any = ray._private.worker.global_worker  # private: see the head of this file
    core = getattr(worker, "core_worker", None)
    path: tuple[str, ...] = ()
    if core is not None:
        path = tuple(dict.fromkeys(p for p in core.get_job_config().py_driver_sys_path if p))
    return Origin(json.dumps(env, sort_keys=True) if env else None, context.get_job_id(), path)


def pin(envs: list[str]) -> None:
    """Keeps the packages of these runtime_envs for another `PIN_SECONDS`: no process needed, unlike a keeper actor."""
    worker: Any = ray._private.worker.global_worker  # private: see the head of this file
    for env in envs:
        fields = json.loads(env)
        for uri in [fields.get("working_dir"), *(fields.get("py_modules") or ())]:
            if isinstance(uri, str) and uri.startswith("gcs://"):
                worker.gcs_client.pin_runtime_env_uri(uri, PIN_SECONDS)


def request_resources(bundles: list[dict[str, float]]) -> None:
    """Tells Ray's autoscaler what cannot be placed."""
    from ray.autoscaler.sdk import request_resources as ask

    ask(bundles=bundles)


def node_record(life: Any, node: Node, address: str) -> NodeRecord:
    return NodeRecord(life, node.cpus, node.resources, node.labels, address)


# The end


def destroy(flock: str, timeout: float = 60.0) -> None:
    """Ends a flock everywhere: its life is marked as ending first, so that nothing of it starts anything any more (V4).

    The mark stays until another life takes its place: to remove it might remove the record of that one.

    Raises:
        FlockNotRunning: there is no such flock.
    """
    require_ray()
    record = flock_life(flock)
    if record is None or (record.ending and _ended(record)):
        raise FlockNotRunning(f"flock {flock!r} is not running, so there is nothing to destroy")
    ending = FlockLife(record.flock, record.life, record.config, record.secret, ending=True)
    internal_kv._internal_kv_put(_key(flock), pickle.dumps(ending), overwrite=True, namespace=_KV)
    forget(flock)
    deadline = time.monotonic() + timeout
    for nest in _living_nests(record):
        nest.destroy.remote()
    while not _ended(record):
        if time.monotonic() > deadline:
            for node in nodes():
                _kill(lambda node=node: nest_handle(record.life, node))  # type: ignore[misc]  # bound at once
            break
        time.sleep(0.1)


def _living_nests(record: FlockLife) -> list[ActorHandle[Any]]:
    found = []
    for node in nodes():
        try:
            found.append(nest_handle(record.life, node))
        except ValueError:
            continue
    return found


def _ended(record: FlockLife) -> bool:
    return not _living_nests(record)


def _kill(find: Callable[[], ActorHandle[Any]]) -> None:
    try:
        ray.kill(find())
    except ValueError:
        return
