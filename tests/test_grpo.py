"""
Oracles for the GRPO block: its mathematics, its packed forward, its sampling and its update; and
for the loss of stage 0.

An oracle is the plainest way to the same number: Python loops in float64, one sequence at a time
without padding, transformers' own generate(). Every test was seen to fail on wrong code: either
wrong_versions.py has such versions, or "kills:" names edits of the source that it caught.
"""

import copy
import itertools
import math
from types import SimpleNamespace

import pytest
import toy_world
import torch
import wrong_versions
from helpers import check_recorded, rejects, small_world, text_only_model
from transformers import cache_utils

import common
import decoding
from data import load_rows
import stage0_sft
import stage1_text_grpo as stage1

B, G, T, V = 3, 5, 7, 11  # sizes that no mixed-up axis can fit by accident
OFF = math.inf            # max_grad_norm that never clips
# tokens of each of G answers to each of B prompts; with an answer of one token, and unequal sums
LENGTHS = [[4, 1, 6, 2, 3], [5, 2, 1, 7, 3], [2, 8, 3, 1, 4]]


# ------------------------------------------------------------------------------- an untrained world
@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return untrained_world(tmp_path_factory.mktemp("world"))


def untrained_world(folder):
    """Models, encoders and prompts. The weights are 20 times the usual size, so that distributions
    are far from uniform, and a wrong mask, position or image moves log-probs by tenths or more."""
    small_world(folder, sft=6, text_rl=6, caption_rl=4, mm_rl=4)
    tok = toy_world.make_tokenizer()
    torch.manual_seed(0)
    model, images = toy_world.make_model(tok, hidden=32, layers=2)
    enlarge(model)
    toy_world.save_backbone(model, tok, images, folder / "backbone")
    plain = text_only_model(tok, tie_word_embeddings=True)
    enlarge(plain)
    plain.save_pretrained(folder / "text_only")
    tok.save_pretrained(folder / "text_only")
    model, encoder = common.load(folder / "backbone")
    text_model, text_encoder = common.load(folder / "text_only")
    rows = load_rows(str(folder / "text_rl.jsonl"), encoder, quiet=True)
    seen = load_rows(str(folder / "mm_rl.jsonl"), encoder, quiet=True)
    seen = {r["task"]: r for r in seen}
    text = [encoder(r) for r in sorted(rows, key=lambda r: r["tokens"])]
    image, two_images = encoder(seen["image_understanding"]), encoder(seen["image_generation"])
    videos = [encoder(seen["video_understanding"]), encoder(seen["video_generation"])]
    prompts = {"text": [text[0], text[2], text[5]], "one image": [image],
               "two images": [two_images], "video": videos,
               "mixed": [two_images, text[0], image]}
    return SimpleNamespace(folder=folder, model=model, encoder=encoder, prompts=prompts, seen=seen,
                           text_model=text_model, text_encoder=text_encoder)


@torch.no_grad()
def enlarge(model):
    for p in model.parameters():
        if p.dim() > 1:
            p.mul_(20)


def make_answers(encoder, n, seed=0):
    """n prompts' G answers of LENGTHS random tokens. All end with an EOS but one, which was cut."""
    g = torch.Generator().manual_seed(seed)
    free = [i for i in range(len(encoder.tokenizer))
            if i not in encoder.eos_ids and i != encoder.image_token_id]
    out = []
    for lengths in LENGTHS[:n]:
        group = []
        for length in lengths:
            places = torch.randint(len(free), (length - 1,), generator=g)
            end = encoder.eos_ids[length % len(encoder.eos_ids)]
            group.append([free[place] for place in places] + [end])
        out.append(group)
    out[0][2][-1] = free[5]
    return out


def flat_gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()


def distance(x, y):
    """Relative distance of two vectors."""
    return ((x - y).norm() / y.norm()).item()


# --------------------------------------------------------------------------------------- advantages
def advantages_by_loop(rewards, every_reward, kind, scale_std, sigma):
    adv, keep = [], []
    for group in rewards.tolist():
        base = group if kind == "group" else [r for g in every_reward.tolist() for r in g]
        mean = sum(base) / len(base)
        std = math.sqrt(sum((r - mean) ** 2 for r in base) / len(base))
        equal = all(r == base[0] for r in base)
        z = [0.0 if equal else (r - mean) / std for r in group]
        adv.append([x if scale_std else x * (0.0 if equal else std) for x in z])
        keep.append([sigma <= 0 or abs(x) <= sigma for x in z])
    return torch.tensor(adv, dtype=torch.float64), torch.tensor(keep)


def advantage_cases(seed=1):
    """B = 3 of 6 groups of this process; one group of ours has no spread, one answer is far out."""
    g = torch.Generator().manual_seed(seed)
    every = torch.randint(0, 3, (2 * B, G), generator=g).double() + 0.1
    every[1] = 1.1
    every[2, 3] = 9.0
    return [(every[:B], every, kind, scale, sigma) for kind in ("group", "batch")
            for scale in (True, False) for sigma in (0.0, 1.2, 3.0)]


def same_advantages(got, want):
    return torch.allclose(got[0], want[0], rtol=0, atol=1e-12) and torch.equal(got[1], want[1])


def check_advantages(advantages):
    for case in advantage_cases():
        assert same_advantages(advantages(*case), advantages_by_loop(*case))


def test_advantages_equal_a_loop():
    check_advantages(stage1.advantages)


def test_the_frame_of_the_wrong_advantages_is_right():
    check_advantages(wrong_versions.advantages)


@pytest.mark.parametrize("name", wrong_versions.ADVANTAGES)
def test_the_loop_rejects_wrong_advantages(name):
    rejects(check_advantages, wrong_versions.ADVANTAGES[name])


def check_equal_rewards(advantages):
    # The mean of G equal floats is often not that float; the rest over a std of 1e-17 is about 1.
    # kills: no test for spread, std + 1e-8 in its place
    value, naive = 0.1 + 0.2, []
    for n in range(2, 14):
        rewards = torch.full((B, n), value, dtype=torch.float64)
        naive.append((rewards - rewards.mean(1, keepdim=True)).abs().max().item())
        for kind in ("group", "batch"):
            for scale in (True, False):
                adv, keep = advantages(rewards, rewards, kind, scale, 3.0)
                assert (adv == 0).all() and keep.all()
    assert max(naive) > 0, "the case does not bite: no mean was rounded"


def test_equal_rewards_give_exactly_zero():
    check_equal_rewards(stage1.advantages)


def check_outlier(advantages):
    # R1-Reward 4.1: of 256 answers one is wrong. z = -15.97, and that answer only is left out.
    rewards = torch.ones(32, 8, dtype=torch.float64)
    rewards[5, 3] = 0.0
    adv, keep = advantages(rewards, rewards, "batch", True, 3.0)
    assert round(adv[5, 3].item(), 2) == -15.97
    assert (~keep).nonzero().tolist() == [[5, 3]]
    assert round(adv[0, 0].item(), 4) == 0.0626      # the others stay, and stay positive
    assert advantages(rewards, rewards, "batch", True, 0.0)[1].all()
    # the filter looks at z also when the advantage itself is not divided by the std
    assert (~advantages(rewards, rewards, "batch", False, 3.0)[1]).sum() == 1


def test_the_filter_takes_the_outlier_of_r1_reward():
    check_outlier(stage1.advantages)


def test_with_two_rewards_the_filter_is_a_cliff_at_a_tenth():
    # k of n answers are wrong, the rest right: z of a wrong one is -sqrt((n - k) / k), whatever the
    # two rewards are. So all of them go below n / 10, and above it none does.
    # kills: |z - mean of the rewards| <= 3, as R1-Reward's code has it; a filter on (r - mean)
    for k, out in ((1, True), (19, True), (20, False), (48, False)):
        rewards = torch.full((192, 1), 2.0, dtype=torch.float64)
        rewards[:k] = 0.5
        z, keep = stage1.advantages(rewards, rewards, "batch", True, 3.0)
        assert z[0].item() == pytest.approx(-math.sqrt((192 - k) / k))
        assert (keep[:k] != out).all() and keep[k:].all()
    # A third reward takes the place of the cliff: of 20 wrong answers and 4 without form, these 4
    rewards[:48] = 2.0
    rewards[:24] = 0.5
    rewards[:4] = 0.0
    _, keep = stage1.advantages(rewards, rewards, "batch", True, 3.0)
    assert (~keep).nonzero()[:, 0].tolist() == [0, 1, 2, 3]


def test_in_a_group_of_8_the_filter_cannot_act():
    # |z| <= sqrt(G-1) = 2.65 < 3, reached by one answer against seven. kills: correction=1, a
    # filter on (r - mean) instead of z
    g = torch.Generator().manual_seed(2)
    lonely = torch.zeros(1, 8, dtype=torch.float64)
    lonely[0, 6] = 40.0
    for rewards in [lonely] + [torch.randn(50, 8, generator=g).double() ** 5 for _ in range(9)]:
        adv, keep = stage1.advantages(rewards, rewards, "group", True, 3.0)
        assert adv.abs().max() <= math.sqrt(7) + 1e-9 and keep.all()
    z, _ = stage1.advantages(lonely, lonely, "group", True, 3.0)
    assert z.max() == pytest.approx(math.sqrt(7))


