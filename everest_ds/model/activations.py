"""Bytes that one micro-batch holds while it goes through a model, counted by arithmetic.

What autograd keeps of each layer for backward is written down here as a table; tests compare it with what torch's
saved-tensor hooks see, and the peak with all storages alive during a forward and backward pass. M tokens of the
micro-batch, D width, P pixel values of a tubelet, R target tokens; everything is in bytes.

The packed kernels (varlen, flash) and SDPA's fused kernels keep the same five tensors: q, k, v, the output and the
log-sum-exp of each row and head; no matrix of tokens x tokens. Measured with SDPA on the CPU only. What kernels
allocate inside (cuDNN and cuBLAS workspaces, split-K buffers) is not counted.
"""

from dataclasses import dataclass

from everest_ds.geometry import TokenGrid
from everest_ds.model.encoder import RANKING_CHUNK, EncoderOptions
from everest_ds.model.sizes import ModelSize
from everest_ds.model.transformer import MLP_RATIO
from everest_ds.model.tubelets import TubeletEmbedding

FLOAT32_BYTES = 4
# Widths of D that a block keeps of each token (model/transformer.py, Block): the inputs of norm1, of qkv (its
# output's three), of proj (attention's output), of norm2, of fc1, of the GELU and of fc2.
ATTENTION_WIDTHS = 3 + 1
BLOCK_WIDTHS = 1 + 1 + ATTENTION_WIDTHS + 1 + 1 + 2 * MLP_RATIO
# Widths of D beyond what is kept while a block's MLP goes backward: the gradients of its output, of the residual
# and of the hidden layer.
BACKWARD_WIDTHS = 2 + MLP_RATIO
# Widths of D while a block's MLP goes forward and nothing is kept: the first block's input and this one's, the
# residual, the norm's output, and the hidden layer before and after the GELU.
FORWARD_WIDTHS = 4 + 2 * MLP_RATIO
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


@dataclass(frozen=True, kw_only=True)
class _Stack:
    """A stack of blocks over M tokens."""

    tokens: int
    width: int
    num_heads: int
    depth: int
    dtype_bytes: int
    checkpointing: bool
    keeps_attention: bool

    @property
    def rows(self) -> int:
        """One tensor of (M, D)."""
        return self.tokens * self.width * self.dtype_bytes

    @property
    def log_sum_exp(self) -> int:
        """What attention keeps of its scores: one float32 for each row and head."""
        return self.tokens * self.num_heads * FLOAT32_BYTES

    @property
    def block(self) -> int:
        """What one block keeps; each norm also keeps a float32 mean and deviation of each token."""
        return BLOCK_WIDTHS * self.rows + 2 * 2 * self.tokens * FLOAT32_BYTES + self.log_sum_exp

    @property
    def saved(self) -> int:
        """What the stack keeps at the end of the forward pass."""
        return self.depth * (self.rows + self.kept_outputs if self.checkpointing else self.block)

    @property
    def kept_outputs(self) -> int:
        """What a block that is computed again keeps besides its input: what attention made of it, on request."""
        return self.rows + self.log_sum_exp if self.keeps_attention else 0

    @property
    def attention(self) -> int:
        """What attention keeps of itself in one block."""
        return ATTENTION_WIDTHS * self.rows + self.log_sum_exp

    @property
    def backward(self) -> int:
        """What going backward through one block adds: the block, if it is computed again, and gradients."""
        again = self.block - self.rows - self.kept_outputs if self.checkpointing else 0
        weight = MLP_RATIO * self.width**2 * self.dtype_bytes  # the gradient of fc1 or fc2
        return again + BACKWARD_WIDTHS * self.rows + weight


