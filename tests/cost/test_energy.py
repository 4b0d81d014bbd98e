import pytest

from featherweight.cost.energy import estimate


def test_figures_are_those_of_the_paper() -> None:
    assert estimate(1e12, 0) == pytest.approx(4.6)
    assert estimate(1e12, 0, "float16") == pytest.approx(1.5)
    assert estimate(1e12, 0, "int8") == pytest.approx(0.23)
    assert estimate(0, 4e12) == pytest.approx(640)
    assert estimate(1e12, 4e12) == pytest.approx(644.6)


def test_unknown_arithmetic_is_refused_with_a_hint() -> None:
    with pytest.raises(ValueError, match=r"'float61'.*only for float32, float16, int8; did you mean 'float16'\?"):
        estimate(1, 1, "float61")
