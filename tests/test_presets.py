"""
--preset and --backbone: each paper's own choices, written down here beside the words of the paper.
Where ../shared/papers is, the words are looked up in it.
"""

import inspect
import re
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from helpers import ROOT, TESTS, UNDERSTANDING, flags, lines, run_here, small_world

import bt_reward
import common
import dt2it
import stage0_sft
import stage1_text_grpo as stage1
import stage2_caption_grpo as stage2
import stage2b_cmkd as cmkd
import stage3_mm_grpo as stage3

SCRIPTS = (stage0_sft, stage1, stage2, cmkd, stage3, bt_reward, dt2it)
STAGES = SCRIPTS[:5]
PAPERS = Path(ROOT).parent / "shared" / "papers"
CURATE = ("--curate", "rows.jsonl", "--models", "a", "b")  # dt2it.py does nothing without
INTERNVL, QWEN = "OpenGVLab/InternVL3_5-8B-HF", "Qwen/Qwen2.5-VL-7B-Instruct"

# What a paper says, as it is written there -> the knobs that say it. Keys of OF_PAPER: preset, the
# paper's file, script.
OF_PAPER = {
    ("paper", "msrl_html", stage0_sft): {
        # A.2, MSRL Training
        "a learning rate of 1e-5, a batch size of 128, and 3 training epochs":
            dict(lr=1e-5, batch_size=128, epochs=3, target="rationale"),
        "We froze the vision encoder and projector during text-only training in Stage 1":
            dict(freeze_vision=True),
        # 5.1
        "we used the InternVL3.5 model": dict(model=INTERNVL),
        "40k rationale-based preference examples from HelpSteer3": dict(data="nvidia/HelpSteer3")},
    ("paper", "msrl_html", stage1): {
        # 5.1 and A.2; the scripts count answers: 16 prompts x 8
        "a sampling size of 8, a learning rate of 1e-6, and a batch size of 128":
            dict(group_size=8, lr=1e-6, batch_size=16),
        "We froze the vision encoder and projector during text-only training in Stage 1":
            dict(freeze_vision=True),
        "400k preference examples randomly sampled from GRAM-R2":
            dict(data="wangclnlp/GRAM-RR-TrainingData:400000", max_steps=400_000 // 16)},
    ("paper", "msrl_html", stage2): {
        "with a learning rate of 1e-6 and a sampling number of 8": dict(lr=1e-6, group_size=8),
        "mixing new and previously seen data at a 5:1 ratio": dict(replay_ratio="5:1"),
        "unfroze them in Stages 2 and 3": dict(freeze_vision=False)},
    ("paper", "msrl_html", cmkd): {
        "a smaller learning rate of 2e-6 and a sampling number of 8": dict(lr=2e-6, samples=8),
        "unfroze them in Stages 2 and 3": dict(freeze_vision=False)},
    ("paper", "msrl_html", stage3): {
        "a sampling size of 8, a learning rate of 1e-6, and a batch size of 128":
            dict(group_size=8, lr=1e-6, batch_size=16),
        "unfroze them in Stages 2 and 3": dict(freeze_vision=False)},
    ("paper", "msrl_html", bt_reward): {
        # A.2, Discriminative and Generative Baselines
        "for one epoch using a learning rate of 1e-5 and a batch size of 128":
            dict(epochs=1, lr=1e-5, batch_size=128, model=INTERNVL)},
    ("r1", "r1_reward", stage0_sft): {
        # 5, Implementation Details
        "The SFT phase trains for 1 epoch": dict(epochs=1),
        "We use QwenVL-2.5-7B-Instruct as the base model": dict(model=QWEN),
        "the learning rate is set to 1e-5, and the batch size is set to 256":
            dict(lr=1e-5, batch_size=256),
        # Table 1
        "<think>Your detailed comparative analysis</think><answer>1/2</answer>":
            dict(style="r1", target="rationale")},
    ("r1", "r1_reward", stage3): {
        # 5; the model is that of the SFT phase, the published rows are 17,261 (their card)
        "the RL phase trains for 5 epochs": dict(max_steps=337, data="yifanzhang114/R1-Reward-RL"),
        "The training batch size is set to 128, and the rollout batch size is set to 256":
            dict(mini_batch=128, batch_size=256),
        "The learning rate is set to 1e-6, and the initial KL coefficient is set to 0":
            dict(lr=1e-6, beta=0.0),
        "we first use GPT-4o as an annotator": dict(model="runs/stage0_sft"),
        # 3.2, 4.1
        "a batch containing 255 rewards of 1 and 1 reward of 0":
            dict(group_size=1, advantage="batch", scale_std=True),
        "within 3 standard deviations from the mean": dict(sigma=3.0),
        # 4.3, Table 1
        "the consistency reward is only taken into account when the result is correct":
            dict(reward="r1"),
        "<think>Your detailed comparative analysis</think><answer>1/2</answer>": dict(style="r1")},
    ("basereward", "basereward", bt_reward): {
        # 4.1, and 3.3 on the length
        "It employs *Qwen2.5-VL-7B* as the backbone": dict(model=QWEN),
        "The two MLP layers utilize the SiLU activation function":
            dict(head_layers=2, head_activation="silu"),
        "We do not use any auxiliary losses": dict(zero_coefficient=0.0),
        "the inclusion of length normalization alone": dict(length_norm=False),
        "with the final choice of 3e-6": dict(lr=3e-6),
        "The batch size is set to 128": dict(batch_size=128)},
    ("dt2it", "dt2it_mrm", bt_reward): {
        # 4.3
        "namely Qwen3-VL-8B-Instruct (the default backbone)":
            dict(model="Qwen/Qwen3-VL-8B-Instruct"),
        "with a linear layer serving as the reward head": dict(head_layers=1),
        "without any auxiliary losses": dict(zero_coefficient=0.0, length_norm=False),
        "finally select 1e — 5": dict(lr=1e-5),
        "trained for one epoch with a batch size of 512": dict(epochs=1, batch_size=512),
        # "5182" is 518 squared
        "a maximum image resolution of 5182": dict(max_pixels=268_324)}}
OF_PAPER["dt2it", "dt2it_mrm", dt2it] = OF_PAPER["dt2it", "dt2it_mrm", bt_reward]


def shown(part):
    """How a test's name shows a script, a text or some flags."""
    if inspect.ismodule(part):
        return part.__name__
    return part if isinstance(part, str) else " ".join(part)


def resolved(monkeypatch, script, *args):
    """The configuration that a script's command line gives."""
    needed = CURATE if script is dt2it else ()
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *needed, *args])
    return common.parse_config(script.Config, script.__doc__, script.PRESETS)


