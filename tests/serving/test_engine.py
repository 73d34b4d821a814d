"""The engine in one process: what many streams get, each as if it were alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.hf_folders import FAMILIES, VOCAB, make_hf_folder, transformers
from smolcluster.errors import PeerLost, ServingError, SmolError
from smolcluster.models.decoder import Segment
from smolcluster.models.decoder_config import read_decoder_config
from smolcluster.models.decoder_files import DecoderLoader
from smolcluster.models.linear import WeightKind
from smolcluster.models.tensor_files import TensorFiles
from smolcluster.serving.engine import Engine
from smolcluster.serving.executor import LocalExecutor, MicroBatch, NewTokens
from smolcluster.serving.requests import ContextOverflow, Event, QueueFull, Request, Unavailable
from smolcluster.serving.sampling import Sampling

LENGTH = 96
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_k": 12, "top_p": 0.95, "repetition_penalty": 1.1}


def decode(tokens: Sequence[int]) -> str:
    return "".join(f"<{token}>" for token in tokens)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("llama"), "llama")


def make_folder(folder: Path, family: str) -> Path:
    longest = {"n_positions": LENGTH} if family == "gpt2" else {"max_position_embeddings": LENGTH}
    return make_hf_folder(folder, family, tie_word_embeddings=False, **longest)


class CountingExecutor(LocalExecutor):
    """Keeps the micro-batches; may be held back."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.batches: list[MicroBatch] = []
        self.go = threading.Event()
        self.go.set()

    def result(self) -> NewTokens:
        self.go.wait(30)
        return super().result()

    def submit(self, batch: MicroBatch) -> None:
        self.batches.append(batch)
        super().submit(batch)


def make_executor(
    folder: Path, slots: int = 3, dtype: torch.dtype = torch.float64, *, is_isolated: bool = False
) -> CountingExecutor:
    config = read_decoder_config(folder)
    assert config is not None
    with TensorFiles(folder) as files:
        layers = range(config.num_layers + 2)
        return CountingExecutor(
            DecoderLoader(config, dtype, is_isolated=is_isolated).load(files, layers, slots=slots, length=LENGTH)
        )


@pytest.fixture
def engines() -> Iterator[list[Engine]]:
    """Closed at the end."""
    made: list[Engine] = []
    yield made
    for engine in made:
        engine.close()


