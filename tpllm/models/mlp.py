"""The MLP block that most families share. N tokens, E hidden_size, I this rank's share of it."""

from torch import Tensor, nn

from tpllm.architectures.spec import MLPSpec
from tpllm.layers.activation import silu_and_mul
from tpllm.layers.all_reduce.all_reduce_norm import AllReduceRMSNorm
from tpllm.layers.context import LayerContext
from tpllm.layers.linear.linear import Linear
from tpllm.models.micro_batch import BlockContext


class SwiGLU(nn.Module):
    """Norm, then `down(silu(gate(x)) * up(x))`."""

    def __init__(self, spec: MLPSpec, context: LayerContext) -> None:
        super().__init__()
        self.norm = AllReduceRMSNorm(spec.norm, context)
        self.gate_up_proj = Linear(spec.gate_up, context)
        self.down_proj = Linear(spec.down, context)

    def forward(
        self, x: Tensor, residual: Tensor | None, context: BlockContext
    ) -> tuple[Tensor, Tensor | None]:
        x, residual = self.gate_up_proj(
            x,
            norm=self.norm,
            residual=residual,
            activation=silu_and_mul,
            copy_stream=context.batch.copy_stream,
        )  # [N, I]
        return self.down_proj(x, residual=residual)  # [N, E]
