"""
What every stage shares and no stage is about. Nothing in this file knows what GRPO is.

    1  templates     MSRL Figures 4-7: one preference row -> one prompt text
    2  rewards       parse an answer; format, accuracy and task reward (MSRL Eq. 4, section 4.2)
    3  rows          what a row must hold (data.py reads them); swap its two candidates
    4  encoding      prompt text, images and videos -> token ids and pixel tiles
    5  models        load, save, stage.json
    6  judging       both orders, accuracy with a 95 % interval
    7  runs          command line, processes, optimiser step, logs, resume
"""

import argparse
import copy
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
import zlib
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, TypedDict

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from accelerate import PartialState, tracking
from accelerate.utils import gather_object
from PIL import Image
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer
# by its place: without torchvision 5.17 has a dummy by this name at the top
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import cached_file

import decoding
import sharding

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
    for key in ("subset", "group", "source"):  # rows are counted by them
        if not isinstance(row.get(key) or "", (str, int)):
            raise BadRow(f"{key!r} is {type(row[key]).__name__}, not a string")
    try:  # also of the id, of paths and of keys that only we know nothing of: all may be written
        json.dumps(row, ensure_ascii=False, default=str).encode()
    except (ValueError, RecursionError):
        raise BadRow("has a key or value that is not valid Unicode, or too deep; mend the file"
                     ) from None
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


# ==================================================================================================
# 4. Encoding. No processor object: in transformers 5.23 those of InternVL and Qwen-VL cannot be
# constructed without torchvision. Their work is small: one placeholder per feature of an image.

IMAGE_TOKEN = "<IMG_CONTEXT>"  # InternVL's placeholder
QWEN_VL = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
VISION_MODELS = ("internvl", *QWEN_VL)
VIDEO_SETTINGS = "video_preprocessor_config.json"  # not for us, but for who serves a checkpoint
NO_CODE = {"trust_remote_code": False}  # a folder is data; nor is a pickle read, see load()


# Media are not to be trusted: a few kilobytes can unpack to gigabytes, and a file that ends in .mp4
# can be a list of other files to read.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")   # not EPS, which runs a program
VIDEO_FORMATS = "mp4,webm,avi,mpegts,mpeg,flv,asf,ogg,nut,gif"  # none that names other files
MAX_PIXELS = 89_478_485  # of an image or a frame: 256 MiB as RGB; from here on Pillow warns
MAX_FRAMES = 108_000     # of a video: an hour at 30 a second
MAX_VIDEO_PIXELS = MAX_FRAMES * 1920 * 1080  # of all its frames together


def check_file(kind, path):
    """Raises BadRow for what is no file, such as a pipe, which would be read for ever."""
    if not os.path.exists(path):
        raise BadRow(f"{kind} {path} does not exist")
    if not os.path.isfile(path):
        raise BadRow(f"{kind} {path} is no file; replace the file by one")


def open_image(path):
    """-> a PIL image in RGB. Raises BadRow."""
    check_file("image", path)
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadRow(f"image {path} has {image.width} x {image.height} pixels, more than "
                             f"{MAX_PIXELS:,}; make it smaller")
            return image.convert("RGB")  # convert() decodes, so a truncated file fails here
    except BadRow:
        raise
    except Exception as e:  # Pillow raises a dozen kinds for corrupt files
        raise BadRow(f"image {path} cannot be read ({e}); replace the file") from e


def decoded(path):
    """Yield the frames of a video file, each with its time in seconds; none without a video."""
    import av  # here, because only video files need it
    # an absolute path, for "concat:a.mp4" would be an instruction
    with av.open(os.path.abspath(path), options={"format_whitelist": VIDEO_FORMATS}) as container:
        for stream in container.streams.video[:1]:
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
            rate = float(stream.average_rate or 24)
            for i, frame in enumerate(container.decode(stream)):
                yield frame, i / rate


