"""What a run leaves behind holds none of the secrets that it was given."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.engines.micro import micro_preset

REPOSITORY = Path(__file__).parents[1]
SECRETS = {
    "RAY_AUTH_TOKEN": "planted0token0planted0token0planted0token0",
    "AWS_SECRET_ACCESS_KEY": "planted/secret/access/key",
    "AWS_SESSION_TOKEN": "planted-session-token",
    "HF_TOKEN": "hf_plantedhuggingfacetoken",
    "WANDB_API_KEY": "planted-wandb-key",
}


def _found_in(content: bytes) -> list[str]:
    return [name for name, secret in SECRETS.items() if secret.encode() in content]


def test_no_file_and_no_line_of_a_run_holds_a_secret_of_its_environment(tmp_path: Path) -> None:
    preset = micro_preset(tmp_path)
    # Ray's own logs are looked through too; short, since its sockets lie below it.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as ray_folder:
        environment = {**os.environ, **SECRETS, "RAY_TMPDIR": ray_folder, "RAY_ADDRESS": ""}
        environment.pop("RAY_AUTH_TOKEN_PATH", None)
        command = [sys.executable, "jobs/pretrain.py", str(preset), "epochs=1", "workers.num_workers=1"]
        done = subprocess.run(
            [*command, "evaluation.every_epochs=1"], cwd=REPOSITORY, env=environment, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        files = [path for folder in (tmp_path, Path(ray_folder)) for path in folder.rglob("*") if path.is_file()]
        names = {path.name for path in files}
        assert {"config.toml", "metrics.jsonl", "state.json", "gcs_server.out", "raylet.out"} <= names
        found = {str(path): secrets for path in files if (secrets := _found_in(path.read_bytes()))}
    assert found == {}
    assert _found_in(done.stdout + done.stderr) == []