def test_from_11_answers_on_the_filter_takes_a_lonely_right_one():
    # What the help of --sigma says: sqrt(G-1) passes 3 between G = 10 and G = 11.
    for n, kept in ((9, True), (11, False)):
        for lonely in (0.0, 2.0):  # the one wrong answer, or the one right answer
            rewards = torch.full((1, n), 2.0 - lonely, dtype=torch.float64)
            rewards[0, 4] = lonely
            _, keep = stage1.advantages(rewards, rewards, "group", True, 3.0)
            assert keep[0, 4] == kept and keep.sum() >= n - 1


def test_one_answer_per_prompt_is_compared_with_the_batch():
    # R1-Reward's own setting. kills: group_size 1 refused; statistics over a group of one
    every = torch.tensor([[2.0], [0.5], [2.0], [0.5], [1.0]], dtype=torch.float64)
    case = every[:2], every, "batch", True, 3.0
    got = stage1.advantages(*case)
    assert same_advantages(got, advantages_by_loop(*case)) and got[0].abs().min() > 0.5
    stage1.Config(group_size=1, advantage="batch").check()
    for wrong in ({"group_size": 1}, {"group_size": 0, "advantage": "batch"},
                  {"group_size": 1, "advantage": "batch", "batch_size": 1}):
        with pytest.raises(ValueError, match="--group_size must be"):
            stage1.Config(**wrong).check()


@pytest.mark.parametrize("kind", ["group", "batch"])
def test_the_order_of_ranks_does_not_matter(kind):
    # kills: batch statistics of the first process, or of this process alone
    g = torch.Generator().manual_seed(3)
    ranks = [torch.rand(B, G, generator=g, dtype=torch.float64) for _ in range(3)]
    want = stage1.advantages(ranks[1], torch.cat(ranks), kind, True, 1.5)
    for order in ([2, 1, 0], [1, 0, 2]):
        got = stage1.advantages(ranks[1], torch.cat([ranks[i] for i in order]), kind, True, 1.5)
        assert same_advantages(got, want)
    local = stage1.advantages(ranks[1], ranks[1], kind, True, 1.5)
    assert same_advantages(local, want) == (kind == "group")


# --------------------------------------------------------------------------------------------- loss
def loss_by_loop(logp, old, ref, advantage, weight, clip_low, clip_high, pre_clip, beta):
    """-> loss, gradient wrt logp and clipped tokens [low, high, pre], by hand and by token."""
    total, gradient, counts = 0.0, torch.zeros_like(logp), [0, 0, 0]
    bound = math.log(pre_clip) if pre_clip > 0 else math.inf
    for i in range(logp.shape[0]):
        for t in range(logp.shape[1]):
            x, o, r, a, w = (float(z[i, t]) for z in (logp, old, ref, advantage, weight))
            inside = -bound <= x - o <= bound
            ratio = math.exp(min(max(x - o, -bound), bound))
            # the clip binds where going on would pay: above with a > 0, below with a < 0
            high, low = a > 0 and ratio > 1 + clip_high, a < 0 and ratio < 1 - clip_low
            used = 1 + clip_high if high else 1 - clip_low if low else ratio
            slope = 0.0 if high or low or not inside else -a * ratio
            term = -a * used
            if beta:
                term += beta * (math.exp(r - x) - (r - x) - 1)
                slope += beta * (1 - math.exp(r - x))
            total += w * term
            gradient[i, t] = w * slope
            counts[0] += low
            counts[1] += high
            counts[2] += not inside
    return total, gradient, counts


def loss_case(extreme=True, seed=4):
    g = torch.Generator().manual_seed(seed)
    steps = [0.0, 0.05, -0.05, 0.15, -0.15, 0.24, -0.24, 0.3, -0.3, 1.0, -1.0, 5.0, -5.0]
    steps += [8.0, -8.0, 100.0, -100.0] if extreme else []
    old, far, weight, advantage = torch.rand(4, B, T, generator=g, dtype=torch.float64)
    old = -3 * old - 0.1
    logp = old + torch.tensor([steps[i % len(steps)] for i in range(B * T)]).double().view(B, T)
    weight[1, 4:] = 0.0  # padding
    return logp, old, logp + 4 * far - 2, 2 * advantage - 1, weight


def loss_cases(seed=4):
    """Each step of the log-ratio once with a positive and once with a negative advantage."""
    for pre_clip in (1e3, 2.0, 0.0):
        logp, old, ref, advantage, weight = loss_case(pre_clip > 0, seed)
        for clip_low, clip_high in ((0.2, 0.2), (0.1, 0.28)):
            for beta in (0.0, 0.04):
                for sign in (1, -1):
                    yield (logp, old, ref, sign * advantage, weight, clip_low, clip_high, pre_clip,
                           beta)


def close_loss(loss, case):
    """Does this loss function agree with the loop, in value and in gradient?"""
    logp = case[0].clone().requires_grad_()
    value, _ = loss(logp, *case[1:])
    gradient, = torch.autograd.grad(value, logp)
    want, want_gradient, _ = loss_by_loop(*case)
    return math.isclose(value.item(), want, rel_tol=1e-9, abs_tol=1e-9) and torch.allclose(
        gradient, want_gradient, rtol=1e-9, atol=1e-12)


def check_loss(loss):
    for case in loss_cases():
        assert close_loss(loss, case)


def test_loss_and_gradient_equal_a_loop():
    check_loss(stage1.grpo_loss)


def test_the_frame_of_the_wrong_losses_is_right():
    check_loss(wrong_versions.loss)


@pytest.mark.parametrize("name", wrong_versions.LOSSES)
def test_the_loop_rejects_wrong_losses(name):
    rejects(check_loss, wrong_versions.LOSSES[name])


def check_logged_shares(loss):
    for case in loss_cases():
        stats = loss(*case)[1]
        got = [stats[n].sum().item() for n in ("clip_ratio/low_mean", "clip_ratio/high_mean",
                                               "pre_clip_ratio")]
        assert got == loss_by_loop(*case)[2]
        if case[-1]:
            d = case[2] - case[0]
            assert torch.allclose(stats["kl"], d.exp() - d - 1)


def test_logged_clip_shares_are_those_that_bind():
    # kills: clip_ratio counted whatever the sign of the advantage
    check_logged_shares(stage1.grpo_loss)


def test_pre_clip_is_finite_with_zero_gradient_outside():
    # exp(100) overflows in fp32: without the pre-clip the loss is inf and every weight becomes NaN
    old = torch.full((2, 3), -2.0)
    logp = (old + torch.tensor([[100.0, 0.1, -100.0], [-100.0, -0.1, 100.0]])).requires_grad_()
    outside = torch.tensor([[True, False, True], [True, False, True]])
    for advantage in (torch.ones(2, 3), -torch.ones(2, 3)):
        args = logp, old, None, advantage, torch.ones(2, 3), 0.2, 0.2
        loss, stats = stage1.grpo_loss(*args, 1e3, 0.0)
        gradient, = torch.autograd.grad(loss, logp)
        assert math.isfinite(loss.item()) and torch.isfinite(gradient).all()
        assert (gradient[outside] == 0).all() and (gradient[~outside] != 0).all()
        assert torch.equal(stats["pre_clip_ratio"], outside)
    assert not math.isfinite(stage1.grpo_loss(*args, 0.0, 0.0)[0].item())


def test_the_pre_clip_changes_two_of_four_corners():
    # Log-ratios of 8 and -8, A of 1 and -1. Where PPO's clip holds, (8, 1) and (-8, -1), there is
    # no gradient with or without the pre-clip. What it takes away is e^8 at (8, -1), which nothing
    # else bounds, and e^-8 at (-8, 1), next to nothing.
    # kills: clamped above only
    logp = torch.tensor([[8.0, -8.0, 8.0, -8.0]], requires_grad=True)
    advantage = torch.tensor([[1.0, -1.0, -1.0, 1.0]])
    rest = torch.zeros(1, 4), None, advantage, torch.ones(1, 4), 0.2, 0.2
    for pre_clip, want in ((0.0, [0.0, 0.0, math.exp(8), -math.exp(-8)]), (1e3, [0.0] * 4)):
        loss, _ = stage1.grpo_loss(logp, *rest, pre_clip, 0.0)
        gradient, = torch.autograd.grad(loss, logp)
        assert torch.allclose(gradient, torch.tensor([want]), rtol=1e-5, atol=0)


def test_an_outlier_of_the_reference_does_not_overflow_the_kl():
    # kills: the clamp of ref - logp taken away
    logp = torch.tensor([[-200.0, -1.0]], requires_grad=True)
    ref, none = torch.tensor([[-1.0, -200.0]]), torch.zeros(1, 2)
    loss, _ = stage1.grpo_loss(logp, logp.detach(), ref, none, torch.ones(1, 2), 0.2, 0.2, 1e3, 1.0)
    gradient, = torch.autograd.grad(loss, logp)
    assert math.isfinite(loss.item()) and torch.isfinite(gradient).all()


