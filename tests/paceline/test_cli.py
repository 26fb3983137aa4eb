import socket
import subprocess
import sys

import pytest

from cluster.errors import ConfigError
from deploy.session import AppState, DeploymentState
from paceline.serve import check_port, examples, why


def paceline(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from paceline.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_help_lists_the_commands():
    result = paceline("--help")
    assert result.returncode == 0
    assert all(command in result.stdout for command in ("serve", "bench", "replay", "train"))


def test_a_bad_deploy_file_ends_with_code_2_and_one_clear_line(tmp_path):
    pytest.importorskip("ray")
    path = tmp_path / "app.yaml"
    path.write_text("aplications: []\n")
    result = paceline("serve", str(path))
    assert result.returncode == 2
    assert "unknown key 'aplications': did you mean 'applications'?" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_port_in_use_is_refused_before_anything_starts():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"http_options.port is {port}"):
            check_port("127.0.0.1", port)


def test_the_examples_can_be_pasted():
    text = examples("http://h:1", "tiny")
    assert "curl http://h:1/v1/completions" in text
    assert "curl -N http://h:1/v1/chat/completions" in text
    assert text.count('"model": "tiny"') == 2


def test_a_failure_is_told_deployment_by_deployment():
    state = AppState("DEPLOY_FAILED", "", (DeploymentState("Verifier", "UNHEALTHY", 0, "no such file"),))
    assert why(state) == "Verifier is UNHEALTHY: no such file"


def test_of_a_trace_only_the_last_line_is_told():
    trace = 'It failed 3 times.\nray::Verifier (pid=1)\n  File "a.py", line 1\n    raise x\nConfigError: no weights'
    state = AppState("DEPLOY_FAILED", "", (DeploymentState("Verifier", "DEPLOY_FAILED", 0, trace),))
    assert why(state).startswith("Verifier is DEPLOY_FAILED: It failed 3 times. ConfigError: no weights")
    assert "a.py" not in why(state)
