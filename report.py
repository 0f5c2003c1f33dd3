"""
One page to look at: what the answers to one prompt earned, how the runs went, what a judge said.

    python report.py runs/* --out runs/report.html                 # judges nothing
    python eval.py ... --report page.html --runs runs/*            # also tables and judged rows

The page opens with groups: one prompt and its G answers, each with its reward, its advantage, and
how the update changed the log-probability of each of its tokens; an early group beside a late one.

Everything that comes from data goes through esc(), there is no script, and the page forbids itself
any: text from data can never run, and nothing is fetched.
"""

import argparse
import base64
import html
import io
import math
import sys
from collections import Counter
from pathlib import Path

import common
from common import BadRow

STYLE = """
/* --up, --down, --flat: good and bad that people with any kind of colour vision tell apart */
:root { color-scheme: light dark;
  --paper: #fff; --ink: #1b1f24; --soft: #f2f4f6; --edge: #d3d8de; --quiet: #5b646e;
  --up: 0 158 115; --down: 222 80 20; --flat: 128 136 144 }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14171b; --ink: #e4e7eb; --soft: #1f242a; --edge: #3b434c; --quiet: #a0a9b3;
  --up: 20 170 125; --down: 226 96 40 } }
.up { --tint: var(--up) }
.down { --tint: var(--down) }
.flat { --tint: var(--flat) }

/* text: it may break anywhere, so that no word is wider than a phone */
* { box-sizing: border-box }
body { font: 15px/1.5 sans-serif; max-width: 84em; margin: 1.5em auto; padding: 0 1em;
  background: var(--paper); color: var(--ink); overflow-wrap: anywhere }
h1 { font-size: 1.4em }
h2 { font-size: 1.2em; margin: 1.6em 0 .4em }
h3 { font-size: 1em; margin: 0 }
p { margin: .5em 0 }
pre { font-size: 13px; white-space: pre-wrap; background: var(--soft); padding: .6em;
  margin: .4em 0 }
summary { cursor: pointer; padding: .2em 0 }
.quiet { color: var(--quiet) }

/* groups */
.two { display: grid; gap: 1.5em;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 27em), 1fr)) }
.two > * { min-width: 0 }
.prompt { display: flex; flex-direction: column-reverse; max-height: 15em; overflow: auto }
.cards { display: grid; gap: .7em; margin-top: .7em; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 17em), 1fr)) }
.card { border: 1px solid var(--edge); border-left: 6px solid rgb(var(--tint)); min-width: 0 }
.card > p { background: rgb(var(--tint) / .16); margin: 0; padding: .3em .7em }
.card > p > b { font-size: 1.15em; margin-right: .6em }
.card .part { display: inline-block }
.part { margin-right: .8em }
.text { font-size: 13px; line-height: 1.4; white-space: pre-wrap; padding: .4em .7em }
.text span, .swatch { background: rgb(var(--tint) / calc(.6 * var(--shade))) }
.swatch { padding: 0 .3em; white-space: nowrap; --shade: 1 }

/* charts and tables */
svg { max-width: 100%; height: auto }
.charts { display: flex; flex-wrap: wrap; gap: 1em }
.key { display: inline-block; width: 1.6em; height: .25em; margin-right: .4em;
  vertical-align: middle }
table { border-collapse: collapse }
th, td { border-bottom: 1px solid var(--edge); padding: .15em .8em .15em .2em; text-align: right;
  font-weight: normal }
th:first-child { text-align: left }
.bar { background: linear-gradient(90deg, rgb(var(--up) / .3) var(--share), transparent 0);
  min-width: 7em; white-space: nowrap }

/* judged rows and pictures */
.row { border-left: 6px solid rgb(var(--tint)); padding: .1em .7em; margin: .4em 0 }
.pair { gap: 1em; grid-template-columns: repeat(auto-fit, minmax(min(100%, 12em), 1fr)) }
.strip { display: flex; flex-wrap: wrap; gap: .4em; margin: .4em 0 }
img { max-width: 100%; height: auto }
.tiny { image-rendering: pixelated }
"""


