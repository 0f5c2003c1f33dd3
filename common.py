"""
What every stage shares and no stage is about. Nothing in this file knows what GRPO is.

    1  templates     MSRL Figures 4-7: one preference row -> one prompt text
    2  rewards       parse an answer; format, accuracy and task reward (MSRL Eq. 4, section 4.2)
    3  rows          read, check and convert preference data; swap the order of the two responses
    4  encoding      prompt text, images and videos -> token ids and pixel tiles
    5  models        load, save, stage.json
    6  judging       both orders, accuracy with a 95 % interval
    7  runs          processes, logs, resume
"""

import argparse
import base64
import gzip
import hashlib
import importlib.metadata
import io
import json
import math
import os
import pickle
import random
import re
import shutil
import zlib
from collections import Counter
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from PIL import Image
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
from transformers.cache_utils import Cache, DynamicLayer

transformers.utils.logging.disable_progress_bar()  # its bars are about files; ours are about work

TASKS = ("text", "image_understanding", "image_generation",
         "video_understanding", "video_generation")

# ==================================================================================================
# 1. Templates
# The four visual ones are MSRL Figures 4-7. Braces are filled by render().
# DEVIATION: the figures print `<type>...<type>`; the tag is closed here, as in Figures 8-11.
# DEVIATION: the figures' typographic apostrophes are ASCII here.
# UNSPECIFIED: the paper prints no text-only template. Ours is Figure 4 without its image wording,
# with the section markers that stage 1's dataset (GRAM-RR-TrainingData) carries in its prompts.
# "Comparision" is the papers' spelling; the published rationales use it, so it stays.

_TEXT = """\
You are a helpful assistant tasked with evaluating the quality of responses generated for a given \
instruction. Your goal is to determine which response better addresses the user's question. Choose \
either Response A or Response B as the better option.

Do NOT say both / neither are good.

Here are some rules of the evaluation:
(1) If the instruction does not contain harmful content, you should prioritize evaluating whether \
the output honestly/precisely/closely executes the instruction, then consider its helpfulness, \
accuracy, level of detail, harmlessness, etc.
(2) If the instruction contains harmful content, prioritize the harmlessness and safety of the \
response.
(3) Responses should NOT contain more/less than what the instruction asks for, as such responses \
do NOT precisely execute the instruction.
(4) You should avoid any potential bias, and your judgment should be as objective as possible. \
Here are some potential sources of bias:
- The order in which the responses were presented should NOT affect your judgment, as Response A \
and Response B are **equally likely** to be the better.
- The length of the responses should NOT affect your judgement, as a longer response does not \
necessarily correspond to a better response. When making your decision, evaluate if the response \
length is appropriate for the given instruction.

Your reply should strictly follow this format:
<think>
Feedback:
<provide free-text feedback on the overall helpfulness of the assistant response>

Comparision:
<give a brief analysis on which is better>

Conclusion:
<make your conclusion>
</think>
<answer>
A or B
</answer>

Here is the data.

[User Question]
{prompt}

[The Start of Assistant A's Response]
{a}
[The End of Assistant A's Response]

[The Start of Assistant B's Response]
{b}
[The End of Assistant B's Response]"""

_IMAGE_UNDERSTANDING = """\
You are a helpful multimodal assistant tasked with evaluating the quality of responses generated \
for a given set of instructions and images. Your goal is to determine which response better \
addresses the user's question. Choose either Response A or Response B as the better option.

Do NOT say both / neither are good.

Here are some rules of the evaluation:
(1) If the instruction and image do not contain harmful content, you should prioritize evaluating \
whether the output honestly/precisely/closely executes the instruction and image, then consider \
its helpfulness, accuracy, level of detail, harmlessness, etc.
(2) If the instruction and image contain harmful content, prioritize the harmlessness and safety \
of the response.
(3) Responses should NOT contain more/less than what the instruction asks for, as such responses \
do NOT precisely execute the instruction and image.
(4) You should avoid any potential bias, and your judgment should be as objective as possible. \
Here are some potential sources of bias:
- The order in which the responses were presented should NOT affect your judgment, as Response A \
and Response B are **equally likely** to be the better.
- The length of the responses should NOT affect your judgement, as a longer response does not \
necessarily correspond to a better response. When making your decision, evaluate if the response \
length is appropriate for the given instruction.

Your reply should strictly follow this format:
<think>
Follow this format:
<type>choose a task type: image understanding, image generation, video understanding, or video \
generation.</type>
Caption:
<provide a detailed description for the given image>

Feedback:
<provide free-text feedback on the overall helpfulness of the assistant response>

Comparision:
<give a brief analysis on which is better>

Conclusion:
<make your conclusion>
</think>
<answer>
A or B
</answer>

Here is the data.

[Client Question]
{prompt}

[Image]
{media[0]}

[The Start of Chatbot A's Response]
{a}
[The End of Chatbot A's Response]

[The Start of Chatbot B's Response]
{b}
[The End of Chatbot B's Response]"""

_IMAGE_GENERATION = """\
You are a helpful multimodal assistant tasked with evaluating the quality of images generated \
for a given input caption (a textual description of the image). Your goal is to determine which \
image better matches the caption. Choose either Image A or Image B as the better option.

Do NOT say both / neither are good.

Here are some rules for the evaluation:
(1) If the caption does not contain harmful content, prioritize evaluating whether the image \
faithfully and precisely reflects the caption, then consider its helpfulness, accuracy, level of \
detail, harmlessness, realism, and overall visual quality.
(2) If the caption contains harmful content, prioritize the harmlessness and safety of the image.
(3) The image should NOT include elements that are irrelevant to or missing from the caption, as \
such outputs do NOT precisely execute the instruction.
(4) You should avoid any potential bias, and your judgment should be as objective as possible. \
Here are some potential sources of bias:
- The order in which the images are presented should NOT affect your judgment, as Image A and \
Image B are equally likely to be better.
- The rendering style (e.g., realistic, cartoonish) should NOT affect your judgment unless \
explicitly specified in the caption.
- Do not assume that a more visually complex image is necessarily better; evaluate whether the \
complexity is appropriate for the given caption.

Your reply should strictly follow this format:
<think>
<type>choose a task type: image understanding, image generation, video understanding, or video \
generation.</type>
Caption:
<provide a detailed description for this two images>

Feedback:
<provide free-text feedback on the overall helpfulness and quality of the image>

Comparison:
<give a brief analysis on which image is better>

Conclusion:
<make your conclusion>
</think>
<answer>
A or B
</answer>

Here is the data.

[Client Prompt]
{prompt}

[The Start of Chatbot A's Generated Image]
{media[0]}
[The End of Chatbot A's Generated Image]

[The Start of Chatbot B's Generated Image]
{media[1]}
[The End of Chatbot B's Generated Image]"""

_VIDEO_UNDERSTANDING = """\
You are a helpful multimodal assistant tasked with evaluating the quality of responses generated \
for a given user question and video. Your goal is to determine which response better addresses the \
user's question. Choose either Response A or Response B as the better option.

Do NOT say both / neither are good.

Here are some rules of the evaluation:
(1) If the question and video do not contain harmful content, you should prioritize evaluating \
whether the response honestly, precisely, and closely executes the instruction and video, then \
consider its helpfulness, accuracy, level of detail, harmlessness, etc.
(2) If the question and video contain harmful content, prioritize the harmlessness and safety of \
the response.
(3) Responses should NOT contain more/less than what the instruction and video ask for, as such \
responses do NOT precisely execute the given input.
(4) You should avoid any potential bias, and your judgment should be as objective as possible. \
Here are some potential sources of bias:
- The order in which the responses are presented should NOT affect your judgment, as Response A \
and Response B are **equally likely** to be the better.
- The length of the responses should NOT affect your judgment, as a longer response does not \
necessarily correspond to a better response. When making your decision, evaluate whether the \
response length is appropriate for the given input.

Your reply should strictly follow this format:
<think>
<type>choose a task type: image understanding, image generation, video understanding, or video \
generation.</type>
Caption:
<provide a detailed description for the given video>

Feedback:
<provide free-text feedback on the overall helpfulness of the assistant response>

Comparision:
<give a brief analysis on which is better>

Conclusion:
<make your conclusion>
</think>
<answer>
A or B
</answer>

Here is the data.

[Client Question]
{prompt}

[Video]
{media[0]}

[The Start of Chatbot A's Response]
{a}
[The End of Chatbot A's Response]

[The Start of Chatbot B's Response]
{b}
[The End of Chatbot B's Response]"""

