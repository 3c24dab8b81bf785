"""The Serve configs against Ray's own schema, and against the application that they configure."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from ray.serve.schema import (
    ApplicationStatusOverview,
    DeploymentSchema,
    DeploymentStatusOverview,
    HTTPOptionsSchema,
    ServeApplicationSchema,
    ServeDeploySchema,
)

from gem_ray.config import ConfigError, IngressReplicas, StagePool, load_config
from gem_ray.planning.plan import make_plan
from gem_ray.pools import serving_pools
from gem_ray.serving import session
from gem_ray.serving.schemas import IMPORT_PATH, file_schema, ours
from gem_ray.serving.service import Service
from gem_ray.serving.settings import INGRESS

FOLDER = Path(__file__).parents[2] / "serve_configs"
FILES = sorted(FOLDER.glob("*.yaml"))


def args_of(file):
    (application,) = yaml.safe_load(file.read_text())["applications"]
    return application["args"]


def test_there_is_one_for_every_preset():
    assert [file.stem for file in FILES] == ["cluster", "nano", "one-gpu"]
    assert all(args_of(file)["preset"] == file.stem for file in FILES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_preset_has_the_deployments_and_shares_of_cards_of_its_file(file):
    """`gem-ray serve --preset one-gpu` reserves what `--serve-config serve_configs/one-gpu.yaml` does."""

    def shares(config):
        return [(pool.name, pool.placement.num_gpus) for pool in serving_pools(config)[1]]

    assert shares(load_config(file.stem)) == shares(load_config(**args_of(file)))
    assert all(share > 0 for _, share in shares(load_config(file.stem))) == (load_config(file.stem).device == "cuda")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_rays_schema_takes_it_and_knows_every_key(file):
    """Serve ignores keys that it does not know."""
    values = yaml.safe_load(file.read_text())
    assert file_schema(file).applications[0].import_path == IMPORT_PATH
    assert values.keys() <= ServeDeploySchema.model_fields.keys()
    assert values["http_options"].keys() <= HTTPOptionsSchema.model_fields.keys()
    for application in values["applications"]:
        assert application.keys() <= ServeApplicationSchema.model_fields.keys()
        for deployment in application["deployments"]:
            assert deployment.keys() <= DeploymentSchema.model_fields.keys()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_configures_the_deployments_that_there_are(file):
    config = load_config(**args_of(file))
    there = {INGRESS, *(pool.name for pool in serving_pools(config)[1])}
    deployments = yaml.safe_load(file.read_text())["applications"][0]["deployments"]
    named = {deployment["name"]: deployment.get("user_config") for deployment in deployments}
    assert named.keys() <= there
    assert named[INGRESS] == {"gamma": config.filter.gamma, "k": config.filter.k}
    (grounding,) = (name for name in there if "ground" in name.split("-"))
    assert (named[grounding] or {}).get("threshold") == config.grounder.matcher.threshold  # none: the matcher's own


def test_only_the_clusters_listens_beyond_its_machine():
    hosts = {file.stem: yaml.safe_load(file.read_text())["http_options"]["host"] for file in FILES}
    assert hosts == {"nano": "127.0.0.1", "one-gpu": "127.0.0.1", "cluster": "0.0.0.0"}


@pytest.mark.parametrize("http_options", [{"port": 8001}, {}, None])
def test_a_config_that_names_no_host_listens_on_this_machine_alone(tmp_path, http_options):
    values = yaml.safe_load((FOLDER / "nano.yaml").read_text()) | {"http_options": http_options or {}}
    if http_options is None:
        del values["http_options"]
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(values))
    assert file_schema(tmp_path / "x.yaml").http_options.host == "127.0.0.1"


@pytest.mark.parametrize("reranker", [False, True])
@pytest.mark.parametrize(
    ("name", "gpus", "card"),
    [
        ("one-gpu", 1, "a10g"),
        ("one-gpu", 1, "l4"),
        ("one-gpu", 1, "rtx-3090"),
        ("one-gpu", 1, "rtx-4090"),
        ("cluster", 2, "a100-80gb"),
        ("cluster", 2, "h100"),
    ],
)
def test_the_plan_finds_room_for_every_replicas_models_in_its_share_of_a_card(name, gpus, card, reranker):
    asked = [f"reranker={{enabled: {reranker}, adapter: models/reranker-lora}}"]
    config = load_config(**args_of(FOLDER / f"{name}.yaml"), overrides=asked)
    config.pipeline.pools = [  # all at once, as replicas are
        StagePool(stages=pool.stages, num_gpus=pool.num_gpus, batch_size=pool.batch_size)
        for pool in config.serving.pools
    ]
    make_plan(config, gpus, card=card).check()


def test_what_is_no_serve_config_is_named(tmp_path):
    for text in ("applications: 7", "{", "- a"):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"x\.yaml is no config for Ray Serve"):
            file_schema(tmp_path / "x.yaml")


@pytest.mark.parametrize("wrong", [{"gama": 0.1}, {"gamma": -1}, {"gamma": math.inf}, {"gamma": math.nan}, {"k": 0}])
def test_settings_that_are_none_are_refused_and_the_old_ones_stay(wrong):
    service = Service(load_config(), {"tag-rerank-ground": None}, "run")
    service.reconfigure({"gamma": 0.3})
    with pytest.raises(ValueError, match=next(iter(wrong))):
        service.reconfigure(wrong)
    assert (service.flow.filter.gamma, service.flow.filter.k) == (0.3, 2)


@pytest.mark.parametrize(
    ("deployment", "user_config"),
    [
        ("ingress", {"gamma": -1}),
        ("ingress", {"threshold": 0.1}),
        ("tag-rerank-ground", {"threshold": 2}),
        ("tag-rerank-ground", {"k": 2}),
        ("tag-rerank-ground", {"gamma": 0.3}),
    ],
)
def test_wrong_settings_in_a_file_are_named_before_serve_sees_them(tmp_path, deployment, user_config):
    values = yaml.safe_load((FOLDER / "nano.yaml").read_text())
    values["applications"][0]["deployments"] = [{"name": deployment, "user_config": user_config}]
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=f"x.yaml: user_config of {deployment}"):
        file_schema(tmp_path / "x.yaml")


APART = [{"stages": ["tag"]}, {"stages": ["rerank"]}, {"stages": ["ground"]}]


def schema_with(tmp_path, *deployments, **args):
    """Of `nano`, with a pool for each stage unless `serving` says otherwise."""
    args["serving"] = {"pools": APART} | args.get("serving", {})
    values = yaml.safe_load((FOLDER / "nano.yaml").read_text())
    values["applications"][0] |= {"deployments": [*deployments], "args": {"preset": "nano"} | args}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(values))
    return file_schema(tmp_path / "x.yaml")


def test_what_serves_own_keys_say_of_replicas_holds_for_the_ingress_and_the_local_ray_too(tmp_path):
    schema = schema_with(
        tmp_path,
        {"name": "tag", "autoscaling_config": {"max_replicas": 3, "target_ongoing_requests": 0.5}},
        {"name": "rerank", "num_replicas": 2, "ray_actor_options": {"num_cpus": 0.25}},
        {"name": "ground", "num_replicas": "auto"},
        {"name": "ingress", "num_replicas": 4},
        serving={"stage_calls": 2, "pools": [APART[0], APART[1] | {"batch_size": 5, "num_gpus": 0.5}, APART[2]]},
    )
    ((_, config),) = ours(schema)
    tag, rerank, ground = config.serving.pools
    assert (tag.min_replicas, tag.max_replicas, tag.target_ongoing) == (1, 3, 0.5)
    assert (rerank.min_replicas, rerank.max_replicas, rerank.batch_size) == (2, 2, 5)
    assert (rerank.num_cpus, rerank.num_gpus) == (0.25, 0)  # Serve's options take the place of the application's
    assert (ground.min_replicas, ground.max_replicas) == (1, 100)  # as Serve's documentation has it
    assert config.serving.ingress == IngressReplicas(min_replicas=4, max_replicas=4)
    assert config.serving.ingress.num_cpus == load_config().serving.ingress.num_cpus == 0.5


def test_serves_auto_stays_within_the_applications_own_bounds(tmp_path):
    own = {"stage_calls": None, "pools": [APART[0] | {"min_replicas": 2, "max_replicas": 4}, *APART[1:]]}
    ((_, config),) = ours(schema_with(tmp_path, {"name": "tag", "num_replicas": "auto"}, serving=own))
    assert (config.serving.pools[0].min_replicas, config.serving.pools[0].max_replicas) == (2, 4)


def test_serves_keys_go_to_the_pool_that_they_name_whatever_stages_others_list(tmp_path):
    """Several may list `load_image`, and some list what is off."""
    pools = [
        {"stages": ["knowledge", "tag"]},
        {"stages": ["load_image", "rerank"]},
        {"stages": ["load_image", "ground"]},
    ]
    schema = schema_with(tmp_path, {"name": "ground", "num_replicas": 3}, serving={"pools": pools})
    ((_, config),) = ours(schema)
    assert [pool.max_replicas for pool in config.serving.pools] == [1, 1, 3]
    assert [pool.stages for pool in config.serving.pools] == [pool["stages"] for pool in pools]


def test_the_default_pool_takes_serves_keys_too(tmp_path):
    usual = load_config().serving
    schema = schema_with(tmp_path, {"name": "tag-rerank-ground", "num_replicas": 1}, serving={"pools": {}})
    ((_, config),) = ours(schema)
    (pool,) = config.serving.pools
    assert (pool.min_replicas, pool.max_replicas) == (1, 1)
    assert pool.model_copy(update={"min_replicas": 2, "max_replicas": 2}) == usual.pools[0]


def test_an_autoscaling_that_is_none_is_named(tmp_path):
    for wrong in ({"min_replicas": "two"}, {"max_replicas": None}):
        with pytest.raises(ConfigError, match=r"x\.yaml: autoscaling_config of tag"):
            schema_with(tmp_path, {"name": "tag", "autoscaling_config": wrong})


def test_replicas_that_serves_own_keys_could_never_add_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"tag in serving\.pools would never have more than min_"):
        schema_with(tmp_path, {"name": "tag", "autoscaling_config": {"max_replicas": 2, "target_ongoing_requests": 9}})


def test_a_deployment_that_there_is_not_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown deployment 'grnd'; did you mean 'ground'\?"):
        schema_with(tmp_path, {"name": "grnd", "num_replicas": 2})
    with pytest.raises(ConfigError, match="unknown deployment 'rerank'"):
        schema_with(tmp_path, {"name": "rerank", "num_replicas": 2}, reranker={"enabled": False})


def test_what_is_waited_for_is_said(monkeypatch, caplog):
    """With the states that Serve reports while a cluster has no room."""
    waiting = DeploymentStatusOverview(
        status="UPDATING", status_trigger="CONFIG_UPDATE_STARTED", replica_states={}, message="no node has a GPU"
    )
    states = [
        ApplicationStatusOverview(status=status, message="", last_deployed_time_s=0, deployments={"tag": waiting})
        for status in ("DEPLOYING", "DEPLOYING", "RUNNING")
    ]
    monkeypatch.setattr(session, "_REPORT_S", 0)
    monkeypatch.setattr(session.serve, "status", lambda: SimpleNamespace(applications={"gem-ray": states.pop(0)}))
    session._wait_for(SimpleNamespace(name="gem-ray"))
    assert caplog.messages == ["gem-ray does not run yet: no node has a GPU"] * 2


class _Mute:
    """A Serve of which nothing answers that is waited for."""

    def __init__(self) -> None:
        ingress = DeploymentStatusOverview(
            status="HEALTHY", status_trigger="CONFIG_UPDATE_COMPLETED", replica_states={"RUNNING": 1}, message=""
        )
        self.states = {
            "gem-ray": ApplicationStatusOverview(
                status="UNHEALTHY", message="", last_deployed_time_s=0, deployments={INGRESS: ingress}
            )
        }
        self.asked: list[str] = []

    def status(self) -> SimpleNamespace:
        return SimpleNamespace(applications=self.states)

    def get_deployment_handle(self, deployment: str, application: str) -> SimpleNamespace:
        return SimpleNamespace(broadcast=self._broadcast)

    def _broadcast(self, method: str) -> SimpleNamespace:
        self.asked.append(method)
        return SimpleNamespace(results_async=self._forever)

    async def shutdown_async(self) -> None:
        self.asked.append("shutdown")
        await self._forever()

    async def _forever(self) -> None:
        await asyncio.get_running_loop().create_future()


def test_a_service_ends_although_nothing_answers(monkeypatch, caplog):
    schema = file_schema(FOLDER / "nano.yaml")
    schema.applications[0].args["serving"] = {"drain_s": 0.1}
    mute = _Mute()
    monkeypatch.setattr(session, "serve", mute)
    monkeypatch.setattr(session, "_ANSWERS_S", 0.1)
    asyncio.run(session._end(schema, is_own_ray=True))
    assert mute.asked == ["drain", "shutdown"]
    assert caplog.messages == ["the ingress does not answer; what it has begun is lost"]
    with asyncio.Runner() as runner, pytest.raises(TimeoutError, match=r"the ingress has not answered for 0\.1 s"):
        session.Served("http://127.0.0.1:8000", schema, runner).reload_keys()


def test_a_batch_must_fit_into_what_is_admitted():
    with pytest.raises(ConfigError, match=r"serving.*max_batch_posts \(32\) is above max_in_flight \(8\)"):
        load_config(overrides=["serving.max_in_flight=8"])
    with pytest.raises(ConfigError, match=r"serving\.pools\.0.*max_replicas \(2\) is below min_replicas \(3\)"):
        load_config(overrides=["serving.pools.tag.min_replicas=3"])


def test_a_body_must_fit_into_what_is_held():
    with pytest.raises(ConfigError, match=r"serving.*max_body_bytes \(\d+\) is above max_bodies_bytes \(1000000\)"):
        load_config(overrides=["serving.max_bodies_bytes=1000000"])


def test_replicas_that_could_never_be_added_are_refused():
    apart = "serving.pools=[{stages: [tag]}, {stages: [rerank]}, {stages: [ground]}]"
    scaling = [apart, "serving.pools.tag.max_replicas=4", "serving.pools.tag.target_ongoing=4"]
    with pytest.raises(ConfigError, match=r"tag in serving\.pools would never have .*: the ingress makes 4 calls"):
        load_config(overrides=scaling)
    for mended in ("stage_calls=null", "stage_calls=2", "pools.tag.min_replicas=4", "ingress.max_replicas=2"):
        load_config(overrides=[*scaling, f"serving.{mended}"])
    # vLLM's deployment is asked without a limit.
    load_config(overrides=[apart, "serving.pools.rerank.max_replicas=4", "reranker.engine=vllm"])
