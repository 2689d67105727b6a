"""The ways to carry a call that `transports.py` compares. Each has a server, which runs calls on the thread that reads, and a client."""

from __future__ import annotations

import datetime
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

from flock_ray.core.connection import CALL
from flock_ray.runtime import tls
from flock_ray.runtime.listener import Listener
from flock_ray.runtime.replies import Down, NoAnswer, Urgency
from flock_ray.runtime.sockets import SocketLink

SECRET, LIFE = b"s" * 32, "0123456789ab"
ROOM = 100_000  # calls that may wait at a server
PATIENCE = 5.3  # seconds a caller waits for an answer
NOTE = "." * 113  # makes the call one of 150 bytes


# What is called


class Target:
    """Whose methods are called."""

    def add(self, n: int, note: str) -> int:
        del note
        return n + 1

    def hold(self, n: int, note: str) -> None:
        del n, note
        time.sleep(60.0)  # until it is killed


_TARGET = Target()


def call_of(n: int, method: str = "add") -> bytes:
    return pickle.dumps((method, (n,), {"note": NOTE}))


def answer_to(message: bytes | memoryview) -> bytes:
    method, args, kwargs = pickle.loads(message)
    return pickle.dumps(getattr(_TARGET, method)(*args, **kwargs))


# Transports


class Gone(Exception):
    """The library says that the server has gone."""


Wait = Callable[[], bytes]  # waits for one answer; raises `Gone`, or `TimeoutError` after `PATIENCE`


class Client(Protocol):
    """A caller's side. Answers are waited for in the order of their calls."""

    def ask(self, message: bytes, alone: bool) -> Wait:
        """Sends a call; `alone`: its answer is waited for at once."""
        ...

    def on_gone(self, tell: Callable[[], object]) -> None:
        """Has it called when the library says, beside the calls, that the server has gone."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Keys:
    """What the proofs need.

    Args:
        folder: has the certificate and its key, and takes Unix sockets.
        server, caller: public and secret key of CURVE.
    """

    folder: Path
    server: tuple[bytes, bytes] | None
    caller: tuple[bytes, bytes] | None

    @property
    def certificate(self) -> Path:
        return self.folder / "certificate.pem"

    @property
    def key(self) -> Path:
        return self.folder / "key.pem"


@dataclass(frozen=True)
class OwnFrames:
    """flock_ray's."""

    name: str
    local: bool = False
    encrypted: bool = False
    package = "flock_ray"

    def serve(self, keys: Keys, ready: Callable[[str], object]) -> None:
        path = keys.folder / f"{os.getpid()}.sock"
        context = self._contexts(keys)[0] if self.encrypted else None
        listener = Listener(SECRET, LIFE, path, "127.0.0.1", None, 1, ROOM, _call, lambda _: b"full", lambda _: b"", tls=context)
        listener.start()
        ready(listener.address)
        while True:
            signal.pause()

    def connect(self, keys: Keys, address: str) -> Client:
        context = self._contexts(keys)[1] if self.encrypted else None
        return _OwnClient(SocketLink(SECRET, LIFE, address, keys.folder if self.local else keys.folder / "nowhere", context))

    def _contexts(self, keys: Keys) -> Any:
        files = {"RAY_TLS_CA_CERT": keys.certificate, "RAY_TLS_SERVER_CERT": keys.certificate, "RAY_TLS_SERVER_KEY": keys.key}
        return tls.contexts({"RAY_USE_TLS": "1"} | {name: str(path) for name, path in files.items()})


def _call(caller: object, number: int, message: memoryview) -> bytes:
    del caller, number
    return answer_to(message)


class _OwnClient:
    def __init__(self, link: SocketLink) -> None:
        self._link: SocketLink | None = link

    def ask(self, message: bytes, alone: bool) -> Wait:
        reply = self._link.transmit(CALL, message, Urgency.NOW if alone else Urgency.SOON)

        def wait() -> bytes:
            try:
                return reply.get(PATIENCE).message
            except NoAnswer:
                raise TimeoutError from None
            except Down as error:
                raise Gone(str(error)) from None

        return wait

    def on_gone(self, tell: Callable[[], object]) -> None:
        """Nothing is told beside the calls: each is told."""

    def close(self) -> None:
        self._link = None  # a link that nobody has is closed


@dataclass(frozen=True)
class Zmq:
    """ZeroMQ's."""

    name: str
    local: bool = False
    curve: bool = False
    package = "zmq"

    def serve(self, keys: Keys, ready: Callable[[str], object]) -> None:
        import zmq

        sock = zmq.Context().socket(zmq.ROUTER)
        sock.set_hwm(0)  # no limit: 1,000 calls are in flight
        if self.curve:
            sock.curve_publickey, sock.curve_secretkey = keys.server
            sock.curve_server = True
        sock.bind(f"ipc://{keys.folder}/{os.getpid()}.zmq" if self.local else "tcp://127.0.0.1:*")
        ready(sock.getsockopt_string(zmq.LAST_ENDPOINT))
        while True:
            who, message = sock.recv_multipart()
            sock.send_multipart((who, answer_to(message)))

    def connect(self, keys: Keys, address: str) -> Client:
        import zmq

        sock = zmq.Context.instance().socket(zmq.DEALER)
        sock.set_hwm(0)
        sock.rcvtimeo = int(PATIENCE * 1000)
        if self.curve:
            sock.curve_serverkey = keys.server[0]
            sock.curve_publickey, sock.curve_secretkey = keys.caller
        sock.connect(address)
        return _ZmqClient(sock)


