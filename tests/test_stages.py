"""
Stages 2, 2b and 3: what they add to stage 1. The prebuilt backbone is the model, because its
answers are mostly well-formed and its verdicts a coin. "kills:" names wrong versions of the source
under which a test was seen to fail.
"""

import json
import random
import shutil

import pytest
import toy_world
import torch
import wrong_versions
from helpers import (
    OTHER, ROOT, check_stops, flags, lines, rejects, run_here, same_weights, small_world, text_row,
    thinks, torchrun, weights_of)

import common
from data import captioned, load_rows
import eval
import stage0_sft
import stage2_caption_grpo as stage2
import stage2b_cmkd as cmkd
import stage3_mm_grpo as stage3

pytestmark = pytest.mark.usefixtures("cpu_only")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small_world(tmp_path_factory.mktemp("world"), text_rl=12, caption_rl=12, mm_rl=12,
                       heldout=2)


def captioned_rows(world, encoder):
    path = str(world / "caption_rl.jsonl")
    return load_rows(path, encoder, "caption", quiet=True)


# ------------------------------------------------------------------------------------ 2b: selection
def answer(verdict, reasoning="right ."):
    return thinks(verdict, reasoning)


def malformed(verdict):
    return f"<answer>{verdict}</answer>"


SELECTED = [  # texts, confidences, what is selected or why nothing is
    # the surest of the majority; surer ones of the minority do not count
    ([answer("A"), answer("B"), answer("A"), answer("A")], [-3, -1, -2, -4], (2, None)),
    # votes of malformed answers count, but they are not kept, however sure
    ([malformed("B"), malformed("B"), answer("B"), answer("A"), answer("A")],
     [-1, -1, -9, -1, -1], (2, None)),
    ([malformed("B"), malformed("B"), answer("A")], [-1, -1, -1], (None, "malformed")),
    # what has no verdict has no vote
    (["hm", "A", answer("C"), answer("B")], [-1, -1, -1, -5], (3, None)),
    (["hm", "A", ""], [-1, -1, -1], (None, "no verdict")),
    ([answer("A"), answer("B"), "hm"], [-1, -2, -1], (None, "tie")),
    ([answer("A")], [-7], (0, None)),
]


def check_selection(select, texts, confidences, want):
    assert select(texts, confidences) == want


@pytest.mark.parametrize("texts, confidences, want", SELECTED)
def test_selection_by_hand(texts, confidences, want):
    check_selection(cmkd.select, texts, confidences, want)


def check_every_selection(select):
    for case in SELECTED:
        check_selection(select, *case)


def test_the_frame_of_the_wrong_selections_is_right():
    check_every_selection(wrong_versions.select)


@pytest.mark.parametrize("name", wrong_versions.SELECTION)
def test_wrong_selections_are_rejected(name):
    rejects(check_every_selection, wrong_versions.SELECTION[name])


def test_the_report_counts_every_row_once():
    rows = [{"id": str(i), "label": "A"} for i in range(5)]
    samples = [{"texts": t, "confidences": list(range(len(t)))} for t in (
        [answer("A"), answer("A", "left .")], [answer("B")], [answer("A"), answer("B")],
        [malformed("A")], [""])]
    kept, report = cmkd.distilled(rows, samples)
    assert [(r["id"], r["label"], r["rationale"]) for r in kept] == [
        ("0", "A", "left ."), ("1", "B", "right .")]
    assert report == {"rows": 5, "kept": 2, "tie": 1, "malformed": 1, "no verdict": 1,
                      "pseudo-label accuracy": 0.5}


def config(out, **more):
    return cmkd.Config(model=str(toy_world.PREBUILT), out=str(out), samples=3, rollout_batch=5,
                       **more)


