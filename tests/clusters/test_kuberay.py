"""The KubeRay manifests against the structure of the v1 API, unknown keys refused, and what they let in."""

# ruff: noqa: N815 (the API's own names)

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gem_ray.config import ServingConfig, load_config
from gem_ray.planning.plan import make_plan
from gem_ray.pools import serving_pools

ROOT = Path(__file__).parents[2]
Strings = dict[str, str]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=47)]  # KubeRay adds to it
Count = Annotated[int, Field(ge=0)]


class Part(BaseModel):
    """Part of a manifest: YAML's own types, and no key that the API does not know."""

    model_config = ConfigDict(extra="forbid", strict=True)


# --- Kubernetes: what these manifests use of it


class Metadata(Part):
    name: Name | None = None
    namespace: str | None = None
    labels: Strings = {}
    annotations: Strings = {}


class EnvVar(Part):
    name: str
    value: str | None = None
    valueFrom: dict[str, Any] | None = None


class Port(Part):
    name: str
    containerPort: int


class Resources(Part):
    requests: Strings
    limits: Strings


class SecurityContext(Part):
    runAsNonRoot: bool
    runAsUser: int
    allowPrivilegeEscalation: bool
    capabilities: dict[Literal["add", "drop"], list[str]]
    seccompProfile: dict[Literal["type"], Literal["RuntimeDefault"]]


class Container(Part):
    name: str
    image: str
    env: list[EnvVar] = []
    ports: list[Port] = []
    resources: Resources
    securityContext: SecurityContext


class Toleration(Part):
    key: str
    operator: Literal["Exists", "Equal"]
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"]


class PodSpec(Part):
    serviceAccountName: str
    automountServiceAccountToken: bool = True
    containers: Annotated[list[Container], Field(min_length=1)]
    nodeSelector: Strings = {}
    tolerations: list[Toleration] = []


class PodTemplate(Part):
    metadata: Metadata
    spec: PodSpec


# --- ray.io/v1: every field of the API


class AuthOptions(Part):
    mode: Literal["disabled", "token"]
    secretName: str | None = None
    enableK8sTokenAuth: bool | None = None


class AutoscalerOptions(Part):
    resources: dict[str, Any] | None = None
    image: str | None = None
    imagePullPolicy: str | None = None
    securityContext: dict[str, Any] | None = None
    idleTimeoutSeconds: Count | None = None
    upscalingMode: Literal["Default", "Aggressive", "Conservative"] | None = None
    version: Literal["v1", "v2"] | None = None
    env: list[EnvVar] = []
    envFrom: list[dict[str, Any]] = []
    volumeMounts: list[dict[str, Any]] = []


class HeadGroup(Part):
    template: PodTemplate
    headService: dict[str, Any] | None = None
    enableIngress: bool | None = None
    rayStartParams: Strings
    serviceType: Literal["ClusterIP", "NodePort", "LoadBalancer"] = "ClusterIP"


class WorkerGroup(Part):
    suspend: bool | None = None
    groupName: str
    replicas: Count = 0
    minReplicas: Count
    maxReplicas: Count
    idleTimeoutSeconds: Count | None = None
    rayStartParams: Strings
    template: PodTemplate
    scaleStrategy: dict[str, Any] | None = None
    numOfHosts: int = 1

    @model_validator(mode="after")
    def _is_a_range(self) -> WorkerGroup:
        if not self.minReplicas <= self.replicas <= self.maxReplicas:
            raise ValueError("replicas outside their bounds")
        return self


class ClusterSpec(Part):
    suspend: bool | None = None
    managedBy: str | None = None
    authOptions: AuthOptions | None = None
    autoscalerOptions: AutoscalerOptions | None = None
    headServiceAnnotations: Strings = {}
    enableInTreeAutoscaling: bool | None = None
    gcsFaultToleranceOptions: dict[str, Any] | None = None
    headGroupSpec: HeadGroup
    rayVersion: str
    workerGroupSpecs: list[WorkerGroup]


