"""
Preference data: from files, published sets and benchmarks to the rows that every script takes.

    1  sources      `a.jsonl:500,hub/id` -> checked rows, bad ones named or counted
    2  captions     rows whose media nobody has described get captions (MSRL 4.2)
    3  published    the sets that the four papers train on, recognised by their columns
    4  benchmarks   those that eval.py scores, read by the rules of their authors

A row is common.Row. To read a set of your own, write such rows, or add a function to section 3.
"""

import ast
import base64
import csv
import gzip
import hashlib
import io
import json
import math
import os
import random
import re
import sys
import zlib
from collections import Counter
from itertools import islice, permutations
from pathlib import Path
from types import SimpleNamespace

from PIL import Image
from tqdm import tqdm

import common
from common import OTHER, BadRow, Row, check_row, coin, gather_list, rank, world

# ==================================================================================================
# 1. Sources

LENGTHS = Path("media_cache", "lengths")  # what prompt_length() measured, one file for each rank


def load_rows(sources, encoder, form="pixels", max_prompt_tokens=None, skip_bad_rows=False,
              media_root="", exclude="", origin="", quiet=False) -> list[Row]:
    """Comma-separated sources -> list of checked preference rows, each with the length of its
    encoded prompt under "tokens". A source is `a.jsonl`, or `a.jsonl:500` for a sample of 500, or
    `a.jsonl:500@2000` for the 500 after the first 2,000 of the same shuffle, which `a.jsonl:2000`
    takes: two stages that are to see different rows.

    A bad row (malformed, unknown label, unreadable image, forged tag...) stops the run with its
    file and line, unless skip_bad_rows; an over-long prompt is always skipped, never truncated,
    because a prompt cut in the middle is another question. Rows that also occur in the sources of
    `exclude` (benchmarks) are left out. All three are counted and printed; the last two are among
    the rows of a sample, so that samples of the same file never overlap.

    Media must lie where media_roots() says, or where it says so of the sources `origin`.
    """
    quiet = quiet or rank() > 0
    excluded = fingerprints(exclude)
    bad, counts = Counter(), Counter()

    rows = []
    for source in sources.split(","):
        sample = re.fullmatch(r"(.+?):(\d+)(?:@(\d+))?", source)
        roots = media_roots(f"{source},{origin}", media_root)
        if sample is None:
            taken = list(good_rows(source, False, encoder, form, roots, bad, skip_bad_rows, quiet))
        else:  # the same in every run
            source, wanted, offset = sample[1], int(sample[2]), int(sample[3] or 0)
            found = good_rows(source, True, encoder, form, roots, bad, skip_bad_rows, quiet)
            taken = list(islice(found, offset, offset + wanted))
            if len(taken) < wanted and not quiet:
                print(f"{sample[0]}: only {len(taken)} rows to give")
        for row in taken:
            if max_prompt_tokens and row["tokens"] > max_prompt_tokens:
                counts["too long"] += 1
            elif excluded and fingerprint(row) in excluded:
                counts["excluded"] += 1
            else:
                rows.append({**row, "source": row.get("source") or source})
    summary = f"{sources}: {len(rows)} rows"
    if bad:
        summary += f", {bad.total()} bad rows skipped {dict(bad.most_common(5))}"
    if counts["too long"]:
        summary += f", {counts['too long']} skipped: over {max_prompt_tokens} tokens"
    if counts["excluded"]:
        summary += f", {counts['excluded']} left out: they are in {exclude}"
    if not quiet:
        print(summary)
    if not rows:
        raise SystemExit(f"{sources}: no usable row left.")
    return rows


def good_rows(source, shuffle, encoder, form, roots, bad, skip_bad_rows, quiet):
    """Yield the checked rows of one source that are not bad; those that are go into the Counter
    `bad`, or stop the run. Each process checks its share, because to check a row is to read its
    media, and all yield all rows."""
    def check(place):
        """-> place, the rows of this raw row, and what is wrong with it or None."""
        where, raw = chunk[place]
        try:
            rows = list(checked(raw, where, Path(source).parent, roots, encoder, form, lengths))
            return place, rows, None
        except BadRow as e:
            return place, [], str(e)

    lengths = kept_lengths()
    raws = iter(tqdm(raw_rows(source, shuffle), desc=f"reading {source}", unit=" rows",
                     disable=quiet, mininterval=1, leave=False))
    chunk = list(islice(raws, 32 * world()))
    while chunk:
        results = gather_list([check(place) for place in range(rank(), len(chunk), world())])
        for place, rows, complaint in sorted(results, key=lambda result: result[0]):
            if complaint and not skip_bad_rows:
                raise SystemExit(f"{chunk[place][0]}: row {complaint}.\nMend it, or pass "
                                 "--skip_bad_rows to leave such rows out and count them.")
            if complaint:
                bad[complaint[:60]] += 1
            yield from rows
        chunk = list(islice(raws, 32 * world()))


def prompt_length(row, encoder, form, lengths):
    """-> tokens of the row's encoded prompt. Raises BadRow. To learn it is to decode the row's
    media, hours for a hundred thousand videos, so a length is kept: a resumed run, and the next
    stage, decode only what is new or was changed since."""
    media = row["media"] if form == "pixels" else []
    stamps = common.stamps(*media)  # of files; a folder of frames has none
    if not media or len(stamps) < len(media) or encoder.kept_as is None:
        return encoder.check(row, form)
    told_by = [encoder.kept_as, row["task"], row["prompt"], row["responses"], stamps]
    key = hashlib.sha256(json.dumps(told_by).encode()).hexdigest()
    if key not in lengths:
        lengths[key] = encoder.check(row, form)
        LENGTHS.mkdir(parents=True, exist_ok=True)
        common.append(LENGTHS / f"{rank()}.jsonl", [key, lengths[key]])
    return lengths[key]


def kept_lengths():
    """-> {key of a row: tokens of its prompt} of former runs. A line that was cut is measured
    again."""
    lengths = {}
    for file in LENGTHS.glob("*.jsonl"):
        for line in file.read_bytes().splitlines():
            try:
                key, tokens = json.loads(line)
            except ValueError:
                continue
            lengths[key] = tokens
    return lengths


def media_roots(sources, media_root=""):
    """-> the folders that media named by rows of these sources may lie in: that of the file (of a
    folder: itself), media_cache/, where we put what rows hold themselves, and --media_root's. A row
    from elsewhere must not choose which of your files are read, shown or sent to a server."""
    roots = [Path("media_cache"), *filter(None, media_root.split(","))]
    for source in filter(None, sources.split(",")):
        source = Path(re.sub(r":\d+(@\d+)?$", "", source))
        roots.append(source if source.is_dir() else source.parent)
        if source.suffix == ".parquet":
            roots.append(source.parent.parent / "Videos")  # from_rapidata()
    return [Path(root).resolve() for root in roots]


def check_place(path, roots):
    """Raises BadRow for a medium, or a frame in its folder, that lies in none of the folders
    `roots` when links are followed."""
    paths = [path]
    try:
        if os.path.isdir(path):
            paths += [frame.path for frame in os.scandir(path) if frame.is_symlink()]
        for path in paths:
            real = Path(os.path.realpath(path))
            if not any(real.is_relative_to(root) for root in roots):
                raise BadRow(f"medium {path} lies outside of the folder of its file; if you trust "
                             f"these rows, pass --media_root {real.parent}")
    except BadRow:
        raise
    except (OSError, ValueError) as e:  # of characters that no path has
        raise BadRow(f"medium {path!r} is no path ({e})") from None


