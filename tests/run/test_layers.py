"""Which layers each rank gets, and what the user is told of it; ranks are threads, their memory is made up."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from smolcluster.collectives.local import LocalCommunicator, LocalGroup
from smolcluster.config.load import load_config
from smolcluster.config.schema import Config
from smolcluster.data.source import TrainingData, open_data
from smolcluster.errors import ConfigError
from smolcluster.models.gpt import GPT, GPTConfig
from smolcluster.models.simple_nn import SimpleNN
from smolcluster.run import layers as layers_module
from smolcluster.run.layers import blocks_per_rank, decide_split, describe_split, fair_shares, stages_per_rank
from smolcluster.run.support import rank_weights

NAMES = ["mini1", "mini2", "mini3"]
# Free bytes for each block of `chain`: weights, gradients and AdamW's state in fp32; a fifth is for other things.
A_BLOCK = round(110 * 16 / 0.8)


def make_config(*overrides: str) -> Config:
    return load_config(overrides=["algorithm=mp", "training.device=cpu", *overrides]).config


def chain(blocks: int) -> nn.Module:
    """Blocks that are alike, 110 parameters each; an entry and an exit with nothing in them."""
    return nn.Sequential(*(nn.Linear(10, 10) for _ in range(blocks)))


def own_rank() -> int:
    return int(threading.current_thread().name.rpartition("-")[2])


class Cluster:
    """Ranks that decide; `told` is what rank 0 shows the user."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.told: list[str] = []
        self.measured = 0
        self._patch = monkeypatch
        self.has(*[{"large": 2**40}] * 8)

    def has(self, *pools: dict[str, int]) -> Cluster:
        """What each rank takes memory from."""
        self._patch.setattr(layers_module, "memory_pools", lambda: pools[own_rank()])
        return self

    def takes(self, *times: Sequence[float]) -> Cluster:
        """What each rank measures."""

        def measure(*_: Any) -> list[float]:
            self.measured += 1
            return list(times[own_rank()])

        self._patch.setattr(layers_module, "measure_layers", measure)
        return self

    def decides(
        self,
        config: Config,
        model: nn.Module,
        world_size: int,
        kept: list[range] | None = None,
        data: Any = None,
        device: str = "cpu",
    ) -> list[range]:
        names = [f"rank{rank}" for rank in range(world_size)]

        def rank(comm: LocalCommunicator) -> list[range]:
            return decide_split(
                config,
                model,
                cast("TrainingData", data),
                comm,
                blocks=blocks_per_rank(config, names),
                speeds=rank_weights(config, names),
                device=torch.device(device),
                kept=kept,
                say=self.told.append if comm.rank == 0 else None,
            )

        splits = LocalGroup(world_size).run(rank)
        assert all(split == splits[0] for split in splits)
        return splits[0]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


def blocks_in(split: list[range], blocks: int) -> list[int]:
    return [sum(0 < layer <= blocks for layer in part) for part in split]


# ---- what the configuration says