def activation_bytes(
    size: ModelSize, options: EncoderOptions, counts: TokenCounts, *, decoder_depth: int, dtype_bytes: int
) -> ActivationBytes:
    """Return what one micro-batch keeps and needs at most, with or without checkpointing as the options say.

    Args:
        size: Widths, depth and heads.
        options: Tubelets, checkpointing, and whether attention is computed again.
        counts: Clips and tokens of the micro-batch.
        decoder_depth: Blocks of the decoder.
        dtype_bytes: Bytes of a number in the model's precision, 2 or 4.

    Source lines: `TokenEncoder.forward`, `PretrainEncoder.forward`, `Decoder.forward`, `Reconstruction.loss`.
    """
    visible, targets = counts.clips * counts.visible, counts.clips * counts.targets
    pixels = _pixels(options)
    encoder = _encoder(size, options, visible, dtype_bytes)
    decoder = _Stack(
        tokens=visible + targets,
        width=size.decoder_width,
        num_heads=size.decoder_num_heads,
        depth=decoder_depth,
        dtype_bytes=dtype_bytes,
        checkpointing=options.activation_checkpointing,
        keeps_attention=not options.recompute_attention,
    )
    embedding = visible * _embedding_values(options, size.width) * dtype_bytes
    # The norm's input and output; the output is what encoder_to_decoder keeps.
    bridge = 2 * encoder.rows + 2 * visible * FLOAT32_BYTES
    head = 2 * targets * size.decoder_width * dtype_bytes + 2 * targets * FLOAT32_BYTES
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
    dtype_bytes: int,
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
        dtype_bytes: Bytes of a number in the model's precision, 2 or 4.

    Source lines: `TokenEncoder.forward`, `EverestClassifier.pool`, `FinetuneTask.forward`.
    """
    tokens = clips * kept
    encoder = _encoder(size, options, tokens, dtype_bytes)
    # Inputs of the norm and the head, mean and deviation, and the logarithm of the softmax.
    head = clips * (2 * size.width * dtype_bytes + (2 + num_classes) * FLOAT32_BYTES)
    if frozen:
        pixels = tokens * _pixels(options)  # as bytes, standardised, and then as the embedding's input
        standardising = pixels + pixels * FLOAT32_BYTES
        peak = max(FORWARD_WIDTHS * encoder.rows + pixels * dtype_bytes, standardising) + head
        return ActivationBytes(saved=head, peak=peak, attention=encoder.attention)
    masks = 2 * size.depth * tokens * dtype_bytes if drop_path else 0
    embedding = tokens * _embedding_values(options, size.width) * dtype_bytes
    saved = embedding + encoder.saved + masks + head
    return ActivationBytes(saved=saved, peak=saved + encoder.backward, attention=_attention_bytes(encoder))


def ranking_bytes(grid: TokenGrid, options: EncoderOptions, *, width: int, clips: int) -> int:
    """Return what ranking all tokens in float32 needs at most, a few clips at a time (`TokenEncoder.rank`)."""
    clip_values = 3 * grid.num_tokens * options.tubelet_size * options.patch_size**2
    clips_at_once = min(clips, max(1, RANKING_CHUNK // clip_values))
    embeddings = grid.num_tokens * width
    stem = max((values * width for values in _stem_positions(options)), default=0) * grid.num_tokens
    values = max(clip_values + max(embeddings, 2 * stem), IMPORTANCE_COPIES * embeddings)
    return clips_at_once * values * FLOAT32_BYTES


def _encoder(size: ModelSize, options: EncoderOptions, tokens: int, dtype_bytes: int) -> _Stack:
    return _Stack(
        tokens=tokens,
        width=size.width,
        num_heads=size.num_heads,
        depth=size.depth,
        dtype_bytes=dtype_bytes,
        checkpointing=options.activation_checkpointing,
        keeps_attention=not options.recompute_attention,
    )


def _attention_bytes(*stacks: _Stack) -> int:
    """Return attention's part of the peak; what one block keeps is not counted twice where it is computed again."""
    if not any(stack.checkpointing for stack in stacks):
        return sum(stack.depth * stack.attention for stack in stacks)
    kept = sum(stack.depth * stack.kept_outputs for stack in stacks)
    return kept + max(stack.attention - stack.kept_outputs for stack in stacks)


def _pixels(options: EncoderOptions) -> int:
    """Return the values of one tubelet's pixels."""
    return 3 * options.tubelet_size * options.patch_size**2


def _embedding_values(options: EncoderOptions, width: int) -> int:
    """Return the values that embedding one tubelet keeps: its pixels, and each stem layer's output twice (GELU)."""
    return _pixels(options) + sum(2 * positions * width for positions in _stem_positions(options))


def _stem_positions(options: EncoderOptions) -> list[int]:
    """Return, for each Conv3d before the last one, how many places of a tubelet its output has."""
    positions, edge = [], options.patch_size
    for kernel in TubeletEmbedding.STEM_EDGES[options.embedding_layers]:
        edge //= kernel
        positions.append(edge**2)
    return positions
