"""
Which rows a process checks, and which it then holds: shares.py ROWS OUT writes OUT/share-RANK.json
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import common
from data import load_rows

path, out = sys.argv[1:]
common.start_processes()
seen = []


def check(row, form):
    seen.append(row["id"])
    return len(row["prompt"])


reader = SimpleNamespace(forbidden=(), check=check, kept_as=None)
whole = [row["id"] for row in load_rows(path, reader, skip_bad_rows=True)]
result = {"whole": whole, "checked": seen.copy()}
sample = load_rows(f"{path}:90", reader, skip_bad_rows=True)
result["sample"] = [row["id"] for row in sample]
try:
    load_rows(path, reader)
except SystemExit as e:
    result["refused"] = str(e)
Path(out, f"share-{common.rank()}.json").write_text(json.dumps(result))
common.end_processes()