def open_video(path, frames):
    """`frames` frames evenly spaced by index (all of a shorter video) from what PyAV decodes, or
    from a folder of images. -> list of PIL images, a file's with .info["seconds"]. Raises BadRow.
    Decodes twice, because containers lie about their number of frames and all frames of a long
    video do not fit into memory."""
    if os.path.isdir(path):
        files = [file for file in Path(path).iterdir()
                 if file.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp")]
        files.sort(key=lambda file: (len(file.name), file.name))  # 2.png before 10.png
        return [open_image(files[i]) for i in spread(len(files), frames, path)]

    check_file("video", path)
    try:
        count = pixels = 0
        for frame, _ in decoded(path):
            count += 1
            pixels += frame.width * frame.height
            if count > MAX_FRAMES or pixels > MAX_VIDEO_PIXELS:
                raise BadRow(f"video {path} is too long: {count:,} frames and more of {frame.width}"
                             f" x {frame.height}; cut it, or take a folder of some of its frames")
        chosen = spread(count, frames, path)
        images = []
        for i, (frame, seconds) in enumerate(decoded(path)):
            if i in chosen:
                images.append(frame.to_image())
                images[-1].info["seconds"] = seconds
        return images
    except BadRow:
        raise
    except Exception as e:
        raise BadRow(f"video {path} cannot be read ({e}); replace the file") from e


def spread(n, frames, path):
    """Indices of min(n, frames) of n frames, each in the middle of its share of the video.
    UNSPECIFIED: how the middle is rounded. transformers' video processor for InternVL rounds down,
    its model card rounds twice: a frame or two beside ours."""
    if n == 0:
        raise BadRow(f"video {path} has no frames; replace the file")
    k = min(frames, n)
    return [round((i + 0.5) * n / k - 0.5) for i in range(k)]


@dataclass
class Prompt:
    ids: list                    # token ids, one placeholder id per image feature
    pixels: torch.Tensor | None  # [tiles, 3, H, W], Qwen-VL: [patches, D]; None without media
    grids: torch.Tensor | None = None      # Qwen-VL: patches in time, height, width [media, 3]
    positions: torch.Tensor | None = None  # of the ids: [P], Qwen-VL: in time, height, width [3, P]

    def __post_init__(self):
        if self.positions is None:
            self.positions = torch.arange(len(self.ids))

    def following(self, n):
        """Positions of n tokens after the prompt [n], in all parts the same. A prompt ends in text,
        so that its last token has the largest position."""
        return self.positions[..., -1].max() + 1 + torch.arange(n)


class Encoder:
    """Turns rows into Prompts for one checkpoint: tokenizer, image processor and special ids."""

    def __init__(self, folder, config, frames=8, max_tiles=12, style="msrl", max_pixels=0):
        self.tokenizer = AutoTokenizer.from_pretrained(folder, **NO_CODE)
        self.kind = config.model_type
        self.frames, self.max_tiles, self.style = frames or 8, max_tiles or 12, style
        self.image_token_id = getattr(config, "image_token_id", None)
        added = self.tokenizer.added_tokens_decoder.values()
        special = [token.content for token in added if token.special]  # 5.17 lists few of them
        self.special_tokens = tuple(dict.fromkeys(self.tokenizer.all_special_tokens + special))
        self.forbidden = tuple(dict.fromkeys(FORBIDDEN + self.special_tokens))  # in users' texts
        self.image_processor = None
        if self.image_token_id is not None:
            limit = {"max_pixels": max_pixels} if max_pixels else {}  # else the checkpoint's own
            self.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil",
                                                                      **limit, **NO_CODE)
            self.tokens_per_tile = getattr(config, "image_seq_length", None)  # InternVL
            self.positions_per_second = getattr(config.vision_config, "tokens_per_second", None)
        self.video_settings = cached_file(folder, VIDEO_SETTINGS,
                                          _raise_exceptions_for_missing_entries=False,
                                          _raise_exceptions_for_connection_errors=False)
        self.eos_ids = self._declared_eos_ids(folder, config)
        if not self.eos_ids:
            raise SystemExit(f"{folder}: neither tokenizer nor generation_config.json names an "
                             "end-of-sequence token; set eos_token_id.")
        self.eos_id = self.tokenizer.eos_token_id or self.eos_ids[0]  # the one SFT teaches
        self.pad_id = self.tokenizer.pad_token_id
        if self.pad_id is None:
            self.pad_id = self.eos_ids[0]

    def _declared_eos_ids(self, folder, config):
        """Every declared end-of-sequence id ends an answer (InternVL3.5 declares one, Qwen two)."""
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
        text, pixels, grids, blocks = self.chat(text), [], [], []
        for path in media:
            if self.image_processor is None:
                raise BadRow("has media, but this checkpoint is text-only; use a vision-language "
                             "model or the caption form")
            images = open_video(path, self.frames) if video else [open_image(path)]
            if self.kind in QWEN_VL:
                shown, patches, grid, blocks_of_medium = self.as_patches(images, video)
                pixels.append(patches)
                grids.append(grid)
                blocks += blocks_of_medium
            else:
                shown, tiles = self.as_tiles(images, video)
                pixels.append(tiles)
            text = text.replace("<video>" if video else "<image>", shown, 1)
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        prompt = Prompt(ids, torch.cat(pixels) if pixels else None)
        if self.kind in QWEN_VL:
            prompt.grids = torch.tensor(grids) if grids else None
            prompt.positions = rotary_positions(ids, self.image_token_id, blocks)
        return prompt

    def as_tiles(self, images, video):
        """The images of a medium as InternVL takes them -> text with placeholders, tiles
        [tiles, 3, H, W]"""
        # a video frame is one tile; a still image is cut into up to max_tiles (+ a thumbnail)
        out = self.image_processor(images=images, return_tensors="pt", max_patches=self.max_tiles,
                                   crop_to_patches=not video and self.max_tiles > 1)
        shown = []
        for number, n_tiles in enumerate(out["num_patches"], 1):
            features = IMAGE_TOKEN * (self.tokens_per_tile * int(n_tiles))
            title = f"Frame{number}: " if video else ""
            shown.append(f"{title}<img>{features}</img>")
        return "\n".join(shown), out["pixel_values"]

    def as_patches(self, images, video):
        """The images of a medium as Qwen-VL takes them -> text with placeholders, patches
        [T * height * width, D], their grid [T, height, width] (T = 1 for a still image) and the
        blocks of placeholders, see rotary_positions(). Raises BadRow.

        A video is put to the model as an image of T moments: a feature is read where a placeholder
        stands, whichever token that is, and one vision tower serves both."""
        if video:
            patches, grid, seconds = self.video_patches(images)
        else:
            patches, grid = self.image_patches(images)
        moments, height, width = grid
        merge, n = self.image_processor.merge_size, self.image_processor.temporal_patch_size
        rows, columns = height // merge, width // merge
        features = "<|image_pad|>" * (rows * columns)
        if video and self.kind == "qwen3_vl":  # each moment by itself, after its time
            # DEVIATION: transformers 5 has one more start and end round it all; 4.57, with which
            # the model came, and vLLM have not
            shown = ""
            for first in range(0, len(seconds), n):
                frames = seconds[first:first + n]
                time = (frames[0] + frames[-1]) / 2
                shown += f"<{time:.1f} seconds><|vision_start|>{features}<|vision_end|>"
            return shown, patches, grid, [([0], rows, columns)] * moments
        step = 1
        if self.positions_per_second and moments > 1:  # Qwen2.5-VL: in seconds, evenly
            between = (seconds[-1] - seconds[0]) / (len(seconds) - 1)
            step = self.positions_per_second * n * between
        times = [int(moment * step) for moment in range(moments)]
        shown = f"<|vision_start|>{features * moments}<|vision_end|>"
        return shown, patches, grid, [(times, rows, columns)]

    def image_patches(self, images, **size):
        """-> patches [n * height * width, D] of n images of one size, the grid [1, height, width]
        of one of them. Raises BadRow."""
        try:
            out = self.image_processor(images=images, return_tensors="pt", **size)
        except ValueError as e:  # a strip of more than 200 : 1
            raise BadRow(f"has a medium that cannot be resized ({e}); replace the file") from e
        return out["pixel_values"], out["image_grid_thw"][0].tolist()

    def video_patches(self, images):
        """-> patches [T * height * width, D], grid [T, height, width], time of each frame in
        seconds. A moment is n frames; the last frame is repeated to fill the last one."""
        # UNSPECIFIED: a folder of frames has no times; Qwen samples two frames a second
        seconds = [image.info.get("seconds", k / 2) for k, image in enumerate(images)]
        processor = self.image_processor
        n = processor.temporal_patch_size
        images = images + images[-1:] * (-len(images) % n)
        images = [image.resize(images[0].size) for image in images]
        # As qwen-vl-utils, Qwen's own: a frame becomes 128 to 768 tokens. Its cap on all frames
        # together would begin at 300.
        token = (processor.patch_size * processor.merge_size) ** 2  # pixels per token
        largest = min(768 * token, processor.size["longest_edge"])
        size = {"shortest_edge": min(128 * token, largest), "longest_edge": largest}
        patches, (_, height, width) = self.image_patches(images, size=size)
        # The processor took each frame for a still image, and filled a moment with n copies of it.
        # Of the n frames of a moment, the k-th is to give the k-th copy.
        copies = patches.view(-1, n, height * width, 3, n, processor.patch_size ** 2)
        patches = copies.diagonal(dim1=1, dim2=4).movedim(-1, 3).flatten(2).flatten(0, 1)
        return patches, [len(images) // n, height, width], seconds

    def answer_ids(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] + [self.eos_id]

    def decode(self, ids):
        """Answer ids -> text without the end-of-sequence token."""
        ids = ids[:-1] if ids and ids[-1] in self.eos_ids else ids
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    @cached_property
    def kept_as(self):
        """What the length of a prompt depends on, beside its row: data.py keeps lengths by it."""
        depends = [sorted(self.tokenizer.get_vocab().items()), self.tokenizer.chat_template,
                   str(self.image_processor), self.frames, self.max_tiles, self.style]
        return hashlib.sha256(json.dumps(depends).encode()).hexdigest()

    def check(self, row, form):
        """-> prompt length in tokens. Reads the media, so a broken file is found before training.
        Raises BadRow."""
        if row["task"] != "text" and form == "pixels" and not row["media"]:
            raise BadRow("has no media; use the caption form")
        if row["task"] != "text" and form == "caption" and not row["captions"]:
            raise BadRow("has no captions; the caption form needs one for each medium")
        return len(self(row, form).ids)


def rotary_positions(ids, placeholder, blocks):
    """Positions of a prompt's tokens in time, height and width [3, P], as Qwen-VL counts them. Text
    counts on in all three parts. A block of placeholders, (times, rows, columns), takes one
    position after another in each part by itself; what comes after it goes on behind its largest.

    DEVIATION: get_rope_index() of transformers 5.17 and 5.23 goes on behind rows and columns, so
    that the text after a long Qwen2.5-VL video has positions that the video has, too. That of 4.49,
    by the model's authors, counted as here, and vLLM does."""
    positions, following, blocks = [], 0, iter(blocks)
    while len(positions) < len(ids):
        if ids[len(positions)] != placeholder:
            positions.append((following, following, following))
        else:
            times, rows, columns = next(blocks)
            for time in times:
                for row in range(rows):
                    for column in range(columns):
                        positions.append((following + time, following + row, following + column))
        following = max(positions[-1]) + 1
    return torch.tensor(positions).T


def left_pad(prompts, pad_id, device):
    """B prompts -> ids [B, P], mask [B, P] (1 = real), positions [B, P] (Qwen-VL: [3, B, P]), and
    the media as arguments of the model."""
    width = max(len(prompt.ids) for prompt in prompts)
    ids, mask, positions = [], [], []
    for prompt in prompts:
        padding = width - len(prompt.ids)
        ids.append([pad_id] * padding + prompt.ids)
        mask.append([0] * padding + [1] * len(prompt.ids))
        positions.append(F.pad(prompt.positions, (padding, 0)))
    return (torch.tensor(ids, device=device), torch.tensor(mask, device=device),
            torch.stack(positions, -2).to(device), media_of(prompts, device))


def media_of(prompts, device):
    """What the model takes besides ids: {} if no prompt has media."""
    media = {}
    pixels = [prompt.pixels for prompt in prompts if prompt.pixels is not None]
    grids = [prompt.grids for prompt in prompts if prompt.grids is not None]
    if pixels:
        media["pixel_values"] = torch.cat(pixels).to(device)
    if grids:
        media["image_grid_thw"] = torch.cat(grids).to(device)
    return media


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


def auto_class(folder):
    """What of transformers loads this checkpoint. Stops with one line if none of ours does."""
    config, _ = transformers.PreTrainedConfig.get_config_dict(folder)
    kind = config.get("model_type")
    if kind is None:
        raise ValueError("config.json names no model_type")
    if kind in VISION_MODELS:
        return transformers.AutoModelForImageTextToText
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and "vision_config" not in config:
        return transformers.AutoModelForCausalLM
    raise SystemExit(f"{folder}: its architecture {kind!r} is not supported. Take a vision model "
                     f"of type {', '.join(VISION_MODELS)}, or for text a causal language model "
                     "of transformers (llama, qwen3, gemma3_text, ...).")


def load(folder, device="cpu", made_by="", shards=False, **encoder_args):
    """-> model (fp32 weights, eval mode) and its Encoder. Takes one of VISION_MODELS or a text-only
    causal LM (stages 0 and 1), as a folder of plain save_pretrained or a hub id. `made_by`: the
    default folder, whose name is that of the script that makes it, for the message if there is no
    checkpoint. `shards`: for sharding.shard(), on the CPU in the first process and without weights
    (device "meta") in the others.

    Only safetensors are read: a pytorch_model.bin is a pickle, which can run anything.
    fp32 on purpose: a learning rate of 1e-6 on bf16 weights rounds away (the default dtype of
    transformers 5 is the file's, usually bf16). On a GPU, autocast computes in bf16.
    """
    maker = check_checkpoint(folder, made_by)
    if shards:
        device = "cpu" if rank() == 0 else "meta"
    try:
        auto = auto_class(folder)
        config = AutoConfig.from_pretrained(folder, **NO_CODE)
        encoder = Encoder(folder, config, **encoder_args)
        model, found = auto.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True,
            attn_implementation=decoding.ATTENTION,
            device_map="meta" if str(device) == "meta" else None, **NO_CODE)
        if found["missing_keys"]:  # transformers would fill them with random numbers, and go on
            raise ValueError(f"{len(found['missing_keys'])} weights are missing, the first is "
                             f"{sorted(found['missing_keys'])[0]}")
        if len(encoder.answer_ids("A")) < 2:
            raise ValueError("the tokenizer is empty")
        declare_tied(model)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as e:
        reason = (str(e).strip() or "?").splitlines()[0]
        raise SystemExit(f"{folder}: cannot be loaded as a checkpoint ({type(e).__name__}: "
                         f"{reason}). It must hold model, tokenizer and, for a vision model, "
                         f"image processor, as save_pretrained writes them{maker}.") from e
    decoding.refuse_other_attention(model)
    return model.to(device).eval(), encoder


