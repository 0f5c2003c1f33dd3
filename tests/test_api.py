"""
A served judge: eval.py --api against a small server on this machine, which fails in every way that
servers do; and checkpoints behind plain transformers, as others serve them. "kills:" names wrong
versions of api.py and eval.py under which a test was seen to fail.
"""

import base64
import io
import json
import math
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import toy_world
import torch
import transformers
from helpers import (
    ENV, ROOT, flags, lines, picture, run_here, small_world, text_only_model, text_row,
    thinks, write, write_video)
from PIL import Image
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import api
import common
import eval as ev
import stage0_sft

pytestmark = pytest.mark.usefixtures("cpu_only")


# --------------------------------------------------------------------------------------- the server
class Server(ThreadingHTTPServer):
    """reply(request, times it was asked before) -> status and bytes; None closes the connection,
    bytes that end in ... are followed by less than was announced."""
    daemon_threads = True

    def __init__(self, reply):
        self.reply, self.lock = reply, threading.Lock()
        self.requests, self.keys, self.paths = [], [], []
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            before = server.requests.count(request)
            server.requests.append(request)
            server.keys.append(self.headers["Authorization"])
            server.paths.append(self.path)
        status, content = server.reply(request, before)
        if status is None:
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) + 99 * content.endswith(b"...")))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def serve():
    """serve(reply) -> a running server"""
    running = []

    def serve(reply):
        running.append(Server(reply))
        return running[-1]
    yield serve
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.fixture
def waits(monkeypatch):
    """The seconds that would have been waited"""
    seconds = []
    monkeypatch.setattr(api, "time", SimpleNamespace(sleep=seconds.append))
    return seconds


def completion(text, tokens=None):
    """tokens: [(text, log-prob)]"""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}}
    if tokens is not None:
        entries = [{"token": token, "logprob": logp} for token, logp in tokens]
        choice["logprobs"] = {"content": entries}
    return 200, json.dumps({"choices": [choice]}).encode()