def checked(raw, where, folder, roots, encoder, form, lengths):
    """One row as it stands in a file -> its preference rows, each with the length of its encoded
    prompt under "tokens". Raises BadRow."""
    if isinstance(raw, BadRow):
        raise raw
    for row in convert(raw, where.rpartition(":")[2].strip("[]")):
        row = check_row(row, folder, encoder.forbidden)
        for medium in row["media"]:
            check_place(medium, roots)
        row["tokens"] = prompt_length(row, encoder, form, lengths)
        yield row


def hard_rows(rows: list[Row], min_attempts) -> list[Row]:
    """The rows for which a model needed at least so many attempts (R1-Reward 4.3: 2);
    eval.py --attempts writes how many it needed."""
    if not min_attempts:
        return rows
    if any(not isinstance(row.get("attempts"), int) for row in rows):
        raise SystemExit("--min_attempts needs rows with \"attempts\"; eval.py --attempts 3 --out "
                         "rows.jsonl writes them.")
    hard = [row for row in rows if row["attempts"] >= min_attempts]
    if rank() == 0:
        print(f"{len(hard)} of {len(rows)} rows need {min_attempts} attempts or more")
    if not hard:
        raise SystemExit(f"no row needs {min_attempts} attempts; choose a smaller --min_attempts.")
    return hard


# What one script writes for another, and the command that does
MADE_BY = {"captioned.jsonl": "stage2_caption_grpo.py --captioner DIR",
           "annotated.jsonl": "eval.py --attempts 3 --style r1",
           "pairs.jsonl": "dt2it.py --construct FILE",
           "curated.jsonl": "dt2it.py --curate FILE"}


def raw_rows(source, shuffle=False, config=None, split=None):
    """Yield ("file:line", raw row or BadRow) from a .jsonl, .json (both also .gz) or .parquet file
    or a hub id (and its config and split); shuffled, always alike, if a sample is wanted."""
    path = Path(source)
    if path.is_dir():
        raise SystemExit(f"{source}: is a folder; name a .jsonl, .json or .parquet file in it.")
    if path.exists() and path.suffix != ".parquet":
        found = file_rows(path)
        if shuffle:
            found = list(found)
            random.Random(0).shuffle(found)
        yield from found
        return
    hub_id = source.count("/") == 1 and not path.suffix and source[0] not in "./"
    if not path.exists() and not hub_id:
        maker = MADE_BY.get(path.name, "tests/toy_world.py")
        raise SystemExit(f"{source}: no such file. `python {maker}` makes such rows.")
    try:
        for i, row in dataset_rows(source, shuffle, config, split):
            yield f"{source}:{i + 1}", row
    except (OSError, ValueError) as e:  # the hub's own errors are among these
        raise SystemExit(f"{source}: no such file, and not to be had from the hub ({e}). "
                         "`python tests/toy_world.py` makes toy rows.") from e


def check_sources(*sources):
    """Stop now, and not after hours, if one of these comma-separated sources is not there."""
    for source in ",".join(sources).split(","):
        if source:
            next(raw_rows(re.sub(r":\d+(@\d+)?$", "", source)), None)