def declare_tied(model):
    """Make the config say whether head and embeddings are one weight, so that a checkpoint does.

    That of InternVL3.5 has two, but its config.json only says so for the language model. As a
    whole, transformers 5 takes it for tied: it reads both weights and keeps them apart, but would
    write "tied", and vLLM, which believes that, would throw the head away."""
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = tied


def freeze_vision(model):
    """Freeze vision tower and projector (MSRL 4.1: text-only training). A text model has none."""
    for name in ("vision_tower", "multi_modal_projector", "visual"):  # Qwen-VL: one for both
        part = getattr(getattr(model, "model", model), name, None)
        if part is not None:
            part.requires_grad_(False)


def add_adapter(model, rank, seed):
    """LoRA: freeze the model, and let W x + 2 B A x be computed for W x in its linear layers, where
    A [rank, in] is random, B [out, rank] zero and both are trained. In place: the class of the
    model and the places of its parts stay. Call it after freeze_vision().

    UNSPECIFIED: which layers. Ours are all linear layers that would be trained, so also those of a
    vision tower that is not frozen. Not the head: its weights may be those of the embeddings."""
    from peft import LoraConfig, inject_adapter_in_model  # here, because peft is optional
    head = model.get_output_embeddings()
    names = []
    for name, layer in model.named_modules():
        linear = isinstance(layer, torch.nn.Linear) and layer is not head
        if linear and layer.weight.requires_grad:
            names.append(name)
    torch.manual_seed(seed)  # the same A on every process
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=names)
    inject_adapter_in_model(config, model)


