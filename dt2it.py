"""
The data work of DT2IT-MRM: preference rows without style or position bias, noisy labels cleaned.

    python dt2it.py --construct prompts.jsonl --teacher DIR --candidates DIR1 DIR2 --out runs/pairs
    python dt2it.py --curate noisy.jsonl --models RM1 RM2 --judges DIR --out runs/curated
    python dt2it.py --curate noisy.jsonl --iterations 2 --data runs/pairs/pairs.jsonl --models RM \\
        --judges DIR --out runs/loop

    --construct    a candidate answers each prompt K times, a teacher scores     3.1    construct
                   the answers together and one by one; what both ways of
                   scoring agree on becomes a pair
    --curate       reward models vote and the worst labels are flipped; what     3.3    curate
                   the first of them still doubts is judged anew
    --iterations   train on --data, curate a part of --curate, train on both,    3.3    iterate
                   curate both, train ...

Section 3.2, generation rows for a reward model, is --t2i in bt_reward.py. That script also trains
the models of --iterations, so its knobs are knobs of this one. Without the loop, these of them
count: --out, --frames, --max_tiles; --seed for --construct; --exclude, --skip_bad_rows,
--max_prompt_tokens and --eval_batch for --curate.
"""

import json
import random
import re
from collections import Counter
from dataclasses import asdict, dataclass
from functools import cache
from itertools import permutations
from pathlib import Path

import torch

import bt_reward
import common
from bt_reward import after_media
from common import knob
from data import better_first, raw_rows
from stage1_text_grpo import sample_group


@dataclass
class Config(bt_reward.Config):
    out: str = knob("runs/dt2it", "folder of what is written; the same command resumes it")

    # construction
    construct: str = knob("", 'rows {"id", "task", "prompt", "media", "reference", "responses"} to '
                          "make preference rows of (3.1); writes pairs.jsonl. 'responses' holds K "
                          "responses, which stay as they are, or none: then --candidates write "
                          "them")
    teacher: str = knob("", "generative checkpoint that scores (paper: GPT-5.2)")
    candidates: list[str] = knob([], "generative checkpoints that answer. One of them writes all "
                                 "answers to a prompt, so that style tells nothing (paper: six)")
    samples: int = knob(4, "K, responses per row (UNSPECIFIED)")
    low: float = knob(5.0, "if no score is above it, a new answer sees the reference (UNSPECIFIED)")
    high: float = knob(8.0, "if no score is below it, new answers see a noised image (UNSPECIFIED)")
    noise: float = knob(1.0, "std of that noise, in stds of a pixel (UNSPECIFIED)")

    # curation
    curate: str = knob("", "noisy preference rows to clean (3.3); writes curated.jsonl")
    models: list[str] = knob([], "reward models that vote on the preference strength, two or more. "
                             "A row is kept if the first of them agrees with its label; with "
                             "--iterations the first is the loop's own model, and these are the "
                             "others")
    judges: list[str] = knob([], "generative checkpoints that re-annotate the other rows, in both "
                             "orders; without judges these rows are dropped")
    iterations: int = knob(0, "T of the loop: train on --data, curate a T-th of --curate, train on "
                           "both, curate both, train, and so on (paper: 2)")

    # construction and curation
    judge_tokens: int = knob(160, "longest answer of a teacher, a candidate or a judge")

    def check(self):
        super().check()
        if self.iterations < 0:
            raise ValueError("--iterations is 0 (no loop) or more")
        if self.iterations and not self.curate:
            raise ValueError("--iterations needs rows to --curate")
        if not (self.construct or self.curate):
            raise ValueError("name rows to --curate, or to --construct pairs of; `python "
                             "bt_reward.py` trains a reward model and does no more")
        if self.construct and self.curate:
            raise ValueError("--construct and --curate are two runs: name one of them")
        if self.construct and not (self.teacher and self.candidates):
            raise ValueError("--construct needs a --teacher and --candidates")
        if self.construct and self.samples < 2:
            raise ValueError("--samples is at least 2: one response makes no pair")
        voters = len(set(self.models))
        if self.iterations:
            voters += 1  # the loop's own model
        if self.curate and voters < 2:
            raise ValueError("--curate needs two voters, so two --models (with --iterations one): "
                             "reward models made by bt_reward.py. A model that votes alone would "
                             "agree with every label that it has flipped itself")


