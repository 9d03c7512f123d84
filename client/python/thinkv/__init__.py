"""KV-cache pages from the thinkvd pool, for inference engines.

    with thinkv.Client() as client:
        model = client.model(layers=30, q_heads=9, kv_heads=3, head_dim=64)
        sequence = model.sequence(policy="thinkv", budget=1024)

Arrays go in as numpy arrays or anything with ``__dlpack__`` in host memory; they come out as numpy
arrays where numpy is installed, else as ``memoryview``. With a daemon whose pool is on a GPU,
sequences decode in the rows of a ``model.batch(...)``, on GPU tensors, on the current stream.
``thinkv.transformers`` puts Hugging Face models on it, ``thinkv.Step`` their whole decode step in
one CUDA graph; all else needs nothing but libthinkv.
"""

from ._batch import Batch
from ._client import Client, HostStep, Model, Sequence, library_version
from ._errors import (
    DeviceFailedError,
    Error,
    ExhaustedError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    QuotaExceededError,
    StaleError,
    UnavailableError,
    UnsupportedError,
    VersionMismatchError,
)
from ._step import Step
from ._version import __version__

__all__ = [
    "Batch",
    "Client",
    "DeviceFailedError",
    "Error",
    "ExhaustedError",
    "HostStep",
    "InternalError",
    "InvalidArgumentError",
    "Model",
    "NotFoundError",
    "PermissionDeniedError",
    "QuotaExceededError",
    "Sequence",
    "StaleError",
    "Step",
    "UnavailableError",
    "UnsupportedError",
    "VersionMismatchError",
    "__version__",
    "library_version",
]