def kl_of_distributions(loss, p_logits, q_logits):
    """Expectation over p of the KL estimate (every token once, weighted by its probability), its
    gradient wrt p's logits with the weights held, and the smallest estimate of one token."""
    p_logits = p_logits.clone().requires_grad_()
    logp, ref = p_logits.log_softmax(-1)[None], q_logits.log_softmax(-1)[None]
    none = torch.zeros_like(logp)
    args = logp.detach(), ref, none
    value, _ = loss(logp, *args, logp.detach().exp(), 0.2, 0.2, 1e3, 1.0)
    gradient, = torch.autograd.grad(value, p_logits)
    each = [loss(logp.detach(), *args, row[None], 0.2, 0.2, 1e3, 1.0)[0].item()
            for row in torch.eye(V, dtype=torch.float64)]
    return value.item(), gradient, min(each)


def right_kl(loss):
    """k3 of samples from p: unbiased for KL(p||q), never negative, and as a loss it pulls p to q:
    its expected gradient is p - q, that of -sum q log p."""
    g = torch.Generator().manual_seed(5)
    p_logits, q_logits = 2 * torch.randn(2, V, generator=g, dtype=torch.float64)
    p, q = p_logits.softmax(0), q_logits.softmax(0)
    exact = sum(float(p[v]) * math.log(float(p[v] / q[v])) for v in range(V))
    assert exact > 1, "p and q are to be far from one another"
    value, gradient, least = kl_of_distributions(loss, p_logits, q_logits)
    return math.isclose(value, exact, rel_tol=1e-9) and least >= 0 and torch.allclose(
        gradient, p - q, rtol=0, atol=1e-12)


def test_k3_against_the_exact_sum():
    assert right_kl(stage1.grpo_loss)
    assert right_kl(wrong_versions.loss), "the frame of the wrong estimators is right"


@pytest.mark.parametrize("name", wrong_versions.KL_ESTIMATORS)
def test_the_exact_sum_rejects_other_estimators(name):
    # k1 has the right mean too; what gives it away is that it is negative and its gradient 0
    assert not right_kl(wrong_versions.KL_ESTIMATORS[name])


def exact_kl(p_logits, q_logits):
    """KL(p || q), its gradient wrt p's logits, and that of KL(q || p), by autograd on the sums."""
    x = p_logits.clone().requires_grad_()
    p, q = x.log_softmax(0), q_logits.log_softmax(0)
    value = (p.exp() * (p - q)).sum()
    gradient, = torch.autograd.grad(value, x, retain_graph=True)
    other, = torch.autograd.grad((q.exp() * (q - p)).sum(), x)
    return value.item(), gradient, other


def expected_penalty(loss, kind, p_logits, q_logits, old_logits):
    """Mean and gradient of the penalty over tokens drawn from `old`: every token once, weighted by
    its probability there. No advantage, so the KL is all there is."""
    x = p_logits.clone().requires_grad_()
    logp, ref, old = (z.log_softmax(0)[None] for z in (x, q_logits, old_logits))
    value, _ = loss(logp, old, ref, torch.zeros(1, V), old.exp(), 0.2, 0.2, 0.0, 1.0, kind)
    return value.item(), torch.autograd.grad(value, x)[0]


def three_policies(seed=15):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(3, V, generator=g, dtype=torch.float64)


def check_kl_penalties(loss):
    """k1 and k2 follow KL(policy || reference), whichever policy drew the tokens."""
    policy, reference, older = three_policies()
    value, gradient, _ = exact_kl(policy, reference)
    for kind in ("k1", "k2"):
        for old in (policy, older):
            mean, got = expected_penalty(loss, kind, policy, reference, old)
            assert torch.allclose(got, gradient, rtol=0, atol=1e-12)
            assert kind == "k2" or math.isclose(mean, value, rel_tol=1e-9)


def test_k1_and_k2_follow_the_exact_kl():
    check_kl_penalties(stage1.grpo_loss)


def test_the_frame_of_the_wrong_penalties_is_right():
    check_kl_penalties(wrong_versions.loss)


@pytest.mark.parametrize("name", wrong_versions.KL_PENALTIES)
def test_the_exact_kl_rejects_wrong_penalties(name):
    rejects(check_kl_penalties, wrong_versions.KL_PENALTIES[name])


def test_k3_has_the_mean_of_one_kl_and_the_gradient_of_the_other():
    # What kl_penalty's docstring says. kills: k3 made "right" in silence, with a ratio
    policy, reference, older = three_policies()
    value, gradient, other = exact_kl(policy, reference)
    mean, got = expected_penalty(stage1.grpo_loss, "k3", policy, reference, policy)
    assert math.isclose(mean, value, rel_tol=1e-9)
    assert torch.allclose(got, other, rtol=0, atol=1e-12)
    assert distance(got, gradient) > 0.3
    # tokens of an older policy, as from the second step on a rollout on: neither
    _, stale = expected_penalty(stage1.grpo_loss, "k3", policy, reference, older)
    assert distance(stale, gradient) > 0.3 and distance(stale, other) > 0.3


def test_loss_starts_at_zero_but_its_gradient_does_not():
    # Users take "loss 0" for a bug. kills: -ratio.detach() * advantage, a loss that is 0 in earnest
    logp = loss_case()[0].requires_grad_()
    rewards = torch.arange(B * T).view(B, T).double() % 4
    adv, _ = stage1.advantages(rewards, None, "group", True, 0.0)
    loss, _ = stage1.grpo_loss(logp, logp.detach(), None, adv, torch.ones(B, T).double(),
                               0.2, 0.2, 1e3, 0.0)
    gradient, = torch.autograd.grad(loss, logp)
    assert abs(loss.item()) < 1e-12
    assert torch.allclose(gradient, -adv) and adv.abs().min() > 0.1


# ----------------------------------------------------------------------------------- packed forward
def alone(model, encoder, prompt, answer, temperature):
    """One answer in the plainest way: prompt + answer as one sequence without padding, every logit,
    float64. -> log-probs and entropies of the answer's tokens [C]."""
    media = {} if prompt.pixels is None else {"pixel_values": prompt.pixels}
    logits = model(input_ids=torch.tensor([prompt.ids + answer]), **media).logits[0].double()
    logits = logits[len(prompt.ids) - 1:-1] / temperature
    if encoder.image_token_id is not None:
        none = torch.full_like(logits, -math.inf)
        logits = torch.where(torch.arange(logits.shape[1]) == encoder.image_token_id, none, logits)
    logp = logits.log_softmax(-1)
    return (logp[torch.arange(len(answer)), answer],
            -(logp.exp() * logp.clamp(min=-1e4)).sum(-1))


def unpack(x, owner):
    """[b, S] -> per answer [C], in the order of prompts and answers."""
    return [x[i][owner[i] == g] for i in range(len(x)) for g in range(1, G + 1)]


def pairs_of(prompts, answers):
    """(prompt, answer) of every answer."""
    pairs = []
    for prompt, group in zip(prompts, answers, strict=True):
        pairs += [(prompt, answer) for answer in group]
    return pairs


def packed_error(world, model, encoder, prompts, temperature=0.7):
    """Largest error of log-probs and of entropies, and relative error of the gradient, of the
    packed forward against one-by-one forwards. Random weights, so that no error cancels out."""
    answers = make_answers(encoder, len(prompts))
    g = torch.Generator().manual_seed(6)
    pairs = pairs_of(prompts, answers)
    weights = [torch.rand(len(answer), generator=g).double() for _, answer in pairs]
    want = [alone(model, encoder, p, a, temperature) for p, a in pairs]
    model.zero_grad()
    sum((w * x).sum() for w, (x, _) in zip(weights, want, strict=True)).backward()
    right = flat_gradient(model)
    model.zero_grad()
    logp, entropy, owner = stage1.packed_logps(model, encoder, prompts, answers, temperature)
    assert (logp[owner < 0] == 0).all() and (owner > 0).sum() == sum(len(a) for _, a in pairs)
    got = unpack(logp, owner)
    sum((w * x.double()).sum() for w, x in zip(weights, got, strict=True)).backward()
    right_logp = torch.cat([logp for logp, _ in want])
    right_entropy = torch.cat([entropy for _, entropy in want])
    errors = ((torch.cat(got) - right_logp).abs().max().item(),
              (torch.cat(unpack(entropy, owner)) - right_entropy).abs().max().item(),
              distance(flat_gradient(model), right))
    model.zero_grad()
    return errors


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("kind", ["text", "one image", "two images", "video", "mixed",
                                  "text model"])
def test_packed_forward_equals_one_by_one(world, monkeypatch, kind, calls):
    # The heart of the memory and time saving. Seen: log-probs 1e-5, gradients 2e-6.
    if calls == 1:  # layers with a sliding window
        monkeypatch.setattr(decoding, "answer_places", in_one_call)
    if kind == "text model":
        errors = packed_error(world, world.text_model, world.text_encoder, world.prompts["text"])
    else:
        errors = packed_error(world, world.model, world.encoder, world.prompts[kind])
    assert max(errors[:2]) < 1e-4 and errors[2] < 5e-5


def test_rows_of_logits_in_parts_are_the_same(world, monkeypatch):
    # kills: parts that count their tokens from the prompt, tokens that other parts count as well,
    # the last part left out, entropies of the wrong rows
    monkeypatch.setattr(stage1, "ROWS_AT_ONCE", 3)
    errors = packed_error(world, world.model, world.encoder, world.prompts["mixed"])
    assert max(errors[:2]) < 1e-4 and errors[2] < 5e-5


