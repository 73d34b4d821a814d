"""What a user sees: lines without a terminal, a bar with one, nothing with --quiet."""

import io

from smolcluster.kinds import JsonObject
from smolcluster.monitoring.reporters import BarReporter, LineReporter, QuietReporter, make_reporter


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def row(step: int, **more: float) -> JsonObject:
    return {"step": step, "train/loss": 2.0 - step / 100, "train/tokens_per_s": 1000.0, **more}


def test_the_stream_decides_between_bar_and_lines_and_quiet_wins() -> None:
    assert isinstance(make_reporter(False, 10, stream=io.StringIO()), LineReporter)
    assert isinstance(make_reporter(False, 10, stream=Terminal()), BarReporter)
    assert isinstance(make_reporter(True, 10, stream=Terminal()), QuietReporter)


def test_lines_come_every_interval_and_at_every_evaluation() -> None:
    stream = io.StringIO()
    reporter = make_reporter(False, 10, stream=stream)
    for step in range(25):
        evaluated = {"val/loss": 1.5} if step == 14 else {}
        reporter.progress(step + 1, 25, row(step, **evaluated))
    reporter.close()
    lines = stream.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 10/25", "step 15/25", "step 20/25", "step 25/25"]
    assert lines[1] == "step 15/25  loss 1.8600  val 1.5000  1,000 tokens/s"


def test_a_line_is_not_missed_when_steps_are_reported_in_jumps() -> None:
    stream = io.StringIO()
    reporter = LineReporter(stream, 10)
    for done in (7, 13, 19, 31):
        reporter.progress(done, 100, row(done))
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["13/100", "31/100"]


def test_a_reader_that_goes_away_does_not_stop_the_run() -> None:
    class Closed(io.StringIO):
        writes = 0

        def write(self, text: str) -> int:
            self.writes += 1
            raise BrokenPipeError

    stream = Closed()
    reporter = LineReporter(stream, 10)
    reporter.note("first")
    reporter.progress(10, 10, row(9))
    assert stream.writes == 1


def test_the_bar_shows_steps_loss_and_speed() -> None:
    stream = Terminal()
    reporter = BarReporter(stream, "samples")
    reporter.note("a word before [brackets]")
    reporter.progress(1, 3, row(0))
    reporter.progress(3, 3, row(2, **{"val/loss": 1.25}))
    reporter.close()
    shown = stream.getvalue()
    assert "a word before [brackets]" in shown
    assert "3/3" in shown
    assert "val 1.2500" in shown
    assert "samples/s" in shown
