"""
What every stage shares and no stage is about. Nothing in this file knows what GRPO is.

    1  templates     MSRL Figures 4-7: one preference row -> one prompt text
    2  rewards       parse an answer; format, accuracy and task reward (MSRL Eq. 4, section 4.2)
    3  rows          read, check and convert preference data; swap the order of the two candidates
    4  encoding      prompt text, images and videos -> token ids and pixel tiles
    5  models        load, save, stage.json
    6  judging       both orders, accuracy with a 95 % interval
    7  runs          command line, processes, optimiser step, logs, resume
"""

import argparse
import base64
import gzip
import hashlib
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
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import lru_cache
from itertools import islice, permutations
from pathlib import Path
from typing import Literal, TypedDict

import torch
import torch.distributed as dist
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
from transformers.cache_utils import Cache, DynamicLayer

transformers.utils.logging.disable_progress_bar()  # its bars are about files; ours are about work

TASKS = ("text", "image_understanding", "image_generation",
         "video_understanding", "video_generation")
N_MEDIA = {"text": 0, "image_understanding": 1, "image_generation": 2,
           "video_understanding": 1, "video_generation": 2}
OTHER = {"A": "B", "B": "A"}


class Row(TypedDict, total=False):
    """A preference row, as load_rows() returns it. Files may leave out what is marked optional."""
    id: str
    task: str                    # one of TASKS
    prompt: str                  # the question, or for *_generation what was to be drawn or filmed
    responses: list[str] | None  # two texts; None for *_generation, whose candidates are the media
    media: list[str]             # paths: one for *_understanding, two for *_generation
    captions: list[str]          # optional, parallel to media
    label: Literal["A", "B"]     # the better candidate
    rationale: str | None        # optional: what stage 0 learns to write inside <think>
    subset: str                  # optional; so is `group`
    source: str                  # the file or data set it came from
    tokens: int                  # length of the encoded prompt, added when the row is loaded


class Prediction(TypedDict, total=False):
    """One verdict of a judge on one row."""
    id: str
    at: int                        # place of the row in the list that was judged
    order: Literal["AB", "BA"]     # how the candidates were shown
    sample: int                    # 0, 1, ... of several votes
    pred: Literal["A", "B"] | None  # in the row's own frame whatever the order; None: no verdict
    score_a: float                 # optional, with score_b: a score of each candidate
    text: str                      # the judge's whole answer


# ==================================================================================================
# 1. Templates
# Figures 4, 5 and 6 stand here as printed; braces are filled by render(). The other two differ by a
# few words and are derived, so that the words show (tests/templates/ holds every one in full).
# DEVIATION: the figures print `<type>...<type>`; the tag is closed here, as in Figures 8-11.
# DEVIATION: the figures' typographic apostrophes are ASCII here.
# "Comparision" is the papers' spelling; the published rationales use it, so it stays.

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


def _replaced(template, changes):
    """The template with each text of `changes` replaced, all of which must occur in it."""
    for before, after in changes.items():
        assert before in template, before
        template = template.replace(before, after)
    return template


# Figure 7 is Figure 5 about videos; the list of task types stays as it is.
_TYPES = "image understanding, image generation, video understanding, or video generation."
_VIDEO_GENERATION = _replaced(_IMAGE_GENERATION, {
    _TYPES: "{types}", "image": "video", "Image": "Video", "{types}": _TYPES,
    "realism, and": "realism, motion consistency, and",
    "cartoonish)": "cartoonish, cinematic)",
    "the complexity is": "the complexity and motion quality are"})

# UNSPECIFIED: the paper prints no text-only template. Ours is Figure 4 without its image wording,
# with the section markers that stage 1's dataset (GRAM-RR-TrainingData) carries in its prompts.
_TEXT = _replaced(_IMAGE_UNDERSTANDING, {
    "helpful multimodal assistant": "helpful assistant",
    "a given set of instructions and images": "a given instruction",
    "If the instruction and image do not contain": "If the instruction does not contain",
    "executes the instruction and image,": "executes the instruction,",
    "If the instruction and image contain": "If the instruction contains",
    "execute the instruction and image.": "execute the instruction.",
    "Follow this format:\n<type>choose a task type: " + _TYPES + "</type>\n"
    "Caption:\n<provide a detailed description for the given image>\n\n": "",
    "[Client Question]": "[User Question]",
    "[Image]\n{media[0]}\n\n": "",
    "Chatbot": "Assistant"})

TEMPLATES = {"text": _TEXT, "image_understanding": _IMAGE_UNDERSTANDING,
             "image_generation": _IMAGE_GENERATION, "video_understanding": _VIDEO_UNDERSTANDING,
             "video_generation": _VIDEO_GENERATION}


# DEVIATION: from stage 2b on an answer starts with its <caption> (MSRL 4.2, end), but Figures 4-7
# ask for `Caption:` inside <think>: who follows them to the letter earns no format in stage 3, and
# only a distilled model would write what is rewarded. In style "caption" the request stands where
# the reward looks for it, once. Texts have nothing to describe.

def _caption_first(template, media):
    """The template with its request for a caption moved from <think> to a <caption> before it."""
    request = f"<provide a detailed description for {media}>\n"
    return _replaced(template, {
        f"Caption:\n{request}\n": "",
        "format:\n<think>\n": f"format:\n<caption>\n{request}</caption>\n<think>\n"})


CAPTION_TEMPLATES = {
    "text": _TEXT,
    "image_understanding": _caption_first(_IMAGE_UNDERSTANDING, "the given image"),
    "image_generation": _caption_first(_IMAGE_GENERATION, "this two images"),
    "video_understanding": _caption_first(_VIDEO_UNDERSTANDING, "the given video"),
    "video_generation": _caption_first(_VIDEO_GENERATION, "this two videos")}


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


def render(row: Row, form="pixels", style="msrl") -> str:
    """Preference row -> prompt text. form "pixels" leaves `<image>` or `<video>` where the media
    go (Encoder fills them in); form "caption" writes the captions there instead (MSRL 4.2). style
    "msrl" is Figures 4-7, "caption" the same with the <caption> before <think>, "r1" R1-Reward's.
    Raises BadRow."""
    response_a, response_b = row["responses"] or ("", "")
    if form == "caption":
        media = row["captions"]
    elif row["task"].startswith("image"):
        media = ["<image>"] * len(row["media"])
    else:
        media = ["<video>"] * len(row["media"])
    template = TEMPLATES[row["task"]]
    if style == "caption":
        template = CAPTION_TEMPLATES[row["task"]]
    if style == "r1":
        if row["task"].endswith("generation"):
            raise BadRow(f"is {row['task']}, for which R1-Reward has no prompt; use --style msrl")
        template = _R1_STYLE
        media = "".join(f"{medium}\n" for medium in media)
    return template.format(prompt=row["prompt"], a=response_a, b=response_b, media=media)


