"""Files that people write: whatever stands in them is read as it was meant, or refused with its line and key."""

import calendar
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from ml.core.errors import ConfigError
from ml.core.yaml_files import Name, Schedule, YamlModel, find_yaml, is_name, read_mapping, read_yaml


class Inner(YamlModel):
    """A block within a file."""

    note: str = ""
    labels: dict[str, str] = Field({})
    share: float = 0.5


class Example(YamlModel):
    """A file with every type of field that ours have."""

    name: str = ""
    texts: tuple[str, ...] = ()
    labels: dict[str, str] = Field({})
    either: str | None = None
    path: Path | None = None
    number: int = Field(1, description="A whole number.")
    share: float = 0.5
    truth: bool = False
    anything: dict[str, Any] = Field({})
    block: Inner = Inner()
    blocks: tuple[Inner, ...] = ()
    schedule: Schedule | None = None


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("yaml") / "mine.yaml"


def read(file: Path, text: str) -> Example:
    file.write_text(text, encoding="utf-8")
    return read_yaml(file, Example)


def try_to_read(file: Path, text: str) -> tuple[Example | None, str]:
    """Returns what was read, or else the message, which names the file and is one line."""
    try:
        return read(file, text), ""
    except ConfigError as error:
        said = str(error)
    assert said.startswith(f"{file}: ")
    assert "\n" not in said
    return None, said.removeprefix(f"{file}: ")


def refused(file: Path, text: str) -> str:
    found, said = try_to_read(file, text)
    assert found is None
    return said


ID_LIKE_WORDS = re.findall(
    r"\S+",
    "0123 0128 1e3 1E5 12_000 NO no Yes on OFF y n true False 2024-01-02 2024-13-45 1:30 190:20:30.5 0x1F 0b11 0o17 "
    "1.10 1. .5 +1 -017 00 .inf -.INF .NaN 20240102 1_0.5 1e+3 6.02e23 08.5 1__0 2001-12-14t21:59:43.10-05:00",
)

ID_LIKE = st.one_of(
    st.sampled_from(ID_LIKE_WORDS),
    st.from_regex(r"[0-9]{1,8}", fullmatch=True),
    st.from_regex(r"[+-]?[0-9_]{1,5}(\.[0-9_]{0,3})?([eE][+-]?[0-9]{1,3})?", fullmatch=True).filter(
        lambda text: text[0] != "_" and text != "-"
    ),
    st.from_regex(r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}", fullmatch=True),
    st.from_regex(r"[0-9]{1,3}(:[0-9]{1,2}){1,2}", fullmatch=True),
    st.from_regex(r"0[xob][0-9a-fA-F_]{1,4}", fullmatch=True),
)


def read_by_earlier_releases(written: str) -> object:
    """They used PyYAML, which reads YAML 1.1; what only looks like a number or a date was an error."""
    try:
        return yaml.safe_load(written)
    except (yaml.YAMLError, ValueError):
        return written


@given(ID_LIKE)
def test_text_stays_as_it_was_written(file: Path, written: str) -> None:
    read_back = read(
        file,
        f"name: {written}\ntexts: [{written}, '{written}']\nlabels:\n  {written}: {written}\neither: {written}\n"
        f"path: {written}\nblock: {{note: {written}, labels: {{{written}: A}}}}\nblocks:\n- note: {written}\n",
    )
    assert read_back == Example(
        name=written,
        texts=(written, written),
        labels={written: written},
        either=written,
        path=Path(written),
        block=Inner(note=written, labels={written: "A"}),
        blocks=(Inner(note=written),),
    )


@given(ID_LIKE)
def test_where_anything_may_stand_an_id_is_kept_or_has_to_be_quoted(file: Path, written: str) -> None:
    assert read(file, f"anything: {{key: '{written}'}}\n").anything == {"key": written}
    found, said = try_to_read(file, f"name: x\nanything:\n  key: [{written}]\n")
    if found is None:
        advice = f"{written} may be read as text or as something else; put it in quotes: '{written}'"
        assert said.removesuffix(", or if it is a number, write it in plain decimals") == (
            f"line 3: 'anything.key.0': {advice}"
        )
        return
    value = found.anything["key"][0]
    assert type(value) is type(read_by_earlier_releases(written))
    if isinstance(value, str):
        assert value == written
    elif isinstance(value, bool):
        assert written.lower() in {"true", "false"}
    else:  # what nobody takes for an id: no zero in front, no underscore
        assert re.fullmatch(r"[-+]?(0|[1-9][0-9]*)?\.?[0-9]*([eE][-+][0-9]+)?|[-+]?\.(inf|nan)", written.lower())
        assert value == yaml.safe_load(written) or math.isnan(value)