class JobSpec(Part):
    activeDeadlineSeconds: int | None = None
    backoffLimit: Count = 0
    rayClusterSpec: ClusterSpec
    submitterPodTemplate: PodTemplate | None = None
    metadata: Strings = {}
    clusterSelector: Strings = {}
    submitterConfig: dict[str, Any] | None = None
    managedBy: str | None = None
    deletionStrategy: dict[str, Any] | None = None
    entrypoint: str
    runtimeEnvYAML: str = ""
    jobId: str | None = None
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"] = "K8sJobMode"
    entrypointResources: str | None = None
    entrypointNumCpus: float | None = None
    entrypointNumGpus: float | None = None
    ttlSecondsAfterFinished: Count = 0
    shutdownAfterJobFinishes: bool = False
    suspend: bool = False


class UpgradeStrategy(Part):
    type: Literal["NewCluster", "NewClusterWithIncrementalUpgrade", "None"]
    clusterUpgradeOptions: dict[str, Any] | None = None


class ServiceSpec(Part):
    rayClusterDeletionDelaySeconds: Count | None = None
    serveService: dict[str, Any] | None = None
    upgradeStrategy: UpgradeStrategy | None = None
    serveConfigV2: str
    rayClusterConfig: ClusterSpec
    excludeHeadPodFromServeSvc: bool = False
    suspend: bool = False


class RayCluster(Part):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: ClusterSpec


class RayJob(Part):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: JobSpec


class RayService(Part):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: Metadata
    spec: ServiceSpec


def load(path):
    """The manifest; of several in a file the first."""
    return next(yaml.safe_load_all(path.read_text()))


@pytest.fixture
def job(clusters):
    return RayJob.model_validate(load(clusters / "kuberay-job.yaml"))


@pytest.fixture
def ray_service(clusters):
    return RayService.model_validate(load(clusters / "kuberay-service.yaml"))


@pytest.fixture(params=["RayCluster", "RayJob", "RayService"])
def spec(request, clusters, job, ray_service):
    if request.param == "RayJob":
        return job.spec.rayClusterSpec
    if request.param == "RayService":
        return ray_service.spec.rayClusterConfig
    return RayCluster.model_validate(load(clusters / "kuberay-cluster.yaml")).spec


def test_a_misspelt_key_is_refused(clusters):
    manifest = load(clusters / "kuberay-cluster.yaml")
    manifest["spec"]["authOption"] = manifest["spec"].pop("authOptions")
    with pytest.raises(ValidationError, match="authOption"):
        RayCluster.model_validate(manifest)


def test_token_authentication_is_on_with_a_token_from_a_secret(spec):
    assert spec.authOptions is not None
    assert spec.authOptions.mode == "token"
    assert spec.authOptions.secretName == "gem-ray-token"


def test_a_node_of_the_image_does_not_start_without_a_token(clusters):
    """For an operator that does not know `authOptions` yet."""
    assert "\nENV RAY_AUTH_MODE=token\n" in (clusters / "Dockerfile").read_text()


def test_dashboard_is_reached_by_port_forward_alone(spec):
    assert spec.headGroupSpec.serviceType == "ClusterIP"
    assert spec.headGroupSpec.enableIngress is False
    assert spec.headGroupSpec.headService is None


def test_pods_have_no_privileges_and_are_under_the_network_policy(spec, clusters):
    selector = load(clusters / "kuberay-network.yaml")["spec"]["podSelector"]["matchLabels"]
    for group in (spec.headGroupSpec, *spec.workerGroupSpecs):
        assert selector.items() <= group.template.metadata.labels.items()
        for container in group.template.spec.containers:
            assert not container.securityContext.allowPrivilegeEscalation
            assert container.securityContext.runAsNonRoot
            assert not any("SECRET" in variable.name or "TOKEN" in variable.name for variable in container.env)


def test_workers_have_an_account_of_their_own_and_no_token(spec):
    """KubeRay binds the head's account to a role that may patch pods, for the autoscaler."""
    head = spec.headGroupSpec.template.spec
    for group in spec.workerGroupSpecs:
        worker = group.template.spec
        assert worker.serviceAccountName != head.serviceAccountName
        assert not worker.automountServiceAccountToken


def test_the_driver_is_alone_on_the_head_and_workers_have_a_gpu_and_come_and_go(spec):
    assert spec.enableInTreeAutoscaling
    assert spec.headGroupSpec.rayStartParams["num-cpus"] == "0"
    (group,) = spec.workerGroupSpecs
    assert group.template.spec.containers[0].resources.limits["nvidia.com/gpu"] == "1"
    assert group.minReplicas < group.maxReplicas


