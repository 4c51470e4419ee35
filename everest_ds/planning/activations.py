"""Bytes that one micro-batch holds while it goes through a model, counted by arithmetic.

What autograd keeps of each layer for backward is written down here as a table; tests compare it with what torch's
saved-tensor hooks see, and the peak with all storages alive during a forward and backward pass. M tokens of the
micro-batch, D width, P pixel values of a tubelet, R target tokens; everything is in bytes.

The packed kernels (varlen, flash) and SDPA's fused kernels keep the same five tensors: q, k, v, the output and the
log-sum-exp of each row and head; no matrix of tokens x tokens. Measured with SDPA on the CPU only. What kernels
allocate inside (cuDNN and cuBLAS workspaces, split-K buffers) is not counted.
"""

from dataclasses import dataclass
from itertools import pairwise

from everest_ds.model.encoder import RANKING_CHUNK, EncoderOptions
from everest_ds.model.sizes import ModelSize
from everest_ds.model.transformer import MLP_RATIO
from everest_ds.model.tubelets import TubeletEmbedding
from everest_ds.tokens import TokenGrid

FLOAT32_BYTES = 4
# Widths of D that a block keeps of each token (model/transformer.py, Block): the inputs of norm1 and norm2; those
# of qkv and fc1, which norms made; qkv's three outputs and attention's, for proj; those of the GELU and of fc2.
NORM_WIDTHS = 2
NORMED_WIDTHS = 2
ATTENTION_WIDTHS = 3 + 1
HIDDEN_WIDTHS = 2 * MLP_RATIO
# Elements of a block's linear weights, in D x D: qkv, proj, fc1 and fc2.
BLOCK_WEIGHTS = 3 + 1 + 2 * MLP_RATIO
# Widths of D while a block's MLP goes forward and nothing is kept, hidden layer apart: the first block's input and
# this one's, the residual and the norm's output.
FORWARD_WIDTHS = 4


@dataclass(frozen=True, kw_only=True)
class NumberBytes:
    """Bytes of a number in the parts of a model.

    Attributes:
        row: In the row of tokens that blocks add to, and in weights and their gradients.
        product: In what matrix products and attention take and give.
        keeps_casts: Whether linear layers keep what they compute with, or at ZeRO-3 what they were given.
    """

    row: int
    product: int
    keeps_casts: bool = True

    @property
    def casts(self) -> bool:
        """Whether rows and weights are cast for products (autocast)."""
        return self.row != self.product

    @property
    def normed(self) -> int:
        """Of a norm's output, as the linear layer after it keeps it."""
        return self.product if self.keeps_casts else self.row

    @property
    def weight_copy(self) -> int:
        """Of a linear layer's weight, as it keeps it beside the weight itself."""
        return self.product if self.casts and self.keeps_casts else 0


@dataclass(frozen=True, kw_only=True)
class StackBytes:
    """A stack of blocks over M tokens.

    Attributes:
        tokens: M, of the whole micro-batch.
        width: D.
        num_heads: Heads that share them.
        depth: Blocks.
        numbers: Bytes of a number.
        checkpointing: Whether each block is computed again in backward.
        keeps_attention: Whether attention's output is kept then.
    """

    tokens: int
    width: int
    num_heads: int
    depth: int
    numbers: NumberBytes
    checkpointing: bool
    keeps_attention: bool

    @property
    def values(self) -> int:
        """Elements of one tensor of (M, D)."""
        return self.tokens * self.width

    @property
    def rows(self) -> int:
        """One tensor of (M, D) that blocks add to."""
        return self.values * self.numbers.row

    @property
    def log_sum_exp(self) -> int:
        """What attention keeps of its scores: one float32 for each row and head."""
        return self.tokens * self.num_heads * FLOAT32_BYTES

    @property
    def block(self) -> int:
        """What one block keeps; each norm also keeps a float32 mean and deviation of each token."""
        numbers = self.numbers
        value = NORM_WIDTHS * numbers.row + NORMED_WIDTHS * numbers.normed
        value += (ATTENTION_WIDTHS + HIDDEN_WIDTHS) * numbers.product
        moments = NORM_WIDTHS * 2 * self.tokens * FLOAT32_BYTES
        weights = BLOCK_WEIGHTS * self.width**2 * numbers.weight_copy
        return value * self.values + moments + self.log_sum_exp + weights

    @property
    def saved(self) -> int:
        """What the stack keeps at the end of the forward pass."""
        return self.depth * (self.rows + self.kept_outputs if self.checkpointing else self.block)

    @property
    def kept_outputs(self) -> int:
        """What a block that is computed again keeps besides its input: what attention made of it, on request."""
        return self.values * self.numbers.product + self.log_sum_exp if self.keeps_attention else 0

    @property
    def attention(self) -> int:
        """What attention keeps of itself in one block."""
        return ATTENTION_WIDTHS * self.values * self.numbers.product + self.log_sum_exp

    @property
    def forward(self) -> int:
        """What going forward through one block needs where nothing is kept."""
        numbers, copies = self.numbers, 0
        if numbers.casts:  # the input and the weight of fc1
            copies = self.values * numbers.product + MLP_RATIO * self.width**2 * numbers.product
        hidden = MLP_RATIO * self.values * numbers.product
        return FORWARD_WIDTHS * self.rows + hidden + max(hidden, copies)

    @property
    def backward(self) -> int:
        """What going backward through one block adds: the block, if it is computed again, and gradients.

        Most is there in fc2: the gradients of the block's output, of its branch and of the hidden layer, and of the
        weight. Under autocast the weight's gradient is cast next, when fc2 has let go of its input and its weight.
        """
        again = self.block - self.rows - self.kept_outputs if self.checkpointing else 0
        row, product, weight = self.numbers.row, self.numbers.product, MLP_RATIO * self.width**2
        gradients = self.values * (row + (1 + MLP_RATIO) * product)
        if self.numbers.casts and not self.numbers.keeps_casts:  # and there lets go of nothing before
            return again + gradients + weight * (product + row)
        return again + max(gradients + weight * product, self.rows + weight * row)


