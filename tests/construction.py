"""
DT2IT-MRM's Table 7 (method 1) in miniature: does asking for both ways of scoring (3.1) give purer
pairs than listwise scoring alone? Minutes, so not part of the tests.

    python tests/construction.py --seeds 0 1 2         # after tests/curation.py: its judges teach

The toy model cannot write a list of scores, but it judges pairs, and a win rate is a score. So
dt2it.py --construct runs as it is, but for teacher_scores(), whose place by_win_rates() takes:

    listwise   a response's wins against the K - 1 others, each pair shown in one order,
               that of the list: with the judge's leaning to a position, as in the paper
    pointwise  its wins against the row's reference, in both orders; no other response is
               in sight

Fixed before any result: 300 held-out questions for each seed, K = 4 responses that came with the
row, two of which are right; each is flourished or not by a coin, no two are the same. The teacher
is that seed's judge of tests/curation.py, stage 0 after 15 steps of text RL.
"""

import argparse
import random
from itertools import combinations

import toy_world
from curation import HERE, JUDGE
from curriculum import ROOT, common, load_rows, sample_group
from toy_world import COLOURS, SHAPES

import dt2it

K, ROWS = 4, 300


def question(rng, name):
    """-> a row of --construct, with what each response is under "truth" and "flourished" """
    row = {}
    while "facts" not in row:  # not the rows that ask for the whole description
        row = toy_world.make_row(rng, "text", True)
    value = row["facts"]["value"]
    things = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    values = next(v for v in (COLOURS, SHAPES, things) if value in v)
    responses, truth, flourished = [], [], []
    while len(responses) < K:
        right = len(responses) < K // 2
        claim = value if right else rng.choice([v for v in values if v != value])
        flourish = rng.choice(list(toy_world.FLOURISHES)) if rng.random() < 0.5 else None
        response = toy_world.respond(f"it is {claim}", flourish)
        if response not in responses:
            responses.append(response)
            truth.append(right)
            flourished.append(flourish is not None)
    order = rng.sample(range(K), K)
    return {"id": name, "task": "text", "prompt": row["prompt"], "media": [],
            "reference": f"it is {value} .", "responses": [responses[i] for i in order],
            "truth": [truth[i] for i in order], "flourished": [flourished[i] for i in order]}


def games_of(row):
    """-> the two responses of every pair that is judged"""
    games = list(combinations(row["responses"], 2))
    for response in row["responses"]:
        games += [(response, row["reference"]), (row["reference"], response)]
    return games


def verdicts_of(folder, rows, out):
    """-> {(prompt, first response, second one): "A", "B" or None}, of the judge in `folder`"""
    pairs = []
    for row in rows:
        for first, second in games_of(row):
            if first != second:
                pairs.append({**row, "id": f"{row['id']}/{len(pairs)}", "label": "A",
                              "captions": [], "responses": [first, second]})
    common.write_lines(out / "games.jsonl", pairs)
    model, encoder = common.load(str(folder), style=common.trained_style(folder))
    pairs = load_rows(str(out / "games.jsonl"), encoder, quiet=True)
    verdicts = {}
    for pred in common.judge(model, encoder, pairs, sample_group, batch_size=128,
                             max_new_tokens=160, orders=("AB",)):
        row = pairs[pred["at"]]
        verdicts[row["prompt"], *row["responses"]] = pred["pred"]
    return verdicts


def scores_from(verdicts):
    """-> what takes the place of dt2it.teacher_scores()"""
    def won(row, first, second):
        """The first one's share. No verdict: half to each, as in eval.py; an answer that is the
        reference itself, too."""
        if first == second:
            return 0.5
        return {"A": 1.0, "B": 0.0, None: 0.5}[verdicts[row["prompt"], first, second]]

    def by_win_rates(row, groups, models, cfg, rng):
        scores = []
        for group in groups:
            wins = [0.0] * len(group)
            for i, j in combinations(range(len(group)), 2):                      # listwise
                share = won(row, group[i], group[j])
                wins[i] += share
                wins[j] += 1 - share
            if len(group) == 1:                                                  # pointwise
                wins[0] = won(row, group[0], row["reference"])
                wins[0] += 1 - won(row, row["reference"], group[0])
            scores.append(wins)
        return scores

    return by_win_rates


def purity(pairs, rows):
    """(id, better, worse) of pairs -> counts: all, the right one better, the wrong one better, of
    which conflict; pairs of two right or two wrong responses make up the rest."""
    truth, flourished = {}, {}
    for row in rows:
        for i, response in enumerate(row["responses"]):
            truth[row["id"], response] = row["truth"][i]
            flourished[row["id"], response] = row["flourished"][i]
    counts = {"pairs": len(pairs), "right": 0, "wrong": 0, "conflict": 0}
    for name, better, worse in pairs:
        if truth[name, better] and not truth[name, worse]:
            counts["right"] += 1
        elif truth[name, worse] and not truth[name, better]:
            counts["wrong"] += 1
            counts["conflict"] += flourished[name, better] and not flourished[name, worse]
    return counts


def construct(seed):
    """-> {way of scoring: counts}"""
    folder, out = ROOT / HERE / JUDGE.format(seed=seed), ROOT / HERE / f"construction{seed}"
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"construction:{seed}")
    rows = [question(rng, f"q-{i}") for i in range(ROWS)]
    common.write_lines(out / "prompts.jsonl", rows)
    dt2it.teacher_scores = scores_from(verdicts_of(folder, rows, out))
    cfg = dt2it.Config(construct=str(out / "prompts.jsonl"), teacher=str(folder),
                       candidates=[str(folder)], out=str(out))
    dt2it.construct(cfg, "cpu")
    both, listwise = [], []
    for pair in common.whole_lines(out / "pairs.jsonl"):
        better, worse = pair["responses"] if pair["label"] == "A" else pair["responses"][::-1]
        both.append((pair["id"].partition("/")[0], better, worse))
    for row in rows:
        scores, = dt2it.teacher_scores(row, [row["responses"]], None, None, None)
        for i, j in dt2it.agreed(scores, scores):
            listwise.append((row["id"], row["responses"][i], row["responses"][j]))
    return {"listwise": purity(listwise, rows), "and pointwise": purity(both, rows)}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    table = []
    for seed in args.seeds:
        for name, found in construct(seed).items():
            low, high = common.wilson(found["right"] / found["pairs"], found["pairs"])
            rest = found["pairs"] - found["right"] - found["wrong"]
            table.append(f"| {seed} | {name} | {found['pairs']} | "
                         f"{found['right'] / found['pairs']:.1%} [{low:.0%}, {high:.0%}] | "
                         f"{found['wrong']} | {found['conflict']} | {rest} |")
    print("\n| seed | scoring | pairs | the right one is better | the wrong one is | of these, "
          "conflict | both right or both wrong |\n|---|---|--:|--:|--:|--:|--:|", *table, sep="\n")


if __name__ == "__main__":
    main()
