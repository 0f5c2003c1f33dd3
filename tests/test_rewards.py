"""
Answers and rewards: what counts as a verdict, what each reward pays for, and whether the verdict is
what the reasoning concluded. "kills:" names plausible wrong versions of the source that make a test
fail; wrong_versions.py has some of them as functions.
"""

from types import SimpleNamespace

import pytest
import wrong_versions
from helpers import rejects, thinks

import common
import stage0_sft
import stage1_text_grpo as stage1


# ------------------------------------------------------------------------------ verdict, form, type
PARSED = [  # text, verdict, well formed
    ("<think>\nx\n</think>\n<answer>\nA\n</answer>", "A", True),
    ("  <think>x\ny</think><answer> B </answer>\n", "B", True),
    ("<answer>A</answer>", "A", False),                                # --target label answers so
    ("<answer>A</answer><answer>B</answer>", None, False),
    ("<think>x</think><answer>A</answer><answer>A</answer>", None, False),
    ("<think>x</think><answer>A</answer>A", "A", False),
    ("Well. <think>x</think><answer>A</answer>", "A", False),
    ("<think>x</think> so <answer>A</answer>", "A", False),
    ("<think><think>x</think></think><answer>A</answer>", "A", False),
    ("<think>x</think><think>y</think><answer>B</answer>", "B", False),
    ("<think>x<think>y</think><answer>B</answer>", "B", False),
    ("<think>x</think><answer>Response A</answer>", None, False),
    ("<think>x</think><answer>A or B</answer>", None, False),          # the template's own words
    ("<think>x</think><answer>AB</answer>", None, False),
    ("<think>x</think><answer>a</answer>", None, False),
    ("<think>x</think><answer>\u0410</answer>", None, False),          # a Cyrillic A
    ("<THINK>x</THINK><ANSWER>A</ANSWER>", None, False),
    ("<think>x</think><answer></answer>", None, False),
    ("<think>x</think><answer>A", None, False),
    ("<think>x</think>", None, False),
    ("<think>A is better", None, False),
    ("<think>x</think>A", None, False),
    ("<think>x</think><answer><answer>A</answer></answer>", None, False),
    ("<think>x</think><answer><think>A</think></answer>", None, False),
    ("<think>x<answer></think>A</answer>", None, False),
    ("", None, False),
]


GUESSED_WHILE_THINKING = [
    "<think>is it <answer>A</answer>, or rather not</think>",
    "<think>is it <answer>A</answer>, or",
    "<think>x<answer>B</answer></think>",
    "</think>x<think><answer>A</answer>",
]
ANSWERED_FIRST = "<answer>A</answer><think>x</think>"


def check_parser(parse, text, verdict, well_formed):
    answer = parse(text)
    assert (answer.verdict, answer.well_formed) == (verdict, well_formed)


@pytest.mark.parametrize("text, verdict, well_formed", PARSED)
def test_parse(text, verdict, well_formed):
    """One clear verdict in its own tag, or none: a policy finds every way to be read two ways."""
    check_parser(common.parse, text, verdict, well_formed)


def check_no_verdict(parse, text):
    assert parse(text).verdict is None


@pytest.mark.parametrize("text", GUESSED_WHILE_THINKING)
def test_a_verdict_inside_the_thinking_is_none(text):
    """A guess while thinking, cut off or never confirmed, must earn no accuracy."""
    check_no_verdict(common.parse, text)


def check_malformed(parse, text):
    assert not parse(text).well_formed


def test_an_answer_before_the_thinking_is_malformed():
    """Reasoning after the verdict explains nothing."""
    check_malformed(common.parse, ANSWERED_FIRST)


def check_all_texts(parse):
    for case in PARSED:
        check_parser(parse, *case)
    for text in GUESSED_WHILE_THINKING:
        check_no_verdict(parse, text)
    check_malformed(parse, ANSWERED_FIRST)


def test_the_frame_of_the_wrong_parsers_is_right():
    check_all_texts(wrong_versions.parser())


@pytest.mark.parametrize("name", wrong_versions.PARSERS)
def test_wrong_parsers_are_rejected(name):
    rejects(check_all_texts, wrong_versions.PARSERS[name])


@pytest.mark.parametrize("inside, type", [
    ("image understanding", "image understanding"),
    (" Image Understanding.\n", "image understanding"),
    ("IMAGE_UNDERSTANDING", "image understanding"),
    ("image-\nunderstanding", "image understanding"),
    ("video  generation", "video generation"),
    ("images understanding", "images understanding"),
    ("image understanding</type><type>video generation", None),
    ("image understanding</type><type>image understanding", None)])
