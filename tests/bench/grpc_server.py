"""A stand-in for etcd's gRPC face on a loopback socket: answers every unary call, or refuses it."""

import contextlib
import socket
import threading
from collections.abc import Iterator

from shardkv_bench import grpc_wire as wire


class Server:
    """Answers each call with ``answer``; with None it answers as a refused call: an end without a message."""

    def __init__(self, answer: bytes | None = b"") -> None:
        self.answer = answer
        self.calls = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._connections: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._connections.append(connection)
                self._threads.append(threading.Thread(target=self._serve, args=(connection,), daemon=True))
                self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection.sendall(wire.frame(wire.SETTINGS, 0, 0))
            buffer = b""
            while data := connection.recv(1 << 16):
                buffer, answer = self.answered(buffer + data)
                connection.sendall(answer)

    def answered(self, data: bytes) -> tuple[bytes, bytes]:
        """What is left of ``data``, and what is sent for the rest."""
        data = data.removeprefix(wire.PREFACE)
        out = []
        received = 0
        while len(data) >= 9:
            length, kind, flags = int.from_bytes(data[:3], "big"), data[3], data[4]
            stream = int.from_bytes(data[5:9], "big")
            if len(data) < 9 + length:
                break
            data = data[9 + length :]
            if kind == wire.DATA:
                received += length
                if flags & wire.END_STREAM:
                    self.calls += 1
                    out.append(self.reply(stream))
        if received:
            out.append(wire.frame(wire.WINDOW_UPDATE, 0, 0, received.to_bytes(4, "big")))
        return data, b"".join(out)

    def reply(self, stream: int) -> bytes:
        end = wire.frame(wire.HEADERS, wire.END_HEADERS | wire.END_STREAM, stream, b"\x88")
        if self.answer is None:
            return end
        message = b"\0" + len(self.answer).to_bytes(4, "big") + self.answer
        return (
            wire.frame(wire.HEADERS, wire.END_HEADERS, stream, b"\x88")
            + wire.frame(wire.DATA, 0, stream, message)
            + end
        )

    def close(self) -> None:
        for each in (self._listener, *self._connections):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for thread in self._threads:
            thread.join(10)


@contextlib.contextmanager
def serving(answer: bytes | None = b"") -> Iterator[Server]:
    server = Server(answer)
    try:
        yield server
    finally:
        server.close()