# ==================================================================================================
# 2. Answers and rewards

@dataclass
class Answer:
    verdict: str | None  # "A", "B", or None when no single verdict is stated
    well_formed: bool    # <think>...</think> then <answer>A|B</answer>, each tag once, a thought in
                         # the first and nothing else
    captioned: bool      # well-formed, and <caption>...</caption> stands before it
    type: str | None     # what stands in <type>...</type>, normalised, None unless exactly one


_WHOLE = re.compile(r"\s*(?:<caption>((?:(?!</?caption>).)+)</caption>\s*)?<think>(.*)</think>\s*"
                    r"<answer>\s*[AB]\s*</answer>\s*", re.DOTALL)
_VERDICT = re.compile(r"<answer>\s*([AB])\s*</answer>")
_TYPE = re.compile(r"<think>\s*<type>([^<]*)</type>")  # only where the template puts it


def as_ab(text, style):
    """An answer of the given style with A and B as its verdict. In style "r1" the verdict is 1 or
    2, and an A there is none."""
    if style != "r1":
        return text

    def letter(match):
        return match[1] + {"1": "A", "2": "B"}.get(match[2], "?")
    return re.sub(r"(?<=<answer>)(\s*)([12AB])(?=\s*</answer>)", letter, text)


def parse(text, style="msrl"):
    """The text of an answer -> Answer. Strict on purpose. Released parsers search for substrings,
    so "Response B, not A" can be read either way and a policy learns to write both; here two
    verdicts are no verdict. Style "r1" says 1 and 2 for A and B."""
    text = as_ab(text, style)
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    each_once = all(text.count(tag) == 1 for tag in tags)
    whole = _WHOLE.fullmatch(text) if each_once else None
    well_formed, caption = False, None
    if whole:  # an empty form must earn nothing
        caption, thought = whole.groups()
        thought = re.sub(r"<type>[^<]*</type>", "", thought)
        well_formed = bool(thought.strip()) and (caption is None or bool(caption.strip()))

    verdict = None
    conclusion = text.rpartition("</think>")[2]  # a guess while thinking is no verdict
    one_answer = text.count("<answer>") == text.count("</answer>") == 1
    if one_answer and "<think>" not in conclusion:
        stated = _VERDICT.search(conclusion)
        verdict = stated[1] if stated else None

    task_type = None
    if text.count("<type>") == text.count("</type>") == 1:
        named = _TYPE.search(text)
        if named:  # "Image_Understanding." and "image understanding" are the same
            task_type = " ".join(re.split(r"[\s_-]+", named[1].lower().strip(" .\n\t")))
    return Answer(verdict=verdict, well_formed=well_formed,
                  captioned=well_formed and caption is not None, type=task_type)


# A reward function maps (answer text, row) to a float. A stage adds those it uses.

def format_reward(text, row):
    return float(parse(text).well_formed)                               # Eq. 4, r_format


def caption_format_reward(text, row):
    """Stage 3's format: rows with media need `<caption>` before the reasoning (MSRL 4.2, end), as
    the prompts of style "caption" ask."""
    answer = parse(text)
    return float(answer.well_formed and (answer.captioned or not row["media"]))


def accuracy_reward(text, row):
    return float(parse(text).verdict == row["label"])                   # Eq. 4, r_accuracy


def task_reward(text, row):
    """Nothing for a text row: its template asks for no <type>."""
    if row["task"] == "text":
        return 0.0
    return 0.2 * (parse(text).type == row["task"].replace("_", " "))    # MSRL 4.2, r_task


# R1-Reward 4.3: does the verdict follow from the reasoning?

_SIDE = r"(?:response|image|video|answer|assistant|chatbot)\s*([ab12])\b"
_MORE = (r"more\s+(?:accurate|appropriate|complete|comprehensive|correct|detailed|faithful|helpful|"
         r"informative|precise|relevant|reliable|thorough|truthful)")
_GOOD = rf"better|best|superior|preferable|preferred|stronger|clearer|winner|chosen|{_MORE}"
_BAD = "worse|worst|inferior|weaker"
_COMPARES = re.compile(
    # Response A is (clearly the) better; Response A should be preferred
    rf"{_SIDE}\s+(?P<verb>is|isn't|(?:should|must|might|may|could) be)\s+"
    rf"(?P<between>(?:\w+\s+){{0,3}}?)(?:(?P<good>{_GOOD})|{_BAD})\b"
    # Response A provides a (much) more accurate answer; Response A does the better job
    rf"|{_SIDE}\s+(?:\w+ly\s+)?(?P<gives>provides|gives|offers|presents|does)\s+"
    rf"(?:a|an|the)\s+(?:much\s+|far\s+|\w+ly\s+)?(?:(?P<good_one>{_GOOD})|{_BAD})\b"
    # the final answer is Response 2; the better one is clearly Response 2
    rf"|\b(?:(?:final|overall|better|best|preferred|superior|my)\s+(?:\w+\s+)?|winner\s+)is\s+"
    rf"(?:\w+\s+)?{_SIDE}"
    rf"|\b(?:prefer|choose|select|pick|recommend|favou?r|go\s+with)\s+{_SIDE}"
    rf"|{_SIDE}\s+(?:wins|prevails|outperforms|surpasses)\b")
_STATES_NOTHING = re.compile(r"\b(?:if|whether|both|neither|equally|tie|tied|might|may|could)\b")
_MAY_NEGATE = re.compile(
    r"\b(?:no|not|nor|never|none|nothing|nobody|nowhere|hardly|barely|rarely|seldom|without|less|"
    r"least|far from|only|cannot|(?:wrong|mistake|hard) to)\b|n't\b")
# What follows one of these says why, or concedes something: a "not" in it is about a response.
_REASON = re.compile(
    r",?\s*(?:\b(?:because|since|which|whereas|while|as\s+(?:it|response|image|video|answer)|"
    r"due\s+to)\b|\band\s+(?:it\s+)?(?:does|is|has|did)\b|:)")
_CONCEDES = re.compile(r"\b(?:although|though|even\s+if|while|whereas|despite)\b")
# What comes before: "because it does not ..., Response A is better"; "B is not bad, but ..."
_OPENING = re.compile(r"\s*(?:\w+,\s+)?(?:because|since|as|although|though|while)\b[^,]*,\s*"
                      r"(?:\w+ly\s+|overall\s+|i\s+)?$|.*,\s*(?:but|yet)\b")
# A "not" together with one of these may take the verdict back, even behind a "because".
_OF_VERDICTS = re.compile(rf"\b(?:{_GOOD}|{_BAD}|prefer|choose|choice|win|wins|true|so|case|think|"
                          r"believe|say|agree|conclude|sure|clear|verdict|conclusion)\b")