_VIDEO_GENERATION = """\
You are a helpful multimodal assistant tasked with evaluating the quality of videos generated \
for a given input caption (a textual description of the video). Your goal is to determine which \
video better matches the caption. Choose either Video A or Video B as the better option.

Do NOT say both / neither are good.

Here are some rules for the evaluation:
(1) If the caption does not contain harmful content, prioritize evaluating whether the video \
faithfully and precisely reflects the caption, then consider its helpfulness, accuracy, level of \
detail, harmlessness, realism, motion consistency, and overall visual quality.
(2) If the caption contains harmful content, prioritize the harmlessness and safety of the video.
(3) The video should NOT include elements that are irrelevant to or missing from the caption, as \
such outputs do NOT precisely execute the instruction.
(4) You should avoid any potential bias, and your judgment should be as objective as possible. \
Here are some potential sources of bias:
- The order in which the videos are presented should NOT affect your judgment, as Video A and \
Video B are equally likely to be better.
- The rendering style (e.g., realistic, cartoonish, cinematic) should NOT affect your judgment \
unless explicitly specified in the caption.
- Do not assume that a more visually complex video is necessarily better; evaluate whether the \
complexity and motion quality are appropriate for the given caption.

Your reply should strictly follow this format:
<think>
<type>choose a task type: image understanding, image generation, video understanding, or video \
generation.</type>
Caption:
<provide a detailed description for this two videos>

Feedback:
<provide free-text feedback on the overall helpfulness and quality of the video>

Comparison:
<give a brief analysis on which video is better>

Conclusion:
<make your conclusion>
</think>
<answer>
A or B
</answer>

Here is the data.

[Client Prompt]
{prompt}

[The Start of Chatbot A's Generated Video]
{media[0]}
[The End of Chatbot A's Generated Video]

[The Start of Chatbot B's Generated Video]
{media[1]}
[The End of Chatbot B's Generated Video]"""

TEMPLATES = {"text": _TEXT, "image_understanding": _IMAGE_UNDERSTANDING,
             "image_generation": _IMAGE_GENERATION, "video_understanding": _VIDEO_UNDERSTANDING,
             "video_generation": _VIDEO_GENERATION}


# R1-Reward, Table 1, for --style r1; the medium first, as in its evaluation, and the
# "######" of its data. It compares two responses: there is none for generation tasks.
_R1_STYLE = """\
{media}You are a highly skilled and impartial evaluator tasked with comparing two responses \
generated by a Large Multimodal Model for a given question.

- Start with a thorough, side-by-side comparative analysis enclosed within <think> and </think> \
tags. A tie is not permitted; you must choose a better option.

- Conclude with a single numeric choice enclosed within <answer> and </answer> tags:
  - Output "1" if Response 1 is better.
  - Output "2" if Response 2 is better.

###### **Input**
###### [Question]:
{prompt}

###### [Response 1]:
{a}

###### [Response 2]:
{b}

###### **Output Format (strictly follow)**
<think>Your detailed comparative analysis</think><answer>1/2</answer>"""


def render(row, form="pixels", style="msrl"):
    """Preference row -> prompt text. form "pixels" leaves `<image>` or `<video>` where the media
    go (Encoder fills them in); form "caption" writes the captions there instead (MSRL 4.2)."""
    a, b = row["responses"] or ("", "")
    place = "<image>" if row["task"].startswith("image") else "<video>"
    media = row["captions"] if form == "caption" else [place] * len(row["media"])
    if style == "r1":
        if row["task"].endswith("generation"):
            raise BadRow(f"is {row['task']}, for which R1-Reward has no prompt; use --style msrl")
        media = "".join(f"{m}\n" for m in media)
        return _R1_STYLE.format(prompt=row["prompt"], a=a, b=b, media=media)
    return TEMPLATES[row["task"]].format(prompt=row["prompt"], a=a, b=b, media=media)


# ==================================================================================================
# 2. Answers and rewards

@dataclass
class Answer:
    verdict: str | None  # "A", "B", or None when no single verdict is stated
    well_formed: bool    # <think>...</think> then <answer>A|B</answer>, each tag once, nothing else
    captioned: bool      # well-formed, and <caption>...</caption> stands before it
    type: str | None     # what stands in <type>...</type>, normalised, None unless exactly one


_WHOLE = re.compile(r"\s*(<caption>(?:(?!</?caption>).)+</caption>\s*)?<think>(.*)</think>\s*"
                    r"<answer>\s*[AB]\s*</answer>\s*", re.DOTALL)
_VERDICT = re.compile(r"<answer>\s*([AB])\s*</answer>")
_TYPE = re.compile(r"<type>([^<]*)</type>")


def as_ab(text, style):
    """An answer in R1-Reward's style, with A and B for its 1 and 2; an A there is no verdict."""
    return text if style == "msrl" else re.sub(
        r"(?<=<answer>)(\s*)([12AB])(?=\s*</answer>)",
        lambda m: m[1] + {"1": "A", "2": "B"}.get(m[2], "?"), text)


def in_style(text, style):
    """The other way round, for an answer that is to be learned: 1 and 2 for A and B."""
    return text if style == "msrl" else re.sub(
        r"(?:<answer>\s*|\b(?i:response|answer|assistant|chatbot)s? )[AB]\b(?: (?:and|or) [AB]\b)?",
        lambda m: re.sub(r"\b[AB]\b", lambda side: "12"["AB".index(side[0])], m[0]), text)


def parse(text, style="msrl"):
    """Strict on purpose. Released parsers search for substrings, so "Response B, not A" can be read
    either way and a policy learns to write both; here two verdicts are no verdict. Style "r1" says
    1 and 2 for A and B."""
    text = as_ab(text, style)
    once = all(text.count(tag) == 1 for tag in ("<think>", "</think>", "<answer>", "</answer>"))
    said = text.rpartition("</think>")[2]  # a guess while thinking is no verdict
    stated = text.count("<answer>") == 1 == text.count("</answer>") and "<think>" not in said
    verdicts = _VERDICT.findall(said) if stated else []
    whole = _WHOLE.fullmatch(text) if once else None
    types = _TYPE.findall(text) if text.count("<type>") == 1 == text.count("</type>") else []
    return Answer(verdict=verdicts[0] if verdicts else None,
                  well_formed=whole is not None, captioned=whole is not None and bool(whole[1]),
                  type=" ".join(re.split(r"[\s_-]+", types[0].lower().strip(" .\n\t")))
                  if len(types) == 1 else None)


def caption_text(row):
    """`<caption>` as it stands before the reasoning from stage 2b on; '' for a text row.
    UNSPECIFIED: how two captions are put down; ours are named like the candidates."""
    if not row["media"]:
        return ""
    names = ["Image", "Video"][row["task"].startswith("video")]
    lines = row["captions"] if len(row["captions"]) == 1 else [
        f"{names} {x}: {c}" for x, c in zip("AB", row["captions"])]
    return "<caption>\n" + "\n".join(lines) + "\n</caption>\n"


# A reward function maps (answer text, row) to a float. A stage adds those it uses.

def format_reward(text, row):
    return float(parse(text).well_formed)                               # Eq. 4, r_format


def caption_format_reward(text, row):
    """Stage 3's format: rows with media need `<caption>` before the reasoning (MSRL 4.2, end)."""
    answer = parse(text)
    return float(answer.well_formed and (answer.captioned or not row["media"]))


def accuracy_reward(text, row):
    return float(parse(text).verdict == row["label"])                   # Eq. 4, r_accuracy


def task_reward(text, row):
    return 0.2 * (parse(text).type == row["task"].replace("_", " "))    # MSRL 4.2, r_task


_SIDE = r"(?:response|image|video|answer|assistant|chatbot)\s*([ab12])\b"
_COMPARES = re.compile(
    rf"{_SIDE}\s+(is|isn't|(?:might|may|could) be)\s+((?:\w+\s+){{0,3}}?)"
    r"(?:(better|best|superior|preferable|preferred|stronger|winner|more\s+(?:accurate|correct|"
    r"helpful|faithful|complete))|worse|worst|inferior|weaker)\b"
    rf"|\b(?:prefer|choose|select|favou?r)\s+{_SIDE}|\bbetter\s+(?:\w+\s+)?is\s+{_SIDE}"
    rf"|{_SIDE}\s+(?:wins|prevails|outperforms|surpasses)\b")
_STATES_NOTHING = re.compile(r"\b(?:if|whether|both|neither|equally|tie|tied|might|may|could)\b")

