"""The gate of a TokenRouter."""

import pytest
import torch

from moe_rewrite import TokenRouter
from moe_rewrite.routing.token_gate import TokenGate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("granularity", ["token", "prefix", "sequence"])
@pytest.mark.parametrize("normalize", [True, False])
def test_no_gradient_reaches_the_features(normalize, granularity, dtype):
    router = TokenGate(
        TokenRouter(granularity=granularity, normalize=normalize), 4, torch.device("cpu")
    )
    router.add(2, active=True)
    features = torch.randn(2, 3, 4, dtype=dtype, requires_grad=True)
    plan, _ = router(features, None, None)
    plan.weights.square().sum().backward()
    assert features.grad is None and router.rows[0].grad is not None