def esc(value):
    """-> its text, safe inside HTML and inside a quoted attribute"""
    return html.escape(str(value), quote=True)


def write_page(path, title, sections):
    head = ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f"<title>{esc(title)}</title>\n"
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
            f"<style>{STYLE}</style></head>\n<body><h1>{esc(title)}</h1>\n")
    page = head + "\n".join(sections) + "\n</body></html>\n"
    Path(path).write_text(page, "utf-8", errors="replace")


# ==================================================================================================
# 1. Groups: lines of rollouts.jsonl, which stages 1-3 write now and then. Runs of older versions
# have no "tokens", "logp_sampled", "logp_after", "media" and "reward" there.

LEGEND = """<p>One prompt, and the answers that were sampled for it. A card has the colour of the
answer's advantage, its reward against those of the others:
<span class="swatch up">above 0</span> <span class="swatch down">below 0</span>
<span class="swatch flat">0</span>. A token has the colour of what the step did to its
log-probability: <span class="swatch up">rose</span> <span class="swatch down">fell</span></p>
"""


def groups_section(folders):
    """An early and a late group of each run that logged any; the first run's is open."""
    section, opened = "", " open"
    for folder in folders:
        groups = common.whole_lines(Path(folder, "rollouts.jsonl"))
        if groups:
            section += (f"<details{opened}><summary><b>{esc(folder)}</b></summary>"
                        f"{two_groups(groups, rounding(folder))}</details>\n")
            opened = ""
    return f"<h2>What the answers earned</h2>\n{LEGEND}{section}" if section else ""


def rounding(folder):
    """By how much a run's sampler and its update differ in a token's log-probability where nothing
    was trained in between: the mean, in nats. None where the log does not say."""
    name = "sampling/sampling_logp_difference/mean"
    steps = common.whole_lines(Path(folder, "metrics.jsonl"))
    noise = [step[name] for step in steps if name in step]
    return sum(noise) / len(noise) if noise else None


def two_groups(groups, noise):
    """The first and the last group with an advantage that is not 0, side by side."""
    uneven = [group for group in groups if any(group["advantages"])]
    note = f"The first and the last of {len(uneven)} logged groups with advantages other than 0"
    if len(uneven) == 1:
        note = f"The only one of {len(groups)} logged groups with advantages other than 0"
    if not uneven:
        uneven = groups
        note = "No logged group has an advantage other than 0; the first and the last of them"
    shown = uneven[:1] + uneven[1:][-1:]
    full = full_shade(shown)
    if "tokens" in shown[-1]:
        note += (f". Tokens: log-probability after the step minus when sampled, full colour from "
                 f"{full:.2g} nats on, numbers under the pointer. The step trained on other "
                 "prompts too, so what happens in a group is not its own doing alone")
        if noise is not None:
            note += f"; rounding alone makes {noise:.1g} nats"
    else:
        note += ". This run's log has no log-probabilities of tokens"
    columns = [group_column(group, full) for group in shown]
    return f'<p class="quiet">{note}.</p><div class="two">{"".join(columns)}</div>'


def full_shade(groups):
    """The change with the full colour: 98 % of the groups' tokens change less. 0 without any"""
    sizes = []
    for group in groups:
        pairs = zip(group.get("logp_sampled", ()), group.get("logp_after", ()), strict=True)
        for sampled, after in pairs:
            sizes += [abs(b - a) for a, b in zip(sampled, after, strict=True)]
    sizes = sorted(filter(math.isfinite, sizes))
    return sizes[int(0.98 * len(sizes))] if sizes else 0.0


