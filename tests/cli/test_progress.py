"""Progress as plain lines and as bars."""

from __future__ import annotations

import errno
import io
import json
import re
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from qmerge.cli.progress import (
    LoggedProgress,
    PlainProgress,
    RichProgress,
    display,
    duration,
    logged,
    memory,
    rich_bars,
)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_tell_stage_step_time_and_memory() -> None:
    clock, stream = Clock(), io.StringIO()
    shown = PlainProgress(stream, clock)
    shown.stage("walk", 4)
    for layer in range(3):
        shown.step(f"layer {layer}")
        clock.now += 30
    lines = [re.sub(r"\d+ MiB", "M", line) for line in stream.getvalue().splitlines()]
    assert lines == [
        "walk 1/4 · layer 0 · 0:00 · M",
        "walk 2/4 · layer 1 · 0:30 · 1:30 left · M",
        "walk 3/4 · layer 2 · 1:00 · 1:00 left · M",
    ]


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_lines_that_cannot_be_written_end_no_job() -> None:
    shown = PlainProgress(Full())
    shown.stage("walk", 1)
    shown.step("layer 0")
    shown.warn("so")
    assert shown.place.begun == 1


def test_time_left_counts_what_the_step_at_hand_has_taken() -> None:
    clock, stream = Clock(), io.StringIO()
    shown = PlainProgress(stream, clock)
    shown.stage("walk", 3)
    shown.step("layer 0")
    clock.now += 30
    shown.step("layer 1")
    clock.now += 20
    shown.doing("trained")
    clock.now += 40
    shown.doing("release")
    assert [line.split(" · ")[3] for line in stream.getvalue().splitlines()[1:]] == [
        "1:00 left",
        "0:40 left",
        "0:30 left",
    ]


def test_plain_lines_about_one_step_are_few() -> None:
    clock, stream = Clock(), io.StringIO()
    shown = PlainProgress(stream, clock)
    shown.stage("walk", 1)
    shown.step("layer 0")
    for second in range(12):
        clock.now = 100.0 + second
        shown.doing(f"arm {second}")
    lines = stream.getvalue().splitlines()
    assert [line.split(" · ")[1] for line in lines] == [
        "layer 0",
        "layer 0: arm 5",
        "layer 0: arm 10",
    ]


def test_layers_alone_say_how_long_layers_take() -> None:
    clock, stream = Clock(), io.StringIO()
    shown = PlainProgress(stream, clock)
    shown.stage("walk", 4)
    for item, seconds in (("embedding", 1), ("layer 0", 60), ("layer 1", 60), ("head", 1)):
        shown.step(item)
        clock.now += seconds
    left = [line.split(" · ")[3] for line in stream.getvalue().splitlines()]
    assert [text for text in left if "left" in text] == ["2:00 left"]
    assert "layer 1" in stream.getvalue().splitlines()[2]


def test_a_plan_that_is_made_says_nothing_of_what_is_left() -> None:
    clock, stream = Clock(), io.StringIO()
    shown = PlainProgress(stream, clock)
    shown.stage("plan", 2)
    shown.step("reading headers")
    clock.now += 9
    shown.step("takes about 36.3 s on this machine")
    assert "plan 2/2 · takes about 36.3 s on this machine · 0:09" in stream.getvalue()
    assert "left" not in stream.getvalue()


def test_figures_stay_until_there_are_others() -> None:
    clock, stream, file = Clock(), io.StringIO(), io.BytesIO()
    log = LoggedProgress(PlainProgress(stream, clock), file)  # type: ignore[arg-type]
    log.stage("walk", 3)
    for layer, found in enumerate(
        ({"KL": 0.00123456, "survival": 1.0, "error": float("nan")}, {"KL": 0.5}, {})
    ):
        log.step(f"layer {layer}")
        log.figures(found)
        clock.now += 2
    lines = stream.getvalue().splitlines()
    assert "KL" not in lines[0]
    assert "layer 1 · KL 0.00123 · survival 1 · error nan · " in lines[1]
    assert "layer 2 · KL 0.5 · 0:04" in lines[2]
    events = [json.loads(line) for line in file.getvalue().splitlines()]
    assert [event["figures"] for event in events if event["event"] == "figures"] == [
        {"KL": 0.00123456, "survival": 1.0},
        {"KL": 0.5},
        {},
    ]


