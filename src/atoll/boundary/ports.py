"""What gRPC leaves undone with sockets: it shares a taken port without a word and cannot drop a silent peer."""

import contextlib
import os
import socket

from atoll.errors import Unavailable


def check_free(port: int) -> None:
    """Raise `Unavailable` when the port is taken: gRPC itself would share it with the other server and say nothing."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("127.0.0.1", port))
        except OSError as error:
            words = f"port {port} for sites: cannot be used ({error.strerror}); choose another with --site-port"
            raise Unavailable(words) from None


def cut(peer: str, port: int) -> None:
    """Close the connection of a silent ``peer`` ("ipv4:host:port") to our ``port``: gRPC has no word for it."""
    theirs = int(peer.rpartition(":")[2])
    for name in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as connection:
            if (connection.getpeername()[1:2], connection.getsockname()[1:2]) == ((theirs,), (port,)):
                connection.shutdown(socket.SHUT_RDWR)
