import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smolcluster.data.tokenizer import ByteTokenizer, load_tokenizer
from smolcluster.errors import DataError


@given(st.text())
def test_every_text_survives_encode_and_decode(text: str) -> None:
    tokens = ByteTokenizer().encode(text)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == list(text.encode("utf-8"))
    assert ByteTokenizer().decode(tokens) == text


def test_bytes_that_are_no_text_become_replacement_characters() -> None:
    assert ByteTokenizer().decode(torch.tensor([0x61, 0xC3, 0x62, 0xFF])) == "a\ufffdb\ufffd"


def test_the_byte_tokenizer_is_loaded_by_name() -> None:
    tokenizer = load_tokenizer("bytes")
    assert isinstance(tokenizer, ByteTokenizer)
    assert tokenizer.vocab_size == 256


def test_other_tokenizers_are_refused_with_what_to_do() -> None:
    with pytest.raises(DataError, match=r"'openai-community/gpt2'.*later release.*extra hf.*data\.tokenizer=bytes"):
        load_tokenizer("openai-community/gpt2")
