import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

import featherweight
from featherweight.errors import ArtifactError
from featherweight.search.evaluations import Evaluations, key

PACKAGE = Path(featherweight.__file__).parent


@pytest.fixture(params=["file", "memory"])
def evaluations(request: pytest.FixtureRequest, tmp_path: Path) -> Evaluations:
    return Evaluations(tmp_path / "scores.db" if request.param == "file" else None)


def test_a_score_comes_back_to_the_last_bit(evaluations: Evaluations) -> None:
    evaluations.put("a", 0.1 + 0.2, "two layers")
    evaluations.put("b", -3)
    assert (evaluations.get("a"), evaluations.get("b"), evaluations.get("c")) == (0.1 + 0.2, -3.0, None)
    evaluations.put("a", 1.0)
    assert (evaluations.get("a"), len(evaluations)) == (1.0, 2)


def test_ask_computes_once(evaluations: Evaluations) -> None:
    computed = []

    def compute() -> float:
        computed.append(1)
        return 0.75

    assert [evaluations.ask("k", compute) for _ in range(3)] == [0.75] * 3
    assert len(computed) == 1


def test_an_evaluation_that_fails_keeps_nothing(evaluations: Evaluations) -> None:
    with pytest.raises(ZeroDivisionError):
        evaluations.ask("k", lambda: 1 / 0)
    with pytest.raises(ValueError, match="the score of rank 3 is nan"):
        evaluations.put("k", float("nan"), "rank 3")
    assert evaluations.get("k") is None


def test_scores_outlive_the_object(tmp_path: Path) -> None:
    first = Evaluations(tmp_path / "scores.db")
    first.put("a", 0.5)
    first.close()
    assert Evaluations(tmp_path / "scores.db").get("a") == 0.5


def test_keys_tell_parts_apart() -> None:
    assert len({key("ab", "c"), key("a", "bc"), key("abc"), key("c", "ab"), key("ab", "c", "")}) == 5
    assert key("a", "b") == key("a", "b")


# The module without the package around it, whose import takes seconds.
ALONE = f"""
import sys, types
for name, folder in (("featherweight", {str(PACKAGE)!r}), ("featherweight.search", {str(PACKAGE / "search")!r})):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
from featherweight.search.evaluations import Evaluations
"""

WRITER = """
path, name = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
evaluations = Evaluations(path)
for number in range(40):
    evaluations.put(f"{name} {number}", number / 7)
    evaluations.put("both", 1.0)
    assert evaluations.get(f"{name} {number}") == number / 7
"""


def test_processes_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "scores.db"
    command = [sys.executable, "-c", ALONE + WRITER, str(path)]
    writers = [
        subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for name in "xyz"
    ]
    for writer in writers:
        assert writer.stdout is not None
        writer.stdout.readline()
    for writer in writers:  # all at once, so that they also make the file together
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate()
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    evaluations = Evaluations(path)
    assert len(evaluations) == 3 * 40 + 1
    assert all(evaluations.get(f"{name} {number}") == number / 7 for name in "xyz" for number in range(40))


ENDLESS = """
import itertools
evaluations = Evaluations(sys.argv[1])
for number in itertools.count():
    evaluations.put(str(number), float(number))
    print(number, flush=True)
"""


def test_a_killed_run_loses_no_score_it_had(tmp_path: Path) -> None:
    path = tmp_path / "scores.db"
    run = subprocess.Popen([sys.executable, "-c", ALONE + ENDLESS, str(path)], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    for _ in range(40):
        last = int(run.stdout.readline())
    os.kill(run.pid, signal.SIGKILL)
    rest, _ = run.communicate()
    last = int([str(last), *rest.split()][-1])
    evaluations = Evaluations(path)
    assert [evaluations.get(str(number)) for number in range(last + 1)] == [float(n) for n in range(last + 1)]
    assert evaluations.ask("another", lambda: 2.5) == 2.5


def test_a_foreign_file_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("these are my notes on the experiment, and no table\n" * 40)
    database = tmp_path / "other.db"
    other = sqlite3.connect(database)
    other.execute("CREATE TABLE customers (name)")
    other.commit()
    other.close()
    for path, message in ((text, "is no table of evaluations, or damaged"), (database, "is a database, but none of")):
        before = path.read_bytes()
        with pytest.raises(ArtifactError, match=message):
            Evaluations(path)
        assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "other.db"]


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scores.db"
    evaluations = Evaluations(path)
    for number in range(400):
        evaluations.put(key(str(number)), 0.5)
    evaluations.close()
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xa5" * len(data[4096:])
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"scores.db is no table of evaluations, or damaged"):
        Evaluations(path).get(key("3"))
    assert path.read_bytes() == bytes(data)


def test_a_newer_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scores.db"
    Evaluations(path).close()
    later = sqlite3.connect(path)
    later.execute("PRAGMA user_version = 9")
    later.commit()
    later.close()
    with pytest.raises(ArtifactError, match="version 9"):
        Evaluations(path)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"nowhere.scores.db cannot be opened"):
        Evaluations(tmp_path / "nowhere" / "scores.db")