def test_rows_of_logits_in_parts_keep_no_log_probs_of_whole_rows(world, monkeypatch):
    # What waits for the backward pass in fp32, V numbers a row, of a model whose logits are bf16.
    # kills: parts that are not made again in the backward pass (they keep as much as one block)
    model = copy.deepcopy(world.text_model).bfloat16()
    answers = make_answers(world.text_encoder, 3)
    vocabulary = len(world.text_encoder.tokenizer)
    kept = {}

    def count(tensor):
        if tensor.shape[-1:] == (vocabulary,) and tensor.dtype == torch.float32:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor
    for rows in (3, 1024):
        monkeypatch.setattr(stage1, "ROWS_AT_ONCE", rows)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            _, _, owner = stage1.packed_logps(model, world.text_encoder, world.prompts["text"],
                                              answers, 1.0)
        held = sum(kept.values()) // vocabulary
        assert held == (0 if rows == 3 else 3 * (1 + owner.shape[1]))


def in_one_call(answers, sees):
    """In place of decoding.answer_places: attention with the whole of pack()'s mask."""
    return ()


@pytest.mark.parametrize("name", wrong_versions.PACKINGS)
def test_one_by_one_rejects_wrong_packing(world, monkeypatch, name):
    # kills: two calls of attention under a mask that shows answers to each other (is_more)
    monkeypatch.setattr(stage1, "pack", wrong_versions.PACKINGS[name])
    errors = packed_error(world, world.model, world.encoder, world.prompts["mixed"])
    assert errors[0] > 0.01 and errors[2] > 0.01


def error_of_two_calls(answer_places, lengths=(7, 4)):
    """Of attention to packed answers and of its gradients, against one call with pack()'s mask, in
    float64, 4 heads on 2 of keys. At padding they may differ: nothing reads it."""
    prompts = [common.Prompt([1] * n, None) for n in lengths]
    answers = [[[1] * 3, [1], [1] * 5], [[1] * 2]]  # a reward model's groups may differ
    _, _, sees, _, _, owner, _ = stage1.pack(prompts, answers, 0, "cpu")
    real = torch.cat([sees[:, 0, 6, :7], owner > 0], 1)                                # [b, L]
    # is_causal: of models whose own mask looks ahead; here pack()'s mask decides
    module = SimpleNamespace(num_key_value_groups=2, training=False, is_causal=False)
    g = torch.Generator().manual_seed(8)
    inputs = [torch.randn(2, heads, 16, 6, generator=g, dtype=torch.float64).requires_grad_()
              for heads in (4, 2, 2)]
    weight = torch.randn(2, 16, 4, 6, generator=g, dtype=torch.float64)
    results = []
    for places in ((), answer_places(answers, sees)):
        sees.answers = places
        out, _ = decoding.attention(module, *inputs, sees, scaling=0.3)
        out = out.masked_fill(~real[:, :, None, None], 0.0)                    # [b, L, heads, dim]
        results.append((out, *torch.autograd.grad((out * weight).sum(), inputs)))
    return max((a - b).abs().max().item() for a, b in zip(*results, strict=True))


def test_attention_in_two_calls_is_that_in_one():
    for places in (decoding.answer_places, wrong_versions.places_with()):
        assert error_of_two_calls(places) < 1e-12
        assert error_of_two_calls(places, lengths=(7, 7)) < 1e-12  # without a mask


def test_only_prompts_without_padding_are_causal():
    # kills: a mask where none is needed, which computes the same and takes twice the time
    for lengths, causal in (((7, 7), True), ((5,), True), ((7, 4), False)):
        prompts = [common.Prompt([1] * n, None) for n in lengths]
        answers = [[[1] * 3, [1]]] * len(prompts)
        sees = stage1.pack(prompts, answers, 0, "cpu")[2]
        assert decoding.answer_places(answers, sees)[-1] == causal


@pytest.mark.parametrize("name", wrong_versions.ANSWER_PLACES)
def test_one_call_rejects_two_that_are_wrong(name):
    assert not error_of_two_calls(wrong_versions.ANSWER_PLACES[name]) < 1e-2  # or NaN


def test_the_frame_of_the_wrong_packings_is_right(world, monkeypatch):
    monkeypatch.setattr(stage1, "pack", wrong_versions.pack)
    errors = packed_error(world, world.model, world.encoder, world.prompts["mixed"])
    assert max(errors[:2]) < 1e-4 and errors[2] < 5e-5


def check_packing_of_the_docstring(pack):
    prompt = common.Prompt([7, 8, 9], None)
    ids, positions, sees, source, target, owner, media = pack(
        [prompt, common.Prompt([5], None)], [[[1, 2], [3, 4, 5]], [[6], [1]]], 0, "cpu")
    assert ids.tolist() == [[7, 8, 9, 1, 2, 3, 4, 5], [0, 0, 5, 6, 1, 0, 0, 0]]
    assert positions[0].tolist() == [0, 1, 2, 3, 4, 3, 4, 5]
    assert positions[1, 2:5].tolist() == [0, 1, 1]
    assert source[0].tolist() == [0, 1, 0, 3, 4] and source[1, :2].tolist() == [0, 0]
    assert target[0].tolist() == [1, 2, 3, 4, 5]
    assert owner.tolist() == [[1, 1, 2, 2, 2], [1, 2, -1, -1, -1]]
    assert sees[0, 0, 6].tolist() == [True] * 3 + [False] * 2 + [True] * 2 + [False]
    assert sees[1, 0, 4].tolist() == [False, False, True, False, True, False, False, False]
    assert sees.any(-1).all(), "a row that sees nothing is NaN in some attention kernels"
    assert not sees.triu(1).any() and not media


def test_each_packing_of_the_docstring():
    # kills: source counted from the start of the answers, positions of one answer running on
    check_packing_of_the_docstring(stage1.pack)


def test_scored_distribution(world):
    # An image token has no mass, temperature divides, and the caller's logits stay as they were.
    g = torch.Generator().manual_seed(7)
    logits = torch.randn(2, 3, len(world.encoder.tokenizer), generator=g)
    for temperature in (1.0, 0.7):
        before = logits.clone()
        p = stage1.scored_logits(logits, world.encoder, temperature).softmax(-1)
        assert torch.equal(logits, before)
        assert (p[..., world.encoder.image_token_id] == 0).all()
        want = (logits.double() / temperature).exp()
        want[..., world.encoder.image_token_id] = 0
        assert torch.allclose(p.double(), want / want.sum(-1, keepdim=True), atol=1e-6)
    text = stage1.scored_logits(logits, world.text_encoder, 1.0)
    assert torch.equal(text, logits)


# ----------------------------------------------------------------------------------------- sampling
def test_a_uniform_number_draws_the_word_whose_share_holds_it(monkeypatch):
    # 200,000 words, all but three as rare as 3e-8: an exact sum says where each one's share begins.
    # kills: a cumulative sum in fp32 (the tail's shares are 0 or double), the share's other end
    # (left in place of right), a word of probability 0
    p = torch.full((2, 200_000), 3e-8, dtype=torch.float64)
    p[0, 5], p[1, 199_990] = 0.9, 0.9
    p[:, 7] = 0.0
    p /= p.sum(1, keepdim=True)
    logp = p.log().float()
    shares = logp.double().exp()
    ends = torch.tensor([[0.0, *itertools.accumulate(row)] for row in shares.tolist()],
                        dtype=torch.float64)
    for word in (0, 5, 6, 8, 100_000, 199_989, 199_990, 199_999):
        for place in (0.01, 0.99):
            number = ends[:, word] + place * shares[:, word]
            number /= ends[:, -1]
            monkeypatch.setattr(torch, "rand", lambda *size, number=number, **more: number[:, None])
            assert stage1.draw(logp, None).tolist() == [word, word]


def with_eos(encoder, eos_ids):
    other = copy.copy(encoder)
    other.eos_ids = sorted(eos_ids)
    return other


def often_ending(encoder):
    """Every sixth token ends an answer, so that untrained answers end, at many different times."""
    return with_eos(encoder, [i for i in range(0, len(encoder.tokenizer), 6)
                              if i != encoder.image_token_id])


@pytest.fixture
def compactions(monkeypatch):
    """The size of the batch each time that finished prompts have left it."""
    sizes, real = [], cache_utils.Cache.batch_select_indices

    def watched(self, indices):
        sizes.append(len(indices))
        return real(self, indices)
    monkeypatch.setattr(cache_utils.Cache, "batch_select_indices", watched)
    return sizes


def generate(world, encoder, prompts, n):
    ids, mask, _, media = common.left_pad(prompts, encoder.pad_id, "cpu")
    out = world.model.generate(
        input_ids=ids, attention_mask=mask, **media, max_new_tokens=n, do_sample=False,
        suppress_tokens=[encoder.image_token_id], eos_token_id=encoder.eos_ids,
        pad_token_id=encoder.pad_id)[:, ids.shape[1]:].tolist()
    return [until(row, encoder.eos_ids) for row in out]


def flat(groups):
    """[B][G] -> [B*G]"""
    return [answer for group in groups for answer in group]


def until(ids, eos_ids):
    """The answer up to its first EOS."""
    return ids[:next((k for k, t in enumerate(ids, 1) if t in eos_ids), len(ids))]