def concluded(reasoning):
    """The side that the last comparison in a reasoning names as the better: "A", "B", or None when
    there is no comparison, or when the last one is a question, a condition, or about both."""
    side = None
    for sentence in re.findall(r"[^.!?;\n]+[.!?;\n]?", reasoning.lower().replace("*", "")):
        comparisons = list(_COMPARES.finditer(sentence))
        if comparisons:  # the last one of a sentence is what it comes to
            side = _side_named_better(sentence, comparisons[-1])
        if len(comparisons) > 1:  # but "A is better, although B is more detailed" may be either
            between = sentence[comparisons[0].end():comparisons[-1].start()]
            first = _side_named_better(sentence, comparisons[0])
            if _CONCEDES.search(between) and first != side:
                side = None
    return side


def _side_named_better(sentence, comparison):
    """One sentence and the comparison in it -> "A", "B" or None."""
    before = sentence[:comparison.start()]
    opening = _OPENING.match(before)
    if opening:
        before = before[opening.end():]
    behind = sentence[comparison.end():]
    reason = _REASON.search(behind)
    if reason:
        why = behind[reason.start():]
        behind = behind[:reason.start()]
        doubted = _MAY_NEGATE.search(why) or _STATES_NOTHING.search(why)
        if doubted and _OF_VERDICTS.search(why):
            return None
    clause = before + comparison[0] + behind
    if sentence.endswith("?") or _STATES_NOTHING.search(clause):
        return None
    verb, between = comparison["verb"], comparison["between"]
    good = comparison["good"] or comparison["good_one"]
    negated = verb == "isn't" or (between or "").split() in (["not"], ["not", "the"])
    # any other "not" may turn the clause round: a wrong sign does harm, no sign does none
    if not negated and _MAY_NEGATE.search(clause):
        return None
    if comparison["gives"] and re.search(r"\bbut\b", behind):  # "a better start, but it fails"
        return None
    named = next(group for group in comparison.groups() if group in ("a", "b", "1", "2"))
    side = {"a": "A", "1": "A", "b": "B", "2": "B"}[named]
    if (verb or comparison["gives"]) and bool(good) == negated:  # "A is worse", "A is not better"
        side = OTHER[side]
    return side


def rule_consistency(text):
    """1 if the verdict is what the reasoning concluded, -1 if it is the opposite, 0 if one of the
    two cannot be told."""
    verdict = parse(text).verdict
    side = concluded(text.partition("<think>")[2].partition("</think>")[0])
    if verdict is None or side is None:
        return 0
    return 1 if verdict == side else -1


def referee_consistency(folder, sample, device, style="msrl"):
    """-> a function like rule_consistency that asks a checkpoint (R1-Reward: Qwen2.5-VL-7B), text
    only. As released, it reads the last three lines before the answer; each distinct question is
    asked once. UNSPECIFIED: its prompt is not published.
    DEVIATION: load() takes no Qwen2.5-VL, so the paper's own referee is refused; any text-only
    checkpoint that follows instructions can do the same work."""
    try:
        model, encoder = load(folder, device)
    except SystemExit as e:
        raise SystemExit(f"--referee {folder}: {e} A referee only reads text: take a text-only "
                         "checkpoint such as Qwen/Qwen2.5-7B-Instruct, an InternVL one, or "
                         "'rule'.") from e

    @lru_cache(maxsize=100_000)
    def ask(conclusion, verdict):
        prompt = encoder.encode(
            f"Conclusion: {conclusion}\nStatement: {verdict} is better.\nReply with 1 if the "
            "conclusion means the same as the statement; reply with 0 if it is ambiguous, means "
            "the opposite, or approves both.")
        rollout = sample(model, encoder, [prompt], 1, 0.0, 8, None)
        digits = re.findall(r"[01]", encoder.decode(rollout.ids[0][0]))
        if len(digits) != 1:
            return 0
        return 1 if digits[0] == "1" else -1

    def consistency(text):
        verdict = parse(text).verdict
        if verdict is None:
            return 0
        before_answer = re.sub("</?think>", "", text.rpartition("<answer>")[0])
        lines = [line for line in before_answer.strip().splitlines()[-3:] if line]
        # by the name that the reasoning uses: Response 2, Image B
        nouns = re.findall(r"\b(Response|Image|Video|Answer)s? [AB12]\b", text) or ["Response"]
        side = {"A": "1", "B": "2"}[verdict] if style == "r1" else verdict
        return ask("; ".join(lines), f"{nouns[-1]} {side}")
    return consistency


def consistency_reward(referee, sample, device, style="msrl"):
    """-> the reward of R1-Reward 4.3: counted only where the verdict is right, so that a wrong
    one cannot earn it. `referee` is "rule" or a checkpoint."""
    if referee == "rule":
        consistency = rule_consistency
    else:
        consistency = referee_consistency(referee, sample, device, style)

    def reward(text, row):
        if accuracy_reward(text, row) == 0:  # and no question is asked about a wrong one
            return 0.0
        return float(consistency(text))
    return reward


# ==================================================================================================
# 3. Preference rows

class BadRow(ValueError):
    """One row that cannot be used; the message says why and what to do about it."""


# What user text may never contain, because the model or the parser would take it for ours.
FORBIDDEN = ("<think>", "</think>", "<answer>", "</answer>", "<type>", "</type>", "<caption>",
             "</caption>", "<image>", "<video>", "<img>", "</img>", "<IMG_CONTEXT>",
             "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|image_pad|>",
             "[The Start of ", "[The End of ")


def check_row(row, folder, forbidden=FORBIDDEN) -> Row:
    """Validate one preference row in place: media paths become absolute, absent optional keys get
    their empty value. Raises BadRow. `forbidden` also holds the tokenizer's special tokens."""
    if not isinstance(row, dict):
        raise BadRow(f"is a JSON {type(row).__name__}, not an object; write one object per line")
    missing = [key for key in ("id", "task", "prompt", "label") if key not in row]
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
    if row["task"].endswith("generation"):
        if row["responses"]:
            raise BadRow("a generation row takes its two candidates in 'media', not in 'responses'")
    elif not isinstance(row["responses"], list) or len(row["responses"]) != 2:
        raise BadRow("'responses' must be a list of two texts")
    needed, given = N_MEDIA[row["task"]], len(row["media"])
    if given != needed and not (given == 0 and row["captions"]):
        raise BadRow(f"{row['task']} needs {needed} path(s) in 'media', got {given}")
    if row["captions"] and len(row["captions"]) != needed:
        raise BadRow(f"{row['task']} needs {needed} caption(s), got {len(row['captions'])}")

    check_text("prompt", row["prompt"], forbidden)
    for side, response in zip("AB", row["responses"] or [], strict=False):
        check_text(f"response {side}", response, forbidden)
    for i, caption in enumerate(row["captions"]):
        check_text(f"caption {i}", caption, forbidden)
    # a rationale may be empty, and it may name the task's type
    if row.get("rationale"):
        tags = [tag for tag in forbidden if tag not in ("<type>", "</type>")]
        check_text("rationale", row["rationale"], tags)
    row["media"] = [str(Path(folder, path)) for path in row["media"]]
    return row


