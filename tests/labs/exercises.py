"""
What the labs ask: for each function its cases, its answer to one of them, the bank of wrong
versions that it may turn out to be, and the oracles of the tests. Cases are the tests' own, and
more drawn with the seed.
"""

import functools
import random
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_bt
import test_dt2it
import test_eval
import test_grpo
import test_judging
import test_rewards
import test_stages
import torch
import wrong_versions
from diagnosis import Part
from helpers import text_row, thinks

import bt_reward
import common
import dt2it
import eval as evaluation
import stage0_sft
import stage1_text_grpo as stage1
import stage2_caption_grpo as stage2
import stage2b_cmkd as cmkd

STAGE_1 = "stage1_text_grpo.py"


@functools.cache
def world():
    """The untrained models of test_grpo.py, made once; their folder goes with the process."""
    folder = tempfile.TemporaryDirectory()
    made = test_grpo.untrained_world(Path(folder.name))
    made.held = folder
    return made


def holds(check, *args):
    """Does this check of the tests pass?"""
    try:
        check(*args)
    except AssertionError:
        return False
    return True


# ----------------------------------------------------------------------------------- 1: the parser
FORM = ["<think>", "because", "</think>", "\n", "<answer>", "A", "</answer>"]
MORE = ["<think>", "</think>", "<answer>", "</answer>", "A", "B", " or ", "<type>", "</type>"]
WITH_TAGS = [  # captions and types, which the bank has no version of
    "<caption>a ring</caption><think>x</think><answer>A</answer>",
    "<caption> </caption><think>x</think><answer>A</answer>",
    "<think>x</think><caption>a ring</caption><answer>A</answer>",
    "<think><type>Image_Understanding.</type>x</think><answer>A</answer>",
    "<think><type>image understanding</type><type>text</type>x</think><answer>A</answer>",
    "<type>image understanding</type><think>x</think><answer>B</answer>",
    "<think><type>image understanding</type></think><answer>A</answer>",
]


def attacks(seed, n=60):
    """Answers that are nearly well-formed: one to three pieces taken out, doubled or put in."""
    rng = random.Random(f"attack {seed}")
    texts = []
    for _ in range(n):
        pieces = list(FORM)
        pieces[5] = rng.choice("AB")
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(pieces))
            pieces[at:at + 1] = rng.choice([[], [pieces[at]] * 2, [pieces[at], rng.choice(MORE)]])
        texts.append("".join(pieces))
    return texts


def parser_cases(seed):
    texts = [text for text, *_ in test_rewards.PARSED]
    texts += [*test_rewards.GUESSED_WHILE_THINKING, test_rewards.ANSWERED_FIRST, *attacks(seed)]
    cases = {repr(text): ("form", text, "msrl") for text in texts}
    for name, text in test_rewards.EXPLOITS.items():
        cases[f"the attack '{name}'"] = ("form", text, "msrl")
    for text in WITH_TAGS:
        cases[f"caption and type of {text!r}"] = ("tags", text, "msrl")
    for text in ("<think>x</think><answer>2</answer>", "<think>x</think><answer>A</answer>"):
        cases[f"{text!r} in style r1"] = ("tags", text, "r1")
    return cases


def parsed(parse, case):
    kind, text, style = case
    answer = parse(text, style)
    if kind == "form":
        return answer.verdict, answer.well_formed
    return answer.verdict, answer.well_formed, answer.captioned, answer.type


# -------------------------------------------------------------------------------- 2: fine-tuning
def random_prompts(g, lengths=(4, 7, 2), vocabulary=11):
    ids = [torch.randint(vocabulary, (n,), generator=g).tolist() for n in lengths]
    return [common.Prompt(prompt, None) for prompt in ids]


def sft_cases(seed):
    """Prompts and answers of unequal lengths; token 3 ends an answer, and pads in one case."""
    cases = {}
    for number in (1, seed):
        g = torch.Generator().manual_seed(number)
        prompts = random_prompts(g)
        answers = [torch.randint(4, 11, (n,), generator=g).tolist() + [3] for n in (3, 1, 5)]
        for pad_id in (0, 3, 9):
            cases[f"padding token {pad_id}, seed {number}"] = prompts, answers, pad_id
    return cases