def test_type_tag(inside, type):
    """Spelling is forgiven, a second guess is not. kills: no lower(); no split at _ or -; the first
    of several tags."""
    assert common.parse(f"<think><type>{inside}</type>x</think><answer>A</answer>").type == type


@pytest.mark.parametrize("text", [
    "", "image understanding", "<type>image understanding", "image understanding</type>"])
def test_no_type_tag(text):
    """kills: `"image understanding" in text`."""
    assert common.parse(text).type is None


@pytest.mark.parametrize("text", [
    "<type>video generation<type>image understanding</type>",
    "<type>image understanding</type><type>video generation"])
def test_a_nested_type_tag_is_none(text):
    """Two opened tags are two guesses, the second merely not closed.
    kills: counting whole pairs only."""
    assert common.parse(text).type is None


# ------------------------------------------------------------------------------------------ rewards
EXPLOITS = {  # name: an answer to a row whose label is A, that shows no judgement
    "an empty form": "<caption> </caption><think></think><answer>A</answer>",
    "a blank caption": "<caption>\n</caption><think>because</think><answer>A</answer>",
    "a blank thought": "<think> \n</think><answer>A</answer>",
    "a type in place of a thought": "<think><type>image understanding</type></think>"
                                    "<answer>A</answer>",
    "both verdicts": "<think>because</think><answer>A or B</answer>",
    "all verdicts": "<think>because</think><answer>A or B or C</answer>",
    "a second answer": "<think>because</think><answer>A</answer><answer>B</answer>",
    "the same answer twice": "<think>because</think><answer>A</answer><answer>A</answer>",
    "a verdict inside the thinking": "<think>because <answer>A</answer></think>",
    "no end of thinking": "<think>because <answer>A</answer>",
}


@pytest.mark.parametrize("name", EXPLOITS)
def test_exploits_earn_no_format(name):
    """What a policy finds when the form can be had for nothing. kills: .* in place of a thought"""
    row = {"task": "image_understanding", "label": "A", "media": ["0.png"]}
    answer = EXPLOITS[name]
    assert common.format_reward(answer, row) == common.caption_format_reward(answer, row) == 0
    if "blank" not in name and name not in ("an empty form", "a type in place of a thought"):
        assert common.accuracy_reward(answer, row) == 0


@pytest.mark.parametrize("answer", [
    "<type>image understanding</type><think>x</think><answer>A</answer>",
    "<think>x</think><type>image understanding</type><answer>A</answer>",
    "<think>x</think><answer>A</answer><type>image understanding</type>",
    "<think>it is <type>image understanding</type></think><answer>A</answer>"])
def test_a_type_counts_only_where_the_template_puts_it(answer):
    """kills: the tag found anywhere"""
    row = {"task": "image_understanding", "label": "A"}
    assert common.task_reward(answer, row) == 0


@pytest.mark.parametrize("task", common.TASKS)
def test_rewards(task):
    """The three rewards are separate: each can be earned without the others.
    kills: accuracy needs the format; task reward 1.0; task compared with its underscore."""
    row = {"task": task, "label": "B"}
    tag = f"<type>{task.replace('_', ' ')}</type>"
    for text, want in (
            (f"<think>{tag}x</think><answer>B</answer>", (1, 1, 0.2)),
            ("<think><type>audio</type>x</think><answer>B</answer>", (1, 1, 0)),
            (f"<think>{tag}x</think><answer>A</answer>", (1, 0, 0.2)),
            (f"<think>{tag}x</think><answer>B</answer>!", (0, 1, 0.2)),
            (f"<think>{tag}x</think>", (0, 0, 0.2)),
            (tag * 2, (0, 0, 0)),
            ("<answer>A</answer><answer>B</answer>", (0, 0, 0)),
            ("B", (0, 0, 0)),
            ("", (0, 0, 0))):
        got = (common.format_reward(text, row), common.accuracy_reward(text, row),
               common.task_reward(text, row))
        if task == "text":  # whose template asks for no <type>
            want = (*want[:2], 0)
        assert got == want, text


