"""Server-sent events: what the dashboard, and whoever follows a run, are told as it happens.

A stream waits in the event loop and holds no thread, so that open dashboards take nothing from the calls of others.
Those that show the same are fed from one text, made once for all who may read what the runs found, and once for the
others. Whoever opened a stream is looked at with each beat: it ends when the same reader could not open it any more.
"""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import ExitStack, contextmanager, suppress

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from atoll.console.guard import Keys, failure
from atoll.console.tokens import Pass
from atoll.errors import Denied, Unavailable
from atoll.runtime.hub import Hub
from atoll.spec.run import RunView
from atoll.spec.user import User

BEAT = b": beat\n\n"  # a comment to a reader: a write is how the server learns that the reader has gone
BEAT_SECONDS = 1.0  # how long a stream waits before it shows that it lives; also how fast it ends, once it is to
PAUSE_SECONDS = 0.1  # between two views of one stream: a run may change with every step of every site
_UNLISTED = {"plan": True, "result": True, "losses": True, "paces": True, "sweep": True, "sites": {"__all__": {"pace"}}}
STREAMS = 200  # open at a time: each takes a socket, and a process has about a thousand


class Feed:
    """The newest view of one run, for all streams that show it. Made and used in the event loop only."""

    def __init__(self, hub: Hub, run: str) -> None:
        self._hub, self._run, self._loop = hub, run, asyncio.get_running_loop()
        self._told = False  # a call of `_turn` is on its way: many changes need no second one
        self._view: RunView | None = None
        self._texts: dict[bool, bytes] = {}  # without the plan, with what the run found or not
        self.readers = 0
        self.news = asyncio.Event()  # set with the next change, and another one in its place
        self.watching = ExitStack()
        self.watching.enter_context(hub.watch(run, self.tell))

    def tell(self) -> None:
        """Take note of a change; called in whichever thread made it."""
        if not self._told:
            self._told = True
            with suppress(RuntimeError):  # the server has ended, and with it whoever would be told
                self._loop.call_soon_threadsafe(self._turn)

    def _turn(self) -> None:
        self._told = False
        self.forget()
        self.news.set()
        self.news = asyncio.Event()

    def forget(self) -> None:
        """Have the view made anew: it changes with time alone."""
        self._view = None

    def newest(self, user: User, planned: bool) -> tuple[RunView, bytes]:
        """Return the view, and its text as the user may read it: once ``planned``, without the plan, which is long and
        never changes."""
        if self._view is None:
            self._view, self._texts = self._hub.run(self._run), {}
        view = self._view
        sees = self._hub.disclosing.reader(user)(view.run, view.user)
        if view.plan is not None and not planned:
            return view, (view if sees else view.without_results()).model_dump_json().encode()
        if sees not in self._texts:
            shown = view if sees else view.without_results()
            self._texts[sees] = shown.model_dump_json(exclude={"plan"}).encode()
        return view, self._texts[sees]


class Listed:
    """All runs as they are now: each in one text for who may read what it found, and in one for the others."""

    def __init__(self, hub: Hub) -> None:
        self.made = time.monotonic()
        self._hub, self._views = hub, hub.runs()
        self._texts: dict[tuple[str, bool], bytes] = {}
        self._lists: dict[User, bytes] = {}

    def of(self, user: User) -> bytes:
        """Return the list for one user."""
        if user not in self._lists:
            sees = self._hub.disclosing.reader(user)
            texts = [self._text(view, sees(view.run, view.user)) for view in self._views]
            self._lists[user] = b"[" + b",".join(texts) + b"]"
        return self._lists[user]

    def _text(self, view: RunView, sees: bool) -> bytes:
        key = (view.run, sees)
        if key not in self._texts:
            shown = view if sees else view.without_results()
            self._texts[key] = shown.model_dump_json(exclude=_UNLISTED).encode()
        return self._texts[key]


class Streams:
    """The open streams of one hub's API. Set `closing` to end them all within about a second."""

    def __init__(self, hub: Hub, keys: Keys) -> None:
        self._hub, self._keys = hub, keys
        self._feeds: dict[str, Feed] = {}
        self._listed: Listed | None = None
        self._listing = asyncio.Lock()
        self.open = 0
        self.closing = threading.Event()

    def of_run(self, run: str, of: Pass) -> "Stream":
        """The run's view at once and after each change, until the run is over; its plan only the first time."""
        return Stream(self, self._views(run, of))

    def of_all(self, of: Pass) -> "Stream":
        """All runs, without plans, losses, paces, trials and results, whenever one of them changed."""
        return Stream(self, self._lists(of))

    def _reader(self, of: Pass) -> User | None:
        """Return who reads a stream, with the roles of now; None once the stream is to end."""
        if self.closing.is_set():
            return None
        try:
            user = self._keys.renewed(of).user
        except Denied:
            return None
        return user if self._hub.users.sees(user, "view") else None

    async def _views(self, run: str, of: Pass) -> AsyncGenerator[bytes, None]:
        planned = False
        with self._feed(run) as feed:
            while (user := self._reader(of)) is not None:
                news = feed.news  # before the view: what changes after it is never missed
                view, text = feed.newest(user, planned)
                planned = planned or view.plan is not None
                yield _event(text)
                if view.over:
                    return
                await asyncio.sleep(PAUSE_SECONDS)
                while not await _within(news, BEAT_SECONDS):
                    if self._reader(of) is None:
                        return
                    yield BEAT
                    if view.state == "waiting":  # for a person, and no longer than until a time
                        feed.forget()
                        break

    async def _lists(self, of: Pass) -> AsyncGenerator[bytes, None]:
        shown = b""
        while (user := self._reader(of)) is not None:
            text = await self._list(user)
            yield _event(text) if text != shown else BEAT
            shown = text
            await asyncio.sleep(BEAT_SECONDS)

    @contextmanager
    def _feed(self, run: str) -> Iterator[Feed]:
        """Share the run's feed, which watches the run as long as somebody reads it."""
        feed = self._feeds.get(run)
        if feed is None:
            feed = self._feeds[run] = Feed(self._hub, run)
        feed.readers += 1
        try:
            yield feed
        finally:
            feed.readers -= 1
            if not feed.readers:
                feed.watching.close()
                del self._feeds[run]

    async def _list(self, user: User) -> bytes:
        """Return the list of runs for a user, made at most once a beat and in a thread: there may be many."""
        async with self._listing:
            if self._listed is None or time.monotonic() >= self._listed.made + BEAT_SECONDS / 2:
                self._listed = await asyncio.to_thread(Listed, self._hub)
            return await asyncio.to_thread(self._listed.of, user)


class Stream(StreamingResponse):
    """One reader's stream: counted while it is open, refused when too many are."""

    def __init__(self, streams: Streams, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._streams, self._events = streams, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._streams.open >= STREAMS:
            words = f"streams: {STREAMS} are open already; close some dashboards, or end who follows runs"
            await failure(Unavailable(words))(scope, receive, send)
            return
        self._streams.open += 1
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._streams.open -= 1
            await self._events.aclose()


async def _within(news: asyncio.Event, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            return await news.wait()
    except TimeoutError:
        return False


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"
