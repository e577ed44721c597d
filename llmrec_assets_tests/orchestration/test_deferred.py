"""Libraries that wait for their first use: nothing else about them may change."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from llmrec_assets.orchestration import deferred

PROJECT = Path(__file__).parents[2]


def run(script: str, *paths: Path) -> str:
    """What a fresh Python prints; ``paths`` come first on its path."""
    head = f"import sys; sys.path[:0] = {[str(path) for path in paths]!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", head + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        cwd=PROJECT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A package that says when it is loaded, reads from itself meanwhile, and takes its time."""
    package = tmp_path / "slow_library"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import time\n"
        "print('loading')\n"
        "early = 1\n"
        "from slow_library import inner\n"
        "time.sleep(0.2)\n"
        "late = 2\n"
    )
    (package / "inner.py").write_text("import slow_library\nseen = slow_library.early\n")
    return tmp_path


DEFER = "from llmrec_assets.orchestration.deferred import defer; defer('slow_library')\n"


#: What would be in ``sys.modules`` if it were loaded.
WITHIN = ["pandas.core", "_duckdb", "duckdb.duckdb", "rapidfuzz.fuzz", "requests.api"]


def test_the_definitions_load_none_of_them() -> None:
    found = run(
        f"""
        import llmrec_assets.definitions
        print([name for name in {[*WITHIN, "pyarrow.compute"]!r} if name in sys.modules])
        import pandas, duckdb, rapidfuzz, requests
        print([name for name in {WITHIN!r} if name in sys.modules])
        print(pandas.DataFrame({{"a": [1]}}).to_dict("list"), "pandas.core" in sys.modules)
        print(duckdb.sql("select 42").fetchall(), rapidfuzz.fuzz.ratio("a", "a"))
        print(issubclass(requests.HTTPError, requests.RequestException))
        """
    )
    assert found.splitlines() == ["[]", "[]", "{'a': [1]} True", "[(42,)] 100.0", "True"]


def test_imports_cost_nothing_and_the_first_use_loads_once(library: Path) -> None:
    found = run(
        DEFER
        + """import slow_library
import slow_library as again
print(type(slow_library).__mro__[1].__name__, "imported")
print(again.early, again.late, again.inner.seen)
print(type(slow_library).__name__, sys.modules["slow_library"] is slow_library)
from slow_library import late
slow_library.late = 3
print(slow_library.late, late)
""",
        library,
    )
    assert found.splitlines() == ["module imported", "loading", "1 2 1", "module True", "3 2"]


@pytest.mark.parametrize(
    "use",
    [
        "from slow_library import late; print(late)",
        "import slow_library.inner; print(slow_library.late)",
        "import slow_library; slow_library.new = 2; print(slow_library.new)",
        "import slow_library; del slow_library.early; print(slow_library.late)",
        "import slow_library; print(len([n for n in dir(slow_library) if n == 'late']) + 1)",
        "import slow_library; print(vars(slow_library)['late'])",
    ],
)
def test_every_way_of_using_it_loads_it(library: Path, use: str) -> None:
    assert run(DEFER + use, library).splitlines() == ["loading", "2"]


def test_a_second_thread_waits_until_it_is_whole(library: Path) -> None:
    found = run(
        DEFER
        + """import threading, slow_library
seen = []
def read():
    seen.append(slow_library.late)
threads = [threading.Thread(target=read) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(seen)
""",
        library,
    )
    assert found.splitlines() == ["loading", "[2, 2, 2, 2, 2, 2, 2, 2]"]


def test_a_library_that_fails_to_load_says_why_each_time(tmp_path: Path) -> None:
    (tmp_path / "slow_library.py").write_text("raise OSError('no such driver')\n")
    found = run(
        DEFER
        + """import slow_library
for _ in range(2):
    try:
        slow_library.anything
    except OSError as error:
        print(error)
""",
        tmp_path,
    )
    assert found.splitlines() == ["no such driver"] * 2


def test_what_is_loaded_or_missing_is_left_alone() -> None:
    before = sys.modules["threading"]
    deferred.defer("threading", "no_such_library_anywhere")
    assert sys.modules["threading"] is before is threading
    assert "no_such_library_anywhere" not in sys.modules
