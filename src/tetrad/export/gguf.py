"""A language model as a GGUF file: the weights under llama.cpp's names, its sizes, its vocabulary.

The package `gguf` packs the header and quantises; the bytes go to `storage` one tensor at a time.
"""

import io
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import gguf
import numpy as np
from gguf.gguf_writer import WriterState
from gguf.quants import quantize
from torch import Tensor

from tetrad.errors import UserError
from tetrad.model.config import DecoderConfig
from tetrad.model.transformer import CausalLM, rope_frequencies

_Type = gguf.GGMLQuantizationType
_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7}
_LARGEST = {_Type.F32: 3.5e38, _Type.F16: 65504.0, _Type.Q8_0: 127 * 65504.0}


def gguf_bytes(model: CausalLM, words: Mapping[str, Any], kind: str, name: str) -> Iterator[bytes]:
    """The file. words: of `vocabulary.words`, with the chat template. kind: f32, f16 or q8_0, of the matrices.

    Errors: E-MODEL-UNSUPPORTED, E-NUM-NONFINITE.
    """
    c, family = model.config, {"mistral": "llama"}.get(model.config.family, model.config.family)
    other_width = family == "qwen2" and c.heads * c.head_dim != c.hidden_size
    if other_width or (c.rope_scaling and family != "llama"):
        lack = "heads of another width than hidden_size / heads" if other_width else "Llama 3's rotary scaling"
        what, hint = f"llama.cpp's {family} does not have {lack}", "use the model in transformers"
        raise UserError("E-MODEL-UNSUPPORTED", what, where=name, hint=hint)
    writer = gguf.GGUFWriter(None, family)
    for key, value in {"name": name, "file_type": _FILE_TYPES[kind], **_sizes(c), **words}.items():
        getattr(writer, f"add_{key}")(value)
    tensors = {name: (tensor, _type(tensor, kind)) for name, tensor in _renamed(model, family)}
    for key, (tensor, type_) in tensors.items():
        if not float(tensor.abs().max()) <= _LARGEST[type_]:
            what = f"a weight is not finite, or too large for {type_.name}"
            raise UserError("E-NUM-NONFINITE", what, where=key, hint="write --type f32")
        block, size = gguf.GGML_QUANT_SIZES[type_]
        nbytes = tensor.numel() // block * size
        writer.add_tensor_info(key, tensor.shape, np.dtype(np.float32), nbytes, raw_dtype=type_)
    head = io.BytesIO()
    writer.fout, writer.state = [head], WriterState.EMPTY  # type: ignore[list-item]  # storage writes the file
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    yield _padded(head.getvalue())
    for tensor, type_ in tensors.values():
        yield _padded(quantize(tensor.numpy(), type_).tobytes())


def _padded(raw: bytes) -> bytes:
    return raw + bytes(-len(raw) % gguf.GGUF_DEFAULT_ALIGNMENT)


def _sizes(c: DecoderConfig) -> dict[str, Any]:
    names = "vocab_size context_length embedding_length block_count feed_forward_length head_count head_count_kv"
    counts = (c.vocab_size, c.max_positions, c.hidden_size, c.layers, c.ff, c.heads, c.kv_heads)
    heads = dict.fromkeys(("key_length", "value_length", "rope_dimension_count"), c.head_dim)
    numbers = {"rope_freq_base": c.rope_theta, "layer_norm_rms_eps": c.norm_eps}
    numbers["quantization_version"] = gguf.GGML_QUANT_VERSION
    return {**dict(zip(names.split(), counts, strict=True)), **heads, **numbers}


def _renamed(model: CausalLM, family: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the file by its name there, float32 on the CPU."""
    c = model.config
    names = gguf.get_tensor_name_map(next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == family), c.layers)
    for name, parameter in model.named_parameters():
        tensor = parameter.detach().float().cpu().contiguous()
        if family == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            # There rotary pairs lie side by side, in Hugging Face's files half a head apart.
            tensor = tensor.view(-1, 2, c.head_dim // 2, c.hidden_size).transpose(1, 2).reshape(tensor.shape)
        yield str(names.get_name(name, try_suffixes=(".weight", ".bias"))), tensor
    if c.rope_scaling:
        yield "rope_freqs.weight", rope_frequencies(replace(c, rope_scaling=None)) / rope_frequencies(c)


def _type(tensor: Tensor, kind: str) -> gguf.GGMLQuantizationType:
    """Vectors stay float32; rows that Q8_0 cannot cut into its blocks become float16."""
    if tensor.dim() == 1:
        return _Type.F32
    type_ = gguf.GGMLQuantizationType[kind.upper()]
    return type_ if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[type_][0] == 0 else _Type.F16
