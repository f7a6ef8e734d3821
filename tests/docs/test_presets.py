"""docs/presets.md tells every field as it is, and a preset takes no other."""

import copy
import runpy

import pytest
import yaml

from ml.core.errors import ConfigError
from ml.core.settings import PROJECT
from ml.core.yaml_files import read_yaml
from ml.training.presets import Preset

DEFAULT = yaml.safe_load((PROJECT / "ml" / "training" / "presets" / "default.yaml").read_text())
MADE = runpy.run_path(str(PROJECT / "docs" / "presets.py"))


def test_the_page_is_what_the_fields_say():
    assert (PROJECT / "docs" / "presets.md").read_text() == MADE["page"](), "run python docs/presets.py"


def test_every_field_is_described_and_on_the_page():
    found = list(MADE["fields"](Preset))
    assert ("binary", "views", "augmentation", "hed") in {path for path, _, _ in found}
    assert [path for path, _, description in found if len(description) < 10] == []
    page = MADE["page"]()
    for path, takes, description in found:
        if takes:
            assert f"| `{'.'.join(path[2:] or path)}` | {description} | {takes} |" in page


def sections(values, path=()):
    yield path
    for name, value in values.items():
        if isinstance(value, dict):
            yield from sections(value, (*path, name))


@pytest.mark.parametrize("path", list(sections(DEFAULT)), ids=".".join)
def test_an_unknown_field_is_an_error_that_names_it(tmp_path, path):
    values = copy.deepcopy(DEFAULT)
    section = values
    for name in path:
        section = section[name]
    section["magic"] = 1
    (tmp_path / "default.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=rf"unknown key '{'.'.join((*path, 'magic'))}'"):
        read_yaml(tmp_path / "default.yaml", Preset)


@pytest.mark.parametrize("path", list(sections(DEFAULT)), ids=".".join)
def test_a_field_that_is_left_out_is_an_error_that_names_it(tmp_path, path):
    values = copy.deepcopy(DEFAULT)
    section = values
    for name in path:
        section = section[name]
    gone = next(iter(section))
    del section[gone]
    (tmp_path / "default.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=rf"{'.'.join((*path, gone))}"):
        read_yaml(tmp_path / "default.yaml", Preset)
