"""
Wrong versions that the tests must reject: one dict per topic, {what is wrong: function}. Each
function has the signature of the right one in the sources, and each is a mistake that one makes.

The wrong versions of a topic share a frame: the right thing in the plainest way, with one place
open. The tests show that the frame with nothing wrong in it passes the oracle, so what an oracle
rejects is the one mistake, and that every version in the dict fails it.

    PARSERS       parse          test_rewards.py     SELECTION     select      test_stages.py
    ADVANTAGES    advantages     test_grpo.py        SWAPS         swap        test_swap.py
    LOSSES        grpo_loss      test_grpo.py        EVALUATIONS   summarize   test_judging.py
    PACKINGS      pack           test_grpo.py        WIN_RATES     win_rates   test_eval.py
    SAMPLERS      sample_group   test_grpo.py        BT_LOSSES     bt_loss     test_bt.py
    SFT_MASKS     collate        test_grpo.py        KL_PENALTIES  grpo_loss   test_grpo.py
    MINI_BATCHES  grpo_update    test_grpo.py        SFT_LOSSES    answer_nll  test_grpo.py
    REPLAYS       mixed_batch    test_stages.py      BALANCES      balanced    test_bt.py
    REPLAYED      choose_replay  test_stages.py      FLIPS         to_flip     test_dt2it.py
    COMPARISONS   compare        test_eval.py        ANSWER_PLACES answer_places test_grpo.py
"""

import math
import random
import re
from collections import Counter
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F

import common

OTHER = {"A": "B", "B": "A"}


# -------------------------------------------------------------------------------- parsing an answer
class Answer(NamedTuple):
    verdict: str | None
    well_formed: bool


TAGS = ("<think>", "</think>", "<answer>", "</answer>")
VERDICT = re.compile(r"<answer>\s*([AB])\s*</answer>")
FORM = re.compile(r"\s*<think>.*</think>\s*<answer>\s*[AB]\s*</answer>\s*", re.DOTALL)


def one_verdict(text, pattern=VERDICT):
    """The verdict after the thinking, if the text has one answer and no more."""
    after = text.rpartition("</think>")[2]
    if "<think>" in after or text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    found = pattern.search(after)
    return found[1].upper() if found else None


def each_tag_once(text):
    return all(text.count(tag) == 1 for tag in TAGS)


def well_formed(text):
    return each_tag_once(text) and FORM.fullmatch(text) is not None


def parser(verdict=one_verdict, form=well_formed):
    """parse() with another rule for the verdict or for the form."""
    def parse(text, style="msrl"):
        return Answer(verdict(text), form(text))
    return parse


def first_letter(text):
    found = re.search("[AB]", text)
    return found[0] if found else None


def last_answer(text):
    found = VERDICT.findall(text)
    return found[-1] if found else None


def answer_while_thinking(text):
    found = VERDICT.findall(text)
    return found[0] if len(found) == 1 else None


def letter_without_a_tag(text):
    end = re.sub(r"</?answer>", "", text.rpartition("</think>")[2]).strip()
    return end if end in OTHER else None


PARSERS = {
    "first letter A or B found anywhere": parser(verdict=first_letter),
    "last of several <answer>": parser(verdict=last_answer),
    "an answer inside the thinking counts": parser(verdict=answer_while_thinking),
    "a letter without its tag counts": parser(verdict=letter_without_a_tag),
    "ignores case": parser(verdict=lambda text: one_verdict(
        text, re.compile(VERDICT.pattern, re.IGNORECASE))),
    "only the beginning of the answer is read": parser(verdict=lambda text: one_verdict(
        text, re.compile(r"<answer>\s*([AB])"))),
    "well-formed with text around the tags": parser(
        form=lambda text: each_tag_once(text) and FORM.search(text) is not None),
    "well-formed with tags in any order": parser(form=each_tag_once),
    "well-formed with a tag twice": parser(form=lambda text: FORM.fullmatch(text) is not None),
}


# --------------------------------------------------------------------------------------- advantages
def statistics_of(rewards, every, kind):
    """The rewards whose mean and standard deviation count: [B or 1, n]."""
    return rewards if kind == "group" else every.flatten()[None]


def advantage_rule(base_of=statistics_of, correction=0, scaled=lambda scale: scale,
                   filtered=lambda z, difference: z, sigma_of=lambda sigma: sigma, added=0.0):
    """advantages() with another part."""
    def advantages(rewards, every, kind, scale_std, sigma):
        base = base_of(rewards, every, kind)
        mean = base.mean(1, keepdim=True)
        std = base.std(1, keepdim=True, correction=correction)
        spread = base.amax(1, keepdim=True) > base.amin(1, keepdim=True)
        difference = torch.where(spread, rewards - mean, 0.0)
        z = difference / (torch.where(spread, std, 1.0) + added)
        sigma = sigma_of(sigma)
        keep = torch.ones_like(z, dtype=torch.bool)
        if sigma > 0:
            keep = filtered(z, difference).abs() <= sigma
        return (z if scaled(scale_std) else difference), keep
    return advantages


advantages = advantage_rule()


def advantages_over_prompts(rewards, every, kind, scale_std, sigma):
    value, keep = advantages(rewards.mT, every, kind, scale_std, sigma)
    return value.mT, keep.mT