def collated(collate, case):
    """What counts of a batch: nothing of the padding, and no label of a row's first token, which
    nothing predicts."""
    ids, mask, positions, labels, media = collate(*case, "cpu")
    labels = labels.clone()
    labels[:, 0] = -100
    return labels, mask, ids * mask, positions * mask, len(media)


def nll_cases(seed):
    cases = {}
    for label, (prompts, answers, pad_id) in sft_cases(seed).items():
        g = torch.Generator().manual_seed(seed + len(cases))
        batch = stage0_sft.collate(prompts, answers, pad_id, "cpu")
        logits = torch.randn(*batch[0].shape, 11, generator=g, dtype=torch.float64)
        cases[label] = logits, batch
    return cases


def negative_log_likelihood(answer_nll, case):
    """-> nll, its tokens, and the gradient at the logits that a model is made to give."""
    logits, batch = case
    logits.requires_grad_()

    def model(logits_to_keep=0, **inputs):
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])
    nll, tokens = answer_nll(model, *batch)
    gradient, = torch.autograd.grad(nll, logits)
    return nll.item(), float(tokens), gradient


# --------------------------------------------------------------------------------- 3: advantages
def advantage_cases(seed):
    cases = {}
    for number in (1, 100 + seed):
        for case in test_grpo.advantage_cases(number):
            _, _, kind, scale_std, sigma = case
            cases[f"{kind}, scale_std {scale_std}, sigma {sigma}, rewards {number}"] = case
    return cases


def advantage_oracle(advantages):
    test_grpo.check_advantages(advantages)
    test_grpo.check_equal_rewards(advantages)
    test_grpo.check_outlier(advantages)


# -------------------------------------------------------------------------------------- 4: the loss
def loss_cases(seed):
    cases = {}
    for number in (4, 100 + seed):
        for n, case in enumerate(test_grpo.loss_cases(number)):
            *_, low, high, pre_clip, beta = case
            label = f"clip {low} {high}, pre-clip {pre_clip}, beta {beta}, tokens {number}.{n}"
            cases[label] = "loss", case
            cases[f"shares for the log, {label}"] = "shares", case
        policy, reference, older = test_grpo.three_policies(number)
        for kind in ("k1", "k2", "k3"):
            for old in (policy, older):
                whose = "this policy" if old is policy else "an older policy"
                cases[f"{kind} over tokens of {whose}, {number}"] = (
                    "divergence", (kind, policy, reference, old))
    return cases


def loss_values(loss, case):
    """Value and gradient of the loss; the shares for the log; or, over every token once, mean and
    gradient of a divergence."""
    kind, inputs = case
    if kind == "divergence":
        return test_grpo.expected_penalty(loss, *inputs)
    logp, *others = inputs
    logp.requires_grad_()
    value, stats = loss(logp, *others)
    if kind == "shares":
        names = ["clip_ratio/low_mean", "clip_ratio/high_mean", "pre_clip_ratio"]
        return tuple(stats[name] for name in names)
    gradient, = torch.autograd.grad(value, logp)
    return value.item(), gradient


def loss_oracle(loss):
    test_grpo.check_loss(loss)
    test_grpo.check_logged_shares(loss)
    assert test_grpo.right_kl(loss), "k3 is not the exact sum's"
    test_grpo.check_kl_penalties(loss)


# ------------------------------------------------------------------------------------- 5: sampling
HOT = 0.7


def sampler_cases(seed):
    return {"first tokens against the softmax": ("first", seed),
            "log-probs against one forward": ("scored", seed),
            "a model that loves the image token": ("image", seed),
            "where answers end": ("ends", seed), "two runs with one seed": ("seed", seed)}


def sampler_answer(sample_group, case):
    """What is true of a sampler, in words: two right ones draw other tokens."""
    kind, seed = case
    if kind == "image":
        return holds(test_grpo.check_no_image, sample_group, world())
    if kind == "seed":
        return holds(test_grpo.check_seed, sample_group, world())
    return {"first": first_tokens, "scored": scored_as, "ends": ends}[kind](sample_group, seed)