def dataset_rows(source, shuffle, config, split):
    """-> (index, row) of a .parquet file or a hub id, images as bytes."""
    import datasets  # here, because it takes a second to import
    file = Path(source).exists()
    if file:
        rows = datasets.load_dataset("parquet", data_files=source, split="train",
                                     streaming=not shuffle)
    else:
        config = config or {"nvidia/HelpSteer3": "preference"}.get(source)
        split = split or {"MMInstruction/VL-RewardBench": "test"}.get(source, "train")
        rows = datasets.load_dataset(source, config, split=split, streaming=True)
    for column, kind in (getattr(rows, "features", None) or {}).items():
        if isinstance(kind, datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    if not shuffle:
        return enumerate(rows)
    if file:
        order = random.Random(0).sample(range(len(rows)), len(rows))
        return ((i, rows[i]) for i in order)
    # DEVIATION: a sample of a hub id comes from about the first rows of one of its files, for one
    # of all rows would download them all. Download it, and name the .parquet files.
    return enumerate(rows.shuffle(seed=0, buffer_size=1000))


def file_rows(path):
    """Yield ("file:line", raw row or BadRow) of a .jsonl or .json file, also of one in .gz."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:  # surrogateescape: bytes that are no UTF-8 reach check_row(), which knows the row
        with opener(path, "rt", encoding="utf-8", errors="surrogateescape") as file:
            if ".json" in path.suffixes:
                array = json.load(file)
                for i, row in by_prompt(array if isinstance(array, list) else [array]):
                    yield f"{path}:[{i}]", row
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", _row_of_line(line)
    except json.JSONDecodeError as e:
        raise SystemExit(f"{path}:{e.lineno}: not valid JSON ({e.msg}); for one object per "
                         "line name the file .jsonl") from None
    except (OSError, EOFError, zlib.error) as e:
        raise SystemExit(f"{path}: cannot be read ({e}); replace the file.") from None


def _row_of_line(line):
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as e:
        return BadRow(f"is not valid JSON ({e})")


def fingerprints(sources):
    """-> the fingerprints of all rows in these benchmark files, comma-separated."""
    known = set()
    for source in filter(None, sources.split(",")):
        found = set()
        for where, raw in raw_rows(source):
            if isinstance(raw, dict) and "media" not in raw:
                raw = {**raw, "image": raw.get("image") or "-"}  # only the texts are needed
            try:
                for row in convert(raw, where):
                    found.add(fingerprint(row, Path(source).parent))
            except BadRow as e:
                raise SystemExit(f"{where}: row {e}; --exclude needs a benchmark that can be "
                                 "read.") from None
        found.discard(None)
        if not found:
            raise SystemExit(f"{source}: holds no row with a prompt and two candidates; --exclude "
                             "would exclude nothing.")
        known |= found
    return known


def fingerprint(row, folder=""):
    """What makes two rows the same whatever their source: question and responses, letters and
    digits only; of generation rows question and media, whose paths start in `folder`. None for
    what has neither responses nor two media, and what is no row."""
    if not isinstance(row, dict):
        return None
    if not row.get("responses"):
        media = row.get("media") or ()
        if len(media) != 2:
            return None
        known_by = [medium_digest(Path(folder, medium)) for medium in media]
        return (re.sub(r"[\W_]+", "", row["prompt"].lower()), *sorted(known_by))
    prompt, *responses = (re.sub(r"[\W_]+", "", text.lower())
                          for text in (row["prompt"], *row["responses"]))
    return (prompt, *sorted(responses))


def medium_digest(path):
    """Tells a medium by what it holds, because two sets keep the same file under two paths: its
    size and first mebibyte (of a long video all would take long), of a folder of frames each of
    them. A file that is not here is told by its name."""
    if path.is_dir():
        return " ".join(medium_digest(frame) for frame in sorted(path.iterdir()))
    if not path.is_file():
        return path.name
    with open(path, "rb") as file:
        return f"{path.stat().st_size}:{hashlib.sha256(file.read(2 ** 20)).hexdigest()}"


# ==================================================================================================
# 2. Captions

def captioned(cfg, sample, device, max_new_tokens=300, batch_size=16):
    """Preference rows whose media have no captions get them from a vision-language checkpoint (the
    paper: GPT-5). -> path of a .jsonl of rows with captions. Each medium is described once; what
    is done stays in captions.jsonl, so a killed run goes on."""
    # what can fail comes before hours; this model is gone when the policy comes
    common.check_checkpoint(cfg.model, type(cfg).model)
    check_sources(cfg.heldout, "" if cfg.replay_ratio.endswith(":0") else cfg.replay)
    model, encoder = common.load(cfg.captioner, device)
    rows = load_rows(cfg.data, encoder, "pixels", None, cfg.skip_bad_rows, cfg.media_root,
                     cfg.exclude)
    to_describe = {}  # medium -> what tells it from others, without repetition
    for row in rows:
        if not row["captions"]:
            for medium in row["media"]:
                to_describe[medium] = {"task": row["task"], "media": medium,
                                       "file": common.stamps(medium)}

    def describe(batch, at):
        mine = batch[rank()::world()]
        prompts, captions = [], []
        for item in mine:
            video = item["task"].startswith("video")
            question = f"<{'video' if video else 'image'}> {cfg.caption_prompt}"
            prompts.append(encoder.encode(question, [item["media"]], video))
        if mine:
            rollout = sample(model, encoder, prompts, 1, 0.0, max_new_tokens, None)
            for item, (ids,) in zip(mine, rollout.ids, strict=True):
                # what looks like a tag would make the row a bad one
                caption = re.sub(r"<[^<>]*>|[<>]", "", encoder.decode(ids)).strip()
                captions.append((item["media"], caption or "nothing to be seen"))
        found = dict(gather_list(captions))
        return [found[item["media"]] for item in batch]
    made_by = {"captioner": [cfg.captioner, common.stamps(cfg.captioner)],
               "prompt": cfg.caption_prompt}
    captions = common.resumed(Path(cfg.out, "captions.jsonl"), made_by, list(to_describe.values()),
                              describe, batch_size * world(), "captions")
    caption_of = dict(zip(to_describe, captions, strict=True))
    path = Path(cfg.out, "captioned.jsonl")  # always made anew: the rows of the data as it is now
    for row in rows:
        row["captions"] = row["captions"] or [caption_of[medium] for medium in row["media"]]
        row["media"] = [os.path.abspath(medium) for medium in row["media"]]
    if rank() == 0:
        common.write_lines(path, rows)
    gather_list([])  # nobody reads it before it is there
    return str(path)


# ==================================================================================================
# 3. Published sets -> preference rows.
# Each adapter is a generator of rows for one published row;
# better_first() puts the better answer on a side chosen by a hash of the id, because several sets
# always list it first. Ties are dropped.

def better_first(id, prompt, better, worse, task="text", media=(), **more):
    """`better` and `worse`: two texts, or for *_generation two media (paths, or images that a
    dataset holds). -> a row; `more` are further keys of it."""
    if coin("side", id):
        pair, label = [worse, better], "B"
    else:
        pair, label = [better, worse], "A"
    if task.endswith("generation"):
        responses, media = None, pair
    else:
        responses = pair
    return {"id": id, "task": task, "prompt": prompt, "label": label, "responses": responses,
            "media": [kept_medium(medium) for medium in media], **more}


def kept_medium(medium):
    """A path stays a path. An image inside a dataset (PIL, bytes, {"bytes": ...} or base64 text) is
    written once to media_cache/, under a name that is the hash of its bytes."""
    if isinstance(medium, dict):
        medium = medium.get("bytes") or medium.get("path")
    if isinstance(medium, Image.Image):
        buffer = io.BytesIO()
        medium.convert("RGB").save(buffer, "PNG")
        medium = buffer.getvalue()
    if isinstance(medium, str) and len(medium) > 500:  # no path is that long
        try:
            medium = base64.b64decode(medium.rpartition(",")[2], validate=True)
        except ValueError:
            raise BadRow("has an image that is neither a path nor base64") from None
    if isinstance(medium, bytes):
        path = Path("media_cache", hashlib.sha256(medium).hexdigest()[:32])
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}")
            part.write_bytes(medium)
            os.replace(part, path)
        return str(path.resolve())
    if not isinstance(medium, str) or not medium:
        raise BadRow("lacks one of its images or videos")
    return medium


def better_pairs(scores):
    """Scores of several candidates, the larger the better -> (place of the better, place of the
    worse) of every two that differ. None is no score."""
    for i, j in permutations(range(len(scores)), 2):
        if None not in (scores[i], scores[j]) and scores[i] > scores[j]:
            yield i, j


def mean_of(values):
    """The mean of numbers, also written as texts; None if one of them is no number."""
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        return None
    if not numbers or not math.isfinite(sum(numbers)):
        return None
    return sum(numbers) / len(numbers)


SPEAKERS = {"human": "User", "gpt": "Assistant"}  # others are called by their role


def spoken(turns):
    """Turns {"role", "content"} or {"from", "value"} -> one text: the content of a single turn, or
    each turn after its speaker."""
    said = []
    for turn in turns:
        role = turn.get("role") or turn["from"]
        speaker = SPEAKERS.get(role, role.capitalize())
        said.append((speaker, turn["content"] if "content" in turn else turn["value"]))
    if len(said) == 1:
        return said[0][1]
    return "\n\n".join(f"{speaker}: {text}" for speaker, text in said)


def without_places(text):
    """The text without its <image> and <video>; render() says where the media go."""
    return re.sub(r"\s*<(image|video)>\s*", " ", text).strip()


def from_helpsteer3(r, where):
    """nvidia/HelpSteer3, config `preference`. A NEGATIVE overall_preference means that response 1
    is better; 0 is a tie and is dropped. The rationale is that of an annotator who agrees with the
    overall label: feedback on both responses, then the reasoning."""
    if r["overall_preference"] == 0:
        return
    prompt = r["context"]
    if not isinstance(prompt, str):
        prompt = spoken(prompt)
    first_wins = r["overall_preference"] < 0
    better, worse = r["response1"], r["response2"]
    if not first_wins:
        better, worse = worse, better
    row = better_first(f"helpsteer3/{where}", prompt, better, worse, source="HelpSteer3",
                       subset=r.get("domain") or "")
    first = row["label"] if first_wins else OTHER[row["label"]]  # the side of response 1
    agreeing = [annotation for annotation in r.get("individual_preference") or []
                if annotation["score"] * r["overall_preference"] > 0]
    if agreeing:
        # UNSPECIFIED: which annotator; the surest
        surest = max(agreeing, key=lambda annotation: abs(annotation["score"]))
        sides = {"1": first, "2": OTHER[first]}
        feedback = {sides["1"]: _with_sides(surest["feedback1"], sides),
                    sides["2"]: _with_sides(surest["feedback2"], sides)}
        row["rationale"] = (
            f"Feedback:\nResponse A: {feedback['A']}\nResponse B: {feedback['B']}\n\n"
            f"Comparision:\n{_with_sides(surest['reasoning'], sides)}\n\n"
            f"Conclusion:\nResponse {row['label']} is better.")
        # a side that is named in another way would contradict the label where the order is turned
        if _NAMED_OTHERWISE.search(row["rationale"]):
            row |= {"rationale": None, "unclear_rationale": True}
    yield row


_NAMED_OTHERWISE = re.compile(
    r"\b(?:first|second) (?:response|answer|one|assistant|option)\b|\b(?:former|latter)\b|"
    r"\b(?:responses?|answers?|assistants?|prefer|choose|pick) #?[12]\b|[@#][12]\b|"
    r"\b(?:better|worse|superior|inferior|preferable|preferred) (?:than|to|over) [12]\b",
    re.IGNORECASE)


def _with_sides(text, sides):
    """"@Response 1", "RESPONSE #2", "Responses 1 and 2" -> "Response A" and the like, which swap()
    knows."""
    text = re.sub(r"\b(response)s ([12])( and | or |/)([12])\b", r"\1 \2\3\1 \4", text or "",
                  flags=re.IGNORECASE)
    return re.sub(r"@?\bresponse #?([12])\b", lambda m: f"Response {sides[m[1]]}", text,
                  flags=re.IGNORECASE)


_GRAM = (r"\[User Question\]", r"\[The Start of Assistant A's (?:Response|Answer)\]",
         r"\[The End of Assistant A's (?:Response|Answer)\]\s*"
         r"\[The Start of Assistant B's (?:Response|Answer)\]",
         r"\[The End of Assistant B's (?:Response|Answer)\]")


def between(text, marks):
    """The texts between marks (expressions) that follow one another, or None if they do not. Not
    one expression, which would try all ways to part a text of many spaces, for hours."""
    parts, end = [], 0
    for mark in marks:
        found = re.compile(mark).search(text, end)
        if found is None:
            return None
        parts.append(text[end:found.start()].strip())
        end = found.end()
    return parts[1:]


def from_gram(r, where):
    """wangclnlp/GRAM-RR-TrainingData: {instruction, input, output}. The label stands in the
    output's <answer>; the synthetic rationale is not used (MSRL 5.1)."""
    found = between(r["instruction"], _GRAM)
    label = re.findall(r"<answer>\s*([AB])\s*</answer>", r["output"])
    if not found or len(label) != 1:
        raise BadRow("is no GRAM-RR row: section markers or the <answer> label are missing")
    prompt, a, b = found
    better, worse = (a, b) if label == ["A"] else (b, a)
    yield better_first(f"gram/{where}", prompt, better, worse, source="GRAM-RR-TrainingData")


def from_rm_bench(r, where):
    """THU-KEG/RM-Bench: three styles of a right and of a wrong answer; all nine pairs."""
    if not isinstance(r["rejected"], list):
        raise BadRow("is no RM-Bench row: 'chosen' and 'rejected' must be lists of texts")
    for i, better in enumerate(r["chosen"]):
        for j, worse in enumerate(r["rejected"]):
            yield better_first(f"rm_bench/{r['id']}/{i}-{j}", r["prompt"], better, worse,
                               source="RM-Bench", group=str(r["id"]),
                               subset=str(r.get("domain") or r.get("subset") or ""))


def held_out(video):
    """ShareGPTVideo's test split is not public: a tenth of its videos, by a hash of their names."""
    return hashlib.sha256(str(video).encode()).digest()[0] % 10 == 0


def from_chosen_rejected(r, where):
    """A question, a better and a worse text, and at most one image or video: RLAIF-V, MM-RLHF's
    dpo_pairs.jsonl, ShareGPTVideo's sft_dpo_17k.jsonl (its video is a folder of frames), MMPR
    (whose image may be None or a list), llamafactory/ultrafeedback_binarized."""
    if r.get("is_tie"):
        return
    kind = "image" if "image" in r else None
    if "question" in r and "ds_name" not in r:
        r = {**r, "image": _one_image(r)}  # MMPR
        kind = "image" if r["image"] else None
    if r.get("video"):
        kind = "video"
    source = "RLAIF-V" if "ds_name" in r else "MM-RLHF" if "chosen_reason" in r else ""
    if kind == "video" and not source and held_out(r["video"]):
        return  # ShareGPTVideo: eval.py judges these
    prompt = r.get("question") or r.get("instruction") or r["prompt"]
    yield better_first(f"{source or 'pair'}/{r.get('idx', r.get('id', ''))}/{where}",
                       without_places(prompt), r["chosen"], r["rejected"],
                       task=f"{kind}_understanding" if kind else "text",
                       media=[r[kind]] if kind else [], source=source,
                       subset=str(r.get("subset") or r.get("origin_dataset") or ""))


def _one_image(r):
    """The image of an MMPR row, None if it is about no image. Raises BadRow if there are several,
    or if the question speaks of one that is missing."""
    images = r.get("image") or []
    if not isinstance(images, list):
        images = [images]
    if len(images) > 1:
        raise BadRow(f"has {len(images)} images; a row takes one, leave it out")
    if not images and "<image>" in r["question"]:
        raise BadRow("lacks one of its images or videos")
    return images[0] if images else None


def from_messages(r, where):
    """Tulu-3's and OLMo-2's preference mixtures: `chosen` and `rejected` are whole conversations
    [{"role", "content"}, ...], the same up to the last answer."""
    rating = r.get("chosen_rating")  # OLMo-2; often None
    if rating is not None and rating == r.get("rejected_rating"):
        return
    (*turns, better), (*others, worse) = r["chosen"], r["rejected"]
    if turns != others:
        raise BadRow("has two conversations that differ before the last answer")
    yield better_first(f"messages/{r.get('id', '')}/{where}", spoken(turns), better["content"],
                       worse["content"], source=r.get("source") or "")


def from_conversations(r, where):
    """Turns {"from", "value"} about one image. POVID: a second conversation with the worse answer
    in "rejected_conversations"; Zhihui/VLFeedback: the last turn in "chosen" and "rejected"."""
    if "rejected_conversations" in r:
        image = r["image"]
        (*turns, better), (*others, worse) = r["conversations"], r["rejected_conversations"]
        if without_places(spoken(turns)) != without_places(spoken(others)):
            raise BadRow("has two conversations that differ before the last answer")
    else:
        image, = r["images"]
        turns, better, worse = r["conversations"], r["chosen"], r["rejected"]
    yield better_first(f"conversations/{r.get('id', '')}/{where}", without_places(spoken(turns)),
                       better["value"], worse["value"], "image_understanding", [image])


def from_rated_completions(r, where):
    """VLFeedback (about an image) and openbmb/UltraFeedback (text): several completions, each rated
    on some aspects; all pairs whose mean ratings differ. A completion with a rating that is no
    number is left out. UltraFeedback's overall_score is not used: some bad answers have a 10."""
    completions = r["completions"]
    if isinstance(completions, dict):  # what `datasets` makes of a list of structs
        keys, columns = completions.keys(), completions.values()
        completions = [dict(zip(keys, values, strict=True))
                       for values in zip(*columns, strict=True)]
    scores = []
    for completion in completions:
        aspects = completion["annotations"].values()
        scores.append(mean_of([aspect["Rating"] for aspect in aspects]))
    if "instruction" in r:
        name, prompt, task, media = "UltraFeedback", r["instruction"], "text", []
    else:
        name, prompt, task = "VLFeedback", without_places(r["prompt"]), "image_understanding"
        media = [r.get("img_path") or r.get("image")]
    for i, j in better_pairs(scores):
        yield better_first(f"{name}/{r.get('id', '')}/{where}/{i}-{j}", prompt,
                           completions[i]["response"], completions[j]["response"], task, media,
                           source=name, margin=scores[i] - scores[j])


def from_wildvision(r, where):
    """WildVision/wildvision-battle: two conversations about an image and a human's vote.
    UNSPECIFIED: what the papers do where the two differ before the last answer; such rows are left
    out, for their last answers are to two prompts."""
    if r["winner"] not in ("model_a", "model_b", "tie", "tie (bothbad)"):
        raise BadRow(f"has the unknown winner {r['winner']!r}")
    (*turns, better), (*others, worse) = r["conversation_a"], r["conversation_b"]
    if r["winner"].startswith("tie") or turns != others:
        return
    if r["winner"] == "model_b":
        better, worse = worse, better
    yield better_first(f"wildvision/{r.get('question_id', '')}/{where}",
                       without_places(spoken(turns)), better["content"], worse["content"],
                       "image_understanding", [r["image"]], source="WildVision-Battle")


def from_hpdv2(r, where):
    """ymhao/HPDv2. train.json: two images, 1 for the preferred one, 0 for the other. test.json:
    many images and their ranks, the lower the better. They lie in train/ and test/ beside the
    file."""
    if "human_preference" in r:
        folder, files, scores = "train", r["file_path"], r["human_preference"]
    else:
        folder, files, scores = "test", r["image_path"], [-rank for rank in r["rank"]]
    for i, j in better_pairs(scores):
        media = [f"{folder}/{Path(files[k]).name}" for k in (i, j)]
        yield better_first(f"hpdv2/{where}/{i}-{j}", r["prompt"], *media, "image_generation",
                           source="HPDv2")


def by_prompt(rows):
    """The rows of a .json file -> (place, row). EvalMuse-40K rates its images one by one: those of
    a prompt become one row {"prompt", "rated_images"}, at the place of the first."""
    rated = {}
    for i, row in enumerate(rows):
        if isinstance(row, dict) and {"prompt", "img_path", "total_score"} <= row.keys():
            rated.setdefault(str(row["prompt"]), (i, []))[1].append(row)
        else:
            yield i, row
    for prompt, (i, images) in rated.items():
        yield i, {"prompt": prompt, "rated_images": images}


def from_evalmuse(r, where):
    """EvalMuse-40K's train_list.json, after by_prompt(): all pairs of a prompt's images whose mean
    scores differ. UNSPECIFIED: how DT2IT makes pairs of its scores."""
    images = r["rated_images"]
    scores = [mean_of(image["total_score"]) for image in images]
    for i, j in better_pairs(scores):
        yield better_first(f"evalmuse/{where}/{i}-{j}", r["prompt"], images[i]["img_path"],
                           images[j]["img_path"], "image_generation", source="EvalMuse-40K",
                           margin=scores[i] - scores[j])


def from_vision_feedback(r, where):
    """wangclnlp/vision-feedback-mix-binarized (S1): `conversations` is JSON text, the better of its
    two preference_values is the first."""
    turns = r["conversations"]
    human, gpt = json.loads(turns) if isinstance(turns, str) else turns
    better, worse = gpt["preference_values"]
    origin = [str(value) for key, value in r.items() if key.startswith("origin")]
    yield better_first(f"vision-feedback/{r.get('id', where)}",
                       re.sub(r"\s*<image>\s*", " ", human["value"]).strip(), better, worse,
                       "image_understanding", [r["image"]], source="S1",
                       subset=origin[0] if origin else "")


def from_open_image_preferences(r, where):
    """data-is-better-together/open-image-preferences-v1-binarized (S2): two images."""
    yield better_first(f"open-image-preferences/{r.get('id', where)}", r["prompt"], r["chosen"],
                       r["rejected"], "image_generation", source="S2", subset=r["evolution"])


def from_rapidata(r, where):
    """Rapidata's text-to-image (S3) and text-to-video (S6) sets: shares of the votes; the larger
    wins, equal or missing ones are ties. As published, Videos/ lies beside the folder of the
    parquet file."""
    if "image1" in r:
        task, source = "image_generation", "S3"
        first, second = (r.get(f"weighted_results_image{i}_preference") for i in (1, 2))
        media = [r["image1"], r["image2"]]
    else:
        task, source = "video_generation", "S6"
        first, second = (r.get(f"weighted_results{i}_Preference") for i in (1, 2))
        media = [f"../Videos/{r['file_name1']}", f"../Videos/{r['file_name2']}"]
    if first is None or second is None or first == second:
        return
    better, worse = media if first > second else media[::-1]
    yield better_first(f"rapidata/{where}", r["prompt"], better, worse, task, source=source,
                       margin=abs(first - second))


def from_videodpo(r, where):
    """VideoDPO's pair.json (S5): video1 is the better. Even numbers are in winvideos/, odd ones in
    losevideos/, two to a file number."""
    caption = r["frame_caption"]
    if not isinstance(caption, str):
        caption = caption[0]
    better, worse = (f"{('winvideos', 'losevideos')[number % 2]}/{number // 2:06d}.mp4"
                     for number in (r["video1"], r["video2"]))
    yield better_first(f"videodpo/{r['video1']}-{r['video2']}", caption, better, worse,
                       "video_generation", source="S5")


# one by one and from the first # of a row: as one pattern they take quadratic time on some texts
_R1_HEADINGS = {"[Question]": re.compile(r"\[Question\]:?"),
                "[Response 1]": re.compile(r"(?<!#)#+ *\[Response 1\]:?"),
                "[Response 2]": re.compile(r"(?<!#)#+ *\[Response 2\]:?")}
_R1_END = re.compile(r"(?<!#)#+ *\**Output Format")


def r1_sections(text):
    """R1-Reward's judge prompt -> question and both responses. Raises BadRow."""
    sections, at = [], 0
    for name, heading in _R1_HEADINGS.items():
        found = heading.search(text, at)
        if not found:
            raise BadRow(f"is no R1-Reward row: section {name} is missing")
        sections.append(text[at:found.start()])
        at = found.end()
    end = _R1_END.search(text, at)
    sections.append(text[at:end.start() if end else None])
    return [section.replace("<image>", "").strip() for section in sections[1:]]


def from_r1_reward(r, where):
    """yifanzhang114/R1-Reward-RL: question and responses stand in the judge prompt, the answer is
    ["<answer>1</answer>"] or 2."""
    messages = json.loads(r["message"]) if isinstance(r["message"], str) else r["message"]
    content, image = messages[-1]["content"], r.get("image")
    text = content if isinstance(content, str) else _part_of(content, "text")
    prompt, better, worse = r1_sections(text)
    label = re.fullmatch(r"\s*<answer>\s*([12])\s*</answer>\s*", r["answer"][0])
    if not label:
        raise BadRow("is no R1-Reward row: the <answer> 1 or 2 is missing")
    if label[1] == "2":
        better, worse = worse, better
    yield better_first(f"r1-reward/{where}", prompt, better, worse, "image_understanding",
                       [image or _part_of(content, "image")], source="R1-Reward-RL")


def _part_of(content, kind):
    """The first text or image of a chat message's content."""
    return next(part[kind] for part in content if part["type"] == kind)


def from_vl_rewardbench(r, where):
    """MMInstruction/VL-RewardBench: human_ranking holds ranks, 0 is the better. Ids repeat."""
    if sorted(r["human_ranking"]) != [0, 1]:
        return
    better, worse = r["response"]
    if r["human_ranking"][0] == 1:
        better, worse = worse, better
    yield better_first(f"vl-rewardbench/{r['id']}/{where}", r["query"], better, worse,
                       "image_understanding", [r["image"]], source="VL-RewardBench")


def from_multimodal_rewardbench(r, where):
    """facebookresearch/multimodal_rewardbench, as --exclude needs it."""
    better, worse = r["Output1"], r["Output2"]
    if r["Better"] == "Output2":
        better, worse = worse, better
    yield better_first(f"multimodal-rewardbench/{r['ID']}", r["Text"], better, worse,
                       "image_understanding", [r.get("Image") or r["image"]],
                       source="Multimodal RewardBench")


def from_genai_bench(r, where):
    """TIGER-Lab/GenAI-Bench, as --exclude needs it. Its videos are URLs."""
    kind = "image" if "left_image" in r else "video"
    better, worse = r[f"left_{kind}"], r[f"right_{kind}"]
    if r["vote_type"] == "rightvote":
        better, worse = worse, better
    elif r["vote_type"] != "leftvote":
        return
    yield better_first(f"genai-bench/{where}", r["prompt"], better, worse, f"{kind}_generation",
                       source="GenAI-Bench")


# MSRL Table 5: S1 to S6. The last three come as files; their videos lie beside them.
# UNSPECIFIED: whether stages 2 and 3 share rows. Those of stage 3 follow those of stage 2.
TABLE_5 = ("wangclnlp/vision-feedback-mix-binarized:{},"
           "data-is-better-together/open-image-preferences-v1-binarized:{},"
           "Rapidata/OpenAI-4o_t2i_human_preference:{},data/ShareGPTVideo/sft_dpo_17k.jsonl:{},"
           "data/VideoDPO/pair.json:{},"
           "data/text-2-video-human-preferences/data/train-00000-of-00001.parquet:{}")


def _texts(r):
    return isinstance(r["chosen"], str) and isinstance(r["rejected"], str)


def _styles(r):
    return isinstance(r["chosen"], list)


def _messages(r):
    return _styles(r) and r["chosen"] and isinstance(r["chosen"][0], dict)


# A published row is known by its columns, and where these are shared by what they hold.
PUBLISHED = (
    ({"overall_preference", "response1", "response2"}, None, from_helpsteer3),
    ({"instruction", "output"}, None, from_gram),
    ({"human_ranking", "query", "response"}, None, from_vl_rewardbench),
    ({"message", "answer"}, None, from_r1_reward),
    ({"Output1", "Output2", "Better"}, None, from_multimodal_rewardbench),
    ({"prompt", "left_image", "right_image"}, None, from_genai_bench),
    ({"prompt", "left_video", "right_video"}, None, from_genai_bench),
    ({"conversations", "rejected_conversations"}, None, from_conversations),
    ({"conversations", "chosen", "rejected"}, None, from_conversations),
    ({"conversations", "image"}, None, from_vision_feedback),
    ({"prompt", "completions"}, None, from_rated_completions),
    ({"instruction", "completions"}, None, from_rated_completions),
    ({"conversation_a", "conversation_b", "winner"}, None, from_wildvision),
    ({"prompt", "file_path", "human_preference"}, None, from_hpdv2),
    ({"prompt", "image_path", "rank"}, None, from_hpdv2),
    ({"prompt", "rated_images"}, None, from_evalmuse),
    ({"prompt", "image1", "image2"}, None, from_rapidata),
    ({"prompt", "file_name1", "file_name2"}, None, from_rapidata),
    ({"video1", "video2", "frame_caption"}, None, from_videodpo),
    ({"prompt", "chosen", "rejected", "evolution"}, None, from_open_image_preferences),
    ({"chosen", "rejected"}, _messages, from_messages),
    ({"prompt", "chosen", "rejected", "id"}, _styles, from_rm_bench),
    ({"prompt", "chosen", "rejected"}, _texts, from_chosen_rejected),
    ({"question", "chosen", "rejected"}, _texts, from_chosen_rejected),
    ({"instruction", "chosen", "rejected"}, _texts, from_chosen_rejected))


def convert(raw, where):
    """Any supported raw row -> preference rows, recognised by its columns."""
    adapter = adapter_of(raw)
    if adapter is None:
        yield raw
        return
    try:
        yield from adapter(raw, where)
    except BadRow:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, StopIteration, ValueError,
            RuntimeError) as e:
        raise BadRow(f"does not have the published form ({type(e).__name__}: {e})") from e