ADVANTAGES = {
    "1e-4 added to the standard deviation": advantage_rule(added=1e-4),
    "1e-6 added to the standard deviation": advantage_rule(added=1e-6),
    "1e-8 added to the standard deviation": advantage_rule(added=1e-8),
    "unbiased standard deviation": advantage_rule(correction=1),
    "statistics of this process only": advantage_rule(
        lambda rewards, every, kind: statistics_of(rewards, rewards, kind)),
    "always the group": advantage_rule(
        lambda rewards, every, kind: statistics_of(rewards, every, "group")),
    "always the batch": advantage_rule(
        lambda rewards, every, kind: statistics_of(rewards, every, "batch")),
    "divided by the standard deviation when it should not be": advantage_rule(
        scaled=lambda scale: not scale),
    "mean over prompts in place of answers": advantages_over_prompts,
    "no filter of outliers": advantage_rule(sigma_of=lambda sigma: 0.0),
    "filter on the difference in place of z": advantage_rule(
        filtered=lambda z, difference: difference),
}


# --------------------------------------------------------------------------------------------- loss
def k3(d):
    """d = log(reference / policy) of a token that the policy sampled."""
    return d.exp() - d - 1


def weighted_sum(terms, weight):
    return (terms * weight).sum()


def cost_in_the_reward(d, ratio):
    return -d * ratio


def half_square(d, ratio):
    return d * d / 2 * ratio.detach()


