"""Activation memory of one micro-batch in forward and backward, computed without running the model.

Counts the tensors that autograd keeps of each layer for backward, and the others that are alive at the peak. Tests
compare both with the model itself. M tokens of the micro-batch, D width, R target tokens, P pixel values of a
tubelet.

The packed kernels (varlen, flash) and SDPA's fused kernels keep the same five tensors: q, k, v, the output and the
log-sum-exp of each token and head, but no matrix of tokens x tokens. The kernels' own workspaces (cuDNN, cuBLAS,
split-K buffers) are not counted.
"""

from dataclasses import dataclass
from itertools import pairwise

from everest_ds.config import Config, FinetuneConfig, PretrainConfig
from everest_ds.config.sections import ModelConfig
from everest_ds.model.encoder import RANKING_CHUNK
from everest_ds.model.selection import keep_rule
from everest_ds.model.sizes import get_size
from everest_ds.model.transformer import MLP_RATIO
from everest_ds.model.tubelets import TubeletEmbedding
from everest_ds.planning.sharding import FLOAT32_BYTES, Sharding, num_classes

# Vectors of length D that a block keeps of each token (model/transformer.py, Block): the inputs of norm1 and norm2;
# the inputs of qkv and fc1, which are outputs of norms; the three outputs of qkv and that of attention; and the
# inputs of the GELU and of fc2.
NORM_WIDTHS = 2
NORMED_WIDTHS = 2
ATTENTION_WIDTHS = 3 + 1
HIDDEN_WIDTHS = 2 * MLP_RATIO
# Elements of a block's linear weights, in D x D: qkv, proj, fc1 and fc2.
BLOCK_WEIGHTS = 3 + 1 + 2 * MLP_RATIO
# Vectors of length D per token in the forward pass of a block's MLP without gradient, besides the hidden layer: the
# inputs of the first block and of this one, the residual stream, and the norm's output.
FORWARD_WIDTHS = 4
# Copies of the embeddings at once in `rero_importance`: the embeddings, their differences, and one in the norm.
IMPORTANCE_COPIES = 3
# Float32 mean and deviation that a norm keeps of each token.
NORM_STATISTICS = 2 * FLOAT32_BYTES


@dataclass(frozen=True, kw_only=True)
class NumberBytes:
    """Bytes of a number in the parts of a model.

    Attributes:
        residual: In the residual stream, weights and their gradients.
        matmul: In the inputs and outputs of matmuls and attention.
        keeps_casts: Whether linear layers keep autocast's copies of their inputs and weights. DeepSpeed's own
            linear layer at stage 3 keeps the originals.
    """

    residual: int
    matmul: int
    keeps_casts: bool = True

    @classmethod
    def of(cls, sharding: Sharding) -> "NumberBytes":
        """Read the bytes from a resolved DeepSpeed configuration."""
        return cls(residual=sharding.model_bytes, matmul=sharding.matmul_bytes, keeps_casts=sharding.stage < 3)

    @property
    def casts(self) -> bool:
        """Whether autocast is on."""
        return self.residual != self.matmul

    @property
    def normed(self) -> int:
        """In a norm's output, as the next linear layer keeps it."""
        return self.matmul if self.keeps_casts else self.residual

    @property
    def weight_copy(self) -> int:
        """In the copy of its weight that a linear layer keeps; 0 without a copy."""
        return self.matmul if self.casts and self.keeps_casts else 0


@dataclass(frozen=True, kw_only=True)
class ActivationBytes:
    """Memory of a forward and backward pass besides parameters, parameter gradients and the uint8 clips.

    Attributes:
        saved: Bytes kept by autograd at the end of the forward pass.
        peak: The most at once: tensors that are still kept, the recomputed block, and intermediate gradients.
        attention: The part of ``peak`` for q, k, v, output and log-sum-exp of all blocks. With checkpointing: those
            of the larger recomputed block, and the outputs that are kept.
    """

    saved: int
    peak: int
    attention: int


def activation_bytes(config: Config, numbers: NumberBytes) -> ActivationBytes:
    """Return the activation memory of one micro-batch of a run.

    If clips keep different numbers of tokens, the most tokens that a rank can get are counted.
    """
    if isinstance(config, FinetuneConfig):
        return _classifier(config, numbers)
    assert isinstance(config, PretrainConfig)
    return _autoencoder(config, numbers)


