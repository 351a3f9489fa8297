"""Triton's interpreter, for machines without a GPU: it runs kernels on tensors of the CPU."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch


def begin() -> None:
    """Interpret kernels on machines without a GPU; call this before the import of kernels."""
    if torch.cuda.is_available():
        return
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

    from syncbn.kernels.triton import tiling as triton_tiles

    # A small tile takes as long as a large one.
    triton_tiles._REDUCTION = triton_tiles.TileShape(4096, programs_per_sm=2)
    triton_tiles._ELEMENTWISE_CHANNELS_LAST = triton_tiles.TileShape(4096, 64, tiles=4)
    ready = {"syncbn.kernels.triton.kernels", "syncbn.kernels.triton.indexing"}
    convert, call = InterpreterBuilder.cast_impl, InterpretedFunction.__call__
    look_up, types = interpreter._get_np_dtype, {}

    def rounded(self: Any, source: Any, dtype: Any) -> Any:
        # The interpreter truncates; GPUs round.
        if source.dtype.scalar is tl.float32 and dtype.scalar is tl.bfloat16:
            half = torch.from_numpy(source.data.copy()).bfloat16()
            return TensorHandle(half.view(torch.uint16).numpy(), tl.bfloat16)
        return convert(self, source, dtype)

    def called(self: Any, *arguments: Any, **constants: Any) -> Any:
        # The interpreter patches the language for every call of a device function, which takes
        # longer than running it.
        if (home := self.fn.__module__) in ready:
            return self.rewrite()(*arguments, **constants)
        ready.add(home)
        return call(self, *arguments, **constants)

    def looked_up(dtype: Any) -> Any:
        # The interpreter builds a table of all types in every call.
        if (name := dtype.scalar.name) not in types:
            types[name] = look_up(dtype)
        return types[name]

    # The interpreter checks every integer sum for overflow, and does not report it.
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    interpreter._get_np_dtype = looked_up
    InterpreterBuilder.cast_impl = rounded
    InterpretedFunction.__call__ = called
