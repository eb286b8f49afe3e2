"""Any configuration: a working `PiKVConfig` that survives `to_dict`, or one short line that says what is wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pikv_ds
from pikv_ds import ConfigError, PiKVConfig, checks
from pikv_ds.config import POLICIES, load_config, load_json, section
from pikv_ds.policies.codecs import ELEMENTS, MOST_NUMBER, Codec

HUGE = 10**5000
DEEP: Any = "int4"
for _ in range(20_000):
    DEEP = {"name": DEEP}


def is_one_short_line(message: str) -> bool:
    return len(message) <= checks.LINE and message.isprintable()


def judge(configuration: Any) -> PiKVConfig | None:
    """The configuration, or None where it was refused as it should be."""
    config, message = None, "pikv"
    try:
        config = PiKVConfig.from_dict(configuration)
    except ConfigError as error:
        message = str(error)
    assert message.startswith("pikv")
    assert is_one_short_line(message)
    if config is None:
        return None
    as_json = json.loads(json.dumps(config.to_dict()))
    assert PiKVConfig.from_dict(as_json) == config
    return config


FIELDS = [f.name for f in dataclasses.fields(PiKVConfig)]
KINDS = {(key, name): kind for key, (_, table) in POLICIES.items() for name, kind in table.items()}
OPTIONS = {
    which: [f.name for f in dataclasses.fields(kind if isinstance(kind, type) else type(kind)) if f.init]
    for which, kind in KINDS.items()
}

ODD = [
    None, True, False, 0, -1, 1, 8, 8.0, 32, 0.5, 2**31, 10**30, HUGE, -HUGE, 1e308, float("nan"), float("inf"), "",
    "int4", "x" * 10**5, "a\0b", "\ud800", "two\nlines", "../x", [], [1], {}, {"name": "int8"}, {"name": 5}, DEEP,
]  # fmt: skip
odd = st.integers(0, len(ODD) - 1).map(lambda i: ODD[i])  # by number: hypothesis cannot write all of them out
ranges = st.dictionaries(
    st.sampled_from(["0", "0-2", "1-1", "7", "3-1", "0-3000000", f"0-{MOST_NUMBER}", "²", "-1", "1-", "9" * 5000, ""]),
    st.one_of(st.sampled_from(ELEMENTS), odd),
    max_size=3,
)
values = st.one_of(odd, ranges, st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(ELEMENTS))


@st.composite
def policies(draw: Any, key: str) -> Any:
    """A policy of a kind, most of it right."""
    name = draw(st.sampled_from([name for kind, name in KINDS if kind == key]))
    options = OPTIONS[key, name]
    chosen = draw(st.lists(st.sampled_from(options), unique=True, max_size=3)) if options else []
    extra = draw(st.lists(st.one_of(st.text(max_size=4), st.sampled_from(options or ["name"])), max_size=1))
    return draw(st.sampled_from([name, {"name": name, **{option: draw(values) for option in chosen + extra}}]))


@st.composite
def configurations(draw: Any) -> Any:
    keys = draw(st.lists(st.sampled_from(FIELDS), unique=True, max_size=4))
    out = {key: draw(st.one_of(policies(key) if key in POLICIES else values, values)) for key in keys}
    return out | draw(st.dictionaries(st.one_of(st.text(max_size=6), st.integers()), values, max_size=1))


@settings(max_examples=600, deadline=None)
@given(st.one_of(configurations(), values))
def test_any_configuration_works_or_is_refused_in_a_line(configuration: Any) -> None:
    judge(configuration)


@settings(max_examples=300, deadline=None)
@given(st.recursive(odd, lambda x: st.one_of(st.lists(x, max_size=3), st.dictionaries(st.text(max_size=6), x))))
def test_any_value_is_shown_in_a_line(value: Any) -> None:
    assert len(checks.shown(value)) <= checks.SHOWN
    assert is_one_short_line(checks.shown(value))


OWNERS = {
    "": PiKVConfig,
    **{f"{key}.{name}": kind if isinstance(kind, type) else type(kind) for (key, name), kind in KINDS.items()},
}


@pytest.mark.parametrize("where", OWNERS)
def test_no_setting_takes_what_is_of_no_kind(where: str, tmp_path: Path) -> None:
    """Every option of every policy: none is left without a check."""
    key, _, name = where.partition(".")
    (tmp_path / "heads.json").write_text('{"retrieval": [[true]]}')
    needed = {"heads": f"{tmp_path}/heads.json", "layers": {"0": "int8"}, "experts": {"0": "int8"}}
    for field in dataclasses.fields(OWNERS[where]):
        if not field.init or (name and field.name == "name"):
            continue
        for nonsense in ([1], {"x": 1}, "a\0b", HUGE, float("nan"), object()):
            others = {k: v for k, v in needed.items() if (key, name) in OPTIONS and k in OPTIONS[key, name]}
            options = {**others, field.name: nonsense}
            configuration = {key: {"name": name, **options}} if name else options
            with pytest.raises(ConfigError) as error:
                PiKVConfig.from_dict(configuration)
            assert field.name in str(error.value)
            assert is_one_short_line(str(error.value))


@pytest.mark.parametrize(
    ("configuration", "words"),
    [
        (
            {"slab_pages": 10**30},
            "pikv.slab_pages = 1000000000000000000000000000000: use a whole number of at most 65536",
        ),
        ({"capacity_tokens": HUGE}, "pikv.capacity_tokens = a number of about 5001 digits: use"),
        ({"trace": "a\0b"}, "pikv.trace = 'a\\x00b': name a folder"),
        ({"codec": {"name": "int4", "projections": True}}, "pikv.codec.projections = True: name the file"),
        ({"codec": {"name": "int4", "scales": 8.0}}, "pikv.codec.scales = 8.0: use 16, or 8"),
        (
            {"codec": {"name": "per_layer", "layers": {"0": {"name": "int4", "projections": ["x"]}}}},
            "pikv.codec.layers.0.projections = ['x']: name the file",
        ),
        ({"codec": {"name": "per_layer", "layers": {"0-3000000": "int8"}}}, "use numbers of at most 65535"),
        ({"codec": {"name": "per_layer", "layers": {"9" * 5000: "int8"}}}, "use numbers of at most 65535"),
        ({"codec": DEEP}, "pikv.codec.name = "),
        ({"retention": {"name": "kvpress", "press": 5}}, "pikv.retention.press = 5: name a press"),
        ({"retention": {"name": "kvpress"}}, 'pikv.retention.press: missing; "kvpress" needs it'),
        (
            {"budget": {"name": "pyramid", "tokens": 0}, "retention": "snap"},
            "pikv.budget.tokens = 0: use a whole number of at least 1, or leave it out for no limit",
        ),
        ({"two\nlines": 1}, "pikv.'two\\nlines' = 1: unknown setting"),
        ({5: 1}, "pikv.5 = 1: unknown setting"),
    ],
)
def test_settings_that_used_to_fail_later_or_raw(configuration: Any, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        PiKVConfig.from_dict(configuration)
    assert words in str(error.value)
    assert is_one_short_line(str(error.value))


def test_codecs_by_layer_are_kept_as_plain_values() -> None:
    """Numbers and `Codec` objects come back as JSON has them, and a caller's later changes change nothing."""
    layers = {0: Codec("int8"), "1-2": {"name": "int4", "rotate": True}}
    config = judge({"codec": {"name": "per_layer", "layers": layers, "default": Codec("int4")}})
    assert config is not None
    layers[5] = "none"  # type: ignore[assignment]
    wanted = {"0": "int8", "1-2": {"name": "int4", "rotate": True}}
    assert config.to_dict()["codec"] == {"name": "per_layer", "layers": wanted, "default": "int4"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"pikv": {"slab_pages": ' + "9" * 5000 + "}}", "thousands of digits"),
        ("{", "line 1, column 2"),
        (b"\xff\xfe{}", "not a text in UTF-8"),
    ],
)
def test_files_that_no_parser_takes(tmp_path: Path, content: str | bytes, words: str) -> None:
    path = tmp_path / "settings.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=words) as error:
        load_json(path)
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize("found", [[1], 5, "int4", None])
def test_a_section_that_is_no_object_is_refused(found: Any) -> None:
    with pytest.raises(ConfigError, match=r"ds\.json: pikv: expected an object"):
        section({"pikv": found}, "ds.json")


