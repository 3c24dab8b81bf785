"""The `ray up` files against Ray's own schema and validation, and what they let in."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
FILES = ("aws.yaml", "workstation.yaml")


@pytest.fixture(params=FILES)
def config(request, clusters):
    return yaml.safe_load((clusters / request.param).read_text())


@pytest.fixture
def aws(clusters):
    return yaml.safe_load((clusters / "aws.yaml").read_text())


def starts(config):
    """The commands that start Ray on a head or a worker."""
    commands = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    return [command for command in commands if "ray start" in command]


def test_file_is_what_ray_expects(config):
    jsonschema.validate(config, SCHEMA)
    validate_config(prepare_config(copy.deepcopy(config)))


def test_the_schema_refuses_a_misspelt_key(config):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(config | {"max_worker": 3}, SCHEMA)


def test_every_node_starts_with_token_authentication(config):
    assert starts(config)
    for command in starts(config):
        exports, _, _ = command.partition("ray start")
        assert "RAY_AUTH_MODE=token" in exports
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_dashboard_is_on_the_heads_loopback(config):
    (head,) = [command for command in starts(config) if "--head" in command]
    assert "--dashboard-host=127.0.0.1" in head
    assert "0.0.0.0" not in yaml.safe_dump(config)


def test_a_stopped_job_has_time_to_end(config):
    (head,) = [command for command in starts(config) if "--head" in command]
    assert "RAY_JOB_STOP_WAIT_TIME_S=60" in head


def test_nothing_of_rays_defaults_is_installed_on_the_nodes(config):
    """Ray's default for AWS installs a nightly Ray."""
    prepared = prepare_config(copy.deepcopy(config))
    for key in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        assert set(prepared[key]) <= set(config["setup_commands"])


def test_only_the_workers_on_aws_are_spot_and_have_a_gpu(aws):
    head, gpu = (aws["available_node_types"][name] for name in ("head", "gpu"))
    assert aws["head_node_type"] == "head"
    assert "InstanceMarketOptions" not in head["node_config"]
    assert gpu["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert gpu["resources"]["GPU"] == 1
    assert 0 <= gpu["min_workers"] <= gpu["max_workers"] <= aws["max_workers"]


def test_nodes_on_aws_have_roles_of_their_own(aws):
    """Where a head has none, Ray makes one with full access to EC2 and S3."""
    profiles = {
        name: kind["node_config"]["IamInstanceProfile"]["Name"] for name, kind in aws["available_node_types"].items()
    }
    assert profiles == {"head": "gem-ray-head", "gpu": "gem-ray-worker"}
    for kind in aws["available_node_types"].values():
        assert kind["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
