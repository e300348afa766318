"""What readers see: tables that fit, every seed in the figures, a page that runs no code."""

import base64
import gzip
import hashlib
import io
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest

from alignkit import report
from alignkit.claims import Plot, write_results
from alignkit.runs import Record, needs_first

# Text that a careless page would execute, load or break on; the rest is built from these below.
SCRIPTS = [
    "<script>alert(1)</script>", "</td></table><script src=//x.example/x.js></script>",
    "<img src=x onerror=alert(1)>", "<svg/onload=alert(1)>", "<iframe src=javascript:alert(1)>",
    "\"><script>alert(1)</script>", "' onmouseover='alert(1)", "\" autofocus onfocus=\"alert(1)",
    "javascript:alert(1)", "data:text/html,<script>alert(1)</script>", "<a href=javascript:alert(1)>x</a>",
    "</style><script>alert(1)</script>", "<style>@import url(//x.example)</style>",
    "<meta http-equiv=refresh content='0;url=//x.example'>", "<base href=//x.example/>",
    "<link rel=stylesheet href=//x.example/x.css>", "<object data=//x.example></object>",
    "<form action=//x.example><button>x</button></form>", "<!--<script>alert(1)//-->",
    "{{ 7 * 7 }}{% raw %}", "{{ ''.__class__.__mro__ }}", "<math><mtext></mtext><script>alert(1)</script>",
    "&lt;script&gt;alert(1)&lt;/script&gt;", "<scr\0ipt>alert(1)</script>", "\x1b]8;;//x.example\x07x",
    "\u202e<script>alert(1)</script>", "<ſcript>alert(1)</ſcript>", "$\\frac{1}{", "\u2028<script>x</script>",
]
FIELDS = ["key", "statement", "paper_value", "source", "accept", "note", "commit"]
PAGE_TAGS = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "section", "a",
             "dl", "dt", "dd", "div", "table", "thead", "tbody", "tr", "th", "td", "br", "span",
             "figure", "img", "mark"}
PAGE_ATTRIBUTES = {"lang", "charset", "http-equiv", "content", "name", "id", "class", "href", "src",
                   "width", "alt"}


