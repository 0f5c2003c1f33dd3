"""
The small numbers of the labs' pages, each over three seeds; about a minute. Those of whole
trainings stand in tests/RESULTS.md.

    python tests/labs/measure.py
    python tests/labs/measure.py --only 1 6
"""

import argparse
import random
import time
from pathlib import Path

import diagnosis  # noqa: F401  (puts the repository on the path)
import exercises
import test_grpo
import test_stages
import toy_world
import torch
import wrong_versions
from helpers import small_world, thinks

import common
from data import load_rows
import eval as evaluation
import stage0_sft
import stage1_text_grpo as stage1
import stage2b_cmkd as cmkd

SEEDS = 0, 1, 2


def show(name, values, form="{:.3g}"):
    print(f"    {name}: " + " ".join(form.format(value) for value in values))


def rows_of(name, n, encoder, seed):
    """n rows of a file of the toy world."""
    folder = small_world(Path(exercises.world().held.name, f"{name}{seed}"), seed, **{name: n})
    return load_rows(str(folder / f"{name}.jsonl"), encoder, quiet=True)


def lab_1():
    """Of 60 random attacks, those that each wrong parser reads otherwise than ours."""
    for name, parse in wrong_versions.PARSERS.items():
        counts = []
        for seed in SEEDS:
            fooled = 0
            for text in exercises.attacks(seed):
                case = "form", text, "msrl"
                fooled += exercises.parsed(parse, case) != exercises.parsed(common.parse, case)
            counts.append(fooled)
        show(name, counts)


def lab_2():
    """24 rationales of stage 0, the toy backbone: loss per answer token, and what it seems to be
    where prompt and padding count in the normaliser."""
    model, encoder = common.load(toy_world.PREBUILT)
    right, wrong = [], []
    for seed in SEEDS:
        rows = rows_of("sft", 24, encoder, seed)
        batch = test_grpo.sft_batch(encoder, rows, stage0_sft.Config())
        with torch.no_grad():
            nll, tokens = stage0_sft.answer_nll(model, *batch)
        right.append(nll.item() / tokens)
        wrong.append(nll.item() / batch[3].numel())
    show("per answer token", right)
    show("prompt and padding counted", wrong)


def lab_4():
    """One token, 11 words, random policy and reference: mean and standard deviation of k1 and k3
    over the policy's words."""
    for seed in SEEDS:
        policy, reference, _ = test_grpo.three_policies(seed)
        p, d = policy.softmax(0), reference.log_softmax(0) - policy.log_softmax(0)
        for name, values in (("k1", -d), ("k3", d.exp() - d - 1)):
            mean = (p * values).sum()
            show(f"seed {seed}, {name}: mean, std", (mean, (p * (values - mean) ** 2).sum().sqrt()))


def lab_5():
    """Toy backbone, 4 text prompts x 8 answers of up to 24 tokens, temperature 0.7: mean gap
    between the sampler's log-probs and those of the packed forward, nats a token."""
    model, encoder = common.load(toy_world.PREBUILT)
    prompts = [encoder(row) for row in rows_of("text_rl", 4, encoder, 0)]
    samplers = {"ours": stage1.sample_group, **wrong_versions.SAMPLERS}
    for name in ("ours", "temperature ignored", "log-probs without the temperature",
                 "only the ten likeliest tokens"):
        gaps = []
        for seed in SEEDS:
            rollout = samplers[name](model, encoder, prompts, 8, 0.7, 24,
                                     torch.Generator().manual_seed(seed))
            with torch.no_grad():
                logp, _, owner = stage1.packed_logps(model, encoder, prompts, rollout.ids, 0.7)
            gap = (logp - stage1.token_values(rollout.logp, owner)).abs()
            gaps.append(gap[owner > 0].mean().item())
        show(name, gaps)


def lab_6():
    """Largest error of a log-prob against one-by-one forwards, nats; and processor seconds of one
    by one over packed, forward and backward (toy backbone, P 300, G 8, C 100)."""
    for name, pack in {"ours": stage1.pack, **wrong_versions.PACKINGS}.items():
        errors = []
        for seed in SEEDS:
            prompts = exercises.world().prompts["mixed"]
            answers = test_grpo.make_answers(exercises.world().encoder, 3, seed)
            with torch.no_grad():
                want = [test_grpo.alone(exercises.world().model, exercises.world().encoder, *pair,
                                        exercises.HOT)[0]
                        for pair in test_grpo.pairs_of(prompts, answers)]
            got = exercises.log_probs(pack, ("mixed", seed))
            errors.append((got - torch.cat(want)).abs().max().item())
        show(name, errors)
    show("one by one / packed", [seconds(False, seed) / seconds(True, seed) for seed in SEEDS])