def refusal(monkeypatch, capsys, script, *args):
    """The line that a refused command line ends with."""
    with pytest.raises(SystemExit) as stopped:
        resolved(monkeypatch, script, *args)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("preset, paper, script", OF_PAPER, ids=shown)
def test_a_preset_is_what_the_paper_says(monkeypatch, preset, paper, script):
    # kills: MSRL's rate or InternVL for BaseReward and DT2IT, a head that is not the paper's, SFT's
    # 3 epochs for R1-Reward, GRPO's groups and KL in its RL, one update per rollout
    cfg = asdict(resolved(monkeypatch, script, "--preset", preset))
    for words, knobs in OF_PAPER[preset, paper, script].items():
        assert knobs == {name: cfg[name] for name in knobs}, words


@pytest.mark.skipif(not PAPERS.exists(), reason="the papers are not part of the project")
@pytest.mark.parametrize("paper", {paper for _, paper, _ in OF_PAPER})
def test_the_papers_words_are_the_papers(paper):
    # kills: a number of this table that was misread
    printed = (PAPERS / f"{paper}.txt").read_text("utf-8").replace("-\n", "")
    printed = " ".join(printed.replace("$", "").split())
    for key, said in OF_PAPER.items():
        for words in said:
            assert key[1] != paper or words in printed, words


def test_every_preset_is_checked():
    assert {(preset, script) for preset, _, script in OF_PAPER} == {
        (preset, script) for script in SCRIPTS for preset in script.PRESETS}