def check_text(name, text, forbidden):
    """Raises BadRow if a text of a row is none, is empty or holds what would be read as markup."""
    if not isinstance(text, str):
        raise BadRow(f"{name} is {type(text).__name__}, not a string")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise BadRow(f"{name} is not valid Unicode; save the file as UTF-8, or mend the text")
    if not text.strip() and name != "rationale":
        raise BadRow(f"{name} is empty; remove the row or give it a text")
    for tag in forbidden:
        if tag in text:
            raise BadRow(f"{name} contains {tag!r}, which would be read as markup, not as "
                         "text; remove it from the text")


SIDES_IN_RATIONALE = re.compile(r"\b((?i:Response|Assistant|Chatbot|Image|Video)) ([AB])\b")


def swap(row: Row) -> Row:
    """The same row with its two candidates exchanged; label and rationale follow. In a rationale
    "Response A" and the like are exchanged; text that names the sides in no such way cannot be."""
    swapped = {**row, "label": OTHER[row["label"]]}
    for key in ("responses", "media", "captions"):
        if row[key] and len(row[key]) == 2:
            swapped[key] = row[key][::-1]
    if row.get("rationale"):
        swapped["rationale"] = SIDES_IN_RATIONALE.sub(
            lambda m: f"{m[1]} {OTHER[m[2]]}", row["rationale"])
    return swapped


def coin(*key):
    """A fair coin that depends on nothing but its key: the same on every rank, run and machine."""
    return hashlib.sha256(":".join(map(str, key)).encode()).digest()[0] % 2 == 1


# Published datasets -> preference rows. Each adapter is a generator of rows for one published row;
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


_R1 = re.compile(r"\[Question\]:?(.*?)#+ *\[Response 1\]:?(.*?)#+ *\[Response 2\]:?(.*?)"
                 r"(?:#+ *\**Output Format.*)?$", re.DOTALL)


def from_r1_reward(r, where):
    """yifanzhang114/R1-Reward-RL: question and responses stand in the judge prompt, the answer is
    ["<answer>1</answer>"] or 2."""
    messages = json.loads(r["message"]) if isinstance(r["message"], str) else r["message"]
    content, image = messages[-1]["content"], r.get("image")
    text = content if isinstance(content, str) else _part_of(content, "text")
    found = _R1.search(text)
    label = re.fullmatch(r"\s*<answer>\s*([12])\s*</answer>\s*", r["answer"][0])
    if not found or not label:
        raise BadRow("is no R1-Reward row: the sections or the <answer> 1 or 2 are missing")
    prompt, better, worse = (section.replace("<image>", "").strip() for section in found.groups())
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
        raise SystemExit(f"{source}: no such file. `python tests/toy_world.py` makes toy rows.")
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


def checked(raw, where, folder, encoder, form):
    """One row as it stands in a file -> its preference rows, each with the length of its encoded
    prompt under "tokens". Raises BadRow."""
    if isinstance(raw, BadRow):
        raise raw
    for row in convert(raw, where.rpartition(":")[2].strip("[]")):
        row = check_row(row, folder, encoder.forbidden)
        row["tokens"] = encoder.check(row, form)
        yield row


def good_rows(source, shuffle, encoder, form, bad, skip_bad_rows, quiet):
    """Yield the checked rows of one source that are not bad; those that are go into the Counter
    `bad`, or stop the run. Each process checks its share, because to check a row is to read its
    media, and all yield all rows."""
    def check(place):
        """-> place, the rows of this raw row, and what is wrong with it or None."""
        where, raw = chunk[place]
        try:
            return place, list(checked(raw, where, Path(source).parent, encoder, form)), None
        except BadRow as e:
            return place, [], str(e)

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


def load_rows(sources, encoder, form="pixels", max_prompt_tokens=None, skip_bad_rows=False,
              exclude="", quiet=False) -> list[Row]:
    """Comma-separated sources -> list of checked preference rows, each with the length of its
    encoded prompt under "tokens". A source is `a.jsonl`, or `a.jsonl:500` for a sample of 500, or
    `a.jsonl:500@2000` for the 500 after the first 2,000 of the same shuffle, which `a.jsonl:2000`
    takes: two stages that are to see different rows.

    A bad row (malformed, unknown label, unreadable image, forged tag...) stops the run with its
    file and line, unless skip_bad_rows; an over-long prompt is always skipped, never truncated,
    because a prompt cut in the middle is another question. Rows that also occur in the sources of
    `exclude` (benchmarks) are left out. All three are counted and printed; the last two are among
    the rows of a sample, so that samples of the same file never overlap.
    """
    quiet = quiet or rank() > 0
    excluded = fingerprints(exclude)
    bad, counts = Counter(), Counter()

    rows = []
    for source in sources.split(","):
        sample = re.fullmatch(r"(.+?):(\d+)(?:@(\d+))?", source)
        if sample is None:
            taken = list(good_rows(source, False, encoder, form, bad, skip_bad_rows, quiet))
        else:  # the same in every run
            source, wanted, offset = sample[1], int(sample[2]), int(sample[3] or 0)
            found = good_rows(source, True, encoder, form, bad, skip_bad_rows, quiet)
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


