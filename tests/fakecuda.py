"""A pretended CUDA device: full-size SDXL in float16 runs through the worker's own code on a machine without a GPU.

    with pretended(total_gib=24) as gpu:
        ...                                # torch.device("cuda") works
    gpu.peak, gpu.peaks, gpu.kernels, gpu.syncs, gpu.uploaded, gpu.downloaded

Tensors on "cuda" are torch's FakeTensors: shape, type and device, no numbers. Tensors on the CPU are real. Each
operator raises where CUDA would for tensors of different devices or types; memory of live tensors, kernels, copies and
waits of the host are counted. What it cannot tell: seconds, workspaces, fragmentation, overflow, which attention kernel
runs (it takes flash, and the memory-efficient one for masks, float32 and head sizes above 256). Written for torch 2.6,
with its private names.

Small tensors whose numbers follow from real ones keep them as a real tensor beside, `.known`: control flow that hangs
on numbers goes its way. float32 copies of small float16 tensors are given random ones, so that a blend of prompts ends.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import math
import mmap
import subprocess
import tempfile
import traceback
import types
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import diffusers
import torch
import torch._subclasses.fake_tensor
import transformers
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only
from world import MODEL_INDEX, SCHEDULER, configs

aten = torch.ops.aten
GIB = 1024**3
KNOWN_NUMBERS = 2**19  # tensors up to here keep their numbers
CONTEXT_BYTES = int(0.45 * GIB)  # what CUDA takes of a card before the first tensor
# products and convolutions: cuBLAS and cuDNN take one type only; FakeTensor would let several pass
ONE_TYPE = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution}
ONE_TYPE |= {aten.native_layer_norm, aten.native_group_norm}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
# C++ asks the device guard of CUDA, which a build without CUDA lacks: this one does nothing
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
extern "C" void pretend() {
  static c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> guard;
  c10::impl::device_guard_impl_registry[static_cast<size_t>(c10::DeviceType::CUDA)].store(&guard);
}
"""


@functools.cache
def load_guard() -> None:
    """Compiles the guard and puts it in force. Raises FileNotFoundError without g++."""
    root = Path(torch.__file__).parent
    options = [f"-I{root / 'include'}", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(GUARD)
        subprocess.run(
            ["g++", "-shared", "-fPIC", *options, str(source), "-o", str(library), f"-L{root / 'lib'}", "-lc10"],
            check=True,
        )
        ctypes.CDLL(str(library)).pretend()


def with_index(device: Any) -> Any:
    """cuda -> cuda:0; without an index C++ would ask the driver for the current one."""
    device = torch.device(device) if isinstance(device, str) else device
    plain = isinstance(device, torch.device) and device.type == "cuda" and device.index is None
    return torch.device("cuda", 0) if plain else device


def zeros(shape: Iterable[int], dtype: torch.dtype) -> torch.Tensor:
    """Zeros in host memory that take none until they are used; malloc would reuse, and so write, what was freed."""
    size = math.prod(shape) * dtype.itemsize
    return (
        torch.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=dtype).view(*shape)
        if size > 4096
        else torch.zeros(shape, dtype=dtype)
    )