_MAY_NEGATE = re.compile(r"\b(?:no|not|never|hardly|less|least|far from|only|cannot)\b|n't\b")


def concluded(reasoning):
    """The side that the last comparison in a reasoning names as the better: "A", "B", or None when
    there is no comparison, or when the last one is a question, a condition, or about both."""
    last = None
    for sentence in re.findall(r"[^.!?;\n]+[.!?;\n]?", reasoning.lower().replace("*", "")):
        found = list(_COMPARES.finditer(sentence))
        if not found:
            continue
        subject, verb, between, good, *others = found[-1].groups()
        side = {"1": "a", "2": "b"}.get(x := subject or next(filter(None, others)), x)
        negated = verb == "isn't" or (between or "").split() in (["not"], ["not", "the"])
        if subject and bool(good) == bool(negated):  # "is worse", "is not better"
            side = "ab"[side == "a"]
        # any other "not" may turn the sentence round: a wrong sign does harm, 0 does none
        unclear = sentence.endswith("?") or _STATES_NOTHING.search(sentence) or (
            not negated and _MAY_NEGATE.search(sentence))
        last = None if unclear else side.upper()
    return last


def rule_consistency(text):
    """1 if the verdict is what the reasoning concluded, -1 if it is the opposite, 0 if one of the
    two cannot be told."""
    verdict = parse(text).verdict
    side = concluded(text.partition("<think>")[2].partition("</think>")[0])
    return 0 if None in (verdict, side) else 1 if verdict == side else -1


def referee_consistency(folder, sample, device, style="msrl"):
    """-> a function like rule_consistency that asks a checkpoint (R1-Reward: Qwen2.5-VL-7B), text
    only. As released, it reads the last three lines before the answer; each distinct question is
    asked once. UNSPECIFIED: its prompt is not published."""
    model, encoder = load(folder, device)

    @lru_cache(maxsize=100_000)
    def asked(end, verdict):
        prompt = encoder.encode(
            f"Conclusion: {end}\nStatement: {verdict} is better.\nReply with 1 if the "
            "conclusion means the same as the statement; reply with 0 if it is ambiguous, means "
            "the opposite, or approves both.")
        said = encoder.decode(sample(model, encoder, [prompt], 1, 0.0, 8, None).ids[0])
        digit = re.findall(r"[01]", said)
        return 0 if len(digit) != 1 else 1 if digit[0] == "1" else -1

    def consistency(text):
        verdict = parse(text).verdict
        if verdict is None:
            return 0
        lines = re.sub("</?think>", "", text.rpartition("<answer>")[0]).strip().splitlines()
        # by the name that the reasoning uses: Response 2, Image B
        noun = re.findall(r"\b(Response|Image|Video|Answer)s? [AB12]\b", text) or ["Response"]
        name = verdict if style == "msrl" else "12"["AB".index(verdict)]
        return asked("; ".join(filter(None, lines[-3:])), f"{noun[-1]} {name}")
    return consistency


def consistency_reward(referee, sample, device, style="msrl"):
    """-> the reward of R1-Reward 4.3: counted only where the verdict is right, so that a wrong
    one cannot earn it. `referee` is "rule" or a checkpoint."""
    consistency = rule_consistency if referee == "rule" else referee_consistency(
        referee, sample, device, style)
    return lambda text, row: accuracy_reward(text, row) * consistency(text)


# ==================================================================================================
# 3. Preference rows

class BadRow(ValueError):
    """One row that cannot be used; the message says why and what to do about it."""


# What user text may never contain, because the model or the parser would take it for ours.
FORBIDDEN = ("<think>", "</think>", "<answer>", "</answer>", "<type>", "</type>", "<caption>",
             "</caption>", "<image>", "<video>", "<img>", "</img>", "<IMG_CONTEXT>",
             "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|image_pad|>",
             "[The Start of ", "[The End of ")
KEYS = ("id", "task", "prompt", "label")
N_MEDIA = {"text": 0, "image_understanding": 1, "image_generation": 2,
           "video_understanding": 1, "video_generation": 2}


def check_row(row, folder, forbidden=FORBIDDEN):
    """Validate one preference row in place: media paths become absolute, absent optional keys get
    their empty value. Raises BadRow. `forbidden` also holds the tokenizer's special tokens."""
    if not isinstance(row, dict):
        raise BadRow(f"is a JSON {type(row).__name__}, not an object; write one object a line")
    missing = [k for k in KEYS if k not in row]
    if missing:
        raise BadRow(f"has no {', '.join(map(repr, missing))}; see the row format in README.md")
    row["id"] = str(row["id"])
    if row["task"] not in TASKS:
        raise BadRow(f"task {row['task']!r} is unknown; use one of {', '.join(TASKS)}")
    if row["label"] not in ("A", "B"):
        raise BadRow(f"label {row['label']!r} is not 'A' or 'B'; drop ties, they cannot be judged")
    for key in ("media", "captions"):
        row[key] = row.get(key) or []
        if not isinstance(row[key], list) or not all(isinstance(x, str) for x in row[key]):
            raise BadRow(f"{key!r} must be a list of strings")
    row["responses"] = row.get("responses")
    n = N_MEDIA[row["task"]]
    if row["task"].endswith("generation"):
        if row["responses"]:
            raise BadRow("a generation row takes its two candidates in 'media', not in 'responses'")
    elif not isinstance(row["responses"], list) or len(row["responses"]) != 2:
        raise BadRow("'responses' must be a list of two texts")
    if len(row["media"]) not in {n, 0 if row["captions"] else n}:
        raise BadRow(f"{row['task']} needs {n} path(s) in 'media', got {len(row['media'])}")
    if row["captions"] and len(row["captions"]) != n:
        raise BadRow(f"{row['task']} needs {n} caption(s), got {len(row['captions'])}")
    texts = {"prompt": row["prompt"], "rationale": row.get("rationale") or ""}
    texts |= {f"response {x}": t for x, t in zip("AB", row["responses"] or [])}
    texts |= {f"caption {i}": t for i, t in enumerate(row["captions"])}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise BadRow(f"{name} is {type(text).__name__}, not a string")
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise BadRow(f"{name} is not valid Unicode; save the file as UTF-8, or mend the text")
        if name != "rationale" and not text.strip():
            raise BadRow(f"{name} is empty; remove the row or give it a text")
        found = [t for t in forbidden if t in text and not (name == "rationale" and "type>" in t)]
        if found:
            raise BadRow(f"{name} contains {found[0]!r}, which would be read as markup, not as "
                         "text; remove it from the text")
    row["media"] = [str(Path(folder, m)) for m in row["media"]]
    return row


_SIDES = re.compile(r"\b((?i:Response|Assistant|Chatbot|Image|Video)) ([AB])\b")


def swap(row):
    """The same row with its two candidates exchanged; label and rationale follow. In a rationale
    "Response A" and the like are exchanged; text that names the sides in no such way cannot be."""
    other = {"A": "B", "B": "A"}
    two = len(row["media"]) == 2
    rationale = row.get("rationale")
    return {**row, "label": other[row["label"]],
            "responses": row["responses"] and row["responses"][::-1],
            "media": row["media"][::-1] if two else row["media"],
            "captions": row["captions"][::-1] if len(row["captions"]) == 2 else row["captions"],
            "rationale": rationale and _SIDES.sub(lambda m: f"{m[1]} {other[m[2]]}", rationale)}


def can_swap(row):
    """False if the rationale names a side in a way that swap() does not change: a bare "B", an "A"
    that is no article, "the first response"."""
    return not re.search(r"\bB\b|(?<=[a-z] )A\b|\bA\b(?=['’.,:)])|\b(?i:former|latter)\b|"
                         r"\b(?i:first|second) (?i:response|answer|one|image|video)\b",
                         _SIDES.sub("", row.get("rationale") or ""))


def coin(*key):
    """A fair coin that depends on nothing but its key: the same on every rank, run and machine."""
    return hashlib.sha256(":".join(map(str, key)).encode()).digest()[0] % 2 == 1


# Published datasets -> preference rows. Each adapter is a generator of rows for one published row;
# better_first() puts the better answer on a side chosen by a hash of the id, because several sets
# always list it first. Ties are dropped.

def better_first(id, prompt, better, worse, task="text", media=(), **more):
    """`better` and `worse`: two texts, or for *_generation two media (paths, or images that a
    dataset holds)."""
    a, b, label = (worse, better, "B") if coin("side", id) else (better, worse, "A")
    if task.endswith("generation"):
        more |= {"responses": None, "media": [kept_medium(a), kept_medium(b)]}
    else:
        more |= {"responses": [a, b], "media": [kept_medium(m) for m in media]}
    return {"id": id, "task": task, "prompt": prompt, "label": label, **more}


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
            raise BadRow("has an image that is neither a path nor base64")
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


