"""Frames on an authenticated lane that say something wrong: an error that names the sender, before memory is taken."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import torch

from hostile.mutator import PICKLES
from hostile.targets import Frames, collective_frames, message_frames, targets
from smolcluster.collectives import messages
from smolcluster.collectives.checks import decode_message
from smolcluster.errors import CollectiveMismatch, FrameError, PeerLost
from smolcluster.transport import frame, tensors
from smolcluster.transport.frame import Prelude

GIB = 1 << 30
FIELDS = (
    "magic",
    "kind",
    "operation",
    "reduce",
    "dtype",
    "codec",
    "ndim",
    "generation",
    "tag",
    "hop",
    "sequence",
    "count",
    "nbytes",
)


@pytest.fixture(scope="module")
def lanes() -> Iterator[dict[str, Frames]]:
    with targets():  # whose changes to the timing hold meanwhile
        yield {"bulk": collective_frames(), "p2p": message_frames()}


def edited(head: bytes, dims: tuple[int, ...] | None = None, **fields: int) -> bytes:
    """A frame with other fields, whatever they are; its payload stays."""
    values = dict(zip(FIELDS, frame._PRELUDE.unpack(head[: frame.PRELUDE_BYTES]), strict=True)) | fields
    at = frame.PRELUDE_BYTES + 8 * values["ndim"]
    old = struct.unpack(f"!{values['ndim']}Q", head[frame.PRELUDE_BYTES : at])
    shape = old if dims is None else dims
    values["ndim"] = len(shape)
    return frame._PRELUDE.pack(*values.values()) + struct.pack(f"!{len(shape)}Q", *shape) + head[at:]


def with_payload(head: bytes, payload: bytes) -> bytes:
    """A frame whose payload is replaced by one of the same length."""
    prelude = frame.unpack(head[: frame.PRELUDE_BYTES])
    at = frame.PRELUDE_BYTES + 8 * prelude.ndim
    assert len(payload) <= prelude.nbytes
    return head[:at] + payload.ljust(prelude.nbytes, b"\x02")


Edit = Callable[[bytes], bytes]
CASES: dict[str, tuple[str, str, Edit, type[Exception], str]] = {
    # name: lane, scenario, what happens to its first frame, the error and what it says
    "another beginning": ("bulk", "ring", lambda f: b"HTTP" + f[4:], FrameError, "the stream is out of step"),
    "a foreign generation": (
        "bulk",
        "ring",
        lambda f: edited(f, generation=2),
        CollectiveMismatch,
        "called all_reduce",
    ),
    "a generation of long ago": ("bulk", "ring", lambda f: edited(f, generation=0), CollectiveMismatch, "called"),
    "another dtype": ("bulk", "ring", lambda f: edited(f, dtype=2), CollectiveMismatch, "float64"),
    "another codec": ("bulk", "ring", lambda f: edited(f, codec=2), CollectiveMismatch, "as fp16"),
    "no codec": ("bulk", "codec", lambda f: edited(f, codec=0), CollectiveMismatch, "while this rank called"),
    "another operation": ("bulk", "ring", lambda f: edited(f, operation=3), CollectiveMismatch, "all_gather"),
    "another count": ("bulk", "ring", lambda f: edited(f, count=2**63), CollectiveMismatch, "of 9223372036854775808"),
    "a piece that there is not": (
        "bulk",
        "ring",
        lambda f: edited(f, tag=2**32 - 1),
        CollectiveMismatch,
        "there are 7",
    ),
    "a piece of later": ("bulk", "ring", lambda f: edited(f, tag=6), CollectiveMismatch, "waits for next"),
    "a hop of later": ("bulk", "ring", lambda f: edited(f, hop=2**31), CollectiveMismatch, "sent hop 2147483648"),
    "a call of the far future": (
        "bulk",
        "ring",
        lambda f: edited(f, sequence=2**63),
        CollectiveMismatch,
        "before it had",
    ),
    "a call of the past": ("bulk", "exchange", lambda f: edited(f, sequence=0), CollectiveMismatch, "(call 0)"),
    "4 GiB": ("bulk", "ring", lambda f: edited(f, nbytes=4 * GIB), CollectiveMismatch, "with 4294967296 bytes"),
    "no bytes": ("bulk", "ring", lambda f: edited(f, nbytes=0), CollectiveMismatch, "with 0 bytes"),
    "a message where a call belongs": (
        "bulk",
        "ring",
        lambda f: edited(f, kind=2, operation=0, reduce=0),
        CollectiveMismatch,
        "called message",
    ),
    "a large exchange": (
        "bulk",
        "exchange",
        lambda f: edited(f, dims=(2 << 20,), count=2 << 20, nbytes=2 << 20),
        FrameError,
        "at most 1048576",
    ),
    "a barrier of 4 GiB": (
        "bulk",
        "exchange",
        lambda f: edited(f, dims=(4 * GIB,), count=4 * GIB, nbytes=4 * GIB),
        FrameError,
        "at most",
    ),
    "an exchanged pickle": (
        "bulk",
        "exchange",
        lambda f: edited(f[:56], (len(PICKLES[0]),), count=len(PICKLES[0]), nbytes=len(PICKLES[0])) + PICKLES[0],
        FrameError,
        "rank 1 exchanged a message that is not JSON",
    ),
    "a bool of 2": ("bulk", "all_gather", lambda f: with_payload(f, b"\x01\x02"), FrameError, "neither 0 nor 1"),
    "a message of a foreign generation": (
        "p2p",
        "receive",
        lambda f: edited(f, generation=9),
        CollectiveMismatch,
        "generation 9 where a message",
    ),
    "a call where a message belongs": (
        "p2p",
        "receive",
        lambda f: edited(f, kind=1, operation=1),
        CollectiveMismatch,
        "where a message",
    ),
    "a shape that is not its count": ("p2p", "receive", lambda f: edited(f, count=7), FrameError, "says 7 elements"),
    "a message of 4 GiB": (
        "p2p",
        "receive late",
        lambda f: edited(f, dims=(GIB,), count=GIB, nbytes=4 * GIB),
        FrameError,
        "at most 1073741824",
    ),
    "a shape whose product is small": (
        "p2p",
        "receive late",
        lambda f: edited(f, dims=(0, 2**62, 2**62), count=0, nbytes=0),
        FrameError,
        "are allowed",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_frame_that_does_not_fit_names_its_sender(lanes: dict[str, Frames], case: str) -> None:
    lane, scenario, edit, kind, words = CASES[case]
    first, *rest = lanes[lane].honest_frames(scenario)
    error = lanes[lane].ending(scenario, b"".join([edit(first), *rest]))
    assert isinstance(error, kind)
    assert words in str(error)
    assert "rank 1" in str(error)


@pytest.mark.parametrize("scenario", ["receive", "receive late"])
@pytest.mark.parametrize("number", [0, 2])
def test_bools_of_another_value_are_refused_in_messages_too(
    lanes: dict[str, Frames], scenario: str, number: int
) -> None:
    frames = lanes["p2p"].honest_frames("receive")
    assert frame.unpack(frames[1][: frame.PRELUDE_BYTES]).dtype == frame.DTYPES["bool"][0]
    bad = with_payload(frames[1], bytes([1, 1, 255]))
    error = lanes["p2p"].ending(scenario, b"".join([*frames[:number], bad]))
    assert isinstance(error, FrameError)
    assert "bools that are neither 0 nor 1" in str(error)


def test_a_header_of_a_gibibyte_costs_no_memory_until_the_bytes_come(lanes: dict[str, Frames]) -> None:
    first = lanes["p2p"].honest_frames("receive late")[0]
    before = psutil.Process().memory_info().rss
    seen = []
    empty = tensors.torch.empty

    def measured(*arguments: Any, **settings: Any) -> torch.Tensor:
        memory = empty(*arguments, **settings)
        seen.append((memory.nbytes, psutil.Process().memory_info().rss - before))
        return memory

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors.torch, "empty", measured)
        said = edited(first, dims=(GIB // 4,), count=GIB // 4, nbytes=GIB)
        assert isinstance(lanes["p2p"].ending("receive late", said), PeerLost)
    nbytes, grown = max(seen)
    assert nbytes == GIB
    assert grown < 64 << 20  # the pages of what did come


def test_memory_that_the_system_does_not_give_is_the_senders_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*arguments: object, **settings: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(tensors.torch, "empty", none_left)
    with pytest.raises(FrameError, match="no memory for a frame of 40 bytes"):
        tensors.empty_for(Prelude(2, 0, 0, 1, 0, 1, 0, 0, 0, 10, 40, 1), (10,))


def test_messages_that_nobody_receives_are_kept_up_to_a_limit(
    lanes: dict[str, Frames], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(messages, "MAX_UNCLAIMED_BYTES", 40_000)
    first = lanes["p2p"].honest_frames("receive late")[0]
    flood = [edited(first, tag=1000 + number) for number in range(25)]
    error = lanes["p2p"].ending("receive late", b"".join(flood))
    assert isinstance(error, CollectiveMismatch)
    assert "rank 1 has sent more than 40000 bytes of messages that this rank does not receive" in str(error)


def test_what_was_received_counts_no_more(lanes: dict[str, Frames], monkeypatch: pytest.MonkeyPatch) -> None:
    honest = lanes["p2p"].honest_frames("receive late")
    monkeypatch.setattr(messages, "MAX_UNCLAIMED_BYTES", 3 * (messages.MESSAGE_BYTES + 16))
    assert lanes["p2p"].ending("receive late", b"".join(honest)) is None


@pytest.mark.parametrize("encoded", [b"\xff", b"{", b"[" * 100_000, *PICKLES], ids=range(3 + len(PICKLES)))
def test_an_exchanged_message_that_is_not_json_names_its_sender(encoded: bytes) -> None:
    with pytest.raises(FrameError, match="rank 3 exchanged a message that is not JSON"):
        decode_message(encoded, 3)
