"""TLS for both ends of a connection: each proves by its certificate who it is, and no older version than 1.3 is spoken.

A hub is known by the name in its certificate and not by where it was dialled: the CA is the hub's own, and only the
hub's certificate is good for a server.
"""

import os
import socket
import ssl
import tempfile

from cryptography import x509

from atoll.boundary.identity import Identity, Peer, peer_of
from atoll.errors import Corrupt, Denied


def server_context(identity: Identity) -> ssl.SSLContext:
    """Return what the hub's port speaks TLS with: everybody who comes in has a certificate of its CA."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    # With a ticket a site would come in again on what was proven once; and where there is none, whatever makes a
    # connection readable is a word (see `Line.spoken`).
    context.num_tickets = 0
    return _filled(context, identity)


def client_context(identity: Identity) -> ssl.SSLContext:
    """Return what a site dials with."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # `peer` checks the hub's name instead
    return _filled(context, identity)


def secured(connection: socket.socket, context: ssl.SSLContext, server: bool = False) -> ssl.SSLSocket:
    """Return what speaks TLS over a connection, for a server before its handshake. Raises OSError."""
    # Of a connection that was reset meanwhile `wrap_socket` makes a socket that it neither returns nor closes.
    connection.getpeername()
    return context.wrap_socket(connection, server, do_handshake_on_connect=not server)


def _filled(context: ssl.SSLContext, identity: Identity) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=identity.root.decode())
    # OpenSSL takes a file only. This one lies in memory where the system has such files, and has no name anywhere.
    memory = getattr(os, "memfd_create", None)
    with os.fdopen(memory("identity"), "w+b") if memory is not None else tempfile.TemporaryFile() as file:
        file.write(identity.key + identity.certificate)
        file.flush()
        try:
            context.load_cert_chain(f"/dev/fd/{file.fileno()}")
        except ssl.SSLError:
            raise Corrupt(
                "identity: its key and its certificate do not belong together; join with a new token"
            ) from None
    return context


def peer(connection: socket.socket) -> Peer:
    """Return who the other end has proven to be. Raises `Denied` where its certificate has no name of ours."""
    assert isinstance(connection, ssl.SSLSocket)
    certificate = connection.getpeercert(binary_form=True)
    if certificate is None:
        raise Denied("certificate: the other end showed none; join with a token of this hub")
    return peer_of(x509.load_der_x509_certificate(certificate))
