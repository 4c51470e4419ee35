"""Bytes that one micro-batch needs while it goes through a model, by arithmetic.

Counts what autograd keeps of each layer for backward, and what else is alive at the peak; tests compare both with
the model itself. M tokens of the micro-batch, D width, R target tokens, P pixel values of a tubelet.

The packed kernels (varlen, flash) and SDPA's fused kernels keep the same five tensors: q, k, v, the output and the
log-sum-exp of each token and head; no matrix of tokens x tokens. Workspaces that kernels allocate inside (cuDNN,
cuBLAS, split-K buffers) are not counted.
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

# Widths of D that a block keeps of each token (model/transformer.py, Block): the inputs of norm1 and norm2; those
# of qkv and fc1, which norms made; qkv's three outputs and attention's, for proj; those of the GELU and of fc2.
NORM_WIDTHS = 2
NORMED_WIDTHS = 2
ATTENTION_WIDTHS = 3 + 1
HIDDEN_WIDTHS = 2 * MLP_RATIO
# Elements of a block's linear weights, in D x D: qkv, proj, fc1 and fc2.
BLOCK_WEIGHTS = 3 + 1 + 2 * MLP_RATIO
# Widths of D while a block's MLP goes forward without gradient, besides the hidden layer: the input of the first
# block and of this one, the residual stream and the norm's output.
FORWARD_WIDTHS = 4
# Copies of the embeddings at once in `rero_importance`: themselves, the differences, and one of the norm.
IMPORTANCE_COPIES = 3
# Float32 mean and deviation that a norm keeps of each token.
NORM_STATISTICS = 2 * FLOAT32_BYTES


@dataclass(frozen=True, kw_only=True)
class NumberBytes:
    """Bytes of a number in the parts of a model.

    Attributes:
        residual: In the residual stream, weights and their gradients.
        matmul: In what matmuls and attention take and give.
        keeps_casts: Whether linear layers keep their inputs and weights as cast by autocast. DeepSpeed's own linear
            layer at stage 3 keeps them as given.
    """

    residual: int
    matmul: int
    keeps_casts: bool = True

    @classmethod
    def of(cls, sharding: Sharding) -> "NumberBytes":
        """Return those of a resolved DeepSpeed configuration."""
        return cls(residual=sharding.model_bytes, matmul=sharding.matmul_bytes, keeps_casts=sharding.stage < 3)

    @property
    def casts(self) -> bool:
        """Whether autocast is on."""
        return self.residual != self.matmul

    @property
    def normed(self) -> int:
        """Of a norm's output, as the linear layer after it keeps it."""
        return self.matmul if self.keeps_casts else self.residual

    @property
    def weight_copy(self) -> int:
        """Of a linear layer's weight, as it keeps it beside the weight itself."""
        return self.matmul if self.casts and self.keeps_casts else 0


@dataclass(frozen=True, kw_only=True)
class ActivationBytes:
    """What a forward and backward pass needs besides parameters, gradients and the uint8 clips.

    Attributes:
        saved: Kept by autograd at the end of the forward pass.
        peak: The most at once: what is still kept, the block that is recomputed, and gradients on the way.
        attention: The part of ``peak`` that is attention's own: q, k, v, output and log-sum-exp of all blocks; with
            checkpointing those of the larger block that is recomputed, and the outputs that are kept.
    """

    saved: int
    peak: int
    attention: int


def activation_bytes(config: Config, numbers: NumberBytes) -> ActivationBytes:
    """Return what one micro-batch of a run keeps and needs at most.

    Where clips keep different numbers of tokens, each counts with the most that a rank may get.
    """
    if isinstance(config, FinetuneConfig):
        return _classifier(config, numbers)
    assert isinstance(config, PretrainConfig)
    return _autoencoder(config, numbers)