def test_gold_labels_play_no_part(world, loaded, tmp_path):
    # Flip every label: the same rows are kept, with the same targets. kills: rows of the wrong
    # pseudo-label dropped, the gold label taught, the row's own rationale shown
    gold = captioned_rows(world, loaded[1])
    flipped = [{**row, "label": OTHER[row["label"]]} for row in gold]
    kept, right = [], []
    for name, rows in (("gold", gold), ("flipped", flipped)):
        (tmp_path / name).mkdir()
        samples = cmkd.distill(*loaded, rows, config(tmp_path / name))
        rows, report = cmkd.distilled(rows, samples)
        kept.append(rows)
        right.append(report["pseudo-label accuracy"])
    a, b = kept
    assert len(a) >= 3 and a == b
    assert [cmkd.target_text(row) for row in a] == [cmkd.target_text(row) for row in b]
    assert right[0] == pytest.approx(1 - right[1])


def test_gold_labels_play_no_part_in_the_whole_script(world, tmp_path):
    # kills: main() that keeps only rows whose pseudo-label is right
    gold = []
    for row in lines(world / "caption_rl.jsonl"):
        media = [str(world / medium) for medium in row["media"]]
        gold.append({**row, "media": media, "source": "toy"})
    flipped = [{**row, "label": OTHER[row["label"]]} for row in gold]
    files = []
    for name, rows in (("gold", gold), ("flipped", flipped)):
        common.write_lines(tmp_path / f"{name}.jsonl", rows)
        run_here(cmkd.main, flags(model=toy_world.PREBUILT, data=tmp_path / f"{name}.jsonl",
                                  media_root=world, samples=3, epochs=1, heldout="",
                                  out=tmp_path / name))
        files.append(lines(tmp_path / name / "cmkd.jsonl"))
    assert len(files[0]) >= 3 and files[0] == files[1]


def test_the_confidence_is_the_mean_log_prob(world, loaded, tmp_path):
    # against a plain forward of prompt and answer. kills: sums, EOS left out, another prompt
    (model, encoder), cfg = loaded, config(tmp_path, max_new_tokens=200)
    rows = captioned_rows(world, encoder)[:2]
    for row, s in zip(rows, cmkd.distill(model, encoder, rows, cfg), strict=True):
        for text, confidence in zip(s["texts"], s["confidences"], strict=True):
            prompt, ids = encoder(row, "caption").ids, encoder.answer_ids(text)
            logits = model(input_ids=torch.tensor([prompt + ids])).logits[0].double()
            logits[:, encoder.image_token_id] = -1e30
            logp = logits.log_softmax(-1)[range(len(prompt) - 1, len(prompt + ids) - 1), ids]
            assert confidence == pytest.approx(logp.mean().item(), abs=1e-4)


def test_sampling_goes_on_where_it_was_killed(world, loaded, tmp_path, monkeypatch):
    # kills: a half batch kept, seeds that depend on the start, the cut line counted as a row
    rows = captioned_rows(world, loaded[1])
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    want = cmkd.distill(*loaded, rows, config(whole))
    assert [s["id"] for s in want] == [r["id"] for r in rows]
    text = (whole / "samples.jsonl").read_text()
    (cut / "samples.jsonl").write_text("".join(text.splitlines(True)[:9])[:-20])  # in row 8 of 12
    calls, sample = [], cmkd.sample_group
    monkeypatch.setattr(cmkd, "sample_group", lambda *a: calls.append(len(a[2])) or sample(*a))
    with pytest.raises(SystemExit, match="temperature 1.0 -> 0.5|checkpoint .* -> "):
        cmkd.distill(*loaded, rows, config(cut, temperature=0.5))
    assert cmkd.distill(*loaded, rows, config(cut)) == want and calls == [5, 2]
    assert (cut / "samples.jsonl").read_text() == text
    other = [{**rows[0], "captions": ["left red square ."] * len(rows[0]["media"])}, *rows[1:]]
    for others in (rows[1:], other):  # not the rows it was sampled for, if of the same names
        with pytest.raises(SystemExit, match="of other rows .the rows"):
            cmkd.distill(*loaded, others, config(cut))
    teacher = tmp_path / "teacher"
    shutil.copytree(toy_world.PREBUILT, teacher)
    (tmp_path / "again").mkdir()
    cfg = config(tmp_path / "again")
    cfg.model = str(teacher)
    cmkd.distill(*loaded, rows[:2], cfg)
    (teacher / "stage.json").write_text("{}")  # trained anew in the same folder
    with pytest.raises(SystemExit, match="temperature 1.0 -> 0.5|checkpoint .* -> "):
        cmkd.distill(*loaded, rows[:2], cfg)