def first_tokens(sample_group, seed, n=1500):
    """For each prompt the distribution that its first tokens fit best."""
    prompts, encoder = world().prompts["text"], world().encoder
    rollout = sample_group(world().model, encoder, prompts, n, HOT, 1,
                           torch.Generator().manual_seed(10 + seed))
    logits = [first_logits(prompt) for prompt in prompts]
    best = []
    for i, ids in enumerate(rollout.ids):
        ten = wrong_versions.likeliest(logits[i][None] / HOT)[0]
        could_be = {"softmax at the temperature": logits[i] / HOT,
                    "softmax without it": logits[i],
                    "softmax with the temperature twice": logits[i] / HOT ** 2,
                    "the ten likeliest": ten, "the next prompt's": logits[(i + 1) % 3] / HOT,
                    "the prompt before's": logits[i - 1] / HOT}
        tokens = [answer[0] for answer in ids]
        far = {}
        for name, values in could_be.items():
            p = values.softmax(0).clamp(min=1e-9)
            far[name] = test_grpo.chi_square(tokens, p / p.sum())
        best.append(min(far, key=far.get))
    return best


@torch.no_grad()
def first_logits(prompt):
    logits = world().model(input_ids=torch.tensor([prompt.ids])).logits[0, -1].double()
    logits[world().encoder.image_token_id] = -1e9
    return logits


@torch.no_grad()
def scored_as(sample_group, seed):
    """At which temperature are the log-probs that come with the tokens those of the model?"""
    prompts, encoder = world().prompts["mixed"], test_grpo.often_ending(world().encoder)
    rollout = sample_group(world().model, encoder, prompts, test_grpo.G, HOT, 10,
                           torch.Generator().manual_seed(20 + seed))
    given = torch.tensor([x for group in rollout.logp for logp in group for x in logp])
    for name, temperature in (("at the temperature", HOT), ("without it", 1.0),
                              ("with it twice", HOT ** 2)):
        logps = [test_grpo.alone(world().model, encoder, prompt, answer, temperature)[0]
                 for prompt, answer in test_grpo.pairs_of(prompts, rollout.ids)]
        if torch.allclose(torch.cat(logps).float(), given, atol=1e-3):
            return name
    return "at no temperature: positions, masks or cache?"


def ends(sample_group, seed):
    """(answers keep their end-of-sequence token, nothing comes after it, one log-prob a token)"""
    encoder, n = test_grpo.often_ending(world().encoder), 6
    rollout = sample_group(world().model, encoder, world().prompts["text"], 20, 1.0, n,
                           torch.Generator().manual_seed(30 + seed))
    answers = test_grpo.flat(rollout.ids)
    kept = all(ids[-1] in encoder.eos_ids for ids in answers if len(ids) < n)
    nothing_after = all(token not in encoder.eos_ids for ids in answers for token in ids[:-1])
    lengths = [len(logp) for logp in test_grpo.flat(rollout.logp)]
    return kept, nothing_after, lengths == [len(ids) for ids in answers]


# -------------------------------------------------------------------------------------- 6: packing
def packing_cases(seed):
    return {f"{kind}, answers {number}": (kind, number)
            for kind in ("mixed", "two images") for number in (0, 100 + seed)}


@torch.no_grad()
def log_probs(pack, case):
    """Log-probs of all answers' tokens through the packed forward; or, in words, that a source is
    larger than there are places."""
    kind, seed = case
    prompts = world().prompts[kind]
    answers = test_grpo.make_answers(world().encoder, len(prompts), seed)
    _, _, _, source, target, owner, _ = pack(prompts, answers, world().encoder.pad_id, "cpu")
    largest, room = source[owner > 0].max().item(), target.shape[1]
    if largest > room:
        return f"a source of {largest}, where {room} is the last place"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage1, "pack", pack)
        logp, _, owner = stage1.packed_logps(world().model, world().encoder, prompts, answers, HOT)
    return torch.cat(test_grpo.unpack(logp, owner))


def packing_oracle(pack):
    test_grpo.check_packing_of_the_docstring(pack)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage1, "pack", pack)
        for kind in ("mixed", "video"):
            errors = test_grpo.packed_error(world(), world().model, world().encoder,
                                            world().prompts[kind])
            assert max(errors[:2]) < 1e-4 and errors[2] < 5e-5, "not what one by one gives"