def adapted_layers(model):
    """-> {name: layer with an adapter}"""
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}


def reference(model):
    """The model as it starts, for the KL: a frozen copy, or with an adapter no copy, but the model
    without it."""
    if adapted_layers(model):
        return AdapterOff(model)
    if sharding.is_sharded(model):
        return sharding.twin(load(model.name_or_path, "meta")[0], model)
    return copy.deepcopy(model).requires_grad_(False)


class AdapterOff:
    """A model that leaves its adapter out when it is called."""

    def __init__(self, model):
        self.model = model

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, **inputs):
        layers = adapted_layers(self.model).values()
        for layer in layers:
            layer.enable_adapters(False)
        try:
            return self.model(**inputs)
        finally:
            for layer in layers:
                layer.enable_adapters(True)


@contextmanager
def adapter_merged(model):
    """Inside it, the model is an ordinary one, with W + 2 B A for W. Layer by layer and in place,
    so it takes no memory; behind it, W is what it was but for rounding."""
    layers = adapted_layers(model)
    for name, layer in layers.items():
        layer.merge()
        model.set_submodule(name, layer.base_layer)
    try:
        yield
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
            layer.unmerge()


def autocast(device):
    """bf16 on a GPU. Without autocast's cache: a forward needs a weight once, and the cache would
    keep all of them in bf16 to its end, those a sharded model has let go as well."""
    return torch.autocast(torch.device(device).type, torch.bfloat16,
                          enabled=torch.device(device).type == "cuda", cache_enabled=False)


