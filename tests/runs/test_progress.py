from __future__ import annotations

import contextlib
import io
import threading
import time

import pytest
import torch

from rsplugins.machine.progress import Bar, Lines, Silent, for_stream, shown_on, step


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar_and_a_file_gets_lines():
    assert isinstance(for_stream(Terminal()), Bar)
    assert isinstance(for_stream(io.StringIO()), Lines)


def test_lines_come_every_ten_seconds_and_at_the_end():
    now = [0.0]
    stream = io.StringIO()
    with Lines(stream, clock=lambda: now[0]).task("votes", total=20, done=4) as advance:
        for _ in range(16):
            now[0] += 2.0
            advance()
    assert stream.getvalue().splitlines() == [
        "votes: 9/20 inputs, 0.50 inputs/s, 22 s left",
        "votes: 14/20 inputs, 0.50 inputs/s, 12 s left",
        "votes: 19/20 inputs, 0.50 inputs/s, 2 s left",
        "votes: 20/20 inputs, 0.50 inputs/s",
    ]


def test_the_bar_counts_on_standard_error(capsys):
    with Bar().task("votes", total=3, done=1) as advance:
        advance()
        advance()
    captured = capsys.readouterr()
    assert "3/3" in captured.err
    assert captured.out == ""


def test_silence():
    with Silent().task("votes", 1) as advance:
        advance()


def test_a_step_is_named_once_it_takes_long_and_when_it_ends():
    stream = io.StringIO()
    with shown_on(Lines(stream), "ibp"):
        with step("tracing", quiet=30):
            pass
        with step("checking bounds", quiet=0.01):
            while "..." not in stream.getvalue():  # the test would not end if nothing were said
                time.sleep(0.01)
    assert stream.getvalue().splitlines() == ["ibp: checking bounds ...", "ibp: checking bounds: 0 s"]


def test_a_step_outside_of_a_display_says_nothing_and_starts_no_thread():
    before = threading.active_count()
    with step("tracing", quiet=0):
        assert threading.active_count() == before


@pytest.mark.parametrize("method", ["gaussian", "ibp", "covariance", "lipschitz-margin"])
def test_set_up_is_shown_by_name(method, monkeypatch, tmp_path):
    """Through the doors that show progress: every step says its name, here at once."""
    import rsplugins
    from rsplugins.machine import progress

    names = []

    @contextlib.contextmanager
    def named(name, quiet=0.0):
        display = progress._SHOWN.get()
        names.append((display[1] if display else None, name))
        yield

    for place in ("rsplugins.certification", "rsplugins.lirpa.network", "rsplugins.sampling.independence"):
        monkeypatch.setattr(f"{place}.step", named)
    data = rsplugins.load_data("digits")
    model = rsplugins.wrap(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)), input_size=(1, 8, 8))
    rsplugins.certify(model, data, method, out=tmp_path / "run", indices=[0, 5])
    assert {title for title, _ in names} == {f"{method}: "}
    said = {name for _, name in names}
    assert {f"setting {method} up", "the first input"} <= said
    if method == "ibp":
        assert "tracing the network for auto-LiRPA" in said
    if method == "gaussian":
        assert any(name.startswith("checking that each image") for name in said)
