import dataclasses
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from runs_on_disk import events, line, record, settings, write_lines, write_run

import moejax
from moejax import cli
from moejax.config import Phase
from moejax.report.page import write_report

BAD = "<script>alert('x')</script>\"&"
EMPTY = ("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr")


class Page(HTMLParser):
    """Checks that elements are closed in their order, and keeps what tests ask for."""

    def __init__(self, text):
        super().__init__()
        self.open, self.titles, self.tags, self.urls, self.words = [], [], set(), [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.urls += [
            value for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data", "srcset")
        ]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in EMPTY:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        if self.open and self.open[-1] == "h3":
            self.titles.append(data.strip())
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def read(path):
    return Page(Path(path).read_text(encoding="utf-8"))


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "run")


def test_a_page_has_everything(folder):
    page = read(moejax.report(folder))
    for title in (
        "Loss",
        "MTP loss",
        "Gradient norm",
        "Schedule",
        "Violation of balance",
        "Dead experts",
        "Routing entropy",
        "Range of the router's bias",
        "Drift of the router's bias",
        "Fullest expert of each layer",
        "Load of every expert at step 40",
        "Bias of the router at step 40",
        "Layer 1",
        "MTP 1",
        "Throughput",
        "MFU",
        "Attempts",
    ):
        assert title in page.titles, title
    for words in (
        "finished",
        "40 of 40",
        "warm-up",
        "lost work",
        "2 attempts, 4 steps lost",
        "not finite: loss",
        "9 files verified",
        "2.5250 at step 40",
        "Without a token: layer 2: 1, 3, 5, 7; MTP 1: 1, 2, 3, 4, 5, 6, 7",
        "model.moe.num_experts",
    ):
        assert words in page.text, words
    assert "Not there" not in page.text


def test_a_page_loads_and_runs_nothing(folder, tmp_path):
    for path in (moejax.report(folder), moejax.report([folder, folder], tmp_path / "two.html")):
        text, page = path.read_text(), read(path)
        assert page.urls and all(url.startswith(("#", "data:image/png;base64,")) for url in page.urls)
        assert not page.tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
        assert not re.search(r"@import|url\(|https?://", text)
        assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in text


def test_what_a_folder_says_is_text(tmp_path):
    """A folder from elsewhere cannot put anything into the page."""
    folder = write_run(tmp_path / "<b>run&", settings(name=BAD))
    said = {"time": BAD, "kind": BAD, "step": BAD, "more": [BAD, {BAD: BAD}]}
    write_lines(folder / "events.jsonl", [*events(), said, {"kind": "failed", "error": BAD, "time": 1e9}])
    write_lines(folder / "metrics.jsonl", [line(step) | {BAD: BAD, "loss": BAD} for step in range(1, 9)])
    (folder / "environment.json").write_text(json.dumps({"devices": {BAD: BAD}, "processor": BAD}))
    other = write_run(tmp_path / "other")
    for path in (moejax.report(folder), moejax.report([folder, other], tmp_path / "two.html")):
        page = read(path)
        assert not page.tags & {"script", "b>run"} and BAD in page.text and "<b>run&" in page.text


# ------------------------------------------------------------------------------------------- folders that are not whole


def cut_off(folder):
    write_lines(folder / "events.jsonl", events()[:3])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 41, "lo')
    shutil.rmtree(folder / "checkpoints")


def only_started(folder):
    cut_off(folder)
    (folder / "metrics.jsonl").unlink()
    (folder / "expert_load.jsonl").unlink()


def one_step(folder):
    write_lines(folder / "metrics.jsonl", [line(1)])
    write_lines(folder / "expert_load.jsonl", [record(1)])


def only_metrics(folder):
    for name in ("config.json", "environment.json", "expert_load.jsonl", "events.jsonl"):
        (folder / name).unlink()


def older(folder):
    """Without what runs did not record once."""
    keep = [{key: value for key, value in line(step).items() if key != "load_entropy"} for step in range(1, 41)]
    write_lines(folder / "metrics.jsonl", keep)
    write_lines(folder / "expert_load.jsonl", [{"step": step, "load": record(step)["load"]} for step in (20, 40)])


def never_finite(folder):
    write_lines(folder / "metrics.jsonl", [dict.fromkeys(line(1)) | {"step": step} for step in (1, 2)])


def no_experts(folder):
    dense = {"max_violation": [], "load_entropy": [], "dead_experts": 0}
    write_lines(folder / "metrics.jsonl", [line(step) | dense for step in range(1, 41)])
    (folder / "expert_load.jsonl").write_text("")


def spoilt(folder):
    for path in folder.glob("*.json*"):
        path.write_bytes(b"\xff\x00{}\n" + path.read_bytes()[:100])


def strange(folder):
    """JSON, but not as a run writes it."""
    (folder / "environment.json").write_text('{"devices": 3}')
    (folder / "config.json").write_text("[]")
    write_lines(folder / "events.jsonl", [{"kind": "ledger"}, {"kind": 3}, {"kind": "validation", "step": "x"}])
    write_lines(folder / "expert_load.jsonl", [{"step": 1, "load": [[1.0], [1.0, 2.0]]}, {"step": 2}])


