"""The launcher files for clouds are valid for Ray and for the cloud, closed to strangers, and do what they say."""

import copy
import json
import os
import re
from typing import Any

import botocore.session
import pytest
from botocore.validate import ParamValidator
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.deploy.files import (
    LAUNCHER_FILES,
    ROOT,
    SHARED,
    check_follows_spot_nodes,
    documents,
    leaves_time_to_save,
    preset_with,
    submitted,
    text_of,
)

each_file = pytest.mark.parametrize("name", LAUNCHER_FILES)


def commands_of(config: dict[str, Any]) -> list[str]:
    """Every command that the launcher runs on some node, Ray's defaults among them."""
    lists = [value for key, value in prepare_config(copy.deepcopy(config)).items() if key.endswith("_commands")]
    return [command for commands in lists for command in commands]


@each_file
def test_a_launcher_file_fits_rays_schema_with_rays_defaults_filled_in(name: str) -> None:
    config = documents(name)[""]
    validate_config(prepare_config(copy.deepcopy(config)))
    config["available_node_types"]["gpu"]["max_worker"] = 3
    with pytest.raises(ValidationError, match="max_worker"):
        validate_config(prepare_config(config))


def test_ec2_takes_the_nodes_of_the_aws_file() -> None:
    request = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for node_type in documents("aws.yaml")[""]["available_node_types"].values():
        parameters = {**node_type["node_config"], "MinCount": 1, "MaxCount": 1}
        assert not ParamValidator().validate(parameters, request).has_errors()
        misspelt = {**parameters, "InstanceMarketOption": {}}
        assert ParamValidator().validate(misspelt, request).has_errors()


@each_file
def test_the_head_is_on_demand_and_gpu_workers_are_spot_machines_between_a_minimum_and_a_maximum(name: str) -> None:
    types = prepare_config(documents(name)[""])["available_node_types"]
    assert set(types) == {"head", "gpu"}
    assert types["head"]["max_workers"] == 0
    assert 0 < types["gpu"]["min_workers"] < types["gpu"]["max_workers"]
    assert types["gpu"]["resources"]["GPU"] == 1
    assert [is_spot(types[each]["node_config"]) for each in ("head", "gpu")] == [False, True]


def is_spot(node: dict[str, Any]) -> bool:
    """Whether the cloud may take a machine like this back."""
    return (
        node.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        or node.get("scheduling", {}).get("provisioningModel") == "SPOT"
    )


@each_file
def test_every_start_of_ray_asks_for_the_token_and_tells_no_one_about_it(name: str) -> None:
    starts = [command for command in commands_of(documents(name)[""]) if "ray start" in command]
    assert len(starts) == 2
    for command in starts:
        assert re.search(r"export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0[^;]*;.* ray start ", command)


@each_file
def test_the_token_comes_as_a_file_that_only_its_owner_reads_and_is_in_no_command(name: str) -> None:
    config = documents(name)[""]
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    commands = commands_of(config)
    assert any("chmod 600 ~/.ray/auth_token" in command for command in commands)
    for command in commands:
        assert "RAY_AUTH_TOKEN" not in command
        assert "cat ~/.ray" not in command
    assert "RAY_AUTH_TOKEN=" not in text_of(name)


@each_file
def test_the_dashboard_is_on_loopback_and_nothing_is_opened_to_every_address(name: str) -> None:
    config = documents(name)[""]
    heads = [command for command in commands_of(config) if "ray start --head" in command]
    assert len(heads) == 1
    assert "--dashboard-host=127.0.0.1" in heads[0]
    assert "0.0.0.0" not in json.dumps(prepare_config(config))
    assert "0.0.0.0" not in text_of(name)


def test_no_node_gets_rays_own_security_group_or_the_projects_default_network() -> None:
    for node_type in documents("aws.yaml")[""]["available_node_types"].values():
        assert node_type["node_config"]["SecurityGroupIds"]
    for node_type in documents("gcp.yaml")[""]["available_node_types"].values():
        (network,) = node_type["node_config"]["networkInterfaces"]
        assert network["subnetwork"].endswith("/subnetworks/passreid")


@each_file
def test_every_node_mounts_the_shared_folder_and_installs_the_checkout_at_known_versions(name: str) -> None:
    config = documents(name)[""]
    setup = "\n".join(config["setup_commands"])
    assert "sudo mount -t nfs" in setup
    assert f"mountpoint -q {SHARED} ||" in setup
    assert "pip install -q -c ~/passreid_ray/constraints.txt ~/passreid_ray" in setup
    brought = {remote.removeprefix("~/passreid_ray/"): local for remote, local in config["file_mounts"].items()}
    assert {"passreid_ray", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"} <= brought.keys()
    for remote, local in brought.items():
        if remote != "~/.ray/auth_token":
            assert remote == local
            assert (ROOT / local).exists()


@each_file
def test_what_must_be_replaced_is_marked(name: str) -> None:
    lines = text_of(name).splitlines()
    for number, line in enumerate(lines):
        if not line.lstrip().startswith("#") and re.search(r"0{8}|your-project|10\.60\.16\.2|[/]images/family/", line):
            assert any("CHANGE" in near for near in lines[max(0, number - 9) : number + 1]), line


@each_file
def test_the_submitted_command_shares_its_output_and_follows_the_spot_nodes(name: str) -> None:
    text = "\n".join(line.removeprefix("#") for line in text_of(name).splitlines() if line.startswith("#"))
    start = text.index("ray job submit")
    arguments = submitted(text[start : text.index("ray job logs")])
    config = preset_with(arguments)
    assert config.run.storage_path.startswith(SHARED)
    assert os.path.isabs(config.run.output)
    nodes = documents(name)[""]["available_node_types"]["gpu"]
    check_follows_spot_nodes(config, nodes["min_workers"], nodes["max_workers"])


@each_file
def test_a_job_that_is_stopped_has_the_time_to_save_its_checkpoint(name: str) -> None:
    (head,) = [command for command in commands_of(documents(name)[""]) if "ray start --head" in command]
    waits = re.search(r"export [^;]*RAY_JOB_STOP_WAIT_TIME_S=(\d+)", head)
    assert waits is not None
    assert leaves_time_to_save(waits[1])
