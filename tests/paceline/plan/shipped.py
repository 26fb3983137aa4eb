"""Shipped models as sizing needs them."""

from __future__ import annotations

from functools import cache

from deploy.architecture import shipped
from modeling.dflash_config import DFlashConfig
from modeling.footprint import storage_of
from modeling.quantized.scheme import scheme_of
from modeling.target_config import read_target_config
from paceline.plan.memory import DrafterModel, TargetModel, drafter_model
from verifier_service.model.touchpoints import text_shapes


@cache
def target_of(name: str) -> TargetModel:
    config = read_target_config(shipped("verifier.architecture", name))
    scheme = scheme_of(config)
    return TargetModel(config, text_shapes(config), scheme, storage_of(scheme, 2), 2)


def drafter_of(name: str, *, tied: bool = False) -> DrafterModel:
    return drafter_model(DFlashConfig.load(shipped("drafter.architecture", name)), tied, 2)
