"""The AWS policies: what a run needs, and nothing else."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase

import pytest
import yaml

BUCKET = "arn:aws:s3:::my-bucket"


def statements(path):
    return json.loads(path.read_text())["Statement"]


def listed(value):
    return [value] if isinstance(value, str) else value


@pytest.fixture
def allows(clusters):
    """Whether the S3 policy allows an action; the prefix is a listing's."""

    def is_allowed(action, resource, prefix=None):
        return any(
            action in listed(statement["Action"])
            and any(fnmatchcase(resource, pattern) for pattern in listed(statement["Resource"]))
            and _holds(statement.get("Condition", {}), prefix)
            for statement in statements(clusters / "s3-policy.json")
        )

    return is_allowed


def _holds(condition, prefix):
    patterns = condition.get("StringLikeIfExists", {}).get("s3:prefix")
    return patterns is None or prefix is None or any(fnmatchcase(prefix, pattern) for pattern in patterns)


@pytest.mark.parametrize(
    ("action", "key"),
    [
        ("s3:GetObject", "posts/0001.parquet"),
        ("s3:GetObject", "posts"),  # Arrow asks whether the prefix is an object before it lists it
        ("s3:GetObject", "models/sam/model.safetensors"),
        ("s3:GetObject", "annotations/_run/manifest.json"),
        ("s3:PutObject", "annotations/status=ok/0001.parquet"),
        ("s3:PutObject", "annotations/"),  # Arrow's mark of a directory
        ("s3:DeleteObject", "annotations/_run/staged/0001.parquet"),
        ("s3:AbortMultipartUpload", "annotations/status=ok/0001.parquet"),
    ],
)
def test_a_run_may_do_what_it_does(allows, action, key):
    assert allows(action, f"{BUCKET}/{key}")


@pytest.mark.parametrize("prefix", ["posts/", "models/sam/", "annotations/_run/", None])
def test_a_run_may_list_its_prefixes_and_check_the_bucket(allows, prefix):
    assert allows("s3:ListBucket", BUCKET, prefix)


@pytest.mark.parametrize(
    ("action", "resource"),
    [
        ("s3:GetObject", f"{BUCKET}/payroll/2026.csv"),
        ("s3:GetObject", f"{BUCKET}/posts-of-others/0001.parquet"),
        ("s3:GetObject", "arn:aws:s3:::other-bucket/posts/0001.parquet"),
        ("s3:PutObject", f"{BUCKET}/posts/0001.parquet"),
        ("s3:PutObject", f"{BUCKET}/models/sam/model.safetensors"),
        ("s3:DeleteObject", f"{BUCKET}/posts/0001.parquet"),
        ("s3:DeleteBucket", BUCKET),
        ("s3:PutBucketPolicy", BUCKET),
    ],
)
def test_a_run_may_do_nothing_else(allows, action, resource):
    assert not allows(action, resource)


def test_other_prefixes_are_not_listed(allows):
    assert not allows("s3:ListBucket", BUCKET, "payroll/")


@pytest.mark.parametrize("name", ["s3-policy.json", "aws-head-policy.json"])
def test_policy_names_actions_and_resources(clusters, name):
    for statement in statements(clusters / name):
        actions = listed(statement["Action"])
        assert not any("*" in action for action in actions)
        if "*" in listed(statement["Resource"]):  # AWS knows no narrower resource for these
            assert all(action.startswith("ec2:Describe") for action in actions)


def test_head_ends_only_nodes_of_its_own_cluster_and_gives_only_the_workers_role(clusters):
    policy = {action: s for s in statements(clusters / "aws-head-policy.json") for action in listed(s["Action"])}
    aws = yaml.safe_load((clusters / "aws.yaml").read_text())
    own = {"ec2:ResourceTag/ray-cluster-name": aws["cluster_name"]}
    assert policy["ec2:TerminateInstances"]["Condition"] == {"StringEquals": own}
    worker = aws["available_node_types"]["gpu"]["node_config"]["IamInstanceProfile"]["Name"]
    assert policy["iam:PassRole"]["Resource"].endswith(f":role/{worker}")


def test_head_starts_no_other_machines_than_the_workers(clusters):
    """Its jobs run whatever they are sent; other types cost many times as much."""
    aws = yaml.safe_load((clusters / "aws.yaml").read_text())
    wanted = {"ec2:InstanceType": aws["available_node_types"]["gpu"]["node_config"]["InstanceType"]}
    launching = [s for s in statements(clusters / "aws-head-policy.json") if "ec2:RunInstances" in listed(s["Action"])]
    of_instances = [s for s in launching if any(":instance/" in resource for resource in listed(s["Resource"]))]
    assert [each["Condition"] for each in of_instances] == [{"StringEquals": wanted}]