@given(ID_LIKE, st.sampled_from(["number", "share", "truth"]))
def test_a_number_is_what_it_was_before_or_is_refused(file: Path, written: str, field: str) -> None:
    found, said = try_to_read(file, f"{field}: {written}\n")
    if found is None:
        assert said.startswith(f"line 1: '{field}': ")
        return
    now = getattr(found, field)
    before = read_by_earlier_releases(written)
    if field != "truth":
        assert not isinstance(before, bool)
    if isinstance(before, int | float):
        assert now == before or math.isnan(now)
    elif field == "truth":
        assert now == Example.model_validate({"truth": written}).truth
    else:
        assert now == float(written.replace("_", ""))


WORDS = st.sampled_from(["a", "b", "roc_auc", "0123", "NO", "no", "1e3", "2024-01-02", "null-ish", "é"])


@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=6), st.booleans(), st.booleans())
def test_a_key_that_stands_twice_is_refused(file: Path, pairs: list[tuple[str, str]], flow: bool, quoted: bool) -> None:
    keys = [key for key, _ in pairs]
    # The second of two may stand in quotes: it is the same key.
    written = [f"'{key}'" if quoted and key in keys[:i] else key for i, key in enumerate(keys)]
    lines = [f"{key}: {value}" for key, (_, value) in zip(written, pairs, strict=True)]
    text = f"labels: {{{', '.join(lines)}}}\n" if flow else "labels:\n" + "".join(f"  {line}\n" for line in lines)
    if len(set(keys)) == len(keys):
        assert read(file, text).labels == dict(pairs)
        return
    second = next(i for i, key in enumerate(keys) if key in keys[:i])
    first = keys.index(keys[second])
    assert refused(file, text) == (
        f"line {1 if flow else second + 2}: 'labels.{keys[second]}': stands there twice, first in line "
        f"{1 if flow else first + 2}; leave one of them out"
    )


@given(
    st.dictionaries(WORDS, WORDS, max_size=4),
    st.dictionaries(WORDS, WORDS, max_size=4),
    st.dictionaries(WORDS, WORDS, max_size=4),
    st.booleans(),
)
def test_a_merged_key_overrides_nothing_and_is_not_overridden(
    file: Path, one: dict[str, str], two: dict[str, str], own: dict[str, str], first: bool
) -> None:
    def flow(pairs: dict[str, str]) -> str:
        return "{" + ", ".join(f"{key}: {value}" for key, value in pairs.items()) + "}"

    merge = ["  <<: [*one, *two]"]
    lines = [f"  {key}: {value}" for key, value in own.items()]
    text = "\n".join(
        [
            f"blocks: [labels: &one {flow(one)}, labels: &two {flow(two)}]".replace("[labels", "[{labels")
            .replace(", labels: &two", "}, {labels: &two")
            .replace("}]", "}}]"),
            "labels:",
            *(merge + lines if first else lines + merge),
        ]
    )
    together = [*one, *two, *own]
    if len(set(together)) == len(together):
        assert read(file, text).labels == {**one, **two, **own}
    else:
        said = refused(file, text)
        assert "stands there twice" in said
        assert re.match(r"line [0-9]+: 'labels\.", said)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | ID_LIKE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | ID_LIKE, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=5) | ID_LIKE, JSON, max_size=3), st.booleans())
def test_what_a_program_wrote_is_read_back_or_refused(file: Path, data: dict[str, Any], as_json: bool) -> None:
    text = json.dumps({"anything": data}) if as_json else yaml.safe_dump({"anything": data}, allow_unicode=True)
    found, said = try_to_read(file, text)
    if found is None:
        assert re.search(r"put it in quotes|is not valid YAML|escaped half of a character", said)
    else:
        assert found.anything == data


LINES = st.sampled_from(
    [
        *("name: x", "name: [", "number: 017", "labels: &a {NO: 1}", "  NO: 2", "<<: *a", "labels:", "  <<: *a"),
        *("? [a]", ": b", "- a", "---", "...", "%YAML 1.2", "!!str 1", "name: !!python/name:os.system", "name: !x y"),
        *(
            "texts: [a, *a]",
            "block: &b {note: *b}",
            "block: {note: {}}",
            "anything: {{ x }}",
            "name: |",
            "  text",
            "\t",
        ),
        *(
            "~: 1",
            "null: 1",
            "labels: {? : 1}",
            'name: "\\UFFFFFFFF"',
            "'",
            '"',
            "# c",
            "name: !!binary aGk=",
            "=: =",
            "&",
        ),
    ]
)


