"""The report as a browser shows it: headless Chromium, offline, in light and dark, wide and narrow."""

import json
import re
import shutil
import subprocess
from html import escape, unescape

import numpy as np
import pytest
from PIL import Image, ImageColor
from runs_on_disk import events, line, record, settings, write_lines, write_run

import moejax

pytestmark = pytest.mark.browser

HEIGHT = 14_000
WIDTHS = {"wide": 1100, "narrow": 390}
SCHEMES = {"light": 1, "dark": 0}  # Chromium's numbers
CURVE = {"light": "#2563a8", "dark": "#6ea8ec"}  # of the first run, as the page has it

# The page stands in a frame of the wanted width, opened where it is wide, and what is measured is written below it.
WRAPPER = """<!DOCTYPE html><html><body style="margin:0;background:#7f7f7f">
<iframe style="border:0;display:block;width:{width}px;height:{height}px" srcdoc="{page}"></iframe><pre id="found"></pre>
<script>
window.onload = () => {{
  const page = document.querySelector("iframe").contentDocument;
  if ({width} > 600) page.querySelectorAll("details").forEach(part => part.open = true);
  const box = element => {{
    const {{left, top, right, bottom}} = element.getBoundingClientRect();
    return [left, top, right, bottom];
  }};
  const charts = [...page.querySelectorAll("svg.chart")].filter(chart => chart.checkVisibility()).map(chart => ({{
    name: chart.getAttribute("aria-label"),
    box: box(chart),
    scrolls: chart.parentElement.scrollWidth > chart.parentElement.clientWidth,
    texts: [...chart.querySelectorAll("text")].map(text => [text.textContent, box(text)]),
  }}));
  const loaded = page.defaultView.performance.getEntriesByType("resource").map(entry => entry.name);
  document.getElementById("found").textContent = JSON.stringify({{
    charts,
    loaded: loaded.filter(name => !name.startsWith("data:")),
    heat: [...page.querySelectorAll("image.heat")].filter(image => image.checkVisibility()).map(box),
    width: page.documentElement.scrollWidth,
    height: page.body.getBoundingClientRect().bottom,
    outside: [...page.querySelectorAll("h1, h2, h3, p, dt, dd, li, summary, figcaption, .key, .tiles div")]
      .filter(element => element.getBoundingClientRect().right > {width} + 1).map(element => element.textContent),
    background: page.defaultView.getComputedStyle(page.body).backgroundColor,
    colour: page.defaultView.getComputedStyle(page.body).color,
  }});
}};
</script></body></html>"""


def chromium(scheme, profile, *words):
    """Runs headless Chromium and returns its output; what a page writes on the console is an error."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    assert found, f"none of {', '.join(names)} is installed"
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    flags += [f"--user-data-dir={profile}", "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=3000"]
    flags += [f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}", f"--window-size=1100,{HEIGHT}"]
    done = subprocess.run([found, *flags, *words], capture_output=True, text=True, timeout=240)
    said = [text for text in done.stderr.splitlines() if "CONSOLE" in text]
    assert not said, said
    return done.stdout


def many_layers(folder):
    """58 layers of 256 experts, and a spike."""
    random = np.random.default_rng(0)
    model = settings().model
    (folder / "config.json").write_text(settings().to_json())
    lines = [line(step) | {"max_violation": random.random(58).tolist()} for step in range(1, 3001)]
    lines[1500]["loss"] = 77.0
    write_lines(folder / "metrics.jsonl", lines)
    loads = np.exp(random.normal(size=(30, 58, 256)).round(2))
    found = [{"step": 100 * (s + 1), "load": load.tolist()} for s, load in enumerate(loads)]
    write_lines(folder / "expert_load.jsonl", found)
    assert model.num_moe_layers != 58


def cut_off(folder):
    write_lines(folder / "events.jsonl", events()[:3])
    write_lines(folder / "metrics.jsonl", [line(1)])
    write_lines(folder / "expert_load.jsonl", [record(1)])


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The reports that are looked at."""
    place = tmp_path_factory.mktemp("runs")
    folders = {name: write_run(place / name) for name in ("whole", "a_second_run_with_a_long_name", "large", "cut")}
    many_layers(folders["large"])
    cut_off(folders["cut"])
    two = [folders["whole"], folders["a_second_run_with_a_long_name"]]
    other = [line(step) | dict.fromkeys(("loss", "mtp_loss", "grad_norm"), 4 + 3 / step) for step in range(1, 41)]
    write_lines(two[1] / "metrics.jsonl", other)
    return {
        "one run": moejax.report(folders["whole"]),
        "two runs": moejax.report(two, place / "two.html"),
        "many layers": moejax.report(folders["large"]),
        "one step": moejax.report(folders["cut"]),
    }


