"""Linear maps of bitsandbytes as maps of PyTorch, whose weight is one quantised tensor.

That library keeps packed values in a parameter and the scales in attributes beside it; its modules
put them together, and write to both (statistics move to the module, a CPU's layout of values
replaces the first, with coarser scales). Here a tensor holds all, and nothing writes to it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

from ...errors import ConfigError, ConversionError

aten = torch.ops.aten
LIBRARY = "bitsandbytes"


class PackedWeight(torch.Tensor):
    """A matrix (out, in) that stands for the packed values `data` and their scales.

    Its product with rows, `F.linear`, is the library's own; any other operation reads the matrix
    dequantised. Kinds define `dequantize()` and `product(x, bias)`, x W^T + bias of x (rows, in), in
    the dtype of x. facts: what is no tensor: its `shape`, its `dtype`, and more.
    """

    names: ClassVar[tuple[str, ...]]
    data_: torch.Tensor
    facts: dict[str, Any]

    @staticmethod
    def __new__(cls: Any, inner: dict[str, torch.Tensor], facts: dict[str, Any]) -> PackedWeight:
        shape, dtype, device = facts["shape"], facts["dtype"], inner["data_"].device
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

    def __init__(self, inner: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        self.facts = facts
        for name, tensor in inner.items():
            setattr(self, name, tensor)

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        return [name for name in self.names if name in vars(self)], self.facts

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, torch.Tensor], facts: dict[str, Any], size: Any, stride: Any
    ) -> PackedWeight:
        return cls(inner, facts)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self.facts})"

    def map(self, fn: Callable[[torch.Tensor], torch.Tensor], **facts: Any) -> PackedWeight:
        """The same with each inner tensor changed, and these facts."""
        inner = {name: fn(getattr(self, name)) for name in self.__tensor_flatten__()[0]}
        return type(self)(inner, self.facts | facts)

    def take(self, other: Any) -> PackedWeight:
        """Copy the values of another that is stored in the same way."""
        if type(other) is not type(self) or other.facts != self.facts:
            said = getattr(other, "facts", other.dtype)
            raise ConfigError(
                f"a weight stored as {said} cannot be copied into one stored as {self.facts}: "
                "quantise both models in the same way"
            )
        for name in self.__tensor_flatten__()[0]:
            getattr(self, name).copy_(getattr(other, name))
        return self

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():  # results are what operators give
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        own, *others = args
        if func in (aten.detach.default, aten.alias.default):
            return own.map(func)
        if func is aten.clone.default:
            return own.map(torch.clone)
        if func is aten._to_copy.default:
            device, dtype = kwargs.get("device"), kwargs.get("dtype") or own.dtype
            return own.map(lambda t: t.to(device), dtype=dtype)
        if func is aten.copy_.default and isinstance(own, PackedWeight):
            return own.take(others.pop(0))
        if func._schema.is_mutable:
            raise ConfigError(f"{func} writes to a weight of {LIBRARY}, which is frozen")
        plain = pytree.tree_map_only(PackedWeight, lambda t: t.dequantize(), (args, kwargs))
        return func(*plain[0], **plain[1])


def _linear(x: torch.Tensor, weight: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return weight.product(rows, bias).reshape(*x.shape[:-1], weight.shape[0])


class FourBits(PackedWeight):
    """nf4 or fp4 values in blocks (QLoRA, arXiv 2305.14314, section 3). absmax: a scale for each
    block; with double quantisation 8-bit, of scales absmax_2 and the mean `offset`. compute: the
    dtype of the product, None: that of the rows."""

    names = ("data_", "absmax", "code", "offset", "absmax_2", "code_2")

    @classmethod
    def of(cls, parameter: Any, compute: torch.dtype | None, dtype: torch.dtype) -> FourBits:
        state = parameter.quant_state
        inner = {"data_": plain(parameter), "absmax": state.absmax, "code": state.code}
        facts = {"shape": tuple(state.shape), "dtype": dtype, "block": state.blocksize,
                 "values": state.quant_type, "compute": compute}  # fmt: skip
        if state.nested:
            second = state.state2
            inner |= {"offset": state.offset, "absmax_2": second.absmax, "code_2": second.code}
            facts |= {"block_2": second.blocksize, "dtype_2": second.dtype}
        return cls(inner, facts)

    def _state(self) -> Any:
        from bitsandbytes.functional import QuantState

        facts, own, second = self.facts, vars(self), None
        if "block_2" in facts:
            second = QuantState(
                own["absmax_2"], code=own["code_2"], blocksize=facts["block_2"],
                dtype=facts["dtype_2"],
            )  # fmt: skip
        return QuantState(
            own["absmax"], torch.Size(facts["shape"]), own["code"], facts["block"],
            facts["values"], facts["dtype"], own.get("offset"), second,
        )  # fmt: skip

    def dequantize(self) -> torch.Tensor:  # type: ignore[override]
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.data_, self._state())

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        from bitsandbytes import matmul_4bit

        dtype = self.facts["compute"] or x.dtype
        bias = None if bias is None else bias.to(dtype)
        return matmul_4bit(x.to(dtype), self.data_, self._state(), bias=bias).to(x.dtype)


class EightBits(PackedWeight):
    """LLM.int8() (arXiv 2208.07339): int8 values, `scale` (out,) the largest of each row. Rows of
    the input are quantised too, except for columns with a value above `threshold`."""

    names = ("data_", "scale")
    scale: torch.Tensor

    @classmethod
    def of(cls, parameter: Any, state: Any, dtype: torch.dtype) -> EightBits:
        scale = state.SCB if parameter.SCB is None else parameter.SCB
        inner = {"data_": plain(parameter), "scale": scale}
        shape = tuple(parameter.shape)
        return cls(inner, {"shape": shape, "dtype": dtype, "threshold": state.threshold})

    def dequantize(self) -> torch.Tensor:  # type: ignore[override]
        return (self.data_.float() * (self.scale.float() / 127)[:, None]).to(self.dtype)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        from bitsandbytes import MatmulLtState, matmul

        state = MatmulLtState()
        state.CB, state.SCB, state.threshold = self.data_, self.scale, self.facts["threshold"]
        state.has_fp16_weights = state.is_training = False
        state.use_pool = state.threshold > 0
        bias = None if bias is None else bias.to(x.dtype)
        return matmul(x, self.data_, bias=bias, state=state)


class PackedLinear(nn.Linear):
    """A linear map whose weight may be a PackedWeight, and whose rows may be of another dtype."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = (
            t if t is None or t.dtype == x.dtype else t.to(x.dtype)
            for t in (self.weight, self.bias)
        )
        return F.linear(x, weight, bias)


