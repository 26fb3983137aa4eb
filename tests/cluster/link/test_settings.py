from __future__ import annotations

import pytest
import torch

from cluster.errors import ConfigError
from cluster.link.messages import Refused
from tests.cluster.link.echo import Echo, Verifier, connect, serve

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")


@pytest.mark.parametrize(("setting", "value"), [("dtype", "int8"), ("tensor_transport", "pigeon")])
def test_a_setting_that_cannot_work_is_named(setting, value):
    with pytest.raises(ConfigError, match=f"link.{setting} is '{value}'"):
        connect(**{setting: value})


@without_cuda
def test_a_verifier_without_nccl_says_so_at_once():
    with pytest.raises(ConfigError, match="no CUDA device with NCCL"):
        connect(tensor_transport="torch", device="cuda")


@without_cuda
def test_a_drafter_without_nccl_refuses_the_torch_plane_by_name(stops):
    server = stops(serve(Echo(), device="cuda"))
    verifier = Verifier(server.address, tensor_transport="torch", store_port=1)
    assert isinstance(verifier.welcome, Refused)
    assert "no CUDA device with NCCL" in verifier.welcome.reason
    verifier.close()