def seconds(packed, seed, length=300, group_size=8, answer=100):
    """Processor seconds, the least of three, of log-probs and their gradient for two prompts."""
    model, encoder = common.load(toy_world.PREBUILT)
    g = torch.Generator().manual_seed(seed)
    prompts = exercises.random_prompts(g, [length] * 2, 200)
    answers = torch.randint(200, (2, group_size, answer), generator=g).tolist()
    least = float("inf")
    for _ in range(3):
        began = time.process_time()
        if packed:
            logp = stage1.packed_logps(model, encoder, prompts, answers, 1.0)[0]
        else:
            ids = torch.tensor([p.ids + a for p, a in test_grpo.pairs_of(prompts, answers)])
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=answer + 1).logits
            logp = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, length:, None])
        logp.sum().backward()
        least = min(least, time.process_time() - began)
    return least


def lab_8():
    """A judge made up: 1,000 rows, 8 answers each; on a row it is right with a probability between
    0.3 and 1. Per cent of the kept rows whose pseudo-label is right, if it is half a standard
    deviation surer when it is right, and if it is not surer."""
    for name, select in {"ours": cmkd.select, **wrong_versions.SELECTION}.items():
        for surer in (0.5, 0.0):
            right, kept = [], []
            for seed in SEEDS:
                verdicts = []
                for n in range(1000):
                    verdict = chosen_verdict(select, random.Random(f"{seed} {n}"), surer)
                    if verdict is not None:
                        verdicts.append(verdict)
                right.append(100 * verdicts.count("A") / len(verdicts))
                kept.append(len(verdicts))
            show(f"{name}, {surer} surer (kept {' '.join(map(str, kept))})", right, "{:.1f}")


def chosen_verdict(select, rng, surer):
    """-> the verdict of the answer that is kept, where A is right; None for a dropped row"""
    skill, texts, confidences = rng.uniform(0.3, 1), [], []
    for _ in range(8):
        verdict = "A" if rng.random() < skill else "B"
        form = thinks if rng.random() < 0.9 else test_stages.malformed
        texts.append(form(verdict))
        confidences.append(rng.gauss(surer * (verdict == "A"), 1))
    place, _ = select(texts, confidences)
    return None if place is None else common.parse(texts[place]).verdict


def lab_10():
    """Two judges that are equally good, 40 questions of 9 rows, 300 trials: in how many per cent
    their difference is called significant, by p < 0.05 and by an interval without 0."""
    for name, compare in {"ours": evaluation.compare, **wrong_versions.COMPARISONS}.items():
        by_p, by_interval = [], []
        for seed in SEEDS:
            rng, alarms = random.Random(seed), [0, 0]
            for _ in range(300):
                got = compare(day_of_a_judge(rng), day_of_a_judge(rng))
                low, high = got["interval"]
                alarms[0] += got["sign_test_p"] < 0.05
                alarms[1] += low > 0 or high < 0
            by_p.append(alarms[0] / 3)
            by_interval.append(alarms[1] / 3)
        show(f"{name}: p", by_p, "{:.0f}")
        show(f"{name}: interval", by_interval, "{:.0f}")


def day_of_a_judge(rng):
    """Scored rows: with a whole question a judge has a good or a bad day."""
    rows = []
    for question in range(40):
        chance = rng.choice([0.95, 0.25])
        for _ in range(9):
            rows.append({"weight": 1.0, "cluster": question,
                         "points": float(rng.random() < chance)})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    measures = {int(name[4:]): f for name, f in globals().items() if name.startswith("lab_")}
    parser.add_argument("--only", type=int, nargs="+", choices=measures, default=list(measures))
    torch.set_num_threads(1)
    for number in parser.parse_args().only:
        print(f"lab {number}: {' '.join(measures[number].__doc__.split())}")
        measures[number]()


if __name__ == "__main__":
    main()