@given(st.lists(LINES | st.text(alphabet=" :,{}[]&*!|>'\"%#?-\t\nab01~<=\\\x00\x85\ufeff", max_size=12), max_size=8))
def test_any_text_is_read_or_refused(file: Path, lines: list[str]) -> None:
    try_to_read(file, "\n".join(lines))  # looks at the message, and lets no other error through


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("number: x\nNO: 1\n", "line 1: 'number': Input should be a valid integer"),
        ("name: x\n\nNO: 1\n", "line 3: unknown key 'NO' (known: anything, block,"),
        ("block:\n  share: 0.5\n  0123: 1\n", "line 3: unknown key 'block.0123' (known: labels, note, share)"),
        ("blocks:\n- share: 1\n- share: much\n", "line 3: 'blocks.1.share': Input should be a valid number"),
        ("labels:\n  NO: [1]\n", "line 2: 'labels.NO': Input should be a valid string"),
        ("labels:\n  NO: null\n", "line 2: 'labels.NO': Input should be a valid string"),
        ("labels:\n  null: A\n", "line 2: 'labels': the key null is no text; put it in quotes"),
        ("labels:\n  [a]: A\n", "line 2: 'labels': a key must be a text; put it in quotes"),
        ("anything: {{ ds }}\n", "line 1: 'anything': a key must be a text; put it in quotes"),
        ("anything:\n  a: {0123: 1}\n", "line 2: 'anything.a.0123': 0123 may be read as text or as something else;"),
        ("anything:\n  a: {1: 1, +1: 2}\n", "line 2: 'anything.a.+1': is the same key as another, written otherwise"),
        (
            "number: 017\n",
            "line 1: 'number': YAML 1.1 and 1.2 read 017 differently; write it as a plain decimal number",
        ),
        ("share: yes\n", "line 1: 'share': yes is no number"),
        ("name: !!python/name:os.system\n", "line 1: 'name': the tag !!python/name:os.system has no meaning here"),
        ("name: x\nblock: &b\n  labels: *b\n", "line 2: 'block.labels': stands within itself"),
        ("name: &a x\neither: &a y\n", "line 2: 'either': the anchor &a stands there twice, first in line 1"),
        ('name: "\\ud800"\n', "line 1: 'name': an escaped half of a character"),
        ("name: =\nnumber: =\n", "line 2: 'number': Input should be a valid integer"),
        ("name: x\n name: [\n", "line 2: is not valid YAML: mapping values are not allowed here"),
        ("name: x\n---\nname: y\n", "line 2: is not valid YAML: expected a single document in the stream"),
        ("a: " + "[" * 2000, "line 1: is not valid YAML: maximum depth"),
    ],
)
def test_a_mistake_is_named_with_its_line(file: Path, text: str, said: str) -> None:
    assert refused(file, text).startswith(said)


