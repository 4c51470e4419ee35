"""Pre-norm ViT blocks over packed tokens: the stack of encoder, decoder and classifier, compiled and recomputed.

Place in the flow: packed tokens -> blocks -> packed tokens. Axes: M packed tokens, D width, E = 3 D, A heads,
K = D / A channels of a head, B clips, L branches (attention and MLP of each block, in order). Parameter names are
the official ones.
"""

import functools
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from everest_ds.model.attention import attention
from everest_ds.model.packing import Packing

# By name, because torch's varlen and flash-attn register their operators when they are imported. SDPA's fallback
# without a fused kernel consists of matmuls; it is not listed, so it is recomputed.
ATTENTION_OPERATORS = frozenset(
    {
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "torch_attn::_varlen_attn",
        "flash_attn::_flash_attn_varlen_forward",
    }
)


def recompute(function: Callable[..., Tensor], *args: object, attention_too: bool) -> Tensor:
    """Return ``function(*args)``, keep only its inputs, and run it again in backward.

    Unless ``attention_too``, the output of attention and its log-sum-exp per row and head are kept as well. The
    function must not draw random numbers: no generator state is saved, because that would synchronise.
    """
    if attention_too:
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    contexts = functools.partial(create_selective_checkpoint_contexts, _keep_attention)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _keep_attention(context: Any, operator: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keep = operator.name() in ATTENTION_OPERATORS
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


P = ParamSpec("P")
R = TypeVar("R")

# Tests set another backend where there is no compiler.
COMPILE_BACKEND: str | Callable[..., Any] = "inductor"


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function compiled for any number of tokens; the same object each time, so it compiles once."""
    return _compile(function, COMPILE_BACKEND)


@functools.lru_cache(maxsize=16)
def _compile(function: Callable[..., Any], backend: str | Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, backend=backend, dynamic=True)


def compile_obstacle(device_type: str) -> str | None:
    """Return why this machine cannot compile for a device, cpu or cuda, or None.

    torch.compile generates C++ for a CPU and Triton code for a GPU. Both need a compiler and Python's headers.
    """
    if COMPILE_BACKEND != "inductor":
        return None
    if device_type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "it needs the triton package on a GPU; pip install triton"
        compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    else:
        compilers = [os.environ.get("CXX", "g++")]
    if not any(shutil.which(compiler) for compiler in compilers):
        return f"it needs a compiler, and {' or '.join(compilers)} is not on this machine"
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if headers.is_file():
        return None
    return f"it needs Python's headers, and {headers} does not exist; install python3-dev"


@dataclass(frozen=True, kw_only=True)
class EncoderOptions:
    """Settings of all models besides their size.

    Attributes:
        tubelet_size: Frames of a tubelet.
        patch_size: Pixels of a tubelet's edge.
        embedding_layers: Conv3d layers of the tubelet embedding: 1, 2 or 3.
        attention: An attention backend's name, or auto.
        activation_checkpointing: Recompute each block in backward instead of storing its activations.
        recompute_attention: With checkpointing, recompute attention too instead of keeping its output.
        compile_blocks: Compile blocks, except attention (`model.transformer`).
    """

    tubelet_size: int = 2
    patch_size: int = 16
    embedding_layers: int = 1
    attention: str = "auto"
    activation_checkpointing: bool = False
    recompute_attention: bool = True
    compile_blocks: bool = False


NORM_EPS = 1e-6
MLP_RATIO = 4


class ExternalBiasLinear(nn.Linear):
    """A linear layer whose bias is an argument.

    The query-key-value bias consists of two parameters and zeros. The attention layer owns them, as in the official
    state dict. The weight must be read in this module's own forward, where ZeRO-3 has gathered it.
    """

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        return F.linear(x, self.weight, bias)


class Attention(nn.Module):
    """Multi-head self-attention within each clip; query and value have a bias, the key has none.

    A bias of the key would shift all scores of a query equally, which softmax ignores.
    """

    def __init__(self, width: int, num_heads: int, *, backend: str) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width={width} is not divisible by num_heads={num_heads}")
        self.num_heads = num_heads
        self.backend = backend
        self.qkv = ExternalBiasLinear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x_MD: Tensor, packing: Packing) -> Tensor:
        """Attend within each clip: (M, D) -> (M, D)."""
        return self.join_heads(attention(self.split_heads(x_MD), packing, backend=self.backend))

    def split_heads(self, x_MD: Tensor) -> Tensor:
        """Return queries, keys and values, (M, 3, A, K)."""
        bias_E = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        return self.qkv(x_MD, bias_E).view(len(x_MD), 3, self.num_heads, -1)

    def join_heads(self, z_MAK: Tensor) -> Tensor:
        """Project the heads' outputs (M, A, K) to (M, D)."""
        return self.proj(z_MAK.flatten(1))


class Mlp(nn.Module):
    """Linear layer, exact GELU, linear layer; parameters are named as in timm's."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x_MD: Tensor) -> Tensor:
        """Transform (M, D) -> (M, D)."""
        return self.fc2(F.gelu(self.fc1(x_MD)))


class Block(nn.Module):
    """Pre-norm transformer block.

    With ``compiles`` the parts before and after attention are compiled. Compiled parts do not call the modules, so
    the hooks that gather weights at ZeRO-3 do not run.
    """

    def __init__(self, width: int, num_heads: int, *, backend: str, compiles: bool = False) -> None:
        super().__init__()
        self.compiles = compiles
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, num_heads, backend=backend)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, MLP_RATIO * width)

    def forward(self, x_MD: Tensor, packing: Packing, scale_2M: Tensor | None = None) -> Tensor:
        """Transform (M, D) -> (M, D), each token's attention and MLP branch scaled (`branch_scales`)."""
        if self.compiles:
            qkv_M3AK = compiled(Block.before_attention)(self, x_MD)
            z_MAK = attention(qkv_M3AK, packing, backend=self.attn.backend)
            return compiled(Block.after_attention)(self, x_MD, z_MAK, scale_2M)
        x_MD = add_branch(x_MD, self.attn(self.norm1(x_MD), packing), scale_2M, 0)
        return add_branch(x_MD, self.mlp(self.norm2(x_MD)), scale_2M, 1)

    def before_attention(self, x_MD: Tensor) -> Tensor:
        """Return queries, keys and values, (M, 3, A, K)."""
        return self.attn.split_heads(self.norm1(x_MD))

    def after_attention(self, x_MD: Tensor, z_MAK: Tensor, scale_2M: Tensor | None) -> Tensor:
        """Return the block's output, given its input and the heads' outputs."""
        x_MD = add_branch(x_MD, self.attn.join_heads(z_MAK), scale_2M, 0)
        return add_branch(x_MD, self.mlp(self.norm2(x_MD)), scale_2M, 1)


def add_branch(x_MD: Tensor, branch_MD: Tensor, scale_2M: Tensor | None, branch: int) -> Tensor:
    """Add a branch, scaled where scales are given, to the residual stream."""
    return x_MD + (branch_MD if scale_2M is None else scale_2M[branch, :, None] * branch_MD)


def make_blocks(width: int, depth: int, num_heads: int, options: EncoderOptions) -> nn.ModuleList:
    make = functools.partial(Block, width, num_heads, backend=options.attention, compiles=options.compile_blocks)
    return nn.ModuleList(make() for _ in range(depth))


def branch_scales(noise_BL: Tensor, drop_path: float) -> Tensor:
    """Return the factor of each clip's branches: 0 where dropped, 1 / (1 - rate) where kept, (B, L).

    The rate of a block rises linearly from 0 at the first to ``drop_path`` at the last; a branch is kept where
    noise >= rate.

    Args:
        noise_BL: Uniform in [0, 1), float32: attention and MLP branch of each block, in order.
        drop_path: Rate of the last block, in [0, 1).

    Source: the official `drop_path_rate`, timm's `DropPath`.
    Differs from the official code: the draws are arguments, so they belong to the sample and not to the process.
    """
    depth = noise_BL.shape[1] // 2
    rate_L = torch.linspace(0, drop_path, depth, device=noise_BL.device).repeat_interleave(2)
    return (noise_BL >= rate_L) / (1 - rate_L)


def run_blocks(
    blocks: nn.ModuleList, x_MD: Tensor, packing: Packing, options: EncoderOptions, scale_LM: Tensor | None = None
) -> Tensor:
    """Run packed tokens through a stack, (M, D); ``scale_LM`` has two factors a block for each token."""
    for number, block in enumerate(blocks):
        scale_2M = None if scale_LM is None else scale_LM[2 * number : 2 * number + 2]
        if options.activation_checkpointing and torch.is_grad_enabled():
            x_MD = recompute(block, x_MD, packing, scale_2M, attention_too=options.recompute_attention)
        else:
            x_MD = block(x_MD, packing, scale_2M)
    return x_MD


def init_linears(model: nn.Module, init_weight: Callable[[Tensor], object]) -> None:
    """Initialise all linear layers of a model: weights by a function, biases with zeros."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            init_weight(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
