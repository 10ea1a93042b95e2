"""A channel over Arrow Flight: one port at the hub, none at a site, one DoExchange for each conversation.

The session is a long-lived exchange that carries messages as JSON in `app_metadata`, so that an assignment is pushed
within a millisecond and a killed peer is noticed at once; silence is noticed by heartbeats. A stream is a short
exchange of record batches of about 1 MiB, closed by a receipt. No pickle, and no tensor inside JSON.

Plaintext on loopback: the server refuses any other address until sites have certificates.
"""

import contextlib
import json
import logging
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.flight as fl

from atoll.boundary.channel import HEARTBEAT, SILENCE, Desk, Frame, FrameLike
from atoll.boundary.ports import check_free, cut
from atoll.boundary.streams import END, GO, SCHEMA, batch, drain, frames_of, raise_told, reply, told
from atoll.errors import AtollError, Denied, Invalid, LinkLost
from atoll.spec.document import parse_json
from atoll.spec.message import MESSAGE, Beat, Message, Parcel

log = logging.getLogger(__name__)
_MESSAGE_LIMIT = 4 << 20  # bytes of one JSON message
_BULK_DEADLINE = 600.0  # seconds for one stream
_HELLO_DEADLINE = 10.0  # seconds for a call that should answer at once
_GRACE = 2.0  # seconds for a site to end its half of a session that the hub has ended


class _Session:
    """The hub's end of one site's session: whoever calls `send` never waits for the network."""

    def __init__(self) -> None:
        self._outbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self.over = threading.Event()

    def send(self, message: Message) -> None:
        if self.over.is_set():
            raise LinkLost("the session is over")
        self._outbox.put(message)

    def next(self) -> Message | None:
        try:
            return self._outbox.get(timeout=HEARTBEAT) or None
        except queue.Empty:
            return Beat()

    def end(self) -> None:
        self.over.set()
        self._outbox.put(None)


class FlightServer(fl.FlightServerBase):
    """The hub's port."""

    def __init__(self, desk: Desk, port: int = 0) -> None:
        self._desk = desk
        self._sessions: set[_Session] = set()
        self._admission = _Admission(desk)
        check_free(port)
        super().__init__(f"grpc://127.0.0.1:{port}", middleware={"site": self._admission})

    @property
    def address(self) -> str:
        return f"grpc://127.0.0.1:{self.port}"

    def close(self) -> None:
        """End every session, then the server; no conversation is left open."""
        for session in list(self._sessions):
            session.end()
        self.shutdown()
        self._admission.close()

    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        site = context.get_middleware("site").site
        verb, _, body = bytes(descriptor.command).partition(b" ")
        writer.begin(SCHEMA)
        try:
            match verb:
                case b"session":
                    self._session(site, context, reader, writer)
                case b"put":
                    self._put(site, parse_json(Parcel, body, f"{site}: parcel"), reader, writer)
                    writer.write_metadata(b"{}")
                case b"get":
                    header, frames = self._desk.give(site, parse_json(Parcel, body, f"{site}: parcel"))
                    writer.write_metadata(header.model_dump_json().encode())
                    for frame in frames:
                        writer.write_batch(batch(frame))
                    writer.write_metadata(END)
                case _:
                    raise Invalid(f"{site}: a conversation begins with session, put or get; this one does not")
        except AtollError as error:
            # The other end learns the reason in the stream itself; gRPC's own status would lose its type.
            with contextlib.suppress(pa.ArrowException, OSError):
                writer.write_metadata(told(error))

    def _put(self, site: str, parcel: Parcel, reader: Any, writer: Any) -> None:
        """Let the desk take the frames. The site is asked for them when the desk wants the first: what is refused, or
        not wanted any more, is never sent."""
        asked = False

        def frames() -> Iterator[Frame]:
            nonlocal asked
            asked = True
            try:
                writer.write_metadata(GO)
            except (pa.ArrowException, OSError) as error:
                raise LinkLost(f"{site}: went away before it sent anything ({type(error).__name__})") from None
            yield from frames_of(reader, writer)

        try:
            self._desk.take(site, parcel, frames())
        finally:
            if asked:
                drain(reader)

    def _session(self, site: str, context: Any, reader: Any, writer: Any) -> None:
        session = _Session()
        self._sessions.add(session)
        last = [time.monotonic()]
        listener = threading.Thread(target=self._listen, args=(site, reader, session, last), daemon=True)
        listener.start()
        self._desk.opened(site, session.send)
        words = "the site closed its session"
        try:
            while not session.over.is_set() and not context.is_cancelled():
                message = session.next()
                if time.monotonic() - last[0] > SILENCE:
                    words = f"not heard for {SILENCE:g} s"
                    break
                if message is not None:
                    writer.write_metadata(MESSAGE.dump_json(message))
        except (pa.ArrowException, OSError) as error:
            words = f"the link broke ({type(error).__name__})"
        finally:
            session.end()
            self._sessions.discard(session)
            self._desk.closed(site, session.send, words)
        with contextlib.suppress(pa.ArrowException, OSError):
            writer.write_metadata(told(LinkLost(words)))  # at which the site ends its half
        # Returning frees the stream, so never while it is being read: that would crash the hub.
        listener.join(_GRACE)
        if listener.is_alive():
            cut(context.peer(), self.port)
        listener.join()

    def _listen(self, site: str, reader: Any, session: _Session, last: list[float]) -> None:
        """Hand on what the site says, until its stream ends."""
        try:
            while True:
                data = bytes(reader.read_chunk().app_metadata)
                last[0] = time.monotonic()
                if len(data) > _MESSAGE_LIMIT:
                    break
                message = MESSAGE.validate_json(data)
                if not isinstance(message, Beat):
                    self._desk.heard(site, message)
        except (StopIteration, pa.ArrowException, OSError, ValueError, AtollError):
            pass  # an ended, broken or ill-formed stream all mean the same: this session is over
        finally:
            session.end()


