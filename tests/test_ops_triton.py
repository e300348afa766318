"""Triton kernels compile for real GPUs, which the interpreter cannot show. No GPU is needed."""

import os
import subprocess
import sys

import pytest
from ops_cases import require

# In a process of its own: under the interpreter there is nothing to compile.
COMPILE = """
import itertools, sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from alignkit._triton import (advantages, comparison, fusion, grouped, logprobs,
                              policy_loss, sampling)

F32, BF16, I8, I64, INT = "*fp32", "*bf16", "*u8", "*i64", "i32"
FLAGS = ("HAS_END", "HAS_CUT", "HAS_BOOTSTRAP", "HAS_MASK", "HAS_FLOOR")
GAE = dict(rewards=F32, values=F32, terminated=I8, truncated=I8, bootstrap=F32, mask=I8,
           supported=I8, floored=I8, advantages=F32, targets=F32, T=INT, v_min="fp32",
           gamma="fp32", decay="fp32")

def build(kernel, signature, constants, arch, options=None):
    signature = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constexprs={(kernel.arg_names.index(k),): v
                                                      for k, v in constants.items()})
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    assert len(binary.asm["cubin"]) > 1000
    assert binary.metadata.shared <= {80: 163, 90: 227}[arch] * 1024
    return binary

for arch in (80, 90):
    for flags in ((1, 0, 0, 0, 0), (1, 1, 1, 1, 0), (0, 0, 0, 1, 1)):
        for block in (16, 1024):
            build(advantages._gae_fwd, GAE, dict(zip(FLAGS, flags)) | {"BLOCK_T": block}, arch)
    dual = {k: v for k, v in GAE.items() if k not in ("bootstrap", "supported", "floored")} | dict(
        costs=F32, cost_values=F32, cost_advantages=F32, combined=F32, multiplier="fp32")
    for cut, mask in itertools.product((False, True), repeat=2):
        build(advantages._dual_gae_fwd, dual, dict(HAS_CUT=cut, HAS_MASK=mask, BLOCK_T=1024), arch)
    shared = dict(rewards=F32, mask=I8, offsets=I64, batch_std="*fp64", advantages=F32,
                  group_size=INT, G=INT, eps="fp32")
    for baseline, scale, ragged in itertools.product((0, 1, 2), (0, 1, 2), (False, True)):
        build(grouped._grouped_fwd, shared, dict(BASELINE=baseline, SCALE=scale, BLOCK_G=4,
              HAS_OFFSETS=ragged, HAS_MASK=ragged, BLOCK_N=64), arch)
    for given, size in itertools.product((False, True), (4, 16)):
        build(comparison._grouped_comparison_fwd, dict(scores=F32, complete=I8, judged=I8,
              answer_scores=F32, n=INT), dict(HAS_COMPLETE=given, BLOCK_N=size), arch)
    steps = dict(logps=F32, old_logps=F32, advantages=F32, mask=I8, ref_logps=F32, weights=F32,
                 sums=F32, grad=F32, T=INT, eps_low="fp32", eps_high="fp32", beta="fp32")
    for kl, all_given in ((0, True), (1, True), (2, True), (2, False)):
        build(policy_loss._policy_loss_fwd, steps, dict(KL=kl, PER_ROW=all_given, BLOCK_T=1024)
              | {f"HAS_{x}": all_given for x in ("MASK", "REF", "WEIGHTS", "GRAD")}, arch)
    for dtype, masks in ((F32, False), (BF16, True)):
        tokens = dict(queries=F32, visual=dtype, tactile=dtype, visual_mask=I8, tactile_mask=I8,
                      log_sum=F32, H=INT, D=INT, NV=INT, NT=INT)
        given = dict(HAS_VISUAL_MASK=masks, HAS_TACTILE_MASK=masks) | fusion.blocks(8, 32)
        build(fusion._attention_fusion_fwd, tokens | dict(context=F32, weights=F32), given, arch,
              fusion.LAUNCH)
        build(fusion._attention_fusion_bwd, tokens | dict(grad_context=F32, grad_weights=F32,
              mean_grad=F32, grad_queries=F32, grad_visual=dtype, grad_tactile=dtype), given, arch,
              fusion.LAUNCH)
    for dtype in (F32, BF16):
        rows = dict(logits=dtype, ids=I64, stride=INT, V=INT, inverse_temperature="fp32")
        build(logprobs._token_logps_fwd, rows | dict(logps=F32, entropy=F32, tops=F32,
              log_sums=F32), {"BLOCK_V": 4096}, arch)
        build(logprobs._token_logps_bwd, rows | dict(grad_logps=F32, grad_entropy=F32,
              entropy=F32, tops=F32, log_sums=F32, grad=dtype), {"BLOCK_V": 4096}, arch)
        draw = dict(logits=dtype, uniforms=F32, ids=I64, logps=F32, stride=INT, V=INT,
                    inverse_temperature="fp32")
        build(sampling._sample_tokens_fwd, draw, {"BLOCK_V": 4096}, arch)
print("compiled")
"""


@pytest.mark.timeout(300)
def test_kernels_compile_for_sm_80_and_sm_90(tmp_path):
    require("triton")
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, env=env
    )
    assert done.stdout.strip() == "compiled", done.stderr[-3000:]