def save_checkpoint(folder, model, encoder, **info):
    """Write the checkpoint; stage.json last, so a folder that has one is complete. All processes
    call it, the first one writes."""
    folder = Path(folder)
    part = folder / "checkpoint.tmp"
    with adapter_merged(model):
        weights = sharding.full_state(model)
        if rank() > 0:
            return
        shutil.rmtree(part, ignore_errors=True)
        # transformers copies a file's weights to write it: not all of them at once
        size = "5GB" if sharding.is_sharded(model) else "50GB"
        with writing(part):
            model.save_pretrained(part, state_dict=weights, max_shard_size=size)
    with writing(part):
        encoder.tokenizer.save_pretrained(part)
        if encoder.image_processor is not None:
            encoder.image_processor.save_pretrained(part)
        if encoder.video_settings is not None:
            shutil.copy(encoder.video_settings, part / VIDEO_SETTINGS)
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        about = json.dumps({**info, "versions": versions}, indent=2)
        (part / "stage.json").write_text(about + "\n")
    (folder / "stage.json").unlink(missing_ok=True)
    for old in folder.glob("model*.safetensors*"):  # of another number of files, they would mix
        old.unlink()
    for path in sorted(part.iterdir(), key=lambda path: path.name == "stage.json"):
        os.replace(path, folder / path.name)
    part.rmdir()