@pytest.mark.parametrize("kind", ["text", "one image", "video", "mixed"])
def test_greedy_equals_generate(world, compactions, kind):
    # kills: positions that do not grow, positions from the padded width, a mask that forgets the
    # answer, answers that see each other or the padding, a compaction that keeps the wrong prompts
    # or forgets one of its tensors
    prompts = world.prompts[kind]
    free = generate(world, with_eos(world.encoder, [world.encoder.eos_id]), prompts, 12)
    # end the answers at different times, with two tokens that they really contain
    pairs = [{i, j} for i in free[0][2:8] for j in free[-1][2:]]

    def unequal(ends):
        """The more different lengths, the better; then the longer, the better."""
        lengths = [len(until(ids, ends)) for ids in free]
        return len(set(lengths)), *lengths
    encoder = with_eos(world.encoder, max(pairs, key=unequal))
    want = generate(world, encoder, prompts, 12)
    got = stage1.sample_group(world.model, encoder, prompts, 2, 0.0, 12, None)
    assert got.ids == [[answer, answer] for answer in want]
    alone = stage0_sft.generate_greedily(world.model, encoder, prompts, max_new_tokens=12)
    assert alone.ids == [[answer] for answer in want]  # what stage 0 judges with
    if kind in ("text", "mixed"):
        assert len({len(row) for row in want}) > 1 and compactions


@pytest.mark.parametrize("kind", ["text", "mixed"])
def test_recorded_tokens_are_those_that_are_run(world, recorded, kind):
    # kills: inputs that are not copied, a mask of the tokens before, keys written at the same place
    # by every token, room that is seen, a graph of other shapes or another room used on
    prompts = world.prompts[kind]
    for temperature in (0.0, 1.0):
        check_recorded(world.model, world.encoder, prompts, G, temperature)
    assert recorded["recordings"] > 1 and recorded["replays"] > 5 * recorded["recordings"]
    check_log_probs(stage1.sample_group, world)
    check_ends(stage1.sample_group, world)


def test_what_cannot_be_recorded_is_run(world, recorded, monkeypatch):
    # As a card that is full does, or a model that asks the GPU for a number. kills: keys that go on
    # being written where the graph would have, a token that is written twice, a try at every token
    tries = []

    def fails(function):
        tries.append(function())
        raise RuntimeError("CUDA error: operation not permitted\nmore lines")
    monkeypatch.setattr(decoding, "record", fails)
    for temperature in (0.0, 1.0):
        with pytest.warns(UserWarning, match="graph, slower: CUDA error: .* not permitted. If mem"):
            check_recorded(world.model, world.encoder, world.prompts["mixed"], G, temperature)
    assert len(tries) == 2


def test_the_cache_with_room_holds_what_a_growing_one_holds():
    # kills: room left over from before a copy taken for its own, tokens written at the wrong place,
    # capacity off by one, two layers or keys and values in one memory
    generator, heads, dim = torch.Generator().manual_seed(0), 2, 7
    ours = decoding.new_cache(95)
    plain = cache_utils.Cache(layer_class_to_replicate=cache_utils.DynamicLayer)
    rows, moved = B, 0
    for step, new in enumerate([5] + 90 * [1]):
        if step == 1:
            ours.batch_repeat_interleave(G)
            plain.batch_repeat_interleave(G)
            rows *= G
        if step in (4, 70, 80):
            keep = torch.randperm(rows, generator=generator)[:rows - 3]
            ours.batch_select_indices(keep)
            plain.batch_select_indices(keep)
            rows -= 3
        for layer in (0, 1):
            # as attention makes them: heads and tokens exchanged, so no contiguous memory
            k, v = (torch.rand(rows, new, heads, dim, generator=generator).transpose(1, 2)
                    for _ in "kv")
            where = ours.layers[layer].keys.data_ptr() if step else 0
            got, want = ours.update(k, v, layer), plain.update(k, v, layer)
            moved += got[0].data_ptr() != where
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
        assert ours.get_seq_length() == plain.get_seq_length()
    assert moved <= 2 * 12  # it copies now and then, not for each of 91 tokens
    assert decoding.room(ours.layers[0].keys) == 95


def check_no_image(sample_group, world, temperature=1.0):
    """An image token in an answer crashes the next forward."""
    real = type(world.model).forward

    def loud(self, *args, **kwargs):
        out = real(self, *args, **kwargs)
        out.logits[..., world.encoder.image_token_id] += 1e4
        return out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(world.model), "forward", loud)
        rollout = sample_group(world.model, world.encoder, world.prompts["text"], G, temperature, 4,
                               torch.Generator().manual_seed(0))
    assert all(world.encoder.image_token_id not in ids for ids in flat(rollout.ids))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_answer_contains_an_image(world, temperature):
    check_no_image(stage1.sample_group, world, temperature)


def check_log_probs(sample_group, world):
    """The ratio of the first update is 1 only if what was sampled from is what is scored."""
    encoder, prompts = often_ending(world.encoder), world.prompts["mixed"]
    rollout = sample_group(world.model, encoder, prompts, G, 0.7, 10,
                           torch.Generator().manual_seed(8))
    assert len({len(answer) for answer in flat(rollout.ids)}) > 2
    for answer in flat(rollout.ids):  # none was dropped with the columns of finished ones
        assert answer[-1] in encoder.eos_ids or len(answer) == 10
    with torch.no_grad():
        logp, _, owner = stage1.packed_logps(world.model, encoder, prompts, rollout.ids, 0.7)
    for sampled, scored in zip(flat(rollout.logp), unpack(logp, owner), strict=True):
        assert torch.allclose(torch.tensor(sampled), scored, atol=1e-4)


def test_sampled_log_probs_equal_the_packed_ones(world, compactions):
    # kills: columns that are cut before the finished answers are moved out, one uniform number for
    # all answers of a prompt, tokens written after the end
    check_log_probs(stage1.sample_group, world)
    assert compactions, "the case does not bite: no prompt left the batch"


def check_ends(sample_group, world):
    """The first of several end-of-sequence tokens ends an answer, and belongs to it."""
    encoder, n = often_ending(world.encoder), 6
    rollout = sample_group(world.model, encoder, world.prompts["text"], 20, 1.0, n,
                           torch.Generator().manual_seed(9))
    answers, logps = flat(rollout.ids), flat(rollout.logp)
    assert [len(group) for group in rollout.ids] == [20] * 3
    cut = [ids for ids in answers if ids[-1] not in encoder.eos_ids]
    ended = [ids for ids in answers if ids[-1] in encoder.eos_ids]
    assert len({ids[-1] for ids in ended}) > 5 and len(cut) > 5
    assert all(len(ids) == n for ids in cut)
    assert all(t not in encoder.eos_ids for ids in ended for t in ids[:-1])
    assert all(t not in encoder.eos_ids for ids in cut for t in ids)
    assert [len(x) for x in logps] == [len(x) for x in answers]
    assert all(logp <= 0 for row in logps for logp in row)


def test_where_answers_end(world):
    # kills: only one of several end-of-sequence tokens heeded
    check_ends(stage1.sample_group, world)


def chi_square(tokens, p):
    """(statistic - degrees of freedom) / its standard deviation; rare tokens share one bin."""
    counts = torch.bincount(torch.tensor(tokens), minlength=len(p)).double()
    expected = p.double() * len(tokens)
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    df = len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum().item() - df) / math.sqrt(2 * df)


def check_first_tokens(sample_group, world):
    """Nothing but plain softmax at the temperature, prompt by prompt. The same numbers reject
    samples of another temperature, of a top-k and of the neighbouring prompt."""
    prompts, n = world.prompts["mixed"], 4000
    rollout = sample_group(world.model, world.encoder, prompts, n, 0.7, 1,
                           torch.Generator().manual_seed(10))
    image = torch.tensor(world.encoder.image_token_id)
    with torch.no_grad():
        for i, prompt in enumerate(prompts):
            tokens = [ids[0] for ids in rollout.ids[i]]
            media = {} if prompt.pixels is None else {"pixel_values": prompt.pixels}
            logits = world.model(input_ids=torch.tensor([prompt.ids]), **media).logits[0, -1]
            logits = logits.double()
            logits[image] = -math.inf
            right = (logits / 0.7).softmax(0)
            assert chi_square(tokens, right) < 5
            assert chi_square(tokens, logits.softmax(0)) > 6
            # samples of the top 10 only would have to miss what all others have
            top = torch.where(right >= right.topk(10).values[-1], right, 0.0)
            drawn = torch.multinomial(top, n, True, generator=torch.Generator().manual_seed(11))
            assert chi_square(drawn.tolist(), right) > 6
            assert chi_square([ids[0] for ids in rollout.ids[i - 1]], right) > 6


def test_first_tokens_follow_the_softmax(world):
    check_first_tokens(stage1.sample_group, world)


def check_seed(sample_group, world):
    """Ranks must differ, reruns must not."""
    def run(seed):
        return sample_group(world.model, world.encoder, world.prompts["text"], G, 1.0, 5,
                            torch.Generator().manual_seed(seed))
    assert run(1).ids == run(1).ids and run(1).logp == run(1).logp
    assert run(1).ids != run(2).ids
    group = run(1).ids[0]
    assert len(set(map(tuple, group))) == G  # the answers of one group are independent draws