def ranking_bytes(config: Config) -> int:
    """Return the peak memory of ranking all tokens of a micro-batch in float32; 0 if nothing is ranked.

    Clips are ranked a few at a time (`TokenEncoder.rank`), candidate frames among them.
    """
    if isinstance(config, FinetuneConfig):
        ranks, grid = keep_rule(config.selection).ranks_to_keep(config.grid), config.grid
    else:
        assert isinstance(config, PretrainConfig)
        ranks, grid = config.selection.measures_change, config.candidate_grid
    if not ranks:
        return 0
    pixels, width = grid.num_tokens * _pixels(config.model), get_size(config.model.size).width
    embeddings = grid.num_tokens * width
    stem = max(_stem_positions(config.model), default=0) * embeddings
    values = max(pixels + max(embeddings, 2 * stem), IMPORTANCE_COPIES * embeddings)
    return min(config.batch.micro_size, max(1, RANKING_CHUNK // pixels)) * values * FLOAT32_BYTES


def _autoencoder(config: PretrainConfig, numbers: NumberBytes) -> ActivationBytes:
    """Source: `TokenEncoder.forward`, `PretrainEncoder.forward`, `Decoder.forward`, `Reconstruction.loss`."""
    size, clips, pixels = get_size(config.model.size), config.batch.micro_size, _pixels(config.model)
    visible, targets = clips * config.most.visible, clips * config.most.targets
    encoder = _Stack(visible, size.width, size.num_heads, size.depth, numbers, config.model)
    decoder = _Stack(
        visible + targets,
        size.decoder_width,
        size.decoder_num_heads,
        config.model.decoder_depth,
        numbers,
        config.model,
    )
    encoded = _embedding(config, visible, numbers) + encoder.saved
    bridge = _norm_and_linear(visible, size.width, size.decoder_width, numbers)
    head = _norm_and_linear(targets, size.decoder_width, pixels, numbers)
    decoded = encoded + bridge + decoder.saved
    predicted = targets * pixels * FLOAT32_BYTES
    saved = decoded + head + 2 * predicted  # prediction and target
    # The mean squared error is computed in a tensor of (R, P). The scalar loss keeps that tensor's storage alive.
    peak = max(saved + predicted, decoded + decoder.backward, encoded + encoder.backward) + predicted
    return ActivationBytes(saved=saved, peak=peak, attention=_attention(encoder, decoder))


def _classifier(config: FinetuneConfig, numbers: NumberBytes) -> ActivationBytes:
    """Source: `TokenEncoder.forward`, `EverestClassifier.pool`, `FinetuneTask.forward`."""
    size, clips, classes = get_size(config.model.size), config.batch.micro_size, num_classes(config)
    tokens = clips * config.num_kept
    encoder = _Stack(tokens, size.width, size.num_heads, size.depth, numbers, config.model)
    # The last term is the log-softmax.
    head = _norm_and_linear(clips, size.width, classes, numbers) + clips * classes * FLOAT32_BYTES
    if config.model.freeze_encoder:  # a forward pass only, which keeps nothing
        pixels = tokens * _pixels(config.model)
        standardising = pixels * (1 + FLOAT32_BYTES)  # from bytes
        peak = max(encoder.forward + pixels * numbers.residual, standardising) + head
        return ActivationBytes(saved=head, peak=peak, attention=encoder.attention)
    # Drop path keeps the factor of each token and branch.
    masks = 2 * size.depth * tokens * numbers.residual if config.model.drop_path > 0 else 0
    saved = _embedding(config, tokens, numbers) + encoder.saved + masks + head
    return ActivationBytes(saved=saved, peak=saved + encoder.backward, attention=_attention(encoder))


@dataclass(frozen=True)
class _Stack:
    """A stack of blocks over M tokens of width D. Sizes are in bytes, except ``values``, the elements of (M, D)."""

    tokens: int
    width: int
    num_heads: int
    depth: int
    numbers: NumberBytes
    model: ModelConfig

    @property
    def checkpointing(self) -> bool:
        return self.model.activation_checkpointing

    @property
    def values(self) -> int:
        return self.tokens * self.width

    @property
    def log_sum_exp(self) -> int:
        return self.tokens * self.num_heads * FLOAT32_BYTES

    @property
    def stream(self) -> int:
        """The residual stream between two blocks."""
        return self.values * self.numbers.residual

    @property
    def attention(self) -> int:
        """Kept by attention in one block."""
        return ATTENTION_WIDTHS * self.values * self.numbers.matmul + self.log_sum_exp

    @property
    def block(self) -> int:
        """Kept by one block without checkpointing."""
        numbers = self.numbers
        value = NORM_WIDTHS * numbers.residual + NORMED_WIDTHS * numbers.normed + HIDDEN_WIDTHS * numbers.matmul
        statistics = NORM_WIDTHS * self.tokens * NORM_STATISTICS
        weights = BLOCK_WEIGHTS * self.width**2 * numbers.weight_copy
        return value * self.values + self.attention + statistics + weights

    @property
    def kept_outputs(self) -> int:
        """Kept by a recomputed block besides its input: attention's output, unless that is recomputed."""
        return 0 if self.model.recompute_attention else self.values * self.numbers.matmul + self.log_sum_exp

    @property
    def saved(self) -> int:
        """Kept by the stack at the end of the forward pass."""
        return self.depth * (self.stream + self.kept_outputs if self.checkpointing else self.block)

    @property
    def forward(self) -> int:
        """Needed by one block when nothing is kept for backward."""
        numbers, copies = self.numbers, 0
        if numbers.casts:  # the input and the weight of fc1
            copies = (self.values + MLP_RATIO * self.width**2) * numbers.matmul
        hidden = MLP_RATIO * self.values * numbers.matmul
        return FORWARD_WIDTHS * self.stream + hidden + max(hidden, copies)

    @property
    def backward(self) -> int:
        """Added by backward through one block: the block itself, if it is recomputed, and gradients.

        The peak is in fc2: the gradients of the block's output, its branch, the hidden layer and the weight are
        alive. Under autocast the weight's gradient is cast next, after fc2 has freed its input and its weight.
        """
        numbers, weight = self.numbers, MLP_RATIO * self.width**2
        again = self.block - self.stream - self.kept_outputs if self.checkpointing else 0
        gradients = self.values * (numbers.residual + (1 + MLP_RATIO) * numbers.matmul)
        if numbers.casts and not numbers.keeps_casts:  # fc2 frees nothing before the cast
            return again + gradients + weight * (numbers.matmul + numbers.residual)
        return again + max(gradients + weight * numbers.matmul, self.stream + weight * numbers.residual)


def _attention(*stacks: _Stack) -> int:
    """Return attention's part of the peak; the kept outputs of a recomputed block are counted once."""
    if not any(stack.checkpointing for stack in stacks):
        return sum(stack.depth * stack.attention for stack in stacks)
    kept = sum(stack.depth * stack.kept_outputs for stack in stacks)
    return kept + max(stack.attention - stack.kept_outputs for stack in stacks)


def _norm_and_linear(tokens: int, width: int, out: int, numbers: NumberBytes) -> int:
    """Return the bytes kept by a norm and its linear layer: both inputs, the statistics and a weight copy."""
    return (
        tokens * (width * (numbers.residual + numbers.normed) + NORM_STATISTICS) + width * out * numbers.weight_copy
    )


def _embedding(config: Config, tokens: int, numbers: NumberBytes) -> int:
    """Return the bytes kept by the tubelet embedding: pixels, and each stem layer's output twice (GELU).

    Under autocast, `BlockConv3d` also keeps a copy of the weights of each layer whose input has a gradient.
    """
    stem, width = _stem_positions(config.model), get_size(config.model.size).width
    pixels = _pixels(config.model) * (numbers.matmul if stem else numbers.normed)
    weights = sum(width**2 * before // after for before, after in pairwise([*stem, 1]))
    copies = weights * numbers.matmul if numbers.casts else 0
    return tokens * (pixels + 2 * sum(stem) * width * numbers.matmul) + copies


def _pixels(model: ModelConfig) -> int:
    """Return the number of pixel values of a tubelet."""
    return 3 * model.tubelet_size * model.patch_size**2


def _stem_positions(model: ModelConfig) -> list[int]:
    """Return the positions of a tubelet in the output of each Conv3d before the last one."""
    positions, edge = [], model.patch_size
    for kernel in TubeletEmbedding.STEM_EDGES[model.embedding_layers]:
        edge //= kernel
        positions.append(edge**2)
    return positions