def test_targets_above_the_budget_are_counted(loaded, capsys):
    # kills: what is taught but never to be sampled goes unnoticed
    texts = {"short": "right .", "long": "right . " * 40}
    cfg = stage0_sft.Config(max_new_tokens=30)
    rows = [{"id": name} for name in ("long", "short", "long")]
    stage0_sft.warn_of_long_targets(rows, lambda row: texts[row["id"]], loaded[1], cfg)
    assert "2 of 3 targets" in capsys.readouterr().out
    stage0_sft.warn_of_long_targets(rows[1:2], lambda row: texts[row["id"]], loaded[1], cfg)
    assert capsys.readouterr().out == ""


def test_the_target_is_the_caption_then_the_rationale():
    # kills: the caption behind, the two captions of a pair confused by a swap, captions of texts,
    # other headings than the figures'
    row = {"task": "image_generation", "media": ["0.png", "1.png"], "captions": ["red", "blue"],
           "responses": None, "label": "A", "rationale": "Image A is right ."}
    tail = "</caption>\n<think>\nImage {0} is right .\n</think>\n<answer>\n{0}\n</answer>"
    headed = "<caption>\n<Image A>\n{}\n<Image B>\n{}\n"  # as Figure 9 heads them
    assert cmkd.target_text(row) == headed.format("red", "blue") + tail.format("A")
    swapped = cmkd.target_text(common.swap(row))
    assert swapped == headed.format("blue", "red") + tail.format("B")
    assert common.caption_format_reward(swapped, row) == 1
    videos = cmkd.caption_text({**row, "task": "video_generation"})  # Figure 11
    assert videos == "<caption>\n<Video A>\nred\n<Video B>\nblue\n</caption>\n"
    row = {**row, "task": "video_understanding", "media": ["0.mp4"], "captions": ["a disc"]}
    assert cmkd.target_text(row).startswith("<caption>\na disc\n</caption>\n<think>\n")
    assert common.caption_format_reward(cmkd.target_text(row), row) == 1
    assert cmkd.target_text({**row, "media": [], "captions": []}).startswith("<think>")


@pytest.mark.parametrize("text, seen, unseen", [
    (answer("A"), 0, 1), ("<caption>\nred\n</caption>\n" + answer("A"), 1, 1),
    (answer("A", "<caption>red</caption>"), 0, 1), ("<caption></caption>" + answer("A"), 0, 0),
    (answer("A") + "<caption>red</caption>", 0, 0), ("red " + answer("A"), 0, 0),
    ("<caption>red" + answer("A"), 0, 0), ("<caption>3 < 5</caption>" + answer("A"), 1, 1),
    ("<caption>a</caption>b" + answer("A"), 0, 0),
    ("<caption>a</caption><caption>b</caption>" + answer("A"), 0, 0)])
def test_format_of_stage_3(text, seen, unseen):
    # A row with media needs one caption, first; a text row may do without.
    assert common.caption_format_reward(text, {"media": ["0.png"]}) == seen
    assert common.caption_format_reward(text, {"media": []}) == unseen == common.format_reward(
        text, {})


# ------------------------------------------------------------- 2b and 3: what is asked and rewarded
def as_figure_9(caption_first):
    """An answer of the shape of Figure 9, or the same with its captions first in <caption>."""
    captions = "<Image A>\nred .\n<Image B>\nblue .\n"
    begin, inside = "", f"Caption:\n{captions}"
    if caption_first:
        begin, inside = f"<caption>\n{captions}</caption>\n", ""
    return (f"{begin}<think>\n<type>image generation</type>\n{inside}Feedback:\nthe image is .\n"
            "Comparison:\nImage B is better .\nConclusion:\nImage B is better .\n</think>\n"
            "<answer>\nB\n</answer>")


def reply_format(prompt):
    """The lines of a prompt that the answer is to follow, "strictly"."""
    return prompt.partition("strictly follow this format:\n")[2].partition("\nHere is the data.")[0]