def group_column(group, full):
    """One group: its prompt, scrolled to the end where the row stands, and a card for each answer,
    best first."""
    column = (f'<div><h3>Step {esc(group["step"])}</h3><p class="quiet">{esc(group["id"])}; the '
              f'better response is {esc(group["label"])}</p>'
              f'<pre class="prompt" tabindex="0"><span>{esc(group["prompt"])}</span></pre>')
    if "<image>" in group["prompt"] or "<video>" in group["prompt"]:  # else it reads captions
        column += pictures(group.get("media", ()), "<video>" in group["prompt"])
    best_first = sorted(range(len(group["answers"])), key=group["advantages"].__getitem__,
                        reverse=True)
    cards = [answer_card(group, g, full) for g in best_first]
    return f'{column}<div class="cards">{"".join(cards)}</div></div>'


def sign(number):
    """-> the class of its colour"""
    if number > 0:
        return "up"
    return "down" if number < 0 else "flat"  # also of nan


def signed(number):
    return f"{number:+.2f}" if number else "0"


def answer_card(group, g, full):
    """Answer g of a group: advantage, parts of the reward, total, text."""
    advantage = group["advantages"][g]
    card = f'<div class="card {sign(advantage)}"><p><b>{signed(advantage)}</b>'
    for name, values in group["rewards"].items():
        card += f'<span class="part">{esc(name)} {values[g]:.3g}</span>'
    if "reward" in group:
        card += f'<span class="part">total <b>{group["reward"][g]:.3g}</b></span>'
    card += f'<span class="part quiet">answer {g + 1}</span>'
    if not group["kept"][g]:
        card += '<br><span class="quiet">left out by the filter: it trains nothing</span>'
    card += '</p><div class="text">'
    if "tokens" not in group:
        return f'{card}{esc(group["answers"][g])}</div></div>'
    sampled, after = group["logp_sampled"][g], group["logp_after"][g]
    for token, a, b in zip(group["tokens"][g], sampled, after, strict=True):
        shade = min(1.0, abs(b - a) / full) if full else 0.0
        card += (f'<span class="{sign(b - a)}" style="--shade:{shade:.2f}" '
                 f'title="{a:.3f} to {b:.3f}: {b - a:+.3f}">{esc(token)}</span>')
    return card + "</div></div>\n"


# ==================================================================================================
# 2. Charts. Inks and greys are seen on white and on black alike, so a picture needs no background.

INKS = ("#2f7fd0", "#d55e00", "#009e73", "#b0609a", "#a07b00", "#7a6ff0", "#c8506a", "#5f8a8a")
GREY = "#7a7f85"
CURVES = ("reward", "rewards/accuracy/mean", "eval_accuracy", "loss", "kl", "entropy", "share_a",
          "completions/mean_length", "grad_norm")