def test_the_seed_decides(world):
    check_seed(stage1.sample_group, world)


def check_sampler(sample_group, world):
    for check in (check_no_image, check_ends, check_first_tokens, check_log_probs, check_seed):
        check(sample_group, world)


def test_the_frame_of_the_wrong_samplers_is_right(world):
    check_sampler(wrong_versions.sample_group, world)


@pytest.mark.parametrize("name", wrong_versions.SAMPLERS)
def test_wrong_samplers_are_rejected(world, name):
    rejects(check_sampler, wrong_versions.SAMPLERS[name], world)


def test_sampling_leaves_training_mode_and_checkpointing(world):
    # Gradient checkpointing switches the cache off in silence; a token then does not see the
    # prompt. kills: model.eval() taken away
    model = copy.deepcopy(world.model)
    model.gradient_checkpointing_enable()
    model.train()
    got = stage1.sample_group(model, world.encoder, world.prompts["text"], 1, 0.0, 6, None)
    want = stage1.sample_group(world.model, world.encoder, world.prompts["text"], 1, 0.0, 6, None)
    assert got.ids == want.ids and not model.training


# ------------------------------------------------------------------------------------------- update
def settings(**more):
    return stage1.Config(**{"max_grad_norm": OFF, "micro_batch": B, "group_size": G, "beta": 0.0,
                            "temperature": 0.7, **more})


def recorder(model, lr=0.0):
    """An optimizer that keeps the gradients it is given, and takes steps of length lr."""
    seen, params = [], [p for p in model.parameters() if p.requires_grad]

    @torch.no_grad()
    def step():
        seen.append(flat_gradient(model).clone())
        for p in params:
            if p.grad is not None:
                p -= lr * p.grad / seen[-1].norm().float()
    return SimpleNamespace(step=step, state={0: {}},  # of steps before
                           zero_grad=lambda set_to_none: model.zero_grad()), seen


def update(world, cfg, prompts, answers, adv, keep, ref=None, lr=0.0, encoder=None, model=None):
    """-> gradients of each optimizer step, metrics. Leaves world.model as it is."""
    model = copy.deepcopy(model or world.model)
    optimizer, seen = recorder(model, lr)
    metrics = stage1.grpo_update(model, ref, encoder or world.encoder, optimizer, prompts, answers,
                                 adv, keep, cfg)
    return seen, metrics


@pytest.fixture
def rollout(world):
    """Prompts, answers, advantages, keep (one prompt wholly left out), another model as ref."""
    g = torch.Generator().manual_seed(12)
    adv = torch.randn(B, G, generator=g, dtype=torch.float64)
    keep = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 0, 0, 0], [0, 1, 1, 1, 0]]) > 0
    ref = copy.deepcopy(world.model)
    with torch.no_grad():
        for p in ref.parameters():
            p.mul_(1 + 0.04 * torch.randn(p.shape, generator=g))
    return SimpleNamespace(prompts=world.prompts["mixed"], answers=make_answers(world.encoder, B),
                           adv=adv, keep=keep, ref=ref, all=torch.ones(B, G, dtype=torch.bool))


def objective(model, encoder, r, keep, cfg, old=None, eos=True, count=None):
    """The objective answer by answer, each a forward of its own. -> loss (a graph), log-probs."""
    lengths = [[len(a) for a in group] for group in r.answers]
    kept = [(i, j) for i in range(B) for j in range(G) if keep[i, j]]
    count = count or (len(kept) if cfg.normaliser == "sequence" else
                      sum(lengths[i][j] for i, j in kept))
    loss, logps = 0.0, {}
    for i, j in kept:
        logp, _ = alone(model, encoder, r.prompts[i], r.answers[i][j], cfg.temperature)
        logps[i, j] = logp.detach()
        ratio = (logp - (old[i, j] if old else logps[i, j])).exp()
        adv = r.adv[i, j]
        term = -torch.min(ratio * adv, ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high) * adv)
        if cfg.beta:
            with torch.no_grad():
                ref, _ = alone(r.ref, encoder, r.prompts[i], r.answers[i][j], cfg.temperature)
            term = term + cfg.beta * ((ref - logp).exp() - (ref - logp) - 1)
        term = term[:-1] if not eos and r.answers[i][j][-1] in encoder.eos_ids else term
        loss = loss + term.sum() / count / (lengths[i][j] if cfg.normaliser == "sequence" else 1)
    return loss, logps


def objective_gradient(model, *args, **kwargs):
    model.zero_grad()
    loss, logps = objective(model, *args, **kwargs)
    loss.backward()
    gradient = flat_gradient(model)
    model.zero_grad()
    return gradient, loss.item(), logps