def test_stage_3_rewards_what_it_asks_for(world, tmp_path, monkeypatch):
    # Three sampled answers: the prompt's own form filled in, Figure 9's, Figure 9's with the
    # captions first. kills: Figures 4-7 shown and <caption> rewarded (the first earns 0), the
    # <caption> asked for and not rewarded (the second earns 1)
    assert stage3.Config.style == cmkd.Config.style == "caption"
    rows = [r for r in lines(world / "mm_rl.jsonl") if r["task"] == "image_generation"]
    for row in rows:
        row["media"] = [str(world / medium) for medium in row["media"]]
    common.write_lines(tmp_path / "pairs.jsonl", rows)
    prompt = common.render(rows[0], style="caption")
    answers = [reply_format(prompt).replace("A or B", "A"), as_figure_9(False), as_figure_9(True)]

    def roll_out(model, encoder, prompts, cfg, generator):
        ids = [encoder.answer_ids(text) for text in answers]
        logp = [[-1.0] * len(answer) for answer in ids]
        return stage3.Rollout([ids] * len(prompts), [logp] * len(prompts))
    scores = stage3.score_answers
    seen = []

    def watched(texts, batch, functions):
        seen.append((scores(texts, batch, functions), texts))
        raise KeyboardInterrupt  # what follows would train on made-up log-probs
    monkeypatch.setattr(stage3, "roll_out", roll_out)
    monkeypatch.setattr(stage3, "score_answers", watched)
    with pytest.raises(KeyboardInterrupt):
        run_here(stage3.main, flags(**{**TINY, "max_steps": 1, "batch_size": 2}, heldout="",
                                    data=tmp_path / "pairs.jsonl", max_prompt_tokens=3000,
                                    media_root=world,
                                    out=tmp_path / "run"))
    (rewards, texts), = seen
    assert texts[0] == answers and rewards["format"][0].tolist() == [1, 0, 1]
    asked = reply_format(prompt)
    assert asked.startswith("<caption>\n<provide a detailed description")
    assert "Caption:" not in asked and asked.count("description") == 1


def test_a_checkpoint_of_stage_3_is_asked_for_its_caption(world, tmp_path, monkeypatch):
    # kills: a style that stage.json does not hold, eval.py with a prompt of its own
    run_here(stage3.main, flags(**{**TINY, "max_steps": 1, "batch_size": 2}, heldout="",
                                data=world / "mm_rl.jsonl:2", out=tmp_path / "three",
                                max_prompt_tokens=3000, max_new_tokens=9))
    asked = []

    def sample(model, encoder, prompts, *settings):
        asked.extend(encoder.decode(prompt.ids) for prompt in prompts)
        return stage3.Rollout([[encoder.answer_ids("hm")] for _ in prompts],
                              [[[-1.0]] for _ in prompts])
    monkeypatch.setattr(eval, "sample_group", sample)
    command = flags(model=tmp_path / "three", data=world / "heldout_video_generation.jsonl")
    run_here(eval.main, command)
    assert len(asked) == 4  # two rows in both orders
    assert all(reply_format(text).startswith("<caption>") for text in asked)
    run_here(eval.main, [*command, "--style", "msrl"])
    assert len(asked) == 8 and all("Caption:" in reply_format(text) for text in asked[4:])