def adapter_of(raw):
    """-> the function that converts this row, None for a preference row and for what is no row."""
    if not isinstance(raw, dict) or "task" in raw:
        return None
    for columns, holds, adapter in PUBLISHED:
        if columns <= raw.keys() and (holds is None or holds(raw)):
            return adapter
    return None


# ==================================================================================================
# 4. Benchmarks, read as published: each function turns one published row into preference rows.

def vl_rewardbench(r, where):
    """MMInstruction/VL-RewardBench: human_ranking holds ranks, 0 is the best. Ids repeat."""
    ranks, responses = as_list(r["human_ranking"]), as_list(r["response"])
    if sorted(ranks) != [0, 1]:
        raise BadRow(f"has human_ranking {ranks}, not [0, 1] or [1, 0]")
    yield {"task": "image_understanding", "prompt": r["query"], "responses": responses,
           "media": [r.get("image") or f"images/{r['id']}.png"], "label": "AB"[ranks[0]],
           "part": GROUPINGS["official"](str(r["id"])), "cluster": str(r["id"])}


def as_list(value):
    """A list, or one written as text"""
    return ast.literal_eval(value) if isinstance(value, str) else list(value)


def grouping(*hallucination):
    """id -> group, by what stands before its first "_" or "-" (not by query_source)."""
    def group(id):
        prefix = re.split("[_-]", id)[0]
        if prefix in hallucination:
            return "hallucination"
        return "reasoning" if prefix in ("mathverse", "mmmu") else "general"
    return group


