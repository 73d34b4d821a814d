"""Several replicas behind one queue: who gets whom, and what happens to the streams of one that fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from serving.test_engine import SAMPLED, Asked, CountingExecutor, decode, expected, make_executor, make_folder, prompts
from smolcluster.errors import PeerLost, ServingError, SmolError
from smolcluster.serving import replica
from smolcluster.serving.engine import Engine
from smolcluster.serving.executor import Executor, MicroBatch, NewTokens
from smolcluster.serving.queue import StreamQueue
from smolcluster.serving.replica import Observer
from smolcluster.serving.requests import Event, Request, Unavailable
from smolcluster.serving.sampling import Sampled, Sampling

TOKENS = 20


class MortalExecutor(CountingExecutor):
    """Fails at the micro-batch of some number, and ever after; a step takes some seconds."""

    dies_at: float = float("inf")
    takes = 0.0

    def submit(self, batch: MicroBatch) -> None:
        time.sleep(self.takes)
        if len(self.batches) >= self.dies_at:
            raise PeerLost("node1 is lost", 1)
        super().submit(batch)

    def failure(self) -> SmolError | None:
        return PeerLost("node1 is lost", 1) if len(self.batches) >= self.dies_at else None


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def answers(llama: Path) -> list[list[int]]:
    return [expected(llama, prompt, TOKENS, **(SAMPLED if n % 2 else {})) for n, prompt in enumerate(prompts()[:6])]


@pytest.fixture
def close() -> Iterator[Callable[[Engine], Engine]]:
    made: list[Engine] = []

    def note(engine: Engine) -> Engine:
        made.append(engine)
        return engine

    yield note
    for engine in made:
        engine.close()


def make(folder: Path, slots: int = 3) -> MortalExecutor:
    executor = make_executor(folder, slots)
    executor.__class__ = MortalExecutor
    assert isinstance(executor, MortalExecutor)
    return executor


def ask(engine: Engine, number: int) -> Asked:
    sampling = Sampling(seed=5, **SAMPLED) if number % 2 else Sampling(temperature=0.0)
    return Asked(engine, Request(prompts()[number], TOKENS, sampling))


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def refuse(_: SmolError) -> Executor:
    raise ServingError("no node is there")


def test_streams_go_to_the_replica_that_has_least_to_do(
    llama: Path, answers: list[list[int]], close: Callable[[Engine], Engine]
) -> None:
    executors = [make(llama), make(llama)]
    for executor in executors:
        executor.takes = 0.02
    engine = close(Engine([(executor, None) for executor in executors], decode))
    asked: list[Asked] = []
    for number in range(6):
        asked.append(ask(engine, number))
        until(lambda: engine.running == len(asked))
        loads = sorted(replica.load for replica in engine.replicas)
        assert loads[1] - loads[0] <= 1
    assert [each.wait().tokens for each in asked] == answers
    assert engine.counts.answer_tokens == 6 * TOKENS


@pytest.mark.parametrize("dies_at", [0, 1, 2, 9])
def test_a_replica_that_dies_loses_no_answer(
    llama: Path, answers: list[list[int]], close: Callable[[Engine], Engine], dies_at: int
) -> None:
    """Also not when the other one has no room for all at once."""
    mortal, other = make(llama), make(llama)
    mortal.dies_at = dies_at
    engine = close(Engine([(mortal, refuse), (other, None)], decode))
    asked = [ask(engine, number) for number in range(6)]
    assert [each.wait().tokens for each in asked] == answers
    until(lambda: engine.replicas[0].is_down)
    assert engine.failure is None, "one is left"
    assert ask(engine, 1).wait().tokens == answers[1]


def test_a_replica_that_comes_back_is_used_again(
    llama: Path, answers: list[list[int]], close: Callable[[Engine], Engine]
) -> None:
    mortal, fresh, other = make(llama), make(llama), make(llama)
    mortal.dies_at = 3
    engine = close(Engine([(mortal, lambda _: fresh), (other, None)], decode))
    assert [each.wait().tokens for each in [ask(engine, number) for number in range(6)]] == answers
    until(lambda: engine.counts.recoveries == 1)
    assert [each.wait().tokens for each in [ask(engine, number) for number in range(6)]] == answers
    assert fresh.batches


def test_without_any_replica_nobody_is_left_waiting(llama: Path, close: Callable[[Engine], Engine]) -> None:
    executors = [make(llama), make(llama)]
    for executor in executors:
        executor.dies_at = 2
    engine = close(Engine([(executor, refuse) for executor in executors], decode))
    asked = [ask(engine, number) for number in range(6)]
    for each in asked:
        assert each.wait().reason == "error"
        assert each.events[-1].error == "no node is there"
    until(lambda: engine.failure is not None)
    with pytest.raises(Unavailable, match="no node is there"):
        engine.submit(Request([1], 1), lambda event: None)


def test_the_next_turn_goes_where_the_conversation_is(llama: Path, close: Callable[[Engine], Engine]) -> None:
    executors = [make(llama), make(llama)]
    engine = close(Engine([(executor, None) for executor in executors], decode))
    turns = {number: prompts()[number] + ask(engine, number).wait().tokens for number in (2, 4)}
    before = engine.counts.reused_tokens
    for number, turn in turns.items():
        Asked(engine, Request([*turn, 1, 2], 3)).wait()
        assert engine.counts.reused_tokens - before >= len(turn) - 1, number
        before = engine.counts.reused_tokens


def test_a_stream_that_waits_can_be_cancelled_and_grows_old(llama: Path, close: Callable[[Engine], Engine]) -> None:
    executor = make(llama, slots=1)
    executor.go.clear()
    engine = close(Engine([(executor, None)], decode, timeout=60))
    first, second = ask(engine, 2), ask(engine, 3)
    until(lambda: engine.running == 1 and engine.waiting == 1)
    engine.cancel(second.number)
    executor.go.set()
    assert second.wait().reason == "cancelled"
    assert first.wait().reason == "length"


def test_who_is_stuck_keeps_nobody_waiting() -> None:
    """The replica that has least to do may be dead, and not known to be."""

    class FakeDesk:
        free, failure, is_down = 2, None, False

        def __init__(self, load: int) -> None:
            self.load = load

        def reusable(self, tokens: object) -> int:
            return 0

    queue, idle, busy = StreamQueue(5), FakeDesk(0), FakeDesk(1)
    queue.desks += [idle, busy]

    def put() -> None:
        engine = object.__new__(Engine)
        engine._decode, engine._queue, engine.length, engine._requests = decode, queue, 50, 0
        engine.submit(Request([1], 2), lambda event: None)

    put()
    assert queue.take(busy) is None
    assert queue.take(idle) is not None
    put()
    taken = threading.Event()
    until(lambda: queue.take(busy) is not None and not taken.set())
    assert taken.is_set()


def test_events_of_one_stream_stay_in_order(llama: Path, close: Callable[[Engine], Engine]) -> None:
    mortal, other = make(llama), make(llama)
    mortal.dies_at = 4
    engine = close(Engine([(mortal, refuse), (other, None)], decode))
    asked = [ask(engine, number) for number in range(6)]
    for each in asked:
        events: list[Event] = each.wait().events
        assert each.text == decode(each.tokens)
        assert [event.finish_reason is None for event in events] == [True] * (len(events) - 1) + [False]


def test_observers_hear_what_stages_take_and_what_lies_between(llama: Path, close: Callable[[Engine], Engine]) -> None:
    class Noting(Observer):
        def __init__(self) -> None:
            self.seconds: list[tuple[int, float]] = []
            self.hops: list[float] = []

        def computed(self, stage: int, seconds: float) -> None:
            self.seconds.append((stage, seconds))

        def hopped(self, seconds: float) -> None:
            self.hops.append(seconds)

    class Distant(CountingExecutor):
        """Two stages that take 10 ms each, and 5 ms from one to the other and back."""

        def submit(self, batch: MicroBatch) -> None:
            time.sleep(0.03)
            super().submit(batch)

        def result(self) -> NewTokens:
            return replace(super().result(), seconds=(0.01, 0.01), hops=2)

    executor = make_executor(llama)
    executor.__class__ = Distant
    noting = Noting()
    engine = close(Engine([(executor, None)], decode, observer=noting))
    Asked(engine, Request([1], 10)).wait()
    assert noting.seconds == [(0, 0.01), (1, 0.01)] * 10
    assert len(noting.hops) == 10
    assert 0.005 <= min(noting.hops) < 0.02


def test_an_engine_ends_though_its_stages_do_not_answer(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(CountingExecutor):
        def result(self) -> NewTokens:
            self.go.wait(60)
            raise PeerLost("the chain is over", 1)

        def abandon(self) -> None:
            self.go.set()

    monkeypatch.setattr(replica, "CLOSE_SECONDS", 0.1)
    executor = make_executor(llama)
    executor.__class__ = Silent
    executor.go.clear()
    engine = Engine([(executor, refuse)], decode)
    asked = ask(engine, 0)
    until(lambda: bool(executor.batches))
    engine.close()
    assert asked.wait().reason == "error"


def test_an_executor_that_cannot_be_made_anew_leaves_nobody_waiting(
    llama: Path, close: Callable[[Engine], Engine]
) -> None:
    def fail(_: SmolError) -> Executor:
        raise RuntimeError("not enough memory")

    mortal = make(llama)
    mortal.dies_at = 2
    engine = close(Engine([(mortal, fail)], decode))
    assert ask(engine, 0).wait().reason == "error"
    until(lambda: engine.failure is not None)
    with pytest.raises(Unavailable):
        engine.submit(Request([1], 1), lambda event: None)


def test_a_text_that_cannot_be_decoded_ends_its_own_stream_only(
    llama: Path, answers: list[list[int]], close: Callable[[Engine], Engine]
) -> None:
    def broken(tokens: Sequence[int]) -> str:
        if answers[1][3] in tokens and answers[1][2] in tokens:
            raise KeyError("no such token")
        return decode(tokens)

    engine = close(Engine([(make(llama), None)], broken))
    asked = [ask(engine, 1), ask(engine, 2)]
    assert asked[0].wait().reason == "error"
    assert len(asked[0].tokens) < TOKENS
    assert asked[1].wait().reason in ("length", "error")
    assert engine.failure is None


def test_streams_wait_for_a_replica_that_is_about_to_come_back(
    llama: Path, answers: list[list[int]], close: Callable[[Engine], Engine]
) -> None:
    """Both fail; the one that has no other executor does not end what the other one will go on with."""
    ready = threading.Event()

    def recover(_: SmolError) -> Executor:
        assert ready.wait(20)
        return make(llama)

    executors = [make(llama), make(llama)]
    for executor in executors:
        executor.dies_at = 4
    engine = close(Engine([(executors[0], recover), (executors[1], refuse)], decode))
    asked = [ask(engine, number) for number in range(6)]
    until(lambda: engine.replicas[1].is_down and engine.replicas[0].failure is not None)
    ready.set()
    assert [each.wait().tokens for each in asked] == answers


@pytest.mark.parametrize("mistake", ["none", "another slot", "another number"])
def test_an_answer_that_was_not_asked_for_is_a_failure_and_nobody_waits_for_ever(
    llama: Path, answers: list[list[int]], close: Callable[[Engine], Engine], mistake: str
) -> None:
    class Odd(CountingExecutor):
        def result(self) -> NewTokens:
            found = super().result()
            if len(self.batches) < 4:
                return found
            if mistake == "another number":
                return replace(found, number=found.number + 1)
            return replace(found, tokens={} if mistake == "none" else {7: Sampled(1)})

    odd = make_executor(llama)
    odd.__class__ = Odd
    engine = close(Engine([(odd, lambda _: make_executor(llama))], decode))
    assert [each.wait().tokens for each in [ask(engine, 0), ask(engine, 1)]] == answers[:2]
    assert engine.counts.recoveries == 1