def test_the_teacher_is_asked_in_msrl_and_the_student_in_caption(world, encoder, tmp_path,
                                                                 monkeypatch):
    # kills: one style for both (either of them), the teacher shown pixels, only one of the two
    # prompts measured, the teacher's measured in the student's style
    rows = lines(world / "caption_rl.jsonl")[:4] + lines(world / "text_rl.jsonl")[:1]
    for row in rows:
        row["media"] = [str(world / medium) for medium in row["media"]]
    rows[0]["captions"] = ["left red square . " * 999] * len(rows[0]["media"])
    common.write_lines(tmp_path / "five.jsonl", rows)
    measured, asked, learned = set(), [], []
    check, collate = common.Encoder.check, stage0_sft.collate

    def measure(self, row, form):
        measured.add((self.style, form))
        return check(self, row, form)

    def sample(model, _, prompts, group_size, *settings):
        asked.extend(encoder.decode(prompt.ids) for prompt in prompts)
        ids = [encoder.answer_ids(answer("A"))] * group_size
        return stage3.Rollout([ids] * len(prompts), [[[-1.0]] * group_size] * len(prompts))

    def learn(prompts, *answers_and_settings):
        learned.extend(encoder.decode(prompt.ids) for prompt in prompts)
        return collate(prompts, *answers_and_settings)
    monkeypatch.setattr(common.Encoder, "check", measure)
    monkeypatch.setattr(cmkd, "sample_group", sample)
    monkeypatch.setattr(stage0_sft, "collate", learn)
    run_here(cmkd.main, flags(model=toy_world.PREBUILT, data=tmp_path / "five.jsonl", samples=2,
                              epochs=1, batch_size=4, heldout="", max_prompt_tokens=3000,
                              media_root=world, out=tmp_path / "run"))
    assert measured == {("caption", "pixels"), ("msrl", "caption")}
    asked = [reply_format(text) for text in asked]
    assert len(asked) == 4  # the row with the long caption is left out
    assert sum("Caption:" in text for text in asked) == 3  # the text row has none
    assert not any("<caption>" in text for text in asked)
    learned = [reply_format(text) for text in learned]
    assert len(learned) == 4 and not any("Caption:" in text for text in learned)
    assert sum(text.startswith("<caption>") for text in learned) == 3
    assert common.trained_style(tmp_path / "run") == "caption"  # eval.py asks so, too


# ---------------------------------------------------------------------------------------- 2: replay
SHARES = [("5:1", 24, 4), ("1:0", 24, 0), ("1:1", 24, 12), ("2:1", 24, 8), ("4:1", 30, 6),
          ("5:1", 18, 3)]  # ratio, batch, texts in it


def check_share(mixed_batch, ratio, size, texts):
    rows = [text_row(id=f"caption{i}") for i in range(31)]
    replay = [text_row(id=f"text{i}") for i in range(7)]
    cfg = stage2.Config(replay_ratio=ratio, batch_size=size)
    seen = set()
    for step in range(9):
        ids = [r["id"] for r in mixed_batch(rows, replay, step, cfg)]
        assert [x[:4] for x in ids] == ["capt"] * (size - texts) + ["text"] * texts
        seen |= set(ids)
    assert len(seen) == 31 + (7 if texts else 0)


@pytest.mark.parametrize("ratio, size, texts", SHARES)
def test_replay_is_the_same_share_of_every_batch(ratio, size, texts):
    # kills: text first (ranks would not share it)
    check_share(stage2.mixed_batch, ratio, size, texts)


def check_mini_batches(mixed_batch, mini_batch):
    cfg = stage2.Config(batch_size=24, replay_ratio="5:1", mini_batch=mini_batch)
    rows = [text_row(id=f"c{k}") for k in range(30)]
    texts = [text_row(id=f"t{k}") for k in range(30)]
    batch = [row["id"] for row in mixed_batch(rows, texts, 0, cfg)]
    plain = stage2.Config(batch_size=24, replay_ratio="5:1")
    assert sorted(batch) == sorted(row["id"] for row in mixed_batch(rows, texts, 0, plain))
    size = mini_batch or 24
    for first in range(0, 24, size):
        assert sum(name[0] == "t" for name in batch[first:first + size]) == size // 6


@pytest.mark.parametrize("mini_batch", [0, 6, 12])
def test_every_mini_batch_of_stage_2_replays_its_share(mini_batch):
    # kills: captions first and texts last, so that the last mini-batches are all text
    check_mini_batches(stage2.mixed_batch, mini_batch)


def check_replay(mixed_batch):
    for case in SHARES:
        check_share(mixed_batch, *case)
    for mini_batch in (0, 6, 12):
        check_mini_batches(mixed_batch, mini_batch)


def test_the_frame_of_the_wrong_replays_is_right():
    check_replay(wrong_versions.mixed_batch)


@pytest.mark.parametrize("name", wrong_versions.REPLAYS)
def test_wrong_replays_are_rejected(name):
    rejects(check_replay, wrong_versions.REPLAYS[name])


