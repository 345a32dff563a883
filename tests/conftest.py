import os
import tempfile
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import Phase, settings

if not torch.cuda.is_available():
    # Read where Triton is first imported, by whichever library: kernels are interpreted then.
    os.environ["TRITON_INTERPRET"] = "1"

# Examples are limited by number, not by time: a busy machine must not fail a test.
settings.register_profile("untimed", deadline=None)
# For `make mutants`, which runs the tests hundreds of times: few examples, always the same ones.
settings.register_profile(
    "mutants", deadline=None, max_examples=8, derandomize=True, database=None, phases=(Phase.explicit, Phase.generate)
)
# For `make fuzz`: tests of readers take 20 times their usual examples (`fuzzing.readings`), others at most as many.
settings.register_profile("fuzz", deadline=None, max_examples=2000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "untimed"))


# Lines that tests want to be read, whatever is captured: shown with the results.
SAID = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SAID] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash[SAID]:
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def say(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Shows a line with the results of the tests."""
    return request.config.stash[SAID].append


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the stored golden files instead of comparing")


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether golden files are to be rewritten."""
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture(scope="session", autouse=True)
def token_cache() -> Iterator[None]:
    """Prepared tokens of tests are kept for as long as the tests run, and apart from the user's."""
    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get("XDG_CACHE_HOME")
        os.environ["XDG_CACHE_HOME"] = folder
        yield
        if before is None:
            del os.environ["XDG_CACHE_HOME"]
        else:
            os.environ["XDG_CACHE_HOME"] = before
