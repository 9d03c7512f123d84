"""thinkv.transformers without a GPU: the CUDA kernels on the CPU, CPU tensors for the GPU's."""

import os
import unittest

try:
    import torch  # noqa: F401
    import transformers  # noqa: F401
except ImportError as missing:
    raise unittest.SkipTest(f"needs torch and transformers: {missing}") from None

from thinkv import _arrays

# The driver is the fake one, which takes foreign memory for the GPU's when it is told to.
os.environ["THINKV_FAKE_CUDA_ADOPTS"] = "1"
_arrays.lies_on_gpu = lambda tensor: True

from transformers_cases import Engines, Generate, Logits, Refusals  # noqa: E402, F401
from transformers_cases import Rows, ShortEngines, ShortPools  # noqa: E402, F401

if __name__ == "__main__":
    unittest.main()
