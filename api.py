"""
A served judge: `eval.py --api URL` asks an OpenAI-compatible server (vLLM, SGLang, llama.cpp, a
hosted one) where else a model in this process answers.

    vllm serve FOLDER --served-model-name judge --interleave-mm-strings --generation-config vllm
    python eval.py --api http://localhost:8000/v1 --model judge --data rows.jsonl --out preds.jsonl

(vLLM's two switches: images stay at their places whatever the chat template; and no top-p, top-k or
repetition penalty of the folder's generation_config.json has a say.)

    1  requests   a row -> the user's message, images and video frames at their places
    2  answers    a request -> its answer, asked for again when the server fails, kept in a file
    3  judging    rows -> predictions, as common.judge() makes them
"""

import base64
import hashlib
import io
import json
import math
import os
import re
import threading
import time
import urllib.error
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path

from PIL import Image
from tqdm import tqdm

import common
from common import BadRow

TRIES = 7        # with the waits between them a server may be away for a minute
WAIT = 1.0       # seconds before the second try; twice as long before each further one
TIMEOUT = 600.0  # seconds for one answer, queue included
WORTH_A_RETRY = (408, 409, 425, 429)  # and 5xx: the same request may do later
OF_REQUESTS = (BrokenPipeError, ConnectionResetError, TimeoutError)  # a server may be there
GO_ON = "With --out, what was answered is kept, and the same command goes on."


# ==================================================================================================
# 1. Requests

def message_of(row, form, style, frames):
    """A row -> content of the user's message: the text, or parts of text and images in the order of
    the prompt. Raises BadRow."""
    key = "media" if form == "pixels" else "captions"
    if row["task"] != "text" and not row[key]:
        raise BadRow(f"has no {key}; see --form")
    prompt = common.render(row, form, style)
    if form == "caption" or not row["media"]:
        return prompt
    parts = []
    for path in row["media"]:
        if row["task"].startswith("video"):
            before, _, prompt = prompt.partition("<video>")
            parts += [text_part(before), *frames_of(path, frames)]
        else:
            before, _, prompt = prompt.partition("<image>")
            parts += [text_part(before), image_of(path)]
    return [*parts, text_part(prompt)]


def text_part(text):
    return {"type": "text", "text": text}


def image_part(content, mime):
    """Bytes of an image file -> part of a message"""
    url = f"data:{mime};base64,{base64.b64encode(content).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def image_of(path):
    """The file as it is. Raises BadRow."""
    common.open_image(path)  # a broken one is found here
    with Image.open(path) as image:
        return image_part(Path(path).read_bytes(), image.get_format_mimetype())


def frames_of(path, frames):
    """The frames of a video without loss, each after its number, as Encoder shows them to InternVL.
    DEVIATION: Qwen-VL also gets images here, where the Encoder gives it a video; servers have no
    common field for one. Raises BadRow."""
    parts, newline = [], ""
    for number, frame in enumerate(common.open_video(path, frames), 1):
        buffer = io.BytesIO()
        frame.save(buffer, "PNG")
        title = text_part(f"{newline}Frame{number}: ")
        parts += [title, image_part(buffer.getvalue(), "image/png")]
        newline = "\n"
    return parts


# ==================================================================================================
# 2. Answers. {"text": ..., "p": the probability of the verdict's token, or None} or {"error": why}.

class Served:
    """A judge behind a URL. To those who read rows it is what an Encoder is elsewhere."""
    forbidden = common.FORBIDDEN  # its special tokens are not known here
    kept_as = None                # nor its tokenizer, so data.py has no lengths to keep

    def __init__(self, url, model, style, frames, workers):
        self.url = url.rstrip("/") + "/chat/completions"
        self.model, self.style = model, style
        self.frames, self.workers = frames or 8, workers
        self.kept, self.known, self.writing = None, {}, threading.Lock()

    def check(self, row, form):
        """Raises BadRow. -> 0: the server counts the tokens, and refuses too many."""
        message_of(row, form, self.style, self.frames)
        return 0

    def keep_answers(self, progress):
        """From now on each answer goes to a file beside this progress file, which takes whole
        chunks, so that a killed run pays for none twice."""
        self.kept = Path(progress).with_suffix(".answers.jsonl")
        found = []
        if Path(progress).exists():  # else the answers are those of another run
            found = common.whole_lines(self.kept)
        common.write_lines(self.kept, found)
        self.known = {line["request"]: line["answer"] for line in found}

    def ask(self, request):
        """-> the answer to a request, from the file if it is there. An error is not kept."""
        key = hashlib.sha256(json.dumps([self.url, request]).encode()).hexdigest()
        if key in self.known:
            return self.known[key]
        answer = answer_to(self.url, request)
        if self.kept and "error" not in answer:
            with self.writing:
                common.append(self.kept, {"request": key, "answer": answer})
        return answer