class Parsed(HTMLParser):
    """Tags and texts as an independent parser sees them."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.tags, self.texts, self.comments = [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)

    def handle_comment(self, data):
        self.comments.append(data)


def entry(key="9b.3-PPO", per_seed=(3.0, 2.0, 4.0, 3.0, 2.5), verdict="reproduced", **changed):
    per_seed = list(per_seed)
    filled = {
        "key": key, "statement": "BSPO ends above PPO", "paper_value": "2.1 against −0.4",
        "source": "figure 4", "scale": "mini", "seeds": list(range(100, 100 + len(per_seed))),
        "commit": "abc1234", "accept": "above 0", "value": float(np.mean(per_seed)) if per_seed else None,
        "ci95": [2.0, 4.0] if per_seed else None, "p": 1 / 32 if per_seed else None,
        "per_seed": per_seed, "exact": False, "verdict": verdict, "note": "",
    }
    return {**filled, **changed}


def results(*claims, **changed):
    head = {"paper": "bspo", "arxiv": "2503.18130", "commit": "abc1234", "scale": "mini",
            "machine": {"processor": "a laptop", "cores": 2}, "versions": {"python": "3.11"},
            "seeds": [100, 101, 102], "seconds": 90.0, "claims": list(claims)}
    return {**head, **changed}


def record(arm, seed, curve, key=None, **curves):
    return Record(key or f"{arm}{seed}", "bspo", "train", arm, seed, {},
                  {"step": list(range(len(curve))), "gold": list(curve), **curves}, {}, 1.0, "c", {}, {})


def page(tmp_path, found, **options):
    (tmp_path / "bspo.json").write_text(json.dumps(found))
    return report.write_report(tmp_path, **options).read_text()


SPEC = Plot("gold", "gold", "gold reward", "PPO falls", ("bspo", "ppo"))
RECORDS = [record(arm, s, [0.0, s / 100, end]) for arm, end in (("bspo", 5.0), ("ppo", -4.0))
           for s in (100, 101, 102)]


# The catalogue


def test_catalogue():
    assert list(report.PAPERS) == [
        "bspo", "generative_rlhf_v", "safe_rlhf_v", "cot_monitor", "j1", "navab",
        "full_stack_safety", "co_alignment", "adaptac_dex", "exdex"]
    assert len({p.arxiv for p in report.PAPERS.values()}) == 10
    assert all(re.fullmatch(r"\d{4}\.\d{5}", p.arxiv) for p in report.PAPERS.values())
    assert report.PAPERS["bspo"].notebook == "nbs/papers/01_bspo.ipynb"
    assert report.PAPERS["bspo"].built


# The terminal's table


def test_the_line_above_the_table_says_what_each_scale_s_claims_stand_on():
    """The latest run may have been of one scale, on other seeds, with other code."""
    mixed = results(entry(), entry("9b.4", commit="abc1234, bbb0000"),
                    entry("9c.1", per_seed=(3.0,), scale="small", commit="fff0000"),
                    scale="small", seeds=[100], commit="fff0000")
    line = ("bspo, claims at mini: 2, seeds 100–104, commit abc1234, bbb0000; "
            "claims at small: 1, seed 100, commit fff0000; "
            "latest run: small, seed 100, 1.5 minutes on a laptop, 2 cores, commit fff0000")
    assert report.heading(mixed) == line
    table = report.show_claims(mixed)
    assert f"<p>{line}</p>" in table._repr_html_()
    assert " ".join(repr(table).split("\n\n")[0].split()) == line


LONG = "a statement that goes on and on about " * 12


@pytest.mark.parametrize("committed", [None, results(entry())])
def test_table_fits_the_terminal_and_loses_no_word(committed):
    long = entry("a-very-long-key-9b.3-reward-penalty", statement=LONG, paper_value="x" * 80,
                 note="5 of 10 seeds")
    table = report.claims_table(results(entry(), long), committed)
    assert max(map(len, table.splitlines())) <= 120
    words = " ".join(table.split())
    assert table.count("statement") >= 13 and table.count("x") >= 80
    for text in ("9b.3-PPO", "2.90", "[2.00, 4.00]", "0.031", "reproduced", "1.5 minutes"):
        assert text in words


def test_committed_result_stands_beside_only_at_the_same_scale():
    other = results(entry(value=7.7, per_seed=[7.7], verdict="reported"))
    beside = report.claims_table(results(entry()), other)
    assert "committed" in beside and "7.70" in beside and "reported" in beside
    elsewhere = results(entry(value=7.7, per_seed=[7.7], scale="small"))
    assert "7.70" not in report.claims_table(results(entry()), elsewhere)


def test_terminal_is_never_obeyed():
    table = report.claims_table(results(*(entry(f"k{i}", statement=s) for i, s in enumerate(SCRIPTS)),
                                        commit="\x1b[31m"))
    assert all(c.isprintable() or c == "\n" for c in table)


def test_number_formats():
    assert [report.number(x) for x in (None, 0.0, -3.14159, 1234.5, 1e-12, 0.099)] == [
        "", "0", "-3.14", "1.23e+03", "1e-12", "0.099"]
    assert [report.p_value(p) for p in (None, 1 / 1024, 0.5, 1.0)] == ["", "<0.001", "0.500", "1.000"]


# Figures


def test_every_seed_is_drawn_and_the_mean_is_the_mean():
    figure = report.plot(SPEC, RECORDS)
    lines = figure.axes[0].lines
    assert len(lines) == 8
    thick = [line for line in lines if line.get_linewidth() > 2]
    np.testing.assert_allclose([line.get_ydata()[1] for line in thick], [1.01, 1.01])
    assert figure.axes[0].get_ylabel() == "gold reward"
    assert figure.axes[0].get_title(loc="left") == "PPO falls"
    assert "bspo ends at 5.00; ppo ends at -4.00" in figure.alt


def test_the_mean_against_a_measured_x_is_the_mean_of_each_look():
    """KL differs from seed to seed (and is 0 for all at the start): no x is shared but the first."""
    spec = replace(SPEC, x="kl", arms=("ppo",))
    curves = [record("ppo", s, [0.0, end], kl=[0.0, kl]) for s, end, kl in ((1, 2.0, 4.0), (2, 4.0, 8.0))]
    [mean] = [line for line in report.plot(spec, curves).axes[0].lines if line.get_linewidth() > 2]
    assert mean.get_xydata().tolist() == [[0.0, 0.0], [6.0, 3.0]]
    assert "ppo ends at 3.00" in report.alt_text(spec, curves)


def test_an_arm_keeps_its_colour_in_another_figure():
    def colour(figure, label):
        [line] = [x for x in figure.axes[0].lines if x.get_label().startswith(label)]
        return line.get_color()

    alone = Plot("gold", "gold", "gold reward", "PPO falls", ("ppo",))
    arms = ("bspo", "ppo")
    assert colour(report.plot(SPEC, RECORDS, arms), "ppo") == colour(
        report.plot(alone, RECORDS, arms), "ppo")


def test_more_arms_than_colours_still_differ():
    arms = tuple(f"arm{i}" for i in range(16))
    spec = Plot("gold", "gold", "gold", "many", arms)
    figure = report.plot(spec, [record(arm, 1, [0, 1]) for arm in arms])
    thick = [x for x in figure.axes[0].lines if x.get_linewidth() > 2]
    assert len({(x.get_color(), x.get_linestyle()) for x in thick}) == 16


def test_title_is_computed_from_the_records():
    spec = Plot("gold", "gold", "gold", lambda found: f"{len(found)} records", ("ppo",))
    assert report.plot(spec, RECORDS).axes[0].get_title(loc="left") == "6 records"


def test_seeds_of_unequal_length_are_averaged_where_all_are():
    uneven = [record("ppo", 1, [0.0, 1.0, 2.0]), record("ppo", 2, [2.0, 3.0])]
    [mean] = [x for x in report.plot(SPEC, uneven).axes[0].lines if x.get_linewidth() > 2]
    assert mean.get_ydata().tolist() == [1.0, 2.0]


def test_dollar_signs_and_braces_are_text():
    spec = Plot("gold", "gold", "$\\frac{", "costs $5 and $\\nope{", ("bspo",), xlabel="$_")
    assert report.png(report.plot(spec, RECORDS)).startswith(b"\x89PNG")
    odd = entry("$_{", statement="$\\frac{1}{ $")
    assert report.png(report.dots([odd])).startswith(b"\x89PNG")


def test_figures_leave_matplotlib_as_it_was():
    report.plot(SPEC, RECORDS)
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_the_same_figure_gives_the_same_bytes():
    assert report.png(report.plot(SPEC, RECORDS)) == report.png(report.plot(SPEC, RECORDS))


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError, match="records: none of .* has a curve 'gold'"):
        report.plot(SPEC, [])
    with pytest.raises(ValueError, match="claims: none of them has figures"):
        report.dots([entry(per_seed=(), verdict="not tested"), entry(exact=True)])


def test_every_seed_has_a_dot():
    figure = report.dots([entry(), entry("b", (1.0, 2.0), "not tested"), entry("c", exact=True)])
    points = [x.get_xdata() for axes in figure.axes for x in axes.lines if x.get_marker() == "o"]
    assert [list(p) for p in points] == [[3.0, 2.0, 4.0, 3.0, 2.5], [1.0, 2.0]]


# HTML


@pytest.mark.parametrize("field", FIELDS)
def test_text_is_data_wherever_it_stands(field, tmp_path):
    """29 payloads in each of 7 fields: more than 200 through table, page and notebook."""
    plain = entry() if field == "key" else entry(per_seed=(), verdict="not tested", note="no")
    hostile = results(*({**plain, field: payload} for payload in SCRIPTS))
    for html in (page(tmp_path, hostile), report.claims_html(hostile),
                 report.show_claims(hostile)._repr_html_()):
        parsed = Parsed(html)
        assert {tag for tag, _ in parsed.tags} <= PAGE_TAGS
        assert {name for _, attributes in parsed.tags for name in attributes} <= PAGE_ATTRIBUTES
        assert not parsed.comments
        seen = "".join(parsed.texts)
        for payload in SCRIPTS if field != "commit" else ():
            assert payload.replace("\0", "\ufffd") in seen or payload in seen


@pytest.mark.filterwarnings("ignore:Glyph")  # no font has a NUL
@pytest.mark.parametrize("payload", SCRIPTS)
def test_text_is_data_in_the_head_and_in_figures(payload, tmp_path):
    hostile = results(entry(), machine={"processor": payload}, versions={payload: payload},
                      commit=payload)
    spec = Plot("gold", "gold", payload, payload, ("ppo",))
    texts = [replace(RECORDS[0], arm=payload, texts={"responses": [payload, f"[{payload}]"]})]
    section = report._section(hostile, hostile, [report.plot(spec, RECORDS)], texts, payload)
    parsed = Parsed(report._page([section]))
    assert {tag for tag, _ in parsed.tags} <= PAGE_TAGS
    assert {name for _, attributes in parsed.tags for name in attributes} <= PAGE_ATTRIBUTES
    assert any(payload in attributes.get("alt", "") for _, attributes in parsed.tags)
    assert "".join(parsed.texts).count(payload.replace("\0", "\ufffd")) >= 3 or "\0" in payload


def test_page_loads_nothing_and_runs_nothing(tmp_path):
    html = page(tmp_path, results(entry()))
    parsed = Parsed(html)
    images = [a for tag, a in parsed.tags if tag == "img"]
    assert images and all(a["src"].startswith("data:image/png;base64,") and a["alt"] for a in images)
    links = [a["href"] for tag, a in parsed.tags if tag == "a"]
    assert links == ["https://arxiv.org/abs/2503.18130"]
    assert "@import" not in html and "url(" not in html
    [policy] = [a["content"] for _, a in parsed.tags if a.get("http-equiv")]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"'sha256-{digest}'" in policy


def test_page_says_what_ran_where(tmp_path):
    seen = " ".join(" ".join(Parsed(page(tmp_path, results(entry()))).texts).split())
    for text in ("latest run mini, seeds 100–102, 1.5 minutes on a laptop, 2 cores, commit abc1234",
                 "claims at mini 1, seeds 100–104, commit abc1234", "python 3.11", "1 reproduced",
                 "figure 4", "above 0", "[2.00, 4.00]"):
        assert text in seen, text


def test_page_says_what_each_scale_stands_on_and_what_all_jobs_took():
    found = results(entry(), entry("9c.1", scale="small", seeds=[3, 4, 5, 6, 7], commit="fff0000"),
                    entry("9c.2", per_seed=(), scale="small", commit="fff0000"),
                    entry("1", per_seed=(), scale="paper", verdict="not tested"))
    made = [replace(r, seconds=30.0, machine={"processor": name})
            for r, name in zip(RECORDS, ("one", "two", "one", "one", "one", "one"), strict=True)]
    facts = dict(report._facts(found, made))
    assert facts["claims at mini"] == "1, seeds 100–104, commit abc1234"
    assert facts["claims at small"] == "2, seeds 3–7, commit fff0000"
    assert facts["claims at paper"] == "1, no seed has run"
    assert facts["all jobs"] == "6, 3 minutes of one core, on one, two"
    assert "all jobs" not in dict(report._facts(found, []))
    assert "pretrained weights" not in facts
    made = [replace(r, texts={"weights": ["hub"]}) for r in made]
    assert dict(report._facts(found, made))["pretrained weights"] == "hub"


def bspo_records(seeds):
    """Made-up records that belong to bspo's own jobs, with the curves its plots ask for."""
    pytest.importorskip("transformers")
    from alignkit.papers import bspo

    plots = [spec for spec in bspo.plots() if "bspo" in spec.arms]  # those of this scale
    curves = {name: [0.0, 1.0] for spec in plots for name in (spec.x, spec.y)}
    ends = dict.fromkeys([f"{spec.y}_end" for spec in plots], 1.0)
    jobs = needs_first(bspo.jobs(bspo.Config.mini(), seeds))
    return len(plots), [Record(job.key, "bspo", job.stage.__name__, job.arm, job.seed, ends, curves,
                               {}, 1.0, "c", {}, {}) for job in jobs]


