"""
The prompts, character by character. tests/templates/ holds Figures 4 to 7 in full (and the text
template, which no paper prints), and the same with the <caption> first: common.py derives six of
the nine from the others.
"""

import re
from pathlib import Path

import pytest

import common

TEMPLATES = Path(__file__).parent / "templates"
PAPER = Path(__file__).resolve().parents[2] / "shared" / "papers" / "msrl_pdf.txt"
FIGURES = {"image_understanding": 4, "image_generation": 5, "video_understanding": 6,
           "video_generation": 7}


@pytest.mark.parametrize("task", common.TASKS)
def test_the_template_is_the_figure(task):
    # kills: a type in the list of task types turned into video with the rest, "motion" left out
    assert (TEMPLATES / f"{task}.txt").read_text() == common.TEMPLATES[task] + "\n"


@pytest.mark.parametrize("task", FIGURES)
def test_the_template_that_asks_for_the_caption_first(task):
    # kills: `Caption:` left in <think>, two descriptions asked for, the figure itself changed
    whole = (TEMPLATES / f"{task}_caption.txt").read_text()
    assert whole == common.CAPTION_TEMPLATES[task] + "\n"
    row = {"task": task, "prompt": "why?", "responses": None, "media": ["x", "y"]}
    before_data = whole.partition("{")[0]
    assert common.render(row, style="caption").startswith(before_data)
    assert not common.render(row).startswith(before_data)


def test_texts_have_nothing_to_describe():
    assert common.CAPTION_TEMPLATES["text"] == common.TEMPLATES["text"]
    assert common.CAPTION_TEMPLATES.keys() == common.TEMPLATES.keys()


def test_a_text_that_does_not_occur_cannot_be_replaced():
    # a word of Figure 5 that is mended must not leave Figure 7 as it was without a sign
    with pytest.raises(AssertionError, match="an audio"):
        common._replaced("an image", {"an audio": "a video"})


@pytest.mark.skipif(not PAPER.exists(), reason="the paper is not part of the project")
@pytest.mark.parametrize("task", FIGURES)
def test_the_figure_is_the_papers(task):
    # Line breaks apart, and what common.py marks as deviations: apostrophes and </type>.
    printed = PAPER.read_text().replace("’", "'").replace("<type>\nCaption", "</type>\nCaption")
    start = {4: "You are a helpful", 5: "Figure 4.", 6: "Figure 5.", 7: "Figure 6."}
    number = FIGURES[task]
    figure = printed[printed.index(start[number]):printed.index(f"Figure {number}. Template")]
    figure = figure[figure.index("You are a helpful"):]
    ours = (TEMPLATES / f"{task}.txt").read_text()
    for text in ("{prompt}", "{media[0]}", "{media[1]}", "{a}", "{b}"):
        ours = ours.replace(text, "{}")
    figure = re.sub(r"\{[^{}]*\}|<image ?[ab]?>|<video ?[ab]?>", "{}", figure)
    assert ours.split() == [word for word in figure.split() if not word.isdigit()]