# -------------------------------------------------------------------------- R1-Reward's consistency
@pytest.mark.parametrize("reasoning, side", [
    ("Response A is better .", "A"), ("Response 2 is clearly the better one.", "B"),
    ("Response A is **worse**.", "B"), ("The answer 1 is not better.", "B"),
    ("Image B isn't the best", "A"), ("I prefer Response B", "B"),
    ("The better response is Response 1.", "A"),
    # the last comparison counts, and its subject, not the one it is compared with
    ("Response A is better at first sight. Yet Response B is better.", "B"),
    ("Response A is better than Response B", "A"),
    ("Response B is better.\nResponse A is right.", "B"),  # "right" compares nothing
    ("Response A is better in style. Overall, Response B is the winner.", "B"),
    ("Response 1 is better written. Response 2 wins overall.", "B"),
    ("A point each, but Response B is more accurate.", "B"),
    # as judges write: a "not" behind the comparison, in its reason, leaves it as it is
    ("Response A is better because it does not invent objects.", "A"),
    ("Response B provides a more accurate answer.", "B"), ("Response A gives a worse answer.", "B"),
    ("The final answer is Response 2.", "B"), ("My final verdict is Response A.", "A"),
    ("Overall, Response 1 is the better choice because it is not misleading.", "A"),
    ("I would choose Response 2.", "B"), ("I would go with Response B.", "B"),
    ("Response A is more accurate and does not invent objects.", "A"),
    ("Therefore, Response B is the better answer, which does not hallucinate.", "B"),
    ("Response B does a much better job of describing the scene.", "B"),
    ("Thus the winner is Response B.", "B"), ("Response A should be preferred.", "A"),
    ("The better response is clearly Response B.", "B"),
    ("In conclusion, Image B is better: it does not show a cat.", "B"),
    ("Response 1 is better, while Response 2 does not answer the question.", "A"),
    ("Response A is better since Response B does not give the correct answer.", "A"),
    ("Because it does not invent objects, Response A is better.", "A"),
    ("Both responses are fluent, but Response A is more accurate.", "A"),
    ("Response A is wrong and Response B is better.", "B"),
    # ... but not everywhere: here it takes the verdict back, or one side is only conceded
    ("Response A is better is not what I think.", None),
    ("Response A is better, which is not true.", None),
    ("Response A is better, while I do not think so.", None),
    ("Response A is better and is not better.", None),
    ("Response A is better in style, though not overall.", None),
    ("Response A is better, although Response B is more detailed.", None),
    ("Response A is better in style, while Response B is better overall.", None),
    ("Response A provides a better start, but it fails.", None),
    ("Response A gives nothing better.", None), ("Response A is nowhere near better.", None),
    ("The final answer is not Response 2.", None), ("Nobody would choose Response A.", None),
    ("It would be wrong to prefer Response A.", None),
    ("Not because it is longer, Response A is better", None),
    ("I do not believe that, because of its length, Response A is better", None),
    ("If it does not lie, Response A is better.", None),
    # hostile: nothing is stated, or both, or it is asked
    ("", None), ("Response C is better", None), ("If Response A is better, so be it", None),
    ("Neither Response A nor Response B is better.", None), ("Is Response A better?", None),
    ("Response A is better. Whether Response B is better is open.", None),
    ("Response A is better; or Response B might be better", None),
    # a "not" elsewhere may turn the sentence round: better no sign than the wrong one
    ("Response A is not only better but clearer.", None), ("I would not choose Response B.", None),
    ("I do not think Response A is better", None), ("Response A is no better than B.", None),
    ("Response A is the less preferable one.", None), ("Response A is far from the best", None),
])
def test_what_a_reasoning_concludes(reasoning, side):
    # kills: the first comparison, the last name, negation ignored, "worse" read as praise; a "not"
    # in the reason that voids the verdict, a "not" behind any "because" or "which" that is ignored
    assert common.concluded(reasoning) == side
    for verdict in "AB":
        text = thinks(verdict, reasoning)
        want = 0 if side is None else 1 if side == verdict else -1
        assert common.rule_consistency(text) == want
    assert common.rule_consistency(f"<think>{reasoning}</think>") == 0  # no verdict
    # what stands behind the reasoning is not reasoning
    assert common.rule_consistency("<think></think>Response A is better<answer>A</answer>") == 0


