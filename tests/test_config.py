"""Every setting: what is taken, what is refused, and how the refusal reads."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import tiny

import pikv_ds
from pikv_ds import ConfigError, PiKVConfig
from pikv_ds.config import load_json
from pikv_ds.policies.lookups import QuestLookup
from pikv_ds.policies.placements import HashPlacement

VALID = {
    "page_size": [8, 16, 32, 64, 128, 256],
    "codec": [
        *("none", "fp8", "int8", "int4", "int3", "int2", "int1"),
        {"name": "int4", "values": "int2", "rotate": True, "scales": 8, "clip": True},
        {"name": "per_layer", "layers": {"0-2": "int8", "4": {"name": "int4", "rotate": True}}, "default": "int4"},
        {"name": "per_expert", "experts": {"1": "none"}, "default": "int8"},
    ],
    "demote": [None],  # with a budget: test_formats.py
    "placement": [
        "expert",
        "eplb",
        {"name": "eplb", "every": 10, "slack": 1.5, "moves": 1, "redundant": 0},
        "balanced",
        {"name": "balanced", "alpha": 2},
        "hierarchical",
        "interleave",
        "hash",
        {"name": "hash"},
        {"name": "hash", "period": 1},
    ],
    "lookup": [
        "exact",
        "quest",
        {"name": "quest", "budget": 1, "sink_pages": 0, "local_pages": 0},
        {"name": "quest", "budget": 0.001, "sink_pages": 4, "local_pages": 2},
    ],
    "retention": [None],  # with a budget: test_retention.py
    "budget": ["uniform", {"name": "uniform", "prompt": 1.0, "tokens": None}],
    "capacity_tokens": [None, 32, 10**9],
    "slab_pages": [1, 16, 1000],
    "watermark": [0, 0.0, 0.5],
    "prefill_chunk_tokens": [None, 32, 4096],
    "partial_dtype": ["float32", "bfloat16"],
    "backend": ["auto", "reference", "cpp"],
    "timeout_s": [1, 1.0, 86400],
    "trace": [None, "traces"],
    "group_size": [None, 1, 8],
    "debug": [False, True],
}

# key, value, and what the message must say besides: the remedy.
INVALID = [
    *(("page_size", v, "choose one of 1, 8, 16, 32") for v in (0, 7, 33, 512, -8, "32", None, True, 32.0, [32])),
    ("codec", "int5", "choose one of none, fp8, int8, int4, int3, int2, int1"),
    ("codec", "Int8", 'did you mean "int8"?'),
    ("codec", 4, "from_dict"),
    ("codec", None, "from_dict"),
    ("demote", "int2", 'add a "retention" and a "budget"'),
    ("demote", "int5", "one of none, fp8, int8, int4"),
    ("placement", "experts", 'did you mean "expert"?'),
    ("placement", "random", "choose one of expert, eplb, balanced, hierarchical, interleave, hash"),
    ("placement", ["expert"], "from_dict"),
    ("lookup", "qest", 'did you mean "quest"?'),
    ("lookup", 0.5, "from_dict"),
    ("retention", "h20", 'did you mean "h2o"?'),
    ("retention", 0.5, "from_dict"),
    ("budget", "unifrm", 'did you mean "uniform"?'),
    ("budget", 0.5, "from_dict"),
    *(("capacity_tokens", v, "at least 32 (one page)") for v in (0, -1, 31, 1e6, "64", True)),
    *(("slab_pages", v, "at least 1") for v in (0, -3, 1.5, "16", None, False)),
    *(("watermark", v, "between 0 and 0.5") for v in (-0.1, 0.51, float("nan"), "0.1", None, True)),
    *(("prefill_chunk_tokens", v, "at least 32 (one page)") for v in (0, 31, -1, 64.0, "64", True)),
    ("partial_dtype", "float16", "choose one of float32, bfloat16"),
    ("partial_dtype", "bfloat", 'did you mean "bfloat16"?'),
    ("partial_dtype", None, "choose one of"),
    ("backend", "cuda", "choose one of auto, reference, cpp, triton"),
    ("backend", "Auto", 'did you mean "auto"?'),
    *(("timeout_s", v, "between 1 and 86400") for v in (0, -1, 86401, float("inf"), float("nan"), "120", None)),
    *(("group_size", v, "at least 1") for v in (0, 2.0, "8")),
    *(("trace", v, "name a folder, or leave it out") for v in (0, "", True)),
    *(("debug", v, "true or false") for v in (0, 1, "true", None)),
]

# The whole policy, the option that is wrong, and the remedy.
INVALID_POLICIES = [
    ("lookup", {"name": "exact", "budget": 0.5}, "lookup.budget = 0.5", '"exact" takes no options'),
    ("codec", {"name": "int8", "bits": 3}, "codec.bits = 3", "choose one of name, values, rotate, clip, scales"),
    ("codec", {"name": "int8", "values": "int5"}, "codec.values = 'int5'", "choose one of none, fp8"),
    ("codec", {"name": "int8", "rotate": 1}, "codec.rotate = 1", "true or false"),
    ("codec", {"name": "int8", "scales": 4}, "codec.scales = 4", "use 16, or 8"),
    ("codec", {"name": "none", "clip": True}, "codec.clip = True", "only integer codecs have it"),
    ("codec", {"name": "int4", "values": "fp8", "scales": 8}, "codec.scales = 8", "fp8 has float16 scales"),
    ("codec", {"name": "int4", "rotate": True, "projections": "x"}, "codec.rotate = True", "leave one out"),
    ("codec", {"name": "per_layer", "layers": {}}, "codec.layers = {}", 'write e.g. {"0-2": "int8"'),
    ("codec", {"name": "per_layer", "layers": {"x": "int8"}}, "codec.layers: 'x'", 'write e.g. "3" or "0-2"'),
    ("codec", {"name": "per_layer", "layers": {"3-1": "int8"}}, "codec.layers: '3-1'", "the smaller one first"),
    ("codec", {"name": "per_layer", "layers": {"1": "int8", "0-2": "int4"}}, "codec.layers: 1", "named twice"),
    ("codec", {"name": "per_layer", "layers": {"1": "int5"}}, "codec.layers.1 = 'int5'", "one of none, fp8"),
    (
        "codec",
        {"name": "per_expert", "experts": {"1": {"name": "int8", "bits": 3}}},
        "codec.experts.1.bits = 3",
        "scales",
    ),
    ("codec", {"name": "per_expert", "experts": {"1": "int8"}, "default": 4}, "codec.default = 4", "one of none, fp8"),
    ("codec", {"name": "per_head"}, "codec.heads = ''", "`pikv heads` has written"),
    ("codec", {"name": "per_head", "heads": "nowhere"}, "codec.heads = 'nowhere'", "`pikv heads` has written"),
    ("placement", {"name": "expert", "period": 8}, "placement.period = 8", '"expert" takes no options'),
    ("lookup", {"name": "quest", "budgt": 0.5}, "lookup.budgt = 0.5", 'did you mean "budget"?'),
    *(
        ("lookup", {"name": "quest", "budget": v}, f"lookup.budget = {v!r}", "above 0 and at most 1")
        for v in (0, -0.5, 1.01, float("nan"), "0.5", None, True)
    ),
    *(
        ("lookup", {"name": "quest", key: v}, f"lookup.{key} = {v!r}", "whole number of at least 0")
        for key in ("sink_pages", "local_pages")
        for v in (-1, 0.5, "1", None, True)
    ),
    *(
        ("placement", {"name": "hash", "period": v}, f"placement.period = {v!r}", "whole number of at least 1")
        for v in (0, -1, 2.0, "8", None, True)
    ),
    ("placement", {"name": "eplb", "every": 0}, "placement.every = 0", "at least 1"),
    ("placement", {"name": "eplb", "redundant": -1}, "placement.redundant = -1", "at least 0"),
    ("placement", {"name": "eplb", "moves": 1.5}, "placement.moves = 1.5", "at least 1"),
    ("placement", {"name": "eplb", "slack": 0.9}, "placement.slack = 0.9", "at least 1"),
    ("placement", {"name": "balanced", "alpha": -1}, "placement.alpha = -1", "between 0"),
    ("placement", {"name": "hierarchical", "ranks_per_node": 0}, "placement.ranks_per_node = 0", "at least 1"),
    ("lookup", {"name": "qwest"}, "lookup.name = 'qwest'", 'did you mean "quest"?'),
    ("lookup", {"budget": 0.5}, "lookup.name = None", "choose one of exact, two_stage, quest"),
    ("lookup", {"name": ["quest"]}, "lookup.name = ['quest']", "choose one of exact, two_stage, quest"),
    ("lookup", {}, "lookup.name = None", "choose one of exact, two_stage, quest"),
]


def test_every_key_is_tested() -> None:
    assert set(VALID) == {f.name for f in dataclasses.fields(PiKVConfig)}
    assert {key for key, _, _ in INVALID} == set(VALID)


@pytest.mark.parametrize(("key", "value"), [(key, v) for key, values in VALID.items() for v in values])
def test_valid_values_survive_a_round_trip_through_json(key: str, value: object) -> None:
    config = PiKVConfig.from_dict({key: value})
    assert PiKVConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(("key", "value", "remedy"), INVALID)
def test_invalid_values_name_key_value_and_remedy(key: str, value: object, remedy: str) -> None:
    with pytest.raises(ConfigError) as error:
        PiKVConfig.from_dict({key: value})
    assert f"pikv.{key} = {value!r}" in str(error.value)
    assert remedy in str(error.value)


@pytest.mark.parametrize(("key", "policy", "cause", "remedy"), INVALID_POLICIES)
def test_invalid_options_name_key_value_and_remedy(key: str, policy: object, cause: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as error:
        PiKVConfig.from_dict({key: policy})
    assert f"pikv.{cause}" in str(error.value)
    assert remedy in str(error.value)


def test_unknown_key() -> None:
    with pytest.raises(ConfigError, match=r'pikv\.pagesize = 32: unknown setting; did you mean "page_size"\?'):
        PiKVConfig.from_dict({"pagesize": 32})


@pytest.mark.parametrize("settings", [None, [], "page_size", 3])
def test_settings_must_be_an_object(settings: object) -> None:
    with pytest.raises(ConfigError, match="expected an object with settings"):
        PiKVConfig.from_dict(settings)  # type: ignore[arg-type]


def test_capacity_and_chunks_are_checked_against_the_page_size() -> None:
    assert PiKVConfig(page_size=64, capacity_tokens=64, prefill_chunk_tokens=64).page_size == 64
    for key in ("capacity_tokens", "prefill_chunk_tokens"):
        with pytest.raises(ConfigError, match=rf"pikv\.{key} = 63.*at least 64"):
            PiKVConfig(page_size=64, **{key: 63})


def test_defaults_are_exact_and_unlimited() -> None:
    config = PiKVConfig.from_dict({})
    assert config == PiKVConfig()
    assert (config.codec.name, config.lookup.name, config.placement.name) == ("none", "exact", "expert")
    assert config.capacity_tokens is None


def test_policies_can_be_passed_as_instances() -> None:
    config = PiKVConfig.from_dict({"lookup": QuestLookup(budget=0.25), "placement": HashPlacement(period=7)})
    assert config.to_dict()["lookup"] == {
        "name": "quest",
        "budget": 0.25,
        "sink_pages": 1,
        "local_pages": 1,
        "audit_every": 64,
        "floor": 0.8,
    }
    assert config.to_dict()["placement"] == {"name": "hash", "period": 7}
    assert PiKVConfig.from_dict(config.to_dict()) == config


def test_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PiKVConfig().page_size = 64  # type: ignore[misc]


def test_load_json_reads_an_object(tmp_path) -> None:
    settings = {"train_batch_size": 1, "pikv": {"page_size": 64}}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(settings))
    assert load_json(path) == load_json(str(path)) == settings


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"page_size": 32,\n}', "line 2"),
        ("", "must be JSON"),
        ("[32]", "expected a JSON object, got list"),
        (b"\xd0\xff\x00", "config.json"),
    ],
)
def test_load_json_names_the_file_and_the_cause(tmp_path, content: str | bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message) as error:
        load_json(path)
    assert str(path) in str(error.value)


def test_load_json_of_a_missing_file_and_of_a_folder(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.json: no such file"):
        load_json(tmp_path / "missing.json")
    with pytest.raises(ConfigError, match=str(tmp_path)):
        load_json(tmp_path)


# -- the environment -----------------------------------------------------------------------------


def test_the_environment_chooses_the_backend_before_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.llama()
    monkeypatch.setenv("PIKV_BACKEND", "reference")
    assert pikv_ds.attach(model, {"backend": "auto"}).store.ops.backend == "reference"
    pikv_ds.detach(model)
    monkeypatch.setenv("PIKV_BACKEND", "fastest")
    with pytest.raises(ConfigError, match="PIKV_BACKEND = 'fastest': choose one of auto, reference, cpp, triton, or"):
        pikv_ds.attach(model)


@pytest.mark.parametrize("name", ["ds_inference.json", "ds_long_context.json", "megatron_pikv.json"])
def test_the_configurations_in_launch_are_valid(name: str) -> None:
    settings = load_json(Path(__file__).parents[1] / "launch" / name)
    written = settings.get("pikv", settings)
    read = PiKVConfig.from_dict(written).to_dict()
    assert written
    assert {key: read[key] for key in written if isinstance(written[key], (int, bool))} == {
        key: value for key, value in written.items() if isinstance(value, (int, bool))
    }
    assert PiKVConfig.from_dict(read).to_dict() == read


def test_a_key_that_is_there_twice_is_refused(tmp_path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"pikv": {"codec": "int8", "page_size": 32, "codec": "int4"}}')
    with pytest.raises(ConfigError, match="codec is there twice"):
        load_json(file)