def loss_rule(pick=torch.min, sign=1, pre=True, exchanged=False, kl=k3, gain_sign=1,
              total=weighted_sum, k1=cost_in_the_reward, k2=half_square):
    """grpo_loss() with another part."""
    def loss(logp, old, ref, advantage, weight, clip_low, clip_high, pre_clip, beta, kind="k3"):
        low, high = (clip_high, clip_low) if exchanged else (clip_low, clip_high)
        step = logp - old
        if pre and pre_clip > 0:
            step = step.clamp(-math.log(pre_clip), math.log(pre_clip))
        ratio = step.exp()
        gain = pick(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
        d = sign * (ref - logp)
        penalty = {"k1": k1(d, ratio), "k2": k2(d, ratio), "k3": kl(d)}[kind]
        return total(-gain_sign * gain + beta * penalty, weight), {}
    return loss


loss = loss_rule()


def loss_weighted_inside(logp, old, ref, advantage, weight, *settings):
    return loss(logp, old, ref, advantage * weight, torch.ones_like(weight), *settings)


KL_ESTIMATORS = {
    "k1 in place of k3": loss_rule(kl=lambda d: -d),
    "k2 in place of k3": loss_rule(kl=lambda d: d * d / 2),
    "k3 of the opposite log-ratio": loss_rule(sign=-1),
    "divergence without a gradient": loss_rule(kl=lambda d: k3(d).detach()),
}
KL_PENALTIES = {
    "k1 without the ratio": loss_rule(k1=lambda d, ratio: -d),
    "k1 with a ratio that has no gradient": loss_rule(k1=lambda d, ratio: -d * ratio.detach()),
    "k2 without the ratio": loss_rule(k2=lambda d, ratio: d * d / 2),
    "k2 with a gradient through the ratio": loss_rule(k2=lambda d, ratio: d * d / 2 * ratio),
    "k3 in place of k2": loss_rule(k2=lambda d, ratio: k3(d) * ratio.detach()),
    "log-ratio of the wrong sign": loss_rule(sign=-1),
}
LOSSES = KL_ESTIMATORS | {
    "max in place of min": loss_rule(pick=torch.max),
    "only the clipped ratio": loss_rule(pick=lambda free, clipped: clipped),
    "ratio not clipped": loss_rule(pick=lambda free, clipped: free),
    "lower and upper clip exchanged": loss_rule(exchanged=True),
    "log-ratio not clipped before the exponential": loss_rule(pre=False),
    "advantage minimised": loss_rule(gain_sign=-1),
    "mean over tokens": loss_rule(
        total=lambda terms, weight: (terms * weight).sum() / (weight > 0).sum()),
    "weight inside the min": loss_weighted_inside,
}


# ------------------------------------------------------------------------------------- mini-batches
def steps_of_mini_batches(renewed=False, counted_over=lambda mini, prompts: mini):
    """grpo_update() on one process, answer by answer and without a KL. `logps(model, i, j)` are the
    log-probs of answer j to prompt i."""
    def steps(model, logps, optimizer, lengths, advantage, keep, cfg):
        every = range(len(lengths))
        answers = [(i, j) for i in every for j in range(len(lengths[0]))]
        frozen = {place: logps(model, *place).detach() for place in answers}
        for first in list(every)[::cfg.mini_batch] * cfg.updates_per_rollout:
            mini = every[first:first + cfg.mini_batch]
            count = sum(int(keep[i, j]) for i in counted_over(mini, every)
                        for j in range(len(lengths[0])))
            for i, j in answers:
                if i not in mini or not keep[i, j]:
                    continue
                logp = logps(model, i, j)
                ratio = (logp - (logp.detach() if renewed else frozen[i, j])).exp()
                clipped = ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
                gain = torch.min(ratio * advantage[i, j], clipped * advantage[i, j])
                (-gain.sum() / lengths[i][j] / max(count, 1)).backward()
            optimizer.step()
            model.zero_grad()
    return steps


mini_batches = steps_of_mini_batches()
MINI_BATCHES = {
    "old log-probs taken anew for each mini-batch": steps_of_mini_batches(renewed=True),
    "normaliser of the whole rollout": steps_of_mini_batches(
        counted_over=lambda mini, prompts: prompts),
}


# ------------------------------------------------------------------------------------------ packing
class Packed(NamedTuple):
    ids: torch.Tensor        # [b, P + S]
    positions: torch.Tensor  # [b, P + S]
    sees: torch.Tensor       # [b, 1, P + S, P + S]
    source: torch.Tensor     # [b, S]
    target: torch.Tensor     # [b, S]
    owner: torch.Tensor      # [b, S]
    media: dict              # what the model takes besides, {} without media


def pack(prompts, answers, pad_id, device):
    width = max(len(prompt.ids) for prompt in prompts)
    room = max(sum(len(answer) for answer in group) for group in answers)
    size = len(prompts), width + room
    ids = torch.full(size, pad_id, device=device)
    positions = torch.zeros(size, dtype=torch.long, device=device)
    owner = torch.full(size, -1, device=device)
    source = torch.zeros(len(prompts), room, dtype=torch.long, device=device)
    for i, (prompt, group) in enumerate(zip(prompts, answers, strict=True)):
        begin = width - len(prompt.ids)
        ids[i, begin:width] = torch.tensor(prompt.ids)
        positions[i, begin:width] = torch.arange(len(prompt.ids))
        owner[i, begin:width] = 0
        begin = width
        for number, answer in enumerate(group, 1):
            end = begin + len(answer)
            ids[i, begin:end] = torch.tensor(answer)
            positions[i, begin:end] = len(prompt.ids) + torch.arange(len(answer))
            owner[i, begin:end] = number
            source[i, begin - width:end - width] = torch.arange(begin, end) - width
            source[i, begin - width] = 0  # the prompt's last token
            begin = end
    query, key = owner[:, :, None], owner[:, None, :]
    sees = ((key == 0) | (key == query)).tril()[:, None]
    return Packed(ids, positions, sees, source, ids[:, width:], owner[:, width:],
                  media_of(prompts))


def media_of(prompts):
    pixels = [prompt.pixels for prompt in prompts if prompt.pixels is not None]
    return {"pixel_values": torch.cat(pixels)} if pixels else {}


def real_tokens(packed, prompts):
    """[b, P + S]: True where there is no padding."""
    width = packed.ids.shape[1] - packed.target.shape[1]
    places = torch.arange(width)
    in_prompt = torch.stack([places >= width - len(prompt.ids) for prompt in prompts])
    return torch.cat([in_prompt, packed.owner > 0], 1)


def answers_see_each_other(prompts, *more):
    packed = pack(prompts, *more)
    real = real_tokens(packed, prompts)
    itself = torch.eye(real.shape[1], dtype=torch.bool)
    return packed._replace(sees=(real[:, None, :].expand(packed.sees[:, 0].shape).tril()
                                 | itself)[:, None])


def padding_is_seen(prompts, *more):
    packed = pack(prompts, *more)
    padding = ~real_tokens(packed, prompts)[:, None, None, :]
    return packed._replace(sees=packed.sees | padding.expand(packed.sees.shape).tril())


def last_prompt_token_is_hidden(prompts, *more):
    packed = pack(prompts, *more)
    width = packed.ids.shape[1] - packed.target.shape[1]
    sees = packed.sees.clone()
    sees[:, :, width:, width - 1] = False
    return packed._replace(sees=sees)


def positions_continue(prompts, *more):
    packed = pack(prompts, *more)
    count = real_tokens(packed, prompts).long().cumsum(1)
    return packed._replace(positions=(count - 1).clamp(min=0))


def positions_from_padded_width(prompts, *more):
    packed = pack(prompts, *more)
    width = packed.ids.shape[1] - packed.target.shape[1]
    padding = torch.tensor([width - len(prompt.ids) for prompt in prompts])
    positions = packed.positions.clone()
    positions[:, width:] += padding[:, None]
    return packed._replace(positions=positions)


def source_off_by_one(*args):
    packed = pack(*args)
    return packed._replace(source=(packed.source + 1).clamp(max=packed.target.shape[1]))


def predicted_by_the_answer_before(*args):
    packed = pack(*args)
    return packed._replace(source=torch.arange(packed.target.shape[1]).expand_as(packed.source))


def source_of_the_sequence(*args):
    """Not in PACKINGS: packed_logps stops at such a source, and no oracle has anything to reject.
    The labs tell it by its size."""
    packed = pack(*args)
    width = packed.ids.shape[1] - packed.target.shape[1]
    return packed._replace(source=packed.source + width - 1)


def images_rolled(*args):
    packed = pack(*args)
    return packed._replace(media={"pixel_values": packed.media["pixel_values"].roll(1, 0)})


PACKINGS = {
    "answers see each other": answers_see_each_other,
    "padding is seen": padding_is_seen,
    "answers do not see the prompt's last token": last_prompt_token_is_hidden,
    "positions continue after the previous answer": positions_continue,
    "positions start at the padded width": positions_from_padded_width,
    "source off by one": source_off_by_one,
    "first token predicted by the answer before": predicted_by_the_answer_before,
    "images in another order": images_rolled,
}


# ---------------------------------------------------------------------- attention of packed answers
def places_with(columns=lambda columns, t: columns, own=torch.tril, back=lambda back: back,
                prompt_seen=lambda rows: rows, row=lambda i: i, causal=lambda causal: causal):
    """decoding.answer_places, one of whose parts is wrong. Here one answer after the other."""
    def answer_places(answers, sees):
        length, group_size = sees.shape[3], max(len(group) for group in answers)
        longest = max(len(answer) for group in answers for answer in group)
        width = length - max(sum(map(len, group)) for group in answers)
        places, seen = [], []
        way_back = torch.zeros(len(answers), length - width, dtype=torch.long)
        t = torch.arange(longest)
        for i, group in enumerate(answers):
            begin = width
            for g in range(group_size):
                n = len(group[g]) if g < len(group) else 0
                at = columns(begin + torch.minimum(t, torch.tensor(max(n - 1, 0))), begin + t)
                at = at.clamp(max=length - 1)
                rows = sees[i, 0, at]
                places.append(row(i) * length + at)
                seen.append(torch.cat([prompt_seen(rows[:, :width]), own(rows[:, at])], 1))
                way_back[i, begin - width:begin - width + n] = \
                    (row(i) * group_size + g) * longest + t[:n]
                begin += n
        no_padding = all(sees[i, 0, width - 1, :width].all() for i in range(len(answers)))
        return (torch.stack(places), torch.stack(seen)[:, None], back(way_back).flatten(),
                causal(no_padding))
    return answer_places


ANSWER_PLACES = {
    "answers begin one token late": places_with(columns=lambda columns, t: columns + 1),
    "an answer sees its future": places_with(own=torch.ones_like),
    "an answer does not see itself": places_with(own=torch.zeros_like),
    "padding of the prompt is seen": places_with(prompt_seen=torch.ones_like),
    "padding before prompts is taken for none": places_with(causal=lambda causal: True),
    "the prompt is not seen": places_with(prompt_seen=torch.zeros_like),
    "back to the token before": places_with(back=lambda back: (back - 1).clamp(min=0)),
    "the first prompt's answers for all prompts": places_with(row=lambda i: 0),
}


# ----------------------------------------------------------------------------------------- sampling
def allowed_logits(logits, image_token_id):
    if image_token_id is None:
        return logits
    return logits.index_fill(-1, torch.tensor([image_token_id]), -math.inf)


def until_the_end(tokens, eos_ids):
    """The answer up to its first end-of-sequence token."""
    for place, token in enumerate(tokens):
        if token in eos_ids:
            return tokens[:place + 1]
    return tokens


def without_the_end(tokens, eos_ids):
    """An empty answer has no log-prob and no weight, so one token stays."""
    ended = until_the_end(tokens, eos_ids)
    return ended[:-1] if ended[-1] in eos_ids and len(ended) > 1 else ended


def sampler(heated=lambda logits, temperature: logits / temperature, allowed=allowed_logits,
            scored=lambda logits, heated: heated, cut=until_the_end, order=lambda prompts: prompts,
            seeded=True):
    """sample_group() without a cache, prompt by prompt, with another part."""
    @torch.no_grad()
    def sample_group(model, encoder, prompts, group_size, temperature, max_new_tokens, generator):
        ids, logps = [], []
        for prompt in order(prompts):
            sequence = torch.tensor([prompt.ids])
            chosen = []
            for _ in range(max_new_tokens):
                media = {}
                if prompt.pixels is not None:
                    media["pixel_values"] = prompt.pixels.repeat(len(sequence), 1, 1, 1)
                logits = model(input_ids=sequence, **media).logits[:, -1].float()
                logits = allowed(logits.expand(group_size, -1), encoder.image_token_id)
                hot = heated(logits, temperature or 1.0)
                token = hot.argmax(-1, keepdim=True)
                if temperature > 0:
                    token = torch.multinomial(hot.softmax(-1), 1,
                                              generator=generator if seeded else None)
                logp = scored(logits, hot).log_softmax(-1)
                chosen.append(logp.gather(1, token))
                sequence = torch.cat([sequence.expand(group_size, -1), token], 1)
            ids.append([])
            logps.append([])
            new = sequence[:, len(prompt.ids):].tolist()
            for tokens, logp in zip(new, torch.cat(chosen, 1).tolist(), strict=True):
                answer = cut(tokens, encoder.eos_ids)
                ids[-1].append(answer)
                logps[-1].append(logp[:len(answer)])
        return SimpleNamespace(ids=ids, logp=logps)
    return sample_group


sample_group = sampler()


def likeliest(logits, n=10):
    """Only the n likeliest tokens may be drawn."""
    least = logits.topk(n).values[:, -1:]
    return logits.masked_fill(logits < least, -math.inf)


SAMPLERS = {
    "temperature ignored": sampler(heated=lambda logits, temperature: logits),
    "temperature applied twice": sampler(
        heated=lambda logits, temperature: logits / temperature ** 2),
    "only the ten likeliest tokens": sampler(
        heated=lambda logits, temperature: likeliest(logits / temperature)),
    "log-probs without the temperature": sampler(scored=lambda logits, heated: logits),
    "an image token may be drawn": sampler(allowed=lambda logits, image_token_id: logits),
    "answers given to the neighbouring prompt": sampler(
        order=lambda prompts: [*prompts[1:], prompts[0]]),
    "end-of-sequence token cut off": sampler(cut=without_the_end),
    "tokens after the end of the sequence kept": sampler(cut=lambda tokens, eos_ids: tokens),
    "the seed is ignored": sampler(seeded=False),
}


# ---------------------------------------------------------------------- labels of fine-tuning (SFT)
class Batch(NamedTuple):
    ids: torch.Tensor     # [b, L]
    mask: torch.Tensor    # [b, L]
    positions: torch.Tensor  # [b, L]
    labels: torch.Tensor  # [b, L], -100 where nothing is learned
    media: dict


def prompt_hidden(prompt, answer):
    return [-100] * len(prompt) + answer


def pad_right(values, width, fill):
    return values + [fill] * (width - len(values))


def pad_left(values, width, fill):
    return [fill] * (width - len(values)) + values


def collator(label=prompt_hidden, pad=pad_right, hidden=lambda batch, pad_id: batch.labels):
    """collate() with another rule for the labels."""
    def collate(prompts, answers, pad_id, device):
        pairs = list(zip(prompts, answers, strict=True))
        width = max(len(prompt.ids) + len(answer) for prompt, answer in pairs)
        ids, mask, labels = [], [], []
        for prompt, answer in pairs:
            whole = prompt.ids + answer
            ids.append(pad_right(whole, width, pad_id))
            mask.append(pad_right([1] * len(whole), width, 0))
            labels.append(pad(label(prompt.ids, answer), width, -100))
        batch = Batch(torch.tensor(ids), torch.tensor(mask),
                      torch.arange(width).expand(len(ids), width), torch.tensor(labels),
                      media_of(prompts))
        return batch._replace(labels=hidden(batch, pad_id))
    return collate


collate = collator()

SFT_MASKS = {
    "prompt is trained on too": collator(  # but for its first token, which nothing predicts
        label=lambda prompt, answer: [-100] + prompt[1:] + answer),
    "labels shifted by one": collator(
        label=lambda prompt, answer: [-100] * (len(prompt) - 1) + answer),
    "no end-of-sequence token": collator(
        label=lambda prompt, answer: prompt_hidden(prompt, answer[:-1] + [-100])),
    "only the end-of-sequence token": collator(
        label=lambda prompt, answer: prompt_hidden(prompt, [-100] * (len(answer) - 1)
                                                   + answer[-1:])),
    "padding is trained on": collator(
        hidden=lambda batch, pad_id: batch.labels.where(batch.mask > 0, pad_id)),
    "labels padded on the left": collator(pad=pad_left),
    "every token equal to the padding token is hidden": collator(
        hidden=lambda batch, pad_id: batch.labels.masked_fill(batch.ids == pad_id, -100)),
}


def nll_rule(ahead=1, total=torch.sum, counted=lambda labels: labels >= 0):
    """answer_nll() with another part. A row of logits predicts the token `ahead` of it."""
    def answer_nll(model, ids, mask, positions, labels, media):
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False,
                       **media).logits
        width = labels.shape[1]
        first, last = max(0, -ahead), min(width, width - ahead)
        logp = logits[:, first:last].log_softmax(-1)
        target = labels[:, first + ahead:last + ahead]
        nll = -logp.gather(-1, target.clamp(min=0)[..., None])[..., 0]
        return total(nll[target >= 0]), counted(labels).sum().item()
    return answer_nll