def verdicts_of(rows, verdicts):
    """What a judge says to these rows: (AB, BA) each, "right", "wrong" or None."""
    preds = []
    for i, row in enumerate(rows):
        named = {"right": row["label"], "wrong": OTHER[row["label"]], None: None}
        preds += [{"at": i, "pred": named[verdict]} for verdict in verdicts[i % len(verdicts)]]
    return preds


def check_replayed(choose_replay):
    """Rows that are judged right in both orders, of 9 candidates, and of all 14 rows where more
    candidates are wanted. kills: one order enough, unparsable counted as right, rows with wrong
    verdicts, rows that come twice, all rows for candidates"""
    texts = [text_row(id=str(i), label="ABB"[i % 3]) for i in range(14)]
    verdicts = [("right", "right"), ("right", "wrong"), ("wrong", "wrong"), ("right", None)]

    def judge(model, encoder, rows, *args, **kwargs):
        return verdicts_of(rows, verdicts)
    for candidates, n in ((9, 9), (20, 14)):
        cfg = stage2.Config(replay="texts.jsonl", replay_candidates=candidates)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(common, "judge", judge)
            chosen = choose_replay(None, None, texts, cfg)
        rows = common.batch_of(texts, 0, n, cfg.seed)
        assert [r["id"] for r in chosen] == [rows[i]["id"] for i in range(0, n, 4)]
    verdicts = [("right", "wrong")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "judge", judge)
        check_stops(choose_replay, None, None, texts, cfg)


def test_replayed_texts_are_those_judged_right_in_both_orders():
    check_replayed(stage2.choose_replay)


def test_the_frame_of_the_wrong_choices_is_right():
    check_replayed(wrong_versions.choose_replay)


@pytest.mark.parametrize("name", wrong_versions.REPLAYED)
def test_wrong_choices_are_rejected(name):
    rejects(check_replayed, wrong_versions.REPLAYED[name])


def test_captions_come_from_a_checkpoint(world, loaded, tmp_path, monkeypatch):
    # The toy backbone describes what the rows really show; each medium once, also after a kill.
    # kills: captions of another medium, given captions replaced, the cache forgotten
    rows = lines(world / "mm_rl.jsonl")
    for i, row in enumerate(rows):
        row["media"] = [str(world / m) for m in row["media"]]
        row["true"], row["captions"] = row["captions"], ["given"] * len(row["media"]) * (i == 0)
    common.write_lines(tmp_path / "bare.jsonl", rows)
    cfg = stage2.Config(data=str(tmp_path / "bare.jsonl"), captioner=str(toy_world.PREBUILT),
                        model=str(toy_world.PREBUILT), heldout="", replay_ratio="1:0",
                        media_root=str(world), out=str(tmp_path))
    calls = []

    def sample(model, encoder, prompts, *args):
        calls.append(len(prompts))
        return stage2.sample_group(model, encoder, prompts, *args)
    n = sum(len(r["media"]) for r in rows[1:])
    got = lines(captioned(cfg, sample, "cpu", batch_size=5))
    assert sum(calls) == n and [r["id"] for r in got] == [r["id"] for r in rows]
    assert got[0]["captions"] == ["given"]
    right = [a == b for r in got[1:] for a, b in zip(r["captions"], r["true"], strict=True)]
    assert sum(right) >= 0.9 * n  # held at 95 % and more on the backbone's own test
    cache = tmp_path / "captions.jsonl"
    cache.write_text("".join(cache.read_text().splitlines(True)[:7])[:-5])
    for want in (n - 5, 0):  # what was whole stays, and the second time nothing is left to do
        calls.clear()
        assert lines(captioned(cfg, sample, "cpu", batch_size=5)) == got
        assert sum(calls) == want
        assert len(lines(cache)) == n + 1
    # a mended label is trained on; other questions need other captions, by the remedy that is named
    rows[0]["label"] = OTHER[rows[0]["label"]]
    common.write_lines(tmp_path / "bare.jsonl", rows)
    assert lines(captioned(cfg, sample, "cpu", batch_size=5))[0]["label"] == rows[0]["label"]
    cfg.caption_prompt = "name what is there"
    with pytest.raises(SystemExit, match="Delete it"):
        captioned(cfg, sample, "cpu", batch_size=5)
    cache.unlink()
    calls.clear()
    captioned(cfg, sample, "cpu", batch_size=5)
    assert sum(calls) == n


