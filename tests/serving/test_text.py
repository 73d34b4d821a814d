"""Text comes in whole characters, and never what a stop string begins with."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from smolcluster.serving.text import TextStream


def decode(tokens: Sequence[int]) -> str:
    """Bytes."""
    return bytes(tokens).decode("utf-8", errors="replace")


def feed(text: str, stops: Sequence[str] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(decode, [], stops)
    pieces = []
    for token in text.encode():
        pieces.append(stream.push(token))
        if stream.is_stopped:
            break
    return [*pieces, stream.end()], stream


@pytest.mark.parametrize("text", ["plain", "naïve … 漢字 🎉🎉 é", "", "��x"])
def test_pieces_add_up_and_characters_are_whole(text: str) -> None:
    pieces, stream = feed(text)
    assert "".join(pieces) == text == stream.text
    assert all("�" not in piece for piece in pieces) or "�" in text


def test_bytes_that_are_no_character_come_out_in_the_end() -> None:
    stream = TextStream(decode, [])
    pieces = [stream.push(token) for token in [0xE6, 0xBC, 0x41, 0x42]]
    assert "".join([*pieces, stream.end()]) == decode([0xE6, 0xBC, 0x41, 0x42])
    stream = TextStream(decode, [])
    assert stream.push(0xF0) + stream.end() == "�"


def test_a_prompt_that_ends_within_a_character_hides_nothing_of_the_answer() -> None:
    stream = TextStream(decode, list("漢".encode())[:2])
    assert "".join([stream.push(token) for token in b"ABC"]) + stream.end() == "ABC"


def test_a_stop_string_ends_the_text_before_it() -> None:
    pieces, stream = feed("one END two", ["END"])
    assert ("".join(pieces), stream.is_stopped) == ("one ", True)
    pieces, stream = feed("one ENDive", ["ENDO", "five"])
    assert ("".join(pieces), stream.is_stopped) == ("one ENDive", False)


def test_nothing_that_may_begin_a_stop_string_is_shown_early() -> None:
    generator = random.Random(5)
    for _ in range(300):
        text = "".join(generator.choice("ab漢") for _ in range(12))
        stops = ["".join(generator.choice("ab漢") for _ in range(generator.randint(1, 4))) for _ in range(2)]
        places = [text.find(stop) for stop in stops if stop in text]
        # The one that is complete first wins; of those the one that begins first.
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        pieces, stream = feed(text, stops)
        shown = "".join(pieces)
        assert text.startswith(shown)
        assert stream.is_stopped == bool(places)
        if not places:
            assert shown == text
        else:
            assert not any(stop in shown for stop in stops)
            assert len(shown) < min(ends)
