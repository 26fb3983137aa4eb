import subprocess
import sys

import pytest

from cluster.errors import ConfigError
from deploy.file import read_deploy_file

pytest.importorskip("ray")


def refusal(path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_deploy_file(path)
    return str(caught.value)


def test_a_good_file_is_read_with_its_address(write, arguments):
    file = read_deploy_file(write(arguments, http_options={"host": "127.0.0.1", "port": 8123}))
    assert (file.name, file.host, file.port, file.route_prefix) == ("app", "127.0.0.1", 8123, "/")
    assert file.application.model_name == "tiny"


def test_a_misspelt_key_of_the_file_itself_is_named(write, arguments):
    assert "unknown key 'http_option': did you mean 'http_options'" in refusal(write(arguments, http_option={}))


def test_a_misspelt_argument_is_named_with_file_and_place(write, arguments):
    arguments["drafter"]["replica"] = 2
    message = refusal(write(arguments))
    assert "app.yaml: args: unknown key 'replica' in drafter: did you mean 'replicas'?" in message


def test_another_builder_is_refused(write, arguments, tmp_path):
    path = write(arguments)
    path.write_text(path.read_text().replace("deploy.app:build", "other:app"))
    assert "applications[0].import_path is 'other:app'" in refusal(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    assert "no.yaml" in refusal(tmp_path / "no.yaml")


def test_a_file_that_is_no_yaml_is_named(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("a: [")
    assert "bad.yaml is not YAML" in refusal(path)


def test_the_checks_load_neither_torch_nor_transformers(write, arguments):
    code = (
        "import sys; from pathlib import Path; from deploy.file import read_deploy_file;"
        f"read_deploy_file(Path({str(write(arguments))!r}));"
        "sys.exit(','.join(m for m in ('torch', 'transformers') if m in sys.modules) or None)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
