"""Fields of KubeRay's and Kubernetes' objects that the manifests may use, with their types; anything else is an error.

Written by hand after the API references of KubeRay 1.5 to 1.6 (ray.io/v1, its objects' specifications)
and of Kubernetes (what is below ``template``: a choice of fields). It finds a misspelt or misplaced field and a value
of a wrong type; it is not the schema that a cluster checks against.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Labels = dict[str, str]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Strict):
    name: Name
    namespace: Name | None = None
    labels: Labels = {}
    annotations: Labels = {}


class Resources(Strict):
    requests: dict[str, Quantity]
    limits: dict[str, Quantity]


class SeccompProfile(Strict):
    type: Literal["RuntimeDefault", "Unconfined", "Localhost"]


class PodSecurity(Strict):
    runAsNonRoot: bool
    runAsUser: Count
    runAsGroup: Count | None = None
    fsGroup: Count
    seccompProfile: SeccompProfile


class Capabilities(Strict):
    drop: list[str] = []
    add: list[str] = []


class ContainerSecurity(Strict):
    allowPrivilegeEscalation: bool
    capabilities: Capabilities
    privileged: bool = False
    readOnlyRootFilesystem: bool | None = None


class Port(Strict):
    name: Annotated[str, Field(max_length=15)]
    containerPort: Annotated[int, Field(ge=1, le=65535)]
    protocol: Literal["TCP", "UDP", "SCTP"] = "TCP"


class SecretKey(Strict):
    name: Name
    key: str


class ValueFrom(Strict):
    secretKeyRef: SecretKey


class Env(Strict):
    name: str
    value: str | None = None
    valueFrom: ValueFrom | None = None


class VolumeMount(Strict):
    name: Name
    mountPath: str
    readOnly: bool = False
    subPath: str | None = None


class Container(Strict):
    name: Name
    image: str
    imagePullPolicy: Literal["Always", "IfNotPresent", "Never"] | None = None
    command: list[str] | None = None
    args: list[str] | None = None
    ports: list[Port] = []
    env: list[Env] = []
    resources: Resources
    securityContext: ContainerSecurity
    volumeMounts: list[VolumeMount] = []


class Claim(Strict):
    claimName: Name
    readOnly: bool = False


class Volume(Strict):
    name: Name
    persistentVolumeClaim: Claim


class Toleration(Strict):
    key: str
    operator: Literal["Exists", "Equal"]
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"]


class PodSpec(Strict):
    restartPolicy: Literal["Always", "OnFailure", "Never"]
    serviceAccountName: Name | None = None
    automountServiceAccountToken: bool | None = None
    terminationGracePeriodSeconds: Count | None = None
    nodeSelector: Labels = {}
    tolerations: list[Toleration] = []
    securityContext: PodSecurity
    containers: Annotated[list[Container], Field(min_length=1)]
    initContainers: list[Container] = []
    volumes: list[Volume] = []
    imagePullSecrets: list[dict[Literal["name"], Name]] = []


class PodTemplate(Strict):
    metadata: dict[str, Any] = {}
    spec: PodSpec


class AuthOptions(Strict):
    mode: Literal["disabled", "token"]
    secretName: Name | None = None
    enableK8sTokenAuth: bool | None = None


class AutoscalerOptions(Strict):
    version: Literal["v1", "v2"] | None = None
    upscalingMode: Literal["Default", "Aggressive", "Conservative"] | None = None
    idleTimeoutSeconds: Count | None = None
    resources: Resources | None = None
    image: str | None = None
    imagePullPolicy: Literal["Always", "IfNotPresent", "Never"] | None = None
    securityContext: ContainerSecurity | None = None
    env: list[Env] = []
    envFrom: list[Any] = []
    volumeMounts: list[VolumeMount] = []


class HeadGroup(Strict):
    serviceType: Literal["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"] | None = None
    headService: dict[str, Any] | None = None
    enableIngress: bool | None = None
    labels: Labels = {}
    resources: Labels = {}
    rayStartParams: Labels
    template: PodTemplate


class ScaleStrategy(Strict):
    workersToDelete: list[str] = []


class WorkerGroup(Strict):
    groupName: Name
    replicas: Count
    minReplicas: Count
    maxReplicas: Count
    numOfHosts: Count = 1
    idleTimeoutSeconds: Count | None = None
    suspend: bool | None = None
    labels: Labels = {}
    resources: Labels = {}
    scaleStrategy: ScaleStrategy | None = None
    rayStartParams: Labels
    template: PodTemplate


class RayClusterSpec(Strict):
    rayVersion: Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+$")]
    authOptions: AuthOptions
    enableInTreeAutoscaling: bool | None = None
    autoscalerOptions: AutoscalerOptions | None = None
    gcsFaultToleranceOptions: dict[str, Any] | None = None
    headServiceAnnotations: Labels = {}
    upgradeStrategy: dict[str, Any] | None = None
    managedBy: str | None = None
    suspend: bool | None = None
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup] = []


class RayCluster(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: RayClusterSpec


class RayJobSpec(Strict):
    entrypoint: str
    entrypointNumCpus: float | None = None
    entrypointNumGpus: float | None = None
    entrypointResources: str | None = None
    runtimeEnvYAML: str | None = None
    jobId: str | None = None
    metadata: Labels = {}
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"] = "K8sJobMode"
    submitterPodTemplate: PodTemplate | None = None
    submitterConfig: dict[str, Any] | None = None
    backoffLimit: Count = 0
    activeDeadlineSeconds: Count | None = None
    shutdownAfterJobFinishes: bool = False
    ttlSecondsAfterFinished: Count = 0
    deletionStrategy: dict[str, Any] | None = None
    clusterSelector: Labels | None = None
    managedBy: str | None = None
    suspend: bool = False
    rayClusterSpec: RayClusterSpec


class RayJob(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: RayJobSpec