def save_records(folder, records):
    lines = b"".join(r.to_json() + b"\n" for r in records)
    (folder / "bspo.records.jsonl.gz").write_bytes(gzip.compress(lines))


def test_page_draws_the_paper_s_figures(tmp_path):
    """Through the records file and bspo's own list of plots, as `alignkit report DIR` does."""
    plots, made = bspo_records(range(100, 105))
    save_records(tmp_path, made)
    assert page(tmp_path, results(entry())).count("data:image/png") == 1 + plots


def test_records_from_before_a_change_are_not_averaged_in(tmp_path):
    _, made = bspo_records(range(100, 105))
    old = [replace(r, key=f"old{i}", curves={**r.curves, "gold": [9.0, 9.0]})
           for i, r in enumerate(made)]
    found = results(entry())
    paper, kept, remark = report._of_today(found, old + made)
    gold = report._figures(paper, kept)[0]
    assert remark == "" and max(max(line.get_ydata()) for line in gold.axes[0].lines) == 1.0
    _, kept, remark = report._of_today(found, old + [replace(r, key="x" + r.key) for r in old])
    assert kept == [] and "two records" in remark


def test_records_of_every_scale_among_the_claims_are_kept():
    pytest.importorskip("transformers")
    from alignkit.papers import bspo

    made = [record("ppo", 100, [0.0], key=job.key)
            for job in (bspo.jobs(bspo.Config.mini(), [100])[-1],
                        bspo.jobs(bspo.Config.small(), [100])[-1])]
    found = results(entry(seeds=[100]), entry("9c.1", seeds=[100], scale="small"))
    assert report._current(bspo, found, [*made, record("ppo", 100, [9.0], key="old")]) == made