def stage_of(folder):
    """What a checkpoint's stage.json says; {} if no script of ours wrote it."""
    file = Path(folder, "stage.json")
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as e:
        raise SystemExit(f"{file}: is not what our scripts write ({e}); make {folder} anew."
                         ) from None


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
    with sharding.whole(model):  # processes have different numbers of batches
        for k in tqdm(range(rank(), len(batches), world()), desc=desc, leave=False, mininterval=1,
                      disable=desc is None or rank() > 0):
            prompts = []
            for at, order in batches[k]:
                row = rows[at] if order == "AB" else swap(rows[at])
                prompts.append(encoder(row, form))
            generator = torch.Generator(device).manual_seed(seed * 1_000_003 + first_batch + k)
            rollout = sample(model, encoder, prompts, votes, temperature if votes > 1 else 0.0,
                             max_new_tokens, generator)
            predictions += verdicts(rows, batches[k], rollout, encoder, scores)
    return sorted(gather_list(predictions), key=lambda p: (p["at"], p["order"], p["sample"]))


def verdicts(rows, jobs, rollout, encoder, scores) -> list[Prediction]:
    """The answers of a rollout -> predictions. `jobs`: for each prompt the place of its row and the
    order it was shown in."""
    predictions = []
    for b, (at, order) in enumerate(jobs):
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
    return predictions


def verdict_probability(text, ids, logps, encoder):
    """The probability of the token with the verdict, from the log-probs of the answer's tokens."""
    verdict_from = re.search(r"<answer>\s*", text).end()
    token = len(ids) - 1
    while len(encoder.decode(ids[:token])) > verdict_from:
        token -= 1
    return math.exp(logps[token])


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


# Whose recipe a preset is, and the scripts that have it
PRESETS = {"paper": "MSRL 5.1, A.2 (stages 0 to 3, bt_reward.py)",
           "r1": "R1-Reward 4.3, 5 (stage0_sft.py, stage3_mm_grpo.py)",
           "basereward": "BaseReward 3.2, 4.1 (bt_reward.py)",
           "dt2it": "DT2IT-MRM 4.3 (bt_reward.py, dt2it.py)"}
# UNSPECIFIED: MSRL trains InternVL3.5 alone (5.1: 1B, 4B, 8B, 14B). Qwen2.5-VL is what R1-Reward
# and BaseReward train, at 7B; the limit is the one in MSRL's scripts.
BACKBONES = {"internvl": dict(model="OpenGVLab/InternVL3_5-8B-HF"),
             "qwen2_5_vl": dict(model="Qwen/Qwen2.5-VL-7B-Instruct", max_pixels=1_003_520)}


def parse_config(cls, description, presets=None):
    """Command line -> config. `presets`, {name: defaults, or a function from flags to defaults},
    are what --preset can take; flags still win. What a script itself refuses is said by its
    Config's check(), which raises ValueError."""
    parser = transformers.HfArgumentParser(cls, description=description, allow_abbrev=False,
                                           formatter_class=_Help)
    if presets:
        parser.set_defaults(**_preset_defaults(parser, presets))
        parser.add_argument("--dry_run", action="store_true",
                            help="tell settings, what is missing, steps and memory, and end")
    cfg, *more, unknown = parser.parse_args_into_dataclasses(
        return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        parser.error(f"unknown: {' '.join(unknown)} (see --help)")
    for name in AT_LEAST_1:
        value = getattr(cfg, name, None)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1")
    lora_rank = getattr(cfg, "lora_rank", 0)
    if lora_rank < 0:
        parser.error("--lora_rank must be at least 1, or 0 for off")
    if lora_rank and find_spec("peft") is None:  # said before minutes of loading
        raise SystemExit(f"--lora_rank {lora_rank} needs peft, which is not installed: "
                         "pip install peft")
    tracker = getattr(cfg, "tracker", "none")
    if tracker != "none" and find_spec(tracker) is None:
        raise SystemExit(f"--tracker {tracker} is not installed: pip install {tracker}")
    if hasattr(cfg, "check"):
        try:
            cfg.check()
        except ValueError as e:
            parser.error(str(e))
    if presets and more[0].dry_run:
        import dry_run  # here, because it imports this file
        dry_run.report(cfg, presets, more[0].preset)
        raise SystemExit(0)
    return cfg


def _preset_defaults(parser, presets):
    """Add --preset and --backbone -> the defaults that they stand for."""
    names = ", ".join(["toy", *presets])
    papers = "; ".join(f"{name}: {PRESETS[name]}" for name in presets)
    parser.add_argument("--preset", default="toy", metavar=f"{{{names}}}",
                        help=f"a paper's own data and hyper-parameters. {papers}")
    parser.add_argument("--backbone", choices=list(BACKBONES),
                        help="what --preset paper starts from; the paper's is internvl")
    known, _ = parser.parse_known_args()
    name, defaults = known.preset, presets.get(known.preset, {})
    if name != "toy" and name not in presets:
        parser.error(f"--preset {name} is none of {names}. {name}: {PRESETS.get(name, 'unknown')}")
    if callable(defaults):
        defaults = defaults(known)
    if known.backbone and (name != "paper" or "model" not in defaults):
        parser.error("--backbone is for --preset paper of stage0_sft.py and bt_reward.py; "
                     "elsewhere --model says what training starts from")
    return defaults | BACKBONES.get(known.backbone, {})


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
    if world() == 1 or isinstance(parameters[0], DTensor):  # FSDP2 has summed in the backward
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
    # fused: on a GPU it else makes 4 more bytes a parameter while it steps
    return torch.optim.AdamW(trainable(model), lr=lr, betas=(0.9, 0.95), weight_decay=0.0,
                             fused=True)


MAX_SKIPPED = 3  # optimiser steps in a row
SAMPLED = 4096  # weights of each tensor, to see how many a step changes


def optimizer_step(optimizer, parameters, max_grad_norm):
    """Sum the gradients over processes, clip their norm, take a step. -> the norm before the clip.
    A gradient that is no number would ruin every weight for good: the step is left out, and after
    MAX_SKIPPED of them in a row the run stops. The norm is the same number on every process, so
    all do the same. The first step of a run that has a gradient is watched."""
    sum_gradients(parameters)
    norm = sharding.full(torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)).item()
    if math.isfinite(norm):
        optimizer.skipped = 0
        optimizer.moved = getattr(optimizer, "moved", bool(optimizer.state))  # resumed: it did
        if norm > 0 and not optimizer.moved:
            watched_step(optimizer, parameters, norm)
        else:
            optimizer.step()
    else:
        optimizer.skipped = getattr(optimizer, "skipped", 0) + 1
    optimizer.zero_grad(set_to_none=True)
    if optimizer.skipped == MAX_SKIPPED:
        raise SystemExit(f"the gradient was {norm} {MAX_SKIPPED} times in a row; no such step was "
                         "taken. Go on from the last saved state with a smaller --lr; see "
                         "metrics.jsonl.")
    return norm