# ------------------------------------------------------------------------------------- whole stages
TINY = {"model": toy_world.PREBUILT, "batch_size": 6, "group_size": 3, "micro_batch": 2,
        "max_steps": 2, "save_every": 1, "lr": 1e-3}


def vision(folder):
    return {name: weight for name, weight in weights_of(folder).items()
            if "vision_tower" in name or "projector" in name}


@pytest.mark.parametrize("missing", ["model", "replay", "heldout"])
def test_what_is_missing_is_found_before_the_captioners_hours(world, tmp_path, missing):
    # kills: a captioner that describes 20,000 images for a run that cannot start
    args = {"model": toy_world.PREBUILT, "replay": world / "text_rl.jsonl", "heldout": "",
            missing: tmp_path / "none.jsonl"}
    with pytest.raises(SystemExit, match="none.jsonl"):
        run_here(stage2.main, flags(**args, data=world / "caption_rl.jsonl",
                                    captioner=toy_world.PREBUILT, out=tmp_path / "run"))
    assert not (tmp_path / "run" / "captions.jsonl").exists()


def test_stage_2_runs_and_resumes(world, loaded, tmp_path):
    # Replayed texts and task reward are in; the vision tower has nothing to learn from captions.
    # kills: other replayed rows after a resume, pixels shown, a task reward of 1
    args = flags(**TINY, data=world / "caption_rl.jsonl", replay=world / "text_rl.jsonl",
                 heldout="", replay_ratio="2:1")
    texts = load_rows(str(world / "text_rl.jsonl"), loaded[1], quiet=True)
    with pytest.MonkeyPatch.context() as patch:  # an untrained judge is right in both orders rarely
        patch.setattr(stage2, "choose_replay", lambda *a: random.Random(0).sample(texts, 5))
        run_here(stage2.main, [*args, "--out", tmp_path / "a"])
        run_here(stage2.main, [*args, "--out", tmp_path / "b", "--max_steps", 1])
        patch.setattr(stage2, "choose_replay", lambda *a: 1 / 0)
        run_here(stage2.main, [*args, "--out", tmp_path / "b"])
    assert same_weights(tmp_path / "a", tmp_path / "b")
    assert not same_weights(tmp_path / "a", toy_world.PREBUILT)
    metrics = lines(tmp_path / "a" / "metrics.jsonl")
    assert 0 < max(m["rewards/task/mean"] for m in metrics) <= 0.2
    for m in metrics:  # 0.2 for the task is trained on, not only logged
        assert m["reward"] == pytest.approx(sum(m[f"rewards/{x}/mean"] for x in stage2.REWARDS))
    before, after = vision(toy_world.PREBUILT), vision(tmp_path / "a")
    assert all((before[k].float() == after[k]).all() for k in before)
    assert all("<image>" not in r["prompt"] for r in lines(tmp_path / "a" / "rollouts.jsonl"))


@pytest.mark.parametrize("freeze", [True, False])
def test_stage_3_trains_the_vision_tower_unless_frozen(world, tmp_path, freeze):
    # Tasks with one, two, four and eight images and a text row in one batch.
    # kills: always frozen, never frozen, captions shown
    mixed = tmp_path / "mixed.jsonl"
    rows = lines(world / "mm_rl.jsonl")[:4] + lines(world / "text_rl.jsonl")[:1]
    for row in rows:
        row["media"] = [str(world / m) for m in row["media"]]
    common.write_lines(mixed, rows)
    run_here(stage3.main, flags(**{**TINY, "batch_size": 5, "group_size": 8, "max_steps": 1},
                                data=mixed, media_root=world, heldout="", freeze_vision=freeze,
                                out=tmp_path / "run"))
    before, after = vision(toy_world.PREBUILT), vision(tmp_path / "run")
    same = [bool((before[k].float() == after[k]).all()) for k in before]
    assert len(same) > 20 and (all(same) if freeze else not any(same[:20]))