def line_chart(title, lines, width=340, height=200, legend=True):
    """{name: [(x, y)]} -> a picture, SVG as a file or inside a page, "" without a finite point.
    width, height: pixels of title, plot and axes; the legend comes below, a line for each name."""
    finite = {}
    for name, line in lines.items():
        finite[name] = [(x, y) for x, y in line if isinstance(y, (int, float)) and math.isfinite(y)]
    if not any(finite.values()):
        return ""
    xs, ys = zip(*sum(finite.values(), []), strict=True)
    left, right, top, bottom = 56, width - 14, 26, height - 24  # of the plot, in pixels
    x_low, x_high = widened(min(xs), max(xs))
    y_ticks = ticks(*widened(min(ys), max(ys)))
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def x_pixel(x):
        return left + (x - x_low) / (x_high - x_low) * (right - left)

    def y_pixel(y):
        return bottom - (y - y_low) / (y_high - y_low) * (bottom - top)

    svg = label(left, 15, title, size=13)
    for tick in y_ticks:
        y = y_pixel(tick)
        svg += f'<path d="M{left} {y:.1f}H{right}" stroke="{GREY}" stroke-opacity=".35"/>'
        svg += label(left - 6, y + 4, f"{tick:g}", "end")
    for tick in ticks(x_low, x_high):
        if x_low <= tick <= x_high:
            svg += label(x_pixel(tick), bottom + 16, f"{tick:g}", "middle")
    for n, line in enumerate(finite.values()):
        svg += curve([(x_pixel(x), y_pixel(y)) for x, y in line], INKS[n % len(INKS)])
    if legend:
        for n, name in enumerate(finite):
            y = height + 4 + 17 * n
            svg += f'<path d="M{left} {y}h18" stroke="{INKS[n % len(INKS)]}" stroke-width="3"/>'
            svg += label(left + 25, y + 4, shortened(name, (right - left - 25) // 7))
        height += 17 * len(finite)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" role="img" aria-label="{esc(title)}" '
            f'font-family="sans-serif">{svg}</svg>')


def label(x, y, text, anchor="start", size=11):
    return (f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" '
            f'fill="{GREY}">{esc(text)}</text>')


def curve(points, ink):
    """Points in pixels -> a line; few of them are marked, so that one alone is seen too."""
    path = " ".join([f"{x:.1f},{y:.1f}" for x, y in points])
    svg = f'<polyline points="{path}" fill="none" stroke="{ink}" stroke-width="1.5"/>'
    if len(points) <= 16:
        for x, y in points:
            svg += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{ink}"/>'
    return svg


def shortened(name, n):
    """Names of runs differ at the end."""
    return name if len(name) <= n else "…" + name[1 - n:]


def widened(low, high):
    """A range that has a width: a constant gets one around it."""
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    margin = abs(high) / 10 or 1.0
    return low - margin, high + margin


def ticks(low, high, about=5):
    """About `about` multiples of 1, 2 or 5 times a power of ten, from just below low to just above
    high, so that their names are short"""
    step = 10.0 ** math.floor(math.log10((high - low) / about))
    for factor in (1, 2, 5, 10):
        if (high - low) / (factor * step) <= about:
            break
    step *= factor
    numbers = range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)
    return [n * step for n in numbers]


def curves_section(folders):
    """One chart for each figure of metrics.jsonl, with one line for each run."""
    steps_of = {folder: common.whole_lines(Path(folder, "metrics.jsonl")) for folder in folders}
    charts = ""
    for figure in CURVES:
        lines = {}
        for folder, steps in steps_of.items():
            lines[folder] = [(step["step"], step[figure]) for step in steps if figure in step]
        charts += line_chart(figure, lines, legend=False)
    if not charts:
        return ""
    legend = ""
    for n, folder in enumerate(steps_of):
        legend += (f'<span class="part"><span class="key" style="background:{INKS[n % len(INKS)]}">'
                   f"</span>{esc(folder)}</span> ")
    return (f'<h2>Learning curves, against the step</h2><p>{legend}</p>'
            f'<div class="charts">{charts}</div>')


# ==================================================================================================
# 3. What eval.py adds: results, and judged rows with their media.

def result_section(name, result, columns):
    """The columns [(name, per cent, n)] of a benchmark, other figures, the curves of the votes"""
    table = '<tr class="quiet"><th></th><th>accuracy, %</th><th>rows</th></tr>'
    for column, accuracy, n in columns:
        table += (f'<tr><th>{esc(column)}</th><td class="bar" style="--share:{accuracy}%">'
                  f"{accuracy}</td><td>{n}</td></tr>")
    low, high = result["interval"]
    figures = [f"95 % interval of the accuracy {100 * low:.1f} to {100 * high:.1f} %"]
    for key, words in (("order_flips", "verdict flips with the order"),
                       ("share_a", "says the first shown is better"), ("unparsable", "unparsable"),
                       ("soft", "soft votes")):
        if key in result:
            figures.append(f"{words} {100 * result[key]:.1f} %")
    if result["missing"]:
        figures.append(f"{result['missing']} rows without a prediction, counted as wrong")
    curves = {}
    for curve_name in ("vote", "any"):
        shares = result.get(curve_name, {})
        curves[f"{curve_name}@k"] = [(int(k), share) for k, share in shares.items()]
    return (f"<h2>{esc(name)}</h2><table>{table}</table><p>{'; '.join(figures)}.</p>"
            f"{line_chart('accuracy against the number k of votes', curves)}")