# The same predictions, other macro means. Rows: general / hallucination / reasoning of 1,250.
GROUPINGS = {
    "official": grouping("RLAIF", "RLHF", "hallucination"),                      # 183 / 749 / 318
    "of UnifiedReward's scripts (wrong: no POVID)": grouping("RLAIF", "RLHF"),   # 631 / 301 / 318
    "of R1-Reward's get_acc.py (wrong: POVID only)": grouping("hallucination")}  # 484 / 448 / 318


def multimodal_rewardbench(r, where):
    """facebookresearch/multimodal_rewardbench: safety and reasoning are split by the id. Its scorer
    tosses a coin for unparsable answers; here they are wrong."""
    part, id = r["Category"].rpartition("/")[2].removesuffix("_task"), r["ID"].lower()
    better = {"Output1": "A", "Output2": "B"}.get(r["Better"])
    if better is None:
        raise BadRow(f"has Better {r['Better']!r}, not 'Output1' or 'Output2'")
    half = None  # of safety
    if part == "safety":
        half = "safety/bias" if id.startswith("pairs") else "safety/toxicity"
    if part == "reasoning":
        part = "math" if id.startswith("math") else "coding"
    yield {"task": "image_understanding", "prompt": r.get("Text"), "media": [r.get("Image")],
           "responses": [r["Output1"], r["Output2"]], "label": better,
           "part": part, "also": half}


