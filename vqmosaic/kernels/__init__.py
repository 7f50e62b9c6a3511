"""Operations that are faster than torch's on some devices. Elsewhere, and wherever they do not apply, torch's own are used.

Each file has the plain reference, the faster version, and the condition under which it applies. The gain is the time of a training step or of
sampling without the kernel, divided by the time with it, on two cores of an AMD EPYC with bf16 instructions; for dropout, on those of an
Intel Xeon (benchmarks/RESULTS.md, "Kernels").

====================== ========================================================= ==========================================================
file                   when it applies                                           gain
====================== ========================================================= ==========================================================
complex_rotation       everywhere, except in float64 and under torch.compile     1.11 of a step in bf16, 1.10 of sampling
matmul_attention       training in bf16 on a CPU, up to 256 positions            1.46 of a step of the prior in bf16, 1.03 of the tokenizer
group_norm             the same in channels_last, except under torch.compile     1.82 of a step in bf16
upsampling             everywhere                                                1.03 of a step in bf16, 1.07 in float32
dropout                training on a CPU, except under torch.compile             1.20 of a step of the prior in float32, 1.06 in bf16
decoding_products      sampling on a CPU: in bf16, and few rows in float32       preset B: 2.0 of sampling in float32, 1.2 in bf16
single_query_attention sampling on a CPU                                         2.3 to 2.7 of sampling in bf16
====================== ========================================================= ==========================================================
"""