def test_a_missing_extra_leaves_the_curves_out_and_says_so(tmp_path, monkeypatch):
    def missing(_):
        raise ModuleNotFoundError("transformers is not installed: pip install 'alignkit[llm]'")

    monkeypatch.setattr(report, "import_module", missing)
    paper, kept, remark = report._of_today(results(entry()), RECORDS)
    assert paper is None and kept == [] and report._figures(paper, kept) == [] and "pip install 'alignkit[llm]'" in remark


def test_report_of_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no results in"):
        report.write_report(tmp_path)


def test_report_goes_where_it_is_told(tmp_path):
    page(tmp_path, results(entry()), out=tmp_path / "a.html")
    assert (tmp_path / "a.html").exists() and not (tmp_path / "report.html").exists()


def test_image_is_sharp_and_has_its_size(tmp_path):
    from PIL import Image

    figure = report.plot(SPEC, RECORDS)
    shown = report._image(figure)
    width, _ = Image.open(io.BytesIO(base64.b64decode(shown["src"].split(",")[1]))).size
    assert width >= 1.4 * shown["width"]


# What was written


def writer(arm, seed, *lines, name="responses"):
    return replace(record(arm, seed, [0.0]), texts={name: list(lines)})


WRITERS = [writer("ppo", 101, "b"), writer("bspo", 100, "only one"), writer("bspo", 101, "a", "a [b] c"),
           writer("wco", 101, "w", name="other"), record("uwo", 101, [0.0]),
           replace(writer("small.ppo", 101, "of another stage, so of other prompts"), stage="small")]