def mm_rlhf_rewardbench(r, where):
    """yifanzhang114/MM-RLHF-RewardBench: 170 pairs of 46 prompts. A: chosen. The category is the
    word in the path of the image, or of the video's folder of frames."""
    medium = r.get("video") or r["image"]
    path = medium["path"] if isinstance(medium, dict) else medium
    part = next((c for c in ("mcq", "long", "short", "safety", "video") if c in path), None)
    if part is None:
        raise BadRow(f"has its image at {path!r}: no mcq, long, short, safety or video in it")
    task = "video_understanding" if r.get("video") else "image_understanding"
    yield {"task": task, "prompt": r["prompt"], "responses": [r["chosen"], r["rejected"]],
           "media": [medium], "label": "A", "part": part, "cluster": str(r["id"])}


def genai(r, where):
    """TIGER-Lab/GenAI-Bench (videos are URLs: put the files in videos/), and UnifiedReward's
    data.json, which says video_left for left_video. A: left. Judges of ours never say tie, so
    their 4-way accuracy is at most the share of rows without one."""
    labels = {"leftvote": "A", "rightvote": "B", "tievote": "tie", "bothbad_vote": "bothbad"}
    if r["vote_type"] not in labels:
        raise BadRow(f"has vote_type {r['vote_type']!r}, not one of {', '.join(labels)}")
    kind = "image" if {"left_image", "image_left"} & r.keys() else "video"
    left = r.get(f"left_{kind}") or r[f"{kind}_left"]
    right = r.get(f"right_{kind}") or r[f"{kind}_right"]
    yield {"task": f"{kind}_generation", "prompt": r["prompt"], "media": [left, right],
           "label": labels[r["vote_type"]]}