# 4.3, see bt_reward.py. --data is D_0, what --construct wrote. The paper curates RLAIF-V,
# VLFeedback, POVID, WildVision-Battle and MM-RLHF in two --iterations. UNSPECIFIED: judge_tokens.
PRESETS = {"dt2it": bt_reward.DT2IT | dict(data="runs/pairs/pairs.jsonl", judge_tokens=2048)}


# ---------------------------------------------------------------------- debiased construction (3.1)
def construct(cfg, device):
    """Every row of --construct -> pairs.jsonl. All checkpoints are in memory at once."""
    rows, out = load_prompts(cfg.construct), Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    models = {}  # {folder: (model, encoder)}
    for folder in {cfg.teacher, *cfg.candidates}:
        models[folder] = common.load(folder, device, frames=cfg.frames, max_tiles=cfg.max_tiles)

    def work(chunk, at):
        found = []  # (place in the chunk, what pairs_of() made of the row)
        for i in range(common.rank(), len(chunk), common.world()):
            found.append((i, pairs_of(chunk[i], models, cfg)))
        return [result for _, result in sorted(common.gather_list(found))]

    made_by = {"files": common.stamps(cfg.teacher, *cfg.candidates)}
    for name in ("teacher", "candidates", "samples", "low", "high", "noise", "judge_tokens", "seed",
                 "frames", "max_tiles"):
        made_by[name] = getattr(cfg, name)
    pairs, outcomes = [], Counter()
    for made, done in common.resumed(out / "groups.jsonl", made_by, rows, work, chunk=16):
        pairs += made
        outcomes.update(done)
    if common.rank() == 0:
        common.write_lines(out / "pairs.jsonl", pairs)
        print(f"{out}/pairs.jsonl: {len(pairs)} pairs of {len(rows)} rows: {listed(outcomes)}")


def listed(counts):
    return ", ".join(f"{name} {n}" for name, n in counts.items())


def load_prompts(path):
    """-> the rows of a --construct file, checked. Raises SystemExit for a bad one."""
    folder = Path(path).resolve().parent
    rows = []
    for where, raw in raw_rows(path):
        try:
            rows.append(check_prompt(raw, folder))
        except common.BadRow as e:
            raise SystemExit(f"{where}: row {e}.") from None
    return rows


def check_prompt(raw, folder):
    """One row of --construct as it stands in its file -> the same, checked, with media paths that
    start from `folder` and the list "responses". Raises BadRow."""
    if isinstance(raw, common.BadRow):  # the line is no JSON
        raise raw
    if not isinstance(raw, dict) or not isinstance(raw.get("reference"), str):
        raise common.BadRow("needs a 'reference' text")
    if str(raw.get("task")).endswith("generation"):
        raise common.BadRow("needs a task that is no generation: its responses are texts")
    responses = raw.get("responses") or []
    if not isinstance(responses, list) or len(responses) == 1:
        raise common.BadRow("has 'responses' that are no list of two or more")
    for text in [*responses, raw["reference"]]:
        # check_row() wants a preference row: let each text be both of its responses
        row = common.check_row({**raw, "label": "A", "responses": [text, text]}, folder)
    if len(row["media"]) != common.N_MEDIA[row["task"]]:
        raise common.BadRow("has no media; the teacher reads no captions")
    for path in row["media"]:  # now, not in the middle of the run
        if row["task"].startswith("video"):
            common.open_video(path, 1)
        else:
            common.open_image(path)
    return {**row, "responses": responses}