def text_of(request):
    """What a request says, <image> where it shows one."""
    content = request["messages"][0]["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] if part["type"] == "text" else "<image>" for part in content)


def images_of(request):
    """The bytes of the images, and their MIME types."""
    content, found = request["messages"][0]["content"], []
    for part in () if isinstance(content, str) else content:
        if part["type"] == "image_url":
            mime, data = re.fullmatch("data:(.+);base64,(.+)", part["image_url"]["url"]).groups()
            found.append((base64.b64decode(data), mime))
    return found


def finds_good(request, before=0):
    """Names the side of the good response, wherever it is shown."""
    text = text_of(request)
    return completion(thinks("A" if text.rindex("good one") < text.rindex("bad one") else "B"))


def api_flags(server, data, out, **more):
    return flags(api=server.url, model="judge", data=data, out=out, **more)


def predictions(server, data, out, *switches, **more):
    run_here(ev.main, [*api_flags(server, data, out, **more), *switches])
    return lines(out)


def text_rows(prompts):
    """Text rows with these prompts; A and B are right in turn."""
    rows = []
    for n, prompt in enumerate(prompts):
        responses = ["good one", "bad one"][::1 - 2 * (n % 2)]
        rows.append(text_row(id=f"r{n}", prompt=prompt, responses=responses, label="AB"[n % 2]))
    return rows


# ----------------------------------------------------------------------------------- what is asked
@pytest.fixture
def media(tmp_path):
    """Files in the formats of the field, and a video as a file and as a folder"""
    picture("red").save(tmp_path / "a.jpg")
    picture("blue", (64, 20)).save(tmp_path / "b.webp")
    picture("green").save(tmp_path / "c.png")
    write_video(tmp_path / "v.mp4", 20)
    for n in (1, 2, 10):
        (tmp_path / "frames").mkdir(exist_ok=True)
        picture((n, 0, 0)).save(tmp_path / "frames" / f"{n}.png")
    return tmp_path


def test_images_arrive_as_they_are_at_their_places(serve, media):
    # Both orders. kills: all images before the text; files encoded anew; the media of the first
    # order in the second; BA not asked; the second image at both places
    rows = [text_row(id="pair", task="image_generation", responses=None, media=["a.jpg", "b.webp"]),
            text_row(id="one", task="image_understanding", media=["c.png"]),
            text_row(id="none")]
    def says_jpeg_or_first(request, before):
        mimes = [mime for _, mime in images_of(request)]
        return completion(thinks("B" if mimes[1:] == ["image/jpeg"] else "A"))
    server = serve(says_jpeg_or_first)
    preds = predictions(server, write(media / "rows.jsonl", rows), media / "o.jsonl")
    wanted, got = [], []
    for row in rows:
        for shown in (row, common.swap(row)):
            files = [(media / name).read_bytes() for name in shown["media"]]
            wanted.append((common.render(shown), files))
    for request in server.requests:
        got.append((text_of(request), [content for content, _ in images_of(request)]))
        assert request["model"] == "judge" and request["temperature"] == 0
        assert request["max_tokens"] == 1024 and "seed" not in request
    assert sorted(got) == sorted(wanted) and set(server.paths) == {"/v1/chat/completions"}
    assert [(p["id"], p["order"], p["pred"]) for p in preds] == [
        ("pair", "AB", "A"), ("pair", "BA", "A"), ("one", "AB", "A"), ("one", "BA", "B"),
        ("none", "AB", "A"), ("none", "BA", "B")]
    assert {type(r["messages"][0]["content"]) for r in server.requests
            if "<image>" not in text_of(r)} == {str}  # what every text model takes


@pytest.mark.parametrize("name, frames", [("v.mp4", 4), ("frames", 3)])
def test_frames_arrive_in_order(serve, media, name, frames):
    # kills: eight frames whatever --frames says; JPEG, with other pixels; 10.png before 2.png; all
    # frames after all their numbers
    row = text_row(task="video_understanding", media=[name])
    server = serve(lambda request, before: completion(thinks("A")))
    predictions(server, write(media / "rows.jsonl", [row]), media / "o.jsonl", frames=frames)
    wanted = common.open_video(media / name, frames)
    shown = "\n".join(f"Frame{n}: <image>" for n in range(1, frames + 1))
    texts = [common.render(order).replace("<video>", shown) for order in (row, common.swap(row))]
    assert sorted(map(text_of, server.requests)) == sorted(texts)
    for request in server.requests:
        got = [Image.open(io.BytesIO(content)) for content, _ in images_of(request)]
        assert [image.tobytes() for image in got] == [image.tobytes() for image in wanted]
        kinds = [part["type"] for part in request["messages"][0]["content"]]
        assert kinds == ["text"] + ["text", "image_url"] * frames + ["text"]


def test_captions_and_styles(serve, media):
    # kills: images sent in the caption form; the prompt of another style; verdicts read as A/B only
    row = text_row(task="image_understanding", media=["c.png"], captions=["a green card"])
    data = write(media / "rows.jsonl", [row])
    server = serve(lambda request, before: completion(thinks("2")))
    preds = predictions(server, data, media / "o.jsonl", form="caption", style="r1")
    assert [p["pred"] for p in preds] == ["B", "A"]
    texts = {common.render(order, "caption", "r1") for order in (row, common.swap(row))}
    assert {request["messages"][0]["content"] for request in server.requests} == texts


def test_votes_have_seeds_of_their_own(serve, tmp_path):
    # kills: one answer for all votes; one seed, with which a server would say one thing K times;
    # seeds that depend on the batch; votes at temperature 0
    data = write(tmp_path / "rows.jsonl", text_rows(["x", "y"]))
    first = serve(finds_good)
    preds = predictions(first, data, tmp_path / "o.jsonl", votes=3, temperature=0.7)
    assert [(p["id"], p["order"], p["sample"]) for p in preds] == [
        (f"r{n}", order, k) for n in range(2) for order in ("AB", "BA") for k in range(3)]
    assert len({request["seed"] for request in first.requests}) == 12
    assert {request["temperature"] for request in first.requests} == {0.7}
    second = serve(finds_good)
    predictions(second, data, tmp_path / "p.jsonl", votes=3, temperature=0.7, batch_size=1)
    key = json.dumps
    assert sorted(map(key, first.requests)) == sorted(map(key, second.requests))


def test_a_broken_image_is_named_before_anything_is_asked(serve, media):
    # kills: a file found broken in the middle of a run that has cost money
    (media / "c.png").write_bytes((media / "c.png").read_bytes()[:60])
    rows = [text_row(id="t"), text_row(id="i", task="image_understanding", media=["c.png"])]
    server = serve(finds_good)
    with pytest.raises(SystemExit, match="(?s)row 1.*c.png"):
        predictions(server, write(media / "rows.jsonl", rows), media / "o.jsonl")
    assert not server.requests
    preds = predictions(server, str(media / "rows.jsonl"), media / "o.jsonl", "--skip_bad_rows")
    assert [p["id"] for p in preds] == ["t", "t"]


def test_the_key_is_sent_and_never_written(serve, tmp_path, monkeypatch):
    # kills: the key among the settings of the progress file; a header without a key
    data = write(tmp_path / "rows.jsonl", text_rows(["x"]))
    server = serve(finds_good)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    predictions(server, data, tmp_path / "o.jsonl")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    predictions(server, data, tmp_path / "p.jsonl")
    assert server.keys == [None] * 2 + ["Bearer sk-secret"] * 2
    assert not [path for path in tmp_path.iterdir() if "sk-secret" in path.read_text()]


# ------------------------------------------------------------------------------- servers that fail
def said(value):
    return 200, json.dumps(value).encode()


PASSING = {"500": (500, b"boom"), "503": (503, b"loading"), "429": (429, b"slow down"),
           "closed": (None, b""), "not JSON": (200, b"<html>busy</html>"),
           "cut": (200, b'{"choices": [{"mess'), "lost": (200, b'{"choices": ...'),
           "no Unicode": (200, b"\xff\xfe\xff"),
           "no choices": said({"choices": []}), "no object": said([]), "null": said(None),
           "no message": said({"choices": [{}]}), "null choice": said({"choices": [None]}),
           "a text for message": said({"choices": [{"message": "A"}]}),
           "null content": completion(None), "empty content": completion(""),
           "a list for content": completion(["A"]), "slow": None}


def test_what_fails_is_asked_again(serve, tmp_path, monkeypatch, waits, capsys):
    """Each request fails twice, then is answered. kills: each `except` with one kind too few;
    malformed answers taken for answers; no wait, or one that does not grow; another try's answer
    given to another row; failures counted that were mended."""
    monkeypatch.setattr(api, "TIMEOUT", 0.5)

    def reply(request, before):
        name = re.search("fails: (.+)!", text_of(request))[1]
        if before >= 2:
            return finds_good(request)
        if name == "slow":
            time.sleep(1.5)
        return PASSING[name] or finds_good(request)
    server = serve(reply)
    data = write(tmp_path / "rows.jsonl", text_rows([f"fails: {name}!" for name in PASSING]))
    preds = predictions(server, data, tmp_path / "o.jsonl", api_workers=4)
    assert [p["pred"] for p in preds] == [label for n in range(len(PASSING))
                                          for label in ["AB"[n % 2]] * 2]
    assert not [p for p in preds if "error" in p]
    assert len(server.requests) == 3 * 2 * len(PASSING)
    assert sorted(waits) == sorted([1.0, 2.0] * 2 * len(PASSING))
    assert "failed" not in capsys.readouterr().out


def test_what_fails_for_good_is_no_verdict_and_counted(serve, tmp_path, waits, capsys):
    """kills: a failure left out of n, or taken for the right side; a request that a server refuses
    asked TRIES times; failures that are kept as answers; the run stopped by one bad row."""
    names = ["500", "413", "fine", "null content"]
    reply_of = {"500": (500, b"boom"), "413": (413, b"too large"), "null content": completion(None)}

    def reply(request, before):
        name = re.search("fails: (.+)!", text_of(request))[1]
        return reply_of.get(name) or finds_good(request)
    server = serve(reply)
    data = write(tmp_path / "rows.jsonl", text_rows([f"fails: {name}!" for name in names]))
    preds = predictions(server, data, tmp_path / "o.jsonl", "--json")
    out = capsys.readouterr().out
    assert "6 of 8 answers failed for good" in out and "HTTP 500: boom" in out
    result = json.loads(out.splitlines()[-1])
    assert result["n"] == 4 and result["overall"] == 0.25 and result["unparsable"] == 0.75
    for name, pair in zip(names, zip(preds[::2], preds[1::2], strict=True), strict=True):
        times = {"500": api.TRIES, "413": 1, "fine": 1, "null content": api.TRIES}[name]
        asked = [r for r in server.requests if f"fails: {name}!" in text_of(r)]
        assert len(asked) == 2 * times
        for pred in pair:
            assert ("error" in pred) == (pred["pred"] is None) == (name != "fine")
    assert sorted(waits) == sorted([2.0 ** k for k in range(api.TRIES - 1)] * 4)
    kept = lines(tmp_path / "o.progress.answers.jsonl")
    assert len(kept) == 2 and not [line for line in kept if "error" in line["answer"]]
    again = predictions(server, data, tmp_path / "o.jsonl", "--json")  # counted again, not asked
    assert again == preds and "6 of 8 answers failed" in capsys.readouterr().out


def test_a_server_without_log_probs_or_seeds(serve, tmp_path, waits):
    # kills: 400 taken for good; the seed sent again
    def reply(request, before):
        if "logprobs" in request or "seed" in request:
            return 400, b"unknown field"
        return finds_good(request)
    data = write(tmp_path / "rows.jsonl", text_rows(["x"]))
    preds = predictions(serve(reply), data, tmp_path / "o.jsonl", votes=2)
    assert [p["pred"] for p in preds] == ["A"] * 4 and not [p for p in preds if "error" in p]


@pytest.mark.parametrize("status", [401, 403, 404, 400])
def test_a_server_that_answers_nobody_stops_the_run(serve, tmp_path, waits, status):
    # A wrong key or model name, images for a text model. kills: a file full of no verdicts, which
    # --out keeps for good
    server = serve(lambda request, before: (status, b"no such thing"))
    rows = text_rows("abcdef") if status == 400 else text_rows("a")  # 400 may be a row's own fault
    data = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(SystemExit, match=f"{server.url}.*HTTP {status}: no such thing"):
        predictions(server, data, tmp_path / "o.jsonl")
    assert len(lines(tmp_path / "o.progress.jsonl")) == 1  # how it was made, and no row
    server.reply = finds_good
    assert len(predictions(server, data, tmp_path / "o.jsonl")) == 2 * len(rows)


def test_no_server_stops_the_run(serve, tmp_path, waits):
    # kills: every row a failure, because nobody started the server
    data = write(tmp_path / "rows.jsonl", text_rows("ab"))
    gone = serve(finds_good)
    gone.shutdown()
    gone.server_close()
    with pytest.raises(SystemExit, match="refused.*goes on"):
        predictions(gone, data, tmp_path / "o.jsonl")
    assert max(waits) == 2 ** (api.TRIES - 2)


def test_a_killed_run_asks_for_nothing_twice(serve, tmp_path):
    """SIGKILL in the middle of a chunk. kills: only whole chunks kept; answers written at the end;
    a cut line that hides those behind it; keys without the order, or without the vote."""
    data = write(tmp_path / "rows.jsonl", text_rows([f"prompt {n}" for n in range(9)]))
    held = threading.Event()
    answered = []

    def reply(request, before):
        with server.lock:
            answers = len(answered) < 7
            if answers:
                answered.append(request)
        if not answers:
            held.wait()
        return finds_good(request)
    server = serve(reply)
    command = api_flags(server, data, tmp_path / "o.jsonl", api_workers=3, batch_size=4)
    process = subprocess.Popen([sys.executable, ROOT / "eval.py", *map(str, command)], env=ENV,
                               cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    kept = tmp_path / "o.progress.answers.jsonl"
    deadline = time.time() + 200
    try:
        while len(common.whole_lines(kept)) < 7 or len(server.requests) < 8:
            assert time.time() < deadline and process.poll() is None
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert len(lines(tmp_path / "o.progress.jsonl")) == 1  # not one whole chunk
    kept.write_bytes(kept.read_bytes()[:-30])  # the last answer was being written
    held.set()
    before = len(server.requests)
    preds = predictions(server, data, tmp_path / "o.jsonl", api_workers=2, batch_size=4)
    asked = server.requests[before:]
    assert len(lines(kept)) == 18
    assert len(asked) == 18 - 6
    assert len([request for request in asked if request in answered]) == 1  # of the cut line
    fresh = serve(finds_good)
    assert preds == predictions(fresh, data, tmp_path / "fresh.jsonl")
    assert [p["pred"] for p in preds] == [row["label"] for row in lines(data) for _ in "AB"]
    before = len(server.requests)
    run_here(ev.main, command)
    assert len(server.requests) == before


def test_answers_of_another_run_are_not_taken(serve, tmp_path):
    # The same name may serve another judge by now. kills: the file of answers outliving its run
    data, out = write(tmp_path / "rows.jsonl", text_rows(["x"])), tmp_path / "o.jsonl"
    server = serve(finds_good)
    predictions(server, data, out)
    server.reply = lambda request, before: completion(thinks("B"))
    out.unlink()
    (tmp_path / "o.progress.jsonl").unlink()
    assert [p["pred"] for p in predictions(server, data, out)] == ["B", "A"]


# --------------------------------------------------------------------- probabilities of the verdict
REASONED = "<think>\nA 😀 <b>\n</think>\n<answer>\nB\n</answer>"


@pytest.mark.parametrize("tokens, p", [
    ([("<think>\nA", -3), (" \ufffd", -4), ("\ufffd", -4), (" <b>\n</think>\n", -5),
      ("<answer", -6), (">\n", -7), ("B", -0.5), ("\n</answer>", -8), ("<|im_end|>", -9)],
     math.exp(-0.5)),
    ([("<answer>", -3), ("\n\nB", -0.25), ("\n</answer>", -8)], math.exp(-0.25)),
    ([("<answer>\n", -3), ("B\n</answer>", -0.75)], math.exp(-0.75)),
    ([], None), (None, None), ([("no", -1)], None)])
def test_the_score_is_the_probability_of_the_verdicts_token(serve, tmp_path, tokens, p):
    """Of texts that the server cut anyhow. kills: the token before or behind; the first "A"; texts
    of half a character or of the end counted against the answer's; a score of nothing."""
    server = serve(lambda request, before: completion(REASONED, tokens))
    data = write(tmp_path / "rows.jsonl", text_rows(["x"]))
    preds = predictions(server, data, tmp_path / "o.jsonl")
    assert [p["pred"] for p in preds] == ["B", "A"]
    assert {request["logprobs"] for request in server.requests} == {True}
    if p is None:
        assert not [pred for pred in preds if "score_a" in pred]
        return
    for pred, score_a in zip(preds, (1 - p, p), strict=True):
        assert pred["score_a"] == pytest.approx(score_a)
        assert pred["score_a"] + pred["score_b"] == pytest.approx(1)


def test_the_scalar_of_the_readme(serve):
    """The README's lines, with another port. A server that says A with probability 0.9 when the
    good response is shown first, and with 0.7 when it is shown last. kills: one order asked twice,
    the probability of what was said where that of A is meant, the second order not turned round."""
    def reply(request, before):
        text = text_of(request)
        p = 0.9 if text.rindex("good one") < text.rindex("bad one") else 0.7
        tokens = [("<answer>", -1), ("A", math.log(p)), ("</answer>", -1)]
        return completion(thinks("A"), tokens)

    server = serve(reply)
    section = (ROOT / "README.md").read_text("utf-8").partition("## Serve it")[2]
    code = re.search("```python\n(.*?)```", section, re.DOTALL).group(1)
    names = {"row": text_row()}
    exec(code.replace("http://localhost:8000/v1", server.url), names)
    assert names["score"] == pytest.approx((0.9 + 1 - 0.7) / 2)
    assert len(server.requests) == 2


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_thinking_that_a_server_took_out_is_put_back(serve, tmp_path, field):
    # kills: well-formed answers counted as malformed, and no reasoning for --attempts
    message = {"content": "\n\n<answer>\nA\n</answer>", field: "because"}
    server = serve(lambda request, before: said({"choices": [{"message": message}]}))
    data = write(tmp_path / "rows.jsonl", text_rows(["x"]))
    for pred in predictions(server, data, tmp_path / "o.jsonl"):
        assert common.parse(pred["text"]).well_formed and "because" in pred["text"]


# ---------------------------------------------------------------------------- ranking and attempts
def test_rank_and_attempts(serve, tmp_path):
    # kills: a rank of the loaded model; K attempts with one seed; the label of the unswapped row
    def larger(request, before):
        numbers = [float(n) for n in re.findall(r"Response\]\nsays (\S+)\n", text_of(request))]
        return completion(thinks("A" if numbers[0] > numbers[1] else "B"))
    sets = [{"id": 1, "prompt": "?", "candidates": [f"says {n}" for n in (3, 1, 4, 9)]}]
    server = serve(larger)
    run_here(ev.main, flags(api=server.url, model="judge", out=tmp_path / "r.jsonl",
                            rank=write(tmp_path / "c.jsonl", sets)))
    ranked, = lines(tmp_path / "r.jsonl")
    assert ranked["ranking"] == [3, 2, 0, 1] and len(server.requests) == 12

    rows = text_rows(["never", "at once", "sometimes"])
    tries = {}

    def attempt(request, before):
        text, seed = text_of(request), request["seed"]
        answer = json.loads(finds_good(request)[1])["choices"][0]["message"]["content"]
        with server.lock:
            tries.setdefault(text, []).append(seed)
        wrong = answer.replace("\nA\n", "\n?\n").replace("\nB\n", "\nA\n").replace("?", "B")
        return completion(answer if "at once" in text else wrong)
    server = serve(attempt)
    predictions(server, write(tmp_path / "rows.jsonl", rows), tmp_path / "a.jsonl", attempts=3)
    got = lines(tmp_path / "a.jsonl")
    assert [row["attempts"] for row in got] == [4, 1, 4] and got[1]["rationale"] == "because"
    assert len(lines(tmp_path / "a.attempts.answers.jsonl")) == 9
    assert len(tries) == 3 and all(len(set(seeds)) == 3 for seeds in tries.values())
    before = len(server.requests)
    predictions(server, str(tmp_path / "rows.jsonl"), tmp_path / "a.jsonl", attempts=3)
    assert len(server.requests) == before


# ------------------------------------------------------------------- checkpoints as others run them
class Plain:
    """A checkpoint in plain transformers: one prompt after another through generate()."""

    def __init__(self, folder, auto):
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = auto.from_pretrained(folder, dtype=torch.float32).eval()
        self.images, self.turn = None, threading.Lock()
        if auto is transformers.AutoModelForImageTextToText:
            self.images = AutoImageProcessor.from_pretrained(folder, backend="pil")

    @torch.no_grad()
    def answer(self, prompt, images=()):
        """A prompt with <image> at the images' places -> text, [(token as text, log-prob)]"""
        block = f"<img>{common.IMAGE_TOKEN * 16}</img>"  # a toy image is one tile
        chat = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt.replace("<image>", block)}],
            add_generation_prompt=True, tokenize=False)
        inputs = dict(self.tokenizer(chat, add_special_tokens=False, return_tensors="pt"))
        inputs.pop("token_type_ids", None)
        if images:
            shown = self.images(images=images, crop_to_patches=False, return_tensors="pt")
            inputs["pixel_values"] = shown["pixel_values"]
        with self.turn:
            out = self.model.generate(**inputs, max_new_tokens=120, do_sample=False,
                                      output_scores=True, return_dict_in_generate=True)
        ids = out.sequences[0, inputs["input_ids"].shape[1]:].tolist()
        tokens = []
        for token, scores in zip(ids, out.scores, strict=True):
            logp = scores[0].log_softmax(-1)[token].item()
            tokens.append((self.tokenizer.decode([token]), logp))
        if ids[-1] == self.tokenizer.eos_token_id:
            ids.pop()
        return self.tokenizer.decode(ids), tokens


