"""Files that hold what they should, and files that do not: the message names them."""

from __future__ import annotations

from pathlib import Path

import pytest

from featherweight.errors import ArtifactError
from featherweight.files import read_json, read_text


def test_text_and_json_are_read_whatever_their_language(tmp_path: Path):
    (tmp_path / "kept.json").write_text('{"µ": [1, "ß"]}', encoding="utf-8")
    assert read_text(tmp_path / "kept.json", "a recipe") == '{"µ": [1, "ß"]}'
    assert read_json(tmp_path / "kept.json", "a plan", sorted) == ["µ"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "{path} cannot be read: No such file or directory"),
        (b"\xff\xfe\x00", "{path} is not a plan: it is not text ("),
        (b"{", "{path} is not a plan: it is not JSON ("),
        (b"{}", "{path}: it is empty"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, content: bytes | None, said: str):
    def parse(data: object) -> object:
        raise ArtifactError("it is empty")

    path = tmp_path / "plan.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArtifactError) as refused:
        read_json(str(path), "a plan", parse)
    assert str(refused.value).startswith(said.format(path=path))
