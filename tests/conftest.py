import pytest
import torch

import moecore

DEVICES = ["cpu"]
if torch.cuda.is_available() and moecore.build_info()["has_cuda"]:
    DEVICES.append("cuda")


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param
