"""How tensors and words travel in one Flight exchange: frames as one-row batches, words as JSON in the metadata."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from atoll.boundary.channel import Bytes, Frame, FrameLike
from atoll.errors import AtollError, Invalid, LinkLost, named

SCHEMA = pa.schema([("offset", pa.int64()), ("length", pa.int64()), ("data", pa.binary()), ("scales", pa.binary())])
_FRAME_LIMIT = 16 << 20  # bytes in one batch; ours carry about 1 MiB
GO = b'{"go": true}'  # the hub's word that it wants the frames of a parcel
END = b'{"end": true}'  # after the last frame: gRPC shows a reader no difference between an end and a killed peer
_DRAIN_LIMIT = 1 << 30  # bytes read on for after an error, so that the sender hears of it


def batch(frame: FrameLike) -> pa.RecordBatch:
    """Return a frame as a batch of one row, without copying its bytes."""

    def binary(data: Bytes) -> pa.Array:
        buffer = pa.py_buffer(data)
        offsets = pa.py_buffer(b"\0\0\0\0" + buffer.size.to_bytes(4, "little"))
        return pa.Array.from_buffers(pa.binary(), 1, [None, offsets, buffer])

    columns = [pa.array([frame.offset]), pa.array([frame.length]), binary(frame.data), binary(frame.scales)]
    return pa.record_batch(columns, schema=SCHEMA)


def _frame(row: pa.RecordBatch) -> Frame:
    if row.schema != SCHEMA or row.num_rows != 1:
        raise Invalid("stream: a batch is one row of offset, length, data and scales; send it so")
    if row.nbytes > _FRAME_LIMIT:
        raise Invalid(f"stream: a batch of {row.nbytes} bytes is over the limit of {_FRAME_LIMIT}; send smaller ones")
    offset, length = row.column(0)[0].as_py(), row.column(1)[0].as_py()
    data, scales = (row.column(index)[0].as_buffer() for index in (2, 3))
    if any(field is None for field in (offset, length, data, scales)):
        raise Invalid("stream: a batch has an empty field; send all four")
    return Frame(offset, length, memoryview(data), memoryview(scales))


def told(error: AtollError) -> bytes:
    """Return an error as the word that the other end raises it from."""
    return json.dumps({"error": type(error).__name__, "words": str(error)}).encode()


def raise_told(answer: dict[str, Any]) -> None:
    """Raise the error that a word tells of, as the class it was; another word passes."""
    if "error" in answer:
        raise named(str(answer["error"]), str(answer.get("words", "")))


def drain(reader: Any) -> None:
    """Read on to the end of a stream that is not wanted. A sender whose write fails throws our answer away unread."""
    left = _DRAIN_LIMIT
    with contextlib.suppress(StopIteration, pa.ArrowException, OSError):
        while left > 0:
            chunk = reader.read_chunk()
            left -= 1 + (chunk.data.nbytes if chunk.data is not None else 0)


def frames_of(reader: Any, writer: Any) -> Iterator[Frame]:
    """Yield the frames a peer sends; a link that breaks half way is `LinkLost`, never a short stream.

    The exchange's ``writer`` is held until the last frame: letting go of it ends the stream without an error.
    """
    answer: dict[str, Any] = {}
    try:
        for chunk in reader:
            if chunk.data is not None:
                yield _frame(chunk.data)
            elif chunk.app_metadata is not None:
                answer = _answer(chunk)
                raise_told(answer)  # the sender failed half way and says why
    except (pa.ArrowException, OSError) as error:
        raise LinkLost(f"the stream broke off ({type(error).__name__})") from None
    if "end" not in answer:
        raise LinkLost("the stream broke off before its end")
    del writer


def reply(reader: Any) -> dict[str, Any]:
    """Return the JSON that the hub answers a parcel with."""
    chunk = reader.read_chunk()
    if chunk.app_metadata is None:
        raise Invalid("stream: the hub sent tensors where its word was due")
    return _answer(chunk)


def _answer(chunk: Any) -> dict[str, Any]:
    try:
        answer = json.loads(bytes(chunk.app_metadata))
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise Invalid("stream: the word in it is no JSON table; update one of the two ends")
    return answer
