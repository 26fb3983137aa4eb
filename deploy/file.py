"""A deploy file: the YAML that `serve run` takes, read strictly."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from cluster.errors import ConfigError
from deploy.checks import checked, explained
from deploy.config import Application
from deploy.unknown_keys import unknown_keys

BUILDER = "deploy.app:build"


@dataclass(frozen=True)
class DeployFile:
    """schema: Ray Serve's own form of the whole file. application: the arguments of its one application."""

    schema: Any
    name: str
    application: Application
    host: str
    port: int
    route_prefix: str


def read_deploy_file(path: Path) -> DeployFile:
    """Read and check everything that can be checked without starting anything, checkpoints included.

    Raises ConfigError. Stricter than `serve run`, which ignores unknown keys of deployments.
    """
    file = parse_deploy_file(path)
    try:
        return replace(file, application=checked(file.application))
    except ConfigError as error:
        raise ConfigError(f"{path}: args: {error}") from error


def parse_deploy_file(path: Path) -> DeployFile:
    """Read and check the file itself; its checkpoints need not be on this machine. Raises ConfigError."""
    from ray.serve.schema import ServeDeploySchema

    raw = _mapping(path)
    problems = unknown_keys(ServeDeploySchema, raw)
    if problems:
        raise ConfigError(_listed(path, problems))
    applications = raw.get("applications")
    if not isinstance(applications, list) or len(applications) != 1 or not isinstance(applications[0], dict):
        raise ConfigError(f"{path}: applications must list exactly one application, with import_path: {BUILDER}")
    only = applications[0]
    if only.get("import_path") != BUILDER:
        raise ConfigError(f"{path}: applications[0].import_path is {only.get('import_path')!r}: it must be {BUILDER}")
    try:
        application = Application.model_validate(only.get("args") or {})
    except ValidationError as error:
        raise ConfigError(_listed(path, explained(error), "args: ")) from error
    try:
        schema = ServeDeploySchema.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(_listed(path, explained(error))) from error
    first = schema.applications[0]
    http = schema.http_options
    return DeployFile(schema, first.name, application, http.host, http.port, first.route_prefix or "/")


def _mapping(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold a mapping with the key applications; see deploy/tiny.yaml")
    return raw


def _listed(path: Path, problems: list[str], prefix: str = "") -> str:
    return "\n".join(f"{path}: {prefix}{problem}" for problem in problems)
