"""Experiment configs: Python files, locked once loaded, every leaf settable from the command line.

A config file defines `get_config(variant="")` and returns an `ml_collections.ConfigDict`:

    config = load("configs/lm/bytes.py:smoke", ["--config.optimizer.learning_rate=3e-3"])

What a file has to keep to:
- Every knob is declared with a value; the type of that value is the type of the knob.
- A knob that may be None is declared with `config_dict.placeholder(type)`, and may be given a value
  after that; a bare `None` is refused, as it has no type.
- A section whose keys are free (constructor options by layer name) is an open section,
  `ConfigDict(..., type_safe=False)`: overrides may add keys to it. All other keys are fixed.
- Variants go through `choose_variant`, so that a wrong name is answered with the right ones.
"""

import ast
import contextlib
import difflib
import importlib.metadata
import importlib.util
import json
import pathlib
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import config_dict

ConfigDict = config_dict.ConfigDict

_TRUE = ("true", "1", "yes", "on")
_FALSE = ("false", "0", "no", "off")
_PACKAGES = ("memseq", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def load(reference: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Reads a config file, applies overrides, and returns the config locked.

    Args:
      reference: `"path.py"` or `"path.py:variant"`.
      overrides: `"--config.a.b=3"`, `"--config.a.b"` followed by `"3"`, or `"a.b=3"`. Text is read
        as the type of the leaf: `true` or `false` for a bool, `a,b` or `"('a', 'b')"` for a tuple,
        `None` for a leaf declared with a placeholder. A section takes a dict literal.

    Raises:
      ValueError: no such file, no `get_config` in it, an unknown variant, an unknown key (names the
        nearest known one), or a value of the wrong type.
    """
    path, variant = _split_reference(reference)
    config = _run_file(path, variant)
    untyped = [key for key, (kind, _) in leaves(config).items() if kind is type(None)]
    if untyped:
        raise ValueError(
            f"{path}: config key {untyped[0]!r} is None without a type, so it could not be "
            "overridden; declare it with config_dict.placeholder(type)"
        )
    for key, text in _split_overrides(overrides):
        _override(config, key, text)
    config.lock()
    return config


def choose_variant(
    config: ConfigDict, variant: str, variants: Mapping[str, Mapping[str, Any]]
) -> ConfigDict:
    """Sets the values of a named variant; `""` is the config as it stands.

    Args:
      config: the config with its base values; changed in place and returned.
      variant: the name that came after the colon of the reference.
      variants: name -> {dotted key: value}.

    Raises:
      ValueError: the name is not one of `variants`, or a variant sets an unknown key.
    """
    if not variant:
        return config
    if variant not in variants:
        raise ValueError(
            f"unknown config variant {variant!r}; did you mean {nearest(variant, variants)!r}? "
            f"The variants are {', '.join(map(repr, variants))}"
        )
    for key, value in variants[variant].items():
        section, name = _find(config, key)
        with _as_value_error(key, value):
            section[name] = value
    return config


def leaves(config: ConfigDict, prefix: str = "") -> dict[str, tuple[type, Any]]:
    """Every leaf of a config as {dotted key: (type, value)}, in sorted order."""
    found = {}
    for name in sorted(config.keys()):
        value = config[name]
        if isinstance(value, ConfigDict):
            found.update(leaves(value, f"{prefix}{name}."))
        else:
            found[prefix + name] = (config.get_type(name), value)
    return found


def to_json(config: ConfigDict) -> str:
    """The resolved config as sorted JSON; tuples become lists, empty leaves null."""
    try:
        return json.dumps(config.to_dict(), sort_keys=True, indent=2)
    except TypeError as error:
        raise ValueError(f"the config holds a value that JSON cannot: {error}") from error


def from_json(text: str) -> ConfigDict:
    """The inverse of `to_json`, locked; lists come back as tuples.

    Raises:
      ValueError: the text is not the JSON of a config.
    """
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError(f"a saved config is a JSON object, got {type(values).__name__}")
    config = ConfigDict(_tuples(values))
    config.lock()
    return config


def differences(old: ConfigDict, new: ConfigDict) -> dict[str, tuple[Any, Any]]:
    """Leaves that differ between two configs, {dotted key: (old, new)}; "absent" for none."""
    before = {key: value for key, (_, value) in leaves(old).items()}
    after = {key: value for key, (_, value) in leaves(new).items()}
    pairs = {k: (before.get(k, "absent"), after.get(k, "absent")) for k in before | after}
    return {key: pair for key, pair in sorted(pairs.items()) if pair[0] != pair[1]}


def provenance() -> dict[str, Any]:
    """What produced a run: code revision (None outside a git checkout), versions and devices."""
    import jax

    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    device = jax.devices()[0]
    return {
        "revision": _revision(pathlib.Path(__file__).resolve().parent.parent),
        "python": platform.python_version(),
        "versions": versions,
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
    }


def nearest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """The known name closest to a mistyped one: same last part first, then closest spelling."""
    last = name.rpartition(".")[2]
    same_last = [key for key in known if key.rpartition(".")[2] == last]
    candidates = same_last or list(known)
    return max(candidates, key=lambda key: difflib.SequenceMatcher(None, name, key).ratio())


def _split_reference(reference: str) -> tuple[pathlib.Path, str]:
    head, colon, tail = reference.rpartition(":")
    file, variant = (head, tail) if colon and head.endswith(".py") else (reference, "")
    path = pathlib.Path(file)
    if path.suffix != ".py":
        raise ValueError(
            f"config {reference!r}: expected a Python file, 'path.py' or 'path.py:variant'"
        )
    if not path.is_file():
        raise ValueError(f"config file {file!r} does not exist (looked in {pathlib.Path.cwd()})")
    return path, variant


def _run_file(path: pathlib.Path, variant: str) -> ConfigDict:
    spec = importlib.util.spec_from_file_location(f"memseq_config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's file raises is reported as the file's fault
        raise ValueError(
            f"config file {path} cannot be run: {type(error).__name__}: {error}"
        ) from error
    if not callable(getattr(module, "get_config", None)):
        raise ValueError(f"config file {path} does not define get_config(variant='')")
    config = module.get_config(variant)
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"get_config in {path} returned {type(config).__name__}, "
            "expected an ml_collections.ConfigDict"
        )
    return config


def _split_overrides(overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    items = iter(overrides)
    for item in items:
        key, equals, text = item.partition("=")
        if not equals:
            text = next(items, None)
            if text is None or text.startswith("--"):
                raise ValueError(f"override {item!r} has no value; write {item}=VALUE")
        if key.startswith("-") and not key.startswith("--config."):
            raise ValueError(f"override {item!r} is not a config key; write --config.KEY=VALUE")
        key = key.removeprefix("--config.")
        if not key:
            raise ValueError(f"override {item!r} names no config key; write --config.KEY=VALUE")
        yield key, text


def _override(config: ConfigDict, key: str, text: str) -> None:
    section, name = _find(config, key)
    if name in section and isinstance(section[name], ConfigDict):
        _override_section(config, key, section[name], text)
    elif name not in section:  # a new key of an open section
        section[name] = _section_value(_literal_or_text(text))
    else:
        stored = dict(section.items(preserve_field_references=True))[name]
        optional = isinstance(stored, config_dict.FieldReference)
        value = _parse(key, text, section.get_type(name), section[name], optional)
        with _as_value_error(key, value):
            section[name] = value


def _override_section(config: ConfigDict, key: str, section: ConfigDict, text: str) -> None:
    values = _literal_or_text(text)
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(
            f"config key {key!r} is a section; expected one of its keys "
            f"({', '.join(sorted(section.keys())) or 'none yet'}) or a dict literal, got {text!r}"
        )
    if section.is_type_safe:
        for name, value in values.items():
            _override(config, f"{key}.{name}", value if isinstance(value, str) else repr(value))
    else:
        for name in list(section.keys()):
            del section[name]
        section.update(_section_value(values))


def _find(config: ConfigDict, key: str) -> tuple[ConfigDict, str]:
    """The section that holds a dotted key, and the key's last part."""
    *parents, name = key.split(".")
    section = config
    for parent in parents:
        if parent not in section and not section.is_type_safe:
            section[parent] = _section_value({})
        if parent not in section or not isinstance(section[parent], ConfigDict):
            raise _unknown(config, key)
        section = section[parent]
    if not name or (name not in section and section.is_type_safe):
        raise _unknown(config, key)
    return section, name


def _unknown(config: ConfigDict, key: str) -> ValueError:
    known = leaves(config)
    if not known:
        return ValueError(f"unknown config key {key!r}; this config has no keys")
    return ValueError(f"unknown config key {key!r}; did you mean {nearest(key, known)!r}?")


def _parse(key: str, text: str, kind: type, default: Any, optional: bool) -> Any:
    """Text from a command line as a value of the leaf's type."""
    wrong = ValueError(f"config key {key!r} takes {_describe(kind, optional)}, got {text!r}")
    word = text.strip()
    if word.lower() == "none":
        if optional:
            return None
        raise wrong  # also for a str: the text "None" in a path or a name is always a mistake
    try:
        if kind is bool:
            return {**dict.fromkeys(_TRUE, True), **dict.fromkeys(_FALSE, False)}[word.lower()]
        if kind in (int, float):
            return kind(word)
    except (KeyError, ValueError):
        raise wrong from None
    if kind is str:
        return text
    if kind in (tuple, list):
        return kind(_sequence(key, text, default or ()))
    value = _literal_or_text(text)
    if not isinstance(value, kind):
        raise wrong
    return value


def _sequence(key: str, text: str, default: Sequence[Any]) -> list[Any]:
    """`a,b`, `(a, b)`, `('a', 'b')` or `1,2`, elements of the type of the default's first one."""
    value = _literal_or_text(text)
    if isinstance(value, str):
        inside = value.strip()
        if inside[:1] + inside[-1:] in ("()", "[]"):
            inside = inside[1:-1]
        value = [_literal_or_text(part.strip()) for part in inside.split(",") if part.strip()]
    value = list(value) if isinstance(value, (tuple, list)) else [value]
    if default:
        kind = type(default[0])
        if kind is float:
            value = [float(x) if type(x) is int else x for x in value]
        if kind is tuple:
            value = [tuple(x) if isinstance(x, list) else x for x in value]
        for x in value:
            if type(x) is not kind:
                raise ValueError(
                    f"config key {key!r} takes a sequence of {kind.__name__}, got {x!r} in {text!r}"
                )
    return value


def _literal_or_text(text: str) -> Any:
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return text


def _describe(kind: type, optional: bool) -> str:
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
    return names.get(kind, f"a {kind.__name__}") + (" or None" if optional else "")


def _section_value(value: Any) -> Any:
    """Dicts inside an open section are open sections too."""
    if isinstance(value, dict):
        return ConfigDict({k: _section_value(v) for k, v in value.items()}, type_safe=False)
    return value


@contextlib.contextmanager
def _as_value_error(key: str, value: Any) -> Iterator[None]:
    try:
        yield
    except TypeError as error:
        raise ValueError(f"config key {key!r} cannot take {value!r}: {error}") from error


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _tuples(inner) for name, inner in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _revision(root: pathlib.Path) -> str | None:
    """`git describe` of a checkout, with `-dirty`; None for an installed wheel or without git."""
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--tags"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