# Copies of the embeddings at once in `rero_importance`: themselves, the differences, and one of the norm.
IMPORTANCE_COPIES = 3


@dataclass(frozen=True, kw_only=True)
class TokenCounts:
    """What goes through the model at once.

    Attributes:
        clips: Clips of the micro-batch.
        visible: Tokens of a clip that the encoder sees.
        targets: Tokens of a clip that the decoder predicts.
    """

    clips: int
    visible: int
    targets: int


@dataclass(frozen=True, kw_only=True)
class ActivationBytes:
    """What a forward and backward pass needs besides parameters, gradients and the uint8 clips.

    Attributes:
        saved: Kept by autograd at the end of the forward pass.
        peak: The most at once: what is still kept, the block that is being computed again, and the gradients on the
            way.
        attention: The part of ``peak`` that is attention's own: q, k, v, output and log-sum-exp, of all blocks, or
            with checkpointing of the larger one that is computed again, and then the outputs that are kept.
    """

    saved: int
    peak: int
    attention: int


def activation_bytes(
    size: ModelSize, options: EncoderOptions, counts: TokenCounts, *, decoder_depth: int, numbers: NumberBytes
) -> ActivationBytes:
    """Return what one micro-batch keeps and needs at most, with or without checkpointing as the options say.

    Args:
        size: Widths, depth and heads.
        options: Tubelets, checkpointing, and whether attention is computed again.
        counts: Clips and tokens of the micro-batch.
        decoder_depth: Blocks of the decoder.
        numbers: Bytes of a number.

    Source lines: `TokenEncoder.forward`, `PretrainEncoder.forward`, `Decoder.forward`, `Reconstruction.loss`.
    """
    visible, targets = counts.clips * counts.visible, counts.clips * counts.targets
    pixels = _pixels(options)
    encoder = _encoder(size, options, visible, numbers)
    decoder = StackBytes(
        tokens=visible + targets,
        width=size.decoder_width,
        num_heads=size.decoder_num_heads,
        depth=decoder_depth,
        numbers=numbers,
        checkpointing=options.activation_checkpointing,
        keeps_attention=not options.recompute_attention,
    )
    embedding = _embedding_bytes(options, size.width, visible, numbers)
    # The inputs of the norm, and of the linear layer after it; the same before the head.
    between = encoder.values * (numbers.row + numbers.normed) + 2 * visible * FLOAT32_BYTES
    bridge = between + size.width * size.decoder_width * numbers.weight_copy
    head = targets * (size.decoder_width * (numbers.row + numbers.normed) + 2 * FLOAT32_BYTES)
    head += size.decoder_width * pixels * numbers.weight_copy
    predicted = targets * pixels * FLOAT32_BYTES  # one float32 tensor of (R, P)
    encoded = embedding + encoder.saved
    decoded = encoded + bridge + decoder.saved
    saved = decoded + head + 2 * predicted  # prediction and target
    # The mean squared error is computed into a tensor of (R, P) whose storage the loss, a scalar, keeps.
    loss = predicted
    moments = (saved + loss + predicted, decoded + loss + decoder.backward, encoded + loss + encoder.backward)
    return ActivationBytes(saved=saved, peak=max(moments), attention=_attention_bytes(encoder, decoder))


