"""
The style that all files share: what .ruff.toml selects, without a finding. A "# noqa" says why on
its own line.
"""

import re
import subprocess
import sys

import wrong_versions
from helpers import ROOT, TESTS


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


def test_every_wrong_version_is_rejected_somewhere():
    """A topic of wrong_versions.py that no test goes through would promise what nobody checked."""
    tests = "".join(path.read_text() for path in TESTS.glob("test_*.py"))
    for name, value in vars(wrong_versions).items():
        if isinstance(value, dict) and name.isupper() and name != "OTHER":
            parametrized = f'@pytest.mark.parametrize("name", wrong_versions.{name})'
            assert parametrized in tests, name
            assert name in wrong_versions.__doc__ or name == "KL_ESTIMATORS", name


def test_no_test_file_imports_another():
    """What two of them need is in helpers.py or conftest.py."""
    for path in TESTS.glob("test_*.py"):
        assert not re.search(r"^\s*(from|import) test_", path.read_text(), re.MULTILINE), path.name