# -------------------------------------------------------------------------------------- 7: replay
def mixing_cases(seed):
    """Ratio, batch, mini-batch, seed of the run."""
    cases = {}
    for ratio, size, _ in test_stages.SHARES:
        cases[f"ratio {ratio}, batch {size}"] = ratio, size, 0, 0
    for ratio, size, mini in (("5:1", 24, 6), ("5:1", 24, 12), ("2:1", 30, 10), ("1:1", 16, 4)):
        cases[f"ratio {ratio}, batch {size}, mini-batches of {mini}"] = ratio, size, mini, seed
    return cases


def mixture(mixed_batch, case):
    """-> texts in each mini-batch of nine batches, different captions and texts in all of them"""
    ratio, size, mini, seed = case
    cfg = stage2.Config(replay_ratio=ratio, batch_size=size, mini_batch=mini, seed=seed)
    rows = [text_row(id=f"caption{i}") for i in range(31)]
    replay = [text_row(id=f"text{i}") for i in range(19)]
    counts, seen = [], set()
    for step in range(9):
        ids = [row["id"] for row in mixed_batch(rows, replay, step, cfg)]
        for first in range(0, len(ids), mini or size):
            counts.append(sum(name[:4] == "text" for name in ids[first:first + (mini or size)]))
        seen |= set(ids)
    texts = sum(name[:4] == "text" for name in seen)
    return counts, len(seen) - texts, texts


def choice_cases(seed):
    """Verdicts in both orders: one row of each kind, and many by chance; and how many candidates
    are wanted of the 40 rows there are."""
    named = ["right", "wrong", None]
    cases = {f"the judge is {one} in AB, {other} in BA; right in both in the next row":
             ([(one, other), ("right", "right")], 36) for one in named for other in named}
    rng = random.Random(seed)
    by_chance = [(rng.choice(named), rng.choice(named)) for _ in range(30)]
    cases["verdicts by chance"] = by_chance, 36
    cases["50 candidates wanted, 40 rows there"] = by_chance, 50
    cases["no row is good"] = [("wrong", "right")], 36
    return cases


def stopped(error):
    """A SystemExit in words: not every error will do, nor one that does not say why."""
    return f"SystemExit {'with a' if isinstance(error.code, str) else 'without a'} line"


def chosen(choose_replay, case):
    """-> ids of the chosen rows, in the order of their numbers; or, in words, how it stops"""
    verdicts, candidates = case
    texts = [text_row(id=f"{i:02}", label="ABB"[i % 3]) for i in range(40)]

    def judge(model, encoder, rows, *args, **kwargs):
        return test_stages.verdicts_of(rows, verdicts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "judge", judge)
        cfg = stage2.Config(replay_candidates=candidates)
        try:
            return sorted(row["id"] for row in choose_replay(None, None, texts, cfg))
        except SystemExit as error:
            return stopped(error)


# ------------------------------------------------------------------------------- 8: distillation
def selection_cases(seed):
    cases = {}
    for n, (texts, confidences, _) in enumerate(test_stages.SELECTED):
        cases[f"by hand, {n}"] = texts, confidences
    rng = random.Random(seed)
    answers = [thinks("A"), thinks("B"), test_stages.malformed("A"), test_stages.malformed("B"),
               "no verdict"]
    for n in range(40):
        texts = rng.choices(answers, [4, 3, 2, 2, 1], k=rng.randint(1, 8))
        # log-probs, none of them twice
        cases[f"by chance, {n}"] = texts, [-(k + 1) / 8 for k in rng.sample(range(20), len(texts))]
    return cases


# ------------------------------------------------------------------------------ 9: Bradley-Terry
def bt_cases(seed):
    cases = {}
    for number in (1, 100 + seed):
        for coefficient in (0.0, 0.07):
            g = torch.Generator().manual_seed(number)
            chosen, rejected = 3 * torch.randn(2, 7, generator=g, dtype=torch.float64)
            cases[f"coefficient {coefficient}, scores {number}"] = chosen, rejected, coefficient
    # Numbers without rounding errors, so that each safe way to write it gives the same.
    chosen, rejected = torch.tensor([[-100.0, -200.0, -64.0], [0.0, 0.0, 136.0]])
    for coefficient in (0.0, 0.25):
        label = f"fp32, coefficient {coefficient}, differences of -100 and -200"
        cases[label] = chosen, rejected, coefficient
    return cases


