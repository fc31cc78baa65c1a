"""The page: whole, honest about failures, and in need of nothing from outside."""

import html.parser
import re

import pytest
from matplotlib import image

from memseq.evaluation import capacity, figures, frontier, report, tables
from memseq.evaluation.canvas import Canvas, Panel
from tests.evaluation import harness


@pytest.fixture(scope="module")
def settings():
    return harness.config()


@pytest.fixture(scope="module")
def rows(settings):
    return harness.rows(settings)


@pytest.fixture(scope="module")
def written(settings, rows, tmp_path_factory):
    rows = [
        harness.broken(row) if (row["memory"], row["task"], row["seed"]) == ("mamba2", "rewrite", 1)
        else row
        for row in rows
    ]  # fmt: skip
    folder = harness.folder(tmp_path_factory.mktemp("run") / "out", settings, rows)
    report.write(folder)
    return folder


class Tags(html.parser.HTMLParser):
    """Checks that every element that is opened is closed, in order."""

    VOID = {"meta", "br", "img", "link", "input"}

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_needs_nothing_from_outside(written):
    text = written.report.read_text()
    assert not re.search(r"https?:|//[a-z]|@import|<script|<link|<img|url\(", text)
    assert written.report.stat().st_size < 2e6
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert tags.seen.count("svg") == 9
    assert "NaN" not in text and "None" not in re.sub(r"<pre>.*?</pre>", "", text, flags=re.S)


def test_page_shows_verdict_and_failures(written):
    text = written.report.read_text()
    assert "expectations hold over 3 seeds" in text
    assert "1 of 42 runs failed." in text
    assert "Mamba-2 on rewrite, seed 1: diverged: the loss was not finite &lt;at step 3&gt;" in text
    assert text.count("✓") == 1  # in the style sheet; the lines say "holds"
    assert text.count('<tr class="holds">') == 7


def test_picture(written):
    assert image.imread(written.picture).shape[1] == 2 * figures.WIDTH


def test_page_of_failing_claims(settings, tmp_path):
    rows = harness.rows(settings, {**harness.GOOD, ("delta_net", "rewrite"): 0.5}, seeds=1)
    folder = harness.folder(tmp_path / "out", settings, rows)
    report.write(folder)
    text = folder.report.read_text()
    assert "2 of 7 expectations fail with one seed" in text
    assert text.count('<tr class="fails">') == 2


def test_page_of_an_interrupted_run(settings, rows, tmp_path):
    """A few rows are a report too: what is missing is said, not guessed."""
    some = [row for row in rows if row["kind"] == "trained" and row["task"] == "parity"][:4]
    folder = harness.folder(tmp_path / "out", settings, some)
    report.write(folder)
    assert "has no finished run" in folder.report.read_text()


def test_leaderboard(settings, rows):
    data = report.data_of(rows, {"config": settings.to_dict()})
    header, lines = tables.leaderboard(data)
    assert header == ["memory", "rewrite", "parity 33-64", "parameters", "state", "CPU s a seed"]
    assert [line[0] for line in lines] == [settings.memories[m].title for m in settings.compare]
    assert lines[3][1] == "0.980 (0.975 to 0.985)"
    assert lines[3][-1] == "19"  # seconds of both tasks
    states = {line[0]: line[4] for line in lines}
    # keys and values [64 positions, 4 heads, 16], against matrices [4 heads, 16, 16]
    assert states["Softmax attention (RoPE)"].startswith("33 ")
    assert states["DeltaNet (write to 1)"].startswith("4.7")


def test_closed_form_table():
    header, lines = tables.closed_form(capacity.rows("tiny"))
    assert header[:5] == ["rule", "N/d=0.5", "N/d=1", "N/d=2", "N/d=4"]
    assert [line[1:5] for line in lines] == [
        ["1.000", "0.969", "0.746", "0.381"],
        ["0.984", "0.730", "0.377", "0.183"],
        ["0.961", "0.770", "0.398", "0.209"],
        ["1.000", "1.000", "0.959", "0.524"],
        ["1.000", "1.000", "1.000", "1.000"],
    ]
    assert lines[0][-1] == "15.5 dB"


def test_parts_add_up(settings, rows):
    """The four parts of a bar fill it."""
    data = report.data_of(rows, {"config": settings.to_dict()})
    canvas = figures.parts(data, "rewrite", "half: ")
    colours = (figures.RIGHT, figures.KEPT, figures.STALE, figures.OTHER)
    bars = [m for m in canvas.marks if m.kind == "polygon" and m.fill in colours and m.note]
    width = sum(max(x for x, _ in m.points) - min(x for x, _ in m.points) for m in bars)
    assert width == pytest.approx(
        len(data.titles) * (figures.WIDTH - figures.LABELS - 56), rel=1e-3
    )
    assert figures.parts(data, "parity") is None


def test_styles_differ(settings, rows):
    data = report.data_of(rows, {"config": settings.to_dict()})
    assert len({data.style(label) for label in data.titles}) == len(data.titles)
    other = figures.Data(rows, {"mine": "Mine", "delta_net": "DeltaNet"}, {}, {})
    assert other.style("mine") != other.style("delta_net") == data.style("delta_net")


def test_hull():
    points = [(1, 0.2), (2, 0.9), (2, 0.3), (4, 0.5), (8, 0.95)]
    assert frontier.hull(points, 16) == [
        (1, 0.2), (2, 0.2), (2, 0.9), (8, 0.9), (8, 0.95), (16, 0.95)
    ]  # fmt: skip
    assert frontier.hull([], 1) == []


def test_size():
    assert [frontier.size(n) for n in (4, 2048, 3 * 2**20)] == ["4 B", "2 KiB", "3 MiB"]


def test_labels_move_apart():
    ends = [(10.0, "a"), (11.0, "b"), (12.0, "c"), (100.0, "d")]
    moved = figures._apart(ends, 10.0)
    heights = [y for y, _ in moved]
    assert heights == pytest.approx([1.0, 11.0, 21.0, 100.0])


def test_canvas_escapes_and_maps():
    canvas = Canvas(100, 50, 'a "b" & c')
    canvas.text(1, 2, "<x>", note="n&m")
    canvas.dot(5, 5, 2, "#000000", "up")
    text = canvas.svg()
    assert (
        "&lt;x&gt;" in text and "n&amp;m" in text and 'aria-label="a &quot;b&quot; &amp; c"' in text
    )
    panel = Panel(canvas, 10, 10, 80, 30, (1, 100), (0, 1), log_x=True)
    assert panel.at(10, 0.5) == pytest.approx((50, 25))
    assert panel.at(1, 0) == pytest.approx((10, 40))