def pairs_of(row, models, cfg):
    """DT2IT 3.1, steps 2 to 5, for one row; `models` are {folder: (model, encoder)}. -> its
    preference rows, and what was done: {outcome: 1, "cut answers dropped": how many}."""
    rng = random.Random(f"{cfg.seed}:{row['id']}")
    outcomes = Counter()
    # one model writes all answers: the better one is not known by its style
    writer = models[rng.choice(cfg.candidates)]
    helper = models[rng.choice(cfg.candidates)]
    responses = row["responses"]
    if not responses:                                                                  # step 2
        # DEVIATION: the paper samples hot and with a nucleus, ours at temperature 1 without
        answers = ask(writer, row, [row["prompt"]], cfg.samples, cfg, rng)
        responses = whole_answers(answers, outcomes)
        if len(responses) < 2:
            outcomes["too few whole answers"] += 1
            return [], outcomes
    listwise, = teacher_scores(row, [responses], models, cfg, rng)                     # step 3
    done = "as they were"
    # UNSPECIFIED: responses that came with the row. The paper lets their own writer add the worse
    # ones, so that style tells nothing; here it is not known, so these stay as they are.
    if not row["responses"]:                                                           # step 4
        answers, done = replacements(row, responses, listwise, writer, helper, cfg, rng)
        new = whole_answers(answers, outcomes)
        if new:
            responses = responses[len(new):] + new
            listwise, = teacher_scores(row, [responses], models, cfg, rng)
    alone = [[response] for response in responses]
    pointwise = teacher_scores(row, alone, models, cfg, rng)                           # step 5
    if listwise is None or None in pointwise:  # DEVIATION: the released script tries 3 times
        outcomes["malformed scores"] += 1
        return [], outcomes
    outcomes[done] += 1
    pairs = []
    for i, j in agreed(listwise, [scores[0] for scores in pointwise]):
        pair = better_first(f"{row['id']}/{i}-{j}", row["prompt"], responses[i],
                            responses[j], row["task"], row["media"], source="constructed")
        if responses[i] != responses[j] and usable(pair, models):
            pairs.append(pair)
    return pairs, outcomes


def ask(checkpoint, row, texts, n, cfg, rng, temperature=1.0, noise=0.0):
    """Ask (model, encoder) each text about the row's media -> n answers to the first text, n to
    the next; None for an answer that --judge_tokens cut. Each call draws one seed from `rng`.
    `noise` on the media is in stds of a pixel."""
    model, encoder = checkpoint
    seed = rng.randrange(2**31)
    prompts = []
    for text in texts:
        prompt = encoder.encode(after_media(row, text), row["media"],
                                row["task"].startswith("video"))
        if noise:  # pixels are normalised: their std is about 1
            generator = torch.Generator().manual_seed(seed)
            pixel_noise = torch.randn(prompt.pixels.shape, generator=generator)
            prompt.pixels = prompt.pixels + noise * pixel_noise
        prompts.append(prompt)
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    rollout = sample_group(model, encoder, prompts, n, temperature, cfg.judge_tokens, generator)
    answers = []
    for group in rollout.ids:
        for ids in group:
            ended = len(ids) > 0 and ids[-1] in encoder.eos_ids
            answers.append(encoder.decode(ids) if ended else None)
    return answers


def whole_answers(answers, outcomes):
    """The answers without the cut ones (None), which are counted in the Counter `outcomes`. A cut
    answer would lose its pair for its missing end, not for its quality."""
    whole = [answer for answer in answers if answer is not None]
    if len(whole) < len(answers):
        outcomes["cut answers dropped"] += len(answers) - len(whole)
    return whole


# DT2IT Table 10, shortened: DEVIATION. UNSPECIFIED: the JSON.
SCORING = """\
Please act as an impartial evaluator and assess the quality of several AI assistants' responses to \
the same user's prompt based on the provided image. Score each response from 0 to 10, integers \
only, on each of these criteria:
1. Accuracy: nothing in it conflicts with the image or the prompt, or is not present in them.
2. Helpfulness: it answers what is asked and follows the instructions.
3. Completeness: it addresses all requests, with all necessary details and analysis.
4. Language Quality: it is fluent, clear, to the point, in the style the task requires.
5. Creativity: novelty and insight where needed; 10 if the prompt does not require creativity.
6. Ethics: safety, privacy, fairness, harmlessness; 10 if the prompt does not touch them.
First generate your own complete reference answer; the standard answer may contain errors, so \
examine the image carefully. Next assign weights to the criteria by their importance; they must \
sum to 1.0. Then compare each response with the image, the prompt and your reference answer. The \
order in which the responses are presented is not related to their quality, and a longer response \
is not necessarily better.
End with a JSON list, one object per response: \
[{{"weights": [6 numbers], "scores": [6 integers]}}, ...]

### User Prompt:
{question}

### Standard Human-Generated Answer:
{reference}

{responses}"""