def test_texts_stand_side_by_side_for_one_seed():
    assert report.written(WRITERS) == (101, {"bspo": ["a", "a [b] c"], "ppo": ["b"]})
    assert list(report.written(WRITERS, arms=("ppo", "bspo"))[1]) == ["ppo", "bspo"]
    assert report.written(WRITERS, arms=("bspo",)) == (100, {"bspo": ["only one"]})
    shown = report.show_texts(WRITERS)
    parsed = Parsed(shown._repr_html_())
    assert sum(tag == "tr" for tag, _ in parsed.tags) == 3 and "mark" in dict(parsed.tags)
    cells = [text for text in parsed.texts if text.strip()]
    assert cells[-7:] == ["bspo", "ppo", "a", "b", "a ", "b", " c"]
    assert repr(shown) == "bspo (seed 101)\n  a\n  a [b] c\n\nppo (seed 101)\n  b"


def test_texts_that_nobody_kept_are_an_error():
    with pytest.raises(ValueError, match="none of them has texts 'thoughts'"):
        report.show_texts(WRITERS, "thoughts")
    with pytest.raises(ValueError, match=r"none of \['uwo'\] has texts 'responses'"):
        report.show_texts(WRITERS, arms=("uwo",))


def test_page_shows_the_texts_of_the_records(tmp_path):
    _, made = bspo_records([100])
    policies = [r for r in made if r.arm in ("ppo", "bspo")]
    texts = {"ppo": "the [odd] word", "bspo": "the word"}
    save_records(tmp_path, [replace(r, texts={"responses": [texts[r.arm]]}) for r in policies])
    html = page(tmp_path, results(entry()))
    assert "the <mark>odd</mark> word" in html and "Seed 100" in html
    save_records(tmp_path, made)
    assert "<mark>" not in page(tmp_path, results(entry()))