def ranking_bytes(config: Config) -> int:
    """Return what ranking all tokens of a micro-batch in float32 needs at most; 0 where nothing is ranked.

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
    # The mean squared error is computed into a tensor of (R, P) whose storage the loss, a scalar, keeps.
    peak = max(saved + predicted, decoded + decoder.backward, encoded + encoder.backward) + predicted
    return ActivationBytes(saved=saved, peak=peak, attention=_attention(encoder, decoder))


def _classifier(config: FinetuneConfig, numbers: NumberBytes) -> ActivationBytes:
    """Source: `TokenEncoder.forward`, `EverestClassifier.pool`, `FinetuneTask.forward`."""
    size, clips, classes = get_size(config.model.size), config.batch.micro_size, num_classes(config)
    tokens = clips * config.num_kept
    encoder = _Stack(tokens, size.width, size.num_heads, size.depth, numbers, config.model)
    # The last summand is the logarithm of the softmax.
    head = _norm_and_linear(clips, size.width, classes, numbers) + clips * classes * FLOAT32_BYTES
    if config.model.freeze_encoder:  # which goes forward only, and keeps nothing
        pixels = tokens * _pixels(config.model)
        standardising = pixels * (1 + FLOAT32_BYTES)  # from bytes
        peak = max(encoder.forward + pixels * numbers.residual, standardising) + head
        return ActivationBytes(saved=head, peak=peak, attention=encoder.attention)
    # With drop path the factor of each token and branch is kept.
    masks = 2 * size.depth * tokens * numbers.residual if config.model.drop_path > 0 else 0
    saved = _embedding(config, tokens, numbers) + encoder.saved + masks + head
    return ActivationBytes(saved=saved, peak=saved + encoder.backward, attention=_attention(encoder))


@dataclass(frozen=True)
class _Stack:
    """A stack of blocks over M tokens of width D; everything in bytes but ``values``, the elements of (M, D)."""

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
        """What attention keeps in one block."""
        return ATTENTION_WIDTHS * self.values * self.numbers.matmul + self.log_sum_exp

    @property
    def block(self) -> int:
        """What one block keeps without checkpointing."""
        numbers = self.numbers
        value = NORM_WIDTHS * numbers.residual + NORMED_WIDTHS * numbers.normed + HIDDEN_WIDTHS * numbers.matmul
        statistics = NORM_WIDTHS * self.tokens * NORM_STATISTICS
        weights = BLOCK_WEIGHTS * self.width**2 * numbers.weight_copy
        return value * self.values + self.attention + statistics + weights

    @property
    def kept_outputs(self) -> int:
        """What a recomputed block keeps besides its input: attention's output, where that is not recomputed."""
        return 0 if self.model.recompute_attention else self.values * self.numbers.matmul + self.log_sum_exp

    @property
    def saved(self) -> int:
        """What the stack keeps at the end of the forward pass."""
        return self.depth * (self.stream + self.kept_outputs if self.checkpointing else self.block)

    @property
    def forward(self) -> int:
        """What one block needs where nothing is kept."""
        numbers, copies = self.numbers, 0
        if numbers.casts:  # the input and the weight of fc1
            copies = (self.values + MLP_RATIO * self.width**2) * numbers.matmul
        hidden = MLP_RATIO * self.values * numbers.matmul
        return FORWARD_WIDTHS * self.stream + hidden + max(hidden, copies)

    @property
    def backward(self) -> int:
        """What going backward through one block adds: the block, if it is recomputed, and gradients.

        Most is alive in fc2: the gradients of the block's output, of its branch, of the hidden layer and of the
        weight. Under autocast the weight's gradient is cast next, when fc2 has freed its input and its weight.
        """
        numbers, weight = self.numbers, MLP_RATIO * self.width**2
        again = self.block - self.stream - self.kept_outputs if self.checkpointing else 0
        gradients = self.values * (numbers.residual + (1 + MLP_RATIO) * numbers.matmul)
        if numbers.casts and not numbers.keeps_casts:  # which frees nothing before
            return again + gradients + weight * (numbers.matmul + numbers.residual)
        return again + max(gradients + weight * numbers.matmul, self.stream + weight * numbers.residual)


def _attention(*stacks: _Stack) -> int:
    """Return attention's part of the peak; the outputs that a recomputed block keeps are counted once."""
    if not any(stack.checkpointing for stack in stacks):
        return sum(stack.depth * stack.attention for stack in stacks)
    kept = sum(stack.depth * stack.kept_outputs for stack in stacks)
    return kept + max(stack.attention - stack.kept_outputs for stack in stacks)


def _norm_and_linear(tokens: int, width: int, out: int, numbers: NumberBytes) -> int:
    """Return what a norm and the linear layer after it keep: both inputs, the statistics and a weight copy."""
    return (
        tokens * (width * (numbers.residual + numbers.normed) + NORM_STATISTICS) + width * out * numbers.weight_copy
    )


def _embedding(config: Config, tokens: int, numbers: NumberBytes) -> int:
    """Return what embedding tubelets keeps: their pixels, and each stem layer's output twice (GELU).

    Under autocast also a copy of the weights of each layer whose input has a gradient, which `BlockConv3d` makes.
    """
    stem, width = _stem_positions(config.model), get_size(config.model.size).width
    pixels = _pixels(config.model) * (numbers.matmul if stem else numbers.normed)
    weights = sum(width**2 * before // after for before, after in pairwise([*stem, 1]))
    copies = weights * numbers.matmul if numbers.casts else 0
    return tokens * (pixels + 2 * sum(stem) * width * numbers.matmul) + copies


def _pixels(model: ModelConfig) -> int:
    """Return the values of one tubelet's pixels."""
    return 3 * model.tubelet_size * model.patch_size**2


def _stem_positions(model: ModelConfig) -> list[int]:
    """Return the positions of a tubelet in the output of each Conv3d before the last one."""
    positions, edge = [], model.patch_size
    for kernel in TubeletEmbedding.STEM_EDGES[model.embedding_layers]:
        edge //= kernel
        positions.append(edge**2)
    return positions