def test_stage_3_rewards():
    # kills: the <caption> not asked for, the task reward left out
    rewards = stage3.REWARDS
    assert rewards == {"format": common.caption_format_reward, "task": common.task_reward,
                       "accuracy": common.accuracy_reward}
    assert stage3.SCHEMES["paper"] == {"format": 1, "accuracy": 1, "task": 1}  # 0.2 in task_reward


def test_captions_and_distillation_on_two_processes(world, tmp_path):
    # kills: media that no process describes, rationales that land at another row's place
    rows = lines(world / "mm_rl.jsonl")
    for row in rows:
        row["media"], row["captions"] = [str(world / m) for m in row["media"]], []
    common.write_lines(tmp_path / "bare.jsonl", rows)
    torchrun([ROOT / "stage2_caption_grpo.py", *flags(
        **TINY, data=tmp_path / "bare.jsonl", captioner=toy_world.PREBUILT, heldout="",
        replay_ratio="1:0", media_root=world, out=tmp_path / "two")])
    got = lines(tmp_path / "two" / "captioned.jsonl")
    cfg = stage2.Config(data=str(tmp_path / "bare.jsonl"), captioner=str(toy_world.PREBUILT),
                        model=str(toy_world.PREBUILT), heldout="", replay_ratio="1:0",
                        media_root=str(world), out=str(tmp_path))
    assert got == lines(captioned(cfg, stage2.sample_group, "cpu"))
    torchrun([ROOT / "stage2b_cmkd.py", *flags(
        model=tmp_path / "two", data=tmp_path / "two" / "captioned.jsonl", samples=3, epochs=1,
        rollout_batch=5, batch_size=4, heldout="", media_root=world, out=tmp_path / "b")])
    assert [s["id"] for s in lines(tmp_path / "b" / "samples.jsonl")[1:]] == [r["id"] for r in got]
    assert json.loads((tmp_path / "b" / "stage.json").read_text())["step"] >= 1


def test_a_rank_without_images_waits_for_nobody(world, tmp_path):
    # One process has the text row, the other the image row. kills: gradients summed only where
    # there are any (it hangs, or the processes part)
    rows = [lines(world / "mm_rl.jsonl")[0], lines(world / "text_rl.jsonl")[0]]
    rows[0]["media"] = [str(world / m) for m in rows[0]["media"]]
    common.write_lines(tmp_path / "two.jsonl", rows)
    torchrun([ROOT / "stage3_mm_grpo.py", *flags(**{**TINY, "batch_size": 2}, heldout="",
              data=tmp_path / "two.jsonl", media_root=world, out=tmp_path / "run")])
    assert [m["step"] for m in lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


def test_distillation_runs_and_resumes(world, tmp_path, monkeypatch):
    # Samples, selects, trains on pixels, vision tower included; a second start has nothing to do.
    args = flags(model=toy_world.PREBUILT, data=world / "caption_rl.jsonl", samples=3, epochs=1,
                 batch_size=4, micro_batch=2, heldout=world / "heldout_image_understanding.jsonl",
                 out=tmp_path / "run")
    run_here(cmkd.main, args)
    kept = lines(tmp_path / "run" / "cmkd.jsonl")
    assert kept and all(r["rationale"] and r["label"] in "AB" for r in kept)
    stage = json.loads((tmp_path / "run" / "stage.json").read_text())
    assert stage["stage"] == "stage2b_cmkd" and stage["heldout"]["after"]["n"] == 2
    before, after = vision(toy_world.PREBUILT), vision(tmp_path / "run")
    assert not all((before[k].float() == after[k]).all() for k in before)
    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    sample = cmkd.sample_group

    def judges_only(model, encoder, prompts, group_size, *settings):
        assert group_size == 1, "rationales are sampled again"
        return sample(model, encoder, prompts, group_size, *settings)
    monkeypatch.setattr(cmkd, "sample_group", judges_only)
    run_here(cmkd.main, args)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == weights