class _Admission(fl.ServerMiddlewareFactory):
    """Lets a call in only with a known site's secret, or a token that makes one."""

    def __init__(self, desk: Desk) -> None:
        super().__init__()
        self._desk: Desk | None = desk

    def close(self) -> None:
        """Let go of the desk: Arrow holds on to this object, and would hold on to the whole hub through it."""
        self._desk = None

    def start_call(self, info: Any, headers: dict[str, list[str]]) -> "_Admitted":
        desk = self._desk
        if desk is None:
            raise fl.FlightUnavailableError("the hub is closing")
        scheme, _, credential = next(iter(headers.get("authorization", [])), "").partition(" ")
        site, _, secret = credential.partition(":")
        if scheme == "Token":
            token, _, secret = secret.partition(":")
            try:
                desk.enrol(site, token, secret)
            except AtollError as error:
                raise fl.FlightUnauthenticatedError(str(error)) from None
        elif scheme != "Bearer" or not desk.admits(site, secret):
            raise fl.FlightUnauthenticatedError(f"site {site!r} is not known by this secret; join with a token")
        return _Admitted(site)


class _Admitted(fl.ServerMiddleware):
    def __init__(self, site: str) -> None:
        super().__init__()
        self.site = site


class FlightChannel:
    """A site's end: dials out, keeps one session open and opens a stream for each parcel."""

    def __init__(self, address: str, site: str, secret: str, token: str | None = None) -> None:
        self._address, self._site = address, site
        self._inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open = True
        self._heard = time.monotonic()
        credential = f"Token {site}:{token}:{secret}" if token else f"Bearer {site}:{secret}"
        self._client = fl.connect(address)
        # An empty probe first: it has a deadline, which a session cannot have, and it spends the token.
        self._headers = [(b"authorization", credential.encode())]
        self.get(Parcel(run="probe", purpose="probe", size=0), _HELLO_DEADLINE)
        self._headers = [(b"authorization", f"Bearer {site}:{secret}".encode())]
        with _told(address):
            options = fl.FlightCallOptions(headers=self._headers)
            self._writer, self._reader = self._client.do_exchange(fl.FlightDescriptor.for_command(b"session "), options)
            self._writer.begin(SCHEMA)
            self._writer.write_metadata(MESSAGE.dump_json(Beat()))
        threading.Thread(target=self._listen, daemon=True, name=f"{site}-listen").start()
        threading.Thread(target=self._beat, daemon=True, name=f"{site}-beat").start()

    def _listen(self) -> None:
        try:
            while True:
                data = bytes(self._reader.read_chunk().app_metadata)
                self._heard = time.monotonic()
                answer = json.loads(data)
                raise_told(answer)
                message = MESSAGE.validate_python(answer)
                if not isinstance(message, Beat):
                    self._inbox.put(message)
        except (StopIteration, pa.ArrowException, OSError, ValueError, AtollError):
            pass  # however the hub's stream ends, the session is over and the agent dials again
        finally:
            self._open = False
            self._inbox.put(None)
            with contextlib.suppress(pa.ArrowException, OSError), self._lock:
                self._writer.done_writing()  # the hub waits for it

    def _beat(self) -> None:
        while self._open:
            time.sleep(HEARTBEAT)
            with contextlib.suppress(LinkLost):
                self.send(Beat())
            if time.monotonic() - self._heard > SILENCE:
                self._open = False
                self._inbox.put(None)

    def send(self, message: Message) -> None:
        self._alive()
        with self._lock, _told(self._address):
            self._writer.write_metadata(MESSAGE.dump_json(message))

    def receive(self, timeout: float) -> Message | None:
        try:
            message = self._inbox.get(timeout=timeout)
        except queue.Empty:
            return None
        if message is None:
            self._inbox.put(None)  # the next caller learns it too
            raise LinkLost(f"{self._address}: the session with the hub is over; dial again")
        return message

    def put(self, parcel: Parcel, frames: Iterable[FrameLike]) -> None:
        with _told(self._address):
            writer, reader = self._exchange(b"put " + parcel.model_dump_json().encode())
            answer = reply(reader)
            raise_told(answer)
            if "go" not in answer:
                return  # the hub has it already, or went on without it
            try:
                writer.begin(SCHEMA)
                for frame in frames:
                    writer.write_batch(batch(frame))
                writer.write_metadata(END)
                writer.done_writing()
            except BaseException:
                reader.cancel()
                raise
            raise_told(reply(reader))
            writer.close()

    def get(self, parcel: Parcel, deadline: float = _BULK_DEADLINE) -> tuple[Parcel, Iterator[FrameLike]]:
        with _told(self._address):
            # Nothing is written, not even a schema: the hub may have ended the exchange before it arrives.
            writer, reader = self._exchange(b"get " + parcel.model_dump_json().encode(), deadline)
            answer = reply(reader)
        raise_told(answer)
        return Parcel.model_validate(answer), frames_of(reader, writer)

    def _exchange(self, command: bytes, deadline: float = _BULK_DEADLINE) -> tuple[Any, Any]:
        self._alive()
        options = fl.FlightCallOptions(timeout=deadline, headers=self._headers)
        return self._client.do_exchange(fl.FlightDescriptor.for_command(command), options)

    def close(self) -> None:
        self._open = False
        with contextlib.suppress(pa.ArrowException, OSError), self._lock:
            self._writer.done_writing()
        with contextlib.suppress(pa.ArrowException, OSError):
            self._client.close()

    def _alive(self) -> None:
        if not self._open:
            raise LinkLost(f"{self._address}: the session with the hub is over; dial again")


@contextlib.contextmanager
def _told(address: str) -> Iterator[None]:
    """Turn what Flight raises into the error tree."""
    try:
        yield
    except fl.FlightUnauthenticatedError as error:
        raise Denied(f"{address}: {str(error).split('. Detail')[0].split('. gRPC')[0]}") from None
    except StopIteration:
        raise LinkLost(f"{address}: the hub ended the stream without a word") from None
    except (pa.ArrowException, OSError) as error:
        log.debug("%s", error)
        raise LinkLost(f"{address}: {type(error).__name__}: the link to the hub broke") from None