def test_short_steps_are_not_each_a_line() -> None:
    clock, stream = Clock(), io.StringIO()
    shown = PlainProgress(stream, clock)
    shown.stage("compare", 100)
    for number in range(100):
        shown.step(f"weight.{number}")
        clock.now += 0.25
    lines = stream.getvalue().splitlines()
    assert len(lines) == 25
    assert "compare 1/100 · weight.0" in lines[0]
    assert "0:01 · 0:24 left" in lines[1]


def test_warnings_are_always_told() -> None:
    stream = io.StringIO()
    PlainProgress(stream).warn("texts overlap")
    assert stream.getvalue() == "warning: texts overlap\n"


def test_bars_show_text_as_it_is() -> None:
    stream = io.StringIO()
    bars = rich_bars(stream)
    bars.console.width = 200
    with bars:
        shown = RichProgress(bars)
        shown.doing("before any stage")
        shown.stage("walk", 2)
        shown.step("layers[red].0")
        shown.doing("trained")
        shown.figures({"perplexity": 32.9})
        assert bars.tasks[0].completed == 0
        shown.step("layer 1")
        assert bars.tasks[0].completed == 1
        shown.warn("a [bold]name[/bold]")
        shown.finish()
    assert bars.tasks[0].completed == 2
    assert bars.tasks[0].fields["text"] == "perplexity 32.9"
    assert "warning: a [bold]name[/bold]" in stream.getvalue()
    assert "2/2" in stream.getvalue()


def test_a_narrow_terminal_cuts_the_end_alone() -> None:
    stream = io.StringIO()
    bars = rich_bars(stream)
    bars.console.width = 80
    with bars:
        shown = RichProgress(bars)
        shown.stage("walk", 120)
        shown.step("layer 17")
        shown.doing("a very long text about what is done " * 4)
    line = stream.getvalue().splitlines()[-1]
    assert re.match(r"walk\s+0/120 0:00:00\s+\d+ MiB layer 17: a very lo.*…\s*$", line), line


def test_without_a_terminal_there_are_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with display() as shown:
        assert isinstance(shown, PlainProgress)
        print("chatter", file=sys.stdout)
    assert capsys.readouterr() == ("", "chatter\n")


def test_events_are_lines_that_others_can_read_at_once(tmp_path: Path) -> None:
    file, stream = tmp_path / "log.jsonl", io.StringIO()
    with logged(PlainProgress(stream), file) as log:
        log.stage("walk", 2)
        log.step("layer 0")
        assert len(file.read_text().splitlines()) == 2
        log.doing("trained\n")
        log.step("layer \ud800")
        log.warn("texts overlap")
    events = [json.loads(line) for line in file.read_text().splitlines()]
    facts = [
        {k: v for k, v in event.items() if k not in ("time", "seconds", "rss")} for event in events
    ]
    place = {"stage": "walk", "total": 2}
    assert facts == [
        {"event": "stage", **place, "step": 0},
        {"event": "step", **place, "step": 1, "item": "layer 0"},
        {"event": "doing", **place, "step": 1, "item": "layer 0", "doing": "trained\n"},
        {"event": "step", **place, "step": 2, "item": "layer \ud800"},
        {"event": "warn", "message": "texts overlap"},
        {"event": "done"},
    ]
    assert all(event["rss"] > 1 << 20 for event in events)
    seconds = [event["seconds"] for event in events]
    assert seconds == sorted(seconds)
    assert all(datetime.fromisoformat(event["time"]).tzinfo == UTC for event in events)
    assert "walk 1/2 · layer 0" in stream.getvalue()


def test_a_failure_is_the_last_event(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    with pytest.raises(KeyboardInterrupt), logged(PlainProgress(io.StringIO()), file):
        raise KeyboardInterrupt
    assert json.loads(file.read_text())["event"] == "failed"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_ends_the_log_and_not_the_job() -> None:
    stream = io.StringIO()
    with Path("/dev/full").open("wb", buffering=0) as full:
        log = LoggedProgress(PlainProgress(stream), full)
        log.stage("walk", 1)
        log.step("layer 0")
    assert stream.getvalue().count("warning: --log-json: No space left on device") == 1
    assert "layer 0" in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.9, "0:00"), (75.2, "1:15"), (4000, "1:06:40"), (360000, "100:00:00")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_memory_is_that_of_this_process() -> None:
    assert re.fullmatch(r"[1-9]\d* MiB", memory())