@pytest.mark.parametrize("script", SCRIPTS, ids=shown)
def test_presets_name_knobs(monkeypatch, script):
    # A default for a flag that does not exist would be dropped in silence. kills: max_pixel=
    names = {field.name for field in fields(script.Config)}
    toy = resolved(monkeypatch, script)
    for defaults in script.PRESETS.values():
        if callable(defaults):
            defaults = defaults(toy)
        assert defaults.keys() <= names


def sets_of(data):
    return {re.sub(r":\d+$", "", source) for source in data.split(",")}


def test_basereward_trains_on_the_sets_that_can_be_had():
    # Tables 4, 5 and 8: three multimodal ones and four of text, of which "Others" is not listed.
    # kills: MMIF, SHP, Omni-Align or Ultra-All, which are gray; sizes that are not Table 4's
    data = bt_reward.BASEREWARD["data"]
    names = ("RLAIF-V", "MMPR-v1.2", "R1-Reward", "tulu-3", "olmo-2", "UltraFeedback")
    assert len(sets_of(data)) == len(names)
    for name in names:
        assert sum(name in source for source in sets_of(data)) == 1, name
    sizes = [int(size) for size in re.findall(r":(\d+)", data)]
    assert sizes == [2_000_000, 65_000, 63_000]


@pytest.mark.parametrize("file, command", [
    (stage0_sft.R1_SFT["data"], "eval.py --attempts"), (cmkd.PAPER["data"], "stage2_caption_grpo"),
    *zip(bt_reward.DT2IT["data"].split(","), ("dt2it.py --construct", "dt2it.py --curate"),
         strict=True)])
def test_a_presets_missing_file_names_its_maker(monkeypatch, tmp_path, file, command):
    # kills: toy rows recommended to who asked for a paper's
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        stage1.load_rows(file, None)
    message = str(stopped.value)
    assert message.startswith(file) and f"`python {command}" in message and "\n" not in message


# ------------------------------------------------------------------------------------ command lines
@pytest.mark.parametrize("script, preset", [(stage0_sft, "r1"), (stage3, "r1"), (dt2it, "dt2it"),
                                            (bt_reward, "basereward")], ids=shown)
def test_flags_win_over_presets(monkeypatch, script, preset):
    # kills: presets applied after the flags
    whole = asdict(resolved(monkeypatch, script, "--preset", preset))
    for args in (("--preset", preset, "--lr", "3e-4"), ("--lr", "3e-4", f"--preset={preset}")):
        assert asdict(resolved(monkeypatch, script, *args)) == {**whole, "lr": 3e-4}


@pytest.mark.parametrize("script", SCRIPTS, ids=shown)
def test_another_scripts_preset_is_refused_with_its_scripts(monkeypatch, capsys, script):
    # kills: a preset taken and not applied, a list of scripts that is not true
    for preset, text in common.PRESETS.items():
        having = {other.__name__ for other in SCRIPTS if preset in other.PRESETS}
        named = set(re.findall(r"(\w+)\.py", text))
        if "stages 0 to 3" in text:
            named |= {stage.__name__ for stage in STAGES}
        assert named == having
        if script.__name__ not in having:
            line = refusal(monkeypatch, capsys, script, "--preset", preset)
            assert f"--preset {preset} " in line and text in line
    line = refusal(monkeypatch, capsys, script, "--preset", "big")
    assert "big" in line and all(preset in line for preset in ("toy", *script.PRESETS))


def test_r1s_two_stages_run_one_after_the_other(tmp_path):
    # Each with its preset, on the toy world with a small batch. kills: R1-Reward's settings refused
    # together, a referee or a KL that is not the preset's, MSRL's tags in what stage 3 starts from
    small_world(tmp_path, sft=6, mm_rl=12)
    rows = lines(tmp_path / "mm_rl.jsonl")
    rows = [row for row in rows if row["task"] in UNDERSTANDING][:4]
    assert len(rows) == 4
    common.write_lines(tmp_path / "rl.jsonl", rows)
    run_here(stage0_sft.main, ["--preset", "r1", *flags(
        model=TESTS / "toy_backbone", data=tmp_path / "sft.jsonl", batch_size=3,
        out=tmp_path / "0")])
    assert len(lines(tmp_path / "0" / "metrics.jsonl")) == 6 // 3
    run_here(stage3.main, ["--preset", "r1", *flags(
        model=tmp_path / "0", data=tmp_path / "rl.jsonl", batch_size=4, mini_batch=2, max_steps=1,
        referee="rule", max_new_tokens=7, out=tmp_path / "3")])
    metrics, = lines(tmp_path / "3" / "metrics.jsonl")
    group, = lines(tmp_path / "3" / "rollouts.jsonl")
    assert "kl" not in metrics and group["rewards"].keys() == {
        "format", "accuracy", "task", "consistency"}
    assert len(group["answers"]) == 1 and "Response 1" in group["prompt"]