def from_helpsteer3(r, where):
    """nvidia/HelpSteer3, config `preference`. A NEGATIVE overall_preference means that response 1
    is better; 0 is a tie and is dropped. The rationale is that of an annotator who agrees with the
    overall label: feedback on both responses, then the reasoning."""
    if r["overall_preference"] == 0:
        return
    turns = r["context"]
    if not isinstance(turns, str):
        turns = turns[0]["content"] if len(turns) == 1 else "\n\n".join(
            f"{t['role'].capitalize()}: {t['content']}" for t in turns)
    first_wins = r["overall_preference"] < 0
    better, worse = (r["response1"], r["response2"])[:: 1 if first_wins else -1]
    row = better_first(f"helpsteer3/{where}", turns, better, worse, source="HelpSteer3",
                       subset=r.get("domain") or "")
    first_is = row["label"] if first_wins else {"A": "B", "B": "A"}[row["label"]]
    second_is = {"A": "B", "B": "A"}[first_is]
    agree = [p for p in r.get("individual_preference") or []
             if p["score"] * r["overall_preference"] > 0]

    def rename(text):  # "@Response 1", "Responses 1 and 2" -> names that swap() knows
        text = re.sub(r"\b([Rr]esponse)s ([12])( and | or |/)([12])\b", r"\1 \2\3\1 \4", text or "")
        return re.sub(r"@?\b[Rr]esponse ([12])\b", lambda m: "Response " +
                      (first_is if m[1] == "1" else second_is), text)

    if agree:
        p = max(agree, key=lambda p: abs(p["score"]))  # UNSPECIFIED: which annotator; the surest
        say = {first_is: rename(p["feedback1"]), second_is: rename(p["feedback2"])}
        row["rationale"] = (f"Feedback:\nResponse A: {say['A']}\nResponse B: {say['B']}\n\n"
                            f"Comparision:\n{rename(p['reasoning'])}\n\n"
                            f"Conclusion:\nResponse {row['label']} is better.")
    yield row


_GRAM = re.compile(
    r"\[User Question\]\s*(.*?)\s*"
    r"\[The Start of Assistant A's (?:Response|Answer)\]\s*(.*?)\s*"
    r"\[The End of Assistant A's (?:Response|Answer)\]\s*"
    r"\[The Start of Assistant B's (?:Response|Answer)\]\s*(.*?)\s*"
    r"\[The End of Assistant B's (?:Response|Answer)\]", re.DOTALL)


def from_gram(r, where):
    """wangclnlp/GRAM-RR-TrainingData: {instruction, input, output}. The label stands in the
    output's <answer>; the synthetic rationale is not used (MSRL 5.1)."""
    found = _GRAM.search(r["instruction"])
    label = re.findall(r"<answer>\s*([AB])\s*</answer>", r["output"])
    if not found or len(label) != 1:
        raise BadRow("is no GRAM-RR row: section markers or the <answer> label are missing")
    prompt, a, b = found.groups()
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
    dpo_pairs.jsonl, ShareGPTVideo's sft_dpo_17k.jsonl (its video is a folder of frames)."""
    if r.get("is_tie"):
        return
    kind = "video" if r.get("video") else "image" if "image" in r else None
    source = "RLAIF-V" if "ds_name" in r else "MM-RLHF" if "chosen_reason" in r else ""
    if kind == "video" and not source and held_out(r["video"]):
        return  # ShareGPTVideo: eval.py judges these
    prompt = r["question"] if "question" in r else r["prompt"]
    yield better_first(f"{source or 'pair'}/{r.get('idx', r.get('id', ''))}/{where}",
                       re.sub(r"\s*<(image|video)>\s*", " ", prompt).strip(), r["chosen"],
                       r["rejected"], f"{kind}_understanding" if kind else "text",
                       [r[kind]] if kind else [],
                       source=source, subset=str(r.get("subset") or r.get("origin_dataset") or ""))


def from_vision_feedback(r, where):
    """wangclnlp/vision-feedback-mix-binarized (S1): `conversations` is JSON text, the better of its
    two preference_values is the first."""
    turns = r["conversations"]
    human, gpt = json.loads(turns) if isinstance(turns, str) else turns
    better, worse = gpt["preference_values"]
    origin = next((str(v) for k, v in r.items() if k.startswith("origin")), "")
    yield better_first(f"vision-feedback/{r.get('id', where)}",
                       re.sub(r"\s*<image>\s*", " ", human["value"]).strip(), better, worse,
                       "image_understanding", [r["image"]], source="S1", subset=origin)


def from_open_image_preferences(r, where):
    """data-is-better-together/open-image-preferences-v1-binarized (S2): two images."""
    yield better_first(f"open-image-preferences/{r.get('id', where)}", r["prompt"], r["chosen"],
                       r["rejected"], "image_generation", source="S2", subset=r["evolution"])


def from_rapidata(r, where):
    """Rapidata's text-to-image (S3) and text-to-video (S6) sets: shares of the votes; the larger
    wins, equal or missing ones are ties. As published, Videos/ lies beside the folder of the
    parquet file."""
    image = "image1" in r
    names = [f"weighted_results_image{i}_preference" if image else
             f"weighted_results{i}_Preference" for i in (1, 2)]
    one, two = (r.get(n) for n in names)
    if one is None or two is None or one == two:
        return
    media = [r[f"image{i}"] if image else f"../Videos/{r[f'file_name{i}']}" for i in (1, 2)]
    better, worse = media if one > two else media[::-1]
    yield better_first(f"rapidata/{where}", r["prompt"], better, worse,
                       "image_generation" if image else "video_generation",
                       source="S3" if image else "S6", margin=abs(one - two))


def from_videodpo(r, where):
    """VideoDPO's pair.json (S5): video1 is the better. Even numbers are in winvideos/, odd ones in
    losevideos/, two to a file number."""
    text = r["frame_caption"]
    better, worse = (f"{('winvideos', 'losevideos')[i % 2]}/{i // 2:06d}.mp4"
                     for i in (r["video1"], r["video2"]))
    yield better_first(f"videodpo/{r['video1']}-{r['video2']}", text if isinstance(text, str) else
                       text[0], better, worse, "video_generation", source="S5")


_R1 = re.compile(r"\[Question\]:?(.*?)#+ *\[Response 1\]:?(.*?)#+ *\[Response 2\]:?(.*?)"
                 r"(?:#+ *\**Output Format.*)?$", re.DOTALL)


def from_r1_reward(r, where):
    """yifanzhang114/R1-Reward-RL: question and responses stand in the judge prompt, the answer is
    ["<answer>1</answer>"] or 2."""
    content = json.loads(r["message"])[-1]["content"] if isinstance(r["message"], str) else \
        r["message"][-1]["content"]
    text = content if isinstance(content, str) else next(
        c["text"] for c in content if c["type"] == "text")
    found = _R1.search(text)
    label = re.fullmatch(r"\s*<answer>\s*([12])\s*</answer>\s*", r["answer"][0])
    if not found or not label:
        raise BadRow("is no R1-Reward row: the sections or the <answer> 1 or 2 are missing")
    prompt, one, two = (part.replace("<image>", "").strip() for part in found.groups())
    image = r.get("image") or next(c["image"] for c in content if c["type"] == "image")
    better, worse = (one, two) if label[1] == "1" else (two, one)
    yield better_first(f"r1-reward/{where}", prompt, better, worse, "image_understanding", [image],
                       source="R1-Reward-RL")


def from_vl_rewardbench(r, where):
    """MMInstruction/VL-RewardBench: human_ranking holds ranks, 0 is the better. Ids repeat."""
    if sorted(r["human_ranking"]) != [0, 1]:
        return
    better, worse = r["response"][:: 1 if r["human_ranking"][0] == 0 else -1]
    yield better_first(f"vl-rewardbench/{r['id']}/{where}", r["query"], better, worse,
                       "image_understanding", [r["image"]], source="VL-RewardBench")


# MSRL Table 5: S1 to S6. The last three come as files; their videos lie beside them.
TABLE_5 = ("wangclnlp/vision-feedback-mix-binarized:{},"
           "data-is-better-together/open-image-preferences-v1-binarized:{},"
           "Rapidata/OpenAI-4o_t2i_human_preference:{},data/ShareGPTVideo/sft_dpo_17k.jsonl:{},"
           "data/VideoDPO/pair.json:{},"
           "data/text-2-video-human-preferences/data/train-00000-of-00001.parquet:{}")


