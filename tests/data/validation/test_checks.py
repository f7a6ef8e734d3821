"""What the suite's declarations must be, without Great Expectations."""

import dataclasses

import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ml.core.hashes import canonical
from ml.core.taxonomy import parse_name
from ml.data.validation.checks import Check, build_suite, suite_version


def regex() -> str:
    (check,) = (one for one in build_suite(False) if one.name == "file_names")
    return str(check.rules[0].arguments["regex"])


def parses(name: str) -> bool:
    try:
        parse_name(name)
    except ValueError:
        return False
    return True


@given(
    st.from_regex(
        r"SOB_[BMX]_(A|F|DC|XX)-[0-9]{1,2}-[0-9]{0,3}[A-Za-z]?-(40|50|400)-[0-9]{2,4}\.(png|jpg)\n?", fullmatch=True
    )
)
@example("SOB_B_A-14-22549AB-40-001.png")
@example("SOB_B_A-14-22549AB-40-001.png\n")
@example("xSOB_B_A-14-22549AB-40-001.png")
@example("SOB_B_A-14-22549AB-40-001.png.png")
def test_the_path_regex_is_the_grammar_of_names(name: str) -> None:
    paths = pd.Series([name, f"a folder/{name}", f"SOB_B_A-14-22549AB-40-001.png/{name}"], dtype="str")
    assert list(paths.str.contains(regex())) == [parses(name)] * 3


def test_every_check_says_why_and_nothing_is_declared_twice() -> None:
    suite = build_suite(True)
    assert len({check.name for check in suite}) == len(suite)
    assert all(check.rules and check.sentence.endswith(".") and "$" not in check.sentence for check in suite)
    assert {check.name for check in suite if check.severity == "warning"} == {
        *("image_sizes", "class_sizes", "images_gained", "near_duplicates")
    }
    canonical([dataclasses.asdict(check) for check in suite])


def test_the_inventory_is_only_asked_of_a_source_that_claims_it() -> None:
    assert {check.name for check in build_suite(True)} - {check.name for check in build_suite(False)} == {"inventory"}


@pytest.mark.parametrize("change", [{"severity": "warning"}, {"sentence": "Other words."}, {"rules": ()}])
def test_the_version_changes_with_any_declaration(change: dict[str, object]) -> None:
    suite = build_suite(False)
    changed: tuple[Check, ...] = (dataclasses.replace(suite[0], **change), *suite[1:])  # type: ignore[arg-type]
    assert suite_version(changed) != suite_version(suite)
    assert suite_version(build_suite(False)) == suite_version(suite) != suite_version(build_suite(True))