answer_nll = nll_rule()

SFT_LOSSES = {
    "mean in place of the sum": nll_rule(total=torch.mean),
    "a token's own logits in place of those before it": nll_rule(ahead=0),
    "logits of the token after": nll_rule(ahead=-1),
    "padding and prompt count in the normaliser": nll_rule(counted=torch.ones_like),
    "rows in place of tokens in the normaliser": nll_rule(
        counted=lambda labels: (labels >= 0).any(1)),
}


# ----------------------------------------------------------------------------- selection (stage 2b)
def by_majority(verdicts):
    """-> the pseudo-label, or None and why the row is dropped."""
    votes = Counter(verdict for verdict in verdicts if verdict is not None)
    if not votes:
        return None, "no verdict"
    if votes["A"] == votes["B"]:
        return None, "tie"
    return votes.most_common(1)[0][0], None


def most_confident(places, confidences):
    return max(places, key=lambda place: confidences[place])


def selector(voters=lambda answers: [answer.verdict for answer in answers], majority=by_majority,
             formed=lambda answer: answer.well_formed, choose=most_confident):
    """select() with another part."""
    parse = parser()

    def select(texts, confidences):
        answers = [parse(text) for text in texts]
        label, why = majority(voters(answers))
        if label is None:
            return None, why
        places = [place for place, answer in enumerate(answers)
                  if answer.verdict == label and formed(answer)]
        if not places:
            return None, "malformed"
        return choose(places, confidences), None
    return select