@pytest.mark.parametrize("content", [{"pikv": {"page_size": 8}}, {"page_size": 8}])
def test_a_file_has_the_settings_by_themselves_or_in_a_section(tmp_path: Path, content: Any) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(content))
    assert load_config(tmp_path / "ds.json") == PiKVConfig(page_size=8)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"pikv": [1]}, "pikv: expected an object with settings, got [1]"),
        ({"pikv": {"page_size": 7}}, "pikv.page_size = 7: choose"),
        ({"page_size": 7}, "pikv.page_size = 7: choose"),
    ],
)
def test_errors_of_a_file_name_it(tmp_path: Path, content: Any, words: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(error.value).startswith(f"{path}: {words}")


@pytest.mark.parametrize("table", [[], {}, ["abc"], [[1, 0]], [[]], [[True], "x"], 5])
def test_a_file_of_heads_is_a_table_of_true_and_false(tmp_path: Path, table: Any) -> None:
    """A row of text had as many retrieval heads as letters."""
    (tmp_path / "heads.json").write_text(json.dumps({"retrieval": table}))
    with pytest.raises(ConfigError, match=r"codec\.heads = .*has no table"):
        PiKVConfig.from_dict({"codec": {"name": "per_head", "heads": f"{tmp_path}/heads.json"}})


def bounds(where: str) -> dict[str, tuple[float, float]]:
    """The least and the most that the checks of a policy, or of the configuration itself, take of each number."""
    found: dict[str, tuple[float, float]] = {}

    def whole(owner: Any, *keys: str, least: int = 1, most: int = checks.MOST, **_: Any) -> None:
        found.update(dict.fromkeys(keys, (least, most)))

    def real(owner: Any, key: str, low: float, high: float, remedy: str, above: bool = False) -> None:
        found[key] = (math.nextafter(low, high) if above else low, high)

    def choice(owner: Any, key: str, allowed: Any, remedy: str, name: str = "") -> None:
        numbers = [one for one in allowed if type(one) is int]
        if numbers:
            found[name or key] = (min(numbers), max(numbers))

    key, _, name = where.partition(".")
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(ConfigError):
        patch.setattr(checks, "whole_attributes", whole)
        patch.setattr(checks, "real_attribute", real)
        patch.setattr(checks, "choice", choice)
        PiKVConfig.from_dict({"page_size": 8, **({key: {"name": name}} if name else {})})
    return found


def test_bounds_are_those_of_the_checks() -> None:
    assert bounds("").items() >= {"timeout_s": (1.0, 86400.0), "watermark": (0.0, 0.5), "page_size": (1, 256)}.items()
    assert bounds("placement.balanced")["alpha"] == (0, 100)
    assert bounds("retention.snap")["kernel"] == (1, 1023)


@pytest.mark.parametrize("where", [where for where in OWNERS if not where.startswith("codec")])
def test_what_is_accepted_runs(where: str, tmp_path: Path) -> None:
    """Every number at the least and the most that is taken: nothing fails later."""
    key, _, name = where.partition(".")
    ids = tiny.prompt(2, 24)
    ran, limits = 0, bounds(where)
    heads = tiny.mixtral(num_layers=1).config.num_key_value_heads
    (tmp_path / "heads.json").write_text(json.dumps({"retrieval": [[True] + [False] * (heads - 1)]}))
    for field in dataclasses.fields(OWNERS[where]):
        if not field.init or ("int" not in str(field.type) and "float" not in str(field.type)):
            continue
        taken = []
        for value in limits[field.name]:
            chosen: dict[str, Any] = {key: {"name": name, field.name: value}} if name else {field.name: value}
            if key == "retention":
                chosen["budget"] = {"prompt": 0.5, "tokens": 16, "name": "uniform"}
            if key == "budget":
                chosen["retention"] = "snap"
            if name == "duo":
                chosen["budget"]["heads"] = f"{tmp_path}/heads.json"
            if chosen.get("budget") == {"name": "uniform", "prompt": 1}:  # keeps everything: no budget at all
                continue
            taken.append(PiKVConfig.from_dict({"page_size": 8, **chosen}))
        if field.name == "capacity_tokens":
            taken = taken[-1:]  # the least is one page, in which no prompt has room
        for config in {str(c): c for c in taken}.values():
            model = tiny.mixtral(num_layers=1)
            pikv_ds.attach(model, config)
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
            assert out.shape == (2, 34)
            pikv_ds.detach(model)
            ran += 1
    assert ran or name in ("exact", "expert", "interleave", "lru", "h2o", "tova", "flexgen", "kvpress")
