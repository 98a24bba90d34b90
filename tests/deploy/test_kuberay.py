"""The KubeRay manifests have the fields that KubeRay knows, are closed to strangers, and fit project and image."""

import copy
import re
from typing import Any

import pytest
from pydantic import ValidationError

from tests.deploy.files import (
    KUBERAY_FILES,
    ROOT,
    SHARED,
    check_follows_spot_nodes,
    documents,
    leaves_time_to_save,
    preset_with,
    submitted,
    text_of,
)
from tests.deploy.kuberay_fields import RayCluster, RayClusterSpec, RayJob

each_file = pytest.mark.parametrize("name", KUBERAY_FILES)


def ray_object(name: str) -> dict[str, Any]:
    found = documents(name)
    return found["RayCluster"] if "RayCluster" in found else found["RayJob"]


def cluster_spec(name: str) -> RayClusterSpec:
    found = ray_object(name)
    if found["kind"] == "RayCluster":
        return RayCluster.model_validate(found).spec
    return RayJob.model_validate(found).spec.rayClusterSpec


@each_file
def test_a_field_that_is_not_kuberays_is_found(name: str) -> None:
    cluster_spec(name)
    model = {"RayCluster": RayCluster, "RayJob": RayJob}[ray_object(name)["kind"]]
    for misplace in (misspelt_minimum, token_beside_the_options, replicas_as_text):
        wrong = copy.deepcopy(ray_object(name))
        misplace(wrong["spec"].get("rayClusterSpec", wrong["spec"]))
        with pytest.raises(ValidationError):
            model.model_validate(wrong)


def misspelt_minimum(spec: dict[str, Any]) -> None:
    spec["workerGroupSpecs"][0]["minReplica"] = spec["workerGroupSpecs"][0].pop("minReplicas")


def token_beside_the_options(spec: dict[str, Any]) -> None:
    spec["mode"] = spec["authOptions"].pop("mode")


def replicas_as_text(spec: dict[str, Any]) -> None:
    spec["workerGroupSpecs"][0]["replicas"] = "2"


@each_file
def test_token_authentication_is_on_and_the_token_is_the_operators(name: str) -> None:
    spec = cluster_spec(name)
    assert spec.authOptions.mode == "token"
    assert "stringData" not in text_of(name)
    for container in containers(spec):
        assert not [each for each in container.env if "TOKEN" in each.name]
        assert container.command is None
        assert container.args is None


def containers(spec: RayClusterSpec) -> list[Any]:
    groups = [spec.headGroupSpec, *spec.workerGroupSpecs]
    return [container for group in groups for container in group.template.spec.containers]


@each_file
def test_no_address_outside_the_cluster_leads_to_a_pod(name: str) -> None:
    head = cluster_spec(name).headGroupSpec
    assert head.serviceType == "ClusterIP"
    assert not head.enableIngress
    assert "0.0.0.0" not in text_of(name)
    policy = documents(name)["NetworkPolicy"]["spec"]
    assert policy["podSelector"] == {}
    assert policy["policyTypes"] == ["Ingress"]
    own, operator = policy["ingress"]
    assert own == {"from": [{"podSelector": {}}]}
    assert operator["from"][0]["podSelector"]["matchLabels"] == {"app.kubernetes.io/component": "kuberay-operator"}
    assert [port["port"] for port in operator["ports"]] == [8265]


@each_file
def test_all_objects_are_in_the_namespace_that_the_policy_closes(name: str) -> None:
    found = documents(name)
    namespace = found.pop("Namespace")["metadata"]["name"]
    assert {kind: each["metadata"]["namespace"] for kind, each in found.items()} == dict.fromkeys(found, namespace)


@each_file
def test_every_container_asks_for_cpu_and_memory_is_held_to_them_and_has_no_rights(name: str) -> None:
    spec = cluster_spec(name)
    for container in containers(spec):
        assert {"cpu", "memory"} <= container.resources.requests.keys()
        assert container.resources.limits == container.resources.requests
        assert not container.securityContext.allowPrivilegeEscalation
        assert container.securityContext.capabilities.drop == ["ALL"]
    for group in (spec.headGroupSpec, *spec.workerGroupSpecs):
        assert group.template.spec.securityContext.runAsNonRoot
    assert spec.autoscalerOptions is not None
    assert spec.autoscalerOptions.resources is not None


@each_file
def test_gpu_workers_scale_between_two_bounds_on_spot_nodes_and_the_head_stays_off_them(name: str) -> None:
    spec = cluster_spec(name)
    (workers,) = spec.workerGroupSpecs
    assert spec.enableInTreeAutoscaling
    assert 0 < workers.minReplicas <= workers.replicas < workers.maxReplicas
    assert workers.template.spec.containers[0].resources.limits["nvidia.com/gpu"] == "1"
    assert any("spot" in toleration.key for toleration in workers.template.spec.tolerations)
    assert not spec.headGroupSpec.template.spec.tolerations
    assert "nvidia.com/gpu" not in spec.headGroupSpec.template.spec.containers[0].resources.limits


@each_file
def test_head_and_workers_share_one_claim_that_several_nodes_may_write_to(name: str) -> None:
    claim = documents(name)["PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    spec = cluster_spec(name)
    for group in (spec.headGroupSpec, *spec.workerGroupSpecs):
        (volume,) = group.template.spec.volumes
        assert volume.persistentVolumeClaim.claimName == claim["metadata"]["name"]
        (mount,) = group.template.spec.containers[0].volumeMounts
        assert (mount.name, mount.mountPath) == (volume.name, SHARED)


@each_file
def test_one_image_with_the_ray_version_that_the_tests_pass_with(name: str) -> None:
    spec = cluster_spec(name)
    assert len({container.image for container in containers(spec)}) == 1
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert re.search(rf"^ray=={re.escape(spec.rayVersion)}$", constraints, re.MULTILINE)


def test_both_manifests_start_the_same_cluster() -> None:
    assert cluster_spec(KUBERAY_FILES[0]) == cluster_spec(KUBERAY_FILES[1])


def test_a_lost_rayjob_is_tried_again_under_the_same_name_in_the_shared_folder() -> None:
    job = RayJob.model_validate(ray_object("kuberay-rayjob.yaml")).spec
    assert job.backoffLimit > 0
    assert job.shutdownAfterJobFinishes
    config = preset_with(submitted(job.entrypoint))
    assert config.run.storage_path.startswith(SHARED)
    (workers,) = job.rayClusterSpec.workerGroupSpecs
    check_follows_spot_nodes(config, workers.replicas, workers.maxReplicas)


@each_file
def test_a_job_that_is_stopped_has_the_time_to_save_its_checkpoint(name: str) -> None:
    (head,) = cluster_spec(name).headGroupSpec.template.spec.containers
    (waits,) = [each.value for each in head.env if each.name == "RAY_JOB_STOP_WAIT_TIME_S"]
    assert waits is not None
    assert leaves_time_to_save(waits)


def test_the_job_submitted_by_hand_writes_to_the_shared_folder() -> None:
    lines = text_of("kuberay-raycluster.yaml").splitlines()
    text = "\n".join(line.removeprefix("#") for line in lines if line.startswith("#"))
    arguments = submitted(text[text.index("ray job submit") : text.index("kubectl -n passreid delete")])
    config = preset_with(arguments)
    assert config.run.storage_path.startswith(SHARED)
    (workers,) = cluster_spec("kuberay-raycluster.yaml").workerGroupSpecs
    check_follows_spot_nodes(config, workers.replicas, workers.maxReplicas)
