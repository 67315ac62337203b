"""The plots: PNGs of a sensible size that show every category, every method and the cards' limits."""

import struct
import sys
import types
from pathlib import Path

import pytest

import qsvft
import qsvft.memory.table
from qsvft import memory
from qsvft.memory import Row, plot
from qsvft.memory.cards import GIB, usable_bytes
from qsvft.memory.ledger import CATEGORIES, PHASES

METHODS = ("floor", "lora", "svft", "full")


@pytest.fixture(scope="module")
def report():
    return qsvft.profile("tiny", METHODS, seq_len=64)


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, in order."""
    saved = []
    save = plot._save

    def keep(figure, path):
        saved.append(figure)
        save(figure, path)

    monkeypatch.setattr(plot, "_save", keep)
    return saved


def made_up(peak):
    """A report of one method that takes ``peak`` bytes."""
    row = Row("lora", peak, {**dict.fromkeys(CATEGORIES, 0), "factors": peak}, dict.fromkeys(PHASES, peak))
    return qsvft.MemoryReport("made up", 1, 8, True, "adamw", "meta", {}, [row])


def png_size(path):
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(content) > 10_000
    return struct.unpack(">II", content[16:24])


@pytest.mark.parametrize("draw", ["plot", "plot_timeline"])
def test_a_png_of_a_sensible_size_is_written(report, tmp_path, draw):
    getattr(report, draw)(tmp_path / "plot.png")
    width, height = png_size(tmp_path / "plot.png")
    assert 800 <= width <= 4000
    assert 600 <= height <= 4000


@pytest.mark.parametrize("draw", ["plot", "plot_timeline"])
def test_every_category_is_in_the_legend_with_a_look_of_its_own(report, tmp_path, figures, draw):
    getattr(report, draw)(tmp_path / "plot.png")
    [legend] = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == list(CATEGORIES)[::-1]
    hatches = [patch.get_hatch() for patch in legend.get_patches()]
    assert len(set(hatches)) == len(CATEGORIES)


def test_the_bars_add_up_to_the_peaks_and_carry_their_numbers(report, tmp_path, figures):
    report.plot(tmp_path / "plot.png")
    [axes] = figures[0].axes
    tops = [0.0] * len(METHODS)
    for bars in axes.containers:
        for at, bar in enumerate(bars):
            tops[at] += bar.get_height()
    assert tops == pytest.approx([row.peak_bytes / 2**20 for row in report.rows])
    shown = [text.get_text() for text in axes.texts]
    assert shown[: len(METHODS)] == [f"{row.peak_bytes / 2**20:.2f}" for row in report.rows]
    assert [label.get_text() for label in axes.get_xticklabels()] == list(METHODS)


def test_the_cards_lines_stand_at_what_fits_and_only_near_the_bars(tmp_path, figures):
    made_up(15 * GIB).plot(tmp_path / "plot.png")
    [axes] = figures[0].axes
    heights = [line.get_ydata()[0] for line in axes.lines]
    assert heights == pytest.approx([usable_bytes(card) / GIB for card in (8, 12, 16)])
    assert axes.get_ylim()[1] > 15


def test_the_timeline_has_a_panel_a_method_whose_mark_is_the_peak(report, tmp_path, figures):
    report.plot_timeline(tmp_path / "plot.png")
    panels = [axes for axes in figures[0].axes if axes.axison]
    assert len(panels) == len(METHODS)
    for panel, row in zip(panels, report.rows, strict=True):
        mark = next(line for line in panel.lines if line.get_marker() == "v")
        assert mark.get_ydata()[0] == pytest.approx(row.peak_bytes / 2**20)
        assert panel.get_title(loc="left").startswith(f"{row.method}: ")
        assert panel.get_ylim()[1] > row.peak_bytes / 2**20


def test_a_method_that_did_not_run_has_an_empty_place(tmp_path, figures):
    report = qsvft.profile("tiny", ["floor", "qsvft:999"], seq_len=32)
    report.plot(tmp_path / "plot.png")
    report.plot_timeline(tmp_path / "timeline.png")
    assert "did\nnot run" in [text.get_text() for text in figures[0].axes[0].texts]
    assert len([axes for axes in figures[1].axes if axes.axison]) == 1


def test_a_report_in_which_nothing_ran_can_be_drawn(tmp_path):
    report = qsvft.profile("tiny", ["qsvft:999"], seq_len=32)
    report.plot(tmp_path / "plot.png")
    report.plot_timeline(tmp_path / "timeline.png")
    png_size(tmp_path / "plot.png")


@pytest.mark.parametrize("ending", ["pdf", "svg"])
def test_vector_files_are_written_too(report, tmp_path, ending):
    report.plot(tmp_path / f"plot.{ending}")
    assert (tmp_path / f"plot.{ending}").read_bytes()[:5] in (b"%PDF-", b"<?xml")


def test_an_unknown_ending_is_refused(report, tmp_path):
    with pytest.raises(ValueError, match=r"plot\.gif.*\.png, \.pdf, \.svg"):
        report.plot(tmp_path / "plot.gif")


def test_a_missing_matplotlib_says_what_to_install(report, tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"found none\. pip install matplotlib"):
        report.plot(tmp_path / "plot.png")


@pytest.mark.parametrize("module", [memory.plot, memory.report, memory.table])
def test_matplotlib_is_imported_for_plots_only(module, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    names = {"__name__": "again", "__package__": "qsvft.memory"}
    monkeypatch.setitem(sys.modules, "again", types.ModuleType("again"))
    exec(compile(Path(module.__file__).read_text(), module.__file__, "exec"), names)
    assert names["Figures"]
