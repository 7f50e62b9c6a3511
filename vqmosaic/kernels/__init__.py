"""Operations that are faster than torch's on some devices. Elsewhere, and wherever they do not apply, torch's own are used.

Each file has the plain reference, the faster version, and the condition under which it applies. The gain is the time of a training step or of
sampling without the kernel, divided by the time with it, on two cores of an AMD EPYC with bf16 products (benchmarks/RESULTS.md, "Kernels").

====================== ========================================================= ===========================================================
file                   when it applies                                           gain
====================== ========================================================= ===========================================================
complex_rotation       everywhere, except in float64 and under torch.compile     1.12 of a step in bf16, 1.11 of sampling
matmul_attention       training in bf16 on a CPU, up to 256 positions            1.49 of a step in bf16
group_norm             training in bf16 and channels_last on a CPU               1.85 of a step in bf16
upsampling             everywhere                                                1.05 of a step in bf16, 1.06 in float32
decoding_products      sampling on a CPU with oneDNN: few rows, large matrices   preset B: 2.1 of sampling in float32, 1.2 in bf16
single_query_attention sampling on a CPU                                         2.8 of sampling in bf16
====================== ========================================================= ===========================================================
"""