def test_r1_reward_is_the_papers(monkeypatch):
    # 0.5 format + accuracy (1 + 0.5 consistency): 2, 1, 0.5 and 0.5 for the four kinds of answer.
    # kills: consistency paid to wrong verdicts, 0 for -1, the referee asked twice
    def text(side, verdict):
        return thinks(verdict, f"Response {side} is better.")
    reward = common.consistency_reward("rule", None, None)
    functions = {**stage1.REWARDS, "consistency": reward}
    got = []
    for answer in (text("A", "A"), text("B", "A"), text("B", "B"), text("A", "B"), "A"):
        got.append(sum(weight * functions[name](answer, {"label": "A"})
                       for name, weight in stage1.SCHEMES["r1"].items()))
    assert got == [2.0, 1.0, 0.5, 0.5, 0.0]
    # a checkpoint as referee: one question for each conclusion and verdict, the last three lines
    asked = []

    class Fake:
        def encode(self, text):
            asked.append(text)
            return text

        def decode(self, ids):
            return ids
    monkeypatch.setattr(common, "load", lambda *a: (None, Fake()))
    replies = {"A": "1", "B": "0", "C": "0 or 1"}

    def sample(model, encoder, prompts, *settings):
        side = prompts[0].split("Response ")[1][0]
        return SimpleNamespace(ids=[[replies[side]]])
    referee = common.referee_consistency("folder", sample, "cpu")
    assert [referee(text(side, "A")) for side in "ABCAB"] == [1, -1, 0, 1, -1]
    assert len(asked) == 3
    referee("<think>\none\ntwo\n\nResponse A three\nResponse A four\n</think>\n<answer>B</answer>")
    assert "two; Response A three" not in asked[-1] and "three; Response A four" in asked[-1]
    assert "Response B is better" in asked[-1] and "think>" not in asked[-1]
    # in the words of the reasoning: 1 and 2, images
    referee = common.referee_consistency("folder", sample, "cpu", "r1")
    answer = common.as_ab("<think>Response 2 is better.</think><answer>2</answer>", "r1")
    replies["2"] = "1"
    assert referee(answer) == 1 and "Statement: Response 2 is better" in asked[-1]


def test_the_referee_is_asked_about_right_verdicts_only(monkeypatch):
    # Consistency counts where the verdict is right; a 7B model must not run for the others.
    # kills: accuracy_reward(text, row) * consistency(text)
    asked = []

    def referee_consistency(*settings):
        def consistency(text):
            asked.append(common.parse(text).verdict)
            return 1
        return consistency
    monkeypatch.setattr(common, "referee_consistency", referee_consistency)
    reward = common.consistency_reward("folder", None, "cpu")
    answers = thinks("A"), thinks("B"), "no verdict", thinks("B")
    assert [reward(text, {"label": "B"}) for text in answers] == [0, 1, 0, 1]
    assert asked == ["B", "B"]


def test_a_referee_that_cannot_be_loaded_is_refused_with_a_way_out(tmp_path):
    # R1-Reward's own, Qwen2.5-VL, is not among what common.load takes.
    # kills: the loader's message alone, which names a script that makes a policy
    with pytest.raises(SystemExit, match="--referee .*text-only.*Qwen2.5-7B-Instruct.*'rule'"):
        common.consistency_reward(str(tmp_path / "qwen"), None, "cpu")


def test_style_r1_says_1_and_2(encoder):
    # kills: an A taken for a verdict, 2 read as A, numbers changed, B's left behind
    text = ("<think>\nBoth responses A and B walk. Response B has 2 legs, answer A four. A dog.\n"
            "</think>\n<answer>\nB\n</answer>")
    digits = stage0_sft.in_style(text, "r1")
    assert digits == ("<think>\nBoth responses 1 and 2 walk. Response 2 has 2 legs, answer 1 four. "
                      "A dog.\n</think>\n<answer>\n2\n</answer>")
    assert common.parse(common.as_ab(digits, "r1")).verdict == "B"
    assert common.parse(digits, "r1").verdict == "B"
    assert common.parse(digits).verdict is None and common.parse(text, "r1").verdict is None
    assert stage0_sft.in_style(text, "msrl") == common.as_ab(text, "msrl") == text
    assert common.rule_consistency(common.as_ab(digits, "r1")) == 0  # "has 2 legs" compares nothing
    row = {"task": "text", "prompt": "p?", "responses": ["uno", "due"], "media": [], "captions": []}
    shown = common.render(row, style="r1")
    assert shown.index("p?") < shown.index("uno") < shown.index("due") and "1/2" in shown
    with pytest.raises(common.BadRow, match="R1-Reward has no prompt"):
        common.render({**row, "task": "image_generation", "responses": None}, style="r1")