def test_one_version_of_ray_everywhere(spec, clusters):
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (pinned,) = [name.partition("==")[2] for name in dependencies if name.startswith("ray[")]
    assert spec.rayVersion == pinned
    assert f"\nFROM rayproject/ray:{pinned}-py311\n" in (clusters / "Dockerfile").read_text()


def test_job_runs_a_script_of_the_image_and_is_tried_again_on_a_new_cluster(job, clusters):
    python, script, source, output, *_ = job.spec.entrypoint.split()
    image = (clusters / "Dockerfile").read_text()
    folder, script = script.split("/jobs/")
    assert python == "python"
    assert f"WORKDIR {folder}\n" in image
    assert (ROOT / "jobs" / script).is_file()
    assert (source, output) == ("s3://my-bucket/posts/", "s3://my-bucket/annotations/")
    assert job.spec.backoffLimit > 0
    assert job.spec.shutdownAfterJobFinishes


def test_runtime_environment_of_the_job_is_one_that_ray_takes(job):
    from ray.runtime_env import RuntimeEnv

    RuntimeEnv(**yaml.safe_load(job.spec.runtimeEnvYAML))


def test_only_the_pods_themselves_the_submitter_and_the_operator_get_in(clusters, job):
    inside, outside = load(clusters / "kuberay-network.yaml")["spec"]["ingress"]
    assert inside == {"from": [{"podSelector": {"matchLabels": {"app": "gem-ray"}}}]}
    assert outside["ports"] == [{"port": 8265, "protocol": "TCP"}]
    submitter, operator = outside["from"]
    assert submitter["podSelector"]["matchLabels"] == {"ray.io/originated-from-cr-name": job.metadata.name}
    assert operator["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "kuberay-operator"}


def test_the_service_deploys_what_the_serve_config_of_clusters_deploys(ray_service):
    assert yaml.safe_load(ray_service.spec.serveConfigV2) == load(ROOT / "serve_configs" / "cluster.yaml")


def test_the_service_listens_where_its_pods_are_reached_and_knows_only_hashes_of_keys(ray_service, clusters):
    (group,) = ray_service.spec.rayClusterConfig.workerGroupSpecs
    (container,) = group.template.spec.containers
    port = yaml.safe_load(ray_service.spec.serveConfigV2)["http_options"]["port"]
    assert [each.containerPort for each in container.ports] == [port]
    (keys,) = [variable for variable in container.env if variable.name == ServingConfig().api_keys_env]
    assert keys.value is None
    assert keys.valueFrom == {"secretKeyRef": {"name": "gem-ray-api-keys", "key": "hashes"}}
    _, policy = yaml.safe_load_all((clusters / "kuberay-service.yaml").read_text())
    (rule,) = policy["spec"]["ingress"]
    assert rule["ports"] == [{"port": port, "protocol": "TCP"}]
    assert all("podSelector" in peer for peer in rule["from"])


def test_the_smallest_cluster_of_the_service_holds_every_deployments_least_replicas(ray_service):
    application = yaml.safe_load(ray_service.spec.serveConfigV2)["applications"][0]
    config = load_config(**application["args"])
    _, pools = serving_pools(config)
    placements = {"ingress": config.serving.ingress} | {pool.name: pool.placement for pool in pools}
    least = {each["name"]: each["autoscaling_config"]["min_replicas"] for each in application["deployments"]}
    assert least.keys() == placements.keys()
    gpus = sum(placements[name].num_gpus * count for name, count in least.items())
    (group,) = ray_service.spec.rayClusterConfig.workerGroupSpecs
    assert 0 < gpus <= group.minReplicas


@pytest.mark.parametrize("preset", ["one-gpu", "cluster"])
def test_no_model_is_looked_for_where_a_job_has_none(preset):
    config = load_config(preset, ROOT / "clusters" / "models.yaml")
    named = [
        config.tagger.model,
        config.reranker.adapter,
        config.grounder.matcher.model,
    ]
    assert all(reference.startswith("s3://my-bucket/models/") for reference in named)
    make_plan(config, gpus=8, gpu_memory_gb={"one-gpu": 24, "cluster": 80}[preset]).check()