@pytest.fixture(scope="module")
def stage0(tmp_path_factory):
    """Checkpoints of stage 0 from the toy backbone and from a text model, and rows of each task.
    -> folder"""
    folder = small_world(tmp_path_factory.mktemp("api"), sft=16, text_rl=4, heldout=2)
    tokenizer = toy_world.make_tokenizer()
    torch.manual_seed(0)
    text_only_model(tokenizer, tie_word_embeddings=True).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    run_here(stage0_sft.main, flags(
        model=toy_world.PREBUILT, data=folder / "sft.jsonl", heldout="", batch_size=4, lr=3e-4,
        epochs=8, out=folder / "stage0_toy_backbone"))
    run_here(stage0_sft.main, flags(
        model=folder / "text", data=folder / "text_rl.jsonl", heldout="", target="label",
        batch_size=4, lr=3e-3, epochs=60, out=folder / "stage0_text"))
    return folder


def shown_by(row):
    """The images of a row, and what stands for them in the prompt"""
    images, prompt = [], common.render(row)
    for path in row["media"]:
        if row["task"].startswith("image"):
            images.append(common.open_image(path))
            continue
        frames = common.open_video(path, 8)
        images += frames
        marks = "\n".join(f"Frame{n}: <image>" for n in range(1, len(frames) + 1))
        prompt = prompt.replace("<video>", marks, 1)
    return prompt, images