def hard_rows(rows: list[Row], min_attempts) -> list[Row]:
    """The rows for which a model needed at least so many attempts (R1-Reward 4.3: 2);
    eval.py --attempts writes how many it needed."""
    if not min_attempts:
        return rows
    if any("attempts" not in row for row in rows):
        raise SystemExit("--min_attempts needs rows with \"attempts\"; eval.py --attempts 3 --out "
                         "rows.jsonl writes them.")
    hard = [row for row in rows if row["attempts"] >= min_attempts]
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
    """-> a PIL image in RGB. Raises BadRow."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")  # convert() decodes, so a truncated file fails here
    except FileNotFoundError:
        raise BadRow(f"image {path} does not exist") from None
    except Exception as e:  # Pillow raises a dozen kinds for corrupt files
        raise BadRow(f"image {path} cannot be read ({e}); replace the file") from e


def open_video(path, frames):
    """`frames` frames evenly spaced by index (all of a shorter video) from what PyAV decodes, or
    from a folder of images. -> list of PIL images. Raises BadRow. Decodes twice, because containers
    lie about their number of frames and all frames of a long video do not fit into memory."""
    if Path(path).is_dir():
        files = [file for file in Path(path).iterdir()
                 if file.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp")]
        files.sort(key=lambda file: (len(file.name), file.name))  # 2.png before 10.png
        return [open_image(files[i]) for i in spread(len(files), frames, path)]

    import av  # here, because only video files need it

    def decode(container):
        for stream in container.streams.video[:1]:
            yield from container.decode(stream)
    try:
        with av.open(str(path)) as container:
            count = sum(1 for _ in decode(container))
        chosen = spread(count, frames, path)
        with av.open(str(path)) as container:
            return [frame.to_image() for i, frame in enumerate(decode(container)) if i in chosen]
    except BadRow:
        raise
    except FileNotFoundError:
        raise BadRow(f"video {path} does not exist") from None
    except Exception as e:
        raise BadRow(f"video {path} cannot be read ({e}); replace the file") from e


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
        self.frames, self.max_tiles, self.style = frames or 8, max_tiles or 12, style
        self.image_token_id = getattr(config, "image_token_id", None)
        self.special_tokens = tuple(self.tokenizer.all_special_tokens)
        self.forbidden = tuple(dict.fromkeys(FORBIDDEN + self.special_tokens))  # in users' texts
        self.image_processor = None
        if self.image_token_id is not None:
            self.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
            self.tokens_per_tile = config.image_seq_length
        self.eos_ids = self._declared_eos_ids(folder, config)
        if not self.eos_ids:
            raise SystemExit(f"{folder}: neither tokenizer nor generation_config.json names an "
                             "end-of-sequence token; set eos_token_id.")
        self.eos_id = self.tokenizer.eos_token_id or self.eos_ids[0]  # the one SFT teaches
        self.pad_id = self.tokenizer.pad_token_id
        if self.pad_id is None:
            self.pad_id = self.eos_ids[0]

    def _declared_eos_ids(self, folder, config):
        """Every declared end-of-sequence id ends an answer (InternVL declares two)."""
        declared = transformers.GenerationConfig.from_model_config(config).eos_token_id
        try:  # a folder's or a hub id's generation_config.json
            generation = transformers.GenerationConfig.from_pretrained(folder)
            declared = generation.eos_token_id or declared
        except OSError:  # it has none
            pass
        if not isinstance(declared, list):
            declared = [declared]
        return sorted({*declared, self.tokenizer.eos_token_id} - {None})

    def chat(self, text):
        """Wrap a user text in the checkpoint's chat template, ready for the assistant's answer. A
        base model has none, but may need its beginning-of-sequence token (Gemma)."""
        if self.tokenizer.chat_template is None:
            return (self.tokenizer.bos_token or "") + text + "\n\n"
        return self.tokenizer.apply_chat_template([{"role": "user", "content": text}],
                                                  tokenize=False, add_generation_prompt=True)

    def __call__(self, row, form="pixels"):
        media = row["media"] if form == "pixels" else []
        return self.encode(render(row, form, self.style), media, row["task"].startswith("video"))

    def encode(self, text, media=(), video=False):
        """Text with one `<image>` or `<video>` per medium -> Prompt. Never truncates."""
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
            shown = []
            for number, n_tiles in enumerate(out["num_patches"], 1):
                features = IMAGE_TOKEN * (self.tokens_per_tile * int(n_tiles))
                title = f"Frame{number}: " if video else ""
                shown.append(f"{title}<img>{features}</img>")
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
        """-> prompt length in tokens. Reads the media, so a broken file is found before training.
        Raises BadRow."""
        if row["task"] != "text" and form == "pixels" and not row["media"]:
            raise BadRow("has no media; use the caption form")
        if row["task"] != "text" and form == "caption" and not row["captions"]:
            raise BadRow("has no captions; the caption form needs one for each medium")
        return len(self(row, form).ids)


def left_pad(prompts, pad_id, device):
    """B prompts -> ids [B, P], mask [B, P] (1 = real), pixels [tiles, 3, H, W] or None."""
    width = max(len(prompt.ids) for prompt in prompts)
    ids, mask, pixels = [], [], []
    for prompt in prompts:
        padding = width - len(prompt.ids)
        ids.append([pad_id] * padding + prompt.ids)
        mask.append([0] * padding + [1] * len(prompt.ids))
        if prompt.pixels is not None:
            pixels.append(prompt.pixels)
    return (torch.tensor(ids, device=device), torch.tensor(mask, device=device),
            torch.cat(pixels).to(device) if pixels else None)


# ==================================================================================================
# 5. Models and checkpoints. A checkpoint is a folder plain transformers loads, plus stage.json.

def check_checkpoint(folder, made_by=""):
    """Stop if there is no checkpoint. -> the words for a message that say what makes one."""
    maker = {"": "", "toy/backbone": "; `python tests/toy_world.py` makes one"}.get(
        str(made_by), f"; `python {Path(made_by).name}.py` makes one")
    folder = str(folder)
    local = Path(folder).exists() or folder.startswith((".", "/")) or folder.count("/") != 1
    if local and not Path(folder, "config.json").is_file():
        raise SystemExit(f"{folder}: no checkpoint here (no config.json){maker}.")
    return maker


def load(folder, device="cpu", made_by="", **encoder_args):
    """-> model (fp32 weights, eval mode) and its Encoder. Takes InternVLForConditionalGeneration
    or a text-only causal LM (stages 0 and 1), as a folder of plain save_pretrained or a hub id.
    `made_by`: the default folder, whose name is that of the script that makes it, for the message
    if there is no checkpoint.

    fp32 on purpose: a learning rate of 1e-6 on bf16 weights rounds away (the default dtype of
    transformers 5 is the file's, usually bf16). On a GPU, autocast computes in bf16.
    """
    maker = check_checkpoint(folder, made_by)
    try:
        config = AutoConfig.from_pretrained(folder)
        auto = transformers.AutoModelForCausalLM
        if getattr(config, "vision_config", None) is not None:
            auto = transformers.AutoModelForImageTextToText
        encoder = Encoder(folder, config, **encoder_args)
        model, found = auto.from_pretrained(folder, dtype=torch.float32,
                                            attn_implementation="sdpa", output_loading_info=True)
        if found["missing_keys"]:  # transformers would fill them with random numbers, and go on
            raise ValueError(f"{len(found['missing_keys'])} weights are missing, the first is "
                             f"{sorted(found['missing_keys'])[0]}")
        if len(encoder.answer_ids("A")) < 2:
            raise ValueError("the tokenizer is empty")
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as e:
        reason = (str(e).strip() or "?").splitlines()[0]
        raise SystemExit(f"{folder}: cannot be loaded as a checkpoint ({type(e).__name__}: "
                         f"{reason}). It must hold model, tokenizer and, for a vision model, "
                         f"image processor, as save_pretrained writes them{maker}.") from e
    return model.to(device).eval(), encoder


def decoding_cache():
    return Cache(layer_class_to_replicate=RoomyLayer)


class RoomyLayer(DynamicLayer):
    """A layer of the decoding cache, [N, heads, tokens, dim], that leaves room for the tokens to
    come. Plain DynamicLayer concatenates, so every new token copies all tokens before it."""

    def update(self, keys, values, *args, **kwargs):
        keys = keys.to(values.dtype)  # under autocast rotary positions leave them in fp32
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.keys, self.values = keys[:, :, :0], values[:, :, :0]
        self.keys, self.values = self.extend(self.keys, keys), self.extend(self.values, values)
        return self.keys, self.values

    @staticmethod
    def extend(old, new):
        (n, heads, length, dim), end = old.shape, old.shape[2] + new.shape[2]
        if end > old.stride(1) // old.stride(2):  # one head's share of the memory: is it full?
            roomy = new.new_empty(n, heads, end + 64, dim)
            roomy[:, :, :length] = old
            old = roomy
        extended = old.as_strided((n, heads, end, dim), old.stride())
        extended[:, :, length:] = new
        return extended


def freeze_vision(model):
    """Freeze vision tower and projector (MSRL 4.1: text-only training). A text model has none."""
    for name in ("vision_tower", "multi_modal_projector"):
        part = getattr(getattr(model, "model", model), name, None)
        if part is not None:
            part.requires_grad_(False)


def layer_masks(model, sees, positions):
    """What a token may see [b, 1, L, L] and positions [b, L] -> attention mask for the model. A 4-D
    mask is taken as it is, so that a layer with a sliding window (Gemma 3, Mistral) would lose its
    window: it gets a mask of its own, in which what is `sliding_window` positions back is gone."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if kinds - {"full_attention", "sliding_attention"}:
        raise SystemExit(f"{config.model_type}: layers of type {', '.join(sorted(kinds))} are not "
                         "supported, only full and sliding-window attention.")
    if window is None or kinds == {"full_attention"}:
        return sees
    near = positions[:, None, :, None] - positions[:, None, None, :] < window
    if not kinds:  # all layers slide, and the model wants one mask
        return sees & near
    return {"full_attention": sees, "sliding_attention": sees & near}


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
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    (part / "stage.json").write_text(json.dumps({**info, "versions": versions}, indent=2) + "\n")
    (folder / "stage.json").unlink(missing_ok=True)
    for path in sorted(part.iterdir(), key=lambda path: path.name == "stage.json"):
        os.replace(path, folder / path.name)
    part.rmdir()


def stage_of(folder):
    """What a checkpoint's stage.json says; {} if no script of ours wrote it."""
    file = Path(folder, "stage.json")
    return json.loads(file.read_text()) if file.is_file() else {}


def trained_style(folder):
    """The --style that a checkpoint was trained with, and is to be asked in."""
    return stage_of(folder).get("config", {}).get("style", "msrl")


# ==================================================================================================
# 6. Judging

def judge(model, encoder, rows, sample, form="pixels", votes=1, temperature=1.0,
          max_new_tokens=512, batch_size=32, seed=0, orders=("AB", "BA"), desc="judging",
          first_batch=0, scores=False) -> list[Prediction]:
    """Judge every row in both orders -> predictions, sorted by row, order and sample.

    votes = 1 decodes greedily; more are sampled at `temperature` and share their prompt's forward.
    `sample` is the stages' sample_group() or stage 0's generate_greedily(). Each batch has a seed
    of its own; first_batch is the number of the first. With `scores`, score_a and score_b are the
    probability p that the model gave to its verdict when it wrote it, and 1 - p for the other side.
    """
    device = next(model.parameters()).device
    jobs = [(at, order) for at in range(len(rows)) for order in orders]
    jobs.sort(key=lambda job: rows[job[0]]["tokens"])  # alike lengths together: less padding
    batches = [jobs[k:k + batch_size] for k in range(0, len(jobs), batch_size)]
    predictions = []
    for k in tqdm(range(rank(), len(batches), world()), desc=desc, leave=False, mininterval=1,
                  disable=desc is None or rank() > 0):
        prompts = []
        for at, order in batches[k]:
            row = rows[at] if order == "AB" else swap(rows[at])
            prompts.append(encoder(row, form))
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + first_batch + k)
        rollout = sample(model, encoder, prompts, votes, temperature if votes > 1 else 0.0,
                         max_new_tokens, generator)
        for b, (at, order) in enumerate(batches[k]):
            for n, ids in enumerate(rollout.ids[b]):
                text = encoder.decode(ids)
                side = parse(text, encoder.style).verdict  # as shown
                pred = OTHER[side] if side and order == "BA" else side
                prediction = {"id": rows[at]["id"], "at": at, "order": order, "sample": n,
                              "pred": pred, "text": text}
                if scores and pred:
                    p = verdict_probability(text, ids, rollout.logp[b][n], encoder)
                    prediction["score_a"], prediction["score_b"] = p, 1 - p
                    if pred == "B":
                        prediction["score_a"], prediction["score_b"] = 1 - p, p
                predictions.append(prediction)
    return sorted(gather_list(predictions), key=lambda p: (p["at"], p["order"], p["sample"]))


