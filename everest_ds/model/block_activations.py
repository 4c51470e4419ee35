"""Bytes that a stack of transformer blocks holds, counted by arithmetic: what `model.activations` is made of.

M tokens of the micro-batch, D width.

Under autocast the row of tokens that blocks add to is float32 and products are bfloat16; a linear layer then keeps
its input and its weight as it computed with them: copies in bfloat16, which are counted here. The linear layers of
ZeRO-3 keep what they were given instead, and cast again in backward.
"""

from dataclasses import dataclass

from everest_ds.model.transformer import MLP_RATIO

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
