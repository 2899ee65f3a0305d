from __future__ import annotations

import io

from rsplugins.machine.progress import Bar, Lines, Silent, for_stream


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