def verdict_probability(text, ids, logps, encoder):
    """The probability of the token with the verdict, from the log-probs of the answer's tokens."""
    verdict_from = re.search(r"<answer>\s*", text).end()
    token = len(ids) - 1
    while len(encoder.decode(ids[:token])) > verdict_from:
        token -= 1
    return math.exp(logps[token])


def captioned(cfg, sample, device, max_new_tokens=300, batch_size=16):
    """Preference rows whose media have no captions get them from a vision-language checkpoint (the
    paper: GPT-5). -> path of a .jsonl of rows with captions. Each medium is described once; what
    is done stays in captions.jsonl, so a killed run goes on."""
    # what can fail comes before hours; this model is gone when the policy comes
    check_checkpoint(cfg.model, type(cfg).model)
    check_sources(cfg.heldout, "" if cfg.replay_ratio.endswith(":0") else cfg.replay)
    model, encoder = load(cfg.captioner, device)
    rows = load_rows(cfg.data, encoder, "pixels", None, cfg.skip_bad_rows, cfg.exclude)
    to_describe = {}  # medium -> what tells it from others, without repetition
    for row in rows:
        if not row["captions"]:
            for medium in row["media"]:
                to_describe[medium] = {"task": row["task"], "media": medium, "file": stamps(medium)}

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
    made_by = {"captioner": [cfg.captioner, stamps(cfg.captioner)], "prompt": cfg.caption_prompt}
    captions = resumed(Path(cfg.out, "captions.jsonl"), made_by, list(to_describe.values()),
                       describe, batch_size * world(), "captions")
    caption_of = dict(zip(to_describe, captions, strict=True))
    path = Path(cfg.out, "captioned.jsonl")  # always made anew: the rows of the data as it is now
    for row in rows:
        row["captions"] = row["captions"] or [caption_of[medium] for medium in row["media"]]
        row["media"] = [os.path.abspath(medium) for medium in row["media"]]
    if rank() == 0:
        write_lines(path, rows)
    gather_list([])  # nobody reads it before it is there
    return str(path)


def by_row(rows: list[Row], predictions: list[Prediction]):
    """-> for each row {order: its predictions}, {} where it has none."""
    judged = [{} for _ in rows]
    for prediction in predictions:
        judged[prediction["at"]].setdefault(prediction["order"], []).append(prediction)
    return judged


