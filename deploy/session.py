"""Ray and Serve as one command uses them: start, deploy, look, end everything that was started."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cluster.errors import ConfigError
from deploy.config import Application
from deploy.file import DeployFile

# Services keep tensors in their own processes; Ray's object store carries only small messages here.
OBJECT_STORE_BYTES = 128 << 20


@dataclass(frozen=True)
class DeploymentState:
    """running: replicas that serve. status and message: Serve's own words."""

    name: str
    status: str
    running: int
    message: str


@dataclass(frozen=True)
class AppState:
    """status: Serve's word for the application: DEPLOYING, RUNNING, DEPLOY_FAILED, UNHEALTHY, ..."""

    status: str
    message: str
    deployments: tuple[DeploymentState, ...]


@contextlib.contextmanager
def ray_session(address: str | None, show_logs: bool = False) -> Iterator[None]:
    """A connection to the cluster at `address`, or a Ray of our own (no dashboard) that ends with this block."""
    import ray

    if address is None:  # Serve's controller looks ten times a second by default: too often for two shared cores
        os.environ.setdefault("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "0.25")
        os.environ.setdefault("RAY_worker_niceness", "0")  # models are the work here, nothing to be polite to
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    shared: dict[str, Any] = {"namespace": "serve", "log_to_driver": show_logs, "logging_level": logging.ERROR}
    try:
        if address is None:
            ray.init(address="local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **shared)
        else:
            ray.init(address=address, **shared)
    except ConnectionError as error:
        raise ConfigError(f"--address is {address!r}, but no Ray cluster answers there: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def deploy(file: DeployFile) -> None:
    """Submit the file's application as `serve run` does it. Does not wait for it."""
    from ray.serve._private import api
    from ray.serve.config import gRPCOptions

    schema = file.schema
    client = api.serve_start(
        http_options=schema.http_options.model_dump(),
        proxy_location=schema.proxy_location,
        grpc_options=gRPCOptions(**schema.grpc_options.model_dump()),
        controller_options=schema.controller_options,
        global_logging_config=schema.logging_config,
    )
    client.deploy_apps(schema, _blocking=False)


def withdraw(file: DeployFile) -> None:
    """Delete the file's application from a cluster that others use; Serve too, if nothing else is on it."""
    from ray import serve

    serve.delete(file.name)
    if not serve.status().applications:
        serve.shutdown()


def app_state(name: str) -> AppState:
    from ray import serve
    from ray.serve._private.common import ReplicaState

    app = serve.status().applications.get(name)
    if app is None:
        return AppState("NOT_STARTED", "", ())
    deployments = tuple(
        DeploymentState(key, str(state.status.value), state.replica_states.get(ReplicaState.RUNNING, 0), state.message)
        for key, state in sorted(app.deployments.items())
    )
    return AppState(str(app.status.value), app.message, deployments)


def check_room(application: Application) -> None:
    """Raises ConfigError if the cluster could never hold all replicas: they would wait forever."""
    import ray

    need: dict[str, float] = {"CPU": application.router.replicas * application.router.front_cpus}
    for replicas, bundles in _replicated_bundles(application):
        for bundle in bundles:
            for resource, amount in bundle.items():
                need[resource] = need.get(resource, 0.0) + replicas * amount
    have = ray.cluster_resources()
    for resource, amount in need.items():
        if amount > have.get(resource, 0) + 1e-6:
            raise ConfigError(
                f"the deploy file needs {amount:g} {resource} in all, but the cluster has {have.get(resource, 0):g}: "
                "lower replicas, front_cpus, verifier.rank_resources or drafter.resources, or add nodes"
            )


def _replicated_bundles(application: Application) -> list[tuple[int, list[dict[str, float]]]]:
    groups = [(application.verifier.replicas, application.verifier.bundles)]
    if application.drafts_remotely and application.drafter is not None:
        groups.append((application.drafter.replicas, application.drafter.bundles))
    return groups