def test_aliases_that_multiply_are_refused(file: Path) -> None:
    lines = ["anything:", "  a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"  a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    assert "holds more than 100,000 values" in refused(file, "\n".join(lines))


def test_a_tag_may_say_that_something_is_text(file: Path) -> None:
    assert read(file, "anything: {a: !!str 0123}\n").anything == {"a": "0123"}


def test_truth_values_are_those_of_before(file: Path) -> None:
    for written in ("yes", "Yes", "on", "true", "TRUE"):
        assert read(file, f"truth: {written}\n").truth is True
    for written in ("no", "Off", "false"):
        assert read(file, f"truth: {written}\n").truth is False


@given(st.integers(1, 31), st.integers(1, 12))
def test_a_schedule_that_never_comes_is_refused(file: Path, day: int, month: int) -> None:
    cron = f"0 3 {day} {month} *"
    if day <= calendar.monthrange(2024, month)[1]:  # a leap year
        assert read(file, f"schedule: {cron}\n").schedule == cron
    else:
        assert refused(file, f"schedule: {cron}\n").startswith(f"line 1: 'schedule': '{cron}' never comes")


CRON_FIELD = st.one_of(
    st.just("*"),
    st.integers(-1, 70).map(str),
    st.builds("{}-{}".format, st.integers(0, 61), st.integers(0, 61)),
    st.builds("*/{}".format, st.integers(0, 70)),
    st.lists(st.integers(0, 40), min_size=1, max_size=3).map(lambda numbers: ",".join(map(str, numbers))),
    st.sampled_from(
        ["mon", "MON-FRI", "jan", "L", "5#3", "1#6", "L5", "?", "H", "R", "R(1-5)", "x", "W", "7", "@daily"]
    ),
)


@given(st.tuples(*[CRON_FIELD] * 5).map(" ".join))
def test_a_schedule_that_is_accepted_has_a_next_time_for_airflow(file: Path, cron: str) -> None:
    from airflow.timetables.trigger import CronTriggerTimetable
    from pendulum import datetime

    found, said = try_to_read(file, f"schedule: '{cron}'\n")
    if found is None:
        assert f"line 1: 'schedule': '{cron}' " in said
        return
    assert found.schedule == cron
    timetable = CronTriggerTimetable(cron, timezone="UTC")
    timetable.validate()
    assert timetable._get_next(datetime(2026, 1, 1)) > datetime(2026, 1, 1)


@pytest.mark.parametrize("end", ["", ".5"])
@pytest.mark.parametrize("key", ["number", "share", "truth", "anything"])
def test_a_number_of_many_parts_is_refused_before_it_is_computed(file: Path, key: str, end: str) -> None:
    value = ":".join(["1"] * 10_000) + end
    said = refused(file, f"{key}: {{x: {value}}}\n" if key == "anything" else f"{key}: {value}\n")
    assert "has more than 10 parts" in said
    assert len(said) < 1000


@pytest.mark.parametrize("preset", ["@hourly", "@daily", "@weekly", "@monthly", "@quarterly", "@yearly"])
def test_presets_of_airflow(file: Path, preset: str) -> None:
    assert read(file, f"schedule: '{preset}'\n").schedule == preset


@pytest.mark.parametrize("cron", ["61 0 * * *", "0 0 32 1 *", "a b c d e", "0 0 * * 1#6", "*/0 * * * *"])
def test_a_schedule_that_no_cron_reads_is_refused(file: Path, cron: str) -> None:
    assert f"'{cron}' is no time that cron can read" in refused(file, f"schedule: '{cron}'\n")


@pytest.mark.parametrize(
    "name", ["x" * 300, "x" * 100_000, "a\0b", "--help", "\ud800", "~no-such-user/x.yaml", "/", ".yaml"]
)
def test_an_odd_name_of_a_file_is_refused_shortly(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError) as error:
        find_yaml(tmp_path, name)
    assert len(str(error.value)) < 1000


class Named(YamlModel):
    """A file of something with a name."""

    name: Name


def test_a_name_is_short_enough_for_a_file(tmp_path: Path) -> None:
    file = tmp_path / "made.yaml"
    file.write_text(f"name: {'a' * 200}")
    assert read_yaml(file, Named).name == "a" * 200
    assert is_name("a" * 200)
    file.write_text(f"\nname: {'a' * 201}")
    with pytest.raises(ConfigError, match=r"made\.yaml: line 2: 'name': String should have at most 200 characters$"):
        read_yaml(file, Named)
    with pytest.raises(ConfigError, match=r"…': a name has 200 characters at the most$"):
        find_yaml(tmp_path, "a" * 201)
    assert not is_name("a" * 201)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "cp1252"])
def test_a_file_in_another_encoding_is_refused_with_a_remedy(file: Path, encoding: str) -> None:
    file.write_bytes("name: café\n".encode(encoding))
    with pytest.raises(ConfigError, match="save it as UTF-8"):
        read_yaml(file, Example)


@given(st.lists(st.text("abcdefgh", min_size=1, max_size=300), min_size=1, max_size=40, unique=True))
def test_a_message_does_not_grow_with_the_mistakes(file: Path, keys: list[str]) -> None:
    file.write_text("name: x\n" + "\n".join(f"{key}x: 1" for key in keys))
    with pytest.raises(ConfigError) as error:
        read_yaml(file, Example)
    assert len(str(error.value)) < 5_000
    assert str(error.value).endswith(f" and {len(keys) - 10} more") == (len(keys) > 10)


def test_a_file_of_many_megabytes_is_refused_before_it_is_read(tmp_path):
    file = tmp_path / "large.yaml"
    file.write_text("# all comments\n" * 100_000)
    with pytest.raises(ConfigError, match=r"large\.yaml: 1,500,000 bytes; a YAML file has 1,000,000 at the most"):
        read_mapping(file)
