"""The packed engine under CUDA graphs on an NVIDIA GPU: what test_packed_*.py tests on the CPU.

`make test-gpu` runs them; on a machine without one they are skipped.
"""

import pytest
import test_packed_divergence
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.mark.parametrize("case", test_packed_divergence.CASES)
def test_an_adapter_that_diverges_does_not_change_the_others(case):
    test_packed_divergence.assert_the_others_train_as_without_it(test_packed_divergence.model().cuda(), case)
