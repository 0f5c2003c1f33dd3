"""What all tests need: the scripts on the path, and one thread, because on models this small a
second one only waits for the first (and sums round otherwise); and the fixtures that several test
files share."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import toy_world  # noqa: E402  (it is on the path only now)
from helpers import RANK_VARIABLES, small_world  # noqa: E402  (as above)

import common  # noqa: E402  (as above)
import decoding  # noqa: E402  (as above)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cpu_only(monkeypatch):
    """One process on the CPU: sums in another order on a GPU would not be bit-equal."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A new folder as the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def loaded():
    """The prebuilt backbone and its encoder. Its answers are mostly well-formed, its verdicts a
    coin. Nobody may change it."""
    return common.load(toy_world.PREBUILT)


@pytest.fixture(scope="session")
def encoder(loaded):
    return loaded[1]


@pytest.fixture(scope="session")
def eight_rows(tmp_path_factory):
    """A world of eight rows per file. -> folder"""
    return small_world(tmp_path_factory.mktemp("eight"), **dict.fromkeys(toy_world.SIZES, 8))


@pytest.fixture
def recorded(monkeypatch):
    """On the CPU, what a GPU does with a CUDA graph: from a token on, run_in_place() is called with
    nothing but what stands in its inputs. Counts the recordings and those calls. Where there is a
    GPU, the graph is a real one."""
    counts, real, real_record = Counter(), decoding.Decoder.__init__, decoding.record

    def records(self, model, most):
        real(self, model, most)
        self.records = self.device.type == ("cuda" if torch.cuda.is_available() else "cpu")

    def record(function):
        counts["recordings"] += 1
        if torch.cuda.is_available():
            function = real_record(function)
        else:
            function()  # as the real one

        def replay():
            counts["replays"] += 1
            function()
        return replay
    monkeypatch.setattr(decoding.Decoder, "__init__", records)
    monkeypatch.setattr(decoding, "record", record)
    return counts