def bt_values(bt_loss, case):
    """-> loss and its gradients"""
    chosen, rejected, coefficient = case
    scores = chosen.requires_grad_(), rejected.requires_grad_()
    loss = bt_loss(*scores, coefficient)
    return loss, *torch.autograd.grad(loss.sum(), scores)


def balance_cases(seed):
    """Rows whose better response is longer in 3 of 4; length and number of words disagree."""
    cases = {}
    for number in (1, 100 + seed):
        rng = random.Random(number)
        rows = [text_row(id="media", responses=None)]
        for i in range(60):
            texts = ["x" * rng.randint(3, 6), "a b " + "y" * rng.randint(0, 4)]
            if rng.random() < 0.75:
                texts = ["longer-" + texts[0], texts[1]]
            label = rng.choice("AB")
            rows.append(text_row(id=str(i), responses=texts if label == "A" else texts[::-1],
                                 label=label))
        cases[f"61 rows, {number}"] = rows
    for name, text in (("longer", "a longer text"), ("shorter", "")):
        cases[f"better is {name} in all rows"] = [
            text_row(id=str(i), responses=[text, "x y"], label="A") for i in range(5)]
    return cases


def kept_by_length(balanced, rows):
    """-> rows kept whose better response is longer, shorter, as long; different rows; whether
    another seed keeps as many; and in words which rows each seed keeps. Or, in words, how it
    stops."""
    try:
        kept = balanced(rows, 0)
    except SystemExit as error:
        return stopped(error)
    others, again = balanced(rows, 1), balanced(rows, 0)
    extra = [bt_reward.extra_length(row) for row in kept]
    ids, other_ids, same_ids = ({row["id"] for row in some} for some in (kept, others, again))
    return (sum(x > 0 for x in extra), sum(x < 0 for x in extra), sum(x == 0 for x in extra),
            len(ids), len(others) == len(kept),
            "two seeds keep " + ("the same rows" if ids == other_ids else "different rows"),
            "one seed keeps " + ("the same rows" if ids == same_ids else "different rows"))


def flip_cases(seed):
    rng = random.Random(seed)
    cases = {f"strengths {strengths}": strengths for strengths, _ in test_dt2it.STRENGTHS}
    for n in range(20):
        strengths = [rng.uniform(-2, 3) for _ in range(rng.randint(1, 15))]
        cases[f"strengths by chance, {n}"] = strengths
    return cases


# --------------------------------------------------------------------------------- 10: evaluation
FIGURES = ("accuracy", "interval", "n", "order_flips", "share_a", "unparsable", "format")


def judgement_cases(seed):
    """Rows judged in both orders, or in one, with one to four votes each."""
    cases = {}
    for number in range(4):
        rng = random.Random(f"{seed} {number}")
        rows = [{"label": rng.choice("AB")} for _ in range(9)]
        preds = []
        for place in range(len(rows)):
            for order in rng.choice([("AB", "BA"), ("AB", "BA"), ("AB",)]):
                for sample in range(1 if number == 0 else rng.randint(1, 4)):
                    verdict = rng.choice(["A", "A", "B", "B", None])
                    preds.append(test_judging.pred(place, order, verdict, sample))
        for figure in FIGURES:
            cases[f"{figure} of judge {number}"] = rows, preds, figure
    return cases


def figure_of(summarize, case):
    rows, preds, figure = case
    return summarize(rows, preds)[figure]