class Asked:
    """An answer that is awaited."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self.events: list[Event] = []
        self._ended = threading.Event()
        self.first = threading.Event()
        self.number = engine.submit(request, self._take)

    def _take(self, event: Event) -> None:
        self.events.append(event)
        self.first.set()
        if event.finish_reason is not None:
            self._ended.set()

    def wait(self) -> Asked:
        assert self._ended.wait(60)
        return self

    @property
    def tokens(self) -> list[int]:
        return [event.token.token for event in self.events if event.token is not None]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events)

    @property
    def reason(self) -> str | None:
        return self.events[-1].finish_reason


def prompts() -> list[list[int]]:
    """Of mixed lengths, two with a common beginning."""
    generator = torch.Generator().manual_seed(2)
    drawn = [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in (1, 5, 40, 17, 60, 2, 33)]
    return [*drawn, [*drawn[4][:50], 1, 2, 3]]


def expected(folder: Path, prompt: list[int], count: int, **sampling: Any) -> list[int]:
    model = transformers().AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    how = {"do_sample": True, "top_k": 0, **sampling} if sampling else {"do_sample": False}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(5)
        whole = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=count,
            eos_token_id=None,
            pad_token_id=0,
            **how,
        )
    tokens: list[int] = whole[0, len(prompt) :].tolist()
    return tokens


@pytest.mark.parametrize("is_sampled", [False, True], ids=["greedy", "sampled"])
def test_streams_together_get_what_generate_gives_each(folder: Path, is_sampled: bool, engines: list[Engine]) -> None:
    engine = Engine([(make_executor(folder), None)], decode)
    engines.append(engine)
    sampling = Sampling(seed=5, **SAMPLED) if is_sampled else Sampling(temperature=0.0)
    asked = [Asked(engine, Request(prompt, 20, sampling)) for prompt in prompts()]
    for prompt, answer in zip(prompts(), asked, strict=True):
        wanted = expected(folder, prompt, 20, **(SAMPLED if is_sampled else {}))
        assert answer.wait().tokens == wanted
        assert (answer.text, answer.reason) == (decode(wanted), "length")


def test_the_next_turn_computes_only_what_is_new(llama: Path, engines: list[Engine]) -> None:
    executor = make_executor(llama)
    engine = Engine([(executor, None)], decode)
    engines.append(engine)
    first = Asked(engine, Request(prompts()[2], 10, Sampling(temperature=0.0))).wait()
    # The newest token of an answer has not been computed.
    turn = [*prompts()[2], *first.tokens, 4, 5]
    executor.batches.clear()
    second = Asked(engine, Request(turn, 10, Sampling(temperature=0.0))).wait()
    assert second.tokens == expected(llama, turn, 10)
    assert executor.batches[0].segments[0].length == 3
    assert engine.counts.reused_tokens == len(turn) - 3


def test_stop_tokens_and_stop_strings_end_an_answer(llama: Path, engines: list[Engine]) -> None:
    engine = Engine([(make_executor(llama), None)], decode)
    engines.append(engine)
    prompt, greedy = prompts()[1], Sampling(temperature=0.0)
    tokens = expected(llama, prompt, 20)
    stop = next(token for token in tokens if tokens.index(token) > 2)
    at = tokens.index(stop)
    answer = Asked(engine, Request(prompt, 20, greedy, stop_tokens=frozenset({stop}))).wait()
    assert (answer.tokens, answer.reason, answer.text) == (tokens[:at], "stop", decode(tokens[:at]))
    answer = Asked(engine, Request(prompt, 20, greedy, stops=[f"<{stop}>"])).wait()
    assert (answer.reason, answer.text) == ("stop", decode(tokens[:at]))


def test_a_cancelled_request_frees_its_slot_and_others_do_not_notice(llama: Path, engines: list[Engine]) -> None:
    engine = Engine([(make_executor(llama, slots=2), None)], decode)
    engines.append(engine)
    long = Asked(engine, Request(prompts()[1], 80, Sampling(temperature=0.0)))
    other = Asked(engine, Request(prompts()[0], 20, Sampling(temperature=0.0)))
    waiting = Asked(engine, Request(prompts()[3], 20, Sampling(temperature=0.0)))
    assert long.first.wait(30)
    engine.cancel(long.number)
    engine.cancel(long.number + 10**6)  # nobody
    assert long.wait().reason == "cancelled"
    assert other.wait().tokens == expected(llama, prompts()[0], 20)
    assert waiting.wait().tokens == expected(llama, prompts()[3], 20)
    assert (engine.running, engine.waiting) == (0, 0)


def test_what_has_no_room_is_refused(llama: Path, engines: list[Engine]) -> None:
    executor = make_executor(llama, slots=1)
    engine = Engine([(executor, None)], decode, max_queue=1)
    engines.append(engine)
    with pytest.raises(ContextOverflow, match="96 in all"):
        engine.submit(Request([1] * 90, 7), print)
    executor.go.clear()
    first = Asked(engine, Request([1], 3))
    while not engine.running:
        pass
    second = Asked(engine, Request([1], 3))
    for _ in range(5):
        with pytest.raises(QueueFull):
            engine.submit(Request([1], 3), print)
    executor.go.set()
    assert (first.wait().reason, second.wait().reason) == ("length", "length")


def test_a_step_that_fails_ends_its_requests_and_the_next_ones_are_answered(llama: Path, engines: list[Engine]) -> None:
    executor = make_executor(llama)
    submit = executor.submit

    def fail(batch: MicroBatch) -> None:
        executor.submit = submit  # type: ignore[method-assign]
        raise RuntimeError("out of order")

    executor.submit = fail  # type: ignore[method-assign]
    engine = Engine([(executor, None)], decode)
    engines.append(engine)
    answer = Asked(engine, Request([1], 3)).wait()
    assert answer.reason == "error"
    assert "see its log" in (answer.events[-1].error or "")
    assert Asked(engine, Request(prompts()[1], 20, Sampling(temperature=0.0))).wait().tokens == expected(
        llama, prompts()[1], 20
    )


def test_logits_that_are_no_numbers_end_one_stream_only(llama: Path, engines: list[Engine]) -> None:
    executor = make_executor(llama)
    decoder = executor._decoder

    def spoiled(x: Tensor, segments: Sequence[Segment], wanted: Sequence[int] = ()) -> Tensor:
        logits = decoder(x, segments, wanted).clone()
        rows = {row: number for number, row in enumerate(wanted)}
        first = 0
        for segment in segments:
            first += segment.length
            if segment.slot == 0 and first - 1 in rows:
                logits[rows[first - 1]] = float("nan")
        return logits

    executor._decoder = spoiled  # type: ignore[assignment]
    engine = Engine([(executor, None)], decode)
    engines.append(engine)
    asked = [Asked(engine, Request(prompts()[n], 20, Sampling(temperature=0.0))) for n in (1, 3)]
    reasons = sorted(str(each.wait().reason) for each in asked)
    assert reasons == ["error", "length"]
    [good] = [each for each in asked if each.reason == "length"]
    assert good.tokens in [expected(llama, prompts()[n], 20) for n in (1, 3)]


def test_a_callback_that_fails_harms_nobody_else(llama: Path, engines: list[Engine]) -> None:
    engine = Engine([(make_executor(llama), None)], decode)
    engines.append(engine)

    def fail(event: Event) -> None:
        raise BrokenPipeError

    engine.submit(Request(prompts()[0], 50), fail)
    answer = Asked(engine, Request(prompts()[1], 20, Sampling(temperature=0.0))).wait()
    assert answer.tokens == expected(llama, prompts()[1], 20)
    deadline = time.monotonic() + 10
    while engine.running and time.monotonic() < deadline:
        time.sleep(0.001)
    assert engine.running == 0


def test_without_stages_it_is_down_until_it_reconnects(llama: Path, engines: list[Engine]) -> None:
    first = make_executor(llama)
    lose_after(first, 5)
    others: list[CountingExecutor] = []

    def recover(error: SmolError) -> CountingExecutor:
        if not others:
            raise ServingError("no node is there")
        return others.pop()

    engine = Engine([(first, recover)], decode)
    engines.append(engine)
    answer = Asked(engine, Request(prompts()[1], 20)).wait()
    assert (answer.reason, answer.events[-1].error) == ("error", "no node is there")
    with pytest.raises(Unavailable, match="no node"):
        engine.submit(Request([1], 3), print)
    assert engine.failure == "no node is there"
    others.append(make_executor(llama))
    engine.reconnect()
    deadline = time.monotonic() + 10
    while engine.failure is not None and time.monotonic() < deadline:
        time.sleep(0.001)
    assert Asked(engine, Request([1], 3)).wait().reason == "length"


def test_a_request_that_takes_too_long_is_given_up(llama: Path, engines: list[Engine]) -> None:
    executor = make_executor(llama, slots=1)
    engine = Engine([(executor, None)], decode, timeout=0.2)
    engines.append(engine)
    submit = executor.submit

    def slow(batch: MicroBatch) -> None:
        time.sleep(0.02)
        submit(batch)

    executor.submit = slow  # type: ignore[method-assign]
    asked = [Asked(engine, Request([1], 80)) for _ in range(2)]
    assert [each.wait().reason for each in asked] == ["error", "error"]
    assert "serving.timeout" in (asked[0].events[-1].error or "")
    assert (engine.running, engine.waiting) == (0, 0)


def test_closing_ends_what_is_under_way(llama: Path) -> None:
    engine = Engine([(make_executor(llama), None)], decode)
    answer = Asked(engine, Request([1], 90))
    assert answer.first.wait(30)
    engine.close()
    assert answer.wait().reason in ("error", "length")


def test_deterministic_answers_have_the_same_bits_whoever_else_asks(llama: Path, engines: list[Engine]) -> None:
    """Also when they are computed again from the middle. Logprobs show every bit."""
    sampling = Sampling(temperature=0.0, logprobs=3)

    def answers(limit: int, order: Sequence[int], *, forgets: bool = False) -> dict[int, list[Any]]:
        executors = [make_executor(llama, limit, torch.float32, is_isolated=True) for _ in range(2)]
        engine = Engine([(executors[0], lambda _: executors[1])], decode, is_deterministic=True)
        engines.append(engine)
        if forgets:
            lose_after(executors[0], 30)
        asked = {n: Asked(engine, Request(prompts()[n], 20, sampling)) for n in order}
        found = {n: [event.token for event in each.wait().events] for n, each in asked.items()}
        assert engine.counts.recoveries == forgets
        return found

    alone = answers(1, [2, 4, 6, 1])
    assert answers(4, [6, 4, 2, 1]) == alone
    assert answers(3, [1, 2, 6, 4], forgets=True) == alone


def lose_after(executor: CountingExecutor, count: int) -> None:
    """Fail at a micro-batch."""
    result = executor.result

    def failing() -> NewTokens:
        if len(executor.batches) > count:
            raise PeerLost("rank 1 is lost", 1)
        return result()

    executor.result = failing  # type: ignore[method-assign]


@pytest.mark.parametrize("count", [1, 7, 20, 33])
def test_streams_go_on_with_another_executor(llama: Path, engines: list[Engine], count: int) -> None:
    first = make_executor(llama)
    lose_after(first, count)
    engine = Engine([(first, lambda _: make_executor(llama))], decode)
    engines.append(engine)
    greedy = Sampling(temperature=0.0)
    asked = [
        Asked(engine, Request(p, 20, Sampling(seed=5, **SAMPLED) if n % 2 else greedy)) for n, p in enumerate(prompts())
    ]
    for n, (prompt, answer) in enumerate(zip(prompts(), asked, strict=True)):
        wanted = expected(llama, prompt, 20, **(SAMPLED if n % 2 else {}))
        assert answer.wait().tokens == wanted
        assert answer.text == decode(wanted)
    assert engine.counts.recoveries == 1


@pytest.mark.parametrize("kind", ["int8", "int8-dynamic"])
def test_a_prompt_in_pieces_with_integer_weights(llama: Path, engines: list[Engine], kind: WeightKind) -> None:
    """A piece that is not the last one gives no token."""
    config = read_decoder_config(llama)
    assert config is not None
    with TensorFiles(llama) as files:
        loader = DecoderLoader(config, torch.float32, kind, is_isolated=True)
        decoder = loader.load(files, range(config.num_layers + 2), slots=2, length=LENGTH)
    engine = Engine([(LocalExecutor(decoder), None)], decode, is_deterministic=True)
    engines.append(engine)
    asked = [Asked(engine, Request(prompt, 8, Sampling(temperature=0.0))) for prompt in (prompts()[2], prompts()[4])]
    assert [(each.wait().reason, len(each.tokens)) for each in asked] == [("length", 8)] * 2
