"""The environment of a process that no launcher has started."""

from __future__ import annotations

import os

import pytest

from pikv_ds import launch_env


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment without a launcher's variables, for one test."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    monkeypatch.setattr(os, "environ", kept)
    return kept


def test_lone_processes_do_not_meet_on_one_port(variables: dict[str, str]) -> None:
    ports = set()
    for _ in range(2):
        variables.pop("MASTER_PORT", None)
        variables.pop("RANK", None)
        launch_env.prepare()
        ports.add(variables["MASTER_PORT"])
    assert len(ports) == 2
    assert (variables["RANK"], variables["WORLD_SIZE"]) == ("0", "1")


def test_a_port_that_is_given_is_kept(variables: dict[str, str]) -> None:
    variables["MASTER_PORT"] = "12345"
    launch_env.prepare()
    assert variables["MASTER_PORT"] == "12345"


def test_a_launchers_settings_are_left_alone(variables: dict[str, str]) -> None:
    variables.update(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1")
    launch_env.prepare()
    assert "MASTER_PORT" not in variables