@pytest.fixture(scope="module")
def look(pages, tmp_path_factory):
    """`look(page, scheme, width)`: what was measured, and the picture; each is looked at once."""
    place, seen = tmp_path_factory.mktemp("looks"), {}

    def looked(*what):
        if what not in seen:
            name, scheme, width = what
            file, picture = place / f"{len(seen)}.html", place / f"{len(seen)}.png"
            page = escape(pages[name].read_text(encoding="utf-8"))
            file.write_text(WRAPPER.format(page=page, width=WIDTHS[width], height=HEIGHT), encoding="utf-8")
            dom = chromium(scheme, place / "profile", "--dump-dom", file.as_uri())
            measured = json.loads(unescape(re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)[1]))
            chromium(scheme, place / "profile", f"--screenshot={picture}", file.as_uri())
            with Image.open(picture) as image:
                seen[what] = measured, np.asarray(image.convert("RGB"))
        return seen[what]

    return looked


LOOKS = [(page, "light", width) for page in ("one run", "two runs", "many layers", "one step") for width in WIDTHS]
LOOKS += [("one run", "dark", "wide"), ("two runs", "dark", "narrow")]


def touch(a, b):
    return min(a[2], b[2]) - max(a[0], b[0]) > 1 and min(a[3], b[3]) - max(a[1], b[1]) > 1.5


@pytest.mark.parametrize("what", LOOKS, ids=", ".join)
def test_a_page_fits_and_its_labels_are_apart(what, look):
    found, _ = look(*what)
    width = WIDTHS[what[2]]
    assert found["width"] <= width and found["outside"] == []
    assert found["height"] < HEIGHT
    assert found["loaded"] == []
    assert len(found["charts"]) >= 10
    for chart in found["charts"]:
        left, top, right, bottom = chart["box"]
        assert right - left > 150 and bottom - top > 40, chart
        assert chart["scrolls"] or right <= width, chart
        for index, (words, box) in enumerate(chart["texts"]):
            inside = left - 1 <= box[0] and box[2] <= right + 1 and top - 1 <= box[1] and box[3] <= bottom + 1
            assert inside, (chart["name"], words)
            touching = [other for other in chart["texts"][index + 1 :] if touch(box, other[1])]
            assert not touching, (chart["name"], words, box, touching)


@pytest.mark.parametrize("what", LOOKS, ids=", ".join)
def test_a_page_is_legible_and_its_pictures_are_drawn(what, look):
    found, pixels = look(*what)
    dark = what[1] == "dark"
    luminance = [np.mean([int(n) for n in re.findall(r"\d+", found[name])[:3]]) for name in ("background", "colour")]
    assert (luminance[0] < 40 and luminance[1] > 200) if dark else (luminance[0] > 240 and luminance[1] < 60)
    background = np.array([int(n) for n in re.findall(r"\d+", found["background"])[:3]])
    page = pixels[: round(found["height"]), : WIDTHS[what[2]]]
    assert 0.6 < (page == background).all(-1).mean() < 0.99
    curve = np.array(ImageColor.getrgb(CURVE[what[1]]))
    for chart in found["charts"][:3]:  # losses: the first run's curve is there, in its colour
        left, top, right, bottom = (round(at) for at in chart["box"])
        part = pixels[top:bottom, left : min(right, WIDTHS[what[2]])].astype(int)
        assert (np.abs(part - curve).max(-1) <= 24).sum() > (3 if what[0] == "one step" else 40), chart["name"]
    assert found["heat"]
    for left, top, right, bottom in found["heat"]:
        part = pixels[round(top) : round(bottom), round(left) : round(right)]
        assert len(np.unique(part.reshape(-1, 3), axis=0)) > (1 if what[0] == "one step" else 2)
