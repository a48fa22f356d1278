"""A fake cluster behind real sockets, in threads of its own: the client under test may run on any event loop."""

import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from shardkv.errors import ShardKVError
from shardkv.types import NodeId
from shardkv.wire import requests
from shardkv.wire.frames import FrameDecoder, FrameKind, encode_frame
from shardkv.wire.handshake import Welcome, decode_hello, encode_refused, encode_welcome
from shardkv.wire.requests import Method
from tests.client.fake_cluster import FakeCluster, FakeNode


class FakeServer:
    """Listens on loopback for every node of a cluster while the ``with`` block runs.

    ``receive_cut`` and ``send_cut`` end the next connection once that many bytes have been received or sent.
    ``refusal`` answers greetings. ``hold`` keeps answers back while it is set.
    """

    def __init__(self, cluster: FakeCluster | None = None, *, inflight_max: int = 1_000) -> None:
        self.cluster = cluster or FakeCluster(nodes=1)
        self.inflight_max = inflight_max
        self.receive_cut: int | None = None
        self.send_cut: int | None = None
        self.cuts = 0
        """Connections that the two end, counted before the client can know."""
        self.refusal: ShardKVError | None = None
        self.let_go = threading.Event()
        self.let_go.set()
        self.held = threading.Event()
        """Set once the answer to a write is being kept back."""
        self.connections = 0
        self._started_at = time.monotonic()
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._problems: list[BaseException] = []

    @property
    def addresses(self) -> str:
        return ",".join(node.address for node in self.cluster.nodes.values())

    def __enter__(self) -> Self:
        for node in self.cluster.nodes.values():
            listener = socket.create_server(("127.0.0.1", 0))
            node.address = f"127.0.0.1:{listener.getsockname()[1]}"
            self._sockets.append(listener)
            self._start(self._accept, listener, node)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.let_go.set()
        self.drop_connections()
        for each in self._sockets:
            each.close()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), "a server thread hangs"
        assert not self._problems, self._problems

    def drop_connections(self, *, listeners: bool = True) -> None:
        for each in self._sockets if listeners else self._sockets[len(self.cluster.nodes) :]:
            try:
                each.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def _start(self, function: Callable[..., None], *arguments: object) -> None:
        def run() -> None:
            try:
                function(*arguments)
            except OSError:
                pass
            except BaseException as error:
                self._problems.append(error)

        thread = threading.Thread(target=run, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket, node: FakeNode) -> None:
        while True:
            connection, _ = listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.connections += 1
            self._sockets.append(connection)
            self._start(self._serve, connection, node)

    def _serve(self, connection: socket.socket, node: FakeNode) -> None:
        with self._lock:
            receive_cut, self.receive_cut = self.receive_cut, None
            send_cut, self.send_cut = self.send_cut, None
        decoder = FrameDecoder()
        received = sent = 0
        with connection:
            while True:
                data = connection.recv(65_536 if receive_cut is None else min(65_536, receive_cut - received))
                if not data:
                    return
                received += len(data)
                self.cuts += received == receive_cut
                for kind, payload in decoder.feed(data):
                    answer = self._answer(node, kind, payload)
                    if not self.let_go.is_set():
                        # Others, as to a greeting or a lookup, are kept back too, but say nothing about the test's.
                        if kind is FrameKind.REQUEST and node.requests[-1].method == Method.WRITE:
                            self.held.set()
                        self.let_go.wait()
                    if send_cut is not None:
                        answer = answer[: send_cut - sent]
                    sent += len(answer)
                    self.cuts += sent == send_cut
                    connection.sendall(answer)
                    if sent == send_cut:
                        return
                if received == receive_cut:
                    return

    def _answer(self, node: FakeNode, kind: FrameKind, payload: bytes) -> bytes:
        with self._lock:
            self.cluster.now_ms = (time.monotonic() - self._started_at) * 1_000
            if kind is FrameKind.HELLO:
                decode_hello(payload)
                if self.refusal is not None:
                    return encode_refused(self.refusal)
                welcome = Welcome(
                    protocol_version=1,
                    cluster_id=self.cluster.cluster_id,
                    node_id=NodeId(node.id),
                    boot=1,
                    timestamp=self.cluster.clock,
                    inflight_max=self.inflight_max,
                )
                return encode_welcome(welcome)
            if kind is FrameKind.PING:
                return encode_frame(FrameKind.PONG, payload)
            assert kind is FrameKind.REQUEST, kind
            return encode_frame(FrameKind.RESPONSE, requests.join(node.serve(payload)))