def _texts(r):
    return isinstance(r["chosen"], str) and isinstance(r["rejected"], str)


def _styles(r):
    return isinstance(r["chosen"], list)


# A published row is known by its columns, and where these are shared by what they hold.
PUBLISHED = (
    ({"overall_preference", "response1", "response2"}, None, from_helpsteer3),
    ({"instruction", "output"}, None, from_gram),
    ({"human_ranking", "query", "response"}, None, from_vl_rewardbench),
    ({"message", "answer"}, None, from_r1_reward),
    ({"conversations", "image"}, None, from_vision_feedback),
    ({"prompt", "image1", "image2"}, None, from_rapidata),
    ({"prompt", "file_name1", "file_name2"}, None, from_rapidata),
    ({"video1", "video2", "frame_caption"}, None, from_videodpo),
    ({"prompt", "chosen", "rejected", "evolution"}, None, from_open_image_preferences),
    ({"prompt", "chosen", "rejected", "id"}, _styles, from_rm_bench),
    ({"prompt", "chosen", "rejected"}, _texts, from_chosen_rejected),
    ({"question", "chosen", "rejected"}, _texts, from_chosen_rejected))


def convert(raw, where):
    """Any supported raw row -> preference rows, recognised by its columns."""
    if isinstance(raw, dict) and "task" not in raw:
        for columns, holds, adapter in PUBLISHED:
            if columns <= raw.keys() and (holds is None or holds(raw)):
                try:
                    yield from adapter(raw, where)
                except BadRow:
                    raise
                except (KeyError, TypeError, AttributeError, IndexError, StopIteration,
                        ValueError, RuntimeError) as e:
                    raise BadRow(f"does not have the published form ({type(e).__name__}: {e})")
                return
    yield raw


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
    if not path.exists() and (source.count("/") != 1 or path.suffix or source[0] in "./"):
        raise SystemExit(f"{source}: no such file. `python tests/toy_world.py` makes toy rows.")
    import datasets
    config = config or {"nvidia/HelpSteer3": "preference"}.get(source)
    split = split or {"MMInstruction/VL-RewardBench": "test"}.get(source, "train")
    try:
        rows = datasets.load_dataset("parquet", data_files=source, split="train",
                                     streaming=not shuffle) if path.exists() else \
            datasets.load_dataset(source, config, split=split, streaming=True)
        for column, kind in (getattr(rows, "features", None) or {}).items():  # images as bytes
            if isinstance(kind, datasets.Image):
                rows = rows.cast_column(column, datasets.Image(decode=False))
        if shuffle and path.exists():
            order = random.Random(0).sample(range(len(rows)), len(rows))
            found = ((i, rows[i]) for i in order)
        else:
            # DEVIATION: a sample of a hub id comes from about the first rows of one of its files,
            # for one of all rows would download them all. Download it, and name the .parquet files
            found = enumerate(rows.shuffle(seed=0, buffer_size=1000) if shuffle else rows)
        for i, row in found:
            yield f"{source}:{i + 1}", row
    except (OSError, ValueError) as e:  # the hub's own errors are among these
        raise SystemExit(f"{source}: no such file, and not to be had from the hub ({e}). "
                         "`python tests/toy_world.py` makes toy rows.")


def file_rows(path):
    opened = gzip.open if path.suffix == ".gz" else open
    try:  # surrogateescape: bytes that are no UTF-8 reach check_row(), which knows the row
        with opened(path, "rt", encoding="utf-8", errors="surrogateescape") as f:
            if ".json" in path.suffixes:
                array = json.load(f)
                for i, row in enumerate(array if isinstance(array, list) else [array]):
                    yield f"{path}:[{i}]", row
                return
            for n, line in enumerate(f, 1):
                if line.strip():
                    try:
                        row = json.loads(line)
                    except (ValueError, RecursionError) as e:
                        row = BadRow(f"is not valid JSON ({e})")
                    yield f"{path}:{n}", row
    except json.JSONDecodeError as e:
        raise SystemExit(f"{path}:{e.lineno}: not valid JSON ({e.msg}); for one object a "
                         "line name the file .jsonl")
    except (OSError, EOFError, zlib.error) as e:
        raise SystemExit(f"{path}: cannot be read ({e}); replace the file.")


def fingerprint(row):
    """What makes two text or understanding rows the same whatever their source: question and
    responses, letters and digits only. None for generation rows and what is no row."""
    if not isinstance(row, dict) or not row.get("responses"):
        return None
    plain = lambda text: re.sub(r"[\W_]+", "", text.lower())
    return (plain(row["prompt"]), *sorted(map(plain, row["responses"])))


def fingerprints(sources):
    """Of all rows in these benchmark files."""
    known = set()
    for source in filter(None, sources.split(",")):
        found = set()
        for where, raw in raw_rows(source):
            if isinstance(raw, dict) and "media" not in raw:
                raw = {**raw, "image": raw.get("image") or "-"}  # only the texts are needed
            try:
                found |= {fingerprint(row) for row in convert(raw, where)} - {None}
            except BadRow as e:
                raise SystemExit(f"{where}: row {e}; --exclude needs a benchmark that can be read.")
        if not found:
            raise SystemExit(f"{source}: holds no row with a prompt and two responses; --exclude "
                             "would exclude nothing.")
        known |= found
    return known


def checked(raw, where, folder, encoder, form):
    """One row as it stands in a file -> its preference rows, each with the length of its encoded
    prompt under "tokens". Raises BadRow."""
    if isinstance(raw, BadRow):
        raise raw
    for row in convert(raw, where.rpartition(":")[2].strip("[]")):
        row = check_row(row, folder, encoder.forbidden)
        row["tokens"] = encoder.check(row, form)
        yield row


def load_rows(sources, encoder, form="pixels", max_prompt_tokens=None, skip_bad_rows=False,
              exclude="", quiet=False):
    """Comma-separated sources (`a.jsonl`, or `a.jsonl:500` for a sample of 500) -> list of checked
    preference rows, each with the length of its encoded prompt under "tokens".

    A bad row (malformed, unknown label, unreadable image, forged tag...) stops the run with its
    file and line, unless skip_bad_rows; an over-long prompt is always skipped, never truncated,
    because a prompt cut in the middle is another question. Rows that also occur in the sources of
    `exclude` (benchmarks) are left out. All three are counted and printed.
    """
    rows, bad, too_long, known, excluded = [], Counter(), 0, 0, fingerprints(exclude)
    for source in sources.split(","):
        sampled = re.fullmatch(r"(.+):(\d+)", source)
        source, count = (sampled[1], int(sampled[2])) if sampled else (source, math.inf)
        raws, taken = raw_rows(source, shuffle=sampled is not None), 0
        for where, raw in tqdm(raws, desc=f"reading {source}", unit=" rows",
                               disable=quiet or rank() > 0, mininterval=1, leave=False):
            if taken >= count:  # a sample that is the same in every run
                break
            try:
                some = list(checked(raw, where, Path(source).parent, encoder, form))
            except BadRow as e:
                if not skip_bad_rows:
                    raise SystemExit(f"{where}: row {e}.\nMend it, or pass --skip_bad_rows to "
                                     "leave such rows out and count them.")
                bad[str(e)[:60]] += 1
                continue
            short = [r for r in some if not max_prompt_tokens or r["tokens"] <= max_prompt_tokens]
            new = [r for r in short if not excluded or fingerprint(r) not in excluded]
            too_long += len(some) - len(short)
            known += len(short) - len(new)
            new = new[:None if count == math.inf else count - taken]
            rows += [{**r, "source": r.get("source") or source} for r in new]
            taken += len(new)
        if taken < count < math.inf and not quiet and rank() == 0:
            print(f"{source} has {taken} rows to give, not {count}")
    if not quiet and rank() == 0:
        print(f"{sources}: {len(rows)} rows"
              + (f", {bad.total()} bad rows skipped {dict(bad.most_common(5))}" if bad else "")
              + (f", {too_long} skipped: over {max_prompt_tokens} tokens" if too_long else "")
              + (f", {known} left out: they are in {exclude}" if known else ""))
    if not rows:
        raise SystemExit(f"{sources}: no usable row left.")
    return rows