def test_help_says_whose_a_preset_is(monkeypatch, capsys):
    # kills: a --help that lists another script's
    for script in SCRIPTS:
        with pytest.raises(SystemExit):
            resolved(monkeypatch, script, "--help")
        text = "".join(capsys.readouterr().out.split())  # lines may end at a hyphen
        for preset, paper in common.PRESETS.items():
            said = f"{preset}:{paper}".replace(" ", "")
            assert (said in text) == (preset in script.PRESETS)


@pytest.mark.parametrize("script", SCRIPTS, ids=shown)
def test_mains_take_these_presets(monkeypatch, capsys, script):
    # kills: a main() that parses with other presets than this file does
    for preset in ("toy", *script.PRESETS):
        with pytest.raises(SystemExit) as stopped:
            run_here(script.main, ["--preset", preset, "--lr", "fast"])
        assert stopped.value.code == 2 and "fast" in capsys.readouterr().err
    assert "PRESETS" in inspect.getsource(script.main)


# --------------------------------------------------------------------------------------- --backbone
@pytest.mark.parametrize("script", [stage0_sft, bt_reward], ids=shown)
def test_backbones(monkeypatch, script):
    # MSRL 5.1 trains InternVL3.5; its scripts' MAX_PIXELS is 1003520, which Qwen-VL alone reads.
    # kills: a backbone that overrules --model, Qwen without a limit, other changes beside these
    paper = asdict(resolved(monkeypatch, script, "--preset", "paper"))
    assert paper["model"] == INTERNVL and paper["max_pixels"] == 0
    args = ("--preset", "paper", "--backbone")
    assert asdict(resolved(monkeypatch, script, *args, "internvl")) == paper
    qwen = {**paper, "model": QWEN, "max_pixels": 1_003_520}
    assert asdict(resolved(monkeypatch, script, *args, "qwen2_5_vl")) == qwen
    mine = ("--model", "mine", "--max_pixels", "7")
    assert asdict(resolved(monkeypatch, script, *args, "qwen2_5_vl", *mine)) == {
        **qwen, "model": "mine", "max_pixels": 7}


def test_a_backbone_of_the_label_baseline(monkeypatch):
    # kills: a backbone that only --target rationale knows
    cfg = resolved(monkeypatch, stage0_sft, "--target", "label", "--preset", "paper", "--backbone",
                   "qwen2_5_vl")
    assert (cfg.model, cfg.max_pixels, cfg.epochs, cfg.freeze_vision) == (QWEN, 1_003_520, 1, False)


@pytest.mark.parametrize("script, args", [
    (stage0_sft, ()), (bt_reward, ()), (stage0_sft, ("--preset", "toy")),
    (stage0_sft, ("--preset", "r1")), (bt_reward, ("--preset", "basereward")),
    (bt_reward, ("--preset", "dt2it")), (dt2it, ("--preset", "dt2it")),
    *[(stage, ("--preset", "paper")) for stage in STAGES[1:]]],
    ids=shown)
def test_a_backbone_elsewhere_is_refused(monkeypatch, capsys, script, args):
    # kills: a flag without effect; stages 1 to 3 starting anew, without what was learned before
    line = refusal(monkeypatch, capsys, script, *args, "--backbone", "qwen2_5_vl")
    for remedy in ("--preset paper", "stage0_sft.py", "bt_reward.py", "--model"):
        assert remedy in line


def test_a_backbone_is_one_of_two(monkeypatch, capsys):
    line = refusal(monkeypatch, capsys, stage0_sft, "--preset", "paper", "--backbone", "gemma")
    assert "internvl" in line and "qwen2_5_vl" in line