def plain(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.detach().as_subclass(torch.Tensor)  # type: ignore[arg-type]


def holds_packed(model: nn.Module) -> bool:
    """Whether some weight of a model is one of bitsandbytes' parameters."""
    return LIBRARY in sys.modules and any(map(_holds_packed, model.modules()))


def packed_modules(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module, nn.Parameter]]:
    """(a module of bitsandbytes, a PackedLinear over its bias, the packed weight) for each of a model.

    Raises ConversionError for modules that are not quantised yet, or that cannot be held.
    """
    if LIBRARY not in sys.modules:
        return
    found = [(n, m) for n, m in model.named_modules() if _holds_packed(m)]
    floats = (p.dtype for p in model.parameters() if p.is_floating_point())
    dtype = next(floats, torch.get_default_dtype()) if found else None
    made: dict[int, nn.Parameter] = {}
    for name, module in found:
        weight: Any = module.weight
        if id(weight) not in made:
            made[id(weight)] = nn.Parameter(_packed(name, module, dtype), requires_grad=False)
        linear = PackedLinear(module.in_features, module.out_features, False, device="meta")  # type: ignore[arg-type]
        linear.weight, linear.bias = made[id(weight)], module.bias  # type: ignore[assignment]
        yield module, linear.train(module.training), made[id(weight)]


def _holds_packed(module: nn.Module) -> bool:
    own = module._parameters.values()
    return any(type(p).__module__.startswith(LIBRARY) for p in own if p is not None)


def _packed(name: str, module: Any, dtype: Any) -> PackedWeight:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    weight = module.weight
    if not isinstance(module, (Linear4bit, Linear8bitLt)):
        raise ConversionError(
            f"{name}: a {type(module).__name__} of bitsandbytes: expected its linear maps, "
            "Linear4bit and Linear8bitLt; leave others unquantised"
        )
    four = isinstance(module, Linear4bit)
    if weight.is_floating_point() or four and weight.quant_state is None:
        raise ConversionError(
            f"{name}: its weight is {weight.dtype}, not quantised yet (bitsandbytes does so when a "
            "model is moved; has_fp16_weights=True keeps it): call model.to(device), then convert"
        )
    if not four:
        return EightBits.of(weight, module.state, dtype)
    if getattr(weight.quant_state, "packing_format_for_cpu", False):
        raise ConversionError(
            f"{name}: the model was run, and bitsandbytes has replaced its weights by ones for "
            "inference on this CPU, with coarser scales and without gradients: load the model "
            "again, and convert it before it is called"
        )
    compute: Any = module.compute_dtype
    return FourBits.of(weight, compute, dtype)