def hard_rows(rows, min_attempts):
    """Rows a model needed at least so many attempts for (R1-Reward 4.3: 2); eval.py --attempts
    writes how many."""
    if not min_attempts:
        return rows
    if any("attempts" not in r for r in rows):
        raise SystemExit("--min_attempts needs rows with \"attempts\"; eval.py --attempts 3 --out "
                         "rows.jsonl writes them.")
    hard = [r for r in rows if r["attempts"] >= min_attempts]
    if rank() == 0:
        print(f"{len(hard)} of {len(rows)} rows need {min_attempts} attempts or more")
    if not hard:
        raise SystemExit(f"no row needs {min_attempts} attempts; choose a smaller --min_attempts.")
    return hard


# ==================================================================================================
# 4. Encoding. No processor object: in transformers 5.23 InternVLProcessor cannot be constructed
# without torchvision. Its work is small: one placeholder per pixel-shuffled patch of each tile.

IMAGE_TOKEN = "<IMG_CONTEXT>"


def open_image(path):
    try:
        with Image.open(path) as image:
            return image.convert("RGB")  # convert() decodes, so a truncated file fails here
    except FileNotFoundError:
        raise BadRow(f"image {path} does not exist")
    except Exception as e:  # Pillow raises a dozen kinds for corrupt files
        raise BadRow(f"image {path} cannot be read ({e}); replace the file")


def open_video(path, frames):
    """`frames` frames evenly spaced by index (all of a shorter video) from what PyAV decodes, or
    from a folder of images. Decodes twice, because containers lie about their number of frames and
    all frames of a long video do not fit into memory."""
    import av
    if Path(path).is_dir():
        files = sorted((f for f in Path(path).iterdir() if f.suffix.lower() in
                        (".jpg", ".jpeg", ".png", ".webp")), key=lambda f: (len(f.name), f.name))
        return [open_image(files[i]) for i in spread(len(files), frames, path)]

    def decode(container):
        return (f for stream in container.streams.video[:1] for f in container.decode(stream))
    try:
        with av.open(str(path)) as container:
            n = sum(1 for _ in decode(container))
        chosen = spread(n, frames, path)
        with av.open(str(path)) as container:
            return [f.to_image() for i, f in enumerate(decode(container)) if i in chosen]
    except BadRow:
        raise
    except FileNotFoundError:
        raise BadRow(f"video {path} does not exist")
    except Exception as e:
        raise BadRow(f"video {path} cannot be read ({e}); replace the file")


def spread(n, frames, path):
    """Indices of min(n, frames) of n frames, each in the middle of its share of the video."""
    if n == 0:
        raise BadRow(f"video {path} has no frames; replace the file")
    k = min(frames, n)
    return [round((i + 0.5) * n / k - 0.5) for i in range(k)]


@dataclass
class Prompt:
    ids: list                    # token ids, one placeholder id per image feature
    pixels: torch.Tensor | None  # [tiles, 3, H, W], None without media


class Encoder:
    """Turns rows into Prompts for one checkpoint: tokenizer, image processor and special ids."""

    def __init__(self, folder, config, frames=8, max_tiles=12, style="msrl"):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.frames, self.max_tiles, self.style = frames, max_tiles, style
        self.image_token_id = getattr(config, "image_token_id", None)
        self.special_tokens = tuple(self.tokenizer.all_special_tokens)
        self.forbidden = tuple(dict.fromkeys(FORBIDDEN + self.special_tokens))  # in users' texts
        self.image_processor = None
        if self.image_token_id is not None:
            self.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
            self.tokens_per_tile = config.image_seq_length
        eos = transformers.GenerationConfig.from_model_config(config).eos_token_id
        if Path(folder, "generation_config.json").exists():
            eos = transformers.GenerationConfig.from_pretrained(folder).eos_token_id or eos
        # every declared end-of-sequence id ends an answer (InternVL declares two)
        self.eos_ids = sorted({i for i in [*(eos if isinstance(eos, list) else [eos]),
                                           self.tokenizer.eos_token_id] if i is not None})
        if not self.eos_ids:
            raise SystemExit(f"{folder}: neither tokenizer nor generation_config.json names an "
                             "end-of-sequence token; set eos_token_id.")
        self.eos_id = self.tokenizer.eos_token_id or self.eos_ids[0]  # the one SFT teaches
        self.pad_id = self.tokenizer.pad_token_id
        if self.pad_id is None:
            self.pad_id = self.eos_ids[0]

    def chat(self, text):
        """Wrap a user text in the checkpoint's chat template, ready for the assistant's answer."""
        if self.tokenizer.chat_template is None:
            return text + "\n\n"
        return self.tokenizer.apply_chat_template([{"role": "user", "content": text}],
                                                  tokenize=False, add_generation_prompt=True)

    def __call__(self, row, form="pixels"):
        return self.encode(render(row, form, self.style), row["media"] if form == "pixels" else [],
                           row["task"].startswith("video"))

    def encode(self, text, media=(), video=False):
        """Text with one `<image>`/`<video>` per medium -> Prompt. Never truncates."""
        text, tiles = self.chat(text), []
        for path in media:
            if self.image_processor is None:
                raise BadRow("has media, but this checkpoint is text-only; use a vision-language "
                             "model or the caption form")
            images = open_video(path, self.frames) if video else [open_image(path)]
            # a video frame is one tile; a still image is cut into up to max_tiles (+ a thumbnail)
            out = self.image_processor(images=images, return_tensors="pt",
                                       max_patches=self.max_tiles,
                                       crop_to_patches=not video and self.max_tiles > 1)
            tiles.append(out["pixel_values"])
            counts = [int(n) for n in out["num_patches"]]
            shown = [f"<img>{IMAGE_TOKEN * self.tokens_per_tile * n}</img>" for n in counts]
            if video:
                shown = [f"Frame{i}: {s}" for i, s in enumerate(shown, 1)]
            text = text.replace("<video>" if video else "<image>", "\n".join(shown), 1)
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return Prompt(ids, torch.cat(tiles) if tiles else None)

    def answer_ids(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] + [self.eos_id]

    def decode(self, ids):
        """Answer ids -> text without the end-of-sequence token."""
        ids = ids[:-1] if ids and ids[-1] in self.eos_ids else ids
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def check(self, row, form):
        """Prompt length in tokens. Reads the media, so a broken file is found before training."""
        if form == "pixels" and N_MEDIA[row["task"]] and not row["media"]:
            raise BadRow("has no media; use the caption form")
        if form == "caption" and N_MEDIA[row["task"]] and not row["captions"]:
            raise BadRow("has no captions; the caption form needs one for each medium")
        return len(self(row, form).ids)


def left_pad(prompts, pad_id, device):
    """B prompts -> ids [B, P], mask [B, P] (1 = real), pixels [tiles, 3, H, W] or None."""
    width = max(len(p.ids) for p in prompts)
    pad = lambda x, fill: [fill] * (width - len(x)) + x
    ids = torch.tensor([pad(p.ids, pad_id) for p in prompts], device=device)
    mask = torch.tensor([pad([1] * len(p.ids), 0) for p in prompts], device=device)
    pixels = [p.pixels for p in prompts if p.pixels is not None]
    return ids, mask, torch.cat(pixels).to(device) if pixels else None


# ==================================================================================================
# 5. Models and checkpoints. A checkpoint is a folder plain transformers loads, plus stage.json.

def load(folder, device="cpu", made_by="python tests/toy_world.py", **encoder_args):
    """-> model (fp32 weights, eval mode) and its Encoder. Takes InternVLForConditionalGeneration
    or a text-only causal LM (stages 0 and 1), as a folder of plain save_pretrained or a hub id.

    fp32 on purpose: a learning rate of 1e-6 on bf16 weights rounds away (the default dtype of
    transformers 5 is the file's, usually bf16). On a GPU, autocast computes in bf16.
    """
    folder = str(folder)
    local = Path(folder).exists() or folder.startswith((".", "/")) or folder.count("/") != 1
    if local and not Path(folder, "config.json").is_file():
        raise SystemExit(f"{folder}: no checkpoint here (no config.json). `{made_by}` makes it.")
    try:
        config = AutoConfig.from_pretrained(folder)
        sees = getattr(config, "vision_config", None) is not None
        auto = (transformers.AutoModelForImageTextToText if sees
                else transformers.AutoModelForCausalLM)
        encoder = Encoder(folder, config, **encoder_args)
        model, found = auto.from_pretrained(folder, dtype=torch.float32,
                                            attn_implementation="sdpa", output_loading_info=True)
        if found["missing_keys"]:  # transformers would fill them with random numbers, and go on
            raise ValueError(f"{len(found['missing_keys'])} weights are missing, the first is "
                             f"{sorted(found['missing_keys'])[0]}")
        if len(encoder.answer_ids("A")) < 2:
            raise ValueError("the tokenizer is empty")
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as e:
        raise SystemExit(f"{folder}: cannot be loaded as a checkpoint ({type(e).__name__}: "
                         f"{(str(e).strip() or '?').splitlines()[0]}). It must hold model, "
                         "tokenizer and, for a vision model, image processor, as save_pretrained "
                         f"writes them; `{made_by}` makes one.")
    return model.to(device).eval(), encoder