def comparison_cases(seed):
    """Two judges on questions of one, three or some rows; equal weights, or not, and then some
    are 0, all of question 5 among them."""
    cases = {}
    for number, size in enumerate((1, 3, 3, 0)):
        rng = random.Random(f"{seed} {number}")
        first, second = [], []
        for question in range(12):
            luck = rng.choice([0.2, 0.9])
            for _ in range(size or rng.randint(1, 4)):
                weight = 1.0 if number < 2 else rng.choice([0.0, 0.5, 1.0, 2.0])
                if number > 1 and question == 5:
                    weight = 0.0
                for rows, chance in ((first, luck), (second, 0.4)):
                    rows.append({"weight": weight, "cluster": question,
                                 "points": float(rng.random() < chance)})
        for figure in ("difference", "interval", "sign_test_p", "first_better", "n", "questions"):
            cases[f"{figure} of pair {number}"] = first, second, figure
    return cases


def compared(compare, case):
    first, second, figure = case
    return compare(first, second)[figure]


# ----------------------------------------------------------------------------------- all of them
def with_world(check):
    """A check of the tests that takes the world, as one that does not."""
    return lambda function: check(function, world())


PARTS = {
    1: [Part("parse", "common.py", common.parse, wrong_versions.parser(), wrong_versions.PARSERS,
             parser_cases, parsed, test_rewards.check_all_texts)],
    2: [Part("collate", "stage0_sft.py", stage0_sft.collate, wrong_versions.collate,
             wrong_versions.SFT_MASKS, sft_cases, collated, with_world(test_grpo.check_sft_masks)),
        Part("answer_nll", "stage0_sft.py", stage0_sft.answer_nll, wrong_versions.answer_nll,
             wrong_versions.SFT_LOSSES, nll_cases, negative_log_likelihood,
             with_world(test_grpo.check_sft_nll), tolerance=1e-5)],
    3: [Part("advantages", STAGE_1, stage1.advantages, wrong_versions.advantages,
             wrong_versions.ADVANTAGES, advantage_cases, lambda function, case: function(*case),
             advantage_oracle)],
    4: [Part("grpo_loss", STAGE_1, stage1.grpo_loss, wrong_versions.loss,
             wrong_versions.LOSSES | {f"{name} (k1, k2)": version for name, version
                                      in wrong_versions.KL_PENALTIES.items()},
             loss_cases, loss_values, loss_oracle)],
    5: [Part("sample_group", STAGE_1, stage1.sample_group, wrong_versions.sample_group,
             wrong_versions.SAMPLERS, sampler_cases, sampler_answer,
             with_world(test_grpo.check_sampler))],
    6: [Part("pack", STAGE_1, stage1.pack, wrong_versions.pack,
             wrong_versions.PACKINGS | {"source counts places of the whole sequence":
                                        wrong_versions.source_of_the_sequence},
             packing_cases, log_probs, packing_oracle, tolerance=1e-3)],
    7: [Part("mixed_batch", "stage2_caption_grpo.py", stage2.mixed_batch,
             wrong_versions.mixed_batch, wrong_versions.REPLAYS, mixing_cases, mixture,
             test_stages.check_replay),
        Part("choose_replay", "stage2_caption_grpo.py", stage2.choose_replay,
             wrong_versions.choose_replay, wrong_versions.REPLAYED, choice_cases, chosen,
             test_stages.check_replayed)],
    8: [Part("select", "stage2b_cmkd.py", cmkd.select, wrong_versions.select,
             wrong_versions.SELECTION, selection_cases, lambda function, case: function(*case),
             test_stages.check_every_selection)],
    9: [Part("bt_loss", "bt_reward.py", bt_reward.bt_loss, wrong_versions.bt_loss,
             wrong_versions.BT_LOSSES, bt_cases, bt_values, test_bt.check_loss),
        Part("balanced", "bt_reward.py", bt_reward.balanced, wrong_versions.balanced,
             wrong_versions.BALANCES, balance_cases, kept_by_length, test_bt.check_balance),
        Part("to_flip", "dt2it.py", dt2it.to_flip, wrong_versions.to_flip, wrong_versions.FLIPS,
             flip_cases, lambda function, case: function(case), test_dt2it.check_flips)],
    10: [Part("summarize", "common.py", common.summarize, wrong_versions.summarize,
              wrong_versions.EVALUATIONS, judgement_cases, figure_of, test_judging.check_summary),
         Part("compare", "eval.py", evaluation.compare, wrong_versions.compare,
              wrong_versions.COMPARISONS, comparison_cases, compared,
              test_eval.check_comparison)],
}
