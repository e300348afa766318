"""Operators: a reference in torch, and kernels in C++, CUDA and Triton that agree with it."""

from alignkit.ops.advantages import (
    dual_gae,
    dual_gae_reference,
    gae,
    gae_reference,
    supported_gae,
    supported_gae_reference,
)
from alignkit.ops.comparison import grouped_comparison, grouped_comparison_reference
from alignkit.ops.dispatch import Backend, backends
from alignkit.ops.fusion import attention_fusion, attention_fusion_reference
from alignkit.ops.grouped import grouped_advantage, grouped_advantage_reference
from alignkit.ops.logprobs import (
    TokenLogps,
    linear_token_logps,
    linear_token_logps_reference,
    token_logps,
    token_logps_reference,
)
from alignkit.ops.policy_loss import (
    LossFigures,
    clipped_policy_loss,
    clipped_policy_loss_reference,
)
from alignkit.ops.sampling import sample_tokens, sample_tokens_reference

__all__ = [
    "Backend",
    "LossFigures",
    "TokenLogps",
    "attention_fusion",
    "attention_fusion_reference",
    "backends",
    "clipped_policy_loss",
    "clipped_policy_loss_reference",
    "dual_gae",
    "dual_gae_reference",
    "gae",
    "gae_reference",
    "grouped_advantage",
    "grouped_advantage_reference",
    "grouped_comparison",
    "grouped_comparison_reference",
    "linear_token_logps",
    "linear_token_logps_reference",
    "sample_tokens",
    "sample_tokens_reference",
    "supported_gae",
    "supported_gae_reference",
    "token_logps",
    "token_logps_reference",
]