def rows_section(scored, most):
    """Scored rows with a label, flips first, then what was wrong; at most `most` of them."""
    labelled = [row for row in scored if row["label"]]
    labelled.sort(key=lambda row: (not row["flip"], row["points"]))
    shown = labelled[:most]
    section = (f"<h2>Rows: flips and failures first, {len(shown)} of {len(labelled)}</h2>"
               '<p class="quiet">Verdicts are about the row as it stands here. In order BA the '
               "judge saw B first, so what its text calls A is B here.</p>\n")
    for row in shown:
        section += folded_row(row)
    return section


def folded_row(row):
    """A scored row: what was asked, both candidates, and every answer, each folded."""
    preds = sum(row["orders"].values(), [])
    kind, colour = "wrong", "down"
    if row["points"] == 1:
        kind, colour = "right", "up"
    if row["flip"]:
        kind, colour = "flip", "flat"
    place = ", ".join([f"{key} {row[key]}" for key in ("row", "i", "j") if key in row])
    said = []
    for order, answers in row["orders"].items():
        counts = Counter([str(pred["pred"]) for pred in answers])
        verdicts = [f"{n}× {verdict}" for verdict, n in counts.most_common()]
        said.append(f"{', '.join(verdicts)} in order {order}")
    said = "; ".join(said) or "nothing"
    page = (f'<details class="row {colour}"><summary><b>{kind}</b>: {esc(row["id"])} '
            f'({esc(place)}), better is {esc(row["label"])}; said {esc(said)}: '
            f'{row["points"]:.2g} points</summary><pre>{esc(row["prompt"])}</pre>')
    video = row["task"].startswith("video")
    if row["responses"]:
        page += pictures(row["media"], video)
        candidates = [f"<pre>{esc(response)}</pre>" for response in row["responses"]]
    else:  # the media are the candidates
        candidates = [pictures([path], video) for path in row["media"]]
    page += '<div class="two pair">'
    for side, candidate in zip("AB", candidates, strict=False):  # one may be missing
        page += f"<div><b>{side}</b>{candidate}</div>"
    page += "</div>"
    for pred in preds:
        page += (f"<details><summary>order {esc(pred['order'])}, sample {esc(pred['sample'])}: "
                 f"<b>{esc(pred['pred'])}</b></summary><pre>{esc(pred.get('text') or '')}</pre>"
                 "</details>")
    return page + "</details>\n"


def pictures(paths, video):
    """Images, or four frames of each video, inside the page"""
    tags = ""
    for path in paths:
        try:
            images = common.open_video(path, 4) if video else [common.open_image(path)]
        except BadRow as e:
            tags += f"<p>[{esc(e)}]</p>"
            continue
        for image in images:
            tags += picture(image)
    return f'<div class="strip">{tags}</div>'


def picture(image):
    """A PIL image -> its tag. Larger ones become small JPEGs; tiny ones, as those of the toy world,
    are drawn at 160 pixels or a little more, each pixel a square."""
    image.thumbnail((360, 360))
    scale = math.ceil(160 / max(image.size))
    kind, classes = ("PNG", "tiny") if scale > 1 else ("JPEG", "photo")
    file = io.BytesIO()
    image.convert("RGB").save(file, kind, quality=80)
    data = base64.b64encode(file.getvalue()).decode()
    width, height = scale * image.width, scale * image.height
    return (f'<img alt="" class="{classes}" width="{width}" height="{height}" '
            f'src="data:image/{kind.lower()};base64,{data}">')


# ==================================================================================================
# 4. Command line

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--out", default="runs/report.html", help="the page")
    args = parser.parse_args()
    folders = []
    for folder in args.runs:
        if Path(folder, "metrics.jsonl").is_file():
            folders.append(folder)
        else:
            print(f"{folder}: no run folder, left out", file=sys.stderr)
    if not folders:
        raise SystemExit("none of these is a run folder, with a metrics.jsonl in it.")
    if not Path(args.out).parent.is_dir():
        raise SystemExit(f"{args.out}: cannot be written; make the folder or choose another --out.")
    write_page(args.out, "Runs", [groups_section(folders), curves_section(folders)])
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
