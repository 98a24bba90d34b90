"""The script that makes certificates, and what it says when it cannot."""

import subprocess
from pathlib import Path

from tests.deploy.files import DEPLOY, ROOT


def made(folder: Path, *names: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [DEPLOY / "make_certificates.sh", folder, *names], capture_output=True, text=True, check=False
    )


def names_in(certificate: Path) -> list[str]:
    command = ["openssl", "x509", "-noout", "-ext", "subjectAltName", "-in", certificate]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [name.split(":")[1] for name in said.splitlines()[1].strip().split(", ")]


def test_the_command_of_the_security_page_covers_where_a_local_run_starts_ray(tmp_path: Path) -> None:
    lines = (ROOT / "SECURITY.md").read_text(encoding="utf-8").splitlines()
    (command,) = [line.split() for line in lines if line.startswith("    deploy/make_certificates.sh ")]
    done = made(tmp_path / "made", *command[2:])
    assert (done.returncode, done.stderr) == (0, "")
    assert names_in(tmp_path / "made" / "node.crt") == command[2:]
    assert {"localhost", "127.0.0.1", "127.0.0.2"} <= set(command[2:])


def test_a_name_that_openssl_refuses_is_told_in_its_words(tmp_path: Path) -> None:
    done = made(tmp_path / "made", "10.0.0.1", "10.0.0")
    assert done.returncode == 1
    assert "bad ip address" in done.stderr
    assert "no certificates for IP:10.0.0.1,IP:10.0.0: openssl x509 failed" in done.stderr
    assert not (tmp_path / "made" / "node.crt").exists()
