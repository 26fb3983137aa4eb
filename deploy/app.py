"""The Serve application: `import_path: deploy.app:build` in a deploy file.

Without `from __future__ import annotations`: Serve looks at the builder's annotation for the model of its arguments.
"""

from typing import Any

from ray import serve

from cluster.placement.directory import Directory
from cluster.placement.secret import drawn_once
from deploy.checks import checked
from deploy.config import Application, DrafterPart, VerifierPart
from deploy.link import make_link
from deploy.router import Router
from drafter_service.deployment import Drafter
from verifier_service.deployment import Verifier

# Requests beyond the router's own limit still have to reach it, to be told so; and /health and /metrics always.
SPARE_REQUESTS = 256
END_S = 5.0  # for a replica to end its processes, after what it may wait for


def build(args: Application) -> serve.Application:
    """Directory, verifiers, drafters and, as ingress, routers. Raises ConfigError before anything is started."""
    application = _with_secret(checked(args))
    directory = _deployment(Directory).options(ray_actor_options={"num_cpus": 0}).bind()
    services = {"verifier": _verifiers(application.verifier, directory)}
    if application.drafts_remotely and application.drafter is not None:
        services["drafter"] = _drafters(application.drafter, directory)
    router = application.router
    return (
        _deployment(Router)
        .options(
            num_replicas=router.replicas,
            ray_actor_options={"num_cpus": router.front_cpus},
            max_ongoing_requests=router.max_in_flight + SPARE_REQUESTS,
        )
        .bind(
            application.model_name,
            application.verifier.target,
            router.settings,
            application.verifier.link.access,
            directory,
            services,
        )
    )


def _verifiers(part: VerifierPart, directory: Any) -> Any:
    bundles = part.bundles
    verifier = _deployment(Verifier).options(
        num_replicas=part.replicas,
        ray_actor_options={"num_cpus": part.front_cpus},
        placement_group_bundles=bundles,
        placement_group_strategy=part.placement,
        graceful_shutdown_timeout_s=part.drain_s + END_S,
    )
    return verifier.bind(
        part.settings, bundles[1], make_link, directory, part.start_timeout_s, part.max_step_s, part.drain_s
    )


def _drafters(part: DrafterPart, directory: Any) -> Any:
    bundles = part.bundles
    return (
        _deployment(Drafter)
        .options(
            num_replicas=part.replicas,
            ray_actor_options={"num_cpus": part.front_cpus},
            placement_group_bundles=bundles,
            placement_group_strategy="STRICT_PACK",
        )
        .bind(part.settings, bundles[1], directory, part.start_timeout_s)
    )


def _with_secret(application: Application) -> Application:
    """One secret for all connections of the application, unless the deploy file brings its own."""
    verifier = application.verifier
    token = verifier.link.token or drawn_once(application.model_name)
    link = verifier.link.model_copy(update={"token": token})
    changes: dict[str, object] = {"verifier": verifier.model_copy(update={"link": link})}
    if application.drafter is not None:
        changes["drafter"] = application.drafter.model_copy(update={"token": token})
    return application.model_copy(update=changes)


def _deployment(decorated: object) -> serve.Deployment:
    """What `@serve.deployment` makes of a class, which type checkers still take for the class."""
    assert isinstance(decorated, serve.Deployment)
    return decorated
