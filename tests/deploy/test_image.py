"""The Dockerfile names what is there, sends nothing else, and runs as no one in particular."""

import re
import tomllib

from tests.deploy.files import DEPLOY, ROOT, documents, text_of
from tests.deploy.kuberay_fields import RayJob


def instructions() -> list[list[str]]:
    """The Dockerfile's instructions as words."""
    lines = [line for line in text_of("Dockerfile").splitlines() if not line.startswith("#")]
    return [line.split() for line in "\n".join(lines).replace("\\\n", " ").splitlines() if line.strip()]


def copied() -> list[str]:
    return [source for word, *rest in instructions() if word == "COPY" for source in rest[:-1]]


def test_what_is_copied_is_there_and_is_all_that_is_sent() -> None:
    for source in copied():
        assert (ROOT / source).exists()
    ignore = [line for line in text_of("Dockerfile.dockerignore").splitlines() if not line.startswith("#")]
    assert ignore[0] == "*"
    assert {line.removeprefix("!") for line in ignore if line.startswith("!")} == set(copied())


def test_what_the_build_of_the_package_reads_is_copied() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {project["readme"], *project["license-files"], "passreid_ray", "pyproject.toml"} <= set(copied())


def test_the_base_has_the_python_of_the_constraints_and_versions_are_held_to_them() -> None:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    python = re.search(r"Python (\d+\.\d+)\)", constraints)
    assert python is not None
    (base,) = [rest[0] for word, *rest in instructions() if word == "FROM"]
    assert base.startswith(f"python:{python[1]}-")
    installs = [" ".join(words) for words in instructions() if "pip" in words]
    assert len(installs) == 1
    assert "-c constraints.txt ." in installs[0]


def test_the_image_runs_as_the_user_of_the_manifests() -> None:
    (user,) = [rest[0] for word, *rest in instructions() if word == "USER"]
    job = RayJob.model_validate(documents("kuberay-rayjob.yaml")["RayJob"]).spec
    assert int(user) == job.rayClusterSpec.headGroupSpec.template.spec.securityContext.runAsUser != 0


def test_the_image_starts_no_ray_without_a_token_and_holds_none() -> None:
    text = text_of("Dockerfile")
    assert "RAY_AUTH_MODE=token" in text
    assert "RAY_AUTH_TOKEN" not in text


def test_the_jobs_entry_point_is_a_file_of_the_image() -> None:
    folder = next(rest[0] for word, *rest in instructions() if word == "WORKDIR")
    job = RayJob.model_validate(documents("kuberay-rayjob.yaml")["RayJob"]).spec
    script = job.entrypoint.split()[1]
    assert script.startswith(f"{folder}/jobs/")
    assert (ROOT / script.removeprefix(f"{folder}/")).is_file()
    assert {"passreid_ray", "jobs"} <= set(copied())
    assert (DEPLOY / "Dockerfile").is_file()