@pytest.mark.parametrize("name, auto, tasks", [
    ("toy_backbone", transformers.AutoModelForImageTextToText, common.TASKS),
    ("text", transformers.AutoModelForCausalLM, ("text",))])
def test_a_checkpoint_and_the_same_one_served(stage0, serve, name, auto, tasks):
    """Greedy answers of eval.py --model, of generate() in plain transformers, and of eval.py --api
    with plain transformers behind the server, are the same letter by letter, and so are the
    verdicts and their probabilities. kills: a checkpoint with another chat template; a chat that is
    not ready for the answer; frames in another order, without their numbers or line breaks."""
    folder = stage0 / f"stage0_{name}"
    rows = []
    for task in tasks:
        path = stage0 / f"heldout_{task}.jsonl"
        for row in lines(path)[:2]:
            media = [str(stage0 / medium) for medium in row.get("media") or ()]
            rows.append({**row, "id": f"{task} {row['id']}", "media": media})
    data = write(stage0 / f"rows_{name}.jsonl", rows)
    local = stage0 / f"local_{name}.jsonl"
    run_here(ev.main, flags(model=folder, data=data, out=local, max_new_tokens=120))
    local = lines(local)
    plain = Plain(folder, auto)

    texts = []
    for row in rows:
        row = common.check_row(dict(row), "")
        texts += [plain.answer(*shown_by(shown))[0] for shown in (row, common.swap(row))]
    assert [p["text"] for p in local] == texts
    assert len({p.get("score_a") for p in local}) > len(rows)  # the prompts are told apart

    def reply(request, before):
        shown = [Image.open(io.BytesIO(image)) for image, _ in images_of(request)]
        text, tokens = plain.answer(text_of(request), shown)
        return completion(text, tokens)
    served = predictions(serve(reply), data, stage0 / f"served_{name}.jsonl", max_new_tokens=120)
    scores = ("score_a", "score_b")
    assert [{k: v for k, v in p.items() if k not in scores} for p in served] == [
        {k: v for k, v in p.items() if k not in scores} for p in local]
    for ours, theirs in zip(local, served, strict=True):
        for side in scores:
            assert (side in ours) == (side in theirs)
            assert ours.get(side, 0) == pytest.approx(theirs.get(side, 0), abs=1e-4)


def test_flags_that_do_not_fit_are_refused(tmp_path, capsys):
    # kills: a URL without http://, which would fail row by row; --api for a model of scores
    data = write(tmp_path / "rows.jsonl", text_rows(["x"]))
    for bad in ({"api": "localhost:8000/v1"}, {"api_workers": 0}):
        with pytest.raises(SystemExit):
            run_here(ev.main, flags(**{"api": "http://h/v1", "model": "m", "data": data} | bad))
        assert "--api takes a URL" in capsys.readouterr().err