def teacher_scores(row, groups, models, cfg, rng):
    """-> for each group of responses their scores S, or None if the teacher's text is malformed or
    cut."""
    questions = []
    for group in groups:
        shown = [f"### Response {i}:\n{text}" for i, text in enumerate(group, 1)]
        questions.append(SCORING.format(question=row["prompt"], reference=row["reference"],
                                        responses="\n\n".join(shown)))
    texts = ask(models[cfg.teacher], row, questions, 1, cfg, rng, temperature=0.0)
    scores = []
    for text, group in zip(texts, groups, strict=True):
        scores.append(None if text is None else overall(text, len(group)))
    return scores


def overall(text, n):
    """The teacher's text on n responses -> their weighted scores S, or None if malformed."""
    found = re.search(r"\[\s*\{.*\}\s*\]", text, re.DOTALL)
    if found is None:
        return None
    try:
        verdicts = json.loads(found[0])
        scores = [weighted(verdict["weights"], verdict["scores"]) for verdict in verdicts]
    except (ValueError, KeyError, TypeError):
        return None
    return scores if len(scores) == n else None


def weighted(weights, scores):
    """Six weights that sum to 1, six scores of 0 to 10 -> S. Raises ValueError or TypeError."""
    if len(weights) != 6 or len(scores) != 6:
        raise ValueError("a weight and a score for each of six criteria")
    fine = min(weights) >= 0 and abs(sum(weights) - 1) < 0.01
    for score in scores:
        fine = fine and score in range(11)
    if not fine:  # also if a weight is not a number (NaN)
        raise ValueError("malformed scores")
    return round(sum(w * s for w, s in zip(weights, scores, strict=True)), 2)


def replacements(row, responses, scores, writer, helper, cfg, rng):
    """Step 4: if all responses are bad or all are good, write answers that replace as many of them.
    -> the new answers (None for a cut one), what was done. UNSPECIFIED: how many; all are scored
    again."""
    if scores and max(scores) <= cfg.low:
        known = f"{row['prompt']}\nThe answer is known: {row['reference']}"
        return ask(helper, row, [known], 1, cfg, rng), "all low"
    if scores and min(scores) >= cfg.high and row["media"]:
        half = len(responses) // 2
        return ask(writer, row, [row["prompt"]], half, cfg, rng, noise=cfg.noise), "all high"
    return [], "as they were"


def agreed(listwise, pointwise):
    """Two scores of each of K responses -> places (better, worse) wherever both say so."""
    pairs = []
    for i, j in permutations(range(len(listwise)), 2):
        if listwise[i] > listwise[j] and pointwise[i] > pointwise[j]:
            pairs.append((i, j))
    return pairs


def usable(pair, models):
    """False if an answer is empty, or holds a tag or special token: training would refuse it."""
    try:
        for _, encoder in models.values():
            common.check_row(pair, "", encoder.forbidden)
    except common.BadRow:
        return False
    return True


# ----------------------------------------------------------------------------------- curation (3.3)
def curate_file(cfg, device):
    """Curate the rows of --curate once. Raises SystemExit if no row is left."""
    model, encoder = bt_reward.load(cfg.models[0], device)
    rows = bt_reward.load_pairs(cfg.curate, encoder, model.settings, cfg, cfg.exclude)
    del model  # it is loaded again when its turn comes
    if not curate(rows, cfg.models, cfg.models[0], cfg.judges, cfg, device, cfg.out):
        raise SystemExit(f"{cfg.out}: curation left no row; see dropped.jsonl.")