select = selector()


def surest_of_all(texts, confidences):
    parse = parser()
    places = [place for place, text in enumerate(texts) if parse(text).well_formed]
    if not places:
        return None, "no verdict"
    return most_confident(places, confidences), None


def first_wins_ties(verdicts):
    votes = Counter(verdict for verdict in verdicts if verdict is not None)
    return (votes.most_common(1)[0][0], None) if votes else (None, "no verdict")


def silence_votes(verdicts):
    label = Counter(verdicts).most_common(1)[0][0]
    return label, None if label else "no verdict"


SELECTION = {
    "most confident before the majority": surest_of_all,
    "tie won by the first": selector(majority=first_wins_ties),
    "malformed answers have no vote": selector(
        voters=lambda answers: [answer.verdict for answer in answers if answer.well_formed]),
    "answers without a verdict have a vote": selector(majority=silence_votes),
    "malformed answers may be kept": selector(formed=lambda answer: True),
    "least confident of the majority": selector(
        choose=lambda places, confidences: min(places, key=lambda place: confidences[place])),
    "first of the majority": selector(choose=lambda places, confidences: places[0]),
}


# --------------------------------------------------------------------------------- replay (stage 2)
def share_of(batch_size, captions, texts):
    return round(batch_size * texts / (captions + texts))


def in_turn(rows, step, n, seed):
    """n rows, all before any comes again."""
    order = random.Random(seed).sample(rows, len(rows))
    return [order[(step * n + k) % len(order)] for k in range(n)]


def spread_over(minis, captions, texts):
    """Captions, then texts, in the same proportion in each mini-batch."""
    batch = captions + texts
    return [row for first in range(minis) for row in batch[first::minis]]


