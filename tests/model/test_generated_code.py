"""What torch's compiler makes of our norms and gated activations for GPUs that are not here: one
Triton kernel each.
"""

import contextlib
import types
from unittest import mock

import pytest
import torch
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._pytree import tree_map

from medqlora.model import compiling

INTERFACE = "torch._dynamo.device_interface.CudaInterface"
X = ((4096, 4096), torch.bfloat16)
WEIGHT = ((4096,), torch.bfloat16)
SCALE = ((4096, 1), torch.float32)
PIECES = {
    "norm": (lambda x, weight: compiling.normalise(x, weight, 1e-6, False), [X, WEIGHT]),
    "norm with offset": (lambda x, weight: compiling.normalise(x, weight, 1e-6, True), [X, WEIGHT]),
    "norm backward": (
        lambda g, x, scale, weight: compiling.normalise_backward(g, x, scale, weight, False),
        [X, X, SCALE, WEIGHT],
    ),
    "norm with offset backward": (
        lambda g, x, scale, weight: compiling.normalise_backward(g, x, scale, weight, True),
        [X, X, SCALE, WEIGHT],
    ),
    "silu gate": (lambda gate, up: compiling.gate(gate, up, "silu"), [X, X]),
    "silu gate backward": (
        lambda g, gate, up: compiling.gate_backward(g, gate, up, "silu"),
        [X, X, X],
    ),
    "gelu gate": (lambda gate, up: compiling.gate(gate, up, "gelu_pytorch_tanh"), [X, X]),
    "gelu gate backward": (
        lambda g, gate, up: compiling.gate_backward(g, gate, up, "gelu_pytorch_tanh"),
        [X, X, X],
    ),
}


@contextlib.contextmanager
def play_gpu(capability: tuple[int, int]):
    """Let the compiler believe in a GPU of this compute capability."""
    facts = types.SimpleNamespace(
        major=capability[0],
        minor=capability[1],
        multi_processor_count=108,
        regs_per_multiprocessor=65_536,
        max_threads_per_multi_processor=2_048,
        max_threads_per_block=1_024,
        warp_size=32,
        total_memory=80 * 2**30,
        shared_memory_per_block=49_152,
        shared_memory_per_block_optin=166_912,
        shared_memory_per_multiprocessor=167_936,
        L2_cache_size=40 * 2**20,
        name="a GPU that is not here",
    )
    answers = {
        "torch.cuda.get_device_properties": facts,
        "torch.cuda.get_device_capability": capability,
        "torch.cuda.current_device": 0,
        "torch.cuda.device_count": 1,
        f"{INTERFACE}.get_device_properties": facts,
        f"{INTERFACE}.Worker.get_device_properties": facts,
        "torch._inductor.scheduler.has_triton": True,
        f"{INTERFACE}.get_compute_capability": 10 * capability[0] + capability[1],
        "torch.utils._triton.triton_hash_with_backend": "none",
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch(name, lambda *_, answer=answer: answer))
        DeviceProperties.create.cache_clear()
        yield
    DeviceProperties.create.cache_clear()


def count_tokens(mode: FakeTensorMode):
    """A number of tokens that the compiler does not know, as torch.compile sees lengths that
    change.
    """
    sizes = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    return mode.from_tensor(torch.empty(4096, device="meta"), symbolic_context=sizes).shape[0]


def generate(function, arguments, capability: tuple[int, int], any_length: bool) -> str:
    """The code that Inductor writes for a function of tensors of these shapes and dtypes;
    any_length: for every number of tokens.
    """

    def move(value):
        return (
            torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
            if torch.is_tensor(value)
            else value
        )

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    # traced for a CPU, because a CPU build of torch cannot write into CUDA tensors, not even fake
    # ones
    with mode, torch.no_grad():
        tokens = count_tokens(mode) if any_length else 4096
        inputs = [
            torch.empty((tokens, *shape[1:]) if len(shape) == 2 else shape, dtype=dtype)
            for shape, dtype in arguments
        ]
        traced = make_fx(
            lambda tokens, *tensors: function(*tensors),
            decomposition_table=select_decomp_table(),
            tracing_mode="real",
        )(tokens, *inputs)
        inputs = [tokens, *map(move, inputs)]
        for node in traced.graph.nodes:
            node.meta = tree_map(move, node.meta) if "val" in node.meta else node.meta
    with play_gpu(capability):
        graph = GraphLowering(traced, example_inputs=inputs, shape_env=mode.shape_env)
        with V.set_graph_handler(graph), V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
            graph.run(*inputs)
            code = graph.codegen()[0]
    return getattr(code, "value", code)


@pytest.mark.parametrize("any_length", [False, True])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("name", PIECES)
def test_each_piece_is_one_kernel(name, capability, any_length):
    code = generate(*PIECES[name], capability, any_length)
    assert code.count("async_compile.triton(") == 1
    assert "extern_kernels." not in code.split("def call(")[-1]
    assert f"cc={10 * capability[0] + capability[1]}" in code
