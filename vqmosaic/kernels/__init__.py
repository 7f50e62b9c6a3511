"""Operations that are faster than torch's on some devices. Each falls back to torch's own elsewhere.

In training, torch.compile traces the reference unless the table says otherwise.

===================== ============================================================================ ============================
file                  when it applies                                                              reference
===================== ============================================================================ ============================
rotary                ``select_kernels``: training in bf16 on a CPU without a cache                ``reference``
matmul_attention      ``can_use_matmul_attention``: training in bf16 on a CPU, up to 256 positions ``reference``
                      ``can_use_single_head_matmul_attention``: the same, also under torch.compile ``single_head_reference``
squared_relu          always, on every device; in chunks if ``is_chunked``: on a CPU               ``reference``
chunked_cross_entropy ``can_use_chunked_cross_entropy``: training on a CPU                         ``reference``
embedding_lookup      ``find_occurrences``: training on a CPU                                      ``nn.Embedding``
group_norm            ``GroupNorm.forward``: training in bf16 on a CPU, also under torch.compile   ``nn.GroupNorm``, ``F.silu``
decoding_products     ``Product`` and ``can_pack``: few rows, on a CPU with oneDNN                 ``F.linear``
===================== ============================================================================ ============================
"""