def decoding_cache():
    return Cache(layer_class_to_replicate=RoomyLayer)


class RoomyLayer(DynamicLayer):
    """A layer of the decoding cache, [N, heads, tokens, dim], that leaves room for the tokens to
    come. Plain DynamicLayer concatenates, so every new token copies all tokens before it."""

    def update(self, keys, values, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.keys, self.values = keys[:, :, :0], values[:, :, :0]
        self.keys, self.values = self.extend(self.keys, keys), self.extend(self.values, values)
        return self.keys, self.values

    @staticmethod
    def extend(old, new):
        (n, heads, so_far, dim), end = old.shape, old.shape[2] + new.shape[2]
        if end > old.stride(1) // old.stride(2):  # one head's share of the memory: is it full?
            roomy = new.new_empty(n, heads, end + 64, dim)
            roomy[:, :, :so_far] = old
            old = roomy
        whole = old.as_strided((n, heads, end, dim), old.stride())
        whole[:, :, so_far:] = new
        return whole


def freeze_vision(model):
    """Freeze vision tower and projector (MSRL 4.1: text-only training). A text model has none."""
    for name in ("vision_tower", "multi_modal_projector"):
        for part in (getattr(getattr(model, "model", model), name, None),):
            if part is not None:
                part.requires_grad_(False)


def autocast(device):
    return torch.autocast(torch.device(device).type, torch.bfloat16,
                          enabled=torch.device(device).type == "cuda")


def save_checkpoint(folder, model, encoder, **info):
    """Write the checkpoint; stage.json last, so a folder that has one is complete."""
    folder = Path(folder)
    part = folder / "checkpoint.tmp"
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    encoder.tokenizer.save_pretrained(part)
    if encoder.image_processor is not None:
        encoder.image_processor.save_pretrained(part)
    versions = {p: importlib.metadata.version(p) for p in ("torch", "transformers")}
    (part / "stage.json").write_text(json.dumps({**info, "versions": versions}, indent=2) + "\n")
    (folder / "stage.json").unlink(missing_ok=True)
    for path in sorted(part.iterdir(), key=lambda p: p.name == "stage.json"):
        os.replace(path, folder / path.name)
    part.rmdir()


def stage_of(folder):
    """What a checkpoint's stage.json says; {} if no script of ours wrote it."""
    file = Path(folder, "stage.json")
    return json.loads(file.read_text()) if file.is_file() else {}


def trained_style(folder):
    """The --style that a checkpoint was trained with."""
    return stage_of(folder).get("config", {}).get("style", "msrl")


# ==================================================================================================
# 6. Judging

def judge(model, encoder, rows, sample, form="pixels", votes=1, temperature=1.0, max_new_tokens=512,
          batch_size=32, seed=0, orders=("AB", "BA"), desc="judging"):
    """Judge every row in both orders -> prediction rows {"id", "row", "order", "sample", "pred",
    "text"}, with `pred` in the row's own frame. votes = 1 decodes greedily; more are sampled at
    `temperature` and share their prompt's forward. `sample` is the stages' sample_group()."""
    device = next(model.parameters()).device
    todo = [(i, o) for i in range(len(rows)) for o in orders]
    todo.sort(key=lambda x: rows[x[0]]["tokens"])  # alike lengths together: less padding
    batches = [todo[k:k + batch_size] for k in range(0, len(todo), batch_size)]
    preds = []
    for k in tqdm(range(rank(), len(batches), world()), desc=desc, disable=rank() > 0, leave=False,
                  mininterval=1):
        shown = [rows[i] if o == "AB" else swap(rows[i]) for i, o in batches[k]]
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + k)
        answers = sample(model, encoder, [encoder(r, form) for r in shown], votes,
                         temperature if votes > 1 else 0.0, max_new_tokens, generator).ids
        for n, ids in enumerate(answers):
            i, order = batches[k][n // votes]
            text = as_ab(encoder.decode(ids), encoder.style)
            verdict = parse(text).verdict
            pred = verdict and ("AB" if order == "AB" else "BA")["AB".index(verdict)]
            preds.append({"id": rows[i]["id"], "row": i, "order": order, "sample": n % votes,
                          "pred": pred, "text": text})
    return sorted(gather_list(preds), key=lambda p: (p["row"], p["order"], p["sample"]))


def captioned(cfg, sample, device, max_new_tokens=300, batch_size=16):
    """Preference rows whose media have no captions get them from a vision-language checkpoint (the
    paper: GPT-5). -> path of a .jsonl of rows with captions. Each medium is described once; what
    is done stays in captions.jsonl, so a killed run goes on."""
    model, encoder = load(cfg.captioner, device)
    rows = load_rows(cfg.data, encoder, "pixels", None, cfg.skip_bad_rows, cfg.exclude)
    todo = {m: r["task"] for r in rows if not r["captions"] for m in r["media"]}
    todo = [{"task": task, "media": m, "file": stamps(m)} for m, task in todo.items()]

    def describe(some):
        mine, said = some[rank()::world()], []
        if mine:
            asked = [(c["media"], c["task"].startswith("video")) for c in mine]
            prompts = [encoder.encode(f"<{'video' if video else 'image'}> {cfg.caption_prompt}",
                                      [m], video) for m, video in asked]
            ids = sample(model, encoder, prompts, 1, 0.0, max_new_tokens, None).ids
            # what looks like a tag would make the row a bad one
            said = [(c["media"], re.sub(r"<[^<>]*>|[<>]", "", encoder.decode(i)).strip()
                     or "nothing to be seen") for c, i in zip(mine, ids)]
        found = dict(gather_list(said))
        return [found[c["media"]] for c in some]
    texts = resumed(Path(cfg.out, "captions.jsonl"), {
        "captioner": [cfg.captioner, stamps(cfg.captioner)], "prompt": cfg.caption_prompt}, todo,
        describe, batch_size * world(), "captions")
    known = dict(zip((c["media"] for c in todo), texts))
    out = Path(cfg.out, "captioned.jsonl")  # always made anew: the rows of the data as it is now
    if rank() == 0:
        write_lines(out, [{**r, "captions": r["captions"] or [known[m] for m in r["media"]],
                           "media": [os.path.abspath(m) for m in r["media"]]} for r in rows])
    gather_list([])  # nobody reads it before it is there
    return str(out)


def summarize(rows, preds):
    """Prediction rows -> accuracy and its companions, as shares of 1.

    A row counts the mean over its orders; with several votes the majority of an order's votes is
    its verdict, and a tied vote counts one half (UNSPECIFIED). An unparsable verdict is wrong. The
    interval is Wilson's at 95 % over rows, not over judgements: two orders of one row are no two
    independent rows.
    """
    by_row = {}
    for p in preds:
        by_row.setdefault(p["row"], {}).setdefault(p["order"], []).append(p["pred"])
    points, flips, both = [], 0, 0
    for i, orders in by_row.items():
        label, wrong = rows[i]["label"], "B" if rows[i]["label"] == "A" else "A"
        votes = [(v.count(label), v.count(wrong)) for v in orders.values()]
        points.append(sum((r > w) + 0.5 * (r == w > 0) for r, w in votes) / len(votes))
        sides = [r > w for r, w in votes if r != w]
        both += len(sides) == 2
        flips += len(sides) == 2 and sides[0] != sides[1]
    n, p = len(points), sum(points) / len(points)
    verdicts = [x for x in preds if x["pred"] is not None]
    shown_a = sum((x["pred"] == "A") == (x["order"] == "AB") for x in verdicts)
    return {"accuracy": p, "interval": wilson(p, n), "n": n,
            "order_flips": flips / both if both else 0.0,
            "share_a": shown_a / len(verdicts) if verdicts else 0.0,
            "unparsable": 1 - len(verdicts) / len(preds),
            "format": sum(parse(x["text"]).well_formed for x in preds) / len(preds)}


def wilson(p, n, z=1.96):
    """The interval of all true rates that p of n is within z standard errors of."""
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    total = 1 + z * z / n
    return [max(0.0, (middle - half) / total), min(1.0, (middle + half) / total)]


def show(name, s):
    low, high = s["interval"]
    return (f"{name}: accuracy {s['accuracy']:.1%} [{low:.1%}, {high:.1%}] on {s['n']} rows x 2 "
            f"orders, flips with the order {s['order_flips']:.1%}, says A {s['share_a']:.1%}, "
            f"unparsable {s['unparsable']:.1%}, well-formed {s['format']:.1%}")


# ==================================================================================================
# 7. Runs: processes, run folder, data order, resume

def rank():
    return int(os.environ.get("RANK", 0))


def world():
    return int(os.environ.get("WORLD_SIZE", 1))


def start_processes(batch_size=0):
    """Join the process group if torchrun started us. -> the device of this process."""
    if batch_size % world():
        raise SystemExit(f"--batch_size {batch_size} does not divide among {world()} processes")
    cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world() > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    return device


def sum_over_ranks(*values):
    """Each number summed over all processes."""
    if world() == 1:
        return values
    device = "cuda" if torch.cuda.is_available() else "cpu"
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def sum_gradients(parameters):
    """Sum gradients over processes, bucketed. A parameter this rank did not use counts as zero, so
    ranks with different kinds of rows cannot hang on one another."""
    if world() == 1:
        return
    bucket, size = [], 0
    parameters = list(parameters)
    for i, p in enumerate(parameters):
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        bucket.append(p.grad)
        size += p.numel()
        if size > 25_000_000 or i == len(parameters) - 1:
            flat = torch.cat([g.flatten() for g in bucket])
            dist.all_reduce(flat)
            for g, part in zip(bucket, flat.split([g.numel() for g in bucket])):
                g.copy_(part.view_as(g))
            bucket, size = [], 0


def batch_of(rows, step, batch_size, seed, may_swap=lambda row: True):
    """The rows of step 0, 1, 2...: epoch after epoch, each in its own shuffled order, and in each
    epoch each row for which may_swap(row) shows its candidates in an order that is a coin of
    (seed, epoch, id). Depends on nothing but its arguments, so a resumed run sees what an unbroken
    one would."""
    out = []
    for k in range(step * batch_size, (step + 1) * batch_size):
        epoch, at = divmod(k, len(rows))
        order = _permutation(len(rows), seed, epoch)
        row = rows[order[at]]
        out.append(swap(row) if coin(seed, epoch, row["id"]) and may_swap(row) else row)
    return out


@lru_cache(maxsize=4)
def _permutation(n, seed, epoch):
    order = list(range(n))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return order


def open_run(folder, config):
    """Make the run folder. -> the saved state to resume from, or None. A state of other settings is
    refused, because half a run of each would be a run of neither."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".writable", "w"):
            pass
        (folder / ".writable").unlink(missing_ok=True)
    except OSError as e:
        raise SystemExit(f"{folder}: cannot write the run folder ({e.strerror}); choose another "
                         "--out.")
    state_file = folder / "state.pt"
    if not state_file.exists():
        if rank() == 0:  # killed before its first save: its log begins anew as well
            for name in ("metrics.jsonl", "rollouts.jsonl"):
                _drop_lines_after(folder / name, 0)
        return None
    try:
        state = torch.load(state_file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as e:
        raise SystemExit(f"{state_file}: is no saved state ({type(e).__name__}); delete it.")
    now = {k: v for k, v in asdict(config).items() if k not in MAY_CHANGE}
    was = {k: v for k, v in state["config"].items() if k not in MAY_CHANGE}
    changed = [f"{k} {was.get(k)!r} -> {v!r}" for k, v in now.items() if was.get(k) != v]
    if changed:
        raise SystemExit(f"{state_file} belongs to a run with other settings "
                         f"({'; '.join(changed)}). Take another --out, or delete the folder.")
    if rank() == 0:
        print(f"resuming {folder} after step {state['step']}")
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            _drop_lines_after(folder / name, state["step"])
    return state


MAY_CHANGE = ("out", "max_steps", "save_every", "eval_every", "eval_rows", "eval_batch",
              "micro_batch", "log_rollouts_every", "skip_bad_rows")


def whole_lines(path):
    """The objects of a .jsonl that a killed process may have left with a line cut in the middle."""
    out = []
    for line in Path(path).read_bytes().split(b"\n") if Path(path).exists() else []:
        try:
            out.append(json.loads(line))
        except ValueError:  # also of a character cut in the middle, and of the empty last line
            break
    return out


def mark_of(made_by, rows):
    """What tells answers to these rows, asked in this way, from others. Labels have no part."""
    content = [[r.get(k) for k in ("id", "task", "prompt", "responses", "media", "captions", "file",
                                   "reference")] for r in rows]
    return [json.dumps(made_by), zlib.crc32(json.dumps(content).encode())]


def resumed(path, made_by, rows, work, chunk=256, desc=None):
    """work(some rows) -> one JSON value a row. What is done stays in `path`, so a killed run goes
    on there; what was made in another way, or of other rows, is refused. -> the values of all."""
    mark = mark_of(made_by, rows)
    was, *done = whole_lines(path) or [mark]
    if was != mark:
        raise SystemExit(f"{path} was made by {was[0]}, or of other rows. Delete it, or take "
                         "another --out.")
    if rank() == 0:
        write_lines(path, [mark, *done])
    for at in tqdm(range(len(done), len(rows), chunk), desc=desc, unit="batch", mininterval=1,
                   disable=desc is None or rank() > 0):
        some = work(rows[at:at + chunk])
        done += some
        if rank() == 0:
            for value in some:
                append(path, value)
    gather_list([])  # nobody reads this file again before it is whole
    return done


def stamps(*paths):
    """What tells a file, or the checkpoint in a folder, from a newer one of the same name."""
    files = [f for p in paths for f in (
        Path(p), Path(p, "stage.json"), Path(p, "model.safetensors"))]
    return [[str(f), f.stat().st_size, f.stat().st_mtime] for f in files if f.is_file()]


def write_lines(path, rows):
    """Replace a .jsonl as a whole: whenever we are killed, it is the old one or the new one."""
    part = Path(path).with_suffix(".tmp")
    part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    os.replace(part, path)


def _drop_lines_after(path, step):
    """A killed run may have logged steps it had not saved; they will be done and logged again."""
    if path.exists():
        write_lines(path, [row for row in whole_lines(path) if row["step"] <= step])


def save_state(folder, model, optimizer, step, config, **more):
    """Write to a side file, flush it to disk, then rename: whenever we are killed, state.pt is a
    whole state, the new one or the one before."""
    part = Path(folder, "state.pt.tmp")
    with open(part, "wb") as f:
        torch.save({"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                    "config": asdict(config), **more}, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, Path(folder, "state.pt"))


def append(path, row):
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(row, ensure_ascii=False) + "\n")


def peak_memory_gb():
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def gather(x):
    """[B, ...] of this process -> [B_all, ...] of all, in rank order."""
    return torch.cat(gather_list([x]))


def gather_list(items):
    """The lists of all processes, one after another in rank order."""
    if world() == 1:
        return items
    parts = [None] * world()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def end_processes():
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def parse_config(cls, description, paper):
    """Command line -> config. `--preset paper` takes the paper's defaults; flags still win."""
    parser = transformers.HfArgumentParser(cls, description=description, allow_abbrev=False,
                                           formatter_class=_Help)
    parser.add_argument("--preset", choices=["toy", "paper"], default="toy",
                        help="'paper' takes the paper's data and hyper-parameters")
    if parser.parse_known_args()[0].preset == "paper":
        parser.set_defaults(**paper)
    cfg, *_, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if unknown:
        parser.error(f"unknown: {' '.join(unknown)} (see --help)")
    for name in ("batch_size", "micro_batch", "rollout_batch", "save_every", "max_new_tokens",
                 "epochs", "samples", "frames", "max_tiles", "eval_batch", "eval_rows"):
        if getattr(cfg, name, 1) < 1:
            parser.error(f"--{name} must be at least 1")
    if getattr(cfg, "group_size", 2) < 2:
        parser.error("--group_size must be at least 2: an answer alone has no advantage")
    if not re.fullmatch(r"[1-9]\d*:\d+", getattr(cfg, "replay_ratio", "1:0")):
        parser.error("--replay_ratio is captions:text, as 5:1 or 1:0")
    if 0 < getattr(cfg, "pre_clip", 0) <= 1:
        parser.error("--pre_clip must be above 1, or 0 for off")
    return cfg


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass
