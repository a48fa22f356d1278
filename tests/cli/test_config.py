"""A node's configuration: bounds, and flag over environment over file over default."""

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from shardkv.config import SECTIONS, SETTINGS, NodeConfig, RaftConfig, RangesConfig
from shardkv.config_sources import load_node_config
from shardkv.errors import ConfigError
from shardkv_placement.settings import Settings

QUICK_START = Path(__file__).parents[2] / "docs" / "quickstart.md"
FLAGS = {"name": "n1", "data": "/data", "listen": "127.0.0.1:7001"}


def refused(flags: dict[str, object], variables: dict[str, str] | None = None, file: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_node_config(flags, variables or {}, file, "node.toml")
    return str(caught.value)


def test_the_required_settings_alone_make_a_configuration_with_the_documented_defaults() -> None:
    """Work order: tick 50 ms, heartbeat 2, election 10, promise 400 ms, split at 64 MiB, clock offset 500 ms."""
    config = load_node_config(FLAGS, {})
    assert config == NodeConfig(name="n1", data="/data", listen="127.0.0.1:7001")
    assert config.raft == RaftConfig(tick_ms=50, heartbeat_ticks=2, election_ticks=10, promise_ms=400)
    assert config.ranges.split_bytes == 64 * 1024 * 1024
    assert config.clock_offset_max_ms == 500
    assert config.storage.engine == "rocksdb"


@pytest.mark.parametrize(
    "flags, variables, file, expected",
    [
        ({}, {}, None, 64 * 1024 * 1024),
        ({}, {}, "[ranges]\nsplit_bytes = 100_000", 100_000),
        ({}, {"SHARDKV_SPLIT_BYTES": "200000"}, "[ranges]\nsplit_bytes = 100_000", 200_000),
        (
            {"split_bytes": "1MiB"},
            {"SHARDKV_SPLIT_BYTES": "200000"},
            "[ranges]\nsplit_bytes = 100_000",
            1024 * 1024,
        ),
        ({"split_bytes": None}, {"SHARDKV_SPLIT_BYTES": ""}, None, 64 * 1024 * 1024),
    ],
    ids=["default", "file", "environment over file", "flag over environment", "empty means not given"],
)
def test_a_flag_wins_over_the_environment_and_the_environment_over_the_file(
    flags: dict[str, object], variables: dict[str, str], file: str | None, expected: int
) -> None:
    """DESIGN 2.2: flag over environment over file."""
    assert load_node_config({**FLAGS, **flags}, variables, file, "f").ranges.split_bytes == expected


def test_every_setting_can_come_from_each_of_the_three_sources() -> None:
    """DESIGN 2.2: every node flag also from SHARDKV_<FLAG> and the TOML file."""
    samples: dict[str, tuple[str, str]] = {
        "name": ("n9", '"n9"'),
        "data": ("/d", '"/d"'),
        "listen": ("h:1", '"h:1"'),
        "advertise": ("h:2", '"h:2"'),
        "admin": ("h:3", '"h:3"'),
        "join": ("h:4,h:5", '["h:4", "h:5"]'),
        "label": ("zone=a,rack=1", "{zone = 'a', rack = '1'}"),
        "engine": ("memory", '"memory"'),
        "replicas": ("5", "5"),
        "log_level": ("error", '"error"'),
    }
    everything: dict[str, tuple[str, str]] = {}
    for name, setting in SETTINGS.items():
        if name in samples:
            everything[name] = samples[name]
        elif name != "bootstrap":
            value = str(setting.default - 1 if name != "promise_ms" else 399)
            everything[name] = (value, value)
    lines = [f"{name} = {toml}" for name, (_, toml) in everything.items() if not SETTINGS[name].section]
    for section in SECTIONS:
        lines.append(f"[{section}]")
        lines += [f"{name} = {toml}" for name, (_, toml) in everything.items() if SETTINGS[name].section == section]
    from_file = load_node_config({}, {}, "\n".join(lines), "f")
    from_flags = load_node_config({name: text for name, (text, _) in everything.items()}, {})
    from_variables = load_node_config({}, {SETTINGS[name].variable: text for name, (text, _) in everything.items()})
    assert from_file == from_flags == from_variables
    assert from_file.label == (("rack", "1"), ("zone", "a"))
    assert from_file.join == ("h:4", "h:5")
    default = NodeConfig(name="n1", data="/data", listen="127.0.0.1:7001")
    for each in dataclasses.fields(NodeConfig):
        if each.name != "bootstrap":
            assert getattr(from_file, each.name) != getattr(default, each.name), each.name


def test_the_file_in_the_quick_start_shows_every_setting_in_its_place() -> None:
    """Nothing else says which table a setting belongs to."""
    [example] = re.findall(r"```toml\n(.*?)```", QUICK_START.read_text(encoding="utf-8"), re.DOTALL)
    config = load_node_config({}, {}, example, "n1.toml")
    for section, settings in SECTIONS.items():
        assert getattr(config, section) == settings(), f"not the defaults of {section}"
    document = tomllib.loads(example)
    names = {*document, *(name for section in SECTIONS for name in document[section])}
    assert names - {*SECTIONS} == {*SETTINGS} - {"advertise", "join"}


@pytest.mark.parametrize(
    "flags, variables, file, words",
    [
        ({"name": None}, {}, None, ["name is missing", "--name", "SHARDKV_NAME", "file"]),
        ({"listen": "nonsense"}, {}, None, ["listen", "HOST:PORT", "'nonsense'", "--listen"]),
        ({"listen": "h:99999"}, {}, None, ["listen", "65535", "--listen"]),
        ({}, {"SHARDKV_ADVERTISE": "h:0"}, None, ["advertise", "SHARDKV_ADVERTISE"]),
        ({}, {}, 'join = ["h:1", "h"]', ["join", "'h'", "join in node.toml"]),
        ({}, {"SHARDKV_TICK_MS": "0"}, None, ["tick_ms", "from 1 to", "SHARDKV_TICK_MS"]),
        ({"tick_ms": "-5"}, {}, None, ["tick_ms", "from 1 to 10000, not -5", "--tick-ms"]),
        ({"split_bytes": "-5MiB"}, {}, None, ["split_bytes", "from 16384 to", "not -5242880", "--split-bytes"]),
        ({}, {"SHARDKV_TICK_MS": "fast"}, None, ["tick_ms", "whole number", "SHARDKV_TICK_MS"]),
        ({}, {}, "[raft]\ntick_ms = true", ["tick_ms", "raft.tick_ms in node.toml"]),
        ({}, {}, "[raft]\ntick_ms = ", ["node.toml", "TOML"]),
        ({}, {}, "raft = 3", ["raft in node.toml", "table"]),
        ({}, {}, "colour = 3", ["unknown setting colour in node.toml"]),
        ({}, {}, "[raft]\ncolour = 3", ["unknown setting raft.colour in node.toml"]),
        ({}, {}, "tick_ms = 20", ["unknown setting tick_ms", "belongs at raft.tick_ms"]),
        ({"colour": "x"}, {}, None, ["unknown option --colour"]),
        ({"engine": "papyrus"}, {}, None, ["engine", "rocksdb, memory", "--engine"]),
        ({"name": "a b"}, {}, None, ["name", "'a b'", "--name"]),
        ({"data": "\0"}, {}, None, ["data", "path"]),
        ({"label": ["zone"]}, {}, None, ["label", "KEY=VALUE", "--label"]),
        ({"label": ["=y"]}, {}, None, ["label", "no key in '=y'", "KEY=VALUE", "--label"]),
        ({"label": ["zone="]}, {}, None, ["label", "no value in 'zone='", "KEY=VALUE"]),
        ({"label": ["a b=c"]}, {}, None, ["label", "key of letters, digits", "not 'a b'"]),
        ({"label": ["a=" + "b" * 128]}, {}, None, ["label", "at most 64 bytes"]),
        ({"label": ["zone=a", "zone=b"]}, {}, None, ["label", "each key once"]),
        ({}, {}, "[label]\nzone = 3", ["label", "text", "label in node.toml"]),
        ({}, {"SHARDKV_BOOTSTRAP": "maybe"}, None, ["bootstrap", "true or false", "SHARDKV_BOOTSTRAP"]),
        ({"split_bytes": "3 parsecs"}, {}, None, ["split_bytes", "64MiB", "--split-bytes"]),
        ({"listen": "0.0.0.0:7001"}, {}, None, ["advertise must be given", "--listen"]),
        ({"bootstrap": True, "join": ["h:1"]}, {}, None, ["bootstrap", "join", "--bootstrap", "--join"]),
        ({}, {"SHARDKV_HEARTBEAT_TICKS": "10"}, None, ["heartbeat_ticks", "election_ticks", "SHARDKV_HEARTBEAT_TICKS"]),
        ({"promise_ms": "501"}, {}, None, ["promise_ms", "election_ticks * tick_ms", "--promise-ms"]),
        ({"promise_ms": "100"}, {}, None, ["promise_ms", "heartbeat_ticks * tick_ms", "--promise-ms"]),
    ],
)
def test_a_wrong_setting_is_refused_by_its_name_and_where_it_came_from(
    flags: dict[str, object], variables: dict[str, str], file: str | None, words: list[str]
) -> None:
    """DESIGN 2.4: ConfigError names the setting and where it came from."""
    message = refused({**FLAGS, **flags}, variables, file)
    for word in words:
        assert word in message, message


def test_a_flag_that_joins_overrides_a_bootstrap_from_the_file() -> None:
    """Both answer the same question, so the source of higher rank answers it."""
    config = load_node_config({**FLAGS, "join": ["h:1"]}, {}, "bootstrap = true", "f")
    assert not config.bootstrap
    assert config.join == ("h:1",)
    config = load_node_config({**FLAGS, "bootstrap": True}, {"SHARDKV_JOIN": "h:1"})
    assert config.bootstrap
    assert config.join == ()


@pytest.mark.parametrize("text", ["false", "False", "OFF"])
def test_a_bootstrap_that_is_denied_overrides_no_join(text: str) -> None:
    """However the denial is written: else the node has no answer to the question at all, and does not start."""
    config = load_node_config(FLAGS, {"SHARDKV_BOOTSTRAP": text}, 'join = ["h:1"]', "f")
    assert not config.bootstrap
    assert config.join == ("h:1",)


def test_a_join_that_names_nobody_overrides_no_bootstrap() -> None:
    """As from a script whose variable is empty."""
    assert load_node_config({**FLAGS, "join": ("",)}, {"SHARDKV_BOOTSTRAP": "1"}).bootstrap


def test_a_dataclass_made_directly_is_checked_as_well() -> None:
    """The simulator makes configurations without flags or files."""
    with pytest.raises(ConfigError, match="split_bytes must be from"):
        RangesConfig(split_bytes=1)
    with pytest.raises(ConfigError, match="listen must be an address: 'x' has no port"):
        NodeConfig(name="n1", data="/d", listen="x")


@pytest.mark.parametrize("setting", ["listen", "advertise", "admin", "join"])
@pytest.mark.parametrize(
    "text", ["h", "h:x", "::1:7001", "[host]:1", "[]:1", "user@h:1", "http://h:1", "h" * 300 + ":1", "h..i:1", ".:1"]
)
def test_an_address_that_cannot_be_dialled_is_refused_with_its_setting(setting: str, text: str) -> None:
    """There were two readers of addresses: this one let pass what the other refused once the node ran."""
    with pytest.raises(ConfigError, match=rf"^{setting} must be an address: .* for example 127\.0\.0\.1:7001"):
        load_node_config({"name": "n1", "data": "/d", "listen": "h:1", setting: text}, {})


def test_space_around_an_address_does_not_count() -> None:
    """It would be told to other nodes."""
    config = load_node_config({"name": "n1", "data": "/d", "listen": " h:1 ", "join": " a:1 , b:2"}, {})
    assert (config.listen, config.join) == ("h:1", ("a:1", "b:2"))


@pytest.mark.parametrize("address", ["0.0.0.0:7001", "[::]:7001", "[0:0::0]:7001"])
def test_nobody_is_told_to_connect_to_every_interface(address: str) -> None:
    """Whoever dials that reaches itself."""
    with pytest.raises(ConfigError, match="advertise must be given"):
        NodeConfig(name="n1", data="/d", listen=address)
    with pytest.raises(ConfigError, match="advertise must be where others connect to"):
        NodeConfig(name="n1", data="/d", listen="h:1", advertise=address)


@pytest.mark.parametrize("replicas", [2, 4, 6])
def test_an_even_number_of_replicas_is_refused(replicas: int) -> None:
    """The placement group would not have it either, and a new cluster would never begin."""
    with pytest.raises(ConfigError, match="odd"):
        RangesConfig(replicas=replicas)


@pytest.mark.parametrize("name", ["split_bytes", "replicas"])
@pytest.mark.parametrize("end", ["low", "high"])
def test_the_settings_that_a_cluster_can_be_founded_with_are_those_that_it_can_have(name: str, end: str) -> None:
    value = getattr(SETTINGS[name], end)
    assert getattr(RangesConfig(**{name: value}), name) == value
    chosen = "replication_factor" if name == "replicas" else name
    assert Settings().with_value(chosen, value).value(chosen) == value


@pytest.mark.parametrize("host", ["0", "0x0", "0.0"])
def test_another_writing_of_every_interface_is_not_advertised(host: str) -> None:
    with pytest.raises(ConfigError, match="advertise"):
        load_node_config({**FLAGS, "bootstrap": True, "advertise": f"{host}:7001"}, {})
