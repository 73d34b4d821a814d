import hashlib
import struct

import torch
from torch import nn

from smolcluster.models.gpt import GPT, GPTConfig
from smolcluster.models.simple_nn import SimpleNN
from smolcluster.models.weights import exported_tensors, tensors_sha256, weights_sha256

CONFIG = GPTConfig(vocab_size=5, model_dim=4, num_layers=1, num_heads=2, ff_dim=6, dropout=0.0, max_seq_len=3)


def sha256(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_the_hash_is_the_contracts_byte_for_byte() -> None:
    tensors = {
        "b": torch.tensor([[1.0, -2.5]]),
        "a": torch.tensor([1.0], dtype=torch.bfloat16),
        "c": torch.tensor(3, dtype=torch.int64),
        "d": torch.tensor([0.1], dtype=torch.float64),
        "e": torch.empty(0, 2),
    }
    assert tensors_sha256(tensors) == sha256(
        b'["a","bfloat16",[1]]\n\x80\x3f',
        b'["b","float32",[1,2]]\n' + struct.pack("<2f", 1.0, -2.5),
        b'["c","int64",[]]\n' + struct.pack("<q", 3),
        b'["d","float64",[1]]\n' + struct.pack("<d", 0.1),
        b'["e","float32",[0,2]]\n',
    )


def test_names_are_ordered_by_their_utf8_bytes_and_escaped_as_json() -> None:
    one, two, three = torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([3.0])
    # In UTF-16 order the last two would change places.
    expected = sha256(
        b'["B","float32",[1]]\n' + struct.pack("<f", 2.0),
        b'["\\uff5e","float32",[1]]\n' + struct.pack("<f", 1.0),
        b'["\\ud83d\\ude00","float32",[1]]\n' + struct.pack("<f", 3.0),
    )
    assert tensors_sha256({"\U0001f600": three, "\uff5e": one, "B": two}) == expected


def test_bytes_are_in_row_order_whatever_the_memory_layout() -> None:
    value = torch.arange(6.0).view(2, 3)
    assert tensors_sha256({"w": value.t()}) == tensors_sha256({"w": value.t().contiguous()})
    assert tensors_sha256({"w": value.t()}) != tensors_sha256({"w": value.reshape(3, 2)})


def test_tied_tensors_count_once_under_their_first_name() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.ReLU(), nn.Linear(3, 3, bias=False))
    model[2].weight = model[0].weight
    assert weights_sha256(model) == tensors_sha256({"0.weight": model[0].weight})


def test_views_of_one_buffer_are_different_weights() -> None:
    flat = torch.zeros(8)
    views = {"a": flat[:4], "b": flat[4:]}
    copies = {"a": torch.zeros(4), "b": torch.zeros(4)}
    assert tensors_sha256(views) == tensors_sha256(copies)


def test_empty_tensors_are_not_taken_for_tied() -> None:
    assert tensors_sha256({"a": torch.empty(0), "b": torch.empty(0)}) != tensors_sha256({"a": torch.empty(0)})


def test_gpt_is_hashed_as_exported_with_the_tied_head_once() -> None:
    model = GPT(CONFIG)
    exported = {name: value.clone() for name, value in model.export_state_dict().items()}
    del exported["transformer.wte.weight"]  # "lm_head.weight" is the first of its two names
    assert weights_sha256(model) == tensors_sha256(exported)
    assert set(exported_tensors(model)) == {*exported, "transformer.wte.weight"}


def test_a_model_without_export_is_hashed_as_its_state_dict_with_buffers() -> None:
    model = nn.BatchNorm1d(2)
    before = weights_sha256(model)
    assert before == tensors_sha256(model.state_dict())
    model.running_mean.add_(1.0)
    assert weights_sha256(model) != before


def test_one_changed_bit_or_dtype_changes_the_hash() -> None:
    model = SimpleNN(4, 3, 2)
    before = weights_sha256(model)
    assert before == weights_sha256(SimpleNN(4, 3, 2))
    bits = model.out.bias.detach().view(torch.int32)
    bits[1] ^= 1
    assert weights_sha256(model) != before
    bits[1] ^= 1
    assert weights_sha256(model) == before
    assert weights_sha256(model.double()) != before
