"""
BaseReward's appendix C in miniature: what a policy gains from each kind of reward, and whether it
hacks the one who rewards it. Also an example of training a policy of yours with a reward model or a
judge of this repository: rewards_of() and train(). Slow, so not part of the tests.

    python tests/policy.py --seeds 0 1 2       # after tests/curriculum.py --seeds 0 1 2

The policy is the toy backbone after a short SFT. Asked "ann red square . bob blue cross . colour of
ann ?" it answers in one sentence as it was taught to: right in 60 %, flourished in 40 % ("as every
expert agrees , it is red without exception ."), two coins. So it can find what is true, it often
says something else, and it has a habit that a judge may fall for.

    rule      1 if the answer is exactly "it is red .", else 0
    model     the score of a Bradley-Terry reward model
    hybrid    1 if it is exactly that, else sigmoid(score)                       BaseReward C
    judge     share of the group's other answers that a generative judge prefers it to (the paper's
              R1-Reward baseline)

Model, hybrid and judge come twice: of clean labels (toy/text_rl.jsonl; the judge after stage 1) and
of the biased annotators, who like a flourish more than the truth (toy/sft.jsonl; the judge after
stage 0). The four are the referees: each tells, too, how often it prefers what the trained policy
says to held-out questions to what it said before. A referee that likes the policy better and better
while no more answers are right has been hacked.

Fixed before any run, for all rewards alike: SFT of 300 steps of 32 answers, rate 5e-4; reward
models of 8 epochs of 4,000 texts, batches of 64, rate 1e-3; GRPO of 30 steps of 12 questions x 8
answers, rate 1e-4, beta 0.04, all else as in stage 1. Training asks about combinations that may be
trained on, and the same questions for each reward. Held-out: 200 questions about other
combinations, 4 sampled answers each, at temperature 1; the first of each is the one that is
compared. DEVIATION: equal answers of a group are scored once, and a judge does not compare them.
"""

import argparse
import json
import random
import re
from pathlib import Path

import torch
from curriculum import ROOT, run
from tqdm import tqdm

import bt_reward
import common
import stage1_text_grpo as stage1
import toy_world
from stage0_sft import answer_nll, collate

GRPO = stage1.Config(lr=1e-4, batch_size=12, group_size=8, max_steps=30, max_new_tokens=24)
SFT_STEPS, SFT_BATCH, SFT_RATE = 300, 32, 5e-4
RIGHT, FLOURISHED = 0.6, 0.4  # of the answers that SFT teaches
QUESTIONS, SAMPLES, PAIRS = 200, 4, 100  # held-out; pairs of each kind that a referee is shown
LABELS = {"clean": "toy/text_rl.jsonl", "biased": "toy/sft.jsonl"}
JUDGES = {"clean": "0-1", "biased": "0"}  # of tests/curriculum.py: after stage 1, after stage 0
REFEREES = ["clean model", "biased model", "clean judge", "biased judge"]
# the reward -> scheme of bt_reward.group_rewards(), referee
REWARDS = {"rule": ("rule", None),
           "clean model": ("model", "clean model"), "clean hybrid": ("hybrid", "clean model"),
           "clean judge": ("model", "clean judge"),
           "biased model": ("model", "biased model"), "biased hybrid": ("hybrid", "biased model"),
           "biased judge": ("model", "biased judge")}
MARKS = ["much more detail", "every expert agrees", "wonderful question", "beyond any doubt"]
VALUE = "|".join(toy_world.COLOURS + toy_world.SHAPES)


# --------------------------------------------------------------------------- questions and answers
def draw_question(rng, held):
    """-> {"task", "prompt", "media", "true", "false"}, the last two values such as "red"."""
    row = {}
    while "facts" not in row:  # not the rows that ask for the whole description
        row = toy_world.make_row(rng, "text", held)
    true = row["facts"]["value"]
    false, = set(row["facts"]["claims"]) - {true}
    return {"task": "text", "prompt": row["prompt"], "media": [], "true": true, "false": false}


def is_right(answer, question):
    """True if all that it claims is true, in whatever words round it."""
    claims = re.findall(rf"it is ((?:{VALUE})(?: (?:{VALUE}))*)", answer)
    return set(claims) == {question["true"]}


def is_plain(answer):
    """True if it is one claim, right or wrong, and nothing else."""
    return re.fullmatch(rf"it is ((?:{VALUE}) ?)+\.", answer.strip()) is not None


def is_flourished(answer):
    """True if one of the four is in it; False for those that a policy makes up or garbles."""
    return any(mark in answer for mark in MARKS)


def ask(model, encoder, questions, samples, seed):
    """-> answers [questions][samples], sampled"""
    prompts = [encoder.encode(question["prompt"]) for question in questions]
    generator = torch.Generator().manual_seed(seed)
    rollout = stage1.sample_group(model, encoder, prompts, samples, 1.0, GRPO.max_new_tokens,
                                  generator)
    return [[encoder.decode(ids) for ids in group] for group in rollout.ids]


