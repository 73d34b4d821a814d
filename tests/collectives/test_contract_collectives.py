"""The contract of every Communicator, part 1: what each collective computes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from collectives.contract import PATIENCE, RunRanks, same_bits, values
from smolcluster.collectives.base import Communicator, ReduceOp
from smolcluster.collectives.codec import codec_for

WORLD_SIZES = (1, 2, 3, 4)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NUMBERS = (*FLOATS, torch.int64, torch.int32, torch.uint8)
ALL_DTYPES = (*NUMBERS, torch.bool)
SMALL_COUNTS = (0, 1, 2, 5, 1001)
# More than several pieces of 256 KiB to 1 MiB, and not a multiple of any world size or piece size.
LARGE_COUNT = 3 * 2**18 + 5


def counts(dtype: torch.dtype) -> tuple[int, ...]:
    """Nothing, fewer elements than ranks, odd ones, and above 256 KiB: there the tcp engine begins to use its ring."""
    return (*SMALL_COUNTS, 2**18 // torch.empty((), dtype=dtype).element_size() + 7)


world_sizes = pytest.mark.parametrize("world_size", WORLD_SIZES)


def total(count: int, dtype: torch.dtype, world_size: int) -> torch.Tensor:
    return torch.stack([values(count, dtype, rank).double() for rank in range(world_size)]).sum(0)


def assert_all_equal(actual: torch.Tensor, expected: torch.Tensor, where: object) -> None:
    assert actual.dtype == expected.dtype, where
    assert torch.equal(actual, expected), where


# --- all_reduce ---------------------------------------------------------------------------------------------------


@world_sizes
def test_all_reduce_sums_over_all_ranks_in_place(run_ranks: RunRanks, world_size: int) -> None:
    def fn(comm: Communicator) -> None:
        for dtype in NUMBERS:
            for count in counts(dtype):
                tensor = values(count, dtype, comm.rank)
                comm.all_reduce(tensor).wait(PATIENCE)
                assert_all_equal(tensor, total(count, dtype, world_size).to(dtype), (count, dtype))

    run_ranks(world_size, fn)


@world_sizes
def test_all_reduce_max_takes_the_largest_of_all_ranks(run_ranks: RunRanks, world_size: int) -> None:
    def fn(comm: Communicator) -> None:
        for dtype in NUMBERS:
            for count in counts(dtype):
                tensor = values(count, dtype, comm.rank)
                expected = torch.stack([values(count, dtype, r).double() for r in range(world_size)]).amax(0)
                comm.all_reduce(tensor, ReduceOp.MAX).wait(PATIENCE)
                assert_all_equal(tensor, expected.to(dtype), (count, dtype))

    run_ranks(world_size, fn)


@world_sizes
def test_all_reduce_avg_divides_the_sum_once(run_ranks: RunRanks, world_size: int) -> None:
    # The sums are exact, so one division at the end gives one possible result; thirds added up give another.
    def fn(comm: Communicator) -> None:
        for dtype in FLOATS:
            for count in counts(dtype):
                tensor = values(count, dtype, comm.rank)
                comm.all_reduce(tensor, ReduceOp.AVG).wait(PATIENCE)
                expected = total(count, dtype, world_size).to(dtype) / world_size
                assert_all_equal(tensor, expected, (count, dtype))

    run_ranks(world_size, fn)


@world_sizes
def test_all_reduce_of_a_large_tensor_is_exact(run_ranks: RunRanks, world_size: int) -> None:
    def fn(comm: Communicator) -> None:
        tensor = values(LARGE_COUNT, torch.float32, comm.rank)
        comm.all_reduce(tensor).wait(PATIENCE)
        assert_all_equal(tensor, total(LARGE_COUNT, torch.float32, world_size).float(), LARGE_COUNT)

    run_ranks(world_size, fn)


@world_sizes
def test_all_reduce_gives_every_rank_the_same_bits_and_again_in_a_second_run(
    run_ranks: RunRanks, world_size: int
) -> None:
    def fn(comm: Communicator) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(comm.rank)
        tensors = [torch.randn(n, generator=generator).to(dtype) for dtype in FLOATS for n in (1, 5, 1001, 150_003)]
        for tensor in tensors:
            comm.all_reduce(tensor).wait(PATIENCE)
        return tensors

    first, second = run_ranks(world_size, fn), run_ranks(world_size, fn)
    for position in range(len(first[0])):
        assert same_bits([rank[position] for rank in first + second]), position


@world_sizes
def test_all_reduce_of_random_floats_is_close_to_the_float64_sum(run_ranks: RunRanks, world_size: int) -> None:
    def fn(comm: Communicator) -> None:
        own = [torch.randn(9973, generator=torch.Generator().manual_seed(r)) for r in range(world_size)]
        tensor = own[comm.rank].clone()
        comm.all_reduce(tensor).wait(PATIENCE)
        expected = torch.stack(own).double().sum(0)
        # world_size - 1 additions, each rounds by at most 2^-24 of a partial sum.
        bound = world_size * 2.0**-24 * torch.stack(own).double().abs().sum(0)
        assert bool(((tensor.double() - expected).abs() <= bound).all())

    run_ranks(world_size, fn)


@world_sizes
def test_all_reduce_keeps_shape_and_takes_parameters_and_scalars(run_ranks: RunRanks, world_size: int) -> None:
    def fn(comm: Communicator) -> None:
        cube = torch.full((3, 5, 7), float(comm.rank + 1))
        scalar = torch.tensor(float(comm.rank + 1))
        parameter = torch.nn.Parameter(torch.full((2, 3), float(comm.rank + 1)))
        for tensor in (cube, scalar, parameter):
            shape, pointer = tensor.shape, tensor.data_ptr()
            comm.all_reduce(tensor).wait(PATIENCE)
            assert tensor.shape == shape
            assert tensor.data_ptr() == pointer
            expected = float(world_size * (world_size + 1) // 2)
            assert bool((tensor.detach() == expected).all()), tensor

    run_ranks(world_size, fn)


@world_sizes
def test_all_reduce_of_a_view_leaves_the_rest_of_the_buffer_alone(run_ranks: RunRanks, world_size: int) -> None:
    def fn(comm: Communicator) -> None:
        buffer = torch.ones(100)
        comm.all_reduce(buffer[10:31]).wait(PATIENCE)
        assert bool((buffer[10:31] == world_size).all())
        assert bool((buffer[:10] == 1).all())
        assert bool((buffer[31:] == 1).all())

    run_ranks(world_size, fn)


@world_sizes
def test_sums_carry_nan_and_infinity_to_every_rank(run_ranks: RunRanks, world_size: int) -> None:
    def fn(comm: Communicator) -> torch.Tensor:
        tensor = torch.zeros(1000)
        if comm.rank == world_size - 1:
            tensor[7] = float("nan")
            tensor[998] = float("inf")
        comm.all_reduce(tensor).wait(PATIENCE)
        return tensor

    for tensor in run_ranks(world_size, fn):
        assert torch.isnan(tensor).nonzero().flatten().tolist() == [7]
        assert torch.isinf(tensor).nonzero().flatten().tolist() == [998]


# --- reduce_scatter, all_gather, broadcast ------------------------------------------------------------------------


@world_sizes
@pytest.mark.parametrize("op", ReduceOp, ids=lambda op: op.name)
def test_reduce_scatter_leaves_each_rank_its_part_of_the_reduction(
    run_ranks: RunRanks, world_size: int, op: ReduceOp
) -> None:
    def fn(comm: Communicator) -> None:
        for dtype in FLOATS if op == ReduceOp.AVG else NUMBERS:
            for count in counts(dtype):
                every = torch.stack([values(world_size * count, dtype, r).double() for r in range(world_size)])
                whole = (every.amax(0) if op == ReduceOp.MAX else every.sum(0)).to(dtype)
                if op == ReduceOp.AVG:
                    whole = whole / world_size
                output = torch.full((count,), 9, dtype=dtype)
                comm.reduce_scatter(output, values(world_size * count, dtype, comm.rank), op).wait(PATIENCE)
                expected = whole[comm.rank * count : (comm.rank + 1) * count]
                assert_all_equal(output, expected, (count, dtype))

    run_ranks(world_size, fn)


@world_sizes
def test_reduce_scatter_may_write_into_its_own_part_of_the_input(run_ranks: RunRanks, world_size: int) -> None:
    def fn(comm: Communicator) -> None:
        count = 1001
        tensor = values(world_size * count, torch.float32, comm.rank)
        own = tensor[comm.rank * count : (comm.rank + 1) * count]
        comm.reduce_scatter(own, tensor).wait(PATIENCE)
        expected = total(world_size * count, torch.float32, world_size).float()
        assert_all_equal(own, expected[comm.rank * count : (comm.rank + 1) * count], comm.rank)

    run_ranks(world_size, fn)


@world_sizes
def test_all_gather_puts_the_parts_in_rank_order(run_ranks: RunRanks, world_size: int) -> None:
    def fn(comm: Communicator) -> None:
        for dtype in ALL_DTYPES:
            for count in counts(dtype):
                output = torch.ones(world_size * count, dtype=dtype)
                source = values(count, dtype, comm.rank)
                comm.all_gather(output, source).wait(PATIENCE)
                expected = torch.cat([values(count, dtype, r) for r in range(world_size)])
                assert_all_equal(output, expected, (count, dtype))
                assert_all_equal(source, values(count, dtype, comm.rank), "the input changed")

    run_ranks(world_size, fn)


@world_sizes
def test_all_gather_may_read_its_input_from_its_own_part_of_the_output(run_ranks: RunRanks, world_size: int) -> None:
    def fn(comm: Communicator) -> None:
        for count in (1, 1001, LARGE_COUNT):
            output = torch.zeros(world_size * count)
            own = output[comm.rank * count : (comm.rank + 1) * count]
            own.copy_(values(count, torch.float32, comm.rank))
            comm.all_gather(output, own).wait(PATIENCE)
            expected = torch.cat([values(count, torch.float32, r) for r in range(world_size)])
            assert_all_equal(output, expected, count)

    run_ranks(world_size, fn)


@world_sizes
def test_broadcast_copies_the_tensor_of_any_source(run_ranks: RunRanks, world_size: int) -> None:
    def fn(comm: Communicator) -> None:
        for dtype in ALL_DTYPES:
            for src in range(world_size):
                for count in SMALL_COUNTS:
                    tensor = values(count, dtype, comm.rank)
                    comm.broadcast(tensor, src).wait(PATIENCE)
                    assert_all_equal(tensor, values(count, dtype, src), (src, count, dtype))

    run_ranks(world_size, fn)


@world_sizes
def test_broadcast_writes_parameters_that_require_grad(run_ranks: RunRanks, world_size: int) -> None:
    def fn(comm: Communicator) -> None:
        parameter = torch.nn.Parameter(torch.full((4, 3), float(comm.rank)))
        comm.broadcast(parameter).wait(PATIENCE)
        assert bool((parameter.detach() == 0).all())
        assert parameter.requires_grad
        large = values(LARGE_COUNT, torch.float32, comm.rank)
        comm.broadcast(large, world_size - 1).wait(PATIENCE)
        assert_all_equal(large, values(LARGE_COUNT, torch.float32, world_size - 1), "large")

    run_ranks(world_size, fn)


# --- all_to_all -----------------------------------------------------------------------------------------------------


@world_sizes
def test_all_to_all_transposes_equal_parts(run_ranks: RunRanks, world_size: int) -> None:
    def fn(comm: Communicator) -> None:
        for dtype, rows in itertools.product(ALL_DTYPES, (0, 1, 5, 333)):
            sent = [values(world_size * rows * 3, dtype, r).reshape(world_size * rows, 3) for r in range(world_size)]
            output = torch.ones(world_size * rows, 3, dtype=dtype)
            comm.all_to_all(output, sent[comm.rank]).wait(PATIENCE)
            expected = torch.cat([t[comm.rank * rows : (comm.rank + 1) * rows] for t in sent])
            assert_all_equal(output, expected, (rows, dtype))

    run_ranks(world_size, fn)


def split_rows(src: int, dst: int) -> int:
    """Rows that src sends to dst in the uneven test; some pairs exchange nothing."""
    return (5 * src + 3 * dst) % 4


@world_sizes
def test_all_to_all_moves_uneven_rows_and_none_at_all(run_ranks: RunRanks, world_size: int) -> None:
    def fn(comm: Communicator) -> None:
        input_rows = [split_rows(comm.rank, dst) for dst in range(world_size)]
        output_rows = [split_rows(src, comm.rank) for src in range(world_size)]
        blocks = {
            (src, dst): torch.full((split_rows(src, dst), 2, 3), 10.0 * src + dst)
            for src in range(world_size)
            for dst in range(world_size)
        }
        source = torch.cat([blocks[comm.rank, dst] for dst in range(world_size)])
        output = torch.zeros(sum(output_rows), 2, 3)
        comm.all_to_all(output, source, output_rows, input_rows).wait(PATIENCE)
        assert_all_equal(output, torch.cat([blocks[src, comm.rank] for src in range(world_size)]), comm.rank)

    run_ranks(world_size, fn)


@world_sizes
def test_all_to_all_moves_large_uneven_rows(run_ranks: RunRanks, world_size: int) -> None:
    def fn(comm: Communicator) -> None:
        def rows(src: int, dst: int) -> int:
            return 1000 * (1 + src + 2 * dst)

        source = torch.cat([torch.full((rows(comm.rank, d), 64), 10.0 * comm.rank + d) for d in range(world_size)])
        output_rows = [rows(src, comm.rank) for src in range(world_size)]
        output = torch.zeros(sum(output_rows), 64)
        input_rows = [rows(comm.rank, dst) for dst in range(world_size)]
        comm.all_to_all(output, source, output_rows, input_rows).wait(PATIENCE)
        for src, part in enumerate(output.split(output_rows)):
            assert bool((part == 10.0 * src + comm.rank).all()), src

    run_ranks(world_size, fn)


@world_sizes
def test_all_to_all_ragged_brings_shapes_along(run_ranks: RunRanks, world_size: int) -> None:
    def block(src: int, dst: int, dtype: torch.dtype) -> torch.Tensor:
        rows = split_rows(src, dst)
        return values(rows * 4, dtype, 5 * src + dst).reshape(rows, 2, 2)

    def fn(comm: Communicator) -> None:
        for dtype in ALL_DTYPES:
            work = comm.all_to_all_ragged([block(comm.rank, dst, dtype) for dst in range(world_size)])
            work.wait(PATIENCE)
            received = work.result()
            assert len(received) == world_size
            for src, tensor in enumerate(received):
                assert tensor.shape == block(src, comm.rank, dtype).shape, (src, dtype)
                assert_all_equal(tensor, block(src, comm.rank, dtype), (src, dtype))

    run_ranks(world_size, fn)


@world_sizes
def test_all_to_all_ragged_of_only_empty_tensors(run_ranks: RunRanks, world_size: int) -> None:
    def fn(comm: Communicator) -> None:
        received = comm.all_to_all_ragged([torch.empty(0, 5) for _ in range(world_size)]).result()
        assert [tuple(t.shape) for t in received] == [(0, 5)] * world_size

    run_ranks(world_size, fn)


@world_sizes
def test_all_to_all_ragged_gives_large_tensors_that_belong_to_the_receiver(
    run_ranks: RunRanks, world_size: int
) -> None:
    def fn(comm: Communicator) -> None:
        sent = [torch.full((100_000 + comm.rank,), float(comm.rank)) for _ in range(world_size)]
        received = comm.all_to_all_ragged(sent).result()
        comm.barrier(PATIENCE)
        for tensor in sent:
            tensor.fill_(-1)
        comm.barrier(PATIENCE)
        for src, tensor in enumerate(received):
            assert tensor.shape == (100_000 + src,)
            assert bool((tensor == src).all()), src

    run_ranks(world_size, fn)


# --- exchange, barrier ----------------------------------------------------------------------------------------------


@world_sizes
def test_exchange_returns_the_messages_in_rank_order(run_ranks: RunRanks, world_size: int) -> None:
    def message(rank: int) -> Any:
        return [None, {"rank": rank, "parts": [1, 2.5, True], "name": "größer"}, "x" * 5000, rank][rank % 4]

    def fn(comm: Communicator) -> None:
        for round_number in range(3):
            expected = [message(r + round_number) for r in range(world_size)]
            assert comm.exchange(message(comm.rank + round_number), PATIENCE) == expected

    run_ranks(world_size, fn)


@world_sizes
def test_exchanged_messages_are_copies(run_ranks: RunRanks, world_size: int) -> None:
    def fn(comm: Communicator) -> None:
        messages = comm.exchange({"parts": []}, PATIENCE)
        for message in messages:
            assert isinstance(message, dict)
            parts = message["parts"]
            assert isinstance(parts, list)
            parts.append(comm.rank)
        comm.barrier(PATIENCE)
        assert messages == [{"parts": [comm.rank]}] * world_size

    run_ranks(world_size, fn)


@world_sizes
def test_collectives_and_exchanges_keep_their_order(run_ranks: RunRanks, world_size: int) -> None:
    def fn(comm: Communicator) -> None:
        first = torch.ones(1001)
        second = torch.ones(3)
        first_work = comm.all_reduce(first)
        second_work = comm.broadcast(second, world_size - 1)
        assert comm.exchange(comm.rank, PATIENCE) == list(range(world_size))
        # Collectives of one communicator run in the order of their calls: these two came before the exchange.
        assert first_work.done()
        assert second_work.done()
        comm.barrier(PATIENCE)
        assert bool((first == world_size).all())

    run_ranks(world_size, fn)


# --- codecs ---------------------------------------------------------------------------------------------------------


@world_sizes
@pytest.mark.parametrize("compression", ["bf16", "fp16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_all_reduce_with_a_codec_gives_the_same_bits_near_the_exact_sum(
    run_ranks: RunRanks, world_size: int, compression: str, dtype: torch.dtype
) -> None:
    # Each encoding rounds by at most 2^-8 (bf16) or 2^-11 (fp16) of the value; at most world_size of them (a ring
    # encodes each partial sum), and one of the result. The floor covers fp16's subnormal numbers.
    unit = {"bf16": 2.0**-8, "fp16": 2.0**-11}[compression]
    counts = (0, 1, 5, 1001, 300_007)

    def inputs(count: int) -> list[torch.Tensor]:
        return [torch.randn(count, generator=torch.Generator().manual_seed(r), dtype=dtype) for r in range(world_size)]

    def fn(comm: Communicator) -> list[torch.Tensor]:
        codec = codec_for(compression)
        results = []
        for count in counts:
            for op in ReduceOp:
                tensor = inputs(count)[comm.rank]
                comm.all_reduce(tensor, op, codec).wait(PATIENCE)
                results.append(tensor)
        return results

    ranks = run_ranks(world_size, fn)
    for position, (count, op) in enumerate((c, o) for c in counts for o in ReduceOp):
        assert same_bits([rank[position] for rank in ranks]), (count, op)
        every = torch.stack(inputs(count)).double()
        exact = {ReduceOp.SUM: every.sum(0), ReduceOp.AVG: every.mean(0), ReduceOp.MAX: every.amax(0)}[op]
        scale = every.abs().sum(0) / (world_size if op == ReduceOp.AVG else 1)
        error = (ranks[0][position].double() - exact).abs()
        assert bool((error <= (world_size + 1) * unit * 1.01 * scale + 1e-6).all()), (count, op, error.max())


@world_sizes
@pytest.mark.parametrize("compression", ["bf16", "fp16"])
def test_reduce_scatter_and_all_gather_with_a_codec_are_near_the_exact_values(
    run_ranks: RunRanks, world_size: int, compression: str
) -> None:
    unit = {"bf16": 2.0**-8, "fp16": 2.0**-11}[compression]

    def fn(comm: Communicator) -> torch.Tensor:
        codec = codec_for(compression)
        count = 1003
        every = [torch.randn(world_size * count, generator=torch.Generator().manual_seed(r)) for r in range(world_size)]
        own = slice(comm.rank * count, (comm.rank + 1) * count)
        part = torch.empty(count)
        comm.reduce_scatter(part, every[comm.rank].clone(), ReduceOp.SUM, codec).wait(PATIENCE)
        stacked = torch.stack(every).double()
        bound = (world_size + 1) * unit * 1.01 * stacked.abs().sum(0)[own] + 1e-6
        assert bool(((part.double() - stacked.sum(0)[own]).abs() <= bound).all())
        gathered = torch.empty(world_size * count)
        comm.all_gather(gathered, every[comm.rank][own].contiguous(), codec).wait(PATIENCE)
        parts = torch.cat([every[r][r * count : (r + 1) * count] for r in range(world_size)])
        assert bool(((gathered - parts).abs() <= unit * 1.01 * parts.abs() + 1e-6).all())
        return gathered

    # Every rank holds what the codec made of each part, its own included.
    assert same_bits(run_ranks(world_size, fn))


# --- calls that are wrong on their own ------------------------------------------------------------------------------


def wrong_calls(comm: Communicator) -> dict[str, Any]:
    n = comm.world_size
    matrix = torch.ones(4, 6)
    codec = codec_for("bf16")
    return {
        "all_reduce of a transposed tensor": lambda: comm.all_reduce(matrix.t()),
        "all_reduce of every second element": lambda: comm.all_reduce(torch.ones(10)[::2]),
        "broadcast of a transposed tensor": lambda: comm.broadcast(matrix.t()),
        "broadcast from a rank that is not there": lambda: comm.broadcast(matrix, n),
        "broadcast from a negative rank": lambda: comm.broadcast(matrix, -1),
        "average of integers": lambda: comm.all_reduce(torch.ones(3, dtype=torch.int64), ReduceOp.AVG),
        "sum of booleans": lambda: comm.all_reduce(torch.ones(3, dtype=torch.bool)),
        "codec on integers": lambda: comm.all_reduce(torch.ones(3, dtype=torch.int64), codec=codec),
        "reduce_scatter into the wrong count": lambda: comm.reduce_scatter(torch.ones(3), torch.ones(3 * n + 1)),
        "reduce_scatter into another dtype": lambda: comm.reduce_scatter(
            torch.ones(3, dtype=torch.float64), torch.ones(3 * n)
        ),
        "all_gather into the wrong count": lambda: comm.all_gather(torch.ones(3 * n + 1), torch.ones(3)),
        "all_gather into another dtype": lambda: comm.all_gather(torch.ones(3 * n, dtype=torch.float64), torch.ones(3)),
        "all_to_all with rows that do not add up": lambda: comm.all_to_all(
            torch.ones(n, 2), torch.ones(n, 2), [1] * n, [2] * n
        ),
        "all_to_all with too few rows": lambda: comm.all_to_all(torch.ones(n, 2), torch.ones(n, 2), [n], [n, 0]),
        "all_to_all of other row shapes": lambda: comm.all_to_all(torch.ones(n, 2), torch.ones(n, 3)),
        "ragged all_to_all of too many tensors": lambda: comm.all_to_all_ragged([torch.ones(1)] * (n + 1)),
        "send to a rank that is not there": lambda: comm.send(torch.ones(1), n, 0),
        "receive from a rank that is not there": lambda: comm.recv(n, 0),
        "exchange of what is not JSON": lambda: comm.exchange({1, 2}),  # type: ignore[arg-type]
        "exchange of more than 1 MiB": lambda: comm.exchange("x" * (2**20 + 1)),
        "split of a rank that is not there": lambda: comm.split([0, n], "wrong"),
        "split with a rank twice": lambda: comm.split([0, 0], "wrong"),
    }


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_call_that_is_wrong_on_its_own_raises_value_error_and_disturbs_nobody(
    run_ranks: RunRanks, world_size: int
) -> None:
    def fn(comm: Communicator) -> None:
        for name, call in wrong_calls(comm).items():
            if comm.rank == 0:
                try:
                    call()
                except (ValueError, TypeError):
                    pass
                else:
                    pytest.fail(f"{name} was accepted")
            # The other ranks never see the refused call: the next collective still matches.
            tensor = torch.ones(3)
            comm.all_reduce(tensor).wait(PATIENCE)
            assert tensor.tolist() == [world_size] * 3, name

    run_ranks(world_size, fn)