def answer_to(url, request):
    """Asks up to TRIES times. Raises SystemExit where no request could be answered: no server, a
    wrong key, an unknown model."""
    for k in range(TRIES):
        if k > 0:
            time.sleep(WAIT * 2 ** (k - 1))
        away = False
        try:
            return read_answer(post(url, request))
        except urllib.error.HTTPError as e:
            why = f"HTTP {e.code}: {complaint(e)}"
            if e.code in (401, 403, 404):
                raise SystemExit(f"{url}: {why}. See --api, --model and OPENAI_API_KEY.") from None
            if e.code in (400, 422) and "logprobs" in request:  # not every server knows these two
                request = {**request}
                del request["logprobs"]
                request.pop("seed", None)
            elif e.code < 500 and e.code not in WORTH_A_RETRY:
                break
        except (OSError, HTTPException, ValueError, LookupError, TypeError, AttributeError) as e:
            why = f"{type(e).__name__}: {e}"
            away = isinstance(e, urllib.error.URLError) and not isinstance(e.reason, OF_REQUESTS)
    if away:
        raise SystemExit(f"{url}: {why}. {GO_ON}")
    return {"error": why[:300]}


def post(url, request):
    """-> the server's answer as JSON"""
    headers = {"Content-Type": "application/json"}
    if os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY']}"
    request = urllib.request.Request(url, json.dumps(request).encode(), headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        return json.load(response)


def complaint(error):
    """The beginning of what a server says besides its status"""
    try:
        with error:
            return error.read(300).decode("utf-8", "replace")
    except (OSError, HTTPException):
        return error.reason


def read_answer(completion):
    """A chat completion -> answer. Whatever else it is, one of answer_to()'s errors is raised."""
    choice = completion["choices"][0]
    text = choice["message"].get("content") or ""
    # a server with a reasoning parser takes the thinking out, and its tags away
    reasoning = choice["message"].get("reasoning_content") or choice["message"].get("reasoning")
    if reasoning:
        text = f"<think>{reasoning}</think>" + text
    if not isinstance(text, str) or not text.strip():
        raise ValueError("an answer without text")
    tokens = (choice.get("logprobs") or {}).get("content") or []
    return {"text": text, "p": verdict_probability(tokens)}


def verdict_probability(tokens):
    """[{"token", "logprob"}] of an answer -> the probability of the token with the verdict, None if
    there is none. As common.verdict_probability(), of texts instead of ids."""
    texts = [token["token"] for token in tokens]
    stated = re.search(r"<answer>\s*([AB12])", "".join(texts))
    end = 0
    for text, token in zip(texts, tokens, strict=True):
        end += len(text)
        if stated and end > stated.start(1):
            return math.exp(token["logprob"])
    return None


# ==================================================================================================
# 3. Judging

def judge(served, rows, settings, votes, orders=("AB", "BA"), desc=None):
    """common.judge() with a server: --api_workers requests at a time, one for each vote. settings:
    of eval.py. An answer that failed for good is no verdict, and has "error". score_a and score_b
    are there if the server gives log-probs (vLLM's, like those of others, at temperature 1).
    -> predictions, sorted by row, order and vote"""
    jobs = []
    for at in range(len(rows)):
        jobs += [(at, order, n) for order in orders for n in range(votes)]

    def answer(job):
        at, order, n = job
        row = rows[at] if order == "AB" else common.swap(rows[at])  # rendered here: media are large
        content = message_of(row, settings.form, served.style, served.frames)
        request = {"model": served.model, "messages": [{"role": "user", "content": content}],
                   "temperature": settings.temperature if votes > 1 else 0.0,
                   "max_tokens": settings.max_new_tokens, "logprobs": True}
        if votes > 1:  # a seed for each, or a server with one seed would give one answer K times
            seed = json.dumps([settings.seed, rows[at]["id"], order, n])
            request["seed"] = zlib.crc32(seed.encode()) % 2 ** 31
        return served.ask(request)

    pool = ThreadPoolExecutor(served.workers)
    try:
        answers = list(tqdm(pool.map(answer, jobs), total=len(jobs), desc=desc, leave=False,
                            mininterval=1, disable=desc is None))
    finally:
        pool.shutdown(cancel_futures=True)  # what is on its way is waited for, and kept
    errors = [answer["error"] for answer in answers if "error" in answer]
    if len(errors) == len(jobs) > served.workers:  # not the fault of the rows
        raise SystemExit(f"{served.url}: none of {len(jobs)} requests was answered; the first: "
                         f"{errors[0]}. {GO_ON}")
    predictions = []
    for (at, order, n), answer in zip(jobs, answers, strict=True):
        asked = {"id": rows[at]["id"], "at": at, "order": order, "sample": n}
        predictions.append(prediction_of(answer, served.style, asked))
    return predictions


def prediction_of(answer, style, asked):
    """An answer, and what was asked -> a prediction, in the row's own frame"""
    text = answer.get("text", "")
    side = common.parse(text, style).verdict  # as shown
    pred = common.OTHER[side] if side and asked["order"] == "BA" else side
    prediction = {**asked, "pred": pred, "text": text}
    if "error" in answer:
        prediction["error"] = answer["error"]
    p = answer.get("p")
    if pred and p is not None:
        prediction["score_a"] = p if pred == "A" else 1 - p
        prediction["score_b"] = 1 - p if pred == "A" else p
    return prediction


def print_failures(predictions):
    errors = [prediction["error"] for prediction in predictions if "error" in prediction]
    if errors:
        tqdm.write(f"{len(errors)} of {len(predictions)} answers failed for good and count as no "
                   f"verdict; the first: {errors[0]}")