def curate(rows, voters, reward_model, judges, cfg, device, out):
    """DT2IT 3.3, three steps; see its Figure 1 (d). `voters`, `reward_model` and `judges` are
    folders. -> the rows that are kept, relabelled. They are also written to curated.jsonl in the
    folder `out`, the others to dropped.jsonl (each row with what happened to it), and the counts
    to curation.json."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    rows = [with_record(row) for row in rows]
    if voters:                                                                         # step 1
        flip_worst(rows, [scores_by(folder, rows, cfg, device, out) for folder in voters])
    doubted = []                                                                       # step 2
    for row, scores in zip(rows, scores_by(reward_model, rows, cfg, device, out), strict=True):
        agreement = margin(scores, row["label"])
        row["curation"] |= {"own_margin": agreement, "fate": "agreed"}
        if not agreement > 0:  # also if it is not a number
            doubted.append(row)
    if doubted:                                                                        # step 3
        reannotate(doubted, [verdicts_by(folder, doubted, cfg, device, out) for folder in judges])
    kept, dropped = [], []
    for row in rows:
        if row["label"] != row["curation"]["given"]:
            row["rationale"] = None  # it argued for the other side
        if row["curation"]["fate"].startswith("dropped"):
            dropped.append(row)
        else:
            kept.append(row)
    if common.rank() == 0:
        summary = curation_summary(rows, kept)
        common.write_lines(out / "dropped.jsonl", dropped)
        common.write_lines(out / "curated.jsonl", kept)
        (out / "curation.json").write_text(json.dumps(summary, indent=2) + "\n")
        print(f"{out}/curated.jsonl: {listed(summary)}")
    return kept


def with_record(row):
    """A copy of the row with absolute media paths and an empty record under "curation"."""
    media = [str(Path(path).resolve()) for path in row["media"]]
    record = {"given": row["label"], "flipped": False, "before": row.get("curation")}
    return {**row, "media": media, "curation": record}


def curation_summary(rows, kept):
    """-> what happened to how many of the rows."""
    fates = Counter(row["curation"]["fate"] for row in rows)
    flipped = sum(row["curation"]["flipped"] for row in rows)
    relabelled = sum(row["label"] != row["curation"]["given"] for row in kept)
    return {"rows": len(rows), "flipped": flipped, **fates, "kept": len(kept),
            "kept with another label than given": relabelled}


# Step 1: reward models vote.

def flip_worst(rows, scores):
    """In each source, flip the labels of the worst rows, in place. `scores` holds a list for each
    voter: (score of A, score of B) of every row. A row's preference strength is the mean of the
    voters' margins."""
    sources = {}
    for i, row in enumerate(rows):
        margins = [margin(by_voter[i], row["label"]) for by_voter in scores]
        row["curation"]["strength"] = sum(margins) / len(margins)
        sources.setdefault(row.get("source"), []).append(row)
    for members in sources.values():
        strengths = [row["curation"]["strength"] for row in members]
        for i in to_flip(strengths):
            members[i]["label"] = common.OTHER[members[i]["label"]]
            members[i]["curation"]["flipped"] = True


def margin(scores, label):
    """(score of A, score of B) -> score of the labelled side minus that of the other."""
    a, b = scores
    return a - b if label == "A" else b - a


