"""
The page: groups, charts and judged rows, read back by a parser, and looked at in a browser where
there is one. "kills:" names wrong versions of report.py under which the test fails.
"""

import base64
import html
import io
import json
import math
import random
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers import ROOT, picture, run_here, run_there, write, write_video
from PIL import Image

import eval as ev
import report

pytestmark = pytest.mark.usefixtures("here")

EVIL = ['<script>alert(1)</script>', '<img src=x onerror=alert(1)>', '"><svg onload=alert(1)>',
        "</pre></details><iframe src='http://evil'>", "javascript:alert(1)", "&lt;b&gt; 😀"]
LONG = "x" * 400  # a word wider than any screen


class Page(HTMLParser):
    """What a browser would make of it: every start tag with its attributes and the text within."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        if tag in ("td", "th", "text"):
            self.text += " "  # or the numbers of neighbours would be one
        element = {**dict(attributes), "tag": tag, "text": "", "within": list(self.open)}
        self.tags.append(element)
        if tag not in ("meta", "img", "br"):
            self.open.append(element)

    def handle_startendtag(self, tag, attributes):  # of SVG
        self.tags.append({**dict(attributes), "tag": tag, "text": "", "within": list(self.open)})

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag, "tags are nested"

    def handle_data(self, data):
        if self.open and self.open[-1]["tag"] == "style":
            return
        self.text += data
        for element in self.open:
            element["text"] += data

    def all(self, tag, of=None):
        """The elements with this tag, and with this class."""
        return [element for element in self.tags if element["tag"] == tag
                and (of is None or of in element.get("class", "").split())]


def group(step, advantages, **more):
    """A line of rollouts.jsonl; answer g is the words of its tokens."""
    n = len(advantages)
    tokens = [[f"w{g}", " is", f" right{step}", "<|im_end|>"] for g in range(n)]
    return {"step": step, "id": f"row-{step}", "label": "A", "media": [],
            "prompt": f"Which? {step}",
            "answers": ["".join(words[:-1]) for words in tokens],
            "tokens": tokens, "advantages": advantages, "kept": [True] * n,
            "rewards": {"format": [1.0] * n, "accuracy": [float(a > 0) for a in advantages]},
            "reward": [1.0 + (a > 0) for a in advantages],
            "logp_sampled": [[-0.5, -0.25, -1.0, 0.0]] * n,
            "logp_after": [[-0.5, -0.35, -0.6, 0.0]] * n} | more


def run_folder(name, groups, steps=5):
    """A run folder with these groups and a metrics.jsonl."""
    write(f"{name}/metrics.jsonl", [
        {"step": s, "reward": s / 7, "kl": math.nan, "grad_norm": 10.0 ** s,
         "sampling/sampling_logp_difference/mean": 2e-7} for s in range(1, steps + 1)])
    if groups:
        write(f"{name}/rollouts.jsonl", groups)
    return name


def page_of(*arguments):
    run_here(report.main, [*arguments, "--out", "page.html"])
    return Page(Path("page.html").read_text())


def judged(rows, preds, *more):
    """The page of these preference rows and predictions on them, by eval.py."""
    run_here(ev.main, ["--score", write("preds.jsonl", preds), "--data", write("rows.jsonl", rows),
                       "--report", "page.html", *more])
    return Page(Path("page.html").read_text())


def text_row(n, **more):
    return {"id": f"r{n}", "task": "text", "prompt": "What?", "label": "A",
            "responses": ["good", "bad"]} | more


# ------------------------------------------------------------------------------------------- groups
def test_an_early_and_a_late_group_open_the_page():
    # kills: groups that teach nothing shown; the last logged one though its answers are alike; the
    # curves first; cards as sampled, so that best and worst are not found
    groups = [group(1, [0.0, 0.0]), group(11, [-1.0, 1.0]), group(21, [0.6, -1.7]),
              group(31, [-0.5, 0.0, 2.0, -1.5]), group(41, [0.0, 0.0])]
    page = page_of(run_folder("runs/a", groups), run_folder("runs/b", groups[:2]))
    assert page.all("h2")[0]["text"] == "What the answers earned"
    runs = page.all("details")
    assert ["open" in run for run in runs] == [True, False]  # the other runs are a click away
    assert [h["text"] for h in page.all("h3")] == ["Step 11", "Step 31", "Step 11"]
    assert "first and the last of 3 logged groups" in runs[0]["text"]
    assert "only one of 2 logged groups" in runs[1]["text"]
    cards = page.all("div", "card")[:6]
    assert [card["class"] for card in cards] == [
        "card up", "card down", "card up", "card flat", "card down", "card down"]
    heads = [p for p in page.all("p") if p["within"][-1] in cards]
    shown = [" ".join(re.findall(r"[-+]?\d+(?:\.\d+)?", p["text"])) for p in heads]
    # advantage, format, accuracy, total, number of the answer
    assert shown == ["+1.00 1 1 2 2", "-1.00 1 0 1 1", "+2.00 1 1 2 3", "0 1 0 1 2",
                     "-0.50 1 0 1 1", "-1.50 1 0 1 4"]
    assert [card["text"].count("w2 is right31") for card in cards] == [0, 0, 1, 0, 0, 0]


def test_tokens_are_shaded_by_what_the_step_did_to_them():
    # 100 tokens that changed by 1, 2, ... 100 thousandths of a nat, up and down in turns.
    # kills: before minus after; the sign lost; one token that jumped paling all others
    changes = [k / 1000 * (-1) ** k for k in range(1, 101)]
    changes[-1] = 50.0
    sampled = [-k / 7 for k in range(100)]
    line = group(1, [1.0, -1.0], tokens=[[f" t{k}" for k in range(100)], ["same"]],
                 logp_sampled=[sampled, [-1.0]],
                 logp_after=[[a + c for a, c in zip(sampled, changes, strict=True)], [-1.0]])
    page = page_of(run_folder("run", [line]))
    best, other = page.all("div", "card")
    spans = [span for span in page.all("span") if span["within"][-1].get("class") == "text"]
    tokens = [span for span in spans if best in span["within"]]
    assert [span["text"] for span in tokens] == line["tokens"][0]
    assert [span["class"] for span in tokens] == ["up" if c > 0 else "down" for c in changes]
    shades = [float(span["style"].removeprefix("--shade:")) for span in tokens]
    assert shades == pytest.approx([min(1, abs(c) / 0.099) for c in changes], abs=0.02)
    a, b, change = map(float, re.findall(r"[-+]?\d+\.\d+", tokens[3]["title"]))
    assert (a, b, change) == pytest.approx((sampled[3], sampled[3] + 0.004, 0.004), abs=1e-3)
    same, = [span for span in spans if other in span["within"]]
    assert (same["class"], same["style"]) == ("flat", "--shade:0.00")
    assert "rounding alone makes 2e-07 nats" in page.text


def test_logs_of_older_versions_have_no_shades():
    # kills: a page that needs what older runs did not write; a total made up from the parts
    old = group(1, [1.0, -1.0])
    for name in ("tokens", "logp_sampled", "logp_after", "media", "reward"):
        del old[name]
    page = page_of(run_folder("run", [old, {**old, "step": 11}]))
    assert [div["text"] for div in page.all("div", "text")] == old["answers"] * 2
    assert "total" not in page.text and "no log-probabilities of tokens" in page.text


def test_an_answer_that_the_filter_left_out_says_so():
    page = page_of(run_folder("run", [group(1, [3.2, -0.4], kept=[False, True])]))
    assert ["left out" in card["text"] for card in page.all("div", "card")] == [True, False]


def test_a_group_shows_the_media_that_its_prompt_had():
    # kills: pictures beside a prompt of captions, which the model did not see
    picture("red", (8, 8)).save("i.png")
    write_video(Path("v.mp4"), 8)
    groups = [group(1, [1.0, -1.0], prompt="Which? <image>", media=["i.png"]),
              group(2, [1.0, -1.0], prompt="Which? <video>", media=["v.mp4"])]
    page = page_of(run_folder("run", groups))
    columns = [div for div in page.all("div") if div["within"][-1].get("class") == "two"]
    assert [sum(column in img["within"] for img in page.all("img")) for column in columns] == [1, 4]
    assert not page_of(run_folder("captions", [group(1, [1.0], media=["i.png"])])).all("img")
    gone = page_of(run_folder("gone", [group(1, [1.0], prompt="<image>", media=["no.png"])]))
    assert "no.png does not exist" in gone.text


# ------------------------------------------------------------------------------------------- charts
def numbers_of(text):
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text)]


def drawn(svg):
    """An SVG file -> {text: (x, y)} of its words and numbers, and its lines [[(x, y)]]"""
    root = ET.fromstring(svg)  # a file of its own needs the name space
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    texts, lines = [], []
    for element in root.iter():
        kind = element.tag.rpartition("}")[2]
        if kind == "text":
            texts.append((element.text, float(element.get("x")), float(element.get("y"))))
        if kind == "polyline":
            numbers = numbers_of(element.get("points"))
            lines.append(list(zip(numbers[::2], numbers[1::2], strict=True)))
    return root, texts, lines


def test_points_lie_where_the_axes_say():
    # Read like a person would: between two labels of an axis. kills: y upside down, the legend's
    # height in the scale, ticks that are no multiples and so have many digits
    points = [(1, 0.4), (10, 0.6), (20, 0.5), (37, 0.93)]
    root, texts, (line, other) = drawn(report.line_chart(
        "right", {"GRPO": points, "a second": [(1, 0.5), (2, math.nan)]}, 400, 240))
    named = {text: (x, y) for text, x, y in texts}
    x10, x20 = named["10"][0], named["20"][0]
    y_low, y_high = named["0.4"][1] - 4, named["0.8"][1] - 4  # a number's middle is at its tick
    for (x, y), (px, py) in zip(points, line, strict=True):
        assert px == pytest.approx(x10 + (x - 10) / 10 * (x20 - x10), abs=0.2)
        assert py == pytest.approx(y_low + (y - 0.4) / 0.4 * (y_high - y_low), abs=0.2)
    assert y_high < y_low and x10 < x20  # larger is higher up, and further right
    assert len(other) == 1  # nan is no point
    lowest = max(y for _, y in line + other)
    assert all(named[name][1] > lowest + 20 for name in ("GRPO", "a second"))  # below, not over it
    assert float(root.get("height")) > named["a second"][1] > named["GRPO"][1]
    assert float(root.get("width")) == 400


@pytest.mark.parametrize("ys", [
    [0.0], [3.0, 3.0], [0.0, 1e-7], [1e6, 3e6], [-0.3, 0.1234567891], [0.97, 0.97000001],
    [5.0, math.inf, None, math.nan, 6.0]])
def test_any_line_has_a_chart_with_short_numbers(ys):
    # kills: a scale divided by 0; figures with 16 digits
    root, texts, (line,) = drawn(report.line_chart("t", {"name": list(enumerate(ys))}))
    width, height = float(root.get("width")), float(root.get("height"))
    finite = [y for y in ys if y is not None and math.isfinite(y)]
    assert len(line) == len(finite)
    assert all(50 < x <= width and 20 < y < height - 20 for x, y in line)
    assert all(len(text) <= 8 for text, _, _ in texts) and len(texts) > 5
    assert all(0 <= x < width and 0 < y < height for _, x, y in texts)


def test_nothing_finite_has_no_chart():
    assert report.line_chart("t", {}) == report.line_chart("t", {"a": [(1, math.nan)]}) == ""


def test_ticks_are_round_and_frame_the_data():
    draw = random.Random(0)
    for _ in range(500):
        low = draw.uniform(-1, 1) * 10 ** draw.uniform(-4, 4)
        high = low + 10 ** draw.uniform(-4, 4)
        ticks = report.ticks(low, high)
        steps = [b - a for a, b in zip(ticks, ticks[1:], strict=False)]
        assert 2 <= len(ticks) <= 8 and ticks[0] <= low + 1e-9 and ticks[-1] >= high - 1e-9
        assert ticks[0] > low - steps[0] and ticks[-1] < high + steps[0]
        assert f"{steps[0]:.4e}"[:6] in ("1.0000", "2.0000", "5.0000")
        assert steps == pytest.approx([steps[0]] * len(steps))


def luminance(colour):
    """WCAG 2: the relative luminance of "#rrggbb" """
    channels = [int(colour[k:k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    dark, light = sorted([luminance(one), luminance(other)])
    return (light + 0.05) / (dark + 0.05)


def test_charts_are_seen_on_light_and_on_dark():
    # WCAG asks for 3 for graphics; numbers get more. kills: black text, which dark pages swallow
    for paper in ("#ffffff", "#14171b", "#0d1117"):  # the page's two, and GitHub's dark one
        assert min(contrast(ink, paper) for ink in report.INKS) >= 3
        assert contrast(report.GREY, paper) >= 3.9
    svg = report.line_chart("t", {str(k): [(0, k), (1, k)] for k in range(8)})
    assert set(re.findall(r"#[0-9a-f]+", svg)) == {*report.INKS, report.GREY}


def test_curves_share_one_legend_and_an_ink_stays_with_its_run():
    # kills: an ink by what is drawn, so that a run without a figure shifts all others
    write("a/metrics.jsonl", [{"step": k, "loss": k} for k in range(3)])
    write("b/metrics.jsonl", [{"step": k, "loss": k, "reward": 2 * k} for k in range(3)])
    page = page_of("a", "b")
    legend = {span["within"][-1]["text"]: span["style"] for span in page.all("span", "key")}
    assert legend == {"a": f"background:{report.INKS[0]}", "b": f"background:{report.INKS[1]}"}
    reward, loss = page.all("svg")
    inks = [line["stroke"] for line in page.all("polyline") if reward in line["within"]
            and line["points"]]
    assert (reward["aria-label"], loss["aria-label"], inks) == ("reward", "loss", [report.INKS[1]])


# -------------------------------------------------------------------------------------- judged rows
def test_the_page_holds_text_as_text():
    """What data says appears as text, no tag or attribute comes from it, and nothing is fetched.
    kills: a field left unescaped; failures last."""
    picture("red").save("i.png")
    rows = [text_row(n, id=f"{n}{evil}", task="image_understanding", prompt=evil, media=["i.png"],
                     responses=[evil, "fine"]) for n, evil in enumerate(EVIL)]
    rows.append(text_row(9, id="<flip>"))
    preds = [{"id": r["id"], "pred": "A" if n else "B", "text": evil}
             for n, (r, evil) in enumerate(zip(rows, EVIL, strict=False))]
    preds += [{"id": "<flip>", "order": o, "pred": p, "text": "t"} for o, p in ("AA", "BB")]
    preds[-2]["order"], preds[-1]["order"] = "AB", "BA"
    groups = [group(1, [1.0] * 6, id=evil, label=evil, prompt=evil, answers=EVIL,
                    tokens=[[evil]] * 6, logp_sampled=[[0.0]] * 6, logp_after=[[0.1]] * 6,
                    rewards={evil: [1.0] * 6}) for evil in EVIL[:2]]
    page = judged(rows, preds, "--runs", run_folder("runs/<x>", groups))
    assert {element["tag"] for element in page.tags} <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "table", "tr", "th",
        "td", "p", "pre", "div", "b", "svg", "details", "summary", "img", "text", "polyline",
        "path", "circle", "span", "br"}
    values = [(name, value) for element in page.tags for name, value in element.items()
              if name not in ("tag", "text", "within")]
    assert not [v for v in values if v[0].startswith("on") or "javascript" in str(v[1])]
    assert all(v.startswith("data:image/") for k, v in values if k in ("src", "href"))
    styles = {re.sub(r"[\d.]+%?$|#[0-9a-f]+$", "", v) for k, v in values if k == "style"}
    assert styles == {"--shade:", "--share:", "background:"}
    policy, = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert "default-src 'none'" in policy and "script" not in policy
    viewport, = [meta["content"] for meta in page.all("meta") if meta.get("name") == "viewport"]
    assert "width=device-width" in viewport  # or a phone shows a desk's page, small
    for n, evil in enumerate(EVIL):  # row: id, prompt, response, answer; group: 6 and more
        assert page.text.count(evil) >= (10 if n < 2 else 4), evil
    assert len(page.all("img")) == len(EVIL)
    kinds = [details["class"] for details in page.all("details", "row")]
    assert kinds == ["row flat", "row down"] + ["row up"] * 5


def test_the_figures_of_a_judge_are_short_and_named():
    # 7 of 9 right: 0.7777777777777778. kills: figures with 16 digits, a table row without a name
    rows = [text_row(n) for n in range(9)]
    preds = [{"id": f"r{n}", "pred": "AB"[n > 6], "order": order, "sample": k, "text": "t"}
             for n in range(9) for order in ("AB", "BA") for k in range(3)]
    page = judged(rows, preds, "--json")
    assert not re.search(r"\d\.\d{4,}", page.text)
    named = {th["text"]: [td["text"] for td in page.all("td") if th["within"][-1] in td["within"]]
             for th in page.all("th")}
    assert named["overall"] == ["77.8", "9"] and named["text"] == ["77.8", "9"]
    assert all(named.pop(head) == [] for head in ("", "accuracy, %", "rows"))
    assert all(len(cells) == 2 for cells in named.values())
    assert "interval of the accuracy 45.3 to 93.7 %" in page.text  # Wilson's, of 7 of 9
    texts = [element["text"] for element in page.all("text")]
    assert {"vote@k", "any@k"} <= set(texts) and max(map(len, texts)) < 50


def test_answers_are_folded_one_by_one():
    # kills: both orders' answers in full before the next row
    preds = [{"id": "r0", "pred": p, "order": o, "text": f"the {o} answer"}
             for o, p in (("AB", "A"), ("BA", "B"))]
    page = judged([text_row(0)], preds)
    row, first, second = page.all("details")
    for answer, order in ((first, "AB"), (second, "BA")):
        assert row in answer["within"] and "open" not in answer
        assert f"the {order} answer" in answer["text"]
        assert answer["text"].count("answer") == 1
    assert row["text"].startswith("flip: r0 (row 0), better is A; "
                                  "said 1× A in order AB; 1× B in order BA: 0.5 points")


@pytest.mark.parametrize("size, shown", [((32, 32), (160, 160)), ((40, 30), (160, 120)),
                                         ((7, 200), (7, 200)), ((1000, 500), (360, 180))])
def test_a_tiny_picture_is_drawn_large_and_exactly(size, shown):
    # In the toy world the medium is 32 pixels wide, and what it shows is the whole point.
    # kills: thumbnails as large as a word; JPEG's blocks, five times as large
    draw = random.Random(0)
    image = Image.frombytes("RGB", size, draw.randbytes(3 * size[0] * size[1]))
    tag, = Page(report.picture(image.copy())).tags
    assert (int(tag["width"]), int(tag["height"])) == shown
    kind, _, data = tag["src"].partition(";base64,")
    inside = Image.open(io.BytesIO(base64.b64decode(data)))
    if max(size) < 160:
        assert tag["class"] == "tiny" and inside.tobytes() == image.tobytes()
    else:
        assert kind == "data:image/jpeg" and max(inside.size) <= 360


# ------------------------------------------------------------------------------------- command line
def test_the_command_leaves_out_what_is_no_run(capsys):
    # runs/* also names the page of the last time. kills: a page that refuses its own folder
    run_folder("runs/a", [group(1, [1.0, -1.0])])
    write("runs/report.html", ["old"])
    run_there([ROOT / "report.py", Path("runs/a").resolve(), Path("runs/report.html").resolve(),
               "--out", Path("runs/report.html").resolve()])
    page = Page(Path("runs/report.html").read_text())
    assert page.all("h3")[0]["text"] == "Step 1" and len(page.all("svg")) == 2  # reward, grad_norm
    with pytest.raises(SystemExit, match="none of these is a run folder"):
        run_here(report.main, ["runs/report.html"])
    assert "runs/report.html: no run folder, left out" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="nowhere/p.html: cannot be written"):
        run_here(report.main, ["runs/a", "--out", "nowhere/p.html"])


# ------------------------------------------------------------------------------------ in a browser
BROWSERS = "chromium", "chromium-browser", "google-chrome"
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), "")

# Puts the page into a frame as wide as the screen, opens all that is folded, and measures.
LOOK = """<!DOCTYPE html><body><iframe width="%d" height="900" srcdoc="%s"></iframe><script>
function luminance(colour) {
  const [r, g, b] = colour.match(/[\\d.]+/g).map(Number)
  return 0.2126 * r + 0.7152 * g + 0.0722 * b
}
function meet(a, b) {
  return a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 &&
    b.top < a.bottom - 1
}
onload = () => {
  const page = document.querySelector("iframe").contentDocument
  const all = name => [...page.querySelectorAll(name)]
  const box = element => element.getBoundingClientRect()
  const top = name => Math.min(...all(name).map(element => box(element).top))
  all("details").forEach(element => element.open = true)
  const colours = page.defaultView.getComputedStyle(page.body)
  const found = {title: page.title, details: all("details").length,
    width: page.documentElement.clientWidth, needs: page.documentElement.scrollWidth,
    paper: luminance(colours.backgroundColor), ink: luminance(colours.color),
    cards: top(".card"), tables: top("table"), charts: top("svg"), rows: top(".row"),
    columns: new Set(all(".two:not(.pair) > div").map(element => box(element).left)).size,
    tiny: all(".tiny").map(element => box(element).width), over: []}
  for (const chart of all("svg")) {
    const texts = [...chart.querySelectorAll("text")]
    texts.forEach((one, n) => texts.slice(n + 1).filter(two => meet(box(one), box(two)))
      .forEach(two => found.over.push(one.textContent + " and " + two.textContent)))
    for (const line of chart.querySelectorAll("polyline"))
      texts.filter(one => line.getAttribute("points") && meet(box(one), box(line)))
        .forEach(one => found.over.push(one.textContent + " over a curve"))
  }
  document.body.textContent = JSON.stringify(found)
}
</script></body>"""


def looked_at(source, width, dark):
    Path("look.html").write_text(LOOK % (width, html.escape(source)), "utf-8")
    dom = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--window-size=1400,1000",
         "--dump-dom", Path("look.html").resolve().as_uri()],
        capture_output=True, text=True, timeout=120).stdout
    body = dom.partition("<body>")[2].partition("</body>")[0]
    return json.loads(html.unescape(body))


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
@pytest.mark.parametrize("width, dark", [(1200, False), (1200, True), (360, False), (360, True)])
def test_the_page_in_a_browser(width, dark):
    """Light and dark, a desk and a phone, with everything unfolded: no sideways scrolling, the
    groups first, no text over a curve or another. A script that ran would have changed the title; a
    row that was swallowed would be missing. kills: words that do not break; columns of a fixed
    width, or pictures; ink that stays black on a dark page; a legend in the plot."""
    evil = "<script>document.title='ran'</script><img src=x onerror=\"document.title='ran'\">"
    picture("red", (32, 32)).save("i.png")
    picture("blue", (1000, 90)).save("wide.png")
    row = text_row(0, task="image_understanding", prompt=evil + LONG, media=["i.png"],
                   responses=[evil, LONG], category=LONG)
    preds = [{"id": "r0", "pred": "AB"[k % 2], "order": o, "sample": k, "text": evil + LONG}
             for o in ("AB", "BA") for k in range(3)]
    groups = [group(step, [1.0, 0.0, -1.0], id=LONG, prompt=LONG + " <image>",
                    media=["i.png", "wide.png"],
                    tokens=[[evil, LONG, " so", " it is"]] * 3) for step in (1, 11)]
    name = run_folder("runs/" + LONG[:200], groups)
    judged([row], preds, "--runs", name, run_folder("runs/b", groups))
    seen = looked_at(Path("page.html").read_text(), width, dark)
    assert seen["title"].startswith("rows") and seen["details"] == 2 + 1 + 6
    assert seen["needs"] <= seen["width"] == width
    assert (seen["paper"] < 60 and seen["ink"] > 200) if dark else (
        seen["paper"] > 240 and seen["ink"] < 60)
    assert seen["cards"] < seen["tables"] < seen["charts"] < seen["rows"]
    assert seen["columns"] == (2 if width > 900 else 1)  # early beside late where there is room
    assert set(seen["tiny"]) == {160} and seen["over"] == []