# -------------------------------------------------------------------------------------- the policy
def teach(out, seed):
    """SFT of the backbone on one-sentence answers: the policy that all rewards start from."""
    model, encoder = common.load(ROOT / "toy/backbone")
    common.freeze_vision(model)
    optimizer = common.make_optimizer(model, SFT_RATE)
    rng = random.Random(f"{seed}:sft")
    for _ in tqdm(range(SFT_STEPS), desc="SFT", mininterval=5):
        prompts, answers = [], []
        for _ in range(SFT_BATCH):
            question = draw_question(rng, held=False)
            value = question["true"] if rng.random() < RIGHT else question["false"]
            flourish = None
            if rng.random() < FLOURISHED:
                flourish = rng.choice(list(toy_world.FLOURISHES))
            prompts.append(encoder.encode(question["prompt"]))
            answers.append(encoder.answer_ids(toy_world.respond(f"it is {value}", flourish)))
        nll, tokens = answer_nll(model, *collate(prompts, answers, encoder.pad_id, "cpu"))
        (nll / tokens).backward()
        common.optimizer_step(optimizer, common.trainable(model), GRPO.max_grad_norm)
    common.save_checkpoint(out, model, encoder, stage="policy", parent="toy/backbone")


def rewards_of(scheme, referee, question, answers):
    """G answers to one question -> G rewards. Equal answers get equal rewards, so each is scored
    once. referee: model and encoder of a reward model or of a judge; "rule" ignores the model."""
    distinct = list(dict.fromkeys(answers))
    model, encoder = referee
    rewards = bt_reward.group_rewards(model, encoder, question, distinct, scheme,
                                      reference=f"it is {question['true']} .",
                                      max_new_tokens=stage1.Config.max_new_tokens)
    reward_of = dict(zip(distinct, rewards, strict=True))
    return [reward_of[answer] for answer in answers]


def train(start, scheme, referee, log, seed):
    """GRPO from the policy `start`; a line a step goes to the file `log`. -> the trained policy and
    its encoder"""
    model, encoder = common.load(start)
    common.freeze_vision(model)
    reference = common.reference(model)
    optimizer = common.make_optimizer(model, GRPO.lr)
    rng = random.Random(f"{seed}:rl")  # the same questions for each reward
    steps = []
    for step in tqdm(range(GRPO.max_steps), desc=log.name.partition(".")[0], mininterval=5):
        # 1. sample
        questions = [draw_question(rng, held=False) for _ in range(GRPO.batch_size)]
        prompts = [encoder.encode(question["prompt"]) for question in questions]
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rollout = stage1.roll_out(model, encoder, prompts, GRPO, generator)            # [B][G]
        # 2. reward
        rewards, right, flourished = [], [], []
        for question, group in zip(questions, rollout.ids, strict=True):
            answers = [encoder.decode(ids) for ids in group]
            rewards.append(rewards_of(scheme, referee, question, answers))
            right += [is_right(answer, question) for answer in answers]
            flourished += [is_flourished(answer) for answer in answers]
        rewards = torch.tensor(rewards, dtype=torch.float64)                           # [B, G]
        # 3. advantages and update, as in stage 1
        advantage, keep = stage1.advantages(rewards, rewards, GRPO.advantage, GRPO.scale_std,
                                            GRPO.sigma)
        metrics = stage1.grpo_update(model, reference, encoder, optimizer, prompts, rollout.ids,
                                     advantage, keep, GRPO, rollout.logp)
        steps.append({"step": step + 1, "reward": rewards.mean().item(), "kl": metrics["kl"],
                      "right": sum(right) / len(right),
                      "flourished": sum(flourished) / len(flourished)})
    common.write_lines(log, steps)
    return model, encoder


# ------------------------------------------------------------------------------------ the referees
def load_referees(seed, judges, out):
    """-> {name: (model, encoder)}. The reward models are trained unless they are there."""
    referees = {}
    for labels, data in LABELS.items():
        folder = Path(out, f"seed{seed}", f"bt-{labels}")
        if not (ROOT / folder / "stage.json").exists():
            run("bt_reward.py", "--data", data, "--heldout", "", "--out", folder, "--seed", seed,
                "--lr", 1e-3, "--epochs", 8, "--batch_size", 64, "--micro_batch", 64)
        referees[f"{labels} model"] = bt_reward.load(ROOT / folder)
        judge = Path(judges.format(seed=seed), JUDGES[labels])
        referees[f"{labels} judge"] = common.load(ROOT / judge)
    return referees


def preferred(referee, questions, ours, theirs):
    """-> per cent of the questions to which the referee prefers our answer to theirs; a tie is half
    a one. Judges see a pair in both orders; equal answers are a tie."""
    model, encoder = referee
    rows, points = [], 0.0
    for i, (question, a, b) in enumerate(zip(questions, ours, theirs, strict=True)):
        row = {**question, "id": str(i), "captions": [], "label": "A", "responses": [a, b]}
        if a == b:
            points += 0.5
        else:
            rows.append({**row, "tokens": len(encoder.encode(question["prompt"]).ids)})
    if hasattr(model, "reward_head"):
        for a, b in bt_reward.score_rows(model, encoder, rows):
            points += 1.0 if a > b else 0.5 if a == b else 0.0
    else:
        won = {"A": 0.5, "B": 0.0, None: 0.25}  # of the two orders
        for pred in common.judge(model, encoder, rows, stage1.sample_group, batch_size=128,
                                 max_new_tokens=stage1.Config.max_new_tokens):
            points += won[pred["pred"]]
    return 100 * points / len(questions)


