"""
The style that all files share: what .ruff.toml selects, without a finding. A "# noqa" says why on
its own line.
"""

import re
import subprocess
import sys

from helpers import ROOT


def test_ruff_finds_nothing():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "."], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_noqa_has_a_reason():
    """The codes, two spaces, and the reason in parentheses: # noqa: E402  (why)"""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/**/*.py")]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if "# noqa" in line and path.name != "test_style.py":
                reason = re.search(r"# noqa: [A-Z]+\d+  \(.+\)$", line)
                assert reason, f"{path.name}:{number}: {line.strip()}"