def videogen_rewardbench(r, where):
    """KwaiVGI/VideoGen-RewardBench, its Overall column, which may carry blanks or be missing: such
    rows do not count. Ties count in the column "with ties" only."""
    label = str(r.get("Overall") or "").strip()
    if label in ("", "nan", "None"):
        label = None
    elif label not in ("A", "B", "same"):
        raise BadRow(f"has Overall {label!r}, not 'A', 'B' or 'same'")
    yield {"task": "video_generation", "prompt": r["prompt"], "media": [r["path_A"], r["path_B"]],
           "label": label, "weight": label in ("A", "B"), "also": "no tie"}


def sharegpt_video(r, where):
    """ShareGPTVideo's sft_dpo_17k.jsonl. A: chosen. UNSPECIFIED: MSRL's test split is not public;
    this is a tenth of the videos with all their pairs, which no stage trains on."""
    held = held_out(r["video"])
    yield {"task": "video_understanding", "prompt": r["prompt"], "media": [r["video"]],
           "responses": [r["chosen"], r["rejected"]], "label": "A" if held else None,
           "weight": held, "cluster": str(r["video"])}


SECTIONS = {  # subset -> how many rows it weighs in its section: math-prm as much as all the code
    "Chat": {"alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95,
             "mt-bench-easy": 28, "mt-bench-med": 40},
    "Chat Hard": {"mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134,
                  "llmbar-adver-GPTInst": 92, "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46},
    "Safety": {"refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154,
               "xstest-should-respond": 250, "donotanswer": 136},
    "Reasoning": {"math-prm": 984, "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164,
                  "hep-python": 164, "hep-rust": 164}}


def rewardbench(r, where):
    """allenai/reward-bench. A: chosen. A section is the mean of its subsets by the counts above,
    the overall figure the mean of the four sections."""
    for section, subsets in SECTIONS.items():
        if r["subset"] in subsets:
            yield {"task": "text", "prompt": r["prompt"], "label": "A", "part": section,
                   "responses": [r["chosen"], r["rejected"]], "subset": r["subset"]}
            return
    raise BadRow(f"has subset {r['subset']!r} of no section; the split to use is 'filtered'")


def rm_bench(r, where):
    """THU-KEG/RM-Bench: three styles of a right and of a wrong answer (0, 1, 2: concise, detailed,
    detailed in Markdown), all nine pairs. A: chosen. It is hard where the wrong answer has the
    richer style. The files of single domains name theirs in the file name only."""
    file = Path(where).name.lower()
    in_name = next((d for d in ("chat", "code", "math", "safety") if d in file), "all")
    domain = str(r.get("domain") or in_name)
    if len(r["chosen"]) != 3 or len(r["rejected"]) != 3:
        raise BadRow("must have three styles in 'chosen' and three in 'rejected'")
    for i, better in enumerate(r["chosen"]):
        for j, worse in enumerate(r["rejected"]):
            level = "easy" if i > j else "hard"
            yield {"task": "text", "prompt": r["prompt"], "responses": [better, worse], "i": i,
                   "j": j, "label": "A", "part": "safety" if "safety" in domain else domain,
                   "also": "normal" if i == j else level}


SUBSETS = ("Factuality", "Focus", "Math", "Precise IF", "Safety", "Ties")


def rewardbench2(r, where):
    """allenai/reward-bench-2: one chosen and three rejected responses; in Ties several correct and
    several wrong ones to a question, which has a row "ref:n" and a row "tied:n". A: chosen. All
    pairs of a chosen and a rejected response, so a judge of pairs does with six judgements what
    best of 4 asks. DEVIATION: the official script for judges shows all four at once and gives 0.25
    for an unparsable answer; such verdicts are read as scores 1 and 0, four equal ones for none."""
    if r["subset"] not in SUBSETS:
        raise BadRow(f"has subset {r['subset']!r}, not one of {', '.join(SUBSETS)}")
    ties = r["subset"] == "Ties"
    kind, _, question = str(r["id"]).partition(":")
    if ties and (kind not in ("ref", "tied") or not r["chosen"] or not r["rejected"]):
        raise BadRow(f"of Ties has id {r['id']!r}, not 'ref:n' or 'tied:n', or lacks responses")
    if not ties and (len(r["chosen"]), len(r["rejected"])) != (1, 3):
        raise BadRow("must have one response in 'chosen' and three in 'rejected'")
    for i, better in enumerate(r["chosen"]):
        for j, worse in enumerate(r["rejected"]):
            pair = {"task": "text", "prompt": r["prompt"], "responses": [better, worse], "i": i,
                    "j": j, "label": "A", "part": r["subset"]}
            if ties:
                pair["cluster"] = f"ties {question}"
            yield pair


def mmrb2(r, where):
    """rl-research/multimodal-rewardbench-2, a config: Multimodal RewardBench 2. A: response_a. Our
    prompts show t2i (two images) and what of `reasoning` has at most one image; a judge refuses
    other rows, which --skip_bad_rows counts as wrong. UNSPECIFIED: how `chosen` spells the sides
    (read: A, a, response_a)."""
    label = str(r["chosen"]).upper().removeprefix("RESPONSE_")
    if label not in ("A", "B"):
        raise BadRow(f"has chosen {r['chosen']!r}, neither A nor B")
    prompt, *responses = [re.sub(r"\s*<image_\d+>", "", r[f"{name}_text"] or "").strip()
                          for name in ("prompt", "response_a", "response_b")]
    images_a, images_b = list(r["response_a_images"] or ()), list(r["response_b_images"] or ())
    media = [*images_a, *images_b, *(r["prompt_images"] or ())]
    task = "image_understanding" if media else "text"
    if images_a and images_b:
        task = "image_generation"
        responses = responses if any(responses) else None  # with texts no judge of ours takes it
    yield {"task": task, "prompt": prompt, "responses": responses, "media": media, "label": label}


# name: (reader, rows as published, hub config, hub split, its file in a folder)
BENCHMARKS = {
    "vl_rewardbench": (vl_rewardbench, (1250, 1247), None, "test", "data/test-*.parquet"),
    "multimodal_rewardbench": (multimodal_rewardbench, (4711,), None, "test", "**/all_data.json"),
    "mm_rlhf_rewardbench": (mm_rlhf_rewardbench, (170,), None, "train", "mm_reward_bench.jsonl"),
    "genai_image": (genai, (1735, 3192), "image_generation", "test_v1",
                    "{config}/{split}-*.parquet"),
    "genai_video": (genai, (1069, 1889), "video_generation", "test_v1",
                    "{config}/{split}-*.parquet"),
    "videogen_rewardbench": (videogen_rewardbench, range(26_000, 27_000), None, "eval",
                             "videogen-rewardbench.csv"),
    "sharegpt_video": (sharegpt_video, range(16_000, 18_000), None, "train",
                       "**/sft_dpo_17k.jsonl"),
    "rewardbench": (rewardbench, (2985,), None, "filtered", "data/filtered-*.parquet"),
    "rm_bench": (rm_bench, (1327, 129, 228, 284, 157, 529), None, "train", "total_dataset.json"),
    "rewardbench2": (rewardbench2, (1865,), None, "test", "data/test-*.parquet"),
    "mmrb2_t2i": (mmrb2, (1000,), "t2i", "test", "{config}/{split}-*.parquet"),
    "mmrb2_edit": (mmrb2, (1000,), "edit", "test", "{config}/{split}-*.parquet"),
    "mmrb2_interleaved": (mmrb2, (1000,), "interleaved", "test", "{config}/{split}-*.parquet"),
    "mmrb2_reasoning": (mmrb2, (1000,), "reasoning", "test", "{config}/{split}-*.parquet"),
    "rows": None}  # preference rows, or a training set that common.py knows


def read_benchmark(name, source, split=None, media=None, skip_bad_rows=False, media_root=""):
    """-> all rows, those that do not count included, so that "row" is the index in the file. Their
    media are paths: "all" of those that can be judged, those "if there", or none (None). Raises
    SystemExit where a row does not have the published form."""
    if name == "rows":
        return plain_rows(source, skip_bad_rows, media_root)
    reader, published, config, default_split, file = BENCHMARKS[name]
    split = split or default_split
    rows, n, roots = [], 0, media_roots(source, media_root)
    for path in files_of(source, file.format(config=config, split=split)):
        for where, raw in benchmark_rows(path, config, split):
            try:
                for row in converted(reader, raw, where, n):
                    row["media"] = media_paths(row, media, Path(path).parent, roots)
                    rows.append(row)
            except BadRow as e:
                raise SystemExit(f"{where}: row {e}.") from None
            except (KeyError, TypeError, ValueError, AttributeError, IndexError, SyntaxError) as e:
                raise SystemExit(f"{where}: row does not have the published form of {name} "
                                 f"({type(e).__name__}: {e}).") from None
            n += 1
    if n not in published and rank() == 0:
        sizes = f"about {published[len(published) // 2]}"
        if isinstance(published, tuple):
            sizes = " or ".join(map(str, published))
        print(f"warning: {source} has {n} rows; {name} as published has {sizes}", file=sys.stderr)
    set_weights(name, rows)
    return rows


def plain_rows(source, skip_bad_rows, media_root):
    """Preference rows as for training; their columns are the subsets, or the tasks."""
    no_model_yet = SimpleNamespace(forbidden=(), kept_as=None, check=lambda row, form: 0)
    rows = load_rows(source, no_model_yet, skip_bad_rows=skip_bad_rows, media_root=media_root)
    for n, row in enumerate(rows):
        row.pop("i", None)  # a user's keys, not RM-Bench's styles
        row.pop("j", None)
        row.pop("also", None)
        row |= {"row": n, "part": row.get("subset") or row["task"], "weight": 1,
                "cluster": f"row {n}"}
    return rows


def converted(reader, raw, where, n):
    """Row n of a data file -> its preference rows, media as published. Raises BadRow, and what else
    a row of another form raises."""
    if isinstance(raw, BadRow):  # file_rows() found no JSON there
        raise raw
    if not isinstance(raw, dict):
        raise BadRow("is not an object")
    names = ("id", "ID", "idx", "pair_id")
    id = next((str(raw[name]) for name in names if raw.get(name) is not None), str(n))
    for fields in reader(raw, where):
        row = {"id": id, "row": n, "part": None, "weight": 1, "cluster": f"row {n}",
               "responses": None, "media": [], **fields}
        row["prompt"] = re.sub(r"\s*<(image|video)>\s*", "", row["prompt"] or "")
        yield row


def media_paths(row, media, folder, roots):
    """-> paths; `media` as for read_benchmark(). Raises BadRow."""
    if not media or not row["label"]:
        return []
    paths = []
    for medium in row["media"]:
        if medium is not None or media == "all":  # the page does without what is missing
            paths.append(find_medium(medium, folder, roots))
    return paths


def grouped(rows, key):
    """-> {value of `key`: its rows}; rows without a value are in no group"""
    groups = {}
    for row in rows:
        groups.setdefault(row.get(key), []).append(row)
    groups.pop(None, None)
    return groups


def set_weights(name, rows):
    """Weigh rows such that the overall figure is the benchmark's own mean of means."""
    if name == "rm_bench":
        sizes = Counter([row["part"] for row in rows])
        for row in rows:
            row["weight"] = 1 / sizes[row["part"]]
    if name == "rewardbench":
        sizes = Counter([row["subset"] for row in rows])
        for row in rows:
            section = SECTIONS[row["part"]]
            total = sum([section[subset] for subset in section if subset in sizes])
            row["weight"] = section[row["subset"]] / total / sizes[row["subset"]]
    if name == "rewardbench2":
        pairs = Counter([row["row"] for row in rows])
        for of_subset in grouped(rows, "part").values():
            n = len({row["row"] for row in of_subset})
            for row in of_subset:
                row["weight"] = 1 / n / pairs[row["row"]]
        warn_of_halves([row for row in rows if row["part"] == "Ties"])


def warn_of_halves(ties):
    """RewardBench 2: the Ties score needs both rows of a question, "ref:n" and "tied:n"."""
    ids = {row["id"] for row in ties}
    for question, rows in grouped(ties, "cluster").items():
        for kind in ("ref", "tied"):
            id = question.replace("ties ", f"{kind}:")
            if id not in ids and rank() == 0:
                print(f"warning: {rows[0]['id']} of Ties is without {id}, which counts as wrong",
                      file=sys.stderr)


def files_of(source, pattern):
    """The file itself or a hub id as it is; of a folder what it holds in the published form."""
    folder = Path(source)
    if not folder.is_dir():
        return [str(source)]
    for name in (pattern, "*.jsonl", "*.json", "*.csv", "*.parquet", "*/*.parquet"):
        files = sorted(map(str, folder.glob(name)))
        if len(files) > 1 and not files[0].endswith(".parquet"):  # whose shards are read in turn
            raise SystemExit(f"{source}: holds {', '.join(files)}; name the one to read.")
        if files:
            return files
    raise SystemExit(f"{source}: holds no {pattern}, nor another file of rows.")


def benchmark_rows(path, config, split):
    """-> (place to name in an error, row as published)"""
    if not path.endswith(".csv"):
        yield from raw_rows(path, config=config, split=split)
        return
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            for n, row in enumerate(csv.DictReader(f), 2):
                yield f"{path}:{n}", row
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise SystemExit(f"{path}: cannot be read ({e}).") from None


def find_medium(medium, folder, roots):
    """An image or video of a row -> its path: beside the data, where the benchmarks' archives put
    it (MM-RLHF's paths are not those of its archive), or in media_cache/ if it came in the row.
    Raises BadRow for one outside of the folders `roots`, see media_roots()."""
    medium = kept_medium(medium)
    last = Path(medium).name
    for name in (medium, f"images/{medium}", f"images/{last}", f"videos/{last}", last):
        if os.path.exists(folder / name):
            check_place(str(folder / name), roots)
            return str(folder / name)
    if Path(medium).is_absolute():  # as on the disk of its author
        return str(folder / last)
    check_place(str(folder / medium), roots)
    return str(folder / medium)
