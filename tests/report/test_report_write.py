"""A report's suffix says what it is."""

from pathlib import Path

import pytest
import report_samples as samples

from featherweight import report
from featherweight.errors import FeatherweightError
from featherweight.ledger import Ledger
from featherweight.report.html import html
from featherweight.report.markdown import markdown


def test_the_suffix_chooses(tmp_path: Path) -> None:
    ledger = samples.two_steps()
    for name in ("report.html", "REPORT.MD", "ledger.json"):
        report.write(ledger, tmp_path / name)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == html(ledger)
    assert (tmp_path / "REPORT.MD").read_text(encoding="utf-8") == markdown(ledger)
    assert Ledger.load(tmp_path / "ledger.json") == Ledger.from_json(ledger.to_json())


@pytest.mark.parametrize(("name", "said"), [("report.htm", "did you mean '.html'"), ("report", "no suffix")])
def test_another_suffix_is_an_error_that_names_the_choices(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(FeatherweightError, match=r"\.html, \.md or \.json") as error:
        report.write(samples.one_step(), tmp_path / name)
    assert said in str(error.value)
    assert not (tmp_path / name).exists()