def watched_step(optimizer, parameters, norm):
    """A step, and what share of the trained weights it changed, for first_change(). If that is 0
    the run stops: a rate of 1e-6 rounds away on a bf16 weight above 0.0005 or so, and such a run
    goes on for days and learns nothing. Below 1 it is where weights have no gradient, as the
    embeddings of words that no row has, the vision tower in a batch of texts, and half an adapter.

    Of each tensor SAMPLED weights count for all of it, so a large model needs no second copy; with
    --shard each process looks at its own part."""
    before = [sampled(parameter) for parameter in parameters]
    optimizer.step()
    optimizer.moved = True
    changed, total = 0.0, 0
    for parameter, old in zip(parameters, before, strict=True):
        n = own_part(parameter).numel()
        share = (sampled(parameter) != old).sum().item() / max(1, old.numel())
        changed, total = changed + n * share, total + n
    changed, total = sum_over_ranks(changed, total)
    if changed == 0:
        raise SystemExit(f"the first step changed no weight, though its gradient has a norm of "
                         f"{norm:.3g}: --lr {optimizer.param_groups[0]['lr']:.3g} is lost in the "
                         f"rounding of {parameters[0].dtype} weights. Take a larger --lr.")
    optimizer.first_change = {"changed_share": changed / total}


def first_change(optimizer):
    """-> {"changed_share": ...} when it is first asked after a watched step, later and in a resumed
    run {}"""
    return vars(optimizer).pop("first_change", {})


def own_part(parameter):
    """What this process holds of it, as one row of numbers."""
    tensor = parameter.detach()
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).flatten()


