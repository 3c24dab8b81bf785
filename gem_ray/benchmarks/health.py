"""How soon a service answers `/healthz`: `python -m gem_ray.benchmarks.health HOST PORT SECONDS` prints each answer's.

A process of its own that waits on nothing else. An answer has come when the kernel has it: how long this process then
waits for a core is not the service's.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import time

EVERY_S = 0.02
_REQUEST = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
_SO_TIMESTAMPNS = 35  # Linux; the socket module has no name for it
_TIMEOUT_S = 60


def ask(host: str, port: int) -> float:
    """Seconds from a new connection to the answer.

    Raises:
        OSError: there was none.
    """
    with socket.socket() as connection:
        connection.settimeout(_TIMEOUT_S)
        connection.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        began = time.time_ns()
        connection.connect((host, port))
        connection.sendall(_REQUEST)
        answer, stamps, _, _ = connection.recvmsg(4096, 256)
        if not answer.startswith(b"HTTP/1.1 200"):
            raise OSError(f"/healthz answered {answer[:64]!r}")
        if not stamps:  # the kernel puts stamps on packets only a moment after the first socket asks for them
            return (time.time_ns() - began) / 1e9
        whole, nanoseconds = struct.unpack("qq", stamps[0][2][:16])
        return (whole * 10**9 + nanoseconds - began) / 1e9


def main(host: str, port: str, seconds: str) -> None:
    """Ask again and again; print the seconds of every answer as JSON."""
    end = time.monotonic() + float(seconds)
    answers = []
    with socket.socket() as keeps_stamps_on:
        keeps_stamps_on.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        while time.monotonic() < end:
            answers.append(ask(host, int(port)))
            time.sleep(EVERY_S)
    print(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
