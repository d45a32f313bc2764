import io
import sys

import IPython.display
import pytest
import rich.console

from probinfer import progress


@pytest.fixture
def screen():
    """A terminal of 100 columns that keeps what it is sent."""
    return rich.console.Console(file=io.StringIO(), force_terminal=True, width=100)


def sent(screen) -> str:
    return screen.file.getvalue()


def test_off_prints_nothing(capfd):
    with progress.task("work", 10, progress=False) as bar:
        assert not bar.on
        bar.update(3)
    with progress.task("work", 10) as bar:  # the error stream of a test is no terminal
        assert not bar.on
        bar.update(3)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_default_is_on_at_a_terminal(monkeypatch):
    assert not progress.is_on(None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert progress.is_on(None)
    assert not progress.is_on(False)
    assert progress.label(None, "warm-up") == "warm-up"
    assert progress.label(False, "warm-up") is False


def test_a_bar_shows_label_count_and_note(screen):
    with progress.display(screen), progress.task("NUTS", 40) as bar:
        bar.update(10, note="2 divergences")
        shown = sent(screen)
    assert "NUTS" in shown
    assert "10/40" in shown
    assert "2 divergences" in shown


def test_a_text_names_the_line(screen):
    with progress.display(screen), progress.task("run", 4, progress="warm-up") as bar:
        bar.update(1)
    assert "warm-up" in sent(screen)
    assert "run" not in sent(screen)


def test_nested_tasks_share_one_display(screen):
    with progress.display(screen):
        bars = progress._current.get()
        with progress.task("outer", 2) as outer:
            outer.update(1)
            with progress.task("inner", 5) as inner:  # None: on, because a display is open
                inner.update(2)
                assert progress._current.get() is bars
                assert [line.description for line in bars.progress.tasks] == ["outer", "inner"]
            assert [line.description for line in bars.progress.tasks] == ["outer"]
    assert progress._current.get() is None


def test_the_outermost_task_opens_and_closes_the_display(capfd):
    with progress.task("outer", 2, progress=True):
        assert progress._current.get() is not None
        with progress.task("inner", 2):
            pass
        assert progress._current.get() is not None
    assert progress._current.get() is None
    assert capfd.readouterr().out == ""


def test_the_display_closes_after_an_error(screen):
    with pytest.raises(RuntimeError, match="stop"), progress.display(screen), progress.task("work", 2):
        raise RuntimeError("stop")
    assert progress._current.get() is None


def test_unknown_total(screen):
    with progress.display(screen), progress.task("search") as bar:
        bar.update(7)
    assert "7/?" in sent(screen)


class Handle:
    def __init__(self):
        self.texts = []

    def update(self, text):
        self.texts.append(repr(text))


def test_notebook_rewrites_one_output(monkeypatch):
    handle = Handle()
    monkeypatch.setattr(IPython.display, "display", lambda *_, **__: handle)
    monkeypatch.setattr(progress, "_in_notebook", lambda: True)
    with progress.task("fit", 10, progress=True) as bar:
        bar.update(5, note="half")
    assert handle.texts == [
        "fit  " + "░" * 30 + " 0/10",
        "fit  " + "█" * 15 + "░" * 15 + " 5/10 half",
        "",
        "",
    ]


def test_a_test_is_no_notebook():
    assert not progress._in_notebook()