def sampled(parameter):
    """-> a copy of every k-th number of it. k is odd: an even one would stay in few columns."""
    numbers = own_part(parameter)
    k = -(-numbers.numel() // SAMPLED) | 1
    return numbers[::k].clone()


def progress(start, stop, desc):
    return Steps(range(start, stop), initial=start, total=stop, desc=desc, disable=rank() > 0,
                 mininterval=2)


class Steps(tqdm):
    """The steps still to do, with a bar that shows an ETA. As long as they go on SIGTERM, by which
    torchrun and schedulers end a job, is only noted. The loop asks for it once a step, saves and
    ends. Before the first step and after the last there is nothing to save: it ends us at once."""

    def __iter__(self):
        self.noted_at = None
        before = signal.signal(signal.SIGTERM, self.note)
        try:
            yield from super().__iter__()
        finally:
            signal.signal(signal.SIGTERM, before)
        if self.noted_at is not None:  # after the last question
            os.kill(os.getpid(), signal.SIGTERM)

    def note(self, *_):
        """A second one ends us at once, unless it is the same one: what SLURM sends to all
        processes, torchrun passes on to its own."""
        if self.noted_at is None:
            self.noted_at = time.monotonic()
        elif time.monotonic() - self.noted_at > 5:  # seconds
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    def stop_asked(self):
        """Has any process noted it? All get the same answer, so all end after the same step."""
        noted, = sum_over_ranks(self.noted_at is not None)
        return noted > 0


def end_stopped(folder, step):
    """End all processes after a step that is saved, with what shells and SLURM call a process that
    SIGTERM ended: after 0 they would begin with the next stage."""
    if rank() == 0:
        tqdm.write(f"{folder}: stopped by SIGTERM after step {step}, which is saved; the same "
                   "command goes on.")
    end_processes()
    raise SystemExit(128 + signal.SIGTERM)


def peak_memory_gb():
    """The most this process has held so far, in 1e9 bytes: of the GPU, or without one of the
    machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    found = status.exists() and re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
    if found:  # Linux, where ru_maxrss begins with the peak of the process that started this one
        return int(found[1]) * 1024 / 1e9
    import resource  # here, because Windows has none
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


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
              "micro_batch", "log_rollouts_every", "skip_bad_rows", "media_root", "tracker",
              "shard")
STATE = ("step", "model", "optimizer", "config", "file")  # in every state that open_run() returns


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
        state = torch.load(state_file, map_location="cpu", weights_only=True, mmap=world() > 1)
        missing = [name for name in STATE[:-1] if name not in state]
    except Exception as e:  # torch raises a dozen kinds for corrupt files
        raise SystemExit(f"{state_file}: is no saved state ({type(e).__name__}); delete it."
                         ) from None
    if missing or not isinstance(state["config"], dict) or not isinstance(state["step"], int):
        raise SystemExit(f"{state_file}: is no saved state of our scripts; take another --out.")
    state["file"] = state_file
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


def log_step(folder, metrics, tracker):
    """One step's metrics -> a line of metrics.jsonl, and a point in the curves of a --tracker."""
    append(Path(folder, "metrics.jsonl"), metrics)
    if tracker != "none":
        _tracker(tracker, str(folder)).log(metrics, step=metrics["step"])


@lru_cache(maxsize=4)
def _tracker(name, folder):
    """accelerate's, started: TensorBoard's files lie in FOLDER/tensorboard, wandb and trackio have
    one project, msrl, whose runs are named after their folders."""
    if name == "tensorboard":
        tracker = tracking.TensorBoardTracker("tensorboard", logging_dir=folder)
    elif name == "wandb":
        tracker = tracking.WandBTracker("msrl", name=folder)
    else:
        tracker = tracking.TrackioTracker("msrl", name=folder)
    tracker.start()
    return tracker


def save_state(folder, model, optimizer, step, config, **kept):
    """Write to a side file, flush it to disk, then rename: whenever we are killed, state.pt is a
    whole state, the new one or the one before. `kept`: what else resume() is to give back. All
    processes call it, the first one writes."""
    part = Path(folder, "state.pt.tmp")
    state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "config": asdict(config), **kept}
    with writing(part):
        if sharding.is_sharded(model):
            sharding.write(state, part)
        elif rank() == 0:
            with open(part, "wb") as f:
                torch.save(state, f)
                f.flush()
                os.fsync(f.fileno())
    if rank() == 0:
        os.replace(part, Path(folder, "state.pt"))


def resume(state, model, optimizer):
    """Load what open_run() found. -> the steps that are done, and what else was kept, as a dict."""
    if state is None:
        return 0, {}
    try:
        if sharding.is_sharded(model):
            state = sharding.cut(state, model, optimizer)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        for parameter, moments in optimizer.state.items():
            if moments["exp_avg"].shape != parameter.shape:
                raise ValueError("the optimiser's moments have other shapes")
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise SystemExit(f"{state['file']}: does not fit the model ({type(e).__name__}: "
                         f"{first_line(e)}). Take another --out, or delete the folder.") from None
    for group in optimizer.param_groups:
        group["lr"] = optimizer.defaults["lr"]  # --lr may have changed
    return state["step"], {name: value for name, value in state.items() if name not in STATE}


def first_line(error):
    return (str(error).strip() or "?").splitlines()[0]


@contextmanager
def writing(path, aside=True):
    """Around what writes a file or folder. If the disk is full, or it cannot be written for another
    reason, one line says so. What is written `aside`, to be renamed, is removed."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as e:
        if aside:
            shutil.rmtree(path, ignore_errors=True)  # a folder
            Path(path).unlink(missing_ok=True)
        if isinstance(e, RuntimeError) and e.__context__:  # of torch.save() that ends its file
            e = e.__context__
        why = getattr(e, "strerror", None) or first_line(e)
        raise SystemExit(f"{path}: cannot be written ({why}). What was saved before is whole: make "
                         "room there, and the same command goes on.") from None


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
            if os.path.isfile(file):  # Path's raises an error for a name that is too long
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
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with writing(part):
        part.write_text(text, "utf-8")
        os.replace(part, path)


def append(path, *rows):
    with writing(path, aside=False), open(path, "a", encoding="utf-8") as f:
        for row in rows:
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