def majority(votes):
    """-> the verdicts that most votes name: two in a tied vote, none if no vote has a verdict."""
    counts = Counter(vote for vote in votes if vote is not None)
    return [verdict for verdict, n in counts.items() if n == max(counts.values())]


def points(label, votes):
    """What the votes of one order earn: 1 if their majority is the label, 0 if it is not (or none
    has a verdict), one half if the vote is tied (UNSPECIFIED)."""
    named = majority(votes)
    return (label in named) / max(1, len(named))


def habits(judged, style="msrl"):
    """How a judge answers, whatever is right: by_row() -> shares of 1."""
    predictions, flips, named_twice = [], 0, 0
    for orders in judged:
        named = []
        for votes in orders.values():
            predictions += votes
            most = majority([p["pred"] for p in votes])
            if len(most) == 1:
                named.append(most[0])
        if len(named) == 2:
            named_twice += 1
            flips += named[0] != named[1]
    verdicts = [p for p in predictions if p["pred"] in ("A", "B")]
    shown_as_a = sum((p["pred"] == "A") == (p["order"] == "AB") for p in verdicts)
    silent = sum(p["pred"] is None and p.get("score_a") is None for p in predictions)
    formed = sum(parse(str(p.get("text") or ""), style).well_formed for p in predictions)
    return {"order_flips": flips / max(1, named_twice),
            "share_a": shown_as_a / max(1, len(verdicts)),
            "unparsable": silent / max(1, len(predictions)),
            "format": formed / max(1, len(predictions))}


def summarize(rows: list[Row], predictions: list[Prediction], style="msrl"):
    """Predictions -> accuracy and its companions, as shares of 1, of the rows that have any.

    A row counts the mean over its orders. An unparsable verdict is wrong. The interval is Wilson's
    at 95 % over rows, not over judgements: two orders of one row are no two independent rows.
    """
    judged = by_row(rows, predictions)
    earned = []
    for row, orders in zip(rows, judged, strict=True):
        if orders:
            shares = [points(row["label"], [p["pred"] for p in votes]) for votes in orders.values()]
            earned.append(sum(shares) / len(shares))
    accuracy, n = sum(earned) / len(earned), len(earned)
    return {"accuracy": accuracy, "interval": wilson(accuracy, n), "n": n,
            **habits(judged, style)}


def wilson(p, n, z=1.96):
    """The interval of all true rates that p of n is within z standard errors of."""
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    total = 1 + z * z / n
    return [max(0.0, (middle - half) / total), min(1.0, (middle + half) / total)]


def show(name, summary):
    low, high = summary["interval"]
    return (f"{name}: accuracy {summary['accuracy']:.1%} [{low:.1%}, {high:.1%}] on "
            f"{summary['n']} rows, flips with the order {summary['order_flips']:.1%}, says A "
            f"{summary['share_a']:.1%}, unparsable {summary['unparsable']:.1%}, well-formed "
            f"{summary['format']:.1%}")


def evaluate(model, encoder, rows, cfg, when, form, sample):
    """Greedy verdicts on held-out rows in both orders. -> summarize() of all rows, and "tasks":
    the accuracy by task."""
    predictions = judge(model, encoder, rows, sample, form, batch_size=cfg.eval_batch,
                        max_new_tokens=cfg.max_new_tokens, desc=f"held-out, {when}")
    summary, tasks = summarize(rows, predictions, encoder.style), {}
    for task in TASKS:
        of_task = [p for p in predictions if rows[p["at"]]["task"] == task]
        if of_task:
            tasks[task] = summarize(rows, of_task)["accuracy"]
    if rank() == 0:
        by_task = ", ".join(f"{task} {accuracy:.1%}" for task, accuracy in tasks.items())
        tqdm.write(f"{show(f'held-out, {when}', summary)}; {by_task}")
    return {**summary, "tasks": tasks}


# ==================================================================================================
# 7. Runs: command line, processes, optimiser step, data order, run folder, resume

def knob(default, help, **more):
    """A field of a script's Config, and so a flag of its command line. `more`: metavar, nargs..."""
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": help, **more})
    return field(default=default, metadata={"help": help, **more})


AT_LEAST_1 = ("batch_size", "micro_batch", "rollout_batch", "save_every", "max_new_tokens",
              "epochs", "samples", "frames", "max_tiles", "eval_batch", "eval_rows")


def parse_config(cls, description, paper=None):
    """Command line -> config. `--preset paper` takes the paper's defaults; flags still win. What a
    script itself refuses is said by its Config's check(), which raises ValueError."""
    parser = transformers.HfArgumentParser(cls, description=description, allow_abbrev=False,
                                           formatter_class=_Help)
    if paper is not None:
        parser.add_argument("--preset", choices=["toy", "paper"], default="toy",
                            help="'paper' takes the paper's data and hyper-parameters")
        known, _ = parser.parse_known_args()
        if known.preset == "paper":
            parser.set_defaults(**(paper(known) if callable(paper) else paper))
    cfg, *_, unknown = parser.parse_args_into_dataclasses(
        return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        parser.error(f"unknown: {' '.join(unknown)} (see --help)")
    for name in AT_LEAST_1:
        value = getattr(cfg, name, None)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1")
    if hasattr(cfg, "check"):
        try:
            cfg.check()
        except ValueError as e:
            parser.error(str(e))
    return cfg


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


# Processes. accelerate starts and ends the group and carries objects from one to another. It does
# not carry the gradients: its wrapper expects every process to use every parameter, and a batch
# without an image uses no vision tower.

def rank():
    return int(os.environ.get("RANK", 0))


def world():
    return int(os.environ.get("WORLD_SIZE", 1))


# How long a process waits for another one. What one may do alone is to write a checkpoint or to
# decode a batch of long answers; a process that died is noticed after this time at the latest.
TIMEOUT = timedelta(hours=1)


def start_processes(batch_size=0):
    """Join the process group if torchrun started us. -> the device of this process."""
    if batch_size % world():
        raise SystemExit(f"--batch_size {batch_size} does not divide among {world()} processes")
    return PartialState(cpu=not torch.cuda.is_available(), timeout=TIMEOUT).device


def end_processes():
    if world() > 1:
        PartialState().wait_for_everyone()
        PartialState().destroy_process_group()


def gather_list(items):
    """The lists of all processes, one after another in rank order."""
    return gather_object(items) if world() > 1 else items


def gather(values):
    """[B, ...] of this process -> [B_all, ...] of all, in rank order."""
    return torch.cat(gather_list([values]))


def sum_over_ranks(*values):
    """Each number summed over all processes."""
    return [sum(of_ranks) for of_ranks in zip(*gather_list([values]), strict=True)]


def sum_gradients(parameters):
    """Sum gradients over processes. A parameter this rank did not use counts as zero, so ranks with
    different kinds of rows cannot hang on one another."""
    if world() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)


