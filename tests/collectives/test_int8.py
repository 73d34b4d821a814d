"""int8 in blocks on the wire, against the formula, and what error feedback promises of many calls."""

from __future__ import annotations

import math
import struct
import threading
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from collectives.contract import PATIENCE, RunRanks, open_group, run_group, same_bits
from smolcluster.collectives.base import Communicator, ReduceOp
from smolcluster.collectives.codec import ErrorFeedback, Int8Codec

CODEC = Int8Codec()
# More than one span of the encoder, and a ragged block at the end of the last.
COUNTS = [0, 1, 255, 256, 257, 1001, 64 * 1024 + 300]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# float32's rounding of a scale and of its inverse may move a number that lies this close to half-way.
SLACK = 1e-4


def encode(tensor: Tensor) -> Tensor:
    out = torch.full((CODEC.encoded_nbytes(tensor.numel()),), 255, dtype=torch.uint8)
    CODEC.encode(tensor, out)
    return out


def decode(data: Tensor, like: Tensor) -> Tensor:
    out = torch.full_like(like, 77.0)
    CODEC.decode(data, out)
    return out


def naive_scales(tensor: Tensor) -> Tensor:
    """Each element's scale, in float64."""
    return torch.cat(
        [(block.abs().max() / 127).float().double().expand_as(block) for block in tensor.double().split(256)]
    )


def noise(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, every block of another size."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** -(torch.arange(count) // 256 % 4)
    return (torch.randn(count, generator=generator) * sizes).to(dtype)


# ---- the codec


@pytest.mark.parametrize("count", COUNTS)
def test_a_byte_per_element_and_four_per_block(count: int) -> None:
    assert CODEC.encoded_nbytes(count) == count + 4 * math.ceil(count / 256)


def test_all_scales_come_first_then_all_numbers_little_endian() -> None:
    tensor = torch.cat([torch.full((256,), 0.0), torch.tensor([127.0, -1.0, 0.4, -63.6])])
    tensor[3] = -254.0
    tensor[4] = 127.2
    expected = struct.pack("<ff", 2.0, 1.0) + struct.pack("<260b", 0, 0, 0, -127, 64, *[0] * 251, 127, -1, 0, -64)
    assert encode(tensor).numpy().tobytes() == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", COUNTS[1:])
def test_numbers_are_the_nearest_multiples_of_the_blocks_scale(count: int, dtype: torch.dtype) -> None:
    tensor = noise(count, dtype=dtype)
    decoded, scales = decode(encode(tensor), tensor), naive_scales(tensor)
    # bfloat16 and float16 results are rounded once more, to 8 and 11 bits
    rounding = torch.finfo(dtype).eps / 2 * tensor.double().abs() * 1.01
    assert bool(((decoded.double() - tensor.double()).abs() <= scales * (0.5 + SLACK) + rounding).all())
    ratio = tensor.double() / scales
    is_clear = ((ratio - ratio.floor()) - 0.5).abs() > SLACK
    numbers = encode(tensor)[4 * math.ceil(count / 256) :].view(torch.int8).double()
    assert torch.equal(numbers[is_clear], ratio.round()[is_clear])
    assert int(numbers.abs().max()) == 127


# Down to 1e-35: below, scales are held above the subnormal numbers.
@given(st.lists(st.floats(-(2.0**127), 2.0**127, width=32).filter(lambda x: x == 0 or abs(x) > 1e-35), min_size=1))
def test_the_error_is_at_most_half_a_step_whatever_the_numbers(values: list[float]) -> None:
    tensor = torch.tensor(values)
    error = (decode(encode(tensor), tensor).double() - tensor.double()).abs()
    assert bool((error <= naive_scales(tensor) * (0.5 + SLACK)).all())


def test_zeros_stay_zeros_and_subnormal_numbers_do_no_harm() -> None:
    tensor = torch.zeros(768)
    tensor[256:512] = 1e-40
    tensor[600] = 1.0
    decoded = decode(encode(tensor), tensor)
    assert torch.equal(decoded[:512], torch.zeros(512))
    assert torch.equal(decoded[512:], tensor[512:])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_block_with_a_number_that_is_not_finite_has_no_finite_number_and_others_are_spared(bad: float) -> None:
    tensor = noise(700)
    tensor[300] = bad
    decoded = decode(encode(tensor), tensor)
    assert not decoded[256:512].isfinite().any()
    tensor[300] = 0.0
    assert torch.equal(decoded[:256], decode(encode(tensor), tensor)[:256])
    assert torch.equal(decoded[512:], decode(encode(tensor), tensor)[512:])


def test_float64_beyond_float32_is_not_sent_as_something_else() -> None:
    tensor = torch.tensor([1e300, 1.0], dtype=torch.float64)
    assert not decode(encode(tensor), tensor).isfinite().any()


def test_the_input_is_left_alone_and_buffers_may_begin_anywhere() -> None:
    tensor = noise(300)
    before, expected = tensor.clone(), encode(tensor)
    buffer = torch.zeros(expected.numel() + 3, dtype=torch.uint8)
    for start in range(4):
        part = buffer[start : start + expected.numel()]
        CODEC.encode(torch.nn.Parameter(tensor), part)
        assert torch.equal(part, expected)
        assert torch.equal(decode(part, tensor), decode(expected, tensor))
    assert torch.equal(tensor, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_add_adds_what_decode_gives(dtype: torch.dtype) -> None:
    tensor, target = noise(1001, 1, dtype), noise(1001, 2, dtype)
    expected = target.double() + decode(encode(tensor), tensor.double())
    CODEC.decode_add(encode(tensor), target)
    torch.testing.assert_close(target.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_an_encoding_loses_is_left_in_the_residual_to_the_bit(dtype: torch.dtype) -> None:
    tensor, residual = noise(1001, 1, dtype), noise(1001, 2, dtype) / 100
    wanted, before, out = tensor + residual, tensor.clone(), torch.empty(CODEC.encoded_nbytes(1001), dtype=torch.uint8)
    CODEC.encode_with_feedback(tensor, residual, out)
    assert torch.equal(out, encode(wanted))
    assert torch.equal(residual, wanted - decode(out, wanted))
    assert torch.equal(tensor, before)


def test_a_step_that_is_not_finite_leaves_nothing_behind_in_its_blocks() -> None:
    tensor, residual = noise(700), torch.full((700,), 1e-3)
    tensor[300] = math.nan
    CODEC.encode_with_feedback(tensor, residual, torch.empty(CODEC.encoded_nbytes(700), dtype=torch.uint8))
    assert torch.equal(residual[256:512], torch.zeros(256))
    assert bool(residual.isfinite().all())
    assert bool(residual[:256].any())
    assert bool(residual[512:].any())


def test_threads_may_share_a_codec() -> None:
    tensors = [noise(200_000, seed) for seed in range(2)]
    expected, encoded = [encode(tensor) for tensor in tensors], [[], []]  # type: list[Tensor], list[list[Tensor]]
    start = threading.Barrier(2)

    def work(number: int) -> None:
        start.wait(PATIENCE)
        encoded[number] += [encode(tensors[number]) for _ in range(10)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, wanted in zip(encoded, expected, strict=True):
        assert all(torch.equal(one, wanted) for one in mine)


# ---- on every engine


def feedback_for(count: int, dtype: torch.dtype = torch.float32) -> ErrorFeedback:
    return ErrorFeedback(CODEC, torch.zeros(count, dtype=dtype))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("with_feedback", [False, True], ids=["plain", "feedback"])
def test_an_all_reduce_gives_the_same_bits_near_the_exact_sum(
    run_ranks: RunRanks, world_size: int, with_feedback: bool
) -> None:
    counts, ops = (0, 1, 5, 1001, 300_007), [ReduceOp.SUM, ReduceOp.AVG]
    if not with_feedback:
        ops.append(ReduceOp.MAX)

    def fn(comm: Communicator) -> list[Tensor]:
        results = []
        for count in counts:
            for op in ops:
                tensor = torch.randn(count, generator=torch.Generator().manual_seed(comm.rank))
                comm.all_reduce(tensor, op, feedback_for(count) if with_feedback else CODEC).wait(PATIENCE)
                results.append(tensor)
        return results

    ranks = run_ranks(world_size, fn)
    for position, (count, op) in enumerate((count, op) for count in counts for op in ops):
        assert same_bits([rank[position] for rank in ranks]), (count, op)
        every = [torch.randn(count, generator=torch.Generator().manual_seed(rank)) for rank in range(world_size)]
        stacked = torch.stack(every).double()
        exact = {ReduceOp.SUM: stacked.sum(0), ReduceOp.AVG: stacked.mean(0), ReduceOp.MAX: stacked.amax(0)}[op]
        # Half a step for every contribution and for the result, of blocks that may begin anywhere.
        largest = sum(float(tensor.abs().max()) for tensor in every) if count else 0.0
        bound = 2 * largest / 254 * 1.01 / (world_size if op == ReduceOp.AVG else 1)
        assert bool(((ranks[0][position].double() - exact).abs() <= bound).all()), (count, op)


def test_reduce_scatter_and_all_gather_take_int8_too(run_ranks: RunRanks) -> None:
    count = 1003

    def fn(comm: Communicator) -> Tensor:
        every = [torch.randn(3 * count, generator=torch.Generator().manual_seed(rank)) for rank in range(3)]
        own = slice(comm.rank * count, (comm.rank + 1) * count)
        part, gathered = torch.empty(count), torch.empty(3 * count)
        comm.reduce_scatter(part, every[comm.rank].clone(), ReduceOp.SUM, CODEC).wait(PATIENCE)
        # three contributions of at most 4.5, each off by half a step
        assert float((part - torch.stack(every).sum(0)[own]).abs().max()) <= 3 * 4.5 / 254
        comm.all_gather(gathered, every[comm.rank][own].contiguous(), CODEC).wait(PATIENCE)
        parts = torch.cat([every[rank][rank * count : (rank + 1) * count] for rank in range(3)])
        assert float((gathered - parts).abs().max()) <= 4.5 / 254
        return gathered

    assert same_bits(run_ranks(3, fn))


def many_calls(comm: Communicator, calls: int, feedback: ErrorFeedback | None, op: ReduceOp) -> tuple[Tensor, Tensor]:
    """The results added up, and the exact ones: small gradients beside large ones, the same in every call."""
    total, exact = torch.zeros(5003, dtype=torch.float64), torch.zeros(5003, dtype=torch.float64)
    every = [noise(5003, rank, torch.float64) for rank in range(comm.world_size)]
    for tensor in every:
        tensor[::256] = 10.0  # so large that the rest of its block is rounded away
    for _ in range(calls):
        tensor = every[comm.rank].clone()
        comm.all_reduce(tensor, op, feedback or CODEC).wait(PATIENCE)
        total += tensor
        exact += torch.stack(every).sum(0) / (comm.world_size if op == ReduceOp.AVG else 1)
    return total, exact


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("op", [ReduceOp.SUM, ReduceOp.AVG], ids=lambda op: op.name)
def test_results_and_residuals_add_up_to_the_exact_sums_after_many_calls(
    run_ranks: RunRanks, world_size: int, op: ReduceOp
) -> None:
    def fn(comm: Communicator) -> tuple[Tensor, Tensor, Tensor]:
        feedback = feedback_for(5003, torch.float64)
        return (*many_calls(comm, 40, feedback, op), feedback.residual)

    ranks = run_ranks(world_size, fn)
    assert same_bits([total for total, _, _ in ranks])
    left = torch.stack([residual for _, _, residual in ranks]).sum(0) / (world_size if op == ReduceOp.AVG else 1)
    total, exact, _ = ranks[0]
    assert float((total + left - exact).abs().max()) < 1e-10  # float64, 40 sums of up to 400
    # A step is 10 / 127 of each contribution and 10 N / 127 of the sum; half of each remains, whatever came before.
    assert float(left.abs().max()) <= (2 * world_size - 1) * 10.1 / 254


def test_without_feedback_the_error_grows_with_every_call_and_with_it_never() -> None:
    def errors(calls: int, with_feedback: bool) -> float:
        def fn(comm: Communicator) -> float:
            feedback = feedback_for(5003, torch.float64) if with_feedback else None
            total, exact = many_calls(comm, calls, feedback, ReduceOp.SUM)
            return float((total - exact).abs().max())

        return float(run_group(open_group("local", 2), fn)[0])

    assert errors(100, with_feedback=False) > 9 * errors(10, with_feedback=False)
    assert errors(100, with_feedback=True) < 2 * errors(10, with_feedback=True)


def test_every_engine_of_ours_gives_the_same_bits_and_residuals() -> None:
    def fn(comm: Communicator) -> tuple[Tensor, Tensor]:
        feedback = feedback_for(1001)
        for seed in range(3):
            tensor = noise(1001, 10 * seed + comm.rank)
            comm.all_reduce(tensor, codec=feedback).wait(PATIENCE)
        return tensor, feedback.residual

    of_engines = [run_group(open_group(engine, 3), fn) for engine in ("local", "inproc", "tcp")]
    for ranks in of_engines[1:]:
        for mine, theirs in zip(ranks, of_engines[0], strict=True):
            assert same_bits([mine[0], theirs[0]])
            assert same_bits([mine[1], theirs[1]])


@pytest.mark.parametrize("mebibytes", [8, 64])
@pytest.mark.parametrize("world_size", [2, 3])
def test_int8_sends_at_most_0_26_times_the_bytes(world_size: int, mebibytes: int) -> None:
    count = mebibytes * 2**18 + 3  # ragged: the last piece and its chunks are shorter

    def fn(comm: Communicator) -> float:
        tensor = torch.ones(count)
        comm.all_reduce(tensor, codec=feedback_for(count)).wait(PATIENCE)
        assert bool((tensor == world_size).all())
        return comm.telemetry.counter("link/sent_bytes")

    plain = 2 * (world_size - 1) / world_size * 4 * count  # what a ring sends, without its headers
    for sent in run_group(open_group("inproc", world_size), fn):
        assert 0.25 * plain < sent <= 0.2545 * plain


def wrong_calls(comm: Communicator) -> dict[str, Any]:
    tensor, feedback = torch.ones(6), feedback_for(6)
    return {
        "a maximum": lambda: comm.all_reduce(tensor, ReduceOp.MAX, feedback),
        "a residual of another size": lambda: comm.all_reduce(tensor, codec=feedback_for(5)),
        "a residual of another dtype": lambda: comm.all_reduce(tensor.double(), codec=feedback),
        "integers": lambda: comm.all_reduce(tensor.long(), codec=feedback_for(6, torch.int64)),
        "a residual with gaps": lambda: comm.all_reduce(tensor, codec=ErrorFeedback(CODEC, torch.zeros(12)[::2])),
    }


def test_calls_that_are_wrong_on_their_own_raise_value_error_and_cost_nothing(run_ranks: RunRanks) -> None:
    def fn(comm: Communicator) -> float:
        for name, call in wrong_calls(comm).items():
            with pytest.raises(ValueError, match=r"residual|feedback|codec"):
                call()
            assert name
        tensor = torch.full((6,), 127.0)
        comm.all_reduce(tensor, codec=feedback_for(6)).wait(PATIENCE)
        return float(tensor.sum())

    assert run_ranks(2, fn) == [6 * 254.0] * 2