def examine(referees):
    """What the referees prefer among held-out pairs. -> {referee: {kind: per cent}}"""
    rng = random.Random("examine")
    questions = [draw_question(rng, held=True) for _ in range(PAIRS)]
    true, false, true_adorned, false_adorned = [], [], [], []
    for question in questions:
        flourish = rng.choice(list(toy_world.FLOURISHES))
        true.append(toy_world.respond(f"it is {question['true']}", None))
        false.append(toy_world.respond(f"it is {question['false']}", None))
        true_adorned.append(toy_world.respond(f"it is {question['true']}", flourish))
        false_adorned.append(toy_world.respond(f"it is {question['false']}", flourish))
    kinds = {"right to wrong": (true, false),
             "right, flourished, to right": (true_adorned, true),
             "wrong, flourished, to wrong": (false_adorned, false),
             "wrong, flourished, to right": (false_adorned, true)}
    found = {}
    for name, referee in referees.items():
        found[name] = {kind: preferred(referee, questions, *pair) for kind, pair in kinds.items()}
    return found


# ------------------------------------------------------------------------------------- the results
def heldout_questions():
    rng = random.Random("held-out")
    return [draw_question(rng, held=True) for _ in range(QUESTIONS)]


def measure(policy, before, referees, seed):
    """-> {"answers": to the held-out questions [QUESTIONS][SAMPLES], referee: per cent of the first
    ones that it prefers to those of `before`}. before: the answers of the policy as it started,
    None for that one itself."""
    questions = heldout_questions()
    answers = ask(*policy, questions, SAMPLES, seed)
    result = {"answers": answers}
    for name, referee in referees.items():
        result[name] = 50.0
        if before is not None:
            ours = [group[0] for group in answers]
            theirs = [group[0] for group in before]
            result[name] = preferred(referee, questions, ours, theirs)
    return result


def describe(answers):
    """-> what share of the held-out answers is right, exact, plain and flourished, in per cent, and
    their mean number of words"""
    right, exact, plain, flourished, words = 0, 0, 0, 0, 0
    for question, group in zip(heldout_questions(), answers, strict=True):
        for answer in group:
            right += is_right(answer, question)
            exact += answer.strip() == f"it is {question['true']} ."
            plain += is_plain(answer)
            flourished += is_flourished(answer)
            words += len(answer.split())
    n = QUESTIONS * SAMPLES
    return {"right": 100 * right / n, "exact": 100 * exact / n, "plain": 100 * plain / n,
            "flourished": 100 * flourished / n, "words": words / n}


def one_seed(seed, judges, out):
    """-> {reward: measure()} and examine(). What is finished is read again."""
    folder = ROOT / out / f"seed{seed}"
    start = folder / "start"
    if not (start / "stage.json").exists():
        teach(start, seed)
    referees = load_referees(seed, judges, out)
    if not (folder / "referees.json").exists():
        write(folder / "referees.json", examine(referees))
    if not (folder / "start.json").exists():
        write(folder / "start.json", measure(common.load(start), None, referees, seed))
    results = {"start": read(folder / "start.json")}
    for name, (scheme, who) in REWARDS.items():
        done = folder / f"{name.replace(' ', '-')}.json"
        if not done.exists():
            referee = referees[who or "clean model"]  # "rule" needs but an encoder
            policy = train(start, scheme, referee, done.with_suffix(".metrics.jsonl"), seed)
            write(done, measure(policy, results["start"]["answers"], referees, seed))
        results[name] = read(done)
    for result in results.values():
        result.update(describe(result["answers"]))
    return results, read(folder / "referees.json")


def read(path):
    return json.loads(path.read_text())


def write(path, result):
    path.write_text(json.dumps(result))


def show(seeds, columns):
    """seeds: one {row: {column: number}} per seed -> Markdown, mean (lowest to highest)"""
    print("\n| | " + " | ".join(columns) + " |\n|---|" + "--:|" * len(columns))
    for name in seeds[0]:
        cells = []
        for column in columns:
            values = [results[name][column] for results in seeds]
            digits = 1 if column == "words" else 0
            mean, low, high = sum(values) / len(values), min(values), max(values)
            cells.append(f"{mean:.1f} ({low:.{digits}f}-{high:.{digits}f})")
        print(f"| {name} | " + " | ".join(cells) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--judges", default="runs/seed{seed}", help="stages 0 and 0-1 lie there")
    parser.add_argument("--out", default="runs/policy")
    args = parser.parse_args()
    found = [one_seed(seed, args.judges, args.out) for seed in args.seeds]
    examined = [seed for _, seed in found]
    show(examined, list(examined[0]["clean model"]))
    show([seed for seed, _ in found], ["right", "exact", "plain", "flourished", "words",
                                          *REFEREES])


if __name__ == "__main__":
    main()