# README and notebooks


def test_readme_table_is_one_row_a_paper_and_says_what_is_not_built():
    lines = report.readme_table().splitlines()
    assert len(lines) == 12 and all(line.count("|") == 4 for line in lines)
    for line, paper in zip(lines[2:], report.PAPERS.values(), strict=True):
        assert paper.arxiv in line and ("not built yet" in line) is not paper.built
        assert (paper.notebook in line) is paper.built


def test_readme_is_written_between_its_markers(tmp_path, monkeypatch):
    write_results(tmp_path / "bspo.json", paper="bspo", arxiv="2503.18130", scale="mini", seeds=[100],
                  seconds=1.0, claims=[entry()],
                  provenance={"commit": "c", "machine": {}, "versions": {}})
    monkeypatch.setattr(report, "results_folder", lambda: tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\n{report.END}\nafter\n", encoding="utf-8")
    assert report.update_readme(readme) and not report.update_readme(readme)
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("after\n") and "1 reproduced" in text


@pytest.mark.parametrize("text", ["", report.BEGIN, report.END + report.BEGIN,
                                  (report.BEGIN + report.END) * 2])
def test_readme_without_its_markers_is_left_alone(text, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(ValueError, match="path: .* needs"):
        report.update_readme(readme)
    assert readme.read_text() == text


def test_show_claims_renders_in_both_worlds():
    shown = report.show_claims(results(entry()), results(entry()))
    assert repr(shown) == report.claims_table(results(entry()), results(entry()))
    assert shown._repr_html_().count("<td") == 8


def test_a_figure_shows_itself_in_jupyter():
    figure = report.plot(SPEC, RECORDS)
    data, metadata = figure._repr_png_()
    assert data.startswith(b"\x89PNG") and metadata["alt"] == figure.alt


def test_a_figure_shows_itself_beside_pyplot(monkeypatch):
    """The inline backend registers a way to show every Figure; ours keeps its own, with its alt text."""
    from IPython.core.formatters import DisplayFormatter
    from matplotlib.figure import Figure

    formatter = DisplayFormatter()
    formatter.formatters["image/png"].for_type(Figure, lambda figure: b"pyplot's")
    monkeypatch.setattr(report, "_shell", lambda: SimpleNamespace(display_formatter=formatter))
    figure = report.plot(SPEC, RECORDS)
    data, metadata = formatter.format(figure)
    assert data["image/png"] == report.png(figure)
    assert metadata["image/png"]["alt"] == figure.alt


def test_a_file_under_another_paper_s_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="bspo.json: holds j1, not bspo"):
        page(tmp_path, results(entry(), paper="j1"))