FOLDERS = {
    cut_off: ("Loss", "the last line is cut off", "there is no checkpoint", "not ended"),
    only_started: ("Attempts", "metrics.jsonl is missing: all curves are left out"),
    one_step: ("Loss", "1 of 40"),
    only_metrics: ("Loss", "config.json is missing", "events.jsonl is missing: validations, faults, restarts"),
    older: ("Routing entropy", "lines without the router's bias"),
    never_finite: ("Attempts", "2 of 40"),
    no_experts: ("Loss", "40 of 40"),
    spoilt: (None, "config.json is no JSON", "metrics.jsonl: "),
    strange: ("Loss", "where the time went cannot be read"),
}


@pytest.mark.parametrize("change", FOLDERS, ids=lambda change: change.__name__)
@pytest.mark.filterwarnings("error")
def test_what_is_there_is_reported_and_what_is_missing_is_named(change, folder, tmp_path):
    other = write_run(tmp_path / "other")
    change(folder)
    title, *words = FOLDERS[change]
    page = read(moejax.report(folder))
    if title and title != "Attempts":
        assert title in page.titles
    for said in words:
        assert said in page.text, said
    both = read(moejax.report([folder, other], tmp_path / "two.html"))
    assert "Loss" in both.titles and "2 runs: run, other" in both.text


def test_entropy_of_an_older_run_is_that_of_its_loads(folder):
    older(folder)
    text = moejax.report(folder).read_text()
    # of layers with the loads 1 1 1 1 1 1 1 1, 2 0 2 0 2 0 2 0 and 8 0 0 0 0 0 0 0: ln 8, ln 4 and 0
    assert f"median of the layers <b>{np.log(4):.4g}</b>" in text.split("Routing entropy")[1].split("</ul>")[0]


# ------------------------------------------------------------------------------------------------------- several runs


def test_runs_are_overlaid_and_only_their_differences_listed(folder, tmp_path):
    config = settings()
    optimizer = dataclasses.replace(config.optimizer, peak_lr=1e-3)
    schedule = dataclasses.replace(config.schedule, mtp_weight=(Phase(until=1.0, value=0.5),))
    other = write_run(tmp_path / "other", dataclasses.replace(config, optimizer=optimizer, schedule=schedule))
    text = write_report([folder, other], tmp_path / "two.html").read_text()
    assert text.count('<ul class="key">') and "other, validation" in text
    listed = text.split('<h2 id="settings">')[1]
    for name in ("optimizer.peak_lr", "schedule.mtp_weight.0.value", "schedule.mtp_weight.1.value"):
        assert name in listed
    assert "optimizer.beta1" not in listed and "environment." not in listed
    assert "<code>0.00022</code></td><td><code>0.001</code>" in listed


def test_steps_of_other_sizes_are_compared_by_tokens(folder, tmp_path):
    other = write_run(tmp_path / "other")
    assert ">step</text>" in moejax.report([folder, other], tmp_path / "two.html").read_text()
    write_lines(other / "metrics.jsonl", [line(step) | {"tokens": 2000 * step} for step in range(1, 41)])
    text = moejax.report([folder, other], tmp_path / "two.html").read_text()
    assert ">tokens</text>" in text and ">80k</text>" in text


# ------------------------------------------------------------------------------------------------------------- large


def test_a_long_run_of_many_experts_gives_a_small_page(folder):
    """2000 steps with 58 layers; 70 records of 58 x 256 experts, which do not compress."""
    random = np.random.default_rng(0)
    lines = [line(step) | {"max_violation": random.random(58).tolist()} for step in range(1, 2001)]
    lines[1234]["loss"] = 77.0
    write_lines(folder / "metrics.jsonl", lines)
    loads = np.exp(random.normal(size=(70, 58, 256)).round(2))
    write_lines(folder / "expert_load.jsonl", [{"step": s + 1, "load": load.tolist()} for s, load in enumerate(loads)])
    path = moejax.report(folder)
    assert path.stat().st_size < 3e6
    assert "up to 77" in path.read_text()  # the spike is named, not thinned away


# -------------------------------------------------------------------------------------------------------- the command


def test_command_writes_the_page_and_says_where(folder, tmp_path, capsys):
    assert cli.main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.startswith(f"{folder / 'report.html'}: 0.")
    assert cli.main(["report", str(folder), str(folder), "--out", str(tmp_path / "new" / "two.html")]) == 0
    assert "2 runs" in (tmp_path / "new" / "two.html").read_text()
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "RUN='nowhere': wanted a run folder, with at least one of config.json, "),
        ([], "report='the following arguments are required: RUN': wanted what moejax report --help says"),
        (["RUN", "--out", "/dev/null/page.html"], "--out='/dev/null/page.html': wanted a file that can be written"),
    ],
    ids=["no run", "no argument", "no place"],
)
def test_bad_input_is_one_line(words, said, folder, capsys):
    assert cli.main(["report", *(str(folder) if word == "RUN" else word for word in words)]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and said in shown


def test_a_notebook_shows_the_page_itself(folder):
    shown = moejax.report(str(folder))._repr_html_()
    assert shown.startswith('<iframe srcdoc="&lt;!DOCTYPE html&gt;') and "<script" not in shown
    page = Page(shown)
    assert page.tags == {"iframe"}