@pytest.mark.parametrize("normaliser", ["sequence", "token"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_gradient_does_not_depend_on_micro_batches(world, rollout, normaliser, beta):
    # ... and is that of the objective. Filtered answers count neither above nor below the line.
    # Other weights, another denominator and an EOS without a gradient all give another one.
    # kills: count per micro-batch, count of all answers, keep ignored, one advantage for all
    cfg = settings(normaliser=normaliser, beta=beta)
    ref = rollout.ref if beta else None
    want, loss, _ = objective_gradient(copy.deepcopy(world.model), world.encoder, rollout,
                                       rollout.keep, cfg)
    for micro_batch in (1, 2, 3):
        cfg.micro_batch = micro_batch
        (got,), metrics = update(world, cfg, rollout.prompts, rollout.answers, rollout.adv,
                                 rollout.keep, ref)
        assert distance(got, want) < 2e-5
        assert metrics["loss"] == pytest.approx(loss, rel=1e-4)
        assert metrics["grad_norm"] == pytest.approx(want.norm().item(), rel=1e-4)
    # what the tolerance separates
    model, other = copy.deepcopy(world.model), copy.copy(cfg)
    other.normaliser = {"sequence": "token", "token": "sequence"}[normaliser]
    wrong = [objective_gradient(model, world.encoder, rollout, rollout.keep, cfg, eos=False)[0],
             objective_gradient(model, world.encoder, rollout, rollout.all, cfg)[0],
             objective_gradient(model, world.encoder, rollout, rollout.keep, cfg, count=B * G)[0],
             objective_gradient(model, world.encoder, rollout, rollout.keep, other)[0]]
    assert all(distance(w, want) > 0.002 for w in wrong)


def test_padding_is_not_trained(world, rollout):
    # Masks that come from `!= pad_id` drop the EOS where the two are one token, as in many
    # checkpoints. kills: owner = -1 where the token is pad_id
    cfg, pads = settings(), [world.encoder.pad_id, world.encoder.eos_ids[0], 3]
    gradients = []
    for pad in pads:
        encoder = copy.copy(world.encoder)
        encoder.pad_id = pad
        gradients.append(update(world, cfg, rollout.prompts, rollout.answers, rollout.adv,
                                rollout.all, encoder=encoder)[0][0])
    assert all(distance(g, gradients[0]) < 1e-6 for g in gradients)
    # whereas the EOS is: without it the gradient is another one
    shorter = [[a[:-1] if len(a) > 1 else a for a in group] for group in rollout.answers]
    without = update(world, cfg, rollout.prompts, shorter, rollout.adv, rollout.all)[0][0]
    assert distance(without, gradients[0]) > 0.02


def test_nothing_kept_is_no_gradient(world, rollout):
    # kills: 0/0 where the filter leaves nothing
    (got,), metrics = update(world, settings(), rollout.prompts, rollout.answers, rollout.adv,
                             rollout.all & False)
    assert (got == 0).all() and metrics["loss"] == 0


def test_groups_without_spread_give_no_gradient_but_that_of_the_kl(world, rollout):
    # kills: groups of equal rewards skipped altogether, KL included
    rewards = torch.full((B, G), 0.3, dtype=torch.float64)
    adv, keep = stage1.advantages(rewards, None, "group", True, 3.0)
    (got,), metrics = update(world, settings(), rollout.prompts, rollout.answers, adv, keep)
    assert (got == 0).all() and metrics["grad_norm"] == 0
    (got,), _ = update(world, settings(beta=0.04), rollout.prompts, rollout.answers, adv, keep,
                       rollout.ref)
    assert got.norm() > 1e-4


def test_kl_to_oneself_is_exactly_zero(world, rollout):
    # kills: the reference without the temperature, without its images, on other micro-batches
    for micro_batch in (1, 2):
        cfg = settings(beta=0.04, micro_batch=micro_batch)
        args = rollout.prompts, rollout.answers, rollout.adv, rollout.all
        assert update(world, cfg, *args, copy.deepcopy(world.model))[1]["kl"] == 0.0
        kl = update(world, cfg, *args, rollout.ref)[1]["kl"]
        assert kl > 0.01
    # logged as a mean over tokens: that of the loop
    total, n = 0.0, 0
    with torch.no_grad():
        for prompt, answer in pairs_of(rollout.prompts, rollout.answers):
            d = (alone(rollout.ref, world.encoder, prompt, answer, 0.7)[0]
                 - alone(world.model, world.encoder, prompt, answer, 0.7)[0])
            total += (d.exp() - d - 1).sum().item()
            n += len(answer)
    assert kl == pytest.approx(total / n, rel=1e-3)


def test_second_update_keeps_the_old_log_probs(world, rollout):
    # With two updates per rollout the ratio of the second is to the policy that sampled, not to
    # itself. kills: old renewed at each update, old of another micro-batch
    cfg = settings(updates_per_rollout=2, micro_batch=2, clip_high=0.3)
    seen, metrics = update(world, cfg, rollout.prompts, rollout.answers, rollout.adv, rollout.keep,
                           lr=0.5)
    model, wrong = copy.deepcopy(world.model), None
    first, _, old = objective_gradient(model, world.encoder, rollout, rollout.keep, cfg)
    optimizer, _ = recorder(model, 0.5)
    objective(model, world.encoder, rollout, rollout.keep, cfg)[0].backward()
    optimizer.step()
    second, _, new = objective_gradient(model, world.encoder, rollout, rollout.keep, cfg, old)
    wrong = objective_gradient(model, world.encoder, rollout, rollout.keep, cfg)[0]
    assert len(seen) == 2
    assert distance(seen[0], first) < 2e-5 and distance(seen[1], second) < 1e-3
    assert distance(wrong, second) > 0.1, "the case does not bite: the first step was too small"
    assert metrics["clip_ratio/low_mean"] + metrics["clip_ratio/high_mean"] > 0
    assert max((new[k] - old[k]).abs().max() for k in old) > 0.1


def sampled_logps(model, encoder, r, temperature=0.7):
    """[B][G] lists: what the sampler would have logged."""
    logps = []
    for prompt, group in zip(r.prompts, r.answers, strict=True):
        logps.append([alone(model, encoder, prompt, answer, temperature)[0].tolist()
                      for answer in group])
    return logps


def check_mini_batches(steps, world, rollout):
    """Step for step the gradients of `steps`, which goes answer by answer; whole rollouts and
    mini-batches of 1, 2 passes, and whether old log-probs are the sampler's or the policy's."""
    lengths = [[len(answer) for answer in group] for group in rollout.answers]
    keep = rollout.keep.clone()
    keep[1, 2:4] = True  # mini-batches of 4, 2 and 3 answers, so normalisers differ
    sampled = sampled_logps(world.model, world.encoder, rollout)

    def logps(model, i, j):
        return alone(model, world.encoder, rollout.prompts[i], rollout.answers[i][j], 0.7)[0]
    for given, micro_batch in ((None, 1), (sampled, B)):
        cfg = settings(mini_batch=1, updates_per_rollout=2, micro_batch=micro_batch)
        model, ours = copy.deepcopy(world.model), copy.deepcopy(world.model)
        (optimizer, want), (recorded, got) = recorder(model, 0.05), recorder(ours, 0.05)
        steps(model, logps, optimizer, lengths, rollout.adv, keep, cfg)
        stage1.grpo_update(ours, None, world.encoder, recorded, rollout.prompts, rollout.answers,
                           rollout.adv, keep, cfg, given)
        assert len(got) == len(want) == 2 * B
        assert all(distance(g, w) < 5e-3 for g, w in zip(got, want, strict=True))


def test_mini_batches_equal_single_answers(world, rollout):
    # kills: old of the policy before this step, one normaliser for all steps, every prompt again
    check_mini_batches(wrong_versions.mini_batches, world, rollout)


@pytest.mark.parametrize("name", wrong_versions.MINI_BATCHES)
def test_wrong_mini_batches_are_rejected(world, rollout, name):
    rejects(check_mini_batches, wrong_versions.MINI_BATCHES[name], world, rollout)


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_mini_batches_of_two_prompts(world, rollout, kl):
    # 4 prompts in steps of 2: as two updates by hand, the second with the first's old log-probs.
    # Micro-batches change nothing. kills: the reference's log-probs of another mini-batch
    prompts = [*rollout.prompts, world.prompts["text"][1]]
    answers = [*rollout.answers, rollout.answers[0][::-1]]
    prompts[2:], answers[2:] = prompts[:1:-1], answers[:1:-1]  # the second two: the shorter first
    assert stage1.longest_first(prompts, answers, [slice(0, 2), slice(2, 4)]) == [0, 1, 3, 2]
    adv, keep = torch.cat([rollout.adv, -rollout.adv[:1]]), torch.ones(4, G, dtype=torch.bool)
    four = SimpleNamespace(prompts=prompts, answers=answers)
    sampled = sampled_logps(world.model, world.encoder, four)
    together = {}
    for micro_batch in (1, 2, 4):
        cfg = settings(mini_batch=2, micro_batch=micro_batch, beta=0.3, kl=kl)
        ours = copy.deepcopy(world.model)
        optimizer, together[micro_batch] = recorder(ours, 0.1)
        stage1.grpo_update(ours, rollout.ref, world.encoder, optimizer, prompts, answers, adv, keep,
                           cfg, sampled)
        assert len(together[micro_batch]) == 2
    model = copy.deepcopy(world.model)
    optimizer, want = recorder(model, 0.1)
    for part in (slice(0, 2), slice(2, 4)):
        args = world.encoder, prompts[part], answers[part], 0.7
        logp, _, owner = stage1.packed_logps(model, *args)
        ref = stage1.packed_logps(rollout.ref, *args)[0]
        weight = torch.tensor([[1 / len(a) for a in group] for group in answers[part]]) / (2 * G)
        loss, _ = stage1.grpo_loss(
            logp, stage1.token_values(sampled[part], owner), ref.detach(),
            stage1.per_token(adv[part], owner), stage1.per_token(weight, owner),
            0.2, 0.2, 1e3, 0.3, kl)
        loss.backward()
        optimizer.step()
        model.zero_grad()
    for got in together.values():
        assert all(distance(g, w) < 5e-3 for g, w in zip(got, want, strict=True))


def test_longest_first():
    # kills: prompts of one mini-batch in another, prompts or answers alone, the shortest first
    prompts = [common.Prompt([1] * n, None) for n in (5, 3, 9, 2, 4)]
    answers = [[[1]], [[1] * 4], [[1] * 2], [[1] * 3, [1] * 8], [[1] * 2] * 2]  # 6 7 11 13 8
    assert stage1.longest_first(prompts, answers, [slice(0, 5)]) == [3, 2, 4, 1, 0]
    minis = [slice(0, 3), slice(3, 5)]
    assert stage1.longest_first(prompts, answers, minis) == [2, 1, 0, 3, 4]


def test_the_log_of_single_answers_tells_of_the_batch(world):
    # With G = 1 every group has a std of 0. kills: reward_std 0 and frac_reward_zero_std 1 always
    for rewards, std, share in (([2.0, 0.5, 2.0, 0.5], 0.75, 0.0), ([2.0] * 4, 0.0, 1.0)):
        every = torch.tensor(rewards, dtype=torch.float64)[:, None]
        logged = stage1.describe(stage1.Rollout([[[1]]] * 4, []), [["x"]] * 4, {}, every,
                                 every > 0, world.encoder)
        assert (logged["reward_std"], logged["frac_reward_zero_std"]) == (std, share)


def test_a_single_step_computes_nothing_twice(world, rollout, monkeypatch):
    # kills: old log-probs computed up front in a default run, or where the sampler's are given
    calls, real = [], stage1.packed_logps

    def watched(*args, **more):
        calls.append(len(args[2]))
        return real(*args, **more)
    monkeypatch.setattr(stage1, "packed_logps", watched)
    sampled = sampled_logps(world.model, world.encoder, rollout)
    for more, given, forwards in (({}, sampled, 1), ({}, None, 1), ({"mini_batch": 1}, sampled, 3),
                                  ({"mini_batch": 1}, None, 6)):
        calls.clear()
        model = copy.deepcopy(world.model)
        stage1.grpo_update(model, None, world.encoder, recorder(model)[0], rollout.prompts,
                           rollout.answers, rollout.adv, rollout.all, settings(**more), given)
        assert len(calls) == forwards


def test_mini_batches_that_do_not_divide_are_refused(monkeypatch):
    # kills: the prompts left over dropped, or in a step of their own; half a prompt for a process
    stage1.Config(batch_size=24, mini_batch=12).check()
    for wrong in (5, 48, -1):
        with pytest.raises(ValueError, match="must divide --batch_size 24"):
            stage1.Config(batch_size=24, mini_batch=wrong).check()
    monkeypatch.setenv("WORLD_SIZE", "8")
    stage1.Config(batch_size=24, mini_batch=8).check()
    with pytest.raises(ValueError, match="does not divide among 8 processes"):
        stage1.Config(batch_size=24, mini_batch=12).check()


def test_frozen_vision_stays(world, rollout):
    # kills: only the tower frozen, weight decay or momentum on frozen weights
    model = copy.deepcopy(world.model)
    common.freeze_vision(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    stage1.grpo_update(model, None, world.encoder, optimizer, rollout.prompts, rollout.answers,
                       rollout.adv, rollout.all, settings(updates_per_rollout=2))
    vision = {k for k in before if "vision_tower" in k or "multi_modal_projector" in k}
    assert len(vision) > 20 and any("projector" in k for k in vision)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name in vision), name


def test_gradient_checkpointing_changes_no_gradient(world, rollout):
    # It works in training mode only, and only then does a layer run twice. kills: no model.train()
    args = rollout.prompts, rollout.answers, rollout.adv, rollout.keep
    (want,), _ = update(world, settings(micro_batch=2), *args)
    model = copy.deepcopy(world.model)
    common.freeze_vision(model)  # as the stages do
    model.gradient_checkpointing_enable()
    calls = []
    layer = model.model.language_model.layers[1].self_attn
    layer.register_forward_hook(lambda *a: calls.append(1))
    optimizer, seen = recorder(model)
    stage1.grpo_update(model, None, world.encoder, optimizer, *args,
                       settings(micro_batch=2, gradient_checkpointing=True))
    language = torch.cat([torch.full((p.numel(),), p.requires_grad) for p in model.parameters()])
    assert distance(seen[0], want[language]) < 1e-5
    assert len(calls) == 2 * 2  # two micro-batches, forward and again in backward


def test_gradient_norm_is_clipped_and_logged_before(world, rollout):
    # kills: clip taken away, logged after the clip
    args = rollout.prompts, rollout.answers, 100 * rollout.adv, rollout.all
    (raw,), free = update(world, settings(), *args)
    (got,), metrics = update(world, settings(max_grad_norm=0.5), *args)
    assert raw.norm() > 1 and got.norm().item() == pytest.approx(0.5, rel=1e-3)
    assert metrics["grad_norm"] == pytest.approx(raw.norm().item(), rel=1e-3)
    assert distance(got / 0.5, raw / raw.norm()) < 1e-3


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])  # last: its norm alone overflows
def test_a_broken_gradient_is_no_step(world, rollout, poison):
    # One NaN step ruins every weight for good. It is left out and counted, and the third in a row
    # stops the run. kills: the check taken away, or for NaN alone; a run that goes on for ever
    model = copy.deepcopy(world.model)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    adv = rollout.adv.clone()
    adv[2, 1] = poison
    inputs = (model, None, world.encoder, optimizer, rollout.prompts, rollout.answers, adv,
              rollout.all, settings(max_grad_norm=1.0))
    for _ in range(2):
        assert stage1.grpo_update(*inputs)["skipped_steps"] == 1
    with pytest.raises(SystemExit, match="3 times in a row"):
        stage1.grpo_update(*inputs)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_entropy_is_a_mean_over_tokens(world, rollout):
    # kills: padding counted, mean over micro-batches of means
    want = [alone(world.model, world.encoder, prompt, answer, 0.7)[1].detach()
            for prompt, answer in pairs_of(rollout.prompts, rollout.answers)]
    for micro_batch in (1, 2):
        _, metrics = update(world, settings(micro_batch=micro_batch), rollout.prompts,
                            rollout.answers, rollout.adv, rollout.all)
        assert metrics["entropy"] == pytest.approx(torch.cat(want).mean().item(), rel=1e-5)