def mixing_rule(share=share_of, step_of_texts=lambda step: step, mixed=spread_over, added=0):
    """mixed_batch() with another part."""
    def mixed_batch(rows, replay, step, cfg):
        ratio = [int(part) for part in cfg.replay_ratio.split(":")]
        n = share(cfg.batch_size, *ratio)
        texts = in_turn(replay, step_of_texts(step), n, cfg.seed)
        captions = in_turn(rows, step, cfg.batch_size - n + added * n, cfg.seed)
        return mixed(cfg.batch_size // (cfg.mini_batch or cfg.batch_size), captions, texts)
    return mixed_batch


mixed_batch = mixing_rule()


def mixed_by_chance(rows, replay, step, cfg):
    ratio = [int(part) for part in cfg.replay_ratio.split(":")]
    rng = random.Random(step)
    weights = [ratio[0] / sum(ratio), ratio[1] / sum(ratio)]
    return [rng.choice(rng.choices([rows, replay], weights)[0]) for _ in range(cfg.batch_size)]


REPLAYS = {
    "a mixture by chance": mixed_by_chance,
    "ratio upside down": mixing_rule(share=lambda n, captions, texts: share_of(n, texts, captions)),
    "texts as a share of the captions": mixing_rule(
        share=lambda n, captions, texts: round(n * texts / captions) if captions > 1 else 0),
    "the same texts in every batch": mixing_rule(step_of_texts=lambda step: 0),
    "all texts in the last mini-batch": mixing_rule(
        mixed=lambda minis, captions, texts: captions + texts),
    "texts on top of a full batch": mixing_rule(added=1),
}


def both_right(preds, label):
    return all(pred == label for pred in preds)


def choosing_rule(good=both_right, n_of=min, stops=True):
    """choose_replay() with another rule for which rows are good. It judges as the source does."""
    def choose_replay(model, encoder, rows, cfg):
        rows = common.batch_of(rows, 0, n_of(cfg.replay_candidates, len(rows)), cfg.seed)
        preds = [[] for _ in rows]
        for judgement in common.judge(model, encoder, rows, None):
            preds[judgement["at"]].append(judgement["pred"])
        chosen = [row for row, named in zip(rows, preds, strict=True) if good(named, row["label"])]
        if stops and not chosen:
            raise SystemExit("no row is right in both orders; start from a better model")
        return chosen
    return choose_replay


choose_replay = choosing_rule()

REPLAYED = {
    "right in one order suffices": choosing_rule(lambda preds, label: label in preds),
    "no verdict counts as right": choosing_rule(
        lambda preds, label: both_right([pred for pred in preds if pred], label)),
    "both orders agree, right or wrong": choosing_rule(
        lambda preds, label: preds[0] is not None and len(set(preds)) == 1),
    "rows that are judged wrong": choosing_rule(
        lambda preds, label: not both_right(preds, label)),
    "every row": choosing_rule(lambda preds, label: True),
    "rows come twice if there are fewer than replay_candidates": choosing_rule(
        n_of=lambda candidates, n: candidates),
    "all rows judged in place of replay_candidates": choosing_rule(n_of=lambda candidates, n: n),
    "an empty list in place of SystemExit": choosing_rule(stops=False),
}


# -------------------------------------------------------------------- exchanging the two candidates
def swap(row):
    def turned(value):
        return value[::-1] if value and len(value) == 2 else value

    def renamed(match):
        return f"{match[1]} {OTHER[match[2]]}"
    rationale = row.get("rationale")
    if rationale:
        rationale = re.sub(r"\b(Response|Image|Video) ([AB])\b", renamed, rationale)
    return {**row, "label": OTHER[row["label"]], "responses": turned(row["responses"]),
            "media": turned(row["media"]), "captions": turned(row["captions"]),
            "rationale": rationale}


def swap_without(field):
    """swap() that leaves this field as it is."""
    def swap_the_rest(row):
        return {**swap(row), field: row.get(field)}
    return swap_the_rest


def swap_in_place(row):
    row.update(swap(row))
    return row


def swap_names_in_turn(row):
    """A becomes B, and then every B becomes A."""
    rationale = row["rationale"].replace(" A", " B").replace(" B", " A")
    return {**swap(row), "rationale": rationale}


SWAPS = {
    "the label stays": swap_without("label"),
    "the responses stay": swap_without("responses"),
    "the media stay": swap_without("media"),
    "the captions stay": swap_without("captions"),
    "the rationale stays": swap_without("rationale"),
    "the rationale's names exchanged one after the other": swap_names_in_turn,
    "the given row is changed": swap_in_place,
}


# ------------------------------------------------------------------------------ summing verdicts up
def wilson(p, n, z=1.96):
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    total = 1 + z * z / n
    return [max(0.0, (middle - half) / total), min(1.0, (middle + half) / total)]


def points(votes, label, tied=0.5):
    """What the votes of one order earn."""
    right, wrong = votes.count(label), votes.count(OTHER[label])
    if right == wrong:
        return tied if right else 0.0
    return float(right > wrong)


def side_of(votes):
    """The majority's side, None for a tie or no verdict."""
    a, b = votes.count("A"), votes.count("B")
    return None if a == b else "A" if a > b else "B"


def evaluation(earned=points, counted=lambda orders: orders, compared=lambda both, rows: both,
               questions=lambda rows, preds: rows, shown=lambda pred: pred["order"] == "AB",
               share_of=lambda stated, preds: stated):
    """summarize() with another part."""
    def summarize(rows, preds):
        by_row = {}
        for pred in preds:
            orders = by_row.setdefault(pred["at"], {})
            orders.setdefault(pred["order"], []).append(pred["pred"])
        row_points, both, flips = [], 0, 0
        for place, orders in by_row.items():
            label = rows[place]["label"]
            each = [earned(votes, label) for votes in counted(orders).values()]
            if each:
                row_points.append(sum(each) / len(each))
            sides = [side_of(votes) for votes in orders.values()]
            if len(sides) == 2 and None not in sides:
                both += 1
                flips += sides[0] != sides[1]
        accuracy = sum(row_points) / max(1, len(row_points))
        judged = compared(both, len(by_row))
        stated = [pred for pred in preds if pred["pred"] is not None]
        says_a = sum((pred["pred"] == "A") == shown(pred) for pred in stated)
        return {"accuracy": accuracy, "n": len(row_points),
                "interval": wilson(accuracy, max(1, questions(len(row_points), len(preds)))),
                "order_flips": flips / judged if judged else 0.0,
                "share_a": says_a / len(share_of(stated, preds)) if stated else 0.0,
                "unparsable": 1 - len(stated) / len(preds),
                "format": sum(well_formed(pred["text"]) for pred in preds) / len(preds)}
    return summarize


summarize = evaluation()


def share_of_votes(votes, label):
    stated = [vote for vote in votes if vote is not None]
    return stated.count(label) / len(stated) if stated else 0.0


def orders_with_a_verdict(orders):
    return {order: votes for order, votes in orders.items() if any(votes)}


EVALUATIONS = {
    "tie counts as right": evaluation(lambda votes, label: points(votes, label, tied=1.0)),
    "tie counts as wrong": evaluation(lambda votes, label: points(votes, label, tied=0.0)),
    "unparsable left out": evaluation(counted=orders_with_a_verdict),
    "unparsable counts one half": evaluation(
        lambda votes, label: points(votes, label) if any(votes) else 0.5),
    "share of the votes in place of their majority": evaluation(share_of_votes),
    "only the first order counts": evaluation(
        counted=lambda orders: {order: orders[order] for order in orders if order == "AB"}),
    "flips as a share of all rows": evaluation(compared=lambda both, rows: rows),
    "interval over judgements in place of rows": evaluation(questions=lambda rows, preds: preds),
    "share of A among candidates in place of places": evaluation(shown=lambda pred: True),
    "share of A among all votes": evaluation(share_of=lambda stated, preds: preds),
}


# ------------------------------------------------------------------------------- ranking: win rates
def beta_error(won, met):
    """Standard deviation of Beta(1 + won, 1 + lost)."""
    a, b = 1 + won, 1 + met - won
    return math.sqrt(a * b / (a + b + 1)) / (a + b)


def win_rule(loser=lambda share: 1 - share, winner=lambda share: share,
             games_of=lambda met, n, games: met, error=beta_error):
    """win_rates() with another part."""
    def win_rates(n, games):
        won, met = [0.0] * n, [0] * n
        for i, j, share in games:
            won[i] += winner(share)
            won[j] += loser(share)
            met[i] += 1
            met[j] += 1
        rewards, errors = [], []
        for candidate in range(n):
            played = games_of(met[candidate], n, len(games))
            rewards.append(won[candidate] / played if played else 0.5)
            errors.append(error(won[candidate], met[candidate]))
        return rewards, errors
    return win_rates


win_rates = win_rule()


def binomial_error(won, met):
    rate = won / met
    return math.sqrt(rate * (1 - rate) / met)


WIN_RATES = {
    "the loser gets nothing": win_rule(loser=lambda share: 0.0),
    "half a win counts as a win": win_rule(winner=lambda share: float(share >= 0.5),
                                           loser=lambda share: float(share < 0.5)),
    "divided by all games": win_rule(games_of=lambda met, n, games: games),
    "divided by all opponents, met or not": win_rule(games_of=lambda met, n, games: n - 1),
    "no error after winning every game": win_rule(error=binomial_error),
    "variance in place of standard error": win_rule(
        error=lambda won, met: beta_error(won, met) ** 2),
}


# ---------------------------------------------------------------------------- comparing two judges
def totals_of(rows, values):
    totals = Counter()
    for row, value in zip(rows, values, strict=True):
        totals[row["cluster"]] += row["weight"] * value
    return list(totals.values())


def sign_p(better, worse, equal):
    n, fewer = better + worse, min(better, worse)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2 ** n)