class _ZmqClient:
    def __init__(self, sock: Any) -> None:
        from zmq import Again

        self._sock, self._again = sock, Again

    def ask(self, message: bytes, alone: bool) -> Wait:
        del alone
        self._sock.send(message)
        return self._wait

    def _wait(self) -> bytes:
        try:
            return self._sock.recv()
        except self._again:
            raise TimeoutError from None

    def on_gone(self, tell: Callable[[], object]) -> None:
        import zmq

        monitor = self._sock.get_monitor_socket(zmq.EVENT_DISCONNECTED)

        def watch() -> None:
            if monitor.poll(PATIENCE * 1000):
                tell()

        threading.Thread(target=watch, daemon=True).start()

    def close(self) -> None:
        self._sock.disable_monitor()
        self._sock.close(linger=0)


@dataclass(frozen=True)
class Nng:
    """nanomsg's successor."""

    name: str
    local: bool = False
    encrypted: bool = False
    package = "pynng"

    def serve(self, keys: Keys, ready: Callable[[str], object]) -> None:
        from pynng import Rep0, TLSConfig

        sock = Rep0()
        if self.encrypted:
            sock.tls_config = self._tls(keys, TLSConfig.MODE_SERVER)
        if self.local:
            address = f"ipc://{keys.folder}/{os.getpid()}.nng"
            sock.listen(address)
            ready(address)
        else:
            scheme = "tls+tcp" if self.encrypted else "tcp"
            found = sock.listen(f"{scheme}://127.0.0.1:0").local_address
            ready(f"{scheme}://127.0.0.1:{str(found).rpartition(':')[2]}")
        while True:
            sock.send(answer_to(sock.recv()))

    def connect(self, keys: Keys, address: str) -> Client:
        from pynng import Req0, TLSConfig

        sock = Req0(resend_time=-1, recv_timeout=int(PATIENCE * 1000))  # resending, its default, would run a call twice
        if self.encrypted:
            sock.tls_config = self._tls(keys, TLSConfig.MODE_CLIENT)
        sock.dial(address, block=True)
        return _NngClient(sock)

    def _tls(self, keys: Keys, mode: int) -> Any:
        from pynng import TLSConfig

        own, key = keys.certificate.read_text(), keys.key.read_text()
        must = TLSConfig.AUTH_MODE_REQUIRED
        return TLSConfig(mode, server_name="localhost", ca_string=own, own_cert_string=own, own_key_string=key, auth_mode=must)


class _NngClient:
    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self._contexts: list[Any] = []
        self._free: list[Any] = []

    def ask(self, message: bytes, alone: bool) -> Wait:
        import pynng

        del alone
        if not self._free:
            self._free.append(self._sock.new_context())
            self._contexts.append(self._free[-1])
        context = self._free.pop()
        context.send(message)

        def wait() -> bytes:
            try:
                answer = context.recv()
            except pynng.Timeout:
                raise TimeoutError from None
            except pynng.ConnectionReset as error:
                raise Gone(str(error)) from None
            self._free.append(context)
            return answer

        return wait

    def on_gone(self, tell: Callable[[], object]) -> None:
        self._sock.add_post_pipe_remove_cb(lambda _: tell())

    def close(self) -> None:
        for context in self._contexts:
            context.close()
        self._sock.close()


Transport = OwnFrames | Zmq | Nng

TRANSPORTS: list[Transport] = [
    OwnFrames("own frames, Unix socket", local=True),
    OwnFrames("own frames, TCP"),
    OwnFrames("own frames, TCP with TLS", encrypted=True),
    Zmq("pyzmq, ipc", local=True),
    Zmq("pyzmq, tcp"),
    Zmq("pyzmq with CURVE, ipc", local=True, curve=True),
    Zmq("pyzmq with CURVE, tcp", curve=True),
    Nng("pynng, ipc", local=True),
    Nng("pynng, tcp"),
    Nng("pynng, tcp with TLS", encrypted=True),
]


def usable(only: str) -> list[Transport]:
    """Those that are installed, and are meant."""
    for package in ("zmq", "pynng"):
        if not find_spec(package):
            print(f"{package} is not installed, and left out", file=sys.stderr)
    found = [each for each in TRANSPORTS if only in each.name and find_spec(each.package)]
    if any(isinstance(each, Nng) and each.encrypted for each in found):
        import pynng

        try:
            pynng.TLSConfig(pynng.TLSConfig.MODE_CLIENT)
        except pynng.NNGException as error:
            print(f"pynng is built without TLS ({error}), and that is left out", file=sys.stderr)
            found = [each for each in found if not (isinstance(each, Nng) and each.encrypted)]
    return found


@contextmanager
def new_keys() -> Iterator[Keys]:
    with TemporaryDirectory(prefix="flock_ray_") as folder:
        pairs = [None, None]
        if find_spec("zmq"):
            import zmq

            if zmq.has("curve"):
                pairs = [zmq.curve_keypair(), zmq.curve_keypair()]
        keys = Keys(Path(folder), *pairs)
        _certify(keys)
        yield keys


def _certify(keys: Keys) -> None:
    """A certificate that is its own authority; both sides show it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    made = made.serial_number(x509.random_serial_number()).not_valid_before(now - day).not_valid_after(now + day)
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    keys.certificate.write_bytes(made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    keys.key.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
