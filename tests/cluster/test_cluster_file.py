"""What cluster.yaml says, without starting it."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.local.config import prepare_local

from passreid_ray.engines.fit import LEAVE_SECONDS

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())


@pytest.fixture
def config() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_ray_accepts_the_file_as_it_is(config: dict[str, Any]) -> None:
    prepared, _ = prepare_local(config)
    jsonschema.validate(prepared, SCHEMA)
    assert prepared["max_workers"] == len(config["provider"]["worker_ips"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**prepared, "worker_nods": {}}, SCHEMA)


def test_what_is_brought_to_the_machines_is_in_the_checkout_and_all_that_pip_needs(config: dict[str, Any]) -> None:
    mounts: dict[str, str] = config["file_mounts"]
    of_checkout = {source for source in mounts.values() if not source.startswith("~")}
    assert of_checkout == {"passreid_ray", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"}
    assert all((ROOT / source).exists() for source in of_checkout)
    assert [target for target, source in mounts.items() if source == "~/.ray/auth_token"] == ["~/.ray/auth_token"]


def test_every_ray_start_asks_for_the_token_and_none_holds_it(config: dict[str, Any]) -> None:
    commands = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    starts = [command for command in commands if "ray start" in command]
    assert len(starts) == 2
    for command in starts:
        assert "RAY_AUTH_MODE=token" in command
        assert "RAY_AUTH_TOKEN" not in command
    (head,) = (command for command in starts if "--head" in command)
    assert "--dashboard-host=127.0.0.1" in head
    waits = re.search(r"export [^;]*RAY_JOB_STOP_WAIT_TIME_S=(\d+)", head)
    assert waits is not None, "ray job stop kills after 3 s"
    assert int(waits[1]) > LEAVE_SECONDS