def test_a_distribution_by_host_is_read_in_rank_order() -> None:
    config = make_config("cluster.layer_distribution={mini3: 3, mini1: 1, mini2: 2}")
    assert blocks_per_rank(config, NAMES) == [1, 2, 3]
    assert blocks_per_rank(make_config("cluster.layer_distribution=[3, 1, 2]"), NAMES) == [3, 1, 2]
    assert blocks_per_rank(make_config(), NAMES) is None


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("{mini1: 1, mini2: 2}", "has mini1, mini2, but the ranks are mini1, mini2, mini3. Name each of them once"),
        ("{mini1: 1, mini2: 2, mini3: 1, pi: 2}", "has mini1, mini2, mini3, pi, but the ranks are"),
        ("{mini1: 1, mini2: 2, pi: 2}", "has mini1, mini2, pi, but the ranks are"),
        ("[1, 2]", "has 2 numbers for 3 ranks. Give one for each"),
        ("[1, 2, 3, 4]", "has 4 numbers for 3 ranks"),
    ],
)
def test_a_distribution_over_other_ranks_is_refused(given: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        blocks_per_rank(make_config(f"cluster.layer_distribution={given}"), NAMES)


def test_only_an_interleaved_pipeline_has_several_stages_per_rank() -> None:
    three = "training.stages_per_rank=3"
    assert stages_per_rank(make_config(three, "training.schedule=interleaved")) == 1
    assert stages_per_rank(make_config("algorithm=mp_pipeline", three, "training.schedule=1f1b")) == 1
    assert stages_per_rank(make_config("algorithm=mp_pipeline", three, "training.schedule=interleaved")) == 3


# ---- what the user is told of a split


def test_each_ranks_layers_are_named_with_their_parameters() -> None:
    model = GPT(GPTConfig(50, 8, 4, 2, 16, 0.0, 8), seed=0)
    every = sum(param.numel() for param in model.parameters())
    block = sum(p.numel() for p in model.get_submodule(model.layers().blocks[0]).parameters())
    entry, norm = 50 * 8 + 8 * 8, 16
    assert every == entry + 4 * block + norm
    assert describe_split([range(3), range(3, 4), range(4, 6)], model, 3) == (
        f"layers: rank 0 entry, blocks 0 to 1 ({entry + 2 * block:,} parameters); rank 1 block 2 ({block:,} "
        f"parameters); rank 2 block 3, exit ({block + norm + 50 * 8:,} parameters)"
    )
    interleaved = [range(1), range(1, 2), range(2, 3), range(3, 6)]
    assert describe_split(interleaved, model, 2) == (
        f"layers: rank 0 entry, block 1 ({entry + block:,} parameters); rank 1 blocks 0, 2 to 3, exit "
        f"({3 * block + norm + 50 * 8:,} parameters)"
    )
    # The head is tied to the embedding, and there once.
    assert describe_split([range(6)], model, 1) == f"layers: rank 0 entry, blocks 0 to 3, exit ({every:,} parameters)"


def test_a_rank_may_have_nothing() -> None:
    """A Sequential has an entry and an exit with no modules, and they count as layers."""
    told = describe_split([range(1), range(1, 2), range(2, 3), range(3, 4)], chain(2), 4)
    assert told == (
        "layers: rank 0 nothing (0 parameters); rank 1 block 0 (110 parameters); rank 2 block 1 (110 parameters); "
        "rank 3 nothing (0 parameters)"
    )


# ---- shares of memory


def test_ranks_of_one_machine_have_equal_parts_of_what_it_has_left() -> None:
    assert fair_shares([{"a": 900}, {"b": 900}, {"a": 600}]) == [450, 900, 300]


def test_a_rank_with_a_limit_of_its_own_has_that() -> None:
    machine = {"a": 9000}
    assert fair_shares([{**machine, "a/1": 500}, {**machine, "a/2": 400}, machine]) == [500, 400, 3000]


def test_ranks_of_one_container_divide_what_the_container_may_use() -> None:
    container = {"a": 9000, "a/docker": 1000}
    assert fair_shares([container, container, {"a": 9000}]) == [500, 500, 3000]


# ---- deciding


def test_equal_ranks_get_equal_layers(cluster: Cluster) -> None:
    assert blocks_in(cluster.decides(make_config(), chain(12), 3), 12) == [4, 4, 4]
    assert cluster.told == []


def test_speeds_divide_the_layers(cluster: Cluster) -> None:
    assert blocks_in(cluster.decides(make_config("cluster.shares=[1, 3, 2]"), chain(12), 3), 12) == [2, 6, 4]


def test_a_rank_gets_no_more_than_it_has_memory_for(cluster: Cluster) -> None:
    cluster.has({"a": 2 * A_BLOCK}, {"b": 100 * A_BLOCK}, {"c": 100 * A_BLOCK})
    assert blocks_in(cluster.decides(make_config(), chain(12), 3), 12) == [2, 5, 5]
    assert cluster.told == []


def test_memory_limits_what_speed_would_give(cluster: Cluster) -> None:
    cluster.has({"a": 100 * A_BLOCK}, {"b": 3 * A_BLOCK}, {"c": 100 * A_BLOCK})
    assert blocks_in(cluster.decides(make_config("cluster.shares=[1, 3, 2]"), chain(12), 3), 12) == [3, 3, 6]
    assert cluster.told == []


def test_who_shares_a_machine_shares_its_memory(cluster: Cluster) -> None:
    """Each of the two ranks on machine a sees room for 8 blocks; there are not 16."""
    cluster.has({"a": 8 * A_BLOCK}, {"a": 8 * A_BLOCK}, {"b": 8 * A_BLOCK})
    assert blocks_in(cluster.decides(make_config("cluster.shares=[2, 2, 1]"), chain(12), 3), 12) == [4, 4, 4]
    assert blocks_in(cluster.decides(make_config("cluster.shares=[2, 2, 1]"), chain(16), 3), 16) == [4, 4, 8]
    assert cluster.told == []


def test_who_shares_a_gpu_shares_its_memory_whatever_its_number_is(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process sees a GPU 0: two of them the same one, the third another one."""
    cluster.has(*[{"machine": 2 * A_BLOCK}] * 3)  # on a GPU the machine's memory does not count
    uuids = ["GPU-1", "GPU-1", "GPU-2"]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuids[own_rank()]))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 * A_BLOCK, 9 * A_BLOCK))
    assert blocks_in(cluster.decides(make_config(), chain(16), 3, device="cuda:0"), 16) == [4, 4, 8]
    assert cluster.told == []


@pytest.mark.parametrize(
    ("overrides", "blocks"),
    [
        (("training.optimizer=sgd",), 8),  # 8 bytes a parameter instead of 16
        (("training.precision=fp64",), 2),  # 32
        (("cluster.staleness_bound=1",), 2),  # 28: the weights twice more, and another gradient
    ],
)
def test_what_a_parameter_takes_depends_on_the_training(
    overrides: tuple[str, ...], blocks: int, cluster: Cluster
) -> None:
    cluster.has({"a": 4 * A_BLOCK}, {"b": 100 * A_BLOCK})
    assert blocks_in(cluster.decides(make_config(*overrides), chain(16), 2), 16) == [blocks, 16 - blocks]


def test_without_enough_memory_all_ranks_get_too_much_by_the_same_factor(cluster: Cluster) -> None:
    """12 blocks where there is room for 2 + 4 + 2; by time it would be 4 each."""
    model = nn.Sequential(*(nn.Linear(2**10, 2**10, bias=False, device="meta") for _ in range(12)))
    a_block = 2**20 * 16 * 5 // 4
    cluster.has({"a": 2 * a_block}, {"b": 4 * a_block}, {"c": 2 * a_block})
    assert blocks_in(cluster.decides(make_config(), model, 3), 12) == [3, 6, 3]
    assert cluster.told == [
        "warning: memory may not suffice on 3 of 3 ranks: rank 1 needs about 96.0 MiB for 6,291,456 parameters with "
        "gradients and optimizer state, and has 64.0 MiB for them (80% of its part of the free memory). Missing: 32.0 "
        "MiB, over all ranks 64.0 MiB. The layers are cut by what is free, not by time. Take a smaller model or more "
        "machines; algorithm fsdp (cluster.fsdp_stage 3) also cuts large layers; training.optimizer sgd has no state; "
        "training.activation_checkpointing leaves more room"
    ]


def test_the_warning_says_how_much_is_missing_and_only_what_would_help(cluster: Cluster) -> None:
    gib = 2**30
    model = nn.Sequential(*(nn.Linear(2**14, 2**13, bias=False, device="meta") for _ in range(8)))  # 0.5 GiB each
    cluster.has({"a": gib}, {"b": 3 * gib})
    options = ("training.optimizer=sgd", "cluster.staleness_bound=1", "training.activation_checkpointing=true")
    assert blocks_in(cluster.decides(make_config(*options), model, 2), 8) == [2, 6]
    (told,) = cluster.told
    # Each block is there 5 times: 5 GiB of 0.8, and 15 of 2.4.
    assert "on 2 of 2 ranks: rank 1 needs about 15.00 GiB for 805,306,368 parameters" in told
    assert "has 2.40 GiB for them" in told
    assert "Missing: 12.60 GiB, over all ranks 16.80 GiB." in told
    assert "cluster.staleness_bound 0 keeps no copies" in told
    assert "sgd" not in told
    assert "activation_checkpointing" not in told
    assert "\n" not in told


def test_one_rank_that_cannot_have_its_layer_does_not_free_the_others_of_their_limits(cluster: Cluster) -> None:
    """The first layer is too large for rank 0 and has to be there; rank 1's room stays what counts for the rest."""
    large = nn.Linear(10, 100, bias=False)
    model = nn.Sequential(large, *(nn.Linear(100, 1) for _ in range(20)))  # 1000 parameters, and 20 times 101
    room = 16 / 0.8
    cluster.has({"a": round(900 * room)}, {"b": round(1010 * room)}, {"c": round(1010 * room)})
    split = cluster.decides(make_config("cluster.shares=[8, 1, 1]"), model, 3)
    assert blocks_in(split, 21) == [1, 10, 10]
    (told,) = cluster.told
    assert "on 1 of 3 ranks: rank 0 " in told


def test_ranks_with_no_memory_at_all_still_get_a_split(cluster: Cluster) -> None:
    cluster.has({"a": 0}, {"a": 0})
    assert blocks_in(cluster.decides(make_config(), chain(8), 2), 8) == [4, 4]
    assert len(cluster.told) == 1


def test_the_stages_of_a_rank_share_its_memory(cluster: Cluster) -> None:
    config = make_config("algorithm=mp_pipeline", "training.schedule=interleaved", "training.stages_per_rank=2")
    cluster.has({"a": 4 * A_BLOCK}, {"b": 100 * A_BLOCK})
    counts = blocks_in(cluster.decides(config, chain(12), 2), 12)
    assert counts[0] + counts[2] == 4
    assert cluster.told == []


def test_a_tied_head_that_lies_on_one_rank_takes_memory_once(cluster: Cluster) -> None:
    model = GPT(GPTConfig(500, 8, 1, 2, 16, 0.0, 8), seed=0)
    parameters = sum(param.numel() for param in model.parameters())
    cluster.has({"a": round(1.01 * parameters * 16 / 0.8)})
    assert cluster.decides(make_config(), model, 1) == [range(3)]
    assert cluster.told == []


def test_a_given_distribution_counts_and_the_user_is_told_where_it_takes_too_much_memory(cluster: Cluster) -> None:
    cluster.has({"a": 100 * A_BLOCK}, {"b": 4 * A_BLOCK})
    config = make_config("cluster.layer_distribution=[2, 10]")
    split = cluster.decides(config, chain(12), 2, kept=[range(5), range(5, 14)])
    assert blocks_in(split, 12) == [2, 10]
    (told,) = cluster.told
    assert "on 1 of 2 ranks: rank 1 " in told
    assert "cut by what is free" not in told


def test_measured_times_divide_the_layers(cluster: Cluster) -> None:
    cluster.takes([0.0, *[1.0] * 12, 0.0], [0.0, *[3.0] * 12, 0.0])
    data = open_data("digits")
    split = cluster.decides(make_config("cluster.shares=auto"), chain(12), 2, data=data)
    assert blocks_in(split, 12) == [9, 3]
    cluster.has({"a": 6 * A_BLOCK}, {"b": 100 * A_BLOCK})
    split = cluster.decides(make_config("cluster.shares=auto"), chain(12), 2, data=data)
    assert blocks_in(split, 12) == [6, 6]
    assert cluster.measured == 4


@pytest.mark.parametrize(("machines", "at_once"), [("aaaa", 1), ("abab", 2), ("aaba", 2), ("abcd", 4)])
def test_ranks_of_one_machine_measure_in_turn(
    machines: str, at_once: int, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of several machines at the same time."""
    lock, begun = threading.Lock(), threading.Barrier(at_once)
    measuring: list[str] = []
    most = 0

    def measure(*_: Any) -> list[float]:
        nonlocal most
        machine = machines[own_rank()]
        with lock:
            assert machine not in measuring, "two ranks of one machine"
            measuring.append(machine)
            most = max(most, len(measuring))
        # Nobody goes on before as many measure as may: of the first round, which has a rank of each machine.
        if own_rank() == machines.index(machine):
            begun.wait(10)
        with lock:
            measuring.remove(machine)
        return [1.0 + own_rank()] * 14

    monkeypatch.setattr(layers_module, "measure_layers", measure)
    monkeypatch.setattr(layers_module, "machine_name", lambda: machines[own_rank()])
    split = cluster.decides(make_config("cluster.shares=auto"), chain(12), 4, data=open_data("digits"))
    assert most == at_once
    assert len(split[0]) > len(split[3])


def test_a_shared_parameter_is_refused_before_anything_is_said_of_layers(cluster: Cluster) -> None:
    linear = nn.Linear(10, 10)
    model = nn.Sequential(linear, nn.Tanh(), linear, nn.Linear(10, 10))
    with pytest.raises(ConfigError, match=r"shared by layers \[1, 3\]"):
        cluster.decides(make_config(), model, 2)
    assert cluster.told == []


def test_too_few_layers_for_an_interleaved_pipeline_name_its_stages_per_rank(cluster: Cluster) -> None:
    config = make_config("algorithm=mp_pipeline", "training.schedule=interleaved", "training.stages_per_rank=5")
    with pytest.raises(
        ConfigError, match=r"10 stages\. Take fewer ranks, training\.stages_per_rank below 5, or a model"
    ):
        cluster.decides(config, chain(4), 2)
    with pytest.raises(ConfigError, match=r"7 stages\. Take fewer ranks, or a model"):
        cluster.decides(make_config(), chain(4), 7)


def test_a_split_that_is_kept_is_neither_measured_nor_cut_by_memory(cluster: Cluster) -> None:
    cluster.takes([1.0] * 14, [3.0] * 14)
    cluster.has({"a": 4 * A_BLOCK}, {"b": 100 * A_BLOCK})
    kept = [range(6), range(6, 14)]
    assert cluster.decides(make_config("cluster.shares=auto"), chain(12), 2, kept=kept) == kept
    assert cluster.measured == 0
    assert "on 1 of 2 ranks: rank 0 " in cluster.told[0]


@pytest.mark.parametrize(
    "kept",
    [
        [range(3), range(3, 6), range(6, 14)],
        [range(6), range(6, 13)],
        [range(6), range(7, 14)],
        [range(14), range(14, 14)],
        [range(1, 6), range(6, 14)],
        [],
    ],
    ids=["three stages", "too few layers", "a gap", "an empty stage", "not from the first", "nothing"],
)
def test_a_split_of_another_pipeline_or_model_is_not_kept(kept: list[range], cluster: Cluster) -> None:
    assert blocks_in(cluster.decides(make_config(), chain(12), 2, kept=kept), 12) == [6, 6]


def test_too_few_layers_are_refused_also_where_memory_is_short(cluster: Cluster) -> None:
    cluster.has(*[{"a": 10}] * 6)
    with pytest.raises(ConfigError, match="the model has 3 layers, its entry and exit among them, which is too few"):
        cluster.decides(make_config(), SimpleNN(8, 8, 4, seed=0), 6)