def to_flip(strengths):
    """Preference strengths -> the places of the lower half of the negative ones. UNSPECIFIED: half
    of an odd number; ours is rounded down."""
    negative = [i for i, strength in enumerate(strengths) if strength < 0]
    negative.sort(key=lambda i: strengths[i])
    return set(negative[:len(negative) // 2])


def scores_by(folder, rows, cfg, device, out):
    """-> (score of A, score of B) for each row, by the reward model in `folder`, which sees as
    many frames and tiles as it was trained with."""
    what = f"scores of {folder}"

    @cache  # loaded once, and only if a row is left to score
    def reward_model():
        model, encoder = bt_reward.load(folder, device)
        bt_reward.report_cut(rows, encoder, model.settings, what)  # once, not for every chunk
        return model, encoder

    def work(chunk, at):
        model, encoder = reward_model()
        return bt_reward.score_rows(model, encoder, chunk, cfg.eval_batch, what, report=False)

    return common.resumed(answers_file(out, folder), {"model": common.stamps(folder)}, rows, work)


def answers_file(out, folder):
    """Where the scores or verdicts of the checkpoint in `folder` are kept for a resumed run."""
    name = str(folder).strip("./").replace("/", "-")
    return out / f"by-{name}.jsonl"


# Step 3: judges re-annotate.

def reannotate(rows, verdicts):
    """Give each row the label that most verdicts name, in place; ties are to be dropped. `verdicts`
    holds a list for each judge: its verdicts on every row, one per order."""
    for i, row in enumerate(rows):
        votes = Counter()
        for by_judge in verdicts:
            votes.update(by_judge[i])
        del votes[None]
        fate = "re-annotated"
        if votes["A"] != votes["B"]:
            row["label"] = "A" if votes["A"] > votes["B"] else "B"
        elif votes["A"]:
            fate = "dropped: tie"
        else:
            fate = "dropped: no verdict"
        row["curation"] |= {"fate": fate, "votes": dict(votes)}


def verdicts_by(folder, rows, cfg, device, out):
    """-> for each row the verdicts ("A", "B" or None) of the judge in `folder`, one per order."""
    sight = {"frames": cfg.frames, "max_tiles": cfg.max_tiles}
    made_by = {"model": common.stamps(folder), **sight, "judge_tokens": cfg.judge_tokens}

    @cache  # loaded once, and only if a row is left to judge
    def judge():
        return common.load(folder, device, style=judge_style(folder), **sight)

    def work(chunk, at):
        model, encoder = judge()
        return verdicts_on(chunk, model, encoder, folder, cfg)

    return common.resumed(answers_file(out, folder), made_by, rows, work)


def judge_style(folder):
    """-> the prompt style ("msrl", "caption" or "r1") that the judge in `folder` was trained with
    and is to be asked in. Raises SystemExit for a reward model, which cannot be a judge."""
    if common.stage_of(folder).get("stage") == bt_reward.STAGE:
        raise SystemExit(f"{folder} is a reward model and states no verdict; --judges are made by "
                         "the stages, --models by bt_reward.py.")
    return common.trained_style(folder)


def verdicts_on(rows, model, encoder, folder, cfg):
    """The work of verdicts_by(). A row whose prompt is too long for the judge gets no verdict.
    Raises SystemExit for a row that the judge cannot read."""
    fit = []  # places of the rows that are judged
    for i, row in enumerate(rows):
        try:
            if encoder.check(row, "pixels") <= cfg.max_prompt_tokens:
                fit.append(i)
        except common.BadRow as e:
            raise SystemExit(f"{folder} cannot judge row {row['id']}: it {e}.") from None
    preds = common.judge(model, encoder, [rows[i] for i in fit], sample_group,
                         batch_size=cfg.eval_batch, max_new_tokens=cfg.judge_tokens,
                         desc=f"verdicts of {folder}")
    verdicts = [[] for _ in rows]
    for pred in preds:
        place = fit[pred["at"]]
        verdicts[place].append(pred["pred"])
    return verdicts


# -------------------------------------------------------------------- the iterative framework (3.3)
def iterate(cfg, device):
    """Training and curation in turns, T times. The numbers are the paper's five steps; a model is
    the folder that holds it."""
    encoder = common.load(cfg.model, device, frames=cfg.frames, max_tiles=cfg.max_tiles)[1]
    settings, out = bt_reward.settings_of(asdict(cfg)), Path(cfg.out)
    data = bt_reward.load_pairs(cfg.data, encoder, settings, cfg, cfg.exclude)     # D_0
    noisy = bt_reward.load_pairs(cfg.curate, encoder, settings, cfg, cfg.exclude)  # D^open
    if len(noisy) < cfg.iterations:
        raise SystemExit(f"{cfg.curate}: {len(noisy)} rows are too few for --iterations "
                         f"{cfg.iterations}.")
    model = train_once(cfg, device, out / "0-model", data)                         # r_0
    for t in range(1, cfg.iterations + 1):
        # UNSPECIFIED: what is new in an iteration (paper: three data sets, then two); a T-th here
        new = noisy[t - 1::cfg.iterations]                                         # 1. D_t^open
        new = curate(new, [model, *cfg.models], model, cfg.judges, cfg, device,
                     out / f"{t}-new")                                             # 2. D_t^cur
        both = data + new                                                          # 3. D'_t
        first = train_once(cfg, device, out / f"{t}-first", both)                  #    r'_t
        # without voters, so that no label is flipped: the paper skips that step here
        data = curate(both, [], first, cfg.judges, cfg, device, out / f"{t}-all")  # 4. D_t
        if not data:
            raise SystemExit(f"{out}/{t}-all: curation left no row; see dropped.jsonl.")
        model = train_once(cfg, device, out / f"{t}-model", data)                  # 5. r_t
    if common.rank() == 0:
        print(f"the last model is {model}/")


def train_once(cfg, device, out, rows):
    """Train into the folder `out`, unless a finished run is there. -> `out`"""
    if Path(out, "stage.json").exists():
        common.open_run(out, cfg)  # refuses a run of other settings
    else:
        bt_reward.train(cfg, device, out, rows)
    return out


def main():
    cfg = common.parse_config(Config, __doc__, PRESETS)
    device = common.start_processes(cfg.batch_size)
    if cfg.construct:
        construct(cfg, device)
    elif cfg.iterations:
        iterate(cfg, device)
    else:
        curate_file(cfg, device)
    common.end_processes()


if __name__ == "__main__":
    main()
