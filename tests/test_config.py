"""Configs: what a file must be, what overrides may do, and every shipped config leaf by leaf."""

import json
import pathlib

import pytest
from ml_collections import ConfigDict

from memseq import config as configs

ROOT = pathlib.Path(__file__).parent.parent
SHIPPED = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("configs/**/*.py"))

SOURCE = """
from ml_collections import ConfigDict, config_dict
from memseq.config import choose_variant

def get_config(variant=""):
    config = ConfigDict()
    config.steps = 10
    config.rate = 0.5
    config.on = True
    config.name = "plain"
    config.pattern = ("a", "b")
    config.sizes = (1, 2)
    config.empty = ()
    config.path = config_dict.placeholder(str)
    config.limit = config_dict.placeholder(int)
    config.channel = config_dict.placeholder(str)
    config.channel = "wide"
    config.inner = ConfigDict({"deep": ConfigDict({"learning_rate": 1e-3})})
    config.options = ConfigDict({"a": {"heads": 2}}, type_safe=False)
    return choose_variant(config, variant, {"small": {"steps": 2, "inner.deep.learning_rate": 1.0}})
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "example.py"
    path.write_text(SOURCE)
    return str(path)


@pytest.mark.parametrize(
    "override, key, expected",
    [
        ("--config.steps=7", "steps", 7),
        ("steps=1_000", "steps", 1000),
        ("rate=3", "rate", 3.0),
        ("rate=3e-3", "rate", 3e-3),
        ("on=false", "on", False),
        ("on=1", "on", True),
        ("name=a=b c", "name", "a=b c"),
        ("name=", "name", ""),
        ("pattern=x,y,z", "pattern", ("x", "y", "z")),
        ("pattern=x", "pattern", ("x",)),
        ("pattern=('x',)", "pattern", ("x",)),
        ("pattern=(x, y)", "pattern", ("x", "y")),
        ("pattern=()", "pattern", ()),
        ("pattern=", "pattern", ()),
        ("sizes=3", "sizes", (3,)),
        ("sizes=[3,4]", "sizes", (3, 4)),
        ("empty=1,2", "empty", (1, 2)),
        ("path=/some/where", "path", "/some/where"),
        ("limit=3", "limit", 3),
        ("channel=None", "channel", None),
        ("inner.deep.learning_rate=2", "inner.deep.learning_rate", 2.0),
        ("inner={'deep': {'learning_rate': 3}}", "inner.deep.learning_rate", 3.0),
        ("options.a.heads=4", "options.a.heads", 4),
        ("options.b.heads=4", "options.b.heads", 4),
        ("options.b.kind=text", "options.b.kind", "text"),
        ("options={'c': {'sizes': (1, 2)}}", "options.c.sizes", (1, 2)),
    ],
)
def test_an_override_becomes_the_type_of_its_leaf(file, override, key, expected):
    value = configs.leaves(configs.load(file, [override]))[key][1]
    assert value == expected and type(value) is type(expected)


def test_a_dict_replaces_an_open_section_and_keeps_the_rest_of_a_closed_one(file):
    config = configs.load(file, ["options={'c': {'x': 1}}"])
    assert list(config.options.keys()) == ["c"]
    assert configs.load(file, ["inner={}"]).inner.deep.learning_rate == 1e-3


def test_overrides_in_order_and_in_two_words(file):
    overrides = ["--config.steps", "3", "--config.rate=1", "rate=2", "path=x", "path=None"]
    config = configs.load(file, overrides)
    assert (config.steps, config.rate, config.path) == (3, 2.0, None)


@pytest.mark.parametrize(
    "override, words",
    [
        ("stpes=3", ["'stpes'", "'steps'"]),
        ("learning_rate=3", ["'inner.deep.learning_rate'"]),
        ("inner.deep.lerning_rate=3", ["'inner.deep.learning_rate'"]),
        ("steps.more=3", ["'steps.more'", "'steps'"]),
        ("inner=3", ["'inner'", "section", "deep"]),
        ("steps=3.5", ["'steps'", "integer", "'3.5'"]),
        ("steps=true", ["'steps'", "integer"]),
        ("steps=None", ["'steps'", "integer"]),
        ("limit=x", ["'limit'", "integer or None"]),
        ("rate=fast", ["'rate'", "number"]),
        ("on=2", ["'on'", "true or false"]),
        ("name=None", ["'name'", "text", "'None'"]),
        ("pattern=1,2", ["'pattern'", "str"]),
        ("sizes=a", ["'sizes'", "int"]),
        ("steps", ["'steps'", "no value"]),
        ("--steps=3", ["--steps=3", "--config.KEY=VALUE"]),
        ("--config.=3", ["names no config key"]),
    ],
)
def test_a_wrong_override_says_what_was_expected(file, override, words):
    with pytest.raises(ValueError) as error:
        configs.load(file, [override])
    for word in words:
        assert word in str(error.value)


def test_variants(file):
    config = configs.load(f"{file}:small")
    assert (config.steps, config.inner.deep.learning_rate) == (2, 1.0)
    with pytest.raises(ValueError, match="'smol'.*'small'"):
        configs.load(f"{file}:smol")


@pytest.mark.parametrize(
    "source, words",
    [
        ("x = 1", "does not define get_config"),
        ("import nowhere_at_all", "ModuleNotFoundError"),
        ("def get_config(variant='')", "SyntaxError"),
        ("def get_config(variant=''): return {}", "returned dict"),
        (
            "from ml_collections import ConfigDict\n"
            "def get_config(variant=''): return ConfigDict({'a': {'b': None}})",
            "'a.b' is None without a type",
        ),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path, source, words):
    path = tmp_path / "broken.py"
    path.write_text(source)
    with pytest.raises(ValueError, match=words):
        configs.load(str(path))


@pytest.mark.parametrize("reference", ["nowhere.py", "nowhere.py:smoke", "configs", "a.yaml:x"])
def test_a_missing_file_is_named(reference):
    with pytest.raises(ValueError, match=reference.split(":")[0]):
        configs.load(reference)


def test_a_loaded_config_is_locked(file):
    config = configs.load(file, ["options.b.heads=4"])
    for section in (config, config.inner.deep, config.options, config.options.b):
        with pytest.raises(AttributeError):
            section.unknown = 1


def test_json_holds_everything_and_comes_back(file):
    config = configs.load(file)
    again = configs.from_json(configs.to_json(config))
    assert configs.differences(config, again) == {}
    assert again.is_locked and again.pattern == ("a", "b") and again.path is None
    assert json.loads(configs.to_json(config))["inner"] == {"deep": {"learning_rate": 1e-3}}
    with pytest.raises(ValueError, match="JSON"):
        configs.to_json(ConfigDict({"x": object()}))


def test_differences_name_the_keys(file):
    changed = configs.differences(configs.load(file), configs.load(file, ["steps=3", "options={}"]))
    assert changed == {"steps": (10, 3), "options.a.heads": (2, "absent")}


def test_provenance_has_versions_and_device():
    found = configs.provenance()
    assert {"jax", "flax", "optax"} <= found["versions"].keys()
    assert found["devices"] >= 1 and found["platform"] and "revision" in found
    json.dumps(found)


def _texts(kind, value):
    """(text, value) pairs that a leaf of this type must take."""
    if kind is bool:
        return [("true", True), ("false", False)]
    if kind is int:
        return [(str((value or 0) + 1), (value or 0) + 1)]
    if kind is float:
        return [(repr((value or 0.0) + 0.25), (value or 0.0) + 0.25)]
    if kind is str:
        return [("another", "another"), ("with space=1", "with space=1")]
    if kind in (tuple, list):
        doubled = kind(value) * 2
        return [(repr(value), kind(value)), (repr(doubled), doubled), ("()", kind())]
    raise AssertionError(f"no override is known for a leaf of type {kind}")


@pytest.mark.parametrize("path", SHIPPED)
def test_every_leaf_of_a_shipped_config_can_be_overridden(path):
    base = configs.load(str(ROOT / path))
    assert configs.leaves(base)
    for key, (kind, value) in configs.leaves(base).items():
        for text, expected in _texts(kind, value):
            config = configs.load(str(ROOT / path), [f"--config.{key}={text}"])
            got = configs.leaves(config)[key][1]
            assert got == expected and type(got) is type(expected), key
            others = configs.differences(base, config).keys() - {key}
            assert not others, f"{key} also changed {others}"


@pytest.mark.parametrize("path", SHIPPED)
def test_a_shipped_config_has_a_smoke_variant_and_documents_itself(path):
    base, smoke = (configs.load(f"{ROOT / path}{variant}") for variant in ("", ":smoke"))
    assert configs.differences(base, smoke)
    text = (ROOT / path).read_text()
    assert text.startswith('"""') and "memseq " in text.split('"""')[1]