def paired_spread(first, second, totals, corrected=True):
    """Variance of the sum of the questions' paired differences."""
    weights = sum(row["weight"] for row in first)
    values = [a["points"] - b["points"] for a, b in zip(first, second, strict=True)]
    mean = sum(row["weight"] * value for row, value in zip(first, values, strict=True)) / weights
    sums = totals(first, [value - mean for value in values])
    n = len(sums)
    return sum(value ** 2 for value in sums) * (n / max(1, n - 1) if corrected else 1)


def uncorrected_spread(first, second, totals):
    return paired_spread(first, second, totals, corrected=False)


def unpaired_spread(first, second, totals):
    """As if each judge had questions of its own."""
    nothing = [row | {"points": 0.0} for row in first]
    return paired_spread(first, nothing, totals) + paired_spread(nothing, second, totals)


def by_rows(rows, values):
    return [row["weight"] * value for row, value in zip(rows, values, strict=True)]


def rows_with_weight(rows):
    return [row for row in rows if row["weight"] > 0]


def comparison(sign=1, p=sign_p, spread=paired_spread, tested=totals_of, measured=totals_of,
               z=1.96, used=rows_with_weight, counted=lambda rows, used: used):
    """compare() with another part."""
    def compare(first, second):
        all_rows, first, second = first, used(first), used(second)
        differences = [sign * (a["points"] - b["points"])
                       for a, b in zip(first, second, strict=True)]
        weights = sum(row["weight"] for row in first)
        middle = sum(by_rows(first, differences)) / weights
        half = z * math.sqrt(spread(first, second, measured)) / weights
        totals = tested(first, differences)
        better = sum(total > 1e-9 for total in totals)
        worse = sum(total < -1e-9 for total in totals)
        return {"difference": middle, "interval": [middle - half, middle + half],
                "first_better": better, "second_better": worse,
                "n": len(counted(all_rows, first)),
                "questions": len(totals_of(first, differences)),
                "sign_test_p": p(better, worse, len(totals) - better - worse)}
    return compare


compare = comparison()


def one_sided(better, worse, equal):
    return sign_p(better, worse, equal) / 2


