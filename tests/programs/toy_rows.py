"""The toy world's rows and media from a process of its own: toy_rows.py OUT SEED ROWS_PER_FILE"""

import sys
from pathlib import Path

import toy_world

out, seed, rows = sys.argv[1:]
toy_world.write_world(Path(out), int(seed), dict.fromkeys(toy_world.SIZES, int(rows)), quiet=True)