def test_logged_difference_to_the_sampler(world, rollout):
    # The only sign of a sampler and a scorer that disagree. kills: answers scattered in another
    # order, padding in the mean, the sign lost in a sum
    g = torch.Generator().manual_seed(13)
    noises, sampled = [], []
    for prompt, group in zip(rollout.prompts, rollout.answers, strict=True):
        logps = []
        for answer in group:
            logp = alone(world.model, world.encoder, prompt, answer, 0.7)[0].detach()
            noises.append(torch.randn(len(answer), generator=g))
            logps.append((logp + noises[-1]).tolist())
        sampled.append(logps)
    want = torch.cat(noises).abs().mean().item()
    for micro_batch in (1, 2):
        cfg = settings(micro_batch=micro_batch, updates_per_rollout=2)
        model = copy.deepcopy(world.model)
        metrics = stage1.grpo_update(model, None, world.encoder, recorder(model, 0.1)[0],
                                     rollout.prompts, rollout.answers, rollout.adv, rollout.keep,
                                     cfg, sampled)
        got = metrics["sampling/sampling_logp_difference/mean"]
        assert got == pytest.approx(want, rel=1e-4)


# ----------------------------------------------------------------------------------- stage 0's loss
def sft_case(world, target):
    name = "sft.jsonl" if target == "rationale" else "mm_rl.jsonl"
    rows = load_rows(str(world.folder / name), world.encoder, quiet=True)
    # unequal prompts and answers; with images and a video for the label
    rows = rows[:3]
    if target == "rationale":
        rows[1]["rationale"] = rows[1]["rationale"][:40]
    if len({r["label"] for r in rows}) == 1:
        rows[1] = common.swap(rows[1])
    return rows, stage0_sft.Config(target=target)


def sft_batch(encoder, rows, cfg, collate=stage0_sft.collate, pad_id=None):
    return collate(
        [encoder(row) for row in rows],
        [encoder.answer_ids(stage0_sft.target_text(row, cfg.target)) for row in rows],
        encoder.pad_id if pad_id is None else pad_id, "cpu")


def sft_by_loop(model, encoder, rows, cfg):
    """Sum over rows, one at a time without padding, over the answer's tokens and its EOS."""
    total, count = 0.0, 0
    for row in rows:
        prompt = encoder(row)
        text = f"<answer>\n{row['label']}\n</answer>"
        if cfg.target == "rationale":
            text = f"<think>\n{row['rationale'].strip()}\n</think>\n{text}"
        answer = encoder.tokenizer(text, add_special_tokens=False)["input_ids"] + [encoder.eos_id]
        media = {} if prompt.pixels is None else {"pixel_values": prompt.pixels}
        logits = model(input_ids=torch.tensor([prompt.ids + answer]), **media).logits[0].double()
        for t, token in enumerate(answer, len(prompt.ids)):
            total, count = total - logits[t - 1].log_softmax(-1)[token], count + 1
    return total, count


def check_sft_loss(collate, world, target, pad_id=None, answer_nll=stage0_sft.answer_nll):
    """The answer's tokens and its EOS, nothing of the prompt, nothing of the padding."""
    model, encoder = copy.deepcopy(world.model), world.encoder
    rows, cfg = sft_case(world, target)
    want, count = sft_by_loop(model, encoder, rows, cfg)
    want.backward()
    right = flat_gradient(model)
    for size in (1, 2, 3):  # micro-batches
        model.zero_grad()
        total, tokens = 0.0, 0
        for at in range(0, len(rows), size):
            parts = sft_batch(encoder, rows[at:at + size], cfg, collate, pad_id)
            nll, n = answer_nll(model, *parts)
            nll.backward()
            total, tokens = total + nll.item(), tokens + n
        assert tokens == count and total == pytest.approx(want.item(), rel=1e-5)
        assert distance(flat_gradient(model), right) < 2e-5


@pytest.mark.parametrize("target", ["rationale", "label"])
def test_sft_loss_equals_a_loop(world, target):
    # kills: images of another row, mean for sum
    check_sft_loss(stage0_sft.collate, world, target)


def check_sft_masks(collate, world):
    check_sft_loss(collate, world, "rationale")
    check_sft_loss(collate, world, "label")
    # in many checkpoints padding and end of sequence are one token
    check_sft_loss(collate, world, "rationale", world.encoder.eos_id)


def test_padding_with_the_end_of_sequence_token_changes_no_label(world):
    check_sft_masks(stage0_sft.collate, world)


def test_the_frame_of_the_wrong_sft_masks_is_right(world):
    check_sft_masks(wrong_versions.collate, world)


@pytest.mark.parametrize("name", wrong_versions.SFT_MASKS)
def test_wrong_sft_masks_are_rejected(world, name):
    rejects(check_sft_masks, wrong_versions.SFT_MASKS[name], world)


def check_sft_nll(answer_nll, world):
    for target in ("rationale", "label"):
        check_sft_loss(stage0_sft.collate, world, target, answer_nll=answer_nll)


def test_the_frame_of_the_wrong_sft_losses_is_right(world):
    check_sft_nll(wrong_versions.answer_nll, world)


@pytest.mark.parametrize("name", wrong_versions.SFT_LOSSES)
def test_wrong_sft_losses_are_rejected(world, name):
    rejects(check_sft_nll, wrong_versions.SFT_LOSSES[name], world)


def test_sft_targets(world):
    # What is taught, in words: the label follows the row, one EOS ends it, --target label has no
    # rationale. kills: the other label, "A" for every row, two EOS
    for target in ("rationale", "label"):
        rows, cfg = sft_case(world, target)
        ids, mask, _, labels, _ = sft_batch(world.encoder, rows, cfg)
        assert len({r["label"] for r in rows}) == 2
        for i, row in enumerate(rows):
            taught = labels[i][labels[i] >= 0].tolist()
            assert taught[-1] == world.encoder.eos_id and taught.count(world.encoder.eos_id) == 1
            text = world.encoder.decode(taught)
            answer = common.parse(text)
            assert answer.verdict == row["label"]
            assert answer.well_formed == (target == "rationale")
            assert (target == "label") == (text == f"<answer>\n{row['label']}\n</answer>")
            n = len(world.encoder(row).ids)
            assert labels[i, :n].tolist() == [-100] * n
            end = n + len(taught)
            assert ids[i, n:end].tolist() == taught == labels[i, n:end].tolist()
            assert mask[i, :end].all() and not mask[i, end:].any()
            assert (labels[i, end:] == -100).all()