def equal_questions_count(better, worse, equal):
    return sign_p(better + equal // 2, worse + equal - equal // 2, 0)


COMPARISONS = {
    "rows in place of questions in the sign test": comparison(tested=by_rows),
    "rows in place of questions in the interval": comparison(measured=by_rows),
    "interval as if the judges had other rows": comparison(spread=unpaired_spread),
    "interval of one standard error": comparison(z=1.0),
    "one-sided p": comparison(p=one_sided),
    "questions of equal points have a share in p": comparison(p=equal_questions_count),
    "second minus first": comparison(sign=-1),
    "n counts rows of weight 0": comparison(counted=lambda rows, used: rows),
    "rows of weight 0 not left out": comparison(used=lambda rows: rows),
    "no n / (n - 1) in the interval": comparison(spread=uncorrected_spread),
}


# ------------------------------------------------------------------------ length bias and curation
def characters_more(row):
    a, b = (len(text) for text in row["responses"])
    return a - b if row["label"] == "A" else b - a


def by_chance(rows, n, seed):
    return random.Random(seed).sample(rows, n)


def balance_rule(extra=characters_more, kept_equal=True, repeated=False, dropped=True,
                 drawn=by_chance, stops=True):
    """balanced() with another part."""
    def balanced(rows, seed):
        sides = {1: [], -1: [], 0: []}
        for row in rows:
            more = extra(row) if row["responses"] else 0
            sides[(more > 0) - (more < 0)].append(row)
        rng, longer, shorter = random.Random(seed), sides[1], sides[-1]
        n = min(len(longer), len(shorter))
        if repeated:
            n = max(len(longer), len(shorter))
            longer = longer + rng.choices(longer, k=n - len(longer))
            shorter = shorter + rng.choices(shorter, k=n - len(shorter))
        elif dropped:
            longer, shorter = drawn(longer, n, seed), drawn(shorter, n, seed)
        kept = [*(sides[0] if kept_equal else []), *longer, *shorter]
        if stops and not kept:
            raise SystemExit("no row is left: the better response is never the longer one, "
                             "or always")
        return kept
    return balanced


balanced = balance_rule()

BALANCES = {
    "the longer place in place of the better response": balance_rule(
        extra=lambda row: len(row["responses"][0]) - len(row["responses"][1])),
    "words in place of characters": balance_rule(extra=lambda row: characters_more(
        row | {"responses": [text.split() for text in row["responses"]]})),
    "rows of equal length dropped": balance_rule(kept_equal=False),
    "rare rows repeated in place of frequent ones dropped": balance_rule(repeated=True),
    "nothing dropped": balance_rule(dropped=False),
    "the same rows for every seed, such as the first": balance_rule(
        drawn=lambda rows, n, seed: rows[:n]),
    "the seed is ignored": balance_rule(drawn=lambda rows, n, seed: random.sample(rows, n)),
    "an empty list in place of SystemExit": balance_rule(stops=False),
}


def flip_rule(candidates=lambda strengths: [i for i, s in enumerate(strengths) if s < 0],
              worst_first=sorted, half=lambda n: n // 2):
    """to_flip() with another part."""
    def to_flip(strengths):
        places = candidates(strengths)
        order = worst_first([(strengths[i], i) for i in places])
        return {i for _, i in order[:half(len(places))]}
    return to_flip


to_flip = flip_rule()

FLIPS = {
    "all negative ones": flip_rule(half=lambda n: n),
    "the upper half of the negative ones": flip_rule(
        worst_first=lambda pairs: sorted(pairs, reverse=True)),
    "half of all rows": flip_rule(candidates=lambda strengths: list(range(len(strengths)))),
    "an odd number's half rounded up": flip_rule(half=lambda n: (n + 1) // 2),
    "the first in the file": flip_rule(worst_first=list),
}


# ------------------------------------------------------------------------------- Bradley-Terry loss
def bt_loss(chosen, rejected, zero_coefficient):
    return -F.logsigmoid(chosen - rejected) + zero_coefficient * (chosen + rejected) ** 2


def no_sigmoid(chosen, rejected, zero_coefficient):
    return -(chosen - rejected) + zero_coefficient * (chosen + rejected) ** 2


def sides_exchanged(chosen, rejected, zero_coefficient):
    return bt_loss(rejected, chosen, zero_coefficient)


def no_logarithm(chosen, rejected, zero_coefficient):
    return -torch.sigmoid(chosen - rejected) + zero_coefficient * (chosen + rejected) ** 2


def each_score_alone(chosen, rejected, zero_coefficient):
    return (-F.logsigmoid(chosen) - F.logsigmoid(-rejected)
            + zero_coefficient * (chosen + rejected) ** 2)


def difference_regularised(chosen, rejected, zero_coefficient):
    return -F.logsigmoid(chosen - rejected) + zero_coefficient * (chosen - rejected) ** 2


def mean_regularised(chosen, rejected, zero_coefficient):
    return -F.logsigmoid(chosen - rejected) + zero_coefficient * ((chosen + rejected) / 2) ** 2


def log_of_the_sigmoid(chosen, rejected, zero_coefficient):
    """Right in exact arithmetic; in fp32 the sigmoid of -100 is 0."""
    loss = -torch.sigmoid(chosen - rejected).log()
    return loss + zero_coefficient * (chosen + rejected) ** 2


def sum_rewarded(chosen, rejected, zero_coefficient):
    return bt_loss(chosen, rejected, -zero_coefficient)


BT_LOSSES = {
    "difference without the sigmoid": no_sigmoid,
    "sides exchanged": sides_exchanged,
    "probability in place of its logarithm": no_logarithm,
    "log of the sigmoid": log_of_the_sigmoid,
    "each score alone": each_score_alone,
    "difference in place of the sum in the regulariser": difference_regularised,
    "mean in place of the sum in the regulariser": mean_regularised,
    "regulariser with the opposite sign": sum_rewarded,
}