# The optimiser: the same in every script that trains.

def trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def make_optimizer(model, lr):
    """UNSPECIFIED: weight decay and schedule. Ours are none and, in RL, a constant rate."""
    return torch.optim.AdamW(trainable(model), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)


def optimizer_step(optimizer, parameters, max_grad_norm):
    """Sum the gradients over processes, clip their norm, take a step. -> the norm before the clip.
    A gradient that is no number would ruin every weight for good: the run stops instead."""
    sum_gradients(parameters)
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm).item()
    if not math.isfinite(norm):  # the same number on every process, so all stop together
        raise SystemExit(f"the gradient became {norm}; no step was taken. Go on from the last "
                         "saved state with a smaller --lr; see metrics.jsonl.")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def progress(start, stop, desc):
    """The steps still to do, with a bar that shows an ETA."""
    return tqdm(range(start, stop), initial=start, total=stop, desc=desc, disable=rank() > 0,
                mininterval=2)


def peak_memory_gb():
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    import resource  # here, because Windows has none
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


# The order of the data.

def batch_of(rows, step, batch_size, seed, may_swap=lambda row: True):
    """The rows of step 0, 1, 2...: epoch after epoch, each in its own shuffled order, and in each
    epoch each row for which may_swap(row) shows its candidates in an order that is a coin of
    (seed, epoch, id). Depends on nothing but its arguments, so a resumed run sees what an unbroken
    one would."""
    batch = []
    for k in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(k, len(rows))
        row = rows[_permutation(len(rows), seed, epoch)[place]]
        if may_swap(row) and coin(seed, epoch, row["id"]):
            row = swap(row)
        batch.append(row)
    return batch


@lru_cache(maxsize=4)
def _permutation(n, seed, epoch):
    order = list(range(n))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return order


# The run folder. Whenever a run is killed, the same command goes on from what is there.

MAY_CHANGE = ("out", "lr", "max_steps", "save_every", "eval_every", "eval_rows", "eval_batch",
              "micro_batch", "log_rollouts_every", "skip_bad_rows")


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
                         "--out.") from None
    state_file = folder / "state.pt"
    if not state_file.exists():
        _drop_log_after(folder, 0)  # killed before its first save: its log begins anew as well
        return None
    try:
        state = torch.load(state_file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as e:
        raise SystemExit(f"{state_file}: is no saved state ({type(e).__name__}); delete it."
                         ) from None
    changed = differences(state["config"], asdict(config), MAY_CHANGE)
    if changed:
        raise SystemExit(f"{state_file} belongs to a run with other settings ({changed}). Take "
                         "another --out, or delete the folder.")
    if rank() == 0:
        print(f"resuming {folder} after step {state['step']}")
    _drop_log_after(folder, state["step"])
    return state


def differences(before, now, but=()):
    """Two dicts of settings -> "lr 0.1 -> 0.2; ...", '' if they are the same."""
    changed = [f"{name} {before.get(name)!r} -> {value!r}" for name, value in now.items()
               if name not in but and before.get(name) != value]
    return "; ".join(changed)


def _drop_log_after(folder, step):
    """A killed run may have logged steps it had not saved; they will be done and logged again."""
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        if rank() == 0 and (folder / name).exists():
            logged = whole_lines(folder / name)
            write_lines(folder / name, [line for line in logged if line["step"] <= step])


def save_state(folder, model, optimizer, step, config, **kept):
    """Write to a side file, flush it to disk, then rename: whenever we are killed, state.pt is a
    whole state, the new one or the one before. `kept`: what else resume() is to give back."""
    part = Path(folder, "state.pt.tmp")
    with open(part, "wb") as f:
        torch.save({"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                    "config": asdict(config), **kept}, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, Path(folder, "state.pt"))


def resume(state, model, optimizer):
    """Load what open_run() found. -> the steps that are done, and what else was kept, as a dict."""
    if state is None:
        return 0, {}
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    for group in optimizer.param_groups:
        group["lr"] = optimizer.defaults["lr"]  # --lr may have changed
    known = ("step", "model", "optimizer", "config")
    return state["step"], {name: value for name, value in state.items() if name not in known}


def resumed(path, made_by, rows, work, chunk=256, desc=None):
    """One JSON value for each row, made `chunk` rows at a time: work(rows[at:at + chunk], at) is
    the list of theirs. What is done stays in `path`, so a killed run goes on there; it goes on at a
    whole chunk, so work() may seed itself with `at` as long as chunks are equally large. A file
    that was made with other settings (`made_by`, a dict) or of other rows is refused. -> the
    values of all rows."""
    mark = json.loads(json.dumps({"made_by": made_by, "rows": _checksum(rows)}))
    found = whole_lines(path)
    if found and found[0] != mark:
        before = found[0].get("made_by", {}) if isinstance(found[0], dict) else {}
        changed = differences(before, mark["made_by"]) or "the rows have changed"
        raise SystemExit(f"{path} was made with other settings or of other rows ({changed}). "
                         "Delete it, or take another --out.")
    done = found[1:]
    if len(done) < len(rows):
        done = done[:len(done) // chunk * chunk]
    if rank() == 0:
        write_lines(path, [mark, *done])
    for at in tqdm(range(len(done), len(rows), chunk), desc=desc, unit="batch", mininterval=1,
                   disable=desc is None or rank() > 0):
        values = work(rows[at:at + chunk], at)
        done += values
        if rank() == 0:
            append(path, *values)
    gather_list([])  # nobody reads this file again before it is whole
    return done


def _checksum(rows):
    """Tells rows from others by what a model is shown of them. Labels have no part in it."""
    keys = ("id", "task", "prompt", "responses", "media", "captions", "file", "reference")
    content = [[row.get(key) for key in keys] for row in rows]
    return zlib.crc32(json.dumps(content).encode())


def stamps(*paths):
    """Size and time of files, or of the checkpoints in folders, so that a newer one of the same
    name is told from them."""
    found = []
    for path in paths:
        for file in (Path(path), Path(path, "stage.json"), Path(path, "model.safetensors")):
            if file.is_file():
                found.append([str(file), file.stat().st_size, file.stat().st_mtime])
    return found


def whole_lines(path):
    """The objects of a .jsonl that a killed process may have left with a line cut in the middle.
    [] if there is no such file."""
    objects = []
    if Path(path).exists():
        for line in Path(path).read_bytes().split(b"\n"):
            try:
                objects.append(json.loads(line))
            except ValueError:  # also of a character cut in the middle, and of the empty last line
                break
    return objects


def write_lines(path, rows):
    """Replace a .jsonl as a whole: whenever we are killed, it is the old one or the new one."""
    part = Path(path).with_suffix(".tmp")
    part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    os.replace(part, path)


def append(path, *rows):
    with open(path, "a", encoding="utf-8") as f:
        for row in rows:
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