def full_size_pipeline(configuration: Path, device: str = "cpu") -> Any:
    """SDXL's pipeline at full size in float16, its weights zeros that take no memory on the CPU; the configuration's
    tokenizers."""
    parts: dict[str, Any] = {}
    for component, config in configs("full").items():
        library, name = MODEL_INDEX[component]
        kind = getattr({"diffusers": diffusers, "transformers": transformers}[library], name)
        with torch.device("meta"):
            if component in ("unet", "vae"):
                model = kind.from_config(config | ({"force_upcast": False} if component == "vae" else {}))
            else:
                model = kind(kind.config_class(**config))
        for module in model.half().eval().modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    empty = zeros(weight.shape, weight.dtype).to(device)
                    module._parameters[name] = torch.nn.Parameter(empty, requires_grad=False)
            for name, buffer in module._buffers.items():  # CLIP's alone: its positions
                module._buffers[name] = torch.arange(buffer.numel(), device=device).view(buffer.shape)
        parts[component] = model
    for tokenizer in ("tokenizer", "tokenizer_2"):
        parts[tokenizer] = transformers.CLIPTokenizer.from_pretrained(configuration / tokenizer)
    scheduler = diffusers.EulerDiscreteScheduler.from_config(SCHEDULER)
    pipe = diffusers.StableDiffusionXLPipeline(**parts, scheduler=scheduler, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """All tensors in arguments or results."""
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


def leaves_of(*values: Any) -> list[Any]:
    """Arguments with those in lists; pytree would take longer than the operator."""
    nested = [value if isinstance(value, list | tuple) else (value,) for value in values]
    return [leaf for group in nested for leaf in group]


@functools.cache
def is_composite(func: Any) -> bool:
    """Whether an operator is made of others."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    return func is not aten._to_copy.default and has_kernel


@functools.cache
def aliases(func: Any) -> bool:
    """Whether an operator's result is its argument, or a view of it."""
    return any(result.alias_info for result in func._schema.returns)


@functools.cache
def is_view(func: Any) -> bool:
    """Whether an operator's result is a view of its argument."""
    return not func._schema.is_mutable and aliases(func)


def call_of(func: Any, args: Any, kwargs: Any) -> Any:
    """What the result of an operator follows from, where it is a new tensor without known numbers; else None."""
    if aliases(func) or func is aten._to_copy.default:
        return None

    def told(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return tuple(x.shape), x.stride(), x.dtype, x.device
        return tuple(map(told, x)) if isinstance(x, list | tuple) else (type(x), x)

    tensors = [x for x in leaves_of(*args, *kwargs.values()) if isinstance(x, FakeTensor)]
    if all(getattr(x, "known", None) is not None for x in tensors):
        return None
    return func, tuple(map(told, args)), tuple((name, told(x)) for name, x in kwargs.items())


def place_in_code() -> str:
    """ "handler.py:1640 decode_pixels": the innermost line that is neither torch's nor this file's."""
    for frame in reversed(traceback.extract_stack()):
        if "site-packages/torch/" not in frame.filename and frame.filename != __file__:
            return f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"
    return ""


class FakeCuda(TorchDispatchMode):
    """The device: what runs under it, and what was counted."""

    def __init__(self, total_gib: float) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=False)
        self.total = int(total_gib * GIB)
        self.used = self.peak = self.uploaded = self.downloaded = 0  # bytes
        self.phase_peak = 0
        self.peaks: list[int] = []  # bytes, of each stretch that ended in torch.cuda.synchronize()
        self.kernels: collections.Counter[str] = collections.Counter()  # by operator
        self.syncs: list[str] = []  # "what @ where": the host waited for the device
        self.mixed: set[str] = set()  # operators that promoted a type, and where
        self._live: dict[int, Any] = {}  # storage -> what tells its end
        self._made: dict[Any, tuple[Any, ...]] = {}  # call -> size, strides, type and device of its result

    def reset(self) -> None:
        """Counts from now on."""
        self.peak, self.phase_peak, self.uploaded, self.downloaded = self.used, self.used, 0, 0
        self.peaks.clear()
        self.kernels.clear()
        self.syncs.clear()
        self.mixed.clear()

    def synchronize(self, _device: Any = None) -> None:
        """The worker ends each phase of a job so."""
        self.peaks.append(self.phase_peak)
        self.phase_peak = self.used

    @property
    def free(self) -> int:
        return self.total - CONTEXT_BYTES - self.used

    def wait(self, what: str) -> None:
        """The host waits for the device."""
        self.syncs.append(f"{what} @ {place_in_code()}")

    def hold(self, tensor: torch.Tensor) -> None:
        """Counts a tensor's storage until it is freed. Raises OutOfMemoryError where it does not fit."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // 512) * 512
        if tensor.device.type != "cuda" or key in self._live:
            return

        def dead(_: Any) -> None:
            if self._live.pop(key, None) is not None:
                self.used -= size

        self._live[key] = weakref.ref(storage, dead)
        self.used += size
        self.peak, self.phase_peak = max(self.peak, self.used), max(self.phase_peak, self.used)
        if self.free < 0:
            raise torch.OutOfMemoryError(f"CUDA out of memory (pretended) at {place_in_code()}")

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        kwargs = kwargs or {}
        leaves = leaves_of(*args, *kwargs.values())
        to_gpu = any(isinstance(leaf, torch.device) and leaf.type == "cuda" for leaf in leaves)
        if not to_gpu and not any(isinstance(leaf, FakeTensor) for leaf in leaves):
            return func(*args, **kwargs)
        if to_gpu:
            args, kwargs = tree_map_only(torch.device, with_index, (args, kwargs))
        if func is aten.scaled_dot_product_attention.default:
            with self:
                return self.attention(*args, **kwargs)
        if func is aten.upsample_nearest2d.vec:  # CUDA has a kernel; the Python decomposition goes through float32
            x, size, scales = args
            size = size or [int(n * factor) for n, factor in zip(x.shape[2:], scales, strict=True)]
            with self:
                return aten.upsample_nearest2d.default(x, size, *(scales or (None, None)))
        if is_composite(func):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        self.check_types(func, leaves)
        if func in (aten._local_scalar_dense.default, aten.equal.default):
            self.wait("a number is read")
            known = [getattr(tensor, "known", None) for tensor in tensors_of(args)]
            return func(*known) if all(number is not None for number in known) else self.guess(func, args)
        if func is aten.copy_.default and not isinstance(args[0], FakeTensor):
            self.wait("copy to the host")
            self.downloaded += args[0].nbytes
            return args[0]
        if func is aten.bincount.default:
            self.wait("a size that hangs on numbers")
            counts = func(args[0].known, *args[1:], **kwargs)
            out = self.new(counts.shape, counts.stride(), counts.dtype, args[0].fake_device)
            out.known = counts
            self.hold(out)
            return out
        return self.run(func, args, kwargs)

    def new(self, *made: Any) -> FakeTensor:
        """A tensor of this size, strides, type and device."""
        size, strides, dtype, device = made
        return FakeTensor(self.fake, torch.empty_strided(size, strides, dtype=dtype, device="meta"), device)

    def guess(self, func: Any, args: Any) -> Any:
        """A number that nobody knows."""
        return False if func is aten.equal.default or args[0].dtype == torch.bool else args[0].dtype.is_complex * 1

    def check_types(self, func: Any, leaves: list[Any]) -> None:
        """Raises where one operator gets devices or types that the device's libraries do not take together."""
        places = {x.device.type for x in leaves if isinstance(x, torch.Tensor) and x.dim()}
        if func._overloadpacket in ONE_TYPE and len(places) > 1:  # FakeTensorMode lets convolutions pass
            raise RuntimeError(f"{func} on {sorted(places)} at {place_in_code()}")
        kinds = {x.dtype for x in leaves if isinstance(x, torch.Tensor) and x.dim() and x.dtype.is_floating_point}
        if len(kinds) < 2 or func is aten.copy_.default:
            return
        if func._overloadpacket in ONE_TYPE:
            raise RuntimeError(f"{func} of {sorted(map(str, kinds))} at {place_in_code()}")
        self.mixed.add(f"{func} @ {place_in_code()}")

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The operator on tensors without numbers, counted."""
        by_mask = func in INDEXING and any(index.dtype == torch.bool for index in tensors_of(args[1]))
        if by_mask or func is aten.nonzero.default:
            self.wait("a size that hangs on numbers")
            rows = aten.nonzero((args[1][0] if by_mask else args[0]).known)
            rows = rows.flatten() if by_mask else rows
            with self.fake:
                index = torch.empty(rows.shape, dtype=rows.dtype, device=args[0].device)
            index.known = rows
            self.hold(index)
            if not by_mask:
                return index
            args = (args[0], [index, *args[1][1:]], *args[2:])

        def without_numbers(x: Any) -> Any:
            real = isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor)
            return self.fake.from_tensor(x, static_shapes=True) if real else x

        if func is aten._to_copy.default and not isinstance(args[0], FakeTensor):  # spares a fake of the source
            source = args[0]
            out = self.new(source.shape, source.stride(), kwargs.get("dtype") or source.dtype, kwargs["device"])
            self.follow(func, args, kwargs, out)
        elif (key := call_of(func, args, kwargs)) in self._made:  # seen before: spares most of the time
            out = self.new(*self._made[key])
            out.known = None
        elif is_view(func) and isinstance(args[0], FakeTensor):  # FakeTensorMode takes ten times as long
            with in_kernel_invocation_manager(self.fake):
                out = func(*args, **kwargs)
            device = args[0].fake_device
            out = tree_map_only(torch.Tensor, lambda view: FakeTensor(self.fake, view, device), out)
            self.follow(func, args, kwargs, out)
        else:
            fakes, options = tree_map(without_numbers, (args, kwargs))
            with self.fake:
                out = func(*fakes, **options)
            self.follow(func, args, kwargs, out)
            new = (
                isinstance(out, FakeTensor) and out.untyped_storage()._cdata not in self._live
            )  # _unsafe_view's is not
            if key and new:
                self._made[key] = out.shape, out.stride(), out.dtype, out.fake_device
        if func in (aten._to_copy.default, aten.copy_.default):
            source = args[func is aten.copy_.default]
            if source.device.type == "cpu" and out.device.type == "cuda":
                self.uploaded += source.nbytes
            elif source.device.type == "cuda" and out.device.type == "cpu":
                self.wait("copy to the host")
                self.downloaded += source.nbytes
                return out.known if getattr(out, "known", None) is not None else zeros(out.shape, out.dtype)
        results = tensors_of(out)
        if any(tensor.device.type == "cuda" for tensor in results) and not is_view(func):
            self.kernels[str(func)] += 1
        for tensor in results:
            self.hold(tensor)
        return out

    def follow(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Small results whose numbers follow from known ones keep them."""

        def numbers(x: Any) -> Any:
            if isinstance(x, FakeTensor):
                if getattr(x, "known", None) is None:
                    raise LookupError
                return x.known
            return torch.device("cpu") if isinstance(x, torch.device) else x

        results = tensors_of(out)
        small = results and all(tensor.numel() <= KNOWN_NUMBERS for tensor in results)
        uploaded = func is aten._to_copy.default and not isinstance(args[0], FakeTensor)
        try:
            if not small or func is aten.empty.memory_format or (uploaded and args[0].numel() > 4096):
                raise LookupError
            values, options = tree_map(numbers, (args, kwargs))
            found = tensors_of(func(*values, **options | ({"pin_memory": False} if "pin_memory" in options else {})))
            for tensor, value in zip(results, found, strict=True):
                tensor.known = value
        except LookupError:
            changed = func in (aten._to_copy.default,) and small and results[0].dtype == torch.float32
            for tensor in results:
                tensor.known = torch.randn(tensor.shape) if changed else None

    def attention(
        self, query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
        *, scale: float | None = None, enable_gqa: bool = False,
    ) -> Any:  # fmt: skip
        """scaled_dot_product_attention by the kernel that CUDA would choose."""
        assert not enable_gqa
        for other in (key, value, *([] if attn_mask is None else [attn_mask])):
            if other.device != query.device or other.dtype not in (query.dtype, torch.bool):
                raise RuntimeError(f"attention: {query.dtype} {query.device} with {other.dtype} {other.device}")
        if query.device.type == "cpu":
            return torch.empty_like(query)
        width, bias = query.shape[-1], attn_mask
        if bias is None and width <= 256 and width % 8 == 0 and query.dtype != torch.float32:
            return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
        if bias is not None:
            bias = torch.zeros_like(bias, dtype=query.dtype) if bias.dtype == torch.bool else bias
            bias = bias.expand(*query.shape[:3], key.shape[2])
        _sums = torch.empty(query.shape, dtype=torch.float32, device=query.device) if width > 128 else None
        efficient = aten._scaled_dot_product_efficient_attention
        return efficient(query, key, value, bias, False, dropout_p, is_causal, scale=scale)[0]


@contextlib.contextmanager
def pretended(total_gib: float) -> Iterator[FakeCuda]:
    """A card of this size, for a while, in this thread."""
    gpu, cuda = FakeCuda(total_gib), torch.cuda
    to, attention = torch.Tensor.to, torch.nn.functional.scaled_dot_product_attention
    properties = types.SimpleNamespace(
        total_memory=gpu.total, name="pretended", major=8, minor=9, multi_processor_count=128
    )

    def to_device(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        args = [with_index(x) if isinstance(x, torch.device | str) else x for x in args]
        kwargs |= {"device": with_index(kwargs["device"])} if kwargs.get("device") is not None else {}
        if isinstance(self, torch.nn.Parameter) and torch.is_inference_mode_enabled():
            # Module.to assigns param.data, which keeps a parameter made outside of inference_mode; here parameters are
            # replaced, and so made outside of it
            with torch.inference_mode(False), torch.no_grad():
                return to(self, *args, **kwargs)
        return to(self, *args, **kwargs)

    def attend(query: Any, *args: Any, **kwargs: Any) -> Any:
        return (gpu.attention if isinstance(query, FakeTensor) else attention)(query, *args, **kwargs)

    answers = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda _=None: properties,
        "get_device_name": lambda _=None: "pretended",
        "get_device_capability": lambda _=None: (8, 9),
        "mem_get_info": lambda _=None: (gpu.free, gpu.total),
        "memory_allocated": lambda _=None: gpu.used,
        "memory_reserved": lambda _=None: gpu.used,
        "max_memory_allocated": lambda _=None: gpu.peak,
        "reset_peak_memory_stats": lambda _=None: gpu.reset(),
        "synchronize": gpu.synchronize,
        "empty_cache": lambda: None,
    }
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    lift = torch._C._only_lift_cpu_tensors()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrite)
        stack.callback(torch._C._set_only_lift_cpu_tensors, lift)
        for name, answer in answers.items():
            stack.enter_context(patch.object(cuda, name, answer))
        stack.enter_context(patch.object(torch.Tensor, "to", to_device))
        stack.enter_context(patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor))
        stack.enter_context(patch.object(torch.nn.functional, "scaled_dot_product_attention", attend))
        stack.enter_context(patch.object(torch._subclasses.fake_tensor, "init_gpu_context", lambda *_: None))
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        torch._C._set_only_lift_cpu_tensors(True)
        stack.enter_context(gpu)
        yield gpu