def classifier_activation_bytes(
    size: ModelSize,
    options: EncoderOptions,
    *,
    clips: int,
    kept: int,
    num_classes: int,
    drop_path: bool,
    frozen: bool,
    numbers: NumberBytes,
) -> ActivationBytes:
    """Return what one micro-batch of the classifier keeps and needs at most.

    Args:
        size: Width, depth and heads.
        options: Tubelets, checkpointing, and whether attention is computed again.
        clips: Clips of the micro-batch.
        kept: Tokens of a clip that the encoder sees.
        num_classes: Outputs of the head.
        drop_path: Whether branches are scaled by clip: a factor of each token and branch is kept.
        frozen: Whether the encoder goes forward only, and keeps nothing.
        numbers: Bytes of a number.

    Source lines: `TokenEncoder.forward`, `EverestClassifier.pool`, `FinetuneTask.forward`.
    """
    tokens = clips * kept
    encoder = _encoder(size, options, tokens, numbers)
    # Inputs of the norm and the head, mean and deviation, and the logarithm of the softmax.
    head = clips * (size.width * (numbers.row + numbers.normed) + (2 + num_classes) * FLOAT32_BYTES)
    head += size.width * num_classes * numbers.weight_copy
    if frozen:
        pixels = tokens * _pixels(options)  # as bytes, standardised, and then as the embedding's input
        standardising = pixels + pixels * FLOAT32_BYTES
        peak = max(encoder.forward + pixels * numbers.row, standardising) + head
        return ActivationBytes(saved=head, peak=peak, attention=encoder.attention)
    masks = 2 * size.depth * tokens * numbers.row if drop_path else 0
    saved = _embedding_bytes(options, size.width, tokens, numbers) + encoder.saved + masks + head
    return ActivationBytes(saved=saved, peak=saved + encoder.backward, attention=_attention_bytes(encoder))


def ranking_bytes(grid: TokenGrid, options: EncoderOptions, *, width: int, clips: int) -> int:
    """Return what ranking all tokens in float32 needs at most, a few clips at a time (`TokenEncoder.rank`)."""
    clip_values = 3 * grid.num_tokens * options.tubelet_size * options.patch_size**2
    clips_at_once = min(clips, max(1, RANKING_CHUNK // clip_values))
    embeddings = grid.num_tokens * width
    stem = max((values * width for values in _stem_positions(options)), default=0) * grid.num_tokens
    values = max(clip_values + max(embeddings, 2 * stem), IMPORTANCE_COPIES * embeddings)
    return clips_at_once * values * FLOAT32_BYTES


def _encoder(size: ModelSize, options: EncoderOptions, tokens: int, numbers: NumberBytes) -> StackBytes:
    return StackBytes(
        tokens=tokens,
        width=size.width,
        num_heads=size.num_heads,
        depth=size.depth,
        numbers=numbers,
        checkpointing=options.activation_checkpointing,
        keeps_attention=not options.recompute_attention,
    )


def _attention_bytes(*stacks: StackBytes) -> int:
    """Return attention's part of the peak; what one block keeps is not counted twice where it is computed again."""
    if not any(stack.checkpointing for stack in stacks):
        return sum(stack.depth * stack.attention for stack in stacks)
    kept = sum(stack.depth * stack.kept_outputs for stack in stacks)
    return kept + max(stack.attention - stack.kept_outputs for stack in stacks)


def _pixels(options: EncoderOptions) -> int:
    """Return the values of one tubelet's pixels."""
    return 3 * options.tubelet_size * options.patch_size**2


def _embedding_bytes(options: EncoderOptions, width: int, tokens: int, numbers: NumberBytes) -> int:
    """Return what embedding tubelets keeps: their pixels, and each stem layer's output twice (GELU).

    Under autocast also a copy of the weights of each layer whose input has a gradient.
    """
    stem = _stem_positions(options)
    pixels = _pixels(options) * (numbers.product if stem else numbers.normed)
    values = sum(2 * positions * width for positions in stem)
    positions = [*stem, 1]
    weights = sum(width**2 * before // after for before, after in pairwise(positions))
    copies = weights * numbers.product if numbers.casts else 0  # which `BlockConv3d` makes itself
    return tokens * (pixels + values * numbers.product) + copies


def _stem_positions(options: EncoderOptions) -> list[int]:
    """Return, for each Conv3d before the last one, how many places of a tubelet its output has."""
    positions, edge = [], options.patch_size
    for kernel in TubeletEmbedding.STEM_EDGES[options.embedding_layers]:
        edge //= kernel
        positions.append(edge**2)
    return positions
